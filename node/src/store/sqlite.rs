//! The store of one embedded node: a SQLite file.
//!
//! The same rules as in Postgres, with less to fear: a lock on the folder keeps other processes out,
//! one connection writes, and a transaction on it is what one statement is there. Epochs still rise
//! with each run, so that the log tells runs apart. The one member is this process: it lives in
//! memory, and its lease never ends.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use collab_core::control::{LoadSample, MemberState, StoreReport};
use collab_core::ids::{DocumentId, Epoch, NodeId, RoomEpoch, Seq, Slot, Term};
use collab_core::limits::SNAPSHOTS_KEPT;
use serde::Deserialize;
use sqlx::error::DatabaseError;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow,
    SqliteSynchronous,
};
use sqlx::{Connection, QueryBuilder, Row, Sqlite as Database, SqliteConnection, Transaction};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use uuid::Uuid;

mod checkpoint;
mod folder;
mod rows;
mod writer;

use self::folder::FolderLock;
use self::writer::Writer;
use super::integrity::{LIBRARY, LogRow, check_tail, snapshot_hash};
use super::{
    Append, Appended, Claim, Created, DocumentRow, Failovers, Fence, Judgement, LoadError, Loaded,
    MapChange, Member, NewSnapshot, Ownership, Placement, Recreate, Registration, Renewal, Renewed,
    SlotRow, Store, StoreError, StoredSnapshot, Summary, WrittenRow,
};

/// Connections that read, on a machine with as many cores. With more of them than cores all that is read at once comes late.
const READERS_MAX: u32 = 4;
/// Rows of one insert; each binds 8 variables at most, of which SQLite allows 32,766.
const INSERT_ROWS_MAX: usize = 1_000;
/// Sizes of the statements that are kept prepared.
const INSERT_PLACES: [usize; 11] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, INSERT_ROWS_MAX];
/// Pages of the file that each connection keeps, as SQLite wants it: negative, in KiB. The system has the file in memory, too.
const CACHE_SIZE: &str = "-512";

/// A SQLite file behind one embedded node.
#[derive(Debug)]
pub struct Sqlite {
    writer: Arc<Writer>,
    /// Moves what was appended to its place, and writes what is durable together with what comes after it.
    beside: SqlitePool,
    readers: SqlitePool,
    member: Mutex<Option<Member>>,
    /// Since the last checkpoint.
    appended: Arc<AtomicBool>,
    checkpoints: AbortHandle,
    /// Held for as long as the store lives.
    _lock: FolderLock,
}

impl Sqlite {
    /// Opens `collab.sqlite` in `folder`; makes both when they do not exist.
    ///
    /// # Errors
    /// [`StoreError::Unusable`] when the folder cannot be used, or another process uses it.
    pub async fn open(folder: &Path) -> Result<Self, StoreError> {
        let lock = FolderLock::take(folder)?;
        let options = SqliteConnectOptions::new()
            .filename(folder.join("collab.sqlite"))
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .pragma("wal_autocheckpoint", checkpoint::PAGES_MAX)
            .pragma("cache_size", CACHE_SIZE);
        let pool = |size| {
            SqlitePoolOptions::new()
                .max_connections(size)
                // A connection to a file does not break.
                .test_before_acquire(false)
                .idle_timeout(None)
                .max_lifetime(None)
        };
        let beside = options.clone().synchronous(SqliteSynchronous::Normal);
        let beside = pool(1).connect_lazy_with(beside);
        // A newer version may have been here: what it added does not disturb this one.
        let mut migrations = sqlx::migrate!("migrations/sqlite");
        migrations.set_ignore_missing(true);
        migrations
            .run(&mut *beside.acquire().await.map_err(failed)?)
            .await
            .map_err(|error| StoreError::Unusable(error.to_string()))?;
        let appended = Arc::new(AtomicBool::new(false));
        let writer = Arc::new(Writer::new(options.clone()));
        let checkpoints = checkpoint::keep_moving(beside.clone(), writer.clone(), appended.clone());
        let checkpoints = tokio::spawn(checkpoints).abort_handle();
        let cores = Handle::current().metrics().num_workers();
        let readers = u32::try_from(cores).map_or(READERS_MAX, |cores| cores.min(READERS_MAX));
        let readers = pool(readers).connect_lazy_with(options.read_only(true));
        Ok(Self {
            writer,
            beside,
            readers,
            member: Mutex::new(None),
            appended,
            checkpoints,
            _lock: lock,
        })
    }

    /// Appends as many rows in one statement, which is a transaction of its own. Answers the keys that were inserted.
    async fn insert(&self, batch: &[Append]) -> Result<Vec<(DocumentId, Seq)>, StoreError> {
        let places = INSERT_PLACES
            .into_iter()
            .find(|places| batch.len() <= *places);
        let places = places.unwrap_or(batch.len());
        // The same text for many sizes, so that it is read once. What is not used has no document. A cross join says that
        // the rows come first, and are neither written down nor sorted before.
        let mut insert = QueryBuilder::<Database>::new(
            "with r(document, seq, slot, epoch, incarnation, crc32c, bytes, author) as (",
        );
        let rows = batch.iter().map(Some).chain(std::iter::repeat(None));
        insert.push_values(rows.take(places), |mut row, append| {
            let ownership = append.map(|append| append.ownership);
            row.push_bind(append.map(|append| append.document.as_str()))
                .push_bind(append.map(|append| append.seq.0))
                .push_bind(ownership.map(|ownership| ownership.slot.0))
                .push_bind(ownership.map(|ownership| ownership.epoch.0))
                .push_bind(ownership.map(|ownership| ownership.incarnation))
                .push_bind(append.map(|append| crc32c::crc32c(&append.bytes)))
                .push_bind(append.map(|append| append.bytes.as_ref()))
                .push_bind(append.map(|append| append.author.as_str()));
        });
        insert.push(
            ") insert into update_log (document, seq, slot, epoch, crc32c, bytes, author, at)
             select r.document, r.seq, r.slot, r.epoch, r.crc32c, r.bytes, r.author,
               cast(unixepoch('subsec') * 1000 as integer)
             from r
               cross join slot s on s.slot = r.slot and s.epoch = r.epoch and s.owner = r.incarnation
               cross join document d on d.id = r.document and not d.deleted and d.base_seq < r.seq
             where true on conflict (document, seq) do nothing",
        );
        let mut writer = self.writer.lock().await?;
        let done = insert.build().execute(&mut *writer).await;
        let done = done.map_err(failed)?;
        // Nearly always it was all, and to be told of each row would cost as much as to write it.
        let count = done.rows_affected();
        if count == batch.len() as u64 {
            let key = |append: &Append| (append.document.clone(), append.seq);
            return Ok(batch.iter().map(key).collect());
        }
        inserted(&mut writer, done.last_insert_rowid(), count).await
    }

    async fn holds(&self, ownership: Ownership) -> Result<bool, StoreError> {
        holds(&mut *self.writer.lock().await?, ownership).await
    }
}

/// The keys of the last rows: nobody else inserts, and each row gets the next number.
async fn inserted(
    writer: &mut SqliteConnection,
    last: i64,
    count: u64,
) -> Result<Vec<(DocumentId, Seq)>, StoreError> {
    let rows = sqlx::query(
        "select document, seq from update_log where rowid > ?1 - ?2 and rowid <= ?1 order by rowid",
    )
    .bind(last)
    .bind(i64::try_from(count).unwrap_or(i64::MAX))
    .fetch_all(writer)
    .await
    .map_err(failed)?;
    rows.iter()
        .map(|row| Ok((document_id(get(row, 0)?)?, Seq(get(row, 1)?))))
        .collect()
}

impl Drop for Sqlite {
    fn drop(&mut self) {
        self.checkpoints.abort();
    }
}

/// Begins a transaction that writes.
async fn begin(writer: &mut SqliteConnection) -> Result<Transaction<'_, Database>, StoreError> {
    let begun = writer.begin_with("begin immediate").await;
    begun.map_err(failed)
}

#[async_trait]
impl Store for Sqlite {
    async fn append(&self, batch: &[Append]) -> Result<Appended, StoreError> {
        self.appended.store(true, Ordering::Relaxed);
        let mut inserted = Vec::with_capacity(batch.len());
        for rows in batch.chunks(INSERT_ROWS_MAX) {
            inserted.extend(self.insert(rows).await?);
        }
        let owned: BTreeSet<_> = batch.iter().map(|append| append.ownership).collect();
        let mut held = Vec::with_capacity(owned.len());
        // Nearly always all of it was inserted, and so all of it is held.
        let all = inserted.len() == batch.len();
        for ownership in owned {
            if all || self.holds(ownership).await? {
                held.push(ownership.slot);
            }
        }
        Ok(Appended { held, inserted })
    }

    async fn written(&self, keys: &[(DocumentId, Seq)]) -> Result<Vec<WrittenRow>, StoreError> {
        let mut written = Vec::new();
        for (document, seq) in keys {
            let row =
                sqlx::query("select epoch, crc32c from update_log where document = ? and seq = ?")
                    .bind(document.as_str())
                    .bind(seq.0)
                    .fetch_optional(&self.readers)
                    .await
                    .map_err(failed)?;
            if let Some(row) = row {
                let (epoch, crc32c) = (Epoch(get(&row, 0)?), get(&row, 1)?);
                written.push(WrittenRow {
                    document: document.clone(),
                    seq: *seq,
                    epoch,
                    crc32c,
                });
            }
        }
        Ok(written)
    }

    async fn load_with(
        &self,
        document: &DocumentId,
        _: Option<(RoomEpoch, StoredSnapshot)>, // nothing is faster than this file
    ) -> Result<Loaded, LoadError> {
        let mut view = self.readers.begin().await.map_err(failed)?;
        let row = sqlx::query("select deleted, room_epoch, base_seq from document where id = ?")
            .bind(document.as_str())
            .fetch_optional(&mut *view)
            .await
            .map_err(failed)?;
        let Some(row) = row else {
            return Ok(Loaded::Absent);
        };
        if get(&row, 0)? {
            return Ok(Loaded::Deleted);
        }
        let room_epoch = RoomEpoch(get(&row, 1)?);
        let mut after = Seq(get(&row, 2)?);
        let mut reach = after;
        let mut snapshot = None;
        for seq in snapshots(&mut view, document, after).await? {
            reach = reach.max(seq);
            if let Some(bytes) = verified(&mut view, document, room_epoch, seq).await? {
                snapshot = Some(StoredSnapshot { seq, bytes });
                after = seq;
                break;
            }
            tracing::error!(document.id = %document, %seq, "a snapshot does not verify; trying the one before");
        }
        let rows = log_after(&mut view, document, after).await?;
        check_tail(after, reach, rows).after(document, room_epoch, snapshot)
    }

    async fn create(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        recreate: Recreate,
    ) -> Result<Created, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if !holds(&mut write, ownership).await? {
            return Ok(Created::Fenced);
        }
        let row = sqlx::query(
            "insert into document (id, slot, created_at) values (?, ?, cast(unixepoch('subsec') * 1000 as integer))
             on conflict (id) do update
               set deleted = 0, room_epoch = document.room_epoch + 1, created_at = excluded.created_at
               where document.deleted and ?
             returning room_epoch",
        )
        .bind(document.as_str())
        .bind(ownership.slot.0)
        .bind(recreate == Recreate::Allowed)
        .fetch_optional(&mut *write)
        .await
        .map_err(failed)?;
        write.commit().await.map_err(failed)?;
        Ok(match row {
            None => Created::Exists,
            Some(row) => Created::Created {
                room_epoch: RoomEpoch(get(&row, 0)?),
            },
        })
    }

    async fn delete(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        last: Seq,
    ) -> Result<Fence, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if !holds(&mut write, ownership).await? {
            return Ok(Fence::Fenced);
        }
        // The base is at least what is stored, whatever the caller believes: a seq is never used twice.
        sqlx::query(
            "update document set deleted = 1, base_seq = max(base_seq, ?2,
               (select coalesce(max(seq), 0) from update_log where document = ?1),
               (select coalesce(max(seq), 0) from snapshot where document = ?1))
             where id = ?1 and not deleted",
        )
        .bind(document.as_str())
        .bind(last.0)
        .execute(&mut *write)
        .await
        .map_err(failed)?;
        cut(&mut write, document).await?;
        write.commit().await.map_err(failed)?;
        Ok(Fence::Held)
    }

    async fn snapshot(&self, snapshot: &NewSnapshot) -> Result<Fence, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if !holds(&mut write, snapshot.ownership).await? {
            return Ok(Fence::Fenced);
        }
        put_snapshot(&mut write, snapshot).await?;
        write.commit().await.map_err(failed)?;
        Ok(Fence::Held)
    }

    async fn compact(
        &self,
        document: &DocumentId,
        ownership: Ownership,
    ) -> Result<Fence, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if !holds(&mut write, ownership).await? {
            return Ok(Fence::Fenced);
        }
        let room_epoch: Option<i64> =
            sqlx::query_scalar("select room_epoch from document where id = ?")
                .bind(document.as_str())
                .fetch_optional(&mut *write)
                .await
                .map_err(failed)?;
        let Some(room_epoch) = room_epoch else {
            return Ok(Fence::Held);
        };
        // Only snapshots that verify count as kept.
        let mut kept = 0;
        for seq in snapshots(&mut write, document, Seq(0)).await? {
            if verified(&mut write, document, RoomEpoch(room_epoch), seq)
                .await?
                .is_none()
            {
                continue;
            }
            kept += 1;
            if kept == SNAPSHOTS_KEPT {
                for cut in [
                    "delete from update_log where document = ? and seq <= ?",
                    "delete from snapshot where document = ? and seq < ?",
                ] {
                    sqlx::query(cut)
                        .bind(document.as_str())
                        .bind(seq.0)
                        .execute(&mut *write)
                        .await
                        .map_err(failed)?;
                }
                break;
            }
        }
        write.commit().await.map_err(failed)?;
        Ok(Fence::Held)
    }

    async fn documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<DocumentRow>, StoreError> {
        let rows = sqlx::query(DOCUMENTS)
            .bind(after.map_or("", DocumentId::as_str))
            .bind(None::<&str>)
            .bind(limit)
            .fetch_all(&self.readers)
            .await
            .map_err(failed)?;
        rows.iter().map(document_row).collect()
    }

    async fn document(&self, document: &DocumentId) -> Result<Option<DocumentRow>, StoreError> {
        let row = sqlx::query(DOCUMENTS)
            .bind("")
            .bind(document.as_str())
            .bind(1)
            .fetch_optional(&self.readers)
            .await
            .map_err(failed)?;
        row.as_ref().map(document_row).transpose()
    }

    async fn register(
        &self,
        member: &Registration,
        slots: u16,
        lease: Duration,
    ) -> Result<Option<Uuid>, StoreError> {
        let mut beside = self.beside.acquire().await.map_err(failed)?;
        let mut write = begin(&mut beside).await?;
        let made = sqlx::query("insert into control (slots) values (?) on conflict do nothing")
            .bind(slots)
            .execute(&mut *write)
            .await
            .map_err(failed)?;
        let existing: u16 = sqlx::query_scalar("select slots from control")
            .fetch_one(&mut *write)
            .await
            .map_err(failed)?;
        if existing != slots {
            return Err(StoreError::Unusable(format!(
                "the data folder was created with {existing} slots and this node was started with {slots}; \
                 the number of slots cannot change"
            )));
        }
        if made.rows_affected() == 1 {
            sqlx::query(
                "with recursive n(slot) as (values (0) union all select slot + 1 from n where slot + 1 < ?)
                 insert into slot (slot) select slot from n",
            )
            .bind(slots)
            .execute(&mut *write)
            .await
            .map_err(failed)?;
        }
        write.commit().await.map_err(failed)?;
        let mut known = self.member.lock().expect("no holder panics");
        let before = known
            .take()
            .filter(|before| before.pod_uid == member.pod_uid);
        let zone = before.as_ref().map(|before| before.zone.clone());
        let zone = zone.filter(|_| member.zone.is_empty());
        *known = Some(Member {
            node: member.node.clone(),
            incarnation: member.incarnation,
            pod_uid: member.pod_uid.clone(),
            address: member.address.clone(),
            zone: zone.unwrap_or_else(|| member.zone.clone()),
            weight: member.weight,
            state: MemberState::Active,
            lease_left: lease,
            load: None,
            load_age: Duration::ZERO,
            leases_lost_ago: Vec::new(),
        });
        let before = before.map(|before| before.incarnation);
        Ok(before.filter(|before| *before != member.incarnation))
    }

    async fn renew(
        &self,
        incarnation: Uuid,
        _pod_uid: &str,
        lease: Duration,
        load: LoadSample,
    ) -> Result<Renewal, StoreError> {
        let placement_version = self.placement().await?.version;
        let mut member = self.member.lock().expect("no holder panics");
        let member = match member.as_mut() {
            Some(member) if member.incarnation == incarnation => member,
            Some(_) => return Ok(Renewal::Superseded),
            None => return Ok(Renewal::Fenced),
        };
        member.lease_left = lease;
        member.load = Some(load);
        Ok(Renewal::Renewed(Renewed {
            members: vec![member.clone()],
            placement_version,
            timeline: String::new(),
        }))
    }

    async fn end_lease(
        &self,
        _judge: Uuid,
        _target: Uuid,
        _age: Duration,
    ) -> Result<Judgement, StoreError> {
        Ok(Judgement::Void) // there is no other member
    }

    async fn note_lost_leases(&self, _incarnations: &[Uuid]) -> Result<(), StoreError> {
        Ok(()) // nor one that would have lost its lease
    }

    async fn set_state(&self, incarnation: Uuid, state: MemberState) -> Result<(), StoreError> {
        let mut member = self.member.lock().expect("no holder panics");
        if let Some(member) = member
            .as_mut()
            .filter(|member| member.incarnation == incarnation)
        {
            member.state = state;
        }
        Ok(())
    }

    async fn leave(&self, incarnation: Uuid) -> Result<(), StoreError> {
        self.member
            .lock()
            .expect("no holder panics")
            .take_if(|member| member.incarnation == incarnation);
        Ok(())
    }

    async fn map(&self, horizon: i64) -> Result<MapChange, StoreError> {
        let mut view = self.readers.begin().await.map_err(failed)?;
        let revision: Option<i64> = sqlx::query_scalar("select revision from control")
            .fetch_optional(&mut *view)
            .await
            .map_err(failed)?;
        // In as many rows as there are owners: each takes two changes between threads. Lists of numbers take half as long
        // to make and to read as a list of lists.
        let rows = sqlx::query(
            "select owner, json_group_array(slot), json_group_array(epoch),
               json_group_object(slot, document) filter (where slot >= (select slots from control))
             from slot where revision >= ? group by owner",
        )
        .bind(horizon)
        .fetch_all(&mut *view)
        .await
        .map_err(failed)?;
        let mut change = MapChange {
            horizon: revision.map_or(0, |revision| revision + 1),
            is_whole: horizon == 0,
            ..MapChange::default()
        };
        for row in &rows {
            let owner = get(row, 0)?;
            let slots = epochs(row, 1)?.into_iter();
            let slots = slots.map(|(slot, epoch)| SlotRow { slot, owner, epoch });
            change.slots.extend(slots);
            for (slot, document) in json::<BTreeMap<u16, Option<String>>>(get(row, 3)?)? {
                let document = document.map(document_id).transpose()?;
                change.pins.push((Slot(slot), document));
            }
        }
        change.slots.sort_unstable_by_key(|row| row.slot);
        Ok(change)
    }

    async fn claim(
        &self,
        incarnation: Uuid,
        slots: &[Slot],
        claim: Claim,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        // The one member of this store has nobody to take a slot from but its own earlier runs.
        let (Claim::Orphaned | Claim::OrphanedBySteady | Claim::Left(_)) = claim;
        if self
            .member
            .lock()
            .expect("no holder panics")
            .as_ref()
            .map(|member| member.incarnation)
            != Some(incarnation)
        {
            return Ok(Vec::new());
        }
        let numbers = serde_json::to_string(slots).map_err(StoreError::unusable)?;
        // Nobody waits for the disk: what stands under these epochs comes after them in the write-ahead log, and is
        // durable only with them.
        let mut beside = self.beside.acquire().await.map_err(failed)?;
        let mut write = begin(&mut beside).await?;
        sqlx::query("update control set revision = revision + 1")
            .execute(&mut *write)
            .await
            .map_err(failed)?;
        // Whoever else owned a slot was an earlier run in this folder.
        sqlx::query(
            "update slot set owner = ?1, epoch = epoch + 1, adoptions = adoptions + (owner is not null),
               revision = (select revision from control)
             where slot in (select value from json_each(?2)) and owner is not ?1",
        )
        .bind(incarnation)
        .bind(numbers)
        .execute(&mut *write)
        .await
        .map_err(failed)?;
        // In one row: each takes two changes between threads, and a node that starts claims all slots.
        let taken = sqlx::query(
            "select json_group_array(slot), json_group_array(epoch) from slot
             where owner = ? and revision = (select revision from control)",
        )
        .bind(incarnation)
        .fetch_one(&mut *write)
        .await
        .map_err(failed)?;
        write.commit().await.map_err(failed)?;
        let mut taken = epochs(&taken, 0)?;
        taken.sort_unstable();
        Ok(taken)
    }

    async fn reclaim(
        &self,
        _incarnation: Uuid,
        _held: &[Ownership],
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        Ok(Vec::new()) // a file does not fail over
    }

    fn failovers(&self) -> Failovers {
        Failovers::default()
    }

    async fn hand_off(
        &self,
        _from: &[Ownership],
        _to: Uuid,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        Ok(Vec::new()) // there is no other member
    }

    async fn pinned(&self, document: &DocumentId) -> Result<Option<Slot>, StoreError> {
        let slot = sqlx::query_scalar("select slot from slot where document = ?")
            .bind(document.as_str())
            .fetch_optional(&self.readers)
            .await
            .map_err(failed)?;
        Ok(slot.map(Slot))
    }

    async fn pin(
        &self,
        term: Term,
        document: &DocumentId,
        home: Slot,
    ) -> Result<Result<(), Term>, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if let Err(current) = grant(&mut write, term).await? {
            return Ok(Err(current));
        }
        if own_slot(&mut write, document).await?.is_none() {
            let free: u16 = sqlx::query_scalar(
                "select coalesce((select min(slot) from slot where (select slots from control) <= slot and document is null),
                   max(slot) + 1) from slot",
            )
            .fetch_one(&mut *write)
            .await
            .map_err(failed)?;
            sqlx::query("insert into slot (slot) values (?) on conflict do nothing")
                .bind(free)
                .execute(&mut *write)
                .await
                .map_err(failed)?;
            move_document(&mut write, home, Slot(free), Some(document)).await?;
        }
        write.commit().await.map_err(failed)?;
        Ok(Ok(()))
    }

    async fn unpin(
        &self,
        term: Term,
        document: &DocumentId,
        home: Slot,
    ) -> Result<Result<(), Term>, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if let Err(current) = grant(&mut write, term).await? {
            return Ok(Err(current));
        }
        if let Some(own) = own_slot(&mut write, document).await? {
            move_document(&mut write, home, own, None).await?;
        }
        write.commit().await.map_err(failed)?;
        Ok(Ok(()))
    }

    async fn placement(&self) -> Result<Placement, StoreError> {
        let row = sqlx::query("select placement_version, placement from control")
            .fetch_optional(&self.readers)
            .await
            .map_err(failed)?;
        let Some(row) = row else {
            return Ok(Placement::default());
        };
        let slots = json(get(&row, 1)?)?;
        Ok(Placement {
            version: get(&row, 0)?,
            slots,
        })
    }

    async fn take_term(&self, holder: &str) -> Result<Term, StoreError> {
        let term =
            sqlx::query_scalar("update control set term = term + 1, holder = ? returning term")
                .bind(holder)
                .fetch_one(&mut *self.writer.lock().await?)
                .await
                .map_err(failed)?;
        Ok(Term(term))
    }

    async fn set_placement(
        &self,
        term: Term,
        slots: &[NodeId],
    ) -> Result<Result<(), Term>, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if let Err(current) = grant(&mut write, term).await? {
            return Ok(Err(current));
        }
        sqlx::query(
            "update control set placement = ?1, placement_version = placement_version + 1 where placement is not ?1",
        )
        .bind(serde_json::to_string(slots).map_err(StoreError::unusable)?)
        .execute(&mut *write)
        .await
        .map_err(failed)?;
        write.commit().await.map_err(failed)?;
        Ok(Ok(()))
    }

    async fn set_drain(
        &self,
        term: Term,
        node: &NodeId,
        drain: bool,
    ) -> Result<Result<(), Term>, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if let Err(current) = grant(&mut write, term).await? {
            return Ok(Err(current));
        }
        write.commit().await.map_err(failed)?;
        let mut member = self.member.lock().expect("no holder panics");
        if let Some(member) = member.as_mut().filter(|member| member.node == *node) {
            member.state = match (drain, member.state) {
                (true, MemberState::Active) => MemberState::Draining,
                (true, state) => state, // a node that has drained already stays so
                (false, _) => MemberState::Active,
            };
        }
        Ok(Ok(()))
    }

    async fn fence(&self, term: Term, _incarnation: Uuid) -> Result<Result<(), Term>, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        let granted = grant(&mut write, term).await?;
        write.commit().await.map_err(failed)?;
        Ok(granted) // there is nobody who would take its slots
    }

    async fn set_zones(
        &self,
        term: Term,
        zones: &BTreeMap<NodeId, String>,
    ) -> Result<Result<(), Term>, StoreError> {
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if let Err(current) = grant(&mut write, term).await? {
            return Ok(Err(current));
        }
        write.commit().await.map_err(failed)?;
        let mut member = self.member.lock().expect("no holder panics");
        if let Some(member) = member.as_mut()
            && let Some(zone) = zones.get(&member.node)
        {
            member.zone.clone_from(zone);
        }
        Ok(Ok(()))
    }

    async fn summary(&self) -> Result<Summary, StoreError> {
        let row = sqlx::query(
            "select coalesce((select term from control), 0), (select coalesce(sum(adoptions), 0) from slot),
               coalesce((select revision from control), 0), 'SQLite ' || sqlite_version()",
        )
        .fetch_one(&self.readers)
        .await
        .map_err(failed)?;
        Ok(Summary {
            term: Term(get(&row, 0)?),
            adoptions: get(&row, 1)?,
            revision: get(&row, 2)?,
            store: StoreReport {
                version: get(&row, 3)?,
                synchronous_standby: false,
                timeline: String::new(),
            },
        })
    }

    async fn map_changed(&self) {
        std::future::pending::<()>().await; // there is no other session
    }

    async fn members_changed(&self) {
        std::future::pending::<()>().await; // there is no other member
    }
}

async fn holds(
    connection: &mut SqliteConnection,
    ownership: Ownership,
) -> Result<bool, StoreError> {
    sqlx::query_scalar(
        "select exists (select 1 from slot where slot = ? and epoch = ? and owner = ?)",
    )
    .bind(ownership.slot.0)
    .bind(ownership.epoch.0)
    .bind(ownership.incarnation)
    .fetch_one(connection)
    .await
    .map_err(failed)
}

/// Deletes the log and the snapshots of a document.
async fn cut(connection: &mut SqliteConnection, document: &DocumentId) -> Result<(), StoreError> {
    for cut in [
        "delete from update_log where document = ?",
        "delete from snapshot where document = ?",
    ] {
        sqlx::query(cut)
            .bind(document.as_str())
            .execute(&mut *connection)
            .await
            .map_err(failed)?;
    }
    Ok(())
}

/// Inserts a snapshot of a life that goes on; one of the same seq stays.
async fn put_snapshot(
    connection: &mut SqliteConnection,
    snapshot: &NewSnapshot,
) -> Result<(), StoreError> {
    let NewSnapshot {
        document,
        ownership,
        room_epoch,
        seq,
        bytes,
    } = snapshot;
    sqlx::query(
        "insert into snapshot (document, seq, room_epoch, slot, epoch, sha256, library, bytes, at)
         select id, ?, room_epoch, ?, ?, ?, ?, ?, cast(unixepoch('subsec') * 1000 as integer)
         from document where id = ? and not deleted and room_epoch = ?
         on conflict (document, seq) do nothing",
    )
    .bind(seq.0)
    .bind(ownership.slot.0)
    .bind(ownership.epoch.0)
    .bind(snapshot_hash(document, *room_epoch, *seq, bytes))
    .bind(LIBRARY)
    .bind(bytes.as_ref())
    .bind(document.as_str())
    .bind(room_epoch.0)
    .execute(connection)
    .await
    .map_err(failed)?;
    Ok(())
}

/// The slot of a pinned document.
async fn own_slot(
    connection: &mut SqliteConnection,
    document: &DocumentId,
) -> Result<Option<Slot>, StoreError> {
    let slot = sqlx::query_scalar("select slot from slot where document = ?")
        .bind(document.as_str())
        .fetch_optional(connection)
        .await
        .map_err(failed)?;
    Ok(slot.map(Slot))
}

/// Makes `own` the slot of this document alone, or of none; raises the epochs of both slots.
async fn move_document(
    connection: &mut SqliteConnection,
    home: Slot,
    own: Slot,
    document: Option<&DocumentId>,
) -> Result<(), StoreError> {
    sqlx::query("update control set revision = revision + 1")
        .execute(&mut *connection)
        .await
        .map_err(failed)?;
    sqlx::query(
        "update slot set epoch = epoch + 1, revision = (select revision from control),
           document = case when slot = ?2 then ?3 end,
           owner = case when slot = ?1 then owner when ?3 is not null then (select owner from slot where slot = ?1) end
         where slot in (?1, ?2)",
    )
    .bind(home.0)
    .bind(own.0)
    .bind(document.map(DocumentId::as_str))
    .execute(connection)
    .await
    .map_err(failed)?;
    Ok(())
}

/// Raises the newest term to this one, or answers a newer one.
async fn grant(
    connection: &mut SqliteConnection,
    term: Term,
) -> Result<Result<(), Term>, StoreError> {
    let current: i64 = sqlx::query_scalar("update control set term = max(term, ?) returning term")
        .bind(term.0)
        .fetch_one(connection)
        .await
        .map_err(failed)?;
    Ok(if current == term.0 {
        Ok(())
    } else {
        Err(Term(current))
    })
}

/// The log after a position, in order.
async fn log_after(
    connection: &mut SqliteConnection,
    document: &DocumentId,
    after: Seq,
) -> Result<Vec<LogRow>, StoreError> {
    // In one row: each takes two changes between threads, which cost more than a short update itself. What `group_concat`
    // makes of bytes is text in name only; the checksums tell if it ever should be more.
    let row = sqlx::query(
        "select json_group_array(json_array(seq, crc32c, length(bytes))),
           cast(coalesce(group_concat(bytes, ''), '') as blob)
         from update_log where document = ? and seq > ?",
    )
    .bind(document.as_str())
    .bind(after.0)
    .fetch_one(connection)
    .await
    .map_err(failed)?;
    let heads: Vec<(i64, i64, usize)> = json(get(&row, 0)?)?;
    let mut bytes: &[u8] = get(&row, 1)?;
    let mut rows = Vec::with_capacity(heads.len());
    for (seq, crc32c, length) in heads {
        let (update, rest) = bytes.split_at_checked(length).unwrap_or((bytes, &[]));
        rows.push(LogRow {
            seq,
            crc32c,
            bytes: update.to_vec(),
        });
        bytes = rest;
    }
    rows.sort_unstable_by_key(|row| row.seq);
    Ok(rows)
}

/// Seqs of a document's snapshots from `least` on, newest first.
async fn snapshots(
    connection: &mut SqliteConnection,
    document: &DocumentId,
    least: Seq,
) -> Result<Vec<Seq>, StoreError> {
    let seqs: Vec<i64> = sqlx::query_scalar(
        "select seq from snapshot where document = ? and seq >= ? order by seq desc",
    )
    .bind(document.as_str())
    .bind(least.0)
    .fetch_all(connection)
    .await
    .map_err(failed)?;
    Ok(seqs.into_iter().map(Seq).collect())
}

/// Reads a snapshot, if its hash is that of what it says it is.
async fn verified(
    connection: &mut SqliteConnection,
    document: &DocumentId,
    room_epoch: RoomEpoch,
    seq: Seq,
) -> Result<Option<Bytes>, StoreError> {
    let row = sqlx::query("select sha256, bytes from snapshot where document = ? and seq = ?")
        .bind(document.as_str())
        .bind(seq.0)
        .fetch_one(connection)
        .await
        .map_err(failed)?;
    let (hash, bytes) = (
        get::<Vec<u8>>(&row, 0)?,
        Bytes::from(get::<Vec<u8>>(&row, 1)?),
    );
    Ok((snapshot_hash(document, room_epoch, seq, &bytes) == hash).then_some(bytes))
}

/// Live documents after `?1`, or the one that `?2` names.
const DOCUMENTS: &str = "
select d.id, d.created_at,
  coalesce((select at from update_log where document = d.id order by seq desc limit 1),
    (select at from snapshot where document = d.id order by seq desc limit 1), d.created_at),
  max(d.base_seq, coalesce((select max(seq) from update_log where document = d.id), 0),
    coalesce((select max(seq) from snapshot where document = d.id), 0))
from document d
where not d.deleted and d.id > ?1 and (?2 is null or d.id = ?2)
order by d.id limit ?3";

fn document_row(row: &SqliteRow) -> Result<DocumentRow, StoreError> {
    Ok(DocumentRow {
        id: document_id(get(row, 0)?)?,
        created_ms: get(row, 1)?,
        updated_ms: get(row, 2)?,
        seq: Seq(get(row, 3)?),
    })
}

fn get<'row, T>(row: &'row SqliteRow, column: usize) -> Result<T, StoreError>
where
    T: sqlx::Decode<'row, Database> + sqlx::Type<Database>,
{
    row.try_get(column).map_err(StoreError::unusable)
}

/// Of as many slots as a list in one column names, the epochs in the next.
fn epochs(row: &SqliteRow, column: usize) -> Result<Vec<(Slot, Epoch)>, StoreError> {
    let slots: Vec<u16> = json(get(row, column)?)?;
    let epochs: Vec<i64> = json(get(row, column + 1)?)?;
    let slots = slots.into_iter().map(Slot);
    Ok(slots.zip(epochs.into_iter().map(Epoch)).collect())
}

fn json<'row, T: Deserialize<'row>>(text: &'row str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(StoreError::unusable)
}

fn document_id(text: String) -> Result<DocumentId, StoreError> {
    DocumentId::try_from(text).map_err(StoreError::unusable)
}

fn failed(error: sqlx::Error) -> StoreError {
    // Primary result codes: 1 error in the statement, 11 corrupt, 19 constraint, 26 not a database.
    let code = error
        .as_database_error()
        .and_then(DatabaseError::code)
        .and_then(|code| code.parse::<i32>().ok());
    match code.map(|code| code & 0xff) {
        Some(1 | 11 | 19 | 26) => StoreError::Unusable(error.to_string()),
        _ => StoreError::Unavailable(error),
    }
}
