//! Holds the cluster's floating addresses that are this node's turn.
//!
//! Input: the state, who was heard of late. Output: addresses on this node's interfaces, announced by ARP. It does not
//! wait for a leader: when a holder falls silent every node comes to the same successor, and the leader writes it down.
//! What answers on the LAN already is never taken over. A holder that hears most of the cluster defends its address; one
//! that doesn't keeps it, defends it once, and yields to a claim that repeats (RFC 5227 2.4 b).

use super::hints::Hints;
use super::worker::{Shared, chain};
use crate::model::{Gather, NodeId};
use crate::network::arp::{self, Ears};
use crate::network::lan::{self, Interface};
use crate::network::link;
use crate::planner::addresses::{SUSPECTED_AFTER_MS, holder, may_hold};
use crate::replica::Handle;
use crate::state::State;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// A cluster without such addresses is hardly woken.
const LOOK_IDLE: Duration = Duration::from_millis(500);
/// An address that somebody else answers for is asked for again after this.
const PROBE_AGAIN: Duration = Duration::from_secs(1);
/// A holder that most of the cluster hears does not answer a flood with a flood.
const DEFEND_PAUSE: Duration = Duration::from_secs(1);
/// RFC 5227: a second conflict within this time, and the address is given up.
const DEFEND_INTERVAL: Duration = Duration::from_secs(10);
/// An address is announced again, for switches and neighbours that missed it.
const ANNOUNCE_AGAIN: [Duration; 3] =
    [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3)];

/// What `tinydc address ls` shows of this node.
#[derive(Clone, Debug, Default)]
pub struct HeldAddresses {
    pub held: BTreeSet<Ipv4Addr>,
    /// Who answers for an address that should be here.
    pub conflicts: BTreeMap<Ipv4Addr, String>,
}

pub(super) type HeldCell = Mutex<HeldAddresses>;

pub struct Keeper {
    pub node: NodeId,
    pub replica: Handle,
    pub(super) shared: Arc<Shared>,
    /// Read by liveness: which addresses this node could hold.
    pub holdable: Arc<AtomicU16>,
}

struct Held {
    interface: Interface,
    ears: Option<Ears>,
    since: Instant,
    announced: usize,
    defended_at: Option<Instant>,
}

#[derive(Default)]
struct Hands {
    held: BTreeMap<Ipv4Addr, Held>,
    /// Not to be taken before.
    not_before: BTreeMap<Ipv4Addr, Instant>,
    conflicts: BTreeMap<Ipv4Addr, String>,
}

impl Keeper {
    pub async fn run(self) {
        let mut hands = Hands::default();
        let mut is_first = true;
        loop {
            let state = self.replica.state();
            let has_rows = !state.addresses.is_empty();
            // Without such addresses this costs nothing.
            if has_rows || !hands.held.is_empty() || is_first {
                let wanted = self.turn(&state, Instant::now());
                let keeps = std::mem::take(&mut is_first);
                let is_heard = self.is_heard(&state, Instant::now());
                hands = crate::tasks::unblock(move || {
                    if keeps {
                        hands.adopt(&state, &wanted);
                    }
                    hands.work(&state, &wanted, is_heard);
                    hands
                })
                .await;
                self.show(&hands);
            }
            let pause = if hands.held.is_empty() && !has_rows { LOOK_IDLE } else { LOOK_EVERY };
            async_io::Timer::after(pause).await;
        }
    }

    /// The addresses that are this node's to hold, as far as it can tell.
    fn turn(&self, state: &State, now: Instant) -> BTreeSet<Ipv4Addr> {
        let interfaces = lan::interfaces().unwrap_or_default();
        let mut mask = 0u16;
        let mut wanted = BTreeSet::new();
        for (index, row) in state.addresses.rows().enumerate() {
            let can_hold = lan::interface_for(row.address, &interfaces).is_some();
            if can_hold {
                mask |= 1 << index;
            }
            let mut candidates = live_holders(&self.shared.hints, index, now);
            candidates.retain(|node| state.nodes.find(node).is_some_and(may_hold));
            let is_alone = candidates.is_empty();
            let own = state.nodes.find(&self.node);
            let stays = own.is_some_and(|own| may_hold(own) || (own.is_ending && is_alone));
            if can_hold && stays {
                candidates.insert(self.node);
            }
            // The first holder is the leader's choice: nobody else knows whom all can hear.
            let is_mine = || holder(row.address, row.holder, &candidates) == Some(self.node);
            if row.holder.is_some() && is_mine() {
                wanted.insert(row.address);
            }
        }
        self.holdable.store(mask, Ordering::Relaxed);
        wanted
    }

    /// Whether this node hears most of the cluster: then what its state says is no leftover of a partition.
    fn is_heard(&self, state: &State, now: Instant) -> bool {
        let live = self.shared.hints.live(Duration::from_millis(SUSPECTED_AFTER_MS), now).len() + 1;
        live * 2 > state.nodes.len()
    }

    fn show(&self, hands: &Hands) {
        *self.shared.held.lock().unwrap_or_else(PoisonError::into_inner) =
            HeldAddresses { held: hands.held.keys().copied().gather(), conflicts: hands.conflicts.clone() };
    }
}

fn live_holders(hints: &Hints, index: usize, now: Instant) -> BTreeSet<NodeId> {
    let limit = Duration::from_millis(SUSPECTED_AFTER_MS);
    hints.live(limit, now).into_iter().filter(|(_, mask)| mask & (1 << index) != 0).map(|(id, _)| id).gather()
}

impl Hands {
    /// Addresses that an earlier run of the daemon left on this node: kept if they still are its own, else let go.
    fn adopt(&mut self, state: &State, wanted: &BTreeSet<Ipv4Addr>) {
        for interface in lan::interfaces().unwrap_or_default() {
            let address = interface.address;
            let is_ours = interface.prefix_length == 32 && state.addresses.contains(&address);
            if !is_ours {
                continue;
            }
            let lan = lan::interfaces().unwrap_or_default();
            let Some(lan) = lan::interface_for(address, &lan).cloned() else { continue };
            // Not announced: another node may have it by now.
            let announced = ANNOUNCE_AGAIN.len();
            self.held.insert(address, Held { announced, ..Held::new(lan) });
            if !wanted.contains(&address) {
                self.release(address);
            }
        }
    }

    fn work(&mut self, state: &State, wanted: &BTreeSet<Ipv4Addr>, is_heard: bool) {
        let gone: Vec<Ipv4Addr> = self.held.keys().filter(|held| !wanted.contains(held)).copied().collect();
        for address in gone {
            self.release(address);
        }
        self.conflicts.retain(|address, _| wanted.contains(address) && state.addresses.contains(address));
        self.not_before.retain(|address, _| state.addresses.contains(address));
        for address in wanted {
            match self.held.contains_key(address) {
                true => self.tend(*address, is_heard),
                false => self.take(*address),
            }
        }
    }

    fn take(&mut self, address: Ipv4Addr) {
        let now = Instant::now();
        if self.not_before.get(&address).is_some_and(|at| now < *at) {
            return;
        }
        let interfaces = lan::interfaces().unwrap_or_default();
        let Some(interface) = lan::interface_for(address, &interfaces) else { return };
        let outcome = arp::probe(interface, address).and_then(|answer| match answer {
            Some(hardware) => Ok(Some(arp::text_of(hardware))),
            None => {
                let socket = crate::network::netlink::Socket::route()?;
                link::add_address(&socket, interface.index, address, 32)?;
                arp::announce(interface, address)?;
                Ok(None)
            }
        });
        match outcome {
            Ok(None) => {
                info!(%address, interface = interface.name, "holds the floating address");
                self.conflicts.remove(&address);
                self.held.insert(address, Held::new(interface.clone()));
            }
            Ok(Some(by)) => {
                if self.conflicts.insert(address, by.clone()).as_ref() != Some(&by) {
                    warn!(%address, by, "a floating address is answered by another machine");
                }
                self.not_before.insert(address, now + PROBE_AGAIN);
            }
            Err(error) => {
                warn!(%address, error = chain(&error), "take a floating address");
                self.not_before.insert(address, now + PROBE_AGAIN);
            }
        }
    }

    /// Announces again, hears of conflicts, and puts back what somebody took from the interface.
    fn tend(&mut self, address: Ipv4Addr, is_heard: bool) {
        let now = Instant::now();
        let Some(held) = self.held.get_mut(&address) else { return };
        let is_due = ANNOUNCE_AGAIN.get(held.announced).is_some_and(|after| now >= held.since + *after);
        if is_due {
            held.announced += 1;
            note(arp::announce(&held.interface, address), address);
        }
        let claims = held.ears.as_mut().map(Ears::claims).unwrap_or_default();
        let Some(claim) = claims.into_iter().find(|claim| claim.sender == address) else { return };
        let by = arp::text_of(claim.hardware);
        let since = held.defended_at.map(|at| now.duration_since(at));
        if is_heard && since.is_some_and(|since| since < DEFEND_PAUSE) {
            return;
        }
        match !is_heard && since.is_some_and(|since| since < DEFEND_INTERVAL) {
            false => {
                warn!(%address, by, "another machine claims a floating address; defended");
                held.defended_at = Some(now);
                note(arp::announce(&held.interface, address), address);
            }
            true => {
                warn!(%address, by, "another machine claims a floating address again; given up");
                self.release(address);
                self.conflicts.insert(address, by);
                self.not_before.insert(address, now + PROBE_AGAIN);
            }
        }
    }

    fn release(&mut self, address: Ipv4Addr) {
        let Some(held) = self.held.remove(&address) else { return };
        let outcome = crate::network::netlink::Socket::route()
            .and_then(|socket| link::delete_address(&socket, held.interface.index, address, 32));
        match outcome {
            Ok(()) => info!(%address, "let the floating address go"),
            // Gone with its interface.
            Err(error) => warn!(%address, %error, "let the floating address go"),
        }
    }
}

fn note(outcome: io::Result<()>, address: Ipv4Addr) {
    if let Err(error) = outcome {
        warn!(%address, %error, "announce a floating address");
    }
}

impl Held {
    fn new(interface: Interface) -> Held {
        let ears = Ears::open(&interface).ok();
        Held { interface, ears, since: Instant::now(), announced: 0, defended_at: None }
    }
}

impl Shared {
    pub(super) fn held_addresses(&self) -> HeldAddresses {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
