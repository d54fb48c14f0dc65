//! What was found out about a peer, with a digest that tells it from everything else.

use std::collections::HashMap;
use std::sync::OnceLock;

use prost::Message as _;
use serde::{Deserialize, Serialize};

use super::peer::start_time;
use crate::crypto::sha256;
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;

/// The attributes of a caller, and which process they are of. Immutable; share it with `Arc`.
#[derive(Debug, Clone, PartialEq)]
pub struct Attested {
    attributes: WorkloadAttrs,
    process: Option<Process>,
    digest: [u8; 32],
}

/// One process, told from every other that has or had its ID: by the boot of the machine and the
/// clock tick in which it began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// A digest of the kernel's name for this boot.
    boot: u64,
    pid: i32,
    /// In ticks since boot.
    began: u64,
}

impl Process {
    /// The process that has this ID now; `None` if there is none, or the kernel does not tell.
    pub fn of(pid: i32) -> Option<Self> {
        static BOOT: OnceLock<Option<u64>> = OnceLock::new();
        let boot = BOOT.get_or_init(|| {
            let id = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
            let digest = sha256(&id);
            digest.first_chunk().copied().map(u64::from_be_bytes)
        });
        Some(Self {
            boot: (*boot)?,
            pid,
            began: start_time(pid)?,
        })
    }

    /// Whether it still runs, as far as can be seen.
    pub fn is_running(&self) -> bool {
        Self::of(self.pid) == Some(*self)
    }
}

impl Attested {
    /// What is known about `process`; `None` stands for a caller whom nobody can tell from others.
    pub fn new(attributes: WorkloadAttrs, process: Option<Process>) -> Self {
        let digest = digest(&attributes, process);
        Self {
            attributes,
            process,
            digest,
        }
    }

    /// The attributes, as the cluster takes them.
    pub fn attributes(&self) -> &WorkloadAttrs {
        &self.attributes
    }

    /// The user whose process it is; `None` if nobody can tell.
    pub fn user(&self) -> Option<u32> {
        self.attributes.unix.as_ref().map(|unix| unix.uid)
    }

    /// A digest of all attributes and of the process. Two callers that have it in common are the
    /// same process and the same program; or neither is known at all.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The process, which is known again by it after a restart of the agent.
    pub fn process(&self) -> Option<Process> {
        self.process
    }
}

impl Default for Attested {
    /// A caller of whom nothing is known.
    fn default() -> Self {
        Self::new(WorkloadAttrs::default(), None)
    }
}

/// Protobuf maps have no order, so they are sorted out of the way.
fn digest(attributes: &WorkloadAttrs, process: Option<Process>) -> [u8; 32] {
    let mut plain = attributes.clone();
    let mut labels: Vec<(u8, String, String)> = Vec::new();
    let mut take = |tag: u8, map: &mut HashMap<String, String>| {
        labels.extend(map.drain().map(|(key, value)| (tag, key, value)));
    };
    if let Some(kubernetes) = &mut plain.kubernetes {
        take(0, &mut kubernetes.labels);
    }
    if let Some(podman) = &mut plain.podman {
        if let Some(container) = &mut podman.container {
            take(1, &mut container.labels);
        }
        if let Some(pod) = &mut podman.pod {
            take(2, &mut pod.labels);
        }
    }
    if let Some(container) = plain.docker.as_mut().and_then(|d| d.container.as_mut()) {
        take(3, &mut container.labels);
    }
    labels.sort_unstable();
    let mut bytes = plain.encode_length_delimited_to_vec();
    for (tag, key, value) in labels {
        bytes.push(tag);
        for text in [key, value] {
            bytes.extend((text.len() as u64).to_be_bytes());
            bytes.extend(text.as_bytes());
        }
    }
    if let Some(process) = process {
        bytes.push(u8::MAX);
        bytes.extend(process.boot.to_be_bytes());
        bytes.extend(process.pid.to_be_bytes());
        bytes.extend(process.began.to_be_bytes());
    }
    sha256(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::teleport::workloadidentity::v1::{WorkloadAttrsKubernetes, WorkloadAttrsUnix};

    fn of(pid: i32, labels: &[(&str, &str)], process: Option<Process>) -> [u8; 32] {
        let attributes = WorkloadAttrs {
            unix: Some(WorkloadAttrsUnix {
                pid,
                ..WorkloadAttrsUnix::default()
            }),
            kubernetes: Some(WorkloadAttrsKubernetes {
                labels: labels
                    .iter()
                    .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                    .collect(),
                ..WorkloadAttrsKubernetes::default()
            }),
            ..WorkloadAttrs::default()
        };
        Attested::new(attributes, process).digest()
    }

    #[test]
    fn everything_that_differs_shows() {
        let own = Process::of(i32::try_from(std::process::id()).unwrap());
        assert!(own.unwrap().is_running());
        let later = own.map(|own| Process {
            began: own.began + 1,
            ..own
        });
        assert!(!later.unwrap().is_running());
        let rebooted = own.map(|own| Process {
            boot: own.boot ^ 1,
            ..own
        });
        assert!(!rebooted.unwrap().is_running());
        let many: Vec<(String, String)> = (0..50)
            .map(|n| (format!("key{n}"), format!("value{n}")))
            .collect();
        let many: Vec<(&str, &str)> = many.iter().map(|(k, v)| (&**k, &**v)).collect();
        let base = of(1, &many, own);
        let mut backwards = many.clone();
        backwards.reverse();
        for _ in 0..10 {
            assert_eq!(of(1, &backwards, own), base, "maps have no order");
        }
        for other in [
            of(2, &many, own),
            of(1, &many[1..], own),
            of(1, &many, later),
            of(1, &many, rebooted),
            of(1, &many, None),
        ] {
            assert_ne!(other, base);
        }
        assert_ne!(
            of(1, &[("ab", "c")], None),
            of(1, &[("a", "bc")], None),
            "texts have ends"
        );
    }
}
