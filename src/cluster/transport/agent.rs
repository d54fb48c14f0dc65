//! A small SSH agent with one certificate: what a proxy asks that records sessions, for it logs in
//! to the host in the client's name (`draft-ietf-sshm-ssh-agent`).

use std::io;

use crate::crypto::ssh::{SshError, sign, wire_of_line};
use crate::crypto::ssh_wire::{Reader, Writer};
use crate::crypto::{KeyAlgorithm, PrivateKey};

/// The longest request, in bytes: as OpenSSH's agent has it.
const MAX_REQUEST: usize = 256 * 1024;
/// Flags of a request that ask for RSA with SHA-2. Without one of them SHA-1 is meant.
const RSA_SHA2_256: u32 = 2;
const RSA_SHA2_512: u32 = 4;

mod message {
    pub(super) const FAILURE: u8 = 5;
    pub(super) const REQUEST_IDENTITIES: u8 = 11;
    pub(super) const IDENTITIES_ANSWER: u8 = 12;
    pub(super) const SIGN_REQUEST: u8 = 13;
    pub(super) const SIGN_RESPONSE: u8 = 14;
}

/// Answers with one key and its certificate.
#[derive(Debug)]
pub(crate) struct Agent {
    key: PrivateKey,
    /// The certificate in its binary form.
    certificate: Vec<u8>,
    /// Of the next request, as far as it came.
    begun: Vec<u8>,
}

impl Agent {
    /// An agent that holds `key` with `certificate`, an `authorized_keys` line.
    ///
    /// # Errors
    /// [`SshError::Malformed`] if the certificate is no line.
    pub(crate) fn new(key: &PrivateKey, certificate: &str) -> Result<Self, SshError> {
        Ok(Self {
            key: key.clone(),
            certificate: wire_of_line(certificate)?,
            begun: Vec::new(),
        })
    }

    /// Takes bytes of the peer and returns the answers to the requests that are whole by now.
    ///
    /// # Errors
    /// A request that is too long to be one.
    pub(super) fn answer(&mut self, bytes: &[u8]) -> io::Result<Vec<u8>> {
        self.begun.extend_from_slice(bytes);
        let mut answers = Writer::default();
        while let Some((length, rest)) = self.begun.split_first_chunk::<4>() {
            let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
            if length > MAX_REQUEST {
                let problem = "the proxy asks this side's SSH agent for something endless";
                return Err(io::Error::new(io::ErrorKind::InvalidData, problem));
            }
            let Some((request, rest)) = rest.split_at_checked(length) else {
                break;
            };
            let answer = self.to(request);
            answers = answers.string(answer.unwrap_or_else(|| vec![message::FAILURE]));
            self.begun = rest.to_vec();
        }
        Ok(answers.0)
    }

    /// The answer to one request; `None` refuses it.
    fn to(&self, request: &[u8]) -> Option<Vec<u8>> {
        let mut reader = Reader(request);
        let answer = match reader.byte().ok()? {
            message::REQUEST_IDENTITIES => Writer::message(message::IDENTITIES_ANSWER)
                .u32(1)
                .string(&self.certificate)
                .string("tbot"),
            message::SIGN_REQUEST => {
                let (certificate, data) = (reader.string().ok()?, reader.string().ok()?);
                let flags = reader.u32().ok()?;
                if certificate != self.certificate {
                    return None;
                }
                Writer::message(message::SIGN_RESPONSE).string(self.signature(data, flags)?)
            }
            _ => return None,
        };
        Some(answer.0)
    }

    fn signature(&self, data: &[u8], flags: u32) -> Option<Vec<u8>> {
        match self.key.algorithm() {
            KeyAlgorithm::Rsa2048 if flags & RSA_SHA2_512 != 0 => sign(&self.key, data).ok(),
            KeyAlgorithm::Rsa2048 if flags & RSA_SHA2_256 != 0 => {
                let signature = self.key.sign(data).ok()?;
                let named = Writer::default().string("rsa-sha2-256");
                Some(named.string(signature).0)
            }
            KeyAlgorithm::Rsa2048 => None,
            KeyAlgorithm::EcdsaP256 | KeyAlgorithm::Ed25519 => sign(&self.key, data).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::ssh_cert::is_signed;

    /// An agent whose certificate is, for what happens here, its bare key.
    fn agent(algorithm: KeyAlgorithm) -> (Agent, Vec<u8>) {
        let key = PrivateKey::generate(algorithm).unwrap();
        let line = key.public_ssh_line().unwrap();
        (
            Agent::new(&key, &line).unwrap(),
            wire_of_line(&line).unwrap(),
        )
    }

    fn asked(request: Writer) -> Vec<u8> {
        Writer::default().string(request.0).0
    }

    #[test]
    fn it_shows_and_signs_whatever_the_pieces_it_is_asked_in() {
        for (algorithm, flags) in [
            (KeyAlgorithm::EcdsaP256, 0),
            (KeyAlgorithm::Rsa2048, RSA_SHA2_256),
            (KeyAlgorithm::Rsa2048, RSA_SHA2_512),
        ] {
            let (mut agent, certificate) = agent(algorithm);
            let sign = Writer::message(message::SIGN_REQUEST)
                .string(&certificate)
                .string("to be signed")
                .u32(flags);
            let mut requests = asked(Writer::message(message::REQUEST_IDENTITIES));
            requests.extend(asked(sign));
            let mut answers = Vec::new();
            for byte in requests {
                answers.extend(agent.answer(&[byte]).unwrap());
            }

            let mut reader = Reader(&answers);
            let mut list = Reader(reader.string().unwrap());
            assert_eq!(list.byte().unwrap(), message::IDENTITIES_ANSWER);
            assert_eq!(list.u32().unwrap(), 1);
            assert_eq!(list.string().unwrap(), certificate);
            let mut signed = Reader(reader.string().unwrap());
            assert_eq!(signed.byte().unwrap(), message::SIGN_RESPONSE);
            let signature = signed.string().unwrap();
            assert!(is_signed(&certificate, b"to be signed", signature));
            assert!(reader.0.is_empty());
        }
    }

    #[test]
    fn anything_else_is_refused() {
        let (mut agent, certificate) = agent(KeyAlgorithm::Rsa2048);
        for request in [
            Writer::default(),
            Writer::message(27),
            Writer::message(message::SIGN_REQUEST),
            Writer::message(message::SIGN_REQUEST)
                .string("another key")
                .string("data")
                .u32(RSA_SHA2_512),
            // SHA-1.
            Writer::message(message::SIGN_REQUEST)
                .string(&certificate)
                .string("data")
                .u32(0),
        ] {
            let answer = agent.answer(&asked(request)).unwrap();
            assert_eq!(answer, [0, 0, 0, 1, message::FAILURE]);
        }
        assert!(agent.answer(&[0xff; 4]).is_err());
    }
}
