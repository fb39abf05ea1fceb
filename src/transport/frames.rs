//! Length-prefixed frames on QUIC streams: four bytes little-endian, then the body.
//!
//! Every read has a cap and a time limit; a frame over its cap is an error before a byte of it is stored.

use std::time::Duration;

use quinn::{ReadExactError, RecvStream, SendStream, WriteError};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::executor::within;

#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of {length} bytes, at most {cap} are allowed")]
    Oversize { length: usize, cap: usize },
    #[error("no whole frame within {} ms", limit.as_millis())]
    Timeout { limit: Duration },
    #[error("read a frame")]
    Read(#[source] ReadExactError),
    #[error("write a frame")]
    Write(#[source] WriteError),
    #[error("decode a frame")]
    Decode(#[source] postcard::Error),
    #[error("encode a frame")]
    Encode(#[source] postcard::Error),
}

pub(super) async fn read_body(stream: &mut RecvStream, cap: usize) -> Result<Vec<u8>, FrameError> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix).await.map_err(FrameError::Read)?;
    let length = u32::from_le_bytes(prefix) as usize;
    if length > cap {
        return Err(FrameError::Oversize { length, cap });
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await.map_err(FrameError::Read)?;
    Ok(body)
}

pub(super) async fn write_body(stream: &mut SendStream, body: &[u8]) -> Result<(), FrameError> {
    let length = u32::try_from(body.len())
        .map_err(|_| FrameError::Oversize { length: body.len(), cap: u32::MAX as usize })?;
    stream.write_all(&length.to_le_bytes()).await.map_err(FrameError::Write)?;
    stream.write_all(body).await.map_err(FrameError::Write)
}

pub(super) async fn read_value<Value: DeserializeOwned>(
    stream: &mut RecvStream,
    cap: usize,
    limit: Duration,
) -> Result<Value, FrameError> {
    let body = within(limit, read_body(stream, cap)).await.ok_or(FrameError::Timeout { limit })??;
    postcard::from_bytes(&body).map_err(FrameError::Decode)
}

pub(super) async fn write_value<Value: Serialize>(
    stream: &mut SendStream,
    value: &Value,
    cap: usize,
    limit: Duration,
) -> Result<(), FrameError> {
    let body = postcard::to_allocvec(value).map_err(FrameError::Encode)?;
    if body.len() > cap {
        return Err(FrameError::Oversize { length: body.len(), cap });
    }
    within(limit, write_body(stream, &body)).await.ok_or(FrameError::Timeout { limit })?
}
