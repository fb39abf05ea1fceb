//! Agrees with every other node on how containers' traffic between the two goes: in clear, or encrypted, and with which
//! keys. Pure.
//!
//! A lane is a way that the whole cluster changes to; each node offers one, and beside it the one it comes from until
//! everybody who is there has changed. A node sends on a lane only when the other one has confirmed that it takes what
//! comes from this node's key there; it takes what comes on any lane that it offers. So a change loses nothing, and
//! needs no common moment.
//!
//! Invariants: nothing is sent on a lane that the other side has not confirmed (`nothing_is_sent_before_it_is_taken`);
//! the old lane is given up only when nobody there sends on it (`the_old_lane_stays_until_nobody_there_uses_it`).

use crate::model::{Gather, NodeId, StartId};
use crate::network::wireguard::{PublicKey, Slot};
use crate::replica::{Lane, Offer, WaysFrame};
use std::collections::{BTreeMap, BTreeSet};

/// One lane as this node offers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    pub offer: Offer,
    /// The tunnel it goes through, unless it is in clear.
    pub slot: Option<Slot>,
}

pub const CLEAR: Held = Held { offer: Offer { lane: Lane::Clear, key: None, port: 0 }, slot: None };

pub struct Lanes {
    start_id: StartId,
    seq: u64,
    wanted: Option<Held>,
    old: Option<Held>,
    peers: BTreeMap<NodeId, WaysFrame>,
    /// The key that the tunnels use for each peer on each lane.
    adopted: BTreeMap<(NodeId, Lane), (PublicKey, u16)>,
    /// Peers that started anew: they know nothing of what they were told.
    unaware: BTreeSet<NodeId>,
    /// Confirmed so lately that the first handshake may not be over.
    cold: BTreeSet<(NodeId, Slot)>,
    /// Why this node can't encrypt.
    obstacle: Option<String>,
}

/// What a tunnel is to know of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Expected {
    pub slot: Slot,
    pub node: NodeId,
    pub key: PublicKey,
    pub port: u16,
}

impl Lanes {
    pub fn new(start_id: StartId) -> Lanes {
        Lanes {
            start_id,
            seq: 0,
            wanted: None,
            old: None,
            peers: BTreeMap::new(),
            adopted: BTreeMap::new(),
            unaware: BTreeSet::new(),
            cold: BTreeSet::new(),
            obstacle: None,
        }
    }

    /// Takes what a peer says; whether it is news.
    pub fn hear(&mut self, from: NodeId, frame: WaysFrame) -> bool {
        let known = self.peers.get(&from);
        // One that was overtaken says nothing new.
        if known.is_some_and(|known| known.start_id == frame.start_id && known.seq >= frame.seq) {
            return false;
        }
        let is_news = known.is_none_or(|known| WaysFrame { seq: known.seq, ..frame.clone() } != *known);
        if known.is_none_or(|known| known.start_id != frame.start_id) {
            self.unaware.insert(from);
        }
        self.peers.insert(from, frame);
        is_news
    }

    /// Peers that started anew since this was last asked.
    pub fn take_unaware(&mut self) -> BTreeSet<NodeId> {
        std::mem::take(&mut self.unaware)
    }

    /// Takes up the peers' keys: a first one at once, another in its place only when the peer is ready for it, so that
    /// what it has still at work is of use until then.
    pub fn adopt(&mut self) {
        let held: Vec<Held> = self.held().collect();
        let mut adopted = BTreeMap::new();
        for (node, frame) in &self.peers {
            for offer in &frame.offers {
                let (Some(key), Some(own)) =
                    (offer.key, held.iter().find(|held| held.offer.lane == offer.lane))
                else {
                    continue;
                };
                let place = (*node, offer.lane);
                let known = self.adopted.get(&place).filter(|_| !frame.confirmed.contains(&own.offer));
                adopted.insert(place, known.copied().unwrap_or((key, offer.port)));
            }
        }
        self.adopted = adopted;
    }

    pub fn retain(&mut self, is_member: impl Fn(NodeId) -> bool) {
        self.peers.retain(|node, _| is_member(*node));
    }

    /// Whether a change to `lane` can begin: there is no other under way.
    pub fn can_begin(&self, lane: Lane) -> bool {
        self.wanted.is_none_or(|wanted| wanted.offer.lane != lane)
            && self.old.is_none_or(|old| old.offer.lane == lane)
    }

    /// What this node offers already of a lane that a change goes back to.
    pub fn offered(&self, lane: Lane) -> Option<Held> {
        self.held().find(|held| held.offer.lane == lane)
    }

    pub fn begin(&mut self, held: Held) {
        self.old = self.wanted.replace(held);
    }

    /// Its tunnel is gone: the lane it had is to begin anew, from the one before it if that is still held.
    pub fn lose(&mut self, slot: Slot) {
        let has_it = |held: Option<Held>| held.is_some_and(|held| held.slot == Some(slot));
        if has_it(self.old) {
            self.old = None;
        }
        if has_it(self.wanted) {
            self.wanted = self.old.take();
        }
    }

    pub fn end(&mut self) -> Option<Held> {
        self.old.take()
    }

    pub fn wanted(&self) -> Option<Held> {
        self.wanted
    }

    /// Newest first.
    pub fn held(&self) -> impl Iterator<Item = Held> + '_ {
        self.wanted.into_iter().chain(self.old)
    }

    pub fn takes_clear(&self) -> bool {
        self.held().any(|held| held.offer.lane == Lane::Clear)
    }

    /// The newest lane on which the peer takes what comes from this node; a cold one only if there is no other.
    pub fn choice(&self, peer: NodeId) -> Option<Held> {
        let mut taken = self.taken_by(peer).peekable();
        while let Some(held) = taken.next() {
            let is_cold = held.slot.is_some_and(|slot| self.cold.contains(&(peer, slot)));
            if !is_cold || taken.peek().is_none() {
                return Some(held);
            }
        }
        None
    }

    /// Newest first.
    fn taken_by(&self, peer: NodeId) -> impl Iterator<Item = Held> + '_ {
        let frame = self.peers.get(&peer);
        self.held().filter(move |held| {
            frame.is_some_and(|frame| {
                frame.confirmed.contains(&held.offer)
                    && frame.offers.iter().any(|offer| offer.lane == held.offer.lane)
            })
        })
    }

    /// Tunnels through which a peer is ready to shake hands.
    pub fn ready(&self) -> BTreeSet<(NodeId, Slot)> {
        let ready = |node: &NodeId| {
            let node = *node;
            self.taken_by(node).filter_map(move |held| Some((node, held.slot?)))
        };
        self.peers.keys().flat_map(ready).gather()
    }

    pub fn set_cold(&mut self, cold: BTreeSet<(NodeId, Slot)>) {
        self.cold = cold;
    }

    /// What the tunnels are to know.
    pub fn expected(&self) -> BTreeSet<Expected> {
        let adopted = self.adopted.iter();
        adopted
            .filter_map(|((node, lane), (key, port))| {
                let slot = self.offered(*lane)?.slot?;
                Some(Expected { slot, node: *node, key: *key, port: *port })
            })
            .gather()
    }

    /// What to tell a peer, of whom the tunnels know `told`.
    pub fn frame(&mut self, peer: NodeId, told: &BTreeSet<Expected>) -> WaysFrame {
        self.seq += 1;
        let is_told = |offer: &&Offer| match (self.offered(offer.lane), offer.key) {
            (Some(Held { slot: Some(slot), .. }), Some(key)) => {
                told.contains(&Expected { slot, node: peer, key, port: offer.port })
            }
            (Some(Held { slot: None, .. }), None) => true,
            _ => false,
        };
        let theirs = self.peers.get(&peer).map(|frame| frame.offers.as_slice()).unwrap_or_default();
        WaysFrame {
            start_id: self.start_id,
            seq: self.seq,
            offers: self.held().map(|held| held.offer).collect(),
            confirmed: theirs.iter().filter(is_told).copied().collect(),
            sends: self.choice(peer).map(|held| held.offer.lane),
            obstacle: self.obstacle.clone(),
        }
    }

    /// Of `present`, who has not changed yet.
    pub fn waits_for(&self, present: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
        let Some(wanted) = self.wanted.map(|held| held.offer.lane) else { return BTreeSet::new() };
        let has_changed = |node: &&NodeId| {
            self.choice(**node).is_some_and(|held| held.offer.lane == wanted)
                && self.peers.get(*node).is_some_and(|frame| frame.sends == Some(wanted))
        };
        present.iter().filter(|node| !has_changed(node)).copied().gather()
    }

    /// Who can't encrypt, and why, as its present run has told.
    pub fn obstacles(&self, is_present: &dyn Fn(NodeId, StartId) -> bool) -> BTreeMap<NodeId, String> {
        let of_peers = self.peers.iter().filter(|(node, frame)| is_present(**node, frame.start_id));
        of_peers.filter_map(|(node, frame)| Some((*node, frame.obstacle.clone()?))).gather()
    }

    /// Whether this run of a peer has said anything yet, and with it whether it could encrypt.
    pub fn has_heard(&self, node: NodeId, run: Option<StartId>) -> bool {
        self.peers.get(&node).is_some_and(|frame| Some(frame.start_id) == run)
    }

    pub fn own_obstacle(&self) -> Option<&str> {
        self.obstacle.as_deref()
    }

    pub fn set_obstacle(&mut self, obstacle: Option<String>) {
        self.obstacle = obstacle;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: NodeId = NodeId(1);
    const TWO: NodeId = NodeId(2);

    fn sealed(epoch: u64, node: u8, slot: Slot) -> Held {
        let offer = Offer { lane: Lane::Sealed { epoch }, key: Some([node; 32]), port: slot.port() };
        Held { offer, slot: Some(slot) }
    }

    /// Two nodes, both in clear.
    struct Pair {
        one: Lanes,
        two: Lanes,
        told_one: BTreeSet<Expected>,
        told_two: BTreeSet<Expected>,
    }

    impl Pair {
        fn in_clear() -> Pair {
            let mut pair = Pair {
                one: Lanes::new(StartId(1)),
                two: Lanes::new(StartId(2)),
                told_one: BTreeSet::new(),
                told_two: BTreeSet::new(),
            };
            pair.one.begin(CLEAR);
            pair.two.begin(CLEAR);
            pair.settle();
            pair
        }

        fn one_tells(&mut self) -> bool {
            self.one.adopt();
            self.told_one = self.one.expected();
            let frame = self.one.frame(TWO, &self.told_one);
            self.two.hear(ONE, frame)
        }

        fn two_tells(&mut self) -> bool {
            self.two.adopt();
            self.told_two = self.two.expected();
            let frame = self.two.frame(ONE, &self.told_two);
            self.one.hear(TWO, frame)
        }

        fn settle(&mut self) {
            while self.one_tells() | self.two_tells() {}
        }

        fn lanes(&self) -> [Option<Lane>; 2] {
            [self.one.choice(TWO), self.two.choice(ONE)].map(|held| held.map(|held| held.offer.lane))
        }
    }

    #[test]
    fn nothing_is_sent_before_it_is_taken() {
        let mut pair = Pair::in_clear();
        assert_eq!(pair.lanes(), [Some(Lane::Clear); 2]);
        pair.one.begin(sealed(1, 1, Slot::First));
        pair.settle();
        assert_eq!(pair.lanes(), [Some(Lane::Clear); 2], "the other one offers no such lane");
        assert_eq!(pair.one.waits_for(&BTreeSet::from([TWO])), BTreeSet::from([TWO]));
        pair.two.begin(sealed(1, 2, Slot::Second));
        let frame = pair.two.frame(ONE, &BTreeSet::new());
        assert!(pair.one.hear(TWO, frame));
        assert_eq!(pair.lanes()[0], Some(Lane::Clear), "offered, and this node's key is not confirmed yet");
        assert!(pair.two_tells() && pair.one_tells());
        assert_eq!(pair.lanes(), [Some(Lane::Sealed { epoch: 1 }); 2]);
        pair.one.adopt();
        let expected = pair.one.expected();
        let of_two = Expected { slot: Slot::First, node: TWO, key: [2; 32], port: Slot::Second.port() };
        assert_eq!(expected, BTreeSet::from([of_two]), "each has its own place for the same lane");
    }

    #[test]
    fn the_old_lane_stays_until_nobody_there_uses_it() {
        let mut pair = Pair::in_clear();
        pair.one.begin(sealed(1, 1, Slot::First));
        pair.two.begin(sealed(1, 2, Slot::First));
        let there = BTreeSet::from([TWO]);
        assert!(pair.one_tells() && pair.two_tells() && pair.one_tells());
        assert!(!pair.one.waits_for(&there).is_empty(), "it has not said yet that it has changed");
        assert!(!pair.one.can_begin(Lane::Sealed { epoch: 2 }), "one change at a time");
        assert!(pair.one.can_begin(Lane::Clear), "but back to where it comes from");
        pair.settle();
        assert!(pair.one.waits_for(&there).is_empty());
        assert_eq!(pair.one.end(), Some(CLEAR));
        assert!(!pair.one.takes_clear() && pair.two.takes_clear());
        pair.settle();
        assert_eq!(pair.lanes(), [Some(Lane::Sealed { epoch: 1 }); 2]);
        pair.one.begin(sealed(2, 11, Slot::Second));
        pair.settle();
        assert_eq!(pair.lanes(), [Some(Lane::Sealed { epoch: 1 }); 2]);
    }

    #[test]
    fn a_lane_is_used_once_its_first_handshake_had_time_unless_it_is_the_only_one() {
        let mut pair = Pair::in_clear();
        pair.one.begin(sealed(1, 1, Slot::First));
        pair.two.begin(sealed(1, 2, Slot::First));
        pair.settle();
        let cold = BTreeSet::from([(TWO, Slot::First)]);
        assert_eq!(pair.one.ready(), cold);
        pair.one.set_cold(cold);
        assert_eq!(pair.lanes()[0], Some(Lane::Clear));
        pair.one.end();
        assert_eq!(pair.lanes()[0], Some(Lane::Sealed { epoch: 1 }));
    }

    #[test]
    fn a_node_that_starts_again_is_waited_for_and_told_anew() {
        let mut pair = Pair::in_clear();
        pair.one.begin(sealed(1, 1, Slot::First));
        pair.two.begin(sealed(1, 2, Slot::First));
        pair.settle();
        pair.two = Lanes::new(StartId(3));
        pair.two.begin(sealed(1, 22, Slot::Second));
        pair.two_tells();
        assert_eq!(pair.one.choice(TWO), None, "it knows nothing of this node's key yet");
        assert_eq!(pair.one.take_unaware(), BTreeSet::from([TWO]));
        pair.one.adopt();
        let keys = |lanes: &Lanes| lanes.expected().into_iter().map(|one| one.key).collect::<Vec<_>>();
        assert_eq!(keys(&pair.one), [[2; 32]], "what its earlier run left at work is not cut off");
        pair.settle();
        assert_eq!(pair.lanes(), [Some(Lane::Sealed { epoch: 1 }); 2]);
    }

    #[test]
    fn a_peer_that_said_nothing_has_not_said_that_it_can() {
        let mut pair = Pair { one: Lanes::new(StartId(1)), ..Pair::in_clear() };
        assert!(!pair.one.has_heard(TWO, Some(StartId(2))));
        pair.two.set_obstacle(Some("no WireGuard".into()));
        pair.two_tells();
        assert!(pair.one.has_heard(TWO, Some(StartId(2))));
        assert!(!pair.one.has_heard(TWO, Some(StartId(3))), "its next run may have another kernel");
        let of = |run| pair.one.obstacles(&|node, told| node == TWO && told == StartId(run));
        assert_eq!(of(2), BTreeMap::from([(TWO, "no WireGuard".to_string())]));
        assert!(of(3).is_empty());
    }

    #[test]
    fn a_lost_tunnel_is_made_anew_with_another_key() {
        let mut pair = Pair::in_clear();
        pair.one.begin(sealed(1, 1, Slot::First));
        pair.two.begin(sealed(1, 2, Slot::First));
        pair.settle();
        // In the middle of the change: back to where it came from, and begun again.
        pair.one.lose(Slot::First);
        assert!(pair.one.takes_clear() && pair.one.can_begin(Lane::Sealed { epoch: 1 }));
        pair.one.begin(sealed(1, 11, Slot::First));
        pair.settle();
        assert_eq!((pair.one.end(), pair.two.end()), (Some(CLEAR), Some(CLEAR)));
        pair.settle();
        assert_eq!(pair.lanes(), [Some(Lane::Sealed { epoch: 1 }); 2]);
        // Afterwards: nothing is sent until there is a new one, least of all in clear.
        pair.one.lose(Slot::First);
        assert_eq!((pair.one.choice(TWO), pair.one.takes_clear()), (None, false));
        pair.one.begin(sealed(1, 12, Slot::Second));
        pair.settle();
        assert_eq!(pair.lanes(), [Some(Lane::Sealed { epoch: 1 }); 2]);
        let keys: Vec<PublicKey> = pair.two.expected().into_iter().map(|one| one.key).collect();
        assert_eq!(keys, [[12; 32]]);
        pair.one.begin(sealed(2, 13, Slot::First));
        pair.one.lose(Slot::Second);
        assert_eq!(pair.one.held().count(), 1, "the old one is only given up earlier");
    }

    #[test]
    fn a_frame_that_was_overtaken_says_nothing() {
        let mut pair = Pair::in_clear();
        let old = pair.two.frame(ONE, &BTreeSet::new());
        pair.two.begin(sealed(1, 2, Slot::First));
        pair.settle();
        assert!(!pair.one.hear(TWO, old));
        assert_eq!(pair.one.peers[&TWO].offers.len(), 2);
    }
}
