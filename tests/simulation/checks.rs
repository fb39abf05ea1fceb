//! What must hold at every step, whatever happens: the ghost state that no node sees.

use std::collections::BTreeMap;
use tinydc::consensus::Entry;

fn hash(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[derive(Default)]
pub struct Checks {
    leaders: BTreeMap<u64, u64>,
    /// By (index, term): what an entry is, everywhere.
    entries: BTreeMap<(u64, u64), u64>,
    /// By applied index: the digest of the state, everywhere.
    digests: BTreeMap<u64, [u8; 32]>,
    pub elections: u64,
}

impl Checks {
    pub fn leads(&mut self, node: u64, term: u64) {
        let first = *self.leaders.entry(term).or_insert_with(|| {
            self.elections += 1;
            node
        });
        assert_eq!(first, node, "two leaders in term {term}");
    }

    /// Entries that were sent or became durable. A sole voter may lose others in a crash and reuse their term:
    /// nobody saw them.
    pub fn appends(&mut self, entries: &[Entry]) {
        for entry in entries {
            let what = hash(&entry.data);
            let known = *self.entries.entry((entry.index, entry.term)).or_insert(what);
            assert_eq!(
                known, what,
                "log matching: two entries at index {} of term {}",
                entry.index, entry.term
            );
        }
    }

    pub fn applies(&mut self, index: u64, digest: [u8; 32]) {
        let known = *self.digests.entry(index).or_insert(digest);
        assert_eq!(known, digest, "two states after entry {index}");
    }
}
