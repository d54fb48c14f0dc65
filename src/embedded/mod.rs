//! The embedded cluster: one node that speaks a Teleport cluster's own wire protocol.
//!
//! It shares no agent logic, only the crypto primitives, the generated messages and the verifying
//! halves of the join methods, so that a shared mistake cannot hide.
//!
//! - [`store`]: resources in SQLite, with revisions, expiry and transactions.
//! - [`audit`]: one JSON line for each join, certificate, refusal and administrative change.
//! - [`ca`]: the authorities, and the making of certificates.
//! - [`caller`]: who calls, by certificate and listener.
//! - [`instant`]: points in time as resources and audit lines write them.
//! - [`resources`]: resource files, checked and applied as `tctl create` does.

pub mod audit;
pub mod ca;
pub mod caller;
pub mod instant;
pub mod resources;
pub mod store;
