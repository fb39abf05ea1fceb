//! IPv6 beside IPv4: of each thing that the cluster's network has, the same for the addresses that embed those of IPv4.
//!
//! Input: containers, ways and the wanted table, as IPv4 has them. Output: addresses, routes and a second table in the
//! kernel. Who is where is known, and written: nothing is discovered, announced or checked for duplicates. Nodes need no
//! IPv6 of their own: between them it goes in tunnels.

use super::link::{self, Route};
use super::netlink::Socket;
use super::nft::{self, Family, Neighbours, Shape, Table};
use super::overlay::{self, Numbers, Way};
use super::sysctl::{self, Before};
use super::{BRIDGE, Network, NetworkConfig, NetworkError, Wanted, kernel};
use crate::linux::netns;
use crate::model::{Gather, UlaPrefix};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use tracing::warn;

const ROOT: &str = "/proc/sys/net/ipv6/conf";
const SETTINGS: &str = "net/ipv6/";
const SINGLE: u8 = 128;

/// An IPv4 prefix's length, of the addresses that embed its own.
const fn length(ipv4: u8) -> u8 {
    UlaPrefix::LENGTH + ipv4
}

pub fn knows_ipv6() -> bool {
    Path::new(ROOT).exists()
}

pub struct DualStack {
    prefix: UlaPrefix,
    numbers: Numbers,
    vips: Ipv4Addr,
    gateway: Ipv6Addr,
    table: Mutex<Table>,
    ways: Mutex<BTreeMap<u8, Way>>,
}

impl DualStack {
    /// Nothing of it is in the kernel yet, or all that an earlier run has left.
    pub fn new(config: &NetworkConfig, numbers: Numbers, shape: Shape) -> DualStack {
        let prefix = config.ula_prefix;
        DualStack {
            prefix,
            numbers,
            vips: config.vip_range,
            gateway: prefix.embed(shape.node.0),
            table: Mutex::new(Table::new(Family::Ipv6(prefix), shape)),
            ways: Mutex::default(),
        }
    }

    /// Makes what is missing, for the containers that are there, too.
    pub fn open(
        &self,
        config: &NetworkConfig,
        ways: &BTreeMap<u8, Way>,
        (wanted, neighbours): (&Wanted, Neighbours),
    ) -> Result<(), NetworkError> {
        if !knows_ipv6() {
            return Err(kernel("this kernel has no IPv6")(io::ErrorKind::Unsupported.into()));
        }
        let netfilter = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        self.set_neighbours(&netfilter, neighbours);
        // Nothing passes before there are rules.
        self.apply(&netfilter, wanted)?;
        forward(&Before::at(&config.run_dir))?;
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        let bridge = link::index_of(BRIDGE).map_err(kernel(format!("find {BRIDGE}")))?;
        allow_ipv6(BRIDGE)?;
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
        for (container, address) in containers(&socket, &config.run_dir) {
            let path = config.run_dir.join("netns").join(&container);
            if let Err(error) = self.connect(&container, address, &path) {
                warn!(
                    error = &error as &dyn std::error::Error,
                    container, "give a container that runs its IPv6 address"
                );
            }
        }
        Ok(())
    }

    fn vip_route(&self, bridge: u32) -> Route<Ipv6Addr> {
        let to = Some((self.prefix.embed(self.vips), length(16)));
        Route { to, via: None, link: bridge, is_on_link: true }
    }

    fn containers(&self) -> (Ipv6Addr, u8) {
        (self.prefix.embed(self.numbers.container_range), length(16))
    }

    /// Gives a container that is connected by IPv4 its address.
    pub fn connect(&self, container: &str, address: Ipv4Addr, path: &Path) -> Result<(), NetworkError> {
        let name = Network::veth_name(container);
        allow_ipv6(&name)?;
        let (gateway, own) = (self.gateway, self.prefix.embed(address));
        let outside = link::index_of(&name).and_then(|index| Ok((index, link::hardware_of(index)?)));
        let (outer, outer_hardware) = outside.map_err(kernel(format!("find {name}")))?;
        let inner_hardware = netns::in_netns(path, move || {
            let socket = Socket::route()?;
            let index = link::index_of("eth0")?;
            link::take_ipv6(&socket, index)?;
            allow_ipv6("eth0").map_err(io::Error::other)?;
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
        let gone: Vec<(u8, Way)> = ways
            .iter()
            .filter(|(number, _)| !wanted.contains_key(number))
            .map(|(number, way)| (*number, *way))
            .collect();
        for (number, way) in gone {
            overlay::drop_embedded_way(&socket, &self.numbers, self.prefix, number, way);
            ways.remove(&number);
        }
        let mut outcome = Ok(());
        for (number, way) in wanted {
            // Of an earlier run's way it is not known where it leads: it is written when that is.
            if way.address().is_unspecified() {
                continue;
            }
            let set = overlay::embedded_link(&socket, &self.numbers, *way)
                .and_then(|link| allow_ipv6(link).map_err(io::Error::other))
                .and_then(|()| overlay::set_embedded_way(&socket, &self.numbers, self.prefix, *number, *way));
            match set {
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
    pub fn close(&self, config: &NetworkConfig) -> Result<(), NetworkError> {
        if !knows_ipv6() {
            return Ok(());
        }
        let restored = Before::at(&config.run_dir)
            .restore(SETTINGS, super::foreign::is_forwarding_used(true))
            .map_err(kernel("give the kernel's settings back"));
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        for (container, address) in containers(&socket, &config.run_dir) {
            self.disconnect(&socket, &container, address, &config.run_dir.join("netns").join(&container));
        }
        let ways = std::mem::take(&mut *self.ways.lock().unwrap_or_else(PoisonError::into_inner));
        for (number, way) in ways {
            overlay::drop_embedded_way(&socket, &self.numbers, self.prefix, number, way);
        }
        let _ = link::change_barrier(&socket, self.containers(), false);
        if let Ok(bridge) = link::index_of(BRIDGE) {
            let _ = link::delete_route(&socket, &self.vip_route(bridge));
            let _ = link::delete_address(&socket, bridge, self.gateway, SINGLE);
        }
        // Last: nothing passes without rules.
        let netfilter = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        let guarded = nft::table::guard(&netfilter, Family::Ipv6(self.prefix))
            .map_err(kernel("keep containers' IPv6 off this node"));
        restored.and(guarded)
    }

    pub fn delete_table(&self) -> Result<(), NetworkError> {
        if !knows_ipv6() {
            return Ok(());
        }
        let netfilter = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        nft::table::delete_table(&netfilter, Family::Ipv6(self.prefix))
            .map_err(kernel("delete the nftables table of IPv6"))
    }

    fn disconnect(&self, socket: &Socket, container: &str, address: Ipv4Addr, path: &Path) {
        let own = self.prefix.embed(address);
        // Takes the addresses of the link, and the routes.
        let _ = netns::in_netns(path, || {
            sysctl::set("net/ipv6/conf/eth0/disable_ipv6", "1").map_err(io::Error::other)
        });
        if let Ok(index) = link::index_of(&Network::veth_name(container)) {
            let route = Route { to: Some((own, SINGLE)), via: None, link: index, is_on_link: true };
            let _ = link::delete_route(socket, &route);
            if let Ok(hardware) = link::hardware_of(index) {
                let _ = link::delete_neighbour(socket, index, own, hardware);
            }
        }
    }
}

/// Containers here, by name, with the addresses that this node has given them: what they say themselves is not asked.
fn containers(socket: &Socket, run_dir: &Path) -> Vec<(String, Ipv4Addr)> {
    let routes = link::routes(socket).unwrap_or_default();
    let by_link: BTreeMap<u32, Ipv4Addr> = routes
        .iter()
        .filter_map(|route| route.to.filter(|(_, length)| *length == 32).map(|(to, _)| (route.link, to)))
        .gather();
    let entries = fs::read_dir(run_dir.join("netns")).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            let address = by_link.get(&link::index_of(&Network::veth_name(&name)).ok()?)?;
            Some((name, *address))
        })
        .collect()
}

/// Where the machine's owner has switched IPv6 off, tinydc's own links have it all the same. None has a router: what a
/// container, or a machine on the LAN in a packet of VXLAN, advertises is no way for this node.
fn allow_ipv6(link: &str) -> Result<(), NetworkError> {
    sysctl::set(&format!("net/ipv6/conf/{link}/accept_ra"), "0")?;
    sysctl::set(&format!("net/ipv6/conf/{link}/disable_ipv6"), "0")
}

/// Has the kernel forward. A machine that forwards takes no router's advertisements unless told to, and would lose its
/// own IPv6 on the LAN: told first, for links to come, too.
fn forward(before: &Before) -> Result<(), NetworkError> {
    let links = fs::read_dir(ROOT).into_iter().flatten().flatten();
    for link in links.map(|entry| entry.file_name().to_string_lossy().into_owned()) {
        let says_1 = |name: &str| {
            fs::read_to_string(format!("{ROOT}/{link}/{name}")).is_ok_and(|text| text.trim() == "1")
        };
        // One that forwards already takes none, and means it.
        let takes_some = says_1("accept_ra") && !says_1("forwarding");
        if takes_some && link != "all" && !super::lan::is_own(&link) {
            before.set(&format!("net/ipv6/conf/{link}/accept_ra"), "2")?;
        }
    }
    before.set(sysctl::IPV6_FORWARD, "1")
}
