//! The cluster key: brought to those that may vote, taken from those that no longer do, restored by the recovery key.
//!
//! Each node confirms what is on its own disk, and only after it is there or gone; the state says who holds a copy.
//! Invariant: who demotes or promotes never trusts a copy that was not confirmed (`cluster-key` scenario).

use super::backend::Backend;
use super::body::{self, Reply};
use super::error::ApiError;
use super::internal::CA_KEY_PURPOSE;
use super::peer;
use super::serve::Caller;
use super::wire::{RecoverReply, RecoverRequest};
use crate::control::Input;
use crate::model::*;
use crate::state::Command;
use crate::transport::sealing::{ClusterKey, RecoveryKey};
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::time::Duration;
use tracing::info;

/// Until the state shows what was confirmed.
const CONFIRM_EVERY: Duration = Duration::from_secs(2);
const PATH: &str = "/internal/cluster-key";

/// Brings the cluster key to a member that may become a voter; says whether it is on that node's disk now.
pub async fn offer_cluster_key(backend: &Arc<Backend>, to: NodeId) -> bool {
    let Some(key) = backend.identity().cluster_key else { return false };
    if to == backend.node {
        return true;
    }
    let request = peer::request(Method::PUT, PATH, key.as_bytes().to_vec());
    let answer = peer::send(&backend.transport, &backend.executor, to, request).await;
    answer.is_ok_and(|answer| answer.status() == StatusCode::NO_CONTENT)
}

/// Asks a member that does not vote any more to delete its copy.
pub async fn withdraw_cluster_key(backend: &Arc<Backend>, from: NodeId) {
    let request = peer::request(Method::DELETE, PATH, Vec::new());
    // Asked again until that node confirms.
    let _ = peer::send(&backend.transport, &backend.executor, from, request).await;
}

/// What the leader asks of this node's copy.
pub async fn take_or_drop(
    backend: &Arc<Backend>,
    caller: &Caller,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    // Only from whom this node takes for the leader.
    let status =
        backend.replica.status().await.ok_or_else(|| ApiError::unavailable("this node is stopping"))?;
    let is_leader = matches!(caller, Caller::Node(node) if Some(*node) == status.leader);
    if !is_leader {
        return Err(ApiError::rejected("the cluster key comes from the leader"));
    }
    if request.method() == Method::DELETE {
        if status.voters.contains(&backend.node) {
            return Err(ApiError::rejected("this node votes: it keeps the cluster key"));
        }
        keep(backend, None).await?;
        info!("this node does not vote any more; its copy of the cluster key is deleted");
        return body::done();
    }
    let bytes = body::bytes(request.into_body(), 64).await?;
    let key: [u8; 32] =
        bytes.as_ref().try_into().map_err(|_| ApiError::invalid("a cluster key has 32 bytes"))?;
    keep(backend, Some(ClusterKey::from_bytes(key))).await?;
    body::done()
}

/// Returns once it is on the disk, or gone from it.
async fn keep(backend: &Arc<Backend>, key: Option<ClusterKey>) -> Result<(), ApiError> {
    let mut identity = backend.identity();
    identity.cluster_key = key;
    let (data_dir, saved) = (backend.ground.data_dir.clone(), identity.clone());
    crate::tasks::unblock(move || saved.save(&data_dir)).await.map_err(|error| ApiError::internal(&error))?;
    *backend.identity.lock().unwrap_or_else(PoisonError::into_inner) = identity;
    Ok(())
}

/// In the folder that ends with the machine: of a cluster that this machine founded by itself, so that nobody saw it.
const RECOVERY_KEY_FILE: &str = "recovery-key";

pub fn keep_recovery_key(run_dir: &Path, key: &str) -> io::Result<()> {
    let path = run_dir.join(RECOVERY_KEY_FILE);
    // That of a cluster which this machine has left.
    let _ = fs::remove_file(&path);
    fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(key.as_bytes())
}

pub fn show_recovery_key(backend: &Backend) -> Result<Reply, ApiError> {
    match fs::read_to_string(backend.run_dir.join(RECOVERY_KEY_FILE)) {
        Ok(recovery_key) => body::ok(&RecoverRequest { recovery_key }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", "this machine keeps no recovery key").hint(
                "tinydc init printed it when the cluster was founded; where `bootstrap = true` did that, it can be had \
                 until that machine restarts",
            ))
        }
        Err(error) => Err(ApiError::internal(&error)),
    }
}

/// Restores this node's copy from the sealed one in the state.
pub async fn recover(backend: &Arc<Backend>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let wish: RecoverRequest = body::parse(request.into_body()).await?;
    let state = backend.replica.state();
    let cluster = state.cluster().ok_or_else(|| ApiError::rejected("the cluster is not founded yet"))?;
    let recovery = RecoveryKey::from_text(wish.recovery_key.trim())
        .map_err(|error| ApiError::invalid(format!("this is no recovery key: {error}")))?;
    let key = recovery.unseal(&cluster.sealed_cluster_key).map_err(|_| {
        ApiError::rejected(format!("this recovery key is not that of cluster {}", cluster.name))
            .hint("tinydc init printed it when the cluster was founded")
    })?;
    key.unseal(CA_KEY_PURPOSE, &cluster.sealed_ca_key).map_err(|error| ApiError::internal(&error))?;
    keep(backend, Some(key)).await?;
    info!("the cluster key was restored by the recovery key");
    let leader = backend.replica.status().await.and_then(|status| status.leader);
    let lacking =
        leader.filter(|leader| *leader != backend.node).and_then(|leader| state.nodes.find(&leader));
    let leader_without_key =
        lacking.filter(|leader| !leader.has_cluster_key).map(|leader| leader.name.clone());
    body::ok(&RecoverReply { node: state.node_name(backend.node), leader_without_key })
}

/// Tells the cluster what is on this node's disk whenever the state says otherwise.
pub async fn confirm_cluster_key(backend: Arc<Backend>) {
    let watch = backend.replica.published().watch();
    loop {
        let has_key = backend.identity().cluster_key.is_some();
        let node = backend.node;
        let row = backend.replica.state().nodes.find(&node).map(|row| row.has_cluster_key);
        if row.is_some_and(|known| known != has_key) {
            let command = Box::new(Command::ConfirmKey { node, has_key });
            backend.replica.input_or_drop(Input::Report { command });
        }
        peer::within(CONFIRM_EVERY, watch.changed()).await;
        // A burst of changes is one reason to look.
        async_io::Timer::after(Duration::from_millis(100)).await;
    }
}
