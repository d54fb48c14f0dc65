//! The command line: one file for each command, and the only place that prints.

mod args;
pub mod cluster;
mod completion;
mod configure;
mod exit;
mod flags;
mod init;
mod install;
mod keypair;
mod kube_credentials;
mod man;
mod migrate;
mod process;
mod quickstart;
mod spiffe_inspect;
mod ssh_proxy_command;
mod start;
mod tpm;
mod version;
mod written;

use std::process::ExitCode;

use clap::{CommandFactory as _, Parser as _};
use tracing::level_filters::LevelFilter;

use crate::clock::Clock;
use crate::env::Env;
use crate::telemetry::{self, Colour};
use args::{Cli, Command, Globals, InstallTarget, LogFormat, TpmCommand};
use exit::{Exit, Failure, print};
use keypair::KeypairCommand;
use kube_credentials::KubeCommand;
use spiffe_inspect::Address;

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let env = Env::of_process();
    let exit = match Cli::try_parse() {
        Ok(cli) => finish(run(&cli, &env), cli.globals.log_format),
        Err(error) => finish(unparsed(&error), LogFormat::Text),
    };
    exit.into()
}

fn finish(outcome: Result<(), Failure>, log: LogFormat) -> Exit {
    match outcome {
        Ok(()) => Exit::Success,
        Err(failure) => {
            failure.print(log);
            failure.exit()
        }
    }
}

/// Help goes to standard output; a wrong command line is a usage error.
fn unparsed(error: &clap::Error) -> Result<(), Failure> {
    if !error.use_stderr() {
        return print(&error.render().to_string());
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    Err(Failure::usage(text.trim_end()))
}

fn run(cli: &Cli, env: &Env) -> Result<(), Failure> {
    let globals = &cli.globals;
    if globals.fips() == Some(true) {
        return Err(Failure::usage(
            "--fips: this program is not built with a FIPS-validated module (leave the flag out, or \
             use a FIPS build of upstream's agent)",
        ));
    }
    telemetry::init(
        globals.log_format.into(),
        level(globals, cli.command.as_ref(), env)?,
        Colour::Auto,
    )?;
    let Some(command) = &cli.command else {
        return print(&Cli::command().render_help().to_string());
    };
    match command {
        Command::Version => print(&version::line()),
        Command::Start(flags) => {
            process::protect();
            start::run(globals, flags, env)
        }
        Command::Configure(args) => configure::run(globals, args, env),
        Command::Init(args) => init::run(globals, args, env),
        Command::Migrate { output } => migrate::run(globals, output.as_deref(), env),
        Command::Install { target } => match target {
            InstallTarget::Systemd(args) => install::run(globals, args, env),
        },
        Command::SpiffeInspect { path, output } => {
            let address = Address::of(path.as_deref(), env.get("SPIFFE_ENDPOINT_SOCKET"))
                .map_err(|problem| Failure::usage(problem.to_string()))?;
            Ok(runtime()?.block_on(spiffe_inspect::run(address, *output))?)
        }
        Command::Tpm { command } => match command {
            TpmCommand::Identify => {
                let level = level(globals, cli.command.as_ref(), env)?;
                tpm::identify(level >= LevelFilter::DEBUG, env)
            }
        },
        Command::Keypair { command } => {
            let KeypairCommand::Create(args) = command;
            process::protect();
            let insecure = globals.insecure().unwrap_or_default();
            runtime()?.block_on(Box::pin(keypair::create(args, insecure, env)))
        }
        Command::Kube { command } => {
            let KubeCommand::Credentials(args) = command;
            process::protect();
            kube_credentials::run(args, Clock::system().now())
        }
        Command::SshProxy(args) => {
            process::protect();
            ssh_proxy_command::run(args, globals.insecure(), env)
        }
        Command::Completion { shell } => print(&completion::script(*shell)),
        Command::Quickstart { dir, once } => {
            process::protect();
            Ok(runtime()?.block_on(Box::pin(quickstart::run(dir, *once, env)))?)
        }
        Command::Cluster(args) => cluster(args.clone(), env),
        Command::Man { dir } => man::run(dir.as_deref()),
    }
}

fn cluster(args: cluster::ClusterArgs, env: &Env) -> Result<(), Failure> {
    let (mut out, mut err) = (std::io::stdout(), std::io::stderr());
    runtime()?.block_on(cluster::run(args, env, &mut out, &mut err))?;
    Ok(())
}

/// What asynchronous commands run on.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
}

/// `--log-level`, else DEBUG with `--debug` or `TBOT_DEBUG`, else what the command wants.
fn level(globals: &Globals, command: Option<&Command>, env: &Env) -> Result<LevelFilter, Failure> {
    if let Some(level) = globals.log_level {
        return Ok(level.into());
    }
    let debug = match (globals.debug(), env.get("TBOT_DEBUG")) {
        (Some(typed), _) => typed,
        (None, None) => false,
        (None, Some(value)) => match value {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => true,
            "0" | "f" | "F" | "false" | "FALSE" | "False" => false,
            _ => {
                return Err(Failure::usage(format!(
                    "TBOT_DEBUG is {value:?}: set it to `true` or `false`, or unset it"
                )));
            }
        },
    };
    Ok(match command {
        _ if debug => LevelFilter::DEBUG,
        // What it shows is its output; the two logs would bury it.
        Some(Command::Quickstart { .. }) => LevelFilter::ERROR,
        // They speak between the lines of `ssh` and `kubectl`.
        Some(Command::SshProxy(_) | Command::Kube { .. }) => LevelFilter::WARN,
        _ => LevelFilter::INFO,
    })
}
