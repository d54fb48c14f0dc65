//! The newer join service: one stream for every method. Here are the order of the messages and
//! their forms; what they lead to is decided where the older calls decide it.

use std::pin::Pin;
use std::time::Duration;

use tokio::sync::mpsc::Sender;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status};

use super::attempt::Attempt;
use super::join::{Door, unsupported};
use super::{Auth, Refusal, blocking, caller, user_agent};
use crate::crypto::{pem, ssh};
use crate::embedded::caller::Caller;
use crate::join::verify::{self, Carrier, Dialogue, Verifier};
use crate::pb::proto::Certs;
use crate::pb::teleport::join::v1::join_request::Payload as Heard;
use crate::pb::teleport::join::v1::join_response::Payload as Say;
use crate::pb::teleport::join::v1::join_service_server::JoinService;
use crate::pb::teleport::join::v1::{
    BotResult, Certificates, Challenge, ClientParams, JoinRequest, JoinResponse, Result as Joined,
    ServerInit, challenge, challenge_solution, client_params as params, result,
};
use crate::pb::types::RegisterUsingTokenRequest;

/// The longest that a join may take.
const STREAM: Duration = Duration::from_mins(1);
/// How much of a client's reason for giving up is kept, in characters.
const MAX_REASON: usize = 512;

/// What a client sends.
type Requests<'a> = Pin<&'a mut (dyn Stream<Item = Result<JoinRequest, Status>> + Send)>;
/// Where the answers go.
type Responses = Sender<Result<JoinResponse, Status>>;

impl Auth {
    /// Answers one stream until the exchange ends, the client goes away, or it takes too long.
    pub(super) async fn join_stream(
        &self,
        caller: Caller,
        user_agent: String,
        requests: impl Stream<Item = Result<JoinRequest, Status>> + Send,
        responses: Responses,
    ) {
        let requests = std::pin::pin!(requests);
        let exchange = self.join_exchange(caller, user_agent, requests, &responses);
        let ended = tokio::select! {
            ended = tokio::time::timeout(STREAM, Box::pin(exchange)) => ended,
            () = responses.closed() => return,
        };
        let status = match ended {
            Ok(Ok(())) => return,
            Ok(Err(status)) => status,
            Err(_elapsed) => Refusal::limit("the join did not end within a minute").into(),
        };
        // Nobody to tell if the client has gone.
        drop(responses.send(Err(status)).await);
    }

    /// The whole exchange, from the client's first message to its certificates.
    async fn join_exchange(
        &self,
        caller: Caller,
        user_agent: String,
        mut requests: Requests<'_>,
        responses: &Responses,
    ) -> Result<(), Status> {
        let Some(Heard::ClientInit(hello)) = next(&mut requests).await? else {
            return Err(Refusal::bad_parameter("a join begins with ClientInit").into());
        };
        let request = RegisterUsingTokenRequest {
            token: hello.token_name,
            role: hello.system_role,
            ..RegisterUsingTokenRequest::default()
        };
        let attempt = Attempt::new(&self.state, caller, user_agent, request);
        let mut attempt = self.accept(attempt, hello.join_method).await?;
        let init = ServerInit {
            join_method: attempt.method().to_owned(),
            signature_algorithm_suite: self.state.authorities.suite().name().to_owned(),
        };
        say(responses, Say::Init(init)).await?;

        let heard = next(&mut requests).await?;
        let carrier = verify::method(attempt.method()).map(Verifier::carrier);
        let mut opening = match heard {
            Some(opening) if Carrier::of(&opening) == carrier => opening,
            heard => {
                let wanted = format!("the init message of method {}", attempt.method());
                return Err(refuse(attempt, unexpected(heard, &wanted)).await);
            }
        };
        let params = client_params(&mut opening).and_then(Option::take);
        if let Err(refusal) = take(params, &mut attempt.request) {
            return Err(refuse(attempt, refusal).await);
        }
        let mut client = Client {
            requests,
            responses,
        };
        let verifier = verify::method(attempt.method());
        let challenge = verifier.map_or_else(verify::challenge, Verifier::challenge);
        let door = Door::Stream(Box::new(opening), challenge);
        let joined = self.by_method(attempt, door, &mut client).await?;
        let result = BotResult {
            certificates: Some(binary(&joined.certs)?),
            bound_keypair_result: joined.bound_keypair,
        };
        let result = Joined {
            payload: Some(result::Payload::BotResult(result)),
        };
        say(responses, Say::Result(result)).await?;
        Ok(())
    }

    /// Looks at the token and at the method that the client insists on, before it shows a key.
    async fn accept(
        &self,
        mut attempt: Attempt,
        asked: Option<String>,
    ) -> Result<Attempt, Refusal> {
        let _known = self.joins.enter()?;
        let _turn = self.joins.turn().await?;
        blocking(move || {
            let found = attempt.look_up().and_then(|()| {
                let method = attempt.method();
                match asked.filter(|asked| !asked.is_empty()) {
                    Some(asked) if asked != method => Err(Refusal::bad_parameter(format!(
                        "client requested join method {asked}, provision token only supports \
                         method {method}"
                    ))),
                    _ if verify::method(method).is_some() => Ok(()),
                    _ => Err(Refusal::bad_parameter(unsupported(method))),
                }
            });
            match found {
                Ok(()) => Ok(attempt),
                Err(refusal) => {
                    let told = attempt.finish(Err(refusal.clone()));
                    Err(told.err().unwrap_or(refusal))
                }
            }
        })
        .await
    }
}

/// The client of one stream.
struct Client<'a> {
    requests: Requests<'a>,
    responses: &'a Responses,
}

#[tonic::async_trait]
impl Dialogue for Client<'_> {
    async fn ask(
        &mut self,
        challenge: challenge::Payload,
    ) -> Result<challenge_solution::Payload, Refusal> {
        let payload = Some(challenge);
        say(self.responses, Say::Challenge(Challenge { payload })).await?;
        match next(&mut self.requests).await? {
            Some(Heard::Solution(solution)) => solution
                .payload
                .ok_or_else(|| unexpected(None, "the solution of the challenge")),
            heard => Err(unexpected(heard, "the solution of the challenge")),
        }
    }
}

/// The keys in a method's first message. `None` if it is none.
fn client_params(opening: &mut Heard) -> Option<&mut Option<ClientParams>> {
    Some(match opening {
        Heard::TokenInit(init) => &mut init.client_params,
        Heard::OidcInit(init) => &mut init.client_params,
        Heard::IamInit(init) => &mut init.client_params,
        Heard::AzureInit(init) => &mut init.client_params,
        Heard::TpmInit(init) => &mut init.client_params,
        Heard::OracleInit(init) => &mut init.client_params,
        Heard::BoundKeypairInit(init) => &mut init.client_params,
        Heard::ClientInit(_) | Heard::Solution(_) | Heard::GivingUp(_) => return None,
    })
}

/// The next message; `None` in it is a kind that is not known here.
async fn next(requests: &mut Requests<'_>) -> Result<Option<Heard>, Refusal> {
    match requests.next().await {
        Some(Ok(message)) => Ok(message.payload),
        Some(Err(status)) => Err(Refusal::bad_parameter(status.message())),
        None => Err(Refusal::cancelled()),
    }
}

async fn say(responses: &Responses, payload: Say) -> Result<(), Refusal> {
    let response = JoinResponse {
        payload: Some(payload),
    };
    responses
        .send(Ok(response))
        .await
        .map_err(|_closed| Refusal::cancelled())
}

/// Why `heard` ends the exchange: a client that gives up has a reason, any other one is out of order.
fn unexpected(heard: Option<Heard>, wanted: &str) -> Refusal {
    match heard {
        Some(Heard::GivingUp(giving_up)) => {
            let text: String = giving_up.msg.chars().take(MAX_REASON).collect();
            let reason = giving_up.reason().as_str_name();
            Refusal::bad_parameter(format!("the client gave up ({reason}): {text}"))
        }
        _ => Refusal::bad_parameter(format!("the client did not send {wanted}")),
    }
}

/// Writes the refusal into the audit log.
async fn refuse(attempt: Attempt, refusal: Refusal) -> Status {
    let told = blocking(move || attempt.finish(Err(refusal))).await;
    told.err()
        .map_or_else(|| Status::internal(""), Status::from)
}

/// Puts what a bot asks for into the older form of the request, whose keys are texts.
fn take(
    given: Option<ClientParams>,
    request: &mut RegisterUsingTokenRequest,
) -> Result<(), Refusal> {
    let missing = |what: &str| Refusal::bad_parameter(format!("{what} is required"));
    let Some(params::Payload::BotParams(bot)) = given.and_then(|given| given.payload) else {
        return Err(missing("BotParams"));
    };
    let keys = bot.public_keys.unwrap_or_default();
    if keys.public_tls_key.is_empty() || keys.public_ssh_key.is_empty() {
        return Err(missing("PublicKeys"));
    }
    request.public_tls_key = pem::encode("PUBLIC KEY", &keys.public_tls_key).into_bytes();
    request.public_ssh_key = ssh::line_of_wire(&keys.public_ssh_key)
        .map_err(|_source| Refusal::bad_parameter("cannot read the SSH public key"))?
        .into_bytes();
    request.expires = Some(bot.expires.ok_or_else(|| missing("Expires"))?);
    Ok(())
}

/// Certificates in the binary forms that this protocol carries.
fn binary(certs: &Certs) -> Result<Certificates, Refusal> {
    let der = |text: &Vec<u8>| {
        let text = std::str::from_utf8(text).ok()?;
        pem::certificates(text).ok()?.into_iter().next()
    };
    let wire = |line: &Vec<u8>| {
        let line = std::str::from_utf8(line).ok()?;
        ssh::wire_of_line(line).ok()
    };
    let all = || {
        Some(Certificates {
            tls_cert: der(&certs.tls)?,
            tls_ca_certs: certs.tlsca_certs.iter().map(der).collect::<Option<_>>()?,
            ssh_cert: wire(&certs.ssh)?,
            ssh_ca_keys: certs.sshca_certs.iter().map(wire).collect::<Option<_>>()?,
        })
    };
    all().ok_or_else(|| Refusal::unknown("the certificates cannot be written in binary form"))
}

#[tonic::async_trait]
impl JoinService for Auth {
    type JoinStream = ReceiverStream<Result<JoinResponse, Status>>;

    async fn join(
        &self,
        request: Request<tonic::Streaming<JoinRequest>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let (caller, agent) = (caller(&request)?, user_agent(&request));
        let (responses, stream) = tokio::sync::mpsc::channel(2);
        let auth = self.clone();
        tokio::spawn(async move {
            auth.join_stream(caller, agent, request.into_inner(), responses)
                .await;
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
