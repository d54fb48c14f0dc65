//! SVIDs for workloads: issued, cached and renewed, with the bundles and revocations beside them.
//!
//! [`selector`] says which workload identities are meant, [`issue`] asks the cluster and checks its
//! answer, [`cache`] holds what was issued and renews it from one queue, [`bundle`] and [`crl`]
//! follow what relying parties need. Clients come in already bound to an identity.

pub mod bundle;
pub mod cache;
pub mod crl;
pub mod issue;
pub mod selector;

pub use bundle::{BundleFeed, Bundles};
pub use cache::{Cache, State, Subscription};
pub use crl::{Crl, CrlFeed};
pub use issue::{Access, ClusterIssuer, IssueError, Issuer, Svid};
pub use selector::Selector;

/// A time as RFC 3339 in UTC with seconds, for logs.
pub(crate) fn rfc3339(at: std::time::SystemTime) -> String {
    use time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::from(at)
        .replace_nanosecond(0)
        .ok()
        .and_then(|at| at.format(&Rfc3339).ok())
        .unwrap_or_default()
}
