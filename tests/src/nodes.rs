//! Nodes of a cluster as child processes, by hand: they register in Postgres and need no Kubernetes.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use collab_core::control::{ClusterReport, DrainRequest, TermGranted};
use collab_core::ids::NodeId;

use crate::process::{Folder, command, free_port, signal, spawn};

/// Bearer token of the nodes' control API.
pub const CONTROL_TOKEN: &str = "token-of-the-tests";
/// How long a cluster may take to come to rest.
const PATIENCE: Duration = Duration::from_secs(30);

/// The binary under test: `COLLAB_NODE_BIN`, or the one beside the test's own.
///
/// # Errors
/// When it is not built.
pub fn node_binary() -> Result<PathBuf> {
    let binary = match std::env::var_os("COLLAB_NODE_BIN") {
        Some(path) => PathBuf::from(path),
        // …/target/debug/deps/process-…
        None => std::env::current_exe()?
            .ancestors()
            .nth(2)
            .context("the test lies in target")?
            .join("collab-node"),
    };
    ensure!(
        binary.is_file(),
        "{} is not built; run cargo build -p collab-node",
        binary.display()
    );
    Ok(binary)
}

/// Nodes that share a database.
#[derive(Debug)]
pub struct Nodes {
    database: String,
    redis: String,
    folder: Folder,
    /// The nodes, running or not, by number.
    pub nodes: Vec<Node>,
}

/// One node.
#[derive(Debug)]
pub struct Node {
    name: String,
    port: u16,
    internal_port: u16,
    child: Option<Child>,
}

impl Nodes {
    /// Starts `count` nodes on an empty database and waits until every slot has an owner and each node its share.
    ///
    /// # Errors
    /// When they do not come to rest in time; their logs are in the error.
    pub async fn start(count: usize, database: &str, redis: &str) -> Result<Self> {
        // The client wants one even for plain HTTP; another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let folder = Folder::new("nodes", "root");
        let mut nodes = Self {
            database: database.to_owned(),
            redis: redis.to_owned(),
            folder,
            nodes: Vec::new(),
        };
        for _ in 0..count {
            nodes.add()?;
        }
        nodes.balanced(count).await?;
        Ok(nodes)
    }

    /// Starts one more node and answers its number.
    ///
    /// # Errors
    /// When the binary is not built.
    pub fn add(&mut self) -> Result<usize> {
        let number = self.nodes.len();
        let node = Node {
            name: format!("n{number}"),
            port: free_port(),
            internal_port: free_port(),
            child: None,
        };
        self.nodes.push(node);
        self.run(number)?;
        Ok(number)
    }

    /// Starts a node that does not run, as a new process of the same pod.
    ///
    /// # Errors
    /// When the binary is not built.
    pub fn run(&mut self, number: usize) -> Result<()> {
        let node = &mut self.nodes[number];
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join(format!("{}.log", node.name)))?;
        let mut command: Command = command(&self.folder, &node_binary()?);
        command
            .args(["--listen", &format!("127.0.0.1:{}", node.port)])
            .args([
                "--internal-listen",
                &format!("127.0.0.1:{}", node.internal_port),
            ])
            .args(["--database-url", &self.database, "--redis", &self.redis])
            .args([
                "--node-name",
                &node.name,
                "--pod-uid",
                &format!("uid-of-{}", node.name),
            ])
            .env("COLLAB_CONTROL_TOKEN", CONTROL_TOKEN)
            .stdout(log.try_clone()?)
            .stderr(log);
        node.child = Some(spawn(command));
        Ok(())
    }

    /// `http://…` addresses for clients, of all nodes.
    pub fn urls(&self) -> Vec<String> {
        self.nodes.iter().map(Node::url).collect()
    }

    /// Ends a node without a word: SIGKILL.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self, number: usize) -> Result<()> {
        let node = &mut self.nodes[number];
        let mut child = node
            .child
            .take()
            .with_context(|| format!("{} does not run", node.name))?;
        child.kill()?;
        child.wait()?;
        Ok(())
    }

    /// Asks a node to stop (SIGTERM) and waits until it has; answers how long it took.
    ///
    /// # Errors
    /// When it does not end in time, or ends with an error.
    pub async fn stop(&mut self, number: usize) -> Result<Duration> {
        let begun = Instant::now();
        let node = &mut self.nodes[number];
        let mut child = node
            .child
            .take()
            .with_context(|| format!("{} does not run", node.name))?;
        signal(&child, "TERM")?;
        loop {
            if let Some(status) = child.try_wait()? {
                ensure!(
                    status.success(),
                    "{} ended with {status}\n{}",
                    self.nodes[number].name,
                    self.logs()
                );
                return Ok(begun.elapsed());
            }
            if PATIENCE < begun.elapsed() {
                child.kill()?;
                child.wait()?;
                return Err(anyhow!("the node did not stop\n{}", self.logs()));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until `count` live nodes own all slots, each at most a twentieth above its share.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub async fn balanced(&self, count: usize) -> Result<ClusterReport> {
        self.until("the slots are balanced", |report| {
            let live = report
                .members
                .iter()
                .filter(|member| member.live)
                .collect::<Vec<_>>();
            let share = usize::from(report.slots).div_ceil(count);
            live.len() == count
                && report.owners.len() == usize::from(report.slots)
                && report
                    .owners
                    .iter()
                    .all(|owner| owner.is_some_and(|owner| report.members[usize::from(owner)].live))
                && live
                    .iter()
                    .all(|member| usize::from(member.slots_owned) * 20 <= share * 21)
        })
        .await
    }

    /// Waits until the report of a running node shows what is wanted.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub async fn until(
        &self,
        what: &str,
        wanted: impl Fn(&ClusterReport) -> bool,
    ) -> Result<ClusterReport> {
        let begun = Instant::now();
        loop {
            let report = self.report().await;
            match report {
                Ok(report) if wanted(&report) => return Ok(report),
                report if PATIENCE < begun.elapsed() => {
                    let members = report.map(|report| report.members);
                    return Err(anyhow!(
                        "waited in vain until {what}: {members:?}\n{}",
                        self.logs()
                    ));
                }
                _ => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// The cluster as the first running node that answers sees it.
    ///
    /// # Errors
    /// When none answers.
    pub async fn report(&self) -> Result<ClusterReport> {
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(2))
            .build()?;
        for node in self.nodes.iter().filter(|node| node.child.is_some()) {
            let url = format!("http://127.0.0.1:{}/control/v1/report", node.internal_port);
            let answer = client.get(url).bearer_auth(CONTROL_TOKEN).send().await;
            if let Ok(answer) = answer.and_then(reqwest::Response::error_for_status) {
                return Ok(answer.json().await?);
            }
        }
        Err(anyhow!("no node answers"))
    }

    /// Starts or takes back the drain of a node, as the operator does, by a running node's control API.
    ///
    /// # Errors
    /// When no node takes the request.
    pub async fn drain(&self, number: usize, drain: bool) -> Result<()> {
        let running = self.nodes.iter().find(|node| node.child.is_some());
        let port = running.context("no node runs")?.internal_port;
        let client = reqwest::Client::new();
        let call = async |path: &str, body: serde_json::Value| {
            let url = format!("http://127.0.0.1:{port}/control/v1/{path}");
            let call = client.post(url).bearer_auth(CONTROL_TOKEN).json(&body);
            call.send().await?.error_for_status()
        };
        let granted = call("term", serde_json::json!({ "holder": "a test" })).await?;
        let TermGranted { term } = granted.json().await?;
        let request = DrainRequest {
            term,
            node: NodeId(self.nodes[number].name.clone()),
            drain,
        };
        call("drain", serde_json::to_value(request)?).await?;
        Ok(())
    }

    /// One metric of a node, summed over its labels.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn metric(&self, number: usize, name: &str) -> Result<f64> {
        let url = format!(
            "http://127.0.0.1:{}/metrics",
            self.nodes[number].internal_port
        );
        let text = reqwest::get(url).await?.text().await?;
        let values = text.lines().filter_map(|line| {
            let (series, value) = line.rsplit_once(' ')?;
            (series == name || series.starts_with(&format!("{name}{{")))
                .then(|| value.parse::<f64>().ok())?
        });
        Ok(values.sum())
    }

    /// The end of each node's log.
    pub fn logs(&self) -> String {
        let tail = |node: &Node| {
            let log =
                std::fs::read_to_string(self.folder.path().join(format!("{}.log", node.name)));
            let log = log.unwrap_or_default();
            let lines: Vec<&str> = log.lines().rev().take(30).collect();
            let lines: Vec<&str> = lines.into_iter().rev().collect();
            format!("--- {}\n{}\n", node.name, lines.join("\n"))
        };
        self.nodes.iter().map(tail).collect()
    }
}

impl Drop for Nodes {
    fn drop(&mut self) {
        for number in 0..self.nodes.len() {
            let _ = self.kill(number);
        }
    }
}

impl Node {
    /// Its name in the cluster.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `http://…` address for clients.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}
