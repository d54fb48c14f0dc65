//! A workload: connects to a socket and asks.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tbot::pb::workload_api::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use tbot::pb::workload_api::{JwtsvidRequest, JwtsvidResponse, X509svidRequest, X509svidResponse};
use tokio::net::UnixStream;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status, Streaming};
use tower::service_fn;

pub(crate) type Client = SpiffeWorkloadApiClient<Channel>;

pub(crate) async fn connect(socket: &Path) -> Result<Client, tonic::transport::Error> {
    let socket: PathBuf = socket.to_owned();
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await?;
    Ok(SpiffeWorkloadApiClient::new(channel))
}

fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let yes = MetadataValue::from_static("true");
    request.metadata_mut().insert("workload.spiffe.io", yes);
    request
}

/// The first message, and the stream that goes on.
pub(crate) async fn fetch(
    client: &mut Client,
) -> Result<(X509svidResponse, Streaming<X509svidResponse>), Status> {
    let stream = client.fetch_x509svid(request(X509svidRequest {})).await?;
    let mut stream = stream.into_inner();
    let message = stream.message().await?;
    let message = message.ok_or_else(|| Status::internal("no message"))?;
    Ok((message, stream))
}

pub(crate) async fn fetch_jwt(client: &mut Client) -> Result<JwtsvidResponse, Status> {
    let wanted = JwtsvidRequest {
        audience: vec!["bench.example.com".to_owned()],
        spiffe_id: String::new(),
    };
    let answer = client.fetch_jwtsvid(request(wanted)).await?;
    Ok(answer.into_inner())
}

/// Asks until there is an answer.
pub(crate) async fn first_svid(socket: &Path) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Ok(mut client) = connect(socket).await
            && fetch(&mut client).await.is_ok()
        {
            return;
        }
        assert!(Instant::now() < deadline, "no SVID at {}", socket.display());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}
