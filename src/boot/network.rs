//! The board's own interfaces: cables noticed, addresses held, one default route, name servers.
//!
//! Input: settings, `/sys/class/net`, link events, DHCP packets. Output: addresses and routes by netlink,
//! `/etc/resolv.conf`. Never touched: tinydc's own links, which have no device behind them.
//!
//! Everything here returns at once; `deadline_ms` says when `tick` is due.

use super::dhcp::packet::Lease;
use super::dhcp::{Client, Event, Output};
use super::settings::{Addressing, Settings};
use crate::model::Order;
use crate::network::link::{self, Route};
use crate::network::netlink::Socket;
use anyhow::{Context, Result};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, setsockopt, sockopt};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

const LINKS: &str = "/sys/class/net";
const CLIENT_PORT: u16 = 68;
const SERVER_PORT: u16 = 67;
/// As a home router's packets come.
const PACKET_BYTES_MAX: usize = 1500;
/// Of one socket in one turn, so that a flood delays nothing else.
const PACKETS_PER_TURN: usize = 16;

/// What an interface has been given.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Configured {
    address: Ipv4Addr,
    prefix_length: u8,
    router: Option<Ipv4Addr>,
    name_servers: Vec<Ipv4Addr>,
    time_servers: Vec<Ipv4Addr>,
}

impl From<&Lease> for Configured {
    fn from(lease: &Lease) -> Configured {
        Configured {
            address: lease.address,
            prefix_length: lease.prefix_length,
            router: lease.router,
            name_servers: lease.name_servers.clone(),
            time_servers: lease.time_servers.clone(),
        }
    }
}

struct Interface {
    index: u32,
    addressing: Addressing,
    dhcp: Option<(Client, UdpSocket)>,
    has_carrier: bool,
    configured: Option<Configured>,
}

pub struct Network {
    interfaces: BTreeMap<String, Interface>,
    netlink: Socket,
    events: OwnedFd,
    default_route: Option<Route>,
    /// What happened, for the console.
    news: Vec<String>,
}

fn is_physical(name: &str) -> bool {
    Path::new(LINKS).join(name).join("device").exists()
}

fn hardware_of(name: &str) -> Option<[u8; 6]> {
    let text = fs::read_to_string(Path::new(LINKS).join(name).join("address")).ok()?;
    let bytes: Vec<u8> =
        text.trim().split(':').map(|part| u8::from_str_radix(part, 16)).collect::<Result<_, _>>().ok()?;
    bytes.try_into().ok()
}

/// Names of the machine's own interfaces, in order.
fn physical_names() -> Vec<String> {
    let entries = fs::read_dir(LINKS).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_physical(name))
        .collect();
    names.order();
    names
}

/// The hardware address that names this board: that of its first interface.
pub fn board_hardware() -> Option<[u8; 6]> {
    physical_names().iter().find_map(|name| hardware_of(name))
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    // Early in a boot there may be no randomness yet; the hardware address still tells boards apart.
    let read = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
    if read.is_ok() { u32::from_ne_bytes(bytes) } else { crate::linux::clock::boot_ms() as u32 }
}

/// Sends to everyone before the interface has an address, and hears what comes for everyone.
fn open_dhcp(name: &str) -> Result<UdpSocket> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = nix::sys::socket::socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
    setsockopt(&socket, sockopt::ReuseAddr, &true)?;
    setsockopt(&socket, sockopt::Broadcast, &true)?;
    setsockopt(&socket, sockopt::BindToDevice, &OsString::from(name))?;
    let any = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, CLIENT_PORT));
    nix::sys::socket::bind(socket.as_raw_fd(), &any)?;
    Ok(UdpSocket::from(socket))
}

impl Network {
    pub fn open() -> Result<Network> {
        let netlink = Socket::route().context("open netlink")?;
        let events = crate::linux::machine::network_events().context("listen for link changes")?;
        let loopback = link::index_of("lo").context("find the loopback interface")?;
        link::set_up(&netlink, loopback).context("set up the loopback interface")?;
        Ok(Network { interfaces: BTreeMap::new(), netlink, events, default_route: None, news: Vec::new() })
    }

    /// Takes in new interfaces, lost ones, and cables plugged or pulled.
    pub fn look(&mut self, settings: &Settings, host_name: &str, now_ms: u64) {
        let names = physical_names();
        self.interfaces.retain(|name, _| names.contains(name));
        for name in names {
            if !self.interfaces.contains_key(&name)
                && let Err(error) = self.add(&name, settings, host_name)
            {
                self.news.push(format!("{name}: {error:#}"));
                continue;
            }
            let carrier = fs::read_to_string(Path::new(LINKS).join(&name).join("carrier"));
            let has_carrier = carrier.is_ok_and(|text| text.trim() == "1");
            self.set_carrier(&name, has_carrier, now_ms);
        }
        self.settle();
    }

    fn add(&mut self, name: &str, settings: &Settings, host_name: &str) -> Result<()> {
        let index = link::index_of(name).context("find its number")?;
        let addressing = settings.addressing_of(name).clone();
        if addressing != Addressing::Off {
            link::set_up(&self.netlink, index).context("set it up")?;
        }
        let dhcp = match addressing {
            Addressing::Dhcp => {
                let hardware = hardware_of(name).context("read its hardware address")?;
                Some((Client::new(hardware, host_name), open_dhcp(name).context("open a socket for DHCP")?))
            }
            Addressing::Static { .. } | Addressing::Off => None,
        };
        let interface = Interface { index, addressing, dhcp, has_carrier: false, configured: None };
        self.interfaces.insert(name.into(), interface);
        Ok(())
    }

    fn set_carrier(&mut self, name: &str, has_carrier: bool, now_ms: u64) {
        let Some(interface) = self.interfaces.get_mut(name) else { return };
        if interface.has_carrier == has_carrier {
            return;
        }
        interface.has_carrier = has_carrier;
        self.news.push(format!("{name}: {}", if has_carrier { "cable plugged in" } else { "no cable" }));
        if let Some((client, _)) = &mut interface.dhcp {
            let event = if has_carrier { Event::LinkUp { random: random() } } else { Event::LinkDown };
            let outputs = client.step(now_ms, event);
            self.carry_out(name, outputs);
        } else if let Addressing::Static { address, prefix_length, gateway, name_servers } =
            interface.addressing.clone()
            && has_carrier
        {
            self.configure(
                name,
                Configured {
                    address,
                    prefix_length,
                    router: gateway,
                    name_servers,
                    time_servers: Vec::new(),
                },
            );
        }
    }

    fn carry_out(&mut self, name: &str, outputs: Vec<Output>) {
        for output in outputs {
            match output {
                Output::Send { bytes, to } => {
                    let Some((_, socket)) = self.interfaces.get(name).and_then(|one| one.dhcp.as_ref())
                    else {
                        continue;
                    };
                    let to = to.unwrap_or(Ipv4Addr::BROADCAST);
                    // One that is lost is repeated by the client.
                    let _ = socket.send_to(&bytes, (to, SERVER_PORT));
                }
                Output::Use(lease) => self.configure(name, Configured::from(&lease)),
                Output::Drop => self.unconfigure(name),
            }
        }
    }

    fn configure(&mut self, name: &str, wanted: Configured) {
        let Some(interface) = self.interfaces.get_mut(name) else { return };
        if interface.configured.as_ref() == Some(&wanted) {
            return;
        }
        let is_new = interface.configured.as_ref().is_none_or(|held| held.address != wanted.address);
        if is_new {
            let added =
                link::add_address(&self.netlink, interface.index, wanted.address, wanted.prefix_length);
            match added {
                Ok(()) => {
                    self.news.push(format!("{name}: address {}/{}", wanted.address, wanted.prefix_length))
                }
                Err(error) => self.news.push(format!("{name}: set {}: {error}", wanted.address)),
            }
        }
        interface.configured = Some(wanted);
    }

    fn unconfigure(&mut self, name: &str) {
        let Some(interface) = self.interfaces.get_mut(name) else { return };
        let Some(held) = interface.configured.take() else { return };
        self.news.push(format!("{name}: gives up {}", held.address));
        // Gone already when the interface is.
        let _ = link::delete_address(&self.netlink, interface.index, held.address, held.prefix_length);
    }

    /// The default route by the first interface that has a router, and the name servers of all.
    fn settle(&mut self) {
        let configured = |interface: &Interface| {
            let router = interface.configured.as_ref()?.router?;
            Some(Route { to: None, via: Some(router), link: interface.index, is_on_link: true })
        };
        let wanted = self.interfaces.values().find_map(configured);
        let is_lost = self.default_route.as_ref().is_some_and(|held| {
            self.interfaces.values().all(|interface| configured(interface).as_ref() != Some(held))
        });
        if wanted != self.default_route || is_lost {
            if let Some(old) = self.default_route.take() {
                // The kernel drops routes of a lost address by itself.
                let _ = link::delete_route(&self.netlink, &old);
            }
            if let Some(route) = wanted {
                match link::add_route(&self.netlink, &route) {
                    Ok(()) => self.default_route = Some(route),
                    Err(error) => self.news.push(format!("default route: {error}")),
                }
            }
        }
        let mut text = String::new();
        for server in self.each(|configured| &configured.name_servers) {
            text += &format!("nameserver {server}\n");
        }
        if fs::read_to_string("/etc/resolv.conf").unwrap_or_default() != text
            && let Err(error) = fs::write("/etc/resolv.conf", text)
        {
            self.news.push(format!("write /etc/resolv.conf: {error}"));
        }
    }

    fn each(&self, list: impl Fn(&Configured) -> &Vec<Ipv4Addr>) -> Vec<Ipv4Addr> {
        let mut all: Vec<Ipv4Addr> = Vec::new();
        for address in self.interfaces.values().filter_map(|one| one.configured.as_ref()).flat_map(list) {
            if !all.contains(address) {
                all.push(*address);
            }
        }
        all
    }

    pub fn time_servers(&self) -> Vec<String> {
        self.each(|configured| &configured.time_servers).iter().map(Ipv4Addr::to_string).collect()
    }

    /// `eth0 192.168.1.5/24`, for each interface.
    pub fn addresses(&self) -> Vec<String> {
        let told = self.interfaces.iter().map(|(name, interface)| match &interface.configured {
            Some(held) => format!("{name} {}/{}", held.address, held.prefix_length),
            None if !interface.has_carrier => format!("{name} no cable"),
            None => format!("{name} no address yet"),
        });
        told.collect()
    }

    pub fn has_address(&self) -> bool {
        self.interfaces.values().any(|interface| interface.configured.is_some())
    }

    pub fn take_news(&mut self) -> Vec<String> {
        std::mem::take(&mut self.news)
    }

    /// What to wait on: link events, then a socket of each interface that asks for its address.
    pub fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        let dhcp = self.interfaces.values().filter_map(|one| one.dhcp.as_ref());
        std::iter::once(self.events.as_fd()).chain(dhcp.map(|(_, socket)| socket.as_fd())).collect()
    }

    /// Reads what has come; true when links have changed and `look` is due.
    pub fn receive(&mut self, now_ms: u64) -> bool {
        let mut buffer = vec![0; 16 << 10];
        let mut is_changed = false;
        // More than was read is lost (ENOBUFS): then too a look at the links tells all.
        loop {
            match crate::linux::machine::read_waiting(self.events.as_fd(), &mut buffer) {
                Ok(Some(length)) if length > 0 => is_changed = true,
                Ok(_) => break,
                Err(_) => {
                    is_changed = true;
                    break;
                }
            }
        }
        let names: Vec<String> = self.interfaces.keys().cloned().collect();
        let mut packet = vec![0; PACKET_BYTES_MAX];
        for name in names {
            for _ in 0..PACKETS_PER_TURN {
                let Some((client, socket)) = self.interfaces.get_mut(&name).and_then(|one| one.dhcp.as_mut())
                else {
                    break;
                };
                let Ok(length) = socket.recv(&mut packet) else { break };
                let outputs = client.step(now_ms, Event::Packet(&packet[..length]));
                self.carry_out(&name, outputs);
            }
        }
        self.settle();
        is_changed
    }

    pub fn tick(&mut self, now_ms: u64) {
        let names: Vec<String> = self.interfaces.keys().cloned().collect();
        for name in names {
            if let Some((client, _)) = self.interfaces.get_mut(&name).and_then(|one| one.dhcp.as_mut()) {
                let outputs = client.step(now_ms, Event::Tick);
                self.carry_out(&name, outputs);
            }
        }
        self.settle();
    }

    pub fn deadline_ms(&self) -> Option<u64> {
        let clients = self.interfaces.values().filter_map(|one| one.dhcp.as_ref());
        clients.filter_map(|(client, _)| client.deadline_ms()).min()
    }

    /// Gives the addresses back, at an orderly end.
    pub fn release(&mut self, now_ms: u64) {
        let names: Vec<String> = self.interfaces.keys().cloned().collect();
        for name in names {
            let client = self.interfaces.get(&name).and_then(|one| one.dhcp.as_ref());
            let release = client.and_then(|(client, _)| client.release(now_ms));
            self.carry_out(&name, release.into_iter().collect());
        }
    }
}
