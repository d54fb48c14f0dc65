//! A registry's HTTP API (OCI distribution), as far as it is needed to read what is small.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, LOCATION, WWW_AUTHENTICATE};
use http::uri::{Authority, Scheme};
use http::{HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::Full;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use serde::Deserialize;
use tokio_rustls::TlsConnector;

use super::credentials::{Credential, CredentialError, Keychain};
use super::guard::{Guard, GuardError};
use crate::clock::Clock;
use crate::cluster::ClusterError;
use crate::cluster::trust::Trust;
use crate::crypto::sha256_hex;
use crate::exchange::{self, ExchangeError};
use crate::query::encoded;

/// The longest manifest, index or token that is read, in bytes.
const MAX_MANIFEST: usize = 4 * 1024 * 1024;
/// Hops of one question.
const MAX_REDIRECTS: usize = 5;
/// Manifests and indexes.
const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, application/vnd.docker.distribution.manifest.v2+json";

/// Why a registry did not tell.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegistryError {
    /// No connection, or one that must not be.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// Credentials cannot be used.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// No trust settings.
    #[error("{0}")]
    Trust(#[source] ClusterError),
    /// The server does not prove that it is the registry.
    #[error("TLS with {host} failed: {source}")]
    Tls {
        host: String,
        #[source]
        source: std::io::Error,
    },
    /// The connection broke, or an answer is too long.
    #[error("{uri}: {source}")]
    Exchange {
        uri: Box<Uri>,
        #[source]
        source: ExchangeError,
    },
    /// A refusal.
    #[error("{uri}: answered {status}")]
    Status { uri: Box<Uri>, status: StatusCode },
    /// A redirection or a way to get a token that is not followed.
    #[error("{host}: {problem}")]
    Unusable { host: String, problem: String },
    /// The content is not the one that was asked for.
    #[error("{digest}: the registry gave something else")]
    Forged { digest: String },
}

/// Speaks with registries.
#[derive(Debug)]
pub(super) struct Registries {
    guard: Guard,
    keychain: Keychain,
    clock: Clock,
}

impl Registries {
    pub(super) fn new(guard: Guard, keychain: Keychain, clock: Clock) -> Self {
        Self {
            guard,
            keychain,
            clock,
        }
    }

    /// Finds out how a repository is read.
    pub(super) async fn open(
        &self,
        host: &str,
        name: &str,
    ) -> Result<Repository<'_>, RegistryError> {
        let mut repository = Repository {
            registries: self,
            tls: Trust::default()
                .web(&self.clock, &[b"http/1.1"])
                .map_err(RegistryError::Trust)?,
            host: host.to_owned(),
            name: name.to_owned(),
            scheme: Scheme::HTTPS,
            authorization: None,
        };
        let mut answer = repository.get("/v2/", "*/*", MAX_MANIFEST).await;
        if answer.is_err() && is_local(host) {
            repository.scheme = Scheme::HTTP;
            answer = repository.get("/v2/", "*/*", MAX_MANIFEST).await;
        }
        let answer = answer?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            let challenge = answer.headers().get(WWW_AUTHENTICATE);
            let challenge = challenge.and_then(|value| Challenge::parse(value.to_str().ok()?));
            repository.authorization = repository.authorized(challenge).await?;
        }
        Ok(repository)
    }
}

/// One repository of a registry.
#[derive(Debug)]
pub(super) struct Repository<'a> {
    registries: &'a Registries,
    tls: Arc<ClientConfig>,
    host: String,
    name: String,
    scheme: Scheme,
    authorization: Option<HeaderValue>,
}

impl Repository<'_> {
    /// A manifest or index by tag or digest; `None` if there is none.
    pub(super) async fn manifest(&self, reference: &str) -> Result<Option<Bytes>, RegistryError> {
        let path = format!("/v2/{}/manifests/{reference}", self.name);
        let answer = self.get(&path, MANIFESTS, MAX_MANIFEST).await?;
        let found = self.found(&path, answer)?;
        if let Some(bytes) = &found
            && reference.starts_with("sha256:")
        {
            check(reference, bytes)?;
        }
        Ok(found)
    }

    /// The index of what refers to `digest`; `None` if the registry keeps none.
    pub(super) async fn referrers(&self, digest: &str) -> Result<Option<Bytes>, RegistryError> {
        let path = format!("/v2/{}/referrers/{digest}", self.name);
        let answer = self.get(&path, MANIFESTS, MAX_MANIFEST).await?;
        self.found(&path, answer)
    }

    /// A blob of up to `limit` bytes.
    pub(super) async fn blob(&self, digest: &str, limit: usize) -> Result<Bytes, RegistryError> {
        let path = format!("/v2/{}/blobs/{digest}", self.name);
        let answer = self.get(&path, "*/*", limit).await?;
        let status = answer.status();
        let found = self.found(&path, answer)?.ok_or(RegistryError::Status {
            uri: Box::new(self.uri(&path)?),
            status,
        })?;
        check(digest, &found)?;
        Ok(found)
    }

    fn found(&self, path: &str, answer: Response<Bytes>) -> Result<Option<Bytes>, RegistryError> {
        match answer.status() {
            StatusCode::OK => Ok(Some(answer.into_body())),
            StatusCode::NOT_FOUND => Ok(None),
            status => Err(RegistryError::Status {
                uri: Box::new(self.uri(path)?),
                status,
            }),
        }
    }

    async fn get(
        &self,
        path: &str,
        accept: &'static str,
        limit: usize,
    ) -> Result<Response<Bytes>, RegistryError> {
        let mut uri = self.uri(path)?;
        for _ in 0..=MAX_REDIRECTS {
            let mut request = Request::get("/").header(ACCEPT, accept);
            // Where a registry leads to somewhere else, that has its own authorization in the URL.
            if let Some(value) = &self.authorization
                && self.is_own(&uri)
            {
                request = request.header(AUTHORIZATION, value.clone());
            }
            let request = request.body(Full::default()).unwrap_or_default();
            let answer = self.ask(&uri, request, limit).await?;
            if !answer.status().is_redirection() {
                return Ok(answer);
            }
            uri = self.redirected(&uri, &answer)?;
        }
        Err(self.unusable(format!("{path}: more than {MAX_REDIRECTS} redirections")))
    }

    /// Sends a request to where `uri` says, if that is allowed.
    async fn ask(
        &self,
        uri: &Uri,
        mut request: Request<Full<Bytes>>,
        limit: usize,
    ) -> Result<Response<Bytes>, RegistryError> {
        let authority = uri
            .authority()
            .ok_or_else(|| self.unusable("an address without a host"))?;
        let secure = uri.scheme() == Some(&Scheme::HTTPS);
        let host = bare(authority);
        let port = authority
            .port_u16()
            .unwrap_or(if secure { 443 } else { 80 });
        let target = uri
            .path_and_query()
            .map_or("/", http::uri::PathAndQuery::as_str);
        *request.uri_mut() = target.parse().map_err(|_source| self.unusable("no path"))?;
        let value = HeaderValue::from_str(authority.as_str());
        let value = value.map_err(|_source| self.unusable("no host"))?;
        request.headers_mut().insert(HOST, value);
        let stream = self.registries.guard.connect(host, port).await?;
        let answer = if secure {
            let name = ServerName::try_from(host.to_owned())
                .map_err(|_source| self.unusable(format!("{host:?} is no name of a host")))?;
            let connector = TlsConnector::from(Arc::clone(&self.tls));
            let stream = connector.connect(name, stream).await;
            let stream = stream.map_err(|source| RegistryError::Tls {
                host: authority.to_string(),
                source,
            })?;
            exchange::ask_for_bytes(stream, request, limit).await
        } else {
            exchange::ask_for_bytes(stream, request, limit).await
        };
        answer.map_err(|source| RegistryError::Exchange {
            uri: Box::new(without_query(uri)),
            source,
        })
    }

    fn redirected(&self, from: &Uri, answer: &Response<Bytes>) -> Result<Uri, RegistryError> {
        let location = answer.headers().get(LOCATION);
        let location = location.and_then(|value| value.to_str().ok());
        let location = location.ok_or_else(|| self.unusable("a redirection to nowhere"))?;
        let to: Uri = location
            .parse()
            .map_err(|_source| self.unusable("a redirection to no address"))?;
        if to.authority().is_some() {
            if to.host().is_none_or(str::is_empty) {
                return Err(self.unusable("a redirection to no host"));
            }
            self.admit(&to)?;
            return Ok(to);
        }
        if !location.starts_with('/') {
            return Err(self.unusable("a redirection to a relative path"));
        }
        let mut parts = from.clone().into_parts();
        parts.path_and_query = to.into_parts().path_and_query;
        Uri::from_parts(parts).map_err(|_source| self.unusable("a redirection to no address"))
    }

    /// TLS is not left: only a registry without it leads to others without.
    fn admit(&self, uri: &Uri) -> Result<(), RegistryError> {
        let secure = uri.scheme() == Some(&Scheme::HTTPS);
        let plain = uri.scheme() == Some(&Scheme::HTTP) && self.scheme == Scheme::HTTP;
        if secure || plain {
            return Ok(());
        }
        Err(self.unusable(format!("{} is not reached by TLS", without_query(uri))))
    }

    /// What the registry wants to see from now on.
    async fn authorized(
        &self,
        challenge: Option<Challenge>,
    ) -> Result<Option<HeaderValue>, RegistryError> {
        let credential = self.registries.keychain.credential(&self.host).await?;
        match (challenge, credential) {
            (_, Some(Credential::Registry(token))) => Ok(header("Bearer", token.expose())),
            (Some(Challenge::Basic), Some(Credential::Basic { user, password })) => {
                Ok(basic(&user, password.expose()))
            }
            (Some(Challenge::Bearer { realm, service }), credential) => {
                let token = self.token(&realm, &service, credential).await?;
                Ok(header("Bearer", &token))
            }
            (Some(Challenge::Basic), None) => {
                Err(self.unusable("it wants a password, and there is none for it"))
            }
            (Some(Challenge::Basic), Some(_)) => {
                Err(self.unusable("it wants a password, and there is a token for it"))
            }
            (None, _) => Err(self.unusable("it does not say how to prove who one is")),
        }
    }

    /// A token to read the repository with.
    async fn token(
        &self,
        realm: &str,
        service: &str,
        credential: Option<Credential>,
    ) -> Result<String, RegistryError> {
        // Registries give one of them, or the same twice.
        #[derive(Deserialize)]
        struct Answer {
            token: Option<String>,
            access_token: Option<String>,
        }
        let form = format!(
            "service={}&scope={}",
            encoded(service),
            encoded(&format!("repository:{}:pull", self.name))
        );
        let (address, request) = match credential {
            Some(Credential::Identity(token)) => {
                let body = format!(
                    "grant_type=refresh_token&client_id=tbot&{form}&refresh_token={}",
                    encoded(token.expose())
                );
                let request = Request::builder()
                    .method(Method::POST)
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(Full::from(body));
                (realm.to_owned(), request)
            }
            credential => {
                let mut request = Request::get("/");
                if let Some(Credential::Basic { user, password }) = credential
                    && let Some(value) = basic(&user, password.expose())
                {
                    request = request.header(AUTHORIZATION, value);
                }
                let separator = if realm.contains('?') { '&' } else { '?' };
                (
                    format!("{realm}{separator}{form}"),
                    request.body(Full::default()),
                )
            }
        };
        let uri: Uri = address
            .parse()
            .map_err(|_source| self.unusable("its tokens are at no address"))?;
        self.admit(&uri)?;
        let request = request.unwrap_or_default();
        let answer = self.ask(&uri, request, MAX_MANIFEST).await?;
        if answer.status() != StatusCode::OK {
            return Err(RegistryError::Status {
                uri: Box::new(without_query(&uri)),
                status: answer.status(),
            });
        }
        serde_json::from_slice(answer.body())
            .ok()
            .and_then(|answer: Answer| answer.token.or(answer.access_token))
            .ok_or_else(|| self.unusable("its tokens are not what they should be"))
    }

    fn is_own(&self, uri: &Uri) -> bool {
        uri.authority()
            .is_some_and(|authority| authority.as_str() == self.host)
            && uri.scheme() == Some(&self.scheme)
    }

    fn uri(&self, path: &str) -> Result<Uri, RegistryError> {
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.host.as_str())
            .path_and_query(path)
            .build()
            .map_err(|_source| self.unusable(format!("{path:?} is no path")))
    }

    fn unusable(&self, problem: impl Into<String>) -> RegistryError {
        RegistryError::Unusable {
            host: self.host.clone(),
            problem: problem.into(),
        }
    }
}

/// How a registry wants to be asked.
#[derive(Debug, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: String, service: String },
}

impl Challenge {
    /// Reads `Bearer realm="…",service="…"` (RFC 9110, section 11.2).
    fn parse(text: &str) -> Option<Self> {
        let (scheme, mut rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
        if scheme.eq_ignore_ascii_case("basic") {
            return Some(Self::Basic);
        }
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let (mut realm, mut service) = (None, String::new());
        while let Some((key, after)) = rest.split_once('=') {
            let (value, next) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_at(after.find(',').unwrap_or(after.len())),
            };
            match key.trim().to_ascii_lowercase().as_str() {
                "realm" => realm = Some(value.to_owned()),
                "service" => value.clone_into(&mut service),
                _ => {}
            }
            rest = next.trim_start().trim_start_matches(',');
        }
        Some(Self::Bearer {
            realm: realm?,
            service,
        })
    }
}

/// Registries that may do without TLS: those of this machine and of `.local`, as Docker's tools
/// have it.
fn is_local(host: &str) -> bool {
    let Ok(authority) = host.parse::<Authority>() else {
        return false;
    };
    let host = bare(&authority);
    let local = |suffix: &str| host.strip_suffix(suffix).is_some();
    match host.parse::<std::net::IpAddr>() {
        Ok(std::net::IpAddr::V4(address)) => address.is_loopback() || address.is_private(),
        Ok(std::net::IpAddr::V6(address)) => address.is_loopback(),
        Err(_) => host == "localhost" || local(".local") || local(".localhost"),
    }
}

/// The host without a port, brackets of an IPv6 address taken off.
fn bare(authority: &Authority) -> &str {
    let host = authority.host();
    host.strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host)
}

/// Queries hold secrets: signatures of addresses.
fn without_query(uri: &Uri) -> Uri {
    let mut parts = uri.clone().into_parts();
    parts.path_and_query = uri.path().parse().ok();
    Uri::from_parts(parts).unwrap_or_default()
}

fn basic(user: &str, password: &str) -> Option<HeaderValue> {
    header("Basic", &STANDARD.encode(format!("{user}:{password}")))
}

fn header(scheme: &str, secret: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(&format!("{scheme} {secret}")).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn check(digest: &str, bytes: &[u8]) -> Result<(), RegistryError> {
    if digest == format!("sha256:{}", sha256_hex(bytes)) {
        return Ok(());
    }
    Err(RegistryError::Forged {
        digest: digest.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::env::Env;

    #[test]
    fn fuzz_challenges() {
        let check = bolero::check!().with_type::<(Vec<u8>, String)>();
        check.for_each(|(choice, other)| {
            let pieces = [
                "Bearer ",
                "realm=",
                "service=",
                "\"",
                ",",
                " ",
                "https://a.example.org/t",
                "scope=",
                "Basic",
                "=",
                "\\",
                other,
            ];
            let pick = |at: &u8| pieces[usize::from(*at) % pieces.len()];
            let text: String = choice.iter().take(64).map(pick).collect();
            if let Some(Challenge::Bearer { realm, service }) = Challenge::parse(&text) {
                for part in [realm, service] {
                    assert!(text.contains(&part), "{text:?}");
                }
            }
        });
    }

    #[test]
    fn fuzz_redirections() {
        const PIECES: &[&str] = &[
            "https:",
            "http:",
            "//",
            "/",
            "\\",
            "@",
            "registry.example.org",
            "cdn.example.org",
            "?",
            "#",
            "..",
            ":443",
            ":80",
            "%0a",
            "blob",
        ];
        let registries = Registries::new(
            Guard::new(Vec::new()),
            Keychain::new(None, &Env::default()),
            Clock::system(),
        );
        let repository = std::panic::AssertUnwindSafe(Repository {
            registries: &registries,
            tls: Trust::default().web(&registries.clock, &[]).unwrap(),
            host: "registry.example.org".to_owned(),
            name: "a1".to_owned(),
            scheme: Scheme::HTTPS,
            authorization: None,
        });
        let from: Uri = "https://registry.example.org/v2/a1".parse().unwrap();
        let check = bolero::check!().with_type::<(Vec<u8>, String)>();
        check.for_each(|(choice, other)| {
            let pick = |at: &u8| PIECES.get(usize::from(*at) % (PIECES.len() + 1));
            let pieces = choice.iter().take(12).map(pick);
            let text: String = pieces
                .map(|piece| piece.copied().unwrap_or(other))
                .collect();
            let Ok(location) = HeaderValue::from_str(&text) else {
                return;
            };
            let answer = Response::builder().header(LOCATION, location);
            let answer = answer.body(Bytes::new()).unwrap();
            if let Ok(to) = repository.redirected(&from, &answer) {
                assert_eq!(to.scheme(), Some(&Scheme::HTTPS), "{text:?}");
                let host = to.host().unwrap();
                assert!(!host.is_empty() && text.contains(host) || host == repository.host);
            }
        });
    }

    #[test]
    fn challenges_are_read() {
        let bearer = |realm: &str, service: &str| {
            Some(Challenge::Bearer {
                realm: realm.to_owned(),
                service: service.to_owned(),
            })
        };
        for (text, expected) in [
            (
                r#"Bearer realm="https://a/t",service="r",scope="repository:x:pull""#,
                bearer("https://a/t", "r"),
            ),
            (
                "bearer service=r, realm=https://a/t",
                bearer("https://a/t", "r"),
            ),
            (
                r#"Bearer realm="https://a/t?x=1,2""#,
                bearer("https://a/t?x=1,2", ""),
            ),
            (r#"Basic realm="x""#, Some(Challenge::Basic)),
            ("Basic", Some(Challenge::Basic)),
            ("Bearer", None),
            (r#"Bearer service="r""#, None),
            (r#"Bearer realm="unclosed"#, None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(Challenge::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn tls_may_be_missing_on_this_machine_only() {
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "[::1]:5000",
            "10.0.0.1",
            "r.local:1",
            "x.localhost",
        ] {
            assert!(is_local(host), "{host}");
        }
        for host in [
            "example.org",
            "localhost.example.org",
            "8.8.8.8",
            "[fd00::1]:1",
            "local",
            "",
        ] {
            assert!(!is_local(host), "{host}");
        }
    }

    #[test]
    fn contents_are_checked() {
        let digest = format!("sha256:{}", sha256_hex(b"x"));
        assert!(check(&digest, b"x").is_ok());
        assert!(check(&digest, b"y").is_err());
        assert!(check("sha512:00", b"x").is_err());
    }

    #[test]
    fn queries_are_not_shown() {
        let uri: Uri = "https://a.org/x?sig=secret".parse().unwrap();
        assert_eq!(without_query(&uri).to_string(), "https://a.org/x");
    }
}
