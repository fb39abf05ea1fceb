//! ARP for floating addresses: is somebody there, and here it is now (RFC 5227).

use super::lan::Interface;
use crate::linux::packet;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

const ARP: u16 = 0x0806;
const FRAME_BYTES: usize = 42;
const BROADCAST: [u8; 6] = [0xff; 6];
const REQUEST: u16 = 1;
const REPLY: u16 = 2;
const PROBES: u32 = 2;
/// A LAN answers within a few milliseconds; the RFC's seconds would be the outage.
const PROBE_WAIT: Duration = Duration::from_millis(100);

/// What a frame says: who has which address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    pub hardware: [u8; 6],
    pub sender: Ipv4Addr,
    pub target: Ipv4Addr,
}

/// An Ethernet frame with an ARP packet in it.
fn frame(own: [u8; 6], operation: u16, sender: Ipv4Addr, target: Ipv4Addr) -> [u8; FRAME_BYTES] {
    let mut frame = [0; FRAME_BYTES];
    frame[..6].copy_from_slice(&BROADCAST);
    frame[6..12].copy_from_slice(&own);
    frame[12..14].copy_from_slice(&ARP.to_be_bytes());
    // Ethernet and IPv4, with addresses of 6 and 4 bytes.
    frame[14..20].copy_from_slice(&[0, 1, 8, 0, 6, 4]);
    frame[20..22].copy_from_slice(&operation.to_be_bytes());
    frame[22..28].copy_from_slice(&own);
    frame[28..32].copy_from_slice(&sender.octets());
    if operation == REPLY {
        frame[32..38].copy_from_slice(&own);
    }
    frame[38..42].copy_from_slice(&target.octets());
    frame
}

fn parse(frame: &[u8]) -> Option<Claim> {
    let is_arp = frame.get(12..20)? == [8, 6, 0, 1, 8, 0, 6, 4];
    let address = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(frame.get(at..at + 4)?).ok()?));
    let claim =
        Claim { hardware: frame.get(22..28)?.try_into().ok()?, sender: address(28)?, target: address(38)? };
    is_arp.then_some(claim)
}

/// Asks whether somebody has `address`: the hardware address that answers, if one does. Takes 0.2 s.
pub fn probe(interface: &Interface, address: Ipv4Addr) -> io::Result<Option<[u8; 6]>> {
    let socket = packet::open(ARP, interface.index, Duration::from_millis(10))?;
    let mut file = std::fs::File::from(socket);
    let mut buffer = [0; 128];
    for _ in 0..PROBES {
        file.write_all(&frame(interface.hardware, REQUEST, Ipv4Addr::UNSPECIFIED, address))?;
        let begin = Instant::now();
        while begin.elapsed() < PROBE_WAIT {
            let claim = match file.read(&mut buffer) {
                Ok(length) => parse(&buffer[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
                Err(error) => return Err(error),
            };
            let answers = |claim: &Claim| claim.sender == address && claim.hardware != interface.hardware;
            if let Some(claim) = claim.filter(answers) {
                return Ok(Some(claim.hardware));
            }
        }
    }
    Ok(None)
}

/// Tells everyone on the LAN that `address` is here.
pub fn announce(interface: &Interface, address: Ipv4Addr) -> io::Result<()> {
    let socket = packet::open(ARP, interface.index, Duration::from_millis(10))?;
    let mut file = std::fs::File::from(socket);
    // Some machines heed only one of the two forms.
    for operation in [REQUEST, REPLY] {
        file.write_all(&frame(interface.hardware, operation, address, address))?;
    }
    Ok(())
}

/// Listens on an interface for others that claim an address.
pub struct Ears {
    file: std::fs::File,
    own: [u8; 6],
}

impl Ears {
    pub fn open(interface: &Interface) -> io::Result<Ears> {
        let socket = packet::open(ARP, interface.index, Duration::from_millis(1))?;
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Ears { file: socket.into(), own: interface.hardware })
    }

    /// What has been claimed by others since the last call.
    pub fn claims(&mut self) -> Vec<Claim> {
        let mut buffer = [0; 128];
        let mut claims = Vec::new();
        // A flood must not keep this node from its work: the rest is heard next time.
        for _ in 0..256 {
            let Ok(length) = self.file.read(&mut buffer) else { break };
            claims.extend(parse(&buffer[..length]).filter(|claim| claim.hardware != self.own));
        }
        claims
    }
}

pub fn text_of(hardware: [u8; 6]) -> String {
    hardware.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_says_what_was_put_into_it() {
        let (own, address) = ([2, 0, 0, 0, 0, 1], Ipv4Addr::new(192, 0, 2, 10));
        let bytes = frame(own, REPLY, address, address);
        assert_eq!(parse(&bytes), Some(Claim { hardware: own, sender: address, target: address }));
        let probe = parse(&frame(own, REQUEST, Ipv4Addr::UNSPECIFIED, address)).unwrap();
        assert_eq!((probe.sender, probe.target), (Ipv4Addr::UNSPECIFIED, address));
        for cut in 0..FRAME_BYTES {
            assert_eq!(parse(&bytes[..cut]), None);
        }
    }
}
