//! The `kubernetes` attestor: the pod and container that a process is in, as the kubelet of this
//! node knows them.

mod kubelet;
mod list;
mod pods;
mod settings;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::time::{Instant, sleep, timeout_at};

use self::kubelet::{Kubelet, KubeletError};
use self::list::Lists;
use self::pods::Sight;
use self::settings::Settings;
use super::container::{self, ContainerError};
use super::plan::{disabled, enabled};
use super::{AttestError, Attestor, AttestorKind, Peer};
use crate::backoff::Backoff;
use crate::clock::Clock;
use crate::crypto::jitter;
use crate::env::Env;
use crate::pb::teleport::workloadidentity::v1::{WorkloadAttrs, WorkloadAttrsKubernetes};
use crate::yaml::{Fields, Tree};

/// The YAML key.
const NAME: &str = "kubernetes";
/// How long a caller waits until the kubelet knows its container: the container runs before the
/// kubelet writes that down.
const PATIENCE: Duration = Duration::from_secs(30);
/// The wait before the kubelet is asked again, at first and at most.
const WAITS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(2)];

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl AttestorKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn parse(&self, section: Option<Fields<'_>>) -> Option<Arc<dyn Attestor>> {
        let mut fields = enabled(section, &["kubelet"])?;
        let settings = Settings::parse(fields.section("kubelet"));
        fields.finish();
        let attestor = Kubernetes::new(settings?, &Env::of_process(), Clock::system());
        Some(Arc::new(attestor))
    }

    fn emit(&self, configured: Option<&dyn Attestor>) -> Tree {
        configured.map_or_else(disabled, Attestor::emit)
    }
}

/// The attestor.
#[derive(Debug)]
struct Kubernetes {
    settings: Settings,
    lists: Lists,
}

/// Why a process could not be looked up.
#[derive(Debug, thiserror::Error)]
enum KubernetesError {
    /// Its container is unknown.
    #[error(transparent)]
    Container(#[from] ContainerError),
    /// The kubelet did not tell.
    #[error(transparent)]
    Kubelet(#[from] Arc<KubeletError>),
    /// The kubelet has no such pod.
    #[error(
        "the kubelet of {node} does not know pod {pod} within {} s: is TELEPORT_NODE_NAME the name \
         of the node that the agent runs on?",
        PATIENCE.as_secs()
    )]
    NoPod { node: String, pod: String },
    /// An init container that ends before the others start: upstream issues nothing to it either.
    #[error("container {container:?} of pod {pod:?} is an init container and no sidecar")]
    Init { pod: String, container: String },
    /// A request did not end in time.
    #[error("the kubelet did not tell of pod {pod} within {} s", PATIENCE.as_secs())]
    TooSlow { pod: String },
}

impl Kubernetes {
    fn new(settings: Settings, env: &Env, clock: Clock) -> Self {
        let kubelet = Kubelet::new(settings.clone(), env, clock);
        Self {
            settings,
            lists: Lists::new(kubelet),
        }
    }

    async fn found(&self, peer: &Peer) -> Result<Option<WorkloadAttrsKubernetes>, KubernetesError> {
        let Some(place) = container::locate(peer, container::kubernetes).await? else {
            return Ok(None);
        };
        let pod = place.pod.unwrap_or_default();
        self.seen(&pod, &place.id).await.map(Some)
    }

    /// What the kubelet tells of a container, asked until it knows it.
    async fn seen(&self, pod: &str, id: &str) -> Result<WorkloadAttrsKubernetes, KubernetesError> {
        self.seen_in(pod, id, |seen| self.lists.after(seen)).await
    }

    /// The same with lists from anywhere. `after` gives one from after the moment of the last.
    async fn seen_in<F>(
        &self,
        pod: &str,
        id: &str,
        after: impl Fn(Option<Instant>) -> F,
    ) -> Result<WorkloadAttrsKubernetes, KubernetesError>
    where
        F: Future<Output = list::Outcome>,
    {
        let deadline = Instant::now() + PATIENCE;
        let [base, cap] = WAITS;
        let mut backoff = Backoff::new(base, cap);
        let mut seen = None;
        loop {
            let list = timeout_at(deadline, after(seen))
                .await
                .map_err(|_elapsed| KubernetesError::TooSlow { pod: pod.into() })??;
            let sight = list.look(pod, id);
            let wait = backoff.next_wait(jitter());
            let last = Instant::now() + wait >= deadline;
            match sight {
                Sight::Known(attributes) => return Ok(attributes),
                Sight::Init { pod, container } => {
                    return Err(KubernetesError::Init { pod, container });
                }
                Sight::Pod(attributes) if last => return Ok(attributes),
                Sight::Nothing if last => {
                    return Err(KubernetesError::NoPod {
                        node: self.lists.node().to_owned(),
                        pod: pod.to_owned(),
                    });
                }
                Sight::Pod(_) | Sight::Nothing => {}
            }
            seen = Some(list.asked);
            sleep(wait).await;
        }
    }
}

#[async_trait]
impl Attestor for Kubernetes {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn attest(&self, peer: &Peer, attributes: &mut WorkloadAttrs) -> Result<(), AttestError> {
        let found = self.found(peer).await;
        attributes.kubernetes = found.map_err(AttestError::of(NAME, peer))?;
        Ok(())
    }

    fn emit(&self) -> Tree {
        self.settings.emit()
    }
}

#[cfg(test)]
mod tests;
