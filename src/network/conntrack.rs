//! Connections that the kernel tracks: forgotten when their endpoint dies, counted for `tinydc net`.

use super::netlink::{ACK, Batch, DUMP, Socket, attributes};
use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const FAMILY_IPV4: u8 = 2;
const HEADER: [u8; 4] = [FAMILY_IPV4, 0, 0, 0];
const TUPLE_REPLY: u16 = 2;
const TUPLE_IP: u16 = 1;
const SOURCE: u16 = 1;
const FILTER: u16 = 25;
const FILTER_REPLY_FLAGS: u16 = 2;
const BY_SOURCE: u32 = 1;

/// Forgets the connections that `endpoint` answers. An established one is then reset by whoever its next packet
/// reaches. One message; the kernel (5.8 or later) filters.
pub fn forget(socket: &Socket, endpoint: Ipv4Addr) -> io::Result<()> {
    let mut batch = Batch::new();
    batch.message(DELETE, ACK, &HEADER);
    batch.nested(TUPLE_REPLY, |b| {
        b.nested(TUPLE_IP, |b| {
            b.attribute(SOURCE, &endpoint.octets());
        });
    });
    batch.nested(FILTER, |b| {
        b.native(FILTER_REPLY_FLAGS, BY_SOURCE);
    });
    match socket.send(&batch) {
        // None was there.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        outcome => outcome,
    }
}

/// How many connections each address answers, among those asked for.
pub fn counts(socket: &Socket, of: &dyn Fn(Ipv4Addr) -> bool) -> io::Result<BTreeMap<Ipv4Addr, u32>> {
    let mut batch = Batch::new();
    batch.message(GET, DUMP, &HEADER);
    let mut found = BTreeMap::new();
    socket.dump(&batch, &mut |body| {
        let source = attributes(body.get(4..).unwrap_or_default())
            .find(|(kind, _)| *kind == TUPLE_REPLY)
            .and_then(|(_, tuple)| attributes(tuple).find(|(kind, _)| *kind == TUPLE_IP))
            .and_then(|(_, ip)| attributes(ip).find(|(kind, _)| *kind == SOURCE))
            .and_then(|(_, bytes)| <[u8; 4]>::try_from(bytes).ok());
        if let Some(address) = source.map(Ipv4Addr::from).filter(|address| of(*address)) {
            *found.entry(address).or_default() += 1;
        }
    })?;
    Ok(found)
}
