//! Six digits prove two machines to each other: SPAKE2 over one TLS session, and a word each way that says so.
//!
//! A code and what TLS exports from the session → messages; theirs → the words and a secret, or nothing. Pure but for
//! the random numbers. The exported value depends on the server's certificate (RFC 8446 7.5), so the exchange holds
//! only between the two ends of one session. Somebody who sits between them has two sessions, and his relayed messages
//! give both ends different keys. One exchange tells him about one guess of the code, never more.
//!
//! Invariant: the words hold only where code and session are the same (`only_the_same_code_in_the_same_session_holds`).

use ring::hmac;
use spake2::{Ed25519Group, Identity, Password, Spake2};

use super::sealing::derive_key;

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Server,
}

impl Side {
    fn other(self) -> Side {
        match self {
            Side::Client => Side::Server,
            Side::Server => Side::Client,
        }
    }

    fn word(self) -> &'static [u8] {
        match self {
            Side::Client => b"tinydc code 1 client knows it",
            Side::Server => b"tinydc code 1 server knows it",
        }
    }
}

pub(super) struct Exchange {
    side: Side,
    state: Spake2<Ed25519Group>,
}

/// What both ends have after an exchange with the same code.
pub(super) struct Proved {
    side: Side,
    secret: [u8; 32],
}

impl Exchange {
    /// `session`: what TLS exports, the same at both ends. Returns the message for the other side.
    pub fn start(side: Side, code: &str, session: &[u8]) -> (Exchange, Vec<u8>) {
        let identity = |side: Side| Identity::new(&[side.word(), session].concat());
        let password = Password::new(code.as_bytes());
        let (client, server) = (identity(Side::Client), identity(Side::Server));
        let (state, message) = match side {
            Side::Client => Spake2::<Ed25519Group>::start_a(&password, &client, &server),
            Side::Server => Spake2::<Ed25519Group>::start_b(&password, &client, &server),
        };
        (Exchange { side, state }, message)
    }

    /// `None` for a message that is none. Nothing is proved before their word holds.
    pub fn finish(self, theirs: &[u8]) -> Option<Proved> {
        let shared = self.state.finish(theirs).ok()?;
        Some(Proved { side: self.side, secret: derive_key(&shared, "code exchange") })
    }
}

impl Proved {
    fn key(&self) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &derive_key(&self.secret, "words"))
    }

    pub fn own_word(&self) -> Vec<u8> {
        hmac::sign(&self.key(), self.side.word()).as_ref().to_vec()
    }

    pub fn is_their_word(&self, word: &[u8]) -> bool {
        hmac::verify(&self.key(), self.side.other().word(), word).is_ok()
    }

    /// Known to both ends and nobody else: a code for a second exchange that nobody can guess.
    pub fn secret(&self) -> String {
        let bytes = derive_key(&self.secret, "secret of both");
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exchange(client: (&str, &[u8]), server: (&str, &[u8])) -> (Proved, Proved) {
        let (first, hers) = Exchange::start(Side::Client, client.0, client.1);
        let (second, his) = Exchange::start(Side::Server, server.0, server.1);
        (first.finish(&his).unwrap(), second.finish(&hers).unwrap())
    }

    #[test]
    fn only_the_same_code_in_the_same_session_holds() {
        let check = |client, server, holds: bool| {
            let (client, server) = exchange(client, server);
            assert_eq!(client.is_their_word(&server.own_word()), holds);
            assert_eq!(server.is_their_word(&client.own_word()), holds);
            assert_eq!(client.secret() == server.secret(), holds);
            // A word that is sent back proves nothing.
            assert!(!client.is_their_word(&client.own_word()) && !server.is_their_word(&server.own_word()));
        };
        check(("493112", b"one"), ("493112", b"one"), true);
        check(("493112", b"one"), ("493113", b"one"), false);
        check(("493112", b"one"), ("493112", b"two"), false);
    }

    #[test]
    fn garbage_is_no_message_and_a_reflected_one_is_refused() {
        let (exchange, own) = Exchange::start(Side::Client, "493112", b"one");
        assert!(exchange.finish(&own).is_none());
        for garbage in [&b""[..], b"B", &[b'B'; 33], &[0; 4000]] {
            let (exchange, _) = Exchange::start(Side::Client, "493112", b"one");
            assert!(exchange.finish(garbage).is_none_or(|proved| !proved.is_their_word(b"")));
        }
    }
}
