//! Clusters that are not there, do not answer, or hang up.

use std::io::Read as _;
use std::net::TcpListener;
use std::sync::mpsc;
use std::thread;

use serde_json::Value;

use super::{FRESH, RESOURCES, assert_refused, once, output, snapshot, start};
use crate::common::{Cluster, OutputText as _, Sandbox, eventually, free_port};

const TOKEN: &str = "a-token-of-the-test";

/// A configuration that joins what listens on `port`, whoever it is.
fn config(sandbox: &Sandbox, port: u16) -> String {
    format!(
        "version: v2\nauth_server: 127.0.0.1:{port}\nonboarding: {{join_method: token, token: {TOKEN}}}\n\
         storage: {{type: directory, path: {}}}\noutputs:\n{}",
        sandbox.path("bot").display(),
        output(&sandbox.path("out")),
    )
}

#[test]
fn a_cluster_that_is_not_there_is_named() {
    let sandbox = Sandbox::new();
    let port = free_port();
    let refused = once(&sandbox, &config(&sandbox, port));
    assert_refused(
        &refused,
        &[
            &format!("cannot reach 127.0.0.1:{port}"),
            "Connection refused",
        ],
    );
    assert!(!sandbox.path("out/tlscert").exists());

    // Where the log is JSON, so is the last line.
    let mut command = sandbox.tbot(["--log-format", "json", "start", "--oneshot", "-c"]);
    let refused = command.arg(sandbox.path("once.yaml")).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{}", refused.text());
    let lines = String::from_utf8(refused.stderr).unwrap();
    let lines: Vec<Value> = lines
        .lines()
        .map(|line| serde_json::from_str(line).expect(line))
        .collect();
    let last = lines.last().unwrap();
    assert_eq!(last["level"], "error");
    let message = last["message"].as_str().unwrap();
    assert!(message.contains(&format!("127.0.0.1:{port}")), "{message}");
}

#[test]
fn a_cluster_that_hangs_up_is_named() {
    let sandbox = Sandbox::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // Closing with unread bytes resets the connection.
            drop(stream);
        }
    });
    let refused = once(&sandbox, &config(&sandbox, port));
    assert_refused(&refused, &[&format!("127.0.0.1:{port}")]);
    assert!(!sandbox.path("out/tlscert").exists());
}

#[test]
fn a_cluster_that_never_answers_does_not_hold_the_agent() {
    let sandbox = Sandbox::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (sender, accepted) = mpsc::channel();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            sender.send(()).ok();
            // Reads whatever comes and answers nothing.
            thread::spawn(move || stream.read_to_end(&mut Vec::new()));
        }
    });
    let mut agent = start(&sandbox, "agent", &config(&sandbox, port));
    accepted.recv().unwrap();
    // It gives up by itself, says so, and tries again.
    agent.wait_for_log(&format!(
        "TLS with 127.0.0.1:{port} failed: no answer within 20 s"
    ));
    accepted.recv().unwrap();
    agent.signal("TERM");
    assert!(agent.wait().success(), "{}", agent.log());
}

#[test]
fn an_agent_that_waits_for_its_cluster_joins_when_it_comes() {
    let sandbox = Sandbox::new();
    let port = free_port();
    let mut agent = start(&sandbox, "agent", &config(&sandbox, port));
    agent.wait_for_log("could not be renewed");
    let resources = format!(
        "{RESOURCES}---\nkind: token\nversion: v2\nmetadata: {{name: {TOKEN}}}\nspec: {{roles: [Bot], \
         bot_name: example, join_method: token}}\n"
    );
    let _cluster = Cluster::start_with(&sandbox, &resources, port, &[]);
    agent.wait_for_log(FRESH);
    eventually("the output is written", || {
        std::fs::metadata(sandbox.path("out/tlscert"))
    });
}

#[test]
fn a_stored_identity_outlives_an_outage_and_a_restart() {
    let sandbox = Sandbox::new();
    let mut cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&sandbox.path("out"));
    once(&sandbox, &config).success();
    let before = snapshot(&sandbox.path("out"));
    cluster.stop();

    let mut agent = start(&sandbox, "agent", &config);
    agent.wait_for_log("Using the stored identity");
    // Asked to renew, it cannot, says so once, and keeps what it has.
    agent.signal("HUP");
    agent.wait_for_log("cannot reach");
    agent.check_running();
    assert_eq!(snapshot(&sandbox.path("out")), before);

    cluster.resume();
    agent.wait_for_log(FRESH);
    eventually("the output is new", || {
        if snapshot(&sandbox.path("out")) == before {
            Err("still the old one")
        } else {
            Ok(())
        }
    });
    assert_eq!(cluster.events("bot.join").len(), 1, "it joined again");
}

#[test]
fn the_cluster_is_told_which_service_fails_and_why() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot")
        + "outputs:\n"
        + &output(&sandbox.path("out"))
        + "  - {type: application, name: shop, app_name: nowhere, destination: {type: memory}}\n";
    let mut agent = start(&sandbox, "agent", &config);
    agent.wait_for_log(FRESH);
    let health = eventually("the heartbeat has come", || {
        agent.check_running();
        let shown = cluster.run(&["get", "bot_instance", "--format", "json"]);
        let shown: Value =
            serde_json::from_str(&shown).map_err(|error| format!("{error}: {shown}"))?;
        match &shown[0]["status"]["service_health"] {
            Value::Array(health) => Ok(health.clone()),
            _ => Err(shown.to_string()),
        }
    });
    let told: Vec<_> = health
        .iter()
        .map(|health| {
            [
                &health["service"]["type"],
                &health["service"]["name"],
                &health["status"],
            ]
            .map(|text| text.as_str().unwrap_or_default())
        })
        .collect();
    assert_eq!(
        told,
        [
            [
                "internal/identity",
                "identity",
                "BOT_INSTANCE_HEALTH_STATUS_HEALTHY"
            ],
            [
                "identity",
                "identity-1",
                "BOT_INSTANCE_HEALTH_STATUS_HEALTHY"
            ],
            [
                "application",
                "shop",
                "BOT_INSTANCE_HEALTH_STATUS_UNHEALTHY"
            ],
        ]
    );
    let reason = health[2]["reason"].as_str().unwrap();
    assert!(reason.contains("nowhere"), "{reason}");
    assert!(reason.len() <= 256 && !reason.contains('\n'), "{reason}");
    assert_eq!(health[0]["reason"], Value::Null);
    assert!(health[0]["updated_at"].as_str().unwrap().ends_with('Z'));
}
