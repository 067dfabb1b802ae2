//! Typists, whose ledger of what they were promised the [`checker`](crate::checker) judges.

use super::{Follower, Script};
use anyhow::Result;
use serde::Serialize;

use crate::network::Host;

pub use crate::checker::{Ledger, Silence};

/// Who types what, where and how fast.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Typing {
    /// `http://…` addresses; writer w of document d is at number d + w, in turn, and stays there.
    pub nodes: Vec<String>,
    /// Names of documents.
    pub documents: Vec<String>,
    /// Writers of each document.
    pub writers: usize,
    /// Edits per second and writer.
    pub rate: f64,
    /// Decides places, deletions and pauses.
    pub seed: u64,
    /// Token of the clients, if the nodes want one.
    pub token: Option<String>,
    /// After the stop, how long to wait for receipts and for writers to agree.
    pub settle_ms: u64,
    /// The last writer of each document goes offline for some seconds before this share of its edits.
    pub spells: f64,
    /// Where they run.
    #[serde(skip)]
    pub host: Host,
}

impl Typing {
    /// Two writers per document, five edits per second each.
    pub fn new(nodes: Vec<String>, documents: Vec<String>, seed: u64) -> Self {
        Self {
            nodes,
            documents,
            writers: 2,
            rate: 5.0,
            seed,
            token: None,
            settle_ms: 30_000,
            spells: 0.0,
            host: Host::local(),
        }
    }

    /// Starts the typists; stop the follower to get the whole ledger.
    ///
    /// # Errors
    /// When Node or the scripts' packages are not installed.
    pub fn start(&self) -> Result<Follower<Ledger>> {
        Ok(Script::start_on(&self.host, "typist", self)?.follow(Ledger::default(), Ledger::enter))
    }
}
