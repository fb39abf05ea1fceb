//! Connections to endpoints that wait for their next request.
//!
//! HTTP/1.1, one request at a time each. Idle ones are closed after 4 s, before common servers do it themselves (Node.js
//! after 5 s) and a request would run into the closing; whatever waits is bounded. An endpoint that couldn't be reached is
//! tried last for a second.

use super::body::Outgoing;
use super::socket::Socket;
use crate::model::Order;
use crate::tasks::{TaskGroup, lock, within};
use async_io::{Async, Timer};
use hyper::client::conn::http1::{Builder, SendRequest};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{SocketAddr, SocketAddrV4, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const CONNECT_LIMIT: Duration = Duration::from_secs(1);
const IDLE_LIMIT: Duration = Duration::from_secs(4);
/// Of one endpoint.
const IDLE_MAX: usize = 32;
/// Of all endpoints; each holds some 10 kB.
const IDLE_ALL_MAX: usize = 128;
/// How long an idle connection may take to notice that its last answer has ended.
const READY_LIMIT: Duration = Duration::from_millis(50);
const AVOIDED: Duration = Duration::from_secs(1);
const BUFFER_BYTES_MAX: usize = 64 << 10;

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no answer within {} s", CONNECT_LIMIT.as_secs())]
    Timeout,
    #[error("connect")]
    Connect(#[source] io::Error),
    #[error("begin HTTP")]
    Begin(#[source] hyper::Error),
}

/// A connection that serves one request now.
pub struct Lent {
    pub sender: SendRequest<Outgoing>,
    pub endpoint: SocketAddrV4,
    /// It served others before: the endpoint may close it at any moment.
    pub is_reused: bool,
}

struct Idle {
    sender: SendRequest<Outgoing>,
    since: Instant,
}

#[derive(Default)]
struct State {
    idle: BTreeMap<SocketAddrV4, VecDeque<Idle>>,
    count: usize,
    has_sweeper: bool,
    failed: BTreeMap<SocketAddrV4, Instant>,
    /// Of the current table; others are not kept.
    known: BTreeSet<SocketAddrV4>,
}

pub struct Pool {
    state: Mutex<State>,
    tasks: Arc<TaskGroup>,
}

impl Pool {
    pub fn new(tasks: Arc<TaskGroup>) -> Arc<Pool> {
        Arc::new(Pool { state: Mutex::default(), tasks })
    }

    /// Idle connections of endpoints that are gone are closed; requests on their way end by themselves.
    pub fn keep_only(&self, endpoints: BTreeSet<SocketAddrV4>) {
        let mut state = lock(&self.state);
        state.idle.retain(|endpoint, _| endpoints.contains(endpoint));
        state.failed.retain(|endpoint, _| endpoints.contains(endpoint));
        state.count = state.idle.values().map(VecDeque::len).sum();
        state.known = endpoints;
    }

    /// The same, with those last that failed a moment ago.
    pub fn ordered(&self, mut endpoints: Vec<SocketAddrV4>) -> Vec<SocketAddrV4> {
        let state = lock(&self.state);
        if !state.failed.is_empty() {
            endpoints
                .order_by_key(|endpoint| state.failed.get(endpoint).is_some_and(|at| at.elapsed() < AVOIDED));
        }
        endpoints
    }

    /// An idle connection, else a new one; with `is_fresh` only a new one.
    pub async fn lend(&self, endpoint: SocketAddrV4, is_fresh: bool) -> Result<Lent, ConnectError> {
        while let Some(mut sender) = self.take_idle(endpoint).filter(|_| !is_fresh) {
            if let Some(Ok(())) = within(READY_LIMIT, sender.ready()).await {
                return Ok(Lent { sender, endpoint, is_reused: true });
            }
        }
        let connected = within(CONNECT_LIMIT, Async::<TcpStream>::connect(SocketAddr::V4(endpoint))).await;
        let stream =
            match connected.ok_or(ConnectError::Timeout).and_then(|it| it.map_err(ConnectError::Connect)) {
                Ok(stream) => stream,
                Err(error) => {
                    lock(&self.state).failed.insert(endpoint, Instant::now());
                    return Err(error);
                }
            };
        lock(&self.state).failed.remove(&endpoint);
        // Refused only by a broken system; then it is slower.
        let _ = stream.get_ref().set_nodelay(true);
        let mut builder = Builder::new();
        builder.max_buf_size(BUFFER_BYTES_MAX);
        let (sender, connection) =
            builder.handshake(Socket::new(stream)).await.map_err(ConnectError::Begin)?;
        self.tasks.spawn(async move {
            // Who sent the request gets the error.
            let _ = connection.with_upgrades().await;
        });
        Ok(Lent { sender, endpoint, is_reused: false })
    }

    fn take_idle(&self, endpoint: SocketAddrV4) -> Option<SendRequest<Outgoing>> {
        let mut state = lock(&self.state);
        let taken = state.idle.get_mut(&endpoint)?.pop_back()?;
        state.count -= 1;
        Some(taken.sender)
    }

    pub fn give_back(self: &Arc<Self>, lent: Lent) {
        let mut state = lock(&self.state);
        if lent.sender.is_closed() || state.count >= IDLE_ALL_MAX || !state.known.contains(&lent.endpoint) {
            return;
        }
        let idle = state.idle.entry(lent.endpoint).or_default();
        if idle.len() >= IDLE_MAX {
            return;
        }
        idle.push_back(Idle { sender: lent.sender, since: Instant::now() });
        state.count += 1;
        if !std::mem::replace(&mut state.has_sweeper, true) {
            self.tasks.spawn(sweep(self.clone()));
        }
    }

    /// Closes what has waited for too long. Whether anything is left.
    fn close_old(&self) -> bool {
        let mut state = lock(&self.state);
        for idle in state.idle.values_mut() {
            idle.retain(|idle| idle.since.elapsed() < IDLE_LIMIT && !idle.sender.is_closed());
        }
        state.idle.retain(|_, idle| !idle.is_empty());
        state.count = state.idle.values().map(VecDeque::len).sum();
        state.has_sweeper = state.count > 0;
        state.has_sweeper
    }

    pub fn idle_connections(&self) -> usize {
        lock(&self.state).count
    }
}

/// Runs only while a connection waits.
async fn sweep(pool: Arc<Pool>) {
    loop {
        Timer::after(Duration::from_secs(1)).await;
        if !pool.close_old() {
            return;
        }
    }
}
