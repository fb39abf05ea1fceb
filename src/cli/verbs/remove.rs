//! `rm` and `down`: remove an app; what happens to its data is said, or asked.

use std::io::{self, IsTerminal};

use argh::FromArgs;

use super::apps::kept_sentence;
use crate::api::wire::{RemoveReply, StatusBody, VolumeBody};
use crate::cli::client::{Client, escape};
use crate::cli::failure::Failure;
use crate::cli::project::{app_here, app_of_file};
use crate::cli::terminal::{confirm, print_line};
use crate::cli::{Session, usage};

/// Remove an app; its volumes are kept unless told otherwise.
#[derive(FromArgs)]
#[argh(subcommand, name = "rm", help_triggers("-h", "--help"))]
#[argh(example = "tinydc rm shop\ntinydc rm shop --volumes")]
pub struct Remove {
    /// also delete its volumes, after asking
    #[argh(switch)]
    volumes: bool,
    /// do not ask
    #[argh(switch, short = 'y')]
    yes: bool,
    /// the app
    #[argh(positional, arg_name = "APP")]
    app: String,
}

/// Remove the app of this directory's Compose file; its volumes are kept unless told otherwise.
#[derive(FromArgs)]
#[argh(subcommand, name = "down", help_triggers("-h", "--help"))]
#[argh(example = "tinydc down\ntinydc down -v")]
pub struct Down {
    /// also delete its volumes, after asking
    #[argh(switch, short = 'v')]
    volumes: bool,
    /// do not ask
    #[argh(switch, short = 'y')]
    yes: bool,
    /// another Compose file
    #[argh(option, short = 'f', arg_name = "FILE")]
    file: Option<std::path::PathBuf>,
    /// another app
    #[argh(positional, arg_name = "APP")]
    app: Option<String>,
}

impl Down {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let app = self.app.or_else(|| match &self.file {
            Some(file) => app_of_file(file),
            None => app_here(),
        });
        let app =
            app.ok_or_else(|| usage("there is no Compose file here", "name the app: tinydc down APP"))?;
        Remove { volumes: self.volumes, yes: self.yes, app }.run(session).await
    }
}

impl Remove {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let client = session.client()?;
        let app = self.app.as_str();
        if self.volumes && !self.yes && !confirm_volumes(&client, app).await? {
            return Err(Failure::refused("nothing was removed").into());
        }
        let query = if self.volumes { "?volumes=true" } else { "" };
        let reply: RemoveReply = client.delete(&format!("/v1/apps/{}{query}", escape(app))).await?;
        session.show(&reply, |reply| {
            print_line(&match self.volumes {
                true => format!("App {app} and its volumes are removed."),
                false => format!("App {app} is removed."),
            });
            reply.volumes.iter().for_each(|volume| print_line(&kept_sentence(volume)));
        })
    }
}

async fn confirm_volumes(client: &Client, app: &str) -> anyhow::Result<bool> {
    let status: StatusBody = client.read(&format!("/v1/status?app={}", escape(app))).await?;
    let volumes: Vec<&VolumeBody> = status.volumes.iter().filter(|volume| volume.app == app).collect();
    if volumes.is_empty() {
        return Ok(true);
    }
    for volume in &volumes {
        let place = match &volume.node {
            Some(node) => format!("on {node} at {}", volume.path),
            None => "never used".into(),
        };
        eprintln!("volume {app}/{} ({place})", volume.name);
    }
    if !io::stdin().is_terminal() {
        return Err(Failure::refused("deleting volumes needs a yes, and there is no terminal to ask on")
            .hint(format!("tinydc rm {app} --volumes --yes"))
            .into());
    }
    let what = if volumes.len() == 1 { "this volume" } else { "these volumes" };
    Ok(confirm(&format!("Remove {app} and delete {what} for good?"))?)
}
