//! Whether the daemon is really alive: it must answer a question about the state on its own socket.
//!
//! Input: time. Output: the last moment at which it answered, and whether it is a member. Never waits: the question is
//! put in one turn of the loop and its answer read in a later one.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

const ASK_EVERY_MS: u64 = 3_000;
/// While nobody has answered yet, so that readiness is noticed soon.
const FIRST_ASK_EVERY_MS: u64 = 100;
const ANSWER_LIMIT_MS: u64 = 10_000;
/// The first line tells all.
const ANSWER_BYTES_MAX: usize = 512;
const QUESTION: &[u8] = b"GET /v1/nodes HTTP/1.1\r\nHost: tinydc\r\nConnection: close\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Unjoined,
    Member,
}

pub struct NodeWatch {
    socket: PathBuf,
    asked: Option<(UnixStream, u64, Vec<u8>)>,
    next_ms: u64,
    pub answered_ms: Option<u64>,
    /// Since when every question was answered.
    pub well_since_ms: Option<u64>,
    pub standing: Option<Standing>,
}

/// What an answer's first line says; `None` for a daemon that is ill.
fn standing_of(answer: &[u8]) -> Option<Standing> {
    let line = answer.split(|byte| *byte == b'\r').next()?;
    match line.strip_prefix(b"HTTP/1.1 ")?.get(..3)? {
        b"200" => Some(Standing::Member),
        // It belongs to no cluster yet.
        b"409" => Some(Standing::Unjoined),
        _ => None,
    }
}

impl NodeWatch {
    pub fn new(socket: PathBuf) -> NodeWatch {
        NodeWatch { socket, asked: None, next_ms: 0, answered_ms: None, well_since_ms: None, standing: None }
    }

    /// A new daemon has to show anew that it lives; what the old one was asked is forgotten.
    pub fn forget(&mut self, now_ms: u64) {
        self.asked = None;
        self.standing = None;
        self.well_since_ms = None;
        self.next_ms = now_ms;
    }

    pub fn waits_on(&self) -> Option<BorrowedFd<'_>> {
        self.asked.as_ref().map(|(stream, _, _)| stream.as_fd())
    }

    pub fn deadline_ms(&self) -> u64 {
        self.asked.as_ref().map_or(self.next_ms, |(_, since, _)| since + ANSWER_LIMIT_MS)
    }

    pub fn step(&mut self, now_ms: u64) {
        self.hear(now_ms);
        if self.asked.is_none() && now_ms >= self.next_ms {
            self.next_ms = now_ms + if self.standing.is_some() { ASK_EVERY_MS } else { FIRST_ASK_EVERY_MS };
            // Nobody listens yet, or the daemon is down: asked again.
            self.asked = self.put_question().ok().map(|stream| (stream, now_ms, Vec::new()));
        }
    }

    fn put_question(&self) -> std::io::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_nonblocking(true)?;
        stream.write_all(QUESTION)?;
        Ok(stream)
    }

    fn hear(&mut self, now_ms: u64) {
        let Some((stream, since, answer)) = &mut self.asked else { return };
        let mut buffer = [0; ANSWER_BYTES_MAX];
        match stream.read(&mut buffer) {
            Ok(length) => answer.extend(&buffer[..length]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                if now_ms >= *since + ANSWER_LIMIT_MS {
                    self.asked = None;
                    self.well_since_ms = None;
                }
                return;
            }
            Err(_) => {}
        }
        if let Some(standing) = standing_of(answer) {
            (self.standing, self.answered_ms) = (Some(standing), Some(now_ms));
            self.well_since_ms.get_or_insert(now_ms);
        } else {
            self.well_since_ms = None;
        }
        self.asked = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_about_the_state_counts() {
        assert_eq!(standing_of(b"HTTP/1.1 200 OK\r\n"), Some(Standing::Member));
        assert_eq!(standing_of(b"HTTP/1.1 409 Conflict\r\n"), Some(Standing::Unjoined));
        for ill in [&b"HTTP/1.1 503 Service Unavailable\r\n"[..], b"HTTP/1.1 4", b"", b"hello"] {
            assert_eq!(standing_of(ill), None);
        }
    }
}
