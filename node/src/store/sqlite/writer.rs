//! The one connection that appends.

use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{Connection, SqliteConnection};
use tokio::sync::{MappedMutexGuard, Mutex, MutexGuard};

use super::failed;
use crate::store::StoreError;

/// Opened when somebody writes: a node that starts after a crash reads first, and its clients wait for that.
///
/// Not in a pool, which would ask it after each statement whether it still answers.
#[derive(Debug)]
pub(super) struct Writer {
    options: SqliteConnectOptions,
    connection: Mutex<Option<SqliteConnection>>,
}

impl Writer {
    pub(super) fn new(options: SqliteConnectOptions) -> Self {
        let connection = Mutex::default();
        Self {
            options,
            connection,
        }
    }

    /// Waits until nobody else writes.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub(super) async fn lock(&self) -> Result<MappedMutexGuard<'_, SqliteConnection>, StoreError> {
        let mut connection = self.connection.lock().await;
        if connection.is_none() {
            let opened = SqliteConnection::connect_with(&self.options).await;
            *connection = Some(opened.map_err(failed)?);
        }
        Ok(MutexGuard::map(connection, |connection| {
            connection.as_mut().expect("opened above")
        }))
    }
}
