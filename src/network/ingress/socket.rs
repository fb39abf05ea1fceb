//! A TCP connection for hyper: reads only what has come, and tells the other side when no more will be written.
//!
//! hyper looks for input at every step of a request; `Async<TcpStream>` makes a system call of each look, this one only
//! after the reactor has seen input. And `Async<TcpStream>` only flushes when it is closed: a tunnel's half-close would
//! never arrive.

use async_io::Async;
use futures_lite::{AsyncRead, AsyncWrite};
use hyper::rt::{Read, ReadBufCursor, Write};
use rustix::net::sockopt;
use std::cell::RefCell;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

const READ_BYTES_MAX: usize = 16 << 10;
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
/// How long the other side of a connection may take nothing, or not answer the kernel.
pub const STALLED_LIMIT: Duration = Duration::from_secs(120);

thread_local! {
    /// hyper's buffers may not be initialised; what comes is copied there, which is less than zeroing them each time.
    static SCRATCH: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES_MAX]);
}

/// For a connection whose other side may vanish without a word. What can't be set is done without.
pub fn tune(stream: &Async<TcpStream>, stalled_limit: Duration) {
    let _ = stream.get_ref().set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(stream, true);
    let _ = sockopt::set_tcp_keepidle(stream, KEEPALIVE_AFTER);
    let _ = sockopt::set_tcp_user_timeout(stream, stalled_limit.as_millis() as u32);
}

pub struct Socket {
    inner: Async<TcpStream>,
    /// The last read found nothing.
    is_drained: bool,
}

impl Socket {
    pub fn new(inner: Async<TcpStream>) -> Socket {
        Socket { inner, is_drained: false }
    }

    fn poll_input(&mut self, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        loop {
            if self.is_drained {
                ready!(self.inner.poll_readable(context))?;
                self.is_drained = false;
            }
            match io::Read::read(&mut self.inner.get_ref(), buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.is_drained = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => return Poll::Ready(outcome),
            }
        }
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut [u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_input(context, buffer)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, pieces)
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The kernel sends by itself.
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.inner.get_ref().shutdown(Shutdown::Write))
    }
}

impl Read for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let length = buffer.remaining().min(scratch.len());
            let read = ready!(self.poll_input(context, &mut scratch[..length]))?;
            buffer.put_slice(&scratch[..read]);
            Poll::Ready(Ok(()))
        })
    }
}

impl Write for Socket {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write(self, context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_flush(self, context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        AsyncWrite::poll_close(self, context)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        AsyncWrite::poll_write_vectored(self, context, pieces)
    }
}
