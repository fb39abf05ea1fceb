//! HTTP and HTTPS from outside to services, on each node.
//!
//! `Routes` (replaced whole, by the agent) → two ports that are open only while there is a route, and for each request an
//! endpoint that serves. HTTP/1.1 and HTTP/2 to clients, HTTP/1.1 to endpoints; bodies stream; WebSockets pass. Everything
//! is bounded: connections, heads, bodies, buffers, idle connections, waits. No error of a client or an endpoint reaches
//! the daemon.
//!
//! `server` (sockets) → `proxy` (one request) → `pool` (connections to endpoints); `routes`, `headers` and `pages` are
//! pure. The relay of published ports takes its places, its sockets and its tunnels from here.
//!
//! Invariant: a request that is being answered when its endpoint or its route goes is answered to its end
//! (`a_removed_endpoint_ends_what_it_began`).

pub mod acme;
mod body;
mod clock;
mod counts;
mod headers;
mod pages;
mod pool;
mod proxy;
mod routes;
mod server;
mod socket;
mod stalled;
#[cfg(test)]
mod tests;
mod tls;
mod tunnel;

pub use counts::{IngressCounts, RouteCounts};
pub use routes::{Route, RouteKey, RouteOptions, Routes};
pub(super) use server::{CONNECTIONS_MAX, OF_ONE_SOURCE_MAX};
pub use server::{Ingress, IngressConfig, IngressError};
pub(super) use socket::{STALLED_LIMIT, Socket, tune};
pub use tls::{
    CertificateAbout, CertificateError, CertifiedKey, HostCertificate, certificate_from_pem, covers,
};
pub(super) use tunnel::{LINGER_LIMIT, join};
