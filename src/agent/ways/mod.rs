//! Keeps the ways to the other nodes' containers: where those nodes are, and whether traffic to them is encrypted.
//!
//! Input: addresses of connected peers, the cluster's settings, what peers offer. Output: routes, tunnels and their
//! peers. It needs no leader: once the setting is known, each pair of nodes agrees by itself. A node that is not
//! connected now keeps the way it had, when the way of all changes for a while: its containers may serve on without a
//! daemon.
//!
//! Keys live in memory only, are made anew at each start, and after `encrypt_rotation` of cluster time.

mod lanes;

use super::worker::chain;
use crate::model::{Condition, Gather, Node, NodeId, StartId};
use crate::network::wireguard::{self, Slot, TunnelError};
use crate::network::{Network, Reach};
use crate::replica::{Handle, Lane, Offer, PeerFrame, WaysFrame};
use crate::state::State;
use crate::tasks::lock;
use crate::transport::peers::Transport;
use lanes::{CLEAR, Expected, Held, Lanes};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tracing::{info, warn};

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Also without news: this node's own interfaces may have changed.
const RENEW_EVERY: Duration = Duration::from_secs(10);
const REPEAT_EVERY: Duration = Duration::from_secs(5);
/// For the first handshake of two tunnels, before anything depends on it.
const WARM_UP: Duration = Duration::from_millis(300);
/// What was sent before the change may still be on its way.
const LINGER: Duration = Duration::from_secs(2);
/// For a member that isn't connected and not known to be down: its containers may serve on while its daemon is replaced.
const ABSENT_LINGER: Duration = Duration::from_secs(90);
const OFFERS_MAX: usize = 4;
const OBSTACLE_LETTERS_MAX: usize = 300;

/// Shared by the task, by whoever hears frames, and by whoever shows the network.
pub struct Ways {
    lanes: Mutex<Lanes>,
    view: Mutex<WaysView>,
    wake: async_channel::Sender<()>,
    woken: async_channel::Receiver<()>,
    /// Held while this machine is tried for encryption; whether it has been.
    is_tried: Mutex<bool>,
}

/// What `tinydc net` shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WaysView {
    /// Nodes that have not changed to what the setting says.
    pub waits_for: BTreeSet<NodeId>,
    pub problem: Option<String>,
}

impl Ways {
    pub fn new(start_id: StartId) -> Ways {
        let (wake, woken) = async_channel::bounded(1);
        let lanes = Mutex::new(Lanes::new(start_id));
        Ways { lanes, view: Mutex::default(), wake, woken, is_tried: Mutex::new(false) }
    }

    /// Tries once whether this machine could encrypt. Blocks, and has the kernel load what that takes: only when there is
    /// somebody to tell.
    fn try_encryption(&self) {
        let mut is_tried = lock(&self.is_tried);
        if !*is_tried {
            if let Err(error) = wireguard::probe() {
                lock(&self.lanes).set_obstacle(Some(chain(&error)));
            }
            *is_tried = true;
        }
    }

    pub fn hear(&self, from: NodeId, mut frame: WaysFrame) {
        frame.offers.truncate(OFFERS_MAX);
        frame.confirmed.truncate(OFFERS_MAX);
        frame.obstacle = frame.obstacle.map(|text| text.chars().take(OBSTACLE_LETTERS_MAX).collect());
        if lock(&self.lanes).hear(from, frame) {
            // A full channel holds a wake-up already.
            let _ = self.wake.try_send(());
        }
    }

    /// Whether this node, in its present run, has said yet if it could encrypt.
    pub fn has_heard(&self, node: &Node) -> bool {
        lock(&self.lanes).has_heard(node.id, node.start_id)
    }

    pub fn view(&self) -> WaysView {
        lock(&self.view).clone()
    }

    /// Nodes that can't encrypt, with the reason; `own` is this one. Blocks when it is asked for the first time.
    pub fn obstacles(&self, own: NodeId, state: &State) -> BTreeMap<NodeId, String> {
        self.try_encryption();
        let lanes = lock(&self.lanes);
        let is_present =
            |node: NodeId, run: StartId| state.nodes.find(&node).is_some_and(|row| row.start_id == Some(run));
        let mut found = lanes.obstacles(&is_present);
        found.extend(lanes.own_obstacle().map(|text| (own, text.to_owned())));
        found
    }
}

/// The task.
pub struct WaysKeeper {
    pub own: NodeId,
    pub ways: Arc<Ways>,
    pub network: Arc<Network>,
    pub transport: Transport,
    pub replica: Handle,
}

/// What the network was told last.
#[derive(Clone, PartialEq)]
struct Applied {
    reaches: BTreeMap<u8, Reach>,
    members: BTreeSet<u8>,
    floating: BTreeSet<Ipv4Addr>,
    is_clear_allowed: bool,
}

/// What the last rounds came to: nothing is done twice.
struct Last {
    /// Before the setting is known, what an earlier run has made stays.
    is_clear_wanted: bool,
    addresses: BTreeMap<NodeId, Ipv4Addr>,
    /// What the tunnels know, and where each peer was then.
    told: BTreeMap<Expected, Ipv4Addr>,
    /// Since when each peer has been ready, by tunnel.
    ready: BTreeMap<(NodeId, Slot), Instant>,
    applied: Option<(Instant, Applied)>,
    frames: BTreeMap<NodeId, (Instant, WaysFrame)>,
    rolled_since: Option<Instant>,
    has_tidied: bool,
    /// Whether this machine could encrypt is known.
    has_tried: bool,
    /// A tunnel that could not be made is tried again from then on.
    retry_at: Option<Instant>,
}

impl Last {
    fn new() -> Last {
        Last {
            is_clear_wanted: true,
            addresses: BTreeMap::new(),
            told: BTreeMap::new(),
            ready: BTreeMap::new(),
            applied: None,
            frames: BTreeMap::new(),
            rolled_since: None,
            has_tidied: false,
            has_tried: false,
            retry_at: None,
        }
    }
}

const RETRY_AFTER: Duration = Duration::from_secs(10);

impl WaysKeeper {
    pub async fn run(self) {
        let mut last = Last::new();
        loop {
            let state = self.replica.state();
            let cluster_time = self.replica.status().await.map(|status| status.cluster_time);
            if !last.has_tried && state.nodes.rows().nth(1).is_some() {
                let ways = self.ways.clone();
                crate::tasks::unblock(move || ways.try_encryption()).await;
                last.has_tried = true;
            }
            let now = Instant::now();
            self.drop_lost(&mut last).await;
            self.follow_addresses(&state, &mut last);
            if let Some(lane) = wanted_lane(&state, cluster_time.map(|time| time.0)) {
                last.is_clear_wanted = lane == Lane::Clear;
                self.offer(lane, &mut last, now).await;
            }
            self.tell_tunnels(&state, &mut last).await;
            self.warm_up(&state, &mut last, now).await;
            self.apply(&state, &mut last, now).await;
            self.tell_peers(&mut last, now);
            if self.finish(&state, &mut last, now).await {
                // Nothing in clear is taken any more.
                continue;
            }
            futures_lite::future::or(
                async {
                    // Closed only together with this task.
                    let _ = self.ways.woken.recv().await;
                },
                async {
                    async_io::Timer::after(pause(&last, now)).await;
                },
            )
            .await;
        }
    }

    /// Somebody took a tunnel's interface away: `offer` makes another, with a new key.
    async fn drop_lost(&self, last: &mut Last) {
        if !self.network.has_tunnels() {
            return;
        }
        // The kernel answers when nobody else changes links.
        let network = self.network.clone();
        let lost = crate::tasks::unblock(move || network.lost_tunnels()).await;
        if lost.is_empty() {
            return;
        }
        let names: Vec<&str> = lost.iter().map(|slot| slot.link_name()).collect();
        warn!(?names, "interfaces of tunnels are gone; they are made anew");
        for slot in &lost {
            lock(&self.ways.lanes).lose(*slot);
        }
        last.told.retain(|expected, _| !lost.contains(&expected.slot));
        last.ready.retain(|(_, slot), _| !lost.contains(slot));
        last.applied = None;
        let network = self.network.clone();
        if let Err(error) = smol::unblock(move || network.drop_tunnels(&lost)).await {
            warn!(error = chain(&error), "take away what is left of a tunnel");
        }
    }

    fn follow_addresses(&self, state: &State, last: &mut Last) {
        let connected = self.transport.connections().into_iter().filter(|(node, _)| *node != self.own);
        last.addresses.extend(connected.filter_map(|(node, connection)| {
            match connection.address.ip().to_canonical() {
                IpAddr::V4(address) => Some((node, address)),
                IpAddr::V6(_) => None,
            }
        }));
        last.addresses.retain(|node, _| state.nodes.contains(node));
        last.frames.retain(|node, _| state.nodes.contains(node));
        lock(&self.ways.lanes).retain(|node| state.nodes.contains(&node));
    }

    /// Begins the change to a lane, with a tunnel of its own if it is encrypted.
    async fn offer(&self, lane: Lane, last: &mut Last, now: Instant) {
        if last.retry_at.is_some_and(|at| now < at) || !lock(&self.ways.lanes).can_begin(lane) {
            return;
        }
        let known = lock(&self.ways.lanes).offered(lane);
        let held = match (lane, known) {
            (_, Some(held)) => held,
            (Lane::Clear, None) => CLEAR,
            (Lane::Sealed { .. }, None) => match self.open_tunnel(lane).await {
                Ok(held) => held,
                Err(error) => {
                    let text = chain(&error);
                    let mut view = lock(&self.ways.view);
                    if view.problem.as_ref() != Some(&text) {
                        warn!(error = text, "encrypt traffic between nodes");
                    }
                    view.problem = Some(text.clone());
                    lock(&self.ways.lanes).set_obstacle(Some(text));
                    last.retry_at = Some(now + RETRY_AFTER);
                    return;
                }
            },
        };
        last.retry_at = None;
        last.rolled_since = None;
        lock(&self.ways.view).problem = None;
        let mut lanes = lock(&self.ways.lanes);
        if let Lane::Sealed { .. } = lane {
            lanes.set_obstacle(None);
        }
        let is_first = lanes.wanted().is_none();
        lanes.begin(held);
        if !is_first {
            info!(to = lane.name(), "traffic between nodes changes its way");
        }
    }

    async fn open_tunnel(&self, lane: Lane) -> Result<Held, TunnelError> {
        let network = self.network.clone();
        let (slot, key) = crate::tasks::unblock(move || network.open_tunnel()).await?;
        Ok(Held { offer: Offer { lane, key: Some(key), port: slot.port() }, slot: Some(slot) })
    }

    async fn tell_tunnels(&self, state: &State, last: &mut Last) {
        let expected = {
            let mut lanes = lock(&self.ways.lanes);
            lanes.adopt();
            lanes.expected()
        };
        let is_known = |node: &NodeId| last.addresses.get(node).copied();
        let wanted: BTreeMap<Expected, Ipv4Addr> =
            expected.into_iter().filter_map(|expected| Some((expected, is_known(&expected.node)?))).gather();
        if wanted == last.told {
            return;
        }
        let (network, old) = (self.network.clone(), last.told.clone());
        let numbers: BTreeMap<NodeId, u8> = state.nodes.rows().map(|node| (node.id, node.number)).gather();
        let outcome = crate::tasks::unblock(move || {
            // First: one network has one peer in each tunnel.
            for gone in old.keys().filter(|one| !wanted.contains_key(one)) {
                network.remove_tunnel_peer(gone.slot, &gone.key);
            }
            let mut told = BTreeMap::new();
            let mut failure = None;
            for (expected, address) in wanted {
                if old.get(&expected) == Some(&address) {
                    told.insert(expected, address);
                    continue;
                }
                let Some(number) = numbers.get(&expected.node) else { continue };
                let endpoint = SocketAddrV4::new(address, expected.port);
                let peer = network.tunnel_peer(*number, expected.key, endpoint);
                match network.put_tunnel_peer(expected.slot, peer) {
                    Ok(()) => drop(told.insert(expected, address)),
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
            (told, failure)
        })
        .await;
        last.told = outcome.0;
        if let Some(error) = outcome.1 {
            warn!(error = chain(&error), "tell a tunnel of a peer");
        }
    }

    /// Has the tunnels shake hands before anything depends on it: a first packet that is lost would cost seconds.
    async fn warm_up(&self, state: &State, last: &mut Last, now: Instant) {
        let ready = lock(&self.ways.lanes).ready();
        last.ready.retain(|known, _| ready.contains(known));
        for (node, slot) in ready {
            if last.ready.contains_key(&(node, slot)) {
                continue;
            }
            last.ready.insert((node, slot), now);
            // Of the two one begins, so that they don't cross.
            if let Some(row) = state.nodes.find(&node).filter(|_| self.own < node) {
                let (network, number) = (self.network.clone(), row.number);
                crate::tasks::unblock(move || network.greet_through(slot, number)).await;
            }
        }
        let is_cold = |since: &Instant| now.duration_since(*since) < WARM_UP;
        let cold = last.ready.iter().filter(|(_, since)| is_cold(since)).map(|(known, _)| *known).gather();
        lock(&self.ways.lanes).set_cold(cold);
    }

    async fn apply(&self, state: &State, last: &mut Last, now: Instant) {
        let (reaches, is_clear_allowed) = {
            let lanes = lock(&self.ways.lanes);
            let reach = |(node, address): (&NodeId, &Ipv4Addr)| {
                let sealed = lanes.choice(*node)?.slot;
                Some((state.nodes.find(node)?.number, Reach { address: *address, sealed }))
            };
            let reaches: BTreeMap<u8, Reach> = last.addresses.iter().filter_map(reach).gather();
            // A node that can't encrypt where it should sends nothing rather than in clear.
            (reaches, last.is_clear_wanted || lanes.takes_clear())
        };
        let wanted = Applied {
            reaches,
            members: state.nodes.rows().map(|node| node.number).gather(),
            floating: state.addresses.rows().map(|row| row.address).gather(),
            is_clear_allowed,
        };
        let is_current =
            |(at, old): &(Instant, Applied)| *old == wanted && now.duration_since(*at) < RENEW_EVERY;
        if last.applied.as_ref().is_some_and(is_current) {
            return;
        }
        let (network, ways) = (self.network.clone(), wanted.clone());
        let set =
            move || network.set_peers(&ways.reaches, &ways.members, &ways.floating, ways.is_clear_allowed);
        match crate::tasks::unblock(set).await {
            Ok(()) => last.applied = Some((now, wanted)),
            Err(error) => warn!(error = chain(&error), "ways to other nodes"),
        }
    }

    fn tell_peers(&self, last: &mut Last, now: Instant) {
        if !last.has_tried {
            // Peers take what says nothing of an obstacle for a node that can encrypt.
            return;
        }
        let told: BTreeSet<Expected> = last.told.keys().copied().gather();
        let unaware = lock(&self.ways.lanes).take_unaware();
        last.frames.retain(|node, _| !unaware.contains(node));
        for node in self.transport.connections().into_keys().filter(|node| *node != self.own) {
            let frame = lock(&self.ways.lanes).frame(node, &told);
            let is_due = last.frames.get(&node).is_none_or(|(at, old)| {
                WaysFrame { seq: old.seq, ..frame.clone() } != *old || now.duration_since(*at) >= REPEAT_EVERY
            });
            if is_due {
                self.transport.frame(node, PeerFrame::Ways(frame.clone()).encode());
                last.frames.insert(node, (now, frame));
            }
        }
    }

    /// Gives up the old lane when everybody who is there has changed; whether it did now.
    async fn finish(&self, state: &State, last: &mut Last, now: Instant) -> bool {
        let present: BTreeSet<NodeId> =
            self.transport.connections().into_keys().filter(|node| *node != self.own).gather();
        let is_absent = |node: &&Node| {
            node.condition == Condition::Up && node.id != self.own && !present.contains(&node.id)
        };
        let has_absent = state.nodes.rows().any(|node| is_absent(&node));
        let (waits_for, has_begun) = {
            let lanes = lock(&self.ways.lanes);
            (lanes.waits_for(&present), lanes.wanted().is_some())
        };
        lock(&self.ways.view).waits_for = waits_for.clone();
        if !waits_for.is_empty() || !has_begun {
            last.rolled_since = None;
            return false;
        }
        let since = *last.rolled_since.get_or_insert(now);
        if now.duration_since(since) < if has_absent { ABSENT_LINGER } else { LINGER } {
            return false;
        }
        let (ended, keep, lane) = {
            let mut lanes = lock(&self.ways.lanes);
            let ended = lanes.end();
            let keep: BTreeSet<Slot> = lanes.held().filter_map(|held| held.slot).gather();
            (ended, keep, lanes.wanted().map(|held| held.offer.lane))
        };
        // What an earlier run has left is not in use any more either.
        if ended.is_none() && last.has_tidied {
            return false;
        }
        last.has_tidied = true;
        last.told.retain(|expected, _| keep.contains(&expected.slot));
        let network = self.network.clone();
        if let Err(error) = crate::tasks::unblock(move || network.keep_tunnels(&keep)).await {
            warn!(error = chain(&error), "take a tunnel away");
        }
        if let (Some(_), Some(lane)) = (ended, lane) {
            info!(way = lane.name(), "traffic between nodes has changed its way");
        }
        ended.is_some()
    }
}

/// Until the next look: both sides of a tunnel are to change at about the same moment.
fn pause(last: &Last, now: Instant) -> Duration {
    let warm_at = last.ready.values().map(|since| (*since + WARM_UP).saturating_duration_since(now));
    warm_at.filter(|left| !left.is_zero()).min().unwrap_or(LOOK_EVERY).min(LOOK_EVERY)
}

/// What the cluster's settings ask for now.
fn wanted_lane(state: &State, cluster_time_ms: Option<u64>) -> Option<Lane> {
    state.cluster()?;
    let settings = state.cluster_settings();
    match settings.is_encrypted {
        false => Some(Lane::Clear),
        true => Some(Lane::Sealed { epoch: cluster_time_ms? / 1000 / settings.encrypt_rotation_s.max(1) }),
    }
}
