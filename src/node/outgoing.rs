//! What the control plane wants done outside of it, carried out on the transport.

use crate::api::{Backend, offer_cluster_key, withdraw_cluster_key};
use crate::control::Input;
use crate::model::*;
use crate::replica::{Handle, Outgoing, PeerFrame, SnapshotHeader};
use crate::state::Command;
use crate::tasks::Launch;
use crate::transport::peers::Transport;
use async_executor::Executor;
use std::sync::{Arc, OnceLock};
use tracing::{error, info, warn};

/// What exists only after the replica does.
#[derive(Clone, Default)]
pub struct Late {
    pub replica: Arc<OnceLock<Handle>>,
    pub backend: Arc<OnceLock<Arc<Backend>>>,
}

pub struct Carrier {
    pub transport: Transport,
    pub executor: Arc<Executor<'static>>,
    pub late: Late,
    /// Takes the reason for which the node must stop.
    pub halt: async_channel::Sender<String>,
}

impl Carrier {
    /// Never waits: what finds no room is repeated by raft or by the agent.
    pub fn carry(&self, outgoing: Outgoing) {
        match outgoing {
            Outgoing::Message { to, message } => {
                self.transport.frame(to, PeerFrame::Raft(message).encode());
            }
            Outgoing::Forward { to, command } => {
                self.transport.frame(to, PeerFrame::Forward(*command).encode());
            }
            Outgoing::Broadcast(alive) => {
                self.transport.broadcast_datagram(&PeerFrame::Alive(alive).encode())
            }
            Outgoing::Snapshot { to, message, frames } => self.send_snapshot(to, message, frames),
            Outgoing::OfferKey { to } => self.offer_key(to),
            Outgoing::WithdrawKey { from } => self.withdraw_key(from),
            Outgoing::Halt { why } => {
                error!(why, "this node must stop");
                // The first reason counts.
                let _ = self.halt.try_send(why);
            }
        }
    }

    fn send_snapshot(&self, to: NodeId, message: crate::consensus::Message, frames: Arc<Vec<Vec<u8>>>) {
        let (transport, late) = (self.transport.clone(), self.late.clone());
        self.executor
            .launch(async move {
                let bytes: usize = frames.iter().map(Vec::len).sum();
                let chunks = futures_lite::stream::iter(in_chunks(&frames));
                let outcome = transport.send_bulk(to, SnapshotHeader { message }.encode(), chunks).await;
                match &outcome {
                    Ok(()) => info!(%to, bytes, "snapshot sent"),
                    Err(error) => warn!(%to, %error, "snapshot not sent"),
                }
                if let Some(replica) = late.replica.get() {
                    replica.input(Input::SnapshotSent { to, is_received: outcome.is_ok() }).await;
                }
            })
            .detach();
    }

    fn withdraw_key(&self, from: NodeId) {
        let Some(backend) = self.late.backend.get().cloned() else { return };
        self.executor.launch(async move { withdraw_cluster_key(&backend, from).await }).detach();
    }

    fn offer_key(&self, to: NodeId) {
        let Some(backend) = self.late.backend.get().cloned() else { return };
        let Some(replica) = self.late.replica.get().cloned() else { return };
        self.executor
            .launch(async move {
                if offer_cluster_key(&backend, to).await {
                    let command = Box::new(Command::ConfirmKey { node: to, has_key: true });
                    replica.input(Input::Report { command }).await;
                }
            })
            .detach();
    }
}

/// Frames, each behind its length, cut into pieces that a bulk stream takes.
fn in_chunks(frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut bytes = Vec::with_capacity(frames.iter().map(|frame| frame.len() + 4).sum());
    for frame in frames {
        bytes.extend_from_slice(&(frame.len() as u32).to_le_bytes());
        bytes.extend_from_slice(frame);
    }
    bytes.chunks(limits::SNAPSHOT_CHUNK_BYTES).map(<[u8]>::to_vec).collect()
}

/// The frames again; `None` for bytes that are none.
pub fn from_bytes(mut bytes: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let (head, rest) = bytes.split_at_checked(4)?;
        let length = u32::from_le_bytes(head.try_into().ok()?) as usize;
        let (frame, rest) = rest.split_at_checked(length)?;
        frames.push(frame.to_vec());
        bytes = rest;
    }
    Some(frames)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_survive_being_cut_into_chunks() {
        let frames = vec![vec![1; 10], Vec::new(), vec![2; 200_000], vec![3]];
        let chunks = in_chunks(&frames);
        assert!(chunks.iter().all(|chunk| chunk.len() <= limits::SNAPSHOT_CHUNK_BYTES));
        assert_eq!(from_bytes(&chunks.concat()), Some(frames));
        assert_eq!(from_bytes(&[1, 0, 0]), None);
        assert_eq!(from_bytes(&[9, 0, 0, 0, 1]), None);
    }
}
