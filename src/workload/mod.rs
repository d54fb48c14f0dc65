//! SVIDs for workloads: issued, cached and renewed, with the bundles and revocations beside them.
//!
//! [`selector`] says which workload identities are meant, [`issue`] asks the cluster and checks its
//! answer ([`legacy`] does so by the older call), [`cache`] holds what was issued and renews it from one queue, [`bundle`] and [`crl`]
//! follow what relying parties need. Clients come in already bound to an identity.

pub mod bundle;
pub mod cache;
pub mod crl;
pub mod issue;
pub mod jwt;
pub mod legacy;
pub mod selector;

mod outcome;

#[cfg(test)]
pub(crate) mod tests;

pub use bundle::{BundleFeed, Bundles, Federated};
pub use cache::{Cache, Freshness, State, Subscription};
pub use crl::{Crl, CrlFeed};
pub use issue::{Access, ClusterIssuer, IssueError, Issuer, MAX_HINT, Svid};
pub use jwt::JwtIssuer;
pub use legacy::{LegacyIssuer, PathRequest};
pub use selector::Selector;
