//! Leases of exclusive services: their containers run only while this node is known to have the cluster's word.
//!
//! Input: linearizable reads. Output: until when exclusive containers may run, to their shims, which end them by
//! themselves. A read that came back from a leader proves that until it was asked nobody had marked this node down;
//! from then on the leader waits 13 s before it starts a copy elsewhere, and the lease ends 10 s after the question.
//! It lives in memory alone: nothing is written, and a node without exclusive services asks nothing.
//!
//! Invariant: never two running copies (`tests/cluster`, scenario `exclusive`).

use super::launch::{Ground, container_id};
use crate::linux::clock;
use crate::model::*;
use crate::replica::Handle;
use crate::runtime::LeaseEnd;
use crate::state::State;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tracing::warn;

/// How long an exclusive container may run after the last proof was asked for.
const LEASE_MS: u64 = 10_000;
/// Several tries fit into a lease, also while a leader is being elected.
const RENEW_EVERY: Duration = Duration::from_millis(2_000);
/// A container is not started when it might be killed at once.
const START_MARGIN_MS: u64 = 2_000;

/// Until when this node may run exclusive services, in ms since boot; 0 before the first proof.
#[derive(Default)]
pub struct Lease(AtomicU64);

impl Lease {
    /// The end to start a container with, unless that is too near.
    pub fn for_start(&self) -> Option<LeaseEnd> {
        let end = self.0.load(Ordering::Acquire);
        (end >= clock::boot_ms() + START_MARGIN_MS).then_some(LeaseEnd(end))
    }
}

/// Renews for as long as the node runs.
pub async fn keep_leases(node: NodeId, start_id: StartId, ground: Ground, replica: Handle) {
    let watch = replica.published().watch();
    loop {
        if !exclusive_instances(&replica.state(), node).is_empty() {
            renew(node, start_id, &ground, &replica).await;
            async_io::Timer::after(RENEW_EVERY).await;
        } else if !watch.changed().await {
            return;
        }
    }
}

async fn renew(node: NodeId, start_id: StartId, ground: &Ground, replica: &Handle) {
    // Taken before the question: what is proved is how things were then.
    let asked_at = clock::boot_ms();
    let Ok(state) = replica.read().await else { return };
    let row = state.nodes.find(&node);
    if !row.is_some_and(|row| row.condition == Condition::Up && row.start_id == Some(start_id)) {
        return;
    }
    let end = LeaseEnd(asked_at + LEASE_MS);
    ground.lease.0.store(end.0, Ordering::Release);
    let ground = ground.clone();
    crate::tasks::unblock(move || {
        for instance in exclusive_instances(&state, node) {
            if let Err(error) = ground.runtime.renew_lease(&container_id(instance), end) {
                warn!(%instance, %error, "renew the lease of an exclusive container");
            }
        }
    })
    .await;
}

fn exclusive_instances(state: &State, node: NodeId) -> Vec<InstanceId> {
    let is_exclusive = |instance: &&Instance| {
        let service = state.services.find(&instance.service);
        service.is_some_and(|service| service.spec_of(instance.spec_version).is_exclusive)
    };
    state.instances_on(node).filter(is_exclusive).map(|instance| instance.id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_exclusive_starts_on_a_lease_that_is_about_to_end() {
        let lease = Lease::default();
        assert_eq!(lease.for_start(), None);
        let soon = clock::boot_ms() + START_MARGIN_MS / 2;
        lease.0.store(soon, Ordering::Release);
        assert_eq!(lease.for_start(), None);
        let later = clock::boot_ms() + LEASE_MS;
        lease.0.store(later, Ordering::Release);
        assert_eq!(lease.for_start(), Some(LeaseEnd(later)));
    }
}
