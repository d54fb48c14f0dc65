//! The parts of an identity: one key, its TLS and SSH certificates, and the authorities to trust.

use std::time::{Duration, SystemTime};

use crate::clock::Clock;
use crate::cluster::tunnel::SshIdentity;
use crate::cluster::{ClusterError, Credential};
use crate::crypto::ssh::{SshCertificate, SshError};
use crate::crypto::x509::{COMMON_NAME, Certificate, CertificateError, ORGANIZATION};
use crate::crypto::{KeyError, PrivateKey};
use crate::pb::proto::Certs;

/// Subject attribute that marks a certificate which may renew itself (upstream `lib/tlsca/ca.go`).
const RENEWABLE: der::asn1::ObjectIdentifier =
    der::asn1::ObjectIdentifier::new_unwrap("1.3.9999.1.13");
/// Subject attribute with the renewal counter.
const GENERATION: der::asn1::ObjectIdentifier =
    der::asn1::ObjectIdentifier::new_unwrap("1.3.9999.1.14");
/// Subject attribute with the bot instance's ID.
const BOT_INSTANCE: der::asn1::ObjectIdentifier =
    der::asn1::ObjectIdentifier::new_unwrap("1.3.9999.2.20");

/// The most authorities of one kind that are taken: a cluster sends two, and twice as many while
/// they are rotated.
const MAX_AUTHORITIES: usize = 64;
/// How much longer than it was asked for an identity may live: clocks differ, and some clusters round
/// up.
const SURPLUS: Duration = Duration::from_hours(24);

/// Why certificates do not make an identity. Nothing of them is used then.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MaterialError {
    /// A part is not UTF-8 text or absent.
    #[error("the {0} is missing or is not text")]
    Missing(&'static str),
    /// The private key cannot be read.
    #[error("private key: {0}")]
    Key(#[from] KeyError),
    /// The TLS certificate or an authority cannot be read.
    #[error("TLS certificate: {0}")]
    Tls(#[from] CertificateError),
    /// The SSH certificate cannot be read.
    #[error("SSH certificate: {0}")]
    Ssh(#[from] SshError),
    /// A certificate is for another key than the one that was sent.
    #[error("the {0} certificate is for another key")]
    OtherKey(&'static str),
    /// The TLS certificate names no cluster in its issuer.
    #[error("the TLS certificate's issuer has no organization: its cluster is unknown")]
    NoCluster,
    /// No authority that came along signed the TLS certificate.
    #[error("no authority of the answer signed the TLS certificate")]
    Unchained,
    /// The SSH certificate has no principal, or an empty one.
    #[error("the SSH certificate needs at least one principal, none of them empty")]
    NoPrincipal,
    /// More authorities came than a cluster can have.
    #[error("{count} {what} authorities came along, at most {MAX_AUTHORITIES} are taken")]
    TooMany {
        /// `TLS` or `SSH`.
        what: &'static str,
        /// How many.
        count: usize,
    },
    /// The certificates are not valid now: one of the two clocks is wrong.
    #[error("they are not valid now: is the clock of this machine right?")]
    NotNow,
    /// The certificates live much longer than was asked for.
    #[error("they are valid until {until}, far beyond what was asked for")]
    TooLong {
        /// End of validity, RFC 3339.
        until: String,
    },
    /// The certificates are another user's.
    #[error("they are for {got} where {held} was expected")]
    OtherUser {
        /// Who we are.
        held: String,
        /// Who the answer is for.
        got: String,
    },
}

/// A complete, consistent identity. Immutable; share it with `Arc`.
#[derive(Debug, Clone)]
pub struct Identity {
    key: PrivateKey,
    tls: Certificate,
    tls_pem: String,
    tls_authorities: Vec<String>,
    ssh_line: String,
    ssh_authorities: Vec<String>,
    cluster: String,
}

impl Identity {
    /// Checks the parts against each other. `tls_authorities` are PEM certificates and
    /// `ssh_authorities` `authorized_keys` lines, one per element, kept as they came.
    pub fn new(
        key: PrivateKey,
        tls_pem: String,
        tls_authorities: Vec<String>,
        ssh_line: String,
        ssh_authorities: Vec<String>,
    ) -> Result<Self, MaterialError> {
        for (what, count) in [
            ("TLS", tls_authorities.len()),
            ("SSH", ssh_authorities.len()),
        ] {
            if count > MAX_AUTHORITIES {
                return Err(MaterialError::TooMany { what, count });
            }
        }
        let tls = Certificate::from_pem(&tls_pem)?;
        if !tls.is_for(&key) {
            return Err(MaterialError::OtherKey("TLS"));
        }
        let ssh = SshCertificate::parse(&ssh_line)?;
        if !ssh.is_for(&key) {
            return Err(MaterialError::OtherKey("SSH"));
        }
        if ssh.principals().is_empty() || ssh.principals().iter().any(String::is_empty) {
            return Err(MaterialError::NoPrincipal);
        }
        let cluster = tls
            .issuer(ORGANIZATION)
            .into_iter()
            .next()
            .filter(|name| !name.is_empty())
            .ok_or(MaterialError::NoCluster)?;
        let authorities = tls_authorities
            .iter()
            .map(|pem| Certificate::from_pem(pem))
            .collect::<Result<Vec<_>, _>>()?;
        if !authorities
            .iter()
            .any(|authority| tls.is_signed_by(authority))
        {
            return Err(MaterialError::Unchained);
        }
        Ok(Self {
            key,
            tls,
            tls_pem,
            tls_authorities,
            ssh_line,
            ssh_authorities,
            cluster,
        })
    }

    /// Builds an identity from a cluster's answer. `more_authorities` are PEM certificates to trust
    /// beside those of the answer (the host authority, which answers for outputs lack).
    pub fn from_certs(
        key: PrivateKey,
        certs: Certs,
        more_authorities: Vec<String>,
    ) -> Result<Self, MaterialError> {
        let text = |bytes: Vec<u8>, what| {
            String::from_utf8(bytes)
                .ok()
                .filter(|text| !text.trim().is_empty())
                .ok_or(MaterialError::Missing(what))
        };
        let list = |items: Vec<Vec<u8>>, what| {
            items
                .into_iter()
                .map(|item| text(item, what))
                .collect::<Result<Vec<_>, _>>()
        };
        let mut tls_authorities = list(certs.tlsca_certs, "list of TLS authorities")?;
        tls_authorities.extend(more_authorities);
        Self::new(
            key,
            text(certs.tls, "TLS certificate")?,
            tls_authorities,
            text(certs.ssh, "SSH certificate")?,
            list(certs.sshca_certs, "list of SSH authorities")?,
        )
    }

    /// The private key, good for TLS and SSH.
    pub fn key(&self) -> &PrivateKey {
        &self.key
    }

    /// The TLS certificate, parsed.
    pub fn tls(&self) -> &Certificate {
        &self.tls
    }

    /// The TLS certificate as it came: one PEM block.
    pub fn tls_pem(&self) -> &str {
        &self.tls_pem
    }

    /// PEM certificates of the authorities to trust, in the cluster's order.
    pub fn tls_authorities(&self) -> &[String] {
        &self.tls_authorities
    }

    /// The SSH certificate as it came: an `authorized_keys` line.
    pub fn ssh_line(&self) -> &str {
        &self.ssh_line
    }

    /// SSH authorities as `authorized_keys` lines, in the cluster's order.
    pub fn ssh_authorities(&self) -> &[String] {
        &self.ssh_authorities
    }

    /// The same identity with other SSH authorities.
    #[must_use]
    pub fn with_ssh_authorities(mut self, ssh_authorities: Vec<String>) -> Self {
        self.ssh_authorities = ssh_authorities;
        self
    }

    /// The name of the cluster that issued it.
    pub fn cluster(&self) -> &str {
        &self.cluster
    }

    /// What a channel to the cluster presents with this identity.
    pub fn credential(&self, clock: &Clock) -> Result<Credential, ClusterError> {
        let credential = Credential::new(
            clock,
            &self.cluster,
            &self.key,
            self.tls.der(),
            &self.tls_authorities,
        )?;
        let ssh = SshIdentity::new(clock, &self.key, &self.ssh_line, &self.ssh_authorities);
        Ok(match ssh {
            Ok(ssh) => credential.with_ssh(ssh),
            // Reading it was possible before; and TLS may do without.
            Err(_malformed) => credential,
        })
    }

    /// The Teleport user, `bot-<name>`.
    pub fn user(&self) -> String {
        self.tls
            .subject(COMMON_NAME)
            .into_iter()
            .next()
            .unwrap_or_default()
    }

    /// Start of validity.
    pub fn not_before(&self) -> SystemTime {
        self.tls.not_before()
    }

    /// End of validity.
    pub fn not_after(&self) -> SystemTime {
        self.tls.not_after()
    }

    /// Whether `now` lies within the validity.
    pub fn is_valid(&self, now: SystemTime) -> bool {
        self.not_before() <= now && now < self.not_after()
    }

    /// Whether it is what was asked for at `now`: for `ttl`, and as `user` if that is known. What is
    /// consistent in itself may still be somebody else's, or for another time.
    pub fn expect(
        &self,
        now: SystemTime,
        ttl: Duration,
        user: Option<&str>,
    ) -> Result<(), MaterialError> {
        if !self.is_valid(now) {
            return Err(MaterialError::NotNow);
        }
        if self.not_after() > now + ttl + SURPLUS {
            return Err(MaterialError::TooLong {
                until: crate::clock::rfc3339(self.not_after()),
            });
        }
        match user {
            Some(held) if held != self.user() => Err(MaterialError::OtherUser {
                held: held.to_owned(),
                got: self.user(),
            }),
            _ => Ok(()),
        }
    }

    /// Whether the certificate may renew itself (join method `token`).
    pub fn is_renewable(&self) -> bool {
        self.tls
            .subject(RENEWABLE)
            .iter()
            .any(|value| value == "true")
    }

    /// The renewal counter; 0 if the certificate has none.
    pub fn generation(&self) -> u64 {
        self.tls
            .subject(GENERATION)
            .first()
            .and_then(|value| value.parse().ok())
            .unwrap_or(0)
    }

    /// The bot instance's ID, if the certificate has one.
    pub fn instance_id(&self) -> Option<String> {
        self.tls.subject(BOT_INSTANCE).into_iter().next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::KeyAlgorithm;
    use crate::identity::fixtures::{Authority, start};

    fn key() -> PrivateKey {
        PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap()
    }

    /// A sound answer for `key`.
    fn answer(authority: &Authority, key: &PrivateKey) -> Certs {
        let identity = authority.identity(key.clone(), 1, start());
        Certs {
            ssh: identity.ssh_line().to_owned().into_bytes(),
            tls: identity.tls_pem().to_owned().into_bytes(),
            tlsca_certs: vec![authority.pem.clone().into_bytes()],
            sshca_certs: vec![authority.ssh_line().into_bytes()],
        }
    }

    type Change<'a> = Box<dyn Fn(&mut Certs) + 'a>;

    fn half(bytes: &[u8]) -> Vec<u8> {
        bytes[..bytes.len() / 2].to_vec()
    }

    #[test]
    fn an_answer_that_does_not_fit_is_refused_whole() {
        let key = key();
        let authority = Authority::new("root");
        let sound = answer(&authority, &key);
        Identity::from_certs(key.clone(), sound.clone(), Vec::new()).unwrap();

        let other = answer(&authority, &self::key());
        let stranger = Authority::new("root");
        let cases: Vec<(&str, Change<'_>)> = vec![
            ("TLS certificate is missing", Box::new(|c| c.tls.clear())),
            ("SSH certificate is missing", Box::new(|c| c.ssh.clear())),
            ("is not text", Box::new(|c| c.tls = vec![0xff, 0xfe])),
            ("TLS certificate: ", Box::new(|c| c.tls = half(&c.tls))),
            ("SSH certificate: ", Box::new(|c| c.ssh = half(&c.ssh))),
            (
                "TLS certificate: ",
                Box::new(|c| c.tlsca_certs[0] = half(&c.tlsca_certs[0])),
            ),
            (
                "TLS certificate is for another key",
                Box::new(|c| c.tls.clone_from(&other.tls)),
            ),
            (
                "SSH certificate is for another key",
                Box::new(|c| c.ssh.clone_from(&other.ssh)),
            ),
            (
                "10000 TLS authorities came along",
                Box::new(|c| c.tlsca_certs = vec![c.tlsca_certs[0].clone(); 10_000]),
            ),
            (
                "10000 SSH authorities came along",
                Box::new(|c| c.sshca_certs = vec![c.sshca_certs[0].clone(); 10_000]),
            ),
            (
                "no authority of the answer signed",
                Box::new(|c| c.tlsca_certs.clear()),
            ),
            (
                "no authority of the answer signed",
                Box::new(|c| c.tlsca_certs = vec![stranger.pem.clone().into_bytes()]),
            ),
        ];
        for (text, change) in cases {
            let mut certs = sound.clone();
            change(&mut certs);
            let error = Identity::from_certs(key.clone(), certs, Vec::new()).unwrap_err();
            assert!(error.to_string().contains(text), "{text:?}: {error}");
        }
    }

    #[test]
    fn an_answer_without_its_authority_is_sound_if_that_is_known() {
        let key = key();
        let authority = Authority::new("root");
        let mut certs = answer(&authority, &key);
        certs.tlsca_certs.clear();
        Identity::from_certs(key, certs, vec![authority.pem.clone()]).unwrap();
    }
}
