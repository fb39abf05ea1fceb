//! `net` and `address`: what the network is, why something in it does not work, and addresses on the LAN.

use argh::FromArgs;
use serde_json::Value;

use crate::api::wire::{
    AddressWish, AddressesBody, CertificateBody, CheckBody, EndpointBody, NetworkBody, NodeNetworkBody,
    ServiceNetworkBody, StatusBody,
};
use crate::cli::client::escape;
use crate::cli::failure::Failure;
use crate::cli::names::resolve;
use crate::cli::project::app_here;
use crate::cli::table::{Cell, Table};
use crate::cli::terminal::{Colour, print_line};
use crate::cli::{Session, usage};

/// Show the network: services with their addresses and endpoints, ways between nodes, and what is in the way.
#[derive(FromArgs)]
#[argh(subcommand, name = "net", help_triggers("-h", "--help"))]
#[argh(example = "tinydc net\ntinydc net shop\ntinydc net check shop/web")]
pub struct Net {
    /// only this app
    #[argh(positional, arg_name = "APP")]
    app: Option<String>,
    #[argh(subcommand)]
    action: Option<NetAction>,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum NetAction {
    Check(NetCheck),
}

/// Walk the way to a service (name, address, endpoints, process, port) and name the step that is broken.
#[derive(FromArgs)]
#[argh(subcommand, name = "check", help_triggers("-h", "--help"))]
#[argh(example = "tinydc net check shop/web")]
struct NetCheck {
    /// the service
    #[argh(positional, arg_name = "APP/SERVICE")]
    service: String,
}

impl Net {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        match self.action {
            Some(NetAction::Check(check)) => check.run(session).await,
            None => show(session, self.app.as_deref()).await,
        }
    }
}

impl NetCheck {
    async fn run(self, session: &Session) -> anyhow::Result<()> {
        let client = session.client()?;
        let status: StatusBody = client.read("/v1/status").await?;
        let selection = resolve(&self.service, app_here().as_deref(), &status.services)?;
        let Some(service) = selection.service else {
            return Err(usage(format!("{} is an app", self.service), "name a service: APP/SERVICE"));
        };
        let name = escape(&format!("{}/{service}", selection.app));
        let body: CheckBody = client.read(&format!("/v1/network/check/{name}")).await?;
        session.show(&body, |body| {
            for step in &body.steps {
                let mark = if step.is_ok { "✓" } else { "✗" };
                print_line(&format!("{mark} {:<10} {}", step.step, step.text));
                if let Some(remedy) = step.remedy.as_ref().filter(|_| !step.is_ok) {
                    print_line(&format!("  {:<10} → {remedy}", ""));
                }
            }
        })?;
        match &body.broken {
            None => Ok(()),
            Some(step) => {
                let message = format!("{} does not work as seen from {}: {step}", body.service, body.from);
                Err(Failure::refused(message).into())
            }
        }
    }
}

async fn show(session: &Session, app: Option<&str>) -> anyhow::Result<()> {
    let path = match app {
        None => "/v1/network".to_owned(),
        Some(app) => format!("/v1/network?app={}", escape(app)),
    };
    let body: NetworkBody = session.client()?.read(&path).await?;
    session.show(&body, |body| {
        services(&body.services);
        if app.is_none() {
            print_line("");
            nodes(body);
            if !body.addresses.is_empty() {
                print_line("");
                addresses(&body.addresses);
            }
        }
        if !body.certificates.is_empty() {
            print_line("");
            certificates(&body.certificates);
        }
        problems(&body.nodes);
    })
}

fn services(services: &[ServiceNetworkBody]) {
    let mut table = Table::new(&["SERVICE", "ADDRESS", "PORTS", "ENDPOINT", "NODE", "STATE", "CONNECTIONS"]);
    for service in services {
        let mut names =
            Some((format!("{}/{}", service.app, service.service), service.ports.join(" "))).into_iter();
        let mut addresses = std::iter::once(&service.vip).chain(&service.vip6);
        let mut endpoints = service.endpoints.iter();
        let lines = service.endpoints.len().max(1 + usize::from(service.vip6.is_some()));
        for line in 0..lines {
            let (name, ports) = names.next().unwrap_or_default();
            let [endpoint, node, state, connections] = match endpoints.next() {
                Some(endpoint) => endpoint_cells(endpoint),
                None if line == 0 => {
                    ["".into(), "".into(), Cell::coloured("no instance", Colour::Red), "".into()]
                }
                None => [const { "" }; 4].map(Cell::from),
            };
            let address = addresses.next().cloned().unwrap_or_default();
            table.row([name.into(), address.into(), ports.into(), endpoint, node, state, connections]);
        }
    }
    match table.is_empty() {
        true => print_line("No services. Deploy an app: tinydc deploy"),
        false => table.print(),
    }
}

fn endpoint_cells(endpoint: &EndpointBody) -> [Cell; 4] {
    let state = match endpoint.state.as_str() {
        "serving" => Cell::from("serving"),
        other => Cell::coloured(other, Colour::Red),
    };
    let slot = endpoint.instance.rsplit('.').next().unwrap_or_default();
    let connections = endpoint.connections.map_or("?".to_owned(), |count| count.to_string());
    [format!(".{slot} {}", endpoint.address).into(), (&endpoint.node).into(), state, connections.into()]
}

fn certificates(rows: &[CertificateBody]) {
    let mut table = Table::new(&["HOST", "SERVICE", "CERTIFICATE", "ENDS", "PROBLEM"]).wrapping_last();
    for row in rows {
        let end = match &row.not_after {
            Some(end) => Cell::from(end),
            None => Cell::coloured("none", Colour::Red),
        };
        table.row([
            (&row.host).into(),
            (&row.service).into(),
            (&row.source).into(),
            end,
            row.problem.clone().unwrap_or_default().into(),
        ]);
    }
    table.print();
}

fn nodes(body: &NetworkBody) {
    let mut table = Table::new(&["NODE", "LAN", "CONTAINERS", "WAYS TO OTHERS", "HOLDS"]);
    for node in &body.nodes {
        let ways: Vec<String> = node.ways.iter().map(|way| format!("{} {}", way.node, way.kind)).collect();
        let containers = node.bridge.rsplit_once('.').map_or(String::new(), |(net, _)| format!("{net}.0/24"));
        table.row([
            (&node.node).into(),
            node.lans.join(", ").into(),
            containers.into(),
            ways.join(", ").into(),
            node.floating.join(" ").into(),
        ]);
    }
    table.print();
}

fn problems(nodes: &[NodeNetworkBody]) {
    for node in nodes {
        for problem in &node.problems {
            print_line(&format!("\n{}: {}", node.node, problem.text));
            if let Some(remedy) = &problem.remedy {
                print_line(&format!("  → {remedy}"));
            }
        }
    }
}

/// Addresses of the cluster on the LAN: one node holds each, and another one when it dies.
#[derive(FromArgs)]
#[argh(subcommand, name = "address", help_triggers("-h", "--help"))]
#[argh(example = "tinydc address add 192.0.2.10\ntinydc address ls\ntinydc address rm 192.0.2.10")]
pub struct Address {
    #[argh(subcommand)]
    action: AddressAction,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum AddressAction {
    Add(AddressAdd),
    Ls(AddressLs),
    Rm(AddressRm),
}

/// Give the cluster an address on the LAN that no machine has and the router does not give out.
#[derive(FromArgs)]
#[argh(subcommand, name = "add", help_triggers("-h", "--help"))]
#[argh(example = "tinydc address add 192.0.2.10")]
struct AddressAdd {
    /// an IPv4 address
    #[argh(positional, arg_name = "ADDRESS")]
    address: String,
}

/// List the addresses and where they are.
#[derive(FromArgs)]
#[argh(subcommand, name = "ls", help_triggers("-h", "--help"))]
#[argh(example = "tinydc address ls")]
struct AddressLs {}

/// Give an address up.
#[derive(FromArgs)]
#[argh(subcommand, name = "rm", help_triggers("-h", "--help"))]
#[argh(example = "tinydc address rm 192.0.2.10")]
struct AddressRm {
    /// as `tinydc address ls` shows it
    #[argh(positional, arg_name = "ADDRESS")]
    address: String,
}

impl Address {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let client = session.client()?;
        match self.action {
            AddressAction::Add(AddressAdd { address }) => {
                let wish = AddressWish { address: address.clone() };
                let _: Value = client.post("/v1/addresses", &wish).await?;
                session.done(&format!("{address} is the cluster's: tinydc address ls shows where it is."));
                Ok(())
            }
            AddressAction::Rm(AddressRm { address }) => {
                let _: Value = client.delete(&format!("/v1/addresses/{}", escape(&address))).await?;
                session.done(&format!("{address} is nobody's any more."));
                Ok(())
            }
            AddressAction::Ls(_) => {
                let body: AddressesBody = client.read("/v1/addresses").await?;
                session.show(&body, |body| match body.addresses.is_empty() {
                    true => print_line("No addresses. Add one: tinydc address add 192.0.2.10"),
                    false => addresses(&body.addresses),
                })
            }
        }
    }
}

fn addresses(rows: &[crate::api::wire::AddressBody]) {
    let mut table = Table::new(&["ADDRESS", "NODE", "SINCE", "PROBLEM"]).wrapping_last();
    for row in rows {
        let node = match &row.node {
            Some(node) => Cell::from(node),
            None => Cell::coloured("nowhere", Colour::Red),
        };
        table.row([
            (&row.address).into(),
            node,
            (&row.since).into(),
            row.problem.clone().unwrap_or_default().into(),
        ]);
    }
    table.print();
}
