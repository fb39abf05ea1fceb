//! Netlink, synchronously: a message builder and a socket.
//!
//! The kernel handles rtnetlink and nfnetlink requests inside the send call, so that every answer waits already when
//! it returns. A socket belongs to the network namespace of the thread that opened it.

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt,
    socket, sockopt,
};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

pub const ACK: u16 = 0x4;
pub const EXCLUSIVE: u16 = 0x200;
pub const CREATE: u16 = 0x400;
pub const APPEND: u16 = 0x800;
pub const REPLACE: u16 = 0x100;
/// All rows of a table are wanted.
pub const DUMP: u16 = 0x300;
const REQUEST: u16 = 0x1;
const ERROR: u16 = 2;
const DONE: u16 = 3;
const HEADER_BYTES: usize = 16;
const BUFFER_BYTES: usize = 4 << 20;

pub struct Socket {
    fd: OwnedFd,
}

impl Socket {
    pub fn route() -> io::Result<Socket> {
        Socket::open(SockProtocol::NetlinkRoute)
    }

    pub fn netfilter() -> io::Result<Socket> {
        Socket::open(SockProtocol::NetlinkNetFilter)
    }

    pub fn generic() -> io::Result<Socket> {
        Socket::open(SockProtocol::NetlinkGeneric)
    }

    /// Asks about sockets.
    pub fn diagnosis() -> io::Result<Socket> {
        Socket::open(SockProtocol::NetlinkSockDiag)
    }

    /// Hears of every change to nftables' tables.
    pub fn table_changes() -> io::Result<Socket> {
        const TABLES: u32 = 1 << 6;
        Socket::open_for(SockProtocol::NetlinkNetFilter, TABLES)
    }

    fn open(protocol: SockProtocol) -> io::Result<Socket> {
        Socket::open_for(protocol, 0)
    }

    fn open_for(protocol: SockProtocol, groups: u32) -> io::Result<Socket> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        // Large batches need room; without the privilege for more the default has to do.
        let _ = setsockopt(&fd, sockopt::SndBufForce, &BUFFER_BYTES);
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &BUFFER_BYTES);
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(Socket { fd })
    }

    /// Sends a batch; the first error that the kernel reports.
    pub fn send(&self, batch: &Batch) -> io::Result<()> {
        send(self.fd.as_raw_fd(), &batch.bytes, MsgFlags::empty())?;
        let mut buffer = vec![0; 64 << 10];
        let mut first_error = None;
        loop {
            let length = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(nix::errno::Errno::EAGAIN) => break,
                Err(error) => return Err(error.into()),
            };
            let mut rest = &buffer[..length];
            while let Some(message) = next_message(&mut rest) {
                let kind = u16::from_ne_bytes([message[4], message[5]]);
                let code = message.get(HEADER_BYTES..HEADER_BYTES + 4).and_then(|code| code.try_into().ok());
                if kind == ERROR
                    && let Some(code) = code.map(i32::from_ne_bytes)
                    && code != 0
                {
                    first_error = first_error.or(Some(io::Error::from_raw_os_error(-code)));
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// What was announced since the last time: `visit` gets each message's kind and body. An error if some was missed.
    pub fn news(&self, visit: &mut dyn FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0; 16 << 10];
        loop {
            let length = match recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => length,
                Err(nix::errno::Errno::EAGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let mut rest = &buffer[..length];
            while let Some(message) = next_message(&mut rest) {
                visit(u16::from_ne_bytes([message[4], message[5]]), &message[HEADER_BYTES..]);
            }
        }
    }

    /// Sends one request for one thing, without asking for an acknowledgement besides; the body of the answer.
    pub fn ask(&self, batch: &Batch) -> io::Result<Vec<u8>> {
        send(self.fd.as_raw_fd(), &batch.bytes, MsgFlags::empty())?;
        let mut buffer = vec![0; 16 << 10];
        let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let message = next_message(&mut &buffer[..length]).ok_or(io::ErrorKind::InvalidData)?;
        let body = &message[HEADER_BYTES..];
        match u16::from_ne_bytes([message[4], message[5]]) {
            ERROR => Err(error_in(body)),
            _ => Ok(body.to_vec()),
        }
    }

    /// Sends one request for a whole table; `visit` gets the body of each row.
    pub fn dump(&self, batch: &Batch, visit: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        send(self.fd.as_raw_fd(), &batch.bytes, MsgFlags::empty())?;
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some(message) = next_message(&mut rest) {
                let body = &message[HEADER_BYTES..];
                match u16::from_ne_bytes([message[4], message[5]]) {
                    DONE => return Ok(()),
                    ERROR => return Err(error_in(body)),
                    _ => visit(body),
                }
            }
        }
    }
}

/// The attributes in a message's body: kind without its flags, and value. Ends at the first that is none.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const FLAGS: u16 = 0xc000;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & !FLAGS;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn error_in(body: &[u8]) -> io::Error {
    let code = body.get(..4).and_then(|code| code.try_into().ok());
    io::Error::from_raw_os_error(-code.map_or(-libc::EIO, i32::from_ne_bytes))
}

fn next_message<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = u32::from_ne_bytes(rest.get(..4)?.try_into().ok()?) as usize;
    if length < HEADER_BYTES || length > rest.len() {
        return None;
    }
    let message = &rest[..length];
    *rest = &rest[length.next_multiple_of(4).min(rest.len())..];
    Some(message)
}

/// Messages one after the other, each with its attributes.
#[derive(Default)]
pub struct Batch {
    bytes: Vec<u8>,
    start: usize,
    sequence: u32,
}

impl Batch {
    pub fn new() -> Batch {
        Batch::default()
    }

    pub fn message(&mut self, kind: u16, flags: u16, header: &[u8]) -> &mut Self {
        self.start = self.bytes.len();
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags | REQUEST).to_ne_bytes());
        self.bytes.extend(self.sequence.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.sequence += 1;
        self.raw(header)
    }

    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.set_length()
    }

    fn set_length(&mut self) -> &mut Self {
        let length = (self.bytes.len() - self.start) as u32;
        self.bytes[self.start..self.start + 4].copy_from_slice(&length.to_ne_bytes());
        self
    }

    pub fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.bytes.extend(((value.len() + 4) as u16).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.raw(value)
    }

    pub fn text(&mut self, kind: u16, text: &str) -> &mut Self {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    pub fn byte(&mut self, kind: u16, value: u8) -> &mut Self {
        self.attribute(kind, &[value])
    }

    /// In the machine's byte order, as rtnetlink wants it.
    pub fn native(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    /// In network byte order, as nftables wants it.
    pub fn big(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_be_bytes())
    }

    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        const NESTED: u16 = 0x8000;
        let start = self.bytes.len();
        self.bytes.extend([0, 0]);
        self.bytes.extend((kind | NESTED).to_ne_bytes());
        fill(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.set_length()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_those_of_the_bytes() {
        let mut batch = Batch::new();
        batch.message(16, ACK, &[0; 16]).text(3, "tdc0").nested(18, |batch| {
            batch.text(1, "bridge");
        });
        batch.message(17, ACK, &[0; 16]);
        let mut rest = batch.bytes.as_slice();
        let first = next_message(&mut rest).unwrap();
        assert_eq!(first.len(), 16 + 16 + 12 + 4 + 12);
        assert_eq!(next_message(&mut rest).unwrap().len(), 32);
        assert!(next_message(&mut rest).is_none());
    }
}
