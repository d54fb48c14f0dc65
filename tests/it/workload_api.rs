//! The Workload API over time: what is kept, for whom, and for how long.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use prost::Message;
use tbot::pb::workload_api::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, X509BundlesRequest,
    X509BundlesResponse, X509svidRequest, X509svidResponse,
};
use tokio::runtime::Handle;
use tonic::Code;

use crate::common::{Cluster, OutputText as _, Process, RECORDED, Sandbox, Workload, eventually};

/// A configuration whose Workload API listens in the sandbox; with its socket.
fn configured(sandbox: &Sandbox, cluster: &Cluster<'_>) -> (PathBuf, PathBuf) {
    let socket = sandbox.path("w.sock");
    let config = cluster.config(&cluster.invite("example", "10m"), "bot")
        + &format!(
            "services:\n  - {{type: workload-identity-api, listen: \"unix://{}\", \
             selector: {{name: example-workload-identity}}}}\n",
            socket.display()
        );
    (sandbox.write("tbot.yaml", config), socket)
}

fn started(sandbox: &Sandbox, config: &Path) -> Process {
    let mut command = sandbox.tbot(["start", "-c"]);
    command.arg(config);
    sandbox.spawn("agent", command)
}

/// The status with which another process than this one is turned away; `None` if it is served.
fn status_of_another(sandbox: &Sandbox, socket: &Path) -> Option<String> {
    status_of_anothers(sandbox, socket, "FetchX509SVID", &X509svidRequest {})
}

/// The same for any call.
fn status_of_anothers(
    sandbox: &Sandbox,
    socket: &Path,
    call: &str,
    message: &impl Message,
) -> Option<String> {
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let message = sandbox.write("message", [&[0], &length[..], &message].concat());
    let mut command = sandbox.command("curl");
    let shown = command
        .args(["--silent", "--show-error", "--http2-prior-knowledge"])
        .args([
            "--max-time",
            "12",
            "--dump-header",
            "-",
            "--output",
            "/dev/null",
        ])
        .args(["--header", "content-type: application/grpc"])
        .args(["--header", "te: trailers"])
        .args(["--header", "workload.spiffe.io: true"])
        .arg("--data-binary")
        .arg(format!("@{}", message.display()))
        .arg("--unix-socket")
        .arg(socket)
        .arg(format!("http://localhost/SpiffeWorkloadAPI/{call}"))
        .output()
        .unwrap()
        .text();
    assert!(shown.starts_with("HTTP/2 200"), "{shown}");
    let status = shown
        .lines()
        .find_map(|line| line.strip_prefix("grpc-status: "));
    let status = status.map(|status| status.trim().to_owned());
    status.filter(|status| status != "0")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_workload_keeps_its_svid_while_the_cluster_is_away_and_the_agent_was_killed() {
    let sandbox = Sandbox::new();
    let mut cluster = Cluster::start(&sandbox, RECORDED);
    let (config, socket) = configured(&sandbox, &cluster);
    let mut agent = started(&sandbox, &config);
    agent.wait_for_log("The bot has a fresh identity");
    let workload = Workload::connect(&socket).await;
    let before: X509svidResponse = workload
        .fetch("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    let kept = sandbox.path("bot/.svids");
    let size = eventually("the SVID is stored", || {
        let file = std::fs::metadata(&kept).map_err(|e| e.to_string())?;
        assert_eq!(file.permissions().mode() & 0o7777, 0o600);
        let text = std::fs::read_to_string(&kept).map_err(|e| e.to_string())?;
        text.contains("svc/foo").then_some(text.len()).ok_or(text)
    });
    assert!(size < 16 * 1024, "{size} bytes for one workload");
    cluster.stop();
    agent.signal("KILL");
    agent.wait();

    let mut agent = started(&sandbox, &config);
    agent.wait_for_log("Still valid SVIDs were kept from before the restart");
    let workload = Workload::connect(&socket).await;
    let after: X509svidResponse = workload
        .fetch("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    assert_eq!(after, before);
    let bundles: X509BundlesResponse = workload
        .fetch("FetchX509Bundles", &X509BundlesRequest {})
        .await
        .unwrap();
    assert_eq!(bundles.bundles.len(), 1);
    assert_eq!(bundles.crl, before.crl);
    let bundles: JwtBundlesResponse = workload
        .fetch("FetchJWTBundles", &JwtBundlesRequest {})
        .await
        .unwrap();
    assert_eq!(bundles.bundles.len(), 1);
    let unavailable = Some((Code::Unavailable as i32).to_string());
    assert_eq!(status_of_another(&sandbox, &socket), unavailable);

    cluster.resume();
    eventually("others are served again", || {
        status_of_another(&sandbox, &socket).map_or(Ok(()), Err)
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_kept_for_its_audiences_and_through_an_outage() {
    let sandbox = Sandbox::new();
    let mut cluster = Cluster::start(&sandbox, RECORDED);
    let (config, socket) = configured(&sandbox, &cluster);
    let mut agent = started(&sandbox, &config);
    agent.wait_for_log("The bot has a fresh identity");
    let workload = Workload::connect(&socket).await;
    let token = async |audience: &[&str]| {
        let request = JwtsvidRequest {
            audience: audience.iter().map(|&text| text.to_owned()).collect(),
            spiffe_id: String::new(),
        };
        let answer: JwtsvidResponse = workload.fetch("FetchJWTSVID", &request).await?;
        Ok::<_, tonic::Status>(answer.svids[0].svid.clone())
    };
    let first = token(&["a", "b"]).await.unwrap();
    assert_eq!(token(&["b", "a"]).await.unwrap(), first);
    assert_ne!(token(&["a"]).await.unwrap(), first);
    let issued = |cluster: &Cluster<'_>| cluster.events("spiffe.svid.issued").len();
    assert_eq!(issued(&cluster), 2);
    cluster.stop();
    assert_eq!(token(&["a", "b"]).await.unwrap(), first);
    let refused = token(&["c"]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    cluster.resume();
    assert_eq!(token(&["a", "b"]).await.unwrap(), first);
    assert_eq!(issued(&cluster), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_outlives_the_agent_and_the_cluster_until_it_is_refused() {
    let sandbox = Sandbox::new();
    let mut cluster = Cluster::start(&sandbox, RECORDED);
    let (config, socket) = configured(&sandbox, &cluster);
    let request = |audience: &[&str]| JwtsvidRequest {
        audience: audience.iter().map(|&text| text.to_owned()).collect(),
        spiffe_id: String::new(),
    };
    let token = async |workload: &Workload, audience: &[&str]| {
        let answer: JwtsvidResponse = workload.fetch("FetchJWTSVID", &request(audience)).await?;
        Ok::<_, tonic::Status>(answer.svids[0].svid.clone())
    };
    let mut agent = started(&sandbox, &config);
    agent.wait_for_log("The bot has a fresh identity");
    let workload = Workload::connect(&socket).await;
    let first = token(&workload, &["a", "b"]).await.unwrap();
    let path = sandbox.path("bot/.svids");
    let stored = || {
        let file = std::fs::metadata(&path).map_err(|e| e.to_string())?;
        assert_eq!(file.permissions().mode() & 0o7777, 0o600);
        std::fs::read_to_string(&path).map_err(|e| e.to_string())
    };
    eventually("the token is stored", || {
        let text = stored()?;
        text.contains(&first).then_some(()).ok_or(text)
    });
    agent.signal("KILL");
    agent.wait();
    cluster.stop();

    let mut agent = started(&sandbox, &config);
    agent.wait_for_log("Still valid SVIDs were kept from before the restart");
    let workload = Workload::connect(&socket).await;
    assert_eq!(token(&workload, &["b", "a"]).await.unwrap(), first);
    let refused = token(&workload, &["a"]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "for others: {refused}");
    let both = request(&["a", "b"]);
    let anothers = status_of_anothers(&sandbox, &socket, "FetchJWTSVID", &both);
    assert_eq!(anothers, Some((Code::Unavailable as i32).to_string()));
    let signature = first.rsplit('.').next().unwrap();
    assert!(!agent.log().contains(signature), "no token is logged");

    cluster.resume();
    eventually("others are served again", || {
        let status = status_of_anothers(&sandbox, &socket, "FetchJWTSVID", &both);
        status.map_or(Ok(()), Err)
    });
    cluster.run(&["rm", "workload_identity/example-workload-identity"]);
    // A reload asks about what is still young, too.
    agent.signal("HUP");
    eventually("the token is refused", || {
        let asked = tokio::task::block_in_place(|| {
            Handle::current().block_on(token(&workload, &["a", "b"]))
        });
        match asked {
            Err(status) if status.code() == Code::PermissionDenied => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    eventually("the token is not stored any more", || {
        let text = stored()?;
        (!text.contains(&first)).then_some(()).ok_or(text)
    });
    agent.signal("KILL");
    agent.wait();
    cluster.stop();
    let mut agent = started(&sandbox, &config);
    agent.wait_for_log("Workload API is listening");
    let workload = Workload::connect(&socket).await;
    let refused = token(&workload, &["a", "b"]).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
}

/// A request for X.509-SVIDs as bytes of HTTP/2, as nothing but a program without libraries would
/// send it.
fn raw_request() -> Vec<u8> {
    let frame = |kind: u8, flags: u8, stream: u8, payload: &[u8]| {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&length[1..], &[kind, flags, 0, 0, 0, stream], payload].concat()
    };
    let headers = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/SpiffeWorkloadAPI/FetchX509SVID"),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("workload.spiffe.io", "true"),
    ]
    .map(|(name, value)| {
        let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
        [vec![0], text(name), text(value)].concat()
    });
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &[]),
        frame(1, 4, 1, &headers.concat()),
        frame(0, 1, 1, &[0; 5]),
    ]
    .concat()
}

/// Connects, asks, waits for the first SVID, and becomes `cat`, which prints whatever comes after.
const BECOMES_CAT: &str = "
import os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
connection.sendall(open(sys.argv[2], 'rb').read())
seen = b''
while b'svc/foo' not in seen:
    seen += connection.recv(65536)
os.dup2(connection.fileno(), 0)
os.execv('/bin/cat', ['cat'])
";

#[test]
fn a_program_that_took_the_callers_place_gets_nothing_of_what_was_meant_for_it() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RECORDED);
    let (config, socket) = configured(&sandbox, &cluster);
    let text = std::fs::read_to_string(&config).unwrap();
    let hurried = "workload-identity-api, credential_ttl: 30s, renewal_interval: 3s";
    let config = sandbox.write("tbot.yaml", text.replace("workload-identity-api", hurried));
    let mut agent = started(&sandbox, &config);
    agent.wait_for_log("The bot has a fresh identity");
    let request = sandbox.write("request", raw_request());
    let mut command = sandbox.command("python3");
    command.args(["-c", BECOMES_CAT]).arg(&socket).arg(&request);
    let mut cat = sandbox.spawn("cat", command);
    // It ends because the agent closes the connection rather than write to it.
    assert!(cat.wait().success());
    let got = cat.log();
    assert!(!got.contains("svc/foo"), "{got:?}");
    assert!(
        cluster.events("spiffe.svid.issued").len() > 1,
        "it was renewed"
    );
}

#[test]
fn an_agent_that_is_not_root_tells_what_callers_of_other_users_execute() {
    const AGENT: &str = "--reuid=65534 --regid=65534 --clear-groups";
    const CALLER: &str = "--reuid=1234 --regid=1234 --clear-groups";
    const MAY_TRACE: &str = "--inh-caps=+sys_ptrace --ambient-caps=+sys_ptrace";
    const HIDDEN: &str = "may not look at the programs of other users";
    if !nix::unistd::geteuid().is_root() {
        return crate::common::skip("being another user needs root");
    }
    for capabilities in ["", MAY_TRACE] {
        let sandbox = Sandbox::new();
        let everybody = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(sandbox.path(""), everybody).unwrap();
        let cluster = Cluster::start(&sandbox, RECORDED);
        for name in ["bot", "own"] {
            std::fs::create_dir(sandbox.path(name)).unwrap();
            std::os::unix::fs::chown(sandbox.path(name), Some(65534), Some(65534)).unwrap();
        }
        let (config, _) = configured(&sandbox, &cluster);
        let text = std::fs::read_to_string(&config).unwrap();
        let text = text.replace("w.sock", "own/w.sock").replace(
            "workload-identity-api",
            "workload-identity-api, credential_ttl: 30s, renewal_interval: 3s",
        );
        let config = sandbox.write("tbot.yaml", text);
        let mut command = sandbox.command("setpriv");
        command
            .args(AGENT.split(' ').chain(capabilities.split_whitespace()))
            .arg(env!("CARGO_BIN_EXE_tbot"))
            .args(["start", "-c"])
            .arg(config);
        let mut agent = sandbox.spawn("agent", command);
        agent.wait_for_log("The bot has a fresh identity");
        let told = agent.log().matches(HIDDEN).count();
        assert_eq!(
            told,
            usize::from(capabilities.is_empty()),
            "{}",
            agent.log()
        );
        // What it was given is not for the programs that it starts.
        let status = std::fs::read_to_string(format!("/proc/{}/status", agent.id())).unwrap();
        assert!(status.contains("CapAmb:\t0000000000000000\n"), "{status}");
        let tracing = status.contains("CapEff:\t0000000000080000\n");
        assert_eq!(tracing, !capabilities.is_empty(), "{status}");

        let request = sandbox.write("request", raw_request());
        let mut command = sandbox.command("setpriv");
        command
            .args(CALLER.split(' '))
            .args(["python3", "-c", BECOMES_CAT])
            .arg(sandbox.path("own/w.sock"))
            .arg(&request);
        let mut cat = sandbox.spawn("cat", command);
        assert!(cat.wait().success(), "{}", cat.log());
        assert!(!cat.log().contains("svc/foo"), "{:?}", cat.log());
        assert!(cluster.events("spiffe.svid.issued").len() > 1);
    }
}

/// An agent that has kept this process's SVID, and was killed; with its configuration and its socket.
async fn kept(sandbox: &Sandbox, cluster: &Cluster<'_>) -> (PathBuf, PathBuf) {
    let (config, socket) = configured(sandbox, cluster);
    let mut agent = started(sandbox, &config);
    agent.wait_for_log("The bot has a fresh identity");
    let workload = Workload::connect(&socket).await;
    let svid = workload.first("FetchX509SVID", &X509svidRequest {}).await;
    svid.unwrap();
    eventually("the SVID is stored", || {
        let text = std::fs::read_to_string(sandbox.path("bot/.svids")).unwrap_or_default();
        text.contains("svc/foo").then_some(()).ok_or(text)
    });
    agent.signal("KILL");
    agent.wait();
    (config, socket)
}

#[tokio::test(flavor = "multi_thread")]
async fn svids_of_another_cluster_in_the_same_storage_are_not_served() {
    let (sandbox, elsewhere) = (Sandbox::new(), Sandbox::new());
    let cluster = Cluster::start(&sandbox, RECORDED);
    let (config, socket) = kept(&sandbox, &cluster).await;
    let mut other = Cluster::start_named(&elsewhere, "other.example.org", RECORDED);
    let text = std::fs::read_to_string(&config).unwrap();
    let (_, services) = text.split_once("services:").unwrap();
    let head = other.config(&other.invite("example", "10m"), "bot");
    let storages = [&elsewhere, &sandbox].map(|home| home.path("bot").display().to_string());
    let [there, here] = &storages;
    let head = head.replace(there, here);
    let config = sandbox.write("tbot.yaml", format!("{head}services:{services}"));
    other.stop();
    let mut agent = started(&sandbox, &config);
    agent.wait_for_log("they are of another cluster or another join token");
    let workload = Workload::connect(&socket).await;
    let refused = workload.first("FetchX509SVID", &X509svidRequest {}).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unavailable);
    let refused = workload.first("FetchX509Bundles", &X509BundlesRequest {});
    assert_eq!(refused.await.unwrap_err().code(), Code::Unavailable);

    other.resume();
    agent.wait_for_log("The bot has a fresh identity");
    let workload = Workload::connect(&socket).await;
    let svids: X509svidResponse = workload
        .fetch("FetchX509SVID", &X509svidRequest {})
        .await
        .unwrap();
    let id = &svids.svids[0].spiffe_id;
    assert_eq!(id, "spiffe://other.example.org/svc/foo");
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_svids_of_before_are_told_of_and_made_anew() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RECORDED);
    let (config, socket) = kept(&sandbox, &cluster).await;
    let path = sandbox.path("bot/.svids");
    let whole = std::fs::read(&path).unwrap();
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 1;
    for (what, bytes) in [
        ("torn", whole[..whole.len() / 2].to_vec()),
        ("empty", Vec::new()),
        ("one bit is another", flipped),
        ("somebody else's", b"hello\n".to_vec()),
    ] {
        std::fs::write(&path, &bytes).unwrap();
        let mut agent = started(&sandbox, &config);
        agent.wait_for_log("SVIDs of before the restart are not used; workloads get new ones");
        let workload = Workload::connect(&socket).await;
        let svid = workload.first("FetchX509SVID", &X509svidRequest {}).await;
        assert!(svid.is_ok(), "{what}: {svid:?}");
        eventually("the file is good again", || {
            let text = std::fs::read(&path).unwrap();
            let text = String::from_utf8_lossy(&text).into_owned();
            let good = text.starts_with("tbot-svids-2 ") && text.contains("svc/foo");
            good.then_some(()).ok_or(text)
        });
        agent.signal("KILL");
        agent.wait();
    }
}
