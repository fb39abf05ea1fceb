//! What a user asks for: an app and its services, after the Compose file has been read and checked.
//!
//! Stored in the replicated state with postcard: fields are never changed or reordered, new shapes are new
//! variants. Equal specifications are equal values, so that an unchanged file changes nothing.

use super::artifact::Digest;
use super::ids::AppName;
use super::secret::SecretName;
use crate::model::Gather;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// As Docker: between the stop signal and SIGKILL.
pub const STOP_GRACE_MS: u64 = 10_000;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppSpec {
    pub name: AppName,
    pub services: BTreeMap<String, ServiceSpec>,
    /// Named volumes and writable directories that services mount, by name.
    pub volumes: BTreeMap<String, VolumeSpec>,
    /// Secrets that the file itself brings: they belong to the app and go when it no longer names them.
    #[serde(default)]
    pub secrets: BTreeSet<SecretName>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// A tar that fills the volume when it is made, and never again.
    pub seed: Option<Digest>,
    /// The relative directory it stands for, such as `./data`; `None` for a named volume.
    pub directory: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceSpec {
    pub image: ImageSpec,
    /// `command:`; replaces the image's CMD.
    pub command: Option<Vec<String>>,
    /// `entrypoint:`; replaces the image's ENTRYPOINT and drops its CMD.
    pub entrypoint: Option<Vec<String>>,
    pub environment: BTreeMap<String, String>,
    pub user: Option<String>,
    pub working_dir: Option<String>,
    pub hostname: Option<String>,
    pub labels: BTreeMap<String, String>,
    pub ports: Vec<PortSpec>,
    pub mounts: Vec<MountSpec>,
    pub restart: RestartPolicy,
    pub health: Option<HealthSpec>,
    pub depends_on: BTreeMap<String, DependencyCondition>,
    pub replicas: u32,
    /// `deploy.mode: global`: one instance on each eligible node; `replicas` is then ignored.
    pub is_global: bool,
    pub resources: ResourceSpec,
    pub placement: PlacementSpec,
    pub stop_signal: Option<String>,
    pub stop_grace_ms: u64,
    /// `x-tinydc.exclusive`: never two running copies of a slot, also not during a partition.
    pub is_exclusive: bool,
    pub is_read_only: bool,
    pub has_init: bool,
    pub has_tty: bool,
    /// By the network's key, unique in the cluster: `app/name`, or a bare name that several apps share.
    pub networks: BTreeMap<String, NetworkUse>,
    /// `container_name`: one more name of the service.
    pub container_name: Option<String>,
    /// `x-tinydc.affinity: client`: a client stays with one endpoint.
    pub has_client_affinity: bool,
    #[serde(default)]
    pub secrets: Vec<SecretUse>,
}

/// A secret as a file in the container's memory, never on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretUse {
    pub secret: SecretName,
    /// Absolute: `/run/secrets/NAME` unless the file says otherwise.
    pub target: String,
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
    /// As of the deploy, which fills it in: a changed secret is a changed service.
    pub version: u64,
}

/// How a service takes part in a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkUse {
    /// More names of the service there.
    pub aliases: BTreeSet<String>,
    /// The network has no way out, as this app declares it.
    pub is_internal: bool,
}

/// The image as written, and the digest its tag was resolved to at deploy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSpec {
    /// As written in the Compose file: `nginx:1.27`.
    pub reference: String,
    /// Of the index or manifest; `None` only before the deploy has resolved it.
    pub digest: Option<Digest>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortSpec {
    pub protocol: Protocol,
    /// On the node; `None` asks for a free one (chosen at deploy).
    pub published: Option<u16>,
    /// In the container.
    pub target: u16,
    pub host_address: Option<Ipv4Addr>,
    /// `mode: host`: only on the node that runs the instance, one instance per node.
    pub is_host_mode: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    pub target: String,
    pub is_read_only: bool,
    pub source: MountSource,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// Files or a read-only directory sent along: a tar by digest. `is_file`: the tar holds one file.
    Content {
        digest: Digest,
        is_file: bool,
    },
    /// A volume of this app by name; its data lies on one node.
    Volume {
        name: String,
    },
    /// A path of the node's own file system, absolute.
    HostPath {
        path: String,
    },
    Tmpfs {
        bytes_max: Option<u64>,
    },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum RestartPolicy {
    /// Also for a service with no `restart:` key: a cluster's services are meant to run (README says so).
    #[default]
    Always,
    UnlessStopped,
    No,
    OnFailure {
        attempts_max: Option<u32>,
    },
}

/// What a check has when it does not say, as in Docker.
pub const HEALTH_INTERVAL_MS: u64 = 30_000;
pub const HEALTH_TIMEOUT_MS: u64 = 30_000;
pub const HEALTH_RETRIES: u32 = 3;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HealthSpec {
    pub test: HealthTest,
    pub interval_ms: u64,
    pub timeout_ms: u64,
    pub retries: u32,
    pub start_period_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum HealthTest {
    /// `test: NONE` or `disable: true`: also the image's own check is off.
    Disabled,
    Exec(Vec<String>),
    /// Run by `/bin/sh -c`.
    Shell(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DependencyCondition {
    Started,
    Healthy,
    Completed,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceSpec {
    /// `None`: the cluster's default reservation counts.
    pub reserved_cpu_millis: Option<u64>,
    pub reserved_memory_bytes: Option<u64>,
    pub cpu_millis_max: Option<u64>,
    pub memory_bytes_max: Option<u64>,
    pub pids_max: Option<u64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementSpec {
    pub constraints: Vec<Constraint>,
    pub instances_per_node_max: Option<u32>,
    /// Label keys over whose values instances are spread, beside the spread over nodes.
    pub spread_over: Vec<String>,
}

/// `node.labels.KEY == VALUE`, `node.hostname != pi1`, …
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Constraint {
    pub subject: ConstraintSubject,
    pub must_equal: bool,
    pub value: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConstraintSubject {
    NodeName,
    NodeId,
    /// `node.platform.arch`, as OCI or as `uname -m` writes it.
    Architecture,
    Label(String),
}

impl std::fmt::Display for Constraint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let operator = if self.must_equal { "==" } else { "!=" };
        match &self.subject {
            ConstraintSubject::NodeName => write!(f, "node.hostname {operator} {}", self.value),
            ConstraintSubject::NodeId => write!(f, "node.id {operator} {}", self.value),
            ConstraintSubject::Architecture => write!(f, "node.platform.arch {operator} {}", self.value),
            ConstraintSubject::Label(key) => write!(f, "node.labels.{key} {operator} {}", self.value),
        }
    }
}

impl ServiceSpec {
    /// One instance of an image, with every key at its default.
    pub fn new(image: ImageSpec) -> ServiceSpec {
        ServiceSpec {
            image,
            command: None,
            entrypoint: None,
            environment: BTreeMap::new(),
            user: None,
            working_dir: None,
            hostname: None,
            labels: BTreeMap::new(),
            ports: Vec::new(),
            mounts: Vec::new(),
            restart: RestartPolicy::default(),
            health: None,
            depends_on: BTreeMap::new(),
            replicas: 1,
            is_global: false,
            resources: ResourceSpec::default(),
            placement: PlacementSpec::default(),
            stop_signal: None,
            stop_grace_ms: STOP_GRACE_MS,
            is_exclusive: false,
            is_read_only: false,
            has_init: false,
            has_tty: false,
            networks: BTreeMap::new(),
            container_name: None,
            has_client_affinity: false,
            secrets: Vec::new(),
        }
    }

    /// Names of the app's volumes that this service mounts.
    pub fn volume_names(&self) -> impl Iterator<Item = &str> {
        self.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::Volume { name } => Some(name.as_str()),
            _ => None,
        })
    }

    /// Paths of the node's own file system that it binds.
    pub fn host_paths(&self) -> impl Iterator<Item = &str> {
        self.mounts.iter().filter_map(|mount| match &mount.source {
            MountSource::HostPath { path } => Some(path.as_str()),
            _ => None,
        })
    }

    /// Digests of content that a node needs before it can start an instance.
    pub fn content_digests(&self) -> BTreeSet<&Digest> {
        self.mounts
            .iter()
            .filter_map(|mount| match &mount.source {
                MountSource::Content { digest, .. } => Some(digest),
                _ => None,
            })
            .gather()
    }

    /// Whether an instance can only be replaced after the old one has stopped.
    pub fn is_stop_first(&self) -> bool {
        self.is_exclusive
            || self.volume_names().next().is_some()
            || self.ports.iter().any(|port| port.is_host_mode)
    }
}
