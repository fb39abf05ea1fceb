//! The log and the state on disk.
