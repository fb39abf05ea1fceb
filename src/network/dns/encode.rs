//! An `Answer` as the bytes for one client.
//!
//! Addresses are turned by the query's id, so that clients that take the first spread over all. What doesn't fit goes,
//! and the message says so.

use super::resolve::{Answer, Data, TTL_SECONDS, Target};
use super::wire::{self, Code, FLAG_AUTHORITATIVE, HEADER_BYTES, Query};
use simple_dns::rdata::{A, AAAA, HINFO, PTR, RData, SOA, SRV};
use simple_dns::{
    CLASS, CharacterString, Label, Name, Packet, QCLASS, QTYPE, Question, ResourceRecord, TYPE,
};
use std::net::IpAddr;

/// `None`: upstream knows.
pub fn encode(query: &Query<'_>, answer: &Answer, limit: usize) -> Option<Vec<u8>> {
    let (code, zone) = match answer {
        Answer::Elsewhere => return None,
        Answer::Refused => return Some(query.plain_reply(Code::Refused)),
        Answer::TooEarly => return Some(query.plain_reply(Code::ServerFailure)),
        Answer::Found { .. } => (Code::NoError, None),
        Answer::Empty { zone } => (Code::NoError, Some(zone)),
        Answer::NoSuchName { zone } => (Code::NoSuchName, Some(zone)),
    };
    let name = question_name(query);
    let mut packet = Packet::new_reply(query.id);
    if let Answer::Found { data, additional } = answer {
        let turn = usize::from(query.id) % data.len().max(1);
        let turned = data[turn..].iter().chain(&data[..turn]);
        packet.answers.extend(turned.map(|data| record(name.clone(), to_rdata(data))));
        packet.additional_records.extend(additional.iter().map(target_record));
    }
    packet.name_servers.extend(zone.map(|zone| start_of_authority(zone)));
    packet.questions.push(Question::new(name, QTYPE::TYPE(TYPE::A), QCLASS::CLASS(CLASS::IN), false));
    let Ok(mut message) = packet.build_bytes_vec_compressed() else {
        return Some(query.plain_reply(Code::ServerFailure));
    };
    // As the client wrote it: its type may be one that simple-dns lacks.
    message[HEADER_BYTES..HEADER_BYTES + query.question_bytes.len()].copy_from_slice(query.question_bytes);
    let flags = query.reply_flags(code) | FLAG_AUTHORITATIVE;
    message[2..4].copy_from_slice(&flags.to_be_bytes());
    wire::fit(&mut message, query.question_bytes.len(), limit.saturating_sub(query.edns_length()));
    query.add_edns(&mut message, 0);
    Some(message)
}

fn question_name<'q>(query: &Query<'q>) -> Name<'q> {
    let mut labels = Vec::new();
    let mut rest = query.question_bytes;
    while let [length @ 1..=63, after @ ..] = rest {
        let (label, next) = after.split_at(usize::from(*length).min(after.len()));
        labels.push(Label::new_unchecked(label));
        rest = next;
    }
    Name::new_with_labels(&labels)
}

fn record<'n>(name: Name<'n>, data: RData<'n>) -> ResourceRecord<'n> {
    ResourceRecord::new(name, CLASS::IN, TTL_SECONDS, data)
}

fn address(address: IpAddr) -> RData<'static> {
    match address {
        IpAddr::V4(address) => RData::A(A { address: u32::from(address) }),
        IpAddr::V6(address) => RData::AAAA(AAAA { address: u128::from(address) }),
    }
}

fn to_rdata(data: &Data) -> RData<'_> {
    match data {
        Data::Address(one) => address(*one),
        Data::Service { port, target } => {
            RData::SRV(SRV { priority: 0, weight: 10, port: *port, target: Name::new_unchecked(target) })
        }
        Data::Pointer(name) => RData::PTR(PTR(Name::new_unchecked(name))),
        Data::Host => {
            let text = |text: &'static str| {
                CharacterString::new(text.as_bytes()).expect("seven letters fit into a character string")
            };
            RData::HINFO(HINFO { cpu: text("RFC8482"), os: text("") })
        }
    }
}

fn target_record(target: &Target) -> ResourceRecord<'_> {
    record(Name::new_unchecked(&target.name), address(target.address))
}

/// Says how long a negative answer may be believed: as short as a positive one, or a new service would stay unseen.
fn start_of_authority(zone: &str) -> ResourceRecord<'_> {
    let soa = SOA {
        mname: Name::new_unchecked("ns.tinydc.internal"),
        rname: Name::new_unchecked("root.tinydc.internal"),
        serial: 1,
        refresh: 60,
        retry: 60,
        expire: 600,
        minimum: TTL_SECONDS,
    };
    record(Name::new_unchecked(zone), RData::SOA(soa))
}
