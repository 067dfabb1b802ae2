//! The schema of the database, brought up to date by one node at a time.

use std::time::{Duration, Instant};

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::{Connection, PgConnection, PgPool};
use tokio::time::{sleep, timeout};

use super::{CONTROL_TIMEOUT, gave_up, within};

/// The advisory lock of whoever changes the schema: "schema" in ASCII. It belongs to a session, and ends with it.
pub const SCHEMA_LOCK: i64 = 0x73_63_68_65_6d_61;

const UNDEFINED_TABLE: &str = "42P01";
const TRY_EVERY: Duration = Duration::from_millis(100);
/// Between two words to the log about the wait.
const SAY_EVERY: Duration = Duration::from_secs(5);
/// Longest time of the change, which may write a large table anew.
const PATIENCE: Duration = Duration::from_mins(30);

/// Waits until no other node changes the schema, then does what is left to do. A newer node may have been here: what it
/// added does not disturb this one.
pub(super) async fn bring_up_to_date(pool: &PgPool) -> Result<(), MigrateError> {
    let mut migrations = sqlx::migrate!("migrations/postgres");
    if is_up_to_date(pool, &migrations).await? {
        return Ok(());
    }
    // Out of the pool: however this ends, the session does too, and the lock with it.
    let mut session = pool.acquire().await?.detach();
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
    timeout(PATIENCE, migrations.run(pool))
        .await
        .unwrap_or_else(|_| Err(gave_up().into()))?;
    // It is done, whatever the server makes of the farewell.
    let _ = within(CONTROL_TIMEOUT, session.close()).await;
    Ok(())
}

/// Whether everything is done, so that there is no need for the lock.
async fn is_up_to_date(pool: &PgPool, migrations: &Migrator) -> Result<bool, sqlx::Error> {
    let done = sqlx::query_as::<_, (i64, Vec<u8>)>(
        "select version, checksum from _sqlx_migrations where success",
    );
    let done = match within(CONTROL_TIMEOUT, done.fetch_all(pool)).await {
        Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(UNDEFINED_TABLE) => {
            return Ok(false);
        }
        done => done?,
    };
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
