//! Which members vote: chosen from the registered nodes so that nobody has to count managers.
//!
//! 1 voter for one or two members, 3 for three to six, 5 from seven up; everyone else is a learner. One change at a
//! time, by explicit joint consensus, and only if the old and the new voters keep a live quorum. Without quorum
//! nothing shrinks by itself.

use super::liveness::Liveness;
use crate::consensus::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, Driver};
use crate::model::{Condition, Desired, Gather, Mono, Node, NodeId, Order, Timestamp};
use crate::state::State;
use std::collections::{BTreeMap, BTreeSet};

/// A candidate must have been heard for this long, unless the cluster is being founded.
const CANDIDATE_HEARD_MS: u64 = 60_000;
const FOUNDING_MS: u64 = 600_000;
/// How far behind a candidate's log may be.
const CANDIDATE_LAG_MAX: u64 = 64;
/// A lost voter is replaced after this long.
const REPLACE_VOTER_AFTER_MS: u64 = 120_000;
const OFFER_KEY_EVERY_MS: u64 = 2_000;
/// For this long a node that leaves keeps its instances until others run elsewhere.
const LEAVE_WAIT_MS: u64 = 60_000;
const CHANGE_EVERY_MS: u64 = 1_000;

pub struct View<'a> {
    pub state: &'a State,
    pub driver: &'a Driver,
    pub liveness: &'a Liveness,
    pub own: NodeId,
    pub now: Mono,
    pub cluster_time: Timestamp,
}

#[derive(Debug, PartialEq)]
pub enum Wish {
    Change(ConfChangeV2),
    Transfer(NodeId),
    /// Without a vote now, so that its removal can end.
    Forget(NodeId),
    OfferKey(NodeId),
    WithdrawKey(NodeId),
}

#[derive(Default)]
pub struct Membership {
    heard_since: BTreeMap<NodeId, Mono>,
    offered: BTreeMap<NodeId, Mono>,
    changed_at: Option<Mono>,
    transferred_at: Option<Mono>,
    leaving_since: BTreeMap<NodeId, Mono>,
}

impl Membership {
    /// Another node leads: how long members have been heard counts anew.
    pub fn follow(&mut self) {
        self.heard_since.clear();
        self.changed_at = None;
    }

    pub fn wishes(&mut self, view: &View<'_>) -> Vec<Wish> {
        self.note_heard(view);
        let mut wishes = Vec::new();
        let conf = view.driver.conf_state();
        let is_busy = view.driver.is_conf_change_pending()
            || self.changed_at.is_some_and(|at| view.now.since_ms(at) < CHANGE_EVERY_MS);
        self.offer_keys(view, &mut wishes);
        if !conf.voters_outgoing.is_empty() {
            // The automatic leave can be missed when the leader changes: leave explicitly, and at once, because until
            // then the old voters can't be spared either.
            if !view.driver.is_conf_change_pending() {
                wishes.push(Wish::Change(ConfChangeV2::default()));
            }
            return wishes;
        }
        let voters: BTreeSet<NodeId> = conf.voters.iter().map(|id| NodeId(*id)).gather();
        let learners: BTreeSet<NodeId> = conf.learners.iter().map(|id| NodeId(*id)).gather();
        for node in view.state.nodes.rows().filter(|node| node.is_leaving && !voters.contains(&node.id)) {
            let since = *self.leaving_since.entry(node.id).or_insert(view.now);
            let has_waited = view.now.since_ms(since) >= LEAVE_WAIT_MS;
            if node.condition == Condition::Down || has_waited || !still_serves(view.state, node.id) {
                wishes.push(Wish::Forget(node.id));
            }
        }
        if is_busy {
            return wishes;
        }
        self.withdraw_keys(view, &voters, &mut wishes);
        let target = self.target(view, &voters, &learners);
        if voters.contains(&view.own) && !target.contains(&view.own) {
            self.hand_over(view, &target, &voters, &mut wishes);
            return wishes;
        }
        if let Some(change) = self.change(view, &voters, &learners, &target) {
            self.changed_at = Some(view.now);
            wishes.push(Wish::Change(change));
        }
        wishes
    }

    fn note_heard(&mut self, view: &View<'_>) {
        for node in view.state.nodes.rows() {
            if view.liveness.is_steady(node.id, view.now) {
                self.heard_since.entry(node.id).or_insert(view.now);
            } else {
                self.heard_since.remove(&node.id);
            }
        }
        self.heard_since.retain(|id, _| view.state.nodes.contains(id));
    }

    /// Brings the cluster key to those that may become voters; in a cluster of two to both.
    fn offer_keys(&mut self, view: &View<'_>, wishes: &mut Vec<Wish>) {
        let count = view.state.nodes.len();
        let wanted = if count == 2 { 2 } else { voter_count(count) };
        // A voter that is about to be replaced counts no more: who replaces it needs the key first.
        let counts = |node: &&Node| node.has_cluster_key && !node.is_leaving && !is_lost(view, node);
        let holders = view.state.nodes.rows().filter(counts).count();
        let missing = wanted.saturating_sub(holders);
        let candidates = view.state.nodes.rows().filter(|node| {
            !node.has_cluster_key && !node.is_leaving && view.liveness.is_steady(node.id, view.now)
        });
        for node in candidates.take(missing) {
            let is_due =
                self.offered.get(&node.id).is_none_or(|at| view.now.since_ms(*at) >= OFFER_KEY_EVERY_MS);
            if is_due {
                self.offered.insert(node.id, view.now);
                wishes.push(Wish::OfferKey(node.id));
            }
        }
    }

    /// Takes the cluster key from those that have no vote, once there are as many voters as there should be and each has
    /// it; in a cluster of two both keep it.
    fn withdraw_keys(&mut self, view: &View<'_>, voters: &BTreeSet<NodeId>, wishes: &mut Vec<Wish>) {
        let members = view.state.nodes.len();
        let holds = |id: &NodeId| view.state.nodes.find(id).is_some_and(|node| node.has_cluster_key);
        if members == 2 || voters.len() != voter_count(members) || !voters.iter().all(holds) {
            return;
        }
        let is_spare = |node: &&Node| {
            node.has_cluster_key && !voters.contains(&node.id) && view.liveness.is_steady(node.id, view.now)
        };
        let is_replacing = voters
            .iter()
            .filter_map(|id| view.state.nodes.find(id))
            .any(|node| node.condition == Condition::Down || node.is_leaving);
        for node in view.state.nodes.rows().filter(is_spare).filter(|_| !is_replacing) {
            let is_due =
                self.offered.get(&node.id).is_none_or(|at| view.now.since_ms(*at) >= OFFER_KEY_EVERY_MS);
            if is_due {
                self.offered.insert(node.id, view.now);
                wishes.push(Wish::WithdrawKey(node.id));
            }
        }
    }

    /// The voters there should be, from those there are: as few changes as possible.
    fn target(
        &self,
        view: &View<'_>,
        voters: &BTreeSet<NodeId>,
        learners: &BTreeSet<NodeId>,
    ) -> BTreeSet<NodeId> {
        let members: Vec<&Node> = view.state.nodes.rows().filter(|node| !node.is_leaving).collect();
        let wanted = voter_count(members.len());
        let mut keep: Vec<NodeId> =
            members.iter().map(|node| node.id).filter(|id| voters.contains(id)).collect();
        let candidates: Vec<NodeId> = members
            .iter()
            .filter(|node| learners.contains(&node.id) && self.is_candidate(view, node))
            .map(|node| node.id)
            .collect();
        // A lost voter goes only when another can take its place.
        let mut spare = candidates.len().saturating_sub(wanted.saturating_sub(keep.len()));
        for node in members.iter().filter(|node| is_lost(view, node)) {
            if spare > 0 && keep.contains(&node.id) {
                keep.retain(|id| *id != node.id);
                spare -= 1;
            }
        }
        // The leader stays; of the others the youngest go.
        keep.order_by_key(|id| (*id != view.own, !view.liveness.is_steady(*id, view.now), *id));
        keep.truncate(wanted);
        let missing = wanted - keep.len();
        let mut target: BTreeSet<NodeId> = keep.into_iter().gather();
        target.extend(candidates.into_iter().take(missing));
        // A voter that was replaced keeps its vote until another can take it: fewer voters would be a step back.
        let has_stranger = voters.iter().any(|id| !view.state.nodes.contains(id));
        if has_stranger && target.len() < voters.len() && wanted >= voters.len() {
            return voters.clone();
        }
        // Odd sets only: two voters are worse than one.
        if target.len().is_multiple_of(2) && !target.is_empty() {
            let added = target.iter().rev().find(|id| !voters.contains(id)).copied();
            let gone = added.or_else(|| target.iter().rev().find(|id| **id != view.own).copied());
            target.extend(gone.is_none().then_some(view.own));
            if let Some(gone) = gone {
                target.remove(&gone);
            }
        }
        target
    }

    fn is_candidate(&self, view: &View<'_>, node: &Node) -> bool {
        let founded = view.state.cluster().map(|cluster| cluster.founded_at).unwrap_or_default();
        let is_founding = view.cluster_time.since_ms(founded) < FOUNDING_MS;
        let heard_ms = self.heard_since.get(&node.id).map(|since| view.now.since_ms(*since));
        let is_heard = heard_ms.is_some_and(|ms| is_founding || ms >= CANDIDATE_HEARD_MS);
        let is_near = view.driver.lag_of(node.id).is_some_and(|lag| lag <= CANDIDATE_LAG_MAX);
        is_heard
            && is_near
            && node.condition == Condition::Up
            && node.has_cluster_key
            && !view.liveness.has_slow_disk(node.id)
    }

    fn hand_over(
        &mut self,
        view: &View<'_>,
        target: &BTreeSet<NodeId>,
        voters: &BTreeSet<NodeId>,
        wishes: &mut Vec<Wish>,
    ) {
        let heir = target.iter().find(|id| voters.contains(id) && view.liveness.is_steady(**id, view.now));
        match heir {
            Some(heir) => {
                let is_due = self.transferred_at.is_none_or(|at| view.now.since_ms(at) >= 3_000);
                if is_due {
                    self.transferred_at = Some(view.now);
                    wishes.push(Wish::Transfer(*heir));
                }
            }
            // A sole voter that leaves first makes the other one vote.
            None => {
                let both: BTreeSet<NodeId> = target.union(voters).copied().gather();
                let learners = BTreeSet::new();
                if !target.is_empty()
                    && let Some(change) = self.change(view, voters, &learners, &both)
                {
                    self.changed_at = Some(view.now);
                    wishes.push(Wish::Change(change));
                }
            }
        }
    }

    fn change(
        &self,
        view: &View<'_>,
        voters: &BTreeSet<NodeId>,
        learners: &BTreeSet<NodeId>,
        target: &BTreeSet<NodeId>,
    ) -> Option<ConfChangeV2> {
        let registered: BTreeSet<NodeId> = view.state.nodes.rows().map(|node| node.id).gather();
        let mut changes = Vec::new();
        for id in target.difference(voters) {
            changes.push(single(ConfChangeType::AddNode, *id));
        }
        for id in voters.difference(target) {
            let kind = if registered.contains(id) {
                ConfChangeType::AddLearnerNode
            } else {
                ConfChangeType::RemoveNode
            };
            changes.push(single(kind, *id));
        }
        if !changes.is_empty() {
            let is_safe = has_live_quorum(view, voters) && has_live_quorum(view, target);
            let transition = ConfChangeTransition::Explicit;
            return is_safe.then(|| ConfChangeV2 { transition, changes, ..Default::default() });
        }
        let new = registered.iter().find(|id| !voters.contains(id) && !learners.contains(id));
        let gone = learners.iter().find(|id| !registered.contains(id));
        let change = match (new, gone) {
            (Some(new), _) => single(ConfChangeType::AddLearnerNode, *new),
            (None, Some(gone)) => single(ConfChangeType::RemoveNode, *gone),
            (None, None) => return None,
        };
        Some(ConfChangeV2 { changes: vec![change], ..Default::default() })
    }
}

/// Down for so long that another node may take its vote.
fn is_lost(view: &View<'_>, node: &Node) -> bool {
    let down_for_ms = node.losses.last().map_or(0, |at| view.cluster_time.since_ms(*at));
    node.condition == Condition::Down && down_for_ms >= REPLACE_VOTER_AFTER_MS
}

/// Whether an instance that can move still is to run there.
fn still_serves(state: &State, node: NodeId) -> bool {
    state.instances_on(node).any(|instance| {
        let service = state.services.find(&instance.service);
        instance.desired == Desired::Run
            && service.is_some_and(|service| state.data_node(service) != Some(node))
    })
}

/// Voters for a count of registered members.
pub fn voter_count(members: usize) -> usize {
    match members {
        0..=2 => 1,
        3..=6 => 3,
        _ => 5,
    }
}

fn has_live_quorum(view: &View<'_>, voters: &BTreeSet<NodeId>) -> bool {
    let live = voters.iter().filter(|id| view.liveness.is_steady(**id, view.now)).count();
    live * 2 > voters.len()
}

fn single(change_type: ConfChangeType, node: NodeId) -> ConfChangeSingle {
    ConfChangeSingle { change_type, node_id: node.0 }
}
