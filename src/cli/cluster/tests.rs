use clap::Parser;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::embedded::{Cluster, Config};

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    cluster: ClusterArgs,
}

struct Harness {
    dir: tempfile::TempDir,
    shutdown: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

impl Harness {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::local(dir.path().join("c"), Clock::system());
        config.cluster_name = Some("test.example".to_owned());
        let cluster = Cluster::open(config).await.unwrap();
        let shutdown = CancellationToken::new();
        let token = shutdown.clone();
        let serving = tokio::spawn(async move { cluster.serve(token).await.unwrap() });
        Self {
            dir,
            shutdown,
            serving,
        }
    }

    async fn run(&self, words: &[&str]) -> Result<(String, String), String> {
        let dir = self.dir.path().join("c");
        let head = ["cluster", "--data-dir", dir.to_str().unwrap()];
        let line = Line::try_parse_from(head.iter().chain(words)).map_err(|e| e.to_string())?;
        let (mut out, mut err) = (Vec::new(), Vec::new());
        run(line.cluster, &Env::default(), &mut out, &mut err)
            .await
            .map_err(|error| format!("{error:#}"))?;
        Ok((
            String::from_utf8(out).unwrap(),
            String::from_utf8(err).unwrap(),
        ))
    }

    async fn out(&self, words: &[&str]) -> String {
        self.run(words).await.unwrap().0
    }

    async fn refused(&self, words: &[&str]) -> String {
        self.run(words).await.unwrap_err()
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.serving.await.unwrap();
    }
}

const BOT: &str = "kind: bot\nversion: v1\nmetadata: {name: example}\nspec: {roles: []}\n";

#[tokio::test]
async fn a_day_of_an_administrator() {
    let cluster = Harness::start().await;
    let refused = cluster.refused(&["tokens", "add", "--type=bot"]).await;
    assert!(refused.contains("no bot to invite"), "{refused}");
    let bot = cluster.file("bot.yaml", BOT);
    let created = cluster.out(&["create", &bot]).await;
    assert_eq!(created, "bot \"example\" has been created\n");
    let again = cluster.refused(&["create", &bot]).await;
    assert_eq!(
        again,
        "bot \"example\" already exists (use -f to replace it)"
    );
    assert_eq!(cluster.out(&["create", "-f", &bot]).await, created);

    let status = cluster.out(&["status"]).await;
    assert!(
        status.starts_with("Cluster           test.example\nVersion           18.0.0\n"),
        "{status}"
    );
    assert!(status.contains("CA pin            sha256:"), "{status}");

    let roles = ["bots", "update", "example", "--add-roles", "missing"];
    let (updated, note) = cluster.run(&roles).await.unwrap();
    assert!(updated.contains("Roles: missing"), "{updated}");
    assert!(
        note.starts_with("note: there is no role \"missing\" yet"),
        "{note}"
    );
    let bots = cluster.out(&["bots", "ls"]).await;
    assert_eq!(
        bots,
        "Bot     User        Roles\n------- ----------- -------\nexample bot-example missing\n"
    );

    let invite = cluster
        .out(&["tokens", "add", "--type=bot", "--format=json"])
        .await;
    let invite: Value = serde_json::from_str(&invite).unwrap();
    let secret = invite["token"].as_str().unwrap();
    assert_eq!(secret.len(), 32);
    assert_eq!(invite["roles"], json!(["Bot"]));
    let listed = cluster.out(&["tokens", "ls"]).await;
    assert!(
        !listed.contains(secret) && listed.contains("********"),
        "{listed}"
    );
    let listed = cluster.out(&["tokens", "ls", "--with-secrets"]).await;
    assert!(listed.contains(secret), "{listed}");
    cluster.out(&["tokens", "rm", secret]).await;
    assert_eq!(
        cluster.out(&["tokens", "ls"]).await,
        "No active tokens found.\n"
    );
    let text = cluster
        .out(&["tokens", "add", "--bot", "example", "--ttl", "5m"])
        .await;
    assert!(text.starts_with("The invite token: "), "{text}");
    assert!(text.contains("expire in 5 minutes"), "{text}");

    let locked = cluster
        .out(&["lock", "--bot", "example", "--message", "no", "--ttl=1h"])
        .await;
    let lock = locked.split('"').nth(1).unwrap();
    let shown = cluster.out(&["get", "locks", "--format=json"]).await;
    let shown: Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(shown[0]["spec"]["target"], json!({"user": "bot-example"}));
    assert_eq!(shown[0]["spec"]["message"], "no");
    let removed = cluster.out(&["rm", &format!("lock/{lock}")]).await;
    assert_eq!(removed, format!("lock \"{lock}\" has been deleted\n"));

    let yaml = cluster.out(&["get", "bot/example"]).await;
    assert!(
        yaml.starts_with("kind: bot\nmetadata:\n  name: example\n"),
        "{yaml}"
    );
    // What is printed can be created again.
    let copy = cluster.file("copy.yaml", &yaml);
    cluster.out(&["create", "-f", &copy]).await;
    // One of its invitations was not used.
    assert_eq!(
        cluster.out(&["rm", "bot/example"]).await,
        "bot \"example\" has been deleted (its tokens stay, but let nobody in: see \
         `tbot cluster tokens ls`)\n"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn locks_are_made_and_removed_by_their_target() {
    let cluster = Harness::start().await;
    cluster
        .out(&["create", &cluster.file("bot.yaml", BOT)])
        .await;
    let targets = [
        (["--bot", "example"], json!({"user": "bot-example"})),
        (["--user", "bot-other"], json!({"user": "bot-other"})),
        (["--instance", "i"], json!({"bot_instance_id": "i"})),
        (["--role", "access"], json!({"role": "access"})),
        (["--join-token", "t"], json!({"join_token": "t"})),
    ];
    let locked = async || {
        let locks = cluster.out(&["get", "locks", "--format=json"]).await;
        let locks: Vec<Value> = serde_json::from_str(&locks).unwrap();
        locks
            .into_iter()
            .map(|lock| lock["spec"]["target"].clone())
            .collect::<Vec<_>>()
    };
    for (flag, _) in &targets {
        cluster.out(&["lock", flag[0], flag[1]]).await;
    }
    cluster.out(&["lock", "--bot", "example"]).await;
    for (index, (flag, target)) in targets.iter().enumerate() {
        assert!(locked().await.contains(target), "{target}");
        let removed = cluster.out(&["unlock", flag[0], flag[1]]).await;
        assert_eq!(removed.lines().count(), if index == 0 { 2 } else { 1 });
        assert!(!locked().await.contains(target), "{target}");
    }
    let refused = cluster.refused(&["unlock", "--bot", "example"]).await;
    assert!(
        refused.starts_with("nothing locks {\"user\":\"bot-example\"}"),
        "{refused}"
    );
    cluster.stop().await;
}

#[tokio::test]
async fn a_rotation_goes_on_by_command() {
    let cluster = Harness::start().await;
    let status = async |kind: &str| {
        let status = cluster.out(&["status"]).await;
        let line = status.lines().find(|line| line.starts_with(kind)).unwrap();
        line.to_owned()
    };
    assert!(status("host CA").await.ends_with("never updated"));
    let begun = cluster.out(&["rotate", "--type=host", "--manual"]).await;
    assert!(
        begun.starts_with("The rotation of the host authority has begun."),
        "{begun}"
    );
    assert!(
        status("host CA")
            .await
            .contains("initialized (mode: manual, started: ")
    );
    for (phase, shown) in [
        ("update_clients", "rotating clients"),
        ("update_servers", "rotating servers"),
        ("rollback", "rolling back"),
        ("standby", "never updated"),
    ] {
        // A pin for each key that agents are told of.
        let pins = cluster.out(&["status"]).await.matches("sha256:").count();
        assert_eq!(pins, 2, "before {phase}");
        let told = cluster
            .out(&["rotate", "--type=host", "--phase", phase])
            .await;
        assert!(
            told.contains(&format!("in rotation phase {phase:?} now")),
            "{told}"
        );
        assert!(status("host CA").await.contains(shown), "{phase}");
    }
    let at_once = ["rotate", "--type=jwt", "--grace-period=0s"];
    let told = cluster.out(&at_once).await;
    assert!(
        told.starts_with("The jwt authority has new keys now."),
        "{told}"
    );
    assert!(
        status("jwt CA").await.contains("rotated 2"),
        "{}",
        status("jwt CA").await
    );
    cluster.out(&["rotate", "--type=db"]).await;
    assert!(status("db CA").await.contains("mode: auto"));
    cluster.stop().await;
}

#[tokio::test]
async fn bad_commands_are_refused_with_a_remedy() {
    let cluster = Harness::start().await;
    let bad = cluster.file(
        "bad.yaml",
        "kind: bot\nversion: v1\nmetadata: {}\nspec: {x: 1}\n",
    );
    let cases: &[(&[&str], &str)] = &[
        (&["create", &bad], "`name` is required"),
        (
            &["create", "/nowhere/x.yaml"],
            "cannot read /nowhere/x.yaml",
        ),
        (&["get", "bot/none"], "bot \"none\" is not found"),
        (&["get", "authority_keys"], "is no kind of resource here"),
        (&["get", "web_authority/web"], "is no kind of resource here"),
        (&["rm", "bot"], "write KIND/NAME"),
        (&["rm", "bot/none"], "is not found"),
        (&["tokens", "add", "--type=node"], "only bots join"),
        (&["tokens", "add", "--ttl=5"], "the unit is missing"),
        (&["tokens", "add", "--bot=none"], "\"none\" is not found"),
        (&["lock", "--bot", "none"], "\"none\" is not found"),
        (&["lock"], "required"),
        (
            &["lock", "--bot", "a", "--instance", "b"],
            "cannot be used with",
        ),
        (&["serve", "--tls-cert", "x"], "--tls-key"),
        (&["unlock"], "required"),
        (&["unlock", "--bot", "none"], "\"none\" is not found"),
        (&["rotate"], "--type"),
        (
            &["rotate", "--type=openssh"],
            "no authority of this cluster",
        ),
        (
            &["rotate", "--type=host", "--phase=end"],
            "no phase of a rotation",
        ),
        (
            &["rotate", "--type=host", "--phase=standby"],
            "possible: init",
        ),
    ];
    for (words, expected) in cases {
        let error = cluster.refused(words).await;
        assert!(error.contains(expected), "{words:?}: {error}");
    }
    cluster.stop().await;
}

#[test]
fn where_the_data_is_without_a_flag() {
    let of = |root, pairs: &[(&str, &str)]| {
        let env: Env = pairs.iter().copied().collect();
        default_data_dir(root, &env)
            .map(|dir| dir.display().to_string())
            .ok()
    };
    let home = [("HOME", "/home/a")];
    assert_eq!(of(true, &home).unwrap(), "/var/lib/tbot-cluster");
    assert_eq!(
        of(false, &home).unwrap(),
        "/home/a/.local/share/tbot-cluster"
    );
    let data = [("HOME", "/home/a"), ("XDG_DATA_HOME", "/data")];
    assert_eq!(of(false, &data).unwrap(), "/data/tbot-cluster");
    assert_eq!(of(false, &[]), None);
}
