//! A real, throw-away Redis on a free loopback port.

use std::net::TcpStream;
use std::path::Path;
use std::process::Child;
use std::time::Duration;

use anyhow::{Context, bail};

use crate::process::{Folder, command, free_port, signal, spawn, until};

/// How long the server may take to answer or to end.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running server without content and without persistence: what Redis holds may be lost.
#[derive(Debug)]
pub struct Redis {
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
        let mut redis = Self {
            folder: Folder::new("redis", "redis"),
            port: 0,
            server: None,
        };
        redis.run().await.expect("redis starts");
        redis
    }

    /// URL of the server.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
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
            let mut server = command(&self.folder, Path::new("redis-server"));
            server.args([
                "--bind",
                "127.0.0.1",
                "--save",
                "",
                "--appendonly",
                "no",
                "--port",
            ]);
            let mut server = spawn({
                server.arg(self.port.to_string());
                server
            });
            while server.try_wait()?.is_none() {
                if TcpStream::connect(("127.0.0.1", self.port)).is_ok() {
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
