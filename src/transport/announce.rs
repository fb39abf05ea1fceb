//! Finding members whose address changed: UDP broadcast, mDNS, and the names in the node's config.
//!
//! A lonely node says every 5 s, on every interface, under which hash of the cluster id, node id and port it can be
//! reached; who hears it dials it and answers. An announcement is a hint: it makes this node dial, TLS decides. It
//! carries no name and no id of the cluster, and nothing is written to disk for it.
//!
//! Broadcasts use a port of their own, three above the listen port (7403), because quinn owns the listen port's socket
//! and several nodes of one machine may share this one; answers go to the asker's own socket. mDNS: service
//! `_tinydc._udp.local`, TXT `c=` hash, `n=` node, `p=` port. The same socket answers for the node's and the cluster's
//! names (`local_names`).
//!
//! Invariant: a whole site that got new addresses forms again with nothing typed (`tests::a_renumbered_site_forms_again`).

use crate::model::Order;
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use async_io::{Async, Timer};
use futures_lite::future;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use rustix::net::{AddressFamily, SocketType, sockopt};
use serde::{Deserialize, Serialize};
use simple_dns::rdata::{PTR, RData, SRV, TXT};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QTYPE, Question, ResourceRecord, TYPE};
use tracing::debug;

use super::dial;
use super::executor::{lock, within};
use super::ids::NodeId;
use super::local_names::{Asked, LocalNames};
use super::serve;
use super::table::Shared;

const EVERY: Duration = Duration::from_secs(5);
/// A node that becomes lonely announces itself within this.
const STEP: Duration = Duration::from_millis(500);
const PORT_OFFSET: u16 = 3;
const MAGIC: &[u8] = b"tinydc announcement 1 ";
pub(super) const MDNS_GROUP: Ipv4Addr = Ipv4Addr::new(224, 0, 0, 251);
pub(super) const MDNS_PORT: u16 = 5353;
pub(super) const SERVICE: &str = "_tinydc._udp.local";
pub(super) const MDNS_TTL_SECONDS: u32 = 120;
const ANSWERS_A_SECOND_MAX: u32 = 20;
/// Turns in which nodes answer for the cluster's name, over a tenth of a second.
const STEPS: u64 = 10;
const RESOLVE_LIMIT: Duration = Duration::from_secs(3);
/// Networks that tinydc or Docker make for containers: nobody else is there.
const CONTAINER_INTERFACES: [&str; 5] = ["tdc", "veth", "docker", "br-", "cni"];

/// Wire form: postcard after `MAGIC`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Announcement {
    cluster: [u8; 16],
    node: NodeId,
    port: u16,
    is_answer: bool,
}

/// One instance of a service, as other mDNS tools see it too.
pub(super) fn service_response(
    (service, instance): (&str, &str),
    (host, port): (&str, u16),
    strings: &[String],
) -> Option<Vec<u8>> {
    let (service, instance) = (Name::new(service).ok()?, Name::new(instance).ok()?);
    let mut txt = TXT::new();
    strings.iter().try_for_each(|text| txt.add_string(text)).ok()?;
    let srv = SRV { priority: 0, weight: 0, port, target: Name::new(host).ok()? };
    let mut packet = Packet::new_reply(0);
    packet.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
    let record = |name: &Name<'_>, data| {
        ResourceRecord::new(name.clone().into_owned(), CLASS::IN, MDNS_TTL_SECONDS, data)
    };
    packet.answers.push(record(&service, RData::PTR(PTR(instance.clone()))));
    packet.answers.push(record(&instance, RData::SRV(srv)));
    packet.answers.push(record(&instance, RData::TXT(txt)));
    packet.build_bytes_vec().ok()
}

impl Announcement {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(postcard::to_allocvec(self).expect("numbers always encode"));
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Announcement> {
        postcard::from_bytes(bytes.strip_prefix(MAGIC)?).ok()
    }

    fn cluster_text(&self) -> String {
        self.cluster.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What other mDNS tools see too.
    fn to_mdns_response(self) -> Option<Vec<u8>> {
        let cluster = self.cluster_text();
        let instance = format!("{}-{}.{SERVICE}", self.node, &cluster[..8]);
        let host = format!("{}-{}.local", self.node, &cluster[..8]);
        let strings = [format!("c={cluster}"), format!("n={}", self.node.0), format!("p={}", self.port)];
        service_response((SERVICE, &instance), (&host, self.port), &strings)
    }

    fn from_mdns_response(packet: &Packet<'_>) -> Vec<Announcement> {
        let records = packet.answers.iter().chain(&packet.additional_records);
        let texts = records.filter(|record| record.name.to_string().ends_with(SERVICE));
        texts
            .filter_map(|record| match &record.rdata {
                RData::TXT(txt) => Announcement::from_attributes(txt),
                _ => None,
            })
            .collect()
    }

    fn from_attributes(txt: &TXT<'_>) -> Option<Announcement> {
        let text = |wanted: &str| {
            let (_, value) = txt.iter_raw().find(|(key, _)| *key == wanted.as_bytes())?;
            std::str::from_utf8(value?).ok()
        };
        let cluster = u128::from_str_radix(text("c")?, 16).ok()?.to_be_bytes();
        let (node, port) = (NodeId(text("n")?.parse().ok()?), text("p")?.parse().ok()?);
        Some(Announcement { cluster, node, port, is_answer: true })
    }
}

fn mdns_query() -> Option<Vec<u8>> {
    let mut packet = Packet::new_query(0);
    let name = Name::new(SERVICE).ok()?;
    packet.questions.push(Question::new(name, QTYPE::TYPE(TYPE::PTR), CLASS::IN.into(), false));
    packet.build_bytes_vec().ok()
}

#[derive(Clone, Debug)]
pub(super) struct Interface {
    pub address: IpAddr,
    netmask: Option<Ipv4Addr>,
    broadcast: Option<Ipv4Addr>,
    pub is_loopback: bool,
}

/// Read anew each time: addresses come and go.
fn interfaces() -> Vec<Interface> {
    let Ok(entries) = getifaddrs() else { return Vec::new() };
    entries
        .filter(|entry| entry.flags.contains(InterfaceFlags::IFF_UP))
        .filter(|entry| !CONTAINER_INTERFACES.iter().any(|prefix| entry.interface_name.starts_with(prefix)))
        .filter_map(|entry| {
            let is_loopback = entry.flags.contains(InterfaceFlags::IFF_LOOPBACK);
            let storage = entry.address?;
            let address = match (storage.as_sockaddr_in(), storage.as_sockaddr_in6()) {
                (Some(address), _) => IpAddr::V4(address.ip()),
                (_, Some(address)) => IpAddr::V6(address.ip()),
                _ => return None,
            };
            let broadcast = if is_loopback {
                // Linux routes 127.255.255.255 as a broadcast, though the interface doesn't say so.
                Some(Ipv4Addr::new(127, 255, 255, 255))
            } else {
                entry.broadcast.and_then(|storage| Some(storage.as_sockaddr_in()?.ip()))
            };
            let netmask = entry.netmask.and_then(|storage| Some(storage.as_sockaddr_in()?.ip()));
            Some(Interface { address, netmask, broadcast, is_loopback })
        })
        .collect()
}

/// The interfaces that a listen address covers.
pub(super) fn covered_by(listen: IpAddr) -> Vec<Interface> {
    let covers = |interface: &Interface| {
        if listen.is_unspecified() {
            !interface.is_loopback
        } else {
            listen == interface.address || (listen.is_loopback() && interface.is_loopback)
        }
    };
    interfaces().into_iter().filter(covers).collect()
}

impl Interface {
    /// Its own address, if `other` is on the same network.
    fn beside(&self, other: IpAddr) -> Option<Ipv4Addr> {
        let (IpAddr::V4(own), IpAddr::V4(other), Some(mask)) = (self.address, other, self.netmask) else {
            return None;
        };
        let network = |address: Ipv4Addr| u32::from(address) & u32::from(mask);
        (network(own) == network(other)).then_some(own)
    }
}

/// Where this machine can be reached: no loopback, no link-local IPv6, no container networks.
pub(super) fn interface_addresses() -> Vec<IpAddr> {
    let is_link_local = |address: &IpAddr| match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    let outside = interfaces().into_iter().filter(|interface| !interface.is_loopback);
    outside.map(|interface| interface.address).filter(|address| !is_link_local(address)).collect()
}

/// A socket on a port that other processes may use too.
pub(super) fn shared_socket(port: u16) -> io::Result<Async<UdpSocket>> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port))?;
    Async::new(UdpSocket::from(socket))
}

/// To the mDNS group on the interface with this address. A failure is as normal as in `announce`. Only one task sends
/// so: the interface is the socket's.
pub(super) fn multicast_on(mdns: &Async<UdpSocket>, interface: Ipv4Addr, packet: &[u8]) {
    if sockopt::set_ip_multicast_if(mdns, &interface).is_ok() {
        let _ = mdns.get_ref().send_to(packet, (MDNS_GROUP, MDNS_PORT));
    }
}

/// To the mDNS group on each of these interfaces.
pub(super) fn multicast_on_all(mdns: &Async<UdpSocket>, interfaces: &[Interface], packets: &[Vec<u8>]) {
    for interface in interfaces {
        let IpAddr::V4(address) = interface.address else { continue };
        if !interface.is_loopback {
            packets.iter().for_each(|packet| multicast_on(mdns, address, packet));
        }
    }
}

pub(super) fn join_groups(mdns: &Async<UdpSocket>, interfaces: &[Interface]) {
    for interface in interfaces {
        if let (IpAddr::V4(address), false) = (interface.address, interface.is_loopback) {
            // Fails where it has joined already.
            let _ = mdns.get_ref().join_multicast_v4(&MDNS_GROUP, &address);
        }
    }
}

/// An answer that other nodes give too: each in its turn, so that the asker isn't flooded (RFC 6762 6).
struct Later {
    at: Instant,
    message: Vec<u8>,
    interface: Ipv4Addr,
}

struct Announcer {
    shared: Arc<Shared>,
    port: u16,
    /// No other program of this machine has the mDNS port.
    is_alone: bool,
    /// Sends announcements and gets the answers.
    own: Arc<Async<UdpSocket>>,
}

impl Announcer {
    fn announcement(&self, is_answer: bool) -> Announcement {
        Announcement {
            cluster: super::ids::announced_hash(self.shared.membership.cluster_id),
            node: self.shared.node_id(),
            port: self.shared.listen_port,
            is_answer,
        }
    }

    fn covered(&self) -> Vec<Interface> {
        covered_by(self.shared.config.listen.ip())
    }

    /// Failures are normal while interfaces come and go; the next round tries again.
    async fn announce(&self, mdns: Option<&Async<UdpSocket>>) {
        let datagram = self.announcement(false).encode();
        let packets = [self.announcement(false).to_mdns_response(), mdns_query()];
        if let Some(mdns) = mdns {
            self.multicast(mdns, &packets.into_iter().flatten().collect::<Vec<_>>());
        }
        let mut broadcasts: Vec<Ipv4Addr> =
            self.covered().iter().filter_map(|interface| interface.broadcast).collect();
        broadcasts.order();
        broadcasts.dedup();
        for broadcast in broadcasts {
            if let Err(error) = self.own.get_ref().send_to(&datagram, (broadcast, self.port)) {
                debug!(%broadcast, error = %error, "announcement not sent");
            }
        }
    }

    fn multicast(&self, mdns: &Async<UdpSocket>, packets: &[Vec<u8>]) {
        multicast_on_all(mdns, &self.covered(), packets);
    }

    /// Whether it deserves an answer.
    fn heard(&self, announcement: Announcement, source: SocketAddr) -> bool {
        let own = self.announcement(false);
        if announcement.cluster != own.cluster || announcement.node == own.node {
            return false;
        }
        self.shared.hint(announcement.node, SocketAddr::new(source.ip(), announcement.port));
        !announcement.is_answer
    }

    async fn listen_broadcasts(&self, socket: &Async<UdpSocket>) {
        let mut buffer = [0; 256];
        let mut answers = Answers::default();
        while let Ok((length, source)) = socket.recv_from(&mut buffer).await {
            let Some(announcement) = Announcement::decode(&buffer[..length]) else { continue };
            if self.heard(announcement, source) && answers.allow(Instant::now()) {
                let answer = self.announcement(true).encode();
                let _ = self.own.get_ref().send_to(&answer, source);
            }
        }
    }

    async fn listen_mdns(&self, socket: &Async<UdpSocket>) {
        let mut buffer = [0; 1500];
        let (mut answers, mut name_answers) = (Answers::default(), Answers::default());
        let mut later = VecDeque::<Later>::new();
        loop {
            let due = later.front().map(|later| later.at);
            let received = future::or(async { Some(socket.recv_from(&mut buffer).await) }, async {
                match due {
                    Some(at) => Timer::at(at).await,
                    None => future::pending().await,
                };
                None
            });
            let (length, source) = match received.await {
                Some(Ok(received)) => received,
                Some(Err(_)) => return,
                None => {
                    later.drain(..1).for_each(|later| multicast_on(socket, later.interface, &later.message));
                    continue;
                }
            };
            let Ok(packet) = Packet::parse(&buffer[..length]) else { continue };
            if packet.has_flags(PacketFlag::RESPONSE) {
                for announcement in Announcement::from_mdns_response(&packet) {
                    self.heard(announcement, source);
                }
                lock(&self.shared.waiting).note(&packet, source, Instant::now());
                continue;
            }
            let asks = packet.questions.iter().any(|question| question.qname.to_string() == SERVICE);
            if asks && answers.allow(Instant::now()) {
                // By multicast (RFC 6762 6): the asker may share port 5353 with another responder, which would
                // get what is sent to its address.
                self.multicast(socket, self.announcement(true).to_mdns_response().as_slice());
            }
            let names = lock(&self.shared.local_names).clone();
            if names.are_asked(&packet) && name_answers.allow(Instant::now()) {
                later.extend(self.answer_names(&names, &packet, source, socket));
            }
        }
    }

    /// Sends what is due at once, and returns what other nodes would send at the same time.
    fn answer_names(
        &self,
        names: &LocalNames,
        packet: &Packet<'_>,
        source: SocketAddr,
        socket: &Async<UdpSocket>,
    ) -> Option<Later> {
        // From another network it would be a forgery (RFC 6762 11), or a way to make this node send to a victim.
        let beside = |interface: Interface| interface.beside(source.ip());
        let addresses: Vec<Ipv4Addr> = self.covered().into_iter().filter_map(beside).collect();
        let interface = *addresses.first()?;
        let asked = Asked { source, addresses: &addresses, is_alone: self.is_alone };
        let answers = names.answers(packet, &asked);
        if let Some(message) = answers.to_group {
            multicast_on(socket, interface, &message);
        }
        if let Some(message) = answers.to_asker {
            // Lost as any datagram may be; it asks again.
            let _ = socket.get_ref().send_to(&message, source);
        }
        let number = self.shared.node_id().0 % STEPS;
        let wait = Duration::from_millis(20 + 100 / STEPS * number);
        let message = answers.to_group_later?;
        Some(Later { at: Instant::now() + wait, message, interface })
    }

    /// Announces at once when this node becomes lonely, then every 5 s while it is.
    async fn tick(&self, mdns: Option<&Async<UdpSocket>>) {
        let mut due = Instant::now();
        let mut groups_due = due;
        loop {
            let now = Instant::now();
            if let (Some(mdns), true) = (mdns, now >= groups_due) {
                join_groups(mdns, &self.covered());
                groups_due = now + EVERY;
            }
            if self.shared.is_lonely.load(Ordering::Relaxed) && now >= due {
                due = now + EVERY;
                self.announce(mdns).await;
                self.dial_names().await;
            }
            Timer::after(STEP).await;
        }
    }

    /// The `peers` of the config; they may name any member, or this node.
    async fn dial_names(&self) {
        for name in self.shared.config.peer_names.clone() {
            let port = self.shared.listen_port;
            let resolve = crate::tasks::unblock(move || match name.to_socket_addrs() {
                Ok(addresses) => addresses.collect(),
                Err(_) => {
                    (name.as_str(), port).to_socket_addrs().map_or_else(|_| Vec::new(), Iterator::collect)
                }
            });
            let addresses: Vec<SocketAddr> = within(RESOLVE_LIMIT, resolve).await.unwrap_or_default();
            for address in addresses {
                if !self.is_connected(address) {
                    // The reason was logged or told where it arose.
                    let _ = dial::dial(&self.shared, address, None).await;
                }
            }
        }
    }

    fn is_connected(&self, address: SocketAddr) -> bool {
        let table = lock(&self.shared.table);
        let mut links = table.slots.values().filter_map(|slot| slot.link.as_ref());
        links.any(|link| serve::remote_address(&link.connection) == address)
    }
}

/// Bounds how often this node answers, so that it is no use as a reflector.
#[derive(Default)]
pub(super) struct Answers {
    second: Option<Instant>,
    given: u32,
}

impl Answers {
    pub fn allow(&mut self, now: Instant) -> bool {
        if self.second.is_none_or(|second| now.duration_since(second) >= Duration::from_secs(1)) {
            (self.second, self.given) = (Some(now), 0);
        }
        self.given += 1;
        self.given <= ANSWERS_A_SECOND_MAX
    }
}

/// Runs until the transport stops. A socket that can't be opened leaves the other ways.
pub(super) async fn run(shared: Arc<Shared>) {
    let port = shared.config.announce_port.unwrap_or(shared.listen_port.saturating_add(PORT_OFFSET));
    let listen = match shared.config.listen.ip() {
        address @ IpAddr::V4(_) => address,
        IpAddr::V6(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
    };
    let own = UdpSocket::bind((listen, 0)).and_then(|socket| {
        socket.set_broadcast(true)?;
        Async::new(socket)
    });
    let own = match own {
        Ok(own) => Arc::new(own),
        Err(error) => return debug!(error = %error, "announcements are off"),
    };
    // Without the option that shares a port, this fails while anybody has it.
    let is_alone = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, MDNS_PORT)).is_ok();
    let announcer = Announcer { shared, port, is_alone, own: own.clone() };
    let open = |port: u16| {
        shared_socket(port).inspect_err(|error| debug!(port, error = %error, "announcements not heard")).ok()
    };
    let broadcasts = open(port);
    let mdns = if listen.is_loopback() { None } else { open(MDNS_PORT) };
    if let Some(mdns) = &mdns {
        // RFC 6762 11: receivers may ignore what came through a router.
        let _ = sockopt::set_ip_multicast_ttl(mdns, 255);
    }
    let hear_broadcasts = async {
        match &broadcasts {
            Some(socket) => announcer.listen_broadcasts(socket).await,
            None => future::pending().await,
        }
    };
    let hear_mdns = async {
        match &mdns {
            Some(socket) => announcer.listen_mdns(socket).await,
            None => future::pending().await,
        }
    };
    let listening = future::zip(future::zip(hear_broadcasts, announcer.listen_broadcasts(&own)), hear_mdns);
    future::or(announcer.tick(mdns.as_ref()), async {
        listening.await;
        future::pending().await
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announcement_reads_back_from_both_forms() {
        let announcement =
            Announcement { cluster: [0xab; 16], node: NodeId(12), port: 7400, is_answer: true };
        assert_eq!(Announcement::decode(&announcement.encode()), Some(announcement));
        let bytes = announcement.to_mdns_response().unwrap();
        let packet = Packet::parse(&bytes).unwrap();
        assert_eq!(Announcement::from_mdns_response(&packet), [announcement]);
        assert!(mdns_query().is_some());
    }

    #[test]
    fn garbage_is_no_announcement() {
        let mut bytes =
            Announcement { cluster: [1; 16], node: NodeId(1), port: 1, is_answer: false }.encode();
        assert_eq!(Announcement::decode(b"hello"), None);
        assert_eq!(Announcement::decode(MAGIC), None);
        bytes.pop();
        assert_eq!(Announcement::decode(&bytes), None);
    }
}
