//! Ends work that nothing has woken for too long.
//!
//! For work whose own waits end, or wake it more often than that: then it waits for a client that takes nothing.
//!
//! Invariant: work that is woken in time goes on to its end, also when the machine is slow
//! (`only_what_nothing_wakes_is_ended`).

use super::clock::Clock;
use crate::tasks::lock;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

/// The work's own waker: the timer of its watch must not count.
struct Bell {
    has_rung: AtomicBool,
    task: Mutex<Waker>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.has_rung.store(true, Ordering::Release);
        lock(&self.task).wake_by_ref();
    }
}

pub async fn unless_stalled(work: impl Future<Output = ()>, clock: Arc<Clock>, limit: Duration) {
    let mut work = pin!(work);
    let bell = Arc::new(Bell { has_rung: AtomicBool::new(true), task: Mutex::new(Waker::noop().clone()) });
    let waker = Waker::from(bell.clone());
    let mut woken_at = Instant::now();
    // Not moved at each waking: it rings once in `limit` and finds when that was.
    let mut alarm = clock.until(woken_at + limit);
    poll_fn(|context| {
        lock(&bell.task).clone_from(context.waker());
        if bell.has_rung.swap(false, Ordering::Acquire) {
            woken_at = Instant::now();
            if work.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                return Poll::Ready(());
            }
        }
        while Pin::new(&mut alarm).poll(context).is_ready() {
            if woken_at.elapsed() >= limit {
                tracing::debug!("a client takes nothing: its stream is ended");
                return Poll::Ready(());
            }
            alarm = clock.until(woken_at + limit);
        }
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tasks::TaskGroup;
    use async_executor::Executor;
    use futures_lite::future;
    use std::cell::Cell;

    #[test]
    fn only_what_nothing_wakes_is_ended() {
        let executor = Arc::new(Executor::new());
        let tasks = TaskGroup::new(executor.clone());
        let clock = Clock::new(tasks.clone());
        let (limit, is_done) = (Duration::from_millis(600), Cell::new(false));
        let woken = async {
            for _ in 0..4 {
                // With the same clock as the watch: on a slow machine both are due at once.
                clock.after(limit / 2).await;
            }
            is_done.set(true);
        };
        let stalled = unless_stalled(future::pending(), clock.clone(), limit);
        async_io::block_on(executor.run(async {
            let begin = Instant::now();
            future::zip(unless_stalled(woken, clock.clone(), limit), stalled).await;
            assert!(is_done.get() && begin.elapsed() >= limit);
            tasks.stop().await;
        }));
    }
}
