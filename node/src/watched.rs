//! A value with a notice of each change.
//!
//! Like `tokio::sync::watch`, which wakes those who wait in a random order; here it is the order in
//! which they began to wait, so that a simulation plays the same way each time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// The value. A clone is the same value.
#[derive(Clone, Debug, Default)]
pub struct Watched<T> {
    shared: Arc<Shared<T>>,
}

#[derive(Debug, Default)]
struct Shared<T> {
    state: Mutex<State<T>>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State<T> {
    version: u64,
    value: T,
}

/// Follows a value from the moment it was made.
#[derive(Clone, Debug)]
pub struct Watcher<T> {
    shared: Arc<Shared<T>>,
    seen: u64,
}

impl<T: Clone> Watched<T> {
    /// Begins with this value.
    pub fn new(value: T) -> Self {
        let state = State { version: 0, value };
        let shared = Shared {
            state: Mutex::new(state),
            changed: Notify::new(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// The value now.
    pub fn get(&self) -> T {
        self.shared.state().value.clone()
    }

    /// Follows it: [`Watcher::changed`] tells of changes after this call.
    pub fn watch(&self) -> Watcher<T> {
        let seen = self.shared.state().version;
        Watcher {
            shared: self.shared.clone(),
            seen,
        }
    }

    /// Changes the value; `change` says whether those who watch are to know.
    pub fn change(&self, change: impl FnOnce(&mut T) -> bool) {
        let mut state = self.shared.state();
        if change(&mut state.value) {
            state.version += 1;
            drop(state);
            self.shared.changed.notify_waiters();
        }
    }
}

impl<T: Clone> Watcher<T> {
    /// The value now; its changes up to here are seen.
    pub fn get(&mut self) -> T {
        let state = self.shared.state();
        self.seen = state.version;
        state.value.clone()
    }

    /// Waits for a change that is not seen yet. Loses nothing when it is dropped before its end.
    pub async fn changed(&mut self) {
        loop {
            // Made before the look, so that a change between look and wait is heard.
            let changed = self.shared.changed.notified();
            let version = self.shared.state().version;
            if version != self.seen {
                self.seen = version;
                return;
            }
            changed.await;
        }
    }
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn a_change_is_told_once_whenever_it_came() {
        let value = Watched::<u32>::default();
        let mut watcher = value.watch();
        assert_eq!(watcher.changed().now_or_never(), None);
        value.change(|value| {
            *value = 1;
            true
        });
        assert_eq!(watcher.changed().now_or_never(), Some(()));
        assert_eq!(watcher.changed().now_or_never(), None);
        value.change(|value| {
            *value = 2;
            false
        });
        assert_eq!(watcher.changed().now_or_never(), None);
        assert_eq!(watcher.get(), 2);
    }
}
