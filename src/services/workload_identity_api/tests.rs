use super::*;

mod sds;
mod services;
mod streams;
mod threads;

use crate::attest::Attestors;
use crate::clock::Clock;
use crate::crypto::{KeyAlgorithm, PrivateKey};
use crate::pb::teleport::workloadidentity::v1::WorkloadAttrs;
use crate::pb::workload_api::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use crate::pb::workload_api::{
    JwtBundlesRequest, JwtsvidRequest, ValidateJwtsvidRequest, X509BundlesRequest, X509svidRequest,
};
use crate::services::trust::Feeds;
use crate::services::{Sockets, testing};
use crate::workload::jwt::JwtSvid;
use crate::workload::tests::{Authority, DOMAIN, HOUR, message, start};
use crate::workload::{Crl, IssueError, Issuer, Shelf, Svid, TokenIssuer};
use crate::yaml::emit;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Code;

fn read(source: &str) -> (Option<Box<dyn ServicePlan>>, String) {
    testing::read(&Kind, source)
}

#[test]
fn the_section_is_written_as_upstream_writes_it() {
    let (plan, problems) = read("listen: unix:///x.sock\nselector:\n  name: n\n");
    assert_eq!(problems, "");
    let plan = plan.unwrap();
    assert_eq!(plan.label(), "workload-identity-api:unix:///x.sock");
    let expected = "listen: unix:///x.sock\nattestors:\n  kubernetes:\n    enabled: false\n  \
        podman:\n    enabled: false\n  docker:\n    enabled: false\n  systemd:\n    \
        enabled: false\n  unix:\n    binary_hash_max_size_bytes: 1073741824\n  sigstore:\n    \
        enabled: false\nselector:\n  name: \"n\"\n";
    assert_eq!(emit::emit(&Tree::Map(plan.emit())), expected);
    let (again, problems) = read(expected);
    assert_eq!(problems, "");
    assert_eq!(emit::emit(&Tree::Map(again.unwrap().emit())), expected);
}

#[test]
fn every_problem_is_told_in_one_run() {
    let (plan, problems) = read("listen: http://x\nattestors: {podman: {enabled: true}}\n");
    assert!(plan.is_none());
    for key in ["listen: ", "attestors.podman.addr: ", "selector: "] {
        assert!(
            problems.contains(&format!("error: {key}")),
            "{key}: {problems}"
        );
    }
}

/// The API on a socket of its own, issuing from a small authority.
struct World {
    _directory: tempfile::TempDir,
    path: std::path::PathBuf,
    authority: Authority,
    bundles: watch::Sender<Option<Arc<Bundles>>>,
    revoked: watch::Sender<Crl>,
    issuer: Arc<Fake>,
    cache: Cache,
    health: HealthReporter,
    shutdown: CancellationToken,
}

/// Grants two identities; one of them twice.
#[derive(Debug)]
struct FakeTokens;

#[async_trait]
impl TokenIssuer for FakeTokens {
    async fn issue(
        &self,
        _selector: &Selector,
        _ttl: Duration,
        _attributes: &WorkloadAttrs,
        audiences: &[String],
    ) -> Result<Vec<JwtSvid>, IssueError> {
        let token = |path: &str, number: u32| JwtSvid {
            id: format!("spiffe://{DOMAIN}{path}").parse().unwrap(),
            token: format!("{number} for {}", audiences.join(" and ")),
            hint: format!("hint {number}"),
            not_after: start() + HOUR,
        };
        Ok(vec![token("/a", 1), token("/b", 2), token("/b", 3)])
    }
}

#[derive(Debug)]
struct Fake {
    leaf: bytes::Bytes,
    refuses: std::sync::atomic::AtomicBool,
    pids: std::sync::Mutex<Vec<i32>>,
}

#[async_trait]
impl Issuer for Fake {
    async fn issue(
        &self,
        _selector: &Selector,
        _ttl: Duration,
        attributes: &WorkloadAttrs,
    ) -> Result<Vec<Svid>, IssueError> {
        let pid = attributes.unix.as_ref().map_or(0, |unix| unix.pid);
        let issued = {
            let mut pids = self.pids.lock().unwrap();
            pids.push(pid);
            pids.len()
        };
        if self.refuses.load(std::sync::atomic::Ordering::Relaxed) {
            return Err(IssueError::Refused("no rule".into()));
        }
        Ok(vec![Svid {
            id: "spiffe://example.org/svc/foo".parse().unwrap(),
            chain: self.leaf.clone(),
            key: format!("key {issued}").into(),
            hint: "hint".into(),
            issued_at: start(),
            not_after: start() + HOUR,
            serial: "01".into(),
            name: "foo".into(),
            revision: String::new(),
        }])
    }
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new(DOMAIN);
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let leaf = authority.leaf(&key, &["spiffe://example.org/svc/foo"]);
        let issuer = Arc::new(Fake {
            leaf: leaf.into(),
            refuses: false.into(),
            pids: std::sync::Mutex::default(),
        });
        let shared: Arc<dyn Issuer> = Arc::clone(&issuer) as _;
        Self {
            path: directory.path().join("w.sock"),
            _directory: directory,
            authority,
            bundles: watch::Sender::new(None),
            revoked: watch::Sender::new(Crl::None),
            issuer,
            cache: Cache::new(shared, Clock::simulated(start()), HOUR),
            health: HealthReporter::new(),
            shutdown: CancellationToken::new(),
        }
    }

    fn publish(&self, authorities: &[&Authority]) {
        let bundles = Bundles::from_authority(&message(DOMAIN, authorities)).unwrap();
        self.bundles.send_replace(Some(Arc::new(bundles)));
    }

    /// Runs `test` beside the service.
    async fn run(&self, test: impl Future<Output = ()>) {
        let attestors = attest::Plan::default().build();
        Box::pin(self.run_with(attestors, HOUR, test)).await;
    }

    /// The same, where callers are looked at by `attestors`, and again after about `interval`.
    async fn run_with(
        &self,
        attestors: Attestors,
        interval: Duration,
        test: impl Future<Output = ()>,
    ) {
        let listen = Listen::Unix(self.path.clone());
        let (open, sockets) = (Permissions::default(), Sockets::default());
        let bound = listen.bind(&open, &sockets, "api").await.unwrap();
        let source = self.source(attestors, interval);
        tokio::select! {
            served = serve(Arc::new(source), &bound, self.health.clone(), false) => served.unwrap(),
            () = self.cache.run() => {}
            () = test => {}
        }
    }

    fn source(&self, attestors: Attestors, interval: Duration) -> Source {
        let clock = Clock::simulated(start());
        Source {
            cache: self.cache.clone(),
            tokens: Tokens::new(
                Arc::new(FakeTokens),
                Selector::Name("foo".into()),
                HOUR,
                clock.clone(),
                Shelf::default(),
            ),
            view: View::new(
                Feeds {
                    bundles: self.bundles.subscribe(),
                    revoked: self.revoked.subscribe(),
                },
                None,
            ),
            x509_bundles: Memo::default(),
            jwt_bundles: Memo::default(),
            attestors,
            selector: Selector::Name("foo".into()),
            ttl: HOUR,
            interval,
            clock,
            shutdown: self.shutdown.clone(),
            calls: Source::limit(),
            nobody: Arc::default(),
        }
    }

    async fn client(&self) -> SpiffeWorkloadApiClient<tonic::transport::Channel> {
        SpiffeWorkloadApiClient::new(self.channel().await)
    }

    async fn channel(&self) -> tonic::transport::Channel {
        let path = self.path.clone();
        let connector = tower::service_fn(move |_: http::Uri| {
            let path = path.clone();
            async move {
                let stream = tokio::net::UnixStream::connect(path).await?;
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
            }
        });
        let endpoint = tonic::transport::Endpoint::from_static("http://localhost");
        endpoint.connect_with_connector(connector).await.unwrap()
    }
}

fn with_header<T>(message: T, values: &[&'static str]) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    for value in values {
        let value = tonic::metadata::MetadataValue::from_static(value);
        request.metadata_mut().append("workload.spiffe.io", value);
    }
    request
}

fn call<T>(message: T) -> tonic::Request<T> {
    with_header(message, &["true"])
}

#[tokio::test]
async fn calls_need_the_security_header_exactly_once() {
    let world = World::new();
    world.publish(&[&world.authority]);
    world
        .run(async {
            let mut client = world.client().await;
            for values in [
                &[][..],
                &["True"],
                &["1"],
                &[""],
                &["true", "true"],
                &["false"],
            ] {
                let svid = client
                    .fetch_x509svid(with_header(X509svidRequest {}, values))
                    .await;
                let jwt = client
                    .fetch_jwt_bundles(with_header(JwtBundlesRequest {}, values))
                    .await;
                for status in [svid.unwrap_err(), jwt.unwrap_err()] {
                    assert_eq!(status.code(), Code::InvalidArgument, "{values:?}");
                    assert_eq!(status.message(), "security header missing from request");
                }
            }
            assert!(
                client
                    .fetch_x509svid(call(X509svidRequest {}))
                    .await
                    .is_ok()
            );
        })
        .await;
}

#[tokio::test]
async fn every_message_is_the_whole_state() {
    let world = World::new();
    world.publish(&[&world.authority]);
    world
        .run(async {
            let mut client = world.client().await;
            let mut stream = client
                .fetch_x509svid(call(X509svidRequest {}))
                .await
                .unwrap()
                .into_inner();
            let first = stream.message().await.unwrap().unwrap();
            assert_eq!(first.svids[0].spiffe_id, "spiffe://example.org/svc/foo");
            assert_eq!(&first.svids[0].bundle[..], world.authority.der);
            assert!(first.crl.is_empty());
            // The caller was attested: this process asked.
            let own = i32::try_from(std::process::id()).unwrap();
            assert_eq!(*world.issuer.pids.lock().unwrap(), [own]);

            let next = Authority::new(DOMAIN);
            world.publish(&[&next, &world.authority]);
            let second = stream.message().await.unwrap().unwrap();
            let both = [next.der.clone(), world.authority.der.clone()].concat();
            assert_eq!(&second.svids[0].bundle[..], both);
            assert_eq!(second.svids[0].x509_svid, first.svids[0].x509_svid);

            world
                .revoked
                .send_replace(Crl::Signed(bytes::Bytes::from_static(b"crl")));
            let third = stream.message().await.unwrap().unwrap();
            assert_eq!(third.crl, ["crl"]);
            assert_eq!(third.svids, second.svids);

            let mut bundles = client
                .fetch_x509_bundles(call(X509BundlesRequest {}))
                .await
                .unwrap()
                .into_inner();
            let message = bundles.message().await.unwrap().unwrap();
            assert_eq!(&message.bundles["spiffe://example.org"][..], both);
            assert_eq!(message.crl, ["crl"]);
            assert_eq!(world.issuer.pids.lock().unwrap().len(), 1, "issued once");
        })
        .await;
}

#[tokio::test]
async fn jwt_bundles_have_nothing_to_do_with_revocations() {
    let world = World::new();
    world.publish(&[&world.authority]);
    world.revoked.send_replace(Crl::Pending);
    world
        .run(async {
            let mut client = world.client().await;
            let bundles = client.fetch_jwt_bundles(call(JwtBundlesRequest {}));
            let mut stream = tokio::time::timeout(Duration::from_secs(5), bundles)
                .await
                .expect("waits for the revocation list")
                .unwrap()
                .into_inner();
            stream.message().await.unwrap().unwrap();
            // A new list is no news to it, a new authority is.
            world.revoked.send_replace(Crl::None);
            let next = tokio::time::timeout(Duration::from_millis(200), stream.message()).await;
            assert!(next.is_err(), "{next:?}");
        })
        .await;
}

#[tokio::test]
async fn a_refusal_has_the_standard_s_code_and_words() {
    let world = World::new();
    world.publish(&[&world.authority]);
    world
        .issuer
        .refuses
        .store(true, std::sync::atomic::Ordering::Relaxed);
    world
        .run(async {
            let mut client = world.client().await;
            let status = client
                .fetch_x509svid(call(X509svidRequest {}))
                .await
                .unwrap_err();
            assert_eq!(status.code(), Code::PermissionDenied);
            assert_eq!(status.message(), "no identity issued: no rule");
        })
        .await;
}

#[tokio::test]
async fn a_stop_ends_open_streams() {
    let world = World::new();
    world.publish(&[&world.authority]);
    let mut open = None;
    world
        .run(async {
            let mut client = world.client().await;
            let mut stream = client
                .fetch_x509svid(call(X509svidRequest {}))
                .await
                .unwrap()
                .into_inner();
            stream.message().await.unwrap().unwrap();
            // The service may have ended before this is heard.
            open = Some(tokio::spawn(async move { stream.message().await }));
            world.shutdown.cancel();
            std::future::pending::<()>().await;
        })
        .await;
    assert!(!world.path.exists());
    let status = open.unwrap().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
}

#[tokio::test]
async fn tokens_are_for_all_identities_or_for_the_one_that_is_asked_for() {
    let world = World::new();
    let ask = async {
        let mut client = world.client().await;
        for (id, expected) in [
            ("", Ok(vec!["1 for x", "2 for x", "3 for x"])),
            ("spiffe://example.org/a", Ok(vec!["1 for x"])),
            ("spiffe://example.org/b", Ok(vec!["2 for x"])),
            ("SPIFFE://EXAMPLE.ORG/b", Err(Code::InvalidArgument)),
            ("spiffe://example.org/A", Err(Code::PermissionDenied)),
            ("spiffe://example.com/a", Err(Code::PermissionDenied)),
            ("example.org/a", Err(Code::InvalidArgument)),
        ] {
            let request = JwtsvidRequest {
                audience: vec!["x".into()],
                spiffe_id: id.into(),
            };
            let answer = client.fetch_jwtsvid(with_header(request, &["true"])).await;
            let tokens = answer.map(|answer| {
                let svids = answer.into_inner().svids;
                svids.into_iter().map(|svid| svid.svid).collect::<Vec<_>>()
            });
            match expected {
                Ok(expected) => assert_eq!(tokens.unwrap(), expected, "{id}"),
                Err(code) => assert_eq!(tokens.unwrap_err().code(), code, "{id}"),
            }
        }
    };
    world.run(ask).await;
}

#[tokio::test]
async fn what_is_missing_in_a_request_is_the_callers_fault_and_what_is_missing_here_is_not() {
    let world = World::new();
    let ask = async {
        let mut client = world.client().await;
        let fetch = |audience: &[&str]| {
            let audience = audience.iter().map(|&text| text.into()).collect();
            with_header(
                JwtsvidRequest {
                    audience,
                    ..JwtsvidRequest::default()
                },
                &["true"],
            )
        };
        let validate = |audience: &str, svid: &str| {
            let (audience, svid) = (audience.into(), svid.into());
            with_header(ValidateJwtsvidRequest { audience, svid }, &["true"])
        };
        for audience in [&[][..], &[""], &["x"; 100]] {
            let refused = client.fetch_jwtsvid(fetch(audience)).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{audience:?}");
        }
        for (audience, svid) in [("", "x"), ("x", "")] {
            let refused = client.validate_jwtsvid(validate(audience, svid)).await;
            assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
        }
        let early = client.validate_jwtsvid(validate("x", "y")).await;
        assert_eq!(
            early.unwrap_err().code(),
            Code::Unavailable,
            "no bundle yet"
        );
        world.publish(&[&world.authority]);
        let bad = client.validate_jwtsvid(validate("x", "y")).await;
        assert_eq!(bad.unwrap_err().code(), Code::InvalidArgument);
    };
    world.run(ask).await;
}
