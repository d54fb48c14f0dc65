//! How a bot proves to a cluster who it is: a trait, and one folder per join method.
//!
//! [`session`] opens the connection that a join runs on. Each method's folder has both halves:
//! `mod.rs` proves, `verify.rs` is the half of the embedded cluster and imports nothing of the agent.

pub mod iam;
pub mod session;
pub mod token;

mod secret;

use std::fmt;
use std::time::SystemTime;

use async_trait::async_trait;

pub use secret::{TokenSource, token_hash};
pub use session::Session;

use crate::clock::Clock;
use crate::cluster::{ClusterError, Disposition};
use crate::crypto::{KeyError, PrivateKey};
use crate::pb::proto::Certs;
use crate::pb::types::RegisterUsingTokenRequest;

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
    /// Proves itself in `session` and returns the certificates.
    async fn join(
        &self,
        session: &mut Session,
        request: RegisterUsingTokenRequest,
        clock: &Clock,
    ) -> Result<Certs, JoinError>;
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
    if source.disposition() != Disposition::Refused || matches!(source, ClusterError::Trust(_)) {
        return "";
    }
    match method {
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

/// The request that every method sends: a new key for one token, and nothing else.
pub fn request(
    token: &str,
    key: &PrivateKey,
    expires: SystemTime,
) -> Result<RegisterUsingTokenRequest, KeyError> {
    Ok(RegisterUsingTokenRequest {
        role: "Bot".to_owned(),
        token: token.to_owned(),
        public_tls_key: key.public_pem().into_bytes(),
        public_ssh_key: key.public_ssh_line()?.into_bytes(),
        expires: Some(expires.into()),
        ..RegisterUsingTokenRequest::default()
    })
}
