//! How a bot proves to a cluster who it is: a registry, and one folder per join method.
//!
//! A [`JoinMethod`] reads its section of the configuration and becomes a [`Prover`], which makes a
//! [`Proof`] for each join. [`session`] opens the connection that a join runs on and carries the
//! proof there in one of two protocols: the newer stream that all methods share, or the older calls.
//! Each method's folder has both halves: `mod.rs` proves, `verify.rs` is the half of the embedded
//! cluster and imports nothing of the agent.

pub mod azure;
pub mod azure_devops;
pub mod bitbucket;
pub mod bound_keypair;
pub mod circleci;
pub mod env0;
pub mod gcp;
pub mod generic_oidc;
pub mod github;
pub mod gitlab;
pub mod iam;
mod id_token;
pub mod kubernetes;
pub mod oracle;
pub mod session;
pub mod spacelift;
pub mod terraform_cloud;
pub mod token;
pub mod tpm;
pub mod verify;

mod metadata;
mod older;
mod secret;
mod stream;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;

pub use secret::{TokenSource, token_hash};
pub use session::{Hello, Older, Session};

use crate::clock::Clock;
use crate::cluster::{ClusterError, Disposition};
use crate::crypto::KeyError;
use crate::destination::Destination;
use crate::env::Env;
use crate::pb::teleport::join::v1::{
    BoundKeypairResult, ClientParams, challenge, challenge_solution, join_request,
};
use crate::secret::Secret;
use crate::yaml::{Fields, Tree};

/// The join methods, by their YAML `join_method`.
pub const METHODS: &[&dyn JoinMethod] = &[
    &azure::Azure,
    &azure_devops::AzureDevops,
    &bitbucket::Bitbucket,
    &bound_keypair::BoundKeypair,
    &circleci::Circleci,
    &env0::Env0,
    &gcp::Gcp,
    &generic_oidc::GenericOidc,
    &github::Github,
    &gitlab::Gitlab,
    &iam::Iam,
    &kubernetes::Kubernetes,
    &oracle::Oracle,
    &spacelift::Spacelift,
    &terraform_cloud::TerraformCloud,
    &token::Token,
    &tpm::Tpm,
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

/// One join method: the agent's half, not configured yet.
pub trait JoinMethod: Send + Sync + fmt::Debug {
    /// The YAML `join_method`.
    fn name(&self) -> &'static str;
    /// How its identities are kept alive.
    fn renewal(&self) -> Renewal {
        Renewal::Rejoin
    }
    /// Whether the cluster counts a join, so that its answer must not get lost. The bot waits a little
    /// for it when it is told to stop, and asks again with the same key.
    fn counts(&self) -> bool {
        self.renewal() == Renewal::Certificate
    }
    /// The key of its own section under `onboarding`, if it has one.
    fn section(&self) -> Option<&'static str> {
        None
    }
    /// Reads its own section, absent or not; problems go to `section`.
    fn read(&self, section: Option<&mut Fields<'_>>) -> Arc<dyn Prover>;
    /// The method with the parameter that a join URI has after the token; `None` if it takes none.
    fn with_parameter(&self, _parameter: Secret<String>) -> Option<Arc<dyn Prover>> {
        None
    }
    /// What to look at when a cluster refuses a join with the status `code`: a text in brackets that
    /// begins with a blank, or nothing.
    fn hint(&self, code: Option<tonic::Code>) -> &'static str;
}

/// What surrounds a proof.
#[derive(Debug, Clone, Copy)]
pub struct Surroundings<'a> {
    /// The agent's environment variables.
    pub env: &'a Env,
    /// The program's clock.
    pub clock: &'a Clock,
    /// Where the bot keeps what it needs again: its own storage.
    pub storage: &'a Arc<dyn Destination>,
}

/// A configured join method.
#[async_trait]
pub trait Prover: Send + Sync + fmt::Debug {
    /// Which method it is of.
    fn method(&self) -> &'static dyn JoinMethod;
    /// Its own section as written in a configuration file; `None` if there is nothing to write.
    fn tree(&self) -> Option<Tree> {
        None
    }
    /// Fetches what the proof needs. It may be slow, so it comes before the exchange, which the
    /// cluster bounds.
    async fn prepare(&self, around: &Surroundings<'_>) -> Result<Box<dyn Proof>, JoinError>;
}

/// What a bot proves itself with in one join. The messages are those of the newer protocol; the
/// older one carries the same in other forms.
#[async_trait]
pub trait Proof: Send + Sync + fmt::Debug {
    /// The method's first message.
    fn opening(&self, client_params: ClientParams) -> join_request::Payload;
    /// Answers a question of the cluster, at a time. `None` if it is none of this method's.
    async fn solve(
        &mut self,
        _challenge: challenge::Payload,
        _now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        Ok(None)
    }
    /// Keeps what comes beside the certificates, before they are used.
    async fn settle(&mut self, _result: BoundKeypairResult) -> Result<(), JoinError> {
        Ok(())
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
    /// This process will never have what the proof is made of: a variable of its environment is not
    /// set, or the configuration does not say where to look.
    #[error("join method {method}: {problem}")]
    Missing {
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
            Self::Missing { .. } => Disposition::Refused,
            Self::Proof { .. } | Self::Token(_) | Self::Key(_) => Disposition::Retry,
        }
    }
}

/// The remedy that goes with a refusal, by method.
fn hint(source: &ClusterError, name: &str) -> &'static str {
    let told = source.remedy().is_some() || matches!(source, ClusterError::Trust(_));
    let refused = source.disposition() == Disposition::Refused || source.is_unexplained();
    if told || !refused {
        return "";
    }
    method(name).map_or("", |method| method.hint(source.code()))
}

#[cfg(test)]
mod tests;
