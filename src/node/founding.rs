//! `init` and `join`: from an empty data directory to a member's.
//!
//! Each step is on disk before the next; the identity is written last and decides: a crash before it leaves the
//! machine unjoined, a crash after it goes on at the next start.

use super::machine;
use crate::api::ApiError;
use crate::api::wire::{InitRequest, JoinBody};
use crate::model::limits::LOCAL_NETWORKS_MAX;
use crate::model::*;
use crate::network::lan;
use crate::state::{Cluster, Command, JoinNode};
use crate::storage::SqliteStore;
use crate::transport::authority::Authority;
use crate::transport::identity::{Identity, Membership, NodeKey};
use crate::transport::join::{self, JoinError, JoinReply, JoinSubject, Joined, NodeFacts};
use crate::transport::sealing::{ClusterKey, RecoveryKey, random_bytes};
use crate::transport::token::{Token, TokenKind};
use async_executor::Executor;
use hyper::StatusCode;
use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;

const FOUNDING_FILE: &str = "founding";
const MEMBERS_FILE: &str = "join-members";

/// What `init` made and has yet to say.
pub struct Founded {
    pub recovery_key: String,
}

/// A /16 as users write it.
fn parse_range(text: &str, what: &str) -> Result<Ipv4Addr, ApiError> {
    let bad = || ApiError::invalid(format!("{what} {text:?} is not a range: a /16 such as 10.77.0.0/16"));
    let (address, length) = text.split_once('/').ok_or_else(bad)?;
    let address: Ipv4Addr = address.parse().map_err(|_| bad())?;
    let [first, second, third, fourth] = address.octets();
    if length != "16" || third != 0 || fourth != 0 || first == 0 || first == 127 || first >= 224 {
        return Err(bad());
    }
    Ok(Ipv4Addr::new(first, second, 0, 0))
}

/// The range, if no network of this machine lies in it; else an error that proposes a free one.
fn free_range(range: Ipv4Addr, what: &str, taken: Option<Ipv4Addr>) -> Result<Ipv4Addr, ApiError> {
    let networks = lan::networks();
    let in_the_way = |range: Ipv4Addr| networks.iter().find(|network| network.overlaps(range));
    let Some(network) = in_the_way(range).map(ToString::to_string) else {
        return match Some(range) == taken {
            true => Err(ApiError::rejected(format!("the {what} {range}/16 is taken by the other one"))),
            false => Ok(range),
        };
    };
    let is_free = |range: &Ipv4Addr| Some(*range) != taken && in_the_way(*range).is_none();
    let proposal = (64..=254u8).map(|second| Ipv4Addr::new(10, second, 0, 0)).find(is_free);
    let error =
        ApiError::rejected(format!("the {what} {range}/16 overlaps a network of this machine, {network}"));
    Err(match proposal {
        Some(free) => error
            .hint(format!("{free}/16 is free: tinydc init --{what} {free}/16").replace(" range", "-range")),
        None => error,
    })
}

/// Makes the first member: keys, CA, an empty log, and the command that founds the cluster.
pub fn init(data_dir: &Path, node_name: &str, wish: &InitRequest) -> Result<Founded, ApiError> {
    let internal = |error: &dyn std::error::Error| ApiError::internal(error);
    let name = wish.name.clone().unwrap_or_else(|| super::unjoined::CLUSTER_NAME.into());
    if !ids::is_label(&name) {
        return Err(ApiError::invalid(format!("{name:?} is not a cluster's name: use a–z, 0–9 and '-'")));
    }
    let container_range =
        parse_range(wish.container_range.as_deref().unwrap_or("10.77.0.0/16"), "container range")?;
    let container_range = free_range(container_range, "container range", None)?;
    let vip_range = parse_range(wish.vip_range.as_deref().unwrap_or("10.78.0.0/16"), "vip range")?;
    let vip_range = free_range(vip_range, "vip range", Some(container_range))?;
    let authority = Authority::create().map_err(|error| internal(&error))?;
    let node_key = NodeKey::create().map_err(|error| internal(&error))?;
    let cluster_key = ClusterKey::create().map_err(|error| internal(&error))?;
    let recovery = RecoveryKey::create().map_err(|error| internal(&error))?;
    let certificate = authority.sign_node(node_key.public_key()).map_err(|error| internal(&error))?;
    let random = || random_bytes::<16>().map(u128::from_le_bytes).map_err(|error| internal(&error));
    let (cluster_id, store_id) = (ClusterId(random()?), StoreId(random()?));
    let cluster = Cluster {
        id: cluster_id,
        name: name.clone(),
        ca_certificate: authority.certificate().to_vec(),
        sealed_ca_key: cluster_key
            .seal(crate::api::CA_KEY_PURPOSE, authority.key_bytes())
            .map_err(|error| internal(&error))?,
        sealed_cluster_key: recovery.seal(&cluster_key).map_err(|error| internal(&error))?,
        container_range,
        vip_range,
        feature_level: FEATURE_LEVEL,
        founded_at: Timestamp(0),
    };
    let node = JoinNode {
        public_key: node_key.public_key(),
        certificate: certificate.to_vec(),
        store_id,
        name: node_name.into(),
        architecture: Architecture::own(),
        size: machine::size(),
        software: env!("CARGO_PKG_VERSION").into(),
    };
    let found = Command::Found { cluster: Box::new(cluster), node: Box::new(node) };
    let bytes = postcard::to_allocvec(&found).expect("plain data in memory always encodes");
    let written = fs::write(data_dir.join(FOUNDING_FILE), bytes);
    written.map_err(|error| internal(&error))?;
    remove_state(data_dir);
    let mut store = SqliteStore::open(data_dir).map_err(|error| internal(&error))?;
    store.found(1).map_err(|error| internal(&error))?;
    drop(store);
    let membership = Membership {
        node_id: NodeId(1),
        store_id,
        cluster_id,
        cluster_name: name,
        certificate,
        authority: authority.certificate().clone(),
    };
    let identity = Identity { node_key, membership: Some(membership), cluster_key: Some(cluster_key) };
    identity.save(data_dir).map_err(|error| internal(&error))?;
    Ok(Founded { recovery_key: recovery.to_text() })
}

/// Raised with a change that older nodes could not follow.
pub const FEATURE_LEVEL: u32 = 1;

/// The command that a founder has yet to bring into its log.
pub fn pending_founding(data_dir: &Path) -> Option<Command> {
    let bytes = fs::read(data_dir.join(FOUNDING_FILE)).ok()?;
    postcard::from_bytes(&bytes).ok()
}

pub fn forget_founding(data_dir: &Path) {
    // Kept, it would be refused as founded already.
    let _ = fs::remove_file(data_dir.join(FOUNDING_FILE));
}

/// The key that an earlier join has left, else a new one, in memory only: a machine without a cluster keeps nothing.
pub fn announced_key(data_dir: &Path) -> Result<NodeKey, ApiError> {
    match Identity::load(data_dir).map_err(|error| ApiError::internal(&error))? {
        Some(known) => Ok(known.node_key),
        None => NodeKey::create().map_err(|error| ApiError::internal(&error)),
    }
}

/// Writes the key down before it joins with it: repeating a join returns the same id.
pub fn keep_key(data_dir: &Path, node_key: &NodeKey) -> Result<(), ApiError> {
    let unjoined = Identity { node_key: node_key.clone(), membership: None, cluster_key: None };
    unjoined.save(data_dir).map_err(|error| ApiError::internal(&error))
}

/// Joins by a token and writes the member's identity.
pub async fn join(
    executor: Arc<Executor<'static>>,
    data_dir: &Path,
    node_name: &str,
    wish: &JoinBody,
) -> Result<Joined, ApiError> {
    let token = Token::from_text(TokenKind::Join, wish.token.trim()).map_err(|error| {
        ApiError::invalid(error.to_string()).hint("copy the whole line that tinydc token printed")
    })?;
    let node_key = announced_key(data_dir)?;
    keep_key(data_dir, &node_key)?;
    let store_id = store_id_of(&node_key);
    let size = machine::size();
    let facts = NodeFacts {
        name: node_name.into(),
        architecture: Architecture::own().oci_name().into(),
        cpu_millis: size.cpu_millis as u32,
        memory_bytes: size.memory_bytes,
        store_id: StoreId(store_id),
        replace: wish.replace.clone(),
        networks: lan::networks().into_iter().take(LOCAL_NETWORKS_MAX).collect(),
    };
    let reply =
        join::join(executor, &token, &node_key, JoinSubject::Node(facts)).await.map_err(join_error)?;
    let joined = match reply {
        JoinReply::Joined(joined) => joined,
        JoinReply::Refused { refusal, hint } => {
            let error = ApiError::new(StatusCode::FORBIDDEN, "token_refused", refusal.sentence);
            return Err(if hint.is_empty() { error } else { error.hint(hint) });
        }
        JoinReply::Enrolled(_) => return Err(ApiError::rejected("the cluster took this node for a laptop")),
    };
    let members = postcard::to_allocvec(&joined.members).expect("plain data in memory always encodes");
    fs::write(data_dir.join(MEMBERS_FILE), members).map_err(|error| ApiError::internal(&error))?;
    let membership = Membership {
        node_id: joined.node_id,
        store_id: StoreId(store_id),
        cluster_id: joined.cluster_id,
        cluster_name: joined.cluster_name.clone(),
        certificate: joined.certificate.clone().into(),
        authority: joined.authority.clone().into(),
    };
    let identity = Identity { node_key, membership: Some(membership), cluster_key: None };
    identity.save(data_dir).map_err(|error| ApiError::internal(&error))?;
    Ok(joined)
}

/// From the key, so that a join that is repeated after a lost answer names the same store.
fn store_id_of(key: &NodeKey) -> u128 {
    use sha2::{Digest as _, Sha256};
    let hash = Sha256::new().chain_update(b"tinydc store ").chain_update(key.public_key().0).finalize();
    u128::from_le_bytes(hash[..16].try_into().expect("a SHA-256 has 32 bytes"))
}

fn join_error(error: JoinError) -> ApiError {
    match error {
        JoinError::Refused { refusal, hint } => {
            let refused = ApiError::new(StatusCode::FORBIDDEN, "token_refused", refusal.sentence);
            if hint.is_empty() { refused } else { refused.hint(hint) }
        }
        other => ApiError::unavailable(crate::agent::chain(&other))
            .hint("is a node of that cluster up, and UDP port 7400 open between the machines?"),
    }
}

type Members = std::collections::BTreeMap<NodeId, join::MemberAddresses>;

/// Whom a fresh member may dial before the state tells it.
pub fn first_members(data_dir: &Path) -> Members {
    let bytes = fs::read(data_dir.join(MEMBERS_FILE)).unwrap_or_default();
    postcard::from_bytes(&bytes).unwrap_or_default()
}

pub fn forget_first_members(data_dir: &Path) {
    // Kept, it would only name addresses that the state knows better.
    let _ = fs::remove_file(data_dir.join(MEMBERS_FILE));
}

/// Makes the directory an unjoined one: what a removed member does. Volumes stay.
pub fn unjoin(data_dir: &Path, run_dir: &Path) {
    // The state first: a crash after it leaves a member without a state, which the others remove once more. A state
    // without an identity would be taken for a new cluster's.
    remove_state(data_dir);
    for folder in ["identity", "blobs", "layers", "images", "content", "copies", "instances", "tmp"] {
        let _ = fs::remove_dir_all(data_dir.join(folder));
    }
    // The socket stays: it is how this node joins again.
    for entry in fs::read_dir(run_dir).into_iter().flatten().flatten() {
        if entry.file_name() != super::socket::FILE {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
    for file in ["peers", "reserve", FOUNDING_FILE, MEMBERS_FILE] {
        let _ = fs::remove_file(data_dir.join(file));
    }
}

fn remove_state(data_dir: &Path) {
    for file in ["state.db", "state.db-wal", "state.db-shm"] {
        let _ = fs::remove_file(data_dir.join(file));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_a_slash_16() {
        assert_eq!(parse_range("10.77.0.0/16", "x").unwrap(), Ipv4Addr::new(10, 77, 0, 0));
        for bad in
            ["10.77.0.0", "10.77.0.0/24", "10.77.1.0/16", "300.1.0.0/16", "127.0.0.0/16", "239.1.0.0/16"]
        {
            assert!(parse_range(bad, "x").is_err(), "{bad}");
        }
    }
}
