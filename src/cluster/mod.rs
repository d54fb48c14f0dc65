//! How a cluster is found, reached and spoken to.
//!
//! [`ping`] discovers addresses, [`dial`] opens connections, [`trust`] says whom to believe before
//! there is an identity, [`credential`] what a channel presents, [`channel`] follows it through
//! renewals, [`client`] has the typed calls, [`error`] says what a failure means.

pub mod client;
pub mod credential;
pub mod dial;
pub mod error;
pub mod ping;
pub mod trust;

mod channel;

pub use client::Client;
pub use credential::Credential;
pub use error::{ClusterError, Disposition};
pub use ping::Endpoints;
