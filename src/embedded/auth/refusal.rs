//! Refusals because of this cluster's own state.

use crate::embedded::ca::AuthorityError;
use crate::embedded::ca::mint::MintError;
use crate::embedded::store::StoreError;
use crate::refusal::Refusal;

/// The cause stays in this cluster's log: callers learn that it is not their fault.
fn internal(error: &dyn std::error::Error) -> Refusal {
    tracing::error!(%error, "a call failed because of this cluster's own state");
    Refusal::unavailable("the cluster cannot read or write its own state; its log tells why")
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        internal(&error)
    }
}

impl From<AuthorityError> for Refusal {
    fn from(error: AuthorityError) -> Self {
        internal(&error)
    }
}

impl From<MintError> for Refusal {
    fn from(error: MintError) -> Self {
        internal(&error)
    }
}
