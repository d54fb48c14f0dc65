//! What a cluster of another version lacks, and what becomes of the agent then: everything else
//! goes on, and the log says once what does not.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use super::client::API_VERSION;
use super::{ClusterError, Disposition};

/// A part of a cluster that the agent can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// The list of certificate authorities.
    Authorities,
    /// Heartbeats of bot instances.
    Heartbeats,
    /// The list of leaf clusters.
    LeafClusters,
}

impl Feature {
    /// The service that has it.
    fn service(self) -> &'static str {
        match self {
            Self::Authorities => "teleport.trust.v1.TrustService",
            Self::Heartbeats => "teleport.machineid.v1.BotInstanceService",
            Self::LeafClusters => "teleport.presence.v1.PresenceService",
        }
    }

    /// What is missing without it.
    fn loss(self) -> &'static str {
        match self {
            Self::Authorities => {
                "outputs have the authorities that came with the bot's certificates: those of leaf \
                 clusters and databases are missing"
            }
            Self::Heartbeats => "the cluster does not show when this bot was last alive",
            Self::LeafClusters => "ssh_config has no hosts of leaf clusters",
        }
    }
}

/// What the cluster was found to lack. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Lacking(Arc<Mutex<BTreeSet<Feature>>>);

impl Lacking {
    /// `None` instead of the error of a cluster that has no such call; the first time that is told.
    ///
    /// # Errors
    /// Any other failure.
    pub fn optional<T>(
        &self,
        feature: Feature,
        answer: Result<T, ClusterError>,
    ) -> Result<Option<T>, ClusterError> {
        match answer {
            Ok(answer) => Ok(Some(answer)),
            Err(error) if error.disposition() == Disposition::Unsupported => {
                self.note(feature);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Whether this is news.
    fn note(&self, feature: Feature) -> bool {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let news = known.insert(feature);
        if news {
            tracing::warn!(
                lacks = feature.service(),
                since = API_VERSION,
                "The cluster lacks what version {API_VERSION} has: {}",
                feature.loss()
            );
        }
        news
    }
}

/// How the version of a cluster goes with the protocol that this agent speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Skew {
    /// The same major version, or one above: what clusters promise to support.
    None,
    /// The cluster is older than the agent's protocol; it may lack calls.
    Older,
    /// The cluster is newer than it takes agents for.
    Newer,
}

/// The skew of a cluster's version, such as `18.0.0` or `19.1.0-dev.1`; `None` for a text that is
/// no version.
pub fn skew(server: &str) -> Option<Skew> {
    let (theirs, ours) = (major(server)?, major(API_VERSION)?);
    Some(if theirs < ours {
        Skew::Older
    } else if theirs > ours + 1 {
        Skew::Newer
    } else {
        Skew::None
    })
}

fn major(version: &str) -> Option<u32> {
    let version = version.strip_prefix('v').unwrap_or(version);
    version.split_once('.')?.0.parse().ok()
}

/// Tells of a skew, once for each version that a cluster shows.
#[derive(Debug, Default)]
pub struct Versions {
    seen: Option<String>,
}

impl Versions {
    /// Looks at the version in an answer. Says whether there was something to tell.
    pub fn look(&mut self, server: &str) -> bool {
        if self.seen.as_deref() == Some(server) {
            return false;
        }
        self.seen = Some(server.to_owned());
        let agent = API_VERSION;
        match skew(server) {
            Some(Skew::Older) => tracing::warn!(
                server,
                agent,
                "The cluster is older than the protocol of this agent: what it lacks is left out"
            ),
            Some(Skew::Newer) => tracing::warn!(
                server,
                agent,
                "The cluster is too new for this agent and may refuse it: update tbot"
            ),
            Some(Skew::None) | None => {
                tracing::debug!(server, agent, "The cluster's version");
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;

    #[test]
    fn only_a_missing_call_is_done_without_and_that_is_told_once() {
        let lacking = Lacking::default();
        let answer = |status| Err::<(), _>(ClusterError::call("GetCertAuthorities")(status));
        let missing = || answer(Status::unimplemented("unknown service"));
        assert_eq!(
            lacking.optional(Feature::Authorities, Ok(1)).unwrap(),
            Some(1)
        );
        assert!(lacking.0.lock().unwrap().is_empty());
        for _ in 0..2 {
            let found = lacking.clone().optional(Feature::Authorities, missing());
            assert_eq!(found.unwrap(), None);
        }
        assert!(!lacking.note(Feature::Authorities));
        assert!(lacking.note(Feature::Heartbeats));
        for status in [
            Status::permission_denied("no"),
            Status::unavailable("away"),
            Status::not_found("none"),
        ] {
            assert!(
                lacking
                    .optional(Feature::LeafClusters, answer(status))
                    .is_err()
            );
        }
        assert!(lacking.note(Feature::LeafClusters));
    }

    #[test]
    fn a_cluster_may_be_one_major_version_ahead() {
        for (server, expected) in [
            ("17.7.1", Some(Skew::Older)),
            ("18.0.0", Some(Skew::None)),
            ("v18.2.0-dev", Some(Skew::None)),
            ("19.0.0-alpha.1", Some(Skew::None)),
            ("20.0.0", Some(Skew::Newer)),
            ("", None),
            ("main", None),
            ("x.1", None),
        ] {
            assert_eq!(skew(server), expected, "{server:?}");
        }
    }

    #[test]
    fn a_skew_is_told_once_for_each_version() {
        let mut versions = Versions::default();
        let told = [
            "17.0.0", "17.0.0", "18.0.0", "18.0.0", "21.0.0", "21.0.0", "17.0.0",
        ]
        .map(|version| versions.look(version));
        assert_eq!(told, [true, false, false, false, true, false, true]);
    }
}
