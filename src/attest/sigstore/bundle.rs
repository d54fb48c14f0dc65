//! Sigstore's bundles: from JSON, and from the annotations by which cosign wrote them before.

use std::collections::HashMap;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::{Deserialize, Deserializer};

use crate::crypto::{pem, sha256};
use crate::pb::dev::sigstore::bundle::v1::{
    Bundle, TimestampVerificationData, VerificationMaterial, bundle, verification_material,
};
use crate::pb::dev::sigstore::common::v1::{
    HashAlgorithm, HashOutput, LogId, MessageSignature, PublicKeyIdentifier,
    Rfc3161SignedTimestamp, X509Certificate, X509CertificateChain,
};
use crate::pb::dev::sigstore::rekor::v1::{
    Checkpoint, InclusionPromise, InclusionProof, KindVersion, TransparencyLogEntry,
};
use crate::pb::io::intoto::{Envelope, Signature};

/// The form of what is assembled from annotations.
const ASSEMBLED: &str = "application/vnd.dev.sigstore.bundle+json;version=0.1";
const SIGNATURE: &str = "dev.cosignproject.cosign/signature";
const CERTIFICATE: &str = "dev.sigstore.cosign/certificate";
const CHAIN: &str = "dev.sigstore.cosign/chain";
const REKOR: &str = "dev.sigstore.cosign/bundle";

/// JSON of protobuf messages has either alphabet of base64, padded or not.
const STANDARD: GeneralPurpose = GeneralPurpose::new(&alphabet::STANDARD, LENIENT);
const LENIENT: GeneralPurposeConfig =
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);

/// Why something is no bundle.
#[derive(Debug, thiserror::Error)]
pub(super) enum BundleError {
    /// The JSON has not the form of a bundle.
    #[error("no bundle in JSON: {0}")]
    Json(#[from] serde_json::Error),
    /// An annotation is missing or malformed.
    #[error("annotation {annotation}: {problem}")]
    Annotation {
        annotation: &'static str,
        problem: String,
    },
}

/// A bundle written as JSON.
pub(super) fn from_json(bytes: &[u8]) -> Result<Bundle, BundleError> {
    let json: Json = serde_json::from_slice(bytes)?;
    Ok(json.into())
}

/// The bundle that the annotations of one of cosign's layers amount to. `envelope` is the layer.
pub(super) fn from_annotations(
    annotations: &HashMap<String, String>,
    envelope: &[u8],
) -> Result<Bundle, BundleError> {
    let get = |name| annotations.get(name).filter(|text| !text.is_empty());
    let wrong = |annotation, problem: &dyn std::fmt::Display| BundleError::Annotation {
        annotation,
        problem: problem.to_string(),
    };
    let signature = get(SIGNATURE).ok_or_else(|| wrong(SIGNATURE, &"there is none"))?;
    let signature = STANDARD
        .decode(signature)
        .map_err(|source| wrong(SIGNATURE, &source))?;
    let mut certificates = Vec::new();
    for name in [CERTIFICATE, CHAIN] {
        let ders = pem::certificates(get(name).map_or("", String::as_str))
            .map_err(|source| wrong(name, &source))?;
        certificates.extend(
            ders.into_iter()
                .map(|raw_bytes| X509Certificate { raw_bytes }),
        );
    }
    let key = if certificates.is_empty() {
        // Signed with a key that the policy knows.
        verification_material::Content::PublicKey(PublicKeyIdentifier::default())
    } else {
        verification_material::Content::X509CertificateChain(X509CertificateChain { certificates })
    };
    let entry = get(REKOR)
        .map(|text| logged(text).map_err(|problem| wrong(REKOR, &problem)))
        .transpose()?;
    Ok(Bundle {
        media_type: ASSEMBLED.to_owned(),
        verification_material: Some(VerificationMaterial {
            content: Some(key),
            tlog_entries: entry.into_iter().collect(),
            timestamp_verification_data: None,
        }),
        content: Some(bundle::Content::MessageSignature(MessageSignature {
            message_digest: Some(HashOutput {
                algorithm: HashAlgorithm::Sha2256.into(),
                digest: sha256(envelope).to_vec(),
            }),
            signature,
        })),
    })
}

/// What Rekor, the transparency log, promised of an entry.
fn logged(text: &str) -> Result<TransparencyLogEntry, String> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Promised {
        #[serde(deserialize_with = "bytes")]
        signed_entry_timestamp: Vec<u8>,
        payload: Payload,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Payload {
        #[serde(deserialize_with = "bytes")]
        body: Vec<u8>,
        integrated_time: i64,
        log_index: i64,
        #[serde(rename = "logID")]
        log_id: String,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Body {
        kind: String,
        api_version: String,
    }
    let promised: Promised = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let payload = promised.payload;
    let body: Body = serde_json::from_slice(&payload.body).map_err(|error| error.to_string())?;
    let key_id = hex::decode(&payload.log_id).map_err(|error| error.to_string())?;
    Ok(TransparencyLogEntry {
        log_index: payload.log_index,
        log_id: Some(LogId { key_id }),
        kind_version: Some(KindVersion {
            kind: body.kind,
            version: body.api_version,
        }),
        integrated_time: payload.integrated_time,
        inclusion_promise: Some(InclusionPromise {
            signed_entry_timestamp: promised.signed_entry_timestamp,
        }),
        inclusion_proof: None,
        canonicalized_body: payload.body,
    })
}

/// The message in protobuf's form of JSON: `camelCase`, bytes in base64, large numbers as text.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Json {
    media_type: String,
    verification_material: JsonMaterial,
    message_signature: Option<JsonSignature>,
    dsse_envelope: Option<JsonEnvelope>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonMaterial {
    public_key: Option<JsonKey>,
    x509_certificate_chain: Option<JsonChain>,
    certificate: Option<JsonCertificate>,
    #[serde(default)]
    tlog_entries: Vec<JsonEntry>,
    timestamp_verification_data: Option<JsonTimestamps>,
}

#[derive(Deserialize)]
struct JsonKey {
    #[serde(default)]
    hint: String,
}

#[derive(Deserialize)]
struct JsonChain {
    #[serde(default)]
    certificates: Vec<JsonCertificate>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonCertificate {
    #[serde(deserialize_with = "bytes")]
    raw_bytes: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonEntry {
    #[serde(default, deserialize_with = "number")]
    log_index: i64,
    log_id: Option<JsonLog>,
    kind_version: Option<JsonKind>,
    #[serde(default, deserialize_with = "number")]
    integrated_time: i64,
    inclusion_promise: Option<JsonPromise>,
    inclusion_proof: Option<JsonProof>,
    #[serde(default, deserialize_with = "bytes")]
    canonicalized_body: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonLog {
    #[serde(deserialize_with = "bytes")]
    key_id: Vec<u8>,
}

#[derive(Deserialize)]
struct JsonKind {
    kind: String,
    version: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonPromise {
    #[serde(deserialize_with = "bytes")]
    signed_entry_timestamp: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonProof {
    #[serde(default, deserialize_with = "number")]
    log_index: i64,
    #[serde(default, deserialize_with = "bytes")]
    root_hash: Vec<u8>,
    #[serde(default, deserialize_with = "number")]
    tree_size: i64,
    #[serde(default)]
    hashes: Vec<Base64>,
    checkpoint: Option<JsonCheckpoint>,
}

#[derive(Deserialize)]
struct JsonCheckpoint {
    #[serde(default)]
    envelope: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonTimestamps {
    #[serde(default)]
    rfc3161_timestamps: Vec<JsonTimestamp>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonTimestamp {
    #[serde(deserialize_with = "bytes")]
    signed_timestamp: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonSignature {
    message_digest: Option<JsonHash>,
    #[serde(deserialize_with = "bytes")]
    signature: Vec<u8>,
}

#[derive(Deserialize)]
struct JsonHash {
    #[serde(default)]
    algorithm: String,
    #[serde(deserialize_with = "bytes")]
    digest: Vec<u8>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JsonEnvelope {
    #[serde(deserialize_with = "bytes")]
    payload: Vec<u8>,
    payload_type: String,
    #[serde(default)]
    signatures: Vec<JsonSigned>,
}

#[derive(Deserialize)]
struct JsonSigned {
    #[serde(deserialize_with = "bytes")]
    sig: Vec<u8>,
    #[serde(default)]
    keyid: String,
}

#[derive(Deserialize)]
#[serde(transparent)]
struct Base64(#[serde(deserialize_with = "bytes")] Vec<u8>);

fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?
        .replace('-', "+")
        .replace('_', "/");
    STANDARD.decode(text).map_err(serde::de::Error::custom)
}

fn number<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Number(i64),
        Text(String),
    }
    match Number::deserialize(deserializer)? {
        Number::Number(number) => Ok(number),
        Number::Text(text) => text.parse().map_err(serde::de::Error::custom),
    }
}

impl From<Json> for Bundle {
    fn from(json: Json) -> Self {
        let signature = json.message_signature.map(|signature| {
            bundle::Content::MessageSignature(MessageSignature {
                message_digest: signature.message_digest.map(|hash| HashOutput {
                    algorithm: HashAlgorithm::from_str_name(&hash.algorithm)
                        .unwrap_or(HashAlgorithm::Unspecified)
                        .into(),
                    digest: hash.digest,
                }),
                signature: signature.signature,
            })
        });
        let envelope = json.dsse_envelope.map(|envelope| {
            let signed = envelope.signatures.into_iter().map(|signed| Signature {
                sig: signed.sig,
                keyid: signed.keyid,
            });
            bundle::Content::DsseEnvelope(Envelope {
                payload: envelope.payload,
                payload_type: envelope.payload_type,
                signatures: signed.collect(),
            })
        });
        Self {
            media_type: json.media_type,
            verification_material: Some(json.verification_material.into()),
            content: signature.or(envelope),
        }
    }
}

impl From<JsonMaterial> for VerificationMaterial {
    fn from(json: JsonMaterial) -> Self {
        use verification_material::Content;
        let certificate = |json: JsonCertificate| X509Certificate {
            raw_bytes: json.raw_bytes,
        };
        let chain = |json: JsonChain| X509CertificateChain {
            certificates: json.certificates.into_iter().map(certificate).collect(),
        };
        let key = |json: JsonKey| PublicKeyIdentifier { hint: json.hint };
        let content = (json.certificate.map(certificate).map(Content::Certificate))
            .or(json
                .x509_certificate_chain
                .map(chain)
                .map(Content::X509CertificateChain))
            .or(json.public_key.map(key).map(Content::PublicKey));
        let timestamps = json.timestamp_verification_data.map(|json| {
            let stamps = json.rfc3161_timestamps.into_iter();
            TimestampVerificationData {
                rfc3161_timestamps: stamps
                    .map(|stamp| Rfc3161SignedTimestamp {
                        signed_timestamp: stamp.signed_timestamp,
                    })
                    .collect(),
            }
        });
        Self {
            content,
            tlog_entries: json.tlog_entries.into_iter().map(Into::into).collect(),
            timestamp_verification_data: timestamps,
        }
    }
}

impl From<JsonEntry> for TransparencyLogEntry {
    fn from(json: JsonEntry) -> Self {
        Self {
            log_index: json.log_index,
            log_id: json.log_id.map(|id| LogId { key_id: id.key_id }),
            kind_version: json.kind_version.map(|kind| KindVersion {
                kind: kind.kind,
                version: kind.version,
            }),
            integrated_time: json.integrated_time,
            inclusion_promise: json.inclusion_promise.map(|promise| InclusionPromise {
                signed_entry_timestamp: promise.signed_entry_timestamp,
            }),
            inclusion_proof: json.inclusion_proof.map(|proof| InclusionProof {
                log_index: proof.log_index,
                root_hash: proof.root_hash,
                tree_size: proof.tree_size,
                hashes: proof.hashes.into_iter().map(|Base64(hash)| hash).collect(),
                checkpoint: proof.checkpoint.map(|checkpoint| Checkpoint {
                    envelope: checkpoint.envelope,
                }),
            }),
            canonicalized_body: json.canonicalized_body,
        }
    }
}

#[cfg(test)]
mod tests;
