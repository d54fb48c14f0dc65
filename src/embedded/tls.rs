//! The TLS configurations of the listeners, and the certificate of the web side.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use der::Decode as _;
use der::asn1::OctetString;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use serde_json::json;
use tokio::sync::watch;
use x509_cert::ext::pkix::KeyUsages;
use x509_cert::ext::pkix::name::GeneralName;

use super::ca::mint::{self, Issuer, MintError, SERVER_AUTH, Subject, Template};
use super::ca::{Authorities, Authority, AuthorityError, AuthorityType, BACKDATE};
use super::caller::{IdentityError, TlsIdentity};
use super::store::{Put, Resource, Store, StoreError};
use crate::clock::Clock;
use crate::crypto::x509::{COMMON_NAME, Certificate, ORGANIZATION};
use crate::crypto::{KeyAlgorithm, KeyError, PrivateKey, pem};

/// The kind under which the web authority is stored; its `spec` holds a private key.
const WEB_KIND: &str = "web_authority";
/// The life of the web authority.
const WEB_LIFE: Duration = Duration::from_hours(24 * 3650);
/// The life of a web certificate: the most that common clients accept from a private authority.
const LEAF_LIFE: Duration = Duration::from_hours(24 * 825);
/// The most that is read of a certificate or key file.
const MAX_FILE: u64 = 1024 * 1024;

/// Why the listeners have no certificates.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file given with `--tls-cert` or `--tls-key`, or the exported authority.
    #[error("cannot use {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// The file holds no certificate or no private key that is understood.
    #[error("{path} holds no {what} (PEM is expected)")]
    Content {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// The TLS library refused: mostly a key that does not belong to the certificate.
    #[error("the certificate of the {side} listener cannot be used: {source}")]
    Refused {
        /// `web` or `auth`.
        side: &'static str,
        /// The TLS library's reason.
        #[source]
        source: rustls::Error,
    },
    /// A certificate could not be made; mostly a public address with impossible characters.
    #[error("cannot make the web certificate: {0}")]
    Mint(#[from] MintError),
    /// A key could not be made or read.
    #[error("cannot make the key of the web certificate: {0}")]
    Key(#[from] KeyError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The host authority failed.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// The stored web authority is not what this program wrote. Remove it or restore a backup.
    #[error("the stored web authority is damaged: {0}")]
    Damaged(String),
}

/// A certificate chain (DER, leaf first) and its key.
#[derive(Debug)]
pub(super) struct WebCertificate {
    pub(super) chain: Vec<Vec<u8>>,
    pub(super) key: PrivateKey,
}

impl WebCertificate {
    /// Reads the files of `--tls-cert` and `--tls-key`.
    pub(super) fn read(cert: &Path, key: &Path) -> Result<Self, TlsError> {
        let content = |path: &Path, what| TlsError::Content {
            path: path.to_owned(),
            what,
        };
        let chain = pem::certificates(&read(cert)?)
            .ok()
            .filter(|chain| !chain.is_empty())
            .ok_or_else(|| content(cert, "certificate"))?;
        let key = PrivateKey::from_pem(&read(key)?)
            .map_err(|_source| content(key, "private key that is supported"))?;
        Ok(Self { chain, key })
    }

    /// Makes one for `names` (host names or IP addresses), signed by the cluster's web authority,
    /// which is made if it is missing and written to `export` for clients to trust.
    pub(super) fn make(
        store: &Store,
        cluster: &str,
        names: &[String],
        export: Option<&Path>,
        now: SystemTime,
    ) -> Result<Self, TlsError> {
        let (authority, authority_key) = web_authority(store, cluster, now)?;
        if let Some(path) = export {
            write(path, &pem::encode("CERTIFICATE", &authority)).map_err(|source| {
                TlsError::File {
                    path: path.to_owned(),
                    source,
                }
            })?;
        }
        let parsed = x509_cert::Certificate::from_der(&authority)
            .map_err(|error| TlsError::Damaged(error.to_string()))?
            .tbs_certificate;
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256)?;
        let names = names
            .iter()
            .map(|name| general_name(name))
            .collect::<Result<_, _>>()?;
        let leaf = Template {
            serial: mint::serial(),
            subject: Subject::default().one(COMMON_NAME, cluster)?.finish(),
            not_before: now - BACKDATE,
            not_after: (now + LEAF_LIFE).min(parsed.validity.not_after.to_system_time()),
            spki: &key.public_spki(),
            key_usage: KeyUsages::DigitalSignature.into(),
            extended: &[SERVER_AUTH],
            authority: false,
            names,
        }
        .sign(Issuer {
            name: &parsed.subject,
            key_id: Some(&mint::key_id(&authority_key.public_spki())?),
            key: &authority_key,
        })?;
        Ok(Self {
            chain: vec![leaf, authority],
            key,
        })
    }
}

/// The certificate (DER) and key of the web authority.
fn web_authority(
    store: &Store,
    cluster: &str,
    now: SystemTime,
) -> Result<(Vec<u8>, PrivateKey), TlsError> {
    let damaged = |what: String| TlsError::Damaged(what);
    if let Some(stored) = store.get(WEB_KIND, "web")? {
        let text = |key| {
            stored
                .spec
                .get(key)
                .and_then(|v| v.as_str())
                .unwrap_or_default()
        };
        let certificate =
            Certificate::from_pem(text("certificate")).map_err(|e| damaged(e.to_string()))?;
        let key = PrivateKey::from_pem(text("key")).map_err(|e| damaged(e.to_string()))?;
        return Ok((certificate.der().to_vec(), key));
    }
    let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256)?;
    let subject = Subject::default()
        .one(ORGANIZATION, cluster)?
        .one(COMMON_NAME, &format!("{cluster} web authority"))?
        .finish();
    let certificate = Template {
        serial: mint::serial(),
        subject: subject.clone(),
        not_before: now - BACKDATE,
        not_after: now + WEB_LIFE,
        spki: &key.public_spki(),
        key_usage: KeyUsages::KeyCertSign | KeyUsages::CRLSign | KeyUsages::DigitalSignature,
        extended: &[],
        authority: true,
        names: Vec::new(),
    }
    .sign(Issuer {
        name: &subject,
        key_id: None,
        key: &key,
    })?;
    let resource = Resource {
        kind: WEB_KIND.to_owned(),
        version: "v1".to_owned(),
        name: "web".to_owned(),
        spec: json!({
            "certificate": pem::encode("CERTIFICATE", &certificate),
            "key": key.to_pem().expose(),
        }),
        ..Resource::default()
    };
    store.put(resource, &Put::Create)?;
    Ok((certificate, key))
}

fn general_name(name: &str) -> Result<GeneralName, MintError> {
    match name.parse() {
        Ok(IpAddr::V4(ip)) => Ok(GeneralName::IpAddress(OctetString::new(ip.octets())?)),
        Ok(IpAddr::V6(ip)) => Ok(GeneralName::IpAddress(OctetString::new(ip.octets())?)),
        Err(_) => mint::dns(name),
    }
}

fn read(path: &Path) -> Result<String, TlsError> {
    let file = |source| TlsError::File {
        path: path.to_owned(),
        source,
    };
    if fs::metadata(path).map_err(file)?.len() > MAX_FILE {
        return Err(file(io::ErrorKind::FileTooLarge.into()));
    }
    fs::read_to_string(path).map_err(file)
}

/// Replaces a public file as a whole.
fn write(path: &Path, text: &str) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

/// The configurations of all listeners.
#[derive(Debug)]
pub(super) struct Tls {
    clock: Clock,
    authorities: Authorities,
    host_names: Vec<String>,
    auth: Mutex<Auth>,
    web: Arc<ServerConfig>,
    join: Arc<ServerConfig>,
    ssh: Arc<ServerConfig>,
}

/// The configuration of the auth side, which follows the authorities.
#[derive(Debug)]
struct Auth {
    changes: watch::Receiver<Arc<BTreeMap<AuthorityType, Authority>>>,
    config: Arc<ServerConfig>,
}

impl Tls {
    /// Sets everything up. `host_names` go into the auth certificate besides the internal ones.
    pub(super) fn new(
        authorities: &Authorities,
        web: &WebCertificate,
        host_names: Vec<String>,
        clock: &Clock,
    ) -> Result<Self, TlsError> {
        let config = |protocols: &[&str]| web_config(web, protocols, clock);
        let mut changes = authorities.subscribe();
        changes.mark_unchanged();
        let auth = Auth {
            changes,
            config: auth_config(authorities, &host_names, clock)?,
        };
        Ok(Self {
            clock: clock.clone(),
            authorities: authorities.clone(),
            host_names,
            auth: Mutex::new(auth),
            web: config(&["h2", "http/1.1"])?,
            join: config(&["h2"])?,
            ssh: config(&["teleport-reversetunnelv2", "teleport-reversetunnel"])?,
        })
    }

    pub(super) fn auth(&self) -> io::Result<Arc<ServerConfig>> {
        let mut auth = self.auth.lock().unwrap_or_else(PoisonError::into_inner);
        if auth.changes.has_changed().unwrap_or(false) {
            auth.changes.mark_unchanged();
            auth.config = auth_config(&self.authorities, &self.host_names, &self.clock)
                .map_err(io::Error::other)?;
        }
        Ok(Arc::clone(&auth.config))
    }

    pub(super) fn web(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.web)
    }

    pub(super) fn join(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.join)
    }

    pub(super) fn ssh(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.ssh)
    }

    /// Who showed these certificates; checked against the authorities as they are now.
    pub(super) fn identity(
        &self,
        chain: &[CertificateDer<'_>],
    ) -> Result<Option<TlsIdentity>, IdentityError> {
        self.authorities.identity(chain, self.clock.now())
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn key(key: &PrivateKey) -> PrivateKeyDer<'static> {
    PrivatePkcs8KeyDer::from(key.pkcs8_der().expose().clone()).into()
}

fn web_config(
    web: &WebCertificate,
    protocols: &[&str],
    clock: &Clock,
) -> Result<Arc<ServerConfig>, TlsError> {
    let refused = |source| TlsError::Refused {
        side: "web",
        source,
    };
    let chain = web
        .chain
        .iter()
        .map(|der| CertificateDer::from(der.clone()))
        .collect();
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .with_no_client_auth()
        .with_single_cert(chain, key(&web.key))
        .map_err(refused)?;
    config.alpn_protocols = protocols
        .iter()
        .map(|name| name.as_bytes().to_vec())
        .collect();
    Ok(Arc::new(config))
}

fn auth_config(
    authorities: &Authorities,
    names: &[String],
    clock: &Clock,
) -> Result<Arc<ServerConfig>, TlsError> {
    let refused = |source| TlsError::Refused {
        side: "auth",
        source,
    };
    let host = authorities.host_identity(names, clock.now())?;
    let mut roots = RootCertStore::empty();
    for kind in [AuthorityType::User, AuthorityType::Host] {
        for der in authorities.trusted_tls(kind) {
            roots.add(CertificateDer::from(der)).map_err(refused)?;
        }
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
        .allow_unauthenticated()
        .build()
        .map_err(|error| refused(rustls::Error::General(error.to_string())))?;
    let mut config = ServerConfig::builder_with_details(provider(), Arc::new(clock.clone()))
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![CertificateDer::from(host.certificate)], key(&host.key))
        .map_err(refused)?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    const NOW: SystemTime = UNIX_EPOCH;

    fn names() -> Vec<String> {
        ["localhost", "127.0.0.1", "::1"]
            .map(str::to_owned)
            .to_vec()
    }

    #[tokio::test(start_paused = true)]
    async fn the_web_authority_outlives_restarts_and_is_exported() {
        let now = NOW + Duration::from_secs(1_800_000_000);
        let store = Store::in_memory(Clock::simulated(now)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("web-ca.pem");
        let make = || WebCertificate::make(&store, "c", &names(), Some(&path), now).unwrap();
        let (first, second) = (make(), make());
        assert_eq!(first.chain[1], second.chain[1]);
        assert_ne!(first.chain[0], second.chain[0]);
        let exported = pem::certificates(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(exported, [first.chain[1].clone()]);
        let leaf = Certificate::from_der(&first.chain[0]).unwrap();
        let authority = Certificate::from_der(&first.chain[1]).unwrap();
        assert!(leaf.is_signed_by(&authority));
        assert!(leaf.is_for(&first.key));
        assert_eq!(leaf.dns_sans(), ["localhost"]);
        web_config(&first, &["h2"], &Clock::simulated(now)).unwrap();
    }

    #[test]
    fn files_that_are_no_certificate_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let [cert, key] = ["cert.pem", "key.pem"].map(|name| dir.path().join(name));
        let error = WebCertificate::read(&cert, &key).unwrap_err().to_string();
        assert!(error.contains("cert.pem"), "{error}");
        fs::write(&cert, "nothing").unwrap();
        let error = WebCertificate::read(&cert, &key).unwrap_err().to_string();
        assert!(error.contains("cert.pem holds no certificate"), "{error}");
    }
}
