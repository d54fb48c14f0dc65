//! Two real Envoys, each a user of its own, with mTLS between them: certificates and validation contexts
//! come from the Workload API's socket, across renewals and a rotation of the cluster's authority.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tbot::crypto::{pem, x509};
use tbot::pb::workload_api::{X509svidRequest, X509svidResponse};

use crate::common::{
    Cluster, Process, Sandbox, Workload, eventually, free_port, issuing, repository, skip, venv,
    wait_until,
};

const IDENTITIES: &str = r#"
kind: workload_identity
version: v1
metadata: {name: envoy}
spec: {spiffe: {id: "/envoy/{{workload.unix.uid}}"}}
"#;

/// The users of the Envoy in front and of the one behind.
const USERS: [(&str, u32); 2] = [("front", 65533), ("back", 65534)];
/// How often SVIDs are renewed.
const RENEWAL: Duration = Duration::from_secs(2);

/// Envoy's program, from the Python environment.
fn program() -> Option<PathBuf> {
    let versions = std::fs::read_dir(venv().join("lib")).ok()?;
    let mut places = versions
        .flatten()
        .map(|version| version.path().join("site-packages/envoy/_bin/envoy"));
    places.find(|path| path.exists())
}

/// Why this cannot be tried here, if so.
fn unavailable() -> Option<&'static str> {
    if !nix::unistd::geteuid().is_root() {
        return Some("running Envoy as another user needs root");
    }
    program()
        .is_none()
        .then_some("Envoy is missing in the Python environment: make setup")
}

/// Everything that runs.
struct Mesh<'a> {
    cluster: Cluster<'a>,
    socket: PathBuf,
    front: u16,
    back: u16,
    processes: Vec<Process>,
}

impl<'a> Mesh<'a> {
    /// `api` is the way that the Envoys ask, `context` the name of the validation context behind.
    fn start(sandbox: &'a Sandbox, api: &str, context: &str) -> Self {
        let everybody = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(sandbox.path(""), everybody).unwrap();
        let mut mesh = Self {
            cluster: Cluster::start(sandbox, &issuing(IDENTITIES)),
            socket: sandbox.path("w.sock"),
            front: free_port(),
            back: free_port(),
            processes: Vec::new(),
        };
        let config = mesh
            .cluster
            .config(&mesh.cluster.invite("example", "10m"), "bot")
            + &format!(
                "services: [{{type: workload-identity-api, listen: \"unix://{}\", selector: {{name: envoy}}, \
                 credential_ttl: 1m, renewal_interval: {}s}}]\n",
                mesh.socket.display(),
                RENEWAL.as_secs()
            );
        let path = sandbox.write("tbot.yaml", config);
        let mut command = sandbox.tbot(["start", "-c"]);
        command.arg(path);
        let mut agent = sandbox.spawn("agent", command);
        agent.wait_for_log("Workload API is listening");
        mesh.processes.push(agent);

        // Where everybody can run it.
        let program = program().unwrap();
        let envoy = sandbox.path("envoy");
        std::fs::copy(program, &envoy).unwrap();
        std::fs::set_permissions(&envoy, std::fs::Permissions::from_mode(0o755)).unwrap();
        for (name, user) in USERS {
            let config = mesh.envoy(sandbox, name, api, context);
            let mut command = sandbox.command("setpriv");
            command
                .args([format!("--reuid={user}"), format!("--regid={user}")])
                .arg("--clear-groups")
                .arg(&envoy)
                .args([
                    "--concurrency",
                    "1",
                    "--disable-hot-restart",
                    "--log-level",
                    "warning",
                    "-c",
                ])
                .arg(config);
            mesh.processes.push(sandbox.spawn(name, command));
        }
        eventually("a request gets through", || {
            for process in &mut mesh.processes {
                process.check_running();
            }
            get(mesh.front, "/")
        });
        mesh
    }

    /// Writes the configuration of one Envoy.
    fn envoy(&self, sandbox: &Sandbox, name: &str, api: &str, context: &str) -> PathBuf {
        let path = repository().join(format!("tests/interop/envoy/{name}.yaml"));
        let text = std::fs::read_to_string(path)
            .unwrap()
            .replace("port_value: FRONT", &format!("port_value: {}", self.front))
            .replace("port_value: BACK", &format!("port_value: {}", self.back))
            .replace("path: SOCKET", &format!("path: {}", self.socket.display()))
            .replace("api_type: API", &format!("api_type: {api}"))
            .replace("name: CONTEXT", &format!("name: \"{context}\""));
        sandbox.write(&format!("{name}.yaml"), text)
    }

    fn rotate(&self, phase: &str) {
        let step = ["rotate", "--type", "spiffe", "--manual", "--phase", phase];
        self.cluster.run(&step);
    }
}

/// One request over a connection of its own; an error is what came instead of 200.
fn get(port: u16, path: &str) -> Result<(), String> {
    let exchange = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    match exchange() {
        Ok(answer) if answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello") => Ok(()),
        Ok(answer) => Err(answer),
        Err(error) => Err(error.to_string()),
    }
}

/// Asks on and on while `work` runs; every request has to succeed.
fn under_load(port: u16, work: impl FnOnce()) -> usize {
    let (stop, count, failed) = (
        AtomicBool::new(false),
        AtomicUsize::new(0),
        Mutex::new(Vec::new()),
    );
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    match get(port, "/") {
                        Ok(()) => drop(count.fetch_add(1, Ordering::Relaxed)),
                        Err(answer) => failed.lock().unwrap().push(answer),
                    }
                }
            });
        }
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        stop.store(true, Ordering::Relaxed);
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    let failed = failed.into_inner().unwrap();
    let count = count.into_inner();
    assert!(
        failed.is_empty(),
        "{} of {}: {}",
        failed.len(),
        count + failed.len(),
        failed[0]
    );
    count
}

/// The serial number of the certificate that the Envoy behind shows.
fn serial(sandbox: &Sandbox, port: u16) -> String {
    let mut openssl = sandbox.command("sh");
    openssl.arg("-c").arg(format!(
        "openssl s_client -connect 127.0.0.1:{port} 2>/dev/null | openssl x509 -noout -serial"
    ));
    let shown = openssl.output().unwrap();
    String::from_utf8_lossy(&shown.stdout).into_owned()
}

/// Whether a client with this SVID is answered by the Envoy behind.
fn is_let_in(sandbox: &Sandbox, port: u16, svid: Option<&Path>) -> bool {
    let mut curl = sandbox.command("curl");
    curl.args(["--silent", "--insecure", "--fail", "--max-time", "10"]);
    if let Some(svid) = svid {
        curl.arg("--cert").arg(svid);
    }
    curl.arg(format!("https://127.0.0.1:{port}/"));
    curl.output().unwrap().status.success()
}

#[test]
fn envoys_lose_no_request_over_renewals_and_a_rotation() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let sandbox = Sandbox::new();
    let mesh = Mesh::start(&sandbox, "GRPC", "ALL");
    let first = serial(&sandbox, mesh.back);
    assert!(first.starts_with("serial="), "{first}");
    let count = under_load(mesh.front, || {
        eventually("the Envoy behind has another certificate", || {
            let now = serial(&sandbox, mesh.back);
            if now == first { Err(now) } else { Ok(()) }
        });
        for phase in ["init", "update_clients", "update_servers", "standby"] {
            mesh.rotate(phase);
            let before = serial(&sandbox, mesh.back);
            // What the phase brought is everywhere when SVIDs have been renewed twice since.
            wait_until(Instant::now() + 2 * RENEWAL + Duration::from_secs(2));
            eventually("the Envoy behind renews", || {
                let now = serial(&sandbox, mesh.back);
                if now == before { Err(now) } else { Ok(()) }
            });
        }
    });
    eprintln!("{count} requests, each with a handshake of its own");
    assert!(count > 100, "only {count} requests");
}

#[test]
fn envoys_refuse_peers_of_another_identity() {
    if let Some(why) = unavailable() {
        return skip(why);
    }
    let sandbox = Sandbox::new();
    let mesh = Mesh::start(&sandbox, "DELTA_GRPC", "spiffe://test.example.org");
    // Whoever answers has another identity than the one expected.
    let refused = get(mesh.front, "/stranger").unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    // Whoever asks has none, or one of the trust domain that is not the one expected.
    assert!(!is_let_in(&sandbox, mesh.back, None));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let got: X509svidResponse = runtime.block_on(async {
        let workload = Workload::connect(&mesh.socket).await;
        workload
            .fetch("FetchX509SVID", &X509svidRequest {})
            .await
            .unwrap()
    });
    let svid = &got.svids[0];
    assert_eq!(svid.spiffe_id, "spiffe://test.example.org/envoy/0");
    assert!(x509::Certificate::from_der(&svid.x509_svid).is_ok());
    let text = pem::encode("CERTIFICATE", &svid.x509_svid)
        + &pem::encode("PRIVATE KEY", &svid.x509_svid_key);
    let path = sandbox.write("stranger.pem", text);
    assert!(!is_let_in(&sandbox, mesh.back, Some(&path)));
    get(mesh.front, "/").expect("the right one is let in still");
}
