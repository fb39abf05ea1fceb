//! Driver of the raft crate.
