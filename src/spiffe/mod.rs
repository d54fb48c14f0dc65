//! SPIFFE IDs, trust domains and JWT-SVIDs, read strictly.

mod id;
pub mod jwt;

pub use id::{IdError, SpiffeId, TrustDomain};
