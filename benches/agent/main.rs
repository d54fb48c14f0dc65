//! What the agent costs, beside yardsticks of the same minute: a bare tonic server on a unix socket
//! that answers with one ready-made message, and the crypto library's own signatures.
//!
//! `make bench` runs it. It starts the release binary with a cluster of its own, as a user would,
//! and prints ratios; numbers alone would only describe the machine.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::print_stdout,
    reason = "a benchmark may end where it stands"
)]

mod bare;
mod caller;
mod issuing;
mod rates;
mod running;
mod streams;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rates::{Ask, measure, measure_processes};
use running::Running;

/// How often the sides of a comparison take turns.
const ROUNDS: usize = 3;
/// How many callers ask at a time on warm connections, and how many connect at a time.
const WARM: usize = 64;
const COLD: usize = 16;
/// How many streams are held open.
const STREAMS: usize = 5000;
/// How often a start is timed.
const STARTS: usize = 7;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let part = arguments.next();
    let mut socket = || PathBuf::from(arguments.next().expect("a socket"));
    match part.as_deref() {
        Some("--bare-server") => runtime.block_on(bare::serve(&socket())),
        Some("--caller") => runtime.block_on(rates::be_a_caller(&socket())),
        _ => runtime.block_on(run()),
    }
}

async fn run() {
    let dir = tempfile::tempdir().expect("a directory");
    let machine = Machine::prepare(dir.path());
    let size = std::fs::metadata(machine.binary).expect("the binary").len();
    row(
        "release binary, stripped",
        &format!("{:.1} MB", megabytes(size)),
        "25 MB",
        "15 MB",
    );

    let _cluster = machine.cluster();
    start(&machine).await;
    let agent = machine.agent();
    caller::first_svid(&machine.socket).await;
    // Reading its files and joining leave memory that the allocator gives back after a moment.
    tokio::time::sleep(Duration::from_secs(2)).await;
    row(
        "idle resident memory, X.509 output + Workload API",
        &format!("{:.1} MiB", agent.resident_kib() / 1024.0),
        "20 MiB",
        "12 MiB",
    );
    compare(&machine).await;
    hold(&machine, &agent).await;
    issue(&machine).await;
}

/// A cluster, and an agent that has joined it before.
struct Machine {
    binary: &'static Path,
    dir: PathBuf,
    socket: PathBuf,
    auth_server: String,
}

impl Machine {
    fn prepare(dir: &Path) -> Self {
        let binary = Path::new(env!("CARGO_BIN_EXE_tbot"));
        let made = Command::new(binary)
            .args(["quickstart", "--once", "--dir"])
            .arg(dir)
            .stdout(Stdio::null())
            .status()
            .expect("quickstart");
        assert!(made.success(), "quickstart failed");
        let config = dir.join("tbot.yaml");
        let text = std::fs::read_to_string(&config).expect("tbot.yaml");
        let auth_server = text
            .lines()
            .find_map(|line| line.strip_prefix("auth_server: "))
            .expect("auth_server")
            .to_owned();
        // The identity stays for `issuing`; the agent is to write SVIDs.
        let (services, _identity) = text
            .split_once("  - type: identity")
            .expect("an identity output");
        let output = format!(
            "  - type: workload-identity-x509\n    selector:\n      name: quickstart\n    \
             destination:\n      type: directory\n      path: {}/svid\n",
            dir.display()
        );
        std::fs::write(&config, services.to_owned() + &output).expect("tbot.yaml");
        Self {
            binary,
            dir: dir.to_owned(),
            socket: dir.join("workload.sock"),
            auth_server,
        }
    }

    fn cluster(&self) -> Running {
        Running::start(
            Command::new(self.binary)
                .args(["cluster", "serve", "--listen", "127.0.0.1:0"])
                .args(["--auth-listen", &self.auth_server, "--data-dir"])
                .arg(self.dir.join("cluster")),
        )
    }

    fn agent(&self) -> Running {
        Running::start(
            Command::new(self.binary)
                .args(["start", "-c"])
                .arg(self.dir.join("tbot.yaml")),
        )
    }

    /// The yardstick, and its socket.
    fn bare(&self) -> (Running, PathBuf) {
        let socket = self.dir.join("bare.sock");
        let program = std::env::current_exe().expect("this program");
        let server = Running::start(Command::new(program).arg("--bare-server").arg(&socket));
        (server, socket)
    }
}

/// From the start of the process to an SVID in the hands of a caller that asks again and again.
async fn start(machine: &Machine) {
    let mut times = Vec::new();
    for _ in 0..STARTS {
        let begun = Instant::now();
        let agent = machine.agent();
        caller::first_svid(&machine.socket).await;
        times.push(begun.elapsed());
        drop(agent);
    }
    times.sort_unstable();
    row(
        "start to first SVID, stored identity",
        &milliseconds(times[STARTS / 2]),
        "45 ms",
        "20 ms",
    );
}

/// Rates and times beside those of the bare server.
async fn compare(machine: &Machine) {
    let (_server, bare) = machine.bare();
    caller::first_svid(&bare).await;
    let sides = [machine.socket.as_path(), bare.as_path()];

    let mut warm = Rates::default();
    let mut cold = Rates::default();
    let mut apart = Rates::default();
    let mut jwt = Rates::default();
    let mut times = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (side, socket) in sides.iter().enumerate() {
            warm.add(side, measure(socket, Ask::Warm, WARM).await.rate);
            cold.add(side, measure(socket, Ask::Cold, COLD).await.rate);
            apart.add(side, measure_processes(socket, COLD));
            jwt.add(side, measure(socket, Ask::Jwt, WARM).await.rate);
            times[side].extend(measure(socket, Ask::Cold, 1).await.times);
        }
    }
    row(
        "FetchX509SVID on a warm connection ÷ bare tonic, 64 callers",
        &warm.ratio(),
        "0.5",
        "0.8",
    );
    row(
        "connect + attest + first SVID ÷ bare reconnect, 16 callers",
        &cold.ratio(),
        "0.3",
        "0.6",
    );
    row(
        "the same, each caller a process of its own",
        &apart.ratio(),
        "0.3",
        "0.6",
    );
    let tail = p99(&mut times[0]).as_secs_f64() / p99(&mut times[1]).as_secs_f64();
    row(
        "p99 of the same, one caller at a time ÷ bare tonic's",
        &format!("{tail:.2}"),
        "4",
        "2",
    );
    row(
        "cached FetchJWTSVID ÷ bare tonic, 64 callers",
        &jwt.ratio(),
        "0.5",
        "0.8",
    );
}

/// What open streams cost, and how fast all of them hear of a renewal.
async fn hold(machine: &Machine, agent: &Running) {
    let before = agent.resident_kib();
    let held = streams::hold(&machine.socket, STREAMS).await;
    let each = (agent.resident_kib() - before) / f64::from(u32::try_from(STREAMS).expect("few"));
    row(
        "resident memory per open stream (5,000 held)",
        &format!("{each:.1} KiB"),
        "27 KiB",
        "12 KiB",
    );
    let spread = streams::fan_out(held, || agent.reload()).await;
    row(
        "renewal to 5,000 streams, first to last push",
        &milliseconds(spread),
        "1 s",
        "250 ms",
    );
}

/// How much of a core's signatures the cluster turns into SVIDs.
async fn issue(machine: &Machine) {
    let mut issued: f64 = 0.0;
    let mut signed: f64 = 0.0;
    for _ in 0..ROUNDS {
        issued = issued.max(issuing::issued(&machine.auth_server, &machine.dir).await);
        signed = signed.max(issuing::signed());
    }
    row(
        "cluster: X.509-SVIDs issued/s ÷ P-256 signatures/s",
        &format!("{:.3}", issued / signed),
        "0.05",
        "0.2",
    );
}

/// Requests per second of either side.
#[derive(Default)]
struct Rates([f64; 2]);

impl Rates {
    /// The best of each side counts: the least disturbed rounds of both.
    fn add(&mut self, side: usize, rate: f64) {
        self.0[side] = self.0[side].max(rate);
    }

    fn ratio(&self) -> String {
        format!("{:.2}", self.0[0] / self.0[1])
    }
}

fn row(what: &str, value: &str, must: &str, goal: &str) {
    println!("{what:<62} {value:>10}   must {must:<7} goal {goal}");
}

fn p99(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

fn milliseconds(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}

#[expect(clippy::cast_precision_loss, reason = "a size to show")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
