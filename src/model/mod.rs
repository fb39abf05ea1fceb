//! The vocabulary: ids, specifications, rows of the replicated state, time, bounds.
//!
//! Plain data without behaviour that could differ between nodes: no clock, no randomness, no I/O.

pub mod artifact;
pub mod disk;
pub mod health;
pub mod ids;
pub mod instance;
pub mod limits;
pub mod local_network;
pub mod node;
pub mod order;
pub mod secret;
pub mod settings;
pub mod spec;
pub mod time;
pub mod ula;

pub use artifact::{Artifact, ArtifactKind, Digest, DigestError};
pub use disk::{DiskSet, NodeDisk};
pub use health::{DiskWear, MachineHealth, Trouble, Troubles};
pub use ids::{
    AppName, ClusterId, InstanceId, NodeId, PublicKey, RequestId, ServiceId, StartId, StoreId, TokenId,
};
pub use instance::{Desired, Exit, Instance, Observed, Phase};
pub use local_network::{LocalNetwork, source_of};
pub use node::{Architecture, Condition, Node, NodeSize};
pub use order::{Gather, Order};
pub use secret::{SecretName, SecretNameError};
pub use settings::Settings;
pub use spec::{
    AppSpec, Constraint, ConstraintSubject, DependencyCondition, HealthSpec, HealthTest, ImageSpec,
    MountSource, MountSpec, NetworkUse, PlacementSpec, PortSpec, Protocol, ResourceSpec, RestartPolicy,
    SecretUse, ServiceSpec, VolumeSpec,
};
pub use time::{Mono, Timestamp};
pub use ula::UlaPrefix;
