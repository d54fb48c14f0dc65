//! The file `identity` of an output, read: one key with its certificates and the authorities of the
//! cluster, as `tsh -i` takes them (upstream `lib/client/identityfile`).

use crate::crypto::ssh::{SshCertificate, SshError};
use crate::crypto::x509::{Certificate, CertificateError, ORGANIZATION};
use crate::crypto::{KeyError, PrivateKey, pem};

/// The largest file that is read, in bytes.
pub(crate) const MAX_FILE: u64 = 1024 * 1024;

/// Why a text is no identity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum FileError {
    /// The private key is missing or of a kind that is not known here.
    #[error("its private key: {0}")]
    Key(#[from] KeyError),
    /// The TLS certificate is missing or damaged.
    #[error("its TLS certificate: {0}")]
    Tls(#[from] CertificateError),
    /// The SSH certificate is missing or damaged.
    #[error("its SSH certificate: {0}")]
    Ssh(#[from] SshError),
    /// A PEM block is cut off or damaged.
    #[error("{0}")]
    Pem(#[from] pem::PemError),
    /// A certificate that was made for another key: the file is put together from several.
    #[error("its {0} certificate is for another key")]
    OtherKey(&'static str),
    /// There is nobody to believe.
    #[error("it has no certificate authorities")]
    NoAuthorities,
}

/// What the file says.
#[derive(Debug)]
pub(crate) struct IdentityFile {
    /// The key of both certificates.
    pub(crate) key: PrivateKey,
    /// The TLS certificate.
    pub(crate) tls: Certificate,
    /// The SSH certificate's `authorized_keys` line, without a newline.
    pub(crate) ssh: String,
    /// The TLS certificates of the cluster's host authorities, a PEM text each.
    pub(crate) authorities: Vec<String>,
}

impl IdentityFile {
    /// Reads the parts, which are told apart by kind and order: key, certificate, authorities.
    ///
    /// # Errors
    /// Which part is missing, damaged, or belongs to another key.
    pub(crate) fn parse(text: &str) -> Result<Self, FileError> {
        let mut certificates = pem::certificates(text)?.into_iter();
        let key = PrivateKey::from_pem(text)?;
        let tls = Certificate::from_der(&certificates.next().unwrap_or_default())?;
        if !tls.is_for(&key) {
            return Err(FileError::OtherKey("TLS"));
        }
        let ssh = text
            .lines()
            .map(str::trim)
            .find(|line| !line.starts_with('@') && line.contains("-cert-v01@openssh.com "))
            .ok_or(SshError::Malformed)?;
        if !SshCertificate::parse(ssh)?.is_for(&key) {
            return Err(FileError::OtherKey("SSH"));
        }
        let authorities: Vec<_> = certificates
            .map(|der| pem::encode("CERTIFICATE", &der))
            .collect();
        if authorities.is_empty() {
            return Err(FileError::NoAuthorities);
        }
        Ok(Self {
            key,
            tls,
            ssh: ssh.to_owned(),
            authorities,
        })
    }

    /// The cluster that issued it; empty if the certificate does not say.
    pub(crate) fn cluster(&self) -> String {
        let names = self.tls.issuer(ORGANIZATION);
        names.into_iter().next().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::KeyAlgorithm;
    use crate::identity::fixtures::{Authority, start};

    fn text(parts: &[&str]) -> String {
        parts.concat()
    }

    #[test]
    fn the_parts_are_told_apart_by_kind_and_order() {
        let authority = Authority::new("root");
        for algorithm in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::Rsa2048] {
            let key = PrivateKey::generate(algorithm).unwrap();
            let identity = authority.identity(key, 1, start());
            let pem = identity.key().to_pem();
            let (key, ssh, tls) = (pem.expose(), identity.ssh_line(), identity.tls_pem());
            let known = format!("@cert-authority root,*.root {}", authority.ssh_line());
            let read =
                IdentityFile::parse(&text(&[key, ssh, tls, &known, &authority.pem])).unwrap();
            assert_eq!(read.key.public_spki(), identity.key().public_spki());
            assert_eq!(read.ssh, ssh.trim());
            assert_eq!(read.cluster(), "root");
            assert_eq!(read.authorities, [authority.pem.as_str()]);

            let other = authority.identity(
                PrivateKey::generate(KeyAlgorithm::EcdsaP256).unwrap(),
                1,
                start(),
            );
            for (parts, problem) in [
                (vec![], "private key"),
                (vec![key.as_str()], "TLS certificate"),
                (vec![key, tls], "SSH certificate"),
                (vec![key, tls, ssh], "no certificate authorities"),
                (vec![key, other.tls_pem(), ssh], "for another key"),
                (vec![key, tls, other.ssh_line()], "for another key"),
                (vec![key, ssh, tls.split_at(100).0], "does not end"),
                (vec![ssh, tls, &authority.pem], "private key"),
            ] {
                let error = IdentityFile::parse(&text(&parts)).unwrap_err().to_string();
                assert!(error.contains(problem), "{error}");
            }
        }
    }
}
