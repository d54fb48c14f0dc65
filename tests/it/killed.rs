//! The agent, killed at random moments while it renews.

use std::time::Duration;

use crate::common::{Cluster, PLAIN_BOT, Sandbox};

/// How often the agent is killed.
const KILLS: u32 = 20;

#[test]
fn an_agent_killed_while_it_renews_goes_on_with_its_identity() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, PLAIN_BOT);
    let token = cluster.invite("example", "10m");
    // The counter lets a token join only once: an identity that got lost could not come back.
    let config = cluster.config(&token, "bot")
        + &format!(
            "credential_ttl: 10m\nrenewal_interval: 1ms\noutputs:\n  - {{type: identity, ssh_config: off, \
             destination: {{type: directory, path: {}}}, credential_ttl: 10m, renewal_interval: 5m}}\n",
            sandbox.path("out").display()
        );
    let config = sandbox.write("tbot.yaml", config);
    let mut generation = 0;
    for kill in 0..=KILLS {
        let mut command = sandbox.tbot(["start", "-c"]);
        command.arg(&config);
        let mut agent = sandbox.spawn("agent", command);
        if kill > 0 {
            agent.wait_for_log("Using the stored identity");
        }
        agent.wait_for_log("The bot has a fresh identity");
        std::thread::sleep(random_wait());
        agent.check_running();
        agent.signal("KILL");
        agent.wait();
        let log = agent.log();
        assert!(!log.contains("WARN"), "after {kill} kills:\n{log}");
        let reached = last_generation(&log);
        assert!(reached > generation, "after {kill} kills:\n{log}");
        generation = reached;
    }
    assert_eq!(cluster.events("bot.join").len(), 1);
    assert!(cluster.events("cert.generation_mismatch").is_empty());
    assert!(cluster.run(&["get", "lock"]).trim().is_empty());
}

/// Up to two renewals long. The moment of the kill is what is random here, not a state waited for.
fn random_wait() -> Duration {
    let [high, low] = tbot::crypto::random::<2>();
    Duration::from_micros(u64::from(u16::from_be_bytes([high, low])) * 3 / 2)
}

fn last_generation(log: &str) -> u64 {
    log.rsplit_once("generation:")
        .and_then(|(_, rest)| rest.split_whitespace().next()?.parse().ok())
        .expect("a generation in the log")
}
