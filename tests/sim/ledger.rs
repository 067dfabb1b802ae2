//! What clients did and were promised, by token, and what that says about a text.
//!
//! Every insertion is a token of its own, `<00017>`, and every deletion takes out one whole token, so
//! that the fate of each change can be read off any text of the document. Tokens have one length, so
//! that a client finds their borders without reading the text.

use std::collections::{BTreeMap, BTreeSet};

use collab_core::ids::DocumentId;

/// A token by its number.
pub(crate) type Token = usize;

/// What an edit did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Change {
    /// Wrote a token.
    Insert(Token),
    /// Took one out, its own or somebody else's.
    Delete(Token),
}

/// Everything that was written.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    tokens: Vec<Fate>,
    acked: usize,
    /// Changes whose rows went with a database server that had no standby up to date.
    gone: BTreeSet<Change>,
}

#[derive(Debug)]
struct Fate {
    document: DocumentId,
    inserted: Promise,
    deleted: Option<Promise>,
    /// Written by somebody who may not.
    forbidden: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Promise {
    /// It was done; nobody said that it is durable.
    Made,
    /// Somebody was told that it is durable.
    Acked,
}

/// How a text compares with the ledger.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Acknowledged insertions that nobody deleted and that are not there.
    pub(crate) lost: Vec<Token>,
    /// Tokens that are there more than once.
    pub(crate) doubled: Vec<Token>,
    /// Tokens that are there although their deletion was acknowledged.
    pub(crate) revived: Vec<Token>,
    /// Pieces of text that nobody wrote, or nobody who may.
    pub(crate) strange: Vec<String>,
    /// Acknowledged changes that went with a database server.
    pub(crate) gone: usize,
}

impl Verdict {
    pub(crate) fn is_clean(&self) -> bool {
        let Self {
            lost,
            doubled,
            revived,
            strange,
            gone: _,
        } = self;
        lost.is_empty() && doubled.is_empty() && revived.is_empty() && strange.is_empty()
    }
}

impl Ledger {
    /// A new token of a document.
    pub(crate) fn insert(&mut self, document: &DocumentId) -> Token {
        self.tokens.push(Fate {
            document: document.clone(),
            inserted: Promise::Made,
            deleted: None,
            forbidden: false,
        });
        self.tokens.len() - 1
    }

    /// A new token of a document, by somebody who may not write there.
    pub(crate) fn forbidden(&mut self, document: &DocumentId) -> Token {
        let token = self.insert(document);
        self.tokens[token].forbidden = true;
        token
    }

    /// Whether a token may be in the log of this document.
    pub(crate) fn belongs(&self, token: Token, document: &DocumentId) -> bool {
        let fate = self.tokens.get(token);
        fate.is_some_and(|fate| fate.document == *document && !fate.forbidden)
    }

    /// The database lost it: only a client or an owner that still has it can bring it back.
    pub(crate) fn is_gone(&mut self, change: Change) {
        self.gone.insert(change);
    }

    /// Somebody takes a token out.
    pub(crate) fn delete(&mut self, token: Token) {
        self.tokens[token].deleted.get_or_insert(Promise::Made);
    }

    /// Somebody was told that a change is durable. Answers whether that is news.
    pub(crate) fn acked(&mut self, change: Change) -> bool {
        let promise = match change {
            Change::Insert(token) => Some(&mut self.tokens[token].inserted),
            Change::Delete(token) => self.tokens[token].deleted.as_mut(),
        };
        let news = promise
            .is_some_and(|promise| std::mem::replace(promise, Promise::Acked) == Promise::Made);
        self.acked += usize::from(news);
        news
    }

    /// Acknowledged changes.
    pub(crate) fn acknowledged(&self) -> usize {
        self.acked
    }

    /// Whether the tokens of a text show that a change was done. An insertion that somebody has deleted since cannot be told.
    pub(crate) fn is_done(&self, change: Change, tokens: &BTreeSet<Token>) -> bool {
        match change {
            Change::Insert(token) => {
                self.tokens[token].deleted.is_some() || tokens.contains(&token)
            }
            Change::Delete(token) => !tokens.contains(&token),
        }
    }

    /// Compares a text of a document with what was promised.
    pub(crate) fn judge(&self, document: &DocumentId, text: &str) -> Verdict {
        let mut found = BTreeMap::<Token, usize>::new();
        let mut verdict = Verdict::default();
        for piece in text.split_inclusive('>') {
            match parsed(piece) {
                Some(token) => *found.entry(token).or_default() += 1,
                None => verdict.strange.push(piece.to_owned()),
            }
        }
        for (token, fate) in self.tokens.iter().enumerate() {
            if fate.document != *document {
                continue;
            }
            let gone = |change| usize::from(self.gone.contains(&change));
            match found.remove(&token).unwrap_or(0) {
                1.. if fate.forbidden => verdict.strange.push(spelled(token)),
                0 if fate.inserted == Promise::Acked && fate.deleted.is_none() => {
                    match gone(Change::Insert(token)) {
                        0 => verdict.lost.push(token),
                        gone => verdict.gone += gone,
                    }
                }
                1 if fate.deleted == Some(Promise::Acked) => match gone(Change::Delete(token)) {
                    0 => verdict.revived.push(token),
                    gone => verdict.gone += gone,
                },
                0 | 1 => {}
                _ => verdict.doubled.push(token),
            }
        }
        verdict.strange.extend(found.into_keys().map(spelled));
        verdict
    }
}

/// Length of a token in a text.
pub(crate) const TOKEN_LENGTH: u32 = 7;

/// As it stands in the text.
pub(crate) fn spelled(token: Token) -> String {
    format!("<{token:05}>")
}

/// The tokens in the bytes of an update.
pub(crate) fn contained(update: &[u8]) -> impl Iterator<Item = Token> {
    let windows = update.windows(TOKEN_LENGTH as usize);
    let marked = windows.filter(|piece| piece[0] == b'<');
    marked.filter_map(|piece| parsed(str::from_utf8(piece).ok()?))
}

/// The token that a piece of text is.
pub(crate) fn parsed(piece: &str) -> Option<Token> {
    let digits = piece.strip_prefix('<')?.strip_suffix('>')?;
    if digits.len() + 2 == TOKEN_LENGTH as usize {
        digits.parse().ok()
    } else {
        None
    }
}
