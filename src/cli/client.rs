//! Requests to a daemon: HTTP/1 over the stream that `connection` gives.
//!
//! Path and body → the answer, or a `Failure` with its exit code. Every request has a limit. A write carries an
//! `Idempotency-Key` and is sent again with the same one when the connection breaks, so it happens once at most; a
//! read is simply sent again. It never prints, but for the one line of a stale answer.
//!
//! Invariant: a write that may have arrived is never reported as refused (`a_lost_answer_is_an_unknown_outcome`).

use std::cell::Cell;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use async_executor::LocalExecutor;
use async_io::Timer;
use bytes::Bytes;
use futures_lite::AsyncRead;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use ring::rand::{SecureRandom, SystemRandom};
use serde::Serialize;
use serde::de::DeserializeOwned;
use smol_hyper::rt::FuturesIo;

use super::connection::{BoxedStream, Target};
use super::failure::Failure;
use super::terminal::{self, within};
use crate::api::wire::NodesBody;

/// A daemon waits 2 s for a leader and then answers from its own copy.
pub const READ_LIMIT: Duration = Duration::from_secs(15);
/// A write fails within 5 s at a node; it may pass through two.
pub const WRITE_LIMIT: Duration = Duration::from_secs(20);
/// Tags are resolved at a registry first.
pub const DEPLOY_LIMIT: Duration = Duration::from_secs(180);
/// Unpacking a large image onto an SD card.
pub const UPLOAD_LIMIT: Duration = Duration::from_secs(1800);
/// Between two attempts after a lost connection.
const RETRY_WAITS_MS: [u64; 3] = [200, 600, 1500];
/// An answer that is read as a whole.
const ANSWER_BYTES_MAX: usize = 32 << 20;

type RequestBody = UnsyncBoxBody<Bytes, io::Error>;

pub struct Client {
    pub executor: Rc<LocalExecutor<'static>>,
    target: Target,
    is_json: bool,
    has_said_stale: Cell<bool>,
    /// The newest entry that an answer was made of; 0 before the first answer.
    seen_index: Cell<u64>,
}

/// What tells a retry from a second wish, and how old it is.
struct Key {
    id: String,
    created_index: u64,
}

/// How an attempt ended without an answer.
enum Lost {
    /// Nothing was sent.
    Unconnected(Failure),
    /// The request may have arrived.
    Broken(String),
    Late,
}

pub struct Asked<'a> {
    pub method: Method,
    pub path: &'a str,
    pub body: Bytes,
    pub limit: Duration,
}

impl Client {
    pub fn new(executor: Rc<LocalExecutor<'static>>, target: Target, is_json: bool) -> Client {
        Client { executor, target, is_json, has_said_stale: Cell::new(false), seen_index: Cell::new(0) }
    }

    pub async fn read<Answer: DeserializeOwned>(&self, path: &str) -> anyhow::Result<Answer> {
        let asked = Asked { method: Method::GET, path, body: Bytes::new(), limit: READ_LIMIT };
        let bytes = self.send(&asked, None).await?;
        self.say_if_stale(&bytes);
        parse(&bytes)
    }

    /// `GET /v1/nodes`, which also tells a context where the nodes are now.
    pub async fn nodes(&self) -> anyhow::Result<NodesBody> {
        let nodes: NodesBody = self.read("/v1/nodes").await?;
        if let Target::Context(remote) = &self.target {
            let hosts: Vec<String> = nodes.nodes.iter().filter_map(|node| node.address.clone()).collect();
            remote.remember(&hosts);
        }
        Ok(nodes)
    }

    pub async fn post<Answer: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<Answer> {
        self.write(Method::POST, path, body, WRITE_LIMIT).await
    }

    pub async fn delete<Answer: DeserializeOwned>(&self, path: &str) -> anyhow::Result<Answer> {
        let asked = Asked { method: Method::DELETE, path, body: Bytes::new(), limit: WRITE_LIMIT };
        parse(&self.send(&asked, Some(&self.key().await?)).await?)
    }

    pub async fn write<Answer: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
        limit: Duration,
    ) -> anyhow::Result<Answer> {
        let body = Bytes::from(serde_json::to_vec(body)?);
        let asked = Asked { method, path, body, limit };
        parse(&self.send(&asked, Some(&self.key().await?)).await?)
    }

    /// Sends bytes whose digest is their name, so that sending them again changes nothing.
    pub async fn put_content<Answer: DeserializeOwned>(
        &self,
        path: &str,
        body: Bytes,
    ) -> anyhow::Result<Answer> {
        let asked = Asked { method: Method::PUT, path, body, limit: UPLOAD_LIMIT };
        parse(&self.send(&asked, Some(&self.key().await?)).await?)
    }

    /// Sends bytes that are no JSON, once for all tries; the answer is that it was done.
    pub async fn put_bytes(&self, path: &str, body: Bytes) -> anyhow::Result<()> {
        let asked = Asked { method: Method::PUT, path, body, limit: WRITE_LIMIT };
        self.send(&asked, Some(&self.key().await?)).await?;
        Ok(())
    }

    /// Sends what `source` gives, once: it can't be read again.
    pub async fn upload<Answer: DeserializeOwned>(
        &self,
        path: &str,
        source: impl AsyncRead + Send + 'static,
        on_bytes: impl FnMut(u64) + Send + 'static,
    ) -> anyhow::Result<Answer> {
        let body =
            BodyExt::boxed_unsync(UploadBody { source: Box::pin(source), on_bytes: Box::new(on_bytes) });
        let builder = with_key(request(&Method::POST, path), &self.key().await?);
        let request = builder.header("content-type", "application/x-tar").body(body)?;
        let answer = within(UPLOAD_LIMIT, async { collect(self.open(request).await?).await }).await;
        match answer.unwrap_or(Err(Lost::Late)) {
            Ok((status, bytes)) if status.is_success() => parse(&bytes),
            Ok((status, bytes)) => Err(Failure::of_answer(status.as_u16(), &bytes).into()),
            Err(Lost::Unconnected(failure)) => Err(failure.into()),
            Err(Lost::Late) => Err(Failure::unreachable("the daemon did not finish in 30 minutes").into()),
            Err(Lost::Broken(reason)) => {
                let failure = Failure::unreachable(format!("the connection broke: {reason}"));
                Err(failure.hint("sending it again is safe").into())
            }
        }
    }

    /// One JSON object a line, for as long as the daemon sends.
    pub async fn lines(&self, path: &str) -> anyhow::Result<Lines> {
        let request = request(&Method::GET, path).body(full(Bytes::new()))?;
        let response = match within(READ_LIMIT, self.open(request)).await {
            Some(Ok(response)) => response,
            Some(Err(lost)) => return Err(explain(lost, false, READ_LIMIT).into()),
            None => return Err(explain(Lost::Late, false, READ_LIMIT).into()),
        };
        if response.status().is_success() {
            return Ok(Lines { body: response.into_body(), rest: Vec::new() });
        }
        Err(refusal(response).await.into())
    }

    /// A connection that carries other bytes from here on. Never sent twice: the command might run twice.
    pub async fn upgrade(
        &self,
        path: &str,
        protocol: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<Upgraded> {
        let body = full(Bytes::from(serde_json::to_vec(body)?));
        let request = request(&Method::POST, path)
            .header("connection", "upgrade")
            .header("upgrade", protocol)
            .header("content-type", "application/json")
            .body(body)?;
        let response = match within(READ_LIMIT, self.open(request)).await {
            Some(Ok(response)) => response,
            Some(Err(lost)) => return Err(explain(lost, true, READ_LIMIT).into()),
            None => return Err(explain(Lost::Late, true, READ_LIMIT).into()),
        };
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(refusal(response).await.into());
        }
        let upgraded = within(READ_LIMIT, hyper::upgrade::on(response)).await;
        let upgraded = upgraded.ok_or_else(|| explain(Lost::Late, true, READ_LIMIT))??;
        let parts = upgraded
            .downcast::<FuturesIo<BoxedStream>>()
            .map_err(|_| Failure::refused("the connection is not the one that was opened"))?;
        Ok(Upgraded { stream: parts.io.into_inner(), early: parts.read_buf })
    }

    /// A key for one write. What it is older than must be known before the first attempt: who has read nothing asks for
    /// that alone.
    async fn key(&self) -> Result<Key, Failure> {
        if self.seen_index.get() == 0 {
            let path = "/v1/version";
            let asked = Asked { method: Method::GET, path, body: Bytes::new(), limit: READ_LIMIT };
            self.send(&asked, None).await?;
        }
        Ok(Key { id: fresh_key()?, created_index: self.seen_index.get() })
    }

    async fn send(&self, asked: &Asked<'_>, key: Option<&Key>) -> Result<Bytes, Failure> {
        let mut waits = RETRY_WAITS_MS.iter();
        let mut may_have_arrived = false;
        loop {
            let lost = match within(asked.limit, self.send_once(asked, key)).await {
                Some(Ok((status, bytes))) if status.is_success() => return Ok(bytes),
                Some(Ok((status, bytes))) => return Err(Failure::of_answer(status.as_u16(), &bytes)),
                Some(Err(lost)) => lost,
                None => Lost::Late,
            };
            if let Target::Context(remote) = &self.target {
                remote.avoid_last();
            }
            let wait = match lost {
                Lost::Broken(_) => waits.next(),
                // A daemon that is being restarted, after the request reached it.
                Lost::Unconnected(_) if may_have_arrived => waits.next(),
                Lost::Unconnected(_) | Lost::Late => None,
            };
            may_have_arrived |= !matches!(lost, Lost::Unconnected(_));
            match wait {
                Some(wait) => Timer::after(Duration::from_millis(*wait)).await,
                None => return Err(explain(lost, may_have_arrived && key.is_some(), asked.limit)),
            };
        }
    }

    async fn send_once(&self, asked: &Asked<'_>, key: Option<&Key>) -> Result<(StatusCode, Bytes), Lost> {
        let mut builder = request(&asked.method, asked.path);
        if let Some(key) = key {
            builder = with_key(builder, key);
        }
        if !asked.body.is_empty() {
            builder = builder.header("content-type", "application/json");
        }
        let request = builder.body(full(asked.body.clone())).map_err(|error| {
            Lost::Unconnected(Failure::usage(format!("{} can't be asked for: {error}", asked.path)))
        })?;
        collect(self.open(request).await?).await
    }

    /// One connection for one request: no stale one is ever reused, and a local one costs microseconds.
    async fn open(&self, request: Request<RequestBody>) -> Result<Response<Incoming>, Lost> {
        let stream = self.target.connect(&self.executor).await.map_err(Lost::Unconnected)?;
        let broken = |error: hyper::Error| Lost::Broken(super::failure::chain(&error.into()));
        let (mut sender, connection) = http1::handshake(FuturesIo::new(stream)).await.map_err(broken)?;
        // Its errors reach the request; the executor ends it with the process.
        self.executor.spawn(async move { drop(connection.with_upgrades().await) }).detach();
        let response = sender.send_request(request).await.map_err(broken)?;
        let applied = response.headers().get("applied-index").and_then(|index| index.to_str().ok());
        let applied = applied.and_then(|index| index.parse().ok()).unwrap_or(0);
        self.seen_index.set(self.seen_index.get().max(applied));
        Ok(response)
    }

    /// Once in a process, above what is shown.
    fn say_if_stale(&self, body: &[u8]) {
        #[derive(serde::Deserialize)]
        struct Stale {
            stale: Option<String>,
        }
        let Ok(Stale { stale: Some(sentence) }) = serde_json::from_slice(body) else { return };
        if self.has_said_stale.replace(true) {
            return;
        }
        // On standard error: what `exec` and `logs` print is the program's own.
        match terminal::has_error_colour() && !self.is_json {
            true => eprintln!("{}", terminal::Colour::Yellow.paint(&sentence)),
            false => eprintln!("{sentence}"),
        }
    }
}

fn explain(lost: Lost, may_take_effect: bool, limit: Duration) -> Failure {
    let reason = match lost {
        Lost::Unconnected(failure) if !may_take_effect => return failure,
        Lost::Unconnected(failure) => failure.to_string(),
        Lost::Broken(reason) => format!("the connection broke: {reason}"),
        Lost::Late => format!("no answer within {} s", limit.as_secs()),
    };
    if may_take_effect {
        Failure::unknown_outcome(format!("{reason}; the change may still take effect"))
            .hint("see what holds now: tinydc status")
    } else {
        Failure::unreachable(reason)
    }
}

fn request(method: &Method, path: &str) -> hyper::http::request::Builder {
    let agent = concat!("tinydc/", env!("CARGO_PKG_VERSION"));
    Request::builder().method(method).uri(path).header("host", "tinydc").header("user-agent", agent)
}

fn with_key(builder: hyper::http::request::Builder, key: &Key) -> hyper::http::request::Builder {
    let builder = builder.header("idempotency-key", &key.id);
    match key.created_index {
        // A daemon that belongs to no cluster yet.
        0 => builder,
        index => builder.header("idempotency-index", index),
    }
}

fn full(bytes: Bytes) -> RequestBody {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// 128 random bits in hexadecimal: what tells a retry from a second wish.
fn fresh_key() -> Result<String, Failure> {
    let mut bytes = [0; 16];
    let filled = SystemRandom::new().fill(&mut bytes);
    filled.map_err(|_| Failure::refused("the kernel gives no random numbers"))?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

fn parse<Answer: DeserializeOwned>(bytes: &[u8]) -> anyhow::Result<Answer> {
    let bytes = if bytes.is_empty() { b"null" } else { bytes };
    serde_json::from_slice(bytes).map_err(|error| {
        let failure = Failure::refused(format!("the daemon's answer can't be read: {error}"));
        failure.hint("is this tinydc of the daemon's version? see `tinydc version`").into()
    })
}

async fn collect(response: Response<Incoming>) -> Result<(StatusCode, Bytes), Lost> {
    let status = response.status();
    let body = http_body_util::Limited::new(response.into_body(), ANSWER_BYTES_MAX);
    match body.collect().await {
        Ok(body) => Ok((status, body.to_bytes())),
        Err(error) => Err(Lost::Broken(error.to_string())),
    }
}

async fn refusal(response: Response<Incoming>) -> Failure {
    match within(READ_LIMIT, collect(response)).await {
        Some(Ok((status, bytes))) => Failure::of_answer(status.as_u16(), &bytes),
        Some(Err(lost)) => explain(lost, false, READ_LIMIT),
        None => explain(Lost::Late, false, READ_LIMIT),
    }
}

/// A path segment or a query value: everything but unreserved characters is escaped (RFC 3986).
pub fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => escaped.push(byte as char),
            _ => escaped.push_str(&format!("%{byte:02X}")),
        }
    }
    escaped
}

pub struct Upgraded {
    pub stream: BoxedStream,
    /// What had been read before the connection changed hands.
    pub early: Bytes,
}

/// Newline-delimited JSON as it arrives.
pub struct Lines {
    body: Incoming,
    rest: Vec<u8>,
}

impl Lines {
    /// `None` at the end.
    pub async fn next<Line: DeserializeOwned>(&mut self) -> anyhow::Result<Option<Line>> {
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.rest.drain(..=end).collect();
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return parse(&line).map(Some);
            }
            if self.rest.len() > ANSWER_BYTES_MAX {
                return Err(Failure::refused("the daemon sends a line without end").into());
            }
            match self.body.frame().await {
                None if self.rest.is_empty() => return Ok(None),
                None => return parse(&std::mem::take(&mut self.rest)).map(Some),
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.rest.extend_from_slice(&data);
                    }
                }
                Some(Err(error)) => {
                    let reason = super::failure::chain(&error.into());
                    return Err(Failure::unreachable(format!("the connection broke: {reason}")).into());
                }
            }
        }
    }
}

const UPLOAD_CHUNK_BYTES: usize = 64 << 10;

struct UploadBody {
    source: Pin<Box<dyn AsyncRead + Send>>,
    on_bytes: Box<dyn FnMut(u64) + Send>,
}

impl Body for UploadBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut std::task::Context,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let this = self.get_mut();
        let mut buffer = vec![0; UPLOAD_CHUNK_BYTES];
        match this.source.as_mut().poll_read(context, &mut buffer) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(error)) => Poll::Ready(Some(Err(error))),
            Poll::Ready(Ok(0)) => Poll::Ready(None),
            Poll::Ready(Ok(length)) => {
                (this.on_bytes)(length as u64);
                buffer.truncate(length);
                Poll::Ready(Some(Ok(Frame::data(buffer.into()))))
            }
        }
    }
}

#[cfg(test)]
mod tests;
