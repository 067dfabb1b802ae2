//! How much memory a document takes, estimated from what is in its bytes, and whether more fits into it.
//!
//! The CRDT cannot be asked, and bytes tell little: a struct of three bytes becomes a block of two hundred. So
//! what is in a document is counted when it is read, and weighed. The weights come from the resident memory of a node that
//! opened a document of one kind of content, with `yrs` 0.28.1 and our [`Places`](crate::scan::Places); of many small
//! values under keys of their own it takes almost twice as much.
//!
//! What is added to a document is weighed as if nothing of it joined what is there and each deletion cut it
//! apart; the next count of the whole, with each snapshot, makes it good.

use crate::limits::{DOCUMENT_MEMORY_MAX, DOCUMENT_OVERDRAFT};
use crate::scan::Summary;

/// Memory of a struct.
pub const STRUCT_BYTES: u64 = 224;
/// Memory of a JSON-like value, above its own bytes.
const VALUE_BYTES: u64 = 24;
/// Memory of a shared type, above its struct.
const TYPE_BYTES: u64 = 256;
/// Memory of a subdocument, above its struct.
const SUBDOCUMENT_BYTES: u64 = 1_024;
/// Memory of a client, above its structs.
const CLIENT_BYTES: u64 = 640;
/// Memory of an open document without content.
const EMPTY_BYTES: u64 = 6 * 1024;
/// The whole is counted again rather than something refused, if so much was added since the last time.
const WORTH_A_COUNT: u64 = DOCUMENT_MEMORY_MAX / 32;

/// What is in a document.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Size {
    /// The whole when it was last counted.
    whole: Summary,
    whole_bytes: usize,
    /// Memory of what was added since.
    added: u64,
}

/// Whether an update fits into its document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// It does.
    Enough,
    /// It does not.
    None,
    /// It may, once the whole is counted.
    Unknown,
}

impl Size {
    /// That of a whole state.
    pub(super) fn of(whole: Summary, bytes: usize) -> Self {
        Self {
            whole,
            whole_bytes: bytes,
            added: 0,
        }
    }

    /// Takes in an update of which these ranges of deletes are new.
    pub(super) fn add(&mut self, update: &Summary, bytes: usize, new_ranges: u64) {
        self.added += memory_of_update(update, bytes, new_ranges);
    }

    /// Bytes of memory, estimated.
    pub(super) fn memory(&self) -> u64 {
        EMPTY_BYTES + memory(&self.whole, self.whole_bytes) + self.added
    }

    /// What was counted last.
    pub(super) const fn whole(&self) -> &Summary {
        &self.whole
    }

    /// Whether an update fits in. Deletes do a while longer, or nobody could make room.
    pub(super) fn room_for(&self, update: &Summary, bytes: usize, new_ranges: u64) -> Room {
        let only_deletes = update.structs == 0;
        let max = DOCUMENT_MEMORY_MAX + if only_deletes { DOCUMENT_OVERDRAFT } else { 0 };
        if self.memory() + memory_of_update(update, bytes, new_ranges) <= max {
            Room::Enough
        } else if WORTH_A_COUNT <= self.added {
            Room::Unknown
        } else {
            Room::None
        }
    }
}

/// Memory of a whole state.
fn memory(whole: &Summary, bytes: usize) -> u64 {
    // The content lies in the blocks, and the state beside them as it was read or written.
    2 * bytes as u64
        + STRUCT_BYTES * whole.structs
        + VALUE_BYTES * whole.values
        + TYPE_BYTES * whole.types
        + SUBDOCUMENT_BYTES * whole.subdocuments
        + CLIENT_BYTES * whole.clients
}

/// The most memory that an update is likely to add. A range of deletes cuts what is there at both ends.
fn memory_of_update(update: &Summary, bytes: usize, new_ranges: u64) -> u64 {
    memory(update, bytes) + 2 * STRUCT_BYTES * new_ranges
}
