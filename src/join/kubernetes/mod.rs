//! Join method `kubernetes`: the token of the pod's service account, as the kubelet keeps it in a file.

pub mod verify;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;

use super::id_token::IdToken;
use super::{JoinError, JoinMethod, Proof, Prover, Surroundings, TokenSource};
use crate::yaml::{Fields, Tree};

const NAME: &str = "kubernetes";
/// Where the file is, if the configuration does not say.
const PATH_ENV: &str = "KUBERNETES_TOKEN_PATH";
/// Where it is, if nobody says: where Kubernetes mounts the token of a pod's service account.
const DEFAULT_PATH: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Join method `kubernetes`.
#[derive(Debug, Clone, Copy)]
pub struct Kubernetes;

/// What is configured.
#[derive(Debug, Clone, Default)]
struct Settings {
    path: Option<String>,
}

impl JoinMethod for Kubernetes {
    fn name(&self) -> &'static str {
        NAME
    }

    fn section(&self) -> Option<&'static str> {
        Some(NAME)
    }

    fn read(&self, section: Option<&mut Fields<'_>>) -> Arc<dyn Prover> {
        let path = section.and_then(|section| section.string("token_path"));
        Arc::new(Settings { path })
    }

    fn hint(&self, _code: Option<tonic::Code>) -> &'static str {
        " (check that onboarding.token names a kubernetes token, that one of its allow rules has this pod's `namespace:service-account`, that the pod \
         mounts a projected token whose audience is the cluster's name and which lives for at most 30 \
         minutes, that KUBERNETES_TOKEN_PATH or onboarding.kubernetes.token_path is its path, and that \
         a static_jwks is the one that `kubectl get --raw /openid/v1/jwks` prints now)"
    }
}

#[async_trait]
impl Prover for Settings {
    fn method(&self) -> &'static dyn JoinMethod {
        &Kubernetes
    }

    fn tree(&self) -> Option<Tree> {
        let path = self.path.as_deref()?;
        Some(Tree::map([("token_path", Some(Tree::text(path)))]))
    }

    /// Reads the file anew for each join: the kubelet replaces it long before the token ends.
    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError> {
        let given = self.path.as_deref().or_else(|| around.env.get(PATH_ENV));
        let path = PathBuf::from(given.unwrap_or(DEFAULT_PATH));
        let failed = |problem: String| JoinError::Proof {
            method: NAME,
            problem: format!(
                "{problem}; is this a pod with a service account token? Set {PATH_ENV} or \
                 onboarding.{NAME}.token_path if it is mounted elsewhere"
            ),
        };
        let token = TokenSource::File(path.clone())
            .resolve()
            .map_err(|error| failed(error.to_string()))?;
        if token.expose().is_empty() {
            return Err(failed(format!("{} is empty", path.display())));
        }
        Ok(IdToken::proof(NAME, token, around.clock.now()))
    }
}

#[cfg(test)]
mod tests;
