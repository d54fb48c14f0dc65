//! A directory and processes that end with the test.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};

use tempfile::TempDir;

use super::eventually;

/// A port that nothing listened on a moment ago. Below those that the kernel gives to connections (from 32768 on):
/// one of them would take it before whoever it is for listens on it.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Several runs at a time begin at different places.
    let begin = u16::try_from(std::process::id() % 20_000).expect("a small number");
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 10_000 + (begin + step % 20_000) % 20_000;
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

/// A temporary directory with the real binary at hand.
pub(crate) struct Sandbox {
    dir: TempDir,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        Self {
            dir: TempDir::with_prefix("tbot-it-").expect("a temporary directory"),
        }
    }

    /// A path inside the sandbox.
    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file, parents included, and returns its path.
    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
        fs::write(&path, content).expect("a file");
        path
    }

    /// The built `tbot`, started in the sandbox with an environment of its own.
    pub(crate) fn tbot<I: AsRef<std::ffi::OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = I>,
    ) -> Command {
        let mut command = self.command(env!("CARGO_BIN_EXE_tbot"));
        command.args(arguments);
        command
    }

    /// The built `tbot`, which finds the names of `hosts` in place of those of the machine.
    pub(crate) fn tbot_among(&self, hosts: &Path) -> Command {
        let mut command = self.command("unshare");
        let inside = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
        command
            .args(["--mount", "sh", "-c", inside])
            .arg(hosts)
            .arg(env!("CARGO_BIN_EXE_tbot"));
        command
    }

    /// Any program, started in the sandbox with an environment of its own.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(self.dir.path())
            .env_clear()
            .env("HOME", self.dir.path())
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .stdin(Stdio::null());
        command
    }

    /// Starts a process whose output goes to `<name>.log` and that is killed with its handle.
    pub(crate) fn spawn(&self, name: &str, mut command: Command) -> Process {
        let log = self.path(format!("{name}.log"));
        let file = File::create(&log).expect("a log file");
        let child = command
            .stdout(file.try_clone().expect("a second handle"))
            .stderr(file)
            .spawn()
            .unwrap_or_else(|e| panic!("cannot start {name}: {e}"));
        Process {
            name: name.to_owned(),
            child,
            log,
        }
    }
}

/// A running process, killed when dropped; its log is printed if the test fails.
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it printed so far, standard output and error together.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until the log has `text`; fails early if the process ended without it.
    pub(crate) fn wait_for_log(&mut self, text: &str) {
        let what = format!("{} logs {text:?}", self.name);
        eventually(&what, || {
            if self.log().contains(text) {
                return Ok(());
            }
            self.check_running();
            Err(self.log())
        });
    }

    /// Fails if it ended.
    pub(crate) fn check_running(&mut self) {
        if let Some(status) = self.child.try_wait().expect("a child") {
            panic!("{} ended ({status}):\n{}", self.name, self.log());
        }
    }

    /// Waits until it ends by itself.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let what = format!("{} ends", self.name);
        eventually(&what, || {
            self.child
                .try_wait()
                .expect("a child")
                .ok_or("still running")
        })
    }

    /// Sends a signal by its name, `TERM` for example.
    pub(crate) fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.id().to_string()])
            .status()
            .expect("kill");
        assert!(status.success(), "no signal {name} to {}", self.name);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
        if std::thread::panicking() {
            eprintln!("--- log of {}:\n{}---", self.name, self.log());
        }
    }
}

/// Standard output and error of a finished command, for messages and searches.
pub(crate) trait OutputText {
    /// Both streams as text.
    fn text(&self) -> String;
    /// The same, if the command succeeded.
    fn success(&self) -> String;
}

impl OutputText for Output {
    fn text(&self) -> String {
        format!(
            "{}{}",
            String::from_utf8_lossy(&self.stdout),
            String::from_utf8_lossy(&self.stderr)
        )
    }

    #[track_caller]
    fn success(&self) -> String {
        assert!(self.status.success(), "{}:\n{}", self.status, self.text());
        self.text()
    }
}
