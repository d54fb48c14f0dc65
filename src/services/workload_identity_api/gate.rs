//! The gate: who floods the socket is kept from it by the kernel.
//!
//! A connection costs the agent three system calls, and the processor time for them, even if all it does is to hang
//! up. One that the file of the socket does not permit costs it nothing. So a user who floods is barred there, by
//! an entry in the file's access control list, for a moment at a time.
//!
//! This goes as far as the list does: it says nothing to root and to the owner of the file, and is of no use where the
//! agent may not change it, where somebody else wrote one, or where the file system has none. Connections of
//! such a flood are dropped one by one.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;

use rustix::process::setpriority_process;
use tokio::time::Instant;

use super::door;
use super::floods::{BARRED_FOR, Floods, Verdict};
use crate::backoff::{Loudness, Repeated};
use crate::fsx::SocketFile;

/// The thread's stack, in bytes.
const STACK: usize = 128 * 1024;
/// Users that may wait to be barred.
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
    orders: SyncSender<Order>,
    thread: JoinHandle<()>,
}

/// To bar a user.
#[derive(Debug)]
struct Order {
    user: u32,
    /// It is to be told in the log.
    first: bool,
}

impl Gate {
    /// Nobody is barred yet. Without a file, nobody ever is.
    pub(super) fn new(file: Option<Arc<SocketFile>>) -> io::Result<Self> {
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
        if let (Verdict::Bar { first }, Some(keeper)) = (verdict, &self.keeper) {
            // Where too many are to be barred already, this one's turn comes again if it goes on.
            let _ordered = keeper.orders.try_send(Order { user, first });
        }
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        if let Some(Keeper { orders, thread }) = self.keeper.take() {
            drop(orders);
            // One that panicked has told of it.
            let _ended = thread.join();
        }
    }
}

impl Keeper {
    fn start(file: Arc<SocketFile>) -> io::Result<Self> {
        let (orders, given) = sync_channel(WAITING);
        let thread = std::thread::Builder::new()
            .name("tbot-gate".to_owned())
            .stack_size(STACK)
            .spawn(move || keep(&file, &given))?;
        Ok(Self { orders, thread })
    }
}

/// Follows orders until nobody can give any more, and lets everybody in then.
fn keep(file: &SocketFile, orders: &Receiver<Order>) {
    // As the door, which it is to relieve.
    let _allowed = setpriority_process(None, door::PRIORITY);
    let mut bars = Bars::of(file);
    loop {
        let order = match bars.next() {
            None => orders.recv().map_err(RecvTimeoutError::from),
            Some(next) => orders.recv_timeout(next.saturating_duration_since(Instant::now())),
        };
        match order {
            Ok(order) => bars.add(&order, Instant::now()),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return bars.lift(|_| true, Instant::now()),
        }
        let now = Instant::now();
        bars.lift(|until| until <= now, now);
    }
}

/// Who is barred from a file, and until when.
#[derive(Debug)]
struct Bars<'a> {
    file: &'a SocketFile,
    users: HashMap<u32, Instant>,
    failures: Repeated,
}

impl<'a> Bars<'a> {
    fn of(file: &'a SocketFile) -> Self {
        Self {
            file,
            users: HashMap::new(),
            failures: Repeated::default(),
        }
    }

    /// When the next of them is to be let in again.
    fn next(&self) -> Option<Instant> {
        self.users.values().min().copied()
    }

    fn add(&mut self, order: &Order, now: Instant) {
        let uid = order.user;
        match bar(self.file, uid) {
            Ok(()) => {
                self.users.insert(uid, now + BARRED_FOR);
                if order.first {
                    tracing::warn!(
                        uid,
                        "A user floods the socket: it may not connect for a tenth of a second, and again as long as \
                         that lasts"
                    );
                }
            }
            Err(reason) if order.first => tracing::warn!(
                uid,
                %reason,
                "A user floods the socket and cannot be barred from it: its connections are dropped one by one"
            ),
            Err(reason) => tracing::debug!(uid, %reason, "Cannot bar a user who floods the socket"),
        }
    }

    /// Lets those in again whose time is `over`. Where that is not possible, it is tried again later.
    fn lift(&mut self, over: impl Fn(Instant) -> bool, now: Instant) {
        let late = self.users.iter().filter(|(_, until)| over(**until));
        let late: Vec<u32> = late.map(|(user, _)| *user).collect();
        if late.is_empty() {
            return;
        }
        match admit(self.file, &late) {
            Ok(()) => {
                self.failures.recovered();
                self.users.retain(|_, until| !over(*until));
            }
            Err(source) => {
                if let Loudness::Warn = self.failures.failed(now, &source) {
                    tracing::warn!(
                        users = ?late, %source,
                        "Cannot let users in again who were barred from the socket"
                    );
                }
                for until in self.users.values_mut().filter(|until| over(**until)) {
                    *until = now + BARRED_FOR;
                }
            }
        }
    }
}

fn bar(file: &SocketFile, user: u32) -> io::Result<()> {
    if user == 0 || user == file.owner()? {
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

fn admit(file: &SocketFile, users: &[u32]) -> io::Result<()> {
    let mut acl = file.acl()?;
    for user in users {
        acl.unbar(*user);
    }
    file.set_acl(&acl)
}

/// Lets everybody in whom an agent had barred that ended without doing so itself.
pub(super) fn reopen(file: &SocketFile) -> io::Result<()> {
    let users = file.acl()?.barred().unwrap_or_default();
    if users.is_empty() {
        return Ok(());
    }
    tracing::info!(
        ?users,
        "Letting users in whom an agent that ended had barred from the socket"
    );
    admit(file, &users)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::time::Duration;

    use nix::unistd::setfsuid;

    use super::super::floods::DROPPED;
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

        fn gate(&self) -> Gate {
            Gate::new(Some(Arc::new(self.file()))).unwrap()
        }

        fn acl(&self) -> Acl {
            self.file().acl().unwrap()
        }

        fn barred(&self) -> Vec<u32> {
            self.acl().barred().unwrap()
        }
    }

    /// Does something over and over until it has an effect.
    fn until(seen: impl Fn() -> bool, mut act: impl FnMut()) {
        let end = Instant::now() + Duration::from_secs(30);
        while !seen() {
            assert!(Instant::now() < end, "no effect");
            act();
            std::thread::yield_now();
        }
    }

    fn flood(gate: &mut Gate) {
        (0..DROPPED).for_each(|_| gate.dropped(USER));
    }

    fn order(user: u32) -> Order {
        Order { user, first: true }
    }

    #[test]
    fn who_floods_is_barred_for_a_moment_and_again() {
        let world = World::new();
        let before = world.acl();
        let mut gate = world.gate();
        until(|| world.barred() == [USER], || flood(&mut gate));
        until(|| world.acl() == before, || ());
        until(|| world.barred() == [USER], || gate.crowded(USER));
        until(|| world.acl() == before, || ());
    }

    #[test]
    fn everybody_is_let_in_when_the_gate_is_gone() {
        let world = World::new();
        let before = world.acl();
        let mut gate = world.gate();
        until(|| world.barred() == [USER], || flood(&mut gate));
        drop(gate);
        assert_eq!(world.acl(), before);
    }

    #[test]
    fn who_is_named_again_stays_out_for_as_long_again() {
        let world = World::new();
        let file = world.file();
        let (mut bars, start) = (Bars::of(&file), Instant::now());
        let over = |bars: &mut Bars<'_>, now| bars.lift(|until| until <= now, now);
        bars.add(&order(USER), start);
        bars.add(&order(USER + 1), start);
        bars.add(&order(USER), start + BARRED_FOR / 2);
        over(&mut bars, start + BARRED_FOR);
        assert_eq!(world.barred(), [USER]);
        over(&mut bars, start + BARRED_FOR * 2);
        assert_eq!(world.barred(), NOBODY);
        assert_eq!(bars.next(), None);
    }

    #[test]
    fn who_could_not_be_let_in_is_tried_again() {
        if !nix::unistd::geteuid().is_root() {
            assert!(
                std::env::var_os("CI").is_none(),
                "losing the right to the file takes root"
            );
            return;
        }
        let world = World::new();
        let file = world.file();
        let (mut bars, start) = (Bars::of(&file), Instant::now());
        let over = |bars: &mut Bars<'_>, now| bars.lift(|until| until <= now, now);
        bars.add(&order(USER), start);
        // Of this thread alone.
        setfsuid(USER.into());
        over(&mut bars, start + BARRED_FOR);
        setfsuid(0.into());
        assert_eq!(world.barred(), [USER]);
        assert_eq!(bars.next(), Some(start + BARRED_FOR * 2));
        over(&mut bars, start + BARRED_FOR * 2);
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
        flood(&mut gate);
        assert!(gate.keeper.is_none());
    }
}
