//! The replicated state machine: the same commands in the same order give the same rows on every node.
//!
//! Input: committed log entries. Output: an outcome for whoever asked, and the rows that changed, which storage
//! writes in the transaction of its next append. The rows live in memory as typed, shared maps; a copy of the
//! whole state costs a few pointers, so readers get one and never wait.
//! Never: a clock, randomness, floats, hash maps, I/O.
//!
//! Invariants: a rejected command changes nothing (`a_rejected_command_changes_nothing`); applying a log gives
//! the state that its changed rows give (`changes_rebuild_the_state`).

mod addresses;
mod apply;
mod certificates;
pub mod command;
mod deploy;
mod members;
mod plan;
mod report;
pub mod rows;
mod secrets;
pub mod snapshot;
mod table;
#[cfg(test)]
pub mod tests;

/// For tests of the layers above.
#[cfg(test)]
pub use tests as testing;

pub use command::{
    Command, Envelope, InstanceReport, JoinNode, KeptVolume, NodeReport, Origin, Outcome, PlanStep,
    Rejection, Reply, RequestMark,
};
pub use rows::{
    AcmeAccount, App, Certificate, CertificateIssuer, Challenge, Cluster, Counters, Event, FloatingAddress,
    IssuedCertificate, Meta, Role, Secret, Service, ServingAuthority, StoredOutcome, Token, TokenKind,
    Trouble, Update, User, Volume, VolumeKey,
};
pub use table::{RowChange, RowError, Table};

use crate::model::{
    AppName, Artifact, Digest, Instance, InstanceId, Node, NodeId, PublicKey, SecretName, ServiceId,
    Settings, Timestamp, TokenId, UlaPrefix,
};
use std::net::Ipv4Addr;

/// Declares the state's tables once: the struct, and what is done with every table.
macro_rules! tables {
    ($($(#[$doc:meta])* $kind:literal $name:ident: $key:ty => $row:ty,)*) => {
        /// All rows, as of one applied index.
        #[derive(Clone, Debug, Default, PartialEq)]
        pub struct State {
            $($(#[$doc])* pub $name: Table<$key, $row>,)*
        }

        impl State {
            /// The rows changed since the last call, encoded. Order: table, then key.
            pub fn take_changes(&mut self) -> Vec<RowChange> {
                let mut changes = Vec::new();
                $(self.$name.take_changes($kind, &mut changes);)*
                changes
            }

            /// Puts one encoded row in place, as it comes from disk or a snapshot.
            pub fn load_row(&mut self, kind: u8, key: &[u8], body: &[u8]) -> Result<(), RowError> {
                match kind {
                    $($kind => self.$name.load(key, body),)*
                    _ => Err(RowError::UnknownTable(kind)),
                }
            }

            /// Every row, encoded, in a fixed order: what a snapshot and a digest are made of.
            pub fn for_each_row(&self, visit: &mut dyn FnMut(u8, &[u8], &[u8])) {
                $(self.$name.for_each($kind, visit);)*
            }

            /// What all rows take, encoded.
            pub fn bytes(&self) -> usize {
                0 $(+ self.$name.bytes())*
            }
        }
    };
}

tables! {
    /// One row: the cluster's clock and its counters. Small, since every command changes it.
    1 meta: () => Meta,
    /// One row.
    2 settings: () => Settings,
    3 nodes: NodeId => Node,
    4 apps: AppName => App,
    5 services: ServiceId => Service,
    6 instances: InstanceId => Instance,
    7 volumes: VolumeKey => Volume,
    8 artifacts: Digest => Artifact,
    9 tokens: TokenId => Token,
    10 users: String => User,
    /// By log index, so that a new one touches the same page as the one before it.
    11 outcomes: u64 => StoredOutcome,
    12 events: u64 => Event,
    /// Keys of nodes that were removed: their certificates never end, so they are refused by name.
    13 removed_keys: PublicKey => Timestamp,
    /// One row: what stays as it was founded.
    14 identity: () => Cluster,
    /// Floating, on the LAN.
    15 addresses: Ipv4Addr => FloatingAddress,
    /// Sealed with the cluster key; opened only in the memory of those that need one.
    16 secrets: SecretName => Secret,
    /// Of the ingress, by host.
    17 certificates: String => Certificate,
    /// One row: the CA that signs for hosts.
    18 serving_authority: () => ServingAuthority,
    /// By the authority's directory.
    19 acme_accounts: String => AcmeAccount,
    /// What every node's ingress answers to an authority that asks for a proof, by token.
    20 challenges: String => Challenge,
}

impl State {
    pub fn cluster(&self) -> Option<&Cluster> {
        self.identity.find(&())
    }

    /// Cluster time of the last applied entry.
    pub fn time(&self) -> Timestamp {
        self.meta.find(&()).map(|meta| meta.time).unwrap_or_default()
    }

    pub fn cluster_settings(&self) -> Settings {
        self.settings.find(&()).cloned().unwrap_or_default()
    }

    /// Of the containers' and services' IPv6 addresses, where the cluster has them.
    pub fn ula_prefix(&self) -> Option<UlaPrefix> {
        self.cluster().filter(|_| self.cluster_settings().has_ipv6).map(|cluster| UlaPrefix::of(cluster.id))
    }

    pub fn node_by_name(&self, name: &str) -> Option<&Node> {
        self.nodes.rows().find(|node| node.name == name)
    }

    pub fn service_by_name(&self, app: &AppName, name: &str) -> Option<&Service> {
        self.services
            .rows()
            .find(|service| &service.app == app && service.name == name && !service.is_removed)
    }

    pub fn services_of<'a>(&'a self, app: &'a AppName) -> impl Iterator<Item = &'a Service> {
        self.services.rows().filter(move |service| &service.app == app)
    }

    pub fn instances_of(&self, service: ServiceId) -> impl Iterator<Item = &Instance> {
        self.instances.rows().filter(move |instance| instance.service == service)
    }

    pub fn instances_on(&self, node: NodeId) -> impl Iterator<Item = &Instance> {
        self.instances.rows().filter(move |instance| instance.node == Some(node))
    }

    /// All nodes that hold a volume which this service mounts; more than one and it can't run.
    pub fn data_nodes(&self, service: &Service) -> Vec<NodeId> {
        let pinned = |name: &str| {
            self.volumes.find(&VolumeKey::new(&service.app, name)).and_then(|volume| volume.node)
        };
        service.spec.volume_names().filter_map(pinned).collect()
    }

    /// The node that holds data this service mounts, if its volumes have been pinned.
    pub fn data_node(&self, service: &Service) -> Option<NodeId> {
        service.spec.volume_names().find_map(|name| {
            self.volumes.find(&VolumeKey::new(&service.app, name)).and_then(|volume| volume.node)
        })
    }

    /// What exists on one node alone: volumes, and images that no registry gives again.
    pub fn only_copies(&self, node: NodeId) -> Vec<String> {
        members::only_copies(self, node)
    }

    /// `APP/SERVICE.N`, or the bare id once its service is gone.
    pub fn instance_name(&self, instance: &Instance) -> String {
        match self.services.find(&instance.service) {
            Some(service) => format!("{}/{}.{}", service.app, service.name, instance.slot),
            None => instance.id.to_string(),
        }
    }

    pub fn node_name(&self, id: NodeId) -> String {
        self.nodes.find(&id).map_or_else(|| id.to_string(), |node| node.name.clone())
    }
}
