//! The `docker` attestor: the container that a process is in, as Docker's engine knows it.

use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;

use super::container::{self, Address, Config, ContainerError, State};
use super::plan::{disabled, enabled};
use super::{AttestError, Attestor, AttestorKind, Peer};
use crate::pb::teleport::workloadidentity::v1::{
    WorkloadAttrs, WorkloadAttrsDocker, WorkloadAttrsDockerContainer,
};
use crate::yaml::{Fields, Tree};

/// The YAML key.
const NAME: &str = "docker";
/// Where Docker listens unless it is told otherwise.
const DEFAULT_ADDRESS: &str = "unix:///var/run/docker.sock";
/// The newest version of Docker's API that the fields below were looked up in (Docker 29).
const NEWEST: Version = Version(1, 52);
/// The version of an engine that does not say which it has.
const OLDEST: Version = Version(1, 24);

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl AttestorKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn parse(&self, section: Option<Fields<'_>>) -> Option<Arc<dyn Attestor>> {
        let mut fields = enabled(section, &["addr"])?;
        let address = fields.string("addr");
        let engine = Address::parse(address.as_deref().unwrap_or(DEFAULT_ADDRESS))
            .map_err(|problem| fields.error("addr", problem, None))
            .ok();
        fields.finish();
        engine.map(|engine| Arc::new(Docker { engine }) as Arc<dyn Attestor>)
    }

    fn emit(&self, configured: Option<&dyn Attestor>) -> Tree {
        configured.map_or_else(disabled, Attestor::emit)
    }
}

/// The attestor. Asks the engine anew each time.
#[derive(Debug)]
struct Docker {
    engine: Address,
}

/// A version of Docker's API: `1.41`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.split_once('.')?;
        Some(Self(major.parse().ok()?, minor.parse().ok()?))
    }
}

/// What Docker tells of a container, as far as it is used.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    name: String,
    #[serde(default)]
    image: String,
    config: Config,
    state: State,
}

impl Docker {
    async fn found(&self, peer: &Peer) -> Result<Option<WorkloadAttrsDocker>, ContainerError> {
        let Some(place) = container::locate(peer, container::docker).await? else {
            return Ok(None);
        };
        let Version(major, minor) = self.version().await?;
        let path = format!("/v{major}.{minor}/containers/{}/json", place.id);
        let container: Container = self.engine.get(&path).await?;
        place.confirm(container.state.pid).await?;
        Ok(Some(WorkloadAttrsDocker {
            attested: true,
            container: Some(WorkloadAttrsDockerContainer {
                name: container.name,
                image: container.config.image,
                labels: container.config.labels.unwrap_or_default(),
                image_digest: container.image,
            }),
        }))
    }

    /// The newest version that both sides know.
    async fn version(&self) -> Result<Version, ContainerError> {
        let answer = self.engine.ask("/_ping").await?;
        let said = answer.headers().get("api-version");
        let version = said.and_then(|value| Version::parse(value.to_str().ok()?));
        Ok(version.unwrap_or(OLDEST).min(NEWEST))
    }
}

#[async_trait]
impl Attestor for Docker {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn attest(&self, peer: &Peer, attributes: &mut WorkloadAttrs) -> Result<(), AttestError> {
        let found = self.found(peer).await;
        attributes.docker = found.map_err(AttestError::of(NAME, peer))?;
        Ok(())
    }

    fn emit(&self) -> Tree {
        self.engine.emit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_the_newest_that_both_know() {
        for (said, agreed) in [
            ("1.41", Version(1, 41)),
            ("1.99", NEWEST),
            ("2.0", NEWEST),
            ("1.9", Version(1, 9)),
        ] {
            assert_eq!(Version::parse(said).unwrap().min(NEWEST), agreed, "{said}");
        }
        for bad in ["", "1", "1.x", "v1.41", "1.41.2"] {
            assert_eq!(Version::parse(bad), None, "{bad}");
        }
    }

    /// The answer of Docker 20.10.24, shortened.
    #[test]
    fn a_recorded_answer_is_read() {
        let answer = r#"{"Id": "76f4fe4f06cb3021b649257c1c291f285892c95ac6f3fdb61f9fdee87fbf46ec",
            "State": {"Status": "running", "Pid": 18873}, "Name": "/web1",
            "Image": "sha256:4dc4709783aa6bb9bacab387e8bafcdb55e1f96629bdb984a175a2cfd647fbd6",
            "Config": {"Image": "tbot-test:1", "Labels": {"app": "x"}}, "HostConfig": {"Binds": null}}"#;
        let container: Container = serde_json::from_str(answer).unwrap();
        assert_eq!(container.name, "/web1");
        assert_eq!(container.state.pid, 18873);
        assert_eq!(container.config.image, "tbot-test:1");
        let none = r#"{"State": {}, "Name": "/a", "Config": {"Labels": null}}"#;
        let container: Container = serde_json::from_str(none).unwrap();
        assert_eq!(container.config.labels, None);
        assert_eq!(container.state.pid, 0);
    }

    #[test]
    fn fuzz_answers() {
        let sample = br#"{"State": {"Pid": 18873}, "Name": "/web1", "Image": "sha256:4d",
            "Config": {"Image": "tbot-test:1", "Labels": {"app": "x"}}}"#;
        let check = bolero::check!().with_type::<(Vec<(u8, u8)>, String)>();
        check.for_each(|(edits, version)| {
            let mut bytes = sample.to_vec();
            for (place, octet) in edits.iter().take(6) {
                let at = usize::from(*place) % bytes.len();
                bytes[at] = *octet;
            }
            if let (Ok(container), Ok(whole)) = (
                serde_json::from_slice::<Container>(&bytes),
                serde_json::from_slice::<serde_json::Value>(&bytes),
            ) {
                assert_eq!(whole["Name"], container.name);
                assert_eq!(
                    whole["Config"]["Image"].as_str().unwrap_or_default(),
                    container.config.image
                );
            }
            if let Some(agreed) = Version::parse(version) {
                assert!(agreed.min(NEWEST) <= NEWEST);
            }
        });
    }
}
