use super::*;
use crate::crypto::KeyAlgorithm;
use crate::destination::from_uri;
use crate::env::Env;
use crate::pb::teleport::join::v1::{BoundKeypairChallenge, BoundKeypairRotationRequest};
use crate::yaml::{Problems, parse};

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn new_key() -> PrivateKey {
    PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap()
}

/// Settings as a file with this section has them; the lines of what is wrong with it otherwise.
fn read(section: &str) -> Result<Settings, String> {
    let node = parse(section).unwrap();
    let problems = Problems::new();
    let mut fields = Fields::new(&node, "onboarding.bound_keypair", &problems).unwrap();
    let settings = settings(&mut fields);
    fields.finish();
    let lines = problems.into_sorted();
    let lines: Vec<_> = lines.iter().map(|line| line.render("tbot.yaml")).collect();
    if lines.is_empty() {
        Ok(settings)
    } else {
        Err(lines.join("\n"))
    }
}

async fn memory() -> Arc<dyn Destination> {
    let storage = from_uri("memory://").unwrap().build();
    storage.init().await.unwrap();
    storage
}

async fn prepared(
    settings: &Settings,
    env: &Env,
    storage: &Arc<dyn Destination>,
) -> Result<Box<dyn Proof>, JoinError> {
    let clock = Clock::simulated(now());
    let around = Surroundings {
        env,
        clock: &clock,
        storage,
    };
    settings.prepare(&around).await
}

fn sent(proof: &dyn Proof) -> BoundKeypairInit {
    match proof.opening(ClientParams::default()) {
        join_request::Payload::BoundKeypairInit(init) => init,
        other => panic!("{other:?}"),
    }
}

fn challenge_for(key: &PrivateKey) -> challenge::Payload {
    challenge::Payload::BoundKeypairChallenge(BoundKeypairChallenge {
        public_key: key.public_ssh_line().unwrap().into_bytes(),
        challenge: "{}".to_owned(),
    })
}

fn rotation() -> challenge::Payload {
    challenge::Payload::BoundKeypairRotationRequest(BoundKeypairRotationRequest {
        signature_algorithm_suite: "balanced-v1".to_owned(),
    })
}

#[tokio::test(start_paused = true)]
async fn the_secret_comes_from_where_it_is_configured() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret");
    std::fs::write(&path, "of the file\n").unwrap();
    let path = path.to_str().unwrap();
    let storage = memory().await;
    let env: Env = [(SECRET_ENV, "of the environment")].into_iter().collect();
    for (section, secret) in [
        ("registration_secret: of the value", "of the value"),
        ("initialjoinsecret: of 18.0", "of 18.0"),
        (&format!("registration_secret_path: {path}"), "of the file"),
        ("{}", "of the environment"),
    ] {
        let settings = read(section).unwrap();
        let proof = prepared(&settings, &env, &storage).await.unwrap();
        assert_eq!(sent(&*proof).initial_join_secret, secret, "{section}");
    }
    let settings = read("registration_secret_path: /nonexistent/secret").unwrap();
    let error = prepared(&settings, &env, &storage).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/secret"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn without_key_and_secret_the_ways_out_are_told() {
    let error = prepared(&Settings::default(), &Env::default(), &memory().await).await;
    let text = error.unwrap_err().to_string();
    assert!(
        text.contains("tbot keypair create") && text.contains("--registration-secret"),
        "{text}"
    );
}

#[tokio::test(start_paused = true)]
async fn the_secret_is_sent_only_before_the_first_join() {
    let storage = memory().await;
    let settings = read("registration_secret: s").unwrap();
    let env = Env::default();
    let mut proof = prepared(&settings, &env, &storage).await.unwrap();
    assert_eq!(sent(&*proof).initial_join_secret, "s");
    let made = proof.solve(rotation(), now()).await.unwrap();
    let Some(challenge_solution::Payload::BoundKeypairRotationResponse(made)) = made else {
        panic!("{made:?}");
    };
    // Stored before it is sent; still unbound, so the secret goes with the next attempt too.
    let again = prepared(&settings, &env, &storage).await.unwrap();
    assert_eq!(sent(&*again).initial_join_secret, "s");
    // It may be bound without knowing: a secret that is gone is no reason to stop.
    let path = "registration_secret_path: /gone/by/now";
    let gone = prepared(&read(path).unwrap(), &env, &storage).await;
    assert_eq!(sent(&*gone.unwrap()).initial_join_secret, "");
    proof
        .settle(BoundKeypairResult {
            join_state: b"state".to_vec(),
            public_key: made.public_key,
        })
        .await
        .unwrap();
    for settings in [settings, read(path).unwrap()] {
        let bound = prepared(&settings, &env, &storage).await.unwrap();
        assert_eq!(sent(&*bound).initial_join_secret, "");
        assert_eq!(sent(&*bound).previous_join_state, b"state");
    }
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_not_there_proves_nothing() {
    let storage = memory().await;
    Keys::unbound(new_key(), now())
        .store(&storage)
        .await
        .unwrap();
    let mut proof = prepared(&Settings::default(), &Env::default(), &storage)
        .await
        .unwrap();
    let error = proof
        .solve(challenge_for(&new_key()), now())
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("not in the bot's storage"),
        "{error}"
    );
    let iam =
        challenge::Payload::IamChallenge(crate::pb::teleport::join::v1::IamChallenge::default());
    assert!(proof.solve(iam, now()).await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_static_key_answers_challenges_and_nothing_else() {
    let key = new_key();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    std::fs::write(&path, key.to_pem().expose()).unwrap();
    let storage = memory().await;
    let base64 = STANDARD.encode(key.to_pem().expose());
    let env: Env = [(KEY_ENV, base64.as_str())].into_iter().collect();
    for (section, env) in [
        (
            format!("static_key_path: {}", path.display()),
            Env::default(),
        ),
        (
            format!("static_private_key_path: {}", path.display()),
            Env::default(),
        ),
        ("registration_secret: unused".to_owned(), env),
    ] {
        let settings = read(&section).unwrap();
        let mut proof = prepared(&settings, &env, &storage).await.unwrap();
        assert_eq!(
            sent(&*proof),
            BoundKeypairInit {
                client_params: Some(ClientParams::default()),
                ..BoundKeypairInit::default()
            }
        );
        assert!(
            proof
                .solve(challenge_for(&key), now())
                .await
                .unwrap()
                .is_some()
        );
        for refused in [challenge_for(&new_key()), rotation()] {
            assert!(proof.solve(refused, now()).await.is_err());
        }
        proof.settle(BoundKeypairResult::default()).await.unwrap();
        assert!(!Keys::load(&storage, now()).await.unwrap().any());
    }
}

#[tokio::test(start_paused = true)]
async fn a_static_key_that_cannot_be_read_is_told_without_it() {
    let storage = memory().await;
    for value in ["canary!", &STANDARD.encode("canary")] {
        let env: Env = [(KEY_ENV, value)].into_iter().collect();
        let error = prepared(&Settings::default(), &env, &storage)
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(text.contains(KEY_ENV) && !text.contains("canary"), "{text}");
    }
}

#[test]
fn a_value_and_a_path_exclude_each_other() {
    for value in ["registration_secret", "initialjoinsecret"] {
        let section = format!("{value}: canary\nregistration_secret_path: /p\n");
        let lines = read(&section).unwrap_err();
        assert!(
            lines.contains("keep one of them") && !lines.contains("canary"),
            "{lines}"
        );
    }
}

#[test]
fn a_section_comes_back_as_it_was_read() {
    for section in [
        "registration_secret: s\n",
        "registration_secret_path: /s\n",
        "static_key_path: /k\n",
    ] {
        let tree = read(section).unwrap().tree().unwrap();
        assert_eq!(crate::yaml::emit::emit(&tree), section);
    }
    assert!(Settings::default().tree().is_none());
    let shown = format!("{:?}", read("registration_secret: canary").unwrap());
    assert!(!shown.contains("canary"), "{shown}");
}
