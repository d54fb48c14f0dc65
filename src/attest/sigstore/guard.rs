//! Which addresses may be connected to.
//!
//! The name of an image comes from whoever started the container, so it must not make the agent ask
//! services that only this machine or this network reaches. Addresses are judged after resolution,
//! and exactly the judged one is connected to.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::{TcpStream, lookup_host};

/// A range of addresses: `10.0.0.0/8`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefix {
    address: IpAddr,
    bits: u8,
}

impl Prefix {
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (address, bits) = text.split_once('/')?;
        let address: IpAddr = address.parse().ok()?;
        // `+8` and `08` are numbers to Rust.
        let bits = Some(bits)
            .filter(|bits| bits.bytes().all(|b| b.is_ascii_digit()))
            .filter(|bits| *bits == "0" || !bits.starts_with('0'))?
            .parse()
            .ok()?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        (bits <= most).then_some(Self { address, bits })
    }

    fn contains(self, address: IpAddr) -> bool {
        match (self.address, address) {
            (IpAddr::V4(known), IpAddr::V4(address)) => {
                let differ = u32::from(known) ^ u32::from(address);
                u32::from(self.bits) <= differ.leading_zeros()
            }
            (IpAddr::V6(known), IpAddr::V6(address)) => {
                let differ = u128::from(known) ^ u128::from(address);
                u32::from(self.bits) <= differ.leading_zeros()
            }
            _ => false,
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum GuardError {
    /// The name does not resolve, or nobody answers.
    #[error("{host}:{port}: {source}")]
    Unreachable {
        host: String,
        port: u16,
        #[source]
        source: io::Error,
    },
    /// Every address is one that is not asked.
    #[error(
        "{host} has the private address {address}, which images may not lead to (allow it in \
         `allowed_private_network_prefixes` if the registry really is there)"
    )]
    Private { host: String, address: IpAddr },
}

/// Connects to public addresses, and to private ones that are allowed.
#[derive(Debug, Clone, Default)]
pub(super) struct Guard {
    allowed: Vec<Prefix>,
}

impl Guard {
    pub(super) fn new(allowed: Vec<Prefix>) -> Self {
        Self { allowed }
    }

    fn admits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        !is_private(address) || self.allowed.iter().any(|prefix| prefix.contains(address))
    }

    /// Connects to `host`, a name or an address without brackets.
    pub(super) async fn connect(&self, host: &str, port: u16) -> Result<TcpStream, GuardError> {
        let unreachable = |source| GuardError::Unreachable {
            host: host.to_owned(),
            port,
            source,
        };
        let addresses: Vec<SocketAddr> = lookup_host((host, port))
            .await
            .map_err(unreachable)?
            .collect();
        let mut refused = None;
        let mut failed = None;
        for address in addresses {
            if !self.admits(address.ip()) {
                refused = Some(address.ip());
                continue;
            }
            match TcpStream::connect(address).await {
                Ok(stream) => return Ok(stream),
                Err(source) => failed = Some(source),
            }
        }
        match (failed, refused) {
            (None, Some(address)) => Err(GuardError::Private {
                host: host.to_owned(),
                address,
            }),
            (failed, _) => {
                Err(unreachable(failed.unwrap_or_else(|| {
                    io::Error::other("the name has no address")
                })))
            }
        }
    }
}

/// Whether an address is reached from somewhere only, or is no address of a host.
fn is_private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_private_v4(address),
        IpAddr::V6(address) => is_private_v6(address),
    }
}

fn is_private_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    address.is_private()
        || address.is_loopback()
        || address.is_link_local()
        || address.is_multicast()
        // This network, carriers' own, protocols' own, benchmarks, future use and broadcast.
        || a == 0
        || (a == 100 && (64..128).contains(&b))
        || (a, b, c) == (192, 0, 0)
        || (a == 198 && (18..20).contains(&b))
        || a >= 240
}

fn is_private_v6(address: Ipv6Addr) -> bool {
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_private_v4(Ipv4Addr::new(a, b, c, d))
    };
    match segments {
        // Written by translators of addresses (NAT64, 6to4): the inner one counts.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x2002, high, low, ..] => embedded(high, low),
        // A translator of this network.
        [0x64, 0xff9b, 1, ..] => true,
        // Addresses of hosts have three bits alike: 2000::/3.
        [first, ..] => first >> 13 != 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_addresses_are_refused() {
        for text in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.8.9.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.168.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::7f00:1",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "64:ff9b::a00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2002:a00:1::1",
        ] {
            assert!(!Guard::default().admits(text.parse().unwrap()), "{text}");
        }
        for text in [
            "1.1.1.1",
            "8.8.8.8",
            "100.63.0.1",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "::ffff:1.1.1.1",
            "64:ff9b::101:101",
            "2002:101:101::1",
        ] {
            assert!(Guard::default().admits(text.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn ranges_are_allowed_exactly() {
        let guard = Guard::new(
            ["10.1.0.0/16", "fd00::/8", "127.0.0.1/32"]
                .map(|text| Prefix::parse(text).unwrap())
                .into(),
        );
        for (text, admitted) in [
            ("10.1.255.255", true),
            ("10.2.0.0", false),
            ("::ffff:10.1.0.1", true),
            ("fd00::1", true),
            ("fc00::1", false),
            ("127.0.0.1", true),
            ("127.0.0.2", false),
        ] {
            assert_eq!(guard.admits(text.parse().unwrap()), admitted, "{text}");
        }
        let all = Guard::new(vec![Prefix::parse("0.0.0.0/0").unwrap()]);
        assert!(all.admits("127.0.0.1".parse().unwrap()));
        assert!(!all.admits("::1".parse().unwrap()));
    }

    #[test]
    fn ranges_are_read_strictly() {
        for good in [
            "10.0.0.0/8",
            "10.1.2.3/8",
            "::/0",
            "fd00::/128",
            "1.2.3.4/32",
        ] {
            assert_eq!(Prefix::parse(good).unwrap().to_string(), good);
        }
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "10.0.0.0/+8",
            "10.0.0.0/08",
            "10.0.0.0/",
            "x/8",
            "10.0.0.0/8/8",
        ] {
            assert_eq!(Prefix::parse(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn names_are_judged_by_what_they_resolve_to() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for host in ["localhost", "127.0.0.1"] {
            let error = Guard::default().connect(host, port).await.unwrap_err();
            assert!(matches!(error, GuardError::Private { .. }), "{error}");
        }
        let guard = Guard::new(vec![Prefix::parse("127.0.0.0/8").unwrap()]);
        assert!(guard.connect("localhost", port).await.is_ok());
    }
}
