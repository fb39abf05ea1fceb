//! The interfaces of this node that lead to its LANs.

use std::collections::BTreeMap;
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
    name.starts_with("tdv-") || name == super::BRIDGE || name == super::overlay::VXLAN
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
        .collect();
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

/// The interface whose network an address belongs to; one that is a single address has no network.
pub fn interface_for(address: Ipv4Addr, interfaces: &[Interface]) -> Option<&Interface> {
    interfaces.iter().find(|interface| interface.prefix_length < 32 && interface.contains(address))
}
