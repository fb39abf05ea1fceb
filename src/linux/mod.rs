//! The only place with `unsafe`: system calls that no crate serves.
//!
//! Input: plain values. Output: plain values or `io::Error` of the call that failed. Nothing here decides anything.
//! Every `unsafe` block lists what it relies on.

pub mod cgroup;
pub mod clock;
pub mod disk;
pub mod init;
pub mod machine;
pub mod mount;
pub mod netns;
pub mod packet;
pub mod process;
pub mod socket;
pub mod tun;
#[cfg(all(target_env = "musl", panic = "abort"))]
mod unwind;
