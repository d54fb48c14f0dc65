//! `tbot quickstart`: a cluster, an agent and a workload with an SVID, from nothing, in seconds.
//!
//! What it writes is real: a cluster's data directory, resource files as `tctl create` takes them,
//! and a `tbot.yaml`. Everything stays in one directory, and a second start goes on from it.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, anyhow, bail};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;
use tonic::metadata::MetadataValue;
use tonic::transport::Endpoint;
use tonic::{Code, Request, Status};

use crate::app;
use crate::clock::{Clock, rfc3339};
use crate::config::{self, Overlay, Server, Source};
use crate::crypto::random;
use crate::crypto::x509::Certificate;
use crate::embedded::resources::Mode;
use crate::embedded::{self, Cluster};
use crate::env::Env;
use crate::pb::workload_api::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use crate::pb::workload_api::{X509svidRequest, X509svidResponse};

/// How long the first SVID may take before something is wrong.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two questions while the agent joins.
const RETRY: Duration = Duration::from_millis(20);
/// How long the bot's token is good for.
const TOKEN_LIFE: Duration = Duration::from_mins(10);

const ROLE: &str = "\
# What the bot may do: issue the workload identities that carry this label.
kind: role
version: v7
metadata:
  name: workload-identity-issuer
spec:
  allow:
    workload_identity_labels:
      example: [quickstart]
    rules:
    - resources: [workload_identity]
      verbs: [list, read]
";

const BOT: &str = "\
# The bot that the agent joins as.
kind: bot
version: v1
metadata:
  name: quickstart
spec:
  roles: [workload-identity-issuer]
";

const WORKLOAD_IDENTITY: &str = "\
# The identity that workloads get. Try {{workload.unix.uid}} or {{workload.systemd.service}} in the path.
kind: workload_identity
version: v1
metadata:
  name: quickstart
  labels:
    example: quickstart
spec:
  spiffe:
    id: /svc/hello
";

/// Runs the quickstart in `dir`; with `once` it ends after the first SVID.
///
/// # Errors
/// What kept the workload from its SVID.
pub(super) async fn run(dir: &Path, once: bool, env: &Env) -> anyhow::Result<()> {
    let clock = Clock::system();
    let home = Home::make(dir)?;
    let cluster = home.open_cluster(&clock).await?;
    let address = cluster
        .auth_addr()
        .context("the cluster has no auth port")?;
    home.write_config(address, &cluster.ca_pin())?;
    if !home.has_identity(clock.now()) {
        home.make_token(&cluster, clock.now())?;
    }
    let plan = home.plan(env)?;

    let shutdown = CancellationToken::new();
    let serving = cluster.serve(shutdown.clone());
    let agent = app::run_until(plan, shutdown.clone());
    let showing = async {
        let response = tokio::time::timeout(PATIENCE, first_svid(&home.socket(), &clock))
            .await
            .context("no SVID within 30 s")?
            .context("the workload got no SVID")?;
        home.show(&response, once, clock.now())?;
        if !once {
            shutdown.cancelled().await;
        }
        Ok::<_, anyhow::Error>(())
    };
    let mut serving = std::pin::pin!(serving);
    let mut agent = std::pin::pin!(agent);
    let result = tokio::select! {
        shown = showing => shown,
        ended = &mut agent => {
            // The agent ends by itself on Ctrl-C, or because something is wrong.
            shutdown.cancel();
            serving.await?;
            return ended;
        }
        ended = &mut serving => {
            shutdown.cancel();
            agent.await?;
            return ended.map_err(anyhow::Error::from);
        }
    };
    shutdown.cancel();
    agent.await?;
    serving.await?;
    result
}

/// The directory with everything in it.
struct Home {
    dir: PathBuf,
}

impl Home {
    fn make(dir: &Path) -> anyhow::Result<Self> {
        let dir =
            std::path::absolute(dir).with_context(|| format!("cannot use {}", dir.display()))?;
        for path in [dir.clone(), dir.join("resources")] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        // A unix socket's path has at most 107 bytes.
        if dir.join("workload.sock").as_os_str().len() > 107 {
            bail!(
                "{} is too long a path for a socket: choose a shorter --dir",
                dir.display()
            );
        }
        let home = Self { dir };
        for (name, text) in [
            ("role.yaml", ROLE),
            ("bot.yaml", BOT),
            ("workload-identity.yaml", WORKLOAD_IDENTITY),
        ] {
            home.write_once(&Path::new("resources").join(name), text)?;
        }
        Ok(home)
    }

    fn socket(&self) -> PathBuf {
        self.dir.join("workload.sock")
    }

    fn config(&self) -> PathBuf {
        self.dir.join("tbot.yaml")
    }

    /// Writes a file that is not there yet, readable by its owner only.
    fn write_once(&self, name: &Path, text: &str) -> anyhow::Result<()> {
        let path = self.dir.join(name);
        if path.exists() {
            return Ok(());
        }
        write_private(&path, text)
    }

    /// Opens the cluster, on the ports of the last start if there was one.
    async fn open_cluster(&self, clock: &Clock) -> anyhow::Result<Cluster> {
        let mut settings = embedded::Config::local(self.dir.join("cluster"), clock.clone());
        settings.cluster_name = Some("quickstart.local".to_owned());
        settings.resources = vec![self.dir.join("resources")];
        settings.auth_listen = Some(self.last_address().unwrap_or(settings.listen));
        Cluster::open(settings).await.with_context(|| {
            format!(
                "the cluster in {} does not start (does it run here already? If its port is taken \
                 by something else, delete {} and start again)",
                self.dir.join("cluster").display(),
                self.config().display()
            )
        })
    }

    /// The auth address in the `tbot.yaml` of an earlier start.
    fn last_address(&self) -> Option<SocketAddr> {
        let tree = crate::yaml::parse(&fs::read_to_string(self.config()).ok()?).ok()?;
        tree.get("auth_server")?.text()?.parse().ok()
    }

    fn write_config(&self, address: SocketAddr, pin: &str) -> anyhow::Result<()> {
        let dir = self.dir.display();
        let text = format!(
            "\
version: v2
auth_server: {address}
onboarding:
  join_method: token
  token: {dir}/token
  ca_pins: [\"{pin}\"]
storage:
  type: directory
  path: {dir}/agent
services:
  - type: workload-identity-api
    listen: unix://{dir}/workload.sock
    selector:
      name: quickstart
  - type: identity
    ssh_config: \"off\"
    destination:
      type: directory
      path: {dir}/identity
"
        );
        self.write_once(Path::new("tbot.yaml"), &text)
    }

    /// Whether the agent holds an identity that is still good for a while.
    fn has_identity(&self, now: SystemTime) -> bool {
        fs::read_to_string(self.dir.join("agent/tlscert"))
            .ok()
            .and_then(|pem| Certificate::from_pem(&pem).ok())
            .is_some_and(|certificate| certificate.not_after() > now + PATIENCE)
    }

    /// Makes a join token for the bot: in the cluster, and in the file that `tbot.yaml` names.
    fn make_token(&self, cluster: &Cluster, now: SystemTime) -> anyhow::Result<()> {
        let token = hex::encode(random::<16>());
        let expires = rfc3339(now + TOKEN_LIFE);
        let resource = format!(
            "kind: token\nversion: v2\nmetadata: {{name: \"{token}\", expires: \"{expires}\"}}\n\
             spec: {{roles: [Bot], bot_name: quickstart, join_method: token}}\n"
        );
        cluster
            .state()
            .create(
                &[("token.yaml".to_owned(), resource)],
                Mode::Create,
                "quickstart",
            )
            .context("the join token could not be made")?;
        write_private(&self.dir.join("token"), &format!("{token}\n"))
    }

    fn plan(&self, env: &Env) -> anyhow::Result<config::Plan> {
        let path = self.config();
        let source = Source {
            name: path.display().to_string(),
            text: fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?,
        };
        let loaded = config::load(Some(&source), &Overlay::default(), env)
            .map_err(|invalid| anyhow!("{invalid}"))?;
        for warning in &loaded.warnings {
            tracing::warn!("{warning}");
        }
        match loaded.plan.server {
            Some(Server::Auth(_) | Server::Proxy(_)) => Ok(loaded.plan),
            None => bail!("{} names no cluster", path.display()),
        }
    }

    fn show(&self, response: &X509svidResponse, once: bool, now: SystemTime) -> anyhow::Result<()> {
        let svid = response.svids.first().context("the answer holds no SVID")?;
        let leaf = Certificate::from_der(&svid.x509_svid).context("the SVID is no certificate")?;
        let left = leaf.not_after().duration_since(now).unwrap_or_default();
        // As it was called: run from a checkout, it is on nobody's PATH.
        let tbot = std::env::args().next().unwrap_or_else(|| "tbot".to_owned());
        let (dir, socket) = (self.dir.display(), self.socket());
        let socket = socket.display();
        let text = format!(
            "\
A workload holds an X.509-SVID.

  SPIFFE ID   {id}
  Expires     {expires} (in {minutes} minutes; the agent renews it before)
  Socket      unix://{socket}

What was made in {dir}:
  cluster/     the cluster's state: authorities, resources, audit log
  resources/   what it was told, as `tctl create` takes it: role, bot, workload identity
  tbot.yaml    the agent's configuration
  agent/       the bot's own identity (keep it secret)
  identity/    an identity output: certificates, key and authorities as files

What to do next{running}:
  {tbot} spiffe-inspect --path unix://{socket}
  SPIFFE_ENDPOINT_SOCKET=unix://{socket} your-workload
  {tbot} cluster --data-dir {dir}/cluster get workload_identity
  edit {dir}/resources/workload-identity.yaml, then
  {tbot} cluster --data-dir {dir}/cluster create -f {dir}/resources/workload-identity.yaml
",
            // What ends with this command would not answer.
            running = if once {
                ", after a start without --once"
            } else {
                ""
            },
            id = svid.spiffe_id,
            expires = rfc3339(leaf.not_after()),
            minutes = left.as_secs() / 60,
        );
        let mut out = std::io::stdout().lock();
        out.write_all(text.as_bytes())?;
        if !once {
            out.write_all(
                b"\nRunning until you press Ctrl-C; a second start goes on from here.\n",
            )?;
        }
        Ok(out.flush()?)
    }
}

/// Asks the Workload API as any workload would, until the agent has joined and answers.
async fn first_svid(socket: &Path, clock: &Clock) -> anyhow::Result<X509svidResponse> {
    loop {
        match ask(socket).await {
            Ok(response) => return Ok(response),
            Err(status) if status.code() == Code::Unavailable => clock.sleep(RETRY).await,
            Err(status) => bail!("the Workload API refused: {}", status.message()),
        }
    }
}

async fn ask(socket: &Path) -> Result<X509svidResponse, Status> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_uri: http::Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(connector)
        .await
        .map_err(|error| Status::unavailable(error.to_string()))?;
    let mut request = Request::new(X509svidRequest {});
    request
        .metadata_mut()
        .insert("workload.spiffe.io", MetadataValue::from_static("true"));
    SpiffeWorkloadApiClient::new(channel)
        .fetch_x509svid(request)
        .await?
        .into_inner()
        .message()
        .await?
        .ok_or_else(|| Status::unavailable("the stream ended early"))
}

/// Writes a file for its owner only, mode 0600 from its first byte on.
fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    let write = || {
        let partial = path.with_extension("partial");
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&partial)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&partial, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
