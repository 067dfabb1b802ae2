//! A Yjs document as a browser has it.
//!
//! Tabs show each other what they type, so that an edit may come before another one that it stands on. Yjs takes what
//! fits, keeps the rest until it fits too, and sends both to whoever asks. `yrs` 0.28.1 is exact only in causal order,
//! so that the order is made here, before it.

use std::ops::Deref;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use collab_core::scan::{Gap, Scan, scan_update};
use yrs::updates::decoder::Decode;
use yrs::{ClientID, Doc, OffsetKind, Options, ReadTxn, StateVector, Transact, Update};

/// A document, shared by all its clones. It is read and edited like any other.
#[derive(Clone)]
pub(crate) struct Replica {
    doc: Doc,
    /// Updates that stand, in part, on what is not here.
    waiting: Arc<Mutex<Vec<Bytes>>>,
}

impl Replica {
    /// An empty document of a client that counts text as Yjs does.
    pub(crate) fn of(client_id: ClientID) -> Self {
        let options = Options {
            client_id,
            offset_kind: OffsetKind::Utf16,
            ..Options::default()
        };
        Self {
            doc: Doc::with_options(options),
            waiting: Arc::default(),
        }
    }

    /// What `yrs` has of it.
    pub(crate) fn doc(&self) -> Doc {
        self.doc.clone()
    }

    /// Takes an update, now or once what it stands on is here.
    pub(crate) fn apply(&self, update: &[u8]) {
        let mut waiting = self.waiting();
        waiting.push(Bytes::copy_from_slice(update));
        loop {
            let before = (self.doc.transact().state_vector(), waiting.len());
            waiting.retain(|update| self.take(update).is_some());
            if before == (self.doc.transact().state_vector(), waiting.len()) {
                return;
            }
        }
    }

    /// What somebody with this state vector lacks, and what waits.
    pub(crate) fn encode_state_as_update(&self, known: &StateVector) -> Bytes {
        let diff = self.doc.transact().encode_diff_v1(known);
        let waiting = self.waiting();
        if waiting.is_empty() {
            return diff.into();
        }
        let all = [&diff[..]]
            .into_iter()
            .chain(waiting.iter().map(|update| &update[..]));
        let merged = yrs::merge_updates_v1(all);
        merged.expect("they were scanned").into()
    }

    /// What those need first that wait.
    pub(crate) fn gaps(&self) -> Vec<Gap> {
        let waiting = self.waiting();
        let gaps = waiting.iter().map(|update| self.gap(&scanned(update)));
        gaps.flatten().collect()
    }

    /// Applies what fits. Answers what the rest needs.
    fn take(&self, update: &[u8]) -> Option<Gap> {
        let scan = scanned(update);
        let known = self.doc.transact().state_vector();
        let part = scan.admissible(|client| known.get(&ClientID::new(client)));
        let part = Update::decode_v1(&part).expect("a part of an update is one");
        let applied = self.doc.transact_mut().apply_update(part);
        applied.expect("what stands on what is here can be applied");
        self.gap(&scan)
    }

    fn gap(&self, scan: &Scan<'_>) -> Option<Gap> {
        let known = self.doc.transact().state_vector();
        scan.missing(|client| known.get(&ClientID::new(client)))
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, Vec<Bytes>> {
        self.waiting.lock().expect("nobody panics with it")
    }
}

impl Deref for Replica {
    type Target = Doc;

    fn deref(&self) -> &Doc {
        &self.doc
    }
}

fn scanned(update: &[u8]) -> Scan<'_> {
    scan_update(update).expect("a node and a tab send updates")
}
