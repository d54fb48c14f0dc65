//! Tests of the whole: the built binary, the tree of sources, the wire format.
//!
//! One binary, so that it is linked once. `common` has what starts real parts.

#![expect(
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stderr,
    clippy::string_slice,
    clippy::unwrap_used,
    reason = "a test may end where it stands"
)]

mod architecture;
mod argo_cd;
mod attest_docker;
mod attest_kubernetes;
mod attest_podman;
mod attest_sigstore;
mod attest_unix;
mod bad_input;
mod bound_keypair;
mod ci;
mod clients;
mod common;
mod completeness;
mod config;
mod conformance;
mod dialling;
mod discovery;
mod docs;
mod envoy;
mod examples;
mod federation;
mod flood;
mod foreign;
mod fuzz;
mod guide;
mod handover;
mod harness;
mod hostile;
mod http2;
mod init;
mod inspect;
mod interop;
mod issuer_override;
mod join_clouds;
mod join_kubernetes;
mod join_methods;
mod join_oidc;
mod join_tpm;
mod killed;
mod killed_writer;
mod kubernetes_secret;
mod outputs;
mod readers;
mod reload;
mod renewal;
mod revocation;
mod rotation;
mod ssh;
mod svid_outputs;
mod units;
mod wire;
mod workload_api;
