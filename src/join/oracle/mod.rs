//! Join method `oracle`: the instance's own key, from the metadata service of Oracle's cloud, signs the
//! cluster's challenge (upstream `lib/join/joinclient/oracle`; signatures: Oracle, "Request Signatures").

mod federation;
pub mod verify;

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;

use super::metadata::{LINK_LOCAL, Metadata, MetadataError, failed};
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings};
use crate::crypto::PrivateKey;
use crate::env::Env;
use crate::pb::teleport::join::v1::{
    ClientParams, OracleChallenge, OracleChallengeSolution, OracleInit, challenge,
    challenge_solution, join_request,
};
use crate::yaml::Fields;

use self::verify::Region;

const NAME: &str = "oracle";
const CLOUD: &str = "an instance of Oracle Cloud Infrastructure";

/// Names another metadata service, as for the clients of Oracle's SDKs: a URL that ends in `/opc/v2`.
const BASE_VARIABLE: &str = "OCI_METADATA_BASE_URL";

/// Join method `oracle`.
#[derive(Debug, Clone, Copy)]
pub struct Oracle;

impl JoinMethod for Oracle {
    fn name(&self) -> &'static str {
        NAME
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Self)
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names an oracle token, that one of its allow rules has this \
         instance's tenancy, compartment and region as `oci-metadata` prints them, and that the cluster \
         can reach auth.<region>.oraclecloud.com)"
    }
}

#[async_trait]
impl Prover for Oracle {
    fn method(&self) -> &'static dyn JoinMethod {
        &Self
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let documents = Documents::fetch(around.env)
            .await
            .map_err(|error| failed(NAME, &error, CLOUD))?;
        let instance = Box::pin(documents.instance(around.clock.now())).await;
        Ok(Box::new(instance.map_err(|problem| proof(&problem))?))
    }
}

/// What the metadata service says of this instance.
struct Documents {
    region: String,
    certificate: String,
    intermediate: String,
    key: String,
}

impl Documents {
    async fn fetch(env: &Env) -> Result<Self, MetadataError> {
        let base = env.get(BASE_VARIABLE).unwrap_or(LINK_LOCAL);
        let base = base.trim_end_matches('/').trim_end_matches("/opc/v2");
        let service = Metadata::at(base, ("Authorization", "Bearer Oracle"))?;
        Ok(Self {
            region: service.text("/opc/v2/instance/region").await?,
            certificate: service.text("/opc/v2/identity/cert.pem").await?,
            intermediate: service.text("/opc/v2/identity/intermediate.pem").await?,
            key: service.text("/opc/v2/identity/key.pem").await?,
        })
    }

    async fn instance(self, now: SystemTime) -> Result<Instance, String> {
        let region = Region::of(&self.region).ok_or_else(|| {
            format!(
                "the metadata service names a region that is not known: {:?}",
                self.region
            )
        })?;
        let key = PrivateKey::from_pem(&self.key)
            .map_err(|error| format!("the instance's key cannot be used: {error}"))?;
        let identity = federation::Identity {
            region,
            certificate: &self.certificate,
            intermediate: &self.intermediate,
            key: &key,
        };
        let signed_root_ca_req = identity.question(now).await?;
        Ok(Instance {
            signed: false,
            key,
            certificate: self.certificate,
            intermediate: self.intermediate,
            signed_root_ca_req,
        })
    }
}

/// An instance that can prove itself.
#[derive(Debug)]
struct Instance {
    /// One join is worth one signature.
    signed: bool,
    key: PrivateKey,
    certificate: String,
    intermediate: String,
    signed_root_ca_req: Vec<u8>,
}

#[async_trait]
impl Proof for Instance {
    fn opening(&self, client_params: ClientParams) -> join_request::Payload {
        join_request::Payload::OracleInit(OracleInit {
            client_params: Some(client_params),
        })
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        _now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        let challenge::Payload::OracleChallenge(OracleChallenge { challenge }) = challenge else {
            return Ok(None);
        };
        if challenge.is_empty() || self.signed {
            return Ok(None);
        }
        self.signed = true;
        let signature = self
            .key
            .sign_rsa_pss(challenge.as_bytes())
            .map_err(|error| proof(&format!("cannot sign the challenge: {error}")))?;
        let solution = OracleChallengeSolution {
            cert: self.certificate.clone().into_bytes(),
            intermediate: self.intermediate.clone().into_bytes(),
            signature,
            signed_root_ca_req: self.signed_root_ca_req.clone(),
        };
        Ok(Some(challenge_solution::Payload::OracleChallengeSolution(
            solution,
        )))
    }
}

fn proof(problem: &str) -> JoinError {
    JoinError::Proof {
        method: NAME,
        problem: problem.to_owned(),
    }
}
