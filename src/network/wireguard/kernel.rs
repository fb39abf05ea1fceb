//! The kernel's WireGuard, by generic netlink.

use super::super::link;
use super::super::netlink::{ACK, Batch, DUMP, Socket, attributes};
use super::{PublicKey, TunnelPeer};
use crate::model::UlaPrefix;
use std::io;

const CONTROL_FAMILY: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const SET_DEVICE: u8 = 1;
const DEVICE_INDEX: u16 = 1;
const DEVICE_PRIVATE_KEY: u16 = 3;
const DEVICE_LISTEN_PORT: u16 = 6;
const DEVICE_PEERS: u16 = 8;
const PEER_PUBLIC_KEY: u16 = 1;
const PEER_FLAGS: u16 = 3;
const PEER_ENDPOINT: u16 = 4;
const PEER_ALLOWED: u16 = 9;
const REMOVE_PEER: u32 = 1;
const REPLACE_ALLOWED: u32 = 2;
const ALLOWED_FAMILY: u16 = 1;
const ALLOWED_ADDRESS: u16 = 2;
const ALLOWED_LENGTH: u16 = 3;
const LIST_ITEM: u16 = 0;

pub struct Device {
    socket: Socket,
    family: u16,
    index: u32,
}

pub fn add_link(socket: &Socket, name: &str) -> io::Result<()> {
    link::add_plain(socket, name, "wireguard")
}

impl Device {
    pub fn open(name: &str) -> io::Result<Device> {
        let socket = Socket::generic()?;
        let family = family_of(&socket)?;
        Ok(Device { socket, family, index: link::index_of(name)? })
    }

    fn change(&self, fill: impl FnOnce(&mut Batch)) -> io::Result<()> {
        let mut batch = Batch::new();
        batch.message(self.family, ACK, &[SET_DEVICE, 1, 0, 0]).native(DEVICE_INDEX, self.index);
        fill(&mut batch);
        self.socket.send(&batch)
    }

    pub fn set_key(&self, private_key: &[u8; 32], port: u16) -> io::Result<()> {
        self.change(|batch| {
            batch.attribute(DEVICE_PRIVATE_KEY, private_key);
            batch.attribute(DEVICE_LISTEN_PORT, &port.to_ne_bytes());
        })
    }

    pub fn put_peer(&self, peer: &TunnelPeer) -> io::Result<()> {
        let mut endpoint = (libc::AF_INET as u16).to_ne_bytes().to_vec();
        endpoint.extend(peer.endpoint.port().to_be_bytes());
        endpoint.extend(peer.endpoint.ip().octets());
        endpoint.extend([0; 8]);
        self.change_peer(&peer.public_key, |batch| {
            batch.native(PEER_FLAGS, REPLACE_ALLOWED).attribute(PEER_ENDPOINT, &endpoint);
            batch.nested(PEER_ALLOWED, |batch| {
                batch.nested(LIST_ITEM, |batch| {
                    batch.attribute(ALLOWED_FAMILY, &(libc::AF_INET as u16).to_ne_bytes());
                    batch.attribute(ALLOWED_ADDRESS, &peer.network.octets()).byte(ALLOWED_LENGTH, 24);
                });
                batch.nested(LIST_ITEM, |batch| {
                    let network = peer.ula_prefix.embed(peer.network);
                    batch.attribute(ALLOWED_FAMILY, &(libc::AF_INET6 as u16).to_ne_bytes());
                    batch.attribute(ALLOWED_ADDRESS, &network.octets());
                    batch.byte(ALLOWED_LENGTH, UlaPrefix::length(24));
                });
            });
        })
    }

    pub fn remove_peer(&self, public_key: &PublicKey) -> io::Result<()> {
        self.change_peer(public_key, |batch| {
            batch.native(PEER_FLAGS, REMOVE_PEER);
        })
    }

    fn change_peer(&self, public_key: &PublicKey, fill: impl FnOnce(&mut Batch)) -> io::Result<()> {
        self.change(|batch| {
            batch.nested(DEVICE_PEERS, |batch| {
                batch.nested(LIST_ITEM, |batch| {
                    batch.attribute(PEER_PUBLIC_KEY, public_key);
                    fill(batch);
                });
            });
        })
    }
}

/// Generic netlink's number for WireGuard on this kernel.
fn family_of(socket: &Socket) -> io::Result<u16> {
    const NAME: &str = "wireguard";
    let mut batch = Batch::new();
    batch.message(CONTROL_FAMILY, DUMP, &[GET_FAMILY, 1, 0, 0]);
    let mut family = None;
    socket.dump(&batch, &mut |body| {
        let rest = body.get(4..).unwrap_or_default();
        let value = |wanted: u16| attributes(rest).find(|(kind, _)| *kind == wanted).map(|(_, bytes)| bytes);
        let is_it = value(FAMILY_NAME).is_some_and(|name| name.strip_suffix(&[0]) == Some(NAME.as_bytes()));
        let number = value(FAMILY_ID).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
        if is_it {
            family = number;
        }
    })?;
    family.ok_or_else(|| io::ErrorKind::NotFound.into())
}
