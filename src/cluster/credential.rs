//! What a channel to the auth service presents and whom it believes.

use std::sync::Arc;

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
        let tls = builder(clock)?
            .with_root_certificates(roots)
            .with_client_auth_cert(vec![CertificateDer::from(certificate_der.to_vec())], key)
            .map_err(|source| unusable(source.to_string()))?;
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
    use super::*;
    use crate::identity::fixtures::Authority;

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
