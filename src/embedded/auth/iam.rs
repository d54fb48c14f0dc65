//! The join method `iam`: AWS confirms who signed the challenge.

use serde_json::{Value, json};

use super::attempt::{Attempt, Proof};
use super::{Auth, Refusal, blocking};
use crate::join::iam::verify::{AwsIdentity, IamError, StsRequest};
use crate::pb::proto::Certs;

/// The status of a failed proof, with the contexts of an 18.0 cluster.
fn iam_refusal(error: &IamError, token: &str) -> Refusal {
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

/// Notes whom AWS confirmed, and checks that a rule of the token lets them in.
fn prove(attempt: &mut Attempt, identity: &AwsIdentity) -> Result<(), Refusal> {
    let (account, arn) = (&identity.account, &identity.arn);
    attempt.proof = Proof {
        metadata: json!({"Account": account, "Arn": arn}),
        attributes: Some(("iam", json!({"account": account, "arn": arn}))),
    };
    identity
        .check(attempt.allow().unwrap_or(&Value::Null))
        .map_err(|error| iam_refusal(&error, &attempt.request.token))
}

impl Auth {
    /// Joins with `sts_request`, a signed request that carries `challenge`.
    ///
    /// # Errors
    /// The refusal, as it was written into the audit log.
    pub(super) async fn by_iam(
        &self,
        attempt: Attempt,
        challenge: &str,
        sts_request: &[u8],
    ) -> Result<Certs, Refusal> {
        self.joins
            .run(self.by_iam_now(attempt, challenge, sts_request))
            .await
    }

    async fn by_iam_now(
        &self,
        mut attempt: Attempt,
        challenge: &str,
        sts_request: &[u8],
    ) -> Result<Certs, Refusal> {
        let (attempt, found) = blocking(move || {
            let found = attempt.look_up().and_then(|()| match attempt.method() {
                "iam" => Ok(()),
                _ => Err(Refusal::denied(
                    "this token does not support the IAM join method",
                )),
            });
            Ok::<_, Refusal>((attempt, found))
        })
        .await?;
        let confirmed = match found {
            Ok(()) => self.confirm(&attempt, challenge, sts_request).await,
            Err(refusal) => Err(refusal),
        };
        blocking(move || {
            let mut attempt = attempt;
            let certs = confirmed.and_then(|identity| {
                prove(&mut attempt, &identity)?;
                attempt.issue()
            });
            attempt.finish(certs)
        })
        .await
    }

    /// Has AWS confirm who signed the request.
    async fn confirm(
        &self,
        attempt: &Attempt,
        challenge: &str,
        request: &[u8],
    ) -> Result<AwsIdentity, Refusal> {
        let token = &attempt.request.token;
        let refuse = |error: IamError| iam_refusal(&error, token);
        let request = StsRequest::parse(request, challenge, attempt.now()).map_err(refuse)?;
        let answer = self.sts.send(&request).await.map_err(|error| {
            Refusal::unavailable(error.to_string())
                .context("executing STS request")
                .context("checking iam request")
        })?;
        AwsIdentity::read(&answer.status, answer.ok, &answer.body).map_err(refuse)
    }
}
