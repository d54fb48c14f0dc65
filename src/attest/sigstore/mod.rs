//! The `sigstore` attestor: what was signed of the image that a container runs.
//!
//! It only finds and hands on: whether a signature is good, and enough, the cluster decides by its
//! policies.

mod bundle;
mod cache;
mod credentials;
mod discovery;
mod guard;
mod reference;
mod registry;
mod settings;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::timeout;

use self::cache::Cache;
use self::credentials::Keychain;
use self::guard::Guard;
use self::reference::{Reference, is_digest};
use self::registry::Registries;
use self::settings::Settings;
use super::plan::{disabled, enabled};
use super::{AttestError, Attestor, AttestorKind, Peer};
use crate::clock::Clock;
use crate::env::Env;
use crate::pb::teleport::workloadidentity::v1::{WorkloadAttrs, WorkloadAttrsSigstore};
use crate::yaml::{Fields, Tree};

/// The YAML key.
const NAME: &str = "sigstore";
/// The longest that looking may take.
const PATIENCE: Duration = Duration::from_secs(30);

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl AttestorKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn parse(&self, section: Option<Fields<'_>>) -> Option<Arc<dyn Attestor>> {
        let mut fields = enabled(section, &settings::KEYS)?;
        let settings = Settings::parse(&mut fields);
        fields.finish();
        let attestor = Sigstore::new(settings?, &Env::of_process(), Clock::system());
        Some(Arc::new(attestor))
    }

    fn emit(&self, configured: Option<&dyn Attestor>) -> Tree {
        configured.map_or_else(disabled, Attestor::emit)
    }
}

/// The attestor.
#[derive(Debug)]
struct Sigstore {
    settings: Settings,
    registries: Registries,
    cache: Cache,
}

/// Why nothing was looked for, or nothing came of it.
#[derive(Debug, thiserror::Error)]
enum SigstoreError {
    /// The container's image has no name that leads to a registry.
    #[error("{0:?} is no name of an image")]
    Name(String),
    /// The container's image has no digest that a registry knows.
    #[error("{0:?} is no digest of an image")]
    Digest(String),
    /// The registries take too long.
    #[error("no registry told within {} s", PATIENCE.as_secs())]
    TooSlow,
}

impl Sigstore {
    fn new(settings: Settings, env: &Env, clock: Clock) -> Self {
        let guard = Guard::new(settings.allowed.clone());
        let keychain = Keychain::new(settings.credentials.as_deref(), env);
        Self {
            settings,
            registries: Registries::new(guard, keychain, clock),
            cache: Cache::default(),
        }
    }

    async fn found(&self, image: &Image<'_>) -> Result<WorkloadAttrsSigstore, SigstoreError> {
        let reference =
            Reference::parse(image.name).ok_or_else(|| SigstoreError::Name(image.name.into()))?;
        if !is_digest(image.digest) {
            return Err(SigstoreError::Digest(image.digest.into()));
        }
        let entry = self.cache.entry(image.digest);
        let look = || {
            discovery::discover(
                &self.registries,
                &reference,
                &self.settings.registries,
                image.digest,
            )
        };
        let found = timeout(PATIENCE, entry.get(look))
            .await
            .map_err(|_elapsed| SigstoreError::TooSlow)?;
        Ok(WorkloadAttrsSigstore {
            payloads: found.payloads,
        })
    }
}

/// The image that a container runs.
#[derive(Debug)]
struct Image<'a> {
    name: &'a str,
    digest: &'a str,
}

impl<'a> Image<'a> {
    /// Of the container that was found: in a pod of Kubernetes, in Podman, in Docker.
    fn of(attributes: &'a WorkloadAttrs) -> Option<Self> {
        let kubernetes = attributes
            .kubernetes
            .as_ref()
            .and_then(|a| a.container.as_ref());
        let podman = attributes
            .podman
            .as_ref()
            .and_then(|a| a.container.as_ref());
        let docker = attributes
            .docker
            .as_ref()
            .and_then(|a| a.container.as_ref());
        let found = (kubernetes.map(|found| (&found.image, &found.image_digest)))
            .or(podman.map(|found| (&found.image, &found.image_digest)))
            .or(docker.map(|found| (&found.image, &found.image_digest)));
        found.map(|(name, digest)| Self { name, digest })
    }
}

#[async_trait]
impl Attestor for Sigstore {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn attest(&self, peer: &Peer, attributes: &mut WorkloadAttrs) -> Result<(), AttestError> {
        let found = match Image::of(attributes) {
            Some(image) => self.found(&image).await,
            None => return Ok(()),
        };
        attributes.sigstore = Some(found.map_err(AttestError::of(NAME, peer))?);
        Ok(())
    }

    /// The image is what an engine or the kubelet told.
    fn reads_others(&self) -> bool {
        true
    }

    fn nothing_issued(&self, attributes: &WorkloadAttrs) {
        if let Some(image) = Image::of(attributes) {
            self.cache.mark(image.digest);
        }
    }

    fn emit(&self) -> Tree {
        self.settings.emit()
    }
}

#[cfg(test)]
mod tests;
