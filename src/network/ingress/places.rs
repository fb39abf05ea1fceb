//! How many connections may be open, in all and from one address.

use crate::tasks::lock;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

/// Each holds some 20 kB while a request passes, and two file descriptors.
pub const CONNECTIONS_MAX: usize = 512;
/// So that one client can't take all; behind a router with one address many people may sit.
const OF_ONE_ADDRESS_MAX: usize = 256;
const _: () = assert!(OF_ONE_ADDRESS_MAX < CONNECTIONS_MAX);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_address: BTreeMap<IpAddr, usize>,
}

#[derive(Debug, Default)]
pub struct Places {
    taken: Mutex<Taken>,
}

/// Held by a connection, or by the tunnel that it became.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    address: IpAddr,
}

impl Places {
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Option<Arc<Place>> {
        let mut taken = lock(&self.taken);
        let own = taken.by_address.get(&address).copied().unwrap_or(0);
        if taken.all >= CONNECTIONS_MAX || own >= OF_ONE_ADDRESS_MAX {
            return None;
        }
        taken.all += 1;
        taken.by_address.insert(address, own + 1);
        Some(Arc::new(Place { places: self.clone(), address }))
    }

    pub fn count(&self) -> usize {
        lock(&self.taken).all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.places.taken);
        taken.all -= 1;
        if let Some(own) = taken.by_address.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                taken.by_address.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_all_places() {
        let places = Arc::<Places>::default();
        let (greedy, other) = ([192, 0, 2, 1].into(), [192, 0, 2, 2].into());
        let held: Vec<_> = std::iter::from_fn(|| places.take(greedy)).collect();
        assert_eq!(held.len(), OF_ONE_ADDRESS_MAX);
        let others: Vec<_> = std::iter::from_fn(|| places.take(other)).collect();
        assert_eq!(held.len() + others.len(), CONNECTIONS_MAX);
        drop((held, others));
        assert_eq!(places.count(), 0);
        assert!(lock(&places.taken).by_address.is_empty());
    }
}
