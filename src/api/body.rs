//! Bodies in and out: bounded JSON, streams of lines.

use super::error::ApiError;
use bytes::Bytes;
use futures_lite::StreamExt;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited, StreamBody};
use hyper::body::{Body, Frame, Incoming};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::convert::Infallible;
use std::io;

pub type Reply = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// Of a JSON body: a specification of the largest app fits.
const JSON_BYTES_MAX: usize = 4 << 20;

pub fn full(bytes: impl Into<Bytes>) -> UnsyncBoxBody<Bytes, io::Error> {
    Full::new(bytes.into()).map_err(|never: Infallible| match never {}).boxed_unsync()
}

pub fn json<T: Serialize>(status: StatusCode, value: &T) -> Reply {
    let text = serde_json::to_vec(value).expect("wire types are plain data");
    let mut reply = Response::new(full(text));
    *reply.status_mut() = status;
    reply.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    reply
}

pub fn ok<T: Serialize>(value: &T) -> Result<Reply, ApiError> {
    Ok(json(StatusCode::OK, value))
}

pub fn done() -> Result<Reply, ApiError> {
    let mut reply = Response::new(full(Bytes::new()));
    *reply.status_mut() = StatusCode::NO_CONTENT;
    Ok(reply)
}

/// A body that is written while it is made; the sender notices when the reader has gone.
pub fn streamed(content_type: &'static str, chunks: async_channel::Receiver<Bytes>) -> Reply {
    let frames = chunks.map(|chunk| Ok::<_, io::Error>(Frame::data(chunk)));
    let mut reply = Response::new(StreamBody::new(frames).boxed_unsync());
    reply.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static(content_type));
    reply
}

pub async fn bytes<B>(body: B, max: usize) -> Result<Bytes, ApiError>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let collected = Limited::new(body, max).collect().await;
    collected.map(|whole| whole.to_bytes()).map_err(|error| {
        let is_long = error.downcast_ref::<http_body_util::LengthLimitError>().is_some();
        match is_long {
            true => ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "too_large",
                format!("the body is over {max} bytes"),
            ),
            false => ApiError::invalid(format!("the body ended early: {error}")),
        }
    })
}

pub async fn parse<T: DeserializeOwned>(body: Incoming) -> Result<T, ApiError> {
    let bytes = bytes(body, JSON_BYTES_MAX).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let mut refused = ApiError::invalid(format!("the body is not the expected JSON: {error}"));
        refused.detail.problems.push(super::wire::ProblemBody {
            file: "body".into(),
            line: error.line() as u32,
            column: error.column() as u32,
            message: error.to_string(),
        });
        refused
    })
}

/// As `parse`, but an empty body is the default.
pub async fn parse_or_default<T: DeserializeOwned + Default>(body: Incoming) -> Result<T, ApiError> {
    let bytes = bytes(body, JSON_BYTES_MAX).await?;
    if bytes.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| ApiError::invalid(format!("the body is not the expected JSON: {error}")))
}
