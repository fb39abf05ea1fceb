//! Stops every container of this node before its machine ends, each with its own signal and within its own grace.
//!
//! Input: the state, for signals and graces. Output: stopped containers, whose end nobody reports: the next start finds
//! them ended and starts anew what is still wanted here. The agent must have been stopped before.

use super::ends::{image_stop_signal, stop_of};
use super::launch::{Ground, container_id, instance_of};
use crate::runtime::ContainerState;
use crate::state::State;
use crate::tasks::Launch;
use async_executor::{Executor, Task};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};

/// In the run directory: for how many seconds a container may still be at its end.
pub const GRACE_FILE: &str = "longest-grace";

/// A machine that is to end does so: whatever its services ask for.
const GRACE_MAX: Duration = Duration::from_secs(600);

pub async fn stop_containers(
    ground: &Ground,
    run_dir: &Path,
    state: &Arc<State>,
    executor: &Executor<'static>,
) {
    let listing = ground.runtime.clone();
    let running = crate::tasks::unblock(move || listing.list()).await.unwrap_or_else(|error| {
        warn!(%error, "list containers");
        Vec::new()
    });
    let is_running = |state: &ContainerState| matches!(state, ContainerState::Running { .. });
    let running = running.into_iter().filter(|container| is_running(&container.state));
    let ids: Vec<_> = running.filter_map(|container| instance_of(&container.id)).collect();
    info!(containers = ids.len(), "the machine ends");
    let longest = ids.iter().map(|id| stop_of(state, *id).1).max().unwrap_or_default().min(GRACE_MAX);
    // Who ends the machine waits as long; without the file, a minute.
    let _ = std::fs::write(run_dir.join(GRACE_FILE), longest.as_secs().to_string());
    let stops: Vec<Task<()>> = ids
        .into_iter()
        .map(|id| {
            let (signal, grace) = stop_of(state, id);
            let grace = grace.min(GRACE_MAX);
            let runtime = ground.runtime.clone();
            executor.launch(async move {
                let outcome = crate::tasks::unblock(move || {
                    let number = signal.unwrap_or_else(|| image_stop_signal(&runtime, id));
                    runtime.stop(&container_id(id), number, grace)
                })
                .await;
                if let Err(error) = outcome {
                    warn!(instance = %id, %error, "stop a container");
                }
            })
        })
        .collect();
    for stop in stops {
        stop.await;
    }
}
