//! How a cluster is found, reached and spoken to.
//!
//! [`ping`] discovers addresses, [`dial`] opens connections and [`network`] knows the ways there are
//! to do that, [`trust`] says whom to believe before there is an identity, `first` connects then,
//! `tunnel` leads through proxies that let only SSH pass, [`credential`] is what a channel presents,
//! `channel` follows it through renewals, [`client`] has the typed calls, [`error`] says what a
//! failure means, [`feature`] what a cluster of another version lacks. `transport` reaches the SSH
//! servers behind a proxy.

pub mod client;
pub mod credential;
pub mod dial;
pub mod error;
pub mod events;
pub mod feature;
pub mod network;
pub mod ping;
mod refused;
pub mod trust;

mod channel;
pub(crate) mod first;
mod forward;
mod switch;
pub(crate) mod transport;
pub(crate) mod tunnel;
mod upgrade;

pub use client::Client;
pub use credential::Credential;
pub use error::{ClusterError, Disposition};
pub use ping::Endpoints;
