//! The `unix` attestor where somebody tries to be somebody else, or to be a burden.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Instant;

use crate::attest_docker::{agent, bridged, resources};
use crate::common::{Cluster, Sandbox, bridge, identity, repository, skip};

/// What may be added to the agent's memory by a program of 900 MB, in KiB.
const MAX_GROWTH: u64 = 24 * 1024;

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_program_is_hashed_in_little_memory_while_others_are_served() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &resources("/unix/{{workload.unix.binary_hash}}"));
    let agent = agent(&sandbox, &cluster, "", &[]);
    let (_small, small) = bridged(&sandbox, "small", None);
    let expected = |program: &std::path::Path| {
        let mut sum = sandbox.command("sha256sum");
        let output = sum.arg(program).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let hash = text.split(' ').next().unwrap().to_owned();
        format!("spiffe://{}/unix/{hash}", Cluster::NAME)
    };
    assert_eq!(identity(&small).await.unwrap(), expected(bridge()));

    // Zeros after the end are nothing to the loader, and nothing on the disk.
    let program = sandbox.path("huge");
    std::fs::copy(bridge(), &program).unwrap();
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&program)
        .unwrap();
    file.set_len(900 * 1000 * 1000).unwrap();
    drop(file);
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let socket = sandbox.path("run/huge.sock");
    let mut command = sandbox.command(&program);
    command.arg(&socket).arg(sandbox.path("run/w.sock"));
    let _huge = sandbox.spawn("huge", command);
    let before = peak(agent.id());
    let start = Instant::now();
    let asked = tokio::spawn(async move { (identity(&socket).await, Instant::now()) });
    assert!(identity(&small).await.is_ok());
    let served = start.elapsed();
    let (answer, answered) = asked.await.unwrap();
    assert_eq!(answer.unwrap(), expected(&program));
    let took = answered - start;
    assert!(
        served < took,
        "the other one waited: {served:?} of {took:?}"
    );
    let grown = peak(agent.id()) - before;
    assert!(grown < MAX_GROWTH, "{grown} KiB more than {before} KiB");
}

/// The most memory that a process ever had, in KiB.
fn peak(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.unwrap()
        .trim()
        .strip_suffix(" kB")
        .unwrap()
        .parse()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_connected_is_attested_whoever_has_the_connection() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &resources("/unix/{{workload.unix.pid}}"));
    let _agent = agent(&sandbox, &cluster, "", &[]);
    let near = sandbox.path("near.sock");
    let mut command = sandbox.command("python3");
    command
        .arg(repository().join("tests/support/successor.py"))
        .arg(sandbox.path("run/w.sock"))
        .arg(&near);
    let mut process = sandbox.spawn("successor", command);
    process.wait_for_log("first ");
    let first = process
        .log()
        .trim()
        .strip_prefix("first ")
        .unwrap()
        .to_owned();
    let expected = format!("spiffe://{}/unix/{first}", Cluster::NAME);
    assert_eq!(identity(&near).await.unwrap(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_takes_the_process_id_of_a_caller_gets_nothing() {
    if !nix::unistd::geteuid().is_root() {
        return skip("choosing process IDs needs root");
    }
    if !std::path::Path::new("/proc/sys/kernel/ns_last_pid").exists() {
        return skip("this kernel does not let process IDs be chosen (CONFIG_CHECKPOINT_RESTORE)");
    }
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, &resources("/unix/{{workload.unix.uid}}"));
    let token = cluster.invite("example", "10m");
    std::fs::create_dir_all(sandbox.path("run")).unwrap();
    let socket = sandbox.path("run/w.sock");
    let config = cluster.config(&token, "bot")
        + &format!(
            "services:\n- type: workload-identity-api\n  listen: unix://{}\n  \
             selector: {{labels: {{a: [b]}}}}\n",
            socket.display()
        );
    let config = sandbox.write("tbot.yaml", config);
    // The agent and its callers in a namespace whose process IDs nobody else takes.
    let script = r#"
        "$1" start -c "$2" & agent=$!
        until [ -S "$3" ]; do sleep 0.05; done
        "$4" run/control.sock "$3" &
        read -r < go
        exec python3 "$5" "$3" run/near.sock $agent
    "#;
    let mut mkfifo = sandbox.command("mkfifo");
    assert!(mkfifo.arg("go").status().unwrap().success());
    let mut command = sandbox.command("unshare");
    command
        .args(["--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"])
        .args(["bash", "-euc", script, "bash", env!("CARGO_BIN_EXE_tbot")])
        .arg(config)
        .arg(&socket)
        .arg(bridge())
        .arg(repository().join("tests/support/successor.py"));
    let mut machine = sandbox.spawn("machine", command);
    machine.wait_for_log("The bot has a fresh identity");
    let expected = format!("spiffe://{}/unix/0", Cluster::NAME);
    let control = identity(&sandbox.path("run/control.sock")).await;
    assert_eq!(control.unwrap(), expected, "the test can tell them apart");

    std::fs::write(sandbox.path("go"), "\n").unwrap();
    machine.wait_for_log("taken over");
    let answer = identity(&sandbox.path("run/near.sock")).await;
    assert!(answer.is_err(), "{answer:?}");
    assert_eq!(
        identity(&sandbox.path("run/control.sock")).await.unwrap(),
        expected
    );
}
