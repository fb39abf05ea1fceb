//! What of the findings becomes a log entry: coalesced, bounded, repeated until the state shows it. Pure.
//!
//! Reports leave at least 200 ms apart, as one entry. Per instance at most 6 in 10 minutes, then the newest once per
//! 10 minutes: a container that crashes or flaps for ever must not wear out a card.

use super::reconcile::Finding;
use crate::model::{AppName, Digest, Instance, InstanceId, Mono, StartId};
use crate::state::{InstanceReport, NodeReport};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const APART_MS: u64 = 200;
const REPEAT_AFTER_MS: u64 = 1_000;
const ENTRIES_PER_WINDOW: usize = 6;
const WINDOW_MS: u64 = 600_000;

pub struct Reporter {
    start_id: StartId,
    seq: u64,
    sent_at: Option<Mono>,
    instances: BTreeMap<InstanceId, Waiting>,
    spent: BTreeMap<InstanceId, VecDeque<Mono>>,
    pub holds: BTreeSet<Digest>,
    pub dropped: BTreeSet<Digest>,
    pub volumes_deleted: BTreeSet<(AppName, String)>,
}

struct Waiting {
    finding: Finding,
    seq: u64,
}

impl Reporter {
    pub fn new(start_id: StartId) -> Reporter {
        Reporter {
            start_id,
            seq: 0,
            sent_at: None,
            instances: BTreeMap::new(),
            spent: BTreeMap::new(),
            holds: BTreeSet::new(),
            dropped: BTreeSet::new(),
            volumes_deleted: BTreeSet::new(),
        }
    }

    /// Holds a finding against the state; what differs waits to be reported.
    pub fn note(&mut self, instance: &Instance, finding: Option<Finding>, now: Mono) {
        let id = instance.id;
        let Some(finding) = finding else { return };
        let observed = &instance.observed;
        let is_known = observed.phase == finding.phase && !finding.is_gone;
        if is_known {
            self.instances.remove(&id);
            return;
        }
        if self.instances.get(&id).is_some_and(|waiting| waiting.finding == finding) {
            return;
        }
        if !finding.is_gone && !self.may_spend(id, now) {
            return;
        }
        // Newer than anything this run reported before, also when the state already knows a part of it.
        self.seq = self.seq.max(if observed.start_id == Some(self.start_id) { observed.seq } else { 0 }) + 1;
        self.instances.insert(id, Waiting { finding, seq: self.seq });
    }

    fn may_spend(&mut self, id: InstanceId, now: Mono) -> bool {
        let spent = self.spent.entry(id).or_default();
        let is_used_up = spent.len() >= ENTRIES_PER_WINDOW;
        let is_quiet = spent.back().is_none_or(|at| now.since_ms(*at) >= 2 * WINDOW_MS);
        while (!is_used_up || is_quiet) && spent.front().is_some_and(|at| now.since_ms(*at) >= WINDOW_MS) {
            spent.pop_front();
        }
        if spent.len() < ENTRIES_PER_WINDOW {
            spent.push_back(now);
            return true;
        }
        // One that has used them up gets one more per window, not another six.
        let is_due = spent.back().is_some_and(|at| now.since_ms(*at) >= WINDOW_MS);
        if is_due {
            spent.iter_mut().for_each(|at| *at = now);
        }
        is_due
    }

    /// Lets go of instances that are no longer in the state.
    pub fn retain(&mut self, is_known: impl Fn(InstanceId) -> bool) {
        self.instances.retain(|id, _| is_known(*id));
        self.spent.retain(|id, _| is_known(*id));
    }

    /// What to send now, if anything; repeated each second until the state shows it.
    pub fn due(&mut self, now: Mono) -> Option<NodeReport> {
        let has_news = !self.instances.is_empty()
            || !self.holds.is_empty()
            || !self.dropped.is_empty()
            || !self.volumes_deleted.is_empty();
        let pause_ms = self.sent_at.map_or(u64::MAX, |at| now.since_ms(at));
        if !has_news || pause_ms < APART_MS {
            return None;
        }
        self.sent_at = Some(now);
        let instances = self
            .instances
            .iter()
            .map(|(id, waiting)| InstanceReport {
                instance: *id,
                seq: waiting.seq,
                phase: waiting.finding.phase,
                exit: waiting.finding.exit.clone(),
                is_gone: waiting.finding.is_gone,
            })
            .collect();
        Some(NodeReport {
            instances,
            holds: self.holds.iter().cloned().collect(),
            dropped: self.dropped.iter().cloned().collect(),
            volumes_deleted: self.volumes_deleted.iter().cloned().collect(),
        })
    }

    /// When `due` should be asked again, in ms; `None` when nothing waits.
    pub fn next_in_ms(&self, now: Mono) -> Option<u64> {
        let has_news = !self.instances.is_empty()
            || !self.holds.is_empty()
            || !self.dropped.is_empty()
            || !self.volumes_deleted.is_empty();
        let passed = self.sent_at.map_or(u64::MAX, |at| now.since_ms(at));
        has_news.then(|| if passed < APART_MS { APART_MS - passed } else { REPEAT_AFTER_MS })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Desired, Observed, Phase, ServiceId, Timestamp};

    fn instance() -> Instance {
        Instance {
            id: InstanceId(1),
            service: ServiceId(1),
            slot: 1,
            spec_version: 1,
            node: None,
            address: None,
            desired: Desired::Run,
            observed: Observed {
                phase: Phase::Running,
                seq: 0,
                start_id: None,
                exit: None,
                since: Timestamp(0),
            },
            created_at: Timestamp(0),
            version: 1,
        }
    }

    fn found(phase: Phase) -> Option<Finding> {
        Some(Finding { phase, exit: None, is_gone: false })
    }

    #[test]
    fn a_known_phase_is_no_entry() {
        let mut reporter = Reporter::new(StartId(1));
        reporter.note(&instance(), found(Phase::Running), Mono(0));
        assert_eq!(reporter.due(Mono(0)), None);
        reporter.note(&instance(), found(Phase::Healthy), Mono(0));
        assert_eq!(reporter.due(Mono(0)).unwrap().instances.len(), 1);
        assert_eq!(reporter.due(Mono(100)), None, "reports are 200 ms apart");
        assert!(reporter.due(Mono(1000)).is_some(), "and repeated until the state shows them");
    }

    #[test]
    fn a_flapping_instance_writes_six_entries_in_ten_minutes() {
        let mut reporter = Reporter::new(StartId(1));
        let mut row = instance();
        let mut entries = 0;
        for second in 0..6000u64 {
            let phase = if second % 2 == 0 { Phase::Healthy } else { Phase::Unhealthy };
            reporter.note(&row, found(phase), Mono(second * 1000));
            if let Some(report) = reporter.due(Mono(second * 1000)) {
                entries += 1;
                row.observed.phase = report.instances[0].phase;
                reporter.note(&row, found(row.observed.phase), Mono(second * 1000));
            }
        }
        assert!(entries <= 6 + 10, "{entries} entries in 100 minutes");
        assert!(entries >= 10);
    }
}
