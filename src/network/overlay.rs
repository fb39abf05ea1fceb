//! Ways to the other nodes' containers: straight over a LAN that both are on, else in a VXLAN tunnel; or encrypted.
//!
//! Input: by node number, each node's address on the LAN. Output: a route each. A tunnel has no learning and no
//! broadcast: who is where is written into it. Both ways are always received, so that two nodes need not change at the
//! same moment.

use super::lan::{self, Interface};
use super::link::{self, Route};
use super::netlink::Socket;
use super::sysctl;
use super::wireguard::Slot;
use crate::model::{Gather, UlaPrefix};
use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};

pub const VXLAN: &str = "tdx0";
pub const VXLAN_PORT: u16 = 7401;
const VXLAN_ID: u32 = 7401;
/// Outer Ethernet, IPv4, UDP and VXLAN headers.
const VXLAN_OVERHEAD: u32 = 50;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// The node's address is on a network of this node.
    Direct { via: Ipv4Addr },
    /// Behind a router.
    Tunnel { to: Ipv4Addr },
    /// Through WireGuard, wherever it is.
    Sealed { to: Ipv4Addr, slot: Slot },
}

impl Way {
    pub fn choose(address: Ipv4Addr, interfaces: &[Interface]) -> Way {
        match lan::interface_for(address, interfaces) {
            Some(_) => Way::Direct { via: address },
            None => Way::Tunnel { to: address },
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Way::Direct { .. } => "direct",
            Way::Tunnel { .. } => "vxlan",
            Way::Sealed { .. } => "wireguard",
        }
    }

    pub fn address(&self) -> Ipv4Addr {
        match self {
            Way::Direct { via } => *via,
            Way::Tunnel { to } | Way::Sealed { to, .. } => *to,
        }
    }

    pub fn is_sealed(&self) -> bool {
        matches!(self, Way::Sealed { .. })
    }
}

/// Who is where in the cluster's ranges.
#[derive(Clone, Copy, Debug)]
pub struct Numbers {
    /// A /16, of which each node has the /24 of its number.
    pub container_range: Ipv4Addr,
    pub own: u8,
}

impl Numbers {
    /// A node's /24; its first address names the node itself in the tunnel.
    pub fn network(&self, number: u8) -> Ipv4Addr {
        let [first, second, ..] = self.container_range.octets();
        Ipv4Addr::new(first, second, number, 0)
    }

    /// Locally administered, the same for a node at each start.
    fn hardware(&self, number: u8) -> [u8; 6] {
        let [first, second, ..] = self.container_range.octets();
        [0x02, 0x7d, 0xc0, first, second, number]
    }
}

/// Brings one node's route to `way`, from what it was.
pub fn set_way(socket: &Socket, numbers: &Numbers, number: u8, old: Option<Way>, way: Way) -> io::Result<()> {
    let network = numbers.network(number);
    match way {
        Way::Direct { via } => {
            let route = Route { to: Some((network, 24)), via: Some(via), link: 0, is_on_link: false };
            link::add_route(socket, &route)?;
        }
        Way::Tunnel { to } => {
            let index = tunnel(socket, numbers)?;
            link::put_neighbour(socket, index, network, numbers.hardware(number))?;
            link::put_forwarding(socket, index, numbers.hardware(number), to)?;
            let route = Route { to: Some((network, 24)), via: Some(network), link: index, is_on_link: true };
            link::add_route(socket, &route)?;
        }
        Way::Sealed { slot, .. } => link::add_route(socket, &sealed_route(network, slot)?)?,
    }
    if let Some(Way::Tunnel { to }) = old.filter(|old| *old != way) {
        let stays = matches!(way, Way::Tunnel { to: new } if new == to);
        if !stays {
            forget_tunnel(socket, numbers, number, to, !matches!(way, Way::Tunnel { .. }));
        }
    }
    Ok(())
}

fn forget_tunnel(socket: &Socket, numbers: &Numbers, number: u8, to: Ipv4Addr, is_left: bool) {
    let Ok(index) = link::index_of(VXLAN) else { return };
    // What is not there need not be taken away.
    let _ = link::delete_forwarding(socket, index, numbers.hardware(number), to);
    if is_left {
        let _ = link::delete_neighbour(socket, index, numbers.network(number), numbers.hardware(number));
    }
}

pub fn drop_way(socket: &Socket, numbers: &Numbers, number: u8, way: Way) {
    let network = numbers.network(number);
    let route = match way {
        Way::Direct { via } => {
            Ok(Route { to: Some((network, 24)), via: Some(via), link: 0, is_on_link: false })
        }
        Way::Tunnel { .. } => link::index_of(VXLAN).map(|link| Route {
            to: Some((network, 24)),
            via: Some(network),
            link,
            is_on_link: true,
        }),
        Way::Sealed { slot, .. } => sealed_route(network, slot),
    };
    // Gone with the link it went by.
    let _ = route.and_then(|route| link::delete_route(socket, &route));
    if let Way::Tunnel { to } = way {
        forget_tunnel(socket, numbers, number, to, true);
    }
}

fn sealed_route(network: Ipv4Addr, slot: Slot) -> io::Result<Route> {
    let link = link::index_of(slot.link_name())?;
    Ok(Route { to: Some((network, 24)), via: None, link, is_on_link: true })
}

/// Brings one node's route of IPv6 to where its route of IPv4 leads, but never over the LAN itself: nodes need no IPv6
/// addresses there.
pub fn set_embedded_way(
    socket: &Socket,
    numbers: &Numbers,
    prefix: UlaPrefix,
    number: u8,
    way: Way,
) -> io::Result<()> {
    if let Way::Direct { via: to } | Way::Tunnel { to } = way {
        let index = tunnel(socket, numbers)?;
        sysctl::switch_ipv6(VXLAN, true).map_err(io::Error::other)?;
        let hardware = numbers.hardware(number);
        link::put_neighbour(socket, index, prefix.embed(numbers.network(number)), hardware)?;
        link::put_forwarding(socket, index, hardware, to)?;
    }
    if let Way::Sealed { slot, .. } = way {
        sysctl::switch_ipv6(slot.link_name(), true).map_err(io::Error::other)?;
    }
    let route = embedded_route(numbers, prefix, number, way)?;
    match link::add_route(socket, &route) {
        // As long as it is reached by another link, the kernel takes none by a gateway of this one.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            for slot in Slot::ALL {
                let old = link::index_of(slot.link_name()).map(|link| Route { via: None, link, ..route });
                let _ = old.and_then(|old| link::delete_route(socket, &old));
            }
            link::add_route(socket, &route)
        }
        outcome => outcome,
    }
}

/// What is gone already need not be taken away.
pub fn drop_embedded_way(socket: &Socket, numbers: &Numbers, prefix: UlaPrefix, number: u8, way: Way) {
    let route = embedded_route(numbers, prefix, number, way);
    let _ = route.and_then(|route| link::delete_route(socket, &route));
    let Ok(index) = link::index_of(VXLAN) else { return };
    let network = prefix.embed(numbers.network(number));
    let _ = link::delete_neighbour(socket, index, network, numbers.hardware(number));
    // IPv4 needs it where it goes the same way.
    if let Way::Direct { via } = way {
        let _ = link::delete_forwarding(socket, index, numbers.hardware(number), via);
    }
}

fn embedded_route(numbers: &Numbers, prefix: UlaPrefix, number: u8, way: Way) -> io::Result<Route<Ipv6Addr>> {
    let network = prefix.embed(numbers.network(number));
    let (name, via) = match way {
        Way::Direct { .. } | Way::Tunnel { .. } => (VXLAN, Some(network)),
        Way::Sealed { slot, .. } => (slot.link_name(), None),
    };
    let to = Some((network, UlaPrefix::length(24)));
    Ok(Route { to, via, link: link::index_of(name)?, is_on_link: true })
}

/// The tunnel's link, made when it is first needed.
fn tunnel(socket: &Socket, numbers: &Numbers) -> io::Result<u32> {
    if let Ok(index) = link::index_of(VXLAN) {
        return Ok(index);
    }
    let mtu = lan_mtu(socket) - VXLAN_OVERHEAD;
    link::add_vxlan(socket, VXLAN, VXLAN_ID, VXLAN_PORT, numbers.hardware(numbers.own), mtu)?;
    let index = link::index_of(VXLAN)?;
    link::add_address(socket, index, numbers.network(numbers.own), 32)?;
    sysctl::take_no_router(VXLAN).map_err(io::Error::other)?;
    Ok(index)
}

/// Of the narrowest LAN.
pub fn lan_mtu(socket: &Socket) -> u32 {
    const USUAL: u32 = 1500;
    let lans: BTreeSet<u32> =
        lan::interfaces().unwrap_or_default().iter().map(|interface| interface.index).gather();
    let mtus = link::mtus(socket).unwrap_or_default();
    let narrowest = mtus.iter().filter(|(index, _)| lans.contains(index)).map(|(_, mtu)| *mtu).min();
    narrowest.unwrap_or(USUAL).clamp(576, USUAL)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_on_the_same_lan_is_reached_directly_and_any_other_in_a_tunnel() {
        let lan = Interface {
            name: "eth0".into(),
            index: 2,
            hardware: [0; 6],
            address: Ipv4Addr::new(192, 168, 1, 5),
            prefix_length: 24,
        };
        let near = Ipv4Addr::new(192, 168, 1, 9);
        let far = Ipv4Addr::new(192, 168, 2, 9);
        assert_eq!(Way::choose(near, std::slice::from_ref(&lan)), Way::Direct { via: near });
        assert_eq!(Way::choose(far, std::slice::from_ref(&lan)), Way::Tunnel { to: far });
        // An address without a network, as a floating one is, makes no neighbours.
        let single = Interface { prefix_length: 32, address: far, ..lan };
        assert_eq!(Way::choose(far, &[single]), Way::Tunnel { to: far });
    }
}
