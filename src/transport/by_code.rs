//! Asking a machine for something by the six-digit code that it shows, or by an operator's key.
//!
//! Address + proof + request → reply. Both sides prove that they know the code, or the asker that it holds the key,
//! bound to this very TLS session, before a request is sent. TLS itself trusts any certificate here: who sits between
//! the two ends is found by the proof (`pake`). What a right code is good for is the other machine's decision.
//!
//! Invariant: no request leaves before both words hold
//! (`tests::coded::a_man_in_the_middle_is_refused_by_both_sides`).

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_executor::Executor;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig};
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use serde::{Deserialize, Serialize};

use super::executor::{TaskGroup, within};
use super::frames::{self, FrameError};
use super::hello::{CLOSE_DONE, Refusal, RefusalCode};
use super::identity::NodeKey;
use super::ids::PublicKey;
use super::join::{AttemptError, client_endpoint, connect};
use super::pake::{Exchange, Proved, Side};
use super::peers::transport_parameters;
use super::tls::{self, TlsError};

pub const CODED_BYTES_MAX: usize = 4096;
pub(super) const STEP_LIMIT: Duration = Duration::from_secs(3);
/// The answer waits for a whole join: dialling, a commit and a signature.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_secs(30);
const EXPORTER_LABEL: &[u8] = b"EXPORTER-tinydc-code";
const CLOSE_LIMIT: Duration = Duration::from_millis(300);

/// The asker's first frame. Append variants, never change them.
#[derive(Serialize, Deserialize)]
pub(super) enum Opening {
    Code { message: Vec<u8> },
    Key { key: PublicKey, proof: Vec<u8> },
}

/// The answer to `Opening::Code`; then the words, the asker's first.
#[derive(Serialize, Deserialize)]
pub(super) struct Answering {
    pub message: Vec<u8>,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Word(pub Vec<u8>);

/// Append variants, never change them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CodeRequest {
    /// To a machine without a cluster: join by this token.
    Admit { token: String },
    /// To a machine without a cluster: found one. The asker then gets its own access by the secret of both.
    Found { name: Option<String>, container_range: Option<String>, vip_range: Option<String>, person: String },
    /// To a member: a token that makes a laptop's context.
    Enrol,
}

/// Append variants, never change them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CodeReply {
    Joined { cluster: String, node_id: u64 },
    Founded { cluster: String, node: String, recovery_key: String },
    Token { text: String },
    Refused { sentence: String, hint: String },
}

pub enum Proof<'a> {
    Code(&'a str),
    Key(&'a NodeKey),
}

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answered {
    pub reply: CodeReply,
    /// Known to both ends only; none where a key was the proof.
    pub secret: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum CodedError {
    #[error("set up TLS")]
    Tls(#[from] TlsError),
    #[error("set up QUIC's encryption")]
    Quic(#[from] NoInitialCipherSuite),
    #[error("open a UDP socket")]
    Socket(#[source] io::Error),
    #[error(transparent)]
    Attempt(AttemptError),
    #[error("{address} speaks to nobody by a code, or is not tinydc")]
    Handshake {
        address: SocketAddr,
        #[source]
        source: ConnectionError,
    },
    #[error("talk to {address}")]
    Talk {
        address: SocketAddr,
        #[source]
        source: FrameError,
    },
    #[error("{address} doesn't know the code: it is another machine, or one that sits in between")]
    Impostor { address: SocketAddr },
    #[error("{refusal}")]
    Refused { address: SocketAddr, refusal: Refusal },
    #[error("{address} was asked, but no answer came")]
    Unanswered {
        address: SocketAddr,
        #[source]
        source: FrameError,
    },
}

impl CodedError {
    /// Whether the code was wrong there; it may be another machine's.
    pub fn is_wrong_code(&self) -> bool {
        match self {
            CodedError::Refused { refusal, .. } => refusal.code == RefusalCode::CodeWrong,
            CodedError::Impostor { .. } => true,
            _ => false,
        }
    }
}

/// What both ends of one session know.
pub(super) fn exported(connection: &Connection) -> Option<[u8; 32]> {
    let mut exported = [0; 32];
    connection.export_keying_material(&mut exported, EXPORTER_LABEL, b"").ok()?;
    Some(exported)
}

/// What an operator's key signs: nothing that OpenSSH would ever sign.
pub(super) fn key_message(exported: &[u8; 32]) -> Vec<u8> {
    [b"tinydc operator proof 1 ".as_slice(), exported].concat()
}

/// `request` is made only once the proof holds; its refusal is returned as such.
pub async fn ask(
    executor: Arc<Executor<'static>>,
    address: SocketAddr,
    proof: &Proof<'_>,
    request: impl Future<Output = Result<CodeRequest, Refusal>>,
) -> Result<Answered, CodedError> {
    let tasks = TaskGroup::new(executor);
    let answered = ask_with(&tasks, address, proof, request).await;
    tasks.stop().await;
    answered
}

async fn ask_with(
    tasks: &Arc<TaskGroup>,
    address: SocketAddr,
    proof: &Proof<'_>,
    request: impl Future<Output = Result<CodeRequest, Refusal>>,
) -> Result<Answered, CodedError> {
    let config = tls::code_client_config()?;
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config)?));
    config.transport_config(transport_parameters());
    let endpoint = client_endpoint(tasks, address).map_err(CodedError::Socket)?;
    let connection = connect(&endpoint, &config, address).await.map_err(|error| match error {
        // There is no token whose cluster it could be.
        AttemptError::Handshake { address, source } => CodedError::Handshake { address, source },
        other => CodedError::Attempt(other),
    })?;
    let answered = match converse(&connection, proof, request).await {
        Err(error @ (CodedError::Talk { .. } | CodedError::Unanswered { .. })) => {
            let refusal = Refusal::told(&connection).await;
            Err(refusal.map_or(error, |refusal| CodedError::Refused { address, refusal }))
        }
        answered => answered,
    };
    connection.close(CLOSE_DONE, b"");
    within(CLOSE_LIMIT, endpoint.wait_idle()).await;
    answered
}

/// The streams of a conversation whose proof holds.
struct Open {
    send: SendStream,
    receive: RecvStream,
    proved: Option<Proved>,
}

async fn converse(
    connection: &Connection,
    proof: &Proof<'_>,
    request: impl Future<Output = Result<CodeRequest, Refusal>>,
) -> Result<Answered, CodedError> {
    let address = connection.remote_address();
    let mut open = prove(connection, proof).await?;
    let request = request.await.map_err(|refusal| CodedError::Refused { address, refusal })?;
    let told = |source: FrameError| CodedError::Unanswered { address, source };
    frames::write_value(&mut open.send, &request, CODED_BYTES_MAX, STEP_LIMIT).await.map_err(told)?;
    let reply = frames::read_value(&mut open.receive, CODED_BYTES_MAX, ANSWER_LIMIT + STEP_LIMIT).await;
    let secret = open.proved.map(|proved| proved.secret());
    Ok(Answered { reply: reply.map_err(told)?, secret })
}

async fn prove(connection: &Connection, proof: &Proof<'_>) -> Result<Open, CodedError> {
    let address = connection.remote_address();
    let failed = |source: FrameError| CodedError::Talk { address, source };
    let limit = STEP_LIMIT;
    let (mut send, mut receive) = within(limit, connection.open_bi())
        .await
        .ok_or(CodedError::Attempt(AttemptError::Timeout { address }))?
        .map_err(|error| failed(FrameError::Write(error.into())))?;
    let session = exported(connection).ok_or(CodedError::Impostor { address })?;
    match proof {
        Proof::Key(key) => {
            let opening = Opening::Key { key: key.public_key(), proof: key.sign(&key_message(&session)) };
            frames::write_value(&mut send, &opening, CODED_BYTES_MAX, limit).await.map_err(failed)?;
            Ok(Open { send, receive, proved: None })
        }
        Proof::Code(code) => {
            let (exchange, message) = Exchange::start(Side::Client, code, &session);
            let opening = Opening::Code { message };
            frames::write_value(&mut send, &opening, CODED_BYTES_MAX, limit).await.map_err(failed)?;
            let theirs: Answering =
                frames::read_value(&mut receive, CODED_BYTES_MAX, limit).await.map_err(failed)?;
            let proved = exchange.finish(&theirs.message).ok_or(CodedError::Impostor { address })?;
            let word = Word(proved.own_word());
            frames::write_value(&mut send, &word, CODED_BYTES_MAX, limit).await.map_err(failed)?;
            let word: Word =
                frames::read_value(&mut receive, CODED_BYTES_MAX, limit).await.map_err(failed)?;
            match proved.is_their_word(&word.0) {
                true => Ok(Open { send, receive, proved: Some(proved) }),
                false => Err(CodedError::Impostor { address }),
            }
        }
    }
}
