//! Dialling members: one task each, which ends with the membership.
//!
//! Addresses → an admitted link. Tries what is known, newest first, then waits 50 ms to 2 s; a newly learned address or
//! a lost link wakes it at once. A peer that refused is asked again after 10 s.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_channel::Receiver;
use futures_lite::future;
use quinn::{ConnectError, ConnectionError};
use tracing::debug;

use super::authority::NODE_NAME;
use super::executor::{lock, within};
use super::frames::{self, FrameError};
use super::hello::{CLOSE_DONE, Confirm, HELLO_BYTES_MAX, HELLO_LIMIT, Hello, PeerClaim, Refusal};
use super::ids::NodeId;
use super::peers::RefusedBy;
use super::serve;
use super::table::{DialledBy, Shared};

const HANDSHAKE_LIMIT: Duration = Duration::from_millis(1500);
const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(2);
const REFUSED_WAIT: Duration = Duration::from_secs(10);
/// The higher id dials a little later, so that two nodes seldom dial across each other.
const COURTESY: Duration = Duration::from_millis(30);

#[derive(Debug, thiserror::Error)]
pub(super) enum DialError {
    #[error("dial")]
    Connect(#[source] ConnectError),
    #[error("no answer within {} ms", HANDSHAKE_LIMIT.as_millis())]
    Timeout,
    #[error("connect")]
    Handshake(#[source] ConnectionError),
    #[error("greet")]
    Greet(#[source] FrameError),
    #[error("refused by the peer: {0}")]
    RefusedByPeer(Refusal),
    #[error("refused by us: {0}")]
    RefusedByUs(Refusal),
    #[error("the address is now {actual}'s")]
    OtherNode { actual: NodeId },
    #[error("the address is our own")]
    Ourselves,
}

/// Keeps a link to `node` until it is no member any more.
pub(super) async fn keep_connected(
    shared: Arc<Shared>,
    node: NodeId,
    woken: Receiver<()>,
    ended: Receiver<()>,
) {
    let work = async {
        let mut backoff = BACKOFF_FIRST;
        loop {
            if shared.link(node).is_some() {
                backoff = BACKOFF_FIRST;
                if woken.recv().await.is_err() {
                    return;
                }
                continue;
            }
            if node < shared.node_id() {
                async_io::Timer::after(COURTESY).await;
            }
            let wait = match future::or(dial_addresses(&shared, node), interrupted(&woken)).await {
                Round::Connected => continue,
                Round::NewAddress => Duration::ZERO,
                Round::Refused => REFUSED_WAIT,
                Round::Failed => backoff,
            };
            backoff = (backoff * 2).min(BACKOFF_MAX);
            within(wait, woken.recv()).await;
        }
    };
    future::or(work, async {
        // Nothing is ever sent: the channel closes when the membership ends.
        let _ = ended.recv().await;
    })
    .await;
}

enum Round {
    Connected,
    NewAddress,
    Refused,
    Failed,
}

async fn interrupted(woken: &Receiver<()>) -> Round {
    let _ = woken.recv().await;
    Round::NewAddress
}

async fn dial_addresses(shared: &Arc<Shared>, node: NodeId) -> Round {
    let addresses = lock(&shared.book).candidates(node);
    let mut round = Round::Failed;
    for address in addresses {
        match dial(shared, address, Some(node)).await {
            Ok(()) => return Round::Connected,
            Err(DialError::RefusedByPeer(_) | DialError::RefusedByUs(_)) => round = Round::Refused,
            Err(DialError::OtherNode { .. } | DialError::Ourselves) => {
                lock(&shared.book).forget(node, address)
            }
            Err(error) => debug!(%node, %address, error = %error, "dial failed"),
        }
    }
    round
}

/// One attempt at one address; `expected` is left out where only an address is known.
pub(super) async fn dial(
    shared: &Arc<Shared>,
    address: SocketAddr,
    expected: Option<NodeId>,
) -> Result<(), DialError> {
    if shared.is_closing.load(Ordering::Relaxed) {
        return Err(DialError::Timeout);
    }
    let connecting = shared
        .endpoint
        .connect_with(shared.dial_config.clone(), address, NODE_NAME)
        .map_err(DialError::Connect)?;
    let connection =
        within(HANDSHAKE_LIMIT, connecting).await.ok_or(DialError::Timeout)?.map_err(DialError::Handshake)?;
    let greeted = greet(shared, &connection, expected).await;
    match greeted {
        Ok(claim) => {
            let node = claim.hello.node_id;
            serve::start_link(shared, connection, claim, DialledBy::Us);
            // Behind a port forwarding this is not where the peer says it listens, but it works from here.
            shared.learn(node, address);
            Ok(())
        }
        Err(error) => {
            match &error {
                DialError::RefusedByUs(refusal) => {
                    refusal.close(&connection);
                    shared.tell_refusal(address, expected, refusal.clone(), RefusedBy::Us).await;
                }
                DialError::RefusedByPeer(refusal) => {
                    shared.tell_refusal(address, expected, refusal.clone(), RefusedBy::Peer).await;
                }
                DialError::OtherNode { actual } => {
                    connection.close(CLOSE_DONE, b"looking for another node");
                    shared.hint(*actual, address);
                }
                _ => connection.close(CLOSE_DONE, b"greeting failed"),
            }
            Err(error)
        }
    }
}

async fn greet(
    shared: &Arc<Shared>,
    connection: &quinn::Connection,
    expected: Option<NodeId>,
) -> Result<PeerClaim, DialError> {
    let explained = |error: FrameError| match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(close)) => match Refusal::read(&close) {
            Some(refusal) => DialError::RefusedByPeer(refusal),
            None => DialError::Greet(error),
        },
        _ => DialError::Greet(error),
    };
    let timeout = FrameError::Timeout { limit: HELLO_LIMIT };
    let (mut send, mut receive) = match within(HELLO_LIMIT, connection.open_bi()).await {
        None => return Err(explained(timeout)),
        Some(Err(error)) => {
            return Err(explained(FrameError::Write(quinn::WriteError::ConnectionLost(error))));
        }
        Some(Ok(streams)) => streams,
    };
    frames::write_value(&mut send, &shared.hello(), HELLO_BYTES_MAX, HELLO_LIMIT).await.map_err(explained)?;
    let hello: Hello =
        frames::read_value(&mut receive, HELLO_BYTES_MAX, HELLO_LIMIT).await.map_err(explained)?;
    if hello.node_id == shared.node_id() && hello.start_id == shared.config.start_id {
        return Err(DialError::Ourselves);
    }
    let public_key = serve::node_key(shared, connection).map_err(DialError::RefusedByUs)?;
    let claim = PeerClaim { public_key, hello, address: serve::remote_address(connection) };
    let actual = claim.hello.node_id;
    if expected.is_some_and(|expected| expected != actual) && actual != shared.node_id() {
        return Err(DialError::OtherNode { actual });
    }
    shared.admit(&claim).await.map_err(DialError::RefusedByUs)?;
    frames::write_value(&mut send, &Confirm::Accepted, HELLO_BYTES_MAX, HELLO_LIMIT)
        .await
        .map_err(explained)?;
    // Only fails if the peer reset the stream, and then the link ends by itself.
    let _ = send.finish();
    Ok(claim)
}
