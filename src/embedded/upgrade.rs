//! `/webapi/connectionupgrade`: a tunnel to the shared port inside of HTTP, for agents behind a load
//! balancer that ends TLS and hides ALPN (upstream `lib/web/conn_upgrade.go`).

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONNECTION, HeaderName, SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, UPGRADE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;

use crate::websocket::{End, WebSocket, accept};

const PATH: &str = "/webapi/connectionupgrade";
/// What else may say that a WebSocket is wanted: load balancers take `Upgrade` away.
const OWN_HEADER: HeaderName = HeaderName::from_static("x-teleport-upgrade");
/// The kinds of tunnel, without and with pings.
const KINDS: [(&str, bool); 2] = [("alpn", false), ("alpn-ping", true)];
/// Between two pings; load balancers close what is idle for a minute.
const PING: Duration = Duration::from_secs(30);

/// What is inside of a tunnel.
pub(super) type Tunnel = WebSocket<TokioIo<Upgraded>>;

/// Where a request leaves its tunnel for the task that serves its connection.
#[derive(Debug, Clone, Default)]
pub(super) struct Slot(Arc<Mutex<Option<(OnUpgrade, bool)>>>);

impl Slot {
    /// Answers a request for a tunnel; `None` for any other request.
    pub(super) fn answer<B>(&self, request: &mut Request<B>) -> Option<Response<Full<Bytes>>> {
        let path = request.uri().path();
        if path.strip_prefix("/v1").unwrap_or(path) != PATH {
            return None;
        }
        let agreed = match request.method() {
            &Method::GET => agree(request.headers()),
            _ => Err(StatusCode::METHOD_NOT_ALLOWED),
        };
        let mut response = Response::new(Full::default());
        match agreed {
            Ok(Agreed {
                accept,
                kind,
                pings,
            }) => {
                let upgrade = hyper::upgrade::on(request);
                *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((upgrade, pings));
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                let headers = response.headers_mut();
                headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
                headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
                headers.insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(kind));
                headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
            }
            Err(status) => *response.status_mut() = status,
        }
        Some(response)
    }

    /// The tunnel that was agreed upon, if any, once the connection is not HTTP any more.
    pub(super) async fn take(&self) -> io::Result<Option<Tunnel>> {
        let agreed = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((upgrade, pings)) = agreed else {
            return Ok(None);
        };
        let stream = TokioIo::new(upgrade.await.map_err(io::Error::other)?);
        let tunnel = WebSocket::new(stream, End::Server);
        Ok(Some(if pings {
            tunnel.with_pings(PING)
        } else {
            tunnel
        }))
    }
}

struct Agreed {
    accept: HeaderValue,
    kind: &'static str,
    pings: bool,
}

/// What both sides can do; upstream answers 404 to kinds that it does not know.
fn agree(headers: &HeaderMap) -> Result<Agreed, StatusCode> {
    let words = |name: &HeaderName| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map(str::trim)
            .collect::<Vec<_>>()
    };
    let wanted = [UPGRADE, OWN_HEADER]
        .iter()
        .flat_map(words)
        .any(|word| word.eq_ignore_ascii_case("websocket"));
    if !wanted {
        return Err(StatusCode::NOT_FOUND);
    }
    let switches = words(&CONNECTION)
        .iter()
        .any(|word| word.eq_ignore_ascii_case("upgrade"));
    let current = words(&header::SEC_WEBSOCKET_VERSION) == ["13"];
    let key = headers
        .get(SEC_WEBSOCKET_KEY)
        .and_then(|key| key.to_str().ok());
    let offered = words(&SEC_WEBSOCKET_PROTOCOL);
    let kind = offered
        .iter()
        .find_map(|offered| KINDS.iter().find(|(kind, _)| kind == offered));
    match (key, kind) {
        (Some(key), Some((kind, pings))) if switches && current => Ok(Agreed {
            accept: HeaderValue::from_str(&accept(key))
                .map_err(|_source| StatusCode::BAD_REQUEST)?,
            kind,
            pings: *pings,
        }),
        _ => Err(StatusCode::BAD_REQUEST),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(change: impl FnOnce(&mut Request<()>)) -> Request<()> {
        let mut request = Request::get(PATH)
            .header("connection", "Upgrade")
            .header("upgrade", "websocket")
            .header("sec-websocket-version", "13")
            .header("sec-websocket-key", "dGhlIHNhbXBsZSBub25jZQ==")
            .header("sec-websocket-protocol", "alpn-ping")
            .body(())
            .unwrap();
        change(&mut request);
        request
    }

    fn without(name: &'static str) -> Request<()> {
        request(|request| drop(request.headers_mut().remove(name)))
    }

    fn with(name: &'static str, value: &'static str) -> Request<()> {
        request(|request| {
            let value = HeaderValue::from_static(value);
            request.headers_mut().insert(name, value);
        })
    }

    #[test]
    fn fuzz_requests_to_switch() {
        let check = bolero::check!().with_type::<Vec<(u8, Vec<u8>)>>();
        check.for_each(|changes| {
            let mut request = request(|_| {});
            let names: Vec<_> = request.headers().keys().cloned().collect();
            for (at, value) in changes.iter().take(6) {
                let name = &names[usize::from(*at) % names.len()];
                match HeaderValue::from_bytes(value) {
                    Ok(value) => drop(request.headers_mut().append(name, value)),
                    Err(_) => drop(request.headers_mut().remove(name)),
                }
            }
            let headers = request.headers();
            if let Ok(agreed) = agree(headers) {
                assert!(headers.contains_key(SEC_WEBSOCKET_KEY));
                assert!(KINDS.iter().any(|(kind, _)| *kind == agreed.kind));
                // Base64 of a SHA-1.
                assert_eq!(agreed.accept.len(), 28);
            }
        });
    }

    #[test]
    fn only_a_complete_request_is_agreed_to() {
        for (mut request, status) in [
            (request(|_| {}), 101),
            (
                request(|r| *r.uri_mut() = "/v1/webapi/connectionupgrade".parse().unwrap()),
                101,
            ),
            (with("sec-websocket-protocol", "x, alpn"), 101),
            (request(|r| *r.method_mut() = Method::POST), 405),
            (without("upgrade"), 404),
            (with("upgrade", "alpn"), 404),
            (without("connection"), 400),
            (without("sec-websocket-key"), 400),
            (with("sec-websocket-version", "8"), 400),
            (with("sec-websocket-protocol", "chat"), 400),
        ] {
            let answer = Slot::default().answer(&mut request).unwrap();
            assert_eq!(answer.status(), status, "{request:?}");
        }
        let mut own = without("upgrade");
        own.headers_mut()
            .insert(OWN_HEADER, HeaderValue::from_static("websocket"));
        let answer = Slot::default().answer(&mut own).unwrap();
        assert_eq!(
            answer.headers()["sec-websocket-accept"],
            "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        );
        assert_eq!(answer.headers()["sec-websocket-protocol"], "alpn-ping");
        let mut other = request(|r| *r.uri_mut() = "/webapi/find".parse().unwrap());
        assert!(Slot::default().answer(&mut other).is_none());
    }
}
