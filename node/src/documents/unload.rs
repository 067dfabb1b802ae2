//! Which documents leave when memory is short: those that nobody has open, the least recently used first.
//!
//! One that somebody has open stays, and so does one with an edit that is not durable yet.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use collab_core::ids::DocumentId;
use tokio::time::{sleep, timeout};

use super::{Documents, ToDocument};

/// Between two looks when nobody waits for memory: open documents grow.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What was asked to leave has mostly left after this time.
const LEAVES_WITHIN: Duration = Duration::from_millis(10);

/// A document that may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Idle {
    /// When it was last used, from the start of the node.
    pub(super) since: Duration,
    /// Bytes that it takes.
    pub(super) memory: u64,
}

impl Documents {
    /// Unloads documents when memory is short, for ever.
    pub async fn keep_within_memory(self: Arc<Self>) {
        loop {
            let _ = timeout(LOOK_EVERY, self.memory_wanted.notified()).await;
            let waiting = self.waiting_for_memory.load(Ordering::Relaxed);
            let short = self.memory.short_of(waiting);
            if 0 < short {
                self.unload(short);
                sleep(LEAVES_WITHIN).await;
            }
        }
    }

    fn unload(&self, short: u64) {
        let open = self.open();
        let idle = open.documents.iter();
        let idle = idle.filter_map(|(id, entry)| Some((id, entry.meter.counts.idle()?)));
        for id in least_recently_used(idle.collect(), short) {
            if let Some(entry) = open.documents.get(id) {
                let _ = entry.task.send(ToDocument::Unload);
            }
        }
    }
}

/// As many as free what is short, or all of them.
fn least_recently_used(mut idle: Vec<(&DocumentId, Idle)>, short: u64) -> Vec<&DocumentId> {
    idle.sort_unstable_by_key(|(id, idle)| (idle.since, *id));
    let mut freed = 0;
    let needed = idle.into_iter().take_while(|(_, idle)| {
        let is_needed = freed < short;
        freed += idle.memory;
        is_needed
    });
    needed.map(|(id, _)| id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_leave_and_no_more_than_needed() {
        let ids = ["a", "b", "c", "d"].map(|id| DocumentId::new(id).expect("valid"));
        let at = [30, 10, 20, 10].map(Duration::from_secs);
        let idle = || {
            let both = ids.iter().zip(at);
            both.map(|(id, since)| (id, Idle { since, memory: 100 }))
                .collect::<Vec<_>>()
        };
        let leave = |short| {
            let leave = least_recently_used(idle(), short).into_iter();
            leave.map(DocumentId::as_str).collect::<String>()
        };
        assert_eq!(leave(1), "b");
        assert_eq!(leave(100), "b");
        assert_eq!(leave(101), "bd");
        assert_eq!(leave(250), "bdc");
        assert_eq!(leave(1_000), "bdca");
    }
}
