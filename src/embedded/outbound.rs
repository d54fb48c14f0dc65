//! Requests to AWS and to bundle endpoints: one connection each, no redirects, bounded in time and
//! size.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;

/// The longest that one answer may take, from connecting to the last byte.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why a request got no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OutboundError {
    /// No connection, or it broke.
    #[error("cannot reach {address}: {source}")]
    Io {
        /// Host and port.
        address: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// What answered does not speak HTTP, or said more than is read.
    #[error("{address} gave no usable answer: {reason}")]
    Answer {
        /// Host and port.
        address: String,
        /// What was wrong.
        reason: String,
    },
    /// No answer within ten seconds.
    #[error("{0} did not answer within 10 s")]
    Timeout(String),
    /// The request has no form on the wire: a header with a line break.
    #[error("the request cannot be written: {0}")]
    Request(#[from] http::Error),
}

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    host: String,
    port: u16,
    secure: bool,
}

impl Target {
    /// The usual port of an HTTPS host.
    pub(super) fn https(host: &str) -> Self {
        Self::https_at(host, 443)
    }

    /// A port of an HTTPS host.
    pub(super) fn https_at(host: &str, port: u16) -> Self {
        Self {
            host: host.to_owned(),
            port,
            secure: true,
        }
    }

    /// A configured endpoint: an http or https URL with a host and nothing behind it.
    pub(super) fn parse(url: &str) -> Option<Self> {
        let uri: Uri = url.parse().ok()?;
        let secure = match uri.scheme_str()? {
            "https" => true,
            "http" => false,
            _ => return None,
        };
        let host = uri.host().filter(|host| !host.is_empty())?;
        let plain = matches!(uri.path(), "" | "/")
            && uri.query().is_none()
            && !uri.authority()?.as_str().contains('@');
        plain.then(|| Self {
            host: host.to_owned(),
            port: uri.port_u16().unwrap_or(if secure { 443 } else { 80 }),
            secure,
        })
    }

    /// What the `Host` header says: the port only if it is not the usual one.
    pub(super) fn authority(&self) -> String {
        match (self.secure, self.port) {
            (true, 443) | (false, 80) => self.host.clone(),
            (_, port) => format!("{}:{port}", self.host),
        }
    }

    /// The URL of `path`, which begins with a slash.
    pub(super) fn url(&self, path: &str) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}{path}", self.authority())
    }
}

/// An answer, whatever its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// Its status.
    pub(super) status: StatusCode,
    /// Where it says to look instead.
    pub(super) location: Option<String>,
    /// Its body, whole.
    pub(super) body: Bytes,
}

/// What sends requests; clones share it.
#[derive(Clone)]
pub(super) struct Outbound {
    tls: Arc<ClientConfig>,
}

impl fmt::Debug for Outbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Outbound")
    }
}

impl Outbound {
    /// Uses the system's roots.
    ///
    /// # Errors
    /// [`OutboundError::Answer`] if the TLS library refuses its own defaults.
    pub(super) fn new() -> Result<Self, OutboundError> {
        let mut roots = RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        let (_, unusable) = roots.add_parsable_certificates(native.certs);
        if roots.is_empty() {
            tracing::warn!(
                unusable,
                "no system roots were found: nobody can be asked over HTTPS"
            );
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|source| OutboundError::Answer {
                address: "TLS".to_owned(),
                reason: source.to_string(),
            })?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self::with(config))
    }

    /// Uses a TLS configuration of the caller's.
    pub(super) fn with(mut config: ClientConfig) -> Self {
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self {
            tls: Arc::new(config),
        }
    }

    /// Sends `request`, whose path is relative, and reads an answer of at most `most` bytes.
    ///
    /// # Errors
    /// [`OutboundError`]; a status other than 200 is an answer.
    pub(super) async fn send(
        &self,
        target: &Target,
        request: Request<Full<Bytes>>,
        most: usize,
    ) -> Result<Answer, OutboundError> {
        let host = target.host.trim_matches(['[', ']']);
        let address = format!("{host}:{}", target.port);
        let exchange = async {
            let io = |source| OutboundError::Io {
                address: address.clone(),
                source,
            };
            let stream = TcpStream::connect((host, target.port)).await.map_err(io)?;
            if !target.secure {
                return exchange(stream, request, &address, most).await;
            }
            let name =
                ServerName::try_from(host.to_owned()).map_err(|source| OutboundError::Answer {
                    address: address.clone(),
                    reason: source.to_string(),
                })?;
            let connector = TlsConnector::from(Arc::clone(&self.tls));
            let stream = connector.connect(name, stream).await.map_err(io)?;
            exchange(stream, request, &address, most).await
        };
        tokio::time::timeout(TIMEOUT, Box::pin(exchange))
            .await
            .map_err(|_elapsed| OutboundError::Timeout(address.clone()))?
    }
}

async fn exchange<S>(
    stream: S,
    request: Request<Full<Bytes>>,
    address: &str,
    most: usize,
) -> Result<Answer, OutboundError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let unusable = |reason: String| OutboundError::Answer {
        address: address.to_owned(),
        reason,
    };
    let hyper = |source: hyper::Error| unusable(source.to_string());
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(hyper)?;
    let _driver = AbortOnDropHandle::new(tokio::spawn(connection));
    let response = sender.send_request(request).await.map_err(hyper)?;
    let status = response.status();
    let location = response.headers().get(http::header::LOCATION);
    let location = location.and_then(|value| value.to_str().ok().map(str::to_owned));
    let body = Limited::new(response.into_body(), most)
        .collect()
        .await
        .map_err(|source| unusable(source.to_string()))?
        .to_bytes();
    Ok(Answer {
        status,
        location,
        body,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_checked() {
        for (good, authority) in [
            ("http://127.0.0.1:5555", "127.0.0.1:5555"),
            ("https://sts.internal/", "sts.internal"),
            ("https://sts.internal:80", "sts.internal:80"),
            ("http://[::1]:1", "[::1]:1"),
        ] {
            let target = Target::parse(good).unwrap();
            assert_eq!(target.authority(), authority, "{good}");
        }
        let target = Target::parse("http://h:5/").unwrap();
        assert_eq!(target.url("/a?b"), "http://h:5/a?b");
        for bad in [
            "",
            "sts",
            "ftp://x",
            "http://",
            "http://a/b",
            "http://a?b",
            "http://u@a",
        ] {
            assert_eq!(Target::parse(bad), None, "{bad}");
        }
    }
}
