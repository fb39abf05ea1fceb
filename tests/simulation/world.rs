//! Nodes, network, disks, clocks, clients and a nemesis, all driven by one queue of events and one random stream.

use super::checks::Checks;
use super::disk::{Disk, Image};
use super::fate::{Bug, Random, Report};
use super::linearizable::{Kind, Operation, is_linearizable};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use tinydc::consensus::{Message, MessageType};
use tinydc::control::{Alive, Control, ControlConfig, Figures, Input, Now, Output};
use tinydc::model::*;
use tinydc::state::{Cluster, Command, InstanceReport, JoinNode, NodeReport, RequestMark, TokenKind};

const NODES_MAX: u64 = 5;
const MS: u64 = 1;
const SECRET_HASH: [u8; 32] = [7; 32];

enum Event {
    Tick { node: u64, run: u64 },
    Deliver { to: u64, packet: Packet },
    Synced { node: u64, run: u64, count: usize },
    Agent { node: u64, run: u64 },
    Client(usize),
    ClientTimeout { client: usize, waiter: u64 },
    Nemesis,
    Start(u64),
}

#[derive(Clone)]
enum Packet {
    Raft { from: u64, message: Box<Message> },
    Snapshot { from: u64, message: Box<Message>, frames: Vec<Vec<u8>> },
    Alive { from: u64, alive: Alive },
    Forward { from: u64, command: Box<Command> },
}

struct Node {
    control: Control,
    run: u64,
    start_id: StartId,
    reported: u64,
}

struct Client {
    busy: Option<(u64, usize)>,
    retry: Option<(RequestMark, usize, Command)>,
}

pub struct World {
    seed: u64,
    bug: Bug,
    random: Random,
    now: u64,
    queue: BinaryHeap<Reverse<(u64, u64)>>,
    events: BTreeMap<u64, Event>,
    next_event: u64,
    runs: u64,
    nodes: BTreeMap<u64, Option<Node>>,
    disks: BTreeMap<u64, Disk>,
    /// Thousandths of real speed, per node.
    speed: BTreeMap<u64, u64>,
    slow_disk: BTreeSet<u64>,
    cut: BTreeSet<(u64, u64)>,
    is_calm: bool,
    clients: Vec<Client>,
    history: Vec<(u64, Operation)>,
    next_waiter: u64,
    next_value: u64,
    next_request: u128,
    token: Option<TokenId>,
    checks: Checks,
    report: Report,
}

impl World {
    pub fn new(seed: u64, bug: Bug) -> World {
        let mut world = World {
            seed,
            bug,
            random: Random(seed.wrapping_mul(0x51_7c_c1_b7_27_22_0a_95)),
            now: 0,
            queue: BinaryHeap::new(),
            events: BTreeMap::new(),
            next_event: 0,
            runs: 0,
            nodes: BTreeMap::new(),
            disks: BTreeMap::new(),
            speed: BTreeMap::new(),
            slow_disk: BTreeSet::new(),
            cut: BTreeSet::new(),
            is_calm: true,
            clients: Vec::new(),
            history: Vec::new(),
            next_waiter: 0,
            next_value: 0,
            next_request: 0,
            token: None,
            checks: Checks::default(),
            report: Report::default(),
        };
        for node in 1..=NODES_MAX {
            world.nodes.insert(node, None);
            world.disks.insert(node, Disk::default());
            let speed = 970 + world.random.below(60);
            world.speed.insert(node, speed);
        }
        world
    }

    pub fn calm(seed: u64) -> World {
        World::new(seed, Bug::None)
    }

    pub fn run_to_the_end(mut self) -> Report {
        let members = 2 + self.random.below(NODES_MAX - 1);
        self.found_with_members(members);
        self.deploy();
        for client in 0..4 {
            self.clients.push(Client { busy: None, retry: None });
            self.at(client as u64 * 7, Event::Client(client));
        }
        self.is_calm = false;
        self.at(500, Event::Nemesis);
        self.run_for(60_000);
        self.finish();
        self.report.trace = mix(self.report.trace ^ self.now);
        self.report.simulated_ms = self.now;
        self.report.elections = self.checks.elections;
        self.report
    }

    // ---- time

    fn at(&mut self, delay_ms: u64, event: Event) {
        self.next_event += 1;
        self.queue.push(Reverse((self.now + delay_ms, self.next_event)));
        self.events.insert(self.next_event, event);
    }

    pub fn run_for(&mut self, ms: u64) {
        let until = self.now + ms;
        while let Some(Reverse((time, id))) = self.queue.peek().copied() {
            if time > until {
                break;
            }
            self.queue.pop();
            self.now = time;
            if let Some(event) = self.events.remove(&id) {
                self.handle(event);
            }
        }
        self.now = until;
    }

    /// The node's own clock runs a little fast or slow.
    fn now_of(&self, node: u64) -> Now {
        Now { mono: Mono(1_000_000 + self.now * self.speed[&node] / 1000), wall: None }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Tick { node, run } => {
                if self.is_run(node, run) {
                    let tick_ms = self.node(node).control.tick_ms();
                    self.at(tick_ms * 1000 / self.speed[&node], Event::Tick { node, run });
                    let figures = Figures { memory_available_bytes: 1 << 30, ..Figures::default() };
                    self.step(node, Input::Tick { figures });
                }
            }
            Event::Deliver { to, packet } => self.deliver(to, packet),
            Event::Synced { node, run, count } => {
                if self.is_run(node, run) {
                    let (number, entries) = self.disk(node).sync(count);
                    self.checks.appends(&entries);
                    self.disk(node).is_syncing = false;
                    if self.bug != Bug::AcknowledgeBeforeWrite {
                        self.step(node, Input::Persisted { number });
                    }
                    self.start_sync(node);
                }
            }
            Event::Agent { node, run } => {
                if self.is_run(node, run) {
                    self.at(200, Event::Agent { node, run });
                    self.run_agent(node);
                }
            }
            Event::Client(client) => self.run_client(client),
            Event::ClientTimeout { client, waiter } => self.time_out(client, waiter),
            Event::Nemesis => self.strike(),
            Event::Start(node) => self.start(node),
        }
    }

    fn is_run(&self, node: u64, run: u64) -> bool {
        self.nodes[&node].as_ref().is_some_and(|node| node.run == run)
    }

    fn node(&mut self, node: u64) -> &mut Node {
        self.nodes.get_mut(&node).and_then(Option::as_mut).expect("the node runs")
    }

    fn disk(&mut self, node: u64) -> &mut Disk {
        self.disks.get_mut(&node).expect("every node has a disk")
    }

    // ---- nodes

    fn start(&mut self, node: u64) {
        if self.nodes[&node].is_some() {
            return;
        }
        self.runs += 1;
        let start_id = StartId(u128::from(self.runs));
        let config = ControlConfig { node: NodeId(node), start_id, seed: self.seed };
        let stored = self.disks[&node].durable.stored();
        let control = Control::new(config, self.now_of(node), stored).expect("a stored state loads");
        self.checks_state(&control);
        let run = self.runs;
        self.nodes.insert(node, Some(Node { control, run, start_id, reported: 0 }));
        let jitter = self.random.below(100);
        self.at(jitter, Event::Tick { node, run });
        self.at(jitter + 50, Event::Agent { node, run });
    }

    fn crash(&mut self, node: u64) {
        if self.nodes.insert(node, None).flatten().is_none() {
            return;
        }
        self.report.crashes += 1;
        let waiting = self.disk(node).waiting();
        let kept = self.random.below(waiting as u64 + 1) as usize;
        if self.bug == Bug::ReorderBatches && waiting > 1 {
            self.disk(node).crash_out_of_order();
        } else {
            let lost = self.disk(node).crash(kept) as u64;
            self.report.lost_batches += lost;
        }
    }

    fn checks_state(&mut self, control: &Control) {
        let status = control.status(Now::default());
        self.checks.applies(status.applied, control.state().digest());
    }

    fn step(&mut self, node: u64, input: Input) {
        if self.nodes[&node].is_none() {
            return;
        }
        let now = self.now_of(node);
        let outputs = self.node(node).control.step(now, input);
        let driver = self.node(node).control.driver();
        if driver.is_leader() {
            let term = driver.term();
            self.checks.leads(node, term);
        }
        for output in outputs {
            self.carry_out(node, output);
        }
    }

    fn carry_out(&mut self, node: u64, output: Output) {
        match output {
            Output::Send { to, message } => {
                self.trace(node, to.0, message.msg_type as u64, message.index, message.term);
                let copy: Message = recode(&message);
                // A forwarded read carries its context as an entry of no index.
                if copy.msg_type == MessageType::MsgAppend {
                    self.checks.appends(&copy.entries);
                }
                self.send(node, to.0, Packet::Raft { from: node, message: Box::new(copy) });
            }
            Output::SendSnapshot { to, message, frames } => {
                self.report.snapshots += 1;
                let packet =
                    Packet::Snapshot { from: node, message: Box::new(message), frames: frames.to_vec() };
                self.send(node, to.0, packet);
            }
            Output::Forward { to, command } => self.send(node, to.0, Packet::Forward { from: node, command }),
            Output::Persist(batch) => {
                self.report.conf_changes += u64::from(batch.conf_state.is_some());
                let number = batch.number;
                self.disk(node).submit(batch);
                if self.bug == Bug::LoseRows {
                    self.disk(node).drop_rows_of_last();
                }
                self.start_sync(node);
                if self.bug == Bug::AcknowledgeBeforeWrite {
                    self.step(node, Input::Persisted { number });
                }
            }
            Output::Broadcast(alive) => {
                for to in (1..=NODES_MAX).filter(|to| *to != node) {
                    self.send(node, to, Packet::Alive { from: node, alive });
                }
            }
            Output::Done { waiter, result } => {
                self.finish_write(waiter, result.ok().map(|applied| applied.outcome.is_ok()));
            }
            Output::ReadReady { waiter, result } => self.finish_read(node, waiter, result.is_ok()),
            Output::WithdrawKey { from } => {
                let command = Box::new(Command::ConfirmKey { node: from, has_key: false });
                self.send(from.0, node, Packet::Forward { from: from.0, command });
            }
            Output::OfferKey { to } => {
                let command = Box::new(Command::ConfirmKey { node: to, has_key: true });
                self.send(to.0, node, Packet::Forward { from: to.0, command });
            }
            Output::Changed => {
                let control = &self.nodes[&node].as_ref().expect("the node runs").control;
                let applied = control.applied();
                // A digest costs more than a step: every state of some indices is compared, on all nodes.
                if applied.is_multiple_of(16) {
                    let digest = control.state().digest();
                    self.checks.applies(applied, digest);
                }
            }
            Output::Halt { why } => panic!("n{node} halts: {why}"),
        }
    }

    fn trace(&mut self, from: u64, to: u64, kind: u64, index: u64, term: u64) {
        let event = self.now ^ (kind << 32) ^ (from << 8) ^ to ^ (index << 16) ^ (term << 48);
        self.report.trace = mix(self.report.trace ^ event);
    }

    // ---- disk

    /// One write at a time; it takes all batches that wait.
    fn start_sync(&mut self, node: u64) {
        let count = self.disk(node).waiting();
        if count == 0 || self.disk(node).is_syncing {
            return;
        }
        let slow = self.slow_disk.contains(&node) && !self.is_calm;
        let delay = if slow { 50 + self.random.below(1500) } else { 1 + self.random.below(15) };
        self.disk(node).is_syncing = true;
        let run = self.node(node).run;
        self.at(delay * MS, Event::Synced { node, run, count });
    }

    pub fn batches_written(&self) -> u64 {
        self.disks.values().map(|disk| disk.written).sum()
    }

    /// Lets a clean flush happen, so that what waits is not taken for a periodic write.
    pub fn settle_writes(&mut self) {
        for node in 1..=NODES_MAX {
            self.step(node, Input::Flush);
        }
        self.run_for(100);
    }

    // ---- network

    fn send(&mut self, from: u64, to: u64, packet: Packet) {
        if to == 0 || to > NODES_MAX || self.cut.contains(&(from, to)) {
            return;
        }
        let (drop, twice, late) = if self.is_calm { (0, 0, 0) } else { (2, 1, 3) };
        if self.random.percent(drop) {
            return;
        }
        let mut delay = 1 + self.random.below(4);
        if self.random.percent(late) {
            delay += self.random.below(300);
        }
        if self.random.percent(twice) {
            let again = delay + self.random.below(50);
            self.at(again, Event::Deliver { to, packet: packet.clone() });
        }
        self.at(delay, Event::Deliver { to, packet });
    }

    fn deliver(&mut self, to: u64, packet: Packet) {
        match packet {
            Packet::Raft { from, message } => {
                if !self.cut.contains(&(from, to)) {
                    self.step(to, Input::Message { from: NodeId(from), message: *message });
                }
            }
            Packet::Snapshot { from, message, frames } => {
                let is_received = self.nodes[&to].is_some() && !self.cut.contains(&(from, to));
                if is_received {
                    self.step(to, Input::SnapshotStaged { message: *message, frames });
                }
                self.step(from, Input::SnapshotSent { to: NodeId(to), is_received });
            }
            Packet::Alive { from, alive } => {
                if !self.cut.contains(&(from, to)) {
                    self.step(to, Input::Alive { from: NodeId(from), alive });
                }
            }
            Packet::Forward { from, command } => {
                if !self.cut.contains(&(from, to)) {
                    self.step(to, Input::Forwarded { from: NodeId(from), command });
                }
            }
        }
    }

    // ---- agents

    /// A stand-in for the agent: what is assigned runs a moment later, what is to go is gone.
    fn run_agent(&mut self, node: u64) {
        let id = NodeId(node);
        let start_id = self.node(node).start_id;
        let control = &self.node(node).control;
        let Some(row) = control.state().nodes.find(&id) else { return };
        let command = if row.start_id != Some(start_id) {
            let size = NodeSize { cpu_millis: 4000, memory_bytes: 1 << 30 };
            let software = "sim".to_string();
            Command::NodeStarted { node: id, start_id, architecture: Architecture::Amd64, size, software }
        } else {
            let mut seq = self.node(node).reported;
            let control = &self.node(node).control;
            let mut instances = Vec::new();
            for instance in control.state().instances_on(id) {
                let is_gone = instance.desired == Desired::Remove;
                let is_known =
                    instance.observed.phase == Phase::Running && instance.observed.start_id == Some(start_id);
                if is_gone || !is_known {
                    seq += 1;
                    let phase = if is_gone { Phase::Stopped } else { Phase::Running };
                    instances.push(InstanceReport { instance: instance.id, seq, phase, exit: None, is_gone });
                }
            }
            if instances.is_empty() {
                return;
            }
            self.node(node).reported = seq;
            let report = NodeReport { instances, ..NodeReport::default() };
            Command::Report { node: id, start_id, report }
        };
        self.step(node, Input::Report { command: Box::new(command) });
    }

    // ---- clients

    fn leader(&self) -> Option<u64> {
        self.nodes.iter().find_map(|(id, node)| node.as_ref()?.control.driver().is_leader().then_some(*id))
    }

    fn run_client(&mut self, client: usize) {
        if self.clients[client].busy.is_some() {
            return;
        }
        let running: Vec<u64> =
            self.nodes.iter().filter(|(_, node)| node.is_some()).map(|(id, _)| *id).collect();
        if running.is_empty() {
            return self.at(100, Event::Client(client));
        }
        let mut target = running[self.random.below(running.len() as u64) as usize];
        let is_read = self.random.percent(50) && self.clients[client].retry.is_none();
        if !is_read && let Some(leader) = self.leader() {
            target = leader;
        }
        self.next_waiter += 1;
        let waiter = self.next_waiter;
        let key = self.random.below(2);
        if is_read {
            self.history.push((
                key,
                Operation { called_at: self.now, returned_at: u64::MAX, kind: Kind::Read(None) },
            ));
            self.clients[client].busy = Some((waiter, self.history.len() - 1));
            self.at(3_000, Event::ClientTimeout { client, waiter });
            if self.bug == Bug::ReadLocally {
                self.finish_read(target, waiter, true);
            } else {
                self.step(target, Input::Read { waiter });
            }
            return;
        }
        let (mark, position, command) = match self.clients[client].retry.take() {
            Some((mark, position, command)) if self.bug != Bug::RetryAsNew => (mark, position, command),
            Some((mark, position, command)) => {
                self.next_request += 1;
                (RequestMark { id: RequestId(self.next_request), ..mark }, position, command)
            }
            None => self.new_write(key),
        };
        self.clients[client].busy = Some((waiter, position));
        self.clients[client].retry = Some((mark, position, command.clone()));
        // An impatient client repeats itself while its first try may still come through.
        let patience = if self.bug == Bug::RetryAsNew { 30 } else { 3_000 };
        self.at(patience, Event::ClientTimeout { client, waiter });
        self.step(target, Input::Write { waiter, request: Some(mark), command: Box::new(command) });
    }

    fn new_write(&mut self, key: u64) -> (RequestMark, usize, Command) {
        self.next_value += 1;
        self.next_request += 1;
        let value = self.next_value;
        let operation = Operation { called_at: self.now, returned_at: u64::MAX, kind: Kind::Write(value) };
        self.history.push((key, operation));
        let mark = RequestMark { id: RequestId(self.next_request), body_hash: value, created_index: 0 };
        (mark, self.history.len() - 1, label_command(key, value))
    }

    fn finish_write(&mut self, waiter: u64, is_done: Option<bool>) {
        let Some(client) = self.clients.iter().position(|c| c.busy.is_some_and(|(w, _)| w == waiter)) else {
            return;
        };
        let Some((_, position)) = self.clients[client].busy else { return };
        let delay = self.random.below(300);
        self.clients[client].busy = None;
        if is_done == Some(true) {
            self.history[position].1.returned_at = self.now;
            self.clients[client].retry = None;
            self.report.writes += 1;
            self.at(delay, Event::Client(client));
        } else {
            // Not done or not known: the same request again, as the CLI does.
            self.at(50 + delay, Event::Client(client));
        }
    }

    fn finish_read(&mut self, node: u64, waiter: u64, is_done: bool) {
        let Some(client) = self.clients.iter().position(|c| c.busy.is_some_and(|(w, _)| w == waiter)) else {
            return;
        };
        let Some((_, position)) = self.clients[client].busy else { return };
        self.clients[client].busy = None;
        if is_done && let Some(node) = &self.nodes[&node] {
            let key = self.history[position].0;
            let labels =
                node.control.state().nodes.find(&NodeId(1)).map(|row| row.labels.clone()).unwrap_or_default();
            let value = labels.get(&format!("k{key}")).and_then(|text| text.parse().ok()).unwrap_or(0);
            let operation = &mut self.history[position].1;
            operation.kind = Kind::Read(Some(value));
            operation.returned_at = self.now;
            self.report.reads += 1;
        }
        let delay = self.random.below(300);
        self.at(delay, Event::Client(client));
    }

    fn time_out(&mut self, client: usize, waiter: u64) {
        if self.clients[client].busy.is_some_and(|(busy, _)| busy == waiter) {
            self.clients[client].busy = None;
            self.at(1, Event::Client(client));
        }
    }

    // ---- the nemesis

    fn strike(&mut self) {
        if self.is_calm {
            return;
        }
        let node = 1 + self.random.below(NODES_MAX);
        match self.random.below(12) {
            0 | 1 => {
                self.crash(node);
                let delay = 50 + self.random.below(5000);
                self.at(delay, Event::Start(node));
            }
            2 => {
                for node in 1..=NODES_MAX {
                    if self.random.percent(60) {
                        self.crash(node);
                        let delay = 50 + self.random.below(4000);
                        self.at(delay, Event::Start(node));
                    }
                }
            }
            3 => {
                let sides = self.random.next();
                for a in 1..=NODES_MAX {
                    for b in 1..=NODES_MAX {
                        if (sides >> a) & 1 != (sides >> b) & 1 {
                            self.cut.insert((a, b));
                        }
                    }
                }
            }
            4 => {
                let other = 1 + self.random.below(NODES_MAX);
                self.cut.insert((node, other));
            }
            5 => {
                for other in 1..=NODES_MAX {
                    self.cut.insert((node, other));
                    self.cut.insert((other, node));
                }
            }
            6..=8 => self.cut.clear(),
            9 => {
                if !self.slow_disk.remove(&node) {
                    self.slow_disk.insert(node);
                }
            }
            10 => self.join_next(),
            _ => self.scale(),
        }
        let delay = 100 + self.random.below(1500);
        self.at(delay, Event::Nemesis);
    }

    // ---- what users do

    fn submit(&mut self, command: Command) -> bool {
        let Some(leader) = self.leader() else { return false };
        self.next_waiter += 1;
        let waiter = self.next_waiter;
        self.step(leader, Input::Write { waiter, request: None, command: Box::new(command) });
        true
    }

    pub fn found_with_members(&mut self, members: u64) {
        self.disk(1).durable = Image::founder(1);
        self.start(1);
        self.run_for(8_000);
        let cluster = Cluster {
            id: ClusterId(1),
            name: "home".into(),
            ca_certificate: vec![1],
            sealed_ca_key: vec![2],
            sealed_cluster_key: vec![3],
            container_range: "10.77.0.0".parse().expect("an address"),
            vip_range: "10.78.0.0".parse().expect("an address"),
            feature_level: 1,
            founded_at: Timestamp(0),
        };
        let found = Command::Found { cluster: Box::new(cluster), node: Box::new(join_node(1)) };
        assert!(self.submit(found), "the sole voter leads within 8 s");
        self.run_for(500);
        let kind = TokenKind::Join { is_once: false };
        self.submit(Command::CreateToken { secret_hash: SECRET_HASH, kind, expires_at: Timestamp(u64::MAX) });
        self.run_for(500);
        let token = self.node(1).control.state().tokens.rows().next().map(|token| token.id);
        self.token = token;
        for _ in 1..members {
            self.join_next();
            self.run_for(3_000);
        }
        self.run_for(10_000);
    }

    /// The next machine joins: ids come from the counter, so the n-th to join is node n.
    fn join_next(&mut self) {
        let Some(leader) = self.leader() else { return };
        let state = self.node(leader).control.state();
        let next = state.nodes.len() as u64 + 1;
        if next > NODES_MAX {
            return;
        }
        let Some(token) = self.token else { return };
        let node = Box::new(join_node(next));
        self.submit(Command::JoinNode { token, secret_hash: SECRET_HASH, node, replace: None });
        self.at(100, Event::Start(next));
    }

    fn deploy(&mut self) {
        let digest = Digest::of_sha256(&[9; 32]);
        let image = ImageSpec { reference: "hello".into(), digest: Some(digest) };
        let service = ServiceSpec { replicas: 3, ..ServiceSpec::new(image) };
        let name = AppName::new("shop").expect("a name");
        let spec = AppSpec {
            name,
            services: [("web".to_string(), service)].into(),
            volumes: BTreeMap::new(),
            secrets: Default::default(),
        };
        self.submit(Command::DeployApp { spec: Box::new(spec), artifacts: Vec::new() });
        self.run_for(3_000);
    }

    fn scale(&mut self) {
        let count = 1 + self.random.below(6) as u32;
        let app = AppName::new("shop").expect("a name");
        self.submit(Command::ScaleServices { app, replicas: [("web".to_string(), count)].into() });
    }

    pub fn write_label(&mut self, key: &str, value: &str) {
        let set = [(key.to_string(), value.to_string())].into();
        self.submit(Command::LabelNode { node: NodeId(1), set, remove: Vec::new() });
    }

    // ---- the end

    /// Heals everything: progress must resume, all nodes must agree, what users asked for must run.
    fn finish(&mut self) {
        self.is_calm = true;
        self.cut.clear();
        self.slow_disk.clear();
        for node in 1..=NODES_MAX {
            self.start(node);
        }
        let before = self.report.writes;
        self.run_for(130_000);
        assert!(self.report.writes > before + 20, "no progress after healing: {}", self.describe());
        for client in &mut self.clients {
            client.busy = Some((u64::MAX, 0));
        }
        self.run_for(10_000);
        let leader = self.leader().expect("a leader after healing");
        let state = self.node(leader).control.state().clone();
        let applied = self.node(leader).control.status(Now::default()).applied;
        for (id, node) in &self.nodes {
            let is_member = state.nodes.contains(&NodeId(*id));
            let node = node.as_ref().expect("every node was started");
            if is_member {
                let status = node.control.status(Now::default());
                assert_eq!(status.applied, applied, "n{id} is behind");
                assert_eq!(node.control.state().digest(), state.digest(), "n{id} holds another state");
            }
        }
        let service = state.services.rows().next().expect("the service is still there");
        let running = state
            .instances
            .rows()
            .filter(|row| row.desired == Desired::Run && row.observed.phase == Phase::Running)
            .count();
        assert_eq!(running as u32, service.spec.replicas, "instances: {:?}", state.instances);
        for key in 0..2 {
            let history: Vec<Operation> = self
                .history
                .iter()
                .filter(|(of, _)| *of == key)
                .map(|(_, operation)| operation.clone())
                .collect();
            assert_ne!(is_linearizable(&history), Some(false), "not linearizable: key {key}");
        }
    }

    fn describe(&self) -> String {
        let mut text = String::new();
        for (id, node) in &self.nodes {
            if let Some(node) = node {
                let status = node.control.status(Now::default());
                text += &format!(
                    "\n  n{id}: leader {:?} term {} applied {} commit {} last {} voters {:?} learners {:?}",
                    status.leader,
                    status.term,
                    status.applied,
                    status.commit,
                    status.last_index,
                    status.voters,
                    status.learners
                );
            }
        }
        text
    }
}

fn label_command(key: u64, value: u64) -> Command {
    Command::LabelNode {
        node: NodeId(1),
        set: [(format!("k{key}"), value.to_string())].into(),
        remove: Vec::new(),
    }
}

fn join_node(node: u64) -> JoinNode {
    JoinNode {
        public_key: PublicKey([node as u8; 32]),
        certificate: vec![node as u8],
        store_id: StoreId(u128::from(node)),
        name: format!("pi{node}"),
        architecture: Architecture::Amd64,
        size: NodeSize { cpu_millis: 4000, memory_bytes: 1 << 30 },
        software: "sim".into(),
    }
}

/// Through the real wire encoding.
fn recode(message: &Message) -> Message {
    let bytes = postcard::to_allocvec(message).expect("a message encodes");
    postcard::from_bytes(&bytes).expect("a message decodes")
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
