//! The store of a cluster: Postgres.
//!
//! A write is one autocommit statement, so that there is no moment between the check of a slot's
//! owner and the write in which the owner could change: the statement locks the slot's row `for
//! share`, a claim needs it `for no key update`, and therefore a claim waits for the writes under
//! the old epoch, and writes that come later no longer find it.
//!
//! A statement that writes is never cancelled. Postgres answers a cancelled wait for its synchronous
//! standby with success and a warning (01000) that the driver only logs. So write sessions have no
//! `statement_timeout`; a call that takes too long is given up here, its session is closed, and its
//! outcome is unknown. What an administrator cancels all the same is unknown, too: [`Warnings`] hears of it,
//! and saying the statement again waits for the standby again.

use std::collections::{BTreeMap, HashMap};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use collab_core::control::{LoadSample, MemberState, StoreReport};
use collab_core::ids::{DocumentId, Epoch, NodeId, RoomEpoch, Seq, Slot, Term};
use collab_core::limits::{
    ADOPT_AFTER_STEADY, APPEND_LOCK_TIMEOUT, CLAIM_LOCK_TIMEOUT, LOST_LEASES_KEPT_FOR,
    RENEWAL_GAP_MAX, SNAPSHOTS_KEPT,
};
use collab_core::mutants::Mutant;
use sqlx::AssertSqlSafe;
use sqlx::migrate::MigrateError;
use sqlx::postgres::{PgArguments, PgConnectOptions, PgRow};
use sqlx::query::Query;
use sqlx::types::Json;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

mod decode;
mod hints;
mod load;
mod pins;
mod rows;
mod schema;
mod sessions;
mod write_rule;

pub use pins::{LOCK_SLOTS, MOVE_DOCUMENT};
pub use schema::SCHEMA_LOCK;
pub use write_rule::{APPEND, APPEND_ONE, Warnings, append_one_statement, append_statement};

use decode::{columns, document_id, document_row, get, granted, member_row, slot, taken};
use hints::{Hints, listen};
use load::load;
use pins::Wanted;
use sessions::{Pool, Session, Sessions};
use write_rule::stored_author;

use super::integrity::{LIBRARY, LogRow, check_tail, snapshot_hash};
use super::{
    Append, Appended, Claim, Created, DocumentRow, Failovers, Fence, Judgement, LoadError, Loaded,
    MapChange, NewSnapshot, Ownership, Placement, Recreate, Registration, Renewal, Renewed,
    SlotRow, Store, StoreError, StoredSnapshot, Summary, WrittenRow,
};

/// After this time a call that writes or reads a document is given up.
const DATA_TIMEOUT: Duration = Duration::from_secs(10);
/// After this time a call about members and slots is given up.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);

/// Sessions that append and change documents. Few: batches are large and at most two are in flight.
const WRITE_SESSIONS: usize = 4;
/// Sessions for members and slots, apart from the others so that a renewal never waits behind a load.
const CONTROL_SESSIONS: usize = 5;
/// Sessions that read documents.
const READ_SESSIONS: usize = 4;
/// Before all of them are opened. A node that starts again in its pod has documents to serve first, with the few that this
/// takes; others are given none for longer.
const FILL_AFTER: Duration = Duration::from_millis(250);

/// Postgres behind a cluster.
#[derive(Debug)]
pub struct Postgres {
    writes: Pool,
    control: Pool,
    reads: Pool,
    sessions: Arc<Sessions>,
    /// `Timeline::changes` when the whole map was last asked for.
    map_read_at: AtomicU64,
    /// `Timeline::changes` when [`Store::reclaim`] was last called.
    reclaimed_at: AtomicU64,
    hints: Arc<Hints>,
    /// Listens, and opens sessions.
    _beside: [AbortOnDropHandle<()>; 2],
}

impl Postgres {
    /// Connects to `url` and brings the schema up to date. Several nodes may do so at once.
    ///
    /// # Errors
    /// [`StoreError::Unavailable`] when the server does not answer yet; [`StoreError::Unusable`]
    /// when the URL or the schema is not one that this version can use.
    pub async fn connect(url: &str) -> Result<Self, StoreError> {
        Self::connect_named(url, "collab-node").await
    }

    /// Connects as [`Self::connect`] does, for a process that will [`Store::register`] as this one: its sessions need not be
    /// opened again then.
    ///
    /// # Errors
    /// As there.
    pub async fn connect_as(url: &str, incarnation: Uuid) -> Result<Self, StoreError> {
        Self::connect_named(url, &incarnation.to_string()).await
    }

    async fn connect_named(url: &str, name: &str) -> Result<Self, StoreError> {
        let options = PgConnectOptions::from_str(url)
            .map_err(|error| {
                StoreError::Unusable(format!("the database URL is not valid: {error}"))
            })?
            .application_name(name);
        let sessions = Arc::new(Sessions::new(options));
        let control = sessions.pool(CONTROL_SESSIONS, Duration::ZERO);
        schema::bring_up_to_date(&sessions, &control)
            .await
            .map_err(|error| match error {
                MigrateError::Execute(error) => sessions.failed(error),
                error => StoreError::Unusable(error.to_string()),
            })?;
        let writes = sessions.pool(WRITE_SESSIONS, Duration::ZERO);
        let reads = sessions.pool(READ_SESSIONS, DATA_TIMEOUT);
        let hints = Arc::new(Hints::default());
        let (to_write, to_read) = (writes.clone(), reads.clone());
        let beside = [
            tokio::spawn(listen(sessions.clone(), hints.clone())),
            tokio::spawn(async move {
                tokio::time::sleep(FILL_AFTER).await;
                to_write.fill().await;
                to_read.fill().await;
            }),
        ];
        Ok(Self {
            writes,
            control,
            reads,
            sessions,
            map_read_at: AtomicU64::default(),
            reclaimed_at: AtomicU64::default(),
            hints,
            _beside: beside.map(AbortOnDropHandle::new),
        })
    }

    /// Makes the rows that a cluster of so many slots begins with. Statement by statement, since each of them may be done twice and by
    /// several nodes at once.
    async fn lay_out(&self, slots: i32) -> Result<(), StoreError> {
        loop {
            let query = sqlx::query(
                "select (select slots from control), (select count(*) from slot where slot < $1)",
            )
            .bind(slots);
            let row = self.run_one(&self.control, CONTROL_TIMEOUT, query).await?;
            let missing = match (get::<Option<i32>>(&row, 0)?, get::<i64>(&row, 1)?) {
                (None, _) => "insert into control (slots) values ($1) on conflict do nothing",
                (Some(existing), _) if existing != slots => {
                    return Err(StoreError::Unusable(format!(
                        "the cluster was created with {existing} slots and this node was started with {slots}; \
                         the number of slots cannot change"
                    )));
                }
                (Some(_), count) if count == i64::from(slots) => return Ok(()),
                _ => {
                    "insert into slot (slot) select generate_series(0, $1 - 1) on conflict do nothing"
                }
            };
            let query = sqlx::query(missing).bind(slots);
            self.run(&self.control, DATA_TIMEOUT, query).await?;
        }
    }

    /// Runs one statement. A session whose statement was not seen to end is closed, never used again.
    async fn run(
        &self,
        pool: &Pool,
        limit: Duration,
        query: Query<'_, sqlx::Postgres, PgArguments>,
    ) -> Result<Vec<PgRow>, StoreError> {
        let mut session = self.session(pool).await?;
        let rows = within(limit, query.fetch_all(session.connection()))
            .await
            .map_err(|error| self.failed(error))?;
        session.ended();
        Ok(rows)
    }

    /// Runs one statement that answers one row.
    async fn run_one(
        &self,
        pool: &Pool,
        limit: Duration,
        query: Query<'_, sqlx::Postgres, PgArguments>,
    ) -> Result<PgRow, StoreError> {
        self.one(self.run(pool, limit, query).await?.pop())
    }

    /// The answer of a statement that always gives one.
    fn one(&self, row: Option<PgRow>) -> Result<PgRow, StoreError> {
        row.ok_or_else(|| self.failed(sqlx::Error::RowNotFound))
    }

    /// Runs one fenced statement, which answers whether the slot was held.
    async fn run_fenced(
        &self,
        query: Query<'_, sqlx::Postgres, PgArguments>,
    ) -> Result<Fence, StoreError> {
        let row = self.one(self.run_durably(query).await?)?;
        Ok(if get(&row, 0)? {
            Fence::Held
        } else {
            Fence::Fenced
        })
    }

    async fn session(&self, pool: &Pool) -> Result<Session, StoreError> {
        pool.take().await.map_err(|error| self.failed(error))
    }

    fn failed(&self, error: sqlx::Error) -> StoreError {
        self.sessions.failed(error)
    }

    async fn claim_once(
        &self,
        incarnation: Uuid,
        slots: &[i32],
        claim: Claim,
    ) -> Result<Vec<PgRow>, StoreError> {
        let (steady, left_by) = match claim {
            Claim::Orphaned => (None, None),
            Claim::OrphanedBySteady => (Some(ADOPT_AFTER_STEADY), None),
            Claim::Left(owner) => (None, Some(owner)),
        };
        // Judged first, locked second, compared third: a row that changed while this waited for its
        // lock is left alone. (An outer join to member under the lock would be evaluated again for
        // the new owner without finding it, and take the slot from a live member.)
        let query = sqlx::query(
            "with patience as materialized (
               select set_config('lock_timeout', $3, true)
             ), orphan as materialized (
               select s.slot, s.epoch, s.owner from slot s left join member m on m.incarnation = s.owner, patience
               where s.slot = any($1) and (m.incarnation is null or $6::uuid is null and m.lease_end <= clock_timestamp())
                 and ($6 is null or s.owner = $6) and exists (
                   select from member where incarnation = $2 and clock_timestamp() < lease_end and ($4 is null
                     or $4 * interval '1 ms' <= clock_timestamp() - steady_since
                     and clock_timestamp() - renewed_at <= $5 * interval '1 ms')
                 )
             ), mine as materialized (
               select s.slot from slot s join orphan o using (slot) where s.epoch = o.epoch
               order by s.slot for no key update of s
             )
             update slot s set owner = $2, epoch = s.epoch + 1, adoptions = s.adoptions + (s.owner is not null)::int,
               revision = pg_current_xact_id()::text::bigint
             from mine where s.slot = mine.slot
             returning s.slot, s.epoch, pg_notify('collab_map', '')",
        )
        .bind(slots)
        .bind(incarnation)
        .bind(setting(CLAIM_LOCK_TIMEOUT))
        .bind(steady.map(millis).transpose()?)
        .bind(millis(RENEWAL_GAP_MAX)?)
        .bind(left_by);
        self.run(&self.control, CONTROL_TIMEOUT, query).await
    }

    /// Ends the sessions of the processes that a claim of these slots would fence.
    async fn end_sessions_of_lost_owners(&self, slots: &[i32]) -> Result<(), StoreError> {
        let query = sqlx::query(
            "select pid, pg_terminate_backend(pid) from pg_stat_activity
             where pid <> pg_backend_pid() and usename = current_user and application_name in (
               select s.owner::text from slot s left join member m on m.incarnation = s.owner
               where s.slot = any($1) and s.owner is not null
                 and (m.incarnation is null or m.lease_end <= clock_timestamp()))",
        )
        .bind(slots);
        let ended = self.run(&self.control, CONTROL_TIMEOUT, query).await?;
        tracing::warn!(
            sessions = ended.len(),
            "ended the database sessions of lost owners that held up a claim"
        );
        Ok(())
    }
}

#[async_trait]
impl Store for Postgres {
    async fn append(&self, batch: &[Append]) -> Result<Appended, StoreError> {
        if let [append] = batch
            && self.append_one(append).await?
        {
            return Ok(Appended {
                held: vec![append.ownership.slot],
                inserted: vec![(append.document.clone(), append.seq)],
            });
        }
        let mut places = HashMap::new();
        let mut owned = Vec::new();
        let place: Vec<i64> = batch
            .iter()
            .map(|append| {
                *places.entry(append.ownership).or_insert_with(|| {
                    owned.push(append.ownership);
                    i64::try_from(owned.len()).expect("a batch is small")
                })
            })
            .collect();
        let (slots, epochs, incarnations) = columns(&owned);
        let query = sqlx::query(AssertSqlSafe(append_statement()))
            .bind(slots)
            .bind(epochs)
            .bind(incarnations)
            .bind(place)
            .bind(
                batch
                    .iter()
                    .map(|append| append.document.as_str())
                    .collect::<Vec<_>>(),
            )
            .bind(batch.iter().map(|append| append.seq.0).collect::<Vec<_>>())
            .bind(
                batch
                    .iter()
                    .map(|append| i64::from(crc32c::crc32c(&append.bytes)))
                    .collect::<Vec<_>>(),
            )
            .bind(
                batch
                    .iter()
                    .map(|append| append.bytes.as_ref())
                    .collect::<Vec<_>>(),
            )
            .bind(batch.iter().map(stored_author).collect::<Vec<_>>())
            .bind(setting(APPEND_LOCK_TIMEOUT));
        let row = self.one(self.run_durably(query).await?)?;
        let held: Vec<i32> = get::<Option<_>>(&row, 0)?.unwrap_or_default();
        let documents: Vec<String> = get::<Option<_>>(&row, 1)?.unwrap_or_default();
        let seqs: Vec<i64> = get::<Option<_>>(&row, 2)?.unwrap_or_default();
        Ok(Appended {
            held: held.into_iter().map(slot).collect::<Result<_, _>>()?,
            inserted: documents
                .into_iter()
                .zip(seqs)
                .map(|(id, seq)| Ok((document_id(id)?, Seq(seq))))
                .collect::<Result<_, StoreError>>()?,
        })
    }

    async fn written(&self, keys: &[(DocumentId, Seq)]) -> Result<Vec<WrittenRow>, StoreError> {
        let query = sqlx::query(
            "select document, seq, epoch, crc32c from update_log
             join unnest($1::text[], $2::bigint[]) as k(document, seq) using (document, seq)",
        )
        .bind(
            keys.iter()
                .map(|(document, _)| document.as_str())
                .collect::<Vec<_>>(),
        )
        .bind(keys.iter().map(|(_, seq)| seq.0).collect::<Vec<_>>());
        let rows = self.run(&self.writes, DATA_TIMEOUT, query).await?;
        rows.iter()
            .map(|row| {
                Ok(WrittenRow {
                    document: document_id(get(row, 0)?)?,
                    seq: Seq(get(row, 1)?),
                    epoch: Epoch(get(row, 2)?),
                    crc32c: u32::try_from(get::<i64>(row, 3)?).map_err(StoreError::unusable)?,
                })
            })
            .collect()
    }

    async fn load_with(
        &self,
        document: &DocumentId,
        copy: Option<(RoomEpoch, StoredSnapshot)>,
    ) -> Result<Loaded, LoadError> {
        let mut session = self.session(&self.reads).await?;
        let loaded = within(DATA_TIMEOUT, async {
            Ok(load(session.connection(), document, copy).await)
        })
        .await
        .map_err(|error| self.failed(error))?;
        match loaded {
            Err(LoadError::Store(StoreError::Unavailable(error))) => Err(self.failed(error).into()),
            loaded => {
                session.ended();
                loaded
            }
        }
    }

    async fn tail(
        &self,
        document: &DocumentId,
        room_epoch: RoomEpoch,
        after: Seq,
    ) -> Result<Option<Vec<(Seq, Bytes)>>, StoreError> {
        let query = sqlx::query(
            "select greatest(d.base_seq, (select max(seq) from snapshot where document = d.id)), l.seq, l.crc32c, l.bytes,
               exists (select from update_log where document = d.id and seq = $3)
             from document d left join update_log l on l.document = d.id and $3 < l.seq
             where d.id = $1 and d.room_epoch = $2 and not d.deleted order by l.seq",
        )
        .bind(document.as_str())
        .bind(room_epoch.0)
        .bind(after.0);
        let rows = self.run(&self.reads, DATA_TIMEOUT, query).await?;
        let Some(first) = rows.first() else {
            return Ok(None);
        };
        let reach = Seq(get(first, 0)?);
        // A database that failed over may have lost the rows that were read.
        if reach < after && !get::<bool>(first, 4)? {
            return Ok(None);
        }
        let mut tail = Vec::new();
        for row in &rows {
            if let Some(seq) = get(row, 1)? {
                tail.push(LogRow {
                    seq,
                    crc32c: get(row, 2)?,
                    bytes: get(row, 3)?,
                });
            }
        }
        // What does not join is judged by the load that follows.
        Ok(check_tail(after, reach, tail).whole())
    }

    async fn create(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        recreate: Recreate,
    ) -> Result<Created, StoreError> {
        let query = sqlx::query(
            "with held as materialized (
               select slot from slot where slot = $1 and epoch = $2 and owner = $3 for share
             ), put as (
               insert into document (id, slot) select $4, slot from held
               on conflict (id) do update
                 set deleted = false, room_epoch = document.room_epoch + 1, created_at = clock_timestamp()
                 where document.deleted and $5
               returning room_epoch
             )
             select exists (select from held), (select room_epoch from put)",
        )
        .bind(i32::from(ownership.slot.0))
        .bind(ownership.epoch.0)
        .bind(ownership.incarnation)
        .bind(document.as_str())
        .bind(recreate == Recreate::Allowed);
        let row = self.one(self.run_durably(query).await?)?;
        Ok(match (get(&row, 0)?, get::<Option<i64>>(&row, 1)?) {
            (false, _) => Created::Fenced,
            (true, None) => Created::Exists,
            (true, Some(room_epoch)) => Created::Created {
                room_epoch: RoomEpoch(room_epoch),
            },
        })
    }

    async fn delete(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        last: Seq,
    ) -> Result<Fence, StoreError> {
        // The base is at least what is stored, whatever the caller believes: a seq is never used twice.
        let query = sqlx::query(
            "with held as materialized (
               select slot from slot where slot = $1 and epoch = $2 and owner = $3 for share
             ), gone as (
               update document d set deleted = true, base_seq = greatest(d.base_seq, $5,
                 (select max(seq) from update_log where document = $4), (select max(seq) from snapshot where document = $4))
               from held where d.id = $4 and not d.deleted
             ), cut_log as (
               delete from update_log using held where document = $4
             ), cut_snapshots as (
               delete from snapshot using held where document = $4
             )
             select exists (select from held)",
        )
        .bind(i32::from(ownership.slot.0))
        .bind(ownership.epoch.0)
        .bind(ownership.incarnation)
        .bind(document.as_str())
        .bind(last.0);
        self.run_fenced(query).await
    }

    async fn snapshot(&self, snapshot: &NewSnapshot) -> Result<Fence, StoreError> {
        let NewSnapshot {
            document,
            ownership,
            room_epoch,
            seq,
            bytes,
        } = snapshot;
        let query = sqlx::query(
            "with held as materialized (
               select slot, epoch from slot where slot = $1 and epoch = $2 and owner = $3 for share
             ), put as (
               insert into snapshot (document, seq, room_epoch, slot, epoch, sha256, library, bytes)
               select d.id, $5, d.room_epoch, held.slot, held.epoch, $7, $8, $9
               from held join document d on d.id = $4 and not d.deleted and d.room_epoch = $6
               on conflict (document, seq) do nothing
             )
             select exists (select from held)",
        )
        .bind(i32::from(ownership.slot.0))
        .bind(ownership.epoch.0)
        .bind(ownership.incarnation)
        .bind(document.as_str())
        .bind(seq.0)
        .bind(room_epoch.0)
        .bind(snapshot_hash(document, *room_epoch, *seq, bytes))
        .bind(LIBRARY)
        .bind(bytes.as_ref());
        self.run_fenced(query).await
    }

    async fn compact(
        &self,
        document: &DocumentId,
        ownership: Ownership,
    ) -> Result<Fence, StoreError> {
        // Only snapshots that verify count as kept; the hash is that of `snapshot_hash`.
        let query = sqlx::query(
            "with held as materialized (
               select slot from slot where slot = $1 and epoch = $2 and owner = $3 for share
             ), kept as (
               select s.seq from snapshot s, held where s.document = $4 and s.sha256 = sha256(
                 convert_to(s.document, 'UTF8') || '\\x00' || int8send(s.room_epoch) || int8send(s.seq) || s.bytes)
               order by s.seq desc limit $5
             ), older as materialized (
               select min(seq) as seq from kept having count(*) = $5
             ), cut_log as (
               delete from update_log u using older where u.document = $4 and u.seq <= older.seq
             ), cut_snapshots as (
               delete from snapshot s using older where s.document = $4 and s.seq < older.seq
             )
             select exists (select from held)",
        )
        .bind(i32::from(ownership.slot.0))
        .bind(ownership.epoch.0)
        .bind(ownership.incarnation)
        .bind(document.as_str())
        .bind(SNAPSHOTS_KEPT);
        self.run_fenced(query).await
    }

    async fn documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<DocumentRow>, StoreError> {
        let query = sqlx::query(DOCUMENTS)
            .bind(after.map_or("", DocumentId::as_str))
            .bind(None::<&str>)
            .bind(i64::from(limit));
        self.run(&self.reads, DATA_TIMEOUT, query)
            .await?
            .iter()
            .map(document_row)
            .collect()
    }

    async fn document(&self, document: &DocumentId) -> Result<Option<DocumentRow>, StoreError> {
        let query = sqlx::query(DOCUMENTS)
            .bind("")
            .bind(document.as_str())
            .bind(1_i64);
        self.run(&self.reads, DATA_TIMEOUT, query)
            .await?
            .first()
            .map(document_row)
            .transpose()
    }

    async fn register(
        &self,
        member: &Registration,
        slots: u16,
        lease: Duration,
    ) -> Result<Option<Uuid>, StoreError> {
        // Whoever fences it can end its sessions.
        self.sessions.name(&member.incarnation.to_string());
        self.lay_out(i32::from(slots)).await?;
        // A pod has one process at a time. Rows of pods that have long gone are of no use to anybody.
        let query = sqlx::query(
            "with before as (
               select incarnation from member where pod_uid = $2 and incarnation <> $1
             ), gone as (
               delete from member where pod_uid <> $2
                 and (lease_end < clock_timestamp() - interval '1 hour' or node = $3 and lease_end < clock_timestamp())
             ), forgotten as (
               delete from lost_lease where lost_at < clock_timestamp() - $9 * interval '1 ms'
             ), lost as (
               insert into lost_lease (node, incarnation, renewed_at)
               select node, incarnation, renewed_at from member
               where incarnation <> $1 and state <> $10
                 and (pod_uid = $2 or node = $3 and lease_end < clock_timestamp())
               on conflict do nothing
             )
             insert into member (incarnation, pod_uid, node, address, zone, weight, state, lease_end, renewed_at)
             values ($1, $2, $3, $4, $5, $6, $7, clock_timestamp() + $8 * interval '1 ms', clock_timestamp())
             on conflict (pod_uid) do update set incarnation = excluded.incarnation, node = excluded.node,
               address = excluded.address, zone = coalesce(nullif(excluded.zone, ''), member.zone),
               weight = excluded.weight, state = excluded.state,
               lease_end = excluded.lease_end, renewed_at = excluded.renewed_at, steady_since = excluded.steady_since,
               load = null, fenced = false
             returning (select incarnation from before), pg_notify('collab_members', '')",
        )
        .bind(member.incarnation)
        .bind(&member.pod_uid)
        .bind(&member.node.0)
        .bind(&member.address)
        .bind(&member.zone)
        .bind(i32::try_from(member.weight).map_err(StoreError::unusable)?)
        .bind(MemberState::Active.as_str())
        .bind(millis(lease)?)
        .bind(millis(LOST_LEASES_KEPT_FOR)?)
        .bind(MemberState::Drained.as_str());
        get(
            &self.run_one(&self.control, CONTROL_TIMEOUT, query).await?,
            0,
        )
    }

    async fn renew(
        &self,
        incarnation: Uuid,
        pod_uid: &str,
        lease: Duration,
        load: LoadSample,
    ) -> Result<Renewal, StoreError> {
        let query = sqlx::query(
            "with me as (
               update member set lease_end = clock_timestamp() + $2 * interval '1 ms', renewed_at = clock_timestamp(),
                 steady_since = case when $5 * interval '1 ms' < clock_timestamp() - renewed_at then clock_timestamp()
                   else steady_since end,
                 load = $3
               where incarnation = $1 and not fenced returning *
             ), everybody as (
               select * from me union all select * from member where incarnation <> $1
             )
             select node, incarnation, pod_uid, address, zone, weight, state, load,
               greatest(0, extract(epoch from lease_end - clock_timestamp()) * 1000)::bigint,
               greatest(0, extract(epoch from clock_timestamp() - renewed_at) * 1000)::bigint, placement_version,
               incarnation = $1 and not fenced, pod_uid = $4 and incarnation <> $1,
               array(
                 select (extract(epoch from clock_timestamp() - l.lost_at) * 1000)::bigint from lost_lease l
                 where l.node = everybody.node and clock_timestamp() - l.lost_at < $6 * interval '1 ms' order by 1
               )
             from everybody cross join control order by node, incarnation",
        )
        .bind(incarnation)
        .bind(millis(lease)?)
        .bind(Json(load))
        .bind(pod_uid)
        .bind(millis(RENEWAL_GAP_MAX)?)
        .bind(millis(LOST_LEASES_KEPT_FOR)?);
        let rows = self.run(&self.control, CONTROL_TIMEOUT, query).await?;
        let any = |column| {
            rows.iter().try_fold(false, |any, row| {
                Ok::<_, StoreError>(any | get::<bool>(row, column)?)
            })
        };
        if !any(11)? {
            return Ok(if any(12)? {
                Renewal::Superseded
            } else {
                Renewal::Fenced
            });
        }
        let members = rows.iter().map(member_row).collect::<Result<Vec<_>, _>>()?;
        let placement_version = rows.first().map_or(Ok(0), |row| get(row, 10))?;
        let timeline = self.sessions.timeline().name;
        Ok(Renewal::Renewed(Renewed {
            members,
            placement_version,
            timeline,
        }))
    }

    async fn end_lease(
        &self,
        judge: Uuid,
        target: Uuid,
        age: Duration,
    ) -> Result<Judgement, StoreError> {
        // Whatever is compared is read from the locked rows, which a renewal in between may have changed.
        let statement = "
             with pair as materialized (
               select incarnation, fenced, lease_end, renewed_at from member where incarnation in ($1, $2)
               order by incarnation for no key update
             ), judge as (
               select from pair where incarnation = $1 and not fenced and clock_timestamp() < lease_end
             ), target as (
               select p.incarnation, clock_timestamp() - p.renewed_at as age from pair p, judge
               where p.incarnation = $2 and $1 <> $2 and not p.fenced and clock_timestamp() < p.lease_end
             ), ended as (
               update member m set fenced = true, lease_end = clock_timestamp() from target t
               where m.incarnation = t.incarnation and $3 * interval '1 ms' <= t.age
               returning pg_notify('collab_members', '')
             )
             select (extract(epoch from t.age) * 1000)::bigint, exists (select from ended) from target t";
        let locks = "order by incarnation for no key update";
        let statement = Mutant::EarlyFenceUnlocked.rewrites(statement, locks, "");
        let query = sqlx::query(AssertSqlSafe(statement))
            .bind(judge)
            .bind(target)
            .bind(millis(age)?);
        let rows = self.run(&self.control, CONTROL_TIMEOUT, query).await?;
        let Some(row) = rows.first() else {
            return Ok(Judgement::Void);
        };
        if get(row, 1)? {
            return Ok(Judgement::Ended);
        }
        let age = u64::try_from(get::<i64>(row, 0)?.max(0)).map_err(StoreError::unusable)?;
        Ok(Judgement::Fresh(Duration::from_millis(age)))
    }

    async fn note_lost_leases(&self, incarnations: &[Uuid]) -> Result<(), StoreError> {
        let query = sqlx::query(
            "insert into lost_lease (node, incarnation, renewed_at)
             select node, incarnation, renewed_at from member
             where incarnation = any($1) and lease_end <= clock_timestamp() and state <> $2
             on conflict do nothing",
        )
        .bind(incarnations)
        .bind(MemberState::Drained.as_str());
        self.run(&self.control, CONTROL_TIMEOUT, query)
            .await
            .map(drop)
    }

    async fn set_state(&self, incarnation: Uuid, state: MemberState) -> Result<(), StoreError> {
        let query = sqlx::query("update member set state = $2 where incarnation = $1")
            .bind(incarnation)
            .bind(state.as_str());
        self.run(&self.control, CONTROL_TIMEOUT, query)
            .await
            .map(drop)
    }

    async fn leave(&self, incarnation: Uuid) -> Result<(), StoreError> {
        let query = sqlx::query(
            "delete from member where incarnation = $1 returning pg_notify('collab_members', '')",
        )
        .bind(incarnation);
        self.run(&self.control, CONTROL_TIMEOUT, query)
            .await
            .map(drop)
    }

    async fn map(&self, horizon: i64) -> Result<MapChange, StoreError> {
        // Transaction ids may go back in a failover, so that a horizon of the old primary would hide
        // changes on the new one.
        let changes = self.sessions.timeline().changes;
        let horizon = if self.map_read_at.load(Ordering::Acquire) == changes {
            horizon
        } else {
            0
        };
        // What commits later than this statement's snapshot has a transaction id of at least its xmin.
        let query = sqlx::query(
            "select pg_snapshot_xmin(pg_current_snapshot())::text::bigint, slot, owner, epoch,
               slot >= (select slots from control), document
             from (select) always left join slot on revision >= $1 order by slot",
        )
        .bind(horizon);
        let rows = self.run(&self.control, CONTROL_TIMEOUT, query).await?;
        let mut change = MapChange {
            horizon,
            slots: Vec::with_capacity(rows.len()),
            is_whole: horizon == 0,
            pins: Vec::new(),
        };
        for row in &rows {
            change.horizon = get(row, 0)?;
            if let Some(number) = get(row, 1)? {
                change.slots.push(SlotRow {
                    slot: slot(number)?,
                    owner: get(row, 2)?,
                    epoch: Epoch(get(row, 3)?),
                });
                if get(row, 4)? {
                    let document = get::<Option<String>>(row, 5)?;
                    change
                        .pins
                        .push((slot(number)?, document.map(document_id).transpose()?));
                }
            }
        }
        self.map_read_at.store(changes, Ordering::Release);
        Ok(change)
    }

    async fn claim(
        &self,
        incarnation: Uuid,
        slots: &[Slot],
        claim: Claim,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        let numbers: Vec<i32> = slots.iter().map(|slot| i32::from(slot.0)).collect();
        let rows = match self.claim_once(incarnation, &numbers, claim).await {
            Err(StoreError::Locked(_)) => {
                self.end_sessions_of_lost_owners(&numbers).await?;
                self.claim_once(incarnation, &numbers, claim).await?
            }
            rows => rows?,
        };
        taken(&rows)
    }

    async fn reclaim(
        &self,
        incarnation: Uuid,
        held: &[Ownership],
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        let seen = self.failovers().seen;
        let (slots, epochs, _) = columns(held);
        let query = sqlx::query(
            "with want as (
               select * from unnest($1::int[], $2::bigint[]) as w(slot, epoch)
             ), mine as materialized (
               select s.slot, w.epoch from slot s join want w using (slot)
               where s.epoch <= w.epoch and exists (select from member where incarnation = $3 and not fenced)
               order by s.slot for no key update of s
             )
             update slot s set owner = $3, epoch = mine.epoch + 1, revision = pg_current_xact_id()::text::bigint
             from mine where s.slot = mine.slot
             returning s.slot, s.epoch, pg_notify('collab_map', '')",
        )
        .bind(slots)
        .bind(epochs)
        .bind(incarnation);
        let taken = taken(&self.run(&self.control, CONTROL_TIMEOUT, query).await?)?;
        self.reclaimed_at.store(seen, Ordering::Release);
        Ok(taken)
    }

    fn failovers(&self) -> Failovers {
        let timeline = self.sessions.timeline();
        Failovers {
            seen: timeline.changes,
            reclaimed: self.reclaimed_at.load(Ordering::Acquire),
        }
    }

    async fn hand_off(
        &self,
        from: &[Ownership],
        to: Uuid,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        let (slots, epochs, incarnations) = columns(from);
        let query = sqlx::query(
            "with want as (
               select * from unnest($1::int[], $2::bigint[], $3::uuid[]) as w(slot, epoch, incarnation)
             ), mine as materialized (
               select s.slot from slot s join want w using (slot)
               where s.epoch = w.epoch and s.owner = w.incarnation and exists (
                 select from member where incarnation = $4 and state = $5 and clock_timestamp() < lease_end)
               order by s.slot for no key update of s
             )
             update slot s set owner = $4, epoch = s.epoch + 1, revision = pg_current_xact_id()::text::bigint
             from mine where s.slot = mine.slot
             returning s.slot, s.epoch, pg_notify('collab_map', '')",
        )
        .bind(slots)
        .bind(epochs)
        .bind(incarnations)
        .bind(to)
        .bind(MemberState::Active.as_str());
        taken(&self.run(&self.writes, DATA_TIMEOUT, query).await?)
    }

    async fn pinned(&self, document: &DocumentId) -> Result<Option<Slot>, StoreError> {
        let query =
            sqlx::query("select slot from slot where document = $1").bind(document.as_str());
        let rows = self.run(&self.reads, DATA_TIMEOUT, query).await?;
        rows.first().map(|row| slot(get(row, 0)?)).transpose()
    }

    async fn pin(
        &self,
        term: Term,
        document: &DocumentId,
        home: Slot,
    ) -> Result<Result<(), Term>, StoreError> {
        self.change_pin(term, document, home, Wanted::Pinned).await
    }

    async fn unpin(
        &self,
        term: Term,
        document: &DocumentId,
        home: Slot,
    ) -> Result<Result<(), Term>, StoreError> {
        self.change_pin(term, document, home, Wanted::Home).await
    }

    async fn placement(&self) -> Result<Placement, StoreError> {
        let rows = self
            .run(
                &self.control,
                CONTROL_TIMEOUT,
                sqlx::query("select placement_version, placement from control"),
            )
            .await?;
        let Some(row) = rows.first() else {
            return Ok(Placement::default());
        };
        let slots: Vec<String> = get(row, 1)?;
        Ok(Placement {
            version: get(row, 0)?,
            slots: slots.into_iter().map(NodeId).collect(),
        })
    }

    async fn take_term(&self, holder: &str) -> Result<Term, StoreError> {
        let query = sqlx::query("update control set term = term + 1, holder = $1 returning term")
            .bind(holder);
        Ok(Term(get(
            &self.run_one(&self.control, CONTROL_TIMEOUT, query).await?,
            0,
        )?))
    }

    async fn set_placement(
        &self,
        term: Term,
        slots: &[NodeId],
    ) -> Result<Result<(), Term>, StoreError> {
        // A term above the newest one was granted by a primary that lost it in its failover.
        let query = sqlx::query(
            "with granted as (
               update control set term = $1, placement = $2,
                 placement_version = placement_version + (placement is distinct from $2)::int
               where term <= $1 returning term
             )
             select exists (select from granted), term from control",
        )
        .bind(term.0)
        .bind(slots.iter().map(|node| node.0.as_str()).collect::<Vec<_>>());
        granted(&self.run_one(&self.control, CONTROL_TIMEOUT, query).await?)
    }

    async fn set_drain(
        &self,
        term: Term,
        node: &NodeId,
        drain: bool,
    ) -> Result<Result<(), Term>, StoreError> {
        // A node that has drained already stays so.
        let query = sqlx::query(
            "with granted as (
               update control set term = $1 where term <= $1 returning term
             ), told as (
               update member set state = case when $3 then $4 else $5 end
               from granted where node = $2 and (state = $5 or not $3)
             )
             select exists (select from granted), term from control",
        )
        .bind(term.0)
        .bind(&node.0)
        .bind(drain)
        .bind(MemberState::Draining.as_str())
        .bind(MemberState::Active.as_str());
        granted(&self.run_one(&self.control, CONTROL_TIMEOUT, query).await?)
    }

    async fn fence(&self, term: Term, incarnation: Uuid) -> Result<Result<(), Term>, StoreError> {
        let query = sqlx::query(
            "with granted as (
               update control set term = $1 where term <= $1 returning term
             ), ended as (
               update member set fenced = true, lease_end = least(lease_end, clock_timestamp())
               from granted where incarnation = $2 returning pg_notify('collab_members', '')
             )
             select exists (select from granted), term, (select count(*) from ended) from control",
        )
        .bind(term.0)
        .bind(incarnation);
        granted(&self.run_one(&self.control, CONTROL_TIMEOUT, query).await?)
    }

    async fn set_zones(
        &self,
        term: Term,
        zones: &BTreeMap<NodeId, String>,
    ) -> Result<Result<(), Term>, StoreError> {
        let query = sqlx::query(
            "with granted as (
               update control set term = $1 where term <= $1 returning term
             ), told as (
               update member m set zone = z.zone
               from granted, unnest($2::text[], $3::text[]) as z(node, zone) where m.node = z.node and m.zone <> z.zone
             )
             select exists (select from granted), term from control",
        )
        .bind(term.0)
        .bind(zones.keys().map(|node| node.0.as_str()).collect::<Vec<_>>())
        .bind(zones.values().map(String::as_str).collect::<Vec<_>>());
        granted(&self.run_one(&self.control, CONTROL_TIMEOUT, query).await?)
    }

    async fn summary(&self) -> Result<Summary, StoreError> {
        let query = sqlx::query(
            "select coalesce((select term from control), 0), coalesce(sum(adoptions), 0)::bigint,
               coalesce(max(revision), 0), split_part(current_setting('server_version'), ' ', 1),
               current_setting('synchronous_standby_names') <> ''
             from slot",
        );
        let row = self.run_one(&self.control, CONTROL_TIMEOUT, query).await?;
        Ok(Summary {
            term: Term(get(&row, 0)?),
            adoptions: u64::try_from(get::<i64>(&row, 1)?).map_err(StoreError::unusable)?,
            revision: get(&row, 2)?,
            store: StoreReport {
                version: get(&row, 3)?,
                synchronous_standby: get(&row, 4)?,
                timeline: self.sessions.timeline().name,
            },
        })
    }

    async fn map_changed(&self) {
        self.hints.map.notified().await;
    }

    async fn members_changed(&self) {
        self.hints.members.notified().await;
    }
}

/// Live documents after `$1`, or the one that `$2` names.
const DOCUMENTS: &str = "
select d.id, (extract(epoch from d.created_at) * 1000)::bigint,
  (extract(epoch from coalesce(l.at, s.at, d.created_at)) * 1000)::bigint, greatest(d.base_seq, l.seq, s.seq)
from document d
left join lateral (select seq, at from update_log where document = d.id order by seq desc limit 1) l on true
left join lateral (select seq, at from snapshot where document = d.id order by seq desc limit 1) s on true
where not d.deleted and d.id > $1 and ($2::text is null or d.id = $2)
order by d.id limit $3";

/// A duration as a setting of Postgres.
fn setting(duration: Duration) -> String {
    format!("{}ms", duration.as_millis())
}

fn millis(duration: Duration) -> Result<i32, StoreError> {
    i32::try_from(duration.as_millis()).map_err(StoreError::unusable)
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<T, sqlx::Error>>,
) -> Result<T, sqlx::Error> {
    timeout(limit, call)
        .await
        .unwrap_or_else(|_| Err(gave_up()))
}

fn gave_up() -> sqlx::Error {
    sqlx::Error::Io(std::io::Error::new(
        std::io::ErrorKind::TimedOut,
        "gave up waiting for the answer",
    ))
}
