//! `tbot spiffe-inspect`: asks a SPIFFE Workload API what it gives to this process, and shows it.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::{TcpStream, UnixStream};
use tokio_util::either::Either;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use crate::clock::Clock;
use crate::crypto::x509::{self, Certificate};
use crate::pb::workload_api::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use crate::pb::workload_api::{
    JwtBundlesRequest, JwtsvidRequest, ValidateJwtsvidRequest, X509svidRequest, X509svidResponse,
};
use crate::spiffe::SpiffeId;
use crate::yaml::duration;

/// The longest that the whole inspection takes.
const PATIENCE: Duration = Duration::from_secs(10);
/// The audience of the JWT-SVIDs that are asked for; nobody is to accept them.
const AUDIENCE: &str = "example.com";
/// The largest answer that is read, in bytes.
const MAX_ANSWER: usize = 4 * 1024 * 1024;

/// Inspects the Workload API at `address` and shows what it gives.
pub(super) async fn run(address: Address) -> anyhow::Result<()> {
    let text = address.to_string();
    tracing::info!(path = text, "Inspecting SPIFFE Workload API Endpoint");
    let clock = Clock::system();
    let found = tokio::time::timeout(PATIENCE, inspect(&address))
        .await
        .map_err(|_elapsed| {
            anyhow!(
                "{text} took the connection but did not answer within {} s: is it a Workload API, \
                 and does its agent reach the cluster?",
                PATIENCE.as_secs()
            )
        })??;
    tracing::info!(
        bundles_count = found.bundles.len(),
        svids_count = found.svids.len(),
        "Received X.509 SVID context from Workload API"
    );
    let report = found.report(clock.now());
    match io::stdout().lock().write_all(report.as_bytes()) {
        // A reader that went away (`… | head -1`) is no failure.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Where a Workload API is (`SPIFFE_Workload_Endpoint.md` 4).
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

impl Address {
    /// Reads `path` (`unix:///path` or `tcp://IP:port`) or else `endpoint`, the value of
    /// `SPIFFE_ENDPOINT_SOCKET`.
    pub(super) fn of(path: Option<&str>, endpoint: Option<&str>) -> anyhow::Result<Self> {
        let text = path.or(endpoint).ok_or_else(|| {
            anyhow!(
                "which Workload API? Give --path unix:///path/to.sock, or set \
                 SPIFFE_ENDPOINT_SOCKET"
            )
        })?;
        Self::parse(text)
    }

    fn parse(text: &str) -> anyhow::Result<Self> {
        if let Some(rest) = text.strip_prefix("unix:") {
            let path = rest.strip_prefix("//").unwrap_or(rest);
            if !path.starts_with('/') {
                bail!(
                    "{text:?}: the path must be absolute: write unix:///path/to.sock, with three slashes"
                );
            }
            if path.contains(['?', '#']) {
                bail!("{text:?}: a query or fragment has no meaning here");
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        if let Some(rest) = text.strip_prefix("tcp://") {
            return rest.parse().map(Self::Tcp).map_err(|_source| {
                anyhow!(
                    "{text:?}: write tcp://IP:port, with an IP address and nothing behind the port"
                )
            });
        }
        let remedy = if text.starts_with('/') {
            format!("write unix://{text}")
        } else {
            "write unix:///path/to.sock or tcp://IP:port".to_owned()
        };
        bail!("{text:?} is no address of a Workload API: {remedy}")
    }

    async fn connect(&self) -> anyhow::Result<Either<UnixStream, TcpStream>> {
        match self {
            Self::Unix(path) => UnixStream::connect(path)
                .await
                .map(Either::Left)
                .map_err(|source| unreachable_socket(path, &source)),
            Self::Tcp(address) => TcpStream::connect(address)
                .await
                .map(Either::Right)
                .with_context(|| format!("cannot connect to {address}: does tbot listen there?")),
        }
    }
}

fn unreachable_socket(path: &Path, source: &io::Error) -> anyhow::Error {
    let path = path.display();
    let remedy = match source.kind() {
        io::ErrorKind::NotFound => {
            "there is no such socket: is tbot running, with a workload-identity-api service whose \
             `listen` is this path?"
        }
        io::ErrorKind::PermissionDenied => {
            "this user may not reach it: it needs the execute permission on every directory of the \
             path, and the write permission on the socket"
        }
        io::ErrorKind::ConnectionRefused => {
            "nobody answers on it: tbot is not running (`systemctl status tbot`)"
        }
        _ => "is it a socket?",
    };
    anyhow!("cannot connect to {path}: {source}: {remedy}")
}

type Client = SpiffeWorkloadApiClient<Channel>;

async fn inspect(address: &Address) -> anyhow::Result<Found> {
    let stream = Mutex::new(Some(address.connect().await?));
    let connector = tower::service_fn(move |_uri: http::Uri| {
        let stream = stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move {
            // One connection is all there is: an endpoint that drops it is not asked again.
            stream
                .map(TokioIo::new)
                .ok_or_else(|| io::Error::from(io::ErrorKind::ConnectionAborted))
        }
    });
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .context(NOT_AN_API)?;
    let mut client = Client::new(channel).max_decoding_message_size(MAX_ANSWER);
    let mut found = x509(&mut client).await?;
    found.jwt = jwt(&mut client).await?;
    Ok(found)
}

const NOT_AN_API: &str = "the endpoint does not speak the SPIFFE Workload API (gRPC)";

/// A request with the security header.
fn call<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::from_static("true");
    request.metadata_mut().insert("workload.spiffe.io", value);
    request
}

/// What an error answer means, and what to do.
fn explained(call: &str, status: &Status) -> anyhow::Error {
    let text = status.message();
    if let Some(source) = std::error::Error::source(status) {
        return anyhow!("{call}: {NOT_AN_API}: {source}");
    }
    match status.code() {
        Code::PermissionDenied => anyhow!(
            "{call}: refused: {text}: check that the service's selector names an existing \
             workload_identity, that the rules of that resource allow this process, and that the \
             bot's role allows its labels (workload_identity_labels)"
        ),
        Code::Unimplemented => anyhow!("{call}: {NOT_AN_API}: {text}"),
        Code::Unavailable => anyhow!(
            "{call}: the endpoint cannot serve now: {text}: look at tbot's log (`journalctl -u tbot`)"
        ),
        code => anyhow!("{call}: {code:?}: {text}"),
    }
}

#[derive(Debug, Default)]
struct Found {
    svids: Vec<X509Svid>,
    bundles: BTreeMap<String, usize>,
    /// `None` if the endpoint serves no JWTs.
    jwt: Option<Jwt>,
}

#[derive(Debug)]
struct X509Svid {
    id: String,
    hint: String,
    leaf: Certificate,
}

#[derive(Debug, Default)]
struct Jwt {
    svids: Vec<JwtSvid>,
    /// Key IDs by trust domain.
    bundles: BTreeMap<String, Vec<String>>,
}

#[derive(Debug)]
struct JwtSvid {
    id: String,
    hint: String,
    length: usize,
    expires: Option<SystemTime>,
    audiences: Vec<String>,
    invalid: Option<String>,
}

async fn x509(client: &mut Client) -> anyhow::Result<Found> {
    const CALL: &str = "FetchX509SVID";
    let answer = async {
        let mut stream = client
            .fetch_x509svid(call(X509svidRequest {}))
            .await?
            .into_inner();
        stream.message().await
    };
    let message = answer
        .await
        .map_err(|status| explained(CALL, &status))?
        .ok_or_else(|| anyhow!("{CALL}: the stream ended without an answer"))?;
    read_x509(message).with_context(|| format!("{CALL}: the answer breaks the standard"))
}

fn read_x509(message: X509svidResponse) -> anyhow::Result<Found> {
    let mut found = Found::default();
    if message.svids.is_empty() {
        bail!("it holds no SVID");
    }
    for svid in message.svids {
        let id: SpiffeId = svid
            .spiffe_id
            .parse()
            .with_context(|| svid.spiffe_id.clone())?;
        let ders =
            x509::split(&svid.x509_svid).ok_or_else(|| anyhow!("{id}: the SVID is not DER"))?;
        let leaf = ders
            .first()
            .ok_or_else(|| anyhow!("{id}: the SVID is empty"))?;
        let leaf = Certificate::from_der(leaf).with_context(|| id.to_string())?;
        if leaf.uri_sans() != [id.to_string()] {
            bail!("{id}: the certificate is for {:?}", leaf.uri_sans());
        }
        let domain = id.trust_domain().name().to_owned();
        found
            .bundles
            .insert(domain, authorities(&id.to_string(), &svid.bundle)?);
        // Hints are unique; a repeated one marks an entry to be left out.
        let taken = found.svids.iter().any(|other| other.hint == svid.hint);
        if svid.hint.is_empty() || !taken {
            found.svids.push(X509Svid {
                id: id.to_string(),
                hint: svid.hint,
                leaf,
            });
        }
    }
    for (id, bundle) in &message.federated_bundles {
        let domain = id.strip_prefix("spiffe://").unwrap_or(id).to_owned();
        found.bundles.insert(domain, authorities(id, bundle)?);
    }
    Ok(found)
}

fn authorities(id: &str, bundle: &Bytes) -> anyhow::Result<usize> {
    let ders = x509::split(bundle).ok_or_else(|| anyhow!("{id}: the bundle is not DER"))?;
    for der in &ders {
        Certificate::from_der(der).with_context(|| format!("bundle of {id}"))?;
    }
    Ok(ders.len())
}

async fn jwt(client: &mut Client) -> anyhow::Result<Option<Jwt>> {
    let request = JwtsvidRequest {
        audience: vec![AUDIENCE.to_owned()],
        spiffe_id: String::new(),
    };
    let svids = match client.fetch_jwtsvid(call(request)).await {
        Err(status) if status.code() == Code::Unimplemented => return Ok(None),
        answer => {
            answer
                .map_err(|status| explained("FetchJWTSVID", &status))?
                .into_inner()
                .svids
        }
    };
    let bundles = async {
        let request = call(JwtBundlesRequest {});
        client
            .fetch_jwt_bundles(request)
            .await?
            .into_inner()
            .message()
            .await
    };
    let bundles = bundles
        .await
        .map_err(|status| explained("FetchJWTBundles", &status))?
        .unwrap_or_default();
    let mut jwt = Jwt::default();
    for (id, document) in bundles.bundles {
        let domain = id.strip_prefix("spiffe://").unwrap_or(&id).to_owned();
        let keys: KeySet = serde_json::from_slice(&document)
            .with_context(|| format!("FetchJWTBundles: the bundle of {id} is no JWK set"))?;
        let ids = keys.keys.into_iter().map(|key| key.kid).collect();
        jwt.bundles.insert(domain, ids);
    }
    for svid in svids {
        let request = ValidateJwtsvidRequest {
            audience: AUDIENCE.to_owned(),
            svid: svid.svid.clone(),
        };
        let verdict = client.validate_jwtsvid(call(request)).await;
        let claims = claims(&svid.svid).unwrap_or_default();
        jwt.svids.push(JwtSvid {
            id: svid.spiffe_id,
            hint: svid.hint,
            length: svid.svid.len(),
            expires: claims
                .exp
                .map(|exp| SystemTime::UNIX_EPOCH + Duration::from_secs(exp)),
            audiences: claims.aud.into(),
            invalid: verdict.err().map(|status| status.message().to_owned()),
        });
    }
    Ok(Some(jwt))
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<Key>,
}

#[derive(Deserialize)]
struct Key {
    #[serde(default)]
    kid: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Claims {
    exp: Option<u64>,
    aud: Audiences,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Many(Vec<String>),
}

impl Default for Audiences {
    fn default() -> Self {
        Self::Many(Vec::new())
    }
}

impl From<Audiences> for Vec<String> {
    fn from(audiences: Audiences) -> Self {
        match audiences {
            Audiences::One(one) => vec![one],
            Audiences::Many(many) => many,
        }
    }
}

/// The claims of a token, unverified: they are shown, not believed.
fn claims(token: &str) -> Option<Claims> {
    let payload = token.split('.').nth(1)?;
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(payload).ok()?).ok()
}

impl Found {
    fn report(&self, now: SystemTime) -> String {
        let mut out = String::new();
        self.write(&mut out, now)
            .map_or_else(|_| String::new(), |()| out)
    }

    fn write(&self, out: &mut String, now: SystemTime) -> std::fmt::Result {
        writeln!(out, "# X509 SVIDs")?;
        for svid in &self.svids {
            writeln!(out, "- {}", svid.id)?;
            writeln!(out, "  - Hint: {}", svid.hint)?;
            writeln!(out, "  - Expiry: {}", expiry(svid.leaf.not_after(), now))?;
            for name in svid.leaf.dns_sans() {
                writeln!(out, "  - DNS SAN: {name}")?;
            }
            for address in svid.leaf.ip_sans() {
                writeln!(out, "  - IP SAN: {address}")?;
            }
        }
        writeln!(out, "# X509 Trust Bundles")?;
        for (domain, authorities) in &self.bundles {
            writeln!(out, "- {domain} (#CAs: {authorities})")?;
        }
        match &self.jwt {
            Some(jwt) => jwt.write(out, now),
            None => writeln!(
                out,
                "# JWT SVIDs\nThis endpoint serves no JWT SVIDs and JWT bundles"
            ),
        }
    }
}

impl Jwt {
    fn write(&self, out: &mut String, now: SystemTime) -> std::fmt::Result {
        writeln!(out, "# JWT SVIDs")?;
        if self.svids.is_empty() {
            writeln!(out, "No JWT SVIDs received, check your configuration")?;
        }
        for svid in &self.svids {
            writeln!(out, "- {}", svid.id)?;
            if let Some(expires) = svid.expires {
                writeln!(out, "  - Expiry: {}", expiry(expires, now))?;
            }
            writeln!(out, "  - Audiences: [{}]", svid.audiences.join(" "))?;
            writeln!(out, "  - Hint: {}", svid.hint)?;
            writeln!(out, "  - Value: <masked, {} characters>", svid.length)?;
            match &svid.invalid {
                None => writeln!(out, "  - Validation: PASS")?,
                Some(problem) => writeln!(out, "  - Validation: FAIL - {problem}")?,
            }
        }
        writeln!(out, "# JWT Bundles")?;
        if self.bundles.is_empty() {
            writeln!(
                out,
                "No JWT trust bundles received, check your configuration"
            )?;
        }
        for (domain, keys) in &self.bundles {
            writeln!(out, "- {domain} (#Keys: {})", keys.len())?;
            for id in keys {
                writeln!(out, "  - Key ID: {id}")?;
            }
        }
        Ok(())
    }
}

/// `2026-11-21 09:15:02 +0000 UTC (59m58.9s)`, the way upstream prints it.
fn expiry(at: SystemTime, now: SystemTime) -> String {
    let format = time::macros::format_description!(
        "[year]-[month]-[day] [hour]:[minute]:[second] +0000 UTC"
    );
    let text = time::OffsetDateTime::from(at)
        .format(&format)
        .unwrap_or_default();
    let left = match at.duration_since(now) {
        Ok(left) => duration::format(left),
        Err(past) => format!("-{}", duration::format(past.duration())),
    };
    format!("{text} ({left})")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    #[test]
    fn addresses_follow_the_standard() {
        for (text, address) in [
            ("unix:///run/w.sock", Address::Unix("/run/w.sock".into())),
            ("unix:/run/w.sock", Address::Unix("/run/w.sock".into())),
            (
                "tcp://127.0.0.1:80",
                Address::Tcp(([127, 0, 0, 1], 80).into()),
            ),
        ] {
            assert_eq!(Address::parse(text).unwrap(), address);
        }
        for (text, hint) in [
            ("/run/w.sock", "write unix:///run/w.sock"),
            ("unix://run/w.sock", "three slashes"),
            ("unix:w.sock", "three slashes"),
            ("unix:///w?x", "query"),
            ("tcp://localhost:80", "IP address"),
            ("tcp://127.0.0.1", "IP address"),
            ("tcp://127.0.0.1:80/x", "IP address"),
            ("http://x", "tcp://IP:port"),
            ("", "tcp://IP:port"),
        ] {
            let error = Address::parse(text).unwrap_err().to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn times_read_as_upstream_prints_them() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_252_502);
        let left = Duration::new(3598, 940_109_726);
        assert_eq!(
            expiry(at, at - left),
            "2026-11-21 09:15:02 +0000 UTC (59m58.940109726s)"
        );
        assert!(expiry(at, at + Duration::from_secs(1)).ends_with("(-1s)"));
    }

    #[test]
    fn tokens_are_not_shown() {
        let found = Found {
            jwt: Some(Jwt {
                svids: vec![JwtSvid {
                    id: "spiffe://td/a".into(),
                    hint: String::new(),
                    length: 812,
                    expires: None,
                    audiences: vec!["example.com".into()],
                    invalid: None,
                }],
                bundles: [("td".to_owned(), vec!["kid-1".to_owned()])].into(),
            }),
            ..Found::default()
        };
        let report = found.report(SystemTime::UNIX_EPOCH);
        assert!(
            report.ends_with(
                "# JWT SVIDs\n- spiffe://td/a\n  - Audiences: [example.com]\n  - Hint: \n  \
             - Value: <masked, 812 characters>\n  - Validation: PASS\n\
             # JWT Bundles\n- td (#Keys: 1)\n  - Key ID: kid-1\n"
            ),
            "{report}"
        );
    }

    #[test]
    fn claims_are_read_in_both_forms() {
        for (payload, audiences) in [
            (r#"{"exp":5,"aud":"a"}"#, vec!["a"]),
            (r#"{"exp":5,"aud":["a","b"]}"#, vec!["a", "b"]),
        ] {
            let token = format!("x.{}.y", URL_SAFE_NO_PAD.encode(payload));
            let claims = claims(&token).unwrap();
            assert_eq!(claims.exp, Some(5));
            assert_eq!(Vec::<String>::from(claims.aud), audiences);
        }
        for bad in ["", "x", "x.!.y", "x.e30"] {
            let read = claims(bad);
            assert!(read.is_none_or(|claims| claims.exp.is_none()), "{bad}");
        }
    }

    async fn failure(path: &Path) -> String {
        let address = Address::Unix(path.to_owned());
        format!("{:#}", run(address).await.unwrap_err())
    }

    #[tokio::test]
    async fn what_is_missing_is_named_with_its_remedy() {
        let error = Address::of(None, None).unwrap_err().to_string();
        assert!(error.contains("--path"), "{error}");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.sock");
        assert!(failure(&path).await.contains("is tbot running"));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(failure(&path).await.contains("nobody answers"));
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "").unwrap();
        assert!(failure(&path).await.contains("cannot connect to"));
    }

    #[tokio::test]
    async fn a_peer_that_hangs_up_or_speaks_something_else_is_told() {
        use tokio::io::AsyncWriteExt as _;
        let directory = tempfile::tempdir().unwrap();
        for (name, greeting) in [("closes", ""), ("ssh", "SSH-2.0-OpenSSH_9.2\r\n")] {
            let path = directory.path().join(name);
            let listener = UnixListener::bind(&path).unwrap();
            let serve = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(greeting.as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            };
            let (error, ()) = tokio::join!(failure(&path), serve);
            assert!(
                error.contains("does not speak the SPIFFE Workload API"),
                "{name}: {error}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_endpoint_does_not_hang_the_command() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("w.sock");
        let _listener = UnixListener::bind(&path).unwrap();
        assert!(failure(&path).await.contains("did not answer within 10 s"));
    }
}
