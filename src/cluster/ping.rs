//! Discovery: what a proxy says about itself at `/webapi/find`
//! (upstream `api/client/webclient/webclient.go`).

use http::StatusCode;
use http_body_util::Full;
use hyper::body::Bytes;
use serde::Deserialize;
use tokio::time::timeout;

use super::ClusterError;
use super::dial::{self, Dialer, TIMEOUT, host_of};
use super::trust::Trust;
use crate::clock::Clock;
use crate::crypto::Suite;
use crate::exchange::ask_for_bytes;

/// Where a proxy says who it is, and the same with the API's version before it.
const PATH: &str = "/webapi/find";
const VERSIONED_PATH: &str = "/v1/webapi/find";
/// The largest discovery answer that is read, in bytes. Real ones have 1 to 2 KiB.
const MAX_ANSWER: usize = 256 * 1024;

/// The result of one discovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoints {
    /// The cluster's name.
    pub cluster_name: String,
    /// The server's version, such as `18.0.0`.
    pub server_version: String,
    /// The cluster's signature algorithm suite.
    pub suite: Suite,
    /// Whether one TLS port serves everything, told apart by ALPN.
    pub tls_routing: bool,
    /// Where the proxy's SSH side is reached, `host:port`; the web port with TLS routing.
    pub ssh_address: Option<String>,
    /// The proxy's web address, `host:port`, as it calls itself.
    pub web_address: Option<String>,
    /// Where the proxy wants agents to connect, `host:port`.
    pub tunnel_address: Option<String>,
    /// Where the proxy serves Kubernetes if it has a port for that alone (no TLS routing),
    /// `host:port`.
    pub kubernetes_address: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Answer {
    #[serde(default)]
    auth: Auth,
    proxy: Proxy,
    #[serde(default)]
    server_version: String,
    cluster_name: String,
}

#[derive(Debug, Default, Deserialize)]
struct Auth {
    #[serde(default)]
    signature_algorithm_suite: serde_json::Value,
}

#[derive(Debug, Deserialize)]
struct Proxy {
    #[serde(default)]
    tls_routing_enabled: bool,
    #[serde(default)]
    kube: Kube,
    #[serde(default)]
    ssh: Ssh,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Kube {
    #[serde(rename = "listen_addr")]
    listen: String,
    #[serde(rename = "public_addr")]
    public: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Ssh {
    #[serde(rename = "listen_addr")]
    listen: String,
    #[serde(rename = "web_listen_addr")]
    web_listen: String,
    #[serde(rename = "public_addr")]
    public: String,
    #[serde(rename = "ssh_public_addr")]
    own_public: String,
    #[serde(rename = "tunnel_listen_addr")]
    tunnel_listen: String,
    #[serde(rename = "ssh_tunnel_public_addr")]
    tunnel_public: String,
}

/// Asks the proxy at `address` (`host:port`) who it is.
pub async fn find(
    clock: &Clock,
    dialer: &dyn Dialer,
    trust: &Trust,
    address: &str,
) -> Result<Endpoints, ClusterError> {
    let (mut status, mut body) = ask(clock, dialer, trust, address, PATH).await?;
    // Something in front of the proxy may pass only what has the API's version before it.
    if status == StatusCode::NOT_FOUND {
        (status, body) = ask(clock, dialer, trust, address, VERSIONED_PATH).await?;
    }
    let not_a_proxy = |problem: String| ClusterError::NotAProxy {
        address: address.to_owned(),
        problem,
    };
    if !status.is_success() {
        return Err(not_a_proxy(format!("{PATH} answered {status}")));
    }
    parse(&body).map_err(|source| {
        not_a_proxy(format!(
            "{PATH} is not the expected JSON ({source}); is there a login page in front?"
        ))
    })
}

/// One question over a connection of its own.
async fn ask(
    clock: &Clock,
    dialer: &dyn Dialer,
    trust: &Trust,
    address: &str,
    path: &'static str,
) -> Result<(StatusCode, Bytes), ClusterError> {
    let stream = dial::tls(
        dialer,
        address,
        dial::server_name(address)?,
        trust.web(clock, &[b"http/1.1"])?,
    )
    .await?;
    let not_a_proxy = |problem: String| ClusterError::NotAProxy {
        address: address.to_owned(),
        problem,
    };
    let request = http::Request::get(path)
        .header(http::header::HOST, address)
        .header(http::header::ACCEPT, "application/json")
        .body(Full::default())
        .unwrap_or_default();
    let answer = timeout(TIMEOUT, ask_for_bytes(stream, request, MAX_ANSWER))
        .await
        .map_err(|_elapsed| not_a_proxy(format!("no answer within {} s", TIMEOUT.as_secs())))?
        .map_err(|source| not_a_proxy(source.to_string()))?;
    Ok((answer.status(), answer.into_body()))
}

fn parse(body: &[u8]) -> Result<Endpoints, serde_json::Error> {
    let answer: Answer = serde_json::from_slice(body)?;
    let ssh = &answer.proxy.ssh;
    let web_port = port_of(&ssh.web_listen).unwrap_or("443");
    let ssh_port = port_of(&ssh.listen).unwrap_or("3023");
    let web_address =
        first(&[&ssh.public, &ssh.web_listen]).map(|address| with_port(address, web_port));
    let ssh_address = if answer.proxy.tls_routing_enabled {
        web_address.clone()
    } else if let Some(address) = first(&[&ssh.own_public]) {
        Some(with_port(address, ssh_port))
    } else if let Some(address) = first(&[&ssh.public]) {
        Some(join(host_of(&with_port(address, ssh_port)), ssh_port))
    } else {
        first(&[&ssh.listen, &ssh.web_listen]).map(|address| with_port(address, ssh_port))
    };
    let suite = match &answer.auth.signature_algorithm_suite {
        serde_json::Value::String(name) => Suite::from_name(name),
        serde_json::Value::Number(number) => number
            .as_i64()
            .and_then(|n| i32::try_from(n).ok())
            .and_then(|n| crate::pb::types::SignatureAlgorithmSuite::try_from(n).ok())
            .map_or(Suite::Legacy, Suite::from),
        _ => Suite::Legacy,
    };
    Ok(Endpoints {
        cluster_name: answer.cluster_name,
        server_version: answer.server_version,
        suite,
        tls_routing: answer.proxy.tls_routing_enabled,
        tunnel_address: tunnel_address(ssh, answer.proxy.tls_routing_enabled),
        kubernetes_address: kubernetes_address(&answer.proxy.kube, ssh),
        ssh_address,
        web_address,
    })
}

/// Where Kubernetes is served without TLS routing: what the proxy says, else the web address's host
/// with the port that it listens on.
fn kubernetes_address(kube: &Kube, ssh: &Ssh) -> Option<String> {
    if !kube.public.is_empty() {
        return Some(bare(&kube.public).to_owned());
    }
    let port = port_of(&kube.listen)?;
    let web = with_port(first(&[&ssh.public])?, port);
    Some(join(host_of(&web), port))
}

/// Where agents connect. A host that is none (`0.0.0.0`) is this machine.
fn tunnel_address(ssh: &Ssh, tls_routing: bool) -> Option<String> {
    let web_port = port_of(&ssh.web_listen).unwrap_or("443");
    let port = port_of(&ssh.tunnel_listen).unwrap_or("3024");
    let moved = |address: &str| join(host_of(&with_port(address, port)), port);
    let address = if tls_routing {
        with_port(first(&[&ssh.public, &ssh.web_listen])?, web_port)
    } else if !ssh.tunnel_public.is_empty() {
        with_port(&ssh.tunnel_public, port)
    } else if let Some(address) = first(&[&ssh.own_public, &ssh.public]) {
        moved(address)
    } else {
        with_port(first(&[&ssh.tunnel_listen, &ssh.web_listen])?, port)
    };
    match host_of(&address) {
        "" | "0.0.0.0" | "::" => {
            let port = port_of(&address).unwrap_or("3080");
            Some(format!("localhost:{port}"))
        }
        _ => Some(address),
    }
}

fn first<'a>(candidates: &[&'a str]) -> Option<&'a str> {
    candidates
        .iter()
        .copied()
        .find(|address| !address.is_empty())
}

/// The port of `host:port`; `None` if there is none.
pub fn port_of(address: &str) -> Option<&str> {
    let (host, port) = address.rsplit_once(':')?;
    let bracketed_or_name = host.ends_with(']') || !host.contains(':');
    (bracketed_or_name && !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
        .then_some(port)
}

/// `address` without the scheme (`https://`, `http://`, `tcp://`) and the slash that people write.
pub fn bare(address: &str) -> &str {
    ["https://", "http://", "tcp://"]
        .iter()
        .find_map(|scheme| address.strip_prefix(scheme))
        .unwrap_or(address)
        .trim_end_matches('/')
}

/// `address` with `port` added where it has none. A scheme (`https://`, `tcp://`) is taken off.
pub fn with_port(address: &str, port: &str) -> String {
    let bare = bare(address);
    if port_of(bare).is_some() {
        bare.to_owned()
    } else {
        join(bare, port)
    }
}

fn join(host: &str, port: &str) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(ssh: &str, routing: bool) -> Endpoints {
        let text = format!(
            r#"{{"auth":{{"signature_algorithm_suite":"balanced-v1"}},
                "proxy":{{"tls_routing_enabled":{routing},"ssh":{ssh}}},
                "server_version":"18.0.0","cluster_name":"c"}}"#
        );
        parse(text.as_bytes()).unwrap()
    }

    #[test]
    fn tls_routing_uses_the_web_address_for_everything() {
        let found = parsed(
            r#"{"listen_addr":"127.0.0.1:3080","web_listen_addr":"127.0.0.1:3080","public_addr":"example.teleport.sh:3080"}"#,
            true,
        );
        assert_eq!(found.suite, Suite::BalancedV1);
        assert_eq!(
            found.ssh_address.as_deref(),
            Some("example.teleport.sh:3080")
        );
    }

    #[test]
    fn without_tls_routing_the_ssh_port_counts() {
        let found = parsed(
            r#"{"listen_addr":"0.0.0.0:3023","web_listen_addr":"0.0.0.0:3080","public_addr":"p.example.org:443"}"#,
            false,
        );
        assert_eq!(found.ssh_address.as_deref(), Some("p.example.org:3023"));
        assert_eq!(found.web_address.as_deref(), Some("p.example.org:443"));
    }

    #[test]
    fn agents_connect_where_the_proxy_says() {
        for (ssh, routing, address) in [
            (
                r#"{"public_addr":"p:443","web_listen_addr":"0.0.0.0:3080"}"#,
                true,
                "p:443",
            ),
            (
                r#"{"public_addr":"p","web_listen_addr":"0.0.0.0:3080"}"#,
                true,
                "p:3080",
            ),
            (
                r#"{"web_listen_addr":"0.0.0.0:3080"}"#,
                true,
                "localhost:3080",
            ),
            (r#"{"web_listen_addr":"[::]:3080"}"#, true, "localhost:3080"),
            (
                r#"{"ssh_tunnel_public_addr":"t","ssh_public_addr":"s:1","public_addr":"p:443"}"#,
                false,
                "t:3024",
            ),
            (
                r#"{"ssh_public_addr":"s:1","public_addr":"p:443"}"#,
                false,
                "s:3024",
            ),
            (
                r#"{"public_addr":"p:443","tunnel_listen_addr":"0.0.0.0:4024"}"#,
                false,
                "p:4024",
            ),
            (
                r#"{"tunnel_listen_addr":"0.0.0.0:4024"}"#,
                false,
                "localhost:4024",
            ),
        ] {
            let found = parsed(ssh, routing);
            assert_eq!(found.tunnel_address.as_deref(), Some(address), "{ssh}");
        }
        assert_eq!(parsed("{}", true).tunnel_address, None);
    }

    #[test]
    fn kubernetes_has_an_address_of_its_own_without_tls_routing() {
        for (kube, ssh, address) in [
            (
                r#"{"public_addr":"k.example.org:3026"}"#,
                "{}",
                Some("k.example.org:3026"),
            ),
            (
                r#"{"listen_addr":"0.0.0.0:3026"}"#,
                r#"{"public_addr":"p.example.org:443","ssh_public_addr":"s.example.org:1"}"#,
                Some("p.example.org:3026"),
            ),
            (
                r#"{"listen_addr":"[::]:3026"}"#,
                r#"{"public_addr":"[::1]:443"}"#,
                Some("[::1]:3026"),
            ),
            (r#"{"listen_addr":"0.0.0.0:3026"}"#, "{}", None),
            ("{}", r#"{"public_addr":"p.example.org:443"}"#, None),
        ] {
            let (kube, ssh) = (
                serde_json::from_str(kube).unwrap(),
                serde_json::from_str(ssh).unwrap(),
            );
            assert_eq!(kubernetes_address(&kube, &ssh).as_deref(), address);
        }
    }

    #[test]
    fn ports_are_added_where_missing() {
        for (address, with) in [
            ("example.org", "example.org:443"),
            ("example.org:8443", "example.org:8443"),
            ("https://example.org/", "example.org:443"),
            ("::1", "[::1]:443"),
            ("[::1]", "[::1]:443"),
            ("[::1]:3080", "[::1]:3080"),
        ] {
            assert_eq!(with_port(address, "443"), with);
        }
    }

    #[test]
    fn other_answers_are_refused() {
        for body in ["", "<html>", "{}", "[]", r#"{"proxy":{}}"#] {
            assert!(parse(body.as_bytes()).is_err(), "{body}");
        }
    }

    #[test]
    fn fuzz_answers() {
        const SAMPLE: &str = r#"{"auth":{"signature_algorithm_suite":"balanced-v1"},"proxy":{"tls_routing_enabled":false,"ssh":{"listen_addr":"0.0.0.0:3023","web_listen_addr":"[::]:3080","public_addr":"p.example.org:443","ssh_tunnel_public_addr":"t"}},"server_version":"18.0.0","cluster_name":"c"}"#;
        bolero::check!()
            .with_type::<Vec<(u16, u8)>>()
            .for_each(|edits| {
                let mut body = SAMPLE.as_bytes().to_vec();
                for (place, octet) in edits.iter().take(6) {
                    let at = usize::from(*place) % body.len();
                    body[at] = *octet;
                }
                let Ok(found) = parse(&body) else { return };
                let addresses = [found.ssh_address, found.web_address, found.tunnel_address];
                for address in addresses.into_iter().flatten() {
                    assert_eq!(with_port(bare(&address), "1"), with_port(&address, "1"));
                    assert!(address.len() < 2 * SAMPLE.len());
                }
            });
    }
}
