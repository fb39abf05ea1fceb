//! Which servers to ask about the rest of the world, and in which order.
//!
//! A resolv.conf's text → addresses; outcomes of earlier questions → an order. Pure; the clock is an argument.

use crate::model::Order;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::{Duration, Instant};

const DNS_PORT: u16 = 53;
/// As many as resolv.conf(5) allows are asked; a few more do no harm.
pub const UPSTREAMS_MAX: usize = 8;
/// How long a failure puts an upstream behind the others.
const REMEMBERED: Duration = Duration::from_secs(30);

/// The `nameserver` lines. `interface_index` resolves the zone of a link-local address.
pub fn parse_resolv_conf(text: &str, interface_index: &dyn Fn(&str) -> Option<u32>) -> Vec<SocketAddr> {
    let lines = text.lines().map(|line| line.split(['#', ';']).next().unwrap_or_default());
    let mut found = Vec::new();
    for line in lines {
        let mut words = line.split_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let address = words.next().and_then(|word| parse_address(word, interface_index));
        found.extend(address.filter(|address| !found.contains(address)));
    }
    found.truncate(UPSTREAMS_MAX);
    found
}

fn parse_address(word: &str, interface_index: &dyn Fn(&str) -> Option<u32>) -> Option<SocketAddr> {
    if let Some((address, zone)) = word.split_once('%') {
        let address: Ipv6Addr = address.parse().ok()?;
        let index = zone.parse().ok().or_else(|| interface_index(zone))?;
        return Some(SocketAddrV6::new(address, DNS_PORT, 0, index).into());
    }
    let address: IpAddr = word.parse().ok()?;
    // 0.0.0.0 means this host, as 127.0.0.1 does.
    (!address.is_unspecified()).then_some(SocketAddr::new(address, DNS_PORT))
}

#[derive(Clone, Debug)]
struct Upstream {
    address: SocketAddr,
    /// In a row.
    failures: u32,
    failed_at: Option<Instant>,
    /// It asked us what we asked it.
    is_loop: bool,
}

#[derive(Debug, Default)]
pub struct Upstreams {
    list: Vec<Upstream>,
}

/// One upstream as `tinydc net` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamView {
    pub address: SocketAddr,
    pub is_failing: bool,
    pub is_loop: bool,
}

impl Upstreams {
    /// What is known of those that stay is kept.
    pub fn replace(&mut self, addresses: &[SocketAddr]) {
        let old = std::mem::take(&mut self.list);
        let known = |address: &SocketAddr| old.iter().find(|upstream| upstream.address == *address).cloned();
        self.list = addresses
            .iter()
            .take(UPSTREAMS_MAX)
            .map(|address| {
                known(address).unwrap_or(Upstream {
                    address: *address,
                    failures: 0,
                    failed_at: None,
                    is_loop: false,
                })
            })
            .collect();
    }

    /// Those that work in the order given, then those that failed lately, the fewest failures first.
    pub fn order(&self, now: Instant) -> Vec<SocketAddr> {
        let mut usable: Vec<&Upstream> = self.list.iter().filter(|upstream| !upstream.is_loop).collect();
        usable.order_by_key(|upstream| if upstream.is_failing(now) { upstream.failures } else { 0 });
        usable.into_iter().map(|upstream| upstream.address).collect()
    }

    pub fn are_all_failing(&self, now: Instant) -> bool {
        self.list.iter().filter(|upstream| !upstream.is_loop).all(|upstream| upstream.is_failing(now))
    }

    pub fn succeeded(&mut self, address: SocketAddr) {
        if let Some(upstream) = self.of(address) {
            (upstream.failures, upstream.failed_at) = (0, None);
        }
    }

    pub fn failed(&mut self, address: SocketAddr, now: Instant) {
        if let Some(upstream) = self.of(address) {
            (upstream.failures, upstream.failed_at) = (upstream.failures.saturating_add(1), Some(now));
        }
    }

    /// Whether this is news.
    pub fn is_a_loop(&mut self, address: SocketAddr) -> bool {
        self.of(address).is_some_and(|upstream| !std::mem::replace(&mut upstream.is_loop, true))
    }

    fn of(&mut self, address: SocketAddr) -> Option<&mut Upstream> {
        self.list.iter_mut().find(|upstream| upstream.address == address)
    }

    pub fn view(&self, now: Instant) -> Vec<UpstreamView> {
        let view = |upstream: &Upstream| UpstreamView {
            address: upstream.address,
            is_failing: upstream.is_failing(now),
            is_loop: upstream.is_loop,
        };
        self.list.iter().map(view).collect()
    }
}

impl Upstream {
    fn is_failing(&self, now: Instant) -> bool {
        self.failed_at.is_some_and(|failed_at| now.saturating_duration_since(failed_at) < REMEMBERED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nameserver_lines_become_addresses() {
        let text = "# made by dhcp\nsearch lan\nnameserver 192.168.1.1 # router\nnameserver\tfe80::1%eth0\n\
                    nameserver 192.168.1.1\nnameserver 0.0.0.0\nnameserver nonsense\n; nameserver 1.1.1.1\n\
                    options edns0\nnameserver 2001:db8::1";
        let found = parse_resolv_conf(text, &|name| (name == "eth0").then_some(4));
        let wanted = ["192.168.1.1:53", "[fe80::1%4]:53", "[2001:db8::1]:53"];
        assert_eq!(found, wanted.map(|address| address.parse().unwrap()));
    }

    #[test]
    fn one_that_fails_goes_last_until_it_is_forgotten() {
        let [first, second]: [SocketAddr; 2] =
            ["10.0.0.1:53", "10.0.0.2:53"].map(|address| address.parse().unwrap());
        let (mut upstreams, now) = (Upstreams::default(), Instant::now());
        upstreams.replace(&[first, second]);
        assert_eq!(upstreams.order(now), [first, second]);
        upstreams.failed(first, now);
        assert_eq!(upstreams.order(now), [second, first]);
        upstreams.failed(second, now);
        upstreams.failed(second, now);
        assert_eq!(upstreams.order(now), [first, second]);
        assert!(upstreams.are_all_failing(now));
        upstreams.replace(&[second, first]);
        assert_eq!(upstreams.order(now), [first, second], "what is known is kept");
        assert_eq!(upstreams.order(now + REMEMBERED), [second, first]);
        upstreams.succeeded(second);
        assert_eq!(upstreams.order(now), [second, first]);
    }

    #[test]
    fn a_loop_is_asked_no_more() {
        let address: SocketAddr = "127.0.0.1:53".parse().unwrap();
        let mut upstreams = Upstreams::default();
        upstreams.replace(&[address]);
        assert!(upstreams.is_a_loop(address));
        assert!(!upstreams.is_a_loop(address));
        assert!(upstreams.order(Instant::now()).is_empty());
    }
}
