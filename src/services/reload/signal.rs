//! Hook `signal`: tells the process of a PID file.
//!
//! A PID file is an old custom with old dangers: it may be stale, and whoever can write it chooses
//! whom a privileged agent signals. The process is therefore pinned by a pidfd before it is looked
//! at, and a file of an unprivileged user only reaches that user's own processes.

use std::io::Read as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, pidfd_open, pidfd_send_signal};

use super::HookError;
use crate::attest::unix::effective_uid;
use crate::yaml::{Fields, Tree};

/// The signals that daemons take as "read your files again", and those that make them start over.
const SIGNALS: [(&str, Signal); 7] = [
    ("HUP", Signal::HUP),
    ("INT", Signal::INT),
    ("QUIT", Signal::QUIT),
    ("TERM", Signal::TERM),
    ("USR1", Signal::USR1),
    ("USR2", Signal::USR2),
    ("WINCH", Signal::WINCH),
];

/// The most of a PID file that is read, in bytes. Some programs write more lines after the first.
const MAX_FILE: u64 = 4096;

/// A configured signal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignalPlan {
    /// The file whose first line is the process ID. Absolute.
    pub pid_file: PathBuf,
    /// The signal's name without `SIG`.
    pub signal: &'static str,
}

impl SignalPlan {
    /// Reads the `signal` key; problems go to `fields`, and `None` comes back then.
    pub(super) fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        let mut section = fields.section("signal")?;
        let pid_file = section.required("pid_file").map(PathBuf::from);
        if pid_file.as_ref().is_some_and(|path| !path.is_absolute()) {
            section.error("pid_file", "the path must be absolute", None);
        }
        let names = SIGNALS.map(|(name, _)| name);
        let both: Vec<String> = names
            .iter()
            .map(|name| (*name).to_owned())
            .chain(names.iter().map(|name| format!("SIG{name}")))
            .collect();
        let allowed: Vec<&str> = both.iter().map(String::as_str).collect();
        let given = section.has("signal");
        let named = section.one_of("signal", &allowed);
        let signal = match named.as_deref() {
            Some(name) => {
                let name = name.strip_prefix("SIG").unwrap_or(name);
                names.into_iter().find(|known| *known == name)
            }
            None => (!given).then_some("HUP"),
        };
        section.finish();
        Some(Self {
            pid_file: pid_file?,
            signal: signal?,
        })
    }

    pub(super) fn emit(&self) -> Tree {
        Tree::map([
            (
                "pid_file",
                Some(Tree::text(self.pid_file.display().to_string())),
            ),
            ("signal", Some(Tree::text(self.signal))),
        ])
    }

    /// Signals the process. Blocks for as long as the file system does.
    pub(super) fn send(&self) -> Result<(), HookError> {
        let failed = |problem: String| HookError::PidFile {
            path: self.pid_file.clone(),
            problem,
        };
        let signal = SIGNALS.iter().find(|(name, _)| *name == self.signal);
        let (_, signal) = signal.ok_or_else(|| failed("no such signal".to_owned()))?;
        let (pid, owner) = read(&self.pid_file).map_err(failed)?;
        if pid.as_raw_pid().cast_unsigned() == std::process::id() {
            return Err(failed("it names this agent itself".to_owned()));
        }
        let gone = || {
            failed(format!(
                "there is no process {pid}: is the program running?"
            ))
        };
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|_source| gone())?;
        if owner != 0 && owner != geteuid().as_raw() {
            // Read after pinning: if the process is gone, so is the signal.
            let runs_as = effective_uid(pid.as_raw_pid()).map_err(|_source| gone())?;
            if runs_as != owner {
                return Err(failed(format!(
                    "it belongs to user {owner}, who may name only processes of their own, and \
                     process {pid} runs as user {runs_as}: let root or this agent's user own it"
                )));
            }
        }
        pidfd_send_signal(&pidfd, *signal)
            .map_err(|source| failed(format!("cannot signal process {pid}: {source}")))
    }
}

/// The process that a PID file names, and the file's owner.
fn read(path: &Path) -> Result<(Pid, u32), String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty()).map_err(|source| match source {
        rustix::io::Errno::LOOP => "it is a symbolic link: name the file itself".to_owned(),
        rustix::io::Errno::NOENT => "it is not there: is the program running?".to_owned(),
        source => source.to_string(),
    })?;
    let facts = fstat(&file).map_err(|source| source.to_string())?;
    if !FileType::from_raw_mode(facts.st_mode).is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if facts.st_mode & 0o022 != 0 {
        return Err(format!(
            "others than its owner may write it (mode {:03o}): take that right away (chmod go-w)",
            facts.st_mode & 0o777
        ));
    }
    let mut text = String::new();
    std::fs::File::from(file)
        .take(MAX_FILE)
        .read_to_string(&mut text)
        .map_err(|source| source.to_string())?;
    let first = text.lines().next().unwrap_or_default().trim();
    let digits = !first.is_empty() && first.bytes().all(|b| b.is_ascii_digit());
    let pid = first.parse().ok().filter(|pid| digits && *pid > 1);
    let pid = pid
        .and_then(Pid::from_raw)
        .ok_or("its first line is no process ID above 1")?;
    Ok((pid, facts.st_uid))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::{Child, Command};

    use super::*;

    /// A process that signals end, and its PID file.
    fn process(base: &Path) -> (Child, SignalPlan) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid_file = base.join("x.pid");
        std::fs::write(&pid_file, format!("{}\nmore\n", child.id())).unwrap();
        let plan = SignalPlan {
            pid_file,
            signal: "USR1",
        };
        (child, plan)
    }

    fn refused(plan: &SignalPlan) -> String {
        plan.send().unwrap_err().to_string()
    }

    #[test]
    fn the_process_gets_the_signal() {
        let base = tempfile::tempdir().unwrap();
        let (mut child, plan) = process(base.path());
        plan.send().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(10));
        let told = refused(&plan);
        assert!(told.contains("is the program running?"), "{told}");
    }

    #[test]
    fn files_that_say_nothing_sound_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let (mut child, plan) = process(base.path());
        for (content, expected) in [
            (String::new(), "no process ID"),
            ("x".to_owned(), "no process ID"),
            ("0".to_owned(), "above 1"),
            ("1".to_owned(), "above 1"),
            ("-1".to_owned(), "no process ID"),
            (format!("+{}", child.id()), "no process ID"),
            ("99999999999".to_owned(), "no process ID"),
            ("4194305".to_owned(), "is the program running?"),
            (std::process::id().to_string(), "this agent itself"),
            ("\n1".to_owned(), "no process ID"),
        ] {
            std::fs::write(&plan.pid_file, content).unwrap();
            let told = refused(&plan);
            assert!(told.contains(expected), "{told}");
        }
        std::fs::remove_file(&plan.pid_file).unwrap();
        assert!(refused(&plan).contains("it is not there"));
        std::fs::create_dir(&plan.pid_file).unwrap();
        assert!(refused(&plan).contains("not a regular file"));
        assert!(child.try_wait().unwrap().is_none(), "signalled");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn files_that_others_can_turn_are_refused() {
        let base = tempfile::tempdir().unwrap();
        let (mut child, plan) = process(base.path());
        let mode = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(&plan.pid_file, mode).unwrap();
        };
        for open in [0o664, 0o646, 0o666] {
            mode(open);
            let told = refused(&plan);
            assert!(
                told.contains("others than its owner may write it"),
                "{told}"
            );
        }
        mode(0o644);
        let link = SignalPlan {
            pid_file: base.path().join("link"),
            ..plan.clone()
        };
        symlink(&plan.pid_file, &link.pid_file).unwrap();
        assert!(refused(&link).contains("symbolic link"));
        if geteuid().is_root() {
            chown(&plan.pid_file, Some(65534), None).unwrap();
            let told = refused(&plan);
            assert!(told.contains("belongs to user 65534"), "{told}");
        }
        assert!(child.try_wait().unwrap().is_none(), "signalled");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
