//! The older join protocol, `proto.JoinService`: one call for each kind of proof. It is all that a
//! cluster of version 18.0 has.

use std::time::SystemTime;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use super::session::{JOIN, unusable};
use super::{JoinError, Proof, SignIam};
use crate::clock::Clock;
use crate::cluster::ClusterError;
use crate::cluster::client::{Versioned, timed, unary};
use crate::crypto::{KeyError, PrivateKey};
use crate::pb::proto::join_service_client::JoinServiceClient;
use crate::pb::proto::{Certs, RegisterUsingIamMethodRequest};
use crate::pb::types::RegisterUsingTokenRequest;

/// Joins with the call that `proof` belongs to.
pub(super) async fn join(
    channel: Versioned,
    method: &'static str,
    request: RegisterUsingTokenRequest,
    proof: &Proof,
    clock: &Clock,
) -> Result<Certs, JoinError> {
    let client = JoinServiceClient::new(channel);
    match proof {
        Proof::Token => with_token(client, request)
            .await
            .map_err(JoinError::cluster(method)),
        Proof::Iam(sign) => with_iam(client, method, request, sign, clock).await,
    }
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

async fn with_token(
    mut client: JoinServiceClient<Versioned>,
    request: RegisterUsingTokenRequest,
) -> Result<Certs, ClusterError> {
    unary(
        "RegisterUsingToken",
        client.register_using_token(timed(request)),
    )
    .await
}

/// The cluster speaks first, with a challenge. A proof that fails ends the stream, and nothing was
/// sent.
async fn with_iam(
    mut client: JoinServiceClient<Versioned>,
    method: &'static str,
    request: RegisterUsingTokenRequest,
    sign: &SignIam,
    clock: &Clock,
) -> Result<Certs, JoinError> {
    const METHOD: &str = "RegisterUsingIAMMethod";
    let wrap = JoinError::cluster(method);
    let exchange = async {
        let (sender, receiver) = mpsc::channel(1);
        let mut answers = client
            .register_using_iam_method(ReceiverStream::new(receiver))
            .await
            .map_err(|status| wrap(ClusterError::call(METHOD)(status)))?
            .into_inner();
        let mut next = async || {
            answers
                .message()
                .await
                .map_err(ClusterError::call(METHOD))
                .and_then(|message| {
                    message.ok_or_else(|| unusable(METHOD, "the stream ended early"))
                })
                .map_err(&wrap)
        };
        let challenge = next().await?.challenge;
        if challenge.is_empty() {
            return Err(wrap(unusable(METHOD, "it sent no challenge")));
        }
        let answer = RegisterUsingIamMethodRequest {
            sts_identity_request: sign(&challenge, clock.now())?,
            register_using_token_request: Some(request),
        };
        // A stream that is gone shows in the next message.
        drop(sender.send(answer).await);
        next()
            .await?
            .certs
            .ok_or_else(|| wrap(unusable(METHOD, "it holds no certificates")))
    };
    timeout(JOIN, exchange)
        .await
        .unwrap_or_else(|_elapsed| Err(wrap(unusable(METHOD, "no answer within a minute"))))
}
