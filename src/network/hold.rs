//! Published ports, held: a listening socket each, so that no other program takes the port and then finds itself
//! without callers.
//!
//! Nobody ever connects to these sockets: the table of nftables sends callers to containers, or refuses them.

use super::nft::table::PortKey;
use crate::model::{Gather, Protocol};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::OwnedFd;

/// A port that this node can't hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    pub key: PortKey,
    /// Name of the program that has it, if it could be found out.
    pub by: Option<String>,
}

#[derive(Default)]
pub struct Holds {
    sockets: BTreeMap<PortKey, OwnedFd>,
}

impl Holds {
    /// Holds exactly `wanted`, as far as it can; says which could not be had.
    pub fn set(&mut self, wanted: &BTreeSet<PortKey>) -> Vec<Taken> {
        self.sockets.retain(|key, _| wanted.contains(key));
        let mut taken = Vec::new();
        for key in wanted {
            if self.sockets.contains_key(key) {
                continue;
            }
            match hold(key) {
                Ok(socket) => {
                    self.sockets.insert(*key, socket);
                }
                Err(error) if is_elsewhere(&error) => {}
                Err(_) => taken.push(Taken { key: *key, by: owner(key.protocol, key.port) }),
            }
        }
        taken
    }

    /// Which of these ports another program has.
    pub fn check(&self, keys: &[PortKey]) -> Vec<Taken> {
        keys.iter()
            .filter(|key| !self.sockets.contains_key(key) && !self.holds_wider(key))
            .filter(|key| hold(key).is_err_and(|error| !is_elsewhere(&error)))
            .map(|key| Taken { key: *key, by: owner(key.protocol, key.port) })
            .collect()
    }

    /// A port that moves from all addresses to one, or back, is in the way of nobody but itself.
    fn holds_wider(&self, key: &PortKey) -> bool {
        self.sockets.keys().any(|held| held.protocol == key.protocol && held.port == key.port)
    }
}

/// The address is another node's: nothing to hold here.
fn is_elsewhere(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EADDRNOTAVAIL)
}

fn hold(key: &PortKey) -> io::Result<OwnedFd> {
    const NAME_SERVICE: u16 = 53;
    let kind = match key.protocol {
        Protocol::Tcp => SocketType::STREAM,
        Protocol::Udp => SocketType::DGRAM,
    };
    let socket = rustix::net::socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, None)?;
    if key.protocol == Protocol::Tcp {
        // Connections of a former owner that linger are no reason to refuse.
        sockopt::set_socket_reuseaddr(&socket, true)?;
    } else {
        sockopt::set_socket_recv_buffer_size(&socket, 1)?;
    }
    if key.port == NAME_SERVICE {
        // The cluster's own name server has this port on the bridge.
        sockopt::set_socket_reuseport(&socket, true)?;
    }
    let address = SocketAddrV4::new(key.host_address.unwrap_or(Ipv4Addr::UNSPECIFIED), key.port);
    rustix::net::bind(&socket, &address)?;
    if key.protocol == Protocol::Tcp {
        rustix::net::listen(&socket, 1)?;
    }
    Ok(socket)
}

/// The program that has a port, by name.
fn owner(protocol: Protocol, port: u16) -> Option<String> {
    let inodes: BTreeSet<String> = ["", "6"]
        .iter()
        .filter_map(|family| fs::read_to_string(format!("/proc/net/{}{family}", protocol.name())).ok())
        .flat_map(|text| inodes_of(&text, protocol, port))
        .gather();
    let links: BTreeSet<String> = inodes.iter().map(|inode| format!("socket:[{inode}]")).gather();
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let descriptors = fs::read_dir(process.path().join("fd")).ok()?;
        let has = descriptors
            .flatten()
            .filter_map(|entry| fs::read_link(entry.path()).ok())
            .any(|link| link.to_str().is_some_and(|link| links.contains(link)));
        let name = fs::read_to_string(process.path().join("comm")).ok()?;
        has.then(|| name.trim().to_owned())
    })
}

/// Inodes of the sockets in a `/proc/net` table that listen on `port`.
fn inodes_of(table: &str, protocol: Protocol, port: u16) -> Vec<String> {
    const LISTEN: &str = "0A";
    let ending = format!(":{port:04X}");
    table
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields.get(1).is_some_and(|local| local.ends_with(&ending)))
        .filter(|fields| protocol == Protocol::Udp || fields.get(3) == Some(&LISTEN))
        .filter_map(|fields| fields.get(9).map(|inode| (*inode).to_owned()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_a_program_has_is_named_with_it() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let key = PortKey { protocol: Protocol::Tcp, port, host_address: None };
        let mut holds = Holds::default();
        let own = fs::read_to_string("/proc/self/comm").unwrap();
        let taken = holds.set(&BTreeSet::from([key]));
        assert_eq!(taken, [Taken { key, by: Some(own.trim().to_owned()) }]);
        assert_eq!(holds.check(&[key]), taken);
        drop(listener);
        assert!(holds.set(&BTreeSet::from([key])).is_empty());
        assert!(holds.check(&[key]).is_empty());
        assert!(std::net::TcpListener::bind(("0.0.0.0", port)).is_err());
        assert!(holds.set(&BTreeSet::new()).is_empty());
        assert!(std::net::TcpListener::bind(("0.0.0.0", port)).is_ok());
    }
}
