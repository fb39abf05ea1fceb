//! Two upgraded connections as one, WebSockets above all: bytes both ways until both sides have ended.

use crate::tasks::within;
use crate::upgraded::Stream;
use async_io::Timer;
use futures_lite::io::{AsyncRead, AsyncWrite, copy, split};
use futures_lite::{AsyncWriteExt, future};
use hyper::upgrade::OnUpgrade;
use std::io;
use std::time::Duration;

/// From the answer's head to both connections being free.
const BEGIN_LIMIT: Duration = Duration::from_secs(10);

const LINGER_LIMIT: Duration = Duration::from_secs(300);

pub async fn join(client: OnUpgrade, endpoint: OnUpgrade) {
    let Some((Ok(client), Ok(endpoint))) = within(BEGIN_LIMIT, future::zip(client, endpoint)).await else {
        tracing::debug!("an upgrade came to nothing");
        return;
    };
    let (from_client, to_client) = split(Stream(client));
    let (from_endpoint, to_endpoint) = split(Stream(endpoint));
    let (ended, one_has_ended) = async_channel::bounded::<()>(1);
    let pour_and_tell = async |from, to| {
        let outcome = pour(from, to).await;
        ended.close();
        outcome
    };
    // A failure of one direction ends the other.
    let both =
        future::try_zip(pour_and_tell(from_client, to_endpoint), pour_and_tell(from_endpoint, to_client));
    let outcome = future::or(async { both.await.map(drop) }, async {
        // Who has said all may still listen, but not for ever: its other half may be gone.
        let _ = one_has_ended.recv().await;
        Timer::after(LINGER_LIMIT).await;
        Err(io::ErrorKind::TimedOut.into())
    });
    if let Err(error) = outcome.await {
        tracing::debug!(%error, "an upgraded connection ended");
    }
}

async fn pour(from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) -> io::Result<()> {
    copy(from, &mut to).await?;
    to.close().await
}
