//! `tbot ssh-proxy-command`, as OpenSSH starts it.

use crate::common::{OutputText as _, Sandbox};

/// What `ssh_config` writes, for the destination `dir`.
fn words(dir: &str) -> Vec<String> {
    [
        "ssh-proxy-command",
        &format!("--destination-dir={dir}"),
        "--proxy-server=localhost:1",
        "--cluster=example.org",
        "--tls-routing",
        "--no-connection-upgrade",
        "--resume",
        "--user=root",
        "--host=node.example.org",
        "--port=22",
    ]
    .map(str::to_owned)
    .to_vec()
}

#[test]
fn without_an_identity_it_says_where_one_should_be() {
    let sandbox = Sandbox::new();
    sandbox.write("garbage/identity", "no identity");
    sandbox.write(
        "binary/identity",
        [0x00, 0xff, 0xfe].repeat(1024).as_slice(),
    );
    for (dir, part) in [
        (
            "missing",
            "missing/identity; is it in the destination of an `identity` output",
        ),
        (
            "garbage",
            "garbage/identity is no identity: its private key",
        ),
        ("binary", "binary/identity"),
    ] {
        let failed = sandbox.tbot(words(dir)).output().unwrap();
        crate::bad_input::assert_refused(&failed, &[part]);
        assert!(failed.stdout.is_empty(), "{}", failed.text());
    }
}

#[test]
fn wrong_flags_are_told() {
    let sandbox = Sandbox::new();
    let without = |flag: &str| {
        let mut words = words("identity");
        words.retain(|word| !word.starts_with(flag));
        words
    };
    let with = |flag: &str| {
        let mut words = words("identity");
        words.push(flag.to_owned());
        words
    };
    for (words, part) in [
        (without("--user"), "--user"),
        (without("--host"), "--host"),
        (without("--proxy-server"), "--proxy-server"),
        (without("--tls-routing"), "--tls-routing"),
        (without("--no-connection-upgrade"), "--connection-upgrade"),
        (
            with("--proxy-server=localhost"),
            "expected host:port, such as localhost:443",
        ),
        (with("--proxy-templates=/t.yaml"), "--proxy-templates"),
        (with("--nothing"), "--nothing"),
    ] {
        let refused = sandbox.tbot(words).output().unwrap();
        assert_eq!(refused.status.code(), Some(2), "{}", refused.text());
        assert!(refused.text().contains(part), "{part}: {}", refused.text());
    }
}
