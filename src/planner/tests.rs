//! Rules of the planner, on states that the real state machine made.

use super::*;
use crate::model::*;
use crate::state::testing::{Applier, spec, start};
use crate::state::{Command, PlanStep};
use std::collections::BTreeMap;

fn heard() -> HeardNodes {
    HeardNodes::new()
}

/// Plans and applies until nothing is left, reporting `phase` for what runs; returns how many plans it took.
fn settle(applier: &mut Applier, phase: Phase) -> usize {
    for round in 0..100 {
        let steps = plan(&applier.state, &heard(), applier.state.time());
        if steps.is_empty() {
            return round;
        }
        applier.must(Command::Plan { steps });
        let waiting = applier.state.instances.rows().any(|row| {
            row.node.is_some() && (row.observed.phase == Phase::Assigned || row.desired == Desired::Remove)
        });
        if waiting {
            applier.report_all(phase);
        }
    }
    panic!("the planner does not come to an end: {:?}", applier.state.instances);
}

fn by_node(applier: &Applier) -> BTreeMap<u64, usize> {
    let mut counts = BTreeMap::new();
    for row in applier.state.instances.rows().filter(|row| row.desired == Desired::Run) {
        *counts.entry(row.node.map_or(0, |node| node.0)).or_default() += 1;
    }
    counts
}

/// Lets time pass in the state by an entry that changes nothing else.
fn pass(applier: &mut Applier, seconds: u64) {
    applier.index += seconds;
    applier.must(Command::LabelNode { node: NodeId(1), set: BTreeMap::new(), remove: Vec::new() });
}

#[test]
fn plan_is_a_fixpoint() {
    let mut applier = Applier::with_nodes(3);
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 4, ..spec("1") }), ("db", spec("1"))]);
    settle(&mut applier, Phase::Running);
    pass(&mut applier, 10);
    settle(&mut applier, Phase::Running);
    assert_eq!(plan(&applier.state, &heard(), applier.state.time()), Vec::new());
}

#[test]
fn instances_spread_over_nodes() {
    let mut applier = Applier::with_nodes(3);
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 6, ..spec("1") })]);
    settle(&mut applier, Phase::Running);
    assert_eq!(by_node(&applier), [(1, 2), (2, 2), (3, 2)].into());
}

#[test]
fn a_troubled_node_is_taken_when_there_is_no_other() {
    let mut applier = Applier::with_nodes(3);
    let mut troubles = Troubles::default();
    troubles.set(Trouble::UnderVoltage, true);
    applier.must(Command::NoteTroubles { node: NodeId(1), troubles });
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 4, ..spec("1") })]);
    settle(&mut applier, Phase::Running);
    assert_eq!(by_node(&applier), BTreeMap::from([(2, 2), (3, 2)]));
    for node in [2, 3] {
        applier.must(Command::DrainNode { node: NodeId(node), is_drained: true });
    }
    settle(&mut applier, Phase::Running);
    assert_eq!(by_node(&applier), BTreeMap::from([(1, 4)]));
}

#[test]
fn a_dead_node_s_instances_move_and_pinned_ones_wait() {
    let mut applier = Applier::with_nodes(3);
    let data = MountSpec {
        target: "/data".into(),
        is_read_only: false,
        source: MountSource::Volume { name: "data".into() },
    };
    let db = ServiceSpec { mounts: vec![data], ..spec("1") };
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 3, ..spec("1") }), ("db", db)]);
    settle(&mut applier, Phase::Running);
    let pinned = applier.state.volumes.rows().next().unwrap().node.unwrap();
    let start_id = applier.state.nodes.find(&pinned).unwrap().start_id;
    applier.must(Command::MarkNodeDown { node: pinned, start_id });
    settle(&mut applier, Phase::Running);
    let db = applier.state.services.rows().find(|service| service.name == "db").unwrap().id;
    let rows: Vec<&Instance> = applier.state.instances_of(db).collect();
    assert_eq!(rows.len(), 1);
    assert_eq!((rows[0].observed.phase, rows[0].node), (Phase::Lost, Some(pinned)));
    let web: Vec<&Instance> = applier.state.instances.rows().filter(|row| row.service != db).collect();
    assert_eq!(web.len(), 3);
    assert!(web.iter().all(|row| row.node != Some(pinned)), "{web:?}");
    // The node returns: its data serves again under the same id.
    let id = rows[0].id;
    applier.must(start(pinned.0 as u8, 99));
    settle(&mut applier, Phase::Running);
    assert!(applier.state.instances.find(&id).is_some());
}

#[test]
fn an_update_goes_one_at_a_time_and_only_on_success() {
    let mut applier = Applier::with_nodes(3);
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 3, ..spec("1") })]);
    settle(&mut applier, Phase::Running);
    pass(&mut applier, 10);
    settle(&mut applier, Phase::Running);
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 3, ..spec("22") })]);
    let mut most_at_once = 0;
    for _ in 0..60 {
        let steps = plan(&applier.state, &heard(), applier.state.time());
        if !steps.is_empty() {
            applier.must(Command::Plan { steps });
        }
        let unready = applier.state.instances.rows().filter(|row| !row.observed.phase.is_running()).count();
        most_at_once = most_at_once.max(unready);
        applier.report_all(Phase::Running);
        pass(&mut applier, 2);
    }
    assert_eq!(most_at_once, 1, "more than one instance was replaced at a time");
    assert!(applier.state.instances.rows().all(|row| row.spec_version == 2));
    let service = applier.state.services.rows().next().unwrap();
    assert_eq!((service.update.clone(), service.previous.is_none()), (crate::state::Update::Done, true));
}

#[test]
fn a_failed_update_stops_and_the_old_instances_keep_serving() {
    let mut applier = Applier::with_nodes(2);
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 2, ..spec("1") })]);
    settle(&mut applier, Phase::Running);
    pass(&mut applier, 10);
    settle(&mut applier, Phase::Running);
    let old: Vec<InstanceId> = applier.state.instances.rows().map(|row| row.id).collect();
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 2, ..spec("22") })]);
    for _ in 0..20 {
        let steps = plan(&applier.state, &heard(), applier.state.time());
        if !steps.is_empty() {
            applier.must(Command::Plan { steps });
        }
        let rows: Vec<Instance> = applier.state.instances.rows().cloned().collect();
        for row in rows.iter().filter(|row| !old.contains(&row.id)) {
            if let Some(node) = row.node {
                let is_gone = row.desired == Desired::Remove;
                applier.report(node, row.id, if is_gone { Phase::Stopped } else { Phase::Failing }, is_gone);
            }
        }
        pass(&mut applier, 2);
    }
    let service = applier.state.services.rows().next().unwrap();
    assert!(matches!(service.update, crate::state::Update::Failed { .. }), "{:?}", service.update);
    let now: Vec<InstanceId> = applier.state.instances.rows().map(|row| row.id).collect();
    assert_eq!(now, old, "the old instances must be the ones that are left");
}

#[test]
fn what_cannot_be_placed_says_why_with_numbers() {
    let mut applier = Applier::with_nodes(3);
    applier.must(Command::DrainNode { node: NodeId(3), is_drained: true });
    let resources =
        ResourceSpec { reserved_memory_bytes: Some((1 << 30) + (64 << 20)), ..Default::default() };
    applier.deploy("shop", &[("web", ServiceSpec { resources, ..spec("1") })]);
    settle(&mut applier, Phase::Running);
    let row = applier.state.instances.rows().next().unwrap();
    let reason = pending_reason(&applier.state, &heard(), row, applier.state.time());
    assert_eq!(reason.as_deref(), Some("2 nodes lack 64 MiB; pi-3 is drained"));
}

#[test]
fn a_service_waits_for_what_it_depends_on() {
    let mut applier = Applier::with_nodes(1);
    let depends_on = [("db".to_string(), DependencyCondition::Healthy)].into();
    applier.deploy("shop", &[("web", ServiceSpec { depends_on, ..spec("1") }), ("db", spec("1"))]);
    settle(&mut applier, Phase::Running);
    let placed = |applier: &Applier| applier.state.instances.rows().filter(|row| row.node.is_some()).count();
    assert_eq!(placed(&applier), 1);
    applier.report_all(Phase::Healthy);
    settle(&mut applier, Phase::Healthy);
    assert_eq!(placed(&applier), 2);
}

#[test]
fn a_drained_node_keeps_nothing() {
    let mut applier = Applier::with_nodes(2);
    applier.deploy("shop", &[("web", ServiceSpec { replicas: 2, ..spec("1") })]);
    settle(&mut applier, Phase::Running);
    applier.must(Command::DrainNode { node: NodeId(2), is_drained: true });
    settle(&mut applier, Phase::Running);
    assert_eq!(by_node(&applier), [(1, 2)].into());
}

#[test]
fn an_exclusive_instance_is_gone_before_another_one_is_made() {
    let exclusive = || {
        let mut applier = Applier::with_nodes(2);
        applier.deploy("shop", &[("db", ServiceSpec { is_exclusive: true, ..spec("1") })]);
        settle(&mut applier, Phase::Running);
        let row = applier.state.instances.rows().next().unwrap();
        let (id, node) = (row.id, row.node.unwrap());
        (applier, id, node)
    };
    // Drained: the node lives and says when it is gone.
    let (mut applier, _, node) = exclusive();
    applier.must(Command::DrainNode { node, is_drained: true });
    for _ in 0..3 {
        let steps = plan(&applier.state, &heard(), applier.state.time());
        if !steps.is_empty() {
            applier.must(Command::Plan { steps });
        }
        assert_eq!(applier.state.instances.len(), 1, "two at once");
    }
    settle(&mut applier, Phase::Running);
    assert!(!by_node(&applier).contains_key(&node.0) && applier.state.instances.len() == 1);
    // Its node is lost, also while the old one is being stopped: the lease must be over first.
    for is_being_stopped in [false, true] {
        let (mut applier, id, node) = exclusive();
        if is_being_stopped {
            applier.must(Command::DrainNode { node, is_drained: true });
            let steps = plan(&applier.state, &heard(), applier.state.time());
            applier.must(Command::Plan { steps });
        }
        let start_id = applier.state.nodes.find(&node).unwrap().start_id;
        applier.must(Command::MarkNodeDown { node, start_id });
        pass(&mut applier, 10);
        assert_eq!(plan(&applier.state, &heard(), applier.state.time()), Vec::new());
        assert!(applier.state.instances.contains(&id));
        pass(&mut applier, 5);
        settle(&mut applier, Phase::Running);
        assert!(!applier.state.instances.contains(&id) && applier.state.instances.len() == 1);
    }
}

#[test]
fn an_image_goes_only_where_it_runs() {
    let mut applier = Applier::with_nodes(3);
    let Command::NodeStarted { start_id, size, software, .. } = start(1, 7) else { panic!("a start") };
    let (node, architecture) = (NodeId(1), Architecture::Amd64);
    applier.must(Command::NodeStarted { node, start_id, architecture, size, software });
    let digest = spec("1").image.digest.expect("specs of tests are resolved");
    let artifact = Artifact {
        kind: ArtifactKind::LoadedImage,
        names: ["hello:1".to_owned()].into(),
        bytes: 1,
        platforms: [("arm64/v8".to_owned(), digest.clone())].into(),
        holders: [node].into(),
        part_holders: Default::default(),
        digest,
    };
    applier.must(Command::RegisterArtifact { artifact: Box::new(artifact) });
    let global = ServiceSpec { is_global: true, ..spec("1") };
    for service in [global, ServiceSpec { replicas: 2, ..spec("1") }] {
        applier.deploy("shop", &[("web", service)]);
        for _ in 0..3 {
            settle(&mut applier, Phase::Running);
            pass(&mut applier, 10);
        }
        assert_eq!(by_node(&applier), [(2, 1), (3, 1)].into());
    }
}

#[test]
fn what_runs_where_a_new_image_can_t_waits_for_the_update() {
    let mut applier = Applier::with_nodes(3);
    let Command::NodeStarted { start_id, size, software, .. } = start(1, 7) else { panic!("a start") };
    let (node, architecture) = (NodeId(1), Architecture::Amd64);
    applier.must(Command::NodeStarted { node, start_id, architecture, size, software });
    let global = |version| ServiceSpec { is_global: true, ..spec(version) };
    applier.deploy("shop", &[("web", global("1"))]);
    for _ in 0..4 {
        settle(&mut applier, Phase::Running);
        pass(&mut applier, 10);
    }
    assert_eq!(by_node(&applier), [(1, 1), (2, 1), (3, 1)].into());

    let digest = spec("22").image.digest.expect("specs of tests are resolved");
    let artifact = Artifact {
        kind: ArtifactKind::LoadedImage,
        names: ["hello:22".to_owned()].into(),
        bytes: 1,
        platforms: [("arm64/v8".to_owned(), digest.clone())].into(),
        holders: [NodeId(2)].into(),
        part_holders: Default::default(),
        digest,
    };
    applier.must(Command::RegisterArtifact { artifact: Box::new(artifact) });
    applier.deploy("shop", &[("web", global("22"))]);
    let here = |applier: &Applier| by_node(applier).get(&1).copied();
    let steps = plan(&applier.state, &heard(), applier.state.time());
    applier.must(Command::Plan { steps });
    assert_eq!(here(&applier), Some(1), "the update has only begun");
    let service = applier.state.services.rows().next().unwrap();
    let said = left_out(&applier.state, service).unwrap();
    assert!(said.starts_with("not on ") && said.ends_with(": the image is built for arm64/v8"), "{said}");
    for _ in 0..6 {
        settle(&mut applier, Phase::Running);
        pass(&mut applier, 10);
    }
    assert_eq!(by_node(&applier), [(2, 1), (3, 1)].into());
    assert_eq!(plan(&applier.state, &heard(), applier.state.time()), Vec::new());
}

fn binds(path: &str) -> ServiceSpec {
    let source = MountSource::HostPath { path: path.into() };
    let mount = MountSpec { target: "/data".into(), is_read_only: false, source };
    ServiceSpec { mounts: vec![mount], ..spec("1") }
}

/// Nodes 1 to 3, of which this one names a disk `media`.
fn with_disk(node: u64) -> Applier {
    let mut applier = Applier::with_nodes(3);
    let disks = vec![NodeDisk { label: "media".into(), target: "/mnt/media".into() }];
    let node = NodeId(node);
    let start_id = applier.state.nodes.find(&node).and_then(|node| node.start_id).unwrap();
    applier.must(Command::NoteDisks { node, start_id, disks });
    applier
}

/// What a node's newest figures say of its first disk.
fn hears(applier: &Applier, node: u64, is_absent: bool) -> HeardNodes {
    let mut absent_disks = DiskSet::default();
    if is_absent {
        absent_disks.insert(0);
    }
    let run = applier.state.nodes.find(&NodeId(node)).and_then(|node| node.start_id);
    [(NodeId(node), Heard { run, absent_disks, ..Heard::default() })].into()
}

fn assigned(applier: &Applier, heard: &HeardNodes) -> Vec<u64> {
    let steps = plan(&applier.state, heard, applier.state.time());
    let node = |step: &PlanStep| match step {
        PlanStep::Assign { node, .. } => Some(node.0),
        _ => None,
    };
    steps.iter().filter_map(node).collect()
}

#[test]
fn what_binds_a_disk_is_placed_where_it_is_and_only_while_it_is_there() {
    let mut applier = with_disk(2);
    applier.deploy("cinema", &[("films", binds("/mnt/media/films")), ("other", binds("/mnt"))]);
    let steps = plan(&applier.state, &heard(), applier.state.time());
    applier.must(Command::Plan { steps });
    let films = applier.state.services.rows().find(|service| service.name == "films").unwrap().id;
    let row = applier.state.instances_of(films).next().unwrap().clone();
    let reason = |applier: &Applier, heard: &HeardNodes| {
        pending_reason(&applier.state, heard, &row, applier.state.time()).unwrap_or_default()
    };
    let there = hears(&applier, 2, false);
    assert_eq!(assigned(&applier, &there), [2, 1], "films and other");
    let absent = hears(&applier, 2, true);
    assert_eq!(assigned(&applier, &absent), [1], "only what does not bind it");
    assert_eq!(
        reason(&applier, &absent),
        "disk media (/mnt/media) is absent on pi-2: plug it in, or take the mount out of the service; 2 nodes have no \
         disk for /mnt/media/films, which pi-2 has"
    );
    // Figures of a run whose list of disks the state does not know say nothing.
    let mut other_run = absent.clone();
    other_run.values_mut().for_each(|heard| heard.run = Some(StartId(77)));
    assert_eq!(assigned(&applier, &other_run), [2, 1]);
    // A node that was not heard is as the state says.
    let start_id = applier.state.nodes.find(&NodeId(2)).and_then(|node| node.start_id).unwrap();
    let absent = DiskSet::default();
    assert!(
        applier.apply(Command::NoteAbsentDisks { node: NodeId(2), start_id, absent }).is_err(),
        "no news"
    );
    let mut absent = DiskSet::default();
    absent.insert(0);
    let stale = Command::NoteAbsentDisks { node: NodeId(2), start_id: StartId(77), absent };
    assert!(applier.apply(stale).is_err(), "another run");
    applier.must(Command::NoteAbsentDisks { node: NodeId(2), start_id, absent });
    assert_eq!(assigned(&applier, &heard()), [1]);
    assert_eq!(assigned(&applier, &there), [2, 1], "what was heard is newer");
    let texts: Vec<String> = applier.state.events.rows().map(|event| event.text.clone()).collect();
    assert!(
        texts.iter().any(|text| text.starts_with("pi-2: disk media (/mnt/media) is absent")),
        "{texts:?}"
    );
}

#[test]
fn an_instance_whose_disk_was_pulled_stays_with_its_data() {
    let mut applier = with_disk(2);
    applier.deploy("cinema", &[("films", binds("/mnt/media"))]);
    settle(&mut applier, Phase::Running);
    let absent = hears(&applier, 2, true);
    let row = applier.state.instances.rows().next().unwrap().clone();
    assert_eq!(row.node, Some(NodeId(2)));
    assert_eq!(disk_reason(&applier.state, &hears(&applier, 2, false), &row), None);
    let why = disk_reason(&applier.state, &absent, &row).unwrap();
    assert!(why.starts_with("disk media (/mnt/media) is absent on pi-2: plug it in"), "{why}");
    applier.report(NodeId(2), row.id, Phase::Lost, false);
    assert_eq!(plan(&applier.state, &absent, applier.state.time()), Vec::new());
}

#[test]
fn a_constraint_counts_before_another_node_s_disk() {
    let mut applier = with_disk(2);
    let constraint =
        Constraint { subject: ConstraintSubject::NodeName, must_equal: true, value: "pi-3".into() };
    let placement = PlacementSpec { constraints: vec![constraint], ..PlacementSpec::default() };
    applier.deploy("cinema", &[("films", ServiceSpec { placement, ..binds("/mnt/media") })]);
    settle(&mut applier, Phase::Running);
    assert_eq!(by_node(&applier), [(3, 1)].into());
}
