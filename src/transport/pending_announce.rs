//! What a machine without a cluster says of itself by mDNS, and who hears it.
//!
//! Service `_tinydc-pending._udp.local`: name, port, architecture, hash of its public key, how long it waits, and
//! which cluster it would found by itself. Never the code, nor anything made of it. What arrives comes from strangers:
//! names are checked, rows are bounded, and it only says whom to dial.
//!
//! Invariant: an announcement reads back as it was written, and garbage reads as none
//! (`an_announcement_reads_back_and_garbage_does_not`).

use crate::model::Order;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use async_io::{Async, Timer};
use futures_lite::future;
use ring::digest::{SHA256, digest};
use rustix::net::sockopt;
use simple_dns::rdata::{RData, TXT};
use simple_dns::{CLASS, Name, Packet, PacketFlag, QTYPE, Question, TYPE};

use super::announce::{
    self, Answers, MDNS_PORT, covered_by, join_groups, multicast_on_all, service_response, shared_socket,
};
use super::executor::within;
use super::ids::PublicKey;
use crate::model::ids::is_label;

pub(super) const SERVICE: &str = "_tinydc-pending._udp.local";
const EVERY: Duration = Duration::from_secs(2);
/// A machine that was not heard for this long is gone.
const GONE_AFTER: Duration = Duration::from_secs(10);
/// More machines than one would unpack at once; over it new ones are not noted.
const ROWS_MAX: usize = 32;
const ARCHITECTURE_CHARS_MAX: usize = 16;
const DATAGRAM_BYTES_MAX: usize = 1500;
/// Between two questions to the LAN.
const ASK_EVERY: Duration = Duration::from_secs(1);

/// The first half of the SHA-256 of a machine's public key.
pub type KeyHash = [u8; 16];

pub fn key_hash(key: &PublicKey) -> KeyHash {
    let mut hash = [0; 16];
    hash.copy_from_slice(&digest(&SHA256, &key.0).as_ref()[..16]);
    hash
}

pub fn key_hash_text(hash: &KeyHash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A machine that waits for a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    pub name: String,
    pub address: SocketAddr,
    /// As in OCI: `arm64`, `amd64`.
    pub architecture: String,
    pub key_hash: KeyHash,
    pub waits_s: u64,
    /// The cluster that it founds if it hears none of that name.
    pub would_found: Option<String>,
}

impl Waiting {
    pub(super) fn to_response(&self) -> Option<Vec<u8>> {
        let hash = key_hash_text(&self.key_hash);
        let instance = format!("{}-{}.{SERVICE}", self.name, &hash[..8]);
        let host = format!("{}.local", self.name);
        let mut strings = vec![
            format!("n={}", self.name),
            format!("p={}", self.address.port()),
            format!("a={}", self.architecture),
            format!("k={hash}"),
            format!("w={}", self.waits_s),
        ];
        strings.extend(self.would_found.iter().map(|cluster| format!("b={cluster}")));
        service_response((SERVICE, &instance), (&host, self.address.port()), &strings)
    }

    /// The address is where the datagram came from: what it says of itself would send a member anywhere.
    fn from_attributes(txt: &TXT<'_>, source: IpAddr) -> Option<Waiting> {
        let text = |wanted: &str| {
            let (_, value) = txt.iter_raw().find(|(key, _)| *key == wanted.as_bytes())?;
            std::str::from_utf8(value?).ok()
        };
        let name = text("n").filter(|name| is_label(name))?;
        let is_architecture = |text: &&str| {
            text.len() <= ARCHITECTURE_CHARS_MAX && text.bytes().all(|byte| byte.is_ascii_alphanumeric())
        };
        let hash = text("k").filter(|text| text.len() == 32)?;
        Some(Waiting {
            name: name.into(),
            address: SocketAddr::new(source, text("p")?.parse().ok()?),
            architecture: text("a").filter(is_architecture)?.into(),
            key_hash: u128::from_str_radix(hash, 16).ok()?.to_be_bytes(),
            waits_s: text("w")?.parse().ok()?,
            would_found: text("b").filter(|cluster| is_label(cluster)).map(String::from),
        })
    }
}

fn machines_in<'p>(packet: &'p Packet<'_>, source: IpAddr) -> impl Iterator<Item = Waiting> + 'p {
    let records = packet.answers.iter().chain(&packet.additional_records);
    records.filter(|record| record.name.to_string().ends_with(SERVICE)).filter_map(
        move |record| match &record.rdata {
            RData::TXT(txt) => Waiting::from_attributes(txt, source),
            _ => None,
        },
    )
}

/// Who was heard lately.
#[derive(Default)]
pub(super) struct Heard {
    rows: BTreeMap<KeyHash, (Waiting, Instant)>,
}

impl Heard {
    /// Whatever a response holds of it.
    pub fn note(&mut self, packet: &Packet<'_>, source: SocketAddr, now: Instant) {
        self.rows.retain(|_, (_, heard)| now.duration_since(*heard) < GONE_AFTER);
        for waiting in machines_in(packet, source.ip().to_canonical()) {
            if self.rows.len() < ROWS_MAX || self.rows.contains_key(&waiting.key_hash) {
                self.rows.insert(waiting.key_hash, (waiting, now));
            }
        }
    }

    /// By name.
    pub fn rows(&self, now: Instant) -> Vec<Waiting> {
        let fresh = self.rows.values().filter(|(_, heard)| now.duration_since(*heard) < GONE_AFTER);
        let mut rows: Vec<Waiting> = fresh.map(|(waiting, _)| waiting.clone()).collect();
        rows.order_by(|one, other| (&one.name, one.key_hash).cmp(&(&other.name, other.key_hash)));
        rows
    }
}

fn query(names: &[(&str, TYPE)]) -> Option<Vec<u8>> {
    let mut packet = Packet::new_query(0);
    for (name, kind) in names {
        let name = Name::new(name).ok()?.into_owned();
        packet.questions.push(Question::new(name, QTYPE::TYPE(*kind), CLASS::IN.into(), false));
    }
    packet.build_bytes_vec().ok()
}

/// The socket of mDNS, beside others that this machine may have on that port; `None` where there is no LAN.
fn mdns_socket(listen: IpAddr) -> Option<Async<UdpSocket>> {
    let socket = shared_socket(MDNS_PORT).ok().filter(|_| !listen.is_loopback())?;
    // RFC 6762 11: receivers may ignore what came through a router.
    let _ = sockopt::set_ip_multicast_ttl(&socket, 255);
    Some(socket)
}

/// Announces `own` every 2 s and answers who asks for the service, until it is dropped.
pub(super) async fn announce(listen: IpAddr, own: impl Fn() -> Waiting) {
    let Some(socket) = mdns_socket(listen) else { return future::pending().await };
    let say = || {
        let packet = own().to_response();
        multicast_on_all(&socket, &covered_by(listen), packet.as_slice());
    };
    let speak = async {
        loop {
            join_groups(&socket, &covered_by(listen));
            say();
            Timer::after(EVERY).await;
        }
    };
    let listening = async {
        let (mut buffer, mut answers) = ([0; DATAGRAM_BYTES_MAX], Answers::default());
        while let Ok((length, _)) = socket.recv_from(&mut buffer).await {
            let Ok(packet) = Packet::parse(&buffer[..length]) else { continue };
            let asks = packet.questions.iter().any(|question| question.qname.to_string() == SERVICE);
            if !packet.has_flags(PacketFlag::RESPONSE) && asks && answers.allow(Instant::now()) {
                say();
            }
        }
        future::pending().await
    };
    future::or(speak, listening).await
}

/// Asks the LAN every second and gives each response to `heard`, for `limit` or until that says it is enough.
async fn ask_lan(
    limit: Duration,
    names: &[(&str, TYPE)],
    mut heard: impl FnMut(&Packet<'_>, IpAddr) -> bool,
) {
    let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let (Some(socket), Some(question)) = (mdns_socket(any), query(names)) else {
        Timer::after(limit).await;
        return;
    };
    let asking = async {
        loop {
            let interfaces = covered_by(any);
            join_groups(&socket, &interfaces);
            multicast_on_all(&socket, &interfaces, std::slice::from_ref(&question));
            Timer::after(ASK_EVERY).await;
        }
    };
    let listening = async {
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        loop {
            let Ok((length, source)) = socket.recv_from(&mut buffer).await else { return };
            let Ok(packet) = Packet::parse(&buffer[..length]) else { continue };
            if packet.has_flags(PacketFlag::RESPONSE) && heard(&packet, source.ip().to_canonical()) {
                return;
            }
        }
    };
    within(limit, future::or(asking, listening)).await;
}

/// The machines of the LAN that wait for a cluster: all that answer within `limit`.
pub async fn browse(limit: Duration) -> Vec<Waiting> {
    let mut machines = Heard::default();
    ask_lan(limit, &[(SERVICE, TYPE::PTR)], |packet, source| {
        machines.note(packet, SocketAddr::new(source, MDNS_PORT), Instant::now());
        false
    })
    .await;
    machines.rows(Instant::now())
}

/// What a machine heard that would found a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Neighbours {
    /// Nobody of that name.
    None,
    /// A member of a cluster of that name, at this address.
    Cluster(IpAddr),
    /// Another machine that would found the same cluster, and goes first.
    Founder(Waiting),
}

/// Listens for a cluster called `name`. A member answers for the cluster's name and for the members' service; another
/// device that has only the name, a NAS called `home`, is no cluster. Of several founders the one whose key has the
/// lowest hash goes first.
pub async fn find_cluster(name: &str, own: &KeyHash, limit: Duration) -> Neighbours {
    let host = format!("{name}.local");
    let (mut named, mut members) = (Vec::new(), Vec::new());
    let mut founder = None;
    ask_lan(limit, &[(&host, TYPE::A), (announce::SERVICE, TYPE::PTR)], |packet, source| {
        let has = |wanted: &str, suffix: bool| {
            packet.answers.iter().any(|record| {
                let name = record.name.to_string();
                if suffix { name.ends_with(wanted) } else { name.eq_ignore_ascii_case(wanted) }
            })
        };
        // Bounded: one address of each kind is enough, a few more do no harm.
        if has(&host, false) && named.len() < ROWS_MAX {
            named.push(source);
        }
        if has(announce::SERVICE, true) && members.len() < ROWS_MAX {
            members.push(source);
        }
        let others = machines_in(packet, source);
        if let Some(other) =
            { others }.find(|other| other.would_found.as_deref() == Some(name) && other.key_hash < *own)
        {
            founder = Some(other);
        }
        named.iter().any(|source| members.contains(source))
    })
    .await;
    match (named.into_iter().find(|source| members.contains(source)), founder) {
        (Some(address), _) => Neighbours::Cluster(address),
        (None, Some(founder)) => Neighbours::Founder(founder),
        (None, None) => Neighbours::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(number: u8) -> Waiting {
        Waiting {
            name: format!("pi{number}"),
            address: SocketAddr::from(([10, 0, 0, number], 7400)),
            architecture: "arm64".into(),
            key_hash: [number; 16],
            waits_s: 12,
            would_found: Some("home".into()),
        }
    }

    fn note(heard: &mut Heard, waiting: &Waiting, now: Instant) {
        let bytes = waiting.to_response().unwrap();
        heard.note(&Packet::parse(&bytes).unwrap(), waiting.address, now);
    }

    #[test]
    fn an_announcement_reads_back_and_garbage_does_not() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        note(&mut heard, &waiting(1), now);
        assert_eq!(heard.rows(now), [waiting(1)]);
        let bad = [
            Waiting { name: "Pi_2".into(), ..waiting(2) },
            Waiting { architecture: "a".repeat(17), ..waiting(3) },
            Waiting { name: "a".repeat(41), ..waiting(4) },
        ];
        bad.iter().for_each(|waiting| note(&mut heard, waiting, now));
        assert_eq!(heard.rows(now).len(), 1);
    }

    #[test]
    fn the_code_is_in_no_announcement() {
        let bytes = waiting(1).to_response().unwrap();
        let packet = Packet::parse(&bytes).unwrap();
        let RData::TXT(txt) = &packet.answers[2].rdata else { panic!("text") };
        let keys: Vec<String> =
            txt.iter_raw().map(|(key, _)| String::from_utf8_lossy(key).into_owned()).collect();
        assert_eq!(keys, ["n", "p", "a", "k", "w", "b"]);
    }

    #[test]
    fn silent_machines_go_and_a_flood_is_bounded() {
        let (mut heard, now) = (Heard::default(), Instant::now());
        (0..200).for_each(|number| note(&mut heard, &waiting(number), now));
        assert_eq!(heard.rows(now).len(), ROWS_MAX);
        assert!(heard.rows(now + GONE_AFTER).is_empty());
        note(&mut heard, &waiting(250), now + GONE_AFTER);
        assert_eq!(heard.rows(now + GONE_AFTER), [waiting(250)]);
    }
}
