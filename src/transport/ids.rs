//! What this layer adds to the ids of the model.

use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

pub use crate::model::{ClusterId, NodeId, PublicKey, StartId, StoreId};

/// What announcements carry instead of the cluster's id, so that a passive listener can't name the cluster.
pub fn announced_hash(cluster: ClusterId) -> [u8; 16] {
    let mut input = b"tinydc announce ".to_vec();
    input.extend_from_slice(&cluster.0.to_be_bytes());
    let mut hash = [0; 16];
    hash.copy_from_slice(&digest(&SHA256, &input).as_ref()[..16]);
    hash
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
