//! Bot storages that are damaged, foreign, or in use.

use super::{FRESH, RESOURCES, assert_refused, once, output, snapshot, start};
use crate::common::{Cluster, OutputText as _, Sandbox};

#[test]
fn a_second_agent_on_one_storage_is_turned_away() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&sandbox.path("out"));
    let mut first = start(&sandbox, "first", &config);
    first.wait_for_log(FRESH);
    let before = snapshot(&sandbox.path("bot"));
    assert_refused(
        &once(&sandbox, &config),
        &[
            sandbox.path("bot").to_str().unwrap(),
            "in use by another process: is another tbot running",
        ],
    );
    assert_eq!(snapshot(&sandbox.path("bot")), before);
    // The first is unharmed: it still renews.
    first.signal("HUP");
    first.wait_for_log("generation:2");
    first.signal("TERM");
    assert!(first.wait().success());
    // And when it is gone, so is its lock.
    once(&sandbox, &config).success();
}

#[test]
fn a_torn_slot_costs_nothing() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&sandbox.path("out"));
    once(&sandbox, &config).success();
    let bot = sandbox.path("bot");
    let mut torn = 0;
    for name in [".slot-0", ".slot-1"] {
        if let Ok(bytes) = std::fs::read(bot.join(name)) {
            std::fs::write(bot.join(name), &bytes[..bytes.len() / 2]).unwrap();
            torn += 1;
        }
    }
    assert!(torn > 0);
    // The files that other agents read still hold the identity.
    let text = once(&sandbox, &config).success();
    assert!(text.contains("is not used"), "{text}");
    assert!(text.contains("Using the stored identity"), "{text}");
    assert_eq!(cluster.events("bot.join").len(), 1);
}

#[test]
fn a_storage_without_any_usable_part_is_told_and_joined_anew() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&sandbox.path("out"));
    once(&sandbox, &config).success();
    let bot = sandbox.path("bot");
    for name in snapshot(&bot).keys() {
        std::fs::write(bot.join(name), "of somebody else").unwrap();
    }
    let issued = snapshot(&sandbox.path("out"));
    let refused = once(&sandbox, &config);
    assert_refused(&refused, &["joins one bot once"]);
    assert!(
        refused
            .text()
            .contains("files of another agent are not used"),
        "{}",
        refused.text()
    );
    // What cannot be read is left for whoever can, and the outputs stay.
    assert_eq!(
        std::fs::read(bot.join("tlscert")).unwrap(),
        b"of somebody else"
    );
    assert_eq!(snapshot(&sandbox.path("out")), issued);
    // The remedy of the line works.
    let config = config.replace(&token, &cluster.invite("example", "10m"));
    once(&sandbox, &config).success();
}

#[test]
fn a_storage_that_is_a_file_is_named_and_kept() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let file = sandbox.write("bot", "mine");
    let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&sandbox.path("out"));
    assert_refused(
        &once(&sandbox, &config),
        &["bot storage", file.to_str().unwrap()],
    );
    assert_eq!(std::fs::read_to_string(file).unwrap(), "mine");
    assert_eq!(cluster.events("bot.join").len(), 0);
}
