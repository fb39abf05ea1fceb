//! How many connections or requests may be open, in all and from one source, so that one client can't take all.

use crate::model::source_of;
use crate::tasks::lock;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

/// Each holds some 20 kB while a request passes, and a file descriptor.
pub const CONNECTIONS_MAX: usize = 512;
/// On their way to an endpoint, each with a connection and a file descriptor of its own: one connection of a client may
/// carry many.
pub const REQUESTS_MAX: usize = 1024;
/// Of either; behind a router with one address many people may sit.
const OF_ONE_SOURCE_MAX: usize = 256;
const _: () = assert!(OF_ONE_SOURCE_MAX < CONNECTIONS_MAX && CONNECTIONS_MAX <= REQUESTS_MAX);

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_source: BTreeMap<IpAddr, usize>,
}

#[derive(Debug)]
pub struct Places {
    most: usize,
    taken: Mutex<Taken>,
}

/// Held by what it was taken for, or by the tunnel that it became.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    source: IpAddr,
}

impl Places {
    pub fn new(most: usize) -> Arc<Places> {
        Arc::new(Places { most, taken: Mutex::default() })
    }

    pub fn take(self: &Arc<Self>, address: IpAddr) -> Option<Arc<Place>> {
        let source = source_of(address);
        let mut taken = lock(&self.taken);
        let own = taken.by_source.get(&source).copied().unwrap_or(0);
        if taken.all >= self.most || own >= OF_ONE_SOURCE_MAX {
            return None;
        }
        taken.all += 1;
        taken.by_source.insert(source, own + 1);
        Some(Arc::new(Place { places: self.clone(), source }))
    }

    pub fn count(&self) -> usize {
        lock(&self.taken).all
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut taken = lock(&self.places.taken);
        taken.all -= 1;
        if let Some(own) = taken.by_source.get_mut(&self.source) {
            *own -= 1;
            if *own == 0 {
                taken.by_source.remove(&self.source);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;

    #[test]
    fn one_source_cannot_take_all_places() {
        let places = Places::new(CONNECTIONS_MAX);
        let mut last = 0;
        for (greedy, other) in [("192.0.2.1", "192.0.2.2"), ("2001:db8:0:1::", "2001:db8:0:2::")] {
            let (greedy, other): (IpAddr, IpAddr) = (greedy.parse().unwrap(), other.parse().unwrap());
            // Each IPv6 connection comes from another address of the same host.
            let held: Vec<_> = std::iter::from_fn(|| {
                last += 1;
                places.take(match greedy {
                    IpAddr::V6(network) => Ipv6Addr::from(u128::from(network) + last).into(),
                    greedy => greedy,
                })
            })
            .collect();
            assert_eq!(held.len(), OF_ONE_SOURCE_MAX);
            let others: Vec<_> = std::iter::from_fn(|| places.take(other)).collect();
            assert_eq!(held.len() + others.len(), CONNECTIONS_MAX);
            drop((held, others));
            assert_eq!(places.count(), 0);
            assert!(lock(&places.taken).by_source.is_empty());
        }
        assert_eq!(source_of("::ffff:192.0.2.1".parse().unwrap()), IpAddr::from([192, 0, 2, 1]));
    }
}
