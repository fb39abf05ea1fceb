//! A disk that holds batches: written ones survive a crash, the others as a random prefix, which is the contract of
//! SQLite's write-ahead log.

use std::collections::BTreeMap;
use tinydc::consensus::{Batch, ConfState, Entry, HardState, Stored};
use tinydc::state::{RowChange, State};

#[derive(Clone, Default)]
pub struct Image {
    hard_state: HardState,
    conf_state: ConfState,
    applied: u64,
    compacted: (u64, u64),
    entries: Vec<Entry>,
    rows: BTreeMap<(u8, Vec<u8>), Vec<u8>>,
}

impl Image {
    /// A founder's first image: alone, with an empty state at index 1.
    pub fn founder(node: u64) -> Image {
        Image {
            hard_state: HardState { term: 1, vote: 0, commit: 1 },
            conf_state: ConfState { voters: vec![node], ..ConfState::default() },
            applied: 1,
            compacted: (1, 1),
            ..Image::default()
        }
    }

    /// One of several founders, each with an empty state at index 1.
    pub fn of_voters(voters: &[u64]) -> Image {
        let conf_state = ConfState { voters: voters.to_vec(), ..ConfState::default() };
        Image { conf_state, ..Image::founder(voters[0]) }
    }

    pub fn write(&mut self, batch: &Batch) {
        if let Some(snapshot) = &batch.snapshot {
            self.rows.clear();
            self.entries.clear();
            let state = State::from_frames(&snapshot.frames).expect("a snapshot decodes");
            for row in state.all_rows() {
                self.rows.insert((row.kind, row.key), row.body.expect("a row of a snapshot has a body"));
            }
            self.applied = snapshot.index;
            self.compacted = (snapshot.index, snapshot.term);
            self.conf_state = snapshot.conf_state.clone();
        }
        if let Some(first) = batch.entries.first() {
            self.entries.retain(|entry| entry.index < first.index);
            self.entries.extend(batch.entries.iter().cloned());
        }
        for RowChange { kind, key, body } in &batch.changes {
            match body {
                Some(body) => self.rows.insert((*kind, key.clone()), body.clone()),
                None => self.rows.remove(&(*kind, key.clone())),
            };
        }
        if let Some(hard_state) = &batch.hard_state {
            self.hard_state = hard_state.clone();
        }
        if let Some(conf_state) = &batch.conf_state {
            self.conf_state = conf_state.clone();
        }
        if let Some(compacted) = batch.compact_to {
            self.entries.retain(|entry| entry.index > compacted.0);
            self.compacted = compacted;
        }
        self.applied = self.applied.max(batch.applied);
    }

    pub fn stored(&self) -> Stored {
        let mut hard_state = self.hard_state.clone();
        hard_state.commit = hard_state.commit.max(self.applied);
        Stored {
            hard_state,
            conf_state: self.conf_state.clone(),
            applied: self.applied,
            compacted: self.compacted,
            entries: self.entries.clone(),
            rows: self
                .rows
                .iter()
                .map(|((kind, key), body)| RowChange {
                    kind: *kind,
                    key: key.clone(),
                    body: Some(body.clone()),
                })
                .collect(),
        }
    }

    pub fn forget_vote(&mut self) {
        self.hard_state.vote = 0;
    }
}

#[derive(Default)]
pub struct Disk {
    pub durable: Image,
    unsynced: Vec<Batch>,
    pub is_syncing: bool,
    pub written: u64,
}

impl Disk {
    pub fn holding(durable: Image) -> Disk {
        Disk { durable, ..Disk::default() }
    }

    pub fn submit(&mut self, batch: Batch) {
        self.unsynced.push(batch);
    }

    pub fn waiting(&self) -> usize {
        self.unsynced.len()
    }

    /// The first `count` batches are durable now; returns the number of the last, and their entries.
    pub fn sync(&mut self, count: usize) -> (u64, Vec<Entry>) {
        let mut last = 0;
        let mut entries = Vec::new();
        for batch in self.unsynced.drain(..count) {
            self.durable.write(&batch);
            self.written += 1;
            last = last.max(batch.number);
            entries.extend(batch.entries);
        }
        (last, entries)
    }

    /// Power is cut: `kept` of the batches that were on their way made it.
    pub fn crash(&mut self, kept: usize) -> usize {
        self.is_syncing = false;
        let unsynced = std::mem::take(&mut self.unsynced);
        for batch in &unsynced[..kept] {
            self.durable.write(batch);
        }
        unsynced.len() - kept
    }

    /// A planted fault: the last batch on its way made it, those before did not.
    pub fn crash_out_of_order(&mut self) {
        self.is_syncing = false;
        if let Some(last) = std::mem::take(&mut self.unsynced).last() {
            self.durable.write(last);
        }
    }

    /// A planted fault: rows of what is said to be applied are missing.
    pub fn drop_rows_of_last(&mut self) {
        if let Some(last) = self.unsynced.last_mut() {
            last.changes.clear();
        }
    }
}
