//! `tbot cluster serve`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Args;
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cli::exit::Mistake;
use crate::clock::Clock;
use crate::embedded::discovery::{Discovery, config};
use crate::embedded::{Cluster, Config};
use crate::env::Env;

/// Arguments of `tbot cluster serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// Address of the one port for agents and HTTPS
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:3080")]
    listen: SocketAddr,
    /// Address of a second port for agents with `auth_server`
    #[arg(long, value_name = "ADDR")]
    auth_listen: Option<SocketAddr>,
    /// Address of a port for SSH tunnels to the auth service; agents come through it only, as at a
    /// proxy without TLS routing
    #[arg(long, value_name = "ADDR")]
    tunnel_listen: Option<SocketAddr>,
    /// Name of the cluster and its trust domain; fixed at the first start [default: the host name]
    #[arg(long, value_name = "NAME")]
    cluster_name: Option<String>,
    /// How agents reach the port: HOST or HOST:PORT; may be repeated, the first is told to agents
    #[arg(long, value_name = "ADDR", value_parser = public_addr)]
    public_addr: Vec<String>,
    /// Certificate chain of the HTTPS side, PEM [default: a self-made one, see web-ca.pem]
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Key of that certificate, PEM
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Resource files, or directories of them, to apply at every start
    #[arg(long, value_name = "PATH", num_args = 1..)]
    resources: Vec<PathBuf>,
    /// Endpoint to ask instead of AWS STS when bots join with the method iam (tests, private
    /// endpoints)
    #[arg(long, value_name = "URL")]
    sts_endpoint: Option<String>,
    /// A teleport.yaml, of which `discovery_service` is read: EKS clusters to be registered
    #[arg(long, value_name = "FILE")]
    // A text like the agent's flag of this name, which every command has and this one replaces.
    config: Option<String>,
}

/// An address that agents can be told: they reach this cluster by TLS only.
fn public_addr(text: &str) -> Result<String, String> {
    let addr = text.strip_prefix("https://").unwrap_or(text);
    let addr = addr.trim_end_matches('/');
    let odd = |c: char| c.is_whitespace() || c.is_control() || "/?#@".contains(c);
    if addr.is_empty() || addr.contains(odd) {
        return Err("expected HOST or HOST:PORT; agents reach it by TLS".to_owned());
    }
    Ok(text.to_owned())
}

/// What to discover, if a file says so.
fn discovery(path: Option<&str>, env: &Env) -> anyhow::Result<Option<Discovery>> {
    let Some(path) = path else {
        return Ok(None);
    };
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    let config = config::parse(path, &text).map_err(|error| Mistake(error.to_string()))?;
    let discovery = config.map(|config| Discovery::new(config, env)).transpose();
    Ok(discovery.map_err(|error| Mistake(error.to_string()))?)
}

/// Serves until SIGINT or SIGTERM.
pub(super) async fn run(args: ServeArgs, data_dir: PathBuf, env: &Env) -> anyhow::Result<()> {
    // The keys of every authority are in here.
    crate::cli::process::protect();
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let discovery = discovery(args.config.as_deref(), env)?;
    let cluster = Cluster::open(Config {
        data_dir: data_dir.clone(),
        cluster_name: args.cluster_name,
        listen: args.listen,
        auth_listen: args.auth_listen,
        tunnel_listen: args.tunnel_listen,
        public_addrs: args.public_addr,
        tls: args.tls_cert.zip(args.tls_key),
        resources: args.resources,
        sts_endpoint: args.sts_endpoint,
        env: env.clone(),
        join_v1: true,
        trust_v1: true,
        clock: Clock::system(),
    })
    .await?;
    let state = cluster.state();
    tracing::info!(
        cluster = %state.name,
        listen = %cluster.web_addr(),
        public_addr = %state.public_addr,
        data_dir = %data_dir.display(),
        ca_pin = %cluster.ca_pin(),
        "Cluster is serving"
    );
    if let Some(address) = cluster.auth_addr() {
        tracing::info!(listen = %address, "Auth service is serving");
    }
    if let Some(address) = cluster.tunnel_addr() {
        tracing::info!(listen = %address, "SSH tunnels are serving");
    }
    if let Some(path) = cluster.web_ca() {
        tracing::info!(
            authority = %path.display(),
            "The HTTPS certificate is self-made; agents trust it with this authority, or with \
             --insecure"
        );
    }
    let name = state.name.clone();
    let shutdown = CancellationToken::new();
    let discovering = {
        let (state, shutdown) = (Arc::clone(state), shutdown.clone());
        async move {
            if let Some(discovery) = discovery {
                discovery.run(state, shutdown).await;
            }
        }
    };
    let serving = cluster.serve(shutdown.clone());
    let serving = async { tokio::join!(serving, discovering).0 };
    let mut serving = std::pin::pin!(serving);
    tell(&[
        NotifyState::Ready,
        NotifyState::Status(&format!("Serving cluster {name}")),
    ]);
    let signalled = tokio::select! {
        result = &mut serving => return Ok(result?),
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
    };
    tracing::info!(signal = signalled, "Stopping");
    tell(&[NotifyState::Stopping]);
    shutdown.cancel();
    Ok(serving.await?)
}

/// Tells the service manager, if there is one.
fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager could not be told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn public_addresses_are_hosts() {
        for good in [
            "a.example.com",
            "a:443",
            "https://a.example.com/",
            "[::1]:3080",
            "::1",
        ] {
            assert_eq!(public_addr(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "http://foo",
            "https://",
            "a/b",
            "a b",
            "u@a",
            "ftp://a:1",
            "a?b",
        ] {
            assert!(public_addr(bad).is_err(), "{bad}");
        }
    }
}
