//! How many connections there are, of whom.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::ServerLimits;

/// The places for connections of one face.
pub(crate) struct Places {
    connections_max: usize,
    connections_per_peer_max: usize,
    state: Mutex<Taken>,
}

#[derive(Default)]
struct Taken {
    all: usize,
    of_peer: HashMap<IpAddr, usize>,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    /// All are taken.
    All(usize),
    /// This address has taken its share.
    Peer(usize),
}

/// One connection's place, free again when it is dropped.
pub(super) struct Place {
    places: Arc<Places>,
    peer: IpAddr,
}

impl Places {
    pub(crate) fn new(limits: &ServerLimits) -> Arc<Self> {
        let &ServerLimits { connections_max, connections_per_peer_max, .. } = limits;
        Arc::new(Self { connections_max, connections_per_peer_max, state: Mutex::default() })
    }

    pub(super) fn take(self: &Arc<Self>, address: IpAddr) -> Result<Place, Full> {
        let peer = holder(address);
        let mut taken = self.lock();
        if taken.all >= self.connections_max {
            return Err(Full::All(self.connections_max));
        }
        let of_peer = taken.of_peer.entry(peer).or_default();
        if *of_peer >= self.connections_per_peer_max {
            return Err(Full::Peer(self.connections_per_peer_max));
        }
        *of_peer += 1;
        taken.all += 1;
        Ok(Place { places: self.clone(), peer })
    }

    /// Places that are taken.
    pub(crate) fn taken(&self) -> usize {
        self.lock().all
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = self.places.lock();
        taken.all -= 1;
        if let Some(count) = taken.of_peer.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                taken.of_peer.remove(&self.peer);
            }
        }
    }
}

/// Who an address counts for: of IPv6, a network of 64 bits is one holder's.
fn holder(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_limited_together_and_for_each_holder_and_come_back() {
        let limits =
            ServerLimits { connections_max: 3, connections_per_peer_max: 2, ..ServerLimits::DEFAULT };
        let places = Places::new(&limits);
        let take = |address: &str| places.take(address.parse().unwrap());
        let one = take("2001:db8::1").ok().unwrap();
        let _two = take("2001:db8::2").ok().unwrap();
        assert_eq!(take("2001:db8::3").err(), Some(Full::Peer(2)), "one network of 64 bits");
        let _three = take("10.0.0.1").ok().unwrap();
        assert_eq!(take("::ffff:10.0.0.1").err(), Some(Full::All(3)));
        drop(one);
        let _four = take("::ffff:10.0.0.1").ok().unwrap();
        assert_eq!(places.lock().of_peer.len(), 2, "an IPv4 address has one name");
    }
}
