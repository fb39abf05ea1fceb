//! Every bound, in one place, related at compile time.

/// Nodes in one cluster: everyone sends everyone else liveness, so the cost grows with the square.
pub const NODES_MAX: usize = 32;
/// One log entry as it is proposed, encoded.
pub const ENTRY_BYTES_MAX: usize = 1 << 20;
/// One service's specification, encoded.
pub const SERVICE_SPEC_BYTES_MAX: usize = 256 << 10;
/// Services in one app: with the bound above an app would outgrow an entry, so deploys are checked as a whole too.
pub const SERVICES_PER_APP_MAX: usize = 100;
/// Instances of one service.
pub const REPLICAS_MAX: u32 = 200;
/// Instances of all services; each costs a row and, per node, a shim.
pub const INSTANCES_MAX: usize = 2000;
/// All rows of the replicated state, encoded: it lives in every node's memory.
pub const STATE_BYTES_MAX: usize = 32 << 20;
/// A frame between nodes: an entry and its envelope fit.
pub const FRAME_BYTES_MAX: usize = 2 << 20;
/// A piece of a snapshot on its way.
pub const SNAPSHOT_CHUNK_BYTES: usize = 64 << 10;
/// The log kept in memory and on disk before it is cut: entries and bytes.
pub const LOG_ENTRIES_MAX: usize = 4096;
pub const LOG_BYTES_MAX: usize = 4 << 20;
/// Applied changes that wait for the next append before they are written by themselves.
pub const UNWRITTEN_CHANGES_BYTES_MAX: usize = 64 << 10;
/// Outcomes of writes kept so that a retry gets the first one.
pub const OUTCOMES_MAX: usize = 4096;
pub const OUTCOME_AGE_MS_MAX: u64 = 3_600_000;
/// Of nodes among each other and of clients: never published.
pub const CLUSTER_PORTS: std::ops::RangeInclusive<u16> = 7400..=7404;
/// Networks that a joining machine tells of.
pub const LOCAL_NETWORKS_MAX: usize = 32;
/// One secret: it goes through the log as one entry.
pub const SECRET_BYTES_MAX: usize = 500_000;
/// Hosts with a certificate: each has a row of a few kB on every node.
pub const CERTIFICATES_MAX: usize = 1024;
/// Entries about a node's absent disks are remembered, and the pause before the next quadruples with each: at most so
/// many within an hour.
pub const DISK_CHANGES_MAX: usize = 6;
pub const DISK_CHANGES_WITHIN_MS: u64 = 3_600_000;
/// Floating addresses on the LAN.
pub const ADDRESSES_MAX: usize = 16;
/// Events kept.
pub const EVENTS_MAX: usize = 1000;
/// Writes and reads that wait on one node at a time.
pub const PENDING_REQUESTS_MAX: usize = 1024;
/// Content sent along with a Compose file, in all.
pub const CONTENT_BYTES_MAX: u64 = 64 << 20;
/// Dead instances of a slot whose logs are kept.
pub const DEAD_INSTANCES_KEPT: usize = 3;

const _: () = assert!(ENTRY_BYTES_MAX * 3 / 2 <= FRAME_BYTES_MAX);
const _: () = assert!(SNAPSHOT_CHUNK_BYTES <= FRAME_BYTES_MAX);
const _: () = assert!(SERVICE_SPEC_BYTES_MAX < ENTRY_BYTES_MAX);
const _: () = assert!(SECRET_BYTES_MAX * 3 / 2 < ENTRY_BYTES_MAX);
const _: () = assert!(LOG_BYTES_MAX >= 2 * ENTRY_BYTES_MAX);
const _: () = assert!(UNWRITTEN_CHANGES_BYTES_MAX < LOG_BYTES_MAX);
