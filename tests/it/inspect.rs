//! `tbot spiffe-inspect` where something is missing: what it says, to whom, and how it ends.

use std::os::unix::process::CommandExt as _;
use std::process::{Command, Output};

use serde_json::Value;

use crate::common::{Cluster, OutputText as _, Process, Sandbox, eventually, issuing};

const IDENTITIES: &str = "\
kind: workload_identity
version: v1
metadata: {name: foo, labels: {a: b}}
spec: {spiffe: {id: /svc/foo}, rules: {allow: [{expression: workload.unix.uid == 65534}]}}
";

/// `nobody`, whom the rule of the workload identity is about.
const NOBODY: u32 = 65534;

fn agent(sandbox: &Sandbox, cluster: &Cluster<'_>, storage: &str, more: &str) -> Process {
    let token = cluster.invite("example", "5m");
    let service = format!(
        "services:\n- type: workload-identity-api\n  listen: unix://{}\n  selector: {{name: foo}}\n{more}",
        sandbox.path(format!("{storage}.sock")).display()
    );
    let config = sandbox.write(
        &format!("{storage}.yaml"),
        cluster.config(&token, storage) + &service,
    );
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(config);
    let mut process = sandbox.spawn(storage, command);
    process.wait_for_log("The bot has a fresh identity");
    process
}

/// The program where everybody may run it.
fn program(sandbox: &Sandbox) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(sandbox.path("."), open).unwrap();
    let program = sandbox.path("tbot");
    std::fs::copy(env!("CARGO_BIN_EXE_tbot"), &program).unwrap();
    program
}

fn inspect(sandbox: &Sandbox, socket: &str, user: Option<u32>, output: &str) -> Output {
    let mut command = Command::new(sandbox.path("tbot"));
    command
        .args(["spiffe-inspect", "--output", output, "--path"])
        .arg(format!("unix://{}", sandbox.path(socket).display()))
        .env_clear()
        .current_dir("/");
    if let Some(user) = user {
        command.uid(user).gid(user);
    }
    command.output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {}", output.text()))
}

#[test]
fn what_is_missing_is_explained_to_those_who_may_know() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &issuing(IDENTITIES));
    program(&sandbox);
    let _closed = agent(&sandbox, &cluster, "closed", "");
    let _open = agent(&sandbox, &cluster, "open", "  explain: true\n");

    // The rule is not about the agent's user, who is told everything.
    let refused = eventually("the cluster refuses", || {
        let output = inspect(&sandbox, "closed.sock", None, "text");
        if output.text().contains("no identity issued") {
            Ok(output)
        } else {
            Err(output.text())
        }
    });
    assert_eq!(refused.status.code(), Some(1));
    let text = String::from_utf8_lossy(&refused.stdout);
    for line in [
        "No X509 SVIDs received, check your configuration\n",
        "- test.example.org (#CAs: 1)\n  - Next CA Expiry: ",
        "# Attestation\n- unix\n",
        "  - workload.unix.uid: ",
        "- Selector: name foo\n- Refusal: ",
    ] {
        assert!(text.contains(line), "{line:?}: {text}");
    }
    let found = json(&inspect(&sandbox, "closed.sock", None, "json"));
    assert_eq!(found["ok"], false);
    let attestors = &found["attestation"]["attestors"];
    let uid = nix::unistd::geteuid().to_string();
    assert_eq!(attestors[0]["attributes"]["workload.unix.uid"], *uid);
    assert!(found["attestation"]["refusal"].is_string(), "{found}");

    if !nix::unistd::geteuid().is_root() {
        return crate::common::skip("being another user needs root");
    }
    // The one it is about has everything, and is told nothing unless the socket's owner consents.
    let served = inspect(&sandbox, "closed.sock", Some(NOBODY), "json");
    assert_eq!(served.status.code(), Some(0), "{}", served.text());
    let found = json(&served);
    assert_eq!(found["ok"], true, "{found}");
    let id = "spiffe://test.example.org/svc/foo";
    assert_eq!(found["x509_svids"][0]["spiffe_id"], id);
    assert_eq!(found["jwt_svids"][0]["valid"], true);
    assert_eq!(found["x509_bundles"][0]["authorities"], 1);
    let withheld = found["attestation"]["withheld"].as_str().unwrap();
    assert!(withheld.contains("explain: true"), "{withheld}");
    let found = json(&inspect(&sandbox, "open.sock", Some(NOBODY), "json"));
    let attestors = &found["attestation"]["attestors"];
    assert_eq!(attestors[0]["attributes"]["workload.unix.uid"], "65534");
    assert!(found["attestation"]["refusal"].is_null(), "{found}");
    let text = inspect(&sandbox, "open.sock", Some(NOBODY), "text").success();
    assert!(!text.contains("# Attestation"), "{text}");
}
