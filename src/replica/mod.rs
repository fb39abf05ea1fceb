//! Runs the control plane of one node: a thread that owns `Control`, a thread that owns the store.
//!
//! Input: messages of peers, writes, reads, reports. Output: outcomes to whoever waits, `Outgoing` to the network,
//! and the newest state, shared. Every queue is bounded: a full one makes its sender wait or drops what raft will
//! repeat.
//!
//! Never: waits for a disk on the control thread.

mod published;
mod thread;
mod wire;
mod writer;

pub use published::{Published, Snapshot};
pub use thread::{Outgoing, Replica, ReplicaConfig, ReplicaError};
pub use wire::{EndpointHint, Lane, Offer, PeerFrame, SnapshotHeader, WaysFrame, WireError};

use crate::control::{Applied, Input, Status, Undone};
use crate::model::Timestamp;
use crate::state::{Command, RequestMark, State};
use std::sync::Arc;
use std::time::Instant;

/// What waits for the control thread; beyond it senders wait.
const INBOX_MAX: usize = 4096;

pub(crate) enum Mail {
    Input(Input),
    Write {
        request: Option<RequestMark>,
        command: Box<Command>,
        reply: Reply<Result<Applied, Undone>>,
    },
    Read {
        reply: Reply<Result<u64, Undone>>,
    },
    Status {
        reply: Reply<Status>,
    },
    /// Writes what waits and ends.
    Stop,
}

type Reply<T> = async_channel::Sender<T>;

/// A way to the control thread: cheap to copy, usable from any task.
#[derive(Clone)]
pub struct Handle {
    inbox: async_channel::Sender<Mail>,
    published: Arc<Published>,
}

impl Handle {
    /// Proposes a command and waits for its outcome: at most 5 s, by the control plane's own clock.
    pub async fn write(&self, request: Option<RequestMark>, command: Command) -> Result<Applied, Undone> {
        let (reply, answer) = async_channel::bounded(1);
        let mail = Mail::Write { request, command: Box::new(command), reply };
        self.inbox.send(mail).await.map_err(|_| Undone::Unknown)?;
        answer.recv().await.unwrap_or(Err(Undone::Unknown))
    }

    /// Waits until the state here is as new as any outcome given before; at most 2 s.
    pub async fn read(&self) -> Result<Arc<State>, Undone> {
        let (reply, answer) = async_channel::bounded(1);
        let lost = Undone::NotLeader { leader: None };
        self.inbox.send(Mail::Read { reply }).await.map_err(|_| lost)?;
        answer.recv().await.unwrap_or(Err(lost))?;
        Ok(self.state())
    }

    /// The newest state this node has: it may be behind the cluster's.
    pub fn state(&self) -> Arc<State> {
        self.published.newest().state.clone()
    }

    /// Cluster time as this node has it: also while no entry comes.
    pub fn cluster_time(&self) -> Timestamp {
        self.published.cluster_time(Instant::now())
    }

    pub fn published(&self) -> &Arc<Published> {
        &self.published
    }

    /// `None` once the control thread has ended.
    pub async fn status(&self) -> Option<Status> {
        let (reply, answer) = async_channel::bounded(1);
        self.inbox.send(Mail::Status { reply }).await.ok()?;
        answer.recv().await.ok()
    }

    /// Hands in what came from outside; waits while the inbox is full.
    pub async fn input(&self, input: Input) {
        // A closed inbox means that the node stops: nothing is owed to the sender.
        let _ = self.inbox.send(Mail::Input(input)).await;
    }

    /// Hands in what raft will repeat: dropped while the inbox is full.
    pub fn input_or_drop(&self, input: Input) {
        let _ = self.inbox.try_send(Mail::Input(input));
    }
}
