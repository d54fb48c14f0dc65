//! A metadata service of a cloud: plain HTTP, and only for who sends the header that it wants.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// How it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// As documented.
    Well,
    /// With 500.
    Broken,
    /// Says nothing.
    Silent,
    /// With more than anybody reads.
    Huge,
    /// Somewhere else.
    Redirecting,
}

struct State {
    behaviour: Behaviour,
    header: &'static str,
    documents: Vec<(&'static str, String)>,
}

/// A running service.
pub(crate) struct Metadata {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Metadata {
    /// Serves documents by what their path begins with, for requests with `header` (`name: value`).
    pub(crate) fn start(header: &'static str, documents: Vec<(&'static str, String)>) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(State {
            behaviour: Behaviour::Well,
            header,
            documents,
        }));
        let served = Arc::clone(&state);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let state = Arc::clone(&served);
                std::thread::spawn(move || serve(stream, &state));
            }
        });
        Self { address, state }
    }

    /// `host:port`.
    pub(crate) fn address(&self) -> String {
        self.address.to_string()
    }

    /// Answers like this from now on.
    pub(crate) fn set(&self, behaviour: Behaviour) {
        self.state.lock().unwrap().behaviour = behaviour;
    }
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(length) if length > 0 => request.extend(&buffer[..length]),
            _ => return,
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
    let (status, body, more) = {
        let state = state.lock().unwrap();
        let wanted = |line: &str| line.eq_ignore_ascii_case(state.header);
        let found = state
            .documents
            .iter()
            .find(|(path, _)| target.starts_with(path));
        match (state.behaviour, found) {
            _ if !request.lines().any(wanted) => (403, "a header is missing".to_owned(), ""),
            (Behaviour::Broken, _) => (500, "out of order".to_owned(), ""),
            (Behaviour::Huge, _) => (200, "x".repeat(4 << 20), ""),
            (Behaviour::Redirecting, _) => {
                (302, String::new(), "location: http://127.0.0.1:1/\r\n")
            }
            (Behaviour::Silent, _) => (0, String::new(), ""),
            (Behaviour::Well, Some((_, document))) => (200, document.clone(), ""),
            (Behaviour::Well, None) => (404, "no such document".to_owned(), ""),
        }
    };
    if status == 0 {
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let answer = format!(
        "HTTP/1.1 {status} X\r\n{more}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    drop(stream.write_all(answer.as_bytes()));
}
