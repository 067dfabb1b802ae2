//! What an open document does beside its edits: snapshots, memory, and all that ends it or holds it still.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Duration;

use collab_core::document::Input;
use collab_core::ids::Epoch;
use collab_core::limits::UNLOAD_AFTER;
use collab_core::mutants::Mutant;
use collab_core::wire::relay::Unavailable;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::opening::End;
use super::serving::{Owned, Snapshotted};
use super::tally::Tally;
use super::unload::Idle;
use super::{Answer, AskError, PRESENCE_TICK, QUIET_TICK, Reply, TICK, ToDocument, snapshot};
use crate::queue;
use crate::store::{Fence, NewSnapshot};

/// An append that takes longer says that the store is away.
const STORE_AWAY_AFTER: Duration = Duration::from_secs(1);
/// After this time a damaged document is loaded again: a person may have repaired it.
const DEGRADED_RECHECK: Duration = Duration::from_secs(10);

impl Owned {
    /// With a tail this long a snapshot is worth a short wait; one that fails is not tried again at once.
    pub(super) fn must_settle(&self) -> bool {
        self.snapshot_is_urgent() && !self.document.is_settled() && !self.store_is_away()
    }

    pub(super) fn snapshot_is_urgent(&self) -> bool {
        self.document.snapshot_is_overdue()
            && self.snapshot_running.is_none()
            && self
                .snapshot_begun
                .is_none_or(|begun| TICK <= begun.elapsed())
    }

    /// Keeps the state for the next opening if the database may have lost some of it.
    pub(super) fn rescue(&self, end: &End) {
        let failed_over = self.failovers != self.documents.store.failovers().seen;
        if failed_over && matches!(end, End::Moved(_) | End::Reload) {
            let state = catch_unwind(AssertUnwindSafe(|| self.document.encode_state()));
            if let Ok(state) = state {
                let mut open = self.documents.open();
                open.rescued.insert(self.name.clone(), state);
            }
        }
    }

    /// Waits until all is durable and lets nothing in until the slot's fate is decided.
    pub(super) async fn frozen(
        &mut self,
        inputs: &mut queue::Receiver<ToDocument>,
        settled: oneshot::Sender<()>,
        backlog: &mut VecDeque<ToDocument>,
    ) -> Option<End> {
        if let Some(end) = self.settle().await {
            return Some(end);
        }
        let _ = settled.send(());
        // What clients send now waits: the next owner gets it from them, or this one after a thaw.
        loop {
            match inputs.recv().await? {
                ToDocument::Thaw => return None,
                ToDocument::Release(epoch) if self.ownership.epoch < epoch => {
                    for message in backlog.drain(..) {
                        if let ToDocument::Attach(edge, sender, _) = message {
                            self.edges.insert(edge, sender);
                        }
                    }
                    return Some(End::Moved(epoch));
                }
                message => backlog.push_back(message),
            }
        }
    }

    pub(super) async fn settle(&mut self) -> Option<End> {
        while !self.document.is_settled() {
            let event = self.log_events.recv().await?;
            if let Some(end) = self.logged(event) {
                return Some(end);
            }
        }
        None
    }

    /// Something is on its way, or must be looked at soon.
    pub(super) fn is_busy(&self) -> bool {
        !self.document.is_settled()
            || self.presence_changed
            || self.snapshot_running.is_some()
            || self.document.snapshot_is_due()
    }

    pub(super) fn next_tick(&self) -> Instant {
        let now = Instant::now();
        if self.is_busy() {
            return now + TICK;
        }
        let is_watched = self.damage.is_some() || self.document.presence().next().is_some();
        let later = now
            + if is_watched {
                PRESENCE_TICK
            } else {
                QUIET_TICK
            };
        let unused_at = self.idle_since + UNLOAD_AFTER;
        if self.document.is_idle() {
            // Not at once: it could not leave.
            later.min(unused_at.max(now + TICK))
        } else {
            later
        }
    }

    pub(super) async fn tick(&mut self, inputs: &queue::Receiver<ToDocument>) -> Option<End> {
        let now = self.documents.started.elapsed();
        let end = self.handle(Input::Expire { now });
        self.weigh();
        self.tell_idle();
        if std::mem::take(&mut self.presence_changed) {
            self.documents
                .bus
                .publish_presence(&self.name, self.presence())
                .await;
        }
        if let Some(damage) = &self.damage
            && DEGRADED_RECHECK <= damage.found_at.elapsed()
        {
            return Some(End::Reload);
        }
        if self.store_is_away() {
            self.handle(Input::StoreAway);
        }
        let settled = self.document.is_settled();
        if settled && self.document.snapshot_is_due() {
            self.start_snapshot();
        }
        let unused = self.document.is_idle() && UNLOAD_AFTER <= self.idle_since.elapsed();
        if unused && settled && self.snapshot_running.is_none() {
            if 0 < self.document.tail() {
                self.start_snapshot();
            } else if self.leave_table(inputs) {
                self.count_unloaded("unused");
                return Some(End::Unused);
            }
        }
        end
    }

    /// Leaves at once if nobody has the document open and all of it is durable. There is no time for a snapshot: the log has the
    /// rest.
    pub(super) fn unload(&self, inputs: &queue::Receiver<ToDocument>) -> Option<End> {
        let failovers = self.documents.store.failovers();
        let may_leave = self.has_no_use()
            && self.snapshot_running.is_none()
            // The others learn first that nobody is there any more.
            && !self.presence_changed
            // The database may have lost what memory holds.
            && self.failovers == failovers.seen
            && !failovers.is_pending()
            && self.leave_table(inputs);
        may_leave.then(|| {
            self.count_unloaded("memory");
            End::Unused
        })
    }

    pub(super) fn count_unloaded(&self, reason: &str) {
        let unloaded = &self.documents.metrics.documents_unloaded;
        unloaded.with_label_values(&[reason]).inc();
    }

    /// Tells what memory the document takes, and what else is counted.
    pub(super) fn weigh(&mut self) {
        self.share.set(self.document.memory());
        self.tally
            .replace(Tally::of(&self.document), &self.documents.metrics);
    }

    /// Nobody has it open, and all of it is durable. Edges stay a while after their last socket, in case it comes back; they
    /// do not count.
    pub(super) fn has_no_use(&self) -> bool {
        self.document.connections() == 0 && self.document.is_settled()
    }

    pub(super) fn used(&mut self) {
        self.used_at = Instant::now();
        if self.document.is_idle() {
            self.idle_since = self.used_at;
        }
        let connections = u32::try_from(self.document.connections()).unwrap_or(u32::MAX);
        let counted = &self.counts.connections;
        counted.store(connections, Ordering::Relaxed);
        self.tell_idle();
    }

    /// Tells whether the document may leave when memory is short.
    pub(super) fn tell_idle(&self) {
        let idle = self.has_no_use().then(|| Idle {
            since: self.used_at.duration_since(self.documents.started),
            memory: self.share.bytes(),
        });
        self.counts.set_idle(idle);
    }

    /// An append has been on its way for longer than appends take.
    pub(super) fn store_is_away(&self) -> bool {
        self.unsettled_since
            .is_some_and(|since| STORE_AWAY_AFTER <= since.elapsed())
    }

    /// Takes the document out of the table unless somebody has just asked for it.
    pub(super) fn leave_table(&self, inputs: &queue::Receiver<ToDocument>) -> bool {
        let mut open = self.documents.open();
        let unused = inputs.is_empty();
        if unused
            && open
                .documents
                .get(&self.name)
                .is_some_and(|entry| entry.id == self.id)
        {
            open.documents.remove(&self.name);
        }
        unused
    }

    pub(super) fn start_snapshot(&mut self) {
        if self.snapshot_running.is_some() {
            return;
        }
        let snapshot = NewSnapshot {
            document: self.name.clone(),
            ownership: self.ownership,
            room_epoch: self.room_epoch,
            seq: if Mutant::SnapshotWithGap.is_active() {
                self.document.committed_seq().next()
            } else {
                self.document.committed_seq()
            },
            bytes: self.document.whole_state(),
        };
        let (seq, state) = (snapshot.seq, snapshot.bytes.clone());
        let failovers = self.failovers;
        let (done, running) = oneshot::channel();
        self.snapshot_running = Some(running);
        self.snapshot_begun = Some(Instant::now());
        let documents = self.documents.clone();
        self.documents.tasks.spawn(async move {
            let stored = snapshot::write(
                &documents.tasks,
                documents.store.as_ref(),
                documents.bus.as_ref(),
                &documents.metrics,
                snapshot,
                failovers,
            )
            .await;
            let _ = done.send(stored.map(|whole| Snapshotted { seq, state, whole }));
        });
    }

    /// Deletes the document once nothing of it is on its way, and ends.
    pub(super) async fn delete(&mut self, reply: Reply) -> Option<End> {
        if let Some(end) = self.settle().await {
            return Some(end);
        }
        let last = self.document.committed_seq();
        let (answer, end) = match self
            .documents
            .store
            .delete(&self.name, self.ownership, last)
            .await
        {
            Ok(Fence::Held) => {
                let reason = "the document was deleted".to_owned();
                (
                    Ok(Answer::Deleted),
                    End::Unavailable(Unavailable::Deleted, reason),
                )
            }
            Ok(Fence::Fenced) => {
                let epoch = Epoch(self.ownership.epoch.0 + 1);
                (Err(AskError::Moved(self.name.clone())), End::Moved(epoch))
            }
            // Whether it is gone is not known: loading it again tells.
            Err(error) => {
                let reason = error.to_string();
                (
                    Err(AskError::Unavailable {
                        document: self.name.clone(),
                        reason,
                    }),
                    End::Reload,
                )
            }
        };
        let _ = reply.send(answer);
        Some(end)
    }
}
