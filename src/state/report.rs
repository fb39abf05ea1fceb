//! What an agent reports of its own node. Reports of another run of the daemon, or older ones, are void.

use super::State;
use super::command::{InstanceReport, NodeReport, Outcome, Rejection, Reply};
use super::rows::VolumeKey;
use crate::model::*;

pub fn apply(state: &mut State, node: NodeId, start_id: StartId, report: &NodeReport) -> Outcome {
    let row = state.existing_node(node)?;
    if row.start_id != Some(start_id) {
        return Err(Rejection::Stale);
    }
    for entry in &report.instances {
        apply_instance(state, node, start_id, entry);
    }
    for digest in &report.holds {
        state.artifacts.update(digest, |artifact| {
            artifact.holders.insert(node);
            artifact.part_holders.remove(&node);
        });
    }
    for digest in &report.dropped {
        state.artifacts.update(digest, |artifact| {
            artifact.forget_holder(node);
        });
    }
    for (app, name) in &report.volumes_deleted {
        let key = VolumeKey::new(app, name);
        if state.volumes.find(&key).is_some_and(|volume| volume.is_removed && volume.node == Some(node)) {
            state.volumes.remove(&key);
        }
    }
    super::deploy::sweep_removed(state);
    Ok(Reply::Done)
}

fn apply_instance(state: &mut State, node: NodeId, start_id: StartId, report: &InstanceReport) {
    let Some(instance) = state.instances.find(&report.instance) else { return };
    let is_newer = instance.observed.start_id != Some(start_id) || report.seq > instance.observed.seq;
    if instance.node != Some(node) || !is_newer {
        return;
    }
    if report.is_gone && instance.desired == Desired::Remove {
        state.instances.remove(&report.instance);
        return;
    }
    let now = state.time();
    let (service, before) = (instance.service, instance.observed.phase);
    let name = state.instance_name(instance);
    state.instances.update(&report.instance, |instance| {
        let observed = &mut instance.observed;
        if observed.phase != report.phase {
            observed.since = now;
        }
        observed.phase = report.phase;
        observed.seq = report.seq;
        observed.start_id = Some(start_id);
        if report.exit.is_some() {
            observed.exit = report.exit.clone();
        }
        instance.version += 1;
    });
    state.services.update(&service, |service| {
        service.was_started |= report.phase.is_running() || report.phase == Phase::Completed;
        service.was_healthy |= report.phase == Phase::Healthy;
        service.was_completed |= report.phase == Phase::Completed;
    });
    note_phase(state, name, before, report);
}

fn note_phase(state: &mut State, name: String, before: Phase, report: &InstanceReport) {
    if before == report.phase {
        return;
    }
    let exit = report.exit.as_ref().map(|exit| format!(" ({exit})")).unwrap_or_default();
    match report.phase {
        Phase::Failing => state.note("instance_failing", name.clone(), format!("{name} keeps failing{exit}")),
        Phase::Unhealthy => state.note("instance_unhealthy", name.clone(), format!("{name} is unhealthy")),
        Phase::Stopped => state.note("instance_stopped", name.clone(), format!("{name} stopped{exit}")),
        Phase::Completed => state.note("instance_completed", name.clone(), format!("{name} completed")),
        Phase::Running if matches!(before, Phase::Assigned | Phase::Preparing) => {
            state.note("instance_started", name.clone(), format!("{name} started"));
        }
        _ => {}
    }
}

impl Rejection {
    /// Whether the agent should look again rather than repeat itself.
    pub fn is_stale(&self) -> bool {
        matches!(self, Rejection::Stale)
    }
}
