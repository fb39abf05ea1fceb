//! `scale`: how many instances services have.

use std::collections::BTreeMap;

use argh::FromArgs;

use super::deploy::progress;
use crate::api::wire::{DeployReply, ScaleRequest, StatusBody};
use crate::cli::client::escape;
use crate::cli::names::{only_app, resolve};
use crate::cli::project::app_here;
use crate::cli::terminal::print_line;
use crate::cli::{Session, usage};

/// Change how many instances services have; until the next deploy says otherwise.
#[derive(FromArgs)]
#[argh(subcommand, name = "scale", help_triggers("-h", "--help"))]
#[argh(example = "tinydc scale web=3\ntinydc scale shop web=3 worker=0")]
pub struct Scale {
    /// do not wait until it is so
    #[argh(switch, short = 'd')]
    detach: bool,
    /// how long to wait (default: 5m)
    #[argh(option, arg_name = "TIME")]
    timeout: Option<String>,
    /// an app, then SERVICE=NUMBER as often as you like
    #[argh(positional, arg_name = "[APP] SERVICE=NUMBER")]
    words: Vec<String>,
}

impl Scale {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let timeout = progress::timeout(self.timeout.as_deref())?;
        let client = session.client()?;
        let status: StatusBody = client.read("/v1/status").await?;
        let here = app_here();
        let mut app = None;
        let mut replicas = BTreeMap::new();
        for (position, word) in self.words.iter().enumerate() {
            let Some((name, number)) = word.split_once('=') else {
                match position {
                    0 => app = Some(word.clone()),
                    _ => return Err(usage(format!("{word:?} is not SERVICE=NUMBER"), "such as web=3")),
                }
                continue;
            };
            let number = number
                .parse()
                .map_err(|_| usage(format!("{number:?} is not a number of instances"), "such as web=3"))?;
            let mut service = name.to_owned();
            if app.is_none() || name.contains('/') {
                let found = resolve(name, here.as_deref(), &status.services)?;
                if app.as_ref().is_some_and(|app| *app != found.app) {
                    return Err(usage("these are services of different apps", "scale one app at a time"));
                }
                service = match (found.service, found.slot) {
                    (Some(service), None) => service,
                    // A word that names an app, with a service of the same name in it.
                    (None, None) => name.into(),
                    _ => return Err(usage(format!("{name} is one instance"), "scale its service")),
                };
                app = Some(found.app);
            }
            replicas.insert(service, number);
        }
        if replicas.is_empty() {
            return Err(usage("scale what?", "such as: tinydc scale web=3"));
        }
        let app = match app {
            Some(app) => app,
            None => only_app(here.as_deref(), &status.services)?,
        };
        let request = ScaleRequest { replicas };
        let reply: DeployReply = client.post(&format!("/v1/apps/{}/scale", escape(&app)), &request).await?;
        if self.detach || reply.changed.is_empty() {
            return session.show(&reply, |reply| match reply.changed.is_empty() {
                true => print_line("Nothing changed: it is so already."),
                false => print_line(&format!("Scaling {app}. See it: tinydc ps {app}")),
            });
        }
        let status = progress::wait(session, &client, &app, timeout).await?;
        session.show(&status, progress::print_end)
    }
}
