//! The older protocol's streams: each is one method's proof in messages of its own, put here into
//! those of the newer protocol and back (upstream `api/client/joinservice.go`).

use std::pin::Pin;
use std::time::Duration;

use tokio::sync::mpsc::Sender;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use super::{Door, Joined};
use crate::embedded::auth::attempt::Attempt;
use crate::embedded::auth::{Auth, Refusal, caller, user_agent};
use crate::embedded::caller::Caller;
use crate::join::verify::{self, Dialogue};
use crate::pb::proto::register_using_bound_keypair_method_request::Payload as BoundHear;
use crate::pb::proto::register_using_bound_keypair_method_response::Response as BoundSay;
use crate::pb::proto::register_using_tpm_method_initial_request::Ek;
use crate::pb::proto::register_using_tpm_method_request::Payload as TpmHear;
use crate::pb::proto::register_using_tpm_method_response::Payload as TpmSay;
use crate::pb::proto::{
    RegisterUsingAzureMethodRequest, RegisterUsingAzureMethodResponse,
    RegisterUsingBoundKeypairCertificates, RegisterUsingBoundKeypairChallenge,
    RegisterUsingBoundKeypairMethodRequest, RegisterUsingBoundKeypairMethodResponse,
    RegisterUsingBoundKeypairRotationRequest, RegisterUsingIamMethodRequest,
    RegisterUsingIamMethodResponse, RegisterUsingTpmMethodRequest, RegisterUsingTpmMethodResponse,
    TpmEncryptedCredential,
};
use crate::pb::teleport::join::v1::challenge::Payload as Challenge;
use crate::pb::teleport::join::v1::challenge_solution::Payload as Solution;
use crate::pb::teleport::join::v1::join_request::Payload as Opening;
use crate::pb::teleport::join::v1::{
    AzureChallengeSolution, AzureInit, BoundKeypairChallengeSolution, BoundKeypairInit,
    BoundKeypairRotationResponse, IamChallengeSolution, IamInit, TpmInit, TpmSolution, tpm_init,
};
use crate::pb::types::RegisterUsingTokenRequest;

/// The longest that a join with a challenge may take.
const STREAM: Duration = Duration::from_mins(1);

/// What a client of one of the calls hears.
pub(in crate::embedded::auth) type Answers<Q> =
    ReceiverStream<Result<<Q as Question>::Answer, Status>>;

/// What a client has said at first: its request, and the method's first message. Where the cluster
/// has spoken before that, also the solution.
pub(in crate::embedded::auth) struct Beginning {
    request: Option<RegisterUsingTokenRequest>,
    opening: Opening,
    solution: Option<Solution>,
}

/// The messages of one call: `Self` is what a client sends.
pub(in crate::embedded::auth) trait Question:
    Sized + Send + 'static
{
    /// What the cluster sends.
    type Answer: Send + 'static;
    /// The method, as the text for one that takes too long names it.
    const METHOD: &'static str;
    /// A new challenge in the method's form.
    fn challenge() -> String {
        verify::challenge()
    }
    /// The challenge that the cluster sends before it has heard anything.
    fn greeting(_challenge: &str) -> Option<Self::Answer> {
        None
    }
    /// Reads a client's first message.
    fn begin(self) -> Result<Beginning, Refusal>;
    /// Writes a challenge of the method; `None` for any other.
    fn ask(challenge: Challenge) -> Option<Self::Answer>;
    /// Reads a solution.
    fn solution(self) -> Option<Solution>;
    /// Writes how it ended.
    fn end(joined: Joined) -> Self::Answer;
}

impl Auth {
    /// Answers one stream until the exchange ends, the client goes away, or it takes too long.
    pub(super) fn stream<Q: Question>(
        &self,
        request: Request<Streaming<Q>>,
    ) -> Result<Response<Answers<Q>>, Status> {
        let (caller, agent) = (caller(&request)?, user_agent(&request));
        let (responses, stream) = tokio::sync::mpsc::channel(2);
        let auth = self.clone();
        tokio::spawn(async move {
            let exchange = auth.exchange(caller, agent, request.into_inner(), &responses);
            let ended = tokio::select! {
                ended = tokio::time::timeout(STREAM, Box::pin(exchange)) => ended,
                () = responses.closed() => return,
            };
            let status = match ended {
                Ok(Ok(())) => return,
                Ok(Err(status)) => status,
                Err(_elapsed) => Refusal::limit(format!(
                    "{} join method timed out after 1m0s, terminating the stream on the server",
                    Q::METHOD
                ))
                .into(),
            };
            // Nobody to tell if the client has gone.
            drop(responses.send(Err(status)).await);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    /// The whole exchange.
    pub(in crate::embedded::auth) async fn exchange<Q: Question>(
        &self,
        caller: Caller,
        user_agent: String,
        requests: impl Stream<Item = Result<Q, Status>> + Send,
        responses: &Sender<Result<Q::Answer, Status>>,
    ) -> Result<(), Status> {
        let mut client = Client {
            requests: std::pin::pin!(requests),
            responses,
            solution: None,
        };
        let challenge = Q::challenge();
        if let Some(greeting) = Q::greeting(&challenge) {
            client.say(greeting).await?;
        }
        let beginning = client.hear().await?.begin()?;
        let request = beginning
            .request
            .ok_or_else(|| Refusal::bad_parameter("missing parameter RegisterUsingTokenRequest"))?;
        client.solution = beginning.solution;
        let attempt = Attempt::new(&self.state, caller, user_agent, request);
        let door = Door::Stream(Box::new(beginning.opening), challenge);
        let joined = self.by_method(attempt, door, &mut client).await?;
        client.say(Q::end(joined)).await?;
        Ok(())
    }
}

/// The client of one stream.
struct Client<'a, Q: Question> {
    requests: Pin<&'a mut (dyn Stream<Item = Result<Q, Status>> + Send)>,
    responses: &'a Sender<Result<Q::Answer, Status>>,
    /// Where the client has answered already.
    solution: Option<Solution>,
}

impl<Q: Question> Client<'_, Q> {
    async fn say(&mut self, answer: Q::Answer) -> Result<(), Refusal> {
        let sent = self.responses.send(Ok(answer)).await;
        sent.map_err(|_closed| Refusal::cancelled())
    }

    async fn hear(&mut self) -> Result<Q, Refusal> {
        match self.requests.next().await {
            Some(Ok(question)) => Ok(question),
            Some(Err(status)) => Err(Refusal::bad_parameter(status.message())),
            None => Err(Refusal::cancelled()),
        }
    }
}

#[tonic::async_trait]
impl<Q: Question> Dialogue for Client<'_, Q> {
    async fn ask(&mut self, challenge: Challenge) -> Result<Solution, Refusal> {
        if let Some(solution) = self.solution.take() {
            return Ok(solution);
        }
        let question = Q::ask(challenge)
            .ok_or_else(|| Refusal::unimplemented("this call cannot carry the challenge"))?;
        self.say(question).await?;
        self.hear()
            .await?
            .solution()
            .ok_or_else(|| Refusal::bad_parameter("the client did not send a solution"))
    }
}

impl Question for RegisterUsingIamMethodRequest {
    type Answer = RegisterUsingIamMethodResponse;
    const METHOD: &'static str = "iam";

    fn greeting(challenge: &str) -> Option<Self::Answer> {
        Some(Self::Answer {
            challenge: challenge.to_owned(),
            certs: None,
        })
    }

    fn begin(self) -> Result<Beginning, Refusal> {
        if self.sts_identity_request.is_empty() {
            return Err(Refusal::bad_parameter(
                "missing parameter StsIdentityRequest",
            ));
        }
        Ok(Beginning {
            request: self.register_using_token_request,
            opening: Opening::IamInit(IamInit::default()),
            solution: Some(Solution::IamChallengeSolution(IamChallengeSolution {
                sts_identity_request: self.sts_identity_request,
            })),
        })
    }

    fn ask(_challenge: Challenge) -> Option<Self::Answer> {
        None
    }

    fn solution(self) -> Option<Solution> {
        None
    }

    fn end(joined: Joined) -> Self::Answer {
        Self::Answer {
            challenge: String::new(),
            certs: Some(joined.certs),
        }
    }
}

impl Question for RegisterUsingAzureMethodRequest {
    type Answer = RegisterUsingAzureMethodResponse;
    const METHOD: &'static str = "azure";

    fn challenge() -> String {
        verify::azure_challenge()
    }

    fn greeting(challenge: &str) -> Option<Self::Answer> {
        Some(Self::Answer {
            challenge: challenge.to_owned(),
            certs: None,
        })
    }

    fn begin(self) -> Result<Beginning, Refusal> {
        for (missing, name) in [
            (self.attested_data.is_empty(), "AttestedData"),
            (self.access_token.is_empty(), "AccessToken"),
        ] {
            if missing {
                return Err(Refusal::bad_parameter(format!("missing parameter {name}")));
            }
        }
        Ok(Beginning {
            request: self.register_using_token_request,
            opening: Opening::AzureInit(AzureInit::default()),
            solution: Some(Solution::AzureChallengeSolution(AzureChallengeSolution {
                attested_data: self.attested_data,
                intermediate: Vec::new(),
                access_token: self.access_token,
            })),
        })
    }

    fn ask(_challenge: Challenge) -> Option<Self::Answer> {
        None
    }

    fn solution(self) -> Option<Solution> {
        None
    }

    fn end(joined: Joined) -> Self::Answer {
        Self::Answer {
            challenge: String::new(),
            certs: Some(joined.certs),
        }
    }
}

impl Question for RegisterUsingTpmMethodRequest {
    type Answer = RegisterUsingTpmMethodResponse;
    const METHOD: &'static str = "tpm";

    fn begin(self) -> Result<Beginning, Refusal> {
        let Some(TpmHear::Init(init)) = self.payload else {
            return Err(Refusal::bad_parameter("missing parameter Init"));
        };
        let params = init
            .attestation_params
            .ok_or_else(|| Refusal::bad_parameter("missing parameter AttestationParams"))?;
        Ok(Beginning {
            request: init.join_request,
            opening: Opening::TpmInit(TpmInit {
                client_params: None,
                public: params.public,
                create_data: params.create_data,
                create_attestation: params.create_attestation,
                create_signature: params.create_signature,
                ek: init.ek.map(|ek| match ek {
                    Ek::EkCert(certificate) => tpm_init::Ek::EkCert(certificate),
                    Ek::EkKey(key) => tpm_init::Ek::EkKey(key),
                }),
            }),
            solution: None,
        })
    }

    fn ask(challenge: Challenge) -> Option<Self::Answer> {
        let Challenge::TpmEncryptedCredential(credential) = challenge else {
            return None;
        };
        Some(Self::Answer {
            payload: Some(TpmSay::ChallengeRequest(TpmEncryptedCredential {
                credential_blob: credential.credential_blob,
                secret: credential.secret,
            })),
        })
    }

    fn solution(self) -> Option<Solution> {
        let Some(TpmHear::ChallengeResponse(response)) = self.payload else {
            return None;
        };
        Some(Solution::TpmSolution(TpmSolution {
            solution: response.solution,
        }))
    }

    fn end(joined: Joined) -> Self::Answer {
        Self::Answer {
            payload: Some(TpmSay::Certs(joined.certs)),
        }
    }
}

impl Question for RegisterUsingBoundKeypairMethodRequest {
    type Answer = RegisterUsingBoundKeypairMethodResponse;
    const METHOD: &'static str = "bound_keypair";

    fn begin(self) -> Result<Beginning, Refusal> {
        let Some(BoundHear::Init(init)) = self.payload else {
            return Err(Refusal::bad_parameter("missing parameter Init"));
        };
        Ok(Beginning {
            request: init.join_request,
            opening: Opening::BoundKeypairInit(BoundKeypairInit {
                client_params: None,
                initial_join_secret: init.initial_join_secret,
                previous_join_state: init.previous_join_state,
            }),
            solution: None,
        })
    }

    fn ask(challenge: Challenge) -> Option<Self::Answer> {
        let response = match challenge {
            Challenge::BoundKeypairChallenge(it) => {
                BoundSay::Challenge(RegisterUsingBoundKeypairChallenge {
                    public_key: String::from_utf8(it.public_key).ok()?,
                    challenge: it.challenge,
                })
            }
            Challenge::BoundKeypairRotationRequest(_) => {
                BoundSay::Rotation(RegisterUsingBoundKeypairRotationRequest {})
            }
            _ => return None,
        };
        Some(Self::Answer {
            response: Some(response),
        })
    }

    fn solution(self) -> Option<Solution> {
        Some(match self.payload? {
            BoundHear::ChallengeResponse(response) => {
                Solution::BoundKeypairChallengeSolution(BoundKeypairChallengeSolution {
                    solution: response.solution,
                })
            }
            BoundHear::RotationResponse(response) => {
                Solution::BoundKeypairRotationResponse(BoundKeypairRotationResponse {
                    public_key: response.public_key.into_bytes(),
                })
            }
            BoundHear::Init(_) => return None,
        })
    }

    fn end(joined: Joined) -> Self::Answer {
        let bound = joined.bound_keypair.unwrap_or_default();
        let certificates = RegisterUsingBoundKeypairCertificates {
            certs: Some(joined.certs),
            join_state: bound.join_state,
            public_key: String::from_utf8_lossy(&bound.public_key).into_owned(),
        };
        Self::Answer {
            response: Some(BoundSay::Certs(certificates)),
        }
    }
}
