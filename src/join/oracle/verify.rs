//! The verifying half of join method `oracle` (upstream `lib/join/oraclejoin`): the instance signs the
//! challenge with the key of a certificate that its region's authority issued. Whose authorities those
//! are, only an instance may ask: it sends the signed question along, and the cluster puts it.

mod claims;
mod known;
mod region;
mod request;

use std::time::SystemTime;

use async_trait::async_trait;
use aws_lc_rs::signature::{RSA_PSS_2048_8192_SHA256, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use der::Decode as _;
use http::{StatusCode, header};
use serde_json::{Value, json};
use x509_cert::spki::SubjectPublicKeyInfoRef;

pub(super) use self::claims::Claims;
pub use self::known::KnownRoots;
pub(super) use self::region::Region;
use self::request::Question;
use crate::crypto::chain::{self, Untrusted, Usage};
use crate::crypto::pem;
use crate::crypto::x509::{Certificate, CertificateError};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, World, rules, section, set};
use crate::outbound::{OutboundError, Target};
use crate::pb::teleport::join::v1::{
    OracleChallenge, OracleChallengeSolution, challenge, challenge_solution,
};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// The path of the question whose authorities certify instances.
pub(super) const PATH: &str = "/v1/instancePrincipalRootCACertificates";
/// The longest of each part of a solution, in bytes.
const MAX_PART: usize = 64 * 1024;
/// The longest answer of Oracle's, in bytes.
const MAX_ANSWER: usize = 1024 * 1024;
/// The longest modulus of an instance's key, in bytes, as signature.
const MAX_SIGNATURE: usize = 512;

/// Why an instance is refused.
#[derive(Debug, thiserror::Error)]
enum OracleError {
    /// A part is not there.
    #[error("{0} is required")]
    Missing(&'static str),
    /// A part is longer than any real one.
    #[error("{0} is larger than any real one")]
    TooLarge(&'static str),
    /// The certificate is none.
    #[error("parsing identity certificate: {0}")]
    Certificate(#[from] CertificateError),
    /// The certificate is not an instance's.
    #[error("parsing claims from identity certificate: {0}")]
    Claims(&'static str),
    /// The instance is nowhere that is known.
    #[error("unsupported region of instance {0:?}")]
    Region(String),
    /// The challenge was signed by another key, or by one that is too small.
    #[error("RSA challenge signature did not verify")]
    Signature,
    /// The question is another.
    #[error("validating root CA request: {0}")]
    Question(String),
    /// Oracle does not answer it.
    #[error("executing Oracle root CA request: HTTP request failed with status: {0}")]
    Refused(StatusCode),
    /// Oracle's answer is not as documented.
    #[error("parsing Oracle root CA pool: {0}")]
    Answer(&'static str),
    /// Oracle cannot be asked.
    #[error("executing Oracle root CA request: {0}")]
    Outbound(#[from] OutboundError),
    /// Another authority certified it.
    #[error("instance certificate chain did not verify to Oracle root CAs: {0}")]
    Untrusted(#[from] Untrusted),
}

impl OracleError {
    fn refusal(&self) -> Refusal {
        let text = self.to_string();
        match self {
            Self::Outbound(_) => Refusal::unavailable(text),
            Self::Missing(_)
            | Self::TooLarge(_)
            | Self::Certificate(_)
            | Self::Claims(_)
            | Self::Question(_) => Refusal::bad_parameter(text),
            Self::Answer(_) => Refusal::unknown(text),
            Self::Region(_) | Self::Signature | Self::Refused(_) | Self::Untrusted(_) => {
                Refusal::denied(text)
            }
        }
        .context("checking oracle request")
    }
}

/// Join method `oracle`.
#[derive(Debug)]
pub struct Oracle;

#[async_trait]
impl Verifier for Oracle {
    fn name(&self) -> &'static str {
        "oracle"
    }

    fn carrier(&self) -> Carrier {
        Carrier::Oracle
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        let missing = (
            "`oracle` is required for the join method `oracle`",
            "add `oracle: {allow: [{tenancy: OCID}]}`",
        );
        section(self.name(), missing, spec, stored, |section| {
            let missing = (
                "the \"oracle\" join method requires at least one allow rule",
                "add `- tenancy: ocid1.tenancy.…`",
            );
            json!({"allow": rules(section, missing, read_rule)})
        });
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let question = challenge::Payload::OracleChallenge(OracleChallenge {
            challenge: joining.challenge.to_owned(),
        });
        let challenge_solution::Payload::OracleChallengeSolution(solution) =
            dialogue.ask(question).await?
        else {
            return Err(Refusal::bad_parameter(
                "missing parameter OracleChallengeSolution",
            ));
        };
        let refuse = |error: OracleError| error.refusal();
        let certificate = leaf(&solution).map_err(refuse)?;
        let claims = Claims::of(&certificate)
            .map_err(OracleError::Claims)
            .map_err(refuse)?;
        let attributes = json!({
            "tenancy_id": claims.tenancy,
            "compartment_id": claims.compartment,
            "instance_id": claims.instance,
        });
        seen.metadata = attributes.clone();
        Box::pin(verify(joining, &solution, &certificate, &claims))
            .await
            .map_err(refuse)?;
        seen.attributes = attributes.as_object().cloned();
        claims
            .admitted(joining.spec.pointer("/oracle/allow"))
            .map_err(|near| {
                seen.near = Some(near);
                let text = format!(
                    "instance {} did not match any allow rules in token {}",
                    claims.instance, joining.token
                );
                Refusal::denied(text).context("checking oracle request")
            })
    }
}

fn read_rule(rule: &mut Fields<'_>) -> Value {
    let mut stored = json!({});
    match rule.string("tenancy").filter(|text| !text.is_empty()) {
        Some(tenancy) => {
            check_id(rule, "tenancy", "tenancy", &tenancy);
            set(&mut stored, "tenancy", tenancy);
        }
        None => rule.error(
            "tenancy",
            "tenancy must be set",
            Some("write its OCID, `ocid1.tenancy.…`"),
        ),
    }
    for (key, kind) in [
        ("parent_compartments", "compartment"),
        ("instances", "instance"),
    ] {
        if let Some(ids) = rule.strings(key).filter(|ids| !ids.is_empty()) {
            for id in &ids {
                // The root compartment of a tenancy is the tenancy.
                if !(kind == "compartment" && id.starts_with("ocid1.tenancy.")) {
                    check_id(rule, key, kind, id);
                }
            }
            set(&mut stored, key, ids);
        }
    }
    if let Some(regions) = rule
        .strings("regions")
        .filter(|regions| !regions.is_empty())
    {
        for region in &regions {
            if Region::of(region).is_none() {
                let message = format!("{region:?} is no region of Oracle's cloud");
                rule.error(
                    "regions",
                    message,
                    Some("write it as in `us-phoenix-1` or `phx`"),
                );
            }
        }
        set(&mut stored, "regions", regions);
    }
    stored
}

fn check_id(rule: &Fields<'_>, key: &str, kind: &str, id: &str) {
    if !id.starts_with(&format!("ocid1.{kind}.")) {
        let message = format!("{id:?} is no OCID of a {kind}");
        rule.error(
            key,
            message,
            Some(&format!("it begins with `ocid1.{kind}.`")),
        );
    }
}

/// The instance's own certificate.
fn leaf(solution: &OracleChallengeSolution) -> Result<Certificate, OracleError> {
    for (name, part) in [
        ("Cert", &solution.cert),
        ("Intermediate", &solution.intermediate),
        ("Signature", &solution.signature),
        ("SignedRootCAReq", &solution.signed_root_ca_req),
    ] {
        if part.is_empty() {
            return Err(OracleError::Missing(name));
        }
        if part.len() > MAX_PART {
            return Err(OracleError::TooLarge(name));
        }
    }
    let text =
        std::str::from_utf8(&solution.cert).map_err(|_source| CertificateError::Malformed)?;
    Ok(Certificate::from_pem(text)?)
}

/// Everything but the rules.
async fn verify(
    joining: &Joining<'_>,
    solution: &OracleChallengeSolution,
    certificate: &Certificate,
    claims: &Claims,
) -> Result<(), OracleError> {
    check_signature(certificate, joining.challenge, &solution.signature)?;
    let region = Region::of_instance(&claims.instance)
        .ok_or_else(|| OracleError::Region(claims.instance.clone()))?;
    let question = Question::read(&solution.signed_root_ca_req, PATH, &region.authority())
        .map_err(OracleError::Question)?;
    let intermediates = intermediates(solution);
    let trusted = |roots: &[Vec<u8>]| trusted(certificate, &intermediates, roots, joining.now);
    let known = &joining.world.oracle_roots;
    if let Some(roots) = known.of(region, joining.now)
        && trusted(&roots).is_ok()
    {
        return Ok(());
    }
    // Whom the known authorities did not certify may be of a newer one.
    let roots = roots(joining.world, region, question).await?;
    known.learn(region, roots.clone(), joining.now);
    trusted(&roots)
}

/// The certificates that lead from the instance's to a root; none where they cannot be read.
fn intermediates(solution: &OracleChallengeSolution) -> Vec<Vec<u8>> {
    std::str::from_utf8(&solution.intermediate)
        .ok()
        .and_then(|text| pem::certificates(text).ok())
        .unwrap_or_default()
}

fn check_signature(
    certificate: &Certificate,
    challenge: &str,
    signature: &[u8],
) -> Result<(), OracleError> {
    let spki = certificate.spki();
    let key = SubjectPublicKeyInfoRef::from_der(&spki)
        .ok()
        .and_then(|info| info.subject_public_key.as_bytes())
        .filter(|_| signature.len() <= MAX_SIGNATURE && !challenge.is_empty())
        .ok_or(OracleError::Signature)?;
    UnparsedPublicKey::new(&RSA_PSS_2048_8192_SHA256, key)
        .verify(challenge.as_bytes(), signature)
        .map_err(|_source| OracleError::Signature)
}

fn trusted(
    certificate: &Certificate,
    intermediates: &[Vec<u8>],
    roots: &[Vec<u8>],
    now: SystemTime,
) -> Result<(), OracleError> {
    let der = certificate.der();
    Ok(chain::verify(
        der,
        intermediates,
        roots,
        now,
        Usage::ClientAuth,
    )?)
}

/// Asks the region's authority for its certificates, DER.
async fn roots(
    world: &World,
    region: Region,
    question: Question,
) -> Result<Vec<Vec<u8>>, OracleError> {
    let target = Target::https(&region.authority());
    let mut request = http::Request::get(PATH).header(header::HOST, target.authority());
    for (name, value) in &question.headers {
        request = request.header(name, value);
    }
    let request = request
        .body(http_body_util::Full::default())
        .map_err(OutboundError::from)?;
    let answer = world.outbound.send(&target, request, MAX_ANSWER).await?;
    if answer.status != StatusCode::OK {
        return Err(OracleError::Refused(answer.status));
    }
    read_roots(&answer.body)
}

fn read_roots(answer: &[u8]) -> Result<Vec<Vec<u8>>, OracleError> {
    let answer: Value =
        serde_json::from_slice(answer).map_err(|_source| OracleError::Answer("no JSON"))?;
    let texts = answer
        .get("certificates")
        .and_then(Value::as_array)
        .filter(|texts| !texts.is_empty())
        .ok_or(OracleError::Answer("no certificates"))?;
    texts
        .iter()
        .map(|text| {
            let der = text.as_str().and_then(|text| STANDARD.decode(text).ok());
            der.ok_or(OracleError::Answer("a certificate is no base64"))
        })
        .collect()
}

#[cfg(test)]
mod tests;
