//! The Ready loop around one `RawNode`.
//!
//! Input: ticks, messages, proposals, "batch N is durable". Output: `Effects`. Whoever drives it applies committed
//! entries in order and says so with `applied`.

use super::log::LogCache;
use super::{Batch, ConfChangeV2, ConfState, Entry, HardState, Message, MessageType, SnapshotImage, Stored};
use crate::model::limits::{ENTRY_BYTES_MAX, LOG_BYTES_MAX, LOG_ENTRIES_MAX};
use crate::model::{NodeId, Order};
use raft::{Config, RawNode, Ready, StateRole};
use std::collections::VecDeque;

const ELECTION_TICKS_MIN: usize = 25;
const ELECTION_TICKS_SPREAD: u64 = 10;
const HEARTBEAT_TICKS: usize = 3;
/// Entries that stay behind the applied index, so that a follower which was away a moment needs no snapshot.
const ENTRIES_KEPT: u64 = 1024;

#[derive(Clone, Copy, Debug)]
pub struct DriverConfig {
    pub id: NodeId,
    /// Makes election timeouts differ between nodes and runs, and repeat in a simulation.
    pub seed: u64,
}

/// A read may be served once everything up to `index` has been applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadReady {
    pub context: Vec<u8>,
    pub index: u64,
}

/// What one call of `pump` wants done, in this order: write, send, apply, serve.
#[derive(Debug, Default)]
pub struct Effects {
    pub batch: Option<Batch>,
    pub messages: Vec<Message>,
    pub committed: Vec<Entry>,
    pub reads: Vec<ReadReady>,
    /// The state must be replaced by this before anything else is applied.
    pub install: Option<SnapshotImage>,
}

/// Messages that wait for a batch; a Ready without a batch waits for the one before it.
struct InFlight {
    number: u64,
    is_written: bool,
    term: Option<u64>,
    messages: Vec<Message>,
}

pub struct Driver {
    node: RawNode<LogCache>,
    log: LogCache,
    config: DriverConfig,
    /// The newest term that is on disk.
    durable_term: u64,
    in_flight: VecDeque<InFlight>,
    /// A Ready with a snapshot; nothing else happens until it is on disk.
    installing: Option<(Ready, u64)>,
    /// A hard state whose only news is the commit index: written along with the next batch.
    lazy_hard_state: Option<HardState>,
    /// The snapshot that the next MsgSnapshot refers to.
    staged: Option<SnapshotImage>,
    snapshots_sending: usize,
    /// This node's place among the voters, and how many they are.
    place: (u64, u64),
}

impl Driver {
    pub fn new(config: DriverConfig, stored: &Stored) -> Result<Driver, raft::Error> {
        let log = LogCache::new(stored);
        let raft_config = Config {
            id: config.id.0,
            election_tick: ELECTION_TICKS_MIN,
            heartbeat_tick: HEARTBEAT_TICKS,
            applied: stored.applied,
            max_size_per_msg: 256 << 10,
            max_inflight_msgs: 64,
            max_uncommitted_size: 4 * ENTRY_BYTES_MAX as u64,
            max_committed_size_per_ready: ENTRY_BYTES_MAX as u64,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let node = RawNode::new(&raft_config, log.clone(), &logger)?;
        Ok(Driver {
            durable_term: stored.hard_state.term,
            node,
            log,
            config,
            in_flight: VecDeque::new(),
            installing: None,
            lazy_hard_state: None,
            staged: None,
            snapshots_sending: 0,
            place: place_of(config.id, &stored.conf_state),
        })
    }

    /// A sole voter need not wait for a leader that can't exist.
    pub fn campaign_if_alone(&mut self) {
        let conf = self.log.conf_state();
        let is_alone = conf.voters == [self.config.id.0] && conf.voters_outgoing.is_empty();
        if is_alone && self.node.campaign().is_err() {
            // Refused while something is still to be applied: the election timeout comes to it.
            self.fix_election_timeout();
        }
    }

    pub fn tick(&mut self) {
        if self.installing.is_none() {
            self.fix_election_timeout();
            self.node.tick();
        }
    }

    /// A message from a peer. Messages of a configuration this node left are dropped by raft itself.
    pub fn step(&mut self, message: Message) {
        let is_local = raft::raw_node::is_local_msg(message.get_msg_type());
        if self.installing.is_some() || is_local || message.get_msg_type() == MessageType::MsgSnapshot {
            return;
        }
        self.fix_election_timeout();
        // An error says that the message came from outside the configuration or too late: raft protects itself.
        let _ = self.node.step(message);
    }

    /// A snapshot's message, after its rows have arrived and their hash held.
    pub fn step_snapshot(&mut self, message: Message, frames: Vec<Vec<u8>>) {
        if self.installing.is_some() || message.get_msg_type() != MessageType::MsgSnapshot {
            return;
        }
        let metadata = message.get_snapshot().get_metadata();
        self.staged = Some(SnapshotImage {
            index: metadata.index,
            term: metadata.term,
            conf_state: metadata.get_conf_state().clone(),
            frames,
        });
        self.fix_election_timeout();
        let _ = self.node.step(message);
    }

    /// Whether raft took it; it may still be lost with the leadership.
    pub fn propose(&mut self, data: Vec<u8>) -> bool {
        self.installing.is_none() && self.is_leader() && self.node.propose(Vec::new(), data).is_ok()
    }

    pub fn propose_conf_change(&mut self, change: ConfChangeV2) -> bool {
        self.installing.is_none()
            && self.is_leader()
            && self.node.propose_conf_change(Vec::new(), change).is_ok()
    }

    /// Asks for the index a linearizable read needs. Silently lost without a leader: retry with another context.
    pub fn read_index(&mut self, context: Vec<u8>) {
        if self.installing.is_none() {
            self.node.read_index(context);
        }
    }

    pub fn transfer_leader(&mut self, to: NodeId) {
        self.node.transfer_leader(to.0);
    }

    pub fn report_unreachable(&mut self, peer: NodeId) {
        self.node.report_unreachable(peer.0);
    }

    pub fn report_snapshot(&mut self, to: NodeId, is_received: bool) {
        self.snapshots_sending = self.snapshots_sending.saturating_sub(1);
        let status = if is_received { raft::SnapshotStatus::Finish } else { raft::SnapshotStatus::Failure };
        self.node.report_snapshot(to.0, status);
    }

    /// Batch `number` and all before it are on disk.
    pub fn persisted(&mut self, number: u64, effects: &mut Effects) {
        let mut last = None;
        while let Some(first) = self.in_flight.front() {
            if first.number > number && first.is_written {
                break;
            }
            let done = self.in_flight.pop_front().expect("looked at just now");
            if let Some(term) = done.term {
                self.durable_term = term;
            }
            last = Some(done.number);
            effects.messages.extend(done.messages);
        }
        let Some(last) = last else { return };
        if let Some((ready, index)) = self.installing.take() {
            self.node.advance_append_async(ready);
            self.node.on_persist_ready(last);
            self.node.advance_apply_to(index);
        } else {
            self.node.on_persist_ready(last);
        }
    }

    /// Takes at most one Ready; call until it returns false, applying what was committed in between.
    pub fn pump(&mut self, effects: &mut Effects) -> bool {
        self.fix_election_timeout();
        if self.installing.is_some() || !self.node.has_ready() {
            return false;
        }
        let mut ready = self.node.ready();
        let number = ready.number();
        let at_once = ready.take_messages();
        let after_write = ready.take_persisted_messages();
        effects.committed.extend(ready.take_committed_entries());
        effects.reads.extend(
            ready
                .take_read_states()
                .into_iter()
                .map(|read| ReadReady { context: read.request_ctx, index: read.index }),
        );
        let batch = self.batch_of(&mut ready);
        let term =
            batch.as_ref().and_then(|batch| batch.hard_state.as_ref()).map(|hard_state| hard_state.term);
        let mut held = Vec::new();
        // A sole voter elects itself without a round trip: what it would say of a term that is not on disk yet
        // could be un-happened by a crash.
        let term_is_durable = self.durable_term == self.node.raft.term;
        if term_is_durable {
            effects.messages.extend(at_once)
        } else {
            held.extend(at_once)
        }
        held.extend(after_write);
        let is_written = batch.is_some();
        let is_idle = self.in_flight.is_empty();
        if let Some(snapshot) = batch.as_ref().and_then(|batch| batch.snapshot.clone()) {
            let index = snapshot.index;
            effects.install = Some(snapshot);
            self.in_flight.push_back(InFlight { number, is_written, term, messages: held });
            self.installing = Some((ready, index));
        } else {
            self.node.advance_append_async(ready);
            if is_written || !is_idle {
                self.in_flight.push_back(InFlight { number, is_written, term, messages: held });
            } else {
                self.node.on_persist_ready(number);
                effects.messages.extend(held);
            }
        }
        effects.batch = batch;
        true
    }

    /// What of a Ready must be written; `None` when there is nothing but a commit index.
    fn batch_of(&mut self, ready: &mut Ready) -> Option<Batch> {
        let mut batch = Batch { number: ready.number(), ..Batch::default() };
        if let Some(hard_state) = ready.hs() {
            self.log.save_hard_state(hard_state.clone());
            self.lazy_hard_state = Some(hard_state.clone());
        }
        let index = ready.snapshot().get_metadata().index;
        if index > 0 {
            let staged = self.staged.take().expect("raft gets a snapshot only after it was staged");
            assert_eq!(staged.index, index, "the staged snapshot is the one that raft accepted");
            self.log.reset_to(staged.index, staged.term, staged.conf_state.clone());
            self.place = place_of(self.config.id, &staged.conf_state);
            batch.applied = index;
            batch.snapshot = Some(staged);
        }
        batch.entries = ready.take_entries();
        self.log.append(&batch.entries);
        if ready.must_sync() || batch.snapshot.is_some() || !batch.entries.is_empty() {
            batch.hard_state = self.lazy_hard_state.take();
            return Some(batch);
        }
        None
    }

    /// A hard state that waits for company, for a batch that is written for another reason.
    pub fn take_lazy_hard_state(&mut self) -> Option<HardState> {
        self.lazy_hard_state.take()
    }

    /// Entry `index` is in the state. Call after `apply_conf_change` for a configuration change.
    pub fn applied(&mut self, index: u64, term: u64) {
        self.log.mark_applied(index, term);
        self.node.advance_apply_to(index);
    }

    /// A committed configuration change: returns the new configuration, which storage must keep.
    pub fn apply_conf_change(&mut self, entry: &Entry) -> Result<ConfState, raft::Error> {
        let mut change = ConfChangeV2::default();
        protobuf::Message::merge_from_bytes(&mut change, &entry.data)?;
        // A snapshot sent from here on must carry the state as it is, of which this entry is a part.
        self.log.mark_applied(entry.index, entry.term);
        let conf_state = self.node.apply_conf_change(&change)?;
        self.log.save_conf_state(conf_state.clone());
        self.place = place_of(self.config.id, &conf_state);
        let is_member = conf_state.voters.contains(&self.config.id.0)
            || conf_state.learners.contains(&self.config.id.0)
            || conf_state.voters_outgoing.contains(&self.config.id.0);
        if !is_member {
            // A removed leader would panic at its next commit.
            let term = self.node.raft.term;
            self.node.raft.become_follower(term, 0);
        }
        Ok(conf_state)
    }

    /// Lets go of entries that nobody needs; what the next batch must then say.
    pub fn compact(&mut self) -> Option<(u64, u64)> {
        let (entries, bytes) = self.log.size();
        let is_over = entries > LOG_ENTRIES_MAX || bytes > LOG_BYTES_MAX;
        // While a snapshot is on its way its receiver will need what came after it.
        let may = self.snapshots_sending == 0 || bytes > 2 * LOG_BYTES_MAX;
        if !is_over || !may {
            return None;
        }
        let keep = if bytes > LOG_BYTES_MAX { 16 } else { ENTRIES_KEPT };
        self.log.compact(self.log.applied().0.saturating_sub(keep))
    }

    /// Gives an outgoing MsgSnapshot the index of the state as it is now, which its rows will be.
    pub fn align_snapshot(&mut self, message: &mut Message) {
        let (index, term) = self.log.applied();
        let conf_state = self.log.conf_state();
        let metadata = message.mut_snapshot().mut_metadata();
        metadata.index = index;
        metadata.term = term;
        metadata.conf_state = Some(conf_state);
        self.snapshots_sending += 1;
    }

    pub fn is_leader(&self) -> bool {
        self.node.raft.state == StateRole::Leader
    }

    pub fn leader(&self) -> Option<NodeId> {
        Some(NodeId(self.node.raft.leader_id)).filter(|leader| leader.0 != 0)
    }

    pub fn term(&self) -> u64 {
        self.node.raft.term
    }

    pub fn last_index(&self) -> u64 {
        self.log.last_index()
    }

    pub fn commit_index(&self) -> u64 {
        self.node.raft.raft_log.committed
    }

    pub fn conf_state(&self) -> ConfState {
        self.log.conf_state()
    }

    /// Whether everything that raft decided here is on disk and sent.
    pub fn is_quiet(&self) -> bool {
        self.in_flight.is_empty() && self.installing.is_none()
    }

    /// How far a member's log is behind the leader's; `None` when not leader or not known.
    pub fn lag_of(&self, peer: NodeId) -> Option<u64> {
        if !self.is_leader() {
            return None;
        }
        let progress = self.node.raft.prs().get(peer.0)?;
        Some(self.last_index().saturating_sub(progress.matched))
    }

    /// A configuration change is in the log and not yet applied.
    pub fn is_conf_change_pending(&self) -> bool {
        self.node.raft.pending_conf_index > self.log.applied().0
    }

    /// Raft draws this from a random generator; a function of seed, node and term repeats in a simulation.
    ///
    /// The voters' timeouts lie apart, so that two of them never stand for election at once and split the vote, which
    /// would cost a second timeout; with each term another one is first.
    fn fix_election_timeout(&mut self) {
        let (rank, voters) = self.place;
        let apart = ELECTION_TICKS_SPREAD / voters;
        let mixed = mix(self.config.seed ^ mix(self.node.raft.term) ^ self.config.id.0.rotate_left(40));
        let turn = (rank + self.node.raft.term) % voters;
        let ticks = ELECTION_TICKS_MIN as u64 + turn * apart + mixed % apart.saturating_sub(1).max(1);
        self.node.raft.set_randomized_election_timeout(ticks as usize);
    }
}

/// A learner never stands for election; its place does not matter.
fn place_of(id: NodeId, conf_state: &ConfState) -> (u64, u64) {
    let mut voters = conf_state.voters.clone();
    voters.order();
    let rank = voters.iter().position(|voter| *voter == id.0).unwrap_or(0);
    (rank as u64, (voters.len() as u64).clamp(1, ELECTION_TICKS_SPREAD))
}

/// The finalizer of SplitMix64.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
