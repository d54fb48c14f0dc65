//! The ID tokens that were seen, so that one that was overheard is of no use elsewhere.
//!
//! A job may present its token several times: for a second output, for a renewal, or because an answer
//! was lost. So a token is not used up; it is bound to the address that it first came from.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use super::LEEWAY;
use crate::crypto::sha256;

/// The most tokens that are remembered, about 100 bytes each. Beyond it, those that end first go.
const REMEMBERED: usize = 64 * 1024;

/// A token that came before from elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "id token: it was used before from another address: every job has to take a token of its own"
)]
pub struct Replayed;

/// The tokens that were seen and are not past.
#[derive(Debug, Default)]
pub struct Used(Mutex<HashMap<[u8; 32], First>>);

#[derive(Debug, Clone, Copy)]
struct First {
    address: IpAddr,
    expires: SystemTime,
}

impl Used {
    /// Notes that `token`, valid until `expires`, came from `address`.
    ///
    /// `again`: the caller is connected with the certificate of a bot that joined with this join token
    /// before. It may have moved meanwhile; whoever only has the ID token lacks its key.
    ///
    /// # Errors
    /// [`Replayed`], if it came from elsewhere before.
    pub fn note(
        &self,
        token: &str,
        address: IpAddr,
        again: bool,
        expires: SystemTime,
        now: SystemTime,
    ) -> Result<(), Replayed> {
        let address = address.to_canonical();
        // Without its signature: one by ECDSA has two spellings.
        let signed = token.rsplit_once('.').map_or(token, |(signed, _)| signed);
        let hash = sha256(signed.as_bytes());
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(first) = used.get(&hash) {
            return if again || first.address == address {
                Ok(())
            } else {
                Err(Replayed)
            };
        }
        if used.len() >= REMEMBERED {
            used.retain(|_, first| {
                now.duration_since(first.expires)
                    .map_or(true, |past| past < LEEWAY)
            });
        }
        if used.len() >= REMEMBERED {
            let soonest = used.iter().min_by_key(|(_, first)| first.expires);
            if let Some(hash) = soonest.map(|(hash, _)| *hash) {
                used.remove(&hash);
            }
        }
        used.insert(hash, First { address, expires });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;

    #[test]
    fn a_token_is_bound_to_where_it_first_came_from() {
        let used = Used::default();
        let expires = NOW + Duration::from_mins(5);
        let (here, there) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let note = |token, address, again| used.note(token, address, again, expires, NOW);
        assert_eq!(note("a", here, false), Ok(()));
        assert_eq!(note("a", here, false), Ok(()));
        assert_eq!(note("a", there, false), Err(Replayed));
        assert_eq!(note("a", there, true), Ok(()));
        // Whoever was let in again did not take it over.
        assert_eq!(note("a", there, false), Err(Replayed));
        assert_eq!(note("b", there, false), Ok(()));
        // Another signature of the same claims.
        assert_eq!(note("c.c.1", here, false), Ok(()));
        assert_eq!(note("c.c.2", there, false), Err(Replayed));
        let mapped = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(note("a", mapped, false), Ok(()));
    }

    #[test]
    fn a_flood_of_tokens_takes_bounded_memory() {
        let used = Used::default();
        let address = IpAddr::from([10, 0, 0, 1]);
        for number in 0..REMEMBERED + 100 {
            let life = Duration::from_secs(u64::try_from(number % 50).unwrap());
            used.note(&number.to_string(), address, false, NOW + life, NOW)
                .unwrap();
        }
        assert_eq!(used.0.lock().unwrap().len(), REMEMBERED);
        let later = NOW + Duration::from_mins(5);
        used.note("x", address, false, later, later).unwrap();
        assert_eq!(used.0.lock().unwrap().len(), 1);
    }
}
