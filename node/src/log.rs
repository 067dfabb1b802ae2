//! The group commit: waiting appends of all documents of this node go to the store together.
//!
//! There is no timer. An idle log commits at once; what arrives while a batch is on its way is the
//! next batch. At most two batches are in flight, never two that share a slot: a slot whose last
//! batch is unresolved waits, so that positions enter the log in order and a claim never waits for
//! more than one statement. A batch whose outcome is not known is resolved before anything else of
//! its slots. An append that the store refuses for ever ends its document and holds up nothing else; nor does a lock
//! that somebody holds on a slot: see [`HeldUp`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use collab_core::ids::{DocumentId, Epoch, Seq, Slot};
use collab_core::limits::{BATCH_BYTES_MAX, BATCH_UPDATES_MAX, BATCHES_IN_FLIGHT_MAX};
use collab_core::mutants::Mutant;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio::task::{JoinHandle, yield_now};
use tokio::time::{Instant, sleep};

use crate::members::Members;
use crate::metrics::Metrics;
use crate::queue;
use crate::store::{Append, Ownership, Store, StoreError};
use crate::tasks::Tasks;

/// Between two tries to resolve a batch whose outcome is not known.
const RESOLVE_EVERY: Duration = Duration::from_millis(100);

/// What became of appends of one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogEvent {
    /// Everything up to this position is durable.
    Committed(Seq),
    /// Another owner has the slot: acknowledge nothing and let the document go.
    Fenced,
    /// The position holds other bytes: what is in memory is wrong, load again.
    Conflict,
    /// The store will never take it: the document cannot go on.
    Refused,
}

/// Hands appends to the group commit.
#[derive(Clone, Debug)]
pub struct Log {
    queue: queue::Sender<Queued>,
}

#[derive(Debug)]
struct Queued {
    append: Append,
    /// Failovers of the database when its document was opened.
    failovers: u64,
    reply: queue::Sender<LogEvent>,
}

impl Log {
    /// Starts the log; the second part is its task, which runs until every handle is gone.
    pub fn new(
        store: Arc<dyn Store>,
        members: Arc<Members>,
        metrics: Metrics,
        tasks: Tasks,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (queue, queued) = queue::unbounded();
        let writer = Writer {
            store,
            members,
            metrics,
            tasks,
        };
        (Self { queue }, run(Arc::new(writer), queued))
    }

    /// Queues an append of a document that was opened after so many `failovers` of the database. `reply` gets exactly one
    /// event for it, or a later position's.
    pub fn append(&self, append: Append, failovers: u64, reply: queue::Sender<LogEvent>) {
        // The log ends with the process only.
        let _ = self.queue.send(Queued {
            append,
            failovers,
            reply,
        });
    }
}

struct Writer {
    store: Arc<dyn Store>,
    members: Arc<Members>,
    metrics: Metrics,
    tasks: Tasks,
}

async fn run(writer: Arc<Writer>, mut queued: queue::Receiver<Queued>) {
    let mut waiting = VecDeque::<Queued>::new();
    let mut busy = BTreeSet::<Slot>::new();
    let mut held_up = HeldUp::default();
    let mut flights = FuturesUnordered::<JoinHandle<Landed>>::new();
    // Documents whose log has a hole in this process: what they queued after it must not be written.
    let mut ended = Vec::<queue::Sender<LogEvent>>::new();
    loop {
        tokio::select! {
            biased;
            Some(landed) = flights.next() => match landed {
                Ok(landed) => {
                    busy.retain(|slot| !landed.slots.contains(slot));
                    held_up.landed(&landed.slots, !landed.locked.is_empty());
                    for queued in landed.locked.into_iter().rev() {
                        waiting.push_front(queued);
                    }
                    ended.extend(landed.ended);
                }
                Err(error) => std::panic::resume_unwind(error.into_panic()),
            },
            next = queued.recv() => {
                let Some(next) = next else { return };
                waiting.push_back(next);
                // Those who are to see the edits come first, and what they bring meanwhile goes with this batch.
                yield_now().await;
                while let Ok(next) = queued.try_recv() {
                    waiting.push_back(next);
                }
            }
        }
        ended.retain(|reply| !reply.is_closed());
        waiting.retain(|queued| {
            let ended = ended.iter().any(|reply| reply.same_channel(&queued.reply));
            !ended && !queued.reply.is_closed()
        });
        while flights.len() < BATCHES_IN_FLIGHT_MAX {
            let mut batch = held_up.take_batch(&mut waiting);
            if batch.is_empty() {
                let may_go = |slot| !busy.contains(&slot) && !held_up.turns.contains(&slot);
                batch = take_batch(&mut waiting, may_go);
            }
            if batch.is_empty() {
                break;
            }
            let slots: BTreeSet<Slot> = batch
                .iter()
                .map(|queued| queued.append.ownership.slot)
                .collect();
            if !Mutant::TwoBatchesPerSlot.is_active() {
                busy.extend(&slots);
            }
            let flying = writer.clone();
            flights.push(
                writer
                    .tasks
                    .spawn(async move { flying.commit(slots, batch).await }),
            );
        }
    }
}

/// A batch that came to its end.
struct Landed {
    slots: BTreeSet<Slot>,
    /// Documents that cannot go on.
    ended: Vec<queue::Sender<LogEvent>>,
    /// The whole batch, if it waited in vain for a lock.
    locked: Vec<Queued>,
}

/// Slots whose batch waited in vain for a lock. Each goes alone now, one at a time and in turn: whoever holds a lock on
/// one slot holds up no other, and one flight is always left for those that were never held up.
#[derive(Debug, Default)]
struct HeldUp {
    turns: VecDeque<Slot>,
    flying: Option<Slot>,
}

impl HeldUp {
    /// The next batch of such a slot, unless one is in flight.
    fn take_batch(&mut self, waiting: &mut VecDeque<Queued>) -> Vec<Queued> {
        while self.flying.is_none()
            && let Some(turn) = self.turns.pop_front()
        {
            let batch = take_batch(waiting, |slot| slot == turn);
            // The documents of a slot may have been let go meanwhile.
            if !batch.is_empty() {
                self.flying = Some(turn);
                return batch;
            }
        }
        Vec::new()
    }

    fn landed(&mut self, slots: &BTreeSet<Slot>, locked: bool) {
        self.flying = self.flying.filter(|slot| !slots.contains(slot));
        if locked {
            self.turns.extend(slots);
        }
    }
}

/// Takes what may go now, in order: of slots that `may_go`, one epoch per slot (the fence
/// speaks of slots, so a stale append must not ride with a fresh one), of documents that were opened between the same
/// failovers, and within the bounds of a batch.
fn take_batch(waiting: &mut VecDeque<Queued>, may_go: impl Fn(Slot) -> bool) -> Vec<Queued> {
    let mut batch = Vec::new();
    let mut epochs = BTreeMap::<Slot, Epoch>::new();
    let mut failovers = None;
    let mut bytes = 0;
    let mut passed_over = VecDeque::new();
    while let Some(next) = waiting.pop_front() {
        let size = next.append.bytes.len();
        let full = batch.len() == BATCH_UPDATES_MAX
            || (!batch.is_empty() && BATCH_BYTES_MAX < bytes + size);
        if full {
            waiting.push_front(next);
            break;
        }
        let Ownership { slot, epoch, .. } = next.append.ownership;
        if !may_go(slot)
            || *epochs.entry(slot).or_insert(epoch) != epoch
            || *failovers.get_or_insert(next.failovers) != next.failovers
        {
            passed_over.push_back(next);
        } else {
            bytes += size;
            batch.push(next);
        }
    }
    passed_over.append(waiting);
    *waiting = passed_over;
    batch
}

impl Writer {
    /// Brings a batch to a known end and tells its documents.
    async fn commit(&self, slots: BTreeSet<Slot>, batch: Vec<Queued>) -> Landed {
        self.metrics
            .append_batch_updates
            .observe(f64::from(u32::try_from(batch.len()).unwrap_or(u32::MAX)));
        let appends: Vec<Append> = batch.iter().map(|queued| queued.append.clone()).collect();
        let failovers = batch.first().map_or(0, |queued| queued.failovers);
        let begun = Instant::now();
        let resolved = self.resolve(&appends, failovers).await;
        self.metrics
            .append_seconds
            .observe(begun.elapsed().as_secs_f64());
        let Ok(outcomes) = resolved else {
            return Landed {
                slots,
                ended: Vec::new(),
                locked: batch,
            };
        };
        // One event per document: its last position, or what went wrong first.
        let mut events = BTreeMap::<DocumentId, (LogEvent, queue::Sender<LogEvent>)>::new();
        for (queued, outcome) in batch.into_iter().zip(outcomes) {
            let Queued { append, reply, .. } = queued;
            match events.get_mut(&append.document) {
                Some((LogEvent::Committed(seq), _)) if outcome == Outcome::Committed => {
                    *seq = append.seq.max(*seq);
                }
                Some((earlier @ LogEvent::Committed(_), _)) => *earlier = outcome.event(append.seq),
                Some(_) => {}
                None => {
                    events.insert(append.document, (outcome.event(append.seq), reply));
                }
            }
        }
        let mut ended = Vec::new();
        for (document, (event, reply)) in events {
            if matches!(event, LogEvent::Conflict | LogEvent::Refused) {
                ended.push(reply.clone());
            }
            if event == LogEvent::Fenced {
                self.members.look_now();
                tracing::info!(document.id = %document, "append refused: the slot has a new owner");
            }
            // A document that was let go meanwhile needs no answer.
            let _ = reply.send(event);
        }
        Landed {
            slots,
            ended,
            locked: Vec::new(),
        }
    }

    /// Appends until every outcome is known, or a lock was waited for in vain. The statement is keyed by document and
    /// position, so that saying it again is safe.
    ///
    /// Not after another failover of the database: the new primary may lack the positions before, and may think again that this
    /// node owns a slot that it has lost since.
    async fn resolve(&self, appends: &[Append], failovers: u64) -> Result<Vec<Outcome>, Locked> {
        loop {
            let now = self.store.failovers();
            // Until the slots are taken back nothing is written, and the document has yet to be brought back from memory.
            if now.seen != failovers && !now.is_pending() {
                return Ok(vec![Outcome::Fenced; appends.len()]);
            }
            // Without the lease others may adopt: what is queued waits for a renewal or for the fence.
            if self.members.lease_held() {
                match self.try_once(appends).await {
                    Ok(outcomes) => return Ok(outcomes),
                    Err(StoreError::Locked(error)) => {
                        tracing::warn!(%error, updates = appends.len(), "somebody holds a lock on a slot; its updates wait");
                        return Err(Locked);
                    }
                    Err(StoreError::Unusable(reason)) => match appends {
                        [append] => {
                            tracing::error!(document.id = %append.document, seq = %append.seq, reason, "the store refuses an append for ever");
                            return Ok(vec![Outcome::Refused]);
                        }
                        _ => return self.resolve_each(appends, failovers).await,
                    },
                    Err(error) => {
                        self.metrics.store_up.set(0);
                        tracing::warn!(%error, updates = appends.len(), "an append has no known outcome; asking again");
                    }
                }
            }
            sleep(RESOLVE_EVERY).await;
        }
    }

    /// Finds out which append of a batch is refused for ever: the documents of the others go on.
    async fn resolve_each(
        &self,
        appends: &[Append],
        failovers: u64,
    ) -> Result<Vec<Outcome>, Locked> {
        let mut ended = BTreeMap::<&DocumentId, Outcome>::new();
        let mut outcomes = Vec::with_capacity(appends.len());
        for append in appends {
            let outcome = if let Some(earlier) = ended.get(&append.document) {
                *earlier
            } else {
                let alone = std::slice::from_ref(append);
                let alone = Box::pin(self.resolve(alone, failovers)).await?;
                alone.first().copied().unwrap_or(Outcome::Refused)
            };
            if outcome != Outcome::Committed {
                ended.insert(&append.document, outcome);
            }
            outcomes.push(outcome);
        }
        Ok(outcomes)
    }

    async fn try_once(&self, appends: &[Append]) -> Result<Vec<Outcome>, StoreError> {
        let done = self.store.append(appends).await?;
        if done.inserted.len() == appends.len() {
            return Ok(vec![Outcome::Committed; appends.len()]);
        }
        let held: BTreeSet<Slot> = done.held.into_iter().collect();
        let inserted: BTreeSet<(DocumentId, Seq)> = done.inserted.into_iter().collect();
        let key = |append: &Append| (append.document.clone(), append.seq);
        let in_doubt: Vec<(DocumentId, Seq)> = appends
            .iter()
            .filter(|append| held.contains(&append.ownership.slot))
            .map(key)
            .filter(|key| !inserted.contains(key))
            .collect();
        // Read in a second statement: the first one's snapshot may be older than the rows it met.
        let written = if in_doubt.is_empty() {
            Vec::new()
        } else {
            self.store.written(&in_doubt).await?
        };
        let outcomes = appends.iter().map(|append| {
            if !held.contains(&append.ownership.slot) {
                self.metrics.updates_fenced.inc();
                return Outcome::Fenced;
            }
            if inserted.contains(&key(append)) {
                return Outcome::Committed;
            }
            let crc32c = crc32c::crc32c(&append.bytes);
            let same = written.iter().any(|row| {
                row.document == append.document
                    && row.seq == append.seq
                    && row.epoch == append.ownership.epoch
                    && row.crc32c == crc32c
            });
            if same || Mutant::ConflictIsSuccess.is_active() {
                Outcome::Committed
            } else {
                Outcome::Conflict
            }
        });
        Ok(outcomes.collect())
    }
}

/// A lock was waited for in vain. What an earlier try wrote is found when the batch is sent again.
struct Locked;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Committed,
    Fenced,
    Conflict,
    Refused,
}

impl Outcome {
    const fn event(self, seq: Seq) -> LogEvent {
        match self {
            Self::Committed => LogEvent::Committed(seq),
            Self::Fenced => LogEvent::Fenced,
            Self::Conflict => LogEvent::Conflict,
            Self::Refused => LogEvent::Refused,
        }
    }
}

#[cfg(test)]
mod tests {
    use collab_core::limits::SLOTS_MIN;
    use uuid::Uuid;

    use super::*;
    use crate::store::memory::Database;
    use crate::store::{Recreate, Registration};

    #[test]
    fn a_batch_keeps_the_order_and_leaves_slots_in_flight_alone() {
        let mut waiting: VecDeque<Queued> = [("a", 1, 1), ("b", 2, 1), ("a", 1, 2), ("c", 3, 1)]
            .into_iter()
            .map(queued)
            .collect();
        let batch = take_batch(&mut waiting, |slot| slot != Slot(2));
        assert_eq!(names(&batch), ["a1", "a2", "c1"]);
        assert_eq!(names(waiting.make_contiguous()), ["b1"]);
        assert_eq!(names(&take_batch(&mut waiting, |_| true)), ["b1"]);
    }

    #[test]
    fn a_batch_is_bounded_and_what_is_left_keeps_its_order() {
        let many = i64::try_from(BATCH_UPDATES_MAX).unwrap() + 2;
        let mut waiting: VecDeque<Queued> = (1..=many).map(|seq| queued(("a", 1, seq))).collect();
        waiting.push_front(queued(("b", 2, 7)));
        let batch = take_batch(&mut waiting, |slot| slot != Slot(2));
        assert_eq!(batch.len(), BATCH_UPDATES_MAX);
        assert_eq!(names(waiting.make_contiguous()), ["b7", "a1001", "a1002"]);
    }

    #[test]
    fn appends_of_two_epochs_of_a_slot_never_share_a_batch() {
        let mut stale = queued(("a", 1, 9));
        stale.append.ownership.epoch = Epoch(0);
        let mut waiting = VecDeque::from([stale, queued(("a", 1, 5)), queued(("b", 2, 1))]);
        assert_eq!(names(&take_batch(&mut waiting, |_| true)), ["a9", "b1"]);
        assert_eq!(names(&take_batch(&mut waiting, |_| true)), ["a5"]);
    }

    #[test]
    fn appends_from_before_and_after_a_failover_never_share_a_batch() {
        let mut stale = queued(("b", 2, 9));
        stale.failovers = 1;
        let mut waiting = VecDeque::from([queued(("a", 1, 5)), stale, queued(("c", 3, 1))]);
        assert_eq!(names(&take_batch(&mut waiting, |_| true)), ["a5", "c1"]);
        assert_eq!(names(&take_batch(&mut waiting, |_| true)), ["b9"]);
    }

    #[test]
    fn slots_that_are_held_up_go_alone_and_in_turn() {
        let mut waiting: VecDeque<Queued> = [
            ("a", 1, 1),
            ("b", 2, 1),
            ("c", 3, 1),
            ("b", 2, 2),
            ("d", 4, 1),
        ]
        .into_iter()
        .map(queued)
        .collect();
        let mut held_up = HeldUp::default();
        held_up.landed(&BTreeSet::from([Slot(1), Slot(2), Slot(7)]), true);
        assert_eq!(names(&held_up.take_batch(&mut waiting)), ["a1"]);
        assert!(held_up.take_batch(&mut waiting).is_empty(), "one at a time");
        // Another batch lands meanwhile.
        held_up.landed(&BTreeSet::from([Slot(3)]), false);
        assert!(held_up.take_batch(&mut waiting).is_empty());

        waiting.push_front(queued(("a", 1, 1)));
        held_up.landed(&BTreeSet::from([Slot(1)]), true);
        assert_eq!(names(&held_up.take_batch(&mut waiting)), ["b1", "b2"]);
        held_up.landed(&BTreeSet::from([Slot(2)]), false);
        // Slot 7 has nothing to write any more.
        assert_eq!(names(&held_up.take_batch(&mut waiting)), ["a1"]);
        held_up.landed(&BTreeSet::from([Slot(1)]), false);
        assert!(held_up.take_batch(&mut waiting).is_empty() && held_up.turns.is_empty());
        assert_eq!(names(waiting.make_contiguous()), ["c1", "d1"]);
    }

    /// The new primary had lost the positions before, and the claim that had fenced the batch: the log got a hole.
    #[tokio::test]
    async fn what_waits_for_its_outcome_is_not_written_after_a_failover() {
        let database = Database::default();
        let store: Arc<dyn Store> = Arc::new(database.sessions());
        let me = Uuid::from_u128(1);
        let registration = Registration::alone(me);
        let (metrics, tasks) = (Metrics::new(), Tasks::default());
        let members = Members::new(
            store.clone(),
            metrics.clone(),
            registration,
            SLOTS_MIN,
            true,
        );
        tokio::spawn(members.clone().keep_lease());
        while !members.lease_held() {
            sleep(Duration::from_millis(1)).await;
        }
        let owned = store.map(0).await.unwrap().slots;
        let document = DocumentId::new("a").unwrap();
        let mut append = queued(("a", 1, 1)).append;
        append.ownership.epoch = owned[1].epoch;
        append.ownership.incarnation = me;
        let created = store.create(&document, append.ownership, Recreate::Refused);
        created.await.unwrap();
        let writer = Writer {
            store,
            members,
            metrics,
            tasks,
        };
        let write = async |append: &Append, failovers| {
            let resolved = writer.resolve(std::slice::from_ref(append), failovers);
            resolved.await.ok().unwrap()
        };
        let before = writer.store.failovers().seen;
        assert_eq!(write(&append, before).await, [Outcome::Committed]);
        append.seq = Seq(2);
        database.fail_over(1);
        // It does not know any more that it owned the slot; the new primary does.
        let taken = writer.store.reclaim(me, &[]).await.unwrap();
        assert_eq!(taken, []);
        assert_eq!(write(&append, before).await, [Outcome::Fenced]);
        append.seq = Seq(1);
        let after = writer.store.failovers().seen;
        assert_eq!(write(&append, after).await, [Outcome::Committed]);
    }

    fn queued((document, slot, seq): (&str, u16, i64)) -> Queued {
        let ownership = Ownership {
            slot: Slot(slot),
            epoch: Epoch(1),
            incarnation: Uuid::nil(),
        };
        let append = Append {
            document: DocumentId::new(document).unwrap(),
            seq: Seq(seq),
            ownership,
            bytes: bytes::Bytes::from_static(b"x"),
            author: String::new(),
        };
        Queued {
            append,
            failovers: 0,
            reply: queue::unbounded().0,
        }
    }

    fn names(batch: &[Queued]) -> Vec<String> {
        batch
            .iter()
            .map(|queued| format!("{}{}", queued.append.document, queued.append.seq))
            .collect()
    }
}
