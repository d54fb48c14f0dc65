//! What the log says of each attempt to issue: every SVID, and of failures the first few of a row.

use std::collections::HashMap;

use tokio::time::Instant;

use super::issue::{IssueError, Svid};
use crate::backoff::{Loudness, Repeated};
use crate::clock::rfc3339;
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;

/// Kinds of callers whose failures are remembered.
const REMEMBERED: usize = 256;

/// What the log says of a caller.
pub(super) struct Caller<'a> {
    pub(super) pid: Option<i32>,
    pub(super) uid: Option<u32>,
    pub(super) service: Option<&'a str>,
}

impl<'a> Caller<'a> {
    pub(super) fn of(attributes: &'a WorkloadAttrs) -> Self {
        let unix = attributes.unix.as_ref();
        let systemd = attributes.systemd.as_ref();
        Self {
            pid: unix.map(|unix| unix.pid),
            uid: unix.map(|unix| unix.uid),
            service: systemd.map(|systemd| systemd.service.as_str()),
        }
    }
}

/// A kind of caller. Many processes of one unit that get nothing are one piece of news.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Who {
    uid: Option<u32>,
    service: Option<String>,
}

impl Who {
    fn of(attributes: &WorkloadAttrs) -> Self {
        let Caller { uid, service, .. } = Caller::of(attributes);
        Self {
            uid,
            service: service.map(str::to_owned),
        }
    }
}

/// Failures in a row, by who wanted an SVID.
#[derive(Debug, Default)]
pub(super) struct Failures(HashMap<Who, Repeated>);

impl Failures {
    fn failed(&mut self, who: Who, error: &IssueError) -> Loudness {
        if self.0.len() >= REMEMBERED {
            self.0.retain(|known, _| *known == who);
        }
        self.0.entry(who).or_default().failed(Instant::now(), error)
    }

    /// Ends the row of such a caller.
    pub(super) fn succeeded(&mut self, attributes: &WorkloadAttrs) {
        self.0.remove(&Who::of(attributes));
    }

    /// Logs that nothing of this type was issued.
    pub(super) fn tell_failure(
        &mut self,
        attributes: &WorkloadAttrs,
        r#type: &'static str,
        error: &IssueError,
    ) {
        let Caller { pid, uid, service } = Caller::of(attributes);
        match self.failed(Who::of(attributes), error) {
            Loudness::Warn => {
                tracing::warn!(r#type, pid, uid, systemd_service = service, %error, "No SVID was issued");
            }
            Loudness::Debug => {
                tracing::debug!(r#type, pid, uid, systemd_service = service, %error, "No SVID was issued");
            }
        }
    }

    /// Logs an outcome.
    pub(super) fn tell(
        &mut self,
        attributes: &WorkloadAttrs,
        outcome: &Result<Vec<Svid>, IssueError>,
    ) {
        let Caller { pid, uid, service } = Caller::of(attributes);
        match outcome {
            Ok(svids) => {
                self.succeeded(attributes);
                for svid in svids {
                    tracing::info!(
                        r#type = "x509-svid",
                        spiffe_id = %svid.id,
                        serial_number = svid.serial,
                        hint = svid.hint,
                        expires_at = %rfc3339(svid.not_after),
                        workload_identity_name = svid.name,
                        workload_identity_revision = svid.revision,
                        pid,
                        uid,
                        systemd_service = service,
                        "Issued Workload Identity Credential"
                    );
                }
            }
            Err(error) => self.tell_failure(attributes, "x509-svid", error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::teleport::workloadidentity::v1::{WorkloadAttrsSystemd, WorkloadAttrsUnix};

    fn process(pid: i32, service: &str) -> WorkloadAttrs {
        WorkloadAttrs {
            unix: Some(WorkloadAttrsUnix {
                pid,
                uid: 1000,
                ..WorkloadAttrsUnix::default()
            }),
            systemd: Some(WorkloadAttrsSystemd {
                service: service.to_owned(),
                ..WorkloadAttrsSystemd::default()
            }),
            ..WorkloadAttrs::default()
        }
    }

    #[test]
    fn a_unit_that_starts_again_and_again_is_told_of_a_few_times() {
        let mut failures = Failures::default();
        let error = IssueError::Unavailable("away".to_owned());
        let loud = (1..=100)
            .filter(|pid| {
                let who = Who::of(&process(*pid, "foo"));
                failures.failed(who, &error) == Loudness::Warn
            })
            .count();
        assert_eq!(loud, 3);
        let other = Who::of(&process(101, "bar"));
        assert_eq!(
            failures.failed(other, &error),
            Loudness::Warn,
            "another unit"
        );
        failures.tell(&process(102, "foo"), &Ok(Vec::new()));
        let again = Who::of(&process(103, "foo"));
        assert_eq!(
            failures.failed(again, &error),
            Loudness::Warn,
            "after a success"
        );
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut failures = Failures::default();
        let error = IssueError::Unavailable("away".to_owned());
        for n in 0..10_000 {
            failures.failed(Who::of(&process(n, &n.to_string())), &error);
        }
        assert!(failures.0.len() <= REMEMBERED);
    }
}
