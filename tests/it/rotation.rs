//! Rotations of the cluster's authorities while an agent runs. In every phase, what the agent wrote
//! and serves is judged by programs that nobody here wrote, with what relying parties hold: the
//! bundle and the keys that the cluster published in this phase and in the one before.

use std::cell::RefCell;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use tbot::crypto::pem;

use crate::common::{
    Cluster, OutputText as _, Process, Sandbox, eventually, repository, skip, venv,
};

const RESOURCES: &str = r"
kind: role
version: v7
metadata: {name: issuer}
spec: {allow: {logins: [root], workload_identity_labels: {'*': ['*']}, rules: [{resources: [workload_identity], verbs: [read, list]}]}}
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [issuer]}
---
kind: workload_identity
version: v1
metadata: {name: foo, labels: {env: test}}
spec: {spiffe: {id: /svc/foo}}
";

const FORWARD: [&str; 4] = ["init", "update_clients", "update_servers", "standby"];
const BACK: [&str; 4] = ["init", "update_clients", "rollback", "standby"];

/// What the agent says when an output is complete.
const WRITTEN: &str = "Wrote the output";

/// A cluster, and an agent with an `identity` output and a Workload API, and a workload.
struct Scene<'a> {
    sandbox: &'a Sandbox,
    cluster: Cluster<'a>,
    agent: Process,
    workload: RefCell<Workload>,
    /// The published documents of the phase before.
    published: Published,
}

/// What relying parties hold.
#[derive(Clone)]
struct Published {
    /// Certificates of the SPIFFE bundle, PEM.
    bundle: PathBuf,
    /// The keys of JWT-SVIDs.
    keys: PathBuf,
}

/// A workload in Python, with an open stream.
struct Workload {
    child: Child,
    ask: ChildStdin,
    answer: BufReader<ChildStdout>,
}

impl Workload {
    fn start(sandbox: &Sandbox) -> Self {
        let mut child = sandbox
            .command(venv().join("bin/python"))
            .arg(repository().join("tests/support/judge.py"))
            .env("SPIFFE_ENDPOINT_SOCKET", address(sandbox))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            ask: child.stdin.take().unwrap(),
            answer: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Leaves its X.509-SVID in `leaf`; returns that one's serial number and the JWT-SVID's key.
    fn judge(&mut self, what: &str, leaf: &Path, keys: &[&Path]) -> String {
        let mut line = leaf.display().to_string();
        for path in keys {
            line = format!("{line} {}", path.display());
        }
        writeln!(self.ask, "{line}").unwrap();
        let mut answer = String::new();
        self.answer.read_line(&mut answer).unwrap();
        let answer = answer.trim();
        let sound = answer.starts_with(|c: char| c.is_ascii_digit());
        assert!(sound, "{what}: {answer}");
        answer.to_owned()
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

impl<'a> Scene<'a> {
    /// `None` where the judges are missing.
    fn start(sandbox: &'a Sandbox) -> Option<Self> {
        if !venv().join("bin/python").exists() {
            skip("the Python environment is missing: make setup");
            return None;
        }
        let cluster = Cluster::start(sandbox, RESOURCES);
        let token = cluster.invite("example", "10m");
        let config = format!(
            "{}services:\n  - {{type: identity, ssh_config: off, destination: {{type: directory, \
             path: {}}}}}\n  - {{type: workload-identity-api, listen: \"{}\", selector: {{name: foo}}}}\n",
            cluster.config(&token, "bot"),
            sandbox.path("out").display(),
            address(sandbox),
        );
        let config = sandbox.write("agent.yaml", config);
        let mut command = sandbox.tbot(["start", "-c"]);
        command.arg(config);
        let mut agent = sandbox.spawn("agent", command);
        agent.wait_for_log(WRITTEN);
        let published = publish(sandbox, &cluster, "before");
        let scene = Self {
            workload: RefCell::new(Workload::start(sandbox)),
            sandbox,
            cluster,
            agent,
            published,
        };
        scene.judge("before", &scene.published);
        Some(scene)
    }

    /// Takes one step of a rotation and judges what is there already, then what the agent makes of
    /// it. Relying parties that were not told of the step are served as well as those that were.
    fn step(&mut self, kind: &str, phase: &str) {
        let what = format!("{kind}, {phase}");
        let pushed = self.judge(&what, &self.published);
        self.rotate(kind, phase);
        let published = publish(self.sandbox, &self.cluster, &format!("{kind}-{phase}"));
        self.judge(&what, &published);
        if kind == "spiffe" {
            // In `update_servers` no key changes its place, and nothing is issued for it.
            if phase != "update_servers" {
                eventually(&format!("{what}: a new SVID is pushed"), || {
                    if serial(&self.judge(&what, &published)) == serial(&pushed) {
                        Err("it is the one of before")
                    } else {
                        Ok(())
                    }
                });
            }
        } else {
            self.renewed(&what, |agent| agent.signal("HUP"));
            self.judge(&what, &published);
        }
        self.published = published;
    }

    fn rotate(&self, kind: &str, phase: &str) {
        let step = ["rotate", "--type", kind, "--manual", "--phase", phase];
        self.cluster.run(&step);
    }

    /// Waits until the output was written completely after `cause`.
    fn renewed(&mut self, what: &str, cause: impl FnOnce(&Process)) {
        let before = self.written();
        cause(&self.agent);
        self.written_after(before, what);
        self.agent.check_running();
    }

    fn written(&self) -> usize {
        self.agent.log().matches(WRITTEN).count()
    }

    fn written_after(&self, before: usize, what: &str) {
        eventually(&format!("{what}: the output is new"), || {
            if self.written() > before {
                Ok(())
            } else {
                Err("not yet")
            }
        });
    }

    /// Judges everything, with what relying parties hold in this and in the last phase.
    fn judge(&self, what: &str, held: &Published) -> String {
        let written = self.written();
        if let Err(problem) = self.judge_output() {
            // Programs that open one file after the other may see two sets while one is written.
            self.written_after(written, &format!("{what}: {problem}"));
            self.judge_output()
                .unwrap_or_else(|problem| panic!("{what}: {problem}"));
        }
        let leaf = self.sandbox.path("leaf.pem");
        let keys: [&Path; 2] = [&held.keys, &self.published.keys];
        let served = self.workload.borrow_mut().judge(what, &leaf, &keys);
        for bundle in [&held.bundle, &self.published.bundle] {
            self.verify(bundle, &leaf)
                .unwrap_or_else(|problem| panic!("{what}: {problem}"));
        }
        served
    }

    /// OpenSSL and OpenSSH judge the output.
    fn judge_output(&self) -> Result<(), String> {
        let out = |name: &str| self.sandbox.path("out").join(name);
        self.verify(&out("teleport-user-ca.crt"), &out("tlscert"))?;
        self.connect()?;
        let mut keygen = self.sandbox.command("ssh-keygen");
        let shown = agreed(keygen.arg("-L").arg("-f").arg(out("key-cert.pub")))?;
        expect(&shown, "user certificate")
    }

    /// `openssl verify` of the first certificate in a file.
    fn verify(&self, authorities: &Path, certificate: &Path) -> Result<(), String> {
        let mut openssl = self.sandbox.command("openssl");
        openssl
            .args(["verify", "-purpose", "sslclient", "-CAfile"])
            .arg(authorities)
            .arg(certificate);
        agreed(&mut openssl).map(drop)
    }

    /// `openssl s_client` with the output's files, as TLS 1.2: there, a client certificate that is
    /// not taken fails the handshake itself.
    fn connect(&self) -> Result<(), String> {
        let out = |name: &str| self.sandbox.path("out").join(name);
        let name = format!("{}.teleport.cluster.local", hex::encode(Cluster::NAME));
        let mut openssl = self.sandbox.command("openssl");
        openssl
            .args(["s_client", "-tls1_2", "-alpn", "h2", "-verify_return_error"])
            .args(["-connect", &self.cluster.auth()])
            .args(["-servername", &name, "-verify_hostname", &name])
            .arg("-CAfile")
            .arg(out("teleport-host-ca.crt"))
            .arg("-cert")
            .arg(out("tlscert"))
            .arg("-key")
            .arg(out("key"));
        let shown = agreed(&mut openssl)?;
        expect(&shown, "Verify return code: 0 (ok)")?;
        expect(&shown, "ALPN protocol: h2")
    }
}

/// That of the X.509-SVID; after it, the judge tells the key that signs JWT-SVIDs.
fn serial(judged: &str) -> &str {
    judged.split_once(' ').map_or(judged, |(serial, _)| serial)
}

/// Fetches what the cluster publishes, as a relying party would.
fn publish(sandbox: &Sandbox, cluster: &Cluster<'_>, name: &str) -> Published {
    let get = |path: &str| {
        let mut curl = sandbox.command("curl");
        curl.args(["--silent", "--show-error", "--fail", "--cacert"])
            .arg(cluster.web_authority())
            .arg(format!("https://{}{path}", cluster.proxy()));
        curl.output().unwrap().success()
    };
    let bundle: Value = serde_json::from_str(&get("/webapi/spiffe/bundle.json")).unwrap();
    let authorities: String = bundle["keys"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|key| key["x5c"][0].as_str())
        .map(|text| pem::encode("CERTIFICATE", &STANDARD.decode(text).unwrap()))
        .collect();
    assert!(!authorities.is_empty(), "{bundle}");
    let keys = get("/workload-identity/jwt-jwks.json");
    Published {
        bundle: sandbox.write(&format!("{name}.bundle.pem"), authorities),
        keys: sandbox.write(&format!("{name}.jwks.json"), keys),
    }
}

fn address(sandbox: &Sandbox) -> String {
    format!("unix://{}", sandbox.path("w.sock").display())
}

/// What a judge says that agrees.
fn agreed(judge: &mut Command) -> Result<String, String> {
    let output: Output = judge.output().unwrap();
    if output.status.success() {
        Ok(output.text())
    } else {
        Err(output.text())
    }
}

fn expect(shown: &str, text: &str) -> Result<(), String> {
    if shown.contains(text) {
        Ok(())
    } else {
        Err(format!("{text:?} is not in {shown}"))
    }
}

#[test]
fn host_and_jwt_phases_leave_everything_valid() {
    let sandbox = Sandbox::new();
    let Some(mut scene) = Scene::start(&sandbox) else {
        return;
    };
    for phase in FORWARD {
        scene.step("host", phase);
        scene.step("jwt", phase);
    }
}

#[test]
fn user_and_db_phases_and_a_rollback_leave_everything_valid() {
    let sandbox = Sandbox::new();
    let Some(mut scene) = Scene::start(&sandbox) else {
        return;
    };
    for phase in FORWARD {
        scene.step("user", phase);
    }
    for phase in BACK {
        scene.step("user", phase);
    }
    let databases = || fs::read_to_string(sandbox.path("out/teleport-database-ca.crt")).unwrap();
    let first = databases();
    let count = |pem: &str| pem::certificates(pem).unwrap().len();
    for phase in FORWARD {
        scene.step("db", phase);
        // Readers of the databases' authorities are ready before anything shows the new one.
        let more = usize::from(phase != "standby");
        assert_eq!(count(&databases()), count(&first) + more, "{phase}");
    }
    assert_ne!(databases(), first);
}

#[test]
fn spiffe_phases_and_a_rollback_leave_everything_valid() {
    let sandbox = Sandbox::new();
    let Some(mut scene) = Scene::start(&sandbox) else {
        return;
    };
    for phase in FORWARD.into_iter().chain(BACK) {
        scene.step("spiffe", phase);
    }
}

#[test]
fn an_agent_that_falls_behind_the_phases_renews_by_itself() {
    let sandbox = Sandbox::new();
    let Some(mut scene) = Scene::start(&sandbox) else {
        return;
    };
    // The next phase comes before the agent has followed the one before: now it has to hurry.
    scene.rotate("host", "init");
    scene.rotate("host", "update_clients");
    scene.renewed("update_clients", |_agent| ());
    for phase in ["update_servers", "standby"] {
        scene.rotate("host", phase);
        scene.judge(phase, &scene.published);
    }
}
