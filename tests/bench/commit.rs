//! What a commit of a store costs with nothing around it: one connection, one row, one statement after the other.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Connection as _, Database, Encode, Executor, IntoArguments, Postgres, Sqlite, Type};
use tokio::runtime::{Builder, Runtime};

use crate::servers::busy_time_of;
use crate::stats::Histogram;

const COMMITS: u32 = 300;
/// As far apart as the edits of the scenario that this is compared with.
const PAUSE: Duration = Duration::from_millis(5);
const TABLE: &str = "create table if not exists bare (id integer generated always as identity primary key, bytes bytea)";
const TABLE_SQLITE: &str = "create table if not exists bare (id integer primary key, bytes blob)";
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
    let mut connection = sqlite(&folder.join("bare.sqlite")).await?;
    timed(async || append::<Sqlite>(&mut connection, &[&[7; 100]]).await).await
}

/// A durable log in a `SQLite` file or a database, and no more.
pub(crate) struct Log {
    runtime: Runtime,
    connection: Connection,
}

enum Connection {
    Sqlite(SqliteConnection),
    Postgres(PgConnection),
}

impl Log {
    /// Opens one in the database of this URL, or in this file.
    pub(crate) fn open(place: &str) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let connection = runtime.block_on(async {
            anyhow::Ok(if place.starts_with("postgres") {
                Connection::Postgres(postgres(place).await?)
            } else {
                Connection::Sqlite(sqlite(Path::new(place)).await?)
            })
        })?;
        Ok(Self {
            runtime,
            connection,
        })
    }

    /// Commits rows together.
    pub(crate) fn append(&mut self, rows: &[&[u8]]) -> Result<()> {
        self.runtime.block_on(async {
            match &mut self.connection {
                Connection::Sqlite(connection) => append::<Sqlite>(connection, rows).await,
                Connection::Postgres(connection) => append::<Postgres>(connection, rows).await,
            }
        })
    }
}

async fn append<D>(connection: &mut D::Connection, rows: &[&[u8]]) -> Result<()>
where
    D: Database,
    for<'c> &'c mut D::Connection: Executor<'c, Database = D>,
    for<'q> &'q [u8]: Encode<'q, D>,
    [u8]: Type<D>,
    D::Arguments: IntoArguments<D>,
{
    if let [one] = rows {
        sqlx::query(ROW).bind(*one).execute(connection).await?;
        return Ok(());
    }
    let mut transaction = connection.begin().await?;
    for row in rows {
        sqlx::query(ROW)
            .bind(*row)
            .execute(&mut *transaction)
            .await?;
    }
    Ok(transaction.commit().await?)
}

async fn sqlite(file: &Path) -> Result<SqliteConnection> {
    let options = SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let mut connection = SqliteConnection::connect_with(&options).await?;
    connection.execute(TABLE_SQLITE).await?;
    Ok(connection)
}

async fn postgres(url: &str) -> Result<PgConnection> {
    let mut connection = PgConnection::connect(url).await?;
    connection.execute(TABLE).await?;
    Ok(connection)
}

/// Durable commits in this database.
pub(crate) async fn on_postgres(url: &str) -> Result<Commits> {
    let mut connection = postgres(url).await?;
    timed(async || append::<Postgres>(&mut connection, &[&[7; 100]]).await).await
}

async fn timed(mut commit: impl AsyncFnMut() -> Result<()>) -> Result<Commits> {
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
