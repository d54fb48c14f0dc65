//! Join method `env0`: the ID token of a deployment of env0, which stands in its environment.

pub mod verify;

use std::sync::Arc;

use super::id_token::Variable;
use super::{JoinMethod, Prover};
use crate::yaml::Fields;

/// Join method `env0`.
#[derive(Debug, Clone, Copy)]
pub struct Env0;

impl JoinMethod for Env0 {
    fn name(&self) -> &'static str {
        "env0"
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Variable {
            method: &Self,
            name: "ENV0_OIDC_TOKEN".to_owned(),
            remedy: "switch OIDC on in the organization's settings of env0",
            tree: None,
        })
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names an env0 token, that one of its allow rules has this \
         organization and project, and that the cluster's clock is right)"
    }
}
