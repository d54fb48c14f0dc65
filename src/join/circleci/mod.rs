//! Join method `circleci`: the ID token of a job of CircleCI, which stands in its environment.

pub mod verify;

use std::sync::Arc;

use super::id_token::Variable;
use super::{JoinMethod, Prover};
use crate::yaml::Fields;

/// Join method `circleci`.
#[derive(Debug, Clone, Copy)]
pub struct Circleci;

impl JoinMethod for Circleci {
    fn name(&self) -> &'static str {
        "circleci"
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Variable {
            method: &Self,
            name: "CIRCLE_OIDC_TOKEN".to_owned(),
            remedy: "give the job a context: only then does CircleCI make an ID token",
            tree: None,
        })
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a circleci token, that its organization_id is this \
         organization's UUID, that one of its allow rules has this project or context, and that \
         the cluster's clock is right)"
    }
}
