//! How rows are appended: under the lock of their slot, and not taken for written when the server has warned.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};

use collab_core::mutants::Mutant;
use sqlx::AssertSqlSafe;
use sqlx::postgres::{PgArguments, PgRow};
use sqlx::query::Query;

use super::{DATA_TIMEOUT, Postgres, within};
use crate::store::{Append, Ownership, Store, StoreError};

/// The write rule: inserts the rows whose slots are held, and answers which slots those were.
///
/// `$1..$3` are the slots, epochs and incarnations that the batch claims to hold; `$4..$9` are the
/// rows: the place of its slot in `$1` (from 1), document, seq, checksum, bytes, author; `$10` is how long each
/// lock is waited for. The answer has the held slots, and the documents and seqs of the rows that were inserted.
///
/// `for share` conflicts with the lock of a claim and lets appends of other documents of the slot
/// pass; in order of slot, so that two batches cannot wait for each other.
pub const APPEND: &str = "
with patience as materialized (
  select set_config('lock_timeout', $10, true)
), want as (
  select * from unnest($1::int[], $2::bigint[], $3::uuid[]) with ordinality as w(slot, epoch, incarnation, place)
), held as materialized (
  select w.place, s.slot, s.epoch from patience, slot s join want w using (slot)
  where s.epoch = w.epoch and s.owner = w.incarnation
  order by s.slot for share of s
), put as (
  insert into update_log (document, seq, slot, epoch, crc32c, bytes, author)
  select r.document, r.seq, h.slot, h.epoch, r.crc32c, r.bytes, r.author
  from unnest($4::bigint[], $5::text[], $6::bigint[], $7::bigint[], $8::bytea[], $9::text[])
    as r(place, document, seq, crc32c, bytes, author)
  join held h using (place)
  join document d on d.id = r.document and not d.deleted and d.base_seq < r.seq
  on conflict (document, seq) do nothing
  returning document, seq
)
select (select array_agg(slot) from held), (select array_agg(document) from put), (select array_agg(seq) from put)";

/// The write rule for a single row, at a third of what [`APPEND`] takes beyond the bare row. It says nothing when it does nothing,
/// whatever the reason, and waits for nobody: [`APPEND`] knows more.
///
/// `$1..$3` are the slot, epoch and incarnation, `$4..$8` document, seq, checksum, bytes and author.
pub const APPEND_ONE: &str = "
with held as materialized (
  select s.slot, s.epoch from slot s where s.slot = $1 and s.epoch = $2 and s.owner = $3 for share of s skip locked
)
insert into update_log (document, seq, slot, epoch, crc32c, bytes, author)
select d.id, $5, h.slot, h.epoch, $6, $7, $8
from held h join document d on d.id = $4 and not d.deleted and d.base_seq < $5
on conflict (document, seq) do nothing
returning seq";

/// [`APPEND`] as it is sent.
pub fn append_statement() -> Cow<'static, str> {
    Mutant::ExistsFence.rewrites(APPEND, "for share of s", "")
}

/// [`APPEND_ONE`] as it is sent.
pub fn append_one_statement() -> Cow<'static, str> {
    Mutant::ExistsFence.rewrites(APPEND_ONE, "for share of s skip locked", "")
}

/// Warnings of servers that this process has heard of.
static WARNINGS: AtomicU64 = AtomicU64::new(0);

/// Hears the warnings of servers, which the driver tells the log and nobody else. Without this part of the log a cancelled wait
/// for the standby passes for a commit.
#[derive(Debug)]
pub struct Warnings;

impl<S: tracing::Subscriber> tracing_subscriber::Layer<S> for Warnings {
    fn on_event(&self, event: &tracing::Event<'_>, _: tracing_subscriber::layer::Context<'_, S>) {
        let metadata = event.metadata();
        if metadata.target() == "sqlx::postgres::notice"
            && *metadata.level() <= tracing::Level::WARN
        {
            WARNINGS.fetch_add(1, Ordering::AcqRel);
        }
    }
}

impl Postgres {
    /// Runs one statement that writes documents. A warning means that its rows may be on this server alone.
    pub(super) async fn run_durably(
        &self,
        query: Query<'_, sqlx::Postgres, PgArguments>,
    ) -> Result<Option<PgRow>, StoreError> {
        let warnings = WARNINGS.load(Ordering::Acquire);
        let seen = self.failovers().seen;
        // The session tells of a failover before it is used.
        let mut session = self.session(&self.writes).await?;
        let failovers = self.failovers();
        if failovers.is_pending() || failovers.seen != seen {
            session.ended();
            return Err(StoreError::Unavailable(sqlx::Error::Configuration(
                "the database has failed over; what was to be written may be older than what it holds now".into(),
            )));
        }
        let row = within(DATA_TIMEOUT, query.fetch_optional(session.connection()))
            .await
            .map_err(|error| self.failed(error))?;
        session.ended();
        unless_warned(warnings, row)
    }

    /// Appends if there is nothing against it. Answers whether it did.
    pub(super) async fn append_one(&self, append: &Append) -> Result<bool, StoreError> {
        let Ownership {
            slot,
            epoch,
            incarnation,
        } = append.ownership;
        let query = sqlx::query(AssertSqlSafe(append_one_statement()))
            .bind(i32::from(slot.0))
            .bind(epoch.0)
            .bind(incarnation)
            .bind(append.document.as_str())
            .bind(append.seq.0)
            .bind(i64::from(crc32c::crc32c(&append.bytes)))
            .bind(append.bytes.as_ref())
            .bind(stored_author(append));
        Ok(self.run_durably(query).await?.is_some())
    }
}

/// The one byte that Postgres has no text for must not fail a batch.
pub(super) fn stored_author(append: &Append) -> String {
    append.author.replace('\0', "")
}

/// The answer to a statement that writes, unless the server has warned meanwhile: `before` is [`WARNINGS`] at its beginning.
fn unless_warned<T>(before: u64, answer: T) -> Result<T, StoreError> {
    if before == WARNINGS.load(Ordering::Acquire) {
        return Ok(answer);
    }
    let reason = "the server warned: it is not known whether the standby has the commit";
    Err(StoreError::Unavailable(sqlx::Error::Protocol(
        reason.to_owned(),
    )))
}
