//! The SPIFFE standard, clause by clause: `docs/reference/spiffe.md` lists them and names the tests.
//!
//! The server is the real binary with a cluster beside it; the client is bytes over a socket; what is
//! issued is judged by `tests/support/conformance.py`, which shares nothing with the program.

mod endpoint;
mod issued;
mod streams;
mod table;
mod tokens;

use std::fmt::Write as _;
use std::path::PathBuf;

use serde_json::Value;

use crate::common::{Cluster, OutputText as _, Process, Sandbox, repository, venv};

/// The identities that the agent's sockets give out. Each socket has the name of its selector.
const RESOURCES: &str = r#"
kind: role
version: v7
metadata: {name: issuer}
spec: {allow: {workload_identity_labels: {'*': ['*']}, rules: [{resources: [workload_identity], verbs: [read, list]}]}}
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [issuer]}
---
kind: workload_identity
version: v1
metadata: {name: one, labels: {set: one}}
spec: {spiffe: {id: /svc/one, hint: the-only-one}}
---
kind: workload_identity
version: v1
metadata: {name: many-a, labels: {set: many}}
spec: {spiffe: {id: /svc/a, hint: same}}
---
kind: workload_identity
version: v1
metadata: {name: many-b, labels: {set: many}}
spec: {spiffe: {id: /svc/b, hint: same}}
---
kind: workload_identity
version: v1
metadata: {name: many-c, labels: {set: many}}
spec: {spiffe: {id: /svc/c}}
---
kind: workload_identity
version: v1
metadata: {name: many-d, labels: {set: many}}
spec: {spiffe: {id: /svc/d, hint: "LONG-HINT"}}
---
kind: workload_identity
version: v1
metadata: {name: many-e, labels: {set: many}}
spec:
  spiffe:
    id: /svc/e
    hint: e
    x509: {dns_sans: [e.example.org], subject_template: {common_name: e, organization: tests}}
---
kind: workload_identity
version: v1
metadata: {name: nobody, labels: {set: nobody}}
spec:
  rules: {allow: [{expression: 'workload.unix.uid == 4000000000'}]}
  spiffe: {id: /svc/nobody}
---
kind: workload_identity
version: v1
metadata: {name: longest, labels: {set: longest}}
spec: {spiffe: {id: LONGEST-PATH}}
---
kind: workload_identity
version: v1
metadata: {name: too-long, labels: {set: too-long}}
spec: {spiffe: {id: LONGEST-PATHx}}
---
kind: workload_identity
version: v1
metadata: {name: root, labels: {set: root}}
spec: {spiffe: {id: "/{{   }}"}}
---
kind: workload_identity
version: v1
metadata: {name: slashes, labels: {set: slashes}}
spec: {spiffe: {id: "/svc/{{workload.unix.binary_path}}"}}
---
kind: workload_identity
version: v1
metadata: {name: blank, labels: {set: blank}}
spec: {spiffe: {id: "/svc/{{strings.replaceall(user.name, \"-\", \" \")}}"}}
---
kind: workload_identity
version: v1
metadata: {name: dots, labels: {set: dots}}
spec: {spiffe: {id: "/svc/{{strings.replaceall(user.name, \"bot-example\", \"..\")}}/x"}}
"#;

/// The sockets that answer to nobody: no identity, or none that the standard allows.
const FRUITLESS: [&str; 6] = ["nobody", "too-long", "root", "slashes", "blank", "dots"];
/// The others.
const FRUITFUL: [&str; 3] = ["one", "many", "longest"];

/// A cluster, and an agent with a socket for each selector.
struct Stage<'a> {
    sandbox: &'a Sandbox,
    cluster: Cluster<'a>,
    agents: Vec<Process>,
}

impl<'a> Stage<'a> {
    fn new(sandbox: &'a Sandbox) -> Self {
        Self::with(sandbox, "", &FRUITFUL.map(|name| (name, "")))
    }

    /// The same with further keys of the configuration, and of each socket's service.
    fn with(sandbox: &'a Sandbox, keys: &str, sockets: &[(&str, &str)]) -> Self {
        let mut stage = Self::cluster(sandbox, Cluster::NAME);
        stage
            .start("agent", keys, sockets)
            .wait_for_log("The bot has a fresh identity");
        stage
    }

    /// Only the cluster.
    fn cluster(sandbox: &'a Sandbox, name: &str) -> Self {
        let path = 2048 - "spiffe://".len() - name.len();
        let resources = RESOURCES
            .replace("LONG-HINT", &"h".repeat(1025))
            .replace("LONGEST-PATH", &format!("/{}", "p".repeat(path - 1)));
        Self {
            sandbox,
            cluster: Cluster::start_named(sandbox, name, &resources),
            agents: Vec::new(),
        }
    }

    /// Starts an agent of the cluster; its sockets are `<sandbox>/<selector>.sock`.
    fn start(&mut self, name: &str, keys: &str, sockets: &[(&str, &str)]) -> &mut Process {
        let token = self.cluster.invite("example", "10m");
        let mut config = self.cluster.config(&token, name) + keys + "services:\n";
        for (set, more) in sockets {
            writeln!(
                config,
                "  - {{type: workload-identity-api, listen: \"unix://{}\", \
                 selector: {{labels: {{set: [{set}]}}}}{more}}}",
                self.socket(set).display()
            )
            .unwrap();
        }
        let path = self.sandbox.write(&format!("{name}.yaml"), config);
        let mut command = self.sandbox.tbot(["start", "-c"]);
        command.arg(path);
        self.agents.push(self.sandbox.spawn(name, command));
        self.agents.last_mut().unwrap()
    }

    fn socket(&self, set: &str) -> PathBuf {
        self.sandbox.path(format!("{set}.sock"))
    }

    /// A document that the cluster publishes, with the header of the answer.
    fn published(&self, path: &str) -> (String, Value) {
        let mut curl = self.sandbox.command("curl");
        curl.args(["--silent", "--show-error", "--fail", "--cacert"])
            .arg(self.cluster.web_authority())
            .args(["--write-out", "\n%{content_type}"])
            .arg(format!("https://{}{path}", self.cluster.proxy()));
        let answer = curl.output().unwrap().success();
        let (document, kind) = answer.rsplit_once('\n').unwrap();
        (kind.to_owned(), serde_json::from_str(document).unwrap())
    }

    fn rotate(&self, phase: &str) {
        let step = ["rotate", "--type", "spiffe", "--manual", "--phase", phase];
        self.cluster.run(&step);
    }
}

/// Runs the judge in Python on a document; its answer is a document too.
fn python(sandbox: &Sandbox, command: &str, input: &Value) -> Value {
    let input = sandbox.write("judge.json", input.to_string());
    let mut judge = sandbox.command(venv().join("bin/python"));
    judge
        .arg(repository().join("tests/support/conformance.py"))
        .arg(command)
        .arg(input);
    serde_json::from_str(&judge.output().unwrap().success()).unwrap()
}

/// Whether the judge is there.
fn has_python() -> bool {
    venv().join("bin/python").exists()
}

/// What was found wrong, clause by clause, so that one run shows all of it.
#[derive(Default)]
struct Report {
    wrong: Vec<String>,
    checked: usize,
}

impl Report {
    fn check(&mut self, clause: &str, what: &str, verdict: Result<(), String>) {
        self.checked += 1;
        if let Err(problem) = verdict {
            self.wrong.push(format!("{clause}: {what}: {problem}"));
        }
    }

    fn expect(&mut self, clause: &str, what: &str, holds: bool) {
        self.check(clause, what, if holds { Ok(()) } else { Err("no".into()) });
    }

    /// That a call failed with this status.
    fn status<T>(
        &mut self,
        clause: &str,
        what: &str,
        wanted: tonic::Code,
        result: &Result<T, tonic::Status>,
    ) {
        let verdict = match result {
            Err(status) if status.code() == wanted => Ok(()),
            Err(status) => Err(format!("{status}")),
            Ok(_) => Err("it was answered".into()),
        };
        self.check(clause, what, verdict);
    }

    #[track_caller]
    fn finish(self) {
        assert!(self.checked > 0, "nothing was checked");
        assert!(self.wrong.is_empty(), "{}", self.wrong.join("\n"));
    }
}
