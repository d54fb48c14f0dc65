//! Follows the rotations of the cluster's authorities: when one reaches a phase in which other keys
//! sign or are trusted, everything is renewed (upstream `lib/tbot/internal/carotation`).
//!
//! What a phase asks for has time until the next one comes, and a scheduled phase lasts for hours: a
//! fleet that hears of it renews spread over a whole interval, which is as busy as any other. If the
//! next phase comes before that, somebody takes the steps by hand, and everything is renewed within
//! seconds, because whoever is a phase behind is locked out by the one after.
//!
//! The phases are compared with those seen before, so what happened while no stream was open is
//! noticed too. A lost stream says nothing about what is being served, so it is logged and does
//! not touch readiness.

use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::backoff::{Backoff, Loudness, Repeated};
use crate::clock::Clock;
use crate::cluster::events::{self, Events, EventsError};
use crate::cluster::{Client, Disposition};
use crate::crypto::jitter;
use crate::identity::Handle;
use crate::pb::proto::Watch;
use crate::pb::proto::event::Resource;
use crate::pb::types::{CertAuthorityV2, WatchKind};

/// The authorities whose keys are in what outputs write and in how the bot is known.
const AUTHORITIES: [&str; 3] = ["host", "user", "db"];
/// How long further news are awaited after the first, so that one rotation is one renewal.
pub(super) const DEBOUNCE: Duration = Duration::from_secs(10);
/// Agents that have to hurry together renew spread over this time.
const HURRY: Duration = Duration::from_secs(20);

/// Follows until shutdown; counts `reload` up when everything is to be renewed, which happens every
/// `interval` anyway.
pub(super) async fn run(
    handle: Handle,
    clock: Clock,
    reload: watch::Sender<u64>,
    interval: Duration,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    tokio::select! {
        () = follow(&handle, &clock, &reload, interval) => {}
        () = shutdown.cancelled() => {}
    }
    shutdown.cancelled().await;
    Ok(())
}

async fn follow(handle: &Handle, clock: &Clock, reload: &watch::Sender<u64>, interval: Duration) {
    let mut backoff = Backoff::of_streams();
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
            clock,
            reload,
            interval,
            cluster: &cluster,
        };
        let error = match session
            .run(handle.client(), &mut seen, &mut due, &mut synced)
            .await
        {
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
        match failures.failed(Instant::now(), &error) {
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
    clock: &'a Clock,
    reload: &'a watch::Sender<u64>,
    interval: Duration,
    cluster: &'a str,
}

impl Session<'_> {
    /// Opens the stream, reads what is, then hears what changes: nothing is missed in between.
    async fn run(
        &self,
        client: &Client,
        seen: &mut Seen,
        due: &mut Option<SystemTime>,
        synced: &mut bool,
    ) -> Result<Infallible, EventsError> {
        let mut events = events::begun(client.watch(watched(self.cluster))).await?;
        for kind in AUTHORITIES {
            for authority in client.cert_authorities(kind).await? {
                self.note(seen, due, &authority);
            }
        }
        *synced = true;
        self.heed(&mut events, seen, due).await
    }

    /// Hears what changes, and has everything renewed when that is due.
    async fn heed(
        &self,
        events: &mut Events,
        seen: &mut Seen,
        due: &mut Option<SystemTime>,
    ) -> Result<Infallible, EventsError> {
        loop {
            let event = tokio::select! {
                event = events::next(events) => event?,
                () = passed(self.clock, *due) => {
                    *due = None;
                    seen.followed();
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
        if let Some(news) = seen.note(self.cluster, authority) {
            let at = self.clock.now() + DEBOUNCE + spread(news, self.interval, jitter());
            *due = Some(due.map_or(at, |due| due.min(at)));
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

/// What a phase means to whoever has renewed in the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// Other keys sign or are trusted; those of before still count until the next phase.
    Step,
    /// The phase before, or a whole rotation, was not followed: what is held may be of no use soon.
    Pressing,
}

/// How long after [`DEBOUNCE`] everything is to be renewed.
pub(super) fn spread(news: News, interval: Duration, random: f64) -> Duration {
    match news {
        News::Step => interval.mul_f64(random),
        News::Pressing => HURRY.mul_f64(random),
    }
}

/// The authorities as last heard.
#[derive(Debug, Default)]
struct Seen {
    /// The phase and the rotation's id, by type.
    phases: HashMap<String, (String, String)>,
    /// The types whose news were not followed yet.
    pending: HashSet<String>,
}

impl Seen {
    /// Takes note of `authority`. At the first sight of a rotation that goes on, a stored identity may
    /// be older than it.
    fn note(&mut self, cluster: &str, authority: &CertAuthorityV2) -> Option<News> {
        let spec = authority.spec.as_ref()?;
        let kind = &spec.r#type;
        if spec.cluster_name != cluster || !AUTHORITIES.contains(&kind.as_str()) {
            return None;
        }
        let rotation = spec.rotation.clone().unwrap_or_default();
        let now = (rotation.phase, rotation.current_id);
        let before = self.phases.insert(kind.clone(), now.clone());
        let (phase, id) = &now;
        let news = match before {
            Some(before) if before == now => None,
            Some(_) if phase == "rollback" || self.pending.contains(kind) => Some(News::Pressing),
            Some((_, before)) if *id != before && phase != "init" => Some(News::Pressing),
            Some(_) => (phase != "update_servers").then_some(News::Step),
            None => matches!(
                phase.as_str(),
                "update_clients" | "update_servers" | "rollback"
            )
            .then_some(News::Step),
        }?;
        self.pending.insert(kind.clone());
        Some(news)
    }

    /// Everything is being renewed now.
    fn followed(&mut self) {
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{StreamExt as _, stream};

    use super::*;
    use crate::pb::proto::{Event, Operation};
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
    fn every_phase_is_followed_and_one_that_overtakes_presses() {
        use News::{Pressing, Step};
        for (case, phases, followed, expected) in [
            (
                "a rotation by schedule",
                ["", "init", "update_clients", "update_servers", "standby"],
                true,
                [None, Some(Step), Some(Step), None, Some(Step)],
            ),
            (
                "the same within a minute",
                ["", "init", "update_clients", "update_servers", "standby"],
                false,
                [
                    None,
                    Some(Step),
                    Some(Pressing),
                    Some(Pressing),
                    Some(Pressing),
                ],
            ),
            (
                "one that is taken back",
                ["standby", "init", "rollback", "standby", "standby"],
                true,
                [None, Some(Step), Some(Pressing), Some(Step), None],
            ),
        ] {
            let mut seen = Seen::default();
            let told = phases.map(|phase| {
                if followed {
                    seen.followed();
                }
                seen.note("c", &authority("user", phase, "1"))
            });
            assert_eq!(told, expected, "{case}");
        }
    }

    #[test]
    fn a_rotation_that_began_before_the_agent_is_noticed() {
        for (phase, expected) in [
            ("", None),
            ("standby", None),
            ("init", None),
            ("update_clients", Some(News::Step)),
            ("update_servers", Some(News::Step)),
            ("rollback", Some(News::Step)),
        ] {
            let told = Seen::default().note("c", &authority("user", phase, "1"));
            assert_eq!(told, expected, "{phase}");
        }
    }

    #[test]
    fn a_rotation_that_was_missed_presses() {
        for (phase, expected) in [
            ("standby", News::Pressing),
            ("update_servers", News::Pressing),
            ("init", News::Step),
        ] {
            let mut seen = Seen::default();
            assert_eq!(seen.note("c", &authority("host", "standby", "1")), None);
            let told = seen.note("c", &authority("host", phase, "2"));
            assert_eq!(told, Some(expected), "{phase}");
        }
    }

    #[test]
    fn authorities_are_rotated_on_their_own() {
        let mut seen = Seen::default();
        for kind in AUTHORITIES {
            assert_eq!(seen.note("c", &authority(kind, "", "")), None);
        }
        for kind in AUTHORITIES {
            let told = seen.note("c", &authority(kind, "init", "1"));
            assert_eq!(told, Some(News::Step), "{kind}");
        }
    }

    /// Phase after phase, of one rotation after the other, without a pause or an end.
    #[tokio::test(start_paused = true)]
    async fn a_flood_of_rotations_is_followed_no_faster_than_the_debounce() {
        let event = |kind: Operation, resource| {
            Ok(Event {
                r#type: kind.into(),
                resource,
            })
        };
        let rotations = (0_u64..).map(move |count| {
            let phases = ["init", "update_clients", "update_servers", "standby"];
            let phase = phases[usize::try_from(count % 4).unwrap()];
            let authority = authority("host", phase, &(count / 4).to_string());
            event(Operation::Put, Some(Resource::CertAuthority(authority)))
        });
        let flood = stream::iter(std::iter::once(event(Operation::Init, None)).chain(rotations));
        let mut events = events::begun(async { Ok(flood.boxed()) }).await.unwrap();

        let clock = Clock::simulated(SystemTime::UNIX_EPOCH);
        let (reload, reloads) = watch::channel(0);
        let session = Session {
            clock: &clock,
            reload: &reload,
            interval: Duration::from_mins(20),
            cluster: "c",
        };
        let (mut seen, mut due) = (Seen::default(), None);
        let heeding = session.heed(&mut events, &mut seen, &mut due);
        let hour = tokio::time::timeout(Duration::from_hours(1), heeding);
        assert!(hour.await.is_err(), "it goes on");
        let renewals = *reloads.borrow();
        assert!((120..=360).contains(&renewals), "{renewals} in an hour");
    }

    #[test]
    fn other_clusters_and_authorities_are_none_of_its_business() {
        let mut seen = Seen::default();
        for (cluster, kind) in [("leaf", "user"), ("c", "spiffe"), ("c", "jwt")] {
            for phase in ["init", "update_clients"] {
                assert_eq!(seen.note(cluster, &authority(kind, phase, "1")), None);
            }
        }
    }
}
