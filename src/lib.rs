//! A machine identity agent for Teleport clusters, and a single-node cluster beside it.
//!
//! Modules in ring order: a module imports its own ring's listed neighbours and lower rings only
//! (`docs/ARCHITECTURE.md`, enforced by `tests/it/architecture.rs`).

pub mod app;
pub mod attest;
pub mod backoff;
pub mod cli;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod crypto;
pub mod destination;
pub mod diag;
pub mod embedded;
pub mod env;
mod exchange;
pub mod expression;
pub mod fsx;
pub mod health;
pub mod identity;
pub mod install;
pub mod join;
pub mod outbound;
pub mod pb;
mod query;
pub mod refusal;
pub mod renewal;
pub mod secret;
pub mod services;
pub mod spiffe;
mod ssh;
pub mod telemetry;
pub mod websocket;
pub mod workload;
pub mod yaml;
