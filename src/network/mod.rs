//! One node's network: the bridge, a namespace per container, routes to the other nodes, published ports.
//!
//! Input: desired tables, from the agent and the node. Output: the kernel's own tables, by netlink; no program is
//! called. Everything blocks for a few milliseconds and belongs on a blocking thread.
//!
//! A container has a /32, a link of its own to the node and a default route `onlink` by the bridge's address. The links
//! are routed, not bridged: traffic between two containers of one node passes the same hooks as any other, whether or
//! not the kernel filters bridged frames, and a container can't send with another's address. The bridge `tdc0` only
//! holds that address, which is the name server's.

pub mod arp;
pub mod conntrack;
pub mod dns;
mod dual_stack;
pub mod foreign;
mod hold;
pub mod ingress;
pub mod lan;
pub mod link;
pub mod lookup;
pub mod netlink;
mod nft;
pub mod overlay;
mod places;
pub mod relay;
mod reset;
mod sysctl;
pub mod wireguard;

pub use hold::Taken;
pub use nft::table::{PortKey, PortRow, VipRow, Wanted};

use crate::linux::netns;
use crate::model::{Gather, UlaPrefix};
use conntrack::Conversation;
use dual_stack::DualStack;
use hold::Holds;
use netlink::Socket;
use nft::{Family, Neighbours, Shape, Table};
use nix::sys::socket::{setsockopt, sockopt};
use overlay::{Numbers, Way};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};
use wireguard::{PublicKey, Slot, Tunnel, TunnelError, TunnelPeer};

pub const BRIDGE: &str = "tdc0";
/// Of the node's end of each container's link.
pub const LINK_PREFIX: &str = "tdv-";
const MTU: u32 = 1500;

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

#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// A /16.
    pub container_range: Ipv4Addr,
    /// Which /24 of it is this node's.
    pub number: u8,
    /// A /16: the services' addresses.
    pub vip_range: Ipv4Addr,
    /// Of the cluster's IPv6 addresses, for when it has them.
    pub ula_prefix: UlaPrefix,
    /// Where this node listens for peers and clients: closed to containers.
    pub own_ports: BTreeSet<u16>,
    /// Holds the containers' namespaces.
    pub run_dir: PathBuf,
}

impl NetworkConfig {
    fn numbers(&self) -> Numbers {
        Numbers { container_range: self.container_range, own: self.number }
    }
}

/// Where another node is, and how its containers are to be reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    pub address: Ipv4Addr,
    /// Through this tunnel; otherwise in clear.
    pub sealed: Option<Slot>,
}

/// What came of a change.
pub struct Applied {
    /// Published ports that another program has.
    pub taken: Vec<Taken>,
    /// Without its table of IPv6 a node does for IPv4 what is to be done.
    pub ipv6: Result<(), NetworkError>,
}

/// Whether this node has IPv6, too.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Dual {
    /// As an earlier run has left it.
    Unknown,
    Off,
    On,
}

pub struct Network {
    config: NetworkConfig,
    bridge_address: Ipv4Addr,
    ways: Mutex<BTreeMap<u8, Way>>,
    tunnels: Mutex<BTreeMap<Slot, Tunnel>>,
    table: Mutex<Table>,
    dual_stack: DualStack,
    /// Read while a container is connected: none is missed when this changes. Taken before `ways` and `table`, never while
    /// one of them is held.
    dual: RwLock<Dual>,
    holds: Mutex<Holds>,
    /// Says when somebody deletes the table.
    table_changes: Option<Socket>,
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
        let vips = link::Route { to: Some((config.vip_range, 16)), via: None, link: index, is_on_link: true };
        link::add_route(&socket, &vips).map_err(kernel("route to the services' addresses"))?;
        // A container that is not to be reached is refused, not looked for at the router, in clear.
        link::change_barrier(&socket, (config.container_range, 16), true)
            .map_err(kernel("keep containers' traffic off the default route"))?;
        let before = sysctl::Before::at(&config.run_dir);
        before.set(sysctl::IP_FORWARD, "1")?;
        before.set("net/ipv4/conf/all/send_redirects", "0")?;
        let shape = Shape {
            cluster: (config.container_range, 16),
            node: (bridge_address, 24),
            vips: (config.vip_range, 16),
            own_ports: config.own_ports.clone(),
        };
        let dual_stack = DualStack::new(&config, &shape);
        let network = Network {
            config,
            bridge_address,
            ways: Mutex::default(),
            tunnels: Mutex::default(),
            dual_stack,
            table: Mutex::new(Table::new(Family::Ipv4, shape)),
            dual: RwLock::new(Dual::Unknown),
            holds: Mutex::default(),
            // Without it the table is looked after now and then all the same.
            table_changes: Socket::table_changes().ok(),
        };
        let found = network.found_ways(&socket).map_err(kernel("list routes"))?;
        *network.ways.lock().unwrap_or_else(PoisonError::into_inner) = found;
        Ok(network)
    }

    pub fn bridge_address(&self) -> Ipv4Addr {
        self.bridge_address
    }

    fn netns_path(&self, container: &str) -> PathBuf {
        self.config.run_dir.join("netns").join(container)
    }

    fn veth_name(container: &str) -> String {
        format!("{LINK_PREFIX}{container}")
    }

    /// The container's namespace, connected: made if it is missing, or if it lacks its address.
    pub fn attach(&self, container: &str, address: Ipv4Addr) -> Result<PathBuf, NetworkError> {
        let path = self.netns_path(container);
        let dual = self.dual.read().unwrap_or_else(PoisonError::into_inner);
        let has_ipv6 = *dual == Dual::On;
        let with_ipv6 = || match has_ipv6 {
            true => self.dual_stack.connect(container, address, &path),
            false => Ok(()),
        };
        if path.exists() && address_in(&path) == Some(address) {
            return with_ipv6().map(|()| path.clone());
        }
        self.remove(container)?;
        netns::create(&path).map_err(kernel(format!("make the network namespace of {container}")))?;
        let outcome = self.connect(container, address, &path, has_ipv6).and_then(|()| with_ipv6());
        if outcome.is_err() {
            // Tried anew with the next launch; what is half made must not look whole.
            let _ = self.remove(container);
        }
        outcome.map(|()| path.clone())
    }

    fn connect(
        &self,
        container: &str,
        address: Ipv4Addr,
        path: &Path,
        has_ipv6: bool,
    ) -> Result<(), NetworkError> {
        if !has_ipv6 {
            // Inherited by the end inside. The kernel takes this at once, while a write for one link turns in a circle as
            // long as others change links: twenty containers that started at once left two processors nothing else (35 s).
            netns::in_netns(path, || set_ipv6_off().map_err(io::Error::other))
                .map_err(kernel(format!("take IPv6 from the network of {container}")))?;
        }
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        let netns_file = File::open(path).map_err(kernel(format!("open {}", path.display())))?;
        let name = Network::veth_name(container);
        link::add_veth(&socket, &name, None, MTU, netns_file.as_fd())
            .map_err(kernel(format!("connect {container}; the kernel needs `veth`")))?;
        for (setting, value) in LINK_SYSCTLS {
            sysctl::set(&format!("net/ipv4/conf/{name}/{setting}"), value)?;
        }
        sysctl::take_no_router(&name)?;
        if sysctl::knows_ipv6() {
            link::index_of(&name)
                .and_then(|index| link::take_ipv6(&socket, index))
                .map_err(kernel(format!("take IPv6 from the link of {container}")))?;
        }
        let gateway = self.bridge_address;
        netns::in_netns(path, move || {
            let socket = Socket::route()?;
            link::set_up(&socket, link::index_of("lo")?)?;
            let index = link::index_of("eth0")?;
            if has_ipv6 {
                link::take_ipv6(&socket, index)?;
            }
            link::set_up(&socket, index)?;
            link::add_address(&socket, index, address, 32)?;
            link::add_route(
                &socket,
                &link::Route { to: None, via: Some(gateway), link: index, is_on_link: true },
            )
        })
        .map_err(kernel(format!("set up the network inside {container}")))?;
        let to_container = |link| link::Route { to: Some((address, 32)), via: None, link, is_on_link: true };
        link::index_of(&name)
            .and_then(|index| link::add_route(&socket, &to_container(index)))
            .map_err(kernel(format!("route to {container}")))
    }

    /// Takes the container's namespace away, and with it both ends of its link.
    pub fn detach(&self, container: &str) -> Result<(), NetworkError> {
        let _unchanged = self.dual.read().unwrap_or_else(PoisonError::into_inner);
        self.remove(container)
    }

    fn remove(&self, container: &str) -> Result<(), NetworkError> {
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

    /// Brings the kernel to `wanted`; connections that one of `dead` answers are forgotten, so that they are reset.
    pub fn apply(&self, wanted: &Wanted, dead: &[Ipv4Addr], has_ipv6: bool) -> Result<Applied, NetworkError> {
        let socket = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        let applied = self.table.lock().unwrap_or_else(PoisonError::into_inner).apply(&socket, wanted);
        applied.map_err(kernel(
            "change the nftables table; the kernel needs nf_tables with nat, fib and numgen",
        ))?;
        // Published ports answer on loopback too, wherever the container is: only now, as the table drops what comes from
        // outside and is addressed to loopback.
        sysctl::Before::at(&self.config.run_dir).set(ROUTE_LOCALNET, "1")?;
        let mut waiting = BTreeSet::new();
        for endpoint in dead {
            // Clients elsewhere, and all of them where this fails, learn of it with their next packet.
            waiting.extend(conntrack::conversations(&socket, *endpoint).unwrap_or_default());
            conntrack::forget(&socket, *endpoint)
                .map_err(kernel(format!("forget connections to {endpoint}")))?;
        }
        self.reset_clients(&waiting);
        let ipv6 = self.set_dual_stack(has_ipv6.then_some(wanted));
        let ipv6 = ipv6.and_then(|()| self.apply_ipv6(&socket, wanted, dead));
        let mut holds = self.holds.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Applied { taken: holds.set(&wanted.ports.keys().copied().gather()), ipv6 })
    }

    fn apply_ipv6(&self, socket: &Socket, wanted: &Wanted, dead: &[Ipv4Addr]) -> Result<(), NetworkError> {
        let dual = self.dual.read().unwrap_or_else(PoisonError::into_inner);
        if *dual != Dual::On {
            // A kernel that can't has nothing that would have to be kept off.
            let _ = self.dual_stack.keep_guard();
            return Ok(());
        }
        self.dual_stack.apply(socket, wanted)?;
        if dead.is_empty() {
            return Ok(());
        }
        let endpoints = dead.iter().map(|endpoint| self.config.ula_prefix.embed(*endpoint)).gather();
        let waiting =
            conntrack::forget_ipv6(socket, &endpoints).map_err(kernel("forget connections of IPv6"))?;
        self.reset_clients(&waiting);
        Ok(())
    }

    /// Gives containers and services IPv6 addresses, with this table, or takes them away. Tried again, it does what is left
    /// to do.
    fn set_dual_stack(&self, wanted: Option<&Wanted>) -> Result<(), NetworkError> {
        let aim = if wanted.is_some() { Dual::On } else { Dual::Off };
        // Most often nothing changes, and no launch is waited for.
        if *self.dual.read().unwrap_or_else(PoisonError::into_inner) == aim {
            return Ok(());
        }
        let mut dual = self.dual.write().unwrap_or_else(PoisonError::into_inner);
        let outcome = match wanted {
            Some(wanted) => {
                let neighbours =
                    self.table.lock().unwrap_or_else(PoisonError::into_inner).neighbours().clone();
                self.dual_stack.open(&self.ways(), wanted, neighbours)
            }
            None => self.dual_stack.close(),
        };
        match (outcome, *dual) {
            // What is half made goes again; the reason is told, and this is tried again. What an earlier run has made serves
            // on.
            (Err(error), Dual::Off) => self.dual_stack.close().and(Err(error)),
            // Once: what can't be taken away now goes when the node leaves.
            (Err(_), Dual::Unknown) if aim == Dual::Off => {
                *dual = aim;
                Ok(())
            }
            (Err(error), _) => Err(error),
            (Ok(()), _) => {
                *dual = aim;
                Ok(())
            }
        }
    }

    /// Whether this machine could have IPv6, or has it.
    pub fn probe_ipv6(&self) -> Result<(), NetworkError> {
        match *self.dual.read().unwrap_or_else(PoisonError::into_inner) {
            Dual::On => Ok(()),
            Dual::Off | Dual::Unknown => self.dual_stack.probe(),
        }
    }

    /// Ends connections of clients on this node, in whichever namespace they are.
    fn reset_clients(&self, conversations: &BTreeSet<Conversation>) {
        if conversations.is_empty() {
            return;
        }
        // A kernel that can't, leaves it to the next packet.
        let _ = reset::reset(conversations);
        let entries = fs::read_dir(self.config.run_dir.join("netns")).into_iter().flatten().flatten();
        for entry in entries {
            // Gone meanwhile, with its clients.
            let _ = netns::in_netns(&entry.path(), || reset::reset(conversations));
        }
    }

    /// Whether somebody has deleted the table since this was last asked.
    pub fn was_table_deleted(&self) -> bool {
        let mut is_deleted = false;
        let news = self
            .table_changes
            .as_ref()
            .map(|socket| socket.news(&mut |kind, body| is_deleted |= nft::table::is_deletion(kind, body)));
        // Too many to hear them all: it may be among them.
        is_deleted || news.is_some_and(|outcome| outcome.is_err())
    }

    /// How many connections each container answers, by its address, as this node's kernel tracks them.
    pub fn connection_counts(&self) -> Result<BTreeMap<Ipv4Addr, u32>, NetworkError> {
        let socket = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        let range = self.config.container_range.octets();
        let container_at = |address: IpAddr| {
            let is_container = |octets: [u8; 4]| octets[..2] == range[..2] && octets[3] > 1;
            self.config.ula_prefix.ipv4_of(address).filter(|address| is_container(address.octets()))
        };
        conntrack::counts(&socket, &container_at).map_err(kernel("list tracked connections"))
    }

    /// Which of these ports another program on this node has.
    pub fn taken_ports(&self, keys: &[PortKey]) -> Vec<Taken> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner).check(keys)
    }

    /// Brings the ways to the other nodes' containers to what is wanted, by node number. A member of which nothing is
    /// known now keeps its way, also one that an earlier run has made, unless that is in clear and must not be.
    /// `floating`: the cluster's addresses that move between nodes.
    pub fn set_peers(
        &self,
        wanted: &BTreeMap<u8, Reach>,
        members: &BTreeSet<u8>,
        floating: &BTreeSet<Ipv4Addr>,
        is_clear_allowed: bool,
    ) -> Result<(), NetworkError> {
        let interfaces = lan::interfaces().map_err(kernel("list interfaces"))?;
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        let numbers = self.config.numbers();
        let mut ways = self.ways.lock().unwrap_or_else(PoisonError::into_inner);
        for (number, way) in ways.clone() {
            let is_forbidden = !is_clear_allowed && !way.is_sealed() && !wanted.contains_key(&number);
            if !members.contains(&number) || is_forbidden {
                overlay::drop_way(&socket, &numbers, number, way);
                ways.remove(&number);
            }
        }
        let mut first_error = None;
        for (number, reach) in wanted {
            let way = match reach.sealed {
                Some(slot) => Way::Sealed { to: reach.address, slot },
                None => Way::choose(reach.address, &interfaces),
            };
            let old = ways.get(number).copied();
            if old == Some(way) {
                continue;
            }
            match overlay::set_way(&socket, &numbers, *number, old, way) {
                Ok(()) => {
                    ways.insert(*number, way);
                }
                Err(error) => {
                    let step = format!("reach node {number} at {} ({})", reach.address, way.name());
                    first_error = first_error.or(Some(kernel(step)(error)));
                }
            }
        }
        let netfilter = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        let clear = ways.values().filter(|way| !way.is_sealed());
        let peers = clear.map(Way::address).filter(|address| !address.is_unspecified()).gather();
        let others = members.iter().filter(|number| **number != numbers.own && !is_clear_allowed);
        let sealed = others.map(|number| numbers.network(*number)).gather();
        let doors = ways.values().map(Way::address).filter(|address| !address.is_unspecified());
        let doors = doors.chain(floating.iter().copied()).gather();
        let neighbours = Neighbours { peers, sealed, doors };
        let now = ways.clone();
        // Whoever changes the families looks at ways and neighbours, and must find both new or none.
        drop(ways);
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.set_neighbours(&netfilter, neighbours.clone());
        drop(table);
        let dual = self.dual.read().unwrap_or_else(PoisonError::into_inner);
        if *dual == Dual::On {
            self.dual_stack.set_neighbours(&netfilter, neighbours);
            let followed = self.dual_stack.follow(&now);
            first_error = first_error.or(followed.err().map(kernel("reach other nodes' containers by IPv6")));
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Makes an encrypted tunnel with a new key; its place and what others need to know of it.
    pub fn open_tunnel(&self) -> Result<(Slot, PublicKey), TunnelError> {
        let mut tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        let free = || Slot::ALL.into_iter().filter(|slot| !tunnels.contains_key(slot));
        // One that an earlier run has left serves until the new one does.
        let untouched = free().find(|slot| link::index_of(slot.link_name()).is_err());
        let slot = untouched.or_else(|| free().next()).ok_or(TunnelError::Both)?;
        let lan_mtu = Socket::route().map_or(MTU, |socket| overlay::lan_mtu(&socket));
        let numbers = self.config.numbers();
        let tunnel = Tunnel::create(slot, numbers.network(numbers.own), lan_mtu)?;
        // Two nodes never change at the same moment: what comes through one tunnel may be answered through another.
        let loose = sysctl::set(&format!("net/ipv4/conf/{}/rp_filter", slot.link_name()), "2");
        loose.map_err(|error| TunnelError::Kernel {
            step: error.to_string(),
            source: io::ErrorKind::Other.into(),
        })?;
        let key = tunnel.public_key();
        tunnels.insert(slot, tunnel);
        Ok((slot, key))
    }

    pub fn has_tunnels(&self) -> bool {
        !self.tunnels.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Tunnels whose interface is gone; looked at often, so it only asks the kernel for their names.
    pub fn lost_tunnels(&self) -> BTreeSet<Slot> {
        let tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        tunnels.iter().filter(|(_, tunnel)| !tunnel.is_alive()).map(|(slot, _)| *slot).collect()
    }

    /// Takes away what is left of lost tunnels, so that their places are free.
    pub fn drop_tunnels(&self, lost: &BTreeSet<Slot>) -> Result<(), NetworkError> {
        let held: BTreeSet<Slot> =
            self.tunnels.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        self.keep_tunnels(&held.difference(lost).copied().collect())
    }

    /// How a tunnel is done, for people.
    pub fn tunnel_kind(&self, slot: Slot) -> Option<&'static str> {
        self.tunnels.lock().unwrap_or_else(PoisonError::into_inner).get(&slot).map(Tunnel::kind)
    }

    /// A node's container network in the tunnel's terms.
    pub fn tunnel_peer(&self, number: u8, public_key: PublicKey, endpoint: SocketAddrV4) -> TunnelPeer {
        let network = self.config.numbers().network(number);
        TunnelPeer { public_key, endpoint, network, ula_prefix: self.config.ula_prefix }
    }

    pub fn put_tunnel_peer(&self, slot: Slot, peer: TunnelPeer) -> Result<(), TunnelError> {
        let tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        tunnels.get(&slot).map_or(Ok(()), |tunnel| tunnel.put_peer(peer))
    }

    /// Sends a peer something that it drops, so that the two shake hands before anything waits for it.
    pub fn greet_through(&self, slot: Slot, number: u8) {
        const DISCARD: u16 = 9;
        let greet = || -> io::Result<usize> {
            let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            setsockopt(&socket, sockopt::BindToDevice, &slot.link_name().into())?;
            socket.send_to(&[0], (self.config.numbers().network(number), DISCARD))
        };
        // Without it the first packet does.
        let _ = greet();
    }

    pub fn remove_tunnel_peer(&self, slot: Slot, public_key: &PublicKey) {
        let tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tunnel) = tunnels.get(&slot) {
            tunnel.remove_peer(public_key);
        }
    }

    /// Takes away every tunnel but those in `keep`, also what an earlier run has left.
    pub fn keep_tunnels(&self, keep: &BTreeSet<Slot>) -> Result<(), NetworkError> {
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        let mut tunnels = self.tunnels.lock().unwrap_or_else(PoisonError::into_inner);
        for slot in Slot::ALL.into_iter().filter(|slot| !keep.contains(slot)) {
            match tunnels.remove(&slot) {
                Some(tunnel) => tunnel.delete(),
                None => Tunnel::delete_leftover(&socket, slot),
            }
        }
        // Their routes went with them.
        let is_gone = |way: &Way| matches!(way, Way::Sealed { slot, .. } if !keep.contains(slot));
        self.ways.lock().unwrap_or_else(PoisonError::into_inner).retain(|_, way| !is_gone(way));
        Ok(())
    }

    /// The ways as they are, by node number.
    pub fn ways(&self) -> BTreeMap<u8, Way> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ways that an earlier run has made.
    fn found_ways(&self, socket: &Socket) -> io::Result<BTreeMap<u8, Way>> {
        let range = self.config.container_range.octets();
        let tunnel = link::index_of(overlay::VXLAN).ok();
        let sealed: BTreeMap<u32, Slot> = Slot::ALL
            .into_iter()
            .filter_map(|slot| Some((link::index_of(slot.link_name()).ok()?, slot)))
            .gather();
        let ways = link::routes::<Ipv4Addr>(socket)?.into_iter().filter_map(|route| {
            let (to, length) = route.to?;
            let [first, second, number, _] = to.octets();
            // Where a tunnel leads is not in the route: it is written anew.
            let to = Ipv4Addr::UNSPECIFIED;
            let way = match (route.via, sealed.get(&route.link)) {
                (_, Some(slot)) => Way::Sealed { to, slot: *slot },
                (Some(_), None) if Some(route.link) == tunnel => Way::Tunnel { to },
                (Some(via), None) => Way::Direct { via },
                (None, None) => return None,
            };
            ([first, second] == range[..2] && length == 24).then_some((number, way))
        });
        Ok(ways.gather())
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
        self.set_peers(&BTreeMap::new(), &BTreeSet::new(), &BTreeSet::new(), true)?;
        self.keep_tunnels(&BTreeSet::new())?;
        let mut dual = self.dual.write().unwrap_or_else(PoisonError::into_inner);
        let closed = self.dual_stack.close();
        let closed = closed.and(self.dual_stack.delete_table());
        *dual = Dual::Off;
        sysctl::Before::at(&self.config.run_dir)
            .restore("", foreign::is_forwarding_used(Family::Ipv4))
            .map_err(kernel("give the kernel's settings back"))?;
        let netfilter = Socket::netfilter().map_err(kernel("open nfnetlink"))?;
        nft::table::delete_table(&netfilter, Family::Ipv4).map_err(kernel("delete the nftables table"))?;
        let socket = Socket::route().map_err(kernel("open rtnetlink"))?;
        // Gone already if somebody else has tidied up.
        let _ = link::change_barrier(&socket, (self.config.container_range, 16), false);
        for name in [BRIDGE, overlay::VXLAN] {
            if let Ok(index) = link::index_of(name) {
                link::delete(&socket, index).map_err(kernel(format!("delete {name}")))?;
            }
        }
        closed
    }
}

/// What the container of this namespace has for an address.
fn address_in(path: &Path) -> Option<Ipv4Addr> {
    netns::in_netns(path, || {
        let interfaces = nix::ifaddrs::getifaddrs()?;
        let own = interfaces.filter(|interface| interface.interface_name == "eth0").find_map(|interface| {
            interface.address.as_ref().and_then(|own| own.as_sockaddr_in()).map(|own| own.ip())
        });
        Ok(own)
    })
    .ok()
    .flatten()
}

const ROUTE_LOCALNET: &str = "net/ipv4/conf/all/route_localnet";

/// Of each container's link: no redirects, which would lead past this node; no sender but the container's own address.
const LINK_SYSCTLS: [(&str, &str); 2] = [("send_redirects", "0"), ("rp_filter", "1")];

/// By the link-local address that the kernel gives each end of a link containers would reach whatever listens on this node,
/// past every rule.
fn set_ipv6_off() -> Result<(), NetworkError> {
    if !sysctl::knows_ipv6() {
        return Ok(());
    }
    sysctl::switch_ipv6("default", false)
}
