//! A script that takes commands: JSON lines on its stdin, each answered by its id, in whatever order.

use super::Script;
use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::AsyncWriteExt;
use tokio::process::ChildStdin;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// Commands without an answer.
#[derive(Debug, Default)]
struct Waiting {
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    /// Why there will be no more answers.
    end: Option<String>,
}

/// A running script. Dropping it kills the process.
#[derive(Debug)]
pub(super) struct Commands {
    name: &'static str,
    stdin: tokio::sync::Mutex<ChildStdin>,
    last: AtomicU64,
    waiting: Arc<Mutex<Waiting>>,
    reader: JoinHandle<()>,
}

#[derive(Debug, Deserialize)]
struct Answer {
    id: u64,
    #[serde(default)]
    value: Value,
    error: Option<String>,
}

impl Commands {
    /// Starts `tests/clients/{name}.mjs` and waits for its answer 0: it is ready.
    ///
    /// # Errors
    /// As [`Script::start`], or when it does not get ready.
    pub(super) async fn start(name: &'static str, options: &impl Serialize) -> Result<Self> {
        let mut script = Script::start(name, options)?;
        let stdin = script.stdin.take().context("the script takes commands")?;
        script
            .next::<Answer>()
            .await?
            .with_context(|| format!("{name} did not start"))?;
        let waiting = Arc::new(Mutex::new(Waiting::default()));
        let shared = Arc::clone(&waiting);
        let reader = tokio::spawn(async move {
            let end = loop {
                match script.next::<Answer>().await {
                    Ok(Some(answer)) => {
                        let mut waiting = shared.lock().expect("no holder panics");
                        let asked = waiting.answers.remove(&answer.id);
                        asked.map(|asked| asked.send(answer));
                    }
                    Ok(None) => break "it has ended".to_owned(),
                    Err(error) => break format!("{error:#}"),
                }
            };
            let mut waiting = shared.lock().expect("no holder panics");
            waiting.answers.clear();
            waiting.end = Some(end);
        });
        Ok(Self {
            name,
            stdin: tokio::sync::Mutex::new(stdin),
            last: AtomicU64::new(0),
            waiting,
            reader,
        })
    }

    /// Gives a command and waits for its answer.
    ///
    /// # Errors
    /// What the script answers, or that it has ended.
    pub(super) async fn ask(&self, mut command: Value) -> Result<Value> {
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        command["id"] = id.into();
        let (sender, receiver) = oneshot::channel();
        {
            let mut waiting = self.waiting.lock().expect("no holder panics");
            if let Some(end) = &waiting.end {
                bail!("{}: {end}", self.name);
            }
            waiting.answers.insert(id, sender);
        }
        let line = format!("{command}\n");
        // When the script is gone, the reader says why.
        self.stdin
            .lock()
            .await
            .write_all(line.as_bytes())
            .await
            .ok();
        let Ok(answer) = receiver.await else {
            let waiting = self.waiting.lock().expect("no holder panics");
            bail!(
                "{}: {}",
                self.name,
                waiting.end.as_deref().unwrap_or("no answer")
            );
        };
        match answer.error {
            None => Ok(answer.value),
            Some(error) => Err(anyhow!(error)),
        }
    }
}

impl Drop for Commands {
    fn drop(&mut self) {
        self.reader.abort();
    }
}
