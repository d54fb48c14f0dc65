use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::*;

fn token(claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}.c2ln", part(&json!({"alg": "RS256"})), part(claims))
}

#[test]
fn a_token_may_be_for_us_or_for_the_api_server() {
    for (claims, expected) in [
        (
            json!({"aud": ["https://kubernetes"]}),
            vec!["us", "https://kubernetes"],
        ),
        (json!({"aud": "k3s"}), vec!["us", "k3s"]),
        (json!({"aud": ["us", "k3s"]}), vec!["us", "k3s"]),
        (json!({}), vec![]),
    ] {
        assert_eq!(audiences(&token(&claims), "us"), expected, "{claims}");
    }
    assert!(audiences("opaque", "us").is_empty());
}

#[test]
fn versions_bind_tokens_from_1_22_on() {
    for (version, expected) in [
        ("v1.21.14", false),
        ("v1.22.0", true),
        ("v1.31.2+k3s1", true),
        ("v1.29.1-gke.1589017", true),
        ("v2.0.0", true),
        ("v0.9", false),
        ("", true),
        ("latest", true),
    ] {
        assert_eq!(binds(version), expected, "{version}");
    }
}

#[tokio::test]
async fn who_cannot_be_asked_is_told() {
    let error = ApiServer::of(&Env::default()).unwrap_err().to_string();
    assert!(
        error.contains("does not run in a Kubernetes pod"),
        "{error}"
    );
    let dir = tempfile::tempdir().unwrap();
    let server = ApiServer::at("127.0.0.1", 1, dir.path());
    let error = server.review("t", "us").await.unwrap_err().to_string();
    assert!(
        error.contains("token") && error.contains("cannot read"),
        "{error}"
    );
    std::fs::write(dir.path().join("token"), "t").unwrap();
    std::fs::write(dir.path().join("ca.crt"), "junk").unwrap();
    let error = server.review("t", "us").await.unwrap_err().to_string();
    assert!(error.contains("ca.crt"), "{error}");
}

#[test]
fn only_service_accounts_are_accounts() {
    let account = Account::of("system:serviceaccount:bots:tbot", None).unwrap();
    assert_eq!(
        (account.namespace.as_str(), account.name.as_str()),
        ("bots", "tbot")
    );
    for subject in [
        "",
        "kubernetes-admin",
        "system:serviceaccount:",
        "system:serviceaccount:bots",
        "system:serviceaccount:bots:",
        "system:serviceaccount::tbot",
        "system:serviceaccount:bots:tbot:more",
        "system:node:bots:tbot",
    ] {
        assert!(Account::of(subject, None).is_err(), "{subject}");
    }
}
