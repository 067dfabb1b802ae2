//! The open documents: one task each, which feeds the state machine of `collab_core::document` and
//! performs its effects.
//!
//! A document is opened by the first edge that attaches and closed when nobody has been attached for a
//! while, when its slot moves, or when something is wrong with it; whatever ends the task ends the
//! channels of its edges, and they look for the owner again. A panic inside one document throws away
//! that document's memory and nothing else.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use collab_core::document::{Document, EdgeId, Effect, Input, NO_CLOCKS, OpenError, Peer};
use collab_core::ids::{DocumentId, Epoch, RoomEpoch, Seq, Slot};
use collab_core::limits::{
    LARGE_STATE_BYTES, MEMORY_WAIT, OPENING_BYTES, SNAPSHOT_AFTER_UPDATES, SNAPSHOT_URGENT_UPDATES,
    UNLOAD_AFTER,
};
use collab_core::mutants::Mutant;
use collab_core::scan::Summary;
use collab_core::wire::awareness;
use collab_core::wire::map::SharedMap;
use collab_core::wire::relay::{Channel, ToEdge, ToOwner, Unavailable};
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};

use crate::bus::{Bus, CachedSnapshot};
use crate::log::{Log, LogEvent};
use crate::members::Members;
use crate::memory::{Memory, Share};
use crate::metrics::Metrics;
use crate::queue;
use crate::store::{
    Append, Content, Created, Fence, LoadError, Loaded, NewSnapshot, Ownership, Recreate, Store,
    StoreError, StoredSnapshot,
};
use crate::tasks::Tasks;

mod damage;
mod meter;
mod preload;
mod snapshot;
mod tally;
mod unload;

use meter::{Counts, Meter};
use preload::Preloads;
use tally::Tally;
use unload::Idle;

pub use meter::Load;

/// How long a node waits for the map to show it as the owner before it says that it is not.
const OWNERSHIP_WAIT: Duration = Duration::from_millis(500);
/// Between two looks whether memory was freed.
const MEMORY_RETRY: Duration = Duration::from_millis(20);
/// Between two tries to load a document from a store that does not answer.
const LOAD_RETRY: Duration = Duration::from_millis(200);
/// An append that takes longer says that the store is away.
const STORE_AWAY_AFTER: Duration = Duration::from_secs(1);
/// After this time a damaged document is loaded again: a person may have repaired it.
const DEGRADED_RECHECK: Duration = Duration::from_secs(10);
/// Between two looks at the clock: presence that expires, snapshots that are due.
const TICK: Duration = Duration::from_secs(1);

/// Inputs of a document that are taken before others have their turn.
const INPUTS_PER_TURN: usize = 64;
/// An update of this size may take the CRDT library long: it is applied apart from other documents.
const HEAVY_UPDATE_BYTES: usize = 64 * 1024;
/// More than this is not sent as it is stored.
const SHOWN_BYTES_MAX: usize = 64 * 1024 * 1024;
/// An input that takes longer is told in the log.
const HEAVY_AFTER: Duration = Duration::from_secs(2);

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
        let host = Host {
            documents: self.clone(),
            document: document.clone(),
            id,
            slot,
            counts,
            inputs,
            held: VecDeque::new(),
            failovers: 0,
        };
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

/// The task of one document.
struct Host {
    documents: Arc<Documents>,
    document: DocumentId,
    id: u64,
    slot: Slot,
    counts: Arc<Counts>,
    inputs: queue::Receiver<ToDocument>,
    /// What came while the document was built.
    held: VecDeque<ToDocument>,
    /// Failovers of the database when it began to be read.
    failovers: u64,
}

/// Why the task of a document ends.
#[derive(Debug)]
enum End {
    /// Another node owns it since this epoch.
    Moved(Epoch),
    /// There is no such document.
    Absent,
    /// It cannot be served.
    Unavailable(Unavailable, String),
    /// What is in memory is worth nothing: edges attach again and it is loaded anew.
    Reload,
    /// Nobody uses it; it was taken out of the table already.
    Unused,
}

impl Host {
    async fn run(mut self, missing: Missing) {
        let (documents, name) = (self.documents.clone(), self.document.clone());
        // Freed when it is done: a document is open for much longer.
        let opened = Box::pin(self.open(missing)).await;
        let end = match opened {
            Ok(mut owned) => {
                let rescued = documents.open().rescued.remove(&name);
                let state = rescued.map(|state| Input::Restore { state });
                match state.and_then(|state| owned.handle(state)) {
                    Some(end) => (end, BTreeMap::new()),
                    None => {
                        owned
                            .serve(&mut self.inputs, std::mem::take(&mut self.held))
                            .await
                    }
                }
            }
            Err(end) => {
                // Whoever owns it now gets the rest from the clients.
                if !documents.store.failovers().is_pending() {
                    documents.open().rescued.remove(&name);
                }
                (end, BTreeMap::new())
            }
        };
        self.finish(end.0, end.1);
        let mut open = documents.open();
        if open.rescued.contains_key(&name) {
            documents.task_of(&mut open, &name, Missing::Create);
        }
    }

    /// Waits to be the owner, loads, and creates the document if it is to be.
    async fn open(&mut self, missing: Missing) -> Result<Box<Owned>, End> {
        let documents = self.documents.clone();
        // Who asks the wrong node is told so, whatever its memory.
        self.wait_for_ownership().await?;
        let Some(mut share) = documents.take_memory(&self.document).await else {
            return Err(End::Unavailable(Unavailable::Full, NO_MEMORY.to_owned()));
        };
        loop {
            let ownership = self.wait_for_ownership().await?;
            self.failovers = documents.store.failovers().seen;
            let preloaded = documents.preloads.finish(
                &documents.tasks,
                documents.store.as_ref(),
                ownership,
                &self.document,
            );
            // Both after the right was seen, and at the same time: a document on the move has none to lose.
            let is_here = documents.is_in(&self.document, ownership.slot);
            let (is_here, preloaded) = futures::join!(is_here, preloaded);
            match is_here {
                Ok(true) => {}
                // Epochs of another slot say nothing about this one.
                Ok(false) => return Err(End::Moved(Epoch(0))),
                Err(error) => {
                    self.store_failed(&error).await;
                    continue;
                }
            }
            if let Some((document, share, room_epoch)) = preloaded {
                return Ok(self.owned(document, share, ownership, room_epoch, "preload"));
            }
            match load(
                documents.store.as_ref(),
                documents.bus.as_ref(),
                &self.document,
            )
            .await
            {
                Ok(Loaded::Live(content)) => {
                    let room_epoch = content.room_epoch;
                    // At least as much; it is known when it is built.
                    share.set(OPENING_BYTES.max(2 * content.bytes() as u64));
                    return Ok(match self.build(&content, ownership.epoch).await {
                        Ok(document) => self.owned(document, share, ownership, room_epoch, "store"),
                        Err(reason) => self.degraded(content, share, ownership, reason).await,
                    });
                }
                Ok(Loaded::Deleted) => {
                    return Err(End::Unavailable(
                        Unavailable::Deleted,
                        "the document was deleted".to_owned(),
                    ));
                }
                Ok(Loaded::Absent) if missing == Missing::Refuse => return Err(End::Absent),
                Ok(Loaded::Absent) => {
                    let created = documents
                        .store
                        .create(&self.document, ownership, Recreate::Refused)
                        .await;
                    match created {
                        Ok(Created::Created { .. } | Created::Exists) => {}
                        Ok(Created::Fenced) => documents.members.look_now(),
                        Err(error) => self.store_failed(&error).await,
                    }
                }
                Err(LoadError::Damaged {
                    reason, seq, good, ..
                }) => {
                    let reason = format!("at seq {seq}: {reason}");
                    return Ok(self.degraded(*good, share, ownership, reason).await);
                }
                Err(LoadError::Store(error)) => self.store_failed(&error).await,
            }
        }
    }

    /// Builds the document from what was loaded. If it is large, those who come with nothing are sent what is stored
    /// meanwhile: all of it is committed, and it is all there is.
    async fn build(&mut self, content: &Content, epoch: Epoch) -> Result<Document, String> {
        let tasks = self.documents.tasks.clone();
        let mut built = pin!(replayed(&tasks, epoch, content));
        let mut parts: Vec<Bytes> = content.parts().cloned().collect();
        let is_shown = (LARGE_STATE_BYTES..=SHOWN_BYTES_MAX).contains(&content.bytes());
        let Some(last) = parts.pop().filter(|_| is_shown) else {
            return built.await;
        };
        let mut edges = BTreeMap::<EdgeId, EdgeSender>::new();
        let mut answered = Vec::new();
        loop {
            let message = tokio::select! {
                biased;
                Some(message) = self.inputs.recv() => message,
                document = &mut built => {
                    if document.is_err() {
                        // Less of it may be good than was shown.
                        self.held.extend(answered);
                    }
                    return document;
                }
            };
            match &message {
                ToDocument::Attach(edge, sender, _) => {
                    edges.insert(*edge, sender.clone());
                }
                ToDocument::Detach(edge) => {
                    edges.remove(edge);
                }
                ToDocument::FromEdge(
                    edge,
                    ToOwner::Step1 {
                        connection,
                        state_vector,
                    },
                ) if state_vector.as_ref() == NO_CLOCKS
                    && let Some(sender) = edges.get(edge) =>
                {
                    let connection = *connection;
                    for update in parts.iter().cloned() {
                        sender.send(ToEdge::Part { connection, update });
                    }
                    let update = last.clone();
                    sender.send(ToEdge::Step2 { connection, update });
                    answered.push(message);
                    continue;
                }
                _ => {}
            }
            self.held.push_back(message);
        }
    }

    fn owned(
        &self,
        document: Document,
        share: Share,
        ownership: Ownership,
        room_epoch: RoomEpoch,
        from: &'static str,
    ) -> Box<Owned> {
        let metrics = &self.documents.metrics;
        metrics.documents_open.inc();
        metrics.documents_loaded.with_label_values(&[from]).inc();
        self.documents.set_degraded(|degraded| {
            degraded.remove(&self.document);
        });
        let (log_reply, log_events) = queue::unbounded();
        // A future has room for each place that it passes through.
        let mut owned = Box::new(Owned {
            documents: self.documents.clone(),
            name: self.document.clone(),
            id: self.id,
            counts: self.counts.clone(),
            ownership,
            failovers: self.failovers,
            room_epoch,
            document,
            share,
            tally: Tally::default(),
            edges: BTreeMap::new(),
            log_reply,
            log_events,
            waiting: Vec::new(),
            snapshot_running: None,
            snapshot_begun: None,
            presence_changed: false,
            presence: Vec::new(),
            idle_since: Instant::now(),
            used_at: Instant::now(),
            unsettled_since: None,
            opened_at: Instant::now(),
            damage: None,
        });
        owned.weigh();
        owned
    }

    async fn wait_for_ownership(&self) -> Result<Ownership, End> {
        let members = &self.documents.members;
        let mut map = members.watch();
        let owned = async {
            loop {
                map.get();
                let frozen = self.documents.open().frozen.contains(&self.slot);
                // After a failover of the database ownership counts once it is taken back.
                let wait = frozen || self.documents.store.failovers().is_pending();
                if let Some(ownership) = members.ownership(self.slot).filter(|_| !wait) {
                    return ownership;
                }
                members.look_now();
                // A thaw does not change the map: look again after a while.
                let _ = timeout(Duration::from_millis(50), map.changed()).await;
            }
        };
        timeout(OWNERSHIP_WAIT, owned)
            .await
            .map_err(|_| End::Moved(members.map().epoch(self.slot)))
    }

    async fn store_failed(&self, error: &StoreError) {
        tracing::warn!(document.id = %self.document, %error, "cannot open the document yet");
        sleep(LOAD_RETRY).await;
    }

    /// Opens the good part of a damaged document, to be read only.
    async fn degraded(
        &self,
        content: Content,
        share: Share,
        ownership: Ownership,
        reason: String,
    ) -> Box<Owned> {
        tracing::error!(document.id = %self.document, reason, "the stored document is damaged; its good part is served read-only");
        let room_epoch = content.room_epoch;
        let good_part = move || damage::good_part(ownership.epoch, &content);
        let good_part = self.documents.tasks.compute(good_part).await;
        let document = good_part.expect("what panics inside is caught there");
        let mut owned = self.owned(document, share, ownership, room_epoch, "store");
        owned.damage = Some(format!("the stored document is damaged: {reason}"));
        self.documents.set_degraded(|degraded| {
            degraded.insert(self.document.clone());
        });
        owned
    }

    /// Takes the document out of the table and tells everyone who waits, those still in the queue too.
    fn finish(mut self, end: End, mut edges: BTreeMap<EdgeId, EdgeSender>) {
        {
            let mut open = self.documents.open();
            if open
                .documents
                .get(&self.document)
                .is_some_and(|entry| entry.id == self.id)
            {
                open.documents.remove(&self.document);
            }
            self.inputs.close();
        }
        let mut questions = Vec::new();
        while let Ok(message) = self.inputs.try_recv() {
            match message {
                ToDocument::Attach(edge, sender, _) => {
                    edges.insert(edge, sender);
                }
                ToDocument::Detach(edge) => {
                    edges.remove(&edge);
                }
                ToDocument::Ask(_, reply) | ToDocument::Delete(reply) => questions.push(reply),
                ToDocument::Freeze(settled) => drop(settled),
                ToDocument::FromEdge(..)
                | ToDocument::Thaw
                | ToDocument::Release(_)
                | ToDocument::Unload => {}
            }
        }
        let in_slot = self.documents.members.slot_of(&self.document);
        let (for_edges, for_questions) = match end {
            End::Moved(epoch) => (
                ToEdge::Moved {
                    // Epochs of another slot say nothing about the one that the document is in now.
                    epoch: if in_slot == self.slot {
                        epoch
                    } else {
                        Epoch(0)
                    },
                },
                AskError::Moved(self.document.clone()),
            ),
            // Only questions find nothing; an edge that came meanwhile attaches again and creates it.
            End::Absent => (
                ToEdge::Moved { epoch: Epoch(0) },
                AskError::Absent(self.document.clone()),
            ),
            End::Unavailable(Unavailable::Deleted, reason) => {
                let message = ToEdge::Unavailable {
                    cause: Unavailable::Deleted,
                    reason,
                };
                (message, AskError::Absent(self.document.clone()))
            }
            End::Unavailable(Unavailable::Full, reason) => {
                let cause = Unavailable::Full;
                let message = ToEdge::Unavailable { cause, reason };
                (message, AskError::Full(self.document.clone()))
            }
            End::Unavailable(cause, reason) => {
                let error = AskError::Unavailable {
                    document: self.document.clone(),
                    reason: reason.clone(),
                };
                (ToEdge::Unavailable { cause, reason }, error)
            }
            End::Reload | End::Unused => (
                ToEdge::Moved { epoch: Epoch(0) },
                AskError::Moved(self.document.clone()),
            ),
        };
        for sender in edges.values() {
            sender.send(for_edges.clone());
        }
        for question in questions {
            let _ = question.send(Err(for_questions.clone()));
        }
    }
}

/// A document that is open and owned.
struct Owned {
    documents: Arc<Documents>,
    name: DocumentId,
    id: u64,
    counts: Arc<Counts>,
    ownership: Ownership,
    /// Failovers of the database when it began to be read.
    failovers: u64,
    room_epoch: RoomEpoch,
    document: Document,
    /// Of the node's memory.
    share: Share,
    tally: Tally,
    edges: BTreeMap<EdgeId, EdgeSender>,
    log_reply: queue::Sender<LogEvent>,
    log_events: queue::Receiver<LogEvent>,
    /// Answers that wait until what they show is durable.
    waiting: Vec<(Seq, Reply, Answer)>,
    snapshot_running: Option<oneshot::Receiver<Option<Snapshotted>>>,
    /// The last one.
    snapshot_begun: Option<Instant>,
    presence_changed: bool,
    /// What the edges are to be told of it once the turn ends.
    presence: Vec<Bytes>,
    /// Since when no edge is attached.
    idle_since: Instant,
    /// When somebody last came, asked or left.
    used_at: Instant,
    /// When an update began to wait for the log, or the last commit if more wait.
    unsettled_since: Option<Instant>,
    opened_at: Instant,
    /// What is wrong with the stored rows; the document is read-only.
    damage: Option<String>,
}

/// A snapshot that is stored.
struct Snapshotted {
    seq: Seq,
    state: Bytes,
    whole: Summary,
}

impl Drop for Owned {
    fn drop(&mut self) {
        let metrics = &self.documents.metrics;
        metrics.documents_open.dec();
        self.tally.replace(Tally::default(), metrics);
    }
}

impl Owned {
    /// Serves until something ends it.
    async fn serve(
        mut self: Box<Self>,
        inputs: &mut queue::Receiver<ToDocument>,
        mut backlog: VecDeque<ToDocument>,
    ) -> (End, BTreeMap<EdgeId, EdgeSender>) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let end = loop {
            let step = tokio::select! {
                biased;
                Some(event) = self.log_events.recv() => self.logged(event),
                message = next(&mut backlog, inputs), if !self.must_settle() => {
                    self.take_turn(message, inputs, &mut backlog).await
                }
                stored = async { self.snapshot_running.as_mut().expect("guarded").await },
                    if self.snapshot_running.is_some() =>
                {
                    self.snapshot_running = None;
                    if let Ok(Some(Snapshotted { seq, state, whole })) = stored {
                        self.document.set_snapshot(seq, state, whole);
                    }
                    None
                }
                _ = tick.tick() => self.tick(inputs).await,
            };
            self.show_presence();
            if let Some(end) = step {
                break end;
            }
        };
        self.rescue(&end);
        (end, std::mem::take(&mut self.edges))
    }

    /// With a tail this long a snapshot is worth a short wait; one that fails is not tried again at once.
    fn must_settle(&self) -> bool {
        self.snapshot_is_urgent() && !self.document.is_settled() && !self.store_is_away()
    }

    fn snapshot_is_urgent(&self) -> bool {
        SNAPSHOT_URGENT_UPDATES <= self.document.tail()
            && self.snapshot_running.is_none()
            && self
                .snapshot_begun
                .is_none_or(|begun| TICK <= begun.elapsed())
    }

    /// Takes an input and what has come after it by now: who is told of it is woken once for all.
    async fn take_turn(
        &mut self,
        first: Option<ToDocument>,
        inputs: &mut queue::Receiver<ToDocument>,
        backlog: &mut VecDeque<ToDocument>,
    ) -> Option<End> {
        let Some(mut message) = first else {
            return Some(End::Unused);
        };
        let mut end = None;
        for count in 1.. {
            end = match message {
                // Rare: they take memory when they come.
                ToDocument::Freeze(settled) => {
                    Box::pin(self.frozen(inputs, settled, backlog)).await
                }
                ToDocument::Delete(reply) => Box::pin(self.delete(reply)).await,
                ToDocument::Unload => self.unload(inputs),
                message => self.take(message),
            };
            if end.is_some() || count == INPUTS_PER_TURN || self.must_settle() {
                break;
            }
            message = match backlog.pop_front().or_else(|| inputs.try_recv().ok()) {
                Some(next) => next,
                None => break,
            };
        }
        // At once: until the next look many more could be opened.
        self.share.set(self.document.memory());
        end
    }

    /// Keeps the state for the next opening if the database may have lost some of it.
    fn rescue(&self, end: &End) {
        let failed_over = self.failovers != self.documents.store.failovers().seen;
        if failed_over && matches!(end, End::Moved(_) | End::Reload) {
            let state = catch_unwind(AssertUnwindSafe(|| self.document.encode_state()));
            if let Ok(state) = state {
                let mut open = self.documents.open();
                open.rescued.insert(self.name.clone(), state);
            }
        }
    }

    fn take(&mut self, message: ToDocument) -> Option<End> {
        match message {
            ToDocument::Attach(edge, sender, since) => {
                if let Some(damage) = &self.damage {
                    let reason = damage.clone();
                    sender.send(ToEdge::ReadOnly { reason });
                }
                self.edges.insert(edge, sender);
                let end = self.handle(Input::Attach { edge, since });
                self.used();
                end
            }
            ToDocument::Detach(edge) => {
                self.edges.remove(&edge);
                self.presence_changed = true;
                let end = self.handle(Input::Detach { edge });
                self.used();
                end
            }
            ToDocument::FromEdge(edge, message) => {
                let input = self.input(edge, message)?;
                let comes_or_goes = matches!(input, Input::Join { .. } | Input::Leave { .. });
                let end = self.handle(input);
                if comes_or_goes {
                    self.used();
                }
                end
            }
            ToDocument::Ask(question, reply) => {
                self.ask(&question, reply);
                self.used();
                None
            }
            ToDocument::Release(epoch) if self.ownership.epoch < epoch => Some(End::Moved(epoch)),
            // The others are taken by the loop.
            ToDocument::Release(_)
            | ToDocument::Thaw
            | ToDocument::Freeze(_)
            | ToDocument::Delete(_)
            | ToDocument::Unload => None,
        }
    }

    fn input(&self, edge: EdgeId, message: ToOwner) -> Option<Input> {
        let peer = |connection| Peer { edge, connection };
        Some(match message {
            // The channel is open already; its end comes as a detach.
            ToOwner::Attach { .. }
            | ToOwner::Detach
            | ToOwner::Preload { .. }
            | ToOwner::AskMap => return None,
            ToOwner::Join { connection, author } => Input::Join {
                peer: peer(connection),
                author,
            },
            ToOwner::Leave { connection } => Input::Leave {
                peer: peer(connection),
            },
            ToOwner::Step1 {
                connection,
                state_vector,
            } => Input::Step1 {
                peer: peer(connection),
                state_vector,
            },
            ToOwner::Update {
                connection,
                number,
                kind,
                update,
            } => Input::Update {
                peer: peer(connection),
                number,
                kind,
                update,
            },
            ToOwner::Awareness {
                connection,
                payload,
            } => {
                let now = self.documents.started.elapsed();
                Input::Awareness {
                    peer: peer(connection),
                    payload,
                    now,
                }
            }
            ToOwner::QueryAwareness { connection } => Input::QueryAwareness {
                peer: peer(connection),
            },
            ToOwner::Compare {
                connection,
                number,
                update,
            } => Input::Compare {
                peer: peer(connection),
                number,
                update,
            },
            ToOwner::Stateless {
                connection,
                payload,
            } => Input::Stateless {
                peer: peer(connection),
                payload,
            },
        })
    }

    /// Feeds the state machine. A panic in it ends this document only, and the socket whose input it was.
    fn handle(&mut self, input: Input) -> Option<End> {
        let culprit = match &input {
            Input::Update { peer, .. }
            | Input::Compare { peer, .. }
            | Input::Awareness { peer, .. }
            | Input::Step1 { peer, .. } => Some(*peer),
            _ => None,
        };
        let large = match &input {
            Input::Update { update, .. } => HEAVY_UPDATE_BYTES <= update.len(),
            Input::Step1 { .. } | Input::Attach { .. } => self.document.is_large(),
            _ => false,
        };
        let begun = Instant::now();
        let document = &mut self.document;
        let work = move || {
            catch_unwind(AssertUnwindSafe(|| {
                #[cfg(debug_assertions)]
                panic_on_request(&input);
                document.handle(input)
            }))
        };
        let handled = if large {
            self.documents.tasks.compute_here(work)
        } else {
            work()
        };
        if HEAVY_AFTER < begun.elapsed() {
            tracing::warn!(document.id = %self.name, duration_ms = begun.elapsed().as_millis(), "an input took long");
        }
        if let Ok(effects) = handled {
            let reload = effects.contains(&Effect::Reload);
            for effect in effects {
                self.perform(effect);
            }
            reload.then_some(End::Reload)
        } else {
            self.documents.metrics.document_panics.inc();
            tracing::error!(document.id = %self.name, "an input made the document panic; it is loaded again");
            if let Some(peer) = culprit
                && let Some(edge) = self.edges.get(&peer.edge)
            {
                let reason = "this input cannot be handled".to_owned();
                edge.send(ToEdge::Refused {
                    connection: peer.connection,
                    reason,
                });
            }
            Some(End::Reload)
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::FanOut { from, update } => {
                if Mutant::UpdateDropped.is_active()
                    && self.documents.next_id.fetch_add(1, Ordering::Relaxed) % 1_000 == 999
                {
                    return;
                }
                for (edge, sender) in &self.edges {
                    let except = from
                        .filter(|peer| peer.edge == *edge)
                        .map(|peer| peer.connection);
                    sender.send(ToEdge::FanOut {
                        except,
                        update: update.clone(),
                    });
                }
            }
            Effect::Presence { payload } => {
                self.presence_changed = true;
                self.presence.push(payload);
            }
            Effect::Send { to, message } => {
                if let Some(sender) = self.edges.get(&to) {
                    sender.send(message);
                }
            }
            Effect::Append {
                seq,
                update,
                author,
            } => {
                self.counts.update(update.len());
                let append = Append {
                    document: self.name.clone(),
                    seq,
                    ownership: self.ownership,
                    bytes: update,
                    author,
                };
                self.unsettled_since.get_or_insert_with(Instant::now);
                let (log, reply) = (&self.documents.log, self.log_reply.clone());
                log.append(append, self.failovers, reply);
            }
            Effect::NotAdmitted { reason } => {
                self.documents
                    .metrics
                    .updates_refused
                    .with_label_values(&[reason])
                    .inc();
            }
            Effect::Reload => {
                tracing::error!(document.id = %self.name, "an update failed half-way; the document is loaded again");
            }
        }
    }

    /// Tells the edges what became known of who is there, all of it at once.
    fn show_presence(&mut self) {
        let payload = match self.presence.as_slice() {
            [] => return,
            [one] => one.clone(),
            several => awareness::merge(several.iter().map(Bytes::as_ref)),
        };
        // Most documents are idle at any moment.
        self.presence = Vec::new();
        for sender in self.edges.values() {
            let payload = payload.clone();
            sender.send(ToEdge::Presence { payload });
        }
    }

    fn logged(&mut self, event: LogEvent) -> Option<End> {
        match event {
            LogEvent::Committed(seq) => {
                let end = self.handle(Input::Committed { seq });
                let settled = self.document.is_settled();
                self.unsettled_since = (!settled).then(Instant::now);
                if settled && self.snapshot_is_urgent() {
                    self.start_snapshot();
                }
                let durable = self.waiting.extract_if(.., |(after, ..)| *after <= seq);
                for (_, reply, answer) in durable {
                    let _ = reply.send(Ok(answer));
                }
                end
            }
            LogEvent::Fenced => {
                // Whoever took the slot raised its epoch by one at least.
                let epoch = Epoch(self.ownership.epoch.0 + 1);
                Some(End::Moved(epoch))
            }
            LogEvent::Conflict => {
                tracing::error!(document.id = %self.name, "the log holds other bytes than memory; the document is loaded again");
                Some(End::Reload)
            }
            LogEvent::Refused => {
                self.documents.set_degraded(|degraded| {
                    degraded.insert(self.name.clone());
                });
                let reason = "the store does not take what was written to it".to_owned();
                Some(End::Unavailable(Unavailable::Degraded, reason))
            }
        }
    }

    /// Answers now what is durable now, and the rest when it is.
    fn ask(&mut self, question: &Question, reply: Reply) {
        if let Some(damage) = &self.damage
            && !matches!(question, Question::Presence)
        {
            // A part that looks like the whole would be kept as such.
            let error = AskError::Unavailable {
                document: self.name.clone(),
                reason: damage.clone(),
            };
            let _ = reply.send(Err(error));
            return;
        }
        let answer = match question {
            Question::Text(name) => Answer::Text(self.document.text(name)),
            Question::State => Answer::State(self.document.whole_state()),
            Question::Presence => Answer::Presence(self.presence()),
        };
        if self.document.is_settled() {
            let _ = reply.send(Ok(answer));
        } else {
            self.waiting
                .push((self.document.assigned_seq(), reply, answer));
        }
    }

    fn presence(&self) -> Vec<(u64, String)> {
        self.document
            .presence()
            .map(|(client, state)| (client, state.to_owned()))
            .collect()
    }

    /// Waits until all is durable and lets nothing in until the slot's fate is decided.
    async fn frozen(
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

    async fn settle(&mut self) -> Option<End> {
        while !self.document.is_settled() {
            let event = self.log_events.recv().await?;
            if let Some(end) = self.logged(event) {
                return Some(end);
            }
        }
        None
    }

    async fn tick(&mut self, inputs: &queue::Receiver<ToDocument>) -> Option<End> {
        let now = self.documents.started.elapsed();
        let end = self.handle(Input::Expire { now });
        let connections = u32::try_from(self.document.connections()).unwrap_or(u32::MAX);
        self.counts
            .connections
            .store(connections, std::sync::atomic::Ordering::Relaxed);
        self.weigh();
        self.tell_idle();
        if std::mem::take(&mut self.presence_changed) {
            self.documents
                .bus
                .publish_presence(&self.name, self.presence())
                .await;
        }
        if self.damage.is_some() && DEGRADED_RECHECK <= self.opened_at.elapsed() {
            return Some(End::Reload);
        }
        if self.store_is_away() {
            self.handle(Input::StoreAway);
        }
        let settled = self.document.is_settled();
        if settled && SNAPSHOT_AFTER_UPDATES <= self.document.tail() {
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
    fn unload(&self, inputs: &queue::Receiver<ToDocument>) -> Option<End> {
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

    fn count_unloaded(&self, reason: &str) {
        let unloaded = &self.documents.metrics.documents_unloaded;
        unloaded.with_label_values(&[reason]).inc();
    }

    /// Tells what memory the document takes, and what else is counted.
    fn weigh(&mut self) {
        self.share.set(self.document.memory());
        self.tally
            .replace(Tally::of(&self.document), &self.documents.metrics);
    }

    /// Nobody has it open, and all of it is durable. Edges stay a while after their last socket, in case it comes back; they
    /// do not count.
    fn has_no_use(&self) -> bool {
        self.document.connections() == 0 && self.document.is_settled()
    }

    fn used(&mut self) {
        self.used_at = Instant::now();
        if self.document.is_idle() {
            self.idle_since = self.used_at;
        }
        self.tell_idle();
    }

    /// Tells whether the document may leave when memory is short.
    fn tell_idle(&self) {
        let idle = self.has_no_use().then(|| Idle {
            since: self.used_at.duration_since(self.documents.started),
            memory: self.share.bytes(),
        });
        self.counts.set_idle(idle);
    }

    /// An append has been on its way for longer than appends take.
    fn store_is_away(&self) -> bool {
        self.unsettled_since
            .is_some_and(|since| STORE_AWAY_AFTER <= since.elapsed())
    }

    /// Takes the document out of the table unless somebody has just asked for it.
    fn leave_table(&self, inputs: &queue::Receiver<ToDocument>) -> bool {
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

    fn start_snapshot(&mut self) {
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
    async fn delete(&mut self, reply: Reply) -> Option<End> {
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

/// Loads a document, its snapshot from the bus if that is the stored one.
async fn load(
    store: &dyn Store,
    bus: &dyn Bus,
    document: &DocumentId,
) -> Result<Loaded, LoadError> {
    let cached = bus.cached_snapshot(document).await;
    let copy = cached.map(
        |CachedSnapshot {
             room_epoch,
             seq,
             bytes,
         }| { (room_epoch, StoredSnapshot { seq, bytes }) },
    );
    store.load_with(document, copy).await
}

/// Replays what was loaded, beside the executor's threads if it is much. The error is for people.
async fn replayed(tasks: &Tasks, epoch: Epoch, content: &Content) -> Result<Document, String> {
    let bytes = content.bytes();
    let Content {
        snapshot,
        log,
        last,
        ..
    } = content.clone();
    let work = move || {
        let snapshot = snapshot.as_ref().map(|stored| (stored.seq, &stored.bytes));
        Document::open(epoch, snapshot, &log, last)
    };
    if bytes < LARGE_STATE_BYTES {
        attempt(work)
    } else {
        guarded(tasks, work).await
    }
}

/// Runs what may take long, or panic, with stored rows. The error is for people.
async fn guarded<T: Send + 'static>(
    tasks: &Tasks,
    work: impl FnOnce() -> Result<T, OpenError> + Send + 'static,
) -> Result<T, String> {
    let done = tasks.compute(move || attempt(work)).await;
    done.expect("what panics inside is caught there")
}

fn attempt<T>(work: impl FnOnce() -> Result<T, OpenError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("its rows make the CRDT library panic".to_owned()),
    }
}

/// Makes a debug build panic on an update that holds the bytes of `COLLAB_PANIC_ON`, so that it can be seen what a
/// panic ends. Not in release builds.
#[cfg(debug_assertions)]
fn panic_on_request(input: &Input) {
    static BYTES: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("COLLAB_PANIC_ON").ok());
    if let (Some(bytes), Input::Update { update, .. }) = (BYTES.as_deref(), input) {
        let asked = update
            .windows(bytes.len().max(1))
            .any(|window| window == bytes.as_bytes());
        assert!(!asked, "asked to panic");
    }
}

/// The next input, those that a freeze held back first.
async fn next(
    backlog: &mut VecDeque<ToDocument>,
    inputs: &mut queue::Receiver<ToDocument>,
) -> Option<ToDocument> {
    match backlog.pop_front() {
        Some(held) => Some(held),
        None => inputs.recv().await,
    }
}
