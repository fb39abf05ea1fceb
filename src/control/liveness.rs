//! Who is alive: last heard on the monotonic clock, in memory only, on every node.
//!
//! Each node sends each other an `Alive` datagram every 500 ms. It derives from nothing that waits for a disk. A
//! new leader judges by the table it already has.

use super::Now;
use crate::model::limits::DISK_CHANGES_WITHIN_MS;
use crate::model::{Condition, DiskSet, Gather, MachineHealth, Mono, Node, NodeId, StartId, Timestamp};
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
const TROUBLE_BEGINS_MS: u64 = 10_000;
/// One that comes and goes is there.
const TROUBLE_ENDS_MS: u64 = 30 * 60_000;
/// A disk that is plugged again within this was never away.
const DISK_SETTLED_MS: u64 = 3_000;
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
    pub health: MachineHealth,
    /// Of the disks that its configuration names, those that are not mounted.
    pub absent_disks: DiskSet,
}

struct LastHeard {
    at: Mono,
    alive: Alive,
    /// Since when it has told the same troubles.
    troubles_since: Mono,
    /// The same of its absent disks.
    disks_since: Mono,
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
            self.note(from, now, alive);
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
        self.note(self.own, now.mono, own);
        if self.sent_at.is_some_and(|sent| now.mono.since_ms(sent) < ALIVE_EVERY_MS) {
            return None;
        }
        self.sent_at = Some(now.mono);
        self.seq += 1;
        Some(Alive { seq: self.seq, ..own })
    }

    fn note(&mut self, from: NodeId, now: Mono, alive: Alive) {
        let troubles = alive.figures.health.troubles;
        let same = self.heard.get(&from).filter(|last| last.alive.figures.health.troubles == troubles);
        let troubles_since = same.map_or(now, |last| last.troubles_since);
        let is_same = |last: &&LastHeard| {
            last.alive.start_id == alive.start_id
                && last.alive.figures.absent_disks == alive.figures.absent_disks
        };
        let disks_since = self.heard.get(&from).filter(is_same).map_or(now, |last| last.disks_since);
        self.heard.insert(from, LastHeard { at: now, alive, troubles_since, disks_since });
    }

    /// What the state is to say of a node's troubles. One that comes and goes is written down twice an hour at most.
    fn news_of_troubles(&self, node: &Node, now: Mono) -> Option<Command> {
        let last = self.heard.get(&node.id).filter(|last| now.since_ms(last.at) < LOST_AFTER_MS)?;
        let told = last.alive.figures.health.troubles;
        let steady_ms = now.since_ms(last.troubles_since);
        let is_new = told.with(node.troubles) != node.troubles;
        let is_due = match is_new {
            true => steady_ms >= TROUBLE_BEGINS_MS,
            false => told != node.troubles && steady_ms >= TROUBLE_ENDS_MS,
        };
        // Until it has ended for good the old one stays beside the new.
        let troubles = if is_new { told.with(node.troubles) } else { told };
        is_due.then_some(Command::NoteTroubles { node: node.id, troubles })
    }

    /// What the state is to say of a node's absent disks. Each change within an hour quadruples how long the next must have
    /// lasted.
    fn news_of_disks(&self, node: &Node, now: Mono, cluster_time: Timestamp) -> Option<Command> {
        let last = self.heard.get(&node.id).filter(|last| now.since_ms(last.at) < LOST_AFTER_MS)?;
        let (start_id, absent) = (last.alive.start_id, last.alive.figures.absent_disks);
        let is_late = |at: &&Timestamp| cluster_time.since_ms(**at) < DISK_CHANGES_WITHIN_MS;
        let changes = node.disk_changes.iter().filter(is_late).count() as u32;
        let is_due = now.since_ms(last.disks_since) >= DISK_SETTLED_MS << (2 * changes);
        // Another run's figures may be of another list.
        let is_news =
            node.disks_told_by == Some(start_id) && absent.within(node.disks.len()) != node.absent_disks;
        (is_news && is_due).then_some(Command::NoteAbsentDisks { node: node.id, start_id, absent })
    }

    /// A leader's commands: who is down, who is back, who has troubles, whose disks are absent.
    pub fn verdicts(&self, state: &State, now: Mono, cluster_time: Timestamp) -> Vec<Command> {
        let mut commands = Vec::new();
        for node in state.nodes.rows() {
            let is_lost = self.is_lost(node, now, cluster_time);
            commands.extend(self.news_of_troubles(node, now));
            commands.extend(self.news_of_disks(node, now, cluster_time));
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
                    health: figures.health,
                    run: Some(last.alive.start_id),
                    absent_disks: figures.absent_disks,
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
    use crate::model::{NodeDisk, Trouble};
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

    #[test]
    fn a_trouble_that_comes_and_goes_is_written_down_once() {
        let mut applier = Applier::with_nodes(2);
        let mut liveness = Liveness::new(NodeId(1), StartId(1), Mono(0));
        let mut written = 0;
        for second in 0..7200u64 {
            let mut figures = Figures::default();
            // On and off every minute for an hour, and then off.
            figures.health.troubles.set(Trouble::Throttled, second < 3600 && second % 120 < 60);
            let alive = Alive { start_id: StartId(2), seq: second, figures, wall: None };
            liveness.hear(NodeId(2), alive, Mono(0).plus_ms(second * 1000));
            let node = applier.state.nodes.find(&NodeId(2)).expect("it is a member").clone();
            let news = liveness.news_of_troubles(&node, Mono(0).plus_ms(second * 1000));
            written += usize::from(news.is_some());
            news.map(|command| applier.must(command));
            let is_known = applier.state.nodes.find(&NodeId(2)).is_some_and(|node| !node.troubles.is_empty());
            assert_eq!(is_known, (10..3540 + 1800).contains(&second), "after {second} s");
        }
        assert_eq!(written, 2);
    }

    /// Entries of two hours of a disk that comes and goes each so many seconds; ends with it being there.
    fn entries_of_a_loose_plug(period_s: u64) -> usize {
        let mut applier = Applier::with_nodes(2);
        let disk = NodeDisk { label: "media".into(), target: "/mnt/media".into() };
        let start_id = applier.state.nodes.find(&NodeId(2)).and_then(|node| node.start_id).expect("it runs");
        applier.must(Command::NoteDisks { node: NodeId(2), start_id, disks: vec![disk] });
        let mut liveness = Liveness::new(NodeId(1), StartId(1), Mono(0));
        let (begin, mut entries) = (applier.state.time(), 0);
        for second in 0..7200 + 3600u64 {
            let now = Mono(0).plus_ms(second * 1000);
            let mut figures = Figures::default();
            if second < 7200 && second % period_s >= period_s / 2 {
                figures.absent_disks.insert(0);
            }
            let alive = Alive { start_id, seq: second, figures, wall: None };
            liveness.hear(NodeId(2), alive, now);
            let node = applier.state.nodes.find(&NodeId(2)).expect("it is a member").clone();
            let cluster_time = begin.plus_ms(second * 1000);
            if let Some(command) = liveness.news_of_disks(&node, now, cluster_time) {
                entries += 1;
                let index = cluster_time.since_ms(applier.state.time()) / 1000;
                applier.index += index;
                applier.must(command);
            }
        }
        assert!(applier.state.nodes.find(&NodeId(2)).is_some_and(|node| node.absent_disks.is_empty()));
        entries
    }

    #[test]
    fn a_disk_is_absent_after_three_seconds_and_a_loose_plug_fills_no_log() {
        assert_eq!(entries_of_a_loose_plug(4), 0, "two seconds are nothing");
        assert_eq!(entries_of_a_loose_plug(7200), 2, "out once, back once");
        for period_s in [10, 60, 600, 3000] {
            let entries = entries_of_a_loose_plug(period_s);
            assert!((2..=2 * 6 + 1).contains(&entries), "{entries} entries with {period_s} s");
        }
    }
}
