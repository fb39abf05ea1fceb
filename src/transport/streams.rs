//! Streams within a link: whole conversations (`PeerStream`) and bulk bodies.
//!
//! The first byte of each stream is its kind. A `PeerStream` is a plain byte stream both ways, for HTTP/1; closing its
//! writing half leaves the reading half open. Bulk runs at priority −1, so that frames overtake it: header, chunks of at
//! most 64 KiB, a SHA-256 of all, and one byte of answer. A body is bounded and handed over only if its hash holds.
//!
//! Invariant: a body that was cut, changed or too long is never an event (`tests::a_bulk_body_arrives_whole_or_not_at_all`).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_lite::{AsyncRead, AsyncWrite, Stream, StreamExt};
use quinn::{ConnectionError, RecvStream, SendStream, VarInt};
use sha2::{Digest, Sha256};
use tracing::debug;

use super::executor::within;
use super::frames::{self, FrameError};
use super::ids::NodeId;
use super::peers::{Event, FRAME_BYTES_MAX, Transport};
use super::serve::{Counted, finish};
use super::table::{Link, Shared};

pub const BULK_CHUNK_BYTES_MAX: usize = 64 << 10;
pub const BULK_HEADER_BYTES_MAX: usize = 64 << 10;
const _: () = assert!(BULK_CHUNK_BYTES_MAX <= FRAME_BYTES_MAX);
/// Bodies taken at once, of all peers: bounds the memory they hold.
const BULKS_AT_ONCE_MAX: usize = 2;
const BULK_PRIORITY: i32 = -1;
/// Neither side of a bulk stream waits longer than this for the other's next step.
const STEP_LIMIT: Duration = Duration::from_secs(10);
const OPEN_LIMIT: Duration = Duration::from_secs(3);
const STREAM_REFUSED: VarInt = VarInt::from_u32(1);
const ANSWER_TAKEN: u8 = 1;
const ANSWER_BUSY: u8 = 2;
const ANSWER_DAMAGED: u8 = 3;
const ANSWER_TOO_LONG: u8 = 4;

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{peer} is not connected")]
    Down { peer: NodeId },
    #[error("open a stream to {peer}")]
    Open {
        peer: NodeId,
        #[source]
        source: FrameError,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum BulkError {
    #[error("open a bulk stream")]
    Open(#[from] OpenError),
    #[error("the chunk or header is {length} bytes, at most {cap} are allowed")]
    Oversize { length: usize, cap: usize },
    #[error("send a bulk body to {peer}")]
    Send {
        peer: NodeId,
        #[source]
        source: FrameError,
    },
    #[error("no next chunk to send within {} s", STEP_LIMIT.as_secs())]
    Source,
    #[error("{peer} is receiving other bulk bodies")]
    Busy { peer: NodeId },
    #[error("the body is longer than {peer} takes")]
    TooLong { peer: NodeId },
    #[error("the body arrived damaged at {peer}")]
    Damaged { peer: NodeId },
}

#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum StreamKind {
    Frames = 1,
    Conversation = 2,
    Bulk = 3,
}

pub(super) async fn write_kind(stream: &mut SendStream, kind: StreamKind) -> Result<(), FrameError> {
    let limit = OPEN_LIMIT;
    within(limit, stream.write_all(&[kind as u8]))
        .await
        .ok_or(FrameError::Timeout { limit })?
        .map_err(FrameError::Write)
}

pub(super) async fn read_kind(stream: &mut RecvStream) -> Result<StreamKind, FrameError> {
    let mut kind = [0];
    let limit = OPEN_LIMIT;
    within(limit, stream.read_exact(&mut kind))
        .await
        .ok_or(FrameError::Timeout { limit })?
        .map_err(FrameError::Read)?;
    match kind[0] {
        1 => Ok(StreamKind::Frames),
        2 => Ok(StreamKind::Conversation),
        3 => Ok(StreamKind::Bulk),
        _ => Err(FrameError::Decode(postcard::Error::DeserializeBadEnum)),
    }
}

/// A byte stream to a peer. `close` ends the writing half only; dropping it ends both.
#[derive(Debug)]
pub struct PeerStream {
    send: SendStream,
    receive: RecvStream,
    peer: NodeId,
}

impl PeerStream {
    pub fn peer(&self) -> NodeId {
        self.peer
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.receive.poll_read(context, buffer).map_err(io::Error::from)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.send).poll_write(context, buffer).map_err(io::Error::from)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // An error says that the half is closed already, which is what was asked.
        let _ = self.send.finish();
        Poll::Ready(Ok(()))
    }
}

impl Transport {
    /// A fresh stream to a peer; the peer gets it as `Event::Stream`. Reads and writes need their own time limits.
    pub async fn open(&self, peer: NodeId) -> Result<PeerStream, OpenError> {
        let (send, receive) = self.open_kind(peer, StreamKind::Conversation).await?;
        Ok(PeerStream { send, receive, peer })
    }

    async fn open_kind(&self, peer: NodeId, kind: StreamKind) -> Result<(SendStream, RecvStream), OpenError> {
        let link = self.shared().link(peer).ok_or(OpenError::Down { peer })?;
        let open = |source| OpenError::Open { peer, source };
        let lost = |error: ConnectionError| open(FrameError::Write(error.into()));
        let (mut send, receive) = within(OPEN_LIMIT, link.connection.open_bi())
            .await
            .ok_or_else(|| open(FrameError::Timeout { limit: OPEN_LIMIT }))?
            .map_err(lost)?;
        if kind == StreamKind::Bulk {
            // Only fails on a closed stream, and then the next write says so.
            let _ = send.set_priority(BULK_PRIORITY);
        }
        write_kind(&mut send, kind).await.map_err(open)?;
        Ok((send, receive))
    }

    /// Sends a whole body; returns when the peer has it and its hash held. Chunks are at most 64 KiB.
    pub async fn send_bulk(
        &self,
        peer: NodeId,
        header: Vec<u8>,
        mut chunks: impl Stream<Item = Vec<u8>> + Unpin,
    ) -> Result<(), BulkError> {
        let cap = BULK_HEADER_BYTES_MAX;
        if header.len() > cap {
            return Err(BulkError::Oversize { length: header.len(), cap });
        }
        let (mut send, mut receive) = self.open_kind(peer, StreamKind::Bulk).await?;
        let sent = send_body(&mut send, peer, &header, &mut chunks).await;
        if matches!(sent, Err(BulkError::Source | BulkError::Oversize { .. })) {
            // Dropping the stream would finish it; a reset says that this is no whole body.
            let _ = send.reset(STREAM_REFUSED);
            return sent;
        }
        let mut answer = [0];
        let limit = STEP_LIMIT;
        let answered = within(limit, receive.read_exact(&mut answer)).await;
        match (answered, answer[0]) {
            (Some(Ok(())), ANSWER_TAKEN) => sent,
            (Some(Ok(())), ANSWER_BUSY) => Err(BulkError::Busy { peer }),
            (Some(Ok(())), ANSWER_TOO_LONG) => Err(BulkError::TooLong { peer }),
            (Some(Ok(())), _) => Err(BulkError::Damaged { peer }),
            (Some(Err(error)), _) => sent.and(Err(BulkError::Send { peer, source: FrameError::Read(error) })),
            (None, _) => sent.and(Err(BulkError::Send { peer, source: FrameError::Timeout { limit } })),
        }
    }
}

async fn send_body(
    send: &mut SendStream,
    peer: NodeId,
    header: &[u8],
    chunks: &mut (impl Stream<Item = Vec<u8>> + Unpin),
) -> Result<(), BulkError> {
    let mut hash = Sha256::new();
    hash.update(header);
    write_step(send, peer, header).await?;
    while let Some(chunk) = within(STEP_LIMIT, chunks.next()).await.ok_or(BulkError::Source)? {
        if chunk.len() > BULK_CHUNK_BYTES_MAX {
            return Err(BulkError::Oversize { length: chunk.len(), cap: BULK_CHUNK_BYTES_MAX });
        }
        if !chunk.is_empty() {
            hash.update(&chunk);
            write_step(send, peer, &chunk).await?;
        }
    }
    // An empty chunk ends the body.
    write_step(send, peer, &[]).await?;
    write_step(send, peer, &hash.finalize()).await?;
    // Only fails if the peer stopped the stream, and then its answer says why.
    let _ = send.finish();
    Ok(())
}

async fn write_step(send: &mut SendStream, peer: NodeId, body: &[u8]) -> Result<(), BulkError> {
    let limit = STEP_LIMIT;
    within(limit, frames::write_body(send, body))
        .await
        .ok_or(FrameError::Timeout { limit })
        .and_then(|written| written)
        .map_err(|source| BulkError::Send { peer, source })
}

pub(super) async fn accept_streams(shared: Arc<Shared>, link: Link) {
    while let Ok((send, receive)) = link.connection.accept_bi().await {
        let owner = shared.clone();
        let from = link.claim.hello.node_id;
        shared.tasks.spawn(async move {
            if let Err(error) = serve_stream(&owner, from, send, receive).await {
                debug!(peer = %from, error = %error, "stream ended early");
            }
        });
    }
}

async fn serve_stream(
    shared: &Shared,
    from: NodeId,
    mut send: SendStream,
    mut receive: RecvStream,
) -> Result<(), FrameError> {
    match read_kind(&mut receive).await? {
        StreamKind::Conversation => {
            let stream = PeerStream { send, receive, peer: from };
            // The receiver is gone only while the node stops.
            let _ = shared.events.send(Event::Stream { from, stream }).await;
            Ok(())
        }
        StreamKind::Bulk => {
            let answer = match Counted::enter(&shared.bulks, BULKS_AT_ONCE_MAX) {
                None => ANSWER_BUSY,
                Some(_entered) => receive_bulk(shared, from, &mut receive).await?,
            };
            if answer != ANSWER_TAKEN {
                // Only fails if the peer ended the stream first.
                let _ = receive.stop(STREAM_REFUSED);
            }
            let limit = STEP_LIMIT;
            within(limit, send.write_all(&[answer]))
                .await
                .ok_or(FrameError::Timeout { limit })?
                .map_err(FrameError::Write)?;
            finish(&mut send).await;
            Ok(())
        }
        StreamKind::Frames => {
            // Only fails if the peer ended the stream first.
            let _ = receive.stop(STREAM_REFUSED);
            Err(FrameError::Decode(postcard::Error::DeserializeBadEnum))
        }
    }
}

/// The answer to give; the event is sent before a good one.
async fn receive_bulk(shared: &Shared, from: NodeId, receive: &mut RecvStream) -> Result<u8, FrameError> {
    let mut hash = Sha256::new();
    let header = read_step(receive, BULK_HEADER_BYTES_MAX).await?;
    hash.update(&header);
    let mut body = Vec::new();
    loop {
        let chunk = read_step(receive, BULK_CHUNK_BYTES_MAX).await?;
        if chunk.is_empty() {
            break;
        }
        if body.len() + chunk.len() > shared.config.bulk_bytes_max {
            return Ok(ANSWER_TOO_LONG);
        }
        hash.update(&chunk);
        body.extend_from_slice(&chunk);
    }
    if read_step(receive, 32).await? != hash.finalize()[..] {
        return Ok(ANSWER_DAMAGED);
    }
    // The receiver is gone only while the node stops.
    let _ = shared.events.send(Event::Bulk { from, header, body }).await;
    Ok(ANSWER_TAKEN)
}

async fn read_step(receive: &mut RecvStream, cap: usize) -> Result<Vec<u8>, FrameError> {
    let limit = STEP_LIMIT;
    within(limit, frames::read_body(receive, cap)).await.ok_or(FrameError::Timeout { limit })?
}
