//! The process at the other end of a unix socket, pinned when its connection was accepted.
//!
//! A process ID alone names whoever holds it *now*. The pidfd taken here names one process for
//! good: as long as it reports that the process lives, `/proc/<pid>` and every answer about that
//! ID are about the process that connected.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::{PeerCredentials, PeerPidfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::attested::{Attested, Process};
use super::limits::Owner;
use super::program::Program;
use crate::fsx::read_proc;

/// The longest `/proc/<pid>/stat` that is read, in bytes. Real ones have a few hundred.
const MAX_STAT: u64 = 16 * 1024;

/// Why a peer could not be pinned. The connection is of no use then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// The process ended before it could be looked at.
    #[error("process {pid} ended before it could be identified")]
    Gone {
        /// Its former process ID.
        pid: i32,
    },
    /// The kernel refused to say who connected, or to give a handle on that process.
    #[error("cannot identify the process at the other end: {action}: {source}")]
    Unknown {
        /// The system call.
        action: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What the kernel noted about who connected, at the moment of `connect(2)` (`SO_PEERCRED`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Credentials {
    /// The process ID; 0 for one of another PID namespace.
    pub pid: i32,
    /// The effective user ID.
    pub uid: u32,
    /// The effective group ID.
    pub gid: u32,
}

impl Credentials {
    /// Those of who connected `stream`.
    pub fn of(stream: &impl AsFd) -> io::Result<Self> {
        let found = getsockopt(stream, PeerCredentials)?;
        Ok(Self {
            pid: found.pid(),
            uid: found.uid(),
            gid: found.gid(),
        })
    }
}

/// A process that connected, pinned by a pidfd. IDs are those of the moment of `connect(2)`.
#[derive(Debug)]
pub struct Peer {
    credentials: Credentials,
    owner: Owner,
    pidfd: AsyncFd<OwnedFd>,
    /// `/proc/<pid>` as of this process: once that has ended, nothing is found in it, whoever has the ID
    /// by then.
    directory: Option<OwnedFd>,
    /// What it ran when it was pinned.
    connected: Option<Program>,
    memo: Mutex<Option<Memo>>,
    looking: tokio::sync::Mutex<()>,
}

/// What was found out about a peer, and of which program.
#[derive(Debug)]
struct Memo {
    program: Program,
    at: Instant,
    /// Whether every attestor had its say.
    complete: bool,
    attested: Arc<Attested>,
}

impl Peer {
    /// Whether `pidfd`, had of a connection that was made under these IDs, is a handle on this process, which
    /// still runs the program that it was pinned with. Cannot be told where its file may not be looked at.
    pub(super) fn made(&self, pidfd: &OwnedFd, credentials: Credentials) -> bool {
        // While that process lives nobody else has its ID. This one had the ID before, and if it is found to live
        // after that, it lived then too: they are one. The order of the two looks matters.
        credentials == self.credentials
            && matches!(self.connected, Some(Program::File { .. }))
            && !has_exited(pidfd)
            && self.is_unchanged()
    }

    /// Whether nobody holds the other end of a connection any more.
    pub fn has_hung_up(stream: &impl AsFd) -> bool {
        now_ready(stream.as_fd(), PollFlags::HUP, PollFlags::HUP)
    }

    /// Pins a running process by its ID, for callers that know it is the right one.
    pub fn open(pid: i32, uid: u32, gid: u32) -> Result<Self, PeerError> {
        Self::pinned(Credentials { pid, uid, gid }, open_checked(pid)?)
    }

    #[expect(
        deprecated,
        reason = "the replacement is unsafe only for types whose descriptor may change; an OwnedFd \
                  keeps one open for its whole life, and this crate has no unsafe code"
    )]
    pub(super) fn pinned(credentials: Credentials, pidfd: OwnedFd) -> Result<Self, PeerError> {
        let Credentials { pid, uid, .. } = credentials;
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE).map_err(|source| {
            PeerError::Unknown {
                action: "epoll on a pidfd",
                source,
            }
        })?;
        let mut peer = Self {
            credentials,
            owner: Owner::of(pid, uid),
            pidfd,
            directory: directory(pid)?,
            connected: None,
            memo: Mutex::new(None),
            looking: tokio::sync::Mutex::new(()),
        };
        // Its ID was not free before, so this is its directory.
        if peer.is_alive() {
            peer.connected = peer.program();
        } else {
            peer.directory = None;
        }
        Ok(peer)
    }

    /// The process ID.
    pub fn pid(&self) -> i32 {
        self.credentials.pid
    }

    /// The effective user ID at connect.
    pub fn uid(&self) -> u32 {
        self.credentials.uid
    }

    /// The effective group ID at connect.
    pub fn gid(&self) -> u32 {
        self.credentials.gid
    }

    /// Whom its connections and calls count for: its user, and its cgroup when it was pinned.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// The handle itself, for calls that take one instead of an ID.
    pub fn pidfd(&self) -> &OwnedFd {
        self.pidfd.get_ref()
    }

    /// What the process runs now; `None` where that may not be looked at.
    pub(super) fn program(&self) -> Option<Program> {
        Program::of(self.directory.as_ref()?)
    }

    /// Which process it is, for good; `None` where that may not be looked at.
    pub(super) fn process(&self) -> Option<Process> {
        Process::of(self.pid())
    }

    /// What was found out since `since`, if that is of the program that it connected with. Says nothing of
    /// what it runs now: see [`Peer::is_unchanged`].
    pub(super) fn remembered(&self, since: impl FnOnce(Instant) -> bool) -> Option<Arc<Attested>> {
        let (attested, _) = self.recall(self.connected, true, since)?;
        Some(attested)
    }

    /// What was found out since `since` about a peer that runs `program`; with `complete`, only if
    /// every attestor had its say.
    pub(super) fn recall(
        &self,
        program: Option<Program>,
        complete: bool,
        since: impl FnOnce(Instant) -> bool,
    ) -> Option<(Arc<Attested>, bool)> {
        let program = program?;
        let memo = self.memo.lock().unwrap_or_else(PoisonError::into_inner);
        let memo = memo.as_ref()?;
        let known = memo.program == program && (memo.complete || !complete) && since(memo.at);
        known.then(|| (Arc::clone(&memo.attested), memo.complete))
    }

    /// Keeps what was found out while it ran `program`.
    pub(super) fn remember(
        &self,
        program: Option<Program>,
        complete: bool,
        attested: &Arc<Attested>,
    ) {
        let Some(program) = program else {
            return;
        };
        let mut memo = self.memo.lock().unwrap_or_else(PoisonError::into_inner);
        *memo = Some(Memo {
            program,
            at: Instant::now(),
            complete,
            attested: Arc::clone(attested),
        });
    }

    /// Waits until nobody else is finding out about it.
    pub(super) async fn looking(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.looking.lock().await
    }

    /// Whether the process still runs, and still runs the program that it was pinned with. Where
    /// `/proc` hides other users' processes (`hidepid=`) that it runs is all that can be told.
    pub fn is_unchanged(&self) -> bool {
        // A process that has ended runs no program: where one is seen, this is one system call, and it is
        // made before everything that is sent.
        self.program() == self.connected && (self.connected.is_some() || self.is_alive())
    }

    /// Whether the process still runs. What was read about its ID before a `true` was about it.
    pub fn is_alive(&self) -> bool {
        !has_exited(self.pidfd.get_ref())
    }

    /// Waits until the process has ended.
    pub async fn exited(&self) {
        loop {
            match self.pidfd.readable().await {
                Ok(mut guard) => {
                    if !self.is_alive() {
                        return;
                    }
                    guard.clear_ready();
                }
                // The runtime is shutting down: nobody is left to be served.
                Err(_) => return,
            }
        }
    }
}

/// A handle on the process that connected `stream`, which is one for good.
pub(super) fn handle(stream: &impl AsFd, credentials: Credentials) -> Result<OwnedFd, PeerError> {
    let Credentials { pid, uid, gid } = credentials;
    match getsockopt(stream, PeerPidfd) {
        Ok(pidfd) => Ok(pidfd),
        // Linux before 6.5 has no such option.
        Err(Errno::ENOPROTOOPT) => {
            tell_fallback();
            let accepted = uptime();
            let pidfd = open_checked(pid)?;
            let facts = Facts {
                started: start_time(pid),
                accepted,
                owners: owners(pid),
                hung_up: Peer::has_hung_up(stream),
                alive: !has_exited(&pidfd),
            };
            if !facts.name_the_caller(uid, gid) {
                return Err(PeerError::Gone { pid });
            }
            Ok(pidfd)
        }
        // The process is reaped (kernels before 6.16), so nothing can be told about it.
        Err(Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => Err(PeerError::Gone { pid }),
        Err(source) => Err(PeerError::Unknown {
            action: "SO_PEERPIDFD",
            source: source.into(),
        }),
    }
}

/// A pidfd becomes readable when its process ends. A failing poll counts as ended.
fn has_exited(pidfd: &OwnedFd) -> bool {
    now_ready(pidfd.as_fd(), PollFlags::IN, PollFlags::all())
}

/// Whether a poll that asks for `events` finds any of `wanted`. A failing poll counts as a yes.
fn now_ready(fd: BorrowedFd<'_>, events: PollFlags, wanted: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, events)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    loop {
        match poll(&mut fds, Some(&now)) {
            Ok(_) => return fds.iter().any(|fd| fd.revents().intersects(wanted)),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
        }
    }
}

/// What tells whether a process that has the ID of a caller is that caller, where the kernel gives
/// no handle on the caller itself.
///
/// The ID of a caller that ended is free for others. Its end closes its connection, unless it left
/// that to a child; the one who got its ID began later, and as whoever it is.
#[derive(Debug, Clone, Copy)]
struct Facts {
    /// When the process began, in clock ticks since boot.
    started: Option<u64>,
    /// When the connection was accepted, the same way.
    accepted: Option<u64>,
    /// The effective user and group that the process has.
    owners: Option<(u32, u32)>,
    /// Whether the other end of the connection was closed.
    hung_up: bool,
    /// Whether the process still runs. Looked at last, so that the rest is about it.
    alive: bool,
}

impl Facts {
    /// Whether all of it fits a caller that connected with these IDs. What cannot be known does not
    /// fit.
    fn name_the_caller(&self, uid: u32, gid: u32) -> bool {
        let began_before = matches!(
            (self.started, self.accepted),
            (Some(started), Some(accepted)) if started <= accepted
        );
        began_before && self.owners == Some((uid, gid)) && !self.hung_up && self.alive
    }
}

/// Clock ticks since boot. Both this and a process's start are hundredths of a second to user space
/// (`USER_HZ`), whatever the kernel's own clock.
fn uptime() -> Option<u64> {
    parse_uptime(&std::fs::read_to_string("/proc/uptime").ok()?)
}

fn parse_uptime(text: &str) -> Option<u64> {
    let (seconds, hundredths) = text.split_ascii_whitespace().next()?.split_once('.')?;
    let rest: u64 = hundredths.parse().ok().filter(|_| hundredths.len() == 2)?;
    seconds
        .parse::<u64>()
        .ok()?
        .checked_mul(100)?
        .checked_add(rest)
}

/// The directory of a process; `None` where that may not be looked at, or is no more. Without it, nobody notices
/// that the process executes another program: descriptors that have run out are no reason to do without.
fn directory(pid: i32) -> Result<Option<OwnedFd>, PeerError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match open(format!("/proc/{pid}"), flags, Mode::empty()) {
        Ok(directory) => Ok(Some(directory)),
        Err(
            rustix::io::Errno::NOENT
            | rustix::io::Errno::SRCH
            | rustix::io::Errno::ACCESS
            | rustix::io::Errno::PERM,
        ) => Ok(None),
        Err(source) => Err(PeerError::Unknown {
            action: "open /proc/<pid>",
            source: source.into(),
        }),
    }
}

/// The effective user and group of a process.
fn owners(pid: i32) -> Option<(u32, u32)> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    parse_owners(&status)
}

fn parse_owners(status: &str) -> Option<(u32, u32)> {
    // Real, effective, saved and file system IDs.
    let effective = |name: &str| {
        let mut lines = status.lines();
        let ids = lines.find_map(|line| line.strip_prefix(name))?;
        ids.split_ascii_whitespace().nth(1)?.parse().ok()
    };
    Some((effective("Uid:")?, effective("Gid:")?))
}

/// Opens a pidfd by ID and checks by the start time that the ID named one process all the while.
fn open_checked(pid: i32) -> Result<OwnedFd, PeerError> {
    let gone = || PeerError::Gone { pid };
    let before = start_time(pid).ok_or_else(gone)?;
    let id = Pid::from_raw(pid).ok_or_else(gone)?;
    let pidfd = pidfd_open(id, PidfdFlags::empty()).map_err(|source| match source {
        rustix::io::Errno::SRCH => gone(),
        other => PeerError::Unknown {
            action: "pidfd_open",
            source: other.into(),
        },
    })?;
    if start_time(pid) != Some(before) || has_exited(&pidfd) {
        return Err(gone());
    }
    Ok(pidfd)
}

/// Field 22 of `/proc/<pid>/stat`: clock ticks from boot to the start of the process.
pub(super) fn start_time(pid: i32) -> Option<u64> {
    let stat = read_proc(format!("/proc/{pid}/stat"), MAX_STAT).ok()?;
    parse_start_time(&String::from_utf8_lossy(&stat))
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The command name stands in parentheses and may hold anything, parentheses included.
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn tell_fallback() {
    static TOLD: OnceLock<()> = OnceLock::new();
    TOLD.get_or_init(|| {
        tracing::warn!(
            "This kernel has no SO_PEERPIDFD (Linux 6.5): callers are pinned by pidfd_open, their \
             start time and their user instead"
        );
    });
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.get_ref().as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::Shutdown;
    use std::os::unix::net::UnixStream;
    use std::process::{Child, Command, Stdio};

    use super::*;

    #[test]
    fn start_times_survive_odd_command_names() {
        let fields = "S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4242 20";
        for name in ["cat", "a b", "((x) y)", ") S 1 ("] {
            let stat = format!("77 ({name}) {fields}");
            assert_eq!(parse_start_time(&stat), Some(4242), "{name}");
        }
        for bad in [
            "",
            "77 cat S",
            "77 (cat) S 1 2",
            "77 (cat) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x",
        ] {
            assert_eq!(parse_start_time(bad), None, "{bad}");
        }
    }

    #[test]
    fn fuzz_what_proc_says() {
        let check = bolero::check!().with_type::<(String, u64, u32, u32)>();
        check.for_each(|(name, start, uid, gid)| {
            let fields = format!("S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 {start} 20");
            let stat = format!("77 ({name}) {fields}");
            assert_eq!(parse_start_time(&stat), Some(*start), "{stat:?}");
            // The kernel writes a newline in a name as two characters.
            let name = name.replace(['\n', '\r'], "\\n");
            let status = format!("Name:\t{name}\nUid:\t1\t{uid}\t3\t4\nGid:\t1\t{gid}\t3\t4\n");
            assert_eq!(parse_owners(&status), Some((*uid, *gid)), "{status:?}");
            let _noise = (
                parse_uptime(&name),
                parse_owners(&name),
                parse_start_time(&name),
            );
        });
    }

    #[test]
    fn whoever_got_the_id_of_a_caller_that_ended_is_not_the_caller() {
        let caller = Facts {
            started: Some(100),
            accepted: Some(200),
            owners: Some((1000, 1001)),
            hung_up: false,
            alive: true,
        };
        assert!(caller.name_the_caller(1000, 1001));
        for (why, other) in [
            (
                "began later",
                Facts {
                    started: Some(201),
                    ..caller
                },
            ),
            (
                "no start time",
                Facts {
                    started: None,
                    ..caller
                },
            ),
            (
                "no uptime",
                Facts {
                    accepted: None,
                    ..caller
                },
            ),
            (
                "another user",
                Facts {
                    owners: Some((0, 1001)),
                    ..caller
                },
            ),
            (
                "another group",
                Facts {
                    owners: Some((1000, 0)),
                    ..caller
                },
            ),
            (
                "unknown user",
                Facts {
                    owners: None,
                    ..caller
                },
            ),
            (
                "the caller's end is closed",
                Facts {
                    hung_up: true,
                    ..caller
                },
            ),
            (
                "it ended too",
                Facts {
                    alive: false,
                    ..caller
                },
            ),
        ] {
            assert!(!other.name_the_caller(1000, 1001), "{why}");
        }
    }

    #[test]
    fn facts_are_read_from_proc() {
        assert_eq!(parse_uptime("351735.47 234388.90\n"), Some(35_173_547));
        for bad in [
            "",
            "351735",
            "351735.4",
            "x.47",
            "1.xx",
            "99999999999999999999.00",
        ] {
            assert_eq!(parse_uptime(bad), None, "{bad}");
        }
        let status = "Name:\tcat\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n";
        assert_eq!(parse_owners(status), Some((2, 6)));
        assert_eq!(parse_owners("Uid:\t1\t2\t3\t4\n"), None);
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(start_time(pid).unwrap() <= uptime().unwrap());
        let own = (
            nix::unistd::geteuid().as_raw(),
            nix::unistd::getegid().as_raw(),
        );
        assert_eq!(owners(pid), Some(own));
    }

    #[test]
    fn a_closed_end_is_seen_before_anything_is_read() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"x").unwrap();
        assert!(!Peer::has_hung_up(&ours));
        // Not closed: a process that another test starts has a copy for a moment.
        theirs.shutdown(Shutdown::Both).unwrap();
        assert!(Peer::has_hung_up(&ours));
    }

    /// A process that ends with its standard input, and its ID.
    fn child() -> (Child, i32) {
        let mut command = Command::new("cat");
        let command = command.stdin(Stdio::piped()).stdout(Stdio::null());
        let child = command.spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        (child, pid)
    }

    #[tokio::test]
    async fn a_handle_on_who_ended_is_none_on_who_has_the_id_now() {
        let (mut child, pid) = child();
        let handle = open_checked(pid).unwrap();
        let now = Peer::open(i32::try_from(std::process::id()).unwrap(), 0, 0).unwrap();
        let ids = now.credentials;
        assert!(now.made(&open_checked(now.pid()).unwrap(), ids));
        // As if the ID of the child had become that of this process.
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(!now.made(&handle, ids));
    }

    #[tokio::test]
    async fn an_exit_is_noticed() {
        let (mut child, pid) = child();
        let peer = Peer::open(pid, 0, 0).unwrap();
        assert!(peer.is_alive() && peer.is_unchanged());
        drop(child.stdin.take());
        peer.exited().await;
        assert!(!peer.is_alive() && !peer.is_unchanged());
        child.wait().unwrap();
        assert!(!peer.is_alive(), "a reaped process stays dead");
        assert_eq!(peer.program(), None);
        assert!(matches!(Peer::open(pid, 0, 0), Err(PeerError::Gone { .. })));
    }
}
