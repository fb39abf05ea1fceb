//! Two connections as one, WebSockets above all: bytes both ways until both sides have ended.

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
/// For one side after the other has said all.
pub const LINGER_LIMIT: Duration = Duration::from_secs(300);

pub async fn join_upgraded(client: OnUpgrade, endpoint: OnUpgrade) {
    let Some((Ok(client), Ok(endpoint))) = within(BEGIN_LIMIT, future::zip(client, endpoint)).await else {
        tracing::debug!("an upgrade came to nothing");
        return;
    };
    if let Err(error) = join(Stream(client), Stream(endpoint), LINGER_LIMIT).await {
        tracing::debug!(%error, "an upgraded connection ended");
    }
}

/// Until both sides have ended, one has failed, or one has ended and the other doesn't within `linger_limit`.
pub async fn join(
    client: impl AsyncRead + AsyncWrite + Unpin,
    endpoint: impl AsyncRead + AsyncWrite + Unpin,
    linger_limit: Duration,
) -> io::Result<()> {
    let (from_client, to_client) = split(client);
    let (from_endpoint, to_endpoint) = split(endpoint);
    let (ended, one_has_ended) = async_channel::bounded::<()>(1);
    // A failure of one direction ends the other.
    let both =
        future::try_zip(pour(from_client, to_endpoint, &ended), pour(from_endpoint, to_client, &ended));
    future::or(async { both.await.map(drop) }, async {
        // Who has said all may still listen, but not for ever: its other half may be gone.
        let _ = one_has_ended.recv().await;
        Timer::after(linger_limit).await;
        Err(io::ErrorKind::TimedOut.into())
    })
    .await
}

/// One direction; closes `ended` when it has ended.
async fn pour(
    from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    ended: &async_channel::Sender<()>,
) -> io::Result<()> {
    let copied = copy(from, &mut to).await;
    let outcome = match copied {
        Ok(_) => to.close().await,
        Err(error) => Err(error),
    };
    ended.close();
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::ingress::Socket;
    use async_io::Async;
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};

    fn pair() -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let outer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (inner, _) = listener.accept().unwrap();
        (outer, Socket::new(Async::new(inner).unwrap()))
    }

    #[test]
    fn who_listens_to_one_that_never_ends_is_let_go() {
        let ((mut client, to_client), (mut endpoint, to_endpoint)) = (pair(), pair());
        let linger = Duration::from_millis(200);
        let joined = std::thread::spawn(move || async_io::block_on(join(to_client, to_endpoint, linger)));
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut text = String::new();
        endpoint.read_to_string(&mut text).unwrap();
        assert_eq!(text, "question");
        // The endpoint says nothing and does not end.
        client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        assert_eq!(joined.join().unwrap().unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
