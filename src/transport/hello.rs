//! What two members tell each other first, and how one refuses the other.
//!
//! The dialler sends `Hello`, the acceptor authorises it and answers with its own, the dialler authorises that and
//! confirms. A refusal is the close of the connection: its code and one sentence. The key in a `PeerClaim` comes from
//! the certificate, never from a message.
//!
//! Invariant: wire forms never change (`golden_bytes_of_a_hello`).

use std::net::SocketAddr;
use std::time::Duration;

use quinn::{ApplicationClose, ConnectionError, VarInt};
use serde::{Deserialize, Serialize};

use super::executor::within;
use super::ids::{NodeId, PublicKey, StartId, StoreId};

const TOLD_WITHIN: Duration = Duration::from_millis(300);

/// Rises with a change of this module's wire forms that the old side can't read.
pub const PROTOCOL: u16 = 1;
pub const HELLO_BYTES_MAX: usize = 4096;
pub const HELLO_LIMIT: Duration = Duration::from_secs(3);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub protocol: u16,
    pub feature_level: u32,
    pub node_id: NodeId,
    pub store_id: StoreId,
    pub start_id: StartId,
    /// Hash of the board's serial numbers: changes when a card moves to another board.
    pub fingerprint: u64,
    pub term: u64,
    pub last_index: u64,
    /// The UDP port on which the sender takes connections.
    pub listen_port: u16,
}

/// The dialler's last word of the greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Confirm {
    Accepted,
}

/// What a peer says of itself, under the key that it proved to hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerClaim {
    pub public_key: PublicKey,
    pub hello: Hello,
    pub address: SocketAddr,
}

/// Why a peer, or a joiner, is not let in. The numbers go over the wire: append, never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RefusalCode {
    NoCertificate = 1,
    WrongRole = 2,
    UnknownKey = 3,
    Removed = 4,
    WrongStore = 5,
    ClonedIdentity = 6,
    OldBackup = 7,
    FeatureLevel = 8,
    MovedCard = 9,
    WrongProtocol = 10,
    Malformed = 11,
    WrongNode = 12,
    Busy = 13,
    TooManyFailures = 14,
    TokenUnknown = 15,
    TokenExpired = 16,
    TokenUsed = 17,
    Internal = 18,
    Other = 19,
    CodeWrong = 20,
    KeyUnknown = 21,
}

const CODES: [RefusalCode; 21] = {
    use RefusalCode::*;
    [
        NoCertificate,
        WrongRole,
        UnknownKey,
        Removed,
        WrongStore,
        ClonedIdentity,
        OldBackup,
        FeatureLevel,
        MovedCard,
        WrongProtocol,
        Malformed,
        WrongNode,
        Busy,
        TooManyFailures,
        TokenUnknown,
        TokenExpired,
        TokenUsed,
        Internal,
        Other,
        CodeWrong,
        KeyUnknown,
    ]
};

/// Close codes that are no refusals.
pub(super) const CLOSE_SHUTDOWN: VarInt = VarInt::from_u32(0);
pub(super) const CLOSE_REPLACED: VarInt = VarInt::from_u32(0x100);
pub(super) const CLOSE_DONE: VarInt = VarInt::from_u32(0x101);

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{sentence}")]
pub struct Refusal {
    pub code: RefusalCode,
    /// For a person: what is wrong and what to do.
    pub sentence: String,
}

impl Refusal {
    pub fn new(code: RefusalCode, sentence: impl Into<String>) -> Refusal {
        Refusal { code, sentence: sentence.into() }
    }

    pub(super) fn close(&self, connection: &quinn::Connection) {
        connection.close(VarInt::from_u32(self.code as u32), self.sentence.as_bytes());
    }

    /// A peer's close, if it was a refusal.
    pub(super) fn read(close: &ApplicationClose) -> Option<Refusal> {
        let code = CODES.iter().find(|code| u64::from(**code as u32) == close.error_code.into_inner())?;
        // Peers are strangers here: no control characters reach a log or a terminal.
        let text = String::from_utf8_lossy(&close.reason);
        let sentence = text.chars().filter(|character| !character.is_control()).take(500).collect();
        Some(Refusal { code: *code, sentence })
    }

    /// Why a conversation broke off, if the other side says so: that may arrive after the end of its stream.
    pub(super) async fn told(connection: &quinn::Connection) -> Option<Refusal> {
        match within(TOLD_WITHIN, connection.closed()).await {
            Some(ConnectionError::ApplicationClosed(close)) => Refusal::read(&close),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_bytes_of_a_hello() {
        let hello = Hello {
            protocol: 1,
            feature_level: 2,
            node_id: NodeId(3),
            store_id: StoreId(4),
            start_id: StartId(5),
            fingerprint: 6,
            term: 7,
            last_index: 300,
            listen_port: 7400,
        };
        let bytes = postcard::to_allocvec(&hello).unwrap();
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 0xac, 0x02, 0xe8, 0x39]);
        assert_eq!(postcard::from_bytes::<Hello>(&bytes).unwrap(), hello);
    }

    #[test]
    fn every_code_is_read_back() {
        for code in CODES {
            let close = ApplicationClose {
                error_code: VarInt::from_u32(code as u32),
                reason: b"no\x1b[31m".to_vec().into(),
            };
            assert_eq!(Refusal::read(&close), Some(Refusal::new(code, "no[31m")));
        }
        let close = ApplicationClose { error_code: CLOSE_REPLACED, reason: b"".to_vec().into() };
        assert_eq!(Refusal::read(&close), None);
    }
}
