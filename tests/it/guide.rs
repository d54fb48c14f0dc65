//! The AWS deployment guide, followed step by step on a booted systemd.
//!
//! Commands and YAML are those a reader of the guide types, with these replacements: `tbot cluster`
//! for `tctl` (the reader's own machine is the sandbox), the account id that moto gives out for
//! `111111111111`, and the proxy's name resolves to this machine. `sudo` runs its command: the
//! machine's shell is root already. What an EC2 instance has by itself is prepared: the user
//! `teleport`, the directory of the socket, credentials of an instance role (here in a drop-in, as
//! `systemctl edit tbot` would make it).

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;

use crate::common::{
    Moto, OutputText as _, Process, Sandbox, Systemd, eventually, repository, skip, venv,
};

const BOT: &str = "\
kind: bot
version: v1
metadata:
  name: example
spec:
  roles: []
";

const TOKEN: &str = r#"kind: token
version: v2
metadata:
  name: example-bot
spec:
  roles: [Bot]
  bot_name: example
  join_method: iam
  allow:
  - aws_account: "111111111111"
    aws_arn: "arn:aws:sts::111111111111:assumed-role/teleport-bot-role/i-*"
"#;

const TBOT: &str = "\
version: v2
proxy_server: example.teleport.sh:443
onboarding:
  join_method: iam
  token: example-bot
storage:
  type: directory
  path: /var/lib/teleport/bot
services:
- type: workload-identity-api
  listen: unix:///opt/machine-id/workload.sock
  selector:
    name: example-workload-identity
  attestors:
    systemd:
      enabled: true
";

const WORKLOAD_IDENTITY: &str = "\
kind: workload_identity
version: v1
metadata:
  name: example-workload-identity
  labels:
    example: getting-started
spec:
  spiffe:
    id: /svc/foo
";

const TEMPLATED: &str = r#"kind: workload_identity
version: v1
metadata:
  name: example-workload-identity
  labels:
    example: getting-started
spec:
  spiffe:
    id: "/svc/{{workload.systemd.service}}"
"#;

const INSPECT: &str = "tbot spiffe-inspect --path unix:///opt/machine-id/workload.sock";

/// The reader at two machines, and a record of what they saw.
struct Reader<'a> {
    own: &'a Sandbox,
    instance: &'a Systemd,
    record: String,
}

impl Reader<'_> {
    /// A command on the reader's own machine.
    fn local(&mut self, line: &str) -> String {
        let mut words = line.split_whitespace();
        assert_eq!(words.next(), Some("tbot"));
        let mut command = self.own.tbot(words);
        command.env("TBOT_CLUSTER_DATA_DIR", self.own.path("cluster"));
        let text = command.output().unwrap().success();
        self.note("local", line, &text);
        text
    }

    /// A command on the instance, which has to succeed.
    fn instance(&mut self, line: &str) -> String {
        let text = self.instance.shell(line).success();
        self.note("ec2", line, &text);
        text
    }

    fn note(&mut self, place: &str, line: &str, output: &str) {
        writeln!(self.record, "{place}$ {line}\n{output}").unwrap();
    }
}

/// An address of this machine that no other test uses, so that the guide's port 443 is free.
fn own_address() -> Ipv4Addr {
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, 77, high, low)
}

/// A certificate for the proxy's public name, and the authority that a public one would have.
fn web_certificate(sandbox: &Sandbox) -> [PathBuf; 3] {
    sandbox.write(
        "web.ext",
        "subjectAltName=DNS:example.teleport.sh\nbasicConstraints=CA:FALSE\n",
    );
    for line in [
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout ca.key -out ca.crt -subj /CN=public",
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout web.key -out web.csr -subj /CN=example.teleport.sh",
        "x509 -req -in web.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out web.crt -extfile web.ext",
    ] {
        let mut command = sandbox.command("openssl");
        command
            .args(line.split_whitespace())
            .output()
            .unwrap()
            .success();
    }
    ["ca.crt", "web.crt", "web.key"].map(|name| sandbox.path(name))
}

fn serve(sandbox: &Sandbox, address: Ipv4Addr, moto: &Moto) -> Process {
    let mut command: Command = sandbox.tbot(["cluster", "serve"]);
    command
        .arg("--data-dir")
        .arg(sandbox.path("cluster"))
        .args(["--cluster-name", "teleport.example.com"])
        .args(["--listen", &format!("{address}:443")])
        .args(["--public-addr", "example.teleport.sh:443"])
        .arg("--tls-cert")
        .arg(sandbox.path("web.crt"))
        .arg("--tls-key")
        .arg(sandbox.path("web.key"))
        .args(["--sts-endpoint", &moto.url()]);
    let mut cluster = sandbox.spawn("cluster", command);
    eventually("the cluster listens", || {
        cluster.check_running();
        std::net::TcpStream::connect((address, 443))
    });
    cluster
}

/// What an EC2 instance of the guide has before its reader starts.
fn prepare(instance: &Systemd, sandbox: &Sandbox, address: Ipv4Addr, moto: &Moto) {
    instance.write("/usr/local/bin/sudo", "#!/bin/sh\nexec \"$@\"\n");
    let authority = std::fs::read_to_string(sandbox.path("ca.crt")).unwrap();
    instance.write("/root/public-ca.pem", &authority);
    instance
        .shell(&format!(
            "chmod 755 /usr/local/bin/sudo
             printf '127.0.0.1 localhost\\n{address} example.teleport.sh\\n' > /etc/hosts
             cat /root/public-ca.pem >> /etc/ssl/certs/ca-certificates.crt
             useradd --system --home-dir /var/lib/teleport teleport
             install -d -o teleport -g teleport /var/lib/teleport /opt/machine-id"
        ))
        .success();
    let mut drop_in = "[Service]\n".to_owned();
    for (name, value) in moto.environment() {
        writeln!(drop_in, "Environment=\"{name}={value}\"").unwrap();
    }
    instance.write("/etc/systemd/system/tbot.service.d/override.conf", &drop_in);
}

/// A unit that runs a command once, as any workload would.
fn workload(instance: &Systemd, name: &str, command: &str) {
    let unit = format!(
        "[Service]\nType=oneshot\nTimeoutStartSec=60\nEnvironment=SPIFFE_ENDPOINT_SOCKET=unix:///opt/machine-id/workload.sock\nExecStart={command}\n"
    );
    instance.write(&format!("/etc/systemd/system/{name}.service"), &unit);
    instance.run(["systemctl", "daemon-reload"]).success();
}

/// A unit with a SPIFFE library that nobody here wrote, over gRPC's C core.
fn sdk(instance: &Systemd) {
    let script = repository().join("tests/support/workload.py");
    workload(
        instance,
        "sdk-app",
        &format!(
            "{} {}",
            venv().join("bin/python").display(),
            script.display()
        ),
    );
    let started = instance.run(["systemctl", "start", "sdk-app"]);
    let journal = instance
        .run(["journalctl", "--no-pager", "-o", "cat", "-u", "sdk-app"])
        .success();
    assert!(started.status.success(), "{journal}");
    assert!(
        journal.contains("spiffe://teleport.example.com/svc/sdk-app\n"),
        "{journal}"
    );
}

#[test]
fn the_aws_guide_works_as_printed() {
    if let Some(why) = Systemd::unavailable() {
        return skip(&why);
    }
    let sandbox = Sandbox::new();
    let Some(moto) = Moto::start(&sandbox, "teleport-bot-role", "i-0abc123") else {
        return skip("the Python environment is missing: make setup");
    };
    let address = own_address();
    web_certificate(&sandbox);
    let _cluster = serve(&sandbox, address, &moto);
    let instance = Systemd::boot(&sandbox);
    prepare(&instance, &sandbox, address, &moto);
    let mut reader = Reader {
        own: &sandbox,
        instance: &instance,
        record: String::new(),
    };

    // Steps 2 and 3: bot and token.
    sandbox.write("bot.yaml", BOT);
    reader.local("tbot cluster create bot.yaml");
    sandbox.write(
        "bot-token.yaml",
        TOKEN.replace("111111111111", Moto::ACCOUNT),
    );
    reader.local("tbot cluster create bot-token.yaml");

    // Step 4: configuration and service.
    instance.write("/etc/tbot.yaml", TBOT);
    reader.instance(
        "sudo tbot install systemd \\
  --write \\
  --config /etc/tbot.yaml \\
  --user teleport \\
  --group teleport \\
  --anonymous-telemetry",
    );
    instance
        .run([
            "systemd-analyze",
            "verify",
            "/etc/systemd/system/tbot.service",
        ])
        .success();
    reader.instance("sudo systemctl daemon-reload");
    reader.instance("sudo systemctl enable tbot --now");
    let status = reader.instance("sudo systemctl status tbot");
    assert!(status.contains("active (running)"), "{status}");

    assert!(
        !status.contains("cannot refuse symbolic links"),
        "the unit forbids what the agent needs: {status}"
    );

    // Step 5: the workload identity. Step 6: look at it.
    sandbox.write("workload-identity.yaml", WORKLOAD_IDENTITY);
    reader.local("tbot cluster create ./workload-identity.yaml");
    let shown = eventually("the socket gives the SVID", || {
        let output = instance.shell(INSPECT);
        if output.status.success() {
            Ok(output.text())
        } else {
            Err(output.text())
        }
    });
    reader.note("ec2", INSPECT, &shown);
    for line in [
        "INFO [TBOT]      Inspecting SPIFFE Workload API Endpoint",
        "unix:///opt/machine-id/workload.sock",
        "- spiffe://teleport.example.com/svc/foo",
        "- Expiry: ",
        "Trust Bundles",
        "- teleport.example.com",
    ] {
        assert!(shown.contains(line), "{line:?} is not in:\n{shown}");
    }

    // The templated identity: each unit gets its own name.
    sandbox.write("workload-identity.yaml", TEMPLATED);
    reader.local("tbot cluster create -f workload-identity.yaml");
    for name in ["my-app", "other-app"] {
        workload(
            &instance,
            name,
            "/usr/local/bin/tbot spiffe-inspect --path unix:///opt/machine-id/workload.sock",
        );
        reader.instance(&format!("sudo systemctl start {name}"));
        let journal = eventually("the journal has it", || {
            let journal = instance
                .run(["journalctl", "--no-pager", "-o", "cat", "-u", name])
                .success();
            if journal.contains("Trust Bundles") {
                Ok(journal)
            } else {
                Err(journal)
            }
        });
        reader.note("ec2", &format!("journalctl -o cat -u {name}"), &journal);
        assert!(
            journal.contains(&format!("- spiffe://teleport.example.com/svc/{name}\n")),
            "{journal}"
        );
    }

    // A caller that is no unit has no name to put there: nothing is issued to it.
    let refused = instance.shell(INSPECT);
    assert!(!refused.status.success(), "{}", refused.text());
    assert!(!refused.text().contains("spiffe://"), "{}", refused.text());

    // Step 7: an SDK finds the socket through SPIFFE_ENDPOINT_SOCKET.
    sdk(&instance);

    // "Restart the instance to apply a new configuration."
    reader.instance("sudo systemctl restart tbot");
    eventually("the restarted agent serves", || {
        let output = instance.run(["systemctl", "restart", "my-app"]);
        if output.status.success() {
            Ok(())
        } else {
            Err(output.text())
        }
    });

    let record = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("aws-guide.txt");
    std::fs::write(record, reader.record).unwrap();
}
