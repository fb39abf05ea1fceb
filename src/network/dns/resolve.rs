//! One question about the cluster's own names.
//!
//! `Zone` + who asks + question → `Answer`. Pure; `tinydc net check` calls it too.
//!
//! Names: `web`, `web.shop`, `web.shop.tinydc.internal`, aliases and container names in their place; before each
//! `tasks.` (all serving instances), a number (one instance, serving or not: members of a database look for one another
//! before they serve) and, for SRV, `_port._tcp.`. A longer name of a service wins over a prefix: a service may be called
//! `tasks.web`.
//!
//! Who isn't on a common network sees no name; what isn't seen is treated as if it didn't exist. A name that exists has an
//! empty answer for the types it lacks, never "no such name": musl asks for A and AAAA at once and believes the worse one.
//!
//! Invariant: nobody gets an address of a service with which it shares no network
//! (`names_are_seen_only_across_a_common_network`).

use super::wire::{Question, class, kind};
use super::zone::{Client, DOMAIN, Endpoint, Named, Owner, ServiceNames, ServicePort, Zone};
use crate::model::{Order, Protocol};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Endpoints change within milliseconds; a client that asks twice a second is told soon.
pub const TTL_SECONDS: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    Address(IpAddr),
    Service {
        port: u16,
        target: String,
    },
    Pointer(String),
    /// The whole answer to ANY (RFC 8482).
    Host,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// All of the name asked for.
    Found {
        data: Vec<Data>,
        additional: Vec<Target>,
    },
    /// The name exists, but not with this type. `zone` is whose SOA says so.
    Empty {
        zone: String,
    },
    NoSuchName {
        zone: String,
    },
    Refused,
    /// The asker is a container that the zone doesn't list yet; it shall ask again.
    TooEarly,
    /// Not ours: ask upstream.
    Elsewhere,
}

/// Where a SRV record leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub name: String,
    pub address: IpAddr,
}

/// What is asked of a service.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Whole,
    Serving,
    Slot(u32),
}

enum Asker<'z> {
    /// A process of the node itself.
    Host,
    Container(&'z Client),
    Unknown,
}

/// A name, and its address of IPv4.
struct Place {
    name: String,
    address: Ipv4Addr,
}

struct Found<'z> {
    services: Vec<&'z ServiceNames>,
    part: Part,
}

/// The port that a SRV question names.
struct PortWish<'q> {
    port: &'q str,
    protocol: Protocol,
}

pub fn resolve(zone: &Zone, asker: Ipv4Addr, question: &Question) -> Answer {
    match look_up(zone, asker, question) {
        Answer::Elsewhere => match asker_at(zone, asker) {
            Asker::Container(client) if client.is_inner => Answer::Refused,
            // It may be one without a way out.
            Asker::Unknown => Answer::TooEarly,
            Asker::Container(_) | Asker::Host => Answer::Elsewhere,
        },
        answer => answer,
    }
}

fn look_up(zone: &Zone, asker: Ipv4Addr, question: &Question) -> Answer {
    if !matches!(question.class, class::INTERNET | class::ANY) || kind::TRANSFERS.contains(&question.kind) {
        return Answer::Refused;
    }
    let asker = asker_at(zone, asker);
    let name = question.name.as_str();
    if name == "localhost" || name.ends_with(".localhost") {
        // RFC 6761 6.3; upstream would be told who looks for what.
        let all = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        return addresses(all.into(), question);
    }
    let embedded = || zone.table.ula_prefix?.extract(reverse_ipv6_address(name)?);
    if let Some(address) = reverse_address(name).or_else(embedded) {
        return pointer(zone, &asker, address, question);
    }
    if name == DOMAIN {
        return Answer::Empty { zone: DOMAIN.into() };
    }
    let (inner, is_full) = match name.strip_suffix(DOMAIN).and_then(|inner| inner.strip_suffix('.')) {
        Some(inner) => (inner, true),
        None => (name, false),
    };
    let (wish, inner) = split_port(inner);
    match find(zone, &asker, inner, is_full) {
        Some(found) => answer(zone, &found, wish.as_ref(), question),
        None if matches!(asker, Asker::Unknown) && (is_full || is_own_label(inner, question)) => {
            Answer::TooEarly
        }
        None if is_full => Answer::NoSuchName { zone: DOMAIN.into() },
        // No public resolver knows a single label, and the stub has tried its search list before. Sent upstream it would
        // cost seconds on a site without a way out, and tell strangers how the services are called.
        None if is_own_label(inner, question) => Answer::NoSuchName { zone: last_label(inner).into() },
        None => Answer::Elsewhere,
    }
}

/// A single label asked for as a host. What validating resolvers ask of top-level domains goes upstream.
fn is_own_label(name: &str, question: &Question) -> bool {
    let is_of_a_zone = matches!(question.kind, kind::NS | kind::SOA | kind::DS | kind::DNSKEY);
    !name.is_empty() && !name.contains('.') && !is_of_a_zone
}

fn last_label(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

fn asker_at(zone: &Zone, address: Ipv4Addr) -> Asker<'_> {
    if let Some(client) = zone.table.clients.get(&address) {
        return Asker::Container(client);
    }
    let is_container = zone.table.ranges.iter().any(|range| range.contains(address));
    if is_container && address != zone.table.bridge { Asker::Unknown } else { Asker::Host }
}

fn sees(asker: &Asker<'_>, service: &ServiceNames, network: Option<&str>) -> bool {
    match (asker, network) {
        (Asker::Host, _) => true,
        (Asker::Unknown, _) => false,
        (Asker::Container(client), Some(network)) => client.networks.contains(network),
        (Asker::Container(client), None) => {
            service.networks.keys().any(|network| client.networks.contains(network))
        }
    }
}

fn find<'z>(zone: &'z Zone, asker: &Asker<'_>, name: &str, is_full: bool) -> Option<Found<'z>> {
    let found = |name: &str, part: Part| {
        let services = services_called(zone, asker, name, is_full);
        (!services.is_empty()).then_some(Found { services, part })
    };
    if let Some(whole) = found(name, Part::Whole) {
        return Some(whole);
    }
    let (first, rest) = name.split_once('.')?;
    if first == "tasks" {
        return found(rest, Part::Serving);
    }
    let slot = first.parse().ok().filter(|slot: &u32| slot.to_string() == first)?;
    let one = found(rest, Part::Slot(slot))?;
    let exists = one.endpoints().next().is_some();
    exists.then_some(one)
}

fn services_called<'z>(
    zone: &'z Zone,
    asker: &Asker<'_>,
    name: &str,
    is_full: bool,
) -> Vec<&'z ServiceNames> {
    let seen = |names: Option<&'z Vec<Named>>| -> Vec<&'z Named> {
        let all = names.into_iter().flatten();
        all.filter(|named| sees(asker, &zone.table.services[named.service], named.network.as_deref()))
            .collect()
    };
    let mut chosen = match asker {
        Asker::Container(client) if !is_full => closest(zone, client, seen(zone.by_name.get(name))),
        _ => Vec::new(),
    };
    if chosen.is_empty() {
        chosen = own_names_first(seen(zone.by_qualified_name.get(name)));
    }
    let mut indexes: Vec<usize> = chosen.iter().map(|named| named.service).collect();
    indexes.order();
    // One alias on two networks that both share.
    indexes.dedup();
    indexes.into_iter().map(|index| &zone.table.services[index]).collect()
}

/// The asker's own app before others, and there a service's name before an alias.
fn closest<'z>(zone: &Zone, client: &Client, named: Vec<&'z Named>) -> Vec<&'z Named> {
    let (own, others): (Vec<_>, Vec<_>) =
        named.into_iter().partition(|named| zone.table.services[named.service].app == client.app);
    own_names_first(if own.is_empty() { others } else { own })
}

fn own_names_first(named: Vec<&Named>) -> Vec<&Named> {
    let (names, aliases): (Vec<_>, Vec<_>) = named.into_iter().partition(|named| named.is_service_name);
    if names.is_empty() { aliases } else { names }
}

/// `_http._tcp.web` → port and protocol, `web`.
fn split_port(name: &str) -> (Option<PortWish<'_>>, &str) {
    let split = || {
        let (port, rest) = name.strip_prefix('_')?.split_once('.')?;
        let (protocol, rest) = rest.split_once('.')?;
        let protocol = match protocol {
            "_tcp" => Protocol::Tcp,
            "_udp" => Protocol::Udp,
            _ => return None,
        };
        Some((PortWish { port, protocol }, rest))
    };
    split().map_or((None, name), |(wish, rest)| (Some(wish), rest))
}

impl PortWish<'_> {
    fn is(&self, port: &ServicePort) -> bool {
        let is_named = port.name.as_ref().is_some_and(|name| name.eq_ignore_ascii_case(self.port));
        port.protocol == self.protocol && (is_named || self.port.parse() == Ok(port.port))
    }
}

impl<'z> Found<'z> {
    /// Those meant, serving or not as the part says, each with its service.
    fn endpoints(&self) -> impl Iterator<Item = (&'z ServiceNames, &'z Endpoint)> + '_ {
        let all =
            self.services.iter().flat_map(|service| service.endpoints.iter().map(|one| (*service, one)));
        all.filter(|(_, endpoint)| match self.part {
            Part::Slot(slot) => endpoint.slot == slot,
            Part::Whole | Part::Serving => endpoint.is_serving,
        })
    }

    /// Addresses with the full name of each.
    fn places(&self, service: &'z ServiceNames) -> Vec<Place> {
        if let (Part::Whole, Some(vip)) = (self.part, service.vip) {
            return vec![Place { name: service.full_name(), address: vip }];
        }
        let own = self.endpoints().filter(|(owner, _)| std::ptr::eq(*owner, service));
        own.map(|(_, endpoint)| Place {
            name: format!("{}.{}", endpoint.slot, service.full_name()),
            address: endpoint.address,
        })
        .collect()
    }
}

fn answer(zone: &Zone, found: &Found<'_>, wish: Option<&PortWish<'_>>, question: &Question) -> Answer {
    let both = |address: Ipv4Addr| -> Vec<IpAddr> {
        let embedded = zone.table.ula_prefix.map(|prefix| prefix.embed(address).into());
        [Some(address.into()), embedded].into_iter().flatten().collect()
    };
    let wanted = |port: &&ServicePort| wish.is_none_or(|wish| wish.is(port));
    if wish.is_some() && !found.services.iter().any(|service| service.ports.iter().any(|port| wanted(&port)))
    {
        return Answer::NoSuchName { zone: zone_of(&question.name).into() };
    }
    if question.kind != kind::SRV {
        let all = match wish {
            Some(_) => Vec::new(),
            None => found.services.iter().flat_map(|service| found.places(service)).collect(),
        };
        return addresses(all.into_iter().flat_map(|place: Place| both(place.address)).collect(), question);
    }
    let (mut data, mut additional) = (Vec::new(), Vec::new());
    for service in &found.services {
        let ports: Vec<&ServicePort> = service.ports.iter().filter(wanted).collect();
        for place in found.places(service).into_iter().filter(|_| !ports.is_empty()) {
            let to_record =
                |port: &&ServicePort| Data::Service { port: port.port, target: place.name.clone() };
            data.extend(ports.iter().map(to_record));
            let target = |address| Target { name: place.name.clone(), address };
            additional.extend(both(place.address).into_iter().map(target));
        }
    }
    if data.is_empty() { empty(question) } else { Answer::Found { data, additional } }
}

/// What a name with these addresses has of the type asked for.
fn addresses(all: Vec<IpAddr>, question: &Question) -> Answer {
    let data: Vec<Data> = match question.kind {
        kind::A => all.into_iter().filter(IpAddr::is_ipv4).map(Data::Address).collect(),
        kind::AAAA => all.into_iter().filter(IpAddr::is_ipv6).map(Data::Address).collect(),
        kind::ANY => vec![Data::Host],
        _ => Vec::new(),
    };
    if data.is_empty() { empty(question) } else { Answer::Found { data, additional: Vec::new() } }
}

fn empty(question: &Question) -> Answer {
    Answer::Empty { zone: zone_of(&question.name).into() }
}

/// Our domain, or for a short name the top of it: the stub that asks must not hold what we say against anything else.
fn zone_of(name: &str) -> &str {
    if name.ends_with(DOMAIN) { DOMAIN } else { last_label(name) }
}

/// `4.3.2.1.in-addr.arpa` → 1.2.3.4
fn reverse_address(name: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut labels = name.strip_suffix(".in-addr.arpa")?.split('.');
    for octet in octets.iter_mut().rev() {
        *octet = labels.next()?.parse().ok()?;
    }
    labels.next().is_none().then_some(Ipv4Addr::from(octets))
}

/// Thirty-two hexadecimal digits, the last one first, before `.ip6.arpa`.
fn reverse_ipv6_address(name: &str) -> Option<Ipv6Addr> {
    let mut labels = name.strip_suffix(".ip6.arpa")?.split('.');
    let mut address = 0u128;
    for shift in (0..128).step_by(4) {
        let digit = labels.next().filter(|label| label.len() == 1)?;
        address |= u128::from_str_radix(digit, 16).ok()? << shift;
    }
    labels.next().is_none().then_some(Ipv6Addr::from(address))
}

fn pointer(zone: &Zone, asker: &Asker<'_>, address: Ipv4Addr, question: &Question) -> Answer {
    let (service, slot) = match zone.by_address.get(&address) {
        Some(Owner::Vip(index)) => (&zone.table.services[*index], None),
        Some(Owner::Endpoint(index, slot)) => (&zone.table.services[*index], Some(*slot)),
        None => return no_pointer(zone, address, question),
    };
    if !sees(asker, service, None) {
        return no_pointer(zone, address, question);
    }
    let name = service.full_name();
    match question.kind {
        kind::PTR => {
            let name = slot.map_or(name.clone(), |slot| format!("{slot}.{name}"));
            Answer::Found { data: vec![Data::Pointer(name)], additional: Vec::new() }
        }
        kind::ANY => Answer::Found { data: vec![Data::Host], additional: Vec::new() },
        _ => Answer::Empty { zone: reverse_zone(&question.name).into() },
    }
}

fn no_pointer(zone: &Zone, address: Ipv4Addr, question: &Question) -> Answer {
    if zone.table.ranges.iter().any(|range| range.contains(address)) {
        Answer::NoSuchName { zone: reverse_zone(&question.name).into() }
    } else {
        Answer::Elsewhere
    }
}

/// `4.3.2.1.in-addr.arpa` → `2.1.in-addr.arpa`: our ranges are no smaller. Of IPv6 that is still within them.
fn reverse_zone(name: &str) -> &str {
    name.splitn(3, '.').nth(2).unwrap_or(name)
}
