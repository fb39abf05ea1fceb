//! Encrypted tunnels between nodes, by WireGuard: the kernel's where it has it, else one of this process's own, which
//! speaks the same protocol.
//!
//! A tunnel has one key and one UDP port. There may be two at once, so that keys are changed without a gap: what comes
//! in through either is taken.
//!
//! Never: writes a key to a disk.

mod kernel;
mod userspace;

use super::link;
use super::netlink::Socket;
use crate::linux::tun;
use crate::model::UlaPrefix;
use boringtun::x25519;
use ring::rand::{SecureRandom, SystemRandom};
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};
use userspace::Userspace;

/// Outer IPv4 and UDP headers, and WireGuard's own.
const OVERHEAD: u32 = 60;
pub type PublicKey = [u8; 32];

/// Which of the two tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Slot {
    First,
    Second,
}

impl Slot {
    pub const ALL: [Slot; 2] = [Slot::First, Slot::Second];

    pub const fn link_name(self) -> &'static str {
        match self {
            Slot::First => "tdw0",
            Slot::Second => "tdw1",
        }
    }

    pub fn port(self) -> u16 {
        match self {
            Slot::First => 7402,
            Slot::Second => 7404,
        }
    }
}

/// Another node, as a tunnel knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelPeer {
    pub public_key: PublicKey,
    pub endpoint: SocketAddrV4,
    /// The /24 of its containers: it may send from there, and gets what goes there.
    pub network: Ipv4Addr,
    /// And from the addresses that embed those.
    pub ula_prefix: UlaPrefix,
}

#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error("this kernel has no WireGuard, and {path} can't be opened, which tinydc's own needs", path = tun::PATH)]
    Missing(#[source] io::Error),
    #[error("no random numbers for a key")]
    Random,
    #[error("both tunnels are in use")]
    Both,
    #[error("{step}")]
    Kernel {
        step: String,
        #[source]
        source: io::Error,
    },
}

fn kernel_error(step: impl Into<String>) -> impl FnOnce(io::Error) -> TunnelError {
    let step = step.into();
    move |source| TunnelError::Kernel { step, source }
}

/// Whether this node could encrypt.
pub fn probe() -> Result<(), TunnelError> {
    const NAME: &str = "tdw-probe";
    let socket = Socket::route().map_err(kernel_error("open rtnetlink"))?;
    let delete = || link::index_of(NAME).and_then(|index| link::delete(&socket, index));
    // A run that was killed in between has left it.
    let _ = delete();
    if kernel::add_link(&socket, NAME).is_ok() {
        // Gone at the latest with the namespace.
        let _ = delete();
        return Ok(());
    }
    tun::probe().map_err(TunnelError::Missing)
}

/// One end of the encrypted network on this node.
pub struct Tunnel {
    slot: Slot,
    public_key: PublicKey,
    driver: Driver,
}

enum Driver {
    Kernel(kernel::Device),
    Userspace(Userspace),
}

impl Tunnel {
    /// With a new key. `own` is this node's address in it; packets of the LAN have `lan_mtu` bytes.
    pub fn create(slot: Slot, own: Ipv4Addr, lan_mtu: u32) -> Result<Tunnel, TunnelError> {
        let mut private = [0; 32];
        SystemRandom::new().fill(&mut private).map_err(|_| TunnelError::Random)?;
        let private = x25519::StaticSecret::from(private);
        let public_key = x25519::PublicKey::from(&private).to_bytes();
        let name = slot.link_name();
        let socket = Socket::route().map_err(kernel_error("open rtnetlink"))?;
        Tunnel::delete_leftover(&socket, slot);
        let driver = match kernel::add_link(&socket, name) {
            Ok(()) => {
                let device = kernel::Device::open(name).map_err(kernel_error(format!("find {name}")))?;
                device
                    .set_key(&private.to_bytes(), slot.port())
                    .map_err(kernel_error(format!("give {name} its key")))?;
                Driver::Kernel(device)
            }
            Err(_) => {
                let tun = tun::create(name).map_err(TunnelError::Missing)?;
                let userspace = Userspace::start(tun, private, slot)
                    .map_err(kernel_error(format!("listen on UDP {}", slot.port())))?;
                Driver::Userspace(userspace)
            }
        };
        let tunnel = Tunnel { slot, public_key, driver };
        link::index_of(name)
            .and_then(|index| {
                link::set_mtu(&socket, index, lan_mtu - OVERHEAD)?;
                link::add_address(&socket, index, own, 32)?;
                link::set_up(&socket, index)
            })
            .map_err(kernel_error(format!("set {name} up")))?;
        Ok(tunnel)
    }

    /// Whether its interface is there, and served: somebody may have taken it away.
    pub fn is_alive(&self) -> bool {
        let is_served = match &self.driver {
            Driver::Kernel(_) => true,
            Driver::Userspace(userspace) => userspace.is_running(),
        };
        is_served && link::index_of(self.slot.link_name()).is_ok()
    }

    pub fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// How it is done: `wireguard` or `wireguard (userspace)`.
    pub fn kind(&self) -> &'static str {
        match self.driver {
            Driver::Kernel(_) => "wireguard",
            Driver::Userspace(_) => "wireguard (userspace)",
        }
    }

    /// Adds a peer or tells where it is now.
    pub fn put_peer(&self, peer: TunnelPeer) -> Result<(), TunnelError> {
        match &self.driver {
            Driver::Kernel(device) => device.put_peer(&peer).map_err(kernel_error(format!(
                "tell {} of {}",
                self.slot.link_name(),
                peer.endpoint
            ))),
            Driver::Userspace(userspace) => {
                userspace.put_peer(peer);
                Ok(())
            }
        }
    }

    pub fn remove_peer(&self, public_key: &PublicKey) {
        match &self.driver {
            // What is not there need not be taken away.
            Driver::Kernel(device) => drop(device.remove_peer(public_key)),
            Driver::Userspace(userspace) => userspace.remove_peer(*public_key),
        }
    }

    /// Takes away what an earlier run has left.
    pub fn delete_leftover(socket: &Socket, slot: Slot) {
        let _ = link::index_of(slot.link_name()).and_then(|index| link::delete(socket, index));
    }
}

impl Tunnel {
    /// Ends it, with its routes. A daemon that merely stops leaves the kernel's tunnel at work.
    pub fn delete(self) {
        if let Ok(socket) = Socket::route() {
            Tunnel::delete_leftover(&socket, self.slot);
        }
    }
}
