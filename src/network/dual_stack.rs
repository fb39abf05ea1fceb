//! IPv6 beside IPv4: of each thing that the cluster's network has, the same for the addresses that embed those of IPv4.
//!
//! Input: containers, ways and the wanted table, as IPv4 has them. Output: addresses, routes and a second table in the
//! kernel. Who is where is known, and written: nothing is discovered, announced or checked for duplicates. Nodes need no
//! IPv6 of their own: between them it goes in tunnels.

use super::link::{self, Route};
use super::netlink::Socket;
use super::nft::{self, Family, Neighbours, Shape, Table};
use super::overlay::{self, Way};
use super::sysctl::{self, Before};
use super::{BRIDGE, Network, NetworkConfig, NetworkError, Wanted, kernel};
use crate::linux::netns;
use crate::model::{Gather, UlaPrefix};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tracing::warn;

const SETTINGS: &str = "net/ipv6/";
const SINGLE: u8 = 128;

pub struct DualStack {
    config: NetworkConfig,
    gateway: Ipv6Addr,
    table: Mutex<Table>,
    ways: Mutex<BTreeMap<u8, Way>>,
}

impl DualStack {
    /// Nothing of it is in the kernel yet, or all that an earlier run has left.
    pub fn new(config: &NetworkConfig, shape: &Shape) -> DualStack {
        let prefix = config.ula_prefix;
        DualStack {
            config: config.clone(),
            gateway: prefix.embed(shape.node.0),
            table: Mutex::new(Table::new(Family::Ipv6(prefix), shape.clone())),
            ways: Mutex::default(),
        }
    }

    /// Whether this machine could have it; nothing is changed.
    pub fn probe(&self) -> Result<(), NetworkError> {
        if !sysctl::knows_ipv6() {
            return Err(kernel("this kernel has no IPv6")(io::ErrorKind::Unsupported.into()));
        }
        let netfilter = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        let table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.probe(&netfilter).map_err(kernel(
            "this kernel lacks a part of nf_tables for IPv6: it needs nft_fib_ipv6 and nft_reject_ipv6",
        ))
    }

    /// Makes what is missing, for the containers that are there, too.
    pub fn open(
        &self,
        ways: &BTreeMap<u8, Way>,
        wanted: &Wanted,
        neighbours: Neighbours,
    ) -> Result<(), NetworkError> {
        self.probe()?;
        let netfilter = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        self.set_neighbours(&netfilter, neighbours);
        // Nothing passes before there are rules.
        self.apply(&netfilter, wanted)?;
        sysctl::forward_ipv6(&Before::at(&self.config.run_dir))?;
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        let bridge = link::index_of(BRIDGE).map_err(kernel(format!("find {BRIDGE}")))?;
        sysctl::take_no_router(BRIDGE)?;
        sysctl::switch_ipv6(BRIDGE, true)?;
        let gateway = self.gateway;
        link::add_address(&socket, bridge, gateway, SINGLE)
            .map_err(kernel(format!("give {BRIDGE} the address {gateway}")))?;
        link::add_route(&socket, &self.vip_route(bridge))
            .map_err(kernel("route to the services' IPv6 addresses"))?;
        link::change_barrier(&socket, self.containers(), true)
            .map_err(kernel("keep containers' IPv6 traffic off the default route"))?;
        // One that is out of order costs the others nothing: ways are written again before long, a container is connected
        // anew when it is next started.
        if let Err(error) = self.follow(ways) {
            warn!(%error, "reach other nodes' containers by IPv6");
        }
        for (container, address) in self.addresses(&socket) {
            if let Err(error) = self.connect(&container, address, &self.netns_path(&container)) {
                warn!(
                    error = &error as &dyn std::error::Error,
                    container, "give a container that runs its IPv6 address"
                );
            }
        }
        Ok(())
    }

    fn vip_route(&self, bridge: u32) -> Route<Ipv6Addr> {
        let to = Some((self.config.ula_prefix.embed(self.config.vip_range), UlaPrefix::length(16)));
        Route { to, via: None, link: bridge, is_on_link: true }
    }

    fn containers(&self) -> (Ipv6Addr, u8) {
        (self.config.ula_prefix.embed(self.config.container_range), UlaPrefix::length(16))
    }

    fn netns_path(&self, container: &str) -> PathBuf {
        self.config.run_dir.join("netns").join(container)
    }

    /// Containers here, by name, with the addresses that this node has given them: what they say themselves is not asked.
    fn addresses(&self, socket: &Socket) -> Vec<(String, Ipv4Addr)> {
        let routes = link::routes::<Ipv4Addr>(socket).unwrap_or_default();
        let by_link: BTreeMap<u32, Ipv4Addr> = routes
            .iter()
            .filter_map(|route| route.to.filter(|(_, length)| *length == 32).map(|(to, _)| (route.link, to)))
            .gather();
        let entries = fs::read_dir(self.config.run_dir.join("netns")).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                let address = by_link.get(&link::index_of(&Network::veth_name(&name)).ok()?)?;
                Some((name, *address))
            })
            .collect()
    }

    /// Gives a container that is connected by IPv4 its address.
    pub fn connect(&self, container: &str, address: Ipv4Addr, path: &Path) -> Result<(), NetworkError> {
        let name = Network::veth_name(container);
        sysctl::switch_ipv6(&name, true)?;
        let (gateway, own) = (self.gateway, self.config.ula_prefix.embed(address));
        let outside = link::index_of(&name).and_then(|index| Ok((index, link::hardware_of(index)?)));
        let (outer, outer_hardware) = outside.map_err(kernel(format!("find {name}")))?;
        let inner_hardware = netns::in_netns(path, move || {
            let socket = Socket::route()?;
            let index = link::index_of("eth0")?;
            link::take_ipv6(&socket, index)?;
            sysctl::switch_ipv6("eth0", true).map_err(io::Error::other)?;
            link::add_address(&socket, index, own, SINGLE)?;
            let to_gateway = Route { to: Some((gateway, SINGLE)), via: None, link: index, is_on_link: true };
            link::add_route(&socket, &to_gateway)?;
            link::put_neighbour(&socket, index, gateway, outer_hardware)?;
            link::add_route(
                &socket,
                &Route { to: None, via: Some(gateway), link: index, is_on_link: false },
            )?;
            link::hardware_of(index)
        })
        .map_err(kernel(format!("give {container} the address {own}")))?;
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        let to_container = Route { to: Some((own, SINGLE)), via: None, link: outer, is_on_link: true };
        link::put_neighbour(&socket, outer, own, inner_hardware)
            .and_then(|()| link::add_route(&socket, &to_container))
            .map_err(kernel(format!("route to {own}")))
    }

    pub fn apply(&self, netfilter: &Socket, wanted: &Wanted) -> Result<(), NetworkError> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.apply(netfilter, wanted).map_err(kernel(
            "change the nftables table of IPv6; the kernel needs nf_tables with nft_fib_ipv6 and nft_reject_ipv6",
        ))
    }

    pub fn set_neighbours(&self, netfilter: &Socket, neighbours: Neighbours) {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).set_neighbours(netfilter, neighbours);
    }

    /// Brings the ways to the other nodes to those of IPv4. What is there already is written again: the two share a
    /// tunnel, and one may have taken away what the other needs.
    pub fn follow(&self, wanted: &BTreeMap<u8, Way>) -> io::Result<()> {
        let socket = Socket::route()?;
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        let (numbers, prefix) = (self.config.numbers(), self.config.ula_prefix);
        let gone: Vec<(u8, Way)> = ways
            .iter()
            .filter(|(number, _)| !wanted.contains_key(number))
            .map(|(number, way)| (*number, *way))
            .collect();
        for (number, way) in gone {
            overlay::drop_embedded_way(&socket, &numbers, prefix, number, way);
            ways.remove(&number);
        }
        let mut outcome = Ok(());
        for (number, way) in wanted {
            // Of an earlier run's way it is not known where it leads: it is written when that is.
            if way.address().is_unspecified() {
                continue;
            }
            match overlay::set_embedded_way(&socket, &numbers, prefix, *number, *way) {
                Ok(()) => {
                    ways.insert(*number, *way);
                }
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }

    /// Leaves only a rule that containers send nothing by IPv6. What is gone already need not be taken away, and what can't
    /// be taken away keeps nothing else here: the first error is told.
    pub fn close(&self) -> Result<(), NetworkError> {
        if !sysctl::knows_ipv6() {
            return Ok(());
        }
        let restored = Before::at(&self.config.run_dir)
            .restore(SETTINGS, super::foreign::is_forwarding_used(Family::Ipv6(self.config.ula_prefix)))
            .map_err(kernel("give the kernel's settings back"));
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        for (container, address) in self.addresses(&socket) {
            self.disconnect(&socket, &container, address);
        }
        let (numbers, prefix) = (self.config.numbers(), self.config.ula_prefix);
        for (number, way) in std::mem::take(&mut *self.ways.lock().unwrap_or_else(PoisonError::into_inner)) {
            overlay::drop_embedded_way(&socket, &numbers, prefix, number, way);
        }
        // Also those of ways and containers that an earlier run knew.
        for route in link::routes::<Ipv6Addr>(&socket).unwrap_or_default() {
            let _ = link::delete_route(&socket, &route);
        }
        let _ = link::change_barrier(&socket, self.containers(), false);
        if let Ok(bridge) = link::index_of(BRIDGE) {
            let _ = link::delete_address(&socket, bridge, self.gateway, SINGLE);
        }
        // Last: nothing passes without rules.
        restored.and(self.guard())
    }

    fn guard(&self) -> Result<(), NetworkError> {
        self.change_table(nft::table::guard, "keep containers' IPv6 off this node")
    }

    /// For as long as containers have no addresses: they may make up some.
    pub fn keep_guard(&self) -> Result<(), NetworkError> {
        self.change_table(nft::table::keep_guard, "keep containers' IPv6 off this node")
    }

    pub fn delete_table(&self) -> Result<(), NetworkError> {
        self.change_table(nft::table::delete_table, "delete the nftables table of IPv6")
    }

    fn change_table(
        &self,
        change: fn(&Socket, Family) -> io::Result<()>,
        step: &'static str,
    ) -> Result<(), NetworkError> {
        if !sysctl::knows_ipv6() {
            return Ok(());
        }
        let netfilter = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        change(&netfilter, Family::Ipv6(self.config.ula_prefix)).map_err(kernel(step))
    }

    fn disconnect(&self, socket: &Socket, container: &str, address: Ipv4Addr) {
        let own = self.config.ula_prefix.embed(address);
        // Takes the addresses of the link, and the routes.
        let _ = netns::in_netns(&self.netns_path(container), || {
            sysctl::switch_ipv6("eth0", false).map_err(io::Error::other)
        });
        let index = link::index_of(&Network::veth_name(container));
        let _ = index.and_then(|index| link::delete_neighbour(socket, index, own, link::hardware_of(index)?));
    }
}
