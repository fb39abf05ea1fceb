//! The driver's rules, each shown on real raft nodes that exchange messages by hand.

use super::*;
use crate::model::NodeId;

/// A node and what it was told to do but has not done: batches that are not on disk yet.
struct Bench {
    driver: Driver,
    waiting: Vec<Batch>,
    sent: Vec<Message>,
    committed: Vec<Entry>,
    installed: Option<u64>,
}

impl Bench {
    fn new(id: u64, voters: &[u64], learners: &[u64]) -> Bench {
        let conf_state =
            ConfState { voters: voters.to_vec(), learners: learners.to_vec(), ..ConfState::default() };
        let is_member = !voters.is_empty();
        let stored = Stored {
            hard_state: HardState { term: u64::from(is_member), vote: 0, commit: u64::from(is_member) },
            conf_state,
            applied: u64::from(is_member),
            compacted: (u64::from(is_member), u64::from(is_member)),
            ..Stored::default()
        };
        let config = DriverConfig { id: NodeId(id), seed: 1 };
        let driver = Driver::new(config, &stored).unwrap();
        Bench { driver, waiting: Vec::new(), sent: Vec::new(), committed: Vec::new(), installed: None }
    }

    fn pump(&mut self) {
        loop {
            let mut effects = Effects::default();
            if !self.driver.pump(&mut effects) {
                break;
            }
            self.take(effects);
        }
    }

    fn take(&mut self, effects: Effects) {
        if let Some(image) = effects.install {
            self.installed = Some(image.index);
        }
        self.waiting.extend(effects.batch);
        self.sent.extend(effects.messages);
        for entry in effects.committed {
            if entry.get_entry_type() != EntryType::EntryNormal {
                self.driver.apply_conf_change(&entry).unwrap();
            }
            self.driver.applied(entry.index, entry.term);
            self.committed.push(entry);
        }
    }

    /// The disk finishes all it was given.
    fn sync(&mut self) {
        while let Some(number) = self.waiting.iter().map(|batch| batch.number).max() {
            self.waiting.clear();
            let mut effects = Effects::default();
            self.driver.persisted(number, &mut effects);
            self.take(effects);
            self.pump();
        }
    }

    fn tick(&mut self, count: usize) {
        for _ in 0..count {
            self.driver.tick();
            self.pump();
        }
    }
}

/// Delivers everything until nothing moves; disks are quick.
fn exchange(benches: &mut [Bench]) {
    for _ in 0..200 {
        let mut messages = Vec::new();
        for bench in benches.iter_mut() {
            bench.sync();
            messages.append(&mut bench.sent);
        }
        if messages.is_empty() {
            return;
        }
        for message in messages {
            if let Some(bench) = benches.get_mut(message.to as usize - 1) {
                bench.driver.step(message);
                bench.pump();
            }
        }
    }
}

fn three() -> [Bench; 3] {
    let mut benches = [1, 2, 3].map(|id| Bench::new(id, &[1, 2, 3], &[]));
    for _ in 0..60 {
        for bench in benches.iter_mut() {
            bench.tick(1);
        }
        exchange(&mut benches);
    }
    assert_eq!(benches.iter().filter(|bench| bench.driver.is_leader()).count(), 1);
    benches
}

fn leader_of(benches: &mut [Bench]) -> &mut Bench {
    benches.iter_mut().find(|bench| bench.driver.is_leader()).unwrap()
}

#[test]
fn a_sole_voter_sends_nothing_of_a_term_not_on_disk() {
    let mut bench = Bench::new(1, &[1], &[2]);
    while !bench.driver.is_leader() {
        bench.tick(1);
    }
    bench.driver.propose(vec![1]);
    bench.pump();
    bench.tick(10);
    assert!(!bench.waiting.is_empty());
    assert_eq!(bench.sent, Vec::new(), "a crash now would un-happen what the learner saw");
    bench.sync();
    assert!(!bench.sent.is_empty());
}

#[test]
fn a_commit_index_alone_causes_no_write() {
    let mut benches = three();
    let writes = |benches: &[Bench; 3]| benches.iter().map(|bench| bench.waiting.len()).sum::<usize>();
    for _ in 0..200 {
        for bench in benches.iter_mut() {
            bench.tick(1);
        }
        assert_eq!(writes(&benches), 0, "an idle tick asked for a write");
        exchange(&mut benches);
    }
    let leader = leader_of(&mut benches);
    assert!(leader.driver.propose(vec![1]));
    leader.pump();
    assert_eq!(leader.waiting.len(), 1);
}

#[test]
fn a_leader_s_heartbeats_go_on_while_its_disk_stalls() {
    let mut benches = three();
    let leader = leader_of(&mut benches);
    assert!(leader.driver.propose(vec![1]));
    leader.pump();
    leader.sent.clear();
    leader.tick(20);
    let beats = leader.sent.iter().filter(|message| message.msg_type == MessageType::MsgHeartbeat).count();
    assert!(beats >= 2 * 5, "{beats} heartbeats in 20 ticks without a disk");
}

#[test]
fn a_follower_acknowledges_nothing_that_is_not_on_disk() {
    let mut benches = three();
    let leader = leader_of(&mut benches);
    assert!(leader.driver.propose(vec![1]));
    leader.pump();
    let append =
        leader.sent.iter().find(|message| message.msg_type == MessageType::MsgAppend).unwrap().clone();
    let follower = &mut benches[append.to as usize - 1];
    follower.driver.step(append);
    follower.pump();
    let acknowledges = |message: &Message| message.msg_type == MessageType::MsgAppendResponse;
    assert!(!follower.sent.iter().any(acknowledges));
    follower.sync();
    assert!(follower.sent.iter().any(acknowledges));
}

#[test]
fn elections_repeat_with_the_seed() {
    let ticks_until_campaign = |seed: u64| {
        let stored = Stored {
            hard_state: HardState { term: 1, vote: 0, commit: 1 },
            conf_state: ConfState { voters: vec![1, 2, 3], ..ConfState::default() },
            applied: 1,
            compacted: (1, 1),
            ..Stored::default()
        };
        let mut driver = Driver::new(DriverConfig { id: NodeId(1), seed }, &stored).unwrap();
        for tick in 1.. {
            driver.tick();
            let mut effects = Effects::default();
            driver.pump(&mut effects);
            if !effects.messages.is_empty() {
                return tick;
            }
        }
        unreachable!("a node without a leader campaigns");
    };
    let all: Vec<u32> = (0..20).map(ticks_until_campaign).collect();
    assert_eq!(all, (0..20).map(ticks_until_campaign).collect::<Vec<u32>>());
    assert!(all.iter().any(|ticks| *ticks != all[0]), "all seeds campaign at once: {all:?}");
    assert!(all.iter().all(|ticks| (25..=35).contains(ticks)), "{all:?}");
}

#[test]
fn a_removed_leader_steps_down() {
    let mut benches = three();
    let leader = leader_of(&mut benches);
    let id = leader.driver.leader().unwrap().0;
    let single = ConfChangeSingle { change_type: ConfChangeType::RemoveNode, node_id: id };
    let change = ConfChangeV2 { changes: vec![single], ..ConfChangeV2::default() };
    assert!(leader.driver.propose_conf_change(change));
    leader.pump();
    exchange(&mut benches);
    let removed = &mut benches[id as usize - 1];
    assert!(!removed.driver.is_leader(), "it would panic at its next commit");
    removed.tick(100);
}

#[test]
fn nothing_happens_while_a_snapshot_is_being_written() {
    let mut leader = Bench::new(1, &[1], &[2]);
    while !leader.driver.is_leader() {
        leader.tick(1);
        leader.sync();
    }
    let mut joiner = Bench::new(2, &[], &[]);
    let mut snapshot = None;
    for _ in 0..100 {
        leader.tick(1);
        leader.sync();
        for mut message in std::mem::take(&mut leader.sent) {
            if message.msg_type == MessageType::MsgSnapshot {
                leader.driver.align_snapshot(&mut message);
                snapshot = Some(message);
            } else {
                joiner.driver.step(message);
                joiner.pump();
            }
        }
        joiner.sync();
        for message in std::mem::take(&mut joiner.sent) {
            leader.driver.step(message);
            leader.pump();
        }
        if snapshot.is_some() {
            break;
        }
    }
    let snapshot = snapshot.expect("a joiner whose entries were compacted gets a snapshot");
    let index = snapshot.get_snapshot().get_metadata().index;
    joiner.driver.step_snapshot(snapshot, vec![vec![0]]);
    joiner.pump();
    assert_eq!(joiner.installed, Some(index));
    assert_eq!(joiner.waiting.len(), 1);
    joiner.tick(10);
    assert_eq!(joiner.waiting.len(), 1, "a Ready came before the snapshot was on disk");
    joiner.sync();
    assert_eq!(joiner.driver.conf_state().learners, vec![2]);
    assert_eq!(joiner.driver.last_index(), index);
}

#[test]
fn an_empty_payload_is_the_default_message() {
    let mut change = ConfChangeV2 { context: vec![1], ..ConfChangeV2::default() };
    protobuf::Message::merge_from_bytes(&mut change, &[]).unwrap();
    assert_eq!(change, ConfChangeV2::default());
    assert!(protobuf::Message::write_to_bytes(&ConfChangeV2::default()).unwrap().is_empty());
}
