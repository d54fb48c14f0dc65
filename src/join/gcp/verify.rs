//! The verifying half of join method `gcp` (upstream `lib/join/gcp`; claims: Google, "Verify VM
//! identity").

use async_trait::async_trait;
use serde_json::{Map, Value, json};

use crate::join::verify::oidc::issuers::Issuer;
use crate::join::verify::oidc::{Claims, Expected, Source, claims};
use crate::join::verify::{
    Carrier, Dialogue, Joining, Seen, Verifier, admitted, rules, section, set,
};
use crate::refusal::Refusal;
use crate::yaml::Fields;

const ISSUER: &str = "https://accounts.google.com";
const AUDIENCE: &str = "teleport.cluster.local";
/// The domain of service accounts that users made; the project stands before it.
const MANAGED: &str = ".iam.gserviceaccount.com";
/// The domain of the accounts that every machine of a project shares.
const DEFAULT: &str = "@developer.gserviceaccount.com";
const NO_RULE: &str = "id token claims did not match any allow rules";

/// Join method `gcp`.
#[derive(Debug)]
pub struct Gcp;

#[async_trait]
impl Verifier for Gcp {
    fn name(&self) -> &'static str {
        "gcp"
    }

    fn carrier(&self) -> Carrier {
        Carrier::IdToken
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        let missing = (
            "`gcp` is required for the join method `gcp`",
            "add `gcp: {allow: [{project_ids: [ID]}]}`",
        );
        section(self.name(), missing, spec, stored, |section| {
            let missing = (
                "the \"gcp\" join method requires at least one token allow rule",
                "add `- project_ids: [ID]`",
            );
            json!({"allow": rules(section, missing, read_rule)})
        });
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        _dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let expected = Expected {
            issuer: Some(ISSUER),
            audience: AUDIENCE,
            // Google puts the subject there.
            authorized_party: false,
        };
        let source = Source::Discovery(Issuer::web(ISSUER));
        let claims = claims(joining, &source, &expected).await?;
        let account = Account::of(&claims)?;
        let attributes = account.attributes();
        seen.metadata = Value::Object(attributes.clone());
        seen.attributes = Some(attributes);
        account.admitted(joining.spec.pointer("/gcp/allow")).map_err(|near| {
            let text = if account.zone.is_empty() && near.contains("locations") {
                    format!(
                        "{NO_RULE}: the token names no zone, so a rule with locations cannot match; \
                         leave them out for what does not run on a GCE virtual machine"
                    )
                } else {
                    NO_RULE.to_owned()
                };
            seen.near = Some(near);
            Refusal::denied(text)
        })
    }
}

fn read_rule(rule: &mut Fields<'_>) -> Value {
    let mut stored = json!({});
    for key in ["project_ids", "locations", "service_accounts"] {
        if let Some(list) = rule.strings(key).filter(|list| !list.is_empty()) {
            set(&mut stored, key, list);
        }
    }
    if stored.get("project_ids").is_none() {
        let message =
            "the \"gcp\" join method requires gcp allow rules with at least one project ID";
        rule.error(
            "project_ids",
            message,
            Some("write `project_ids: [my-project]`"),
        );
    }
    for location in texts(&stored, "locations") {
        if !matches!(location.split('-').count(), 2 | 3) {
            let message = format!("{location:?} is no region or zone");
            rule.error(
                "locations",
                message,
                Some("write it as in `us-west1` or `us-west1-b`"),
            );
        }
    }
    stored
}

/// Whom a token is of.
#[derive(Debug, PartialEq, Eq)]
struct Account<'a> {
    email: &'a str,
    project: &'a str,
    /// Empty outside of virtual machines; so are the others.
    zone: &'a str,
    id: &'a str,
    name: &'a str,
}

impl<'a> Account<'a> {
    fn of(claims: &'a Claims) -> Result<Self, Refusal> {
        let machine = claims
            .get("google")
            .and_then(|google| google.get("compute_engine"));
        let text = |name: &str| {
            let text = machine.and_then(|machine| machine.get(name));
            text.and_then(Value::as_str).unwrap_or_default()
        };
        let email = claims
            .get("email")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let mut account = Self {
            email,
            project: text("project_id"),
            zone: text("zone"),
            id: text("instance_id"),
            name: text("instance_name"),
        };
        let is_machine = [account.project, account.zone, account.id, account.name]
            .iter()
            .any(|text| !text.is_empty());
        if is_machine {
            return Ok(account);
        }
        // A pod, for example: only its service account says whose it is.
        if email.ends_with(DEFAULT) {
            return Err(Refusal::bad_parameter(format!(
                "default compute engine service account {email:?} is not supported"
            )));
        }
        let project = email.split_once('@').and_then(|(user, domain)| {
            let project = domain.strip_suffix(MANAGED)?;
            let well = !user.is_empty() && !project.is_empty() && !project.contains(['.', '@']);
            well.then_some(project)
        });
        account.project = project
            .ok_or_else(|| Refusal::bad_parameter(format!("invalid email claim: {email:?}")))?;
        Ok(account)
    }

    fn attributes(&self) -> Map<String, Value> {
        let mut attributes = json!({"service_account": self.email});
        if !self.name.is_empty() {
            let machine = json!({
                "project": self.project, "zone": self.zone, "id": self.id, "name": self.name,
            });
            set(&mut attributes, "gce", machine);
        }
        attributes.as_object().cloned().unwrap_or_default()
    }

    /// Whether a rule lets it in; otherwise what each differs in.
    fn admitted(&self, allow: Option<&Value>) -> Result<(), String> {
        admitted(allow, |rule| self.differs(rule))
    }

    fn differs(&self, rule: &Value) -> Vec<&'static str> {
        let any = |key, is: &dyn Fn(&str) -> bool| texts(rule, key).into_iter().any(is);
        let unset = |key: &str| rule.get(key).is_none();
        [
            ("project_ids", any("project_ids", &|it| it == self.project)),
            (
                "service_accounts",
                unset("service_accounts") || any("service_accounts", &|it| it == self.email),
            ),
            (
                "locations",
                unset("locations") || any("locations", &|it| is_in(self.zone, it)),
            ),
        ]
        .into_iter()
        .filter(|(_, met)| !met)
        .map(|(key, _)| key)
        .collect()
    }
}

/// Whether a zone (`us-west1-b`) is in a location, which is a zone or a region (`us-west1`).
fn is_in(zone: &str, location: &str) -> bool {
    if zone.split('-').count() != 3 {
        return false;
    }
    let region = zone.rsplit_once('-').map_or("", |(region, _)| region);
    location == zone || location == region
}

fn texts<'a>(rule: &'a Value, key: &str) -> Vec<&'a str> {
    let list = rule.get(key).and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claims(value: Value) -> Claims {
        value.as_object().unwrap().clone()
    }

    fn machine() -> Claims {
        claims(json!({
            "email": "me@p.iam.gserviceaccount.com",
            "google": {"compute_engine": {
                "project_id": "p", "zone": "us-west1-b", "instance_id": "1", "instance_name": "vm",
            }},
        }))
    }

    #[test]
    fn machines_and_pods_say_whose_they_are() {
        let machine = machine();
        let account = Account::of(&machine).unwrap();
        assert_eq!(
            Value::Object(account.attributes()),
            json!({
                "service_account": "me@p.iam.gserviceaccount.com",
                "gce": {"project": "p", "zone": "us-west1-b", "id": "1", "name": "vm"},
            })
        );
        let pod = claims(json!({"email": "me@q.iam.gserviceaccount.com"}));
        let account = Account::of(&pod).unwrap();
        assert_eq!(account.project, "q");
        assert_eq!(
            Value::Object(account.attributes()),
            json!({"service_account": "me@q.iam.gserviceaccount.com"})
        );
        for bad in [
            "",
            "me@example.org",
            "123-compute@developer.gserviceaccount.com",
            "@q.iam.gserviceaccount.com",
            "me@.iam.gserviceaccount.com",
            "me@evil.q.iam.gserviceaccount.com",
            "me@evil@q.iam.gserviceaccount.com",
            "me@q.iam.gserviceaccount.com.example.org",
        ] {
            assert!(
                Account::of(&claims(json!({"email": bad}))).is_err(),
                "{bad}"
            );
        }
        assert!(Account::of(&claims(json!({"email": 7}))).is_err());
    }

    #[test]
    fn every_key_of_a_rule_has_to_match() {
        let machine = machine();
        let account = Account::of(&machine).unwrap();
        let near = |rule: Value| account.admitted(Some(&json!([rule]))).err();
        for good in [
            json!({"project_ids": ["o", "p"]}),
            json!({"project_ids": ["p"], "locations": ["us-west1"]}),
            json!({"project_ids": ["p"], "locations": ["eu-west1", "us-west1-b"]}),
            json!({"project_ids": ["p"], "service_accounts": ["me@p.iam.gserviceaccount.com"]}),
        ] {
            assert_eq!(near(good.clone()), None, "{good}");
        }
        for (bad, differs) in [
            (json!({"project_ids": ["o"]}), "project_ids"),
            (json!({"locations": ["us-west1"]}), "project_ids"),
            (
                json!({"project_ids": ["p"], "locations": ["us-west2"]}),
                "locations",
            ),
            (
                json!({"project_ids": ["p"], "locations": ["us-west1-a"]}),
                "locations",
            ),
            (
                json!({"project_ids": ["p"], "locations": ["us"]}),
                "locations",
            ),
            (
                json!({"project_ids": ["p"], "service_accounts": ["other"]}),
                "service_accounts",
            ),
            (json!({}), "project_ids"),
            (json!(7), "project_ids"),
        ] {
            assert_eq!(
                near(bad.clone()),
                Some(format!("rule 1 differs in {differs}")),
                "{bad}"
            );
        }
        assert!(account.admitted(None).is_err());
        assert!(!is_in("", "us-west1") && !is_in("us-west1", "us-west1"));
    }
}
