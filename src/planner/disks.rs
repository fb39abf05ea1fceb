//! Which disks of a node are absent, and what that keeps from running.
//!
//! Input: the state's row of a node and what was heard of it. The newest figures count where they are of the run whose
//! list of disks the state has; else what the state says.

use super::HeardNodes;
use crate::model::*;
use crate::state::State;

pub fn absent_disks(node: &Node, heard: &HeardNodes) -> DiskSet {
    match heard.get(&node.id).filter(|heard| heard.run.is_some() && heard.run == node.disks_told_by) {
        Some(heard) => heard.absent_disks.within(node.disks.len()),
        None => node.absent_disks,
    }
}

/// The first absent disk of the node that holds something the service binds.
pub fn absent_disk_of<'a>(node: &'a Node, heard: &HeardNodes, spec: &'a ServiceSpec) -> Option<&'a NodeDisk> {
    let absent = absent_disks(node, heard);
    node.disks_of(spec).find(|(index, _)| absent.has(*index)).map(|(_, disk)| disk)
}

pub fn names_disk_at(node: &Node, path: &str) -> bool {
    node.disks.iter().any(|disk| disk.holds(path))
}

pub fn absent_sentence(disk: &str, node: &str) -> String {
    format!("disk {disk} is absent on {node}: plug it in, or take the mount out of the service")
}

/// Why an instance that has a node does not run there: the disk it binds is absent.
pub fn disk_reason(state: &State, heard: &HeardNodes, instance: &Instance) -> Option<String> {
    let node = state.nodes.find(&instance.node?)?;
    let service = state.services.find(&instance.service)?;
    if node.condition == Condition::Down || instance.desired != Desired::Run {
        return None;
    }
    let disk = absent_disk_of(node, heard, service.spec_of(instance.spec_version))?;
    Some(absent_sentence(&disk.to_string(), &node.name))
}
