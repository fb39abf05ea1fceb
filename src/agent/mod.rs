//! Observe, reconcile, execute: what the state says of this node becomes containers on it.
//!
//! Input: the state as this node has it, ends of containers, verdicts of probes. Output: containers, networks,
//! volumes; reports to the leader. It only ever reads its own copy of the state: a node that is cut off goes on with
//! what it last knew.
//!
//! Never: decides where anything runs; writes what was not asked for.

mod addresses;
pub mod artifacts;
mod certificates;
mod disk;
mod disks;
mod ends;
mod health;
mod hints;
pub mod launch;
mod lease;
pub mod machine_end;
mod mesh;
mod names;
mod reconcile;
mod report;
mod restart;
mod routes;
mod secrets;
mod ways;
pub mod wiring;
mod worker;

pub use addresses::HeldAddresses;
pub use artifacts::{Artifacts, FetchArtifactError};
pub use certificates::CertificateView;
pub use disks::Disks;
pub use launch::{Ground, LaunchError, container_id};
pub use lease::{Lease, keep_leases};
pub use mesh::{Broadcast, NetworkView};
pub use reconcile::{Local, Presence};
pub use secrets::{Open, Opened, Sealed, SecretError, Secrets};
pub use ways::{Ways, WaysKeeper, WaysView};
pub use worker::{Agent, AgentConfig, LiveInstance, Signal, chain};
