//! The interfaces of this node that lead to its LANs.

use std::collections::BTreeMap;
use std::fs;
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

/// All addresses that are not loopback's or tinydc's own.
pub fn interfaces() -> io::Result<Vec<Interface>> {
    let mut hardware: BTreeMap<String, [u8; 6]> = BTreeMap::new();
    let mut found = Vec::new();
    for entry in nix::ifaddrs::getifaddrs()? {
        let name = entry.interface_name.clone();
        if name == "lo" || is_own(&name) {
            continue;
        }
        let ipv4 = |address: Option<nix::sys::socket::SockaddrStorage>| {
            address.and_then(|address| address.as_sockaddr_in().map(|address| address.ip()))
        };
        let (Some(address), Some(mask)) = (ipv4(entry.address), ipv4(entry.netmask)) else { continue };
        let mac =
            *hardware.entry(name.clone()).or_insert_with(|| hardware_address(&name).unwrap_or_default());
        let index = nix::net::if_::if_nametoindex(name.as_str())?;
        let prefix_length = u32::from(mask).count_ones() as u8;
        found.push(Interface { name, index, hardware: mac, address, prefix_length });
    }
    Ok(found)
}

fn hardware_address(name: &str) -> Option<[u8; 6]> {
    let text = fs::read_to_string(format!("/sys/class/net/{name}/address")).ok()?;
    let mut bytes = text.trim().split(':').map(|byte| u8::from_str_radix(byte, 16));
    let mut address = [0; 6];
    for byte in &mut address {
        *byte = bytes.next()?.ok()?;
    }
    Some(address)
}

/// The interface whose network an address belongs to; one that is a single address has no network.
pub fn interface_for(address: Ipv4Addr, interfaces: &[Interface]) -> Option<&Interface> {
    interfaces.iter().find(|interface| interface.prefix_length < 32 && interface.contains(address))
}
