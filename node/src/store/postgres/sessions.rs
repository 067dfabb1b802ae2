//! The sessions of one process: opened when they are wanted, kept open between statements, and not used any more once the
//! server may be another one.
//!
//! Not the pool of the driver: that one asks each session that comes back whether it still answers. This is one round trip per
//! statement, in which whoever wants a session opens another.

use std::borrow::Cow;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use backon::{ExponentialBuilder, Retryable};
use deadpool::managed::{self, Manager, Metrics, Object, PoolError, RecycleError, RecycleResult};
use sqlx::error::DatabaseError;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::{Connection, PgConnection, Row};
use tokio::time::timeout;

use super::setting;
use crate::store::StoreError;

/// How long a call waits for a session.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(2);
/// A call that somebody stopped waiting for after this time was waiting for a server that is not there.
const SILENT_AFTER: Duration = Duration::from_secs(1);
/// A server that is just starting, and one that has no session left: the driver's own pool waits for these, too.
const PASSES: [&str; 2] = ["57P03", "53300"];

/// What all sessions share.
#[derive(Debug)]
pub(super) struct Sessions {
    options: Mutex<PgConnectOptions>,
    /// Sessions that were opened earlier are not used any more.
    trusted_since: Mutex<Instant>,
    timeline: Mutex<Timeline>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Timeline {
    /// As in the name of a WAL segment; differs after each failover.
    pub(super) name: String,
    pub(super) changes: u64,
}

/// Sessions for calls of one kind.
#[derive(Clone, Debug)]
pub(super) struct Pool(managed::Pool<Opener>);

#[derive(Debug)]
struct Opener {
    sessions: Arc<Sessions>,
    statement_timeout: Duration,
}

#[derive(Debug)]
struct Opened {
    /// Before the first word to the server.
    at: Instant,
    connection: PgConnection,
}

/// A session that goes back to its pool only once its statement was seen to end.
pub(super) struct Session {
    opened: Option<Object<Opener>>,
    since: Instant,
}

impl Sessions {
    pub(super) fn new(options: PgConnectOptions) -> Self {
        Self {
            options: Mutex::new(options),
            trusted_since: Mutex::new(Instant::now()),
            timeline: Mutex::default(),
        }
    }

    /// A pool of at most `size` sessions, on which a statement takes at most so long; zero is for ever.
    pub(super) fn pool(self: &Arc<Self>, size: usize, statement_timeout: Duration) -> Pool {
        let opener = Opener {
            sessions: self.clone(),
            statement_timeout,
        };
        let pool = managed::Pool::builder(opener).max_size(size).build();
        Pool(pool.expect("a pool without timeouts needs no runtime"))
    }

    /// The driver's own pool, of one session: what it listens with and changes the schema with.
    pub(super) fn driver(self: &Arc<Self>) -> PgPool {
        let sessions = self.clone();
        PgPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .after_connect(move |connection, _| {
                let sessions = sessions.clone();
                Box::pin(async move { sessions.prepare(connection, Duration::ZERO).await })
            })
            .connect_lazy_with(self.options())
    }

    /// Gives sessions this name; those that have another are opened again.
    pub(super) fn name(&self, name: &str) {
        let mut options = self.options.lock().expect("no holder panics");
        if options.get_application_name() != Some(name) {
            *options = options.clone().application_name(name);
            drop(options);
            self.distrust();
        }
    }

    pub(super) fn timeline(&self) -> Timeline {
        self.timeline.lock().expect("no holder panics").clone()
    }

    /// Lets the sessions there are be replaced before they are used again.
    pub(super) fn distrust(&self) {
        *self.trusted_since.lock().expect("no holder panics") = Instant::now();
    }

    /// What it means that a call failed.
    pub(super) fn failed(&self, error: sqlx::Error) -> StoreError {
        let code = error
            .as_database_error()
            .and_then(DatabaseError::code)
            .map(Cow::into_owned);
        let class = code.as_deref().and_then(|code| code.get(..2));
        match (&error, class) {
            // 22 data exception, 23 integrity constraint, 42 syntax error or access rule.
            (_, Some("22" | "23" | "42"))
            | (
                sqlx::Error::RowNotFound | sqlx::Error::ColumnNotFound(_) | sqlx::Error::Encode(_),
                _,
            ) => StoreError::Unusable(error.to_string()),
            // Lock not available.
            _ if code.as_deref() == Some("55P03") => StoreError::Locked(error),
            // 40 rolled back, 53 insufficient resources, 55 not in the state for it: the session is fine.
            (_, Some("40" | "53" | "55")) | (sqlx::Error::PoolTimedOut, _) => {
                StoreError::Unavailable(error)
            }
            _ => {
                // The server has gone, or is another one now; the other sessions would find out one by one.
                self.distrust();
                StoreError::Unavailable(error)
            }
        }
    }

    fn options(&self) -> PgConnectOptions {
        self.options.lock().expect("no holder panics").clone()
    }

    /// Makes a new session one that may write, and refuses a server where it cannot be.
    async fn prepare(
        &self,
        connection: &mut PgConnection,
        statement_timeout: Duration,
    ) -> Result<(), sqlx::Error> {
        let unusable = |reason: &str| Err(sqlx::Error::Configuration(reason.into()));
        // A timeout that the role or database may have set would cancel waits for the standby. Compiling a statement takes
        // up to a second, and none here runs for longer than some milliseconds. The rest lets the server notice within
        // seconds that this process or its host is gone.
        sqlx::query(
            "select set_config('synchronous_commit', 'on', false), set_config('statement_timeout', $1, false),
               set_config('jit', 'off', false), set_config('lock_timeout', '0', false), set_config('client_connection_check_interval', '1s', false),
               set_config('tcp_keepalives_idle', '5', false), set_config('tcp_keepalives_interval', '2', false),
               set_config('tcp_keepalives_count', '3', false), set_config('tcp_user_timeout', '10s', false)",
        )
        .bind(setting(statement_timeout))
        .execute(&mut *connection)
        .await?;
        let row = sqlx::query(
            "select pg_is_in_recovery() or current_setting('transaction_read_only') = 'on',
               current_setting('synchronous_commit'),
               case when not pg_is_in_recovery() then substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) end",
        )
        .fetch_one(connection)
        .await?;
        if row.try_get(0)? {
            return unusable("this database server is not the primary");
        }
        if row.try_get::<&str, _>(1)? != "on" {
            return unusable("this database server does not commit synchronously");
        }
        let name: String = row.try_get(2)?;
        let mut timeline = self.timeline.lock().expect("no holder panics");
        if timeline.name != name {
            if !timeline.name.is_empty() {
                tracing::warn!(
                    before = timeline.name,
                    now = name,
                    "the database has failed over"
                );
                timeline.changes += 1;
            }
            timeline.name = name;
        }
        Ok(())
    }
}

impl Pool {
    /// A session, a new one only when no other is at hand. A server that may have one soon is waited for.
    pub(super) async fn take(&self) -> Result<Session, sqlx::Error> {
        let patience = ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(10))
            .with_max_delay(ACQUIRE_TIMEOUT / 5)
            .with_total_delay(Some(ACQUIRE_TIMEOUT))
            .without_max_times();
        let taken = (|| self.0.get()).retry(patience).when(passes);
        match timeout(ACQUIRE_TIMEOUT, taken).await {
            Ok(Ok(opened)) => Ok(Session {
                opened: Some(opened),
                since: Instant::now(),
            }),
            Ok(Err(PoolError::Backend(error))) => Err(error),
            Ok(Err(_)) | Err(_) => Err(sqlx::Error::PoolTimedOut),
        }
    }

    /// Opens all of its sessions. To open one takes several round trips and a key derivation, and the first edits of every
    /// document that has just moved to a new node would wait for it. It waits for no server: others want what it has open.
    pub(super) async fn fill(&self) {
        let wanted = self.0.status().max_size;
        let mut open = Vec::with_capacity(wanted);
        while open.len() < wanted {
            let error = match timeout(ACQUIRE_TIMEOUT, self.0.get()).await {
                Ok(Ok(session)) => {
                    open.push(session);
                    continue;
                }
                Ok(Err(error)) => error.to_string(),
                Err(elapsed) => elapsed.to_string(),
            };
            tracing::warn!(open = open.len(), wanted, %error, "the database has not enough sessions left; the rest are opened when they are wanted");
            return;
        }
    }
}

/// Whether the server may have a session soon.
fn passes(error: &PoolError<sqlx::Error>) -> bool {
    match error {
        PoolError::Backend(sqlx::Error::Io(error)) => {
            error.kind() == std::io::ErrorKind::ConnectionRefused
        }
        PoolError::Backend(sqlx::Error::Database(error)) => {
            error.code().is_some_and(|code| PASSES.contains(&&*code))
        }
        _ => false,
    }
}

impl Manager for Opener {
    type Type = Opened;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<Opened, sqlx::Error> {
        let at = Instant::now();
        let mut connection = PgConnection::connect_with(&self.sessions.options()).await?;
        self.sessions
            .prepare(&mut connection, self.statement_timeout)
            .await?;
        Ok(Opened { at, connection })
    }

    async fn recycle(&self, opened: &mut Opened, _: &Metrics) -> RecycleResult<sqlx::Error> {
        if opened.at
            < *self
                .sessions
                .trusted_since
                .lock()
                .expect("no holder panics")
        {
            return Err(RecycleError::message("the server may be another one"));
        }
        Ok(())
    }
}

impl Session {
    pub(super) fn connection(&mut self) -> &mut PgConnection {
        &mut self.opened.as_mut().expect("it has not ended").connection
    }

    /// Takes it out of its pool for good.
    pub(super) fn detach(mut self) -> PgConnection {
        let opened = self.opened.take().expect("it has not ended");
        Object::take(opened).connection
    }

    /// Puts it back.
    pub(super) fn ended(mut self) {
        self.opened = None;
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if let Some(opened) = self.opened.take() {
            let sessions = Object::pool(&opened).map(|pool| pool.manager().sessions.clone());
            drop(Object::take(opened));
            if SILENT_AFTER < self.since.elapsed()
                && let Some(sessions) = sessions
            {
                sessions.distrust();
            }
        }
    }
}
