//! `events`: what happened.

use argh::FromArgs;

use crate::api::wire::EventBody;
use crate::cli::Session;
use crate::cli::table::shortened;
use crate::cli::terminal::{self, Colour, print_line};

/// Show what happened in the cluster, oldest first.
#[derive(FromArgs)]
#[argh(subcommand, name = "events", help_triggers("-h", "--help"))]
#[argh(example = "tinydc events -f")]
pub struct Events {
    /// go on showing what happens
    #[argh(switch, short = 'f')]
    follow: bool,
}

impl Events {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let path = if self.follow { "/v1/events?follow=true" } else { "/v1/events" };
        let mut lines = session.client()?.lines(path).await?;
        let has_colour = terminal::has_colour();
        let mut is_empty = true;
        while let Some(event) = lines.next::<EventBody>().await? {
            is_empty = false;
            if session.is_json() {
                print_line(&serde_json::to_string(&event)?);
            } else {
                print_line(&line(&event, has_colour));
            }
        }
        if is_empty && !session.is_json() {
            print_line("Nothing has happened yet.");
        }
        Ok(())
    }
}

fn line(event: &EventBody, has_colour: bool) -> String {
    let at = if has_colour { Colour::Faint.paint(&event.at) } else { event.at.clone() };
    // The text is the point: it is not cut.
    format!("{at}  {:<16}  {}", shortened(&event.subject, 24), event.text)
}
