//! Listens beside each container's own program, by both families, and says which endpoint answers and whom it sees.
//!
//! By TCP a client that says nothing first gets no answer, and one that says `!` more than fits into many packets.

use anyhow::Result;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tinydc::linux::netns;

pub const PORT: u16 = 9_100;
pub const MUCH: usize = 1 << 20;
const LIMIT: Duration = Duration::from_secs(10);
/// How soon it is seen that it is to end.
const PAUSE: Duration = Duration::from_millis(20);

pub struct Mirror {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Mirror {
    pub fn start(containers: &[(PathBuf, Ipv4Addr)]) -> Result<Mirror> {
        let mut mirror = Mirror { stop: Arc::new(AtomicBool::new(false)), threads: Vec::new() };
        for (netns, own) in containers {
            let own = *own;
            // For both families: IPv4 comes with addresses that are mapped.
            let any = (Ipv6Addr::UNSPECIFIED, PORT);
            let (listener, socket) =
                netns::in_netns(netns, || Ok((TcpListener::bind(any)?, UdpSocket::bind(any)?)))?;
            set_socket_timeout(&listener, Timeout::Recv, Some(PAUSE))?;
            socket.set_read_timeout(Some(PAUSE))?;
            mirror.repeat(move || {
                if let Ok((stream, peer)) = listener.accept() {
                    thread::spawn(move || answer(stream, own, peer.ip()));
                }
            });
            mirror.repeat(move || {
                if let Ok((_, peer)) = socket.recv_from(&mut [0; 16]) {
                    // A client that went away has failed for its own reason.
                    let _ = socket.send_to(text(own, peer.ip()).as_bytes(), peer);
                }
            });
        }
        Ok(mirror)
    }

    fn repeat(&mut self, mut step: impl FnMut() + Send + 'static) {
        let stop = self.stop.clone();
        self.threads.push(thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                step();
            }
        }));
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // It has told of its panic already.
            let _ = thread.join();
        }
    }
}

/// Ends with its connection.
fn answer(mut stream: TcpStream, own: Ipv4Addr, peer: IpAddr) {
    let mut question = [0];
    let answer = match stream.read(&mut question) {
        Ok(1) if question == *b"!" => vec![7; MUCH],
        Ok(1) => text(own, peer).into_bytes(),
        _ => return,
    };
    // A client that went away has failed for its own reason.
    let _ = stream.write_all(&answer);
}

fn text(own: Ipv4Addr, peer: IpAddr) -> String {
    format!("{own} {}", peer.to_canonical())
}

/// Which endpoint answered, and whom it saw.
pub type Seen = (Ipv4Addr, IpAddr);

fn parse(text: &[u8]) -> io::Result<Seen> {
    let text = String::from_utf8_lossy(text).into_owned();
    let parts = text.split_once(' ').and_then(|(own, peer)| Some((own.parse().ok()?, peer.parse().ok()?)));
    parts.ok_or_else(|| io::Error::other(format!("not an answer: {text:?}")))
}

fn fetch(at: SocketAddr, question: &[u8; 1]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&at, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(question)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

pub fn by_tcp(at: SocketAddr) -> io::Result<Seen> {
    parse(&fetch(at, b"?")?)
}

pub fn fetch_much(at: SocketAddr) -> io::Result<usize> {
    Ok(fetch(at, b"!")?.len())
}

/// A socket that hears only what comes from there.
pub fn datagrams(at: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = if at.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(at)?;
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    Ok(socket)
}

pub fn by_udp(socket: &UdpSocket) -> io::Result<Seen> {
    socket.send(b"?")?;
    let mut buffer = [0; 128];
    let length = socket.recv(&mut buffer)?;
    parse(&buffer[..length])
}

/// One more try: a datagram may get lost on a busy machine.
pub fn by_new_udp(at: SocketAddr) -> io::Result<Seen> {
    let socket = datagrams(at)?;
    by_udp(&socket).or_else(|_| by_udp(&socket))
}
