//! The cluster's authorities: made once, kept in the store, used for every certificate.
//!
//! Types, algorithms and fields are those of a Teleport 18.0.0 cluster (`api/types/trust.go`,
//! `lib/cryptosuites/suites.go`), with one addition: the SPIFFE authority names its trust domain
//! in a URI, and may sign certificates only, as the X.509-SVID standard asks.

mod keys;
pub mod mint;
mod rotation;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use uuid::Uuid;

pub use keys::{Authority, KeySet, TlsAuthority};
use mint::{CLIENT_AUTH, MintError, SERVER_AUTH, Subject, Template};
pub use rotation::{GRACE, Mode, Phase, RotationError, Step, describe};
use x509_cert::ext::pkix::KeyUsages;

use super::caller::{IdentityError, TlsIdentity};
use super::store::{Put, Store, StoreError};
use crate::crypto::ssh::{Holder, NewCertificate, wire_of_line};
use crate::crypto::x509::{COMMON_NAME, Certificate, ORGANIZATION};
use crate::crypto::{KeyAlgorithm, KeyError, PrivateKey, Purpose, Suite, random, sha256_hex};
use crate::pb::types as wire;

/// The kind under which authorities are stored. Their `spec` holds private keys: no command and
/// no call may hand these resources out.
pub const KIND: &str = "authority_keys";

/// The domain of every cluster's internal DNS names.
pub const API_DOMAIN: &str = "teleport.cluster.local";

/// How far back certificates start, for clocks that are behind.
pub const BACKDATE: Duration = Duration::from_mins(1);
/// The life of the certificate that the proxy's SSH side shows to one connection.
const SSH_HOST_LIFE: Duration = Duration::from_hours(1);

/// What an authority signs. The names are the wire's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AuthorityType {
    /// Servers of the cluster (TLS and SSH).
    Host,
    /// Users and bots (TLS and SSH).
    User,
    /// Workload identities (X.509 and JWT).
    Spiffe,
    /// Tokens for applications.
    Jwt,
    /// Database servers.
    Db,
    /// The cluster as a client of databases.
    DbClient,
    /// The join states of bots that join with a bound keypair (JWT).
    BoundKeypair,
}

impl AuthorityType {
    /// Every type that this cluster has.
    pub const ALL: [Self; 7] = [
        Self::Host,
        Self::User,
        Self::Spiffe,
        Self::Jwt,
        Self::Db,
        Self::DbClient,
        Self::BoundKeypair,
    ];

    /// The wire's name, for example `db_client`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::User => "user",
            Self::Spiffe => "spiffe",
            Self::Jwt => "jwt",
            Self::Db => "db",
            Self::DbClient => "db_client",
            Self::BoundKeypair => "bound_keypair",
        }
    }

    /// The type of a wire name; `None` if this cluster has no such authority.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// Why authorities could not be made or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A key could not be made.
    #[error("cannot make a key for the cluster's {kind} authority: {source}")]
    Key {
        /// The type of the authority.
        kind: &'static str,
        /// The crypto library's reason.
        #[source]
        source: KeyError,
    },
    /// A certificate could not be made; mostly a cluster name with impossible characters.
    #[error("cannot make the certificate of the cluster's {kind} authority: {source}")]
    Mint {
        /// The type of the authority.
        kind: &'static str,
        /// What cannot be encoded.
        #[source]
        source: MintError,
    },
    /// The stored authority is not what this program wrote. Restore the data directory.
    #[error("the stored {kind} authority is damaged: {what}")]
    Damaged {
        /// The type of the authority.
        kind: String,
        /// Which part.
        what: &'static str,
    },
}

/// The certificate and key of one of the cluster's servers.
#[derive(Debug, Clone)]
pub struct HostIdentity {
    /// The certificate: DER, or SSH's binary form.
    pub certificate: Vec<u8>,
    /// Its key.
    pub key: PrivateKey,
}

type Snapshot = Arc<BTreeMap<AuthorityType, Authority>>;

/// The authorities of one cluster; clones share them.
#[derive(Debug, Clone)]
pub struct Authorities(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    cluster: String,
    suite: Suite,
    current: watch::Sender<Snapshot>,
    /// Held while a rotation takes a step, so that steps are told in their order.
    rotating: Mutex<()>,
}

impl Authorities {
    /// Reads the authorities from `store`; those that are missing are made and stored first, all
    /// in one transaction. Making RSA keys takes seconds: off the async threads, please.
    ///
    /// # Errors
    /// [`AuthorityError`]; nothing is stored then.
    pub fn open(
        store: &Store,
        cluster: &str,
        suite: Suite,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let mut current = BTreeMap::new();
        for resource in store.list(KIND)? {
            let authority = Authority::from_resource(&resource)?;
            current.insert(authority.kind, authority);
        }
        let made = std::thread::scope(|scope| {
            let workers: Vec<_> = AuthorityType::ALL
                .into_iter()
                .filter(|kind| !current.contains_key(kind))
                .map(|kind| scope.spawn(move || Authority::make(kind, cluster, suite, now)))
                .collect();
            workers
                .into_iter()
                .map(|worker| {
                    worker
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                })
                .collect::<Result<Vec<_>, _>>()
        })?;
        store.transaction(|tx| {
            for authority in &made {
                tx.put(authority.to_resource(), &Put::Create)?;
            }
            Ok::<_, StoreError>(())
        })?;
        current.extend(
            made.into_iter()
                .map(|authority| (authority.kind, authority)),
        );
        Ok(Self(Arc::new(Inner {
            cluster: cluster.to_owned(),
            suite,
            current: watch::Sender::new(Arc::new(current)),
            rotating: Mutex::default(),
        })))
    }

    /// The cluster's name.
    #[must_use]
    pub fn cluster(&self) -> &str {
        &self.0.cluster
    }

    /// The suite that new keys follow.
    #[must_use]
    pub fn suite(&self) -> Suite {
        self.0.suite
    }

    /// One authority as it is now.
    ///
    /// # Panics
    /// Never: [`Authorities::open`] makes all types.
    #[must_use]
    #[expect(clippy::expect_used, reason = "every type is there after `open`")]
    pub fn get(&self, kind: AuthorityType) -> Authority {
        let current = self.0.current.borrow();
        current
            .get(&kind)
            .cloned()
            .expect("an authority of each type")
    }

    /// Takes a step of the rotation of `kind`: stored first, then used and told to listeners.
    /// Making keys takes time and the store waits for the disk: off the async threads, please.
    ///
    /// # Errors
    /// [`RotationError`]; nothing has changed then.
    pub fn rotate(
        &self,
        store: &Store,
        kind: AuthorityType,
        step: Step,
        now: SystemTime,
    ) -> Result<Authority, RotationError> {
        let rotating = self.0.rotating.lock();
        let _one_at_a_time = rotating.unwrap_or_else(PoisonError::into_inner);
        let current = self.get(kind);
        let new = match step.to {
            Phase::Init => Authority::make(kind, &self.0.cluster, self.0.suite, now)?.active,
            _ => KeySet::default(),
        };
        let mut next = current.after(step, new, now)?;
        while step.mode == Mode::Auto && step.grace.is_zero() && next.phase() != Phase::Standby {
            let to = next.due().map_or(Phase::Standby, |(_, phase)| phase);
            next = next.after(Step { to, ..step }, KeySet::default(), now)?;
        }
        store.put(next.to_resource(), &Put::Upsert)?;
        self.0.current.send_modify(|current| {
            Arc::make_mut(current).insert(kind, next.clone());
        });
        Ok(next)
    }

    /// The next step of a scheduled rotation: when, of which authority, and to which phase.
    #[must_use]
    pub fn due(&self) -> Option<(SystemTime, AuthorityType, Phase)> {
        let current = self.0.current.borrow();
        let due = current.values().filter_map(|authority| {
            authority
                .due()
                .map(|(at, phase)| (at, authority.kind, phase))
        });
        due.min_by_key(|(at, ..)| *at)
    }

    /// Hears whenever an authority changes.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Arc<BTreeMap<AuthorityType, Authority>>> {
        self.0.current.subscribe()
    }

    /// TLS certificates (DER) that vouch for certificates of this type: active ones first.
    #[must_use]
    pub fn trusted_tls(&self, kind: AuthorityType) -> Vec<Vec<u8>> {
        self.get(kind)
            .trusted_tls()
            .map(|tls| tls.certificate.clone())
            .collect()
    }

    /// SSH public keys (`authorized_keys` lines with newline) that vouch for certificates of this
    /// type: active ones first.
    #[must_use]
    pub fn trusted_ssh(&self, kind: AuthorityType) -> Vec<String> {
        self.get(kind).trusted_ssh()
    }

    /// Public keys (SubjectPublicKeyInfo) that vouch for JWTs of this type: active ones first.
    #[must_use]
    pub fn trusted_jwt(&self, kind: AuthorityType) -> Vec<Vec<u8>> {
        let authority = self.get(kind);
        let keys = authority.active.jwt.iter().chain(&authority.additional.jwt);
        keys.map(PrivateKey::public_spki).collect()
    }

    /// The authority as calls answer it: never with private keys.
    #[must_use]
    pub fn message(&self, kind: AuthorityType) -> wire::CertAuthorityV2 {
        self.get(kind).message(&self.0.cluster)
    }

    /// What an agent pins: `sha256:` and the hash of the active host authority's public key.
    #[must_use]
    pub fn host_pin(&self) -> String {
        self.host_pins().into_iter().next().unwrap_or_default()
    }

    /// The pins of all trusted host authorities, the active one first. During a rotation an agent
    /// needs all of them: it wants a pin for each authority that it is told of.
    #[must_use]
    pub fn host_pins(&self) -> Vec<String> {
        let host = self.get(AuthorityType::Host);
        let pin = |tls: &TlsAuthority| format!("sha256:{}", sha256_hex(&tls.key.public_spki()));
        host.trusted_tls().map(pin).collect()
    }

    /// A certificate for the cluster's own auth service, good for every internal name and for
    /// `names` besides. It lives as long as its authority.
    ///
    /// # Errors
    /// [`AuthorityError`] if a name cannot be written.
    pub fn host_identity(
        &self,
        names: &[String],
        now: SystemTime,
    ) -> Result<HostIdentity, AuthorityError> {
        let kind = AuthorityType::Host.name();
        let mint = |source| AuthorityError::Mint { kind, source };
        let key = PrivateKey::generate(self.0.suite.algorithm(Purpose::HostIdentity))
            .map_err(|source| AuthorityError::Key { kind, source })?;
        let authority = self.get(AuthorityType::Host);
        let signer = authority.server_signer()?;
        let internal = [API_DOMAIN.to_owned(), format!("*.{API_DOMAIN}")];
        let names = internal
            .iter()
            .chain(names)
            .map(|name| mint::dns(name))
            .collect::<Result<_, _>>()
            .map_err(mint)?;
        let subject = Subject::default()
            .one(ORGANIZATION, "Auth")
            .and_then(|subject| {
                let name = format!("{}.{}", Uuid::new_v4(), self.0.cluster);
                subject.one(COMMON_NAME, &name)
            })
            .map_err(mint)?
            .finish();
        let certificate = Template {
            serial: mint::serial(),
            subject,
            not_before: now - BACKDATE,
            not_after: signer.not_after,
            spki: &key.public_spki(),
            key_usage: leaf_usage(&key.public_spki()),
            extended: &[SERVER_AUTH, CLIENT_AUTH],
            authority: false,
            names,
        }
        .sign(signer.issuer())
        .map_err(mint)?;
        Ok(HostIdentity { certificate, key })
    }

    /// A certificate for the proxy's SSH side, in its binary form, good for `names`. It is made for one
    /// connection.
    ///
    /// # Errors
    /// [`AuthorityError`] if a key cannot be made.
    pub fn ssh_host_identity(
        &self,
        names: &[String],
        now: SystemTime,
    ) -> Result<HostIdentity, AuthorityError> {
        let kind = AuthorityType::Host.name();
        let key = PrivateKey::generate(KeyAlgorithm::EcdsaP256)
            .map_err(|source| AuthorityError::Key { kind, source })?;
        let authority = self.get(AuthorityType::Host);
        let certificate = NewCertificate {
            holder: Holder::Host,
            spki: &key.public_spki(),
            serial: u64::from_be_bytes(random()),
            key_id: "",
            principals: names,
            valid_after: now - BACKDATE,
            valid_before: now + SSH_HOST_LIFE,
            extensions: &BTreeMap::new(),
        }
        .sign(authority.server_ssh_signer()?)
        .and_then(|line| wire_of_line(&line))
        .map_err(|_source| authority.lacks("no SSH key that can sign"))?;
        Ok(HostIdentity { certificate, key })
    }

    /// The identity in the certificates that a client showed, if one of our user authorities
    /// signed it and `now` is within its life; `None` if it showed none or somebody else's.
    ///
    /// # Errors
    /// [`IdentityError`] for certificates that are ours but not accepted, and for chains.
    pub fn identity(
        &self,
        chain: &[impl AsRef<[u8]>],
        now: SystemTime,
    ) -> Result<Option<TlsIdentity>, IdentityError> {
        let leaf = match chain {
            [] => return Ok(None),
            [leaf] => leaf,
            [_, _, ..] => return Err(IdentityError::Chain),
        };
        let Ok(leaf) = Certificate::from_der(leaf.as_ref()) else {
            return Ok(None);
        };
        let ours = self
            .get(AuthorityType::User)
            .trusted_tls()
            .any(|authority| {
                Certificate::from_der(&authority.certificate)
                    .is_ok_and(|authority| leaf.is_signed_by(&authority))
            });
        if !ours || leaf.is_ca() || now < leaf.not_before() || leaf.not_after() < now {
            return Ok(None);
        }
        TlsIdentity::from_certificate(&leaf).map(Some)
    }
}

/// The key usage of a TLS certificate for a key: RSA keys may also encipher.
#[must_use]
pub fn leaf_usage(spki: &[u8]) -> der::flagset::FlagSet<KeyUsages> {
    if is_rsa(spki) {
        KeyUsages::DigitalSignature | KeyUsages::KeyEncipherment
    } else {
        KeyUsages::DigitalSignature.into()
    }
}

fn is_rsa(spki: &[u8]) -> bool {
    const RSA: &str = "1.2.840.113549.1.1.1";
    <x509_cert::spki::SubjectPublicKeyInfoRef<'_> as der::Decode>::from_der(spki)
        .is_ok_and(|info| info.algorithm.oid.to_string() == RSA)
}

#[cfg(test)]
mod tests;
