//! The revocation list: signed by each trusted authority, again when something changes.
//!
//! During a rotation the list is sent once by each authority that issued SVIDs or will, the one that
//! signs now last: an agent that keeps one list has that one, as of other clusters.
//!
//! Unlike a Teleport 18.0.0 cluster's, the list says when it was made and when to expect the next
//! one, as RFC 5280 wants, and is signed again only for a reason.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use der::Encode as _;
use der::asn1::{BitString, OctetString, Uint};
use tokio::sync::{broadcast, watch};
use tokio_util::task::AbortOnDropHandle;
use x509_cert::Version;
use x509_cert::crl::{CertificateList, RevokedCert, TbsCertList};
use x509_cert::ext::pkix::{AuthorityKeyIdentifier, CrlNumber};
use x509_cert::serial_number::SerialNumber;

use crate::embedded::ClusterState;
use crate::embedded::ca::AuthorityType;
use crate::embedded::ca::mint::{self, Issuer, MintError};
use crate::embedded::instant::parse_rfc3339;
use crate::embedded::store::{Change, Resource, StoreError};

/// The kind of a revocation.
pub(super) const KIND: &str = "workload_identity_x509_revocation";
/// How long changes are gathered before the list is signed again.
const GATHER: Duration = Duration::from_secs(5);
/// How long a list is good. Long, because changes are pushed, and a cluster that is away for a
/// while must not make its SVIDs worthless.
const LIFE: Duration = Duration::from_hours(7 * 24);
/// When a list is signed again without a change.
const REFRESH: Duration = Duration::from_hours(24);
/// The pause after a failure.
const RETRY: Duration = Duration::from_secs(15);

/// Why the list could not be signed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CrlError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Mint(#[from] MintError),
}

/// The list by each trusted authority, the one that signs now last.
pub(super) type Current = Option<Arc<Vec<Vec<u8>>>>;

/// The revocation service of one cluster.
#[derive(Debug, Clone)]
pub(super) struct Revocation {
    pub(super) state: Arc<ClusterState>,
    pub(super) current: watch::Receiver<Current>,
    _signer: Arc<AbortOnDropHandle<()>>,
}

impl Revocation {
    /// Starts to sign lists; ends with the last clone.
    pub(super) fn start(state: &Arc<ClusterState>) -> Self {
        let (sender, current) = watch::channel(None);
        let signer = tokio::spawn(keep_signed(Arc::clone(state), sender));
        Self {
            state: Arc::clone(state),
            current,
            _signer: Arc::new(AbortOnDropHandle::new(signer)),
        }
    }
}

async fn keep_signed(state: Arc<ClusterState>, sender: watch::Sender<Current>) {
    let mut changes = state.store.changes();
    let mut authorities = state.authorities.subscribe();
    loop {
        authorities.mark_unchanged();
        let owned = Arc::clone(&state);
        let signed_at = state.clock.now();
        let signed = tokio::task::spawn_blocking(move || sign_current(&owned)).await;
        match signed {
            Ok(Ok(list)) => sender.send_replace(Some(Arc::new(list))),
            Ok(Err(error)) => {
                tracing::error!(%error, "the revocation list could not be signed; trying again");
                state.clock.sleep(RETRY).await;
                continue;
            }
            // The process is ending.
            Err(_) => return,
        };
        tokio::select! {
            () = revocation(&mut changes) => state.clock.sleep(GATHER).await,
            rotated = authorities.changed() => if rotated.is_err() { return },
            // A list ends by the wall, and the machine may sleep meanwhile; but a clock that is set
            // back must not put this off.
            () = state.clock.sleep_until(signed_at + REFRESH) => {}
            () = state.clock.sleep(REFRESH) => {}
        }
    }
}

/// Waits for a change of a revocation.
async fn revocation(changes: &mut broadcast::Receiver<Change>) {
    loop {
        match changes.recv().await {
            Ok(change) if change.kind != KIND => {}
            Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => return,
            Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
        }
    }
}

fn sign_current(state: &ClusterState) -> Result<Vec<Vec<u8>>, CrlError> {
    let revoked = state.store.list(KIND)?;
    let entries = entries(&revoked);
    let authority = state.authorities.get(AuthorityType::Spiffe);
    let mut lists = Vec::new();
    for trusted in authority.trusted_tls() {
        lists.push(sign(trusted.issuer(), &entries, state.clock.now())?);
    }
    lists.reverse();
    Ok(lists)
}

/// What is revoked. What is no serial number is logged and left out.
fn entries(revoked: &[Resource]) -> Vec<RevokedCert> {
    let mut entries = Vec::new();
    for resource in revoked {
        let entry = entry(resource);
        if entry.is_none() {
            tracing::warn!(name = resource.name, "this {KIND} cannot be read; ignored");
        }
        entries.extend(entry);
    }
    entries
}

/// Signs a list of what is revoked.
fn sign(
    issuer: Issuer<'_>,
    entries: &[RevokedCert],
    now: SystemTime,
) -> Result<Vec<u8>, MintError> {
    let number = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut extensions = Vec::new();
    if let Some(id) = issuer.key_id {
        let id = AuthorityKeyIdentifier {
            key_identifier: Some(OctetString::new(id)?),
            authority_cert_issuer: None,
            authority_cert_serial_number: None,
        };
        extensions.push(mint::extension(&id, false)?);
    }
    let number = CrlNumber(Uint::new(&number.to_be_bytes())?);
    extensions.push(mint::extension(&number, false)?);
    let algorithm = issuer.key.signature_algorithm();
    let list = TbsCertList {
        version: Version::V2,
        signature: algorithm.clone(),
        issuer: issuer.name.clone(),
        this_update: mint::time(now)?,
        next_update: Some(mint::time(now + LIFE)?),
        // An empty list is written as none (RFC 5280 section 5.1.2.6).
        revoked_certificates: (!entries.is_empty()).then(|| entries.to_vec()),
        crl_extensions: Some(extensions),
    };
    let signature = issuer.key.sign(&list.to_der()?)?;
    let signed = CertificateList {
        tbs_cert_list: list,
        signature_algorithm: algorithm,
        signature: BitString::from_bytes(&signature)?,
    };
    Ok(signed.to_der()?)
}

fn entry(resource: &Resource) -> Option<RevokedCert> {
    let serial = hex::decode(&resource.name).ok()?;
    let at = resource.spec.get("revoked_at")?.as_str()?;
    // The name has the bytes of a positive number; DER wants it with as few bytes as it needs.
    let serial = Uint::new(&serial).ok()?;
    let serial = der::Encode::to_der(&serial).ok()?;
    Some(RevokedCert {
        serial_number: <SerialNumber as der::Decode>::from_der(&serial).ok()?,
        revocation_date: mint::time(parse_rfc3339(at)?).ok()?,
        crl_entry_extensions: None,
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use futures_util::{StreamExt as _, stream};
    use serde_json::json;
    use tokio_stream::wrappers::WatchStream;

    use super::*;
    use crate::clock::Clock;
    use crate::crypto::Suite;
    use crate::embedded::ca::Authorities;
    use crate::embedded::store::{Put, Store};
    use crate::embedded::workload_identity::service::tests::state;

    #[test]
    fn a_list_satisfies_openssl() {
        let now = UNIX_EPOCH + Duration::from_secs(1_795_000_000);
        let store = Store::in_memory(Clock::system()).unwrap();
        let authorities = Authorities::open(&store, "c.example", Suite::BalancedV1, now).unwrap();
        let authority = authorities.get(AuthorityType::Spiffe);
        let signer = authority.signer().unwrap();
        let revoked = |name: &str| Resource {
            name: name.to_owned(),
            spec: json!({"reason": "test", "revoked_at": "2026-11-20T00:00:00Z"}),
            ..Resource::default()
        };
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let certificate = crate::crypto::pem::encode("CERTIFICATE", &signer.certificate);
        std::fs::write(path("ca"), certificate).unwrap();
        let show = |list: &[u8]| {
            std::fs::write(path("crl"), list).unwrap();
            let args = ["crl", "-inform", "DER", "-noout", "-text", "-CAfile"];
            let output = Command::new("openssl")
                .args(args)
                .args([&path("ca"), "-in", &path("crl")])
                .output()
                .unwrap();
            let text = [output.stdout, output.stderr].concat();
            String::from_utf8(text).unwrap()
        };
        let text = show(&sign(signer.issuer(), &[], now).unwrap());
        assert!(text.contains("verify OK"), "{text}");
        assert!(text.contains("No Revoked Certificates"), "{text}");
        let entries = entries(&[revoked("00ab12"), revoked("ff01"), revoked("junk")]);
        let text = show(&sign(signer.issuer(), &entries, now).unwrap());
        for part in [
            "verify OK",
            "Serial Number: AB12",
            "Serial Number: FF01",
            "Last Update: Nov 18",
            "Next Update: Nov 25",
            "X509v3 CRL Number",
            "X509v3 Authority Key Identifier",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(text.matches("Serial Number:").count(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_list_comes_at_once_and_again_after_a_change() {
        let state = state();
        let service = Revocation::start(&state);
        let mut lists = WatchStream::new(service.current.clone())
            .flat_map(|lists| stream::iter(lists.unwrap_or_default().to_vec()));
        let serials = |list: &[u8]| {
            let list = <CertificateList as der::Decode>::from_der(list).unwrap();
            let entries = list.tbs_cert_list.revoked_certificates.unwrap_or_default();
            let serials = entries.iter().map(|entry| entry.serial_number.to_string());
            serials.collect::<Vec<_>>()
        };
        let first = lists.next().await.unwrap();
        assert!(serials(&first).is_empty());
        let revocation = Resource {
            kind: KIND.to_owned(),
            name: "0a0b".to_owned(),
            spec: json!({"reason": "lost", "revoked_at": "2026-11-20T00:00:00Z"}),
            ..Resource::default()
        };
        state.store.put(revocation, &Put::Create).unwrap();
        let before = state.clock.now();
        let second = lists.next().await.unwrap();
        assert_eq!(serials(&second), ["0A:0B"]);
        let waited = state.clock.now().duration_since(before).unwrap();
        assert!((GATHER..GATHER * 2).contains(&waited), "{waited:?}");
        let third = lists.next().await.unwrap();
        assert_eq!(serials(&third), ["0A:0B"]);
        let waited = state.clock.now().duration_since(before).unwrap();
        assert!(
            waited >= REFRESH,
            "signed again without a reason: {waited:?}"
        );
    }
}
