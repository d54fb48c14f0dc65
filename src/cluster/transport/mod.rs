//! Reaching an SSH server through the proxy: a stream of `teleport.transport.v1` that carries the
//! bytes of SSH, end to end between a client and that server.
//!
//! The proxy serves this by TLS, under an ALPN name of its own (upstream `api/client/proxy`), on its
//! shared port, and on its SSH port where it has no shared one.

mod agent;

use std::io;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::channel::over;
use super::client::Version;
use super::dial::{self, Dialer, Opening};
use super::{ClusterError, Credential};
use crate::pb::teleport::transport::v1::transport_service_client::TransportServiceClient;
use crate::pb::teleport::transport::v1::{
    Frame, ProxySshRequest, ProxySshResponse, TargetHost, proxy_ssh_request, proxy_ssh_response,
};
pub(crate) use agent::Agent;

/// What the proxy tells these connections by.
const PROTOCOL: &[u8] = b"teleport-proxy-ssh-grpc";
/// The longest that a proxy may take to reach a host.
const REACH: Duration = Duration::from_secs(30);
/// How long a peer may still send after the client has said its last.
const LAST: Duration = Duration::from_secs(1);
/// The most that is sent in one frame, in bytes. Proxies take 4 MiB.
const CHUNK: usize = 64 * 1024;
/// Frames that wait to be sent.
const WAITING: usize = 4;
/// The call, for messages.
const CALL: &str = "ProxySSH";

/// Which host, and by which proxy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Target<'a> {
    /// The proxy's `host:port`.
    pub(crate) proxy: &'a str,
    /// How the way to the proxy is opened.
    pub(crate) opening: Opening,
    /// The host's name, address or ID, and its port: `host:port`.
    pub(crate) host: &'a str,
    /// The cluster that the host is a node of.
    pub(crate) cluster: &'a str,
}

/// An open stream to a host.
#[derive(Debug)]
pub(crate) struct Session {
    to: mpsc::Sender<ProxySshRequest>,
    from: Streaming<ProxySshResponse>,
    agent: Agent,
}

/// Has the proxy reach the host. `agent` answers for the holder of `credential` where the proxy
/// itself has to log in, which is only where it records sessions.
pub(crate) async fn open(
    dialer: &dyn Dialer,
    credential: &Credential,
    agent: Agent,
    target: Target<'_>,
) -> Result<Session, ClusterError> {
    let name = dial::server_name(target.proxy)?;
    let tls = credential.tls(vec![PROTOCOL.to_vec(), b"h2".to_vec()]);
    let stream = match target.opening {
        Opening::Plain => dial::tls(dialer, target.proxy, name, tls).await,
        Opening::Upgraded => dial::tls_upgraded(dialer, target.proxy, name, tls).await,
    }?;
    let mut client = TransportServiceClient::with_interceptor(over(stream)?, Version);
    let reach = async {
        let (to, requests) = mpsc::channel(WAITING);
        let first = ProxySshRequest {
            dial_target: Some(TargetHost {
                host_port: target.host.to_owned(),
                cluster: target.cluster.to_owned(),
            }),
            frame: None,
        };
        // There is room, and the receiver is here.
        let _sent = to.try_send(first);
        let answer = client.proxy_ssh(ReceiverStream::new(requests)).await?;
        let mut from = answer.into_inner();
        let details = from.message().await?;
        details.ok_or_else(|| tonic::Status::unavailable("the proxy ended the stream at once"))?;
        Ok(Session { to, from, agent })
    };
    let late = |_elapsed| {
        let seconds = REACH.as_secs();
        Err(tonic::Status::deadline_exceeded(format!(
            "no answer within {seconds} s"
        )))
    };
    let reached = timeout(REACH, reach).await.unwrap_or_else(late);
    reached.map_err(ClusterError::call(CALL))
}

impl Session {
    /// Carries bytes until either side ends. The host's last words still get through. `output` has
    /// to write by itself what it was given: it is flushed at the end only.
    ///
    /// # Errors
    /// The proxy's reason for ending the stream, or `input` that cannot be read. An `output` that
    /// went away is no error: nobody is interested any more.
    pub(crate) async fn carry(
        self,
        input: impl AsyncRead + Unpin,
        output: impl AsyncWrite + Unpin,
    ) -> io::Result<()> {
        let Self { to, from, agent } = self;
        // The sender below may be dropped although the agent could still have something to say.
        let mut host = std::pin::pin!(from_host(from, output, agent, to.downgrade()));
        tokio::select! {
            ended = &mut host => ended,
            read = from_client(input, to) => {
                read?;
                timeout(LAST, host).await.unwrap_or(Ok(()))
            }
        }
    }
}

/// Sends what `input` gives, until it ends or nobody takes it any more.
async fn from_client(
    mut input: impl AsyncRead + Unpin,
    to: mpsc::Sender<ProxySshRequest>,
) -> io::Result<()> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(CHUNK);
        if input.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
        let frame = proxy_ssh_request::Frame::Ssh(frame(buffer.split().freeze()));
        if to.send(request(frame)).await.is_err() {
            return Ok(());
        }
    }
}

/// Writes what the host sends to `output`, until it ends.
async fn from_host(
    mut from: Streaming<ProxySshResponse>,
    mut output: impl AsyncWrite + Unpin,
    mut agent: Agent,
    to: mpsc::WeakSender<ProxySshRequest>,
) -> io::Result<()> {
    while let Some(response) = from.message().await.map_err(ended)? {
        match response.frame {
            Some(proxy_ssh_response::Frame::Ssh(Frame { payload })) => {
                match output.write_all(&payload).await {
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                    other => other?,
                }
            }
            Some(proxy_ssh_response::Frame::Agent(Frame { payload })) => {
                let answer = agent.answer(&payload)?;
                if let Some(to) = to.upgrade()
                    && !answer.is_empty()
                {
                    let answer = proxy_ssh_request::Frame::Agent(frame(answer.into()));
                    // If it is gone, so is the stream, and that is told above.
                    let _sent = to.send(request(answer)).await;
                }
            }
            None => {}
        }
    }
    output.flush().await
}

fn ended(status: tonic::Status) -> io::Error {
    io::Error::other(ClusterError::call(CALL)(status))
}

fn frame(payload: Bytes) -> Frame {
    Frame { payload }
}

fn request(frame: proxy_ssh_request::Frame) -> ProxySshRequest {
    ProxySshRequest {
        dial_target: None,
        frame: Some(frame),
    }
}
