//! Identifiers that cannot be mixed up.
//!
//! Each is a newtype over what it is on the wire and in the store, so that a sequence number is
//! never compared with an epoch.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::limits::DOCUMENT_ID_BYTES_MAX;

/// Name of a document: 1 to 255 bytes of UTF-8 without control characters.
///
/// Slashes are allowed. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DocumentId(Arc<str>);

/// Why a text is not a [`DocumentId`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DocumentIdError {
    /// Ask for a name of at least one character.
    #[error("a document id must not be empty; name the document, as in /ws/minutes")]
    Empty,
    /// Ask for a shorter name.
    #[error(
        "document id of {bytes} bytes is longer than {DOCUMENT_ID_BYTES_MAX} bytes; shorten it"
    )]
    TooLong {
        /// Length of the refused text.
        bytes: usize,
    },
    /// Ask for a name without control characters.
    #[error("document id contains the control character {character:?}; remove it")]
    ControlCharacter {
        /// The first one found.
        character: char,
    },
}

impl DocumentId {
    /// Checks a text and makes it a document id.
    ///
    /// # Errors
    /// When it is empty, longer than 255 bytes, or has a control character (Unicode `Cc`).
    pub fn new(text: &str) -> Result<Self, DocumentIdError> {
        if text.is_empty() {
            return Err(DocumentIdError::Empty);
        }
        if text.len() > DOCUMENT_ID_BYTES_MAX {
            return Err(DocumentIdError::TooLong { bytes: text.len() });
        }
        match text.chars().find(|character| character.is_control()) {
            Some(character) => Err(DocumentIdError::ControlCharacter { character }),
            None => Ok(Self(text.into())),
        }
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DocumentId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl fmt::Debug for DocumentId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, out)
    }
}

impl TryFrom<String> for DocumentId {
    type Error = DocumentIdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::new(&text)
    }
}

impl From<DocumentId> for String {
    fn from(id: DocumentId) -> Self {
        id.0.as_ref().to_owned()
    }
}

/// Name of a node; on Kubernetes the name of its pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeId(pub String);

impl fmt::Display for NodeId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

impl From<&str> for NodeId {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(out)
            }
        }
    };
}

number!(
    /// One of the shares of the documents, the unit of ownership: `XXH3-64(document id) mod slots`.
    Slot(u16)
);
number!(
    /// Position in a document's log. The first update has 1; 0 is "before the first".
    Seq(i64)
);
number!(
    /// A slot's version of ownership, the fencing token. Only ever rises.
    Epoch(i64)
);
number!(
    /// One leadership of the operator. Fences operators.
    Term(i64)
);
number!(
    /// One life of a document: raised when a deleted document is created again.
    RoomEpoch(i64)
);
number!(
    /// One client socket on one edge, or one document of a socket that carries several. Unique on
    /// its edge, never reused by that process.
    ConnectionId(u64)
);

impl Seq {
    /// The position after this one.
    #[must_use]
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}
