//! The open documents: one task each, which feeds the state machine of `collab_core::document` and
//! performs its effects.
//!
//! A document is opened by the first edge that attaches and closed when nobody has been attached for a
//! while, when its slot moves, or when something is wrong with it; whatever ends the task ends the
//! channels of its edges, and they look for the owner again. A panic inside one document throws away
//! that document's memory and nothing else.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use collab_core::document::EdgeId;
use collab_core::ids::{DocumentId, Epoch, Slot};
use collab_core::limits::{MEMORY_WAIT, OPENING_BYTES};
use collab_core::wire::map::SharedMap;
use collab_core::wire::relay::{Channel, ToEdge, ToOwner};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, sleep, timeout};

use crate::beats::beat_after;
use crate::bus::Bus;
use crate::log::Log;
use crate::members::Members;
use crate::memory::{Memory, Share};
use crate::metrics::Metrics;
use crate::queue;
use crate::store::{Created, Recreate, Store, StoreError};
use crate::tasks::Tasks;

mod damage;
mod meter;
mod opening;
mod preload;
mod serving;
mod snapshot;
mod tally;
mod unload;
mod upkeep;

use meter::Meter;
use opening::Host;
use preload::Preloads;

pub use meter::Load;

/// Between two looks whether memory was freed.
const MEMORY_RETRY: Duration = Duration::from_millis(20);
/// Between two looks at the clock while something is on its way: snapshots that are due, a store that does not answer.
const TICK: Duration = Duration::from_secs(1);
/// The same of a document in which nothing happens but that presence may expire.
const PRESENCE_TICK: Duration = Duration::from_secs(5);
/// The same where there is none: memory that is not needed any more.
const QUIET_TICK: Duration = Duration::from_secs(25);

/// Where the owner's messages for one edge go.
#[derive(Clone, Debug)]
pub enum EdgeSender {
    /// An edge of this process.
    Local(queue::Sender<ToEdge>),
    /// A channel of a stream to another node, which takes encoded frames.
    Remote(queue::Sender<Bytes>, Channel),
}

impl EdgeSender {
    fn send(&self, message: ToEdge) {
        // An edge that is gone is detached by its own end.
        let _ = match self {
            Self::Local(edge) => edge.send(message).is_ok(),
            Self::Remote(stream, channel) => stream.send(message.encode(*channel)).is_ok(),
        };
    }
}

/// An open channel between an edge and a document of this node. Dropping it detaches.
#[derive(Debug)]
pub struct Attachment {
    edge: EdgeId,
    document: queue::Sender<ToDocument>,
}

impl Attachment {
    /// Passes a message on. `false`: the document is closed; attach again.
    pub fn send(&self, message: ToOwner) -> bool {
        self.document
            .send(ToDocument::FromEdge(self.edge, message))
            .is_ok()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        let _ = self.document.send(ToDocument::Detach(self.edge));
    }
}

/// A question to the owner of a document.
#[derive(Debug)]
pub enum Question {
    /// The text of a `Y.Text`, by name.
    Text(String),
    /// The whole state as a V1 update.
    State,
    /// Who is there: client id and JSON of each.
    Presence,
}

/// An answer of the owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To [`Question::Text`].
    Text(String),
    /// To [`Question::State`].
    State(Bytes),
    /// To [`Question::Presence`].
    Presence(Vec<(u64, String)>),
    /// To a deletion.
    Deleted,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// There is no such document.
    #[error("there is no document {0}")]
    Absent(DocumentId),
    /// Another node owns it; ask there.
    #[error("document {0} has moved; try again")]
    Moved(DocumentId),
    /// Its node has no memory left for it.
    #[error("{NO_MEMORY}: document {0}")]
    Full(DocumentId),
    /// It cannot be served.
    #[error("document {document} cannot be served: {reason}")]
    Unavailable {
        /// The document.
        document: DocumentId,
        /// Why.
        reason: String,
    },
}

/// Why a document is not opened, for people.
const NO_MEMORY: &str = "its node has no memory left for another document; try again later";

/// Where an answer goes.
type Reply = oneshot::Sender<Result<Answer, AskError>>;

#[derive(Debug)]
enum ToDocument {
    Attach(EdgeId, EdgeSender, Bytes),
    FromEdge(EdgeId, ToOwner),
    Detach(EdgeId),
    Ask(Question, Reply),
    Delete(Reply),
    Freeze(oneshot::Sender<()>),
    Thaw,
    Release(Epoch),
    /// Memory is short: leave, if nobody needs it.
    Unload,
}

/// The documents that this node owns and has open.
pub struct Documents {
    store: Arc<dyn Store>,
    members: Arc<Members>,
    log: Log,
    bus: Arc<dyn Bus>,
    memory: Arc<Memory>,
    /// Somebody waits for memory.
    memory_wanted: Notify,
    waiting_for_memory: AtomicU64,
    metrics: Metrics,
    tasks: Tasks,
    open: Mutex<Open>,
    load: Mutex<Load>,
    preloads: Preloads,
    next_id: AtomicU64,
    started: Instant,
}

#[derive(Default)]
struct Open {
    documents: BTreeMap<DocumentId, Entry>,
    /// Slots that are being handed over: nothing of them is opened.
    frozen: BTreeSet<Slot>,
    /// Documents of this node's slots that were found damaged.
    degraded: BTreeSet<DocumentId>,
    /// The states of documents under which the database failed over: it may have lost what they hold.
    rescued: BTreeMap<DocumentId, Bytes>,
}

struct Entry {
    id: u64,
    slot: Slot,
    meter: Meter,
    task: queue::Sender<ToDocument>,
}

/// Whether opening a document that does not exist creates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Missing {
    Create,
    Refuse,
}

impl Documents {
    /// No document is open yet.
    pub fn new(
        store: Arc<dyn Store>,
        members: Arc<Members>,
        log: Log,
        bus: Arc<dyn Bus>,
        memory: Memory,
        metrics: Metrics,
        tasks: Tasks,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            members,
            log,
            bus,
            memory: Arc::new(memory),
            memory_wanted: Notify::new(),
            waiting_for_memory: AtomicU64::new(0),
            metrics,
            tasks,
            open: Mutex::default(),
            load: Mutex::default(),
            preloads: Preloads::default(),
            next_id: AtomicU64::new(1),
            started: Instant::now(),
        })
    }

    /// When documents and their rooms are looked at that are due at this time.
    pub(crate) fn beat_after(&self, time: Instant) -> Instant {
        beat_after(self.started, time)
    }

    /// Opens a channel from an edge to a document, which is opened if it is not. What the document says
    /// goes to `sender`; the end of `sender`'s other half means: attach again, wherever the owner is then.
    pub fn attach(
        self: &Arc<Self>,
        document: &DocumentId,
        since: Bytes,
        sender: EdgeSender,
    ) -> Attachment {
        let edge = EdgeId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let mut open = self.open();
        let task = self.task_of(&mut open, document, Missing::Create);
        // The entry is removed under the same lock before the task ends: this is heard.
        let _ = task.send(ToDocument::Attach(edge, sender, since));
        Attachment {
            edge,
            document: task,
        }
    }

    /// Asks a document that exists, opening it if need be.
    ///
    /// # Errors
    /// When there is no such document, or it is not served here.
    pub async fn ask(
        self: &Arc<Self>,
        document: &DocumentId,
        question: Question,
    ) -> Result<Answer, AskError> {
        self.send(document, |reply| ToDocument::Ask(question, reply))
            .await
    }

    /// Deletes a document; whoever has it open is told.
    ///
    /// # Errors
    /// When there is no such document, it is not served here, or the store does not answer.
    pub async fn delete(self: &Arc<Self>, document: &DocumentId) -> Result<(), AskError> {
        self.send(document, ToDocument::Delete).await.map(|_| ())
    }

    async fn send(
        self: &Arc<Self>,
        document: &DocumentId,
        message: impl FnOnce(Reply) -> ToDocument,
    ) -> Result<Answer, AskError> {
        let (reply, answer) = oneshot::channel();
        {
            let mut open = self.open();
            let task = self.task_of(&mut open, document, Missing::Refuse);
            let _ = task.send(message(reply));
        }
        answer
            .await
            .unwrap_or_else(|_| Err(AskError::Moved(document.clone())))
    }

    /// Creates a document, or begins a new life of a deleted one.
    ///
    /// # Errors
    /// When the slot is not owned here, or the store does not answer.
    pub async fn create(&self, document: &DocumentId) -> Result<Created, AskError> {
        let slot = self.members.slot_of(document);
        let Some(ownership) = self.members.ownership(slot) else {
            return Err(AskError::Moved(document.clone()));
        };
        let unavailable = |error: StoreError| AskError::Unavailable {
            document: document.clone(),
            reason: error.to_string(),
        };
        if !self.is_in(document, slot).await.map_err(unavailable)? {
            return Err(AskError::Moved(document.clone()));
        }
        self.store
            .create(document, ownership, Recreate::Allowed)
            .await
            .map_err(unavailable)
    }

    /// Whether the store has the document in this slot. Asked after the right to the slot was seen, the answer holds for as
    /// long as that right does: a pin raises the epoch of the slot it takes a document from.
    async fn is_in(&self, document: &DocumentId, slot: Slot) -> Result<bool, StoreError> {
        let pinned = self.store.pinned(document).await?;
        let is_there = pinned.unwrap_or_else(|| self.members.home_of(document)) == slot;
        if !is_there {
            self.members.look_now();
        }
        Ok(is_there)
    }

    /// The map as this node has it, for one that does not reach the store.
    pub fn shared_map(&self) -> SharedMap {
        self.members.map().shared()
    }

    /// Number of open documents.
    pub fn count(&self) -> usize {
        self.open().documents.len()
    }

    /// Number of documents of this node that were found damaged.
    pub fn degraded(&self) -> usize {
        self.open().degraded.len()
    }

    /// The slots with open documents.
    pub fn slots_in_use(&self) -> BTreeSet<Slot> {
        let open = self.open();
        open.documents.values().map(|entry| entry.slot).collect()
    }

    /// The open documents of a slot.
    pub fn open_in(&self, slot: Slot) -> Vec<DocumentId> {
        let open = self.open();
        let those = open
            .documents
            .iter()
            .filter(|(_, entry)| entry.slot == slot);
        those.map(|(document, _)| document.clone()).collect()
    }

    /// Reads a document that this node is about to own, so that little is left to read then; says when it is `done`.
    pub fn preload(self: &Arc<Self>, document: DocumentId, done: impl FnOnce() + Send + 'static) {
        let documents = self.clone();
        self.tasks.spawn(async move {
            let Documents {
                preloads,
                memory,
                tasks,
                store,
                bus,
                ..
            } = documents.as_ref();
            preloads
                .read(memory, tasks, store.as_ref(), bus.as_ref(), &document)
                .await;
            done();
        });
    }

    /// Stops the documents of a slot from taking input and waits until all they have is durable.
    pub async fn freeze(&self, slot: Slot) {
        let frozen: Vec<oneshot::Receiver<()>> = {
            let mut open = self.open();
            open.frozen.insert(slot);
            let tasks = open.documents.values().filter(|entry| entry.slot == slot);
            tasks
                .map(|entry| {
                    let (reply, settled) = oneshot::channel();
                    let _ = entry.task.send(ToDocument::Freeze(reply));
                    settled
                })
                .collect()
        };
        for settled in frozen {
            // A document that ended is settled too.
            let _ = settled.await;
        }
    }

    /// Takes [`Documents::freeze`] back: the slot stays.
    pub fn thaw(&self, slot: Slot) {
        self.end_freeze(slot, || ToDocument::Thaw);
    }

    /// Lets the documents of a slot go: it has a new owner since `epoch`.
    pub fn release(&self, slot: Slot, epoch: Epoch) {
        self.end_freeze(slot, || ToDocument::Release(epoch));
    }

    /// Lets every document go whose slot has changed hands. Runs as long as the map is followed.
    pub async fn follow_map(self: Arc<Self>) {
        let mut map = self.members.watch();
        let mut before = map.get();
        loop {
            map.changed().await;
            let map = map.get();
            self.set_degraded(|degraded| {
                let mine = |document: &DocumentId| {
                    self.members
                        .ownership(self.members.slot_of(document))
                        .is_some()
                };
                degraded.retain(mine);
            });
            let open = self.open();
            for entry in open.documents.values() {
                // Also when this node is the owner again: somebody else may have been it meanwhile.
                let epoch = map.epoch(entry.slot);
                if before.epoch(entry.slot) != epoch {
                    let _ = entry.task.send(ToDocument::Release(epoch));
                }
            }
            before = map;
        }
    }

    fn set_degraded(&self, change: impl FnOnce(&mut BTreeSet<DocumentId>)) {
        let mut open = self.open();
        change(&mut open.degraded);
        let count = i64::try_from(open.degraded.len()).unwrap_or(i64::MAX);
        self.metrics.documents_degraded.set(count);
    }

    fn end_freeze(&self, slot: Slot, message: impl Fn() -> ToDocument) {
        let mut open = self.open();
        open.frozen.remove(&slot);
        for entry in open.documents.values().filter(|entry| entry.slot == slot) {
            let _ = entry.task.send(message());
        }
    }

    fn task_of(
        self: &Arc<Self>,
        open: &mut Open,
        document: &DocumentId,
        missing: Missing,
    ) -> queue::Sender<ToDocument> {
        if let Some(entry) = open.documents.get(document) {
            return entry.task.clone();
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let slot = self.members.slot_of(document);
        let (task, inputs) = queue::unbounded();
        let meter = Meter::default();
        let counts = meter.counts.clone();
        open.documents.insert(
            document.clone(),
            Entry {
                id,
                slot,
                meter,
                task: task.clone(),
            },
        );
        let host = Box::new(Host {
            documents: self.clone(),
            document: document.clone(),
            id,
            slot,
            counts,
            inputs,
            held: VecDeque::new(),
            failovers: 0,
        });
        self.tasks.spawn(host.run(missing));
        task
    }

    /// Waits until there is memory for a document.
    async fn take_memory(&self, document: &DocumentId) -> Option<Share> {
        if let Some(share) = self.memory.take() {
            return Some(share);
        }
        if self.open().rescued.contains_key(document) {
            return Some(self.memory.take_anyway(OPENING_BYTES));
        }
        self.waiting_for_memory.fetch_add(1, Ordering::Relaxed);
        let taken = timeout(MEMORY_WAIT, async {
            loop {
                self.memory_wanted.notify_one();
                sleep(MEMORY_RETRY).await;
                if let Some(share) = self.memory.take() {
                    return share;
                }
            }
        });
        let taken = taken.await.ok();
        self.waiting_for_memory.fetch_sub(1, Ordering::Relaxed);
        if taken.is_none() {
            self.metrics.documents_refused.inc();
        }
        taken
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
