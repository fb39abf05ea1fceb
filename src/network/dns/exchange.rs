//! One question to one upstream and its answer, by UDP or TCP.
//!
//! An answer counts only if it comes from the address asked, to the port it was asked from, with the id and the question
//! that were sent. Ports are the kernel's random ones; a socket serves one question at a time and a few in its life.
//!
//! Invariant: what an upstream didn't say is never taken for its answer (`a_lying_upstream_is_not_believed`).

use super::wire::{self, FLAG_CHECKING_DISABLED, FLAG_RECURSION_DESIRED, FLAG_RESPONSE, FLAG_TRUNCATED};
use crate::tasks::{lock, within};
use async_io::Async;
use futures_lite::{AsyncReadExt, AsyncWriteExt};
use ring::rand::{SecureRandom, SystemRandom};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Mutex;
use std::time::{Duration, Instant};

const UDP_LIMIT: Duration = Duration::from_millis(1500);
const TCP_LIMIT: Duration = Duration::from_secs(2);
/// Of the pool, over all upstreams.
const IDLE_SOCKETS_MAX: usize = 8;
const IDLE_LIMIT: Duration = Duration::from_secs(10);
/// A port that is known for long can be guessed at.
const USES_MAX: u32 = 8;

#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    #[error("no answer in time")]
    Timeout,
    #[error("send or receive")]
    Transfer(#[source] io::Error),
    #[error("the answer by TCP is about something else")]
    Foreign,
    #[error("draw an id")]
    Random,
}

/// What is asked, whoever asks.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// Name, type and class, the name in lower case.
    pub question: &'a [u8],
    pub wants_signatures: bool,
    pub is_unchecked: bool,
    pub with_edns: bool,
}

impl Wish<'_> {
    fn message(&self, id: u16) -> Vec<u8> {
        let unchecked = if self.is_unchecked { FLAG_CHECKING_DISABLED } else { 0 };
        let mut message = wire::header(id, FLAG_RECURSION_DESIRED | unchecked, 1);
        message.extend_from_slice(self.question);
        if self.with_edns {
            wire::push_opt(&mut message, self.wants_signatures, 0);
        }
        message
    }

    fn is_answered_by(&self, message: &[u8], id: u16) -> bool {
        let flags = wire::number_at(message, 2).unwrap_or_default();
        let asked = message.get(wire::HEADER_BYTES..wire::HEADER_BYTES + self.question.len());
        wire::number_at(message, 0) == Some(id)
            && flags & FLAG_RESPONSE != 0
            && wire::number_at(message, 4) == Some(1)
            && asked.is_some_and(|asked| asked.eq_ignore_ascii_case(self.question))
    }
}

struct Idle {
    upstream: SocketAddr,
    socket: Async<UdpSocket>,
    uses: u32,
    since: Instant,
}

#[derive(Default)]
pub struct Exchanges {
    idle: Mutex<Vec<Idle>>,
}

fn fresh_id() -> Result<u16, ExchangeError> {
    let mut id = [0; 2];
    SystemRandom::new().fill(&mut id).map_err(|_| ExchangeError::Random)?;
    Ok(u16::from_be_bytes(id))
}

fn connect(upstream: SocketAddr) -> io::Result<Async<UdpSocket>> {
    let any: SocketAddr = match upstream {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(upstream)?;
    Async::new(socket)
}

impl Exchanges {
    /// The upstream's answer: by UDP, and again by TCP if that one is cut; or by TCP at once.
    pub async fn ask(
        &self,
        upstream: SocketAddr,
        wish: &Wish<'_>,
        by_tcp: bool,
    ) -> Result<Vec<u8>, ExchangeError> {
        if !by_tcp {
            let answer =
                within(UDP_LIMIT, self.ask_by_udp(upstream, wish)).await.ok_or(ExchangeError::Timeout)??;
            if wire::number_at(&answer, 2).unwrap_or_default() & FLAG_TRUNCATED == 0 {
                return Ok(answer);
            }
        }
        within(TCP_LIMIT, ask_by_tcp(upstream, wish)).await.ok_or(ExchangeError::Timeout)?
    }

    async fn ask_by_udp(&self, upstream: SocketAddr, wish: &Wish<'_>) -> Result<Vec<u8>, ExchangeError> {
        let (socket, uses) = match self.take(upstream) {
            Some(idle) => (idle.socket, idle.uses),
            None => (connect(upstream).map_err(ExchangeError::Transfer)?, 0),
        };
        let id = fresh_id()?;
        socket.send(&wish.message(id)).await.map_err(ExchangeError::Transfer)?;
        let mut buffer = vec![0; 4096];
        loop {
            let length = socket.recv(&mut buffer).await.map_err(ExchangeError::Transfer)?;
            // Anything else is a late answer to an earlier question, or a guess at this one.
            if wish.is_answered_by(&buffer[..length], id) {
                buffer.truncate(length);
                self.give_back(Idle { upstream, socket, uses: uses + 1, since: Instant::now() });
                return Ok(buffer);
            }
        }
    }

    fn take(&self, upstream: SocketAddr) -> Option<Idle> {
        let mut idle = lock(&self.idle);
        idle.retain(|idle| idle.since.elapsed() < IDLE_LIMIT);
        let position = idle.iter().position(|idle| idle.upstream == upstream)?;
        Some(idle.swap_remove(position))
    }

    fn give_back(&self, socket: Idle) {
        let mut idle = lock(&self.idle);
        if socket.uses < USES_MAX && idle.len() < IDLE_SOCKETS_MAX {
            idle.push(socket);
        }
    }
}

async fn ask_by_tcp(upstream: SocketAddr, wish: &Wish<'_>) -> Result<Vec<u8>, ExchangeError> {
    let id = fresh_id()?;
    let message = wish.message(id);
    let transfer = async {
        let mut stream = Async::<TcpStream>::connect(upstream).await?;
        write_message(&mut stream, &message).await?;
        read_message(&mut stream).await
    };
    let answer = transfer.await.map_err(ExchangeError::Transfer)?;
    if wish.is_answered_by(&answer, id) { Ok(answer) } else { Err(ExchangeError::Foreign) }
}

/// A message with its length before it (RFC 1035 4.2.2), in one segment.
pub async fn write_message(stream: &mut Async<TcpStream>, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut framed = Vec::with_capacity(message.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(message);
    stream.write_all(&framed).await
}

pub async fn read_message(stream: &mut Async<TcpStream>) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).await?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message).await?;
    Ok(message)
}
