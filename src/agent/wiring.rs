//! Decides what the network of this node is to look like. Pure.
//!
//! Input: the state, what nodes say of their own endpoints, which nodes are silent. Output: the table of the kernel,
//! and which containers answer at all. The same input gives the same table on each node, but for published ports,
//! where the containers here come first so that they see the client's own address.
//!
//! Invariant: what is known to be dead never serves, also if nothing else does (`a_dead_endpoint_never_serves`).

use crate::model::*;
use crate::network::{PortKey, PortRow, VipRow, Wanted};
use crate::state::{Service, State};
use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

pub struct View<'a> {
    pub state: &'a State,
    pub own: NodeId,
    /// Instances that their own node says don't serve.
    pub down: &'a BTreeSet<(NodeId, InstanceId)>,
    pub silent: &'a BTreeSet<NodeId>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wiring {
    pub wanted: Wanted,
    /// Addresses of containers that answer, serving or not: connections to any other are reset.
    pub alive: BTreeSet<Ipv4Addr>,
}

/// An instance that has an address.
pub(super) struct Placed<'a> {
    pub instance: &'a Instance,
    pub service: &'a Service,
    pub spec: &'a ServiceSpec,
    pub address: Ipv4Addr,
    pub is_alive: bool,
    pub is_endpoint: bool,
}

pub(super) fn placed<'a>(view: &View<'a>) -> Vec<Placed<'a>> {
    let mut placed: Vec<Placed<'a>> =
        view.state.instances.rows().filter_map(|instance| place(view, instance)).collect();
    let is_ending = |one: &Placed<'_>| {
        one.instance.node.and_then(|node| view.state.nodes.find(&node)).is_some_and(|node| node.is_ending)
    };
    let served: BTreeSet<ServiceId> =
        placed.iter().filter(|one| one.is_endpoint && !is_ending(one)).map(|one| one.service.id).gather();
    for one in placed.iter_mut().filter(|one| one.is_endpoint) {
        // To the end it serves what nobody else does.
        one.is_endpoint = !is_ending(one) || !served.contains(&one.service.id);
    }
    placed
}

pub fn plan(view: &View<'_>) -> Wiring {
    let placed = placed(view);
    let mut wanted = Wanted {
        vips: vips(view.state, &placed),
        ports: ports(view, &placed),
        local: placed.iter().filter(|one| is_here(view, one)).map(|one| one.address).gather(),
        ..Wanted::default()
    };
    isolate(view.state, &placed, &mut wanted);
    let alive = placed.iter().filter(|one| one.is_alive).map(|one| one.address).gather();
    Wiring { wanted, alive }
}

fn is_here(view: &View<'_>, placed: &Placed<'_>) -> bool {
    placed.instance.node == Some(view.own)
}

fn place<'a>(view: &View<'a>, instance: &'a Instance) -> Option<Placed<'a>> {
    let (node, address) = (instance.node?, instance.address?);
    let service = view.state.services.find(&instance.service)?;
    let spec = service.spec_of(instance.spec_version);
    let is_up = view.state.nodes.find(&node).is_some_and(|node| node.condition == Condition::Up);
    let is_heard = !view.silent.contains(&node) && !view.down.contains(&(node, instance.id));
    let is_alive = is_up && is_heard && instance.observed.phase.is_running();
    let is_ready = match instance.observed.phase {
        Phase::Healthy => true,
        Phase::Running => !is_probed(spec),
        _ => false,
    };
    let is_endpoint = is_alive && is_ready && instance.desired == Desired::Run && !service.is_removed;
    Some(Placed { instance, service, spec, address, is_alive, is_endpoint })
}

fn is_probed(spec: &ServiceSpec) -> bool {
    spec.health.as_ref().is_some_and(|health| health.test != HealthTest::Disabled)
}

fn vips(state: &State, placed: &[Placed<'_>]) -> BTreeMap<Ipv4Addr, VipRow> {
    let mut vips: BTreeMap<Ipv4Addr, VipRow> = state
        .services
        .rows()
        .filter(|service| !service.is_removed)
        .map(|service| {
            (service.vip, VipRow { endpoints: Vec::new(), is_pinned: service.spec.has_client_affinity })
        })
        .gather();
    for one in placed.iter().filter(|one| one.is_endpoint) {
        if let Some(row) = vips.get_mut(&one.service.vip) {
            row.endpoints.push(one.address);
        }
    }
    vips.values_mut().for_each(|row| row.endpoints.order());
    vips
}

fn ports(view: &View<'_>, placed: &[Placed<'_>]) -> BTreeMap<PortKey, PortRow> {
    let mut rows: BTreeMap<PortKey, PortRow> = BTreeMap::new();
    let row_of =
        |service: &Service| PortRow { endpoints: Vec::new(), is_pinned: service.spec.has_client_affinity };
    for service in view.state.services.rows().filter(|service| !service.is_removed) {
        for port in service.spec.ports.iter().filter(|port| !port.is_host_mode) {
            if let Some(key) = key_of(port) {
                rows.insert(key, row_of(service));
            }
        }
    }
    // Those here first: only if there are none do the others count.
    for is_local in [true, false] {
        let mut found: BTreeMap<PortKey, Vec<(Ipv4Addr, u16)>> = BTreeMap::new();
        for one in placed.iter().filter(|one| is_here(view, one) == is_local) {
            for port in one.spec.ports.iter().filter(|port| is_local || !port.is_host_mode) {
                let Some(key) = key_of(port) else { continue };
                if port.is_host_mode {
                    rows.entry(key).or_insert_with(|| row_of(one.service));
                }
                if one.is_endpoint {
                    found.entry(key).or_default().push((one.address, port.target));
                }
            }
        }
        for (key, mut endpoints) in found {
            endpoints.order();
            if let Some(row) = rows.get_mut(&key).filter(|row| row.endpoints.is_empty()) {
                row.endpoints = endpoints;
            }
        }
    }
    rows
}

fn key_of(port: &PortSpec) -> Option<PortKey> {
    let published = port.published?;
    Some(PortKey { protocol: port.protocol, port: published, host_address: port.host_address })
}

/// The networks of a service: its app's own if it names none.
pub fn networks(app: &AppName, spec: &ServiceSpec) -> BTreeSet<String> {
    match spec.networks.is_empty() {
        true => BTreeSet::from([format!("{app}/default")]),
        false => spec.networks.keys().cloned().gather(),
    }
}

/// Networks that some app declares to have no way out.
pub(super) fn internal_networks(state: &State) -> BTreeSet<&str> {
    state
        .services
        .rows()
        .flat_map(|service| &service.spec.networks)
        .filter(|(_, network)| network.is_internal)
        .map(|(key, _)| key.as_str())
        .gather()
}

/// Whether who is only in these has no way out.
pub(super) fn is_inner(networks: &BTreeSet<String>, internal: &BTreeSet<&str>) -> bool {
    networks.iter().all(|network| internal.contains(network.as_str()))
}

/// Containers of the same networks are one class; a class reaches whoever shares a network with it.
fn isolate(state: &State, placed: &[Placed<'_>], wanted: &mut Wanted) {
    let internal = internal_networks(state);
    let mut classes: BTreeMap<BTreeSet<String>, u32> = BTreeMap::new();
    let mut members: BTreeMap<String, BTreeSet<Ipv4Addr>> = BTreeMap::new();
    for one in placed {
        let own = networks(&one.service.app, one.spec);
        if is_inner(&own, &internal) {
            wanted.inner.insert(one.address);
        }
        own.iter().for_each(|network| {
            members.entry(network.clone()).or_default().insert(one.address);
        });
        let next = classes.len() as u32 + 1;
        wanted.classes.insert(one.address, *classes.entry(own).or_insert(next));
    }
    for (networks, class) in classes {
        let addresses = networks.iter().filter_map(|network| members.get(network)).flatten();
        wanted.reach.extend(addresses.map(|address| (class, *address)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::Update;
    use crate::state::testing::Applier;

    const OWN: NodeId = NodeId(1);

    fn service(id: u64, name: &str, change: impl FnOnce(&mut ServiceSpec)) -> Service {
        let image = ImageSpec { reference: "x".into(), digest: None };
        let mut spec = ServiceSpec::new(image);
        change(&mut spec);
        Service {
            id: ServiceId(id),
            app: AppName::new("shop").unwrap(),
            name: name.into(),
            spec,
            spec_version: 1,
            previous: None,
            superseded: Vec::new(),
            update: Update::Done,
            vip: Ipv4Addr::new(10, 78, 0, id as u8),
            was_started: true,
            was_healthy: true,
            was_completed: false,
            is_removed: false,
            version: 1,
        }
    }

    fn instance(id: u64, service: u64, node: u64, phase: Phase) -> Instance {
        Instance {
            id: InstanceId(id),
            service: ServiceId(service),
            slot: 1,
            spec_version: 1,
            node: Some(NodeId(node)),
            address: Some(address(node, id)),
            desired: Desired::Run,
            observed: Observed { phase, seq: 1, start_id: None, exit: None, since: Timestamp(0) },
            created_at: Timestamp(0),
            version: 1,
        }
    }

    fn address(node: u64, id: u64) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, node as u8, id as u8)
    }

    /// Two nodes; `web` (1) publishes 80 and has one instance on each, `db` (2) has one on the other node.
    fn state() -> State {
        let mut state = Applier::with_nodes(2).state;
        let port = PortSpec {
            protocol: Protocol::Tcp,
            published: Some(80),
            target: 8080,
            host_address: None,
            is_host_mode: false,
        };
        state.services.put(ServiceId(1), service(1, "web", |spec| spec.ports = vec![port]));
        let back = BTreeMap::from([(
            "shop/back".to_string(),
            NetworkUse { is_internal: true, ..NetworkUse::default() },
        )]);
        state.services.put(ServiceId(2), service(2, "db", |spec| spec.networks = back));
        for row in [
            instance(11, 1, 1, Phase::Running),
            instance(12, 1, 2, Phase::Running),
            instance(13, 2, 2, Phase::Running),
        ] {
            state.instances.put(row.id, row);
        }
        state
    }

    fn plan_of(state: &State, down: &[(u64, u64)], silent: &[u64]) -> Wiring {
        let down = down.iter().map(|(node, id)| (NodeId(*node), InstanceId(*id))).collect();
        let silent = silent.iter().map(|id| NodeId(*id)).collect();
        plan(&View { state, own: OWN, down: &down, silent: &silent })
    }

    fn vip(wiring: &Wiring, id: u8) -> &[Ipv4Addr] {
        &wiring.wanted.vips[&Ipv4Addr::new(10, 78, 0, id)].endpoints
    }

    fn port(wiring: &Wiring) -> &[(Ipv4Addr, u16)] {
        let key = PortKey { protocol: Protocol::Tcp, port: 80, host_address: None };
        &wiring.wanted.ports[&key].endpoints
    }

    #[test]
    fn a_published_port_prefers_what_runs_here() {
        let state = state();
        let wiring = plan_of(&state, &[], &[]);
        assert_eq!(vip(&wiring, 1), [address(1, 11), address(2, 12)]);
        assert_eq!(port(&wiring), [(address(1, 11), 8080)]);
        assert_eq!(port(&plan_of(&state, &[(1, 11)], &[])), [(address(2, 12), 8080)]);
    }

    #[test]
    fn a_dead_endpoint_never_serves() {
        let mut state = state();
        for (down, silent) in [(vec![(2, 12)], vec![]), (vec![], vec![2])] {
            let wiring = plan_of(&state, &down, &silent);
            assert_eq!(vip(&wiring, 1), [address(1, 11)]);
            assert!(!wiring.alive.contains(&address(2, 12)));
        }
        let nothing = plan_of(&state, &[(1, 11), (2, 12)], &[]);
        assert!(vip(&nothing, 1).is_empty() && port(&nothing).is_empty());
        // A hint about another node's instance says nothing.
        assert_eq!(vip(&plan_of(&state, &[(2, 11)], &[]), 1).len(), 2);
        state.nodes.update(&NodeId(2), |node| node.condition = Condition::Down);
        assert_eq!(vip(&plan_of(&state, &[], &[]), 1), [address(1, 11)]);
    }

    #[test]
    fn a_stopping_instance_gets_no_new_connections_and_keeps_its_old_ones() {
        let mut state = state();
        state.instances.update(&InstanceId(12), |row| row.desired = Desired::Remove);
        let wiring = plan_of(&state, &[], &[]);
        assert_eq!(vip(&wiring, 1), [address(1, 11)]);
        assert!(wiring.alive.contains(&address(2, 12)));
    }

    #[test]
    fn a_machine_that_ends_gets_no_new_connections_and_keeps_its_old_ones() {
        let mut state = state();
        state.nodes.update(&NodeId(2), |node| node.is_ending = true);
        let wiring = plan_of(&state, &[], &[]);
        assert_eq!(vip(&wiring, 1), [address(1, 11)]);
        assert!(wiring.alive.contains(&address(2, 12)));
        assert_eq!(vip(&wiring, 2), [address(2, 13)], "nobody else serves it");
        state.nodes.update(&OWN, |node| node.is_ending = true);
        assert_eq!(vip(&plan_of(&state, &[], &[]), 1).len(), 2);
    }

    #[test]
    fn a_probed_instance_serves_once_it_is_healthy() {
        let mut state = state();
        state.services.update(&ServiceId(1), |row| {
            let test = HealthTest::Shell("true".into());
            row.spec.health =
                Some(HealthSpec { test, interval_ms: 1, timeout_ms: 1, retries: 1, start_period_ms: 0 });
        });
        state.instances.update(&InstanceId(12), |row| row.observed.phase = Phase::Healthy);
        assert_eq!(vip(&plan_of(&state, &[], &[]), 1), [address(2, 12)]);
    }

    #[test]
    fn containers_reach_those_they_share_a_network_with() {
        let state = state();
        let wanted = plan_of(&state, &[], &[]).wanted;
        let reaches = |from: Ipv4Addr, to: Ipv4Addr| wanted.reach.contains(&(wanted.classes[&from], to));
        assert!(reaches(address(1, 11), address(2, 12)));
        assert!(!reaches(address(1, 11), address(2, 13)) && !reaches(address(2, 13), address(1, 11)));
        assert_eq!(wanted.inner, BTreeSet::from([address(2, 13)]));
        assert_eq!(wanted.local, BTreeSet::from([address(1, 11)]));
    }
}
