//! Joins that a cluster refuses, or that the agent does not even ask for.

use std::time::{Duration, Instant};

use super::{RESOURCES, assert_mistaken, assert_refused, once, output, snapshot};
use crate::common::{Cluster, Moto, OutputText as _, Sandbox, skip, wait_until};

#[test]
fn a_token_that_does_not_count_is_refused_with_the_way_to_a_new_one() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let expired = cluster.invite("example", "1s");
    let over = Instant::now() + Duration::from_secs(2);
    let revoked = cluster.invite("example", "10m");
    cluster.run(&["tokens", "rm", &revoked]);
    let good = cluster.invite("example", "10m");
    wait_until(over);
    let out = sandbox.path("out");
    for (case, token) in [
        ("unknown", "never-heard-of-it"),
        ("expired", &expired),
        ("revoked", &revoked),
    ] {
        let config = cluster.config(token, case) + "outputs:\n" + &output(&out);
        let refused = once(&sandbox, &config);
        assert_refused(
            &refused,
            &[
                "token expired or not found",
                "make a new one with `tctl tokens add --type=bot`",
            ],
        );
        assert!(
            !refused.text().contains(token),
            "the token is shown:\n{}",
            refused.text()
        );
        assert!(!sandbox.path(case).join("tlscert").exists(), "{case}");
        assert!(!out.join("tlscert").exists(), "{case}");
    }

    // The good one was touched by none of this; it lets one bot in, not two.
    let config = cluster.config(&good, "good") + "outputs:\n" + &output(&out);
    once(&sandbox, &config).success();
    let before = snapshot(&out);
    let config = cluster.config(&good, "second") + "outputs:\n" + &output(&out);
    assert_refused(&once(&sandbox, &config), &["joins one bot once"]);
    assert_eq!(snapshot(&out), before);
}

#[test]
fn a_token_file_that_cannot_be_read_is_named() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let missing = sandbox.path("no-such-token");
    let config = cluster.config(missing.to_str().unwrap(), "bot")
        + "outputs:\n"
        + &output(&sandbox.path("out"));
    assert_refused(
        &once(&sandbox, &config),
        &["join token: cannot read", "no-such-token", "No such file"],
    );
}

#[test]
fn a_pin_of_another_cluster_stops_the_agent_before_it_asks() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot") + "outputs:\n" + &output(&sandbox.path("out"));
    let other = config.replace(&cluster.pin(), &format!("sha256:{}", "ab".repeat(32)));
    assert_ne!(config, other);
    assert_refused(
        &once(&sandbox, &other),
        &[
            "which is not among ca_pins",
            &cluster.pin(),
            "compare with `tctl status`",
        ],
    );
    // The cluster was shown nothing: no attempt is on record, and the token still lets the bot in.
    assert_eq!(cluster.events("bot.join"), Vec::<serde_json::Value>::new());
    once(&sandbox, &config).success();
    assert_eq!(cluster.events("bot.join").len(), 1);
}

#[test]
fn an_aws_identity_that_no_rule_lets_in_is_told_what_to_compare() {
    let sandbox = Sandbox::new();
    let Some(moto) = Moto::start(&sandbox, "teleport-bot-role", "i-0abc123") else {
        return skip("the Python environment is missing: make setup");
    };
    let arn = format!(
        "arn:aws:sts::{}:assumed-role/teleport-bot-role/i-*",
        Moto::ACCOUNT
    );
    let token = |name: &str, account: &str, arn: &str| {
        format!(
            "---\nkind: token\nversion: v2\nmetadata: {{name: {name}}}\nspec: {{roles: [Bot], \
             bot_name: example, join_method: iam, allow: [{{aws_account: \"{account}\", \
             aws_arn: \"{arn}\"}}]}}\n"
        )
    };
    let resources = [
        RESOURCES.to_owned(),
        token("right", Moto::ACCOUNT, &arn),
        token("other-account", "999999999999", &arn),
        token(
            "other-arn",
            Moto::ACCOUNT,
            &arn.replace("/i-*", "/i-0abc12"),
        ),
        token(
            "other-role",
            Moto::ACCOUNT,
            &arn.replace("teleport-bot-role", "another-role"),
        ),
    ]
    .concat();
    let endpoint = moto.url();
    let cluster = Cluster::start_with(
        &sandbox,
        &resources,
        crate::common::free_port(),
        &["--sts-endpoint", &endpoint],
    );
    let run = |token: &str, more: &[(&str, &str)]| {
        let config = cluster
            .config(token, "bot")
            .replace("join_method: token", "join_method: iam")
            + "outputs:\n"
            + &output(&sandbox.path("out"));
        let path = sandbox.write("iam.yaml", config);
        let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
        command.arg(path).envs(moto.environment());
        for (name, value) in more {
            if value.is_empty() {
                command.env_remove(name);
            } else {
                command.env(name, value);
            }
        }
        command.output().unwrap()
    };
    let compare = "as `aws sts get-caller-identity` prints them";
    for wrong in ["other-account", "other-arn", "other-role"] {
        assert_refused(
            &run(wrong, &[]),
            &["did not match any allow rules", "i-0abc123", compare],
        );
    }
    assert_refused(
        &run("right", &[("AWS_SECRET_ACCESS_KEY", "not-the-secret")]),
        &["SignatureDoesNotMatch"],
    );
    let nothing = [
        ("AWS_ACCESS_KEY_ID", ""),
        ("AWS_SECRET_ACCESS_KEY", ""),
        ("AWS_SESSION_TOKEN", ""),
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    assert_refused(
        &run("right", &nothing),
        &["no AWS credentials", "Attach an IAM role to this machine"],
    );
    // A token of one method does not open the door of another.
    let config = cluster.config("right", "bot") + "outputs:\n" + &output(&sandbox.path("out"));
    assert_refused(
        &once(&sandbox, &config),
        &[
            "client requested join method token, provision token only supports method iam",
            "check onboarding.join_method",
        ],
    );
    assert!(!sandbox.path("bot/tlscert").exists());
    assert!(!sandbox.path("out/tlscert").exists());
    run("right", &[]).success();
    assert!(sandbox.path("out/tlscert").exists());
}

#[test]
fn a_token_for_others_than_bots_is_refused_where_it_is_made() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let file = sandbox.write(
        "node.yaml",
        "kind: token\nversion: v2\nmetadata: {name: node}\nspec: {roles: [Node], bot_name: example}\n",
    );
    let mut command = sandbox.tbot(["cluster", "--data-dir"]);
    command.arg(sandbox.path("cluster")).arg("create").arg(file);
    let refused = command.output().unwrap();
    assert_mistaken(
        &refused,
        &[
            "node.yaml:4:",
            "\"Node\" cannot join this cluster",
            "write `roles: [Bot]`",
        ],
    );
    assert!(!cluster.run(&["tokens", "ls"]).contains("node"));
}

#[test]
fn what_a_credential_process_complains_of_is_not_repeated() {
    let sandbox = Sandbox::new();
    let profile = sandbox.write(
        "aws-config",
        "[default]\ncredential_process = sh -c 'echo its-secret >&2; exit 3'\n",
    );
    let config = "version: v2\nauth_server: localhost:1\nonboarding: {join_method: iam, token: x}\n\
         storage: {type: memory}\noutputs: [{type: identity, destination: {type: memory}}]\n";
    let path = sandbox.write("iam.yaml", config);
    let mut command = sandbox.tbot(["--debug", "start", "--oneshot", "-c"]);
    command
        .arg(path)
        .env("AWS_CONFIG_FILE", profile)
        .env("AWS_REGION", "us-east-1");
    let refused = command.output().unwrap();
    assert_refused(
        &refused,
        &["no AWS credentials", "external process exited with code"],
    );
    assert!(!refused.text().contains("its-secret"), "{}", refused.text());
}
