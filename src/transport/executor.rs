//! quinn on our own executor, and the group that owns every task of a transport.
//!
//! quinn's own smol runtime spawns on smol's global executor, where nothing can be joined; this one spawns into a
//! `TaskGroup`. Stopping a group drops its tasks at their next await and waits until all are gone.
//!
//! Invariant: after `stop` no task of the group exists (`a_stopped_group_has_no_tasks`).

use std::fmt;
use std::future::Future;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use async_channel::{Receiver, Sender};
use async_executor::Executor;
use async_io::{Async, Timer};
use futures_lite::future;
use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncTimer, AsyncUdpSocket, ConnectionId, ConnectionIdGenerator, EndpointConfig, UdpPoller};
use ring::rand::{SecureRandom, SystemRandom};

/// `None` if `work` takes longer than `limit`.
pub(super) async fn within<Output>(limit: Duration, work: impl Future<Output = Output>) -> Option<Output> {
    future::or(async { Some(work.await) }, async {
        Timer::after(limit).await;
        None
    })
    .await
}

/// A panic while holding the lock leaves maps that are still whole: every critical section here is a few inserts.
pub(super) fn lock<Value>(mutex: &Mutex<Value>) -> MutexGuard<'_, Value> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Owns tasks: they end when it is stopped, and `stop` returns when they have.
pub(super) struct TaskGroup {
    executor: Arc<Executor<'static>>,
    /// Closing it ends every task.
    stop: Sender<()>,
    stopped: Receiver<()>,
    /// Each task holds a clone; when the last is gone, `ended` closes.
    alive: Mutex<Option<Sender<()>>>,
    ended: Receiver<()>,
}

impl TaskGroup {
    pub fn new(executor: Arc<Executor<'static>>) -> Arc<TaskGroup> {
        let (stop, stopped) = async_channel::bounded(1);
        let (alive, ended) = async_channel::bounded(1);
        Arc::new(TaskGroup { executor, stop, stopped, alive: Mutex::new(Some(alive)), ended })
    }

    /// After `stop` the work is dropped at once.
    pub fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) {
        let Some(alive) = lock(&self.alive).clone() else { return };
        let stopped = self.stopped.clone();
        let task = async move {
            future::or(work, async {
                // Nothing is ever sent: this returns when the group is stopped.
                let _ = stopped.recv().await;
            })
            .await;
            drop(alive);
        };
        self.executor.spawn(task).detach();
    }

    /// Waits until every task has ended by itself, at most `limit`.
    pub async fn finish(&self, limit: Duration) {
        lock(&self.alive).take();
        within(limit, async {
            let _ = self.ended.recv().await;
        })
        .await;
    }

    pub async fn stop(&self) {
        lock(&self.alive).take();
        self.stop.close();
        let _ = self.ended.recv().await;
    }

    #[cfg(test)]
    pub fn tasks(&self) -> usize {
        let own = usize::from(lock(&self.alive).is_some());
        self.ended.sender_count() - own
    }
}

/// Connection ids without quinn's checksum. That one is keyed anew at each start, and a node that came back after a crash
/// would ignore its peers' old connections instead of resetting them.
struct PlainConnectionIds;

const CONNECTION_ID_BYTES: usize = 8;

impl ConnectionIdGenerator for PlainConnectionIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; CONNECTION_ID_BYTES];
        SystemRandom::new().fill(&mut id).expect("the kernel's random numbers made this process's keys");
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// An endpoint whose next start, with the same secret, resets what this one leaves behind.
pub(super) fn endpoint_config(reset_secret: &[u8; 32]) -> EndpointConfig {
    let reset = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, reset_secret);
    let mut config = EndpointConfig::new(Arc::new(reset));
    config.cid_generator(|| Box::new(PlainConnectionIds));
    config
}

/// quinn's view of our executor.
pub(super) struct QuicRuntime(pub Arc<TaskGroup>);

impl fmt::Debug for QuicRuntime {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("QuicRuntime")
    }
}

#[derive(Debug)]
struct QuicTimer(Timer);

impl AsyncTimer for QuicTimer {
    fn reset(mut self: Pin<&mut Self>, at: Instant) {
        self.0.set_at(at);
    }

    fn poll(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<()> {
        Pin::new(&mut self.0).poll(context).map(|_| ())
    }
}

#[derive(Debug)]
struct QuicSocket {
    io: Async<UdpSocket>,
    state: UdpSocketState,
}

/// Each poller owns the future it waits with, so that several connections may wait for the same socket.
struct WritablePoller {
    socket: Arc<QuicSocket>,
    waiting: Option<Pin<Box<dyn Future<Output = io::Result<()>> + Send + Sync>>>,
}

impl fmt::Debug for WritablePoller {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("WritablePoller")
    }
}

impl UdpPoller for WritablePoller {
    fn poll_writable(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        let socket = self.socket.clone();
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(async move { socket.io.writable().await }));
        let result = ready!(waiting.as_mut().poll(context));
        self.waiting = None;
        Poll::Ready(result)
    }
}

impl AsyncUdpSocket for QuicSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(WritablePoller { socket: self, waiting: None })
    }

    fn try_send(&self, transmit: &Transmit) -> io::Result<()> {
        self.state.send((&self.io).into(), transmit)
    }

    fn poll_recv(
        &self,
        context: &mut Context,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.io.poll_readable(context))?;
            if let Ok(count) = self.state.recv((&self.io).into(), buffers, meta) {
                return Poll::Ready(Ok(count));
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.io.as_ref().local_addr()
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.state.gro_segments()
    }
}

impl quinn::Runtime for QuicRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        Box::pin(QuicTimer(Timer::at(at)))
    }

    fn spawn(&self, work: Pin<Box<dyn Future<Output = ()> + Send>>) {
        self.0.spawn(work);
    }

    fn wrap_udp_socket(&self, socket: UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Arc::new(QuicSocket { io: Async::new(socket)?, state }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_group_has_no_tasks() {
        let executor = Arc::new(Executor::new());
        let group = TaskGroup::new(executor.clone());
        for _ in 0..3 {
            group.spawn(future::pending());
        }
        assert_eq!(group.tasks(), 3);
        future::block_on(executor.run(group.stop()));
        assert_eq!(group.tasks(), 0);
        assert!(executor.is_empty());
        group.spawn(future::pending());
        assert_eq!(group.tasks(), 0);
    }
}
