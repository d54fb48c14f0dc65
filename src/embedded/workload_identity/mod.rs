//! Workload identity: who may have which SVID, and the making of it.
//!
//! - [`attrs`]: what is known of a workload, its agent's user and its join.
//! - [`expression`]: the language of rules and templates.
//! - [`template`]: texts with expressions inside.
//! - [`rules`]: conditions and expressions that let a workload through.
//! - [`decision`]: a resource and attributes to the contents of an SVID, or a refusal.
//! - [`resource`]: the `workload_identity` resource: read, checked, stored.

pub mod attrs;
pub mod decision;
pub mod expression;
pub mod resource;
pub mod rules;
pub mod template;
