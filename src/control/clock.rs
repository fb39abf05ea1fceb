//! Cluster time: the last applied stamp plus what the monotonic clock has gone on since.
//!
//! A wall clock moves it forward, never back, and only one that is synchronised; a jump of more than a day needs a
//! second node whose clock agrees, where there is one.

use super::Now;
use crate::model::{Mono, NodeId, Timestamp};
use crate::state::State;
use std::collections::BTreeMap;

const JUMP_MS_MAX: u64 = 86_400_000;

pub struct ClusterClock {
    stamp: Timestamp,
    stamped_at: Mono,
    peers: BTreeMap<NodeId, Timestamp>,
}

impl ClusterClock {
    pub fn new(stamp: Timestamp, now: Now) -> ClusterClock {
        ClusterClock { stamp, stamped_at: now.mono, peers: BTreeMap::new() }
    }

    /// An entry with this stamp has been applied.
    pub fn adopt(&mut self, stamp: Timestamp, now: Now) {
        if stamp > self.estimate(now.mono) {
            self.stamp = stamp;
            self.stamped_at = now.mono;
        }
    }

    pub fn hear(&mut self, from: NodeId, wall: Option<Timestamp>) {
        match wall {
            Some(wall) => self.peers.insert(from, wall),
            None => self.peers.remove(&from),
        };
    }

    /// `members`: a cluster of one has nobody to ask, and may have been founded on a board without a clock.
    pub fn tick(&mut self, now: Now, members: usize) {
        let Some(wall) = now.wall else { return };
        let estimate = self.estimate(now.mono);
        let jump_ms = wall.since_ms(estimate);
        let agrees = |peer: &Timestamp| peer.since_ms(wall).max(wall.since_ms(*peer)) < JUMP_MS_MAX;
        let is_confirmed = members <= 1 || self.peers.values().any(agrees);
        // Before the first entry there is no cluster time to protect.
        let is_first = self.stamp == Timestamp(0);
        if jump_ms > 0 && (is_first || jump_ms < JUMP_MS_MAX || is_confirmed) {
            self.stamp = wall;
            self.stamped_at = now.mono;
        }
    }

    fn estimate(&self, now: Mono) -> Timestamp {
        self.stamp.plus_ms(now.since_ms(self.stamped_at))
    }

    /// Never behind what has been applied.
    pub fn now(&self, now: Now, state: &State) -> Timestamp {
        self.estimate(now.mono).max(state.time())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_of_more_than_a_day_needs_a_second_node_where_there_is_one() {
        let (founded, today) = (Timestamp(1_000), Timestamp(1_800_000_000_000));
        let now = Now { mono: Mono(5_000), wall: Some(today) };
        let after = |members, other: Option<Timestamp>| {
            let mut clock = ClusterClock::new(founded, now);
            clock.hear(NodeId(2), other);
            clock.tick(now, members);
            clock.estimate(now.mono)
        };
        assert_eq!(after(2, None), founded);
        assert_eq!(after(2, Some(founded)), founded);
        assert_eq!(after(2, Some(today.plus_ms(1_000))), today);
        assert_eq!(after(1, None), today);
    }
}
