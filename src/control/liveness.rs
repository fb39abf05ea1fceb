//! Who is alive: last heard on the monotonic clock, in memory only, on every node.
//!
//! Each node sends each other an `Alive` datagram every 500 ms. It derives from nothing that waits for a disk. A
//! new leader judges by the table it already has.

use super::Now;
use crate::model::{Condition, Gather, Mono, Node, NodeId, StartId, Timestamp};
use crate::planner::addresses::SUSPECTED_AFTER_MS;
use crate::planner::{Heard, HeardNodes};
use crate::state::{Command, State};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

const ALIVE_EVERY_MS: u64 = 500;
/// A node this long silent is lost.
const LOST_AFTER_MS: u64 = 3_000;
/// After this daemon's start nodes it has never heard get this long: boards come back one by one after a power cut.
const SETTLE_MS: u64 = 90_000;
/// An own tick this late says that this process was paused: what it did not hear meanwhile says nothing.
const LATE_TICK_MS: u64 = 500;
const GRACE_AFTER_PAUSE_MS: u64 = 3_000;
/// A clean stop announced itself: nothing moves for this long.
const CLEAN_STOP_MS: u64 = 60_000;
const FSYNC_STALLED_MS: u64 = 10_000;
const FSYNC_LOST_MS: u64 = 30_000;

/// What a node tells every other, twice a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    pub start_id: StartId,
    pub seq: u64,
    pub figures: Figures,
    /// Its wall clock, if synchronised.
    pub wall: Option<Timestamp>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Age of its oldest unfinished write; 0 if none.
    pub fsync_age_ms: u64,
    /// 1-minute load average, in hundredths.
    pub load_percent: u32,
    pub memory_available_bytes: u64,
    pub is_disk_full: bool,
    /// Which floating addresses it could hold: a bit for each, in the order of the state.
    pub holdable: u16,
}

struct LastHeard {
    at: Mono,
    alive: Alive,
}

pub struct Liveness {
    own: NodeId,
    start_id: StartId,
    started_at: Mono,
    last_tick: Mono,
    /// No verdict of death before this.
    trusted_from: Mono,
    sent_at: Option<Mono>,
    seq: u64,
    heard: BTreeMap<NodeId, LastHeard>,
    /// The newest run of each node that this one heard or was connected to, and when last.
    runs: BTreeMap<NodeId, (StartId, Mono)>,
    leaderless_since: Option<Mono>,
}

impl Liveness {
    pub fn new(own: NodeId, start_id: StartId, now: Mono) -> Liveness {
        Liveness {
            own,
            start_id,
            started_at: now,
            last_tick: now,
            trusted_from: now,
            sent_at: None,
            seq: 0,
            heard: BTreeMap::new(),
            runs: BTreeMap::new(),
            leaderless_since: Some(now),
        }
    }

    pub fn hear(&mut self, from: NodeId, alive: Alive, now: Mono) {
        // A datagram that was overtaken says nothing new.
        let is_old = self
            .heard
            .get(&from)
            .is_some_and(|last| last.alive.start_id == alive.start_id && last.alive.seq >= alive.seq);
        if from != self.own && !is_old {
            self.heard.insert(from, LastHeard { at: now, alive });
            self.greet(from, alive.start_id, now);
        }
    }

    /// A run of a node's daemon is there: it connected, or was heard.
    pub fn greet(&mut self, from: NodeId, start_id: StartId, now: Mono) {
        self.runs.insert(from, (start_id, now));
    }

    /// Notes a pause of this process; returns what to broadcast when it is time.
    pub fn tick(&mut self, now: Now, figures: Figures) -> Option<Alive> {
        if now.mono.since_ms(self.last_tick) > LATE_TICK_MS {
            self.trusted_from = now.mono.plus_ms(GRACE_AFTER_PAUSE_MS);
        }
        self.last_tick = now.mono;
        let own = Alive { start_id: self.start_id, seq: self.seq, figures, wall: now.wall };
        self.heard.insert(self.own, LastHeard { at: now.mono, alive: own });
        if self.sent_at.is_some_and(|sent| now.mono.since_ms(sent) < ALIVE_EVERY_MS) {
            return None;
        }
        self.sent_at = Some(now.mono);
        self.seq += 1;
        Some(Alive { seq: self.seq, ..own })
    }

    /// A leader's commands: who is down, who is back.
    pub fn verdicts(&self, state: &State, now: Mono, cluster_time: Timestamp) -> Vec<Command> {
        let mut commands = Vec::new();
        for node in state.nodes.rows() {
            let is_lost = self.is_lost(node, now, cluster_time);
            match node.condition {
                Condition::Up if is_lost && now >= self.trusted_from => {
                    commands.push(Command::MarkNodeDown { node: node.id, start_id: node.start_id });
                }
                Condition::Down if !is_lost => {
                    let heard = self.heard.get(&node.id).map(|last| last.alive.start_id);
                    if let Some(start_id) = heard.filter(|heard| Some(*heard) == node.start_id) {
                        commands.push(Command::MarkNodeUp { node: node.id, start_id });
                    }
                }
                _ => {}
            }
        }
        commands
    }

    fn is_lost(&self, node: &Node, now: Mono, cluster_time: Timestamp) -> bool {
        let stopped_cleanly = node.stopped_at.is_some_and(|at| {
            let stopped_ms = cluster_time.since_ms(at);
            // A later run came since, and announced no end, even if it ended before the state knew of it.
            let came_back = self.runs.get(&node.id).is_some_and(|(start_id, at)| {
                Some(*start_id) != node.start_id && now.since_ms(*at) < stopped_ms
            });
            stopped_ms < CLEAN_STOP_MS && !came_back
        });
        match self.heard.get(&node.id) {
            Some(last) if last.alive.figures.fsync_age_ms >= FSYNC_LOST_MS => true,
            Some(last) => now.since_ms(last.at) >= LOST_AFTER_MS && !stopped_cleanly,
            None => now.since_ms(self.started_at) >= SETTLE_MS && !stopped_cleanly,
        }
    }

    /// An own tick came so late that what was not heard says nothing.
    pub fn was_paused(&self, now: Mono) -> bool {
        now < self.trusted_from
    }

    /// Whether a member has been heard for at least `ms` without a break, as far as this run knows.
    pub fn is_steady(&self, node: NodeId, now: Mono) -> bool {
        self.heard.get(&node).is_some_and(|last| now.since_ms(last.at) < LOST_AFTER_MS)
    }

    pub fn has_slow_disk(&self, node: NodeId) -> bool {
        self.heard.get(&node).is_some_and(|last| last.alive.figures.fsync_age_ms > 2_000)
    }

    /// What the planner may know: nodes heard of late.
    pub fn heard_nodes(&self, now: Mono) -> HeardNodes {
        self.heard
            .iter()
            .filter(|(_, last)| now.since_ms(last.at) < LOST_AFTER_MS)
            .map(|(id, last)| {
                let figures = last.alive.figures;
                let heard = Heard {
                    memory_available_bytes: figures.memory_available_bytes,
                    is_disk_stalled: figures.fsync_age_ms >= FSYNC_STALLED_MS,
                    is_disk_full: figures.is_disk_full,
                };
                (*id, heard)
            })
            .gather()
    }

    /// Nodes that could hold the floating address at this place in the state's order.
    pub fn holders(&self, index: usize, now: Mono) -> BTreeSet<NodeId> {
        let can = |last: &LastHeard| {
            now.since_ms(last.at) < SUSPECTED_AFTER_MS && last.alive.figures.holdable & (1 << index) != 0
        };
        self.heard.iter().filter(|(_, last)| can(last)).map(|(id, _)| *id).gather()
    }

    pub fn silent_ms(&self, now: Mono) -> BTreeMap<NodeId, u64> {
        self.heard.iter().map(|(id, last)| (*id, now.since_ms(last.at))).gather()
    }

    pub fn note_leader(&mut self, leader: Option<NodeId>, now: Mono) {
        self.leaderless_since = match leader {
            Some(_) => None,
            None => self.leaderless_since.or(Some(now)),
        };
    }

    pub fn leaderless_ms(&self, leader: Option<NodeId>, now: Mono) -> u64 {
        match (leader, self.leaderless_since) {
            (None, Some(since)) => now.since_ms(since),
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::testing::Applier;

    /// Node 2 stopped cleanly; its later runs, as node 1 sees them.
    fn lost(later_runs: &[(StartId, u64)], asked_at_ms: u64) -> bool {
        let mut applier = Applier::with_nodes(2);
        let stopped_run =
            applier.state.nodes.find(&NodeId(2)).and_then(|node| node.start_id).expect("it started");
        let begin = Mono(0);
        let mut liveness = Liveness::new(NodeId(1), StartId(1), begin);
        let alive = Alive { start_id: stopped_run, seq: 1, figures: Figures::default(), wall: None };
        liveness.hear(NodeId(2), alive, begin.plus_ms(500));
        applier.must(Command::NodeStopping { node: NodeId(2), start_id: stopped_run });
        let stopped_at = applier.state.time();
        for (start_id, at) in later_runs {
            liveness.greet(NodeId(2), *start_id, begin.plus_ms(1_000 + at));
        }
        let node = applier.state.nodes.find(&NodeId(2)).expect("it is a member");
        let now = begin.plus_ms(1_000 + asked_at_ms);
        liveness.is_lost(node, now, stopped_at.plus_ms(asked_at_ms))
    }

    #[test]
    fn a_clean_stop_keeps_everything_in_place_for_a_minute() {
        assert!(!lost(&[], 59_000));
        assert!(lost(&[], 61_000));
    }

    #[test]
    fn a_run_that_came_after_a_clean_stop_and_fell_silent_is_lost() {
        assert!(lost(&[(StartId(77), 300)], 10_000));
    }
}
