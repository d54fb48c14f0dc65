//! The certificates between Azure's signature and its root, which the signature does not bring along:
//! each certificate says where its issuer's is. The cluster cannot always reach that place.

use http::{Request, StatusCode, header};
use http_body_util::Full;

use super::verify::{ISSUERS, MAX_CERTIFICATE, issuer_path, signer};
use crate::crypto::x509::Certificate;
use crate::outbound::{Outbound, Target};

/// The longest chain that is followed.
const MAX_DEPTH: usize = 10;

/// The issuers of the signer of `attested`, without the root, DER one after the other. What cannot be
/// fetched is left out: the cluster may have it, or be able to fetch it itself.
pub(super) async fn of(attested: &[u8]) -> Vec<u8> {
    let mut chain = Vec::new();
    let Ok(mut certificate) = signer(attested) else {
        return chain;
    };
    let mut seen = Vec::new();
    while seen.len() < MAX_DEPTH {
        let Some(path) = issuer_path(&certificate).filter(|path| !seen.contains(path)) else {
            break;
        };
        let issuer = match fetch(&path).await {
            Ok(issuer) => issuer,
            Err(error) => {
                tracing::warn!(path, error, "Cannot fetch the issuer of Azure's signature");
                break;
            }
        };
        if issuer.is_signed_by(&issuer) {
            break;
        }
        chain.extend_from_slice(issuer.der());
        certificate = issuer;
        seen.push(path);
    }
    chain
}

async fn fetch(path: &str) -> Result<Certificate, String> {
    let target = Target::parse(ISSUERS).ok_or("no URL")?;
    let request = Request::get(path)
        .header(header::HOST, target.authority())
        .body(Full::default())
        .map_err(|error| error.to_string())?;
    let outbound = Outbound::new().map_err(|error| error.to_string())?;
    let answer = outbound
        .send(&target, request, MAX_CERTIFICATE)
        .await
        .map_err(|error| error.to_string())?;
    if answer.status != StatusCode::OK {
        return Err(answer.status.to_string());
    }
    Certificate::from_der(&answer.body).map_err(|error| error.to_string())
}
