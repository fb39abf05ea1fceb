//! tinydc: a handful of small boards as one small datacenter.
//!
//! The modules stand in layer order: each uses only modules that stand above it. `tests/tidy.rs` reads this file
//! and proves it. `// layer N` opens a layer; siblings of layer 4 never use each other.

// layer 0
pub mod model;
// layer 1
pub mod certificate;
pub mod linux;
pub mod tasks;
pub mod telemetry;
pub mod upgraded;
// layer 2
pub mod compose;

pub mod state;

pub mod planner;

pub mod consensus;
pub mod verdict;
// layer 3
pub mod control;
// layer 4
pub mod network;
pub mod probe;
pub mod runtime;
pub mod storage;
pub mod transport;
// layer 5
pub mod replica;

pub mod agent;
pub mod api;
// layer 6
pub mod boot;
pub mod node;
// layer 7
pub mod cli;
