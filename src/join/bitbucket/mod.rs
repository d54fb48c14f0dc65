//! Join method `bitbucket`: the ID token of a step of Bitbucket Pipelines, which stands in its environment.

pub mod verify;

use std::sync::Arc;

use super::id_token::Variable;
use super::{JoinMethod, Prover};
use crate::yaml::Fields;

/// Join method `bitbucket`.
#[derive(Debug, Clone, Copy)]
pub struct Bitbucket;

impl JoinMethod for Bitbucket {
    fn name(&self) -> &'static str {
        "bitbucket"
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Variable {
            method: &Self,
            name: "BITBUCKET_STEP_OIDC_TOKEN".to_owned(),
            remedy: "give the step `oidc: true`",
            tree: None,
        })
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a bitbucket token, that its audience and \
         identity_provider_url are those of the repository's OpenID Connect settings, that one of \
         its allow rules has this workspace or repository (UUIDs in braces), and that the \
         cluster's clock is right)"
    }
}
