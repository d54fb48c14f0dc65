//! A real systemd, booted as PID 1 of its own namespaces.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::sandbox::OutputText as _;
use super::{Process, Sandbox, eventually, repository};

/// A booted machine with a system bus, the host's network, and nothing else of the host to change.
pub(crate) struct Systemd {
    boot: Process,
    work: PathBuf,
    init: u32,
}

impl Systemd {
    /// Why this machine cannot boot one, if so.
    pub(crate) fn unavailable() -> Option<String> {
        if !nix::unistd::geteuid().is_root() {
            return Some("booting systemd needs root".to_owned());
        }
        [
            "/lib/systemd/systemd",
            "/usr/bin/dbus-daemon",
            "/usr/bin/nsenter",
        ]
        .into_iter()
        .find(|path| !Path::new(path).exists())
        .map(|path| format!("{path} is not installed"))
    }

    /// Boots, and returns when everything is up. `tbot` is in the machine's `/usr/local/bin`.
    pub(crate) fn boot(sandbox: &Sandbox) -> Self {
        let work = sandbox.path("systemd");
        let mut command = Command::new(repository().join("tests/support/systemd-boot.sh"));
        command
            .arg(&work)
            .arg(env!("CARGO_BIN_EXE_tbot"))
            .stdin(Stdio::null());
        let mut boot = sandbox.spawn("systemd", command);
        let init = eventually("systemd is PID 1", || {
            boot.check_running();
            child_named(boot.id(), "systemd").ok_or("not yet")
        });
        let machine = Self { boot, work, init };
        eventually("systemd answers", || {
            let state = machine.run(["systemctl", "is-system-running", "--wait"]);
            match state.text().trim() {
                "running" => Ok(()),
                "degraded" => panic!("{}", machine.run(["systemctl", "--failed"]).text()),
                other => Err(other.to_owned()),
            }
        });
        machine
    }

    /// Runs a command in there as root, outside any unit.
    pub(crate) fn run<I: AsRef<std::ffi::OsStr>>(
        &self,
        command: impl IntoIterator<Item = I>,
    ) -> Output {
        self.enter().args(command).output().expect("nsenter")
    }

    /// Runs a line of shell in there.
    pub(crate) fn shell(&self, line: &str) -> Output {
        self.run(["bash", "-euc", line])
    }

    /// Writes a file in there, parents included.
    pub(crate) fn write(&self, path: &str, content: &str) {
        let parent = Path::new(path).parent().expect("a parent");
        self.run(["mkdir".as_ref(), "-p".as_ref(), parent.as_os_str()])
            .success();
        let mut tee = self
            .enter()
            .args(["tee", path])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("nsenter");
        let mut input = tee.stdin.take().expect("a pipe");
        std::io::Write::write_all(&mut input, content.as_bytes()).expect("a file's content");
        drop(input);
        assert!(tee.wait().expect("tee").success(), "cannot write {path}");
    }

    fn enter(&self) -> Command {
        // A command that hangs must not hang the tests.
        let mut command = Command::new("timeout");
        command
            .args(["--kill-after=5", "120", "nsenter"])
            .args(["--target", &self.init.to_string()])
            .args([
                "--mount",
                "--uts",
                "--ipc",
                "--pid",
                "--cgroup",
                "--wd=/root",
                "--",
            ])
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8")
            .env("SYSTEMD_PAGER", "")
            .stdin(Stdio::null());
        command
    }
}

impl Drop for Systemd {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let journal = self.run(["journalctl", "--no-pager", "--lines=200"]);
            eprintln!("--- journal:\n{}---", journal.text());
        }
        let cgroup = fs::read_to_string(self.work.with_extension("cgroup"));
        self.boot.signal("KILL");
        // An empty cgroup can be removed only after its last process is gone.
        if let Ok(cgroup) = cgroup {
            remove_cgroup(Path::new(cgroup.trim()));
        }
    }
}

fn remove_cgroup(cgroup: &Path) {
    eventually("the machine's cgroup is empty", || {
        remove_tree(cgroup).or_else(|e| match e.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(e),
        })
    });
}

/// Removes a cgroup and those below it; their files cannot be and need not be removed.
fn remove_tree(cgroup: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(cgroup)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(cgroup)
}

/// The child of `parent` that runs a program of this name.
fn child_named(parent: u32, name: &str) -> Option<u32> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let status = fs::read_to_string(entry.path().join("status")).ok()?;
        let field = |key: &str| {
            status
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
                .map(str::trim)
        };
        (field("PPid")? == parent.to_string() && field("Name")? == name).then_some(pid)
    })
}
