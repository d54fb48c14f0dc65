//! What is refused of ID tokens: token by token for every method, and whatever mood the issuer is in.

use std::fs;

use serde_json::{Value, json};

use super::{GITLAB, JOBS, Job, Make, gitlab, gitlab_claims};
use crate::common::{Cluster, Key, Mood, Sandbox, eventually, time, unsigned};
use crate::join_methods::{Lab, resources};

/// Tokens that are wrong in one thing, and what is said of them.
fn wrong(job: &Job) -> Vec<(&'static str, String, &'static str)> {
    let key = &job.oidc.key;
    let stranger = Key::new("first");
    let none = json!({"alg": "none", "kid": "first"});
    vec![
        (
            "issuer",
            key.sign(&job.but("iss", json!("https://evil.example.org"))),
            "issued by",
        ),
        (
            "audience",
            key.sign(&job.but("aud", json!("other"))),
            "its audience is",
        ),
        ("key", stranger.sign(&job.claims), "not the issuer's"),
        ("kid", Key::new("other").sign(&job.claims), "has no key"),
        (
            "none",
            format!("{}.", unsigned(&none, &job.claims)),
            "\"none\" is not allowed",
        ),
        (
            "HS256",
            key.sign_with_the_public_key(&job.claims),
            "\"HS256\" is not allowed",
        ),
        (
            "expired",
            key.sign(&job.but("exp", json!(time(-20)))),
            "it expired",
        ),
        (
            "not yet",
            key.sign(&job.but("nbf", json!(time(120)))),
            "it is valid only",
        ),
        (
            "from the future",
            key.sign(&job.but("iat", json!(time(120)))),
            "it is valid only",
        ),
        ("no end", key.sign(&job.but("exp", Value::Null)), "\"exp\""),
        (
            "oversized",
            key.sign(&job.but("x", json!("y".repeat(66_000)))),
            "length too large",
        ),
        ("no token", "hunter2".to_owned(), "compact JWS"),
    ]
}

/// The agent of a job that presents what it has from another address: something between has one of
/// its own.
fn from_elsewhere(lab: &Lab<'_>, job: &Job) -> (Option<i32>, String) {
    let proxy = lab.cluster.proxy();
    let (_, port) = proxy.rsplit_once(':').unwrap();
    let elsewhere = relay(port.parse().unwrap());
    let config = format!(
        "version: v2\nproxy_server: localhost:{elsewhere}\nonboarding: {{join_method: {0}, token: example-{0}{1}}}\n\
         storage: {{type: memory}}\noneshot: true\nservices: [{{type: identity, destination: {{type: memory}}}}]\n",
        lab.method, job.case.onboarding,
    );
    let config = lab.sandbox.write("elsewhere.yaml", config);
    let mut command = lab.sandbox.tbot(["start", "-c"]);
    command
        .arg(config)
        .env("SSL_CERT_FILE", lab.sandbox.path("believed.pem"))
        .envs(job.case.agent.iter().cloned());
    let output = command.output().unwrap();
    let log = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&log).into_owned(),
    )
}

/// A port that leads to `port`, from the address 127.0.0.9.
fn relay(port: u16) -> u16 {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            sender.send(listener.local_addr().unwrap().port()).unwrap();
            while let Ok((mut client, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let socket = tokio::net::TcpSocket::new_v4()?;
                    socket.bind("127.0.0.9:0".parse().unwrap())?;
                    let mut server = socket.connect(([127, 0, 0, 1], port).into()).await?;
                    tokio::io::copy_bidirectional(&mut client, &mut server).await
                });
            }
        });
    });
    receiver.recv().unwrap()
}

fn refusals(method: &str, job: Make) {
    let sandbox = Sandbox::new();
    let mut job = job(&sandbox);
    let lab = Lab::start(&sandbox, method, &job.case);
    let nothing = lab.run(&job.case, "nothing");
    let log = String::from_utf8_lossy(&nothing.stderr).into_owned();
    assert_eq!(nothing.status.code(), Some(1), "{method}: {log}");
    let complaint = match method {
        "generic_oidc" => "printenv ended with exit status: 1",
        _ => "is not set: ",
    };
    assert!(log.contains(complaint), "{method}, without a token: {log}");
    for (what, token, complaint) in wrong(&job) {
        let (code, log) = job.run(&lab, &token);
        assert_eq!(code, Some(1), "{method}, {what}: {log}");
        assert!(log.contains(complaint), "{method}, {what}: {log}");
        let audit = fs::read_to_string(sandbox.path("cluster/audit.jsonl")).unwrap();
        let cluster = fs::read_to_string(sandbox.path("cluster.log")).unwrap();
        for text in [&log, &audit, &cluster] {
            assert!(
                !text.contains(&token),
                "{method}, {what}: the token is in {text}"
            );
            assert!(
                !text.contains("hunter2-"),
                "{method}, {what}: a secret is in {text}"
            );
        }
    }
    // Nothing of that spoiled the way for the right one, which is good here alone.
    let good = job.oidc.key.sign(&job.claims);
    for _ in 0..2 {
        let (code, log) = job.run(&lab, &good);
        assert_eq!(code, Some(0), "{method}: {log}");
    }
    let (code, log) = from_elsewhere(&lab, &job);
    assert_eq!(code, Some(1), "{method}, replayed: {log}");
    assert!(
        log.contains("used before from another address"),
        "{method}, replayed: {log}"
    );
    let last = lab.last_join();
    assert_eq!(last["success"], false, "{method}: {last}");
    assert_eq!(last["addr.remote"], "127.0.0.9", "{method}: {last}");
    assert_eq!(
        job.run(&lab, &good).0,
        Some(0),
        "{method}: whose it is can go on using it"
    );
}

#[test]
fn every_method_refuses_what_is_wrong_in_one_thing_and_never_shows_a_token() {
    for some in JOBS.chunks(3) {
        std::thread::scope(|scope| {
            for (method, job) in some {
                scope.spawn(move || refusals(method, *job));
            }
        });
    }
}

#[test]
fn the_audit_log_says_which_rule_came_how_close() {
    let sandbox = Sandbox::new();
    let mut job = gitlab(&sandbox);
    let lab = Lab::start(&sandbox, "gitlab", &job.case);
    let token = job.oidc.key.sign(&job.but("ref", json!("main")));
    let (code, log) = job.run(&lab, &token);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("the nearest rule differs in ref"), "{log}");
    assert!(
        !log.contains("feature-*"),
        "what a rule wants is none of a stranger's business: {log}"
    );
    let last = lab.last_join();
    assert_eq!(
        last["nearest_rule"],
        "rule 1 of 1 comes closest: project_path, ref_protected, user_login match, ref is \"main\", \
         not \"feature-*\"",
    );
    assert_eq!(
        last["attributes"]["project_path"], "my-group/my-project",
        "{last}"
    );
}

fn in_a_mood(mood: Mood, complaint: &str) {
    let sandbox = Sandbox::new();
    let mut job = gitlab(&sandbox);
    let lab = Lab::start(&sandbox, "gitlab", &job.case);
    job.oidc.set(mood);
    let token = job.oidc.key.sign(&job.claims);
    let (code, log) = job.run(&lab, &token);
    assert_eq!(code, Some(1), "{mood:?}: {log}");
    assert!(log.contains(complaint), "{mood:?}: {log}");
    assert!(!log.contains(&token), "{mood:?}: {log}");
}

#[test]
fn an_issuer_in_any_mood_lets_nobody_in_who_it_did_not_vouch_for() {
    std::thread::scope(|scope| {
        for (mood, complaint) in [
            (Mood::Broken, "answered 500"),
            (Mood::Huge, "more than 262144 bytes"),
            (Mood::Redirecting, "redirects are not followed"),
            (Mood::Impostor, "is for the issuer"),
            (Mood::Silent, "did not answer within 10 s"),
        ] {
            scope.spawn(move || in_a_mood(mood, complaint));
        }
    });
}

#[test]
fn an_issuer_that_cannot_be_reached_is_named() {
    let sandbox = Sandbox::new();
    let mut job = gitlab(&sandbox);
    let nowhere = "{gitlab: {domain: 'nowhere.example.org:1', allow: [{sub: '*'}]}}";
    job.case.spec = Some(nowhere.to_owned());
    let lab = Lab::start(&sandbox, "gitlab", &job.case);
    let issuer = json!("https://nowhere.example.org:1");
    let token = job.oidc.key.sign(&job.but("iss", issuer));
    let (code, log) = job.run(&lab, &token);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("cannot reach nowhere.example.org:1"), "{log}");
}

#[test]
fn keys_rotate_and_known_ones_outlive_an_outage() {
    let sandbox = Sandbox::new();
    let mut job = gitlab(&sandbox);
    let lab = Lab::start(&sandbox, "gitlab", &job.case);
    let first = job.oidc.key.sign(&job.claims);
    assert_eq!(job.run(&lab, &first).0, Some(0));
    assert_eq!(job.oidc.asked(), 2);
    // Nobody has to be asked for a key that is known.
    job.oidc.set(Mood::Broken);
    let again = job.oidc.key.sign(&job.claims);
    assert_eq!(job.run(&lab, &again).0, Some(0));
    assert_eq!(job.oidc.asked(), 0);
    job.oidc.set(Mood::Well);
    job.oidc.rotate();
    let rotated = job.oidc.key.sign(&job.claims);
    // It may be too soon to ask again: within ten seconds it is not.
    eventually("the new key is found", || {
        let (code, log) = job.run(&lab, &rotated);
        if code == Some(0) { Ok(()) } else { Err(log) }
    });
}

#[test]
fn keys_that_are_given_need_no_issuer_but_all_else_counts() {
    let sandbox = Sandbox::new();
    let mut job = gitlab(&sandbox);
    let spec = |domain: &str| {
        format!(
            "{{gitlab: {{{domain}static_jwks: '{}', allow: [{{sub: 'project_path:my-group/*'}}]}}}}",
            job.oidc.key_set()
        )
    };
    let (open, named) = (spec(""), spec("domain: other.example.org, "));
    job.case.spec = Some(open);
    let lab = Lab::start(&sandbox, "gitlab", &job.case);
    job.oidc.set(Mood::Broken);
    let good = job.oidc.key.sign(&job.claims);
    let (code, log) = job.run(&lab, &good);
    assert_eq!(code, Some(0), "{log}");
    for (token, complaint) in [
        (
            job.oidc.key.sign(&gitlab_claims(GITLAB, "other")),
            "its audience is",
        ),
        (Key::new("first").sign(&job.claims), "not the issuer's"),
    ] {
        let (code, log) = job.run(&lab, &token);
        assert_eq!(code, Some(1), "{log}");
        assert!(
            log.contains("validating with jwks") && log.contains(complaint),
            "{log}"
        );
    }
    assert_eq!(job.oidc.asked(), 0);
    lab.cluster.create(&resources("gitlab", Some(&named)));
    let (code, log) = job.run(&lab, &good);
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("issued by"), "{log}");
}

/// Token resources, and what is said of them.
const WRONG: &[(&str, &str, &str)] = &[
    ("github", "{}", "`github` is required"),
    ("github", "{github: {}}", "must have at least one rule"),
    (
        "github",
        "{github: {allow: [{ref: x}]}}",
        "`repository`, `repository_owner` or `sub`",
    ),
    (
        "github",
        "{github: {allow: [{repositry: x, sub: y}]}}",
        "did you mean",
    ),
    (
        "github",
        "{github: {enterprise_server_host: 'https://x', allow: [{sub: y}]}}",
        "is no host",
    ),
    (
        "github",
        "{github: {enterprise_server_host: x, enterprise_slug: y, allow: [{sub: y}]}}",
        "together with",
    ),
    (
        "github",
        "{github: {static_jwks: '{}', allow: [{sub: y}]}}",
        "no JSON Web Key Set",
    ),
    (
        "gitlab",
        "{gitlab: {allow: [{ref: main}]}}",
        "a rule needs `sub`",
    ),
    (
        "gitlab",
        "{gitlab: {domain: a/b, allow: [{sub: x}]}}",
        "is no host",
    ),
    (
        "gitlab",
        "{gitlab: {allow: [{sub: x, ref_protected: 'true'}]}}",
        "`true` or `false`",
    ),
    (
        "circleci",
        "{circleci: {allow: [{project_id: x}]}}",
        "`organization_id` is required",
    ),
    (
        "circleci",
        "{circleci: {organization_id: x, allow: [{}]}}",
        "`project_id` or `context_id`",
    ),
    (
        "bitbucket",
        "{bitbucket: {allow: [{workspace_uuid: x}]}}",
        "`audience` is required",
    ),
    (
        "bitbucket",
        "{bitbucket: {audience: x, identity_provider_url: 'http://x', allow: [{workspace_uuid: x}]}}",
        "is no URL",
    ),
    (
        "bitbucket",
        "{bitbucket: {audience: x, identity_provider_url: 'https://x', allow: [{branch_name: x}]}}",
        "`workspace_uuid` or `repository_uuid`",
    ),
    (
        "spacelift",
        "{spacelift: {allow: [{space_id: x}]}}",
        "`hostname` is required",
    ),
    (
        "spacelift",
        "{spacelift: {hostname: x, allow: [{scope: write}]}}",
        "`space_id` or `caller_id`",
    ),
    (
        "terraform_cloud",
        "{terraform_cloud: {allow: [{workspace_name: x}]}}",
        "`organization_id` or `organization_name`",
    ),
    (
        "terraform_cloud",
        "{terraform_cloud: {allow: [{organization_name: x}]}}",
        "a rule needs `project_id`",
    ),
    (
        "azure_devops",
        "{azure_devops: {allow: [{sub: x}]}}",
        "`organization_id` is required",
    ),
    (
        "azure_devops",
        "{azure_devops: {organization_id: x, allow: [{pipeline_name: x}]}}",
        "`project_name` or `project_id`",
    ),
    (
        "github",
        "{github: {enterprise_slug: a/b, allow: [{sub: y}]}}",
        "without slashes",
    ),
    (
        "generic_oidc",
        "{generic_oidc: {issuer: 'https://x', audience: y}}",
        "has to compare a claim",
    ),
    (
        "generic_oidc",
        "{generic_oidc: {issuer: 'https://x', audience: y, must_match_fields: {a: null}}}",
        "has to compare a claim",
    ),
    (
        "generic_oidc",
        "{generic_oidc: {issuer: 'https://x', audience: y, must_match_fields: {a: [b]}}}",
        "without lists",
    ),
    (
        "generic_oidc",
        "{generic_oidc: {issuer: 'http://x', audience: y, must_match_fields: {a: b}}}",
        "is no URL",
    ),
    (
        "generic_oidc",
        "{generic_oidc: {issuer: 'https://x', must_match_fields: {a: b}}}",
        "`audience` is required",
    ),
    (
        "generic_oidc",
        "{generic_oidc: {issuer: 'https://x', audience: y, tls_ca: z, must_match_fields: {a: b}}}",
        "certificates in PEM",
    ),
    (
        "generic_oidc",
        "{generic_oidc: {issuer: 'https://x', audience: y, allow_any: [{}]}}",
        "`conditions` or `expression`",
    ),
    (
        "generic_oidc",
        "{generic_oidc: {issuer: 'https://x', audience: y, allow_any: [{expression: 'user.name'}]}}",
        "unknown attribute",
    ),
    (
        "generic_oidc",
        "{generic_oidc: {issuer: 'https://x', audience: y, allow_any: [{conditions: [{attribute: a}]}]}}",
        "exactly one of",
    ),
    (
        "env0",
        "{env0: {allow: [{project_id: x}]}}",
        "a rule needs `organization_id`",
    ),
];

#[test]
fn token_resources_are_checked_as_a_cluster_does() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &resources("gitlab", None));
    for (method, spec, complaint) in WRONG {
        let path = sandbox.write("wrong.yaml", resources(method, Some(spec)));
        let mut command = sandbox.tbot(["cluster", "--data-dir"]);
        command
            .arg(sandbox.path("cluster"))
            .args(["create", "-f"])
            .arg(path);
        let output = command.output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{method} {spec}");
        assert!(told.contains(complaint), "{method} {spec}: {told}");
    }
    drop(cluster);
}
