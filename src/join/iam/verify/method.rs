//! The method as a cluster's registry knows it: rules of a token, and the order of the proof.

use async_trait::async_trait;
use serde_json::{Value, json};

use super::sts;
use super::{AwsIdentity, IamError, StsRequest};
use crate::join::verify::{Carrier, Dialogue, Joining, Seen, Verifier, set};
use crate::pb::teleport::join::v1::{IamChallenge, challenge, challenge_solution};
use crate::refusal::Refusal;
use crate::yaml::Fields;

/// Join method `iam`.
#[derive(Debug)]
pub struct Iam;

#[async_trait]
impl Verifier for Iam {
    fn name(&self) -> &'static str {
        "iam"
    }

    fn carrier(&self) -> Carrier {
        Carrier::Iam
    }

    fn read(&self, spec: &mut Fields<'_>, stored: &mut Value) {
        let rules: Vec<Value> = spec
            .sections("allow")
            .unwrap_or_default()
            .into_iter()
            .map(|mut rule| {
                let stored = read_rule(&mut rule);
                rule.finish();
                stored
            })
            .collect();
        if rules.is_empty() {
            if !spec.has("integration") {
                spec.error(
                    "allow",
                    "`allow` must have at least one rule for the join method `iam`",
                    Some("add `- aws_account: \"111111111111\"`"),
                );
            }
        } else {
            set(stored, "allow", rules);
        }
    }

    async fn verify(
        &self,
        joining: &Joining<'_>,
        dialogue: &mut dyn Dialogue,
        seen: &mut Seen,
    ) -> Result<(), Refusal> {
        let refuse = |error: IamError| refusal(&error, joining.token);
        let question = challenge::Payload::IamChallenge(IamChallenge {
            challenge: joining.challenge.to_owned(),
        });
        let signed = match dialogue.ask(question).await? {
            challenge_solution::Payload::IamChallengeSolution(solution)
                if !solution.sts_identity_request.is_empty() =>
            {
                solution.sts_identity_request
            }
            _ => {
                return Err(Refusal::bad_parameter(
                    "missing parameter StsIdentityRequest",
                ));
            }
        };
        let request = StsRequest::parse(&signed, joining.challenge, joining.now).map_err(refuse)?;
        let answer = sts::send(joining.world, &request).await.map_err(|error| {
            Refusal::unavailable(error.to_string())
                .context("executing STS request")
                .context("checking iam request")
        })?;
        let identity =
            AwsIdentity::read(&answer.status, answer.ok, &answer.body).map_err(refuse)?;
        let (account, arn) = (&identity.account, &identity.arn);
        seen.metadata = json!({"Account": account, "Arn": arn});
        seen.attributes = json!({"account": account, "arn": arn}).as_object().cloned();
        identity
            .check(joining.spec.get("allow").unwrap_or(&Value::Null))
            .map_err(refuse)
    }
}

fn read_rule(rule: &mut Fields<'_>) -> Value {
    let mut stored = json!({});
    for key in ["aws_account", "aws_arn"] {
        if let Some(text) = rule.string(key) {
            set(&mut stored, key, text);
        }
    }
    for key in ["aws_role", "aws_regions"] {
        if rule.has(key) {
            rule.ignore(key);
            rule.error(
                key,
                format!("`{key}` belongs to the join method `ec2`"),
                Some("remove it; `aws_arn` limits the role"),
            );
        }
    }
    for key in ["aws_organization_id", "aws_organizational_units"] {
        if rule.has(key) {
            rule.ignore(key);
            rule.error(
                key,
                "rules on AWS organizations are not supported by this cluster",
                Some("use `aws_account` and `aws_arn`"),
            );
        }
    }
    let text = |key| stored.get(key).and_then(Value::as_str);
    let account = text("aws_account");
    if let Some(account) = account
        && (account.len() != 12 || !account.bytes().all(|b| b.is_ascii_digit()))
    {
        rule.error(
            "aws_account",
            format!("{account:?} is no AWS account: it has to be 12 digits"),
            Some("quote it, a leading 0 counts"),
        );
    }
    if account.is_none() && text("aws_arn").is_none() {
        rule.error_here(
            "a rule needs `aws_account` or `aws_arn`",
            "without one it would let in every AWS account",
        );
    }
    stored
}

/// The status of a failed proof, with the contexts of an 18.0 cluster.
fn refusal(error: &IamError, token: &str) -> Refusal {
    let text = match error {
        IamError::NoRule(_) => format!("{error} in token {token}"),
        _ => error.to_string(),
    };
    let (refusal, doing) = match error {
        IamError::NoRule(_) => (Refusal::denied(text), "checking allow rules"),
        IamError::Refused { .. } => (Refusal::denied(text), "executing STS request"),
        IamError::Empty => (Refusal::bad_parameter(text), "executing STS request"),
        IamError::Answer => (Refusal::unknown(text), "executing STS request"),
        IamError::Malformed(_) => (Refusal::unknown(text), "parsing STS request"),
        IamError::Authorization(_) | IamError::Body => {
            (Refusal::bad_parameter(text), "validating STS request")
        }
        IamError::Target(_)
        | IamError::Method(_)
        | IamError::Host(_)
        | IamError::Challenge
        | IamError::Unsigned
        | IamError::Header(_)
        | IamError::Skew { .. } => (Refusal::denied(text), "validating STS request"),
    };
    refusal.context(doing).context("checking iam request")
}
