//! `logs`: what instances printed.
//!
//! Without `-f` the lines of several instances are merged by their time; with it they are shown as they arrive, and an
//! instance that takes another's place is followed too. Standard error stays standard error, as with Docker.

use std::collections::BTreeSet;
use std::time::Duration;

use argh::FromArgs;
use async_channel::{Receiver, Sender};
use futures_lite::future;

use crate::api::wire::{InstanceBody, LogLine, StatusBody};
use crate::cli::Session;
use crate::cli::client::{Client, Lines, escape};
use crate::cli::failure::{Failure, chain};
use crate::cli::names::{Selection, resolve};
use crate::cli::project::app_here;
use crate::cli::terminal::{self, Colour, print_line};
use crate::model::Timestamp;

/// How often a follower looks for instances that took another's place.
const LOOK_EVERY: Duration = Duration::from_secs(2);
const LINES_WAITING_MAX: usize = 256;

/// Show what an app, a service or an instance printed.
#[derive(FromArgs)]
#[argh(subcommand, name = "logs", help_triggers("-h", "--help"))]
#[argh(example = "tinydc logs -f shop/web\ntinydc logs --tail 20 -t web.1")]
pub struct Logs {
    /// go on showing what is printed
    #[argh(switch, short = 'f')]
    follow: bool,
    /// only the last N lines of each instance
    #[argh(option, short = 'n', arg_name = "N")]
    tail: Option<u64>,
    /// what the instance printed that had this one's place before
    #[argh(switch, short = 'p')]
    previous: bool,
    /// show the time of each line
    #[argh(switch, short = 't')]
    timestamps: bool,
    /// APP, APP/SERVICE or APP/SERVICE.N (default: this directory's app)
    #[argh(positional, arg_name = "NAME")]
    name: Option<String>,
}

/// How lines look.
struct Style {
    has_time: bool,
    is_json: bool,
    /// Width of the widest name; `None`: lines bear no name.
    name_width: Option<usize>,
    has_colour: bool,
}

impl Logs {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let client = session.client()?;
        let status: StatusBody = client.read("/v1/status").await?;
        let here = app_here();
        let name = self.name.clone().or_else(|| here.clone());
        let Some(name) = name else {
            return Err(Failure::usage("logs of what?").hint("tinydc logs APP, or APP/SERVICE").into());
        };
        let selection = resolve(&name, here.as_deref(), &status.services)?;
        let mut instances = selection.instances(&status.services);
        if self.previous {
            // During an update two instances share a name, but the dead are asked for by name.
            instances.dedup_by(|a, b| a.name == b.name);
        }
        if instances.is_empty() && !self.follow {
            let failure = Failure::refused(format!("{name} has no instance"));
            return Err(failure.hint(format!("tinydc status {} says why", selection.app)).into());
        }
        let width = instances.iter().map(|instance| instance.name.len()).max().unwrap_or(0);
        let style = Style {
            has_time: self.timestamps,
            is_json: session.is_json(),
            name_width: (instances.len() > 1).then_some(width),
            has_colour: terminal::has_colour(),
        };
        if self.previous && self.follow {
            return Err(Failure::usage("-p and -f exclude each other: what is dead prints no more").into());
        }
        match self.follow {
            true => self.follow_all(&client, &selection, &instances, &style).await,
            false => self.merge(&client, &instances, &style).await,
        }
    }

    fn path(&self, instance: &InstanceBody) -> String {
        let mut query = Vec::new();
        query.extend(self.follow.then(|| "follow=true".to_owned()));
        query.extend(self.previous.then(|| "dead=true".to_owned()));
        query.extend(self.tail.map(|tail| format!("tail={tail}")));
        // The dead are known by name only.
        let name = if self.previous { &instance.name } else { &instance.id };
        let mark = if query.is_empty() { "" } else { "?" };
        format!("/v1/instances/{}/logs{mark}{}", escape(name), query.join("&"))
    }

    async fn merge(&self, client: &Client, instances: &[&InstanceBody], style: &Style) -> anyhow::Result<()> {
        let mut heads: Vec<(&InstanceBody, Lines, LogLine)> = Vec::new();
        let mut failed = None;
        for instance in instances {
            let opened = async {
                let mut lines = client.lines(&self.path(instance)).await?;
                Ok::<_, anyhow::Error>(lines.next().await?.map(|first| (lines, first)))
            };
            match opened.await {
                Ok(Some((lines, first))) => heads.push((instance, lines, first)),
                Ok(None) => {}
                // One node that is down must not hide what the others have.
                Err(error) => {
                    eprintln!("{}: {}", instance.name, chain(&error));
                    failed = Some(error);
                }
            }
        }
        while let Some(next) = (0..heads.len()).min_by_key(|index| heads[*index].2.at_ms) {
            let (instance, lines, head) = &mut heads[next];
            print(&instance.name, head, style);
            match lines.next().await? {
                Some(line) => *head = line,
                None => drop(heads.remove(next)),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn follow_all(
        &self,
        client: &Client,
        selection: &Selection,
        instances: &[&InstanceBody],
        style: &Style,
    ) -> anyhow::Result<()> {
        let (sender, receiver) = async_channel::bounded(LINES_WAITING_MAX);
        let mut known = BTreeSet::new();
        for instance in instances {
            match self.follow_one(client, instance, &sender).await {
                Ok(()) => drop(known.insert(instance.id.clone())),
                Err(error) => eprintln!("{}: {}", instance.name, chain(&error)),
            }
        }
        let look = async {
            loop {
                async_io::Timer::after(LOOK_EVERY).await;
                let path = format!("/v1/status?app={}", escape(&selection.app));
                // Without an answer the next look will do.
                let Ok(status) = client.read::<StatusBody>(&path).await else { continue };
                for instance in selection.instances(&status.services) {
                    let is_new = instance.node.is_some() && !known.contains(&instance.id);
                    // One that has printed nothing yet has no log: the next look tries again.
                    if is_new && self.follow_one(client, instance, &sender).await.is_ok() {
                        known.insert(instance.id.clone());
                    }
                }
            }
        };
        future::or(look, print_all(receiver, style)).await;
        Ok(())
    }

    /// Spawns nothing that outlives the executor: it ends with this program.
    async fn follow_one(
        &self,
        client: &Client,
        instance: &InstanceBody,
        sender: &Sender<(String, LogLine)>,
    ) -> anyhow::Result<()> {
        let name = instance.name.clone();
        let mut lines = client.lines(&self.path(instance)).await?;
        let sender = sender.clone();
        let work = async move {
            loop {
                match lines.next().await {
                    Ok(Some(line)) => {
                        if sender.send((name.clone(), line)).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => return,
                    Err(error) => return eprintln!("{name}: {}", chain(&error)),
                }
            }
        };
        client.executor.spawn(work).detach();
        Ok(())
    }
}

async fn print_all(receiver: Receiver<(String, LogLine)>, style: &Style) {
    while let Ok((name, line)) = receiver.recv().await {
        print(&name, &line, style);
    }
}

fn print(name: &str, line: &LogLine, style: &Style) {
    if style.is_json {
        let value = serde_json::json!({
            "instance": name, "at_ms": line.at_ms, "stream": line.stream, "text": line.text,
        });
        return print_line(&value.to_string());
    }
    let text = shown(name, line, style);
    match line.stream.as_str() {
        "stdout" => print_line(&text),
        _ => eprintln!("{text}"),
    }
}

fn shown(name: &str, line: &LogLine, style: &Style) -> String {
    let mut text = String::new();
    if let Some(width) = style.name_width {
        let prefix = format!("{name:width$} │");
        text.push_str(&match style.has_colour {
            true => colour_of(name).paint(&prefix),
            false => prefix,
        });
        text.push(' ');
    }
    if style.has_time {
        let at = Timestamp(line.at_ms).to_string();
        // Milliseconds, before the Z.
        text.push_str(&format!("{}.{:03}Z ", at.trim_end_matches('Z'), line.at_ms % 1000));
    }
    let words = line.text.trim_end_matches('\n');
    match (line.stream.as_str(), style.has_colour) {
        ("tinydc", true) => text.push_str(&Colour::Faint.paint(&format!("-- {words}"))),
        ("tinydc", false) => text.push_str(&format!("-- {words}")),
        _ => text.push_str(words),
    }
    text
}

/// The same name has the same colour each time.
fn colour_of(name: &str) -> Colour {
    const COLOURS: [Colour; 5] = [Colour::Cyan, Colour::Green, Colour::Yellow, Colour::Magenta, Colour::Blue];
    let sum: usize = name.bytes().map(usize::from).sum();
    COLOURS[sum % COLOURS.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_bears_the_name_and_the_time_that_were_asked_for() {
        let line =
            |stream: &str| LogLine { at_ms: 1_795_500_180_042, stream: stream.into(), text: "hi\n".into() };
        let mut style = Style { has_time: false, is_json: false, name_width: None, has_colour: false };
        assert_eq!(shown("shop/web.1", &line("stdout"), &style), "hi");
        assert_eq!(shown("shop/web.1", &line("tinydc"), &style), "-- hi");
        style.name_width = Some(12);
        style.has_time = true;
        let expected = "shop/web.1   │ 2026-11-24T06:03:00.042Z hi";
        assert_eq!(shown("shop/web.1", &line("stderr"), &style), expected);
    }
}
