//! The `podman` attestor: the container that a process is in, and its pod, as Podman knows them.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use serde::Deserialize;

use super::container::{self, Address, Config, ContainerError, State};
use super::plan::{disabled, enabled};
use super::{AttestError, Attestor, AttestorKind, Peer};
use crate::pb::teleport::workloadidentity::v1::{
    WorkloadAttrs, WorkloadAttrsPodman, WorkloadAttrsPodmanContainer, WorkloadAttrsPodmanPod,
};
use crate::query::encoded;
use crate::yaml::{Fields, Tree};

/// The YAML key.
const NAME: &str = "podman";
/// Podman's own API of version 4, which version 5 serves too.
const API: &str = "/v4.0.0/libpod";

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl AttestorKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn parse(&self, section: Option<Fields<'_>>) -> Option<Arc<dyn Attestor>> {
        let mut fields = enabled(section, &["addr"])?;
        let engine = match fields.string("addr").as_deref().map(Address::parse) {
            Some(Ok(engine)) => Some(engine),
            Some(Err(problem)) => {
                fields.error("addr", problem, None);
                None
            }
            None => {
                fields.error(
                    "addr",
                    "the podman attestor has to know where Podman listens",
                    Some(
                        "unix:///run/podman/podman.sock for root's (podman.socket), \
                         unix:///run/user/1000/podman/podman.sock for a user's",
                    ),
                );
                None
            }
        };
        fields.finish();
        engine.map(|engine| Arc::new(Podman { engine }) as Arc<dyn Attestor>)
    }

    fn emit(&self, configured: Option<&dyn Attestor>) -> Tree {
        configured.map_or_else(disabled, Attestor::emit)
    }
}

/// The attestor. Asks the engine anew each time.
#[derive(Debug)]
struct Podman {
    engine: Address,
}

/// What Podman tells of a container, as far as it is used.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    name: String,
    #[serde(default)]
    image_digest: String,
    /// The pod's ID; empty for a container in none.
    #[serde(default)]
    pod: String,
    config: Config,
    state: State,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Pod {
    name: String,
    labels: Option<HashMap<String, String>>,
}

impl Podman {
    async fn found(&self, peer: &Peer) -> Result<Option<WorkloadAttrsPodman>, ContainerError> {
        let Some(place) = container::locate_in_podman(peer).await? else {
            return Ok(None);
        };
        let path = format!("{API}/containers/{}/json", place.id);
        let container: Container = self.engine.get(&path).await?;
        place.confirm(container.state.pid).await?;
        let pod: Option<Pod> = match container.pod.as_str() {
            "" => None,
            id => {
                let path = format!("{API}/pods/{}/json", encoded(id));
                Some(self.engine.get(&path).await?)
            }
        };
        Ok(Some(WorkloadAttrsPodman {
            attested: true,
            container: Some(WorkloadAttrsPodmanContainer {
                name: container.name,
                image: container.config.image,
                labels: container.config.labels.unwrap_or_default(),
                image_digest: container.image_digest,
            }),
            pod: pod.map(|pod| WorkloadAttrsPodmanPod {
                name: pod.name,
                labels: pod.labels.unwrap_or_default(),
            }),
        }))
    }
}

#[async_trait]
impl Attestor for Podman {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn attest(&self, peer: &Peer, attributes: &mut WorkloadAttrs) -> Result<(), AttestError> {
        let found = self.found(peer).await;
        attributes.podman = found.map_err(AttestError::of(NAME, peer))?;
        Ok(())
    }

    fn emit(&self) -> Tree {
        self.engine.emit()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers of Podman 4.3.1, shortened.
    #[test]
    fn recorded_answers_are_read() {
        let answer = r#"{"Id": "3dadb688a292", "State": {"OciVersion": "1.0.2-dev", "Pid": 4711},
            "Image": "86550ec7d11aca86941ed73284e68fc7aea7e06f123c6d5191addb25f39c0072",
            "ImageDigest": "sha256:41b03e3ae01980e8fcc9dc82e0682994d23bd9ac4d1766ffa298b937ff6a1572",
            "ImageName": "localhost/tbot-test:1", "Name": "inpod",
            "Pod": "8963b727f4b660d25f6927b7192ea6321a23a8a4e6b57747befc961bf5adc781",
            "Config": {"Hostname": "pod1", "Image": "localhost/tbot-test:1", "Labels": null}}"#;
        let container: Container = serde_json::from_str(answer).unwrap();
        assert_eq!(container.name, "inpod");
        assert!(container.image_digest.starts_with("sha256:41b0"));
        assert!(container.pod.starts_with("8963"));
        assert_eq!(container.config.labels, None);
        let answer = r#"{"Id": "8963b727f4b6", "Name": "pod1", "Labels": {"tier": "p"},
            "InfraConfig": {"PortBindings": {}}, "NumContainers": 2}"#;
        let pod: Pod = serde_json::from_str(answer).unwrap();
        assert_eq!(pod.name, "pod1");
        assert_eq!(pod.labels.unwrap()["tier"], "p");
    }

    #[test]
    fn fuzz_answers() {
        let container = br#"{"State": {"Pid": 4711}, "ImageDigest": "sha256:41", "Name": "inpod",
            "Pod": "8963", "Config": {"Image": "localhost/tbot-test:1", "Labels": null}}"#;
        let pod = br#"{"Id": "8963b727f4b6", "Name": "pod1", "Labels": {"tier": "p"}}"#;
        let check = bolero::check!().with_type::<Vec<(u8, u8)>>();
        check.for_each(|edits| {
            let edited = |sample: &[u8]| {
                let mut bytes = sample.to_vec();
                for (place, octet) in edits.iter().take(6) {
                    let at = usize::from(*place) % bytes.len();
                    bytes[at] = *octet;
                }
                bytes
            };
            let (container, pod) = (edited(container), edited(pod));
            if let (Ok(read), Ok(whole)) = (
                serde_json::from_slice::<Container>(&container),
                serde_json::from_slice::<serde_json::Value>(&container),
            ) {
                assert_eq!(whole["Name"], read.name);
                assert_eq!(whole["Pod"].as_str().unwrap_or_default(), read.pod);
            }
            if let (Ok(read), Ok(whole)) = (
                serde_json::from_slice::<Pod>(&pod),
                serde_json::from_slice::<serde_json::Value>(&pod),
            ) {
                assert_eq!(whole["Name"], read.name);
                assert_eq!(whole["Labels"].is_object(), read.labels.is_some());
            }
        });
    }
}
