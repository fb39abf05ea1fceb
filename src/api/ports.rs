//! Whether published ports are free on every node: asked before a deploy, so that it fails instead of half working.

use super::backend::Backend;
use super::body::{self, Reply};
use super::error::ApiError;
use super::peer;
use crate::model::*;
use crate::network::{PortKey, Taken};
use crate::state::State;
use crate::tasks::Launch;
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

const BYTES_MAX: usize = 256 << 10;
/// A node that does not answer in this time is not waited for: what it finds later, `tinydc net` shows.
const LIMIT: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, Serialize, Deserialize)]
struct PortRow {
    protocol: Protocol,
    port: u16,
    host_address: Option<Ipv4Addr>,
    /// In answers: who has it.
    by: Option<String>,
}

impl PortRow {
    fn of(key: &PortKey, by: Option<String>) -> PortRow {
        PortRow { protocol: key.protocol, port: key.port, host_address: key.host_address, by }
    }

    fn key(&self) -> PortKey {
        PortKey { protocol: self.protocol, port: self.port, host_address: self.host_address }
    }
}

/// Refuses an app that publishes what a program of some node's own listens on.
pub async fn check(backend: &Arc<Backend>, state: &State, spec: &AppSpec) -> Result<(), ApiError> {
    let keys = new_ports(state, spec);
    if keys.is_empty() {
        return Ok(());
    }
    let mut tasks = Vec::new();
    for node in backend.transport.connections().into_keys() {
        let (backend, keys) = (backend.clone(), keys.clone());
        tasks.push(backend.executor.clone().launch(async move {
            let taken = peer::within(LIMIT, ask(&backend, node, &keys)).await.flatten();
            (node, taken.unwrap_or_default())
        }));
    }
    let mut found: Vec<(NodeId, Vec<Taken>)> = vec![(backend.node, own(backend, keys).await)];
    for task in tasks {
        found.push(task.await);
    }
    match found.iter().find_map(|(node, taken)| Some((node, taken.first()?))) {
        None => Ok(()),
        Some((node, taken)) => Err(refusal(&state.node_name(*node), taken, target_of(spec, &taken.key))),
    }
}

/// The port in the container that stands behind a published one.
fn target_of(spec: &AppSpec, key: &PortKey) -> u16 {
    let ports = spec.services.values().flat_map(|service| &service.ports);
    let found = ports
        .filter(|port| port.protocol == key.protocol)
        .find(|port| port.published == Some(key.port) && port.host_address == key.host_address);
    found.map_or(key.port, |port| port.target)
}

fn refusal(node: &str, taken: &Taken, target: u16) -> ApiError {
    let (port, by) = (taken.key.port, taken.by.as_deref().unwrap_or("another program"));
    let protocol = match taken.key.protocol {
        Protocol::Tcp => String::new(),
        Protocol::Udp => "/udp".into(),
    };
    let message = format!("port {port}{protocol} is taken by {by} on {node}");
    ApiError::new(StatusCode::CONFLICT, "port_taken", message)
        .hint(format!("publish another, or at one address only: ports: 192.0.2.10:{port}:{target}{protocol}"))
}

/// Ports that the app does not have yet.
fn new_ports(state: &State, spec: &AppSpec) -> Vec<PortKey> {
    let key = |port: &PortSpec| {
        Some(PortKey { protocol: port.protocol, port: port.published?, host_address: port.host_address })
    };
    let known: BTreeSet<PortKey> = state
        .services_of(&spec.name)
        .filter(|service| !service.is_removed)
        .flat_map(|service| service.spec.ports.iter().filter_map(key))
        .gather();
    // A port of one node alone is no reason to refuse because of another node.
    let is_everywhere = |port: &&PortSpec| !port.is_host_mode;
    let ports = spec.services.values().flat_map(|service| &service.ports);
    let wanted: BTreeSet<PortKey> = ports.filter(is_everywhere).filter_map(key).gather();
    wanted.difference(&known).copied().collect()
}

async fn own(backend: &Backend, keys: Vec<PortKey>) -> Vec<Taken> {
    let network = backend.ground.network.clone();
    crate::tasks::unblock(move || network.taken_ports(&keys)).await
}

async fn ask(backend: &Backend, node: NodeId, keys: &[PortKey]) -> Option<Vec<Taken>> {
    let rows: Vec<PortRow> = keys.iter().map(|key| PortRow::of(key, None)).collect();
    let request = peer::request(Method::POST, "/internal/ports", serde_json::to_vec(&rows).ok()?);
    let answer = peer::send(&backend.transport, &backend.executor, node, request).await.ok()?;
    let bytes = body::bytes(answer.into_body(), BYTES_MAX).await.ok()?;
    let rows: Vec<PortRow> = serde_json::from_slice(&bytes).ok()?;
    Some(rows.into_iter().map(|row| Taken { key: row.key(), by: row.by }).collect())
}

/// `POST /internal/ports`: which of these are taken here.
pub async fn answer(backend: &Backend, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let bytes = body::bytes(request.into_body(), BYTES_MAX).await?;
    let rows: Vec<PortRow> =
        serde_json::from_slice(&bytes).map_err(|error| ApiError::invalid(error.to_string()))?;
    let taken = own(backend, rows.iter().map(PortRow::key).collect()).await;
    let rows: Vec<PortRow> = taken.into_iter().map(|taken| PortRow::of(&taken.key, taken.by)).collect();
    body::ok(&rows)
}
