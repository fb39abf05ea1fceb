//! DNS messages as bytes: the question of a query, the records of an answer, what must be changed to pass one on.
//!
//! Bytes → a `Query`, or how to refuse it; an upstream's answer + the query → the answer for this client. Records are
//! not decoded: what is forwarded may hold types that nobody here knows. Nothing panics, whatever the bytes
//! (`garbage_gets_no_answer_or_an_error`).

use std::ops::Range;

pub const HEADER_BYTES: usize = 12;
/// What is sent without fragments on any link (flag day 2020).
pub const UDP_BYTES_MAX: usize = 1232;
/// Of a client without EDNS (RFC 1035 4.2.1).
const PLAIN_UDP_BYTES_MAX: usize = 512;
const NAME_BYTES_MAX: usize = 255;

pub const FLAG_RESPONSE: u16 = 0x8000;
pub const FLAG_AUTHORITATIVE: u16 = 0x0400;
pub const FLAG_TRUNCATED: u16 = 0x0200;
pub const FLAG_RECURSION_DESIRED: u16 = 0x0100;
pub const FLAG_RECURSION_AVAILABLE: u16 = 0x0080;
pub const FLAG_AUTHENTIC: u16 = 0x0020;
pub const FLAG_CHECKING_DISABLED: u16 = 0x0010;
const OPCODE_MASK: u16 = 0x7800;
const CODE_MASK: u16 = 0x000f;

pub mod kind {
    pub const A: u16 = 1;
    pub const NS: u16 = 2;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const OPT: u16 = 41;
    pub const DS: u16 = 43;
    pub const DNSKEY: u16 = 48;
    /// Transfers and mail agents of old, which are questions only: 251 to 254.
    pub const TRANSFERS: std::ops::RangeInclusive<u16> = 251..=254;
    pub const ANY: u16 = 255;
}

pub mod class {
    pub const INTERNET: u16 = 1;
    pub const ANY: u16 = 255;
}

/// Response codes (RFC 1035 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    NoError = 0,
    FormatError = 1,
    ServerFailure = 2,
    NoSuchName = 3,
    NotImplemented = 4,
    Refused = 5,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Lower case, labels joined by dots, none at the end. Whatever can't be in a host's name is `\DDD`.
    pub name: String,
    pub kind: u16,
    pub class: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Edns {
    pub udp_bytes: u16,
    pub version: u8,
    pub wants_signatures: bool,
}

#[derive(Clone, Debug)]
pub struct Query<'a> {
    pub id: u16,
    pub flags: u16,
    pub question: Question,
    /// As it came: name, type, class.
    pub question_bytes: &'a [u8],
    pub edns: Option<Edns>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadQuery {
    /// Too short, or an answer: answering answers could go on for ever.
    Silent,
    Refused {
        id: u16,
        flags: u16,
        code: Code,
    },
}

#[derive(Clone, Debug)]
pub struct Record {
    pub start: usize,
    pub kind: u16,
    pub ttl_at: usize,
    pub ttl: u32,
    pub data: Range<usize>,
    pub section: Section,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    Answer,
    Authority,
    Additional,
}

pub fn number_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn wide_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn put(bytes: &mut [u8], at: usize, number: u16) {
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&number.to_be_bytes());
    }
}

/// Where the name at `at` ends. Pointers are not followed.
fn end_of_name(bytes: &[u8], at: usize) -> Option<usize> {
    let mut next = at;
    while next - at <= NAME_BYTES_MAX {
        match *bytes.get(next)? {
            0 => return Some(next + 1),
            length @ 1..=63 => next += 1 + usize::from(length),
            192.. => return (next + 2 <= bytes.len()).then_some(next + 2),
            _ => return None,
        }
    }
    None
}

/// A name without pointers, as `Question` holds it.
fn read_name(bytes: &[u8]) -> Option<String> {
    let mut name = String::with_capacity(bytes.len());
    let mut at = 0;
    loop {
        let length = usize::from(*bytes.get(at)?);
        match length {
            0 => return Some(name),
            1..=63 => {}
            _ => return None,
        }
        if at > 0 {
            name.push('.');
        }
        for &byte in bytes.get(at + 1..at + 1 + length)? {
            match byte {
                b'.' | b'\\' | 0..=32 | 127.. => name.push_str(&format!("\\{byte:03}")),
                _ => name.push(char::from(byte.to_ascii_lowercase())),
            }
        }
        at += 1 + length;
    }
}

/// The records after the question. `None`: something is not whole.
pub fn records(bytes: &[u8], question_bytes: usize) -> Option<Vec<Record>> {
    let mut found = Vec::new();
    let mut at = HEADER_BYTES + question_bytes;
    let sections = [(6, Section::Answer), (8, Section::Authority), (10, Section::Additional)];
    for (count_at, section) in sections {
        for _ in 0..number_at(bytes, count_at)? {
            let fixed = end_of_name(bytes, at)?;
            let start = at;
            let data_at = fixed + 10;
            at = data_at + usize::from(number_at(bytes, fixed + 8)?);
            if at > bytes.len() {
                return None;
            }
            found.push(Record {
                start,
                kind: number_at(bytes, fixed)?,
                ttl_at: fixed + 4,
                ttl: wide_at(bytes, fixed + 4)?,
                data: data_at..at,
                section,
            });
        }
    }
    Some(found)
}

/// Smallest TTL of negative answers: the last field of a SOA's data.
pub fn soa_minimum(bytes: &[u8], soa: &Record) -> Option<u32> {
    wide_at(bytes, soa.data.end.checked_sub(4).filter(|at| *at >= soa.data.start)?)
}

/// Length of the question section of a message with one question.
pub fn question_length(bytes: &[u8]) -> Option<usize> {
    let end = end_of_name(bytes, HEADER_BYTES)? + 4;
    (number_at(bytes, 4)? == 1 && end <= bytes.len()).then_some(end - HEADER_BYTES)
}

impl<'a> Query<'a> {
    pub fn parse(bytes: &'a [u8]) -> Result<Query<'a>, BadQuery> {
        let (Some(id), Some(flags)) = (number_at(bytes, 0), number_at(bytes, 2)) else {
            return Err(BadQuery::Silent);
        };
        if bytes.len() < HEADER_BYTES || flags & FLAG_RESPONSE != 0 {
            return Err(BadQuery::Silent);
        }
        if flags & OPCODE_MASK != 0 {
            return Err(BadQuery::Refused { id, flags, code: Code::NotImplemented });
        }
        Query::parse_whole(bytes, id, flags).ok_or(BadQuery::Refused { id, flags, code: Code::FormatError })
    }

    fn parse_whole(bytes: &'a [u8], id: u16, flags: u16) -> Option<Query<'a>> {
        let length = question_length(bytes)?;
        let question_bytes = bytes.get(HEADER_BYTES..HEADER_BYTES + length)?;
        let question = Question {
            name: read_name(question_bytes)?,
            kind: number_at(question_bytes, length - 4)?,
            class: number_at(question_bytes, length - 2)?,
        };
        let mut edns = None;
        for record in records(bytes, length)?.iter().filter(|record| record.kind == kind::OPT) {
            // Two are an error (RFC 6891 6.1.1).
            let is_first = edns.is_none() && record.section == Section::Additional;
            edns = Some(Edns {
                udp_bytes: number_at(bytes, record.ttl_at - 2)?,
                version: (record.ttl >> 16) as u8,
                wants_signatures: record.ttl & 0x8000 != 0,
            })
            .filter(|_| is_first);
            edns?;
        }
        Some(Query { id, flags, question, question_bytes, edns })
    }

    /// The longest answer by UDP that this client takes.
    pub fn udp_limit(&self) -> usize {
        let wanted = self.edns.map_or(PLAIN_UDP_BYTES_MAX, |edns| usize::from(edns.udp_bytes));
        wanted.clamp(PLAIN_UDP_BYTES_MAX, UDP_BYTES_MAX)
    }

    /// The flags of an answer to it.
    pub fn reply_flags(&self, code: Code) -> u16 {
        let kept = self.flags & (FLAG_RECURSION_DESIRED | FLAG_CHECKING_DISABLED);
        FLAG_RESPONSE | FLAG_RECURSION_AVAILABLE | kept | code as u16
    }

    /// An answer without records.
    pub fn plain_reply(&self, code: Code) -> Vec<u8> {
        let mut reply = header(self.id, self.reply_flags(code), 1);
        reply.extend_from_slice(self.question_bytes);
        self.add_edns(&mut reply, 0);
        reply
    }

    /// EDNS of a version above 0 (RFC 6891 6.1.3).
    pub fn bad_version_reply(&self) -> Vec<u8> {
        let mut reply = header(self.id, self.reply_flags(Code::NoError), 1);
        reply.extend_from_slice(self.question_bytes);
        self.add_edns(&mut reply, 1);
        reply
    }

    /// Ends a message with an OPT record if the client sent one. `extended_code`: the upper bits of the code.
    pub fn add_edns(&self, reply: &mut Vec<u8>, extended_code: u8) {
        let Some(edns) = self.edns else { return };
        push_opt(reply, edns.wants_signatures, extended_code);
    }

    /// An upstream's answer, which holds no OPT record, made this client's: its id, its letters, aged by `age_seconds`.
    pub fn present(&self, message: &[u8], age_seconds: u32, limit: usize) -> Vec<u8> {
        let mut reply = message.to_vec();
        let flags = number_at(message, 2).unwrap_or_default();
        let mut kept = flags & CODE_MASK;
        if self.flags & FLAG_AUTHENTIC != 0 || self.edns.is_some_and(|edns| edns.wants_signatures) {
            kept |= flags & FLAG_AUTHENTIC;
        }
        put(&mut reply, 0, self.id);
        put(&mut reply, 2, self.reply_flags(Code::NoError) | kept);
        let length = self.question_bytes.len();
        if let Some(place) = reply.get_mut(HEADER_BYTES..HEADER_BYTES + length) {
            place.copy_from_slice(self.question_bytes);
        }
        let found = records(message, length).unwrap_or_default();
        for record in &found {
            let ttl = record.ttl.saturating_sub(age_seconds);
            if let Some(place) = reply.get_mut(record.ttl_at..record.ttl_at + 4) {
                place.copy_from_slice(&ttl.to_be_bytes());
            }
        }
        cut(&mut reply, &found, limit.saturating_sub(self.edns_length()));
        self.add_edns(&mut reply, 0);
        reply
    }

    pub fn edns_length(&self) -> usize {
        self.edns.map_or(0, |_| OPT_BYTES)
    }
}

const OPT_BYTES: usize = 11;

/// A root name, type, our UDP size, extended code, version 0, flags, no data.
pub fn push_opt(message: &mut Vec<u8>, wants_signatures: bool, extended_code: u8) {
    message.push(0);
    message.extend_from_slice(&kind::OPT.to_be_bytes());
    message.extend_from_slice(&(UDP_BYTES_MAX as u16).to_be_bytes());
    message.extend_from_slice(&[extended_code, 0, if wants_signatures { 0x80 } else { 0 }, 0, 0, 0]);
    let count = number_at(message, 10).unwrap_or_default().saturating_add(1);
    put(message, 10, count);
}

pub fn header(id: u16, flags: u16, questions: u16) -> Vec<u8> {
    let mut header = Vec::with_capacity(128);
    for number in [id, flags, questions, 0, 0, 0] {
        header.extend_from_slice(&number.to_be_bytes());
    }
    header
}

/// An answer to a query whose question can't be read.
pub fn bare_reply(id: u16, flags: u16, code: Code) -> Vec<u8> {
    let kept = flags & (OPCODE_MASK | FLAG_RECURSION_DESIRED);
    header(id, FLAG_RESPONSE | FLAG_RECURSION_AVAILABLE | kept | code as u16, 0)
}

pub fn code_of(message: &[u8]) -> u16 {
    number_at(message, 2).unwrap_or_default() & CODE_MASK
}

/// As `cut`, for a whole message.
pub fn fit(message: &mut Vec<u8>, question_bytes: usize, limit: usize) {
    if message.len() > limit {
        let found = records(message, question_bytes).unwrap_or_default();
        cut(message, &found, limit);
    }
}

/// Drops records from the end until the message fits. Without an answer record it is marked as truncated; resolvers
/// that never ask again by TCP (musl before 1.2.4) use those that are left.
fn cut(message: &mut Vec<u8>, found: &[Record], limit: usize) {
    if message.len() <= limit {
        return;
    }
    let kept = found.iter().take_while(|record| record.data.end <= limit).count();
    let end = found.get(kept).map_or(message.len(), |record| record.start);
    message.truncate(end);
    let lost_answers = found[kept..].iter().any(|record| record.section != Section::Additional);
    for (count_at, section) in [(6, Section::Answer), (8, Section::Authority), (10, Section::Additional)] {
        let count = found[..kept].iter().filter(|record| record.section == section).count();
        put(message, count_at, count as u16);
    }
    if lost_answers {
        let flags = number_at(message, 2).unwrap_or_default();
        put(message, 2, flags | FLAG_TRUNCATED);
    }
}

/// The message up to its OPT record, which speaks of one hop only. `None`: it is not whole, or not about one question.
pub fn without_opt(message: &[u8]) -> Option<Vec<u8>> {
    let found = records(message, question_length(message)?)?;
    let Some(position) = found.iter().position(|record| record.kind == kind::OPT) else {
        let end = found.last().map_or(HEADER_BYTES + question_length(message)?, |record| record.data.end);
        return Some(message[..end].to_vec());
    };
    if found[position].section != Section::Additional {
        return None;
    }
    let mut rest = message[..found[position].start].to_vec();
    let before = found[..position].iter().filter(|record| record.section == Section::Additional).count();
    put(&mut rest, 10, before as u16);
    Some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `name` in labels.
    pub fn query(name: &str, kind: u16, edns: Option<u16>) -> Vec<u8> {
        let mut bytes = header(7, FLAG_RECURSION_DESIRED, 1);
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend_from_slice(label.as_bytes());
        }
        bytes.push(0);
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&class::INTERNET.to_be_bytes());
        if let Some(size) = edns {
            push_opt(&mut bytes, false, 0);
            let at = bytes.len() - 8;
            put(&mut bytes, at, size);
        }
        bytes
    }

    #[test]
    fn a_query_reads_in_lower_case_and_keeps_its_letters() {
        let bytes = query("WeB.Shop", kind::A, Some(4096));
        let query = Query::parse(&bytes).unwrap();
        assert_eq!(query.question, Question { name: "web.shop".into(), kind: 1, class: 1 });
        assert_eq!(query.question_bytes, &bytes[12..12 + 14]);
        assert_eq!(query.udp_limit(), UDP_BYTES_MAX);
        let reply = query.plain_reply(Code::NoSuchName);
        assert_eq!(&reply[12..26], query.question_bytes);
        assert_eq!(records(&reply, 14).unwrap().len(), 1);
    }

    #[test]
    fn without_edns_512_bytes_are_the_limit() {
        assert_eq!(Query::parse(&query("a", kind::A, None)).unwrap().udp_limit(), 512);
        assert_eq!(Query::parse(&query("a", kind::A, Some(100))).unwrap().udp_limit(), 512);
        assert_eq!(Query::parse(&query("a", kind::A, Some(600))).unwrap().udp_limit(), 600);
    }

    #[test]
    fn garbage_gets_no_answer_or_an_error() {
        let good = query("web.shop", kind::A, Some(1232));
        assert!(matches!(Query::parse(&[]), Err(BadQuery::Silent)));
        let mut answer = good.clone();
        answer[2] |= 0x80;
        assert!(matches!(Query::parse(&answer), Err(BadQuery::Silent)));
        let refused = |bytes: &[u8], wanted: Code| match Query::parse(bytes) {
            Err(BadQuery::Refused { id: 7, code, .. }) => assert_eq!(code, wanted),
            other => panic!("{other:?}"),
        };
        let mut notify = good.clone();
        notify[2] |= 0x20;
        refused(&notify, Code::NotImplemented);
        for length in HEADER_BYTES..good.len() {
            refused(&good[..length], Code::FormatError);
        }
        // A pointer in a question, to itself.
        let mut pointer = header(7, 0, 1);
        pointer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1]);
        refused(&pointer, Code::FormatError);
        // Every byte once wrong: anything but a panic.
        for at in 0..good.len() {
            for value in [0, 1, 63, 64, 127, 192, 255] {
                let mut bad = good.clone();
                bad[at] = value;
                let _ = Query::parse(&bad).map(|query| query.present(&bad, 1, 600));
                let _ = without_opt(&bad);
            }
        }
    }

    #[test]
    fn a_dot_inside_a_label_is_not_a_border() {
        let mut bytes = header(7, 0, 1);
        bytes.extend_from_slice(b"\x03a.b\x00\x00\x01\x00\x01");
        assert_eq!(Query::parse(&bytes).unwrap().question.name, "a\\046b");
    }
}
