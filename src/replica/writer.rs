//! The thread that owns the store: batches in, "number N is durable" out.
//!
//! It takes all batches that wait and writes them in one transaction, so that a slow disk makes transactions larger
//! rather than queues longer. An error ends the node: what can't be written must not be acknowledged.

use super::Mail;
use crate::consensus::Batch;
use crate::control::Input;
use crate::storage::SqliteStore;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Batches that wait for the disk. Raft's own flow control keeps them few; a full queue stops the control thread.
pub const QUEUE_MAX: usize = 1024;

/// When the oldest unfinished write began, in ms since `origin`, plus one; 0 when none is under way.
pub struct WriteWatch {
    origin: Instant,
    since: AtomicU64,
}

impl WriteWatch {
    pub fn new(origin: Instant) -> Arc<WriteWatch> {
        Arc::new(WriteWatch { origin, since: AtomicU64::new(0) })
    }

    pub fn age_ms(&self) -> u64 {
        match self.since.load(Ordering::Relaxed) {
            0 => 0,
            since => self.now_ms().saturating_sub(since - 1),
        }
    }

    fn now_ms(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }

    fn begin(&self) {
        self.since.store(self.now_ms() + 1, Ordering::Relaxed);
    }

    fn end(&self) {
        self.since.store(0, Ordering::Relaxed);
    }
}

/// Returns when the queue is closed, after everything in it has been written.
pub fn run(
    mut store: SqliteStore,
    batches: async_channel::Receiver<Batch>,
    inbox: async_channel::Sender<Mail>,
    watch: Arc<WriteWatch>,
    fail: impl Fn(String),
) {
    while let Ok(first) = batches.recv_blocking() {
        let mut together = vec![first];
        while let Ok(next) = batches.try_recv() {
            together.push(next);
        }
        watch.begin();
        let outcome = store.write_all(&together);
        watch.end();
        if let Err(error) = outcome {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text += &format!(": {cause}");
                source = cause.source();
            }
            fail(text);
            return;
        }
        let number = together.iter().map(|batch| batch.number).max().unwrap_or(0);
        if number > 0 && inbox.send_blocking(Mail::Input(Input::Persisted { number })).is_err() {
            // The control thread has ended; what it submitted before is still written.
            continue;
        }
    }
    store.leave_open();
}
