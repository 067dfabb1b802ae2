//! Stock clients of every family, in one script, each driven by name.

use super::commands::Commands;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A family of clients, in one of its versions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Family {
    /// y-websocket 3 on Yjs 13.
    #[serde(rename = "y-websocket-3")]
    YWebsocket3,
    /// @y/websocket 4 on Yjs 14.
    #[serde(rename = "y-websocket-4")]
    YWebsocket4,
    /// Hocuspocus' provider 3.
    #[serde(rename = "hocuspocus-3")]
    Hocuspocus3,
    /// Hocuspocus' provider 4.
    #[serde(rename = "hocuspocus-4")]
    Hocuspocus4,
    /// y-sweet's client, with its SDK.
    #[serde(rename = "y-sweet")]
    YSweet,
}

impl Family {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::YWebsocket3,
        Self::YWebsocket4,
        Self::Hocuspocus3,
        Self::Hocuspocus4,
        Self::YSweet,
    ];

    /// Its name, for people.
    pub const fn name(self) -> &'static str {
        match self {
            Self::YWebsocket3 => "y-websocket 3",
            Self::YWebsocket4 => "@y/websocket 4",
            Self::Hocuspocus3 => "Hocuspocus 3",
            Self::Hocuspocus4 => "Hocuspocus 4",
            Self::YSweet => "y-sweet",
        }
    }

    /// Whether it brings its token inside the socket.
    pub const fn is_hocuspocus(self) -> bool {
        matches!(self, Self::Hocuspocus3 | Self::Hocuspocus4)
    }
}

/// The running script. Dropping it kills the process.
#[derive(Debug)]
pub struct Families {
    commands: Arc<Commands>,
}

/// What a client starts with.
#[derive(Debug, Clone, Serialize)]
pub struct Opening<'a> {
    /// Name of the client and of its user, unique in the script.
    pub name: String,
    /// What it is.
    pub family: Family,
    /// `http://…` address of a node.
    pub node: &'a str,
    /// The document.
    pub document: &'a str,
    /// Token, or for y-sweet `TOKEN|user|authorization`: that of the application's server and what
    /// it asks for the client.
    pub token: Option<&'a str>,
    /// Hocuspocus: its token from the second time on.
    pub next_token: Option<&'a str>,
    /// Whether it shows presence.
    pub presence: bool,
    /// Hocuspocus: clients that name the same socket share it.
    pub socket: Option<&'a str>,
    /// Hocuspocus 4: an address of its own for each client of a document.
    pub sessions: bool,
    /// y-indexeddb's store, read before it connects.
    pub stored: Option<&'a str>,
}

/// One client.
#[derive(Debug)]
pub struct Client {
    name: String,
    commands: Arc<Commands>,
}

/// What a client knows.
#[derive(Debug, Clone, Deserialize)]
pub struct Look {
    /// Its text.
    pub text: String,
    /// Whether it is in sync, in its own words.
    pub synced: bool,
    /// Whether all that it did is saved, in its own words.
    pub saved: bool,
    /// How often that became true.
    pub turns: u64,
    /// Why it was denied something, each time.
    pub denied: Vec<String>,
    /// Codes with which its socket was closed.
    pub closes: Vec<Option<u16>>,
    /// Hocuspocus: what it was granted, each time.
    pub scopes: Vec<String>,
    /// Hocuspocus: messages of other applications.
    pub stateless: Vec<String>,
    /// Hocuspocus: why the server ended the document.
    pub left: Vec<String>,
    /// Names of those present, itself among them.
    pub people: Vec<String>,
    /// Hocuspocus: sockets that the script has.
    pub sockets: usize,
}

impl Families {
    /// Starts the script, without clients.
    ///
    /// # Errors
    /// When Node or the scripts' packages are not installed.
    pub async fn start() -> Result<Self> {
        Ok(Self {
            commands: Arc::new(Commands::start("families", &json!({})).await?),
        })
    }

    /// Opens a client, which connects by itself.
    ///
    /// # Errors
    /// When its family refuses the options.
    pub async fn open(&self, opening: &Opening<'_>) -> Result<Client> {
        let client = Client {
            name: opening.name.clone(),
            commands: Arc::clone(&self.commands),
        };
        client.ask("open", serde_json::to_value(opening)?).await?;
        Ok(client)
    }

    /// Makes a call of y-sweet's SDK, as an application's server.
    ///
    /// # Errors
    /// What the SDK throws.
    pub async fn sdk(
        &self,
        node: &str,
        token: Option<&str>,
        call: &str,
        details: Value,
    ) -> Result<Value> {
        let mut command = details;
        command["do"] = "sdk".into();
        command["node"] = node.into();
        command["token"] = token.into();
        command["call"] = call.into();
        let answer = self.commands.ask(command).await;
        answer.with_context(|| format!("{call} of the SDK"))
    }
}

impl Client {
    /// Types at the end.
    ///
    /// # Errors
    /// When the client is closed.
    pub async fn types(&self, text: &str) -> Result<()> {
        self.ask("edit", json!({ "text": text })).await.map(drop)
    }

    /// Deletes from the beginning.
    ///
    /// # Errors
    /// When there is not so much.
    pub async fn deletes(&self, length: usize) -> Result<()> {
        self.ask("remove", json!({ "length": length }))
            .await
            .map(drop)
    }

    /// Hocuspocus: says something to the other applications.
    ///
    /// # Errors
    /// When its family has no such messages.
    pub async fn says(&self, payload: &str) -> Result<()> {
        self.ask("stateless", json!({ "payload": payload }))
            .await
            .map(drop)
    }

    /// Hocuspocus: brings another token on the same socket.
    ///
    /// # Errors
    /// When its family cannot.
    pub async fn renews(&self, token: &str) -> Result<()> {
        self.ask("renew", json!({ "token": token })).await.map(drop)
    }

    /// Hocuspocus: begins to sync again.
    ///
    /// # Errors
    /// When its family cannot.
    pub async fn forces_sync(&self) -> Result<()> {
        self.ask("force", json!({})).await.map(drop)
    }

    /// Its socket goes without a word, and it comes back.
    ///
    /// # Errors
    /// When the client is closed.
    pub async fn is_cut(&self) -> Result<()> {
        self.ask("cut", json!({})).await.map(drop)
    }

    /// What it knows now.
    ///
    /// # Errors
    /// When the client is closed.
    pub async fn look(&self) -> Result<Look> {
        Ok(serde_json::from_value(self.ask("look", json!({})).await?)?)
    }

    /// Waits until what it knows is as wanted.
    ///
    /// # Errors
    /// When it is not within `patience`; what it knows then is in the error.
    pub async fn until(
        &self,
        what: &str,
        patience: Duration,
        wanted: impl Fn(&Look) -> bool,
    ) -> Result<Look> {
        let begun = Instant::now();
        loop {
            let look = self.look().await?;
            if wanted(&look) {
                return Ok(look);
            }
            if patience < begun.elapsed() {
                bail!("{} waited in vain: {what}; it knows {look:?}", self.name);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Leaves the document.
    ///
    /// # Errors
    /// When it has.
    pub async fn close(self) -> Result<()> {
        self.ask("close", json!({})).await.map(drop)
    }

    async fn ask(&self, command: &str, mut details: Value) -> Result<Value> {
        details["do"] = command.into();
        details["name"] = self.name.as_str().into();
        let answer = self.commands.ask(details).await;
        answer.with_context(|| format!("{command} of {}", self.name))
    }
}
