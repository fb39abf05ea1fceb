//! What a transport holds while it runs: its endpoint, one slot per peer, and the links in them.
//!
//! A link is one admitted connection. Each slot has at most one current link; a replaced one lingers for two seconds so
//! that what is on its way still arrives. Locks are held for a few map operations, never across an await.
//!
//! Invariant: of two links made at the same time both sides keep the one that the lower id dialled
//! (`of_two_links_made_at_once_the_lower_id_s_stays`).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};

use super::addresses::AddressBook;
use super::admission;
use super::door::Door;
use super::executor::{TaskGroup, lock};
use super::frames::FrameError;
use super::hello::{Hello, PROTOCOL, PeerClaim, Refusal, RefusalCode};
use super::identity::Membership;
use super::ids::{NodeId, PublicKey};
use super::join_limit::JoinLimit;
use super::local_names::LocalNames;
use super::peers::{Authorise, Event, FRAME_BYTES_MAX, RefusedBy, TransportConfig};
use super::pending_announce::Heard;
use super::serve;

/// Two links younger than this were dialled across each other; of others the newest is the one that works.
const CROSSING: Duration = Duration::from_secs(5);
/// How long an old start of a node has to answer before a new start takes its place.
const CLONE_PROBE: Duration = Duration::from_secs(1);
const CLONE_PROBE_STEP: Duration = Duration::from_millis(50);
/// Frames waiting for one peer.
const QUEUE_FRAMES_MAX: usize = 256;
/// Bytes waiting for one peer; over it frames are dropped.
const QUEUE_BYTES_MAX: usize = 4 << 20;
const _: () = assert!(FRAME_BYTES_MAX <= QUEUE_BYTES_MAX);
/// A refusal of the same address for the same reason is told again after this long.
const REFUSAL_TOLD_EVERY: Duration = Duration::from_secs(60);
const REFUSALS_REMEMBERED_MAX: usize = 256;

/// Who dialled a link.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub(super) enum DialledBy {
    Us,
    Peer,
}

#[derive(Clone)]
pub(super) struct Link {
    pub id: u64,
    pub connection: quinn::Connection,
    pub claim: PeerClaim,
    pub dialled_by: DialledBy,
    pub since: Instant,
    /// Closed when another link takes its place.
    pub replaced: Sender<()>,
}

/// Frames for one peer, whatever link it has.
pub(super) struct FrameQueue {
    sender: Sender<Vec<u8>>,
    receiver: Receiver<Vec<u8>>,
    bytes: AtomicUsize,
}

impl FrameQueue {
    fn new() -> Arc<FrameQueue> {
        let (sender, receiver) = async_channel::bounded(QUEUE_FRAMES_MAX);
        Arc::new(FrameQueue { sender, receiver, bytes: AtomicUsize::new(0) })
    }

    /// Whether it was taken; a full queue takes nothing.
    pub fn push(&self, frame: Vec<u8>) -> bool {
        let length = frame.len();
        let waiting = self.bytes.fetch_add(length, Ordering::Relaxed);
        let fits = waiting + length <= QUEUE_BYTES_MAX || waiting == 0;
        let is_taken = fits && self.sender.try_send(frame).is_ok();
        if !is_taken {
            self.bytes.fetch_sub(length, Ordering::Relaxed);
        }
        is_taken
    }

    /// `None` once it is closed and empty.
    pub async fn pop(&self) -> Option<Vec<u8>> {
        let frame = self.receiver.recv().await.ok()?;
        self.bytes.fetch_sub(frame.len(), Ordering::Relaxed);
        Some(frame)
    }

    fn drain(&self) {
        while let Ok(frame) = self.receiver.try_recv() {
            self.bytes.fetch_sub(frame.len(), Ordering::Relaxed);
        }
    }

    pub fn close(&self) {
        self.sender.close();
    }
}

pub(super) struct Slot {
    /// Its key, if it is a member here; a peer may be admitted before this node knows it as a member.
    pub member_key: Option<PublicKey>,
    pub link: Option<Link>,
    /// Rises each time the peer goes from down to up, or comes with another start.
    pub generation: u64,
    pub down_reason: String,
    pub queue: Arc<FrameQueue>,
    /// Wakes its dialler.
    pub wake: Sender<()>,
    pub woken: Receiver<()>,
    /// Dropped with the membership: ends its dialler.
    pub dialler: Option<Sender<()>>,
}

impl Slot {
    fn new() -> Slot {
        let (wake, woken) = async_channel::bounded(1);
        Slot {
            member_key: None,
            link: None,
            generation: 0,
            down_reason: String::new(),
            queue: FrameQueue::new(),
            wake,
            woken,
            dialler: None,
        }
    }
}

#[derive(Default)]
pub(super) struct Table {
    pub slots: BTreeMap<NodeId, Slot>,
    next_link: u64,
    refusals: BTreeMap<(std::net::IpAddr, RefusalCode), Instant>,
}

impl Table {
    pub fn slot(&mut self, node: NodeId) -> &mut Slot {
        self.slots.entry(node).or_insert_with(Slot::new)
    }

    pub fn link(&self, node: NodeId) -> Option<&Link> {
        self.slots.get(&node)?.link.as_ref()
    }
}

/// Everything the tasks of one transport share.
pub(super) struct Shared {
    pub config: TransportConfig,
    pub membership: Membership,
    pub authorise: Authorise,
    pub endpoint: quinn::Endpoint,
    pub dial_config: quinn::ClientConfig,
    pub listen_port: u16,
    pub tasks: Arc<TaskGroup>,
    pub writers: Arc<TaskGroup>,
    pub quic_tasks: Arc<TaskGroup>,
    pub table: Mutex<Table>,
    pub book: Mutex<AddressBook>,
    pub book_changed: Sender<()>,
    pub peers_changed: Sender<()>,
    pub events: Sender<Event>,
    pub term: AtomicU64,
    pub last_index: AtomicU64,
    pub is_lonely: AtomicBool,
    pub local_names: Mutex<LocalNames>,
    pub is_closing: AtomicBool,
    pub handshakes: AtomicUsize,
    pub bulks: AtomicUsize,
    pub join_limit: Mutex<JoinLimit>,
    /// Strangers with a code.
    pub door: Arc<Door>,
    /// Machines without a cluster on the LAN.
    pub waiting: Mutex<Heard>,
    pub started: Instant,
}

impl Shared {
    pub fn node_id(&self) -> NodeId {
        self.membership.node_id
    }

    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub fn hello(&self) -> Hello {
        Hello {
            protocol: PROTOCOL,
            feature_level: self.config.feature_level,
            node_id: self.node_id(),
            store_id: self.membership.store_id,
            start_id: self.config.start_id,
            fingerprint: self.config.fingerprint,
            term: self.term.load(Ordering::Relaxed),
            last_index: self.last_index.load(Ordering::Relaxed),
            listen_port: self.listen_port,
        }
    }

    /// The transport's own rules, then the node layer's.
    pub async fn admit(&self, claim: &PeerClaim) -> Result<(), Refusal> {
        admission::check_protocol(claim)?;
        let node = claim.hello.node_id;
        if node == self.node_id() {
            return Err(admission::cloned(claim, self.endpoint.local_addr().unwrap_or(claim.address)));
        }
        let (member_key, live) = {
            let mut table = lock(&self.table);
            let slot = table.slot_if_any(node);
            slot.map_or((None, None), |slot| (slot.member_key, slot.link.clone()))
        };
        if member_key.is_some_and(|key| key != claim.public_key) {
            let sentence = format!("{node} has another key in this cluster");
            return Err(Refusal::new(RefusalCode::UnknownKey, sentence));
        }
        (self.authorise)(claim)?;
        match live {
            Some(live) if live.claim.hello.start_id != claim.hello.start_id => {
                if answers(&live.connection).await {
                    return Err(admission::cloned(claim, serve::remote_address(&live.connection)));
                }
                live.connection.close(super::hello::CLOSE_REPLACED, b"a newer start took its place");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Makes an admitted connection this peer's link, or lets it linger beside a better one.
    pub fn install(
        &self,
        connection: quinn::Connection,
        claim: PeerClaim,
        dialled_by: DialledBy,
    ) -> (Link, Receiver<()>) {
        let (replaced, on_replaced) = async_channel::bounded(1);
        let node = claim.hello.node_id;
        let mut table = lock(&self.table);
        table.next_link += 1;
        let id = table.next_link;
        let since = Instant::now();
        let link = Link { id, connection, claim, dialled_by, since, replaced };
        let own_id = self.node_id();
        let slot = table.slot(node);
        let old = slot.link.take().filter(|old| old.connection.close_reason().is_none());
        let is_kept = old.as_ref().is_some_and(|old| keeps_old(own_id, node, old, &link));
        match old {
            Some(old) if is_kept => {
                link.replaced.close();
                slot.link = Some(old);
            }
            old => {
                let is_same_start =
                    old.as_ref().is_some_and(|old| old.claim.hello.start_id == link.claim.hello.start_id);
                if let Some(old) = old {
                    old.replaced.close();
                }
                if !is_same_start {
                    slot.generation += 1;
                    slot.queue.drain();
                }
                slot.link = Some(link.clone());
            }
        }
        // Full means that a look at the table is due already.
        let _ = self.peers_changed.try_send(());
        let _ = slot.wake.try_send(());
        (link, on_replaced)
    }

    /// Takes a dead link out of its slot.
    pub fn remove(&self, link: &Link, reason: String) {
        let mut table = lock(&self.table);
        let Some(slot) = table.slots.get_mut(&link.claim.hello.node_id) else { return };
        if slot.link.as_ref().is_some_and(|current| current.id == link.id) {
            slot.link = None;
            slot.down_reason = reason;
            slot.queue.drain();
            let _ = self.peers_changed.try_send(());
            let _ = slot.wake.try_send(());
        }
    }

    pub fn link(&self, node: NodeId) -> Option<Link> {
        lock(&self.table).link(node).cloned()
    }

    /// Notes a good address of a peer; a changed set of addresses is written by the book's task.
    pub fn learn(&self, node: NodeId, address: SocketAddr) {
        if lock(&self.book).confirm(node, address) {
            let _ = self.book_changed.try_send(());
        }
    }

    /// A place where a member may be: dialled at once if it is not connected.
    pub fn hint(&self, node: NodeId, address: SocketAddr) {
        if node == self.node_id() {
            return;
        }
        let mut table = lock(&self.table);
        let Some(slot) = table.slot_if_any(node) else { return };
        let is_news = lock(&self.book).hint(node, address);
        if is_news && slot.link.is_none() {
            let _ = slot.wake.try_send(());
        }
    }

    /// Tells the node layer, at most once a minute for the same address and reason.
    pub async fn tell_refusal(
        &self,
        address: SocketAddr,
        node: Option<NodeId>,
        refusal: Refusal,
        by: RefusedBy,
    ) {
        {
            let mut table = lock(&self.table);
            let now = Instant::now();
            let key = (address.ip(), refusal.code);
            let told = table.refusals.get(&key);
            if told.is_some_and(|told| now.duration_since(*told) < REFUSAL_TOLD_EVERY) {
                return;
            }
            if table.refusals.len() >= REFUSALS_REMEMBERED_MAX {
                table.refusals.clear();
            }
            table.refusals.insert(key, now);
        }
        // The receiver is gone only while the node stops.
        let _ = self.events.send(Event::Refused { address, node, refusal, by }).await;
    }
}

impl Table {
    fn slot_if_any(&mut self, node: NodeId) -> Option<&mut Slot> {
        self.slots.get_mut(&node)
    }
}

/// The dialler of a link, by id.
fn dialler(own_id: NodeId, peer: NodeId, dialled_by: DialledBy) -> NodeId {
    match dialled_by {
        DialledBy::Us => own_id,
        DialledBy::Peer => peer,
    }
}

fn keeps_old(own_id: NodeId, peer: NodeId, old: &Link, new: &Link) -> bool {
    old.claim.hello.start_id == new.claim.hello.start_id
        && is_older_kept(
            dialler(own_id, peer, old.dialled_by),
            dialler(own_id, peer, new.dialled_by),
            old.since.elapsed(),
        )
}

/// Links dialled across each other: the lower id's stays. Otherwise the peer dialled because it lost the old one.
fn is_older_kept(old_dialler: NodeId, new_dialler: NodeId, old_age: Duration) -> bool {
    old_age < CROSSING && old_dialler < new_dialler
}

/// Whether anything comes back on this connection within a second of asking.
async fn answers(connection: &quinn::Connection) -> bool {
    let heard = connection.stats().udp_rx.datagrams;
    let asked = Instant::now();
    while asked.elapsed() < CLONE_PROBE {
        // An empty datagram is a probe: it is acknowledged and otherwise ignored.
        if connection.close_reason().is_some() || connection.send_datagram(bytes::Bytes::new()).is_err() {
            return false;
        }
        async_io::Timer::after(CLONE_PROBE_STEP).await;
        // In this order: a stateless reset counts as heard and closes the connection in the same step.
        if connection.stats().udp_rx.datagrams > heard {
            return connection.close_reason().is_none();
        }
    }
    false
}

/// What a frame error means for the connection it came on.
pub(super) fn malformed(error: &FrameError) -> Option<Refusal> {
    match error {
        FrameError::Oversize { .. } | FrameError::Decode(_) => {
            Some(Refusal::new(RefusalCode::Malformed, error.to_string()))
        }
        FrameError::Timeout { .. } => Some(Refusal::new(RefusalCode::Malformed, error.to_string())),
        FrameError::Read(_) | FrameError::Write(_) | FrameError::Encode(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_links_made_at_once_the_lower_id_s_stays() {
        let (low, high) = (NodeId(1), NodeId(2));
        let young = Duration::from_millis(20);
        // (who dialled the old, who dialled the new) → the old stays. Both sides see the two in either order.
        assert!(is_older_kept(low, high, young));
        assert!(!is_older_kept(high, low, young));
        assert!(!is_older_kept(low, low, young));
        assert!(!is_older_kept(low, high, CROSSING));
    }

    #[test]
    fn a_full_queue_takes_nothing_and_holds_at_most_its_bytes() {
        let queue = FrameQueue::new();
        assert!(queue.push(vec![0; 3 << 20]));
        assert!(!queue.push(vec![0; 2 << 20]));
        assert!(queue.push(vec![0; 1 << 20]));
        assert!(!queue.push(vec![0; 1]));
        queue.drain();
        assert_eq!((0..300).filter(|_| queue.push(vec![1])).count(), QUEUE_FRAMES_MAX);
    }
}
