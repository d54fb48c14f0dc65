use std::time::UNIX_EPOCH;

use tonic::Code;

use super::*;
use crate::clock::Clock;
use crate::crypto::x509::Certificate;
use crate::crypto::{KeyAlgorithm, PrivateKey, Suite};
use crate::embedded::audit::Audit;
use crate::embedded::ca::Authorities;
use crate::embedded::caller::Listener;
use crate::embedded::resources::Mode;
use crate::embedded::store::Store;

const RESOURCES: &str = r#"
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [issuer]}
---
kind: role
version: v7
metadata: {name: issuer}
spec:
  allow:
    workload_identity_labels: {env: [dev, "prod-*"]}
    rules: [{resources: [workload_identity], verbs: [read, list]}]
  deny:
    workload_identity_labels: {secret: '*'}
---
kind: role
version: v7
metadata: {name: reader}
spec:
  allow:
    workload_identity_labels: {'*': '*'}
    rules: [{resources: [workload_identity], verbs: [read]}]
---
kind: workload_identity
version: v1
metadata: {name: a-static, labels: {env: dev, team: x}}
spec:
  spiffe:
    id: /svc/foo
    hint: h
    x509: {maximum_ttl: 600s, dns_sans: [foo.local]}
---
kind: workload_identity
version: v1
metadata: {name: b-unit, labels: {env: prod-1}}
spec:
  spiffe: {id: "/svc/{{workload.systemd.service}}"}
---
kind: workload_identity
version: v1
metadata: {name: c-hidden, labels: {env: dev, secret: "1"}}
spec:
  spiffe: {id: /hidden}
---
kind: workload_identity
version: v1
metadata: {name: d-other, labels: {env: test}}
spec:
  spiffe: {id: /other}
---
kind: workload_identity
version: v1
metadata: {name: e-root, labels: {env: dev, team: y}}
spec:
  rules: {allow: [{conditions: [{attribute: workload.unix.uid, eq: {value: "0"}},
                                {attribute: workload.unix.attested, eq: {value: "true"}}]}]}
  spiffe: {id: /root}
"#;

pub(in crate::embedded) fn state() -> Arc<ClusterState> {
    let now = UNIX_EPOCH + Duration::from_secs(1_795_000_000);
    let clock = Clock::simulated(now);
    let store = Store::in_memory(clock.clone()).unwrap();
    let authorities = Authorities::open(&store, "c.example", Suite::BalancedV1, now).unwrap();
    let state = ClusterState {
        name: "c.example".into(),
        public_addr: "c.example:443".into(),
        audit: Audit::in_memory(clock.clone(), "c.example"),
        clock,
        store,
        authorities,
        sts_endpoint: None,
        env: crate::env::Env::default(),
    };
    let files = [("resources.yaml".to_owned(), RESOURCES.to_owned())];
    state.create(&files, Mode::Create, "test").unwrap();
    Arc::new(state)
}

/// A request of `caller`.
pub(in crate::embedded) fn with<T>(caller: &Caller, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.extensions_mut().insert(caller.clone());
    request
}

pub(in crate::embedded) fn caller_with(state: &ClusterState, roles: &[&str]) -> Caller {
    Caller {
        addr: "127.0.0.1:1234".parse().unwrap(),
        listener: Listener::Auth,
        identity: Some(TlsIdentity {
            user: "bot-example".into(),
            roles: roles.iter().map(|role| (*role).to_owned()).collect(),
            logins: vec![],
            cluster: "c.example".into(),
            traits: BTreeMap::new(),
            renewable: false,
            generation: 0,
            bot_name: "example".into(),
            bot_instance_id: "i".into(),
            disallow_reissue: true,
            impersonator: "bot-example".into(),
            join_attributes: json!({"iam": {"account": "1"}}),
            join_attributes_text: String::new(),
            client_ip: String::new(),
            expires: state.clock.now() + Duration::from_hours(1),
        }),
    }
}

fn spki() -> Vec<u8> {
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
    key.public_spki()
}

fn x509_request(name: &str) -> wire::IssueWorkloadIdentityRequest {
    use issue_workload_identity_request::Credential;
    wire::IssueWorkloadIdentityRequest {
        name: name.into(),
        credential: Some(Credential::X509SvidParams(wire::X509svidParams {
            public_key: spki(),
            use_issuer_overrides: true,
        })),
        ..Default::default()
    }
}

fn jwt_request(name: &str, audiences: &[&str]) -> wire::IssueWorkloadIdentityRequest {
    use issue_workload_identity_request::Credential;
    wire::IssueWorkloadIdentityRequest {
        name: name.into(),
        credential: Some(Credential::JwtSvidParams(wire::JwtsvidParams {
            audiences: audiences.iter().map(|text| (*text).to_owned()).collect(),
        })),
        ..Default::default()
    }
}

fn labels_request(selectors: &[(&str, &[&str])]) -> wire::IssueWorkloadIdentitiesRequest {
    use issue_workload_identities_request::Credential;
    let selectors = selectors.iter().map(|(key, values)| wire::LabelSelector {
        key: (*key).to_owned(),
        values: values.iter().map(|value| (*value).to_owned()).collect(),
    });
    wire::IssueWorkloadIdentitiesRequest {
        label_selectors: selectors.collect(),
        credential: Some(Credential::X509SvidParams(wire::X509svidParams {
            public_key: spki(),
            use_issuer_overrides: true,
        })),
        ..Default::default()
    }
}

#[tokio::test(start_paused = true)]
async fn an_svid_by_name_is_issued_and_recorded() {
    let state = state();
    let caller = caller_with(&state, &["issuer"]);
    let answer = by_name(&state, &caller, x509_request("a-static")).unwrap();
    let got = answer.credential.unwrap();
    assert_eq!(got.spiffe_id, "spiffe://c.example/svc/foo");
    assert_eq!(got.hint, "h");
    assert_eq!(got.ttl.unwrap().seconds, 600, "the resource's limit");
    assert_eq!(got.workload_identity_name, "a-static");
    assert!(!got.workload_identity_revision.is_empty());
    let Some(credential::Credential::X509Svid(svid)) = got.credential else {
        panic!("no X.509-SVID");
    };
    let certificate = Certificate::from_der(&svid.cert).unwrap();
    assert_eq!(certificate.uri_sans(), ["spiffe://c.example/svc/foo"]);
    let expires = SystemTime::try_from(got.expires_at.unwrap()).unwrap();
    assert_eq!(
        certificate.not_after(),
        UNIX_EPOCH + Duration::from_secs(1_795_000_600)
    );
    assert!(expires.duration_since(certificate.not_after()).unwrap() < Duration::from_secs(1));
    let event = state.audit.events().pop().unwrap();
    for (key, value) in [
        ("event", json!("spiffe.svid.issued")),
        ("code", json!("TSPIFFE000I")),
        ("svid_type", json!("x509")),
        ("serial_number", json!(svid.serial_number)),
        ("dns_sans", json!(["foo.local"])),
        ("ip_sans", json!(null)),
        ("workload_identity", json!("a-static")),
        ("addr.remote", json!("127.0.0.1:1234")),
        ("user_kind", json!(2)),
        ("impersonator", json!("bot-example")),
    ] {
        assert_eq!(event[key], value, "{key}");
    }
    assert!(event.get("jti").is_none());
    assert_eq!(event["attributes"]["join"]["iam"]["account"], "1");
    let labels = &event["attributes"]["user"]["labels"];
    assert_eq!(labels["teleport.internal/bot"], "example");
}

#[tokio::test(start_paused = true)]
async fn a_jwt_svid_names_the_clusters_issuer() {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    let state = state();
    let caller = caller_with(&state, &["issuer"]);
    let answer = by_name(&state, &caller, jwt_request("a-static", &["x"])).unwrap();
    let Some(credential::Credential::JwtSvid(svid)) = answer.credential.unwrap().credential else {
        panic!("no JWT-SVID");
    };
    let claims = svid.jwt.split('.').nth(1).unwrap();
    let claims: Value = serde_json::from_slice(&URL_SAFE_NO_PAD.decode(claims).unwrap()).unwrap();
    assert_eq!(claims["iss"], "https://c.example/workload-identity");
    let event = state.audit.events().pop().unwrap();
    assert_eq!(
        (&event["jti"], &event["dns_sans"]),
        (&json!(svid.jti), &json!(null))
    );
}

#[tokio::test(start_paused = true)]
async fn refusals_in_order() {
    let state = state();
    let caller = caller_with(&state, &["issuer"]);
    let nobody = caller_with(&state, &["gone"]);
    let bare = wire::IssueWorkloadIdentityRequest {
        name: "a-static".into(),
        ..Default::default()
    };
    let mut strange = x509_request("a-static");
    strange.credential = jwt_request("", &[]).credential;
    let mut negative = x509_request("a-static");
    negative.requested_ttl = Some(prost_types::Duration {
        seconds: -1,
        nanos: 0,
    });
    for (what, caller, request, code) in [
        ("no name", &nobody, x509_request(""), Code::InvalidArgument),
        ("no credential", &nobody, bare, Code::InvalidArgument),
        (
            "no right",
            &nobody,
            x509_request("none"),
            Code::PermissionDenied,
        ),
        ("no resource", &caller, x509_request("none"), Code::NotFound),
        (
            "denied",
            &caller,
            x509_request("c-hidden"),
            Code::PermissionDenied,
        ),
        (
            "not allowed",
            &caller,
            x509_request("d-other"),
            Code::PermissionDenied,
        ),
        ("template", &caller, x509_request("b-unit"), Code::Unknown),
        (
            "rules",
            &caller,
            x509_request("e-root"),
            Code::PermissionDenied,
        ),
        ("audiences", &caller, strange, Code::InvalidArgument),
        ("ttl", &caller, negative, Code::InvalidArgument),
    ] {
        let status = by_name(&state, caller, request).unwrap_err();
        assert_eq!(status.code(), code, "{what}: {status}");
    }
    let issued = |event: &Value| event["event"] == "spiffe.svid.issued";
    assert!(
        !state.audit.events().iter().any(issued),
        "refusals are not recorded"
    );
    let mut anonymous = caller;
    anonymous.identity = None;
    let status = by_name(&state, &anonymous, x509_request("a-static")).unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
}

#[tokio::test(start_paused = true)]
async fn labels_select_what_may_be_had() {
    let state = state();
    let caller = caller_with(&state, &["issuer"]);
    let ids = |request| -> Vec<String> {
        let answer = by_labels(&state, &caller, request).unwrap();
        let credentials = answer.credentials.into_iter();
        credentials.map(|one| one.spiffe_id).collect()
    };
    let foo = "spiffe://c.example/svc/foo";
    assert_eq!(ids(labels_request(&[("*", &["*"])])), [foo]);
    assert_eq!(
        ids(labels_request(&[("env", &["dev"]), ("team", &["x", "z"])])),
        [foo]
    );
    assert!(ids(labels_request(&[("env", &["dev"]), ("team", &["z"])])).is_empty());
    let mut attested = labels_request(&[("*", &["*"])]);
    attested.workload_attrs = Some(wire::WorkloadAttrs {
        unix: Some(wire::WorkloadAttrsUnix {
            attested: true,
            ..Default::default()
        }),
        systemd: Some(wire::WorkloadAttrsSystemd {
            attested: true,
            service: "web".into(),
        }),
        ..Default::default()
    });
    let unit = "spiffe://c.example/svc/web";
    assert_eq!(ids(attested), [foo, unit, "spiffe://c.example/root"]);

    let reader = caller_with(&state, &["reader"]);
    let status = by_labels(&state, &reader, labels_request(&[("*", &["*"])])).unwrap_err();
    assert_eq!(
        status.code(),
        Code::PermissionDenied,
        "listing is a right of its own"
    );
    let status = by_labels(&state, &caller, labels_request(&[])).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn ten_at_a_time() {
    let state = state();
    let caller = caller_with(&state, &["issuer"]);
    let make = |number: usize| {
        let text = format!(
            "kind: workload_identity\nversion: v1\n\
             metadata: {{name: n{number}, labels: {{env: dev, many: y}}}}\n\
             spec: {{spiffe: {{id: /n/{number}}}}}\n"
        );
        let files = [("n.yaml".to_owned(), text)];
        state.create(&files, Mode::Create, "test").unwrap();
    };
    (0..MAX_BY_LABELS).for_each(make);
    let request = || labels_request(&[("many", &["y"])]);
    let answer = by_labels(&state, &caller, request()).unwrap();
    assert_eq!(answer.credentials.len(), MAX_BY_LABELS);
    make(MAX_BY_LABELS);
    let status = by_labels(&state, &caller, request()).unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
}
