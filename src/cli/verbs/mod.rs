//! The verbs: what each takes, and what it does. One file per verb or group.

mod apps;
mod authority;
mod board;
mod cluster;
mod context;
mod demo;
mod deploy;
mod events;
mod exec;
mod image;
mod logs;
mod network;
mod node;
mod people;
mod remove;
mod scale;
mod secret;
mod settings;

pub use apps::health_text;
use argh::FromArgs;
use nix::sys::signal::Signal;

use super::Session;

/// tinydc
#[derive(FromArgs)]
#[argh(help_triggers("-h", "--help"))]
pub struct Command {
    #[argh(subcommand)]
    pub verb: Verb,
}

#[derive(FromArgs)]
#[argh(subcommand)]
pub enum Verb {
    Address(network::Address),
    Ca(authority::Ca),
    Context(context::Context),
    Demo(demo::Demo),
    Deploy(deploy::Deploy),
    Down(remove::Down),
    Events(events::Events),
    Exec(exec::Exec),
    Image(image::Image),
    Init(cluster::Init),
    Join(cluster::Join),
    Leave(cluster::Leave),
    Logs(logs::Logs),
    Ls(apps::Ls),
    Net(network::Net),
    Node(node::Node),
    Ps(apps::Ps),
    Rm(remove::Remove),
    Scale(scale::Scale),
    Secret(secret::Secret),
    Settings(settings::Settings),
    Status(apps::Status),
    Token(people::Token),
    User(people::User),
    Version(cluster::Version),
}

impl Verb {
    /// Signals that the verb handles instead of being ended by them.
    pub fn own_signals(&self) -> &'static [Signal] {
        match self {
            Verb::Deploy(_) | Verb::Scale(_) => &[Signal::SIGINT],
            Verb::Exec(_) => exec::SIGNALS,
            _ => &[],
        }
    }
}

pub async fn run(session: &Session, verb: Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Address(verb) => verb.run(session).await,
        Verb::Ca(verb) => verb.run(session).await,
        Verb::Net(verb) => verb.run(session).await,
        Verb::Context(verb) => verb.run(session).await,
        Verb::Demo(verb) => verb.run(),
        Verb::Deploy(verb) => verb.run(session).await,
        Verb::Down(verb) => verb.run(session).await,
        Verb::Events(verb) => verb.run(session).await,
        Verb::Exec(verb) => verb.run(session).await,
        Verb::Image(verb) => verb.run(session).await,
        Verb::Init(verb) => verb.run(session).await,
        Verb::Join(verb) => verb.run(session).await,
        Verb::Leave(verb) => verb.run(session).await,
        Verb::Logs(verb) => verb.run(session).await,
        Verb::Ls(verb) => verb.run(session).await,
        Verb::Node(verb) => verb.run(session).await,
        Verb::Ps(verb) => verb.run(session).await,
        Verb::Rm(verb) => verb.run(session).await,
        Verb::Scale(verb) => verb.run(session).await,
        Verb::Secret(verb) => verb.run(session).await,
        Verb::Settings(verb) => verb.run(session).await,
        Verb::Status(verb) => verb.run(session).await,
        Verb::Token(verb) => verb.run(session).await,
        Verb::User(verb) => verb.run(session).await,
        Verb::Version(verb) => verb.run(session).await,
    }
}
