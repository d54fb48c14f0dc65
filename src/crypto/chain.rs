//! Whether a certificate leads to a trusted one, for certificates that no TLS handshake brought.

use std::time::{Duration, SystemTime};

use rustls::pki_types::{CertificateDer, UnixTime};
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage};

/// What a certificate has to be allowed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Usage {
    /// Anything; extended key usages are not looked at.
    Any,
    /// The client's part of TLS, unless it says nothing about its use.
    ClientAuth,
}

/// Why a certificate is not trusted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Untrusted(String);

/// Checks that `leaf` leads over some of `intermediates` to one of `roots` (all DER), at `now`.
/// Revocation is not looked at.
pub(crate) fn verify(
    leaf: &[u8],
    intermediates: &[Vec<u8>],
    roots: &[Vec<u8>],
    now: SystemTime,
    usage: Usage,
) -> Result<(), Untrusted> {
    let untrusted = |error: webpki::Error| Untrusted(format!("{error:?}"));
    let leaf = CertificateDer::from(leaf);
    let leaf = EndEntityCert::try_from(&leaf).map_err(untrusted)?;
    let roots: Vec<_> = roots
        .iter()
        .map(|der| CertificateDer::from(&**der))
        .collect();
    let anchors = roots
        .iter()
        .map(webpki::anchor_from_trusted_cert)
        .collect::<Result<Vec<_>, _>>()
        .map_err(untrusted)?;
    let intermediates: Vec<_> = intermediates
        .iter()
        .map(|der| CertificateDer::from(&**der))
        .collect();
    let algorithms = rustls::crypto::aws_lc_rs::default_provider()
        .signature_verification_algorithms
        .all;
    let now = now
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    let now = UnixTime::since_unix_epoch(now);
    let outcome = match usage {
        Usage::Any => leaf.verify_for_usage(
            algorithms,
            &anchors,
            &intermediates,
            now,
            AnyUse,
            None,
            None,
        ),
        Usage::ClientAuth => {
            let usage = KeyUsage::client_auth();
            leaf.verify_for_usage(algorithms, &anchors, &intermediates, now, usage, None, None)
        }
    };
    outcome.map(drop).map_err(untrusted)
}

struct AnyUse;

impl ExtendedKeyUsageValidator for AnyUse {
    fn validate(&self, _uses: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}
