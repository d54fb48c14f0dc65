//! Reaching a proxy through a load balancer that ends TLS and does not pass ALPN on: whether one is
//! in front, and the HTTP upgrade that carries a connection through it.
//!
//! Upstream calls this an ALPN connection upgrade (`api/client/alpn_conn_upgrade.go`).

use std::collections::BTreeMap;
use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderMap, Request, StatusCode, header};
use rustls::{AlertDescription, PeerMisbehaved};

use super::ClusterError;
use super::dial::BoxedIo;
use super::ping::with_port;
use super::switch::{NoBody, switch};
use crate::crypto::random;
use crate::env::Env;
use crate::websocket::{End, WebSocket, accept};

/// What the probe offers: every proxy with one shared port knows it.
pub(super) const PROBED: &[u8] = b"teleport-reversetunnel";
/// The variable that decides instead of a probe.
const VARIABLE: &str = "TELEPORT_TLS_ROUTING_CONN_UPGRADE";
/// The kind of tunnel: `alpn`, with pings that keep an idle one open.
const KIND: &str = "alpn-ping";

/// What [`VARIABLE`] says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Overrides(Option<Decisions>);

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Decisions {
    others: bool,
    by_address: BTreeMap<String, bool>,
}

impl Overrides {
    /// Reads the variable: `<bool>` for every address, `<address>=<bool>` for one, separated by `,`
    /// or `;`. What is no such thing is left out with a warning.
    pub(super) fn from_env(env: &Env) -> Self {
        let Some(text) = env.get(VARIABLE) else {
            return Self::default();
        };
        let mut decisions = Decisions::default();
        for part in text.split([',', ';']).map(str::trim) {
            let (address, word) = match part.split_once('=') {
                Some((address, word)) => (Some(address.trim()), word),
                None => (None, part),
            };
            match (address, truth(word)) {
                (Some(address), Some(yes)) => {
                    let address = with_port(&address.to_ascii_lowercase(), "443");
                    decisions.by_address.insert(address, yes);
                }
                (None, Some(yes)) => decisions.others = yes,
                (_, None) if part.is_empty() => {}
                (_, None) => tracing::warn!(
                    part,
                    "{VARIABLE}: neither yes or no nor <address>=yes or no; ignored"
                ),
            }
        }
        Self(Some(decisions))
    }

    /// Whether connections to `address` are to be upgraded; `None` if that is left to a probe.
    pub(super) fn decide(&self, address: &str) -> Option<bool> {
        let decisions = self.0.as_ref()?;
        let given = decisions.by_address.get(&address.to_ascii_lowercase());
        Some(given.copied().unwrap_or(decisions.others))
    }
}

fn truth(word: &str) -> Option<bool> {
    match word.trim().to_ascii_lowercase().as_str() {
        "yes" | "yeah" | "y" | "true" | "1" | "on" => Some(true),
        "no" | "nope" | "n" | "false" | "0" | "off" => Some(false),
        _ => None,
    }
}

/// What a handshake that offered only [`PROBED`] says: whether ALPN does not get through. `None` if
/// it says nothing: the peer cannot be reached, or is not believed.
pub(super) fn hides_alpn(handshake: &Result<Option<Vec<u8>>, ClusterError>) -> Option<bool> {
    match handshake {
        Ok(negotiated) => Some(negotiated.is_none()),
        Err(ClusterError::Tls { source, .. }) => {
            let error = source.get_ref()?.downcast_ref::<rustls::Error>()?;
            let refused = matches!(
                error,
                rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)
                    | rustls::Error::PeerMisbehaved(
                        PeerMisbehaved::SelectedUnofferedApplicationProtocol
                    )
            );
            refused.then_some(true)
        }
        Err(_) => None,
    }
}

/// Asks the proxy behind `io`, which is HTTP to `address`, for a tunnel to its shared port.
pub(super) async fn upgrade(io: BoxedIo, address: &str) -> io::Result<BoxedIo> {
    let key = STANDARD.encode(random::<16>());
    let request = Request::get("/webapi/connectionupgrade")
        .header(header::HOST, address)
        .header(header::CONNECTION, "Upgrade")
        .header(header::UPGRADE, "websocket")
        // Some load balancers take the header above away.
        .header("x-teleport-upgrade", "websocket")
        .header(header::SEC_WEBSOCKET_PROTOCOL, KIND)
        .header(header::SEC_WEBSOCKET_VERSION, "13")
        .header(header::SEC_WEBSOCKET_KEY, &key)
        .body(NoBody::new())
        .map_err(io::Error::other)?;
    let failed = |problem: String| {
        io::Error::other(format!(
            "{address} hides ALPN, and its proxy did not upgrade the connection: {problem}"
        ))
    };
    let (answer, stream) = switch(io, request)
        .await
        .map_err(|source| failed(source.to_string()))?;
    match (answer.status, stream) {
        (StatusCode::SWITCHING_PROTOCOLS, Some(stream)) => {
            check(&answer.headers, &key).map_err(failed)?;
            Ok(Box::pin(WebSocket::new(stream, End::Client)))
        }
        (StatusCode::NOT_FOUND, _) => Err(failed("it is too old to know how".to_owned())),
        (status, _) => Err(failed(format!("it answered {status}"))),
    }
}

/// Whether the answer is that of somebody who read this very request.
fn check(headers: &HeaderMap, key: &str) -> Result<(), String> {
    let get = |name: header::HeaderName| {
        let value = headers.get(name)?;
        value.to_str().ok()
    };
    let websocket = get(header::UPGRADE).is_some_and(|kind| kind.eq_ignore_ascii_case("websocket"));
    if !websocket {
        return Err("it switched to something that is no WebSocket".to_owned());
    }
    if get(header::SEC_WEBSOCKET_PROTOCOL) != Some(KIND) {
        return Err(format!("it does not speak {KIND}"));
    }
    if get(header::SEC_WEBSOCKET_ACCEPT) != Some(accept(key).as_str()) {
        return Err("its answer belongs to another request".to_owned());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[test]
    fn the_variable_decides_for_one_address_or_for_all() {
        for (value, address, decision) in [
            (None, "a:443", None),
            (Some(""), "a:443", None),
            (Some("yes"), "a:443", Some(true)),
            (Some("Off"), "a:443", Some(false)),
            (Some("a:443=1"), "a:443", Some(true)),
            (Some("a=TRUE"), "A:443", Some(true)),
            (Some("a:443=1"), "b:443", Some(false)),
            (Some("yes;a:443=no"), "a:443", Some(false)),
            (Some("a:443=no , yes"), "b:443", Some(true)),
            (Some("maybe"), "a:443", Some(false)),
        ] {
            let env: Env = value.map(|value| (VARIABLE, value)).into_iter().collect();
            let overrides = Overrides::from_env(&env);
            assert_eq!(overrides.decide(address), decision, "{value:?} {address}");
        }
    }

    #[test]
    fn fuzz_answers_to_the_handshake() {
        const KEY: &str = "dGhlIHNhbXBsZSBub25jZQ==";
        let check = bolero::check!().with_type::<Vec<(u8, u8, Vec<u8>)>>();
        check.for_each(|fields| {
            let mut headers = HeaderMap::new();
            for (name, value, other) in fields.iter().take(8) {
                let names = [
                    header::UPGRADE,
                    header::SEC_WEBSOCKET_PROTOCOL,
                    header::SEC_WEBSOCKET_ACCEPT,
                ];
                let right = [b"WebSocket".to_vec(), KIND.into(), accept(KEY).into()];
                let at = usize::from(*name) % names.len();
                let value = if value % 4 == 0 { other } else { &right[at] };
                if let Ok(value) = header::HeaderValue::from_bytes(value) {
                    headers.insert(&names[at], value);
                }
            }
            let agreed = check_and_again(&headers, KEY);
            let accepted = headers.get(header::SEC_WEBSOCKET_ACCEPT);
            let ours = accepted.is_some_and(|accepted| accepted == accept(KEY).as_str());
            assert!(!agreed || (ours && headers.len() == 3), "{headers:?}");
        });
    }

    /// Whether an answer counts; never for another request.
    fn check_and_again(headers: &HeaderMap, key: &str) -> bool {
        assert!(super::check(headers, "another").is_err());
        super::check(headers, key).is_ok()
    }

    #[test]
    fn only_a_peer_without_alpn_needs_an_upgrade() {
        let tls = |error: rustls::Error| {
            Err(ClusterError::Tls {
                address: "a:443".into(),
                source: io::Error::new(io::ErrorKind::InvalidData, error),
            })
        };
        let misbehaved = PeerMisbehaved::SelectedUnofferedApplicationProtocol;
        for (handshake, decision) in [
            (Ok(Some(PROBED.to_vec())), Some(false)),
            (Ok(None), Some(true)),
            (
                tls(rustls::Error::AlertReceived(
                    AlertDescription::NoApplicationProtocol,
                )),
                Some(true),
            ),
            (tls(rustls::Error::PeerMisbehaved(misbehaved)), Some(true)),
            (
                tls(rustls::Error::AlertReceived(
                    AlertDescription::HandshakeFailure,
                )),
                None,
            ),
            (tls(rustls::CertificateError::UnknownIssuer.into()), None),
            (
                Err(ClusterError::Dial {
                    address: "a:443".into(),
                    source: io::ErrorKind::ConnectionRefused.into(),
                }),
                None,
            ),
        ] {
            assert_eq!(hides_alpn(&handshake), decision, "{handshake:?}");
        }
    }

    /// Answers one upgrade with what `answer` makes of the client's key.
    async fn upgraded(answer: impl FnOnce(&str) -> String) -> io::Result<BoxedIo> {
        let (ours, mut theirs) = duplex(4096);
        let serve = async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(theirs.read_u8().await.unwrap());
            }
            let head = String::from_utf8(head).unwrap().to_lowercase();
            assert!(head.starts_with("get /webapi/connectionupgrade http/1.1\r\n"));
            for line in [
                "upgrade: websocket",
                "sec-websocket-version: 13",
                "host: a:443",
            ] {
                assert!(head.contains(&format!("{line}\r\n")), "{head}");
            }
            let key = head.split("sec-websocket-key: ").nth(1).unwrap();
            let key = key.split("\r\n").next().unwrap();
            theirs.write_all(answer(key).as_bytes()).await.unwrap();
            theirs.shutdown().await.unwrap();
        };
        tokio::join!(upgrade(Box::pin(ours), "a:443"), serve).0
    }

    #[tokio::test]
    async fn an_answer_that_is_no_upgrade_says_what_it_is() {
        for (answer, problem) in [
            ("404 Not Found", "too old"),
            ("200 OK", "200"),
            ("403 Forbidden", "403"),
            (
                "101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: alpn",
                "no WebSocket",
            ),
            (
                "101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\
                 Sec-WebSocket-Protocol: alpn-ping\r\nSec-WebSocket-Accept: AAAA",
                "another request",
            ),
            (
                "101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket",
                "alpn-ping",
            ),
        ] {
            let answer = format!("HTTP/1.1 {answer}\r\n\r\n");
            let error = upgraded(|_key| answer.clone()).await.err().unwrap();
            assert!(error.to_string().contains(problem), "{answer}: {error}");
            assert!(error.to_string().contains("a:443"), "{error}");
        }
    }
}
