//! The state as the API shows it. Pure: state and live facts in, bodies out.

use super::wire::*;
use crate::agent::LiveInstance;
use crate::control::Status;
use crate::model::*;
use crate::planner;
use crate::state::{Service, State, TokenKind, Update};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

/// Live facts by instance, from whichever nodes answered.
pub type Live = BTreeMap<InstanceId, LiveInstance>;

pub struct View<'a> {
    pub state: &'a State,
    pub status: &'a Status,
    pub live: &'a Live,
    /// Of nodes on the LAN.
    pub addresses: &'a BTreeMap<NodeId, IpAddr>,
    pub data_dir: &'a Path,
}

impl View<'_> {
    pub fn node(&self, node: &Node) -> NodeBody {
        let settings = self.state.cluster_settings();
        let mut reserved = (0, 0);
        let mut instances = 0;
        for instance in self.state.instances_on(node.id) {
            let Some(service) = self.state.services.find(&instance.service) else { continue };
            let resources = &service.spec_of(instance.spec_version).resources;
            reserved.0 += resources.reserved_cpu_millis.unwrap_or(settings.default_cpu_millis);
            let limit = resources.memory_bytes_max.unwrap_or(u64::MAX);
            reserved.1 += resources.reserved_memory_bytes.unwrap_or(settings.default_memory_bytes.min(limit));
            instances += 1;
        }
        let heard = self.status.heard.get(&node.id);
        let health = heard.map(|heard| heard.health).unwrap_or_default();
        NodeBody {
            id: node.id.to_string(),
            name: node.name.clone(),
            state: node_state(node).into(),
            role: self.role(node.id).into(),
            address: self.addresses.get(&node.id).map(|address| address.to_string()),
            architecture: node.architecture.to_string(),
            cpu_millis: node.size.cpu_millis,
            memory_bytes: node.size.memory_bytes,
            memory_available_bytes: heard.map(|heard| heard.memory_available_bytes),
            reserved_cpu_millis: reserved.0,
            reserved_memory_bytes: reserved.1,
            instances,
            labels: node.labels.clone(),
            software: node.software.clone(),
            silent_ms: self.status.silent_ms.get(&node.id).copied(),
            joined_at: node.joined_at.to_string(),
            only_copies: self.state.only_copies(node.id),
            troubles: health.troubles.iter().map(|trouble| trouble.code().into()).collect(),
            temperature_celsius: health.temperature_celsius,
            disks: self.disks(node),
            disk: health.disk.map(|disk| DiskBody {
                size_bytes: disk.disk_bytes,
                written_today_bytes: disk.written_today_bytes,
                written_bytes: disk.written_bytes,
                days_left: disk.days_left(settings.disk_endurance),
            }),
        }
    }

    fn disks(&self, node: &Node) -> Vec<NodeDiskBody> {
        let absent = planner::absent_disks(node, &self.status.heard);
        let disks = node.disks.iter().enumerate();
        disks
            .map(|(index, disk)| NodeDiskBody {
                label: disk.label.clone(),
                mount_point: disk.target.clone(),
                is_absent: absent.has(index),
            })
            .collect()
    }

    fn role(&self, id: NodeId) -> &'static str {
        if self.status.leader == Some(id) {
            "leader"
        } else if self.status.voters.contains(&id) {
            "voter"
        } else {
            "learner"
        }
    }

    pub fn instance(&self, instance: &Instance) -> InstanceBody {
        let live = self.live.get(&instance.id);
        let observed = &instance.observed;
        let now = self.status.cluster_time;
        let heard = &self.status.heard;
        let reason = planner::pending_reason(self.state, heard, instance, now)
            .or_else(|| self.lost_reason(instance))
            .or_else(|| planner::disk_reason(self.state, heard, instance));
        let exit = observed.exit.as_ref().map(|exit| exit.to_string());
        InstanceBody {
            name: self.state.instance_name(instance),
            id: instance.id.to_string(),
            slot: instance.slot,
            node: instance.node.map(|node| self.state.node_name(node)),
            address: instance.address.map(|address| address.to_string()),
            phase: phase_name(instance, live).into(),
            desired: match instance.desired {
                Desired::Run => "run".into(),
                Desired::Stop => "stop".into(),
                Desired::Remove => "remove".into(),
            },
            spec_version: instance.spec_version,
            since: observed.since.to_string(),
            since_ms: now.since_ms(observed.since),
            reason,
            last_exit: live.and_then(|live| live.last_exit.clone()).or(exit),
            restarts: live.map(|live| live.restarts),
            pid: live.and_then(|live| live.pid),
            memory_bytes: live.and_then(|live| live.memory_bytes),
            progress: live.and_then(|live| live.progress.clone()),
        }
    }

    /// Why an instance with a node does not run, where the node itself is the reason.
    fn lost_reason(&self, instance: &Instance) -> Option<String> {
        let node = self.state.nodes.find(&instance.node?)?;
        let is_down = node.condition == Condition::Down;
        (is_down && instance.desired == Desired::Run)
            .then(|| format!("{} is down and holds its data", node.name))
    }

    pub fn service(&self, service: &Service) -> ServiceBody {
        let instances: Vec<&Instance> = self.state.instances_of(service.id).collect();
        let wanted_now = |row: &&&Instance| row.desired == Desired::Run;
        let has_check = matches!(&service.spec.health, Some(health) if health.test != HealthTest::Disabled);
        let is_settled = |row: &&&Instance| match row.observed.phase {
            Phase::Healthy | Phase::Completed => true,
            Phase::Running => !has_check,
            _ => false,
        };
        let (update, update_reason, failed_instance) = match &service.update {
            Update::Done => ("done", None, None),
            Update::Rolling { .. } => ("rolling", None, None),
            Update::Failed { slot, reason, .. } => {
                let name = format!("{}/{}.{slot}", service.app, service.name);
                ("failed", Some(reason.clone()), Some(name))
            }
        };
        let wanted = match service.spec.is_global {
            true => instances.iter().filter(wanted_now).count(),
            false => service.spec.replicas as usize,
        };
        let current = |row: &&&Instance| row.spec_version == service.spec_version;
        ServiceBody {
            app: service.app.to_string(),
            name: service.name.clone(),
            image: service.spec.image.reference.clone(),
            image_digest: service.spec.image.digest.clone(),
            wanted: if service.is_removed { 0 } else { wanted },
            running: instances
                .iter()
                .filter(wanted_now)
                .filter(|row| row.observed.phase.is_running())
                .count(),
            settled: instances.iter().filter(wanted_now).filter(current).filter(is_settled).count(),
            spec_version: service.spec_version,
            update: update.into(),
            update_reason,
            failed_instance,
            data: self.data_sentence(service),
            left_out: crate::planner::left_out(self.state, service),
            ports: service.spec.ports.iter().map(port_text).collect(),
            addresses: self.open_addresses(service),
            instances: instances.iter().map(|row| self.instance(row)).collect(),
        }
    }

    fn data_sentence(&self, service: &Service) -> Option<String> {
        let node = self.state.node_name(self.state.data_node(service)?);
        Some(format!("data on {node}; if {node} dies it waits"))
    }

    /// Where a person can open it: on the nodes that run it.
    fn open_addresses(&self, service: &Service) -> Vec<String> {
        let mut addresses = Vec::new();
        for port in &service.spec.ports {
            let Some(published) = port.published else { continue };
            let nodes: std::collections::BTreeSet<NodeId> = self
                .state
                .instances_of(service.id)
                .filter(|row| row.observed.phase.is_running() && row.desired == Desired::Run)
                .filter_map(|row| row.node)
                .gather();
            for node in nodes {
                let host = port.host_address.map(IpAddr::from).or_else(|| self.addresses.get(&node).copied());
                if let Some(host) = host {
                    addresses.push(match port.protocol {
                        Protocol::Tcp => format!("http://{host}:{published}"),
                        Protocol::Udp => format!("udp://{host}:{published}"),
                    });
                }
            }
        }
        addresses
    }

    pub fn app(&self, app: &crate::state::App) -> AppBody {
        let services: Vec<ServiceBody> = self
            .state
            .services_of(&app.name)
            .filter(|service| !service.is_removed)
            .map(|service| self.service(service))
            .collect();
        AppBody {
            name: app.name.to_string(),
            services: services.len(),
            instances_wanted: services.iter().map(|service| service.wanted).sum(),
            instances_running: services.iter().map(|service| service.running).sum(),
            revision: app.revision,
            deployed_at: app.deployed_at.to_string(),
            is_removed: app.is_removed,
            addresses: services.into_iter().flat_map(|service| service.addresses).collect(),
        }
    }

    pub fn volume(&self, volume: &crate::state::Volume) -> VolumeBody {
        let path = self.data_dir.join("volumes").join(volume.app.as_str()).join(&volume.name);
        VolumeBody {
            app: volume.app.to_string(),
            name: volume.name.clone(),
            node: volume.node.map(|node| self.state.node_name(node)),
            path: path.display().to_string(),
            directory: volume.directory.clone(),
            is_removed: volume.is_removed,
        }
    }

    pub fn image(&self, artifact: &Artifact) -> ImageBody {
        ImageBody {
            names: artifact.names.iter().cloned().collect(),
            digest: artifact.digest.clone(),
            bytes: artifact.bytes,
            platforms: artifact.platforms.keys().cloned().collect(),
            nodes: artifact.holders.iter().map(|id| self.state.node_name(*id)).collect(),
            part_nodes: artifact.part_holders.iter().map(|id| self.state.node_name(*id)).collect(),
            source: match artifact.kind {
                ArtifactKind::LoadedImage => "loaded".into(),
                _ => "registry".into(),
            },
        }
    }

    pub fn tokens(&self) -> Vec<TokenBody> {
        let now = self.status.cluster_time;
        let body = |token: &crate::state::Token| TokenBody {
            id: token.id.to_string(),
            kind: match &token.kind {
                TokenKind::Join { is_once: false } => "join".into(),
                TokenKind::Join { is_once: true } => "join once".into(),
                TokenKind::User { name, role } => format!("user {name} ({})", role.name()),
            },
            expires_at: token.expires_at.to_string(),
            is_expired: now > token.expires_at,
            is_used: token.used_by.is_some(),
        };
        self.state.tokens.rows().map(body).collect()
    }
}

fn node_state(node: &Node) -> &'static str {
    if node.is_leaving {
        "leaving"
    } else if node.condition == Condition::Down {
        "down"
    } else if node.stopped_at.is_some() {
        "stopped"
    } else if node.is_ending {
        "stopping"
    } else if node.is_drained {
        "drained"
    } else {
        "up"
    }
}

/// What the node says now where it says more than the log: preparing, restarting.
fn phase_name(instance: &Instance, live: Option<&LiveInstance>) -> &'static str {
    let phase = instance.observed.phase;
    match live {
        Some(live) if live.progress.is_some() && !live.is_running => Phase::Preparing.name(),
        Some(live) if phase.is_running() && !live.is_running => "restarting",
        _ => phase.name(),
    }
}

pub fn port_text(port: &PortSpec) -> String {
    let published = port.published.map(|port| port.to_string()).unwrap_or_default();
    let host = port.host_address.map(|address| format!("{address}:")).unwrap_or_default();
    format!("{host}{published}->{}/{}", port.target, port.protocol.name())
}
