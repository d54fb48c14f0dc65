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
use super::found::{Attestation, Bundle, Found, Jwt, JwtSvid, X509Svid};
use crate::crypto::x509::{self, Certificate};
use crate::pb::tbot::inspect::v1::ExplainRequest;
use crate::pb::tbot::inspect::v1::inspect_service_client::InspectServiceClient;
use crate::pb::workload_api::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use crate::pb::workload_api::{
    JwtBundlesRequest, JwtsvidRequest, ValidateJwtsvidRequest, X509BundlesRequest,
    X509BundlesResponse, X509svidRequest, X509svidResponse,
};
use crate::spiffe::SpiffeId;

/// The audience of the JWT-SVIDs that are asked for; nobody is to accept them.
const AUDIENCE: &str = "example.com";
/// The largest answer that is read, in bytes.
const MAX_ANSWER: usize = 4 * 1024 * 1024;

type Client = SpiffeWorkloadApiClient<Channel>;

/// Everything that the endpoint gives. What it does not give is the failure among what was found; an
/// error is an endpoint that is none.
pub(super) async fn inspect(address: &Address) -> anyhow::Result<Found> {
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
    let mut client = Client::new(channel.clone()).max_decoding_message_size(MAX_ANSWER);
    let mut found = match x509(&mut client).await {
        Ok(found) => found,
        Err(failure) => Found {
            // Bundles are for everyone: with them, only this process is what is refused.
            bundles: bundles(&mut client).await.unwrap_or_default(),
            failure: Some(failure),
            ..Found::default()
        },
    };
    if found.failure.is_none() {
        match jwt(&mut client).await {
            Ok(jwt) => found.jwt = jwt,
            Err(failure) => found.failure = Some(failure),
        }
    }
    found.attestation = attestation(channel).await;
    Ok(found)
}

/// What the agent knows of this process, if it is this program's and tells.
async fn attestation(channel: Channel) -> Attestation {
    let mut client = InspectServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER);
    match client.explain(ExplainRequest {}).await {
        Ok(answer) => Attestation::Told(answer.into_inner()),
        Err(status) if status.code() == Code::PermissionDenied => {
            Attestation::Withheld(status.message().to_owned())
        }
        Err(_) => Attestation::Unknown,
    }
}

async fn bundles(
    client: &mut Client,
) -> anyhow::Result<std::collections::BTreeMap<String, Bundle>> {
    let answer = async {
        let request = call(X509BundlesRequest {});
        let stream = client.fetch_x509_bundles(request).await?;
        stream.into_inner().message().await
    };
    let X509BundlesResponse { bundles, .. } = answer.await?.unwrap_or_default();
    bundles
        .iter()
        .map(|(id, bundle)| Ok((domain(id), authorities(id, bundle)?)))
        .collect()
}

fn domain(id: &str) -> String {
    id.strip_prefix("spiffe://").unwrap_or(id).to_owned()
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
    let mut found = Found {
        revocations: message.crl.len(),
        ..Found::default()
    };
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
        found.bundles.insert(domain, bundle);
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
        let bundle = Bundle {
            federated: !own.contains(&domain(id)),
            ..authorities(id, bundle)?
        };
        found.bundles.insert(domain(id), bundle);
    }
    Ok(found)
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
        let keys: KeySet = serde_json::from_slice(&document)
            .with_context(|| format!("FetchJWTBundles: the bundle of {id} is no JWK set"))?;
        let ids = keys.keys.into_iter().map(|key| key.kid).collect();
        jwt.bundles.insert(domain(&id), ids);
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
