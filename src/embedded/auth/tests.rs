mod host_certs;
mod join_v1;
mod joins;
mod locks;
mod served;

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tonic::{Code, Response};

use super::*;
use crate::clock::Clock;
use crate::crypto::ssh::SshCertificate;
use crate::crypto::x509::{COMMON_NAME, Certificate, ORGANIZATION};
use crate::crypto::{KeyAlgorithm, PrivateKey, Suite, pem};
use crate::embedded::audit::Audit;
use crate::embedded::ca::{Authorities, AuthorityType};
use crate::embedded::caller::{Listener, oid};
use crate::embedded::resources::Mode;
use crate::embedded::store::Store;
use crate::join::iam::verify::BODY;
use crate::pb::proto::auth_service_server::AuthService as _;
use crate::pb::proto::join_service_server::JoinService as _;
use crate::pb::proto::{
    Certs, GetRoleRequest, PingRequest, RegisterUsingIamMethodRequest, UserCertsRequest, Watch,
};
use crate::pb::teleport::machineid::v1::bot_instance_service_server::BotInstanceService as _;
use crate::pb::teleport::machineid::v1::{
    BotInstanceServiceHealth, BotInstanceStatusHeartbeat, SubmitHeartbeatRequest,
};
use crate::pb::teleport::trust::v1::trust_service_server::TrustService as _;
use crate::pb::teleport::trust::v1::{GetCertAuthoritiesRequest, GetCertAuthorityRequest};
use crate::pb::types::{RegisterUsingTokenRequest, WatchKind};

const RESOURCES: &str = r#"
kind: role
version: v7
metadata: {name: access}
spec: {allow: {logins: [root], kubernetes_groups: ['system:masters'], db_names: ['*'], db_users: ['*']}}
---
kind: role
version: v7
metadata: {name: other}
spec: {}
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [access]}
---
kind: token
version: v2
metadata: {name: once-and-never-again}
spec: {roles: [Bot], bot_name: example, join_method: token}
---
kind: token
version: v2
metadata: {name: example-bot}
spec:
  roles: [Bot]
  bot_name: example
  join_method: iam
  allow: [{aws_account: "123456789012", aws_arn: "arn:aws:sts::123456789012:assumed-role/teleport-bot-role/i-*"}]
---
kind: token
version: v2
metadata: {name: nodes}
spec: {roles: [Bot], bot_name: example, join_method: ec2, allow: [{aws_account: "123456789012"}]}
"#;

struct Lab {
    auth: Auth,
    clock: Clock,
}

fn start() -> SystemTime {
    UNIX_EPOCH + Duration::from_hours(500_000)
}

fn lab(sts: Option<String>) -> Lab {
    let clock = Clock::simulated(start());
    let store = Store::in_memory(clock.clone()).unwrap();
    let authorities =
        Authorities::open(&store, "real.example.org", Suite::BalancedV1, start()).unwrap();
    let state = Arc::new(ClusterState {
        name: "real.example.org".to_owned(),
        public_addr: "example.teleport.sh:3080".to_owned(),
        clock: clock.clone(),
        audit: Audit::in_memory(clock.clone(), "real.example.org"),
        store,
        authorities,
        sts_endpoint: sts,
        env: crate::env::Env::default(),
    });
    let files = [("all.yaml".to_owned(), RESOURCES.to_owned())];
    state.create(&files, Mode::Create, "test").unwrap();
    Lab {
        auth: Auth::new(&state).unwrap(),
        clock,
    }
}

fn key() -> PrivateKey {
    PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()
}

fn certificate(certs: &Certs) -> Certificate {
    Certificate::from_pem(std::str::from_utf8(&certs.tls).unwrap()).unwrap()
}

impl Lab {
    /// A request as the auth listener hands it over, from who holds `certs`.
    fn from<T>(&self, certs: Option<&Certs>, message: T) -> Request<T> {
        let chain: Vec<Vec<u8>> = certs
            .map(|certs| certificate(certs).der().to_vec())
            .into_iter()
            .collect();
        let authorities = &self.auth.state.authorities;
        let identity = authorities.identity(&chain, self.clock.now()).unwrap();
        let mut request = Request::new(message);
        request.extensions_mut().insert(Caller {
            addr: SocketAddr::from(([127, 0, 0, 1], 1234)),
            listener: Listener::Auth,
            identity,
        });
        request
    }

    fn join_request(&self, token: &str, key: &PrivateKey) -> RegisterUsingTokenRequest {
        RegisterUsingTokenRequest {
            role: "Bot".to_owned(),
            token: token.to_owned(),
            public_tls_key: key.public_pem().into_bytes(),
            public_ssh_key: key.public_ssh_line().unwrap().into_bytes(),
            expires: Some((self.clock.now() + Duration::from_hours(1)).into()),
            // What a client says of itself here must not count.
            bot_instance_id: "forged".to_owned(),
            bot_generation: 77,
            previous_bot_instance_id: "forged".to_owned(),
            ..RegisterUsingTokenRequest::default()
        }
    }

    async fn join(&self, token: &str) -> Result<Certs, Status> {
        let request = self.from(None, self.join_request(token, &key()));
        let answer = self.auth.register_using_token(request).await;
        answer.map(Response::into_inner)
    }

    fn renewal(&self, key: &PrivateKey) -> UserCertsRequest {
        UserCertsRequest {
            username: "bot-example".to_owned(),
            expires: Some((self.clock.now() + Duration::from_hours(1)).into()),
            ssh_public_key: key.public_ssh_line().unwrap().into_bytes(),
            tls_public_key: key.public_pem().into_bytes(),
            ..UserCertsRequest::default()
        }
    }

    fn output(&self, roles: &[&str]) -> UserCertsRequest {
        UserCertsRequest {
            role_requests: roles.iter().map(|&role| role.to_owned()).collect(),
            use_role_requests: true,
            ..self.renewal(&key())
        }
    }

    async fn certs(&self, by: &Certs, request: UserCertsRequest) -> Result<Certs, Status> {
        let answer = self
            .auth
            .generate_user_certs(self.from(Some(by), request))
            .await;
        answer.map(Response::into_inner)
    }

    async fn iam(&self, by: Option<&Certs>, token: &str) -> Result<Certs, Status> {
        let caller = caller(&self.from(by, ())).unwrap();
        let (responses, mut answers) = tokio::sync::mpsc::channel(2);
        let (requests, stream) =
            tokio::sync::mpsc::channel::<Result<RegisterUsingIamMethodRequest, Status>>(1);
        let auth = self.auth.clone();
        let exchange = tokio::spawn(async move {
            let stream = tokio_stream::wrappers::ReceiverStream::new(stream);
            auth.exchange(caller, "test".to_owned(), stream, &responses)
                .await
        });
        let challenge = answers.recv().await.unwrap().unwrap().challenge;
        let request = RegisterUsingIamMethodRequest {
            register_using_token_request: Some(self.join_request(token, &key())),
            sts_identity_request: signed(&challenge, self.clock.now()),
        };
        requests.send(Ok(request)).await.unwrap();
        exchange.await.unwrap()?;
        Ok(answers.recv().await.unwrap().unwrap().certs.unwrap())
    }

    fn events(&self, name: &str) -> Vec<Value> {
        let events = self.auth.state.audit.events();
        events
            .into_iter()
            .filter(|event| event["event"] == name)
            .collect()
    }
}

/// A request as an agent signs it; nobody looks at the signature here.
fn signed(challenge: &str, now: SystemTime) -> Vec<u8> {
    let now = time::OffsetDateTime::from(now);
    let format = time::macros::format_description!("[year][month][day]T[hour][minute][second]Z");
    let date = now.format(format).unwrap();
    format!(
        "POST / HTTP/1.1\r\nHost: sts.us-east-1.amazonaws.com\r\nAccept: application/json\r\n\
         Authorization: AWS4-HMAC-SHA256 Credential=a/b/c/d/e, \
         SignedHeaders=host;x-teleport-challenge, Signature=ab\r\nContent-Length: 43\r\n\
         X-Amz-Date: {date}\r\nX-Teleport-Challenge: {challenge}\r\n\r\n{BODY}"
    )
    .into_bytes()
}

/// An STS that takes every signature for this account's role session.
async fn sts(account: &str, status: &str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let body = format!(
        "<GetCallerIdentityResponse><GetCallerIdentityResult><Arn>arn:aws:sts::{account}:\
         assumed-role/teleport-bot-role/i-0abc123</Arn><Account>{account}</Account>\
         </GetCallerIdentityResult></GetCallerIdentityResponse>"
    );
    let answer = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut asked = Vec::new();
            while !asked.ends_with(BODY.as_bytes()) {
                let mut buffer = [0; 4096];
                match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => break,
                    Ok(count) => asked.extend(&buffer[..count]),
                }
            }
            drop(stream.write_all(answer.as_bytes()).await);
        }
    });
    endpoint
}

fn refused(result: Result<Certs, Status>) -> (Code, String) {
    let status = result.unwrap_err();
    (status.code(), status.message().to_owned())
}

#[tokio::test]
async fn a_token_joins_one_bot_once() {
    let lab = lab(None);
    let certs = lab.join("once-and-never-again").await.unwrap();
    let tls = certificate(&certs);
    assert_eq!(tls.subject(COMMON_NAME), ["bot-example"]);
    assert_eq!(tls.subject(ORGANIZATION), ["bot-example"]);
    assert_eq!(tls.subject(oid::GENERATION), ["1"]);
    assert_eq!(tls.subject(oid::RENEWABLE), ["true"]);
    assert_eq!(
        tls.subject(oid::JOIN_ATTRIBUTES),
        [r#"{"meta":{"join_method":"token"}}"#]
    );
    assert_ne!(tls.subject(oid::BOT_INSTANCE), ["forged"]);
    let logins = tls.subject(oid::LOCALITY);
    assert!(
        logins
            .iter()
            .any(|login| login.starts_with("-teleport-nologin-"))
    );
    assert!(
        logins
            .iter()
            .any(|login| login == "-teleport-internal-join")
    );
    let ssh = SshCertificate::parse(std::str::from_utf8(&certs.ssh).unwrap()).unwrap();
    assert_eq!(ssh.principals().len(), 2);
    let authorities = &lab.auth.state.authorities;
    let trusted: Vec<String> = [AuthorityType::User, AuthorityType::Host]
        .iter()
        .flat_map(|kind| authorities.trusted_tls(*kind))
        .map(|der| pem::encode("CERTIFICATE", &der))
        .collect();
    let given: Vec<&str> = certs
        .tlsca_certs
        .iter()
        .map(|pem| std::str::from_utf8(pem).unwrap())
        .collect();
    assert_eq!(given, trusted);
    assert_eq!(certs.sshca_certs.len(), 2);

    assert_eq!(
        refused(lab.join("once-and-never-again").await),
        (
            Code::PermissionDenied,
            r#""" can not join the cluster with role "Bot", token expired or not found"#.to_owned()
        )
    );
    let joins = lab.events("bot.join");
    assert_eq!(joins[0]["code"], "TJ001I");
    assert_eq!(joins[0]["token_name"], "***************again");
    assert_eq!(joins[0]["success"], true);
    assert_eq!(joins[1]["code"], "TJ001E");
    assert_eq!(
        lab.events("cert.create")[0]["identity"]["user"],
        "bot-example"
    );
}

#[tokio::test]
async fn two_who_use_one_token_at_once_give_one_winner() {
    let lab = lab(None);
    let (one, other) = tokio::join!(
        lab.join("once-and-never-again"),
        lab.join("once-and-never-again")
    );
    assert_eq!(
        [one.is_ok(), other.is_ok()]
            .iter()
            .filter(|won| **won)
            .count(),
        1
    );
    assert_eq!(lab.auth.state.store.list("bot_instance").unwrap().len(), 1);
}

#[tokio::test]
async fn joins_that_are_refused_leave_the_token() {
    let lab = lab(None);
    let send = async |change: &dyn Fn(&mut RegisterUsingTokenRequest)| {
        let mut request = lab.join_request("once-and-never-again", &key());
        change(&mut request);
        let answer = lab.auth.register_using_token(lab.from(None, request)).await;
        refused(answer.map(Response::into_inner))
    };
    let bad = Code::InvalidArgument;
    let (code, text) = send(&|request| request.token.clear()).await;
    assert_eq!((code, text.as_str()), (bad, "missing parameter Token"));
    assert_eq!(
        send(&|request| request.role = "Node".to_owned()).await.0,
        bad
    );
    let (code, text) = send(&|request| {
        request.public_tls_key.clear();
        request.public_ssh_key.clear();
    })
    .await;
    assert_eq!((code, text.as_str()), (bad, "must provide a public key"));
    assert_eq!(
        send(&|request| request.public_tls_key = b"junk".to_vec())
            .await
            .0,
        bad
    );
    let (code, text) = send(&|request| request.token = "example-bot".to_owned()).await;
    assert_eq!(code, Code::PermissionDenied);
    assert!(
        text.contains("only valid for the iam join method"),
        "{text}"
    );
    let (code, text) = send(&|request| request.token = "nodes".to_owned()).await;
    assert_eq!(code, Code::InvalidArgument);
    assert_eq!(text, "unsupported join method \"ec2\" for bot");
    lab.join("once-and-never-again").await.unwrap();
}

#[tokio::test]
async fn renewals_count_up_and_an_old_generation_locks_the_bot() {
    let lab = lab(None);
    let first = lab.join("once-and-never-again").await.unwrap();
    let request = lab.renewal(&key());
    let second = lab.certs(&first, request.clone()).await.unwrap();
    assert_eq!(certificate(&second).subject(oid::GENERATION), ["2"]);
    // The answer got lost: the same question gives the same generation, and nobody is locked.
    let again = lab.certs(&first, request).await.unwrap();
    assert_eq!(certificate(&again).subject(oid::GENERATION), ["2"]);
    let third = lab.certs(&second, lab.renewal(&key())).await.unwrap();
    assert_eq!(certificate(&third).subject(oid::GENERATION), ["3"]);
    assert_eq!(third.tlsca_certs.len(), 2);

    let instance = certificate(&first).subject(oid::BOT_INSTANCE)[0].clone();
    let (code, text) = refused(lab.certs(&second, lab.renewal(&key())).await);
    assert_eq!(code, Code::PermissionDenied);
    assert_eq!(
        text,
        format!(
            "renewable cert generation mismatch for bot example/{instance}: stored=3, presented=2"
        )
    );
    assert_eq!(lab.events("cert.generation_mismatch")[0]["code"], "TCB00W");
    let (_, text) = refused(lab.certs(&third, lab.renewal(&key())).await);
    assert_eq!(
        text,
        "lock targeting User:\"bot-example\" is in force: The bot user \"bot-example\" has been \
         locked due to a certificate generation mismatch, possibly indicating a stolen certificate."
    );
}

#[tokio::test]
async fn outputs_have_the_roles_they_ask_for_and_end_there() {
    let lab = lab(None);
    let own = lab.join("once-and-never-again").await.unwrap();
    let output = lab.certs(&own, lab.output(&["access"])).await.unwrap();
    let tls = certificate(&output);
    assert_eq!(tls.subject(ORGANIZATION), ["access"]);
    assert_eq!(tls.subject(oid::IMPERSONATOR), ["bot-example"]);
    assert_eq!(tls.subject(oid::DISALLOW_REISSUE), ["true"]);
    assert_eq!(tls.subject(oid::KUBERNETES_GROUP), ["system:masters"]);
    assert_eq!(tls.subject(oid::DATABASE_USERS), ["*"]);
    assert!(tls.subject(oid::RENEWABLE).is_empty() && tls.subject(oid::GENERATION).is_empty());
    assert_eq!(
        tls.subject(oid::BOT_INSTANCE),
        certificate(&own).subject(oid::BOT_INSTANCE)
    );
    assert_eq!(output.tlsca_certs.len(), 1);

    let denied = Code::PermissionDenied;
    let cases: [(&Certs, UserCertsRequest, Code, &str); 8] = [
        (
            &output,
            lab.output(&["access"]),
            denied,
            "identity is not allowed to reissue",
        ),
        (
            &own,
            lab.output(&["access", "other"]),
            denied,
            "user \"bot-example\" has requested role impersonation for [access other]",
        ),
        (
            &own,
            lab.output(&[]),
            Code::InvalidArgument,
            "at least one role request is required",
        ),
        (
            &own,
            UserCertsRequest {
                expires: None,
                ..lab.output(&["access"])
            },
            denied,
            "client credentials have expired",
        ),
        (
            &own,
            UserCertsRequest {
                username: "bot-other".to_owned(),
                ..lab.output(&["access"])
            },
            denied,
            "may not ask for certificates",
        ),
        (
            &own,
            UserCertsRequest {
                route_to_cluster: "leaf".to_owned(),
                ..lab.output(&["access"])
            },
            Code::NotFound,
            "remote cluster \"leaf\" not found",
        ),
        (
            &own,
            UserCertsRequest {
                kubernetes_cluster: "k".to_owned(),
                ..lab.output(&["access"])
            },
            Code::InvalidArgument,
            "Kubernetes cluster \"k\" is not registered",
        ),
        (
            &own,
            UserCertsRequest {
                ssh_public_key: Vec::new(),
                tls_public_key: Vec::new(),
                ..lab.output(&["access"])
            },
            Code::InvalidArgument,
            "must provide a public key",
        ),
    ];
    for (by, request, code, text) in cases {
        let (found, message) = refused(lab.certs(by, request).await);
        assert_eq!(found, code, "{message}");
        assert!(message.contains(text), "{message}");
    }
    let long = UserCertsRequest {
        expires: Some((lab.clock.now() + Duration::from_hours(10_000)).into()),
        ..lab.output(&["access"])
    };
    let long = certificate(&lab.certs(&own, long).await.unwrap());
    let life = long.not_after().duration_since(lab.clock.now()).unwrap();
    assert!(life <= Duration::from_hours(30), "{life:?}");
    let reissuable = UserCertsRequest {
        reissuable_role_impersonation: true,
        ..lab.output(&["access"])
    };
    let reissuable = lab.certs(&own, reissuable).await.unwrap();
    let (_, text) = refused(lab.certs(&reissuable, lab.output(&["access"])).await);
    assert!(
        text.contains("impersonated roles can not request other roles"),
        "{text}"
    );
    lab.certs(&reissuable, lab.renewal(&key())).await.unwrap();
}

#[tokio::test]
async fn iam_joins_by_a_confirmed_identity_and_keeps_its_instance() {
    let lab = lab(Some(sts("123456789012", "200 OK").await));
    let first = lab.iam(None, "example-bot").await.unwrap();
    let tls = certificate(&first);
    assert_eq!(
        tls.subject(oid::JOIN_ATTRIBUTES),
        [
            r#"{"meta":{"join_token_name":"example-bot","join_method":"iam"},"iam":{"account":"123456789012","arn":"arn:aws:sts::123456789012:assumed-role/teleport-bot-role/i-0abc123"}}"#
        ]
    );
    assert!(tls.subject(oid::RENEWABLE).is_empty());
    let again = certificate(&lab.iam(Some(&first), "example-bot").await.unwrap());
    assert_eq!(
        again.subject(oid::BOT_INSTANCE),
        tls.subject(oid::BOT_INSTANCE)
    );
    assert_eq!(again.subject(oid::GENERATION), ["2"]);
    // An older certificate is no theft where each join proves itself.
    let older = certificate(&lab.iam(Some(&first), "example-bot").await.unwrap());
    assert_eq!(older.subject(oid::GENERATION), ["3"]);
    let fresh = certificate(&lab.iam(None, "example-bot").await.unwrap());
    assert_ne!(
        fresh.subject(oid::BOT_INSTANCE),
        tls.subject(oid::BOT_INSTANCE)
    );
    let event = &lab.events("bot.join")[0];
    assert_eq!(event["attributes"]["Account"], "123456789012");
    let (code, text) = refused(lab.iam(None, "once-and-never-again").await);
    assert_eq!(code, Code::PermissionDenied);
    assert_eq!(text, "this token does not support the IAM join method");
}

#[tokio::test]
async fn certificates_count_on_the_auth_side_only() {
    let lab = lab(Some(sts("123456789012", "200 OK").await));
    let first = lab.iam(None, "example-bot").await.unwrap();
    for listener in [Listener::Web, Listener::ProxyJoin] {
        let token = format!("{listener:?}-once-more");
        let file = format!(
            "kind: token\nversion: v2\nmetadata: {{name: {token}}}\n\
             spec: {{roles: [Bot], bot_name: example, join_method: token}}\n"
        );
        let files = [("token.yaml".to_owned(), file)];
        lab.auth.state.create(&files, Mode::Create, "test").unwrap();
        let mut request = lab.from(Some(&first), lab.join_request(&token, &key()));
        let mut caller = caller(&request).unwrap();
        caller.listener = listener;
        request.extensions_mut().insert(caller);
        let joined = lab
            .auth
            .register_using_token(request)
            .await
            .unwrap()
            .into_inner();
        assert_ne!(
            certificate(&joined).subject(oid::BOT_INSTANCE),
            certificate(&first).subject(oid::BOT_INSTANCE)
        );
    }
}

#[tokio::test]
async fn iam_refusals_say_what_was_wrong() {
    let stranger = lab(Some(sts("999999999999", "200 OK").await));
    let (code, text) = refused(stranger.iam(None, "example-bot").await);
    assert_eq!(code, Code::PermissionDenied);
    assert_eq!(
        text,
        "checking iam request\n\tchecking allow rules\n\t\tinstance arn:aws:sts::999999999999:\
         assumed-role/teleport-bot-role/i-0abc123 did not match any allow rules in token example-bot"
    );
    let failure = &stranger.events("bot.join")[0];
    assert_eq!(failure["attributes"]["Account"], "999999999999");
    let unsigned = lab(Some(sts("123456789012", "403 Forbidden").await));
    let (code, text) = refused(unsigned.iam(None, "example-bot").await);
    assert_eq!(code, Code::PermissionDenied);
    assert!(
        text.contains("aws sts api returned status: \"403 Forbidden\""),
        "{text}"
    );
    let away = lab(Some("http://127.0.0.1:1".to_owned()));
    assert_eq!(
        refused(away.iam(None, "example-bot").await).0,
        Code::Unavailable
    );
}

#[tokio::test]
async fn authorised_calls_need_a_good_certificate_of_an_unlocked_user() {
    let lab = lab(None);
    let request = |kind: &str| GetCertAuthoritiesRequest {
        r#type: kind.to_owned(),
        include_key: false,
    };
    let nobody = lab
        .auth
        .get_cert_authorities(lab.from(None, request("host")))
        .await;
    assert_eq!(nobody.unwrap_err().code(), Code::PermissionDenied);
    assert!(lab.auth.ping(lab.from(None, PingRequest {})).await.is_ok());
    assert!(
        lab.auth
            .get_cluster_ca_cert(lab.from(None, ()))
            .await
            .is_ok()
    );

    let own = lab.join("once-and-never-again").await.unwrap();
    let all = async |kind: &str| {
        let answer = lab
            .auth
            .get_cert_authorities(lab.from(Some(&own), request(kind)))
            .await;
        answer.map(|answer| answer.into_inner().cert_authorities_v2)
    };
    let kinds: Vec<String> = all("db")
        .await
        .unwrap()
        .into_iter()
        .map(|authority| authority.sub_kind)
        .collect();
    assert_eq!(kinds, ["db", "db_client"]);
    assert_eq!(all("x").await.unwrap_err().code(), Code::InvalidArgument);
    let one = |domain: &str, include_key| GetCertAuthorityRequest {
        r#type: "user".to_owned(),
        domain: domain.to_owned(),
        include_key,
    };
    let get = async |message| {
        lab.auth
            .get_cert_authority(lab.from(Some(&own), message))
            .await
    };
    assert!(get(one("real.example.org", false)).await.is_ok());
    assert_eq!(
        get(one("leaf", false)).await.unwrap_err().code(),
        Code::NotFound
    );
    let secret = get(one("real.example.org", true)).await.unwrap_err();
    assert_eq!(secret.code(), Code::PermissionDenied);

    let role = async |name: &str| {
        let name = name.to_owned();
        lab.auth
            .get_role(lab.from(Some(&own), GetRoleRequest { name }))
            .await
    };
    let spec = role("bot-example")
        .await
        .unwrap()
        .into_inner()
        .spec
        .unwrap();
    assert_eq!(spec.allow.unwrap().impersonate.unwrap().roles, ["access"]);
    assert_eq!(
        role("other").await.unwrap_err().code(),
        Code::PermissionDenied
    );

    let lock =
        "kind: lock\nversion: v2\nmetadata: {name: l}\nspec: {target: {user: bot-example}}\n";
    let files = [("lock.yaml".to_owned(), lock.to_owned())];
    lab.auth.state.create(&files, Mode::Create, "test").unwrap();
    let locked = all("host").await.unwrap_err();
    assert_eq!(
        (locked.code(), locked.message()),
        (
            Code::PermissionDenied,
            "lock targeting User:\"bot-example\" is in force"
        )
    );
}

#[tokio::test]
async fn an_expired_certificate_is_refused_on_an_open_connection() {
    let lab = lab(None);
    let own = lab.join("once-and-never-again").await.unwrap();
    let mut request = lab.from(Some(&own), PingRequest {});
    let mut old = request.extensions_mut().get::<Caller>().cloned().unwrap();
    if let Some(identity) = &mut old.identity {
        identity.expires = start() - Duration::from_secs(1);
    }
    let refusal = authorize(&lab.auth.state, &old).unwrap_err();
    assert_eq!(
        refusal.to_string(),
        "access denied: the client certificate has expired"
    );
    let mut proxy = caller(&lab.from(Some(&own), ())).unwrap();
    proxy.listener = Listener::ProxyJoin;
    assert!(authorize(&lab.auth.state, &proxy).is_err());
}

#[tokio::test]
async fn watches_begin_with_init_and_ask_for_something() {
    use tokio_stream::StreamExt as _;
    let lab = lab(None);
    let own = lab.join("once-and-never-again").await.unwrap();
    let watch = |kinds: &[&str]| Watch {
        kinds: kinds
            .iter()
            .map(|&kind| WatchKind {
                kind: kind.to_owned(),
                ..WatchKind::default()
            })
            .collect(),
        allow_partial_success: false,
    };
    let open = async |kinds: &[&str]| {
        lab.auth
            .watch_events(lab.from(Some(&own), watch(kinds)))
            .await
    };
    let mut events = open(&["cert_authority"]).await.unwrap().into_inner();
    let first = events.next().await.unwrap().unwrap();
    assert_eq!((first.r#type, first.resource), (0, None));
    assert_eq!(open(&[]).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(
        open(&["node"]).await.unwrap_err().code(),
        Code::InvalidArgument
    );
}

#[tokio::test]
async fn watchers_hear_of_federations_and_others_list_them() {
    use crate::pb::proto::event::Resource as Told;
    use crate::pb::teleport::machineid::v1 as machineid;
    use machineid::spiffe_federation_service_server::SpiffeFederationService as _;
    use tokio_stream::StreamExt as _;
    let lab = lab(None);
    let own = lab.join("once-and-never-again").await.unwrap();
    let create = |name: &str| {
        let text = format!(
            "kind: spiffe_federation\nversion: v1\nmetadata: {{name: {name}}}\n\
             spec: {{bundle_source: {{static: {{bundle: '{{\"keys\": []}}'}}}}}}\n"
        );
        let files = [("f".to_owned(), text)];
        lab.auth
            .state
            .create(&files, Mode::Create, "test")
            .unwrap()
            .remove(0)
            .message
    };
    let kind = WatchKind {
        kind: "spiffe_federation".to_owned(),
        ..WatchKind::default()
    };
    let watch = Watch {
        kinds: vec![kind],
        allow_partial_success: false,
    };
    let events = lab.auth.watch_events(lab.from(Some(&own), watch)).await;
    let mut events = events.unwrap().into_inner();
    assert_eq!(events.next().await.unwrap().unwrap().r#type, 0);
    for name in ["a.example", "b.example", "c.example"] {
        let told = create(name);
        assert_eq!(
            told,
            format!("SPIFFE Federation \"{name}\" has been created")
        );
        let event = events.next().await.unwrap().unwrap();
        let Some(Told::SpiffeFederation(federation)) = event.resource else {
            panic!("{event:?}");
        };
        assert_eq!(
            (event.r#type, &*federation.metadata.unwrap().name),
            (1, name)
        );
    }
    let store = &lab.auth.state.store;
    store.delete("spiffe_federation", "b.example").unwrap();
    let event = events.next().await.unwrap().unwrap();
    let Some(Told::ResourceHeader(header)) = event.resource else {
        panic!("{event:?}");
    };
    assert_eq!(
        (event.r#type, &*header.metadata.unwrap().name),
        (2, "b.example")
    );

    let service = Federations {
        state: Arc::clone(&lab.auth.state),
    };
    let list = async |page_size, page_token: &str| {
        let request = machineid::ListSpiffeFederationsRequest {
            page_size,
            page_token: page_token.to_owned(),
        };
        let request = lab.from(Some(&own), request);
        let answer = service.list_spiffe_federations(request).await;
        let page = answer.unwrap().into_inner();
        let names = page.spiffe_federations.into_iter();
        let names = names.map(|one| one.metadata.unwrap().name);
        (names.collect::<Vec<_>>(), page.next_page_token)
    };
    let (a, c) = ("a.example".to_owned(), "c.example".to_owned());
    assert_eq!(
        list(0, "").await,
        (vec![a.clone(), c.clone()], String::new())
    );
    assert_eq!(list(1, "").await, (vec![a], c.clone()));
    assert_eq!(list(1, &c).await, (vec![c], String::new()));
    let get = async |by, name: &str| {
        let name = name.to_owned();
        let request = lab.from(by, machineid::GetSpiffeFederationRequest { name });
        let answer = service.get_spiffe_federation(request).await;
        answer.map_err(|status| status.code())
    };
    assert!(get(Some(&own), "a.example").await.is_ok());
    assert_eq!(
        get(Some(&own), "b.example").await.unwrap_err(),
        Code::NotFound
    );
    assert_eq!(
        get(None, "a.example").await.unwrap_err(),
        Code::PermissionDenied
    );
}

#[tokio::test]
async fn the_first_and_the_last_heartbeats_are_kept() {
    let lab = lab(None);
    let own = lab.join("once-and-never-again").await.unwrap();
    let beat = async |uptime: i64| {
        let heartbeat = BotInstanceStatusHeartbeat {
            uptime: Some(prost_types::Duration {
                seconds: uptime,
                nanos: 0,
            }),
            ..BotInstanceStatusHeartbeat::default()
        };
        let message = SubmitHeartbeatRequest {
            heartbeat: Some(heartbeat),
            service_health: vec![BotInstanceServiceHealth {
                reason: Some(format!("failed {uptime} times")),
                ..BotInstanceServiceHealth::default()
            }],
        };
        lab.auth
            .submit_heartbeat(lab.from(Some(&own), message))
            .await
    };
    for uptime in 1..=12 {
        beat(uptime).await.unwrap();
    }
    let records = lab.auth.state.store.list("bot_instance").unwrap();
    let status = &records[0].status;
    assert_eq!(status["initial_heartbeat"]["uptime"], "1s");
    assert_eq!(status["latest_heartbeats"].as_array().unwrap().len(), 10);
    assert_eq!(status["latest_heartbeats"][9]["uptime"], "12s");
    assert_eq!(status["latest_authentications"][0]["generation"], 1);
    let health = status["service_health"].as_array().unwrap();
    assert_eq!(health.len(), 1, "only the last is kept");
    assert_eq!(health[0]["reason"], "failed 12 times");
    let empty = lab.from(Some(&own), SubmitHeartbeatRequest::default());
    let refusal = lab.auth.submit_heartbeat(empty).await.unwrap_err();
    assert_eq!(refusal.message(), "heartbeat: must be non-nil");
}
