//! Forward proxies that the environment names: `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`, with the
//! rules of Go's `golang.org/x/net/http/httpproxy`, which users of Teleport know.

use std::fmt;
use std::io;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderValue, Request, Uri, header};

use super::dial::{self, BoxedIo, Dialer, Tcp, host_of};
use super::ping::{port_of, with_port};
use super::switch::{NoBody, switch};
use super::trust::Trust;
use crate::clock::Clock;
use crate::env::Env;
use crate::secret::Secret;

/// Which connections go through a proxy.
#[derive(Debug, Clone, Default)]
pub(super) struct Forward {
    proxy: Option<Proxy>,
    except: Vec<Exception>,
}

/// One proxy.
#[derive(Clone)]
struct Proxy {
    /// Whether it is spoken to over TLS.
    tls: bool,
    address: String,
    /// The value of `Proxy-Authorization`.
    authorization: Option<Secret<String>>,
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({})", self.address)
    }
}

impl Forward {
    /// Reads the variables. A proxy that cannot be understood is an error: what it was set for must
    /// not go around it.
    pub(super) fn from_env(env: &Env) -> Result<Self, String> {
        let get = |upper: &'static str, lower: &'static str| {
            [upper, lower]
                .into_iter()
                .find_map(|name| Some((name, env.get(name)?)))
        };
        // A CGI script's `HTTP_PROXY` may be a header of its request.
        let plain = get("HTTP_PROXY", "http_proxy").filter(|_| env.get("REQUEST_METHOD").is_none());
        let proxy = get("HTTPS_PROXY", "https_proxy").or(plain);
        let proxy = proxy
            .map(|(name, url)| {
                Proxy::parse(url).map_err(|problem| {
                    // The value may hold a password.
                    format!("{name} {problem}: write http://host:port or https://host:port")
                })
            })
            .transpose()?;
        let except = get("NO_PROXY", "no_proxy").map_or("", |(_, value)| value);
        Ok(Self {
            proxy,
            except: except.split(',').filter_map(Exception::parse).collect(),
        })
    }

    /// The proxy for `address`, a `host:port`.
    fn proxy_for(&self, address: &str) -> Option<&Proxy> {
        let host = host_of(address).trim_end_matches('.').to_ascii_lowercase();
        let ip = host.parse::<IpAddr>().ok();
        let own = host == "localhost" || ip.is_some_and(|ip| ip.is_loopback());
        let port = port_of(address).unwrap_or_default();
        let excepted = own
            || self
                .except
                .iter()
                .any(|exception| exception.matches(&host, ip, port));
        self.proxy.as_ref().filter(|_| !excepted)
    }

    /// Connects to `address`, through the proxy where one is set for it.
    pub(super) async fn dial(&self, clock: &Clock, address: &str) -> io::Result<BoxedIo> {
        match self.proxy_for(address) {
            Some(proxy) => proxy.dial(clock, address).await,
            None => Tcp.dial(address).await,
        }
    }
}

impl Proxy {
    fn parse(url: &str) -> Result<Self, &'static str> {
        let (scheme, rest) = url.split_once("://").unwrap_or(("http", url));
        let tls = match scheme.to_ascii_lowercase().as_str() {
            "http" => false,
            "https" => true,
            _ => return Err("names a proxy of a kind that is not supported"),
        };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, address) = match authority.rsplit_once('@') {
            Some((user, address)) => (Some(user), address),
            None => (None, authority),
        };
        // IPv6 addresses need their brackets, and nothing odd may slip into a request.
        if address.is_empty() || address.parse::<http::uri::Authority>().is_err() {
            return Err("is not the URL of a proxy");
        }
        let authorization = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let plain = [&decoded(name)[..], b":", &decoded(password)].concat();
            Secret::new(format!("Basic {}", STANDARD.encode(plain)))
        });
        Ok(Self {
            tls,
            address: with_port(address, if tls { "443" } else { "80" }),
            authorization,
        })
    }

    async fn dial(&self, clock: &Clock, address: &str) -> io::Result<BoxedIo> {
        let failed = |problem: String| {
            io::Error::other(format!("through the proxy {}: {problem}", self.address))
        };
        let io = Tcp
            .dial(&self.address)
            .await
            .map_err(|source| failed(source.to_string()))?;
        let io: BoxedIo = if self.tls {
            let over_tls = async {
                let name = dial::server_name(&self.address)?;
                let trust = Trust::default().web(clock, &[b"http/1.1"])?;
                dial::tls_over(io, &self.address, name, trust).await
            };
            Box::pin(over_tls.await.map_err(|error| failed(error.to_string()))?)
        } else {
            io
        };
        let uri = Uri::builder().authority(address).build();
        let uri = uri.map_err(|source| io::Error::new(io::ErrorKind::InvalidInput, source))?;
        let mut request = Request::connect(uri)
            .header(header::HOST, address)
            .body(NoBody::new())
            .map_err(|source| io::Error::new(io::ErrorKind::InvalidInput, source))?;
        if let Some(authorization) = &self.authorization {
            let mut value = HeaderValue::from_str(authorization.expose())
                .map_err(|source| io::Error::new(io::ErrorKind::InvalidInput, source))?;
            value.set_sensitive(true);
            request
                .headers_mut()
                .insert(header::PROXY_AUTHORIZATION, value);
        }
        match switch(io, request).await {
            Ok((_, Some(stream))) => Ok(stream),
            Ok((answer, None)) => Err(failed(format!(
                "it answered {} to CONNECT {address}",
                answer.status
            ))),
            Err(source) => Err(failed(source.to_string())),
        }
    }
}

/// `%41` as `A`; a percent sign that begins nothing stays.
fn decoded(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let coded = after
            .get(..2)
            .filter(|_| *first == b'%')
            .and_then(|digits| hex::decode(digits).ok());
        match (coded, after.get(2..)) {
            (Some(byte), Some(after)) => {
                bytes.extend(byte);
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

/// One entry of `NO_PROXY`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    All,
    Network {
        address: IpAddr,
        bits: u32,
    },
    Address {
        address: IpAddr,
        port: Option<String>,
    },
    /// A domain with a dot before it: its subdomains, and itself where `itself`.
    Domain {
        suffix: String,
        itself: bool,
        port: Option<String>,
    },
}

impl Exception {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_ascii_lowercase();
        if text.is_empty() {
            return None;
        }
        if text == "*" {
            return Some(Self::All);
        }
        if let Some((address, bits)) = text.split_once('/') {
            let address: IpAddr = address.parse().ok()?;
            let most = if address.is_ipv4() { 32 } else { 128 };
            let bits = bits.parse().ok().filter(|bits| *bits <= most)?;
            return Some(Self::Network { address, bits });
        }
        let (host, port) = match port_of(&text) {
            Some(port) => (host_of(&text), Some(port.to_owned())),
            None => (text.trim_matches(['[', ']']), None),
        };
        if let Ok(address) = host.parse() {
            return Some(Self::Address { address, port });
        }
        let host = host.strip_prefix('*').unwrap_or(host);
        let itself = !host.starts_with('.');
        let suffix = format!(".{}", host.trim_matches('.'));
        (suffix.len() > 1).then_some(Self::Domain {
            suffix,
            itself,
            port,
        })
    }

    fn matches(&self, host: &str, ip: Option<IpAddr>, port: &str) -> bool {
        let same_port = |own: &Option<String>| own.as_deref().is_none_or(|own| own == port);
        match self {
            Self::All => true,
            Self::Network { address, bits } => ip.is_some_and(|ip| shares(*address, ip, *bits)),
            Self::Address { address, port } => ip == Some(*address) && same_port(port),
            Self::Domain {
                suffix,
                itself,
                port,
            } => {
                let own = *itself && suffix.strip_prefix('.') == Some(host);
                (own || host.ends_with(suffix.as_str())) && same_port(port)
            }
        }
    }
}

/// Whether two addresses of one family have their first `bits` in common.
fn shares(one: IpAddr, other: IpAddr, bits: u32) -> bool {
    let (one, other, width) = match (one, other) {
        (IpAddr::V4(one), IpAddr::V4(other)) => {
            (u128::from(one.to_bits()), u128::from(other.to_bits()), 32)
        }
        (IpAddr::V6(one), IpAddr::V6(other)) => (one.to_bits(), other.to_bits(), 128),
        _ => return false,
    };
    (one ^ other)
        .checked_shr(width - bits)
        .is_none_or(|rest| rest == 0)
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    fn forward(variables: &[(&str, &str)]) -> Result<Forward, String> {
        Forward::from_env(&variables.iter().copied().collect())
    }

    fn used(variables: &[(&str, &str)], address: &str) -> Option<String> {
        let forward = forward(variables).unwrap();
        forward
            .proxy_for(address)
            .map(|proxy| proxy.address.clone())
    }

    #[test]
    fn the_proxy_for_https_counts_and_that_for_http_where_there_is_none() {
        let example = "example.org:443";
        for (variables, proxy) in [
            (&[][..], None),
            (&[("HTTPS_PROXY", "")], None),
            (&[("HTTPS_PROXY", "p")], Some("p:80")),
            (&[("https_proxy", "p:3128")], Some("p:3128")),
            (&[("HTTPS_PROXY", "http://p/")], Some("p:80")),
            (&[("HTTPS_PROXY", "https://p")], Some("p:443")),
            (&[("HTTPS_PROXY", "http://[::1]:8080")], Some("[::1]:8080")),
            (&[("HTTPS_PROXY", "a"), ("https_proxy", "b")], Some("a:80")),
            (&[("HTTPS_PROXY", "a"), ("HTTP_PROXY", "b")], Some("a:80")),
            (&[("HTTP_PROXY", "b")], Some("b:80")),
            (&[("HTTP_PROXY", "b"), ("REQUEST_METHOD", "GET")], None),
        ] {
            assert_eq!(used(variables, example).as_deref(), proxy, "{variables:?}");
        }
        for local in ["localhost:443", "127.0.0.1:443", "[::1]:443"] {
            assert_eq!(used(&[("HTTPS_PROXY", "p")], local), None, "{local}");
        }
    }

    #[test]
    fn a_proxy_that_is_not_understood_is_told_without_its_password() {
        for url in [
            "socks5://u:hunter2@p:1080",
            "http://u:hunter2@",
            "http://a b",
        ] {
            let problem = forward(&[("HTTPS_PROXY", url)]).unwrap_err();
            assert!(problem.starts_with("HTTPS_PROXY "), "{problem}");
            assert!(!problem.contains("hunter2"), "{problem}");
        }
        let shown = forward(&[("HTTPS_PROXY", "http://u:hunter2@p")]).unwrap();
        assert!(!format!("{shown:?}").contains("hunter2"));
    }

    #[test]
    fn exceptions_are_those_of_go() {
        for (except, address, excepted) in [
            ("*", "example.org:443", true),
            ("example.org", "example.org:443", true),
            ("example.org", "EXAMPLE.org.:443", true),
            ("example.org", "a.example.org:443", true),
            ("example.org", "badexample.org:443", false),
            (".example.org", "a.example.org:443", true),
            (".example.org", "example.org:443", false),
            ("*.example.org", "a.b.example.org:443", true),
            ("*.example.org", "example.org:443", false),
            ("other, example.org ", "example.org:443", true),
            ("example.org:8443", "example.org:443", false),
            ("example.org:443", "a.example.org:443", true),
            ("10.0.0.0/8", "10.1.2.3:443", true),
            ("10.0.0.0/8", "11.1.2.3:443", false),
            ("0.0.0.0/0", "11.1.2.3:443", true),
            ("0.0.0.0/0", "example.org:443", false),
            ("fd00::/8", "[fd12::1]:443", true),
            ("fd00::/8", "[fe12::1]:443", false),
            ("::/0", "10.0.0.1:443", false),
            ("192.0.2.1", "192.0.2.1:443", true),
            ("192.0.2.1:444", "192.0.2.1:443", false),
            ("[2001:db8::1]", "[2001:db8::1]:443", true),
            ("[2001:db8::1]:443", "[2001:db8::1]:443", true),
            ("10.0.0.0/99", "10.1.2.3:443", false),
            ("", "example.org:443", false),
            (",,", "example.org:443", false),
            (".", "example.org:443", false),
        ] {
            let variables = [("HTTPS_PROXY", "p"), ("NO_PROXY", except)];
            let proxied = used(&variables, address).is_some();
            assert_eq!(proxied, !excepted, "{except} {address}");
        }
    }

    #[tokio::test]
    async fn the_proxy_is_asked_with_the_password_of_its_url() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let proxy = tokio::spawn(async move {
            let mut heads = Vec::new();
            for answer in ["407 Proxy Authentication Required", "200 OK"] {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                heads.push(String::from_utf8(head).unwrap().to_lowercase());
                let answer = format!("HTTP/1.1 {answer}\r\n\r\nhello");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
            heads
        });
        let url = format!("http://us%65r:p%3Aw@{address}");
        let forward = forward(&[("HTTPS_PROXY", &url)]).unwrap();
        let clock = Clock::system();
        let refused = forward.dial(&clock, "[2001:db8::1]:443").await;
        let refused = refused.err().unwrap().to_string();
        assert!(refused.contains("407") && refused.contains(&address.to_string()));
        let mut stream = forward.dial(&clock, "example.org:3080").await.unwrap();
        let mut text = [0; 5];
        stream.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"hello");
        let heads = proxy.await.unwrap();
        assert!(heads[0].starts_with("connect [2001:db8::1]:443 http/1.1\r\n"));
        let authorization = STANDARD.encode("user:p:w").to_lowercase();
        assert!(heads[1].starts_with("connect example.org:3080 http/1.1\r\n"));
        assert!(heads[1].contains(&format!("proxy-authorization: basic {authorization}\r\n")));
    }
}
