//! Linearizable reads: a read index confirmed by a quorum, then wait until it has been applied here.
//!
//! All reads that wait share one request; it is repeated with a new context, because raft drops it silently
//! without a leader and ignores a context it has seen.

use super::requests::Undone;
use super::{Output, Waiter};
use crate::consensus::Driver;
use crate::model::limits::PENDING_REQUESTS_MAX;
use crate::model::{Mono, NodeId, StartId};
use std::collections::BTreeMap;

const RETRY_AFTER_MS: u64 = 500;
const READ_TIMEOUT_MS: u64 = 2_000;

pub struct Reads {
    own: NodeId,
    start_id: StartId,
    counter: u64,
    /// Waiters not yet covered by a request that was sent after they came.
    unasked: Vec<(Waiter, Mono)>,
    asked: BTreeMap<u64, Asked>,
    /// Confirmed: served once this index is applied.
    confirmed: Vec<(Waiter, Mono, u64)>,
}

struct Asked {
    at: Mono,
    waiters: Vec<(Waiter, Mono)>,
}

impl Reads {
    pub fn new(own: NodeId, start_id: StartId) -> Reads {
        Reads {
            own,
            start_id,
            counter: 0,
            unasked: Vec::new(),
            asked: BTreeMap::new(),
            confirmed: Vec::new(),
        }
    }

    pub fn add(&mut self, waiter: Waiter, now: Mono, driver: &mut Driver, out: &mut Vec<Output>) {
        let waiting = self.confirmed.len()
            + self.unasked.len()
            + self.asked.values().map(|asked| asked.waiters.len()).sum::<usize>();
        if waiting >= PENDING_REQUESTS_MAX {
            return out.push(Output::ReadReady { waiter, result: Err(Undone::Busy) });
        }
        self.unasked.push((waiter, now));
        if self.asked.is_empty() {
            self.ask(now, driver);
        }
    }

    pub fn tick(&mut self, now: Mono, driver: &mut Driver, out: &mut Vec<Output>) {
        let overdue: Vec<u64> = self
            .asked
            .iter()
            .filter(|(_, asked)| now.since_ms(asked.at) >= RETRY_AFTER_MS)
            .map(|(counter, _)| *counter)
            .collect();
        for counter in overdue {
            if let Some(asked) = self.asked.remove(&counter) {
                self.unasked.extend(asked.waiters);
            }
        }
        let is_late = |since: &Mono| now.since_ms(*since) >= READ_TIMEOUT_MS;
        for (waiter, _) in self.unasked.iter().filter(|(_, since)| is_late(since)) {
            let leader = driver.leader();
            out.push(Output::ReadReady { waiter: *waiter, result: Err(Undone::NotLeader { leader }) });
        }
        self.unasked.retain(|(_, since)| !is_late(since));
        // Confirmed, but this node does not come to apply it: it has lost its leader meanwhile.
        for (waiter, ..) in self.confirmed.iter().filter(|(_, since, _)| is_late(since)) {
            let leader = driver.leader();
            out.push(Output::ReadReady { waiter: *waiter, result: Err(Undone::NotLeader { leader }) });
        }
        self.confirmed.retain(|(_, since, _)| !is_late(since));
        if !self.unasked.is_empty() && self.asked.is_empty() {
            self.ask(now, driver);
        }
    }

    fn ask(&mut self, now: Mono, driver: &mut Driver) {
        self.counter += 1;
        driver.read_index(self.context(self.counter));
        let waiters = std::mem::take(&mut self.unasked);
        self.asked.insert(self.counter, Asked { at: now, waiters });
    }

    fn context(&self, counter: u64) -> Vec<u8> {
        let mut context = Vec::with_capacity(32);
        context.extend(self.own.0.to_le_bytes());
        context.extend(self.start_id.0.to_le_bytes());
        context.extend(counter.to_le_bytes());
        context
    }

    /// A quorum confirmed the leader for this request.
    pub fn confirmed(&mut self, context: &[u8], index: u64) {
        let Some((head, tail)) = context.split_at_checked(24) else { return };
        let Ok(tail) = <[u8; 8]>::try_from(tail) else { return };
        let counter = u64::from_le_bytes(tail);
        if self.context(counter).starts_with(head)
            && let Some(asked) = self.asked.remove(&counter)
        {
            self.confirmed.extend(asked.waiters.into_iter().map(|(waiter, since)| (waiter, since, index)));
        }
    }

    pub fn serve(&mut self, applied: u64, out: &mut Vec<Output>) {
        self.confirmed.retain(|(waiter, _, index)| {
            let is_ready = *index <= applied;
            if is_ready {
                out.push(Output::ReadReady { waiter: *waiter, result: Ok(applied) });
            }
            !is_ready
        });
    }
}
