//! `netlink-packet-route` for libcontainer: the types that it names, without the kernel's message formats.
//!
//! libcontainer speaks to the kernel's routing only where a bundle lists `linux.netDevices`. tinydc's bundles never do
//! (`runtime::bundle` writes them; networks are made by `network`), yet the real crate knows every kind of link, route
//! and queue there is and was 0.3 MiB of the binary. A message that is sent all the same stops the process: it would
//! be a bundle that tinydc did not write.
use netlink_packet_core::{DecodeError, NetlinkDeserializable, NetlinkHeader, NetlinkPayload, NetlinkSerializable};

use crate::address::AddressMessage;
use crate::link::LinkMessage;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum AddressFamily {
    #[default]
    Inet,
    Inet6,
}

#[derive(Debug, Clone)]
pub enum RouteNetlinkMessage {
    NewAddress(AddressMessage),
    GetAddress(AddressMessage),
    NewLink(LinkMessage),
    GetLink(LinkMessage),
    SetLink(LinkMessage),
}

impl From<RouteNetlinkMessage> for NetlinkPayload<RouteNetlinkMessage> {
    fn from(message: RouteNetlinkMessage) -> Self {
        NetlinkPayload::InnerMessage(message)
    }
}

impl NetlinkSerializable for RouteNetlinkMessage {
    fn message_type(&self) -> u16 {
        unreachable!("no bundle of tinydc lists network devices")
    }

    fn buffer_len(&self) -> usize {
        unreachable!("no bundle of tinydc lists network devices")
    }

    fn serialize(&self, _buffer: &mut [u8]) {
        unreachable!("no bundle of tinydc lists network devices")
    }
}

impl NetlinkDeserializable for RouteNetlinkMessage {
    type Error = DecodeError;

    fn deserialize(_header: &NetlinkHeader, _payload: &[u8]) -> Result<Self, DecodeError> {
        unreachable!("no bundle of tinydc lists network devices")
    }
}

pub mod address {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use crate::AddressFamily;

    #[derive(Debug, Clone, Default)]
    pub struct AddressMessage {
        pub header: AddressHeader,
        pub attributes: Vec<AddressAttribute>,
    }

    #[derive(Debug, Clone, Default)]
    pub struct AddressHeader {
        pub family: AddressFamily,
        pub prefix_len: u8,
        pub flags: AddressHeaderFlags,
        pub scope: AddressScope,
        pub index: u32,
    }

    #[derive(Debug, Clone)]
    pub enum AddressAttribute {
        Address(IpAddr),
        Local(IpAddr),
        Broadcast(Ipv4Addr),
        Multicast(Ipv6Addr),
    }

    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub enum AddressScope {
        #[default]
        Universe,
    }

    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct AddressHeaderFlags(u8);

    #[allow(non_upper_case_globals)]
    impl AddressHeaderFlags {
        /// IFA_F_PERMANENT of linux/if_addr.h.
        pub const Permanent: Self = Self(0x80);

        pub fn contains(self, other: Self) -> bool {
            self.0 & other.0 == other.0
        }
    }
}

pub mod link {
    #[derive(Debug, Clone, Default)]
    pub struct LinkMessage {
        pub header: LinkHeader,
        pub attributes: Vec<LinkAttribute>,
    }

    #[derive(Debug, Clone, Default)]
    pub struct LinkHeader {
        pub index: u32,
        pub flags: LinkFlags,
        pub change_mask: LinkFlags,
    }

    #[derive(Debug, Clone)]
    pub enum LinkAttribute {
        IfName(String),
        NetNsFd(i32),
    }

    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub struct LinkFlags(u32);

    #[allow(non_upper_case_globals)]
    impl LinkFlags {
        /// IFF_UP of linux/if.h.
        pub const Up: Self = Self(1);

        pub fn remove(&mut self, other: Self) {
            self.0 &= !other.0;
        }
    }

    impl std::ops::BitOrAssign for LinkFlags {
        fn bitor_assign(&mut self, other: Self) {
            self.0 |= other.0;
        }
    }
}
