//! Join method `azure`: a document about the machine that Azure signed, and an access token of its
//! managed identity, both from the instance metadata service (upstream `lib/cloud/imds/azure`,
//! `lib/join/joinclient/join_azure.go`).

mod chain;
pub mod verify;

use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use http::StatusCode;

use super::metadata::{LINK_LOCAL, Metadata, MetadataError, failed};
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings};
use crate::pb::teleport::join::v1::{
    AzureChallenge, AzureChallengeSolution, AzureInit, ClientParams, challenge, challenge_solution,
    join_request,
};
use crate::query::encoded;
use crate::secret::Secret;
use crate::yaml::{Fields, Tree};

const NAME: &str = "azure";
const CLOUD: &str = "an Azure virtual machine";
/// Names another metadata service, as for the clients of Azure's SDKs: a URL.
const HOST_VARIABLE: &str = "AZURE_POD_IDENTITY_AUTHORITY_HOST";
/// What the access token is for.
const RESOURCE: &str = "https://management.azure.com/";
/// The oldest version of the service that attests (upstream's limit).
const OLDEST: &str = "2019-06-04";
/// The version that container instances and Kubernetes pods answer tokens by; they list none.
const TOKEN_VERSION: &str = "2018-02-01";

/// Join method `azure`.
#[derive(Debug, Clone, Copy)]
pub struct Azure;

impl JoinMethod for Azure {
    fn name(&self) -> &'static str {
        NAME
    }

    fn section(&self) -> Option<&'static str> {
        Some(NAME)
    }

    fn read(&self, section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Identity {
            client_id: section.and_then(|section| section.string("client_id")),
        })
    }

    fn with_parameter(&self, parameter: Secret<String>) -> Option<Arc<dyn Prover>> {
        Some(Arc::new(Identity {
            client_id: Some(parameter.expose().clone()),
        }))
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names an azure token, that one of its allow rules has this \
         machine's subscription and resource group as `az vm show` prints them, and, where the machine \
         has several managed identities, that onboarding.azure.client_id names the right one)"
    }
}

/// Which managed identity joins.
#[derive(Debug)]
struct Identity {
    /// The user-assigned one with this client ID; `None`: the machine's own or only one.
    client_id: Option<String>,
}

#[async_trait]
impl Prover for Identity {
    fn method(&self) -> &'static dyn JoinMethod {
        &Azure
    }

    fn tree(&self) -> Option<Tree> {
        let id = self.client_id.as_ref()?;
        Some(Tree::map([("client_id", Some(Tree::text(id)))]))
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let base = around.env.get(HOST_VARIABLE).unwrap_or(LINK_LOCAL);
        let service = Metadata::at(base.trim_end_matches('/'), ("Metadata", "True"));
        let proof = match service {
            Ok(service) => self.ask(service).await,
            Err(error) => Err(error),
        };
        let proof = proof.map_err(|error| failed(NAME, &error, CLOUD))?;
        Ok(Box::new(proof))
    }
}

impl Identity {
    async fn ask(&self, service: Metadata) -> Result<Machine, MetadataError> {
        let version = match newest(&service).await {
            Ok(version) => Some(version),
            // Container instances and pods have tokens but no versions and no attested document.
            Err(error) if error.is_answer() => {
                tracing::info!(%error, "No Azure metadata but perhaps an identity: joining with its token alone");
                None
            }
            Err(error) => return Err(error),
        };
        let mut path = format!(
            "/metadata/identity/oauth2/token?api-version={}&resource={}",
            encoded(version.as_deref().unwrap_or(TOKEN_VERSION)),
            encoded(RESOURCE),
        );
        if let Some(id) = &self.client_id {
            path.push_str(&format!("&client_id={}", encoded(id)));
        }
        let body = service.get(&path).await?;
        let access_token = access_token(&body)
            .ok_or_else(|| service.not_as_documented(&path, "it has no access_token"))?;
        Ok(Machine {
            answered: false,
            service,
            version,
            access_token,
        })
    }
}

/// The newest version that the service lists; they are dates, in order.
async fn newest(service: &Metadata) -> Result<String, MetadataError> {
    const PATH: &str = "/metadata/versions?format=json";
    let body = service.get(PATH).await?;
    match newest_of(&body) {
        Some(newest) if newest.as_str() >= OLDEST => Ok(newest),
        Some(_) => {
            Err(service.not_as_documented(PATH, "it attests only from version 2019-06-04 on"))
        }
        None => Err(service.not_as_documented(PATH, "it lists no versions")),
    }
}

/// The newest version of a list.
fn newest_of(body: &[u8]) -> Option<String> {
    let document: serde_json::Value = serde_json::from_slice(body).ok()?;
    let versions = document.get("apiVersions")?.as_array()?.iter();
    let newest = versions.filter_map(|version| version.as_str()).max();
    newest.map(str::to_owned)
}

/// The access token in an answer.
fn access_token(body: &[u8]) -> Option<Secret<String>> {
    let document: serde_json::Value = serde_json::from_slice(body).ok()?;
    let token = document.get("access_token")?.as_str()?;
    (!token.is_empty()).then(|| Secret::new(token.to_owned()))
}

/// A machine with an identity.
#[derive(Debug)]
struct Machine {
    /// One join is worth one document.
    answered: bool,
    service: Metadata,
    /// The version to ask by; `None` where nothing is attested.
    version: Option<String>,
    access_token: Secret<String>,
}

#[async_trait]
impl Proof for Machine {
    fn opening(&self, client_params: ClientParams) -> join_request::Payload {
        join_request::Payload::AzureInit(AzureInit {
            client_params: Some(client_params),
        })
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        _now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        let challenge::Payload::AzureChallenge(AzureChallenge { challenge }) = challenge else {
            return Ok(None);
        };
        // A document for no challenge would be one for any join.
        if challenge.is_empty() || self.answered {
            return Ok(None);
        }
        self.answered = true;
        let attested = self
            .attested(&challenge)
            .await
            .map_err(|error| failed(NAME, &error, CLOUD))?;
        let intermediate = if attested.is_empty() {
            Vec::new()
        } else {
            chain::of(&attested).await
        };
        let solution = AzureChallengeSolution {
            attested_data: attested.to_vec(),
            intermediate,
            access_token: self.access_token.expose().clone(),
        };
        Ok(Some(challenge_solution::Payload::AzureChallengeSolution(
            solution,
        )))
    }
}

impl Machine {
    /// What Azure attests of this machine and of the challenge; nothing where it attests nothing.
    async fn attested(&self, challenge: &str) -> Result<Bytes, MetadataError> {
        let Some(version) = &self.version else {
            return Ok(Bytes::new());
        };
        let path = format!(
            "/metadata/attested/document?api-version={}&format=json&nonce={}",
            encoded(version),
            encoded(challenge),
        );
        match self.service.get(&path).await {
            // Any other failure is one: it must not weaken the proof.
            Err(error @ MetadataError::Status { status, .. })
                if status == StatusCode::NOT_FOUND =>
            {
                tracing::info!(%error, "Azure attests nothing of this machine: joining with its token alone");
                Ok(Bytes::new())
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::join::tests::mutilated::{Edit, mutilated};

    #[test]
    fn fuzz_answers_of_metadata_services() {
        const VERSIONS: &[u8] = br#"{"apiVersions":["2018-02-01","2021-12-13","2017-03-01"]}"#;
        const TOKEN: &[u8] = br#"{"access_token":"t.o.k","expires_in":"86399"}"#;
        assert_eq!(newest_of(VERSIONS).as_deref(), Some("2021-12-13"));
        assert_eq!(access_token(TOKEN).unwrap().expose(), "t.o.k");
        bolero::check!().with_type::<Vec<Edit>>().for_each(|edits| {
            let versions = mutilated(VERSIONS, edits);
            if let Some(newest) = newest_of(&versions) {
                // It becomes part of a path.
                let path = format!("/p?api-version={}", encoded(&newest));
                assert!(path.parse::<http::Uri>().is_ok(), "{newest:?}");
            }
            if let Some(token) = access_token(&mutilated(TOKEN, edits)) {
                assert!(!token.expose().is_empty());
            }
        });
    }
}
