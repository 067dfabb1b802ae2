//! A real, throw-away Redis on a free loopback port.

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::network::Host;
use crate::process::{Folder, command_on, free_port, signal, spawn, until};

/// How long the server may take to answer or to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// Where and how a server runs.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Where.
    pub host: Host,
    /// More arguments.
    pub settings: Vec<String>,
    /// More variables.
    pub environment: Vec<(String, String)>,
}

/// A running server without content and, unless its setup says so, without persistence: what Redis holds may be lost.
#[derive(Debug)]
pub struct Redis {
    setup: Setup,
    folder: Folder,
    port: u16,
    server: Option<Child>,
}

impl Redis {
    /// Starts a server.
    ///
    /// # Panics
    /// When Redis is not installed or does not start.
    pub async fn start() -> Self {
        Self::start_with(Setup::default()).await
    }

    /// Starts a server where and how `setup` says.
    ///
    /// # Panics
    /// As [`Redis::start`].
    pub async fn start_with(setup: Setup) -> Self {
        let mut redis = Self {
            setup,
            folder: Folder::new("redis", "redis"),
            port: 0,
            server: None,
        };
        redis.run().await.expect("redis starts");
        redis
    }

    /// URL of the server.
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// Address of the server.
    pub fn address(&self) -> SocketAddr {
        SocketAddr::new(self.setup.host.address(), self.port)
    }

    /// Asks the server and answers what it says, as `redis-cli` prints it.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn ask(&self, words: &[&str]) -> anyhow::Result<String> {
        let address = self.address();
        let mut client = std::process::Command::new("redis-cli");
        client.args([
            "-h",
            &address.ip().to_string(),
            "-p",
            &self.port.to_string(),
        ]);
        crate::command::output(client.args(words)).map(|said| said.trim().to_owned())
    }

    /// Folder of what it stores.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Ends the server in order.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop(&mut self) -> anyhow::Result<()> {
        let server = self.server.as_mut().context("the server does not run")?;
        signal(server, "TERM")?;
        until(PATIENCE, "redis ends", || Ok(server.try_wait()?.is_some())).await?;
        self.server = None;
        Ok(())
    }

    /// Kills the server with -9.
    ///
    /// # Errors
    /// When it does not run.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut server = self.server.take().context("the server does not run")?;
        server.kill()?;
        server.wait()?;
        Ok(())
    }

    /// Starts the server again, empty, on the same port.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn restart(&mut self) -> anyhow::Result<()> {
        if self.server.is_some() {
            self.stop().await?;
        }
        self.run().await
    }

    async fn run(&mut self) -> anyhow::Result<()> {
        for _ in 0..10 {
            if self.port == 0 {
                self.port = free_port();
            }
            let mut server = command_on(&self.setup.host, &self.folder, Path::new("redis-server"));
            server.args([
                "--bind",
                &self.setup.host.address().to_string(),
                "--protected-mode",
                "no",
                "--save",
                "",
                "--appendonly",
                "no",
                "--port",
            ]);
            let mut server = spawn({
                server.arg(self.port.to_string()).args(&self.setup.settings);
                server.envs(self.setup.environment.iter().cloned());
                server
            });
            while server.try_wait()?.is_none() {
                if TcpStream::connect(self.address()).is_ok() {
                    self.server = Some(server);
                    return Ok(());
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("redis does not start on port {}", self.port)
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        if let Some(server) = &mut self.server {
            server.kill().ok();
            server.wait().ok();
        }
    }
}
