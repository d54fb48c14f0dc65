//! Join method `gitlab`: the ID token of a job of GitLab CI, in the variable that the job's
//! `id_tokens` gives it.

pub mod verify;

use std::sync::Arc;

use super::id_token::Variable;
use super::{JoinMethod, Prover};
use crate::secret::Secret;
use crate::yaml::{Fields, Tree};

/// The key of the variable's name.
const KEY: &str = "token_env_var_name";
/// The variable's name where nothing else is configured.
const DEFAULT: &str = "TBOT_GITLAB_JWT";

/// Join method `gitlab`.
#[derive(Debug, Clone, Copy)]
pub struct Gitlab;

impl Gitlab {
    fn with(name: Option<String>) -> Arc<dyn Prover> {
        let tree = name
            .as_ref()
            .map(|name| Tree::map([(KEY, Some(Tree::text(name)))]));
        Arc::new(Variable {
            method: &Self,
            name: name.unwrap_or_else(|| DEFAULT.to_owned()),
            remedy: "give the job `id_tokens: {TBOT_GITLAB_JWT: {aud: <cluster name>}}`, or name its \
                     variable in onboarding.gitlab.token_env_var_name",
            tree,
        })
    }
}

impl JoinMethod for Gitlab {
    fn name(&self) -> &'static str {
        "gitlab"
    }

    fn section(&self) -> Option<&'static str> {
        Some("gitlab")
    }

    fn read(&self, section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        Self::with(section.and_then(|section| section.string(KEY)))
    }

    fn with_parameter(&self, parameter: Secret<String>) -> Option<Arc<dyn Prover>> {
        Some(Self::with(Some(parameter.expose().clone())))
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a gitlab token, that `aud` of the job's id_tokens is the \
         cluster's name, that the token's domain is this GitLab's, that one of its allow rules has this \
         project and ref, and that the cluster's clock is right)"
    }
}
