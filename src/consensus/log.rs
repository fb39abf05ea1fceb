//! The log's tail in memory: what raft reads, also entries that are not yet durable.

use super::{ConfState, Entry, HardState, Stored};
use raft::{GetEntriesContext, RaftState, Storage, StorageError, eraftpb::Snapshot};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

#[derive(Clone)]
pub struct LogCache(Rc<RefCell<Tail>>);

#[derive(Default)]
struct Tail {
    hard_state: HardState,
    conf_state: ConfState,
    compacted: (u64, u64),
    entries: VecDeque<Entry>,
    bytes: usize,
    applied: (u64, u64),
}

impl Tail {
    fn last_index(&self) -> u64 {
        self.compacted.0 + self.entries.len() as u64
    }

    fn term(&self, index: u64) -> Result<u64, StorageError> {
        if index == self.compacted.0 {
            return Ok(self.compacted.1);
        }
        if index < self.compacted.0 {
            return Err(StorageError::Compacted);
        }
        let position = (index - self.compacted.0 - 1) as usize;
        self.entries.get(position).map(|entry| entry.term).ok_or(StorageError::Unavailable)
    }
}

fn entry_bytes(entry: &Entry) -> usize {
    entry.data.len() + entry.context.len() + 32
}

impl LogCache {
    pub fn new(stored: &Stored) -> LogCache {
        let entries: VecDeque<Entry> = stored.entries.iter().cloned().collect();
        let bytes = entries.iter().map(entry_bytes).sum();
        let mut tail = Tail {
            hard_state: stored.hard_state.clone(),
            conf_state: stored.conf_state.clone(),
            compacted: stored.compacted,
            entries,
            bytes,
            applied: (stored.applied, 0),
        };
        tail.applied.1 = tail.term(stored.applied).expect("a store keeps the term of what it applied");
        LogCache(Rc::new(RefCell::new(tail)))
    }

    pub fn append(&self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        let tail = &mut *self.0.borrow_mut();
        assert!(first.index > tail.compacted.0, "raft never rewrites what was compacted");
        assert!(first.index <= tail.last_index() + 1, "raft never leaves a gap");
        while tail.last_index() >= first.index {
            let cut = tail.entries.pop_back().expect("the last index is above the compacted one");
            tail.bytes -= entry_bytes(&cut);
        }
        for entry in entries {
            tail.bytes += entry_bytes(entry);
            tail.entries.push_back(entry.clone());
        }
    }

    pub fn reset_to(&self, index: u64, term: u64, conf_state: ConfState) {
        let tail = &mut *self.0.borrow_mut();
        tail.entries.clear();
        tail.bytes = 0;
        tail.compacted = (index, term);
        tail.applied = (index, term);
        tail.conf_state = conf_state;
    }

    pub fn mark_applied(&self, index: u64, term: u64) {
        self.0.borrow_mut().applied = (index, term);
    }

    pub fn applied(&self) -> (u64, u64) {
        self.0.borrow().applied
    }

    pub fn save_conf_state(&self, conf_state: ConfState) {
        self.0.borrow_mut().conf_state = conf_state;
    }

    pub fn conf_state(&self) -> ConfState {
        self.0.borrow().conf_state.clone()
    }

    pub fn save_hard_state(&self, hard_state: HardState) {
        self.0.borrow_mut().hard_state = hard_state;
    }

    /// Entries kept, and what they take.
    pub fn size(&self) -> (usize, usize) {
        let tail = self.0.borrow();
        (tail.entries.len(), tail.bytes)
    }

    pub fn last_index(&self) -> u64 {
        self.0.borrow().last_index()
    }

    /// Lets entries up to `index` go; returns what stands before the first one kept.
    pub fn compact(&self, index: u64) -> Option<(u64, u64)> {
        let tail = &mut *self.0.borrow_mut();
        if index <= tail.compacted.0 || index > tail.applied.0 {
            return None;
        }
        let term = tail.term(index).ok()?;
        while tail.compacted.0 < index {
            let gone = tail.entries.pop_front()?;
            tail.bytes -= entry_bytes(&gone);
            tail.compacted.0 += 1;
        }
        tail.compacted = (index, term);
        Some(tail.compacted)
    }
}

impl Storage for LogCache {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let tail = self.0.borrow();
        Ok(RaftState { hard_state: tail.hard_state.clone(), conf_state: tail.conf_state.clone() })
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        let tail = self.0.borrow();
        if low <= tail.compacted.0 {
            return Err(raft::Error::Store(StorageError::Compacted));
        }
        let base = tail.compacted.0 + 1;
        let range = (low - base) as usize..(high - base) as usize;
        let mut entries: Vec<Entry> = tail.entries.range(range).cloned().collect();
        raft::util::limit_size(&mut entries, max_size.into());
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        self.0.borrow().term(index).map_err(raft::Error::Store)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.0.borrow().compacted.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.0.borrow().last_index())
    }

    /// Metadata only: the rows travel as a stream of their own (protocol 12).
    fn snapshot(&self, _request_index: u64, _to: u64) -> raft::Result<Snapshot> {
        let tail = self.0.borrow();
        let mut snapshot = Snapshot::default();
        let metadata = snapshot.mut_metadata();
        metadata.index = tail.applied.0;
        metadata.term = tail.applied.1;
        metadata.conf_state = Some(tail.conf_state.clone());
        Ok(snapshot)
    }
}
