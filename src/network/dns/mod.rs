//! The cluster's DNS server on one node: its own names from a table, everything else from upstream.
//!
//! `Zone` (replaced whole, by the agent) and questions on UDP and TCP → answers. It listens on the node's bridge address
//! only, and what comes from neither this machine nor a container gets nothing. Nothing here touches a disk but to read
//! resolv.conf, and nothing runs while nobody asks.
//!
//! Its tasks run on the daemon's executor instead of a thread: an answer takes some 20 µs, a burst yields, and a thread
//! would cost its stack on every board for the sake of the rare busy one.
//!
//! `wire` (bytes) → `resolve` (pure, over `zone`) → `encode`, or `forward` (`cache`, `upstreams`, `exchange`).

mod cache;
mod counts;
mod encode;
mod exchange;
mod forward;
pub mod resolve;
mod server;
#[cfg(test)]
mod tests;
mod upstreams;
pub mod wire;
pub mod zone;

pub use counts::DnsCounts;
pub use forward::UpstreamSource;
pub use resolve::{Answer, resolve};
pub use server::{DnsConfig, DnsError, DnsServer};
pub use upstreams::UpstreamView;
pub use wire::Question;
pub use zone::{Client, Endpoint, Range, ServiceNames, ServicePort, Zone, ZoneTable};
