//! The runtime against the real kernel: real images, overlays, namespaces, cgroups and shims.
//!
//! Needs root, overlayfs, a memory cgroup and Debian's `busybox-static`; what is missing fails by name. Every test has
//! a node tag and folders of its own and removes all of it, also when it fails.

// All of this is tests, of which clippy knows only those that it sees marked.
#![allow(clippy::unwrap_used)]

mod containers;
mod layers;
mod node;
mod output;
