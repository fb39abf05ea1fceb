//! Questions about the rest of the world: cache, one exchange for all who ask the same, upstreams in turn.
//!
//! Upstreams are given, or read from a resolv.conf whenever it has changed; that is looked at when somebody asks, never
//! by a timer. This server itself is never among them, and a stub of this machine that asks us back is found by a
//! question that only we could have sent it.
//!
//! Invariant: the same question is on its way at most once (`the_same_question_is_asked_once`).

use super::cache::{Cache, Key};
use super::counts::Counters;
use super::exchange::{ExchangeError, Exchanges, Wish};
use super::upstreams::{UpstreamView, Upstreams, parse_resolv_conf};
use super::wire::{self, Code, FLAG_CHECKING_DISABLED, Query, class, kind};
use crate::network::places::{Place, Places};
use crate::tasks::lock;
use async_channel::{Receiver, Sender};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};

/// Different questions on their way at once. Each holds a socket and a few kB.
const FLIGHTS_MAX: usize = 128;
/// One asker has a quarter of what is bounded: a container whose names nobody answers for does not end name resolution
/// for its node.
pub const ASKERS_MIN: usize = 4;
const ATTEMPTS_MAX: usize = 3;
/// How often a resolv.conf is looked at, at most.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const RESOLV_CONF_BYTES_MAX: u64 = 64 << 10;
/// Where probes for loops are.
const PROBES: &str = "loop.tinydc.internal";
/// systemd's stub, and where it writes what it asks itself.
const SYSTEMD_STUB: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 53);
const SYSTEMD_RESOLV_CONF: &str = "/run/systemd/resolve/resolv.conf";

#[derive(Clone, Debug)]
pub enum UpstreamSource {
    Fixed(Vec<SocketAddr>),
    ResolvConf(PathBuf),
}

pub enum Outcome {
    /// A message without OPT record, and its age in seconds.
    Answer(Arc<[u8]>, u32),
    Failed,
    Busy,
}

/// One question on its way. `done` closes when it is over; without a result then, it failed.
struct Flight {
    result: OnceLock<Arc<[u8]>>,
    done: Receiver<()>,
}

#[derive(Default)]
struct State {
    upstreams: Upstreams,
    cache: Cache,
    flights: HashMap<Key, Arc<Flight>>,
    looked_at: Option<Instant>,
    modified: Option<SystemTime>,
    /// Names that only the upstream beside them was asked for.
    probes: Vec<(String, SocketAddr)>,
}

pub struct Forwarder {
    source: UpstreamSource,
    own: SocketAddr,
    state: Mutex<State>,
    exchanges: Exchanges,
    flights: Arc<Places>,
    counters: Arc<Counters>,
}

/// Ends a flight, also if the task that flies it is dropped.
struct Pilot<'a> {
    forwarder: &'a Forwarder,
    key: Key,
    flight: Arc<Flight>,
    _done: Sender<()>,
    _place: Arc<Place>,
}

impl Drop for Pilot<'_> {
    fn drop(&mut self) {
        lock(&self.forwarder.state).flights.remove(&self.key);
    }
}

enum Boarding<'a> {
    Pilot(Pilot<'a>),
    Passenger(Arc<Flight>),
    Full,
}

fn key_of(query: &Query<'_>) -> Key {
    let mut key = query.question_bytes.to_vec();
    let name_length = key.len().saturating_sub(4);
    key[..name_length].make_ascii_lowercase();
    let wants_signatures = query.edns.is_some_and(|edns| edns.wants_signatures);
    let is_unchecked = query.flags & FLAG_CHECKING_DISABLED != 0;
    key.push(u8::from(wants_signatures) | u8::from(is_unchecked) << 1);
    Arc::from(key)
}

impl Forwarder {
    pub fn new(source: UpstreamSource, own: SocketAddr, counters: Arc<Counters>) -> Forwarder {
        let forwarder = Forwarder {
            source,
            own,
            state: Mutex::default(),
            exchanges: Exchanges::default(),
            flights: Places::new(FLIGHTS_MAX, FLIGHTS_MAX / ASKERS_MIN),
            counters,
        };
        if let UpstreamSource::Fixed(addresses) = &forwarder.source {
            let addresses = forwarder.without_own(addresses);
            lock(&forwarder.state).upstreams.replace(&addresses);
            forwarder.probe(&addresses);
        }
        forwarder
    }

    fn without_own(&self, addresses: &[SocketAddr]) -> Vec<SocketAddr> {
        addresses.iter().filter(|address| **address != self.own).copied().collect()
    }

    /// From the cache, without waiting.
    pub fn known(&self, query: &Query<'_>) -> Option<(Arc<[u8]>, u32)> {
        let found = lock(&self.state).cache.find(&key_of(query), Instant::now());
        if found.is_some() {
            self.counters.from_cache.fetch_add(1, Ordering::Relaxed);
        }
        found
    }

    pub async fn ask(&self, query: &Query<'_>, asker: Ipv4Addr, by_tcp: bool) -> Outcome {
        if let Some((message, age)) = self.known(query) {
            return Outcome::Answer(message, age);
        }
        let key = key_of(query);
        let flight = match self.board(&key, asker) {
            Boarding::Full => return Outcome::Busy,
            Boarding::Passenger(flight) => {
                // Nothing is sent: it returns when the pilot is gone.
                let _ = flight.done.recv().await;
                flight
            }
            Boarding::Pilot(pilot) => {
                self.counters.forwarded.fetch_add(1, Ordering::Relaxed);
                let flight = pilot.flight.clone();
                if let Some(message) = self.ask_upstreams(&key, by_tcp).await {
                    let message: Arc<[u8]> = Arc::from(message);
                    lock(&self.state).cache.store(key, message.clone(), Instant::now());
                    let _ = flight.result.set(message);
                }
                drop(pilot);
                flight
            }
        };
        flight.result.get().map_or(Outcome::Failed, |message| Outcome::Answer(message.clone(), 0))
    }

    fn board(&self, key: &Key, asker: Ipv4Addr) -> Boarding<'_> {
        let mut state = lock(&self.state);
        match state.flights.entry(key.clone()) {
            Entry::Occupied(entry) => Boarding::Passenger(entry.get().clone()),
            Entry::Vacant(entry) => {
                let Some(place) = self.flights.take(asker.into()) else { return Boarding::Full };
                let (sender, done) = async_channel::bounded(1);
                let flight = Arc::new(Flight { result: OnceLock::new(), done });
                entry.insert(flight.clone());
                Boarding::Pilot(Pilot {
                    forwarder: self,
                    key: key.clone(),
                    flight,
                    _done: sender,
                    _place: place,
                })
            }
        }
    }

    /// The first good answer; else the last bad one, such as a server failure.
    async fn ask_upstreams(&self, key: &Key, by_tcp: bool) -> Option<Vec<u8>> {
        self.look_for_upstreams();
        let (order, are_all_failing) = {
            let (state, now) = (lock(&self.state), Instant::now());
            (state.upstreams.order(now), state.upstreams.are_all_failing(now))
        };
        // A lost datagram is sent again; where nothing answers anyway, the client is told soon.
        let attempts = order.len().max(if are_all_failing { 1 } else { 2 }).min(ATTEMPTS_MAX);
        let mut last = None;
        for upstream in order.iter().cycle().take(if order.is_empty() { 0 } else { attempts }) {
            let asked = self.ask_one(*upstream, key, by_tcp).await;
            match asked {
                Ok(message) => {
                    lock(&self.state).upstreams.succeeded(*upstream);
                    let Some(message) = wire::without_opt(&message) else { continue };
                    if matches!(wire::code_of(&message), 0 | 3) {
                        return Some(message);
                    }
                    last = Some(message);
                }
                Err(error) => {
                    self.counters.upstream_failures.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(%upstream, error = %error, "an upstream DNS server failed");
                    lock(&self.state).upstreams.failed(*upstream, Instant::now());
                }
            }
        }
        last
    }

    /// Routers of old refuse EDNS; they are asked without.
    async fn ask_one(&self, upstream: SocketAddr, key: &Key, by_tcp: bool) -> Result<Vec<u8>, ExchangeError> {
        let (flags, question) = key.split_last().expect("key_of ends a key with its flags");
        let wish = Wish {
            question,
            wants_signatures: flags & 1 != 0,
            is_unchecked: flags & 2 != 0,
            with_edns: true,
        };
        let answer = self.exchanges.ask(upstream, &wish, by_tcp).await?;
        let code = wire::code_of(&answer);
        if code == Code::FormatError as u16 || code == Code::NotImplemented as u16 {
            return self.exchanges.ask(upstream, &Wish { with_edns: false, ..wish }, by_tcp).await;
        }
        Ok(answer)
    }

    /// Reads the resolv.conf again if it has changed.
    fn look_for_upstreams(&self) {
        let UpstreamSource::ResolvConf(path) = &self.source else { return };
        let now = Instant::now();
        {
            let mut state = lock(&self.state);
            if state.looked_at.is_some_and(|at| now.saturating_duration_since(at) < LOOK_EVERY) {
                return;
            }
            state.looked_at = Some(now);
        }
        let Some((modified, mut addresses)) = read_resolv_conf(path) else { return };
        if lock(&self.state).modified == Some(modified) {
            return;
        }
        if addresses.iter().any(|address| address.ip() == SYSTEMD_STUB) {
            addresses = read_resolv_conf(Path::new(SYSTEMD_RESOLV_CONF)).map_or(addresses, |(_, real)| real);
        }
        let addresses = self.without_own(&addresses);
        tracing::debug!(?addresses, "upstream DNS servers");
        {
            let mut state = lock(&self.state);
            state.modified = Some(modified);
            state.upstreams.replace(&addresses);
            // Another network may know other names.
            state.cache.clear();
        }
        self.probe(&addresses);
    }

    /// Asks each stub of this machine for a name of its own. If the question comes back here, it would go round for ever.
    fn probe(&self, addresses: &[SocketAddr]) {
        lock(&self.state).probes.clear();
        for address in addresses.iter().filter(|address| address.ip().is_loopback()) {
            let mut bytes = [0; 8];
            if ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut bytes).is_err() {
                return;
            }
            let label = format!("{:016x}", u64::from_be_bytes(bytes));
            let mut message = wire::header(u16::from_be_bytes([bytes[0], bytes[1]]), 0x0100, 1);
            let name = format!("{label}.{PROBES}");
            for label in name.split('.') {
                message.push(label.len() as u8);
                message.extend_from_slice(label.as_bytes());
            }
            message.push(0);
            message.extend_from_slice(&kind::A.to_be_bytes());
            message.extend_from_slice(&class::INTERNET.to_be_bytes());
            lock(&self.state).probes.push((name, *address));
            // Not sent: then it is asked in vain too.
            let _ = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
                .and_then(|socket| socket.send_to(&message, address));
        }
    }

    /// Whether the name is one of our own probes, back again.
    pub fn hears_probe(&self, name: &str) -> bool {
        if !name.ends_with(PROBES) {
            return false;
        }
        let mut state = lock(&self.state);
        let Some((_, upstream)) = state.probes.iter().find(|(probe, _)| probe == name).cloned() else {
            return false;
        };
        if state.upstreams.is_a_loop(upstream) {
            tracing::warn!(%upstream, "this DNS server asks us what we ask it; it is asked no more");
        }
        true
    }

    pub fn upstreams(&self) -> Vec<UpstreamView> {
        lock(&self.state).upstreams.view(Instant::now())
    }

    /// Entries and bytes.
    pub fn cached(&self) -> (usize, usize) {
        let state = lock(&self.state);
        (state.cache.len(), state.cache.bytes())
    }
}

fn read_resolv_conf(path: &Path) -> Option<(SystemTime, Vec<SocketAddr>)> {
    let file = fs::File::open(path).ok()?;
    let modified = file.metadata().ok()?.modified().ok()?;
    let mut text = String::new();
    file.take(RESOLV_CONF_BYTES_MAX).read_to_string(&mut text).ok()?;
    let index = |name: &str| nix::net::if_::if_nametoindex(name).ok();
    Some((modified, parse_resolv_conf(&text, &index)))
}
