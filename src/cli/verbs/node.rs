//! `node`: run the daemon; take machines in; list, drain, label and remove nodes.

use std::io::{self, IsTerminal};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use argh::FromArgs;
use hyper::Method;
use serde_json::Value;

use super::apps::{absent_disks, lasts, node_table};
use crate::api::wire::{
    AcceptReply, AcceptRequest, LabelsRequest, NodeBody, PendingBody, RecoverReply, RecoverRequest,
};
use crate::cli::arguments::Globals;
use crate::cli::client::escape;
use crate::cli::figures::{age, cores, size};
use crate::cli::table::{Cell, Table};
use crate::cli::terminal::print_line;
use crate::cli::{Session, by_code, usage};
use crate::model::Trouble;
use crate::node::RunOptions;

/// The machine joins meanwhile; each of four that wait may be tried.
const ACCEPT_LIMIT: Duration = Duration::from_secs(60);

/// Run the daemon; take machines in; list, drain, label and remove nodes.
#[derive(FromArgs)]
#[argh(subcommand, name = "node", help_triggers("-h", "--help"))]
#[argh(
    example = "tinydc node ls\ntinydc node pending\ntinydc node accept 493112\ntinydc node label pi1 disk=ssd\ntinydc node drain pi2"
)]
pub struct Node {
    #[argh(subcommand)]
    action: Action,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Action {
    Run(Run),
    Ls(Ls),
    Inspect(Inspect),
    Pending(Pending),
    Accept(Accept),
    Drain(Drain),
    Activate(Activate),
    Label(Label),
    Rm(Rm),
    RecoverKey(RecoverKey),
    RecoveryKey(RecoveryKey),
    Flash(Flash),
}

/// Run the daemon in the foreground.
#[derive(FromArgs)]
#[argh(subcommand, name = "run", help_triggers("-h", "--help"))]
#[argh(example = "sudo tinydc node run")]
struct Run {
    /// configuration (default: /etc/tinydc.toml, if it exists)
    #[argh(option, arg_name = "FILE")]
    config: Option<PathBuf>,
}

/// Write an image into this board's other boot slot and start from it once; one that is no good is left again. At a
/// board's prompt.
#[derive(FromArgs)]
#[argh(subcommand, name = "flash", help_triggers("-h", "--help"))]
#[argh(example = "tinydc node flash http://192.168.1.10:8000/tinydc-rpi4.img.zst")]
struct Flash {
    /// what images/build made, with its .sha256 beside it: a file or an http address
    #[argh(positional, arg_name = "IMAGE")]
    image: String,
}

/// List the nodes.
#[derive(FromArgs)]
#[argh(subcommand, name = "ls", help_triggers("-h", "--help"))]
#[argh(example = "tinydc node ls")]
struct Ls {}

/// Show all about one node.
#[derive(FromArgs)]
#[argh(subcommand, name = "inspect", help_triggers("-h", "--help"))]
#[argh(example = "tinydc node inspect pi1")]
struct Inspect {
    /// the node
    #[argh(positional, arg_name = "NAME")]
    name: String,
}

/// List the machines of the nodes' network that wait for a cluster; each shows its code on its own display.
#[derive(FromArgs)]
#[argh(subcommand, name = "pending", help_triggers("-h", "--help"))]
#[argh(example = "tinydc node pending")]
struct Pending {}

/// Take a machine that waits into the cluster, by the code on its display.
#[derive(FromArgs)]
#[argh(subcommand, name = "accept", help_triggers("-h", "--help"))]
#[argh(
    example = "tinydc node accept 493112\ntinydc node accept 493112 pi4\ntinydc node accept 493112 192.168.2.7"
)]
struct Accept {
    /// six digits
    #[argh(positional, arg_name = "CODE")]
    code: String,
    /// its name, or its address where it is not heard (default: whichever shows the code)
    #[argh(positional, arg_name = "MACHINE")]
    machine: Option<String>,
}

/// Move the apps off a node, as before maintenance.
#[derive(FromArgs)]
#[argh(subcommand, name = "drain", help_triggers("-h", "--help"))]
#[argh(example = "tinydc node drain pi2")]
struct Drain {
    /// the node
    #[argh(positional, arg_name = "NAME")]
    name: String,
}

/// Let a drained node run apps again.
#[derive(FromArgs)]
#[argh(subcommand, name = "activate", help_triggers("-h", "--help"))]
#[argh(example = "tinydc node activate pi2")]
struct Activate {
    /// the node
    #[argh(positional, arg_name = "NAME")]
    name: String,
}

/// Set labels (KEY=VALUE) or remove them (KEY-).
#[derive(FromArgs)]
#[argh(subcommand, name = "label", help_triggers("-h", "--help"))]
#[argh(example = "tinydc node label pi1 disk=ssd room-")]
struct Label {
    /// the node
    #[argh(positional, arg_name = "NAME")]
    name: String,
    /// KEY=VALUE or KEY-
    #[argh(positional, arg_name = "LABEL")]
    labels: Vec<String>,
}

/// Remove a node that is gone for good.
#[derive(FromArgs)]
#[argh(subcommand, name = "rm", help_triggers("-h", "--help"))]
#[argh(example = "tinydc node rm pi2")]
struct Rm {
    /// also if it holds the only copy of a volume or image, or the cluster would lose its quorum
    #[argh(switch)]
    force: bool,
    /// the node
    #[argh(positional, arg_name = "NAME")]
    name: String,
}

/// Restore the cluster key of this node from the recovery key, which is read from standard input.
#[derive(FromArgs)]
#[argh(subcommand, name = "recover-key", help_triggers("-h", "--help"))]
#[argh(example = "sudo tinydc node recover-key")]
struct RecoverKey {}

/// Print the recovery key of the cluster that this machine founded by itself (`bootstrap = true`), until it restarts.
#[derive(FromArgs)]
#[argh(subcommand, name = "recovery-key", help_triggers("-h", "--help"))]
#[argh(example = "sudo tinydc node recovery-key")]
struct RecoveryKey {}

impl Node {
    /// `Some`: this is `node run`, which is no client.
    pub fn run_options(&self, globals: &Globals) -> Option<RunOptions> {
        match &self.action {
            Action::Run(run) => {
                Some(RunOptions { config: run.config.clone(), data_dir: globals.data_dir.clone() })
            }
            _ => None,
        }
    }

    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        if let Action::Flash(flash) = self.action {
            return crate::boot::flash(&flash.image, &print_line);
        }
        let client = session.client()?;
        let path = |name: &str, rest: &str| format!("/v1/nodes/{}{rest}", escape(name));
        match self.action {
            Action::Run(_) | Action::Flash(_) => Ok(()),
            Action::Ls(_) => {
                let nodes = client.nodes().await?;
                session.show(&nodes, |nodes| node_table(&nodes.nodes).print())
            }
            Action::Inspect(Inspect { name }) => {
                let node: NodeBody = client.read(&path(&name, "")).await?;
                session.show(&node, print_node)
            }
            Action::Pending(_) => {
                let pending: PendingBody = client.read("/v1/pending").await?;
                session.show(&pending, print_pending)
            }
            Action::Accept(Accept { code, machine }) => {
                let request = AcceptRequest { code: by_code::code(&code)?, machine };
                let reply: AcceptReply =
                    client.write(Method::POST, "/v1/pending", &request, ACCEPT_LIMIT).await?;
                session.show(&reply, |reply| {
                    print_line(&format!("{} is a member of cluster {}.", reply.node, reply.cluster));
                    print_line("See it: tinydc node ls");
                })
            }
            Action::Drain(Drain { name }) => {
                let _: Value = client.post(&path(&name, "/drain"), &Value::Null).await?;
                session.done(&format!("{name} takes no more apps; what it runs moves away. See: tinydc ps"));
                Ok(())
            }
            Action::Activate(Activate { name }) => {
                let _: Value = client.post(&path(&name, "/activate"), &Value::Null).await?;
                session.done(&format!("{name} takes apps again."));
                Ok(())
            }
            Action::Label(Label { name, labels }) => {
                let request = labels_request(&labels)?;
                let _: Value = client.post(&path(&name, "/labels"), &request).await?;
                session.done(&format!("{name} is labelled."));
                Ok(())
            }
            Action::RecoverKey(_) => {
                let recovery_key = read_recovery_key()?;
                let reply: RecoverReply =
                    client.post("/v1/recover-key", &RecoverRequest { recovery_key }).await?;
                session.show(&reply, |reply| {
                    print_line(&format!("{} has the cluster key again.", reply.node));
                    if let Some(leader) = &reply.leader_without_key {
                        print_line(&format!(
                            "The leader lacks it too: run the same on {leader}; the others get it then."
                        ));
                    }
                })
            }
            Action::RecoveryKey(_) => {
                let reply: RecoverRequest = client.read("/v1/recovery-key").await?;
                session.show(&reply, |reply| print_line(&reply.recovery_key))
            }
            Action::Rm(Rm { name, force }) => {
                let query = if force { "?force=true" } else { "" };
                let _: Value = client.delete(&path(&name, query)).await?;
                session.done(&format!("{name} is no member any more."));
                Ok(())
            }
        }
    }
}

fn print_pending(pending: &PendingBody) {
    if pending.machines.is_empty() {
        print_line("No machine on the node's network waits for a cluster.");
        return print_line("One on another network: tinydc node accept CODE ADDRESS");
    }
    let mut table = Table::new(&["MACHINE", "ADDRESS", "ARCH", "WAITS", "KEY"]);
    for machine in &pending.machines {
        let key: String = machine.key_hash.chars().take(8).collect();
        let cells = [&machine.name, &machine.address, &machine.architecture].map(Cell::from);
        table.row(cells.into_iter().chain([age(machine.waits_ms).into(), key.into()]));
    }
    table.print();
}

/// Never an argument: those are shown to everyone on the machine.
fn read_recovery_key() -> anyhow::Result<String> {
    if io::stdin().is_terminal() {
        eprint!("recovery key (as tinydc init printed it): ");
    }
    let mut line = String::new();
    io::stdin().read_line(&mut line).context("read the recovery key")?;
    match line.trim() {
        "" => Err(usage("no recovery key was given", "it is read from standard input")),
        text => Ok(text.into()),
    }
}

fn labels_request(labels: &[String]) -> anyhow::Result<LabelsRequest> {
    let mut request = LabelsRequest::default();
    for label in labels {
        match (label.split_once('='), label.strip_suffix('-')) {
            (Some((key, value)), _) if !key.is_empty() => {
                request.set.insert(key.into(), value.into());
            }
            (None, Some(key)) if !key.is_empty() => request.remove.push(key.into()),
            _ => return Err(usage(format!("{label:?} is no label"), "KEY=VALUE sets one, KEY- removes it")),
        }
    }
    if labels.is_empty() {
        return Err(usage("which labels?", "such as disk=ssd, or disk- to remove it"));
    }
    Ok(request)
}

fn print_node(node: &NodeBody) {
    let labels: Vec<String> = node.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let heard = node.silent_ms.map_or("never".into(), |silent| format!("{} ago", age(silent)));
    let memory = format!(
        "{}, {} reserved, {} available",
        size(node.memory_bytes),
        size(node.reserved_memory_bytes),
        node.memory_available_bytes.map_or("?".into(), size)
    );
    let disk = node.disk.as_ref().map_or(String::new(), |disk| {
        let lasts = disk.days_left.map_or(String::new(), |days| format!(", lasts {}", lasts(days)));
        let (today, all) = (size(disk.written_today_bytes), size(disk.written_bytes));
        format!("{}, {today} written today, {all} since install{lasts}", size(disk.size_bytes))
    });
    let disks: Vec<String> =
        node.disks.iter().map(|disk| format!("{} ({})", disk.label, disk.mount_point)).collect();
    let temperature = node.temperature_celsius.map_or(String::new(), |celsius| format!("{celsius} °C"));
    let cpu = format!("{} cores, {} reserved", cores(node.cpu_millis), cores(node.reserved_cpu_millis));
    let lines = [
        ("name", node.name.clone()),
        ("id", node.id.clone()),
        ("state", node.state.clone()),
        ("role", node.role.clone()),
        ("address", node.address.clone().unwrap_or_default()),
        ("last heard", heard),
        ("architecture", node.architecture.clone()),
        ("cpu", cpu),
        ("memory", memory),
        ("disk", disk),
        ("disks", disks.join(", ")),
        ("temperature", temperature),
        ("instances", node.instances.to_string()),
        ("labels", labels.join(" ")),
        ("software", node.software.clone()),
        ("joined", node.joined_at.clone()),
        ("only copies", node.only_copies.join(", ")),
    ];
    for (key, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        print_line(&format!("{key:<13} {value}"));
    }
    let troubles =
        Trouble::ALL.into_iter().filter(|trouble| node.troubles.iter().any(|code| code == trouble.code()));
    for trouble in troubles {
        print_line(&format!("{:<13} {}", "trouble", trouble.text()));
    }
    for line in absent_disks(node) {
        print_line(&format!("{:<13} {line}", "trouble"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_set_and_removed() {
        let request = |labels: &[&str]| {
            labels_request(&labels.iter().map(|label| String::from(*label)).collect::<Vec<_>>())
        };
        let read = request(&["disk=ssd", "room-", "note=a-b-", "empty="]).unwrap();
        assert_eq!(read.remove, ["room"]);
        assert_eq!(read.set.len(), 3);
        assert_eq!((read.set["note"].as_str(), read.set["empty"].as_str()), ("a-b-", ""));
        for bad in [&["disk"][..], &["=x"], &["-"], &[]] {
            assert!(request(bad).is_err(), "{bad:?}");
        }
    }
}
