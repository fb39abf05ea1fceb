//! The agent's task: one loop that owns what is known of the containers here.

use super::addresses::{HeldAddresses, HeldCell, Keeper};
use super::artifacts::is_keeper;
use super::disk;
use super::ends::{exit_of, image_stop_signal, memory_limit, policy_of, spec_of, stop_of};
use super::health;
use super::hints::Hints;
use super::launch::{Ground, container_id, instance_of};
use super::mesh::{Broadcast, Mesh, NetworkView, ViewCell};
use super::reconcile::{Action, Local, Presence, Situation, finding, reconcile};
use super::report::Reporter;
use crate::control::Input;
use crate::model::*;
use crate::replica::{EndpointHint, Handle};
use crate::runtime::{ContainerEnd, ContainerState, KeepLogs};
use crate::state::{Command, State};
use crate::tasks::{Launch, unblock};
use crate::verdict::Verdict;
use async_executor::{Executor, Task};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::AtomicU16;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

const SIGNALS_MAX: usize = 1024;
/// Without a leader for this long after its start a node runs what its own copy says.
const ALONE_AFTER_MS: u64 = 60_000;
/// How often the loop looks by itself: backoffs, steady minutes, sweeps.
const LOOK_EVERY: Duration = Duration::from_millis(1000);
/// One deletion at a time; one that failed is tried again after this.
const DELETE_AGAIN_MS: u64 = 10_000;
/// From the decision to stop an instance until every node knows.
const DRAIN: Duration = Duration::from_millis(150);
const SWEEP_EVERY_MS: u64 = 600_000;
/// Measuring reads every file's size in each writable layer.
const MEASURE_EVERY_MS: u64 = 5_000;

/// What happened to a container here.
#[derive(Debug)]
pub enum Signal {
    Launched {
        instance: InstanceId,
        error: Option<String>,
    },
    Stopped {
        instance: InstanceId,
        error: Option<String>,
    },
    Removed {
        instance: InstanceId,
        error: Option<String>,
    },
    Ended {
        instance: InstanceId,
        end: ContainerEnd,
    },
    Verdict {
        instance: InstanceId,
        verdict: Verdict,
    },
    Progress {
        instance: InstanceId,
        text: String,
    },
    /// It is being stopped because it fills the disk.
    OverQuota {
        instance: InstanceId,
        why: String,
    },
    /// An artifact was brought here, or could not be.
    Kept {
        artifact: Box<Artifact>,
        is_here: bool,
    },
    VolumesDeleted {
        volumes: Vec<(AppName, String)>,
    },
    /// A leader has confirmed the state of this node.
    CaughtUp,
}

pub struct AgentConfig {
    pub node: NodeId,
    pub start_id: StartId,
    pub ground: Ground,
    pub replica: Handle,
    pub executor: Arc<Executor<'static>>,
    pub size: NodeSize,
    pub software: String,
    /// Brings a frame to every peer.
    pub broadcast: Broadcast,
    /// Tells liveness which floating addresses this node could hold.
    pub holdable: Arc<AtomicU16>,
}

/// What `ps` shows of an instance beyond the state; asked live, never logged.
#[derive(Clone, Debug, Default)]
pub struct LiveInstance {
    pub last_exit: Option<String>,
    pub restarts: u32,
    pub progress: Option<String>,
    pub is_running: bool,
    pub pid: Option<i32>,
    pub memory_bytes: Option<u64>,
}

/// A way to the agent's task.
pub struct Agent {
    shared: Arc<Shared>,
    task: Mutex<Option<Task<()>>>,
    stop: async_channel::Sender<()>,
}

pub(super) struct Shared {
    pub(super) ground: Ground,
    locals: Mutex<BTreeMap<InstanceId, Local>>,
    origin: Instant,
    pub(super) hints: Hints,
    pub(super) network_view: ViewCell,
    pub(super) held: HeldCell,
}

impl Shared {
    fn now(&self) -> Mono {
        Mono(self.origin.elapsed().as_millis() as u64 + 3_600_000)
    }

    pub(super) fn locals(&self) -> std::sync::MutexGuard<'_, BTreeMap<InstanceId, Local>> {
        self.locals.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    pub fn start(config: AgentConfig) -> Agent {
        let shared = Arc::new(Shared {
            ground: config.ground.clone(),
            locals: Mutex::default(),
            origin: Instant::now(),
            hints: Hints::default(),
            network_view: ViewCell::default(),
            held: HeldCell::default(),
        });
        let (stop, stopped) = async_channel::bounded(1);
        let (sender, signals) = async_channel::bounded(SIGNALS_MAX);
        let executor = config.executor.clone();
        let worker = Worker {
            reporter: Reporter::new(config.start_id),
            shared: shared.clone(),
            sender,
            signals,
            tasks: BTreeMap::new(),
            probes: BTreeMap::new(),
            image_checks: BTreeMap::new(),
            keeping: BTreeSet::new(),
            errands: Vec::new(),
            is_caught_up: false,
            announced_at: None,
            swept_at: None,
            measured_at: None,
            deleting_since: None,
            config,
        };
        let task = executor.launch(async move {
            let run = worker.run();
            futures_lite::future::or(run, async {
                // Nothing is ever sent: this returns when the agent is stopped.
                let _ = stopped.recv().await;
            })
            .await;
        });
        Agent { shared, task: Mutex::new(Some(task)), stop }
    }

    /// Ends the agent; containers run on.
    pub async fn stop(&self) {
        self.stop.close();
        let task = self.task.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(task) = task {
            task.await;
        }
    }

    /// A peer's daemon lives.
    pub fn hear_alive(&self, from: NodeId, holdable: u16) {
        self.shared.hints.hear_alive(from, holdable, Instant::now());
    }

    /// A peer says which of its instances don't serve.
    pub fn hear_hint(&self, from: NodeId, hint: EndpointHint) {
        self.shared.hints.hear(from, hint, Instant::now());
    }

    /// Whether this node's ingress answers an authority for this token.
    pub fn answers_challenge(&self, token: &str) -> bool {
        self.shared.network_view().challenges.contains(token)
    }

    /// The network of this node as it was last made.
    pub fn network_view(&self) -> NetworkView {
        self.shared.network_view()
    }

    /// What this node's own name server says of a name.
    pub async fn resolve(&self, name: &str) -> std::io::Result<Option<std::net::Ipv4Addr>> {
        let server = (self.shared.ground.network.bridge_address(), 53).into();
        crate::network::lookup::address_of(server, name).await
    }

    /// The floating addresses on this node.
    pub fn held_addresses(&self) -> HeldAddresses {
        self.shared.held_addresses()
    }

    /// Live facts of the instances here. Blocks for reading a few files per instance.
    pub fn live(&self) -> BTreeMap<InstanceId, LiveInstance> {
        let locals = self.shared.locals().clone();
        let now = self.shared.now();
        let runtime = &self.shared.ground.runtime;
        locals
            .iter()
            .map(|(id, local)| {
                let container = container_id(*id);
                let pid = match runtime.state(&container) {
                    ContainerState::Running { main, .. } => Some(main.pid),
                    _ => None,
                };
                let live = LiveInstance {
                    last_exit: local.restarts.describe(now),
                    restarts: local.restarts.count,
                    progress: local.progress.clone(),
                    is_running: local.presence == Presence::Running,
                    pid,
                    memory_bytes: runtime.stats(&container).map(|usage| usage.memory_bytes),
                };
                (*id, live)
            })
            .gather()
    }
}

struct Worker {
    config: AgentConfig,
    shared: Arc<Shared>,
    reporter: Reporter,
    sender: async_channel::Sender<Signal>,
    signals: async_channel::Receiver<Signal>,
    /// Waits for a container's end, or the work under way.
    tasks: BTreeMap<InstanceId, Task<()>>,
    probes: BTreeMap<InstanceId, Task<()>>,
    /// HEALTHCHECKs of the images of what runs here, read once per container.
    image_checks: BTreeMap<InstanceId, Option<HealthSpec>>,
    keeping: BTreeSet<Digest>,
    errands: Vec<Task<()>>,
    is_caught_up: bool,
    announced_at: Option<Mono>,
    swept_at: Option<Mono>,
    measured_at: Option<Mono>,
    deleting_since: Option<Mono>,
}

impl Worker {
    async fn run(mut self) {
        self.adopt().await;
        let mesh = Mesh {
            node: self.config.node,
            start_id: self.config.start_id,
            replica: self.config.replica.clone(),
            shared: self.shared.clone(),
            broadcast: self.config.broadcast.clone(),
            executor: self.config.executor.clone(),
        };
        let keeper = Keeper {
            node: self.config.node,
            replica: self.config.replica.clone(),
            shared: self.shared.clone(),
            holdable: self.config.holdable.clone(),
        };
        let _keeper = self.config.executor.launch(keeper.run());
        // Both end with this loop.
        let _mesh = self.config.executor.launch(mesh.run());
        let watch = self.config.replica.published().watch();
        self.ask_whether_caught_up();
        loop {
            let state = self.config.replica.state();
            self.look(&state).await;
            let pause = match self.reporter.next_in_ms(self.shared.now()) {
                Some(ms) => Duration::from_millis(ms).min(LOOK_EVERY),
                None => LOOK_EVERY,
            };
            let signal = futures_lite::future::or(
                async { self.signals.recv().await.ok() },
                futures_lite::future::or(
                    async {
                        watch.changed().await;
                        None
                    },
                    async {
                        async_io::Timer::after(pause).await;
                        None
                    },
                ),
            )
            .await;
            if let Some(signal) = signal {
                self.take(signal, &state);
            }
            while let Ok(signal) = self.signals.try_recv() {
                self.take(signal, &state);
            }
            self.shared.hints.wake();
        }
    }

    /// Finds what an earlier run of the daemon left running.
    async fn adopt(&mut self) {
        let runtime = self.shared.ground.runtime.clone();
        let network = self.shared.ground.network.clone();
        let found = unblock(move || {
            let found = runtime.adopt();
            if let Ok(found) = &found {
                let keep = found.iter().map(|status| status.id.as_str().to_string()).gather();
                if let Err(error) = network.sweep(&keep) {
                    warn!(error = chain(&error), "sweep of namespaces that an earlier run left");
                }
            }
            if let Err(error) = runtime.sweep() {
                warn!(%error, "sweep of what an earlier run left");
            }
            found
        })
        .await;
        let found = found.unwrap_or_else(|error| {
            warn!(%error, "look for containers of an earlier run");
            Vec::new()
        });
        for status in found {
            let Some(id) = instance_of(&status.id) else { continue };
            let is_running = matches!(status.state, ContainerState::Running { .. });
            let presence = if is_running { Presence::Running } else { Presence::Stopped };
            let mut local = Local { presence, ..Local::default() };
            if is_running {
                info!(instance = %id, "container found running");
                local.restarts.started(self.shared.now());
                self.await_end(id);
            }
            self.shared.locals().insert(id, local);
        }
    }

    /// A linearizable read tells that this node's state is as new as the cluster's.
    fn ask_whether_caught_up(&mut self) {
        let (replica, sender) = (self.config.replica.clone(), self.sender.clone());
        self.errands.push(self.config.executor.launch(async move {
            while replica.read().await.is_err() {
                async_io::Timer::after(Duration::from_millis(200)).await;
            }
            let _ = sender.send(Signal::CaughtUp).await;
        }));
    }

    async fn look(&mut self, state: &Arc<State>) {
        let now = self.shared.now();
        self.announce(state, now);
        let is_alone = !self.is_caught_up && now.since_ms(Mono(3_600_000)) >= ALONE_AFTER_MS;
        let situation = Situation {
            state,
            node: self.config.node,
            may_start: self.is_caught_up || is_alone,
            has_lease: self.shared.ground.lease.for_start().is_some(),
            now,
        };
        self.judge_disks(state);
        let actions = {
            let mut locals = self.shared.locals();
            locals.values_mut().for_each(|local| local.restarts.settle(now));
            locals.retain(|id, local| {
                let is_known = state.instances.find(id).is_some_and(|row| row.node == Some(situation.node));
                is_known || local.is_busy || local.presence != Presence::Absent
            });
            reconcile(&situation, &locals)
        };
        for (id, action) in actions {
            self.begin(id, action, state);
        }
        self.watch_health(state);
        if situation.may_start {
            self.keep_artifacts(state);
            self.watch_disk(state, now);
        }
        // What an old state doesn't name may be what was loaded last.
        if self.is_caught_up {
            self.delete_volumes(state);
            self.sweep(now);
        }
        self.send_reports(state, now).await;
        self.errands.retain(|task| !task.is_finished());
    }

    /// What binds a disk that is not there must not run, and what holds on to one that was pulled must start anew.
    fn judge_disks(&mut self, state: &State) {
        let disks = &self.shared.ground.disks;
        let absent = disks.absent();
        let name = state.node_name(self.config.node);
        for instance in state.instances_on(self.config.node) {
            let Some(spec) = spec_of(state, instance.id).filter(|spec| disks.is_bound_by(spec)) else {
                continue;
            };
            let lack = disks.lack(spec, absent, &name);
            let pulled = match self.shared.ground.runtime.state(&container_id(instance.id)) {
                ContainerState::Running { main, .. } if lack.is_none() => disks.holds_gone(spec, main.pid),
                _ => None,
            };
            let mut locals = self.shared.locals();
            let local = locals.entry(instance.id).or_default();
            if let Some(why) = lack.as_ref().filter(|_| local.lacks_disk.is_none()) {
                warn!(instance = %instance.id, why, "a container's disk is absent");
            }
            local.lacks_disk = lack;
            // One that is being stopped for it keeps its reason until it has.
            if !local.is_busy {
                pulled.iter().for_each(|why| warn!(instance = %instance.id, why, "a disk was pulled"));
                local.holds_pulled = pulled;
            }
        }
    }

    /// Tells the cluster of this run of the daemon, and then of its disks, until the state shows it.
    fn announce(&mut self, state: &State, now: Mono) {
        let Some(row) = state.nodes.find(&self.config.node) else { return };
        let (node, start_id) = (self.config.node, self.config.start_id);
        let disks = self.shared.ground.disks.named();
        let is_started = row.start_id == Some(start_id) && row.stopped_at.is_none();
        let knows_disks = row.disks == disks && (disks.is_empty() || row.disks_told_by == Some(start_id));
        let is_due = self.announced_at.is_none_or(|at| now.since_ms(at) >= 300);
        if !(is_started && knows_disks) && is_due {
            self.announced_at = Some(now);
            let command = match is_started {
                true => Command::NoteDisks { node, start_id, disks: disks.to_vec() },
                false => Command::NodeStarted {
                    node,
                    start_id,
                    architecture: Architecture::own(),
                    size: self.config.size,
                    software: self.config.software.clone(),
                },
            };
            self.config.replica.input_or_drop(Input::Report { command: Box::new(command) });
        }
    }

    fn begin(&mut self, id: InstanceId, action: Action, state: &Arc<State>) {
        self.shared.locals().entry(id).or_default().is_busy = true;
        let ground = self.shared.ground.clone();
        let sender = self.sender.clone();
        let state = state.clone();
        self.probes.remove(&id);
        let task = match action {
            Action::Launch => self.config.executor.launch(async move {
                let progress = sender.clone();
                let outcome = unblock(move || {
                    ground.launch(&state, id, &mut |text| {
                        // Progress is for the eye: one that finds no room is not missed.
                        let _ = progress.try_send(Signal::Progress { instance: id, text });
                    })
                })
                .await;
                let error = outcome.err().map(|error| chain(&error));
                let _ = sender.send(Signal::Launched { instance: id, error }).await;
            }),
            Action::Stop => {
                let (signal, grace) = stop_of(&state, id);
                self.config.executor.launch(async move {
                    // The other nodes stop sending new connections here first.
                    async_io::Timer::after(DRAIN).await;
                    let runtime = ground.runtime.clone();
                    let outcome = unblock(move || {
                        let number = signal.unwrap_or_else(|| image_stop_signal(&runtime, id));
                        runtime.stop(&container_id(id), number, grace)
                    })
                    .await;
                    let error = outcome.err().map(|error| chain(&error));
                    let _ = sender.send(Signal::Stopped { instance: id, error }).await;
                })
            }
            Action::Remove => self.config.executor.launch(async move {
                let outcome = unblock(move || {
                    let container = container_id(id);
                    if let Err(error) = ground.network.detach(container.as_str()) {
                        warn!(instance = %id, %error, "take down the network of a container");
                    }
                    ground.forget_copies(&container);
                    ground.runtime.remove(&container, KeepLogs::Yes)?;
                    ground.prune_logs()
                })
                .await;
                let error = outcome.err().map(|error| chain(&error));
                let _ = sender.send(Signal::Removed { instance: id, error }).await;
            }),
        };
        self.tasks.insert(id, task);
    }

    fn await_end(&mut self, id: InstanceId) {
        let runtime = self.shared.ground.runtime.clone();
        let sender = self.sender.clone();
        let task = self.config.executor.launch(async move {
            let watch = match runtime.watch(&container_id(id)) {
                Ok(watch) => watch,
                Err(error) => {
                    warn!(instance = %id, %error, "watch a container");
                    let _ = sender.send(Signal::Ended { instance: id, end: ContainerEnd::Lost }).await;
                    return;
                }
            };
            let end = watch.wait().await.unwrap_or(ContainerEnd::Lost);
            let _ = sender.send(Signal::Ended { instance: id, end }).await;
        });
        self.tasks.insert(id, task);
    }

    fn take(&mut self, signal: Signal, state: &State) {
        let now = self.shared.now();
        match signal {
            Signal::CaughtUp => self.is_caught_up = true,
            Signal::Progress { instance, text } => {
                if let Some(local) = self.shared.locals().get_mut(&instance) {
                    local.progress = Some(text);
                }
            }
            Signal::Launched { instance, error } => self.launched(instance, error, now),
            Signal::Stopped { instance, error } => {
                self.done(instance, error, "stop a container", |local| local.stopped(now));
            }
            Signal::Removed { instance, error } => {
                self.done(instance, error, "remove a container", |local| local.presence = Presence::Absent);
            }
            Signal::Ended { instance, end } => self.ended(instance, end, state, now),
            Signal::Verdict { instance, verdict } => {
                if let Some(local) = self.shared.locals().get_mut(&instance) {
                    info!(%instance, ?verdict, "health changed");
                    local.verdict = Some(verdict);
                    local.verdict_since = now;
                    local.is_untested = false;
                }
            }
            Signal::OverQuota { instance, why } => {
                if let Some(local) = self.shared.locals().get_mut(&instance) {
                    local.stopped_because = Some(why);
                }
            }
            Signal::Kept { artifact, is_here } => {
                self.keeping.remove(&artifact.digest);
                // Another part may have been loaded since: then this is not all of it.
                let now = self.config.replica.state().artifacts.find(&artifact.digest).cloned();
                if is_here && now.is_some_and(|now| now.platforms == artifact.platforms) {
                    self.reporter.holds.insert(artifact.digest);
                }
            }
            Signal::VolumesDeleted { volumes } => {
                if !volumes.is_empty() {
                    self.deleting_since = None;
                }
                self.reporter.volumes_deleted.extend(volumes);
            }
        }
    }

    fn launched(&mut self, id: InstanceId, error: Option<String>, now: Mono) {
        let is_running = error.is_none();
        {
            let mut locals = self.shared.locals();
            let Some(local) = locals.get_mut(&id) else { return };
            local.is_busy = false;
            local.progress = None;
            local.verdict = None;
            match error {
                None => {
                    info!(instance = %id, "container runs");
                    local.presence = Presence::Running;
                    local.is_untested = true;
                    local.restarts.started(now);
                }
                Some(why) => {
                    warn!(instance = %id, error = why, "container not started");
                    let is_made = self.shared.ground.runtime.spec(&container_id(id)).is_ok();
                    local.presence = if is_made { Presence::Stopped } else { Presence::Absent };
                    // What never started is tried again under any policy: an image may be on its way.
                    local.restarts.not_started(why, now);
                }
            }
        }
        if is_running {
            self.await_end(id);
        }
    }

    fn ended(&mut self, id: InstanceId, end: ContainerEnd, state: &State, now: Mono) {
        let limit_bytes = memory_limit(state, id);
        let exit = exit_of(end, limit_bytes);
        self.probes.remove(&id);
        let mut locals = self.shared.locals();
        let Some(local) = locals.get_mut(&id) else { return };
        if local.is_busy {
            // It is being stopped: that work says how it went.
            return;
        }
        info!(instance = %id, %exit, "container ended");
        local.presence = Presence::Stopped;
        local.verdict = None;
        // One that dies of its disk's end has not failed.
        let lack = || {
            let disks = &self.shared.ground.disks;
            disks.lack(spec_of(state, id)?, disks.absent(), &state.node_name(self.config.node))
        };
        match local.stopped_because.take().or_else(lack) {
            Some(why) => local.restarts.not_started(why, now),
            None => local.restarts.exited(exit, policy_of(state, id), now),
        }
    }

    fn done(&mut self, id: InstanceId, error: Option<String>, what: &str, change: impl FnOnce(&mut Local)) {
        let now = self.shared.now();
        let mut locals = self.shared.locals();
        let Some(local) = locals.get_mut(&id) else { return };
        local.is_busy = false;
        match error {
            None => {
                local.failures = 0;
                change(local);
            }
            Some(why) => {
                warn!(instance = %id, error = why, "{what}");
                local.failures += 1;
                local.retry_at = now.plus_ms(1000 << local.failures.min(6));
            }
        }
    }

    /// One probe per running instance with a health check.
    fn watch_health(&mut self, state: &State) {
        let running: Vec<InstanceId> = {
            let locals = self.shared.locals();
            let runs =
                |(_, local): &(&InstanceId, &Local)| local.presence == Presence::Running && !local.is_busy;
            locals.iter().filter(runs).map(|(id, _)| *id).collect()
        };
        self.probes.retain(|id, _| running.contains(id));
        self.image_checks.retain(|id, _| running.contains(id));
        for id in running {
            if self.probes.contains_key(&id) {
                continue;
            }
            let own = spec_of(state, id).and_then(|spec| spec.health.clone());
            // The service's word counts before the image's, also when it is that there is no check.
            let spec = own.or_else(|| {
                let read = || {
                    let made = self.shared.ground.runtime.spec(&container_id(id)).ok();
                    made.and_then(|made| made.image.health)
                };
                self.image_checks.entry(id).or_insert_with(read).clone()
            });
            let spec = spec.filter(|spec| spec.test != HealthTest::Disabled);
            if let Some(spec) = spec {
                let runtime = self.shared.ground.runtime.clone();
                if let Some(local) = self.shared.locals().get_mut(&id) {
                    local.is_probed = true;
                }
                let probe = health::probe(runtime, id, spec, self.shared.origin, self.sender.clone());
                self.probes.insert(id, self.config.executor.launch(probe));
            }
        }
    }

    /// What no registry can give again lies on two nodes: this one fetches what it is to keep.
    fn keep_artifacts(&mut self, state: &Arc<State>) {
        for artifact in state.artifacts.rows() {
            let digest = &artifact.digest;
            if artifact.holders.contains(&self.config.node) {
                self.reporter.holds.remove(digest);
                continue;
            }
            if self.keeping.contains(digest) || !is_keeper(state, artifact, self.config.node) {
                continue;
            }
            self.keeping.insert(digest.clone());
            let (ground, sender, state) = (self.shared.ground.clone(), self.sender.clone(), state.clone());
            let artifact = artifact.clone();
            self.errands.push(self.config.executor.launch(async move {
                let (artifact, outcome) = unblock(move || {
                    let outcome = ground.artifacts.keep_copy(&state, &artifact);
                    (artifact, outcome)
                })
                .await;
                let is_here = outcome.is_ok();
                if let Err(error) = outcome {
                    warn!(digest = artifact.digest.short(), error = chain(&error), "keep a second copy");
                    async_io::Timer::after(error.pause()).await;
                }
                let _ = sender.send(Signal::Kept { artifact: Box::new(artifact), is_here }).await;
            }));
        }
    }

    fn delete_volumes(&mut self, state: &State) {
        let mine =
            |volume: &&crate::state::Volume| volume.is_removed && volume.node == Some(self.config.node);
        let volumes: Vec<(AppName, String)> = state
            .volumes
            .rows()
            .filter(mine)
            .map(|volume| (volume.app.clone(), volume.name.clone()))
            .collect();
        self.reporter.volumes_deleted.retain(|volume| volumes.contains(volume));
        let in_use = |app: &AppName| {
            state
                .instances_on(self.config.node)
                .any(|row| state.services.find(&row.service).is_some_and(|s| &s.app == app))
        };
        let now = self.shared.now();
        if self.deleting_since.is_some_and(|at| now.since_ms(at) < DELETE_AGAIN_MS) {
            return;
        }
        let due: Vec<(AppName, String)> = volumes
            .into_iter()
            .filter(|volume| !self.reporter.volumes_deleted.contains(volume) && !in_use(&volume.0))
            .collect();
        if due.is_empty() {
            return;
        }
        self.deleting_since = Some(now);
        let (ground, sender) = (self.shared.ground.clone(), self.sender.clone());
        self.errands.push(self.config.executor.launch(async move {
            let volumes = unblock(move || {
                due.into_iter()
                    .filter(|(app, name)| {
                        let folder = ground.volume_dir(app, name);
                        !folder.exists() || std::fs::remove_dir_all(&folder).is_ok()
                    })
                    .collect::<Vec<_>>()
            })
            .await;
            let _ = sender.send(Signal::VolumesDeleted { volumes }).await;
        }));
    }

    /// Now and then, and only when something was let go: images and content that nothing needs.
    fn sweep(&mut self, now: Mono) {
        if self.swept_at.is_some_and(|at| now.since_ms(at) < SWEEP_EVERY_MS) {
            return;
        }
        self.swept_at = Some(now);
        let (ground, replica) = (self.shared.ground.clone(), self.config.replica.clone());
        let sweep = unblock(move || disk::sweep_files(&ground, || replica.state()));
        self.errands.push(self.config.executor.launch(sweep));
    }

    fn watch_disk(&mut self, state: &State, now: Mono) {
        let is_due = self.measured_at.is_none_or(|at| now.since_ms(at) >= MEASURE_EVERY_MS);
        if !is_due || !disk::is_critical(&self.shared.ground.data_dir) {
            return;
        }
        self.measured_at = Some(now);
        let locals = self.shared.locals().clone();
        let running = locals.into_iter().filter(|(_, local)| local.presence == Presence::Running);
        let running = running.map(|(id, _)| (id, stop_of(state, id).0.unwrap_or(libc::SIGTERM))).collect();
        let stop = disk::stop_over_quota(self.shared.ground.clone(), running, self.sender.clone());
        self.errands.push(self.config.executor.launch(stop));
    }

    async fn send_reports(&mut self, state: &State, now: Mono) {
        {
            let locals = self.shared.locals();
            for instance in state.instances_on(self.config.node) {
                let local = locals.get(&instance.id).cloned().unwrap_or_default();
                let found = if self.is_caught_up { finding(instance, &local, now) } else { None };
                self.reporter.note(instance, found, now);
            }
        }
        let node = self.config.node;
        self.reporter.retain(|id| state.instances.find(&id).is_some_and(|row| row.node == Some(node)));
        if let Some(report) = self.reporter.due(now) {
            let start_id = self.config.start_id;
            let command = Box::new(Command::Report { node, start_id, report });
            self.config.replica.input(Input::Report { command }).await;
        }
    }
}

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text += &format!(": {cause}");
        source = cause.source();
    }
    text
}
