//! How much of something bounded one asker may have: a quarter, so that a container whose names nobody answers for does not
//! end name resolution for its node.

use crate::tasks::lock;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Mutex;

#[derive(Default)]
struct Taken {
    all: usize,
    by_asker: BTreeMap<Ipv4Addr, usize>,
}

pub struct Shares {
    most: usize,
    taken: Mutex<Taken>,
}

/// Counts for as long as it lives.
pub struct Share<'a> {
    shares: &'a Shares,
    asker: Ipv4Addr,
}

impl Shares {
    pub fn new(most: usize) -> Shares {
        Shares { most, taken: Mutex::default() }
    }

    /// `None`: all are taken, or the asker has its quarter.
    pub fn take(&self, asker: Ipv4Addr) -> Option<Share<'_>> {
        let mut taken = lock(&self.taken);
        if !self.has_room(&taken, asker) {
            return None;
        }
        taken.all += 1;
        *taken.by_asker.entry(asker).or_default() += 1;
        Some(Share { shares: self, asker })
    }

    pub fn is_full_for(&self, asker: Ipv4Addr) -> bool {
        !self.has_room(&lock(&self.taken), asker)
    }

    fn has_room(&self, taken: &Taken, asker: Ipv4Addr) -> bool {
        let own = taken.by_asker.get(&asker).copied().unwrap_or(0);
        taken.all < self.most && own < self.most / 4
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        let mut taken = lock(&self.shares.taken);
        taken.all -= 1;
        if let Some(own) = taken.by_asker.get_mut(&self.asker) {
            *own -= 1;
            if *own == 0 {
                taken.by_asker.remove(&self.asker);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_asker_has_a_quarter_and_four_have_all() {
        let shares = Shares::new(8);
        let take_all = |last: u8| {
            let asker = Ipv4Addr::new(10, 77, 1, last);
            std::iter::from_fn(|| shares.take(asker)).collect::<Vec<_>>()
        };
        let held: Vec<_> = (1..=5).map(take_all).collect();
        assert_eq!(held.iter().map(Vec::len).collect::<Vec<_>>(), [2, 2, 2, 2, 0]);
        assert!(shares.is_full_for(Ipv4Addr::new(10, 77, 1, 6)));
        drop(held);
        assert!(lock(&shares.taken).by_asker.is_empty());
        assert_eq!(take_all(1).len(), 2);
    }
}
