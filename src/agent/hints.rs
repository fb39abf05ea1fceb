//! What the nodes say of their own endpoints, faster than the log: hints only take away, and live in memory.
//!
//! Input: `EndpointHint` frames and signs of life from peers. Output: which instances their own nodes say don't
//! serve, and which nodes have fallen silent. A hint is the whole list of one node's daemon, so that the newest one
//! says everything and a lost one costs nothing but time.

use crate::model::{Gather, InstanceId, NodeId};
use crate::replica::EndpointHint;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// As liveness has it: a node this long silent is subtracted without waiting for a leader.
pub const SILENT_AFTER: Duration = Duration::from_millis(3_000);
/// What an instance needs to be named by; more are cut, as no node runs so many.
const DOWN_MAX: usize = 4096;

struct Peer {
    heard_at: Instant,
    hint: Option<EndpointHint>,
    /// Which floating addresses it could hold.
    holdable: u16,
}

pub struct Hints {
    peers: Mutex<BTreeMap<NodeId, Peer>>,
    wake: async_channel::Sender<()>,
    woken: async_channel::Receiver<()>,
}

impl Default for Hints {
    fn default() -> Self {
        let (wake, woken) = async_channel::bounded(1);
        Hints { peers: Mutex::default(), wake, woken }
    }
}

impl Hints {
    fn peers(&self) -> MutexGuard<'_, BTreeMap<NodeId, Peer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn hear_alive(&self, from: NodeId, holdable: u16, now: Instant) {
        let mut peers = self.peers();
        let peer = peers.entry(from).or_insert(Peer { heard_at: now, hint: None, holdable });
        peer.holdable = holdable;
        let was_silent = now.duration_since(peer.heard_at) >= SILENT_AFTER;
        peer.heard_at = now;
        if was_silent {
            self.wake();
        }
    }

    pub fn hear(&self, from: NodeId, mut hint: EndpointHint, now: Instant) {
        hint.down.truncate(DOWN_MAX);
        let mut peers = self.peers();
        let peer = peers.entry(from).or_insert(Peer { heard_at: now, hint: None, holdable: 0 });
        peer.heard_at = now;
        // One that was overtaken says nothing new.
        let is_old =
            peer.hint.as_ref().is_some_and(|old| old.start_id == hint.start_id && old.seq >= hint.seq);
        if !is_old {
            let is_news = peer.hint.as_ref().is_none_or(|old| old.down != hint.down);
            peer.hint = Some(hint);
            if is_news {
                self.wake();
            }
        }
    }

    /// Forgets nodes that are no members any more.
    pub fn retain(&self, is_member: &dyn Fn(NodeId) -> bool) {
        self.peers().retain(|node, _| is_member(*node));
    }

    /// Something here changed that the hints don't know of.
    pub fn wake(&self) {
        // A full channel holds a wake-up already.
        let _ = self.wake.try_send(());
    }

    pub async fn woken(&self) {
        // Never closed: both ends live here.
        let _ = self.woken.recv().await;
    }

    /// What each node says of its own.
    pub fn down(&self) -> BTreeSet<(NodeId, InstanceId)> {
        let peers = self.peers();
        let of_peer = |(node, peer): (&NodeId, &Peer)| {
            let down = peer.hint.as_ref().map(|hint| hint.down.clone()).unwrap_or_default();
            let node = *node;
            down.into_iter().map(move |instance| (node, instance))
        };
        peers.iter().flat_map(of_peer).gather()
    }

    /// Nodes that were heard once and are silent for `limit`.
    pub fn silent(&self, limit: Duration, now: Instant) -> BTreeSet<NodeId> {
        let is_silent = |peer: &Peer| now.saturating_duration_since(peer.heard_at) >= limit;
        self.peers().iter().filter(|(_, peer)| is_silent(peer)).map(|(node, _)| *node).gather()
    }

    /// Nodes heard within `limit`, and which floating addresses each could hold.
    pub fn live(&self, limit: Duration, now: Instant) -> BTreeMap<NodeId, u16> {
        let is_live = |peer: &Peer| now.saturating_duration_since(peer.heard_at) < limit;
        let peers = self.peers();
        peers.iter().filter(|(_, peer)| is_live(peer)).map(|(node, peer)| (*node, peer.holdable)).gather()
    }

    /// After a pause of this process: nobody is blamed for what was not heard meanwhile.
    pub fn forgive(&self, now: Instant) {
        self.peers().values_mut().for_each(|peer| peer.heard_at = now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::StartId;

    fn hint(run: u128, seq: u64, down: &[u64]) -> EndpointHint {
        EndpointHint { start_id: StartId(run), seq, down: down.iter().map(|id| InstanceId(*id)).collect() }
    }

    #[test]
    fn the_newest_hint_of_a_node_says_everything() {
        let (hints, now) = (Hints::default(), Instant::now());
        let down = |hints: &Hints| hints.down().iter().map(|(node, id)| (node.0, id.0)).collect::<Vec<_>>();
        hints.hear(NodeId(2), hint(1, 1, &[7, 8]), now);
        hints.hear(NodeId(3), hint(9, 5, &[4]), now);
        assert_eq!(down(&hints), [(2, 7), (2, 8), (3, 4)]);
        hints.hear(NodeId(2), hint(1, 3, &[]), now);
        hints.hear(NodeId(2), hint(1, 2, &[7]), now);
        assert_eq!(down(&hints), [(3, 4)]);
        // Another run of the daemon counts from the beginning.
        hints.hear(NodeId(3), hint(10, 1, &[]), now);
        assert!(down(&hints).is_empty());
    }

    #[test]
    fn a_node_is_silent_after_a_while_and_back_at_a_word() {
        let (hints, now) = (Hints::default(), Instant::now());
        hints.hear_alive(NodeId(2), 0, now);
        assert!(hints.silent(SILENT_AFTER, now + Duration::from_millis(2_999)).is_empty());
        let later = now + SILENT_AFTER;
        assert_eq!(hints.silent(SILENT_AFTER, later), BTreeSet::from([NodeId(2)]));
        hints.hear_alive(NodeId(2), 0, later);
        assert!(hints.silent(SILENT_AFTER, later).is_empty());
    }
}
