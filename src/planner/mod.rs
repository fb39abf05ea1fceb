//! Decides what should run where.
//!
//! Input: the committed state, what is heard of the nodes, cluster time. Output: steps that bring the state closer
//! to what the user asked for, each naming the rows it relied on.
//! A pure function: it never waits and cannot fail.
//!
//! Invariant: planning the planned state yields nothing (`plan_is_a_fixpoint`).

pub mod addresses;
pub mod certificates;
mod disks;
mod instances;
mod placement;
mod reasons;
mod rollout;
#[cfg(test)]
mod tests;

pub use disks::{absent_disks, absent_sentence, disk_reason};
pub use reasons::{left_out, pending_reason, waits_for};

use crate::model::{DiskSet, MachineHealth, NodeId, StartId, Timestamp};
use crate::state::{PlanStep, State};
use std::collections::BTreeMap;

/// What is known of a node beyond the state: heard a moment ago.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    pub memory_available_bytes: u64,
    /// Its disk has not finished an fsync for over 10 s: nothing new goes there.
    pub is_disk_stalled: bool,
    /// Free space is below the mark: nothing new goes there.
    pub is_disk_full: bool,
    pub health: MachineHealth,
    /// The run of its daemon that told this.
    pub run: Option<StartId>,
    /// Of the disks that its configuration names.
    pub absent_disks: DiskSet,
}

pub type HeardNodes = BTreeMap<NodeId, Heard>;

/// Steps in one entry: bounded so that an entry stays small; the next plan goes on.
const STEPS_MAX: usize = 256;

pub fn plan(state: &State, heard: &HeardNodes, now: Timestamp) -> Vec<PlanStep> {
    let mut steps = Vec::new();
    for service in state.services.rows() {
        instances::plan_service(state, service, now, &mut steps);
    }
    instances::plan_orphans(state, now, &mut steps);
    placement::plan_assignments(state, heard, now, &mut steps);
    steps.truncate(STEPS_MAX);
    steps
}
