//! Cluster time: the last applied stamp plus what the monotonic clock has gone on since.
//!
//! A wall clock moves it forward, never back, and only one that is synchronised; a jump of more than a day needs a
//! second node whose clock agrees.

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

    pub fn tick(&mut self, now: Now) {
        let Some(wall) = now.wall else { return };
        let estimate = self.estimate(now.mono);
        let jump_ms = wall.since_ms(estimate);
        let agrees = |peer: &Timestamp| peer.since_ms(wall).max(wall.since_ms(*peer)) < JUMP_MS_MAX;
        // Before the first entry there is no cluster time to protect.
        let is_first = self.stamp == Timestamp(0);
        if jump_ms > 0 && (is_first || jump_ms < JUMP_MS_MAX || self.peers.values().any(agrees)) {
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
