//! `tbot ssh-proxy-command`, as OpenSSH starts it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use crate::common::{Cluster, OutputText as _, Process, Sandbox, eventually, free_port, skip};

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
            "missing/identity; is it in the destination of an",
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

/// A role for SSH as `user`, and one that sees no nodes.
fn resources(user: &str, port: u16) -> String {
    format!(
        "kind: role
version: v7
metadata: {{name: machines}}
spec:
  allow:
    logins: ['{user}']
    node_labels: {{env: test}}
    rules: [{{resources: [host_cert], verbs: [create]}}]
---
kind: role
version: v7
metadata: {{name: elsewhere}}
spec: {{allow: {{logins: ['{user}'], node_labels: {{env: production}}}}}}
---
kind: bot
version: v1
metadata: {{name: example}}
spec: {{roles: [machines]}}
---
kind: bot
version: v1
metadata: {{name: stranger}}
spec: {{roles: [elsewhere]}}
---
kind: node
sub_kind: openssh
version: v2
metadata: {{name: 6d1e2f1e-0000-4000-8000-000000000001, labels: {{env: test}}}}
spec: {{hostname: node, addr: '127.0.0.1:{port}'}}
---
kind: node
sub_kind: openssh
version: v2
metadata: {{name: 6d1e2f1e-0000-4000-8000-000000000002, labels: {{env: test}}}}
spec: {{hostname: away, addr: '127.0.0.1:1'}}
"
    )
}

/// An OpenSSH server whose key, certificate and trusted users are the files of an `ssh_host` output.
fn sshd(sandbox: &Sandbox, files: &Path, port: u16) -> Process {
    let files = files.display();
    let config = format!(
        "ListenAddress 127.0.0.1:{port}\nHostKey {files}/ssh_host\nHostCertificate {files}/ssh_host-cert.pub\n\
         TrustedUserCAKeys {files}/ssh_host-user-ca.pub\nAuthorizedKeysFile none\nPasswordAuthentication no\n\
         KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nStrictModes no\nPidFile none\n\
         Subsystem sftp internal-sftp\n"
    );
    let config = sandbox.write("sshd_config", config);
    // Where it is started by root it wants this directory.
    drop(std::fs::create_dir_all("/run/sshd"));
    let mut command = sandbox.command("/usr/sbin/sshd");
    command.args(["-D", "-e", "-f"]).arg(config);
    let mut server = sandbox.spawn("sshd", command);
    eventually("sshd listens", || {
        server.check_running();
        TcpStream::connect(("127.0.0.1", port))
    });
    server
}

/// OpenSSH's client with the configuration that `agent` has written.
fn ssh(sandbox: &Sandbox, agent: &str, words: &[&str]) -> Command {
    let mut command = sandbox.command("ssh");
    command
        .arg("-F")
        .arg(sandbox.path(format!("{agent}/identity/ssh_config")))
        .args(["-o", "BatchMode=yes"])
        .args(words);
    command
}

fn agent(sandbox: &Sandbox, cluster: &Cluster<'_>, bot: &str, more: &str) -> Process {
    let token = cluster.invite(bot, "10m");
    let folder = sandbox.path(bot);
    let folder = folder.display();
    let config = cluster.config(&token, &format!("{bot}/storage"))
        + &format!(
            "outputs:\n- {{type: identity, destination: {{type: directory, path: {folder}/identity}}}}\n"
        )
        + &more.replace("FOLDER", &folder.to_string());
    let config = sandbox.write(&format!("{bot}.yaml"), config);
    let mut command = sandbox.tbot(["start", "-c"]);
    command
        .arg(config)
        .env("SSL_CERT_FILE", cluster.web_authority());
    let mut process = sandbox.spawn(bot, command);
    eventually("its ssh_config is written", || {
        process.check_running();
        std::fs::metadata(sandbox.path(format!("{bot}/identity/ssh_config")))
    });
    process
}

/// A running `cat` at the other end.
struct Held {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Held {
    fn open(mut command: Command) -> Self {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            input: process.stdin.take().unwrap(),
            output: BufReader::new(process.stdout.take().unwrap()),
            process,
        }
    }

    fn echoes(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
        let mut back = String::new();
        self.output.read_line(&mut back).unwrap();
        assert_eq!(back.trim_end(), line);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[test]
fn openssh_reaches_a_real_server_with_what_the_agent_wrote() {
    if !Path::new("/usr/sbin/sshd").exists() {
        return skip("no sshd (Debian: openssh-server)");
    }
    let sandbox = Sandbox::new();
    let user = sandbox.command("id").arg("-un").output().unwrap().success();
    let user = user.trim();
    let port = free_port();
    let cluster = Cluster::start(&sandbox, &resources(user, port));
    let host = format!("node.{}", Cluster::NAME);
    let ours = agent(
        &sandbox,
        &cluster,
        "example",
        &format!(
            "- {{type: ssh_host, principals: [{host}], destination: {{type: directory, path: FOLDER/host}}}}\n"
        ),
    );
    let files = sandbox.path("example/host");
    eventually("the host's files are written", || {
        std::fs::metadata(files.join("ssh_host-user-ca.pub"))
    });
    let _sshd = sshd(&sandbox, &files, port);
    let place = format!("{user}@{host}");
    let reaches = |agent: &str| ssh(&sandbox, agent, &[&place, "echo", "reached"]).output();
    assert_eq!(reaches("example").unwrap().success(), "reached\n");

    // Much in both directions.
    let data = sandbox.path("data");
    let size = 8 * 1024 * 1024;
    std::fs::write(&data, vec![b'x'; size]).unwrap();
    let mut command = ssh(&sandbox, "example", &[&place, "cat"]);
    command.stdin(std::fs::File::open(&data).unwrap());
    let back = command.output().unwrap();
    assert!(
        back.status.success() && back.stdout.len() == size,
        "{}",
        back.stdout.len()
    );

    // A connection is older than the identity that the next one is opened with.
    let mut held = Held::open(ssh(&sandbox, "example", &[&place, "cat"]));
    held.echoes("before");
    let identity = sandbox.path("example/identity/identity");
    let before = std::fs::read(&identity).unwrap();
    ours.signal("HUP");
    eventually("the identity is renewed", || {
        (std::fs::read(&identity).unwrap() != before)
            .then_some(())
            .ok_or("not yet")
    });
    held.echoes("after");
    assert_eq!(reaches("example").unwrap().success(), "reached\n");

    // What is refused, and why.
    let told = |agent: &str, place: &str, part: &str| {
        let refused = ssh(&sandbox, agent, &[place, "true"]).output().unwrap();
        assert_eq!(refused.status.code(), Some(255), "{}", refused.text());
        assert!(refused.text().contains(part), "{part}: {}", refused.text());
    };
    let _stranger = agent(&sandbox, &cluster, "stranger", "");
    told(
        "stranger",
        &place,
        "is there a node of that name that the bot's roles allow",
    );
    let at = |node: &str| format!("{user}@{node}.{}", Cluster::NAME);
    told(
        "example",
        &at("nobody"),
        "reaching nobody of test.example.org through localhost:",
    );
    told("example", &at("away"), "127.0.0.1:1 cannot be reached");
    told(
        "example",
        &format!("somebody-else@{host}"),
        "Permission denied",
    );

    // A lock ends what is open and lets nothing new begin.
    cluster.run(&["lock", "--bot", "example"]);
    eventually("the connection ends", || {
        held.process.try_wait().unwrap().ok_or("it is open")
    });
    told("example", &place, "lock");
    let events = cluster.events("node.connect");
    let (connected, failed): (Vec<_>, Vec<_>) =
        events.iter().partition(|event| event["success"] == true);
    assert!(connected.len() >= 4, "{connected:?}");
    for event in connected {
        assert_eq!(event["user"], "bot-example");
        assert_eq!(event["server_hostname"], "node");
        assert_eq!(event["code"], "TNC00I");
    }
    assert_eq!(failed.len(), 1, "{failed:?}");
    assert_eq!(failed[0]["server_hostname"], "away");
    assert_eq!(failed[0]["code"], "TNC00E");
    let error = failed[0]["error"].as_str().unwrap();
    assert!(error.contains("127.0.0.1:1 cannot be reached"), "{error}");
}
