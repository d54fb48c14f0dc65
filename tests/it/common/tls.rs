//! Servers with a certificate of their own making.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::{OutputText as _, Sandbox};

/// A certificate that is its own authority, and its key.
pub(crate) struct SelfSigned {
    pub(crate) certificate: PathBuf,
    pub(crate) key: PathBuf,
}

impl SelfSigned {
    /// Makes `<name>.crt` and `<name>.key` for a host of these names (`DNS:localhost` for example).
    pub(crate) fn new(sandbox: &Sandbox, name: &str, names: &str) -> Self {
        let certificate = sandbox.path(format!("{name}.crt"));
        let key = sandbox.path(format!("{name}.key"));
        let mut openssl = sandbox.command("openssl");
        openssl
            .args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "2"])
            .args(["-pkeyopt", "ec_paramgen_curve:P-256"])
            .args(["-subj", &format!("/CN={name}")])
            .args(["-addext", "basicConstraints=critical,CA:FALSE"])
            .args(["-addext", &format!("subjectAltName={names}")])
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&certificate);
        openssl.output().unwrap().success();
        Self { certificate, key }
    }

    /// A server with it. With `clients`, it asks for certificates of that authority, and serves those who
    /// have none too.
    pub(crate) fn acceptor(&self, clients: Option<&Path>) -> TlsAcceptor {
        let builder = match clients {
            None => ServerConfig::builder().with_no_client_auth(),
            Some(authority) => {
                let mut roots = RootCertStore::empty();
                let authority = CertificateDer::from_pem_file(authority).unwrap();
                roots.add(authority).unwrap();
                let verifier = WebPkiClientVerifier::builder(Arc::new(roots));
                let verifier = verifier.allow_unauthenticated().build().unwrap();
                ServerConfig::builder().with_client_cert_verifier(verifier)
            }
        };
        let config = builder
            .with_single_cert(
                vec![CertificateDer::from_pem_file(&self.certificate).unwrap()],
                PrivateKeyDer::from_pem_file(&self.key).unwrap(),
            )
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }
}
