//! A network that a machine has apart from the cluster's own.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LocalNetwork {
    pub address: Ipv4Addr,
    pub prefix_length: u8,
    /// The interface that leads there.
    pub interface: String,
}

impl LocalNetwork {
    /// Whether it shares an address with this /16.
    pub fn overlaps(&self, range: Ipv4Addr) -> bool {
        self.has_bits_of(range, self.prefix_length.min(16))
    }

    pub fn contains(&self, address: Ipv4Addr) -> bool {
        self.has_bits_of(address, self.prefix_length)
    }

    fn has_bits_of(&self, address: Ipv4Addr, count: u8) -> bool {
        let first_bits =
            |address: Ipv4Addr| u32::from(address).checked_shr(32 - u32::from(count)).unwrap_or(0);
        first_bits(address) == first_bits(self.address)
    }
}

impl fmt::Display for LocalNetwork {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{} ({})", self.address, self.prefix_length, self.interface)
    }
}

/// What counts as one client: an IPv4 address, or a /64, of which each host on an IPv6 network has all addresses.
pub fn source_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let [first, second, third, fourth, ..] = address.segments();
            Ipv6Addr::new(first, second, third, fourth, 0, 0, 0, 0).into()
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_overlap_when_one_holds_the_other() {
        let network = |address: [u8; 4], prefix_length: u8| LocalNetwork {
            address: address.into(),
            prefix_length,
            interface: "eth0".into(),
        };
        let range = Ipv4Addr::new(10, 77, 0, 0);
        assert!(network([10, 77, 3, 4], 24).overlaps(range));
        assert!(network([10, 1, 2, 3], 8).overlaps(range));
        assert!(!network([10, 78, 0, 1], 16).overlaps(range));
        assert!(!network([192, 168, 1, 1], 24).overlaps(range));
    }
}
