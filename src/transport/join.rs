//! Joining: what a stranger with a token says, and what it is told.
//!
//! Token + key → membership or a refusal. The client compares the CA's hash during the handshake, before it sends
//! anything; the request is signed over this very TLS session, so a recording of it is worth nothing. The same door
//! gives operators their certificates. Who is let in is the node layer's decision.
//!
//! Invariant: nothing is sent to a server whose CA is not the token's (`tests::joining::a_joiner_tells_a_foreign_cluster_nothing`).

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use async_channel::Sender;
use async_executor::Executor;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig};
use quinn::{Connection, ConnectionError, EndpointConfig};
use serde::{Deserialize, Serialize};

use super::authority::NODE_NAME;
use super::executor::{QuicRuntime, TaskGroup, within};
use super::frames::{self, FrameError};
use super::hello::{CLOSE_DONE, Refusal, RefusalCode};
use super::identity::NodeKey;
use super::ids::{ClusterId, NodeId, PublicKey, StoreId};
use super::peers::transport_parameters;
use super::tls::{self, TlsError};
use super::token::{Token, TokenId, TokenSecret};
use crate::model::LocalNetwork;

pub const JOIN_BYTES_MAX: usize = 4096;
pub(super) const JOIN_STEP_LIMIT: Duration = Duration::from_secs(3);
/// The answer waits for a commit and a signature.
pub(super) const JOIN_ANSWER_LIMIT: Duration = Duration::from_secs(15);
const EXPORTER_LABEL: &[u8] = b"EXPORTER-tinydc-join";
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
const CLOSE_LIMIT: Duration = Duration::from_millis(300);

/// What a node says of itself when it joins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeFacts {
    pub name: String,
    /// As in OCI: `arm64`, `amd64`.
    pub architecture: String,
    pub cpu_millis: u32,
    pub memory_bytes: u64,
    pub store_id: StoreId,
    /// `--replace NAME`: take a dead member's place.
    pub replace: Option<String>,
    /// The cluster's ranges must not be among them.
    pub networks: Vec<LocalNetwork>,
}

/// Append variants, never change them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinSubject {
    Node(NodeFacts),
    /// A laptop's context; the token says which name and role.
    Person {
        device: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinRequest {
    pub token_id: TokenId,
    pub secret: TokenSecret,
    pub public_key: PublicKey,
    pub subject: JoinSubject,
}

/// The request as it travels, with the proof that the sender holds the key.
#[derive(Serialize, Deserialize)]
pub(super) struct SignedRequest {
    pub request: JoinRequest,
    pub proof: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberAddresses {
    pub public_key: PublicKey,
    pub addresses: Vec<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    pub node_id: NodeId,
    /// DER.
    pub certificate: Vec<u8>,
    pub authority: Vec<u8>,
    pub cluster_id: ClusterId,
    pub cluster_name: String,
    /// As many as fit; enough to connect, the state brings the rest.
    pub members: BTreeMap<NodeId, MemberAddresses>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    /// DER.
    pub certificate: Vec<u8>,
    pub authority: Vec<u8>,
    pub cluster_id: ClusterId,
    pub cluster_name: String,
    /// Of the HTTPS API, of every node.
    pub addresses: Vec<SocketAddr>,
}

/// Append variants, never change them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinReply {
    Joined(Joined),
    Enrolled(Enrolled),
    Refused { refusal: Refusal, hint: String },
}

/// A request whose proof holds, for the node layer.
pub struct JoinAsked {
    pub request: JoinRequest,
    pub address: SocketAddr,
    /// Takes one reply, within 15 s.
    pub reply: Sender<JoinReply>,
}

#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("set up TLS")]
    Tls(#[from] TlsError),
    #[error("set up QUIC's encryption")]
    Quic(#[from] NoInitialCipherSuite),
    #[error("open a UDP socket")]
    Socket(#[source] io::Error),
    #[error("the token names no address")]
    NoAddress,
    #[error("no node of the token answers; tried {addresses}")]
    Unreachable {
        addresses: String,
        #[source]
        source: Box<AttemptError>,
    },
    #[error("{refusal}")]
    Refused { refusal: Refusal, hint: String },
    #[error("{address} was asked, but no answer came: joining again with the same line is safe")]
    Unanswered {
        address: SocketAddr,
        #[source]
        source: Box<AttemptError>,
    },
}

#[derive(Debug, thiserror::Error)]
pub enum AttemptError {
    #[error("dial {address}")]
    Dial {
        address: SocketAddr,
        #[source]
        source: quinn::ConnectError,
    },
    #[error("{address} doesn't answer")]
    Timeout { address: SocketAddr },
    #[error("{address} is not of the token's cluster, or not tinydc")]
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
    #[error("sign the request for {address}")]
    Proof { address: SocketAddr },
    #[error("{address} refused: {refusal}")]
    Closed { address: SocketAddr, refusal: Refusal },
}

/// What both sides sign and check: bound to one TLS session.
pub(super) fn proof_message(connection: &Connection) -> Option<Vec<u8>> {
    let mut exported = [0; 32];
    connection.export_keying_material(&mut exported, EXPORTER_LABEL, b"").ok()?;
    Some([b"tinydc join proof 1 ".as_slice(), &exported].concat())
}

/// Tries the token's addresses in turn; the first node that answers decides.
pub async fn join(
    executor: Arc<Executor<'static>>,
    token: &Token,
    key: &NodeKey,
    subject: JoinSubject,
) -> Result<JoinReply, JoinError> {
    let tasks = TaskGroup::new(executor);
    let reply = join_with(&tasks, token, key, subject).await;
    tasks.stop().await;
    reply
}

async fn join_with(
    tasks: &Arc<TaskGroup>,
    token: &Token,
    key: &NodeKey,
    subject: JoinSubject,
) -> Result<JoinReply, JoinError> {
    let config = tls::join_client_config(token.authority)?;
    let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config)?));
    config.transport_config(transport_parameters());
    let request = JoinRequest {
        token_id: token.id,
        secret: token.secret.clone(),
        public_key: key.public_key(),
        subject,
    };
    let mut failed = None;
    for address in &token.addresses {
        let endpoint = client_endpoint(tasks, *address).map_err(JoinError::Socket)?;
        let asked = ask(&endpoint, &config, *address, key, &request).await;
        within(CLOSE_LIMIT, endpoint.wait_idle()).await;
        match asked {
            Ok(JoinReply::Refused { refusal, hint }) => return Err(JoinError::Refused { refusal, hint }),
            Ok(reply) => return Ok(reply),
            Err((true, source)) => {
                return Err(JoinError::Unanswered { address: *address, source: Box::new(source) });
            }
            Err((false, AttemptError::Closed { refusal, .. })) if is_final(&refusal) => {
                return Err(JoinError::Refused { refusal, hint: String::new() });
            }
            Err((false, error)) => failed = Some(error),
        }
    }
    let source = Box::new(failed.ok_or(JoinError::NoAddress)?);
    let addresses: Vec<String> = token.addresses.iter().map(SocketAddr::to_string).collect();
    Err(JoinError::Unreachable { addresses: addresses.join(", "), source })
}

/// Another node would say the same.
fn is_final(refusal: &Refusal) -> bool {
    !matches!(refusal.code, RefusalCode::Busy | RefusalCode::Internal)
}

pub(super) fn client_endpoint(tasks: &Arc<TaskGroup>, towards: SocketAddr) -> io::Result<quinn::Endpoint> {
    let any: SocketAddr = match towards {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    quinn::Endpoint::new(EndpointConfig::default(), None, socket, Arc::new(QuicRuntime(tasks.clone())))
}

/// For a conversation with a stranger, by a token or a code.
pub(super) async fn connect(
    endpoint: &quinn::Endpoint,
    config: &quinn::ClientConfig,
    address: SocketAddr,
) -> Result<Connection, AttemptError> {
    let connecting = endpoint
        .connect_with(config.clone(), address, NODE_NAME)
        .map_err(|source| AttemptError::Dial { address, source })?;
    within(CONNECT_LIMIT, connecting)
        .await
        .ok_or(AttemptError::Timeout { address })?
        .map_err(|source| AttemptError::Handshake { address, source })
}

/// The flag of an error says whether the request may have arrived.
async fn ask(
    endpoint: &quinn::Endpoint,
    config: &quinn::ClientConfig,
    address: SocketAddr,
    key: &NodeKey,
    request: &JoinRequest,
) -> Result<JoinReply, (bool, AttemptError)> {
    let connection = connect(endpoint, config, address).await.map_err(|error| (false, error))?;
    let message = proof_message(&connection).ok_or((false, AttemptError::Proof { address }))?;
    let signed = SignedRequest { request: request.clone(), proof: key.sign(&message) };
    let answered = match converse(&connection, &signed).await {
        Ok(reply) => Ok(reply),
        // Before this end closes: then its own word would be the reason.
        Err(error) => match Refusal::told(&connection).await {
            Some(refusal) => Err((false, AttemptError::Closed { address, refusal })),
            None => Err((true, AttemptError::Talk { address, source: error })),
        },
    };
    connection.close(CLOSE_DONE, b"");
    answered
}

pub(super) async fn converse(
    connection: &Connection,
    signed: &SignedRequest,
) -> Result<JoinReply, FrameError> {
    let limit = JOIN_STEP_LIMIT;
    let (mut send, mut receive) = within(limit, connection.open_bi())
        .await
        .ok_or(FrameError::Timeout { limit })?
        .map_err(|error| FrameError::Write(error.into()))?;
    frames::write_value(&mut send, signed, JOIN_BYTES_MAX, limit).await?;
    frames::read_value(&mut receive, JOIN_BYTES_MAX, JOIN_ANSWER_LIMIT + limit).await
}

/// A reply that fits a frame: members are left out from the end, then spare addresses.
pub(super) fn fitting(mut reply: JoinReply) -> JoinReply {
    let fits =
        |reply: &JoinReply| postcard::to_allocvec(reply).is_ok_and(|encoded| encoded.len() <= JOIN_BYTES_MAX);
    while !fits(&reply) {
        let is_shorter = match &mut reply {
            JoinReply::Joined(joined) => joined.members.pop_last().is_some(),
            JoinReply::Enrolled(enrolled) => enrolled.addresses.pop().is_some(),
            JoinReply::Refused { refusal, hint } => {
                let is_shorter = !hint.is_empty() || refusal.sentence.len() > 500;
                hint.clear();
                refusal.sentence = refusal.sentence.chars().take(500).collect();
                is_shorter
            }
        };
        if !is_shorter {
            let refusal = Refusal::new(RefusalCode::Internal, "the reply doesn't fit a frame");
            return JoinReply::Refused { refusal, hint: String::new() };
        }
    }
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_of_a_large_cluster_still_fits() {
        let member = MemberAddresses {
            public_key: PublicKey([1; 32]),
            addresses: vec![([10, 0, 0, 1], 7400).into(); 6],
        };
        let joined = Joined {
            node_id: NodeId(1),
            certificate: vec![0; 400],
            authority: vec![0; 400],
            cluster_id: ClusterId(1),
            cluster_name: "home".into(),
            members: (0..200).map(|node| (NodeId(node), member.clone())).collect(),
        };
        let JoinReply::Joined(fitted) = fitting(JoinReply::Joined(joined)) else { panic!("joined") };
        assert!(fitted.members.len() > 30, "{}", fitted.members.len());
        assert!(postcard::to_allocvec(&JoinReply::Joined(fitted)).unwrap().len() <= JOIN_BYTES_MAX);
    }
}
