//! What HTTP/2 lets a client do to a server, byte by byte: the connection ends, the agent stays as it is.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::common::{Cluster, OutputText as _, Process, RESOURCES, Sandbox, eventually};

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// The headers of a call, without HPACK's tables but for the methods and the scheme.
fn call(path: &str) -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    for (index, value) in [(4_u8, path), (1, "localhost")] {
        block.push(index);
        block.push(u8::try_from(value.len()).unwrap());
        block.extend(value.as_bytes());
    }
    for (name, value) in [
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        ("workload.spiffe.io", "true"),
    ] {
        block.push(0);
        for text in [name, value] {
            block.push(u8::try_from(text.len()).unwrap());
            block.extend(text.as_bytes());
        }
    }
    block
}

const FETCH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";

struct Agent {
    process: Process,
    socket: PathBuf,
}

impl Agent {
    fn start(sandbox: &Sandbox, cluster: &Cluster<'_>) -> Self {
        let socket = sandbox.path("w.sock");
        let token = cluster.invite("example", "5m");
        let service = format!(
            "services:\n- type: workload-identity-api\n  listen: unix://{}\n  selector: {{name: foo}}\n",
            socket.display()
        );
        let config = sandbox.write("tbot.yaml", cluster.config(&token, "bot") + &service);
        let mut command = sandbox.tbot(["start", "-c"]);
        command.arg(config);
        let process = sandbox.spawn("agent", command);
        let agent = Self { process, socket };
        agent.serves(sandbox);
        agent
    }

    fn serves(&self, sandbox: &Sandbox) {
        eventually("the Workload API serves", || {
            let mut command = sandbox.tbot(["spiffe-inspect", "--path"]);
            command.arg(format!("unix://{}", self.socket.display()));
            let text = command.output().unwrap().text();
            if text.contains("/svc/foo") {
                Ok(())
            } else {
                Err(text)
            }
        });
    }

    /// Resident memory in KiB.
    fn memory(&self) -> u64 {
        let status = format!("/proc/{}/status", self.process.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let number = line.unwrap().split_whitespace().nth(1).unwrap();
        number.parse().unwrap()
    }

    fn descriptors(&self) -> usize {
        let directory = format!("/proc/{}/fd", self.process.id());
        std::fs::read_dir(directory).unwrap().count()
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    let limit = Some(Duration::from_secs(30));
    stream.set_read_timeout(limit).unwrap();
    stream.set_write_timeout(limit).unwrap();
    stream
}

/// A connection that has said what every client says first.
fn greeted(path: &Path) -> UnixStream {
    let mut stream = connect(path);
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, &[])).unwrap();
    stream
}

/// Writes until the other end hangs up, `most` times at most; whether it did. Somebody else reads what
/// the server says, so that it has no reason to stop reading.
fn hangs_up(stream: &mut UnixStream, most: usize, mut piece: impl FnMut(u32) -> Vec<u8>) -> bool {
    let mut reader = stream.try_clone().unwrap();
    let reading = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while reader.read(&mut buffer).is_ok_and(|read| read > 0) {}
    });
    let mut number = 1;
    for _ in 0..most {
        if stream.write_all(&piece(number)).is_err() {
            reading.join().unwrap();
            return true;
        }
        number += 2;
    }
    let _closed = stream.shutdown(std::net::Shutdown::Both);
    reading.join().unwrap();
    false
}

/// What the other end still says before it hangs up without being sent anything more; `None` if it does not hang up.
fn last_words(stream: &mut UnixStream) -> Option<Vec<u8>> {
    let mut all = Vec::new();
    match stream.read_to_end(&mut all) {
        Err(error) if error.kind() != std::io::ErrorKind::ConnectionReset => None,
        Ok(_) | Err(_) => Some(all),
    }
}

/// Whether the other end hangs up without being sent anything more.
fn ends(stream: &mut UnixStream) -> bool {
    last_words(stream).is_some()
}

#[test]
fn floods_end_the_connection_and_cost_no_memory() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let agent = Agent::start(&sandbox, &cluster);
    // The first of each costs memory that stays.
    for round in 0..3 {
        let (memory, descriptors) = (agent.memory(), agent.descriptors());
        for _ in 0..10 {
            // Rapid reset (CVE-2023-44487).
            let reset = |stream| {
                let headers = frame(HEADERS, END_HEADERS, stream, &call(FETCH));
                [headers, frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat()
            };
            let mut stream = greeted(&agent.socket);
            let all_at_once: Vec<u8> = (0..1000).flat_map(|n| reset(2 * n + 1)).collect();
            let _written = stream.write_all(&all_at_once);
            assert!(
                hangs_up(&mut stream, 20_000, |n| reset(n + 2000)),
                "streams are reset without an end"
            );

            // Headers that never end (CVE-2024-27316).
            let mut stream = greeted(&agent.socket);
            let first = frame(HEADERS, END_STREAM, 1, &call(FETCH));
            stream.write_all(&first).unwrap();
            let field = [&[0, 3][..], b"x-a", &[100], &[b'a'; 100]].concat();
            let fields = field.repeat(100);
            assert!(
                hangs_up(&mut stream, 100_000, |_| frame(CONTINUATION, 0, 1, &fields)),
                "headers go on without an end"
            );

            // A frame above the maximum that the server told.
            let mut stream = greeted(&agent.socket);
            let large = frame(DATA, 0, 1, &vec![0; 16 * 1024 + 1]);
            let _written = stream.write_all(&large);
            assert!(ends(&mut stream), "too large a frame is taken");

            // Another protocol.
            let mut stream = connect(&agent.socket);
            let _written = stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
            assert!(ends(&mut stream), "HTTP/1 is spoken");
        }
        // Pings whose answers nobody reads: the server stops to read, and keeps none.
        let mut stream = greeted(&agent.socket);
        stream
            .set_write_timeout(Some(Duration::from_millis(500)))
            .unwrap();
        let pings = frame(PING, 0, 0, &[0; 8]).repeat(1000);
        let mut written = 0;
        while written < 64 * 1024 * 1024 && stream.write_all(&pings).is_ok() {
            written += pings.len();
        }
        drop(stream);
        eventually("every connection is gone", || {
            let now = agent.descriptors();
            if now <= descriptors { Ok(()) } else { Err(now) }
        });
        let grown = agent.memory().saturating_sub(memory);
        assert!(round == 0 || grown < 4 * 1024, "grew by {grown} KiB");
    }
    agent.serves(&sandbox);
}

#[test]
fn who_says_nothing_is_hung_up_on() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let agent = Agent::start(&sandbox, &cluster);
    let start = Instant::now();
    let mut silent = connect(&agent.socket);
    let mut slow = connect(&agent.socket);
    slow.write_all(b"PRI * HT").unwrap();
    for stream in [&mut silent, &mut slow] {
        assert_eq!(
            last_words(stream),
            Some(Vec::new()),
            "who does not greet is told nothing"
        );
    }
    let after = start.elapsed();
    assert!(
        (Duration::from_secs(9)..Duration::from_secs(25)).contains(&after),
        "{after:?}"
    );
    // Whoever greeted in time may take its time.
    let mut idle = greeted(&agent.socket);
    idle.set_read_timeout(Some(Duration::from_secs(12)))
        .unwrap();
    assert!(!ends(&mut idle), "an idle connection was closed");
}

#[test]
fn headers_have_a_limit() {
    let sandbox = Sandbox::new();
    let cluster = Cluster::start(&sandbox, RESOURCES);
    let agent = Agent::start(&sandbox, &cluster);
    let mut stream = greeted(&agent.socket);
    // Five times 4 KiB, in frames of a size that is allowed.
    let field = [&[0, 3][..], b"x-a", &[0x7f, 0x81, 0x1f], &[b'a'; 4096]].concat();
    let first = frame(HEADERS, END_STREAM, 1, &call(FETCH));
    stream.write_all(&first).unwrap();
    for number in 0..5 {
        let last = if number == 4 { END_HEADERS } else { 0 };
        stream
            .write_all(&frame(CONTINUATION, last, 1, &field))
            .unwrap();
    }
    stream
        .set_read_timeout(Some(Duration::from_secs(3)))
        .unwrap();
    let mut answer = Vec::new();
    let _read = stream.read_to_end(&mut answer);
    // 431, as a literal or coded: no call was made, so no answer of gRPC is there.
    let text = String::from_utf8_lossy(&answer);
    assert!(!text.contains("application/grpc"), "{text}");
    agent.serves(&sandbox);
}
