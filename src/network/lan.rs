//! The interfaces of this node that lead to its LANs.

use super::link;
use super::netlink::Socket;
use crate::model::{Gather, LocalNetwork};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;

/// One IPv4 address of an interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub index: u32,
    pub hardware: [u8; 6],
    pub address: Ipv4Addr,
    pub prefix_length: u8,
}

impl Interface {
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_length)).unwrap_or(0);
        u32::from(self.address) & mask == u32::from(address) & mask
    }
}

/// tinydc's own interfaces: containers, the bridge, the overlay.
pub fn is_own(name: &str) -> bool {
    let is_tunnel = name.starts_with("tdw") || name == super::overlay::VXLAN;
    is_tunnel || name.starts_with("tdv-") || name == super::BRIDGE
}

/// All addresses that are not loopback's or tinydc's own. Asked of the kernel by system calls: `/sys` may show another
/// network namespace than this process is in.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    let entries: Vec<nix::ifaddrs::InterfaceAddress> = nix::ifaddrs::getifaddrs()?
        .filter(|entry| entry.interface_name != "lo" && !is_own(&entry.interface_name))
        .collect();
    let hardware: BTreeMap<&str, [u8; 6]> = entries
        .iter()
        .filter_map(|entry| {
            let address = entry.address.as_ref()?.as_link_addr()?.addr()?;
            Some((entry.interface_name.as_str(), address))
        })
        .gather();
    let mut found = Vec::new();
    for entry in &entries {
        let ipv4 = |address: &Option<nix::sys::socket::SockaddrStorage>| {
            address.as_ref().and_then(|address| address.as_sockaddr_in().map(|address| address.ip()))
        };
        let (Some(address), Some(mask)) = (ipv4(&entry.address), ipv4(&entry.netmask)) else { continue };
        let name = entry.interface_name.clone();
        found.push(Interface {
            index: nix::net::if_::if_nametoindex(name.as_str())?,
            hardware: hardware.get(name.as_str()).copied().unwrap_or_default(),
            address,
            prefix_length: u32::from(mask).count_ones() as u8,
            name,
        });
    }
    Ok(found)
}

/// Every network that this machine reaches apart from the cluster's own: those of its interfaces, and routes by others.
pub fn networks() -> Vec<LocalNetwork> {
    let own = interfaces().unwrap_or_default().into_iter().map(|interface| LocalNetwork {
        address: interface.address,
        prefix_length: interface.prefix_length,
        interface: interface.name,
    });
    let mut found: BTreeSet<LocalNetwork> = own.gather();
    let routed = Socket::route().and_then(|socket| link::networks(&socket)).unwrap_or_default();
    for (address, prefix_length, index) in routed {
        let interface = nix::net::if_::if_indextoname(index).ok().and_then(|name| name.into_string().ok());
        if let Some(interface) = interface.filter(|name| name != "lo" && !is_own(name)) {
            let is_known =
                |known: &LocalNetwork| known.prefix_length == prefix_length && known.interface == interface;
            if !found.iter().any(is_known) {
                found.insert(LocalNetwork { address, prefix_length, interface });
            }
        }
    }
    found.into_iter().collect()
}

/// The interface whose network an address belongs to; one that is a single address has no network.
pub fn interface_for(address: Ipv4Addr, interfaces: &[Interface]) -> Option<&Interface> {
    interfaces.iter().find(|interface| interface.prefix_length < 32 && interface.contains(address))
}
