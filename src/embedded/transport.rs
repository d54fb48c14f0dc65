//! SSH to nodes: a stream of bytes between a client and the server that a `node` resource stands
//! for, for whoever has a role that sees the node (upstream `lib/srv/transport/transportv1`).
//!
//! What goes through is SSH between those two: the server checks the client's certificate and its
//! login by the user authority, the client checks the server's by the host authority.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::BytesMut;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

use super::ClusterState;
use super::access::Access;
use super::auth::{Refusal, WhileAllowed, authorize, blocking, caller};
use super::caller::Caller;
use super::store::Resource;
use crate::pb::teleport::transport::v1::transport_service_server::{
    TransportService, TransportServiceServer,
};
use crate::pb::teleport::transport::v1::{
    ClusterDetails, Frame, ProxySshRequest, ProxySshResponse, TargetHost, proxy_ssh_request,
    proxy_ssh_response,
};

/// How long a client may take to say where it wants to go, and a node to be reached.
const PATIENCE: Duration = Duration::from_secs(20);
/// The most that is sent in one frame, in bytes.
const CHUNK: usize = 32 * 1024;
/// Frames that wait for a slow client.
const WAITING: usize = 4;
/// The event of a connection, and its codes when it was made and when it could not be. On a Teleport
/// cluster nodes write `session.start`; this is our own.
const EVENT: (&str, &str, &str) = ("node.connect", "TNC00I", "TNC00E");
/// A time that no connection lives to see.
const NEVER: Duration = Duration::from_secs(u32::MAX as u64);

/// The services of the proxy's side for SSH.
pub(super) fn routes(state: &Arc<ClusterState>) -> Routes {
    let state = Arc::clone(state);
    Routes::default().add_service(TransportServiceServer::new(Transport { state }))
}

#[derive(Debug)]
struct Transport {
    state: Arc<ClusterState>,
}

#[tonic::async_trait]
impl TransportService for Transport {
    type ProxySSHStream = WhileAllowed<ProxySshResponse>;

    async fn proxy_ssh(
        &self,
        request: Request<Streaming<ProxySshRequest>>,
    ) -> Result<Response<Self::ProxySSHStream>, Status> {
        let caller = caller(&request)?;
        let mut requests = request.into_inner();
        let first = timeout(PATIENCE, requests.message()).await;
        let first = first.map_err(|_elapsed| Status::deadline_exceeded("no dial target"))??;
        let target = first
            .and_then(|first| first.dial_target)
            .ok_or_else(|| Refusal::bad_parameter("first frame must contain a dial target"))?;
        let (state, who) = (Arc::clone(&self.state), caller.clone());
        let found = blocking(move || find(&state, &who, &target)).await?;
        let host = connect(&self.state, found).await?;
        // Without it, single keystrokes wait; where it fails, they do.
        drop(host.set_nodelay(true));
        let (responses, stream) = mpsc::channel(WAITING);
        let details = ProxySshResponse {
            details: Some(ClusterDetails {
                fips_enabled: false,
            }),
            frame: None,
        };
        // There is room, and the receiver is here.
        let _sent = responses.try_send(Ok(details));
        // It ends when either side does.
        tokio::spawn(carry(host, requests, responses));
        let stream = ReceiverStream::new(stream);
        Ok(Response::new(WhileAllowed::new(
            &self.state,
            lasting(caller),
            stream,
        )))
    }
}

/// The caller as far as open connections care: they outlive the certificate that they began with,
/// and end with a lock, as on a Teleport cluster (`disconnect_expired_cert` is off there).
fn lasting(mut caller: Caller) -> Caller {
    if let Some(identity) = &mut caller.identity {
        identity.expires = SystemTime::UNIX_EPOCH + NEVER;
    }
    caller
}

/// The node that a caller means.
struct Found {
    address: String,
    /// Who goes where, for the audit log.
    who: Value,
}

/// Connects to it, and writes what came of that into the audit log.
async fn connect(state: &ClusterState, found: Found) -> Result<TcpStream, Refusal> {
    let Found { address, mut who } = found;
    let host = timeout(PATIENCE, TcpStream::connect(&address)).await;
    let host = host
        .unwrap_or_else(|_elapsed| Err(std::io::ErrorKind::TimedOut.into()))
        .map_err(|error| format!("the node's address {address} cannot be reached: {error}"));
    let (event, made, failed) = EVENT;
    if let Value::Object(members) = &mut who {
        let code = if host.is_ok() { made } else { failed };
        members.insert("event".to_owned(), event.into());
        members.insert("code".to_owned(), code.into());
        members.insert("success".to_owned(), host.is_ok().into());
        if let Err(error) = &host {
            members.insert("error".to_owned(), error.as_str().into());
        }
    }
    state.audit.emit(who);
    host.map_err(|error| Refusal::unavailable(error).context("failed to dial target host"))
}

/// The one node that `target` means, among those that the caller's roles see.
fn find(state: &ClusterState, caller: &Caller, target: &TargetHost) -> Result<Found, Refusal> {
    let identity = authorize(state, caller)?;
    if target.cluster != state.name {
        let text = format!("cluster {:?} is not found", target.cluster);
        return Err(Refusal::not_found(text));
    }
    let host = target.host_port.rsplit_once(':');
    let (host, _port) =
        host.ok_or_else(|| Refusal::bad_parameter("dial target contains an invalid hostport"))?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let node = state.store.transaction(|tx| {
        let access = Access::of(tx, &identity.roles)?;
        let nodes = tx.list("node")?;
        let mut fitting = nodes
            .into_iter()
            .filter(|node| is_called(node, host) && access.sees("node_labels", &node.labels));
        match (fitting.next(), fitting.next()) {
            (Some(node), None) => Ok(node),
            (Some(_), Some(_)) => Err(Refusal::bad_parameter(format!(
                "ambiguous host could match multiple nodes: use the name of one `node` instead of {host:?}"
            ))),
            (None, _) => Err(Refusal::unavailable(
                "direct dialing to nodes not found in inventory is not supported",
            )),
        }
        .map_err(|refusal: Refusal| refusal.context("failed to dial target host"))
    })?;
    let address = node.spec_text("/addr").to_owned();
    let who = json!({
        "user": identity.user,
        "bot_name": identity.bot_name,
        "bot_instance_id": identity.bot_instance_id,
        "server_id": node.name,
        "server_hostname": node.spec_text("/hostname"),
        "server_addr": address,
        "addr.remote": caller.addr.ip().to_string(),
    });
    Ok(Found { address, who })
}

/// Whether a node goes by this name. A port says nothing: a node has one.
fn is_called(node: &Resource, host: &str) -> bool {
    let address = node.spec_text("/addr");
    let address = address.rsplit_once(':').map_or(address, |(host, _)| host);
    let address = address.trim_start_matches('[').trim_end_matches(']');
    [node.name.as_str(), node.spec_text("/hostname"), address].contains(&host)
}

/// Carries bytes until either side is gone. A client that has said its last still hears the host's.
async fn carry(
    host: TcpStream,
    mut requests: Streaming<ProxySshRequest>,
    responses: mpsc::Sender<Result<ProxySshResponse, Status>>,
) {
    let (mut from_host, mut to_host) = host.into_split();
    let up = async {
        while let Ok(Some(request)) = requests.message().await {
            if let Some(proxy_ssh_request::Frame::Ssh(Frame { payload })) = request.frame
                && to_host.write_all(&payload).await.is_err()
            {
                break;
            }
        }
        // The host is told; if that fails, it knows.
        drop(to_host.shutdown().await);
        std::future::pending::<()>().await;
    };
    let down = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(CHUNK);
            if !matches!(from_host.read_buf(&mut buffer).await, Ok(1..)) {
                break;
            }
            let payload = buffer.split().freeze();
            let response = ProxySshResponse {
                details: None,
                frame: Some(proxy_ssh_response::Frame::Ssh(Frame { payload })),
            };
            if responses.send(Ok(response)).await.is_err() {
                break;
            }
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
        () = responses.closed() => {}
    }
}
