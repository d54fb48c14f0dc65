//! Cgroups made by the test.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use super::eventually;

/// A cgroup and those above it that the test had to make, removed with the last process.
pub(crate) struct Cgroup {
    path: PathBuf,
    made: Vec<PathBuf>,
}

impl Cgroup {
    /// Makes the cgroup of this path below the root of the unified hierarchy. `None` if that may not
    /// be.
    pub(crate) fn make(path: &str) -> Option<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let root = mounts.lines().find_map(|line| {
            let fields: Vec<_> = line.split(' ').collect();
            (fields[2] == "cgroup2").then(|| PathBuf::from(fields[1]))
        })?;
        let mut cgroup = Self {
            path: root,
            made: Vec::new(),
        };
        for component in path.split('/') {
            cgroup.path.push(component);
            if !cgroup.path.exists() {
                fs::create_dir(&cgroup.path).ok()?;
                cgroup.made.push(cgroup.path.clone());
            }
        }
        Some(cgroup)
    }

    /// The command, started in this cgroup.
    pub(crate) fn enter(&self, command: &Command) -> Command {
        let mut inside = Command::new("/bin/sh");
        inside
            .args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""])
            .arg(&self.path)
            .arg(command.get_program())
            .args(command.get_args())
            .env_clear()
            .envs(
                command
                    .get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdin(std::process::Stdio::null());
        if let Some(dir) = command.get_current_dir() {
            inside.current_dir(dir);
        }
        inside
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            // A process that was killed a moment ago may still be in it; another test may use it.
            if fs::read_dir(path).is_ok_and(|mut entries| {
                entries.any(|entry| entry.is_ok_and(|e| e.file_type().is_ok_and(|t| t.is_dir())))
            }) {
                continue;
            }
            eventually("a cgroup is empty", || fs::remove_dir(path));
        }
    }
}
