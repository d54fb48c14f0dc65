//! An OIDC issuer over TLS: its keys rotate, and it can be away, slow, huge, redirecting or another.
//!
//! It answers for any host name that leads to it, so one server stands for every provider. The
//! processes of a test find it by a hosts file of their own.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256, RsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, ServerConnection, StreamOwned};

use super::{OutputText as _, Sandbox};

/// How it answers questions for its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// As it should.
    Well,
    /// With 500.
    Broken,
    /// Says nothing.
    Silent,
    /// With more than anybody reads.
    Huge,
    /// Somewhere else.
    Redirecting,
    /// As another issuer.
    Impostor,
}

/// A key that signs tokens.
pub(crate) struct Key {
    pair: RsaKeyPair,
    kid: String,
}

impl Key {
    pub(crate) fn new(kid: &str) -> Self {
        Self {
            pair: RsaKeyPair::generate(KeySize::Rsa2048).unwrap(),
            kid: kid.to_owned(),
        }
    }

    /// A key set with nothing else.
    pub(crate) fn set(&self) -> String {
        json!({"keys": [self.jwk()]}).to_string()
    }

    /// Its entry of a key set.
    fn jwk(&self) -> Value {
        // PKCS#1: a header of 9 bytes with the sign of the modulus, the modulus, and 65537 at the end.
        let public = self.pair.public_key().as_ref();
        assert_eq!(public.len(), 270, "an RSA key of 2048 bits");
        let encode = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
        let (n, e) = (encode(&public[9..265]), encode(&public[267..]));
        json!({"kty": "RSA", "use": "sig", "alg": "RS256", "kid": self.kid, "n": n, "e": e})
    }

    /// A token with these claims, and `header` beside the key's own.
    pub(crate) fn sign(&self, claims: &Value) -> String {
        self.sign_as(
            &json!({"alg": "RS256", "typ": "JWT", "kid": self.kid}),
            claims,
        )
    }

    /// A token with a header of the caller's.
    pub(crate) fn sign_as(&self, header: &Value, claims: &Value) -> String {
        let signed = unsigned(header, claims);
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair
            .sign(
                &RSA_PKCS1_SHA256,
                &SystemRandom::new(),
                signed.as_bytes(),
                &mut signature,
            )
            .unwrap();
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }

    /// A token that whoever takes the public key for a shared secret would believe.
    pub(crate) fn sign_with_the_public_key(&self, claims: &Value) -> String {
        use aws_lc_rs::hmac;
        let signed = unsigned(&json!({"alg": "HS256", "kid": self.kid}), claims);
        let secret = hmac::Key::new(hmac::HMAC_SHA256, self.jwk().to_string().as_bytes());
        let tag = hmac::sign(&secret, signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(tag.as_ref()))
    }
}

/// The first two parts of a token.
pub(crate) fn unsigned(header: &Value, claims: &Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    format!("{}.{}", part(header), part(claims))
}

/// Seconds since 1970, `by` seconds from now.
pub(crate) fn time(by: i64) -> i64 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    i64::try_from(now).unwrap() + by
}

struct State {
    mood: Mood,
    keys: Vec<Value>,
    /// What services that hand out tokens are asked, as request line and bearer.
    questions: Vec<(String, String)>,
    /// What they answer.
    answer: (u16, String),
    asked: usize,
}

/// A running issuer.
pub(crate) struct Oidc {
    address: Ipv4Addr,
    authority: PathBuf,
    hosts: PathBuf,
    state: Arc<Mutex<State>>,
    /// The key in use.
    pub(crate) key: Key,
}

impl Oidc {
    /// Serves at port 443 of an address of its own, for the host `names`.
    pub(crate) fn start(sandbox: &Sandbox, names: &[&str]) -> Self {
        let (address, listener) = (0..100)
            .find_map(|_| {
                let [a, b, c]: [u8; 3] = tbot::crypto::random();
                let address = Ipv4Addr::new(127, a, b.max(1), c.clamp(1, 254));
                Some((address, TcpListener::bind((address, 443)).ok()?))
            })
            .expect("port 443 of a loopback address: tests run as root");
        let authority = sandbox.path("oidc.crt");
        let config = Arc::new(tls(sandbox, address, names, &authority));
        let lines: Vec<_> = names
            .iter()
            .map(|name| format!("{address} {name}\n"))
            .collect();
        let hosts = sandbox.write("hosts", format!("127.0.0.1 localhost\n{}", lines.concat()));
        let key = Key::new("first");
        let state = Arc::new(Mutex::new(State {
            mood: Mood::Well,
            keys: vec![key.jwk()],
            questions: Vec::new(),
            answer: (200, String::new()),
            asked: 0,
        }));
        let served = Arc::clone(&state);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (config, state) = (Arc::clone(&config), Arc::clone(&served));
                std::thread::spawn(move || serve(stream, config, &state));
            }
        });
        Self {
            address,
            authority,
            hosts,
            state,
            key,
        }
    }

    /// Who vouches for its web server, for `SSL_CERT_FILE`.
    pub(crate) fn authority(&self) -> &std::path::Path {
        &self.authority
    }

    /// A hosts file that leads its names to it.
    pub(crate) fn hosts(&self) -> PathBuf {
        self.hosts.clone()
    }

    /// Where it hands out tokens.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("https://{}{path}", self.address)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Answers like this from now on.
    pub(crate) fn set(&self, mood: Mood) {
        self.state().mood = mood;
    }

    /// Signs with a new key from now on; the old one is no longer published.
    pub(crate) fn rotate(&mut self) {
        self.key = Key::new("second");
        self.state().keys = vec![self.key.jwk()];
    }

    /// What it publishes, for `static_jwks`.
    pub(crate) fn key_set(&self) -> String {
        json!({"keys": self.state().keys}).to_string()
    }

    /// What services that hand out tokens answer from now on.
    pub(crate) fn hand_out(&self, status: u16, answer: impl Into<String>) {
        self.state().answer = (status, answer.into());
    }

    /// What they were asked since, as request line and bearer.
    pub(crate) fn questions(&self) -> Vec<(String, String)> {
        std::mem::take(&mut self.state().questions)
    }

    /// How often it was asked for its document or keys since.
    pub(crate) fn asked(&self) -> usize {
        std::mem::take(&mut self.state().asked)
    }
}

fn tls(
    sandbox: &Sandbox,
    address: Ipv4Addr,
    names: &[&str],
    certificate: &std::path::Path,
) -> ServerConfig {
    let key = sandbox.path("oidc.key");
    let names: Vec<_> = names.iter().map(|name| format!(",DNS:{name}")).collect();
    let mut openssl = sandbox.command("openssl");
    openssl
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
        ])
        .args(["-nodes", "-days", "2", "-subj", "/CN=issuer"])
        .args(["-addext", "basicConstraints=critical,CA:FALSE", "-addext"])
        .arg(format!("subjectAltName=IP:{address}{}", names.concat()))
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(certificate);
    openssl.output().unwrap().success();
    ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_file(certificate).unwrap()],
            PrivateKeyDer::from_pem_file(&key).unwrap(),
        )
        .unwrap()
}

/// One request; whoever asks wrongly or goes away gets nothing.
fn serve(stream: TcpStream, config: Arc<ServerConfig>, state: &Mutex<State>) {
    let mut stream = StreamOwned::new(ServerConnection::new(config).unwrap(), stream);
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(length) if length > 0 => request.extend(&buffer[..length]),
            _ => return,
        }
    }
    // Hanging up before all is read would take the answer away from who asks.
    let head = request.windows(4).position(|end| end == b"\r\n\r\n");
    let length = String::from_utf8_lossy(&request)
        .to_lowercase()
        .split_once("content-length: ")
        .and_then(|(_, rest)| rest.lines().next()?.trim().parse::<usize>().ok());
    let whole = head.unwrap_or_default() + 4 + length.unwrap_or_default();
    while request.len() < whole {
        match stream.read(&mut buffer) {
            Ok(length) if length > 0 => request.extend(&buffer[..length]),
            _ => return,
        }
    }
    let request = String::from_utf8_lossy(&request).into_owned();
    let mood = state.lock().unwrap().mood;
    let asks_for_keys = request.starts_with("GET ") && !request.contains("audience=");
    if mood == Mood::Silent && asks_for_keys {
        std::thread::sleep(Duration::from_secs(60));
        return;
    }
    let answer = answer(&mut state.lock().unwrap(), &request);
    drop(stream.write_all(answer.as_bytes()));
    stream.conn.send_close_notify();
    drop(stream.flush());
}

fn answer(state: &mut State, request: &str) -> String {
    let header = |wanted: &str| {
        request.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            let found = name.eq_ignore_ascii_case(wanted);
            found.then(|| value.trim().to_owned())
        })
    };
    let line = request.lines().next().unwrap_or_default();
    let path = line.split(' ').nth(1).unwrap_or_default();
    let host = header("host").unwrap_or_default();
    let document = path.strip_suffix("/.well-known/openid-configuration");
    if document.is_none() && path != "/keys" {
        let bearer = header("authorization").unwrap_or_default();
        state.questions.push((line.to_owned(), bearer));
        return response(state.answer.0, &state.answer.1, "");
    }
    state.asked += 1;
    match (state.mood, document) {
        (Mood::Broken, _) => response(500, "", ""),
        (Mood::Huge, _) => response(200, &" ".repeat(4 << 20), ""),
        (Mood::Redirecting, Some(path)) => {
            let to = format!("location: https://{host}{path}/.well-known/openid-configuration\r\n");
            response(302, "", &to)
        }
        (mood, Some(path)) => {
            // Some providers end their name with a slash.
            let slash = if ["login.app.env0.com", "sts.windows.net"].contains(&host.as_str()) {
                "/"
            } else {
                ""
            };
            let issuer = match mood {
                Mood::Impostor => "https://evil.example.org".to_owned(),
                _ => format!("https://{host}{path}{slash}"),
            };
            let document = json!({"issuer": issuer, "jwks_uri": format!("https://{host}/keys")});
            response(200, &document.to_string(), "")
        }
        (_, None) => response(200, &json!({"keys": state.keys}).to_string(), ""),
    }
}

fn response(status: u16, body: &str, more: &str) -> String {
    format!(
        "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\n{more}content-length: {}\r\n\r\n{body}",
        body.len()
    )
}
