//! The `unix` attestor where somebody tries to be somebody else, or to be a burden.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Instant;

use crate::attest_docker::{agent, bridged, resources};
use crate::common::{Cluster, Sandbox, bridge, eventually, identity, repository, skip};

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
    // Its socket is there a moment before anybody listens on it.
    eventually("the huge one listens", || {
        let connected = std::os::unix::net::UnixStream::connect(&socket);
        connected.map(drop).map_err(|error| error.to_string())
    });
    let before = peak(agent.id());
    let start = Instant::now();
    // Where memory is slow to come by, reading it takes longer than a caller is held, and clients ask again.
    let asked = tokio::spawn(async move {
        let mut answer = identity(&socket).await;
        for _ in 0..7 {
            if answer.is_err() {
                answer = identity(&socket).await;
            }
        }
        (answer, Instant::now())
    });
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

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_passed_on_stays_its_makers_and_ends_with_it() {
    if !nix::unistd::geteuid().is_root() {
        return skip("running as another user needs root");
    }
    let sandbox = Sandbox::new();
    let path = "/unix/{{workload.unix.uid}}/{{workload.unix.pid}}";
    let cluster = Cluster::start(&sandbox, &resources(path));
    let _agent = agent(&sandbox, &cluster, "", &[]);
    let near = sandbox.path("near");
    let mut command = sandbox.command("python3");
    command
        .arg(repository().join("tests/support/rights.py"))
        .arg(sandbox.path("run/w.sock"))
        .arg(&near);
    let mut process = sandbox.spawn("rights", command);
    process.wait_for_log("caller ");
    let caller = process.log().trim().rsplit(' ').next().unwrap().to_owned();
    // Whoever passes its connection on lends its identity, as with any other secret that it holds.
    let expected = format!("spiffe://{}/unix/0/{caller}", Cluster::NAME);
    let served = identity(&near.with_extension("1")).await;
    assert_eq!(served.unwrap(), expected);
    let mut kill = sandbox.command("kill");
    assert!(kill.args(["-USR1", &caller]).status().unwrap().success());
    process.wait_for_log("ended");
    let served = identity(&near.with_extension("2")).await;
    assert!(served.is_err(), "{served:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_executes_a_program_of_root_s_is_not_root() {
    if !nix::unistd::geteuid().is_root() {
        return skip("a set-user-ID program of root's needs root");
    }
    let sandbox = Sandbox::new();
    let everybody = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(sandbox.path(""), everybody).unwrap();
    let cluster = Cluster::start(&sandbox, &resources("/unix/{{workload.unix.uid}}"));
    let agent = agent(&sandbox, &cluster, "", &[]);
    let (_bridge, control) = bridged(&sandbox, "control", None);
    let expected = format!("spiffe://{}/unix/0", Cluster::NAME);
    assert_eq!(identity(&control).await.unwrap(), expected);

    let program = sandbox.path("run/elevated");
    std::fs::copy("/usr/bin/sleep", &program).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o4755)).unwrap();
    let near = sandbox.path("run/near.sock");
    let mut command = sandbox.command("python3");
    command
        .arg(repository().join("tests/support/elevated.py"))
        .arg(sandbox.path("run/w.sock"))
        .arg(&near)
        .arg(agent.id().to_string())
        .arg(&program);
    let mut process = sandbox.spawn("elevated", command);
    process.wait_for_log("elevated");
    let answer = identity(&near).await;
    assert!(answer.is_err(), "{answer:?}");
    let log = agent.log();
    assert!(log.contains("it connected as user 65534"), "{log}");
    assert_eq!(identity(&control).await.unwrap(), expected);
}

/// Whether this kernel gives each namespace a highest process ID of its own (Linux 6.14): an older one
/// would change it for the whole machine.
fn has_own_highest_pid() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let version = (numbers.next(), numbers.next());
    matches!(version, (Some(Ok(major)), Some(Ok(minor))) if (major, minor) >= (6, 14))
}

#[test]
fn process_ids_that_come_round_again_are_other_callers() {
    if !nix::unistd::geteuid().is_root() {
        return skip("namespaces need root");
    }
    if !has_own_highest_pid() {
        // The one above makes one ID come round in another way.
        eprintln!("SKIPPED: before Linux 6.14 all namespaces share kernel.pid_max");
        return;
    }
    let sandbox = Sandbox::new();
    let path = "/unix/{{workload.unix.uid}}/{{workload.unix.pid}}";
    let cluster = Cluster::start(&sandbox, &resources(path));
    std::fs::create_dir_all(sandbox.path("run")).unwrap();
    let everybody = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(sandbox.path(""), everybody).unwrap();
    let socket = sandbox.path("run/w.sock");
    let config = cluster.config(&cluster.invite("example", "10m"), "bot")
        + &format!(
            "services:\n- type: workload-identity-api\n  listen: unix://{}\n  \
             selector: {{labels: {{a: [b]}}}}\n",
            socket.display()
        );
    let config = sandbox.write("tbot.yaml", config);
    // Process IDs begin again at 300; the agent's threads have some of them too.
    let script = r#"
        echo 360 > /proc/sys/kernel/pid_max
        "$1" start -c "$2" &
        until [ -S "$3" ]; do sleep 0.05; done
        python3 "$4" "$3" 240
    "#;
    let mut command = sandbox.command("unshare");
    command
        .args(["--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--"])
        .args(["bash", "-euc", script, "bash", env!("CARGO_BIN_EXE_tbot")])
        .arg(config)
        .arg(&socket)
        .arg(repository().join("tests/support/reuse.py"));
    let before = std::fs::read_to_string("/proc/sys/kernel/pid_max").unwrap();
    let mut machine = sandbox.spawn("machine", command);
    machine.wait_for_log("240 callers, ");
    let after = std::fs::read_to_string("/proc/sys/kernel/pid_max").unwrap();
    assert_eq!(after, before, "this machine's own has to stay");
    let log = machine.log();
    let end = log.lines().find(|line| line.starts_with("240 callers, "));
    let numbers: Vec<u32> = end
        .unwrap()
        .split(' ')
        .filter_map(|word| word.parse().ok())
        .collect();
    let [callers, ids, wrong] = numbers[..] else {
        panic!("{log}");
    };
    assert_eq!(wrong, 0, "{log}");
    assert!(ids * 2 < callers, "{ids} IDs for {callers} callers");
}
