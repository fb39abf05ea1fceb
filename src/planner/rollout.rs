//! Replaces the instances of a changed service one at a time.
//!
//! The next slot is touched only when the last one settled: healthy, or running 5 s without a health check. A new
//! instance that fails stops the update; the old instances keep serving.

use super::instances::{create, remove};
use crate::model::*;
use crate::state::{PlanStep, Service, State, Update};
use std::collections::{BTreeMap, BTreeSet};

/// How long an instance without a health check must run before it counts as good.
pub const SETTLED_AFTER_MS: u64 = 5_000;

/// The version that an empty slot gets: after a failed update the one that still serves.
pub fn version_for_empty_slot(service: &Service) -> u64 {
    match (&service.update, &service.previous) {
        (Update::Failed { .. }, Some(previous)) => previous.spec_version,
        _ => service.spec_version,
    }
}

pub fn plan_update(
    state: &State,
    service: &Service,
    wanted: &BTreeSet<u32>,
    slots: &BTreeMap<u32, Vec<&Instance>>,
    now: Timestamp,
    steps: &mut Vec<PlanStep>,
) {
    match &service.update {
        Update::Done => return,
        Update::Failed { .. } => return drop_failed(service, slots, steps),
        Update::Rolling { .. } => {}
    }
    let mut next = None;
    for slot in wanted {
        let live: Vec<&&Instance> = slots
            .get(slot)
            .into_iter()
            .flatten()
            .filter(|instance| instance.desired == Desired::Run)
            .collect();
        let new = live.iter().find(|instance| instance.spec_version == service.spec_version);
        let old = live.iter().filter(|instance| instance.spec_version != service.spec_version);
        let Some(new) = new else {
            next = next.or(Some((*slot, live)));
            continue;
        };
        match progress(state, service, new, now) {
            Progress::Settled => old.for_each(|instance| remove(instance, steps)),
            Progress::Waiting => return,
            Progress::Failed(reason) => {
                let is_first = service.previous.is_none();
                if !is_first {
                    let (service, service_version) = (service.id, service.version);
                    steps.push(PlanStep::FailUpdate { service, service_version, slot: *slot, reason });
                }
                return;
            }
        }
    }
    // What is being stopped must be gone before the next slot begins.
    let is_stopping = slots.values().flatten().any(|instance| instance.desired != Desired::Run);
    if !steps.is_empty() && steps.iter().any(|step| names(step, service, slots)) || is_stopping {
        return;
    }
    match next {
        Some((slot, old)) if service.spec.is_stop_first() => {
            debug_assert!(!old.is_empty(), "empty slots of {slot} were filled before");
            old.iter().for_each(|instance| remove(instance, steps));
        }
        Some((slot, _)) => steps.push(create(service, slot, service.spec_version)),
        None => {
            let (service, service_version) = (service.id, service.version);
            steps.push(PlanStep::FinishUpdate { service, service_version });
        }
    }
}

/// Whether a step is about an instance of this service.
fn names(step: &PlanStep, service: &Service, slots: &BTreeMap<u32, Vec<&Instance>>) -> bool {
    match step {
        PlanStep::SetDesired { instance, .. } => {
            slots.values().flatten().any(|row| row.id == *instance && row.service == service.id)
        }
        _ => false,
    }
}

/// After a failed update a slot whose old instance still serves needs no new one.
fn drop_failed(service: &Service, slots: &BTreeMap<u32, Vec<&Instance>>, steps: &mut Vec<PlanStep>) {
    let Update::Failed { slot, .. } = &service.update else { return };
    let live = slots.get(slot).into_iter().flatten().filter(|instance| instance.desired == Desired::Run);
    for instance in live {
        let is_good = instance.observed.phase.is_running() && instance.observed.phase != Phase::Unhealthy;
        if instance.spec_version == service.spec_version && service.previous.is_some() && !is_good {
            remove(instance, steps);
        }
    }
}

enum Progress {
    Settled,
    Waiting,
    Failed(String),
}

fn progress(state: &State, service: &Service, instance: &Instance, now: Timestamp) -> Progress {
    let observed = &instance.observed;
    let has_check = matches!(&service.spec.health, Some(health) if health.test != HealthTest::Disabled);
    let exit = observed.exit.as_ref().map(|exit| format!(": {exit}")).unwrap_or_default();
    let name = state.instance_name(instance);
    match observed.phase {
        Phase::Healthy | Phase::Completed => Progress::Settled,
        Phase::Running if !has_check && now.since_ms(observed.since) >= SETTLED_AFTER_MS => Progress::Settled,
        Phase::Unhealthy => Progress::Failed(format!("{name} is unhealthy")),
        Phase::Failing => Progress::Failed(format!("{name} keeps failing{exit}")),
        Phase::Stopped => Progress::Failed(format!("{name} stopped{exit}")),
        // Lost with its node: that is no fault of the new specification.
        _ => Progress::Waiting,
    }
}
