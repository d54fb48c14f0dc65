//! The keys of one authority: made, stored, read back and shown.

use std::time::{Duration, SystemTime};

use der::Decode as _;
use serde_json::{Value, json};
use x509_cert::ext::pkix::{KeyUsages, SubjectKeyIdentifier};
use x509_cert::name::RdnSequence;

use super::mint::{self, Issuer, MintError, Subject, Template};
use super::{AuthorityError, AuthorityType, KIND};
use crate::crypto::x509::{COMMON_NAME, ORGANIZATION};
use crate::crypto::{KeyAlgorithm, PrivateKey, Purpose, Suite, pem};
use crate::embedded::caller::oid;
use crate::embedded::instant::{from_wire, parse_rfc3339, rfc3339};
use crate::embedded::store::Resource;
use crate::pb::types as wire;

/// The life of an authority: ten years of 365 days, as recorded from a real cluster.
const LIFE: Duration = Duration::from_hours(24 * 3650);

/// A TLS authority: its certificate and its key.
#[derive(Debug, Clone)]
pub struct TlsAuthority {
    /// The certificate, DER.
    pub certificate: Vec<u8>,
    /// The key.
    pub key: PrivateKey,
    /// End of the certificate's validity.
    pub not_after: SystemTime,
    name: RdnSequence,
    key_id: Option<Vec<u8>>,
}

impl TlsAuthority {
    /// What a template needs to be signed by this authority.
    #[must_use]
    pub fn issuer(&self) -> Issuer<'_> {
        Issuer {
            name: &self.name,
            key_id: self.key_id.as_deref(),
            key: &self.key,
        }
    }

    /// The same key with another certificate (DER), which has to be for this key.
    pub(in crate::embedded) fn certified_by(&self, certificate: &[u8]) -> der::Result<Self> {
        Self::read(certificate.to_vec(), self.key.clone())
    }

    fn read(certificate: Vec<u8>, key: PrivateKey) -> der::Result<Self> {
        let parsed = x509_cert::Certificate::from_der(&certificate)?.tbs_certificate;
        let key_id = parsed
            .get::<SubjectKeyIdentifier>()?
            .map(|(_, id)| id.0.as_bytes().to_vec());
        Ok(Self {
            certificate,
            key,
            not_after: parsed.validity.not_after.to_system_time(),
            name: parsed.subject,
            key_id,
        })
    }

    /// Makes a self-signed authority.
    fn make(
        kind: AuthorityType,
        key: PrivateKey,
        cluster: &str,
        now: SystemTime,
    ) -> Result<Self, MintError> {
        let serial = mint::serial();
        let subject = Subject::default()
            .one(ORGANIZATION, cluster)?
            .one(COMMON_NAME, cluster)?
            .one(oid::SERIAL_NUMBER, &u128::from_be_bytes(serial).to_string())?
            .finish();
        let mut key_usage = KeyUsages::KeyCertSign | KeyUsages::CRLSign;
        let mut names = Vec::new();
        if kind == AuthorityType::Spiffe {
            names.push(mint::uri(&format!("spiffe://{cluster}"))?);
        } else {
            key_usage |= KeyUsages::DigitalSignature;
            if key.algorithm() == KeyAlgorithm::Rsa2048 {
                key_usage |= KeyUsages::KeyEncipherment;
            }
        }
        let certificate = Template {
            serial,
            subject: subject.clone(),
            not_before: now,
            not_after: now + LIFE,
            spki: &key.public_spki(),
            key_usage,
            extended: &[],
            authority: true,
            names,
        }
        .sign(Issuer {
            name: &subject,
            key_id: None,
            key: &key,
        })?;
        Ok(Self::read(certificate, key)?)
    }
}

/// Keys that belong together: those in use, or those that are only trusted during a rotation.
#[derive(Debug, Clone, Default)]
pub struct KeySet {
    /// TLS authorities; the first one signs.
    pub tls: Vec<TlsAuthority>,
    /// SSH keys; the first one signs.
    pub ssh: Vec<PrivateKey>,
    /// Keys for JWTs; the first one signs.
    pub jwt: Vec<PrivateKey>,
}

/// One authority with its keys.
#[derive(Debug, Clone)]
pub struct Authority {
    /// What it signs.
    pub kind: AuthorityType,
    /// The keys in use.
    pub active: KeySet,
    /// Keys that are trusted besides, during a rotation.
    pub additional: KeySet,
    /// The state of its rotation; `None` if it was never rotated.
    pub rotation: Option<wire::Rotation>,
    /// When the last step of a rotation was taken; `None` if there was none.
    pub changed: Option<SystemTime>,
}

impl Authority {
    /// Makes the keys and certificates that an authority of this type has under `suite`.
    pub(super) fn make(
        kind: AuthorityType,
        cluster: &str,
        suite: Suite,
        now: SystemTime,
    ) -> Result<Self, AuthorityError> {
        let name = kind.name();
        let key = |algorithm| {
            PrivateKey::generate(algorithm)
                .map_err(|source| AuthorityError::Key { kind: name, source })
        };
        let tls = |algorithm| {
            let made = TlsAuthority::make(kind, key(algorithm)?, cluster, now);
            made.map_err(|source| AuthorityError::Mint { kind: name, source })
        };
        let mut active = KeySet::default();
        match kind {
            AuthorityType::Host | AuthorityType::User => {
                active
                    .tls
                    .push(tls(suite.algorithm(Purpose::TlsAuthority))?);
                active
                    .ssh
                    .push(key(suite.algorithm(Purpose::SshAuthority))?);
            }
            AuthorityType::Spiffe => {
                active
                    .tls
                    .push(tls(suite.algorithm(Purpose::TlsAuthority))?);
                active.jwt.push(key(KeyAlgorithm::Rsa2048)?);
            }
            AuthorityType::Jwt | AuthorityType::BoundKeypair => {
                active
                    .jwt
                    .push(key(suite.algorithm(Purpose::TlsAuthority))?);
            }
            // Databases want RSA whatever the suite.
            AuthorityType::Db | AuthorityType::DbClient => {
                active.tls.push(tls(KeyAlgorithm::Rsa2048)?);
            }
        }
        Ok(Self {
            kind,
            active,
            additional: KeySet::default(),
            rotation: None,
            changed: None,
        })
    }

    /// The TLS authority that signs now.
    ///
    /// # Errors
    /// [`AuthorityError::Damaged`] if there is none.
    pub fn signer(&self) -> Result<&TlsAuthority, AuthorityError> {
        self.active
            .tls
            .first()
            .ok_or_else(|| self.lacks("no TLS key"))
    }

    /// The SSH key that signs now.
    ///
    /// # Errors
    /// [`AuthorityError::Damaged`] if there is none.
    pub fn ssh_signer(&self) -> Result<&PrivateKey, AuthorityError> {
        self.active
            .ssh
            .first()
            .ok_or_else(|| self.lacks("no SSH key"))
    }

    /// The JWT key that signs now.
    ///
    /// # Errors
    /// [`AuthorityError::Damaged`] if there is none.
    pub fn jwt_signer(&self) -> Result<&PrivateKey, AuthorityError> {
        self.active
            .jwt
            .first()
            .ok_or_else(|| self.lacks("no JWT key"))
    }

    /// All trusted TLS authorities, active ones first.
    pub fn trusted_tls(&self) -> impl Iterator<Item = &TlsAuthority> {
        self.active.tls.iter().chain(&self.additional.tls)
    }

    /// All trusted SSH keys as `authorized_keys` lines, active ones first.
    #[must_use]
    pub fn trusted_ssh(&self) -> Vec<String> {
        let keys = self.active.ssh.iter().chain(&self.additional.ssh);
        keys.filter_map(|key| key.public_ssh_line().ok()).collect()
    }

    /// The authority as the wire shows it, without private keys.
    #[must_use]
    pub fn message(&self, cluster: &str) -> wire::CertAuthorityV2 {
        wire::CertAuthorityV2 {
            kind: "cert_authority".to_owned(),
            sub_kind: self.kind.name().to_owned(),
            version: "v2".to_owned(),
            metadata: Some(wire::Metadata {
                name: cluster.to_owned(),
                namespace: "default".to_owned(),
                ..wire::Metadata::default()
            }),
            spec: Some(wire::CertAuthoritySpecV2 {
                r#type: self.kind.name().to_owned(),
                cluster_name: cluster.to_owned(),
                roles: Vec::new(),
                rotation: self.rotation.clone(),
                active_keys: Some(self.active.message()),
                additional_trusted_keys: Some(self.additional.message()),
            }),
        }
    }

    /// The authority as it is stored, private keys included.
    pub(super) fn to_resource(&self) -> Resource {
        let text = |time: Option<prost_types::Timestamp>| time.and_then(from_wire).map(rfc3339);
        let rotation = self.rotation.as_ref().map(|rotation| {
            let schedule = rotation.schedule.unwrap_or_default();
            json!({
                "state": rotation.state,
                "phase": rotation.phase,
                "mode": rotation.mode,
                "current_id": rotation.current_id,
                "grace_period": rotation.grace_period,
                "started": text(rotation.started),
                "last_rotated": text(rotation.last_rotated),
                "update_clients": text(schedule.update_clients),
                "update_servers": text(schedule.update_servers),
                "standby": text(schedule.standby),
            })
        });
        Resource {
            kind: KIND.to_owned(),
            version: "v1".to_owned(),
            name: self.kind.name().to_owned(),
            spec: json!({
                "active": self.active.to_json(),
                "additional": self.additional.to_json(),
                "rotation": rotation,
                "changed": self.changed.map(rfc3339),
            }),
            ..Resource::default()
        }
    }

    /// Reads what [`Authority::to_resource`] wrote.
    pub(super) fn from_resource(resource: &Resource) -> Result<Self, AuthorityError> {
        let damaged = |what| AuthorityError::Damaged {
            kind: resource.name.clone(),
            what,
        };
        let set = |key: &str| resource.spec.get(key).and_then(KeySet::from_json);
        let time = |value: &Value| parse_rfc3339(value.as_str()?);
        let rotation = resource
            .spec
            .get("rotation")
            .filter(|value| !value.is_null());
        Ok(Self {
            kind: AuthorityType::from_name(&resource.name).ok_or_else(|| damaged("its type"))?,
            active: set("active").ok_or_else(|| damaged("its active keys"))?,
            additional: set("additional").ok_or_else(|| damaged("its additional keys"))?,
            changed: resource.spec.get("changed").and_then(time),
            rotation: rotation.map(|value| {
                let at = |key: &str| value.get(key).and_then(time).map(Into::into);
                let schedule = wire::RotationSchedule {
                    update_clients: at("update_clients"),
                    update_servers: at("update_servers"),
                    standby: at("standby"),
                };
                let text = |key: &str| {
                    let text = value.get(key).and_then(Value::as_str);
                    text.unwrap_or_default().to_owned()
                };
                wire::Rotation {
                    state: text("state"),
                    phase: text("phase"),
                    mode: text("mode"),
                    current_id: text("current_id"),
                    grace_period: value
                        .get("grace_period")
                        .and_then(Value::as_i64)
                        .unwrap_or_default(),
                    started: at("started"),
                    last_rotated: at("last_rotated"),
                    schedule: schedule.standby.is_some().then_some(schedule),
                }
            }),
        })
    }

    pub(super) fn lacks(&self, what: &'static str) -> AuthorityError {
        AuthorityError::Damaged {
            kind: self.kind.name().to_owned(),
            what,
        }
    }
}

impl KeySet {
    fn message(&self) -> wire::CaKeySet {
        let raw = i32::from(wire::PrivateKeyType::Raw);
        wire::CaKeySet {
            ssh: self
                .ssh
                .iter()
                .filter_map(|key| key.public_ssh_line().ok())
                .map(|line| wire::SshKeyPair {
                    public_key: line.into_bytes(),
                    private_key: Vec::new(),
                    private_key_type: raw,
                })
                .collect(),
            tls: self
                .tls
                .iter()
                .map(|tls| wire::TlsKeyPair {
                    cert: pem::encode("CERTIFICATE", &tls.certificate).into_bytes(),
                    key: Vec::new(),
                    key_type: raw,
                    crl: Vec::new(),
                })
                .collect(),
            jwt: self
                .jwt
                .iter()
                .map(|key| wire::JwtKeyPair {
                    public_key: key.public_pem().into_bytes(),
                    private_key: Vec::new(),
                    private_key_type: raw,
                })
                .collect(),
        }
    }

    fn to_json(&self) -> Value {
        let keys = |keys: &[PrivateKey]| -> Vec<String> {
            keys.iter()
                .map(|key| key.to_pem().expose().clone())
                .collect()
        };
        let tls: Vec<Value> = self
            .tls
            .iter()
            .map(|tls| {
                json!({
                    "certificate": pem::encode("CERTIFICATE", &tls.certificate),
                    "key": tls.key.to_pem().expose(),
                })
            })
            .collect();
        json!({"tls": tls, "ssh": keys(&self.ssh), "jwt": keys(&self.jwt)})
    }

    fn from_json(value: &Value) -> Option<Self> {
        let list = |name: &str| value.get(name).and_then(Value::as_array);
        let key = |value: &Value| PrivateKey::from_pem(value.as_str()?).ok();
        let tls = |value: &Value| {
            let text = value.get("certificate")?.as_str()?;
            let certificate = pem::certificates(text).ok()?.into_iter().next()?;
            TlsAuthority::read(certificate, key(value.get("key")?)?).ok()
        };
        Some(Self {
            tls: list("tls")?.iter().map(tls).collect::<Option<_>>()?,
            ssh: list("ssh")?.iter().map(key).collect::<Option<_>>()?,
            jwt: list("jwt")?.iter().map(key).collect::<Option<_>>()?,
        })
    }
}
