//! A process that is measured.

use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A process that ends with this value.
pub(crate) struct Running(Child);

impl Running {
    pub(crate) fn start(command: &mut Command) -> Self {
        let command = command.stderr(Stdio::null()).stdout(Stdio::null());
        Self(command.spawn().expect("a process"))
    }

    pub(crate) fn resident_kib(&self) -> f64 {
        let path = format!("/proc/{}/status", self.0.id());
        let status = std::fs::read_to_string(path).expect("status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("VmRSS");
        let number = line.trim().trim_end_matches(" kB").parse();
        number.expect("a number")
    }

    /// Asks it to renew everything.
    pub(crate) fn reload(&self) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).expect("a process ID"));
        kill(pid, Signal::SIGHUP).expect("a signal");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}
