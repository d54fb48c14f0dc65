//! Runs the attestors on one peer: the base first, then all that look for themselves, together, then
//! those that go by what others found.
//!
//! The base asks the kernel alone, in the place of the caller. The others ask engines, buses and servers, over
//! connections that callers share: they run where the service does, and users take turns at each of them.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::AbortOnDropHandle;

use super::limits::Turns;
use super::program::Program;
use super::{AttestError, Attested, Attestor, Peer};
use crate::backoff::{Loudness, Repeated};
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;

/// The longest one attestation takes in all. A slow attestor's attributes stay unset then. Above
/// the longest limit of a single attestor (30 s), and below the patience of callers.
const DEADLINE: Duration = Duration::from_secs(40);

/// How long what was found out about a peer is believed without another look, as long as it runs
/// the same program: long enough for the calls that a client makes together.
const BELIEVED: Duration = Duration::from_secs(1);

/// How long a caller waits for its user's turn at an attestor.
const PATIENCE: Duration = Duration::from_secs(10);

/// The peer ended while it was attested: whatever was found may be about another process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("process {pid} ended while it was being identified")]
pub struct Gone {
    /// Its former process ID.
    pub pid: i32,
}

/// The attestors of a service, ready to run.
#[derive(Debug)]
pub struct Attestors {
    /// Each row is run when the one before it has ended.
    rows: [Vec<Step>; 3],
    /// Where all but the base run.
    runtime: Handle,
}

/// What an attestor sees: everything known with it, or why it sees nothing.
type Seen = Result<WorkloadAttrs, AttestError>;

#[derive(Debug)]
struct Step {
    attestor: Arc<dyn Attestor>,
    failures: Mutex<Repeated>,
    turns: Turns,
}

impl Attestors {
    /// The first of `attestors` is the base: without it nothing is known. Must be called inside the runtime
    /// of the service.
    pub fn new(attestors: impl IntoIterator<Item = Arc<dyn Attestor>>) -> Self {
        let mut steps = attestors.into_iter().map(|attestor| Step {
            attestor,
            failures: Mutex::new(Repeated::default()),
            turns: Turns::new(),
        });
        let base = steps.next().into_iter().collect();
        let (last, middle) = steps.partition(|step| step.attestor.reads_others());
        Self {
            rows: [base, middle, last],
            runtime: Handle::current(),
        }
    }

    /// In the order in which they were given, those that read others last.
    fn steps(&self) -> impl Iterator<Item = &Step> {
        self.rows.iter().flatten()
    }

    /// What was found out about `peer` up to a second ago, if that is of the program that it connected with.
    /// It is not looked at for this: before anything is sent to it, [`Peer::is_unchanged`] has to hold.
    pub fn known(&self, peer: &Peer) -> Option<Arc<Attested>> {
        peer.remembered(|at| at.elapsed() < BELIEVED)
    }

    /// Everything that could be found out about `peer`, now or up to a second ago: see
    /// [`Attestors::look`].
    pub async fn attest(&self, peer: &Arc<Peer>) -> Result<Arc<Attested>, Gone> {
        let (attested, _) = self.found(peer, BELIEVED).await?;
        Ok(attested)
    }

    /// The same for a peer that was attested before, now or up to `believed` ago. `None` if an
    /// attestor failed: what it had found before may still be so.
    pub async fn attest_again(
        &self,
        peer: &Arc<Peer>,
        believed: Duration,
    ) -> Result<Option<Arc<Attested>>, Gone> {
        let (attested, complete) = self.found(peer, believed).await?;
        Ok(complete.then_some(attested))
    }

    /// What is known, and whether that is everything.
    async fn found(
        &self,
        peer: &Arc<Peer>,
        believed: Duration,
    ) -> Result<(Arc<Attested>, bool), Gone> {
        let program = peer.program();
        let young = |at: Instant| at.elapsed() < believed;
        let found = match peer.recall(program, true, young) {
            Some(known) => known,
            None => self.look_alone(peer, program, believed).await,
        };
        if peer.is_alive() {
            Ok(found)
        } else {
            Err(Gone { pid: peer.pid() })
        }
    }

    /// Tells that nothing was issued to a process with these attributes.
    pub fn nothing_issued(&self, attributes: &WorkloadAttrs) {
        for step in self.steps() {
            step.attestor.nothing_issued(attributes);
        }
    }

    /// Looks, unless somebody else just did: calls that come together cause one look.
    async fn look_alone(
        &self,
        peer: &Arc<Peer>,
        program: Option<Program>,
        believed: Duration,
    ) -> (Arc<Attested>, bool) {
        let came = Instant::now();
        let _alone = peer.looking().await;
        let known = peer
            .recall(program, true, |at| at.elapsed() < believed)
            .or_else(|| peer.recall(program, false, |at| at > came));
        if let Some(known) = known {
            return known;
        }
        let (found, complete) = self.look(peer).await;
        let found = Arc::new(Attested::new(found, peer.process()));
        // What was found of two programs is true of neither.
        if peer.program() == program {
            peer.remember(program, complete, &found);
        }
        (found, complete)
    }

    /// What each attestor sees of `peer` now, by name: everything known with it, or why it sees nothing.
    /// For people who look for a mistake; nothing of it is remembered or logged.
    pub async fn explain(
        &self,
        peer: &Arc<Peer>,
    ) -> Result<Vec<(&'static str, Result<WorkloadAttrs, String>)>, Gone> {
        let deadline = Instant::now() + DEADLINE;
        let mut known = WorkloadAttrs::default();
        let mut all = Vec::new();
        for (row, base) in self.rows() {
            for (step, seen) in self.look_together(row, base, peer, &known, deadline).await {
                if let Ok(found) = &seen {
                    add(&mut known, found.clone());
                }
                all.push((
                    step.attestor.name(),
                    seen.map_err(|error| error.to_string()),
                ));
            }
        }
        if peer.is_alive() {
            Ok(all)
        } else {
            Err(Gone { pid: peer.pid() })
        }
    }

    /// Runs the attestors; says whether all of them succeeded.
    ///
    /// If the first attestor fails, nothing is known and the attributes are empty: rules that need
    /// none still match. Another failing one only leaves its own attributes unset.
    async fn look(&self, peer: &Arc<Peer>) -> (WorkloadAttrs, bool) {
        let mut complete = true;
        let deadline = Instant::now() + DEADLINE;
        let mut known = WorkloadAttrs::default();
        for (row, base) in self.rows() {
            for (step, seen) in self.look_together(row, base, peer, &known, deadline).await {
                match seen {
                    Ok(found) => {
                        step.recovered();
                        add(&mut known, found);
                    }
                    // A peer that ended is no fault of the attestor's.
                    Err(_) if !peer.is_alive() => return (known, false),
                    Err(error) => {
                        complete = false;
                        step.failed(&error, base);
                    }
                }
            }
            if base && !complete {
                break;
            }
        }
        (known, complete)
    }

    /// Each row, and whether it is the base.
    fn rows(&self) -> impl Iterator<Item = (&[Step], bool)> {
        let rows = self.rows.iter().enumerate();
        rows.map(|(index, row)| (row.as_slice(), index == 0))
    }

    /// What each of `row` sees of `peer`, in their order. It takes as long as the slowest one.
    async fn look_together<'a>(
        &self,
        row: &'a [Step],
        base: bool,
        peer: &Arc<Peer>,
        known: &WorkloadAttrs,
        deadline: Instant,
    ) -> Vec<(&'a Step, Seen)> {
        let look = async |step: &'a Step| {
            let seen = async {
                if base {
                    step.look(peer, known.clone()).await
                } else {
                    step.look_in_turn(&self.runtime, peer, known.clone()).await
                }
            };
            let seen = match timeout_at(deadline, seen).await {
                Ok(seen) => seen,
                Err(_) => step.problem(peer, format!("no answer within {} s", DEADLINE.as_secs())),
            };
            (step, seen)
        };
        join_all(row.iter().map(look)).await
    }
}

/// What `attestor` sees. It works on a copy of what is `known`, so that one that is cut off leaves nothing
/// half done.
async fn see(attestor: Arc<dyn Attestor>, peer: Arc<Peer>, mut known: WorkloadAttrs) -> Seen {
    let looked = attestor.attest(&peer, &mut known).await;
    looked.map(|()| known)
}

/// Adds what one attestor found to what is `known`.
fn add(known: &mut WorkloadAttrs, found: WorkloadAttrs) {
    let WorkloadAttrs {
        unix,
        kubernetes,
        podman,
        docker,
        systemd,
        sigstore,
    } = found;
    known.unix = unix.or(known.unix.take());
    known.kubernetes = kubernetes.or(known.kubernetes.take());
    known.podman = podman.or(known.podman.take());
    known.docker = docker.or(known.docker.take());
    known.systemd = systemd.or(known.systemd.take());
    known.sigstore = sigstore.or(known.sigstore.take());
}

impl Step {
    /// What it sees.
    async fn look(&self, peer: &Arc<Peer>, known: WorkloadAttrs) -> Seen {
        see(Arc::clone(&self.attestor), Arc::clone(peer), known).await
    }

    /// The same on `runtime`, once it is the turn of the peer's user.
    async fn look_in_turn(&self, runtime: &Handle, peer: &Arc<Peer>, known: WorkloadAttrs) -> Seen {
        let turn = timeout(PATIENCE, self.turns.next(peer.owner())).await;
        let Ok(Some(_turn)) = turn else {
            return self.problem(
                peer,
                "too many callers of this user are being identified".into(),
            );
        };
        let look = runtime.spawn(see(Arc::clone(&self.attestor), Arc::clone(peer), known));
        match AbortOnDropHandle::new(look).await {
            Ok(seen) => seen,
            Err(fault) => self.problem(peer, fault.to_string()),
        }
    }

    fn problem(&self, peer: &Peer, problem: String) -> Seen {
        Err(AttestError {
            attestor: self.attestor.name(),
            pid: peer.pid(),
            problem,
        })
    }

    fn failed(&self, error: &AttestError, base: bool) {
        // Of which process does not matter: the same trouble with the next one is no news.
        let loudness = self.row().failed(Instant::now(), &error.problem);
        let attestor = self.attestor.name();
        let effect = if base {
            "the caller stays unattested"
        } else {
            "its attributes stay unset"
        };
        match loudness {
            Loudness::Warn => {
                tracing::warn!(attestor, problem = %error, effect, "Attestation failed");
            }
            Loudness::Debug => {
                tracing::debug!(attestor, problem = %error, effect, "Attestation failed");
            }
        }
    }

    fn recovered(&self) {
        if let Some(failures) = self.row().recovered() {
            tracing::info!(
                attestor = self.attestor.name(),
                failures,
                "Attestation works again"
            );
        }
    }

    fn row(&self) -> std::sync::MutexGuard<'_, Repeated> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::teleport::workloadidentity::v1::{
        SigstoreVerificationPayload, WorkloadAttrsDocker, WorkloadAttrsSigstore,
        WorkloadAttrsSystemd, WorkloadAttrsUnix,
    };
    use crate::yaml::Tree;
    use async_trait::async_trait;
    use std::io::{Read as _, Write as _};
    use tokio::sync::Notify;

    #[derive(Debug)]
    enum Fake {
        Unix,
        Service,
        Fails,
        Hangs,
        /// Tells that it was reached, then waits to be let on.
        Waits(Arc<Notify>, Arc<Notify>),
        /// Finds a container after so many seconds.
        Container(u64),
        /// Finds a service after so many seconds.
        Slow(u64),
        /// Goes by the container, and takes so many seconds.
        Reader(u64),
    }

    async fn seconds(seconds: u64) {
        tokio::time::sleep(Duration::from_secs(seconds)).await;
    }

    #[async_trait]
    impl Attestor for Fake {
        fn name(&self) -> &'static str {
            "fake"
        }

        async fn attest(&self, peer: &Peer, found: &mut WorkloadAttrs) -> Result<(), AttestError> {
            match self {
                Self::Unix => {
                    found.unix = Some(WorkloadAttrsUnix {
                        attested: true,
                        pid: peer.pid(),
                        ..WorkloadAttrsUnix::default()
                    });
                }
                Self::Service => found.systemd = Some(WorkloadAttrsSystemd::default()),
                Self::Fails => {
                    found.systemd = Some(WorkloadAttrsSystemd::default());
                    return Err(AttestError {
                        attestor: "fake",
                        pid: peer.pid(),
                        problem: "no".into(),
                    });
                }
                Self::Hangs => std::future::pending().await,
                Self::Waits(reached, on) => {
                    reached.notify_one();
                    on.notified().await;
                }
                Self::Container(takes) => {
                    seconds(*takes).await;
                    assert!(found.systemd.is_none(), "of each other they see nothing");
                    found.docker = Some(WorkloadAttrsDocker::default());
                }
                Self::Slow(takes) => {
                    seconds(*takes).await;
                    found.systemd = Some(WorkloadAttrsSystemd::default());
                }
                Self::Reader(takes) => {
                    seconds(*takes).await;
                    let payloads = vec![
                        SigstoreVerificationPayload::default();
                        usize::from(found.docker.is_some())
                    ];
                    found.sigstore = Some(WorkloadAttrsSigstore { payloads });
                }
            }
            Ok(())
        }

        fn reads_others(&self) -> bool {
            matches!(self, Self::Reader(_))
        }

        fn emit(&self) -> Tree {
            Tree::Null
        }
    }

    fn attestors(fakes: impl IntoIterator<Item = Fake>) -> Attestors {
        Attestors::new(
            fakes
                .into_iter()
                .map(|fake| Arc::new(fake) as Arc<dyn Attestor>),
        )
    }

    fn open(pid: u32) -> Arc<Peer> {
        Arc::new(Peer::open(i32::try_from(pid).unwrap(), 0, 0).unwrap())
    }

    fn own() -> Arc<Peer> {
        open(std::process::id())
    }

    #[tokio::test]
    async fn a_failing_base_means_no_attributes() {
        let found = attestors([Fake::Fails, Fake::Service]).attest(&own()).await;
        assert_eq!(*found.unwrap().attributes(), WorkloadAttrs::default());
    }

    #[tokio::test]
    async fn another_failing_one_is_left_out() {
        let found = attestors([Fake::Unix, Fake::Fails])
            .attest(&own())
            .await
            .unwrap();
        assert!(found.attributes().unix.is_some());
        assert!(found.attributes().systemd.is_none());
        let found = attestors([Fake::Unix, Fake::Service])
            .attest(&own())
            .await
            .unwrap();
        assert!(found.attributes().systemd.is_some());
    }

    /// Counts how often it is asked.
    #[derive(Debug, Default)]
    struct Counting(std::sync::atomic::AtomicUsize);

    #[async_trait]
    impl Attestor for Counting {
        fn name(&self) -> &'static str {
            "counting"
        }

        async fn attest(
            &self,
            _peer: &Peer,
            _found: &mut WorkloadAttrs,
        ) -> Result<(), AttestError> {
            self.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            Ok(())
        }

        fn emit(&self) -> Tree {
            Tree::Null
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_is_looked_at_once_a_second_while_it_runs_the_same_program() {
        let counting = Arc::new(Counting::default());
        let asked = || counting.0.load(std::sync::atomic::Ordering::Relaxed);
        let attestors = Attestors::new([Arc::clone(&counting) as Arc<dyn Attestor>]);
        // `sh` becomes `cat` when it is told to; both wait for their standard input.
        let mut child = std::process::Command::new("sh")
            .args(["-c", "read go; exec cat"])
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let peer = open(child.id());
        assert_eq!(attestors.known(&peer), None);
        let found = attestors.attest(&peer).await.unwrap();
        attestors.attest(&peer).await.unwrap();
        assert_eq!(attestors.known(&peer), Some(found));
        assert_eq!(asked(), 1);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(attestors.known(&peer), None);
        attestors.attest(&peer).await.unwrap();
        assert_eq!(asked(), 2);

        let mut input = child.stdin.take().unwrap();
        input.write_all(b"go\nx").unwrap();
        let mut echoed = [0];
        child
            .stdout
            .take()
            .unwrap()
            .read_exact(&mut echoed)
            .unwrap();
        attestors.attest(&peer).await.unwrap();
        assert_eq!(asked(), 3, "it runs another program");
        assert_eq!(attestors.known(&peer), None, "it did not connect with this");
        assert!(!peer.is_unchanged());
        drop(input);
        child.wait().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_hanging_one_is_cut_off() {
        let found = attestors([Fake::Unix, Fake::Hangs])
            .attest(&own())
            .await
            .unwrap();
        assert!(found.attributes().unix.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn all_together_take_as_long_as_the_slowest() {
        let fakes = || {
            attestors([
                Fake::Unix,
                Fake::Reader(2),
                Fake::Slow(7),
                Fake::Container(5),
                Fake::Fails,
            ])
        };
        let begun = Instant::now();
        let found = fakes().attest(&own()).await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), 7 + 2);
        let found = found.attributes();
        assert!(found.unix.is_some() && found.docker.is_some() && found.systemd.is_some());
        let payloads = &found.sigstore.as_ref().unwrap().payloads;
        assert_eq!(payloads.len(), 1, "who reads others runs after them");

        let begun = Instant::now();
        let seen = fakes().explain(&own()).await.unwrap();
        assert_eq!(begun.elapsed().as_secs(), 7 + 2);
        let fields = |seen: &Result<WorkloadAttrs, String>| {
            let seen = seen.as_ref().ok()?;
            Some([
                seen.systemd.is_some(),
                seen.docker.is_some(),
                seen.sigstore.is_some(),
            ])
        };
        let seen: Vec<_> = seen.iter().map(|(_, seen)| fields(seen)).collect();
        let expected = [
            Some([false, false, false]),
            Some([true, false, false]),
            Some([false, true, false]),
            None,
            Some([true, true, true]),
        ];
        assert_eq!(seen, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn a_hanging_one_delays_nobody_beside_it() {
        let found = attestors([Fake::Unix, Fake::Hangs, Fake::Slow(39)])
            .attest(&own())
            .await
            .unwrap();
        assert!(found.attributes().systemd.is_some());
    }

    #[tokio::test]
    async fn a_peer_that_ends_meanwhile_gets_nothing() {
        let mut child = tokio::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let peer = open(child.id().unwrap());
        let pid = peer.pid();
        let (reached, on) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let waits = Fake::Waits(Arc::clone(&reached), Arc::clone(&on));
        let attestors = attestors([Fake::Unix, waits]);
        let exit = async {
            reached.notified().await;
            drop(child.stdin.take());
            child.wait().await.unwrap();
            on.notify_one();
        };
        let (found, ()) = tokio::join!(attestors.attest(&peer), exit);
        assert_eq!(found, Err(Gone { pid }));
    }
}
