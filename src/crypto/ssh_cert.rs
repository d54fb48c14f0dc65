//! Certificates of SSH as a peer shows them (OpenSSH `PROTOCOL.certkeys`), and signatures verified.

use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256, RSA_PKCS1_2048_8192_SHA512,
    RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey,
};

use super::ssh::{Holder, SshError};
use super::ssh_wire::{Reader, Writer};

/// What matters of a certificate whose signature was verified.
#[derive(Debug, Clone)]
pub(crate) struct SignedCertificate {
    /// The certified key in its plain binary form.
    pub(crate) key: Vec<u8>,
    /// The names that it is good for.
    pub(crate) principals: Vec<String>,
    /// The authority's key in its binary form.
    authority: Vec<u8>,
    valid_after: SystemTime,
    valid_before: SystemTime,
}

impl SignedCertificate {
    /// Reads a certificate and verifies that the authority which it names signed it. Whether that
    /// authority is trusted is another question: see [`Self::is_good`].
    ///
    /// # Errors
    /// [`SshError::Malformed`] if it is no certificate of a `holder`, or the signature does not verify;
    /// [`SshError::Unsupported`] for keys other than RSA, P-256 and Ed25519.
    pub(crate) fn parse(wire: &[u8], holder: Holder) -> Result<Self, SshError> {
        let mut reader = Reader(wire);
        let name = reader.text()?;
        let _nonce = reader.string()?;
        let plain = name
            .strip_suffix("-cert-v01@openssh.com")
            .ok_or(SshError::Malformed)?;
        let parts = match plain {
            "ssh-rsa" | "ecdsa-sha2-nistp256" => 2,
            "ssh-ed25519" => 1,
            _ => return Err(SshError::Unsupported),
        };
        let mut key = Writer::default().string(plain);
        for _ in 0..parts {
            key = key.string(reader.string()?);
        }
        let _serial = reader.u64()?;
        if reader.u32()? != holder as u32 {
            return Err(SshError::Malformed);
        }
        let _key_id = reader.string()?;
        let mut names = Reader(reader.string()?);
        let mut principals = Vec::new();
        while !names.0.is_empty() {
            principals.push(names.text()?.to_owned());
        }
        let valid_after = time(reader.u64()?);
        let valid_before = time(reader.u64()?);
        // Nothing that it could be restricted by is known here.
        if !reader.string()?.is_empty() {
            return Err(SshError::Unsupported);
        }
        let _extensions = reader.string()?;
        let _reserved = reader.string()?;
        let authority = reader.string()?.to_vec();
        let signed = wire.len() - reader.0.len();
        let signature = reader.string()?;
        let message = wire.get(..signed).ok_or(SshError::Malformed)?;
        if !reader.0.is_empty() || !is_signed(&authority, message, signature) {
            return Err(SshError::Malformed);
        }
        Ok(Self {
            key: key.0,
            principals,
            authority,
            valid_after,
            valid_before,
        })
    }

    /// Whether it is valid at `now` and one of `authorities`, keys in their binary form, signed it.
    pub(crate) fn is_good(&self, authorities: &[Vec<u8>], now: SystemTime) -> bool {
        self.valid_after <= now && now < self.valid_before && authorities.contains(&self.authority)
    }
}

/// Seconds since the epoch; what no calendar holds is the far future.
fn time(seconds: u64) -> SystemTime {
    const FAR: u64 = 1 << 40;
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds.min(FAR))
}

/// Whether `signature` (algorithm and blob) over `message` is one of `key`, in its binary form.
/// SHA-1 counts for nothing.
pub(crate) fn is_signed(key: &[u8], message: &[u8], signature: &[u8]) -> bool {
    verify(key, message, signature).is_some()
}

fn verify(key: &[u8], message: &[u8], signature: &[u8]) -> Option<()> {
    let mut key = Reader(key);
    let kind = key.text().ok()?;
    let mut signature = Reader(signature);
    let (algorithm, blob) = (signature.text().ok()?, signature.string().ok()?);
    let rsa = |mut key: Reader<'_>, parameters: &RsaParameters| {
        let (e, n) = (key.number().ok()?, key.number().ok()?);
        let key = RsaPublicKeyComponents { n, e };
        key.verify(parameters, message, blob).ok()
    };
    match (kind, algorithm) {
        ("ssh-rsa", "rsa-sha2-256") => rsa(key, &RSA_PKCS1_2048_8192_SHA256),
        ("ssh-rsa", "rsa-sha2-512") => rsa(key, &RSA_PKCS1_2048_8192_SHA512),
        ("ssh-ed25519", "ssh-ed25519") => UnparsedPublicKey::new(&ED25519, key.string().ok()?)
            .verify(message, blob)
            .ok(),
        ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp256") => {
            let _curve = key.string().ok()?;
            let mut pair = Reader(blob);
            let mut fixed = Vec::with_capacity(64);
            for number in [pair.number().ok()?, pair.number().ok()?] {
                fixed.resize(fixed.len() + 32_usize.checked_sub(number.len())?, 0);
                fixed.extend(number);
            }
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, key.string().ok()?)
                .verify(message, &fixed)
                .ok()
        }
        _ => None,
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::crypto::ssh::{sign, wire_of_line};
    use crate::crypto::{KeyAlgorithm, PrivateKey};

    /// A certificate of `key` for a host, with what differs from a good one.
    pub(crate) fn certify(
        key: &PrivateKey,
        authority: &PrivateKey,
        kind: u32,
        valid: (u64, u64),
    ) -> Vec<u8> {
        let wire = |key: &PrivateKey| wire_of_line(&key.public_ssh_line().unwrap()).unwrap();
        let plain = wire(key);
        let mut reader = Reader(&plain);
        let name = format!("{}-cert-v01@openssh.com", reader.text().unwrap());
        let body = Writer::default()
            .string(name)
            .string("nonce")
            .bytes(reader.0)
            .bytes(&7_u64.to_be_bytes())
            .u32(kind)
            .string("a host")
            .string("")
            .bytes(&valid.0.to_be_bytes())
            .bytes(&valid.1.to_be_bytes())
            .string("")
            .string("")
            .string("")
            .string(wire(authority));
        let signature = sign(authority, &body.0).unwrap();
        body.string(signature).0
    }

    const ALL: [KeyAlgorithm; 3] = [
        KeyAlgorithm::Rsa2048,
        KeyAlgorithm::EcdsaP256,
        KeyAlgorithm::Ed25519,
    ];

    #[test]
    fn a_host_is_believed_by_its_authority_and_while_it_is_valid() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let stranger = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let stranger = wire_of_line(&stranger.public_ssh_line().unwrap()).unwrap();
        for algorithm in ALL {
            let authority = PrivateKey::generate(algorithm).unwrap();
            let known = wire_of_line(&authority.public_ssh_line().unwrap()).unwrap();
            let key = PrivateKey::generate(algorithm).unwrap();
            let wire = certify(&key, &authority, 2, (100, 200));
            let certificate = SignedCertificate::parse(&wire, Holder::Host).unwrap();
            assert_eq!(
                certificate.key,
                wire_of_line(&key.public_ssh_line().unwrap()).unwrap()
            );
            let known = [stranger.clone(), known];
            assert!(certificate.is_good(&known, at(150)));
            assert!(!certificate.is_good(&known, at(99)));
            assert!(!certificate.is_good(&known, at(200)));
            assert!(!certificate.is_good(&known[..1], at(150)));
            for position in 0..wire.len() {
                let mut other = wire.clone();
                other[position] ^= 1;
                assert!(
                    SignedCertificate::parse(&other, Holder::Host).is_err(),
                    "{position}"
                );
                assert!(SignedCertificate::parse(&wire[..position], Holder::Host).is_err());
            }
        }
    }

    #[test]
    fn a_users_certificate_is_no_hosts() {
        let key = PrivateKey::generate(KeyAlgorithm::Ed25519).unwrap();
        let wire = certify(&key, &key, 1, (0, u64::MAX));
        assert!(SignedCertificate::parse(&wire, Holder::Host).is_err());
        assert!(SignedCertificate::parse(&wire, Holder::User).is_ok());
        let forever = certify(&key, &key, 2, (0, u64::MAX));
        let forever = SignedCertificate::parse(&forever, Holder::Host).unwrap();
        let known = [wire_of_line(&key.public_ssh_line().unwrap()).unwrap()];
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000);
        assert!(forever.is_good(&known, now));
    }
}
