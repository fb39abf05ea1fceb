//! Messages of nfnetlink: transactions, sets, rules, and the expressions that rules are made of.
//!
//! Numbers are those of linux/netfilter/nf_tables.h. Registers are 4 bytes wide, numbered from 8.

use super::super::netlink::{APPEND, Batch, CREATE, Socket};
use super::table::TABLE;
use crate::model::UlaPrefix;
use std::io;
use std::net::Ipv4Addr;

/// An attribute's length has 16 bits: elements go in messages of this many.
const ELEMENTS_PER_MESSAGE: usize = 256;
const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
pub const NEW_TABLE: u16 = SUBSYSTEM;
pub const DELETE_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENT: u16 = SUBSYSTEM | 12;
const DELETE_ELEMENT: u16 = SUBSYSTEM | 14;
/// What `nft list` shows keys as.
pub const TYPE_ADDRESS: u32 = 7;
const TYPE_ADDRESS6: u32 = 8;
pub const TYPE_PROTOCOL: u32 = 12;
pub const TYPE_SERVICE: u32 = 13;
pub const TYPE_MARK: u32 = 19;
/// Of `meta`.
const MARK: u32 = 3;

/// Whose addresses a table is about. What is said in IPv4 addresses means, in a table of IPv6, those that embed them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    Ipv4,
    Ipv6(UlaPrefix),
}

impl Family {
    fn number(self) -> u8 {
        match self {
            Family::Ipv4 => libc::AF_INET as u8,
            Family::Ipv6(_) => libc::AF_INET6 as u8,
        }
    }

    pub fn is_ipv6(self) -> bool {
        matches!(self, Family::Ipv6(_))
    }

    /// How many registers an address takes.
    pub fn words(self) -> u32 {
        if self.is_ipv6() { 4 } else { 1 }
    }

    fn address_bytes(self) -> u32 {
        4 * self.words()
    }

    pub fn address(self, address: Ipv4Addr) -> Vec<u8> {
        match self {
            Family::Ipv4 => address.octets().into(),
            Family::Ipv6(prefix) => prefix.embed(address).octets().into(),
        }
    }

    /// The mask of a network, whose length is that of the IPv4 one.
    fn network_mask(self, length: u8) -> Vec<u8> {
        let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
        self.with_last(0xff, mask.to_be_bytes())
    }

    /// As long as an address, with these last bytes.
    pub fn with_last(self, first: u8, last: [u8; 4]) -> Vec<u8> {
        let mut bytes = vec![first; self.address_bytes() as usize - last.len()];
        bytes.extend(last);
        bytes
    }

    fn type_and_bytes(self, kind: u32) -> (u32, u32) {
        match kind {
            TYPE_ADDRESS if self.is_ipv6() => (TYPE_ADDRESS6, 16),
            kind => (kind, 4),
        }
    }
}

fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// Type and length of a key or value of several.
fn concatenated(family: Family, types: &[u32]) -> (u32, u32) {
    let all = types.iter().map(|kind| family.type_and_bytes(*kind));
    all.fold((0, 0), |(types, bytes), (kind, length)| ((types << 6) | kind, bytes + length))
}

/// Expressions of one rule.
pub struct Expressions<'a> {
    batch: &'a mut Batch,
    family: Family,
}

impl Expressions<'_> {
    fn add(&mut self, name: &str, fill: impl FnOnce(&mut Batch)) -> &mut Self {
        self.batch.nested(1, |batch| {
            batch.text(1, name).nested(2, fill);
        });
        self
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) -> &mut Self {
        self.add("payload", |b| {
            b.big(1, register).big(2, base).big(3, offset).big(4, length);
        })
    }

    pub fn source(&mut self, register: u32) -> &mut Self {
        let offset = if self.family.is_ipv6() { 8 } else { 12 };
        self.payload(1, offset, self.family.address_bytes(), register)
    }

    pub fn destination(&mut self, register: u32) -> &mut Self {
        let offset = if self.family.is_ipv6() { 24 } else { 16 };
        self.payload(1, offset, self.family.address_bytes(), register)
    }

    pub fn destination_port(&mut self, register: u32) -> &mut Self {
        self.payload(2, 2, 2, register)
    }

    fn meta(&mut self, key: u32, register: u32) -> &mut Self {
        self.add("meta", |b| {
            b.big(2, key).big(1, register);
        })
    }

    pub fn layer4_protocol(&mut self, register: u32) -> &mut Self {
        self.meta(16, register)
    }

    pub fn compare(&mut self, register: u32, is_equal: bool, value: &[u8]) -> &mut Self {
        self.add("cmp", |b| {
            b.big(1, register).big(2, u32::from(!is_equal)).nested(3, |b| {
                b.attribute(1, value);
            });
        })
    }

    pub fn mask(&mut self, register: u32, mask: &[u8]) -> &mut Self {
        let zero = vec![0; mask.len()];
        self.add("bitwise", |b| {
            b.big(1, register).big(2, register).big(3, mask.len() as u32);
            b.nested(4, |b| {
                b.attribute(1, mask);
            });
            b.nested(5, |b| {
                b.attribute(1, &zero);
            });
        })
    }

    pub fn source_in(&mut self, network: Network4, is_in: bool) -> &mut Self {
        self.source(8);
        self.compare_network(network, is_in)
    }

    pub fn destination_in(&mut self, network: Network4, is_in: bool) -> &mut Self {
        self.destination(8);
        self.compare_network(network, is_in)
    }

    fn compare_network(&mut self, (address, length): Network4, is_in: bool) -> &mut Self {
        let mask = self.family.network_mask(length);
        let network: Vec<u8> =
            self.family.address(address).iter().zip(&mask).map(|(byte, mask)| byte & mask).collect();
        self.mask(8, &mask);
        self.compare(8, is_in, &network)
    }

    pub fn input_link(&mut self, name: &str, is_equal: bool) -> &mut Self {
        self.meta(6, 8);
        self.compare(8, is_equal, &link_name(name))
    }

    pub fn input_link_begins_with(&mut self, name: &str) -> &mut Self {
        self.meta(6, 8);
        self.compare(8, true, name.as_bytes())
    }

    /// Answers to the source would not leave by the link that it came in by.
    pub fn source_is_elsewhere(&mut self) -> &mut Self {
        const SOURCE: u32 = 1;
        const INPUT_LINK: u32 = 8;
        const WHETHER: u32 = 32;
        const OUTPUT_LINK: u32 = 1;
        self.add("fib", |b| {
            b.big(3, SOURCE | INPUT_LINK | WHETHER).big(2, OUTPUT_LINK).big(1, 8);
        });
        self.compare(8, true, &[0; 4])
    }

    pub fn destination_is_local(&mut self) -> &mut Self {
        self.add("fib", |b| {
            b.big(3, 2).big(2, 3).big(1, 8);
        });
        self.compare(8, true, &2u32.to_ne_bytes())
    }

    /// A number below `slots`, another one for each connection.
    pub fn random_slot(&mut self, slots: u32, register: u32) -> &mut Self {
        self.add("numgen", |b| {
            b.big(1, register).big(2, slots).big(3, 1).big(4, 0);
        })
    }

    /// A number below `slots` that is the source address's own, the same on each node.
    pub fn source_slot(&mut self, slots: u32, register: u32) -> &mut Self {
        const SEED: u32 = 0x7464_6330;
        self.source(register);
        let length = self.family.address_bytes();
        self.add("hash", |b| {
            b.big(1, register).big(2, register).big(3, length).big(4, slots).big(5, SEED).big(7, 0);
        })
    }

    pub fn look_up(&mut self, map: &str, key: u32, result: u32) -> &mut Self {
        self.add("lookup", |b| {
            b.text(1, map).big(2, key).big(3, result);
        })
    }

    pub fn is_not_in_set(&mut self, set: &str, key: u32) -> &mut Self {
        const INVERTED: u32 = 1;
        self.add("lookup", |b| {
            b.text(1, set).big(2, key).big(5, INVERTED);
        })
    }

    pub fn is_in_set(&mut self, set: &str, key: u32) -> &mut Self {
        self.add("lookup", |b| {
            b.text(1, set).big(2, key);
        })
    }

    /// To another address; the port stays.
    pub fn dnat_address(&mut self, address: u32) -> &mut Self {
        let family = u32::from(self.family.number());
        self.add("nat", |b| {
            b.big(1, 1).big(2, family).big(3, address);
        })
    }

    pub fn dnat(&mut self, address: u32, port: u32) -> &mut Self {
        let family = u32::from(self.family.number());
        self.add("nat", |b| {
            b.big(1, 1).big(2, family).big(3, address).big(5, port);
        })
    }

    pub fn masquerade(&mut self) -> &mut Self {
        self.add("masq", |_| {})
    }

    /// The first packet of a connection.
    pub fn is_new(&mut self) -> &mut Self {
        const STATE: u32 = 0;
        const NEW: u32 = 8;
        self.add("ct", |b| {
            b.big(2, STATE).big(1, 8);
        });
        self.mask(8, &NEW.to_ne_bytes());
        self.compare(8, false, &[0; 4])
    }

    pub fn was_not_dnat(&mut self) -> &mut Self {
        self.has_dnat_status(false)
    }

    pub fn was_dnat(&mut self) -> &mut Self {
        self.has_dnat_status(true)
    }

    fn has_dnat_status(&mut self, has: bool) -> &mut Self {
        const STATUS_DNAT: u32 = 0x20;
        self.add("ct", |b| {
            b.big(2, 2).big(1, 8);
        });
        self.mask(8, &STATUS_DNAT.to_ne_bytes());
        self.compare(8, !has, &[0; 4])
    }

    /// The address that the connection was opened to, before it was translated.
    pub fn original_destination_in(&mut self, network: Network4, is_in: bool) -> &mut Self {
        const DESTINATION_IP: u32 = 20;
        self.add("ct", |b| {
            b.big(2, DESTINATION_IP).big(1, 8).byte(3, 0);
        });
        self.compare_network(network, is_in)
    }

    pub fn is_protocol(&mut self, protocol: u8) -> &mut Self {
        self.layer4_protocol(8).compare(8, true, &[protocol])
    }

    /// ICMP port unreachable.
    pub fn reject(&mut self) -> &mut Self {
        let port_unreachable = if self.family.is_ipv6() { 4 } else { 3 };
        self.add("reject", |b| {
            b.big(1, 0).byte(2, port_unreachable);
        })
    }

    pub fn reset(&mut self) -> &mut Self {
        self.add("reject", |b| {
            b.big(1, 1);
        })
    }

    pub fn mark(&mut self, register: u32) -> &mut Self {
        self.meta(MARK, register)
    }

    pub fn set_mark(&mut self, register: u32) -> &mut Self {
        self.add("meta", |b| {
            b.big(2, MARK).big(3, register);
        })
    }

    pub fn value(&mut self, register: u32, value: u32) -> &mut Self {
        self.add("immediate", |b| {
            b.big(1, register).nested(2, |b| {
                b.attribute(1, &value.to_ne_bytes());
            });
        })
    }

    /// Ends the table's own look at this packet; other tables have theirs.
    pub fn accept(&mut self) -> &mut Self {
        const ACCEPT: u32 = 1;
        self.verdict(ACCEPT, None)
    }

    pub fn drop(&mut self) -> &mut Self {
        self.verdict(0, None)
    }

    pub fn return_(&mut self) -> &mut Self {
        const RETURN: u32 = -5i32 as u32;
        self.verdict(RETURN, None)
    }

    pub fn jump(&mut self, chain: &str) -> &mut Self {
        const JUMP: u32 = -3i32 as u32;
        self.verdict(JUMP, Some(chain))
    }

    fn verdict(&mut self, code: u32, chain: Option<&str>) -> &mut Self {
        self.add("immediate", |b| {
            b.big(1, 0).nested(2, |b| {
                b.nested(2, |b| {
                    b.big(1, code);
                    if let Some(chain) = chain {
                        b.text(2, chain);
                    }
                });
            });
        })
    }

    /// Lowers what a connection's first packet says of segment sizes to what the route can carry.
    pub fn clamp_segment_size(&mut self) -> &mut Self {
        const FLAGS_OFFSET: u32 = 13;
        const SYN: u8 = 2;
        const SYN_OR_RST: u8 = 6;
        const ROUTE_TCP_MSS: u32 = 3;
        const OPTION_MSS: u8 = 2;
        self.payload(2, FLAGS_OFFSET, 1, 8).mask(8, &[SYN_OR_RST]).compare(8, true, &[SYN]);
        self.add("rt", |b| {
            b.big(2, ROUTE_TCP_MSS).big(1, 8);
        });
        self.add("byteorder", |b| {
            b.big(1, 8).big(2, 8).big(3, 1).big(4, 2).big(5, 2);
        });
        self.add("exthdr", |b| {
            b.byte(2, OPTION_MSS).big(3, 2).big(4, 2).big(6, 1).big(7, 8);
        })
    }
}

pub type Network4 = (Ipv4Addr, u8);

fn link_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

/// Key and value; a set's elements have no value.
pub type Element = (Vec<u8>, Vec<u8>);

/// One transaction.
pub struct Transaction {
    batch: Batch,
    family: Family,
    table: &'static str,
    sets: u32,
}

impl Transaction {
    pub fn new(family: Family) -> Transaction {
        Transaction::of(family, TABLE)
    }

    /// About another table than tinydc's own.
    pub fn of(family: Family, table: &'static str) -> Transaction {
        let mut batch = Batch::new();
        batch.message(BATCH_BEGIN, 0, &header(0, 10));
        Transaction { batch, family, table, sets: 0 }
    }

    pub fn message(&mut self, kind: u16, flags: u16) -> &mut Batch {
        self.batch.message(kind, flags, &header(self.family.number(), 0)).text(1, self.table)
    }

    pub fn map(&mut self, name: &str, key: &[u32], value: &[u32]) {
        self.new_set(name, key, Some(value));
    }

    pub fn set(&mut self, name: &str, key: &[u32]) {
        self.new_set(name, key, None);
    }

    fn new_set(&mut self, name: &str, key: &[u32], value: Option<&[u32]>) {
        const MAP: u32 = 8;
        self.sets += 1;
        let id = self.sets;
        let flags = if value.is_some() { MAP } else { 0 };
        let (key, key_bytes) = concatenated(self.family, key);
        let value = value.map(|value| concatenated(self.family, value));
        let batch = self.message(NEW_SET, CREATE).text(2, name).big(3, flags);
        batch.big(4, key).big(5, key_bytes);
        if let Some((value, value_bytes)) = value {
            batch.big(6, value).big(7, value_bytes);
        }
        batch.big(10, id);
    }

    pub fn chain(&mut self, name: &str) {
        self.message(NEW_CHAIN, CREATE).text(3, name);
    }

    pub fn base_chain(&mut self, name: &str, kind: &str, hook: u32, priority: i32) {
        const ACCEPT: u32 = 1;
        let batch = self.message(NEW_CHAIN, CREATE).text(3, name).nested(4, |b| {
            b.big(1, hook).big(2, priority as u32);
        });
        batch.text(7, kind).big(5, ACCEPT);
    }

    pub fn rule(&mut self, chain: &str, fill: impl FnOnce(&mut Expressions<'_>)) {
        let family = self.family;
        self.message(NEW_RULE, CREATE | APPEND)
            .text(2, chain)
            .nested(4, |batch| fill(&mut Expressions { batch, family }));
    }

    pub fn add(&mut self, set: &str, elements: &[Element]) {
        self.elements(NEW_ELEMENT, CREATE, set, elements);
    }

    pub fn remove(&mut self, set: &str, elements: &[Element]) {
        self.elements(DELETE_ELEMENT, 0, set, elements);
    }

    fn elements(&mut self, kind: u16, flags: u16, set: &str, elements: &[Element]) {
        for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
            self.message(kind, flags).text(2, set).nested(3, |batch| {
                for (key, value) in chunk {
                    batch.nested(1, |batch| {
                        batch.nested(1, |b| {
                            b.attribute(1, key);
                        });
                        if !value.is_empty() {
                            batch.nested(2, |b| {
                                b.attribute(1, value);
                            });
                        }
                    });
                }
            });
        }
    }

    pub fn commit(mut self, socket: &Socket) -> io::Result<()> {
        self.batch.message(BATCH_END, 0, &header(0, 10));
        socket.send(&self.batch)
    }
}
