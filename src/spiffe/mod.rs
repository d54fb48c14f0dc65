//! SPIFFE IDs, trust domains, bundle documents and JWT-SVIDs, read strictly.

pub mod bundle;
mod id;
pub mod jwt;

pub use id::{IdError, SpiffeId, TrustDomain};
