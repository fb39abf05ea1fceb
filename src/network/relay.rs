//! Published TCP ports on IPv6: containers have IPv4 addresses only, so a socket takes the connection and passes it on.
//!
//! Input: by port, the endpoints that serve. Output: listening sockets on `[::]`, each connection tied to one endpoint.
//! A machine without IPv6 simply has none. The container sees this node as its client.
//!
//! Invariant: a connection ends when one of its sides has vanished, and no client takes all places
//! (`a_client_that_vanished_is_noticed`, `one_client_cannot_take_all_places`).

use super::ingress::{CONNECTIONS_MAX, LINGER_LIMIT, OF_ONE_SOURCE_MAX, STALLED_LIMIT, Socket, join, tune};
use super::places::{Place, Places};
use crate::tasks::{Launch, TaskGroup, within};
use async_executor::{Executor, Task};
use async_io::{Async, Timer};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv6Addr, SocketAddrV4, SocketAddrV6, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const BACKLOG: i32 = 128;
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
    /// Of all ports; each costs two descriptors and two buffers.
    places: Arc<Places>,
}

impl Relay {
    pub fn new(executor: &Arc<Executor<'static>>) -> Relay {
        Relay {
            executor: executor.clone(),
            ports: BTreeMap::new(),
            connections: TaskGroup::new(executor.clone()),
            places: Places::new(CONNECTIONS_MAX, OF_ONE_SOURCE_MAX),
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
            let work = accept(listener, shared.clone(), self.connections.clone(), self.places.clone());
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
    places: Arc<Places>,
) {
    let mut turn = 0usize;
    loop {
        let Ok((client, address)) = listener.accept().await else {
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
        if let Some(place) = places.take(address.ip()) {
            connections.spawn(pass(client, endpoint, place));
        }
    }
}

/// The place is free when the connection ends, however it ends.
async fn pass(client: Async<TcpStream>, endpoint: SocketAddrV4, _place: Arc<Place>) {
    tune(&client, STALLED_LIMIT);
    let outcome = async {
        let connected = within(CONNECT_LIMIT, Async::<TcpStream>::connect(endpoint)).await;
        let server = connected.ok_or(io::ErrorKind::TimedOut)??;
        tune(&server, STALLED_LIMIT);
        join(Socket::new(client), Socket::new(server), LINGER_LIMIT).await
    };
    if let Err(error) = outcome.await {
        tracing::debug!(%endpoint, %error, "a relayed connection ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::Shutdown;

    /// A relay of one port to one endpoint, with a thread of its own.
    struct Site {
        relay: Relay,
        server: TcpListener,
        port: u16,
        _stop: async_channel::Sender<()>,
    }

    impl Site {
        fn start() -> Site {
            let executor = Arc::new(Executor::new());
            let (stop, stopped) = async_channel::bounded::<()>(1);
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
            Site { relay, server, port, _stop: stop }
        }

        fn connect(&self) -> TcpStream {
            let client = TcpStream::connect(("::1", self.port)).unwrap();
            client.set_read_timeout(Some(LIMIT)).unwrap();
            client
        }
    }

    const LIMIT: Duration = Duration::from_secs(5);

    fn until(what: &str, mut is_true: impl FnMut() -> bool) {
        let begin = std::time::Instant::now();
        while !is_true() {
            assert!(begin.elapsed() < LIMIT, "{what}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    #[test]
    fn a_connection_over_ipv6_reaches_an_endpoint_on_ipv4() {
        let mut site = Site::start();
        let mut client = site.connect();
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let (mut seen, _) = site.server.accept().unwrap();
        let mut text = String::new();
        seen.read_to_string(&mut text).unwrap();
        seen.write_all(b"answer").unwrap();
        drop(seen);
        let mut answer = String::new();
        client.read_to_string(&mut answer).unwrap();
        assert_eq!((text.as_str(), answer.as_str()), ("question", "answer"));
        site.relay.set(&BTreeMap::new());
        // The accepting task ends when the executor comes to it.
        until("the port is closed", || TcpStream::connect(("::1", site.port)).is_err());
    }

    #[test]
    fn one_client_cannot_take_all_places() {
        let site = Site::start();
        // The endpoint takes them and says nothing.
        let held: Vec<(TcpStream, TcpStream)> =
            (0..256).map(|_| (site.connect(), site.server.accept().unwrap().0)).collect();
        assert_eq!(site.connect().read(&mut [0]).unwrap_or(0), 0, "one more is closed at once");
        assert_eq!(site.relay.places.count(), 256);
        drop(held);
        until("places are free again", || site.relay.places.count() == 0);
    }

    /// Whether the kernel's keepalive timer runs for a socket between these ports (`proc_pid_net(5)`: its kind is 2).
    fn is_kept_alive(table: &str, own: u16, other: u16) -> bool {
        let table = std::fs::read_to_string(table).unwrap();
        table.lines().any(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let ends_with = |place: usize, port: u16| fields[place].ends_with(&format!(":{port:04X}"));
            ends_with(1, own) && ends_with(2, other) && fields[5].starts_with("02:")
        })
    }

    #[test]
    fn a_client_that_vanished_is_noticed() {
        let site = Site::start();
        let client = site.connect();
        let (endpoint, relay) = site.server.accept().unwrap();
        let port = |stream: &TcpStream| stream.local_addr().unwrap().port();
        until("the client's is watched", || is_kept_alive("/proc/net/tcp6", site.port, port(&client)));
        until("the endpoint's too", || is_kept_alive("/proc/net/tcp", relay.port(), port(&endpoint)));
    }
}
