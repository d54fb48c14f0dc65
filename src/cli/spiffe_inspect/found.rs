//! What was found, and how it reads.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::SystemTime;

use serde_json::{Value, json};

use super::attributes::flat;
use crate::clock::rfc3339;
use crate::crypto::x509::Certificate;
use crate::pb::tbot::inspect::v1::ExplainResponse;
use crate::yaml::duration;

/// By trust domain.
pub(super) type Bundles = BTreeMap<String, Bundle>;
/// Key IDs by trust domain.
pub(super) type KeyIds = BTreeMap<String, Vec<String>>;

#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) svids: Vec<X509Svid>,
    /// By trust domain.
    pub(super) bundles: Bundles,
    /// Revocation lists that came with the SVIDs.
    pub(super) revocations: usize,
    /// `None` if the endpoint serves no JWTs.
    pub(super) jwt: Option<Jwt>,
    /// Why something is missing that every endpoint has to give.
    pub(super) failures: Vec<anyhow::Error>,
    pub(super) attestation: Attestation,
}

#[derive(Debug)]
pub(super) struct X509Svid {
    pub(super) id: String,
    pub(super) hint: String,
    pub(super) leaf: Certificate,
}

#[derive(Debug, Default)]
pub(super) struct Bundle {
    pub(super) authorities: usize,
    /// When the first of its authorities expires.
    pub(super) expires: Option<SystemTime>,
    /// Whether it is another trust domain's.
    pub(super) federated: bool,
}

#[derive(Debug, Default)]
pub(super) struct Jwt {
    pub(super) svids: Vec<JwtSvid>,
    pub(super) bundles: KeyIds,
}

#[derive(Debug)]
pub(super) struct JwtSvid {
    pub(super) id: String,
    pub(super) hint: String,
    pub(super) length: usize,
    pub(super) expires: Option<SystemTime>,
    pub(super) audiences: Vec<String>,
    pub(super) invalid: Option<String>,
}

/// What the agent says that it sees of this process.
#[derive(Debug, Default)]
pub(super) enum Attestation {
    /// The endpoint has no such call.
    #[default]
    Unknown,
    /// It tells this user nothing, and why.
    Withheld(String),
    Told(ExplainResponse),
}

impl Found {
    /// What a call gave; why it gave nothing is noted.
    pub(super) fn of<T>(&mut self, answer: anyhow::Result<T>) -> Option<T> {
        answer.map_err(|failure| self.failures.push(failure)).ok()
    }

    /// What a workload would miss, and why.
    pub(super) fn problems(&self, now: SystemTime) -> Vec<String> {
        let expired = self
            .svids
            .iter()
            .filter(|svid| svid.leaf.not_after() <= now)
            .map(|svid| format!("the X.509-SVID {} has expired", svid.id));
        let bundles = self
            .bundles
            .iter()
            .filter(|(_, bundle)| bundle.authorities == 0)
            .map(|(domain, _)| format!("the trust bundle of {domain} is empty"));
        let jwt = self.jwt.iter().flat_map(|jwt| {
            let invalid = jwt.svids.iter().filter_map(|svid| {
                let problem = svid.invalid.as_ref()?;
                Some(format!("the JWT-SVID {} is not valid: {problem}", svid.id))
            });
            // Where calls failed, that says why.
            let answered = self.failures.is_empty();
            let none =
                (answered && jwt.svids.is_empty()).then(|| "there is no JWT-SVID".to_owned());
            let keys =
                (answered && jwt.bundles.is_empty()).then(|| "there is no JWT bundle".to_owned());
            invalid.chain(none).chain(keys)
        });
        let rest = expired.chain(bundles).chain(jwt);
        self.reasons().into_iter().chain(rest).collect()
    }

    /// The failures; calls that failed for the same reason are told together.
    fn reasons(&self) -> Vec<String> {
        let mut reasons: Vec<(String, String)> = Vec::new();
        for failure in &self.failures {
            let text = format!("{failure:#}");
            let (call, why) = text.split_once(": ").unwrap_or(("", &text));
            match reasons.iter_mut().find(|(_, known)| known == why) {
                Some((calls, _)) => *calls = format!("{calls}, {call}"),
                None => reasons.push((call.to_owned(), why.to_owned())),
            }
        }
        let told = reasons
            .into_iter()
            .map(|(calls, why)| format!("{calls}: {why}"));
        told.collect()
    }

    /// The report as text, the way upstream prints it; more where something is missing.
    pub(super) fn text(&self, now: SystemTime) -> String {
        let mut out = String::new();
        self.write(&mut out, now)
            .map_or_else(|_| String::new(), |()| out)
    }

    fn write(&self, out: &mut String, now: SystemTime) -> std::fmt::Result {
        writeln!(out, "# X509 SVIDs")?;
        if self.svids.is_empty() {
            writeln!(out, "No X509 SVIDs received, check your configuration")?;
        }
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
        if self.bundles.is_empty() {
            writeln!(
                out,
                "No X509 trust bundles received, check your configuration"
            )?;
        }
        for (domain, bundle) in &self.bundles {
            writeln!(out, "- {domain} (#CAs: {})", bundle.authorities)?;
            if let Some(expires) = bundle.expires {
                writeln!(out, "  - Next CA Expiry: {}", expiry(expires, now))?;
            }
            if bundle.federated {
                writeln!(out, "  - Federated: yes")?;
            }
        }
        if self.revocations > 0 {
            writeln!(
                out,
                "# X509 Revocation Lists\n- #CRLs: {}",
                self.revocations
            )?;
        }
        match &self.jwt {
            Some(jwt) => jwt.write(out, now)?,
            None if !self.failures.is_empty() => {}
            None => writeln!(
                out,
                "# JWT SVIDs\nThis endpoint serves no JWT SVIDs and JWT bundles"
            )?,
        }
        if !self.problems(now).is_empty() {
            self.attestation.write(out)?;
        }
        Ok(())
    }

    /// The report as JSON.
    pub(super) fn json(&self, endpoint: &str, now: SystemTime) -> Value {
        let problems = self.problems(now);
        let svids = self.svids.iter().map(|svid| {
            json!({
                "spiffe_id": svid.id,
                "hint": svid.hint,
                "expires": rfc3339(svid.leaf.not_after()),
                "dns_sans": svid.leaf.dns_sans(),
                "ip_sans": svid.leaf.ip_sans().iter().map(ToString::to_string).collect::<Vec<_>>(),
            })
        });
        let bundles = self.bundles.iter().map(|(domain, bundle)| {
            json!({
                "trust_domain": domain,
                "authorities": bundle.authorities,
                "next_expiry": bundle.expires.map(rfc3339),
                "federated": bundle.federated,
            })
        });
        json!({
            "endpoint": endpoint,
            "ok": problems.is_empty(),
            "problems": problems,
            "x509_svids": svids.collect::<Vec<_>>(),
            "x509_bundles": bundles.collect::<Vec<_>>(),
            "revocation_lists": self.revocations,
            "jwt_svids": self.jwt.as_ref().map(Jwt::svids_json),
            "jwt_bundles": self.jwt.as_ref().map(|jwt| &jwt.bundles),
            "attestation": self.attestation.json(),
        })
    }
}

impl Attestation {
    fn write(&self, out: &mut String) -> std::fmt::Result {
        match self {
            Self::Unknown => Ok(()),
            Self::Withheld(why) => writeln!(out, "# Attestation\nNot told: {why}"),
            Self::Told(told) => {
                writeln!(out, "# Attestation")?;
                for finding in &told.findings {
                    if finding.failure.is_empty() {
                        writeln!(out, "- {}", finding.attestor)?;
                    } else {
                        writeln!(out, "- {}: FAIL - {}", finding.attestor, finding.failure)?;
                    }
                    for (name, value) in finding.attributes.iter().flat_map(flat) {
                        writeln!(out, "  - {name}: {value}")?;
                    }
                }
                writeln!(out, "# Issuing")?;
                writeln!(out, "- Selector: {}", told.selector)?;
                if !told.refusal.is_empty() {
                    writeln!(out, "- Refusal: {}", told.refusal)?;
                }
                Ok(())
            }
        }
    }

    fn json(&self) -> Value {
        match self {
            Self::Unknown => Value::Null,
            Self::Withheld(why) => json!({ "withheld": why }),
            Self::Told(told) => {
                let attestors = told.findings.iter().map(|finding| {
                    let attributes = finding.attributes.iter().flat_map(flat);
                    json!({
                        "name": finding.attestor,
                        "attributes": attributes.collect::<BTreeMap<_, _>>(),
                        "failure": Some(&finding.failure).filter(|text| !text.is_empty()),
                    })
                });
                json!({
                    "attestors": attestors.collect::<Vec<_>>(),
                    "selector": told.selector,
                    "refusal": Some(&told.refusal).filter(|text| !text.is_empty()),
                })
            }
        }
    }
}

impl Jwt {
    fn svids_json(&self) -> Vec<Value> {
        let svids = self.svids.iter().map(|svid| {
            json!({
                "spiffe_id": svid.id,
                "hint": svid.hint,
                "expires": svid.expires.map(rfc3339),
                "audiences": svid.audiences,
                "valid": svid.invalid.is_none(),
                "problem": svid.invalid,
            })
        });
        svids.collect()
    }

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
    use std::time::Duration;

    use super::*;
    use crate::pb::tbot::inspect::v1::Finding;
    use crate::pb::teleport::workloadidentity::v1::{WorkloadAttrs, WorkloadAttrsUnix};

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
        let report = found.text(SystemTime::UNIX_EPOCH);
        assert!(
            report.ends_with(
                "# JWT SVIDs\n- spiffe://td/a\n  - Audiences: [example.com]\n  - Hint: \n  \
             - Value: <masked, 812 characters>\n  - Validation: PASS\n\
             # JWT Bundles\n- td (#Keys: 1)\n  - Key ID: kid-1\n"
            ),
            "{report}"
        );
    }

    fn refused(attestation: Attestation) -> Found {
        Found {
            failures: vec![anyhow::anyhow!("FetchX509SVID: refused: no rule")],
            attestation,
            ..Found::default()
        }
    }

    #[test]
    fn what_the_attestors_saw_is_shown_where_something_is_missing() {
        let unix = WorkloadAttrsUnix {
            attested: true,
            pid: 7,
            uid: 1000,
            ..WorkloadAttrsUnix::default()
        };
        let found = refused(Attestation::Told(ExplainResponse {
            findings: vec![
                Finding {
                    attestor: "unix".into(),
                    attributes: Some(WorkloadAttrs {
                        unix: Some(unix),
                        ..WorkloadAttrs::default()
                    }),
                    failure: String::new(),
                },
                Finding {
                    attestor: "systemd".into(),
                    attributes: None,
                    failure: "no unit".into(),
                },
            ],
            refusal: "no rule".into(),
            selector: "name foo".into(),
        }));
        let text = found.text(SystemTime::UNIX_EPOCH);
        for line in [
            "  - workload.unix.pid: 7\n",
            "- systemd: FAIL - no unit\n",
            "- Selector: name foo\n- Refusal: no rule\n",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
        let json = found.json("unix:///x", SystemTime::UNIX_EPOCH);
        assert_eq!(json["ok"], false);
        assert_eq!(json["problems"][0], "FetchX509SVID: refused: no rule");
        let attestors = &json["attestation"]["attestors"];
        assert_eq!(attestors[0]["attributes"]["workload.unix.uid"], "1000");
        assert_eq!(attestors[1]["failure"], "no unit");
        let text = refused(Attestation::Withheld("not you".into())).text(SystemTime::UNIX_EPOCH);
        assert!(
            text.ends_with("# Attestation\nNot told: not you\n"),
            "{text}"
        );
    }

    #[test]
    fn a_token_that_does_not_validate_is_a_problem() {
        let mut svid = JwtSvid {
            id: "spiffe://td/a".into(),
            hint: String::new(),
            length: 1,
            expires: None,
            audiences: Vec::new(),
            invalid: None,
        };
        let found = |svid| Found {
            jwt: Some(Jwt {
                svids: vec![svid],
                bundles: [("td".to_owned(), Vec::new())].into(),
            }),
            ..Found::default()
        };
        let now = SystemTime::UNIX_EPOCH;
        svid.invalid = Some("it has expired".into());
        let problems = found(svid).problems(now);
        assert_eq!(
            problems,
            ["the JWT-SVID spiffe://td/a is not valid: it has expired"]
        );
        let nothing = Found {
            jwt: Some(Jwt::default()),
            ..Found::default()
        };
        assert_eq!(nothing.problems(now).len(), 2);
    }
}
