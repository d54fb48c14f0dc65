//! The shelf as bytes: one line with the checksum of what follows, then JSON.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::super::jwt::JwtSvid;
use super::super::{Bundles, Federated, Svid};
use super::row::{Kept, MAX};
use super::{Beside, Content, Holder, Mark, Origin, Tokens};
use crate::attest::Process;
use crate::crypto::sha256_hex;
use crate::crypto::x509::Certificate;
use crate::secret::Secret;
use crate::spiffe::TrustDomain;
use crate::spiffe::jwt::JwtBundle;

/// The first word and the version of the form.
const MAGIC: &str = "tbot-svids-2";

#[derive(Serialize, Deserialize)]
struct Record {
    origin: Origin,
    bundles: StoredBundles,
    crl: Option<Blob>,
    answers: Vec<Answer>,
    /// Files of earlier versions have none.
    #[serde(default)]
    tokens: Vec<StoredTokens>,
}

#[derive(Serialize, Deserialize)]
struct StoredBundles {
    trust_domain: String,
    own: StoredBundle,
    federated: BTreeMap<String, StoredBundle>,
}

#[derive(Serialize, Deserialize)]
struct StoredBundle {
    x509: Blob,
    /// A JWK Set.
    jwt: String,
}

#[derive(Serialize, Deserialize)]
struct Answer {
    mark: Blob,
    process: Process,
    /// Files of earlier versions do not say.
    #[serde(default)]
    user: Option<u32>,
    key: SecretText,
    /// Seconds since 1970.
    issued_at: u64,
    svids: Vec<StoredSvid>,
}

#[derive(Serialize, Deserialize)]
struct StoredSvid {
    id: String,
    hint: String,
    name: String,
    revision: String,
    chain: Blob,
}

#[derive(Serialize, Deserialize)]
struct StoredTokens {
    mark: Blob,
    process: Process,
    /// Files of earlier versions do not say.
    #[serde(default)]
    user: Option<u32>,
    /// Seconds since 1970.
    asked: u64,
    svids: Vec<StoredToken>,
}

#[derive(Serialize, Deserialize)]
struct StoredToken {
    id: String,
    hint: String,
    /// Seconds since 1970.
    not_after: u64,
    token: SecretText,
}

/// Bytes that are written as base64.
struct Blob(Bytes);

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = STANDARD.decode(text).map_err(serde::de::Error::custom)?;
        Ok(Self(bytes.into()))
    }
}

/// A private key in base64, or a token; wiped when it is dropped.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
struct SecretText(String);

pub(super) fn encode(origin: &Origin, content: &Content) -> Secret<Vec<u8>> {
    let record = content.beside.as_ref().map(|beside| Record {
        origin: origin.clone(),
        bundles: stored(&beside.bundles),
        crl: beside.crl.clone().map(Blob),
        answers: content
            .svids
            .iter()
            .filter_map(|(mark, kept)| answer(mark, kept))
            .collect(),
        tokens: content
            .tokens
            .iter()
            .filter_map(|(mark, kept)| tokens_of(mark, kept))
            .collect(),
    });
    // These types have a JSON form, always.
    let body = Secret::new(serde_json::to_vec(&record).unwrap_or_default());
    let mut bytes = format!("{MAGIC} {}\n", sha256_hex(body.expose())).into_bytes();
    bytes.reserve_exact(body.expose().len());
    bytes.extend_from_slice(body.expose());
    Secret::new(bytes)
}

fn stored(bundles: &Bundles) -> StoredBundles {
    let bundle = |x509: &Bytes, jwt: &JwtBundle| StoredBundle {
        x509: Blob(x509.clone()),
        jwt: String::from_utf8_lossy(&jwt.jwks()).into_owned(),
    };
    StoredBundles {
        trust_domain: bundles.trust_domain().name().to_owned(),
        own: bundle(bundles.local(), bundles.jwt()),
        federated: bundles
            .federated()
            .iter()
            .map(|(domain, other)| (domain.name().to_owned(), bundle(&other.x509, &other.jwt)))
            .collect(),
    }
}

fn tokens_of(mark: &Mark, kept: &Kept<Arc<Tokens>>) -> Option<StoredTokens> {
    let svids = kept.what.svids.iter().map(|svid| {
        Some(StoredToken {
            id: svid.id.to_string(),
            hint: svid.hint.clone(),
            not_after: seconds(svid.not_after)?,
            token: SecretText(svid.token.clone()),
        })
    });
    Some(StoredTokens {
        mark: Blob(Bytes::copy_from_slice(mark)),
        process: kept.holder.process,
        user: kept.holder.user,
        asked: seconds(kept.what.asked)?,
        svids: svids.collect::<Option<_>>()?,
    })
}

fn seconds(time: SystemTime) -> Option<u64> {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(since.as_secs())
}

fn time(seconds: u64) -> Option<SystemTime> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

fn answer(mark: &Mark, kept: &Kept<Arc<[Svid]>>) -> Option<Answer> {
    let first = kept.what.first()?;
    Some(Answer {
        mark: Blob(Bytes::copy_from_slice(mark)),
        process: kept.holder.process,
        user: kept.holder.user,
        key: SecretText(STANDARD.encode(&first.key)),
        issued_at: seconds(first.issued_at)?,
        svids: kept
            .what
            .iter()
            .map(|svid| StoredSvid {
                id: svid.id.to_string(),
                hint: svid.hint.clone(),
                name: svid.name.clone(),
                revision: svid.revision.clone(),
                chain: Blob(svid.chain.clone()),
            })
            .collect(),
    })
}

/// Reads what [`encode`] wrote; of the answers, those that may be good at `now`. An error says what
/// is wrong, without secrets.
pub(super) fn decode(
    bytes: &Secret<Vec<u8>>,
    now: SystemTime,
) -> Result<(Origin, Content), &'static str> {
    const TORN: &str = "it is torn or not this agent's";
    let bytes = bytes.expose();
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or(TORN)?;
    let (head, rest) = bytes.split_at_checked(end).ok_or(TORN)?;
    let body = rest.get(1..).ok_or(TORN)?;
    if head != format!("{MAGIC} {}", sha256_hex(body)).as_bytes() {
        return Err(TORN);
    }
    let record: Option<Record> = serde_json::from_slice(body).map_err(|_foreign| TORN)?;
    let Some(record) = record else {
        return Ok(<(Origin, Content)>::default());
    };
    let bundles = bundles(&record.bundles).ok_or("its trust bundles cannot be read")?;
    let svids = record.answers.iter().take(MAX).filter_map(|answer| {
        let mark = answer.mark.0.as_ref().try_into().ok()?;
        let kept = kept(answer)?;
        (kept.not_after > now).then_some((mark, kept))
    });
    let tokens = record.tokens.iter().take(MAX).filter_map(|stored| {
        let mark = stored.mark.0.as_ref().try_into().ok()?;
        let kept = kept_tokens(stored)?;
        (kept.not_after > now).then_some((mark, kept))
    });
    let content = Content {
        svids: svids.collect(),
        tokens: tokens.collect(),
        beside: Some(Beside {
            bundles: Arc::new(bundles),
            crl: record.crl.map(|crl| crl.0),
        }),
    };
    Ok((record.origin, content))
}

fn bundles(stored: &StoredBundles) -> Option<Bundles> {
    let jwt = |bundle: &StoredBundle| {
        let set: serde_json::Value = serde_json::from_str(&bundle.jwt).ok()?;
        let keys = set.get("keys")?.as_array()?;
        let keys = keys.iter().filter_map(serde_json::Value::as_object);
        Some(JwtBundle::from_jwks(keys))
    };
    let federated = stored
        .federated
        .iter()
        .map(|(name, bundle)| {
            let domain = TrustDomain::new(name).ok()?;
            let x509 = bundle.x509.0.clone();
            let jwt = jwt(bundle)?;
            Some((domain, Federated { x509, jwt }))
        })
        .collect::<Option<_>>()?;
    Bundles::restored(
        TrustDomain::new(&stored.trust_domain).ok()?,
        &stored.own.x509.0,
        jwt(&stored.own)?,
        federated,
    )
}

fn kept_tokens(stored: &StoredTokens) -> Option<Kept<Arc<Tokens>>> {
    let svids = stored.svids.iter().map(|stored| {
        Some(JwtSvid {
            id: stored.id.parse().ok()?,
            token: stored.token.0.clone(),
            hint: stored.hint.clone(),
            not_after: time(stored.not_after)?,
        })
    });
    let tokens = Tokens {
        asked: time(stored.asked)?,
        svids: svids.collect::<Option<_>>()?,
    };
    let holder = Holder {
        process: stored.process,
        user: stored.user,
    };
    Some(super::kept_tokens(holder, tokens))
}

fn kept(answer: &Answer) -> Option<Kept<Arc<[Svid]>>> {
    let key = Bytes::from(STANDARD.decode(&answer.key.0).ok()?);
    let issued_at = time(answer.issued_at)?;
    let svids: Vec<_> = answer
        .svids
        .iter()
        .map(|stored| {
            let ders = crate::crypto::x509::split(&stored.chain.0)?;
            let leaf = Certificate::from_der(ders.first()?).ok()?;
            Some(Svid {
                id: stored.id.parse().ok()?,
                chain: stored.chain.0.clone(),
                key: key.clone(),
                hint: stored.hint.clone(),
                issued_at,
                not_after: leaf.not_after(),
                serial: leaf.serial(),
                name: stored.name.clone(),
                revision: stored.revision.clone(),
            })
        })
        .collect::<Option<_>>()?;
    let holder = Holder {
        process: answer.process,
        user: answer.user,
    };
    Some(super::kept_svids(holder, svids.into()))
}
