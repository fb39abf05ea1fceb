//! The newest state, shared with readers: a pointer swap, and a wake-up for those who wait for a change.

use crate::model::Timestamp;
use crate::state::State;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

#[derive(Clone)]
pub struct Snapshot {
    pub state: Arc<State>,
    /// The index of the last entry in it.
    pub applied: u64,
}

pub struct Published {
    newest: Mutex<Snapshot>,
    /// A cluster time, and when it was that.
    clock: Mutex<(Timestamp, Instant)>,
    watchers: Mutex<Vec<async_channel::Sender<()>>>,
}

/// Told of changes; several in a row may come as one.
pub struct Watch {
    changed: async_channel::Receiver<()>,
}

impl Published {
    pub(crate) fn new(state: State, applied: u64) -> Published {
        Published {
            clock: Mutex::new((state.time(), Instant::now())),
            newest: Mutex::new(Snapshot { state: Arc::new(state), applied }),
            watchers: Mutex::new(Vec::new()),
        }
    }

    pub fn newest(&self) -> Snapshot {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The newest stamp, and what has passed since it came. Never goes back.
    pub fn cluster_time(&self, now: Instant) -> Timestamp {
        let (stamp, at) = *self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        stamp.plus_ms(now.saturating_duration_since(at).as_millis() as u64)
    }

    pub(crate) fn publish(&self, state: State, applied: u64) {
        let now = Instant::now();
        if state.time() > self.cluster_time(now) {
            *self.clock.lock().unwrap_or_else(PoisonError::into_inner) = (state.time(), now);
        }
        *self.newest.lock().unwrap_or_else(PoisonError::into_inner) =
            Snapshot { state: Arc::new(state), applied };
        let mut watchers = self.watchers.lock().unwrap_or_else(PoisonError::into_inner);
        // A full channel holds a wake-up already; a closed one has nobody behind it.
        watchers
            .retain(|watcher| !matches!(watcher.try_send(()), Err(async_channel::TrySendError::Closed(()))));
    }

    pub fn watch(&self) -> Watch {
        let (sender, changed) = async_channel::bounded(1);
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner).push(sender);
        Watch { changed }
    }
}

impl Watch {
    /// Waits for a change since the last call. Returns false once nothing will change any more.
    pub async fn changed(&self) -> bool {
        self.changed.recv().await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::testing::Applier;
    use std::time::Duration;

    #[test]
    fn cluster_time_goes_on_without_entries_and_never_back() {
        let state = Applier::with_nodes(1).state;
        let stamp = state.time();
        let published = Published::new(state.clone(), 1);
        let later = Instant::now() + Duration::from_secs(86_400);
        assert!(published.cluster_time(later) >= stamp.plus_ms(86_400_000));
        published.publish(state, 2);
        assert!(published.cluster_time(later) >= stamp.plus_ms(86_400_000));
    }
}
