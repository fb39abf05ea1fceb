//! The newest state, shared with readers: a pointer swap, and a wake-up for those who wait for a change.

use crate::state::State;
use std::sync::{Arc, Mutex, PoisonError};

#[derive(Clone)]
pub struct Snapshot {
    pub state: Arc<State>,
    /// The index of the last entry in it.
    pub applied: u64,
}

pub struct Published {
    newest: Mutex<Snapshot>,
    watchers: Mutex<Vec<async_channel::Sender<()>>>,
}

/// Told of changes; several in a row may come as one.
pub struct Watch {
    changed: async_channel::Receiver<()>,
}

impl Published {
    pub(crate) fn new(state: State, applied: u64) -> Published {
        Published {
            newest: Mutex::new(Snapshot { state: Arc::new(state), applied }),
            watchers: Mutex::new(Vec::new()),
        }
    }

    pub fn newest(&self) -> Snapshot {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn publish(&self, state: State, applied: u64) {
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
