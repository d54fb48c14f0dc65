//! Follows the rotations of the cluster's authorities: when one reaches a phase in which other keys
//! sign or are trusted, everything is renewed (upstream `lib/tbot/internal/carotation`).
//!
//! The phases are compared with those seen before, so what happened while no stream was open is
//! noticed too. A lost stream says nothing about what is being served, so it is logged and does
//! not touch readiness.

use std::collections::HashMap;
use std::convert::Infallible;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::backoff::{Backoff, Loudness, Repeated};
use crate::clock::Clock;
use crate::cluster::Disposition;
use crate::cluster::events::{self, EventsError};
use crate::crypto::jitter;
use crate::identity::Handle;
use crate::pb::proto::Watch;
use crate::pb::proto::event::Resource;
use crate::pb::types::{CertAuthorityV2, WatchKind};

/// The authorities whose keys are in what outputs write and in how the bot is known.
const AUTHORITIES: [&str; 3] = ["host", "user", "db"];
/// How long further news are awaited after the first, so that one rotation is one renewal.
const DEBOUNCE: Duration = Duration::from_secs(10);
/// Agents that heard the news together renew spread over this time.
const SPREAD: Duration = Duration::from_secs(20);

/// Follows until shutdown; counts `reload` up when everything is to be renewed.
pub(super) async fn run(
    handle: Handle,
    clock: Clock,
    reload: watch::Sender<u64>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    tokio::select! {
        () = follow(&handle, &clock, &reload) => {}
        () = shutdown.cancelled() => {}
    }
    shutdown.cancelled().await;
    Ok(())
}

async fn follow(handle: &Handle, clock: &Clock, reload: &watch::Sender<u64>) {
    let mut backoff = Backoff::new(Duration::from_secs(2), Duration::from_secs(60));
    let mut failures = Repeated::default();
    let mut seen = Seen::default();
    let mut due = None;
    loop {
        let Some(identity) = handle.ready().await else {
            return;
        };
        let cluster = identity.cluster().to_owned();
        let mut synced = false;
        let session = Session {
            handle,
            clock,
            reload,
            cluster: &cluster,
        };
        let error = match session.run(&mut seen, &mut due, &mut synced).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        if synced {
            backoff.reset();
            failures.recovered();
        }
        if let EventsError::Cluster(error) = &error
            && error.disposition() == Disposition::Unsupported
        {
            tracing::warn!(
                %error,
                "The cluster does not tell of changes (Teleport 15 and later do): after a rotation \
                 of its authorities, outputs follow at their next renewal"
            );
            return;
        }
        match failures.failed() {
            Loudness::Warn => {
                tracing::warn!(%error, "Lost sight of the cluster's rotations, trying again");
            }
            Loudness::Debug => {
                tracing::debug!(%error, "Lost sight of the cluster's rotations, trying again");
            }
        }
        clock.sleep(backoff.next_wait(jitter())).await;
    }
}

/// One stream of changes.
struct Session<'a> {
    handle: &'a Handle,
    clock: &'a Clock,
    reload: &'a watch::Sender<u64>,
    cluster: &'a str,
}

impl Session<'_> {
    /// Opens the stream, reads what is, then hears what changes: nothing is missed in between.
    async fn run(
        &self,
        seen: &mut Seen,
        due: &mut Option<SystemTime>,
        synced: &mut bool,
    ) -> Result<Infallible, EventsError> {
        let client = self.handle.client();
        let mut events = events::begun(client.watch(watched(self.cluster))).await?;
        for kind in AUTHORITIES {
            for authority in client.cert_authorities(kind).await? {
                self.note(seen, due, &authority);
            }
        }
        *synced = true;
        loop {
            let event = tokio::select! {
                event = events::next(&mut events) => event?,
                () = passed(self.clock, *due) => {
                    *due = None;
                    tracing::info!("Authorities of the cluster are being rotated: renewing everything now");
                    self.reload.send_modify(|count| *count += 1);
                    continue;
                }
            };
            if let Some(Resource::CertAuthority(authority)) = &event.resource {
                self.note(seen, due, authority);
            }
        }
    }

    fn note(&self, seen: &mut Seen, due: &mut Option<SystemTime>, authority: &CertAuthorityV2) {
        if seen.calls_for_renewal(self.cluster, authority) && due.is_none() {
            *due = Some(self.clock.now() + DEBOUNCE + SPREAD.mul_f64(jitter()));
        }
    }
}

async fn passed(clock: &Clock, due: Option<SystemTime>) {
    match due {
        Some(due) => clock.sleep_until(due).await,
        None => std::future::pending().await,
    }
}

fn watched(cluster: &str) -> Watch {
    let filter = AUTHORITIES.map(|kind| (kind.to_owned(), cluster.to_owned()));
    Watch {
        kinds: vec![WatchKind {
            kind: "cert_authority".to_owned(),
            filter: filter.into(),
            ..WatchKind::default()
        }],
        ..Watch::default()
    }
}

/// The phase and the rotation's id of every authority, as last heard.
#[derive(Debug, Default)]
struct Seen(HashMap<String, (String, String)>);

impl Seen {
    /// Takes note of `authority`; whether other keys sign or are trusted since it was last seen, or
    /// since a stored identity may have been issued, if a rotation goes on at the first sight.
    fn calls_for_renewal(&mut self, cluster: &str, authority: &CertAuthorityV2) -> bool {
        let Some(spec) = authority.spec.as_ref() else {
            return false;
        };
        if spec.cluster_name != cluster || !AUTHORITIES.contains(&spec.r#type.as_str()) {
            return false;
        }
        let rotation = spec.rotation.clone().unwrap_or_default();
        let now = (rotation.phase, rotation.current_id);
        match self.0.insert(spec.r#type.clone(), now.clone()) {
            Some(before) => {
                before != now && matches!(now.0.as_str(), "update_clients" | "rollback" | "standby")
            }
            None => matches!(
                now.0.as_str(),
                "update_clients" | "update_servers" | "rollback"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::types::{CertAuthoritySpecV2, Rotation};

    fn authority(kind: &str, phase: &str, id: &str) -> CertAuthorityV2 {
        CertAuthorityV2 {
            spec: Some(CertAuthoritySpecV2 {
                r#type: kind.to_owned(),
                cluster_name: "c".to_owned(),
                rotation: (!phase.is_empty()).then(|| Rotation {
                    phase: phase.to_owned(),
                    current_id: id.to_owned(),
                    ..Rotation::default()
                }),
                ..CertAuthoritySpecV2::default()
            }),
            ..CertAuthorityV2::default()
        }
    }

    #[test]
    fn phases_in_which_other_keys_count_call_for_renewal() {
        for (steps, expected) in [
            // First sight, then every phase of one rotation.
            (
                ["", "init", "update_clients", "update_servers", "standby"],
                [false, false, true, false, true],
            ),
            // A rotation that is taken back.
            (
                ["standby", "init", "rollback", "standby", "standby"],
                [false, false, true, true, false],
            ),
        ] {
            let mut seen = Seen::default();
            let told =
                steps.map(|phase| seen.calls_for_renewal("c", &authority("user", phase, "1")));
            assert_eq!(told, expected, "{steps:?}");
        }
    }

    #[test]
    fn a_rotation_that_began_before_the_agent_is_noticed() {
        for (phase, expected) in [
            ("", false),
            ("standby", false),
            ("init", false),
            ("update_clients", true),
            ("update_servers", true),
            ("rollback", true),
        ] {
            let mut seen = Seen::default();
            let told = seen.calls_for_renewal("c", &authority("user", phase, "1"));
            assert_eq!(told, expected, "{phase}");
        }
    }

    #[test]
    fn a_rotation_that_was_missed_is_noticed() {
        let mut seen = Seen::default();
        assert!(!seen.calls_for_renewal("c", &authority("host", "standby", "1")));
        assert!(seen.calls_for_renewal("c", &authority("host", "standby", "2")));
    }

    #[test]
    fn other_clusters_and_authorities_are_none_of_its_business() {
        let mut seen = Seen::default();
        for (cluster, kind) in [("leaf", "user"), ("c", "spiffe"), ("c", "jwt")] {
            for phase in ["init", "update_clients"] {
                assert!(!seen.calls_for_renewal(cluster, &authority(kind, phase, "1")));
            }
        }
    }
}
