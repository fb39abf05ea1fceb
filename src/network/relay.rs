//! Published TCP ports on IPv6: containers have IPv4 addresses only, so a socket takes the connection and passes it on.
//!
//! Input: by port, the endpoints that serve. Output: listening sockets on `[::]`, each connection tied to one endpoint.
//! A machine without IPv6 simply has none. The container sees this node as its client.

use super::ingress::Socket;
use crate::tasks::{Launch, TaskGroup, within};
use async_executor::{Executor, Task};
use async_io::{Async, Timer};
use futures_lite::io::{copy, split};
use futures_lite::{AsyncRead, AsyncWrite, AsyncWriteExt};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv6Addr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const BACKLOG: i32 = 128;
/// Of all ports; each costs two descriptors and two buffers.
const CONNECTIONS_MAX: usize = 512;
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// After `accept` failed, as with too many open files.
const PAUSE: Duration = Duration::from_millis(100);

type Endpoints = Arc<Mutex<Vec<SocketAddrV4>>>;

struct Port {
    endpoints: Endpoints,
    /// Dropped with the port: nothing more is accepted.
    _accepting: Task<()>,
}

pub struct Relay {
    executor: Arc<Executor<'static>>,
    ports: BTreeMap<u16, Port>,
    connections: Arc<TaskGroup>,
    open: Arc<AtomicUsize>,
}

impl Relay {
    pub fn new(executor: &Arc<Executor<'static>>) -> Relay {
        Relay {
            executor: executor.clone(),
            ports: BTreeMap::new(),
            connections: TaskGroup::new(executor.clone()),
            open: Arc::default(),
        }
    }

    /// Listens on exactly these ports, as far as they are to be had.
    pub fn set(&mut self, wanted: &BTreeMap<u16, Vec<SocketAddrV4>>) {
        self.ports.retain(|port, _| wanted.contains_key(port));
        for (port, endpoints) in wanted {
            if let Some(known) = self.ports.get(port) {
                *known.endpoints.lock().unwrap_or_else(PoisonError::into_inner) = endpoints.clone();
                continue;
            }
            // Without IPv6, or with another program on the port there, IPv4 serves on.
            let Ok(listener) = listen(*port) else { continue };
            let shared: Endpoints = Arc::new(Mutex::new(endpoints.clone()));
            let work = accept(listener, shared.clone(), self.connections.clone(), self.open.clone());
            let accepting = self.executor.launch(work);
            self.ports.insert(*port, Port { endpoints: shared, _accepting: accepting });
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.connections.halt();
    }
}

fn listen(port: u16) -> io::Result<Async<TcpListener>> {
    let socket =
        rustix::net::socket_with(AddressFamily::INET6, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    sockopt::set_ipv6_v6only(&socket, true)?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, port, 0, 0))?;
    rustix::net::listen(&socket, BACKLOG)?;
    Async::new(TcpListener::from(socket))
}

async fn accept(
    listener: Async<TcpListener>,
    endpoints: Endpoints,
    connections: Arc<TaskGroup>,
    open: Arc<AtomicUsize>,
) {
    let mut turn = 0usize;
    loop {
        let Ok((client, _)) = listener.accept().await else {
            Timer::after(PAUSE).await;
            continue;
        };
        let chosen = {
            let endpoints = endpoints.lock().unwrap_or_else(PoisonError::into_inner);
            turn = turn.wrapping_add(1);
            (!endpoints.is_empty()).then(|| endpoints[turn % endpoints.len()])
        };
        // Refused, as on IPv4, by closing at once.
        let Some(endpoint) = chosen else { continue };
        if open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let place = Place(open.clone());
        connections.spawn(async move {
            if let Err(error) = pass(client, endpoint).await {
                tracing::debug!(%endpoint, %error, "a relayed connection ended");
            }
            drop(place);
        });
    }
}

/// Gives its place back when the connection ends, however it ends.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn pass(client: Async<TcpStream>, endpoint: SocketAddrV4) -> io::Result<()> {
    let connected = within(CONNECT_LIMIT, Async::<TcpStream>::connect(endpoint)).await;
    let server = connected.ok_or(io::ErrorKind::TimedOut)??;
    let (from_client, to_client) = split(Socket::new(client));
    let (from_server, to_server) = split(Socket::new(server));
    futures_lite::future::try_zip(pour(from_client, to_server), pour(from_server, to_client)).await.map(drop)
}

async fn pour(from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    copy(from, &mut to).await?;
    to.close().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::Shutdown;

    #[test]
    fn a_connection_over_ipv6_reaches_an_endpoint_on_ipv4() {
        let executor = Arc::new(Executor::new());
        let (_stop, stopped) = async_channel::bounded::<()>(1);
        let running = executor.clone();
        std::thread::spawn(move || async_io::block_on(running.run(stopped.recv())));
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = match server.local_addr().unwrap() {
            std::net::SocketAddr::V4(address) => address,
            std::net::SocketAddr::V6(_) => unreachable!("bound to IPv4"),
        };
        let port = {
            let free = TcpListener::bind("[::1]:0")
                .expect("this test needs IPv6: sysctl net.ipv6.conf.lo.disable_ipv6=0");
            free.local_addr().unwrap().port()
        };
        let mut relay = Relay::new(&executor);
        relay.set(&BTreeMap::from([(port, vec![endpoint])]));
        let mut client = TcpStream::connect(("::1", port)).unwrap();
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (mut seen, _) = server.accept().unwrap();
        let mut text = String::new();
        seen.read_to_string(&mut text).unwrap();
        seen.write_all(b"answer").unwrap();
        drop(seen);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!((text.as_str(), answer.as_str()), ("question", "answer"));
        relay.set(&BTreeMap::new());
        // The accepting task ends when the executor comes to it.
        let begin = std::time::Instant::now();
        while TcpStream::connect(("::1", port)).is_ok() {
            assert!(begin.elapsed() < Duration::from_secs(5), "the port is still open");
            std::thread::yield_now();
        }
    }
}
