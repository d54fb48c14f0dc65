//! The older join protocol, `proto.JoinService`: one call for each kind of proof. It is all that a
//! cluster of version 18.0 has.
//!
//! A proof speaks the newer protocol's messages; they are put into the forms of these calls here.

mod streams;
mod talk;

use std::time::SystemTime;

use tokio::time::timeout;

use super::session::{JOIN, unusable};
use super::{JoinError, Proof};
use crate::clock::Clock;
use crate::cluster::ClusterError;
use crate::cluster::client::{Versioned, timed, unary};
use crate::crypto::{KeyError, PrivateKey};
use crate::pb::proto::Certs;
use crate::pb::proto::join_service_client::JoinServiceClient;
use crate::pb::teleport::join::v1::{ClientParams, join_request::Payload as Opening};
use crate::pb::types::RegisterUsingTokenRequest;

/// What every call needs.
struct Attempt<'a> {
    client: JoinServiceClient<Versioned>,
    method: &'static str,
    request: RegisterUsingTokenRequest,
    proof: &'a mut dyn Proof,
    clock: &'a Clock,
}

/// Joins with the call that `proof` belongs to.
pub(super) async fn join(
    channel: Versioned,
    method: &'static str,
    request: RegisterUsingTokenRequest,
    proof: &mut dyn Proof,
    clock: &Clock,
) -> Result<Certs, JoinError> {
    // The keys are in `request`.
    let opening = proof.opening(ClientParams::default());
    let mut attempt = Attempt {
        client: JoinServiceClient::new(channel),
        method,
        request,
        proof,
        clock,
    };
    let wrap = JoinError::cluster(method);
    let exchange = async {
        match opening {
            Opening::TokenInit(_) => attempt.with_token().await.map_err(&wrap),
            Opening::OidcInit(init) => {
                attempt.request.id_token = String::from_utf8_lossy(&init.id_token).into_owned();
                attempt.with_token().await.map_err(&wrap)
            }
            Opening::IamInit(_) => streams::iam(attempt).await,
            Opening::AzureInit(_) => streams::azure(attempt).await,
            Opening::TpmInit(init) => streams::tpm(attempt, init).await,
            Opening::BoundKeypairInit(init) => streams::bound_keypair(attempt, init).await,
            _ => Err(wrap(unusable(
                "Join",
                "it lacks teleport.join.v1, the only protocol in which a bot can join by this method",
            ))),
        }
    };
    timeout(JOIN, Box::pin(exchange))
        .await
        .unwrap_or_else(|_elapsed| Err(wrap(unusable("Join", "no answer within a minute"))))
}

/// The request that every call carries: a new key for one token, and nothing else.
pub(super) fn request(
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

impl Attempt<'_> {
    async fn with_token(mut self) -> Result<Certs, ClusterError> {
        unary(
            "RegisterUsingToken",
            self.client.register_using_token(timed(self.request)),
        )
        .await
    }
}
