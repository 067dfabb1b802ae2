//! What a commit of a store costs with nothing around it: one connection, one row, one statement after the other.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Connection as _, Executor as _};

use crate::servers::busy_time_of;
use crate::stats::Histogram;

const COMMITS: u32 = 300;
/// As far apart as the edits of the scenario that this is compared with.
const PAUSE: Duration = Duration::from_millis(5);
const TABLE: &str =
    "create table bare (id integer generated always as identity primary key, bytes bytea)";
const TABLE_SQLITE: &str = "create table bare (id integer primary key, bytes blob)";
const ROW: &str = "insert into bare (bytes) values ($1)";

/// Commits, one after the other.
#[derive(Default)]
pub(crate) struct Commits {
    pub(crate) times: Histogram,
    /// CPU time of one in this process. That of a database is not in it.
    pub(crate) cpu: Duration,
}

/// Durable commits in a `SQLite` file of this folder.
pub(crate) async fn on_sqlite(folder: &Path) -> Result<Commits> {
    let options = SqliteConnectOptions::new()
        .filename(folder.join("bare.sqlite"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let mut connection = SqliteConnection::connect_with(&options).await?;
    connection.execute(TABLE_SQLITE).await?;
    timed(async || {
        let row = sqlx::query(ROW).bind(&[7_u8; 100][..]);
        row.execute(&mut connection).await.map(drop)
    })
    .await
}

/// Durable commits in this database.
pub(crate) async fn on_postgres(url: &str) -> Result<Commits> {
    let mut connection = PgConnection::connect(url).await?;
    connection.execute(TABLE).await?;
    timed(async || {
        let row = sqlx::query(ROW).bind(&[7_u8; 100][..]);
        row.execute(&mut connection).await.map(drop)
    })
    .await
}

async fn timed(mut commit: impl AsyncFnMut() -> sqlx::Result<()>) -> Result<Commits> {
    let mut times = Histogram::default();
    let busy = busy_time_of(std::process::id());
    for _ in 0..COMMITS {
        let begun = Instant::now();
        commit().await?;
        times.record(u64::try_from(begun.elapsed().as_micros())?);
        tokio::time::sleep(PAUSE).await;
    }
    let cpu = busy_time_of(std::process::id()).saturating_sub(busy) / COMMITS;
    Ok(Commits { times, cpu })
}
