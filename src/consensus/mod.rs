//! Drives TiKV's raft: inputs in, what is to be sent, written and applied out.
//!
//! Pure: it owns no clock, no thread, no disk. The log's tail lives in memory (`log::LogCache`); storage gets
//! batches and says when one is durable. Messages that promise durability are held until then.
//!
//! Invariants, each with a test in `tests.rs` or in the simulation:
//! nothing is sent while the term on disk is older than raft's (`a_sole_voter_sends_nothing_of_a_term_not_on_disk`);
//! a Ready with a snapshot is handled synchronously; the election timeout is a function of seed, node and term;
//! a commit index alone never causes a write.

mod batch;
mod driver;
mod log;
#[cfg(test)]
mod tests;

pub use batch::{Batch, LogStore, SnapshotImage, Stored};
pub use driver::{Driver, DriverConfig, Effects, ReadReady};
pub use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry, EntryType,
    HardState, Message, MessageType,
};
