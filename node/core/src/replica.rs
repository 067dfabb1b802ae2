//! A document of the CRDT library, filled by strangers and freed when it is dropped.
//!
//! `yrs` 0.28.1 does two things with subdocuments that an owner cannot bear. At the end of a transaction it
//! looks for the place of each one that was deleted, which by then may be freed, and may write
//! there; and every subdocument holds the document that it is in, so that neither is ever freed. Nobody here asks a
//! document for its subdocuments: what a transaction knows of them is thrown away before it ends, and a document that
//! had one gives its content away before it goes.

use std::mem;
use std::ops::Deref;

use bytes::Bytes;
use yrs::error::UpdateError;
use yrs::updates::decoder::Decode;
use yrs::{Doc, OffsetKind, Options, ReadTxn, StateVector, Transact, Update, WriteTxn};

use crate::scan::{Scan, scan_stored};

/// A document that only takes updates. It is read like any other.
pub struct Replica {
    doc: Doc,
    has_subdocuments: bool,
}

/// Whether an update added anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Applied {
    /// It did.
    Added,
    /// All of it was there.
    NothingNew,
}

impl Default for Replica {
    fn default() -> Self {
        Self::new()
    }
}

impl Replica {
    /// An empty document.
    pub fn new() -> Self {
        Self {
            doc: new_doc(),
            has_subdocuments: false,
        }
    }

    /// Applies an update that was found sound, in a transaction of its own: `yrs` takes forty times as long for many in one.
    ///
    /// # Errors
    /// When it fails half-way: what is here is not to be used any more.
    pub fn apply(&mut self, scan: &Scan<'_>, update: Update) -> Result<Applied, UpdateError> {
        self.has_subdocuments |= 0 < scan.summary().subdocuments;
        let mut txn = self.doc.transact_mut();
        let applied = txn.apply_update(update);
        if self.has_subdocuments {
            mem::take(txn.subdocs_mut());
        }
        applied.map(|()| {
            if txn.has_changes() {
                Applied::Added
            } else {
                Applied::NothingNew
            }
        })
    }

    /// What somebody lacks who has what `known` says, as a V1 update. Costs a walk over the document.
    pub fn lacking(&self, known: &StateVector) -> Bytes {
        let mut update = self.doc.transact().encode_state_as_update_v1(known);
        // It may be kept for long, and the encoder begins with room for 1 KB.
        update.shrink_to_fit();
        update.into()
    }

    /// Applies an update that was applied to another document before. `None`: it is not sound after all.
    pub(crate) fn replay(&mut self, update: &[u8]) -> Option<Applied> {
        let scan = scan_stored(update).ok()?;
        self.apply(&scan, Update::decode_v1(update).ok()?).ok()
    }
}

impl Deref for Replica {
    type Target = Doc;

    fn deref(&self) -> &Doc {
        &self.doc
    }
}

impl Drop for Replica {
    fn drop(&mut self) {
        if self.has_subdocuments {
            // The content goes with another document, and with it all that holds this one.
            let other = new_doc();
            mem::swap(
                self.doc.transact_mut().store_mut(),
                other.transact_mut().store_mut(),
            );
        }
    }
}

/// A document that counts text as Yjs does, in UTF-16 units.
pub fn new_doc() -> Doc {
    Doc::with_options(Options {
        offset_kind: OffsetKind::Utf16,
        ..Options::default()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use yrs::{Map, MapPrelim};

    use super::*;

    /// Subdocuments that stay, that are deleted, and that are deleted with what they are in.
    #[test]
    fn a_document_with_subdocuments_is_freed() {
        let [made, deleted] = edits();
        for edits in [&[&made][..], &[&made, &deleted], &[&made, &deleted, &made]] {
            let mut replica = Replica::new();
            let content = Arc::new(());
            let in_it = content.clone();
            let kept = replica.observe_update_v1("test", move |_, _| {
                let _ = &in_it;
            });
            kept.unwrap();
            for edit in edits {
                replica.replay(edit).unwrap();
            }
            assert_eq!(Arc::strong_count(&content), 2);
            drop(replica);
            assert_eq!(Arc::strong_count(&content), 1, "after {}", edits.len());
        }
    }

    #[test]
    fn subdocuments_are_passed_on_as_they_came() {
        let [made, deleted] = edits();
        let mut replica = Replica::new();
        assert_eq!(replica.replay(&made), Some(Applied::Added));
        let state = |doc: &Doc| {
            doc.transact()
                .encode_state_as_update_v1(&StateVector::default())
        };
        let summary = |update: &[u8]| *scan_stored(update).unwrap().summary();
        assert_eq!(summary(&state(&replica)), summary(&made));
        assert_eq!(replica.replay(&deleted), Some(Applied::Added));
        assert_eq!(replica.replay(&deleted), Some(Applied::NothingNew));
        let mut copy = Replica::new();
        copy.replay(&state(&replica)).unwrap();
        assert_eq!(summary(&state(&copy)), summary(&state(&replica)));
        assert_eq!(summary(&state(&replica)).subdocuments, 1);
    }

    /// Subdocuments in a map and in a map in it, and the deletion of all but one.
    fn edits() -> [Vec<u8>; 2] {
        let client = new_doc();
        let map = client.get_or_insert_map("map");
        let mut txn = client.transact_mut();
        map.insert(&mut txn, "stays", Doc::new());
        map.insert(&mut txn, "goes", Doc::new());
        let inner = map.insert(&mut txn, "goes too", MapPrelim::default());
        for key in ["one", "two", "three"] {
            inner.insert(&mut txn, key, Doc::new());
        }
        let made = txn.encode_update_v1();
        drop(txn);
        let mut txn = client.transact_mut();
        map.remove(&mut txn, "goes");
        map.remove(&mut txn, "goes too");
        let deleted = txn.encode_update_v1();
        mem::take(txn.subdocs_mut());
        [made, deleted]
    }
}
