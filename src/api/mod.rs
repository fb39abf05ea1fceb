//! The HTTP API: one set of routes, served on the local socket, on TCP 7400 with TLS, and to peers over QUIC.
//!
//! Input: requests. Output: JSON, streams of lines, upgraded connections. A request that another node must answer is
//! passed on over QUIC, so that every verb works against any node. Who calls is decided by where the request came
//! in: the local socket is an operator, a client certificate is a user of the state, a peer is a node.

pub mod backend;
mod body;
mod certificates;
mod error;
mod exec;
mod handlers;
mod images;
mod instances;
mod internal;
mod joining;
mod keys;
mod network;
mod network_check;
pub mod peer;
mod ports;
mod routes;
mod secrets;
mod serve;
mod unjoined;
mod view;
pub mod wire;

pub use backend::Backend;
pub use certificates::keep_certificates;
pub use error::ApiError;
pub use handlers::create_token;
pub use internal::{CA_KEY_PURPOSE, answer_join};
pub use joining::{answer_code, context_line};
pub use keys::{confirm_cluster_key, keep_recovery_key, offer_cluster_key, withdraw_cluster_key};
pub use routes::{ROUTES, Route};
pub use secrets::open_sealed;
pub use serve::{Caller, Connection, Server};
pub use unjoined::{UnjoinedRequest, serve_unjoined};
