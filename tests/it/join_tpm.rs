//! Join method `tpm` with a software TPM that a manufacturer's authority certified: the built agent and
//! the built cluster.

use std::path::Path;
use std::process::Output;

use crate::common::{Cluster, OutputText as _, Sandbox, Tpm, skip};
use crate::join_methods::Case;

const RESOURCES: &str = "
kind: role
version: v7
metadata: {name: reader}
spec: {allow: {}}
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [reader]}
";

/// The case of [`crate::join_methods`].
pub(crate) fn case(sandbox: &Sandbox) -> Case {
    let tpm = Tpm::make(sandbox, "tpm", true);
    let (process, socket) = tpm.start();
    let identity = String::from_utf8(identify(sandbox, &socket, &[]).stdout).unwrap();
    let hash = value(&identity, "EK Public Hash:");
    let spec = |hash: &str| {
        Some(format!(
            "{{tpm: {{allow: [{{ek_public_hash: '{hash}'}}]}}}}"
        ))
    };
    Case {
        spec: spec(&hash),
        elsewhere: spec("0000"),
        agent: vec![("TBOT_TPM".to_owned(), socket.display().to_string())],
        attribute: Some(("/tpm/ek_pub_hash", String::leak(hash))),
        keep: vec![Box::new(process)],
        ..Case::default()
    }
}

/// A token for TPMs; `rule` and `authority` (PEM) say which.
fn token(name: &str, rule: &str, authority: Option<&str>) -> String {
    let mut text = format!(
        "kind: token\nversion: v2\nmetadata: {{name: {name}}}\nspec:\n  roles: [Bot]\n  bot_name: example\n  \
         join_method: tpm\n  tpm:\n    allow: [{rule}]\n"
    );
    if let Some(pem) = authority {
        text.push_str("    ekcert_allowed_cas:\n    - |\n");
        for line in pem.lines() {
            text.push_str(&format!("      {line}\n"));
        }
    }
    text
}

fn join(sandbox: &Sandbox, cluster: &Cluster<'_>, token: &str, tpm: &Path) -> Output {
    let config = cluster
        .config(token, &format!("bot-{token}"))
        .replace("join_method: token", "join_method: tpm")
        + &format!(
            "oneshot: true\noutputs:\n- type: identity\n  destination: {{type: directory, path: {}}}\n",
            sandbox.path("out").display()
        );
    let config = sandbox.write(&format!("{token}.yaml"), config);
    let mut agent = sandbox.tbot(["start", "-c"]);
    agent
        .arg(config)
        .env("TBOT_TPM", tpm)
        .env("SSL_CERT_FILE", cluster.web_authority())
        .output()
        .expect("tbot")
}

fn identify(sandbox: &Sandbox, tpm: &Path, more: &[&str]) -> Output {
    let mut command = sandbox.tbot(["tpm", "identify"]);
    command
        .args(more)
        .env("TBOT_TPM", tpm)
        .output()
        .expect("tbot")
}

fn value(text: &str, key: &str) -> String {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.unwrap_or_else(|| panic!("no {key:?} in {text}"))
        .trim()
        .to_owned()
}

#[test]
fn a_certified_tpm_joins_and_is_refused_where_it_should_be() {
    if let Some(why) = Tpm::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let mine = Tpm::make(&sandbox, "mine", true);
    // The real tools say what the key is.
    let key = mine.tools("tpm2_readpublic -Q -c 0x81010001 -f der -o ek.der && sha256sum < ek.der");
    let (_running, socket) = mine.start();
    let identity = identify(&sandbox, &socket, &[]);
    let identity = String::from_utf8(identity.stdout).unwrap();
    let hash = value(&identity, "EK Public Hash:");
    assert_eq!(hash, key.split_whitespace().next().unwrap());
    assert_eq!(value(&identity, "EK Certificate Detected:"), "true");
    let serial = value(&identity, "EK Certificate Serial:");
    let debug = identify(&sandbox, &socket, &["--debug"]);
    let debug = String::from_utf8(debug.stdout).unwrap();
    assert!(
        debug.starts_with(&identity) && debug.contains("-----BEGIN CERTIFICATE-----"),
        "{debug}"
    );

    let stranger = Tpm::make(&sandbox, "stranger", true);
    let (mine_ca, other_ca) = (mine.authority(), stranger.authority());
    let by_hash = format!("{{ek_public_hash: {hash}}}");
    let both = format!(
        "{{description: rack 7, ek_public_hash: {hash}, ek_certificate_serial: \"{serial}\"}}"
    );
    let tokens = [
        token("by-hash", &by_hash, None),
        token("by-both", &both, Some(&mine_ca)),
        token("other-ca", &by_hash, Some(&other_ca)),
        token("other-hash", "{ek_public_hash: aabb}", None),
        token(
            "other-serial",
            "{ek_certificate_serial: \"01:02\"}",
            Some(&mine_ca),
        ),
    ];
    let cluster = Cluster::start(
        &sandbox,
        &format!("{RESOURCES}---\n{}", tokens.join("---\n")),
    );

    for (token, verified) in [("by-hash", false), ("by-both", true)] {
        join(&sandbox, &cluster, token, &socket).success();
        let event = cluster.events("bot.join").pop().unwrap();
        assert_eq!(event["success"], true, "{event}");
        assert_eq!(event["method"], "tpm", "{event}");
        let seen = &event["attributes"];
        assert_eq!(seen["ek_pub_hash"], hash.as_str(), "{event}");
        assert_eq!(seen["ek_cert_serial"], serial.as_str(), "{event}");
        assert_eq!(seen["ek_cert_verified"], verified, "{event}");
        // It comes back with what it has: the identity is renewed by the same proof.
        join(&sandbox, &cluster, token, &socket).success();
    }
    for (token, expected) in [
        ("other-ca", "verifying EK cert"),
        (
            "other-hash",
            "validated tpm attributes did not match any allow rules",
        ),
        (
            "other-serial",
            "validated tpm attributes did not match any allow rules",
        ),
    ] {
        let refused = join(&sandbox, &cluster, token, &socket);
        assert_eq!(refused.status.code(), Some(1), "{}", refused.text());
        let text = refused.text();
        assert!(
            text.contains(expected) && text.contains("tbot tpm identify"),
            "{token}: {text}"
        );
        let event = cluster.events("bot.join").pop().unwrap();
        assert_eq!(event["success"], false, "{event}");
        assert_eq!(event["attributes"]["ek_pub_hash"], hash.as_str(), "{event}");
    }

    // Another TPM, certified by the same kind of authority.
    let (_other, socket) = stranger.start();
    std::fs::remove_dir_all(sandbox.path("bot-by-both")).unwrap();
    let refused = join(&sandbox, &cluster, "by-both", &socket);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.text());
}

#[test]
fn a_tpm_without_certificate_joins_by_its_key_unless_one_is_wanted() {
    if let Some(why) = Tpm::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let bare = Tpm::make(&sandbox, "bare", false);
    let certified = Tpm::make(&sandbox, "certified", true);
    let (_running, socket) = bare.start();
    let identity = String::from_utf8(identify(&sandbox, &socket, &[]).stdout).unwrap();
    assert_eq!(value(&identity, "EK Certificate Detected:"), "false");
    assert!(!identity.contains("Serial"), "{identity}");
    let rule = format!(
        "{{ek_public_hash: {}}}",
        value(&identity, "EK Public Hash:")
    );
    let tokens = [
        token("any", &rule, None),
        token("certified", &rule, Some(&certified.authority())),
    ];
    let cluster = Cluster::start(
        &sandbox,
        &format!("{RESOURCES}---\n{}", tokens.join("---\n")),
    );
    join(&sandbox, &cluster, "any", &socket).success();
    let refused = join(&sandbox, &cluster, "certified", &socket);
    assert!(
        refused.text().contains("did not provide an EKCert"),
        "{}",
        refused.text()
    );
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn a_tpm_that_cannot_is_told_with_the_remedy() {
    if let Some(why) = Tpm::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let absent = identify(&sandbox, &sandbox.path("none"), &[]);
    assert_eq!(absent.status.code(), Some(1));
    assert!(absent.text().contains("No such file"), "{}", absent.text());
    let none = sandbox.tbot(["tpm", "identify"]).output().unwrap();
    if !Path::new("/dev/tpm0").exists() {
        assert!(none.text().contains("/dev/tpmrm0"), "{}", none.text());
        assert_eq!(none.status.code(), Some(1));
    }

    let tpm = Tpm::make(&sandbox, "tpm", true);
    // Locked out after wrong passwords: what joining uses has none, so it goes on.
    tpm.tools(
        "tpm2_dictionarylockout -s --max-tries=1 --recovery-time=1000 --lockout-recovery-time=1000\n\
         tpm2_createprimary -Q -C o -p right -c primary.ctx\n\
         ! tpm2_create -Q -C primary.ctx -P wrong -u key.pub -r key.priv\n\
         tpm2_getcap properties-variable | grep 'inLockout: *1'",
    );
    let (running, socket) = tpm.start();
    let identity = String::from_utf8(identify(&sandbox, &socket, &[]).stdout).unwrap();
    let rule = format!(
        "{{ek_public_hash: {}}}",
        value(&identity, "EK Public Hash:")
    );
    let cluster = Cluster::start(
        &sandbox,
        &format!("{RESOURCES}---\n{}", token("mine", &rule, None)),
    );
    join(&sandbox, &cluster, "mine", &socket).success();
    drop(running);

    tpm.tools("tpm2_changeauth -Q -c e secret");
    std::fs::remove_dir_all(sandbox.path("bot-mine")).unwrap();
    let (_running, socket) = tpm.start();
    let refused = join(&sandbox, &cluster, "mine", &socket);
    assert!(
        refused
            .text()
            .contains("endorsement hierarchy has a password"),
        "{}",
        refused.text()
    );
    assert_eq!(refused.status.code(), Some(1));
}
