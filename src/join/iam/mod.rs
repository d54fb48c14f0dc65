//! Join method `iam`: the cluster's challenge, signed into an AWS `GetCallerIdentity` request that
//! only the holder of the machine's AWS identity can make (upstream `lib/auth/join/iam`).

mod sign;
pub mod verify;

use async_trait::async_trait;
use aws_config::{BehaviorVersion, Region};
use aws_credential_types::Credentials;
use aws_credential_types::provider::ProvideCredentials as _;

use super::{JoinError, JoinMethod, Proof, Renewal};

/// The region of the request where the machine names none. Right in the commercial partition only.
const FALLBACK_REGION: &str = "us-east-1";

/// Join method `iam`.
#[derive(Debug)]
pub struct Iam;

#[async_trait]
impl JoinMethod for Iam {
    fn name(&self) -> &'static str {
        "iam"
    }

    fn renewal(&self) -> Renewal {
        Renewal::Rejoin
    }

    async fn prepare(&self) -> Result<Proof, JoinError> {
        let (credentials, region) = aws_identity().await?;
        Ok(Proof::Iam(Box::new(move |challenge, now| {
            sign::identity_request(&credentials, &region, challenge, now)
        })))
    }
}

/// Credentials and region by AWS's standard chain: environment, profile, SSO, process, web
/// identity, container endpoint, instance metadata.
async fn aws_identity() -> Result<(Credentials, String), JoinError> {
    let config = Box::pin(aws_config::load_defaults(BehaviorVersion::latest())).await;
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
    let provider = config
        .credentials_provider()
        .ok_or_else(|| proof("the AWS SDK offers no credential chain"))?;
    let credentials = Box::pin(provider.provide_credentials())
        .await
        .map_err(|source| {
            let cause = std::error::Error::source(&source)
                .map_or_else(|| source.to_string(), ToString::to_string);
            proof(&format!(
                "no AWS credentials: {cause}. Attach an IAM role to this machine, or set a profile or \
                 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; the role needs sts:GetCallerIdentity"
            ))
        })?;
    Ok((credentials, region.to_owned()))
}

fn proof(problem: &str) -> JoinError {
    JoinError::Proof {
        method: "iam",
        problem: problem.to_owned(),
    }
}
