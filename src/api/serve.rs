//! One HTTP/1 connection after another: from the local socket, from TCP with TLS, from peers.

use super::backend::Backend;
use super::body::{self, Reply};
use super::error::ApiError;
use super::handlers;
use super::routes::{self, Found};
use crate::model::NodeId;
use crate::transport::authority::{Peer, Role};
use futures_lite::{AsyncRead, AsyncWrite};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use smol_hyper::rt::{FuturesIo, SmolTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Connections at once; each holds a few kB and a file descriptor.
const CONNECTIONS_MAX: usize = 256;
const STRANGERS_MAX: usize = 16;
/// For the whole header of the next request: a connection on which nothing is asked gives its place back.
const HEADER_LIMIT: Duration = Duration::from_secs(30);
const HEADER_BYTES_MAX: usize = 32 << 10;

/// Who asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// On the node's own socket, whose mode says who may open it.
    Local,
    User {
        name: String,
        is_operator: bool,
    },
    Node(NodeId),
    /// Without a certificate that counts.
    Stranger,
}

#[derive(Clone)]
pub struct Server {
    pub backend: Arc<Backend>,
    connections: Arc<AtomicUsize>,
    strangers: Arc<AtomicUsize>,
}

impl Server {
    pub fn new(backend: Arc<Backend>) -> Server {
        Server { backend, connections: Arc::default(), strangers: Arc::default() }
    }

    /// The user behind a client certificate, as the state here knows it now.
    pub fn caller_of(&self, peer: Option<&Peer>) -> Caller {
        let Some(peer) = peer else { return Caller::Stranger };
        let state = self.backend.replica.state();
        match &peer.role {
            // A node speaks over QUIC; its certificate is no operator's.
            Role::Node => Caller::Stranger,
            Role::Operator { .. } | Role::Viewer { .. } => {
                match state.role_of(&peer.public_key, self.backend.replica.cluster_time()) {
                    Some((name, role)) => {
                        Caller::User { name: name.into(), is_operator: role == crate::state::Role::Operator }
                    }
                    None => Caller::Stranger,
                }
            }
        }
    }

    /// Serves one connection until either side closes it.
    pub async fn serve<S>(&self, stream: S, peer: Connection)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        // Who shows no certificate can only be refused, and must not take a place from those who can be served.
        let is_stranger = matches!(&peer, Connection::Tls(None));
        let (counter, most) = match is_stranger {
            true => (&self.strangers, STRANGERS_MAX),
            false => (&self.connections, CONNECTIONS_MAX),
        };
        let count = counter.fetch_add(1, Ordering::Relaxed);
        if count < most {
            let service = service_fn(|request| {
                let caller = match &peer {
                    Connection::Local => Caller::Local,
                    Connection::Peer(node) => Caller::Node(*node),
                    // Asked anew for each request: a removed user is out at once.
                    Connection::Tls(certificate) => self.caller_of(certificate.as_ref()),
                };
                answer(self.backend.clone(), caller, request)
            });
            let connection = hyper::server::conn::http1::Builder::new()
                .timer(SmolTimer::new())
                .header_read_timeout(HEADER_LIMIT)
                .max_buf_size(HEADER_BYTES_MAX)
                .serve_connection(FuturesIo::new(stream), service)
                .with_upgrades();
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a client's connection ended");
            }
        }
        counter.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where a connection came in.
pub enum Connection {
    Local,
    Tls(Option<Peer>),
    Peer(NodeId),
}

/// `init` and `join` are for a node that belongs to no cluster yet.
fn already_member(backend: &Backend) -> ApiError {
    let state = backend.replica.state();
    let cluster = state.cluster().map(|cluster| cluster.name.clone()).unwrap_or_default();
    let node = state.node_name(backend.node);
    ApiError::rejected(format!("this node is {node}, a member of cluster {cluster} already"))
        .hint("it can leave it first: tinydc leave")
}

async fn answer(
    backend: Arc<Backend>,
    caller: Caller,
    request: Request<Incoming>,
) -> Result<Reply, Infallible> {
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let outcome = match routes::find(method.as_str(), &path) {
        Found::NoSuchPath if caller == Caller::Local && matches!(path.as_str(), "/v1/init" | "/v1/join") => {
            Err(already_member(&backend))
        }
        Found::NoSuchPath => {
            Err(ApiError::new(StatusCode::NOT_FOUND, "not_found", format!("there is no {path}")))
        }
        Found::OtherMethods(methods) => Err(ApiError::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid",
            format!("{path} takes {}, not {method}", methods.join(", ")),
        )),
        Found::Match(found) if caller == Caller::Stranger => {
            tracing::debug!(?found.verb, "a stranger was refused");
            Err(ApiError::new(
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "this needs a certificate of the cluster that is still valid",
            )
            .hint("on a member: tinydc token --user NAME; here: tinydc context create NAME TOKEN"))
        }
        Found::Match(found) if !routes::may(&caller, found.access) => Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "forbidden",
            format!("{method} {path} is not for this caller"),
        )),
        Found::Match(found) => handlers::handle(&backend, &caller, found, request).await,
    };
    let mut reply = outcome.unwrap_or_else(|error| body::json(error.status, &error.body()));
    // A client that mints a key for its next write says with it how much it had seen.
    let applied = backend.replica.published().newest().applied;
    reply.headers_mut().insert("applied-index", applied.into());
    Ok(reply)
}
