//! What the planner decided, step by step. A step whose rows have changed since is void; the others hold.

use super::State;
use super::apply::not_found;
use super::command::{Outcome, PlanStep, Rejection, Reply};
use super::rows::{Service, Update, VolumeKey};
use crate::model::*;
use std::collections::BTreeSet;
use std::net::Ipv4Addr;

pub fn apply(state: &mut State, steps: &[PlanStep]) -> Outcome {
    let mut applied = 0;
    for step in steps {
        let mut draft = state.clone();
        if apply_step(&mut draft, step).is_ok() {
            *state = draft;
            applied += 1;
        }
    }
    super::deploy::sweep_removed(state);
    if applied > 0 { Ok(Reply::Done) } else { Err(Rejection::Stale) }
}

fn apply_step(state: &mut State, step: &PlanStep) -> Result<(), Rejection> {
    match step {
        PlanStep::CreateInstance { service, service_version, slot, spec_version } => {
            let row = current_service(state, *service, *service_version)?;
            // A step before this one may have been void: an instance that it was to end would still be there.
            let is_filled = state.instances_of(*service).any(|other| {
                other.slot == *slot && other.spec_version == *spec_version && other.desired == Desired::Run
            });
            if row.is_removed || is_filled {
                return Err(Rejection::Stale);
            }
            create_instance(state, *service, *slot, *spec_version);
            Ok(())
        }
        PlanStep::Assign { instance, instance_version, node, node_version } => {
            assign(state, (*instance, *instance_version), (*node, *node_version))
        }
        PlanStep::SetDesired { instance, instance_version, desired } => {
            current_instance(state, *instance, *instance_version)?;
            state.instances.update(instance, |row| {
                row.desired = *desired;
                row.version += 1;
            });
            Ok(())
        }
        PlanStep::Forget { instance, instance_version } => {
            current_instance(state, *instance, *instance_version)?;
            state.instances.remove(instance);
            Ok(())
        }
        PlanStep::FinishUpdate { service, service_version } => {
            current_service(state, *service, *service_version)?;
            state.services.update(service, |row| {
                row.update = Update::Done;
                row.previous = None;
                row.version += 1;
            });
            Ok(())
        }
        PlanStep::FailUpdate { service, service_version, slot, reason } => {
            let row = current_service(state, *service, *service_version)?;
            let subject = format!("{}/{}", row.app, row.name);
            let at = state.time();
            state.services.update(service, |row| {
                row.update = Update::Failed { at, slot: *slot, reason: reason.clone() };
                row.version += 1;
            });
            state.note("update_failed", subject.clone(), format!("update of {subject} stopped: {reason}"));
            Ok(())
        }
    }
}

fn current_service(state: &State, id: ServiceId, version: u64) -> Result<&Service, Rejection> {
    let service = state.services.find(&id).ok_or_else(|| not_found("service", id))?;
    if service.version == version { Ok(service) } else { Err(Rejection::Stale) }
}

fn current_instance(state: &State, id: InstanceId, version: u64) -> Result<&Instance, Rejection> {
    let instance = state.instances.find(&id).ok_or_else(|| not_found("instance", id))?;
    if instance.version == version { Ok(instance) } else { Err(Rejection::Stale) }
}

fn create_instance(state: &mut State, service: ServiceId, slot: u32, spec_version: u64) {
    let id = InstanceId(state.count(|counters| {
        counters.instance += 1;
        counters.instance
    }));
    let now = state.time();
    let observed = Observed { phase: Phase::Pending, seq: 0, start_id: None, exit: None, since: now };
    let instance = Instance {
        id,
        service,
        slot,
        spec_version,
        node: None,
        address: None,
        desired: Desired::Run,
        observed,
        created_at: now,
        version: 1,
    };
    state.instances.put(id, instance);
}

fn assign(
    state: &mut State,
    (instance, instance_version): (InstanceId, u64),
    (node, node_version): (NodeId, u64),
) -> Result<(), Rejection> {
    let row = current_instance(state, instance, instance_version)?;
    if row.node.is_some() || row.desired != Desired::Run {
        return Err(Rejection::Stale);
    }
    let service_id = row.service;
    let target = state.existing_node(node)?;
    if target.version != node_version || target.condition != Condition::Up || target.is_drained {
        return Err(Rejection::Stale);
    }
    let number = target.number;
    let service = state.services.find(&service_id).ok_or(Rejection::Stale)?.clone();
    if state.data_nodes(&service).into_iter().any(|holder| holder != node) {
        return Err(Rejection::Stale);
    }
    let address = allocate_address(state, number)?;
    for name in service.spec.volume_names() {
        state.volumes.update(&VolumeKey::new(&service.app, name), |volume| volume.node = Some(node));
    }
    let now = state.time();
    state.instances.update(&instance, |row| {
        row.node = Some(node);
        row.address = Some(address);
        row.observed.phase = Phase::Assigned;
        row.observed.since = now;
        row.version += 1;
    });
    Ok(())
}

/// Next-fit in the node's /24: .1 is the bridge, .255 the broadcast address.
fn allocate_address(state: &mut State, number: u8) -> Result<Ipv4Addr, Rejection> {
    let range = state.cluster().map_or(Ipv4Addr::UNSPECIFIED, |cluster| cluster.container_range);
    let [first, second, ..] = range.octets();
    let taken: BTreeSet<Ipv4Addr> = state.instances.rows().filter_map(|row| row.address).gather();
    let next =
        state.meta.find(&()).and_then(|meta| meta.counters.next_host.get(&number).copied()).unwrap_or(1);
    let found = (1..=253u32)
        .map(|step| ((u32::from(next) - 1 + step) % 253 + 2) as u8)
        .map(|host| Ipv4Addr::new(first, second, number, host))
        .find(|address| !taken.contains(address));
    let address = found.ok_or_else(|| Rejection::NoAddress(format!("{first}.{second}.{number}.0/24")))?;
    state.count(|counters| counters.next_host.insert(number, address.octets()[3] - 1));
    Ok(address)
}
