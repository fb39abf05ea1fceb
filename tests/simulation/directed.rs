//! A forgotten vote, step by step: chance would need a node to vote, crash, return and vote again in one election.
//!
//! Three real drivers on simulated disks; every message is delivered or dropped by hand.

use crate::checks::Checks;
use crate::disk::{Disk, Image};
use crate::fate::{Bug, Report};
use tinydc::consensus::{Driver, DriverConfig, Effects, Message};
use tinydc::model::NodeId;

/// More than the longest election timeout.
const ELECTION_TICKS: usize = 40;

struct Voter {
    id: u64,
    driver: Driver,
    disk: Disk,
    sent: Vec<Message>,
}

impl Voter {
    fn new(id: u64) -> Voter {
        let disk = Disk::holding(Image::of_voters(&[1, 2, 3]));
        Voter { id, driver: start(id, &disk), disk, sent: Vec::new() }
    }

    fn crash_and_return(&mut self, bug: Bug) {
        self.disk.crash(0);
        if bug == Bug::ForgetVote {
            self.disk.durable.forget_vote();
        }
        self.driver = start(self.id, &self.disk);
        self.sent.clear();
    }

    /// Does all that it is to do, its disk included.
    fn pump(&mut self, checks: &mut Checks) {
        loop {
            let mut effects = Effects::default();
            if !self.driver.pump(&mut effects) {
                if self.disk.waiting() == 0 {
                    break;
                }
                let (last, _) = self.disk.sync(self.disk.waiting());
                self.driver.persisted(last, &mut effects);
            }
            effects.batch.into_iter().for_each(|batch| self.disk.submit(batch));
            self.sent.extend(effects.messages);
            for entry in effects.committed {
                self.driver.applied(entry.index, entry.term);
            }
        }
        if self.driver.is_leader() {
            checks.leads(self.id, self.driver.term());
        }
    }

    /// Ticks until it has something to say: it stands for election.
    fn stand(&mut self, checks: &mut Checks) {
        for _ in 0..ELECTION_TICKS {
            self.driver.tick();
            self.pump(checks);
            if !self.sent.is_empty() {
                return;
            }
        }
        panic!("node {} never stood for election", self.id);
    }
}

fn start(id: u64, disk: &Disk) -> Driver {
    let config = DriverConfig { id: NodeId(id), seed: 1 };
    Driver::new(config, &disk.durable.stored()).expect("a driver starts from its disk")
}

/// Lets two talk until the first leads, or neither has anything to say to the other; what is for the third is lost. What
/// the new leader says of its term is not delivered any more: an entry in the other's log would be held against 3.
fn talk(one: &mut Voter, other: &mut Voter, checks: &mut Checks) {
    for _ in 0..20 {
        for is_first in [true, false] {
            let (from, to) = if is_first { (&mut *one, &mut *other) } else { (&mut *other, &mut *one) };
            for message in std::mem::take(&mut from.sent) {
                if message.to == to.id {
                    to.driver.step(message);
                    to.pump(checks);
                }
            }
        }
        if one.driver.is_leader() || one.sent.is_empty() && other.sent.is_empty() {
            return;
        }
    }
}

/// 2 votes for 1, crashes, returns and is asked by 3, whom nobody told of the election.
pub fn forgotten_vote(bug: Bug) -> Report {
    let mut checks = Checks::default();
    let [mut one, mut two, mut three] = [1, 2, 3].map(Voter::new);
    one.stand(&mut checks);
    talk(&mut one, &mut two, &mut checks);
    assert!(one.driver.is_leader(), "1 was elected by 2");
    two.crash_and_return(bug);
    for _ in 0..3 {
        three.stand(&mut checks);
        talk(&mut three, &mut two, &mut checks);
        if three.driver.is_leader() {
            break;
        }
    }
    assert!(three.driver.is_leader(), "3 was elected by 2, in whatever term");
    assert!(one.driver.is_leader(), "1 has heard of nothing");
    Report { elections: 2, crashes: 1, trace: three.driver.term(), ..Report::default() }
}
