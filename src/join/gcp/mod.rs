//! Join method `gcp`: the ID token that Google's metadata service gives to a machine or a pod (upstream
//! `lib/join/gcp`; Google, "Verify VM identity").

pub mod verify;

use std::sync::Arc;

use async_trait::async_trait;

use super::id_token::{AUDIENCE, IdToken};
use super::metadata::{Metadata, MetadataError, failed};
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings};
use crate::env::Env;
use crate::query::encoded;
use crate::secret::Secret;
use crate::yaml::Fields;

const NAME: &str = "gcp";
const CLOUD: &str = "Google Cloud, on a machine or pod with a service account";
/// Names another metadata service, as for every client of Google's: `HOST[:PORT]`.
const HOST_VARIABLE: &str = "GCE_METADATA_HOST";
const HOST: &str = "metadata.google.internal";

/// Join method `gcp`.
#[derive(Debug, Clone, Copy)]
pub struct Gcp;

impl JoinMethod for Gcp {
    fn name(&self) -> &'static str {
        NAME
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Self)
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a gcp token, that one of its allow rules has this machine's \
         project, zone or region, and service account as `gcloud compute instances describe` prints \
         them, and that the cluster can reach accounts.google.com)"
    }
}

#[async_trait]
impl Prover for Gcp {
    fn method(&self) -> &'static dyn JoinMethod {
        &Self
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let token = ask(around.env)
            .await
            .map_err(|error| failed(NAME, &error, CLOUD))?;
        Ok(IdToken::proof(NAME, Secret::new(token), around.clock.now()))
    }
}

async fn ask(env: &Env) -> Result<String, MetadataError> {
    let host = env.get(HOST_VARIABLE).unwrap_or(HOST);
    let service = Metadata::at(&format!("http://{host}"), ("Metadata-Flavor", "Google"))?;
    let path = format!(
        "/computeMetadata/v1/instance/service-accounts/default/identity?audience={}&format=full&licenses=FALSE",
        encoded(AUDIENCE)
    );
    let token = service.text(&path).await?;
    if token.is_empty() {
        return Err(service.not_as_documented(&path, "it is empty"));
    }
    Ok(token)
}
