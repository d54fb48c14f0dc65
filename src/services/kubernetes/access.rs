//! What the kinds of Kubernetes output need to know of the proxy and of the place they write to.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Once;

use anyhow::{Context as _, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

use super::kubeconfig::Login;
use crate::cluster::Endpoints;
use crate::cluster::dial::host_of;
use crate::crypto::x509::{COMMON_NAME, Certificate};
use crate::destination::Destination;
use crate::identity::Identity;
use crate::secret::Secret;
use crate::services::authorities::Authority;
use crate::services::program::{program, text};

/// What the proxy tells Kubernetes apart by, before its own name.
const SERVER_NAME: &str = "kube-teleport-proxy-alpn.";
/// The name of a proxy that has none.
const NAMELESS: &str = "teleport.cluster.local";

/// Where the proxy serves Kubernetes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::services) struct Address {
    /// Its URL, without a path.
    pub(in crate::services) url: String,
    /// The name to ask for in TLS, if it is not that of the URL.
    pub(in crate::services) server_name: Option<String>,
}

impl Address {
    pub(in crate::services) fn of(endpoints: &Endpoints) -> anyhow::Result<Self> {
        let (address, server_name) = if endpoints.tls_routing {
            let address = endpoints.ssh_address.as_deref();
            let named = address.map(host_of).filter(|host| {
                !host.is_empty() && *host != "localhost" && host.parse::<IpAddr>().is_err()
            });
            (
                address,
                Some(format!("{SERVER_NAME}{}", named.unwrap_or(NAMELESS))),
            )
        } else {
            (endpoints.kubernetes_address.as_deref(), None)
        };
        let address = address.context(
            "the proxy does not say where it serves Kubernetes: set kube_listen_addr or \
             kube_public_addr in its proxy_service section, or turn TLS routing on",
        )?;
        Ok(Self {
            url: format!("https://{address}"),
            server_name,
        })
    }

    /// The URL of one of several clusters, which the proxy tells apart by the path.
    pub(in crate::services) fn of_cluster(&self, cluster: &str, kubernetes: &str) -> String {
        let [cluster, kubernetes] = [cluster, kubernetes].map(|name| URL_SAFE_NO_PAD.encode(name));
        format!("{}/v1/teleport/{cluster}/{kubernetes}", self.url)
    }
}

/// The certificates that the proxy's own one is judged by: those of the cluster that issued
/// `identity`, with an empty line between them. Leaf clusters are reached through it, not directly.
pub(in crate::services) fn trusted(
    identity: &Identity,
    hosts: &[Authority],
) -> anyhow::Result<String> {
    let issuer = identity.tls().issuer(COMMON_NAME);
    let all = hosts.iter().flat_map(|host| &host.tls);
    let mut own = Vec::new();
    for pem in all {
        let certificate = Certificate::from_pem(pem).context("a host authority is unreadable")?;
        if certificate.subject(COMMON_NAME) == issuer {
            own.push(pem.as_str());
        }
    }
    ensure!(
        !own.is_empty(),
        "the cluster lists no host authority of {issuer:?}, which issued the certificate"
    );
    Ok(own.join("\n"))
}

/// Chooses how a kubeconfig's user is known.
#[derive(Debug)]
pub(in crate::services) struct Logins {
    program: PathBuf,
    plugin: bool,
    told: Once,
}

impl Logins {
    pub(in crate::services) fn new(disable_exec_plugin: bool) -> Self {
        Self {
            program: program(),
            plugin: !disable_exec_plugin,
            told: Once::new(),
        }
    }

    /// The plugin where it is wanted and there is a directory that it can read; otherwise the
    /// certificate and `key` themselves.
    pub(in crate::services) fn choose<'a>(
        &'a self,
        destination: &'a dyn Destination,
        identity: &'a Identity,
        key: &'a Secret<String>,
    ) -> anyhow::Result<Login<'a>> {
        match destination.directory() {
            Some(directory) if self.plugin => {
                return Ok(Login::Plugin {
                    program: text(&self.program)?,
                    directory: text(directory)?,
                });
            }
            None if self.plugin => self.told.call_once(|| {
                tracing::info!(
                    "The destination is no directory, which kubectl's plugin would read: the \
                     kubeconfig holds the certificate itself (as with disable_exec_plugin)"
                );
            }),
            Some(_) | None => {}
        }
        Ok(Login::Embedded {
            certificate: identity.tls_pem(),
            key: key.expose(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{KeyAlgorithm, Suite};
    use crate::services::artifacts::tests::facts;

    fn endpoints(tls_routing: bool, address: Option<&str>, kubernetes: Option<&str>) -> Endpoints {
        Endpoints {
            cluster_name: "root".to_owned(),
            server_version: "18.0.0".to_owned(),
            suite: Suite::BalancedV1,
            tls_routing,
            ssh_address: address.map(str::to_owned),
            web_address: None,
            tunnel_address: None,
            kubernetes_address: kubernetes.map(str::to_owned),
        }
    }

    #[test]
    fn the_proxys_address_and_the_name_to_ask_for() {
        let nameless = "kube-teleport-proxy-alpn.teleport.cluster.local";
        for (routing, address, kubernetes, expected) in [
            (
                true,
                Some("p.example.org:443"),
                None,
                Some((
                    "https://p.example.org:443",
                    Some("kube-teleport-proxy-alpn.p.example.org"),
                )),
            ),
            (
                true,
                Some("localhost:1"),
                None,
                Some(("https://localhost:1", Some(nameless))),
            ),
            (
                true,
                Some("127.0.0.1:1"),
                None,
                Some(("https://127.0.0.1:1", Some(nameless))),
            ),
            (
                true,
                Some("[::1]:1"),
                None,
                Some(("https://[::1]:1", Some(nameless))),
            ),
            (true, None, Some("k:3026"), None),
            (
                false,
                Some("p:3023"),
                Some("k:3026"),
                Some(("https://k:3026", None)),
            ),
            (false, Some("p:3023"), None, None),
        ] {
            let found = Address::of(&endpoints(routing, address, kubernetes)).ok();
            let expected = expected.map(|(url, server_name)| Address {
                url: url.to_owned(),
                server_name: server_name.map(str::to_owned),
            });
            assert_eq!(found, expected, "{routing} {address:?} {kubernetes:?}");
        }
    }

    #[test]
    fn only_the_issuing_cluster_is_believed_and_both_its_keys_during_a_rotation() {
        let (identity, mut authorities) = facts(KeyAlgorithm::EcdsaP256);
        let root = authorities.hosts[1].tls[0].clone();
        assert_eq!(trusted(&identity, &authorities.hosts).unwrap(), root);
        authorities.hosts[1].tls.push(root.clone());
        let both = trusted(&identity, &authorities.hosts).unwrap();
        assert_eq!(both, format!("{root}\n{root}"));
        assert!(trusted(&identity, &authorities.hosts[..1]).is_err());
    }

    #[test]
    fn the_plugin_needs_a_directory() {
        let (identity, _) = facts(KeyAlgorithm::EcdsaP256);
        let key = identity.key().to_pem();
        for (uri, disabled, plugin) in [
            ("/opt/machine-id", false, true),
            ("/opt/machine-id", true, false),
            ("memory://", false, false),
        ] {
            let destination = crate::destination::from_uri(uri).unwrap().build();
            let logins = Logins::new(disabled);
            let login = logins
                .choose(destination.as_ref(), &identity, &key)
                .unwrap();
            match login {
                Login::Plugin { directory, .. } => assert!(plugin && directory == uri),
                Login::Embedded { certificate, .. } => {
                    assert!(!plugin && certificate == identity.tls_pem());
                }
            }
        }
    }
}
