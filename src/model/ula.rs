//! The cluster's IPv6 prefix, and the addresses in it.
//!
//! Each IPv4 address of the cluster has one there that ends in it (as in RFC 6052 2): nothing more has to be agreed on,
//! and what is decided for the one holds for the other.

use super::ids::ClusterId;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A /96 of unique local addresses (RFC 4193).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UlaPrefix([u8; 12]);

impl UlaPrefix {
    const LENGTH: u8 = 96;

    /// Of the network that embeds an IPv4 network with a prefix of this length.
    pub const fn length(ipv4: u8) -> u8 {
        UlaPrefix::LENGTH + ipv4
    }

    /// The 40 bits that RFC 4193 wants drawn are the cluster's id's, which was.
    pub fn of(cluster: ClusterId) -> UlaPrefix {
        let drawn = cluster.0.to_be_bytes();
        let mut prefix = [0; 12];
        prefix[0] = 0xfd;
        prefix[1..6].copy_from_slice(&drawn[..5]);
        UlaPrefix(prefix)
    }

    pub fn embed(&self, address: Ipv4Addr) -> Ipv6Addr {
        let mut octets = [0; 16];
        octets[..12].copy_from_slice(&self.0);
        octets[12..].copy_from_slice(&address.octets());
        octets.into()
    }

    /// `None`: an address of somewhere else.
    pub fn extract(&self, address: Ipv6Addr) -> Option<Ipv4Addr> {
        let [prefix @ .., first, second, third, fourth] = address.octets();
        (prefix == self.0).then_some(Ipv4Addr::new(first, second, third, fourth))
    }

    /// The same of either family.
    pub fn ipv4_of(&self, address: IpAddr) -> Option<Ipv4Addr> {
        match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(address) => self.extract(address),
        }
    }
}

impl fmt::Display for UlaPrefix {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.embed(Ipv4Addr::UNSPECIFIED), UlaPrefix::LENGTH)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_found_again_in_the_one_that_embeds_it() {
        let prefix = UlaPrefix::of(ClusterId(0x0102_0304_0506_0708_090a_0b0c_0d0e_0f10));
        let address = Ipv4Addr::new(10, 77, 1, 3);
        let embedded: Ipv6Addr = "fd01:203:405::a4d:103".parse().unwrap();
        assert_eq!(prefix.embed(address), embedded);
        assert_eq!(prefix.extract(embedded), Some(address));
        assert_eq!(prefix.extract("fd01:203:405:1::a4d:103".parse().unwrap()), None);
        assert_eq!(prefix.to_string(), "fd01:203:405::/96");
    }
}
