//! The schema of the database, brought up to date by one node at a time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::{Connection, PgConnection};
use tokio::time::{sleep, timeout};

use super::sessions::{Pool, Sessions};
use super::{CONTROL_TIMEOUT, gave_up, within};

/// The advisory lock of whoever changes the schema: "schema" in ASCII. It belongs to a session, and ends with it.
pub const SCHEMA_LOCK: i64 = 0x73_63_68_65_6d_61;

const TRY_EVERY: Duration = Duration::from_millis(100);
/// Between two words to the log about the wait.
const SAY_EVERY: Duration = Duration::from_secs(5);
/// Longest time of the change, which may write a large table anew.
const PATIENCE: Duration = Duration::from_mins(30);

/// Waits until no other node changes the schema, then does what is left to do. A newer node may have been here: what it
/// added does not disturb this one.
pub(super) async fn bring_up_to_date(
    sessions: &Arc<Sessions>,
    pool: &Pool,
) -> Result<(), MigrateError> {
    let mut migrations = sqlx::migrate!("migrations/postgres");
    let mut session = pool.take().await?;
    let up_to_date = is_up_to_date(session.connection(), &migrations);
    if within(CONTROL_TIMEOUT, up_to_date).await? {
        session.ended();
        return Ok(());
    }
    // Out of the pool: however this ends, the session does too, and the lock with it.
    let mut session = session.detach();
    let begun = Instant::now();
    let mut said = begun;
    while !is_locked_by(&mut session).await? {
        if SAY_EVERY <= said.elapsed() {
            said = Instant::now();
            tracing::warn!(
                waited_s = begun.elapsed().as_secs(),
                "another node brings the schema of the database up to date; waiting until it is done"
            );
        }
        sleep(TRY_EVERY).await;
    }
    migrations.set_ignore_missing(true).set_locking(false);
    timeout(PATIENCE, migrations.run(&sessions.driver()))
        .await
        .unwrap_or_else(|_| Err(gave_up().into()))?;
    // It is done, whatever the server makes of the farewell.
    let _ = within(CONTROL_TIMEOUT, session.close()).await;
    Ok(())
}

/// Whether everything is done, so that there is no need for the lock.
async fn is_up_to_date(
    session: &mut PgConnection,
    migrations: &Migrator,
) -> Result<bool, sqlx::Error> {
    let begun = sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null");
    if !begun.fetch_one(&mut *session).await? {
        return Ok(false);
    }
    let done = sqlx::query_as::<_, (i64, Vec<u8>)>(
        "select version, checksum from _sqlx_migrations where success",
    );
    let done = done.fetch_all(session).await?;
    Ok(migrations.iter().all(|migration| {
        done.iter().any(|(version, checksum)| {
            *version == migration.version && *checksum == *migration.checksum
        })
    }))
}

async fn is_locked_by(session: &mut PgConnection) -> Result<bool, sqlx::Error> {
    let locked = sqlx::query_scalar("select pg_try_advisory_lock($1)")
        .bind(SCHEMA_LOCK)
        .fetch_one(session);
    within(CONTROL_TIMEOUT, locked).await
}
