//! A cluster's data directory opened, its sockets bound, and everything served.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::admin::{self, AdminError};
use super::audit::{Audit, AuditError};
use super::auth;
use super::ca::{self, Authorities, AuthorityError, Step};
use super::listener::{Port, Server, Sockets};
use super::resources::{self, Applied, CreateError, Mode};
use super::store::{Put, Resource, Store, StoreError};
use super::tls::{Tls, TlsError, WebCertificate};
use super::web::{Ports, Web};
use super::{ClusterState, SWEEP, federation, files, transport, workload_identity};
use crate::clock::Clock;
use crate::crypto::Suite;
use crate::env::Env;
use crate::join::verify::WorldError;
use crate::spiffe::TrustDomain;

/// The most that is read of a resource file.
const MAX_FILE: u64 = 1024 * 1024;

/// The pause after a step of a rotation that failed.
const RETRY: Duration = Duration::from_secs(60);

/// What a cluster is opened with.
#[derive(Debug, Clone)]
pub struct Config {
    /// Everything the cluster keeps; made with mode 0700 if missing.
    pub data_dir: PathBuf,
    /// The name; needed at the first start only, the host's name if `None` then.
    pub cluster_name: Option<String>,
    /// The shared port.
    pub listen: SocketAddr,
    /// The port of the auth service alone, for agents with `auth_server`.
    pub auth_listen: Option<SocketAddr>,
    /// The port for SSH tunnels to the auth service. With it, the shared port does not lead there, as
    /// at a proxy without TLS routing.
    pub tunnel_listen: Option<SocketAddr>,
    /// How agents reach the shared port: host names or addresses, with or without port. The first
    /// is told to them.
    pub public_addrs: Vec<String>,
    /// Files with the web certificate and its key (PEM); self-made if `None`.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Resource files, or directories of them, that are applied at every start.
    pub resources: Vec<PathBuf>,
    /// Where the join method `iam` asks instead of AWS.
    pub sts_endpoint: Option<String>,
    /// The environment of the process: where it runs.
    pub env: Env,
    /// Whether there is the newer join service. Without it, bots join as at a cluster of version
    /// 18.0.
    pub join_v1: bool,
    /// Whether the authorities can be listed. Without it, agents have to do with what came with
    /// their certificates, as at a cluster of another version.
    pub trust_v1: bool,
    /// The program's clock.
    pub clock: Clock,
}

impl Config {
    /// A cluster in `data_dir` that listens on a free port of the loopback address only.
    #[must_use]
    pub fn local(data_dir: PathBuf, clock: Clock) -> Self {
        Self {
            data_dir,
            cluster_name: None,
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            auth_listen: None,
            tunnel_listen: None,
            public_addrs: Vec::new(),
            tls: None,
            resources: Vec::new(),
            sts_endpoint: None,
            env: Env::default(),
            join_v1: true,
            trust_v1: true,
            clock,
        }
    }
}

/// Why a cluster could not be opened or served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClusterError {
    /// The data directory, or a file in it.
    #[error("cannot use {path}: {source}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// Another process serves this directory; stop it, or use another directory.
    #[error("another `tbot cluster serve` is running in {0}")]
    Running(PathBuf),
    /// The name cannot be a trust domain.
    #[error(
        "{0:?} cannot be the name of a cluster: it is its SPIFFE trust domain too (lower-case \
         letters, digits, `.`, `-` and `_`)"
    )]
    Name(String),
    /// The data directory belongs to a cluster of another name.
    #[error(
        "the cluster in {data_dir} is named {found:?}, not {asked:?}: its certificates cannot be \
         renamed (leave the name out, or use another data directory)"
    )]
    OtherName {
        /// The data directory.
        data_dir: PathBuf,
        /// The name it has.
        found: String,
        /// The name that was asked for.
        asked: String,
    },
    /// A port is taken or not allowed.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A resource file is wrong.
    #[error(transparent)]
    Resources(#[from] CreateError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The audit log cannot be opened.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// The endpoint for IAM joins cannot be used.
    #[error(transparent)]
    World(#[from] WorldError),
    /// The authorities cannot be made or read.
    #[error(transparent)]
    Authorities(#[from] AuthorityError),
    /// The listeners have no certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The admin socket cannot be made.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The work was cut off: the process is ending.
    #[error("opening the cluster was interrupted")]
    Interrupted,
}

/// An opened cluster: its sockets are bound, [`Cluster::serve`] answers them.
#[derive(Debug)]
pub struct Cluster {
    state: Arc<ClusterState>,
    server: Arc<Server>,
    sockets: Sockets,
    admin: admin::Server,
    web_addr: SocketAddr,
    auth_addr: Option<SocketAddr>,
    tunnel_addr: Option<SocketAddr>,
    web_ca: Option<PathBuf>,
    /// Held as long as the cluster: one process per data directory.
    _lock: File,
}

impl Cluster {
    /// Opens the data directory, makes what is missing in it, and binds the sockets.
    ///
    /// The first start makes several keys, which takes a second or two.
    pub async fn open(config: Config) -> Result<Self, ClusterError> {
        let shared = bind(config.listen).await?;
        let web_addr = local(&shared, config.listen)?;
        let (auth, auth_addr) = bind_optional(config.auth_listen).await?;
        let (ssh, tunnel_addr) = bind_optional(config.tunnel_listen).await?;
        let ports = Ports {
            shared: web_addr,
            ssh: tunnel_addr,
        };
        let (join_v1, trust_v1) = (config.join_v1, config.trust_v1);
        let opened = tokio::task::spawn_blocking(move || open(config, web_addr))
            .await
            .map_err(|_cancelled| ClusterError::Interrupted)??;
        let state = Arc::new(opened.state);
        let admin = admin::Server::bind(&opened.data_dir, Arc::clone(&state))?;
        let auth::AuthRoutes {
            auth: services,
            join,
        } = auth::routes(&state, join_v1, trust_v1)?;
        let server = Arc::new(Server {
            cluster: state.name.clone(),
            tls: opened.tls,
            auth: workload_identity::add_services(services, &state),
            web: Arc::new(Web::new(Arc::clone(&state), join.clone(), ports)),
            ssh_names: opened.hosts,
            tls_routing: ssh.is_none(),
            authorities: state.authorities.clone(),
            join,
            nodes: transport::routes(&state),
            clock: state.clock.clone(),
            audit: state.audit.clone(),
        });
        Ok(Self {
            state,
            server,
            sockets: Sockets { shared, auth, ssh },
            admin,
            web_addr,
            auth_addr,
            tunnel_addr,
            web_ca: opened.web_ca,
            _lock: opened.lock,
        })
    }

    /// What the services share; also the way to create resources from inside the process.
    #[must_use]
    pub fn state(&self) -> &Arc<ClusterState> {
        &self.state
    }

    /// Creates the resources in `text`, which messages call `file`, as `tctl create` would.
    pub async fn create(&self, file: &str, text: &str) -> Result<Vec<Applied>, ClusterError> {
        let state = Arc::clone(&self.state);
        let files = [(file.to_owned(), text.to_owned())];
        tokio::task::spawn_blocking(move || state.create(&files, Mode::Create, "system"))
            .await
            .map_err(|_cancelled| ClusterError::Interrupted)?
            .map_err(ClusterError::from)
    }

    /// The address of the shared port, as bound.
    #[must_use]
    pub fn web_addr(&self) -> SocketAddr {
        self.web_addr
    }

    /// The address of the auth port, if there is one.
    #[must_use]
    pub fn auth_addr(&self) -> Option<SocketAddr> {
        self.auth_addr
    }

    /// The address of the port for SSH tunnels, if there is one.
    #[must_use]
    pub fn tunnel_addr(&self) -> Option<SocketAddr> {
        self.tunnel_addr
    }

    /// What agents pin to trust this cluster: `sha256:…` of the host authority's key.
    #[must_use]
    pub fn ca_pin(&self) -> String {
        self.state.authorities.host_pin()
    }

    /// The file with the authority of the self-made web certificate; `None` if it was given.
    #[must_use]
    pub fn web_ca(&self) -> Option<&Path> {
        self.web_ca.as_deref()
    }

    /// The auth port without its socket, for tests in simulated time.
    #[must_use]
    pub fn auth_port(&self) -> AuthPort {
        AuthPort(Arc::clone(&self.server))
    }

    /// Serves until `shutdown`, then finishes calls in flight for a few seconds.
    pub async fn serve(self, shutdown: CancellationToken) -> Result<(), ClusterError> {
        let Self {
            state,
            server,
            sockets,
            admin,
            ..
        } = self;
        tokio::join!(
            server.serve(sockets, shutdown.clone()),
            admin.serve(shutdown.clone()),
            sweep(&state, &shutdown),
            rotate(&state, &shutdown),
            federation::run(&state, Arc::new(federation::Network), &shutdown),
        );
        Ok(())
    }
}

/// Answers connections as the auth port does, over transports of the caller's.
#[derive(Debug, Clone)]
pub struct AuthPort(Arc<Server>);

impl AuthPort {
    /// Answers one connection until it ends.
    ///
    /// # Errors
    /// What ended it before its time.
    pub async fn answer(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) -> io::Result<()> {
        let peer = SocketAddr::from(([127, 0, 0, 1], 0));
        let forever = CancellationToken::new();
        Box::pin(self.0.connection(stream, peer, Port::Auth, forever)).await
    }
}

async fn bind_optional(
    address: Option<SocketAddr>,
) -> Result<(Option<TcpListener>, Option<SocketAddr>), ClusterError> {
    let Some(address) = address else {
        return Ok((None, None));
    };
    let listener = bind(address).await?;
    let bound = local(&listener, address)?;
    Ok((Some(listener), Some(bound)))
}

async fn bind(address: SocketAddr) -> Result<TcpListener, ClusterError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ClusterError::Listen { address, source })
}

fn local(listener: &TcpListener, address: SocketAddr) -> Result<SocketAddr, ClusterError> {
    listener
        .local_addr()
        .map_err(|source| ClusterError::Listen { address, source })
}

/// Removes expired resources now and then.
async fn sweep(state: &ClusterState, shutdown: &CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = state.clock.sleep(SWEEP) => {}
        }
        let store = state.store.clone();
        match tokio::task::spawn_blocking(move || store.sweep()).await {
            Ok(Ok(0)) | Err(_) => {}
            Ok(Ok(count)) => tracing::debug!(count, "removed expired resources"),
            Ok(Err(error)) => tracing::error!(%error, "cannot remove expired resources"),
        }
    }
}

/// Takes the steps of scheduled rotations.
async fn rotate(state: &Arc<ClusterState>, shutdown: &CancellationToken) {
    let mut changes = state.authorities.subscribe();
    loop {
        changes.mark_unchanged();
        let due = state.authorities.due();
        let wait = async {
            match due {
                Some((at, ..)) => state.clock.sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            changed = changes.changed() => match changed {
                Ok(()) => continue,
                Err(_gone) => return,
            },
            () = wait => {}
        }
        let Some((_, kind, to)) = due else { continue };
        let step = Step {
            to,
            mode: ca::Mode::Auto,
            grace: ca::GRACE,
        };
        let owned = Arc::clone(state);
        let step = tokio::task::spawn_blocking(move || owned.rotate(kind, step, "system"));
        match step.await {
            Ok(Ok(_)) => {
                let (kind, phase) = (kind.name(), to.name());
                tracing::info!(kind, phase, "a rotation went on");
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "a rotation cannot go on; trying again");
                state.clock.sleep(RETRY).await;
            }
            Err(_ending) => return,
        }
    }
}

struct Opened {
    state: ClusterState,
    tls: Tls,
    data_dir: PathBuf,
    /// Names and addresses of the proxy.
    hosts: Vec<String>,
    web_ca: Option<PathBuf>,
    lock: File,
}

fn open(config: Config, web_addr: SocketAddr) -> Result<Opened, ClusterError> {
    let dir = config.data_dir.as_path();
    let clock = config.clock.clone();
    let now = clock.now();
    let lock = lock(dir)?;
    let store = Store::open(&dir.join("cluster.db"), clock.clone())?;
    let name = name(&store, dir, config.cluster_name)?;
    let audit = Audit::open(&dir.join("audit.jsonl"), clock.clone(), &name)?;
    let authorities = Authorities::open(&store, &name, Suite::BalancedV1, now)?;
    resources::seed(&store, &audit, now).map_err(CreateError::from)?;
    let public_addrs = public_addrs(&config.public_addrs, web_addr);
    let hosts = hosts(&public_addrs);
    let (web, web_ca) = if let Some((cert, key)) = &config.tls {
        (WebCertificate::read(cert, key)?, None)
    } else {
        let export = dir.join("web-ca.pem");
        let web = WebCertificate::make(&store, &name, &hosts, Some(&export), now)?;
        (web, Some(export))
    };
    let names = hosts
        .iter()
        .filter(|host| host.parse::<std::net::IpAddr>().is_err())
        .cloned();
    let tls = Tls::new(&authorities, &web, names.collect(), &clock)?;
    if let Some(endpoint) = &config.sts_endpoint {
        tracing::warn!(
            endpoint,
            "IAM joins are verified by this endpoint instead of AWS: whoever controls it decides \
             who joins"
        );
    }
    let state = ClusterState {
        name,
        public_addr: public_addrs.into_iter().next().unwrap_or_default(),
        clock,
        store,
        audit,
        authorities,
        sts_endpoint: config.sts_endpoint,
        env: config.env,
    };
    for path in &config.resources {
        load(&state, path)?;
    }
    Ok(Opened {
        state,
        tls,
        data_dir: config.data_dir,
        hosts,
        web_ca,
        lock,
    })
}

/// Makes the directory if it is missing and takes its lock.
fn lock(dir: &Path) -> Result<File, ClusterError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ClusterError::File { path, source }
    };
    if !dir.is_dir() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(failed(dir))?;
    }
    let metadata = fs::metadata(dir).map_err(failed(dir))?;
    files::owned(&metadata).map_err(failed(dir))?;
    // It is about to be closed to others: it must be one that nobody else uses.
    let used = || -> std::io::Result<bool> {
        // A start that was cut off has left its lock.
        let others = fs::read_dir(dir)?
            .filter_map(Result::ok)
            .any(|entry| entry.file_name() != "lock");
        Ok(others && !dir.join("cluster.db").exists())
    };
    if used().map_err(failed(dir))? {
        let problem = "it holds other files and no cluster; name a directory of the cluster's own";
        return Err(failed(dir)(std::io::Error::other(problem)));
    }
    if metadata.permissions().mode() & 0o077 != 0 {
        tracing::warn!(dir = %dir.display(), "the data directory was open to others, closing it");
        fs::set_permissions(dir, PermissionsExt::from_mode(0o700)).map_err(failed(dir))?;
    }
    let path = dir.join("lock");
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(false);
    let file = files::open(&path, &mut options).map_err(failed(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ClusterError::Running(dir.to_owned())),
        Err(TryLockError::Error(source)) => Err(failed(&path)(source)),
    }
}

/// The cluster's name: what the store says, else what was asked for, else the host's name.
fn name(store: &Store, dir: &Path, asked: Option<String>) -> Result<String, ClusterError> {
    const KIND: &str = "cluster_name";
    if let Some(stored) = store.get(KIND, KIND)? {
        let found = stored.spec_text("/cluster_name").to_owned();
        return match asked {
            Some(asked) if asked != found => Err(ClusterError::OtherName {
                data_dir: dir.to_owned(),
                found,
                asked,
            }),
            _ => Ok(found),
        };
    }
    let name = asked.unwrap_or_else(host_name);
    if TrustDomain::new(&name).is_err() {
        return Err(ClusterError::Name(name));
    }
    let resource = Resource {
        kind: KIND.to_owned(),
        version: "v2".to_owned(),
        name: KIND.to_owned(),
        spec: json!({"cluster_name": name}),
        ..Resource::default()
    };
    store.put(resource, &Put::Create)?;
    Ok(name)
}

fn host_name() -> String {
    let name = nix::unistd::gethostname().unwrap_or_default();
    let name = name.to_string_lossy().to_lowercase();
    let fits = |c: &char| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-_".contains(*c);
    let name: String = name.chars().filter(fits).collect();
    if name.is_empty() {
        "localhost".to_owned()
    } else {
        name
    }
}

/// The public addresses, each with a port; the one that was bound if there are none.
fn public_addrs(given: &[String], bound: SocketAddr) -> Vec<String> {
    let mut addrs: Vec<String> = given
        .iter()
        .map(|addr| with_port(addr, bound.port()))
        .collect();
    if addrs.is_empty() {
        addrs.push(if bound.ip().is_unspecified() {
            format!("{}:{}", host_name(), bound.port())
        } else {
            bound.to_string()
        });
    }
    addrs
}

fn with_port(addr: &str, port: u16) -> String {
    let addr = addr
        .strip_prefix("https://")
        .unwrap_or(addr)
        .trim_end_matches('/');
    if addr.parse::<std::net::Ipv6Addr>().is_ok() {
        return format!("[{addr}]:{port}");
    }
    match addr.rsplit_once(':') {
        Some((_, tail)) if tail.parse::<u16>().is_ok() => addr.to_owned(),
        _ => format!("{addr}:{port}"),
    }
}

/// Every name and address that the web certificate must be good for.
fn hosts(public_addrs: &[String]) -> Vec<String> {
    let mut hosts: Vec<String> = Vec::new();
    let public = public_addrs.iter().filter_map(|addr| addr.rsplit_once(':'));
    let public = public.map(|(host, _)| host.trim_matches(['[', ']']));
    for host in public.chain(["localhost", "127.0.0.1", "::1"]) {
        if !hosts.iter().any(|known| known == host) {
            hosts.push(host.to_owned());
        }
    }
    hosts
}

/// Applies a resource file, or every `.yaml`, `.yml` and `.json` file of a directory by name.
fn load(state: &ClusterState, path: &Path) -> Result<(), ClusterError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ClusterError::File { path, source }
    };
    let meta = fs::metadata(path).map_err(failed(path))?;
    if meta.is_dir() {
        let mut files = Vec::new();
        for entry in fs::read_dir(path).map_err(failed(path))? {
            let file = entry.map_err(failed(path))?.path();
            let extension = file
                .extension()
                .and_then(|e| e.to_str())
                .unwrap_or_default();
            if file.is_file() && ["yaml", "yml", "json"].contains(&extension) {
                files.push(file);
            }
        }
        files.sort();
        return files.iter().try_for_each(|file| load(state, file));
    }
    if meta.len() > MAX_FILE {
        return Err(failed(path)(io::ErrorKind::FileTooLarge.into()));
    }
    let text = fs::read_to_string(path).map_err(failed(path))?;
    let files = [(path.display().to_string(), text)];
    for applied in state.create(&files, Mode::Ensure, "system")? {
        tracing::info!(file = %path.display(), "{}", applied.message);
        for note in applied.notes {
            tracing::warn!(file = %path.display(), "{note}");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
