//! The sockets of the ingress, its connections and their end.

use super::clock::{Clock, HyperClock};
use super::counts::{IngressCounts, add};
use super::headers::Arrival;
use super::pool::Pool;
use super::proxy::Proxy;
use super::routes::{Routes, Table};
use super::socket::{STALLED_LIMIT, Socket, tune};
use super::stalled::unless_stalled;
use super::tls::{ALPN_HTTP2, CertificateError, Resolver, acceptor};
use crate::model::Gather;
use crate::network::places::{Place, Places};
use crate::tasks::{TaskGroup, lock, within};
use async_channel::{Receiver, Sender};
use async_executor::Executor;
use async_io::{Async, Timer};
use futures_lite::{AsyncRead, AsyncWrite, future};
use futures_rustls::TlsAcceptor;
use hyper::service::service_fn;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use smol_hyper::rt::FuturesIo;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Duration;

const BACKLOG: i32 = 512;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(5);
/// Of a request's head, and of the pause before the next request.
const HEAD_LIMIT: Duration = Duration::from_secs(60);
/// Each holds some 20 kB while a request passes, and a file descriptor.
pub const CONNECTIONS_MAX: usize = 512;
/// On their way to an endpoint, each with a connection and a file descriptor of its own: one connection of a client may
/// carry many.
const REQUESTS_MAX: usize = 1024;
/// Of either; behind a router with one address many people may sit.
pub const OF_ONE_SOURCE_MAX: usize = 256;
const _: () = assert!(OF_ONE_SOURCE_MAX < CONNECTIONS_MAX && CONNECTIONS_MAX <= REQUESTS_MAX);
const HEAD_BYTES_MAX: usize = 64 << 10;
/// What a connection may take to end its requests when its socket is no longer wanted.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);
/// The same when the daemon stops.
const STOP_LIMIT: Duration = Duration::from_secs(5);
/// After `accept` failed, as with too many open files.
const PAUSE: Duration = Duration::from_millis(100);
const STREAMS_MAX: u32 = 64;
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
/// With all connections open and no endpoint that reads, 64 MiB wait in windows.
const CONNECTION_WINDOW_BYTES: u32 = 128 << 10;
const REFUSAL: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain\r\nretry-after: 3\r\n\
    connection: close\r\ncontent-length: 38\r\n\r\nthis node has too many connections now";

#[derive(Debug, thiserror::Error)]
pub enum IngressError {
    #[error("listen on TCP {address}; another program may have this port")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
}

pub struct IngressConfig {
    /// Usually 0.0.0.0 and [::].
    pub listen: Vec<IpAddr>,
    /// A client that takes nothing for this long is gone, also if its system still answers.
    pub stalled_limit: Duration,
}

impl Default for IngressConfig {
    fn default() -> IngressConfig {
        let listen = vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        IngressConfig { listen, stalled_limit: STALLED_LIMIT }
    }
}

/// What an endpoint of ours is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Wanted {
    is_tls: bool,
    address: SocketAddr,
}

struct Listener {
    address: SocketAddr,
    /// Closed: nothing is accepted any more, and connections end after their requests.
    closing: Sender<()>,
}

pub struct Ingress {
    shared: Arc<Shared>,
    config: IngressConfig,
    listeners: Mutex<BTreeMap<Wanted, Listener>>,
    connections: Arc<TaskGroup>,
    tasks: Arc<TaskGroup>,
}

struct Shared {
    proxy: Arc<Proxy>,
    acceptor: TlsAcceptor,
    places: Arc<Places>,
    stalled_limit: Duration,
    connections: Arc<TaskGroup>,
    refused: AtomicU64,
    failed_handshakes: AtomicU64,
}

impl Ingress {
    /// Without routes it has no socket.
    pub fn start(
        config: IngressConfig,
        executor: &Arc<Executor<'static>>,
    ) -> Result<Ingress, CertificateError> {
        let table = Arc::<RwLock<Arc<Table>>>::default();
        let resolver = Arc::new(Resolver { table: table.clone() });
        let connections = TaskGroup::new(executor.clone());
        let tasks = TaskGroup::new(executor.clone());
        let shared = Arc::new(Shared {
            acceptor: acceptor(resolver.clone())?,
            proxy: Arc::new(Proxy {
                table,
                resolver,
                pool: Pool::new(tasks.clone()),
                clock: Clock::new(tasks.clone()),
                tasks: tasks.clone(),
                requests: Places::new(REQUESTS_MAX, OF_ONE_SOURCE_MAX),
                nap_limit: config.stalled_limit / 2,
                unrouted: AtomicU64::new(0),
                refused: AtomicU64::new(0),
            }),
            places: Places::new(CONNECTIONS_MAX, OF_ONE_SOURCE_MAX),
            stalled_limit: config.stalled_limit,
            connections: connections.clone(),
            refused: AtomicU64::new(0),
            failed_handshakes: AtomicU64::new(0),
        });
        Ok(Ingress { shared, config, listeners: Mutex::default(), connections, tasks })
    }

    /// Replaces the table; the next request follows it, whatever the outcome. Sockets are opened and closed as it needs.
    /// After an error the same table may be set again to try again.
    pub fn set_routes(&self, routes: Routes) -> Result<(), IngressError> {
        let wanted = self.wanted(&routes);
        let endpoints = routes.routes.iter().flat_map(|route| route.endpoints.iter().copied());
        let endpoints: BTreeSet<_> = endpoints.gather();
        {
            let mut place = self.shared.proxy.table.write().unwrap_or_else(|poison| poison.into_inner());
            *place = Arc::new(Table::new(routes, &place));
        }
        self.shared.proxy.pool.keep_only(endpoints);
        let mut listeners = lock(&self.listeners);
        listeners.retain(|listener, _| wanted.contains(listener));
        let mut first_error = None;
        for wanted in wanted {
            if listeners.contains_key(&wanted) {
                continue;
            }
            match self.open(wanted) {
                Ok(listener) => drop(listeners.insert(wanted, listener)),
                // A kernel without IPv6.
                Err(error) if wanted.address.is_ipv6() && is_unsupported(&error) => {}
                Err(source) => {
                    first_error =
                        first_error.or(Some(IngressError::Listen { address: wanted.address, source }));
                }
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn wanted(&self, routes: &Routes) -> BTreeSet<Wanted> {
        let is_needed = !routes.routes.is_empty() || !routes.challenges.is_empty();
        let has_tls = !routes.certificates.is_empty();
        let ports = [(false, routes.http_port, is_needed), (true, routes.https_port, is_needed && has_tls)];
        let mut wanted = BTreeSet::new();
        for (is_tls, port, _) in ports.into_iter().filter(|(_, _, is_wanted)| *is_wanted) {
            let address = |ip: &IpAddr| Wanted { is_tls, address: SocketAddr::new(*ip, port) };
            wanted.extend(self.config.listen.iter().map(address));
        }
        wanted
    }

    fn open(&self, wanted: Wanted) -> io::Result<Listener> {
        let listener = Async::new(listen(wanted.address)?)?;
        let address = listener.get_ref().local_addr()?;
        let (closing, closed) = async_channel::bounded(1);
        let shared = self.shared.clone();
        self.connections.spawn(async move {
            let accepting = accept(shared, listener, wanted.is_tls, closed.clone());
            future::or(accepting, async {
                // Nothing is sent: it returns when the listener is dropped.
                let _ = closed.recv().await;
            })
            .await;
        });
        Ok(Listener { address, closing })
    }

    /// Where it listens, in order: whether for HTTPS, and the address.
    pub fn addresses(&self) -> Vec<(bool, SocketAddr)> {
        lock(&self.listeners).iter().map(|(wanted, listener)| (wanted.is_tls, listener.address)).collect()
    }

    pub fn counts(&self) -> IngressCounts {
        let proxy = &self.shared.proxy;
        let table = proxy.table.read().unwrap_or_else(|poison| poison.into_inner()).clone();
        IngressCounts {
            connections: self.shared.places.count(),
            idle_connections: proxy.pool.idle_connections(),
            refused: self.shared.refused.load(Ordering::Relaxed) + proxy.refused.load(Ordering::Relaxed),
            failed_handshakes: self.shared.failed_handshakes.load(Ordering::Relaxed),
            unrouted: proxy.unrouted.load(Ordering::Relaxed),
            routes: table.routes().map(|live| live.counts()).collect(),
        }
    }

    /// Accepts nothing more, lets requests end for 5 s, and returns when every task is gone.
    pub async fn stop(self) {
        lock(&self.listeners).clear();
        self.connections.finish(STOP_LIMIT).await;
        self.connections.stop().await;
        self.tasks.stop().await;
    }
}

impl Drop for Ingress {
    /// An owner that failed on its way must not leave tasks behind that own themselves.
    fn drop(&mut self) {
        lock(&self.listeners).clear();
        self.connections.halt();
        self.tasks.halt();
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.closing.close();
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        // IPv4 has a socket of its own.
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(TcpListener::from(socket))
}

async fn accept(shared: Arc<Shared>, listener: Async<TcpListener>, is_tls: bool, closing: Receiver<()>) {
    let port = listener.get_ref().local_addr().map_or(0, |address| address.port());
    loop {
        let Ok((stream, client)) = listener.accept().await else {
            Timer::after(PAUSE).await;
            continue;
        };
        let arrival = Arrival { client: client.ip().to_canonical(), is_tls, port };
        let Some(place) = shared.places.take(arrival.client) else {
            add(&shared.refused, 1);
            if !is_tls {
                // It fits into any send buffer; who isn't told finds the connection closed.
                let _ = io::Write::write(&mut stream.get_ref(), REFUSAL);
            }
            continue;
        };
        tune(&stream, shared.stalled_limit);
        shared.connections.spawn(serve(shared.clone(), stream, arrival, place, closing.clone()));
    }
}

async fn serve(
    shared: Arc<Shared>,
    stream: Async<TcpStream>,
    arrival: Arrival,
    place: Arc<Place>,
    closing: Receiver<()>,
) {
    let stream = Socket::new(stream);
    if !arrival.is_tls {
        return serve_http1(shared, stream, arrival, place, closing).await;
    }
    let Some(Ok(stream)) = within(HANDSHAKE_LIMIT, shared.acceptor.accept(stream)).await else {
        add(&shared.failed_handshakes, 1);
        return;
    };
    if stream.get_ref().1.alpn_protocol() == Some(ALPN_HTTP2) {
        serve_http2(shared, stream, arrival, place, closing).await;
    } else {
        serve_http1(shared, FuturesIo::new(stream), arrival, place, closing).await;
    }
}

async fn serve_http1<Stream>(
    shared: Arc<Shared>,
    stream: Stream,
    arrival: Arrival,
    place: Arc<Place>,
    closing: Receiver<()>,
) where
    Stream: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let service = service_fn(|request| shared.proxy.clone().answer(arrival, place.clone(), request));
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(HyperClock(shared.proxy.clock.clone()))
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(stream, service)
        .with_upgrades();
    to_its_end(pin!(connection), &closing, |connection| connection.graceful_shutdown()).await;
}

async fn serve_http2<Stream>(
    shared: Arc<Shared>,
    stream: Stream,
    arrival: Arrival,
    place: Arc<Place>,
    closing: Receiver<()>,
) where
    Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let spawner = Spawner(shared.clone());
    let clock = HyperClock(shared.proxy.clock.clone());
    let service = service_fn(move |request| shared.proxy.clone().answer(arrival, place.clone(), request));
    let connection = hyper::server::conn::http2::Builder::new(spawner)
        .timer(clock)
        .keep_alive_interval(HEAD_LIMIT)
        .keep_alive_timeout(HANDSHAKE_LIMIT)
        .max_concurrent_streams(STREAMS_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_send_buf_size(STREAM_WINDOW_BYTES as usize)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .serve_connection(FuturesIo::new(stream), service);
    to_its_end(pin!(connection), &closing, |connection| connection.graceful_shutdown()).await;
}

/// Drives a connection; once its listener closes it ends after the requests that it has.
async fn to_its_end<Connection>(
    mut connection: Pin<&mut Connection>,
    closing: &Receiver<()>,
    shut_down: impl FnOnce(Pin<&mut Connection>),
) where
    Connection: Future<Output = Result<(), hyper::Error>>,
{
    let ended = future::or(async { Some(connection.as_mut().await) }, async {
        // Nothing is sent: it returns when the listener is dropped.
        let _ = closing.recv().await;
        None
    });
    let outcome = match ended.await {
        Some(outcome) => Some(outcome),
        None => {
            shut_down(connection.as_mut());
            within(DRAIN_LIMIT, connection).await
        }
    };
    if let Some(Err(error)) = outcome {
        tracing::debug!(%error, "a client's connection ended");
    }
}

/// Streams of one HTTP/2 connection are tasks. To hyper a stream whose client opens no window may wait for ever, and the
/// connection goes on: only the stream is ended, which resets it.
#[derive(Clone)]
struct Spawner(Arc<Shared>);

impl<Work> hyper::rt::Executor<Work> for Spawner
where
    Work: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, work: Work) {
        let proxy = &self.0.proxy;
        proxy.tasks.spawn(unless_stalled(work, proxy.clock.clone(), self.0.stalled_limit));
    }
}
