//! Join method `bound_keypair` with the real agent and the embedded cluster: who gets in, how often, and
//! what happens to a copy.

use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output};

use serde_json::Value;

use crate::common::{Cluster, OutputText as _, PLAIN_BOT, Sandbox};

struct Scene<'a> {
    sandbox: &'a Sandbox,
    cluster: Cluster<'a>,
}

impl<'a> Scene<'a> {
    /// A cluster with one token of this section.
    fn new(sandbox: &'a Sandbox, section: &str) -> Self {
        let cluster = Cluster::start(sandbox, PLAIN_BOT);
        let scene = Self { sandbox, cluster };
        scene.token(section);
        scene
    }

    /// Writes the token.
    fn token(&self, section: &str) {
        self.cluster.create(&format!(
            "kind: token\nversion: v2\nmetadata: {{name: bound}}\nspec:\n  roles: [Bot]\n  \
             bot_name: example\n  join_method: bound_keypair\n  bound_keypair: {section}\n"
        ));
    }

    fn get(&self, what: &str) -> Value {
        let text = self.cluster.run(&["get", what, "--format", "json"]);
        let found: Value = serde_json::from_str(&text).unwrap();
        match found {
            Value::Array(mut all) if all.len() == 1 => all.remove(0),
            other => other,
        }
    }

    fn status(&self) -> Value {
        self.get("token/bound")["status"]["bound_keypair"].clone()
    }

    fn secret(&self) -> String {
        let status = self.status();
        status["registration_secret"].as_str().unwrap().to_owned()
    }

    /// An agent that keeps itself at `storage` and joins once.
    fn agent(&self, storage: &str, more: &[&str]) -> Command {
        let out = self.sandbox.path(format!("out-of-{storage}"));
        let storage = self.sandbox.path(storage);
        let mut command = self.sandbox.tbot(["start", "identity", "--oneshot"]);
        command
            .env("SSL_CERT_FILE", self.cluster.web_authority())
            .args(["--auth-server", &self.cluster.auth()])
            .args(["--ca-pin", &self.cluster.pin()])
            .args(["--join-method", "bound_keypair", "--token", "bound"])
            .args(["--storage", storage.to_str().unwrap()])
            .arg("--destination")
            .arg(out)
            .args(more);
        command
    }

    fn join(&self, storage: &str, more: &[&str]) -> Output {
        self.agent(storage, more).output().unwrap()
    }

    /// Takes the bot's certificate away, as if it had expired: its keys and its join state stay.
    fn forget(&self, storage: &str) {
        for entry in std::fs::read_dir(self.sandbox.path(storage)).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if !name.contains("bkp") && path.is_file() {
                std::fs::remove_file(path).unwrap();
            }
        }
    }

    fn copy(&self, from: &str, to: &str) {
        let mut cp = self.sandbox.command("cp");
        cp.arg("-a")
            .arg(self.sandbox.path(from))
            .arg(self.sandbox.path(to));
        cp.output().unwrap().success();
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.sandbox.path(path)).unwrap()
    }
}

/// Flags by which every run renews what is stored.
const IMPATIENT: [&str; 4] = ["--renewal-interval", "1s", "--certificate-ttl", "10m"];

#[track_caller]
fn refused(output: &Output, text: &str) {
    let shown = output.text();
    assert_eq!(output.status.code(), Some(1), "{shown}");
    assert!(shown.contains(text), "{shown}");
}

#[test]
fn a_secret_lets_one_bot_in_and_its_key_brings_it_back_as_often_as_allowed() {
    let sandbox = Sandbox::new();
    let scene = Scene::new(&sandbox, "{recovery: {limit: 2}}");
    let secret = scene.secret();
    assert_eq!(secret.len(), 32, "the cluster made one");
    refused(&scene.join("bot", &[]), "tbot keypair create");
    let wrong = scene.join("bot", &["--registration-secret", "guess"]);
    refused(&wrong, "a valid registration secret is required");
    refused(&wrong, "must_register_before");

    let file = sandbox.write("secret", format!("{secret}\n"));
    let first = scene.join(
        "bot",
        &["--registration-secret-path", file.to_str().unwrap()],
    );
    let log = first.success();
    assert!(!log.contains(&secret), "{log}");
    for name in ["id_bkp", "id_bkp.pub", "bkp_state", "bkp_key_history.json"] {
        let mode = sandbox
            .path("bot")
            .join(name)
            .metadata()
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let joined = scene.status();
    assert_eq!(
        joined["bound_public_key"],
        scene.read("bot/id_bkp.pub").trim()
    );
    assert_eq!(joined["recovery_count"], 1);
    assert_eq!(joined.get("registration_secret"), None);
    let instance = joined["bound_bot_instance_id"].as_str().unwrap().to_owned();

    // The file with the secret is gone; nobody needs it any more.
    std::fs::remove_file(&file).unwrap();
    let gone = ["--registration-secret-path", file.to_str().unwrap()];
    let again = scene.join("bot", &[&gone[..], &IMPATIENT].concat());
    assert!(
        again.success().contains("generation:2"),
        "it has joined again"
    );
    assert_eq!(scene.status(), joined);

    scene.forget("bot");
    scene.join("bot", &[]).success();
    let recovered = scene.status();
    assert_eq!(recovered["recovery_count"], 2);
    let now = recovered["bound_bot_instance_id"].as_str().unwrap();
    let record = scene.get(&format!("bot_instance/{now}"));
    assert_eq!(record["spec"]["previous_instance_id"], *instance);

    scene.forget("bot");
    let over = scene.join("bot", &[]);
    refused(&over, "no rejoins remaining");
    refused(&over, "spec.bound_keypair.recovery.limit");
    scene.token("{recovery: {limit: 3}}");
    scene.join("bot", &[]).success();
    assert_eq!(scene.status()["recovery_count"], 3);

    let joins = scene.cluster.events("bot.join");
    let good = joins
        .iter()
        .filter(|event| event["success"] == true)
        .count();
    assert_eq!((good, joins.len()), (4, 6));
    let recoveries = scene.cluster.events("join_token.bound_keypair.recovery");
    assert_eq!(recoveries.len(), 3);
    for event in joins.iter().chain(&recoveries) {
        assert!(!event.to_string().contains(&secret), "{event}");
    }
    assert_eq!(recoveries[2]["recovery_count"], 3);
}

#[test]
fn a_secret_that_is_used_twice_at_once_lets_one_in() {
    let sandbox = Sandbox::new();
    let scene = Scene::new(&sandbox, "{recovery: {limit: 9}}");
    let secret = scene.secret();
    let agents: Vec<_> = (0..6)
        .map(|number| {
            let mut agent = scene.agent(&format!("bot-{number}"), &[]);
            agent.env("TBOT_REGISTRATION_SECRET", &secret);
            sandbox.spawn(&format!("agent-{number}"), agent)
        })
        .collect();
    let won: Vec<_> = agents
        .into_iter()
        .map(|mut agent| (agent.wait().success(), agent.log()))
        .filter(|(success, _)| *success)
        .collect();
    assert_eq!(won.len(), 1, "{won:?}");
    assert_eq!(scene.status()["recovery_count"], 1);
    let joins = scene.cluster.events("bot.join");
    assert_eq!(
        joins
            .iter()
            .filter(|event| event["success"] == true)
            .count(),
        1
    );
}

#[test]
fn a_copy_of_the_storage_locks_the_token_unless_nobody_looks() {
    for (mode, locked) in [("standard", true), ("relaxed", true), ("insecure", false)] {
        let sandbox = Sandbox::new();
        let scene = Scene::new(
            &sandbox,
            &format!("{{recovery: {{limit: 9, mode: {mode}}}}}"),
        );
        scene
            .join("bot", &["--registration-secret", &scene.secret()])
            .success();
        scene.copy("bot", "thief");
        scene.forget("thief");
        scene.join("thief", &[]).success();
        scene.forget("bot");
        let robbed = scene.join("bot", &[]);
        if !locked {
            robbed.success();
            continue;
        }
        refused(&robbed, "join state verification failed");
        let lock = scene.get("locks");
        assert_eq!(
            lock["spec"]["target"],
            serde_json::json!({"join_token": "bound"})
        );
        let failed = scene
            .cluster
            .events("join_token.bound_keypair.join_state_verification_failed");
        assert_eq!(failed.len(), 1, "{mode}");
        // The thief has a certificate, and it is worth nothing now; neither is the key.
        refused(&scene.join("bot", &[]), "JoinToken");
        scene.forget("thief");
        refused(&scene.join("thief", &[]), "JoinToken");
        let name = lock["metadata"]["name"].as_str().unwrap();
        scene.cluster.run(&["rm", &format!("lock/{name}")]);
        scene.join("thief", &[]).success();
    }
}

#[test]
fn a_lock_on_the_instance_holds_for_its_recoveries() {
    let sandbox = Sandbox::new();
    let scene = Scene::new(&sandbox, "{recovery: {limit: 9}}");
    scene
        .join("bot", &["--registration-secret", &scene.secret()])
        .success();
    let instance = scene.status()["bound_bot_instance_id"].clone();
    scene.cluster.create(&format!(
        "kind: lock\nversion: v2\nmetadata: {{name: out}}\nspec: {{target: {{bot_instance_id: \
         {instance}}}}}\n"
    ));
    scene.forget("bot");
    refused(&scene.join("bot", &[]), "BotInstanceID");
    assert_eq!(scene.status()["recovery_count"], 1);
    scene.cluster.run(&["rm", "lock/out"]);
    scene.join("bot", &[]).success();
}

/// A copy of a storage whose certificate still lives: the generation tells.
#[test]
fn a_copy_that_renews_locks_the_token_too() {
    let sandbox = Sandbox::new();
    let scene = Scene::new(&sandbox, "{recovery: {limit: 9}}");
    scene
        .join("bot", &["--registration-secret", &scene.secret()])
        .success();
    scene.copy("bot", "thief");
    scene.join("thief", &IMPATIENT).success();
    let robbed = scene.join("bot", &IMPATIENT).text();
    assert!(robbed.contains("generation mismatch"), "{robbed}");
    let lock = scene.get("locks");
    assert_eq!(lock["spec"]["target"]["join_token"], "bound");
    scene.forget("thief");
    refused(&scene.join("thief", &[]), "JoinToken");
}

#[test]
fn a_registered_key_joins_without_any_secret() {
    let sandbox = Sandbox::new();
    let scene = Scene::new(&sandbox, "{}");
    let create = |more: &[&str]| {
        let mut command = sandbox.tbot(["keypair", "create", "--format", "json"]);
        command
            .args(["--proxy-server", &scene.cluster.proxy()])
            .env("SSL_CERT_FILE", scene.cluster.web_authority())
            .args(more);
        let output = command.output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", output.text());
        let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
        shown
    };
    let storage = sandbox.path("bot");
    let stored = ["--storage", storage.to_str().unwrap()];
    let made = create(&stored);
    let line = made["public_key"].as_str().unwrap();
    assert!(line.starts_with("ssh-ed25519 "), "{line}");
    assert_eq!(create(&stored), made, "the key that is there is shown");
    assert_eq!(scene.read("bot/id_bkp.pub").trim(), line);
    let again = create(&[&stored[..], &["--overwrite"]].concat());
    assert_ne!(again, made);
    let line = again["public_key"].as_str().unwrap();
    scene.cluster.run(&["rm", "token/bound"]);
    scene.token(&format!(
        "{{onboarding: {{initial_public_key: \"{line}\"}}}}"
    ));
    assert_eq!(scene.status(), serde_json::json!({"recovery_count": 0}));
    refused(
        &scene.join("other", &["--registration-secret", "x"]),
        "not in the bot's storage",
    );
    scene.join("bot", &[]).success();
    assert_eq!(scene.status()["bound_public_key"], line);

    // A static key: in a file, or in the environment; the storage has nothing of it.
    let path = sandbox.path("static.key");
    let path = path.to_str().unwrap();
    let made = create(&["--static", "--static-key-path", path]);
    assert_eq!(create(&["--static", "--static-key-path", path]), made);
    let line = made["public_key"].as_str().unwrap();
    scene.cluster.run(&["rm", "token/bound"]);
    scene.token(&format!(
        "{{onboarding: {{initial_public_key: \"{line}\"}}, recovery: {{mode: insecure}}}}"
    ));
    for storage in ["memory-1", "memory-2"] {
        scene.join(storage, &["--static-key-path", path]).success();
        assert!(!sandbox.path(storage).join("id_bkp").exists());
    }
    let mut base64 = sandbox.command("base64");
    let base64 = base64.args(["-w0", path]).output().unwrap().success();
    let mut agent = scene.agent("memory-3", &[]);
    agent.env("TBOT_BOUND_KEYPAIR_STATIC_KEY", base64);
    agent.output().unwrap().success();
    assert_eq!(scene.status()["recovery_count"], 3);
    let shown = create(&["--static"]);
    let pem = shown["private_key"].as_str().unwrap();
    assert!(pem.starts_with("-----BEGIN PRIVATE KEY-----"), "not a key");
}

#[test]
fn a_join_uri_carries_the_secret() {
    let sandbox = Sandbox::new();
    let scene = Scene::new(&sandbox, "{onboarding: {registration_secret: \"a/b c\"}}");
    let uri = format!(
        "tbot+proxy+bound-keypair://bound:a%2Fb%20c@{}",
        scene.cluster.proxy()
    );
    let mut command = sandbox.tbot(["start", "identity", "--oneshot", "--join-uri", &uri]);
    command
        .env("SSL_CERT_FILE", scene.cluster.web_authority())
        .args([
            "--storage",
            sandbox.path("bot").to_str().unwrap(),
            "--destination",
        ])
        .arg(sandbox.path("out"));
    let log = command.output().unwrap().success();
    assert!(!log.contains("a/b c"), "{log}");
    assert_eq!(scene.status()["recovery_count"], 1);
}

/// Killed at any time while its key is replaced again and again.
#[test]
fn a_bot_that_is_killed_while_its_key_is_replaced_comes_back() {
    let sandbox = Sandbox::new();
    let scene = Scene::new(&sandbox, "{recovery: {limit: 99}}");
    scene
        .join("bot", &["--registration-secret", &scene.secret()])
        .success();
    let mut keys = std::collections::BTreeSet::new();
    for round in 0..12_u64 {
        // A wish that no rotation before has met.
        let now = sandbox
            .command("date")
            .args(["-u", "+%Y-%m-%dT%H:%M:%S.%NZ"])
            .output();
        let now = now.unwrap().success();
        scene.token(&format!(
            "{{recovery: {{limit: 99}}, rotate_after: \"{}\"}}",
            now.trim()
        ));
        let mut agent = sandbox.spawn("agent", scene.agent("bot", &IMPATIENT));
        let patience = std::time::Duration::from_millis(30 * round);
        crate::common::wait_until(std::time::Instant::now() + patience);
        agent.signal("KILL");
        agent.wait();
        keys.insert(scene.status()["bound_public_key"].to_string());
    }
    scene.join("bot", &IMPATIENT).success();
    let status = scene.status();
    assert_eq!(
        status["bound_public_key"],
        scene.read("bot/id_bkp.pub").trim()
    );
    keys.insert(status["bound_public_key"].to_string());
    assert!(keys.len() > 1, "nothing was replaced: {keys:?}");
    assert_eq!(
        scene
            .cluster
            .run(&["get", "locks", "--format", "json"])
            .trim(),
        "[]"
    );
}
