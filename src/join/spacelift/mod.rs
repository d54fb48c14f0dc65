//! Join method `spacelift`: the ID token of a run of Spacelift, which stands in its environment.

pub mod verify;

use std::sync::Arc;

use super::id_token::Variable;
use super::{JoinMethod, Prover};
use crate::yaml::Fields;

/// Join method `spacelift`.
#[derive(Debug, Clone, Copy)]
pub struct Spacelift;

impl JoinMethod for Spacelift {
    fn name(&self) -> &'static str {
        "spacelift"
    }

    fn read(&self, _section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Arc::new(Variable {
            method: &Self,
            name: "SPACELIFT_OIDC_TOKEN".to_owned(),
            remedy: "run tbot in a Spacelift run; workers need OIDC, which self-hosted ones may lack",
            tree: None,
        })
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a spacelift token, that its hostname is this \
         account's, that one of its allow rules has this space or caller, and that the cluster's \
         clock is right)"
    }
}
