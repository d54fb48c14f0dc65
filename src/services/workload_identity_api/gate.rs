//! The gate: who floods the socket is kept from it by the kernel.
//!
//! A connection costs the agent two system calls, and the processor time for them, even if all it does is to hang
//! up. One that the file of the socket does not permit costs it nothing. So a user who floods is barred there, by
//! an entry in the file's access control list, for a moment at a time.
//!
//! This goes as far as the list does: the file's owner is not barred by it, nor is root, nor anybody where the agent may
//! not change it, where somebody else wrote a list, or where the file system has none. Their connections are
//! dropped one by one.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;

use rustix::process::setpriority_process;
use tokio::time::Instant;

use super::door;
use super::floods::{BARRED, Floods, Verdict};
use crate::backoff::{Loudness, Repeated};
use crate::fsx::SocketFile;

/// The thread's stack, in bytes.
const STACK: usize = 128 * 1024;
/// Users that may wait to be barred. Those beyond are named again soon.
const WAITING: usize = 64;

/// What stands before the door. It lets everybody in again when it is dropped.
#[derive(Debug)]
pub(super) struct Gate {
    floods: Floods,
    /// `None` without a file.
    keeper: Option<Keeper>,
}

/// The thread that changes the file. That may be on a disk that is busy, and the door is not to wait for it.
#[derive(Debug)]
struct Keeper {
    barred: SyncSender<u32>,
    thread: JoinHandle<()>,
}

impl Gate {
    /// Nobody is barred yet. Without a file, nobody ever is.
    pub(super) fn new(file: Option<SocketFile>) -> io::Result<Self> {
        Ok(Self {
            floods: Floods::default(),
            keeper: file.map(Keeper::start).transpose()?,
        })
    }

    /// A connection of this user was dropped, as too many wait.
    pub(super) fn dropped(&mut self, user: u32) {
        let verdict = self.floods.dropped(user, Instant::now());
        self.follow(user, verdict);
    }

    /// A connection of this user came to a crowd that waits.
    pub(super) fn crowded(&mut self, user: u32) {
        let verdict = self.floods.crowded(user, Instant::now());
        self.follow(user, verdict);
    }

    fn follow(&self, user: u32, verdict: Verdict) {
        let (Verdict::Goes { news }, Some(keeper)) = (verdict, &self.keeper) else {
            return;
        };
        if news {
            tracing::warn!(
                uid = user,
                "A user floods the socket: barring it from connecting, for a tenth of a second at a time, while \
                 that lasts"
            );
        }
        // Who is not heard of now is named again with one of the next connections.
        let _told = keeper.barred.try_send(user);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some(Keeper { barred, thread }) = self.keeper.take() {
            drop(barred);
            // One that panicked has told of it.
            let _ended = thread.join();
        }
    }
}

impl Keeper {
    fn start(file: SocketFile) -> io::Result<Self> {
        let (barred, named) = sync_channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("tbot-gate".to_owned())
            .stack_size(STACK)
            .spawn(move || keep(&file, &named))?;
        Ok(Self { barred, thread })
    }
}

/// Bars each user who is named for a while, until nobody can be named any more.
fn keep(file: &SocketFile, named: &Receiver<u32>) {
    // As the door, which it is to relieve.
    let _allowed = setpriority_process(None, door::PRIORITY);
    let mut barred = Barred::new(file);
    loop {
        let next = match barred.until() {
            None => named
                .recv()
                .map_err(|_closed| RecvTimeoutError::Disconnected),
            Some(until) => named.recv_timeout(until.saturating_duration_since(Instant::now())),
        };
        match next {
            Ok(user) => barred.add(user, Instant::now()),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return barred.admit(barred.users.len()),
        }
        barred.admit_whose_time_is_over(Instant::now());
    }
}

/// Who is barred from a file, and until when.
#[derive(Debug)]
struct Barred<'a> {
    file: &'a SocketFile,
    /// All for the same time: who came first leaves first.
    users: VecDeque<(Instant, u32)>,
    failures: Repeated,
}

impl<'a> Barred<'a> {
    fn new(file: &'a SocketFile) -> Self {
        Self {
            file,
            users: VecDeque::new(),
            failures: Repeated::default(),
        }
    }

    /// When the first of them is to be let in again.
    fn until(&self) -> Option<Instant> {
        self.users.front().map(|(until, _)| *until)
    }

    fn add(&mut self, user: u32, now: Instant) {
        let barred = bar(self.file, user);
        if self.succeeded(
            barred,
            "Cannot bar a user who floods: its connections are dropped one by one",
        ) {
            self.users.retain(|(_, other)| *other != user);
            self.users.push_back((now + BARRED, user));
        }
    }

    fn admit_whose_time_is_over(&mut self, now: Instant) {
        let over = self.users.partition_point(|(until, _)| *until <= now);
        self.admit(over);
        // Where that was not possible, it is tried again.
        let late = self.users.iter_mut().filter(|(until, _)| *until <= now);
        late.for_each(|(until, _)| *until = now + BARRED);
    }

    /// Lets the first `count` of them in again.
    fn admit(&mut self, count: usize) {
        if count == 0 {
            return;
        }
        let users = self.users.iter().take(count).map(|(_, user)| *user);
        let admitted = self.file.acl().and_then(|mut acl| {
            users.for_each(|user| acl.unbar(user));
            self.file.set_acl(&acl)
        });
        if self.succeeded(
            admitted,
            "Cannot let users in again who were barred from the socket",
        ) {
            self.users.drain(..count);
        }
    }

    fn succeeded(&mut self, result: io::Result<()>, otherwise: &str) -> bool {
        match result {
            Ok(()) => {
                self.failures.recovered();
                true
            }
            Err(source) => {
                if let Loudness::Warn = self.failures.failed(Instant::now(), &source) {
                    tracing::warn!(%source, "{otherwise}");
                }
                false
            }
        }
    }
}

fn bar(file: &SocketFile, user: u32) -> io::Result<()> {
    if user == 0 || file.owner()? == user {
        return Err(io::Error::other("it is root, or owns the socket"));
    }
    let mut acl = file.acl()?;
    if !acl.bar(user) {
        return Err(io::Error::other(
            "the socket has an access control list that is not the agent's",
        ));
    }
    file.set_acl(&acl)
}

/// Lets everybody in whom an agent had barred that ended without doing so itself.
pub(super) fn reopen(file: &SocketFile) -> io::Result<()> {
    let mut acl = file.acl()?;
    let users = acl.barred().unwrap_or_default();
    if users.is_empty() {
        return Ok(());
    }
    tracing::info!(
        ?users,
        "Letting users in whom an agent that ended had barred from the socket"
    );
    users.into_iter().for_each(|user| acl.unbar(user));
    file.set_acl(&acl)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::time::Duration;

    use nix::unistd::setfsuid;

    use super::*;
    use crate::fsx::acl::{Acl, Reader};

    /// A user who is neither root nor the owner of what tests make.
    const USER: u32 = 65_534;
    const NOBODY: [u32; 0] = [];

    struct World {
        _home: tempfile::TempDir,
        path: PathBuf,
        _listener: UnixListener,
    }

    impl World {
        fn new() -> Self {
            let home = tempfile::tempdir().unwrap();
            let path = home.path().join("s");
            let listener = UnixListener::bind(&path).unwrap();
            Self {
                _home: home,
                path,
                _listener: listener,
            }
        }

        fn file(&self) -> SocketFile {
            SocketFile::hold(&self.path).unwrap()
        }

        fn barred(&self) -> Vec<u32> {
            self.file().acl().unwrap().barred().unwrap()
        }

        /// Does something over and over until these are barred.
        fn until(&self, barred: &[u32], mut act: impl FnMut()) {
            let end = Instant::now() + Duration::from_secs(30);
            while self.barred() != barred {
                assert!(Instant::now() < end, "{:?}, not {barred:?}", self.barred());
                act();
                std::thread::yield_now();
            }
        }
    }

    #[test]
    fn who_floods_is_barred_for_a_moment_and_again() {
        let world = World::new();
        let before = world.file().acl().unwrap();
        let mut gate = Gate::new(Some(world.file())).unwrap();
        world.until(&[USER], || gate.dropped(USER));
        world.until(&NOBODY, || ());
        assert_eq!(world.file().acl().unwrap(), before);
        world.until(&[USER], || gate.crowded(USER));
        world.until(&NOBODY, || ());
    }

    #[test]
    fn everybody_is_let_in_when_the_gate_is_gone() {
        let world = World::new();
        let before = world.file().acl().unwrap();
        let mut gate = Gate::new(Some(world.file())).unwrap();
        world.until(&[USER], || gate.dropped(USER));
        drop(gate);
        assert_eq!(world.file().acl().unwrap(), before);
    }

    #[test]
    fn who_is_named_again_stays_out_for_as_long_again() {
        let world = World::new();
        let file = world.file();
        let (mut barred, start) = (Barred::new(&file), Instant::now());
        barred.add(USER, start);
        barred.add(USER + 1, start);
        barred.add(USER, start + BARRED / 2);
        barred.admit_whose_time_is_over(start + BARRED);
        assert_eq!(world.barred(), [USER]);
        barred.admit_whose_time_is_over(start + BARRED / 2 + BARRED);
        assert_eq!(world.barred(), NOBODY);
        assert_eq!(barred.until(), None);
    }

    #[test]
    fn who_could_not_be_let_in_is_tried_again() {
        if !nix::unistd::geteuid().is_root() {
            return; // Losing the right to the file takes root.
        }
        let world = World::new();
        let file = world.file();
        let (mut barred, start) = (Barred::new(&file), Instant::now());
        barred.add(USER, start);
        // Of this thread alone.
        setfsuid(USER.into());
        barred.admit_whose_time_is_over(start + BARRED);
        setfsuid(0.into());
        assert_eq!(world.barred(), [USER]);
        let again = barred.until().unwrap();
        assert_eq!(again, start + BARRED * 2);
        barred.admit_whose_time_is_over(again);
        assert_eq!(world.barred(), NOBODY);
    }

    #[test]
    fn root_and_the_owner_are_not_barred() {
        let world = World::new();
        let file = world.file();
        let before = file.acl().unwrap();
        for user in [0, file.owner().unwrap()] {
            let refused = bar(&file, user).unwrap_err().to_string();
            assert!(refused.contains("owns the socket"), "{refused}");
        }
        assert_eq!(file.acl().unwrap(), before);
    }

    #[test]
    fn a_list_that_somebody_made_is_left_alone() {
        let world = World::new();
        let file = world.file();
        let theirs = Acl::shared_file(&[Reader::User(USER)], &[]);
        file.set_acl(&theirs).unwrap();
        assert!(bar(&file, USER + 1).is_err());
        reopen(&file).unwrap();
        assert_eq!(file.acl().unwrap(), theirs);
    }

    #[test]
    fn who_was_barred_when_an_agent_ended_is_let_in() {
        let world = World::new();
        let file = world.file();
        let before = file.acl().unwrap();
        bar(&file, USER).unwrap();
        bar(&file, USER + 1).unwrap();
        reopen(&file).unwrap();
        assert_eq!(file.acl().unwrap(), before);
    }

    #[test]
    fn without_a_file_nobody_is_barred() {
        let mut gate = Gate::new(None).unwrap();
        (0..1000).for_each(|_| gate.dropped(USER));
    }
}
