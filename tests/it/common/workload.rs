//! A workload that speaks the Workload API as bytes: any method, any metadata, nothing decoded.

use std::path::{Path, PathBuf};

use bytes::{Buf as _, BufMut as _, Bytes};
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::metadata::AsciiMetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tower::service_fn;

/// The metadata that the standard asks for.
const HEADER: &str = "workload.spiffe.io";

/// One connection to a socket.
#[derive(Clone)]
pub(crate) struct Workload {
    channel: Channel,
}

impl Workload {
    /// Connects, waiting until the socket is there.
    pub(crate) async fn connect(socket: &Path) -> Self {
        let socket = PathBuf::from(socket);
        for _ in 0..2400 {
            if let Ok(workload) = Self::try_connect(&socket).await {
                return workload;
            }
            tokio::time::sleep(std::time::Duration::from_millis(25)).await;
        }
        panic!("nobody answers on {}", socket.display());
    }

    /// Connects now or not at all.
    pub(crate) async fn try_connect(socket: &Path) -> Result<Self, tonic::transport::Error> {
        let socket = PathBuf::from(socket);
        let connector = service_fn(move |_uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://localhost");
        let channel = endpoint.connect_with_connector(connector).await?;
        Ok(Self { channel })
    }

    /// Opens a call of the Workload API with these values of the header; no message has come yet.
    pub(crate) async fn open_with(
        &self,
        method: &str,
        header: &[&str],
        message: &impl Message,
    ) -> Result<Streaming<Bytes>, Status> {
        let path = format!("/SpiffeWorkloadAPI/{method}");
        let mut request = Request::new(Bytes::from(message.encode_to_vec()));
        for value in header {
            let value = AsciiMetadataValue::try_from(*value).expect("a header");
            request.metadata_mut().append(HEADER, value);
        }
        self.open_path(&path, request).await
    }

    /// Opens a call of any service.
    pub(crate) async fn open_path(
        &self,
        path: &str,
        request: Request<Bytes>,
    ) -> Result<Streaming<Bytes>, Status> {
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready()
            .await
            .map_err(|source| Status::unavailable(source.to_string()))?;
        let path = path.parse().expect("a path");
        let response = grpc.server_streaming(request, path, Raw).await?;
        Ok(response.into_inner())
    }

    /// A stream as a client of the standard opens it.
    pub(crate) async fn open(
        &self,
        method: &str,
        message: &impl Message,
    ) -> Result<Streaming<Bytes>, Status> {
        self.open_with(method, &["true"], message).await
    }

    /// The first message of a call, or the only one.
    pub(crate) async fn first(
        &self,
        method: &str,
        message: &impl Message,
    ) -> Result<Bytes, Status> {
        first(self.open(method, message).await?).await
    }

    /// The first message, decoded; fails if it has fields that the standard does not know.
    pub(crate) async fn fetch<M: Message + Default>(
        &self,
        method: &str,
        message: &impl Message,
    ) -> Result<M, Status> {
        let bytes = self.first(method, message).await?;
        Ok(decode(&bytes))
    }
}

/// The next message of a call.
pub(crate) async fn first(mut stream: Streaming<Bytes>) -> Result<Bytes, Status> {
    let message = stream.message().await?;
    message.ok_or_else(|| Status::unknown("it ended without a message"))
}

/// Decodes a message and sees to it that nothing was left over.
pub(crate) fn decode<M: Message + Default>(bytes: &Bytes) -> M {
    let message = M::decode(bytes.clone()).expect("a message");
    assert_eq!(
        message.encoded_len(),
        bytes.len(),
        "fields that the standard does not have"
    );
    message
}

/// Passes messages through as bytes.
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = buffer.remaining();
        Ok(Some(buffer.copy_to_bytes(length)))
    }
}
