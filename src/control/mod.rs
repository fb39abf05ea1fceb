//! The control plane of one node: consensus, state, planner, liveness, membership, requests.
//!
//! A pure step function: `step(now, input) → outputs`. Everything that touches the world (sending, writing,
//! signing, clocks) is an Output whose result returns as an Input; the simulation and the daemon drive the same
//! code. Reads are served from `state()`, a copy of which costs a few pointers.
//!
//! Invariants: an outcome is given only after commit and apply; no periodic input writes anything
//! (`an_idle_cluster_writes_nothing`); every queue is bounded.

mod clock;
mod liveness;
mod membership;
mod reads;
mod requests;

pub use liveness::{Alive, Figures};
pub use requests::Undone;

use crate::consensus::{
    Batch, ConfState, Driver, DriverConfig, Effects, Entry, EntryType, Message, MessageType, Stored,
};
use crate::model::limits::{ENTRY_BYTES_MAX, UNWRITTEN_CHANGES_BYTES_MAX};
use crate::model::{Gather, Mono, NodeId, StartId, Timestamp};
use crate::planner;
use crate::state::{Command, Envelope, Origin, Outcome, RequestMark, State};
use clock::ClusterClock;
use liveness::Liveness;
use membership::Membership;
use reads::Reads;
use requests::Requests;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Between two plans without a change in the state: time alone can make an instance settled.
const PLAN_EVERY_MS: u64 = 500;

#[derive(Clone, Copy, Debug)]
pub struct ControlConfig {
    pub node: NodeId,
    pub start_id: StartId,
    pub seed: u64,
}

/// The two clocks as the caller read them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Now {
    pub mono: Mono,
    /// Only if the system says its clock is synchronised.
    pub wall: Option<Timestamp>,
}

/// Names a waiting caller; chosen by it, unique within one run.
pub type Waiter = u64;

#[derive(Debug)]
pub enum Input {
    /// Each `tick_ms`.
    Tick {
        figures: Figures,
    },
    Message {
        from: NodeId,
        message: Message,
    },
    /// A snapshot's rows have arrived and their hash holds.
    SnapshotStaged {
        message: Message,
        frames: Vec<Vec<u8>>,
    },
    SnapshotSent {
        to: NodeId,
        is_received: bool,
    },
    /// Batch `number` and all before it are on disk.
    Persisted {
        number: u64,
    },
    Alive {
        from: NodeId,
        alive: Alive,
    },
    /// A peer's run connected.
    Greeted {
        peer: NodeId,
        start_id: StartId,
    },
    Unreachable {
        peer: NodeId,
    },
    /// A user's wish. Only a leader takes it.
    Write {
        waiter: Waiter,
        request: Option<RequestMark>,
        command: Box<Command>,
    },
    /// Asks to be told when `state()` is as new as any outcome given before.
    Read {
        waiter: Waiter,
    },
    /// What this node's agent says: proposed here or forwarded to the leader; repeated by the agent until seen.
    Report {
        command: Box<Command>,
    },
    /// The same from a peer's agent.
    Forwarded {
        from: NodeId,
        command: Box<Command>,
    },
    /// Writes what waits, before a clean stop.
    Flush,
}

#[derive(Debug)]
pub enum Output {
    Send {
        to: NodeId,
        message: Message,
    },
    SendSnapshot {
        to: NodeId,
        message: Message,
        frames: Arc<Vec<Vec<u8>>>,
    },
    Forward {
        to: NodeId,
        command: Box<Command>,
    },
    Persist(Batch),
    /// To every other member, as a datagram.
    Broadcast(Alive),
    Done {
        waiter: Waiter,
        result: Result<Applied, Undone>,
    },
    ReadReady {
        waiter: Waiter,
        result: Result<u64, Undone>,
    },
    /// The cluster key must be brought to this node before it may vote.
    OfferKey {
        to: NodeId,
    },
    /// The cluster key must be deleted on this node, which does not vote any more.
    WithdrawKey {
        from: NodeId,
    },
    /// `state()` differs from before.
    Changed,
    /// This node must stop: what it holds can't be trusted to go on with.
    Halt {
        why: String,
    },
}

#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    pub index: u64,
    pub outcome: Outcome,
}

pub struct Control {
    config: ControlConfig,
    driver: Driver,
    state: State,
    applied: (u64, u64),
    /// Rows changed since the last batch, by table and key: only the newest version is written.
    unwritten: BTreeMap<(u8, Vec<u8>), Option<Vec<u8>>>,
    unwritten_bytes: usize,
    changed_conf: Option<ConfState>,
    clock: ClusterClock,
    liveness: Liveness,
    membership: Membership,
    requests: Requests,
    reads: Reads,
    plan: PlanTurn,
    /// An entry could not be applied: nothing that comes after it may be, or be written as if it had been.
    is_halted: bool,
}

/// One plan at a time is on its way; the next is made from what it did.
#[derive(Default)]
struct PlanTurn {
    in_flight: Option<(u64, Mono)>,
    planned_at: Mono,
    is_due: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error("load a row of the state")]
    Row(#[from] crate::state::RowError),
    #[error("start raft")]
    Raft(#[from] raft::Error),
}

impl Control {
    pub fn new(config: ControlConfig, now: Now, stored: Stored) -> Result<Control, StartError> {
        let mut state = State::default();
        for row in &stored.rows {
            if let Some(body) = &row.body {
                state.load_row(row.kind, &row.key, body)?;
            }
        }
        let mut driver = Driver::new(DriverConfig { id: config.node, seed: config.seed }, &stored)?;
        driver.campaign_if_alone();
        Ok(Control {
            driver,
            applied: (stored.applied, 0),
            unwritten: BTreeMap::new(),
            unwritten_bytes: 0,
            changed_conf: None,
            clock: ClusterClock::new(state.time(), now),
            liveness: Liveness::new(config.node, config.start_id, now.mono),
            membership: Membership::default(),
            requests: Requests::default(),
            reads: Reads::new(config.node, config.start_id),
            plan: PlanTurn::default(),
            is_halted: false,
            state,
            config,
        })
    }

    pub fn step(&mut self, now: Now, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        if self.is_halted {
            return out;
        }
        match input {
            Input::Tick { figures } => self.tick(now, figures, &mut out),
            Input::Message { from, message } => {
                if message.from == from.0 {
                    self.driver.step(message);
                }
            }
            Input::SnapshotStaged { message, frames } => self.driver.step_snapshot(message, frames),
            Input::SnapshotSent { to, is_received } => self.driver.report_snapshot(to, is_received),
            Input::Persisted { number } => self.persisted(now, number, &mut out),
            Input::Alive { from, alive } => {
                self.clock.hear(from, alive.wall);
                self.liveness.hear(from, alive, now.mono);
            }
            Input::Greeted { peer, start_id } => self.liveness.greet(peer, start_id, now.mono),
            Input::Unreachable { peer } => self.driver.report_unreachable(peer),
            Input::Write { waiter, request, command } => self.write(now, waiter, request, *command, &mut out),
            Input::Read { waiter } => self.reads.add(waiter, now.mono, &mut self.driver, &mut out),
            Input::Report { command } => self.report(now, command, &mut out),
            Input::Forwarded { from, command } => {
                if speaks_for_itself(from, &command) && self.driver.is_leader() {
                    self.propose_unless_known(now, *command);
                }
            }
            Input::Flush => self.flush(&mut out),
        }
        self.settle(now, &mut out);
        out
    }

    fn tick(&mut self, now: Now, figures: Figures, out: &mut Vec<Output>) {
        self.driver.tick();
        self.clock.tick(now, self.state.nodes.len());
        self.liveness.note_leader(self.driver.leader(), now.mono);
        if let Some(alive) = self.liveness.tick(now, figures) {
            out.push(Output::Broadcast(alive));
        }
        self.requests.expire(now.mono, out);
        self.reads.tick(now.mono, &mut self.driver, out);
        if self.driver.is_leader() {
            self.lead(now, out);
        } else {
            self.membership.follow();
            self.plan.in_flight = None;
        }
    }

    /// What only a leader does, each tick: liveness into the log, members into the configuration, plans.
    fn lead(&mut self, now: Now, out: &mut Vec<Output>) {
        let cluster_time = self.clock.now(now, &self.state);
        for command in self.liveness.verdicts(&self.state, now.mono, cluster_time) {
            self.propose_unless_known(now, command);
        }
        for command in self.address_moves(now.mono) {
            self.propose_unless_known(now, command);
        }
        let view = membership::View {
            state: &self.state,
            driver: &self.driver,
            liveness: &self.liveness,
            own: self.config.node,
            now: now.mono,
            cluster_time,
        };
        for wish in self.membership.wishes(&view) {
            match wish {
                membership::Wish::Change(change) => {
                    self.driver.propose_conf_change(change);
                }
                membership::Wish::Transfer(to) => self.driver.transfer_leader(to),
                membership::Wish::Forget(node) => {
                    self.propose_unless_known(now, Command::ForgetNode { node })
                }
                membership::Wish::OfferKey(to) => out.push(Output::OfferKey { to }),
                membership::Wish::WithdrawKey(from) => out.push(Output::WithdrawKey { from }),
            }
        }
        self.plan_if_due(now, cluster_time);
    }

    /// Floating addresses whose holder is silent, or that have none.
    fn address_moves(&self, now: Mono) -> Vec<Command> {
        if self.liveness.was_paused(now) {
            return Vec::new();
        }
        let rows = self.state.addresses.rows().enumerate();
        rows.filter_map(|(index, row)| {
            let stays = |node: &NodeId| self.state.nodes.find(node).is_some_and(planner::addresses::may_hold);
            let candidates = self.liveness.holders(index, now).into_iter().filter(stays).gather();
            let to = planner::addresses::holder(row.address, row.holder, &candidates)?;
            let command = Command::AssignAddress { address: row.address, epoch: row.epoch, to };
            (row.holder != Some(to)).then_some(command)
        })
        .collect()
    }

    fn plan_if_due(&mut self, now: Now, cluster_time: Timestamp) {
        if let Some((_, since)) = self.plan.in_flight
            && now.mono.since_ms(since) < 5_000
        {
            return;
        }
        self.plan.in_flight = None;
        if !self.plan.is_due && now.mono.since_ms(self.plan.planned_at) < PLAN_EVERY_MS {
            return;
        }
        self.plan.is_due = false;
        self.plan.planned_at = now.mono;
        let steps = planner::plan(&self.state, &self.liveness.heard_nodes(now.mono), cluster_time);
        if !steps.is_empty()
            && let Some(counter) = self.propose(now, None, Command::Plan { steps })
        {
            self.plan.in_flight = Some((counter, now.mono));
        }
    }

    fn write(
        &mut self,
        now: Now,
        waiter: Waiter,
        request: Option<RequestMark>,
        command: Command,
        out: &mut Vec<Output>,
    ) {
        let refusal = if !self.driver.is_leader() {
            Some(Undone::NotLeader { leader: self.driver.leader() })
        } else if self.requests.is_full() {
            Some(Undone::Busy)
        } else {
            match self.propose(now, request, command) {
                Some(counter) => {
                    self.requests.add(counter, waiter, now.mono);
                    None
                }
                None => Some(Undone::Busy),
            }
        };
        if let Some(refusal) = refusal {
            out.push(Output::Done { waiter, result: Err(refusal) });
        }
    }

    fn report(&mut self, now: Now, command: Box<Command>, out: &mut Vec<Output>) {
        if self.driver.is_leader() {
            self.propose_unless_known(now, *command);
        } else if let Some(to) = self.driver.leader() {
            out.push(Output::Forward { to, command });
        }
    }

    /// Proposes what would change something: repeated reports must not fill the log.
    fn propose_unless_known(&mut self, now: Now, command: Command) {
        let stamp = self.clock.now(now, &self.state);
        if self.requests.is_proposed(&command, now.mono) {
            return;
        }
        let mut draft = self.state.clone();
        let before = draft.take_changes();
        debug_assert!(before.is_empty(), "changes are taken as soon as they are applied");
        let origin = Origin::default();
        let envelope = Envelope { stamp: Timestamp(0), origin, request: None, command: command.clone() };
        let is_news = draft.apply(0, &envelope).is_ok() && !draft.take_changes().is_empty();
        if is_news && self.propose_at(stamp, None, command.clone()).is_some() {
            self.requests.mark_proposed(&command, now.mono);
        }
    }

    fn propose(&mut self, now: Now, request: Option<RequestMark>, command: Command) -> Option<u64> {
        let stamp = self.clock.now(now, &self.state);
        self.propose_at(stamp, request, command)
    }

    fn propose_at(
        &mut self,
        stamp: Timestamp,
        request: Option<RequestMark>,
        command: Command,
    ) -> Option<u64> {
        let counter = self.requests.next_counter();
        let origin = Origin { node: self.config.node, start_id: self.config.start_id, counter };
        let envelope = Envelope { stamp, origin, request, command };
        let bytes = envelope.encode();
        // One that no frame could carry would stop the log for good.
        (bytes.len() <= ENTRY_BYTES_MAX && self.driver.propose(bytes)).then_some(counter)
    }

    fn persisted(&mut self, now: Now, number: u64, out: &mut Vec<Output>) {
        let mut effects = Effects::default();
        self.driver.persisted(number, &mut effects);
        self.handle(now, effects, out);
    }

    fn settle(&mut self, now: Now, out: &mut Vec<Output>) {
        loop {
            let mut effects = Effects::default();
            if self.is_halted {
                return;
            }
            if self.driver.pump(&mut effects) {
                self.handle(now, effects, out);
                continue;
            }
            // A change is planned for at once, not at the next tick.
            let may_plan = self.plan.is_due && self.plan.in_flight.is_none() && self.driver.is_leader();
            if !may_plan {
                break;
            }
            self.plan_if_due(now, self.clock.now(now, &self.state));
        }
        self.reads.serve(self.applied.0, out);
        if self.unwritten_bytes > UNWRITTEN_CHANGES_BYTES_MAX {
            self.flush(out);
        }
        if !self.driver.is_leader() {
            self.requests.lead_elsewhere(now.mono);
        }
    }

    fn handle(&mut self, now: Now, effects: Effects, out: &mut Vec<Output>) {
        if let Some(image) = effects.install {
            match State::from_frames(&image.frames) {
                Ok(state) => self.state = state,
                Err(error) => return out.push(Output::Halt { why: format!("install a snapshot: {error}") }),
            }
            self.unwritten.clear();
            self.unwritten_bytes = 0;
            self.changed_conf = None;
            self.applied = (image.index, image.term);
            self.clock.adopt(self.state.time(), now);
            out.push(Output::Changed);
        }
        if let Some(mut batch) = effects.batch {
            self.fill(&mut batch);
            out.push(Output::Persist(batch));
        }
        for message in effects.messages {
            self.send(message, out);
        }
        for entry in effects.committed {
            if self.is_halted {
                return;
            }
            self.apply(now, entry, out);
        }
        for read in effects.reads {
            self.reads.confirmed(&read.context, read.index);
        }
    }

    fn send(&mut self, mut message: Message, out: &mut Vec<Output>) {
        let to = NodeId(message.to);
        if message.get_msg_type() == MessageType::MsgSnapshot {
            self.driver.align_snapshot(&mut message);
            let frames = Arc::new(self.state.to_frames());
            out.push(Output::SendSnapshot { to, message, frames });
        } else {
            out.push(Output::Send { to, message });
        }
    }

    fn apply(&mut self, now: Now, entry: Entry, out: &mut Vec<Output>) {
        let (index, term) = (entry.index, entry.term);
        assert_eq!(index, self.applied.0 + 1, "entries are applied in order, without a gap");
        if entry.get_entry_type() != EntryType::EntryNormal {
            match self.driver.apply_conf_change(&entry) {
                Ok(conf_state) => self.changed_conf = Some(conf_state),
                Err(error) => {
                    return self.halt(format!("apply a configuration: {error}"), out);
                }
            }
        } else if !entry.data.is_empty() {
            let envelope = match Envelope::decode(&entry.data) {
                Ok(envelope) => envelope,
                Err(error) => return self.halt(format!("apply entry {index}: {error}"), out),
            };
            self.apply_envelope(now, index, envelope, out);
        }
        self.applied = (index, term);
        self.driver.applied(index, term);
    }

    fn halt(&mut self, why: String, out: &mut Vec<Output>) {
        self.is_halted = true;
        out.push(Output::Halt { why });
    }

    fn apply_envelope(&mut self, now: Now, index: u64, envelope: Envelope, out: &mut Vec<Output>) {
        let outcome = self.state.apply(index, &envelope);
        self.clock.adopt(self.state.time(), now);
        for change in self.state.take_changes() {
            self.unwritten_bytes += change.bytes();
            if let Some(before) = self.unwritten.insert((change.kind, change.key.clone()), change.body) {
                self.unwritten_bytes -= 1 + change.key.len() + before.map_or(0, |body| body.len());
            }
            self.plan.is_due = true;
        }
        let is_own =
            envelope.origin.node == self.config.node && envelope.origin.start_id == self.config.start_id;
        if is_own {
            let counter = envelope.origin.counter;
            if self.plan.in_flight.is_some_and(|(planned, _)| planned == counter) {
                self.plan.in_flight = None;
                // A plan that came to nothing is not made again at once.
                self.plan.is_due &= outcome.is_ok();
                self.plan.planned_at = now.mono;
            }
            self.requests.forget_proposed(&envelope.command);
            self.requests.finish(counter, Applied { index, outcome }, out);
        }
        out.push(Output::Changed);
    }

    /// Adds to a batch what waits for one: changed rows, the configuration, the lazy commit index, compaction.
    fn fill(&mut self, batch: &mut Batch) {
        if batch.snapshot.is_some() {
            return;
        }
        batch.applied = self.applied.0;
        batch.changes = std::mem::take(&mut self.unwritten)
            .into_iter()
            .map(|((kind, key), body)| crate::state::RowChange { kind, key, body })
            .collect();
        self.unwritten_bytes = 0;
        batch.conf_state = self.changed_conf.take();
        batch.compact_to = self.driver.compact();
    }

    /// Writes what waits without an append; number 0 wants no answer.
    fn flush(&mut self, out: &mut Vec<Output>) {
        let mut batch = Batch { hard_state: self.driver.take_lazy_hard_state(), ..Batch::default() };
        self.fill(&mut batch);
        if !batch.is_empty() {
            out.push(Output::Persist(batch));
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    pub fn status(&self, now: Now) -> Status {
        Status {
            node: self.config.node,
            leader: self.driver.leader(),
            is_leader: self.driver.is_leader(),
            term: self.driver.term(),
            applied: self.applied.0,
            commit: self.driver.commit_index(),
            last_index: self.driver.last_index(),
            voters: settled_voters(&self.driver.conf_state()),
            learners: self.driver.conf_state().learners.iter().map(|id| NodeId(*id)).collect(),
            cluster_time: self.clock.now(now, &self.state),
            leaderless_ms: self.liveness.leaderless_ms(self.driver.leader(), now.mono),
            heard: self.liveness.heard_nodes(now.mono),
            silent_ms: self.liveness.silent_ms(now.mono),
        }
    }

    /// The index of the last entry that is in `state()`.
    pub fn applied(&self) -> u64 {
        self.applied.0
    }

    pub fn tick_ms(&self) -> u64 {
        self.state.cluster_settings().timers.tick_ms()
    }

    pub fn driver(&self) -> &Driver {
        &self.driver
    }
}

/// What `status` and the API show of the control plane.
#[derive(Clone, Debug)]
pub struct Status {
    pub node: NodeId,
    pub leader: Option<NodeId>,
    pub is_leader: bool,
    pub term: u64,
    pub applied: u64,
    pub commit: u64,
    pub last_index: u64,
    pub voters: Vec<NodeId>,
    pub learners: Vec<NodeId>,
    pub cluster_time: Timestamp,
    /// How long no leader has been known; 0 with one.
    pub leaderless_ms: u64,
    pub heard: planner::HeardNodes,
    /// Since each node was last heard, in ms; absent if never.
    pub silent_ms: BTreeMap<NodeId, u64>,
}

/// Who votes: during a change of the voters only those that do before and after it.
fn settled_voters(conf: &ConfState) -> Vec<NodeId> {
    let is_settled = |id: &&u64| conf.voters_outgoing.is_empty() || conf.voters_outgoing.contains(id);
    conf.voters.iter().filter(is_settled).map(|id| NodeId(*id)).collect()
}

/// Whether a peer's agent speaks of its own node only.
fn speaks_for_itself(from: NodeId, command: &Command) -> bool {
    match command {
        Command::NodeStarted { node, .. }
        | Command::NoteDisks { node, .. }
        | Command::NodeStopping { node, .. }
        | Command::NodeEnding { node, .. }
        | Command::ConfirmKey { node, .. }
        | Command::Report { node, .. } => *node == from,
        _ => false,
    }
}
