//! Private keys in the form that OpenSSH writes (OpenSSH `PROTOCOL.key`), unencrypted.

use super::key::{KeyError, PrivateKey};
use super::ssh_wire::Writer;
use super::{KeyAlgorithm, pem, random};
use crate::secret::Secret;

/// What the form begins with.
const MAGIC: &[u8] = b"openssh-key-v1\0";
/// The private half is padded to a multiple of this, which is the block of no cipher.
const BLOCK: usize = 8;

impl PrivateKey {
    /// The PEM form that SSH servers read: as [`PrivateKey::to_pem`] for RSA, and OpenSSH's own form
    /// without a comment for the others.
    ///
    /// # Errors
    /// [`KeyError::Library`] if the library does not give the key away.
    pub fn to_openssh(&self) -> Result<Secret<String>, KeyError> {
        let public = self.public_point();
        let number = || self.private_number().ok_or(KeyError::Library);
        let private = match self.algorithm() {
            KeyAlgorithm::Rsa2048 => return Ok(self.to_pem()),
            KeyAlgorithm::EcdsaP256 => Writer::default()
                .string("ecdsa-sha2-nistp256")
                .string("nistp256")
                .string(public)
                .number(number()?.expose()),
            KeyAlgorithm::Ed25519 => {
                let both = [number()?.expose(), public].concat();
                Writer::default()
                    .string("ssh-ed25519")
                    .string(public)
                    .string(Secret::new(both).expose())
            }
        };
        // Readers of encrypted keys find by it whether they decrypted well.
        let check: [u8; 4] = random();
        let mut secret = Writer::default()
            .bytes(&check)
            .bytes(&check)
            .bytes(&private.0)
            .string("");
        secret
            .0
            .extend((1_u8..).take(secret.0.len().wrapping_neg() % BLOCK));
        let public = super::ssh::wire_of_line(&self.public_ssh_line()?)
            .map_err(|_source| KeyError::Unsupported)?;
        let file = Writer::default()
            .bytes(MAGIC)
            .string("none")
            .string("none")
            .string("")
            .u32(1)
            .string(public)
            .string(&secret.0);
        drop((Secret::new(private.0), Secret::new(secret.0)));
        Ok(Secret::new(pem::encode(
            "OPENSSH PRIVATE KEY",
            Secret::new(file.0).expose(),
        )))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    #[test]
    fn openssh_reads_the_key_back() {
        let base = tempfile::tempdir().unwrap();
        for (algorithm, label) in [
            (KeyAlgorithm::Ed25519, "OPENSSH PRIVATE KEY"),
            (KeyAlgorithm::EcdsaP256, "OPENSSH PRIVATE KEY"),
            (KeyAlgorithm::Rsa2048, "RSA PRIVATE KEY"),
        ] {
            let key = PrivateKey::generate(algorithm).unwrap();
            let text = key.to_openssh().unwrap();
            let blocks = pem::decode_all(text.expose()).unwrap();
            assert_eq!(blocks[0].label, label);
            let path = base.path().join(format!("{algorithm:?}"));
            let mut options = std::fs::OpenOptions::new();
            let mut file = options
                .write(true)
                .create(true)
                .mode(0o600)
                .open(&path)
                .unwrap();
            std::io::Write::write_all(&mut file, text.expose().as_bytes()).unwrap();
            let read = std::process::Command::new("ssh-keygen")
                .args(["-y", "-P", "", "-f"])
                .arg(&path)
                .output();
            let Ok(read) = read else {
                assert!(std::env::var_os("CI").is_none(), "ssh-keygen is missing");
                return;
            };
            let shown = String::from_utf8_lossy(&read.stdout).into_owned();
            assert!(
                read.status.success(),
                "{:?}",
                String::from_utf8_lossy(&read.stderr)
            );
            assert_eq!(shown.trim(), key.public_ssh_line().unwrap().trim());
        }
    }
}
