//! The newer join stream: the order of its messages, and that it decides as the older calls do.

#![expect(
    clippy::unnecessary_wraps,
    reason = "messages are optional here: none is one of an unknown kind"
)]

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::*;
use crate::crypto::ssh;
use crate::pb::teleport::join::v1::giving_up::Reason;
use crate::pb::teleport::join::v1::join_request::Payload as Say;
use crate::pb::teleport::join::v1::join_response::Payload as Heard;
use crate::pb::teleport::join::v1::{
    BotParams, Certificates, ChallengeSolution, ClientInit, ClientParams, GivingUp,
    IamChallengeSolution, IamInit, JoinRequest, JoinResponse, PublicKeys, TokenInit, challenge,
    challenge_solution, client_params, result,
};

/// A client in the middle of an exchange.
struct Client {
    requests: Option<mpsc::Sender<Result<JoinRequest, Status>>>,
    answers: mpsc::Receiver<Result<JoinResponse, Status>>,
}

impl Client {
    async fn say(&self, payload: Option<Say>) {
        let message = JoinRequest { payload };
        let requests = self.requests.as_ref().unwrap();
        // A refused client may find nobody who listens.
        drop(requests.send(Ok(message)).await);
    }

    async fn hear(&mut self) -> Result<Heard, Status> {
        let answer = self.answers.recv().await.expect("an answer")?;
        Ok(answer.payload.unwrap())
    }

    async fn hear_certificates(&mut self) -> Result<Certs, Status> {
        let Heard::Result(result) = self.hear().await? else {
            panic!("no result");
        };
        let Some(result::Payload::BotResult(bot)) = result.payload else {
            panic!("no bot's result");
        };
        Ok(texts(&bot.certificates.unwrap()))
    }

    async fn hear_challenge(&mut self) -> String {
        let Ok(Heard::Challenge(challenge)) = self.hear().await else {
            panic!("no challenge");
        };
        let Some(challenge::Payload::IamChallenge(iam)) = challenge.payload else {
            panic!("not of method iam");
        };
        iam.challenge
    }
}

fn texts(binary: &Certificates) -> Certs {
    let line = |wire: &Vec<u8>| ssh::line_of_wire(wire).unwrap().into_bytes();
    let text = |der: &Vec<u8>| pem::encode("CERTIFICATE", der).into_bytes();
    Certs {
        ssh: line(&binary.ssh_cert),
        tls: text(&binary.tls_cert),
        tlsca_certs: binary.tls_ca_certs.iter().map(text).collect(),
        sshca_certs: binary.ssh_ca_keys.iter().map(line).collect(),
    }
}

fn hello(method: Option<&str>, token: &str) -> Option<Say> {
    Some(Say::ClientInit(ClientInit {
        join_method: method.map(str::to_owned),
        token_name: token.to_owned(),
        system_role: "Bot".to_owned(),
    }))
}

fn give_up(msg: &str) -> Option<Say> {
    Some(Say::GivingUp(GivingUp {
        reason: Reason::ChallengeSolutionFailed.into(),
        msg: msg.to_owned(),
    }))
}

fn of_token(params: Option<BotParams>) -> Option<Say> {
    let payload = params.map(client_params::Payload::BotParams);
    Some(Say::TokenInit(TokenInit {
        client_params: Some(ClientParams { payload }),
    }))
}

fn of_iam(params: BotParams) -> Option<Say> {
    let payload = Some(client_params::Payload::BotParams(params));
    Some(Say::IamInit(IamInit {
        client_params: Some(ClientParams { payload }),
    }))
}

fn solution(sts_identity_request: Vec<u8>) -> Option<Say> {
    let solution = IamChallengeSolution {
        sts_identity_request,
    };
    Some(Say::Solution(ChallengeSolution {
        payload: Some(challenge_solution::Payload::IamChallengeSolution(solution)),
    }))
}

impl Lab {
    fn stream(&self, by: Option<&Certs>, listener: Listener) -> Client {
        let mut caller = caller(&self.from(by, ())).unwrap();
        caller.listener = listener;
        let (requests, stream) = mpsc::channel(1);
        let (responses, answers) = mpsc::channel(2);
        let auth = self.auth.clone();
        tokio::spawn(async move {
            let stream = ReceiverStream::new(stream);
            auth.join_stream(caller, "test".to_owned(), stream, responses)
                .await;
        });
        Client {
            requests: Some(requests),
            answers,
        }
    }

    fn params(&self) -> BotParams {
        let key = key();
        BotParams {
            public_keys: Some(PublicKeys {
                public_tls_key: key.public_spki(),
                public_ssh_key: ssh::wire_of_line(&key.public_ssh_line().unwrap()).unwrap(),
            }),
            expires: Some((self.clock.now() + Duration::from_hours(1)).into()),
        }
    }

    async fn join_newer(&self, token: &str) -> Result<Certs, Status> {
        let mut client = self.stream(None, Listener::ProxyJoin);
        client.say(hello(None, token)).await;
        client.hear().await?;
        client.say(of_token(Some(self.params()))).await;
        client.hear_certificates().await
    }

    async fn iam_newer(&self, by: Option<&Certs>, listener: Listener) -> Result<Certs, Status> {
        let mut client = self.stream(by, listener);
        client.say(hello(Some("iam"), "example-bot")).await;
        client.hear().await?;
        client.say(of_iam(self.params())).await;
        let challenge = client.hear_challenge().await;
        let signed = signed(&challenge, self.clock.now());
        client.say(solution(signed)).await;
        client.hear_certificates().await
    }
}

#[tokio::test]
async fn a_token_joins_one_bot_once_by_either_service() {
    let lab = lab(None);
    let mut client = lab.stream(None, Listener::Auth);
    client
        .say(hello(Some("token"), "once-and-never-again"))
        .await;
    let Ok(Heard::Init(init)) = client.hear().await else {
        panic!("no first message");
    };
    assert_eq!(init.join_method, "token");
    assert_eq!(init.signature_algorithm_suite, "balanced-v1");
    let params = lab.params();
    client.say(of_token(Some(params.clone()))).await;
    let certs = client.hear_certificates().await.unwrap();
    assert!(client.answers.recv().await.is_none(), "the stream goes on");

    let tls = certificate(&certs);
    assert_eq!(tls.spki(), params.public_keys.unwrap().public_tls_key);
    assert_eq!(tls.subject(oid::RENEWABLE), ["true"]);
    assert_eq!(tls.subject(oid::GENERATION), ["1"]);
    assert_eq!((certs.tlsca_certs.len(), certs.sshca_certs.len()), (2, 2));
    let line = std::str::from_utf8(&certs.ssh).unwrap();
    assert_eq!(SshCertificate::parse(line).unwrap().principals().len(), 2);
    // What follows is the same as after an older join.
    let renewed = lab.certs(&certs, lab.renewal(&key())).await.unwrap();
    assert_eq!(certificate(&renewed).subject(oid::GENERATION), ["2"]);

    for spent in [
        lab.join("once-and-never-again").await,
        lab.join_newer("once-and-never-again").await,
    ] {
        let (code, text) = refused(spent);
        assert_eq!(code, Code::PermissionDenied);
        assert!(text.contains("token expired or not found"), "{text}");
    }
    let joins = lab.events("bot.join");
    let codes: Vec<&str> = joins.iter().map(|e| e["code"].as_str().unwrap()).collect();
    assert_eq!(codes, ["TJ001I", "TJ001E", "TJ001E"]);
    assert_eq!(joins[0]["token_name"], "***************again");
}

#[tokio::test]
async fn iam_keeps_its_instance_on_the_auth_side_only() {
    let lab = lab(Some(sts("123456789012", "200 OK").await));
    let first = lab.iam_newer(None, Listener::ProxyJoin).await.unwrap();
    let instance = |certs: &Certs| certificate(certs).subject(oid::BOT_INSTANCE);
    let again = lab.iam_newer(Some(&first), Listener::Auth).await.unwrap();
    assert_eq!(instance(&again), instance(&first));
    assert_eq!(certificate(&again).subject(oid::GENERATION), ["2"]);
    // The two services count together.
    let older = lab.iam(Some(&again), "example-bot").await.unwrap();
    assert_eq!(certificate(&older).subject(oid::GENERATION), ["3"]);
    let elsewhere = lab.iam_newer(Some(&again), Listener::ProxyJoin).await;
    assert_ne!(instance(&elsewhere.unwrap()), instance(&first));
    assert_eq!(
        lab.events("bot.join")[0]["attributes"]["Account"],
        "123456789012"
    );
}

#[tokio::test]
async fn the_allow_rules_and_locks_are_the_same() {
    let stranger = lab(Some(sts("999999999999", "200 OK").await));
    let newer = refused(stranger.iam_newer(None, Listener::ProxyJoin).await);
    assert_eq!(newer, refused(stranger.iam(None, "example-bot").await));
    assert!(
        newer.1.contains("did not match any allow rules"),
        "{newer:?}"
    );

    let lab = lab(Some(sts("123456789012", "200 OK").await));
    let first = lab.join_newer("once-and-never-again").await.unwrap();
    let second = lab.certs(&first, lab.renewal(&key())).await.unwrap();
    lab.certs(&second, lab.renewal(&key())).await.unwrap();
    // A stolen certificate locks the bot.
    refused(lab.certs(&first, lab.renewal(&key())).await);
    let (code, text) = refused(lab.iam_newer(None, Listener::ProxyJoin).await);
    assert_eq!(code, Code::PermissionDenied);
    assert!(
        text.contains("lock targeting User:\"bot-example\""),
        "{text}"
    );
}

/// What is said, and the code and a part of the text of the refusal that follows the last of it.
type Case = (Vec<Option<Say>>, Code, &'static str);

fn wrong_order_or_parts(lab: &Lab) -> Vec<Case> {
    let (bad, denied) = (Code::InvalidArgument, Code::PermissionDenied);
    let once = || hello(None, "once-and-never-again");
    let with = |change: &dyn Fn(&mut BotParams)| {
        let mut params = lab.params();
        change(&mut params);
        of_token(Some(params))
    };
    let node = Some(Say::ClientInit(ClientInit {
        token_name: "once-and-never-again".to_owned(),
        system_role: "Node".to_owned(),
        join_method: None,
    }));
    let keys = |change: fn(&mut PublicKeys)| {
        with(&move |params| change(params.public_keys.as_mut().unwrap()))
    };
    vec![
        (vec![of_token(None)], bad, "a join begins with ClientInit"),
        (vec![None], bad, "a join begins with ClientInit"),
        (vec![give_up("")], bad, "a join begins with ClientInit"),
        (vec![hello(None, "")], bad, "missing parameter Token"),
        (vec![node], bad, "only bots join here"),
        (
            vec![hello(None, "unheard-of")],
            denied,
            "token expired or not found",
        ),
        (
            vec![hello(Some("iam"), "once-and-never-again")],
            bad,
            "client requested join method iam, provision token only supports method token",
        ),
        (
            vec![hello(None, "nodes")],
            bad,
            "unsupported join method \"ec2\" for bot",
        ),
        (
            vec![once(), once()],
            bad,
            "did not send the init message of",
        ),
        (vec![once(), None], bad, "did not send the init message of"),
        (
            vec![once(), of_iam(lab.params())],
            bad,
            "the init message of method token",
        ),
        (
            vec![hello(None, "example-bot"), of_token(Some(lab.params()))],
            bad,
            "the init message of method iam",
        ),
        (
            vec![hello(None, "example-bot"), of_iam(lab.params()), once()],
            bad,
            "did not send the solution of the challenge",
        ),
        (
            vec![
                hello(None, "example-bot"),
                of_iam(lab.params()),
                solution(Vec::new()),
            ],
            bad,
            "missing parameter StsIdentityRequest",
        ),
        (
            vec![
                hello(None, "example-bot"),
                of_iam(lab.params()),
                solution(b"junk".to_vec()),
            ],
            Code::Unknown,
            "parsing STS request",
        ),
        (
            vec![once(), give_up("no key could be made")],
            bad,
            "gave up (REASON_CHALLENGE_SOLUTION_FAILED): no key could be made",
        ),
        (vec![once(), of_token(None)], bad, "BotParams is required"),
        (
            vec![once(), with(&|params| params.public_keys = None)],
            bad,
            "PublicKeys is required",
        ),
        (
            vec![once(), keys(|keys| keys.public_tls_key.clear())],
            bad,
            "PublicKeys is required",
        ),
        (
            vec![once(), keys(|keys| keys.public_ssh_key.clear())],
            bad,
            "PublicKeys is required",
        ),
        (
            vec![once(), keys(|keys| keys.public_tls_key = b"x".to_vec())],
            bad,
            "TLS public key",
        ),
        (
            vec![once(), keys(|keys| keys.public_ssh_key = b"x".to_vec())],
            bad,
            "SSH public key",
        ),
        (
            vec![once(), with(&|params| params.expires = None)],
            bad,
            "Expires is required",
        ),
    ]
}

#[tokio::test]
async fn what_is_out_of_order_or_incomplete_is_refused_and_leaves_the_token() {
    let lab = lab(None);
    let cases = wrong_order_or_parts(&lab);
    for (number, (messages, code, text)) in cases.into_iter().enumerate() {
        let mut client = lab.stream(None, Listener::ProxyJoin);
        let mut last = None;
        for message in messages {
            client.say(message).await;
            last = Some(client.hear().await);
        }
        let status = last.unwrap().unwrap_err();
        assert_eq!(status.code(), code, "{number}: {status}");
        assert!(status.message().contains(text), "{number}: {status}");
        if number > 2 {
            let event = lab.events("bot.join").pop().unwrap();
            assert_eq!(event["code"], "TJ001E");
            assert!(event["error"].as_str().unwrap().contains(text), "{event}");
        }
        assert!(
            client.answers.recv().await.is_none(),
            "{number}: it goes on"
        );
    }
    lab.join_newer("once-and-never-again").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_says_nothing_more_is_let_go_after_a_minute() {
    let lab = lab(None);
    for messages in [vec![], vec![hello(None, "once-and-never-again")]] {
        let mut client = lab.stream(None, Listener::ProxyJoin);
        for message in messages {
            client.say(message).await;
            client.hear().await.unwrap();
        }
        let before = tokio::time::Instant::now();
        let status = client.hear().await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(before.elapsed().as_secs(), 60);
    }
    // One that hangs up is let go at once.
    let mut client = lab.stream(None, Listener::ProxyJoin);
    client.requests = None;
    assert_eq!(client.hear().await.unwrap_err().code(), Code::Cancelled);
}
