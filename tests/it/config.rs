//! Configuration files that are wrong, and what the user is told; `configure` against what
//! upstream's own agent printed.
//!
//! `TBOT_UPDATE_GOLDEN=1` rewrites the expected texts; the difference is then reviewed.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tbot::config::{self, Overlay, Source};
use tbot::env::Env;

/// A token in the files that no message may repeat.
const CANARY: &str = "hunter2-canary";

fn golden(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(path)
}

fn load(name: &str, text: String) -> Result<config::Loaded, config::Invalid> {
    let source = Source {
        name: name.to_owned(),
        text,
    };
    config::load(Some(&source), &Overlay::default(), &Env::default())
}

/// The lists of what exists grow with every kind; the expected texts should not.
fn without_registries(text: String) -> String {
    let kinds: [Vec<&str>; 3] = [
        tbot::services::KINDS
            .iter()
            .map(|kind| kind.name())
            .collect(),
        tbot::destination::KINDS
            .iter()
            .map(|kind| kind.name())
            .collect(),
        tbot::join::METHODS
            .iter()
            .map(|method| method.name())
            .collect(),
    ];
    kinds.iter().fold(text, |text, names| {
        let quoted: Vec<String> = names.iter().map(|name| format!("{name:?}")).collect();
        text.replace(&format!("here: {}", quoted.join(", ")), "here: …")
            .replace(&format!("one of {}", names.join(", ")), "one of …")
    })
}

fn tbot(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tbot"))
        .args(args)
        .env_clear()
        .output()
        .unwrap()
}

#[test]
fn bad_files_are_told_what_is_wrong() {
    let mut seen = 0;
    let mut wrong = Vec::new();
    for entry in std::fs::read_dir(golden("config/bad")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        seen += 1;
        let name = path.file_name().unwrap().to_str().unwrap();
        let told = match load(name, std::fs::read_to_string(&path).unwrap()) {
            Ok(_) => "accepted\n".to_owned(),
            Err(invalid) => format!("{invalid}\n"),
        };
        let told = without_registries(told);
        assert!(!told.contains(CANARY), "{name} shows a secret: {told}");
        let expected = path.with_extension("stderr");
        if std::env::var_os("TBOT_UPDATE_GOLDEN").is_some() {
            std::fs::write(&expected, &told).unwrap();
        }
        let expected = std::fs::read_to_string(&expected).unwrap_or_default();
        if told != expected {
            wrong.push(format!("{name}:\n--- expected\n{expected}--- told\n{told}"));
        }
        assert_ne!(told, "accepted\n", "{name} is accepted");
    }
    assert!(seen >= 25, "only {seen} files");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_huge_file_is_refused_by_its_size() {
    let text = format!("version: v2\n# {}\n", "x".repeat(2 << 20));
    let told = load("huge.yaml", text).unwrap_err().to_string();
    assert!(told.starts_with("huge.yaml: error: "), "{told}");
    assert!(told.contains("at most 1048576 bytes"), "{told}");
}

#[test]
fn configure_prints_what_upstream_prints() {
    let shared = [
        "--proxy-server",
        "example.teleport.sh:443",
        "--join-method",
        "iam",
        "--token",
        "example-bot",
    ];
    for (kind, own) in [
        (
            "workload-identity-api",
            ["--name-selector", "n", "--listen", "unix:///x.sock"].as_slice(),
        ),
        ("identity", &["--destination", "/opt/machine-id"]),
        (
            "application",
            &["--destination", "/opt/machine-id", "--app", "a"],
        ),
        (
            "database",
            &[
                "--destination",
                "/opt/machine-id",
                "--service",
                "s",
                "--username",
                "u",
                "--database",
                "d",
            ],
        ),
        (
            "kubernetes",
            &[
                "--destination",
                "/opt/machine-id",
                "--kubernetes-cluster",
                "k",
            ],
        ),
        (
            "kubernetes/v2",
            &[
                "--destination",
                "/opt/machine-id",
                "--label-selector",
                "env=a,b=c",
                "--name-selector",
                "n",
            ],
        ),
        (
            "workload-identity-aws-roles-anywhere",
            &[
                "--destination",
                "/opt/machine-id",
                "--name-selector",
                "n",
                "--role-arn",
                "arn:aws:iam::1:role/r",
                "--profile-arn",
                "arn:aws:rolesanywhere:us-east-1:1:profile/p",
                "--trust-anchor-arn",
                "arn:aws:rolesanywhere:us-east-1:1:trust-anchor/t",
                "--region",
                "us-east-1",
            ],
        ),
        (
            "workload-identity-jwt",
            &[
                "--destination",
                "/opt/machine-id",
                "--name-selector",
                "n",
                "--audience",
                "a",
            ],
        ),
        (
            "workload-identity-x509",
            &["--destination", "/opt/machine-id", "--name-selector", "n"],
        ),
    ] {
        if !tbot::services::KINDS
            .iter()
            .any(|known| known.name() == kind)
        {
            continue;
        }
        let mut args = vec!["configure", kind];
        args.extend(shared);
        args.extend(own);
        let output = tbot(&args);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let expected = std::fs::read_to_string(golden(&format!(
            "configure/{}.yaml",
            kind.replace('/', "-")
        )))
        .unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
        let again = load("configured", expected).unwrap();
        assert!(again.warnings.is_empty(), "{:?}", again.warnings);
    }
}

#[test]
fn what_configure_prints_is_read_back_the_same() {
    let text = "version: v2\nauth_server: auth.example.com:3025\nonboarding:\n  token: t\n  \
                join_method: token\ncredential_ttl: 2h\ninsecure: true\nstorage: {type: memory}\n";
    let first = load("a", text.to_owned()).unwrap().plan.to_yaml();
    let second = load("b", first.clone()).unwrap().plan.to_yaml();
    assert_eq!(first, second);
    let redacted = load("c", first).unwrap().plan.to_redacted_yaml();
    assert!(redacted.contains("token: <redacted>"), "{redacted}");
}

#[test]
fn the_old_format_is_read_as_its_v2_form() {
    for entry in std::fs::read_dir(golden("config/v1")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        let old = path.to_str().unwrap();
        let output = tbot(&["migrate", "-c", old]);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let told = String::from_utf8(output.stdout).unwrap();
        let expected = path.with_extension("v2");
        if std::env::var_os("TBOT_UPDATE_GOLDEN").is_some() {
            std::fs::write(&expected, &told).unwrap();
        }
        assert_eq!(told, std::fs::read_to_string(&expected).unwrap(), "{old}");

        let started = load("old", std::fs::read_to_string(&path).unwrap()).unwrap();
        let deprecated = "old: warning: version: the format v1 is deprecated";
        assert!(
            started
                .warnings
                .iter()
                .any(|line| line.starts_with(deprecated)),
            "{:?}",
            started.warnings
        );
        let migrated = load("new", told).unwrap();
        assert_eq!(started.plan.to_yaml(), migrated.plan.to_yaml());
    }
}

#[test]
fn migrate_writes_a_new_file_only() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (dir.path().join("old.yaml"), dir.path().join("new.yaml"));
    std::fs::copy(golden("config/v1/identity.yaml"), &old).unwrap();
    let before = std::fs::read(&old).unwrap();
    let run = |from: &Path, to: &Path| {
        tbot(&[
            "migrate",
            "-c",
            from.to_str().unwrap(),
            "-o",
            to.to_str().unwrap(),
        ])
    };
    assert_eq!(run(&old, &old).status.code(), Some(2));
    assert_eq!(std::fs::read(&old).unwrap(), before);
    assert_eq!(run(&old, &new).status.code(), Some(0));
    let again = run(&new, &old);
    assert_eq!(again.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&again.stderr);
    assert!(stderr.contains("already of the latest version"), "{stderr}");
    assert_eq!(tbot(&["migrate"]).status.code(), Some(2));
}

#[test]
fn a_wrong_configuration_or_command_line_ends_with_2() {
    let bad = golden("config/bad/fips.yaml");
    for args in [
        ["start", "--no-such-flag"].as_slice(),
        &["start", "-c", bad.to_str().unwrap()],
        &["start", "-c", "/no/such/file.yaml"],
        &["start", "--fips"],
        &["start"],
        &["no-such-command"],
        &["configure", "--proxy-server", "a:1"],
        &["start", "--config-string", "not base64!"],
        &["start", "--config-string", "dg==", "-c", "x"],
        &["start", "--renewal-interval", "3600"],
        &["install", "systemd"],
    ] {
        let output = tbot(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {stderr}");
        assert!(stderr.starts_with("ERROR: "), "{args:?}: {stderr}");
        assert!(
            !stderr.contains('\u{1b}'),
            "colours without a terminal: {stderr}"
        );
    }
}

#[test]
fn flags_overrule_the_file_and_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tbot.yaml");
    std::fs::write(
        &path,
        "version: v2\nproxy_server: a.example.com:443\nfips: true\n",
    )
    .unwrap();
    let output = tbot(&[
        "start",
        "-c",
        path.to_str().unwrap(),
        "--proxy-server",
        "b.example.com:443",
        "--join-method",
        "imm",
    ]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(
        stderr.contains("tbot.yaml:2:15: warning: proxy_server: --proxy-server replaces \"a.example.com:443\" of the file"),
        "{stderr}"
    );
    assert!(
        stderr.contains("--join-method: error: onboarding.join_method: unrecognized"),
        "{stderr}"
    );
}

#[test]
fn the_guides_file_gives_the_guides_unit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tbot.yaml");
    std::fs::write(
        &path,
        "version: v2\nproxy_server: example.teleport.sh:443\nonboarding:\n  join_method: iam\n  \
         token: example-bot\nstorage:\n  type: directory\n  path: /var/lib/teleport/bot\nservices:\n\
         - type: workload-identity-api\n  listen: unix:///opt/machine-id/workload.sock\n  selector:\n    \
         name: example-workload-identity\n  attestors:\n    systemd:\n      enabled: true\n",
    )
    .unwrap();
    let output = tbot(&[
        "install",
        "systemd",
        "--config",
        path.to_str().unwrap(),
        "--anonymous-telemetry",
    ]);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(
        stdout.starts_with("Dry-run mode is active. Use '--write' to enable writes.\n"),
        "{stdout}"
    );
    for line in [
        "User=teleport",
        "StateDirectory=teleport/bot",
        "ReadWritePaths=-/opt/machine-id",
    ] {
        assert!(stdout.lines().any(|l| l == line), "{line}: {stdout}");
    }
    // The packaged unit is this one, for a binary and a configuration at their usual places.
    let (_, unit) = stdout.split_once("\n\n").unwrap();
    let unit: String = unit
        .lines()
        .map(|line| {
            if line.starts_with("ExecStart=") {
                "ExecStart=/usr/local/bin/tbot start -c /etc/tbot.yaml\n".to_owned()
            } else {
                format!("{line}\n")
            }
        })
        .collect();
    let packaged = std::fs::read_to_string("packaging/systemd/tbot.service").unwrap();
    assert_eq!(unit, packaged);
}
