//! WireGuard in this process, for kernels without it: packets of a TUN interface in and out of one UDP socket.
//!
//! One thread, which waits for packets of either side, for orders and for its clock. A packet that can't be sent now is
//! dropped, as an interface does it: whoever sent it sends it again.

use super::{PublicKey, Slot, TunnelPeer};
use crate::model::Gather;
use boringtun::noise::rate_limiter::RateLimiter;
use boringtun::noise::{Packet, Tunn, TunnResult, handshake::parse_handshake_anon};
use boringtun::x25519;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The protocol's own clock: handshakes again, keys renewed, keep-alives.
const CLOCK: Duration = Duration::from_millis(250);
const BEGIN_AGAIN: Duration = Duration::from_millis(400);
const PACKET_BYTES_MAX: usize = 65_536;
/// Before the other side is looked after.
const PACKETS_AT_ONCE: usize = 64;
const HANDSHAKES_PER_SECOND: u64 = 100;

enum Order {
    Put(TunnelPeer),
    Remove(PublicKey),
    Stop,
}

pub struct Userspace {
    orders: Mutex<mpsc::Sender<Order>>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Userspace {
    pub fn start(tun: OwnedFd, private: x25519::StaticSecret, slot: Slot) -> io::Result<Userspace> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, slot.port()))?;
        socket.set_nonblocking(true)?;
        let wake = Arc::new(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?);
        let (orders, ordered) = mpsc::channel();
        let public = x25519::PublicKey::from(&private);
        let engine = Engine {
            tun,
            socket,
            wake: wake.clone(),
            ordered,
            private,
            public,
            door: RateLimiter::new(&public, HANDSHAKES_PER_SECOND),
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            peers: Vec::new(),
            next_index: 1,
            by_network: BTreeMap::new(),
        };
        let name = format!("tunnel {}", slot.link_name());
        let thread = std::thread::Builder::new().name(name).spawn(move || engine.run())?;
        Ok(Userspace { orders: Mutex::new(orders), wake, thread: Some(thread) })
    }

    fn order(&self, order: Order) {
        // Without its interface the thread has ended: `is_running` tells.
        let _ = crate::tasks::lock(&self.orders).send(order);
        let _ = rustix::io::write(&*self.wake, &1u64.to_ne_bytes());
    }

    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    pub fn put_peer(&self, peer: TunnelPeer) {
        self.order(Order::Put(peer));
    }

    pub fn remove_peer(&self, public_key: PublicKey) {
        self.order(Order::Remove(public_key));
    }
}

impl Drop for Userspace {
    fn drop(&mut self) {
        self.order(Order::Stop);
        if let Some(thread) = self.thread.take() {
            // It panicked: the process ends by its hook.
            let _ = thread.join();
        }
    }
}

impl TunnelPeer {
    /// Whether it may send from there.
    fn has(&self, address: IpAddr) -> bool {
        let own = self.ula_prefix.ipv4_of(address);
        own.is_some_and(|own| first_three(own.octets()) == first_three(self.network.octets()))
    }
}

struct Peer {
    known: TunnelPeer,
    index: u32,
    session: Tunn,
    /// When the first handshake was last begun, until it is over.
    begun: Option<Instant>,
}

struct Engine {
    tun: OwnedFd,
    socket: UdpSocket,
    wake: Arc<OwnedFd>,
    ordered: mpsc::Receiver<Order>,
    private: x25519::StaticSecret,
    public: x25519::PublicKey,
    /// Before anything costly is done for a handshake of anybody.
    door: RateLimiter,
    /// Of the sessions: what comes to them has passed the door, and is not counted twice.
    unlimited: Arc<RateLimiter>,
    peers: Vec<Peer>,
    /// Names a session in the packets of its peer; never used twice.
    next_index: u32,
    by_network: BTreeMap<[u8; 3], usize>,
}

impl Engine {
    fn run(mut self) {
        let mut packet = vec![0; PACKET_BYTES_MAX];
        let mut buffer = vec![0; PACKET_BYTES_MAX];
        let mut clock_due = Instant::now() + CLOCK;
        loop {
            let pause = clock_due.saturating_duration_since(Instant::now());
            let timeout = Timespec { tv_sec: 0, tv_nsec: pause.as_nanos().min(999_999_999) as _ };
            let mut waiting = [
                PollFd::new(&self.tun, PollFlags::IN),
                PollFd::new(&self.socket, PollFlags::IN),
                PollFd::new(&*self.wake, PollFlags::IN),
            ];
            if poll(&mut waiting, Some(&timeout)).is_err() {
                continue;
            }
            let [from_tun, from_socket, woken] = waiting.each_ref().map(|one| !one.revents().is_empty());
            if woken && !self.take_orders() {
                return;
            }
            if from_tun && !self.send_packets(&mut packet, &mut buffer) {
                return;
            }
            if from_socket {
                self.receive_packets(&mut packet, &mut buffer);
            }
            if Instant::now() >= clock_due {
                clock_due = Instant::now() + CLOCK;
                self.tick(&mut buffer);
            }
        }
    }

    /// Whether to go on.
    fn take_orders(&mut self) -> bool {
        let mut count = [0; 8];
        // Empty already if it was woken for nothing.
        let _ = rustix::io::read(&*self.wake, &mut count);
        while let Ok(order) = self.ordered.try_recv() {
            match order {
                Order::Put(peer) => self.put(peer),
                Order::Remove(key) => self.peers.retain(|peer| peer.known.public_key != key),
                Order::Stop => return false,
            }
        }
        let networks = self.peers.iter().enumerate();
        self.by_network =
            networks.map(|(place, peer)| (first_three(peer.known.network.octets()), place)).gather();
        true
    }

    fn put(&mut self, known: TunnelPeer) {
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.known.public_key == known.public_key) {
            peer.known = known;
            return;
        }
        // One network has one peer: its new key takes the place of the old one.
        self.peers.retain(|peer| peer.known.network != known.network);
        let index = self.next_index;
        self.next_index += 1;
        let session = Tunn::new(
            self.private.clone(),
            x25519::PublicKey::from(known.public_key),
            None,
            None,
            index,
            Some(self.unlimited.clone()),
        );
        self.peers.push(Peer { known, index, session, begun: None });
    }

    /// From containers here to other nodes. Whether the interface is still there.
    fn send_packets(&mut self, packet: &mut [u8], buffer: &mut [u8]) -> bool {
        for _ in 0..PACKETS_AT_ONCE {
            let length = match rustix::io::read(&self.tun, &mut *packet) {
                Ok(length) => length,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return true,
                Err(_) => return false,
            };
            let packet = &packet[..length];
            let Some(place) = Tunn::dst_address(packet).and_then(|to| self.peer_at(to)) else { continue };
            let peer = &mut self.peers[place];
            if let TunnResult::WriteToNetwork(sealed) = peer.session.encapsulate(packet, buffer) {
                if peer.session.time_since_last_handshake().is_none() {
                    peer.begun = Some(Instant::now());
                }
                send(&self.socket, sealed, peer.known.endpoint.into());
            }
        }
        true
    }

    fn peer_at(&self, address: IpAddr) -> Option<usize> {
        // One cluster, one prefix.
        let address = self.peers.first()?.known.ula_prefix.ipv4_of(address)?;
        self.by_network.get(&first_three(address.octets())).copied()
    }

    /// From other nodes to containers here.
    fn receive_packets(&mut self, packet: &mut [u8], buffer: &mut [u8]) {
        for _ in 0..PACKETS_AT_ONCE {
            let Ok((length, from)) = self.socket.recv_from(packet) else { return };
            let packet = &packet[..length];
            if !self.admits(packet, from, buffer) {
                continue;
            }
            let Some(place) = self.sender_of(packet) else { continue };
            let peer = &mut self.peers[place];
            let mut outcome = peer.session.decapsulate(Some(from.ip()), packet, buffer);
            // What waited for the handshake follows, until there is no more.
            while let TunnResult::WriteToNetwork(answer) = outcome {
                send(&self.socket, answer, from);
                outcome = peer.session.decapsulate(None, &[], buffer);
            }
            let (opened, sender): (_, IpAddr) = match outcome {
                TunnResult::WriteToTunnelV4(opened, sender) => (opened, sender.into()),
                TunnResult::WriteToTunnelV6(opened, sender) => (opened, sender.into()),
                _ => continue,
            };
            if peer.known.has(sender) {
                // A full queue drops it, as an interface does.
                let _ = rustix::io::write(&self.tun, opened);
            }
        }
    }

    /// Whether a packet is worth the key exchange that its sender is known by: a handshake proves that it knows this
    /// node's key, and when there are many, that it gets what is sent to its address (WireGuard's paper, 5.3 and 5.4).
    fn admits(&self, packet: &[u8], from: SocketAddr, buffer: &mut [u8]) -> bool {
        match self.door.verify_packet(Some(from.ip()), packet, buffer) {
            Ok(_) => true,
            Err(TunnResult::WriteToNetwork(cookie)) => {
                send(&self.socket, cookie, from);
                false
            }
            Err(_) => false,
        }
    }

    /// Who sent a packet, by what stands in it: a peer's key in a first one, else the index that it was given.
    fn sender_of(&self, packet: &[u8]) -> Option<usize> {
        let by_index = |index: u32| self.peers.iter().position(|peer| peer.index == index >> 8);
        match Tunn::parse_incoming_packet(packet).ok()? {
            Packet::HandshakeInit(first) => {
                let half = parse_handshake_anon(&self.private, &self.public, &first).ok()?;
                self.peers.iter().position(|peer| peer.known.public_key == half.peer_static_public)
            }
            Packet::HandshakeResponse(answer) => by_index(answer.receiver_idx),
            Packet::PacketCookieReply(answer) => by_index(answer.receiver_idx),
            Packet::PacketData(data) => by_index(data.receiver_idx),
        }
    }

    fn tick(&mut self, buffer: &mut [u8]) {
        self.door.reset_count();
        for peer in &mut self.peers {
            let endpoint = peer.known.endpoint.into();
            if let TunnResult::WriteToNetwork(packet) = peer.session.update_timers(buffer) {
                send(&self.socket, packet, endpoint);
            }
            if peer.session.time_since_last_handshake().is_some() {
                peer.begun = None;
            }
            // The protocol waits 5 s before it tries again: long, when the other node was just not ready yet.
            if peer.begun.is_some_and(|at| at.elapsed() >= BEGIN_AGAIN)
                && let TunnResult::WriteToNetwork(packet) =
                    peer.session.format_handshake_initiation(buffer, true)
            {
                peer.begun = Some(Instant::now());
                send(&self.socket, packet, endpoint);
            }
        }
    }
}

fn send(socket: &UdpSocket, packet: &[u8], to: SocketAddr) {
    // Lost, as any datagram may be.
    let _ = socket.send_to(packet, to);
}

fn first_three([first, second, third, _]: [u8; 4]) -> [u8; 3] {
    [first, second, third]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ClusterId, UlaPrefix};

    fn engine(secret: u8) -> Engine {
        let private = x25519::StaticSecret::from([secret; 32]);
        let public = x25519::PublicKey::from(&private);
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        Engine {
            tun: std::fs::File::open("/dev/null").unwrap().into(),
            socket,
            wake: Arc::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap()),
            ordered: mpsc::channel().1,
            private,
            public,
            door: RateLimiter::new(&public, HANDSHAKES_PER_SECOND),
            unlimited: Arc::new(RateLimiter::new(&public, u64::MAX)),
            peers: Vec::new(),
            next_index: 1,
            by_network: BTreeMap::new(),
        }
    }

    fn known(of: &Engine, number: u8) -> TunnelPeer {
        let SocketAddr::V4(endpoint) = of.socket.local_addr().unwrap() else { panic!("an IPv4 socket") };
        TunnelPeer {
            public_key: of.public.to_bytes(),
            endpoint,
            network: Ipv4Addr::new(10, 77, number, 0),
            ula_prefix: UlaPrefix::of(ClusterId(7)),
        }
    }

    #[test]
    fn a_first_packet_names_its_sender_by_key_and_a_new_key_takes_the_place_of_the_old() {
        let (mut one, mut two, stranger) = (engine(1), engine(2), engine(3));
        one.put(known(&two, 2));
        let mut buffer = vec![0; 2048];
        let TunnResult::WriteToNetwork(first) = one.peers[0].session.encapsulate(&[0x45; 40], &mut buffer)
        else {
            panic!("a handshake is begun")
        };
        let first = first.to_vec();
        assert_eq!(two.sender_of(&first), None, "not known yet");
        two.put(known(&stranger, 3));
        two.put(known(&one, 1));
        assert_eq!(two.sender_of(&first), Some(1));
        let renewed = TunnelPeer { public_key: [9; 32], ..known(&one, 1) };
        two.put(renewed);
        assert_eq!((two.sender_of(&first), two.peers.len()), (None, 2));
        assert_eq!(two.sender_of(b"no packet of the protocol"), None);
    }

    #[test]
    fn a_handshake_costs_nothing_before_it_has_proved_what_it_can() {
        let (mut one, mut two) = (engine(1), engine(2));
        one.put(known(&two, 2));
        two.put(known(&one, 1));
        let mut buffer = vec![0; 2048];
        let TunnResult::WriteToNetwork(first) = one.peers[0].session.encapsulate(&[0x45; 40], &mut buffer)
        else {
            panic!("a handshake is begun")
        };
        let first = first.to_vec();
        let from = one.socket.local_addr().unwrap();
        let mut forged = first.clone();
        // In the first of its two sums.
        forged[116] ^= 1;
        assert!(!two.admits(&forged, from, &mut buffer));
        let admitted =
            (0..HANDSHAKES_PER_SECOND + 9).filter(|_| two.admits(&first, from, &mut buffer)).count();
        assert_eq!(admitted, HANDSHAKES_PER_SECOND as usize);
        // Who is sent a cookie proves with it that the address is its own.
        let length = one.socket.recv(&mut buffer).unwrap();
        let cookie = buffer[..length].to_vec();
        assert_eq!(one.sender_of(&cookie), Some(0));
        one.peers[0].session.decapsulate(Some(from.ip()), &cookie, &mut buffer);
        let again = one.peers[0].session.format_handshake_initiation(&mut buffer, true);
        let TunnResult::WriteToNetwork(again) = again else { panic!("a handshake is begun again") };
        let again = again.to_vec();
        assert!(two.admits(&again, from, &mut buffer));
        assert_eq!(two.sender_of(&again), Some(0));
    }
}
