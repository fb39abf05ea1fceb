//! Images, bundles, shims, logs.
