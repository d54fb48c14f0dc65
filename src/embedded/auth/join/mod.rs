//! Joining, whatever the protocol: look at the token, have its method's verifier judge the proof, and
//! issue.
//!
//! Here is also the unary call of an 18.0 cluster, for proofs that are one message.

mod streams;

use tonic::{Request, Response, Status, Streaming};

use super::attempt::{Attempt, Known};
use super::{Auth, Refusal, blocking, caller, user_agent};
use crate::join::verify::{self, Carrier, Dialogue, Joining, Verifier};
use crate::pb::proto::join_service_server::JoinService;
use crate::pb::proto::{
    Certs, RegisterUsingAzureMethodRequest, RegisterUsingBoundKeypairMethodRequest,
    RegisterUsingIamMethodRequest, RegisterUsingTpmMethodRequest,
};
use crate::pb::teleport::join::v1::join_request::Payload as Opening;
use crate::pb::teleport::join::v1::{
    BoundKeypairResult, OidcInit, TokenInit, challenge, challenge_solution,
};
use crate::pb::types::RegisterUsingTokenRequest;

/// The way a proof came in.
pub(super) enum Door {
    /// A first message of the newer protocol, or one of a stream of its own in the older protocol,
    /// and the text that the client has signed or is to sign.
    Stream(Box<Opening>, String),
    /// The unary call: nothing but the request.
    Unary,
}

/// What a join leads to.
#[derive(Debug, Clone, Default)]
pub(super) struct Joined {
    pub(super) certs: Certs,
    /// Beside the certificates of a join by `bound_keypair`.
    pub(super) bound_keypair: Option<BoundKeypairResult>,
}

impl Auth {
    /// Looks at the token, at the proof, and issues.
    ///
    /// # Errors
    /// The refusal, as it was written into the audit log.
    pub(super) async fn by_method(
        &self,
        attempt: Attempt,
        door: Door,
        dialogue: &mut dyn Dialogue,
    ) -> Result<Joined, Refusal> {
        let _known = self.joins.enter()?;
        let looked = {
            let _turn = self.joins.turn().await?;
            let look = move || {
                let mut attempt = attempt;
                let found = attempt.look_up().and_then(|()| {
                    let opened = opening(&attempt, door)?;
                    let known = match opened.0.carrier() {
                        Carrier::BoundKeypair => attempt.known()?,
                        _ => Known::default(),
                    };
                    Ok((opened, known))
                });
                Ok::<_, Refusal>((attempt, found))
            };
            blocking(look).await?
        };
        let (mut attempt, found) = looked;
        let verified = match found {
            Ok(((verifier, opening, challenge), known)) => {
                let presented = attempt.presented();
                let joining = Joining {
                    token: &attempt.request.token,
                    spec: attempt.spec(),
                    status: attempt.status(),
                    bot: attempt.bot(),
                    instance: presented.as_ref().map(|presented| presented.id.as_str()),
                    cluster: &self.state.name,
                    suite: self.state.authorities.suite(),
                    state_keys: &known.state_keys,
                    lock: known.lock.as_ref(),
                    lost: known.lost.as_deref(),
                    now: attempt.now(),
                    opening: &opening,
                    challenge: &challenge,
                    address: attempt.address(),
                    again: presented.is_some(),
                    world: &self.world,
                };
                let mut seen = verify::Seen::default();
                let verified = verifier.verify(&joining, dialogue, &mut seen).await;
                attempt.seen = seen;
                verified
            }
            Err(refusal) => Err(refusal),
        };
        let _turn = self.joins.turn().await?;
        blocking(move || {
            attempt.lock_if_copied()?;
            let joined = verified.and_then(|()| attempt.issue());
            attempt.finish(joined)
        })
        .await
    }
}

/// The verifier of the token's method, what it begins with, and the text to be signed.
fn opening(
    attempt: &Attempt,
    door: Door,
) -> Result<(&'static dyn Verifier, Opening, String), Refusal> {
    let method = attempt.method();
    let verifier =
        verify::method(method).ok_or_else(|| Refusal::bad_parameter(unsupported(method)))?;
    let (opening, challenge) = match (door, verifier.carrier()) {
        (Door::Stream(opening, challenge), carrier) => {
            if Carrier::of(&opening) != Some(carrier) {
                return Err(other_stream(&opening, method));
            }
            (*opening, challenge)
        }
        (Door::Unary, Carrier::Token) => (Opening::TokenInit(TokenInit::default()), String::new()),
        (Door::Unary, Carrier::IdToken) => {
            let init = OidcInit {
                client_params: None,
                id_token: attempt.request.id_token.clone().into_bytes(),
            };
            (Opening::OidcInit(init), String::new())
        }
        (Door::Unary, _) => {
            return Err(Refusal::denied(format!(
                "this token is only valid for the {method} join method but the node has connected \
                 to the wrong endpoint, make sure your node is configured to use the {method} join \
                 method"
            )));
        }
    };
    Ok((verifier, opening, challenge))
}

/// What a cluster says of a method by which no bot can join.
pub(super) fn unsupported(method: &str) -> String {
    format!("unsupported join method {method:?} for bot")
}

/// The texts of an 18.0 cluster for a token that came to another method's stream.
fn other_stream(opening: &Opening, method: &str) -> Refusal {
    let not = |name: &str| {
        Refusal::denied(format!(
            "this token does not support the {name} join method"
        ))
    };
    let not_for = |name: &str| {
        Refusal::bad_parameter(format!("specified join token is not for `{name}` method"))
    };
    match Carrier::of(opening) {
        Some(Carrier::Iam) => not("IAM"),
        Some(Carrier::Azure) => not("Azure"),
        Some(Carrier::Tpm) => not_for("tpm"),
        Some(Carrier::BoundKeypair) => not_for("bound_keypair"),
        _ => Refusal::bad_parameter(format!(
            "the client did not send the init message of method {method}"
        )),
    }
}

/// A client that is never asked anything.
struct Mute;

#[tonic::async_trait]
impl Dialogue for Mute {
    async fn ask(
        &mut self,
        _challenge: challenge::Payload,
    ) -> Result<challenge_solution::Payload, Refusal> {
        Err(Refusal::unimplemented("this call carries no challenge"))
    }
}

#[tonic::async_trait]
impl JoinService for Auth {
    type RegisterUsingIAMMethodStream = streams::Answers<RegisterUsingIamMethodRequest>;

    async fn register_using_iam_method(
        &self,
        request: Request<Streaming<RegisterUsingIamMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingIAMMethodStream>, Status> {
        self.stream(request)
    }

    type RegisterUsingAzureMethodStream = streams::Answers<RegisterUsingAzureMethodRequest>;

    async fn register_using_azure_method(
        &self,
        request: Request<Streaming<RegisterUsingAzureMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingAzureMethodStream>, Status> {
        self.stream(request)
    }

    type RegisterUsingTPMMethodStream = streams::Answers<RegisterUsingTpmMethodRequest>;

    async fn register_using_tpm_method(
        &self,
        request: Request<Streaming<RegisterUsingTpmMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingTPMMethodStream>, Status> {
        self.stream(request)
    }

    type RegisterUsingBoundKeypairMethodStream =
        streams::Answers<RegisterUsingBoundKeypairMethodRequest>;

    async fn register_using_bound_keypair_method(
        &self,
        request: Request<Streaming<RegisterUsingBoundKeypairMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingBoundKeypairMethodStream>, Status> {
        self.stream(request)
    }

    async fn register_using_token(
        &self,
        request: Request<RegisterUsingTokenRequest>,
    ) -> Result<Response<Certs>, Status> {
        let (caller, agent) = (caller(&request)?, user_agent(&request));
        let attempt = Attempt::new(&self.state, caller, agent, request.into_inner());
        let joined = self.by_method(attempt, Door::Unary, &mut Mute).await?;
        Ok(Response::new(joined.certs))
    }
}
