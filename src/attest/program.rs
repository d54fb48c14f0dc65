//! What a process runs: something else after `execve(2)`.

use std::fs::File;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::sync::Once;

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, statx};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities};

use crate::crypto::sha256;

/// The longest `/proc/<pid>/status` that is read, in bytes. Real ones have 1 to 2 KiB.
const MAX_STATUS: u64 = 64 * 1024;

/// What tells one program from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Program {
    /// The file that the process runs.
    File { device: (u32, u32), inode: u64 },
    /// Of a process whose file may not be looked at, a digest of what everybody may read and what
    /// `execve(2)` sets: the name, which is the file's, and the size of its code.
    ///
    /// Two programs may share both. `/proc/<pid>/cmdline` would tell some of them apart; but to read
    /// it is to read the other's memory, which can take as long as that one likes, and servers write
    /// to it what they are doing.
    Looks([u8; 16]),
}

impl Program {
    /// What the process runs now whose directory in `/proc` this is; `None` if it has ended, or `/proc`
    /// does not show it. Does not wait for the file system that holds the file.
    pub(super) fn of(directory: &OwnedFd) -> Option<Self> {
        match statx(directory, "exe", AtFlags::STATX_DONT_SYNC, StatxFlags::INO) {
            Ok(found) => Some(Self::File {
                device: (found.stx_dev_major, found.stx_dev_minor),
                inode: found.stx_ino,
            }),
            Err(Errno::ACCESS | Errno::PERM) => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                let status = openat(directory, "status", flags, Mode::empty()).ok()?;
                let mut text = Vec::new();
                let mut status = File::from(status).take(MAX_STATUS);
                status.read_to_end(&mut text).ok()?;
                // A name may be no UTF-8.
                Self::looks(&String::from_utf8_lossy(&text))
            }
            Err(_) => None,
        }
    }

    fn looks(status: &str) -> Option<Self> {
        let line = |key: &str| status.lines().find(|line| line.starts_with(key));
        let (name, code) = (line("Name:")?, line("VmExe:")?);
        let digest = sha256(format!("{name}\n{code}").as_bytes());
        digest.first_chunk().copied().map(Self::Looks)
    }
}

/// Tells once, in the log, that the kernel does not show this process what those of other users run, if
/// that is so: their files are closed to those who may not trace them (`PTRACE_MODE_READ`).
pub fn tell_what_is_hidden() {
    static TOLD: Once = Once::new();
    let may_trace = |own: CapabilitySets| own.effective.contains(CapabilitySet::SYS_PTRACE);
    if capabilities(None).is_ok_and(may_trace) {
        return;
    }
    TOLD.call_once(|| {
        tracing::warn!(
            "The agent may not look at the programs of other users: binary_path and binary_hash of such \
             callers stay unset, and one that executes another program is noticed only by its name and the \
             size of its code. Give the agent CAP_SYS_PTRACE: `tbot install systemd` writes a unit with it, \
             in a unit of your own set AmbientCapabilities=CAP_SYS_PTRACE"
        );
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_name_or_another_size_of_the_code_is_another_program() {
        let looks = |name: &str, code: &str| {
            let status = format!("Name:\t{name}\nUmask:\t0022\nVmPeak:\t9 kB\nVmExe:\t{code} kB\n");
            Program::looks(&status).unwrap()
        };
        let cat = looks("cat", "20");
        assert_eq!(cat, looks("cat", "20"));
        assert_ne!(cat, looks("cat", "24"));
        assert_ne!(cat, looks("perl", "20"));
        // One that has ended has no code any more, and is not compared.
        for status in ["", "Name:\tcat\nThreads:\t1\n", "VmExe:\t20 kB\n"] {
            assert_eq!(Program::looks(status), None, "{status:?}");
        }
    }

    #[test]
    fn this_process_runs_a_file() {
        let own = File::open("/proc/self").unwrap();
        let found = Program::of(&own.into());
        assert!(matches!(found, Some(Program::File { .. })), "{found:?}");
        let other = File::open("/").unwrap();
        assert_eq!(Program::of(&other.into()), None);
    }
}
