//! Join method `azure_devops`: the ID token of a pipeline of Azure DevOps, from the service that it
//! names to its jobs.

pub mod verify;

use std::sync::Arc;

use async_trait::async_trait;
use http::Method;

use super::id_token::{self, IdToken, Question};
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings};
use crate::secret::Secret;
use crate::yaml::Fields;

/// Where to ask.
const URL: &str = "SYSTEM_OIDCREQUESTURI";
/// What to ask with. Pipelines keep it from scripts unless it is mapped.
const BEARER: &str = "SYSTEM_ACCESSTOKEN";

/// Join method `azure_devops`.
#[derive(Debug, Clone, Copy)]
pub struct AzureDevops;

impl JoinMethod for AzureDevops {
    fn name(&self) -> &'static str {
        "azure_devops"
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Self)
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names an azure_devops token, that its organization_id is this \
         organization's UUID, that one of its allow rules has this project and pipeline, and that the \
         cluster's clock is right)"
    }
}

#[async_trait]
impl Prover for AzureDevops {
    fn method(&self) -> &'static dyn JoinMethod {
        &Self
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let method = self.name();
        let url = id_token::variable(
            around,
            method,
            URL,
            "run tbot in a job of an Azure DevOps pipeline",
        )?;
        let bearer = id_token::variable(
            around,
            method,
            BEARER,
            "give the step `env: {SYSTEM_ACCESSTOKEN: $(System.AccessToken)}`",
        )?;
        let joint = if url.contains('?') { '&' } else { '?' };
        let question = Question {
            method,
            verb: Method::POST,
            url: &format!("{url}{joint}api-version=7.1"),
            bearer: &Secret::new(bearer.to_owned()),
            accept: "application/json",
            member: "oidcToken",
        };
        let token = id_token::ask(around, &question).await?;
        Ok(IdToken::proof(method, token, around.clock.now()))
    }
}
