//! A real, throw-away Postgres on a free loopback port.
//!
//! Its settings are those that durability rests on (`fsync`, `full_page_writes`, synchronous commit),
//! so that what a test kills is what a user would kill. It dies with the process of the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, bail};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::process::{Folder, command, free_port, signal, spawn, until};

/// How long the server may take to answer or to end.
const PATIENCE: Duration = Duration::from_mins(1);

/// A running server with an empty database `collab`, owned by a role `collab` without other rights.
#[derive(Debug)]
pub struct Postgres {
    folder: Folder,
    port: u16,
    server: Option<Child>,
}

impl Postgres {
    /// Makes a new cluster of databases and starts its server.
    ///
    /// # Panics
    /// When Postgres is not installed or does not start: no test can say anything then.
    pub async fn start() -> Self {
        let folder = Folder::new("postgres", "postgres");
        let mut initdb = command(&folder, &program("initdb"));
        initdb.args([
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "-D",
        ]);
        let made = initdb.arg(folder.path()).output().expect("initdb runs");
        assert!(
            made.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&made.stderr)
        );
        let mut postgres = Self {
            folder,
            port: 0,
            server: None,
        };
        postgres.run().await.expect("postgres starts");
        let mut connection = PgConnection::connect(&postgres.superuser_url())
            .await
            .expect("postgres answers");
        for statement in [
            "create role collab login",
            "create database collab owner collab",
        ] {
            sqlx::query(statement)
                .execute(&mut connection)
                .await
                .expect("the database is created");
        }
        postgres
    }

    /// The server that the tests of this process share while any of them runs; each makes its own
    /// database with [`Postgres::database`] and leaves the server alone.
    pub async fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Postgres>> = Mutex::const_new(Weak::new());
        let mut shared = SHARED.lock().await;
        if let Some(running) = shared.upgrade() {
            return running;
        }
        let started = Arc::new(Self::start().await);
        *shared = Arc::downgrade(&started);
        started
    }

    /// Makes another empty database, and returns its URL for the role `collab`, which owns it.
    ///
    /// # Panics
    /// When the server does not answer.
    pub async fn database(&self) -> String {
        let name = format!("collab_{}", Uuid::new_v4().simple());
        let mut connection = PgConnection::connect(&self.superuser_url())
            .await
            .expect("postgres answers");
        sqlx::query(AssertSqlSafe(format!(
            "create database {name} owner collab"
        )))
        .execute(&mut connection)
        .await
        .expect("the database is created");
        format!("postgres://collab@127.0.0.1:{}/{name}", self.port)
    }

    /// URL of the database as the node uses it.
    pub fn url(&self) -> String {
        format!("postgres://collab@127.0.0.1:{}/collab", self.port)
    }

    /// URL of the same server for its superuser.
    pub fn superuser_url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }

    /// Ends the server in order; sessions are cut.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let server = self.server.as_mut().context("the server does not run")?;
        signal(server, "INT")?;
        until(PATIENCE, "postgres ends", || {
            Ok(server.try_wait()?.is_some())
        })
        .await?;
        self.server = None;
        Ok(())
    }

    /// Kills the server with -9, as a crash would.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut server = self.server.take().context("the server does not run")?;
        server.kill()?;
        server.wait()?;
        Ok(())
    }

    /// Starts the server again, on the same port, after [`Postgres::stop`] or [`Postgres::kill`].
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        if self.server.is_some() {
            self.stop().await?;
        }
        self.run().await
    }

    /// Starts the server again as one that only reads, until [`Postgres::promote`]: what a node meets
    /// in the middle of a failover.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn restart_as_standby(&mut self) -> anyhow::Result<()> {
        std::fs::write(self.folder.path().join("standby.signal"), "")?;
        self.restart().await
    }

    /// Makes a standby the primary, on a new timeline.
    ///
    /// # Errors
    /// When it is none.
    pub async fn promote(&self) -> anyhow::Result<()> {
        let mut connection = PgConnection::connect(&self.superuser_url()).await?;
        let promoted: bool = sqlx::query_scalar("select pg_promote()")
            .fetch_one(&mut connection)
            .await?;
        anyhow::ensure!(promoted, "the server was not promoted");
        Ok(())
    }

    async fn run(&mut self) -> anyhow::Result<()> {
        let started = tokio::time::Instant::now();
        while started.elapsed() < PATIENCE {
            if self.port == 0 {
                self.port = free_port();
            }
            let mut server = spawn(self.server());
            let url = self.superuser_url();
            while server.try_wait()?.is_none() {
                if PgConnection::connect(&url).await.is_ok() {
                    self.server = Some(server);
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            // Processes of the killed server still hold its memory, or the port is taken: try again.
            tokio::time::sleep(Duration::from_millis(100)).await;
            if !self.folder.path().join("PG_VERSION").exists() {
                break;
            }
        }
        bail!("postgres does not start; see {}", self.log().display())
    }

    fn server(&self) -> Command {
        let mut server = command(&self.folder, &program("postgres"));
        server
            .arg("-D")
            .arg(self.folder.path())
            .arg("-p")
            .arg(self.port.to_string());
        for setting in [
            "listen_addresses=127.0.0.1",
            "unix_socket_directories=",
            "fsync=on",
            "full_page_writes=on",
            "synchronous_commit=on",
            "max_connections=200",
            "logging_collector=on",
            "log_directory=.",
            "log_filename=server.log",
        ] {
            server.arg("-c").arg(setting);
        }
        server
    }

    /// What the server says.
    pub fn log(&self) -> PathBuf {
        self.folder.path().join("server.log")
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            // In this mode it cleans up its shared memory, and waits for nobody.
            if signal(server, "QUIT").is_err() {
                server.kill().ok();
            }
            server.wait().ok();
        }
    }
}

/// Debian keeps the server's programs out of the path.
fn program(name: &str) -> PathBuf {
    let mut versions: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .map(|entries| {
            entries
                .flatten()
                .map(|entry| entry.path().join("bin").join(name))
                .collect()
        })
        .unwrap_or_default();
    versions.retain(|path| path.exists());
    versions.sort();
    versions.pop().unwrap_or_else(|| Path::new(name).to_owned())
}
