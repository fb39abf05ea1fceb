//! Writes that wait for their entry to be applied, and agents' reports that are on their way.

use super::{Applied, Output, Waiter};
use crate::model::limits::PENDING_REQUESTS_MAX;
use crate::model::{Mono, NodeId};
use crate::state::Command;
use std::collections::BTreeMap;

/// A write that has no outcome after this long may still take effect.
const WRITE_TIMEOUT_MS: u64 = 5_000;
/// A report that was proposed is not proposed again for this long.
const REPROPOSE_AFTER_MS: u64 = 2_000;

/// Why a write or a read has no outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Undone {
    /// Nothing was done; ask the leader, if one is known.
    NotLeader { leader: Option<NodeId> },
    /// Nothing was done: too many wait.
    Busy,
    /// It was proposed and may still be applied: ask again with the same request id.
    Unknown,
}

struct Pending {
    waiter: Waiter,
    deadline: Mono,
}

#[derive(Default)]
pub struct Requests {
    counter: u64,
    pending: BTreeMap<u64, Pending>,
    proposed: Vec<(Command, Mono)>,
}

impl Requests {
    pub fn next_counter(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    pub fn is_full(&self) -> bool {
        self.pending.len() >= PENDING_REQUESTS_MAX
    }

    pub fn add(&mut self, counter: u64, waiter: Waiter, now: Mono) {
        self.pending.insert(counter, Pending { waiter, deadline: now.plus_ms(WRITE_TIMEOUT_MS) });
    }

    pub fn finish(&mut self, counter: u64, applied: Applied, out: &mut Vec<Output>) {
        if let Some(pending) = self.pending.remove(&counter) {
            out.push(Output::Done { waiter: pending.waiter, result: Ok(applied) });
        }
    }

    pub fn expire(&mut self, now: Mono, out: &mut Vec<Output>) {
        let late: Vec<u64> =
            self.pending.iter().filter(|(_, pending)| pending.deadline <= now).map(|(id, _)| *id).collect();
        for counter in late {
            if let Some(pending) = self.pending.remove(&counter) {
                out.push(Output::Done { waiter: pending.waiter, result: Err(Undone::Unknown) });
            }
        }
        self.proposed.retain(|(_, at)| now.since_ms(*at) < REPROPOSE_AFTER_MS);
    }

    /// Another node leads: what waits here is answered when the new leader's log says so, or within a second.
    pub fn lead_elsewhere(&mut self, now: Mono) {
        let soon = now.plus_ms(1_000);
        for pending in self.pending.values_mut() {
            pending.deadline = pending.deadline.min(soon);
        }
        self.proposed.clear();
    }

    pub fn is_proposed(&self, command: &Command, now: Mono) -> bool {
        self.proposed.iter().any(|(known, at)| known == command && now.since_ms(*at) < REPROPOSE_AFTER_MS)
    }

    pub fn mark_proposed(&mut self, command: &Command, now: Mono) {
        if self.proposed.len() >= PENDING_REQUESTS_MAX {
            self.proposed.remove(0);
        }
        self.proposed.push((command.clone(), now));
    }

    pub fn forget_proposed(&mut self, command: &Command) {
        self.proposed.retain(|(known, _)| known != command);
    }
}
