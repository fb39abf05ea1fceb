//! Codes: what this machine shows, which machines wait for a cluster, and taking one in.
//!
//! A person's word and a code → a token for whoever proved that it knows the code. What a code is good for ends with
//! the same tokens as always; a token never leaves before both ends have proved the code to each other.

use super::backend::Backend;
use super::body::{self, Reply};
use super::error::ApiError;
use super::handlers::create_token;
use super::peer;
use super::wire::{
    AcceptReply, AcceptRequest, CodeBody, CodeWish, JoiningBody, PendingBody, PendingMachine, TokenRequest,
};
use crate::model::*;
use crate::state::Command;
use crate::transport::authority::is_person_name;
use crate::transport::by_code::{self, CodeReply, CodeRequest, CodedError, Proof};
use crate::transport::codes::{Grant, Lasting, Shown, make_code, parse_code};
use crate::transport::door::CodeAsked;
use crate::transport::hello::{Refusal, RefusalCode};
use crate::transport::ids::AuthorityHash;
use crate::transport::pending::{Waiting, key_hash, key_hash_text};
use hyper::body::Incoming;
use hyper::{Request, StatusCode};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a person's code is shown.
const CODE_SECONDS: u64 = 600;
/// A token made for one conversation.
const TOKEN_SECONDS: u64 = 600;
/// Without a name each machine that waits is tried: each but one counts a wrong try.
const TRIED_MAX: usize = 4;
const DEFAULT_PORT: u16 = 7400;
/// Machines announce themselves every 2 s.
const HEAR_LIMIT: Duration = Duration::from_secs(3);
/// A machine that joined is in the state of the leader; this node's copy follows.
const SEEN_LIMIT: Duration = Duration::from_secs(5);
const SEEN_LOOK: Duration = Duration::from_millis(100);

/// What gives a laptop its context by a code of this node.
pub fn context_line(backend: &Backend, code: &str) -> String {
    let own = backend.transport.local_addresses();
    let address = own.iter().find(|address| address.is_ipv4()).or(own.first());
    let host = match address {
        Some(address) if address.port() == DEFAULT_PORT => address.ip().to_string(),
        Some(address) => address.to_string(),
        None => "ADDRESS".into(),
    };
    let state = backend.replica.state();
    let cluster = state.cluster().map_or("home", |cluster| cluster.name.as_str());
    format!("tinydc context create {cluster} --host {host} --code {code}")
}

pub fn show(backend: &Backend) -> Result<Reply, ApiError> {
    let state = backend.replica.state();
    let shown = backend.transport.door().displayed();
    let code = shown.as_ref().map(|shown| shown.code.clone());
    let code_for = shown.and_then(|shown| match shown.grant {
        Grant::Person { name, .. } => Some(name),
        Grant::Machine => None,
    });
    let authority = backend.identity().membership.map(|membership| AuthorityHash::of(&membership.authority));
    let hex = |hash: AuthorityHash| hash.0.iter().map(|byte| format!("{byte:02x}")).collect();
    body::ok(&JoiningBody {
        state: "member".into(),
        authority_hash: authority.map(hex),
        node: state.node_name(backend.node),
        architecture: Architecture::own().oci_name().into(),
        cluster: state.cluster().map(|cluster| cluster.name.clone()),
        line: code.as_deref().map(|code| context_line(backend, code)),
        code,
        code_for,
        key_hash: Some(key_hash_text(&key_hash(&backend.identity().node_key.public_key()))),
        problem: None,
    })
}

/// Shows a code on this very node; the one before is void.
pub async fn show_code(backend: &Arc<Backend>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let wish: CodeWish = body::parse(request.into_body()).await?;
    if !is_person_name(&wish.user) {
        let error = ApiError::invalid(format!("{:?} is no person's name", wish.user));
        return Err(error.hint("1 to 32 of a-z, 0-9 and '-', such as ann"));
    }
    let code = make_code().map_err(|error| ApiError::internal(&error))?;
    backend.transport.door().show(Shown {
        code: code.clone(),
        grant: Grant::Person { name: wish.user, is_viewer: wish.is_viewer },
        lasting: Lasting::Asked,
        until: Some(Instant::now() + Duration::from_secs(CODE_SECONDS)),
        wrong_tries: 0,
    });
    let line = context_line(backend, &code);
    body::ok(&CodeBody { code, valid_seconds: CODE_SECONDS, line })
}

pub fn pending(backend: &Backend) -> Result<Reply, ApiError> {
    let machine = |waiting: Waiting| PendingMachine {
        name: waiting.name,
        address: waiting.address.to_string(),
        architecture: waiting.architecture,
        waits_ms: waiting.waits_s.saturating_mul(1000),
        key_hash: key_hash_text(&waiting.key_hash),
    };
    body::ok(&PendingBody { machines: backend.transport.waiting().into_iter().map(machine).collect() })
}

/// An address, with or without a port.
fn address_in(text: &str) -> Option<SocketAddr> {
    let plain = || text.parse::<IpAddr>().map(|address| SocketAddr::new(address, DEFAULT_PORT));
    text.parse().or_else(|_| plain()).ok()
}

/// Who waits. A node that has just started has heard nobody yet.
async fn hear(backend: &Backend) -> Vec<Waiting> {
    let begin = Instant::now();
    loop {
        let waiting = backend.transport.waiting();
        if !waiting.is_empty() || begin.elapsed() > HEAR_LIMIT {
            return waiting;
        }
        async_io::Timer::after(SEEN_LOOK).await;
    }
}

/// Whom to try: the machine that was named, or all that wait.
fn candidates(waiting: Vec<Waiting>, machine: Option<&str>) -> Result<Vec<SocketAddr>, ApiError> {
    let list = "tinydc node pending lists the machines that wait";
    if let Some(machine) = machine {
        let named: Vec<SocketAddr> =
            waiting.iter().filter(|one| one.name == machine).map(|one| one.address).collect();
        return match named.is_empty() {
            true => Err(ApiError::not_found("machine that waits", machine)
                .hint(format!("{list}; one on another network is named by its address"))),
            false => Ok(named),
        };
    }
    match waiting.len() {
        0 => Err(ApiError::rejected("no machine on this node's network waits for a cluster")
            .hint("is it on? one on another network: tinydc node accept CODE ADDRESS")),
        1..=TRIED_MAX => Ok(waiting.into_iter().map(|one| one.address).collect()),
        count => Err(ApiError::rejected(format!("{count} machines wait; say which one"))
            .hint(format!("{list}: tinydc node accept CODE NAME"))),
    }
}

pub async fn accept(backend: &Arc<Backend>, request: Request<Incoming>) -> Result<Reply, ApiError> {
    let wish: AcceptRequest = body::parse(request.into_body()).await?;
    let code = parse_code(&wish.code).ok_or_else(|| {
        ApiError::invalid(format!("{:?} is no code", wish.code)).hint("six digits, as the machine shows them")
    })?;
    let mut last = None;
    let all = match wish.machine.as_deref().and_then(address_in) {
        Some(address) => vec![address],
        None => candidates(hear(backend).await, wish.machine.as_deref())?,
    };
    let is_one = all.len() == 1;
    for address in all.into_iter().take(TRIED_MAX) {
        match admit(backend, &code, address).await {
            Ok((cluster, node)) => {
                let node = await_row(backend, node).await;
                return body::ok(&AcceptReply { node, cluster, address: address.to_string() });
            }
            Err(error) if error.is_wrong_code() => last = last.or(Some(error)),
            Err(error @ CodedError::Refused { .. }) if is_one => return Err(coded_error(error)),
            // What can't be reached may be the one: said if no other has the code.
            Err(error) => last = Some(error),
        }
    }
    Err(last.map_or_else(|| ApiError::rejected("no machine was tried"), coded_error))
}

fn coded_error(error: CodedError) -> ApiError {
    if error.is_wrong_code() {
        return ApiError::new(
            StatusCode::FORBIDDEN,
            "code_wrong",
            "no machine that waits here shows that code",
        )
        .hint("after five wrong tries a machine shows a new one: look at its display, or tinydc join there");
    }
    match error {
        CodedError::Refused { address, refusal } => {
            ApiError::rejected(format!("{address}: {}", refusal.sentence))
        }
        other => ApiError::unavailable(crate::agent::chain(&other))
            .hint("is the machine on, and UDP port 7400 open between it and this node?"),
    }
}

/// Proves the code, then lets the machine join by a token made for it alone.
async fn admit(
    backend: &Arc<Backend>,
    code: &str,
    address: SocketAddr,
) -> Result<(String, NodeId), CodedError> {
    let made = Mutex::new(None);
    let request = async {
        let wish =
            TokenRequest { is_once: true, valid_seconds: Some(TOKEN_SECONDS), ..TokenRequest::default() };
        let token = create_token(backend, wish, None).await;
        let token = token.map_err(|error| Refusal::new(RefusalCode::Other, error.detail.message))?;
        *crate::tasks::lock(&made) = Some(token.id);
        Ok(CodeRequest::Admit { token: token.token })
    };
    let answered = by_code::ask(backend.executor.clone(), address, &Proof::Code(code), request).await;
    let outcome = match answered.map(|answered| answered.reply) {
        Ok(CodeReply::Joined { cluster, node_id }) => return Ok((cluster, NodeId(node_id))),
        Ok(CodeReply::Refused { sentence, hint }) => {
            let sentence = if hint.is_empty() { sentence } else { format!("{sentence}. {hint}") };
            Err(CodedError::Refused { address, refusal: Refusal::new(RefusalCode::Other, sentence) })
        }
        Ok(_) => {
            let refusal = Refusal::new(RefusalCode::Other, "it answered something else than was asked");
            Err(CodedError::Refused { address, refusal })
        }
        Err(error) => Err(error),
    };
    let made = crate::tasks::lock(&made).take();
    if let Some(token) = made.and_then(|id| id.parse().ok())
        && !matches!(outcome, Err(CodedError::Unanswered { .. }))
    {
        // It serves nobody any more, and ends by itself if this fails.
        let _ = backend.submit(None, Command::RemoveToken { token }).await;
    }
    outcome
}

/// The name that the state gave it: two machines may have come with the same.
async fn await_row(backend: &Arc<Backend>, node: NodeId) -> String {
    let begin = Instant::now();
    while !backend.replica.state().nodes.contains(&node) && begin.elapsed() < SEEN_LIMIT {
        async_io::Timer::after(SEEN_LOOK).await;
    }
    backend.replica.state().node_name(node)
}

/// Answers who proved that it knows a code of this node, or holds a key of its configuration.
pub async fn answer_code(backend: Arc<Backend>, asked: CodeAsked) {
    let reply = match (asked.request, asked.grant) {
        (CodeRequest::Enrol, Grant::Person { name, is_viewer }) => {
            let wish = TokenRequest {
                user: Some(name),
                is_viewer,
                is_once: true,
                valid_seconds: Some(TOKEN_SECONDS),
            };
            match peer::within(SEEN_LIMIT, create_token(&backend, wish, None)).await {
                Some(Ok(token)) => CodeReply::Token { text: token.token },
                Some(Err(error)) => CodeReply::Refused {
                    sentence: error.detail.message,
                    hint: error.detail.hint.unwrap_or_default(),
                },
                None => CodeReply::Refused {
                    sentence: "the cluster has no leader now".into(),
                    hint: "try again".into(),
                },
            }
        }
        _ => CodeReply::Refused {
            sentence: "this machine is a member of a cluster already".into(),
            hint: "its code gives a laptop its context: tinydc context create NAME --host ADDR --code CODE"
                .into(),
        },
    };
    if let (CodeReply::Refused { .. }, Some(tried)) = (&reply, asked.tried) {
        // It has served nobody.
        backend.transport.door().show_again(tried);
    }
    // Whoever asked may have gone.
    let _ = asked.reply.send(reply).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(number: u8) -> Waiting {
        Waiting {
            name: format!("pi{number}"),
            address: SocketAddr::from(([10, 0, 0, number], 7400)),
            architecture: "arm64".into(),
            key_hash: [number; 16],
            waits_s: 0,
            would_found: None,
        }
    }

    #[test]
    fn a_machine_is_named_or_is_one_of_few() {
        let check = |count: u8, machine: Option<&str>, expected: Result<&[&str], &str>| {
            let found = candidates((1..=count).map(waiting).collect(), machine);
            let found = found.map(|all| all.iter().map(SocketAddr::to_string).collect::<Vec<_>>());
            let found = found.map_err(|error| error.detail.message);
            match expected {
                Ok(addresses) => assert_eq!(found.unwrap(), addresses),
                Err(part) => assert!(found.as_ref().unwrap_err().contains(part), "{found:?}"),
            }
        };
        check(2, None, Ok(&["10.0.0.1:7400", "10.0.0.2:7400"]));
        check(5, Some("pi5"), Ok(&["10.0.0.5:7400"]));
        check(0, None, Err("no machine"));
        check(5, None, Err("5 machines wait"));
        check(1, Some("pi9"), Err("pi9"));
    }

    #[test]
    fn a_machine_on_another_network_is_named_by_its_address() {
        let read = |text: &str| address_in(text).map(|address| address.to_string());
        assert_eq!(read("10.9.9.9").as_deref(), Some("10.9.9.9:7400"));
        assert_eq!(read("10.9.9.9:7500").as_deref(), Some("10.9.9.9:7500"));
        assert_eq!(read("fd00::1").as_deref(), Some("[fd00::1]:7400"));
        assert_eq!(read("pi1"), None);
    }
}
