//! The door: where those stand who connected and were not looked at yet.
//!
//! In calm, whoever looks at them fetches them too. Once more come at a time than that can keep up
//! with, a thread does nothing but fetch until it is calm again: users who connect in vain cost a few
//! system calls each, and do not fill the queue in the kernel that everybody shares.

use std::io::ErrorKind;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Context;

use futures_util::task::AtomicWaker;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::setpriority_process;
use tokio::net::TcpStream;

use super::limits::Owner;
use super::lines::{Gone, Lines};
use crate::attest::Peer;

/// It is calm again when nobody came for so long.
const CALM: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// The thread's nice value: who floods has many processes, and this one has to be faster than all of them.
const PRIORITY: i32 = -15;
/// The thread's stack, in bytes: it calls nothing deep.
const STACK: usize = 128 * 1024;

/// An accepted connection that nothing was done about.
#[derive(Debug)]
pub(super) enum Arrived {
    Local(UnixStream),
    Remote(TcpStream),
}

impl Arrived {
    /// Whether nobody waits for an answer any more.
    pub(super) fn has_left(&self) -> bool {
        match self {
            Self::Local(stream) => Peer::has_hung_up(stream),
            Self::Remote(_) => false,
        }
    }
}

/// Clones are the same door.
#[derive(Debug, Clone, Default)]
pub(super) struct Door(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    standing: Mutex<Standing>,
    /// Who looks at those who stand here.
    waker: AtomicWaker,
    kept: AtomicBool,
    closed: AtomicBool,
}

#[derive(Debug, Default)]
struct Standing {
    lines: Lines<Arrived>,
    /// A user whom too many wait of, so that one was sent away.
    refused: Option<Owner>,
}

impl Door {
    /// Lets in one more, at the end of its user's line; hangs up where that is full. Says whether nobody
    /// of that user stood there before.
    pub(super) fn enter(&self, arrived: Arrived) -> bool {
        let user = match &arrived {
            Arrived::Local(stream) => Peer::user_of(stream),
            Arrived::Remote(_) => None,
        };
        let mut standing = self.standing();
        let gone = standing.lines.join(user, arrived, Arrived::has_left);
        if matches!(gone, Err(Gone::Refused(_))) {
            standing.refused = Some(Owner { user, cgroup: None });
        }
        // Hanging up is a system call: not while others wait for the lock.
        drop(standing);
        matches!(gone, Ok(true))
    }

    /// The next one, of the users for whom `ready` gives something.
    pub(super) fn next<R>(&self, ready: impl Fn(Option<u32>) -> Option<R>) -> Option<(Arrived, R)> {
        self.standing().lines.next(ready)
    }

    /// A user of whom somebody was sent away since the last question.
    pub(super) fn refused(&self) -> Option<Owner> {
        self.standing().refused.take()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.standing().lines.is_empty()
    }

    /// From now on, this task hears of those who come.
    pub(super) fn watch(&self, context: &Context<'_>) {
        self.0.waker.register(context.waker());
    }

    /// Wakes who watches.
    pub(super) fn knock(&self) {
        self.0.waker.wake();
    }

    /// Whether the thread runs, and nobody else has to fetch.
    pub(super) fn is_kept(&self) -> bool {
        self.0.kept.load(Ordering::Acquire)
    }

    /// Lets nobody in any more.
    pub(super) fn close(&self) {
        self.0.closed.store(true, Ordering::Release);
    }

    /// Starts the thread. Without one, it goes on as before.
    pub(super) fn keep(&self, listener: &UnixListener) {
        let Ok(listener) = listener.try_clone() else {
            return;
        };
        let door = self.clone();
        self.0.kept.store(true, Ordering::Release);
        let keeper = std::thread::Builder::new()
            .name("tbot-door".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                // Of this thread alone. Without the right to it, there is only its share.
                let _allowed = setpriority_process(None, PRIORITY);
                door.fetch(&listener);
                door.0.kept.store(false, Ordering::Release);
                door.knock();
            });
        if keeper.is_err() {
            self.0.kept.store(false, Ordering::Release);
        }
    }

    /// Fetches everybody until it is calm, or somebody else has to see why that fails.
    fn fetch(&self, listener: &UnixListener) {
        while !self.0.closed.load(Ordering::Acquire) {
            match listener.accept() {
                Ok((stream, _)) => {
                    if self.enter(Arrived::Local(stream)) {
                        self.knock();
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let mut queue = [PollFd::new(listener, PollFlags::IN)];
                    if !matches!(poll(&mut queue, Some(&CALM)), Ok(1..)) {
                        return;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        let standing = &self.0.standing;
        standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    /// A door with a thread, and a way to connect.
    fn kept() -> (Door, impl Fn() -> UnixStream, tempfile::TempDir) {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let door = Door::default();
        door.keep(&listener);
        let connect = move || {
            // It stays open as long as somebody may connect.
            let _listener = &listener;
            UnixStream::connect(&path).unwrap()
        };
        (door, connect, home)
    }

    #[test]
    fn the_thread_fetches_all_and_ends_when_it_is_calm() {
        let (door, connect, _home) = kept();
        let callers: Vec<_> = (0..300).map(|_| connect()).collect();
        while door.is_kept() {
            std::thread::yield_now();
        }
        let found = std::iter::from_fn(|| door.next(|_| Some(()))).count();
        assert_eq!(found, callers.len());
        assert!(door.is_empty());
    }

    #[test]
    fn who_finds_the_line_full_is_hung_up_on_at_once() {
        let (door, connect, _home) = kept();
        let mut callers: Vec<_> = (0..1025).map(|_| connect()).collect();
        let mut last = callers.pop().unwrap();
        assert_eq!(last.read(&mut [0]).unwrap(), 0);
        let own = Owner {
            user: Some(nix::unistd::geteuid().as_raw()),
            cgroup: None,
        };
        assert_eq!(door.refused(), Some(own));
        assert_eq!(door.refused(), None);
    }

    #[test]
    fn a_closed_door_stays_closed() {
        let (door, connect, _home) = kept();
        door.close();
        let _late = connect();
        while door.is_kept() {
            std::thread::yield_now();
        }
        // The one that the thread may have been at when it was closed.
        assert!(std::iter::from_fn(|| door.next(|_| Some(()))).count() <= 1);
    }
}
