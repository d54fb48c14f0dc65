//! Every `run.sh` of `examples/` does what it says.

use std::process::Command;

use crate::common::{
    KubeApi, Moto, Process, Sandbox, eventually, free_port, repository, skip, venv,
};

/// One run of an example.
struct Example<'a> {
    sandbox: &'a Sandbox,
    command: Command,
}

impl<'a> Example<'a> {
    /// The example in the folder `name`; `None` where one of `programs` is missing.
    fn new(sandbox: &'a Sandbox, name: &str, programs: &[&str]) -> Option<Self> {
        // Servers are in places that only root's shell looks into.
        let mut path = std::env::var_os("PATH").unwrap_or_default();
        path.push(":/usr/sbin:/sbin");
        for program in programs {
            let found = std::env::split_paths(&path).any(|dir| dir.join(program).exists());
            if !found {
                skip(&format!("{program} is not installed"));
                return None;
            }
        }
        let mut command = sandbox.command(repository().join("examples").join(name).join("run.sh"));
        command
            .env("PATH", path)
            .env("TBOT", env!("CARGO_BIN_EXE_tbot"));
        for port in ["PORT", "AUTH_PORT", "APP_PORT", "DB_PORT", "SSH_PORT"] {
            command.env(port, free_port().to_string());
        }
        Some(Self { sandbox, command })
    }

    fn start(self) -> Process {
        self.sandbox.spawn("example", self.command)
    }

    /// Runs it to its end; everything it printed.
    fn run(self) -> String {
        finished(self.start())
    }
}

/// What `example` printed until it ended, as it should.
fn finished(mut example: Process) -> String {
    let status = example.wait();
    let log = example.log();
    assert!(status.success(), "{status}: {log}");
    log
}

#[test]
fn token_join() {
    let sandbox = Sandbox::new();
    let Some(example) = Example::new(&sandbox, "token-join", &[]) else {
        return;
    };
    let log = example.run();
    assert!(log.contains("CN=bot-example"), "{log}");
    assert_eq!(
        log.matches("token expired or not found").count(),
        2,
        "{log}"
    );
}

#[test]
fn ci() {
    let sandbox = Sandbox::new();
    let Some(example) = Example::new(&sandbox, "ci", &["openssl"]) else {
        return;
    };
    let log = example.run();
    assert!(log.contains("CN=bot-ci"), "{log}");
    assert!(log.contains("the nearest rule differs in ref"), "{log}");
    assert!(log.contains("ref is"), "{log}");
}

#[test]
fn kubernetes() {
    let sandbox = Sandbox::new();
    let Some(example) = Example::new(&sandbox, "kubernetes", &["openssl", "xxd"]) else {
        return;
    };
    let log = example.run();
    assert!(log.contains("CN=bot-example"), "{log}");
    assert!(log.contains("did not match any allow rules"), "{log}");
    assert!(log.contains("its audience is"), "{log}");
}

#[test]
fn fluentd_event_handler() {
    let sandbox = Sandbox::new();
    let Some(example) = Example::new(&sandbox, "fluentd-event-handler", &[]) else {
        return;
    };
    let log = example.run();
    assert!(log.contains("Verification: OK"), "{log}");
    assert!(log.contains("ALPN protocol: h2"), "{log}");
}

#[test]
fn access_plugin_kubernetes() {
    let sandbox = Sandbox::new();
    let programs = ["kubectl"];
    let Some(mut example) = Example::new(&sandbox, "access-plugin-kubernetes", &programs) else {
        return;
    };
    let api = KubeApi::start(&sandbox);
    example
        .command
        .env("KUBECONFIG", api.kubeconfig(&sandbox, None));
    let log = example.run();
    assert!(log.contains("CN=bot-pagerduty"), "{log}");
}

#[test]
fn application_curl() {
    let sandbox = Sandbox::new();
    let Some(example) = Example::new(&sandbox, "application-curl", &["nginx"]) else {
        return;
    };
    let log = example.run();
    assert!(log.contains("hello, whoever you are"), "{log}");
    assert!(log.contains(", is serial="), "{log}");
}

#[test]
fn database_tls() {
    let sandbox = Sandbox::new();
    let Some(example) = Example::new(&sandbox, "database-tls", &["psql", "setpriv"]) else {
        return;
    };
    let log = example.run();
    assert!(log.contains("hello reader, you are"), "{log}");
    assert!(log.contains(", is serial="), "{log}");
}

#[test]
fn openssh() {
    let sandbox = Sandbox::new();
    let Some(example) = Example::new(&sandbox, "openssh", &["sshd"]) else {
        return;
    };
    let log = example.run();
    assert!(log.contains("ID bot-client"), "{log}");
}

#[test]
fn eks_by_label() {
    let sandbox = Sandbox::new();
    let Some(mut example) = Example::new(&sandbox, "eks-by-label", &["kubectl"]) else {
        return;
    };
    let Some(moto) = Moto::start(&sandbox, "discovery", "i-0abc123") else {
        return;
    };
    moto.verify_nothing();
    let clusters = [("prod-1", "prod"), ("prod-2", "prod"), ("test-1", "test")];
    for (name, env) in clusters {
        let mut python = sandbox.command(venv().join("bin/python"));
        python
            .arg(repository().join("tests/support/eks_cluster.py"))
            .args([&moto.url(), name, env])
            .envs(moto.environment());
        assert!(python.status().unwrap().success());
    }
    example
        .command
        .envs(moto.environment())
        .env("AWS_ENDPOINT_URL", moto.url());
    let log = example.run();
    assert!(log.contains("example.org-prod-1"), "{log}");
    assert!(log.contains("example.org-prod-2"), "{log}");
    assert!(!log.contains("test-1"), "{log}");
}

#[test]
fn aws_roles_anywhere() {
    let sandbox = Sandbox::new();
    let Some(mut example) = Example::new(&sandbox, "aws-roles-anywhere", &[]) else {
        return;
    };
    let python = venv().join("bin/python");
    if !python.exists() {
        return skip("no Python environment");
    }
    let (anchor, port) = (sandbox.path("anchor.pem"), free_port());
    let support = repository().join("tests/support");
    let setup = format!(
        "#!/bin/sh\nset -e\ncp \"$1\" {}\nuntil curl -s http://127.0.0.1:{port} > /dev/null; do sleep 0.1; done\n",
        anchor.display()
    );
    let setup = sandbox.write("setup.sh", setup);
    let url = format!("http://127.0.0.1:{port}");
    let program = format!(
        "{} {}/aws_profile.py default",
        python.display(),
        support.display()
    );
    example
        .command
        .env("AWS_SETUP", format!("sh {}", setup.display()))
        .env("AWS_ENDPOINT_URL_ROLESANYWHERE", url)
        .env("AWS_PROGRAM", program);
    let mut example = example.start();
    eventually("the trust anchor is set up", || {
        example.check_running();
        std::fs::read(&anchor)
    });
    let mut server = sandbox.command(&python);
    server
        .arg(support.join("roles_anywhere.py"))
        .arg(port.to_string())
        .args([&anchor, &sandbox.path("granted.json")]);
    let _server = sandbox.spawn("roles-anywhere", server);
    let log = finished(example);
    assert!(log.contains("aws_session_token = …"), "{log}");
}
