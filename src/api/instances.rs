//! Instances: lists and logs.

use super::backend::Backend;
use super::body::{self, Reply};
use super::error::ApiError;
use super::handlers::{line_of, shown};
use super::peer;
use super::wire::{InstancesBody, LogLine};
use crate::agent::container_id;
use crate::model::*;
use crate::runtime::logs::{FollowEvent, LogReader, LogRecord, LogRequest, Stream};
use crate::state::State;
use crate::tasks::Launch;
use bytes::Bytes;
use hyper::Request;
use hyper::body::Incoming;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

/// How long a follower waits before it looks whether its reader has gone.
const FOLLOW_STEP: Duration = Duration::from_millis(500);

pub async fn list(backend: &Arc<Backend>, query: &BTreeMap<String, String>) -> Result<Reply, ApiError> {
    let shown = shown(backend, true).await?;
    let view = shown.view(backend);
    let state = &shown.reading.state;
    let is_wanted = |instance: &&Instance| {
        let service = state.services.find(&instance.service);
        let app = query.get("app").is_none_or(|app| service.is_some_and(|row| row.app.as_str() == app));
        let name = query.get("service").is_none_or(|name| service.is_some_and(|row| row.name == *name));
        app && name
    };
    let mut instances: Vec<_> =
        state.instances.rows().filter(is_wanted).map(|row| view.instance(row)).collect();
    instances.order_by(|a, b| (&a.name, &a.id).cmp(&(&b.name, &b.id)));
    body::ok(&InstancesBody { freshness: shown.reading.freshness.clone(), instances })
}

/// The instance that a path names: `i12`, or `shop/web.1`, or `shop/web` when there is one.
pub fn find(state: &State, name: &str) -> Result<Instance, ApiError> {
    if let Some(id) = name.strip_prefix('i').and_then(|digits| digits.parse().ok())
        && let Some(instance) = state.instances.find(&InstanceId(id))
    {
        return Ok(instance.clone());
    }
    let live = |row: &&Instance| row.desired == Desired::Run;
    let matches = |row: &&Instance| {
        let full = state.instance_name(row);
        full == name || full.rsplit_once('.').is_some_and(|(service, _)| service == name)
    };
    let found: Vec<&Instance> = state.instances.rows().filter(live).filter(matches).collect();
    match found.as_slice() {
        [one] => Ok((*one).clone()),
        [] => Err(ApiError::not_found("instance", name)),
        [first, ..] => Err(ApiError::invalid(format!("{name} has several instances"))
            .hint(format!("name one: {}", state.instance_name(first)))),
    }
}

pub async fn logs(
    backend: &Arc<Backend>,
    name: &str,
    query: &BTreeMap<String, String>,
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    if query.contains_key("dead") {
        return dead_logs(backend, name, query, &request).await;
    }
    // Logs need no quorum: this node's copy says where the instance runs.
    let state = backend.replica.state();
    let (id, node) = match find(&state, name) {
        Ok(instance) => (instance.id, instance.node),
        // A dead instance: whoever ran it has kept its logs.
        Err(error) => match name.strip_prefix('i').and_then(|digits| digits.parse().ok()) {
            Some(id) => (InstanceId(id), None),
            None => return Err(error),
        },
    };
    let is_here = backend.ground.runtime.instance_dir(&container_id(id)).join("logs").is_dir();
    match node {
        Some(node) if node != backend.node && !is_here => {
            peer::proxy(&backend.transport, &backend.executor, node, request).await
        }
        _ if is_here => read_logs(backend, id, query).await,
        Some(_) => Err(ApiError::rejected(format!("{name} has not started yet")).hint("tinydc ps shows why")),
        None if request.headers().contains_key("x-tinydc-asked") => {
            Err(ApiError::not_found("instance", name))
        }
        None => ask_all(backend, name, query).await,
    }
}

/// What the newest dead instance of a slot left, on whichever node ran it.
async fn dead_logs(
    backend: &Arc<Backend>,
    name: &str,
    query: &BTreeMap<String, String>,
    request: &Request<Incoming>,
) -> Result<Reply, ApiError> {
    let (ground, slot) = (backend.ground.clone(), name.to_string());
    match crate::tasks::unblock(move || ground.newest_dead(&slot)).await {
        Some(id) => read_logs(backend, id, query).await,
        None if request.headers().contains_key("x-tinydc-asked") => {
            Err(ApiError::not_found("instance", name))
        }
        None => ask_all(backend, name, query).await,
    }
}

/// One segment of a path, whatever a client named.
fn escaped(name: &str) -> String {
    let is_plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-._".contains(byte);
    name.bytes()
        .map(|byte| if is_plain(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

/// Asks every connected node for the logs of an instance that the state no longer knows.
async fn ask_all(
    backend: &Arc<Backend>,
    name: &str,
    query: &BTreeMap<String, String>,
) -> Result<Reply, ApiError> {
    let tail = query.get("tail").and_then(|tail| tail.parse::<u64>().ok());
    let mut wishes: Vec<String> = tail.map(|tail| format!("tail={tail}")).into_iter().collect();
    wishes.extend(query.contains_key("dead").then(|| "dead=true".into()));
    let path = format!("/v1/instances/{}/logs?{}", escaped(name), wishes.join("&"));
    for node in backend.transport.connections().into_keys() {
        let mut request = peer::request(hyper::Method::GET, &path, Bytes::new());
        request.headers_mut().insert("x-tinydc-asked", hyper::header::HeaderValue::from_static("1"));
        let answer = peer::send(&backend.transport, &backend.executor, node, request).await;
        if let Ok(answer) = answer
            && answer.status() == hyper::StatusCode::OK
        {
            use http_body_util::BodyExt;
            let (parts, body) = answer.into_parts();
            return Ok(hyper::Response::from_parts(
                parts,
                body.map_err(std::io::Error::other).boxed_unsync(),
            ));
        }
    }
    Err(ApiError::not_found("instance", name))
}

async fn read_logs(
    backend: &Arc<Backend>,
    id: InstanceId,
    query: &BTreeMap<String, String>,
) -> Result<Reply, ApiError> {
    let tail = match query.get("tail").map(|text| text.parse::<u64>()) {
        None => None,
        Some(Ok(count)) => Some(count),
        Some(Err(_)) => return Err(ApiError::invalid("tail is a count of lines")),
    };
    let follow = query.contains_key("follow");
    let request = LogRequest { tail, follow, ..LogRequest::default() };
    let runtime = backend.ground.runtime.clone();
    let reader = crate::tasks::unblock(move || runtime.logs(&container_id(id), request)).await;
    let reader = reader.map_err(|error| ApiError::internal(&error))?;
    let (sender, chunks) = async_channel::bounded(64);
    backend
        .executor
        .launch(async move {
            crate::tasks::unblock(move || pump(reader, follow, &sender)).await;
        })
        .detach();
    Ok(body::streamed("application/x-ndjson", chunks))
}

fn pump(mut reader: LogReader, follow: bool, sender: &async_channel::Sender<Bytes>) {
    let outcome = reader.backlog(&mut |record| sender.send_blocking(line_of(&wire(record))).is_ok());
    if outcome.is_err() || !follow {
        return;
    }
    while !sender.is_closed() {
        match reader.next_live(FOLLOW_STEP) {
            Ok(FollowEvent::Records(records)) => {
                for record in records {
                    if sender.send_blocking(line_of(&wire(record))).is_err() {
                        return;
                    }
                }
            }
            Ok(FollowEvent::Idle) => {}
            Ok(FollowEvent::Ended) | Err(_) => return,
        }
    }
}

fn wire(record: LogRecord) -> LogLine {
    let stream = match record.stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
        Stream::Note => "tinydc",
    };
    LogLine {
        at_ms: record.time_ms,
        stream: stream.into(),
        text: String::from_utf8_lossy(&record.text).into_owned(),
    }
}
