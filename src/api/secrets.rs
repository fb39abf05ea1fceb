//! Secrets: set, listed, removed; opened for the nodes that need one.
//!
//! Who holds the cluster key seals what comes in before it becomes a command, and opens what a node needs. A node without
//! the key passes a new secret on to one that has it, and asks it for those of its own instances. In the clear a secret
//! is only in memory, in TLS and in the containers that use it: no answer of the API, no log, no event holds one.

use super::backend::{Backend, RequestKey};
use super::body::{self, Reply};
use super::error::ApiError;
use super::handlers::mark_of;
use super::serve::Caller;
use super::wire::{SecretBody, SecretsBody};
use super::{certificates, peer};
use crate::agent::{Opened, Sealed};
use crate::model::limits::SECRET_BYTES_MAX;
use crate::model::*;
use crate::state::{Command, State};
use crate::transport::sealing::ClusterKey;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

/// For one node's answer.
const OPEN_LIMIT: Duration = Duration::from_secs(3);
const VERSION: &str = "secret-version";

fn named(text: &str) -> Result<SecretName, ApiError> {
    SecretName::new(text).map_err(|error| ApiError::invalid(error.to_string()))
}

/// What a secret is sealed for: one can't be passed off as another.
fn purpose(name: &SecretName) -> String {
    format!("secret/{name}")
}

/// `GET /v1/secrets`.
pub async fn list(backend: &Arc<Backend>) -> Result<Reply, ApiError> {
    let reading = backend.reading().await?;
    let state = &reading.state;
    let secrets = state.secrets.rows().map(|row| SecretBody {
        name: row.name.to_string(),
        bytes: row.bytes,
        version: row.version,
        created_at: row.created_at.to_string(),
        changed_at: row.changed_at.to_string(),
        used_by: state.secret_users(&row.name),
    });
    body::ok(&SecretsBody { freshness: reading.freshness, secrets: secrets.collect() })
}

/// `PUT /v1/secrets/{name}` with what is to be kept as body.
pub async fn put(
    backend: &Arc<Backend>,
    caller: &Caller,
    name: &str,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let name = named(name)?;
    let Some(key) = backend.identity().cluster_key else {
        return pass_on(backend, caller, request).await;
    };
    let (head, content) = request.into_parts();
    let bytes = body::bytes(content, SECRET_BYTES_MAX).await?;
    if bytes.is_empty() {
        return Err(ApiError::invalid(format!("secret {name} would be empty")));
    }
    let hosts = backend.replica.state().hosts_served_with(&name);
    if !hosts.is_empty() {
        certificates::check_bytes(&name, &bytes, &hosts)?;
    }
    let fingerprint = key.fingerprint(&purpose(&name), &bytes);
    let sealed = key.seal(&purpose(&name), &bytes).map_err(|error| ApiError::internal(&error))?;
    let length = bytes.len() as u32;
    // Sealing gives other bytes each time; a retry asks for the same.
    let asked = |sealed| Command::PutSecret { name: name.clone(), sealed, fingerprint, bytes: length };
    let mark = RequestKey::of(&head.headers)?.map(|key| key.mark(&asked(Vec::new())));
    backend.submit(mark, asked(sealed)).await?;
    body::done()
}

/// To a node that can seal it.
async fn pass_on(
    backend: &Arc<Backend>,
    caller: &Caller,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let lacking = || {
        ApiError::unavailable("no node that holds the cluster key answers; nothing was done")
            .hint("bring back a voter: tinydc node ls shows who they are")
    };
    if matches!(caller, Caller::Node(_)) {
        return Err(lacking());
    }
    let holder = holders(backend, &backend.replica.state()).await.into_iter().next().ok_or_else(lacking)?;
    peer::proxy(&backend.transport, &backend.executor, holder, request).await
}

/// Other nodes that hold the cluster key and are connected, the leader first.
pub(super) async fn holders(backend: &Arc<Backend>, state: &State) -> Vec<NodeId> {
    let leader = backend.replica.status().await.and_then(|status| status.leader);
    let connected = backend.transport.connections();
    let mut holders: Vec<NodeId> = state
        .nodes
        .rows()
        .filter(|node| node.has_cluster_key && node.id != backend.node && connected.contains_key(&node.id))
        .map(|node| node.id)
        .collect();
    holders.order_by_key(|node| (Some(*node) != leader, *node));
    holders
}

/// `DELETE /v1/secrets/{name}`.
pub async fn remove(
    backend: &Arc<Backend>,
    name: &str,
    request: &Request<Incoming>,
) -> Result<Reply, ApiError> {
    let command = Command::RemoveSecret { name: named(name)? };
    backend.submit(mark_of(request.headers(), &command)?, command).await?;
    body::done()
}

/// `GET /internal/secrets/{name}`: for a node that needs it, and for no other.
pub async fn hand_out(backend: &Arc<Backend>, caller: &Caller, name: &str) -> Result<Reply, ApiError> {
    let name = named(name)?;
    let state = backend.replica.state();
    let is_needed = matches!(caller, Caller::Node(node) if state.needs_secret(*node, &name));
    if !is_needed && !state.serves_with(&name) {
        return Err(ApiError::rejected(format!("nothing on that node uses secret {name}")));
    }
    handed(unseal(backend, &state, &Sealed::Secret(name)))
}

/// `GET /internal/certificates/{host}`: the key, which every node's ingress needs.
pub fn hand_out_key(backend: &Arc<Backend>, host: &str) -> Result<Reply, ApiError> {
    handed(unseal(backend, &backend.replica.state(), &Sealed::CertificateKey(host.into())))
}

fn handed(opened: Result<Opened, OpenError>) -> Result<Reply, ApiError> {
    let opened = opened.map_err(|error| ApiError::unavailable(error.to_string()))?;
    let mut reply = hyper::Response::new(body::full(opened.bytes));
    reply.headers_mut().insert(VERSION, opened.version.into());
    Ok(reply)
}

#[derive(Debug, thiserror::Error)]
enum OpenError {
    #[error("this node is only starting")]
    Starting,
    #[error("this node does not hold the cluster key")]
    NoKey,
    #[error("{0} is not in the state")]
    Unknown(String),
    #[error("no node that holds the cluster key hands it out")]
    Nobody,
    #[error(transparent)]
    Unseal(#[from] crate::transport::sealing::UnsealError),
}

/// With this node's own copy of the cluster key.
fn unseal(backend: &Backend, state: &State, sealed: &Sealed) -> Result<Opened, OpenError> {
    let key = backend.identity().cluster_key.ok_or(OpenError::NoKey)?;
    match sealed {
        Sealed::Secret(name) => {
            let row = state.secrets.find(name).ok_or_else(|| OpenError::Unknown(name.to_string()))?;
            Ok(Opened { version: row.version, bytes: key.unseal(&purpose(name), &row.sealed)? })
        }
        Sealed::CertificateKey(host) => {
            let row = state.certificates.find(host).and_then(|row| row.issued.as_ref());
            let row = row.ok_or_else(|| OpenError::Unknown(format!("a certificate of {host}")))?;
            let bytes = key.unseal(&certificates::key_purpose(host), &row.sealed_key)?;
            Ok(Opened { version: row.version, bytes })
        }
    }
}

/// For what the holder of the key itself needs one.
pub(super) fn open_secret(
    key: &ClusterKey,
    state: &State,
    name: &SecretName,
) -> Result<Vec<u8>, Box<dyn Error + Send + Sync>> {
    let row = state.secrets.find(name).ok_or_else(|| OpenError::Unknown(format!("secret {name}")))?;
    Ok(key.unseal(&purpose(name), &row.sealed)?)
}

/// Opens what is sealed, here or by asking who can. Blocks. `None`: this node's API is not up yet.
pub fn open_sealed(
    backend: Option<&Arc<Backend>>,
    sealed: &Sealed,
) -> Result<Opened, Box<dyn Error + Send + Sync>> {
    let backend = backend.ok_or(OpenError::Starting)?;
    let state = backend.replica.state();
    match unseal(backend, &state, sealed) {
        Err(OpenError::NoKey) => {}
        outcome => return Ok(outcome?),
    }
    async_io::block_on(async {
        for holder in holders(backend, &state).await {
            if let Some(opened) = peer::within(OPEN_LIMIT, ask(backend, holder, sealed)).await.flatten() {
                return Ok(opened);
            }
        }
        Err(OpenError::Nobody.into())
    })
}

async fn ask(backend: &Arc<Backend>, holder: NodeId, sealed: &Sealed) -> Option<Opened> {
    let path = match sealed {
        Sealed::Secret(name) => format!("/internal/secrets/{}", name.as_str().replace('/', "%2F")),
        // Hosts hold no letter that a path can't, but for the `*`, which it can.
        Sealed::CertificateKey(host) => format!("/internal/certificates/{host}"),
    };
    let request = peer::request(Method::GET, &path, Bytes::new());
    let answer = peer::send(&backend.transport, &backend.executor, holder, request).await.ok()?;
    if answer.status() != StatusCode::OK {
        return None;
    }
    let version = answer.headers().get(VERSION)?.to_str().ok()?.parse().ok()?;
    let bytes = body::bytes(answer.into_body(), SECRET_BYTES_MAX).await.ok()?;
    Some(Opened { version, bytes: bytes.to_vec() })
}
