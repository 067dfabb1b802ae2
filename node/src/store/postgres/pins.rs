//! How a document gets a slot of its own, and gives it back.

use collab_core::ids::{DocumentId, Epoch, Slot, Term};
use collab_core::limits::CLAIM_LOCK_TIMEOUT;
use collab_core::mutants::Mutant;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{CONTROL_TIMEOUT, Postgres, setting, within};
use crate::store::{StoreError, first_epoch};

/// Locks the slots `$1` for a change of who owns what in them, in ascending order.
pub const LOCK_SLOTS: &str =
    "select slot from slot where slot = any($1) order by slot for no key update";

/// Makes `$2` the slot of the document `$3` alone, or of none, and takes it out of `$1` or puts it back. Both
/// epochs rise, so that whoever has the document open under either slot, or a queue of appends for
/// it, is fenced.
pub const MOVE_DOCUMENT: &str = "
update slot s set epoch = s.epoch + 1, revision = pg_current_xact_id()::text::bigint,
  document = case when s.slot = $2 then $3 end,
  owner = case when s.slot = $1 then s.owner when $3 is not null then (select owner from slot where slot = $1) end
where s.slot in ($1, $2)
returning pg_notify('collab_map', '')";

/// Where a document is to be.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// In a virtual slot of its own.
    Pinned,
    /// In the slot that its id hashes to.
    Home,
}

impl Postgres {
    pub(super) async fn change_pin(
        &self,
        term: Term,
        document: &DocumentId,
        home: Slot,
        wanted: Wanted,
    ) -> Result<Result<(), Term>, StoreError> {
        let mut session = self.session(&self.control).await?;
        let first_epoch = first_epoch(&self.sessions.timeline().name);
        let connection = session.connection();
        let change = change_pin(connection, term, document, home, wanted, first_epoch);
        let changed = within(CONTROL_TIMEOUT, change)
            .await
            .map_err(|error| self.failed(error))?;
        session.ended();
        Ok(changed)
    }
}

/// Pins or unpins. The lock on `control` lets no two take the same virtual slot.
async fn change_pin(
    connection: &mut PgConnection,
    term: Term,
    document: &DocumentId,
    home: Slot,
    wanted: Wanted,
    first_epoch: Epoch,
) -> Result<Result<(), Term>, sqlx::Error> {
    let mut change = connection.begin().await?;
    sqlx::query("select set_config('lock_timeout', $1, true)")
        .bind(setting(3 * CLAIM_LOCK_TIMEOUT))
        .execute(&mut *change)
        .await?;
    let slots = sqlx::query_scalar::<_, i32>(
        "update control set term = $1 where term <= $1 returning slots",
    )
    .bind(term.0)
    .fetch_optional(&mut *change)
    .await?;
    let Some(slots) = slots else {
        let current = sqlx::query_scalar("select term from control")
            .fetch_one(&mut *change)
            .await?;
        change.rollback().await?;
        return Ok(Err(Term(current)));
    };
    let pinned = sqlx::query_scalar::<_, i32>("select slot from slot where document = $1")
        .bind(document.as_str())
        .fetch_optional(&mut *change)
        .await?;
    let own = match (wanted, pinned) {
        (Wanted::Pinned, Some(_)) | (Wanted::Home, None) => None,
        (Wanted::Home, Some(own)) => Some(own),
        (Wanted::Pinned, None) => Some(free_slot(&mut change, slots, first_epoch).await?),
    };
    if let Some(own) = own {
        let home = i32::from(home.0);
        sqlx::query(LOCK_SLOTS)
            .bind([home, own])
            .execute(&mut *change)
            .await?;
        let statement = Mutant::PinKeepsEpoch.rewrites(
            MOVE_DOCUMENT,
            "epoch + 1",
            "epoch + (s.slot = $2)::int",
        );
        sqlx::query(AssertSqlSafe(statement))
            .bind(home)
            .bind(own)
            .bind((wanted == Wanted::Pinned).then_some(document.as_str()))
            .execute(&mut *change)
            .await?;
    }
    change.commit().await?;
    Ok(Ok(()))
}

/// The lowest virtual slot that is for no document; a new one, with this epoch, when there is none.
async fn free_slot(
    connection: &mut PgConnection,
    slots: i32,
    first_epoch: Epoch,
) -> Result<i32, sqlx::Error> {
    let free = sqlx::query_scalar(
        "select coalesce((select min(slot) from slot where $1 <= slot and document is null), max(slot) + 1) from slot",
    )
    .bind(slots)
    .fetch_one(&mut *connection)
    .await?;
    sqlx::query("insert into slot (slot, epoch) values ($1, $2) on conflict do nothing")
        .bind(free)
        .bind(first_epoch.0)
        .execute(connection)
        .await?;
    Ok(free)
}
