//! The servers that are compared: how to get them, start them, and what they say when an edit is saved.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use collab_core::wire::varint::write_var_uint;
use collab_tests::postgres::Postgres;
use tokio::runtime::Runtime;

use crate::commit::{self, Commits};

/// The core of the server; the generator has the other.
const SERVER_CORE: &str = "0";
pub(crate) const GENERATOR_CORE: &str = "1";
/// Of a server that shares one of them with the generator.
pub(crate) const BOTH_CORES: &str = "0,1";

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// No CRDT, no storage: the limit of the machine.
    Raw,
    /// The same, and each edit is committed to a `SQLite` file before its receipt.
    RawSqlite,
    /// To Postgres, which shares the generator's core.
    RawPostgres,
    /// `collab-node` on `SQLite`.
    Sqlite,
    /// `collab-node` on Postgres, which shares the generator's core.
    Postgres,
    /// `@hocuspocus/server` with its `SQLite` extension.
    Hocuspocus,
    /// `@y/websocket-server` with `LevelDB`.
    YWebsocket,
    /// `y-sweet` on files.
    YSweet,
}

/// How messages are wrapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// y-websocket's.
    Plain,
    /// The document's name before each.
    Hocuspocus,
}

/// What says that an edit is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ack {
    /// The sender's own update comes back.
    Echo,
    /// A number that it asked to get back (message 102).
    Version,
    /// A status per update.
    Status,
}

impl Kind {
    pub(crate) const ALL: [Self; 8] = [
        Self::Raw,
        Self::RawSqlite,
        Self::RawPostgres,
        Self::Sqlite,
        Self::Postgres,
        Self::Hocuspocus,
        Self::YWebsocket,
        Self::YSweet,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::RawSqlite => "raw/sqlite",
            Self::RawPostgres => "raw/postgres",
            Self::Sqlite => "collab/sqlite",
            Self::Postgres => "collab/postgres",
            Self::Hocuspocus => "hocuspocus",
            Self::YWebsocket => "y-websocket",
            Self::YSweet => "y-sweet",
        }
    }

    pub(crate) const fn is_raw(self) -> bool {
        matches!(self, Self::Raw | Self::RawSqlite | Self::RawPostgres)
    }

    pub(crate) const fn is_ours(self) -> bool {
        matches!(self, Self::Sqlite | Self::Postgres)
    }

    pub(crate) const fn is_rival(self) -> bool {
        matches!(self, Self::Hocuspocus | Self::YWebsocket | Self::YSweet)
    }
}

impl Dialect {
    /// Writes what stands before a message.
    pub(crate) fn address(self, out: &mut Vec<u8>, document: &str) {
        if self == Self::Hocuspocus {
            write_var_uint(out, document.len() as u64);
            out.extend_from_slice(document.as_bytes());
        }
    }
}

/// Where a server keeps its documents; it may be started again on it.
pub(crate) struct Home {
    pub(crate) kind: Kind,
    folder: PathBuf,
    database: Option<String>,
    cores: &'static str,
}

impl Home {
    pub(crate) fn new(kind: Kind, scenario: &str) -> Result<Self> {
        let folder = work().join(format!("{}-{scenario}", kind.name().replace('/', "-")));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder)?;
        let database = match kind {
            Kind::Postgres | Kind::RawPostgres => Some(database()),
            _ => None,
        };
        Ok(Self {
            kind,
            folder,
            database,
            cores: SERVER_CORE,
        })
    }

    /// Durable commits in the store of this server alone; nothing where that is not known.
    pub(crate) fn bare_commits(&self) -> Result<Commits> {
        match (self.kind, &self.database) {
            (Kind::Sqlite | Kind::RawSqlite, _) => {
                runtime().block_on(commit::on_sqlite(&self.folder))
            }
            (_, Some(url)) => runtime().block_on(commit::on_postgres(url)),
            _ => Ok(Commits::default()),
        }
    }

    /// Its servers have these cores, if they are named.
    pub(crate) fn on(self, cores: Option<&'static str>) -> Self {
        let cores = cores.unwrap_or(self.cores);
        Self { cores, ..self }
    }

    /// Starts the server on its core and waits until it takes connections.
    pub(crate) fn start(&self, state: Option<&Path>) -> Result<Running> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        drop(listener);
        let port = address.port().to_string();
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", self.cores]);
        let data = self.folder.as_os_str();
        match self.kind {
            Kind::Raw | Kind::RawSqlite | Kind::RawPostgres => {
                command
                    .arg(std::env::current_exe()?)
                    .args(["raw-server", &port])
                    .arg(state.unwrap_or(Path::new("")));
                if self.kind == Kind::RawSqlite {
                    command.arg(self.folder.join("log.sqlite"));
                }
                command.args(&self.database);
            }
            Kind::Sqlite => {
                command
                    .arg(node())
                    .args(["--listen", &address.to_string()])
                    .arg("--data")
                    .arg(data);
            }
            Kind::Postgres => {
                let url = self.database.as_deref().context("made with it")?;
                let internal = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
                    .local_addr()?
                    .to_string();
                command.arg(node()).args([
                    "--listen",
                    &address.to_string(),
                    "--database-url",
                    url,
                    "--internal-listen",
                    &internal,
                ]);
                // As a container that is started again in its pod.
                command.args(["--node-name", "bench", "--pod-uid", "bench"]);
            }
            Kind::Hocuspocus => {
                command
                    .arg("node")
                    .arg(rivals()?.join("hocuspocus.mjs"))
                    .arg(&port)
                    .arg(self.folder.join("db.sqlite"));
            }
            Kind::YWebsocket => {
                command
                    .arg("node")
                    .arg(rivals()?.join("y-websocket.mjs"))
                    .arg(&port);
                command.env("YPERSISTENCE", data);
            }
            Kind::YSweet => {
                command
                    .arg(y_sweet()?)
                    .args(["serve", "--host", "127.0.0.1", "--port", &port])
                    .arg(data);
            }
        }
        let log = fs::File::create(self.folder.join("log"))?;
        let begun = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("starting {}", self.kind.name()))?;
        let (dialect, ack) = match self.kind {
            Kind::Hocuspocus => (Dialect::Hocuspocus, Ack::Status),
            Kind::YSweet => (Dialect::Plain, Ack::Version),
            _ => (Dialect::Plain, Ack::Echo),
        };
        let mut running = Running {
            kind: self.kind,
            name: self.kind.name(),
            address,
            dialect,
            ack,
            child,
            begun,
            opened: Duration::ZERO,
        };
        running.wait()?;
        Ok(running)
    }
}

/// A server that runs; it ends when this is dropped.
pub(crate) struct Running {
    pub(crate) kind: Kind,
    pub(crate) name: &'static str,
    pub(crate) address: SocketAddr,
    pub(crate) dialect: Dialect,
    pub(crate) ack: Ack,
    child: Child,
    /// When it was started.
    pub(crate) begun: Instant,
    /// From its start to the first accepted connection.
    pub(crate) opened: Duration,
}

impl Running {
    fn wait(&mut self) -> Result<()> {
        while self.begun.elapsed() < Duration::from_secs(20) {
            if TcpStream::connect(self.address).is_ok() && (!self.kind.is_ours() || self.is_ready())
            {
                self.opened = self.begun.elapsed();
                return Ok(());
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended at once: {status}", self.name);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("{} does not listen on {}", self.name, self.address)
    }

    /// A node of a cluster listens before it owns anything.
    fn is_ready(&self) -> bool {
        self.kind != Kind::Postgres
            || 0 < self
                .request("GET", "/api/v1/documents", "")
                .map_or(0, |answer| answer.len())
    }

    /// The path of a document's socket.
    pub(crate) fn path(&self, document: &str) -> String {
        match self.kind {
            Kind::Sqlite | Kind::Postgres => format!("/ws/{document}"),
            Kind::YSweet => format!("/d/{document}/ws/{document}"),
            Kind::Raw | Kind::RawSqlite | Kind::RawPostgres | Kind::YWebsocket => {
                format!("/{document}")
            }
            Kind::Hocuspocus => "/".to_owned(),
        }
    }

    /// Makes a document where it must be made first.
    pub(crate) fn create(&self, document: &str) -> Result<()> {
        if self.kind == Kind::YSweet {
            let answer =
                self.request("POST", "/doc/new", &format!(r#"{{"docId":"{document}"}}"#))?;
            ensure!(
                answer.starts_with("HTTP/1.1 200"),
                "y-sweet made no document: {answer}"
            );
        }
        Ok(())
    }

    fn request(&self, method: &str, path: &str, body: &str) -> Result<String> {
        use std::io::{Read, Write};
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// CPU time it has used.
    pub(crate) fn cpu(&self) -> Duration {
        cpu_of(self.child.id())
    }

    /// Resident memory in KiB: now, and the most so far.
    pub(crate) fn resident_kib(&self) -> (f64, f64) {
        (self.status_kib("VmRSS:"), self.status_kib("VmHWM:"))
    }

    /// Resident memory in KiB without the program and other files.
    pub(crate) fn anonymous_kib(&self) -> f64 {
        self.status_kib("RssAnon:")
    }

    fn status_kib(&self, name: &str) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let status = status.unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.unwrap_or_default().trim().trim_end_matches(" kB");
        kib.parse().unwrap_or(f64::NAN)
    }

    /// Ends it as an operator would, so that it may write what it has.
    pub(crate) fn stop(mut self) -> Result<()> {
        let signal = if self.kind == Kind::YSweet {
            "INT"
        } else {
            "TERM"
        };
        Command::new("kill")
            .args(["-s", signal, &self.child.id().to_string()])
            .status()?;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(15) {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("{} does not stop", self.name)
    }

    /// Ends it as a crash would.
    pub(crate) fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// CPU time of a process with all its threads, in the system's ticks of 10 ms.
pub(crate) fn cpu_of(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name in parentheses may hold spaces.
    let fields = stat.rsplit(") ").next().unwrap_or_default();
    let ticks: u64 = fields
        .split(' ')
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Duration::from_millis(10 * ticks)
}

/// CPU time of the threads that a process has now, as exactly as the system counts it.
pub(crate) fn busy_time_of(pid: u32) -> Duration {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    let tasks = tasks.into_iter().flatten().flatten();
    let nanoseconds = tasks.filter_map(|task| {
        let schedule = fs::read_to_string(task.path().join("schedstat")).ok()?;
        schedule.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(nanoseconds.sum())
}

/// Time for which the generator's core, which a database shares, had nothing to do, since the machine was started.
pub(crate) fn generator_core_idle() -> Duration {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let name = format!("cpu{GENERATOR_CORE} ");
    let line = stat.lines().find_map(|line| line.strip_prefix(&name));
    let mut fields = line.unwrap_or_default().split(' ').skip(3);
    let ticks: u64 = fields
        .next()
        .and_then(|ticks| ticks.parse().ok())
        .unwrap_or(0);
    Duration::from_millis(10 * ticks)
}

/// Removed with the next run's first use of it.
fn work() -> PathBuf {
    std::env::temp_dir().join("collab-bench")
}

fn node() -> PathBuf {
    std::env::var_os("COLLAB_NODE").map_or_else(
        || PathBuf::from("target/release/collab-node"),
        PathBuf::from,
    )
}

fn cache() -> PathBuf {
    let home = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
    home.unwrap_or_else(std::env::temp_dir)
        .join("collabcluster/rivals")
}

/// The folder of the npm rivals, installed by name.
fn rivals() -> Result<&'static Path> {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    if let Some(folder) = FOLDER.get() {
        return Ok(folder);
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/rivals");
    let folder = cache().join("npm");
    fs::create_dir_all(&folder)?;
    for file in [
        "package.json",
        "package-lock.json",
        "hocuspocus.mjs",
        "y-websocket.mjs",
    ] {
        fs::copy(source.join(file), folder.join(file))?;
    }
    if !folder.join("node_modules/.package-lock.json").exists() {
        let status = Command::new("npm")
            .args(["ci", "--silent"])
            .current_dir(&folder)
            .status()?;
        ensure!(status.success(), "npm could not install the rivals");
    }
    Ok(FOLDER.get_or_init(|| folder))
}

/// The y-sweet of crates.io, built by cargo.
fn y_sweet() -> Result<PathBuf> {
    let root = cache().join("y-sweet-0.9.1");
    let program = root.join("bin/y-sweet");
    if !program.exists() {
        let status = Command::new("cargo")
            .args([
                "install",
                "--quiet",
                "--locked",
                "--version",
                "0.9.1",
                "y-sweet",
                "--root",
            ])
            .arg(&root)
            .env_remove("CARGO_TARGET_DIR")
            .status()?;
        ensure!(status.success(), "cargo could not install y-sweet");
    }
    Ok(program)
}

/// A database of its own, on a server that shares the generator's core.
fn database() -> String {
    static SERVER: OnceLock<std::sync::Arc<Postgres>> = OnceLock::new();
    let server = SERVER.get_or_init(|| runtime().block_on(Postgres::shared()));
    runtime().block_on(server.database())
}

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| Runtime::new().expect("threads can be made"))
}
