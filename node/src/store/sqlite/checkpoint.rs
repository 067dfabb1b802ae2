//! The write-ahead log of the file, and when what it holds moves to its place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::SqliteConnection;
use sqlx::sqlite::SqlitePool;
use tokio::time::sleep;

use super::failed;
use super::writer::Writer;
use crate::store::StoreError;

/// Between two times that what was appended is moved from the write-ahead log to its place in the file.
const EVERY: Duration = Duration::from_secs(1);
/// A longer log begins anew, in pages of 4 KiB; after a crash a start reads all of it.
const PAGES_KEPT: i64 = 1000;
/// A write-ahead log of as many pages is moved by whoever appends: nobody else comes to it.
pub(super) const PAGES_MAX: &str = "16000";

/// Moves what was appended to its place in the file, beside those who append.
pub(super) async fn keep_moving(
    beside: SqlitePool,
    writer: Arc<Writer>,
    appended: Arc<AtomicBool>,
) {
    loop {
        sleep(EVERY).await;
        if appended.swap(false, Ordering::Relaxed)
            && let Err(error) = move_pages(&beside, &writer).await
        {
            tracing::warn!(%error, "the write-ahead log was not moved to its file");
        }
    }
}

/// Moves the log's pages to their places. The log begins anew only if for a moment nothing is left of it, and those who
/// append all the time leave something: of a long log they wait for the end, a few pages.
async fn move_pages(beside: &SqlitePool, writer: &Writer) -> Result<(), StoreError> {
    let mut beside = beside.acquire().await.map_err(failed)?;
    if PAGES_KEPT < passive(&mut beside).await? {
        passive(&mut beside).await?;
        let _nobody_appends = writer.lock().await?;
        passive(&mut beside).await?;
    }
    Ok(())
}

/// Moves what is there now. Answers how many pages the log has (<https://sqlite.org/pragma.html#pragma_wal_checkpoint>).
async fn passive(connection: &mut SqliteConnection) -> Result<i64, StoreError> {
    let (_busy, pages, _moved): (i64, i64, i64) = sqlx::query_as("pragma wal_checkpoint(passive)")
        .fetch_one(connection)
        .await
        .map_err(failed)?;
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::super::Sqlite;
    use super::*;

    /// Pages that a test appends between two checkpoints.
    const ROUND: i64 = 2 * PAGES_KEPT;
    const ROUNDS: i64 = 8;

    async fn append(writer: &Writer, bytes: i64) {
        sqlx::query("insert into appended (bytes) values (zeroblob(?))")
            .bind(bytes)
            .execute(&mut *writer.lock().await.unwrap())
            .await
            .unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_log_begins_anew_though_somebody_always_appends() {
        let folder = std::env::temp_dir().join(format!("collab-log-{}", uuid::Uuid::new_v4()));
        let store = Sqlite::open(&folder).await.unwrap();
        sqlx::query("create table appended (bytes blob not null)")
            .execute(&mut *store.writer.lock().await.unwrap())
            .await
            .unwrap();
        let writer = store.writer.clone();
        let always = tokio::spawn(async move {
            loop {
                append(&writer, 10).await;
            }
        });
        for _ in 0..ROUNDS {
            append(&store.writer, ROUND * 4096).await;
            move_pages(&store.beside, &store.writer).await.unwrap();
        }
        always.abort();
        let log = folder.join("collab.sqlite-wal").metadata().unwrap().len();
        drop(store);
        std::fs::remove_dir_all(&folder).unwrap();
        let pages = log / 4096;
        assert!(
            pages < 3 * ROUND as u64,
            "{pages} pages after {ROUNDS} times {ROUND}"
        );
    }
}
