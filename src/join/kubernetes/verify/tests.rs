use super::*;
use crate::yaml::{Problems, parse};

const JWKS: &str = r#"{"keys":[{"kty":"EC","crv":"P-256","kid":"k","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0"}]}"#;

/// The normal form of a section; the lines of what is wrong with it otherwise.
fn normal(section: &str) -> Result<Value, String> {
    let node = parse(&format!("kubernetes: {section}\n")).unwrap();
    let problems = Problems::new();
    let mut fields = Fields::new(&node, "spec", &problems).unwrap();
    let mut stored = json!({});
    Kubernetes.read(&mut fields, &mut stored);
    fields.finish();
    let lines: Vec<_> = problems
        .into_sorted()
        .into_iter()
        .map(|problem| problem.render("token.yaml"))
        .collect();
    if lines.is_empty() {
        Ok(stored[NAME].clone())
    } else {
        Err(lines.join("\n"))
    }
}

#[test]
fn sections_have_a_normal_form() {
    let rule = json!([{"service_account": "a:b"}]);
    let expected = json!({"type": "in_cluster", "allow": rule});
    assert_eq!(
        normal("{allow: [{service_account: 'a:b'}]}").unwrap(),
        expected
    );
    let section = format!(
        "{{type: static_jwks, static_jwks: {{jwks: '{JWKS}'}}, allow: [{{service_account: 'a:b'}}]}}"
    );
    let expected = json!({"type": "static_jwks", "static_jwks": {"jwks": JWKS}, "allow": rule});
    assert_eq!(normal(&section).unwrap(), expected);
    let section = "{type: oidc, oidc: {issuer: 'https://k.example.com/id/1'}, \
                   allow: [{service_account_name: 't*', service_account_namespace: 'n-?'}]}";
    let expected = json!({
        "type": "oidc",
        "oidc": {"issuer": "https://k.example.com/id/1", "insecure_allow_http_issuer": false},
        "allow": [{"service_account_name": "t*", "service_account_namespace": "n-?"}],
    });
    assert_eq!(normal(section).unwrap(), expected);
}

#[test]
fn every_mistake_of_a_section_is_told() {
    let rule = "allow: [{service_account: 'a:b'}]";
    for (section, text) in [
        ("{}".to_owned(), "at least one rule"),
        ("{allow: []}".to_owned(), "at least one rule"),
        ("{allow: [{}]}".to_owned(), "a rule needs"),
        (
            "{allow: [{service_account: tbot}]}".to_owned(),
            "namespace:name",
        ),
        (
            "{allow: [{service_account: 'a:b:c'}]}".to_owned(),
            "namespace:name",
        ),
        (
            "{allow: [{service_account: ':b'}]}".to_owned(),
            "namespace:name",
        ),
        (
            "{allow: [{serviceaccount: 'a:b'}]}".to_owned(),
            "unknown key",
        ),
        (format!("{{type: in-cluster, {rule}}}"), "in_cluster"),
        (format!("{{type: static_jwks, {rule}}}"), "static_jwks.jwks"),
        (format!("{{type: oidc, {rule}}}"), "oidc.issuer"),
        (
            format!("{{type: static_jwks, static_jwks: {{jwks: '{{}}'}}, {rule}}}"),
            "kubectl get --raw",
        ),
        (
            format!("{{type: oidc, oidc: {{issuer: 'http://k.example.com'}}, {rule}}}"),
            "http://k.example.com",
        ),
        ("5".to_owned(), "mapping"),
    ] {
        let lines = normal(&section).unwrap_err();
        assert!(lines.contains(text), "{section}: {lines}");
    }
    let insecure = "{type: oidc, oidc: {issuer: 'http://k.example.com', \
                    insecure_allow_http_issuer: true}, allow: [{service_account: 'a:b'}]}";
    assert!(normal(insecure).is_ok());
}

#[test]
fn claims_have_to_be_of_a_pod_and_short_lived() {
    let claims = |change: fn(&mut Value)| {
        let mut claims = json!({
            "sub": "system:serviceaccount:bots:tbot", "iat": 1_000, "exp": 2_800,
            "kubernetes.io": {"namespace": "bots", "pod": {"name": "tbot-0"},
                "serviceaccount": {"name": "tbot"}},
        });
        change(&mut claims);
        let Value::Object(claims) = claims else {
            panic!("claims are an object");
        };
        Account::of_claims(&claims, STATIC_JWKS)
    };
    let account = claims(|_| ()).unwrap();
    assert_eq!(account.pod.as_deref(), Some("tbot-0"));
    for (change, text) in [
        (
            (|claims| claims["exp"] = json!(2_801)) as fn(&mut Value),
            "TTL",
        ),
        (|claims| claims["iat"] = Value::Null, "TTL"),
        (|claims| claims["kubernetes.io"] = Value::Null, "pod bound"),
        (
            |claims| claims["kubernetes.io"]["pod"]["name"] = json!(""),
            "pod bound",
        ),
        (
            |claims| claims["sub"] = json!("admin"),
            "not a service account",
        ),
    ] {
        let refusal = claims(change).unwrap_err().to_string();
        assert!(refusal.contains(text), "{refusal}");
    }
}

#[test]
fn rules_are_exact_or_patterns() {
    let account = Account::of("system:serviceaccount:bots:tbot", Some("p".to_owned())).unwrap();
    for (rule, fits) in [
        (json!({"service_account": "bots:tbot"}), true),
        (json!({"service_account": "bots:*"}), false),
        (json!({"service_account_name": "tb*"}), true),
        (
            json!({"service_account_name": "tb*", "service_account_namespace": "bot?"}),
            true,
        ),
        (
            json!({"service_account_name": "tb*", "service_account_namespace": "prod"}),
            false,
        ),
        (
            json!({"service_account": "bots:tbot", "service_account_namespace": "prod"}),
            false,
        ),
    ] {
        let verdict = RULES.check(Some(&json!([rule])), &account.facts());
        assert_eq!(verdict.is_ok(), fits, "{rule}");
    }
    let attributes = Value::Object(account.attributes());
    let expected = json!({
        "subject": "system:serviceaccount:bots:tbot",
        "service_account": {"name": "tbot", "namespace": "bots"},
        "pod": {"name": "p"},
    });
    assert_eq!(attributes, expected);
}
