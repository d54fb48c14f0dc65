//! Requests to other services over HTTP: one connection each, no redirects, bounded in time and
//! size.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, Uri};
use http_body_util::Full;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::crypto::pem;
use crate::exchange::ask_for_bytes;

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
pub struct Target {
    host: String,
    port: u16,
    secure: bool,
}

impl Target {
    /// The usual port of an HTTPS host.
    pub(crate) fn https(host: &str) -> Self {
        Self::https_at(host, 443)
    }

    /// A port of an HTTPS host.
    pub(crate) fn https_at(host: &str, port: u16) -> Self {
        Self {
            host: host.to_owned(),
            port,
            secure: true,
        }
    }

    /// A configured endpoint: an http or https URL with a host and nothing behind it.
    pub(crate) fn parse(url: &str) -> Option<Self> {
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
    pub(crate) fn authority(&self) -> String {
        match (self.secure, self.port) {
            (true, 443) | (false, 80) => self.host.clone(),
            (_, port) => format!("{}:{port}", self.host),
        }
    }

    /// The URL of `path`, which begins with a slash.
    pub(crate) fn url(&self, path: &str) -> String {
        let scheme = if self.secure { "https" } else { "http" };
        format!("{scheme}://{}{path}", self.authority())
    }
}

/// An answer, whatever its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Its status.
    pub(crate) status: StatusCode,
    /// Where it says to look instead.
    pub(crate) location: Option<String>,
    /// Its body, whole.
    pub(crate) body: Bytes,
}

/// What sends requests; clones share it.
#[derive(Clone)]
pub struct Outbound {
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
    pub(crate) fn new() -> Result<Self, OutboundError> {
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
    pub(crate) fn with(mut config: ClientConfig) -> Self {
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Self {
            tls: Arc::new(config),
        }
    }

    /// Sends `request`, whose path is relative, and reads an answer of at most `most` bytes.
    ///
    /// # Errors
    /// [`OutboundError`]; a status other than 200 is an answer.
    pub(crate) async fn send(
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
    S: AsyncRead + AsyncWrite + Unpin + Send,
{
    let response = ask_for_bytes(stream, request, most)
        .await
        .map_err(|source| OutboundError::Answer {
            address: address.to_owned(),
            reason: source.to_string(),
        })?;
    let location = response.headers().get(http::header::LOCATION);
    Ok(Answer {
        status: response.status(),
        location: location.and_then(|value| value.to_str().ok().map(str::to_owned)),
        body: response.into_body(),
    })
}

/// A TLS configuration that believes the authorities of `pem` alone.
///
/// # Errors
/// What is wrong with `pem`.
pub(crate) fn trusting(pem: &str) -> Result<ClientConfig, String> {
    let certificates = pem::certificates(pem).map_err(|error| error.to_string())?;
    let mut roots = RootCertStore::empty();
    let count = certificates.len();
    let certificates = certificates.into_iter().map(CertificateDer::from);
    let (_, unusable) = roots.add_parsable_certificates(certificates);
    if count == 0 || unusable > 0 {
        return Err("it has to be certificates in PEM".to_owned());
    }
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?;
    Ok(config.with_root_certificates(roots).with_no_client_auth())
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

    #[test]
    fn authorities_are_certificates() {
        for pem in [
            "",
            "x",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            assert!(trusting(pem).is_err(), "{pem}");
        }
    }
}
