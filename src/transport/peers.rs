//! One QUIC connection to every member, over one UDP port.
//!
//! Members, frames, datagrams and streams in; events out. Every node dials every other; what arrives is tagged with the
//! id that the peer's certificate and the node layer's callback vouch for. It never blocks a sender: a frame that finds
//! no link or a full queue is dropped, and Raft sends again.
//!
//! Order: `Up` and `Down` of a peer alternate and are never lost; a frame may come shortly before its `Up`. Invariant:
//! a stopped transport has no task (`tests::shutdown_joins_every_task_and_the_peer_notices_at_once`).

use crate::model::Gather;
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use async_executor::Executor;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{IdleTimeout, VarInt};
use tracing::{info, warn};

use super::addresses::{self, AddressBook};
use super::announce;
use super::dial;
use super::door::{CodeAsked, Door};
use super::executor::{QuicRuntime, TaskGroup, endpoint_config, lock, within};
use super::hello::{CLOSE_SHUTDOWN, PeerClaim, Refusal, RefusalCode};
use super::identity::Identity;
use super::ids::{NodeId, PublicKey, StartId};
use super::join::JoinAsked;
use super::join_limit::JoinLimit;
use super::local_names::LocalNames;
use super::operators::OperatorKey;
use super::pending_announce::Waiting;
use super::sealing::derive_key;
use super::serve;
use super::streams::PeerStream;
use super::table::{Shared, Table};
use super::tls::{self, ALPN_CODE, ALPN_JOIN, ALPN_PEER, TlsError};

/// The longest frame; an entry is at most 1 MiB, and a message carries several.
pub const FRAME_BYTES_MAX: usize = 2 << 20;
/// Events that wait for the node layer; readers of peers' streams wait behind them.
const EVENTS_MAX: usize = 128;
/// Without any sign of the peer for this long the link is dead.
const IDLE: Duration = Duration::from_secs(5);
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// On a LAN the first lost packet of a handshake is sent again after three of these, not after a second.
const INITIAL_RTT: Duration = Duration::from_millis(50);
/// QUIC gives each stream its own window; the connection's holds four, so that two bulk bodies never use up what
/// frames need.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
const STREAMS_AT_ONCE_MAX: u32 = 128;
const FLUSH_LIMIT: Duration = Duration::from_millis(400);
const CLOSE_LIMIT: Duration = Duration::from_millis(500);

/// The node layer's word on a peer whose certificate is good.
pub type Authorise = Arc<dyn Fn(&PeerClaim) -> Result<(), Refusal> + Send + Sync>;

pub struct TransportConfig {
    /// Runs every task; the caller drives it.
    pub executor: Arc<Executor<'static>>,
    /// UDP; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Holds the `peers` file.
    pub data_dir: PathBuf,
    pub identity: Identity,
    pub feature_level: u32,
    pub start_id: StartId,
    pub fingerprint: u64,
    /// Names or addresses from the node's config, dialled while lonely. Without a port: the listen port.
    pub peer_names: Vec<String>,
    /// UDP port of announcements; `None`: three above the listen port (7403). The cluster must agree on it.
    pub announce_port: Option<u16>,
    /// Keys that get an operator's certificate.
    pub operators: Vec<OperatorKey>,
    /// The longest bulk body taken from a peer.
    pub bulk_bytes_max: usize,
}

/// Which side refused.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum RefusedBy {
    Us,
    Peer,
}

pub enum Event {
    Up {
        claim: PeerClaim,
    },
    Down {
        peer: NodeId,
        reason: String,
    },
    Frame {
        from: NodeId,
        frame: Vec<u8>,
    },
    Datagram {
        from: NodeId,
        datagram: Vec<u8>,
    },
    /// A peer opened a stream; reads and writes on it need their own time limits.
    Stream {
        from: NodeId,
        stream: PeerStream,
    },
    /// A whole bulk body whose hash held.
    Bulk {
        from: NodeId,
        header: Vec<u8>,
        body: Vec<u8>,
    },
    Refused {
        address: SocketAddr,
        node: Option<NodeId>,
        refusal: Refusal,
        by: RefusedBy,
    },
    /// A stranger holds its key and asks to join; answer within 15 s.
    Join(JoinAsked),
    /// A stranger proved that it knows the code that this node shows, or a key of its configuration; answer within 30 s.
    Code(CodeAsked),
}

/// What `connections` shows of one link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConnectionState {
    pub address: SocketAddr,
    pub since: Instant,
    pub rtt: Duration,
    pub claim: PeerClaim,
}

/// What became of a frame.
#[derive(Copy, Clone, Debug, PartialEq, Eq)]
pub enum Sent {
    Queued,
    /// No link, a full queue, or over the cap.
    Dropped,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("this node is not a member of a cluster")]
    NotMember,
    #[error("listen on UDP {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("set up TLS")]
    Tls(#[from] TlsError),
    #[error("set up QUIC's encryption")]
    Quic(#[from] NoInitialCipherSuite),
}

/// Cheap to clone; `shutdown` stops it for all clones. The UDP port is free when the last clone and stream is dropped.
#[derive(Clone)]
pub struct Transport {
    shared: Arc<Shared>,
}

pub(super) fn transport_parameters() -> Arc<quinn::TransportConfig> {
    let mut parameters = quinn::TransportConfig::default();
    let idle = IdleTimeout::try_from(IDLE).expect("5 s is a legal idle timeout");
    parameters
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .max_concurrent_bidi_streams(STREAMS_AT_ONCE_MAX.into())
        .max_concurrent_uni_streams(4u32.into())
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES))
        .send_window(u64::from(CONNECTION_WINDOW_BYTES))
        .datagram_receive_buffer_size(Some(64 << 10))
        .datagram_send_buffer_size(64 << 10);
    Arc::new(parameters)
}

impl Transport {
    /// Binds the port and starts to dial what `set_members` names. Answers peers through `authorise`.
    pub fn start(
        config: TransportConfig,
        authorise: Authorise,
    ) -> Result<(Transport, Receiver<Event>), StartError> {
        let membership = config.identity.membership.clone().ok_or(StartError::NotMember)?;
        let key = config.identity.node_key.clone();
        let parameters = transport_parameters();
        let server = tls::server_config(&key, &membership, &[ALPN_PEER, ALPN_JOIN, ALPN_CODE])?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server)?));
        server.transport_config(parameters.clone());
        let client = tls::peer_client_config(&key, &membership)?;
        let mut dial_config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(client)?));
        dial_config.transport_config(parameters);
        let quic_tasks = TaskGroup::new(config.executor.clone());
        let listen = |source| StartError::Listen { address: config.listen, source };
        let socket = UdpSocket::bind(config.listen).map_err(listen)?;
        let listen_port = socket.local_addr().map_err(listen)?.port();
        // Derived from the node key: after a crash the next start resets the connections that peers had dialled at once.
        let endpoint = quinn::Endpoint::new(
            endpoint_config(&derive_key(key.as_pkcs8(), "stateless reset")),
            Some(server),
            socket,
            Arc::new(QuicRuntime(quic_tasks.clone())),
        )
        .map_err(listen)?;
        let (events, receiver) = async_channel::bounded(EVENTS_MAX);
        let (book_changed, on_book_changed) = async_channel::bounded(1);
        let (peers_changed, on_peers_changed) = async_channel::bounded(1);
        let asked = events.clone();
        let take = Box::new(move |asked_by_code| asked.try_send(Event::Code(asked_by_code)).is_ok());
        let door = Door::new(config.operators.clone(), take);
        let shared = Arc::new(Shared {
            tasks: TaskGroup::new(config.executor.clone()),
            writers: TaskGroup::new(config.executor.clone()),
            book: Mutex::new(AddressBook::load(&config.data_dir)),
            membership,
            authorise,
            endpoint,
            dial_config,
            listen_port,
            quic_tasks,
            table: Mutex::new(Table::default()),
            book_changed,
            peers_changed,
            events,
            term: AtomicU64::new(0),
            last_index: AtomicU64::new(0),
            is_lonely: AtomicBool::new(false),
            local_names: Mutex::default(),
            is_closing: AtomicBool::new(false),
            handshakes: AtomicUsize::new(0),
            bulks: AtomicUsize::new(0),
            join_limit: Mutex::new(JoinLimit::default()),
            door,
            waiting: Mutex::default(),
            started: Instant::now(),
            config,
        });
        shared.tasks.spawn(serve::accept_connections(shared.clone()));
        shared.tasks.spawn(tell_changes(shared.clone(), on_peers_changed));
        shared.tasks.spawn(addresses::write_changes(shared.clone(), on_book_changed));
        shared.tasks.spawn(announce::run(shared.clone()));
        info!(node = %shared.node_id(), port = listen_port, "transport listens");
        Ok((Transport { shared }, receiver))
    }

    /// Whom to dial. A member that is gone from the map is closed as removed, as is one with another key.
    pub fn set_members(&self, members: BTreeMap<NodeId, PublicKey>) {
        let shared = &self.shared;
        let mut closed = Vec::new();
        let mut new = Vec::new();
        {
            let mut table = lock(&shared.table);
            for (node, slot) in &mut table.slots {
                let key = members.get(node);
                let is_removed = slot.member_key.is_some() && slot.member_key.as_ref() != key;
                // A peer may have been let in before it was known here as a member.
                let is_other_key = slot
                    .link
                    .as_ref()
                    .is_some_and(|link| key.is_some_and(|key| *key != link.claim.public_key));
                if is_removed {
                    slot.member_key = None;
                    slot.dialler = None;
                    lock(&shared.book).remove(*node);
                    // Full means that a write is due already.
                    let _ = shared.book_changed.try_send(());
                }
                if is_removed || is_other_key {
                    closed.extend(slot.link.as_ref().map(|link| link.connection.clone()));
                }
            }
            for (node, key) in members {
                let slot = table.slot(node);
                if node != shared.node_id() && slot.member_key.is_none() {
                    slot.member_key = Some(key);
                    let (dialler, ended) = async_channel::bounded(1);
                    slot.dialler = Some(dialler);
                    new.push((node, slot.woken.clone(), ended));
                }
            }
        }
        let refusal = Refusal::new(RefusalCode::Removed, "this node was removed from the cluster");
        closed.iter().for_each(|connection| refusal.close(connection));
        for (node, woken, ended) in new {
            shared.tasks.spawn(dial::keep_connected(shared.clone(), node, woken, ended));
        }
    }

    /// What the next greetings carry.
    pub fn set_position(&self, term: u64, last_index: u64) {
        self.shared.term.store(term, Ordering::Relaxed);
        self.shared.last_index.store(last_index, Ordering::Relaxed);
    }

    /// While true this node announces itself every 5 s and dials the names of its config.
    pub fn set_lonely(&self, is_lonely: bool) {
        self.shared.is_lonely.store(is_lonely, Ordering::Relaxed);
    }

    /// What this node answers for when the LAN asks by mDNS: `NODE.local` and `CLUSTER.local`.
    pub fn set_local_names(&self, names: LocalNames) {
        *lock(&self.shared.local_names) = names;
    }

    /// An address where a member may be, from a join reply for example; dialled at once if it is not connected.
    pub fn hint(&self, node: NodeId, address: SocketAddr) {
        self.shared.hint(node, address);
    }

    /// Ordered among frames of one link, at most once; never waits.
    pub fn frame(&self, node: NodeId, frame: Vec<u8>) -> Sent {
        if frame.len() > FRAME_BYTES_MAX {
            warn!(%node, bytes = frame.len(), "frame over its cap dropped");
            return Sent::Dropped;
        }
        let queue = {
            let table = lock(&self.shared.table);
            let slot = table.slots.get(&node).filter(|slot| slot.link.is_some());
            slot.map(|slot| slot.queue.clone())
        };
        match queue {
            Some(queue) if queue.push(frame) => Sent::Queued,
            _ => Sent::Dropped,
        }
    }

    /// At most about 1,100 bytes and not empty; unordered, may be lost, never waits.
    pub fn datagram(&self, node: NodeId, datagram: Vec<u8>) -> Sent {
        match self.shared.link(node) {
            Some(link) if !datagram.is_empty() && link.connection.send_datagram(datagram.into()).is_ok() => {
                Sent::Queued
            }
            _ => Sent::Dropped,
        }
    }

    /// To every connected peer.
    pub fn broadcast_datagram(&self, datagram: &[u8]) {
        let peers: Vec<NodeId> = lock(&self.shared.table).slots.keys().copied().collect();
        for peer in peers {
            self.datagram(peer, datagram.to_vec());
        }
    }

    pub fn connections(&self) -> BTreeMap<NodeId, ConnectionState> {
        let table = lock(&self.shared.table);
        let links = table.slots.iter().filter_map(|(node, slot)| Some((*node, slot.link.as_ref()?)));
        let state = |link: &super::table::Link| ConnectionState {
            address: serve::remote_address(&link.connection),
            since: link.since,
            rtt: link.connection.rtt(),
            claim: link.claim.clone(),
        };
        links.map(|(node, link)| (node, state(link))).gather()
    }

    /// Where peers may dial this node now.
    pub fn local_addresses(&self) -> Vec<SocketAddr> {
        let listen = self.shared.config.listen.ip();
        if !listen.is_unspecified() {
            return vec![SocketAddr::new(listen, self.shared.listen_port)];
        }
        announce::interface_addresses()
            .into_iter()
            .map(|address| SocketAddr::new(address, self.shared.listen_port))
            .collect()
    }

    /// Where strangers with a code come in.
    pub fn door(&self) -> &Arc<Door> {
        &self.shared.door
    }

    /// Machines on the LAN that belong to no cluster, as their announcements say.
    pub fn waiting(&self) -> Vec<Waiting> {
        lock(&self.shared.waiting).rows(Instant::now())
    }

    pub fn listen_port(&self) -> u16 {
        self.shared.listen_port
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// Sends what is queued, closes every connection, and returns when every task has ended: about a second at most.
    pub async fn shutdown(&self) {
        let shared = &self.shared;
        shared.is_closing.store(true, Ordering::Relaxed);
        lock(&shared.table).slots.values().for_each(|slot| slot.queue.close());
        shared.writers.finish(FLUSH_LIMIT).await;
        shared.endpoint.close(CLOSE_SHUTDOWN, b"stopping");
        shared.writers.stop().await;
        shared.tasks.stop().await;
        addresses::write_now(shared).await;
        lock(&shared.table).slots.clear();
        within(CLOSE_LIMIT, shared.endpoint.wait_idle()).await;
        shared.quic_tasks.stop().await;
        shared.events.close();
    }
}

/// Compares the table with what was told, so that `Up` and `Down` come in order, however fast links change.
async fn tell_changes(shared: Arc<Shared>, changed: Receiver<()>) {
    let mut told: BTreeMap<NodeId, u64> = BTreeMap::new();
    while changed.recv().await.is_ok() {
        let now: Vec<(NodeId, u64, Option<PeerClaim>, String)> = lock(&shared.table)
            .slots
            .iter()
            .map(|(node, slot)| {
                let claim = slot.link.as_ref().map(|link| link.claim.clone());
                (*node, slot.generation, claim, slot.down_reason.clone())
            })
            .collect();
        for (peer, generation, claim, reason) in now {
            let is_told = told.get(&peer) == Some(&generation);
            if claim.is_some() && is_told {
                continue;
            }
            if told.remove(&peer).is_some() {
                info!(%peer, reason, "peer is down");
                send(&shared.events, Event::Down { peer, reason }).await;
            }
            if let Some(claim) = claim {
                info!(%peer, address = %claim.address, "peer is up");
                told.insert(peer, generation);
                send(&shared.events, Event::Up { claim }).await;
            }
        }
    }
}

async fn send(events: &Sender<Event>, event: Event) {
    // The receiver is gone only while the node stops.
    let _ = events.send(event).await;
}
