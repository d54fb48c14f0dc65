//! The agent's half of both protocols against servers that follow a script.

pub(super) mod mutilated;

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Endpoint, Server};
use tonic::{Code, Request, Response, Status, Streaming};
use tower::service_fn;

use super::session::JOIN;
use super::*;
use crate::clock::Clock;
use crate::cluster::client::{Version, Versioned};
use crate::crypto::{KeyAlgorithm, PrivateKey, Suite, pem, ssh};
use crate::pb::proto::join_service_server as older;
use crate::pb::proto::{
    Certs, RegisterUsingAzureMethodRequest, RegisterUsingAzureMethodResponse,
    RegisterUsingBoundKeypairMethodRequest, RegisterUsingBoundKeypairMethodResponse,
    RegisterUsingIamMethodRequest, RegisterUsingIamMethodResponse, RegisterUsingTpmMethodRequest,
    RegisterUsingTpmMethodResponse,
};
use crate::pb::teleport::join::v1::giving_up::Reason;
use crate::pb::teleport::join::v1::join_request::Payload as Said;
use crate::pb::teleport::join::v1::join_response::Payload as Say;
use crate::pb::teleport::join::v1::join_service_server as newer;
use crate::pb::teleport::join::v1::{
    BotResult, Certificates, Challenge, IamChallenge, IamChallengeSolution, IamInit, JoinRequest,
    JoinResponse, Result as Joined, ServerInit, TokenInit, challenge, challenge_solution,
    client_params, result,
};
use crate::pb::types::RegisterUsingTokenRequest;
use crate::secret::Secret;

/// What the newer service does, in order. After the last step the stream ends.
#[derive(Debug, Clone)]
enum Step {
    Hear,
    Say(Say),
    SayNothingKnown,
    Refuse(Code),
    Flood,
    Hang,
}

use Step::{Flood, Hang, Hear, Refuse, SayNothingKnown};

#[derive(Debug, Clone, Default)]
struct Fake {
    script: Option<Vec<Step>>,
    said: Arc<Mutex<Vec<Said>>>,
    older: Arc<Mutex<Vec<RegisterUsingTokenRequest>>>,
    /// How the older service misbehaves.
    fault: Option<Fault>,
}

/// What is wrong with the older service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// Headers, and nothing after them.
    Silent,
    /// Challenges without an end.
    Asking,
    /// One challenge, and nothing after it.
    Stuck,
}

impl Fake {
    fn saying(script: Vec<Step>) -> Self {
        Self {
            script: Some(script),
            ..Self::default()
        }
    }

    /// A connection to this server.
    fn channel(&self) -> Versioned {
        let fake = self.clone();
        let connector = service_fn(move |_uri| {
            let (near, far) = tokio::io::duplex(64 * 1024);
            let fake = fake.clone();
            let mut routes =
                Server::builder().add_service(older::JoinServiceServer::new(fake.clone()));
            if fake.script.is_some() {
                routes = routes.add_service(newer::JoinServiceServer::new(fake));
            }
            tokio::spawn(async move {
                let incoming = tokio_stream::once(Ok::<_, std::io::Error>(far));
                routes.serve_with_incoming(incoming).await
            });
            async { Ok::<_, std::io::Error>(TokioIo::new(near)) }
        });
        let channel = Endpoint::from_static("http://fake").connect_with_connector_lazy(connector);
        InterceptedService::new(channel, Version)
    }

    /// A whole join by `method` with what `memory` knows of a cluster of `version`.
    async fn join(&self, by: By, memory: &Older, version: &str) -> Result<Certs, JoinError> {
        let method = match by {
            By::Token => "token",
            By::Iam | By::Answered | By::Broken => "iam",
        };
        let hello = Hello {
            method,
            token: Secret::new("its-token".to_owned()),
            older: memory.clone(),
        };
        let session = Session::begin(hello, self.channel(), version.to_owned(), Suite::Legacy)
            .await
            .map_err(JoinError::cluster(method))?;
        session
            .join(&key(), expires(), &mut by.clone(), &Clock::system())
            .await
    }

    fn said(&self) -> Vec<Said> {
        self.said.lock().unwrap().clone()
    }

    fn gave_up(&self) -> Option<Reason> {
        self.said().into_iter().find_map(|said| match said {
            Said::GivingUp(giving_up) => Some(giving_up.reason()),
            _ => None,
        })
    }
}

#[tonic::async_trait]
impl newer::JoinService for Fake {
    type JoinStream = ReceiverStream<Result<JoinResponse, Status>>;

    async fn join(
        &self,
        request: Request<Streaming<JoinRequest>>,
    ) -> Result<Response<Self::JoinStream>, Status> {
        let script = self.script.clone().unwrap();
        let heard = Arc::clone(&self.said);
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            let mut requests = request.into_inner();
            for step in script {
                let flood = matches!(step, Flood);
                let payload = match step {
                    Hear => {
                        let message = requests.message().await.unwrap().unwrap();
                        heard.lock().unwrap().push(message.payload.unwrap());
                        continue;
                    }
                    Hang => return std::future::pending().await,
                    Refuse(code) => {
                        drop(sender.send(Err(Status::new(code, "no\n\tbecause"))).await);
                        return;
                    }
                    Step::Say(payload) => Some(payload),
                    SayNothingKnown | Flood => None,
                };
                while sender
                    .send(Ok(JoinResponse {
                        payload: payload.clone(),
                    }))
                    .await
                    .is_ok()
                    && flood
                {}
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }
}

/// A stream that is never opened here.
type Never<T> = tokio_stream::Empty<Result<T, Status>>;

#[tonic::async_trait]
impl older::JoinService for Fake {
    type RegisterUsingIAMMethodStream =
        ReceiverStream<Result<RegisterUsingIamMethodResponse, Status>>;

    async fn register_using_iam_method(
        &self,
        request: Request<Streaming<RegisterUsingIamMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingIAMMethodStream>, Status> {
        let (heard, fault) = (Arc::clone(&self.older), self.fault);
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let challenge = RegisterUsingIamMethodResponse {
                challenge: "c".to_owned(),
                certs: None,
            };
            match fault {
                Some(Fault::Silent) => return std::future::pending().await,
                Some(Fault::Asking) => {
                    while sender.send(Ok(challenge.clone())).await.is_ok() {}
                    return;
                }
                Some(Fault::Stuck) | None => sender.send(Ok(challenge)).await.unwrap(),
            }
            if fault == Some(Fault::Stuck) {
                return std::future::pending().await;
            }
            let answer = request.into_inner().message().await.unwrap().unwrap();
            assert_eq!(answer.sts_identity_request, b"signed c");
            let join = answer.register_using_token_request.unwrap();
            heard.lock().unwrap().push(join);
            let last = RegisterUsingIamMethodResponse {
                challenge: String::new(),
                certs: Some(Certs::default()),
            };
            sender.send(Ok(last)).await.unwrap();
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    type RegisterUsingAzureMethodStream = Never<RegisterUsingAzureMethodResponse>;

    async fn register_using_azure_method(
        &self,
        _request: Request<Streaming<RegisterUsingAzureMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingAzureMethodStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type RegisterUsingBoundKeypairMethodStream = Never<RegisterUsingBoundKeypairMethodResponse>;

    async fn register_using_bound_keypair_method(
        &self,
        _request: Request<Streaming<RegisterUsingBoundKeypairMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingBoundKeypairMethodStream>, Status> {
        Err(Status::unimplemented(""))
    }

    type RegisterUsingTPMMethodStream = Never<RegisterUsingTpmMethodResponse>;

    async fn register_using_tpm_method(
        &self,
        _request: Request<Streaming<RegisterUsingTpmMethodRequest>>,
    ) -> Result<Response<Self::RegisterUsingTPMMethodStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn register_using_token(
        &self,
        request: Request<RegisterUsingTokenRequest>,
    ) -> Result<Response<Certs>, Status> {
        if self.fault.is_some() {
            return std::future::pending().await;
        }
        assert_eq!(request.metadata().get("version").unwrap(), "18.0.0");
        self.older.lock().unwrap().push(request.into_inner());
        Ok(Response::new(Certs::default()))
    }
}

fn key() -> PrivateKey {
    PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()
}

fn expires() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000)
}

/// Proofs without a machine to prove.
#[derive(Debug, Clone, Copy)]
enum By {
    Token,
    Iam,
    /// As `Iam`, after the answer.
    Answered,
    /// As `Iam`, on a machine that cannot sign.
    Broken,
}

#[async_trait]
impl Proof for By {
    fn opening(&self, client_params: ClientParams) -> Said {
        let client_params = Some(client_params);
        match self {
            Self::Token => Said::TokenInit(TokenInit { client_params }),
            Self::Iam | Self::Answered | Self::Broken => Said::IamInit(IamInit { client_params }),
        }
    }

    async fn solve(
        &mut self,
        challenge: challenge::Payload,
        _now: SystemTime,
    ) -> Result<Option<challenge_solution::Payload>, JoinError> {
        let challenge::Payload::IamChallenge(IamChallenge { challenge }) = challenge else {
            return Ok(None);
        };
        if challenge.is_empty() {
            return Ok(None);
        }
        match self {
            Self::Token | Self::Answered => Ok(None),
            Self::Iam => {
                *self = Self::Answered;
                Ok(Some(challenge_solution::Payload::IamChallengeSolution(
                    IamChallengeSolution {
                        sts_identity_request: format!("signed {challenge}").into_bytes(),
                    },
                )))
            }
            Self::Broken => Err(JoinError::Proof {
                method: "iam",
                problem: "the clock of this machine stands still".to_owned(),
            }),
        }
    }
}

fn init(method: &str) -> Step {
    Step::Say(Say::Init(ServerInit {
        join_method: method.to_owned(),
        signature_algorithm_suite: "balanced-v1".to_owned(),
    }))
}

fn ask(challenge: &str) -> Step {
    let challenge = challenge.to_owned();
    Step::Say(Say::Challenge(Challenge {
        payload: Some(challenge::Payload::IamChallenge(IamChallenge { challenge })),
    }))
}

fn grant(ssh_cert: &[u8]) -> Step {
    let certificates = Certificates {
        tls_cert: b"tls".to_vec(),
        tls_ca_certs: vec![b"user".to_vec(), b"host".to_vec()],
        ssh_cert: ssh_cert.to_vec(),
        ssh_ca_keys: vec![SSH.to_vec()],
    };
    Step::Say(Say::Result(Joined {
        payload: Some(result::Payload::BotResult(BotResult {
            certificates: Some(certificates),
            bound_keypair_result: None,
        })),
    }))
}

const SSH: &[u8] = b"\0\0\0\x07ssh-rsa and so on";

#[tokio::test]
async fn the_newer_stream_carries_a_signed_challenge() {
    let fake = Fake::saying(vec![Hear, init("iam"), Hear, ask("c"), Hear, grant(SSH)]);
    let certs = fake
        .join(By::Iam, &Older::default(), "18.5.0")
        .await
        .unwrap();
    let ders = |text: &[u8]| pem::certificates(std::str::from_utf8(text).unwrap()).unwrap();
    assert_eq!(ders(&certs.tls), [b"tls"]);
    assert_eq!(ders(&certs.tlsca_certs[1]), [b"host"]);
    let line = String::from_utf8(certs.ssh).unwrap();
    assert!(
        line.starts_with("ssh-rsa ") && line.ends_with('\n'),
        "{line}"
    );
    assert_eq!(ssh::wire_of_line(&line).unwrap(), SSH);
    assert_eq!(certs.sshca_certs, [line.into_bytes()]);

    let [
        Said::ClientInit(hello),
        Said::IamInit(keys),
        Said::Solution(solution),
    ] = &fake.said()[..]
    else {
        panic!("{:?}", fake.said());
    };
    assert_eq!(hello.join_method(), "iam");
    assert_eq!(
        (&*hello.token_name, &*hello.system_role),
        ("its-token", "Bot")
    );
    let Some(challenge_solution::Payload::IamChallengeSolution(solution)) = &solution.payload
    else {
        panic!("{solution:?}");
    };
    assert_eq!(solution.sts_identity_request, b"signed c");
    let Some(client_params::Payload::BotParams(bot)) = keys.client_params.clone().unwrap().payload
    else {
        panic!("{keys:?}");
    };
    assert_eq!(bot.expires, Some(expires().into()));
    let keys = bot.public_keys.unwrap();
    let line = ssh::line_of_wire(&keys.public_ssh_key).unwrap();
    assert_eq!(
        ssh::spki_of_public_line(&line).unwrap(),
        keys.public_tls_key
    );
    assert!(fake.older.lock().unwrap().is_empty());
}

#[tokio::test]
async fn the_newer_stream_takes_a_token_alone() {
    let fake = Fake::saying(vec![Hear, init("token"), Hear, grant(SSH)]);
    fake.join(By::Token, &Older::default(), "18.5.0")
        .await
        .unwrap();
    assert!(matches!(
        fake.said()[..],
        [Said::ClientInit(_), Said::TokenInit(_)]
    ));
}

#[tokio::test]
async fn a_cluster_without_the_newer_service_is_asked_for_it_once() {
    let memory = Older::default();
    let old = Fake::default();
    for by in [By::Token, By::Iam] {
        old.join(by, &memory, "18.0.0").await.unwrap();
    }
    {
        let requests = old.older.lock().unwrap();
        assert_eq!(requests.len(), 2);
        for request in &*requests {
            assert_eq!((&*request.role, &*request.token), ("Bot", "its-token"));
            assert_eq!(request.expires, Some(expires().into()));
            assert!(
                request
                    .public_tls_key
                    .starts_with(b"-----BEGIN PUBLIC KEY-----")
            );
            assert!(request.public_ssh_key.starts_with(b"ecdsa-sha2-nistp256 "));
        }
    }
    // Of the same version: not asked again. After an upgrade it is.
    let upgraded = Fake::saying(vec![Hear, init("token"), Hear, grant(SSH)]);
    upgraded.join(By::Token, &memory, "18.0.0").await.unwrap();
    assert_eq!(upgraded.said(), []);
    upgraded.join(By::Token, &memory, "18.5.0").await.unwrap();
    assert_eq!(upgraded.said().len(), 2);
    assert_eq!(upgraded.older.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn a_method_that_the_newer_service_lacks_joins_by_the_older_one() {
    for script in [
        vec![Hear, Refuse(Code::Unimplemented)],
        vec![Hear, init("iam"), Hear, Refuse(Code::Unimplemented)],
    ] {
        let fake = Fake::saying(script);
        fake.join(By::Iam, &Older::default(), "18.2.0")
            .await
            .unwrap();
        assert_eq!(fake.older.lock().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn an_answer_without_a_code_of_its_own_is_tried_again_and_says_what_to_look_at() {
    for (code, told) in [(Code::Unknown, true), (Code::Unavailable, false)] {
        let fake = Fake::saying(vec![Hear, init("iam"), Hear, Refuse(code)]);
        let error = fake
            .join(By::Iam, &Older::default(), "19.0.0")
            .await
            .unwrap_err();
        assert_eq!(error.disposition(), Disposition::Retry);
        let text = error.to_string();
        assert_eq!(
            text.contains("(check that onboarding.token"),
            told,
            "{text}"
        );
    }
}

#[tokio::test]
async fn a_refusal_is_final_and_one_line() {
    for script in [
        vec![Hear, Refuse(Code::PermissionDenied)],
        vec![Hear, init("iam"), Hear, Refuse(Code::PermissionDenied)],
        vec![
            Hear,
            init("iam"),
            Hear,
            ask("c"),
            Hear,
            Refuse(Code::PermissionDenied),
        ],
    ] {
        let fake = Fake::saying(script);
        let error = fake
            .join(By::Iam, &Older::default(), "19.0.0")
            .await
            .unwrap_err();
        assert_eq!(error.disposition(), Disposition::Refused);
        let text = error.to_string();
        assert!(
            text.starts_with("Join: no: because (check that onboarding.token"),
            "{text}"
        );
        assert!(
            fake.older.lock().unwrap().is_empty(),
            "the refusal was taken elsewhere"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_cluster_that_breaks_the_order_gets_nothing_and_the_error_says_what_it_did() {
    let (unasked, silent) = (Some(Reason::UnsupportedMessageType), None);
    let none = Step::Say(Say::Result(Joined { payload: None }));
    let empty = Step::Say(Say::Challenge(Challenge { payload: None }));
    let huge = vec![b'x'; 5 * 1024 * 1024];
    let cases: Vec<(Vec<Step>, &str, Option<Reason>)> = vec![
        (vec![], "the stream ended early", silent),
        (vec![Hang], "no answer within a minute", silent),
        (
            vec![Hear, Refuse(Code::Ok)],
            "the stream ended early",
            silent,
        ),
        (
            vec![Hear, grant(SSH)],
            "sent a result instead of a first message",
            unasked,
        ),
        (
            vec![Hear, ask("c")],
            "sent a challenge instead of a first message",
            unasked,
        ),
        (
            vec![Hear, SayNothingKnown],
            "an unknown kind instead of a first message",
            unasked,
        ),
        (
            vec![Hear, Flood],
            "an unknown kind instead of a first message",
            silent,
        ),
        (
            vec![Hear, init("token")],
            "wants a join of method \"token\", not iam",
            Some(Reason::UnsupportedJoinMethod),
        ),
        (
            vec![Hear, init("iam"), Hear],
            "the stream ended early",
            silent,
        ),
        (
            vec![Hear, init("iam"), Hear, Hang],
            "no answer within a minute",
            silent,
        ),
        (
            vec![Hear, init("iam"), Hear, init("iam")],
            "a first message instead of a challenge or a result",
            unasked,
        ),
        (
            vec![Hear, init("iam"), Hear, empty],
            "a challenge that has no place in method iam",
            unasked,
        ),
        (
            vec![Hear, init("iam"), Hear, ask("")],
            "a challenge that has no place in method iam",
            unasked,
        ),
        (
            vec![Hear, init("iam"), Hear, ask("c"), Hear, ask("d")],
            "a challenge that has no place in method iam",
            unasked,
        ),
        (
            vec![Hear, init("iam"), Hear, ask("c"), Hear, Flood],
            "instead of a challenge or a result",
            silent,
        ),
        (
            vec![Hear, init("iam"), Hear, ask("c"), Hear, none],
            "no certificates of a bot",
            silent,
        ),
        (
            vec![Hear, init("iam"), Hear, ask("c"), Hear, grant(b"junk")],
            "an SSH key of no known form",
            silent,
        ),
        (
            vec![Hear, init("iam"), Hear, ask("c"), Hear, grant(&huge)],
            "too large",
            silent,
        ),
    ];
    for (script, text, reason) in cases {
        let last = reason.map(|_reason| Hear);
        let fake = Fake::saying(script.into_iter().chain(last).collect());
        let started = tokio::time::Instant::now();
        let error = fake
            .join(By::Iam, &Older::default(), "19.0.0")
            .await
            .unwrap_err();
        assert!(error.to_string().contains(text), "{text}: {error}");
        assert_eq!(error.disposition(), Disposition::Retry, "{text}");
        assert!(started.elapsed() <= JOIN + Duration::from_secs(5), "{text}");
        assert_eq!(fake.gave_up(), reason, "{text}");
        assert!(fake.older.lock().unwrap().is_empty(), "{text}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_older_service_that_never_comes_to_an_end_is_given_up() {
    for (proof, fault, text) in [
        (By::Iam, Fault::Silent, "no answer within a minute"),
        (By::Iam, Fault::Stuck, "no answer within a minute"),
        (By::Iam, Fault::Asking, "holds no certificates"),
        (By::Token, Fault::Silent, "Timeout expired"),
    ] {
        let fake = Fake {
            fault: Some(fault),
            ..Fake::default()
        };
        let started = tokio::time::Instant::now();
        let error = fake
            .join(proof, &Older::default(), "18.0.0")
            .await
            .unwrap_err();
        assert!(error.to_string().contains(text), "{fault:?}: {error}");
        assert_eq!(error.disposition(), Disposition::Retry, "{fault:?}");
        assert!(
            started.elapsed() <= JOIN + Duration::from_secs(5),
            "{fault:?}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn what_comes_after_the_result_does_not_count() {
    for last in [Flood, Hang, init("iam"), Refuse(Code::Internal)] {
        let fake = Fake::saying(vec![Hear, init("token"), Hear, grant(SSH), last]);
        fake.join(By::Token, &Older::default(), "19.0.0")
            .await
            .unwrap();
    }
}

#[tokio::test]
async fn a_proof_that_cannot_be_made_is_told_to_the_cluster() {
    let fake = Fake::saying(vec![Hear, init("iam"), Hear, ask("c"), Hear]);
    let error = fake
        .join(By::Broken, &Older::default(), "19.0.0")
        .await
        .unwrap_err();
    assert!(matches!(error, JoinError::Proof { .. }), "{error}");
    let Some(Said::GivingUp(giving_up)) = fake.said().pop() else {
        panic!("{:?}", fake.said());
    };
    assert_eq!(giving_up.reason(), Reason::ChallengeSolutionFailed);
    assert!(giving_up.msg.contains("stands still"), "{}", giving_up.msg);
}
