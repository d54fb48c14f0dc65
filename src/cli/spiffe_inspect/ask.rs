//! The calls, and what their answers mean.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

use super::address::Address;
use super::found::{Attestation, Bundle, Bundles, Found, Jwt, JwtSvid, KeyIds, X509Svid};
use crate::crypto::x509::{self, Certificate};
use crate::pb::tbot::inspect::v1::ExplainRequest;
use crate::pb::tbot::inspect::v1::inspect_service_client::InspectServiceClient;
use crate::pb::workload_api::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use crate::pb::workload_api::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, ValidateJwtsvidRequest,
    X509BundlesRequest, X509BundlesResponse, X509svidRequest, X509svidResponse,
};
use crate::spiffe::SpiffeId;

/// The audience of the JWT-SVIDs that are asked for; nobody is to accept them.
const AUDIENCE: &str = "example.com";
/// The longest wait for one answer. Above the patience of an agent, which says what it waits for.
const PATIENCE: Duration = Duration::from_secs(12);
/// The beginning of the year 10000.
const LAST: Duration = Duration::from_secs(253_402_300_800);
const SVIDS: &str = "FetchX509SVID";
const BUNDLES: &str = "FetchX509Bundles";
const TOKENS: &str = "FetchJWTSVID";
const KEYS: &str = "FetchJWTBundles";
/// The largest answer that is read, in bytes.
const MAX_ANSWER: usize = 4 * 1024 * 1024;

type Client = SpiffeWorkloadApiClient<Channel>;

/// Everything that the endpoint gives. What it does not give is among the failures of what was found; an
/// error is an endpoint that is none.
///
/// All calls are made at the same time, so that it takes about as long as the slowest.
pub(super) async fn inspect(address: &Address) -> anyhow::Result<Found> {
    let channel = within("connecting", connect(address)).await?;
    let client = Client::new(channel.clone()).max_decoding_message_size(MAX_ANSWER);
    let calls = [(); 4].map(|()| client.clone());
    let [mut one, mut two, mut three, mut four] = calls;
    let (x509, bundles, svids, keys, attestation) = tokio::join!(
        within(SVIDS, x509(&mut one)),
        within(BUNDLES, bundles(&mut two)),
        within(TOKENS, tokens(&mut three)),
        within(KEYS, keys(&mut four)),
        attestation(channel),
    );
    let mut found = Found {
        attestation,
        ..Found::default()
    };
    let (x509, bundles) = (found.of(x509), found.of(bundles).flatten());
    match x509 {
        Some(x509) => (found.svids, found.bundles, found.revocations) = x509,
        // Bundles are for everyone: with them, only this process is what is refused.
        None => found.bundles = bundles.unwrap_or_default(),
    }
    let (svids, keys) = (found.of(svids), found.of(keys));
    let has_none = matches!((&svids, &keys), (Some(None), _) | (_, Some(None)));
    found.jwt = (!has_none && (svids.is_some() || keys.is_some())).then(|| Jwt {
        svids: svids.flatten().unwrap_or_default(),
        bundles: keys.flatten().unwrap_or_default(),
    });
    Ok(found)
}

/// Ends a call that is not answered.
async fn within<T>(
    call: &str,
    answer: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let answered = tokio::time::timeout(PATIENCE, answer).await;
    answered.unwrap_or_else(|_elapsed| {
        Err(anyhow!(
            "{call}: no answer within {} s: is it a Workload API, and does its agent reach the cluster?",
            PATIENCE.as_secs()
        ))
    })
}

async fn connect(address: &Address) -> anyhow::Result<Channel> {
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
    Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .context(NOT_AN_API)
}

/// What the agent knows of this process, if it is this program's and tells.
async fn attestation(channel: Channel) -> Attestation {
    let mut client = InspectServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
    let answer = tokio::time::timeout(PATIENCE, client.explain(ExplainRequest {})).await;
    match answer {
        Ok(Ok(answer)) => Attestation::Told(answer.into_inner()),
        Ok(Err(status)) if status.code() == Code::PermissionDenied => {
            Attestation::Withheld(status.message().to_owned())
        }
        Ok(Err(_)) | Err(_) => Attestation::Unknown,
    }
}

/// The bundles; `None` if the endpoint has no such call.
async fn bundles(client: &mut Client) -> anyhow::Result<Option<Bundles>> {
    let answer = async {
        let request = call(X509BundlesRequest {});
        let stream = client.fetch_x509_bundles(request).await?;
        stream.into_inner().message().await
    };
    match answer.await {
        Ok(message) => read_bundles(&message.unwrap_or_default())
            .map(Some)
            .with_context(|| broken(BUNDLES)),
        Err(status) if is_unserved(&status) => Ok(None),
        Err(status) => Err(explained(BUNDLES, &status)),
    }
}

fn read_bundles(message: &X509BundlesResponse) -> anyhow::Result<Bundles> {
    let bundles = message.bundles.iter();
    bundles
        .map(|(id, bundle)| Ok((domain(id), authorities(id, bundle)?)))
        .collect()
}

fn domain(id: &str) -> String {
    id.strip_prefix("spiffe://").unwrap_or(id).to_owned()
}

fn broken(call: &str) -> String {
    format!("{call}: the answer breaks the standard")
}

/// Whether the endpoint speaks the protocol and only lacks this call.
fn is_unserved(status: &Status) -> bool {
    status.code() == Code::Unimplemented && std::error::Error::source(status).is_none()
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

type X509 = (Vec<X509Svid>, Bundles, usize);

async fn x509(client: &mut Client) -> anyhow::Result<X509> {
    let answer = async {
        let mut stream = client
            .fetch_x509svid(call(X509svidRequest {}))
            .await?
            .into_inner();
        stream.message().await
    };
    let message = answer
        .await
        .map_err(|status| explained(SVIDS, &status))?
        .ok_or_else(|| anyhow!("{SVIDS}: the stream ended without an answer"))?;
    read_x509(message).with_context(|| broken(SVIDS))
}

fn read_x509(message: X509svidResponse) -> anyhow::Result<X509> {
    let (mut svids, mut bundles) = (Vec::<X509Svid>::new(), Bundles::new());
    let mut own = BTreeSet::new();
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
        own.insert(domain.clone());
        let bundle = authorities(&id.to_string(), &svid.bundle)?;
        bundles.insert(domain, bundle);
        // Hints are unique; a repeated one marks an entry to be left out.
        let taken = svids.iter().any(|other| other.hint == svid.hint);
        if svid.hint.is_empty() || !taken {
            svids.push(X509Svid {
                id: id.to_string(),
                hint: svid.hint,
                leaf,
            });
        }
    }
    for (id, bundle) in &message.federated_bundles {
        let bundle = Bundle {
            federated: !own.contains(&domain(id)),
            ..authorities(id, bundle)?
        };
        bundles.insert(domain(id), bundle);
    }
    Ok((svids, bundles, message.crl.len()))
}

fn authorities(id: &str, bundle: &Bytes) -> anyhow::Result<Bundle> {
    let ders = x509::split(bundle).ok_or_else(|| anyhow!("{id}: the bundle is not DER"))?;
    let mut found = Bundle::default();
    for der in &ders {
        let authority = Certificate::from_der(der).with_context(|| format!("bundle of {id}"))?;
        let expires = authority.not_after();
        found.authorities += 1;
        found.expires = Some(found.expires.map_or(expires, |known| known.min(expires)));
    }
    Ok(found)
}

/// The JWT-SVIDs, judged by the endpoint; `None` if it serves none.
async fn tokens(client: &mut Client) -> anyhow::Result<Option<Vec<JwtSvid>>> {
    let request = JwtsvidRequest {
        audience: vec![AUDIENCE.to_owned()],
        spiffe_id: String::new(),
    };
    let answer = match client.fetch_jwtsvid(call(request)).await {
        Err(status) if is_unserved(&status) => return Ok(None),
        answer => answer.map_err(|status| explained(TOKENS, &status))?,
    };
    let mut judged = Vec::new();
    for svid in answer.into_inner().svids {
        let request = ValidateJwtsvidRequest {
            audience: AUDIENCE.to_owned(),
            svid: svid.svid.clone(),
        };
        let verdict = client.validate_jwtsvid(call(request)).await;
        let claims = claims(&svid.svid).unwrap_or_default();
        judged.push(JwtSvid {
            id: svid.spiffe_id,
            hint: svid.hint,
            length: svid.svid.len(),
            expires: claims.expires(),
            audiences: claims.aud.into(),
            invalid: verdict.err().map(|status| status.message().to_owned()),
        });
    }
    Ok(Some(judged))
}

/// Key IDs by trust domain; `None` if the endpoint serves no JWTs.
async fn keys(client: &mut Client) -> anyhow::Result<Option<KeyIds>> {
    let answer = async {
        let request = call(JwtBundlesRequest {});
        let stream = client.fetch_jwt_bundles(request).await?;
        stream.into_inner().message().await
    };
    match answer.await {
        Ok(message) => read_keys(&message.unwrap_or_default())
            .map(Some)
            .with_context(|| broken(KEYS)),
        Err(status) if is_unserved(&status) => Ok(None),
        Err(status) => Err(explained(KEYS, &status)),
    }
}

fn read_keys(message: &JwtBundlesResponse) -> anyhow::Result<KeyIds> {
    let bundles = message.bundles.iter();
    bundles
        .map(|(id, document)| {
            let keys: KeySet = serde_json::from_slice(document)
                .with_context(|| format!("the bundle of {id} is no JWK set"))?;
            let ids = keys.keys.into_iter().map(|key| key.kid).collect();
            Ok((domain(id), ids))
        })
        .collect()
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
    /// Seconds since 1970, perhaps with a fraction (RFC 7519 section 2).
    exp: Option<f64>,
    aud: Audiences,
}

impl Claims {
    /// The end, if it is a time that can be written down.
    fn expires(&self) -> Option<SystemTime> {
        let since = Duration::try_from_secs_f64(self.exp?).ok()?;
        (since < LAST).then(|| SystemTime::UNIX_EPOCH + since)
    }
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

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::crypto::{KeyAlgorithm, PrivateKey};
    use crate::pb::workload_api::X509svid;
    use crate::workload::tests::{Authority, DOMAIN};

    fn token(payload: &str) -> String {
        format!("x.{}.y", URL_SAFE_NO_PAD.encode(payload))
    }

    #[test]
    fn claims_are_read_in_both_forms() {
        for (payload, audiences) in [
            (r#"{"exp":5,"aud":"a"}"#, vec!["a"]),
            (r#"{"exp":5.0,"aud":["a","b"]}"#, vec!["a", "b"]),
        ] {
            let claims = claims(&token(payload)).unwrap();
            let five = SystemTime::UNIX_EPOCH + Duration::from_secs(5);
            assert_eq!(claims.expires(), Some(five));
            assert_eq!(Vec::<String>::from(claims.aud), audiences);
        }
        let [none, never, before] = ["{}", r#"{"exp":1e30}"#, r#"{"exp":-1}"#].map(token);
        for bad in ["", "x", "x.!.y", &none, &never, &before] {
            let read = claims(bad);
            assert!(
                read.is_none_or(|claims| claims.expires().is_none()),
                "{bad}"
            );
        }
    }

    #[test]
    fn fuzz_what_endpoints_answer() {
        let authority = Authority::new(DOMAIN);
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let id = "spiffe://example.org/a";
        let bundle = Bytes::from(authority.der.clone());
        let sample = X509svidResponse {
            svids: vec![X509svid {
                spiffe_id: id.to_owned(),
                x509_svid: authority.leaf(&key, &[id]).into(),
                bundle: bundle.clone(),
                ..X509svid::default()
            }],
            federated_bundles: [("spiffe://other.example".to_owned(), bundle)].into(),
            ..X509svidResponse::default()
        };
        assert_eq!(read_x509(sample.clone()).unwrap().1.len(), 2);
        let sample = sample.encode_to_vec();
        let check = bolero::check!().with_type::<(Vec<(u16, u8)>, String, f64)>();
        check.for_each(|(edits, text, exp)| {
            let mut bytes = sample.clone();
            for (place, octet) in edits.iter().take(6) {
                let at = usize::from(*place) % bytes.len();
                bytes[at] = *octet;
            }
            let mut found = Found::default();
            if let Ok(message) = X509svidResponse::decode(&bytes[..])
                && let Some(x509) = found.of(read_x509(message))
            {
                (found.svids, found.bundles, found.revocations) = x509;
            }
            let document = JwtBundlesResponse {
                bundles: [(text.clone(), text.clone().into_bytes())].into(),
            };
            let bundles = found.of(read_keys(&document)).unwrap_or_default();
            let claims = claims(&token(&format!(r#"{{"exp":{exp:e},"aud":{text:?}}}"#)));
            let claims = claims.unwrap_or_default();
            let svid = JwtSvid {
                id: text.clone(),
                hint: text.clone(),
                length: text.len(),
                expires: claims.expires(),
                audiences: claims.aud.into(),
                invalid: None,
            };
            let svids = vec![svid];
            found.jwt = Some(Jwt { svids, bundles });
            // Whatever it is, it can be shown.
            let now = SystemTime::UNIX_EPOCH;
            assert!(found.text(now).contains("# JWT SVIDs"));
            assert!(found.json(text, now)["problems"].is_array());
        });
    }
}
