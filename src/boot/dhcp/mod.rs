//! A DHCPv4 client without a socket: times and packets in, packets and an address out. Pure.
//!
//! Input: `step(now, Event)`. Output: what to send, and a change of the lease. It never waits and holds no clock;
//! `deadline` says when it wants to be called next.
//!
//! Invariant: an address is used only within its lease (`an_expired_lease_is_given_up`), and a server that stays away
//! is never asked more than once a second (`waiting_grows`).

pub mod packet;

use packet::{Answer, Ask, Asker, Lease};
use std::net::Ipv4Addr;

const RETRY_MS_MIN: u64 = 1_000;
const RETRY_MS_MAX: u64 = 32_000;
/// While a lease is held the server is asked again at half of what is left, but not more often than this.
const RENEW_MS_MIN: u64 = 5_000;
/// How often an address that was held before, or an offer, is asked for before starting over.
const REQUESTS_MAX: u32 = 3;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    /// The link is down, or nobody has asked for anything.
    Idle,
    Selecting,
    Requesting {
        address: Ipv4Addr,
        server: Option<Ipv4Addr>,
        sent: u32,
    },
    Bound {
        lease: Lease,
        since_ms: u64,
    },
}

pub enum Event<'a> {
    /// With a random number for the exchange.
    LinkUp {
        random: u32,
    },
    LinkDown,
    Packet(&'a [u8]),
    Tick,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// `to`: a server, or everyone.
    Send {
        bytes: Vec<u8>,
        to: Option<Ipv4Addr>,
    },
    Use(Lease),
    /// The address must not be used any more.
    Drop,
}

#[derive(Clone, Debug)]
pub struct Client {
    hardware: [u8; 6],
    host_name: String,
    phase: Phase,
    exchange: u32,
    began_ms: u64,
    retry_ms: u64,
    next_ms: u64,
    /// Asked for first when the link comes back: mostly it is still ours.
    last_address: Option<Ipv4Addr>,
}

impl Client {
    pub fn new(hardware: [u8; 6], host_name: &str) -> Client {
        Client {
            hardware,
            host_name: host_name.into(),
            phase: Phase::Idle,
            exchange: 0,
            began_ms: 0,
            retry_ms: RETRY_MS_MIN,
            next_ms: u64::MAX,
            last_address: None,
        }
    }

    /// When `Tick` is due.
    pub fn deadline_ms(&self) -> Option<u64> {
        (self.next_ms != u64::MAX).then_some(self.next_ms)
    }

    pub fn lease(&self) -> Option<&Lease> {
        match &self.phase {
            Phase::Bound { lease, .. } => Some(lease),
            _ => None,
        }
    }

    pub fn step(&mut self, now_ms: u64, event: Event<'_>) -> Vec<Output> {
        match event {
            Event::LinkUp { random } => self.begin(now_ms, random),
            Event::LinkDown => {
                self.next_ms = u64::MAX;
                let held = matches!(std::mem::replace(&mut self.phase, Phase::Idle), Phase::Bound { .. });
                if held { vec![Output::Drop] } else { Vec::new() }
            }
            Event::Packet(bytes) => match packet::decode(bytes, &self.asker(now_ms)) {
                Some(answer) => self.take(now_ms, answer),
                None => Vec::new(),
            },
            Event::Tick if now_ms >= self.next_ms => self.tick(now_ms),
            Event::Tick => Vec::new(),
        }
    }

    fn asker(&self, now_ms: u64) -> Asker {
        let seconds = now_ms.saturating_sub(self.began_ms) / 1000;
        Asker {
            hardware: self.hardware,
            exchange: self.exchange,
            host_name: self.host_name.clone(),
            seconds: seconds.min(u64::from(u16::MAX)) as u16,
        }
    }

    fn begin(&mut self, now_ms: u64, random: u32) -> Vec<Output> {
        (self.exchange, self.began_ms) = (random, now_ms);
        self.retry_ms = RETRY_MS_MIN;
        self.phase = match self.last_address {
            Some(address) => Phase::Requesting { address, server: None, sent: 0 },
            None => Phase::Selecting,
        };
        self.tick(now_ms)
    }

    fn start_over(&mut self, now_ms: u64) -> Vec<Output> {
        self.last_address = None;
        // Told apart from the exchange that failed, without asking for randomness again.
        self.exchange = self.exchange.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.phase = Phase::Selecting;
        self.tick(now_ms)
    }

    fn tick(&mut self, now_ms: u64) -> Vec<Output> {
        match self.phase.clone() {
            Phase::Idle => Vec::new(),
            Phase::Selecting => {
                self.wait_longer(now_ms);
                vec![self.send(now_ms, Ask::Discover, None)]
            }
            Phase::Requesting { sent, .. } if sent >= REQUESTS_MAX => self.start_over(now_ms),
            Phase::Requesting { address, server, sent } => {
                self.phase = Phase::Requesting { address, server, sent: sent + 1 };
                self.next_ms = now_ms + RETRY_MS_MIN;
                vec![self.send(now_ms, Ask::Request { address, server }, None)]
            }
            Phase::Bound { lease, since_ms } => self.prolong(now_ms, &lease, since_ms),
        }
    }

    fn prolong(&mut self, now_ms: u64, lease: &Lease, since_ms: u64) -> Vec<Output> {
        let at = |seconds: u32| since_ms + u64::from(seconds) * 1000;
        if now_ms >= at(lease.lease_s) {
            self.retry_ms = RETRY_MS_MIN;
            let mut outputs = vec![Output::Drop];
            outputs.extend(self.start_over(now_ms));
            return outputs;
        }
        let is_rebinding = now_ms >= at(lease.rebind_s);
        let goal = if is_rebinding { at(lease.lease_s) } else { at(lease.rebind_s) };
        let half = (goal.saturating_sub(now_ms) / 2).max(RENEW_MS_MIN);
        self.next_ms = (now_ms + half).min(goal.max(now_ms + 1));
        let to = if is_rebinding { None } else { Some(lease.server) };
        vec![self.send(now_ms, Ask::Renew { address: lease.address }, to)]
    }

    fn wait_longer(&mut self, now_ms: u64) {
        self.next_ms = now_ms + self.retry_ms;
        self.retry_ms = (self.retry_ms * 2).min(RETRY_MS_MAX);
    }

    fn send(&self, now_ms: u64, ask: Ask, to: Option<Ipv4Addr>) -> Output {
        Output::Send { bytes: packet::encode(&self.asker(now_ms), ask), to }
    }

    fn take(&mut self, now_ms: u64, answer: Answer) -> Vec<Output> {
        match (&self.phase, answer) {
            (Phase::Selecting, Answer::Offer(offer)) => {
                self.phase =
                    Phase::Requesting { address: offer.address, server: Some(offer.server), sent: 0 };
                self.tick(now_ms)
            }
            (Phase::Requesting { .. } | Phase::Bound { .. }, Answer::Granted(lease)) => {
                let is_same = self.lease().is_some_and(|held| {
                    (held.address, held.prefix_length, held.router)
                        == (lease.address, lease.prefix_length, lease.router)
                });
                let had_other = self.lease().is_some() && !is_same;
                self.retry_ms = RETRY_MS_MIN;
                self.last_address = Some(lease.address);
                self.next_ms = now_ms + u64::from(lease.renew_s) * 1000;
                self.phase = Phase::Bound { lease: lease.clone(), since_ms: now_ms };
                let mut outputs = Vec::new();
                if had_other {
                    outputs.push(Output::Drop);
                }
                outputs.push(Output::Use(lease));
                outputs
            }
            (Phase::Requesting { .. }, Answer::Refused) => self.start_over(now_ms),
            (Phase::Bound { .. }, Answer::Refused) => {
                let mut outputs = vec![Output::Drop];
                outputs.extend(self.start_over(now_ms));
                outputs
            }
            _ => Vec::new(),
        }
    }

    /// Gives the address back, at an orderly end.
    pub fn release(&self, now_ms: u64) -> Option<Output> {
        let lease = self.lease()?;
        let ask = Ask::Release { address: lease.address, server: lease.server };
        Some(self.send(now_ms, ask, Some(lease.server)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use packet::tests::answer;

    const ADDRESS: [u8; 4] = [192, 168, 1, 50];

    fn client() -> Client {
        Client::new([2, 0, 0, 0, 0, 7], "pi1")
    }

    fn bound(lease_s: u32) -> Client {
        let mut client = client();
        client.step(0, Event::LinkUp { random: 5 });
        let sent = client.step(10, Event::Packet(&answer(2, 5, ADDRESS, lease_s)));
        assert!(matches!(sent[..], [Output::Send { to: None, .. }]), "the offer is asked for: {sent:?}");
        let used = client.step(20, Event::Packet(&answer(5, 5, ADDRESS, lease_s)));
        assert!(matches!(&used[..], [Output::Use(lease)] if lease.address == Ipv4Addr::from(ADDRESS)));
        client
    }

    #[test]
    fn an_expired_lease_is_given_up() {
        let mut client = bound(1000);
        let (mut to_server, mut to_all) = (0, 0);
        let now = loop {
            let now = client.deadline_ms().unwrap();
            let outputs = client.step(now, Event::Tick);
            if outputs.first() == Some(&Output::Drop) {
                break now;
            }
            for output in outputs {
                match output {
                    Output::Send { to: Some(_), .. } => to_server += 1,
                    Output::Send { to: None, .. } => to_all += 1,
                    other => panic!("{other:?}"),
                }
            }
        };
        assert_eq!(now, 20 + 1_000_000);
        assert!(to_server >= 3 && to_all >= 3, "{to_server} renewals, {to_all} to anyone");
        assert!(client.lease().is_none() && client.deadline_ms().unwrap() > now);
    }

    #[test]
    fn a_renewal_that_changes_the_address_drops_the_old_one() {
        let mut client = bound(1000);
        assert_eq!(client.deadline_ms(), Some(20 + 500_000));
        client.step(500_020, Event::Tick);
        let same = client.step(500_030, Event::Packet(&answer(5, 5, ADDRESS, 1000)));
        assert!(matches!(same[..], [Output::Use(_)]));
        let other = client.step(500_040, Event::Packet(&answer(5, 5, [192, 168, 1, 99], 1000)));
        assert!(matches!(other[..], [Output::Drop, Output::Use(_)]), "{other:?}");
        let refused = client.step(500_050, Event::Packet(&answer(6, 5, [0; 4], 0)));
        assert!(matches!(refused[..], [Output::Drop, Output::Send { .. }]), "{refused:?}");
    }

    #[test]
    fn waiting_grows() {
        let mut client = client();
        client.step(0, Event::LinkUp { random: 5 });
        let mut gaps = Vec::new();
        let mut now = 0;
        for _ in 0..8 {
            let next = client.deadline_ms().unwrap();
            assert!(client.step(next - 1, Event::Tick).is_empty(), "nothing before its time");
            assert_eq!(client.step(next, Event::Tick).len(), 1);
            gaps.push((next - now) / 1000);
            now = next;
        }
        assert_eq!(gaps, [1, 2, 4, 8, 16, 32, 32, 32]);
    }

    #[test]
    fn a_cable_put_back_asks_for_the_old_address_first() {
        let mut client = bound(1000);
        assert_eq!(client.step(100, Event::LinkDown), [Output::Drop]);
        assert_eq!(client.deadline_ms(), None);
        let sent = client.step(200, Event::LinkUp { random: 6 });
        assert!(matches!(&sent[..], [Output::Send { bytes, .. }] if bytes[242] == 3), "a request");
        // Another network: refused, and everything from the start.
        let sent = client.step(210, Event::Packet(&answer(6, 6, [0; 4], 0)));
        assert!(matches!(&sent[..], [Output::Send { bytes, .. }] if bytes[242] == 1), "a discover");
    }
}
