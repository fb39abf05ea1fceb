//! Frames between nodes: one format byte, then postcard. Variants are appended, fields never change.

use crate::consensus::Message;
use crate::control::Alive;
use crate::model::{InstanceId, StartId};
use crate::state::Command;
use serde::{Deserialize, Serialize};

const FRAME_FORMAT: u8 = 1;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum PeerFrame {
    Raft(Message),
    /// What a node's agent says, on its way to the leader.
    Forward(Command),
    Alive(Alive),
    Endpoints(EndpointHint),
    Ways(WaysFrame),
}

/// All instances that a node's agent says don't serve: sent when it changes, and again while it is not empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointHint {
    pub start_id: StartId,
    /// Grows within one run of the daemon.
    pub seq: u64,
    pub down: Vec<InstanceId>,
}

/// How traffic between the containers of two nodes goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Lane {
    Clear,
    /// Encrypted; all nodes change their keys when the number changes.
    Sealed {
        epoch: u64,
    },
}

impl Lane {
    pub fn name(self) -> &'static str {
        match self {
            Lane::Clear => "in clear",
            Lane::Sealed { .. } => "encrypted",
        }
    }
}

/// A lane on which a node takes what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    pub lane: Lane,
    /// The node's public key, if it is encrypted.
    pub key: Option<[u8; 32]>,
    /// UDP, on the address that the node's daemon is connected by.
    pub port: u16,
}

/// What a node tells one other of the traffic between them: sent when it changes, and again now and then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaysFrame {
    pub start_id: StartId,
    /// Grows within one run of the daemon.
    pub seq: u64,
    pub offers: Vec<Offer>,
    /// Those of the other's offers that this node is ready for.
    pub confirmed: Vec<Offer>,
    pub sends: Option<Lane>,
    /// Why this node can't encrypt.
    pub obstacle: Option<String>,
}

/// Goes before a snapshot's frames.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotHeader {
    pub message: Message,
}

#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("a frame of format {0}; this tinydc knows {FRAME_FORMAT}")]
    UnknownFormat(u8),
    #[error("decode a frame of {bytes} bytes")]
    Decode {
        bytes: usize,
        #[source]
        source: postcard::Error,
    },
}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_extend(value, vec![FRAME_FORMAT]).expect("plain data in memory always encodes")
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, WireError> {
    match bytes.split_first() {
        Some((&FRAME_FORMAT, rest)) => {
            postcard::from_bytes(rest).map_err(|source| WireError::Decode { bytes: bytes.len(), source })
        }
        first => Err(WireError::UnknownFormat(first.map_or(0, |(format, _)| *format))),
    }
}

impl PeerFrame {
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<PeerFrame, WireError> {
        decode(bytes)
    }
}

impl SnapshotHeader {
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    pub fn decode(bytes: &[u8]) -> Result<SnapshotHeader, WireError> {
        decode(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Figures;

    #[test]
    fn golden_bytes_of_frames() {
        let alive = Alive { start_id: StartId(1), seq: 2, figures: Figures::default(), wall: None };
        let bytes = PeerFrame::Alive(alive).encode();
        assert_eq!(bytes, [1, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(PeerFrame::decode(&bytes).expect("decodes"), PeerFrame::Alive(alive));
        let hint = EndpointHint { start_id: StartId(1), seq: 2, down: vec![InstanceId(300)] };
        let bytes = PeerFrame::Endpoints(hint.clone()).encode();
        assert_eq!(bytes, [1, 3, 1, 2, 1, 172, 2]);
        assert_eq!(PeerFrame::decode(&bytes).expect("decodes"), PeerFrame::Endpoints(hint));
        assert!(PeerFrame::decode(&[2, 2]).is_err());
        assert!(PeerFrame::decode(&[1, 99]).is_err());
        assert!(PeerFrame::decode(&[]).is_err());
    }

    #[test]
    fn a_heartbeat_is_small() {
        let message = Message {
            msg_type: crate::consensus::MessageType::MsgHeartbeat,
            to: 2,
            from: 1,
            term: 5,
            commit: 1000,
            ..Message::default()
        };
        assert!(PeerFrame::Raft(message).encode().len() <= 24);
    }
}
