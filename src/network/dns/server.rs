//! The sockets of the DNS server, and who may ask.

use super::counts::{Counters, DnsCounts};
use super::encode::encode;
use super::exchange::{read_message, write_message};
use super::forward::{ASKERS_MIN, Forwarder, Outcome, UpstreamSource};
use super::resolve::resolve;
use super::wire::{self, BadQuery, Code, Query};
use super::zone::Zone;
use crate::model::Gather;
use crate::network::places::Places;
use crate::tasks::{TaskGroup, lock, within};
use async_executor::Executor;
use async_io::{Async, Timer};
use futures_lite::future;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

/// Longer queries don't exist in practice: a name has 255 bytes.
const QUERY_BYTES_MAX: usize = 2048;
/// Datagrams answered before other tasks get their turn.
const BURST: u32 = 32;
/// Questions that wait for upstreams; each is a task of a few kB.
const WAITING_MAX: usize = 512;
const TCP_CONNECTIONS_MAX: usize = 64;
const TCP_IDLE_LIMIT: Duration = Duration::from_secs(10);
const TCP_WRITE_LIMIT: Duration = Duration::from_secs(5);
const TCP_ANSWER_BYTES_MAX: usize = 65_535;
/// After a socket error, such as no memory for buffers.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug, thiserror::Error)]
pub enum DnsError {
    #[error("bind {protocol} {address}; another DNS server may hold this port on all addresses")]
    Bind {
        protocol: &'static str,
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
}

#[derive(Clone, Debug)]
pub struct DnsConfig {
    /// The bridge's address, port 53. With port 0 the system chooses one, for both protocols.
    pub listen: SocketAddrV4,
    pub upstreams: UpstreamSource,
}

pub struct DnsServer {
    server: Arc<Server>,
    tasks: Arc<TaskGroup>,
    address: SocketAddr,
}

struct Server {
    zone: RwLock<Arc<Zone>>,
    forwarder: Forwarder,
    counters: Arc<Counters>,
    locals: Mutex<Locals>,
    waiting: Arc<Places>,
    connections: Arc<Places>,
}

/// Addresses of this machine, as of the last time that an unknown one asked.
#[derive(Default)]
struct Locals {
    addresses: BTreeSet<Ipv4Addr>,
    read_at: Option<Instant>,
}

/// With SO_REUSEPORT, so that port 53 can be published and held on all other addresses at the same time.
fn bind(address: SocketAddrV4, kind: SocketType) -> io::Result<OwnedFd> {
    let socket = rustix::net::socket_with(AddressFamily::INET, kind, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseport(&socket, true)?;
    if kind == SocketType::STREAM {
        sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    Ok(socket)
}

fn bind_udp(address: SocketAddrV4) -> io::Result<UdpSocket> {
    bind(address, SocketType::DGRAM).map(UdpSocket::from)
}

fn bind_tcp(address: SocketAddrV4) -> io::Result<TcpListener> {
    const BACKLOG: i32 = 64;
    let socket = bind(address, SocketType::STREAM)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

impl DnsServer {
    /// Binds UDP and TCP and answers until it is stopped; with an empty zone it only forwards.
    pub fn start(config: DnsConfig, executor: &Arc<Executor<'static>>) -> Result<DnsServer, DnsError> {
        let failed = |protocol, address| move |source| DnsError::Bind { protocol, address, source };
        let wanted = SocketAddr::V4(config.listen);
        let udp = bind_udp(config.listen).and_then(Async::new).map_err(failed("UDP", wanted))?;
        let address = udp.get_ref().local_addr().map_err(failed("UDP", wanted))?;
        let tcp_address = SocketAddrV4::new(*config.listen.ip(), address.port());
        let tcp = bind_tcp(tcp_address).and_then(Async::new).map_err(failed("TCP", address))?;
        let counters = Arc::<Counters>::default();
        let server = Arc::new(Server {
            zone: RwLock::default(),
            forwarder: Forwarder::new(config.upstreams, address, counters.clone()),
            counters,
            locals: Mutex::default(),
            waiting: Places::new(WAITING_MAX, WAITING_MAX / ASKERS_MIN),
            connections: Places::new(TCP_CONNECTIONS_MAX, TCP_CONNECTIONS_MAX / ASKERS_MIN),
        });
        let tasks = TaskGroup::new(executor.clone());
        tasks.spawn(serve_udp(server.clone(), tasks.clone(), Arc::new(udp)));
        tasks.spawn(accept_tcp(server.clone(), tasks.clone(), tcp));
        Ok(DnsServer { server, tasks, address })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next question is answered from it.
    pub fn set_zone(&self, zone: Zone) {
        let zone = Arc::new(zone);
        let mut place = self.server.zone.write().unwrap_or_else(|poison| poison.into_inner());
        let old = std::mem::replace(&mut *place, zone);
        drop(place);
        // Freed outside the lock.
        drop(old);
    }

    pub fn zone(&self) -> Arc<Zone> {
        self.server.zone()
    }

    pub fn counts(&self) -> DnsCounts {
        let (cache_entries, cache_bytes) = self.server.forwarder.cached();
        let upstreams = self.server.forwarder.upstreams();
        DnsCounts { cache_entries, cache_bytes, upstreams, ..self.server.counters.read() }
    }

    /// Returns when the sockets are closed.
    pub async fn stop(self) {
        self.tasks.stop().await;
    }
}

impl Drop for DnsServer {
    /// An owner that failed on its way must not leave tasks behind that own themselves.
    fn drop(&mut self) {
        self.tasks.halt();
    }
}

/// What is to be done with a message.
enum Step {
    Nothing,
    Send(Vec<u8>),
    Ask,
}

impl Server {
    fn zone(&self) -> Arc<Zone> {
        self.zone.read().unwrap_or_else(|poison| poison.into_inner()).clone()
    }

    /// Everything that can be said without waiting.
    fn step(&self, message: &[u8], asker: SocketAddr, by_tcp: bool) -> Step {
        let SocketAddr::V4(asker) = asker else { return Step::Nothing };
        let zone = self.zone();
        if !self.may_ask(&zone, *asker.ip()) {
            self.counters.strangers.fetch_add(1, Ordering::Relaxed);
            return Step::Nothing;
        }
        let query = match Query::parse(message) {
            Ok(query) => query,
            Err(bad) => {
                self.counters.malformed.fetch_add(1, Ordering::Relaxed);
                return match bad {
                    BadQuery::Silent => Step::Nothing,
                    BadQuery::Refused { id, flags, code } => Step::Send(wire::bare_reply(id, flags, code)),
                };
            }
        };
        self.counters.questions.fetch_add(1, Ordering::Relaxed);
        if by_tcp {
            self.counters.by_tcp.fetch_add(1, Ordering::Relaxed);
        }
        if query.edns.is_some_and(|edns| edns.version > 0) {
            return Step::Send(query.bad_version_reply());
        }
        let limit = limit_of(&query, by_tcp);
        if let Some(reply) = encode(&query, &resolve(&zone, *asker.ip(), &query.question), limit) {
            self.counters.answered_here.fetch_add(1, Ordering::Relaxed);
            self.forwarder.hears_probe(&query.question.name);
            return Step::Send(reply);
        }
        match self.forwarder.known(&query) {
            Some((message, age)) => Step::Send(query.present(&message, age, limit)),
            None => Step::Ask,
        }
    }

    /// Asks upstream. `message` was parsed before.
    async fn ask(&self, message: &[u8], asker: SocketAddr, by_tcp: bool) -> Option<Vec<u8>> {
        let SocketAddr::V4(asker) = asker else { return None };
        let query = Query::parse(message).ok()?;
        let place = self.waiting.take((*asker.ip()).into());
        let outcome = match place {
            Some(_) => self.forwarder.ask(&query, *asker.ip(), by_tcp).await,
            None => Outcome::Busy,
        };
        Some(match outcome {
            Outcome::Answer(message, age) => query.present(&message, age, limit_of(&query, by_tcp)),
            Outcome::Failed => query.plain_reply(Code::ServerFailure),
            Outcome::Busy => {
                self.counters.overloaded.fetch_add(1, Ordering::Relaxed);
                query.plain_reply(Code::ServerFailure)
            }
        })
    }

    fn is_busy_for(&self, asker: SocketAddr) -> bool {
        self.waiting.is_full_for(asker.ip())
    }

    /// Linux takes a datagram for one of its addresses on any interface: binding to the bridge keeps nobody out.
    fn may_ask(&self, zone: &Zone, asker: Ipv4Addr) -> bool {
        let table = zone.table();
        let is_ours = table.clients.contains_key(&asker)
            || table.ranges.iter().any(|range| range.contains(asker))
            || asker.is_loopback();
        is_ours || lock(&self.locals).contain(asker, Instant::now(), &read_locals)
    }
}

impl Locals {
    fn contain(&mut self, asker: Ipv4Addr, now: Instant, read: &dyn Fn() -> BTreeSet<Ipv4Addr>) -> bool {
        if self.addresses.contains(&asker) {
            return true;
        }
        if self.read_at.is_some_and(|at| now.saturating_duration_since(at) < Duration::from_secs(1)) {
            return false;
        }
        (self.addresses, self.read_at) = (read(), Some(now));
        self.addresses.contains(&asker)
    }
}

fn read_locals() -> BTreeSet<Ipv4Addr> {
    let interfaces = nix::ifaddrs::getifaddrs().into_iter().flatten();
    interfaces.filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip())).gather()
}

fn limit_of(query: &Query<'_>, by_tcp: bool) -> usize {
    if by_tcp { TCP_ANSWER_BYTES_MAX } else { query.udp_limit() }
}

async fn serve_udp(server: Arc<Server>, tasks: Arc<TaskGroup>, socket: Arc<Async<UdpSocket>>) {
    let mut buffer = vec![0; QUERY_BYTES_MAX];
    let mut burst = 0;
    loop {
        let Ok((length, asker)) = socket.recv_from(&mut buffer).await else {
            Timer::after(PAUSE).await;
            continue;
        };
        let message = &buffer[..length];
        match server.step(message, asker, false) {
            Step::Nothing => {}
            // A full buffer loses it, as the network might; the client asks again.
            Step::Send(reply) => drop(socket.get_ref().send_to(&reply, asker)),
            Step::Ask if server.is_busy_for(asker) => {
                // No task for it: `ask` refuses at once.
                if let Some(reply) = server.ask(message, asker, false).await {
                    drop(socket.get_ref().send_to(&reply, asker));
                }
            }
            Step::Ask => {
                let (server, socket, message) = (server.clone(), socket.clone(), message.to_vec());
                tasks.spawn(async move {
                    if let Some(reply) = server.ask(&message, asker, false).await {
                        drop(socket.get_ref().send_to(&reply, asker));
                    }
                });
            }
        }
        burst += 1;
        if burst == BURST {
            burst = 0;
            future::yield_now().await;
        }
    }
}

async fn accept_tcp(server: Arc<Server>, tasks: Arc<TaskGroup>, listener: Async<TcpListener>) {
    loop {
        let Ok((stream, asker)) = listener.accept().await else {
            Timer::after(PAUSE).await;
            continue;
        };
        let server = server.clone();
        tasks.spawn(async move {
            if let Some(_place) = server.connections.take(asker.ip()) {
                serve_tcp(&server, stream, asker).await;
            }
        });
    }
}

/// One question after another, until the client has no more or says nothing for too long.
async fn serve_tcp(server: &Server, mut stream: Async<TcpStream>, asker: SocketAddr) {
    while let Some(Ok(message)) = within(TCP_IDLE_LIMIT, read_message(&mut stream)).await {
        let reply = match server.step(&message, asker, true) {
            Step::Nothing => return,
            Step::Send(reply) => Some(reply),
            Step::Ask => server.ask(&message, asker, true).await,
        };
        let Some(reply) = reply else { return };
        match within(TCP_WRITE_LIMIT, write_message(&mut stream, &reply)).await {
            Some(Ok(())) => {}
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_this_machine_are_read_again_but_not_for_each_stranger() {
        let (mut locals, now) = (Locals::default(), Instant::now());
        let own = Ipv4Addr::new(192, 168, 1, 2);
        let stranger = Ipv4Addr::new(192, 168, 1, 3);
        let count = std::cell::Cell::new(0);
        let read = || {
            count.set(count.get() + 1);
            BTreeSet::from([own])
        };
        assert!(locals.contain(own, now, &read));
        for _ in 0..9 {
            assert!(!locals.contain(stranger, now, &read));
        }
        assert_eq!(count.get(), 1);
        assert!(!locals.contain(stranger, now + Duration::from_secs(1), &read));
        assert_eq!(count.get(), 2);
    }
}
