//! TLS to an endpoint that shows an X.509-SVID (`SPIFFE_Federation.md` section 5.2.2, X509-SVID.md
//! section 5).

use std::sync::Arc;
use std::time::SystemTime;

use der::Decode as _;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme};
use x509_cert::ext::pkix::{KeyUsage, KeyUsages};

use crate::crypto::x509::Certificate;
use crate::spiffe::SpiffeId;

/// A client that talks to `id` alone, whose SVID one of `authorities` (DER) has issued. It shows no
/// certificate of its own.
///
/// # Errors
/// The TLS library's, for authorities that are none.
pub(super) fn client(
    id: &SpiffeId,
    authorities: &[Vec<u8>],
    now: SystemTime,
) -> Result<ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    for authority in authorities {
        roots.add(CertificateDer::from(authority.clone()))?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = SvidVerifier {
        provider: Arc::clone(&provider),
        roots,
        id: id.clone(),
        now: UnixTime::since_unix_epoch(
            now.duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default(),
        ),
    };
    Ok(ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth())
}

#[derive(Debug)]
struct SvidVerifier {
    provider: Arc<CryptoProvider>,
    roots: RootCertStore,
    id: SpiffeId,
    now: UnixTime,
}

impl ServerCertVerifier for SvidVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.roots,
            intermediates,
            self.now,
            self.provider.signature_verification_algorithms.all,
        )?;
        if !self.is_the_one(end_entity) {
            return Err(Error::General(format!(
                "the endpoint's certificate is no X.509-SVID of {}",
                self.id
            )));
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, cert, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, cert, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

impl SvidVerifier {
    /// Whether the certificate is an SVID of the endpoint: its one URI name, no authority, and not
    /// good for signing others.
    fn is_the_one(&self, der: &[u8]) -> bool {
        let Ok(leaf) = Certificate::from_der(der) else {
            return false;
        };
        let names_it = match leaf.uri_sans().as_slice() {
            [only] => only.parse::<SpiffeId>().as_ref() == Ok(&self.id),
            _ => false,
        };
        let signing = KeyUsages::KeyCertSign | KeyUsages::CRLSign;
        let may_sign = x509_cert::Certificate::from_der(der)
            .ok()
            .and_then(|parsed| parsed.tbs_certificate.get::<KeyUsage>().ok().flatten())
            .is_none_or(|(_, usage)| !usage.0.is_disjoint(signing));
        names_it && !leaf.is_ca() && !may_sign
    }
}
