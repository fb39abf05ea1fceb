//! A LAN: a bridge in a namespace of its own, and a link to each machine's namespace.

use crate::linux::netns;
use crate::network::{link, netlink::Socket};
use anyhow::{Context, Result};
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

const BRIDGE: &str = "lan0";
const FAR_BRIDGE: &str = "lan1";
const MTU: u32 = 1500;

pub struct Lan {
    folder: PathBuf,
    pub netns: PathBuf,
    prefix: [u8; 3],
}

impl Lan {
    /// Addresses are `prefix.N`; the LAN's own namespace, where clients stand, is `prefix.254`.
    pub fn new(folder: &Path, name: &str, prefix: [u8; 3]) -> Result<Lan> {
        let path = folder.join(name);
        netns::create(&path).context("make the LAN's namespace")?;
        let [a, b, c] = prefix;
        netns::in_netns(&path, move || {
            let socket = Socket::route()?;
            link::set_up(&socket, link::index_of("lo")?)?;
            link::add_bridge(&socket, BRIDGE)?;
            let index = link::index_of(BRIDGE)?;
            link::add_address(&socket, index, Ipv4Addr::new(a, b, c, 254), 24)
        })
        .context("make the LAN's bridge; the kernel needs `bridge` and `veth`")?;
        Ok(Lan { folder: folder.into(), netns: path, prefix })
    }

    pub fn address(&self, number: u8) -> Ipv4Addr {
        let [a, b, c] = self.prefix;
        Ipv4Addr::new(a, b, c, number)
    }

    /// A second LAN behind a router, which is this LAN's own namespace.
    pub fn add_far_lan(&self) -> Result<()> {
        let router = self.far_address(254);
        netns::in_netns(&self.netns, move || {
            let socket = Socket::route()?;
            link::add_bridge(&socket, FAR_BRIDGE)?;
            link::add_address(&socket, link::index_of(FAR_BRIDGE)?, router, 24)?;
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1")
        })
        .context("make a second LAN")
    }

    pub fn far_address(&self, number: u8) -> Ipv4Addr {
        let [a, b, c] = self.prefix;
        Ipv4Addr::new(a, b, c + 1, number)
    }

    /// A machine's way to other LANs.
    pub fn add_default_route(&self, netns: &Path, router: Ipv4Addr) -> Result<()> {
        netns::in_netns(netns, move || {
            let socket = Socket::route()?;
            let route = link::Route { to: None, via: Some(router), link: 0, is_on_link: false };
            link::add_route(&socket, &route)
        })
        .with_context(|| format!("route by {router}"))
    }

    /// A machine's namespace with `eth0` on the LAN.
    pub fn add_machine(&self, name: &str, number: u8) -> Result<PathBuf> {
        self.add_machine_on(BRIDGE, name, number, self.address(number))
    }

    /// The same on the LAN behind the router.
    pub fn add_far_machine(&self, name: &str, number: u8) -> Result<PathBuf> {
        let path = self.add_machine_on(FAR_BRIDGE, name, number, self.far_address(number))?;
        self.add_default_route(&path, self.far_address(254))?;
        Ok(path)
    }

    fn add_machine_on(
        &self,
        bridge: &'static str,
        name: &str,
        number: u8,
        address: Ipv4Addr,
    ) -> Result<PathBuf> {
        let path = self.folder.join(name);
        netns::create(&path).with_context(|| format!("make the namespace of {name}"))?;
        let machine = File::open(&path)?;
        netns::in_netns(&self.netns, || {
            let socket = Socket::route()?;
            link::add_veth(&socket, &port(number), Some(link::index_of(bridge)?), MTU, machine.as_fd())
        })
        .with_context(|| format!("connect {name} to the LAN"))?;
        netns::in_netns(&path, move || {
            let socket = Socket::route()?;
            link::set_up(&socket, link::index_of("lo")?)?;
            let index = link::index_of("eth0")?;
            link::set_up(&socket, index)?;
            link::add_address(&socket, index, address, 24)
        })
        .with_context(|| format!("give {name} its address"))?;
        Ok(path)
    }

    /// Takes a machine's cable out, or, with `mend`, puts it back.
    pub fn cut(&self, number: u8) -> Result<()> {
        self.set_port(number, false)
    }

    pub fn mend(&self, number: u8) -> Result<()> {
        self.set_port(number, true)
    }

    fn set_port(&self, number: u8, is_up: bool) -> Result<()> {
        netns::in_netns(&self.netns, move || {
            let socket = Socket::route()?;
            link::set_state(&socket, link::index_of(&port(number))?, is_up)
        })
        .with_context(|| format!("set the cable of machine {number}"))
    }

    /// Gives a machine another address, of this LAN or another subnet on the same wire.
    pub fn renumber(&self, netns: &Path, old: Ipv4Addr, new: Ipv4Addr) -> Result<()> {
        netns::in_netns(netns, move || {
            let socket = Socket::route()?;
            let index = link::index_of("eth0")?;
            link::delete_address(&socket, index, old, 24)?;
            link::add_address(&socket, index, new, 24)
        })
        .with_context(|| format!("renumber {old} to {new}"))
    }

    /// Moves a machine's cable to the LAN behind the router, or back; its address and its route with it.
    pub fn move_machine(&self, netns: &Path, number: u8, is_far: bool) -> Result<Ipv4Addr> {
        let (bridge, near, far) =
            (if is_far { FAR_BRIDGE } else { BRIDGE }, self.address(number), self.far_address(number));
        let (old, new) = if is_far { (near, far) } else { (far, near) };
        netns::in_netns(&self.netns, move || {
            let socket = Socket::route()?;
            link::set_master(&socket, link::index_of(&port(number))?, link::index_of(bridge)?)
        })
        .with_context(|| format!("move the cable of machine {number}"))?;
        self.renumber(netns, old, new)?;
        self.add_default_route(netns, if is_far { self.far_address(254) } else { self.address(254) })?;
        Ok(new)
    }

    /// Takes a machine off the bridge; the name of its end here. Somebody else is to carry its frames.
    pub fn unplug(&self, number: u8) -> Result<String> {
        netns::in_netns(&self.netns, move || {
            let socket = Socket::route()?;
            link::set_master(&socket, link::index_of(&port(number))?, 0)
        })
        .with_context(|| format!("take machine {number} off the bridge"))?;
        Ok(port(number))
    }

    /// The bridge's name in the LAN's namespace.
    pub fn bridge(&self) -> &'static str {
        BRIDGE
    }

    /// Another subnet for the clients' own namespace.
    pub fn add_own_address(&self, address: Ipv4Addr) -> Result<()> {
        netns::in_netns(&self.netns, move || {
            let socket = Socket::route()?;
            link::add_address(&socket, link::index_of(BRIDGE)?, address, 24)
        })
        .with_context(|| format!("add {address} to the LAN"))
    }
}

fn port(number: u8) -> String {
    format!("port{number}")
}
