//! Causal admission: an update is taken only if all that it refers to is there.
//!
//! `yrs` is exact in causal order and wrong out of order, so the order is made before it. A struct
//! can be integrated when the clocks of its client before it, its origins and its parent are known,
//! from the document or from this update. Sections depend on each other in both directions (two
//! people write turn by turn), so they are walked as `yrs` walks them: whoever needs another section
//! waits until that one has come far enough. Who waits for himself waits for ever: a cycle is a gap.

use smallvec::{SmallVec, smallvec};

use super::structs::{Id, Pass, Place, Source, Struct};
use super::{Scan, Section};
use crate::wire::varint::write_var_uint;

/// Something that an update refers to and that is nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// Whose clocks are missing.
    pub client: u64,
    /// The first clock that is needed; what is missing may start before it.
    pub clock: u32,
}

/// Whether an update would change a document.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Novelty {
    /// It adds nothing: the document has all its structs, and it deletes nothing.
    Nothing,
    /// The document has all its structs; whether also its deletes, a state vector does not tell.
    MaybeDeletes,
    /// It has structs that the document has not.
    New,
}

impl Scan<'_> {
    /// The first thing that the update needs and that neither the document nor the update has; `None`
    /// when it may be applied.
    ///
    /// `next_clock` is the document's state vector: the number of clocks it has of a client.
    pub fn missing(&self, next_clock: impl Fn(u64) -> u32) -> Option<Gap> {
        let mut walk = Walk::new(self, next_clock);
        walk.run(|_, _| {});
        walk.gap.or_else(|| self.missing_deletes(&walk))
    }

    /// Whether the update would change a document with this state vector.
    pub fn novelty(&self, next_clock: impl Fn(u64) -> u32) -> Novelty {
        if self
            .sections
            .iter()
            .any(|section| section.end > next_clock(section.client))
        {
            Novelty::New
        } else if self.summary.delete_ranges > 0 {
            Novelty::MaybeDeletes
        } else {
            Novelty::Nothing
        }
    }

    /// The part of the update that may be applied, as an update of its own.
    ///
    /// A client that itself waits for something sends that with all it has, in its step 2. What can
    /// be taken is taken, or its own edits would wait with it. Nothing that the document has
    /// already is in the result, except deletes. Needs no second scan: nothing is missing in it.
    pub fn admissible(&self, next_clock: impl Fn(u64) -> u32) -> Vec<u8> {
        let mut walk = Walk::new(self, next_clock);
        walk.overlap = Overlap::IsCut;
        walk.run(|_, _| {});
        let mut update = Vec::new();
        let taken: Vec<_> = walk
            .sections
            .iter()
            .filter(|section| section.taken > 0)
            .collect();
        write_var_uint(&mut update, taken.len() as u64);
        for section in taken {
            section.write_taken(&mut update);
        }
        self.write_admissible_deletes(&walk, &mut update);
        update
    }

    fn missing_deletes(&self, walk: &Walk<'_, impl Fn(u64) -> u32>) -> Option<Gap> {
        let mut deletes = self.deletes();
        let beyond = |delete: &Delete| delete.end > walk.reached(delete.client);
        let Delete { client, .. } = deletes.find(beyond)?;
        Some(Gap {
            client,
            clock: walk.reached(client),
        })
    }

    fn write_admissible_deletes(&self, walk: &Walk<'_, impl Fn(u64) -> u32>, update: &mut Vec<u8>) {
        let mut clients: Vec<(u64, Vec<(u32, u32)>)> = Vec::new();
        for Delete { client, start, end } in self.deletes() {
            let end = end.min(walk.reached(client));
            if start >= end {
                continue;
            }
            match clients.last_mut() {
                Some((last, ranges)) if *last == client => ranges.push((start, end - start)),
                _ => clients.push((client, vec![(start, end - start)])),
            }
        }
        write_var_uint(update, clients.len() as u64);
        for (client, ranges) in clients {
            write_var_uint(update, client);
            write_var_uint(update, ranges.len() as u64);
            for (start, len) in ranges {
                write_var_uint(update, start.into());
                write_var_uint(update, len.into());
            }
        }
    }

    /// The first of these that the update does not delete as a whole.
    pub(super) fn not_deleted(&self, clocks: &[Delete]) -> Option<Delete> {
        if clocks.is_empty() {
            return None;
        }
        let mut deletes: Vec<Delete> = Vec::new();
        for delete in self.deletes() {
            match deletes.last_mut() {
                Some(last) if (last.client, last.end) == (delete.client, delete.start) => {
                    last.end = delete.end;
                }
                _ => deletes.push(delete),
            }
        }
        deletes.sort_unstable();
        let is_deleted = |clocks: &Delete| {
            let begins =
                |delete: &Delete| (delete.client, delete.start) <= (clocks.client, clocks.start);
            let behind = deletes.partition_point(begins);
            let before = behind.checked_sub(1).map(|at| deletes[at]);
            before.is_some_and(|at| at.client == clocks.client && clocks.end <= at.end)
        };
        clocks.iter().find(|clocks| !is_deleted(clocks)).copied()
    }

    fn deletes(&self) -> impl Iterator<Item = Delete> {
        let (mut source, mut clients, mut ranges, mut client) =
            (self.deletes, self.delete_clients, 0, 0);
        // The bytes were checked: nothing here ends early.
        std::iter::from_fn(move || {
            if ranges == 0 {
                clients = clients.checked_sub(1)?;
                client = source.client().ok()?;
                ranges = source.count(1).ok()?;
            }
            ranges = ranges.checked_sub(1)?;
            let start = source.clock().ok()?;
            let end = source.end_of(start).ok()?;
            Some(Delete { client, start, end })
        })
    }
}

/// Deleted clocks of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Delete {
    pub(super) client: u64,
    pub(super) start: u32,
    pub(super) end: u32,
}

/// How far each section can be integrated into the document.
pub(super) struct Walk<'a, F> {
    sections: SmallVec<[Cursor<'a>; 1]>,
    next_clock: F,
    overlap: Overlap,
    /// The first need that cannot be met.
    gap: Option<Gap>,
}

/// What a struct is that names its parent while its first clocks are known.
///
/// They may be in another parent. `yrs` would put the rest into this one, behind a neighbour in the
/// other, and read memory that is not there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Overlap {
    /// A gap: the client is asked and sends the rest beside its neighbour.
    IsGap,
    /// Cut here, and put beside its neighbour.
    IsCut,
}

/// A section while it is walked.
struct Cursor<'a> {
    client: u64,
    /// How many of the client's clocks the document has.
    known: u32,
    /// How many it would have with what was walked.
    reached: u32,
    end: u32,
    /// Clock of the struct that `rest` starts with.
    clock: u32,
    rest: Source<'a>,
    state: State,
    /// What is new to the document of that which was walked, as structs that follow each other.
    taken: u64,
    taken_from: u32,
    taken_structs: Source<'a>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Ready,
    /// Waits for another section.
    Waiting,
    /// Needs what is nowhere.
    Stuck,
}

impl<'a, F: Fn(u64) -> u32> Walk<'a, F> {
    pub(super) fn new(scan: &Scan<'a>, next_clock: F) -> Self {
        let mut gap = None;
        let cursor = |section: &Section<'a>| {
            let known = next_clock(section.client);
            let follows = section.start <= known;
            if !follows {
                gap.get_or_insert(Gap {
                    client: section.client,
                    clock: known,
                });
            }
            Cursor {
                client: section.client,
                known,
                reached: known,
                end: section.end,
                clock: section.start,
                rest: section.structs,
                // A section that the document has already needs no walk.
                state: if follows { State::Ready } else { State::Stuck },
                taken: 0,
                taken_from: section.start,
                taken_structs: section.structs,
            }
        };
        let sections = scan.sections.iter().map(cursor).collect();
        Self {
            sections,
            next_clock,
            overlap: Overlap::IsGap,
            gap,
        }
    }

    /// Walks as far as it goes. Calls `visit` with each struct that the document has not, in an order
    /// in which they can be integrated.
    pub(super) fn run(&mut self, mut visit: impl FnMut(Id, &Struct<'a>)) {
        for section in 0..self.sections.len() {
            self.advance(section, &mut visit);
        }
    }

    /// The first need that cannot be met.
    pub(super) fn gap(&self) -> Option<Gap> {
        self.gap
    }

    /// Walks a section to its end, and others as far as it needs them.
    fn advance(&mut self, section: usize, visit: &mut impl FnMut(Id, &Struct<'a>)) {
        // Each waits for the next one to reach a clock.
        let mut waiting: SmallVec<[(usize, u32); 4]> =
            smallvec![(section, self.sections[section].end)];
        while let Some(&(section, until)) = waiting.last() {
            let cursor = &self.sections[section];
            if cursor.reached >= until || cursor.state == State::Stuck {
                let state = &mut self.sections[section].state;
                if *state == State::Waiting {
                    *state = State::Ready;
                }
                waiting.pop();
                continue;
            }
            match self.step(section, visit) {
                Ok(()) => {}
                Err(need) => match self.find(need.client) {
                    Some(other) if self.can_reach(other, need.clock) => {
                        self.sections[section].state = State::Waiting;
                        waiting.push((other, need.clock + 1));
                    }
                    _ => {
                        self.gap.get_or_insert(need);
                        for (section, _) in waiting.drain(..) {
                            self.sections[section].state = State::Stuck;
                        }
                    }
                },
            }
        }
    }

    /// Walks one struct, or says what it needs first.
    fn step(&mut self, section: usize, visit: &mut impl FnMut(Id, &Struct<'a>)) -> Result<(), Gap> {
        let cursor = &self.sections[section];
        let known = cursor.reached;
        let mut rest = cursor.rest;
        let id = Id {
            client: cursor.client,
            clock: cursor.clock,
        };
        let gap = Gap {
            client: id.client,
            clock: known,
        };
        // The bytes were checked: this does not fail.
        let read = rest.read_struct(id, &mut Pass::Walk).map_err(|_| gap)?;
        let is_new = read.end > known;
        if is_new {
            let follows = match read.place {
                Place::Skipped => false,
                Place::Root { .. } | Place::Inside { .. } => {
                    id.clock >= known || self.overlap == Overlap::IsCut
                }
                Place::Beside(..) | Place::Collected => true,
            };
            if !follows {
                return Err(gap);
            }
            for Id { client, clock } in read.place.refers_to().filter(|to| to.client != id.client) {
                if clock >= self.reached(client) {
                    return Err(Gap { client, clock });
                }
            }
            visit(id, &read);
        }
        let cursor = &mut self.sections[section];
        if is_new {
            if cursor.taken == 0 {
                (cursor.taken_from, cursor.taken_structs) = (cursor.clock, cursor.rest);
            }
            cursor.taken += 1;
            cursor.reached = read.end;
        }
        (cursor.clock, cursor.rest) = (read.end, rest);
        Ok(())
    }

    fn can_reach(&self, section: usize, clock: u32) -> bool {
        let cursor = &self.sections[section];
        cursor.state == State::Ready && clock < cursor.end
    }

    fn reached(&self, client: u64) -> u32 {
        match self.find(client) {
            Some(section) => self.sections[section].reached,
            None => (self.next_clock)(client),
        }
    }

    fn find(&self, client: u64) -> Option<usize> {
        self.sections
            .binary_search_by(|cursor| client.cmp(&cursor.client))
            .ok()
    }
}

impl Cursor<'_> {
    /// Writes what was taken as a section.
    fn write_taken(&self, update: &mut Vec<u8>) {
        let start = self.taken_from.max(self.known);
        write_var_uint(update, self.taken);
        write_var_uint(update, self.client);
        write_var_uint(update, start.into());
        let mut structs = self.taken_structs;
        if self.taken_from < self.known {
            let id = Id {
                client: self.client,
                clock: self.taken_from,
            };
            // The bytes were checked, and what is known and new is longer than one.
            let _cut = structs.cut_struct(id, self.known, update);
        }
        update.extend_from_slice(structs.up_to(&self.rest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::scan_update;

    /// One letter of client 1, behind the root's start.
    fn a0() -> Vec<u8> {
        vec![4, 1, 1, b't', 1, b'a']
    }

    #[test]
    fn a_section_follows_what_the_document_has() {
        // "b" of client 1 at clock 3
        let update = update(&[(1, 3, vec![after(1, 2)])]);
        assert_eq!(
            missing(&update, &[]),
            Some(Gap {
                client: 1,
                clock: 0
            })
        );
        assert_eq!(
            missing(&update, &[(1, 2)]),
            Some(Gap {
                client: 1,
                clock: 2
            })
        );
        assert_eq!(missing(&update, &[(1, 3)]), None);
        assert_eq!(missing(&update, &[(1, 9)]), None);
    }

    #[test]
    fn origins_and_parents_are_known() {
        let in_parent = vec![7, 0, 9, 4, 1]; // a map inside 9:4
        for item in [after(9, 4), before(9, 4), in_parent] {
            let update = update(&[(1, 0, vec![item.clone()])]);
            assert_eq!(
                missing(&update, &[(9, 4)]),
                Some(Gap {
                    client: 9,
                    clock: 4
                }),
                "{item:?}"
            );
            assert_eq!(missing(&update, &[(9, 5)]), None, "{item:?}");
        }
    }

    #[test]
    fn what_the_document_has_needs_nothing() {
        let update = update(&[(1, 0, vec![after(9, 4), after(9, 5)])]);
        assert_eq!(missing(&update, &[(1, 2)]), None);
        assert_eq!(
            missing(&update, &[(1, 1)]),
            Some(Gap {
                client: 9,
                clock: 5
            })
        );
    }

    #[test]
    fn sections_may_take_turns() {
        // 1:0, 2:0 behind it, 1:1 behind that, and so on
        let mut turns = [
            (1, 0, vec![a0(), after(2, 0), after(2, 1)]),
            (2, 0, vec![after(1, 0), after(1, 1)]),
        ];
        assert_eq!(missing(&update(&turns), &[]), None);
        turns.reverse();
        assert_eq!(missing(&update(&turns), &[]), None);
    }

    #[test]
    fn a_cycle_is_a_gap() {
        let cycle = update(&[(1, 0, vec![after(2, 0)]), (2, 0, vec![after(1, 0)])]);
        assert!(missing(&cycle, &[]).is_some());
        let three = update(&[
            (3, 0, vec![after(1, 0)]),
            (2, 0, vec![after(3, 0)]),
            (1, 0, vec![after(2, 0)]),
        ]);
        assert!(missing(&three, &[]).is_some());
        assert_eq!(missing(&three, &[(2, 1)]), None);
    }

    #[test]
    fn deletes_are_of_what_is_known() {
        let delete = [0, 1, 1, 1, 4, 2]; // 1:4 and 1:5
        assert_eq!(
            missing(&delete, &[(1, 5)]),
            Some(Gap {
                client: 1,
                clock: 5
            })
        );
        assert_eq!(missing(&delete, &[(1, 6)]), None);
        let typed_and_deleted = [&update(&[(1, 0, vec![a0()])])[..10], &[1, 1, 1, 0, 1]].concat();
        assert_eq!(missing(&typed_and_deleted, &[]), None);
    }

    #[test]
    fn a_skip_is_of_what_the_document_has() {
        let skip = update(&[(1, 0, vec![vec![10, 3], after(1, 2)])]);
        assert_eq!(
            missing(&skip, &[(1, 2)]),
            Some(Gap {
                client: 1,
                clock: 2
            })
        );
        assert_eq!(missing(&skip, &[(1, 3)]), None);
        assert_eq!(scan_update(&skip).unwrap().summary().skips, 1);
    }

    /// The first letters of a text came before, and maybe they are not in this text.
    #[test]
    fn what_names_its_parent_is_all_new() {
        let abc = update(&[(1, 0, vec![vec![4, 1, 1, b't', 3, b'a', b'b', b'c']])]);
        assert_eq!(missing(&abc, &[]), None);
        assert_eq!(missing(&abc, &[(1, 3)]), None);
        assert_eq!(
            missing(&abc, &[(1, 2)]),
            Some(Gap {
                client: 1,
                clock: 2
            })
        );
        let c_behind_b = update(&[(1, 2, vec![after(1, 1)])]);
        assert_eq!(missing(&c_behind_b, &[(1, 2)]), None);
        let bc_behind_a = update(&[(1, 1, vec![vec![0x84, 1, 0, 2, b'b', b'c']])]);
        assert_eq!(missing(&bc_behind_a, &[(1, 2)]), None);
    }

    #[test]
    fn deletes_are_maybe_new() {
        let delete = [0, 1, 1, 1, 0, 1];
        let novelty = |update: &[u8], clock| scan_update(update).unwrap().novelty(|_| clock);
        assert_eq!(novelty(&delete, 1), Novelty::MaybeDeletes);
        let typed = update(&[(1, 0, vec![a0()])]);
        assert_eq!(novelty(&typed, 0), Novelty::New);
        assert_eq!(novelty(&typed, 1), Novelty::Nothing);
    }

    #[test]
    fn what_can_be_taken_is_taken() {
        // Client 1 has typed; it waits for something of client 5, and has deleted some of that.
        let sections = [
            (5, 2, vec![after(5, 1)]),
            (3, 0, vec![after(1, 0), vec![10, 4], after(3, 3)]),
            (1, 0, vec![a0(), after(1, 0), after(5, 2)]),
        ];
        let mut waits = update(&sections);
        waits.pop();
        waits.extend([2, 5, 1, 2, 1, 1, 2, 0, 1, 1, 2]);

        let taken = admissible(&waits, &[(1, 1)]);
        let mut expected = update(&[(3, 0, vec![after(1, 0)]), (1, 1, vec![after(1, 0)])]);
        expected.pop();
        expected.extend([1, 1, 2, 0, 1, 1, 1]);
        assert_eq!(taken, expected);
        assert_eq!(missing(&taken, &[(1, 1)]), None);
    }

    #[test]
    fn what_the_document_has_is_cut_off() {
        let root = |content: &[u8]| [&[content[0], 1, 1, b't'][..], &content[1..]].concat();
        let behind =
            |flags: u8, content: &[u8]| [&[content[0] | flags, 1, 0][..], &content[1..]].concat();
        let cases: [(Vec<u8>, Vec<u8>); 6] = [
            (
                root(&[4, 3, b'a', b'b', b'c']),
                behind(0x80, &[4, 2, b'b', b'c']),
            ),
            (
                root(&[8, 3, 126, 125, 5, 120]),
                behind(0x80, &[8, 2, 125, 5, 120]),
            ),
            (root(&[1, 9]), behind(0x80, &[1, 8])),
            (vec![0, 9], vec![0, 8]),
            // half a surrogate pair
            (
                root(&[4, 5, 0xF0, 0x9F, 0x98, 0x80, b'x']),
                behind(0x80, &[4, 4, 0xEF, 0xBF, 0xBD, b'x']),
            ),
            // between 2:0 and 3:0
            (
                vec![0xC4, 2, 0, 3, 0, 2, b'a', b'b'],
                vec![0xC4, 1, 0, 3, 0, 1, b'b'],
            ),
        ];
        for (whole, rest) in cases {
            let whole = update(&[(1, 0, vec![whole, after(1, 0)])]);
            let rest = update(&[(1, 1, vec![rest, after(1, 0)])]);
            assert_eq!(admissible(&whole, &[(1, 1), (2, 1), (3, 1)]), rest);
            assert_eq!(missing(&rest, &[(1, 1), (2, 1), (3, 1)]), None);
        }
    }

    #[test]
    fn nothing_can_be_taken_of_a_cycle() {
        let cycle = update(&[(2, 0, vec![after(1, 0)]), (1, 0, vec![after(2, 0)])]);
        assert_eq!(admissible(&cycle, &[]), [0, 0]);
    }

    /// Long chains of waiting take neither stack nor quadratic time.
    #[test]
    fn many_sections_may_wait_for_each_other() {
        let clients: Vec<u64> = (1..=20_000).rev().collect();
        let mut chain = Vec::new();
        write_var_uint(&mut chain, clients.len() as u64);
        for client in clients {
            write_var_uint(&mut chain, 1);
            write_var_uint(&mut chain, client);
            chain.push(0);
            if client == 1 {
                chain.extend(a0());
            } else {
                chain.extend(after(client - 1, 0));
            }
        }
        chain.push(0);
        assert_eq!(missing(&chain, &[]), None);
    }

    /// An update of (client, first clock, structs) and no deletes.
    fn update(sections: &[(u64, u32, Vec<Vec<u8>>)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_var_uint(&mut bytes, sections.len() as u64);
        for (client, clock, structs) in sections {
            write_var_uint(&mut bytes, structs.len() as u64);
            write_var_uint(&mut bytes, *client);
            write_var_uint(&mut bytes, (*clock).into());
            bytes.extend(structs.concat());
        }
        bytes.push(0);
        bytes
    }

    /// A letter right of another.
    fn after(client: u64, clock: u8) -> Vec<u8> {
        beside(0x84, client, clock)
    }

    /// A letter left of another.
    fn before(client: u64, clock: u8) -> Vec<u8> {
        beside(0x44, client, clock)
    }

    fn beside(info: u8, client: u64, clock: u8) -> Vec<u8> {
        let mut bytes = vec![info];
        write_var_uint(&mut bytes, client);
        bytes.extend([clock, 1, b'x']);
        bytes
    }

    fn known(state_vector: &[(u64, u32)]) -> impl Fn(u64) -> u32 {
        |client| {
            state_vector
                .iter()
                .find(|(known, _)| *known == client)
                .map_or(0, |(_, clock)| *clock)
        }
    }

    fn missing(update: &[u8], state_vector: &[(u64, u32)]) -> Option<Gap> {
        scan_update(update).unwrap().missing(known(state_vector))
    }

    fn admissible(update: &[u8], state_vector: &[(u64, u32)]) -> Vec<u8> {
        scan_update(update).unwrap().admissible(known(state_vector))
    }
}
