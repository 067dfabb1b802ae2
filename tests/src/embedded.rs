//! One embedded node as a child process: `SQLite` in a folder of its own, no cluster.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::nodes::node_binary;
use crate::process::{Folder, command, free_port, spawn};

/// How long a node may take to start.
const PATIENCE: Duration = Duration::from_secs(20);

/// A running node. Dropping it kills the process and removes its folder.
#[derive(Debug)]
pub struct Embedded {
    port: u16,
    folder: Folder,
    child: Child,
}

impl Embedded {
    /// Starts a node with these arguments besides address and folder, and waits until it serves.
    ///
    /// # Errors
    /// When it is not built or does not serve in time; its log is in the error.
    pub async fn start(arguments: &[&str]) -> Result<Self> {
        Self::start_by(&[], arguments, &[]).await
    }

    /// [`Embedded::start`] by way of another program, such as `prlimit`, and with an environment.
    ///
    /// # Errors
    /// As there.
    pub async fn start_by(
        before: &[&str],
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        // The client wants one even for plain HTTP; another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let (folder, port) = (Folder::new("embedded", "root"), free_port());
        let log = File::create(folder.path().join("node.log"))?;
        let binary = node_binary()?;
        let program = before.first().map_or(binary.as_path(), Path::new);
        let mut command: Command = command(&folder, program);
        if let Some(rest) = before.get(1..) {
            command.args(rest).arg(&binary);
        }
        command
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .args(arguments)
            .envs(environment.iter().copied())
            .stdout(log.try_clone()?)
            .stderr(log);
        let node = Self {
            port,
            folder,
            child: spawn(command),
        };
        let begun = Instant::now();
        while reqwest::get(node.url() + "/readyz").await.is_err() {
            ensure!(
                begun.elapsed() < PATIENCE,
                "the node does not serve\n{}",
                node.log()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(node)
    }

    /// `http://…` address.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// `127.0.0.1:…` address.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Where its documents are.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// What it said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("node.log")).unwrap_or_default()
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// When the system does not tell.
    pub fn is_alive(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Its resident memory, in bytes.
    ///
    /// # Errors
    /// When it does not run.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        Ok(kib.context("VmRSS is there")? * 1024)
    }

    /// The whole state of a document, as a V1 update.
    ///
    /// # Errors
    /// When there is no such document.
    pub async fn update(&self, document: &str) -> Result<Vec<u8>> {
        let url = format!("{}/api/v1/documents/{document}/update", self.url());
        let answer = reqwest::get(url).await?.error_for_status()?;
        Ok(answer.bytes().await?.to_vec())
    }

    /// One metric, of the series with these labels (as `name{label="value"}`).
    ///
    /// # Errors
    /// When the node does not answer or has no such series.
    pub async fn metric(&self, series: &str) -> Result<f64> {
        let text = reqwest::get(self.url() + "/metrics").await?.text().await?;
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        let line = line.ok_or_else(|| anyhow!("no series {series}"))?;
        Ok(line.parse()?)
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
