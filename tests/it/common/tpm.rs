//! A software TPM with an endorsement certificate, and the authority that signed it.

use std::path::{Path, PathBuf};

use super::sandbox::{OutputText as _, free_port};
use super::{Process, Sandbox, eventually};

/// The state of a TPM that was made, and the manufacturer's authority.
pub(crate) struct Tpm<'a> {
    sandbox: &'a Sandbox,
    name: String,
}

impl<'a> Tpm<'a> {
    /// What is missing to make one.
    pub(crate) fn unavailable() -> Option<String> {
        ["swtpm", "swtpm_setup", "tpm2_getcap"]
            .into_iter()
            .find(|program| !Path::new("/usr/bin").join(program).exists())
            .map(|program| format!("{program} is missing: make setup"))
    }

    /// Makes one; `certified`: with a certificate of an authority of its own.
    pub(crate) fn make(sandbox: &'a Sandbox, name: &str, certified: bool) -> Self {
        let tpm = Self {
            sandbox,
            name: name.to_owned(),
        };
        std::fs::create_dir_all(tpm.path("state")).expect("a directory");
        std::fs::create_dir_all(tpm.path("ca")).expect("a directory");
        let ca = tpm.path("ca");
        let localca = format!(
            "statedir = {0}\nsigningkey = {0}/signkey.pem\nissuercert = {0}/issuercert.pem\ncertserial = {0}/certserial\n",
            ca.display()
        );
        let options = "--platform-manufacturer tbot\n--platform-version 1\n--platform-model test\n";
        let localca = sandbox.write(&format!("{name}/localca.conf"), localca);
        let options = sandbox.write(&format!("{name}/localca.options"), options);
        let setup = format!(
            "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {}\ncreate_certs_tool_options = {}\nactive_pcr_banks = sha256\n",
            localca.display(),
            options.display()
        );
        let setup = sandbox.write(&format!("{name}/setup.conf"), setup);
        let mut command = sandbox.command("swtpm_setup");
        command
            .args(["--tpm2", "--config"])
            .arg(setup)
            .arg("--tpmstate")
            .arg(tpm.path("state"));
        if certified {
            command.arg("--create-ek-cert");
        }
        command.output().expect("swtpm_setup").success();
        tpm
    }

    fn path(&self, name: &str) -> PathBuf {
        self.sandbox.path(&self.name).join(name)
    }

    /// The certificate that signed the endorsement certificate, PEM.
    pub(crate) fn authority(&self) -> String {
        std::fs::read_to_string(self.path("ca/issuercert.pem")).expect("the authority")
    }

    /// Runs commands of tpm2-tools on it, one a line; it must not be running otherwise.
    pub(crate) fn tools(&self, script: &str) -> String {
        // The control channel is the port behind.
        let (port, control) = loop {
            let port = free_port();
            if let Some(control) = port.checked_add(1)
                && std::net::TcpListener::bind(("127.0.0.1", control)).is_ok()
            {
                break (port, control);
            }
        };
        let mut command = self.sandbox.command("swtpm");
        command
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .arg("--tpmstate")
            .arg(format!("dir={}", self.path("state").display()))
            .args(["--server", &format!("type=tcp,port={port},disconnect")])
            .args(["--ctrl", &format!("type=tcp,port={control}")]);
        let running = self.sandbox.spawn(&format!("{}-tools", self.name), command);
        eventually("the TPM listens", || {
            std::net::TcpStream::connect(("127.0.0.1", control))
        });
        let mut shell = self.sandbox.command("sh");
        shell.args(["-ec", script]).env(
            "TPM2TOOLS_TCTI",
            format!("swtpm:host=127.0.0.1,port={port}"),
        );
        let output = shell.output().expect("sh").success();
        drop(running);
        output
    }

    /// Starts it; agents reach it at the path that comes with it.
    pub(crate) fn start(&self) -> (Process, PathBuf) {
        let socket = self.path("socket");
        let mut command = self.sandbox.command("swtpm");
        command
            .args(["socket", "--tpm2", "--flags", "not-need-init,startup-clear"])
            .arg("--tpmstate")
            .arg(format!("dir={}", self.path("state").display()))
            .arg("--server")
            .arg(format!("type=unixio,path={}", socket.display()));
        let process = self.sandbox.spawn(&self.name, command);
        eventually("the TPM listens", || {
            socket.exists().then_some(()).ok_or("no socket")
        });
        (process, socket)
    }
}
