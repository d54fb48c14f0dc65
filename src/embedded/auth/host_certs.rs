//! `GenerateHostCert`: SSH certificates for servers.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::json;

use super::Auth;
use super::user_certs::{MAX_TTL, public_keys};
use crate::crypto::random;
use crate::crypto::ssh::{Holder, NewCertificate};
use crate::embedded::access::Access;
use crate::embedded::ca::{AuthorityType, BACKDATE};
use crate::embedded::caller::TlsIdentity;
use crate::embedded::instant::rfc3339;
use crate::pb::teleport::trust::v1 as trust;
use crate::refusal::Refusal;

/// The only sort of server that bots make certificates for.
const ROLE: &str = "Node";
/// The most names of one server.
const MAX_PRINCIPALS: usize = 256;
/// The longest name of a server, in bytes: that of a DNS name.
const MAX_PRINCIPAL: usize = 255;

impl Auth {
    /// Signs with the host authority; the line of an `…-cert.pub` file.
    pub(super) fn host_cert(
        &self,
        caller: &TlsIdentity,
        request: &trust::GenerateHostCertRequest,
    ) -> Result<Vec<u8>, Refusal> {
        let state = self.state.as_ref();
        let access = state
            .store
            .transaction(|tx| Access::of(tx, &caller.roles))?;
        if !access.may("host_cert", "create") {
            let text = "access denied to perform action \"create\" on \"host_cert\"";
            return Err(Refusal::denied(text));
        }
        if request.cluster_name != state.name {
            return Err(Refusal::not_found(format!(
                "cert authority host/{} is not found",
                request.cluster_name
            )));
        }
        let ttl = check(request)?;
        let keys = public_keys(&[], &request.key)?;
        let spki = keys
            .ssh
            .ok_or_else(|| Refusal::bad_parameter("must provide a public key"))?;
        let now = state.clock.now();
        let expires = now + ttl;
        let extensions = BTreeMap::from([
            ("x-teleport-authority".to_owned(), state.name.clone()),
            ("x-teleport-role".to_owned(), request.role.clone()),
        ]);
        let line = NewCertificate {
            holder: Holder::Host,
            spki: &spki,
            serial: u64::from_be_bytes(random()),
            key_id: "",
            principals: &request.principals,
            valid_after: now - BACKDATE,
            valid_before: expires,
            extensions: &extensions,
        }
        .sign(state.authorities.get(AuthorityType::Host).ssh_signer()?)
        .map_err(|source| Refusal::bad_parameter(format!("the SSH public key: {source}")))?;
        // A Teleport cluster writes nothing here; the members are those of its other certificates.
        state.audit.emit(json!({
            "event": "cert.create",
            "code": "TC000I",
            "cert_type": "host",
            "identity": {
                "user": caller.user,
                "bot_name": caller.bot_name,
                "bot_instance_id": caller.bot_instance_id,
                "principals": request.principals,
                "expires": rfc3339(expires),
                "teleport_cluster": state.name,
            },
        }));
        Ok(line.into_bytes())
    }
}

/// The life that the certificate will have.
fn check(request: &trust::GenerateHostCertRequest) -> Result<Duration, Refusal> {
    let bad = |text: &str| Err(Refusal::bad_parameter(text));
    if request.role != ROLE {
        return Err(Refusal::bad_parameter(format!(
            "role {:?} is not supported: host certificates are for {ROLE:?}",
            request.role
        )));
    }
    if !request.host_id.is_empty() || !request.node_name.is_empty() {
        return bad("no server of this cluster has a host ID: name it by its principals");
    }
    if request.principals.is_empty() {
        return bad("host ID or principals are required");
    }
    if request.principals.len() > MAX_PRINCIPALS {
        return Err(Refusal::bad_parameter(format!(
            "there are more than {MAX_PRINCIPALS} principals"
        )));
    }
    let odd = |name: &&String| {
        name.is_empty() || name.len() > MAX_PRINCIPAL || name.chars().any(char::is_control)
    };
    if let Some(name) = request.principals.iter().find(odd) {
        let start: String = name.chars().take(64).collect();
        return Err(Refusal::bad_parameter(format!(
            "the principal {start:?} is no name of a host"
        )));
    }
    let ttl = request.ttl.and_then(|ttl| Duration::try_from(ttl).ok());
    match ttl.filter(|ttl| *ttl >= Duration::from_secs(1)) {
        Some(ttl) => Ok(ttl.min(MAX_TTL)),
        None => bad("a time to live of 1s or more is required"),
    }
}
