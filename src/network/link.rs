//! Links, addresses and routes by rtnetlink.

use super::netlink::{ACK, Batch, CREATE, DUMP, EXCLUSIVE, REPLACE, Socket, attributes};
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

const NEW_LINK: u16 = 16;
const DELETE_LINK: u16 = 17;
const GET_LINK: u16 = 18;
const NEW_ADDRESS: u16 = 20;
const DELETE_ADDRESS: u16 = 21;
const NEW_ROUTE: u16 = 24;
const GET_ROUTE: u16 = 26;
const NEW_NEIGHBOUR: u16 = 28;
const DELETE_NEIGHBOUR: u16 = 29;
const DELETE_ROUTE: u16 = 25;
/// Of struct ifinfomsg.
const UP: u32 = 1;
const IFNAME: u16 = 3;
const MTU: u16 = 4;
const MASTER: u16 = 10;
const LINKINFO: u16 = 18;
const NETNS_FD: u16 = 28;
const INFO_KIND: u16 = 1;
const INFO_DATA: u16 = 2;
const VETH_PEER: u16 = 1;
const AF_SPEC: u16 = 26;
const ADDRESS_MODE_OF_IPV6: u16 = 8;
const NO_ADDRESS: u8 = 1;
/// Marks routes as tinydc's; a number that no routing daemon has.
const PROTOCOL_OWN: u8 = 116;
const TABLE_MAIN: u8 = 254;
const UNICAST: u8 = 1;
const ON_LINK: u32 = 4;
const SCOPE_LINK: u8 = 253;

/// Of either family.
pub trait Address: Copy {
    const FAMILY: u8;
    fn bytes(&self) -> Vec<u8>;
    fn from_bytes(bytes: &[u8]) -> Option<Self>;
}

impl Address for Ipv4Addr {
    const FAMILY: u8 = libc::AF_INET as u8;

    fn bytes(&self) -> Vec<u8> {
        self.octets().into()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Ipv4Addr> {
        <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from)
    }
}

impl Address for Ipv6Addr {
    const FAMILY: u8 = libc::AF_INET6 as u8;

    fn bytes(&self) -> Vec<u8> {
        self.octets().into()
    }

    fn from_bytes(bytes: &[u8]) -> Option<Ipv6Addr> {
        <[u8; 16]>::try_from(bytes).ok().map(Ipv6Addr::from)
    }
}

fn link_header(index: u32, flags: u32, change: u32) -> Vec<u8> {
    let mut header = vec![0; 4];
    header.extend(index.to_ne_bytes());
    header.extend(flags.to_ne_bytes());
    header.extend(change.to_ne_bytes());
    header
}

/// The index of a link in this thread's namespace. Not by if_nametoindex: for a name that there isn't, its system call has
/// the kernel run modprobe.
pub fn index_of(name: &str) -> io::Result<u32> {
    let mut batch = Batch::new();
    batch.message(GET_LINK, 0, &link_header(0, 0, 0)).text(IFNAME, name);
    let body = Socket::route()?.ask(&batch)?;
    let index = body.get(4..8).and_then(|bytes| bytes.try_into().ok());
    index.map(u32::from_ne_bytes).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// A link's own hardware address.
pub fn hardware_of(index: u32) -> io::Result<Hardware> {
    const ADDRESS: u16 = 1;
    let mut batch = Batch::new();
    batch.message(GET_LINK, 0, &link_header(index, 0, 0));
    let body = Socket::route()?.ask(&batch)?;
    let found = attributes(body.get(16..).unwrap_or_default()).find(|(kind, _)| *kind == ADDRESS);
    found.and_then(|(_, bytes)| bytes.try_into().ok()).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

pub fn add_bridge(socket: &Socket, name: &str) -> io::Result<()> {
    add_plain(socket, name, "bridge")?;
    set_up(socket, index_of(name)?)
}

/// A link of a kind that needs no more than a name.
pub fn add_plain(socket: &Socket, name: &str, kind: &str) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(NEW_LINK, ACK | CREATE | EXCLUSIVE, &link_header(0, 0, 0)).text(IFNAME, name);
    batch.nested(LINKINFO, |batch| {
        batch.text(INFO_KIND, kind);
    });
    socket.send(&batch)
}

pub fn set_mtu(socket: &Socket, index: u32, mtu: u32) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(NEW_LINK, ACK, &link_header(index, 0, 0)).native(MTU, mtu);
    socket.send(&batch)
}

/// A tunnel that learns nothing: who is where is written into it.
pub fn add_vxlan(
    socket: &Socket,
    name: &str,
    id: u32,
    port: u16,
    hardware: Hardware,
    mtu: u32,
) -> io::Result<()> {
    const ADDRESS: u16 = 1;
    let mut batch = Batch::new();
    batch.message(NEW_LINK, ACK | CREATE | EXCLUSIVE, &link_header(0, UP, UP)).text(IFNAME, name);
    batch.attribute(ADDRESS, &hardware).native(MTU, mtu);
    batch.nested(LINKINFO, |batch| {
        batch.text(INFO_KIND, "vxlan").nested(INFO_DATA, |batch| {
            batch.native(1, id).byte(7, 0).attribute(15, &port.to_be_bytes());
        });
    });
    socket.send(&batch)
}

/// What a link is called on its wire.
pub type Hardware = [u8; 6];
/// Family, state and flags of struct ndmsg.
type Neighbour = (u8, u16, u8);
const ON_TUNNEL: Neighbour = (libc::AF_BRIDGE as u8, 0x80, 2);

fn on_network<A: Address>() -> Neighbour {
    (A::FAMILY, 0x80, 0)
}

fn neighbour<A: Address>(
    socket: &Socket,
    kind: u16,
    (family, state, flags): Neighbour,
    index: u32,
    (address, hardware): (A, Hardware),
) -> io::Result<()> {
    let mut header = vec![family, 0, 0, 0];
    header.extend(index.to_ne_bytes());
    header.extend(state.to_ne_bytes());
    header.extend([flags, 0]);
    let mut batch = Batch::new();
    let change = if kind == NEW_NEIGHBOUR { ACK | CREATE | REPLACE } else { ACK };
    batch.message(kind, change, &header).attribute(1, &address.bytes()).attribute(2, &hardware);
    socket.send(&batch)
}

/// Who has an address on a link, for good.
pub fn put_neighbour<A: Address>(
    socket: &Socket,
    index: u32,
    address: A,
    hardware: Hardware,
) -> io::Result<()> {
    neighbour(socket, NEW_NEIGHBOUR, on_network::<A>(), index, (address, hardware))
}

pub fn delete_neighbour<A: Address>(
    socket: &Socket,
    index: u32,
    address: A,
    hardware: Hardware,
) -> io::Result<()> {
    neighbour(socket, DELETE_NEIGHBOUR, on_network::<A>(), index, (address, hardware))
}

/// Behind which machine a tunnel finds a hardware address.
pub fn put_forwarding(socket: &Socket, index: u32, hardware: Hardware, to: Ipv4Addr) -> io::Result<()> {
    neighbour(socket, NEW_NEIGHBOUR, ON_TUNNEL, index, (to, hardware))
}

pub fn delete_forwarding(socket: &Socket, index: u32, hardware: Hardware, to: Ipv4Addr) -> io::Result<()> {
    neighbour(socket, DELETE_NEIGHBOUR, ON_TUNNEL, index, (to, hardware))
}

/// How long packets may be, by a link's index.
pub fn mtus(socket: &Socket) -> io::Result<BTreeMap<u32, u32>> {
    let mut batch = Batch::new();
    batch.message(GET_LINK, DUMP, &link_header(0, 0, 0));
    let mut found = BTreeMap::new();
    socket.dump(&batch, &mut |body| {
        let number = |bytes: &[u8]| Some(u32::from_ne_bytes(bytes.try_into().ok()?));
        let index = body.get(4..8).and_then(number);
        let mtu = attributes(body.get(16..).unwrap_or_default()).find(|(kind, _)| *kind == MTU);
        found.extend(index.zip(mtu.and_then(|(_, bytes)| number(bytes))));
    })?;
    Ok(found)
}

/// One row of the main table of routes.
struct TableRow<A> {
    route: Route<A>,
    protocol: u8,
}

fn table_rows<A: Address>(socket: &Socket) -> io::Result<Vec<TableRow<A>>> {
    let mut batch = Batch::new();
    batch.message(GET_ROUTE, DUMP, &[A::FAMILY, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut found = Vec::new();
    socket.dump(&batch, &mut |body| {
        let (Some(header), Some(rest)) = (body.get(..12), body.get(12..)) else { return };
        if header[0] != A::FAMILY || header[4] != TABLE_MAIN || header[7] != UNICAST {
            return;
        }
        let value = |wanted: u16| attributes(rest).find(|(kind, _)| *kind == wanted).map(|(_, bytes)| bytes);
        let link = value(4).and_then(|bytes| bytes.try_into().ok());
        let route = Route {
            to: value(1).and_then(A::from_bytes).map(|to| (to, header[1])),
            via: value(5).and_then(A::from_bytes),
            link: link.map_or(0, u32::from_ne_bytes),
            is_on_link: false,
        };
        found.push(TableRow { route, protocol: header[5] });
    })?;
    Ok(found)
}

/// Routes that tinydc makes: static ones.
pub fn routes<A: Address>(socket: &Socket) -> io::Result<Vec<Route<A>>> {
    let rows = table_rows(socket)?.into_iter();
    Ok(rows
        .filter(|row| row.protocol == PROTOCOL_OWN && row.route.to.is_some())
        .map(|row| row.route)
        .collect())
}

/// Networks that somebody has a route to, with its link; not the default route.
pub fn networks(socket: &Socket) -> io::Result<Vec<(Ipv4Addr, u8, u32)>> {
    let rows = table_rows(socket)?.into_iter().filter(|row| row.protocol != PROTOCOL_OWN);
    Ok(rows.filter_map(|row| row.route.to.map(|(to, length)| (to, length, row.route.link))).collect())
}

/// A pair of which one end is here, on a bridge if `master` is one, and the other is `eth0` in another namespace.
pub fn add_veth(
    socket: &Socket,
    name: &str,
    master: Option<u32>,
    mtu: u32,
    netns: BorrowedFd<'_>,
) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(NEW_LINK, ACK | CREATE | EXCLUSIVE, &link_header(0, UP, UP));
    batch.text(IFNAME, name).native(MTU, mtu);
    if let Some(master) = master {
        batch.native(MASTER, master);
    }
    batch.nested(LINKINFO, |batch| {
        batch.text(INFO_KIND, "veth").nested(INFO_DATA, |batch| {
            batch.nested(VETH_PEER, |batch| {
                batch.raw(&link_header(0, 0, 0)).text(IFNAME, "eth0").native(MTU, mtu);
                batch.native(NETNS_FD, netns.as_raw_fd() as u32);
            });
        });
    });
    socket.send(&batch)
}

/// A link that is not connected yet never makes itself a link-local address. One by an advertisement it may still get.
pub fn take_ipv6(socket: &Socket, index: u32) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(NEW_LINK, ACK, &link_header(index, 0, 0));
    batch.nested(AF_SPEC, |batch| {
        batch.nested(libc::AF_INET6 as u16, |batch| {
            batch.attribute(ADDRESS_MODE_OF_IPV6, &[NO_ADDRESS]);
        });
    });
    socket.send(&batch)
}

/// Makes a link a port of a bridge.
pub fn set_master(socket: &Socket, index: u32, master: u32) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(NEW_LINK, ACK, &link_header(index, 0, 0)).native(MASTER, master);
    socket.send(&batch)
}

pub fn set_up(socket: &Socket, index: u32) -> io::Result<()> {
    set_state(socket, index, true)
}

pub fn set_state(socket: &Socket, index: u32, is_up: bool) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(NEW_LINK, ACK, &link_header(index, if is_up { UP } else { 0 }, UP));
    socket.send(&batch)
}

pub fn delete(socket: &Socket, index: u32) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(DELETE_LINK, ACK, &link_header(index, 0, 0));
    socket.send(&batch)
}

pub fn add_address<A: Address>(socket: &Socket, index: u32, address: A, length: u8) -> io::Result<()> {
    change_address(socket, NEW_ADDRESS, ACK | CREATE | REPLACE, (index, address, length))
}

pub fn delete_address<A: Address>(socket: &Socket, index: u32, address: A, length: u8) -> io::Result<()> {
    change_address(socket, DELETE_ADDRESS, ACK, (index, address, length))
}

fn change_address<A: Address>(
    socket: &Socket,
    kind: u16,
    flags: u16,
    (index, address, length): (u32, A, u8),
) -> io::Result<()> {
    /// Nobody else can have it: used at once, also on a link without a carrier. IPv4 has no use for the flag.
    const NO_DUPLICATE_CHECK: u8 = 2;
    let flags_of_address = if A::FAMILY == Ipv6Addr::FAMILY { NO_DUPLICATE_CHECK } else { 0 };
    let mut header = vec![A::FAMILY, length, flags_of_address, 0];
    header.extend(index.to_ne_bytes());
    let mut batch = Batch::new();
    batch.message(kind, flags, &header);
    batch.attribute(1, &address.bytes()).attribute(2, &address.bytes());
    socket.send(&batch)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route<A = Ipv4Addr> {
    /// `None`: the default route.
    pub to: Option<(A, u8)>,
    /// `None`: its addresses are on the link itself.
    pub via: Option<A>,
    /// 0: the kernel finds the link by the gateway.
    pub link: u32,
    /// The gateway needs no route of its own.
    pub is_on_link: bool,
}

/// Whatever has no narrower route is refused at once instead of leaving by the default route.
const UNREACHABLE: u8 = 7;
/// Any other route goes before it.
const LAST_PRIORITY: u32 = u32::MAX;

/// Refuses what goes to a network, unless there is a narrower route.
pub fn change_barrier<A: Address>(
    socket: &Socket,
    (network, length): (A, u8),
    is_wanted: bool,
) -> io::Result<()> {
    const PRIORITY: u16 = 6;
    let (kind, flags) = if is_wanted { (NEW_ROUTE, ACK | CREATE | REPLACE) } else { (DELETE_ROUTE, ACK) };
    let mut header = vec![A::FAMILY, length, 0, 0, TABLE_MAIN, PROTOCOL_OWN, 0, UNREACHABLE];
    header.extend(0u32.to_ne_bytes());
    let mut batch = Batch::new();
    batch.message(kind, flags, &header).attribute(1, &network.bytes()).native(PRIORITY, LAST_PRIORITY);
    socket.send(&batch)
}

fn route_message<A: Address>(batch: &mut Batch, kind: u16, flags: u16, route: &Route<A>) {
    let length = route.to.map_or(0, |(_, length)| length);
    let scope = if route.via.is_some() { 0 } else { SCOPE_LINK };
    let mut header = vec![A::FAMILY, length, 0, 0, TABLE_MAIN, PROTOCOL_OWN, scope, UNICAST];
    let on_link = if route.is_on_link && route.via.is_some() { ON_LINK } else { 0 };
    header.extend(on_link.to_ne_bytes());
    batch.message(kind, flags, &header);
    if let Some((network, _)) = route.to {
        batch.attribute(1, &network.bytes());
    }
    if route.link != 0 {
        batch.native(4, route.link);
    }
    if let Some(via) = route.via {
        batch.attribute(5, &via.bytes());
    }
}

pub fn add_route<A: Address>(socket: &Socket, route: &Route<A>) -> io::Result<()> {
    let mut batch = Batch::new();
    route_message(&mut batch, NEW_ROUTE, ACK | CREATE | REPLACE, route);
    socket.send(&batch)
}

pub fn delete_route<A: Address>(socket: &Socket, route: &Route<A>) -> io::Result<()> {
    let mut batch = Batch::new();
    route_message(&mut batch, DELETE_ROUTE, ACK, route);
    socket.send(&batch)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_found_by_its_name() {
        assert_eq!(index_of("lo").unwrap(), nix::net::if_::if_nametoindex("lo").unwrap());
        let absent = index_of("td-absent").unwrap_err();
        assert_eq!(absent.raw_os_error(), Some(libc::ENODEV), "{absent}");
        assert!(index_of("a-name-that-is-too-long").is_err());
    }
}
