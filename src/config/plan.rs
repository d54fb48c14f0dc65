//! The plan: what the agent will do, with every default filled in.

use std::path::PathBuf;
use std::sync::Arc;

use crate::cluster::network::Settings;
use crate::cluster::trust::Trust;
use crate::destination::DestinationPlan;
use crate::join::{Prover, TokenSource};
use crate::services::{Lifetime, ServicePlan, reload};
use crate::yaml::{Tree, duration, emit::emit};

/// How the cluster is reached, as `host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// Through a proxy: the usual way.
    Proxy(String),
    /// An auth service directly (on 18.0 also a proxy's address is taken here).
    Auth(String),
}

/// How the bot joins.
#[derive(Clone, Debug, Default)]
pub struct Onboarding {
    /// `None` only for commands that do not join; [`Plan::for_start`] refuses it.
    pub method: Option<Arc<dyn Prover>>,
    /// Needed by every method unless a stored identity is still valid.
    pub token: Option<TokenSource>,
    /// How the first connection is judged.
    pub trust: Trust,
}

/// One service with its name and lifetime settled.
#[derive(Debug)]
pub struct PlannedService {
    /// Unique: the configured one, or `<type>-<n>`.
    pub name: String,
    /// Whether the name was configured.
    pub named: bool,
    /// The YAML `type`.
    pub kind: &'static str,
    /// The service's own pair, else the agent's.
    pub lifetime: Lifetime,
    /// Whether the pair is the service's own.
    pub own_lifetime: bool,
    /// What is done after its files changed.
    pub reload: Option<reload::Plan>,
    /// The kind's own part.
    pub plan: Box<dyn ServicePlan>,
}

/// Everything that was decided from file, flags and variables. Nothing after it validates again.
#[derive(Debug)]
pub struct Plan {
    /// `None` only for commands that do not connect; [`Plan::for_start`] refuses it.
    pub server: Option<Server>,
    /// Use the proxy's configured address instead of the one it advertises
    /// (`TBOT_USE_PROXY_ADDR=yes`).
    pub use_proxy_address: bool,
    /// What the environment says of dialling, or which variable of it cannot be understood.
    pub network: Result<Settings, String>,
    /// How the bot joins.
    pub onboarding: Onboarding,
    /// Where the bot's own identity is kept.
    pub storage: Arc<dyn DestinationPlan>,
    /// In the order of the file, `outputs` last.
    pub services: Vec<PlannedService>,
    /// The pair of every service that has none of its own.
    pub lifetime: Lifetime,
    /// One pass, then the end.
    pub oneshot: bool,
    /// Profiles on the diagnostics listener. Does not raise the log level.
    pub debug: bool,
    /// `host:port` of the diagnostics listener.
    pub diag_addr: Option<String>,
    /// A unix socket with the same diagnostics, for a managed updater.
    pub diag_socket: Option<PathBuf>,
    /// Where the process id is written while the agent runs.
    pub pid_file: Option<PathBuf>,
}

impl Plan {
    /// What keeps this plan from being started, one line each with its remedy.
    #[must_use]
    pub fn for_start(&self) -> Vec<String> {
        let mut missing: Vec<String> = self.network.as_ref().err().cloned().into_iter().collect();
        match &self.server {
            None => missing.push(
                "no cluster address: set `proxy_server` (or --proxy-server) to your proxy's \
                 host:port, for example example.teleport.sh:443"
                    .to_owned(),
            ),
            Some(Server::Auth(_)) if self.use_proxy_address => missing.push(
                "TBOT_USE_PROXY_ADDR=yes needs `proxy_server`: set it, or unset the variable"
                    .to_owned(),
            ),
            Some(_) => {}
        }
        missing.extend(self.for_configure());
        missing
    }

    /// What keeps this plan from being written as a configuration file.
    #[must_use]
    pub fn for_configure(&self) -> Vec<String> {
        if self.onboarding.method.is_some() {
            return Vec::new();
        }
        let known: Vec<&str> = crate::join::METHODS.iter().map(|m| m.name()).collect();
        vec![format!(
            "no join method: set `onboarding.join_method` (or --join-method) to one of {}",
            known.join(", ")
        )]
    }

    /// The configuration file that gives this plan, defaults written out. Holds the join token.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        emit(&self.tree(|token| token.expose().clone()))
    }

    /// As [`Plan::to_yaml`] with the join token left out, for a log.
    #[must_use]
    pub fn to_redacted_yaml(&self) -> String {
        emit(&self.tree(|_| "<redacted>".to_owned()))
    }

    fn tree(&self, token: impl Fn(&crate::secret::Secret<String>) -> String) -> Tree {
        let (proxy, auth) = match &self.server {
            Some(Server::Proxy(address)) => (Some(Tree::text(address)), None),
            Some(Server::Auth(address)) => (None, Some(Tree::text(address))),
            None => (None, None),
        };
        let services: Vec<Tree> = self.services.iter().map(PlannedService::tree).collect();
        Tree::map([
            ("version", Some(Tree::text("v2"))),
            ("onboarding", self.onboarding.tree(token)),
            ("storage", Some(self.storage.emit())),
            (
                "services",
                (!services.is_empty()).then_some(Tree::List(services)),
            ),
            ("debug", Some(Tree::Bool(self.debug))),
            ("auth_server", auth),
            ("proxy_server", proxy),
            (
                "credential_ttl",
                Some(Tree::text(duration::format(self.lifetime.ttl))),
            ),
            (
                "renewal_interval",
                Some(Tree::text(duration::format(self.lifetime.interval))),
            ),
            ("oneshot", Some(Tree::Bool(self.oneshot))),
            ("fips", Some(Tree::Bool(false))),
            ("diag_addr", self.diag_addr.as_deref().map(Tree::text)),
            (
                "insecure",
                self.onboarding.trust.insecure.then_some(Tree::Bool(true)),
            ),
        ])
    }
}

impl Onboarding {
    fn tree(&self, token: impl Fn(&crate::secret::Secret<String>) -> String) -> Option<Tree> {
        let token = self.token.as_ref().map(|source| {
            Tree::Text(match source {
                TokenSource::Value(value) => token(value),
                TokenSource::File(path) => path.display().to_string(),
            })
        });
        let ca_path = self
            .trust
            .ca_path
            .as_ref()
            .map(|p| Tree::text(p.display().to_string()));
        let ca_pins = (!self.trust.ca_pins.is_empty())
            .then(|| Tree::texts(self.trust.ca_pins.iter().cloned()));
        if token.is_none() && ca_path.is_none() && ca_pins.is_none() && self.method.is_none() {
            return None;
        }
        let method = self.method.as_ref();
        let name = method.map_or("", |prover| prover.method().name());
        let section = method.and_then(|prover| Some((prover.method().section()?, prover.tree()?)));
        let mut entries = vec![
            ("token", token),
            ("ca_path", ca_path),
            ("ca_pins", ca_pins),
            ("join_method", Some(Tree::text(name))),
        ];
        entries.extend(section.map(|(key, tree)| (key, Some(tree))));
        Some(Tree::map(entries))
    }
}

impl PlannedService {
    fn tree(&self) -> Tree {
        let mut entries = vec![("type".to_owned(), Tree::text(self.kind))];
        if self.named {
            entries.push(("name".to_owned(), Tree::text(&self.name)));
        }
        entries.extend(self.plan.emit());
        if let Some(reload) = &self.reload {
            entries.push(("reload".to_owned(), reload.emit()));
        }
        if self.own_lifetime {
            for (key, value) in [
                ("credential_ttl", self.lifetime.ttl),
                ("renewal_interval", self.lifetime.interval),
            ] {
                entries.push((key.to_owned(), Tree::text(duration::format(value))));
            }
        }
        Tree::Map(entries)
    }
}
