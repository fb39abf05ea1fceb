//! What storage keeps: batches to write, and what it gives back at start.

use super::{ConfState, Entry, HardState};
use crate::state::RowChange;

/// One transaction. Its parts hold together or not at all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Grows; storage answers with the number once all of the batch is durable.
    pub number: u64,
    /// Replaces everything: rows, log, configuration. Written before the rest of the batch.
    pub snapshot: Option<SnapshotImage>,
    pub hard_state: Option<HardState>,
    /// Appended after whatever had the same or a later index has been cut off.
    pub entries: Vec<Entry>,
    /// Rows that entries up to `applied` changed since the last batch.
    pub changes: Vec<RowChange>,
    pub applied: u64,
    /// The configuration as of `applied`, if it changed.
    pub conf_state: Option<ConfState>,
    /// Entries up to here may go: index and term. Never above `applied`.
    pub compact_to: Option<(u64, u64)>,
}

impl Batch {
    pub fn is_empty(&self) -> bool {
        self.snapshot.is_none()
            && self.hard_state.is_none()
            && self.entries.is_empty()
            && self.changes.is_empty()
            && self.conf_state.is_none()
            && self.compact_to.is_none()
    }
}

/// A staged snapshot whose hash holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SnapshotImage {
    pub index: u64,
    pub term: u64,
    pub conf_state: ConfState,
    /// See `State::to_frames`.
    pub frames: Vec<Vec<u8>>,
}

/// What a store holds when a node starts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stored {
    pub hard_state: HardState,
    pub conf_state: ConfState,
    pub applied: u64,
    /// The entry before the first one kept: index and term.
    pub compacted: (u64, u64),
    pub entries: Vec<Entry>,
    pub rows: Vec<RowChange>,
}

/// Where batches become durable: a SQLite file, or the simulation's disk.
pub trait LogStore {
    type Error: std::error::Error + Send + Sync + 'static;

    fn load(&mut self) -> Result<Stored, Self::Error>;

    /// Returns once the batch is durable. After an error nothing may be acknowledged: the node stops.
    fn write(&mut self, batch: &Batch) -> Result<(), Self::Error>;
}
