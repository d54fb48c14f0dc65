//! The method as a cluster's registry knows it: rules of a token, and the order of the proof.

use async_trait::async_trait;
use serde_json::{Value, json};

use super::{Endorsement, Expected, TpmError, authorities};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, rules, set};
use crate::pb::teleport::join::v1::{
    TpmEncryptedCredential, challenge, challenge_solution, join_request, tpm_init,
};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Join method `tpm`.
#[derive(Debug)]
pub struct Tpm;

#[async_trait]
impl Verifier for Tpm {
    fn name(&self) -> &'static str {
        "tpm"
    }

    fn carrier(&self) -> Carrier {
        Carrier::Tpm
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        let Some(mut section) = spec.section(self.name()) else {
            let message = "`tpm` is required for the join method `tpm`";
            let hint =
                "add `tpm: {allow: [{ek_public_hash: …}]}` with what `tbot tpm identify` prints";
            return spec.error(self.name(), message, Some(hint));
        };
        let mut normal = json!({});
        let missing = (
            "allow: at least one rule must be set",
            "add `- ek_public_hash: HASH`",
        );
        let rules = rules(&mut section, missing, read_rule);
        let serial_alone = rules.iter().any(|rule| {
            rule.get("ek_certificate_serial").is_some() && rule.get("ek_public_hash").is_none()
        });
        set(&mut normal, "allow", rules);
        if let Some(allowed) = section
            .strings("ekcert_allowed_cas")
            .filter(|all| !all.is_empty())
        {
            if let Err(problem) = authorities(&allowed) {
                section.error(
                    "ekcert_allowed_cas",
                    problem,
                    Some("each is the PEM text of a certificate, `-----BEGIN CERTIFICATE-----` and so on"),
                );
            }
            set(&mut normal, "ekcert_allowed_cas", allowed);
        } else if serial_alone {
            let message = "a rule has `ek_certificate_serial` alone, and nobody says whose \
                           certificates count: anyone can make one with that serial";
            let hint = "add the maker's certificate to `ekcert_allowed_cas`, or `ek_public_hash` to \
                        the rule";
            section.warn("allow", message, Some(hint));
        }
        section.finish();
        set(stored, self.name(), normal);
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let refuse = |error: TpmError| {
            let text = format!("validating TPM: {error}");
            Refusal::denied(text)
        };
        let join_request::Payload::TpmInit(init) = joining.opening else {
            return Err(Refusal::bad_parameter("missing parameter TPMInit"));
        };
        let (certificate, key): (&[u8], &[u8]) = match &init.ek {
            Some(tpm_init::Ek::EkCert(certificate)) => (certificate, &[]),
            Some(tpm_init::Ek::EkKey(key)) => (&[], key),
            None => (&[], &[]),
        };
        let mut endorsement = Endorsement::read(certificate, key).map_err(refuse)?;
        note(seen, &endorsement);
        let section = joining.spec.get(self.name()).unwrap_or(&Value::Null);
        let allowed: Vec<&str> = section
            .get("ekcert_allowed_cas")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let authorities = authorities(&allowed).map_err(Refusal::bad_parameter)?;
        endorsement
            .check(&authorities, joining.now)
            .map_err(refuse)?;
        note(seen, &endorsement);

        let (expected, credential) = Expected::challenge(
            &endorsement,
            &init.public,
            &init.create_data,
            &init.create_attestation,
            &init.create_signature,
        )
        .map_err(refuse)?;
        let question = challenge::Payload::TpmEncryptedCredential(TpmEncryptedCredential {
            credential_blob: credential.blob,
            secret: credential.secret,
        });
        let challenge_solution::Payload::TpmSolution(answer) = dialogue.ask(question).await? else {
            return Err(Refusal::bad_parameter("missing parameter TPMSolution"));
        };
        expected.check(&answer.solution).map_err(refuse)?;
        endorsement
            .allowed_by(section.get("allow"))
            .map_err(|near| {
                seen.near = Some(near);
                Refusal::denied("validated tpm attributes did not match any allow rules")
            })
    }
}

fn read_rule(rule: &mut Fields<'_>) -> Value {
    let mut stored = json!({});
    for key in ["description", "ek_public_hash", "ek_certificate_serial"] {
        if let Some(text) = rule.string(key).filter(|text| !text.is_empty()) {
            set(&mut stored, key, text);
        }
    }
    if stored.get("ek_public_hash").is_none() && stored.get("ek_certificate_serial").is_none() {
        rule.error_here(
            "a rule needs `ek_public_hash` or `ek_certificate_serial`",
            "take what `tbot tpm identify` prints on the machine that joins",
        );
    }
    stored
}

/// What upstream shows in the audit log and passes on to workload identities.
fn note(seen: &mut Seen, endorsement: &Endorsement) {
    let mut attributes = json!({"ek_pub_hash": endorsement.hash()});
    let serial = endorsement.serial();
    if !serial.is_empty() {
        set(&mut attributes, "ek_cert_serial", serial);
    }
    set(&mut attributes, "ek_cert_verified", endorsement.verified);
    seen.attributes = attributes.as_object().cloned();
    seen.metadata = attributes;
}
