//! Whether a call may be made at all: a certificate of ours, still good, of a user who exists and
//! is not locked.

use super::locks::{self, Targets};
use super::refusal::Refusal;
use crate::embedded::ClusterState;
use crate::embedded::caller::{Caller, Listener, TlsIdentity};

/// The identity of a caller that may make authorised calls.
///
/// Reads the store: call it where waiting a few milliseconds is fine.
///
/// # Errors
/// Access denied, with the text of an 18.0 cluster.
pub fn authorize(state: &ClusterState, caller: &Caller) -> Result<TlsIdentity, Refusal> {
    let identity = caller
        .identity
        .as_ref()
        .filter(|_| caller.listener == Listener::Auth)
        .ok_or_else(|| Refusal::denied("access denied: a client certificate is required"))?;
    // A connection may outlive the certificate it was opened with.
    if identity.expires < state.clock.now() {
        return Err(Refusal::denied(
            "access denied: the client certificate has expired",
        ));
    }
    state.store.transaction(|tx| {
        if identity.cluster != state.name || tx.get("user", &identity.user)?.is_none() {
            return Err(Refusal::denied("access denied"));
        }
        locks::check(
            tx,
            &Targets {
                user: &identity.user,
                roles: &identity.roles,
                bot_instance: &identity.bot_instance_id,
                join_token: "",
            },
        )
    })?;
    Ok(identity.clone())
}
