//! The connection that a join runs on: a proxy's, an auth service's, or the bot's own.

use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

use crate::clock::Clock;
use crate::cluster::client::{Route, Versioned, timed, versioned};
use crate::cluster::credential::{API_DOMAIN, roots_of};
use crate::cluster::dial::{Dialer, server_name};
use crate::cluster::trust::{Trust, check_pins};
use crate::cluster::{Client, ClusterError, ping};
use crate::crypto::Suite;
use crate::pb::proto::auth_service_client::AuthServiceClient;
use crate::pb::proto::join_service_client::JoinServiceClient;
use crate::pb::proto::{Certs, PingRequest, RegisterUsingIamMethodRequest};
use crate::pb::types::{RegisterUsingTokenRequest, SignatureAlgorithmSuite};

/// The longest a join may take; a cluster gives up after a minute.
const JOIN: Duration = Duration::from_secs(60);

/// An open join connection, and the suite that the cluster wants keys of.
#[derive(Debug)]
pub struct Session {
    client: JoinServiceClient<Versioned>,
    suite: Suite,
}

impl Session {
    /// Opens a session for a bot that has no certificates.
    pub async fn open(
        clock: &Clock,
        dialer: &Arc<dyn Dialer>,
        route: &Route,
        trust: &Trust,
    ) -> Result<Self, ClusterError> {
        match route {
            Route::Proxy(address) => {
                let endpoints = ping::find(clock, dialer.as_ref(), trust, address).await?;
                let tls = trust.web(clock, &[b"teleport-proxy-grpc", b"h2"])?;
                let channel = versioned(Arc::clone(dialer), address, server_name(address)?, tls)?;
                Ok(Self {
                    client: JoinServiceClient::new(channel),
                    suite: endpoints.suite,
                })
            }
            Route::Direct(address) => {
                let connect = |roots| {
                    let name = ServerName::try_from(API_DOMAIN)
                        .map_err(|_source| ClusterError::Trust(API_DOMAIN.to_owned()))?;
                    versioned(
                        Arc::clone(dialer),
                        address,
                        name,
                        Trust::auth(clock, roots, &[b"h2"])?,
                    )
                };
                let channel = connect(first_roots(trust, address, &connect).await?)?;
                let answer = AuthServiceClient::new(channel.clone())
                    .ping(timed(PingRequest {}))
                    .await
                    .map_err(ClusterError::call("Ping"))?;
                Ok(Self {
                    client: JoinServiceClient::new(channel),
                    suite: suite_of(answer.get_ref().signature_algorithm_suite),
                })
            }
        }
    }

    /// A session over the bot's own authenticated connection: the cluster keeps the bot instance.
    pub async fn again(client: &Client) -> Result<Self, ClusterError> {
        let answer = client.ping().await?;
        Ok(Self {
            client: client.join_service()?,
            suite: suite_of(answer.signature_algorithm_suite),
        })
    }

    /// The suite that the cluster announced.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// Joins with a token alone.
    pub async fn with_token(
        &mut self,
        request: RegisterUsingTokenRequest,
    ) -> Result<Certs, ClusterError> {
        self.client
            .register_using_token(timed(request))
            .await
            .map(tonic::Response::into_inner)
            .map_err(ClusterError::call("RegisterUsingToken"))
    }

    /// Joins with a signed AWS request: the cluster speaks first, with a challenge that `prove`
    /// signs. A proof that fails ends the stream, and nothing was sent.
    pub async fn with_iam<P, E>(
        &mut self,
        request: RegisterUsingTokenRequest,
        prove: impl FnOnce(String) -> P,
    ) -> Result<Result<Certs, E>, ClusterError>
    where
        P: Future<Output = Result<Vec<u8>, E>>,
    {
        const METHOD: &str = "RegisterUsingIAMMethod";
        let exchange = async {
            let (sender, receiver) = mpsc::channel(1);
            let mut answers = self
                .client
                .register_using_iam_method(ReceiverStream::new(receiver))
                .await
                .map_err(ClusterError::call(METHOD))?
                .into_inner();
            let mut next = async || {
                answers
                    .message()
                    .await
                    .map_err(ClusterError::call(METHOD))?
                    .ok_or_else(|| unusable(METHOD, "the stream ended early"))
            };
            let challenge = next().await?.challenge;
            if challenge.is_empty() {
                return Err(unusable(METHOD, "it sent no challenge"));
            }
            let signed = match prove(challenge).await {
                Ok(signed) => signed,
                Err(error) => return Ok(Err(error)),
            };
            let answer = RegisterUsingIamMethodRequest {
                register_using_token_request: Some(request),
                sts_identity_request: signed,
            };
            // A stream that is gone shows in the next message.
            drop(sender.send(answer).await);
            let certs = next().await?.certs;
            certs
                .map(Ok)
                .ok_or_else(|| unusable(METHOD, "it holds no certificates"))
        };
        timeout(JOIN, exchange)
            .await
            .unwrap_or_else(|_elapsed| Err(unusable(METHOD, "no answer within a minute")))
    }
}

/// Whom to believe at an auth service: pinned authorities, those of a file, or anyone.
async fn first_roots(
    trust: &Trust,
    address: &str,
    connect: &impl Fn(Option<rustls::RootCertStore>) -> Result<Versioned, ClusterError>,
) -> Result<Option<rustls::RootCertStore>, ClusterError> {
    if trust.insecure {
        tracing::warn!(
            address,
            "Joining without verifying the auth service, as configured (insecure)"
        );
        return Ok(None);
    }
    if !trust.ca_pins.is_empty() {
        let shown = AuthServiceClient::new(connect(None)?)
            .get_cluster_ca_cert(timed(()))
            .await
            .map_err(ClusterError::call("GetClusterCACert"))?;
        let text = String::from_utf8_lossy(&shown.get_ref().tlsca).into_owned();
        return roots_of(&check_pins(&text, &trust.ca_pins)?).map(Some);
    }
    if let Some(path) = &trust.ca_path {
        let text = std::fs::read_to_string(path).map_err(|source| {
            ClusterError::Trust(format!("ca_path: cannot read {}: {source}", path.display()))
        })?;
        let roots = roots_of(&[text])?;
        if roots.is_empty() {
            return Err(ClusterError::Trust(format!(
                "ca_path: {} holds no certificate",
                path.display()
            )));
        }
        return Ok(Some(roots));
    }
    tracing::warn!(
        address,
        "Joining without verifying the auth service: set onboarding.ca_pins, or use proxy_server"
    );
    Ok(None)
}

fn suite_of(number: i32) -> Suite {
    SignatureAlgorithmSuite::try_from(number).map_or(Suite::Legacy, Suite::from)
}

fn unusable(call: &'static str, problem: &str) -> ClusterError {
    ClusterError::Answer {
        call,
        problem: problem.to_owned(),
    }
}
