//! Chooses a node for each instance that has none.
//!
//! Eligible: up, not drained, not free of placements after losses, the architecture fits, constraints hold, data
//! lies there or nowhere, the disks it binds are there, ports are free, reservations and memory fit. Among those: the fewest instances of the
//! same service, then spread over the labels asked for, then the least reserved memory, then the lowest id.

use super::{HeardNodes, disks, reasons};
use crate::model::*;
use crate::state::{PlanStep, Service, State};
use std::collections::BTreeMap;

/// Why a node does not take an instance. The order is that in which `status` names them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Obstacle {
    Down,
    Drained,
    Unsteady,
    DiskStalled,
    DiskFull,
    Architecture(String),
    Constraint(String),
    DataElsewhere(NodeId),
    /// `media (/mnt/media)`: it names this disk, which is not there.
    DiskAbsent(String),
    /// Another node names a disk where the service binds a path; this one has none.
    DiskElsewhere {
        path: String,
        holder: NodeId,
    },
    PortTaken(u16),
    CountPerNode(u32),
    Cpu {
        missing_millis: u64,
    },
    Memory {
        missing_bytes: u64,
    },
}

/// What is promised on each node, while one plan adds to it.
pub struct Ledger<'a> {
    state: &'a State,
    heard: &'a HeardNodes,
    now: Timestamp,
    promised: BTreeMap<NodeId, Promise>,
    data_nodes: BTreeMap<(AppName, String), NodeId>,
}

#[derive(Clone, Debug, Default)]
struct Promise {
    cpu_millis: u64,
    memory_bytes: u64,
    /// Memory of instances that have not started yet: not in what the node last said is available.
    unstarted_bytes: u64,
    per_service: BTreeMap<ServiceId, u32>,
    host_ports: Vec<(Protocol, u16)>,
}

pub fn plan_assignments(state: &State, heard: &HeardNodes, now: Timestamp, steps: &mut Vec<PlanStep>) {
    let mut ledger = Ledger::new(state, heard, now);
    let pending = state.instances.rows().filter(|row| row.node.is_none() && row.desired == Desired::Run);
    for instance in pending {
        let Some(service) = state.services.find(&instance.service) else { continue };
        let must_wait = service.is_removed
            || reasons::waits_for(state, service).is_some()
            || is_data_in_use(state, service);
        if must_wait {
            continue;
        }
        if let Some(node) = ledger.choose(service, instance) {
            ledger.promise(node.id, service, instance, true);
            steps.push(PlanStep::Assign {
                instance: instance.id,
                instance_version: instance.version,
                node: node.id,
                node_version: node.version,
            });
        }
    }
}

/// Whether a removed service of the same name, which had the same data, still has something running.
fn is_data_in_use(state: &State, service: &Service) -> bool {
    let has_data = service.spec.volume_names().next().is_some();
    has_data
        && state.services_of(&service.app).any(|other| {
            other.is_removed
                && other.id != service.id
                && other.name == service.name
                && state.instances_of(other.id).next().is_some()
        })
}

impl<'a> Ledger<'a> {
    pub fn new(state: &'a State, heard: &'a HeardNodes, now: Timestamp) -> Ledger<'a> {
        let promised = BTreeMap::new();
        let mut ledger = Ledger { state, heard, now, promised, data_nodes: BTreeMap::new() };
        for instance in state.instances.rows() {
            let service = state.services.find(&instance.service);
            if let (Some(node), Some(service)) = (instance.node, service)
                && !instance.observed.phase.is_final()
            {
                ledger.promise(node, service, instance, false);
            }
        }
        ledger
    }

    fn promise(&mut self, node: NodeId, service: &Service, instance: &Instance, is_new: bool) {
        let need = self.need(service.spec_of(instance.spec_version));
        let promise = self.promised.entry(node).or_default();
        promise.cpu_millis += need.0;
        promise.memory_bytes += need.1;
        if !instance.observed.phase.is_running() {
            promise.unstarted_bytes += need.1;
        }
        *promise.per_service.entry(service.id).or_default() += 1;
        promise.host_ports.extend(host_ports(&service.spec));
        if is_new {
            for name in service.spec.volume_names() {
                self.data_nodes.insert((service.app.clone(), name.into()), node);
            }
        }
    }

    /// CPU and memory to reserve; what is not given counts as the cluster's default.
    fn need(&self, spec: &ServiceSpec) -> (u64, u64) {
        let settings = self.state.cluster_settings();
        let resources = &spec.resources;
        let limit = resources.memory_bytes_max.unwrap_or(u64::MAX);
        let memory = resources.reserved_memory_bytes.unwrap_or(settings.default_memory_bytes.min(limit));
        (resources.reserved_cpu_millis.unwrap_or(settings.default_cpu_millis), memory)
    }

    pub fn choose(&self, service: &Service, instance: &Instance) -> Option<&'a Node> {
        let spread = &service.spec.placement.spread_over;
        self.state.nodes.rows().filter(|node| self.obstacle(node, service, instance).is_none()).min_by_key(
            |node| {
                let promise = self.promised.get(&node.id);
                let same =
                    promise.and_then(|promise| promise.per_service.get(&service.id)).copied().unwrap_or(0);
                let same_label: Vec<u32> =
                    spread.iter().map(|key| self.count_by_label(service, key, node)).collect();
                let reserved = promise.map_or(0, |promise| promise.memory_bytes);
                // Thousandths of the node's memory, so that boards of different size fill alike.
                let filled = reserved.saturating_mul(1000) / node.size.memory_bytes.max(1);
                (same_label, !node.troubles.is_empty(), same, filled, node.id)
            },
        )
    }

    fn count_by_label(&self, service: &Service, key: &str, node: &Node) -> u32 {
        let value = node.labels.get(key);
        self.promised
            .iter()
            .filter(|(id, _)| self.state.nodes.find(id).is_some_and(|other| other.labels.get(key) == value))
            .filter_map(|(_, promise)| promise.per_service.get(&service.id))
            .sum()
    }

    /// The first thing that keeps an instance from a node.
    pub fn obstacle(&self, node: &Node, service: &Service, instance: &Instance) -> Option<Obstacle> {
        let spec = service.spec_of(instance.spec_version);
        if let Some(obstacle) = self.standing_obstacle(node) {
            return Some(obstacle);
        }
        if service.spec.is_global && instance.slot != u32::from(node.number) {
            return Some(Obstacle::Constraint(format!("slot {} is another node's", instance.slot)));
        }
        if let Some(wanted) = foreign_architecture(self.state, node, spec) {
            return Some(Obstacle::Architecture(wanted));
        }
        if let Some(constraint) =
            spec.placement.constraints.iter().find(|constraint| !holds(node, constraint))
        {
            return Some(Obstacle::Constraint(constraint.to_string()));
        }
        if let Some(holder) = self.data_nodes(service).into_iter().find(|holder| *holder != node.id) {
            return Some(Obstacle::DataElsewhere(holder));
        }
        if let Some(obstacle) = self.disk_obstacle(node, service, spec) {
            return Some(obstacle);
        }
        self.shortage(node, service, spec)
    }

    fn standing_obstacle(&self, node: &Node) -> Option<Obstacle> {
        let heard = self.heard.get(&node.id).copied().unwrap_or_default();
        if node.condition == Condition::Down || node.stopped_at.is_some() || node.is_ending {
            Some(Obstacle::Down)
        } else if node.is_drained || node.is_leaving {
            Some(Obstacle::Drained)
        } else if is_unsteady(node, self.now) {
            Some(Obstacle::Unsteady)
        } else if heard.is_disk_stalled {
            Some(Obstacle::DiskStalled)
        } else if heard.is_disk_full {
            Some(Obstacle::DiskFull)
        } else {
            None
        }
    }

    /// A disk that it binds is absent, or is another node's: there the path would be an empty folder.
    fn disk_obstacle(&self, node: &Node, service: &Service, spec: &ServiceSpec) -> Option<Obstacle> {
        if let Some(disk) = disks::absent_disk_of(node, self.heard, spec) {
            return Some(Obstacle::DiskAbsent(disk.to_string()));
        }
        // A global service's instance is for its node, whatever that has.
        let path =
            spec.host_paths().find(|path| !service.spec.is_global && !disks::names_disk_at(node, path))?;
        let may_take = |other: &&Node| !other.is_leaving && satisfies(self.state, other, spec);
        let mut others = self.state.nodes.rows().filter(may_take);
        let holder = others.find(|other| disks::names_disk_at(other, path))?.id;
        Some(Obstacle::DiskElsewhere { path: path.into(), holder })
    }

    /// Where its volumes lie, also by what this plan has decided.
    fn data_nodes(&self, service: &Service) -> Vec<NodeId> {
        let mut nodes = self.state.data_nodes(service);
        nodes.extend(
            service
                .spec
                .volume_names()
                .filter_map(|name| self.data_nodes.get(&(service.app.clone(), name.to_string())).copied()),
        );
        nodes
    }

    fn shortage(&self, node: &Node, service: &Service, spec: &ServiceSpec) -> Option<Obstacle> {
        let nothing = Promise::default();
        let promise = self.promised.get(&node.id).unwrap_or(&nothing);
        let taken = host_ports(spec).find(|port| promise.host_ports.contains(port));
        if let Some((_, port)) = taken {
            return Some(Obstacle::PortTaken(port));
        }
        let count = promise.per_service.get(&service.id).copied().unwrap_or(0);
        if let Some(max) = spec.placement.instances_per_node_max.filter(|max| count >= *max) {
            return Some(Obstacle::CountPerNode(max));
        }
        let (cpu_millis, memory_bytes) = self.need(spec);
        let cpu_wanted = promise.cpu_millis + cpu_millis;
        if cpu_wanted > node.size.cpu_millis {
            return Some(Obstacle::Cpu { missing_millis: cpu_wanted - node.size.cpu_millis });
        }
        let memory_wanted = promise.memory_bytes + memory_bytes;
        if memory_wanted > node.size.memory_bytes {
            return Some(Obstacle::Memory { missing_bytes: memory_wanted - node.size.memory_bytes });
        }
        // Only what was heard counts; a node not heard yet is judged by its reservations.
        let available =
            self.heard.get(&node.id).map(|heard| heard.memory_available_bytes).filter(|bytes| *bytes > 0);
        let wanted_now = promise.unstarted_bytes + memory_bytes;
        available
            .filter(|available| wanted_now > *available)
            .map(|available| Obstacle::Memory { missing_bytes: wanted_now - available })
    }
}

fn host_ports(spec: &ServiceSpec) -> impl Iterator<Item = (Protocol, u16)> {
    spec.ports
        .iter()
        .filter(|port| port.is_host_mode)
        .filter_map(|port| port.published.map(|published| (port.protocol, published)))
}

/// The third loss in 10 minutes keeps a node free of placements for 1 to 30 minutes, doubling with each.
fn is_unsteady(node: &Node, now: Timestamp) -> bool {
    let [first, .., last] = node.losses.as_slice() else { return false };
    let spread_ms = last.since_ms(*first);
    if node.losses.len() < 3 || spread_ms > 600_000 {
        return false;
    }
    // The closer together the losses were, the longer the wait.
    let minutes = (600_000 / spread_ms.max(20_000)).clamp(1, 30);
    now.since_ms(*last) < minutes * 60_000
}

/// Whether a global service belongs on a node: its image runs there, and its constraints hold.
pub fn satisfies(state: &State, node: &Node, spec: &ServiceSpec) -> bool {
    foreign_architecture(state, node, spec).is_none() && meets_constraints(node, spec)
}

pub fn meets_constraints(node: &Node, spec: &ServiceSpec) -> bool {
    spec.placement.constraints.iter().all(|constraint| holds(node, constraint))
}

/// The architectures the image has, if this node's is not among them.
pub fn foreign_architecture(state: &State, node: &Node, spec: &ServiceSpec) -> Option<String> {
    let artifact = state.artifacts.find(spec.image.digest.as_ref()?)?;
    (!artifact.runs_on(node.architecture)).then(|| artifact.platform_names())
}

fn holds(node: &Node, constraint: &Constraint) -> bool {
    let is_equal = match &constraint.subject {
        ConstraintSubject::NodeName => node.name == constraint.value,
        ConstraintSubject::NodeId => node.id.to_string() == constraint.value,
        ConstraintSubject::Architecture => architecture_is(node.architecture, &constraint.value),
        ConstraintSubject::Label(key) => node.labels.get(key).is_some_and(|value| *value == constraint.value),
    };
    is_equal == constraint.must_equal
}

/// As OCI (`arm64`) and as `uname -m` (`aarch64`) write it.
fn architecture_is(architecture: Architecture, name: &str) -> bool {
    let machine = match architecture {
        Architecture::Amd64 => "x86_64",
        Architecture::Arm64 => "aarch64",
        Architecture::Arm => "armv7l",
        Architecture::Riscv64 => "riscv64",
    };
    name == architecture.oci_name() || name == machine
}
