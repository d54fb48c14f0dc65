//! The Workload API's socket, when something stands in its place.

use std::os::unix::net::{UnixListener, UnixStream};

use super::{FRESH, RESOURCES, start, workload_api};
use crate::common::{Cluster, OutputText as _, Sandbox, eventually};

/// Runs an agent that has to end by itself; returns its exit code and log.
fn ended(sandbox: &Sandbox, config: &str) -> (Option<i32>, String) {
    let mut agent = start(sandbox, "ended", config);
    let status = agent.wait();
    (status.code(), agent.log())
}

#[test]
fn a_socket_in_use_is_left_alone_and_a_stale_one_is_taken_over() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let socket = sandbox.path("w.sock");
    let config = |storage: &str| {
        cluster.config(&cluster.invite("example", "10m"), storage)
            + "services:\n"
            + &workload_api(&socket, "")
    };
    let inspect = || {
        let mut command = sandbox.tbot(["spiffe-inspect", "--path"]);
        command.arg(format!("unix://{}", socket.display()));
        command.output().unwrap()
    };
    let first = config("first");
    let mut agent = start(&sandbox, "agent", &first);
    agent.wait_for_log(FRESH);
    let (code, log) = ended(&sandbox, &config("second"));
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains("w.sock: it is in use by another process: is another tbot running?"),
        "{log}"
    );
    assert!(inspect().success().contains("/svc/foo"));

    // Killed, it cannot take its socket away; the next agent does.
    agent.signal("KILL");
    agent.wait();
    assert!(socket.exists());
    assert!(UnixStream::connect(&socket).is_err());
    let mut agent = start(&sandbox, "again", &first);
    agent.wait_for_log("Removed a socket that nobody answers on");
    eventually("the socket is served again", || {
        let output = inspect();
        if output.status.success() {
            Ok(())
        } else {
            Err(output.text())
        }
    });
}

#[test]
fn what_is_no_socket_is_never_removed() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let token = cluster.invite("example", "10m");
    let socket = sandbox.write("w.sock", "mine");
    let config = cluster.config(&token, "bot") + "services:\n" + &workload_api(&socket, "");
    let (code, log) = ended(&sandbox, &config);
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains(
            "something that is not a socket is there: move it away or choose another path"
        ),
        "{log}"
    );
    assert_eq!(std::fs::read_to_string(&socket).unwrap(), "mine");

    let config = config.replace("w.sock", "no/such/directory/w.sock");
    let (code, log) = ended(&sandbox, &config);
    assert_eq!(code, Some(1), "{log}");
    assert!(
        log.contains("its directory does not exist: create it with `mkdir -p"),
        "{log}"
    );

    // A socket of another program counts as in use, whoever that is.
    std::fs::remove_file(&socket).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    let config = config.replace("no/such/directory/w.sock", "w.sock");
    let (code, log) = ended(&sandbox, &config);
    assert_eq!(code, Some(1), "{log}");
    assert!(UnixStream::connect(&socket).is_ok());
    assert_eq!(cluster.events("bot.join").len(), 0, "the token was spent");
}

#[test]
fn an_address_that_is_none_is_a_usage_error() {
    let sandbox = Sandbox::new();
    for address in [
        "/w.sock",
        "unix://w.sock",
        "tcp://localhost:1",
        "w.sock",
        "",
    ] {
        let mut command = sandbox.tbot(["spiffe-inspect", "--path", address]);
        let refused = command.output().unwrap();
        assert_eq!(refused.status.code(), Some(2), "{}", refused.text());
        assert!(refused.text().contains("write "), "{}", refused.text());
    }
    // A good address where nobody is has the other code.
    let address = format!("unix://{}", sandbox.path("w.sock").display());
    let mut command = sandbox.tbot(["spiffe-inspect", "--path", &address]);
    assert_eq!(command.output().unwrap().status.code(), Some(1));
}
