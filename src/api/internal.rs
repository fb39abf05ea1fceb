//! What nodes ask of each other: writes for the leader, blobs, live facts, the cluster key, joins.

use super::backend::Backend;
use super::body::{self, Reply};
use super::error::ApiError;
use super::routes::{Match, Verb};
use super::serve::Caller;
use super::view::Live;
use super::{images, keys, peer};
use crate::agent::LiveInstance;
use crate::control::Undone;
use crate::model::*;
use crate::state::{
    Command, JoinNode, Outcome, Rejection, Reply as StateReply, RequestMark, Role, State, TokenKind,
};
use crate::tasks::Launch;
use crate::transport::authority::Authority;
use crate::transport::hello::{Refusal, RefusalCode};
use crate::transport::join::{
    Enrolled, JoinAsked, JoinReply, JoinRequest, JoinSubject, Joined, MemberAddresses, NodeFacts,
};
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::{Method, Request};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

const WRITE_BYTES_MAX: usize = 2 << 20;
const SMALL_BYTES_MAX: usize = 16 << 10;
const LIVE_BYTES_MAX: usize = 4 << 20;
/// A node that does not say within this time how its instances are is shown without.
const LIVE_LIMIT: Duration = Duration::from_millis(800);
const JOIN_TRIES_FOR: Duration = Duration::from_secs(10);

pub async fn handle(
    backend: &Arc<Backend>,
    caller: &Caller,
    found: Match,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    match found.verb {
        Verb::InternalWrite => write(backend, request).await,
        Verb::InternalBlob => images::blob(backend, &found.name).await,
        Verb::InternalLive => live(backend).await,
        Verb::InternalKey => keys::take_or_drop(backend, caller, request).await,
        _ => {
            let bytes = body::bytes(request.into_body(), SMALL_BYTES_MAX).await?;
            let asked: JoinRequest =
                postcard::from_bytes(&bytes).map_err(|error| ApiError::invalid(error.to_string()))?;
            let reply = admit(backend, asked, true).await;
            let bytes = postcard::to_allocvec(&reply).expect("plain data in memory always encodes");
            Ok(hyper::Response::new(body::full(bytes)))
        }
    }
}

async fn write(backend: &Arc<Backend>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let bytes = body::bytes(request.into_body(), WRITE_BYTES_MAX).await?;
    let (mark, command): (RequestMark, Command) =
        postcard::from_bytes(&bytes).map_err(|error| ApiError::invalid(error.to_string()))?;
    let outcome: Result<Outcome, bool> = match backend.replica.write(Some(mark), command).await {
        Ok(applied) => Ok(applied.outcome),
        Err(undone) => Err(undone == Undone::Unknown),
    };
    let bytes = postcard::to_allocvec(&outcome).expect("plain data in memory always encodes");
    Ok(hyper::Response::new(body::full(bytes)))
}

#[derive(Serialize, Deserialize)]
struct LiveRow {
    id: InstanceId,
    last_exit: Option<String>,
    restarts: u32,
    progress: Option<String>,
    is_running: bool,
    pid: Option<i32>,
    memory_bytes: Option<u64>,
}

async fn own_live(backend: &Arc<Backend>) -> Live {
    let agent = backend.agent.clone();
    crate::tasks::unblock(move || agent.live()).await
}

async fn live(backend: &Arc<Backend>) -> Result<Reply, ApiError> {
    let rows: Vec<LiveRow> = own_live(backend)
        .await
        .into_iter()
        .map(|(id, live)| LiveRow {
            id,
            last_exit: live.last_exit,
            restarts: live.restarts,
            progress: live.progress,
            is_running: live.is_running,
            pid: live.pid,
            memory_bytes: live.memory_bytes,
        })
        .collect();
    body::ok(&rows)
}

/// Live facts of all nodes that answer soon; each node speaks only of instances that the state puts on it.
pub async fn gather_live(backend: &Arc<Backend>, state: &Arc<State>) -> Live {
    let mut tasks = Vec::new();
    for node in backend.transport.connections().into_keys() {
        if state.instances_on(node).next().is_some() {
            let (backend, state) = (backend.clone(), state.clone());
            tasks.push(backend.executor.clone().launch(async move {
                let rows =
                    peer::within(LIVE_LIMIT, ask_live(&backend, node)).await.flatten().unwrap_or_default();
                let of_node = |row: &LiveRow| {
                    state.instances.find(&row.id).is_some_and(|instance| instance.node == Some(node))
                };
                rows.into_iter().filter(of_node).collect::<Vec<_>>()
            }));
        }
    }
    let mut live = own_live(backend).await;
    for task in tasks {
        live.extend(task.await.into_iter().map(|row| {
            let facts = LiveInstance {
                last_exit: row.last_exit,
                restarts: row.restarts,
                progress: row.progress,
                is_running: row.is_running,
                pid: row.pid,
                memory_bytes: row.memory_bytes,
            };
            (row.id, facts)
        }));
    }
    live
}

async fn ask_live(backend: &Backend, node: NodeId) -> Option<Vec<LiveRow>> {
    let request = peer::request(Method::GET, "/internal/live", Bytes::new());
    let answer = peer::send(&backend.transport, &backend.executor, node, request).await.ok()?;
    let bytes = body::bytes(answer.into_body(), LIVE_BYTES_MAX).await.ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Answers a stranger that proved its key and wants in.
pub async fn answer_join(backend: Arc<Backend>, asked: JoinAsked) {
    let reply = peer::within(JOIN_TRIES_FOR, admit(&backend, asked.request, false)).await;
    let reply =
        reply.unwrap_or_else(|| refused(RefusalCode::Busy, "the cluster has no leader now", "try again"));
    // A joiner that has gone asks again.
    let _ = asked.reply.send(reply).await;
}

fn refused(code: RefusalCode, sentence: impl Into<String>, hint: impl Into<String>) -> JoinReply {
    JoinReply::Refused { refusal: Refusal::new(code, sentence), hint: hint.into() }
}

/// Checks the token, signs, and makes the row. A node without the cluster key passes it on to one that votes.
async fn admit(backend: &Arc<Backend>, asked: JoinRequest, is_passed_on: bool) -> JoinReply {
    let state = backend.replica.state();
    if let Err(reply) = check_token(&state, &asked) {
        return reply;
    }
    if let JoinSubject::Node(facts) = &asked.subject
        && let Some(reply) = check_ranges(&state, facts)
    {
        return reply;
    }
    if backend.identity().cluster_key.is_none() {
        return match is_passed_on {
            true => {
                refused(RefusalCode::Busy, "this node can't sign certificates", "try another node's address")
            }
            false => pass_on(backend, &asked).await,
        };
    }
    let signed = match sign(backend, &state, &asked) {
        Ok(signed) => signed,
        Err(why) => return refused(RefusalCode::Busy, why, "look at the log of the node that answered"),
    };
    let secret_hash = asked.secret.hash();
    let command = match &asked.subject {
        JoinSubject::Node(facts) => Command::JoinNode {
            token: asked.token_id,
            secret_hash,
            node: Box::new(join_node(&asked, facts, signed.certificate.clone())),
            replace: facts.replace.clone(),
        },
        JoinSubject::Person { .. } => Command::EnrolUser {
            token: asked.token_id,
            secret_hash,
            public_key: asked.public_key,
            expires_at: signed.expires_at,
        },
    };
    match backend.submit(None, command).await {
        Ok(StateReply::Joined { node, certificate, .. }) => {
            JoinReply::Joined(joined(backend, node, certificate))
        }
        Ok(StateReply::Enrolled { .. }) => JoinReply::Enrolled(enrolled(backend, signed.certificate)),
        Ok(_) => refused(RefusalCode::Busy, "the state answered something else than was asked", "try again"),
        Err(error) => {
            let code =
                if error.status.is_server_error() { RefusalCode::Busy } else { RefusalCode::TokenUnknown };
            refused(code, error.detail.message, error.detail.hint.unwrap_or_default())
        }
    }
}

/// Before anything is signed: the token exists, fits the secret and the wish, and has not expired.
fn check_token(state: &State, asked: &JoinRequest) -> Result<(), JoinReply> {
    let rejected = |rejection: Rejection| {
        let hint = rejection.hint().unwrap_or_default();
        refused(RefusalCode::TokenUnknown, rejection.to_string(), hint)
    };
    let token = state.tokens.find(&asked.token_id).filter(|token| token.secret_hash == asked.secret.hash());
    let token = token.ok_or_else(|| rejected(Rejection::TokenUnknown))?;
    match (&token.kind, &asked.subject) {
        (TokenKind::Join { .. }, JoinSubject::Node(_))
        | (TokenKind::User { .. }, JoinSubject::Person { .. }) => Ok(()),
        (TokenKind::Join { .. }, _) => Err(refused(
            RefusalCode::TokenUnknown,
            "this token lets nodes join",
            "for a laptop: tinydc token --user NAME",
        )),
        (TokenKind::User { .. }, _) => {
            Err(refused(RefusalCode::TokenUnknown, "this token is for a laptop", "for a node: tinydc token"))
        }
    }
}

/// A machine with a network inside the cluster's ranges could not reach both.
fn check_ranges(state: &State, facts: &NodeFacts) -> Option<JoinReply> {
    let cluster = state.cluster()?;
    let ranges = [(cluster.container_range, "containers"), (cluster.vip_range, "services")];
    let (range, what, network) = ranges.into_iter().find_map(|(range, what)| {
        let network = facts.networks.iter().find(|network| network.overlaps(range))?;
        Some((range, what, network))
    })?;
    let sentence =
        format!("{} has the network {network}, which overlaps the range of {what}, {range}/16", facts.name);
    let others = ranges.map(|(range, _)| range);
    let is_free = |range: &Ipv4Addr| {
        !others.contains(range) && !facts.networks.iter().any(|network| network.overlaps(*range))
    };
    let free = (64..=254u8).map(|second| Ipv4Addr::new(10, second, 0, 0)).find(is_free);
    let hint = match free {
        Some(free) => format!(
            "give that network another range, or found the cluster with one that is free there: tinydc init --{} {free}/16",
            if what == "containers" { "container-range" } else { "vip-range" }
        ),
        None => "give that network another range".into(),
    };
    Some(refused(RefusalCode::Other, sentence, hint))
}

async fn pass_on(backend: &Arc<Backend>, asked: &JoinRequest) -> JoinReply {
    let status = backend.replica.status().await;
    let leader = status.and_then(|status| status.leader).filter(|leader| *leader != backend.node);
    let Some(leader) = leader else {
        return refused(RefusalCode::Busy, "the cluster has no leader now", "try again");
    };
    let bytes = postcard::to_allocvec(asked).expect("plain data in memory always encodes");
    let request = peer::request(Method::POST, "/internal/join", bytes);
    let answer = async {
        let answer = peer::send(&backend.transport, &backend.executor, leader, request).await.ok()?;
        let bytes = body::bytes(answer.into_body(), SMALL_BYTES_MAX).await.ok()?;
        postcard::from_bytes(&bytes).ok()
    };
    answer.await.unwrap_or_else(|| refused(RefusalCode::Busy, "the leader did not answer", "try again"))
}

struct Signed {
    certificate: Vec<u8>,
    expires_at: Timestamp,
}

const OPERATOR_MS: u64 = 365 * 86_400_000;

fn sign(backend: &Backend, state: &State, asked: &JoinRequest) -> Result<Signed, String> {
    let identity = backend.identity();
    let (Some(key), Some(cluster), Some(membership)) =
        (identity.cluster_key, state.cluster(), identity.membership)
    else {
        return Err("this node has no cluster key".into());
    };
    let ca_key = key.unseal(CA_KEY_PURPOSE, &cluster.sealed_ca_key).map_err(|error| error.to_string())?;
    let authority = Authority::load(membership.authority, &ca_key).map_err(|error| error.to_string())?;
    let now = backend.replica.cluster_time();
    let now_seconds = now.0 / 1000;
    let certificate = match &asked.subject {
        JoinSubject::Node(_) => authority.sign_node(asked.public_key),
        JoinSubject::Person { .. } => match state.tokens.find(&asked.token_id).map(|token| &token.kind) {
            Some(TokenKind::User { name, role: Role::Viewer }) => {
                authority.sign_viewer(asked.public_key, name, now_seconds)
            }
            Some(TokenKind::User { name, .. }) => {
                authority.sign_operator(asked.public_key, name, now_seconds)
            }
            _ => return Err("the token has gone".into()),
        },
    };
    let certificate = certificate.map_err(|error| error.to_string())?.to_vec();
    Ok(Signed { certificate, expires_at: now.plus_ms(OPERATOR_MS) })
}

/// Under which the CA's key is sealed in the state.
pub const CA_KEY_PURPOSE: &str = "ca key";

fn join_node(asked: &JoinRequest, facts: &NodeFacts, certificate: Vec<u8>) -> JoinNode {
    JoinNode {
        public_key: asked.public_key,
        certificate,
        store_id: facts.store_id,
        name: facts.name.clone(),
        architecture: match facts.architecture.as_str() {
            "arm64" => Architecture::Arm64,
            "arm" => Architecture::Arm,
            "riscv64" => Architecture::Riscv64,
            _ => Architecture::Amd64,
        },
        size: NodeSize { cpu_millis: u64::from(facts.cpu_millis), memory_bytes: facts.memory_bytes },
        software: String::new(),
    }
}

fn joined(backend: &Backend, node: NodeId, certificate: Vec<u8>) -> Joined {
    let state = backend.replica.state();
    let connections = backend.transport.connections();
    let mut members = BTreeMap::new();
    for row in state.nodes.rows().filter(|row| row.id != node) {
        let addresses = match row.id == backend.node {
            true => backend.transport.local_addresses(),
            false => connections.get(&row.id).map(|connection| connection.address).into_iter().collect(),
        };
        members.insert(row.id, MemberAddresses { public_key: row.public_key, addresses });
    }
    let cluster = state.cluster();
    Joined {
        node_id: node,
        certificate,
        authority: cluster.map(|cluster| cluster.ca_certificate.clone()).unwrap_or_default(),
        cluster_id: cluster.map(|cluster| cluster.id).unwrap_or_default(),
        cluster_name: cluster.map(|cluster| cluster.name.clone()).unwrap_or_default(),
        members,
    }
}

fn enrolled(backend: &Backend, certificate: Vec<u8>) -> Enrolled {
    let state = backend.replica.state();
    let cluster = state.cluster();
    let mut addresses = backend.transport.local_addresses();
    addresses.extend(backend.transport.connections().values().map(|connection| connection.address));
    addresses.iter_mut().for_each(|address| address.set_port(backend.api_port));
    Enrolled {
        certificate,
        authority: cluster.map(|cluster| cluster.ca_certificate.clone()).unwrap_or_default(),
        cluster_id: cluster.map(|cluster| cluster.id).unwrap_or_default(),
        cluster_name: cluster.map(|cluster| cluster.name.clone()).unwrap_or_default(),
        addresses,
    }
}
