//! What the cluster's names are, indexed once for many questions.
//!
//! A `ZoneTable`, made by the agent from the state → a `Zone`. Names that stand for several services keep all of them,
//! in the table's order: which one an asker means is decided in `resolve`.

use crate::model::{Protocol, UlaPrefix};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

/// The domain of the cluster's own names.
pub const DOMAIN: &str = "tinydc.internal";

/// Who asks from one address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Client {
    pub app: String,
    /// Keys of networks: opaque, unique over the cluster.
    pub networks: BTreeSet<String>,
    /// All its networks are internal: a question sent upstream would be a way out.
    pub is_inner: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// As the instance's number is shown.
    pub slot: u32,
    pub address: Ipv4Addr,
    /// Whether traffic may go to it now.
    pub is_serving: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePort {
    pub protocol: Protocol,
    pub port: u16,
    pub name: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ServiceNames {
    pub app: String,
    pub service: String,
    /// Without one, the service's own name stands for its serving endpoints.
    pub vip: Option<Ipv4Addr>,
    /// Network key → the aliases there.
    pub networks: BTreeMap<String, Vec<String>>,
    pub container_name: Option<String>,
    pub endpoints: Vec<Endpoint>,
    pub ports: Vec<ServicePort>,
}

/// Addresses that start with the `bits` first bits of `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub address: Ipv4Addr,
    pub bits: u8,
}

impl Range {
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let shift = 32 - u32::from(self.bits.min(32));
        let cut = |address: Ipv4Addr| u64::from(u32::from(address)) >> shift;
        cut(self.address) == cut(address)
    }
}

/// What the agent wants to be known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ZoneTable {
    /// The containers of this node, by their own address.
    pub clients: BTreeMap<Ipv4Addr, Client>,
    pub services: Vec<ServiceNames>,
    /// Of containers and of VIPs: reverse names there are ours, and an asker from there is a container.
    pub ranges: Vec<Range>,
    /// This node's address on its bridge: what its own processes ask from.
    pub bridge: Ipv4Addr,
    /// Each address has one of IPv6 there, too.
    pub ula_prefix: Option<UlaPrefix>,
}

impl Default for ZoneTable {
    fn default() -> ZoneTable {
        ZoneTable {
            clients: BTreeMap::new(),
            services: Vec::new(),
            ranges: Vec::new(),
            bridge: Ipv4Addr::UNSPECIFIED,
            ula_prefix: None,
        }
    }
}

/// One name of one service.
#[derive(Clone, Debug)]
pub(super) struct Named {
    pub service: usize,
    /// Where an alias holds; a service's own name holds on all its networks.
    pub network: Option<String>,
    pub is_service_name: bool,
}

/// What has an address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Owner {
    Vip(usize),
    Endpoint(usize, u32),
}

#[derive(Debug, Default)]
pub struct Zone {
    pub(super) table: ZoneTable,
    /// `web` → who is called so, in any app.
    pub(super) by_name: BTreeMap<String, Vec<Named>>,
    /// `web.shop` → who is called `web` in the app `shop`.
    pub(super) by_qualified_name: BTreeMap<String, Vec<Named>>,
    pub(super) by_address: BTreeMap<Ipv4Addr, Owner>,
}

impl Zone {
    pub fn new(table: ZoneTable) -> Zone {
        let mut zone = Zone { table, ..Zone::default() };
        for index in 0..zone.table.services.len() {
            zone.add(index);
        }
        zone
    }

    fn add(&mut self, index: usize) {
        let service = &self.table.services[index];
        let mut names = vec![(service.service.clone(), None, true)];
        names.extend(service.container_name.iter().map(|name| (name.clone(), None, false)));
        for (network, aliases) in &service.networks {
            names.extend(aliases.iter().map(|alias| (alias.clone(), Some(network.clone()), false)));
        }
        for (name, network, is_service_name) in names {
            let name = name.to_ascii_lowercase();
            let named = Named { service: index, network, is_service_name };
            let qualified = format!("{name}.{}", service.app.to_ascii_lowercase());
            self.by_qualified_name.entry(qualified).or_default().push(named.clone());
            self.by_name.entry(name).or_default().push(named);
        }
        self.by_address.extend(service.vip.map(|vip| (vip, Owner::Vip(index))));
        for endpoint in &service.endpoints {
            self.by_address.insert(endpoint.address, Owner::Endpoint(index, endpoint.slot));
        }
    }

    pub fn table(&self) -> &ZoneTable {
        &self.table
    }
}

impl ServiceNames {
    /// `web.shop.tinydc.internal`
    pub(super) fn full_name(&self) -> String {
        format!("{}.{}.{DOMAIN}", self.service, self.app).to_ascii_lowercase()
    }
}
