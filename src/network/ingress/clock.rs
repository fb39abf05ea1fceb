//! Time limits of many requests by one timer.
//!
//! A limit is met within a quarter of a second, which is enough for limits of seconds. A timer of the reactor for each would
//! cost two system calls a request. Nothing runs while nobody waits.

use crate::tasks::{TaskGroup, lock};
use async_io::Timer;
use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(250);

#[derive(Default)]
struct State {
    sleepers: BTreeMap<(Instant, u64), Waker>,
    next: u64,
    is_ticking: bool,
}

pub struct Clock {
    state: Mutex<State>,
    tasks: Arc<TaskGroup>,
}

/// Ends at `at` or a little later.
pub struct Sleep {
    clock: Arc<Clock>,
    at: Instant,
    id: Option<u64>,
}

impl Clock {
    pub fn new(tasks: Arc<TaskGroup>) -> Arc<Clock> {
        Arc::new(Clock { state: Mutex::default(), tasks })
    }

    pub fn until(self: &Arc<Self>, at: Instant) -> Sleep {
        Sleep { clock: self.clone(), at, id: None }
    }

    pub fn after(self: &Arc<Self>, wait: Duration) -> Sleep {
        self.until(Instant::now() + wait)
    }

    fn wait(self: &Arc<Self>, at: Instant, id: Option<u64>, waker: &Waker) -> u64 {
        let mut state = lock(&self.state);
        let id = id.unwrap_or_else(|| {
            state.next += 1;
            state.next
        });
        match state.sleepers.get_mut(&(at, id)) {
            Some(old) => old.clone_from(waker),
            None => drop(state.sleepers.insert((at, id), waker.clone())),
        }
        if !std::mem::replace(&mut state.is_ticking, true) {
            self.tasks.spawn(tick(self.clone()));
        }
        id
    }

    fn forget(&self, at: Instant, id: u64) {
        lock(&self.state).sleepers.remove(&(at, id));
    }

    /// Those whose time has come; `None` when nobody waits any more.
    fn due(&self, now: Instant) -> Option<Vec<Waker>> {
        let mut state = lock(&self.state);
        let later = state.sleepers.split_off(&(now, u64::MAX));
        let due = std::mem::replace(&mut state.sleepers, later);
        state.is_ticking = !(due.is_empty() && state.sleepers.is_empty());
        state.is_ticking.then(|| due.into_values().collect())
    }
}

async fn tick(clock: Arc<Clock>) {
    loop {
        Timer::after(TICK).await;
        let Some(due) = clock.due(Instant::now()) else { return };
        due.into_iter().for_each(Waker::wake);
    }
}

impl Sleep {
    fn move_to(&mut self, at: Instant) {
        if let Some(id) = self.id.take() {
            self.clock.forget(self.at, id);
        }
        self.at = at;
    }
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if Instant::now() >= self.at {
            return Poll::Ready(());
        }
        let id = self.clock.wait(self.at, self.id, context.waker());
        self.id = Some(id);
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        self.move_to(self.at);
    }
}

impl hyper::rt::Sleep for Sleep {}

/// hyper's view of it.
#[derive(Clone)]
pub struct HyperClock(pub Arc<Clock>);

impl hyper::rt::Timer for HyperClock {
    fn sleep(&self, wait: Duration) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(self.0.after(wait))
    }

    fn sleep_until(&self, at: Instant) -> Pin<Box<dyn hyper::rt::Sleep>> {
        Box::pin(self.0.until(at))
    }

    fn reset(&self, sleep: &mut Pin<Box<dyn hyper::rt::Sleep>>, at: Instant) {
        match sleep.as_mut().downcast_mut_pin::<Sleep>() {
            Some(mut sleep) => sleep.move_to(at),
            None => *sleep = self.sleep_until(at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use async_executor::Executor;
    use futures_lite::future;

    #[test]
    fn sleepers_wake_in_time_and_the_clock_stops_after_the_last() {
        let executor = Arc::new(Executor::new());
        let tasks = TaskGroup::new(executor.clone());
        let clock = Clock::new(tasks.clone());
        async_io::block_on(executor.run(async {
            let begin = Instant::now();
            let waits = [30, 10, 20].map(|ms| clock.after(Duration::from_millis(ms)));
            // Given up before its time.
            let _ = future::poll_once(clock.after(Duration::from_secs(9))).await;
            for wait in waits {
                wait.await;
            }
            assert!(begin.elapsed() >= Duration::from_millis(30) && begin.elapsed() < Duration::from_secs(3));
            while tasks.tasks() > 0 {
                assert!(begin.elapsed() < Duration::from_secs(5), "it ticks for nobody");
                Timer::after(Duration::from_millis(10)).await;
            }
            assert!(lock(&clock.state).sleepers.is_empty());
            // It starts again.
            clock.after(Duration::from_millis(10)).await;
            tasks.stop().await;
        }));
    }
}
