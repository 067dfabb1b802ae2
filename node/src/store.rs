//! What may not be lost: log, snapshots, documents, members and slots.
//!
//! The trait says what each call promises; it takes no decision of its own. [`postgres`] serves a
//! cluster, [`sqlite`] one process. Every write to a document is *one* autocommit statement that
//! locks the slot's row where slot, epoch and incarnation all match, so that a node which lost a
//! slot cannot write to it, however late its statement arrives (the write rule).

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use collab_core::control::{LoadSample, MemberState, StoreReport};
use collab_core::ids::{DocumentId, Epoch, NodeId, RoomEpoch, Seq, Slot, Term};
use uuid::Uuid;

mod integrity;
pub mod memory;
pub mod postgres;
pub mod rows;
pub mod sqlite;

/// The right under which a slot's documents are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ownership {
    /// The slot.
    pub slot: Slot,
    /// The version of its ownership.
    pub epoch: Epoch,
    /// The process that owns it.
    pub incarnation: Uuid,
}

/// One update on its way into the log.
#[derive(Clone, Debug)]
pub struct Append {
    /// The document.
    pub document: DocumentId,
    /// Its position, the one after the last.
    pub seq: Seq,
    /// The right to write it.
    pub ownership: Ownership,
    /// The client's bytes, as they came.
    pub bytes: Bytes,
    /// The user who wrote it, empty when unknown.
    pub author: String,
}

/// What an append did, by batch. A slot that is in neither list does not occur.
#[derive(Clone, Debug, Default)]
pub struct Appended {
    /// Slots that were held. The others are fenced: acknowledge nothing, drop their documents.
    pub held: Vec<Slot>,
    /// The keys that were inserted.
    pub inserted: Vec<(DocumentId, Seq)>,
}

/// A row of the log, as asked for to resolve an unknown outcome.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WrittenRow {
    /// The document.
    pub document: DocumentId,
    /// Its position.
    pub seq: Seq,
    /// The epoch it was written under.
    pub epoch: Epoch,
    /// CRC-32C of the bytes.
    pub crc32c: u32,
}

/// A document as it lies in the store.
#[derive(Clone, Debug)]
pub enum Loaded {
    /// No document of this name was ever created.
    Absent,
    /// It was deleted; only an explicit creation brings the name back.
    Deleted,
    /// Its content.
    Live(Content),
}

/// The content of a document: a snapshot, and then the log.
#[derive(Clone, Debug)]
pub struct Content {
    /// The life of the document.
    pub room_epoch: RoomEpoch,
    /// Newest snapshot that verifies.
    pub snapshot: Option<StoredSnapshot>,
    /// Every row after the snapshot (or after the base of this life), in order, contiguous and with good checksums.
    pub log: Vec<(Seq, Bytes)>,
    /// Position of the last of these rows; the next append has the one after it.
    pub last: Seq,
}

impl Content {
    /// The updates that make the document, in order.
    pub fn parts(&self) -> impl Iterator<Item = &Bytes> {
        let snapshot = self.snapshot.iter().map(|stored| &stored.bytes);
        snapshot.chain(self.log.iter().map(|(_, update)| update))
    }

    /// Their length together.
    pub fn bytes(&self) -> usize {
        self.parts().map(Bytes::len).sum()
    }
}

/// A snapshot as it lies in the store.
#[derive(Clone, Debug)]
pub struct StoredSnapshot {
    /// It contains every update up to and including this one.
    pub seq: Seq,
    /// V1 update of the whole state.
    pub bytes: Bytes,
}

/// A snapshot to write. Insert only; an existing one of the same seq stays.
#[derive(Clone, Debug)]
pub struct NewSnapshot {
    /// The document.
    pub document: DocumentId,
    /// The right to write it.
    pub ownership: Ownership,
    /// The life of the document.
    pub room_epoch: RoomEpoch,
    /// It contains every update up to and including this one; all of them are committed.
    pub seq: Seq,
    /// V1 update of the whole state.
    pub bytes: Bytes,
}

/// A line of the list of documents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentRow {
    /// Its name.
    pub id: DocumentId,
    /// Milliseconds since 1970 (UTC) of its creation.
    pub created_ms: i64,
    /// Milliseconds since 1970 (UTC) of its newest update; of its creation when there is none.
    pub updated_ms: i64,
    /// Last position in the log.
    pub seq: Seq,
}

/// How a fenced statement ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fence {
    /// The slot was held and the statement did its work.
    Held,
    /// Another epoch or incarnation owns the slot; nothing was changed.
    Fenced,
}

/// How a creation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// It is new, or new again.
    Created {
        /// The life that began.
        room_epoch: RoomEpoch,
    },
    /// A live document has that name.
    Exists,
    /// The slot is not held.
    Fenced,
}

/// Whether a creation may bring a deleted name back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recreate {
    /// Asked for by name: a deleted document begins a new life.
    Allowed,
    /// A side effect of opening: a deleted document stays deleted ([`Created::Exists`]).
    Refused,
}

/// A process that wants to be a member.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Its name.
    pub node: NodeId,
    /// This run of it; random.
    pub incarnation: Uuid,
    /// What outlives the process: the uid of its pod.
    pub pod_uid: String,
    /// `host:port` of its internal listener.
    pub address: String,
    /// Its zone, or empty.
    pub zone: String,
    /// Share of the slots in percent of a normal node.
    pub weight: u32,
}

#[cfg(test)]
impl Registration {
    /// The only node of a test.
    pub(crate) fn alone(incarnation: Uuid) -> Self {
        Self {
            node: "me".into(),
            incarnation,
            pod_uid: "me".to_owned(),
            address: "host:1".to_owned(),
            zone: String::new(),
            weight: 100,
        }
    }
}

/// A registered process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub node: NodeId,
    /// This run of it.
    pub incarnation: Uuid,
    /// Uid of its pod.
    pub pod_uid: String,
    /// `host:port` of its internal listener.
    pub address: String,
    /// Its zone, or empty.
    pub zone: String,
    /// Share of the slots in percent of a normal node.
    pub weight: u32,
    /// What it is doing.
    pub state: MemberState,
    /// What remains of its lease by the store's clock; zero when it has ended.
    pub lease_left: Duration,
    /// Its last load sample.
    pub load: Option<LoadSample>,
    /// Age of that sample (= of the last renewal) by the store's clock.
    pub load_age: Duration,
    /// How long ago its node lost leases, by the store's clock, the last one first; see [`Store::note_lost_leases`].
    pub leases_lost_ago: Vec<Duration>,
}

/// The answer to a renewal.
#[derive(Clone, Debug)]
pub struct Renewed {
    /// Every registered process, this one too, in order of node name and incarnation.
    pub members: Vec<Member>,
    /// The newest term and when the placement last changed: read the placement anew when it differs.
    pub placement_version: i64,
    /// Timeline of the database.
    pub timeline: String,
}

/// How a renewal ended.
#[derive(Clone, Debug)]
pub enum Renewal {
    /// The lease goes on.
    Renewed(Renewed),
    /// The lease was ended by others, or the row has gone: what this incarnation owned may have a new owner. Register as
    /// a new one.
    Fenced,
    /// A newer process of the same pod has taken the place of this one, which must end.
    Superseded,
}

/// What became of an attempt to end another member's lease early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Its lease has ended: its slots are orphaned at once, and it must register anew if it lives.
    Ended,
    /// It renewed its lease so long ago, which is too recently to be sure.
    Fresh(Duration),
    /// It has no lease to end, or the judge has none itself.
    Void,
}

/// Who owns a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotRow {
    /// The slot.
    pub slot: Slot,
    /// Its owner; `None` before the first.
    pub owner: Option<Uuid>,
    /// The version of its ownership.
    pub epoch: Epoch,
}

/// The epoch that a slot made on this timeline of the database begins with; a timeline is named by eight hexadecimal digits, as in
/// the name of a WAL segment. A failover may lose a slot, and one made anew must not get the epochs of the lost one again.
pub fn first_epoch(timeline: &str) -> Epoch {
    let number = u32::from_str_radix(timeline, 16).unwrap_or(1);
    Epoch(i64::from(number.saturating_sub(1).min(i32::MAX as u32)) << 32)
}

/// Failovers of the database, as the sessions of this process saw them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Failovers {
    /// How many there were.
    pub seen: u64,
    /// After how many of them [`Store::reclaim`] was called.
    pub reclaimed: u64,
}

impl Failovers {
    /// What this process knows of the slots may be newer than what the database knows.
    pub const fn is_pending(self) -> bool {
        self.reclaimed < self.seen
    }
}

/// Slots that changed.
#[derive(Clone, Debug, Default)]
pub struct MapChange {
    /// Pass it to the next call: nothing that commits after this answer is missed.
    pub horizon: i64,
    /// The rows, in order of slot.
    pub slots: Vec<SlotRow>,
    /// These are all rows there are: at the first call (horizon 0), and at the first on another primary.
    pub is_whole: bool,
    /// The document that each virtual slot among them is for; `None` for one that is free.
    pub pins: Vec<(Slot, Option<DocumentId>)>,
}

/// Which slots a claim may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// Those without an owner, or whose owner's lease has ended or who is no member.
    Orphaned,
    /// The same, if the lease of who claims was renewed for `ADOPT_AFTER_STEADY` without a gap longer than
    /// `RENEWAL_GAP_MAX`, by the store's clock. A claim that was held up on its way takes nothing from those who
    /// could not renew their leases meanwhile either.
    OrphanedBySteady,
    /// Those that still have this owner, who is no member any more: an earlier run of the pod of who claims.
    Left(Uuid),
}

/// What the planner wants.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// As in [`Renewed::placement_version`].
    pub version: i64,
    /// Node per slot, empty when no operator ever planned. Virtual slots follow the others; of those that were free the
    /// name is empty.
    pub slots: Vec<NodeId>,
}

/// A call to the store that failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Whether it took effect is not known. Ask again (reads), or resolve by reading (writes).
    #[error("the store did not answer: {0}")]
    Unavailable(#[source] sqlx::Error),
    /// Somebody else holds a lock that a write needs, and did not let go in time. Nothing was written.
    #[error("a lock was not let go in time: {0}")]
    Locked(#[source] sqlx::Error),
    /// The store answered with something this version cannot use: stop and tell a person.
    #[error("the store is not usable: {0}")]
    Unusable(String),
}

impl StoreError {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "it stands where an error is mapped"
    )]
    fn unusable(reason: impl ToString) -> Self {
        Self::Unusable(reason.to_string())
    }
}

/// A document that cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its rows are damaged; it is degraded until a person repairs it. No other document is affected.
    #[error("document {document} is damaged at seq {seq}: {reason}")]
    Damaged {
        /// The document.
        document: DocumentId,
        /// Where.
        seq: Seq,
        /// What was found.
        reason: String,
        /// What is good, up to there.
        good: Box<Content>,
    },
    /// The store failed; try again.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Durable storage of a cluster, or of one embedded node.
#[async_trait]
pub trait Store: Send + Sync + 'static {
    /// Appends a batch in one statement (design: the write rule). At most one statement per slot may be in flight.
    async fn append(&self, batch: &[Append]) -> Result<Appended, StoreError>;

    /// Reads which of these keys are in the log, with what, to resolve an unknown outcome.
    async fn written(&self, keys: &[(DocumentId, Seq)]) -> Result<Vec<WrittenRow>, StoreError>;

    /// Reads a document in one consistent view. Call it after the slot was claimed.
    ///
    /// `copy` is a snapshot from somewhere faster: its bytes are used, and not read here, if the newest stored snapshot is
    /// of the same room epoch and seq and its hash is that of these bytes.
    ///
    /// # Errors
    /// [`LoadError::Damaged`] when a row is missing, doubled or has a wrong checksum and no older
    /// snapshot helps.
    async fn load_with(
        &self,
        document: &DocumentId,
        copy: Option<(RoomEpoch, StoredSnapshot)>,
    ) -> Result<Loaded, LoadError>;

    /// [`Store::load_with`] without a copy.
    ///
    /// # Errors
    /// As there.
    async fn load(&self, document: &DocumentId) -> Result<Loaded, LoadError> {
        self.load_with(document, None).await
    }

    /// Reads the rows after `after`, for whoever has read the document up to there before. `None`: they do not
    /// join what was read (it has another life, is gone, or its log was cut meanwhile); load it.
    async fn tail(
        &self,
        document: &DocumentId,
        room_epoch: RoomEpoch,
        after: Seq,
    ) -> Result<Option<Vec<(Seq, Bytes)>>, StoreError> {
        match self.load(document).await {
            Ok(Loaded::Live(Content {
                room_epoch: life,
                snapshot,
                log,
                last,
            })) => {
                let from = snapshot.map_or(Seq(0), |snapshot| snapshot.seq);
                let joins = life == room_epoch && from <= after && after <= last;
                Ok(joins.then(|| log.into_iter().filter(|(seq, _)| after < *seq).collect()))
            }
            Ok(Loaded::Absent | Loaded::Deleted) | Err(LoadError::Damaged { .. }) => Ok(None),
            Err(LoadError::Store(error)) => Err(error),
        }
    }

    /// Creates a document (or a new life of a deleted one) under the fence.
    async fn create(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        recreate: Recreate,
    ) -> Result<Created, StoreError>;

    /// Deletes content and log under the fence and leaves a tombstone with room epoch and last seq.
    async fn delete(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        last: Seq,
    ) -> Result<Fence, StoreError>;

    /// Writes a snapshot under the fence; its hash covers the document id, room epoch and seq.
    async fn snapshot(&self, snapshot: &NewSnapshot) -> Result<Fence, StoreError>;

    /// Under the fence: keeps the newest two snapshots and deletes log rows up to the older of them.
    /// Does nothing while there are fewer than two.
    async fn compact(
        &self,
        document: &DocumentId,
        ownership: Ownership,
    ) -> Result<Fence, StoreError>;

    /// Lists live documents in order of id (by bytes), after `after`, at most `limit`.
    async fn documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<DocumentRow>, StoreError>;

    /// One live document.
    async fn document(&self, document: &DocumentId) -> Result<Option<DocumentRow>, StoreError>;

    /// Makes the process a member with a fresh lease, state Active (and the zone of the run before, unless it knows its own), and removes earlier runs of the same pod uid (their
    /// slots become orphaned at once). An earlier run that is removed without having left has lost its lease, which is
    /// remembered. Creates the slot rows when there are none. Answers the run whose place this one took, if it was still there.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] when the cluster was created with another number of slots.
    async fn register(
        &self,
        member: &Registration,
        slots: u16,
        lease: Duration,
    ) -> Result<Option<Uuid>, StoreError>;

    /// Renews the lease of an incarnation of a pod.
    async fn renew(
        &self,
        incarnation: Uuid,
        pod_uid: &str,
        lease: Duration,
        load: LoadSample,
    ) -> Result<Renewal, StoreError>;

    /// Ends the lease of `target` if it was not renewed for `age`, by the word of `judge`, whose own lease must be live. Both
    /// rows are locked in order of incarnation: of two members that judge each other at most one is heard.
    ///
    /// Steady renewals, as [`Claim::OrphanedBySteady`] wants them, are not asked of the judge. An adopter knows of the owner
    /// only that it did not renew, which after an outage of the store is true of everybody; a judge has found its process
    /// gone, refused or replaced at its address. Whoever adopts then has to be steady all the same.
    async fn end_lease(
        &self,
        judge: Uuid,
        target: Uuid,
        age: Duration,
    ) -> Result<Judgement, StoreError>;

    /// Remembers for [`LOST_LEASES_KEPT_FOR`](collab_core::limits::LOST_LEASES_KEPT_FOR) that the nodes of these incarnations
    /// lost their leases, of those whose lease has ended. A lease that was lost counts once, however many say so.
    async fn note_lost_leases(&self, incarnations: &[Uuid]) -> Result<(), StoreError>;

    /// Says what the member is doing (its own state only; a drain asked for by the operator is [`Store::set_drain`]).
    async fn set_state(&self, incarnation: Uuid, state: MemberState) -> Result<(), StoreError>;

    /// Ends the membership.
    async fn leave(&self, incarnation: Uuid) -> Result<(), StoreError>;

    /// The slots that changed since an earlier call; horizon 0 asks for all.
    async fn map(&self, horizon: i64) -> Result<MapChange, StoreError>;

    /// Takes slots whose state allows it: raises their epochs and returns what was taken. Bounded wait for locks
    /// (`CLAIM_LOCK_TIMEOUT`), then ends the sessions of the fenced owners and tries once more.
    async fn claim(
        &self,
        incarnation: Uuid,
        slots: &[Slot],
        claim: Claim,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError>;

    /// Takes the slots back that this incarnation owned before the database failed over, under epochs above those it held
    /// them with and above those that the new primary knows: unless somebody holds a newer one. Answers what was taken.
    ///
    /// Between a failover and this call no document is written ([`StoreError::Unavailable`]): the log of the new primary
    /// may end before positions that were assigned already, and would get a hole; and a snapshot would hold what it lacks.
    async fn reclaim(
        &self,
        incarnation: Uuid,
        held: &[Ownership],
    ) -> Result<Vec<(Slot, Epoch)>, StoreError>;

    /// Failovers so far.
    fn failovers(&self) -> Failovers;

    /// Hands slots from their owner to another live member: raises their epochs; returns those that moved.
    async fn hand_off(
        &self,
        from: &[Ownership],
        to: Uuid,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError>;

    /// The slot that a document has for itself, if it is pinned. An owner asks after its slot was claimed, before it serves
    /// the document or creates it: whatever changes later raises the epoch that was claimed.
    async fn pinned(&self, document: &DocumentId) -> Result<Option<Slot>, StoreError>;

    /// Gives a document a virtual slot of its own, owned by the owner of `home`, the slot that its id hashes to. Nothing
    /// changes when it has one. `Err(current)` inside when the term is too old.
    ///
    /// One transaction locks both slots in ascending order and raises the epochs of *both*: the fence knows slots
    /// and not which slot a document is in.
    async fn pin(
        &self,
        term: Term,
        document: &DocumentId,
        home: Slot,
    ) -> Result<Result<(), Term>, StoreError>;

    /// Takes [`Store::pin`] back, in the same way; the virtual slot is free and has no owner.
    async fn unpin(
        &self,
        term: Term,
        document: &DocumentId,
        home: Slot,
    ) -> Result<Result<(), Term>, StoreError>;

    /// What the planner wants now.
    async fn placement(&self) -> Result<Placement, StoreError>;

    /// Grants a term greater than every one before.
    async fn take_term(&self, holder: &str) -> Result<Term, StoreError>;

    /// Replaces the placement. `Err(current)` inside when the term is too old.
    async fn set_placement(
        &self,
        term: Term,
        slots: &[NodeId],
    ) -> Result<Result<(), Term>, StoreError>;

    /// Sets or clears the wish that a node drains (state Draining / Active). `Err(current)` inside when the term is too old.
    async fn set_drain(
        &self,
        term: Term,
        node: &NodeId,
        drain: bool,
    ) -> Result<Result<(), Term>, StoreError>;

    /// Ends the lease of a member, as [`Store::end_lease`] does, by the word of the operator. `Err(current)` inside when the
    /// term is too old.
    async fn fence(&self, term: Term, incarnation: Uuid) -> Result<Result<(), Term>, StoreError>;

    /// Says in which zones nodes run. `Err(current)` inside when the term is too old.
    async fn set_zones(
        &self,
        term: Term,
        zones: &BTreeMap<NodeId, String>,
    ) -> Result<Result<(), Term>, StoreError>;

    /// The newest term, number of adopted slots since the cluster exists, highest map revision.
    async fn summary(&self) -> Result<Summary, StoreError>;

    /// Resolves when another session changed the map, or never: a hint to look before the next poll.
    async fn map_changed(&self);

    /// Resolves when a member came, left or lost its lease by [`Store::end_lease`], or never: a hint to renew before it is due,
    /// because the answer has the members.
    async fn members_changed(&self);
}

/// Numbers of the control API.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Newest term.
    pub term: Term,
    /// Slots claimed from a lost owner.
    pub adoptions: u64,
    /// Highest map revision.
    pub revision: i64,
    /// About the database.
    pub store: StoreReport,
}
