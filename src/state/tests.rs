//! Rules of the state machine, each with the data that shows it.

use super::*;
use crate::model::limits::SECRET_BYTES_MAX;
use crate::model::*;
use std::collections::BTreeMap;

const SECRET: [u8; 32] = [7; 32];

pub fn join_node(number: u8) -> JoinNode {
    JoinNode {
        public_key: PublicKey([number; 32]),
        certificate: vec![number],
        store_id: StoreId(u128::from(number)),
        name: "pi".into(),
        architecture: Architecture::Arm64,
        size: NodeSize { cpu_millis: 4000, memory_bytes: 1 << 30 },
        software: "test".into(),
    }
}

pub fn cluster() -> Cluster {
    Cluster {
        id: ClusterId(1),
        name: "home".into(),
        ca_certificate: vec![1],
        sealed_ca_key: vec![2],
        sealed_cluster_key: vec![3],
        container_range: "10.77.0.0".parse().unwrap(),
        vip_range: "10.78.0.0".parse().unwrap(),
        feature_level: 1,
        founded_at: Timestamp(0),
    }
}

/// Applies commands as a leader would have proposed them, a second apart.
pub struct Applier {
    pub state: State,
    pub index: u64,
    pub rows: BTreeMap<(u8, Vec<u8>), Vec<u8>>,
}

impl Applier {
    /// A cluster with `nodes` members, all started.
    pub fn with_nodes(nodes: u8) -> Applier {
        let mut applier = Applier { state: State::default(), index: 0, rows: BTreeMap::new() };
        applier.must(Command::Found { cluster: Box::new(cluster()), node: Box::new(join_node(1)) });
        let kind = TokenKind::Join { is_once: false };
        applier.must(Command::CreateToken { secret_hash: SECRET, kind, expires_at: Timestamp(u64::MAX) });
        for number in 2..=nodes {
            applier.must(applier.join(number));
        }
        for number in 1..=nodes {
            applier.must(start(number, u128::from(number)));
        }
        applier
    }

    pub fn join(&self, number: u8) -> Command {
        let node = Box::new(join_node(number));
        Command::JoinNode { token: TokenId(1), secret_hash: SECRET, node, replace: None }
    }

    pub fn apply(&mut self, command: Command) -> Outcome {
        self.apply_as(None, command)
    }

    pub fn apply_as(&mut self, request: Option<RequestMark>, command: Command) -> Outcome {
        self.index += 1;
        let stamp = Timestamp(1_800_000_000_000 + self.index * 1000);
        let envelope = Envelope { stamp, origin: Origin::default(), request, command };
        let envelope = Envelope::decode(&envelope.encode()).unwrap();
        let outcome = self.state.apply(self.index, &envelope);
        for change in self.state.take_changes() {
            match change.body {
                Some(body) => self.rows.insert((change.kind, change.key), body),
                None => self.rows.remove(&(change.kind, change.key)),
            };
        }
        outcome
    }

    pub fn must(&mut self, command: Command) -> Reply {
        let text = format!("{command:?}");
        self.apply(command).unwrap_or_else(|rejection| panic!("{text}: {rejection}"))
    }

    pub fn deploy(&mut self, app: &str, services: &[(&str, ServiceSpec)]) -> Reply {
        self.must(deploy(app, services))
    }

    /// Reports a phase for all instances on all nodes that are to run.
    pub fn report_all(&mut self, phase: Phase) {
        let instances: Vec<Instance> = self.state.instances.rows().cloned().collect();
        for instance in instances {
            let node = instance.node.and_then(|id| self.state.nodes.find(&id));
            if let Some(node) = node.filter(|node| node.condition == Condition::Up).map(|node| node.id) {
                let is_gone = instance.desired == Desired::Remove;
                self.report(node, instance.id, if is_gone { Phase::Stopped } else { phase }, is_gone);
            }
        }
    }

    pub fn report(&mut self, node: NodeId, instance: InstanceId, phase: Phase, is_gone: bool) {
        let start_id = self.state.nodes.find(&node).and_then(|node| node.start_id).unwrap();
        let seq = self.index + 1;
        let report = InstanceReport { instance, seq, phase, exit: None, is_gone };
        let report = NodeReport { instances: vec![report], ..NodeReport::default() };
        self.must(Command::Report { node, start_id, report });
    }
}

pub fn start(number: u8, start_id: u128) -> Command {
    Command::NodeStarted {
        node: NodeId(u64::from(number)),
        start_id: StartId(start_id),
        architecture: Architecture::Arm64,
        size: NodeSize { cpu_millis: 4000, memory_bytes: 1 << 30 },
        software: "test".into(),
    }
}

pub fn spec(tag: &str) -> ServiceSpec {
    let digest = Digest::of_sha256(&[tag.len() as u8; 32]);
    ServiceSpec::new(ImageSpec { reference: format!("hello:{tag}"), digest: Some(digest) })
}

pub fn deploy(app: &str, services: &[(&str, ServiceSpec)]) -> Command {
    let services: BTreeMap<String, ServiceSpec> =
        services.iter().map(|(name, spec)| (name.to_string(), spec.clone())).collect();
    let volumes = services
        .values()
        .flat_map(|spec| spec.volume_names().map(|name| (name.to_string(), VolumeSpec::default())))
        .collect();
    let spec = AppSpec { name: AppName::new(app).unwrap(), services, volumes, secrets: Default::default() };
    Command::DeployApp { spec: Box::new(spec), artifacts: Vec::new() }
}

fn port(published: u16) -> PortSpec {
    PortSpec {
        protocol: Protocol::Tcp,
        published: Some(published),
        target: 80,
        host_address: None,
        is_host_mode: false,
    }
}

#[test]
fn a_rejected_command_changes_nothing() {
    let mut applier = Applier::with_nodes(2);
    applier.deploy("shop", &[("web", ServiceSpec { ports: vec![port(80)], ..spec("1") })]);
    let cases = [
        Command::JoinNode {
            token: TokenId(9),
            secret_hash: SECRET,
            node: Box::new(join_node(3)),
            replace: None,
        },
        Command::JoinNode {
            token: TokenId(1),
            secret_hash: [0; 32],
            node: Box::new(join_node(3)),
            replace: None,
        },
        Command::RemoveNode { node: NodeId(9), is_forced: true },
        Command::RemoveToken { token: TokenId(9) },
        deploy("blog", &[("a", spec("1")), ("web", ServiceSpec { ports: vec![port(80)], ..spec("1") })]),
        deploy("blog", &[("a", ServiceSpec { replicas: 100_000, ..spec("1") })]),
        Command::ChangeSetting { key: "timers".into(), value: "slow".into() },
        Command::RemoveApp { app: AppName::new("blog").unwrap(), with_volumes: true },
        Command::LabelNode { node: NodeId(1), set: [("a b".into(), "c".into())].into(), remove: Vec::new() },
        Command::MarkNodeDown { node: NodeId(1), start_id: Some(StartId(99)) },
        Command::Found { cluster: Box::new(cluster()), node: Box::new(join_node(3)) },
    ];
    for command in cases {
        let text = format!("{command:?}");
        let mut before = applier.state.clone();
        assert!(applier.apply(command).is_err(), "{text}");
        // Only cluster time has moved on.
        before.meta.update(&(), |meta| meta.time = applier.state.time());
        assert_eq!(applier.state, before, "{text}");
    }
}

#[test]
fn changes_rebuild_the_state() {
    let mut applier = Applier::with_nodes(3);
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 2, ..spec("1") })]);
    applier.must(Command::RemoveApp { app: AppName::new("shop").unwrap(), with_volumes: false });
    let mut rebuilt = State::default();
    for ((kind, key), body) in &applier.rows {
        rebuilt.load_row(*kind, key, body).unwrap();
    }
    assert_eq!(rebuilt, applier.state);
    assert_eq!(rebuilt.digest(), applier.state.digest());
    assert_eq!(State::from_frames(&applier.state.to_frames()).unwrap(), applier.state);
    assert_eq!(rebuilt.bytes(), applier.state.bytes());
}

#[test]
fn a_retry_gets_the_first_outcome() {
    let mut applier = Applier::with_nodes(1);
    let mark = RequestMark { id: RequestId(5), body_hash: 1, created_index: 0 };
    let create = || Command::CreateToken {
        secret_hash: [1; 32],
        kind: TokenKind::Join { is_once: true },
        expires_at: Timestamp(u64::MAX),
    };
    let first = applier.apply_as(Some(mark), create());
    assert_eq!(applier.apply_as(Some(mark), create()), first);
    assert_eq!(applier.state.tokens.len(), 2);
    let other_body = RequestMark { body_hash: 2, ..mark };
    assert_eq!(applier.apply_as(Some(other_body), create()), Err(Rejection::RequestIdReused));
}

#[test]
fn an_evicted_request_is_never_applied_again() {
    let mut applier = Applier::with_nodes(1);
    let label = |count: u64| Command::LabelNode {
        node: NodeId(1),
        set: [("count".to_string(), count.to_string())].into(),
        remove: Vec::new(),
    };
    let mark = |id: u64| RequestMark { id: RequestId(u128::from(id)), body_hash: id, created_index: id };
    let first_index = applier.index + 1;
    for count in 0..limits::OUTCOMES_MAX as u64 + 8 {
        // A stamp a second apart would age them out; keep them within the hour.
        applier.index += 1;
        let stamp = Timestamp(1_800_000_000_000 + applier.index);
        let request = Some(RequestMark { created_index: applier.index, ..mark(count) });
        let envelope = Envelope { stamp, origin: Origin::default(), request, command: label(count) };
        applier.state.apply(applier.index, &envelope).unwrap();
    }
    assert_eq!(applier.state.outcomes.len(), limits::OUTCOMES_MAX);
    let late = RequestMark { created_index: first_index, ..mark(0) };
    let stamp = applier.state.time();
    let envelope = Envelope { stamp, origin: Origin::default(), request: Some(late), command: label(0) };
    assert_eq!(applier.state.apply(applier.index + 1, &envelope), Err(Rejection::UnknownOutcome));
}

#[test]
fn a_request_that_is_older_than_the_hour_is_never_applied_again() {
    let mut applier = Applier::with_nodes(1);
    let label = |count: &str| Command::LabelNode {
        node: NodeId(1),
        set: [("count".to_string(), count.to_string())].into(),
        remove: Vec::new(),
    };
    let (created_index, begin) = (applier.index, applier.state.time().0);
    let mark = |id, created_index| RequestMark { id: RequestId(id), body_hash: 7, created_index };
    let mut apply = |stamp, mark, count| {
        applier.index += 1;
        let origin = Origin::default();
        let envelope =
            Envelope { stamp: Timestamp(stamp), origin, request: Some(mark), command: label(count) };
        applier.state.apply(applier.index, &envelope)
    };
    apply(begin, mark(1, created_index), "first").unwrap();
    // A retry within the hour gets the first answer; it does not apply.
    apply(begin + 10, mark(1, created_index), "first").unwrap();
    let later = begin + limits::OUTCOME_AGE_MS_MAX + 1_000;
    apply(later, mark(2, created_index + 1), "second").unwrap();
    assert_eq!(apply(later, mark(1, created_index), "first"), Err(Rejection::UnknownOutcome));
    let labels = &applier.state.nodes.find(&NodeId(1)).unwrap().labels;
    assert_eq!(labels.get("count").map(String::as_str), Some("second"));
}

#[test]
fn a_repeated_join_returns_the_same_node() {
    let mut applier = Applier::with_nodes(2);
    let again = applier.must(applier.join(2));
    assert_eq!(again, Reply::Joined { node: NodeId(2), name: "pi-2".into(), certificate: vec![2] });
    assert_eq!(applier.state.nodes.len(), 2);
}

#[test]
fn a_once_token_serves_one_key() {
    let mut applier = Applier::with_nodes(1);
    let kind = TokenKind::Join { is_once: true };
    applier.must(Command::CreateToken { secret_hash: [8; 32], kind, expires_at: Timestamp(u64::MAX) });
    let join = |number: u8| Command::JoinNode {
        token: TokenId(2),
        secret_hash: [8; 32],
        node: Box::new(join_node(number)),
        replace: None,
    };
    applier.must(join(2));
    applier.must(join(2));
    assert_eq!(applier.apply(join(3)), Err(Rejection::TokenReplayed));
}

#[test]
fn an_expired_token_is_refused_with_its_date() {
    let mut applier = Applier::with_nodes(1);
    let at = Timestamp(1_800_000_000_000);
    let kind = TokenKind::Join { is_once: false };
    applier.must(Command::CreateToken { secret_hash: [8; 32], kind, expires_at: at });
    let node = Box::new(join_node(2));
    let join = Command::JoinNode { token: TokenId(2), secret_hash: [8; 32], node, replace: None };
    assert_eq!(applier.apply(join), Err(Rejection::TokenExpired { at }));
}

#[test]
fn an_unchanged_deploy_changes_nothing() {
    let mut applier = Applier::with_nodes(1);
    applier.deploy("shop", &[("web", spec("1"))]);
    let before = applier.state.services.clone();
    let reply = applier.deploy("shop", &[("web", spec("1"))]);
    assert_eq!(reply, Reply::Deployed { revision: 1, changed: Vec::new(), removed: Vec::new() });
    assert_eq!(applier.state.services, before);
    // A count alone is no new version.
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 2, ..spec("1") })]);
    assert_eq!(applier.state.services.rows().next().unwrap().spec_version, 1);
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 2, ..spec("22") })]);
    assert_eq!(applier.state.services.rows().next().unwrap().spec_version, 2);
}

#[test]
fn a_port_has_one_owner() {
    let mut applier = Applier::with_nodes(1);
    let with_port = |published| ServiceSpec { ports: vec![port(published)], ..spec("1") };
    applier.deploy("shop", &[("web", with_port(80))]);
    let taken = Rejection::PortTaken { port: 80, protocol: "tcp".into(), owner: "shop/web".into() };
    assert_eq!(applier.apply(deploy("blog", &[("web", with_port(80))])), Err(taken));
    applier.deploy("blog", &[("web", with_port(81))]);
    // The same service may keep its own port.
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 2, ..with_port(80) })]);
}

#[test]
fn a_port_that_nobody_named_is_chosen_and_kept() {
    let mut applier = Applier::with_nodes(1);
    let any = PortSpec { published: None, ..port(0) };
    let service = ServiceSpec { ports: vec![any], ..spec("1") };
    applier.deploy("shop", &[("web", service.clone())]);
    applier.deploy("blog", &[("web", service.clone())]);
    let ports = |applier: &Applier| -> Vec<Option<u16>> {
        applier.state.services.rows().map(|service| service.spec.ports[0].published).collect()
    };
    assert_eq!(ports(&applier), [Some(30_000), Some(30_001)]);
    let reply = applier.deploy("shop", &[("web", service)]);
    assert_eq!(reply, Reply::Deployed { revision: 1, changed: Vec::new(), removed: Vec::new() });
    assert_eq!(ports(&applier), [Some(30_000), Some(30_001)]);
}

#[test]
fn reports_of_another_run_are_void() {
    let mut applier = Applier::with_nodes(1);
    let report = NodeReport { holds: Vec::new(), ..NodeReport::default() };
    let stale = Command::Report { node: NodeId(1), start_id: StartId(99), report };
    assert_eq!(applier.apply(stale), Err(Rejection::Stale));
}

const NUMBER_MAX: u8 = 38;
/// Those of large rows: only their numbers are held.
const WITHOUT_GOLDEN_BYTES: [u8; 12] = [0, 1, 3, 10, 12, 15, 18, 19, 26, 29, 30, 32];

/// The place of a command among all, which is how it is encoded: never changed. A new one gets golden bytes below.
fn number_of(command: &Command) -> u8 {
    match command {
        Command::Found { .. } => 0,
        Command::JoinNode { .. } => 1,
        Command::RemoveNode { .. } => 2,
        Command::NodeStarted { .. } => 3,
        Command::NodeStopping { .. } => 4,
        Command::MarkNodeDown { .. } => 5,
        Command::MarkNodeUp { .. } => 6,
        Command::ConfirmKey { .. } => 7,
        Command::DrainNode { .. } => 8,
        Command::LabelNode { .. } => 9,
        Command::CreateToken { .. } => 10,
        Command::RemoveToken { .. } => 11,
        Command::EnrolUser { .. } => 12,
        Command::RemoveUser { .. } => 13,
        Command::ChangeSetting { .. } => 14,
        Command::DeployApp { .. } => 15,
        Command::RemoveApp { .. } => 16,
        Command::ScaleServices { .. } => 17,
        Command::RegisterArtifact { .. } => 18,
        Command::RemoveArtifact { .. } => 19,
        Command::Plan { .. } => 20,
        Command::Report { .. } => 21,
        Command::ForgetNode { .. } => 22,
        Command::AddAddress { .. } => 23,
        Command::RemoveAddress { .. } => 24,
        Command::AssignAddress { .. } => 25,
        Command::PutSecret { .. } => 26,
        Command::RemoveSecret { .. } => 27,
        Command::PutServingAuthority { .. } => 28,
        Command::PutCertificate { .. } => 29,
        Command::NoteCertificateTrouble { .. } => 30,
        Command::ForgetCertificate { .. } => 31,
        Command::PutAcmeAccount { .. } => 32,
        Command::PutChallenges { .. } => 33,
        Command::RemoveChallenges { .. } => 34,
        Command::NoteTroubles { .. } => 35,
        Command::NoteDisks { .. } => 36,
        Command::NoteAbsentDisks { .. } => 37,
        Command::NodeEnding { .. } => 38,
    }
}

#[test]
fn a_machine_ends_until_its_next_start() {
    let mut applier = Applier::with_nodes(2);
    let node = NodeId(2);
    let start_id = applier.state.nodes.find(&node).and_then(|row| row.start_id).expect("it started");
    let is_ending = |applier: &Applier| applier.state.nodes.find(&node).is_some_and(|row| row.is_ending);
    assert!(applier.apply(Command::NodeEnding { node, start_id: StartId(77) }).is_err(), "of another run");
    applier.must(Command::NodeEnding { node, start_id });
    applier.must(Command::NodeStopping { node, start_id });
    assert!(is_ending(&applier));
    let row = applier.state.nodes.find(&node).expect("it is a member").clone();
    applier.must(Command::NodeStarted {
        node,
        start_id: StartId(78),
        architecture: row.architecture,
        size: row.size,
        software: row.software,
    });
    assert!(!is_ending(&applier));
}

/// The encodings that are on users' disks: a change here breaks clusters that run.
#[test]
fn golden_bytes_of_entries() {
    let encode = |command| {
        let origin = Origin { node: NodeId(1), start_id: StartId(2), counter: 3 };
        Envelope { stamp: Timestamp(4), origin, request: None, command }.encode()
    };
    let (node, start_id) = (NodeId(5), StartId(6));
    let address = Ipv4Addr::new(10, 0, 0, 9);
    let disks = vec![NodeDisk { label: "a".into(), target: "/mnt/a".into() }];
    let mut absent = DiskSet::default();
    absent.insert(1);
    let cases: [(Command, &[u8]); 27] = [
        (Command::RemoveNode { node, is_forced: true }, &[2, 5, 1]),
        (Command::NodeStopping { node, start_id }, &[4, 5, 6]),
        (Command::MarkNodeDown { node, start_id: Some(start_id) }, &[5, 5, 1, 6]),
        (Command::MarkNodeUp { node, start_id }, &[6, 5, 6]),
        (Command::ConfirmKey { node, has_key: true }, &[7, 5, 1]),
        (Command::DrainNode { node, is_drained: true }, &[8, 5, 1]),
        (
            Command::LabelNode { node, set: [("k".into(), "v".into())].into(), remove: vec!["r".into()] },
            &[9, 5, 1, 1, b'k', 1, b'v', 1, 1, b'r'],
        ),
        (Command::RemoveToken { token: TokenId(5) }, &[11, 5]),
        (Command::RemoveUser { name: "u".into() }, &[13, 1, b'u']),
        (Command::ChangeSetting { key: "k".into(), value: "v".into() }, &[14, 1, b'k', 1, b'v']),
        (Command::RemoveApp { app: AppName::new("a").unwrap(), with_volumes: true }, &[16, 1, b'a', 1]),
        (
            Command::ScaleServices { app: AppName::new("a").unwrap(), replicas: [("w".into(), 3)].into() },
            &[17, 1, b'a', 1, 1, b'w', 3],
        ),
        (Command::Plan { steps: Vec::new() }, &[20, 0]),
        (Command::Report { node, start_id, report: NodeReport::default() }, &[21, 5, 6, 0, 0, 0, 0]),
        (Command::ForgetNode { node }, &[22, 5]),
        (Command::AddAddress { address }, &[23, 10, 0, 0, 9]),
        (Command::RemoveAddress { address }, &[24, 10, 0, 0, 9]),
        (Command::AssignAddress { address, epoch: 7, to: node }, &[25, 10, 0, 0, 9, 7, 5]),
        (Command::RemoveSecret { name: SecretName::new("a/b").unwrap() }, &[27, 3, b'a', b'/', b'b']),
        (Command::PutServingAuthority { certificate: vec![8], sealed_key: vec![9] }, &[28, 1, 8, 1, 9]),
        (Command::ForgetCertificate { host: "h".into() }, &[31, 1, b'h']),
        (Command::PutChallenges { answers: [("t".into(), "a".into())].into() }, &[33, 1, 1, b't', 1, b'a']),
        (Command::RemoveChallenges { tokens: vec!["t".into()] }, &[34, 1, 1, b't']),
        (Command::NoteTroubles { node, troubles: Troubles::default() }, &[35, 5, 0]),
        (
            Command::NoteDisks { node, start_id, disks },
            &[36, 5, 6, 1, 1, b'a', 6, b'/', b'm', b'n', b't', b'/', b'a'],
        ),
        (Command::NoteAbsentDisks { node, start_id, absent }, &[37, 5, 6, 2]),
        (Command::NodeEnding { node, start_id }, &[38, 5, 6]),
    ];
    let mut kept: Vec<u8> = WITHOUT_GOLDEN_BYTES.to_vec();
    for (command, tail) in cases {
        assert_eq!(tail[0], number_of(&command));
        kept.push(tail[0]);
        let bytes = [&[1, 4, 1, 2, 3, 0], tail].concat();
        assert_eq!(encode(command.clone()), bytes, "{command:?}");
        assert_eq!(Envelope::decode(&bytes).unwrap().command, command);
    }
    kept.sort_unstable();
    assert_eq!(kept, (0..=NUMBER_MAX).collect::<Vec<u8>>(), "each has golden bytes, or is listed as without");
    assert!(Envelope::decode(&[9, 0]).is_err(), "an unknown format must stop the node");
}

#[test]
fn an_instance_keeps_its_specification_while_newer_ones_are_deployed() {
    let mut applier = Applier::with_nodes(1);
    let deploy = |applier: &mut Applier, version: &str| applier.deploy("shop", &[("web", spec(version))]);
    deploy(&mut applier, "1");
    let service = applier.state.services.rows().next().unwrap().id;
    let create = |applier: &mut Applier, spec_version| {
        let service_version = applier.state.services.find(&service).unwrap().version;
        let slot = spec_version as u32;
        let step = PlanStep::CreateInstance { service, service_version, slot, spec_version };
        applier.must(Command::Plan { steps: vec![step] });
    };
    create(&mut applier, 1);
    for version in 2..=4 {
        deploy(&mut applier, &version.to_string());
        create(&mut applier, version);
    }
    let row = applier.state.services.find(&service).unwrap();
    for version in 1..=4 {
        assert_eq!(row.spec_of(version).image, spec(&version.to_string()).image, "version {version}");
    }
    assert_eq!(row.superseded.iter().map(|older| older.spec_version).collect::<Vec<_>>(), [2, 3]);
    // Its last instance gone, the middle one is forgotten; the others stay.
    let instance = applier.state.instances.rows().find(|row| row.spec_version == 2).unwrap();
    let (id, version) = (instance.id, instance.version);
    applier.must(Command::Plan { steps: vec![PlanStep::Forget { instance: id, instance_version: version }] });
    let row = applier.state.services.find(&service).unwrap();
    assert_eq!(row.superseded.iter().map(|older| older.spec_version).collect::<Vec<_>>(), [3]);
}

#[test]
fn http_routes_and_a_published_port_exclude_each_other() {
    let mut applier = Applier::with_nodes(1);
    let mut routed = spec("1");
    routed.labels.insert("tinydc.http.host".into(), "shop.example".into());
    applier.deploy("shop", &[("web", routed)]);
    let mut publishing = spec("1");
    publishing.ports = vec![PortSpec {
        protocol: Protocol::Tcp,
        published: Some(8080),
        target: 80,
        host_address: None,
        is_host_mode: false,
    }];
    applier.deploy("other", &[("proxy", publishing)]);
    let change = Command::ChangeSetting { key: "ingress_http_port".into(), value: "8080".into() };
    let refused = applier.apply(change).expect_err("the port is published").to_string();
    assert!(refused.contains("other/proxy") && refused.contains("shop/web"), "{refused}");
    applier.must(Command::ChangeSetting { key: "ingress_http_port".into(), value: "8081".into() });
}

#[test]
fn a_secret_in_use_is_kept_and_a_missing_one_refuses_the_deploy() {
    let mut applier = Applier::with_nodes(2);
    let name = SecretName::new("shop/db").unwrap();
    let put = |fingerprint: u8| Command::PutSecret {
        name: name.clone(),
        sealed: vec![fingerprint],
        fingerprint: [fingerprint; 32],
        bytes: 1,
    };
    let mut web = spec("a");
    let (target, secret) = ("/run/secrets/db".to_string(), name.clone());
    web.secrets = vec![SecretUse { secret, target, uid: 0, gid: 0, mode: 0o444, version: 0 }];
    let refused = applier.apply(deploy("shop", &[("web", web.clone())])).unwrap_err();
    assert!(refused.to_string().contains("tinydc secret set shop/db FILE"), "{refused}");
    applier.must(put(1));
    applier.deploy("shop", &[("web", web.clone())]);
    assert!(!applier.state.needs_secret(NodeId(1), &name), "nothing is assigned yet");
    let service = applier.state.services.rows().next().unwrap().clone();
    let create = PlanStep::CreateInstance {
        service: service.id,
        service_version: service.version,
        slot: 1,
        spec_version: service.spec_version,
    };
    applier.must(Command::Plan { steps: vec![create] });
    let instance = applier.state.instances.rows().next().unwrap().clone();
    let node = applier.state.nodes.find(&NodeId(2)).unwrap().clone();
    let assign = PlanStep::Assign {
        instance: instance.id,
        instance_version: instance.version,
        node: node.id,
        node_version: node.version,
    };
    applier.must(Command::Plan { steps: vec![assign] });
    let needs = |applier: &Applier, node: u64| applier.state.needs_secret(NodeId(node), &name);
    assert!(needs(&applier, 2) && !needs(&applier, 1), "only the node that runs an instance gets it");
    // The same again is no change, another content is one, and each deploy takes what is there.
    applier.must(put(1));
    let changed = |reply: Reply| matches!(reply, Reply::Deployed { changed, .. } if !changed.is_empty());
    assert!(!changed(applier.deploy("shop", &[("web", web.clone())])));
    applier.must(put(2));
    assert_eq!(applier.state.secrets.find(&name).unwrap().version, applier.index);
    assert!(changed(applier.deploy("shop", &[("web", web)])));
    let refused = applier.apply(Command::RemoveSecret { name: name.clone() }).unwrap_err();
    assert!(refused.to_string().contains("used by shop/web"), "{refused}");
    applier.deploy("shop", &[("web", spec("a"))]);
    // Still in the specification that is being replaced.
    assert!(applier.state.secrets.contains(&name));
    applier.must(Command::RemoveApp { app: AppName::new("shop").unwrap(), with_volumes: false });
    assert!(applier.state.secrets.is_empty(), "an app's secrets go with it");
    let last_index = applier.index;
    applier.must(put(1));
    assert!(applier.state.secrets.find(&name).unwrap().version > last_index, "a version is never used again");
    let too_large = SECRET_BYTES_MAX as u32 + 1;
    let command = Command::PutSecret { name, sealed: vec![], fingerprint: [0; 32], bytes: too_large };
    assert!(applier.apply(command).is_err());
}

fn part(platforms: &[&str], node: u64) -> Command {
    let digest = spec("1").image.digest.expect("specs of tests are resolved");
    let artifact = Artifact {
        kind: ArtifactKind::LoadedImage,
        names: ["hello:1".to_owned()].into(),
        bytes: 1,
        platforms: platforms.iter().map(|name| (name.to_string(), digest.clone())).collect(),
        holders: [NodeId(node)].into(),
        part_holders: Default::default(),
        digest,
    };
    Command::RegisterArtifact { artifact: Box::new(artifact) }
}

#[test]
fn a_holder_holds_every_platform_of_an_image() {
    let mut applier = Applier::with_nodes(3);
    let digest = spec("1").image.digest.unwrap();
    let held = |applier: &Applier| {
        let row = applier.state.artifacts.find(&digest).unwrap();
        let numbers =
            |nodes: &std::collections::BTreeSet<NodeId>| nodes.iter().map(|node| node.0).collect::<Vec<_>>();
        (numbers(&row.holders), numbers(&row.part_holders))
    };
    // Two archives of one index: neither node holds all of it.
    applier.must(part(&["amd64"], 1));
    assert_eq!(held(&applier), (vec![1], vec![]));
    applier.must(part(&["arm64"], 2));
    assert_eq!(held(&applier), (vec![], vec![1, 2]));
    assert_eq!(super::members::only_copies(&applier.state, NodeId(1)), ["image hello:1"]);
    // One that fetched the rest says so.
    let report = NodeReport { holds: vec![digest.clone()], ..NodeReport::default() };
    let start_id = applier.state.nodes.find(&NodeId(2)).unwrap().start_id.unwrap();
    applier.must(Command::Report { node: NodeId(2), start_id, report });
    assert_eq!(held(&applier), (vec![2], vec![1]));
    assert!(super::members::only_copies(&applier.state, NodeId(1)).is_empty());
    // The second of two whole archives, and a part again from one that had it all.
    applier.must(part(&["amd64", "arm64"], 3));
    applier.must(part(&["amd64"], 2));
    assert_eq!(held(&applier), (vec![3], vec![1, 2]));
    // What a registry offers is not what lies here.
    let Command::RegisterArtifact { mut artifact } = part(&["s390x"], 1) else { unreachable!() };
    artifact.kind = ArtifactKind::RegistryImage;
    artifact.holders.clear();
    applier.must(Command::RegisterArtifact { artifact });
    assert_eq!(held(&applier), (vec![3], vec![1, 2]));
    assert_eq!(applier.state.artifacts.find(&digest).unwrap().platform_names(), "amd64, arm64");
}

#[test]
fn disks_are_told_by_the_run_that_is_and_hold_only_what_a_configuration_could() {
    let mut applier = Applier::with_nodes(1);
    let node = NodeId(1);
    let row = |applier: &Applier| applier.state.nodes.find(&node).unwrap().clone();
    let old = row(&applier).start_id.unwrap();
    let disk = |label: &str, target: &str| NodeDisk { label: label.into(), target: target.into() };
    let told = |start_id, disks: &[NodeDisk]| Command::NoteDisks { node, start_id, disks: disks.to_vec() };
    let long = "/mnt/".to_string() + &"a".repeat(125);
    let many: Vec<NodeDisk> = (0..17).map(|at| disk(&at.to_string(), &format!("/mnt/{at}"))).collect();
    let good = [disk("media", "/mnt/media")];
    let bad: [&[NodeDisk]; 10] = [
        &[disk("", "/mnt/a")],
        &[disk("seventeen-letters", "/mnt/a")],
        &[disk("a\u{1b}[2J", "/mnt/a")],
        &[disk("a:/mnt/b", "/mnt/a")],
        &[disk("a", "/etc/a")],
        &[disk("a", "/mnt/../etc")],
        &[disk("a", "/mnt/a\nb")],
        &[disk("a", &long)],
        &[disk("a", "/mnt/a"), disk("a", "/mnt/b")],
        &many,
    ];
    for disks in bad {
        let refused = applier.apply(told(old, disks));
        assert!(
            matches!(&refused, Err(Rejection::Invalid(why)) if why.len() < 100),
            "{disks:?}: {refused:?}"
        );
    }
    assert!(row(&applier).disks.is_empty());
    applier.must(told(old, &good));
    assert_eq!(applier.apply(told(old, &good)), Err(Rejection::Stale), "no news");
    let mut absent = DiskSet::default();
    absent.insert(0);
    applier.must(Command::NoteAbsentDisks { node, start_id: old, absent });
    // Its next run: what the old one said and says late is void, what stands stays.
    let (start_id, before) = (StartId(77), row(&applier));
    applier.must(Command::NodeStarted {
        node,
        start_id,
        architecture: before.architecture,
        size: before.size,
        software: before.software.clone(),
    });
    assert_eq!(applier.apply(told(old, &[])), Err(Rejection::Stale), "a run that is over");
    let back = |start_id| Command::NoteAbsentDisks { node, start_id, absent: DiskSet::default() };
    assert_eq!(applier.apply(back(start_id)), Err(Rejection::Stale), "its list is not known yet");
    applier.must(told(start_id, &good));
    assert_eq!((row(&applier).disks, row(&applier).absent_disks), (good.to_vec(), absent));
    applier.must(back(start_id));
}
