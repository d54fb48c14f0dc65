//! What a channel to the auth service presents and whom it believes.

use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};

use super::ClusterError;
use super::trust::builder;
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
        })
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

/// A root store of PEM certificates.
pub(crate) fn roots_of(authorities: &[String]) -> Result<RootCertStore, ClusterError> {
    let mut roots = RootCertStore::empty();
    for text in authorities {
        let ders = pem::certificates(text)
            .map_err(|source| ClusterError::Trust(format!("certificate authority: {source}")))?;
        for der in ders {
            roots.add(CertificateDer::from(der)).map_err(|source| {
                ClusterError::Trust(format!("certificate authority: {source}"))
            })?;
        }
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_names_are_hex_encoded() {
        assert_eq!(encoded_cluster("root"), "726f6f74.teleport.cluster.local");
    }
}
