//! `pi1.local` and `home.local`: this node's answers when the LAN asks by mDNS for the node's or the cluster's name.
//!
//! One parsed question + this node's names and its addresses where it was asked → the messages to send. Pure. The node's
//! name is its own: its records replace what others hold. The cluster's name belongs to all nodes: each adds its address,
//! and whoever asks reaches some node. Names are unique within the cluster, so nothing is probed (RFC 6762 8.1 is for
//! names that strangers might hold); IPv4 only.
//!
//! Invariant: nobody is answered with a name or an address that isn't this node's
//! (`only_own_names_are_answered`).

use std::net::{Ipv4Addr, SocketAddr};

use simple_dns::rdata::{A, NSEC, NsecTypeBitMap, RData};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QTYPE, Question, ResourceRecord, TYPE};

/// Of records that hold an address (RFC 6762 10).
const TTL_SECONDS: u32 = 120;
/// For resolvers that know nothing of mDNS and would never hear a correction (RFC 6762 6.7).
const LEGACY_TTL_SECONDS: u32 = 10;
const MDNS_PORT: u16 = 5353;
/// Type A is the second of 8 bits.
const ONLY_A: [u8; 1] = [0x40];

/// Labels, without `.local`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalNames {
    pub node: String,
    pub cluster: String,
}

/// What the asker is told, and where.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct LocalAnswers {
    /// To the group, at once: nobody else answers it.
    pub to_group: Option<Vec<u8>>,
    /// To the group, a little later and not at the same time as the other nodes.
    pub to_group_later: Option<Vec<u8>>,
    pub to_asker: Option<Vec<u8>>,
}

pub(super) struct Asked<'a> {
    pub source: SocketAddr,
    /// This node's, on the networks that hold `source`.
    pub addresses: &'a [Ipv4Addr],
    /// Whether no other program of this machine answers mDNS: only then is it known that there is no AAAA record.
    pub is_alone: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Owner {
    Node,
    Cluster,
}

impl LocalNames {
    fn owner(&self, name: &Name<'_>) -> Option<Owner> {
        let mut labels = name.get_labels().iter().map(|label| label.as_ref());
        let (Some(label), Some(local), None) = (labels.next(), labels.next(), labels.next()) else {
            return None;
        };
        if !local.eq_ignore_ascii_case(b"local") {
            return None;
        }
        let is = |own: &str| !own.is_empty() && label.eq_ignore_ascii_case(own.as_bytes());
        // A node called as its cluster shares the name with the others.
        match (is(&self.cluster), is(&self.node)) {
            (true, _) => Some(Owner::Cluster),
            (false, true) => Some(Owner::Node),
            (false, false) => None,
        }
    }

    /// Whether any question is about a name of this node.
    pub(super) fn are_asked(&self, packet: &Packet<'_>) -> bool {
        packet.questions.iter().any(|question| self.owner(&question.qname).is_some())
    }

    pub(super) fn answers(&self, packet: &Packet<'_>, asked: &Asked<'_>) -> LocalAnswers {
        let mut answers = LocalAnswers::default();
        if asked.addresses.is_empty() {
            return answers;
        }
        let is_legacy = asked.source.port() != MDNS_PORT;
        let (mut now, mut later, mut asker) = (Vec::new(), Vec::new(), Vec::new());
        for question in &packet.questions {
            let Some(owner) = self.owner(&question.qname) else { continue };
            let mut records = records(question, owner, asked);
            records.retain(|record| !is_known(packet, record));
            let place = match owner {
                _ if is_legacy || question.unicast_response => &mut asker,
                Owner::Node => &mut now,
                Owner::Cluster => &mut later,
            };
            place.append(&mut records);
        }
        if is_legacy {
            answers.to_asker = legacy_message(packet, asker);
        } else {
            answers.to_asker = message(asker);
        }
        answers.to_group = message(now);
        answers.to_group_later = message(later);
        answers
    }
}

fn records<'q>(question: &Question<'q>, owner: Owner, asked: &Asked<'_>) -> Vec<ResourceRecord<'q>> {
    let record = |data: RData<'q>| {
        ResourceRecord::new(question.qname.clone(), CLASS::IN, TTL_SECONDS, data)
            .with_cache_flush(owner == Owner::Node)
    };
    match question.qtype {
        QTYPE::TYPE(TYPE::A) | QTYPE::ANY => {
            let address = |address: &Ipv4Addr| record(RData::A(A { address: u32::from(*address) }));
            asked.addresses.iter().map(address).collect()
        }
        // "It has no such record", or some ask for seconds before they take the address (RFC 6762 6.1).
        _ if owner == Owner::Node && asked.is_alone => {
            let types = NsecTypeBitMap { window_block: 0, bitmap: ONLY_A.as_slice().into() };
            vec![record(RData::NSEC(NSEC { next_name: question.qname.clone(), type_bit_maps: vec![types] }))]
        }
        _ => Vec::new(),
    }
}

/// The asker holds it, for more than half of its time (RFC 6762 7.1).
fn is_known(packet: &Packet<'_>, record: &ResourceRecord<'_>) -> bool {
    let is_same = |known: &ResourceRecord<'_>| {
        known.rdata == record.rdata
            && known.ttl >= TTL_SECONDS / 2
            && known.name.to_string().eq_ignore_ascii_case(&record.name.to_string())
    };
    packet.answers.iter().any(is_same)
}

fn message(records: Vec<ResourceRecord<'_>>) -> Option<Vec<u8>> {
    if records.is_empty() {
        return None;
    }
    let mut packet = Packet::new_reply(0);
    packet.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
    packet.answers = records;
    packet.build_bytes_vec_compressed().ok()
}

/// As a plain DNS server would answer: the id and the questions again, no bits of mDNS.
fn legacy_message(asked: &Packet<'_>, mut records: Vec<ResourceRecord<'_>>) -> Option<Vec<u8>> {
    if records.is_empty() {
        return None;
    }
    for record in &mut records {
        (record.ttl, record.cache_flush) = (LEGACY_TTL_SECONDS, false);
    }
    let mut packet = Packet::new_reply(asked.id());
    packet.set_flags(PacketFlag::AUTHORITATIVE_ANSWER);
    packet.questions = asked.questions.clone();
    packet.questions.iter_mut().for_each(|question| question.unicast_response = false);
    packet.answers = records;
    packet.build_bytes_vec_compressed().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 2);

    fn names() -> LocalNames {
        LocalNames { node: "pi1".into(), cluster: "Home".into() }
    }

    fn question(name: &'static str, qtype: QTYPE, is_unicast: bool) -> Packet<'static> {
        let mut packet = Packet::new_query(77);
        packet.questions.push(Question::new(Name::new_unchecked(name), qtype, CLASS::IN.into(), is_unicast));
        packet
    }

    fn answers(packet: &Packet<'_>, port: u16) -> LocalAnswers {
        let source = SocketAddr::from(([192, 168, 1, 50], port));
        names().answers(packet, &Asked { source, addresses: &[OWN], is_alone: true })
    }

    fn only_record(message: &[u8]) -> (String, u32, bool, RData<'static>) {
        let packet = Packet::parse(message).unwrap();
        assert_eq!(packet.answers.len(), 1);
        let record = packet.answers[0].clone().into_owned();
        (record.name.to_string(), record.ttl, record.cache_flush, record.rdata)
    }

    #[test]
    fn the_nodes_name_replaces_and_the_clusters_adds() {
        let address = || RData::A(A { address: u32::from(OWN) });
        let node = answers(&question("PI1.local", TYPE::A.into(), false), 5353);
        assert_eq!(only_record(node.to_group.as_ref().unwrap()), ("PI1.local".into(), 120, true, address()));
        assert!(node.to_asker.is_none() && node.to_group_later.is_none());
        let cluster = answers(&question("home.local", QTYPE::ANY, false), 5353);
        let record = only_record(cluster.to_group_later.as_ref().unwrap());
        assert_eq!(record, ("home.local".into(), 120, false, address()));
        assert!(cluster.to_asker.is_none() && cluster.to_group.is_none());
    }

    #[test]
    fn who_asks_for_a_unicast_answer_gets_one() {
        let asked = question("pi1.local", TYPE::A.into(), true);
        let answers = answers(&asked, 5353);
        assert!(answers.to_group.is_none() && answers.to_group_later.is_none());
        assert!(only_record(&answers.to_asker.unwrap()).2);
    }

    #[test]
    fn a_plain_resolver_gets_a_plain_answer() {
        for name in ["pi1.local", "home.local"] {
            let answers = answers(&question(name, TYPE::A.into(), false), 40_000);
            assert!(answers.to_group.is_none() && answers.to_group_later.is_none());
            let message = answers.to_asker.unwrap();
            let packet = Packet::parse(&message).unwrap();
            assert_eq!((packet.id(), packet.questions.len()), (77, 1));
            let (_, ttl, flush, _) = only_record(&message);
            assert_eq!((ttl, flush), (10, false));
        }
    }

    #[test]
    fn only_own_names_are_answered() {
        for name in ["pi2.local", "local", "pi1.local.local", "x.pi1.local", "pi1.lan", "pi1", ""] {
            let asked = question(name, TYPE::A.into(), false);
            assert!(!names().are_asked(&asked), "{name}");
            assert_eq!(answers(&asked, 5353), LocalAnswers::default(), "{name}");
        }
        let empty = LocalNames::default();
        assert!(!empty.are_asked(&question(".local", TYPE::A.into(), false)));
        // Asked from a network on which this node has no address.
        let asked = question("pi1.local", TYPE::A.into(), false);
        let far = Asked { source: ([8, 8, 8, 8], 5353).into(), addresses: &[], is_alone: true };
        assert_eq!(names().answers(&asked, &far), LocalAnswers::default());
    }

    #[test]
    fn what_the_asker_knows_is_not_said_again() {
        let mut asked = question("pi1.local", TYPE::A.into(), false);
        let known = |ttl| {
            let data = RData::A(A { address: u32::from(OWN) });
            ResourceRecord::new(Name::new_unchecked("Pi1.local"), CLASS::IN, ttl, data)
        };
        asked.answers = vec![known(60)];
        assert_eq!(answers(&asked, 5353), LocalAnswers::default());
        asked.answers = vec![known(59)];
        assert!(answers(&asked, 5353).to_group.is_some());
    }

    #[test]
    fn a_type_that_the_node_lacks_is_denied_unless_another_program_may_have_it() {
        let asked = question("pi1.local", TYPE::AAAA.into(), false);
        let (_, _, flush, data) = only_record(&answers(&asked, 5353).to_group.unwrap());
        assert!(flush && matches!(data, RData::NSEC(_)));
        let source = SocketAddr::from(([192, 168, 1, 50], 5353));
        let shared = Asked { source, addresses: &[OWN], is_alone: false };
        assert_eq!(names().answers(&asked, &shared), LocalAnswers::default());
        let cluster = question("home.local", TYPE::AAAA.into(), false);
        assert_eq!(answers(&cluster, 5353), LocalAnswers::default());
    }
}
