//! Several transports in one process over real loopback QUIC; hostile peers and joiners in their own files.

mod coded;
mod hostile;
mod joining;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use async_executor::Executor;
use futures_lite::{AsyncReadExt, AsyncWriteExt, stream};

use super::authority::Authority;
use super::executor::{lock, within};
use super::frames;
use super::hello::{PeerClaim, Refusal, RefusalCode};
use super::identity::Identity;
use super::identity::tests::member;
use super::ids::{NodeId, PublicKey, StartId};
use super::operators::OperatorKey;
use super::peers::{Event, FRAME_BYTES_MAX, RefusedBy, Sent, Transport, TransportConfig};
use super::streams::BulkError;

const PATIENCE: Duration = Duration::from_secs(15);
const BULK_BYTES_MAX: usize = 8 << 20;

/// A thread that runs an executor until it is dropped.
struct Runner {
    executor: Arc<Executor<'static>>,
    stop: Sender<()>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Runner {
    fn start() -> Runner {
        let executor = Arc::new(Executor::new());
        let (stop, stopped) = async_channel::bounded::<()>(1);
        let running = executor.clone();
        let thread = thread::spawn(move || {
            async_io::block_on(running.run(async {
                let _ = stopped.recv().await;
            }))
        });
        Runner { executor, stop, thread: Some(thread) }
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        self.stop.close();
        self.thread.take().unwrap().join().unwrap();
    }
}

type Removed = Arc<Mutex<BTreeSet<PublicKey>>>;

/// One node: its transport, what it told, and its folder.
struct Node {
    transport: Transport,
    events: Receiver<Event>,
    identity: Identity,
    folder: Folder,
    removed: Removed,
}

struct Site {
    runner: Runner,
    authority: Authority,
}

impl Site {
    fn create() -> Site {
        Site { runner: Runner::start(), authority: Authority::create().unwrap() }
    }

    fn identity(&self, number: u64) -> Identity {
        member(&self.authority, number)
    }

    fn start(&self, identity: &Identity, start: u64, listen: &str, folder: Folder) -> Node {
        self.start_announcing(identity, start, listen, folder, Some(1))
    }

    /// One that knows the keys of operators.
    fn start_for(&self, identity: &Identity, operators: Vec<OperatorKey>) -> Node {
        let folder = Folder::create();
        let config = self.config(identity, 1, "127.0.0.1:0", &folder);
        self.start_with(TransportConfig { operators, announce_port: Some(1), ..config }, folder)
    }

    fn start_announcing(
        &self,
        identity: &Identity,
        start: u64,
        listen: &str,
        folder: Folder,
        announce_port: Option<u16>,
    ) -> Node {
        let config = self.config(identity, start, listen, &folder);
        self.start_with(TransportConfig { announce_port, ..config }, folder)
    }

    fn config(&self, identity: &Identity, start: u64, listen: &str, folder: &Folder) -> TransportConfig {
        TransportConfig {
            executor: self.runner.executor.clone(),
            listen: listen.parse().unwrap(),
            data_dir: folder.path().into(),
            identity: identity.clone(),
            feature_level: 1,
            start_id: StartId(u128::from(start)),
            fingerprint: 1,
            peer_names: Vec::new(),
            announce_port: None,
            operators: Vec::new(),
            bulk_bytes_max: BULK_BYTES_MAX,
        }
    }

    fn start_with(&self, config: TransportConfig, folder: Folder) -> Node {
        let (removed, identity) = (Removed::default(), config.identity.clone());
        let rules = removed.clone();
        let authorise = Arc::new(move |claim: &PeerClaim| match lock(&rules).contains(&claim.public_key) {
            true => Err(Refusal::new(RefusalCode::Removed, "it was removed")),
            false => Ok(()),
        });
        let (transport, events) = Transport::start(config, authorise).unwrap();
        Node { transport, events, identity, folder, removed }
    }

    /// Members 1..=count, all up with each other.
    fn cluster(&self, count: u64) -> Vec<Node> {
        let nodes: Vec<Node> = (1..=count)
            .map(|number| self.start(&self.identity(number), number, "127.0.0.1:0", Folder::create()))
            .collect();
        introduce(&nodes);
        nodes.iter().for_each(|node| node.wait_up(count as usize - 1));
        nodes
    }

    fn run<Output>(&self, work: impl Future<Output = Output>) -> Output {
        async_io::block_on(within(PATIENCE, work)).expect("within 15 s")
    }
}

fn id(identity: &Identity) -> NodeId {
    identity.membership.as_ref().unwrap().node_id
}

fn introduce(nodes: &[Node]) {
    let members: BTreeMap<NodeId, PublicKey> =
        nodes.iter().map(|node| (node.id(), node.identity.node_key.public_key())).collect();
    for node in nodes {
        node.transport.set_members(members.clone());
        for other in nodes {
            node.transport.hint(other.id(), other.address());
        }
    }
}

impl Node {
    fn id(&self) -> NodeId {
        id(&self.identity)
    }

    fn address(&self) -> SocketAddr {
        self.transport.local_addresses()[0]
    }

    /// The first event that `pick` takes; others are dropped.
    fn wait<Output>(&self, what: &str, pick: impl Fn(Event) -> Option<Output>) -> Output {
        async_io::block_on(within(PATIENCE, async {
            loop {
                let event = self.events.recv().await.expect("the transport runs");
                if let Some(output) = pick(event) {
                    return output;
                }
            }
        }))
        .unwrap_or_else(|| panic!("{} has no {what} in 15 s", self.id()))
    }

    fn wait_up(&self, count: usize) {
        until("peers up", || self.transport.connections().len() == count);
    }

    fn wait_frame(&self) -> (NodeId, Vec<u8>) {
        self.wait("frame", |event| match event {
            Event::Frame { from, frame } => Some((from, frame)),
            _ => None,
        })
    }

    fn wait_refused(&self) -> (Refusal, RefusedBy) {
        self.wait("refusal", |event| match event {
            Event::Refused { refusal, by, .. } => Some((refusal, by)),
            _ => None,
        })
    }

    fn stop(self) -> (Identity, Folder) {
        async_io::block_on(self.transport.shutdown());
        (self.identity, self.folder)
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "no {what} in 15 s");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn frames_and_datagrams_reach_every_peer_both_ways() {
    let site = Site::create();
    let nodes = site.cluster(3);
    for from in &nodes {
        for to in nodes.iter().filter(|to| to.id() != from.id()) {
            assert_eq!(from.transport.frame(to.id(), vec![from.id().0 as u8; 300_000]), Sent::Queued);
            assert_eq!(to.wait_frame(), (from.id(), vec![from.id().0 as u8; 300_000]));
            assert_eq!(from.transport.datagram(to.id(), b"alive".to_vec()), Sent::Queued);
            let datagram = to.wait("datagram", |event| match event {
                Event::Datagram { from, datagram } => Some((from, datagram)),
                _ => None,
            });
            assert_eq!(datagram, (from.id(), b"alive".to_vec()));
        }
    }
    assert_eq!(nodes[0].transport.frame(NodeId(9), vec![1]), Sent::Dropped);
    assert_eq!(nodes[0].transport.frame(NodeId(2), vec![1; FRAME_BYTES_MAX + 1]), Sent::Dropped);
    nodes.into_iter().for_each(|node| drop(node.stop()));
}

#[test]
fn both_sides_of_a_pair_settle_on_one_connection_and_lose_no_frame() {
    let site = Site::create();
    let nodes = site.cluster(2);
    for number in 0..200u8 {
        nodes[0].transport.frame(NodeId(2), vec![number]);
        assert_eq!(nodes[1].wait_frame().1, [number]);
    }
    // The loser of a crossing is closed after its linger; each side then has one connection.
    until("one connection", || {
        nodes.iter().all(|node| node.transport.shared().endpoint.open_connections() == 1)
    });
    assert_eq!(nodes[0].transport.connections().len(), 1);
    nodes.into_iter().for_each(|node| drop(node.stop()));
}

#[test]
fn a_stream_is_half_closed_by_its_writer() {
    let site = Site::create();
    let nodes = site.cluster(2);
    let mut asking = site.run(nodes[0].transport.open(NodeId(2))).unwrap();
    let answer = site.run(async {
        asking.write_all(b"GET /").await.unwrap();
        asking.close().await.unwrap();
        let (from, mut answering) = nodes[1].wait("stream", |event| match event {
            Event::Stream { from, stream } => Some((from, stream)),
            _ => None,
        });
        assert_eq!((from, answering.peer()), (NodeId(1), NodeId(1)));
        let mut request = Vec::new();
        answering.read_to_end(&mut request).await.unwrap();
        assert_eq!(request, b"GET /");
        answering.write_all(b"200").await.unwrap();
        answering.close().await.unwrap();
        let mut answer = Vec::new();
        asking.read_to_end(&mut answer).await.unwrap();
        answer
    });
    assert_eq!(answer, b"200");
    assert!(site.run(nodes[0].transport.open(NodeId(7))).is_err());
    nodes.into_iter().for_each(|node| drop(node.stop()));
}

#[test]
fn a_bulk_body_arrives_whole_or_not_at_all() {
    let site = Site::create();
    let nodes = site.cluster(2);
    let chunk = vec![5u8; 64 << 10];
    let chunks = |count: usize| stream::iter(vec![chunk.clone(); count]);
    let sent = site.run(nodes[0].transport.send_bulk(NodeId(2), b"snapshot 7".to_vec(), chunks(100)));
    sent.unwrap();
    let (header, length) = nodes[1].wait("bulk", |event| match event {
        Event::Bulk { from: NodeId(1), header, body } => Some((header, body.len())),
        _ => None,
    });
    assert_eq!((header, length), (b"snapshot 7".to_vec(), 100 * (64 << 10)));
    let sent = site.run(nodes[0].transport.send_bulk(NodeId(2), Vec::new(), chunks(129)));
    assert!(matches!(sent, Err(BulkError::TooLong { .. })), "{sent:?}");
    let long = stream::iter(vec![vec![0; (64 << 10) + 1]]);
    let sent = site.run(nodes[0].transport.send_bulk(NodeId(2), Vec::new(), long));
    assert!(matches!(sent, Err(BulkError::Oversize { .. })), "{sent:?}");
    // By hand: the trailer is not the hash.
    let link = nodes[0].transport.shared().link(NodeId(2)).unwrap();
    let answer = site.run(async {
        let (mut send, mut receive) = link.connection.open_bi().await.unwrap();
        send.write_all(&[3]).await.unwrap();
        for part in [&b"head"[..], b"body", b"", &[0; 32]] {
            frames::write_body(&mut send, part).await.unwrap();
        }
        let mut answer = [0];
        receive.read_exact(&mut answer).await.unwrap();
        answer[0]
    });
    assert_eq!(answer, 3, "damaged");
    assert!(
        !std::iter::from_fn(|| nodes[1].events.try_recv().ok())
            .any(|event| matches!(event, Event::Bulk { .. }))
    );
    nodes.into_iter().for_each(|node| drop(node.stop()));
}

#[test]
fn shutdown_joins_every_task_and_the_peer_notices_at_once() {
    let site = Site::create();
    let mut nodes = site.cluster(3);
    nodes[2].wait("up", |event| matches!(event, Event::Up { .. }).then_some(()));
    nodes[0].transport.frame(NodeId(3), b"last words".to_vec());
    let stopped = nodes.remove(0);
    let shared = stopped.transport.shared().clone();
    let begun = Instant::now();
    site.run(stopped.transport.shutdown());
    println!("shutdown took {} ms", begun.elapsed().as_millis());
    assert_eq!(shared.tasks.tasks() + shared.writers.tasks() + shared.quic_tasks.tasks(), 0);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    let mut is_flushed = false;
    let reason = async_io::block_on(within(Duration::from_secs(1), async {
        loop {
            match nodes[1].events.recv().await.unwrap() {
                Event::Frame { frame, .. } => is_flushed = frame == b"last words",
                Event::Down { peer: NodeId(1), reason } => return reason,
                _ => {}
            }
        }
    }));
    assert!(reason.expect("noticed at once").contains("stopping"));
    assert!(is_flushed, "what was queued was sent");
    assert!(stopped.events.is_closed());
    nodes.into_iter().for_each(|node| drop(node.stop()));
    assert!(site.runner.executor.is_empty());
}

#[test]
fn one_node_s_new_address_is_learned_and_written_once() {
    let site = Site::create();
    let mut nodes = site.cluster(3);
    let old = nodes[2].address();
    let (identity, folder) = nodes.remove(2).stop();
    nodes.iter().for_each(|node| node.wait_up(1));
    // Only the moved node dials: it knows the others from its file, they know nothing of its new address.
    let moved = site.start(&identity, 33, "127.0.0.9:0", folder);
    assert_ne!(moved.address(), old);
    let members = BTreeMap::from([1, 2].map(|number| {
        let node = &nodes[number - 1];
        (node.id(), node.identity.node_key.public_key())
    }));
    moved.transport.set_members(members);
    nodes.push(moved);
    nodes.iter().for_each(|node| node.wait_up(2));
    let path = nodes[0].folder.path().join("peers");
    let line = format!("n3 {}", nodes[2].address());
    let is_written = || {
        std::fs::read_to_string(&path)
            .is_ok_and(|text| text.lines().any(|found| found.starts_with("n3") && found.contains(&line[3..])))
    };
    until("new address in the peers file", is_written);
    nodes.into_iter().for_each(|node| drop(node.stop()));
}

#[test]
fn an_ipv6_socket_takes_ipv4_peers_and_shows_their_own_address() {
    let site = Site::create();
    let dual = site.start(&site.identity(1), 1, "[::]:0", Folder::create());
    let plain = site.start(&site.identity(2), 2, "127.0.0.1:0", Folder::create());
    let key = |node: &Node| (node.id(), node.identity.node_key.public_key());
    let members = BTreeMap::from([key(&dual), key(&plain)]);
    plain.transport.set_members(members.clone());
    plain.transport.hint(dual.id(), ([127, 0, 0, 1], dual.transport.listen_port()).into());
    dual.wait_up(1);
    assert_eq!(dual.transport.connections()[&plain.id()].address, plain.address());
    // And it dials them too, at the address that it learned.
    let (identity, folder) = dual.stop();
    plain.wait_up(0);
    plain.transport.set_members(BTreeMap::new());
    let dual = site.start(&identity, 3, "[::]:0", folder);
    dual.transport.set_members(members);
    dual.wait_up(1);
    drop((dual.stop(), plain.stop()));
}

#[test]
fn a_renumbered_site_forms_again() {
    let site = Site::create();
    let nodes = site.cluster(3);
    let members: BTreeMap<NodeId, PublicKey> =
        nodes.iter().map(|node| (node.id(), node.identity.node_key.public_key())).collect();
    for node in &nodes {
        until("peers file", || node.folder.path().join("peers").exists());
    }
    let stopped: Vec<(Identity, Folder)> = nodes.into_iter().map(Node::stop).collect();
    // A free port that all three announce on, and other addresses and ports than before.
    let free = std::net::UdpSocket::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port();
    let begun = Instant::now();
    let nodes: Vec<Node> = stopped
        .into_iter()
        .enumerate()
        .map(|(index, (identity, folder))| {
            let listen = format!("127.0.0.{}:0", 21 + index);
            let node = site.start_announcing(&identity, 50 + index as u64, &listen, folder, Some(free));
            node.transport.set_lonely(true);
            node.transport.set_members(members.clone());
            node
        })
        .collect();
    nodes.iter().for_each(|node| node.wait_up(2));
    println!("renumbered site formed again after {} ms", begun.elapsed().as_millis());
    nodes.into_iter().for_each(|node| drop(node.stop()));
}

/// Ends a node as `kill -9` does: no packet leaves it any more, and its port is free.
fn crash(node: Node) -> Folder {
    let shared = node.transport.shared().clone();
    async_io::block_on(async {
        shared.quic_tasks.stop().await;
        shared.tasks.stop().await;
        shared.writers.stop().await;
    });
    lock(&shared.table).slots.clear();
    node.folder
}

/// A peer crashes and is back at once, at the same port or another: why the others gave its first start up.
fn back_after_crash(port_offset: u16) -> Vec<String> {
    let mut reasons = Vec::new();
    let site = Site::create();
    let nodes = site.cluster(2);
    let crashed = site.start(&site.identity(3), 3, "127.0.0.1:0", Folder::create());
    let key = |node: &Node| (node.id(), node.identity.node_key.public_key());
    let members: BTreeMap<NodeId, PublicKey> = nodes.iter().chain([&crashed]).map(key).collect();
    // Only the others dial: QUIC resets what a server left behind, a client's first connection id has no token for it
    // (RFC 9000 10.3), and then the probe decides after a second.
    for node in &nodes {
        node.transport.set_members(members.clone());
        node.transport.hint(crashed.id(), crashed.address());
        node.wait_up(2);
    }
    let (identity, port) = (crashed.identity.clone(), crashed.address().port());
    let folder = crash(crashed);
    let begun = Instant::now();
    let listen = format!("127.0.0.1:{}", port + port_offset);
    let back = site.start(&identity, 99, &listen, folder);
    back.transport.set_members(members);
    nodes.iter().for_each(|node| back.transport.hint(node.id(), node.address()));
    for node in &nodes {
        until("second start up", || {
            let connections = node.transport.connections();
            connections.get(&NodeId(3)).is_some_and(|state| state.claim.hello.start_id == StartId(99))
        });
        let told = node.wait("second up", |event| match event {
            Event::Down { peer: NodeId(3), reason } => Some(reason),
            Event::Up { claim } if claim.hello.start_id == StartId(99) => Some(String::new()),
            _ => None,
        });
        assert!(!told.is_empty(), "the first start is told to be down before the second is up");
        reasons.push(told);
    }
    println!("a crashed peer was back after {} ms", begun.elapsed().as_millis());
    drop(back.stop());
    nodes.into_iter().for_each(|node| drop(node.stop()));
    reasons
}

#[test]
fn a_crashed_peer_that_comes_back_at_once_resets_its_old_connections() {
    let reasons = back_after_crash(0);
    assert!(reasons.iter().all(|reason| reason == "reset by peer"), "{reasons:?}");
}

#[test]
fn a_crashed_peer_that_comes_back_elsewhere_is_no_clone() {
    assert_eq!(back_after_crash(1).len(), 2);
}

/// A folder that is removed again.
pub struct Folder(PathBuf);

impl Folder {
    pub fn create() -> Folder {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tinydc-transport-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
