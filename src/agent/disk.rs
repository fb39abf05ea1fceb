//! Apps never fill the disk that the cluster needs: on one that is all but full, containers whose writable layers are
//! over their quota are stopped, with a reason, and not started again before there is space.

use super::Signal;
use super::artifacts::images_digest;
use super::launch::{Ground, container_id};
use crate::linux::disk::Space;
use crate::model::{ArtifactKind, Digest, Gather, InstanceId};
use crate::state::State;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};

/// What counts is that it ends: the disk may be full in seconds.
const GRACE: Duration = Duration::from_secs(3);

pub fn is_critical(data_dir: &Path) -> bool {
    Space::of(data_dir).is_some_and(Space::is_critical)
}

impl Ground {
    /// Why a container must not run now; `None` while it may.
    pub fn over_quota(&self, instance: InstanceId) -> Option<String> {
        let space = Space::of(&self.data_dir).filter(|space| space.is_critical())?;
        let bytes = self.runtime.writable_bytes(&container_id(instance));
        (bytes > space.writable_bytes_max()).then(|| {
            format!(
                "the disk is nearly full ({} MiB free), and it has written {} MiB where {} MiB are allowed then",
                space.free_bytes >> 20,
                bytes >> 20,
                space.writable_bytes_max() >> 20
            )
        })
    }
}

/// Stops those that are over. Each is announced before it ends, so that its end has a reason.
pub async fn stop_over_quota(
    ground: Ground,
    running: Vec<(InstanceId, i32)>,
    signals: async_channel::Sender<Signal>,
) {
    for (instance, signal) in running {
        let asked = ground.clone();
        let Some(why) = crate::tasks::unblock(move || asked.over_quota(instance)).await else { continue };
        warn!(%instance, why, "container stopped");
        if signals.send(Signal::OverQuota { instance, why }).await.is_err() {
            return;
        }
        let runtime = ground.runtime.clone();
        let stopped =
            crate::tasks::unblock(move || runtime.stop(&container_id(instance), signal, GRACE)).await;
        if let Err(error) = stopped {
            warn!(%instance, %error, "stop a container that fills the disk");
        }
    }
}

/// Removes images and content that nothing needs any more, by the newest state there is at each step.
pub fn sweep_files(ground: &Ground, newest: impl Fn() -> Arc<State>) {
    let state = newest();
    let in_use = in_use(&state);
    ground.artifacts.sweep_content(|hex| in_use.iter().any(|digest| digest.hex() == hex));
    match ground.runtime.collect_garbage(|| kept(&newest())) {
        Ok(collected) if collected.images + collected.blobs + collected.layers > 0 => {
            info!(
                images = collected.images,
                blobs = collected.blobs,
                layers = collected.layers,
                "unused images removed"
            );
        }
        Ok(_) => {}
        Err(error) => warn!(%error, "remove unused images"),
    }
}

fn in_use(state: &State) -> BTreeSet<&Digest> {
    state
        .services
        .rows()
        .flat_map(|service| {
            let specs = service.older_specs().map(|older| &older.spec).chain([&service.spec]);
            specs.flat_map(|spec| spec.content_digests().into_iter().chain(spec.image.digest.as_ref()))
        })
        .gather()
}

fn kept(state: &State) -> BTreeSet<crate::runtime::images::Digest> {
    let in_use = in_use(state);
    state
        .artifacts
        .rows()
        .filter(|artifact| artifact.kind != ArtifactKind::RegistryImage || in_use.contains(&artifact.digest))
        .map(|artifact| images_digest(&artifact.digest))
        .gather()
}
