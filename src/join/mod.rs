//! How a bot proves to a cluster who it is: a trait, and one folder per join method.
//!
//! [`session`] opens the connection that a join runs on and speaks one of two protocols there: the
//! newer stream that all methods share, or the older calls. Each method's folder has both halves:
//! `mod.rs` proves, `verify.rs` is the half of the embedded cluster and imports nothing of the agent.

pub mod iam;
pub mod session;
pub mod token;

mod older;
mod secret;
mod stream;

use std::fmt;
use std::time::SystemTime;

use async_trait::async_trait;

pub use secret::{TokenSource, token_hash};
pub use session::{Hello, Older, Session};

use crate::cluster::{ClusterError, Disposition};
use crate::crypto::KeyError;

/// The join methods, by their YAML `join_method`.
pub const METHODS: &[&dyn JoinMethod] = &[&iam::Iam, &token::Token];

/// Methods that upstream has, so that one missing here is refused by its name.
pub const UPSTREAM: &[&str] = &[
    "azure",
    "azure_devops",
    "bitbucket",
    "bound_keypair",
    "circleci",
    "env0",
    "gcp",
    "generic_oidc",
    "github",
    "gitlab",
    "iam",
    "kubernetes",
    "oracle",
    "spacelift",
    "terraform_cloud",
    "token",
    "tpm",
];

/// The method called `name`.
pub fn method(name: &str) -> Option<&'static dyn JoinMethod> {
    METHODS.iter().copied().find(|method| method.name() == name)
}

/// How an identity of a method is kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Renewal {
    /// The certificate renews itself with a counter; the token is used up.
    Certificate,
    /// The bot proves itself again over its authenticated connection.
    Rejoin,
}

/// One join method: the agent's half.
#[async_trait]
pub trait JoinMethod: Send + Sync + fmt::Debug {
    /// The YAML `join_method`.
    fn name(&self) -> &'static str;
    /// How its identities are kept alive.
    fn renewal(&self) -> Renewal;
    /// Fetches what the proof needs. It may be slow, so it comes before the exchange, which the
    /// cluster bounds.
    async fn prepare(&self) -> Result<Proof, JoinError>;
}

/// Signs a challenge, at a time, into the bytes of an AWS request.
pub type SignIam = dyn Fn(&str, SystemTime) -> Result<Vec<u8>, JoinError> + Send + Sync;

/// What a bot proves itself with; both protocols can carry each.
pub enum Proof {
    /// The token alone.
    Token,
    /// The cluster's challenge, signed with an AWS identity.
    Iam(Box<SignIam>),
}

impl fmt::Debug for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Token => "Token",
            Self::Iam(_) => "Iam",
        })
    }
}

/// Why a join failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// The cluster refused or could not be reached.
    #[error("{source}{}", hint(.source, .method))]
    Cluster {
        /// The join method.
        method: &'static str,
        /// The cause.
        #[source]
        source: ClusterError,
    },
    /// The proof could not be made on this machine.
    #[error("join method {method}: {problem}")]
    Proof {
        /// The join method.
        method: &'static str,
        /// What is missing and what to do.
        problem: String,
    },
    /// The join token could not be read.
    #[error("join token: {0}")]
    Token(String),
    /// No key could be made.
    #[error("cannot make a key: {0}")]
    Key(#[from] KeyError),
}

impl JoinError {
    /// A failure at the cluster's side of a join by `method`.
    pub(crate) fn cluster(method: &'static str) -> impl Fn(ClusterError) -> Self {
        move |source| Self::Cluster { method, source }
    }

    /// What to do next.
    pub fn disposition(&self) -> Disposition {
        match self {
            Self::Cluster { source, .. } => source.disposition(),
            Self::Proof { .. } | Self::Token(_) | Self::Key(_) => Disposition::Retry,
        }
    }
}

/// The remedy that goes with a refusal, by method.
fn hint(source: &ClusterError, method: &str) -> &'static str {
    let told = source.remedy().is_some() || matches!(source, ClusterError::Trust(_));
    if told || source.disposition() != Disposition::Refused {
        return "";
    }
    match method {
        // The request itself is wrong: another token would not help.
        "token" if source.code() == Some(tonic::Code::InvalidArgument) => {
            " (check onboarding.join_method and onboarding.token)"
        }
        "iam" => {
            " (check that onboarding.token names an iam token, that one of its allow rules has this \
             machine's AWS account and role ARN as `aws sts get-caller-identity` prints them, and that \
             the clock is right)"
        }
        "token" => {
            " (a token of this method joins one bot once and expires: make a new one with \
             `tctl tokens add --type=bot` or `tbot cluster tokens add --type=bot`)"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests;
