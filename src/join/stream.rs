//! The newer join protocol: one stream, `teleport.join.v1.JoinService/Join`, for every method.
//!
//! | client | cluster |
//! |---|---|
//! | `ClientInit`: token, role, method | |
//! | | `ServerInit`: method, suite |
//! | the method's init: public keys, expiry | |
//! | | `Challenge`, as many as the method has |
//! | `ChallengeSolution` for each | |
//! | | `Result`: certificates |
//!
//! Anything else ends the exchange: the client says `GivingUp` and why, as far as it still can. An
//! error of the cluster is the status of the stream.

use std::time::{Duration, SystemTime};

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::session::{JOIN, unusable};
use super::{JoinError, Proof};
use crate::clock::Clock;
use crate::cluster::ClusterError;
use crate::cluster::client::Versioned;
use crate::crypto::{KeyError, PrivateKey, Suite, pem, ssh};
use crate::pb::proto::Certs;
use crate::pb::teleport::join::v1::giving_up::Reason;
use crate::pb::teleport::join::v1::join_request::Payload as Say;
use crate::pb::teleport::join::v1::join_response::Payload as Heard;
use crate::pb::teleport::join::v1::join_service_client::JoinServiceClient;
use crate::pb::teleport::join::v1::{
    BotParams, Certificates, Challenge, ChallengeSolution, ClientInit, ClientParams, GivingUp,
    JoinRequest, JoinResponse, PublicKeys, client_params, result,
};

/// The call, as errors name it.
const METHOD: &str = "Join";
/// More than any method has.
const MAX_CHALLENGES: u32 = 8;
/// For the end of a stream after the last message that matters: it only lets the other side see
/// an end instead of an abort.
const FAREWELL: Duration = Duration::from_secs(2);

/// An exchange that has begun: the cluster has accepted the token's name and the method.
#[derive(Debug)]
pub(super) struct Exchange {
    method: &'static str,
    suite: Suite,
    requests: mpsc::Sender<JoinRequest>,
    answers: Streaming<JoinResponse>,
}

impl Exchange {
    /// Says who wants to join, and hears which keys the cluster wants.
    pub(super) async fn begin(
        channel: Versioned,
        method: &'static str,
        token: &str,
    ) -> Result<Self, ClusterError> {
        let opening = async {
            let (requests, receiver) = mpsc::channel(1);
            let hello = Say::ClientInit(ClientInit {
                join_method: Some(method.to_owned()),
                token_name: token.to_owned(),
                system_role: "Bot".to_owned(),
            });
            // There is room for it; a stream that is gone shows in the next message.
            drop(requests.send(request(hello)).await);
            let answers = JoinServiceClient::new(channel)
                .join(ReceiverStream::new(receiver))
                .await
                .map_err(ClusterError::call(METHOD))?
                .into_inner();
            let mut exchange = Self {
                method,
                suite: Suite::Legacy,
                requests,
                answers,
            };
            match exchange.next().await? {
                Some(Heard::Init(init)) if init.join_method == method => {
                    exchange.suite = Suite::from_name(&init.signature_algorithm_suite);
                    Ok(exchange)
                }
                Some(Heard::Init(init)) => {
                    let problem = format!(
                        "it wants a join of method {:?}, not {method}",
                        init.join_method
                    );
                    Err(exchange
                        .give_up(Reason::UnsupportedJoinMethod, problem)
                        .await)
                }
                Some(other) => Err(exchange.unexpected(Some(&other), "a first message").await),
                None => Err(exchange.unexpected(None, "a first message").await),
            }
        };
        timeout(JOIN, opening)
            .await
            .unwrap_or_else(|_elapsed| late())
    }

    /// The suite that the cluster wants keys of.
    pub(super) fn suite(&self) -> Suite {
        self.suite
    }

    /// Sends the keys, proves what the method asks for, and takes the certificates.
    pub(super) async fn finish(
        self,
        key: &PrivateKey,
        expires: SystemTime,
        proof: &mut dyn Proof,
        clock: &Clock,
    ) -> Result<Certs, JoinError> {
        let method = self.method;
        let params = params(key, expires)?;
        timeout(JOIN, self.prove(params, proof, clock))
            .await
            .unwrap_or_else(|_elapsed| late().map_err(JoinError::cluster(method)))
    }

    async fn prove(
        mut self,
        params: ClientParams,
        proof: &mut dyn Proof,
        clock: &Clock,
    ) -> Result<Certs, JoinError> {
        let wrap = JoinError::cluster(self.method);
        self.say(proof.opening(params)).await;
        let mut asked = 0;
        let joined = loop {
            match self.next().await.map_err(&wrap)? {
                Some(Heard::Challenge(Challenge { payload })) if asked < MAX_CHALLENGES => {
                    asked += 1;
                    let solution = match payload {
                        Some(payload) => proof.solve(payload, clock.now()).await,
                        None => Ok(None),
                    };
                    match solution {
                        Ok(Some(solution)) => {
                            let payload = Some(solution);
                            self.say(Say::Solution(ChallengeSolution { payload })).await;
                        }
                        Ok(None) => {
                            let method = self.method;
                            let problem =
                                format!("it sent a challenge that has no place in method {method}");
                            let reason = Reason::UnsupportedMessageType;
                            return Err(wrap(self.give_up(reason, problem).await));
                        }
                        Err(error) => {
                            let reason = Reason::ChallengeSolutionFailed;
                            drop(self.give_up(reason, error.to_string()).await);
                            return Err(error);
                        }
                    }
                }
                Some(Heard::Result(result)) => break result,
                other => {
                    let wanted = "a challenge or a result";
                    return Err(wrap(self.unexpected(other.as_ref(), wanted).await));
                }
            }
        };
        // The certificates are not to be lost while the other side takes its time.
        tokio::spawn(self.end());
        let unusable = |problem: &str| wrap(unusable(METHOD, problem));
        let Some(result::Payload::BotResult(bot)) = joined.payload else {
            return Err(unusable("its result holds no certificates of a bot"));
        };
        let certificates = bot
            .certificates
            .ok_or_else(|| unusable("its result holds no certificates of a bot"))?;
        if let Some(result) = bot.bound_keypair_result {
            proof.settle(result).await?;
        }
        certs(certificates).ok_or_else(|| unusable("its result holds an SSH key of no known form"))
    }

    /// The next message's payload; `None` if it is of a kind that is not known here.
    async fn next(&mut self) -> Result<Option<Heard>, ClusterError> {
        self.answers
            .message()
            .await
            .map_err(ClusterError::call(METHOD))?
            .map(|message| message.payload)
            .ok_or_else(|| unusable(METHOD, "the stream ended early"))
    }

    async fn say(&self, payload: Say) {
        // A stream that is gone shows in the next message.
        drop(self.requests.send(request(payload)).await);
    }

    /// Gives up because of a message that has no place where it came.
    async fn unexpected(self, heard: Option<&Heard>, wanted: &str) -> ClusterError {
        let kind = match heard {
            Some(Heard::Init(_)) => "a first message",
            Some(Heard::Challenge(_)) => "a challenge",
            Some(Heard::Result(_)) => "a result",
            None => "a message of an unknown kind",
        };
        let problem = format!("it sent {kind} instead of {wanted}");
        self.give_up(Reason::UnsupportedMessageType, problem).await
    }

    /// Tells the cluster why this is the end, so that its audit log can tell.
    async fn give_up(self, reason: Reason, problem: String) -> ClusterError {
        self.say(Say::GivingUp(GivingUp {
            reason: reason.into(),
            msg: problem.clone(),
        }))
        .await;
        self.end().await;
        unusable(METHOD, &problem)
    }

    /// Ends this side of the stream and waits a little for the other one. Nothing that still comes
    /// counts.
    async fn end(self) {
        let Self {
            requests,
            mut answers,
            ..
        } = self;
        drop(requests);
        drop(timeout(FAREWELL, answers.message()).await);
    }
}

fn late<T>() -> Result<T, ClusterError> {
    Err(unusable(METHOD, "no answer within a minute"))
}

fn request(payload: Say) -> JoinRequest {
    JoinRequest {
        payload: Some(payload),
    }
}

/// The key for both uses, in binary forms, and until when the bot wants its certificates.
pub(super) fn params(key: &PrivateKey, expires: SystemTime) -> Result<ClientParams, KeyError> {
    let ssh = ssh::wire_of_line(&key.public_ssh_line()?).map_err(|_source| KeyError::Library)?;
    let bot = BotParams {
        public_keys: Some(PublicKeys {
            public_tls_key: key.public_spki(),
            public_ssh_key: ssh,
        }),
        expires: Some(expires.into()),
    };
    Ok(ClientParams {
        payload: Some(client_params::Payload::BotParams(bot)),
    })
}

/// The certificates in the text forms that storage and outputs use; `None` if one of SSH has none.
fn certs(binary: Certificates) -> Option<Certs> {
    let line = |wire: &Vec<u8>| ssh::line_of_wire(wire).ok().map(String::into_bytes);
    let text = |der: &Vec<u8>| pem::encode("CERTIFICATE", der).into_bytes();
    Some(Certs {
        ssh: line(&binary.ssh_cert)?,
        tls: text(&binary.tls_cert),
        tlsca_certs: binary.tls_ca_certs.iter().map(text).collect(),
        sshca_certs: binary.ssh_ca_keys.iter().map(line).collect::<Option<_>>()?,
    })
}
