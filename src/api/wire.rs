//! What travels as JSON. Sizes are bytes, times are RFC 3339 in UTC or milliseconds where the name says so.
//!
//! A deploy carries the specification as `model::spec` defines it; everything that is shown has a type of its own
//! here, so that the state may change its shape without the API doing so.

use crate::model::{AppSpec, Digest};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Of every answer above 399.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    pub error: ErrorDetail,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// A word: `invalid`, `unauthorized`, `forbidden`, `not_found`, `rejected`, `port_taken`, `name_taken`, `stale`,
    /// `too_large`, `busy`, `no_leader`, `unknown_outcome`, `internal`.
    pub code: String,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<ProblemBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProblemBody {
    pub file: String,
    pub line: u32,
    pub column: u32,
    pub message: String,
}

/// `GET /v1/version`; answered by every daemon, also one that has not joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionBody {
    pub version: String,
    pub architecture: String,
    /// `None` while the daemon is not a member of a cluster.
    pub cluster: Option<String>,
    pub node: Option<String>,
}

/// `POST /v1/init`, over the local socket of a daemon that has not joined.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitRequest {
    /// Of the cluster; `None`: `home`.
    pub name: Option<String>,
    /// `10.77.0.0/16` unless given.
    pub container_range: Option<String>,
    /// `10.78.0.0/16` unless given.
    pub vip_range: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InitReply {
    pub cluster: String,
    pub node: String,
    /// What to type on the next node, whole.
    pub join_line: String,
    pub recovery_key: String,
    pub token_expires_at: String,
}

/// `POST /v1/join`, over the local socket of a daemon that has not joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinBody {
    pub token: String,
    /// `--replace NAME`.
    pub replace: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinDone {
    pub cluster: String,
    pub node: String,
    pub node_id: String,
}

/// `POST /v1/leave`: this node leaves its cluster; its data directory is unjoined afterwards.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaveRequest {
    pub is_forced: bool,
}

/// The recovery key: as `init` printed it, or as `GET /v1/recovery-key` shows it on the local socket.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoverRequest {
    pub recovery_key: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoverReply {
    pub node: String,
    /// Who must be given it too before the other voters can get theirs.
    pub leader_without_key: Option<String>,
}

/// In every answer to a read: how new it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freshness {
    pub applied_index: u64,
    /// Set when no leader confirmed it: one sentence, such as
    /// `no leader for 42 s: pi1, pi3 unreachable (2 of 3 voters); showing pi2's copy; apps go on, changes wait`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale: Option<String>,
}

/// `GET /v1/status[?app=APP]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub cluster: String,
    pub node: String,
    pub leader: Option<String>,
    pub cluster_time: String,
    pub nodes: Vec<NodeBody>,
    pub services: Vec<ServiceBody>,
    pub volumes: Vec<VolumeBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeBody {
    pub id: String,
    pub name: String,
    /// `up`, `stopping`, `stopped`, `drained`, `leaving`, `down`.
    pub state: String,
    /// `leader`, `voter`, `learner`.
    pub role: String,
    /// Of the machine on the LAN, as connections show it.
    pub address: Option<String>,
    pub architecture: String,
    pub cpu_millis: u64,
    pub memory_bytes: u64,
    pub memory_available_bytes: Option<u64>,
    pub reserved_cpu_millis: u64,
    pub reserved_memory_bytes: u64,
    pub instances: usize,
    pub labels: BTreeMap<String, String>,
    pub software: String,
    /// Since it was last heard by the node that answers; `None` if never.
    pub silent_ms: Option<u64>,
    pub joined_at: String,
    /// Volumes and images that exist nowhere else.
    pub only_copies: Vec<String>,
    /// `hot`, `throttled`, `under_voltage`, `disk_errors`, `disk_read_only`, `no_memory_limits`.
    #[serde(default)]
    pub troubles: Vec<String>,
    /// Of its hottest processor sensor.
    pub temperature_celsius: Option<i16>,
    /// That holds its data directory.
    pub disk: Option<DiskBody>,
    /// What its configuration mounts beside its data.
    #[serde(default)]
    pub disks: Vec<NodeDiskBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeDiskBody {
    pub label: String,
    pub mount_point: String,
    /// Services that bind something there don't run there meanwhile.
    pub is_absent: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskBody {
    pub size_bytes: u64,
    /// By whomever on that machine, since midnight UTC.
    pub written_today_bytes: u64,
    /// Since tinydc was installed there.
    pub written_bytes: u64,
    /// At the rate so far, if it may be written over as often as the setting `disk_endurance` says; `None` in the first
    /// hour.
    pub days_left: Option<u64>,
}

/// `GET /v1/apps`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppsBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub apps: Vec<AppBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppBody {
    pub name: String,
    pub services: usize,
    pub instances_wanted: usize,
    pub instances_running: usize,
    pub revision: u64,
    pub deployed_at: String,
    pub is_removed: bool,
    /// `http://192.0.2.10:8080`, one per published port and node that serves it.
    pub addresses: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceBody {
    pub app: String,
    pub name: String,
    pub image: String,
    pub image_digest: Option<Digest>,
    pub wanted: usize,
    pub running: usize,
    /// `healthy` or, without a health check, running: what counts for `deploy`.
    pub settled: usize,
    pub spec_version: u64,
    /// `done`, `rolling`, `failed`.
    pub update: String,
    /// Why an update failed.
    pub update_reason: Option<String>,
    /// The instance whose failure stopped the update: its last log lines say more.
    pub failed_instance: Option<String>,
    /// `data on pi2; if pi2 dies it waits`.
    pub data: Option<String>,
    /// Of a global service: `not on pi3: the image is built for amd64`.
    pub left_out: Option<String>,
    /// `8080->80/tcp`.
    pub ports: Vec<String>,
    /// Where to open it: `http://192.0.2.10:8080`.
    pub addresses: Vec<String>,
    pub instances: Vec<InstanceBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceBody {
    /// `shop/web.1`.
    pub name: String,
    pub id: String,
    pub slot: u32,
    pub node: Option<String>,
    pub address: Option<String>,
    /// `pending`, `assigned`, `preparing`, `running`, `healthy`, `unhealthy`, `failing`, `stopped`, `completed`, `lost`.
    pub phase: String,
    pub desired: String,
    pub spec_version: u64,
    pub since: String,
    pub since_ms: u64,
    /// Why it is not running, in one sentence: `2 nodes lack 64 MiB`.
    pub reason: Option<String>,
    /// `exited 1, 3 restarts, next in 8 s`.
    pub last_exit: Option<String>,
    pub restarts: Option<u32>,
    /// Of the main process on its node.
    pub pid: Option<i32>,
    pub memory_bytes: Option<u64>,
    /// `pulling nginx 12 of 48 MiB`.
    pub progress: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeBody {
    pub app: String,
    pub name: String,
    pub node: Option<String>,
    pub path: String,
    pub directory: Option<String>,
    pub is_removed: bool,
}

/// `POST /v1/apps/{app}`. Answers `DeployReply`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeployRequest {
    pub spec: AppSpec,
    /// Checks all of it, resolves images and says what would change, but changes nothing.
    #[serde(default)]
    pub is_dry_run: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeployReply {
    pub app: String,
    pub revision: u64,
    /// Services that are new or differ; empty when nothing changed.
    pub changed: Vec<String>,
    pub removed: Vec<String>,
    /// What each tag became: `nginx:1.27` → digest.
    pub images: BTreeMap<String, Digest>,
}

/// `POST /v1/apps/{app}/scale`. Answers `DeployReply`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScaleRequest {
    pub replicas: BTreeMap<String, u32>,
}

/// `DELETE /v1/apps/{app}[?volumes=true]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoveReply {
    /// What was kept, with the command that deletes it in the CLI's text.
    pub volumes: Vec<VolumeBody>,
}

/// `GET /v1/instances[?app=APP][&service=NAME]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstancesBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub instances: Vec<InstanceBody>,
}

/// One line of `GET /v1/instances/{id}/logs[?follow=true][&tail=N]` (newline-delimited JSON).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Milliseconds since 1970 by the node's clock.
    pub at_ms: u64,
    /// `stdout`, `stderr`, or `tinydc` for what tinydc itself has to say (lines dropped, container restarted).
    pub stream: String,
    pub text: String,
}

/// `POST /v1/instances/{id}/exec`, then the connection is upgraded (`Upgrade: tinydc-exec`) and carries frames:
/// one kind byte, four bytes of length (big endian), the bytes. To the server: 0 stdin (empty: end), 2 window size
/// (two u16, rows and columns). From the server: 1 stdout, 2 stderr, 3 exit code (i32), 4 error (UTF-8 sentence).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecBody {
    pub command: Vec<String>,
    pub has_terminal: bool,
    pub has_stdin: bool,
    pub environment: BTreeMap<String, String>,
    pub user: Option<String>,
    pub working_dir: Option<String>,
    pub rows: u16,
    pub columns: u16,
}

/// `GET /v1/nodes`; `GET /v1/nodes/{name}` answers one `NodeBody`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodesBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub nodes: Vec<NodeBody>,
}

/// `POST /v1/nodes/{name}/labels`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabelsRequest {
    pub set: BTreeMap<String, String>,
    pub remove: Vec<String>,
}

/// `POST /v1/tokens`. Answers `TokenReply`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenRequest {
    /// For a laptop; without it the token lets nodes join.
    pub user: Option<String>,
    pub is_viewer: bool,
    pub is_once: bool,
    /// Seconds; 24 h unless given.
    pub valid_seconds: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenReply {
    pub id: String,
    pub token: String,
    pub expires_at: String,
    /// What to type, whole.
    pub line: String,
}

/// `GET /v1/joining`, on the local socket only: what this machine's own display may show.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoiningBody {
    /// `waiting` for a cluster, `listening` for one before it founds its own, `member`.
    pub state: String,
    pub node: String,
    pub architecture: String,
    pub cluster: Option<String>,
    /// Six digits.
    pub code: Option<String>,
    /// Who gets a context by the code; without it the code lets this machine into a cluster.
    pub code_for: Option<String>,
    /// What to type elsewhere, whole.
    pub line: Option<String>,
    /// Of this machine's public key, as it is announced.
    pub key_hash: Option<String>,
    /// SHA-256 of the cluster's CA.
    pub authority_hash: Option<String>,
    pub problem: Option<String>,
}

/// `POST /v1/codes`: shows a code on the node that answers. Answers `CodeBody`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeWish {
    pub user: String,
    #[serde(default)]
    pub is_viewer: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CodeBody {
    pub code: String,
    /// Seconds for which it may be used.
    pub valid_seconds: u64,
    /// What to type on the laptop, whole.
    pub line: String,
}

/// `GET /v1/pending`: machines on this node's LAN that belong to no cluster, as they say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingBody {
    pub machines: Vec<PendingMachine>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingMachine {
    pub name: String,
    /// With the UDP port.
    pub address: String,
    pub architecture: String,
    pub waits_ms: u64,
    pub key_hash: String,
}

/// `POST /v1/pending`: takes a machine into the cluster by its code. Answers `AcceptReply`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptRequest {
    pub code: String,
    /// Its name, or its address where it is not heard; without it each machine that waits is tried.
    pub machine: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcceptReply {
    pub node: String,
    pub cluster: String,
    pub address: String,
}

/// `GET /v1/tokens`; `DELETE /v1/tokens/{id}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokensBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub tokens: Vec<TokenBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenBody {
    pub id: String,
    /// `join`, `join once`, `user alice (operator)`.
    pub kind: String,
    pub expires_at: String,
    pub is_expired: bool,
    pub is_used: bool,
}

/// `GET /v1/users`; `DELETE /v1/users/{name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsersBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub users: Vec<UserBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UserBody {
    pub name: String,
    pub role: String,
    pub contexts: usize,
    pub created_at: String,
}

/// `GET /v1/settings`; `PUT /v1/settings/{key}` with `{"value": "…"}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub settings: Vec<SettingBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingBody {
    pub key: String,
    pub value: String,
    pub default: String,
    pub meaning: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingValue {
    pub value: String,
}

/// `POST /v1/images` with an OCI layout tar or the output of `docker save` as body. Answers `LoadReply`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadReply {
    pub images: Vec<ImageBody>,
}

/// `GET /v1/images`; `DELETE /v1/images/{digest or name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImagesBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub images: Vec<ImageBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageBody {
    pub names: Vec<String>,
    pub digest: Digest,
    pub bytes: u64,
    pub platforms: Vec<String>,
    /// Nodes that hold all of it.
    pub nodes: Vec<String>,
    /// Nodes that hold some of its platforms.
    pub part_nodes: Vec<String>,
    /// `loaded` or `registry`.
    pub source: String,
}

/// `PUT /v1/content` with a tar as body: files that a Compose file mounts. Answers `ContentReply`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentReply {
    pub digest: Digest,
}

/// `GET /v1/network[?app=APP]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    /// `10.77.0.0/16`: containers.
    pub container_range: String,
    /// `10.78.0.0/16`: services.
    pub vip_range: String,
    /// `fd01:203:405::/96`: both, where the cluster has IPv6.
    #[serde(default)]
    pub ipv6_prefix: Option<String>,
    pub nodes: Vec<NodeNetworkBody>,
    pub services: Vec<ServiceNetworkBody>,
    pub addresses: Vec<AddressBody>,
    /// As the node that was asked shows them.
    pub certificates: Vec<CertificateBody>,
}

/// What one node alone knows of its network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeNetworkBody {
    pub node: String,
    /// Where its name server listens.
    pub bridge: String,
    /// `192.0.2.5/24 eth0`.
    pub lans: Vec<String>,
    pub ways: Vec<WayBody>,
    /// Tracked connections by the address of the container that answers.
    pub connections: BTreeMap<String, u32>,
    /// Floating addresses that it holds.
    pub floating: Vec<String>,
    /// Why containers there couldn't have IPv6.
    #[serde(default)]
    pub ipv6_obstacle: Option<String>,
    pub problems: Vec<NetworkProblemBody>,
}

/// How a node reaches another one's containers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WayBody {
    pub node: String,
    /// `direct` or `vxlan`.
    pub kind: String,
    pub address: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkProblemBody {
    pub text: String,
    /// What to type or do.
    pub remedy: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceNetworkBody {
    pub app: String,
    pub service: String,
    pub vip: String,
    #[serde(default)]
    pub vip6: Option<String>,
    pub networks: Vec<String>,
    /// `8080->80/tcp`.
    pub ports: Vec<String>,
    /// A client stays with one endpoint.
    pub is_pinned: bool,
    pub endpoints: Vec<EndpointBody>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointBody {
    pub instance: String,
    pub node: String,
    pub address: String,
    /// `serving`, `down`, `draining`, `starting`, or the phase that keeps it from serving.
    pub state: String,
    pub phase: String,
    /// As its node tracks them; `None` if that node did not say.
    pub connections: Option<u32>,
}

/// `GET /v1/network/check/{app/service}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckBody {
    pub service: String,
    /// The node that tried.
    pub from: String,
    /// The first step that is broken.
    pub broken: Option<String>,
    pub steps: Vec<CheckStep>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckStep {
    /// `name`, `endpoints`, `process`, `port`, `tls`, `node`.
    pub step: String,
    pub is_ok: bool,
    pub text: String,
    pub remedy: Option<String>,
}

/// `GET /v1/addresses`; `DELETE /v1/addresses/{address}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressesBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub addresses: Vec<AddressBody>,
}

/// An address of the cluster on the LAN.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressBody {
    pub address: String,
    /// Where it is now.
    pub node: Option<String>,
    pub since: String,
    /// Why it is nowhere.
    pub problem: Option<String>,
}

/// `POST /v1/addresses`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressWish {
    pub address: String,
}

/// `GET /v1/events[?follow=true]`: one JSON object a line, oldest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventBody {
    pub id: u64,
    pub at: String,
    pub kind: String,
    pub subject: String,
    pub text: String,
}

/// `GET /v1/secrets`; `PUT /v1/secrets/{name}` with what is to be kept as body; `DELETE /v1/secrets/{name}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretsBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub secrets: Vec<SecretBody>,
}

/// A secret without what is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretBody {
    /// `NAME`, or `APP/NAME` for one that belongs to an app.
    pub name: String,
    pub bytes: u32,
    /// Grows when it changes.
    pub version: u64,
    pub created_at: String,
    pub changed_at: String,
    /// `APP/SERVICE`.
    pub used_by: Vec<String>,
}

/// `GET /v1/ca`: what to trust for hosts with `tinydc.http.tls=cluster`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaBody {
    #[serde(flatten)]
    pub freshness: Freshness,
    pub cluster: String,
    /// PEM.
    pub certificate: String,
}

/// What the ingress shows for a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CertificateBody {
    pub host: String,
    /// `APP/SERVICE`.
    pub service: String,
    /// `secret NAME`, `acme` or `cluster`.
    pub source: String,
    /// Of the one that is shown; empty without one.
    pub names: Vec<String>,
    pub not_after: Option<String>,
    /// Why there is none, or no newer one.
    pub problem: Option<String>,
}
