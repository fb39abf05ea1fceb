//! Images, bundles, shims, logs.

pub mod bundle;
pub mod images;
pub mod seccomp;
pub mod user;
#[cfg(test)]
pub(crate) mod scratch;
