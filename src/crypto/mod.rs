//! Keys, certificates and their encodings, over the one crypto provider of the program.
//!
//! [`PrivateKey`] makes and holds keys, [`suite`] says which algorithm a cluster asks for,
//! [`x509`] reads certificates, [`ssh`] reads and writes OpenSSH's forms, [`pem`] frames DER, `jws`
//! verifies tokens of others by their key sets, `compact` signs documents and verifies our own.

pub(crate) mod chain;
pub(crate) mod compact;
pub(crate) mod jws;
mod key;
pub mod pem;
pub mod ssh;
pub(crate) mod ssh_cert;
mod ssh_private;
pub(crate) mod ssh_wire;
pub mod suite;
pub(crate) mod tpm;
pub mod x509;

pub use key::{KeyError, PrivateKey, sha1, sha256, sha256_hex, spki_from_pem};
pub use suite::{KeyAlgorithm, Purpose, Suite};

use std::hash::{BuildHasher as _, RandomState};

use aws_lc_rs::rand::{SecureRandom as _, SystemRandom};

/// `N` bytes from the system's random generator.
///
/// # Panics
/// If the operating system has no randomness: nothing that this program does would be safe.
#[must_use]
#[expect(clippy::expect_used, reason = "no randomness, no program")]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .expect("the system has randomness");
    bytes
}

/// Whether two secrets are the same, in a time that does not depend on where they differ.
#[must_use]
pub fn same(one: &[u8], other: &[u8]) -> bool {
    aws_lc_rs::constant_time::verify_slices_are_equal(one, other).is_ok()
}

/// A uniform number in `[0, 1)`, for jitter: nobody may count on it being hard to guess. Each call on the
/// Workload API takes one, and randomness that is good for keys costs a fiftieth of such a call.
#[must_use]
#[expect(clippy::cast_precision_loss, reason = "53 bits fit a double exactly")]
pub fn jitter() -> f64 {
    // The keys that hash tables get: other ones each time, from the system once for each thread.
    (RandomState::new().hash_one(()) >> 11) as f64 / (1_u64 << 53) as f64
}
