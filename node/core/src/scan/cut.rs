//! What a client lacks of a whole state, cut from the state's bytes.
//!
//! A state is encoded once and then answers many: a client's step 1 names the clock from which it lacks
//! each other client's structs, and these are the end of a section. So the answer is copied, section by
//! section, and never asks the CRDT, which would walk the whole document for the deletes alone. Those
//! come whole with every answer, as in Yjs: a state vector does not speak of them.

use super::structs::{Id, Pass, Source};
use crate::wire::varint::write_var_uint;

/// Structs between two marks: a cut walks no more than these in each section.
const STRUCTS_PER_MARK: u64 = 256;

/// Where the parts of an encoded state are. Takes a thousandth of its memory.
#[derive(Debug, Clone)]
pub struct Parts {
    sections: Vec<Section>,
    /// Where the deletes begin, in bytes.
    deletes: usize,
}

#[derive(Debug, Clone)]
struct Section {
    client: u64,
    /// The clock behind its last struct.
    end: u32,
    /// Where it ends, in bytes.
    until: usize,
    /// Some of its structs in order, the first among them.
    marks: Vec<Mark>,
}

/// Where a struct begins.
#[derive(Debug, Clone, Copy)]
struct Mark {
    clock: u32,
    /// In bytes.
    at: usize,
    /// Structs from here to the end of the section.
    left: u64,
}

impl Parts {
    /// Finds the parts of a state that this library has encoded. Costs one pass over the bytes.
    ///
    /// `None` when they are no update.
    pub fn of(state: &[u8]) -> Option<Self> {
        let mut source = Source::new(state);
        let mut sections = Vec::new();
        for _ in 0..source.count(1).ok()? {
            let count = source.count(1).ok()?;
            let mut next = source.id().ok()?;
            let mut marks = Vec::new();
            for done in 0..count {
                if done % STRUCTS_PER_MARK == 0 {
                    marks.push(Mark {
                        clock: next.clock,
                        at: source.position(),
                        left: count - done,
                    });
                }
                next.clock = source.read_struct(next, &mut Pass::Walk).ok()?.end;
            }
            sections.push(Section {
                client: next.client,
                end: next.clock,
                until: source.position(),
                marks,
            });
        }
        Some(Self {
            sections,
            deletes: source.position(),
        })
    }

    /// Each client with structs, and the clock after its last one: the state vector.
    pub fn client_ends(&self) -> impl Iterator<Item = (u64, u32)> {
        self.sections
            .iter()
            .map(|section| (section.client, section.end))
    }

    /// What somebody lacks who knows `next_clock` clocks of each client: structs from there on, and all deletes.
    ///
    /// `state` is what these are the parts of. Costs a copy of what is lacking.
    pub fn lacking(&self, state: &[u8], next_clock: impl Fn(u64) -> u32) -> Vec<u8> {
        let lacking = self.sections.iter().filter_map(|section| {
            let known = next_clock(section.client);
            Some((section, section.find(state, known)?, known))
        });
        let lacking: Vec<_> = lacking.collect();
        let structs = lacking
            .iter()
            .map(|(section, from, _)| section.until - from.at);
        let mut update = Vec::with_capacity(
            structs.sum::<usize>() + 32 * (1 + lacking.len()) + (state.len() - self.deletes),
        );
        write_var_uint(&mut update, lacking.len() as u64);
        for (section, from, known) in lacking {
            let id = Id {
                client: section.client,
                clock: from.clock,
            };
            write_var_uint(&mut update, from.left);
            write_var_uint(&mut update, id.client);
            write_var_uint(&mut update, id.clock.max(known).into());
            let mut rest = Source::new(&state[from.at..section.until]);
            if id.clock < known {
                // The bytes were read before, and what is known and new is longer than one.
                let _cut = rest.cut_struct(id, known, &mut update);
            }
            update.extend_from_slice(&state[from.at + rest.position()..section.until]);
        }
        update.extend_from_slice(&state[self.deletes..]);
        update
    }
}

impl Section {
    /// The struct that holds a clock; `None` when all are before it.
    fn find(&self, state: &[u8], clock: u32) -> Option<Mark> {
        if self.end <= clock {
            return None;
        }
        let behind = self.marks.partition_point(|mark| mark.clock <= clock);
        let mut mark = *self.marks.get(behind.saturating_sub(1))?;
        let walked = mark.at;
        let mut source = Source::new(&state[walked..self.until]);
        loop {
            let id = Id {
                client: self.client,
                clock: mark.clock,
            };
            // The bytes were read before: nothing here ends early.
            let end = source.read_struct(id, &mut Pass::Walk).ok()?.end;
            if clock < end {
                return Some(mark);
            }
            mark = Mark {
                clock: end,
                at: walked + source.position(),
                left: mark.left - 1,
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use yrs::updates::decoder::Decode;
    use yrs::{ClientID, Doc, GetString, ReadTxn, StateVector, Text, Transact, Update};

    use super::*;
    use crate::replica::new_doc;

    /// Whoever has any earlier state has the whole one with what it lacked, in which nothing is that it did not lack.
    #[test]
    fn what_is_lacking_makes_an_earlier_state_whole() {
        let edits = prop::collection::vec((0..3_u64, any::<u16>(), any::<bool>()), 1..300);
        proptest!(ProptestConfig::with_cases(40), |(edits in edits, cut in any::<u16>())| {
            let (mut earlier, doc) = (new_doc(), new_doc());
            let cut = usize::from(cut) % edits.len();
            for (number, (client, at, delete)) in edits.iter().enumerate() {
                if number == cut {
                    earlier = copy(&doc);
                }
                edit(&doc, *client, (*at).into(), *delete);
            }
            let state = state_of(&doc);
            let known = earlier.transact().state_vector();
            let parts = Parts::of(&state).unwrap();
            let ends: StateVector = parts
                .client_ends()
                .map(|(client, end)| (ClientID::new(client), end))
                .collect();
            prop_assert_eq!(ends, doc.transact().state_vector());
            let lacking = parts.lacking(&state, |client| known.get(&ClientID::new(client)));
            let by_yrs = doc.transact().encode_state_as_update_v1(&known);
            prop_assert_eq!(lacking.len(), by_yrs.len());
            apply(&earlier, &lacking);
            prop_assert_eq!(text(&earlier), text(&doc));
            prop_assert_eq!(earlier.transact().snapshot(), doc.transact().snapshot());
            prop_assert_eq!(parts.lacking(&state, |_| 0), state);
        });
    }

    #[test]
    fn who_knows_all_gets_the_deletes() {
        let doc = new_doc();
        edit(&doc, 1, 0, false);
        edit(&doc, 1, 0, true);
        let state = state_of(&doc);
        let parts = Parts::of(&state).unwrap();
        assert_eq!(parts.lacking(&state, |_| 3), [0, 1, 2, 1, 0, 1]);
        assert!(Parts::of(&[1, 1]).is_none());
    }

    /// Types "abc" or deletes a character there.
    fn edit(doc: &Doc, client: u64, at: u32, delete: bool) {
        let author = Doc::with_client_id(client + 1);
        apply(&author, &state_of(doc));
        let before = author.transact().state_vector();
        let quill = author.get_or_insert_text("quill");
        let mut txn = author.transact_mut();
        let len = quill.len(&txn);
        if delete && 0 < len {
            quill.remove_range(&mut txn, at % len, 1);
        } else {
            quill.insert(&mut txn, at % (len + 1), "abc");
        }
        drop(txn);
        apply(doc, &author.transact().encode_state_as_update_v1(&before));
    }

    fn copy(doc: &Doc) -> Doc {
        let copy = new_doc();
        apply(&copy, &state_of(doc));
        copy
    }

    fn apply(doc: &Doc, update: &[u8]) {
        let update = Update::decode_v1(update).unwrap();
        doc.transact_mut().apply_update(update).unwrap();
    }

    fn state_of(doc: &Doc) -> Vec<u8> {
        doc.transact()
            .encode_state_as_update_v1(&StateVector::default())
    }

    fn text(doc: &Doc) -> String {
        let txn = doc.transact();
        txn.get_text("quill")
            .map_or_else(String::new, |text| text.get_string(&txn))
    }
}
