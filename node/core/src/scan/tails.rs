//! What the last clocks of each client held, to notice when two devices write under one client id.
//!
//! A client id names one run of one editor. A copied profile or a suspended machine that was cloned makes two that
//! count on from the same clock: their first edits have the same names and other content, and whoever
//! comes second would be told that its edits are saved already. Only the end of what a client wrote is kept:
//! there the two part.

use std::collections::VecDeque;
use std::ops::Range;

use super::structs::{DELETED, GC, Id, KIND_MARKS, SKIP, STRING, Struct};
use crate::wire::varint::Reader;

/// Clocks of a client whose content is remembered.
const CLOCKS_KEPT: usize = 128;
/// What cannot be compared: deleted, collected, or half a character, of which either half may be gone.
const UNKNOWN: u16 = 0;

/// The last clocks of one client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tail {
    /// Clock behind the last.
    end: u32,
    /// For each clock before it its UTF-16 unit if it is text, else its kind.
    marks: VecDeque<u16>,
}

impl Tail {
    /// Remembers what of a struct is new.
    pub(super) fn append(&mut self, id: Id, read: &Struct<'_>) {
        let from = id.clock.max(self.end);
        if read.end <= from {
            return;
        }
        if self.end < from {
            self.marks.clear();
        }
        let kept = u32::try_from(CLOCKS_KEPT).unwrap_or(u32::MAX);
        let from = from.max(read.end.saturating_sub(kept));
        each_mark(id, read, from..read.end, |mark| {
            if self.marks.len() == CLOCKS_KEPT {
                self.marks.pop_front();
            }
            self.marks.push_back(mark);
        });
        self.end = read.end;
    }

    /// Forgets what stands at this clock and behind it.
    pub(super) fn truncate(&mut self, end: u32) {
        let behind = self.end.saturating_sub(end) as usize;
        self.marks.truncate(self.marks.len().saturating_sub(behind));
        self.end = self.end.min(end);
    }

    /// The first clock at which a struct holds something else than was remembered.
    pub(super) fn contradicted_by(&self, id: Id, read: &Struct<'_>) -> Option<u32> {
        let first = self.end - u32::try_from(self.marks.len()).ok()?;
        let range = id.clock.max(first)..read.end.min(self.end);
        let mut clock = range.start;
        let mut found = None;
        each_mark(id, read, range, |mark| {
            let known = self.marks[(clock - first) as usize];
            if mark != known && mark != UNKNOWN && known != UNKNOWN {
                found = found.or(Some(clock));
            }
            clock += 1;
        });
        found
    }
}

/// Marks of the clocks in `range`, which lie in the struct.
fn each_mark(id: Id, read: &Struct<'_>, range: Range<u32>, mut each: impl FnMut(u16)) {
    if range.is_empty() {
        return;
    }
    let (skip, take) = ((range.start - id.clock) as usize, range.len());
    match read.kind {
        STRING => {
            let text = Reader::new(read.body).var_str().unwrap_or_default();
            let units = text.encode_utf16().skip(skip).take(take);
            units.for_each(|unit| each(mark_of_unit(unit)));
        }
        GC | SKIP | DELETED => (0..take).for_each(|_| each(UNKNOWN)),
        kind => (0..take).for_each(|_| each(KIND_MARKS | u16::from(kind))),
    }
}

fn mark_of_unit(unit: u16) -> u16 {
    let is_whole = !(0xD800..0xE000).contains(&unit) && unit != 0xFFFD;
    if is_whole { unit } else { UNKNOWN }
}
