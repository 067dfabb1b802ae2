//! Opening a document: its task waits to be the owner, loads it and builds it, and tells everybody when it ends.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use collab_core::document::{Document, EdgeId, Input, NO_CLOCKS, OpenError};
use collab_core::ids::{DocumentId, Epoch, RoomEpoch, Slot};
use collab_core::limits::{LARGE_STATE_BYTES, OPENING_BYTES};
use collab_core::wire::relay::{ToEdge, ToOwner, Unavailable};
use litemap::LiteMap;
use tokio::time::{Instant, sleep, timeout};

use super::meter::Counts;
use super::serving::{Damage, Owned};
use super::tally::Tally;
use super::{AskError, Documents, EdgeSender, Missing, NO_MEMORY, ToDocument, damage};
use crate::bus::{Bus, CachedSnapshot};
use crate::memory::Share;
use crate::queue;
use crate::store::{
    Content, Created, LoadError, Loaded, Ownership, Recreate, Store, StoreError, StoredSnapshot,
};
use crate::tasks::Tasks;

/// How long a node waits for the map to show it as the owner before it says that it is not.
const OWNERSHIP_WAIT: Duration = Duration::from_millis(500);
/// Between two tries to load a document from a store that does not answer.
const LOAD_RETRY: Duration = Duration::from_millis(200);
/// More than this is not sent as it is stored.
const SHOWN_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The task of one document.
pub(super) struct Host {
    pub(super) documents: Arc<Documents>,
    pub(super) document: DocumentId,
    pub(super) id: u64,
    pub(super) slot: Slot,
    pub(super) counts: Arc<Counts>,
    pub(super) inputs: queue::Receiver<ToDocument>,
    /// What came while the document was built.
    pub(super) held: VecDeque<ToDocument>,
    /// Failovers of the database when it began to be read.
    pub(super) failovers: u64,
}

/// Why the task of a document ends.
#[derive(Debug)]
pub(super) enum End {
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
    /// Boxed: a future holds what it is given twice.
    pub(super) async fn run(mut self: Box<Self>, missing: Missing) {
        let (documents, name) = (self.documents.clone(), self.document.clone());
        // Freed when it is done: a document is open for much longer.
        let opened = Box::pin(self.open(missing)).await;
        let end = match opened {
            Ok(mut owned) => {
                let rescued = documents.open().rescued.remove(&name);
                let state = rescued.map(|state| Input::Restore { state });
                if let Some(end) = state.and_then(|state| owned.handle(state)) {
                    (end, LiteMap::new())
                } else {
                    let Self { inputs, held, .. } = &mut *self;
                    owned.serve(inputs, held).await
                }
            }
            Err(end) => {
                // Whoever owns it now gets the rest from the clients.
                if !documents.store.failovers().is_pending() {
                    documents.open().rescued.remove(&name);
                }
                (end, LiteMap::new())
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
        let mut edges = LiteMap::<EdgeId, EdgeSender>::new();
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
            edges: LiteMap::with_capacity(1),
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
        owned.damage = Some(Box::new(Damage {
            reason: format!("the stored document is damaged: {reason}"),
            found_at: Instant::now(),
        }));
        self.documents.set_degraded(|degraded| {
            degraded.insert(self.document.clone());
        });
        owned
    }

    /// Takes the document out of the table and tells everyone who waits, those still in the queue too.
    fn finish(mut self, end: End, mut edges: LiteMap<EdgeId, EdgeSender>) {
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

/// Loads a document, its snapshot from the bus if that is the stored one.
pub(super) async fn load(
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
pub(super) async fn replayed(
    tasks: &Tasks,
    epoch: Epoch,
    content: &Content,
) -> Result<Document, String> {
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
pub(super) async fn guarded<T: Send + 'static>(
    tasks: &Tasks,
    work: impl FnOnce() -> Result<T, OpenError> + Send + 'static,
) -> Result<T, String> {
    let done = tasks.compute(move || attempt(work)).await;
    done.expect("what panics inside is caught there")
}

pub(super) fn attempt<T>(work: impl FnOnce() -> Result<T, OpenError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|error| error.to_string()),
        Err(_) => Err("its rows make the CRDT library panic".to_owned()),
    }
}
