//! Connections that the kernel tracks: forgotten when their endpoint dies, counted for `tinydc net`.

use super::netlink::{ACK, Batch, DUMP, Socket, attributes};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const TUPLE_ASKING: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const PROTOCOL_NUMBER: u16 = 1;
const PROTOCOL_INFO: u16 = 4;
const TCP_INFO: u16 = 1;
const TCP_STATE: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const FILTER: u16 = 25;
const FILTER_REPLY_FLAGS: u16 = 2;
const BY_SOURCE: u32 = 1;

/// Of a family: its number, and how a tuple names source and destination.
struct Family {
    header: [u8; 4],
    source: u16,
    destination: u16,
}

const IPV4: Family = Family { header: [libc::AF_INET as u8, 0, 0, 0], source: 1, destination: 2 };
const IPV6: Family = Family { header: [libc::AF_INET6 as u8, 0, 0, 0], source: 3, destination: 4 };

/// Forgets the connections that `endpoint` answers. An established one is then reset by whoever its next packet
/// reaches. One message; the kernel (5.8 or later) filters.
pub fn forget(socket: &Socket, endpoint: Ipv4Addr) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(DELETE, ACK, &IPV4.header);
    answered_by(&mut batch, endpoint);
    ignore_absent(socket.send(&batch))
}

/// The same of IPv6, for all at once; the open TCP connections among them. The kernel's filter of IPv6 takes what is not
/// asked for: it has the comparison the wrong way round (up to 6.18 at least).
pub fn forget_ipv6(socket: &Socket, endpoints: &BTreeSet<Ipv6Addr>) -> io::Result<BTreeSet<Conversation>> {
    const DELETED_AT_ONCE: usize = 64;
    let (mut tuples, mut open) = (Vec::new(), BTreeSet::new());
    list(socket, &IPV6, &mut |body| {
        let is_meant = matches!(reply_source(body, &IPV6), Some(IpAddr::V6(it)) if endpoints.contains(&it));
        if is_meant {
            tuples.extend(part(body, TUPLE_ASKING).map(<[u8]>::to_vec));
            open.extend(conversation(body, &IPV6).filter(|_| is_open(body)));
        }
    })?;
    for chunk in tuples.chunks(DELETED_AT_ONCE) {
        let mut batch = Batch::new();
        for tuple in chunk {
            batch.message(DELETE, ACK, &IPV6.header).nested(TUPLE_ASKING, |b| {
                b.raw(tuple);
            });
        }
        ignore_absent(socket.send(&batch))?;
    }
    Ok(open)
}

fn ignore_absent(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        outcome => outcome,
    }
}

fn answered_by(batch: &mut Batch, endpoint: Ipv4Addr) {
    batch.nested(TUPLE_REPLY, |b| {
        b.nested(TUPLE_IP, |b| {
            b.attribute(IPV4.source, &endpoint.octets());
        });
    });
    batch.nested(FILTER, |b| {
        b.native(FILTER_REPLY_FLAGS, BY_SOURCE);
    });
}

/// A TCP connection, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conversation {
    pub client: SocketAddr,
    pub asked: SocketAddr,
}

/// The open TCP connections that `endpoint` answers. The kernel filters if it can (5.8 or later).
pub fn conversations(socket: &Socket, endpoint: Ipv4Addr) -> io::Result<Vec<Conversation>> {
    let mut batch = Batch::new();
    batch.message(GET, DUMP, &IPV4.header);
    answered_by(&mut batch, endpoint);
    let mut found = Vec::new();
    socket.dump(&batch, &mut |message| {
        let body = message.get(4..).unwrap_or_default();
        if reply_source(body, &IPV4) == Some(endpoint.into()) && is_open(body) {
            found.extend(conversation(body, &IPV4));
        }
    })?;
    Ok(found)
}

fn list(socket: &Socket, family: &Family, visit: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(GET, DUMP, &family.header);
    socket.dump(&batch, &mut |message| visit(message.get(4..).unwrap_or_default()))
}

/// From the endpoint's first answer on until both sides have ended it. A client that has had no answer yet asks again by
/// itself, and then reaches another endpoint. Thousands that have ended are still tracked for a while.
fn is_open(body: &[u8]) -> bool {
    const SYN_RECEIVED: u8 = 2;
    const CLOSE_WAIT: u8 = 5;
    let state =
        part(body, PROTOCOL_INFO).and_then(|info| part(info, TCP_INFO)).and_then(|tcp| part(tcp, TCP_STATE));
    matches!(state, Some([SYN_RECEIVED..=CLOSE_WAIT]))
}

fn conversation(body: &[u8], family: &Family) -> Option<Conversation> {
    let asking = part(body, TUPLE_ASKING)?;
    let (ip, ports) = (part(asking, TUPLE_IP)?, part(asking, TUPLE_PROTOCOL)?);
    let port = |kind: u16| Some(u16::from_be_bytes(part(ports, kind)?.try_into().ok()?));
    let is_tcp = part(ports, PROTOCOL_NUMBER)? == [libc::IPPROTO_TCP as u8];
    is_tcp.then_some(())?;
    Some(Conversation {
        client: SocketAddr::new(address(part(ip, family.source)?)?, port(SOURCE_PORT)?),
        asked: SocketAddr::new(address(part(ip, family.destination)?)?, port(DESTINATION_PORT)?),
    })
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let ipv4 = <[u8; 4]>::try_from(bytes).map(|octets| Ipv4Addr::from(octets).into());
    ipv4.or_else(|_| <[u8; 16]>::try_from(bytes).map(|octets| Ipv6Addr::from(octets).into())).ok()
}

/// How many connections each container answers; `container_at` says whose an address is.
pub fn counts(
    socket: &Socket,
    container_at: &dyn Fn(IpAddr) -> Option<Ipv4Addr>,
) -> io::Result<BTreeMap<Ipv4Addr, u32>> {
    let mut found = BTreeMap::new();
    for family in [&IPV4, &IPV6] {
        list(socket, family, &mut |body| {
            if let Some(container) = reply_source(body, family).and_then(container_at) {
                *found.entry(container).or_default() += 1;
            }
        })?;
    }
    Ok(found)
}

fn part(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn reply_source(body: &[u8], family: &Family) -> Option<IpAddr> {
    address(part(part(part(body, TUPLE_REPLY)?, TUPLE_IP)?, family.source)?)
}
