//! A document's past as bytes: a state and the updates after it, so that what is durable can be had
//! back while memory is ahead of the log.
//!
//! Memory cannot be turned back: a CRDT drops what is deleted. The bytes are there anyway, as they were
//! loaded, logged or written as a snapshot; keeping them costs their memory and no work.

use std::collections::VecDeque;

use bytes::Bytes;
use yrs::updates::decoder::Decode;
use yrs::{Doc, Transact, Update};

use crate::ids::Seq;
use crate::limits::PAST_BYTES_MIN;

/// A state, and the updates after it in order.
#[derive(Default)]
pub(super) struct Past {
    /// V1 update; empty for an empty document.
    state: Bytes,
    rows: VecDeque<(Seq, Bytes)>,
    rows_bytes: usize,
    /// Built from them up to a position, while somebody asks for it.
    doc: Option<(Seq, Doc)>,
}

impl Past {
    pub(super) fn new(state: &[u8]) -> Self {
        Self {
            state: Bytes::copy_from_slice(state),
            ..Self::default()
        }
    }

    /// Adds the next update. Its bytes are copied: those of a frame may hold much more memory than they show.
    pub(super) fn push(&mut self, seq: Seq, update: &[u8]) {
        self.rows_bytes += update.len();
        self.rows.push_back((seq, Bytes::copy_from_slice(update)));
    }

    /// Begins with a later state, which contains every update up to `seq`.
    pub(super) fn begin_with(&mut self, seq: Seq, state: Bytes) {
        self.state = state;
        while let Some((_, update)) = self.rows.pop_front_if(|(first, _)| *first <= seq) {
            self.rows_bytes -= update.len();
        }
    }

    /// The updates have become so many that a new state takes less memory.
    pub(super) fn is_long(&self) -> bool {
        PAST_BYTES_MIN.max(2 * self.state.len()) < self.rows_bytes
    }

    /// The document up to and including `seq`. Costs its whole replay the first time, then what was added.
    /// `None` when the bytes cannot be replayed, which does not happen to what was applied before.
    pub(super) fn at(&mut self, seq: Seq) -> Option<&Doc> {
        let (from, doc) = match self.doc.take() {
            Some((from, doc)) if from <= seq => (from, doc),
            _ => {
                let doc = super::new_doc();
                if !self.state.is_empty() {
                    apply(&doc, &self.state)?;
                }
                (Seq(0), doc)
            }
        };
        for (_, update) in self
            .rows
            .iter()
            .filter(|(row, _)| from < *row && *row <= seq)
        {
            apply(&doc, update)?;
        }
        Some(&self.doc.insert((seq, doc)).1)
    }

    /// Frees what [`Past::at`] built.
    pub(super) fn rest(&mut self) {
        self.doc = None;
    }
}

fn apply(doc: &Doc, update: &[u8]) -> Option<()> {
    let update = Update::decode_v1(update).ok()?;
    doc.transact_mut().apply_update(update).ok()
}
