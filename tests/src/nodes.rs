//! Nodes of a cluster as child processes, by hand: they register in Postgres and need no Kubernetes.

use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use collab_core::control::{ClusterReport, DrainRequest, TermGranted};
use collab_core::ids::NodeId;
use reqwest::Method;
use serde_json::{Value, json};

use crate::network::Host;
use crate::process::{Folder, command_on, free_port, signal, spawn};

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

/// Where and how a node runs.
#[derive(Debug, Clone)]
pub struct Launch {
    /// Where.
    pub host: Host,
    /// URL of its database.
    pub database: String,
    /// URL of its Redis, or `none`.
    pub redis: String,
    /// More variables.
    pub environment: Vec<(String, String)>,
}

impl Launch {
    /// On this machine.
    pub fn local(database: &str, redis: &str) -> Self {
        Self {
            host: Host::local(),
            database: database.to_owned(),
            redis: redis.to_owned(),
            environment: Vec::new(),
        }
    }
}

/// Nodes that share a database.
#[derive(Debug)]
pub struct Nodes {
    launch: Launch,
    folder: Folder,
    /// The nodes, running or not, by number.
    pub nodes: Vec<Node>,
}

/// One node.
#[derive(Debug)]
pub struct Node {
    /// How it runs from its next start on.
    pub launch: Launch,
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
        let mut nodes = Self::new(Launch::local(database, redis));
        for _ in 0..count {
            nodes.add()?;
        }
        nodes.balanced(count).await?;
        Ok(nodes)
    }

    /// No nodes yet; [`Nodes::add`] starts them in this way.
    pub fn new(launch: Launch) -> Self {
        // The client wants one even for plain HTTP; another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Self {
            launch,
            folder: Folder::new("nodes", "root"),
            nodes: Vec::new(),
        }
    }

    /// Starts one more node and answers its number.
    ///
    /// # Errors
    /// When the binary is not built.
    pub fn add(&mut self) -> Result<usize> {
        self.add_with(self.launch.clone())
    }

    /// Starts one more node in a way of its own and answers its number.
    ///
    /// # Errors
    /// When the binary is not built.
    pub fn add_with(&mut self, launch: Launch) -> Result<usize> {
        let number = self.nodes.len();
        let node = Node {
            launch,
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
        let launch = &node.launch;
        let address = launch.host.address();
        let mut command: Command = command_on(&launch.host, &self.folder, &node_binary()?);
        command
            .args(["--listen", &format!("{address}:{}", node.port)])
            .args([
                "--internal-listen",
                &format!("{address}:{}", node.internal_port),
            ])
            .args(["--database-url", &launch.database, "--redis", &launch.redis])
            .args([
                "--node-name",
                &node.name,
                "--pod-uid",
                &format!("uid-of-{}", node.name),
            ])
            .env("COLLAB_CONTROL_TOKEN", CONTROL_TOKEN)
            .env("NO_COLOR", "1")
            .envs(launch.environment.iter().cloned())
            .stdout(log.try_clone()?)
            .stderr(log);
        if !address.is_loopback() {
            command.arg("--insecure-no-auth");
        }
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

    /// Sends a signal by name, such as `STOP`, to a node.
    ///
    /// # Errors
    /// When it does not run.
    pub fn signal(&self, number: usize, name: &str) -> Result<()> {
        let child = self.nodes[number].child.as_ref();
        signal(child.context("the node does not run")?, name)
    }

    /// Whether the process of a node lives, stopped or not.
    pub fn runs(&mut self, number: usize) -> bool {
        let child = self.nodes[number].child.as_mut();
        child.is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// All that a node has logged in all its lives.
    pub fn log(&self, number: usize) -> String {
        let name = format!("{}.log", self.nodes[number].name);
        std::fs::read_to_string(self.folder.path().join(name)).unwrap_or_default()
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
            let url = format!("{}/control/v1/report", node.internal_url());
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
        let holder = json!({ "holder": "a test" });
        let granted = self.control(Method::POST, "term", &holder).await?;
        let TermGranted { term } = serde_json::from_value(granted)?;
        let request = DrainRequest {
            term,
            node: NodeId(self.nodes[number].name.clone()),
            drain,
        };
        let request = serde_json::to_value(request)?;
        self.control(Method::POST, "drain", &request).await?;
        Ok(())
    }

    /// Calls the control API of the first running node; answers its JSON, or `null`.
    ///
    /// # Errors
    /// When it does not answer, or refuses.
    pub async fn control(&self, method: Method, what: &str, body: &Value) -> Result<Value> {
        let node = self.nodes.iter().find(|node| node.child.is_some());
        let node = node.context("no node runs")?;
        node.control(method, what, body).await
    }

    /// Reads from the control API of every running node.
    ///
    /// # Errors
    /// When one does not answer, or refuses.
    pub async fn control_all(&self, what: &str) -> Result<Vec<Value>> {
        let mut answers = Vec::new();
        for node in self.nodes.iter().filter(|node| node.child.is_some()) {
            answers.push(node.control(Method::GET, what, &Value::Null).await?);
        }
        Ok(answers)
    }

    /// One metric of a node, summed over its labels.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn metric(&self, number: usize, name: &str) -> Result<f64> {
        let url = format!("{}/metrics", self.nodes[number].internal_url());
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
        let tail = |number: usize| {
            let log = self.log(number);
            let lines: Vec<&str> = log.lines().rev().take(30).collect();
            let lines: Vec<&str> = lines.into_iter().rev().collect();
            format!("--- {}\n{}\n", self.nodes[number].name, lines.join("\n"))
        };
        (0..self.nodes.len()).map(tail).collect()
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
        format!("http://{}:{}", self.launch.host.address(), self.port)
    }

    async fn control(&self, method: Method, what: &str, body: &Value) -> Result<Value> {
        let url = format!("{}/control/v1/{what}", self.internal_url());
        let call = reqwest::Client::new().request(method, url);
        let answer = call.bearer_auth(CONTROL_TOKEN).json(body).send().await?;
        let status = answer.status();
        let text = answer.text().await?;
        ensure!(status.is_success(), "{what}: {status} {text}");
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    /// `http://…` address of its internal listener.
    pub fn internal_url(&self) -> String {
        format!(
            "http://{}:{}",
            self.launch.host.address(),
            self.internal_port
        )
    }

    /// Address for clients.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.launch.host.address(), self.port)
    }

    /// Id of its process, if it was started and not ended.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }
}
