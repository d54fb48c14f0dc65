//! One HTTP/1 question over a connection of its own.

use bytes::{Bytes, BytesMut};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

/// Why there is no usable answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExchangeError {
    /// The peer does not speak HTTP, or the connection broke.
    #[error("no answer in HTTP: {0}")]
    Http(#[from] hyper::Error),
    /// The answer is longer than anything that has a meaning.
    #[error("the answer has more than {limit} bytes")]
    TooLong {
        /// The limit, in bytes.
        limit: usize,
    },
}

/// Asks over `stream` and hands the answer, its body unread, to `read`.
///
/// The connection ends with the answer; no task is left behind.
pub(crate) async fn ask<S, F, T>(
    stream: S,
    request: Request<Full<Bytes>>,
    read: impl FnOnce(Response<Incoming>) -> F,
) -> Result<T, hyper::Error>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
    F: Future<Output = T>,
{
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let answer = async move {
        let response = sender.send_request(request).await?;
        Ok(read(response).await)
    };
    // The connection is driven here, and may end just before the answer where the peer closes.
    let (mut answer, connection) = (std::pin::pin!(answer), std::pin::pin!(connection));
    tokio::select! {
        answer = &mut answer => answer,
        ended = connection => match ended {
            Ok(()) => answer.await,
            Err(source) => Err(source),
        },
    }
}

/// Asks over `stream` for an answer of up to `limit` bytes.
pub(crate) async fn ask_for_bytes<S>(
    stream: S,
    request: Request<Full<Bytes>>,
    limit: usize,
) -> Result<Response<Bytes>, ExchangeError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin,
{
    Box::pin(ask(stream, request, |response| collected(response, limit))).await?
}

async fn collected(
    response: Response<Incoming>,
    limit: usize,
) -> Result<Response<Bytes>, ExchangeError> {
    let (parts, mut body) = response.into_parts();
    let mut bytes = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        if bytes.len() + data.len() > limit {
            return Err(ExchangeError::TooLong { limit });
        }
        bytes.extend_from_slice(&data);
    }
    Ok(Response::from_parts(parts, bytes.freeze()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    async fn answered(answer: &[u8], limit: usize) -> Result<Response<Bytes>, ExchangeError> {
        let (ours, mut theirs) = tokio::io::duplex(64 * 1024);
        let answer = answer.to_vec();
        let serve = async move {
            let mut asked = [0; 1024];
            let length = theirs.read(&mut asked).await.unwrap();
            assert!(asked[..length].starts_with(b"GET /x HTTP/1.1\r\n"));
            theirs.write_all(&answer).await.unwrap();
        };
        let request = Request::get("/x").body(Full::default()).unwrap();
        tokio::join!(ask_for_bytes(ours, request, limit), serve).0
    }

    #[tokio::test]
    async fn answers_are_read_up_to_the_limit() {
        let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabcd";
        let chunked =
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n";
        let closed = b"HTTP/1.1 200 OK\r\n\r\nabcd";
        for answer in [&whole[..], chunked, closed] {
            assert_eq!(answered(answer, 4).await.unwrap().body(), "abcd");
            let error = answered(answer, 3).await.unwrap_err();
            assert!(matches!(error, ExchangeError::TooLong { limit: 3 }));
        }
    }

    #[tokio::test]
    async fn what_is_no_whole_answer_is_an_error() {
        for answer in [
            &b""[..],
            b"SSH-2.0-x\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nabcd",
        ] {
            let error = answered(answer, 100).await.unwrap_err();
            assert!(matches!(error, ExchangeError::Http(_)), "{answer:?}");
        }
    }
}
