//! Images, bundles, shims, logs.

pub mod images;
#[cfg(test)]
pub(crate) mod scratch;
