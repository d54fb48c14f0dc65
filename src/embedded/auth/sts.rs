//! Sending a verified request to AWS's STS: one connection, no redirects, bounded in time and size.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Uri, header};
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

use crate::join::iam::verify::{BODY, MAX_ANSWER, StsRequest};

/// The longest that AWS may take, from connecting to the last byte.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why STS gave no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StsError {
    /// The configured endpoint is no URL with a host.
    #[error("--sts-endpoint {0:?} is not an http or https URL with a host and nothing behind it")]
    Endpoint(String),
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
}

/// An answer, whatever its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Answer {
    /// The status line without the version, for example `403 Forbidden`.
    pub(super) status: String,
    /// Whether the status is 200.
    pub(super) ok: bool,
    /// At most [`MAX_ANSWER`] bytes.
    pub(super) body: Bytes,
}

/// Where requests go: AWS, unless an endpoint is configured.
#[derive(Clone)]
pub(super) struct Sts {
    endpoint: Option<Uri>,
    tls: Arc<ClientConfig>,
}

impl fmt::Debug for Sts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Sts").field(&self.endpoint).finish()
    }
}

impl Sts {
    /// Uses the system's roots. With an `endpoint` every request goes there, whatever its host;
    /// only there plain HTTP is possible.
    ///
    /// # Errors
    /// [`StsError::Endpoint`].
    pub(super) fn new(endpoint: Option<&str>) -> Result<Self, StsError> {
        let endpoint = endpoint.map(parse_endpoint).transpose()?;
        let mut roots = RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        let (_, unusable) = roots.add_parsable_certificates(native.certs);
        if roots.is_empty() {
            tracing::warn!(
                unusable,
                "no system roots were found: AWS cannot be asked over HTTPS"
            );
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|source| StsError::Answer {
                address: "TLS".to_owned(),
                reason: source.to_string(),
            })?
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            endpoint,
            tls: Arc::new(config),
        })
    }

    /// Sends a verified request and reads the answer.
    ///
    /// # Errors
    /// [`StsError`]; a status other than 200 is an answer.
    pub(super) async fn send(&self, request: &StsRequest) -> Result<Answer, StsError> {
        let (host, port, secure) = match &self.endpoint {
            Some(uri) => {
                let secure = uri.scheme_str() == Some("https");
                let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
                (uri.host().unwrap_or_default(), port, secure)
            }
            None => (request.host.as_str(), 443, true),
        };
        let host = host.trim_matches(['[', ']']);
        let address = format!("{host}:{port}");
        let exchange = async {
            let io = |source| StsError::Io {
                address: address.clone(),
                source,
            };
            let stream = TcpStream::connect((host, port)).await.map_err(io)?;
            if !secure {
                return exchange(stream, request, &address).await;
            }
            let name =
                ServerName::try_from(host.to_owned()).map_err(|source| StsError::Answer {
                    address: address.clone(),
                    reason: source.to_string(),
                })?;
            let connector = TlsConnector::from(Arc::clone(&self.tls));
            let stream = connector.connect(name, stream).await.map_err(io)?;
            exchange(stream, request, &address).await
        };
        tokio::time::timeout(TIMEOUT, Box::pin(exchange))
            .await
            .map_err(|_elapsed| StsError::Timeout(address.clone()))?
    }
}

async fn exchange<S>(stream: S, request: &StsRequest, address: &str) -> Result<Answer, StsError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let unusable = |reason: String| StsError::Answer {
        address: address.to_owned(),
        reason,
    };
    let hyper = |source: hyper::Error| unusable(source.to_string());
    let mut message = Request::post("/")
        .header(header::HOST, &request.host)
        .header(header::CONTENT_LENGTH, BODY.len());
    for (name, value) in &request.headers {
        message = message.header(name, value);
    }
    let message = message
        .body(Full::new(Bytes::from_static(BODY.as_bytes())))
        .map_err(|source| unusable(source.to_string()))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(hyper)?;
    let _driver = AbortOnDropHandle::new(tokio::spawn(connection));
    let response = sender.send_request(message).await.map_err(hyper)?;
    let status = response.status();
    let body = Limited::new(response.into_body(), MAX_ANSWER)
        .collect()
        .await
        .map_err(|source| unusable(source.to_string()))?
        .to_bytes();
    Ok(Answer {
        status: status.to_string(),
        ok: status == http::StatusCode::OK,
        body,
    })
}

fn parse_endpoint(text: &str) -> Result<Uri, StsError> {
    let wrong = || StsError::Endpoint(text.to_owned());
    let uri: Uri = text.parse().map_err(|_source| wrong())?;
    let plain = uri.host().is_some_and(|host| !host.is_empty())
        && matches!(uri.scheme_str(), Some("http" | "https"))
        && matches!(uri.path(), "" | "/")
        && uri.query().is_none()
        && uri
            .authority()
            .is_some_and(|authority| !authority.as_str().contains('@'));
    if plain { Ok(uri) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    fn request() -> StsRequest {
        StsRequest {
            host: "sts.us-east-1.amazonaws.com".to_owned(),
            headers: vec![("x-teleport-challenge".to_owned(), "c".to_owned())],
        }
    }

    /// Answers one connection with `answer` and returns what it was asked.
    async fn serve(answer: Vec<u8>) -> (Sts, tokio::task::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(BODY.as_bytes()) {
                let mut buffer = [0; 4096];
                let count = stream.read(&mut buffer).await.unwrap();
                asked.extend(&buffer[..count]);
            }
            drop(stream.write_all(&answer).await);
            String::from_utf8(asked).unwrap()
        });
        (Sts::new(Some(&endpoint)).unwrap(), server)
    }

    #[tokio::test]
    async fn the_request_keeps_its_host_and_says_nothing_else() {
        let answer = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno".to_vec();
        let (sts, server) = serve(answer).await;
        let answer = sts.send(&request()).await.unwrap();
        assert_eq!(
            (answer.status.as_str(), answer.ok),
            ("403 Forbidden", false)
        );
        assert_eq!(&answer.body[..], b"no");
        let asked = server.await.unwrap();
        assert_eq!(
            asked,
            format!(
                "POST / HTTP/1.1\r\nhost: sts.us-east-1.amazonaws.com\r\ncontent-length: 43\r\n\
                 x-teleport-challenge: c\r\n\r\n{BODY}"
            )
        );
    }

    #[tokio::test]
    async fn redirects_are_answers_and_long_answers_are_errors() {
        let redirect = b"HTTP/1.1 307 x\r\nLocation: http://evil.example/\r\n\
            Content-Length: 0\r\n\r\n";
        let (sts, _server) = serve(redirect.to_vec()).await;
        assert!(!sts.send(&request()).await.unwrap().ok);
        let mut long = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
            MAX_ANSWER + 1
        );
        long += &"a".repeat(MAX_ANSWER + 1);
        let (sts, _server) = serve(long.into_bytes()).await;
        assert!(matches!(
            sts.send(&request()).await,
            Err(StsError::Answer { .. })
        ));
        let (sts, _server) = serve(b"no HTTP\r\n\r\n".to_vec()).await;
        assert!(matches!(
            sts.send(&request()).await,
            Err(StsError::Answer { .. })
        ));
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_an_error_after_ten_seconds() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let sts = Sts::new(Some(&format!("http://{}", listener.local_addr().unwrap()))).unwrap();
        assert!(matches!(
            sts.send(&request()).await,
            Err(StsError::Timeout(_))
        ));
    }

    #[test]
    fn endpoints_are_checked() {
        for good in [
            "http://127.0.0.1:5555",
            "https://sts.internal/",
            "http://[::1]:1",
        ] {
            assert!(Sts::new(Some(good)).is_ok(), "{good}");
        }
        for bad in [
            "",
            "sts",
            "ftp://x",
            "http://",
            "http://a/b",
            "http://a?b",
            "http://u@a",
        ] {
            assert!(
                matches!(Sts::new(Some(bad)), Err(StsError::Endpoint(_))),
                "{bad}"
            );
        }
    }
}
