//! The command tree. Subcommands of `start` and `configure` come from the registry of service
//! kinds (`flags.rs`); everything else is written down here.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tracing::level_filters::LevelFilter;

use super::cluster::ClusterArgs;
use super::flags::AgentFlags;
use super::keypair::KeypairCommand;
use super::kube_credentials::KubeCommand;
use super::ssh_proxy_command::SshProxyArgs;
use crate::telemetry::Format;

/// Joins a Teleport cluster as a machine, keeps its certificates fresh and hands identities to the
/// software beside it.
#[derive(Debug, Parser)]
#[command(
    name = "tbot",
    version,
    disable_version_flag = true,
    args_override_self = true,
    arg_required_else_help = false,
    subcommand_required = false,
    infer_subcommands = false
)]
pub(super) struct Cli {
    /// Flags that may stand before or after the command.
    #[command(flatten)]
    pub(super) globals: Globals,
    /// The command; without one, help is shown.
    #[command(subcommand)]
    pub(super) command: Option<Command>,
}

/// Flags of every command.
#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch or its opposite"
)]
pub(super) struct Globals {
    #[arg(
        help = "Configuration file; `-` reads standard input [env: TBOT_CONFIG_PATH]",
        short,
        long,
        global = true,
        value_name = "PATH"
    )]
    pub(super) config: Option<String>,
    #[arg(
        help = "Configuration as base64 of the YAML text [env: TBOT_CONFIG]",
        long,
        global = true,
        hide = true,
        value_name = "BASE64"
    )]
    pub(super) config_string: Option<String>,
    #[arg(
        help = "Log more [env: TBOT_DEBUG]",
        short,
        long,
        global = true,
        overrides_with = "no_debug"
    )]
    debug: bool,
    #[arg(long, global = true, hide = true)]
    no_debug: bool,
    /// How log lines are written
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    pub(super) log_format: LogFormat,
    /// The least serious level that is logged; wins over --debug
    #[arg(long, global = true, value_name = "LEVEL")]
    pub(super) log_level: Option<LogLevel>,
    /// Refused: this program has no FIPS-validated module
    #[arg(long, global = true, overrides_with = "no_fips")]
    fips: bool,
    #[arg(long, global = true, hide = true)]
    no_fips: bool,
    /// Believe the cluster's certificate on the first connection without checking it
    #[arg(long, global = true, overrides_with = "no_insecure")]
    insecure: bool,
    #[arg(long, global = true, hide = true)]
    no_insecure: bool,
}

impl Globals {
    /// `--debug` or `--no-debug`, if typed.
    pub(super) fn debug(&self) -> Option<bool> {
        typed(self.debug, self.no_debug)
    }

    /// `--fips` or `--no-fips`, if typed.
    pub(super) fn fips(&self) -> Option<bool> {
        typed(self.fips, self.no_fips)
    }

    /// `--insecure` or `--no-insecure`, if typed.
    pub(super) fn insecure(&self) -> Option<bool> {
        typed(self.insecure, self.no_insecure)
    }
}

fn typed(yes: bool, no: bool) -> Option<bool> {
    (yes || no).then_some(yes && !no)
}

/// The forms of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    /// One line of text for each event.
    Text,
    /// One JSON object for each event.
    Json,
}

impl From<LogFormat> for Format {
    fn from(format: LogFormat) -> Self {
        match format {
            LogFormat::Text => Self::Text,
            LogFormat::Json => Self::Json,
        }
    }
}

/// The forms of what `spiffe-inspect` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum InspectOutput {
    /// For people.
    Text,
    /// One JSON object.
    Json,
}

/// The levels of log lines.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum LogLevel {
    /// Everything, libraries included.
    Trace,
    /// What a developer needs.
    Debug,
    /// What an operator may want to know.
    Info,
    /// What an operator should look at.
    Warn,
    /// What does not work.
    Error,
}

impl From<LogLevel> for LevelFilter {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Trace => Self::TRACE,
            LogLevel::Debug => Self::DEBUG,
            LogLevel::Info => Self::INFO,
            LogLevel::Warn => Self::WARN,
            LogLevel::Error => Self::ERROR,
        }
    }
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Print the version
    Version,
    /// Run the agent
    Start(AgentFlags),
    /// Print the configuration file that `start` with the same flags stands for
    Configure(ConfigureArgs),
    /// Prepare an output's directory for an agent that runs as another user
    Init(InitArgs),
    /// Print a configuration of the old format v1 in the current one
    Migrate {
        /// Write to a file instead of standard output
        #[arg(short, long, value_name = "PATH")]
        output: Option<PathBuf>,
    },
    /// Install the agent on this machine
    Install {
        /// What is installed.
        #[command(subcommand)]
        target: InstallTarget,
    },
    /// Show a cluster, an agent and a workload with an SVID, made from nothing in one directory
    Quickstart {
        /// Where everything is kept
        #[arg(long, value_name = "DIR", default_value = "./tbot-quickstart")]
        dir: PathBuf,
        /// End after the first SVID
        #[arg(long)]
        once: bool,
    },
    /// Run and administer the embedded single-node cluster
    Cluster(ClusterArgs),
    /// Show what a SPIFFE Workload API gives to this process
    SpiffeInspect {
        /// The API's address: `unix:///path` or `tcp://IP:port`; default `SPIFFE_ENDPOINT_SOCKET`
        #[arg(long, value_name = "URI")]
        path: Option<String>,
        /// How to show it; anything that a workload would miss ends the command with 1
        #[arg(long, value_enum, default_value_t = InspectOutput::Text)]
        output: InspectOutput,
    },
    /// Commands for the machine's TPM, as `join_method: tpm` uses it
    Tpm {
        /// What is wanted.
        #[command(subcommand)]
        command: TpmCommand,
    },
    /// Reach a host for `ssh`; written into `ssh_config`
    #[command(name = "ssh-proxy-command", hide = true)]
    SshProxy(SshProxyArgs),
    /// Keys that a bot joins with
    Keypair {
        /// What is wanted.
        #[command(subcommand)]
        command: KeypairCommand,
    },
    /// Commands for Kubernetes clients; written into kubeconfigs
    #[command(hide = true)]
    Kube {
        /// What is wanted.
        #[command(subcommand)]
        command: KubeCommand,
    },
    /// Print a shell's completion script
    Completion {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write manual pages
    Man {
        /// Where to write one page for each command; without it tbot(1) goes to standard output
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

/// Commands for the TPM.
#[derive(Debug, Clone, Copy, Subcommand)]
pub(super) enum TpmCommand {
    /// Print what a token resource has to say so that this machine's TPM may join
    Identify,
}

/// `configure`.
#[derive(Debug, Args)]
pub(super) struct ConfigureArgs {
    /// Write to a file instead of standard output
    #[arg(short, long, global = true, value_name = "PATH")]
    pub(super) output: Option<PathBuf>,
    /// The same flags as `start`.
    #[command(flatten)]
    pub(super) flags: AgentFlags,
}

/// `init`.
#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// Which of several destinations to prepare, as its path is written in the configuration
    #[arg(long, value_name = "DIR")]
    pub(super) init_dir: Option<String>,
    /// Replace all services of the configuration by an identity output to this directory
    #[arg(long, value_name = "DIR")]
    pub(super) destination_dir: Option<String>,
    /// Who is to own everything; the bot user by default
    #[arg(long, value_name = "USER:GROUP")]
    pub(super) owner: Option<String>,
    /// The user that the agent runs as
    #[arg(long, value_name = "USER")]
    pub(super) bot_user: Option<String>,
    /// The user that reads the files
    #[arg(long, value_name = "USER")]
    pub(super) reader_user: Option<String>,
    /// Remove everything from the directory that no agent writes
    #[arg(long, overrides_with = "no_clean")]
    clean: bool,
    #[arg(long, hide = true)]
    no_clean: bool,
    #[arg(
        help = "Address of an auth service [env: TELEPORT_AUTH_SERVER]",
        short,
        long,
        value_name = "HOST:PORT"
    )]
    pub(super) auth_server: Option<String>,
    #[arg(
        help = "Address of a proxy [env: TELEPORT_PROXY]",
        long,
        value_name = "HOST:PORT"
    )]
    pub(super) proxy_server: Option<String>,
}

impl InitArgs {
    /// `--clean`, unless `--no-clean` came after it.
    pub(super) fn clean(&self) -> bool {
        typed(self.clean, self.no_clean).unwrap_or_default()
    }
}

/// `install`.
#[derive(Debug, Subcommand)]
pub(super) enum InstallTarget {
    /// Print or write a systemd unit that runs `tbot start`
    Systemd(SystemdArgs),
}

/// `install systemd`.
#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch or its opposite"
)]
pub(super) struct SystemdArgs {
    /// Name of the unit, without `.service`
    #[arg(long, default_value = "tbot")]
    pub(super) name: String,
    /// User to run as
    #[arg(long, default_value = "teleport")]
    pub(super) user: String,
    /// Group to run as
    #[arg(long, default_value = "teleport")]
    pub(super) group: String,
    /// Where the unit is written
    #[arg(long, value_name = "DIR", default_value = "/etc/systemd/system")]
    pub(super) systemd_directory: PathBuf,
    /// Write the unit instead of printing it
    #[arg(long, overrides_with = "no_write")]
    pub(super) write: bool,
    #[arg(long, hide = true)]
    no_write: bool,
    /// Replace a unit that differs
    #[arg(long, overrides_with = "no_force")]
    pub(super) force: bool,
    #[arg(long, hide = true)]
    no_force: bool,
    /// Allow anonymous telemetry in the unit's environment (this agent sends none)
    #[arg(long, overrides_with = "no_anonymous_telemetry")]
    pub(super) anonymous_telemetry: bool,
    #[arg(long, hide = true)]
    no_anonymous_telemetry: bool,
    /// Where the agent writes its process id; none by default
    #[arg(long, value_name = "PATH")]
    pub(super) pid_file: Option<PathBuf>,
    /// Diagnostics socket for a managed updater
    #[arg(long, value_name = "PATH", hide = true)]
    pub(super) diag_socket_for_updater: Option<PathBuf>,
}
