//! Decides what the name server of this node knows. Pure.
//!
//! Input: the state and what of it serves. Output: the table of names. A name is known to those who share a network with
//! it; a service goes by its own name, its aliases there, and its `container_name`.

use super::wiring::{self, Placed, View};
use crate::model::*;
use crate::network::dns::{Client, Endpoint, Range, ServiceNames, ServicePort, ZoneTable};
use crate::state::Service;
use std::net::Ipv4Addr;

pub fn table(view: &View<'_>, bridge: Ipv4Addr) -> ZoneTable {
    let placed = wiring::placed(view);
    let internal = wiring::internal_networks(view.state);
    let clients = placed
        .iter()
        .filter(|one| one.instance.node == Some(view.own))
        .map(|one| {
            let app = one.service.app.to_string();
            let networks = wiring::networks(&one.service.app, one.spec);
            let is_inner = wiring::is_inner(&networks, &internal);
            (one.address, Client { app, networks, is_inner })
        })
        .gather();
    let services = view
        .state
        .services
        .rows()
        .filter(|service| !service.is_removed)
        .map(|service| names_of(service, &placed))
        .collect();
    let ranges = view.state.cluster().map(|cluster| [cluster.container_range, cluster.vip_range]);
    let ranges = ranges.into_iter().flatten().map(|address| Range { address, bits: 16 }).collect();
    ZoneTable { clients, services, ranges, bridge, ula_prefix: view.state.ula_prefix() }
}

fn names_of(service: &Service, placed: &[Placed<'_>]) -> ServiceNames {
    let spec = &service.spec;
    let networks = wiring::networks(&service.app, spec).into_iter().map(|key| {
        let aliases = spec.networks.get(&key).map(|network| network.aliases.iter().cloned().collect());
        (key, aliases.unwrap_or_default())
    });
    let own = placed.iter().filter(|one| one.service.id == service.id);
    let port = |port: &PortSpec| ServicePort { protocol: port.protocol, port: port.target, name: None };
    ServiceNames {
        app: service.app.to_string(),
        service: service.name.clone(),
        vip: Some(service.vip),
        networks: networks.gather(),
        container_name: spec.container_name.clone(),
        endpoints: own
            .filter(|one| one.instance.desired == Desired::Run)
            .map(|one| Endpoint {
                slot: one.instance.slot,
                address: one.address,
                is_serving: one.is_endpoint,
            })
            .collect(),
        ports: spec.ports.iter().map(port).collect(),
    }
}
