//! gRPC as far as the Workload API needs it: one message comes in, ready bytes go out.
//!
//! A generated server encodes each message for each stream, into a buffer that each stream keeps for
//! as long as it lives. Here a message is encoded once, and all streams that send it share the bytes
//! down to the socket.

use std::pin::{Pin, pin};
use std::task::{Context, Poll};

use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Response};
use http_body_util::BodyExt as _;
use hyper::body::Frame;
use prost::Message;
use tonic::Status;
use tonic::body::Body;

/// The largest request, in bytes; the largest that has a meaning carries one token.
pub(super) const MAX_REQUEST: usize = 32 * 1024;
/// What stands before a message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// An encoded message as it goes over the wire, its prefix included.
pub(super) fn packet(message: &impl Message) -> Bytes {
    let length = message.encoded_len();
    let mut bytes = BytesMut::with_capacity(PREFIX + length);
    bytes.put_u8(0);
    bytes.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    // A buffer that grows has room for every message.
    let _fits = message.encode(&mut bytes);
    bytes.freeze()
}

/// Reads the one message of a request.
pub(super) async fn request<M: Message + Default>(
    body: impl hyper::body::Body<Data = Bytes>,
) -> Result<M, Status> {
    let mut body = pin!(body);
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_broken| Status::cancelled("the request broke off"))?;
        let Ok(data) = frame.into_data() else {
            continue;
        };
        if bytes.len() + data.len() > PREFIX + MAX_REQUEST {
            return Err(Status::resource_exhausted(format!(
                "a request has at most {MAX_REQUEST} bytes"
            )));
        }
        bytes.extend_from_slice(&data);
    }
    let Some((prefix, message)) = bytes.split_first_chunk::<PREFIX>() else {
        return Err(Status::internal("the request holds no message"));
    };
    let [compressed, length @ ..] = *prefix;
    if compressed != 0 {
        return Err(Status::unimplemented(
            "compressed messages are not understood",
        ));
    }
    if usize::try_from(u32::from_be_bytes(length)) != Ok(message.len()) {
        return Err(Status::internal("the request is not one whole message"));
    }
    M::decode(message).map_err(|error| Status::internal(format!("the request: {error}")))
}

/// An answer of one message.
pub(super) fn one(packet: Bytes) -> Response<Body> {
    answer(Body::new(One {
        packet: Some(packet),
        ended: false,
    }))
}

/// An answer of messages that come with time.
pub(super) fn many(packets: BoxStream<'static, Result<Bytes, Status>>) -> Response<Body> {
    answer(Body::new(Many {
        packets: Some(packets),
    }))
}

fn answer(body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(CONTENT_TYPE, grpc);
    response
}

/// The end of an answer.
pub(super) fn trailers(status: &Status) -> Frame<Bytes> {
    let mut trailers = HeaderMap::with_capacity(2);
    if status.add_header(&mut trailers).is_err() {
        trailers.insert("grpc-status", HeaderValue::from_static("13"));
    }
    Frame::trailers(trailers)
}

type NextFrame = Poll<Option<Result<Frame<Bytes>, Status>>>;

struct One {
    packet: Option<Bytes>,
    ended: bool,
}

impl hyper::body::Body for One {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> NextFrame {
        if let Some(packet) = self.packet.take() {
            return Poll::Ready(Some(Ok(Frame::data(packet))));
        }
        if std::mem::replace(&mut self.ended, true) {
            return Poll::Ready(None);
        }
        Poll::Ready(Some(Ok(trailers(&Status::ok("")))))
    }
}

struct Many {
    /// `None` after the end.
    packets: Option<BoxStream<'static, Result<Bytes, Status>>>,
}

impl hyper::body::Body for Many {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> NextFrame {
        let Some(packets) = &mut self.packets else {
            return Poll::Ready(None);
        };
        let status = match std::task::ready!(packets.poll_next_unpin(context)) {
            Some(Ok(packet)) => return Poll::Ready(Some(Ok(Frame::data(packet)))),
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        self.packets = None;
        Poll::Ready(Some(Ok(trailers(&status))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::workload_api::JwtsvidRequest;
    use futures_util::stream;
    use http_body_util::Full;
    use tonic::Code;

    fn message() -> JwtsvidRequest {
        JwtsvidRequest {
            audience: vec!["a".into()],
            spiffe_id: String::new(),
        }
    }

    async fn read(bytes: impl Into<Bytes>) -> Result<JwtsvidRequest, Code> {
        let body = Body::new(Full::new(bytes.into()).map_err(|never| match never {}));
        request(body).await.map_err(|status| status.code())
    }

    #[tokio::test]
    async fn a_request_is_one_whole_message() {
        let good = packet(&message());
        assert_eq!(read(good.clone()).await, Ok(message()));
        let compressed = [&[1], &good[1..]].concat();
        let invalid = [&[0, 0, 0, 0, 1][..], &[0xff]].concat();
        for (bytes, code) in [
            (vec![], Code::Internal),
            (vec![0, 0], Code::Internal),
            (good[..good.len() - 1].to_vec(), Code::Internal),
            ([&good[..], &good[..]].concat(), Code::Internal),
            (compressed, Code::Unimplemented),
            (invalid, Code::Internal),
            (vec![0; PREFIX + MAX_REQUEST + 1], Code::ResourceExhausted),
        ] {
            let length = bytes.len();
            assert_eq!(read(bytes).await, Err(code), "{length} bytes");
        }
    }

    #[tokio::test]
    async fn answers_end_with_their_status() {
        let bytes = || Bytes::from_static(b"x");
        let packets = |last: Status| stream::iter([Ok(bytes()), Ok(bytes()), Err(last)]).boxed();
        for (response, frames, code) in [
            (one(bytes()), 1, "0"),
            (many(packets(Status::unavailable("gone"))), 2, "14"),
            (many(stream::iter([Ok(bytes())]).boxed()), 1, "0"),
        ] {
            let mut body = response.into_body();
            for _ in 0..frames {
                let frame = body.frame().await.unwrap().unwrap();
                assert_eq!(frame.into_data().unwrap(), bytes());
            }
            let frame = body.frame().await.unwrap().unwrap();
            assert_eq!(frame.into_trailers().unwrap()["grpc-status"], code);
            assert!(body.frame().await.is_none());
        }
    }
}
