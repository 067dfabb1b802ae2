//! A real, throw-away Postgres on a free loopback port.
//!
//! Its settings are those that durability rests on (`fsync`, `full_page_writes`, synchronous commit),
//! so that what a test kills is what a user would kill. It dies with the process of the test.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Weak};
use std::time::Duration;

use anyhow::{Context, bail};
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::command::output;
use crate::network::Host;
use crate::process::{Folder, command, command_on, free_port, signal, spawn, until};

/// How long the server may take to answer or to end.
const PATIENCE: Duration = Duration::from_mins(1);

/// Where and how a server runs.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Where.
    pub host: Host,
    /// Settings over those that all servers have, as `name=value`.
    pub settings: Vec<String>,
    /// More variables.
    pub environment: Vec<(String, String)>,
    /// Size of its disk, which is then one of its own in memory; only in a sandbox.
    pub disk_bytes: Option<u64>,
}

/// A running server with an empty database `collab`, owned by a role `collab` without other rights.
#[derive(Debug)]
pub struct Postgres {
    setup: Setup,
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
        Self::start_with(Setup::default()).await
    }

    /// Like [`Postgres::start`], where and how `setup` says.
    ///
    /// # Panics
    /// As there.
    pub async fn start_with(setup: Setup) -> Self {
        let mut postgres = Self::on_disk(setup);
        let folder = &postgres.folder;
        let mut initdb = command(folder, &program("initdb"));
        initdb.args([
            "--username=postgres",
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-sync",
            "-D",
        ]);
        output(initdb.arg(folder.path())).expect("initdb runs");
        let network =
            "host all all 198.18.0.0/15 trust\nhost replication all 198.18.0.0/15 trust\n";
        let rights = std::fs::OpenOptions::new()
            .append(true)
            .open(folder.path().join("pg_hba.conf"));
        std::io::Write::write_all(&mut rights.expect("initdb made it"), network.as_bytes())
            .expect("it can be written");
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

    /// Copies this server to another one, which follows it as a standby `name` until [`Postgres::promote`].
    ///
    /// # Panics
    /// When it does not come up.
    pub async fn standby(&self, name: &str, mut setup: Setup) -> Self {
        let address = self.address();
        setup.settings.push(format!(
            "primary_conninfo=host={} port={} user=postgres application_name={name}",
            address.ip(),
            address.port()
        ));
        let mut standby = Self::on_disk(setup);
        let mut copy = command_on(
            &standby.setup.host,
            &standby.folder,
            &program("pg_basebackup"),
        );
        copy.args(["--host", &address.ip().to_string()])
            .args(["--port", &address.port().to_string()])
            .args([
                "--username=postgres",
                "--checkpoint=fast",
                "--no-sync",
                "--pgdata",
            ])
            .arg(standby.folder.path());
        output(&mut copy).expect("the server can be copied");
        std::fs::write(standby.folder.path().join("standby.signal"), "").expect("it is there");
        standby.run().await.expect("the standby starts");
        standby
    }

    fn on_disk(setup: Setup) -> Self {
        let folder = Folder::new("postgres", "postgres");
        if let Some(bytes) = setup.disk_bytes {
            let mut mount = Command::new("mount");
            mount.args(["-t", "tmpfs", "-o"]);
            mount.arg(format!("size={bytes},mode=0700,uid=postgres,gid=postgres"));
            output(mount.arg("tmpfs").arg(folder.path())).expect("a disk in memory");
        }
        Self {
            setup,
            folder,
            port: 0,
            server: None,
        }
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
        format!("postgres://collab@{}/{name}", self.address())
    }

    /// URL of the database as the node uses it.
    pub fn url(&self) -> String {
        Self::url_at(self.address())
    }

    /// The same for a server, or a proxy, at another address.
    pub fn url_at(address: SocketAddr) -> String {
        format!("postgres://collab@{address}/collab")
    }

    /// Address of the server.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.setup.host.address(), self.port)
    }

    /// Folder of its files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Whether its first process lives.
    pub fn runs(&mut self) -> bool {
        let server = self.server.as_mut();
        server.is_some_and(|server| matches!(server.try_wait(), Ok(None)))
    }

    /// Id of its first process.
    pub fn pid(&self) -> Option<u32> {
        self.server.as_ref().map(Child::id)
    }

    /// URL of the same server for its superuser.
    pub fn superuser_url(&self) -> String {
        format!("postgres://postgres@{}/postgres", self.address())
    }

    /// A session of the superuser in the database of the nodes.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn session(&self) -> anyhow::Result<PgConnection> {
        let url = format!("postgres://postgres@{}/collab", self.address());
        Ok(PgConnection::connect(&url).await?)
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

    /// Cuts all sessions and ends the server at once, without writing anything down: it has to recover.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop_at_once(&mut self) -> anyhow::Result<()> {
        let server = self.server.as_mut().context("the server does not run")?;
        signal(server, "QUIT")?;
        until(PATIENCE, "postgres ends", || {
            Ok(server.try_wait()?.is_some())
        })
        .await?;
        self.server = None;
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
        let mut server = command_on(&self.setup.host, &self.folder, &program("postgres"));
        server
            .arg("-D")
            .arg(self.folder.path())
            .arg("-p")
            .arg(self.port.to_string());
        for setting in [
            &format!("listen_addresses={}", self.setup.host.address()),
            "unix_socket_directories=",
            "fsync=on",
            "full_page_writes=on",
            "synchronous_commit=on",
            "max_connections=400",
            "logging_collector=on",
            "log_directory=.",
            "log_filename=server.log",
        ] {
            server.arg("-c").arg(setting);
        }
        for setting in &self.setup.settings {
            server.arg("-c").arg(setting);
        }
        server.envs(self.setup.environment.iter().cloned());
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
        if self.setup.disk_bytes.is_some() {
            let mut unmount = Command::new("umount");
            output(unmount.arg("--lazy").arg(self.folder.path())).ok();
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
