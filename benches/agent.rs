//! What the agent costs, beside a yardstick of the same minute: a bare tonic server on a unix socket
//! that answers `FetchX509SVID` with one ready-made message.
//!
//! `make bench` runs it. It starts the release binary with a cluster of its own, as a user would,
//! and prints ratios; numbers alone would only describe the machine.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a benchmark may end where it stands"
)]

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::stream::{self, Stream};
use hyper_util::rt::TokioIo;
use tbot::pb::workload_api::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use tbot::pb::workload_api::spiffe_workload_api_server::{
    SpiffeWorkloadApi, SpiffeWorkloadApiServer,
};
use tbot::pb::workload_api::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse, X509BundlesRequest, X509BundlesResponse, X509svid, X509svidRequest,
    X509svidResponse,
};
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status};
use tower::service_fn;

/// How long each side of a comparison runs.
const SPAN: Duration = Duration::from_secs(2);
/// How often the sides take turns.
const ROUNDS: usize = 3;

fn main() {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some("--bare-server") {
        let socket = arguments.next().expect("a socket");
        return runtime().block_on(bare_server(Path::new(&socket)));
    }
    runtime().block_on(run());
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Runtime::new().expect("a runtime")
}

async fn run() {
    let dir = tempfile::tempdir().expect("a directory");
    let binary = Path::new(env!("CARGO_BIN_EXE_tbot"));
    let size = std::fs::metadata(binary).expect("the binary").len();
    row(
        "release binary, stripped",
        &format!("{:.1} MB", megabytes(size)),
        "25 MB",
        "15 MB",
    );

    let made = Command::new(binary)
        .args(["quickstart", "--once", "--dir"])
        .arg(dir.path())
        .stdout(Stdio::null())
        .status()
        .expect("quickstart");
    assert!(made.success(), "quickstart failed");
    let _cluster = Running::start(
        Command::new(binary)
            .args([
                "cluster",
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--auth-listen",
            ])
            .arg(auth_server(dir.path()))
            .arg("--data-dir")
            .arg(dir.path().join("cluster")),
    );
    let socket = dir.path().join("workload.sock");
    let start = || {
        Running::start(
            Command::new(binary)
                .arg("start")
                .arg("-c")
                .arg(dir.path().join("tbot.yaml")),
        )
    };

    let mut starts = Vec::new();
    for _ in 0..7 {
        let begun = Instant::now();
        let agent = start();
        first_svid(&socket).await;
        starts.push(begun.elapsed());
        drop(agent);
    }
    starts.sort_unstable();
    let median = starts[starts.len() / 2];
    row(
        "start to first SVID, stored identity",
        &format!("{:.0} ms", median.as_secs_f64() * 1e3),
        "45 ms",
        "20 ms",
    );

    let agent = start();
    first_svid(&socket).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    row(
        "idle resident memory, identity output + Workload API",
        &format!("{:.1} MiB", agent.resident_kib() / 1024.0),
        "20 MiB",
        "12 MiB",
    );

    let bare_socket = dir.path().join("bare.sock");
    let _bare = Running::start(
        Command::new(std::env::current_exe().expect("this program"))
            .arg("--bare-server")
            .arg(&bare_socket),
    );
    first_svid(&bare_socket).await;
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(warm(&socket).await);
        bare.push(warm(&bare_socket).await);
    }
    row(
        "FetchX509SVID on a warm connection ÷ bare tonic",
        &ratio(&ours, &bare),
        "0.5",
        "0.8",
    );
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    let (mut our_times, mut bare_times) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ours.push(cold(&socket, &mut our_times).await);
        bare.push(cold(&bare_socket, &mut bare_times).await);
    }
    row(
        "connect + attest + first SVID ÷ bare tonic reconnect",
        &ratio(&ours, &bare),
        "0.3",
        "0.6",
    );
    let tail = p99(&mut our_times).as_secs_f64() / p99(&mut bare_times).as_secs_f64();
    row(
        "p99 of the same ÷ bare tonic's",
        &format!("{tail:.2}"),
        "4",
        "2",
    );

    let before = agent.resident_kib();
    let held = hold(&socket, 1000).await;
    let each = (agent.resident_kib() - before) / 1000.0;
    row(
        "resident memory per open stream (1,000 held)",
        &format!("{each:.1} KiB"),
        "27 KiB",
        "12 KiB",
    );
    drop(held);
}

fn row(what: &str, value: &str, must: &str, goal: &str) {
    println!("{what:<55} {value:>10}   must {must:<7} goal {goal}");
}

#[expect(clippy::cast_precision_loss, reason = "a size to show")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// The best of each side: the least disturbed rounds of both.
fn ratio(ours: &[f64], bare: &[f64]) -> String {
    let best = |rates: &[f64]| rates.iter().copied().fold(0.0, f64::max);
    format!("{:.2}", best(ours) / best(bare))
}

fn p99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// The auth address that `tbot quickstart` chose.
fn auth_server(dir: &Path) -> String {
    let text = std::fs::read_to_string(dir.join("tbot.yaml")).expect("tbot.yaml");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("auth_server: "));
    line.expect("auth_server").to_owned()
}

struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> Self {
        Self(
            command
                .stderr(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .expect("a process"),
        )
    }

    fn resident_kib(&self) -> f64 {
        let status =
            std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).expect("status");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .expect("VmRSS");
        line.trim()
            .trim_end_matches(" kB")
            .parse()
            .expect("a number")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

async fn connect(
    socket: &Path,
) -> Result<SpiffeWorkloadApiClient<Channel>, tonic::transport::Error> {
    let socket: PathBuf = socket.to_owned();
    let channel = Endpoint::from_static("http://localhost")
        .connect_with_connector(service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await?;
    Ok(SpiffeWorkloadApiClient::new(channel))
}

async fn fetch(
    client: &mut SpiffeWorkloadApiClient<Channel>,
) -> Result<(X509svidResponse, tonic::Streaming<X509svidResponse>), Status> {
    let mut request = Request::new(X509svidRequest {});
    request.metadata_mut().insert(
        "workload.spiffe.io",
        tonic::metadata::MetadataValue::from_static("true"),
    );
    let mut stream = client.fetch_x509svid(request).await?.into_inner();
    let message = stream
        .message()
        .await?
        .ok_or_else(|| Status::internal("no message"))?;
    Ok((message, stream))
}

/// Asks until there is an answer.
async fn first_svid(socket: &Path) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Ok(mut client) = connect(socket).await
            && fetch(&mut client).await.is_ok()
        {
            return;
        }
        assert!(Instant::now() < deadline, "no SVID at {}", socket.display());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Requests per second, one after the other, on one connection.
async fn warm(socket: &Path) -> f64 {
    let mut client = connect(socket).await.expect("a connection");
    rate(async || drop(fetch(&mut client).await.expect("an SVID"))).await
}

/// Requests per second, each on a connection of its own.
async fn cold(socket: &Path, times: &mut Vec<Duration>) -> f64 {
    rate(async || {
        let begun = Instant::now();
        let mut client = connect(socket).await.expect("a connection");
        drop(fetch(&mut client).await.expect("an SVID"));
        times.push(begun.elapsed());
    })
    .await
}

async fn rate(mut once: impl AsyncFnMut()) -> f64 {
    let begun = Instant::now();
    let mut count = 0_u32;
    while begun.elapsed() < SPAN {
        once().await;
        count += 1;
    }
    f64::from(count) / begun.elapsed().as_secs_f64()
}

/// Opens streams and keeps them, 500 to a connection.
async fn hold(
    socket: &Path,
    count: usize,
) -> Vec<(
    SpiffeWorkloadApiClient<Channel>,
    Vec<tonic::Streaming<X509svidResponse>>,
)> {
    let mut held = Vec::new();
    for _ in 0..count / 500 {
        let mut client = connect(socket).await.expect("a connection");
        let mut streams = Vec::new();
        for _ in 0..500 {
            streams.push(fetch(&mut client).await.expect("an SVID").1);
        }
        held.push((client, streams));
    }
    held
}

/// The yardstick: no attestation, no cache, one message of a usual size.
struct Bare(X509svidResponse);

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SpiffeWorkloadApi for Bare {
    type FetchX509SVIDStream = Messages<X509svidResponse>;
    type FetchX509BundlesStream = Messages<X509BundlesResponse>;
    type FetchJWTBundlesStream = Messages<JwtBundlesResponse>;

    async fn fetch_x509svid(
        &self,
        _request: Request<X509svidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        let message = self.0.clone();
        let first = stream::once(async move { Ok(message) });
        let stream = futures_util::StreamExt::chain(first, stream::pending());
        Ok(Response::new(Box::pin(stream)))
    }

    async fn fetch_x509_bundles(
        &self,
        _request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_jwtsvid(
        &self,
        _request: Request<JwtsvidRequest>,
    ) -> Result<Response<JwtsvidResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn fetch_jwt_bundles(
        &self,
        _request: Request<JwtBundlesRequest>,
    ) -> Result<Response<Self::FetchJWTBundlesStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn validate_jwtsvid(
        &self,
        _request: Request<ValidateJwtsvidRequest>,
    ) -> Result<Response<ValidateJwtsvidResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

async fn bare_server(socket: &Path) {
    let message = X509svidResponse {
        svids: vec![X509svid {
            spiffe_id: "spiffe://quickstart.local/svc/hello".to_owned(),
            x509_svid: vec![0; 600].into(),
            x509_svid_key: vec![0; 138].into(),
            bundle: vec![0; 560].into(),
            hint: String::new(),
        }],
        crl: vec![vec![0; 280].into()],
        ..X509svidResponse::default()
    };
    let listener = UnixListener::bind(socket).expect("a socket");
    Server::builder()
        .add_service(SpiffeWorkloadApiServer::new(Bare(message)))
        .serve_with_incoming(UnixListenerStream::new(listener))
        .await
        .expect("serving");
}
