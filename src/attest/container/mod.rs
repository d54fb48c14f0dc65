//! Which container a process is in, by its cgroup, and engines that tell more about containers.
//!
//! The kernel says in which cgroup a process is; container engines put the container's ID into the
//! name of a cgroup. Whoever may make cgroups can imitate such a name, so an engine is asked for the
//! container's first process too: the caller has to be in the very same cgroup ([`Place::confirm`]).
//!
//! `/proc/<pid>/mountinfo`, which also shows cgroups, is not looked at: who has a mount namespace can
//! write into it whatever they like.

mod cgroup;
mod engine;
mod level;

use std::io;

pub(crate) use cgroup::Place;
use cgroup::{Cgroups, Lookup};
pub(crate) use engine::{Address, Config, EngineError, State};
pub(crate) use level::{docker, kubernetes};

use super::Peer;

/// Why it cannot be told in which container a process is.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainerError {
    /// `/proc/<pid>/cgroup` cannot be read.
    #[error("/proc/{pid}/cgroup: {source}")]
    Unreadable {
        pid: i32,
        #[source]
        source: io::Error,
    },
    /// Its cgroups in different hierarchies name different containers.
    #[error("its cgroups name two containers, {first} and {second}: it was moved by hand")]
    Contradiction { first: String, second: String },
    /// Containers share one cgroup.
    #[error(
        "its cgroup is Podman's own and does not say which container it is: rootless Podman without \
         a user's systemd has no others (start Podman with `--cgroup-manager cgroupfs`, or from a \
         login session)"
    )]
    Shared,
    /// The engine's container is not the one whose cgroup the process is in.
    #[error(
        "its cgroup {level:?} has the name of container {id}, whose own processes are in another: \
         the name is forged, or the engine runs in another PID namespace"
    )]
    Forged { level: String, id: String },
    /// The engine does not run the container.
    #[error("the engine says that container {0} does not run")]
    Stopped(String),
    /// The engine cannot be asked.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Finds the container of `peer` by the names that one engine gives to cgroups; `None` if it is in
/// none of that engine's.
pub(crate) async fn locate(peer: &Peer, lookup: Lookup) -> Result<Option<Place>, ContainerError> {
    cgroups(peer.pid()).await?.find(lookup)
}

/// The same among Podman's containers, some of which cannot be told apart.
pub(crate) async fn locate_in_podman(peer: &Peer) -> Result<Option<Place>, ContainerError> {
    let cgroups = cgroups(peer.pid()).await?;
    match cgroups.find(level::podman)? {
        None if cgroups.any(level::shared_by_podman) => Err(ContainerError::Shared),
        found => Ok(found),
    }
}

async fn cgroups(pid: i32) -> Result<Cgroups, ContainerError> {
    // The kernel may wait for the lock of all cgroups.
    tokio::task::spawn_blocking(move || Cgroups::of(pid))
        .await
        .map_err(io::Error::other)
        .flatten()
        .map_err(|source| ContainerError::Unreadable { pid, source })
}

impl Place {
    /// Makes sure that the process that was located here is in the container whose first process is
    /// `first`, as its engine says.
    pub(crate) async fn confirm(&self, first: i32) -> Result<(), ContainerError> {
        if first <= 0 {
            return Err(ContainerError::Stopped(self.id.clone()));
        }
        // A first process that ends meanwhile leaves its ID to others, who are not in this cgroup.
        if cgroups(first).await?.are_in(self) {
            return Ok(());
        }
        Err(ContainerError::Forged {
            level: self.level.clone(),
            id: self.id.clone(),
        })
    }
}
