//! A document's past as bytes: whole states and the updates after them, so that what is durable can be had
//! back while memory is ahead of the log, and what clients lack without asking the CRDT.
//!
//! Memory cannot be turned back: a CRDT drops what is deleted. The bytes are there anyway, as they were
//! loaded, logged or written as a snapshot; keeping them costs their memory and no work. Whoever joins is
//! sent the same bytes as all others.

use std::collections::VecDeque;

use bytes::Bytes;
use yrs::{ClientID, StateVector};

use crate::ids::Seq;
use crate::limits::PAST_BYTES_MIN;
use crate::replica::Replica;
use crate::scan::Parts;

/// A whole state, encoded.
#[derive(Default)]
pub(super) struct Whole {
    /// It contains every update up to this one, and none after it.
    pub(super) seq: Seq,
    /// V1 update; empty for an empty document.
    pub(super) bytes: Bytes,
    parts: Option<Box<Parts>>,
}

impl Whole {
    pub(super) const fn new(seq: Seq, bytes: Bytes) -> Self {
        Self {
            seq,
            bytes,
            parts: None,
        }
    }

    /// Finds the parts of the state; done once. Costs one pass over its bytes.
    pub(super) fn parts(&mut self) -> Option<&Parts> {
        if self.parts.is_none() {
            self.parts = Parts::of(&self.bytes).map(Box::new);
        }
        self.parts.as_deref()
    }

    /// What somebody lacks who has what `known` says. `None` when these bytes cannot tell.
    pub(super) fn lacking(&mut self, known: &StateVector) -> Option<Bytes> {
        if known.is_empty() {
            return (!self.bytes.is_empty()).then(|| self.bytes.clone());
        }
        let bytes = self.bytes.clone();
        let next_clock = |client| known.get(&ClientID::new(client));
        Some(self.parts()?.lacking(&bytes, next_clock).into())
    }
}

/// Whole states, and the updates after the first in order.
#[derive(Default)]
pub(super) struct Past {
    /// Durable.
    base: Whole,
    /// A newer one, which may not be durable yet.
    ahead: Option<Box<Whole>>,
    rows: VecDeque<(Seq, Bytes)>,
    rows_bytes: usize,
    /// Built from them up to a position, while somebody asks for it.
    doc: Option<Box<(Seq, Replica)>>,
}

impl Past {
    pub(super) fn new(seq: Seq, state: Bytes) -> Self {
        Self {
            base: Whole::new(seq, state),
            ..Self::default()
        }
    }

    /// Adds the next update. Its bytes are copied: those of a frame may hold much more memory than they show.
    pub(super) fn push(&mut self, seq: Seq, update: &[u8]) {
        self.rows_bytes += update.len();
        self.rows.push_back((seq, Bytes::copy_from_slice(update)));
    }

    /// Begins with a later state, which contains every update up to `seq`; all of them are durable.
    pub(super) fn begin_with(&mut self, whole: Whole) {
        let is_known = whole.seq == self.base.seq && !self.base.bytes.is_empty();
        if whole.seq < self.base.seq || is_known {
            return;
        }
        let seq = whole.seq;
        self.base = whole;
        self.ahead.take_if(|ahead| ahead.seq <= seq);
        while let Some((_, update)) = self.rows.pop_front_if(|(first, _)| *first <= seq) {
            self.rows_bytes -= update.len();
        }
    }

    /// Keeps a later state; the past begins with it once it is durable.
    pub(super) fn keep(&mut self, whole: Whole, committed: Seq) {
        if whole.seq <= committed {
            self.begin_with(whole);
        } else {
            self.ahead = Some(Box::new(whole));
        }
    }

    /// Every update up to `seq` is durable. Frees what [`Past::at`] built.
    pub(super) fn committed(&mut self, seq: Seq) {
        self.doc = None;
        if let Some(whole) = self.ahead.take_if(|ahead| ahead.seq <= seq) {
            self.begin_with(*whole);
        }
    }

    /// The newest whole state.
    pub(super) fn newest(&mut self) -> &mut Whole {
        self.ahead.as_deref_mut().unwrap_or(&mut self.base)
    }

    /// The updates after `seq`, which is not before the first state.
    pub(super) fn after(&self, seq: Seq) -> impl ExactSizeIterator<Item = &(Seq, Bytes)> {
        let first = self.rows.partition_point(|(row, _)| *row <= seq);
        self.rows.range(first..)
    }

    /// The first state, and the updates after it.
    pub(super) fn updates(&self) -> impl Iterator<Item = &Bytes> {
        let base = Some(&self.base.bytes).filter(|bytes| !bytes.is_empty());
        base.into_iter()
            .chain(self.rows.iter().map(|(_, update)| update))
    }

    /// Bytes of the first state and the updates after it.
    pub(super) fn bytes(&self) -> usize {
        self.base.bytes.len() + self.rows_bytes
    }

    /// Gives back what it took for updates to come.
    pub(super) fn shrink(&mut self) {
        self.rows.shrink_to_fit();
    }

    /// The updates have become so many that a new state takes less memory.
    pub(super) fn is_long(&self) -> bool {
        PAST_BYTES_MIN.max(2 * self.base.bytes.len()) < self.rows_bytes
    }

    /// The document up to and including `seq`. Costs its whole replay the first time, then what was added.
    /// `None` when the bytes cannot be replayed, which does not happen to what was applied before.
    pub(super) fn at(&mut self, seq: Seq) -> Option<&Replica> {
        let (from, mut doc) = match self.doc.take().map(|built| *built) {
            Some((from, doc)) if from <= seq => (from, doc),
            _ => {
                let mut doc = Replica::new();
                if !self.base.bytes.is_empty() {
                    doc.replay(&self.base.bytes)?;
                }
                (Seq(0), doc)
            }
        };
        for (_, update) in self
            .rows
            .iter()
            .filter(|(row, _)| from < *row && *row <= seq)
        {
            doc.replay(update)?;
        }
        Some(&self.doc.insert(Box::new((seq, doc))).1)
    }
}
