//! The group that owns every task of a transport, a server, a resolver; and time limits for what they await.
//!
//! Stopping a group drops its tasks at their next await and waits until all are gone.
//!
//! Invariant: after `stop` no task of the group exists (`a_stopped_group_has_no_tasks`).

use async_channel::{Receiver, Sender};
use async_executor::{Executor, Task};
use async_io::Timer;
use futures_lite::{FutureExt, future};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// `None` if `work` takes longer than `limit`.
pub async fn within<Output>(limit: Duration, work: impl Future<Output = Output>) -> Option<Output> {
    future::or(async { Some(work.await) }, async {
        Timer::after(limit).await;
        None
    })
    .await
}

/// Runs `work` on a thread that may block, from now on; dropped before it began, it never does.
///
/// All kinds of work become one type here: what the compiler makes for each of them was 2 kB.
pub fn unblock<Output: Send + 'static>(
    work: impl FnOnce() -> Output + Send + 'static,
) -> Pin<Box<dyn Future<Output = Output> + Send>> {
    let place = Arc::new(Mutex::new(None));
    let own = place.clone();
    let boxed: Box<dyn FnOnce() + Send> = Box::new(move || {
        let made = work();
        *lock(&own) = Some(made);
    });
    let task = smol::unblock(boxed);
    Box::pin(async move {
        task.await;
        lock(&place).take().expect("the work has run to its end")
    })
}

pub trait Launch {
    /// `spawn` with all work of one kind of result as one type, as in `unblock`.
    fn launch<Output: Send + 'static>(
        &self,
        work: impl Future<Output = Output> + Send + 'static,
    ) -> Task<Output>;
}

impl Launch for Executor<'static> {
    fn launch<Output: Send + 'static>(
        &self,
        work: impl Future<Output = Output> + Send + 'static,
    ) -> Task<Output> {
        self.spawn(work.boxed())
    }
}

/// A panic while holding the lock leaves maps that are still whole: every critical section here is a few inserts.
pub fn lock<Value>(mutex: &Mutex<Value>) -> MutexGuard<'_, Value> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Owns tasks: they end when it is stopped, and `stop` returns when they have.
pub struct TaskGroup {
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
        let work = work.boxed();
        let task = async move {
            future::or(work, async {
                // Nothing is ever sent: this returns when the group is stopped.
                let _ = stopped.recv().await;
            })
            .await;
            drop(alive);
        };
        self.executor.launch(task).detach();
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
        self.halt();
        let _ = self.ended.recv().await;
    }

    /// Begins what `stop` waits for.
    pub fn halt(&self) {
        lock(&self.alive).take();
        self.stop.close();
    }

    /// How many there are.
    pub fn tasks(&self) -> usize {
        let own = usize::from(lock(&self.alive).is_some());
        self.ended.sender_count() - own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocking_work_returns_what_it_made() {
        let made = unblock(|| String::from("made"));
        assert_eq!(future::block_on(made), "made");
    }

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
