//! Rows that only the state knows; those that other layers share are in `model`.

use crate::model::{
    AppName, ClusterId, Digest, NodeId, PublicKey, RequestId, SecretName, ServiceId, ServiceSpec, Timestamp,
    TokenId,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    /// Stamp of the last applied entry: cluster time never goes back.
    pub time: Timestamp,
    pub counters: Counters,
    /// The newest entry whose outcome is remembered no more; 0 for none.
    pub outcomes_evicted: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    pub node: u64,
    pub service: u64,
    pub instance: u64,
    pub token: u64,
    pub event: u64,
    /// Next-fit position in each node's /24, by node number.
    pub next_host: BTreeMap<u8, u8>,
    /// Next-fit position in the VIP range.
    pub next_vip: u32,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    pub id: ClusterId,
    pub name: String,
    /// DER.
    pub ca_certificate: Vec<u8>,
    /// The CA's private key, sealed with the cluster key.
    pub sealed_ca_key: Vec<u8>,
    /// The cluster key, sealed with the recovery key that `init` printed once.
    pub sealed_cluster_key: Vec<u8>,
    /// A /16: containers.
    pub container_range: Ipv4Addr,
    /// A /16: services.
    pub vip_range: Ipv4Addr,
    pub feature_level: u32,
    pub founded_at: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct App {
    pub name: AppName,
    pub deployed_at: Timestamp,
    /// Counts deploys that changed something.
    pub revision: u64,
    /// `rm` was asked: goes when its last instance has gone.
    pub is_removed: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Service {
    pub id: ServiceId,
    pub app: AppName,
    pub name: String,
    pub spec: ServiceSpec,
    /// Grows when the specification changes in more than the count of instances.
    pub spec_version: u64,
    /// What ran before, while an instance of it may still run.
    pub previous: Option<Box<PreviousSpec>>,
    /// Versions that were deployed over before their update was done, each while an instance still has it.
    pub superseded: Vec<PreviousSpec>,
    pub update: Update,
    pub vip: Ipv4Addr,
    /// Ever since it was made: for `depends_on` of others.
    pub was_started: bool,
    pub was_healthy: bool,
    pub was_completed: bool,
    pub is_removed: bool,
    pub version: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreviousSpec {
    pub spec: ServiceSpec,
    pub spec_version: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Update {
    /// All instances run, or are to run, the current specification.
    #[default]
    Done,
    Rolling {
        since: Timestamp,
    },
    /// A new instance failed: the update stopped, the old instances keep serving.
    Failed {
        at: Timestamp,
        slot: u32,
        reason: String,
    },
}

impl Service {
    /// The specification an instance of this version runs.
    pub fn spec_of(&self, spec_version: u64) -> &ServiceSpec {
        let older = self.older_specs().find(|older| older.spec_version == spec_version);
        older.map_or(&self.spec, |older| &older.spec)
    }

    /// What other instances than those of the current version may run.
    pub fn older_specs(&self) -> impl Iterator<Item = &PreviousSpec> {
        self.previous.as_deref().into_iter().chain(&self.superseded)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VolumeKey {
    pub app: AppName,
    pub name: String,
}

impl VolumeKey {
    pub fn new(app: &AppName, name: &str) -> VolumeKey {
        VolumeKey { app: app.clone(), name: name.into() }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    pub app: AppName,
    pub name: String,
    pub seed: Option<Digest>,
    /// `./data` for a directory beside the Compose file.
    pub directory: Option<String>,
    /// Where its data lies; set by the first assignment.
    pub node: Option<NodeId>,
    pub created_at: Timestamp,
    /// `rm --volumes` was asked: its node deletes the data, then the row goes.
    pub is_removed: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Token {
    pub id: TokenId,
    /// SHA-256 of the secret.
    pub secret_hash: [u8; 32],
    pub kind: TokenKind,
    pub expires_at: Timestamp,
    pub created_at: Timestamp,
    /// Who used a token that serves once.
    pub used_by: Option<PublicKey>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TokenKind {
    Join { is_once: bool },
    User { name: String, role: Role },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Role {
    Operator,
    Viewer,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Operator => "operator",
            Role::Viewer => "viewer",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct User {
    pub name: String,
    pub role: Role,
    /// Keys of the user's contexts, with the end of each certificate.
    pub keys: BTreeMap<PublicKey, Timestamp>,
    pub created_at: Timestamp,
}

/// An address of the cluster on the LAN, which one node holds at a time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FloatingAddress {
    pub address: Ipv4Addr,
    pub holder: Option<NodeId>,
    /// Grows with each move.
    pub epoch: u64,
    /// Cluster time of the last move.
    pub since: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Secret {
    pub name: SecretName,
    /// With the cluster key, for the purpose that names this secret.
    pub sealed: Vec<u8>,
    /// A keyed hash of what is sealed: tells whether it is the same, and nothing else.
    pub fingerprint: [u8; 32],
    /// Of what is sealed.
    pub bytes: u32,
    /// The index of the entry that changed what is sealed: it grows, and no other content ever had it.
    pub version: u64,
    pub created_at: Timestamp,
    pub changed_at: Timestamp,
}

/// The second CA: for hosts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ServingAuthority {
    /// DER.
    pub certificate: Vec<u8>,
    pub sealed_key: Vec<u8>,
}

/// What the ingress shows for a host, or why it has nothing to show.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    pub host: String,
    pub issued: Option<IssuedCertificate>,
    /// Of the last try, if that failed.
    pub trouble: Option<Trouble>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct IssuedCertificate {
    pub issuer: CertificateIssuer,
    pub chain_pem: String,
    /// PEM, sealed with the cluster key.
    pub sealed_key: Vec<u8>,
    /// Seconds since 1970.
    pub not_before: u64,
    pub not_after: u64,
    /// The index of the entry that put it here; no other certificate ever had it.
    pub version: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CertificateIssuer {
    Cluster,
    Acme { directory: String },
}

impl CertificateIssuer {
    pub fn name(&self) -> &str {
        match self {
            CertificateIssuer::Cluster => "the cluster's CA",
            CertificateIssuer::Acme { directory } => directory,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trouble {
    pub text: String,
    /// In a row.
    pub failures: u32,
    pub at: Timestamp,
    pub again_at: Timestamp,
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let times = if self.failures == 1 { "once".to_owned() } else { format!("{} times", self.failures) };
        write!(f, "{} (tried {times}, again at {})", self.text, self.again_at)
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AcmeAccount {
    pub directory: String,
    pub sealed_key: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Challenge {
    pub answer: String,
    pub at: Timestamp,
}

/// What a write answered, so that a retry gets the same.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StoredOutcome {
    pub id: RequestId,
    pub body_hash: u64,
    pub outcome: super::Outcome,
    pub at: Timestamp,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    pub id: u64,
    pub at: Timestamp,
    /// A word to filter by: `node_down`, `instance_failing`, `deployed`.
    pub kind: String,
    /// A name as the CLI takes it: `shop/web.2`, `pi3`.
    pub subject: String,
    pub text: String,
}
