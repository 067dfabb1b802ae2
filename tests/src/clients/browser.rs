//! Windows of Debian's Chromium, each with its own storage, as if it were another person's.

use super::commands::Commands;
use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;

/// A running browser. Dropping it kills the process.
#[derive(Debug)]
pub struct Browser {
    commands: Arc<Commands>,
}

impl Browser {
    /// Starts a headless browser.
    ///
    /// # Errors
    /// When Node, the scripts' packages or Chromium are not installed.
    pub async fn start() -> Result<Self> {
        let commands = Commands::start("browser", &json!({})).await?;
        Ok(Self {
            commands: Arc::new(commands),
        })
    }

    /// Opens a window at an address.
    ///
    /// # Errors
    /// When the address does not answer.
    pub async fn open(&self, window: Opening<'_>) -> Result<Window> {
        let Opening {
            name,
            url,
            size: (width, height),
            theme,
        } = window;
        let dark = theme == Theme::Dark;
        let opened = Window {
            name: name.to_owned(),
            commands: Arc::clone(&self.commands),
        };
        opened
            .ask(
                "open",
                json!({ "url": url, "name": name, "width": width, "height": height, "dark": dark }),
            )
            .await?;
        Ok(opened)
    }
}

/// What a window starts with.
#[derive(Debug, Clone, Copy)]
pub struct Opening<'a> {
    /// Name of the window and of its user.
    pub name: &'a str,
    /// First address.
    pub url: &'a str,
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// What the user prefers.
    pub theme: Theme,
}

/// Light or dark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Theme {
    /// Dark on light.
    Light,
    /// Light on dark.
    Dark,
}

/// Where to write. Two who write at one place at once may split each other's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Before the text.
    Start,
    /// After it.
    End,
}

/// One window of the browser.
#[derive(Debug)]
pub struct Window {
    name: String,
    commands: Arc<Commands>,
}

/// What a window shows.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Look {
    /// Path, query and fragment.
    pub url: String,
    /// Text in the editor, a line per paragraph.
    pub text: String,
    /// `saved`, `unsaved` or `offline`.
    pub light: String,
    /// Number of unsaved edits that the light tells.
    pub unsaved: u64,
    /// What the light has shown since the page was loaded.
    pub states: Vec<String>,
    /// Text (without line breaks) at the moment when the light last turned to saved.
    pub saved_text: String,
    /// Names in the list of people.
    pub people: Vec<String>,
    /// The others' cursors.
    pub cursors: Vec<Cursor>,
    /// ARIA label of what has the focus.
    pub focus: String,
    /// Names in the list of documents.
    pub documents: Vec<String>,
    /// Errors of the page, breaches of its policy among them.
    pub problems: Vec<String>,
}

/// A cursor of somebody else.
#[derive(Debug, Clone, Deserialize)]
pub struct Cursor {
    /// Name on its flag.
    pub name: String,
    /// CSS colour of its caret.
    pub color: String,
    /// Height of its caret in pixels.
    pub height: f64,
}

impl Window {
    /// Types faster than anybody, and returns after the last key.
    ///
    /// # Errors
    /// When there is no text that could be edited.
    pub async fn write(&self, place: Place, text: &str) -> Result<()> {
        let details = json!({ "text": text, "place": format!("{place:?}") });
        self.ask("type", details).await.map(drop)
    }

    /// Presses a key, named as in `KeyboardEvent.key`, or a combination such as `Control+A`.
    ///
    /// # Errors
    /// When there is no such key.
    pub async fn press(&self, key: &str) -> Result<()> {
        self.ask("press", json!({ "key": key })).await.map(drop)
    }

    /// Clicks what has this ARIA role and name.
    ///
    /// # Errors
    /// When it does not appear.
    pub async fn click(&self, role: &str, name: &str) -> Result<()> {
        self.ask("click", json!({ "role": role, "name": name }))
            .await
            .map(drop)
    }

    /// Fills the field with this label and leaves it.
    ///
    /// # Errors
    /// When it does not appear.
    pub async fn fill(&self, label: &str, value: &str) -> Result<()> {
        self.ask("fill", json!({ "label": label, "value": value }))
            .await
            .map(drop)
    }

    /// Waits until the light shows `saved`, `unsaved` or `offline`.
    ///
    /// # Errors
    /// When it does not.
    pub async fn light(&self, state: &str) -> Result<()> {
        self.ask("light", json!({ "state": state })).await.map(drop)
    }

    /// Waits until the editor's text holds `text`.
    ///
    /// # Errors
    /// When it does not.
    pub async fn contains(&self, text: &str) -> Result<()> {
        self.ask("contains", json!({ "text": text }))
            .await
            .map(drop)
    }

    /// Waits for something with this ARIA role whose name holds `name`.
    ///
    /// # Errors
    /// When it does not appear.
    pub async fn sees(&self, role: &str, name: &str) -> Result<()> {
        self.ask("sees", json!({ "role": role, "name": name }))
            .await
            .map(drop)
    }

    /// What the window shows now.
    ///
    /// # Errors
    /// When the page is not the editor.
    pub async fn look(&self) -> Result<Look> {
        Ok(serde_json::from_value(self.ask("look", json!({})).await?)?)
    }

    /// Breaches of WCAG 2.1 A and AA that axe finds in what the window shows.
    ///
    /// # Errors
    /// When axe fails.
    pub async fn audit(&self) -> Result<Vec<String>> {
        Ok(serde_json::from_value(self.ask("audit", json!({})).await?)?)
    }

    /// Whether the page would ask before it is closed.
    ///
    /// # Errors
    /// When the window is gone.
    pub async fn asks_before_closing(&self) -> Result<bool> {
        Ok(serde_json::from_value(
            self.ask("asksBeforeClosing", json!({})).await?,
        )?)
    }

    /// Clicks a button that downloads, and returns name and text of the file.
    ///
    /// # Errors
    /// When nothing is downloaded.
    pub async fn download(&self, button: &str) -> Result<(String, String)> {
        #[derive(Deserialize)]
        struct Download {
            name: String,
            text: String,
        }
        let download: Download =
            serde_json::from_value(self.ask("download", json!({ "name": button })).await?)?;
        Ok((download.name, download.text))
    }

    /// Writes a picture of the window, the others' names at their cursors, to `path`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub async fn picture(&self, path: &Path) -> Result<()> {
        self.ask("hoverCursors", json!({})).await?;
        self.ask("screenshot", json!({ "path": path }))
            .await
            .map(drop)
    }

    /// Closes the window without asking.
    ///
    /// # Errors
    /// When it is gone.
    pub async fn close(self) -> Result<()> {
        self.ask("close", json!({})).await.map(drop)
    }

    async fn ask(&self, command: &str, mut details: Value) -> Result<Value> {
        details["do"] = command.into();
        details["window"] = self.name.as_str().into();
        let answer = self.commands.ask(details).await;
        answer.with_context(|| format!("{command} in the window of {}", self.name))
    }
}
