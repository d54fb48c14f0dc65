//! Pods that join with the token of their service account: judged by the API server, by its keys in the
//! join token, and with everything that is refused.

use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::common::{Cluster, Fault, Key, KubeApi, OutputText as _, Sandbox, time};
use crate::join_methods::{Case, resources};

/// The claims of the token of the service account `bots:tbot`, for the cluster of the tests.
fn claims() -> Value {
    json!({
        "iss": "https://kubernetes.default.svc", "sub": "system:serviceaccount:bots:tbot",
        "aud": [Cluster::NAME], "iat": time(-5), "nbf": time(-5), "exp": time(595),
        "kubernetes.io": {
            "namespace": "bots", "node": {"name": "n", "uid": "3"},
            "pod": {"name": "tbot-0", "uid": "1"}, "serviceaccount": {"name": "tbot", "uid": "2"},
        },
    })
}

/// Claims with a change.
fn changed(change: impl FnOnce(&mut Value)) -> Value {
    let mut claims = claims();
    change(&mut claims);
    claims
}

fn by_keys(key: &Key, allow: &str) -> String {
    let keys = key.set();
    format!(
        "{{kubernetes: {{type: static_jwks, static_jwks: {{jwks: '{keys}'}}, allow: [{allow}]}}}}"
    )
}

const RULE: &str = "{service_account: 'bots:tbot'}";

/// The case of the generic tests.
pub(crate) fn kubernetes(sandbox: &Sandbox) -> Case {
    let key = Key::new("k1");
    let path = sandbox.write("sa-token", key.sign(&claims()));
    Case {
        spec: Some(by_keys(&key, RULE)),
        elsewhere: Some(by_keys(&key, "{service_account: 'bots:other'}")),
        onboarding: format!(", kubernetes: {{token_path: {}}}", path.display()),
        attribute: Some(("/kubernetes/service_account/namespace", "bots")),
        ..Case::default()
    }
}

/// An agent that shows this token.
fn agent(sandbox: &Sandbox, cluster: &Cluster<'_>, token: &str, storage: &str) -> Output {
    let path = sandbox.write("sa-token", token);
    let mut command = sandbox.tbot(["start", "identity", "--oneshot"]);
    command
        .env("SSL_CERT_FILE", cluster.web_authority())
        .env("KUBERNETES_TOKEN_PATH", path)
        .args(["--proxy-server", &cluster.proxy()])
        .args([
            "--join-method",
            "kubernetes",
            "--token",
            "example-kubernetes",
        ])
        .args([
            "--storage",
            sandbox.path(storage).to_str().unwrap(),
            "--destination",
        ])
        .arg(sandbox.path("out"));
    command.output().unwrap()
}

#[test]
fn tokens_that_the_keys_do_not_vouch_for_are_refused() {
    let sandbox = Sandbox::new();
    let (key, stranger) = (Key::new("k1"), Key::new("k1"));
    let spec = by_keys(&key, RULE);
    let cluster = Cluster::start(&sandbox, &resources("kubernetes", Some(&spec)));
    for (what, token, text) in [
        ("another key", stranger.sign(&claims()), "id token"),
        (
            "HMAC with the public key",
            key.sign_with_the_public_key(&claims()),
            "HS256",
        ),
        (
            "no signature",
            crate::common::unsigned(&json!({"alg": "none"}), &claims()) + ".",
            "none",
        ),
        (
            "another audience",
            key.sign(&changed(|it| {
                it["aud"] = json!(["https://kubernetes.default.svc"]);
            })),
            "its audience is",
        ),
        (
            "expired",
            key.sign(&changed(|it| it["exp"] = json!(time(-60)))),
            "expired",
        ),
        (
            "not yet",
            key.sign(&changed(|it| {
                it["iat"] = json!(time(60));
                it["nbf"] = json!(time(60));
            })),
            "valid only",
        ),
        (
            "a long life",
            key.sign(&changed(|it| it["exp"] = json!(time(3600)))),
            "TTL",
        ),
        (
            "no pod",
            key.sign(&changed(|it| it["kubernetes.io"]["pod"] = Value::Null)),
            "pod bound",
        ),
        (
            "another account",
            key.sign(&changed(|it| {
                it["sub"] = json!("system:serviceaccount:bots:default");
            })),
            "did not match any allow rules",
        ),
        (
            "a person",
            key.sign(&changed(|it| it["sub"] = json!("admin"))),
            "not a service account",
        ),
        ("no JWT", "opaque".to_owned(), "JWS"),
        ("oversized", "a".repeat(60_000), "JWS"),
    ] {
        let refused = agent(&sandbox, &cluster, &token, "refused");
        let told = refused.text();
        assert_eq!(refused.status.code(), Some(1), "{what}: {told}");
        assert!(told.contains(text), "{what}: {told}");
        assert!(!told.contains(&token), "{what}: the token is shown");
        let audited = cluster.events("bot.join").pop().unwrap();
        assert_eq!(audited["success"], false, "{what}");
        assert!(
            !audited.to_string().contains(&token),
            "{what}: the token is audited"
        );
    }
    agent(&sandbox, &cluster, &key.sign(&claims()), "bot").success();
    let missing = agent(&sandbox, &cluster, "", "bot-2");
    assert!(
        missing.text().contains("KUBERNETES_TOKEN_PATH"),
        "{}",
        missing.text()
    );
}

/// What the API server says of the token of `bots:NAME`.
fn review(name: &str, audience: &str) -> Value {
    json!({
        "audiences": [audience],
        "user": {
            "username": format!("system:serviceaccount:bots:{name}"), "uid": "2",
            "groups": ["system:serviceaccounts", "system:serviceaccounts:bots", "system:authenticated"],
            "extra": {"authentication.kubernetes.io/pod-name": ["tbot-0"]},
        },
    })
}

#[test]
fn an_api_server_judges_the_tokens_of_its_pods() {
    let sandbox = Sandbox::new();
    let api = KubeApi::start(&sandbox);
    let key = Key::new("k1");
    let own = key.sign(&changed(|it| {
        it["aud"] = json!(["https://kubernetes.default.svc"]);
    }));
    let (account, variables) = api.service_account(&sandbox);
    std::fs::write(account.join("token"), &own).unwrap();
    api.state().account = Some(own);
    let spec = format!("{{kubernetes: {{allow: [{RULE}]}}}}");
    let cluster = Cluster::start_in_pod(
        &sandbox,
        &resources("kubernetes", Some(&spec)),
        account,
        &variables,
    );
    // Each is a service account's token by its looks; what it is worth, the API server says.
    let base = claims();
    let token = |name: &str| {
        let mut claims = base.clone();
        claims["jti"] = json!(name);
        key.sign(&claims)
    };
    let legacy = |mut review: Value| {
        review["user"]["extra"] = json!({});
        review
    };
    let person = |mut review: Value| {
        review["user"]["username"] = json!("kubernetes-admin");
        review
    };
    let outsider = |mut review: Value| {
        review["user"]["groups"] = json!(["system:authenticated"]);
        review
    };
    api.state().reviews = [
        ("good", review("tbot", Cluster::NAME)),
        (
            "for-the-api",
            review("tbot", "https://kubernetes.default.svc"),
        ),
        ("for-another", review("tbot", "vault")),
        ("another", review("default", Cluster::NAME)),
        ("legacy", legacy(review("tbot", Cluster::NAME))),
        ("person", person(review("tbot", Cluster::NAME))),
        ("outsider", outsider(review("tbot", Cluster::NAME))),
    ]
    .map(|(name, review)| (token(name), review))
    .into();
    for (name, text) in [
        ("unknown", "kubernetes failed to validate token"),
        ("for-another", "kubernetes failed to validate token"),
        ("another", "did not match any allow rules"),
        (
            "legacy",
            "legacy SA tokens are not accepted as kubernetes version v1.33.0",
        ),
        ("person", "not a service account"),
        (
            "outsider",
            "does not belong to the 'system:serviceaccounts' group",
        ),
    ] {
        let refused = agent(&sandbox, &cluster, &token(name), "refused");
        let told = refused.text();
        assert_eq!(refused.status.code(), Some(1), "{name}: {told}");
        assert!(told.contains(text), "{name}: {told}");
    }
    // What cannot be a service account's token is not sent to anybody.
    let asked = api.state().reviewed.len();
    for nonsense in [
        "opaque",
        &key.sign(&changed(|it| it["sub"] = json!("mona"))),
    ] {
        let refused = agent(&sandbox, &cluster, nonsense, "refused");
        assert_eq!(refused.status.code(), Some(1), "{}", refused.text());
    }
    assert_eq!(api.state().reviewed.len(), asked);
    let near = cluster.events("bot.join");
    let near = near.iter().find_map(|event| event["nearest_rule"].as_str());
    assert!(
        near.is_some_and(|near| near.contains("service_account")),
        "{near:?}"
    );
    for (name, storage) in [("good", "bot"), ("for-the-api", "bot-2")] {
        let token = token(name);
        agent(&sandbox, &cluster, &token, storage).success();
        let asked = api.state().reviewed.pop().unwrap();
        let audiences = json!([Cluster::NAME, "https://kubernetes.default.svc"]);
        assert_eq!(asked, json!({"token": token, "audiences": audiences}));
    }

    // The API server refuses to judge, answers nonsense, or not at all.
    for (fault, text) in [
        (Fault::Answer(403), "it answered 403"),
        (Fault::Answer(500), "it answered 500"),
        (Fault::Nonsense, "kubernetes failed to validate token"),
        (Fault::Hang, "did not answer within 10 s"),
    ] {
        // As often as a run tries.
        let faults = std::iter::repeat_n(("POST", fault.clone()), 3);
        api.state().faults = faults.collect();
        let refused = agent(&sandbox, &cluster, &token("good"), "away");
        api.state().faults.clear();
        let told = refused.text();
        assert_eq!(refused.status.code(), Some(1), "{fault:?}: {told}");
        assert!(told.contains(text), "{fault:?}: {told}");
        assert!(!told.contains("hunter2"), "{told}");
    }
    agent(&sandbox, &cluster, &token("good"), "away").success();
}

/// A pod whose storage is a Secret: it is replaced, its token has been too, and it goes on.
#[test]
fn a_pod_that_is_replaced_goes_on_from_its_secret() {
    let sandbox = Sandbox::new();
    let api = KubeApi::start(&sandbox);
    let key = Key::new("k1");
    let spec = by_keys(&key, RULE);
    let bound = "---\nkind: token\nversion: v2\nmetadata: {name: example-bound_keypair}\nspec: {roles: [Bot], \
                 bot_name: example, join_method: bound_keypair, bound_keypair: {onboarding: \
                 {registration_secret: s3cret}, recovery: {limit: 3}}}\n";
    let resources = resources("kubernetes", Some(&spec)) + bound;
    let cluster = Cluster::start(&sandbox, &resources);
    let kubeconfig = api.kubeconfig(&sandbox, None);
    let pod = |method: &str| -> String {
        let token = sandbox.write("sa-token", key.sign(&claims()));
        let mut command: Command = sandbox.tbot(["start", "identity", "--oneshot"]);
        command
            .env("SSL_CERT_FILE", cluster.web_authority())
            .env("KUBECONFIG", &kubeconfig)
            .env("KUBERNETES_TOKEN_PATH", token)
            .env("TBOT_REGISTRATION_SECRET", "s3cret")
            .args(["--proxy-server", &cluster.proxy(), "--join-method", method])
            .args(["--token", &format!("example-{method}")])
            .args([
                "--storage",
                &format!("kubernetes-secret:///storage-{}", method.replace('_', "-")),
            ])
            .args(["--renewal-interval", "1s", "--certificate-ttl", "10m"])
            .args(["--destination", "kubernetes-secret:///out"]);
        command.output().unwrap().success()
    };
    for method in ["kubernetes", "bound_keypair"] {
        let first = pod(method);
        assert!(!first.contains("Using the stored identity"), "{first}");
        let again = pod(method);
        assert!(again.contains("Using the stored identity"), "{again}");
        let instances: Vec<_> = cluster
            .events("bot.join")
            .into_iter()
            .filter(|event| event["method"] == method)
            .map(|event| event["bot_instance_id"].to_string())
            .collect();
        assert_eq!(instances.len(), 2, "{method}");
        assert_eq!(instances[0], instances[1], "{method}: the same bot");
    }
    let stored = api.data("storage-bound-keypair").unwrap();
    for name in ["id_bkp", "id_bkp.pub", "bkp_state", "bkp_key_history.json"] {
        assert!(stored.contains_key(name), "{name}");
    }
}
