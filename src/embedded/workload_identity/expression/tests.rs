use std::collections::{BTreeMap, HashMap};

use serde_json::json;

use super::*;
use crate::embedded::workload_identity::attrs::UserFacts;
use crate::expression::MAX_SOURCE;
use crate::pb::teleport::workloadidentity::v1 as wire;

fn attrs() -> Attrs {
    let workload = wire::WorkloadAttrs {
        unix: Some(wire::WorkloadAttrsUnix {
            attested: true,
            pid: 42,
            uid: 1000,
            ..Default::default()
        }),
        docker: Some(wire::WorkloadAttrsDocker {
            attested: true,
            container: Some(wire::WorkloadAttrsDockerContainer {
                labels: HashMap::from([
                    ("app".into(), "web".into()),
                    ("a.b/c".into(), "dotted".into()),
                    ("empty".into(), String::new()),
                ]),
                ..Default::default()
            }),
        }),
        ..Default::default()
    };
    let user = UserFacts {
        name: "bot-x".into(),
        is_bot: true,
        traits: BTreeMap::from([
            ("groups".into(), vec!["dev".into(), "ops".into()]),
            ("one".into(), vec!["only".into()]),
            ("email".into(), vec!["Ann <ann@example.com>".into()]),
        ]),
        ..UserFacts::default()
    };
    let join = json!({"gitlab": {"runner_id": -5, "ref": "main"}});
    Attrs::new(Some(&workload), &user, &join).unwrap()
}

fn rule(source: &str) -> Result<Value, EvalError> {
    let expression = Expression::parse(source, Mode::Rule);
    expression
        .unwrap_or_else(|e| panic!("{source}: {e}"))
        .evaluate(&attrs())
}

#[test]
fn expressions_that_hold() {
    for source in [
        "true",
        "!false",
        "workload.unix.attested",
        "workload.unix.uid == 1000",
        "workload.unix.pid != 41 && workload.unix.gid == 0",
        "join.gitlab.runner_id == -5",
        "user.is_bot == true",
        "user.name == \"bot-x\"",
        "user.name == `bot-x`",
        "\"a\\n\\t\\\"\\u00e9\\x41\" == \"a\\u000a\\x09\\\"éA\"",
        "workload.unix.binary_path == \"\"",
        "false && workload.systemd.service == \"x\" || true",
        "true || workload.systemd.attested",
        "!(false || false) && (true)",
        "true == !false != false",
        "workload.docker.container.labels.app == \"web\"",
        "workload.docker.container.labels[\"a.b/c\"] == \"dotted\"",
        "workload.docker.container.labels[strings.lower(\"APP\")] == \"web\"",
        "workload.docker.container.labels[\"empty\"] == \"\"",
        "user.traits[\"groups\"].contains(\"dev\")",
        "user.traits.groups.contains(\"ops\")",
        "user.traits[\"nothing\"].isempty()",
        "is_empty(user.traits.nothing)",
        "user.traits[\"groups\"].contains_all(set(\"dev\", \"ops\"))",
        "!contains_all(user.traits.groups, set())",
        "contains_any(user.traits.groups, set(\"x\", \"ops\"))",
        "user.traits.groups.contains_any(set(\"dev\"))",
        "set(\"a\").add(\"b\", \"c\").remove(\"a\").contains_all(set(\"b\", \"c\"))",
        "!set(\"a\").remove(\"a\").contains(\"a\")",
        "union(set(\"a\"), set(\"b\"), set()).contains(\"b\")",
        "dict(pair(\"a\", set(\"b\")))[\"a\"].contains(\"b\")",
        "dict(pair(\"a\", set(\"b\"))).a.contains(\"b\")",
        "dict(pair(\"a\", set(\"b\"))).put(\"c\", set(\"d\")).c.contains(\"d\")",
        "dict().add_values(\"a\", \"x\", \"y\").a.contains_all(set(\"x\", \"y\"))",
        "dict(pair(\"a\", set(\"b\"))).remove(\"a\")[\"a\"].isempty()",
        "user.traits.add_values(\"new\", \"v\")[\"new\"].contains(\"v\")",
        "ifelse(user.is_bot, \"b\", \"h\") == \"b\"",
        "ifelse(false, 1, 2) == 2",
        "choose(option(false, \"a\"), option(true, \"b\")) == \"b\"",
        "strings.upper(\"aé\") == \"AÉ\"",
        "strings.lower(set(\"A\")).contains(\"a\")",
        "strings.replaceall(\"a-b-c\", \"-\", \"_\") == \"a_b_c\"",
        "strings.replaceall(set(\"a-b\"), \"-\", \"\").contains(\"ab\")",
        "strings.split(\"a,b\", \",\").contains(\"b\")",
        "strings.split(set(\"a,b\", \"c\"), \",\").contains_all(set(\"a\", \"b\", \"c\"))",
        "email.local(user.traits.email).contains(\"ann\")",
        "regexp.replace(set(\"dev-1\", \"x\"), `^dev-(\\d)$`, \"$1\").contains_all(set(\"1\"))",
        "!regexp.replace(set(\"x\"), `^dev$`, \"y\").contains(\"x\")",
        "regex.replace(set(\"aa\"), \"a\", \"b\").contains(\"bb\")",
        "time.RFC3339(\"2026-01-01T00:00:00Z\").before(time.RFC3339(\"2026-01-01T00:00:01Z\"))",
        "after(time.RFC3339(\"2026-01-01T01:00:00Z\"), time.RFC3339(\"2026-01-01T01:30:00+01:00\"))",
        "between(time.RFC3339(\"2026-06-01T00:00:00Z\"), time.RFC3339(\"2026-01-01T00:00:00Z\"), time.RFC3339(\"2027-01-01T00:00:00Z\"))",
    ] {
        assert_eq!(rule(source), Ok(Value::Flag(true)), "{source}");
    }
}

#[test]
fn evaluation_errors() {
    let missing = |path: &str, key: &str| EvalError::MissingKey {
        path: path.into(),
        key: key.into(),
    };
    for (source, error) in [
        (
            "workload.kubernetes.attested",
            EvalError::Unset("workload.kubernetes.attested".into()),
        ),
        (
            "workload.podman.pod.labels.x == \"\"",
            EvalError::Unset("workload.podman.pod.labels".into()),
        ),
        (
            "true && join.iam.arn == \"\"",
            EvalError::Unset("join.iam.arn".into()),
        ),
        (
            "workload.docker.container.labels.none == \"\"",
            missing("workload.docker.container.labels", "none"),
        ),
        ("user.labels[\"x\"] == \"\"", missing("user.labels", "x")),
        // Both branches are evaluated: only && and || guard.
        (
            "ifelse(true, \"a\", join.iam.arn) == \"a\"",
            EvalError::Unset("join.iam.arn".into()),
        ),
        ("choose(option(false, true))", EvalError::NoOption),
        (
            "regexp.replace(set(\"a\"), \"(\", \"\").isempty()",
            EvalError::Regexp("(".into()),
        ),
        (
            "regexp.replace(set(\"a\"), `(a{1000}){1000}`, \"\").isempty()",
            EvalError::Regexp("(a{1000}){1000}".into()),
        ),
        (
            "time.RFC3339(\"now\").before(time.RFC3339(\"now\"))",
            EvalError::Time("now".into()),
        ),
        (
            "email.local(set(\"ann\")).isempty()",
            EvalError::Email("ann".into()),
        ),
        ("sigstore.policy_satisfied(\"a\")", EvalError::Policies),
    ] {
        assert_eq!(rule(source), Err(error), "{source}");
    }
}

#[test]
fn growth_is_bounded() {
    let mut source = "\"aaaaaaaaaaaaaaaa\"".to_owned();
    for _ in 0..8 {
        source = format!("strings.replaceall({source}, \"a\", \"aaaaaaaaaaaaaaaa\")");
    }
    assert_eq!(rule(&format!("{source} == \"\"")), Err(EvalError::TooLarge));
    let big = "x".repeat(2000);
    let source = format!("regexp.replace(set(\"{big}\"), \"\", \"{big}\").isempty()");
    assert_eq!(rule(&source), Err(EvalError::TooLarge));
}

#[test]
fn expressions_that_are_refused() {
    for (source, part) in [
        ("", "ends too early"),
        ("(", "ends too early"),
        ("true)", "unexpected \")\""),
        ("true true", "character 6"),
        ("a = b", "expected '=' twice"),
        ("a & b", "expected '&' twice"),
        ("\"open", "does not end"),
        ("`open", "does not end"),
        ("\"\\q\"", "unknown escape"),
        ("\"\\xff\" == \"\"", "malformed escape"),
        ("1.5 == 1", "not a decimal integer"),
        ("99999999999999999999 == 1", "not a decimal integer"),
        ("#", "unexpected '#'"),
        ("user.", "expected a name"),
        ("user.name < \"a\"", "unexpected '<'"),
        ("{}", "unexpected '{'"),
        ("nothing", "unknown attribute \"nothing\""),
        (
            "workload.unix.shoe == 1",
            "unknown attribute \"workload.unix.shoe\"",
        ),
        (
            "join.azure_devops.sub == \"\"",
            "unknown attribute \"join.azure_devops.sub\"",
        ),
        ("workload.sigstore.payloads == \"\"", "unknown attribute"),
        ("join.circleci.context_ids == \"\"", "unknown attribute"),
        ("user.name.x == \"\"", "unknown attribute \"user.name.x\""),
        ("workload.unix", "is not one attribute"),
        ("user.labels", "needs a key"),
        (
            "workload.docker.container.labels.a.b == \"\"",
            "unknown attribute",
        ),
        ("user.name", "a rule needs a bool"),
        ("user.name == 1", "expected a string, this is a integer"),
        ("user.traits.x == set()", "a set cannot be compared"),
        ("!user.name", "expected a bool"),
        ("user.name && true", "expected a bool"),
        ("user.labels[1] == \"\"", "expected a string"),
        ("user.name[\"a\"] == \"\"", "has no elements"),
        (
            "strings.uper(\"a\") == \"\"",
            "unknown function \"strings.uper\"",
        ),
        ("nope()", "unknown function \"nope\""),
        ("set(1).isempty()", "set cannot be called with (integer)"),
        ("set(\"a\").upper()", "unknown method \"upper\""),
        (
            "set(\"a\").contains()",
            "contains cannot be called with (set)",
        ),
        ("user.name.contains(\"a\")", "unknown method"),
        ("ifelse(true, 1, \"a\") == 1", "expected a integer"),
        ("ifelse(true)", "takes a condition"),
        ("choose(true)", "takes option()s"),
        ("choose()", "at least one"),
        ("option(true, true)", "inside of choose() only"),
        ("sigstore.policy_satisfied()", "cannot be called"),
    ] {
        let error = Expression::rule(source).expect_err(source).to_string();
        assert!(error.contains(part), "{source}: {error}");
    }
}

#[test]
fn size_and_depth_are_bounded() {
    let long = format!("{}true", " ".repeat(MAX_SOURCE));
    assert_eq!(Expression::rule(&long), Err(ParseError::TooLong));
    let nest = |open: &str, close: &str, n: usize| {
        Expression::rule(&format!("{}true{}", open.repeat(n), close.repeat(n)))
    };
    assert!(nest("(", ")", 60).is_ok());
    assert_eq!(nest("(", ")", 100), Err(ParseError::TooDeep));
    assert_eq!(nest("!", "", 2000), Err(ParseError::TooDeep));
    assert_eq!(nest("true == ", "", 100), Err(ParseError::TooDeep));
    let dots = format!("a{}", ".a".repeat(1000));
    assert_eq!(Expression::rule(&dots), Err(ParseError::TooDeep));
    let wide = format!("true{}", "&&true".repeat(600));
    assert!(Expression::rule(&wide).is_ok());
}

#[test]
fn templates_read_attributes_more_strictly() {
    let template = |source: &str| {
        Expression::parse(source, Mode::Template)
            .unwrap()
            .evaluate(&attrs())
    };
    assert_eq!(
        template("workload.unix.binary_path"),
        Err(EvalError::Unset("workload.unix.binary_path".into()))
    );
    assert_eq!(template("workload.unix.gid"), Ok(Value::Integer(0)));
    assert_eq!(
        template("workload.docker.container.labels[\"empty\"]"),
        Ok(Value::Text(String::new()))
    );
    assert_eq!(template("user.traits.one"), Ok(Value::Text("only".into())));
    assert!(matches!(
        template("user.traits[\"groups\"]"),
        Err(EvalError::ManyValues { count: 2, .. })
    ));
    assert!(matches!(
        template("user.traits[\"none\"]"),
        Err(EvalError::MissingKey { .. })
    ));
    assert!(Expression::parse("sigstore.policy_satisfied(\"a\")", Mode::Template).is_err());
}
