//! Says in one sentence, with numbers, why an instance has no node.

use super::placement::{Ledger, Obstacle, foreign_architecture, meets_constraints};
use super::{HeardNodes, disks};
use crate::model::*;
use crate::state::{Service, State};
use std::collections::BTreeMap;

/// What a service waits for before its first start: the first unmet `depends_on`.
pub fn waits_for(state: &State, service: &Service) -> Option<String> {
    if service.was_started {
        return None;
    }
    service.spec.depends_on.iter().find_map(|(name, condition)| {
        let other = state.service_by_name(&service.app, name)?;
        let (is_met, wish) = match condition {
            DependencyCondition::Started => (other.was_started, "to start"),
            DependencyCondition::Healthy => (other.was_healthy, "to be healthy"),
            DependencyCondition::Completed => (other.was_completed, "to complete"),
        };
        (!is_met).then(|| format!("waits for {name} {wish}"))
    })
}

/// `2 nodes lack 64 MiB; pi3 is drained`. `None` for an instance that has a node or will get one with the next plan.
pub fn pending_reason(
    state: &State,
    heard: &HeardNodes,
    instance: &Instance,
    now: Timestamp,
) -> Option<String> {
    if instance.node.is_some() || instance.desired != Desired::Run {
        return None;
    }
    let service = state.services.find(&instance.service)?;
    if let Some(wait) = waits_for(state, service) {
        return Some(wait);
    }
    let ledger = Ledger::new(state, heard, now);
    if ledger.choose(service, instance).is_some() {
        return None;
    }
    let mut groups: BTreeMap<u8, Vec<(&Node, Obstacle)>> = BTreeMap::new();
    for node in state.nodes.rows() {
        if let Some(obstacle) = ledger.obstacle(node, service, instance) {
            groups.entry(rank(&obstacle)).or_default().push((node, obstacle));
        }
    }
    let sentences: Vec<String> = groups.values().map(|group| sentence(state, group)).collect();
    Some(sentences.join("; "))
}

fn rank(obstacle: &Obstacle) -> u8 {
    match obstacle {
        Obstacle::Memory { .. } => 0,
        Obstacle::Cpu { .. } => 1,
        Obstacle::PortTaken(_) => 2,
        Obstacle::CountPerNode(_) => 3,
        Obstacle::DataElsewhere(_) => 4,
        Obstacle::DiskAbsent(_) => 5,
        Obstacle::DiskElsewhere { .. } => 6,
        Obstacle::Constraint(_) => 7,
        Obstacle::Architecture(_) => 8,
        Obstacle::Drained => 9,
        Obstacle::Down => 10,
        Obstacle::Unsteady => 11,
        Obstacle::DiskStalled => 12,
        Obstacle::DiskFull => 13,
    }
}

fn sentence(state: &State, group: &[(&Node, Obstacle)]) -> String {
    let is_one = group.len() == 1;
    let who = if is_one { group[0].0.name.clone() } else { format!("{} nodes", group.len()) };
    let verb = |one: &str, many: &str| if is_one { one.to_string() } else { many.to_string() };
    let what = match &group[0].1 {
        Obstacle::Memory { .. } => {
            let least = group.iter().filter_map(|(_, obstacle)| match obstacle {
                Obstacle::Memory { missing_bytes } => Some(missing_bytes.div_ceil(1 << 20)),
                _ => None,
            });
            format!("{} {} MiB", verb("lacks", "lack"), least.min().unwrap_or(0))
        }
        Obstacle::Cpu { .. } => {
            let least = group.iter().filter_map(|(_, obstacle)| match obstacle {
                Obstacle::Cpu { missing_millis } => Some(*missing_millis),
                _ => None,
            });
            let millis = least.min().unwrap_or(0);
            format!("{} {}.{:02} CPU", verb("lacks", "lack"), millis / 1000, millis % 1000 / 10)
        }
        Obstacle::PortTaken(port) => format!("{} port {port} taken", verb("has", "have")),
        Obstacle::CountPerNode(max) => {
            format!("{} {max} of it already, the most per node", verb("has", "have"))
        }
        Obstacle::DataElsewhere(holder) => {
            format!("{} not have its data, which is on {}", verb("does", "do"), state.node_name(*holder))
        }
        Obstacle::DiskAbsent(disk) => return disks::absent_sentence(disk, &who),
        Obstacle::DiskElsewhere { path, holder } => {
            let holder = state.node_name(*holder);
            format!("{} no disk for {path}, which {holder} has", verb("has", "have"))
        }
        Obstacle::Constraint(text) => format!("{} not satisfy {text}", verb("does", "do")),
        Obstacle::Architecture(wanted) => {
            format!("{} of an architecture the image lacks (it has {wanted})", verb("is", "are"))
        }
        Obstacle::Drained => format!("{} drained", verb("is", "are")),
        Obstacle::Down => format!("{} down", verb("is", "are")),
        Obstacle::Unsteady => format!("{} lost three times in ten minutes and rests", verb("was", "were")),
        Obstacle::DiskStalled => format!("{} a disk that does not finish writing", verb("has", "have")),
        Obstacle::DiskFull => format!("{} too little free disk space", verb("has", "have")),
    };
    format!("{who} {what}")
}

/// The nodes that a global service leaves out because its image does not run there, in a sentence.
pub fn left_out(state: &State, service: &Service) -> Option<String> {
    if !service.spec.is_global {
        return None;
    }
    let takes_all = |node: &&Node| !node.is_leaving && meets_constraints(node, &service.spec);
    let foreign = |node: &Node| Some((node.name.clone(), foreign_architecture(state, node, &service.spec)?));
    let (names, built_for): (Vec<String>, Vec<String>) =
        state.nodes.rows().filter(takes_all).filter_map(foreign).unzip();
    Some(format!("not on {}: the image is built for {}", names.join(", "), built_for.first()?))
}
