//! The outputs of one agent, against what an 18.0.0 agent wrote from the same configuration, and
//! before the programs that read them.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;

use crate::common::{
    Cluster, Moto, OutputText as _, Process, RECORDED, Sandbox, eventually, free_port, repository,
    skip, venv,
};

/// What there is to reach.
const SERVED: &str = r#"
---
kind: app
version: v3
metadata: {name: echo}
spec: {uri: "http://localhost:8080", public_addr: echo.example.teleport.sh}
---
kind: db
version: v3
metadata: {name: pg}
spec: {protocol: postgres, uri: "localhost:5432"}
---
kind: kube_cluster
version: v3
metadata: {name: k1, labels: {env: test}}
spec: {}
---
kind: kube_cluster
version: v3
metadata: {name: twin-eks-eu, labels: {teleport.internal/discovered-name: twin}}
spec: {}
---
kind: kube_cluster
version: v3
metadata: {name: twin-eks-us, labels: {teleport.internal/discovered-name: twin}}
spec: {}
"#;

/// The outputs of the recording, each to a directory of its name.
const OUTPUTS: [(&str, &str); 13] = [
    ("application", "type: application, app_name: echo"),
    (
        "application-specific",
        "type: application, app_name: echo, specific_tls_naming: true",
    ),
    (
        "database",
        "type: database, service: pg, username: alice, database: app",
    ),
    (
        "database-cockroach",
        "type: database, format: cockroach, service: pg, username: alice, database: app",
    ),
    (
        "database-mongo",
        "type: database, format: mongo, service: pg, username: alice, database: app",
    ),
    (
        "database-tls",
        "type: database, format: tls, service: pg, username: alice, database: app",
    ),
    ("identity", "type: identity"),
    ("kubernetes", "type: kubernetes, kubernetes_cluster: k1"),
    (
        "kubernetes-no-exec",
        "type: kubernetes, kubernetes_cluster: k1, disable_exec_plugin: true",
    ),
    (
        "kubernetes-v2",
        "type: kubernetes/v2, selectors: [{labels: {env: test}}]",
    ),
    ("ssh_host", "type: ssh_host, principals: [node.example.com]"),
    (
        "x509",
        "type: workload-identity-x509, selector: {name: example-workload-identity}",
    ),
    (
        "jwt",
        "type: workload-identity-jwt, selector: {name: example-workload-identity}, \
         audiences: [example.com]",
    ),
];

/// Calls that a cluster may receive for all outputs of the recording.
const CALLS: usize = 40;

/// What the recordings were made with.
fn resources() -> String {
    format!("{RECORDED}{SERVED}")
}

/// `services` with a directory for each output.
fn services(sandbox: &Sandbox, outputs: &[(&str, &str)]) -> String {
    let mut text = "services:\n".to_owned();
    for (name, keys) in outputs {
        let path = sandbox.path(name);
        writeln!(
            text,
            "  - {{{keys}, destination: {{type: directory, path: {}}}}}",
            path.display()
        )
        .unwrap();
    }
    text
}

/// A one-shot run that joins with an invitation.
fn once(sandbox: &Sandbox, cluster: &Cluster<'_>, outputs: &[(&str, &str)]) -> Output {
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "storage") + &services(sandbox, outputs);
    let config = sandbox.write("tbot.yaml", config);
    let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
    command.arg(config);
    command.env("SSL_CERT_FILE", cluster.web_authority());
    command.output().unwrap()
}

fn run(sandbox: &Sandbox, program: &str, arguments: &[&str]) -> String {
    let mut command = sandbox.command(program);
    command.args(arguments).output().unwrap().success()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn files(directory: &Path) -> Vec<(PathBuf, u32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            let mode = fs::metadata(&path).unwrap().permissions().mode();
            found.push((path, mode & 0o7777));
        }
    }
    found
}

#[test]
fn every_file_is_what_an_18_0_0_agent_wrote() {
    let sandbox = Sandbox::new();
    let Some(moto) = Moto::start(&sandbox, "teleport-bot-role", "i-0abc123") else {
        return skip("the Python environment is missing: make setup");
    };
    let sts = ["--sts-endpoint", &moto.url()];
    let cluster = Cluster::start_with(&sandbox, &resources(), free_port(), &sts);
    let config = format!(
        "version: v2\nproxy_server: {}\nonboarding: {{join_method: iam, token: example-bot}}\n\
         storage: {{type: directory, path: {}}}\noneshot: true\n{}",
        cluster.proxy(),
        sandbox.path("storage").display(),
        services(&sandbox, &OUTPUTS),
    );
    let config = sandbox.write("tbot.yaml", config);
    let mut command = sandbox.tbot(["start", "--debug", "-c"]);
    command
        .arg(&config)
        .envs(moto.environment())
        .env("SSL_CERT_FILE", cluster.web_authority());
    let log = command.output().unwrap().success();

    let calls: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("Calling the cluster"))
        .collect();
    assert!(
        (OUTPUTS.len()..=CALLS).contains(&calls.len()),
        "{} calls: {calls:#?}",
        calls.len()
    );

    let folders: Vec<PathBuf> = OUTPUTS.iter().map(|(name, _)| sandbox.path(name)).collect();
    for folder in &folders {
        assert_eq!(
            fs::read(folder.join(".write-test")).unwrap(),
            b"",
            "{folder:?}"
        );
        for (path, mode) in files(folder) {
            assert_eq!(mode, 0o600, "{path:?}");
        }
    }
    // `tbot init` knows every one of these files, and no other.
    for folder in &folders {
        let mut init = sandbox.tbot(["init", "-c"]);
        init.arg(&config).arg("--init-dir").arg(folder);
        let before = files(folder);
        let told = init.output().unwrap().success();
        assert!(!told.contains("No agent writes this"), "{told}");
        assert_eq!(files(folder).len(), before.len(), "{folder:?}");
    }
    let mut describe = sandbox.command(venv().join("bin/python"));
    describe
        .arg(repository().join("tests/support/outputs.py"))
        .args(&folders);
    let shown = describe
        .output()
        .unwrap()
        .success()
        .replace(&cluster.proxy(), "PROXY")
        .replace(env!("CARGO_BIN_EXE_tbot"), "TBOT");
    let expected = fs::read_to_string(repository().join("tests/golden/outputs.txt")).unwrap();
    if shown != expected {
        let [shown, expected] = [("shown.txt", shown), ("expected.txt", expected)]
            .map(|(name, text)| sandbox.write(name, text));
        let mut diff = sandbox.command("diff");
        diff.arg("-u").arg(expected).arg(shown);
        panic!("{}", diff.output().unwrap().text());
    }

    for folder in &folders {
        let [certificate, ca] = ["tlscert", "teleport-user-ca.crt"].map(|name| folder.join(name));
        if certificate.exists() && ca.exists() {
            let arguments = ["verify", "-CAfile", text(&ca), text(&certificate)];
            let verdict = run(&sandbox, "openssl", &arguments);
            assert!(verdict.ends_with("tlscert: OK\n"), "{verdict}");
        }
    }
}

#[test]
fn one_failing_output_keeps_no_other_from_being_written() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &resources());
    let long = "n".repeat(300);
    let long = format!("type: database, service: {long}");
    let outputs = [
        ("application", "type: application, app_name: echo"),
        ("no-app", "type: application, app_name: nothing"),
        (
            "hostile",
            r#"type: application, app_name: "x\" || name == \"echo""#,
        ),
        (
            "lines",
            r#"type: kubernetes, kubernetes_cluster: "k1\n../x""#,
        ),
        ("long", &long),
        ("twins", "type: kubernetes, kubernetes_cluster: twin"),
        (
            "one-twin",
            "type: kubernetes, kubernetes_cluster: twin-eks-us",
        ),
        (
            "no-cluster",
            "type: kubernetes/v2, selectors: [{labels: {env: none}}]",
        ),
        (
            "role",
            "type: ssh_host, principals: [a], roles: [event-handler]",
        ),
        ("ssh_host", "type: ssh_host, principals: [a, 'b,c']"),
    ];
    let output = once(&sandbox, &cluster, &outputs);
    let told = output.text();
    assert_eq!(output.status.code(), Some(1), "{told}");
    for problem in [
        r#"application "nothing" not found"#,
        r#"kubernetes cluster "twin" is ambiguous: it was discovered as "twin-eks-eu", "twin-eks-us""#,
        "6 of the outputs failed",
    ] {
        assert!(
            told.contains(problem) || told.contains(&problem.replace('"', "\\\"")),
            "{problem}: {told}"
        );
    }
    for (name, written) in [
        ("application", Some("tlscert")),
        ("no-app", None),
        ("hostile", None),
        ("lines", None),
        ("long", None),
        ("twins", None),
        ("one-twin", Some("kubeconfig.yaml")),
        ("no-cluster", Some("kubeconfig.yaml")),
        ("role", None),
        ("ssh_host", Some("ssh_host-cert.pub")),
    ] {
        let count = files(&sandbox.path(name)).len();
        match written {
            Some(file) => assert!(sandbox.path(name).join(file).exists(), "{name}: {told}"),
            // The proof that it could be written.
            None => assert_eq!(count, 1, "{name}"),
        }
    }
    let empty = fs::read_to_string(sandbox.path("no-cluster/kubeconfig.yaml")).unwrap();
    assert!(empty.contains("clusters: null\n"), "{empty}");
    let principals = run(
        &sandbox,
        "ssh-keygen",
        &[
            "-L",
            "-f",
            text(&sandbox.path("ssh_host/ssh_host-cert.pub")),
        ],
    );
    assert!(principals.contains(" a\n"), "{principals}");
}

/// A TLS server that lets in whom `authorities` certify, and answers with who came.
fn server(sandbox: &Sandbox, authorities: &Path) -> (Process, u16, PathBuf) {
    let [key, certificate] = ["server.key", "server.crt"].map(|name| sandbox.path(name));
    run(
        sandbox,
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-subj",
            "/CN=kubernetes",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-days",
            "1",
            "-keyout",
            text(&key),
            "-out",
            text(&certificate),
        ],
    );
    let port = free_port();
    let mut command = sandbox.command("python3");
    command
        .arg(repository().join("tests/support/kubernetes.py"))
        .arg(port.to_string())
        .args([&certificate, &key, authorities]);
    let mut process = sandbox.spawn("kubernetes", command);
    eventually("the server listens", || {
        process.check_running();
        std::net::TcpStream::connect(("127.0.0.1", port))
    });
    (process, port, certificate)
}

#[test]
fn kubectl_takes_the_kubeconfig_and_its_plugin() {
    let sandbox = Sandbox::new();
    if sandbox
        .command("kubectl")
        .arg("version")
        .arg("--client")
        .output()
        .is_err()
    {
        return skip("kubectl is missing: make setup");
    }
    let cluster = Cluster::start(&sandbox, &resources());
    let outputs = [
        (
            "plugin",
            "type: kubernetes/v2, selectors: [{name: k1, default_namespace: web}]",
        ),
        (
            "embedded",
            "type: kubernetes, kubernetes_cluster: k1, disable_exec_plugin: true",
        ),
        ("a b: #c", "type: kubernetes, kubernetes_cluster: k1"),
    ];
    once(&sandbox, &cluster, &outputs[..2]).success();
    let quoted = format!(
        "  - {{{}, destination: {{type: directory, path: \"{}\"}}}}\n",
        outputs[2].1,
        sandbox.path(outputs[2].0).display()
    );
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "other") + "services:\n" + &quoted;
    let config = sandbox.write("other.yaml", config);
    let mut command = sandbox.tbot(["start", "--oneshot", "-c"]);
    command
        .arg(config)
        .env("SSL_CERT_FILE", cluster.web_authority());
    command.output().unwrap().success();

    let authorities = sandbox.path("embedded/teleport-user-ca.crt");
    let (_server, port, certificate) = server(&sandbox, &authorities);
    for (name, _) in outputs {
        let kubeconfig = sandbox.path(name).join("kubeconfig.yaml");
        let kubectl = |arguments: &[&str]| {
            let mut command = sandbox.command("kubectl");
            command.arg("--kubeconfig").arg(&kubeconfig).args(arguments);
            let output = command.output().unwrap();
            output.success();
            String::from_utf8(output.stdout).unwrap()
        };
        let view: Value =
            serde_json::from_str(&kubectl(&["config", "view", "-o", "json", "--raw"])).unwrap();
        let context = format!("{}-k1", Cluster::NAME);
        assert_eq!(view["current-context"], context.as_str());
        assert_eq!(view["contexts"][0]["name"], context.as_str());
        let namespace = &view["contexts"][0]["context"]["namespace"];
        assert_eq!(namespace.as_str(), (name == "plugin").then_some("web"));
        // The same file for a server of ours; kubectl writes it anew.
        kubectl(&[
            "config",
            "set-cluster",
            &context,
            &format!("--server=https://127.0.0.1:{port}"),
            "--tls-server-name=",
            &format!("--certificate-authority={}", certificate.display()),
        ]);
        let answer = kubectl(&["get", "--raw", "/whoami"]);
        assert_eq!(answer.trim(), "bot-example", "{name}");
    }

    let shown = run(
        &sandbox,
        env!("CARGO_BIN_EXE_tbot"),
        &[
            "kube",
            "credentials",
            "--destination-dir",
            text(&sandbox.path("plugin")),
        ],
    );
    assert!(shown.ends_with("}\n\n"), "{shown}");
    let head = r#"{"kind":"ExecCredential","apiVersion":"client.authentication.k8s.io/v1beta1","spec":{"interactive":false},"status":{"expirationTimestamp":"20"#;
    assert!(shown.starts_with(head), "{shown}");
    let credential: Value = serde_json::from_str(&shown).unwrap();
    let status = &credential["status"];
    for (key, file) in [
        ("clientCertificateData", "tlscert"),
        ("clientKeyData", "key"),
    ] {
        let written = fs::read_to_string(sandbox.path("plugin").join(file)).unwrap();
        assert_eq!(status[key], written.as_str());
    }

    for (name, content, problem) in [
        ("missing", None, "missing/identity"),
        ("empty", Some(""), "empty/identity"),
        (
            "cut",
            Some("-----BEGIN PRIVATE KEY-----\nAAAA\n"),
            "cut/identity",
        ),
    ] {
        if let Some(content) = content {
            sandbox.write(&format!("{name}/identity"), content);
        }
        let mut command = sandbox.tbot(["kube", "credentials", "--destination-dir"]);
        let output = command.arg(sandbox.path(name)).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{name}");
        assert!(
            output.stdout.is_empty() && output.text().contains(problem),
            "{}",
            output.text()
        );
    }
}
