//! What is done once an output was written: `reload:`, a key of our own that every output has.
//!
//! A program that holds a certificate in memory has to be told of a new one. `exec.rs` runs a command,
//! `signal.rs` signals the process of a PID file, `unit.rs` lets systemd reload a unit; `run.rs`
//! does so after changes, one run at a time.

mod exec;
mod run;
mod signal;
mod unit;

use std::path::PathBuf;
use std::time::Duration;

pub(super) use run::{Hooks, follow};
pub use signal::SignalPlan;

use crate::yaml::{Fields, Tree, duration};

/// How long each hook may take if nothing is said.
const TIMEOUT: Duration = Duration::from_secs(30);
/// The longest that can be configured: a hook that hangs is noticed at the next renewal or so.
const MAX_TIMEOUT: Duration = Duration::from_hours(1);

/// The hooks of one output; at least one. They run in the order of the fields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// A program and its arguments. No shell is involved.
    pub exec: Vec<String>,
    /// A process to signal.
    pub signal: Option<SignalPlan>,
    /// A unit to reload, with its suffix: `nginx.service`.
    pub systemd: Option<String>,
    /// How long each of them may take.
    pub timeout: Duration,
}

impl Plan {
    /// Reads the `reload` key of an output; problems go to `fields`. `None` also if there is none.
    pub fn parse(fields: &mut Fields<'_>) -> Option<Self> {
        let mut section = fields.section("reload")?;
        let exec = command(&mut section);
        let signal = section
            .has("signal")
            .then(|| SignalPlan::parse(&mut section));
        section.ignore("signal");
        let systemd = section.string("systemd").filter(|unit| {
            let sound = is_service(unit);
            if !sound {
                section.error(
                    "systemd",
                    format!("{unit:?} is no name of a service unit"),
                    Some("with its suffix, for example nginx.service"),
                );
            }
            sound
        });
        let timeout = section.duration("timeout").unwrap_or(TIMEOUT);
        if timeout.is_zero() || timeout > MAX_TIMEOUT {
            section.error(
                "timeout",
                "a hook may take from 1ms to 1h",
                Some("leave it out for 30s"),
            );
        }
        if !["exec", "signal", "systemd"]
            .iter()
            .any(|key| section.has(key))
        {
            section.error(
                "",
                "nothing to do after a write",
                Some("add `exec: [program, argument]`, `signal: {pid_file: …}` or `systemd: x.service`"),
            );
        }
        section.finish();
        Some(Self {
            exec,
            signal: signal.flatten(),
            systemd,
            timeout,
        })
    }

    /// The section as written in a configuration file.
    #[must_use]
    pub fn emit(&self) -> Tree {
        let timeout = (self.timeout != TIMEOUT).then(|| Tree::text(duration::format(self.timeout)));
        Tree::map([
            (
                "exec",
                (!self.exec.is_empty()).then(|| Tree::texts(self.exec.iter().cloned())),
            ),
            ("signal", self.signal.as_ref().map(SignalPlan::emit)),
            ("systemd", self.systemd.as_ref().map(Tree::text)),
            ("timeout", timeout),
        ])
    }
}

/// Reads `exec`; empty if it is not there or was reported.
fn command(section: &mut Fields<'_>) -> Vec<String> {
    let hint =
        Some("a list of the program and its arguments, for example [/usr/sbin/nginx, -s, reload]");
    if !section.has("exec") {
        section.ignore("exec");
        return Vec::new();
    }
    let Some(words) = section.strings("exec") else {
        return Vec::new();
    };
    let problem = match words.first().map(String::as_str) {
        None | Some("") => "there is no program in it",
        Some(program) if program.contains('/') && !program.starts_with('/') => {
            "the program's path is relative: write an absolute one, or a name that is in PATH"
        }
        Some(_) if words.iter().any(|word| word.contains('\0')) => "it holds a NUL character",
        Some(_) => return words,
    };
    section.error("exec", problem, hint);
    Vec::new()
}

/// Whether systemd could have a service of this name (`systemd.unit(5)`).
fn is_service(name: &str) -> bool {
    name.len() <= 255
        && name.strip_suffix(".service").is_some_and(|prefix| {
            !prefix.is_empty()
                && prefix
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b))
        })
}

/// Why a hook did not do its work. What was written stays.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HookError {
    /// The program cannot be started.
    #[error("exec: cannot start {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// The system's reason.
        #[source]
        source: std::io::Error,
    },
    /// The program failed. What it said is in the agent's standard error.
    #[error("exec: {program} ended with {status}")]
    Failed {
        /// The program.
        program: String,
        /// Its exit status or signal.
        status: std::process::ExitStatus,
    },
    /// The hook took too long; a program was killed with all that it started.
    #[error("{hook}: not done within {} s", .after.as_secs_f64())]
    TooSlow {
        /// `exec`, `signal` or `systemd`.
        hook: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The PID file or its process is not to be trusted, or is not there.
    #[error("signal: {}: {problem}", .path.display())]
    PidFile {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// systemd cannot be asked, refused, or the unit's reload failed.
    #[error("systemd: {unit}: {problem}")]
    Unit {
        /// The unit.
        unit: String,
        /// What is wrong and what to do.
        problem: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::{Problems, emit, parse};

    fn read(source: &str) -> (Option<Plan>, String) {
        let node = parse(source).unwrap();
        let problems = Problems::new();
        let mut fields = Fields::new(&node, "services[0]", &problems).unwrap();
        let plan = Plan::parse(&mut fields);
        fields.finish();
        (plan, problems.render("t"))
    }

    #[test]
    fn sections_read_back() {
        for source in [
            "reload: {exec: [/usr/sbin/nginx, -s, reload]}\n",
            "reload: {exec: [true], timeout: 5s}\n",
            "reload: {signal: {pid_file: /run/x.pid}}\n",
            "reload: {signal: {pid_file: /run/x.pid, signal: SIGUSR1}}\n",
            "reload: {systemd: 'nginx@a-b.service'}\n",
            "reload: {systemd: a.service, exec: [x], signal: {pid_file: /x}}\n",
        ] {
            let (plan, problems) = read(source);
            assert_eq!(problems, "", "{source}");
            let plan = plan.unwrap();
            let text = emit::emit(&Tree::map([("reload", Some(plan.emit()))]));
            assert_eq!(read(&text), (Some(plan), String::new()), "{text}");
        }
        assert_eq!(read("a: b\n").0, None);
        assert_eq!(read("reload:\n").0, None);
    }

    #[test]
    fn what_cannot_be_done_is_told_with_its_key() {
        for (source, expected) in [
            ("reload: x", "services[0].reload: must be a mapping"),
            ("reload: {}", "services[0].reload: nothing to do"),
            ("reload: {timeout: 3s}", "services[0].reload: nothing to do"),
            (
                "reload: {exec: nginx -s reload}",
                "reload.exec: must be a list",
            ),
            ("reload: {exec: []}", "reload.exec: there is no program"),
            (
                "reload: {exec: ['', x]}",
                "reload.exec: there is no program",
            ),
            (
                "reload: {exec: [./x]}",
                "reload.exec: the program's path is relative",
            ),
            (
                "reload: {exec: [\"x\", \"a\\0b\"]}",
                "reload.exec: it holds a NUL",
            ),
            (
                "reload: {exec: [x], timeout: 0s}",
                "reload.timeout: a hook may take",
            ),
            (
                "reload: {exec: [x], timeout: 2h}",
                "reload.timeout: a hook may take",
            ),
            ("reload: {exec: [x], timeout: 5}", "reload.timeout: "),
            (
                "reload: {systemd: nginx}",
                "reload.systemd: \"nginx\" is no name",
            ),
            ("reload: {systemd: .service}", "reload.systemd: "),
            ("reload: {systemd: 'a b.service'}", "reload.systemd: "),
            ("reload: {systemd: ../a.service}", "reload.systemd: "),
            ("reload: {signal: HUP}", "reload.signal: must be a mapping"),
            ("reload: {signal: {}}", "reload.signal.pid_file: "),
            (
                "reload: {signal: {pid_file: x.pid}}",
                "reload.signal.pid_file: ",
            ),
            (
                "reload: {signal: {pid_file: /x, signal: KILL}}",
                "reload.signal.signal: \"KILL\" is not a value",
            ),
            ("reload: {exec: [x], exce: [x]}", "did you mean `exec`?"),
        ] {
            let (_, problems) = read(source);
            assert!(problems.contains(expected), "{source}: {problems}");
        }
    }
}
