//! `init --board`: founds a cluster on a machine that shows a code, from a laptop, which gets its access at once.

use serde_json::json;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

use super::context;
use crate::cli::contexts::Store;
use crate::cli::failure::Failure;
use crate::cli::terminal::print_line;
use crate::cli::{Session, by_code};
use crate::transport::authority::is_person_name;
use crate::transport::by_code::{Answered, CodeReply, CodeRequest, Proof};
use crate::transport::pending;
use crate::transport::token::Token;

/// Machines announce themselves every 2 s, and answer when asked.
const BROWSE_FOR: Duration = Duration::from_secs(3);
/// Each but the right one counts a wrong try.
const TRIED_MAX: usize = 4;
/// The board becomes a member meanwhile.
const ACCESS_LIMIT: Duration = Duration::from_secs(45);
const ACCESS_EVERY: Duration = Duration::from_millis(500);

pub struct Wish {
    pub code: String,
    pub name: Option<String>,
    pub container_range: Option<String>,
    pub vip_range: Option<String>,
    pub user: Option<String>,
}

/// The name of whoever runs this, if it can be a person's here.
fn own_name() -> String {
    let name = std::env::var("USER").unwrap_or_default().to_ascii_lowercase();
    if is_person_name(&name) { name } else { "operator".into() }
}

pub async fn found(session: &Session, wish: Wish) -> anyhow::Result<()> {
    let code = by_code::code(&wish.code)?;
    let store = Store::open()?;
    let context = wish.name.clone().unwrap_or_else(|| "home".into());
    store.check_new(&context)?;
    let machines = match by_code::host(session)? {
        Some(address) => vec![address],
        None => waiting_here().await?,
    };
    let request = CodeRequest::Found {
        name: wish.name,
        container_range: wish.container_range,
        vip_range: wish.vip_range,
        person: wish.user.unwrap_or_else(own_name),
    };
    let (address, answered) = first_with_code(&machines, &code, &request)?;
    let (cluster, node, recovery_key) = match answered.reply {
        CodeReply::Founded { cluster, node, recovery_key } => (cluster, node, recovery_key),
        CodeReply::Refused { sentence, hint } => return Err(by_code::refused(sentence, hint).into()),
        _ => return Err(Failure::refused(format!("{address} answered something else than was asked")).into()),
    };
    let secret = answered.secret.unwrap_or_default();
    if !session.is_json() {
        print_line(&format!("Cluster {cluster} is founded; {node}, at {}, is its first node.", address.ip()));
        print_line("\nKeep this recovery key somewhere else; it is shown only now, and without it a");
        print_line("cluster that lost its voters can't be opened again:\n");
        print_line(&format!("  {recovery_key}\n"));
    }
    let made = first_access(address, &secret)
        .map_err(anyhow::Error::from)
        .and_then(|token| context::make(&store, context.clone(), &token));
    if session.is_json() {
        let context = made.is_ok().then_some(&context);
        let shown = json!({ "cluster": cluster, "node": node, "address": address.ip(),
            "recovery_key": recovery_key, "context": context });
        print_line(&shown.to_string());
        return made.map(drop);
    }
    context::tell(&made?);
    print_line("\nFurther machines: switch them on, then tinydc node pending, and tinydc node accept CODE");
    Ok(())
}

async fn waiting_here() -> anyhow::Result<Vec<SocketAddr>> {
    let found = pending::browse(BROWSE_FOR).await;
    match found.len() {
        0 => Err(Failure::unreachable("no machine on this network waits for a cluster")
            .hint("is it on? where mDNS doesn't reach, name its address: --host ADDR")
            .into()),
        1..=TRIED_MAX => Ok(found.into_iter().map(|machine| machine.address).collect()),
        count => {
            let names: Vec<String> =
                found.iter().map(|machine| format!("{} {}", machine.name, machine.address.ip())).collect();
            Err(Failure::refused(format!("{count} machines wait; say which one: --host ADDR"))
                .hint(names.join(", "))
                .into())
        }
    }
}

fn first_with_code(
    machines: &[SocketAddr],
    code: &str,
    request: &CodeRequest,
) -> Result<(SocketAddr, Answered), Failure> {
    let mut last = None;
    for address in machines {
        match by_code::ask_now(*address, &Proof::Code(code), request.clone()) {
            Ok(answered) => return Ok((*address, answered)),
            // Another machine's code, or one that can't be reached; told if it is no other's either.
            Err(error) => last = Some(by_code::failure(error)),
        }
    }
    Err(last.unwrap_or_else(|| Failure::unreachable("no machine was asked")))
}

/// By the secret of both, until the board serves as a member.
fn first_access(address: SocketAddr, secret: &str) -> Result<Token, Failure> {
    let begin = Instant::now();
    loop {
        match by_code::token_by(address, &Proof::Code(secret)) {
            Ok(token) => return Ok(token),
            Err(error) if begin.elapsed() > ACCESS_LIMIT => {
                return Err(
                    error.hint("the cluster is founded; on the board: tinydc token --user NAME --code")
                );
            }
            Err(_) => thread::sleep(ACCESS_EVERY),
        }
    }
}
