//! Stock Yjs clients and a browser: the Node scripts of `tests/clients`, as child processes.
//!
//! A script gets its options as JSON, prints JSON lines, and ends when it is told to or when this
//! process is gone. The judges of what the scripts saw are here, in Rust, away from the clients.

pub mod browser;
mod commands;
pub mod families;
pub mod pages;
pub mod typist;

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::task::JoinHandle;

use crate::checker::Replica;
use crate::network::Host;

/// Lines of a script's standard error that are kept for complaints.
const COMPLAINT_LINES: usize = 20;

/// A script that has closed its output ends by itself.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// Milliseconds since 1970, comparable with the times that the scripts print.
///
/// # Panics
/// When the clock stands before 1970.
pub fn now_ms() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.expect("the clock stands after 1970").as_secs_f64() * 1000.0
}

/// A running script. Dropping it kills the process.
#[derive(Debug)]
pub struct Script {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Lines<BufReader<ChildStdout>>,
    complaints: JoinHandle<VecDeque<String>>,
}

impl Script {
    /// Starts `tests/clients/{name}.mjs`.
    ///
    /// # Errors
    /// When Node or the packages of `tests/clients` are not installed.
    ///
    /// # Panics
    /// Never: the three streams are asked for.
    pub fn start(name: &str, options: &impl Serialize) -> Result<Self> {
        Self::start_on(&Host::local(), name, options)
    }

    /// Like [`Script::start`], on a host.
    ///
    /// # Errors
    /// As there.
    ///
    /// # Panics
    /// As there.
    pub fn start_on(host: &Host, name: &str, options: &impl Serialize) -> Result<Self> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
        ensure!(
            folder.join("node_modules").is_dir(),
            "run `npm ci` in {}",
            folder.display()
        );
        let mut child = Command::from(host.command())
            .arg("node")
            .arg(folder.join(format!("{name}.mjs")))
            .arg(serde_json::to_string(options)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start node")?;
        let stderr = child.stderr.take().expect("asked for");
        let complaints = tokio::spawn(async move {
            let mut kept = VecDeque::new();
            let mut lines = BufReader::new(stderr).lines();
            while let Ok(Some(line)) = lines.next_line().await {
                kept.push_back(line);
                if COMPLAINT_LINES < kept.len() {
                    kept.pop_front();
                }
            }
            kept
        });
        Ok(Self {
            name: name.to_owned(),
            stdin: child.stdin.take(),
            lines: BufReader::new(child.stdout.take().expect("asked for")).lines(),
            child,
            complaints,
        })
    }

    /// Next event, `None` after the script ended well.
    ///
    /// # Errors
    /// When the script failed, with what it complained about, or printed something else, or does not end after its last word.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>> {
        if let Some(line) = self.lines.next_line().await? {
            let event = serde_json::from_str(&line);
            return event
                .map(Some)
                .with_context(|| format!("{} printed {line}", self.name));
        }
        let status = tokio::time::timeout(END_PATIENCE, self.child.wait())
            .await
            .with_context(|| format!("{} has closed its output and does not end", self.name))??;
        if status.success() {
            return Ok(None);
        }
        let complaints = (&mut self.complaints).await.unwrap_or_default();
        bail!(
            "{} ended with {status}: {}",
            self.name,
            Vec::from(complaints).join("\n")
        );
    }

    /// Sends the script a line of JSON.
    ///
    /// # Errors
    /// When it does not read any more.
    pub async fn tell(&mut self, message: &impl Serialize) -> Result<()> {
        let stdin = self.stdin.as_mut().context("its input is open")?;
        let line = serde_json::to_string(message)? + "\n";
        Ok(stdin.write_all(line.as_bytes()).await?)
    }

    /// Lets the script run beside the test, folding its events into `state`.
    pub fn follow<S, T>(
        mut self,
        state: S,
        fold: impl Fn(&mut S, T) + Send + 'static,
    ) -> Follower<S>
    where
        S: Send + 'static,
        T: DeserializeOwned + Send,
    {
        let state = Arc::new(Mutex::new(state));
        let (stdin, shared) = (self.stdin.take(), Arc::clone(&state));
        let end = tokio::spawn(async move {
            while let Some(event) = self.next().await? {
                fold(&mut shared.lock().expect("no fold has panicked"), event);
            }
            Ok(())
        });
        Follower { stdin, state, end }
    }

    /// All events until the end.
    ///
    /// # Errors
    /// As [`Script::next`].
    pub async fn all<T: DeserializeOwned>(mut self) -> Result<Vec<T>> {
        let mut events = Vec::new();
        while let Some(event) = self.next().await? {
            events.push(event);
        }
        Ok(events)
    }
}

/// A script that runs on its own, and what is known from its events so far.
#[derive(Debug)]
pub struct Follower<S> {
    stdin: Option<ChildStdin>,
    state: Arc<Mutex<S>>,
    end: JoinHandle<Result<()>>,
}

impl<S> Follower<S> {
    /// Looks at what is known so far.
    ///
    /// # Panics
    /// When an earlier look has panicked.
    pub fn with<T>(&self, look: impl FnOnce(&S) -> T) -> T {
        look(&self.state.lock().expect("no look has panicked"))
    }

    /// Waits until `condition` holds for what is known.
    ///
    /// # Errors
    /// When it does not within `patience`, or the script has ended.
    pub async fn until(&self, patience: Duration, condition: impl Fn(&S) -> bool) -> Result<()> {
        let waited = tokio::time::timeout(patience, async {
            while !self.with(&condition) {
                ensure!(!self.end.is_finished(), "the script has ended");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            Ok(())
        });
        waited
            .await
            .with_context(|| format!("not seen within {patience:?}"))?
    }

    /// Tells the script to stop and waits for its last word.
    ///
    /// # Errors
    /// When it failed.
    ///
    /// # Panics
    /// As [`Follower::with`].
    pub async fn stop(mut self) -> Result<S>
    where
        S: Default,
    {
        // It may have ended already; what it says about that matters more than the broken pipe.
        if let Some(stdin) = &mut self.stdin {
            stdin.write_all(b"stop\n").await.ok();
        }
        (&mut self.end).await??;
        Ok(std::mem::take(
            &mut *self.state.lock().expect("no look has panicked"),
        ))
    }
}

impl<S> Drop for Follower<S> {
    fn drop(&mut self) {
        // The task owns the process, which is killed with it.
        self.end.abort();
    }
}

/// Which documents to read, and where.
#[derive(Debug, Clone, Serialize)]
pub struct Reading<'a> {
    /// `http://…` addresses; the documents go to them in turn.
    pub nodes: &'a [String],
    /// Names of documents.
    pub documents: &'a [String],
    /// Token of the clients, if the nodes want one.
    pub token: Option<&'a str>,
}

/// A document as a fresh client sees it.
#[derive(Debug, Clone, Deserialize)]
pub struct Fresh {
    /// Its name.
    pub document: String,
    /// Its text.
    pub text: String,
    /// All that it holds.
    pub replica: Replica,
}

/// By document, what a fresh client of each sees after its first sync.
///
/// # Errors
/// When a client does not sync within 20 s.
pub async fn read(reading: &Reading<'_>) -> Result<BTreeMap<String, Fresh>> {
    let read = Script::start("read", reading)?.all::<Fresh>().await?;
    let by_document = read.into_iter().map(|mut fresh| {
        fresh.replica.document.clone_from(&fresh.document);
        "a fresh client".clone_into(&mut fresh.replica.witness);
        (fresh.document.clone(), fresh)
    });
    Ok(by_document.collect())
}

/// A document that was read without a socket.
#[derive(Debug, Clone, Deserialize)]
pub struct Reloaded {
    /// Its name.
    pub document: String,
    /// Text of the Yjs update that REST answers, loaded by Yjs.
    pub text: String,
    /// Text that REST answers.
    pub exported: String,
    /// All that Yjs holds after loading the update.
    pub replica: Replica,
}

/// Documents as REST answers them, in the order asked for.
///
/// # Errors
/// When a request fails.
pub async fn reload(reading: &Reading<'_>) -> Result<Vec<Reloaded>> {
    let mut reloaded: Vec<Reloaded> = Script::start("reload", reading)?.all().await?;
    for one in &mut reloaded {
        one.replica.document.clone_from(&one.document);
        "the owner's state in Yjs".clone_into(&mut one.replica.witness);
    }
    Ok(reloaded)
}

/// A replay of a trace in many documents at once.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Replay {
    /// `http://…` addresses; each agent of each document goes to one of them.
    pub nodes: Vec<String>,
    /// Names of documents, which must be empty.
    pub documents: Vec<String>,
    /// JSON in the format of josephg/editing-traces, gzipped if it ends in `.gz`.
    pub trace: PathBuf,
    /// Token of the clients, if the nodes want one.
    pub token: Option<String>,
    /// Most patches that go into one update.
    pub step_patches: usize,
    /// Most updates of an agent that wait for their receipts.
    pub in_flight: usize,
    /// Replays only so many transactions from the beginning; 0 means all.
    pub transactions: usize,
    /// Gives up after this time.
    pub timeout_ms: u64,
}

impl Replay {
    /// The recorded session of two writers that lies among the fixtures.
    pub fn recorded(nodes: Vec<String>, documents: Vec<String>) -> Self {
        Self {
            nodes,
            documents,
            trace: Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/two-writers.json"),
            token: None,
            step_patches: 100,
            in_flight: 8,
            transactions: 0,
            timeout_ms: 300_000,
        }
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When a client does not sync, or the replay does not get on, in time.
    pub async fn run(&self) -> Result<Vec<Replayed>> {
        let replayed = Script::start("replay", self)?.all::<Replayed>().await?;
        ensure!(
            replayed.len() == self.documents.len(),
            "{} documents ended",
            replayed.len()
        );
        Ok(replayed)
    }
}

/// How a replay ended in one document.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Replayed {
    /// Its name.
    pub document: String,
    /// Updates that the agents sent.
    pub updates: u64,
    /// From the first connection to the last comparison.
    pub duration_ms: f64,
    /// Length of the text in UTF-16 units.
    pub length: usize,
    /// SHA-256 of the text of each agent and of a fresh client.
    pub hashes: Vec<String>,
    /// Whether they are all equal, byte by byte, also to the agents' own replicas.
    pub agree: bool,
    /// Whether the text equals the trace's end; `None` when only a part was replayed.
    pub equals_trace: Option<bool>,
}

/// Starts `count` clients that only hold their connection, spread over nodes and documents. The
/// state of the follower is how many are in sync.
///
/// # Errors
/// As [`Script::start`].
pub fn idle(reading: &Reading<'_>, count: usize) -> Result<Follower<usize>> {
    idle_on(&Host::local(), reading, count)
}

/// Like [`idle`], on a host.
///
/// # Errors
/// As there.
pub fn idle_on(host: &Host, reading: &Reading<'_>, count: usize) -> Result<Follower<usize>> {
    #[derive(Serialize)]
    struct Options<'a> {
        #[serde(flatten)]
        reading: &'a Reading<'a>,
        count: usize,
    }
    #[derive(Deserialize)]
    struct Connected {
        count: usize,
    }
    let script = Script::start_on(host, "idle", &Options { reading, count })?;
    Ok(script.follow(0, |connected, Connected { count }| *connected = count))
}
