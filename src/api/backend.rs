//! What the routes work with: the replica, the agent, the peers; and the two ways to the cluster's state.

use super::error::ApiError;
use super::peer;
use super::wire::Freshness;
use crate::agent::{Agent, Ground, Ways};
use crate::control::{Status, Undone};
use crate::model::*;
use crate::replica::Handle;
use crate::state::{Command, Outcome, Reply, RequestMark, State};
use crate::transport::identity::Identity;
use crate::transport::peers::Transport;
use crate::transport::sealing::random_bytes;
use async_executor::Executor;
use hyper::{HeaderMap, StatusCode};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A write is tried for this long before its fate is told.
const WRITE_LIMIT: Duration = Duration::from_secs(5);
/// What goes around a command in the log.
const ENVELOPE_BYTES_MAX: usize = 256;
const RETRY_PAUSE: Duration = Duration::from_millis(100);

pub struct Backend {
    pub node: NodeId,
    pub start_id: StartId,
    pub replica: Handle,
    pub transport: Transport,
    pub agent: Arc<Agent>,
    pub ground: Ground,
    pub ways: Arc<Ways>,
    pub executor: Arc<Executor<'static>>,
    pub identity: Mutex<Identity>,
    /// Written when this node is to leave its cluster: the node layer takes it from there.
    pub leave: async_channel::Sender<()>,
    pub api_port: u16,
    /// What ends with the machine.
    pub run_dir: PathBuf,
}

/// What a client minted, so that its retry is told from a second wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestKey {
    pub id: RequestId,
    /// The newest entry whose effects the client had seen when it minted the id; 0 if it did not say.
    pub created_index: u64,
}

impl RequestKey {
    pub fn of(headers: &HeaderMap) -> Result<Option<RequestKey>, ApiError> {
        let text = |name| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        let Some(id) = text("idempotency-key") else { return Ok(None) };
        let id = id.parse().map_err(|_| ApiError::invalid("Idempotency-Key is 128 bits as 32 hex digits"))?;
        let created_index = match text("idempotency-index") {
            Some(index) => index.parse().map_err(|_| {
                ApiError::invalid(
                    "Idempotency-Index is the Applied-Index of an answer from before the request",
                )
            })?,
            None => 0,
        };
        Ok(Some(RequestKey { id, created_index }))
    }

    pub fn mark(self, command: &Command) -> RequestMark {
        RequestMark { id: self.id, body_hash: hash_of(command), created_index: self.created_index }
    }
}

/// The state a read is answered from, and how new it is.
pub struct Reading {
    pub state: Arc<State>,
    pub status: Status,
    pub freshness: Freshness,
}

impl Backend {
    pub fn identity(&self) -> Identity {
        self.identity.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// As new as any outcome given before; without a leader this node's copy, marked.
    pub async fn reading(&self) -> Result<Reading, ApiError> {
        let fresh = self.replica.read().await;
        let stopping = || ApiError::unavailable("this node is stopping");
        let status = self.replica.status().await.ok_or_else(stopping)?;
        let (state, stale) = match fresh {
            Ok(state) => (state, None),
            Err(_) => {
                let state = self.replica.state();
                let sentence = leaderless(&state, &status, "showing");
                (state, Some(sentence))
            }
        };
        let freshness = Freshness { applied_index: status.applied, stale };
        Ok(Reading { state, status, freshness })
    }

    /// Gets a command into the log, by way of the leader wherever it is, and returns what came of it.
    pub async fn submit(&self, request: Option<RequestMark>, command: Command) -> Result<Reply, ApiError> {
        let request = match request {
            Some(request) => request,
            None => self.new_mark(&command)?,
        };
        let bytes = postcard::to_allocvec(&command).map_or(usize::MAX, |bytes| bytes.len());
        if bytes + ENVELOPE_BYTES_MAX > limits::ENTRY_BYTES_MAX {
            let message = format!("this change takes {bytes} bytes; at most {}", limits::ENTRY_BYTES_MAX);
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message));
        }
        let deadline = Instant::now() + WRITE_LIMIT;
        let mut may_be_done = false;
        loop {
            // An attempt may not outlast the whole.
            let left = deadline.saturating_duration_since(Instant::now());
            let attempt = peer::within(left, self.submit_once(request, &command)).await;
            match attempt.unwrap_or(Err(Undone::Unknown)) {
                Ok(outcome) => return outcome.map_err(ApiError::from),
                Err(Undone::Unknown) => may_be_done = true,
                Err(Undone::Busy) if Instant::now() >= deadline => {
                    let message = "too many writes wait; nothing was done";
                    return Err(
                        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "busy", message).hint("try again")
                    );
                }
                Err(Undone::Busy | Undone::NotLeader { .. }) => {}
            }
            if Instant::now() >= deadline {
                return Err(self.no_outcome(may_be_done).await);
            }
            async_io::Timer::after(RETRY_PAUSE).await;
        }
    }

    async fn submit_once(&self, request: RequestMark, command: &Command) -> Result<Outcome, Undone> {
        match self.replica.write(Some(request), command.clone()).await {
            Ok(applied) => Ok(applied.outcome),
            Err(Undone::NotLeader { leader: Some(leader) }) if leader != self.node => {
                let asked = peer::write(&self.transport, &self.executor, leader, request, command);
                futures_lite::future::or(asked, self.deposed(leader)).await
            }
            Err(undone) => Err(undone),
        }
    }

    /// Ends when `leader` leads no more: a dead one must not hold up a write until its link times out. Asking again is
    /// safe, because the request keeps its id.
    async fn deposed(&self, leader: NodeId) -> Result<Outcome, Undone> {
        loop {
            async_io::Timer::after(RETRY_PAUSE).await;
            let status = self.replica.status().await;
            if status.is_none_or(|status| status.leader != Some(leader)) {
                return Err(Undone::Unknown);
            }
        }
    }

    pub fn new_mark(&self, command: &Command) -> Result<RequestMark, ApiError> {
        let id = random_bytes::<16>().map_err(|error| ApiError::internal(&error))?;
        // Nobody but this node repeats it, and that within seconds: its age does not matter.
        let key = RequestKey { id: RequestId(u128::from_le_bytes(id)), created_index: 0 };
        Ok(key.mark(command))
    }

    async fn no_outcome(&self, may_be_done: bool) -> ApiError {
        let state = self.replica.state();
        let sentence = match self.replica.status().await {
            Some(status) => leaderless(&state, &status, "asked"),
            None => "this node is stopping".into(),
        };
        if may_be_done {
            let message = format!("{sentence}; the change may still take effect");
            return ApiError::new(StatusCode::GATEWAY_TIMEOUT, "unknown_outcome", message)
                .hint("look with tinydc status before trying again");
        }
        ApiError::unavailable(format!("{sentence}; the change was not made"))
            .hint("bring back enough voters: tinydc node ls shows who they are")
    }
}

/// `no leader for 42 s: pi1, pi3 unreachable (2 of 3 voters); showing pi2's copy; apps go on, changes wait`.
pub fn leaderless(state: &State, status: &Status, verb: &str) -> String {
    let is_silent =
        |id: &&NodeId| **id != status.node && status.silent_ms.get(id).is_none_or(|ms| *ms >= 3_000);
    let silent: Vec<String> = status.voters.iter().filter(is_silent).map(|id| state.node_name(*id)).collect();
    let since = match status.leader {
        None => format!("no leader for {} s", status.leaderless_ms / 1000),
        Some(leader) => format!("{} leads but does not answer", state.node_name(leader)),
    };
    let who = match silent.len() {
        0 => String::new(),
        count => format!(": {} unreachable ({count} of {} voters)", silent.join(", "), status.voters.len()),
    };
    let own = state.node_name(status.node);
    format!("{since}{who}; {verb} {own}'s copy; apps go on, changes wait")
}

fn hash_of(command: &Command) -> u64 {
    let bytes = postcard::to_allocvec(command).expect("plain data in memory always encodes");
    bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
