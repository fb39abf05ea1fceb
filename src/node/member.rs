//! A member's run: transport, replica, agent, API, in this order; stopped in reverse.

use super::health::HealthWatch;
use super::outgoing::{Carrier, Late, from_bytes};
use super::{Awaiting, Config, Ended, Stop, founding, in_the_way, machine};
use crate::agent::{
    Agent, AgentConfig, Artifacts, Disks, Ground, Secrets, Ways, WaysKeeper, keep_leases, machine_end,
};
use crate::api::wire::{InitReply, JoinDone, TokenRequest};
use crate::api::{
    ApiError, Backend, Connection, Server, answer_code, answer_join, confirm_cluster_key, context_line,
    create_token, keep_certificates, open_sealed, peer,
};
use crate::consensus::{Message, MessageType};
use crate::control::{ControlConfig, Input};
use crate::model::*;
use crate::network::{Network, NetworkConfig};
use crate::replica::{Handle, PeerFrame, Replica, ReplicaConfig, SnapshotHeader};
use crate::runtime::{Runtime, RuntimeConfig};
use crate::state::{Command, State};
use crate::storage::SqliteStore;
use crate::tasks::Launch;
use crate::transport::admission::{AdmissionTable, Known, admit};
use crate::transport::by_code::CodeReply;
use crate::transport::codes::{Grant, Lasting, Shown, make_code};
use crate::transport::door::{CodeAsked, Door};
use crate::transport::hello::{PeerClaim, Refusal, RefusalCode};
use crate::transport::https::HttpsServer;
use crate::transport::identity::Identity;
use crate::transport::local_names::LocalNames;
use crate::transport::peers::{Event, RefusedBy, Transport, TransportConfig};
use crate::transport::sealing::random_bytes;
use anyhow::{Context, Result};
use async_executor::{Executor, Task};
use async_io::Async;
use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::sync::atomic::AtomicU16;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// A removal's last word to the peers may be on its way.
const LEAVE_LIMIT: Duration = Duration::from_secs(60);
/// In which whoever founded the cluster by code must come for its access.
const FOUNDER_LIMIT: Duration = Duration::from_secs(120);
/// Who comes in by the code that the first board shows.
const FIRST_OPERATOR: &str = "operator";
const LEAVE_LOOK: Duration = Duration::from_millis(200);
const GOODBYE_LIMIT: Duration = Duration::from_millis(800);
/// Until every node has heard of it and changed its table.
const DRAIN_PAUSE: Duration = Duration::from_millis(500);

/// What this run has, and what ends it.
struct Run<'a> {
    config: &'a Config,
    executor: &'a Arc<Executor<'static>>,
    identity: Identity,
    node: NodeId,
    start_id: StartId,
    transport: Transport,
    replica: Replica,
    late: Late,
    server: Arc<OnceLock<Server>>,
    tasks: Vec<Task<()>>,
    holdable: Arc<AtomicU16>,
    health: Arc<HealthWatch>,
    ended: async_channel::Receiver<Ended>,
    end: async_channel::Sender<Ended>,
}

pub(crate) async fn run(
    config: &Config,
    executor: &Arc<Executor<'static>>,
    listener: &Arc<Async<UnixListener>>,
    stopping: &async_channel::Receiver<Stop>,
    identity: Identity,
    awaiting: Awaiting,
) -> Result<Ended> {
    let mut run = Run::start(config, executor, identity)?;
    run.admit_founder(&awaiting);
    let ready = futures_lite::future::or(
        async {
            run.await_own_row().await;
            None
        },
        futures_lite::future::or(
            async { Some(Ended::Stopped(stopping.recv().await.unwrap_or(Stop::Daemon))) },
            async { run.ended.recv().await.ok() },
        ),
    )
    .await;
    if let Some(ended) = ready {
        run.stop(None).await;
        return Ok(ended);
    }
    let backend = run.serve(listener).await?;
    run.show_first_code(&awaiting, &backend)?;
    run.tell(awaiting, &backend).await;
    let ended = futures_lite::future::or(
        async { Ended::Stopped(stopping.recv().await.unwrap_or(Stop::Daemon)) },
        async { run.ended.recv().await.unwrap_or(Ended::Stopped(Stop::Daemon)) },
    )
    .await;
    if let Ended::Stopped(stop) = ended {
        if stop == Stop::Machine {
            run.drain().await;
        }
        // Stopped first: a live agent would announce itself anew.
        backend.agent.stop().await;
        run.say_goodbye().await;
        if stop == Stop::Machine {
            let (ground, run_dir, state) = (&backend.ground, config.run_dir(), backend.replica.state());
            machine_end::stop_containers(ground, &run_dir, &state, executor).await;
            // Anew: the minute in which nothing moves is for the start that follows.
            run.say_goodbye().await;
        }
    }
    if matches!(ended, Ended::Removed) {
        backend.agent.stop().await;
        let ground = backend.ground.clone();
        crate::tasks::unblock(move || {
            if let Err(error) = ground.runtime.erase() {
                warn!(%error, "remove containers");
            }
            if let Err(error) = ground.secrets.erase() {
                warn!(%error, "forget secrets");
            }
            if let Err(error) = ground.network.erase() {
                warn!(%error, "take down the network");
            }
        })
        .await;
    }
    run.stop(Some(&backend)).await;
    Ok(ended)
}

impl<'a> Run<'a> {
    fn start(
        config: &'a Config,
        executor: &'a Arc<Executor<'static>>,
        identity: Identity,
    ) -> Result<Run<'a>> {
        let data_dir = config.data_dir();
        let membership = identity.membership.clone().context("this node is no member")?;
        let node = membership.node_id;
        let start_id = StartId(u128::from_le_bytes(random_bytes::<16>()?));
        let late = Late::default();
        let origin = Instant::now();
        let gate = Arc::new(Gate { late: late.clone(), origin, heard: Mutex::default() });
        let transport_config = transport_config(config, executor, &identity, start_id);
        let (transport, events) = Transport::start(transport_config, gate.clone().into_authorise())?;
        // Known before they are hinted at: what a stranger's address is said to be goes unheard.
        let first = founding::first_members(&data_dir);
        if !first.is_empty() {
            transport.set_members(first.iter().map(|(node, known)| (*node, known.public_key)).gather());
        }
        for (member, known) in first {
            known.addresses.into_iter().for_each(|address| transport.hint(member, address));
        }
        let (end, ended) = async_channel::bounded(1);
        let (halt, halted) = async_channel::bounded(1);
        let carrier =
            Carrier { transport: transport.clone(), executor: executor.clone(), late: late.clone(), halt };
        let holdable = Arc::new(AtomicU16::new(0));
        let health = HealthWatch::start(&data_dir);
        let replica = start_replica(config, (node, start_id), carrier, (&holdable, &health))?;
        // Before anyone is greeted: a greeting without the log's end would look like an old backup.
        if let Some(status) = async_io::block_on(replica.handle().status()) {
            transport.set_position(status.term, status.last_index);
        }
        // Set once, here.
        let _ = late.replica.set(replica.handle().clone());
        let server = Arc::new(OnceLock::new());
        let fail = end.clone();
        let watch_halt = executor.launch(async move {
            if let Ok(why) = halted.recv().await {
                let _ = fail.send(Ended::Failed(why)).await;
            }
        });
        let pump = EventPump {
            replica: replica.handle().clone(),
            server: server.clone(),
            executor: executor.clone(),
            end: end.clone(),
            late: late.clone(),
            gate,
            door: transport.door().clone(),
        };
        let members = keep_members(transport.clone(), replica.handle().clone(), data_dir, node);
        let tasks = vec![watch_halt, executor.launch(pump.run(events)), executor.launch(members)];
        Ok(Run {
            config,
            executor,
            identity,
            node,
            start_id,
            transport,
            replica,
            late,
            server,
            tasks,
            holdable,
            health,
            ended,
            end,
        })
    }

    /// Before anybody may ask: a secret that is not known yet would be refused as a wrong one.
    fn admit_founder(&self, awaiting: &Awaiting) {
        if let Awaiting::Founder { person, secret } = awaiting {
            self.transport.door().show(Shown {
                code: secret.clone(),
                grant: Grant::Person { name: person.clone(), is_viewer: false },
                lasting: Lasting::Hidden,
                until: Some(Instant::now() + FOUNDER_LIMIT),
                wrong_tries: 0,
            });
        }
    }

    /// A board that founded its cluster by itself shows how a first laptop gets in, until one has.
    fn show_first_code(&self, awaiting: &Awaiting, backend: &Backend) -> Result<()> {
        let is_first = self.config.bootstrap && self.node == NodeId(1);
        let has_founder = matches!(awaiting, Awaiting::Founder { .. });
        if is_first && !has_founder && self.replica.handle().state().users.rows().next().is_none() {
            let grant = Grant::Person { name: FIRST_OPERATOR.into(), is_viewer: false };
            let code = make_code()?;
            let line = context_line(backend, &code);
            info!(code, "no laptop has access yet; on one: {line}");
            self.transport.door().show(Shown {
                code,
                grant,
                lasting: Lasting::Renewed,
                until: None,
                wrong_tries: 0,
            });
        }
        Ok(())
    }

    /// Until the state here knows this node; a founder first brings the founding into its log.
    async fn await_own_row(&self) {
        let replica = self.replica.handle();
        let data_dir = self.config.data_dir();
        let watch = replica.published().watch();
        loop {
            let state = replica.state();
            if state.nodes.contains(&self.node) {
                if state.cluster().is_some() {
                    founding::forget_founding(&data_dir);
                }
                return;
            }
            if let Some(command) = founding::pending_founding(&data_dir) {
                // Refused until this node leads, which takes a moment.
                let _ = replica.write(None, command).await;
            }
            peer::within(Duration::from_millis(100), watch.changed()).await;
        }
    }

    /// Starts what needs the state: network, runtime, agent, API.
    async fn serve(&mut self, listener: &Arc<Async<UnixListener>>) -> Result<Arc<Backend>> {
        let state = self.replica.handle().state();
        let ground = self.ground(&state)?;
        let agent = Arc::new(Agent::start(AgentConfig {
            node: self.node,
            start_id: self.start_id,
            ground: ground.clone(),
            replica: self.replica.handle().clone(),
            executor: self.executor.clone(),
            size: machine::size(),
            software: env!("CARGO_PKG_VERSION").into(),
            broadcast: broadcast(self.transport.clone()),
            holdable: self.holdable.clone(),
        }));
        let leases = keep_leases(self.node, self.start_id, ground.clone(), self.replica.handle().clone());
        self.tasks.push(self.executor.launch(leases));
        self.tasks.push(self.executor.launch(self.health.clone().run()));
        let in_the_way = in_the_way::watch(self.replica.handle().clone());
        self.tasks.push(self.executor.launch(in_the_way));
        let (leave, leaving) = async_channel::bounded(1);
        let api_listen = self.config.api_listen();
        let backend = Arc::new(Backend {
            node: self.node,
            start_id: self.start_id,
            replica: self.replica.handle().clone(),
            transport: self.transport.clone(),
            agent,
            ground: ground.clone(),
            ways: Arc::new(Ways::new(self.start_id)),
            executor: self.executor.clone(),
            identity: Mutex::new(self.identity.clone()),
            leave,
            api_port: api_listen.port(),
            run_dir: self.config.run_dir(),
        });
        let _ = self.late.backend.set(backend.clone());
        self.tasks.push(self.executor.launch(confirm_cluster_key(backend.clone())));
        self.tasks.push(self.executor.launch(keep_certificates(backend.clone())));
        let server = Server::new(backend.clone());
        let _ = self.server.set(server.clone());
        self.tasks.push(self.executor.launch(accept_local(
            listener.clone(),
            server.clone(),
            self.executor.clone(),
        )));
        let membership = self.identity.membership.clone().context("this node is no member")?;
        let https = HttpsServer::new(&self.identity.node_key, &membership)?;
        let tcp =
            Async::<TcpListener>::bind(api_listen).with_context(|| format!("listen on TCP {api_listen}"))?;
        self.tasks.push(self.executor.launch(accept_tls(tcp, https, server, self.executor.clone())));
        let keeper = WaysKeeper {
            own: self.node,
            ways: backend.ways.clone(),
            network: ground.network.clone(),
            transport: self.transport.clone(),
            replica: self.replica.handle().clone(),
        };
        self.tasks.push(self.executor.launch(keeper.run()));
        self.end_when_removed(leaving);
        info!(node = %self.node, name = state.node_name(self.node), "node serves");
        Ok(backend)
    }

    /// Once the API has taken the wish to leave.
    fn end_when_removed(&mut self, leaving: async_channel::Receiver<()>) {
        let end = self.end.clone();
        let (leaving_replica, own, mut begin) = (self.replica.handle().clone(), self.node, Instant::now());
        self.tasks.push(self.executor.launch(async move {
            if leaving.recv().await.is_ok() {
                // Ended by the peers' word that this node was removed, or by the state saying so. Never by a clock: a
                // node that wiped itself while it still votes would take the quorum with it.
                while leaving_replica.state().nodes.contains(&own) {
                    async_io::Timer::after(LEAVE_LOOK).await;
                    if begin.elapsed() > LEAVE_LIMIT {
                        begin = Instant::now();
                        warn!("this node is still a member: the others can't take over its part yet");
                    }
                }
                let _ = end.send(Ended::Removed).await;
            }
        }));
    }

    fn ground(&self, state: &State) -> Result<Ground> {
        let data_dir = self.config.data_dir();
        let membership = self.identity.membership.as_ref().context("this node is no member")?;
        let row = state.nodes.find(&self.node).context("the state does not know this node")?;
        let cluster = state.cluster().context("the cluster is not founded")?;
        let tag = format!("{:08x}", membership.store_id.0 as u32);
        let runtime = Arc::new(Runtime::open(RuntimeConfig {
            node_tag: tag,
            data_dir: data_dir.clone(),
            run_dir: self.config.run_dir(),
            program: None,
        })?);
        // A machine without the memory controller runs containers uncapped.
        if let Err(error) = runtime.set_total_memory_max(Some(machine::size().memory_bytes)) {
            warn!(%error, "containers together have no memory limit");
        }
        let network = Arc::new(Network::open(NetworkConfig {
            container_range: cluster.container_range,
            number: row.number,
            vip_range: cluster.vip_range,
            ula_prefix: UlaPrefix::of(cluster.id),
            own_ports: BTreeSet::from([self.config.listen().port(), self.config.api_listen().port()]),
            run_dir: self.config.run_dir(),
        })?);
        let (transport, executor) = (self.transport.clone(), self.executor.clone());
        let peers = Box::new(move |node: NodeId, digest: &Digest| {
            let reader = peer::open_blob(&transport, &executor, node, digest)?;
            Ok(reader)
        });
        let artifacts = Arc::new(Artifacts::new(self.node, runtime.clone(), data_dir.clone(), peers));
        let backend = self.late.backend.clone();
        let open = Box::new(move |sealed: &_| open_sealed(backend.get(), sealed));
        let secrets = Arc::new(Secrets::new(self.node, &self.config.run_dir(), open));
        let disks = Arc::new(Disks::new(self.config.disks.clone()));
        Ok(Ground { runtime, network, artifacts, data_dir, lease: Arc::default(), secrets, disks })
    }

    /// Answers whoever asked for `init` or `join`.
    async fn tell(&self, awaiting: Awaiting, backend: &Arc<Backend>) {
        let state = self.replica.handle().state();
        let cluster = state.cluster().map(|cluster| cluster.name.clone()).unwrap_or_default();
        let node = state.node_name(self.node);
        // Whoever asked may have gone.
        match awaiting {
            Awaiting::Nobody | Awaiting::Founder { .. } => {}
            Awaiting::Join { reply } => {
                let _ = reply.send(Ok(JoinDone { cluster, node, node_id: self.node.to_string() })).await;
            }
            Awaiting::Init { reply, recovery_key } => {
                let token = create_token(backend, TokenRequest::default(), None).await;
                let answer = token.map(|token| InitReply {
                    cluster,
                    node,
                    join_line: token.line,
                    recovery_key,
                    token_expires_at: token.expires_at,
                });
                let _ = reply.send(answer).await;
            }
        }
    }

    /// New connections go to other nodes before the containers here are stopped.
    async fn drain(&self) {
        let command = Command::NodeEnding { node: self.node, start_id: self.start_id };
        let Some(backend) = self.late.backend.get() else { return };
        let told = peer::within(GOODBYE_LIMIT, backend.submit(None, command)).await;
        // One that takes long may be noted all the same; without a leader nobody hears of it.
        if !matches!(told, Some(Err(_))) {
            async_io::Timer::after(DRAIN_PAUSE).await;
        }
    }

    /// Tells the cluster of a clean stop: nothing moves for a minute.
    async fn say_goodbye(&self) {
        let command = Command::NodeStopping { node: self.node, start_id: self.start_id };
        if let Some(backend) = self.late.backend.get() {
            // Without a leader nobody could note it.
            let _: Option<Result<_, ApiError>> =
                peer::within(GOODBYE_LIMIT, backend.submit(None, command)).await;
        }
    }

    async fn stop(self, backend: Option<&Arc<Backend>>) {
        if let Some(backend) = backend {
            backend.agent.stop().await;
        }
        self.transport.shutdown().await;
        for task in self.tasks {
            task.cancel().await;
        }
        let (replica, health) = (self.replica, self.health);
        crate::tasks::unblock(move || {
            health.keep();
            replica.stop();
        })
        .await;
    }
}

/// Both ways: a datagram overtakes what waits in a stream, and the stream repeats what is lost.
fn broadcast(transport: Transport) -> crate::agent::Broadcast {
    const DATAGRAM_BYTES_MAX: usize = 1000;
    Arc::new(move |frame: Vec<u8>| {
        if frame.len() <= DATAGRAM_BYTES_MAX {
            transport.broadcast_datagram(&frame);
        }
        for peer in transport.connections().into_keys() {
            transport.frame(peer, frame.clone());
        }
    })
}

fn transport_config(
    config: &Config,
    executor: &Arc<Executor<'static>>,
    identity: &Identity,
    start_id: StartId,
) -> TransportConfig {
    TransportConfig {
        executor: executor.clone(),
        listen: config.listen(),
        data_dir: config.data_dir(),
        identity: identity.clone(),
        feature_level: founding::FEATURE_LEVEL,
        start_id,
        fingerprint: machine::fingerprint(),
        peer_names: config.peers.clone(),
        announce_port: None,
        operators: config.operators.clone(),
        bulk_bytes_max: 2 * limits::STATE_BYTES_MAX,
    }
}

fn start_replica(
    node_config: &Config,
    (node, start_id): (NodeId, StartId),
    carrier: Carrier,
    (holdable, health): (&Arc<AtomicU16>, &Arc<HealthWatch>),
) -> Result<Replica> {
    let data_dir = node_config.data_dir();
    let store = SqliteStore::open(&data_dir)?;
    let is_founding = founding::pending_founding(&data_dir).is_some();
    let disks = Disks::new(node_config.disks.clone());
    let gauge = machine::Gauge::new(data_dir, holdable.clone(), health.clone(), disks);
    let config = ReplicaConfig {
        control: ControlConfig { node, start_id, seed: start_id.0 as u64 },
        figures: Box::new(move || gauge.read()),
        wall: Box::new(move || machine::believable_wall(is_founding)),
        outgoing: Box::new(move |outgoing| carrier.carry(outgoing)),
    };
    Ok(Replica::start(config, store)?)
}

/// The state's word on who may be a peer.
struct Gate {
    late: Late,
    origin: Instant,
    /// What a table of the state can't know: last live start and fingerprint of each peer.
    heard: Mutex<BTreeMap<NodeId, (StartId, u64, u64, u64)>>,
}

impl Gate {
    fn into_authorise(self: Arc<Self>) -> crate::transport::peers::Authorise {
        Arc::new(move |claim: &PeerClaim| self.judge(claim))
    }

    fn judge(&self, claim: &PeerClaim) -> Result<(), Refusal> {
        let busy = || Refusal::new(RefusalCode::Busy, "this node is starting");
        let replica = self.late.replica.get().ok_or_else(busy)?;
        let state = replica.state();
        let now_ms = self.origin.elapsed().as_millis() as u64;
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let members = state
            .nodes
            .rows()
            .map(|node| {
                let last = heard.get(&node.id);
                // A run that was heard before has what it had: what it says of its log may be a moment old.
                let is_same_run = last.is_some_and(|last| last.0 == claim.hello.start_id);
                let known = Known {
                    public_key: node.public_key,
                    store_id: node.store_id,
                    fingerprint: last.map(|last| last.2),
                    acknowledged_index: last.filter(|_| !is_same_run).map_or(0, |last| last.3),
                    last_live: last.map(|last| (last.0, last.1)),
                };
                (node.id, known)
            })
            .gather();
        let removed: BTreeSet<PublicKey> = state.removed_keys.iter().map(|(key, _)| *key).gather();
        let feature_level = state.cluster().map_or(0, |cluster| cluster.feature_level);
        admit(&AdmissionTable { feature_level, members, removed }, claim, now_ms)?;
        let hello = &claim.hello;
        // The end of the log that it greets with counts for nothing yet: its last entries may not be committed.
        let index = heard.get(&hello.node_id).map_or(0, |last| last.3);
        heard.insert(hello.node_id, (hello.start_id, now_ms, hello.fingerprint, index));
        Ok(())
    }
}

impl Gate {
    /// Remembers how far a peer's log reaches by its own word, so that an older copy of it is known as such.
    fn note_acknowledged(&self, peer: NodeId, message: &Message) {
        let Some(index) = kept_for_good(message) else { return };
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = heard.get_mut(&peer) {
            last.3 = last.3.max(index);
        }
    }
}

/// Up to where the sender's log is on its disk and committed: what is not may still be cut off by a new leader, and a
/// log that is shorter afterwards is no old backup.
fn kept_for_good(message: &Message) -> Option<u64> {
    let is_acknowledgement = message.msg_type == MessageType::MsgAppendResponse && !message.reject;
    is_acknowledgement.then(|| message.index.min(message.commit))
}

/// Takes what comes from peers, in order, to where it belongs.
struct EventPump {
    replica: Handle,
    server: Arc<OnceLock<Server>>,
    executor: Arc<Executor<'static>>,
    end: async_channel::Sender<Ended>,
    late: Late,
    gate: Arc<Gate>,
    door: Arc<Door>,
}

impl EventPump {
    async fn run(self, events: async_channel::Receiver<Event>) {
        while let Ok(event) = events.recv().await {
            self.take(event).await;
        }
    }

    async fn take(&self, event: Event) {
        match event {
            Event::Frame { from, frame } | Event::Datagram { from, datagram: frame } => {
                match PeerFrame::decode(&frame) {
                    Ok(PeerFrame::Raft(message)) => {
                        self.gate.note_acknowledged(from, &message);
                        self.replica.input_or_drop(Input::Message { from, message })
                    }
                    Ok(PeerFrame::Alive(alive)) => {
                        if let Some(backend) = self.late.backend.get() {
                            backend.agent.hear_alive(from, alive.figures.holdable);
                        }
                        self.replica.input_or_drop(Input::Alive { from, alive })
                    }
                    Ok(PeerFrame::Endpoints(hint)) => {
                        if let Some(backend) = self.late.backend.get() {
                            backend.agent.hear_hint(from, hint);
                        }
                    }
                    Ok(PeerFrame::Ways(frame)) => {
                        if let Some(backend) = self.late.backend.get() {
                            backend.ways.hear(from, frame);
                        }
                    }
                    Ok(PeerFrame::Forward(command)) => {
                        self.replica.input_or_drop(Input::Forwarded { from, command: Box::new(command) });
                    }
                    Err(error) => warn!(%from, %error, "a frame that is none"),
                }
            }
            Event::Bulk { from, header, body } => {
                match (SnapshotHeader::decode(&header), from_bytes(&body)) {
                    (Ok(header), Some(frames)) if header.message.from == from.0 => {
                        info!(%from, bytes = body.len(), "snapshot received");
                        self.replica.input(Input::SnapshotStaged { message: header.message, frames }).await;
                    }
                    _ => warn!(%from, "a snapshot that is none"),
                }
            }
            Event::Stream { from, stream } => {
                // Before this node serves, a peer gets nothing and asks again.
                if let Some(server) = self.server.get().cloned() {
                    self.executor
                        .launch(async move { server.serve(stream, Connection::Peer(from)).await })
                        .detach();
                }
            }
            Event::Join(asked) => {
                if let Some(backend) = self.late.backend.get().cloned() {
                    self.executor.launch(answer_join(backend, asked)).detach();
                }
            }
            Event::Code(asked) => self.take_code(asked),
            Event::Up { claim } => {
                let hello = &claim.hello;
                self.replica.input_or_drop(Input::Greeted { peer: hello.node_id, start_id: hello.start_id });
            }
            Event::Down { peer, .. } => self.replica.input_or_drop(Input::Unreachable { peer }),
            Event::Refused { address, node, refusal, by } => {
                warn!(%address, ?node, ?by, reason = %refusal, "connection refused");
                if by == RefusedBy::Peer && refusal.code == RefusalCode::Removed {
                    let _ = self.end.try_send(Ended::Removed);
                }
            }
        }
    }
}

impl EventPump {
    fn take_code(&self, asked: CodeAsked) {
        match self.late.backend.get().cloned() {
            Some(backend) => self.executor.launch(answer_code(backend, asked)).detach(),
            None => {
                // Before this node serves its code must not be used up: the asker comes again.
                if let Some(tried) = asked.tried {
                    self.door.show_again(tried);
                }
                let sentence = "this node is starting; try again in a few seconds".into();
                // It may have gone.
                let _ = asked.reply.try_send(CodeReply::Refused { sentence, hint: String::new() });
            }
        }
    }
}

/// Keeps the transport's table of members as the state has it, and tells it when this node is lonely.
async fn keep_members(transport: Transport, replica: Handle, data_dir: std::path::PathBuf, own: NodeId) {
    let watch = replica.published().watch();
    let mut has_forgotten = false;
    let first: BTreeMap<NodeId, PublicKey> = founding::first_members(&data_dir)
        .into_iter()
        .map(|(node, member)| (node, member.public_key))
        .gather();
    let mut told = None;
    loop {
        let state = replica.state();
        let members: BTreeMap<NodeId, PublicKey> = match state.cluster() {
            // A fresh member's state is empty until its first snapshot.
            None => first.clone(),
            Some(_) => state.nodes.rows().map(|node| (node.id, node.public_key)).gather(),
        };
        if told.as_ref() != Some(&members) && !members.is_empty() {
            transport.set_members(members.clone());
            told = Some(members.clone());
        }
        if state.nodes.contains(&own) && !has_forgotten {
            founding::forget_first_members(&data_dir);
            has_forgotten = true;
        }
        transport.set_local_names(LocalNames {
            node: state.nodes.find(&own).map(|node| node.name.clone()).unwrap_or_default(),
            cluster: state.cluster().map(|cluster| cluster.name.to_string()).unwrap_or_default(),
        });
        let connected = transport.connections().len() + 1;
        transport.set_lonely(members.len() > 1 && connected * 2 <= members.len());
        if let Some(status) = replica.status().await {
            transport.set_position(status.term, status.last_index);
        }
        peer::within(Duration::from_secs(1), watch.changed()).await;
        // Changes come in bursts.
        async_io::Timer::after(Duration::from_millis(20)).await;
    }
}

async fn accept_local(listener: Arc<Async<UnixListener>>, server: Server, executor: Arc<Executor<'static>>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let server = server.clone();
                executor.launch(async move { server.serve(stream, Connection::Local).await }).detach();
            }
            Err(error) => {
                warn!(%error, "accept on the local socket");
                async_io::Timer::after(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn accept_tls(
    listener: Async<TcpListener>,
    https: HttpsServer,
    server: Server,
    executor: Arc<Executor<'static>>,
) {
    loop {
        match listener.accept().await {
            Ok((stream, address)) => {
                let (server, https) = (server.clone(), https.clone());
                executor
                    .launch(async move {
                        match https.accept(stream).await {
                            Ok((stream, peer)) => server.serve(stream, Connection::Tls(peer)).await,
                            Err(error) => tracing::debug!(%address, %error, "handshake"),
                        }
                    })
                    .detach();
            }
            // Out of descriptors, most likely: those that serve must end first.
            Err(error) => {
                warn!(%error, "accept on TCP");
                async_io::Timer::after(Duration::from_millis(100)).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_that_may_be_cut_off_is_not_held_against_a_node() {
        let said = |msg_type, index, commit, reject| {
            kept_for_good(&Message { msg_type, index, commit, reject, ..Message::default() })
        };
        assert_eq!(said(MessageType::MsgAppendResponse, 9, 7, false), Some(7));
        assert_eq!(said(MessageType::MsgAppendResponse, 9, 12, false), Some(9));
        assert_eq!(said(MessageType::MsgAppendResponse, 9, 9, true), None);
        assert_eq!(said(MessageType::MsgHeartbeatResponse, 9, 9, false), None);
    }
}
