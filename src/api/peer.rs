//! HTTP/1 to a peer over a QUIC stream: writes to the leader, blobs, live facts, logs and exec of another node.
//!
//! Between nodes bodies of writes are postcard; everything else is the same API that clients use.

use super::body::{self, Reply};
use super::error::ApiError;
use crate::control::Undone;
use crate::model::*;
use crate::state::{Command, Outcome, RequestMark};
use crate::tasks::Launch;
use crate::transport::peers::Transport;
use crate::transport::streams::PeerStream;
use async_executor::Executor;
use bytes::Bytes;
use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, Uri};
use smol_hyper::rt::FuturesIo;
use std::future::Future;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

/// For a peer's answer to begin.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);
const WRITE_ANSWER_LIMIT: Duration = Duration::from_secs(6);
/// Between two pieces of a blob.
const STALL_LIMIT: Duration = Duration::from_secs(20);
const OUTCOME_BYTES_MAX: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    #[error("{peer} does not answer")]
    Timeout { peer: NodeId },
    #[error("open a stream to {peer}")]
    Open {
        peer: NodeId,
        #[source]
        source: crate::transport::streams::OpenError,
    },
    #[error("talk to {peer}")]
    Http {
        peer: NodeId,
        #[source]
        source: hyper::Error,
    },
    #[error("{peer} answers {status}")]
    Status { peer: NodeId, status: StatusCode },
}

pub async fn within<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    futures_lite::future::or(async { Some(work.await) }, async {
        async_io::Timer::after(limit).await;
        None
    })
    .await
}

/// Sends one request to a peer; the answer's body is still on its way.
pub async fn send(
    transport: &Transport,
    executor: &Arc<Executor<'static>>,
    peer: NodeId,
    request: Request<UnsyncBoxBody<Bytes, io::Error>>,
) -> Result<Response<Incoming>, PeerError> {
    let stream: PeerStream = transport.open(peer).await.map_err(|source| PeerError::Open { peer, source })?;
    let http = |source| PeerError::Http { peer, source };
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(FuturesIo::new(stream)).await.map_err(http)?;
    // Ends with the stream: when the answer has been read, or either side drops it.
    executor
        .launch(async move {
            let _ = connection.with_upgrades().await;
        })
        .detach();
    within(ANSWER_LIMIT, sender.send_request(request)).await.ok_or(PeerError::Timeout { peer })?.map_err(http)
}

pub fn request(
    method: Method,
    path: &str,
    body: impl Into<Bytes>,
) -> Request<UnsyncBoxBody<Bytes, io::Error>> {
    let mut request = Request::new(body::full(body));
    *request.method_mut() = method;
    *request.uri_mut() = path.parse::<Uri>().expect("paths of the own API are URIs");
    request.headers_mut().insert("host", hyper::header::HeaderValue::from_static("peer"));
    request
}

pub async fn write(
    transport: &Transport,
    executor: &Arc<Executor<'static>>,
    leader: NodeId,
    mark: RequestMark,
    command: &Command,
) -> Result<Outcome, Undone> {
    let bytes = postcard::to_allocvec(&(mark, command)).expect("plain data in memory always encodes");
    let request = request(Method::POST, "/internal/write", bytes);
    let work = async {
        let answer = send(transport, executor, leader, request).await.ok()?;
        if answer.status() != StatusCode::OK {
            // It was refused before it was proposed.
            return Some(Err(Undone::NotLeader { leader: None }));
        }
        let bytes = body::bytes(answer.into_body(), OUTCOME_BYTES_MAX).await.ok()?;
        postcard::from_bytes::<Result<Outcome, bool>>(&bytes).ok().map(|outcome| match outcome {
            Ok(outcome) => Ok(outcome),
            Err(may_be_done) if may_be_done => Err(Undone::Unknown),
            Err(_) => Err(Undone::NotLeader { leader: None }),
        })
    };
    // Without an answer the leader may have proposed it.
    within(WRITE_ANSWER_LIMIT, work).await.flatten().unwrap_or(Err(Undone::Unknown))
}

/// Passes a request on to another node and its answer back, also an upgraded one.
pub async fn proxy(
    transport: &Transport,
    executor: &Arc<Executor<'static>>,
    peer: NodeId,
    mut incoming: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let unreachable = |error: PeerError| ApiError::unavailable(crate::agent::chain(&error));
    let is_upgrade = incoming.headers().contains_key("upgrade");
    let client = is_upgrade.then(|| hyper::upgrade::on(&mut incoming));
    let (parts, body) = incoming.into_parts();
    let mut outgoing = Request::from_parts(parts, body.map_err(io::Error::other).boxed_unsync());
    if let Some(path) = outgoing.uri().path_and_query().map(|path| path.as_str().to_string())
        && let Ok(uri) = path.parse()
    {
        *outgoing.uri_mut() = uri;
    }
    let mut answer = send(transport, executor, peer, outgoing).await.map_err(unreachable)?;
    if answer.status() == StatusCode::SWITCHING_PROTOCOLS
        && let Some(client) = client
    {
        let server = hyper::upgrade::on(&mut answer);
        executor
            .launch(async move {
                if let (Ok(client), Ok(server)) = (client.await, server.await) {
                    splice(client, server).await;
                }
            })
            .detach();
    }
    let (parts, body) = answer.into_parts();
    Ok(Response::from_parts(parts, body.map_err(io::Error::other).boxed_unsync()))
}

/// Copies both ways until both ends are done.
async fn splice(client: hyper::upgrade::Upgraded, server: hyper::upgrade::Upgraded) {
    use crate::upgraded::Stream;
    let (client, server) = (Stream(client), Stream(server));
    let (client_read, client_write) = futures_lite::io::split(client);
    let (server_read, server_write) = futures_lite::io::split(server);
    let up = copy(client_read, server_write);
    let down = copy(server_read, client_write);
    futures_lite::future::zip(up, down).await;
}

async fn copy(
    reader: impl futures_lite::AsyncRead + Unpin,
    mut writer: impl futures_lite::AsyncWrite + Unpin,
) {
    use futures_lite::AsyncWriteExt;
    // A side that went away ends the copy; the other direction ends by itself.
    let _ = futures_lite::io::copy(reader, &mut writer).await;
    let _ = writer.close().await;
}

/// Reads a blob of a peer on a blocking thread.
pub fn open_blob(
    transport: &Transport,
    executor: &Arc<Executor<'static>>,
    peer: NodeId,
    digest: &Digest,
) -> Result<Box<dyn Read + Send>, PeerError> {
    let path = format!("/internal/blobs/{digest}");
    let answer =
        async_io::block_on(send(transport, executor, peer, request(Method::GET, &path, Bytes::new())))?;
    if answer.status() != StatusCode::OK {
        return Err(PeerError::Status { peer, status: answer.status() });
    }
    Ok(Box::new(BodyReader { body: answer.into_body(), rest: Bytes::new() }))
}

/// A body as a blocking reader, bounded in how long it stalls.
pub struct BodyReader {
    body: Incoming,
    rest: Bytes,
}

impl BodyReader {
    pub fn new(body: Incoming) -> BodyReader {
        BodyReader { body, rest: Bytes::new() }
    }
}

impl Read for BodyReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            let frame = async_io::block_on(within(STALL_LIMIT, self.body.frame()));
            match frame {
                None => return Err(io::Error::new(io::ErrorKind::TimedOut, "the sender stalls")),
                Some(None) => return Ok(0),
                Some(Some(Err(error))) => return Err(io::Error::other(error)),
                Some(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.rest = data;
                    }
                }
            }
        }
        let count = buffer.len().min(self.rest.len());
        buffer[..count].copy_from_slice(&self.rest.split_to(count));
        Ok(count)
    }
}
