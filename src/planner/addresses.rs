//! Which node holds a floating address: the one that has it, and when that falls silent the next in the circle.
//!
//! Input: the holder by the state, the nodes that live and could hold it. Output: the holder to be. The leader and
//! every node come to the same answer from the same facts, so that an address moves without waiting for an election.

use crate::model::{Node, NodeId};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

/// A holder silent for this long is suspected: its addresses move.
pub const SUSPECTED_AFTER_MS: u64 = 1_500;

/// Whether addresses are to be where others will be able to reach them in a moment, too.
pub fn may_hold(node: &Node) -> bool {
    !node.is_drained && !node.is_leaving && !node.is_ending
}

pub fn holder(address: Ipv4Addr, current: Option<NodeId>, candidates: &BTreeSet<NodeId>) -> Option<NodeId> {
    match current {
        Some(node) if candidates.contains(&node) => Some(node),
        Some(node) => candidates.range(node..).next().or_else(|| candidates.first()).copied(),
        // Addresses begin on different nodes.
        None => {
            let count = candidates.len().max(1);
            candidates.iter().nth(usize::from(address.octets()[3]) % count).copied()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_stays_while_its_holder_lives_and_goes_on_in_a_circle() {
        let address = Ipv4Addr::new(192, 0, 2, 10);
        let check = |current: Option<u64>, live: &[u64], expected: Option<u64>| {
            let live = live.iter().map(|id| NodeId(*id)).collect();
            assert_eq!(holder(address, current.map(NodeId), &live), expected.map(NodeId));
        };
        check(Some(2), &[1, 2, 3], Some(2));
        check(Some(2), &[1, 3], Some(3));
        check(Some(3), &[1, 2], Some(1));
        check(Some(3), &[], None);
        check(None, &[4, 5, 6], Some(5));
        check(None, &[], None);
    }
}
