//! SPIFFE IDs and trust domains, parsed strictly (SPIFFE-ID.md).

mod id;

pub use id::{IdError, SpiffeId, TrustDomain};
