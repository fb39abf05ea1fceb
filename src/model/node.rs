//! A node as all nodes know it.

use super::disk::{DiskSet, NodeDisk};
use super::health::Troubles;
use super::ids::{NodeId, PublicKey, StartId, StoreId};
use super::spec::ServiceSpec;
use super::time::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Architecture {
    #[default]
    Amd64,
    Arm64,
    Arm,
    Riscv64,
}

impl Architecture {
    /// As OCI and Docker write it.
    pub fn oci_name(self) -> &'static str {
        match self {
            Architecture::Amd64 => "amd64",
            Architecture::Arm64 => "arm64",
            Architecture::Arm => "arm",
            Architecture::Riscv64 => "riscv64",
        }
    }

    /// The architecture this program was compiled for.
    pub fn own() -> Architecture {
        match std::env::consts::ARCH {
            "aarch64" => Architecture::Arm64,
            "arm" => Architecture::Arm,
            "riscv64" => Architecture::Riscv64,
            _ => Architecture::Amd64,
        }
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.oci_name())
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Condition {
    #[default]
    Up,
    Down,
}

/// What a node has to give.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeSize {
    pub cpu_millis: u64,
    /// Memory for containers: the machine's minus the reserve for tinydc and the system.
    pub memory_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    pub id: NodeId,
    pub name: String,
    /// Which /24 of the container range is its own: 1 to 254.
    pub number: u8,
    pub public_key: PublicKey,
    /// DER, signed by the cluster's CA; kept so that a repeated join gets the same one.
    pub certificate: Vec<u8>,
    pub store_id: StoreId,
    /// Of the daemon that last announced its start; `None` before the first.
    pub start_id: Option<StartId>,
    pub architecture: Architecture,
    pub size: NodeSize,
    pub labels: BTreeMap<String, String>,
    pub condition: Condition,
    /// Set by `node drain`: its instances move and nothing new comes.
    pub is_drained: bool,
    /// `leave` or `node rm` was asked: it loses its vote, then it is forgotten.
    pub is_leaving: bool,
    /// When it last went down or stopped cleanly, newest last, at most three: a flapping node is kept free.
    pub losses: Vec<Timestamp>,
    /// A clean stop announced itself at this time: nothing moves for a minute.
    pub stopped_at: Option<Timestamp>,
    /// Whether it holds the cluster key, confirmed and on its disk: only then may it vote.
    pub has_cluster_key: bool,
    pub joined_at: Timestamp,
    /// tinydc's version on it.
    pub software: String,
    pub version: u64,
    /// What it has told of itself for a while; others are preferred for new instances.
    pub troubles: Troubles,
    /// What it mounts beside its data, as its configuration names it.
    pub disks: Vec<NodeDisk>,
    /// The run of its daemon that told them: another one's figures may be of another list.
    pub disks_told_by: Option<StartId>,
    /// Of these, those that have been absent for a while.
    pub absent_disks: DiskSet,
    /// When that last changed, newest last, within an hour: one that comes and goes must not fill the log.
    pub disk_changes: Vec<Timestamp>,
    /// Its machine is being switched off or restarted: what runs there gets no new connections.
    pub is_ending: bool,
}

impl Node {
    /// Its disks that hold something the service binds, with their places in the list.
    pub fn disks_of<'a>(&'a self, spec: &'a ServiceSpec) -> impl Iterator<Item = (usize, &'a NodeDisk)> {
        let is_bound = |disk: &NodeDisk| spec.host_paths().any(|path| disk.holds(path));
        self.disks.iter().enumerate().filter(move |(_, disk)| is_bound(disk))
    }
}
