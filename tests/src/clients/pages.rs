//! Pages of the examples in Debian's Chromium, each with its own storage.

use super::commands::Commands;
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::sync::Arc;

/// A running browser. Dropping it kills the process.
#[derive(Debug)]
pub struct Pages {
    commands: Arc<Commands>,
}

/// One page.
#[derive(Debug)]
pub struct Page {
    name: String,
    commands: Arc<Commands>,
}

impl Pages {
    /// Starts a headless browser.
    ///
    /// # Errors
    /// When Node, the scripts' packages or Chromium are not installed.
    pub async fn start() -> Result<Self> {
        Ok(Self {
            commands: Arc::new(Commands::start("pages", &json!({})).await?),
        })
    }

    /// Opens a page.
    ///
    /// # Errors
    /// When the address does not answer.
    pub async fn open(&self, name: &str, url: &str) -> Result<Page> {
        let page = Page {
            name: name.to_owned(),
            commands: Arc::clone(&self.commands),
        };
        page.ask("open", json!({ "url": url })).await?;
        Ok(page)
    }
}

impl Page {
    /// Types at the end of what a CSS selector finds.
    ///
    /// # Errors
    /// When nothing is found.
    pub async fn types(&self, into: &str, text: &str) -> Result<()> {
        self.ask("types", json!({ "into": into, "text": text }))
            .await
            .map(drop)
    }

    /// Presses a key, named as in `KeyboardEvent.key`.
    ///
    /// # Errors
    /// When there is no such key.
    pub async fn presses(&self, key: &str) -> Result<()> {
        self.ask("presses", json!({ "key": key })).await.map(drop)
    }

    /// Waits until what a CSS selector finds holds a text.
    ///
    /// # Errors
    /// When it does not.
    pub async fn shows(&self, element: &str, text: &str) -> Result<()> {
        self.ask("shows", json!({ "element": element, "text": text }))
            .await
            .map(drop)
    }

    /// Waits until its sign is as wanted: `offline`, `unsaved` or `saved`.
    ///
    /// # Errors
    /// When it is not.
    pub async fn signs(&self, state: &str) -> Result<()> {
        self.ask("signs", json!({ "state": state })).await.map(drop)
    }

    /// Loads it again.
    ///
    /// # Errors
    /// When the address does not answer.
    pub async fn reloads(&self) -> Result<()> {
        self.ask("reload", json!({})).await.map(drop)
    }

    /// Errors of the page.
    ///
    /// # Errors
    /// When the page is gone.
    pub async fn problems(&self) -> Result<Vec<String>> {
        Ok(serde_json::from_value(
            self.ask("problems", json!({})).await?,
        )?)
    }

    async fn ask(&self, command: &str, mut details: Value) -> Result<Value> {
        details["do"] = command.into();
        details["name"] = self.name.as_str().into();
        let answer = self.commands.ask(details).await;
        answer.with_context(|| format!("{command} in the page of {}", self.name))
    }
}
