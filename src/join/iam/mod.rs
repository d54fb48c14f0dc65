//! Join method `iam`: the cluster's challenge, signed into an AWS `GetCallerIdentity` request that
//! only the holder of the machine's AWS identity can make (upstream `lib/auth/join/iam`).

mod sign;
pub mod verify;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::ProvideCredentials as _;

pub(crate) use self::sign::domain;
use self::sign::{Endpoint, Fips};
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings};
use crate::env::Env;
use crate::pb::teleport::join::v1::{
    ClientParams, IamChallenge, IamChallengeSolution, IamInit, challenge, challenge_solution,
    join_request,
};
use crate::yaml::Fields;

/// The region of the request where the machine names none. Right in the commercial partition only.
const FALLBACK_REGION: &str = "us-east-1";
/// The longest that finding credentials may take. The sources bound themselves, but for a
/// `credential_process`, and several of them slow one after the other would take minutes.
const PATIENCE: Duration = Duration::from_secs(30);
/// Keeps the FIPS endpoint off although FIPS is asked for (upstream `lib/utils/aws`).
const DISABLE_FIPS: &str = "TELEPORT_UNSTABLE_DISABLE_AWS_FIPS";

/// Join method `iam`.
#[derive(Debug, Clone, Copy)]
pub struct Iam;

impl JoinMethod for Iam {
    fn name(&self) -> &'static str {
        "iam"
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Self)
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names an iam token, that one of its allow rules has this \
         machine's AWS account and role ARN as `aws sts get-caller-identity` prints them, and that \
         the clock is right)"
    }
}

#[async_trait]
impl Prover for Iam {
    fn method(&self) -> &'static dyn JoinMethod {
        &Self
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let (credentials, endpoint) = in_time(Box::pin(aws_identity(around.env))).await?;
        Ok(Box::new(Signer {
            credentials,
            endpoint,
            signed: false,
        }))
    }
}

/// An AWS identity that signs the cluster's challenge.
#[derive(Debug)]
struct Signer {
    credentials: Credentials,
    endpoint: Endpoint,
    /// One join is worth one signature.
    signed: bool,
}

#[async_trait]
impl Proof for Signer {
    fn opening(&self, client_params: ClientParams) -> join_request::Payload {
        join_request::Payload::IamInit(IamInit {
            client_params: Some(client_params),
        })
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        let challenge::Payload::IamChallenge(IamChallenge { challenge }) = challenge else {
            return Ok(None);
        };
        // Signing nothing would make a request that anybody could use again.
        if challenge.is_empty() || self.signed {
            return Ok(None);
        }
        self.signed = true;
        let sts_identity_request =
            sign::identity_request(&self.credentials, &self.endpoint, &challenge, now)?;
        Ok(Some(challenge_solution::Payload::IamChallengeSolution(
            IamChallengeSolution {
                sts_identity_request,
            },
        )))
    }
}

async fn in_time<T>(work: impl Future<Output = Result<T, JoinError>>) -> Result<T, JoinError> {
    tokio::time::timeout(PATIENCE, work)
        .await
        .unwrap_or_else(|_elapsed| {
            Err(proof(&format!(
                "no AWS credentials within {} s: does a credential_process not end, or does the instance metadata or container endpoint not answer?",
                PATIENCE.as_secs()
            )))
        })
}

/// Credentials by AWS's standard chain (environment, profile, SSO, process, web identity, container
/// endpoint, instance metadata), and where AWS is asked about them.
async fn aws_identity(env: &Env) -> Result<(Credentials, Endpoint), JoinError> {
    let config = aws_config::load_defaults(BehaviorVersion::latest()).await;
    let endpoint = endpoint_of(&config, env);
    let provider = config
        .credentials_provider()
        .ok_or_else(|| proof("the AWS SDK offers no credential chain"))?;
    let credentials = provider.provide_credentials().await.map_err(|source| {
        // The layers above the root cause only say that something failed.
        let mut root: &dyn std::error::Error = &source;
        while let Some(next) = root.source() {
            root = next;
        }
        let cause = root.to_string();
        proof(&format!(
            "no AWS credentials: {}. Attach an IAM role to this machine, or set a profile or \
             AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; the role needs sts:GetCallerIdentity",
            without_stderr(&cause)
        ))
    })?;
    Ok((credentials, endpoint))
}

/// The endpoint of the configured region. `AWS_USE_FIPS_ENDPOINT` and the profile's
/// `use_fips_endpoint` are in `config`.
fn endpoint_of(config: &SdkConfig, env: &Env) -> Endpoint {
    let region = config.region().map_or_else(
        || {
            tracing::info!(
                region = FALLBACK_REGION,
                "No AWS region is configured (AWS_REGION, profile, instance metadata): using the default"
            );
            FALLBACK_REGION
        },
        Region::as_ref,
    );
    let disabled = matches!(
        env.get(DISABLE_FIPS),
        Some("yes" | "1" | "t" | "T" | "true" | "TRUE" | "True")
    );
    let fips = match config.use_fips() {
        Some(true) if disabled => Fips::RegionOnly,
        Some(true) => Fips::On,
        Some(false) | None => Fips::Off,
    };
    Endpoint::new(region, fips)
}

/// The SDK's text without what a `credential_process` wrote to standard error: it may hold secrets.
/// (The log leaves out the SDK's own lines about it.)
fn without_stderr(cause: &str) -> &str {
    cause
        .split_once(" Stderr: ")
        .map_or(cause, |(before, _)| before)
        .trim_end_matches('.')
}

fn proof(problem: &str) -> JoinError {
    JoinError::Proof {
        method: "iam",
        problem: problem.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_source_of_credentials_that_hangs_is_given_up() {
        let began = tokio::time::Instant::now();
        let error = in_time(std::future::pending::<Result<(), _>>())
            .await
            .unwrap_err();
        assert_eq!(began.elapsed(), PATIENCE);
        assert!(error.to_string().contains("credential_process"), "{error}");
    }

    #[test]
    fn the_region_and_the_wish_for_fips_are_the_sdks() {
        let none = Env::default();
        let disabled: Env = [(DISABLE_FIPS, "yes")].into_iter().collect();
        for (region, fips, env, host) in [
            (None, None, &none, "sts.us-east-1.amazonaws.com"),
            (
                Some("eu-west-1"),
                None,
                &none,
                "sts.eu-west-1.amazonaws.com",
            ),
            (
                Some("us-west-2"),
                Some(true),
                &none,
                "sts-fips.us-west-2.amazonaws.com",
            ),
            (
                Some("us-west-2"),
                Some(false),
                &none,
                "sts.us-west-2.amazonaws.com",
            ),
            (
                Some("us-west-2"),
                Some(true),
                &disabled,
                "sts.us-west-2.amazonaws.com",
            ),
            (
                Some("eu-west-1"),
                Some(true),
                &disabled,
                "sts.us-east-1.amazonaws.com",
            ),
        ] {
            let config = SdkConfig::builder()
                .region(region.map(Region::new))
                .use_fips(fips.unwrap_or(false))
                .build();
            let found = endpoint_of(&config, env);
            assert_eq!(found.host(), host, "{region:?} {fips:?}");
        }
    }

    #[test]
    fn standard_error_of_a_process_is_left_out() {
        let text = "external process exited with code exit status: 3. Stderr: hunter2. Stderr: x";
        assert_eq!(
            without_stderr(text),
            "external process exited with code exit status: 3"
        );
        assert_eq!(
            without_stderr("the profile is broken"),
            "the profile is broken"
        );
    }
}
