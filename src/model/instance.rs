//! An instance: one copy of a service, what it should be and what its node saw.

use super::ids::{InstanceId, NodeId, ServiceId, StartId};
use super::time::Timestamp;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::Ipv4Addr;

/// What the planner wants of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Desired {
    Run,
    /// Stop the container and keep what is known of it.
    Stop,
    /// Stop the container, then forget it: the agent answers with `Phase::Stopped`, then the row goes.
    Remove,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// No node yet; `status` says why.
    #[default]
    Pending,
    /// Its node has not reported yet.
    Assigned,
    /// Image on its way, or container being made.
    Preparing,
    Running,
    /// Running and its health check succeeds.
    Healthy,
    /// Running and its health check fails.
    Unhealthy,
    /// Exited three times within a minute; restarted with growing pauses.
    Failing,
    /// Does not run and will not by itself.
    Stopped,
    /// Ended as it should: exit 0 under a policy that does not restart.
    Completed,
    /// Its node is down and its data is there: it waits.
    Lost,
}

impl Phase {
    pub fn name(self) -> &'static str {
        match self {
            Phase::Pending => "pending",
            Phase::Assigned => "assigned",
            Phase::Preparing => "preparing",
            Phase::Running => "running",
            Phase::Healthy => "healthy",
            Phase::Unhealthy => "unhealthy",
            Phase::Failing => "failing",
            Phase::Stopped => "stopped",
            Phase::Completed => "completed",
            Phase::Lost => "lost",
        }
    }

    /// A process of it lives.
    pub fn is_running(self) -> bool {
        matches!(self, Phase::Running | Phase::Healthy | Phase::Unhealthy)
    }

    /// Nothing more will come of it without a change from outside.
    pub fn is_final(self) -> bool {
        matches!(self, Phase::Stopped | Phase::Completed)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    Code(u8),
    Signal(u8),
    /// Killed by the kernel at its memory limit, in bytes.
    OutOfMemory {
        limit_bytes: u64,
    },
    /// It never started: the image, the mount or the command at fault, in a sentence.
    NotStarted(String),
}

impl Exit {
    pub fn is_success(&self) -> bool {
        matches!(self, Exit::Code(0))
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exited {code}"),
            Exit::Signal(signal) => write!(f, "killed by signal {signal}"),
            Exit::OutOfMemory { limit_bytes: 0 } => f.write_str("OOM-killed"),
            Exit::OutOfMemory { limit_bytes } => write!(f, "OOM-killed at {} MiB", limit_bytes >> 20),
            Exit::NotStarted(why) => write!(f, "not started: {why}"),
        }
    }
}

/// What the node last reported; only the agent of the instance's node writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Observed {
    pub phase: Phase,
    /// Grows with each report of one daemon's run.
    pub seq: u64,
    pub start_id: Option<StartId>,
    pub exit: Option<Exit>,
    /// Cluster time of the change to this phase.
    pub since: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    pub id: InstanceId,
    pub service: ServiceId,
    /// 1 to `replicas`: the N of `APP/SERVICE.N`.
    pub slot: u32,
    /// Which of its service's specifications it runs.
    pub spec_version: u64,
    pub node: Option<NodeId>,
    /// From its node's /24; set with the node.
    pub address: Option<Ipv4Addr>,
    pub desired: Desired,
    pub observed: Observed,
    pub created_at: Timestamp,
    pub version: u64,
}
