//! Connections that the kernel tracks: forgotten when their endpoint dies, counted for `tinydc net`.

use super::netlink::{ACK, Batch, DUMP, Socket, attributes};
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const FAMILY_IPV4: u8 = 2;
const HEADER: [u8; 4] = [FAMILY_IPV4, 0, 0, 0];
const TUPLE_ASKING: u16 = 1;
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const TUPLE_PROTOCOL: u16 = 2;
const SOURCE: u16 = 1;
const DESTINATION: u16 = 2;
const PROTOCOL_NUMBER: u16 = 1;
const PROTOCOL_INFO: u16 = 4;
const TCP_INFO: u16 = 1;
const TCP_STATE: u16 = 1;
const SOURCE_PORT: u16 = 2;
const DESTINATION_PORT: u16 = 3;
const FILTER: u16 = 25;
const FILTER_REPLY_FLAGS: u16 = 2;
const BY_SOURCE: u32 = 1;

/// Forgets the connections that `endpoint` answers. An established one is then reset by whoever its next packet
/// reaches. One message; the kernel (5.8 or later) filters.
pub fn forget(socket: &Socket, endpoint: Ipv4Addr) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(DELETE, ACK, &HEADER);
    answered_by(&mut batch, endpoint);
    match socket.send(&batch) {
        // None was there.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        outcome => outcome,
    }
}

fn answered_by(batch: &mut Batch, endpoint: Ipv4Addr) {
    batch.nested(TUPLE_REPLY, |b| {
        b.nested(TUPLE_IP, |b| {
            b.attribute(SOURCE, &endpoint.octets());
        });
    });
    batch.nested(FILTER, |b| {
        b.native(FILTER_REPLY_FLAGS, BY_SOURCE);
    });
}

/// A TCP connection, as its client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conversation {
    pub client: SocketAddrV4,
    pub asked: SocketAddrV4,
}

/// The open TCP connections that `endpoint` answers. The kernel filters if it can (5.8 or later).
pub fn conversations(socket: &Socket, endpoint: Ipv4Addr) -> io::Result<Vec<Conversation>> {
    let mut batch = Batch::new();
    batch.message(GET, DUMP, &HEADER);
    answered_by(&mut batch, endpoint);
    let mut found = Vec::new();
    socket.dump(&batch, &mut |message| {
        let body = message.get(4..).unwrap_or_default();
        if reply_source(body) == Some(endpoint) && is_open(body) {
            found.extend(conversation(body));
        }
    })?;
    Ok(found)
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

fn conversation(body: &[u8]) -> Option<Conversation> {
    let asking = part(body, TUPLE_ASKING)?;
    let (ip, ports) = (part(asking, TUPLE_IP)?, part(asking, TUPLE_PROTOCOL)?);
    let address = |kind: u16| Some(Ipv4Addr::from(<[u8; 4]>::try_from(part(ip, kind)?).ok()?));
    let port = |kind: u16| Some(u16::from_be_bytes(part(ports, kind)?.try_into().ok()?));
    let is_tcp = part(ports, PROTOCOL_NUMBER)? == [libc::IPPROTO_TCP as u8];
    is_tcp.then_some(())?;
    Some(Conversation {
        client: SocketAddrV4::new(address(SOURCE)?, port(SOURCE_PORT)?),
        asked: SocketAddrV4::new(address(DESTINATION)?, port(DESTINATION_PORT)?),
    })
}

/// How many connections each address answers, among those asked for.
pub fn counts(socket: &Socket, of: &dyn Fn(Ipv4Addr) -> bool) -> io::Result<BTreeMap<Ipv4Addr, u32>> {
    let mut found = BTreeMap::new();
    list(socket, &mut |body| {
        if let Some(address) = reply_source(body).filter(|address| of(*address)) {
            *found.entry(address).or_default() += 1;
        }
    })?;
    Ok(found)
}

fn list(socket: &Socket, visit: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(GET, DUMP, &HEADER);
    socket.dump(&batch, &mut |body| visit(body.get(4..).unwrap_or_default()))
}

fn part(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

fn reply_source(body: &[u8]) -> Option<Ipv4Addr> {
    let bytes = part(part(part(body, TUPLE_REPLY)?, TUPLE_IP)?, SOURCE)?;
    Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?))
}
