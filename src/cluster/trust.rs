//! Whom to believe before there is an identity: system roots for a proxy, pins or a CA file for an
//! auth service, nobody with `insecure`.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WantsClientCert};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, RootCertStore,
    SignatureScheme, WantsVerifier,
};

use super::ClusterError;
use super::client::Route;
use super::credential::API_DOMAIN;
use crate::clock::Clock;
use crate::crypto::x509::Certificate;
use crate::crypto::{pem, sha256_hex};
use crate::secret::Secret;

/// How a first connection is judged.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Trust {
    /// Believe any server. Loud, for trials only.
    pub insecure: bool,
    /// `sha256:<hex>` pins of the auth service's authorities.
    pub ca_pins: Vec<String>,
    /// A PEM file with the authority of the auth service.
    pub ca_path: Option<PathBuf>,
}

impl Trust {
    /// Whether the auth service's authority is named, by a pin or a file.
    pub fn names_authority(&self) -> bool {
        !self.ca_pins.is_empty() || self.ca_path.is_some()
    }

    /// Whether a first contact by `route` believes only somebody in particular.
    pub fn verifies(&self, route: &Route) -> bool {
        !self.insecure && (matches!(route, Route::Proxy(_)) || self.names_authority())
    }

    /// TLS settings for a proxy's web certificate: the system's roots, or anyone if insecure.
    pub fn web(
        &self,
        clock: &Clock,
        protocols: &[&[u8]],
    ) -> Result<Arc<ClientConfig>, ClusterError> {
        let config = if self.insecure {
            believing(clock, None)?.with_no_client_auth()
        } else {
            builder(clock)?
                .with_root_certificates(system_roots()?.as_ref().clone())
                .with_no_client_auth()
        };
        Ok(with_alpn(config, protocols))
    }

    /// TLS settings for a proxy's shared port inside of an upgraded connection. The load balancer's
    /// certificate was judged outside already; here the proxy may show what only clusters have.
    pub(crate) fn behind_upgrade(
        &self,
        clock: &Clock,
        protocols: &[&[u8]],
    ) -> Result<Arc<ClientConfig>, ClusterError> {
        if self.insecure {
            return self.web(clock, protocols);
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let config = builder(clock)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone {
                provider,
                named: Some(API_DOMAIN),
            }))
            .with_no_client_auth();
        Ok(with_alpn(config, protocols))
    }

    /// TLS settings for an auth service whose authorities are `roots`; `None` believes anyone.
    pub fn auth(
        clock: &Clock,
        roots: Option<RootCertStore>,
        protocols: &[&[u8]],
    ) -> Result<Arc<ClientConfig>, ClusterError> {
        let config = believing(clock, roots)?.with_no_client_auth();
        Ok(with_alpn(config, protocols))
    }

    /// The same for a server that wants to see a certificate: `chain` is PEM, `key` in any form that
    /// TLS libraries write.
    pub(crate) fn with_certificate(
        clock: &Clock,
        roots: Option<RootCertStore>,
        chain: &str,
        key: &Secret<String>,
        protocols: &[&[u8]],
    ) -> Result<Arc<ClientConfig>, ClusterError> {
        let unusable =
            |problem: String| ClusterError::Trust(format!("client certificate: {problem}"));
        let chain = pem::certificates(chain).map_err(|source| unusable(source.to_string()))?;
        let chain = chain.into_iter().map(CertificateDer::from).collect();
        let key = PrivateKeyDer::from_pem_slice(key.expose().as_bytes())
            .map_err(|_contents| unusable("its private key is no PEM of a private key".into()))?;
        let config = believing(clock, roots)?
            .with_client_auth_cert(chain, key)
            .map_err(|source| unusable(source.to_string()))?;
        Ok(with_alpn(config, protocols))
    }
}

/// Checks the authorities that a cluster showed against the pins: every one must match some pin,
/// and be valid at `now`.
pub fn check_pins(
    authorities_pem: &str,
    pins: &[String],
    now: SystemTime,
) -> Result<Vec<String>, ClusterError> {
    for pin in pins {
        if !is_pin(pin) {
            return Err(ClusterError::Trust(format!(
                "ca_pins: {pin:?} is not a pin ({PIN_FORM})"
            )));
        }
    }
    let ders = pem::certificates(authorities_pem)
        .map_err(|source| ClusterError::Trust(format!("the cluster's authorities: {source}")))?;
    if ders.is_empty() {
        return Err(ClusterError::Trust(
            "the cluster showed no authorities to compare with ca_pins".into(),
        ));
    }
    for der in &ders {
        let certificate = Certificate::from_der(der).map_err(|source| {
            ClusterError::Trust(format!("the cluster's authorities: {source}"))
        })?;
        let pin = format!("sha256:{}", sha256_hex(&certificate.spki()));
        if !pins.iter().any(|known| known.eq_ignore_ascii_case(&pin)) {
            return Err(ClusterError::Trust(format!(
                "the cluster's certificate authority has pin {pin}, which is not among ca_pins: \
                 either the pins are out of date (compare with `tctl status`) or someone stands between"
            )));
        }
        if now < certificate.not_before() || certificate.not_after() <= now {
            return Err(ClusterError::Trust(format!(
                "the cluster's certificate authority with pin {pin} is not valid now: is the clock \
                 of this machine right?"
            )));
        }
    }
    Ok(ders
        .iter()
        .map(|der| pem::encode("CERTIFICATE", der))
        .collect())
}

/// What a pin looks like, for messages.
pub const PIN_FORM: &str = "`sha256:` and 64 hexadecimal digits, as `tctl status` prints it";

/// Whether a text has the form of a pin. Upstream wants the digits in lower case, as they are
/// printed; here both count.
pub fn is_pin(text: &str) -> bool {
    text.strip_prefix("sha256:")
        .is_some_and(|hex| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn with_alpn(mut config: ClientConfig, protocols: &[&[u8]]) -> Arc<ClientConfig> {
    config.resumption = Resumption::disabled();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    Arc::new(config)
}

/// The system's roots, read once. `SSL_CERT_FILE` and `SSL_CERT_DIR` are honoured.
fn system_roots() -> Result<Arc<RootCertStore>, ClusterError> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    let roots = ROOTS.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        Arc::new(roots)
    });
    if roots.is_empty() {
        return Err(ClusterError::Trust(
            "no trusted certificate authorities on this machine: install ca-certificates or set SSL_CERT_FILE"
                .into(),
        ));
    }
    Ok(Arc::clone(roots))
}

/// The start of every TLS configuration: one provider, and the program's clock.
pub(super) fn builder(
    clock: &Clock,
) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, ClusterError> {
    ClientConfig::builder_with_details(
        Arc::new(aws_lc_rs::default_provider()),
        Arc::new(clock.clone()),
    )
    .with_safe_default_protocol_versions()
    .map_err(|source| ClusterError::Trust(source.to_string()))
}

/// Believes who has a certificate of `roots`; with `None`, anyone.
fn believing(
    clock: &Clock,
    roots: Option<RootCertStore>,
) -> Result<ConfigBuilder<ClientConfig, WantsClientCert>, ClusterError> {
    let builder = builder(clock)?;
    Ok(match roots {
        Some(roots) => builder.with_root_certificates(roots),
        None => builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(Anyone {
                provider: Arc::new(aws_lc_rs::default_provider()),
                named: None,
            })),
    })
}

/// Believes every issuer, but still makes the server prove that it holds its key.
struct Anyone {
    provider: Arc<CryptoProvider>,
    /// A DNS name that the certificate must have; it must not have expired then.
    named: Option<&'static str>,
}

impl fmt::Debug for Anyone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Anyone")
    }
}

impl ServerCertVerifier for Anyone {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(name) = self.named else {
            return Ok(ServerCertVerified::assertion());
        };
        let certificate =
            Certificate::from_der(end_entity).map_err(|_source| CertificateError::BadEncoding)?;
        if !certificate.dns_sans().iter().any(|known| known == name) {
            return Err(CertificateError::NotValidForName.into());
        }
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(now.as_secs());
        if certificate.not_after() <= now {
            return Err(CertificateError::Expired.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{KeyAlgorithm, PrivateKey};
    use crate::embedded::ca::mint::{self, Issuer, Subject, Template};
    use crate::identity::fixtures::{Authority, start};

    fn now() -> SystemTime {
        start() + Duration::from_hours(1)
    }

    #[test]
    fn only_somebody_in_particular_is_believed_unless_told_otherwise() {
        let (proxy, auth) = (Route::Proxy("a:1".into()), Route::Direct("a:1".into()));
        let insecure = Trust {
            insecure: true,
            ..Trust::default()
        };
        let pinned = Trust {
            ca_pins: vec!["sha256:".to_owned() + &"0".repeat(64)],
            ..Trust::default()
        };
        let verifies = |trust: &Trust| [trust.verifies(&proxy), trust.verifies(&auth)];
        assert_eq!(verifies(&Trust::default()), [true, false]);
        assert_eq!(verifies(&insecure), [false, false]);
        assert_eq!(verifies(&pinned), [true, true]);
    }

    #[test]
    fn inside_an_upgraded_connection_only_a_cluster_s_certificate_counts() {
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap();
        let name = Subject::default().finish();
        let spki = key.public_spki();
        let leaf = |host: &str| {
            let template = Template {
                serial: mint::serial(),
                subject: name.clone(),
                not_before: start(),
                not_after: start() + Duration::from_hours(2),
                spki: &spki,
                key_usage: x509_cert::ext::pkix::KeyUsages::DigitalSignature.into(),
                extended: &[],
                authority: false,
                names: vec![mint::dns(host).unwrap()],
            };
            let issuer = Issuer {
                name: &name,
                key_id: None,
                key: &key,
            };
            template.sign(issuer).unwrap()
        };
        let verifier = Anyone {
            provider: Arc::new(aws_lc_rs::default_provider()),
            named: Some(API_DOMAIN),
        };
        let verify = |der: Vec<u8>, at: SystemTime| {
            let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap();
            verifier
                .verify_server_cert(
                    &der.into(),
                    &[],
                    &ServerName::try_from("proxy.example.org").unwrap(),
                    &[],
                    UnixTime::since_unix_epoch(since),
                )
                .is_ok()
        };
        assert!(verify(leaf(API_DOMAIN), now()));
        assert!(!verify(leaf("proxy.example.org"), now()), "another name");
        let late = start() + Duration::from_hours(2);
        assert!(!verify(leaf(API_DOMAIN), late), "expired");
        assert!(!verify(vec![0x30, 0x00], now()), "no certificate");
    }

    #[test]
    fn an_authority_that_is_over_is_not_believed_for_its_pin() {
        let authority = Authority::new("root");
        let pin = format!("sha256:{}", sha256_hex(&authority.key.public_spki()));
        let pins = [pin];
        assert!(check_pins(&authority.pem, &pins, now()).is_ok());
        for wrong in [
            start() - Duration::from_hours(1),
            start() + Duration::from_hours(2000),
        ] {
            let error = check_pins(&authority.pem, &pins, wrong).unwrap_err();
            assert!(error.to_string().contains("not valid now"), "{error}");
        }
    }

    #[test]
    fn pins_are_checked_for_form() {
        for good in ["0a", "0A", "f9"] {
            assert!(is_pin(&format!("sha256:{}", good.repeat(32))), "{good}");
        }
        for bad in [
            "",
            "sha256:",
            "sha1:00",
            "sha256:XY",
            &"0a".repeat(32),
            &format!("sha256:{}", "0g".repeat(32)),
            &format!("sha256:{}", "0a".repeat(33)),
        ] {
            assert!(!is_pin(bad), "{bad}");
            assert!(check_pins("", &[bad.to_owned()], now()).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_case_of_a_pin_does_not_matter() {
        let authority = Authority::new("root");
        let digits = sha256_hex(&authority.key.public_spki());
        let pin = format!("sha256:{digits}");
        let upper = format!("sha256:{}", digits.to_uppercase());
        let other = format!("sha256:{}", "0a".repeat(32));
        assert_ne!(pin, upper);
        for pin in [pin, upper] {
            assert_eq!(check_pins(&authority.pem, &[pin], now()).unwrap().len(), 1);
        }
        assert!(check_pins(&authority.pem, &[other], now()).is_err());
    }

    #[test]
    fn authorities_without_certificates_match_no_pin() {
        let pins = [format!("sha256:{}", "0a".repeat(32))];
        assert!(check_pins("", &pins, now()).is_err());
    }
}
