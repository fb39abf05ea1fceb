//! One node's network: the bridge, a namespace per container, routes to the other nodes, published ports.
//!
//! Input: desired tables, from the agent and the node. Output: the kernel's own tables, by netlink; no program is
//! called. Everything blocks for a few milliseconds and belongs on a blocking thread.
//!
//! A container has a /32 and a default route `onlink` by the bridge: with a plain /24 traffic between containers of
//! one node would bypass connection tracking.

pub mod dns;
pub mod ingress;
pub mod link;
pub mod netlink;
mod nft;

use crate::linux::netns;
use crate::model::Protocol;
use netlink::Socket;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

pub const BRIDGE: &str = "tdc0";
const MTU: u32 = 1500;
/// Of peers and clients: containers are refused there.
const OWN_PORT: u16 = 7400;

#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    #[error("{step}")]
    Kernel {
        step: String,
        #[source]
        source: io::Error,
    },
    #[error("set {path} to {value}")]
    Sysctl {
        path: PathBuf,
        value: &'static str,
        #[source]
        source: io::Error,
    },
}

fn kernel(step: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let step = step.into();
    move |source| NetworkError::Kernel { step, source }
}

/// One published port and the containers on this node behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublishedPort {
    pub protocol: Protocol,
    pub port: u16,
    pub host_address: Option<Ipv4Addr>,
    /// Address and port of each container, in a fixed order.
    pub endpoints: Vec<(Ipv4Addr, u16)>,
}

#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// 8 hexadecimal digits of the node's id.
    pub tag: String,
    /// A /16.
    pub container_range: Ipv4Addr,
    /// Which /24 of it is this node's.
    pub number: u8,
    /// Holds the containers' namespaces.
    pub run_dir: PathBuf,
}

pub struct Network {
    config: NetworkConfig,
    bridge_address: Ipv4Addr,
    /// The routes this run has made.
    routes: Mutex<BTreeMap<u8, Ipv4Addr>>,
}

impl Network {
    /// Makes the bridge and the table if they are missing. Containers of an earlier run keep what they have.
    pub fn open(config: NetworkConfig) -> Result<Network, NetworkError> {
        let [first, second, ..] = config.container_range.octets();
        let bridge_address = Ipv4Addr::new(first, second, config.number, 1);
        let netns_dir = config.run_dir.join("netns");
        fs::create_dir_all(&netns_dir).map_err(kernel(format!("create {}", netns_dir.display())))?;
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        match link::add_bridge(&socket, BRIDGE) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => {
                return Err(kernel(format!("make the bridge {BRIDGE}; the kernel needs `bridge`"))(error));
            }
        }
        let index = link::index_of(BRIDGE).map_err(kernel(format!("find {BRIDGE}")))?;
        link::set_up(&socket, index).map_err(kernel(format!("set {BRIDGE} up")))?;
        link::add_address(&socket, index, bridge_address, 24)
            .map_err(kernel(format!("give {BRIDGE} the address {bridge_address}")))?;
        set_sysctls()?;
        let network = Network { config, bridge_address, routes: Mutex::default() };
        network.make_table()?;
        Ok(network)
    }

    fn make_table(&self) -> Result<(), NetworkError> {
        let socket = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        let shape = nft::Shape {
            bridge: BRIDGE,
            cluster: (self.config.container_range, 16),
            node: (self.bridge_address, 24),
        };
        nft::make_table(&socket, &shape, OWN_PORT)
            .map_err(kernel("make the nftables table; the kernel needs nf_tables with nat, fib and numgen"))
    }

    fn netns_path(&self, container: &str) -> PathBuf {
        self.config.run_dir.join("netns").join(container)
    }

    fn veth_name(container: &str) -> String {
        format!("tdv-{container}")
    }

    /// The container's namespace, connected: made if it is missing, or if it lacks its address.
    pub fn attach(&self, container: &str, address: Ipv4Addr) -> Result<PathBuf, NetworkError> {
        let path = self.netns_path(container);
        if is_connected(&path, address) {
            return Ok(path);
        }
        self.detach(container)?;
        netns::create(&path).map_err(kernel(format!("make the network namespace of {container}")))?;
        let outcome = self.connect(container, address, &path);
        if outcome.is_err() {
            // Tried anew with the next launch; what is half made must not look whole.
            let _ = self.detach(container);
        }
        outcome.map(|()| path)
    }

    fn connect(&self, container: &str, address: Ipv4Addr, path: &Path) -> Result<(), NetworkError> {
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        let bridge = link::index_of(BRIDGE).map_err(kernel(format!("find {BRIDGE}")))?;
        let netns_file = File::open(path).map_err(kernel(format!("open {}", path.display())))?;
        link::add_veth(&socket, &Network::veth_name(container), bridge, MTU, netns_file.as_fd())
            .map_err(kernel(format!("connect {container} to {BRIDGE}; the kernel needs `veth`")))?;
        let gateway = self.bridge_address;
        netns::in_netns(path, move || {
            let socket = Socket::route()?;
            link::set_up(&socket, link::index_of("lo")?)?;
            let index = link::index_of("eth0")?;
            link::set_up(&socket, index)?;
            link::add_address(&socket, index, address, 32)?;
            link::add_route(&socket, &link::Route { to: None, via: gateway, link: index, is_on_link: true })
        })
        .map_err(kernel(format!("set up the network inside {container}")))
    }

    /// Takes the container's namespace away, and with it both ends of its link.
    pub fn detach(&self, container: &str) -> Result<(), NetworkError> {
        if let Ok(index) = link::index_of(&Network::veth_name(container)) {
            let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
            // Gone meanwhile together with its namespace.
            let _ = link::delete(&socket, index);
        }
        let path = self.netns_path(container);
        if path.exists() {
            netns::remove(&path).map_err(kernel(format!("remove the network namespace of {container}")))?;
        }
        Ok(())
    }

    /// Replaces the published ports of this node.
    pub fn set_ports(&self, ports: &[PublishedPort]) -> Result<(), NetworkError> {
        let socket = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        match nft::set_ports(&socket, ports) {
            Ok(()) => Ok(()),
            // Somebody flushed all tables: make ours again.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                self.make_table()?;
                nft::set_ports(&socket, ports).map_err(kernel("publish ports"))
            }
            Err(error) => Err(kernel("publish ports")(error)),
        }
    }

    /// Replaces the routes to the other nodes' containers: by node number, the node's address on the LAN.
    pub fn set_routes(&self, wanted: &BTreeMap<u8, Ipv4Addr>) -> Result<(), NetworkError> {
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, via) in routes.clone() {
            if !wanted.contains_key(&number) {
                // Gone with the link it went by.
                let _ = link::delete_route(&socket, &self.route(number, via));
                routes.remove(&number);
            }
        }
        let mut first_error = None;
        for (number, via) in wanted {
            if routes.get(number) == Some(via) {
                continue;
            }
            match link::add_route(&socket, &self.route(*number, *via)) {
                Ok(()) => {
                    routes.insert(*number, *via);
                }
                Err(error) => {
                    first_error =
                        first_error.or(Some(kernel(format!("route to node {number} by {via}"))(error)))
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn route(&self, number: u8, via: Ipv4Addr) -> link::Route {
        let [first, second, ..] = self.config.container_range.octets();
        link::Route {
            to: Some((Ipv4Addr::new(first, second, number, 0), 24)),
            via,
            link: 0,
            is_on_link: false,
        }
    }

    /// Namespaces of containers that are not in `keep`.
    pub fn sweep(&self, keep: &BTreeSet<String>) -> Result<(), NetworkError> {
        let folder = self.config.run_dir.join("netns");
        let entries = fs::read_dir(&folder).map_err(kernel(format!("list {}", folder.display())))?;
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !keep.contains(&name) {
                self.detach(&name)?;
            }
        }
        Ok(())
    }

    /// Leaves no trace: namespaces, routes, table, bridge.
    pub fn erase(&self) -> Result<(), NetworkError> {
        self.sweep(&BTreeSet::new())?;
        self.set_routes(&BTreeMap::new())?;
        let netfilter = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        nft::delete_table(&netfilter).map_err(kernel("delete the nftables table"))?;
        if let Ok(index) = link::index_of(BRIDGE) {
            let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
            link::delete(&socket, index).map_err(kernel(format!("delete {BRIDGE}")))?;
        }
        Ok(())
    }

    pub fn tag(&self) -> &str {
        &self.config.tag
    }
}

/// Whether the namespace is there and its `eth0` has this address.
fn is_connected(path: &Path, address: Ipv4Addr) -> bool {
    path.exists()
        && netns::in_netns(path, move || {
            let interfaces = nix::ifaddrs::getifaddrs()?;
            let has = |interface: nix::ifaddrs::InterfaceAddress| {
                let own = interface.address.as_ref().and_then(|own| own.as_sockaddr_in()).map(|own| own.ip());
                interface.interface_name == "eth0" && own == Some(address)
            };
            Ok(interfaces.into_iter().any(has))
        })
        .unwrap_or(false)
}

/// Forwarding on; no redirects, which would lead containers past the bridge; loopback may reach published ports.
fn set_sysctls() -> Result<(), NetworkError> {
    let wanted = [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/tdc0/send_redirects", "0"),
        ("net/ipv4/conf/tdc0/route_localnet", "1"),
    ];
    for (name, value) in wanted {
        let path = Path::new("/proc/sys").join(name);
        let is_set = fs::read_to_string(&path).is_ok_and(|text| text.trim() == value);
        if !is_set {
            fs::write(&path, value).map_err(|source| NetworkError::Sysctl { path, value, source })?;
        }
    }
    Ok(())
}
