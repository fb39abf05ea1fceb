//! What a daemon answers on its local socket before it belongs to a cluster: the ways on, and its code.

use super::body::{self, Reply};
use super::error::ApiError;
use super::wire::{InitReply, InitRequest, JoinBody, JoinDone, JoiningBody, VersionBody};
use crate::model::Architecture;
use futures_lite::{AsyncRead, AsyncWrite};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, StatusCode};
use smol_hyper::rt::FuturesIo;
use std::convert::Infallible;
use std::sync::Arc;

/// A wish for the node layer, which answers through the channel.
pub enum UnjoinedRequest {
    Init { wish: InitRequest, reply: async_channel::Sender<Result<InitReply, ApiError>> },
    Join { wish: JoinBody, reply: async_channel::Sender<Result<JoinDone, ApiError>> },
}

/// Serves one connection of the local socket.
pub async fn serve_unjoined<S>(
    stream: S,
    requests: async_channel::Sender<UnjoinedRequest>,
    joining: Arc<dyn Fn() -> JoiningBody + Send + Sync>,
) where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request| {
        let (requests, joining) = (requests.clone(), joining.clone());
        async move {
            let outcome = answer(&requests, &*joining, request).await;
            Ok::<_, Infallible>(outcome.unwrap_or_else(|error| body::json(error.status, &error.body())))
        }
    });
    let connection =
        hyper::server::conn::http1::Builder::new().serve_connection(FuturesIo::new(stream), service);
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a client's connection ended");
    }
}

async fn answer(
    requests: &async_channel::Sender<UnjoinedRequest>,
    joining: &(dyn Fn() -> JoiningBody + Send + Sync),
    request: Request<Incoming>,
) -> Result<Reply, ApiError> {
    let gone = || ApiError::unavailable("this node is stopping");
    match (request.method().as_str(), request.uri().path()) {
        ("GET", "/v1/version") => body::ok(&VersionBody {
            version: env!("CARGO_PKG_VERSION").into(),
            architecture: Architecture::own().to_string(),
            cluster: None,
            node: None,
        }),
        ("GET", "/v1/joining") => body::ok(&joining()),
        ("POST", "/v1/init") => {
            let wish = body::parse_or_default(request.into_body()).await?;
            let (reply, answer) = async_channel::bounded(1);
            requests.send(UnjoinedRequest::Init { wish, reply }).await.map_err(|_| gone())?;
            body::ok(&answer.recv().await.map_err(|_| gone())??)
        }
        ("POST", "/v1/join") => {
            let wish = body::parse(request.into_body()).await?;
            let (reply, answer) = async_channel::bounded(1);
            requests.send(UnjoinedRequest::Join { wish, reply }).await.map_err(|_| gone())?;
            body::ok(&answer.recv().await.map_err(|_| gone())??)
        }
        _ => Err(ApiError::new(StatusCode::CONFLICT, "unjoined", "this node belongs to no cluster yet")
            .hint(
                "found one: tinydc init; or join one: tinydc join TOKEN (tinydc token on a member prints it); \
                 tinydc join alone shows this machine's code",
            )),
    }
}
