//! How many of something may be open, in all and from one source, so that one client can't take all: connections and
//! requests from the LAN, questions of containers.

use crate::model::source_of;
use crate::tasks::lock;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_source: BTreeMap<IpAddr, usize>,
}

#[derive(Debug)]
pub struct Places {
    most: usize,
    of_one_most: usize,
    taken: Mutex<Taken>,
}

/// Held by what it was taken for, or by the tunnel that it became.
#[derive(Debug)]
pub struct Place {
    places: Arc<Places>,
    source: IpAddr,
}

impl Places {
    pub fn new(most: usize, of_one_most: usize) -> Arc<Places> {
        Arc::new(Places { most, of_one_most, taken: Mutex::default() })
    }

    /// `None`: all are taken, or the source has its share.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Option<Arc<Place>> {
        let source = source_of(address);
        let mut taken = lock(&self.taken);
        if !self.has_room(&taken, source) {
            return None;
        }
        taken.all += 1;
        *taken.by_source.entry(source).or_default() += 1;
        Some(Arc::new(Place { places: self.clone(), source }))
    }

    pub fn is_full_for(&self, address: IpAddr) -> bool {
        !self.has_room(&lock(&self.taken), source_of(address))
    }

    fn has_room(&self, taken: &Taken, source: IpAddr) -> bool {
        let own = taken.by_source.get(&source).copied().unwrap_or(0);
        taken.all < self.most && own < self.of_one_most
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
        let (most, of_one_most) = (512, 256);
        let places = Places::new(most, of_one_most);
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
            assert_eq!(held.len(), of_one_most);
            assert!(places.is_full_for(greedy) && !places.is_full_for(other));
            let others: Vec<_> = std::iter::from_fn(|| places.take(other)).collect();
            assert_eq!(held.len() + others.len(), most);
            drop((held, others));
            assert_eq!(places.count(), 0);
            assert!(lock(&places.taken).by_source.is_empty());
        }
        assert_eq!(source_of("::ffff:192.0.2.1".parse().unwrap()), IpAddr::from([192, 0, 2, 1]));
    }
}
