//! Taking connections, greeting those who dial, and the tasks of a link.
//!
//! A connection is first told apart by its protocol: peers must show a node certificate, joiners get `join_server`.
//! Nothing is sent to a peer before its certificate, hello and the node layer's word are good.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_channel::Receiver;
use futures_lite::future;
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use tracing::{debug, warn};

use super::authority::{Role, read_client};
use super::door;
use super::executor::within;
use super::frames::{self, FrameError};
use super::hello::{
    CLOSE_DONE, CLOSE_REPLACED, Confirm, HELLO_BYTES_MAX, HELLO_LIMIT, Hello, PeerClaim, Refusal, RefusalCode,
};
use super::ids::{NodeId, PublicKey};
use super::join_server;
use super::peers::{Event, FRAME_BYTES_MAX, RefusedBy};
use super::streams::{self, StreamKind};
use super::table::{DialledBy, FrameQueue, Link, Shared, malformed};
use super::tls::{ALPN_CODE, ALPN_JOIN, ALPN_PEER};

/// Connections that have not greeted yet; over it new ones are refused unseen.
const HANDSHAKES_MAX: usize = 64;
/// Over it a source must first prove its address (RFC 9000 8.1.2), so that a spoofed flood fills nothing.
const HANDSHAKES_UNPROVED_MAX: usize = 16;
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(3);
/// A frame that a peer doesn't take in this time means that it hangs.
const WRITE_LIMIT: Duration = Duration::from_secs(10);
const FLUSH_LIMIT: Duration = Duration::from_millis(300);
/// A replaced link is read for this long.
const LINGER: Duration = Duration::from_secs(2);

/// Counts one while it lives.
pub(super) struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    /// `None` if there are `most` already.
    pub fn enter(counter: &'a AtomicUsize, most: usize) -> Option<Counted<'a>> {
        let entered = Counted(counter);
        (counter.fetch_add(1, Ordering::Relaxed) < most).then_some(entered)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) async fn accept_connections(shared: Arc<Shared>) {
    while let Some(incoming) = shared.endpoint.accept().await {
        let handshakes = shared.handshakes.load(Ordering::Relaxed);
        if handshakes >= HANDSHAKES_MAX || shared.is_closing.load(Ordering::Relaxed) {
            incoming.refuse();
        } else if handshakes >= HANDSHAKES_UNPROVED_MAX && incoming.may_retry() {
            // Fails only if a retry is not allowed here, which was just asked.
            let _ = incoming.retry();
        } else if let Ok(connecting) = incoming.accept() {
            let owner = shared.clone();
            shared.tasks.spawn(async move { serve_connection(owner, connecting).await });
        }
    }
}

async fn serve_connection(shared: Arc<Shared>, connecting: quinn::Connecting) {
    let Some(entered) = Counted::enter(&shared.handshakes, HANDSHAKES_MAX) else { return };
    let address = connecting.remote_address();
    let connection = match within(HANDSHAKE_LIMIT, connecting).await {
        Some(Ok(connection)) => connection,
        Some(Err(error)) => {
            debug!(%address, error = %error, "handshake failed");
            if let Some(refusal) = handshake_refusal(&error) {
                shared.tell_refusal(address, None, refusal, RefusedBy::Us).await;
            }
            return;
        }
        None => return debug!(%address, "handshake timed out"),
    };
    match protocol(&connection).as_deref() {
        Some(ALPN_PEER) => match greet(&shared, &connection).await {
            Ok(claim) => start_link(&shared, connection, claim, DialledBy::Peer),
            Err(Some((node, refusal))) => {
                warn!(%address, reason = %refusal, "peer refused");
                refusal.close(&connection);
                shared.tell_refusal(address, node, refusal, RefusedBy::Us).await;
            }
            Err(None) => connection.close(CLOSE_DONE, b""),
        },
        Some(ALPN_JOIN) => {
            drop(entered);
            join_server::serve(&shared, connection).await;
        }
        Some(ALPN_CODE) => {
            drop(entered);
            door::serve(&shared.door, connection).await;
        }
        _ => Refusal::new(RefusalCode::WrongProtocol, "no such protocol").close(&connection),
    }
}

/// A certificate that our verifier turned down: TLS told the peer already, this is for our events.
fn handshake_refusal(error: &ConnectionError) -> Option<Refusal> {
    let ConnectionError::TransportError(error) = error else { return None };
    // 0x100 + a TLS alert (RFC 9001 4.8): 42 to 48 are about certificates.
    let code = u64::from(error.code);
    (0x100 + 42..=0x100 + 48).contains(&code).then(|| {
        Refusal::new(RefusalCode::UnknownKey, "its certificate is not of this cluster or not a client's")
    })
}

fn protocol(connection: &Connection) -> Option<Vec<u8>> {
    let data = connection.handshake_data()?.downcast::<quinn::crypto::rustls::HandshakeData>().ok()?;
    data.protocol
}

fn certificate(connection: &Connection) -> Option<CertificateDer<'static>> {
    let chain = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    chain.first().cloned()
}

/// An IPv4 peer of an IPv6 socket shows as `::ffff:a.b.c.d`; everywhere else it is `a.b.c.d`.
pub(super) fn remote_address(connection: &Connection) -> SocketAddr {
    let address = connection.remote_address();
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The key of the node certificate that TLS checked.
pub(super) fn node_key(shared: &Shared, connection: &Connection) -> Result<PublicKey, Refusal> {
    let missing = || Refusal::new(RefusalCode::NoCertificate, "a node certificate is required; join first");
    let certificate = certificate(connection).ok_or_else(missing)?;
    let peer = read_client(&certificate, &shared.membership.authority)
        .map_err(|error| Refusal::new(RefusalCode::UnknownKey, error.to_string()))?;
    match peer.role {
        Role::Node => Ok(peer.public_key),
        Role::Operator { .. } | Role::Viewer { .. } => {
            Err(Refusal::new(RefusalCode::WrongRole, "a person's certificate doesn't make a node"))
        }
    }
}

/// `Err(None)` where there is nobody to tell.
async fn greet(
    shared: &Arc<Shared>,
    connection: &Connection,
) -> Result<PeerClaim, Option<(Option<NodeId>, Refusal)>> {
    let nobody = |error: FrameError| malformed(&error).map(|refusal| (None, refusal));
    // The certificate first: without one, nothing is read or said.
    let public_key = node_key(shared, connection).map_err(|refusal| Some((None, refusal)))?;
    let timeout = || nobody(FrameError::Timeout { limit: HELLO_LIMIT });
    let (mut send, mut receive) =
        within(HELLO_LIMIT, connection.accept_bi()).await.ok_or_else(timeout)?.map_err(|_| None)?;
    let hello: Hello =
        frames::read_value(&mut receive, HELLO_BYTES_MAX, HELLO_LIMIT).await.map_err(nobody)?;
    let node = hello.node_id;
    if node == shared.node_id() && hello.start_id == shared.config.start_id {
        // Our own dial came back to us: answering lets the dialler see it.
        let _ = frames::write_value(&mut send, &shared.hello(), HELLO_BYTES_MAX, HELLO_LIMIT).await;
        within(HELLO_LIMIT, connection.closed()).await;
        return Err(None);
    }
    let told = |refusal| Some((Some(node), refusal));
    let claim = PeerClaim { public_key, hello, address: remote_address(connection) };
    shared.admit(&claim).await.map_err(told)?;
    frames::write_value(&mut send, &shared.hello(), HELLO_BYTES_MAX, HELLO_LIMIT).await.map_err(nobody)?;
    let Confirm::Accepted =
        frames::read_value(&mut receive, HELLO_BYTES_MAX, HELLO_LIMIT + HELLO_LIMIT).await.map_err(nobody)?;
    Ok(claim)
}

/// Makes an admitted connection a link and starts its tasks, which end with it.
pub(super) fn start_link(
    shared: &Arc<Shared>,
    connection: Connection,
    claim: PeerClaim,
    dialled_by: DialledBy,
) {
    let node = claim.hello.node_id;
    // Where it listens, as far as it knows.
    shared.learn(node, SocketAddr::new(claim.address.ip(), claim.hello.listen_port));
    let (link, replaced) = shared.install(connection, claim, dialled_by);
    let queue = super::executor::lock(&shared.table).slot(node).queue.clone();
    shared.tasks.spawn(watch(shared.clone(), link.clone(), replaced.clone()));
    shared.tasks.spawn(read_frames(shared.clone(), link.clone()));
    shared.tasks.spawn(read_datagrams(shared.clone(), link.clone()));
    shared.tasks.spawn(streams::accept_streams(shared.clone(), link.clone()));
    shared.writers.spawn(write_frames(link, queue, replaced));
}

/// Ends with the connection; closes a replaced one after its linger.
async fn watch(shared: Arc<Shared>, link: Link, replaced: Receiver<()>) {
    let reason = future::or(async { Some(link.connection.closed().await) }, async {
        // Nothing is ever sent: the channel closes when another link is current.
        let _ = replaced.recv().await;
        None
    })
    .await;
    match reason {
        Some(error) => {
            if let ConnectionError::ApplicationClosed(close) = &error
                && let Some(refusal) = Refusal::read(close)
            {
                let node = Some(link.claim.hello.node_id);
                shared.tell_refusal(link.claim.address, node, refusal, RefusedBy::Peer).await;
            }
            shared.remove(&link, error.to_string());
        }
        None => {
            within(LINGER, link.connection.closed()).await;
            link.connection.close(CLOSE_REPLACED, b"another connection took its place");
        }
    }
}

async fn read_frames(shared: Arc<Shared>, link: Link) {
    while let Ok(mut stream) = link.connection.accept_uni().await {
        let (owner, link) = (shared.clone(), link.clone());
        shared.tasks.spawn(async move {
            if let Err(error) = read_frame_stream(&owner, &link, &mut stream).await
                && let Some(refusal) = malformed(&error)
            {
                let peer = link.claim.hello.node_id;
                warn!(%peer, error = %error, "peer sent a bad frame");
                refusal.close(&link.connection);
                owner.tell_refusal(link.claim.address, Some(peer), refusal, RefusedBy::Us).await;
            }
        });
    }
}

async fn read_frame_stream(shared: &Shared, link: &Link, stream: &mut RecvStream) -> Result<(), FrameError> {
    let kind = streams::read_kind(stream).await?;
    if kind != StreamKind::Frames {
        return Err(FrameError::Decode(postcard::Error::DeserializeBadEnum));
    }
    let from = link.claim.hello.node_id;
    loop {
        let frame = frames::read_body(stream, FRAME_BYTES_MAX).await?;
        if shared.events.send(Event::Frame { from, frame }).await.is_err() {
            return Ok(());
        }
    }
}

async fn read_datagrams(shared: Arc<Shared>, link: Link) {
    let from = link.claim.hello.node_id;
    while let Ok(datagram) = link.connection.read_datagram().await {
        if !datagram.is_empty() {
            // A node layer that lags loses datagrams; the next ones are newer anyhow.
            let _ = shared.events.try_send(Event::Datagram { from, datagram: datagram.to_vec() });
        }
    }
}

async fn write_frames(link: Link, queue: Arc<FrameQueue>, replaced: Receiver<()>) {
    let next = || {
        future::or(
            async {
                // Nothing is ever sent: the channel closes when another link is current.
                let _ = replaced.recv().await;
                None
            },
            future::or(queue.pop(), async {
                link.connection.closed().await;
                None
            }),
        )
    };
    let Some(Ok(mut stream)) = within(WRITE_LIMIT, link.connection.open_uni()).await else { return };
    if streams::write_kind(&mut stream, StreamKind::Frames).await.is_err() {
        return;
    }
    while let Some(frame) = next().await {
        match within(WRITE_LIMIT, frames::write_body(&mut stream, &frame)).await {
            Some(Ok(())) => {}
            Some(Err(_)) => return,
            None => {
                warn!(peer = %link.claim.hello.node_id, "peer takes no frames");
                return link.connection.close(CLOSE_DONE, b"it takes no frames");
            }
        }
    }
    finish(&mut stream).await;
}

/// Ends a stream and waits shortly until the peer has it all.
pub(super) async fn finish(stream: &mut SendStream) {
    if stream.finish().is_ok() {
        within(FLUSH_LIMIT, stream.stopped()).await;
    }
}
