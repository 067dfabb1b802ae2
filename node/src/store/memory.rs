//! The store of a simulation: the semantics of [`super::postgres`] in memory, with a standby that lags.
//!
//! A statement runs at once and on its own, as if it had locked all it needs. Time is tokio's, so that
//! it can be paused. Every statement that writes is also sent to a standby, which is some statements
//! behind: a fail-over to it loses those, as one without synchronous replication does.

use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use collab_core::control::{LoadSample, MemberState, StoreReport};
use collab_core::ids::{DocumentId, Epoch, NodeId, RoomEpoch, Seq, Slot, Term};
use collab_core::limits::{
    ADOPT_AFTER_STEADY, LOST_LEASES_KEPT_FOR, RENEWAL_GAP_MAX, SNAPSHOTS_KEPT,
};
use collab_core::mutants::Mutant;
use collab_core::ring::slot_of;
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::integrity::{LogRow, check_tail, snapshot_hash};
use super::{
    Append, Appended, Claim, Content, Created, DocumentRow, Failovers, Fence, Judgement, LoadError,
    Loaded, MapChange, Member, NewSnapshot, Ownership, Placement, Recreate, Registration, Renewal,
    Renewed, SlotRow, Store, StoreError, StoredSnapshot, Summary, WrittenRow, first_epoch,
};

/// When the clock of every simulated database begins, in milliseconds of Unix time.
const BEGINNING_MS: i64 = 1_700_000_000_000;
/// Statements that the standby may be behind.
pub const LAG_MAX: usize = 64;

/// A database server and its standby. A clone is the same.
#[derive(Clone)]
pub struct Database {
    server: Arc<Mutex<Server>>,
    map_changed: Arc<Notify>,
    members_changed: Arc<Notify>,
}

/// The sessions of one process to a [`Database`].
pub struct Memory {
    database: Database,
    /// Timeline on which the whole map was last read; 0 before that.
    map_read_on: AtomicU64,
    /// Timeline on which [`Store::reclaim`] was last called.
    reclaimed_on: AtomicU64,
}

struct Server {
    primary: Rows,
    standby: Rows,
    /// What the standby has yet to do.
    lag: VecDeque<Statement>,
    /// Raised by each fail-over.
    timeline: u64,
    started: Instant,
}

type Statement = Box<dyn FnOnce(&mut Rows) + Send>;

/// What the tables hold.
#[derive(Clone, Default)]
struct Rows {
    /// Slots that documents hash to; virtual ones come after them.
    slots_fixed: u16,
    slots: Vec<SlotRecord>,
    /// The documents of virtual slots.
    pins: BTreeMap<Slot, DocumentId>,
    members: BTreeMap<Uuid, MemberRecord>,
    /// Node and time of each lost lease, by incarnation and time of its last renewal.
    lost_leases: BTreeMap<(Uuid, Instant), (NodeId, Instant)>,
    documents: BTreeMap<DocumentId, DocumentRecord>,
    placement: Placement,
    term: Term,
    /// Number of the last transaction that changed the map.
    transaction: i64,
}

#[derive(Clone, Copy, Default)]
struct SlotRecord {
    owner: Option<Uuid>,
    epoch: Epoch,
    revision: i64,
    adoptions: u64,
}

#[derive(Clone)]
struct MemberRecord {
    registration: Registration,
    state: MemberState,
    lease_end: Instant,
    fenced: bool,
    renewed_at: Instant,
    steady_since: Instant,
    load: Option<LoadSample>,
}

#[derive(Clone)]
struct DocumentRecord {
    room_epoch: RoomEpoch,
    deleted: bool,
    base: Seq,
    created_at: Instant,
    log: BTreeMap<Seq, LogRecord>,
    snapshots: BTreeMap<Seq, SnapshotRecord>,
}

#[derive(Clone)]
struct LogRecord {
    slot: Slot,
    epoch: Epoch,
    crc32c: u32,
    bytes: Bytes,
    at: Instant,
}

#[derive(Clone)]
struct SnapshotRecord {
    room_epoch: RoomEpoch,
    sha256: Vec<u8>,
    bytes: Bytes,
    at: Instant,
}

/// A row of a document's log as it lies there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredUpdate {
    /// Its position.
    pub seq: Seq,
    /// The slot it was written under.
    pub slot: Slot,
    /// The epoch it was written under.
    pub epoch: Epoch,
    /// The client's bytes.
    pub bytes: Bytes,
}

/// What happens to the rows of a document behind the store's back.
#[derive(Clone, Debug)]
pub enum Harm {
    /// Rows of its log are lost.
    RowsLost(RangeInclusive<Seq>),
    /// A row of its log has other bytes.
    RowChanged(Seq, Bytes),
    /// A snapshot has other bytes.
    SnapshotChanged(Seq, Bytes),
    /// Its snapshots have hashes of something else.
    HashesLost,
    /// Its snapshots and those of another document are under each other's name.
    SnapshotsSwapped(DocumentId),
}

impl Default for Database {
    fn default() -> Self {
        let server = Server {
            primary: Rows::default(),
            standby: Rows::default(),
            lag: VecDeque::new(),
            timeline: 1,
            started: Instant::now(),
        };
        Self {
            server: Arc::new(Mutex::new(server)),
            map_changed: Arc::default(),
            members_changed: Arc::default(),
        }
    }
}

impl Database {
    /// The sessions of a process.
    pub fn sessions(&self) -> Memory {
        Memory {
            database: self.clone(),
            map_read_on: AtomicU64::new(0),
            reclaimed_on: AtomicU64::new(self.timeline()),
        }
    }

    /// Makes the standby the primary, without the last `lost` statements that wrote (at most [`LAG_MAX`]).
    pub fn fail_over(&self, lost: usize) {
        let mut server = self.server();
        let kept = server.lag.len().saturating_sub(lost);
        let server = &mut *server;
        for statement in server.lag.drain(..).take(kept) {
            statement(&mut server.standby);
        }
        server.primary = server.standby.clone();
        server.timeline += 1;
    }

    /// How many fail-overs there were, plus one.
    pub fn timeline(&self) -> u64 {
        self.server().timeline
    }

    fn timeline_name(&self) -> String {
        format!("{:08X}", self.timeline())
    }

    /// Who owns each slot, in order of slot.
    pub fn slots(&self) -> Vec<SlotRow> {
        self.server().primary.slot_rows(0)
    }

    /// Every registered process.
    pub fn members(&self) -> Vec<Member> {
        self.server().primary.members(Instant::now())
    }

    /// What is left of the log of a document that lives, in order.
    pub fn log(&self, document: &DocumentId) -> Vec<StoredUpdate> {
        let server = self.server();
        let record = server.primary.documents.get(document);
        let log = record.into_iter().flat_map(|record| &record.log);
        log.map(|(seq, row)| StoredUpdate {
            seq: *seq,
            slot: row.slot,
            epoch: row.epoch,
            bytes: row.bytes.clone(),
        })
        .collect()
    }

    /// The slot that a document is in.
    pub fn slot_of(&self, document: &DocumentId) -> Slot {
        let server = self.server();
        let pinned = server.primary.pinned(document);
        pinned.unwrap_or_else(|| slot_of(document, server.primary.slots_fixed))
    }

    /// Whether a slot is for documents: a virtual one that is free is not.
    pub fn is_used(&self, slot: Slot) -> bool {
        let rows = &self.server().primary;
        slot.0 < rows.slots_fixed || rows.pins.contains_key(&slot)
    }

    /// A document that lives, as it is loaded.
    pub fn content(&self, document: &DocumentId) -> Option<Content> {
        match self.read(|rows, _| rows.load(document, None)) {
            Ok(Loaded::Live(content)) => Some(content),
            _ => None,
        }
    }

    /// Changes rows as no statement would.
    pub fn harm(&self, document: &DocumentId, harm: Harm) {
        let mut server = self.server();
        let documents = &mut server.primary.documents;
        let Some(record) = documents.get_mut(document) else {
            return;
        };
        match harm {
            Harm::RowsLost(seqs) => record.log.retain(|seq, _| !seqs.contains(seq)),
            Harm::RowChanged(seq, bytes) => {
                if let Some(row) = record.log.get_mut(&seq) {
                    row.bytes = bytes;
                }
            }
            Harm::SnapshotChanged(seq, bytes) => {
                if let Some(row) = record.snapshots.get_mut(&seq) {
                    row.bytes = bytes;
                }
            }
            Harm::HashesLost => {
                for row in record.snapshots.values_mut() {
                    row.sha256 = b"0".to_vec();
                }
            }
            Harm::SnapshotsSwapped(other) => {
                let snapshots = std::mem::take(&mut record.snapshots);
                let swapped = documents.get_mut(&other);
                let swapped = swapped.map_or_else(BTreeMap::new, |other| {
                    std::mem::replace(&mut other.snapshots, snapshots)
                });
                if let Some(record) = documents.get_mut(document) {
                    record.snapshots = swapped;
                }
            }
        }
    }

    fn read<T>(&self, read: impl FnOnce(&Rows, Instant) -> T) -> T {
        read(&self.server().primary, Instant::now())
    }

    fn write<T>(&self, write: impl Fn(&mut Rows, Instant) -> T + Send + 'static) -> T {
        let now = Instant::now();
        let mut server = self.server();
        let server = &mut *server;
        let answer = write(&mut server.primary, now);
        server
            .lag
            .push_back(Box::new(move |rows| drop(write(rows, now))));
        if LAG_MAX < server.lag.len()
            && let Some(statement) = server.lag.pop_front()
        {
            statement(&mut server.standby);
        }
        answer
    }

    fn server(&self) -> MutexGuard<'_, Server> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Rows {
    fn holds(&self, ownership: Ownership) -> bool {
        self.slots
            .get(usize::from(ownership.slot.0))
            .is_some_and(|slot| {
                slot.epoch == ownership.epoch && slot.owner == Some(ownership.incarnation)
                    || Mutant::NoEpochCheck.is_active()
            })
    }

    fn fence(&self, ownership: Ownership) -> Fence {
        if self.holds(ownership) {
            Fence::Held
        } else {
            Fence::Fenced
        }
    }

    fn lives(&self, incarnation: Uuid, now: Instant) -> bool {
        self.members
            .get(&incarnation)
            .is_some_and(|member| now < member.lease_end)
    }

    fn is_steady(&self, incarnation: Uuid, now: Instant) -> bool {
        self.members.get(&incarnation).is_some_and(|member| {
            now.saturating_duration_since(member.renewed_at) <= RENEWAL_GAP_MAX
                && ADOPT_AFTER_STEADY <= now.saturating_duration_since(member.steady_since)
        })
    }

    fn append(&mut self, batch: &[Append], now: Instant) -> Appended {
        let mut done = Appended::default();
        for append in batch {
            if !self.holds(append.ownership) {
                continue;
            }
            if !done.held.contains(&append.ownership.slot) {
                done.held.push(append.ownership.slot);
            }
            let Some(document) = self.documents.get_mut(&append.document) else {
                continue;
            };
            let fits = !document.deleted && document.base < append.seq;
            if fits && !document.log.contains_key(&append.seq) {
                let row = LogRecord {
                    slot: append.ownership.slot,
                    epoch: append.ownership.epoch,
                    crc32c: crc32c::crc32c(&append.bytes),
                    bytes: append.bytes.clone(),
                    at: now,
                };
                document.log.insert(append.seq, row);
                done.inserted.push((append.document.clone(), append.seq));
            }
        }
        done.held.sort_unstable();
        done
    }

    fn written(&self, keys: &[(DocumentId, Seq)]) -> Vec<WrittenRow> {
        let row = |(document, seq): &(DocumentId, Seq)| {
            let row = self.documents.get(document)?.log.get(seq)?;
            Some(WrittenRow {
                document: document.clone(),
                seq: *seq,
                epoch: row.epoch,
                crc32c: row.crc32c,
            })
        };
        keys.iter().filter_map(row).collect()
    }

    fn load(
        &self,
        id: &DocumentId,
        copy: Option<&(RoomEpoch, StoredSnapshot)>,
    ) -> Result<Loaded, LoadError> {
        let Some(document) = self.documents.get(id) else {
            return Ok(Loaded::Absent);
        };
        if document.deleted {
            return Ok(Loaded::Deleted);
        }
        let room_epoch = document.room_epoch;
        let stored = || {
            document
                .snapshots
                .range(document.base..)
                .rev()
                .map(|(seq, row)| (*seq, row))
        };
        let verifies = |seq, row: &SnapshotRecord, bytes: &[u8]| {
            snapshot_hash(id, room_epoch, seq, bytes) == row.sha256
        };
        let copied = stored().next().and_then(|(seq, row)| {
            let (life, copied) = copy?;
            let same = *life == room_epoch && copied.seq == seq;
            (same && verifies(seq, row, &copied.bytes)).then(|| copied.clone())
        });
        let snapshot = copied.or_else(|| {
            let mut good = stored().filter(|(seq, row)| verifies(*seq, row, &row.bytes));
            good.next().map(|(seq, row)| StoredSnapshot {
                seq,
                bytes: row.bytes.clone(),
            })
        });
        let after = snapshot
            .as_ref()
            .map_or(document.base, |snapshot| snapshot.seq);
        let reach = stored().next().map_or(after, |(seq, _)| seq.max(after));
        let rows = document.log.range(after.next()..).map(|(seq, row)| LogRow {
            seq: seq.0,
            crc32c: i64::from(row.crc32c),
            bytes: row.bytes.to_vec(),
        });
        check_tail(after, reach, rows.collect()).after(id, room_epoch, snapshot)
    }

    fn create(
        &mut self,
        id: &DocumentId,
        ownership: Ownership,
        recreate: Recreate,
        now: Instant,
    ) -> Created {
        if !self.holds(ownership) {
            return Created::Fenced;
        }
        let room_epoch = match self.documents.get_mut(id) {
            None => {
                let document = DocumentRecord {
                    room_epoch: RoomEpoch(1),
                    deleted: false,
                    base: Seq(0),
                    created_at: now,
                    log: BTreeMap::new(),
                    snapshots: BTreeMap::new(),
                };
                self.documents.insert(id.clone(), document);
                RoomEpoch(1)
            }
            Some(document) if document.deleted && recreate == Recreate::Allowed => {
                document.deleted = false;
                document.room_epoch.0 += 1;
                document.created_at = now;
                document.room_epoch
            }
            Some(_) => return Created::Exists,
        };
        Created::Created { room_epoch }
    }

    fn delete(&mut self, id: &DocumentId, ownership: Ownership, last: Seq) -> Fence {
        let fence = self.fence(ownership);
        if fence == Fence::Held
            && let Some(document) = self.documents.get_mut(id)
        {
            if !document.deleted {
                document.deleted = true;
                document.base = document.last().max(last);
            }
            document.log.clear();
            document.snapshots.clear();
        }
        fence
    }

    fn snapshot(&mut self, snapshot: &NewSnapshot, now: Instant) -> Fence {
        let fence = self.fence(snapshot.ownership);
        if fence == Fence::Held
            && let Some(document) = self.documents.get_mut(&snapshot.document)
            && !document.deleted
            && document.room_epoch == snapshot.room_epoch
        {
            document
                .snapshots
                .entry(snapshot.seq)
                .or_insert_with(|| SnapshotRecord {
                    room_epoch: snapshot.room_epoch,
                    sha256: snapshot_hash(
                        &snapshot.document,
                        snapshot.room_epoch,
                        snapshot.seq,
                        &snapshot.bytes,
                    ),
                    bytes: snapshot.bytes.clone(),
                    at: now,
                });
        }
        fence
    }

    fn compact(&mut self, id: &DocumentId, ownership: Ownership) -> Fence {
        let fence = self.fence(ownership);
        if fence == Fence::Held
            && let Some(document) = self.documents.get_mut(id)
        {
            let verified = document.snapshots.iter().rev().filter(|(seq, row)| {
                snapshot_hash(id, row.room_epoch, **seq, &row.bytes) == row.sha256
            });
            let kept = usize::try_from(SNAPSHOTS_KEPT).unwrap_or(usize::MAX);
            let older = verified.map(|(seq, _)| *seq).nth(kept - 1);
            if let Some(older) = older {
                document.log.retain(|seq, _| older < *seq);
                document.snapshots.retain(|seq, _| older <= *seq);
            }
        }
        fence
    }

    fn register(
        &mut self,
        member: &Registration,
        slots: u16,
        lease_end: Instant,
        now: Instant,
    ) -> Option<Uuid> {
        if self.slots.is_empty() {
            self.slots_fixed = slots;
            self.slots = vec![SlotRecord::default(); usize::from(slots)];
        }
        let mut member = member.clone();
        let mut known = self.members.values().map(|known| &known.registration);
        let before = known.find(|known| known.pod_uid == member.pod_uid).cloned();
        if let Some(before) = &before
            && member.zone.is_empty()
        {
            member.zone.clone_from(&before.zone);
        }
        let lost: Vec<Uuid> = self
            .members
            .iter()
            .filter(|(incarnation, known)| {
                let same_pod = known.registration.pod_uid == member.pod_uid;
                let replaced = known.registration.node == member.node && known.lease_end < now;
                **incarnation != member.incarnation && (same_pod || replaced)
            })
            .map(|(incarnation, _)| *incarnation)
            .collect();
        self.lose_leases(&lost, now);
        let forgotten = now.checked_sub(Duration::from_hours(1));
        self.members.retain(|_, known| {
            let same_pod = known.registration.pod_uid == member.pod_uid;
            let long_gone = forgotten.is_some_and(|forgotten| known.lease_end < forgotten);
            let replaced = known.registration.node == member.node && known.lease_end < now;
            !(same_pod || long_gone || replaced)
        });
        let record = MemberRecord {
            registration: member,
            state: MemberState::Active,
            lease_end,
            fenced: false,
            renewed_at: now,
            steady_since: now,
            load: None,
        };
        let incarnation = record.registration.incarnation;
        self.members.insert(incarnation, record);
        let before = before.map(|before| before.incarnation);
        before.filter(|before| *before != incarnation)
    }

    fn lose_leases(&mut self, incarnations: &[Uuid], now: Instant) {
        self.lost_leases
            .retain(|_, (_, at)| now.saturating_duration_since(*at) < LOST_LEASES_KEPT_FOR);
        for incarnation in incarnations {
            let known = self.members.get(incarnation);
            let Some(known) = known.filter(|known| known.state != MemberState::Drained) else {
                continue;
            };
            let loss = (known.registration.node.clone(), now);
            self.lost_leases
                .entry((*incarnation, known.renewed_at))
                .or_insert(loss);
        }
    }

    /// How long ago a node lost leases, the last one first.
    fn leases_lost_ago(&self, node: &NodeId, now: Instant) -> Vec<Duration> {
        let losses = self.lost_leases.values().filter(|(of, _)| of == node);
        let mut ago: Vec<Duration> = losses
            .map(|(_, at)| now.saturating_duration_since(*at))
            .filter(|ago| *ago < LOST_LEASES_KEPT_FOR)
            .collect();
        ago.sort_unstable();
        ago
    }

    /// Every member, in order of node name and incarnation.
    fn members(&self, now: Instant) -> Vec<Member> {
        let mut members: Vec<Member> = self
            .members
            .values()
            .map(|member| {
                let Registration {
                    node,
                    incarnation,
                    pod_uid,
                    address,
                    zone,
                    weight,
                } = member.registration.clone();
                Member {
                    leases_lost_ago: self.leases_lost_ago(&node, now),
                    node,
                    incarnation,
                    pod_uid,
                    address,
                    zone,
                    weight,
                    state: member.state,
                    lease_left: member.lease_end.saturating_duration_since(now),
                    load: member.load.clone(),
                    load_age: now.saturating_duration_since(member.renewed_at),
                }
            })
            .collect();
        members.sort_by(|a, b| (&a.node, a.incarnation).cmp(&(&b.node, b.incarnation)));
        members
    }

    fn renew(
        &mut self,
        incarnation: Uuid,
        lease_end: Instant,
        load: LoadSample,
        now: Instant,
    ) -> Option<(Vec<Member>, i64)> {
        let member = self.members.get_mut(&incarnation)?;
        if member.fenced {
            return None;
        }
        if RENEWAL_GAP_MAX < now.saturating_duration_since(member.renewed_at) {
            member.steady_since = now;
        }
        member.lease_end = lease_end;
        member.renewed_at = now;
        member.load = Some(load);
        Some((self.members(now), self.placement.version))
    }

    fn end_lease(&mut self, judge: Uuid, target: Uuid, age: Duration, now: Instant) -> Judgement {
        if judge == target || !self.lives(judge, now) || !self.lives(target, now) {
            return Judgement::Void;
        }
        let Some(member) = self.members.get_mut(&target) else {
            return Judgement::Void;
        };
        let renewed = now.saturating_duration_since(member.renewed_at);
        if renewed < age {
            return Judgement::Fresh(renewed);
        }
        member.fenced = true;
        member.lease_end = now;
        Judgement::Ended
    }

    /// Those that transactions since `horizon` changed.
    fn slot_rows(&self, horizon: i64) -> Vec<SlotRow> {
        let rows = (0_u16..).zip(&self.slots);
        let changed = rows.filter(|(_, row)| horizon <= row.revision);
        changed
            .map(|(slot, row)| SlotRow {
                slot: Slot(slot),
                owner: row.owner,
                epoch: row.epoch,
            })
            .collect()
    }

    /// The documents of the virtual slots among `rows`.
    fn pins_of(&self, rows: &[SlotRow]) -> Vec<(Slot, Option<DocumentId>)> {
        let is_virtual = |row: &&SlotRow| self.slots_fixed <= row.slot.0;
        let document = |row: &SlotRow| (row.slot, self.pins.get(&row.slot).cloned());
        rows.iter().filter(is_virtual).map(document).collect()
    }

    fn pinned(&self, document: &DocumentId) -> Option<Slot> {
        let mut pins = self.pins.iter();
        pins.find(|(_, pinned)| *pinned == document)
            .map(|(slot, _)| *slot)
    }

    fn pin(&mut self, document: &DocumentId, home: Slot, first_epoch: Epoch) {
        if self.pinned(document).is_some() {
            return;
        }
        let end = u16::try_from(self.slots.len()).unwrap_or(u16::MAX);
        let mut free = (self.slots_fixed..=end).map(Slot);
        let free = free.find(|slot| !self.pins.contains_key(slot));
        let own = free.unwrap_or(Slot(end));
        if own.0 == end {
            self.slots.push(SlotRecord {
                epoch: first_epoch,
                ..SlotRecord::default()
            });
        }
        self.pins.insert(own, document.clone());
        let owner = self.slots[usize::from(home.0)].owner;
        self.move_document(home, own, owner);
    }

    fn unpin(&mut self, document: &DocumentId, home: Slot) {
        if let Some(own) = self.pinned(document) {
            self.pins.remove(&own);
            self.move_document(home, own, None);
        }
    }

    /// Raises the epochs of both slots; `own` gets this owner.
    fn move_document(&mut self, home: Slot, own: Slot, owner: Option<Uuid>) {
        self.transaction += 1;
        self.slots[usize::from(own.0)].owner = owner;
        for slot in [home, own] {
            let row = &mut self.slots[usize::from(slot.0)];
            let kept = slot == home && Mutant::PinKeepsEpoch.is_active();
            row.epoch.0 += i64::from(!kept);
            row.revision = self.transaction;
        }
    }

    fn claim(
        &mut self,
        incarnation: Uuid,
        slots: &[Slot],
        claim: Claim,
        now: Instant,
    ) -> Vec<(Slot, Epoch)> {
        let able = match claim {
            Claim::Orphaned | Claim::Left(_) => self.lives(incarnation, now),
            Claim::OrphanedBySteady => {
                self.lives(incarnation, now) && self.is_steady(incarnation, now)
            }
        };
        if !able {
            return Vec::new();
        }
        let orphaned = |slot: &Slot| {
            let row = self.slots.get(usize::from(slot.0));
            row.is_some_and(|row| match claim {
                Claim::Left(owner) => {
                    row.owner == Some(owner) && !self.members.contains_key(&owner)
                }
                _ => row.owner.is_none_or(|owner| !self.lives(owner, now)),
            })
        };
        let orphans: Vec<Slot> = slots
            .iter()
            .filter(|slot| orphaned(slot))
            .copied()
            .collect();
        self.give(&orphans, incarnation, true)
    }

    fn hand_off(&mut self, from: &[Ownership], to: Uuid, now: Instant) -> Vec<(Slot, Epoch)> {
        let able = self
            .members
            .get(&to)
            .is_some_and(|member| member.state == MemberState::Active && now < member.lease_end);
        if !able {
            return Vec::new();
        }
        let held: Vec<Slot> = from
            .iter()
            .filter(|ownership| self.holds(**ownership))
            .map(|ownership| ownership.slot)
            .collect();
        self.give(&held, to, false)
    }

    fn reclaim(&mut self, incarnation: Uuid, held: &[Ownership]) -> Vec<(Slot, Epoch)> {
        if self
            .members
            .get(&incarnation)
            .is_none_or(|member| member.fenced)
        {
            return Vec::new();
        }
        let mut mine = Vec::new();
        for Ownership { slot, epoch, .. } in held {
            if let Some(row) = self.slots.get_mut(usize::from(slot.0))
                && row.epoch <= *epoch
            {
                row.epoch = *epoch;
                mine.push(*slot);
            }
        }
        self.give(&mine, incarnation, false)
    }

    fn give(&mut self, slots: &[Slot], to: Uuid, adopted: bool) -> Vec<(Slot, Epoch)> {
        if !slots.is_empty() {
            self.transaction += 1;
        }
        let mut given = Vec::new();
        for slot in slots {
            if let Some(row) = self.slots.get_mut(usize::from(slot.0)) {
                row.adoptions += u64::from(adopted && row.owner.is_some());
                row.owner = Some(to);
                row.epoch.0 += 1;
                row.revision = self.transaction;
                given.push((*slot, row.epoch));
            }
        }
        given.sort_unstable();
        given
    }

    /// Lets an operator act whose term is not older than the newest.
    fn grant(&mut self, term: Term) -> Result<(), Term> {
        if term < self.term {
            return Err(self.term);
        }
        self.term = term;
        Ok(())
    }

    fn document_row(&self, id: &DocumentId, started: Instant) -> Option<DocumentRow> {
        let document = self.documents.get(id).filter(|row| !row.deleted)?;
        let millis = |at: Instant| {
            let passed = i64::try_from((at - started).as_millis()).unwrap_or(i64::MAX);
            BEGINNING_MS.saturating_add(passed)
        };
        let updated = document
            .log
            .last_key_value()
            .map(|(_, row)| row.at)
            .or_else(|| document.snapshots.last_key_value().map(|(_, row)| row.at));
        Some(DocumentRow {
            id: id.clone(),
            created_ms: millis(document.created_at),
            updated_ms: millis(updated.unwrap_or(document.created_at)),
            seq: document.last(),
        })
    }
}

impl DocumentRecord {
    /// The last position that was ever used, as far as the rows tell.
    fn last(&self) -> Seq {
        let logged = self.log.last_key_value().map(|(seq, _)| *seq);
        let stored = self.snapshots.last_key_value().map(|(seq, _)| *seq);
        [logged, stored]
            .into_iter()
            .flatten()
            .fold(self.base, Seq::max)
    }
}

impl Memory {
    /// Nothing is written between a fail-over and [`Store::reclaim`].
    fn may_write(&self) -> Result<(), StoreError> {
        if self.failovers().is_pending() {
            let reason = "the database has failed over and the slots are not taken back yet";
            return Err(StoreError::Unavailable(sqlx::Error::Configuration(
                reason.into(),
            )));
        }
        Ok(())
    }
}

#[async_trait]
impl Store for Memory {
    async fn append(&self, batch: &[Append]) -> Result<Appended, StoreError> {
        self.may_write()?;
        let batch = batch.to_vec();
        Ok(self
            .database
            .write(move |rows, now| rows.append(&batch, now)))
    }

    async fn written(&self, keys: &[(DocumentId, Seq)]) -> Result<Vec<WrittenRow>, StoreError> {
        Ok(self.database.read(|rows, _| rows.written(keys)))
    }

    async fn load_with(
        &self,
        document: &DocumentId,
        copy: Option<(RoomEpoch, StoredSnapshot)>,
    ) -> Result<Loaded, LoadError> {
        self.database
            .read(|rows, _| rows.load(document, copy.as_ref()))
    }

    async fn create(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        recreate: Recreate,
    ) -> Result<Created, StoreError> {
        self.may_write()?;
        let document = document.clone();
        Ok(self
            .database
            .write(move |rows, now| rows.create(&document, ownership, recreate, now)))
    }

    async fn delete(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        last: Seq,
    ) -> Result<Fence, StoreError> {
        self.may_write()?;
        let document = document.clone();
        Ok(self
            .database
            .write(move |rows, _| rows.delete(&document, ownership, last)))
    }

    async fn snapshot(&self, snapshot: &NewSnapshot) -> Result<Fence, StoreError> {
        self.may_write()?;
        let snapshot = snapshot.clone();
        Ok(self
            .database
            .write(move |rows, now| rows.snapshot(&snapshot, now)))
    }

    async fn compact(
        &self,
        document: &DocumentId,
        ownership: Ownership,
    ) -> Result<Fence, StoreError> {
        self.may_write()?;
        let document = document.clone();
        Ok(self
            .database
            .write(move |rows, _| rows.compact(&document, ownership)))
    }

    async fn documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<DocumentRow>, StoreError> {
        let started = self.database.server().started;
        Ok(self.database.read(|rows, _| {
            rows.documents
                .keys()
                .filter(|id| after.is_none_or(|after| after < *id))
                .filter_map(|id| rows.document_row(id, started))
                .take(usize::try_from(limit).unwrap_or(usize::MAX))
                .collect()
        }))
    }

    async fn document(&self, document: &DocumentId) -> Result<Option<DocumentRow>, StoreError> {
        let started = self.database.server().started;
        Ok(self
            .database
            .read(|rows, _| rows.document_row(document, started)))
    }

    async fn register(
        &self,
        member: &Registration,
        slots: u16,
        lease: Duration,
    ) -> Result<Option<Uuid>, StoreError> {
        let existing = self.database.read(|rows, _| rows.slots_fixed);
        if existing != 0 && existing != slots {
            return Err(StoreError::Unusable(format!(
                "the cluster was created with {existing} slots and this node was started with {slots}; \
                 the number of slots cannot change"
            )));
        }
        let member = member.clone();
        let before = self
            .database
            .write(move |rows, now| rows.register(&member, slots, now + lease, now));
        self.database.members_changed.notify_waiters();
        Ok(before)
    }

    async fn renew(
        &self,
        incarnation: Uuid,
        pod_uid: &str,
        lease: Duration,
        load: LoadSample,
    ) -> Result<Renewal, StoreError> {
        let renewed = self
            .database
            .write(move |rows, now| rows.renew(incarnation, now + lease, load.clone(), now));
        let timeline = self.database.timeline_name();
        if let Some((members, placement_version)) = renewed {
            return Ok(Renewal::Renewed(Renewed {
                members,
                placement_version,
                timeline,
            }));
        }
        let superseded = self.database.read(|rows, _| {
            rows.members.values().any(|member| {
                member.registration.pod_uid == pod_uid
                    && member.registration.incarnation != incarnation
            })
        });
        Ok(if superseded {
            Renewal::Superseded
        } else {
            Renewal::Fenced
        })
    }

    async fn end_lease(
        &self,
        judge: Uuid,
        target: Uuid,
        age: Duration,
    ) -> Result<Judgement, StoreError> {
        let judgement = self
            .database
            .write(move |rows, now| rows.end_lease(judge, target, age, now));
        if judgement == Judgement::Ended {
            self.database.members_changed.notify_waiters();
        }
        Ok(judgement)
    }

    async fn note_lost_leases(&self, incarnations: &[Uuid]) -> Result<(), StoreError> {
        let incarnations = incarnations.to_vec();
        self.database.write(move |rows, now| {
            let ended = |incarnation: &Uuid| !rows.lives(*incarnation, now);
            let lost: Vec<Uuid> = incarnations.iter().copied().filter(ended).collect();
            rows.lose_leases(&lost, now);
        });
        Ok(())
    }

    async fn set_state(&self, incarnation: Uuid, state: MemberState) -> Result<(), StoreError> {
        self.database.write(move |rows, _| {
            if let Some(member) = rows.members.get_mut(&incarnation) {
                member.state = state;
            }
        });
        Ok(())
    }

    async fn leave(&self, incarnation: Uuid) -> Result<(), StoreError> {
        self.database
            .write(move |rows, _| drop(rows.members.remove(&incarnation)));
        self.database.members_changed.notify_waiters();
        Ok(())
    }

    async fn map(&self, horizon: i64) -> Result<MapChange, StoreError> {
        let timeline = self.database.timeline();
        // A horizon of the primary before would hide what the new one changed under the same numbers.
        let horizon = if self.map_read_on.swap(timeline, Ordering::AcqRel) == timeline {
            horizon
        } else {
            0
        };
        Ok(self.database.read(|rows, _| {
            let slots = rows.slot_rows(horizon);
            MapChange {
                horizon: rows.transaction + 1,
                pins: rows.pins_of(&slots),
                slots,
                is_whole: horizon == 0,
            }
        }))
    }

    async fn claim(
        &self,
        incarnation: Uuid,
        slots: &[Slot],
        claim: Claim,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        let slots = slots.to_vec();
        let taken = self
            .database
            .write(move |rows, now| rows.claim(incarnation, &slots, claim, now));
        self.database.map_changed.notify_waiters();
        Ok(taken)
    }

    async fn reclaim(
        &self,
        incarnation: Uuid,
        held: &[Ownership],
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        let timeline = self.database.timeline();
        let held = held.to_vec();
        let taken = self
            .database
            .write(move |rows, _| rows.reclaim(incarnation, &held));
        self.reclaimed_on.store(timeline, Ordering::Release);
        self.database.map_changed.notify_waiters();
        Ok(taken)
    }

    fn failovers(&self) -> Failovers {
        Failovers {
            seen: self.database.timeline(),
            reclaimed: self.reclaimed_on.load(Ordering::Acquire),
        }
    }

    async fn hand_off(
        &self,
        from: &[Ownership],
        to: Uuid,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        let from = from.to_vec();
        let moved = self
            .database
            .write(move |rows, now| rows.hand_off(&from, to, now));
        self.database.map_changed.notify_waiters();
        Ok(moved)
    }

    async fn pinned(&self, document: &DocumentId) -> Result<Option<Slot>, StoreError> {
        Ok(self.database.read(|rows, _| rows.pinned(document)))
    }

    async fn pin(
        &self,
        term: Term,
        document: &DocumentId,
        home: Slot,
    ) -> Result<Result<(), Term>, StoreError> {
        let document = document.clone();
        let epoch = first_epoch(&self.database.timeline_name());
        let done = self.database.write(move |rows, _| {
            rows.grant(term)?;
            rows.pin(&document, home, epoch);
            Ok(())
        });
        self.database.map_changed.notify_waiters();
        Ok(done)
    }

    async fn unpin(
        &self,
        term: Term,
        document: &DocumentId,
        home: Slot,
    ) -> Result<Result<(), Term>, StoreError> {
        let document = document.clone();
        let done = self.database.write(move |rows, _| {
            rows.grant(term)?;
            rows.unpin(&document, home);
            Ok(())
        });
        self.database.map_changed.notify_waiters();
        Ok(done)
    }

    async fn placement(&self) -> Result<Placement, StoreError> {
        Ok(self.database.read(|rows, _| rows.placement.clone()))
    }

    async fn take_term(&self, _holder: &str) -> Result<Term, StoreError> {
        Ok(self.database.write(|rows, _| {
            rows.term.0 += 1;
            rows.term
        }))
    }

    async fn set_placement(
        &self,
        term: Term,
        slots: &[NodeId],
    ) -> Result<Result<(), Term>, StoreError> {
        let slots = slots.to_vec();
        Ok(self.database.write(move |rows, _| {
            rows.grant(term)?;
            if rows.placement.slots != slots {
                rows.placement.slots.clone_from(&slots);
                rows.placement.version += 1;
            }
            Ok(())
        }))
    }

    async fn set_drain(
        &self,
        term: Term,
        node: &NodeId,
        drain: bool,
    ) -> Result<Result<(), Term>, StoreError> {
        let node = node.clone();
        Ok(self.database.write(move |rows, _| {
            rows.grant(term)?;
            for member in rows.members.values_mut() {
                if member.registration.node == node
                    && (member.state == MemberState::Active || !drain)
                {
                    member.state = if drain {
                        MemberState::Draining
                    } else {
                        MemberState::Active
                    };
                }
            }
            Ok(())
        }))
    }

    async fn fence(&self, term: Term, incarnation: Uuid) -> Result<Result<(), Term>, StoreError> {
        let fenced = self.database.write(move |rows, now| {
            rows.grant(term)?;
            if let Some(member) = rows.members.get_mut(&incarnation) {
                member.fenced = true;
                member.lease_end = member.lease_end.min(now);
            }
            Ok(())
        });
        self.database.members_changed.notify_waiters();
        Ok(fenced)
    }

    async fn set_zones(
        &self,
        term: Term,
        zones: &BTreeMap<NodeId, String>,
    ) -> Result<Result<(), Term>, StoreError> {
        let zones = zones.clone();
        Ok(self.database.write(move |rows, _| {
            rows.grant(term)?;
            for member in rows.members.values_mut() {
                if let Some(zone) = zones.get(&member.registration.node) {
                    member.registration.zone.clone_from(zone);
                }
            }
            Ok(())
        }))
    }

    async fn summary(&self) -> Result<Summary, StoreError> {
        let timeline = self.database.timeline_name();
        Ok(self.database.read(|rows, _| Summary {
            term: rows.term,
            adoptions: rows.slots.iter().map(|slot| slot.adoptions).sum(),
            revision: rows.transaction,
            store: StoreReport {
                version: "memory".to_owned(),
                synchronous_standby: false,
                timeline,
            },
        }))
    }

    async fn map_changed(&self) {
        self.database.map_changed.notified().await;
    }

    async fn members_changed(&self) {
        self.database.members_changed.notified().await;
    }
}
