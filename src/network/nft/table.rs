//! The table `tinydc`: who answers for an address or a port, and who may talk to whom.
//!
//! There is one of IPv4 and, where the cluster has IPv6, one of that, which says the same of the addresses that embed
//! those of IPv4. It has no published ports: a relay takes what comes to them on IPv6.
//!
//! ```text
//! map vip { ipv4_addr . mark : ipv4_addr }                                       VIP . slot → endpoint
//! map pub { inet_proto . inet_service . mark : ipv4_addr . inet_service }        port . slot → endpoint
//! map pub_at { ipv4_addr . inet_proto . inet_service . mark : … }                the same for one host address
//! map vip_many, pub_many, pub_at_many    the same with more slots, for more endpoints
//! map vip_pinned, pub_pinned             the same with the slot by the client's address
//! map class  { ipv4_addr : mark }     container → the class of those in the same networks
//! set reach  { mark . ipv4_addr }     class . container it may reach
//! set inner  { ipv4_addr }            containers without a way out
//! set peers  { ipv4_addr }            the other nodes on the LAN
//! set sealed { ipv4_addr }            nodes (by their /24) whose traffic is taken from an encrypted tunnel only
//! set local  { ipv4_addr . ipv4_addr } containers here, twice: for traffic that comes back to its sender
//! set held, held_at { … inet_proto . inet_service }   published ports: nobody else answers on them
//! ```
//! A VIP answers on every port, as the containers behind it do: only the address is translated. A slot is a random
//! number for each connection, or a hash of the client's address where it is to stay with one endpoint.
//!
//! A change is one transaction, which the kernel takes whole or not at all, and touches only what changed. What is in
//! the kernel serves on while no daemon runs; a daemon's first transaction replaces the table whole.

use super::super::LINK_PREFIX;
use super::super::netlink::{Socket, attributes};
use super::super::overlay::{VXLAN, VXLAN_PORT};
use super::super::wireguard::Slot;
use super::message::{
    DELETE_TABLE, Element, Expressions, Family, NEW_TABLE, Network4, TYPE_ADDRESS, TYPE_MARK, TYPE_PROTOCOL,
    TYPE_SERVICE, Transaction,
};
use crate::model::{Gather, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;

pub const TABLE: &str = "tinydc";
/// Divisible by 1 to 6, so that few endpoints share evenly.
const FEW_SLOTS: u32 = 60;
const FEW_ENDPOINTS: usize = 6;
/// Divisible by 1 to 8. Shares of 64 endpoints differ by a twelfth.
const MANY_SLOTS: u32 = 840;
/// By which other nodes' containers come in with addresses of IPv6.
const TUNNELS: [&str; 3] = [VXLAN, Slot::First.link_name(), Slot::Second.link_name()];
const GUARD: &str = "guard";
const TCP: u8 = libc::IPPROTO_TCP as u8;
const UDP: u8 = libc::IPPROTO_UDP as u8;

/// What the rules are about.
#[derive(Clone, Debug)]
pub struct Shape {
    /// All nodes' containers.
    pub cluster: Network4,
    /// This node's containers.
    pub node: Network4,
    pub vips: Network4,
    /// Where this node listens for peers and clients: closed to containers.
    pub own_ports: BTreeSet<u16>,
}

/// A service's endpoints behind its VIP.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VipRow {
    pub endpoints: Vec<Ipv4Addr>,
    /// A client stays with one endpoint.
    pub is_pinned: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortKey {
    pub protocol: Protocol,
    pub port: u16,
    /// Only at this address of a node.
    pub host_address: Option<Ipv4Addr>,
}

/// Who answers for a published port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortRow {
    pub endpoints: Vec<(Ipv4Addr, u16)>,
    pub is_pinned: bool,
}

/// Everything that the table is to say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub vips: BTreeMap<Ipv4Addr, VipRow>,
    pub ports: BTreeMap<PortKey, PortRow>,
    pub classes: BTreeMap<Ipv4Addr, u32>,
    pub reach: BTreeSet<(u32, Ipv4Addr)>,
    pub inner: BTreeSet<Ipv4Addr>,
    pub local: BTreeSet<Ipv4Addr>,
}

/// Where the other nodes are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Neighbours {
    /// From where containers may be reached as from inside.
    pub peers: BTreeSet<Ipv4Addr>,
    /// Containers' networks whose packets come encrypted or not at all.
    pub sealed: BTreeSet<Ipv4Addr>,
    /// Where other nodes listen for peers and clients: closed to containers, who would come there as this node.
    pub doors: BTreeSet<Ipv4Addr>,
}

impl Neighbours {
    /// The nodes' own addresses are of IPv4.
    fn sets(&self, family: Family) -> Vec<(&'static str, &BTreeSet<Ipv4Addr>)> {
        let all = [("sealed", &self.sealed), ("peers", &self.peers), ("doors", &self.doors)];
        all.into_iter().take(if family.is_ipv6() { 1 } else { 3 }).collect()
    }
}

/// The table as this run has made it.
pub struct Table {
    family: Family,
    shape: Shape,
    applied: Option<Wanted>,
    neighbours: Neighbours,
    /// The kernel can hash; without it pinned services are balanced as the others are.
    has_hash: bool,
}

impl Table {
    pub fn new(family: Family, shape: Shape) -> Table {
        Table { family, shape, applied: None, neighbours: Neighbours::default(), has_hash: true }
    }

    /// Brings the kernel's table to `wanted`.
    pub fn apply(&mut self, socket: &Socket, wanted: &Wanted) -> io::Result<()> {
        if let Some(applied) = &self.applied {
            let mut change = Transaction::new(self.family);
            // There already, unless the table is gone: then the change fails, also one that changes nothing.
            change.chain("refuse");
            put_changes(&mut change, self.family, applied, wanted);
            if change.commit(socket).is_ok() {
                self.applied = Some(wanted.clone());
                return Ok(());
            }
            // Somebody flushed all tables, or changed ours: it is made anew.
        }
        self.applied = None;
        match self.replace(socket, wanted) {
            Err(error) if self.has_hash && error.raw_os_error() == Some(libc::ENOENT) => {
                self.has_hash = false;
                self.replace(socket, wanted)?;
            }
            outcome => outcome?,
        }
        self.applied = Some(wanted.clone());
        Ok(())
    }

    /// Tells where the other nodes are.
    pub fn set_neighbours(&mut self, socket: &Socket, neighbours: Neighbours) {
        if self.applied.is_some() && neighbours != self.neighbours {
            let mut change = Transaction::new(self.family);
            put_neighbours(&mut change, self.family, &self.neighbours, &neighbours);
            if change.commit(socket).is_err() {
                // Made anew with the next change.
                self.applied = None;
            }
        }
        self.neighbours = neighbours;
    }

    pub fn neighbours(&self) -> &Neighbours {
        &self.neighbours
    }

    /// Whether the kernel would take the table: it is made under another name, and gone with the same transaction.
    pub fn probe(&self, socket: &Socket) -> io::Result<()> {
        let mut all = Transaction::of(self.family, "tinydc-probe");
        all.message(NEW_TABLE, super::super::netlink::CREATE);
        self.fill(&mut all);
        all.message(DELETE_TABLE, 0);
        all.commit(socket)
    }

    fn replace(&self, socket: &Socket, wanted: &Wanted) -> io::Result<()> {
        let mut all = Transaction::new(self.family);
        renew(&mut all);
        self.fill(&mut all);
        put_changes(&mut all, self.family, &Wanted::default(), wanted);
        put_neighbours(&mut all, self.family, &Neighbours::default(), &self.neighbours);
        all.commit(socket)
    }

    /// What does not change.
    fn fill(&self, all: &mut Transaction) {
        make_sets(all, self.family);
        self.make_balancing(all);
        self.make_masquerading(all);
        self.make_isolation(all);
        self.make_source_checks(all);
        self.make_filters(all);
        self.make_local_filters(all);
    }

    fn make_balancing(&self, all: &mut Transaction) {
        let shape = &self.shape;
        let slot = 8 + self.family.words();
        let endpoint = slot + 1;
        all.chain("lb");
        for (map, slots) in [("vip", FEW_SLOTS), ("vip_many", MANY_SLOTS)] {
            all.rule("lb", |rule| {
                rule.destination_in(shape.vips, true).destination(8).random_slot(slots, slot);
                rule.look_up(map, 8, endpoint).dnat_address(endpoint);
            });
        }
        all.rule("lb", |rule| {
            rule.destination_in(shape.vips, true).destination(8);
            self.pinned_slot(rule, slot).look_up("vip_pinned", 8, endpoint).dnat_address(endpoint);
        });
        if !self.family.is_ipv6() {
            self.make_port_balancing(all);
        }
        for (chain, hook) in [("pre", 0), ("out", 3)] {
            all.base_chain(chain, "nat", hook, -100);
            if chain == "pre" {
                // Services' addresses are the cluster's own: whoever knows a route to them is refused when it is forwarded.
                all.rule(chain, |rule| {
                    rule.destination_in(shape.vips, true).source_in(shape.cluster, false).return_();
                });
            }
            all.rule(chain, |rule| {
                rule.jump("lb");
            });
        }
    }

    fn make_port_balancing(&self, all: &mut Transaction) {
        // The bridge's address is the name server's.
        all.rule("lb", |rule| {
            rule.destination_in(self.shape.cluster, true).return_();
        });
        for (map, slots) in [("pub_at", FEW_SLOTS), ("pub_at_many", MANY_SLOTS)] {
            all.rule("lb", |rule| {
                rule.destination(8).layer4_protocol(9).destination_port(10).random_slot(slots, 11);
                rule.look_up(map, 8, 12).dnat(12, 13);
            });
        }
        for (map, slots) in [("pub", FEW_SLOTS), ("pub_many", MANY_SLOTS)] {
            all.rule("lb", |rule| {
                rule.destination_is_local().layer4_protocol(8).destination_port(9).random_slot(slots, 10);
                rule.look_up(map, 8, 12).dnat(12, 13);
            });
        }
        all.rule("lb", |rule| {
            rule.destination_is_local().layer4_protocol(8).destination_port(9);
            self.pinned_slot(rule, 10).look_up("pub_pinned", 8, 12).dnat(12, 13);
        });
    }

    fn pinned_slot<'a, 'b>(&self, rule: &'a mut Expressions<'b>, register: u32) -> &'a mut Expressions<'b> {
        match self.has_hash {
            true => rule.source_slot(MANY_SLOTS, register),
            false => rule.random_slot(MANY_SLOTS, register),
        }
    }

    fn make_masquerading(&self, all: &mut Transaction) {
        let shape = &self.shape;
        all.base_chain("post", "nat", 4, 100);
        // A container that reaches itself by its service's address.
        all.rule("post", |rule| {
            rule.source(8).destination(8 + self.family.words()).is_in_set("local", 8).masquerade();
        });
        all.rule("post", |rule| {
            rule.source_in(shape.node, true).destination_in(shape.cluster, false).masquerade();
        });
        if self.family.is_ipv6() {
            return;
        }
        all.rule("post", |rule| {
            rule.was_dnat().source_in((Ipv4Addr::LOCALHOST, 8), true).masquerade();
        });
        // From outside, or by a node's address, to an endpoint on another node: the answer must come back here.
        all.rule("post", |rule| {
            rule.was_dnat()
                .original_destination_in(shape.vips, false)
                .destination_in(shape.node, false)
                .masquerade();
        });
    }

    fn make_isolation(&self, all: &mut Transaction) {
        all.chain("isolate");
        all.chain("reached");
        all.rule("reached", |rule| {
            rule.value(8, 0).set_mark(8);
        });
        all.rule("reached", |rule| {
            rule.accept();
        });
        // The mark is this table's own for a moment: what passes here goes from container to container.
        all.rule("isolate", |rule| {
            rule.source(8).look_up("class", 8, 8).set_mark(8);
        });
        all.rule("isolate", |rule| {
            rule.mark(8).destination(9).is_in_set("reach", 8).jump("reached");
        });
        all.rule("isolate", |rule| {
            rule.value(8, 0).set_mark(8);
        });
        if !self.family.is_ipv6() {
            self.make_published(all);
        }
        // Nodes themselves have the addresses that end in 0 and 1. They may come to containers, who answer them and begin
        // nothing: what another node has for its own containers is not for those of this one.
        let is_node = |side: Side, rule: &mut Expressions<'_>| {
            let zero = self.family.with_last(0, [0; 4]);
            side.address(rule, 8).mask(8, &self.family.with_last(0, [0, 0, 0, 254])).compare(8, true, &zero);
        };
        all.rule("isolate", |rule| {
            is_node(Side::Source, rule);
            rule.return_();
        });
        all.rule("isolate", |rule| {
            is_node(Side::Destination, rule);
            rule.is_new().jump("refuse");
        });
        all.rule("isolate", |rule| {
            is_node(Side::Destination, rule);
            rule.return_();
        });
        all.rule("isolate", |rule| {
            rule.jump("refuse");
        });
    }

    /// Asked for by a node's address: published, so open to everyone.
    fn make_published(&self, all: &mut Transaction) {
        let shape = &self.shape;
        all.chain("published");
        for side in [Side::Source, Side::Destination] {
            all.rule("published", |rule| {
                side.address(rule, 8).is_in_set("inner", 8).jump("refuse");
            });
        }
        all.rule("isolate", |rule| {
            rule.was_dnat().original_destination_in(shape.vips, false).jump("published");
        });
        all.rule("isolate", |rule| {
            rule.was_dnat().original_destination_in(shape.vips, false).return_();
        });
    }

    /// What nobody may have sent from where it came.
    fn make_source_checks(&self, all: &mut Transaction) {
        let shape = &self.shape;
        all.base_chain("raw", "filter", 0, -300);
        if self.family.is_ipv6() {
            // As rp_filter does it for IPv4. Ways change at another moment than those of the other node.
            for is_container in [true, false] {
                all.rule("raw", |rule| {
                    match is_container {
                        true => rule.input_link_begins_with(LINK_PREFIX),
                        false => rule.source_in(shape.cluster, true),
                    };
                    for tunnel in TUNNELS {
                        rule.input_link(tunnel, false);
                    }
                    rule.input_link("lo", false).source_is_elsewhere().drop();
                });
            }
        } else {
            // Loopback is routed (see `Network::open`), but nothing comes to it from outside.
            all.rule("raw", |rule| {
                rule.input_link("lo", false).destination_in((Ipv4Addr::LOCALHOST, 8), true).drop();
            });
        }
        for tunnel in TUNNELS {
            all.rule("raw", |rule| {
                rule.input_link(tunnel, true).source_in(shape.node, true).drop();
            });
        }
        if !self.family.is_ipv6() {
            // What a container packs up itself would come out as somebody else's.
            all.rule("raw", |rule| {
                rule.input_link_begins_with(LINK_PREFIX).is_protocol(UDP);
                rule.destination_port(8).compare(8, true, &VXLAN_PORT.to_be_bytes()).drop();
            });
        }
        all.rule("raw", |rule| {
            for slot in Slot::ALL {
                rule.input_link(slot.link_name(), false);
            }
            rule.source(8).mask(8, &self.family.with_last(255, [255, 255, 255, 0]));
            rule.is_in_set("sealed", 8).drop();
        });
    }

    fn make_filters(&self, all: &mut Transaction) {
        let shape = &self.shape;
        all.base_chain("forward", "filter", 2, 0);
        all.rule("forward", |rule| {
            rule.is_protocol(TCP).clamp_segment_size();
        });
        all.rule("forward", |rule| {
            rule.source_in(shape.cluster, true).destination_in(shape.cluster, true).jump("isolate");
        });
        for protocol in [TCP, UDP] {
            for port in &shape.own_ports {
                all.rule("forward", |rule| {
                    rule.source_in(shape.node, true);
                    match self.family {
                        Family::Ipv4 => rule.destination(8).is_in_set("doors", 8),
                        // Nodes' own addresses of IPv6 are not known.
                        Family::Ipv6(_) => rule.destination_in(shape.cluster, false),
                    };
                    rule.is_protocol(protocol);
                    rule.destination_port(8).compare(8, true, &port.to_be_bytes()).jump("refuse");
                });
            }
        }
        all.rule("forward", |rule| {
            rule.source(8).is_in_set("inner", 8).destination_in(shape.cluster, false).jump("refuse");
        });
        all.rule("forward", |rule| {
            rule.destination(8).is_in_set("inner", 8).source_in(shape.cluster, false).jump("refuse");
        });
        all.rule("forward", |rule| {
            rule.destination_in(shape.vips, true).jump("refuse");
        });
        // From outside containers are reached by published ports only, not by whoever knows a route.
        all.rule("forward", |rule| {
            rule.destination_in(shape.cluster, true).source_in(shape.cluster, false);
            if !self.family.is_ipv6() {
                rule.source(8).is_not_in_set("peers", 8);
            }
            rule.is_new().was_not_dnat().jump("refuse");
        });
    }

    /// What comes to this node itself, and what it sends.
    fn make_local_filters(&self, all: &mut Transaction) {
        let shape = &self.shape;
        all.base_chain("output", "filter", 3, 0);
        all.rule("output", |rule| {
            rule.destination_in(shape.vips, true).jump("refuse");
        });
        all.base_chain("input", "filter", 1, 0);
        for protocol in [TCP, UDP] {
            for port in &shape.own_ports {
                all.rule("input", |rule| {
                    rule.source_in(shape.cluster, true).input_link("lo", false).is_protocol(protocol);
                    rule.destination_port(8).compare(8, true, &port.to_be_bytes()).jump("refuse");
                });
            }
        }
        for protocol in [TCP, UDP] {
            all.rule("input", |rule| {
                rule.source(8).is_in_set("inner", 8).is_protocol(protocol);
                rule.destination_port(8).compare(8, false, &53u16.to_be_bytes()).jump("refuse");
            });
        }
        if self.family.is_ipv6() {
            return;
        }
        // Published, and nobody answers: refused at once. The bridge's own ports are not the published ones.
        all.rule("input", |rule| {
            rule.destination_in(shape.cluster, false).layer4_protocol(8).destination_port(9);
            rule.is_in_set("held", 8).jump("refuse");
        });
        all.rule("input", |rule| {
            rule.destination(8).layer4_protocol(9).destination_port(10).is_in_set("held_at", 8);
            rule.jump("refuse");
        });
    }
}

#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

impl Side {
    fn address<'a, 'b>(self, rule: &'a mut Expressions<'b>, register: u32) -> &'a mut Expressions<'b> {
        match self {
            Side::Source => rule.source(register),
            Side::Destination => rule.destination(register),
        }
    }
}

fn make_sets(all: &mut Transaction, family: Family) {
    for name in ["vip", "vip_many", "vip_pinned"] {
        all.map(name, &[TYPE_ADDRESS, TYPE_MARK], &[TYPE_ADDRESS]);
    }
    all.map("class", &[TYPE_ADDRESS], &[TYPE_MARK]);
    all.set("reach", &[TYPE_MARK, TYPE_ADDRESS]);
    all.set("inner", &[TYPE_ADDRESS]);
    all.set("sealed", &[TYPE_ADDRESS]);
    all.set("local", &[TYPE_ADDRESS, TYPE_ADDRESS]);
    if !family.is_ipv6() {
        make_port_sets(all);
    }
    all.chain("refuse");
    all.rule("refuse", |rule| {
        rule.is_protocol(TCP).reset();
    });
    all.rule("refuse", |rule| {
        rule.reject();
    });
}

fn make_port_sets(all: &mut Transaction) {
    let endpoint = [TYPE_ADDRESS, TYPE_SERVICE];
    for name in ["pub", "pub_many", "pub_pinned"] {
        all.map(name, &[TYPE_PROTOCOL, TYPE_SERVICE, TYPE_MARK], &endpoint);
    }
    for name in ["pub_at", "pub_at_many"] {
        all.map(name, &[TYPE_ADDRESS, TYPE_PROTOCOL, TYPE_SERVICE, TYPE_MARK], &endpoint);
    }
    all.set("peers", &[TYPE_ADDRESS]);
    all.set("doors", &[TYPE_ADDRESS]);
    all.set("held", &[TYPE_PROTOCOL, TYPE_SERVICE]);
    all.set("held_at", &[TYPE_ADDRESS, TYPE_PROTOCOL, TYPE_SERVICE]);
}

/// Puts in the table's place one that lets containers send nothing.
pub fn guard(socket: &Socket, family: Family) -> io::Result<()> {
    let mut all = Transaction::new(family);
    renew(&mut all);
    all.chain(GUARD);
    all.base_chain("raw", "filter", 0, -300);
    all.rule("raw", |rule| {
        rule.input_link_begins_with(LINK_PREFIX).drop();
    });
    all.commit(socket)
}

/// The same where somebody has deleted it.
pub fn keep_guard(socket: &Socket, family: Family) -> io::Result<()> {
    let mut change = Transaction::new(family);
    // There already, unless the table is gone: as in `Table::apply`.
    change.chain(GUARD);
    change.commit(socket).or_else(|_| guard(socket, family))
}

/// An empty table, whatever was there: making it first makes deleting a missing one no error.
fn renew(all: &mut Transaction) {
    all.message(NEW_TABLE, super::super::netlink::CREATE);
    all.message(DELETE_TABLE, 0);
    all.message(NEW_TABLE, super::super::netlink::CREATE);
}

pub fn delete_table(socket: &Socket, family: Family) -> io::Result<()> {
    let mut all = Transaction::new(family);
    // Making it first makes deleting a missing one no error.
    all.message(NEW_TABLE, super::super::netlink::CREATE);
    all.message(DELETE_TABLE, 0);
    all.commit(socket)
}

/// Whether this announcement says that the table is gone.
pub fn is_deletion(kind: u16, body: &[u8]) -> bool {
    const NAME: u16 = 1;
    let name = attributes(body.get(4..).unwrap_or_default()).find(|(kind, _)| *kind == NAME);
    kind == DELETE_TABLE && name.is_some_and(|(_, name)| name.strip_suffix(&[0]) == Some(TABLE.as_bytes()))
}

/// Elements to remove and to add, by set.
fn put_changes(change: &mut Transaction, family: Family, old: &Wanted, new: &Wanted) {
    let bytes = |address: &Ipv4Addr| family.address(*address);
    put_rows(change, &old.vips, &new.vips, |vip, row| (vip_map(row), vip_elements(family, *vip, row)));
    put_rows(change, &old.classes, &new.classes, |address, class| {
        ("class", vec![(bytes(address), class.to_ne_bytes().to_vec())])
    });
    put_set(change, "reach", &old.reach, &new.reach, |(class, address)| {
        [class.to_ne_bytes().to_vec(), bytes(address)].concat()
    });
    put_set(change, "inner", &old.inner, &new.inner, bytes);
    put_set(change, "local", &old.local, &new.local, |address| bytes(address).repeat(2));
    if !family.is_ipv6() {
        put_rows(change, &old.ports, &new.ports, |key, row| (port_map(key, row), port_elements(key, row)));
        put_set(change, "held", &held(old, false), &held(new, false), held_bytes);
        put_set(change, "held_at", &held(old, true), &held(new, true), held_bytes);
    }
}

fn held(wanted: &Wanted, has_address: bool) -> BTreeSet<PortKey> {
    wanted.ports.keys().filter(|key| key.host_address.is_some() == has_address).copied().gather()
}

fn held_bytes(key: &PortKey) -> Vec<u8> {
    let mut bytes = key.host_address.map(|at| at.octets().to_vec()).unwrap_or_default();
    bytes.extend([protocol_number(key.protocol), 0, 0, 0]);
    bytes.extend(padded(key.port));
    bytes
}

fn put_rows<K: Ord, V: PartialEq>(
    change: &mut Transaction,
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
    elements: impl Fn(&K, &V) -> (&'static str, Vec<Element>),
) {
    let (mut removed, mut added): (BTreeMap<_, Vec<Element>>, BTreeMap<_, Vec<Element>>) = Default::default();
    for (key, before) in old {
        let after = new.get(key);
        if after == Some(before) {
            continue;
        }
        let (map, gone) = elements(key, before);
        let (map_after, come) = after.map(|after| elements(key, after)).unwrap_or((map, Vec::new()));
        // What stays the same is not touched.
        let stays = |element: &Element, others: &[Element]| map == map_after && others.contains(element);
        removed.entry(map).or_default().extend(gone.iter().filter(|e| !stays(e, &come)).cloned());
        added.entry(map_after).or_default().extend(come.iter().filter(|e| !stays(e, &gone)).cloned());
    }
    for (key, after) in new.iter().filter(|(key, _)| !old.contains_key(key)) {
        let (map, come) = elements(key, after);
        added.entry(map).or_default().extend(come);
    }
    removed.iter().for_each(|(map, elements)| change.remove(map, elements));
    added.iter().for_each(|(map, elements)| change.add(map, elements));
}

fn put_set<T: Ord>(
    change: &mut Transaction,
    name: &str,
    old: &BTreeSet<T>,
    new: &BTreeSet<T>,
    key: impl Fn(&T) -> Vec<u8>,
) {
    let elements = |rows: Vec<&T>| rows.into_iter().map(|row| (key(row), Vec::new())).collect::<Vec<_>>();
    change.remove(name, &elements(old.difference(new).collect()));
    change.add(name, &elements(new.difference(old).collect()));
}

fn put_neighbours(change: &mut Transaction, family: Family, old: &Neighbours, new: &Neighbours) {
    for ((name, old), (_, new)) in old.sets(family).into_iter().zip(new.sets(family)) {
        put_set(change, name, old, new, |address| family.address(*address));
    }
}

fn vip_elements(family: Family, vip: Ipv4Addr, row: &VipRow) -> Vec<Element> {
    let element = |(slot, endpoint): (u32, Ipv4Addr)| {
        let key = [family.address(vip), slot.to_ne_bytes().to_vec()].concat();
        (key, family.address(endpoint))
    };
    slots(&row.endpoints, row.is_pinned).into_iter().map(element).collect()
}

fn vip_map(row: &VipRow) -> &'static str {
    match row.is_pinned {
        true => "vip_pinned",
        false if row.endpoints.len() > FEW_ENDPOINTS => "vip_many",
        false => "vip",
    }
}

fn port_map(key: &PortKey, row: &PortRow) -> &'static str {
    match (key.host_address, row.is_pinned, row.endpoints.len() > FEW_ENDPOINTS) {
        (Some(_), _, true) => "pub_at_many",
        (Some(_), _, false) => "pub_at",
        (None, true, _) => "pub_pinned",
        (None, false, true) => "pub_many",
        (None, false, false) => "pub",
    }
}

fn port_elements(key: &PortKey, row: &PortRow) -> Vec<Element> {
    slots(&row.endpoints, row.is_pinned && key.host_address.is_none())
        .into_iter()
        .map(|(slot, (address, port))| {
            let mut bytes = held_bytes(key);
            bytes.extend(slot.to_ne_bytes());
            (bytes, [address.octets(), padded(port)].concat())
        })
        .collect()
}

/// Who has which slot. Even; or, where clients are pinned, such that a slot moves only if its endpoint went or a new
/// one takes it.
fn slots<T: Copy + Ord + std::hash::Hash>(endpoints: &[T], is_pinned: bool) -> Vec<(u32, T)> {
    let count = endpoints.len();
    if count == 0 {
        return Vec::new();
    }
    let total = if is_pinned || count > FEW_ENDPOINTS { MANY_SLOTS } else { FEW_SLOTS };
    let chosen = |slot: u32| match is_pinned {
        false => endpoints[(u64::from(slot) * count as u64 / u64::from(total)) as usize],
        true => *endpoints
            .iter()
            .max_by_key(|endpoint| (weight(slot, *endpoint), **endpoint))
            .unwrap_or(&endpoints[0]),
    };
    (0..total).map(|slot| (slot, chosen(slot))).collect()
}

/// FNV-1a with a final mix: the same on each node and in each version.
fn weight<T: std::hash::Hash>(slot: u32, endpoint: &T) -> u64 {
    struct Fnv(u64);
    impl std::hash::Hasher for Fnv {
        fn finish(&self) -> u64 {
            let mixed = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
            mixed ^ (mixed >> 33)
        }
        fn write(&mut self, bytes: &[u8]) {
            for byte in bytes {
                self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
    }
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325);
    std::hash::Hash::hash(&(slot, endpoint), &mut hasher);
    std::hash::Hasher::finish(&hasher)
}

fn padded(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(lasts: impl IntoIterator<Item = u8>) -> Vec<Ipv4Addr> {
        lasts.into_iter().map(|last| Ipv4Addr::new(10, 77, 1, last)).collect()
    }

    #[test]
    fn endpoints_share_the_slots_evenly() {
        for count in 1..=6u8 {
            let all = slots(&addresses(1..=count), false);
            for endpoint in addresses(1..=count) {
                let own = all.iter().filter(|(_, address)| *address == endpoint).count();
                assert_eq!(own, 60 / usize::from(count));
            }
        }
        assert!(slots::<Ipv4Addr>(&[], false).is_empty());
        let many = slots(&addresses(1..=200), false);
        for endpoint in addresses(1..=200) {
            let own = many.iter().filter(|(_, address)| *address == endpoint).count();
            assert!((4..=5).contains(&own), "{endpoint} has {own} of {}", many.len());
        }
    }

    #[test]
    fn a_pinned_slot_moves_only_with_its_endpoint() {
        let before = slots(&addresses(1..=4), true);
        let after = slots(&addresses([1, 2, 4]), true);
        for ((slot, old), (_, new)) in before.iter().zip(&after) {
            assert!(old == new || *old == Ipv4Addr::new(10, 77, 1, 3), "slot {slot}");
        }
        for endpoint in addresses(1..=4) {
            assert!(before.iter().filter(|(_, address)| *address == endpoint).count() >= 5);
        }
    }
}
