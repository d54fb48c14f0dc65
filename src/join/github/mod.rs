//! Join method `github`: the ID token of a job of GitHub Actions, from the service that GitHub names
//! to jobs with the permission `id-token: write`.

pub mod verify;

use std::sync::Arc;

use async_trait::async_trait;
use http::Method;

use super::id_token::{self, AUDIENCE, IdToken, Question};
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings};
use crate::secret::Secret;
use crate::yaml::Fields;

/// Where to ask.
const URL: &str = "ACTIONS_ID_TOKEN_REQUEST_URL";
/// What to ask with.
const BEARER: &str = "ACTIONS_ID_TOKEN_REQUEST_TOKEN";
/// What is missing in most workflows where these are.
const REMEDY: &str = "give the job `permissions: {id-token: write}` in its workflow (in a reusable \
                      workflow, the caller has to grant it too; pull requests of forks never get it)";

/// Join method `github`.
#[derive(Debug, Clone, Copy)]
pub struct Github;

impl JoinMethod for Github {
    fn name(&self) -> &'static str {
        "github"
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Self)
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a github token, that one of its allow rules has this \
         job's repository, ref and environment, that enterprise_slug or enterprise_server_host is set \
         there if GitHub Enterprise issued the ID token, and that the cluster's clock is right)"
    }
}

#[async_trait]
impl Prover for Github {
    fn method(&self) -> &'static dyn JoinMethod {
        &Self
    }

    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let method = self.name();
        let url = id_token::variable(around, method, URL, REMEDY)?;
        let bearer = id_token::variable(around, method, BEARER, REMEDY)?;
        // GitHub's URL has a query already; servers that take its place need not.
        let joint = if url.contains('?') { '&' } else { '?' };
        let question = Question {
            method,
            verb: Method::GET,
            url: &format!("{url}{joint}audience={AUDIENCE}"),
            bearer: &Secret::new(bearer.to_owned()),
            accept: "application/json; api-version=2.0",
            member: "value",
        };
        let token = id_token::ask(around, &question).await?;
        Ok(IdToken::proof(method, token, around.clock.now()))
    }
}
