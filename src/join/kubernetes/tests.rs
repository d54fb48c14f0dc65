use std::time::{Duration, SystemTime};

use super::*;
use crate::clock::Clock;
use crate::destination::from_uri;
use crate::env::Env;
use crate::pb::teleport::join::v1::{ClientParams, join_request};
use crate::yaml::{Problems, parse};

/// What is sent with this configuration and this environment.
async fn sent(path: Option<&str>, env: &Env) -> Result<String, JoinError> {
    let storage = from_uri("memory://").unwrap().build();
    let clock = Clock::simulated(SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000));
    let around = Surroundings {
        env,
        clock: &clock,
        storage: &storage,
    };
    let path = path.map(str::to_owned);
    let proof = Settings { path }.prepare(&around).await?;
    match proof.opening(ClientParams::default()) {
        join_request::Payload::OidcInit(init) => Ok(String::from_utf8(init.id_token).unwrap()),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn the_file_is_read_at_each_join() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("token");
    let text = path.to_str().unwrap();
    let env = Env::default();
    for content in ["first\n", " second "] {
        std::fs::write(&path, content).unwrap();
        assert_eq!(sent(Some(text), &env).await.unwrap(), content.trim());
    }
    // What the configuration says goes before the environment.
    let other = dir.path().join("other");
    std::fs::write(&other, "third").unwrap();
    let env: Env = [(PATH_ENV, other.to_str().unwrap())].into_iter().collect();
    assert_eq!(sent(None, &env).await.unwrap(), "third");
    assert_eq!(sent(Some(text), &env).await.unwrap(), "second");
}

#[tokio::test(start_paused = true)]
async fn a_file_that_is_of_no_use_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty");
    std::fs::write(&empty, "\n").unwrap();
    for path in [empty.to_str().unwrap(), "/nonexistent/token"] {
        let error = sent(Some(path), &Env::default()).await.unwrap_err();
        let text = error.to_string();
        assert!(text.contains(path) && text.contains(PATH_ENV), "{text}");
    }
}

#[test]
fn the_section_comes_back_as_it_was_read() {
    let node = parse("token_path: /var/run/secrets/tbot/token\n").unwrap();
    let problems = Problems::new();
    let mut fields = Fields::new(&node, "onboarding.kubernetes", &problems).unwrap();
    let prover = Kubernetes.read(Some(&mut fields));
    fields.finish();
    assert!(problems.into_sorted().is_empty());
    let tree = crate::yaml::emit::emit(&prover.tree().unwrap());
    assert_eq!(tree, "token_path: /var/run/secrets/tbot/token\n");
    assert!(Kubernetes.read(None).tree().is_none());
}
