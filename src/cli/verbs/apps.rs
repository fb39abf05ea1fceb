//! `ls`, `ps`, `status`: what is wanted, what runs, and why not.

use argh::FromArgs;

use super::cluster::show_joining;
use super::people::ago;
use crate::api::wire::{
    AppsBody, InstanceBody, InstancesBody, NodeBody, NodeDiskBody, ServiceBody, StatusBody, VolumeBody,
};
use crate::cli::client::escape;
use crate::cli::figures::{age, count, size};
use crate::cli::names::{Selection, resolve};
use crate::cli::project::app_here;
use crate::cli::table::{Cell, Table};
use crate::cli::terminal::{Colour, print_line};
use crate::cli::{Session, failure::Failure};

const NOTHING: &str = "Nothing is deployed yet: tinydc deploy, in a directory with a compose.yaml";

/// List the apps, and where to open them.
#[derive(FromArgs)]
#[argh(subcommand, name = "ls", help_triggers("-h", "--help"))]
#[argh(example = "tinydc ls")]
pub struct Ls {}

impl Ls {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let apps: AppsBody = session.client()?.read("/v1/apps").await?;
        session.show(&apps, |apps| {
            let mut table = Table::new(&["APP", "SERVICES", "RUNNING", "DEPLOYED", "OPEN"]);
            for app in apps.apps.iter().filter(|app| !app.is_removed || app.instances_running > 0) {
                let running = match app.is_removed {
                    true => Cell::coloured("removing", Colour::Yellow),
                    false => ratio(app.instances_running, app.instances_wanted),
                };
                let (deployed, open) = (format!("{} ago", ago(&app.deployed_at)), app.addresses.join(" "));
                let services = app.services.to_string();
                table.row([(&app.name).into(), services.into(), running, deployed.into(), open.into()]);
            }
            match table.is_empty() {
                true => print_line(NOTHING),
                false => table.print(),
            }
        })
    }
}

fn ratio(has: usize, wanted: usize) -> Cell {
    let colour = if has >= wanted { Colour::Green } else { Colour::Yellow };
    Cell::coloured(format!("{has}/{wanted}"), colour)
}

/// List instances: state, node, last exit.
#[derive(FromArgs)]
#[argh(subcommand, name = "ps", help_triggers("-h", "--help"))]
#[argh(example = "tinydc ps\ntinydc ps shop/web")]
pub struct Ps {
    /// APP, APP/SERVICE or APP/SERVICE.N (default: this directory's app, else all)
    #[argh(positional, arg_name = "NAME")]
    name: Option<String>,
}

impl Ps {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let status: StatusBody = session.client()?.read("/v1/status").await?;
        let selection = select(self.name.as_deref(), &status)?;
        let instances: Vec<&InstanceBody> = match &selection {
            Some(selection) => selection.instances(&status.services),
            None => status.services.iter().flat_map(|service| &service.instances).collect(),
        };
        let body = InstancesBody {
            freshness: status.freshness.clone(),
            instances: instances.iter().map(|instance| (*instance).clone()).collect(),
        };
        session.show(&body, |_| {
            if instances.is_empty() {
                print_line(if status.services.is_empty() {
                    NOTHING
                } else {
                    "No instance runs, and none is wanted."
                });
                return;
            }
            instance_table(&instances).print();
        })
    }
}

/// What `name` means; without a name this directory's app, if it is deployed; `None`: everything.
fn select(name: Option<&str>, status: &StatusBody) -> Result<Option<Selection>, Failure> {
    let here = app_here();
    if let Some(name) = name {
        return resolve(name, here.as_deref(), &status.services).map(Some);
    }
    let here = here.filter(|here| status.services.iter().any(|service| service.app == *here));
    Ok(here.map(|app| Selection { app, service: None, slot: None }))
}

pub fn instance_table(instances: &[&InstanceBody]) -> Table {
    let mut table = Table::new(&["INSTANCE", "STATE", "NODE", "SINCE", "MEMORY", "DETAIL"]);
    for instance in instances {
        let node = instance.node.clone().unwrap_or_default();
        let memory = instance.memory_bytes.map(size).unwrap_or_default();
        table.row([
            (&instance.name).into(),
            state(instance),
            node.into(),
            age(instance.since_ms).into(),
            memory.into(),
            detail(instance).into(),
        ]);
    }
    table
}

fn state(instance: &InstanceBody) -> Cell {
    let colour = match instance.phase.as_str() {
        "running" | "healthy" => Colour::Green,
        "unhealthy" | "failing" | "lost" => Colour::Red,
        "stopped" | "completed" => Colour::Faint,
        _ => Colour::Yellow,
    };
    let is_ending = instance.desired != "run" && !matches!(instance.phase.as_str(), "stopped" | "completed");
    match is_ending {
        true => Cell::coloured("stopping", Colour::Faint),
        false => Cell::coloured(instance.phase.clone(), colour),
    }
}

/// Why it is not running, what it is doing, or how it last ended.
pub fn detail(instance: &InstanceBody) -> String {
    let parts = [&instance.reason, &instance.progress, &instance.last_exit];
    let parts: Vec<&str> = parts.into_iter().flatten().map(String::as_str).collect();
    match (parts.is_empty(), instance.restarts) {
        (true, Some(restarts)) if restarts > 0 => count(restarts as usize, "restart"),
        _ => parts.join("; "),
    }
}

/// Show what is wanted, what runs, and why not.
#[derive(FromArgs)]
#[argh(subcommand, name = "status", help_triggers("-h", "--help"))]
#[argh(example = "tinydc status\ntinydc status shop")]
pub struct Status {
    /// one app only
    #[argh(positional, arg_name = "APP")]
    app: Option<String>,
}

impl Status {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let client = session.client()?;
        let path = match &self.app {
            Some(app) => format!("/v1/status?app={}", escape(app)),
            None => "/v1/status".into(),
        };
        let status: anyhow::Result<StatusBody> = client.read(&path).await;
        let is_unjoined = |error: &anyhow::Error| {
            error.downcast_ref::<Failure>().is_some_and(|failure| failure.is_code("unjoined"))
        };
        let status = match status {
            Err(error) if self.app.is_none() && is_unjoined(&error) => return show_joining(session).await,
            status => status?,
        };
        if let Some(app) = &self.app
            && !status.services.iter().any(|service| service.app == *app)
        {
            return Err(Failure::refused(format!("there is no app {app}"))
                .hint("tinydc ls lists them")
                .into());
        }
        session.show(&status, |status| {
            if self.app.is_none() {
                print_cluster(status);
            }
            print_services(status);
        })
    }
}

fn print_cluster(status: &StatusBody) {
    let up = status.nodes.iter().filter(|node| node.state == "up").count();
    let leader = status.leader.as_deref().unwrap_or("none");
    print_line(&format!(
        "cluster {}: {up} of {} up, leader {leader}, seen from {}",
        status.cluster,
        count(status.nodes.len(), "node"),
        status.node
    ));
    print_line("");
    node_table(&status.nodes).print();
    print_line("");
    if status.nodes.iter().any(|node| node.disk.is_some()) {
        disk_table(&status.nodes).print();
        print_line("");
    }
    let absent: Vec<String> = status.nodes.iter().flat_map(absent_disks).collect();
    if !absent.is_empty() {
        absent.iter().for_each(|line| print_line(line));
        print_line("");
    }
}

/// What a node's configuration mounts and is not there; a node that is down has nothing to say of it.
pub fn absent_disks(node: &NodeBody) -> Vec<String> {
    let absent = node.disks.iter().filter(|disk| disk.is_absent && node.state != "down");
    let line = |disk: &NodeDiskBody| {
        let NodeDiskBody { label, mount_point, .. } = disk;
        let name = &node.name;
        format!("{name}: disk {label} ({mount_point}) is absent: plug it in; services that bind it wait")
    };
    absent.map(line).collect()
}

/// The machines: how long their cards last, and how they are.
fn disk_table(nodes: &[NodeBody]) -> Table {
    let mut table = Table::new(&["NODE", "DISK", "WRITTEN TODAY", "SINCE INSTALL", "LASTS", "HEALTH"]);
    for node in nodes {
        let Some(disk) = &node.disk else { continue };
        table.row([
            (&node.name).into(),
            size(disk.size_bytes).into(),
            size(disk.written_today_bytes).into(),
            size(disk.written_bytes).into(),
            disk.days_left.map_or("known in an hour".into(), lasts).into(),
            health(node),
        ]);
    }
    table
}

pub fn lasts(days: u64) -> String {
    match days {
        0..=60 => count(days as usize, "day"),
        61..=730 => format!("{} months", days / 30),
        731..=18_262 => format!("{} years", days / 365),
        _ => "over 50 years".into(),
    }
}

fn health(node: &NodeBody) -> Cell {
    match node.troubles.is_empty() {
        true => health_text(node).into(),
        false => Cell::coloured(health_text(node), Colour::Yellow),
    }
}

/// Its temperature and its troubles, or that there are none.
pub fn health_text(node: &NodeBody) -> String {
    let mut parts: Vec<String> = Vec::new();
    if node.troubles.is_empty() {
        parts.push("good".into());
    }
    parts.extend(node.temperature_celsius.map(|celsius| format!("{celsius} °C")));
    parts.extend(node.troubles.iter().map(|code| code.replace('_', " ")));
    parts.join(", ")
}

pub fn node_table(nodes: &[NodeBody]) -> Table {
    let header = ["NODE", "STATE", "ROLE", "ADDRESS", "ARCH", "INSTANCES", "RESERVED", "FREE", "LABELS"];
    let mut table = Table::new(&header);
    for node in nodes {
        let colour = if node.state == "up" { Colour::Green } else { Colour::Red };
        let silent = node.silent_ms.filter(|_| node.state == "down");
        let state = match silent {
            Some(silent) => format!("{} {}", node.state, age(silent)),
            None => node.state.clone(),
        };
        let labels: Vec<String> = node.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let reserved = format!("{} of {}", size(node.reserved_memory_bytes), size(node.memory_bytes));
        let free = node.memory_available_bytes.map(size).unwrap_or_default();
        table.row([
            (&node.name).into(),
            Cell::coloured(state, colour),
            (&node.role).into(),
            node.address.clone().unwrap_or_default().into(),
            (&node.architecture).into(),
            node.instances.to_string().into(),
            reserved.into(),
            free.into(),
            labels.join(" ").into(),
        ]);
    }
    table
}

fn print_services(status: &StatusBody) {
    if status.services.is_empty() {
        print_line(NOTHING);
        return;
    }
    let mut table = Table::new(&["SERVICE", "RUNNING", "UPDATE", "IMAGE", "PORTS", "OPEN"]);
    for service in &status.services {
        let update = match service.update.as_str() {
            "failed" => Cell::coloured("failed", Colour::Red),
            "rolling" => Cell::coloured("rolling", Colour::Yellow),
            _ => "".into(),
        };
        table.row([
            format!("{}/{}", service.app, service.name).into(),
            ratio(service.running, service.wanted),
            update,
            (&service.image).into(),
            service.ports.join(" ").into(),
            service.addresses.join(" ").into(),
        ]);
    }
    table.print();
    let notes: Vec<String> = status.services.iter().flat_map(notes).collect();
    if !notes.is_empty() {
        print_line("");
    }
    notes.iter().for_each(|note| print_line(note));
    let kept: Vec<&VolumeBody> = status.volumes.iter().filter(|volume| volume.is_removed).collect();
    if !kept.is_empty() {
        print_line("");
    }
    kept.iter().for_each(|volume| print_line(&kept_sentence(volume)));
}

/// One sentence for each thing that is not as wanted, and where the data is.
pub fn notes(service: &ServiceBody) -> Vec<String> {
    let name = format!("{}/{}", service.app, service.name);
    let mut notes = Vec::new();
    if let Some(reason) = &service.update_reason {
        notes.push(format!("{name}: the update stopped: {reason}"));
    }
    for sentence in service.data.iter().chain(&service.left_out) {
        notes.push(format!("{name}: {sentence}"));
    }
    for instance in &service.instances {
        let is_well = matches!(instance.phase.as_str(), "running" | "healthy" | "completed");
        let detail = detail(instance);
        if !is_well && instance.desired == "run" && !detail.is_empty() {
            notes.push(format!("{} is {}: {detail}", instance.name, instance.phase));
        }
    }
    notes
}

/// What `rm` left behind, and how it goes.
pub fn kept_sentence(volume: &VolumeBody) -> String {
    let name = format!("{}/{}", volume.app, volume.name);
    let app = &volume.app;
    match &volume.node {
        Some(node) => {
            format!("volume {name} kept on {node} at {}; delete it: tinydc rm {app} --volumes", volume.path)
        }
        None => format!("volume {name} was never used; forget it: tinydc rm {app} --volumes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::names::tests::service;

    #[test]
    fn a_table_of_long_names_fits_a_hundred_columns() {
        let mut service = service(&"a".repeat(40), &"s".repeat(40), 2);
        service.instances[0].last_exit = Some("exited 1, 3 restarts, next in 8 s; ".repeat(4));
        let instances: Vec<&InstanceBody> = service.instances.iter().collect();
        for line in instance_table(&instances).lines(100, false) {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }

    #[test]
    fn what_is_not_as_wanted_is_said_in_a_sentence() {
        let mut service = service("shop", "db", 2);
        service.data = Some("data on pi2; if pi2 dies it waits".into());
        service.instances[1].phase = "pending".into();
        service.instances[1].reason = Some("2 nodes lack 64 MiB".into());
        let expected =
            ["shop/db: data on pi2; if pi2 dies it waits", "shop/db.2 is pending: 2 nodes lack 64 MiB"];
        assert_eq!(notes(&service), expected);
    }
}
