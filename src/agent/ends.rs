//! How a container's service wants it ended, and how its end reads in the state.

use super::launch::container_id;
use crate::model::*;
use crate::runtime::ContainerEnd;
use crate::state::State;
use std::time::Duration;

pub fn spec_of(state: &State, id: InstanceId) -> Option<&ServiceSpec> {
    let instance = state.instances.find(&id)?;
    let service = state.services.find(&instance.service)?;
    Some(service.spec_of(instance.spec_version))
}

pub fn policy_of(state: &State, id: InstanceId) -> RestartPolicy {
    spec_of(state, id).map(|spec| spec.restart).unwrap_or_default()
}

pub fn memory_limit(state: &State, id: InstanceId) -> u64 {
    spec_of(state, id).and_then(|spec| spec.resources.memory_bytes_max).unwrap_or(0)
}

/// The signal that the service names, if it does, and its grace.
pub fn stop_of(state: &State, id: InstanceId) -> (Option<i32>, Duration) {
    let spec = spec_of(state, id);
    let signal = spec.and_then(|spec| spec.stop_signal.as_deref()).and_then(signal_number);
    let grace_ms = spec.map_or(crate::model::spec::STOP_GRACE_MS, |spec| spec.stop_grace_ms);
    (signal, Duration::from_millis(grace_ms))
}

pub fn image_stop_signal(runtime: &crate::runtime::Runtime, id: InstanceId) -> i32 {
    let spec = runtime.spec(&container_id(id)).ok();
    spec.and_then(|spec| spec.image.stop_signal).as_deref().and_then(signal_number).unwrap_or(libc::SIGTERM)
}

/// `SIGQUIT`, `QUIT` or `3`.
pub fn signal_number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (1..=64).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    name.parse::<nix::sys::signal::Signal>().ok().map(|signal| signal as i32)
}

pub fn exit_of(end: ContainerEnd, limit_bytes: u64) -> Exit {
    match end {
        ContainerEnd::Exited(record) if record.is_oom_killed => Exit::OutOfMemory { limit_bytes },
        ContainerEnd::Exited(record) => match record.signal {
            Some(signal) => Exit::Signal(signal.clamp(0, 255) as u8),
            None => Exit::Code(record.code.clamp(0, 255) as u8),
        },
        ContainerEnd::Lost => Exit::Signal(libc::SIGKILL as u8),
    }
}
