//! Discovery: EKS clusters become `kube_cluster` resources, and go with them.
//!
//! Data flows one way: [`config`] says where to look, [`eks`] asks AWS, [`clusters`] makes resources
//! and decides what has to change, the store is brought there with audit events. What could not be
//! looked at keeps what is known of it, and nothing that somebody made by hand is touched.

mod clusters;
pub mod config;
mod eks;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::ProvideCredentials as _;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::ClusterState;
use super::resources::{Change, reconcile};
use super::store::{Resource, StoreError};
use crate::backoff::{Loudness, Repeated};
use crate::crypto::jitter;
use crate::env::Env;
use crate::outbound::{Outbound, OutboundError, Target};
use clusters::{Blind, KIND, Round};
use config::{Config, Matcher};
use eks::{Eks, EksError};

/// The longest wait for AWS credentials: a `credential_process` or a metadata endpoint may hang.
const PATIENCE: Duration = Duration::from_secs(30);
/// Who did it, in the audit log.
const BY: &str = "system";
/// How AWS's log calls a role's session.
const SESSION: &str = "tbot-discovery";

/// Why discovery cannot begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// The environment names an endpoint that is none.
    #[error(
        "{variable} is {value:?}: expected an http or https URL with a host and nothing behind it"
    )]
    Endpoint {
        /// The variable.
        variable: &'static str,
        /// Its value.
        value: String,
    },
    /// TLS cannot be set up.
    #[error(transparent)]
    Outbound(#[from] OutboundError),
}

/// Looks for clusters again and again.
#[derive(Debug)]
pub struct Discovery {
    config: Config,
    outbound: Outbound,
    /// Where to ask instead of AWS.
    endpoint: Option<Target>,
    /// Rows of failures, by place.
    failures: BTreeMap<String, Repeated>,
}

/// What one region had.
type Found = Result<(Vec<eks::Cluster>, Vec<(String, EksError)>), EksError>;

impl Discovery {
    /// Prepares discovery; `env` may name an endpoint to ask instead of AWS, as for AWS's own tools.
    pub fn new(config: Config, env: &Env) -> Result<Self, DiscoveryError> {
        let endpoint = ["AWS_ENDPOINT_URL_EKS", "AWS_ENDPOINT_URL"]
            .into_iter()
            .find_map(|variable| Some((variable, env.get(variable)?)))
            .filter(|(_, value)| !value.is_empty())
            .map(|(variable, value)| {
                Target::parse(value).ok_or_else(|| DiscoveryError::Endpoint {
                    variable,
                    value: value.to_owned(),
                })
            })
            .transpose()?;
        Ok(Self {
            config,
            outbound: Outbound::new()?,
            endpoint,
            failures: BTreeMap::new(),
        })
    }

    /// Looks at once, then again after each interval, a tenth earlier or later, until `shutdown`.
    pub async fn run(mut self, state: Arc<ClusterState>, shutdown: CancellationToken) {
        loop {
            let wait = self.config.poll_interval.mul_f64(0.9 + 0.2 * jitter());
            let round = async {
                self.round(&state).await;
                state.clock.sleep(wait).await;
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = round => {}
            }
        }
    }

    async fn round(&mut self, state: &Arc<ClusterState>) {
        let mut round = Round::default();
        for matcher in self.config.matchers.clone() {
            let credentials = credentials(&matcher).await;
            let place = matcher.assume_role_arn.as_deref().unwrap_or("own account");
            self.tell(
                &format!("credentials ({place})"),
                credentials.as_ref().err(),
            );
            match credentials {
                Ok(credentials) => {
                    self.regions(state, &matcher, &credentials, &mut round)
                        .await;
                }
                Err(_told) => round
                    .blind
                    .extend(matcher.regions.iter().map(Blind::region)),
            }
        }
        self.write(state, round).await;
    }

    /// Brings the resources to what was found.
    async fn write(&mut self, state: &Arc<ClusterState>, round: Round) {
        let group = self.config.discovery_group.clone();
        let owned = Arc::clone(state);
        let written = tokio::task::spawn_blocking(move || {
            let decide = |known: &[Resource]| clusters::decide(known, round, &group);
            reconcile(&owned.store, &owned.audit, KIND, BY, decide)
        })
        .await;
        match written {
            Ok(Ok(changes)) => {
                for change in &changes {
                    match change {
                        Change::Put(cluster) => {
                            tracing::info!(name = cluster.name, "Kubernetes cluster discovered");
                        }
                        Change::Remove(name) => {
                            tracing::info!(name, "Discovered Kubernetes cluster is gone");
                        }
                    }
                }
                self.tell("store", None::<&StoreError>);
            }
            Ok(Err(error)) => self.tell("store", Some(&error)),
            // The program ends.
            Err(_cancelled) => {}
        }
    }

    /// Asks all regions of a matcher at once.
    async fn regions(
        &mut self,
        state: &ClusterState,
        matcher: &Matcher,
        credentials: &Credentials,
        round: &mut Round,
    ) {
        let now = state.clock.now();
        let mut asked = JoinSet::new();
        for region in matcher.regions.clone() {
            let eks = Eks {
                outbound: self.outbound.clone(),
                target: self.endpoint.clone(),
                credentials: credentials.clone(),
                region: region.clone(),
                now,
            };
            asked.spawn(async move { (region, eks.all().await) });
        }
        while let Some(answer) = asked.join_next().await {
            let Ok((region, found)): Result<(String, Found), _> = answer else {
                continue;
            };
            self.tell(&region, found.as_ref().err());
            let (found, failed) = match found {
                Ok(found) => found,
                Err(_told) => {
                    round.blind.push(Blind::region(&region));
                    continue;
                }
            };
            for (name, error) in failed {
                self.tell(&format!("{region}/{name}"), Some(&error));
                round.blind.push(Blind::cluster(&region, &name));
            }
            for cluster in found {
                self.tell(&format!("{region}/{}", cluster.name), None::<&EksError>);
                round.add(&cluster, matcher, &self.config.discovery_group);
            }
        }
    }

    /// Tells of a failure while it is news, and of its end.
    fn tell(&mut self, place: &str, error: Option<&impl std::error::Error>) {
        let Some(error) = error else {
            if self
                .failures
                .remove(place)
                .is_some_and(|mut row| row.recovered().is_some())
            {
                tracing::info!(place, "Discovery works again");
            }
            return;
        };
        let row = self.failures.entry(place.to_owned()).or_default();
        match row.failed(Instant::now(), error) {
            Loudness::Warn => tracing::warn!(
                place, %error,
                "Discovery failed: what is known from there stays until it can be looked at again"
            ),
            Loudness::Debug => tracing::debug!(place, %error, "Discovery failed again"),
        }
    }
}

/// Credentials by AWS's standard chain, with the matcher's role on top.
async fn credentials(matcher: &Matcher) -> Result<Credentials, EksError> {
    let region = matcher.regions.first().cloned().unwrap_or_default();
    let chain = async {
        let config = aws_config::defaults(BehaviorVersion::latest())
            .region(Region::new(region))
            .load()
            .await;
        match &matcher.assume_role_arn {
            None => own(&config).await,
            Some(role) => {
                let mut provider = aws_config::sts::AssumeRoleProvider::builder(role)
                    .session_name(SESSION)
                    .configure(&config);
                if let Some(id) = &matcher.external_id {
                    provider = provider.external_id(id);
                }
                let provider = provider.build().await;
                provider.provide_credentials().await.map_err(lacking)
            }
        }
    };
    tokio::time::timeout(PATIENCE, Box::pin(chain))
        .await
        .unwrap_or_else(|_elapsed| {
            Err(EksError::Credentials(format!(
                "nothing came within {} s",
                PATIENCE.as_secs()
            )))
        })
}

async fn own(config: &SdkConfig) -> Result<Credentials, EksError> {
    let provider = config
        .credentials_provider()
        .ok_or_else(|| EksError::Credentials("there is no credential chain".to_owned()))?;
    provider.provide_credentials().await.map_err(lacking)
}

/// The layers above the root cause only say that something failed.
fn lacking(error: impl std::error::Error) -> EksError {
    let mut root: &dyn std::error::Error = &error;
    while let Some(next) = root.source() {
        root = next;
    }
    EksError::Credentials(root.to_string())
}

#[cfg(test)]
mod tests;
