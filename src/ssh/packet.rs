//! SSH's packets (RFC 4253 section 6): plain at first, then with AES in Galois counter mode
//! (RFC 5647), which seals each packet as a whole.

use std::io;

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, LessSafeKey, Nonce, UnboundKey};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::crypto::random;

/// The largest packet that is read, in bytes. Peers send 32 KiB of data and a few bytes around it.
const MAX_PACKET: usize = 256 * 1024;
/// The bytes of a seal.
const TAG: usize = 16;
/// What packets are filled up to, for every cipher used here.
const BLOCK: usize = 16;

/// A cipher, by its name in negotiations.
pub(crate) fn cipher(name: &str) -> Option<&'static Algorithm> {
    match name {
        "aes256-gcm@openssh.com" => Some(&AES_256_GCM),
        "aes128-gcm@openssh.com" => Some(&AES_128_GCM),
        _ => None,
    }
}

/// The key of one direction. The nonce counts packets and never repeats: the peer asks for new keys
/// long before, and that ends the connection.
#[derive(Debug)]
pub(crate) struct Seal {
    key: LessSafeKey,
    fixed: [u8; 4],
    counter: u64,
}

impl Seal {
    /// `iv` has 12 bytes; of `key` as many count as the cipher needs.
    pub(crate) fn new(algorithm: &'static Algorithm, key: &[u8], iv: &[u8]) -> Option<Self> {
        let key = UnboundKey::new(algorithm, key.get(..algorithm.key_len())?).ok()?;
        let (fixed, counter) = iv.get(..12)?.split_first_chunk()?;
        Some(Self {
            key: LessSafeKey::new(key),
            fixed: *fixed,
            counter: u64::from_be_bytes(counter.try_into().ok()?),
        })
    }

    fn nonce(&mut self) -> Nonce {
        let mut bytes = [0; 12];
        let (fixed, counter) = bytes.split_at_mut(4);
        fixed.copy_from_slice(&self.fixed);
        counter.copy_from_slice(&self.counter.to_be_bytes());
        self.counter = self.counter.wrapping_add(1);
        Nonce::assume_unique_for_key(bytes)
    }
}

fn broken(problem: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, problem)
}

/// The receiving direction.
#[derive(Debug)]
pub(crate) struct Incoming<R> {
    pub(crate) io: R,
    pub(crate) seal: Option<Seal>,
}

impl<R: AsyncRead + Unpin> Incoming<R> {
    /// The next packet's payload.
    pub(crate) async fn packet(&mut self) -> io::Result<Vec<u8>> {
        let head = self.io.read_u32().await?;
        let length = usize::try_from(head).unwrap_or(usize::MAX);
        if !(8..=MAX_PACKET).contains(&length) {
            return Err(broken("a packet of impossible length"));
        }
        let sealed = if self.seal.is_some() { TAG } else { 0 };
        let mut body = vec![0; length + sealed];
        self.io.read_exact(&mut body).await?;
        if let Some(seal) = &mut self.seal {
            let nonce = seal.nonce();
            seal.key
                .open_in_place(nonce, Aad::from(head.to_be_bytes()), &mut body)
                .map_err(|_source| broken("a packet that was changed on its way"))?;
            body.truncate(length);
        }
        let padding = usize::from(body.first().copied().unwrap_or_default());
        let end = body
            .len()
            .checked_sub(padding)
            .filter(|end| *end > 1)
            .ok_or_else(|| broken("a packet without a message"))?;
        body.truncate(end);
        body.remove(0);
        Ok(body)
    }
}

/// The sending direction.
#[derive(Debug)]
pub(crate) struct Outgoing<W> {
    pub(crate) io: W,
    pub(crate) seal: Option<Seal>,
}

impl<W: AsyncWrite + Unpin> Outgoing<W> {
    /// Sends `payload` as one packet.
    pub(crate) async fn send(&mut self, payload: &[u8]) -> io::Result<()> {
        // A plain packet is aligned with its length, a sealed one without.
        let counted = payload.len() + if self.seal.is_some() { 1 } else { 5 };
        let mut padding = BLOCK - counted % BLOCK;
        if padding < 4 {
            padding += BLOCK;
        }
        let (Ok(length), Ok(padding_byte)) = (
            u32::try_from(1 + payload.len() + padding),
            u8::try_from(padding),
        ) else {
            return Err(broken("a packet that is too large"));
        };
        let mut body = Vec::with_capacity(payload.len() + 64);
        body.push(padding_byte);
        body.extend(payload);
        body.extend(random::<{ 2 * BLOCK }>().get(..padding).unwrap_or_default());
        let head = length.to_be_bytes();
        if let Some(seal) = &mut self.seal {
            let nonce = seal.nonce();
            seal.key
                .seal_in_place_append_tag(nonce, Aad::from(head), &mut body)
                .map_err(|_source| broken("a packet that cannot be sealed"))?;
        }
        body.splice(0..0, head);
        self.io.write_all(&body).await?;
        self.io.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seal(name: &str) -> Option<Seal> {
        Seal::new(cipher(name)?, &[7; 32], &[0xff; 12])
    }

    #[tokio::test]
    async fn packets_of_all_lengths_come_back() {
        for name in ["", "aes128-gcm@openssh.com", "aes256-gcm@openssh.com"] {
            let (near, far) = tokio::io::duplex(1024 * 1024);
            let (mut incoming, mut outgoing) = (
                Incoming {
                    io: far,
                    seal: seal(name),
                },
                Outgoing {
                    io: near,
                    seal: seal(name),
                },
            );
            for length in (1..70).chain([4096, 32 * 1024 + 9]) {
                let payload = vec![42; length];
                outgoing.send(&payload).await.unwrap();
                assert_eq!(incoming.packet().await.unwrap(), payload, "{name} {length}");
            }
        }
    }

    #[tokio::test]
    async fn a_changed_packet_is_refused() {
        let mut sent = Outgoing {
            io: Vec::new(),
            seal: seal("aes256-gcm@openssh.com"),
        };
        sent.send(b"a message").await.unwrap();
        let sent = sent.io;
        for position in 0..sent.len() {
            let mut bytes = sent.clone();
            bytes[position] ^= 1;
            let mut incoming = Incoming {
                io: &bytes[..],
                seal: seal("aes256-gcm@openssh.com"),
            };
            assert!(incoming.packet().await.is_err(), "{position}");
        }
    }

    #[tokio::test]
    async fn impossible_packets_are_refused_before_they_take_memory() {
        for bytes in [
            &b"\xff\xff\xff\xff"[..],
            b"\0\0\0\0",
            b"\0\0\0\x08\xff1234567",
            b"\0\0\0\x08\x071234567",
            b"\0\0\0\x08\0",
        ] {
            let mut incoming = Incoming {
                io: bytes,
                seal: None,
            };
            assert!(incoming.packet().await.is_err(), "{bytes:?}");
        }
    }
}
