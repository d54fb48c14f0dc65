//! `tbot ssh-proxy-command`: what a generated `ssh_config` starts to reach a host. It reads the
//! identity beside that file, has the cluster's proxy reach the host, and carries the bytes between
//! `ssh` and the host over standard input and output.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context as _, anyhow};
use clap::Args;
use tonic::Code;

use super::exit::Failure;
use super::written;
use crate::clock::Clock;
use crate::cluster::dial::{Opening, host_of};
use crate::cluster::network::{Network, Settings};
use crate::cluster::ping::{port_of, with_port};
use crate::cluster::transport::{self, Agent, Target};
use crate::cluster::trust::Trust;
use crate::cluster::{ClusterError, Credential};
use crate::env::Env;

/// The flags that `ssh_config` writes (upstream `lib/tbot/cli/ssh_proxy.go`).
#[derive(Debug, Args)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a switch or its opposite"
)]
#[command(
    group = clap::ArgGroup::new("routing").args(["tls_routing", "no_tls_routing"]).required(true).multiple(true),
    group = clap::ArgGroup::new("upgrade").args(["connection_upgrade", "no_connection_upgrade"]).required(true).multiple(true)
)]
pub(super) struct SshProxyArgs {
    /// The directory that holds the file `identity`
    #[arg(long, value_name = "DIR", default_value = ".")]
    destination_dir: PathBuf,
    /// The cluster of the host; the identity's own by default
    #[arg(long, default_value = "")]
    cluster: String,
    /// The login on the host, which `ssh` itself tells it
    #[arg(long)]
    user: String,
    /// The host to reach
    #[arg(long)]
    host: String,
    /// Its port
    #[arg(long, default_value = "0")]
    port: String,
    /// The proxy, `host:port`
    #[arg(long)]
    proxy_server: String,
    /// The proxy has one port for everything
    #[arg(long, overrides_with = "no_tls_routing")]
    tls_routing: bool,
    #[arg(long, hide = true)]
    no_tls_routing: bool,
    /// Something before the proxy hides ALPN
    #[arg(long, overrides_with = "no_connection_upgrade")]
    connection_upgrade: bool,
    #[arg(long, hide = true)]
    no_connection_upgrade: bool,
    /// Refused: rules that rewrite the host
    #[arg(long, value_name = "PATH")]
    proxy_templates: Option<PathBuf>,
    /// Accepted: a connection that breaks is not resumed, as with the opposite
    #[arg(long, overrides_with = "no_resume")]
    resume: bool,
    #[arg(long, hide = true)]
    no_resume: bool,
}

/// Carries one connection. `insecure` believes any load balancer before the proxy, but never
/// another proxy.
pub(super) fn run(args: &SshProxyArgs, insecure: Option<bool>, env: &Env) -> Result<(), Failure> {
    if let Some(path) = &args.proxy_templates {
        return Err(Failure::usage(format!(
            "--proxy-templates={}: rules that rewrite hosts are not known here; write a `Host` block \
             with `HostName` into your own ssh_config instead",
            path.display()
        )));
    }
    if port_of(&args.proxy_server).is_none() {
        return Err(Failure::usage(format!(
            "--proxy-server={}: expected host:port, such as {}",
            args.proxy_server,
            with_port(&args.proxy_server, "443")
        )));
    }
    let settings = Settings::from_env(env).map_err(Failure::usage)?;
    // One connection, and quick to start.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let carried = runtime.block_on(carry(args, insecure.unwrap_or_default(), settings));
    // A read of standard input may never end.
    runtime.shutdown_background();
    Ok(carried?)
}

async fn carry(args: &SshProxyArgs, insecure: bool, settings: Settings) -> anyhow::Result<()> {
    let clock = Clock::system();
    let identity = written::identity(&args.destination_dir, clock.now())?;
    let proxy = args.proxy_server.as_str();
    let own = identity.cluster();
    let cluster = if args.cluster.is_empty() {
        own.as_str()
    } else {
        args.cluster.as_str()
    };
    let name = host_name(&args.host, host_of(proxy), cluster);
    let credential = Credential::new(
        &clock,
        &own,
        &identity.key,
        identity.tls.der(),
        &identity.authorities,
    )?;
    let agent = Agent::new(&identity.key, &identity.ssh)?;
    let trust = Trust {
        insecure,
        ..Trust::default()
    };
    let opening = if args.connection_upgrade {
        Opening::Upgraded
    } else {
        Opening::Plain
    };
    let target = Target {
        proxy,
        opening,
        host: &with_port(name, &args.port),
        cluster,
    };
    let network = Network::new(settings, trust, clock);
    let reaching = format!("reaching {name} of {cluster} through {proxy}");
    let session = transport::open(&network, &credential, agent, target)
        .await
        .map_err(|error| match remedy(&error) {
            Some(remedy) => anyhow!("{reaching}: {error} ({remedy})"),
            None => anyhow::Error::from(error).context(reaching.clone()),
        })?;
    let (input, output) = (own_file(io::stdin())?, own_file(io::stdout())?);
    session.carry(input, output).await.context(reaching)
}

/// The host's own name: `ssh_config` matches names that end with the cluster or the proxy.
fn host_name<'a>(host: &'a str, proxy: &str, cluster: &str) -> &'a str {
    let without = |name: &'a str, suffix: &str| {
        name.strip_suffix(suffix)
            .and_then(|name| name.strip_suffix('.'))
            .unwrap_or(name)
    };
    without(without(host, proxy), cluster)
}

/// What a person has to do about a failure, where it does not say so itself.
fn remedy(error: &ClusterError) -> Option<&'static str> {
    if error.remedy().is_some() {
        return None;
    }
    match error {
        ClusterError::Tls { .. } => Some(
            "the proxy takes only identities that its cluster issued; is this its address, and has \
             the tbot that writes the identity renewed it since the cluster's authorities changed?",
        ),
        ClusterError::Call { status, .. } => match status.code() {
            Code::PermissionDenied => Some("do the bot's roles allow the node?"),
            Code::NotFound | Code::Unavailable | Code::DeadlineExceeded => Some(
                "is there a node of that name that the bot's roles allow, is it running, and connected \
                 to the cluster? `tsh -i DESTINATION/identity ls` lists them",
            ),
            _ => None,
        },
        _ => None,
    }
}

/// A file of this process's own for one that it was started with.
fn own_file(of: impl AsFd) -> io::Result<tokio::fs::File> {
    let fd = of.as_fd().try_clone_to_owned()?;
    Ok(tokio::fs::File::from_std(File::from(fd)))
}
