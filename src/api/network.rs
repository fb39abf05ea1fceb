//! `tinydc net`: what the network is and why something in it does not work; floating addresses.
//!
//! Each node tells its own facts (ways, connections, taken ports, obstacles); the node that was asked puts them together
//! with the state.

use super::backend::Backend;
use super::body::{self, Reply};
use super::error::ApiError;
use super::handlers::{app_name, lan_addresses, mark_of};
use super::network_check;
use super::peer;
use super::wire::*;
use crate::agent::{HeldAddresses, NetworkView, WaysView, chain, wiring};
use crate::model::*;
use crate::network::overlay::Way;
use crate::network::{arp, foreign, lan};
use crate::state::{Command, Service, State};
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::{Method, Request};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

const FACTS_BYTES_MAX: usize = 1 << 20;
const FACTS_LIMIT: Duration = Duration::from_millis(1500);

/// What this node alone knows.
pub async fn own_facts(backend: &Arc<Backend>) -> NodeNetworkBody {
    let state = backend.replica.state();
    let view = backend.agent.network_view();
    let held = backend.agent.held_addresses();
    let network = backend.ground.network.clone();
    let ranges = state.cluster().map(|cluster| (cluster.container_range, cluster.vip_range));
    let ula_prefix = state.ula_prefix();
    let (connections, obstacles, ways, lans, ipv6) = crate::tasks::unblock(move || {
        let obstacles = ranges
            .map(|(containers, vips)| foreign::obstacles(containers, vips, ula_prefix))
            .unwrap_or_default();
        let connections = network.connection_counts().unwrap_or_default();
        let ways: Vec<(u8, Way, &'static str)> = network
            .ways()
            .into_iter()
            .map(|(number, way)| {
                let kind = match way {
                    Way::Sealed { slot, .. } => network.tunnel_kind(slot),
                    Way::Direct { .. } | Way::Tunnel { .. } => None,
                };
                (number, way, kind.unwrap_or(way.name()))
            })
            .collect();
        (connections, obstacles, ways, lan::interfaces().unwrap_or_default(), network.probe_ipv6())
    })
    .await;
    let name_of = |number: &u8| {
        let node = state.nodes.rows().find(|node| node.number == *number);
        node.map_or_else(|| format!("node {number}"), |node| node.name.clone())
    };
    let problems = problems_of(&state, obstacles, view, backend.ways.view(), &held);
    NodeNetworkBody {
        node: state.node_name(backend.node),
        bridge: backend.ground.network.bridge_address().to_string(),
        lans: lans.iter().map(|lan| format!("{}/{} {}", lan.address, lan.prefix_length, lan.name)).collect(),
        ways: ways
            .iter()
            .map(|(number, way, kind)| WayBody {
                node: name_of(number),
                kind: (*kind).into(),
                address: way.address().to_string(),
            })
            .collect(),
        connections: connections.into_iter().map(|(address, count)| (address.to_string(), count)).gather(),
        floating: held.held.iter().map(ToString::to_string).collect(),
        ipv6_obstacle: ipv6.err().map(|error| chain(&error)),
        problems,
    }
}

/// What keeps the network of this node from being as it should, each with its cure.
fn problems_of(
    state: &State,
    obstacles: Vec<foreign::Obstacle>,
    view: NetworkView,
    ways: WaysView,
    held: &HeldAddresses,
) -> Vec<NetworkProblemBody> {
    let mut problems: Vec<NetworkProblemBody> = obstacles
        .into_iter()
        .map(|obstacle| NetworkProblemBody { text: obstacle.text, remedy: Some(obstacle.remedy) })
        .collect();
    problems.extend(view.names_problem.map(|text| NetworkProblemBody {
        text: format!("containers have no name server: {text}"),
        remedy: Some("find who has port 53: ss -lnup 'sport = :53'".into()),
    }));
    problems.extend(view.ipv6_problem.map(|text| NetworkProblemBody {
        text: format!("containers here have no IPv6: {text}"),
        remedy: Some("it is tried again every second; without IPv6: tinydc settings ipv6 false".into()),
    }));
    problems.extend(view.ingress_problem.map(|text| {
        NetworkProblemBody {
            text: format!("HTTP routes are not served: {text}"),
            remedy: Some(
                "stop the program that has the port, or move the routes: tinydc settings ingress_http_port"
                    .into(),
            ),
        }
    }));
    problems.extend(ways.problem.map(|text| NetworkProblemBody {
        text: format!("traffic to other nodes can't be encrypted: {text}"),
        remedy: Some("modprobe wireguard, or modprobe tun; it is tried again every 10 s".into()),
    }));
    if !ways.waits_for.is_empty() {
        let names: Vec<String> = ways.waits_for.iter().map(|node| state.node_name(*node)).collect();
        problems.push(NetworkProblemBody {
            text: format!("the change of `encrypt`, or of keys, waits for {}", names.join(", ")),
            remedy: None,
        });
    }
    problems.extend(view.error.map(|text| NetworkProblemBody { text, remedy: None }));
    problems.extend(view.taken.iter().map(|taken| NetworkProblemBody {
        text: format!(
            "port {}/{} is taken by {}",
            taken.key.port,
            taken.key.protocol.name(),
            taken.by.as_deref().unwrap_or("another program")
        ),
        remedy: Some("stop that program, or publish another port".into()),
    }));
    problems.extend(held.conflicts.iter().map(|(address, by)| NetworkProblemBody {
        text: format!("{address} is answered by another machine, {by}"),
        remedy: Some("switch that machine off or give it another address".into()),
    }));
    problems
}

/// `GET /internal/network`.
pub async fn facts(backend: &Arc<Backend>) -> Result<Reply, ApiError> {
    body::ok(&own_facts(backend).await)
}

async fn gather(backend: &Arc<Backend>) -> Vec<NodeNetworkBody> {
    let mut tasks = Vec::new();
    for node in backend.transport.connections().into_keys() {
        let backend = backend.clone();
        tasks.push(
            backend
                .executor
                .clone()
                .spawn(async move { peer::within(FACTS_LIMIT, ask_facts(&backend, node)).await.flatten() }),
        );
    }
    let mut found = vec![own_facts(backend).await];
    for task in tasks {
        found.extend(task.await);
    }
    found.order_by(|a, b| a.node.cmp(&b.node));
    found
}

/// Names have IPv6 addresses everywhere or nowhere: what a node without it runs would be a dead end for all others.
pub async fn refuse_if_some_lack_ipv6(backend: &Arc<Backend>) -> Result<(), ApiError> {
    let state = backend.replica.state();
    let nodes = gather(backend).await;
    for node in state.nodes.rows().filter(|node| node.condition == Condition::Up) {
        let facts = nodes.iter().find(|facts| facts.node == node.name);
        let Some(facts) = facts else {
            let told = format!("{} does not tell whether it has IPv6", node.name);
            return Err(
                ApiError::rejected(told).hint("see whether it is reached: tinydc net; then set it again")
            );
        };
        if let Some(why) = &facts.ipv6_obstacle {
            let told = format!("{} can't have IPv6: {why}", node.name);
            return Err(ApiError::rejected(told).hint(
                "load the module there (modprobe nft_fib_ipv6 nft_reject_ipv6), or give it a kernel that has it, and set \
                 it again",
            ));
        }
    }
    Ok(())
}

async fn ask_facts(backend: &Backend, node: NodeId) -> Option<NodeNetworkBody> {
    let request = peer::request(Method::GET, "/internal/network", Bytes::new());
    let answer = peer::send(&backend.transport, &backend.executor, node, request).await.ok()?;
    let bytes = body::bytes(answer.into_body(), FACTS_BYTES_MAX).await.ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// `GET /v1/network[?app=APP]`.
pub async fn show(backend: &Arc<Backend>, app: Option<&str>) -> Result<Reply, ApiError> {
    let reading = backend.reading().await?;
    let nodes = gather(backend).await;
    let state = &reading.state;
    let app = app.map(app_name).transpose()?;
    let services = state
        .services
        .rows()
        .filter(|service| !service.is_removed && app.as_ref().is_none_or(|app| *app == service.app))
        .map(|service| service_body(backend, state, service, &nodes))
        .collect();
    let ranges = state.cluster().map(|cluster| (cluster.container_range, cluster.vip_range));
    let (containers, vips) = ranges.unwrap_or((Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED));
    body::ok(&NetworkBody {
        freshness: reading.freshness,
        container_range: format!("{containers}/16"),
        vip_range: format!("{vips}/16"),
        ipv6_prefix: state.ula_prefix().map(|prefix| prefix.to_string()),
        services,
        addresses: address_rows(state, &nodes),
        certificates: certificates(backend, state, app.as_ref()),
        nodes,
    })
}

/// What this node's ingress shows for hosts, and why not.
pub fn certificates(backend: &Backend, state: &State, app: Option<&AppName>) -> Vec<CertificateBody> {
    let now = backend.replica.cluster_time().0 / 1000;
    let is_wanted = |service: &str| {
        app.is_none_or(|app| service.split_once('/').is_some_and(|(own, _)| own == app.as_str()))
    };
    let views = backend.agent.network_view().certificates.into_iter();
    views
        .filter(|view| is_wanted(&view.service))
        .map(|view| {
            let about = view.about.as_ref();
            let has_ended = about.is_some_and(|about| about.not_after <= now);
            // A renewal that fails is no problem of today's certificate, and will be.
            let row = state.certificates.find(&view.host).filter(|_| !view.source.starts_with("secret"));
            let trouble = row.and_then(|row| row.trouble.as_ref()).map(ToString::to_string);
            CertificateBody {
                names: about.map(|about| about.names.clone()).unwrap_or_default(),
                not_after: about.map(|about| Timestamp(about.not_after.saturating_mul(1000)).to_string()),
                problem: view.problem.or(trouble).or_else(|| has_ended.then(|| "it has ended".into())),
                host: view.host,
                service: view.service,
                source: view.source,
            }
        })
        .collect()
}

fn service_body(
    backend: &Backend,
    state: &State,
    service: &Service,
    nodes: &[NodeNetworkBody],
) -> ServiceNetworkBody {
    let view = backend.agent.network_view();
    let serving =
        view.wiring.wanted.vips.get(&service.vip).map(|row| row.endpoints.clone()).unwrap_or_default();
    let endpoints = state
        .instances_of(service.id)
        .filter_map(|instance| {
            let (node, address) = (instance.node?, instance.address?);
            let node = state.node_name(node);
            let text = address.to_string();
            let facts = nodes.iter().find(|facts| facts.node == node);
            Some(EndpointBody {
                instance: state.instance_name(instance),
                connections: facts.map(|facts| facts.connections.get(&text).copied().unwrap_or(0)),
                address: text,
                state: match serving.contains(&address) {
                    true => "serving".into(),
                    false => why_not(instance, view.wiring.alive.contains(&address)).into(),
                },
                phase: instance.observed.phase.name().into(),
                node,
            })
        })
        .collect();
    ServiceNetworkBody {
        app: service.app.to_string(),
        service: service.name.clone(),
        vip: service.vip.to_string(),
        vip6: state.ula_prefix().map(|prefix| prefix.embed(service.vip).to_string()),
        networks: wiring::networks(&service.app, &service.spec).into_iter().collect(),
        ports: service.spec.ports.iter().map(super::view::port_text).collect(),
        is_pinned: service.spec.has_client_affinity,
        endpoints,
    }
}

/// Why an instance with an address gets no traffic.
pub fn why_not(instance: &Instance, is_alive: bool) -> &'static str {
    match (instance.desired, instance.observed.phase) {
        (Desired::Remove | Desired::Stop, _) => "draining",
        (_, Phase::Running | Phase::Healthy) if !is_alive => "down",
        (_, Phase::Running) => "starting",
        (_, phase) => phase.name(),
    }
}

fn address_rows(state: &State, nodes: &[NodeNetworkBody]) -> Vec<AddressBody> {
    state
        .addresses
        .rows()
        .map(|row| {
            let text = row.address.to_string();
            let holders: Vec<String> = nodes
                .iter()
                .filter(|facts| facts.floating.contains(&text))
                .map(|facts| facts.node.clone())
                .collect();
            let problem = nodes
                .iter()
                .flat_map(|facts| &facts.problems)
                .find(|problem| problem.text.starts_with(&format!("{text} ")))
                .map(|problem| problem.text.clone());
            AddressBody {
                address: text,
                node: (!holders.is_empty()).then(|| holders.join(", ")),
                since: row.since.to_string(),
                problem,
            }
        })
        .collect()
}

/// `GET /v1/addresses`.
pub async fn addresses(backend: &Arc<Backend>) -> Result<Reply, ApiError> {
    let reading = backend.reading().await?;
    let nodes = gather(backend).await;
    let addresses = address_rows(&reading.state, &nodes);
    body::ok(&AddressesBody { freshness: reading.freshness, addresses })
}

fn parse_address(text: &str) -> Result<Ipv4Addr, ApiError> {
    text.parse().map_err(|_| ApiError::invalid(format!("{text:?} is no IPv4 address")))
}

/// `POST /v1/addresses`.
pub async fn add_address(backend: &Arc<Backend>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let headers = request.headers().clone();
    let wish: AddressWish = body::parse(request.into_body()).await?;
    let address = parse_address(&wish.address)?;
    let state = backend.reading().await?.state;
    if !state.addresses.contains(&address) {
        check_address(backend, &state, address).await?;
    }
    let command = Command::AddAddress { address };
    backend.submit(mark_of(&headers, &command)?, command).await?;
    body::done()
}

/// On a LAN of some node, nobody's yet.
async fn check_address(backend: &Arc<Backend>, state: &State, address: Ipv4Addr) -> Result<(), ApiError> {
    let owner = lan_addresses(backend).into_iter().find(|(_, ip)| *ip == std::net::IpAddr::V4(address));
    if let Some((node, _)) = owner {
        let message = format!("{address} is {}'s own address", state.node_name(node));
        return Err(ApiError::invalid(message)
            .hint("choose one that no machine has and the router does not give out"));
    }
    let nodes = gather(backend).await;
    let contains = |text: &String| {
        let network = text.split(' ').next().and_then(|network| network.split_once('/'));
        let parsed = network.and_then(|(ip, length)| Some((ip.parse().ok()?, length.parse().ok()?)));
        parsed.is_some_and(|(own, prefix_length)| {
            let lan = lan::Interface {
                name: String::new(),
                index: 0,
                hardware: [0; 6],
                address: own,
                prefix_length,
            };
            prefix_length < 32 && lan.contains(address)
        })
    };
    if !nodes.iter().flat_map(|facts| &facts.lans).any(contains) {
        let lans: Vec<String> = nodes
            .iter()
            .flat_map(|facts| facts.lans.iter().map(|lan| format!("{} {lan}", facts.node)))
            .collect();
        let message = format!("{address} is on no node's LAN ({})", lans.join("; "));
        return Err(ApiError::invalid(message));
    }
    let by = crate::tasks::unblock(move || {
        let interfaces = lan::interfaces().ok()?;
        let interface = lan::interface_for(address, &interfaces)?;
        arp::probe(interface, address).ok().flatten()
    })
    .await;
    match by {
        None => Ok(()),
        Some(hardware) => {
            let message = format!("{address} is answered by another machine, {}", arp::text_of(hardware));
            Err(ApiError::rejected(message)
                .hint("choose one that no machine has and the router does not give out"))
        }
    }
}

/// `DELETE /v1/addresses/{address}`.
pub async fn remove_address(
    backend: &Arc<Backend>,
    text: &str,
    request: &Request<Incoming>,
) -> Result<Reply, ApiError> {
    let command = Command::RemoveAddress { address: parse_address(text)? };
    backend.submit(mark_of(request.headers(), &command)?, command).await?;
    body::done()
}

/// `GET /v1/network/check/{service}`.
pub async fn check(backend: &Arc<Backend>, name: &str) -> Result<Reply, ApiError> {
    let state = backend.reading().await?.state;
    let (app, service) = name.split_once('/').ok_or_else(|| ApiError::invalid("name it APP/SERVICE"))?;
    let app = app_name(app)?;
    let service =
        state.service_by_name(&app, service).cloned().ok_or_else(|| ApiError::not_found("service", name))?;
    let nodes: BTreeMap<String, NodeNetworkBody> =
        gather(backend).await.into_iter().map(|facts| (facts.node.clone(), facts)).gather();
    body::ok(&network_check::walk(backend, &state, &service, &nodes).await)
}
