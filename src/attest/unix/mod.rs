//! The `unix` attestor: effective user and group, path and hash of the executable.
//!
//! It always runs, and first: an answer of another attestor about a process that this one cannot
//! even see is worth nothing.

mod hash;
mod status;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;

use self::hash::{Fingerprint, Hasher, Limit};
use super::{AttestError, Attestor, AttestorKind, Owner, Peer};
use crate::fsx::read_proc;
use crate::pb::teleport::workloadidentity::v1::{WorkloadAttrs, WorkloadAttrsUnix};
use crate::yaml::{Fields, Tree};

/// The YAML key.
pub(super) const NAME: &str = "unix";
/// The longest `/proc/<pid>/status` that is read, in bytes. Real ones have 1 to 2 KiB.
const MAX_STATUS: u64 = 64 * 1024;
/// The key for the size limit of hashed executables.
const MAX_SIZE: &str = "binary_hash_max_size_bytes";

/// The kind.
#[derive(Debug)]
pub struct Kind;

impl AttestorKind for Kind {
    fn name(&self) -> &'static str {
        NAME
    }

    fn parse(&self, section: Option<Fields<'_>>) -> Option<Arc<dyn Attestor>> {
        let Some(mut fields) = section else {
            return Some(Arc::new(Unix::default()));
        };
        let limit = Limit::new(fields.integer(MAX_SIZE).unwrap_or(0));
        if limit.is_none() {
            fields.error(
                MAX_SIZE,
                "must not be below -1",
                Some("bytes; 0 is 1 GiB, -1 is no limit"),
            );
        }
        fields.finish();
        Some(Arc::new(Unix::new(limit?)))
    }

    fn emit(&self, configured: Option<&dyn Attestor>) -> Tree {
        configured.map_or_else(|| Unix::default().emit(), Attestor::emit)
    }
}

/// The attestor.
#[derive(Debug)]
pub struct Unix {
    proc: PathBuf,
    hasher: Hasher,
}

impl Default for Unix {
    /// Hashes executables up to 1 GiB.
    fn default() -> Self {
        Self::new(Limit::default())
    }
}

impl Unix {
    fn new(limit: Limit) -> Self {
        // Where a container mounts the host's procfs (upstream reads the same variable, for this
        // attestor only).
        let proc = std::env::var_os("HOST_PROC")
            .filter(|path| !path.is_empty())
            .map_or_else(|| PathBuf::from("/proc"), PathBuf::from);
        Self {
            proc,
            hasher: Hasher::new(limit),
        }
    }

    async fn found(&self, pid: i32, owner: Owner) -> Result<WorkloadAttrsUnix, String> {
        let directory = self.proc.join(pid.to_string());
        // Both come from the kernel's memory: a change of threads would take longer.
        let ids = ids(&directory.join("status"))?;
        let binary_path = executable_path(&directory).unwrap_or_else(|source| {
            tracing::debug!(pid, %source, "Cannot read the path of the caller's executable");
            None
        });
        // Opened by this link, it is the inode that runs, whatever stands under its path by now.
        let program = directory.join("exe");
        let known =
            Fingerprint::cached(&program).and_then(|fingerprint| self.hasher.known(fingerprint));
        let binary_hash = match known {
            Some(hash) => Some(hash),
            None => self
                .hasher
                .hash(program, owner)
                .await
                .inspect_err(|problem| {
                    tracing::debug!(pid, %problem, "The caller's executable is not hashed");
                })
                .ok(),
        };
        Ok(WorkloadAttrsUnix {
            attested: true,
            pid,
            uid: ids.uid,
            gid: ids.gid,
            binary_path,
            binary_hash,
        })
    }
}

#[async_trait]
impl Attestor for Unix {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn attest(&self, peer: &Peer, attributes: &mut WorkloadAttrs) -> Result<(), AttestError> {
        let found = self
            .found(peer.pid(), peer.owner())
            .await
            .and_then(|found| same_user(found, peer.uid(), peer.gid()))
            .map_err(AttestError::of(NAME, peer))?;
        attributes.unix = Some(found);
        Ok(())
    }

    fn emit(&self) -> Tree {
        let limit = Tree::Raw(self.hasher.limit().to_string());
        Tree::map([(MAX_SIZE, Some(limit))])
    }
}

/// What was found, if the process still is whose it was when it connected as this user and group.
///
/// Root may become anybody. Anybody may become root for a moment, by a set-user-ID program that is executed after
/// the socket was connected, and that another process speaks for over a copy of the connection.
fn same_user(found: WorkloadAttrsUnix, uid: u32, gid: u32) -> Result<WorkloadAttrsUnix, String> {
    if uid == 0 || (found.uid, found.gid) == (uid, gid) {
        return Ok(found);
    }
    Err(format!(
        "it connected as user {uid} and group {gid}, and is {} and {} now: it has to connect again",
        found.uid, found.gid
    ))
}

/// The effective user of a process of this machine. It is the process that was meant only if that one
/// is pinned and still alive afterwards.
pub(crate) fn effective_uid(pid: i32) -> Result<u32, String> {
    ids(&Path::new("/proc").join(pid.to_string()).join("status")).map(|ids| ids.uid)
}

fn ids(path: &Path) -> Result<status::Ids, String> {
    let text =
        read_proc(path, MAX_STATUS).map_err(|source| format!("{}: {source}", path.display()))?;
    // A name of a process may be no UTF-8; its IDs are.
    status::effective_ids(&String::from_utf8_lossy(&text))
        .ok_or_else(|| format!("{}: no user and group IDs in it", path.display()))
}

/// Where `exe` points; `None` for a process without an executable (a kernel thread).
fn executable_path(directory: &Path) -> io::Result<Option<String>> {
    match std::fs::read_link(directory.join("exe")) {
        Ok(path) => Ok(Some(path.to_string_lossy().into_owned())),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::sha256_hex;

    fn own() -> i32 {
        i32::try_from(std::process::id()).unwrap()
    }

    #[tokio::test]
    async fn this_process_is_described() {
        let unix = Unix::default();
        let found = unix.found(own(), Owner::default()).await.unwrap();
        let again = unix.found(own(), Owner::default()).await.unwrap();
        assert_eq!(found, again, "with a hash that is known by then");
        let path = std::env::current_exe().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(found.attested);
        assert_eq!(found.pid, own());
        assert_eq!(found.uid, nix::unistd::geteuid().as_raw());
        assert_eq!(found.gid, nix::unistd::getegid().as_raw());
        assert_eq!(found.binary_path, Some(path.to_str().unwrap().to_owned()));
        assert_eq!(found.binary_hash, Some(sha256_hex(&bytes)));
    }

    #[tokio::test]
    async fn an_executable_above_the_limit_is_not_hashed() {
        let found = Unix::new(Limit::new(10).unwrap())
            .found(own(), Owner::default())
            .await
            .unwrap();
        assert!(found.binary_path.is_some());
        assert_eq!(found.binary_hash, None);
    }

    #[test]
    fn nobody_but_root_becomes_somebody_else() {
        let found = |uid, gid| WorkloadAttrsUnix {
            attested: true,
            uid,
            gid,
            ..WorkloadAttrsUnix::default()
        };
        for (connected, is, fine) in [
            ((1000, 1000), (1000, 1000), true),
            ((1000, 1000), (0, 1000), false),
            ((1000, 1000), (1000, 0), false),
            ((0, 0), (33, 33), true),
        ] {
            let same = same_user(found(is.0, is.1), connected.0, connected.1);
            assert_eq!(same.is_ok(), fine, "{connected:?} {is:?}");
        }
    }

    #[tokio::test]
    async fn a_process_that_is_not_there_is_an_error() {
        let unix = Unix {
            proc: PathBuf::from("/nonexistent"),
            ..Unix::default()
        };
        let problem = unix.found(own(), Owner::default()).await.unwrap_err();
        assert!(problem.contains("/nonexistent/"), "{problem}");
    }

    #[tokio::test]
    async fn another_procfs_can_be_named() {
        let proc = tempfile::tempdir().unwrap();
        let directory = proc.path().join("42");
        std::fs::create_dir(&directory).unwrap();
        std::fs::write(directory.join("status"), status::fixture::SERVICE).unwrap();
        std::os::unix::fs::symlink("/usr/bin/gone (deleted)", directory.join("exe")).unwrap();
        let unix = Unix {
            proc: proc.path().to_owned(),
            ..Unix::default()
        };
        let found = unix.found(42, Owner::default()).await.unwrap();
        assert_eq!((found.uid, found.gid), (33, 33));
        assert_eq!(
            found.binary_path.as_deref(),
            Some("/usr/bin/gone (deleted)")
        );
        assert_eq!(found.binary_hash, None);
    }
}
