use std::time::{Duration, SystemTime};

use serde_json::json;

use super::*;
use crate::clock::Clock;
use crate::embedded::audit::Audit;
use crate::embedded::store::{Store, StoreError};

const BOT: &str = "\
kind: bot
version: v1
metadata:
  # name is a unique identifier for the Bot in the cluster.
  name: example
spec:
  # roles is a list of roles to grant to the Bot.
  roles: []
";

const TOKEN: &str = "\
kind: token
version: v2
metadata:
  # name will be specified in the `tbot` to use this token
  name: example-bot
spec:
  roles: [Bot]
  bot_name: example
  join_method: iam
  allow:
    - aws_account: \"111111111111\"
      aws_arn: \"arn:aws:sts::111111111111:assumed-role/teleport-bot-role/i-*\"
";

const IDENTITY: &str = "\
kind: workload_identity
version: v1
metadata:
  name: example-workload-identity
  labels:
    example: getting-started
spec:
  spiffe:
    id: /svc/foo
";

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn cluster() -> (Store, Audit) {
    let clock = Clock::simulated(now());
    let store = Store::in_memory(clock.clone()).unwrap();
    (store, Audit::in_memory(clock, "c"))
}

fn put(store: &Store, audit: &Audit, text: &str, mode: Mode) -> Result<Vec<Applied>, ApplyError> {
    apply(
        store,
        audit,
        parse("f", text, None).unwrap(),
        mode,
        "admin",
        now(),
    )
}

#[tokio::test(start_paused = true)]
async fn the_files_of_the_guide_become_what_a_cluster_shows() {
    let (store, audit) = cluster();
    let text = format!("{BOT}---\n{TOKEN}---\n{IDENTITY}---\n");
    let applied = put(&store, &audit, &text, Mode::Create).unwrap();
    let lines: Vec<&str> = applied.iter().map(|one| one.message.as_str()).collect();
    assert_eq!(
        lines,
        [
            "bot \"example\" has been created",
            "provision_token \"example-bot\" has been created",
            "Workload identity \"example-workload-identity\" has been created",
        ]
    );
    // The guide's bot lists no roles, which is worth a word; the rest is not.
    assert!(applied[0].notes[0].contains("wildcard-workload-identity-issuer"));
    assert!(
        applied[1..].iter().all(|one| one.notes.is_empty()),
        "{applied:?}"
    );
    let role = store.get("role", "bot-example").unwrap().unwrap();
    assert_eq!(
        role.spec["allow"]["impersonate"]["roles"],
        json!(["wildcard-workload-identity-issuer"])
    );
    let seen = |kind: &str, name: &str| {
        let mut view = view(&store.get(kind, name).unwrap().unwrap());
        view["metadata"].as_object_mut().unwrap().remove("revision");
        view
    };
    assert_eq!(
        seen("bot", "example"),
        json!({
            "kind": "bot", "metadata": {"name": "example"}, "version": "v1",
            "spec": {"max_session_ttl": {"seconds": 43200}, "roles": []},
            "status": {"role_name": "bot-example", "user_name": "bot-example"},
        })
    );
    assert_eq!(
        seen("token", "example-bot"),
        json!({
            "kind": "token", "metadata": {"name": "example-bot"}, "version": "v2",
            "spec": {
                "allow": [{
                    "aws_account": "111111111111",
                    "aws_arn": "arn:aws:sts::111111111111:assumed-role/teleport-bot-role/i-*",
                }],
                "bot_name": "example", "join_method": "iam", "roles": ["Bot"],
            },
        })
    );
    assert_eq!(
        seen("workload_identity", "example-workload-identity"),
        json!({
            "kind": "workload_identity", "version": "v1",
            "metadata": {
                "name": "example-workload-identity",
                "labels": {"example": "getting-started"},
            },
            "spec": {"spiffe": {"id": "/svc/foo"}},
        })
    );
    let role = seen("role", "bot-example");
    assert_eq!(role["spec"]["options"]["max_session_ttl"], "12h0m0s");
    assert_eq!(
        role["metadata"]["description"],
        "Automatically generated role for bot example"
    );
    let user = seen("user", "bot-example");
    assert_eq!(user["spec"]["roles"], json!(["bot-example"]));
    assert_eq!(
        user["metadata"]["labels"]["teleport.internal/bot-generation"],
        "0"
    );
    let codes: Vec<Value> = audit.events().iter().map(|e| e["code"].clone()).collect();
    assert_eq!(codes, ["TB001I", "TJT00I", "WID001I"]);
}

#[tokio::test(start_paused = true)]
async fn creating_twice_is_refused_and_changes_nothing() {
    let (store, audit) = cluster();
    put(&store, &audit, BOT, Mode::Create).unwrap();
    let text = format!("{IDENTITY}---\n{BOT}");
    let error = put(&store, &audit, &text, Mode::Create).unwrap_err();
    assert_eq!(
        error.to_string(),
        "bot \"example\" already exists (use -f to replace it)"
    );
    assert!(store.list("workload_identity").unwrap().is_empty());
    assert_eq!(audit.events().len(), 1);
    // Tokens are replaced in any case, as `tctl` does.
    put(&store, &audit, TOKEN, Mode::Create).unwrap();
    put(&store, &audit, TOKEN, Mode::Create).unwrap();
}

#[tokio::test(start_paused = true)]
async fn replacing_a_bot_keeps_its_generation() {
    let (store, audit) = cluster();
    put(&store, &audit, BOT, Mode::Create).unwrap();
    let mut user = store.get("user", "bot-example").unwrap().unwrap();
    let label = "teleport.internal/bot-generation";
    user.labels.insert(label.to_owned(), "7".to_owned());
    store
        .put(user, &crate::embedded::store::Put::Upsert)
        .unwrap();
    let more = BOT.replace(
        "roles: []",
        "roles: [editor]\n  traits: [{name: a, values: [b]}]",
    );
    let applied = put(&store, &audit, &more, Mode::Force).unwrap();
    assert!(
        applied[0].notes[0].contains("no role \"editor\""),
        "{applied:?}"
    );
    let user = store.get("user", "bot-example").unwrap().unwrap();
    assert_eq!(user.labels[label], "7");
    assert_eq!(user.spec["traits"], json!({"a": ["b"]}));
    let role = store.get("role", "bot-example").unwrap().unwrap();
    assert_eq!(
        role.spec["allow"]["impersonate"]["roles"],
        json!(["editor"])
    );
    assert_eq!(audit.events()[1]["event"], "bot.update");
}

#[tokio::test(start_paused = true)]
async fn what_is_the_same_is_left_alone_at_the_next_start() {
    let (store, audit) = cluster();
    let text = format!("{BOT}---\n{TOKEN}");
    put(&store, &audit, &text, Mode::Ensure).unwrap();
    let before = store.get("token", "example-bot").unwrap().unwrap();
    let applied = put(&store, &audit, &text, Mode::Ensure).unwrap();
    assert_eq!(applied[0].message, "bot \"example\" is unchanged");
    assert_eq!(store.get("token", "example-bot").unwrap().unwrap(), before);
    assert_eq!(audit.events().len(), 2);
    let other = text.replace("i-*", "i-1");
    put(&store, &audit, &other, Mode::Ensure).unwrap();
    assert_ne!(store.get("token", "example-bot").unwrap().unwrap(), before);
}

#[tokio::test(start_paused = true)]
async fn what_has_expired_is_passed_over_at_the_next_start() {
    let (store, audit) = cluster();
    let token = TOKEN.replace(
        "name: example-bot",
        "name: example-bot\n  expires: 2020-01-01T00:00:00Z",
    );
    let lock = "kind: lock\nversion: v2\nmetadata: {name: l}\n\
        spec: {target: {user: x}, expires: '2020-01-01T00:00:00Z'}\n";
    let text = format!("{token}---\n{lock}---\n{BOT}");
    let applied = put(&store, &audit, &text, Mode::Ensure).unwrap();
    assert_eq!(applied[0].message, "token \"example-bot\" is passed over");
    assert!(applied[0].notes[0].contains("has expired (2020-01-01T00:00:00Z)"));
    assert_eq!(applied[1].message, "lock \"l\" is passed over");
    assert!(store.get("token", "example-bot").unwrap().is_none());
    assert!(store.get("bot", "example").unwrap().is_some());
    for old in [&token, lock] {
        let error = parse("f", old, Some(now())).unwrap_err().to_string();
        assert!(
            error.contains("2020-01-01T00:00:00Z is in the past"),
            "{error}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_lock_keeps_its_birthday_over_starts() {
    let (store, audit) = cluster();
    let lock = "kind: lock\nversion: v2\nmetadata: {name: l}\nspec: {target: {user: x}}\n";
    let mut seen = Vec::new();
    for hours in 0..2 {
        let later = now() + Duration::from_hours(hours);
        let parsed = parse("f", lock, None).unwrap();
        apply(&store, &audit, parsed, Mode::Ensure, "system", later).unwrap();
        seen.push(store.get("lock", "l").unwrap().unwrap());
    }
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].spec["created_at"], "2027-01-15T08:00:00Z");
    assert_eq!(seen[0].spec["created_by"], "system");
    assert_eq!(audit.events().len(), 1);
}

#[test]
fn what_a_role_denies_is_spelt_right() {
    let role = |spec: &str| {
        let text = format!("kind: role\nversion: v7\nmetadata: {{name: r}}\nspec: {spec}\n");
        parse("f", &text, Some(now())).map(drop)
    };
    for (spec, part) in [
        (
            "{deny: {workload_identity_label: {env: prod}}}",
            "did you mean `workload_identity_labels`?",
        ),
        (
            "{deny: {impersonat: {roles: [x]}}}",
            "did you mean `impersonate`?",
        ),
        ("{deny: {rule: []}}", "unknown key"),
        ("{denny: {}}", "unknown key"),
        (
            "{options: {max_sesion_ttl: 1h}}",
            "did you mean `max_session_ttl`?",
        ),
        (
            "{deny: {workload_identity_labels: {env: '^(x$'}}}",
            "is no pattern",
        ),
        (
            "{deny: {workload_identity_labels: {env: ['{{external.env}}']}}}",
            "is no pattern",
        ),
        ("{deny: {impersonate: {roles: ['^(x$']}}}", "is no pattern"),
        (
            "{deny: {rules: [{resources: [a], verbs: [b], were: c}]}}",
            "unknown key",
        ),
    ] {
        let error = role(spec).unwrap_err().to_string();
        assert!(error.contains(part), "{spec}: {error}");
    }
    let whole = "{options: {lock: strict}, allow: {logins: [a], node_labels: {'*': '*'}},
      deny: {logins: [b], workload_identity_labels: {env: ['^p.*$', 'x-*']}}}";
    role(whole).unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_bot_takes_its_parts_along() {
    let (store, audit) = cluster();
    put(&store, &audit, BOT, Mode::Create).unwrap();
    for (bot, name) in [("example", "one"), ("other", "two")] {
        let instance = Resource {
            kind: "bot_instance".to_owned(),
            name: name.to_owned(),
            spec: json!({"bot_name": bot}),
            ..Resource::default()
        };
        store
            .put(instance, &crate::embedded::store::Put::Create)
            .unwrap();
    }
    for kind in ["user", "role"] {
        let error = remove(&store, &audit, kind, "bot-example", "admin").unwrap_err();
        assert!(matches!(error, ApplyError::Owned { .. }), "{error}");
    }
    let role = "kind: role\nversion: v7\nmetadata: {name: bot-example}\nspec: {}\n";
    assert!(put(&store, &audit, role, Mode::Force).is_err());
    let line = remove(&store, &audit, "bot", "example", "admin").unwrap();
    assert_eq!(line, "bot \"example\" has been deleted");
    assert!(store.list("user").unwrap().is_empty());
    assert!(store.list("role").unwrap().is_empty());
    assert_eq!(store.list("bot_instance").unwrap().len(), 1);
    assert!(matches!(
        remove(&store, &audit, "bot", "example", "admin"),
        Err(ApplyError::Store(StoreError::NotFound { .. }))
    ));
    assert_eq!(audit.events().last().unwrap()["code"], "TB003I");
}

#[tokio::test(start_paused = true)]
async fn a_bot_does_not_take_over_somebody_elses_role() {
    let (store, audit) = cluster();
    let role = "kind: role\nversion: v7\nmetadata: {name: bot-example}\nspec: {}\n";
    put(&store, &audit, role, Mode::Create).unwrap();
    assert!(put(&store, &audit, BOT, Mode::Force).is_err());
    assert!(store.list("bot").unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn secrets_stay_out_of_the_audit_log() {
    let (store, audit) = cluster();
    let token = "\
kind: token
version: v2
metadata: {name: 0123456789abcdef, expires: '2030-01-01T00:00:00Z'}
spec: {roles: [Bot], bot_name: example}
";
    let applied = put(&store, &audit, token, Mode::Create).unwrap();
    assert!(applied[0].notes[0].contains("no bot \"example\""));
    remove(&store, &audit, "token", "0123456789abcdef", "admin").unwrap();
    let text = format!("{:?}", audit.events());
    assert!(!text.contains("0123456789ab"), "{text}");
    assert!(text.contains("************cdef"), "{text}");
}

#[test]
fn safe_names() {
    for (name, method, safe) in [
        ("example-bot", "iam", "example-bot"),
        ("short", "token", "*****"),
        ("0123456789abcdef", "token", "************cdef"),
    ] {
        assert_eq!(safe_name(name, method), safe);
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_cluster_has_a_role_that_issues() {
    let (store, audit) = cluster();
    seed(&store, &audit, now()).unwrap();
    seed(&store, &audit, now()).unwrap();
    assert_eq!(audit.events().len(), 1);
    let role = store
        .get("role", "wildcard-workload-identity-issuer")
        .unwrap()
        .unwrap();
    assert_eq!(
        role.spec["allow"]["workload_identity_labels"],
        json!({"*": ["*"]})
    );
}

#[test]
fn a_role_is_brought_to_its_normal_form() {
    let text = "\
kind: role
version: v7
metadata: {name: r}
spec:
  options: {max_session_ttl: 8h, forward_agent: true, max_sessions: 1}
  allow:
    logins: [root]
    workload_identity_labels: {'*': '*', env: [a, b]}
    rules: [{resources: [workload_identity], verbs: [read]}]
    impersonate: {roles: [x]}
";
    let role = parse("f", text, Some(now())).unwrap().remove(0);
    assert_eq!(role.spec["options"]["max_session_ttl"], "8h0m0s");
    assert_eq!(role.spec["options"]["forward_agent"], true);
    assert_eq!(role.spec["options"]["max_sessions"], 1);
    assert_eq!(role.spec["allow"]["logins"], json!(["root"]));
    assert_eq!(
        role.spec["allow"]["workload_identity_labels"],
        json!({"*": ["*"], "env": ["a", "b"]})
    );
    assert_eq!(role.spec["deny"], json!({}));
    let bare = "kind: role\nversion: v7\nmetadata: {name: r}\nspec: {}\n";
    let role = parse("f", bare, Some(now())).unwrap().remove(0);
    assert_eq!(role.spec["options"]["max_session_ttl"], "30h0m0s");
}

fn refused(cases: &[(String, &str)]) {
    for (text, expected) in cases {
        let error = parse("f", text, Some(now())).expect_err(text).to_string();
        assert!(
            error.contains(expected),
            "{text}\n-> {error}\nwants {expected}"
        );
    }
}

#[test]
fn federations_and_overrides_are_checked() {
    let federation = |name: &str, source: &str| {
        format!(
            "kind: spiffe_federation\nversion: v1\nmetadata: {{name: '{name}'}}\n\
             spec: {{bundle_source: {source}}}\n"
        )
    };
    let web = |url: &str| {
        let source = format!("{{https_web: {{bundle_endpoint_url: '{url}'}}}}");
        federation("a.example", &source)
    };
    let spiffe = |more: &str| {
        let source = format!("{{https_spiffe: {{bundle_endpoint_url: 'https://a/'{more}}}}}");
        federation("a.example", &source)
    };
    let cases = [
        (web(""), "`bundle_endpoint_url` is required"),
        (web("http://a/"), "is no URL of a bundle endpoint"),
        (web("https://user@a/"), "is no URL of a bundle endpoint"),
        (
            federation(
                "spiffe://a.example",
                "{https_web: {bundle_endpoint_url: 'https://a/'}}",
            ),
            "is no trust domain",
        ),
        (federation("a.example", "{}"), "0 sources are given"),
        (federation("a.example", "{dns: {}}"), "unknown key"),
        (
            federation(
                "a.example",
                "{static: {bundle: xyzzy}, https_web: {bundle_endpoint_url: 'https://a/'}}",
            ),
            "2 sources are given",
        ),
        (
            federation("a.example", "{static: {}}"),
            "`bundle` is required",
        ),
        (
            federation("a.example", "{static: {bundle: xyzzy}}"),
            "is no SPIFFE bundle",
        ),
        (spiffe(""), "`endpoint_spiffe_id` is required"),
        (
            spiffe(", endpoint_spiffe_id: 'spiffe://b'"),
            "is no SPIFFE ID of a workload",
        ),
        (
            spiffe(", endpoint_spiffe_id: 'spiffe://a.example/e'"),
            "`initial_bundle` is required",
        ),
        (
            spiffe(", endpoint_spiffe_id: 'spiffe://b/e', initial_bundle: x"),
            "is no SPIFFE bundle",
        ),
        (
            "kind: spiffe_federation\nversion: v1\nmetadata: {name: a}\nspec: {}".to_owned(),
            "`bundle_source` is required",
        ),
        (
            "kind: sigstore_policy".to_owned(),
            "\"sigstore_policy\" is not supported by this cluster: it verifies no signatures",
        ),
        (
            "kind: workload_identity_x509_issuer_override\nversion: v1\nmetadata: {name: other}\n\
             spec: {}"
                .to_owned(),
            "the name \"other\" counts for nothing",
        ),
        (
            "kind: workload_identity_x509_issuer_override\nversion: v1\nmetadata: {name: default}\n\
             spec: {overrides: [{issuer: x}]}"
                .to_owned(),
            "overrides[0].issuer is no DER certificate",
        ),
    ];
    refused(&cases);
}

#[test]
fn bad_input_is_told_with_its_place() {
    let token =
        |spec: &str| format!("kind: token\nversion: v2\nmetadata: {{name: t}}\nspec:\n{spec}");
    let iam = |rule: &str| {
        token(&format!(
            "  roles: [Bot]\n  bot_name: b\n  join_method: iam\n  allow:\n  - {rule}\n"
        ))
    };
    let meta = |meta: &str| format!("kind: bot\nversion: v1\nmetadata: {meta}\nspec: {{}}\n");
    let role = |allow: &str| {
        format!("kind: role\nversion: v7\nmetadata: {{name: r}}\nspec:\n  allow: {allow}\n")
    };
    let cases = [
        (String::new(), "f: error: there is no resource"),
        ("kind: [".to_owned(), "f:"),
        (
            "just text".to_owned(),
            "f:1:1: error: resource: must be a mapping",
        ),
        ("metadata: {name: x}".to_owned(), "`kind` is required"),
        ("kind: bt".to_owned(), "did you mean `bot`?"),
        (
            "kind: bot_instance".to_owned(),
            "made by the cluster itself",
        ),
        (
            "kind: bot\nmetadata: {name: a}\nspec: {}".to_owned(),
            "`version` is required",
        ),
        (
            "kind: bot\nversion: v3\nmetadata: {name: a}\nspec: {}".to_owned(),
            "f:2:10: error: bot \"a\" version: \"v3\" is not a value",
        ),
        (
            "kind: bot\nversion: v1\nspec: {}".to_owned(),
            "`metadata` with a `name`",
        ),
        (
            "kind: bot\nversion: v1\nmetadata: {name: a}".to_owned(),
            "`spec` is required",
        ),
        (
            "kind: bot\nversion: v1\nmetadata: {name: a}\nspec: {rolls: []}".to_owned(),
            "f:4:8: error: bot \"a\" spec.rolls: unknown key (did you mean `roles`?)",
        ),
        (
            "kind: bot\nversion: v1\nmetadata: {name: a}\nspec: {max_session_ttl: 169h}".to_owned(),
            "169h0m0s is not between",
        ),
        (meta("{}"), "`name` is required"),
        (meta("{name: 'a/*'}"), "holds the character '*'"),
        (
            meta("{name: a, expires: '2020-01-01T00:00:00Z'}"),
            "is in the past",
        ),
        (meta("{name: a, expires: tomorrow}"), "is no point in time"),
        (
            meta("{name: a, namespace: other}"),
            "no namespace \"other\"",
        ),
        (token("  bot_name: b\n"), "`roles` must not be empty"),
        (
            token("  roles: [Node]\n  bot_name: b\n"),
            "\"Node\" cannot join",
        ),
        (token("  roles: [Bot]\n"), "`bot_name` is required"),
        (
            token("  roles: [Bot]\n  bot_name: b\n  join_method: ima\n"),
            "did you mean \"iam\"",
        ),
        (
            token("  roles: [Bot]\n  bot_name: b\n  join_method: iam\n"),
            "at least one rule",
        ),
        (
            token("  roles: [Bot]\n  bot_name: b\n  join_method: token\n  allow: [{aws_arn: x}]\n"),
            "mean nothing for the join method `token`",
        ),
        (iam("{}"), "needs `aws_account` or `aws_arn`"),
        (
            iam("aws_account: '11111111111'"),
            "\"11111111111\" is no AWS account",
        ),
        (
            iam("aws_acount: '111111111111'"),
            "did you mean `aws_account`?",
        ),
        (iam("aws_role: x"), "belongs to the join method `ec2`"),
        (
            iam("aws_organization_id: o-1"),
            "organizations are not supported",
        ),
        (
            role("{rules: [{resources: [x]}]}"),
            "`verbs` must list at least one",
        ),
        (
            role("{rules: [{resources: [x], verbs: [y], where: z}]}"),
            "not supported",
        ),
        (
            role("{workload_identity_labels: {'*': x}}"),
            "goes with the value `*`",
        ),
        (
            role("{workload_identity_labels: {a: []}}"),
            "matches nothing",
        ),
        (
            "kind: lock\nversion: v2\nmetadata: {name: l}\nspec: {target: {login: x}}".to_owned(),
            "spec.target.login: is no target",
        ),
        (
            "kind: lock\nversion: v2\nmetadata: {name: l}\nspec: {}".to_owned(),
            "`target` is required",
        ),
        (
            "kind: workload_identity_x509_revocation\nversion: v1\nmetadata: {name: AB}\nspec: {}"
                .to_owned(),
            "is no serial number",
        ),
    ];
    refused(&cases);
}

#[test]
fn every_problem_of_every_document_is_told_at_once() {
    let text = "kind: bot\nversion: v1\nmetadata: {name: a}\nspec: {x: 1}\n---\nkind: odd\n";
    let error = parse("some.yaml", text, Some(now()))
        .unwrap_err()
        .to_string();
    let lines: Vec<&str> = error.lines().collect();
    assert_eq!(lines.len(), 2, "{error}");
    assert!(
        lines[0].starts_with("some.yaml:4:8: error: bot \"a\" spec.x:"),
        "{error}"
    );
    assert!(
        lines[1].starts_with("some.yaml:6:7: error: odd kind:"),
        "{error}"
    );
}

#[test]
fn an_unquoted_account_keeps_its_digits() {
    let text = TOKEN.replace("\"111111111111\"", "011111111111");
    let token = parse("f", &text, Some(now())).unwrap().remove(0);
    assert_eq!(token.spec["allow"][0]["aws_account"], "011111111111");
}

#[test]
fn authorities_cannot_be_read() {
    assert_eq!(readable_kind("bots"), Some("bot"));
    assert_eq!(
        readable_kind("workload_identity"),
        Some("workload_identity")
    );
    assert_eq!(readable_kind("authority_keys"), None);
}

#[tokio::test]
async fn a_token_that_was_used_up_is_not_brought_back_by_a_file() {
    let (store, audit) = cluster();
    let text = "kind: token\nversion: v2\nmetadata: {name: a-secret-of-sixteen-or-more}\n\
                spec: {roles: [Bot], bot_name: b, join_method: token}\n";
    let applied = put(&store, &audit, text, Mode::Ensure).unwrap();
    assert!(!applied[0].message.contains("a-secret"), "{applied:?}");
    let name = "a-secret-of-sixteen-or-more";
    assert!(store.delete("token", name).unwrap());
    store
        .put(super::spent(name), &super::super::store::Put::Upsert)
        .unwrap();
    let applied = put(&store, &audit, text, Mode::Ensure).unwrap();
    assert!(
        applied[0].message.ends_with("has been used up by its bot"),
        "{applied:?}"
    );
    assert!(store.get("token", name).unwrap().is_none());
    // Whoever administers the cluster may still make it again on purpose.
    put(&store, &audit, text, Mode::Create).unwrap();
    assert!(store.get("token", name).unwrap().is_some());
}

#[test]
fn what_is_only_warned_of_is_taken_and_a_key_that_nobody_reads_is_not() {
    let token = |rule: &str| {
        format!(
            "kind: token\nversion: v2\nmetadata: {{name: t}}\nspec: {{roles: [Bot], bot_name: example, \
             join_method: tpm, tpm: {{allow: [{{{rule}}}]}}}}\n"
        )
    };
    let serial = "ek_certificate_serial: \"01\"";
    assert_eq!(parse("f", &token(serial), None).unwrap().len(), 1);
    let misspelt = parse("f", &token(&format!("{serial}, ek_public_hsh: aa")), None);
    let lines = misspelt.unwrap_err().lines;
    assert!(lines.contains("error: token \"t\" spec.tpm"), "{lines}");
    assert!(
        lines.contains("unknown key") && !lines.contains("ignored"),
        "{lines}"
    );
}
