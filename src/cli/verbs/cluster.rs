//! `init`, `join`, `leave`, `version`: this machine's daemon and its cluster.

use argh::FromArgs;
use serde_json::{Value, json};

use crate::api::wire::{InitReply, InitRequest, JoinBody, JoinDone, LeaveRequest, VersionBody};
use crate::cli::failure::{Failure, chain};
use crate::cli::terminal::print_line;
use crate::cli::{Session, usage};
use crate::transport::token::{Token, TokenKind};

/// Found a cluster on this node.
#[derive(FromArgs)]
#[argh(subcommand, name = "init", help_triggers("-h", "--help"))]
#[argh(example = "tinydc init --name home")]
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
}

impl Init {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
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

/// Make this node a member of a cluster.
#[derive(FromArgs)]
#[argh(subcommand, name = "join", help_triggers("-h", "--help"))]
#[argh(example = "tinydc join tdc-join-…\ntinydc join tdc-join-… --replace pi2")]
pub struct Join {
    /// what `tinydc token` printed on a member
    #[argh(positional, arg_name = "TOKEN")]
    token: String,
    /// take the place of a member that is gone for good
    #[argh(option, arg_name = "NAME")]
    replace: Option<String>,
}

impl Join {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        if let Err(error) = Token::from_text(TokenKind::Join, &self.token) {
            let is_user_token = Token::from_text(TokenKind::User, &self.token).is_ok();
            let hint = match is_user_token {
                true => "this token is for a laptop: tinydc context create NAME TOKEN",
                false => "copy the whole line that `tinydc token` prints on a member",
            };
            return Err(usage(chain(&error.into()), hint));
        }
        let body = JoinBody { token: self.token, replace: self.replace };
        let done: JoinDone = session.local_client()?.post("/v1/join", &body).await?;
        session.show(&done, |done| {
            print_line(&format!("{} is a member of cluster {}.", done.node, done.cluster));
            print_line("See it: tinydc node ls");
        })
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
