//! Keeps the network of this node as the state and the hints say: one task, beside the agent's loop so that a slow
//! launch delays no endpoint.
//!
//! Input: the state, hints of peers, what the agent knows of its containers. Output: the kernel's table, connections
//! reset, and this node's own hints. Nothing of it waits for a leader or a disk.

use super::certificates::{CertificateView, Certificates};
use super::hints::SILENT_AFTER;
use super::reconcile::{Local, Presence};
use super::wiring::{self, View, Wiring};
use super::worker::{Shared, chain};
use super::{names, routes};
use crate::model::*;
use crate::network::dns::{DnsConfig, DnsServer, UpstreamSource, Zone};
use crate::network::ingress::{Ingress, IngressConfig, Route};
use crate::network::relay::Relay;
use crate::network::{Applied, Network, Taken};
use crate::replica::{EndpointHint, Handle, PeerFrame};
use crate::state::State;
use crate::verdict::Verdict;
use async_executor::Executor;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How often silence is looked for, and hints repeated.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const REPEAT_EVERY: Duration = Duration::from_millis(500);
/// A list that became empty is repeated this long, for peers that missed it.
const REPEAT_EMPTY_FOR: Duration = Duration::from_secs(3);
/// And now and then in any case: a peer may have been cut off when the list became empty, or have been told another
/// one by an earlier run of this daemon.
const REPEAT_ALWAYS: Duration = Duration::from_secs(5);
/// This loop came round so late that the process was paused: what was not heard says nothing.
const LATE: Duration = Duration::from_millis(1_000);
/// Without a change the kernel's table is looked after this often, and at once when it is announced to be gone.
const RENEW_EVERY: Duration = Duration::from_secs(30);
const RETRY_EVERY: Duration = Duration::from_secs(1);
const NAME_PORT: u16 = 53;
/// A name server whose port is taken is tried again.
const NAMES_AGAIN: Duration = Duration::from_secs(10);

/// Sends a frame to every peer at once.
pub type Broadcast = Arc<dyn Fn(Vec<u8>) + Send + Sync>;

/// What `tinydc net` shows of this node's network beyond the state.
#[derive(Clone, Debug, Default)]
pub struct NetworkView {
    pub wiring: Wiring,
    pub taken: Vec<Taken>,
    /// Why the kernel's table is not as it should be.
    pub error: Option<String>,
    /// Why containers have no IPv6 here, where they should.
    pub ipv6_problem: Option<String>,
    /// Why containers have no name server.
    pub names_problem: Option<String>,
    /// Why HTTP routes are not served here.
    pub ingress_problem: Option<String>,
    /// What the ingress shows for each host that is to have a certificate.
    pub certificates: Vec<CertificateView>,
    /// Tokens of challenges for which the ingress answers.
    pub challenges: BTreeSet<String>,
}

pub struct Mesh {
    pub node: NodeId,
    pub start_id: StartId,
    pub replica: Handle,
    pub(super) shared: Arc<Shared>,
    pub broadcast: Broadcast,
    pub executor: Arc<Executor<'static>>,
}

/// What the last round came to: nothing is done twice.
#[derive(Default)]
struct Last {
    inputs: Option<(Arc<State>, BTreeSet<(NodeId, InstanceId)>, BTreeSet<NodeId>)>,
    applied_at: Option<Instant>,
    has_ipv6: bool,
    own_down: Vec<InstanceId>,
    own_down_since: Option<Instant>,
    sent_at: Option<Instant>,
    seq: u64,
}

impl Mesh {
    pub async fn run(self) {
        let watch = self.replica.published().watch();
        let mut last = Last::default();
        let mut names = NameServer::new(&self);
        let mut entry = Entry::new(&self);
        let mut came_round = Instant::now();
        loop {
            let now = Instant::now();
            if now.duration_since(came_round) > LATE + LOOK_EVERY {
                self.shared.hints.forgive(now);
            }
            came_round = now;
            let state = self.replica.state();
            self.tell_own(&state, &mut last, now);
            names.keep(&self, now);
            self.follow(state, &mut last, (&names, &mut entry), now).await;
            let wake = futures_lite::future::or(
                async {
                    self.shared.hints.woken().await;
                },
                async {
                    watch.changed().await;
                },
            );
            let pause = async {
                async_io::Timer::after(LOOK_EVERY).await;
            };
            futures_lite::future::or(wake, pause).await;
        }
    }

    /// Tells the peers which instances here don't serve.
    fn tell_own(&self, state: &State, last: &mut Last, now: Instant) {
        let down = own_down(state, self.node, &self.shared.locals());
        let is_news = down != last.own_down;
        if is_news {
            last.own_down = down;
            last.own_down_since = Some(now);
        }
        let is_recent = last.own_down_since.is_some_and(|since| now.duration_since(since) < REPEAT_EMPTY_FOR);
        let is_due = last.sent_at.is_none_or(|at| now.duration_since(at) >= REPEAT_EVERY);
        let is_stale = last.sent_at.is_none_or(|at| now.duration_since(at) >= REPEAT_ALWAYS);
        if is_news || is_stale || (is_due && (is_recent || !last.own_down.is_empty())) {
            last.sent_at = Some(now);
            last.seq += 1;
            let hint = EndpointHint { start_id: self.start_id, seq: last.seq, down: last.own_down.clone() };
            (self.broadcast)(PeerFrame::Endpoints(hint).encode());
        }
    }

    async fn follow(
        &self,
        state: Arc<State>,
        last: &mut Last,
        (names, entry): (&NameServer, &mut Entry),
        now: Instant,
    ) {
        let hints = &self.shared.hints;
        hints.retain(&|node| state.nodes.contains(&node));
        let mut down = hints.down();
        down.extend(last.own_down.iter().map(|instance| (self.node, *instance)));
        let silent = hints.silent(SILENT_AFTER, now);
        let is_same = last.inputs.as_ref().is_some_and(|(old_state, old_down, old_silent)| {
            Arc::ptr_eq(old_state, &state) && *old_down == down && *old_silent == silent
        });
        let before = self.shared.network_view();
        let is_broken = before.error.is_some() || before.ipv6_problem.is_some();
        let every = if is_broken { RETRY_EVERY } else { RENEW_EVERY };
        let is_due = last.applied_at.is_none_or(|at| now.duration_since(at) >= every)
            || self.shared.ground.network.was_table_deleted();
        if is_same && !is_due && !names.is_new() && !entry.certificates.has_news(now) {
            return;
        }
        let view = View { state: &state, own: self.node, down: &down, silent: &silent };
        let wiring = wiring::plan(&view);
        names.tell(&view, self.shared.ground.network.bridge_address());
        entry.follow(self, &view, now);
        let has_ipv6 = state.cluster_settings().has_ipv6;
        let is_news = before.wiring != wiring || last.has_ipv6 != has_ipv6;
        if is_news || before.error.is_some() || is_due {
            entry.relay.set(&relayed(&wiring));
            let is_first = last.applied_at.is_none();
            self.apply(before, wiring, has_ipv6, is_first).await;
            last.has_ipv6 = has_ipv6;
            // Making the table anew deletes it first.
            self.shared.ground.network.was_table_deleted();
            last.applied_at = Some(now);
        }
        last.inputs = Some((state, down, silent));
    }

    async fn apply(&self, before: NetworkView, wiring: Wiring, has_ipv6: bool, is_first: bool) {
        let network = self.shared.ground.network.clone();
        let wanted = wiring.wanted.clone();
        let mut dead: Vec<Ipv4Addr> = before.wiring.alive.difference(&wiring.alive).copied().collect();
        let alive = wiring.alive.clone();
        let outcome = crate::tasks::unblock(move || {
            if is_first {
                dead.extend(dead_since_last_run(&network, &alive));
            }
            network.apply(&wanted, &dead, has_ipv6)
        })
        .await;
        let (outcome, ipv6) = match outcome {
            Ok(Applied { taken, ipv6 }) => (Ok(taken), ipv6),
            Err(error) => (Err(error), Ok(())),
        };
        let ipv6_problem = ipv6.err().map(|error| chain(&error));
        if let Some(error) = ipv6_problem.as_ref().filter(|_| before.ipv6_problem != ipv6_problem) {
            warn!(error, "give containers IPv6");
        }
        let mut after = NetworkView { wiring, ipv6_problem, ..before.clone() };
        match outcome {
            Ok(taken) => {
                after.error = None;
                for taken in taken.iter().filter(|taken| !before.taken.contains(taken)) {
                    let by = taken.by.as_deref().unwrap_or("another program");
                    warn!(port = taken.key.port, by, "a published port is taken on this node");
                }
                after.taken = taken;
            }
            Err(error) => {
                let text = chain(&error);
                if before.error.as_ref() != Some(&text) {
                    warn!(error = text, "change the network");
                }
                // What was not applied is tried again; what died meanwhile must not be forgotten.
                after.wiring.alive.extend(before.wiring.alive.iter().copied());
                after.error = Some(text);
            }
        }
        if before.error.is_some() && after.error.is_none() {
            info!("the network is as it should be again");
        }
        self.shared.set_network_view(after);
    }
}

/// This node's name server, started when its port is to be had.
struct NameServer {
    server: Option<DnsServer>,
    tried_at: Option<Instant>,
    has_zone: AtomicBool,
}

impl NameServer {
    fn new(mesh: &Mesh) -> NameServer {
        let mut names = NameServer { server: None, tried_at: None, has_zone: AtomicBool::new(false) };
        names.keep(mesh, Instant::now());
        names
    }

    fn keep(&mut self, mesh: &Mesh, now: Instant) {
        let is_due = self.tried_at.is_none_or(|at| now.duration_since(at) >= NAMES_AGAIN);
        if self.server.is_some() || !is_due {
            return;
        }
        let is_first = self.tried_at.is_none();
        self.tried_at = Some(now);
        let listen = SocketAddrV4::new(mesh.shared.ground.network.bridge_address(), NAME_PORT);
        let upstreams = UpstreamSource::ResolvConf("/etc/resolv.conf".into());
        match DnsServer::start(DnsConfig { listen, upstreams }, &mesh.executor) {
            Ok(server) => {
                info!(%listen, "name server listens");
                self.server = Some(server);
                self.has_zone.store(false, Ordering::Relaxed);
                mesh.shared.set_names_problem(None);
            }
            Err(error) => {
                let text = chain(&error);
                if is_first {
                    warn!(error = text, "containers have no name server");
                }
                mesh.shared.set_names_problem(Some(text));
            }
        }
    }

    /// It has been started and knows nothing yet.
    fn is_new(&self) -> bool {
        self.server.is_some() && !self.has_zone.load(Ordering::Relaxed)
    }

    fn tell(&self, view: &View<'_>, bridge: Ipv4Addr) {
        if let Some(server) = &self.server {
            let table = names::table(view, bridge);
            if !self.has_zone.swap(true, Ordering::Relaxed) || *server.zone().table() != table {
                server.set_zone(Zone::new(table));
            }
        }
    }
}

/// The ways in that are sockets: HTTP routes, and published ports on IPv6.
struct Entry {
    relay: Relay,
    ingress: Option<Ingress>,
    certificates: Certificates,
    told: Option<Told>,
}

/// What the ingress was told last.
#[derive(PartialEq)]
struct Told {
    ports: (u16, u16),
    routes: Vec<Route>,
    certificates: Vec<CertificateView>,
    challenges: BTreeSet<String>,
}

impl Entry {
    fn new(mesh: &Mesh) -> Entry {
        let ingress = Ingress::start(IngressConfig::default(), &mesh.executor);
        let ingress = ingress.inspect_err(|error| warn!(error = chain(error), "start the HTTP ingress"));
        let certificates = Certificates::new(mesh.shared.ground.secrets.clone(), mesh.executor.clone());
        Entry { relay: Relay::new(&mesh.executor), ingress: ingress.ok(), certificates, told: None }
    }

    /// Tried again, with every look at the network, until its ports are to be had.
    fn follow(&mut self, mesh: &Mesh, view: &View<'_>, now: Instant) {
        let Some(ingress) = &self.ingress else { return };
        let mut table = routes::table(view);
        let shared = mesh.shared.clone();
        let (certificates, views) = self.certificates.follow(view.state, now, move || shared.hints.wake());
        table.certificates = certificates;
        let wanted = Told {
            ports: (table.http_port, table.https_port),
            routes: table.routes.clone(),
            certificates: views,
            challenges: table.challenges.keys().cloned().gather(),
        };
        if self.told.as_ref() == Some(&wanted) {
            return;
        }
        match ingress.set_routes(table) {
            Ok(()) => {
                mesh.shared.set_shown(wanted.certificates.clone(), wanted.challenges.clone());
                self.told = Some(wanted);
                mesh.shared.set_ingress_problem(None);
            }
            Err(error) => {
                mesh.shared.set_shown(wanted.certificates, BTreeSet::new());
                let text = chain(&error);
                if mesh.shared.set_ingress_problem(Some(text.clone())) {
                    warn!(error = text, "HTTP routes");
                }
            }
        }
    }
}

/// TCP ports published on all addresses, with who serves them.
fn relayed(wiring: &Wiring) -> BTreeMap<u16, Vec<SocketAddrV4>> {
    let ports = wiring.wanted.ports.iter();
    ports
        .filter(|(key, _)| key.host_address.is_none() && key.protocol == Protocol::Tcp)
        .map(|(key, row)| {
            // The relay would come from the node itself, whom those without a way out answer.
            let reached = row.endpoints.iter().filter(|(address, _)| !wiring.wanted.inner.contains(address));
            let endpoints = reached.map(|(address, port)| SocketAddrV4::new(*address, *port));
            (key.port, endpoints.collect())
        })
        .gather()
}

/// Endpoints that died while no daemon looked: connections to them still hang.
fn dead_since_last_run(network: &Network, alive: &BTreeSet<Ipv4Addr>) -> Vec<Ipv4Addr> {
    let counts: BTreeMap<Ipv4Addr, u32> = network.connection_counts().unwrap_or_default();
    counts.into_keys().filter(|address| !alive.contains(address)).collect()
}

/// Instances here that the state takes for serving, and that don't.
fn own_down(state: &State, own: NodeId, locals: &BTreeMap<InstanceId, Local>) -> Vec<InstanceId> {
    state
        .instances_on(own)
        .filter(|instance| instance.observed.phase.is_running())
        .filter(|instance| {
            locals.get(&instance.id).is_none_or(|local| {
                let is_untested = local.is_untested && local.is_probed;
                local.presence != Presence::Running
                    || is_untested
                    || local.verdict == Some(Verdict::Unhealthy)
            })
        })
        .map(|instance| instance.id)
        .collect()
}

impl Shared {
    pub(super) fn network_view(&self) -> NetworkView {
        self.network_view.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_names_problem(&self, problem: Option<String>) {
        self.network_view.lock().unwrap_or_else(PoisonError::into_inner).names_problem = problem;
    }

    /// Whether that is news.
    fn set_ingress_problem(&self, problem: Option<String>) -> bool {
        let mut view = self.network_view.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = view.ingress_problem != problem;
        view.ingress_problem = problem;
        is_news
    }

    fn set_shown(&self, certificates: Vec<CertificateView>, challenges: BTreeSet<String>) {
        let mut view = self.network_view.lock().unwrap_or_else(PoisonError::into_inner);
        view.certificates = certificates;
        view.challenges = challenges;
    }

    fn set_network_view(&self, view: NetworkView) {
        let mut place = self.network_view.lock().unwrap_or_else(PoisonError::into_inner);
        *place = NetworkView {
            names_problem: place.names_problem.take(),
            ingress_problem: place.ingress_problem.take(),
            certificates: std::mem::take(&mut place.certificates),
            challenges: std::mem::take(&mut place.challenges),
            ..view
        };
    }
}

/// Held by the agent's shared part.
pub(super) type ViewCell = Mutex<NetworkView>;
