//! What tests share: a place of their own, patience, and real parts to run against.

mod bridge;
mod cgroup;
mod cluster;
mod engine;
mod kube_api;
mod kubelet;
mod metadata;
mod moto;
mod oidc;
mod sandbox;
mod systemd;
mod tls;
mod tpm;
mod workload;

use std::path::PathBuf;
use std::time::{Duration, Instant};

pub(crate) use bridge::{bridge, identity};
pub(crate) use cgroup::Cgroup;
pub(crate) use cluster::{Cluster, PLAIN_BOT, RECORDED, RESOURCES, issuing, wait_until};
pub(crate) use engine::{Docker, Podman, no_containers};
pub(crate) use kube_api::{Fault, KubeApi};
pub(crate) use kubelet::Kubelet;
pub(crate) use metadata::{Behaviour, Metadata};
pub(crate) use moto::Moto;
pub(crate) use oidc::{Key, Mood, Oidc, time, unsigned};
pub(crate) use sandbox::{OutputText, Process, Sandbox, free_port};
pub(crate) use systemd::Systemd;
pub(crate) use tls::SelfSigned;
pub(crate) use tpm::Tpm;
pub(crate) use workload::{Workload, decode, first};

/// How long [`eventually`] waits. `TBOT_TEST_PATIENCE` (seconds) overrules it on slow machines.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `look` finds something. The only place where a test sleeps.
///
/// Panics with `what` and the last thing `look` complained about when patience ends.
pub(crate) fn eventually<T, E: std::fmt::Display>(
    what: &str,
    mut look: impl FnMut() -> Result<T, E>,
) -> T {
    let patience = std::env::var_os("TBOT_TEST_PATIENCE")
        .and_then(|seconds| seconds.to_str()?.parse().ok())
        .map_or(PATIENCE, Duration::from_secs);
    let start = Instant::now();
    loop {
        match look() {
            Ok(found) => return found,
            Err(last) if start.elapsed() > patience => {
                panic!("waited {patience:?} in vain until {what}; last: {last}")
            }
            Err(_) => std::thread::sleep(Duration::from_millis(25)),
        }
    }
}

/// The root of the repository.
pub(crate) fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The Python environment that `make test` prepares.
pub(crate) fn venv() -> PathBuf {
    std::env::var_os("TBOT_TEST_VENV")
        .map_or_else(|| repository().join("target/venv"), PathBuf::from)
}

/// Ends a test whose prerequisites are missing: in CI that is a failure, elsewhere it is announced.
///
/// Use as `let Some(x) = … else { return skip("why") };`
pub(crate) fn skip(why: &str) {
    assert!(
        std::env::var_os("CI").is_none(),
        "a prerequisite is missing in CI: {why}"
    );
    eprintln!("SKIPPED: {why}");
}
