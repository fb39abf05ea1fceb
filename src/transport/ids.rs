//! The newtypes of this layer.
//!
//! `NodeId` stands here until the model's takes its place.

use std::fmt;

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

/// A node's number in the cluster, from a counter, never reused. Shown as `n3`.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct NodeId(pub u64);

impl fmt::Display for NodeId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "n{}", self.0)
    }
}

/// An Ed25519 public key: what a node or a person is, wherever it is.
#[derive(Copy, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Display for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "PublicKey({self})")
    }
}

/// Random at each start of the daemon: tells two running copies of one identity apart.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StartId(pub u64);

/// Random, made when a node joins: tells two databases of one node apart.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StoreId(pub u128);

/// Random, made when the cluster is founded.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ClusterId(pub u128);

impl ClusterId {
    /// What announcements carry instead of the id itself, so that a passive listener can't name the cluster.
    pub fn announced_hash(self) -> [u8; 16] {
        let mut input = b"tinydc announce ".to_vec();
        input.extend_from_slice(&self.0.to_be_bytes());
        let mut hash = [0; 16];
        hash.copy_from_slice(&digest(&SHA256, &input).as_ref()[..16]);
        hash
    }
}

/// SHA-256 of the cluster CA's certificate, as tokens carry it.
#[derive(Copy, Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AuthorityHash(pub [u8; 32]);

impl AuthorityHash {
    pub fn of(certificate: &[u8]) -> AuthorityHash {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest(&SHA256, certificate).as_ref());
        AuthorityHash(hash)
    }
}
