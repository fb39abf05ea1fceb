//! DHCPv4 messages as bytes (RFC 2131, 2132). Pure.
//!
//! Input: a message to send → bytes; bytes from the network → an offer, an acknowledgement or a refusal. What is not
//! meant for this client, or is broken, is `None`.

use std::net::Ipv4Addr;

const MAGIC: [u8; 4] = [99, 130, 83, 99];
const OPTIONS_AT: usize = 240;
/// Relays drop shorter ones (RFC 1542).
const LENGTH_MIN: usize = 300;

const SUBNET_MASK: u8 = 1;
const ROUTER: u8 = 3;
const NAME_SERVER: u8 = 6;
const HOST_NAME: u8 = 12;
const TIME_SERVER: u8 = 42;
const REQUESTED_ADDRESS: u8 = 50;
const LEASE_TIME: u8 = 51;
const MESSAGE_TYPE: u8 = 53;
const SERVER: u8 = 54;
const PARAMETERS: u8 = 55;
const RENEW_TIME: u8 = 58;
const REBIND_TIME: u8 = 59;
const CLIENT: u8 = 61;
const END: u8 = 255;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    Discover,
    /// Takes one server's offer, or asks for an address that was held before.
    Request {
        address: Ipv4Addr,
        server: Option<Ipv4Addr>,
    },
    /// Prolongs the lease on the address that is in use.
    Renew {
        address: Ipv4Addr,
    },
    Release {
        address: Ipv4Addr,
        server: Ipv4Addr,
    },
}

/// Who asks, and within which exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asker {
    pub hardware: [u8; 6],
    pub exchange: u32,
    pub host_name: String,
    /// Since the exchange began.
    pub seconds: u16,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub address: Ipv4Addr,
    pub prefix_length: u8,
    pub router: Option<Ipv4Addr>,
    pub name_servers: Vec<Ipv4Addr>,
    pub time_servers: Vec<Ipv4Addr>,
    pub server: Ipv4Addr,
    pub lease_s: u32,
    pub renew_s: u32,
    pub rebind_s: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Offer(Lease),
    Granted(Lease),
    Refused,
}

pub fn encode(asker: &Asker, ask: Ask) -> Vec<u8> {
    let mut bytes = vec![0; OPTIONS_AT];
    // A request over Ethernet, whose addresses have 6 bytes.
    bytes[..4].copy_from_slice(&[1, 1, 6, 0]);
    bytes[4..8].copy_from_slice(&asker.exchange.to_be_bytes());
    bytes[8..10].copy_from_slice(&asker.seconds.to_be_bytes());
    let in_use = match ask {
        Ask::Renew { address } | Ask::Release { address, .. } => Some(address),
        Ask::Discover | Ask::Request { .. } => None,
    };
    match in_use {
        Some(address) => bytes[12..16].copy_from_slice(&address.octets()),
        // Answers go to everyone: an address that is not configured yet receives nothing.
        None => bytes[10] = 0x80,
    }
    bytes[28..34].copy_from_slice(&asker.hardware);
    bytes[236..240].copy_from_slice(&MAGIC);
    let kind = match ask {
        Ask::Discover => 1,
        Ask::Request { .. } | Ask::Renew { .. } => 3,
        Ask::Release { .. } => 7,
    };
    put(&mut bytes, MESSAGE_TYPE, &[kind]);
    let client: Vec<u8> = [1].into_iter().chain(asker.hardware).collect();
    put(&mut bytes, CLIENT, &client);
    match ask {
        Ask::Request { address, server } => {
            put(&mut bytes, REQUESTED_ADDRESS, &address.octets());
            if let Some(server) = server {
                put(&mut bytes, SERVER, &server.octets());
            }
        }
        Ask::Release { server, .. } => put(&mut bytes, SERVER, &server.octets()),
        Ask::Discover | Ask::Renew { .. } => {}
    }
    if kind != 7 {
        let name = asker.host_name.as_bytes();
        put(&mut bytes, HOST_NAME, &name[..name.len().min(63)]);
        put(&mut bytes, PARAMETERS, &[SUBNET_MASK, ROUTER, NAME_SERVER, TIME_SERVER, LEASE_TIME]);
    }
    bytes.push(END);
    bytes.resize(bytes.len().max(LENGTH_MIN), 0);
    bytes
}

fn put(bytes: &mut Vec<u8>, option: u8, value: &[u8]) {
    bytes.extend([option, value.len() as u8]);
    bytes.extend(value);
}

/// The value of an option; parts of one that was split are joined (RFC 3396).
fn option(bytes: &[u8], wanted: u8) -> Option<Vec<u8>> {
    let mut rest = bytes.get(OPTIONS_AT..)?;
    let mut value = None;
    while let Some((&kind, tail)) = rest.split_first() {
        match kind {
            0 => rest = tail,
            END => break,
            _ => {
                let (&length, tail) = tail.split_first()?;
                let body = tail.get(..usize::from(length))?;
                if kind == wanted {
                    value.get_or_insert_with(Vec::new).extend_from_slice(body);
                }
                rest = &tail[usize::from(length)..];
            }
        }
    }
    value
}

fn number(bytes: &[u8], wanted: u8) -> Option<u32> {
    Some(u32::from_be_bytes(option(bytes, wanted)?.try_into().ok()?))
}

fn addresses(bytes: &[u8], wanted: u8) -> Vec<Ipv4Addr> {
    let value = option(bytes, wanted).unwrap_or_default();
    value.chunks_exact(4).map(|four| Ipv4Addr::new(four[0], four[1], four[2], four[3])).collect()
}

pub fn decode(bytes: &[u8], asker: &Asker) -> Option<Answer> {
    if bytes.len() < OPTIONS_AT || bytes[0] != 2 || bytes[236..240] != MAGIC {
        return None;
    }
    if bytes[4..8] != asker.exchange.to_be_bytes() || bytes[28..34] != asker.hardware {
        return None;
    }
    let kind = *option(bytes, MESSAGE_TYPE)?.first()?;
    if kind == 6 {
        return Some(Answer::Refused);
    }
    let address = Ipv4Addr::new(bytes[16], bytes[17], bytes[18], bytes[19]);
    if address.is_unspecified() || address.is_broadcast() || address.is_multicast() || address.is_loopback() {
        return None;
    }
    let server = *addresses(bytes, SERVER).first()?;
    let lease_s = number(bytes, LEASE_TIME)?.max(LEASE_S_MIN);
    let mask = addresses(bytes, SUBNET_MASK).first().map(|mask| u32::from(*mask));
    let renew_s = number(bytes, RENEW_TIME).filter(|seconds| *seconds < lease_s).unwrap_or(lease_s / 2);
    let rebind_s = number(bytes, REBIND_TIME).filter(|seconds| (renew_s..lease_s).contains(seconds));
    let lease = Lease {
        address,
        prefix_length: mask.map_or(24, |mask| mask.leading_ones() as u8).clamp(1, 32),
        router: addresses(bytes, ROUTER).first().copied(),
        name_servers: addresses(bytes, NAME_SERVER),
        time_servers: addresses(bytes, TIME_SERVER),
        server,
        lease_s,
        renew_s,
        rebind_s: rebind_s.unwrap_or((u64::from(lease_s) * 7 / 8) as u32).max(renew_s),
    };
    match kind {
        2 => Some(Answer::Offer(lease)),
        5 => Some(Answer::Granted(lease)),
        _ => None,
    }
}

/// A server that grants less would be asked all the time.
const LEASE_S_MIN: u32 = 10;

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn asker() -> Asker {
        Asker { hardware: [2, 0, 0, 0, 0, 7], exchange: 0x1234_5678, host_name: "pi1".into(), seconds: 3 }
    }

    /// What a server answers: `kind` 2 offers, 5 grants, 6 refuses.
    pub fn answer(kind: u8, exchange: u32, address: [u8; 4], lease_s: u32) -> Vec<u8> {
        let mut bytes = vec![0; OPTIONS_AT];
        bytes[..4].copy_from_slice(&[2, 1, 6, 0]);
        bytes[4..8].copy_from_slice(&exchange.to_be_bytes());
        bytes[16..20].copy_from_slice(&address);
        bytes[28..34].copy_from_slice(&asker().hardware);
        bytes[236..240].copy_from_slice(&MAGIC);
        put(&mut bytes, MESSAGE_TYPE, &[kind]);
        put(&mut bytes, SERVER, &[192, 168, 1, 1]);
        put(&mut bytes, SUBNET_MASK, &[255, 255, 254, 0]);
        put(&mut bytes, ROUTER, &[192, 168, 1, 1]);
        put(&mut bytes, NAME_SERVER, &[192, 168, 1, 2, 9, 9, 9, 9]);
        put(&mut bytes, LEASE_TIME, &lease_s.to_be_bytes());
        bytes.push(END);
        bytes
    }

    #[test]
    fn a_question_says_who_asks_and_for_what() {
        let server = Some(Ipv4Addr::new(192, 168, 1, 1));
        let bytes = encode(&asker(), Ask::Request { address: [192, 168, 1, 50].into(), server });
        assert_eq!(bytes.len(), LENGTH_MIN);
        assert_eq!(option(&bytes, MESSAGE_TYPE).unwrap(), [3]);
        assert_eq!(option(&bytes, REQUESTED_ADDRESS).unwrap(), [192, 168, 1, 50]);
        assert_eq!(option(&bytes, HOST_NAME).unwrap(), b"pi1");
        assert_eq!((bytes[10], &bytes[12..16]), (0x80, &[0; 4][..]), "answered to everyone");
        let bytes = encode(&asker(), Ask::Renew { address: [192, 168, 1, 50].into() });
        assert_eq!((bytes[10], &bytes[12..16]), (0, &[192, 168, 1, 50][..]));
        assert_eq!(option(&bytes, REQUESTED_ADDRESS), None, "RFC 2131, table 5");
    }

    #[test]
    fn an_answer_is_read_with_its_times() {
        let bytes = answer(5, 0x1234_5678, [192, 168, 1, 50], 3600);
        let Some(Answer::Granted(lease)) = decode(&bytes, &asker()) else { panic!("granted") };
        assert_eq!((lease.address, lease.prefix_length), ([192, 168, 1, 50].into(), 23));
        assert_eq!((lease.lease_s, lease.renew_s, lease.rebind_s), (3600, 1800, 3150));
        assert_eq!(lease.name_servers.len(), 2);
    }

    #[test]
    fn what_is_foreign_or_broken_is_no_answer() {
        let good = answer(2, 0x1234_5678, [192, 168, 1, 50], 3600);
        assert!(decode(&good, &asker()).is_some());
        assert_eq!(decode(&answer(2, 1, [192, 168, 1, 50], 3600), &asker()), None, "another exchange");
        assert_eq!(decode(&answer(2, 0x1234_5678, [0; 4], 3600), &asker()), None, "no address");
        for length in 0..good.len() {
            // No length panics; a cut one may still hold all that is needed.
            let _ = decode(&good[..length], &asker());
        }
        let mut other = good.clone();
        other[30] ^= 1;
        assert_eq!(decode(&other, &asker()), None, "another client's");
    }
}
