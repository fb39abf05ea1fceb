//! Images, bundles, shims, logs.

pub mod bundle;
pub mod images;
pub mod logs;
#[cfg(test)]
pub(crate) mod scratch;
pub mod seccomp;
pub mod shim;
pub mod user;
