//! The server's side of asking by code: one conversation of a stranger, from its proof to the reply.
//!
//! A connection → at most one `CodeAsked`, or a refusal. The stranger proves first, and a wrong word is counted before
//! ours would be said, so that one conversation tells about one guess. Where no code is shown the exchange runs with a
//! random one: a stranger can't see whether there is any. Frames ≤ 4 KiB, 3 s a step, 8 at once, 5 broken ones a minute.
//!
//! Invariant: nothing is asked of the node layer before the proof holds
//! (`tests::coded::a_wrong_code_reaches_nobody_and_five_make_a_new_one`).

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_channel::Sender;
use quinn::{Connection, RecvStream, SendStream};
use tracing::{debug, error, info, warn};

use super::by_code::{
    ANSWER_LIMIT, Answering, CODED_BYTES_MAX, CodeReply, CodeRequest, Opening, STEP_LIMIT, Word, exported,
    key_message,
};
use super::codes::{Codes, Grant, Lasting, Settled, Shown, make_code};
use super::executor::{lock, within};
use super::frames::{self, FrameError};
use super::hello::{CLOSE_DONE, Refusal, RefusalCode};
use super::join_limit::{JoinLimit, JoinOutcome};
use super::operators::OperatorKey;
use super::pake::{Exchange, Proved, Side};
use super::serve::{finish, remote_address};
use super::table::malformed;

/// For what the asker sends after its proof: the limit of a write in its cluster, and of a step.
const REQUEST_LIMIT: Duration = Duration::from_secs(8);

/// A request whose proof holds, for the node layer.
pub struct CodeAsked {
    pub request: CodeRequest,
    pub grant: Grant,
    pub address: SocketAddr,
    /// What only the two ends know, where a code was the proof.
    pub secret: Option<String>,
    /// The code that served; shown again if the node layer says so.
    pub tried: Option<Shown>,
    /// Takes one reply, within 30 s.
    pub reply: Sender<CodeReply>,
}

/// Hands a request on; `false` while nobody takes it.
pub type Take = Box<dyn Fn(CodeAsked) -> bool + Send + Sync>;

pub struct Door {
    codes: Mutex<Codes>,
    limit: Mutex<JoinLimit>,
    operators: Vec<OperatorKey>,
    take: Take,
    started: Instant,
}

impl Door {
    pub fn new(operators: Vec<OperatorKey>, take: Take) -> Arc<Door> {
        Arc::new(Door {
            codes: Mutex::default(),
            limit: Mutex::default(),
            operators,
            take,
            started: Instant::now(),
        })
    }

    /// Shows this code instead of the one before.
    pub fn show(&self, shown: Shown) {
        lock(&self.codes).show(shown);
    }

    /// Shows a code again that has served nobody, unless there is another by now.
    pub fn show_again(&self, shown: Shown) {
        lock(&self.codes).show_again(shown, Instant::now());
    }

    /// What a display shows now.
    pub fn displayed(&self) -> Option<Shown> {
        lock(&self.codes).displayed(Instant::now()).cloned()
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// Leaves the limit when it is dropped, also if the task is stopped midway.
struct Entered<'a> {
    door: &'a Door,
    address: std::net::IpAddr,
    outcome: JoinOutcome,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let now_ms = self.door.now_ms();
        lock(&self.door.limit).leave(self.address, self.outcome, now_ms);
    }
}

pub(super) async fn serve(door: &Door, connection: Connection) {
    let address = remote_address(&connection);
    if let Err(refusal) = lock(&door.limit).enter(address.ip(), door.now_ms()) {
        debug!(%address, reason = %refusal, "turned away");
        return refusal.close(&connection);
    }
    let mut entered = Entered { door, address: address.ip(), outcome: JoinOutcome::Failed };
    match answer(door, &connection).await {
        Ok(()) => {
            entered.outcome = JoinOutcome::Accepted;
            // The asker closes once it has read the reply.
            within(STEP_LIMIT, connection.closed()).await;
            connection.close(CLOSE_DONE, b"");
        }
        Err(refusal) => {
            // Wrong codes have their own count, which no other address escapes.
            if refusal.code != RefusalCode::Malformed {
                entered.outcome = JoinOutcome::Refused;
            }
            info!(%address, reason = %refusal, "refused by code");
            refusal.close(&connection);
        }
    }
}

fn broken(error: FrameError) -> Refusal {
    malformed(&error).unwrap_or_else(broke_off)
}

fn broke_off() -> Refusal {
    Refusal::new(RefusalCode::Malformed, "the conversation broke off")
}

fn wrong_code() -> Refusal {
    Refusal::new(RefusalCode::CodeWrong, "the code is wrong, or this machine doesn't show it any more")
}

/// What a proof gave.
struct Entrance {
    grant: Grant,
    proved: Option<Proved>,
    tried: Option<Shown>,
}

async fn answer(door: &Door, connection: &Connection) -> Result<(), Refusal> {
    let (mut send, mut receive) =
        within(STEP_LIMIT, connection.accept_bi()).await.ok_or_else(broke_off)?.map_err(|_| broke_off())?;
    let session = exported(connection).ok_or_else(broke_off)?;
    let opening: Opening =
        frames::read_value(&mut receive, CODED_BYTES_MAX, STEP_LIMIT).await.map_err(broken)?;
    let entrance = match opening {
        Opening::Key { key, proof } => {
            let listed = door.operators.iter().find(|operator| operator.key == key);
            let held = listed.filter(|_| key.verifies(&key_message(&session), &proof));
            let name = held.map(|operator| operator.name.clone()).ok_or_else(|| {
                Refusal::new(RefusalCode::KeyUnknown, "this node's configuration doesn't name that key")
            })?;
            Entrance { grant: Grant::Person { name, is_viewer: false }, proved: None, tried: None }
        }
        Opening::Code { message } => {
            let address = remote_address(connection);
            prove(door, address, &session, &message, (&mut send, &mut receive)).await?
        }
    };
    // A member makes the token that it sends only now, and that is a write of its cluster.
    let request = frames::read_value(&mut receive, CODED_BYTES_MAX, REQUEST_LIMIT).await.map_err(broken)?;
    let (reply, replied) = async_channel::bounded(1);
    let asked = CodeAsked {
        request,
        grant: entrance.grant,
        address: remote_address(connection),
        secret: entrance.proved.map(|proved| proved.secret()),
        tried: entrance.tried,
        reply,
    };
    if !(door.take)(asked) {
        return Err(Refusal::new(RefusalCode::Busy, "this machine is busy; try again in a few seconds"));
    }
    let late = || Refusal::new(RefusalCode::Internal, "no answer in time; see on a member: tinydc node ls");
    let reply: CodeReply =
        within(ANSWER_LIMIT, replied.recv()).await.ok_or_else(late)?.map_err(|_| late())?;
    frames::write_value(&mut send, &reply, CODED_BYTES_MAX, STEP_LIMIT).await.map_err(broken)?;
    finish(&mut send).await;
    Ok(())
}

async fn prove(
    door: &Door,
    address: SocketAddr,
    session: &[u8; 32],
    theirs: &[u8],
    (send, receive): (&mut SendStream, &mut RecvStream),
) -> Result<Entrance, Refusal> {
    let no_random = |_| Refusal::new(RefusalCode::Internal, "this machine has no random numbers");
    let tried = lock(&door.codes).open(Instant::now())?;
    let code = match &tried {
        Some(shown) => shown.code.clone(),
        None => make_code().map_err(no_random)?,
    };
    let (exchange, message) = Exchange::start(Side::Server, &code, session);
    let proved = exchange.finish(theirs).ok_or_else(broke_off)?;
    frames::write_value(send, &Answering { message }, CODED_BYTES_MAX, STEP_LIMIT).await.map_err(broken)?;
    let word: Word = frames::read_value(receive, CODED_BYTES_MAX, STEP_LIMIT).await.map_err(broken)?;
    let is_right = proved.is_their_word(&word.0);
    let tried = tried.ok_or_else(wrong_code)?;
    let settled = lock(&door.codes).settle(&tried, is_right, Instant::now()).map_err(no_random)?;
    let grant = match settled {
        Settled::Right(grant) => grant,
        Settled::Wrong { left } => {
            warn!(%address, left, "a wrong code was tried");
            return Err(wrong_code());
        }
        Settled::Ended { next } => {
            tell_end(address, &tried, next.as_deref());
            return Err(wrong_code());
        }
    };
    let word = Word(proved.own_word());
    frames::write_value(send, &word, CODED_BYTES_MAX, STEP_LIMIT).await.map_err(broken)?;
    Ok(Entrance { grant, proved: Some(proved), tried: Some(tried) })
}

/// Somebody guesses, or mistypes a lot.
fn tell_end(address: SocketAddr, tried: &Shown, next: Option<&str>) {
    match (next, tried.lasting) {
        (Some(code), _) => {
            error!(%address, code, "five wrong codes were tried: this machine shows a new one")
        }
        (None, Lasting::Hidden) => warn!(%address, "the secret of the founder was not met"),
        (None, _) => {
            error!(%address, "five wrong codes were tried: the code is void; make another: tinydc token --code")
        }
    }
}
