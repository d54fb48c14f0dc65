//! How addresses are reached on a real network: forward proxies, the address that a proxy
//! advertises, load balancers that hide ALPN, and auth addresses that are in truth a proxy's.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use tokio::time::timeout;

use super::dial::{self, BoxedIo, Dialer};
use super::forward::Forward;
use super::ping::{self, port_of, with_port};
use super::trust::Trust;
use super::upgrade::{self, Overrides, PROBED};
use crate::clock::Clock;
use crate::env::Env;

/// The longest that a probe or a discovery may take that only serves to find the best way.
const LOOK: Duration = Duration::from_secs(5);
/// The longest that one place may take to be reached: the next one needs time of the same call.
const REACH: Duration = Duration::from_secs(10);
/// How long what was found out about an address is believed.
const BELIEVED: Duration = Duration::from_mins(10);

/// What the environment says of dialling.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    forward: Forward,
    upgrades: Overrides,
    tunnel: Option<String>,
    /// Whether the configured address of a proxy is used for everything (`TBOT_USE_PROXY_ADDR`).
    pub verbatim: bool,
}

impl Settings {
    /// Reads the variables.
    ///
    /// # Errors
    /// Which variable cannot be understood, and what it should be.
    pub fn from_env(env: &Env) -> Result<Self, String> {
        Ok(Self {
            forward: Forward::from_env(env)?,
            upgrades: Overrides::from_env(env),
            tunnel: env
                .get("TELEPORT_TUNNEL_PUBLIC_ADDR")
                .map(|address| with_port(address, "3080")),
            verbatim: env.get("TBOT_USE_PROXY_ADDR") == Some("yes"),
        })
    }
}

/// The network.
#[derive(Debug)]
pub struct Network {
    settings: Settings,
    trust: Trust,
    clock: Clock,
    known: Mutex<HashMap<String, Known>>,
}

/// What is known of an address, each with the time when it was found out.
#[derive(Debug, Clone, Default)]
struct Known {
    /// Whether ALPN does not get through.
    hides_alpn: Option<(bool, SystemTime)>,
    /// The address that the proxy wants agents to use, and whether one port there tells all
    /// protocols apart.
    advertised: Option<(String, bool, SystemTime)>,
    /// Whether a proxy answers here.
    proxy: Option<(bool, SystemTime)>,
    /// When it could not be reached.
    failed: Option<SystemTime>,
}

impl Network {
    /// A network whose proxies are judged by `trust`.
    pub fn new(settings: Settings, trust: Trust, clock: Clock) -> Self {
        Self {
            settings,
            trust,
            clock,
            known: Mutex::default(),
        }
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, Known>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look_up(&self, address: &str) -> Known {
        self.known().get(address).cloned().unwrap_or_default()
    }

    fn note(&self, address: &str, change: impl FnOnce(&mut Known)) {
        change(self.known().entry(address.to_owned()).or_default());
    }

    fn is_recent(&self, at: SystemTime) -> bool {
        at + BELIEVED > self.clock.now()
    }

    async fn find(&self, address: &str) -> Option<ping::Endpoints> {
        let found = ping::find(&self.clock, self, &self.trust, address);
        match timeout(LOOK, found).await {
            Ok(Ok(found)) => Some(found),
            Ok(Err(error)) => {
                tracing::debug!(address, %error, "No proxy answers here");
                None
            }
            Err(_elapsed) => None,
        }
    }

    /// Where the proxy at `address` wants agents to connect, and whether one port there tells all
    /// protocols apart. `None` if it does not answer now.
    async fn advertised(&self, address: &str) -> Option<(String, bool)> {
        if let Some((advertised, routing, at)) = self.look_up(address).advertised
            && self.is_recent(at)
        {
            return Some((advertised, routing));
        }
        let found = self.find(address).await?;
        let advertised = found.tunnel_address.unwrap_or_else(|| address.to_owned());
        let routing = found.tls_routing;
        let now = self.clock.now();
        self.note(address, |known| {
            known.advertised = Some((advertised.clone(), routing, now));
        });
        Some((advertised, routing))
    }

    async fn reach(&self, address: &str) -> io::Result<BoxedIo> {
        let hides_alpn = self.settings.upgrades.decide(address);
        let hides_alpn = hides_alpn.or(self.look_up(address).hides_alpn.map(|(hides, _)| hides));
        if hides_alpn == Some(true) {
            self.dial_upgraded(address).await
        } else {
            self.dial(address).await
        }
    }
}

#[async_trait]
impl Dialer for Network {
    async fn dial(&self, address: &str) -> io::Result<BoxedIo> {
        self.settings.forward.dial(&self.clock, address).await
    }

    async fn dial_proxy(&self, address: &str) -> io::Result<BoxedIo> {
        let reached = timeout(REACH, self.reach(address)).await;
        let reached = reached.unwrap_or_else(|_elapsed| Err(io::ErrorKind::TimedOut.into()));
        let now = self.clock.now();
        self.note(address, |known| match &reached {
            Ok(_) => known.failed = None,
            Err(_) => {
                known.failed = Some(now);
                // The load balancer may be another by now.
                known.hides_alpn = None;
            }
        });
        reached
    }

    async fn dial_upgraded(&self, address: &str) -> io::Result<BoxedIo> {
        let outer = async {
            let name = dial::server_name(address)?;
            let trust = self.trust.web(&self.clock, &[b"http/1.1"])?;
            dial::tls(self, address, name, trust).await
        };
        let outer = outer.await.map_err(io::Error::other)?;
        upgrade::upgrade(Box::pin(outer), address).await
    }

    async fn places(&self, address: &str) -> Vec<String> {
        let configured = || vec![address.to_owned()];
        if self.settings.verbatim {
            return configured();
        }
        let advertised = match &self.settings.tunnel {
            Some(tunnel) => tunnel.clone(),
            None => match self.advertised(address).await {
                Some((advertised, _)) => advertised,
                None => return configured(),
            },
        };
        if advertised == address {
            return configured();
        }
        let failed = self.look_up(&advertised).failed;
        if failed.is_some_and(|at| self.is_recent(at)) {
            vec![address.to_owned(), advertised]
        } else {
            vec![advertised, address.to_owned()]
        }
    }

    async fn tunnel(&self, address: &str) -> Option<String> {
        if self.settings.verbatim {
            return None;
        }
        match self.advertised(address).await? {
            (_, true) => None,
            (advertised, false) => Some(self.settings.tunnel.clone().unwrap_or(advertised)),
        }
    }

    fn hides_alpn(&self, address: &str) -> Option<bool> {
        let known = self.look_up(address).hides_alpn;
        let decided = self.settings.upgrades.decide(address);
        decided.or(known
            .filter(|(_, at)| self.is_recent(*at))
            .map(|(hides, _)| hides))
    }

    async fn probe(&self, address: &str) -> bool {
        if let Some(known) = self.hides_alpn(address) {
            return known;
        }
        let handshake = async {
            let name = dial::server_name(address)?;
            let trust = self.trust.web(&self.clock, &[PROBED])?;
            let stream = dial::tls(self, address, name, trust).await?;
            Ok(stream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec))
        };
        let Ok(handshake) = timeout(LOOK, handshake).await else {
            return false;
        };
        let Some(hides) = upgrade::hides_alpn(&handshake) else {
            return false;
        };
        if hides {
            tracing::info!(
                address,
                "Something in front of the proxy hides ALPN: connections are upgraded over HTTP"
            );
        }
        let now = self.clock.now();
        self.note(address, |known| known.hides_alpn = Some((hides, now)));
        hides
    }

    async fn is_proxy(&self, address: &str, tried: bool) -> bool {
        let looks_like_one = matches!(port_of(address), Some("443" | "3080"));
        match self.look_up(address).proxy {
            Some((true, _)) => return true,
            Some((false, at)) if self.is_recent(at) => return false,
            _ if !tried && !looks_like_one => return false,
            _ => {}
        }
        let proxy = self.find(address).await.is_some();
        if proxy {
            tracing::warn!(
                address,
                "auth_server is the address of a proxy: going through it. Write it as \
                 proxy_server; newer agents refuse it here"
            );
        }
        let now = self.clock.now();
        self.note(address, |known| known.proxy = Some((proxy, now)));
        proxy
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROXY: &str = "proxy.test.invalid:443";
    const ADVERTISED: &str = "public.test.invalid:443";

    fn network(variables: &[(&str, &str)]) -> Network {
        let env: Env = variables.iter().copied().collect();
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Clock::simulated(now);
        let network = Network::new(Settings::from_env(&env).unwrap(), Trust::default(), clock);
        network.note(PROXY, |known| {
            known.advertised = Some((ADVERTISED.to_owned(), true, now));
        });
        network
    }

    #[tokio::test(start_paused = true)]
    async fn the_advertised_address_comes_first_unless_it_failed() {
        let network = network(&[]);
        assert_eq!(network.places(PROXY).await, [ADVERTISED, PROXY]);
        let failed = network.clock.now();
        network.note(ADVERTISED, |known| known.failed = Some(failed));
        assert_eq!(network.places(PROXY).await, [PROXY, ADVERTISED]);
        tokio::time::sleep(BELIEVED).await;
        let now = network.clock.now();
        network.note(PROXY, |known| {
            known.advertised = Some((ADVERTISED.to_owned(), true, now));
        });
        assert_eq!(network.places(PROXY).await, [ADVERTISED, PROXY]);
    }

    #[tokio::test(start_paused = true)]
    async fn variables_say_where_to_connect() {
        let verbatim = network(&[("TBOT_USE_PROXY_ADDR", "yes")]);
        assert_eq!(verbatim.places(PROXY).await, [PROXY]);
        let tunnel = network(&[("TELEPORT_TUNNEL_PUBLIC_ADDR", "tcp://t.test.invalid")]);
        assert_eq!(tunnel.places(PROXY).await, ["t.test.invalid:3080", PROXY]);
    }

    #[tokio::test(start_paused = true)]
    async fn proxies_without_routing_are_passed_by_ssh() {
        let without_routing = |variables| {
            let network = network(variables);
            let now = network.clock.now();
            network.note(PROXY, |known| {
                known.advertised = Some(("t.test.invalid:3024".to_owned(), false, now));
            });
            network
        };
        assert_eq!(network(&[]).tunnel(PROXY).await, None);
        for (variables, tunnel) in [
            (&[][..], Some("t.test.invalid:3024")),
            (
                &[("TELEPORT_TUNNEL_PUBLIC_ADDR", "other.test.invalid:24")],
                Some("other.test.invalid:24"),
            ),
            (&[("TBOT_USE_PROXY_ADDR", "yes")], None),
        ] {
            let network = without_routing(variables);
            assert_eq!(
                network.tunnel(PROXY).await.as_deref(),
                tunnel,
                "{variables:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_known_of_alpn_is_believed_for_a_while() {
        let network = network(&[]);
        assert_eq!(network.hides_alpn(PROXY), None);
        let now = network.clock.now();
        network.note(PROXY, |known| known.hides_alpn = Some((true, now)));
        assert_eq!(network.hides_alpn(PROXY), Some(true));
        assert!(network.probe(PROXY).await);
        tokio::time::sleep(BELIEVED).await;
        assert_eq!(network.hides_alpn(PROXY), None);
    }
}
