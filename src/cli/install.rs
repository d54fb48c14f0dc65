//! `tbot install systemd`.

use std::path::{Path, PathBuf};

use anyhow::Context as _;

use super::args::{Globals, SystemdArgs};
use super::exit::{Failure, print};
use super::start;
use crate::config::{self, Overlay};
use crate::env::Env;
use crate::install::apply::{self, Written};
use crate::install::paths::{Access, instead_of, is_common};
use crate::install::unit::Unit;

/// Places that a package or an updater keeps pointed at the current program.
const STABLE: &[&str] = &["/usr/local/bin/tbot", "/usr/bin/tbot"];

/// Prints the unit, or with `--write` puts it in place.
pub(super) fn run(globals: &Globals, args: &SystemdArgs, env: &Env) -> Result<(), Failure> {
    let config = globals
        .config
        .as_deref()
        .or_else(|| env.get("TBOT_CONFIG_PATH"))
        .filter(|path| !path.is_empty() && *path != "-")
        .ok_or_else(|| {
            Failure::usage("--config is required: the path of the file that the service will read")
        })?;
    let config = std::path::absolute(config)?;
    check_files(args)?;
    let unit = Unit {
        name: args.name.clone(),
        user: args.user.clone(),
        group: args.group.clone(),
        executable: executable()?,
        access: access(&config, args),
        config,
        telemetry: args.anonymous_telemetry,
        pid_file: args.pid_file.clone(),
        diag_socket: args.diag_socket_for_updater.clone(),
    };
    unit.check()
        .map_err(|error| Failure::usage(error.to_string()))?;
    let target = args
        .systemd_directory
        .join(format!("{}.service", args.name));
    if args.write {
        return write(&unit, &target, args.force);
    }
    print(&format!(
        "Dry-run mode is active. Use '--write' to enable writes.\n\
         The following would have been written to '{}':\n\n{}",
        target.display(),
        unit.render()
    ))
}

fn write(unit: &Unit, target: &Path, force: bool) -> Result<(), Failure> {
    let written = apply::write_unit(target, &unit.render(), force)?;
    let path = target.display();
    match apply::account(&unit.user, &unit.group) {
        Ok(account) => {
            if let Some(access) = &unit.access {
                let (made, doubtful) = apply::make_directories(access, &account)?;
                for line in made {
                    tracing::info!("{line}");
                }
                for line in doubtful {
                    tracing::warn!("{line}");
                }
            }
            if let Some(line) = apply::unreadable_by(&unit.config, &account) {
                tracing::warn!("{line}");
            }
        }
        Err(line) => {
            tracing::warn!("{line}");
            let missing: Vec<String> = unit
                .access
                .iter()
                .flat_map(Access::outside)
                .filter(|path| !path.exists())
                .map(|path| path.display().to_string())
                .collect();
            if !missing.is_empty() {
                tracing::warn!(
                    "then run this command again, or make what the agent writes to and give it to \
                     {}: {}",
                    unit.user,
                    missing.join(" ")
                );
            }
        }
    }
    match written {
        Written::Unchanged => tracing::info!("{path} is up to date: no changes"),
        Written::Changed => tracing::info!(
            "Wrote {path}. Next: `systemctl daemon-reload`, then `systemctl enable --now {}`",
            unit.name
        ),
    }
    Ok(())
}

/// Refuses places where the service could not make the files that flags name.
fn check_files(args: &SystemdArgs) -> Result<(), Failure> {
    for (flag, file) in [
        ("--pid-file", &args.pid_file),
        ("--diag-socket-for-updater", &args.diag_socket_for_updater),
    ] {
        let Some(file) = file else { continue };
        let refused = |problem: &str| {
            Err(Failure::usage(format!(
                "{flag} {}: {problem}",
                file.display()
            )))
        };
        if !file.is_absolute() {
            return refused(
                "write an absolute path, the service has a working directory of its own",
            );
        }
        match file.parent() {
            Some(parent) if args.user != "root" && is_common(parent) => {
                return refused(&instead_of(parent, &args.user));
            }
            Some(_) => {}
            None => return refused("this is no file"),
        }
    }
    Ok(())
}

/// What the configuration lets the agent write; `None` if the file cannot be used yet.
fn access(config: &Path, args: &SystemdArgs) -> Option<Access> {
    let name = config.display().to_string();
    let source = match start::file(&name) {
        Ok(source) => source,
        Err(_) if !config.exists() => {
            tracing::warn!(
                "{name} is not there yet: the unit protects less until this runs again with it"
            );
            return None;
        }
        Err(failure) => {
            tracing::warn!("the unit protects less than it could: {failure}");
            return None;
        }
    };
    match config::load(Some(&source), &Overlay::default(), &Env::default()) {
        Ok(loaded) => {
            let mut access = Access::of(&loaded.plan);
            for line in access.take_common(&args.user) {
                tracing::warn!("{name}: {line}");
            }
            for file in [&args.pid_file, &args.diag_socket_for_updater]
                .into_iter()
                .flatten()
            {
                access.add_parent_of(file);
            }
            Some(access)
        }
        Err(invalid) => {
            tracing::warn!(
                "{name} cannot be used, so the unit protects less than it could: {invalid}"
            );
            None
        }
    }
}

/// The path to start: a stable link to this program if there is one.
fn executable() -> Result<PathBuf, Failure> {
    let this = std::env::current_exe().context("cannot find the path of this program")?;
    let same = |link: &&str| std::fs::canonicalize(link).is_ok_and(|real| real == this);
    if let Some(link) = STABLE.iter().copied().find(|link| same(link)) {
        return Ok(link.into());
    }
    let passing = ["/tmp", "/var/tmp", "/home", "/root"]
        .iter()
        .any(|dir| this.starts_with(dir));
    if passing || this.components().any(|part| part.as_os_str() == "target") {
        tracing::warn!(
            "the unit will start {}, which may not stay there or may be closed to the service's \
             user: install the program as /usr/local/bin/tbot first",
            this.display()
        );
    }
    Ok(this)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::args::{Cli, Command, InstallTarget};
    use super::*;

    #[test]
    fn files_that_the_service_could_not_make_are_refused() {
        for (arguments, problem) in [
            ("--pid-file /run/tbot/tbot.pid", None),
            ("--pid-file /run/tbot.pid --user root", None),
            ("--pid-file /run/tbot.pid", Some("for example /run/tbot")),
            ("--pid-file tbot.pid", Some("an absolute path")),
            ("--pid-file /", Some("no file")),
            (
                "--diag-socket-for-updater /opt/x.sock",
                Some("for example /opt/tbot"),
            ),
            ("--diag-socket-for-updater x.sock", Some("an absolute path")),
        ] {
            let words = ["tbot", "install", "systemd"];
            let cli = Cli::try_parse_from(words.into_iter().chain(arguments.split(' '))).unwrap();
            let Some(Command::Install {
                target: InstallTarget::Systemd(args),
            }) = cli.command
            else {
                panic!("{arguments}");
            };
            match (check_files(&args), problem) {
                (Ok(()), None) => {}
                (Err(failure), Some(problem)) => {
                    assert!(failure.to_string().contains(problem), "{failure}");
                    assert_eq!(failure.exit(), super::super::exit::Exit::Usage);
                }
                (outcome, _) => panic!("{arguments}: {outcome:?}"),
            }
        }
    }
}
