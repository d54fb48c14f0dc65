//! How many connections one peer may hold, so that nobody takes all of them.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// Connections by peer.
#[derive(Debug)]
pub(super) struct Peers {
    most: usize,
    open: Mutex<HashMap<IpAddr, usize>>,
}

/// One connection that is counted; dropping it ends that.
#[derive(Debug)]
pub(super) struct Admission {
    peers: Arc<Peers>,
    peer: IpAddr,
}

impl Peers {
    /// Lets each peer have `most` connections.
    pub(super) fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            open: Mutex::default(),
        })
    }

    /// Counts one more connection of the peer at `address`; `None` if it has as many as it may.
    pub(super) fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Admission> {
        let peer = network(address);
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(peer).or_default();
        if *count >= self.most {
            return None;
        }
        *count += 1;
        Some(Admission {
            peers: Arc::clone(self),
            peer,
        })
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut open = self.peers.open.lock();
        let open = open.as_mut().unwrap_or_else(|poison| poison.get_mut());
        if let Some(count) = open.get_mut(&self.peer) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                open.remove(&self.peer);
            }
        }
    }
}

/// Who counts as one peer: an IPv4 address, or the 64 bits of an IPv6 address that its owner
/// cannot choose.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_peer_has_its_own_limit_and_gets_back_what_it_closes() {
        let peers = Peers::new(2);
        let admit = |text: &str| peers.admit(text.parse().unwrap());
        let first = admit("192.0.2.1").unwrap();
        let mapped = admit("::ffff:192.0.2.1").unwrap();
        assert!(admit("192.0.2.1").is_none());
        let other = admit("192.0.2.2").unwrap();
        drop(mapped);
        let again = admit("192.0.2.1").unwrap();
        let neighbours = [admit("2001:db8::1").unwrap(), admit("2001:db8::2").unwrap()];
        assert!(admit("2001:db8::3").is_none());
        assert!(admit("2001:db8:0:1::3").is_some());
        drop((first, other, again, neighbours));
        assert!(peers.open.lock().unwrap().is_empty());
    }
}
