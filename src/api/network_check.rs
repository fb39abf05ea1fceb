//! Walks the way to a service as a client would, from the node that was asked, and names the step that is broken.
//!
//! Name → virtual address → endpoints → the process behind each → published ports.

use super::backend::Backend;
use super::network::{certificates, why_not};
use super::peer;
use super::wire::{CheckBody, CheckStep, NodeNetworkBody};
use crate::model::*;
use crate::state::{Service, State};
use async_io::Async;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

const CONNECT_LIMIT: Duration = Duration::from_secs(1);

pub async fn walk(
    backend: &Arc<Backend>,
    state: &State,
    service: &Service,
    nodes: &BTreeMap<String, NodeNetworkBody>,
) -> CheckBody {
    let own = state.node_name(backend.node);
    let mut steps = vec![name_step(backend, service).await];
    let (address_step, endpoints) = endpoint_step(backend, state, service);
    steps.push(address_step);
    for instance in &endpoints {
        steps.push(process_step(state, service, instance).await);
    }
    steps.extend(port_steps(service, nodes));
    steps.extend(certificate_steps(backend, state, service));
    for facts in nodes.values() {
        steps.extend(facts.problems.iter().map(|problem| CheckStep {
            step: "node".into(),
            is_ok: false,
            text: format!("{}: {}", facts.node, problem.text),
            remedy: problem.remedy.clone(),
        }));
    }
    let broken = steps.iter().find(|step| !step.is_ok).map(|step| step.step.clone());
    CheckBody { service: format!("{}/{}", service.app, service.name), from: own, broken, steps }
}

fn fine(step: &str, text: String) -> CheckStep {
    CheckStep { step: step.into(), is_ok: true, text, remedy: None }
}

fn bad(step: &str, text: String, remedy: &str) -> CheckStep {
    let remedy = (!remedy.is_empty()).then(|| remedy.to_owned());
    CheckStep { step: step.into(), is_ok: false, text, remedy }
}

async fn name_step(backend: &Arc<Backend>, service: &Service) -> CheckStep {
    let name = format!("{}.{}", service.name, service.app);
    match backend.agent.resolve(&name).await {
        Ok(Some(address)) if address == service.vip => fine("name", format!("{name} is {address}")),
        Ok(Some(address)) => {
            bad("name", format!("{name} is {address}, not the service's {}", service.vip), "")
        }
        Ok(None) => bad("name", format!("{name} is not known to this node's name server"), ""),
        Err(why) => bad(
            "name",
            format!("this node's name server does not answer: {why}"),
            "see `journalctl -u tinydc`: another program may have port 53 on all addresses",
        ),
    }
}

/// The service's endpoints as this node's kernel has them.
fn endpoint_step<'a>(
    backend: &Backend,
    state: &'a State,
    service: &Service,
) -> (CheckStep, Vec<&'a Instance>) {
    let view = backend.agent.network_view();
    let row = view.wiring.wanted.vips.get(&service.vip).cloned().unwrap_or_default();
    let instances: Vec<&Instance> = state.instances_of(service.id).collect();
    let serving: Vec<&Instance> = instances
        .iter()
        .copied()
        .filter(|instance| instance.address.is_some_and(|address| row.endpoints.contains(&address)))
        .collect();
    if serving.is_empty() {
        let why: Vec<String> = instances
            .iter()
            .map(|instance| {
                let is_alive = instance.address.is_some_and(|address| view.wiring.alive.contains(&address));
                format!("{} is {}", state.instance_name(instance), why_not(instance, is_alive))
            })
            .collect();
        let why = if why.is_empty() { "it has no instance".to_owned() } else { why.join(", ") };
        let remedy = format!("tinydc status {}; tinydc logs {}/{}", service.app, service.app, service.name);
        return (bad("endpoints", format!("{} leads nowhere: {why}", service.vip), &remedy), serving);
    }
    let names: Vec<String> = serving
        .iter()
        .map(|instance| {
            let address = instance.address.map(|address| address.to_string()).unwrap_or_default();
            format!("{} at {address}", state.instance_name(instance))
        })
        .collect();
    (fine("endpoints", format!("{} leads to {}", service.vip, names.join(", "))), serving)
}

/// Whether the process behind an endpoint takes connections on the ports that are known of it.
async fn process_step(state: &State, service: &Service, instance: &Instance) -> CheckStep {
    let name = state.instance_name(instance);
    let node = instance.node.map(|node| state.node_name(node)).unwrap_or_default();
    let Some(address) = instance.address else { return bad("process", format!("{name} has no address"), "") };
    let ports: BTreeSet<u16> = service
        .spec_of(instance.spec_version)
        .ports
        .iter()
        .filter(|port| port.protocol == Protocol::Tcp)
        .map(|port| port.target)
        .gather();
    if ports.is_empty() {
        return fine("process", format!("{name} runs on {node}; it publishes no TCP port to try"));
    }
    for port in &ports {
        match connect(address.into(), *port).await {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                let text = format!("{name} on {node} refuses port {port}: its program does not listen there");
                return bad("process", text, "compare `ports:` with what the program prints: tinydc logs");
            }
            Err(error) => {
                let text = format!("{name} on {node} does not answer on {address}:{port}: {error}");
                return bad("process", text, "is that node reachable? tinydc net shows the ways");
            }
        }
    }
    let listed: Vec<String> = ports.iter().map(u16::to_string).collect();
    let text = format!("{name} on {node} takes connections on {}", listed.join(", "));
    match state.ula_prefix() {
        None => fine("process", text),
        Some(prefix) => ipv6_step(text, prefix.embed(address), &ports).await,
    }
}

/// The same by IPv6, which a program need not listen on.
async fn ipv6_step(text: String, address: Ipv6Addr, ports: &BTreeSet<u16>) -> CheckStep {
    for port in ports {
        match connect(address.into(), *port).await {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return fine("process", format!("{text}; {port} by IPv4 only: it does not listen on IPv6"));
            }
            Err(error) => {
                let text = format!("{text}, but does not answer on [{address}]:{port}: {error}");
                return bad("process", text, "tinydc net names the node that lacks IPv6");
            }
        }
    }
    fine("process", format!("{text}, by IPv6, too"))
}

async fn connect(address: IpAddr, port: u16) -> io::Result<()> {
    let target = SocketAddr::from((address, port));
    let stream = peer::within(CONNECT_LIMIT, Async::<TcpStream>::connect(target)).await;
    stream.unwrap_or_else(|| Err(io::Error::from(io::ErrorKind::TimedOut))).map(drop)
}

/// What the ingress here shows for the service's hosts.
fn certificate_steps(backend: &Backend, state: &State, service: &Service) -> Vec<CheckStep> {
    let name = format!("{}/{}", service.app, service.name);
    let shown = certificates(backend, state, Some(&service.app)).into_iter();
    shown
        .filter(|one| one.service == name)
        .map(|one| match (&one.problem, &one.not_after) {
            (None, Some(end)) => {
                fine("tls", format!("{} shows a certificate ({}) that ends {end}", one.host, one.source))
            }
            (problem, end) => {
                let why = problem.clone().unwrap_or_default();
                let shown = match end {
                    Some(end) => format!("shows a certificate ({}) that ends {end}, but", one.source),
                    None => format!("shows no certificate ({}):", one.source),
                };
                let remedy = match one.source.as_str() {
                    "acme" => {
                        "the name must lead to port 80 of a node from where the authority is; then deploy again"
                    }
                    "cluster" => "is there a leader? tinydc node ls",
                    _ => "tinydc secret set NAME FILE with chain and key as PEM",
                };
                bad("tls", format!("{} {shown} {why}", one.host), remedy)
            }
        })
        .collect()
}

/// Published ports that a program of some node's own keeps from the service.
fn port_steps(service: &Service, nodes: &BTreeMap<String, NodeNetworkBody>) -> Vec<CheckStep> {
    let ports: Vec<String> = service
        .spec
        .ports
        .iter()
        .filter_map(|port| Some(format!("port {}/{}", port.published?, port.protocol.name())))
        .collect();
    if ports.is_empty() {
        return Vec::new();
    }
    let is_taken = |port: &String| {
        nodes
            .values()
            .find(|facts| facts.problems.iter().any(|problem| problem.text.starts_with(port.as_str())))
    };
    match ports.iter().find_map(|port| Some((port, is_taken(port)?))) {
        // The problem itself follows among the nodes'.
        Some((port, facts)) => {
            vec![bad("port", format!("{port} does not reach the service on {}", facts.node), "")]
        }
        None => vec![fine("port", format!("{} on every node", ports.join(", ")))],
    }
}
