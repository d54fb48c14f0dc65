//! Pins processes, each once: what is known about one serves all its connections.

use std::collections::HashMap;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use super::peer::{Credentials, Peer, PeerError, handle};

/// How many are kept at least before those without connections are sought.
const FEW: usize = 64;

/// The processes that have connections in one runtime.
///
/// Connections of one process share a [`Peer`], and with it what was found out about that process: a client that
/// opens several at a time, or one before it closes the other, is looked at once.
#[derive(Debug, Default)]
pub struct Peers {
    pinned: HashMap<Credentials, Weak<Peer>>,
    /// The next time to forget those without connections is with so many.
    full: usize,
}

impl Peers {
    /// Pins the process that connected `stream` under these IDs. `None` means that the kernel cannot name it: it
    /// lives in another PID namespace.
    ///
    /// Must run inside the runtime that will wait for the peer, the same each time.
    pub fn pin(
        &mut self,
        stream: &impl AsFd,
        credentials: Credentials,
    ) -> Result<Option<Arc<Peer>>, PeerError> {
        if credentials.pid <= 0 {
            return Ok(None);
        }
        // Of each connection anew: only this says which process made it.
        let pidfd = handle(stream, credentials)?;
        let pinned = self.pinned.get(&credentials).and_then(Weak::upgrade);
        if let Some(known) = pinned.filter(|known| known.made(&pidfd, credentials)) {
            return Ok(Some(known));
        }
        let peer = Arc::new(Peer::pinned(credentials, pidfd)?);
        self.make_room();
        self.pinned.insert(credentials, Arc::downgrade(&peer));
        Ok(Some(peer))
    }

    fn make_room(&mut self) {
        if self.pinned.len() >= self.full.max(FEW) {
            self.pinned.retain(|_, peer| peer.strong_count() > 0);
            self.full = 2 * self.pinned.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::process::{Child, Command, Stdio};
    use std::time::Duration;

    use tokio::net::UnixListener;
    use tokio::time::timeout;

    use super::*;

    fn pin(peers: &mut Peers, stream: &impl AsFd) -> Arc<Peer> {
        let credentials = Credentials::of(stream).unwrap();
        peers.pin(stream, credentials).unwrap().unwrap()
    }

    #[tokio::test]
    async fn the_other_end_of_a_socket_is_pinned() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = pin(&mut Peers::default(), &ours);
        assert_eq!(peer.pid(), i32::try_from(std::process::id()).unwrap());
        assert_eq!(peer.uid(), nix::unistd::geteuid().as_raw());
        assert_eq!(peer.gid(), nix::unistd::getegid().as_raw());
        assert!(peer.is_alive());
    }

    #[tokio::test]
    async fn connections_of_one_process_share_its_peer() {
        let mut peers = Peers::default();
        let pairs = [UnixStream::pair().unwrap(), UnixStream::pair().unwrap()];
        let [one, other] = pairs.each_ref().map(|(ours, _)| pin(&mut peers, ours));
        assert!(Arc::ptr_eq(&one, &other));
    }

    #[tokio::test]
    async fn other_ids_are_another_peer() {
        let mut peers = Peers::default();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let own = Credentials::of(&ours).unwrap();
        let mut pin = |credentials| peers.pin(&ours, credentials).unwrap();
        let (uid, gid) = (own.uid + 1, own.gid + 1);
        let held = [own, Credentials { uid, ..own }, Credentials { gid, ..own }].map(&mut pin);
        let [own, user, group] = held.each_ref().map(|peer| peer.as_ref().unwrap());
        assert!(!Arc::ptr_eq(own, user) && !Arc::ptr_eq(own, group));
        assert_eq!(user.uid(), uid);
        assert_eq!(group.gid(), gid);
        let nameless = pin(Credentials { pid: 0, uid, gid });
        assert!(nameless.is_none(), "of another PID namespace");
    }

    /// A process that connects for each line it reads, then answers; `exec` makes it go on as another program.
    const CALLER: &str = "
import os, socket, sys
connections = []
for line in open(0, 'rb', buffering=0):
    if line == b'exec\\n':
        os.execv(sys.argv[2], [sys.argv[2]])
    connections.append(socket.socket(socket.AF_UNIX))
    connections[-1].connect(sys.argv[1])
    print(flush=True)
";

    fn caller(path: &Path, next: &str) -> Child {
        let mut command = Command::new("python3");
        command.args(["-c", CALLER]).arg(path).arg(next);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
        command.spawn().unwrap()
    }

    fn tell(caller: &mut Child, line: &str) {
        let input = caller.stdin.as_mut().unwrap();
        input.write_all(line.as_bytes()).unwrap();
    }

    #[tokio::test]
    async fn who_runs_another_program_or_ended_is_not_the_peer_that_was_pinned() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut peers = Peers::default();
        let mut caller = caller(&path, "/bin/cat");
        let next = async |caller: &mut Child| {
            tell(caller, "go\n");
            let accepted = timeout(Duration::from_secs(30), listener.accept()).await;
            accepted.expect("it connects").unwrap().0
        };
        let first = next(&mut caller).await;
        let pinned = pin(&mut peers, &first);
        let second = next(&mut caller).await;
        assert!(Arc::ptr_eq(&pinned, &pin(&mut peers, &second)));

        let third = next(&mut caller).await;
        tell(&mut caller, "exec\necho\n");
        let mut echoed = [0; 8];
        let output = caller.stdout.as_mut().unwrap();
        output.read_exact(&mut echoed).unwrap();
        assert_eq!(&echoed, b"\n\n\necho\n", "three connections, then `cat`");
        let other = pin(&mut peers, &third);
        assert!(!Arc::ptr_eq(&pinned, &other), "it runs another program");
        assert!(!pinned.is_unchanged() && other.is_unchanged());

        drop(caller.stdin.take());
        caller.wait().unwrap();
        let credentials = Credentials::of(&second).unwrap();
        if let Ok(Some(ended)) = peers.pin(&second, credentials) {
            assert!(
                !Arc::ptr_eq(&other, &ended),
                "its ID may be somebody else's"
            );
            assert!(!ended.is_alive() && !ended.is_unchanged());
        }
    }

    #[tokio::test]
    async fn who_is_not_connected_any_more_is_forgotten() {
        let mut peers = Peers::default();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let own = Credentials::of(&ours).unwrap();
        let held = pin(&mut peers, &ours);
        for uid in 0..1000 {
            peers.pin(&ours, Credentials { uid, ..own }).unwrap();
        }
        assert!(peers.pinned.len() <= FEW);
        assert!(Arc::ptr_eq(&held, &pin(&mut peers, &ours)));
    }
}
