//! Signals, and callers that the attestors cannot tell enough about.

use std::path::Path;
use std::time::{Duration, Instant};

use spiffe::WorkloadApiClient;
use tokio_stream::StreamExt as _;

use super::{FRESH, RESOURCES, start, workload_api};
use crate::common::{Cluster, OutputText as _, Sandbox, eventually, skip};

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_open_streams_and_takes_the_socket_away() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let socket = sandbox.path("w.sock");
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot") + "services:\n" + &workload_api(&socket, "");
    let mut agent = start(&sandbox, "agent", &config);
    agent.wait_for_log(FRESH);
    let client = WorkloadApiClient::connect_to(format!("unix://{}", socket.display()))
        .await
        .unwrap();
    let mut stream = client.stream_x509_contexts().await.unwrap();
    stream.next().await.unwrap().unwrap();
    let asked = Instant::now();
    agent.signal("TERM");
    // The stream is told, not cut off.
    let last = stream.next().await;
    assert!(
        matches!(&last, Some(Err(error)) if error.to_string().contains("stopping")),
        "{last:?}"
    );
    assert_eq!(agent.wait().code(), Some(0));
    assert!(asked.elapsed() < Duration::from_secs(10));
    assert!(!socket.exists());
}

#[test]
fn sighup_renews_at_once() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config =
        cluster.config(&token, "bot") + "outputs:\n" + &super::output(&sandbox.path("out"));
    let mut agent = start(&sandbox, "agent", &config);
    let certificate = || std::fs::read(sandbox.path("out/tlscert"));
    let first = eventually("the output is written", certificate);
    agent.signal("HUP");
    agent.wait_for_log("generation:2");
    eventually("the output is new", || match certificate() {
        Ok(now) if now != first => Ok(()),
        other => Err(format!("{other:?}")),
    });
    agent.check_running();
}

#[test]
fn without_a_system_bus_workloads_have_no_unit_and_all_else_works() {
    if Path::new("/run/systemd/private").exists()
        || Path::new("/run/dbus/system_bus_socket").exists()
    {
        return skip("this machine runs systemd");
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let socket = sandbox.path("w.sock");
    let token = cluster.invite("example", "10m");
    let config = cluster.config(&token, "bot")
        + "services:\n"
        + &workload_api(&socket, ", attestors: {systemd: {enabled: true}}");
    let mut agent = start(&sandbox, "agent", &config);
    agent.wait_for_log(FRESH);
    let inspect = || {
        let mut command = sandbox.tbot(["spiffe-inspect", "--path"]);
        command.arg(format!("unix://{}", socket.display()));
        command.output().unwrap()
    };
    assert!(inspect().success().contains("/svc/foo"));
    agent.wait_for_log("cannot reach systemd");

    // An identity that names the unit is not issued to a caller without one.
    cluster.create(
        "kind: workload_identity\nversion: v1\nmetadata: {name: foo, labels: {env: test}}\n\
         spec: {spiffe: {id: '/svc/{{workload.systemd.service}}'}}\n",
    );
    agent.signal("HUP");
    let refused = eventually("the identity is refused", || {
        let output = inspect();
        if output.status.success() {
            Err(output.text())
        } else {
            Ok(output)
        }
    });
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        refused.text().contains("workload.systemd"),
        "{}",
        refused.text()
    );
    assert!(!refused.text().contains("spiffe://"), "{}", refused.text());
    agent.check_running();
}

#[test]
fn an_agent_leaves_no_core_and_opens_as_many_files_as_it_may() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let config =
        cluster.config(&token, "bot") + "services:\n" + &workload_api(&sandbox.path("w.sock"), "");
    let config = sandbox.write("agent.yaml", config);
    let mut command = sandbox.command("sh");
    command
        .args(["-c", "ulimit -Sn 256 && exec \"$0\" start -c \"$1\""])
        .arg(env!("CARGO_BIN_EXE_tbot"))
        .arg(config);
    let mut agent = sandbox.spawn("agent", command);
    agent.wait_for_log(FRESH);
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", agent.id())).unwrap();
    let limit = |name: &str| -> Vec<String> {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        let words = line[name.len()..].split_whitespace();
        words.take(2).map(str::to_owned).collect()
    };
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    let files = limit("Max open files");
    assert_eq!(files[0], files[1]);
    assert_ne!(files[0], "256");
}
