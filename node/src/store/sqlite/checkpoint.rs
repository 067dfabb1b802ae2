//! The write-ahead log of the file, and when what it holds moves to its place.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sqlx::sqlite::SqlitePool;
use tokio::time::sleep;

/// Between two times that what was appended is moved from the write-ahead log to its place in the file.
const EVERY: Duration = Duration::from_secs(1);
/// A write-ahead log of as many pages is moved by whoever appends: nobody else comes to it.
pub(super) const PAGES_MAX: &str = "16000";

/// Moves what was appended to its place in the file, beside those who append: nobody waits for it.
pub(super) async fn keep_moving(connection: SqlitePool, appended: Arc<AtomicBool>) {
    loop {
        sleep(EVERY).await;
        if appended.swap(false, Ordering::Relaxed) {
            let done = sqlx::query("pragma wal_checkpoint(passive)").execute(&connection);
            if let Err(error) = done.await {
                tracing::warn!(%error, "the write-ahead log was not moved to its file");
            }
        }
    }
}
