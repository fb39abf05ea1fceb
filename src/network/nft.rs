//! nftables by nfnetlink: the one table `tinydc`.
//!
//! ```text
//! map pub    { inet_proto . inet_service . mark : ipv4_addr . inet_service }     port . slot → endpoint
//! map pub_at { ipv4_addr . inet_proto . inet_service . mark : … }                the same for one host address
//! chain lb     fib daddr type local: look up with numgen random mod SLOTS, dnat
//! chain pre, out (nat)   jump lb
//! chain post (nat)       masquerade what leaves the node, what came from loopback, what turns round on the bridge
//! chain input (filter)   containers reach no port of tinydc's own
//! ```
//! A change of endpoints is one batch, which the kernel takes whole or not at all.

use super::PublishedPort;
use super::netlink::{APPEND, Batch, CREATE, Socket};
use crate::model::Protocol;
use std::io;
use std::net::Ipv4Addr;

pub const TABLE: &str = "tinydc";
/// Divisible by 1 to 6, so that few endpoints share evenly.
const SLOTS: u32 = 60;
/// An attribute's length has 16 bits: elements go in messages of this many.
const ELEMENTS_PER_MESSAGE: usize = 256;
const FAMILY_IPV4: u8 = 2;
const SUBSYSTEM: u16 = 10 << 8;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = SUBSYSTEM;
const DELETE_TABLE: u16 = SUBSYSTEM | 2;
const NEW_CHAIN: u16 = SUBSYSTEM | 3;
const NEW_RULE: u16 = SUBSYSTEM | 6;
const NEW_SET: u16 = SUBSYSTEM | 9;
const NEW_ELEMENT: u16 = SUBSYSTEM | 12;
const DELETE_ELEMENT: u16 = SUBSYSTEM | 14;
/// What `nft list` shows keys as.
const TYPE_ADDRESS: u32 = 7;
const TYPE_PROTOCOL: u32 = 12;
const TYPE_SERVICE: u32 = 13;
const TYPE_MARK: u32 = 19;

fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn concatenated(types: &[u32]) -> u32 {
    types.iter().fold(0, |sum, kind| (sum << 6) | kind)
}

/// Expressions of one rule. Registers are 4 bytes wide, numbered from 8.
struct Expressions<'a>(&'a mut Batch);

impl Expressions<'_> {
    fn add(&mut self, name: &str, fill: impl FnOnce(&mut Batch)) -> &mut Self {
        self.0.nested(1, |batch| {
            batch.text(1, name).nested(2, fill);
        });
        self
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, register: u32) -> &mut Self {
        self.add("payload", |b| {
            b.big(1, register).big(2, base).big(3, offset).big(4, length);
        })
    }

    fn source(&mut self, register: u32) -> &mut Self {
        self.payload(1, 12, 4, register)
    }

    fn destination(&mut self, register: u32) -> &mut Self {
        self.payload(1, 16, 4, register)
    }

    fn destination_port(&mut self, register: u32) -> &mut Self {
        self.payload(2, 2, 2, register)
    }

    fn meta(&mut self, key: u32, register: u32) -> &mut Self {
        self.add("meta", |b| {
            b.big(2, key).big(1, register);
        })
    }

    fn layer4_protocol(&mut self, register: u32) -> &mut Self {
        self.meta(16, register)
    }

    fn compare(&mut self, register: u32, is_equal: bool, value: &[u8]) -> &mut Self {
        self.add("cmp", |b| {
            b.big(1, register).big(2, u32::from(!is_equal)).nested(3, |b| {
                b.attribute(1, value);
            });
        })
    }

    fn mask(&mut self, register: u32, mask: &[u8]) -> &mut Self {
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

    fn source_in(&mut self, network: Network4, is_in: bool) -> &mut Self {
        self.source(8);
        self.compare_network(network, is_in)
    }

    fn destination_in(&mut self, network: Network4, is_in: bool) -> &mut Self {
        self.destination(8);
        self.compare_network(network, is_in)
    }

    fn compare_network(&mut self, (address, length): Network4, is_in: bool) -> &mut Self {
        let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
        self.mask(8, &mask.to_be_bytes());
        self.compare(8, is_in, &(u32::from(address) & mask).to_be_bytes())
    }

    fn output_link(&mut self, name: &str, is_equal: bool) -> &mut Self {
        self.meta(7, 8);
        self.compare(8, is_equal, &link_name(name))
    }

    fn input_link(&mut self, name: &str) -> &mut Self {
        self.meta(6, 8);
        self.compare(8, true, &link_name(name))
    }

    fn destination_is_local(&mut self) -> &mut Self {
        self.add("fib", |b| {
            b.big(3, 2).big(2, 3).big(1, 8);
        });
        self.compare(8, true, &2u32.to_ne_bytes())
    }

    fn random_slot(&mut self, register: u32) -> &mut Self {
        self.add("numgen", |b| {
            b.big(1, register).big(2, SLOTS).big(3, 1).big(4, 0);
        })
    }

    fn look_up(&mut self, map: &str, key: u32, result: u32) -> &mut Self {
        self.add("lookup", |b| {
            b.text(1, map).big(2, key).big(3, result);
        })
    }

    fn dnat(&mut self, address: u32, port: u32) -> &mut Self {
        self.add("nat", |b| {
            b.big(1, 1).big(2, 2).big(3, address).big(5, port);
        })
    }

    fn masquerade(&mut self) -> &mut Self {
        self.add("masq", |_| {})
    }

    fn was_dnat(&mut self) -> &mut Self {
        const STATUS_DNAT: u32 = 0x20;
        self.add("ct", |b| {
            b.big(2, 2).big(1, 8);
        });
        self.mask(8, &STATUS_DNAT.to_ne_bytes());
        self.compare(8, false, &[0; 4])
    }

    fn reject(&mut self) -> &mut Self {
        self.add("reject", |b| {
            b.big(1, 0).byte(2, 3);
        })
    }

    fn jump(&mut self, chain: &str) -> &mut Self {
        const JUMP: u32 = -3i32 as u32;
        self.add("immediate", |b| {
            b.big(1, 0).nested(2, |b| {
                b.nested(2, |b| {
                    b.big(1, JUMP).text(2, chain);
                });
            });
        })
    }
}

type Network4 = (Ipv4Addr, u8);

fn link_name(name: &str) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

/// What the rules are about.
pub struct Shape<'a> {
    pub bridge: &'a str,
    /// All nodes' containers.
    pub cluster: Network4,
    /// This node's containers.
    pub node: Network4,
}

/// One transaction.
struct Transaction {
    batch: Batch,
    sets: u32,
}

impl Transaction {
    fn new() -> Transaction {
        let mut batch = Batch::new();
        batch.message(BATCH_BEGIN, 0, &header(0, 10));
        Transaction { batch, sets: 0 }
    }

    fn message(&mut self, kind: u16, flags: u16) -> &mut Batch {
        self.batch.message(kind, flags, &header(FAMILY_IPV4, 0)).text(1, TABLE)
    }

    fn map(&mut self, name: &str, key: &[u32], key_bytes: u32) {
        const MAP: u32 = 8;
        self.sets += 1;
        let id = self.sets;
        let value = concatenated(&[TYPE_ADDRESS, TYPE_SERVICE]);
        let batch = self.message(NEW_SET, CREATE).text(2, name).big(3, MAP);
        batch.big(4, concatenated(key)).big(5, key_bytes).big(6, value).big(7, 8).big(10, id);
    }

    fn chain(&mut self, name: &str) {
        self.message(NEW_CHAIN, CREATE).text(3, name);
    }

    fn base_chain(&mut self, name: &str, kind: &str, hook: u32, priority: i32) {
        const ACCEPT: u32 = 1;
        let batch = self.message(NEW_CHAIN, CREATE).text(3, name).nested(4, |b| {
            b.big(1, hook).big(2, priority as u32);
        });
        batch.text(7, kind).big(5, ACCEPT);
    }

    fn rule(&mut self, chain: &str, fill: impl FnOnce(&mut Expressions<'_>)) {
        self.message(NEW_RULE, CREATE | APPEND)
            .text(2, chain)
            .nested(4, |batch| fill(&mut Expressions(batch)));
    }

    fn elements(&mut self, set: &str, elements: &[(Vec<u8>, Vec<u8>)]) {
        for chunk in elements.chunks(ELEMENTS_PER_MESSAGE) {
            self.message(NEW_ELEMENT, CREATE).text(2, set).nested(3, |batch| {
                for (key, value) in chunk {
                    batch.nested(1, |batch| {
                        batch.nested(1, |b| {
                            b.attribute(1, key);
                        });
                        batch.nested(2, |b| {
                            b.attribute(1, value);
                        });
                    });
                }
            });
        }
    }

    fn commit(mut self, socket: &Socket) -> io::Result<()> {
        self.batch.message(BATCH_END, 0, &header(0, 10));
        socket.send(&self.batch)
    }
}

/// Makes the table anew, empty of ports.
pub fn make_table(socket: &Socket, shape: &Shape<'_>, own_port: u16) -> io::Result<()> {
    let mut all = Transaction::new();
    all.message(NEW_TABLE, CREATE);
    all.message(DELETE_TABLE, 0);
    all.message(NEW_TABLE, CREATE);
    all.map("pub", &[TYPE_PROTOCOL, TYPE_SERVICE, TYPE_MARK], 12);
    all.map("pub_at", &[TYPE_ADDRESS, TYPE_PROTOCOL, TYPE_SERVICE, TYPE_MARK], 16);
    all.chain("lb");
    all.rule("lb", |rule| {
        rule.destination(8).layer4_protocol(9).destination_port(10).random_slot(11);
        rule.look_up("pub_at", 8, 12).dnat(12, 13);
    });
    all.rule("lb", |rule| {
        rule.destination_is_local().layer4_protocol(8).destination_port(9).random_slot(10);
        rule.look_up("pub", 8, 12).dnat(12, 13);
    });
    all.base_chain("pre", "nat", 0, -100);
    all.rule("pre", |rule| {
        rule.jump("lb");
    });
    all.base_chain("out", "nat", 3, -100);
    all.rule("out", |rule| {
        rule.jump("lb");
    });
    all.base_chain("post", "nat", 4, 100);
    all.rule("post", |rule| {
        rule.source_in(shape.node, true)
            .destination_in(shape.cluster, false)
            .output_link(shape.bridge, false)
            .masquerade();
    });
    all.rule("post", |rule| {
        rule.was_dnat().source_in((Ipv4Addr::LOCALHOST, 8), true).masquerade();
    });
    // A container that asks for a port of its own node must get its answer by the same way back.
    all.rule("post", |rule| {
        rule.was_dnat().source_in(shape.node, true).output_link(shape.bridge, true).masquerade();
    });
    all.base_chain("input", "filter", 1, 0);
    for protocol in [libc::IPPROTO_TCP as u8, libc::IPPROTO_UDP as u8] {
        all.rule("input", |rule| {
            rule.input_link(shape.bridge).layer4_protocol(8).compare(8, true, &[protocol]);
            rule.destination_port(8).compare(8, true, &own_port.to_be_bytes()).reject();
        });
    }
    all.commit(socket)
}

pub fn delete_table(socket: &Socket) -> io::Result<()> {
    let mut all = Transaction::new();
    // Making it first makes deleting a missing one no error.
    all.message(NEW_TABLE, CREATE);
    all.message(DELETE_TABLE, 0);
    all.commit(socket)
}

/// Replaces all published ports in one step.
pub fn set_ports(socket: &Socket, ports: &[PublishedPort]) -> io::Result<()> {
    let mut all = Transaction::new();
    for map in ["pub", "pub_at"] {
        all.message(DELETE_ELEMENT, 0).text(2, map);
    }
    let (everywhere, at_one): (Vec<_>, Vec<_>) = ports.iter().partition(|port| port.host_address.is_none());
    all.elements("pub", &everywhere.into_iter().flat_map(slots).collect::<Vec<_>>());
    all.elements("pub_at", &at_one.into_iter().flat_map(slots).collect::<Vec<_>>());
    all.commit(socket)
}

/// One element per slot: the endpoints share the slots evenly.
fn slots(port: &PublishedPort) -> Vec<(Vec<u8>, Vec<u8>)> {
    let count = port.endpoints.len();
    if count == 0 {
        return Vec::new();
    }
    (0..SLOTS)
        .map(|slot| {
            let (address, target) = port.endpoints[slot as usize % count];
            let mut key = Vec::with_capacity(16);
            key.extend(port.host_address.map(|address| address.octets()).iter().flatten());
            key.extend([protocol_number(port.protocol), 0, 0, 0]);
            key.extend(padded(port.port));
            key.extend(slot.to_ne_bytes());
            let mut value = address.octets().to_vec();
            value.extend(padded(target));
            (key, value)
        })
        .collect()
}

fn padded(port: u16) -> [u8; 4] {
    let [high, low] = port.to_be_bytes();
    [high, low, 0, 0]
}

fn protocol_number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => libc::IPPROTO_TCP as u8,
        Protocol::Udp => libc::IPPROTO_UDP as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_share_the_slots_evenly() {
        let endpoints: Vec<(Ipv4Addr, u16)> =
            (1..=4).map(|last| (Ipv4Addr::new(10, 77, 1, last), 80)).collect();
        let port = PublishedPort { protocol: Protocol::Tcp, port: 8080, host_address: None, endpoints };
        let all = slots(&port);
        assert_eq!(all.len(), SLOTS as usize);
        for last in 1..=4u8 {
            assert_eq!(all.iter().filter(|(_, value)| value[3] == last).count(), 15);
        }
        assert!(slots(&PublishedPort { endpoints: Vec::new(), ..port }).is_empty());
    }
}
