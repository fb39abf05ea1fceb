//! Which instances each service should have: created, replaced, let go.

use super::placement::{foreign_architecture, meets_constraints, satisfies};
use super::rollout;
use crate::model::*;
use crate::state::{PlanStep, Service, State, Update};
use std::collections::{BTreeMap, BTreeSet};

/// An exclusive service's old copy has stopped itself by then: its lease of 10 s and a margin.
const EXCLUSIVE_WAIT_MS: u64 = 13_000;

pub fn plan_service(state: &State, service: &Service, now: Timestamp, steps: &mut Vec<PlanStep>) {
    let before = steps.len();
    let mut slots: BTreeMap<u32, Vec<&Instance>> = BTreeMap::new();
    for instance in state.instances_of(service.id) {
        slots.entry(instance.slot).or_default().push(instance);
    }
    let wanted = wanted_slots(state, service);
    let is_kept = |slot: &u32| wanted.contains(slot) || waits_for_update(state, service, *slot);
    for (slot, instances) in &slots {
        if service.is_removed || !is_kept(slot) {
            for instance in instances {
                remove(instance, steps);
            }
        }
    }
    if service.is_removed {
        return;
    }
    let mut is_stable = true;
    for slot in &wanted {
        let instances = slots.get(slot).map(Vec::as_slice).unwrap_or_default();
        is_stable &= plan_slot(state, service, *slot, instances, now, steps);
    }
    if is_stable && steps.len() == before {
        rollout::plan_update(state, service, &wanted, &slots, now, steps);
    }
}

/// 1 to `replicas`, or for a global service the numbers of the nodes that take it.
fn wanted_slots(state: &State, service: &Service) -> BTreeSet<u32> {
    if !service.spec.is_global {
        return (1..=service.spec.replicas).gather();
    }
    state
        .nodes
        .rows()
        .filter(|node| !node.is_drained && satisfies(state, node, &service.spec))
        .filter(|node| node.condition == Condition::Up || has_instance_on(state, service, node))
        .map(|node| u32::from(node.number))
        .gather()
}

/// A node of a global service can't run its new image: what runs there is left alone until the others have the update.
fn waits_for_update(state: &State, service: &Service, slot: u32) -> bool {
    let is_foreign = |node: &Node| foreign_architecture(state, node, &service.spec).is_some();
    service.spec.is_global
        && service.update != Update::Done
        && state.nodes.rows().any(|node| {
            u32::from(node.number) == slot
                && !node.is_drained
                && meets_constraints(node, &service.spec)
                && is_foreign(node)
        })
}

fn has_instance_on(state: &State, service: &Service, node: &Node) -> bool {
    state.instances_of(service.id).any(|instance| instance.node == Some(node.id))
}

/// Keeps one live instance in a slot. Returns whether the slot needs nothing.
fn plan_slot(
    state: &State,
    service: &Service,
    slot: u32,
    instances: &[&Instance],
    now: Timestamp,
    steps: &mut Vec<PlanStep>,
) -> bool {
    let live: Vec<&&Instance> =
        instances.iter().filter(|instance| instance.desired == Desired::Run).collect();
    if live.is_empty() {
        // Stop-first: the old one must be gone before its data or port serve the new one.
        if instances.is_empty() || !service.spec.is_stop_first() {
            steps.push(create(service, slot, rollout::version_for_empty_slot(service)));
        }
        return false;
    }
    let mut is_stable = true;
    for instance in &live {
        if let Some(verdict) = dead(state, service, instance, now) {
            is_stable = false;
            if verdict == Dead::Replace {
                let has_other = live
                    .iter()
                    .any(|other| other.id != instance.id && dead(state, service, other, now).is_none());
                remove(instance, steps);
                // Its node still answers: the old copy must have gone before an exclusive one may start elsewhere.
                let is_here = instance.node.and_then(|node| state.nodes.find(&node));
                let runs_on =
                    service.spec.is_exclusive && is_here.is_some_and(|node| node.condition == Condition::Up);
                if !has_other && !runs_on {
                    steps.push(create(service, slot, instance.spec_version));
                }
            }
        }
    }
    is_stable
}

#[derive(PartialEq, Eq)]
enum Dead {
    Replace,
    /// It is lost, but must not be replaced yet, or not by itself.
    Wait,
}

/// Why an instance no longer counts: its node is down, drained or gone.
fn dead(state: &State, service: &Service, instance: &Instance, now: Timestamp) -> Option<Dead> {
    if instance.observed.phase.is_final() {
        return None;
    }
    let node = state.nodes.find(&instance.node?);
    let Some(node) = node else { return Some(Dead::Replace) };
    let has_data = state.data_node(service) == Some(node.id);
    if node.condition == Condition::Down {
        if has_data {
            return Some(Dead::Wait);
        }
        let may_run = service.spec_of(instance.spec_version).is_exclusive && may_hold_lease(node, now);
        return Some(if may_run { Dead::Wait } else { Dead::Replace });
    }
    (node.is_drained && !has_data).then_some(Dead::Replace)
}

/// Whether an exclusive container on a node that is down may still be running.
fn may_hold_lease(node: &Node, now: Timestamp) -> bool {
    node.losses.last().is_some_and(|at| now.since_ms(*at) < EXCLUSIVE_WAIT_MS)
}

pub fn remove(instance: &Instance, steps: &mut Vec<PlanStep>) {
    if instance.desired != Desired::Remove {
        let (instance, instance_version) = (instance.id, instance.version);
        steps.push(PlanStep::SetDesired { instance, instance_version, desired: Desired::Remove });
    }
}

pub fn create(service: &Service, slot: u32, spec_version: u64) -> PlanStep {
    PlanStep::CreateInstance { service: service.id, service_version: service.version, slot, spec_version }
}

/// Instances to be removed whose node cannot say that they are gone: a returning node removes what the state no
/// longer knows.
pub fn plan_orphans(state: &State, now: Timestamp, steps: &mut Vec<PlanStep>) {
    for instance in state.instances.rows().filter(|instance| instance.desired == Desired::Remove) {
        let is_unreachable = match instance.node.and_then(|node| state.nodes.find(&node)) {
            Some(node) => {
                let service = state.services.find(&instance.service);
                let is_exclusive =
                    service.is_some_and(|service| service.spec_of(instance.spec_version).is_exclusive);
                node.condition == Condition::Down && !(is_exclusive && may_hold_lease(node, now))
            }
            None => true,
        };
        if is_unreachable {
            steps.push(PlanStep::Forget { instance: instance.id, instance_version: instance.version });
        }
    }
}
