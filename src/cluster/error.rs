//! What went wrong on the way to a cluster, and what that means for a retry.

use std::io;

use tonic::{Code, Status};

/// What a failure means for the caller's next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disposition {
    /// Transport or server trouble: try again with backoff, keep what is held.
    Retry,
    /// The cluster refused on purpose: trying the same again soon will not help.
    Refused,
    /// The cluster has no such call.
    Unsupported,
}

/// Why a cluster could not be reached or did not do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// The address cannot be dialled. Is it right, is the cluster up, does a firewall stand between?
    #[error("cannot reach {address}: {source}")]
    Dial {
        /// `host:port`.
        address: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// TLS failed: the peer is not who the trust settings allow, or speaks something else.
    #[error("TLS with {address} failed: {source}{}", untrusted(.source))]
    Tls {
        /// `host:port`.
        address: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The proxy's discovery answer is no discovery answer.
    #[error("{address} does not answer like a Teleport proxy: {problem}")]
    NotAProxy {
        /// `host:port`.
        address: String,
        /// What it did instead.
        problem: String,
    },
    /// The bot holds no identity yet; it is still joining.
    #[error("the bot has not joined the cluster yet")]
    NotJoined,
    /// Certificate pins or a CA file do not match the cluster.
    #[error("{0}")]
    Trust(String),
    /// The call was answered with an error.
    #[error("{call}: {}", readable(.status))]
    Call {
        /// The method.
        call: &'static str,
        /// The answer.
        status: Box<Status>,
    },
    /// The call was answered with something unusable; nothing of it is kept.
    #[error("{call}: the cluster's answer is not usable: {problem}")]
    Answer {
        /// The method.
        call: &'static str,
        /// What is wrong with it.
        problem: String,
    },
}

impl ClusterError {
    /// An error answer of `call`.
    pub fn call(call: &'static str) -> impl FnOnce(Status) -> Self {
        move |status| Self::Call {
            call,
            status: Box::new(status),
        }
    }

    /// The status code of the cluster's answer, if there was one.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Call { status, .. } => Some(status.code()),
            _ => None,
        }
    }

    /// Whether the cluster itself answered with the code that stands for everything without one: a
    /// refusal as often as not (an 18.0 cluster says it of every ID token that it does not believe).
    pub fn is_unexplained(&self) -> bool {
        match self {
            // What went wrong on the way has a cause on this side.
            Self::Call { status, .. } => {
                status.code() == Code::Unknown && std::error::Error::source(&**status).is_none()
            }
            _ => false,
        }
    }

    /// Whether the cluster decided against a caller and has no code for it. It wraps each refusal of a
    /// workload identity in [`EVALUATION`], and only some have a code of their own: a rule that reads an
    /// attribute which this caller lacks, or a template that does, fails as [`Code::Unknown`]. The same
    /// caller fails in the same way again, so an outage it is not.
    fn is_failed_evaluation(&self) -> bool {
        match self {
            Self::Call { status, .. } => {
                self.is_unexplained() && status.message().contains(EVALUATION)
            }
            _ => false,
        }
    }

    /// What a person has to do about a refusal that a cluster tells in words only; `None` if it is
    /// none of those. It is part of the error's text.
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::Call { status, .. } => remedy(status),
            _ => None,
        }
    }

    /// What to do next.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::NotJoined
            | Self::Dial { .. }
            | Self::Tls { .. }
            | Self::NotAProxy { .. }
            | Self::Answer { .. } => Disposition::Retry,
            Self::Trust(_) => Disposition::Refused,
            Self::Call { .. } if self.is_failed_evaluation() => Disposition::Refused,
            Self::Call { status, .. } => match status.code() {
                Code::Unimplemented => Disposition::Unsupported,
                Code::PermissionDenied
                | Code::InvalidArgument
                | Code::NotFound
                | Code::AlreadyExists
                | Code::FailedPrecondition
                | Code::Unauthenticated => Disposition::Refused,
                Code::Ok
                | Code::Cancelled
                | Code::Unknown
                | Code::DeadlineExceeded
                | Code::ResourceExhausted
                | Code::Aborted
                | Code::OutOfRange
                | Code::Internal
                | Code::Unavailable
                | Code::DataLoss => Disposition::Retry,
            },
        }
    }
}

/// What a cluster wraps around the reason for which a workload identity is not for a caller
/// (`lib/auth/machineid/workloadidentityv1`).
const EVALUATION: &str = "workload identity failed evaluation";

/// Refusals that have no code of their own (`lib/auth`, upstream 18.0.0), by a part of their text,
/// and what to do. The first that fits counts. They are for people: no decision rests on them.
const REMEDIES: [(&str, &str); 7] = [
    (
        "generation mismatch",
        "this identity was renewed elsewhere, by a copy of the storage or a second agent, and the bot \
         is locked: find the copy, lift the lock (`tctl get locks`, `tctl rm lock/NAME`; `tbot cluster \
         get lock`, `tbot cluster rm lock/NAME`), empty the storage and join with a new token",
    ),
    (
        "is in force",
        "lift the lock if that is right: `tctl get locks` and `tctl rm lock/NAME`, or `tbot cluster \
         get lock` and `tbot cluster rm lock/NAME`; the agent then goes on by itself",
    ),
    (
        "identity is not allowed to reissue",
        "the identity was made for an output, which must not make others: let `storage` name the \
         bot's own directory and not an output's, or set allow_reissue on that output",
    ),
    (
        "impersonated roles can not request other roles",
        "the identity was made for an output: let `storage` name the bot's own directory and not an \
         output's",
    ),
    (
        "has requested role impersonation",
        "add the roles to the bot: `tctl bots update NAME --add-roles=…`, or spec.roles of its \
         resource",
    ),
    (
        "client version is unsupported",
        "the cluster is too new for this agent: update tbot",
    ),
    (
        "client credentials have expired",
        "compare the clocks of this machine and of the cluster",
    ),
];

/// What to do about a certificate of an authority that is not among those that count.
fn untrusted(source: &io::Error) -> &'static str {
    let tls = source.get_ref().and_then(|inner| inner.downcast_ref());
    match tls {
        Some(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer)) => {
            " (no authority that is trusted here signed the certificate: a proxy's is checked against \
             the system's roots or SSL_CERT_FILE, and `tbot cluster` keeps one of its own making as \
             web-ca.pem in its data directory; an auth service's against the bot's authorities)"
        }
        _ => "",
    }
}

/// Version 18.0 says no more than this to a bot that is locked or deleted.
const CURT: (&str, &str) = (
    "access denied",
    "the cluster refuses the bot altogether: is it locked, or was it deleted? `tctl get locks` and \
     `tctl bots ls`; `tbot cluster get lock` and `tbot cluster get bot`",
);

fn remedy(status: &Status) -> Option<&'static str> {
    if matches!(status.code(), Code::Ok | Code::Unimplemented) {
        return None;
    }
    let text = status.message();
    if text.trim() == CURT.0 {
        return Some(CURT.1);
    }
    REMEDIES
        .iter()
        .find_map(|(part, remedy)| text.contains(part).then_some(*remedy))
}

/// A status as one line: clusters put each context on a line of its own, the root cause last. What
/// to do about it comes after that.
fn readable(status: &Status) -> String {
    match remedy(status) {
        Some(remedy) => format!("{} ({remedy})", line(status)),
        None => line(status),
    }
}

fn line(status: &Status) -> String {
    let text = status
        .message()
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join(": ");
    let text = if text.is_empty() {
        status.code().description().to_owned()
    } else {
        text
    };
    match std::error::Error::source(status) {
        Some(cause) => {
            let cause = deepest(cause);
            // Some layers repeat the next one's text in their own.
            if text.ends_with(&cause) {
                text
            } else {
                format!("{text}: {cause}")
            }
        }
        None => text,
    }
}

/// The root cause of a chain: the layers between repeat each other.
fn deepest(error: &(dyn std::error::Error + 'static)) -> String {
    let mut at = error;
    while let Some(next) = at.source() {
        at = next;
    }
    at.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contexts_become_one_line() {
        let error = ClusterError::call("RegisterUsingIAMMethod")(Status::permission_denied(
            "checking iam request\n\tchecking allow rules\n\t\tinstance x did not match",
        ));
        assert_eq!(
            error.to_string(),
            "RegisterUsingIAMMethod: checking iam request: checking allow rules: instance x did not match"
        );
        assert_eq!(error.disposition(), Disposition::Refused);
    }

    #[test]
    fn an_empty_status_still_says_something() {
        let error = ClusterError::call("Ping")(Status::new(Code::Unavailable, ""));
        assert!(error.to_string().len() > "Ping: ".len());
        assert_eq!(error.disposition(), Disposition::Retry);
    }

    #[test]
    fn an_unknown_method_is_unsupported() {
        let error = ClusterError::call("Join")(Status::unimplemented("x"));
        assert_eq!(error.disposition(), Disposition::Unsupported);
    }

    #[test]
    fn a_failed_evaluation_is_a_refusal_and_no_other_unknown_error_is() {
        let text = "workload identity failed evaluation: \"workload.kubernetes\" is unset";
        for (status, disposition) in [
            (Status::unknown(text), Disposition::Refused),
            (
                Status::unknown(format!("rpc\n\t{text}")),
                Disposition::Refused,
            ),
            (Status::not_found(text), Disposition::Refused),
            (Status::invalid_argument(text), Disposition::Refused),
            (Status::unknown("evaluation"), Disposition::Retry),
            (Status::unavailable(text), Disposition::Retry),
        ] {
            let error = ClusterError::call("IssueWorkloadIdentity")(status);
            assert_eq!(error.disposition(), disposition, "{error:?}");
        }
    }

    #[test]
    fn refusals_in_words_come_with_what_to_do() {
        for (text, part) in [
            (
                "lock targeting User:\"bot-x\" is in force: The bot user \"bot-x\" has been locked \
                 due to a certificate generation mismatch, possibly indicating a stolen certificate.",
                "empty the storage",
            ),
            (
                "renewable cert generation mismatch for bot x/1: stored=3, presented=2",
                "empty the storage",
            ),
            (
                "lock targeting Role:\"access\" is in force",
                "goes on by itself",
            ),
            (
                "access denied: identity is not allowed to reissue certificates",
                "the bot's own directory",
            ),
            (
                "user \"bot-x\" has requested role impersonation for [\"a\"]",
                "--add-roles",
            ),
            ("access denied", "is it locked"),
            (
                "client version is unsupported, minimum supported version is 19.0.0-aa",
                "update tbot",
            ),
        ] {
            let error = ClusterError::call("GenerateUserCerts")(Status::permission_denied(text));
            let told = error.to_string();
            assert!(
                told.starts_with(&format!("GenerateUserCerts: {text} (")),
                "{told}"
            );
            assert!(told.contains(part), "{told}");
            assert_eq!(told.lines().count(), 1);
            assert_eq!(error.disposition(), Disposition::Refused);
        }
        let other = ClusterError::call("Ping")(Status::permission_denied("no"));
        assert_eq!(other.remedy(), None);
        assert_eq!(other.to_string(), "Ping: no");
    }
}
