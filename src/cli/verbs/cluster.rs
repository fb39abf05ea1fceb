//! `init`, `join`, `leave`, `version`: this machine's daemon and its cluster.

use argh::FromArgs;
use serde_json::{Value, json};

use super::board;
use crate::api::wire::{InitReply, InitRequest, JoinBody, JoinDone, JoiningBody, LeaveRequest, VersionBody};
use crate::cli::failure::{Failure, chain};
use crate::cli::terminal::print_line;
use crate::cli::{Session, usage};
use crate::transport::token::{Token, TokenKind};

/// Found a cluster on this node, or from a laptop on a machine that shows a code (--host ADDR where mDNS doesn't reach).
#[derive(FromArgs)]
#[argh(subcommand, name = "init", help_triggers("-h", "--help"))]
#[argh(example = "tinydc init --name home\ntinydc init --board 493112 --user ann")]
pub struct Init {
    /// the cluster's name (default: home)
    #[argh(option, arg_name = "HOME")]
    name: Option<String>,
    /// addresses for containers (default: 10.77.0.0/16)
    #[argh(option, arg_name = "CIDR")]
    container_range: Option<String>,
    /// addresses for services (default: 10.78.0.0/16)
    #[argh(option, arg_name = "CIDR")]
    vip_range: Option<String>,
    /// on the machine of this network that shows this code, and make a context for it here
    #[argh(option, arg_name = "CODE")]
    board: Option<String>,
    /// with --board: your name there (default: as you are called here)
    #[argh(option, arg_name = "NAME")]
    user: Option<String>,
}

impl Init {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        if let Some(code) = self.board {
            let (container_range, vip_range) = (self.container_range, self.vip_range);
            let wish = board::Wish { code, name: self.name, container_range, vip_range, user: self.user };
            return board::found(session, wish).await;
        }
        if self.user.is_some() {
            return Err(usage("--user goes with --board CODE", "on a node, root may do everything"));
        }
        let request =
            InitRequest { name: self.name, container_range: self.container_range, vip_range: self.vip_range };
        let reply: InitReply = session.local_client()?.post("/v1/init", &request).await?;
        session.show(&reply, |reply| {
            print_line(&format!("Cluster {} is founded; {} is its first node.", reply.cluster, reply.node));
            print_line(&format!("\nOn each further node (until {}):\n", reply.token_expires_at));
            print_line(&format!("  {}\n", reply.join_line));
            print_line("Keep this recovery key somewhere else; it is shown only now, and without it a");
            print_line("cluster that lost its voters can't be opened again:\n");
            print_line(&format!("  {}", reply.recovery_key));
        })
    }
}

/// Make this node a member of a cluster; without a token: show its code and how it may become one.
#[derive(FromArgs)]
#[argh(subcommand, name = "join", help_triggers("-h", "--help"))]
#[argh(example = "tinydc join\ntinydc join tdc-join-…\ntinydc join tdc-join-… --replace pi2")]
pub struct Join {
    /// what `tinydc token` printed on a member
    #[argh(positional, arg_name = "TOKEN")]
    token: Option<String>,
    /// take the place of a member that is gone for good
    #[argh(option, arg_name = "NAME")]
    replace: Option<String>,
}

impl Join {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let Some(token) = self.token else {
            if self.replace.is_some() {
                return Err(usage("--replace needs a token", "tinydc token, on a member, prints one"));
            }
            return show_joining(session).await;
        };
        if let Err(error) = Token::from_text(TokenKind::Join, &token) {
            let is_user_token = Token::from_text(TokenKind::User, &token).is_ok();
            let hint = match is_user_token {
                true => "this token is for a laptop: tinydc context create NAME TOKEN",
                false => "copy the whole line that `tinydc token` prints on a member",
            };
            return Err(usage(chain(&error.into()), hint));
        }
        let body = JoinBody { token, replace: self.replace };
        let done: JoinDone = session.local_client()?.post("/v1/join", &body).await?;
        session.show(&done, |done| {
            print_line(&format!("{} is a member of cluster {}.", done.node, done.cluster));
            print_line("See it: tinydc node ls");
        })
    }
}

/// What this machine's own display shows.
pub async fn show_joining(session: &Session) -> anyhow::Result<()> {
    let joining: JoiningBody = session.local_client()?.read("/v1/joining").await?;
    session.show(&joining, print_joining)
}

fn print_joining(joining: &JoiningBody) {
    match &joining.cluster {
        Some(cluster) => {
            print_line(&format!("{} is a member of cluster {cluster}.", joining.node));
            if let Some(hash) = &joining.authority_hash {
                print_line(&format!("SHA-256 of the cluster's CA: {hash}"));
            }
            if let (Some(person), Some(line)) = (&joining.code_for, &joining.line) {
                print_line(&format!("A laptop gets {person}'s access, once, by: {line}"));
            }
        }
        None => {
            let machine = format!("{} ({})", joining.node, joining.architecture);
            print_line(&format!("This machine, {machine}, belongs to no cluster."));
            if joining.state == "listening" {
                print_line("It listens for a cluster on this network, and founds one if there is none.");
            }
            if let Some(code) = &joining.code {
                print_line(&format!("Its code: {code}\n"));
                print_line(&format!("  into a cluster, on any member:    tinydc node accept {code}"));
                print_line(&format!("  found one on it, from a laptop:   tinydc init --board {code}"));
            }
            print_line("  found one on it, here:            tinydc init");
        }
    }
    if let Some(problem) = &joining.problem {
        print_line(&format!("\nproblem: {problem}"));
    }
}

/// Leave the cluster: this node's apps move away, and it forgets its membership.
#[derive(FromArgs)]
#[argh(subcommand, name = "leave", help_triggers("-h", "--help"))]
#[argh(example = "tinydc leave")]
pub struct Leave {
    /// also if this node holds the only copy of a volume or image, or the cluster would lose its quorum
    #[argh(switch)]
    force: bool,
}

impl Leave {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let request = LeaveRequest { is_forced: self.force };
        let _: Value = session.local_client()?.post("/v1/leave", &request).await?;
        session.done("This node has left its cluster.");
        Ok(())
    }
}

/// Show the version of this program and of the daemon.
#[derive(FromArgs)]
#[argh(subcommand, name = "version", help_triggers("-h", "--help"))]
#[argh(example = "tinydc version")]
pub struct Version {}

impl Version {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let own = env!("CARGO_PKG_VERSION");
        // Without a daemon this program still has a version.
        let daemon: Result<VersionBody, anyhow::Error> = match session.client() {
            Ok(client) => client.read("/v1/version").await,
            Err(error) => Err(error),
        };
        let shown = json!({ "version": own, "daemon": daemon.as_ref().ok() });
        session.show(&shown, |_| {
            print_line(&format!("tinydc {own} ({})", std::env::consts::ARCH));
            match &daemon {
                Ok(daemon) => print_line(&describe(daemon)),
                Err(error) => print_line(&format!("daemon: {}", explain(error))),
            }
        })
    }
}

fn describe(daemon: &VersionBody) -> String {
    let version = format!("daemon {} ({})", daemon.version, daemon.architecture);
    match (&daemon.cluster, &daemon.node) {
        (Some(cluster), Some(node)) => format!("{version}, node {node} of cluster {cluster}"),
        _ => format!("{version}, not a member of a cluster: tinydc init, or tinydc join TOKEN"),
    }
}

fn explain(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Failure>() {
        Some(failure) => failure.to_string(),
        None => chain(error),
    }
}
