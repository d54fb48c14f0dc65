//! A running `tbot cluster`, and configurations of agents that join it.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::Value;

use super::sandbox::OutputText as _;
use super::{Process, Sandbox, eventually, free_port};

/// A bot that may issue one workload identity.
pub(crate) const RESOURCES: &str = r"
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
metadata: {name: foo, labels: {env: test}}
spec: {spiffe: {id: /svc/foo}}
";

/// A bot that may issue these workload identities.
pub(crate) fn issuing(identities: &str) -> String {
    const BOT: &str = "\
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
";
    format!("{BOT}{identities}")
}

/// A bot that may do nothing but be one.
pub(crate) const PLAIN_BOT: &str = "\
kind: role
version: v7
metadata: {name: access}
spec: {}
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [access]}
";

/// What the recordings of an 18.0.0 cluster were made with: its roles, bot, token and workload
/// identity.
pub(crate) const RECORDED: &str = r#"
kind: role
version: v7
metadata: {name: event-handler}
spec: {allow: {rules: [{resources: [event, session], verbs: [list, read]}]}}
---
kind: role
version: v7
metadata: {name: workload-identity-issuer}
spec: {allow: {workload_identity_labels: {example: [getting-started]}, rules: [{resources: [workload_identity], verbs: [list, read]}]}}
---
kind: role
version: v7
metadata: {name: resources}
spec:
  allow:
    logins: [root]
    node_labels: {'*': '*'}
    app_labels: {'*': '*'}
    db_labels: {'*': '*'}
    db_names: ['*']
    db_users: ['*']
    kubernetes_labels: {'*': '*'}
    kubernetes_groups: ['system:masters']
    kubernetes_resources: [{kind: '*', name: '*', namespace: '*', verbs: ['*']}]
    rules: [{resources: [cert_authority], verbs: [readnosecrets, list, read]}, {resources: [host_cert], verbs: [create]}]
---
kind: bot
version: v1
metadata: {name: example}
spec: {roles: [event-handler, workload-identity-issuer, resources]}
---
kind: token
version: v2
metadata: {name: example-bot}
spec:
  roles: [Bot]
  bot_name: example
  join_method: iam
  allow: [{aws_account: "123456789012", aws_arn: "arn:aws:sts::123456789012:assumed-role/teleport-bot-role/i-*"}]
---
kind: workload_identity
version: v1
metadata: {name: example-workload-identity, labels: {example: getting-started}}
spec: {spiffe: {id: /svc/foo}}
"#;

/// `tbot cluster serve` in `<sandbox>/cluster`, with an auth port of its own.
pub(crate) struct Cluster<'a> {
    sandbox: &'a Sandbox,
    name: String,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    /// The hosts file that it alone sees.
    hosts: Option<PathBuf>,
    /// What is mounted where a pod has its service account.
    account: Option<PathBuf>,
    process: Option<Process>,
    port: u16,
    /// The address that it advertises.
    public: String,
    auth_port: u16,
}

impl<'a> Cluster<'a> {
    /// The name of the clusters of the tests.
    pub(crate) const NAME: &'static str = "test.example.org";

    /// Starts one with the given resources.
    pub(crate) fn start(sandbox: &'a Sandbox, resources: &str) -> Self {
        Self::start_with(sandbox, resources, free_port(), &[])
    }

    /// Starts one of another name.
    pub(crate) fn start_named(sandbox: &'a Sandbox, name: &str, resources: &str) -> Self {
        let mut cluster = Self::stopped(sandbox, resources, free_port(), &[]);
        name.clone_into(&mut cluster.name);
        cluster.resume();
        cluster
    }

    /// Starts one of another name, with more environment variables.
    pub(crate) fn start_named_in(
        sandbox: &'a Sandbox,
        name: &str,
        resources: &str,
        environment: &[(&str, &str)],
    ) -> Self {
        let mut cluster = Self::stopped(sandbox, resources, free_port(), &[]);
        name.clone_into(&mut cluster.name);
        let variables = environment.iter();
        cluster.environment = variables
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        cluster.resume();
        cluster
    }

    /// Starts one whose auth port is `auth_port`, with more arguments of `serve`.
    pub(crate) fn start_with(
        sandbox: &'a Sandbox,
        resources: &str,
        auth_port: u16,
        arguments: &[&str],
    ) -> Self {
        let port = free_port();
        let mut cluster = Self::stopped(sandbox, resources, port, arguments);
        cluster.auth_port = auth_port;
        cluster.resume();
        cluster
    }

    /// Starts one with more environment variables and arguments of `serve`.
    pub(crate) fn start_in(
        sandbox: &'a Sandbox,
        resources: &str,
        environment: &[(&str, &str)],
        arguments: &[&str],
    ) -> Self {
        let mut cluster = Self::stopped(sandbox, resources, free_port(), arguments);
        let variables = environment.iter();
        cluster.environment = variables
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        cluster.resume();
        cluster
    }

    /// Starts one with more environment variables and arguments of `serve`, which finds the names of
    /// `hosts` in place of those of the machine.
    pub(crate) fn start_among(
        sandbox: &'a Sandbox,
        resources: &str,
        hosts: PathBuf,
        environment: &[(String, String)],
        arguments: &[&str],
    ) -> Self {
        let mut cluster = Self::stopped(sandbox, resources, free_port(), arguments);
        cluster.hosts = Some(hosts);
        cluster.environment = environment.to_vec();
        cluster.resume();
        cluster
    }

    /// Starts one in a pod: with the service account that is mounted there, and its variables.
    pub(crate) fn start_in_pod(
        sandbox: &'a Sandbox,
        resources: &str,
        account: PathBuf,
        environment: &[(&str, String)],
    ) -> Self {
        let mut cluster = Self::stopped(sandbox, resources, free_port(), &[]);
        cluster.account = Some(account);
        let variables = environment.iter();
        cluster.environment = variables
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect();
        cluster.resume();
        cluster
    }

    /// Starts one on `port` that advertises `public`, with more arguments of `serve`.
    pub(crate) fn start_at(
        sandbox: &'a Sandbox,
        resources: &str,
        port: u16,
        public: &str,
        arguments: &[&str],
    ) -> Self {
        let mut cluster = Self::stopped(sandbox, resources, port, arguments);
        public.clone_into(&mut cluster.public);
        cluster.resume();
        cluster
    }

    fn stopped(sandbox: &'a Sandbox, resources: &str, port: u16, arguments: &[&str]) -> Self {
        let resources = sandbox.write("resources.yaml", resources);
        let mut cluster = Self {
            sandbox,
            name: Self::NAME.to_owned(),
            arguments: arguments.iter().map(|&text| text.to_owned()).collect(),
            environment: Vec::new(),
            hosts: None,
            account: None,
            process: None,
            port,
            public: format!("localhost:{port}"),
            auth_port: free_port(),
        };
        cluster.arguments.push("--resources".to_owned());
        cluster
            .arguments
            .push(resources.to_str().expect("text").to_owned());
        cluster
    }

    /// Stops serving; the state stays.
    pub(crate) fn stop(&mut self) {
        self.process = None;
    }

    /// Serves again, on the same ports and the same state.
    pub(crate) fn resume(&mut self) {
        let mut command = match (&self.hosts, &self.account) {
            (Some(hosts), _) => {
                let mut command = self.sandbox.tbot_among(hosts);
                command.args(["cluster", "serve"]);
                command
            }
            (None, Some(account)) => {
                let script = "mount -t tmpfs tmpfs /run && \
                              mkdir -p /run/secrets/kubernetes.io/serviceaccount && \
                              mount --bind \"$0\" /run/secrets/kubernetes.io/serviceaccount && \
                              exec \"$@\"";
                let mut command = self.sandbox.command("unshare");
                command
                    .args(["--mount", "sh", "-c", script])
                    .arg(account)
                    .arg(env!("CARGO_BIN_EXE_tbot"))
                    .args(["cluster", "serve"]);
                command
            }
            (None, None) => self.sandbox.tbot(["cluster", "serve"]),
        };
        command
            .arg("--data-dir")
            .arg(self.sandbox.path("cluster"))
            .args(["--cluster-name", &self.name])
            .args(["--listen", &format!("127.0.0.1:{}", self.port)])
            .args(["--auth-listen", &self.auth()])
            .args(["--public-addr", &self.public])
            .args(&self.arguments)
            .envs(self.environment.iter().cloned());
        let mut process = self.sandbox.spawn("cluster", command);
        let admin = self.sandbox.path("cluster/admin.sock");
        eventually("the cluster serves", || {
            process.check_running();
            UnixStream::connect(&admin)
        });
        self.process = Some(process);
    }

    /// `host:port` of the auth service.
    pub(crate) fn auth(&self) -> String {
        format!("127.0.0.1:{}", self.auth_port)
    }

    /// `host:port` of the proxy.
    pub(crate) fn proxy(&self) -> String {
        format!("localhost:{}", self.port)
    }

    /// The authority of the proxy's certificate.
    pub(crate) fn web_authority(&self) -> PathBuf {
        self.sandbox.path("cluster/web-ca.pem")
    }

    /// The output of a `tbot cluster` command that has to succeed.
    pub(crate) fn run(&self, arguments: &[&str]) -> String {
        let mut command = self.sandbox.tbot(["cluster", "--data-dir"]);
        command.arg(self.sandbox.path("cluster")).args(arguments);
        command.output().expect("tbot").success()
    }

    /// Creates or replaces resources.
    pub(crate) fn create(&self, yaml: &str) {
        let path = self.sandbox.write("created.yaml", yaml);
        self.run(&["create", "-f", path.to_str().expect("text")]);
    }

    /// A new token that lets the bot join once.
    pub(crate) fn invite(&self, bot: &str, ttl: &str) -> String {
        let text = self.run(&[
            "tokens", "add", "--bot", bot, "--ttl", ttl, "--format", "json",
        ]);
        let info: Value = serde_json::from_str(&text).expect("JSON");
        info["token"].as_str().expect("a token").to_owned()
    }

    /// The pin of the cluster's authority.
    pub(crate) fn pin(&self) -> String {
        let status = self.run(&["status"]);
        let pin = status.split_whitespace().last().expect("a pin").to_owned();
        assert!(pin.starts_with("sha256:"), "{status}");
        pin
    }

    /// Every event of the audit log of one name.
    pub(crate) fn events(&self, name: &str) -> Vec<Value> {
        fs::read_to_string(self.sandbox.path("cluster/audit.jsonl"))
            .expect("an audit log")
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("JSON"))
            .filter(|event| event["event"] == name)
            .collect()
    }

    /// The first lines of a configuration: joins the auth service directly, keeps its state in
    /// `<sandbox>/<storage>`. The caller adds `outputs:` or `services:`.
    pub(crate) fn config(&self, token: &str, storage: &str) -> String {
        format!(
            "version: v2\nauth_server: {}\nonboarding:\n  join_method: token\n  token: \"{token}\"\n  \
             ca_pins: [\"{}\"]\nstorage: {{type: directory, path: {}}}\n",
            self.auth(),
            self.pin(),
            self.sandbox.path(storage).display(),
        )
    }
}

/// Waits until `time` has come.
pub(crate) fn wait_until(time: Instant) {
    eventually("a moment has come", || {
        if Instant::now() >= time {
            Ok(())
        } else {
            Err("not yet")
        }
    });
}
