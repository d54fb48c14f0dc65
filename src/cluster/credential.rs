//! What a channel to the auth service presents and whom it believes.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};

use super::ClusterError;
use super::trust::builder;
use super::tunnel::SshIdentity;
use crate::clock::Clock;
use crate::crypto::{PrivateKey, pem};

/// The domain of a cluster's internal names (upstream `api/constants`).
pub const API_DOMAIN: &str = "teleport.cluster.local";

/// `<hex of the cluster's name>.teleport.cluster.local`, the server name of its auth service.
pub fn encoded_cluster(cluster: &str) -> String {
    format!("{}.{API_DOMAIN}", hex::encode(cluster))
}

/// A client certificate with its key, and the authorities of the cluster.
#[derive(Debug, Clone)]
pub struct Credential {
    cluster: String,
    tls: Arc<ClientConfig>,
    /// For proxies that are passed by SSH only.
    ssh: Option<SshIdentity>,
}

impl Credential {
    /// Builds a credential from an identity's parts. `authorities` are PEM texts; `clock` says
    /// what is valid.
    pub fn new(
        clock: &Clock,
        cluster: &str,
        key: &PrivateKey,
        certificate_der: &[u8],
        authorities: &[String],
    ) -> Result<Self, ClusterError> {
        let unusable = |problem: String| ClusterError::Trust(format!("identity: {problem}"));
        let roots = roots_of(authorities)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.pkcs8_der().expose().clone()));
        let mut tls = builder(clock)?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![CertificateDer::from(certificate_der.to_vec())], key)
            .map_err(|source| unusable(source.to_string()))?;
        // A resumed session shows no certificate: each connection is judged anew.
        tls.resumption = Resumption::disabled();
        Ok(Self {
            cluster: cluster.to_owned(),
            tls: Arc::new(tls),
            ssh: None,
        })
    }

    /// The same with what proxies are shown that are passed by SSH only.
    #[must_use]
    pub(crate) fn with_ssh(mut self, ssh: SshIdentity) -> Self {
        self.ssh = Some(ssh);
        self
    }

    /// What such proxies are shown.
    pub(crate) fn ssh(&self) -> Option<&SshIdentity> {
        self.ssh.as_ref()
    }

    /// TLS settings for the auth service, with `protocols` as the ALPN list.
    pub(crate) fn tls(&self, protocols: Vec<Vec<u8>>) -> Arc<ClientConfig> {
        let mut config = ClientConfig::clone(&self.tls);
        config.alpn_protocols = protocols;
        Arc::new(config)
    }

    /// The name that the auth service's certificate must carry.
    pub(crate) fn server_name(&self) -> Result<ServerName<'static>, ClusterError> {
        ServerName::try_from(encoded_cluster(&self.cluster)).map_err(|_source| {
            ClusterError::Trust(format!("{:?} is no usable cluster name", self.cluster))
        })
    }

    /// The cluster's name.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }
}

/// A root store of PEM certificates. An authority that TLS cannot use is left out with a warning:
/// the others still are to be believed.
///
/// # Errors
/// Text that is no PEM, and a list without any usable authority.
pub(crate) fn roots_of(authorities: &[String]) -> Result<RootCertStore, ClusterError> {
    let unusable = |problem: &dyn std::fmt::Display| {
        ClusterError::Trust(format!("certificate authority: {problem}"))
    };
    let mut roots = RootCertStore::empty();
    let mut refused = None;
    for text in authorities {
        for der in pem::certificates(text).map_err(|source| unusable(&source))? {
            if let Err(error) = roots.add(CertificateDer::from(der)) {
                tracing::warn!(%error, "Leaving out a certificate authority that TLS cannot use");
                refused = Some(error);
            }
        }
    }
    match refused {
        Some(error) if roots.is_empty() => Err(unusable(&error)),
        _ => Ok(roots),
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;
    use std::time::Duration;

    use rustls::server::ProducesTickets;
    use rustls::{HandshakeKind, ServerConfig};
    use tokio_rustls::{TlsAcceptor, TlsConnector};
    use x509_cert::ext::pkix::KeyUsages;

    use super::*;
    use crate::crypto::KeyAlgorithm;
    use crate::embedded::ca::mint::{self, Issuer, Template};
    use crate::identity::fixtures::{Authority, start};

    /// An auth service whose certificate `authority` signed; sessions of whoever else has `tickets`
    /// can be resumed with it.
    fn auth_service(authority: &Authority, tickets: &Arc<dyn ProducesTickets>) -> TlsAcceptor {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let spki = key.public_spki();
        let name = format!("O={0},CN={0}", authority.cluster).parse().unwrap();
        let template = Template {
            serial: mint::serial(),
            subject: "CN=auth".parse().unwrap(),
            not_before: start(),
            not_after: start() + Duration::from_hours(100),
            spki: &spki,
            key_usage: KeyUsages::DigitalSignature.into(),
            extended: &[],
            authority: false,
            names: vec![mint::dns(&encoded_cluster(&authority.cluster)).unwrap()],
        };
        let leaf = template.sign(Issuer {
            name: &name,
            key_id: None,
            key: &authority.key,
        });
        let key = PrivatePkcs8KeyDer::from(key.pkcs8_der().expose().clone());
        let mut config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.unwrap().into()], key.into())
            .unwrap();
        config.ticketer = Arc::clone(tickets);
        TlsAcceptor::from(Arc::new(config))
    }

    /// How the handshake of one more connection to `server` went.
    async fn handshake(
        credential: &Credential,
        server: &TlsAcceptor,
    ) -> std::io::Result<HandshakeKind> {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (near, far) = tokio::io::duplex(64 * 1024);
        let server = server.clone();
        tokio::spawn(async move {
            let mut stream = server.accept(far).await?;
            // The tickets come with it.
            stream.write_all(b"!").await?;
            stream.shutdown().await
        });
        let connector = TlsConnector::from(credential.tls(vec![]));
        let mut stream = connector
            .connect(credential.server_name().unwrap(), near)
            .await?;
        stream.read_u8().await?;
        Ok(stream.get_ref().1.handshake_kind().unwrap())
    }

    #[tokio::test]
    async fn sessions_are_not_resumed_so_that_a_rotated_authority_is_noticed() {
        let (old, new) = (Authority::new("root"), Authority::new("root"));
        let clock = Clock::simulated(start() + Duration::from_hours(1));
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let identity = old.identity(key, 1, start() + Duration::from_mins(30));
        let trusting = |authority: &Authority| {
            let (key, der) = (identity.key(), identity.tls().der());
            Credential::new(&clock, "root", key, der, from_ref(&authority.pem)).unwrap()
        };
        let tickets = rustls::crypto::aws_lc_rs::Ticketer::new().unwrap();
        let (before, after) = (auth_service(&old, &tickets), auth_service(&new, &tickets));
        let held = trusting(&old);
        for _ in 0..3 {
            let kind = handshake(&held, &before).await.unwrap();
            assert_eq!(kind, HandshakeKind::Full, "nothing was resumed");
        }
        // It could resume what the one before began, but its authority is not known here.
        let refused = |result: std::io::Result<HandshakeKind>| {
            let text = result.unwrap_err().to_string();
            assert!(text.contains("certificate"), "{text}");
        };
        refused(handshake(&held, &after).await);
        // After the renewal it is the other way round.
        let renewed = trusting(&new);
        handshake(&renewed, &after).await.unwrap();
        refused(handshake(&renewed, &before).await);
    }

    #[test]
    fn cluster_names_are_hex_encoded() {
        assert_eq!(encoded_cluster("root"), "726f6f74.teleport.cluster.local");
    }

    #[test]
    fn an_unusable_authority_does_not_take_the_others_away() {
        let (good, bad) = (Authority::new("root").pem, Authority::unusable("root").pem);
        let roots = roots_of(&[bad.clone(), good.clone(), bad.clone() + &good]).unwrap();
        assert_eq!(roots.len(), 2);
        assert!(roots_of(&[bad.clone(), bad]).is_err());
        assert!(roots_of(&["-----BEGIN CERTIFICATE-----\n!".to_owned()]).is_err());
        assert!(roots_of(&[]).unwrap().is_empty());
    }
}
