//! Identity, peers, frames: how nodes know each other and how bytes pass between them.
//!
//! `identity` holds this node's files, `authority` signs and reads certificates, `sealing` the cluster key; `tls` turns
//! them into rustls configurations; `peers` keeps one QUIC connection to every member over one UDP port;
//! `announce` and `addresses` find members whose address changed; `join` lets a stranger with a token in;
//! `pending` is a machine without a cluster, `by_code` and `door` are the two ends of asking by a code (`pake` proves it,
//! `codes` counts tries) or by an operator's key (`operators`); `https` serves the API's TCP port. It never decides who
//! is a member: the node layer gives a table and a callback.
//!
//! Invariant: nobody without a node certificate of this cluster is told anything but the server's certificate chain
//! (`tests::hostile::a_peer_without_a_certificate_is_told_nothing`), and `shutdown` leaves no task behind
//! (`tests::shutdown_joins_every_task_and_the_peer_notices_at_once`).

pub mod addresses;
pub mod admission;
pub mod announce;
pub mod authority;
pub mod by_code;
pub mod codes;
mod codeword;
mod dial;
pub mod door;
mod executor;
mod frames;
pub mod hello;
pub mod https;
pub mod identity;
pub mod ids;
pub mod join;
mod join_limit;
mod join_server;
pub mod local_names;
pub mod operators;
mod pake;
pub mod peers;
pub mod pending;
mod pending_announce;
pub mod sealing;
mod serve;
pub mod serving;
pub mod streams;
mod table;
pub mod tls;
pub mod token;

#[cfg(test)]
mod tests;
