//! `token` and `user`: who may join, and who may use the cluster.

use argh::FromArgs;
use serde_json::Value;

use crate::api::wire::{CodeBody, CodeWish, TokenReply, TokenRequest, TokensBody, UsersBody};
use crate::cli::client::escape;
use crate::cli::figures::{age, parse_duration, parse_time_ms};
use crate::cli::table::{Cell, Table};
use crate::cli::terminal::{Colour, print_line};
use crate::cli::{Session, usage};

/// Print a line that lets nodes join, or a person use the cluster from a laptop.
#[derive(FromArgs)]
#[argh(subcommand, name = "token", help_triggers("-h", "--help"))]
#[argh(example = "tinydc token                 for nodes, for 24 hours\ntinydc token --user ann      \
                  for ann's laptop\ntinydc token --user ann --code   the same, short enough to type\ntinydc token ls")]
pub struct Token {
    /// for a person's laptop instead of a node
    #[argh(option, arg_name = "NAME")]
    user: Option<String>,
    /// show six digits on this node instead, for ten minutes and one laptop
    #[argh(switch)]
    code: bool,
    /// the person may look but change nothing
    #[argh(switch)]
    viewer: bool,
    /// for one node only
    #[argh(switch)]
    once: bool,
    /// how long, such as 30m, 24h or 7d (default: 24h)
    #[argh(option, arg_name = "TIME")]
    valid: Option<String>,
    #[argh(subcommand)]
    action: Option<TokenAction>,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum TokenAction {
    Ls(TokenLs),
    Rm(TokenRm),
}

/// List the tokens; their secrets are kept nowhere.
#[derive(FromArgs)]
#[argh(subcommand, name = "ls", help_triggers("-h", "--help"))]
#[argh(example = "tinydc token ls")]
struct TokenLs {}

/// Revoke a token.
#[derive(FromArgs)]
#[argh(subcommand, name = "rm", help_triggers("-h", "--help"))]
#[argh(example = "tinydc token rm t3")]
struct TokenRm {
    /// as `tinydc token ls` shows it
    #[argh(positional, arg_name = "ID")]
    id: String,
}

impl Token {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        match self.action {
            None if self.code => self.show_code(session).await,
            None => self.create(session).await,
            Some(TokenAction::Ls(_)) => list_tokens(session).await,
            Some(TokenAction::Rm(TokenRm { id })) => {
                let path = format!("/v1/tokens/{}", escape(&id));
                let _: Value = session.client()?.delete(&path).await?;
                session.done(&format!("Token {id} lets nobody in any more."));
                Ok(())
            }
        }
    }

    /// Shown by the node that answers, and good there only.
    async fn show_code(self, session: &Session) -> anyhow::Result<()> {
        let Some(user) = self.user else {
            return Err(usage(
                "--code needs --user NAME",
                "a machine shows its own code: tinydc node pending",
            ));
        };
        if self.once || self.valid.is_some() {
            return Err(usage("a code serves once, for ten minutes", "leave out --once and --valid"));
        }
        let wish = CodeWish { user, is_viewer: self.viewer };
        let shown: CodeBody = session.client()?.post("/v1/codes", &wish).await?;
        session.show(&shown, |shown| {
            eprintln!("On the laptop, once, within {} minutes:\n", shown.valid_seconds / 60);
            print_line(&shown.line);
        })
    }

    async fn create(self, session: &Session) -> anyhow::Result<()> {
        let valid_seconds = match &self.valid {
            None => None,
            Some(text) => match parse_duration(text).map(|time| time.as_secs()) {
                None | Some(0) => {
                    return Err(usage(format!("{text:?} is not a length of time"), "such as 30m, 24h or 7d"));
                }
                seconds => seconds,
            },
        };
        if self.viewer && self.user.is_none() {
            return Err(usage("--viewer needs --user NAME", "nodes are no viewers"));
        }
        let request =
            TokenRequest { user: self.user, is_viewer: self.viewer, is_once: self.once, valid_seconds };
        let reply: TokenReply = session.client()?.post("/v1/tokens", &request).await?;
        session.show(&reply, |reply| {
            let place = if request.user.is_some() { "On the laptop" } else { "On each new node" };
            let place = if request.is_once && request.user.is_none() { "On one new node" } else { place };
            // The line itself stands alone on standard output, so that it can be piped.
            eprintln!("{place} (until {}; revoke: tinydc token rm {}):\n", reply.expires_at, reply.id);
            print_line(&reply.line);
        })
    }
}

async fn list_tokens(session: &Session) -> anyhow::Result<()> {
    let tokens: TokensBody = session.client()?.read("/v1/tokens").await?;
    session.show(&tokens, |tokens| {
        let mut table = Table::new(&["ID", "FOR", "EXPIRES", "STATE"]);
        for token in &tokens.tokens {
            let state = match (token.is_expired, token.is_used) {
                (true, _) => Cell::coloured("expired", Colour::Faint),
                (false, true) => "used".into(),
                (false, false) => "valid".into(),
            };
            table.row([(&token.id).into(), (&token.kind).into(), (&token.expires_at).into(), state]);
        }
        match table.is_empty() {
            true => print_line("No tokens. Make one: tinydc token, or tinydc token --user NAME"),
            false => table.print(),
        }
    })
}

/// Show or revoke the people who use the cluster from a laptop.
#[derive(FromArgs)]
#[argh(subcommand, name = "user", help_triggers("-h", "--help"))]
#[argh(example = "tinydc user ls\ntinydc user rm ann")]
pub struct User {
    #[argh(subcommand)]
    action: UserAction,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum UserAction {
    Ls(UserLs),
    Rm(UserRm),
}

/// List the people.
#[derive(FromArgs)]
#[argh(subcommand, name = "ls", help_triggers("-h", "--help"))]
#[argh(example = "tinydc user ls")]
struct UserLs {}

/// Revoke a person's contexts at once.
#[derive(FromArgs)]
#[argh(subcommand, name = "rm", help_triggers("-h", "--help"))]
#[argh(example = "tinydc user rm ann")]
struct UserRm {
    /// the person
    #[argh(positional, arg_name = "NAME")]
    name: String,
}

impl User {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        match self.action {
            UserAction::Ls(_) => list_users(session).await,
            UserAction::Rm(UserRm { name }) => {
                let path = format!("/v1/users/{}", escape(&name));
                let _: Value = session.client()?.delete(&path).await?;
                session.done(&format!("{name} has no access any more."));
                Ok(())
            }
        }
    }
}

async fn list_users(session: &Session) -> anyhow::Result<()> {
    let users: UsersBody = session.client()?.read("/v1/users").await?;
    session.show(&users, |users| {
        let mut table = Table::new(&["NAME", "ROLE", "CONTEXTS", "SINCE"]);
        for user in &users.users {
            let contexts = user.contexts.to_string();
            table.row([(&user.name).into(), (&user.role).into(), contexts.into(), (&user.created_at).into()]);
        }
        match table.is_empty() {
            true => print_line("Nobody uses the cluster from a laptop yet: tinydc token --user NAME"),
            false => table.print(),
        }
    })
}

/// How long ago, by this machine's clock; the text itself if it is no time.
pub fn ago(time: &str) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now_ms = now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
    match parse_time_ms(time) {
        Some(then_ms) => age(now_ms.saturating_sub(then_ms)),
        None => time.into(),
    }
}
