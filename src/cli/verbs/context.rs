//! `context`: the clusters that this machine may talk to.

use std::path::PathBuf;

use argh::FromArgs;
use serde_json::json;

use crate::cli::contexts::{self, ContextFile, LOCAL, Store};
use crate::cli::failure::{Failure, chain};
use crate::cli::figures;
use crate::cli::table::{Cell, Table};
use crate::cli::terminal::print_line;
use crate::cli::{Session, by_code, usage};
use crate::model::Timestamp;
use crate::transport::authority::{Peer, Role};
use crate::transport::by_code::Proof;
use crate::transport::identity::NodeKey;
use crate::transport::join::{Enrolled, JoinError, JoinReply, JoinSubject, join};
use crate::transport::token::{Token, TokenKind};

/// Talk to clusters from a laptop: no root, no daemon.
#[derive(FromArgs)]
#[argh(subcommand, name = "context", help_triggers("-h", "--help"))]
#[argh(
    example = "On a node:   tinydc token --user ann --code\nOn a laptop: tinydc context create home --host \
                  192.168.1.20 --code 493112"
)]
pub struct Context {
    #[argh(subcommand)]
    action: Action,
}

#[derive(FromArgs)]
#[argh(subcommand)]
enum Action {
    Create(Create),
    Ls(Ls),
    Use(Use),
    Rm(Rm),
}

/// Make a context from a token, or from a node (--host ADDR) by its code or by an SSH key that its configuration names.
/// A key is made here, and the cluster signs it.
#[derive(FromArgs)]
#[argh(subcommand, name = "create", help_triggers("-h", "--help"))]
#[argh(
    example = "tinydc context create home tdc-user-…\ntinydc context create home --host 192.168.1.20 --code \
                  493112\ntinydc context create home --host pi1.local"
)]
struct Create {
    /// what to call the cluster here
    #[argh(positional, arg_name = "NAME")]
    name: String,
    /// what `tinydc token --user` printed on a node
    #[argh(positional, arg_name = "TOKEN")]
    token: Option<String>,
    /// the six digits that the node of --host shows: tinydc token --user NAME --code
    #[argh(option, arg_name = "CODE")]
    code: Option<String>,
    /// the private key of a line in `operators` (default: ~/.ssh/id_ed25519)
    #[argh(option, arg_name = "FILE")]
    ssh_key: Option<PathBuf>,
}

/// List the contexts; * marks the one in use.
#[derive(FromArgs)]
#[argh(subcommand, name = "ls", help_triggers("-h", "--help"))]
#[argh(example = "tinydc context ls")]
struct Ls {}

/// Choose the context that commands use; `local` is this machine's own daemon.
#[derive(FromArgs)]
#[argh(subcommand, name = "use", help_triggers("-h", "--help"))]
#[argh(example = "tinydc context use home")]
struct Use {
    /// a context, or local
    #[argh(positional, arg_name = "NAME")]
    name: String,
}

/// Forget a context and its key.
#[derive(FromArgs)]
#[argh(subcommand, name = "rm", help_triggers("-h", "--help"))]
#[argh(example = "tinydc context rm home")]
struct Rm {
    /// the context
    #[argh(positional, arg_name = "NAME")]
    name: String,
}

impl Context {
    pub async fn run(self, session: &Session) -> anyhow::Result<()> {
        let store = Store::open()?;
        match self.action {
            Action::Create(create) => create.run(session, &store),
            Action::Ls(_) => list(session, &store),
            Action::Use(Use { name }) => {
                store.set_current(&name)?;
                session.done(&match name.as_str() {
                    LOCAL => "Commands go to this machine's own daemon.".into(),
                    name => format!("Commands go to context {name}."),
                });
                Ok(())
            }
            Action::Rm(Rm { name }) => {
                store.remove(&name)?;
                session.done(&format!("Context {name} and its key are gone from this machine."));
                Ok(())
            }
        }
    }
}

impl Create {
    fn run(self, session: &Session, store: &Store) -> anyhow::Result<()> {
        store.check_new(&self.name)?;
        let token = self.token(session)?;
        let made = make(store, self.name, &token)?;
        let (name, file) = (&made.context.name, &made.context.file);
        let shown = json!({ "name": name, "cluster": file.cluster, "is_current": made.is_current });
        session.show(&shown, |_| tell(&made))
    }

    /// What was given, or what a node gives for a code or a key.
    fn token(&self, session: &Session) -> anyhow::Result<Token> {
        let host = by_code::host(session)?;
        match (&self.token, &self.code, host) {
            (Some(token), None, _) if self.ssh_key.is_none() => read_token(token),
            (None, Some(code), Some(host)) if self.ssh_key.is_none() => {
                Ok(by_code::token_by(host, &Proof::Code(&by_code::code(code)?))?)
            }
            (None, None, Some(host)) => {
                let key = by_code::own_key(self.ssh_key.as_deref())?;
                let token = by_code::token_by(host, &Proof::Key(&key))?;
                let hash: String = token.authority.0.iter().map(|byte| format!("{byte:02x}")).collect();
                // The node knows this laptop; nothing but this number tells the laptop which node that was.
                eprintln!(
                    "first contact: nobody vouches for this cluster but its answer. The SHA-256 of its CA is"
                );
                eprintln!("  {hash}\ncompare it with what `tinydc join` shows on a node");
                Ok(token)
            }
            (None, Some(_), None) => Err(usage(
                "which node shows that code?",
                "name it: tinydc context create NAME --host ADDR --code CODE",
            )),
            (None, None, None) => Err(usage(
                "a token, or a node, is missing",
                "tinydc context create NAME TOKEN, or NAME --host ADDR --code CODE, or NAME --host ADDR for an SSH key",
            )),
            _ => Err(usage("one of a token, --code and --ssh-key is enough", "tinydc context create --help")),
        }
    }
}

fn read_token(text: &str) -> anyhow::Result<Token> {
    Token::from_text(TokenKind::User, text).map_err(|error| {
        let hint = match Token::from_text(TokenKind::Join, text) {
            Ok(_) => "this token lets nodes join; for a laptop: tinydc token --user NAME",
            Err(_) => "copy the whole token that `tinydc token --user NAME` prints on a node",
        };
        usage(chain(&error.into()), hint)
    })
}

pub struct Made {
    pub context: contexts::Context,
    pub is_current: bool,
}

/// Makes a key, has it signed by the token's cluster, and saves the context; the first one is used from now on.
pub fn make(store: &Store, name: String, token: &Token) -> anyhow::Result<Made> {
    let key = NodeKey::create()?;
    let device = nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned());
    let subject = JoinSubject::Person { device: device.unwrap_or_else(|_| "laptop".into()) };
    let enrolled = enrol(token, &key, subject)?;
    let known = if enrolled.addresses.is_empty() { token.addresses.clone() } else { enrolled.addresses };
    let context = contexts::Context {
        name,
        file: ContextFile {
            cluster: enrolled.cluster_name,
            cluster_id: format!("{:032x}", enrolled.cluster_id.0),
            addresses: known,
        },
        key,
        certificate: enrolled.certificate.into(),
        authority: enrolled.authority.into(),
    };
    store.save(&context)?;
    let is_current = store.current().is_none();
    if is_current {
        store.set_current(&context.name)?;
    }
    Ok(Made { context, is_current })
}

pub fn tell(made: &Made) {
    let (name, file) = (&made.context.name, &made.context.file);
    let nodes = figures::count(file.addresses.len(), "node");
    print_line(&format!("Context {name}: cluster {}, {nodes} known.", file.cluster));
    match made.is_current {
        true => print_line("Commands go to it from now on. Try: tinydc status"),
        false => print_line(&format!("Use it: tinydc context use {name}")),
    }
}

/// Runs an executor of its own: QUIC's tasks must be able to move between threads, this program's can't.
fn enrol(token: &Token, key: &NodeKey, subject: JoinSubject) -> anyhow::Result<Enrolled> {
    let executor = std::sync::Arc::new(async_executor::Executor::new());
    let reply = async_io::block_on(executor.clone().run(join(executor.clone(), token, key, subject)));
    match reply {
        Ok(JoinReply::Enrolled(enrolled)) => Ok(enrolled),
        Ok(_) => Err(Failure::refused("the cluster answered something else than a certificate").into()),
        Err(JoinError::Refused { refusal, hint }) => {
            let failure = Failure::refused(refusal.to_string());
            Err(if hint.is_empty() { failure.into() } else { failure.hint(hint).into() })
        }
        Err(error @ JoinError::Unreachable { .. }) => Err(Failure::unreachable(chain(&error.into()))
            .hint("is this the nodes' network? UDP port 7400 must be open to them")
            .into()),
        Err(error @ JoinError::Unanswered { .. }) => {
            Err(Failure::unknown_outcome(chain(&error.into())).into())
        }
        Err(error @ JoinError::NoAddress) => Err(Failure::refused(error.to_string())
            .hint("the node had no network when it made the token; connect it and make another")
            .into()),
        Err(error) => Err(error.into()),
    }
}

fn list(session: &Session, store: &Store) -> anyhow::Result<()> {
    let current = store.current();
    let mut table = Table::new(&["", "NAME", "CLUSTER", "USER", "ROLE", "EXPIRES", "NODES"]);
    let mut rows = Vec::new();
    for name in store.names()? {
        let is_current = current.as_deref() == Some(name.as_str());
        let mark = if is_current { "*" } else { "" };
        match store.load(&name) {
            Ok(context) => {
                let (user, role, expires) = describe(context.person());
                let addresses: Vec<String> =
                    context.file.addresses.iter().map(|address| address.ip().to_string()).collect();
                rows.push(json!({
                    "name": name, "cluster": context.file.cluster, "user": user, "role": role,
                    "expires_at": expires, "addresses": context.file.addresses, "is_current": is_current,
                }));
                let cells = [mark.into(), name, context.file.cluster, user, role];
                let date = expires.split('T').next().unwrap_or("").to_owned();
                table.row(cells.into_iter().chain([date, addresses.join(" ")]).map(Cell::from));
            }
            Err(error) => {
                rows.push(json!({ "name": name, "error": chain(&error), "is_current": is_current }));
                let empty = || Cell::from("");
                table.row([mark.into(), name.into(), empty(), empty(), empty(), empty(), "damaged".into()]);
            }
        }
    }
    session.show(&json!({ "contexts": rows, "current": current }), |_| {
        if table.is_empty() {
            print_line("No contexts: commands go to this machine's own daemon.");
            print_line("On a node: tinydc token --user NAME; here: tinydc context create CONTEXT TOKEN");
            return;
        }
        table.print();
        if current.is_none() {
            print_line("None is in use: commands go to this machine's own daemon.");
        }
    })
}

fn describe(person: Option<Peer>) -> (String, String, String) {
    let Some(peer) = person else { return ("?".into(), "?".into(), String::new()) };
    let expires = Timestamp(peer.not_after.saturating_mul(1000)).to_string();
    match peer.role {
        Role::Operator { name } => (name, "operator".into(), expires),
        Role::Viewer { name } => (name, "viewer".into(), expires),
        Role::Node => ("?".into(), "node".into(), expires),
    }
}
