//! `image`: load, list and remove images.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::Context;
use argh::FromArgs;
use serde_json::Value;
use smol::Unblock;

use crate::api::wire::{ImageBody, ImagesBody, LoadReply};
use crate::cli::client::escape;
use crate::cli::figures::size;
use crate::cli::table::Table;
use crate::cli::terminal::print_line;
use crate::cli::{Session, usage};

/// Load, list and remove images.
#[derive(FromArgs)]
#[argh(subcommand, name = "image", help_triggers("-h", "--help"))]
#[argh(example = "docker save shop:1 | tinydc image load\ntinydc image ls")]
pub struct Image {
    #[argh(subcommand)]
    action: Action,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Action {
    Load(Load),
    Ls(Ls),
    Rm(Rm),
}

/// Load images from a tar: an OCI layout, or the output of `docker save`.
#[derive(FromArgs)]
#[argh(subcommand, name = "load", help_triggers("-h", "--help"))]
#[argh(example = "tinydc image load shop.tar\ndocker save shop:1 | tinydc image load")]
struct Load {
    /// the tar (default: standard input)
    #[argh(positional, arg_name = "FILE")]
    file: Option<String>,
}

/// List the images and the nodes that hold them.
#[derive(FromArgs)]
#[argh(subcommand, name = "ls", help_triggers("-h", "--help"))]
#[argh(example = "tinydc image ls")]
struct Ls {}

/// Remove an image that nothing uses.
#[derive(FromArgs)]
#[argh(subcommand, name = "rm", help_triggers("-h", "--help"))]
#[argh(example = "tinydc image rm shop:1")]
struct Rm {
    /// its name or digest
    #[argh(positional, arg_name = "IMAGE")]
    image: String,
}

impl Image {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        match self.action {
            Action::Load(load) => load.run(session).await,
            Action::Ls(_) => {
                let images: ImagesBody = session.client()?.read("/v1/images").await?;
                session.show(&images, |images| match images.images.is_empty() {
                    true => {
                        print_line("No images yet: a deploy pulls them, tinydc image load FILE brings one.")
                    }
                    false => print_images(&images.images),
                })
            }
            Action::Rm(Rm { image }) => {
                let path = format!("/v1/images/{}", escape(&image));
                let _: Value = session.client()?.delete(&path).await?;
                session.done(&format!("Image {image} is removed."));
                Ok(())
            }
        }
    }
}

fn print_images(images: &[ImageBody]) {
    let mut table = Table::new(&["IMAGE", "DIGEST", "SIZE", "PLATFORMS", "NODES", "FROM"]);
    for image in images {
        let names = if image.names.is_empty() { "(no name)".into() } else { image.names.join(" ") };
        let parts = image.part_nodes.iter().map(|node| format!("{node} (part)"));
        let nodes: Vec<String> = image.nodes.iter().cloned().chain(parts).collect();
        table.row([
            names.into(),
            image.digest.short().into(),
            size(image.bytes).into(),
            image.platforms.join(" ").into(),
            nodes.join(" ").into(),
            (&image.source).into(),
        ]);
    }
    table.print();
}

impl Load {
    async fn run(self, session: &Session) -> anyhow::Result<()> {
        let client = session.client()?;
        let file = self.file.as_deref().filter(|file| *file != "-");
        let mut progress = Progress::new(None);
        let reply: LoadReply = match file {
            Some(path) => {
                let file = File::open(path).with_context(|| format!("open {path}"))?;
                let length = file.metadata().with_context(|| format!("read {path}"))?.len();
                progress.total = Some(length);
                client.upload("/v1/images", Unblock::new(file), move |bytes| progress.add(bytes)).await?
            }
            None if io::stdin().is_terminal() => {
                return Err(usage(
                    "there is no image on standard input",
                    "docker save IMAGE | tinydc image load, or: tinydc image load FILE",
                ));
            }
            None => {
                let input = Unblock::new(io::stdin());
                client.upload("/v1/images", input, move |bytes| progress.add(bytes)).await?
            }
        };
        session.show(&reply, |reply| {
            for image in &reply.images {
                let names = if image.names.is_empty() { "(no name)".into() } else { image.names.join(" ") };
                let digest = image.digest.short();
                print_line(&format!("loaded {names} ({digest}, {})", size(image.bytes)));
            }
        })
    }
}

/// One redrawn line on a terminal, nothing elsewhere.
struct Progress {
    sent: u64,
    total: Option<u64>,
    drawn_at: Option<Instant>,
    is_terminal: bool,
}

const DRAW_EVERY: Duration = Duration::from_millis(200);

impl Progress {
    fn new(total: Option<u64>) -> Progress {
        Progress { sent: 0, total, drawn_at: None, is_terminal: io::stderr().is_terminal() }
    }

    fn add(&mut self, bytes: u64) {
        self.sent += bytes;
        let is_whole = Some(self.sent) == self.total;
        let is_due = self.drawn_at.is_none_or(|drawn| drawn.elapsed() >= DRAW_EVERY);
        if !self.is_terminal || !is_due && !is_whole {
            return;
        }
        self.drawn_at = Some(Instant::now());
        let total = self.total.map(|total| format!(" of {}", size(total))).unwrap_or_default();
        eprint!("\r\x1b[Ksending {}{total}", size(self.sent));
        let _ = io::stderr().flush();
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.drawn_at.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}
