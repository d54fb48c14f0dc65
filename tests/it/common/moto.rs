//! An AWS STS that verifies signatures: moto's server.

use std::process::Command;

use super::sandbox::OutputText as _;
use super::{Process, Sandbox, eventually, free_port, repository, venv};

/// A running server with one role session shaped like an EC2 instance's.
pub(crate) struct Moto {
    _server: Process,
    port: u16,
    /// Access key, secret key and session token of the role session.
    pub(crate) credentials: [String; 3],
}

impl Moto {
    /// The account that moto gives to everyone.
    pub(crate) const ACCOUNT: &'static str = "123456789012";

    /// Starts the server, makes `role` with a session named `session`, and only then has every
    /// signature verified. `None` if the Python environment is missing.
    pub(crate) fn start(sandbox: &Sandbox, role: &str, session: &str) -> Option<Self> {
        let bin = venv().join("bin");
        if !bin.join("moto_server").exists() {
            return None;
        }
        let port = free_port();
        let mut command = sandbox.command(bin.join("moto_server"));
        command
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            // The first requests need no signature: they make the identity.
            .env("INITIAL_NO_AUTH_ACTION_COUNT", "1000");
        let server = sandbox.spawn("moto", command);
        eventually("moto listens", || {
            std::net::TcpStream::connect(("127.0.0.1", port))
        });
        let identity = Command::new(bin.join("python"))
            .arg(repository().join("tests/support/aws_identity.py"))
            .args([&format!("http://127.0.0.1:{port}"), role, session])
            .output()
            .expect("python")
            .success();
        let mut words = identity.split_whitespace().map(str::to_owned);
        let credentials = std::array::from_fn(|_| words.next().expect("three words"));
        Some(Self {
            _server: server,
            port,
            credentials,
        })
    }

    /// Has no signature verified from now on: it cannot verify those of EKS, AWS's own SDK's included.
    pub(crate) fn verify_nothing(&self) {
        let status = Command::new("curl")
            .args(["-sf", "-H", "content-type: text/plain", "-d", "1000000"])
            .arg(format!("{}/moto-api/reset-auth", self.url()))
            .status();
        assert!(status.expect("curl").success());
    }

    /// Where the server answers.
    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The session as environment variables.
    pub(crate) fn environment(&self) -> [(&'static str, &str); 4] {
        let [access, secret, token] = &self.credentials;
        [
            ("AWS_ACCESS_KEY_ID", access),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_SESSION_TOKEN", token),
            ("AWS_REGION", "us-east-1"),
        ]
    }
}
