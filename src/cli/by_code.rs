//! From a laptop to a machine that it shares nothing with but a code or an operator's key.
//!
//! `--host` → address; a proof → a founded cluster or a token. Everything is asked over `transport::by_code`, which
//! sends nothing before the proof holds; here are the words for a person.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::failure::{Failure, chain};
use super::{Session, usage};
use crate::transport::by_code::{Answered, CodeReply, CodeRequest, CodedError, Proof, ask};
use crate::transport::codes::parse_code;
use crate::transport::identity::NodeKey;
use crate::transport::operators::{PrivateKeyError, read_private_key};
use crate::transport::token::{Token, TokenKind};

const PORT: u16 = 7400;

/// The code that was typed.
pub fn code(text: &str) -> anyhow::Result<String> {
    parse_code(text)
        .ok_or_else(|| usage(format!("{text:?} is no code"), "six digits, as the machine shows them: 493112"))
}

/// `--host ADDR`: an address or a name, with or without a port.
pub fn host(session: &Session) -> anyhow::Result<Option<SocketAddr>> {
    let Some(host) = &session.globals.host else { return Ok(None) };
    if let Ok(address) = host.parse::<SocketAddr>() {
        return Ok(Some(address));
    }
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(Some(SocketAddr::new(address, PORT)));
    }
    let resolved = host.to_socket_addrs().or_else(|_| (host.as_str(), PORT).to_socket_addrs());
    let address = resolved.ok().and_then(|mut addresses| addresses.next());
    address.map(Some).ok_or_else(|| {
        Failure::unreachable(format!("{host:?} is no address, and no name that this machine can resolve"))
            .hint("--host takes an address or a name: --host 192.168.1.20, --host pi1.local")
            .into()
    })
}

/// Runs an executor of its own: QUIC's tasks must be able to move between threads, this program's can't.
pub fn ask_now(address: SocketAddr, proof: &Proof<'_>, request: CodeRequest) -> Result<Answered, CodedError> {
    let executor = Arc::new(async_executor::Executor::new());
    let asking = ask(executor.clone(), address, proof, async { Ok(request) });
    async_io::block_on(executor.run(asking))
}

pub fn failure(error: CodedError) -> Failure {
    if error.is_wrong_code() {
        return Failure::refused(chain(&error.into()))
            .hint("after five wrong tries a machine shows a new code: look at its display");
    }
    match error {
        CodedError::Refused { refusal, .. } => Failure::refused(refusal.to_string()),
        error @ CodedError::Unanswered { .. } => Failure::unknown_outcome(chain(&error.into())),
        error => Failure::unreachable(chain(&error.into()))
            .hint("is it on, and on this network? UDP port 7400 must be open to it"),
    }
}

pub fn refused(sentence: String, hint: String) -> Failure {
    let failure = Failure::refused(sentence);
    if hint.is_empty() { failure } else { failure.hint(hint) }
}

/// What a member gives to whoever proves its code or key.
pub fn token_by(address: SocketAddr, proof: &Proof<'_>) -> Result<Token, Failure> {
    let answered = ask_now(address, proof, CodeRequest::Enrol).map_err(|error| match (&error, proof) {
        (CodedError::Refused { refusal, .. }, Proof::Key(_)) => Failure::refused(refusal.to_string()).hint(
            "put its line into `operators` of that node's tinydc.toml and start it anew, or use a code",
        ),
        _ => failure(error),
    })?;
    match answered.reply {
        CodeReply::Token { text } => Token::from_text(TokenKind::User, &text)
            .map_err(|error| Failure::refused(format!("{address} gave no token: {}", chain(&error.into())))),
        CodeReply::Refused { sentence, hint } => Err(refused(sentence, hint)),
        _ => Err(Failure::refused(format!("{address} answered something else than was asked"))),
    }
}

/// The key of the person who runs this.
pub fn own_key(path: Option<&Path>) -> anyhow::Result<NodeKey> {
    let usual = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".ssh/id_ed25519"));
    let path = path
        .map(Path::to_path_buf)
        .or_else(usual)
        .ok_or_else(|| usage("there is no home directory to look for a key in", "name it: --ssh-key FILE"))?;
    let text = std::fs::read_to_string(&path).map_err(|error| {
        Failure::refused(format!("read {}: {error}", path.display())).hint(
            "use a code instead (--code, made on a node by tinydc token --user NAME --code), or name a key: \
             --ssh-key FILE",
        )
    })?;
    read_private_key(&text).map_err(|error| {
        let hint = match error {
            PrivateKeyError::Encrypted => {
                "make one for this without a passphrase (ssh-keygen -t ed25519 -N '' \
                                           -f KEY) and name it: --ssh-key KEY; or use a code: --code"
            }
            PrivateKeyError::Format | PrivateKeyError::Kind => {
                "ssh-keygen -t ed25519 makes one; the public line belongs into `operators` of tinydc.toml"
            }
        };
        Failure::refused(format!("{}: {error}", path.display())).hint(hint).into()
    })
}
