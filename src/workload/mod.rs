//! SVIDs for workloads: issued, cached and renewed, with the bundles and revocations beside them.
//!
//! [`selector`] says which workload identities are meant, [`issue`] asks the cluster and checks its
//! answer ([`legacy`] does so by the older call), [`cache`] holds what was issued and renews it from
//! one queue, [`shelf`] keeps it across a restart, [`tokens`] holds JWT-SVIDs while they are young, [`bundle`] and [`crl`] follow what
//! relying parties need. Clients come in already bound to an identity.

pub mod bundle;
pub mod cache;
pub mod crl;
pub mod issue;
pub mod jwt;
pub mod legacy;
pub mod selector;
pub mod shelf;

mod hints;
mod keys;
mod memo;
mod outcome;
pub mod tokens;
mod turns;

#[cfg(test)]
pub(crate) mod tests;

pub use bundle::{BundleFeed, Bundles, Federated};
pub use cache::{Answer, Cache, Freshness, State, Subscription};
pub use crl::{Crl, CrlFeed};
pub use issue::{Access, ClusterIssuer, IssueError, Issuer, Svid};
pub use jwt::{JwtIssuer, TokenIssuer};
pub use legacy::{LegacyIssuer, PathRequest};
pub use memo::Memo;
pub use selector::Selector;
pub use shelf::{Beside, Origin, Shelf};
pub use tokens::{Issued, Tokens};
