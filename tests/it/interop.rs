//! The SPIFFE client libraries of Go, Python and Rust, each with X.509- and JWT-SVIDs, across renewals,
//! a rotation of the cluster's authority and a restart of the agent. `tests/interop/` has the clients.

mod rust;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

use crate::common::{
    Cluster, OutputText as _, Process, Sandbox, eventually, issuing, repository, skip, venv,
};

const IDENTITIES: &str = r"
kind: workload_identity
version: v1
metadata: {name: foo, labels: {set: foo}}
spec: {spiffe: {id: /svc/foo, hint: same}}
---
kind: workload_identity
version: v1
metadata: {name: goo, labels: {set: foo}}
spec: {spiffe: {id: /svc/goo, hint: same}}
";

const FOO: &str = "spiffe://test.example.org/svc/foo";
const GOO: &str = "spiffe://test.example.org/svc/goo";
const AUDIENCE: &str = "audience.example.org";

/// A cluster and an agent with two sockets: `foo`, whose SVIDs are short-lived, and `late`, for whose
/// selector there is no identity yet.
struct Stage<'a> {
    sandbox: &'a Sandbox,
    cluster: Cluster<'a>,
    agent: Option<Process>,
}

impl<'a> Stage<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        let mut stage = Self {
            sandbox,
            cluster: Cluster::start(sandbox, &issuing(IDENTITIES)),
            agent: None,
        };
        let token = stage.cluster.invite("example", "10m");
        let service = |set: &str| {
            format!(
                "  - {{type: workload-identity-api, listen: \"{}\", selector: {{labels: {{set: [{set}]}}}}, \
                 credential_ttl: 1m, renewal_interval: 2s}}\n",
                stage.address(set)
            )
        };
        let config = stage.cluster.config(&token, "bot")
            + "services:\n"
            + &service("foo")
            + &service("late");
        sandbox.write("tbot.yaml", config);
        stage.start();
        stage
    }

    /// Starts the agent, or starts it anew.
    fn start(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.signal("TERM");
            agent.wait();
        }
        let mut command = self.sandbox.tbot(["start", "-c", "tbot.yaml"]);
        command.current_dir(self.sandbox.path(""));
        let mut agent = self.sandbox.spawn("agent", command);
        agent.wait_for_log("Workload API is listening");
        self.agent = Some(agent);
    }

    fn address(&self, set: &str) -> String {
        format!(
            "unix://{}",
            self.sandbox.path(format!("{set}.sock")).display()
        )
    }

    /// Lets the `late` socket have something to give.
    fn create_late(&self) {
        self.cluster.create(
            "kind: workload_identity\nversion: v1\nmetadata: {name: late, labels: {set: late}}\n\
             spec: {spiffe: {id: /svc/late}}\n",
        );
    }

    fn rotate(&self, phase: &str) {
        let step = ["rotate", "--type", "spiffe", "--manual", "--phase", phase];
        self.cluster.run(&step);
    }
}

/// A client in another language.
struct Client {
    child: Child,
    ask: ChildStdin,
    answer: BufReader<ChildStdout>,
}

impl Client {
    fn start(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            ask: child.stdin.take().unwrap(),
            answer: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    fn ask(&mut self, words: &[&str]) -> Value {
        writeln!(self.ask, "{}", words.join(" ")).unwrap();
        let mut line = String::new();
        self.answer.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{words:?}: {e}: {line:?}"))
    }

    /// Waits until the watch has seen something.
    fn watched(&mut self, what: &str, holds: impl Fn(&Value) -> bool) -> Value {
        eventually(what, || {
            let seen = self.ask(&["watched"]);
            if holds(&seen) {
                Ok(seen)
            } else {
                Err(seen.to_string())
            }
        })
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn numbers(value: &Value) -> Vec<u64> {
    let items = value.as_array().into_iter().flatten();
    items.filter_map(Value::as_u64).collect()
}

fn texts(value: &Value) -> Vec<&str> {
    let items = value.as_array().into_iter().flatten();
    items.filter_map(Value::as_str).collect()
}

/// What every client has to see.
///
/// Not every library tells of refusals that it means to try again.
fn everything(stage: &mut Stage<'_>, client: &mut Client, tells_of_refusals: bool) {
    let socket = stage.address("foo");
    let late = stage.address("late");

    let x509 = client.ask(&["x509", &socket]);
    // Of two with one hint, the first keeps it.
    assert_eq!(x509["ids"], json!([FOO, GOO]), "{x509}");
    if let Some(hints) = x509.get("hints") {
        assert_eq!(texts(hints), ["same", ""]);
    }
    assert_ne!(x509["stranger"], true, "{x509}");
    let bundles = client.ask(&["bundles", &socket]);
    assert_eq!(bundles, json!({"test.example.org": [1, 1]}));
    let all = client.ask(&["jwt", &socket, AUDIENCE, "-"]);
    assert_eq!(all["ids"], json!([FOO, GOO]), "{all}");
    let one = client.ask(&["jwt", &socket, AUDIENCE, GOO]);
    assert_eq!(one["ids"], json!([GOO]), "{one}");
    let token = one["token"].as_str().unwrap();
    let valid = client.ask(&["validate", &socket, AUDIENCE, token]);
    assert_eq!(valid["id"], GOO, "{valid}");

    for (words, code) in [
        (
            &["validate", &socket, "other", token][..],
            "InvalidArgument",
        ),
        (&["validate", &socket, AUDIENCE, "a.b.c"], "InvalidArgument"),
        (
            &["jwt", &socket, AUDIENCE, "spiffe://test.example.org/svc/x"],
            "PermissionDenied",
        ),
        (&["jwt", &late, AUDIENCE, "-"], "PermissionDenied"),
        (&["x509", &late], "PermissionDenied"),
    ] {
        let refused = client.ask(words);
        assert_eq!(refused["error"], code, "{words:?}: {refused}");
    }

    // Renewals come by themselves.
    client.ask(&["watch", &socket]);
    client.watched("two renewals are seen", |seen| {
        let mut serials = texts(&seen["serials"]);
        serials.dedup();
        serials.len() >= 3
    });
    // A rotation: both authorities, then the new one alone. No watch fails meanwhile.
    for phase in ["init", "update_clients", "update_servers", "standby"] {
        stage.rotate(phase);
        let count = if phase == "standby" { 1 } else { 2 };
        let seen = client.watched(&format!("{phase} is seen"), |seen| {
            ["authorities", "bundles", "keys"].iter().all(|kind| {
                let counts = numbers(&seen[kind]);
                counts.last() == Some(&count) && (phase == "init" || counts.contains(&2))
            })
        });
        assert_eq!(texts(&seen["errors"]), [""; 0], "{phase}");
        let token = client.ask(&["jwt", &socket, AUDIENCE, FOO]);
        assert_eq!(token["ids"], json!([FOO]), "{phase}: {token}");
        let x509 = client.ask(&["x509", &socket]);
        assert_eq!(x509["ids"], json!([FOO, GOO]), "{phase}: {x509}");
    }

    // The agent is restarted: watches end, and begin again by themselves.
    let before = texts(&client.ask(&["watched"])["serials"]).len();
    stage.start();
    client.watched("the watch goes on after a restart", |seen| {
        texts(&seen["serials"]).len() > before
    });

    // An identity that comes later is seen by those who watched for it.
    client.ask(&["watch", &late]);
    if tells_of_refusals {
        client.watched("the refusal is told", |seen| {
            texts(&seen["errors"]).contains(&"x509 PermissionDenied")
        });
    }
    let before = texts(&client.ask(&["watched"])["serials"]).len();
    stage.create_late();
    client.watched("the late identity is seen", |seen| {
        texts(&seen["serials"]).len() > before
    });
}

/// The client in Go, built once; `None` where Go is missing.
fn go(sandbox: &Sandbox) -> Option<PathBuf> {
    let go = ["/usr/local/go/bin/go", "/usr/bin/go", "/usr/lib/go/bin/go"];
    let go = go.iter().map(Path::new).find(|path| path.exists())?;
    let place = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("go");
    let binary = place.join("interop");
    let mut build = sandbox.command(go);
    build
        .current_dir(repository().join("tests/interop/go"))
        .args(["build", "-trimpath", "-o"])
        .arg(&binary)
        .arg(".")
        .env("GOMODCACHE", place.join("mod"))
        .env("GOCACHE", place.join("build"))
        .env("GOFLAGS", "-modcacherw -buildvcs=false -mod=readonly")
        .env("GOTOOLCHAIN", "local");
    if let Some(proxy) = std::env::var_os("GOPROXY") {
        build.env("GOPROXY", proxy);
    }
    build.output().unwrap().success();
    Some(binary)
}

#[test]
fn the_go_client_sees_everything() {
    let sandbox = Sandbox::new();
    let Some(binary) = go(&sandbox) else {
        return skip("Go is not installed: the client library of Go is not tried");
    };
    let mut stage = Stage::new(&sandbox);
    let mut client = Client::start(sandbox.command(binary));
    let socket = stage.address("foo");
    let wit = client.ask(&["wit", &socket]);
    assert_eq!(
        wit,
        json!({"svid": "Unimplemented", "bundles": "Unimplemented"})
    );
    everything(&mut stage, &mut client, true);
}

#[test]
fn the_python_client_sees_everything() {
    if !venv().join("bin/python").exists() {
        return skip("the Python environment is missing: make setup");
    }
    let sandbox = Sandbox::new();
    let mut stage = Stage::new(&sandbox);
    let mut command = sandbox.command(venv().join("bin/python"));
    command.arg(repository().join("tests/interop/client.py"));
    everything(&mut stage, &mut Client::start(command), false);
}
