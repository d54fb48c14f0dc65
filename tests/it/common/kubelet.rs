//! A kubelet that answers lists of pods over TLS.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::{Sandbox, SelfSigned};

/// What it is asked and what it answers.
#[derive(Debug, Default)]
struct State {
    /// Answers to come: status line and body. The last one stays.
    answers: VecDeque<(String, String)>,
    /// The `authorization` of every request.
    tokens: Vec<Option<String>>,
}

/// Serves until its task ends with the test's runtime.
pub(crate) struct Kubelet {
    port: u16,
    authority: PathBuf,
    state: Arc<Mutex<State>>,
}

impl Kubelet {
    /// Serves on a port of its own whoever asks.
    pub(crate) async fn start(sandbox: &Sandbox) -> Self {
        Self::start_for(sandbox, None).await
    }

    /// Serves only those who show a certificate of an authority, if there is one.
    pub(crate) async fn start_for(sandbox: &Sandbox, clients: Option<&Path>) -> Self {
        let tls = SelfSigned::new(sandbox, "kubelet", "DNS:localhost");
        let acceptor = tls.acceptor(clients);
        let strict = clients.is_some();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let served = Arc::clone(&state);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (acceptor, state) = (acceptor.clone(), Arc::clone(&served));
                tokio::spawn(async move {
                    let mut stream = acceptor.accept(stream).await?;
                    let mut request = vec![0; 16 * 1024];
                    let length = stream.read(&mut request).await?;
                    let request = String::from_utf8_lossy(&request[..length]).into_owned();
                    let known = stream.get_ref().1.peer_certificates().is_some();
                    let answer = if strict && !known {
                        "HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n".to_owned()
                    } else {
                        answer(&mut state.lock().unwrap(), &request)
                    };
                    stream.write_all(answer.as_bytes()).await?;
                    stream.shutdown().await
                });
            }
        });
        Self {
            port,
            authority: tls.certificate,
            state,
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn authority(&self) -> &Path {
        &self.authority
    }

    /// What it answers from now on, one after the other, the last one for ever.
    pub(crate) fn answer(&self, answers: &[(&str, &str)]) {
        let answers = answers.iter();
        self.state.lock().unwrap().answers = answers
            .map(|(status, body)| ((*status).to_owned(), (*body).to_owned()))
            .collect();
    }

    /// The tokens of the requests since this was last asked.
    pub(crate) fn tokens(&self) -> Vec<Option<String>> {
        std::mem::take(&mut self.state.lock().unwrap().tokens)
    }
}

fn answer(state: &mut State, request: &str) -> String {
    assert!(request.starts_with("GET /pods HTTP/1.1\r\n"), "{request}");
    let token = request.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("authorization")
            .then(|| value.trim().to_owned())
    });
    state.tokens.push(token);
    let last = state.answers.len() == 1;
    let next = if last {
        state.answers.front().cloned()
    } else {
        state.answers.pop_front()
    };
    let (status, body) = next.expect("an answer");
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
}
