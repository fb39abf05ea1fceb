//! `ports:` of a service, short and long.
//!
//! Input: one item. Output: one or more ports, or a problem. Ports that two services publish at the same place are
//! found here too.

use super::keys::{self, supported};
use super::problem::{Problems, Spot, shortened};
use super::values;
use crate::model::{PortSpec, Protocol};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::ops::RangeInclusive;

/// More is a range by mistake.
const PORTS_PER_SERVICE_MAX: usize = 500;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum PortError {
    #[error("{0:?} is not a port: 1 to 65535")]
    NotAPort(String),
    #[error("{0:?} is not a range of ports: the first is larger than the last")]
    Backwards(String),
    #[error("{0:?} has more than {PORTS_PER_SERVICE_MAX} ports")]
    TooMany(String),
    #[error("{published} and {target} are ranges of different lengths")]
    Lengths { published: String, target: String },
    #[error("{0:?} is neither tcp nor udp")]
    Protocol(String),
    #[error("{0:?} is an IPv6 address: published ports have IPv4 addresses, write 0.0.0.0 or nothing")]
    IpV6(String),
    #[error("{0:?} is not an address of a node, such as 192.168.1.10")]
    Address(String),
    #[error("{0:?} has too many parts: write [ADDRESS:][PUBLISHED:]TARGET[/PROTOCOL]")]
    Parts(String),
}

/// Where a port of the file is published, to find who else wants it.
#[derive(Default)]
pub struct Published {
    taken: BTreeMap<(Protocol, u16), Vec<Taken>>,
}

struct Taken {
    address: Option<Ipv4Addr>,
    path: String,
    line: usize,
}

/// The ports of one service.
pub fn read_ports(spot: &Spot<'_>, published: &mut Published, problems: &mut Problems) -> Vec<PortSpec> {
    let mut ports: Vec<PortSpec> = Vec::new();
    if !values::is_list(spot, problems) {
        return ports;
    }
    let mut seen = BTreeSet::new();
    for (index, item) in spot.items().enumerate() {
        for port in read_item(&item, problems) {
            if seen.insert(port.clone()) {
                published.add(&port, &item, problems);
                ports.push(port);
            }
        }
        if ports.len().max(index) > PORTS_PER_SERVICE_MAX {
            problems.error(spot, format_args!("has more than {PORTS_PER_SERVICE_MAX} ports"));
            return Vec::new();
        }
    }
    ports
}

impl Published {
    fn add(&mut self, port: &PortSpec, spot: &Spot<'_>, problems: &mut Problems) {
        let Some(number) = port.published else { return };
        let taken = self.taken.entry((port.protocol, number)).or_default();
        let address = port.host_address;
        // An address overlaps with itself and with "all addresses".
        let other = taken
            .iter()
            .find(|other| other.address == address || other.address.is_none() || address.is_none());
        if let Some(Taken { path, line, .. }) = other {
            let protocol = port.protocol.name();
            let message =
                format_args!("port {number}/{protocol} is already published by {path} on line {line}");
            problems.error_with(spot, message, "publish one of them elsewhere");
            return;
        }
        taken.push(Taken { address, path: spot.path.clone(), line: spot.position().line });
    }
}

fn read_item(spot: &Spot<'_>, problems: &mut Problems) -> Vec<PortSpec> {
    if !spot.node.entries().is_empty() {
        return read_long(spot, problems);
    }
    let Some(text) = values::word(spot, problems) else { return Vec::new() };
    match parse_short(text) {
        Ok(ports) => ports,
        Err(error) => {
            problems.error(spot, error);
            Vec::new()
        }
    }
}

/// `[ADDRESS:][PUBLISHED:]TARGET[/PROTOCOL]`, with ranges of the same length on both sides.
fn parse_short(text: &str) -> Result<Vec<PortSpec>, PortError> {
    let (address_and_ports, protocol) = match text.rsplit_once('/') {
        Some((before, protocol)) => (before, parse_protocol(protocol)?),
        None => (text, Protocol::Tcp),
    };
    let parts: Vec<&str> = address_and_ports.split(':').collect();
    if address_and_ports.contains(['[', ']']) || (parts.len() > 3 && address_and_ports.contains("::")) {
        return Err(PortError::IpV6(shortened(address_and_ports)));
    }
    let (address, published, target) = match parts[..] {
        [target] => (None, "", target),
        [published, target] => (None, published, target),
        [address, published, target] => (parse_address(address)?, published, target),
        _ => return Err(PortError::Parts(shortened(text))),
    };
    let targets = parse_range(target, text)?;
    let published_ports = if published.is_empty() { None } else { Some(parse_range(published, text)?) };
    pair(published_ports, targets, (published, target), |published, target| PortSpec {
        protocol,
        published,
        target,
        host_address: address,
        is_host_mode: false,
    })
}

fn pair(
    published: Option<RangeInclusive<u16>>,
    targets: RangeInclusive<u16>,
    (published_text, target_text): (&str, &str),
    port: impl Fn(Option<u16>, u16) -> PortSpec,
) -> Result<Vec<PortSpec>, PortError> {
    match published {
        None => Ok(targets.map(|target| port(None, target)).collect()),
        Some(range) if range.len() == targets.len() => {
            Ok(range.zip(targets).map(|(published, target)| port(Some(published), target)).collect())
        }
        Some(_) => {
            Err(PortError::Lengths { published: shortened(published_text), target: shortened(target_text) })
        }
    }
}

fn parse_range(text: &str, whole: &str) -> Result<RangeInclusive<u16>, PortError> {
    let port = |part: &str| {
        let is_digits = !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
        let number = if is_digits { part.parse::<u16>().ok() } else { None };
        number.filter(|number| *number > 0).ok_or_else(|| PortError::NotAPort(shortened(whole)))
    };
    match text.split_once('-') {
        None => port(text).map(|number| number..=number),
        Some((first, last)) => {
            let (first, last) = (port(first)?, port(last)?);
            if first > last {
                Err(PortError::Backwards(shortened(whole)))
            } else if usize::from(last - first) >= PORTS_PER_SERVICE_MAX {
                Err(PortError::TooMany(shortened(whole)))
            } else {
                Ok(first..=last)
            }
        }
    }
}

fn parse_protocol(text: &str) -> Result<Protocol, PortError> {
    match text.to_ascii_lowercase().as_str() {
        "tcp" => Ok(Protocol::Tcp),
        "udp" => Ok(Protocol::Udp),
        _ => Err(PortError::Protocol(shortened(text))),
    }
}

/// `None` for all addresses.
fn parse_address(text: &str) -> Result<Option<Ipv4Addr>, PortError> {
    if text.is_empty() {
        return Ok(None);
    }
    match text.parse::<Ipv4Addr>() {
        Ok(address) if address.is_unspecified() => Ok(None),
        Ok(address) => Ok(Some(address)),
        Err(_) if text.contains(':') => Err(PortError::IpV6(shortened(text))),
        Err(_) => Err(PortError::Address(shortened(text))),
    }
}

fn read_long(spot: &Spot<'_>, problems: &mut Problems) -> Vec<PortSpec> {
    let mut target = None;
    let mut published = ("", None);
    let mut base = PortSpec {
        protocol: Protocol::Tcp,
        published: None,
        target: 0,
        host_address: None,
        is_host_mode: false,
    };
    for (key, entry) in supported(spot, keys::PORT, problems) {
        let Some(text) = values::word(&entry, problems) else { continue };
        let read = match key {
            "target" => parse_range(text, text).map(|range| target = Some((text, range))),
            "published" => parse_range(text, text).map(|range| published = (text, Some(range))),
            "protocol" => parse_protocol(text).map(|protocol| base.protocol = protocol),
            "host_ip" => parse_address(text).map(|address| base.host_address = address),
            _ => {
                base.is_host_mode = text == "host";
                if !matches!(text, "host" | "ingress") {
                    let message = format_args!("{:?} is neither `ingress` nor `host`", shortened(text));
                    problems.error(&entry, message);
                }
                Ok(())
            }
        };
        if let Err(error) = read {
            problems.error(&entry, error);
        }
    }
    let Some((target_text, targets)) = target else {
        if spot.node.entry("target").is_none() {
            problems.error_with(spot, "has no `target`", "name the port in the container");
        }
        return Vec::new();
    };
    let port = |published, target| PortSpec { published, target, ..base.clone() };
    match pair(published.1, targets, (published.0, target_text), port) {
        Ok(ports) => ports,
        Err(error) => {
            problems.error(spot, error);
            Vec::new()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Result<Vec<String>, String> {
        let shown = |port: &PortSpec| {
            let address = port.host_address.map_or(String::new(), |address| format!("{address}:"));
            let published = port.published.map_or("*".to_owned(), |port| port.to_string());
            format!("{address}{published}:{}/{}", port.target, port.protocol.name())
        };
        parse_short(text).map(|ports| ports.iter().map(shown).collect()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_short_form_means_what_compose_means() {
        let cases: [(&str, &[&str]); 8] = [
            ("80", &["*:80/tcp"]),
            ("8080:80", &["8080:80/tcp"]),
            ("53:53/udp", &["53:53/udp"]),
            ("127.0.0.1:8080:80", &["127.0.0.1:8080:80/tcp"]),
            ("0.0.0.0:8080:80", &["8080:80/tcp"]),
            ("127.0.0.1::80", &["127.0.0.1:*:80/tcp"]),
            ("8000-8001:80-81", &["8000:80/tcp", "8001:81/tcp"]),
            ("22:22", &["22:22/tcp"]),
        ];
        for (text, expected) in cases {
            assert_eq!(check(text), Ok(expected.iter().map(|port| (*port).to_owned()).collect()), "{text}");
        }
    }

    #[test]
    fn what_is_no_port_says_why() {
        let cases = [
            ("80800:80", "\"80800:80\" is not a port: 1 to 65535"),
            ("0", "\"0\" is not a port: 1 to 65535"),
            ("http:80", "\"http:80\" is not a port: 1 to 65535"),
            ("90-80:1-11", "\"90-80:1-11\" is not a range of ports: the first is larger than the last"),
            ("80-83:80", "80-83 and 80 are ranges of different lengths"),
            ("80/sctp", "\"sctp\" is neither tcp nor udp"),
            ("nas:80:80", "\"nas\" is not an address of a node, such as 192.168.1.10"),
            ("1:2:3:4", "\"1:2:3:4\" has too many parts: write [ADDRESS:][PUBLISHED:]TARGET[/PROTOCOL]"),
        ];
        for (text, expected) in cases {
            assert_eq!(check(text), Err(expected.to_owned()), "{text}");
        }
        assert!(check("[::1]:80:80").unwrap_err().contains("IPv6"));
    }
}
