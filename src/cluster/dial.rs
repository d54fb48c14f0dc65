//! Opening connections: a dialer that tests can replace, and TLS over it.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::ClusterError;
use super::tunnel::{self, SshIdentity};

/// The longest that TCP and TLS may take to open, each, and that a discovery may take. Shorter than
/// the 30 s of a call, so that a peer that never answers is named and not the call.
pub const TIMEOUT: Duration = Duration::from_secs(20);

/// A byte stream to a peer.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A byte stream of whatever kind.
pub type BoxedIo = Pin<Box<dyn Io>>;

/// Opens byte streams. Addresses are `host:port`.
///
/// Only [`Dialer::dial`] has to be there; what the others answer by themselves fits a network on
/// which every address is what it seems to be.
#[async_trait]
pub trait Dialer: Send + Sync + fmt::Debug {
    /// Connects to `address`.
    async fn dial(&self, address: &str) -> io::Result<BoxedIo>;

    /// Connects to the shared port of the proxy at `address`, where ALPN says what is wanted: in a
    /// tunnel where something in front is known to hide ALPN.
    async fn dial_proxy(&self, address: &str) -> io::Result<BoxedIo> {
        self.dial(address).await
    }

    /// Connects to that port inside of an upgraded connection, and in no other way.
    async fn dial_upgraded(&self, address: &str) -> io::Result<BoxedIo> {
        let _ = address;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Where agents of the proxy at `address` should connect, best first.
    async fn places(&self, address: &str) -> Vec<String> {
        vec![address.to_owned()]
    }

    /// The tunnel port of the proxy at `address`, where its ports do not tell protocols apart: the
    /// auth service is reached by SSH only.
    async fn tunnel(&self, address: &str) -> Option<String> {
        let _ = address;
        None
    }

    /// Whether something in front of the proxy at `address` hides ALPN, if that is known.
    fn hides_alpn(&self, address: &str) -> Option<bool> {
        let _ = address;
        Some(false)
    }

    /// Finds that out, where it is not known. `false` if it cannot be found out now.
    async fn probe(&self, address: &str) -> bool {
        self.hides_alpn(address) == Some(true)
    }

    /// Whether the auth service's configured `address` is that of a proxy. `tried` says that it did
    /// not answer as an auth service.
    async fn is_proxy(&self, address: &str, tried: bool) -> bool {
        let _ = (address, tried);
        false
    }
}

/// How the way to an address is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    /// As it is.
    Plain,
    /// Inside of a connection that something in front had to upgrade.
    Upgraded,
}

/// Dials TCP.
#[derive(Debug, Clone, Copy, Default)]
pub struct Tcp;

#[async_trait]
impl Dialer for Tcp {
    async fn dial(&self, address: &str) -> io::Result<BoxedIo> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Box::pin(stream))
    }
}

/// Opens a TLS connection to `address` as `name`; both steps within [`TIMEOUT`].
pub async fn tls(
    dialer: &dyn Dialer,
    address: &str,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<BoxedIo>, ClusterError> {
    let io = opened(address, dialer.dial(address)).await?;
    tls_over(io, address, name, config).await
}

/// The same to the shared port of the proxy at `address`.
pub async fn tls_to_proxy(
    dialer: &dyn Dialer,
    address: &str,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<BoxedIo>, ClusterError> {
    let io = opened(address, dialer.dial_proxy(address)).await?;
    tls_over(io, address, name, config).await
}

/// The same to that port inside of an upgraded connection.
pub(super) async fn tls_upgraded(
    dialer: &dyn Dialer,
    address: &str,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<BoxedIo>, ClusterError> {
    let io = opened(address, dialer.dial_upgraded(address)).await?;
    tls_over(io, address, name, config).await
}

/// The same to the auth service behind the proxy whose tunnel port is `address`.
pub(super) async fn tls_in_tunnel(
    dialer: &dyn Dialer,
    address: &str,
    identity: &SshIdentity,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<BoxedIo>, ClusterError> {
    let io = opened(address, dialer.dial(address)).await?;
    let io = opened(address, tunnel::open(io, identity)).await?;
    tls_over(io, address, name, config).await
}

/// A stream to `address` within [`TIMEOUT`].
async fn opened(
    address: &str,
    dialled: impl Future<Output = io::Result<BoxedIo>>,
) -> Result<BoxedIo, ClusterError> {
    timeout(TIMEOUT, dialled)
        .await
        .unwrap_or_else(|_elapsed| Err(late()))
        .map_err(|source| ClusterError::Dial {
            address: address.to_owned(),
            source,
        })
}

fn late() -> io::Error {
    let problem = format!("no answer within {} s", TIMEOUT.as_secs());
    io::Error::new(io::ErrorKind::TimedOut, problem)
}

/// TLS over `io`, which leads to `address`, within [`TIMEOUT`].
pub(super) async fn tls_over(
    io: BoxedIo,
    address: &str,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
) -> Result<TlsStream<BoxedIo>, ClusterError> {
    timeout(TIMEOUT, TlsConnector::from(config).connect(name, io))
        .await
        .unwrap_or_else(|_elapsed| Err(late()))
        .map_err(|source| ClusterError::Tls {
            address: address.to_owned(),
            source,
        })
}

/// The host of `host:port`, brackets of an IPv6 address taken off.
pub fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host)
}

/// Whom TLS should find at `address`.
pub fn server_name(address: &str) -> Result<ServerName<'static>, ClusterError> {
    ServerName::try_from(host_of(address).to_owned()).map_err(|_source| {
        ClusterError::Trust(format!(
            "{address}: not a host name or IP address with a port"
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_taken_out_of_addresses() {
        for (address, host) in [
            ("example.org:443", "example.org"),
            ("127.0.0.1:3080", "127.0.0.1"),
            ("[::1]:3080", "::1"),
            ("example.org", "example.org"),
        ] {
            assert_eq!(host_of(address), host);
        }
    }
}
