//! What a log entry can say, and what comes of it.
//!
//! Encoded with postcard behind one format byte. Variants are appended and fields never change: golden bytes of
//! each are kept by `tests::golden`.

use super::rows::{Cluster, IssuedCertificate, Role, TokenKind};
use crate::model::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

/// The format byte before each encoded envelope.
pub const ENVELOPE_FORMAT: u8 = 1;

/// A command on its way through the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Envelope {
    /// Cluster time by the leader that proposed it.
    pub stamp: Timestamp,
    pub origin: Origin,
    /// Set on what a client asked for, so that a retry is told from a second wish.
    pub request: Option<RequestMark>,
    pub command: Command,
}

/// Who waits for the outcome: one proposal of one run of one leader.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Origin {
    pub node: NodeId,
    pub start_id: StartId,
    pub counter: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestMark {
    pub id: RequestId,
    /// Of what was asked, so that an id reused for something else is refused.
    pub body_hash: u64,
    /// The applied index the client saw when it made the id: older than what is remembered means unknown.
    pub created_index: u64,
}

#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    #[error("an entry of format {0}; this tinydc knows {ENVELOPE_FORMAT}")]
    UnknownFormat(u8),
    #[error("decode an entry")]
    Decode(#[from] postcard::Error),
}

impl Envelope {
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_extend(self, vec![ENVELOPE_FORMAT]).expect("plain data in memory always encodes")
    }

    pub fn decode(bytes: &[u8]) -> Result<Envelope, EnvelopeError> {
        match bytes.split_first() {
            Some((&ENVELOPE_FORMAT, rest)) => Ok(postcard::from_bytes(rest)?),
            first => Err(EnvelopeError::UnknownFormat(first.map_or(0, |(format, _)| *format))),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// The first entry of a cluster: what it is, and its first node.
    Found {
        cluster: Box<Cluster>,
        node: Box<JoinNode>,
    },
    JoinNode {
        token: TokenId,
        secret_hash: [u8; 32],
        node: Box<JoinNode>,
        replace: Option<String>,
    },
    RemoveNode {
        node: NodeId,
        is_forced: bool,
    },
    /// A daemon's first word after its start.
    NodeStarted {
        node: NodeId,
        start_id: StartId,
        architecture: Architecture,
        size: NodeSize,
        software: String,
    },
    /// A daemon's last word before a clean stop.
    NodeStopping {
        node: NodeId,
        start_id: StartId,
    },
    MarkNodeDown {
        node: NodeId,
        start_id: Option<StartId>,
    },
    MarkNodeUp {
        node: NodeId,
        start_id: StartId,
    },
    /// The cluster key is on this node's disk (or, `false`, has been deleted there).
    ConfirmKey {
        node: NodeId,
        has_key: bool,
    },
    DrainNode {
        node: NodeId,
        is_drained: bool,
    },
    LabelNode {
        node: NodeId,
        set: BTreeMap<String, String>,
        remove: Vec<String>,
    },
    CreateToken {
        secret_hash: [u8; 32],
        kind: TokenKind,
        expires_at: Timestamp,
    },
    RemoveToken {
        token: TokenId,
    },
    EnrolUser {
        token: TokenId,
        secret_hash: [u8; 32],
        public_key: PublicKey,
        expires_at: Timestamp,
    },
    RemoveUser {
        name: String,
    },
    ChangeSetting {
        key: String,
        value: String,
    },
    DeployApp {
        spec: Box<AppSpec>,
        artifacts: Vec<Artifact>,
    },
    RemoveApp {
        app: AppName,
        with_volumes: bool,
    },
    ScaleServices {
        app: AppName,
        replicas: BTreeMap<String, u32>,
    },
    RegisterArtifact {
        artifact: Box<Artifact>,
    },
    RemoveArtifact {
        digest: Digest,
    },
    Plan {
        steps: Vec<PlanStep>,
    },
    Report {
        node: NodeId,
        start_id: StartId,
        report: NodeReport,
    },
    /// Ends a `RemoveNode` once the node has no vote.
    ForgetNode {
        node: NodeId,
    },
    AddAddress {
        address: Ipv4Addr,
    },
    RemoveAddress {
        address: Ipv4Addr,
    },
    /// A floating address goes to another node; void unless it is still at this epoch.
    AssignAddress {
        address: Ipv4Addr,
        epoch: u64,
        to: NodeId,
    },
    /// Sealed by the node that was asked; nobody opens it here.
    PutSecret {
        name: SecretName,
        sealed: Vec<u8>,
        fingerprint: [u8; 32],
        bytes: u32,
    },
    RemoveSecret {
        name: SecretName,
    },
    PutServingAuthority {
        certificate: Vec<u8>,
        sealed_key: Vec<u8>,
    },
    PutCertificate {
        host: String,
        issued: Box<IssuedCertificate>,
    },
    NoteCertificateTrouble {
        host: String,
        text: String,
        pause_ms: u64,
    },
    ForgetCertificate {
        host: String,
    },
    PutAcmeAccount {
        directory: String,
        sealed_key: Vec<u8>,
    },
    PutChallenges {
        answers: BTreeMap<String, String>,
    },
    RemoveChallenges {
        tokens: Vec<String>,
    },
    /// What a node has told of its machine for a while.
    NoteTroubles {
        node: NodeId,
        troubles: Troubles,
    },
    /// The disks that a node's configuration names, in this run of its daemon.
    NoteDisks {
        node: NodeId,
        start_id: StartId,
        disks: Vec<NodeDisk>,
    },
    /// Which of them this run of its daemon has missed for a while.
    NoteAbsentDisks {
        node: NodeId,
        start_id: StartId,
        absent: DiskSet,
    },
    /// Its machine is about to be switched off or restarted, and stops its containers first.
    NodeEnding {
        node: NodeId,
        start_id: StartId,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JoinNode {
    pub public_key: PublicKey,
    pub certificate: Vec<u8>,
    pub store_id: StoreId,
    pub name: String,
    pub architecture: Architecture,
    pub size: NodeSize,
    pub software: String,
}

/// One thing the planner wants; void when a row it relied on has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PlanStep {
    CreateInstance {
        service: ServiceId,
        service_version: u64,
        slot: u32,
        spec_version: u64,
    },
    Assign {
        instance: InstanceId,
        instance_version: u64,
        node: NodeId,
        node_version: u64,
    },
    SetDesired {
        instance: InstanceId,
        instance_version: u64,
        desired: Desired,
    },
    /// The row goes: its node is gone for good or never had it.
    Forget {
        instance: InstanceId,
        instance_version: u64,
    },
    FinishUpdate {
        service: ServiceId,
        service_version: u64,
    },
    FailUpdate {
        service: ServiceId,
        service_version: u64,
        slot: u32,
        reason: String,
    },
}

/// What an agent says of its own node, coalesced.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeReport {
    pub instances: Vec<InstanceReport>,
    /// Artifacts that now lie here in full.
    pub holds: Vec<Digest>,
    /// Artifacts that no longer do.
    pub dropped: Vec<Digest>,
    /// Volumes deleted as asked: app and name.
    pub volumes_deleted: Vec<(AppName, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceReport {
    pub instance: InstanceId,
    /// Of this daemon's run; grows.
    pub seq: u64,
    pub phase: Phase,
    pub exit: Option<Exit>,
    /// It was asked to be removed and nothing of it is left here.
    pub is_gone: bool,
}

pub type Outcome = Result<Reply, Rejection>;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    Done,
    Joined { node: NodeId, name: String, certificate: Vec<u8> },
    TokenCreated { token: TokenId },
    Enrolled { name: String, role: Role },
    Deployed { revision: u64, changed: Vec<String>, removed: Vec<String> },
    Removed { volumes: Vec<KeptVolume> },
}

/// A volume that `rm` left, and where its data is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptVolume {
    pub name: String,
    pub node: Option<String>,
}

/// A refusal on which all nodes agree: a value, not a failure.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Rejection {
    #[error("this cluster is founded already")]
    AlreadyFounded,
    #[error("the cluster is not founded yet")]
    NotFounded,
    #[error("this token is not valid: wrong, or removed with `tinydc token rm`")]
    TokenUnknown,
    #[error("this token expired at {at}")]
    TokenExpired { at: Timestamp },
    #[error("this token served once and has been used by another key")]
    TokenReplayed,
    #[error("this token is for {expected}")]
    TokenKind { expected: String },
    #[error("the cluster has {0} nodes, which is the most it can have")]
    TooManyNodes(usize),
    #[error("no {what} is called {name}")]
    NotFound { what: String, name: String },
    #[error("{0}")]
    NotAllowed(String),
    #[error("port {port}/{protocol} is published by {owner} already")]
    PortTaken { port: u16, protocol: String, owner: String },
    #[error("{0} is taken")]
    NameTaken(String),
    #[error("what this relied on has changed")]
    Stale,
    #[error("this request id was used for another request")]
    RequestIdReused,
    #[error("this request is older than what is remembered: it may have been done or not")]
    UnknownOutcome,
    #[error("the cluster's state would grow over {max_mib} MiB")]
    StateFull { max_mib: u64 },
    #[error("{0}")]
    Invalid(String),
    #[error("no address is left in {0}")]
    NoAddress(String),
}

impl Rejection {
    /// The word that the API's `error.code` carries.
    pub fn code(&self) -> &'static str {
        match self {
            Rejection::PortTaken { .. } => "port_taken",
            Rejection::NameTaken(_) => "name_taken",
            Rejection::Stale => "stale",
            Rejection::NotFound { .. } => "not_found",
            Rejection::UnknownOutcome => "unknown_outcome",
            Rejection::TokenUnknown | Rejection::TokenExpired { .. } | Rejection::TokenReplayed => {
                "token_refused"
            }
            Rejection::TokenKind { .. } => "token_refused",
            Rejection::Invalid(_) => "invalid",
            Rejection::StateFull { .. } => "too_large",
            _ => "rejected",
        }
    }

    /// What to do about it, where that is not plain from the sentence itself.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Rejection::TokenUnknown | Rejection::TokenExpired { .. } | Rejection::TokenReplayed => {
                Some("make a new one on a member: tinydc token")
            }
            Rejection::PortTaken { .. } => Some("publish another port, or remove the other app"),
            Rejection::StateFull { .. } => Some("remove apps that are no longer needed: tinydc rm APP"),
            Rejection::NotFound { .. } => Some("tinydc ls and tinydc node ls show what there is"),
            _ => None,
        }
    }
}
