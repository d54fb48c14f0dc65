//! What the bot holds and when it renews: the only module with a renewal loop of its own.
//!
//! [`material`] is what an identity consists of, [`store`] keeps the bot's own one through crashes,
//! [`state`] decides what to do next, [`bot`] does it, [`Handle`] is what services see. `file` reads
//! an identity that was written for others.

pub mod bot;
pub mod material;
pub mod state;
pub mod store;

pub(crate) mod file;
#[cfg(test)]
pub(crate) mod fixtures;
mod handle;
mod recent;

pub(crate) use handle::new_key;
pub use handle::{Handle, IdentityError, Request, Target};
pub use material::{Identity, MaterialError};

/// An identity issued for an output, with the roles and route that were asked for.
pub type Issued = Identity;
