//! `secret`: passwords, keys and certificates that containers find as files.

use std::io::{IsTerminal, Read};

use anyhow::Context;
use argh::FromArgs;
use serde_json::Value;

use crate::api::wire::SecretsBody;
use crate::cli::client::escape;
use crate::cli::figures::size;
use crate::cli::table::Table;
use crate::cli::terminal::print_line;
use crate::cli::{Session, usage};
use crate::model::limits::SECRET_BYTES_MAX;

/// Passwords, keys and certificates: kept sealed, shown to containers as files in memory.
#[derive(FromArgs)]
#[argh(subcommand, name = "secret", help_triggers("-h", "--help"))]
#[argh(
    example = "tinydc secret set db-password password.txt\ntinydc secret ls\ntinydc secret rm db-password"
)]
pub struct Secret {
    #[argh(subcommand)]
    action: SecretAction,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum SecretAction {
    Set(SecretSet),
    Ls(SecretLs),
    Rm(SecretRm),
}

/// Keep a file's content, or standard input, as a secret; one of that name gets the new content.
#[derive(FromArgs)]
#[argh(subcommand, name = "set", help_triggers("-h", "--help"))]
#[argh(example = "tinydc secret set web-cert cert.pem\nopenssl rand -hex 16 | tinydc secret set db-password")]
struct SecretSet {
    /// NAME for the cluster, APP/NAME for one app
    #[argh(positional, arg_name = "NAME")]
    name: String,
    /// the file, - for standard input (default)
    #[argh(positional, arg_name = "FILE")]
    file: Option<String>,
}

/// List the secrets, without what is in them.
#[derive(FromArgs)]
#[argh(subcommand, name = "ls", help_triggers("-h", "--help"))]
#[argh(example = "tinydc secret ls")]
struct SecretLs {}

/// Remove a secret that nothing uses.
#[derive(FromArgs)]
#[argh(subcommand, name = "rm", help_triggers("-h", "--help"))]
#[argh(example = "tinydc secret rm db-password")]
struct SecretRm {
    /// as `tinydc secret ls` shows it
    #[argh(positional, arg_name = "NAME")]
    name: String,
}

impl Secret {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        match self.action {
            SecretAction::Set(SecretSet { name, file }) => {
                let bytes = read(&name, file.as_deref().unwrap_or("-"))?;
                let client = session.client()?;
                client.put_bytes(&format!("/v1/secrets/{}", escape(&name)), bytes.into()).await?;
                session.done(&format!("Secret {name} is set. Services get it when they are deployed."));
                Ok(())
            }
            SecretAction::Ls(_) => {
                let body: SecretsBody = session.client()?.read("/v1/secrets").await?;
                session.show(&body, print)
            }
            SecretAction::Rm(SecretRm { name }) => {
                let _: Value = session.client()?.delete(&format!("/v1/secrets/{}", escape(&name))).await?;
                session.done(&format!("Secret {name} is gone."));
                Ok(())
            }
        }
    }
}

/// The content of a file or of standard input, bounded.
pub fn read(name: &str, file: &str) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let most = SECRET_BYTES_MAX as u64 + 1;
    match file {
        "-" => {
            if std::io::stdin().is_terminal() {
                eprintln!(
                    "Type secret {name}, then Ctrl-D on a line of its own; the last line's end is part of it."
                );
            }
            std::io::stdin().take(most).read_to_end(&mut bytes).context("read standard input")?
        }
        path => {
            let file = std::fs::File::open(path).with_context(|| format!("read {path}"))?;
            file.take(most).read_to_end(&mut bytes).with_context(|| format!("read {path}"))?
        }
    };
    if bytes.len() > SECRET_BYTES_MAX {
        let hint = "mount larger files as a volume";
        return Err(usage(format!("secret {name} is larger than {}", size(SECRET_BYTES_MAX as u64)), hint));
    }
    if bytes.is_empty() {
        return Err(usage(
            format!("secret {name} would be empty"),
            "name a file, or write it to standard input",
        ));
    }
    Ok(bytes)
}

fn print(body: &SecretsBody) {
    if body.secrets.is_empty() {
        return print_line("No secrets. Keep one: tinydc secret set NAME FILE");
    }
    let mut table = Table::new(&["NAME", "BYTES", "VERSION", "CHANGED", "USED BY"]).wrapping_last();
    for secret in &body.secrets {
        table.row([
            (&secret.name).into(),
            secret.bytes.to_string().into(),
            secret.version.to_string().into(),
            (&secret.changed_at).into(),
            secret.used_by.join(", ").into(),
        ]);
    }
    table.print();
}
