//! Documents that another node is about to hand over, read while it still serves them.
//!
//! What was read ahead is only a head start: it is used when the rows after it join it, read once the slot
//! is owned here, and forgotten when the slot does not come soon.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use collab_core::document::Document;
use collab_core::ids::{DocumentId, Epoch, RoomEpoch};
use collab_core::limits::PRELOAD_KEPT_FOR;
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::opening;
use crate::bus::Bus;
use crate::memory::{Memory, Share};
use crate::store::{Loaded, Ownership, Store};
use crate::tasks::Tasks;

/// Documents that are read ahead at the same time; those in use come first.
const CONCURRENCY: usize = 4;

/// What was read ahead.
pub(super) struct Preloads {
    ready: Mutex<BTreeMap<DocumentId, Preloaded>>,
    turns: Semaphore,
}

struct Preloaded {
    document: Document,
    share: Share,
    room_epoch: RoomEpoch,
    /// Failovers of the database when it began to be read. Another one may have lost some of it.
    failovers: u64,
    at: Instant,
}

impl Default for Preloads {
    fn default() -> Self {
        Self {
            ready: Mutex::default(),
            turns: Semaphore::new(CONCURRENCY),
        }
    }
}

impl Preloads {
    /// Reads a document that exists and is in good order; anything else is for its opening to judge. Nothing is read without
    /// memory for it.
    pub(super) async fn read(
        &self,
        memory: &Arc<Memory>,
        tasks: &Tasks,
        store: &dyn Store,
        bus: &dyn Bus,
        id: &DocumentId,
    ) {
        let Ok(_turn) = self.turns.acquire().await else {
            return;
        };
        let Some(mut share) = memory.take() else {
            return;
        };
        let failovers = store.failovers().seen;
        if let Ok(Loaded::Live(content)) = opening::load(store, bus, id).await
            && let Ok(document) = opening::replayed(tasks, Epoch(0), &content).await
        {
            let room_epoch = content.room_epoch;
            share.set(document.memory());
            let preloaded = Preloaded {
                document,
                share,
                room_epoch,
                failovers,
                at: Instant::now(),
            };
            self.ready().insert(id.clone(), preloaded);
        }
    }

    /// The document as it is now, if it was read ahead and only rows were added since. Call it once the slot is owned.
    pub(super) async fn finish(
        &self,
        tasks: &Tasks,
        store: &dyn Store,
        ownership: Ownership,
        id: &DocumentId,
    ) -> Option<(Document, Share, RoomEpoch)> {
        let Preloaded {
            mut document,
            share,
            room_epoch,
            ..
        } = self
            .take(id)
            .filter(|preloaded| preloaded.failovers == store.failovers().seen)?;
        let tail = store
            .tail(id, room_epoch, document.committed_seq())
            .await
            .ok()??;
        opening::guarded(tasks, move || {
            document.resume(ownership.epoch, &tail)?;
            Ok(document)
        })
        .await
        .ok()
        .map(|document| (document, share, room_epoch))
    }

    /// Forgets what was read too long ago to be waited for.
    pub(super) fn forget_old(&self) {
        self.ready().retain(|_, preloaded| preloaded.is_fresh());
    }

    fn take(&self, id: &DocumentId) -> Option<Preloaded> {
        self.ready().remove(id).filter(Preloaded::is_fresh)
    }

    fn ready(&self) -> MutexGuard<'_, BTreeMap<DocumentId, Preloaded>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Preloaded {
    fn is_fresh(&self) -> bool {
        self.at.elapsed() < PRELOAD_KEPT_FOR
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use collab_core::document::NO_EDITS;
    use collab_core::ids::{Seq, Slot};
    use collab_core::limits::SLOTS_MIN;
    use uuid::Uuid;

    use super::*;
    use crate::bus::memory::NoBus;
    use crate::store::memory::Database;
    use crate::store::{Append, Claim, Recreate, Registration};

    #[tokio::test]
    async fn what_was_read_before_a_failover_is_read_again() {
        let database = Database::default();
        let store = database.sessions();
        let me = Registration::alone(Uuid::from_u128(1));
        let registered = store.register(&me, SLOTS_MIN, Duration::from_mins(1));
        registered.await.unwrap();
        let claim = store.claim(me.incarnation, &[Slot(1)], Claim::Orphaned);
        let ownership = Ownership {
            slot: Slot(1),
            epoch: claim.await.unwrap()[0].1,
            incarnation: me.incarnation,
        };
        let id = DocumentId::new("a").unwrap();
        let created = store.create(&id, ownership, Recreate::Refused);
        created.await.unwrap();
        let append = Append {
            document: id.clone(),
            seq: Seq(1),
            ownership,
            bytes: Bytes::from_static(&NO_EDITS),
            author: String::new(),
        };
        store.append(&[append]).await.unwrap();

        let (preloads, memory) = (Preloads::default(), Arc::new(Memory::unlimited()));
        let tasks = Tasks::default();
        let read = || preloads.read(&memory, &tasks, &store, &NoBus, &id);
        let finish = || preloads.finish(&tasks, &store, ownership, &id);
        read().await;
        assert!(finish().await.is_some());
        read().await;
        // It loses nothing here, so the stored document still fits.
        database.fail_over(0);
        assert!(finish().await.is_none());
        read().await;
        assert!(finish().await.is_some());
    }
}
