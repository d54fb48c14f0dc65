//! Discovery: what a proxy says about itself at `/webapi/find`
//! (upstream `api/client/webclient/webclient.go`).

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::time::timeout;

use super::ClusterError;
use super::dial::{self, Dialer, TIMEOUT, host_of};
use super::trust::Trust;
use crate::clock::Clock;
use crate::crypto::Suite;

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
    ssh: Ssh,
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
}

/// Asks the proxy at `address` (`host:port`) who it is.
pub async fn find(
    clock: &Clock,
    dialer: &dyn Dialer,
    trust: &Trust,
    address: &str,
) -> Result<Endpoints, ClusterError> {
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
    let exchange = async {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let request = http::Request::get("/webapi/find")
            .header(http::header::HOST, address)
            .header(http::header::ACCEPT, "application/json")
            .body(Empty::<Bytes>::new())
            .unwrap_or_default();
        let answer = async move {
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER)
                .collect()
                .await;
            Ok::<_, hyper::Error>((status, body.map(http_body_util::Collected::to_bytes)))
        };
        // The connection is driven here and ends with the answer, or just before it where the peer
        // closes: no task is left behind.
        let (mut answer, connection) = (std::pin::pin!(answer), std::pin::pin!(connection));
        tokio::select! {
            answer = &mut answer => answer,
            ended = connection => match ended {
                Ok(()) => answer.await,
                Err(source) => Err(source),
            },
        }
    };
    let (status, body) = timeout(TIMEOUT, exchange)
        .await
        .map_err(|_elapsed| not_a_proxy(format!("no answer within {} s", TIMEOUT.as_secs())))?
        .map_err(|source| not_a_proxy(source.to_string()))?;
    let body = body.map_err(|source| not_a_proxy(source.to_string()))?;
    if !status.is_success() {
        return Err(not_a_proxy(format!("/webapi/find answered {status}")));
    }
    parse(&body).map_err(|source| {
        not_a_proxy(format!(
            "/webapi/find is not the expected JSON ({source}); is there a login page in front?"
        ))
    })
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
        ssh_address,
        web_address,
    })
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

/// `address` with `port` added where it has none. A scheme (`https://`, `tcp://`) is taken off.
pub fn with_port(address: &str, port: &str) -> String {
    let bare = ["https://", "http://", "tcp://"]
        .iter()
        .find_map(|scheme| address.strip_prefix(scheme))
        .unwrap_or(address)
        .trim_end_matches('/');
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
}
