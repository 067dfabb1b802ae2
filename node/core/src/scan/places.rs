//! Where everything in a document is, and whether an update fits there.
//!
//! Everything in a document stands in a *list*: the content of a shared type, or the values that one
//! key of a type has had. An item says its list only when it has no neighbours; else it stands where
//! they stand, which may be as old as the document. `yrs` does not ask whether both neighbours stand
//! in one list, whether the parent is a type at all, how deep types are nested, or whether the values
//! of a key are values that follow each other: it would then read freed memory, stop in the middle of
//! an update, or overflow the stack when a type is deleted. No Yjs client writes such a thing.
//!
//! Neighbours in time are mostly neighbours in place, so what is kept are runs of clocks.

use std::collections::BTreeMap;

use super::Scan;
use super::causal::{Delete, Gap, Walk};
use super::structs::{Content, Id, Pass, Place, Struct};
use super::tails::Tail;
use crate::limits::DOCUMENT_DEPTH_MAX;

/// The places of one document, and how far it is.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// For each client the clock behind its last: the state vector.
    ends: BTreeMap<u64, u32>,
    kept: Kept,
}

/// What stands where. The boxes keep the trees small, which have room for eleven where most documents need one.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Kept {
    clients: BTreeMap<u64, Box<Written>>,
    lists: BTreeMap<Box<List>, ListId>,
    /// What else is known of each list.
    kinds: Vec<Kind>,
}

/// What one client wrote.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Written {
    /// The clocks at which something changes, and what holds from there on.
    runs: Vec<Run>,
    /// What its last clocks hold.
    tail: Tail,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    /// How many nested types are around it.
    depth: u16,
    /// Whether it holds the values of a key.
    keyed: bool,
}

/// An update that does not fit the document. Close the socket (1008).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what} at clock {clock} of client {client}")]
pub struct Misplaced {
    /// What is wrong.
    pub what: &'static str,
    /// Whose item it is.
    pub client: u64,
    /// Its clock.
    pub clock: u32,
}

/// Two devices write under one client id: an update has other content for clocks than the document has. Close the
/// socket (1008); the device has to open the document anew, with an id of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "client id {client} is in use by another device, which wrote something else at clock {clock}; open the document \
     anew to get an id of your own"
)]
pub struct Conflict {
    /// The id.
    pub client: u64,
    /// The first clock that differs.
    pub clock: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum List {
    Root {
        name: Box<[u8]>,
        key: Option<Box<[u8]>>,
    },
    Inside {
        parent: (u64, u32),
        key: Option<Box<[u8]>>,
    },
}

type ListId = usize;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    start: u32,
    at: At,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Collected, or inside or beside what was.
    Nowhere,
    In {
        list: ListId,
        content: Content,
    },
}

impl Places {
    /// How many clocks of a client the document has: its entry in the state vector.
    pub fn next_clock(&self, client: u64) -> u32 {
        self.ends.get(&client).copied().unwrap_or_default()
    }

    /// Whether an update contradicts the end of what one of its clients wrote.
    ///
    /// Costs nothing unless the update has clocks that the document has too.
    pub fn conflict(&self, scan: &Scan<'_>) -> Option<Conflict> {
        scan.sections.iter().find_map(|section| {
            let known = self.next_clock(section.client).min(section.end);
            let tail = &self.kept.clients.get(&section.client)?.tail;
            let mut id = Id {
                client: section.client,
                clock: section.start,
            };
            let mut structs = section.structs;
            while id.clock < known {
                let read = structs.read_struct(id, &mut Pass::Walk).ok()?;
                if let Some(clock) = tail.contradicted_by(id, &read) {
                    let client = id.client;
                    return Some(Conflict { client, clock });
                }
                id.clock = read.end;
            }
            None
        })
    }

    /// Takes in an update, if nothing is [missing](Scan::missing) and it fits.
    ///
    /// What is loaded passes through here too, snapshot first, then the log.
    ///
    /// # Errors
    /// When it does not fit. The update is not to be applied then, and nothing of it is taken in.
    pub fn take(&mut self, scan: &Scan<'_>) -> Result<(), Misplaced> {
        let Self { ends, kept } = self;
        let next_clock = |client: u64| ends.get(&client).copied().unwrap_or_default();
        let lists = kept.kinds.len();
        let mut taken = Ok(());
        let mut superseded = Vec::new();
        let mut walk = Walk::new(scan, next_clock);
        walk.run(|id, read| {
            if taken.is_ok() {
                let values = kept.take_struct(id, read, next_clock(id.client));
                taken = values.map(|values| superseded.extend(values));
            }
        });
        if let Some(left) = scan.not_deleted(&superseded) {
            taken = taken.and(Err(Misplaced {
                what: "several values of a key at once",
                client: left.client,
                clock: left.start,
            }));
        }
        if let Some(Gap { client, clock }) = walk.gap() {
            taken = taken.and(Err(Misplaced {
                what: "something missing",
                client,
                clock,
            }));
        }
        if taken.is_err() {
            for section in &scan.sections {
                kept.forget(section.client, next_clock(section.client));
            }
            kept.kinds.truncate(lists);
            kept.lists.retain(|_, list| *list < lists);
            return taken;
        }
        for section in &scan.sections {
            let end = ends.entry(section.client).or_default();
            *end = section.end.max(*end);
        }
        Ok(())
    }
}

impl Kept {
    /// Takes in a struct of which the document has the clocks before `known`. Answers what the update has to delete:
    /// values of a key that others in the same struct follow. `yrs` deletes only values in structs before it, and
    /// with a deleted type it would leave these behind, in freed memory.
    fn take_struct(
        &mut self,
        id: Id,
        read: &Struct<'_>,
        known: u32,
    ) -> Result<Option<Delete>, Misplaced> {
        let misplaced = |what| Misplaced {
            what,
            client: id.client,
            clock: id.clock,
        };
        let at = self.place(read).map_err(misplaced)?;
        if id.clock < known {
            // What the document has of it decides where the rest goes.
            let before = self.at(Id {
                clock: known - 1,
                ..id
            });
            let same = match (before, at) {
                (At::In { list: before, .. }, At::In { list, .. }) => before == list,
                // `yrs` would put the rest beside what is there, wherever that is.
                (At::In { .. }, At::Nowhere) => {
                    matches!(read.place, Place::Skipped | Place::Collected)
                }
                (At::Nowhere, _) => true,
            };
            if !same {
                return Err(misplaced("other content than the document has"));
            }
        }
        let Written { runs, tail } = &mut **self.clients.entry(id.client).or_default();
        tail.append(id, read);
        if runs.last().is_none_or(|last| last.at != at) {
            runs.push(Run {
                start: id.clock.max(known),
                at,
            });
        }
        let superseded = Delete {
            client: id.client,
            start: id.clock.max(known),
            end: read.end - 1,
        };
        let is_followed = superseded.start < superseded.end
            && matches!(at, At::In { list, content: Content::Value } if self.kinds[list].keyed);
        Ok(is_followed.then_some(superseded))
    }

    fn place(&mut self, read: &Struct<'_>) -> Result<At, &'static str> {
        let (list, has_right) = match read.place {
            Place::Skipped | Place::Collected => return Ok(At::Nowhere),
            Place::Root { name, key } => {
                let list = List::Root {
                    name: name.into(),
                    key: key.map(Box::from),
                };
                (
                    self.list(
                        list,
                        Kind {
                            depth: 0,
                            keyed: key.is_some(),
                        },
                    ),
                    false,
                )
            }
            Place::Inside { parent, key } => {
                let outer = match self.at(parent) {
                    At::Nowhere => return Ok(At::Nowhere),
                    At::In {
                        list,
                        content: Content::Type | Content::Deleted,
                    } => list,
                    At::In { .. } => return Err("a parent that is not a type"),
                };
                let depth = self.kinds[outer].depth + 1;
                if depth > DOCUMENT_DEPTH_MAX {
                    return Err("types nested too deep");
                }
                let parent = (parent.client, parent.clock);
                let list = List::Inside {
                    parent,
                    key: key.map(Box::from),
                };
                (
                    self.list(
                        list,
                        Kind {
                            depth,
                            keyed: key.is_some(),
                        },
                    ),
                    false,
                )
            }
            Place::Beside(origin, right_origin) => {
                let list_of = |id: Option<Id>| match self.at(id?) {
                    At::Nowhere => None,
                    At::In { list, .. } => Some(list),
                };
                match (list_of(origin), list_of(right_origin)) {
                    (None, None) => return Ok(At::Nowhere),
                    (Some(left), Some(right)) if left != right => {
                        return Err("an item between neighbours of different lists");
                    }
                    (Some(list), _) | (None, Some(list)) => (list, right_origin.is_some()),
                }
            }
        };
        // A new value of a key comes behind all others.
        if self.kinds[list].keyed && (has_right || read.content == Content::Text) {
            return Err("a value of a key that no client writes");
        }
        Ok(At::In {
            list,
            content: read.content,
        })
    }

    fn list(&mut self, list: List, kind: Kind) -> ListId {
        let kinds = &mut self.kinds;
        *self.lists.entry(Box::new(list)).or_insert_with(|| {
            kinds.push(kind);
            kinds.len() - 1
        })
    }

    fn at(&self, id: Id) -> At {
        let Some(Written { runs, .. }) = self.clients.get(&id.client).map(Box::as_ref) else {
            return At::Nowhere;
        };
        let after = runs.partition_point(|run| run.start <= id.clock);
        after.checked_sub(1).map_or(At::Nowhere, |run| runs[run].at)
    }

    fn forget(&mut self, client: u64, from: u32) {
        if let Some(written) = self.clients.get_mut(&client) {
            let Written { runs, tail } = &mut **written;
            runs.truncate(runs.partition_point(|run| run.start < from));
            tail.truncate(from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::scan_update;
    use crate::wire::varint::write_var_uint;

    /// A map in the root "r".
    const MAP: &[u8] = &[7, 1, 1, b'r', 1];
    /// Letters in the root "r" and in the root "s", and a value for the key "k" of "r".
    const ABC: &[u8] = &[4, 1, 1, b'r', 3, b'a', b'b', b'c'];
    const IN_S: &[u8] = &[4, 1, 1, b's', 1, b'd'];
    const IN_KEY: &[u8] = &[0x28, 1, 1, b'r', 1, b'k', 1, 126];

    #[test]
    fn both_neighbours_are_in_one_list() {
        let mut places = Places::default();
        take(&mut places, 1, 0, &[ABC, IN_S, IN_KEY]).unwrap();
        for (left, right, fits) in [
            (0, 1, true),
            (2, 0, true),
            (0, 3, false),
            (3, 0, false),
            (0, 4, false),
            (4, 3, false),
        ] {
            let between = [0xC4, 1, left, 1, right, 1, b'x'];
            let taken = take(&mut places.clone(), 2, 0, &[&between]);
            assert_eq!(taken.is_ok(), fits, "between {left} and {right}: {taken:?}");
        }
    }

    #[test]
    fn neighbours_of_neighbours_are_in_the_list_too() {
        let mut places = Places::default();
        take(&mut places, 1, 0, &[ABC, IN_S]).unwrap();
        take(
            &mut places,
            2,
            0,
            &[&[0x84, 1, 2, 1, b'x'], &[0x44, 1, 3, 1, b'y']],
        )
        .unwrap();
        assert!(take(&mut places.clone(), 3, 0, &[&[0xC4, 2, 0, 1, 1, 1, b'z']]).is_ok());
        assert!(take(&mut places.clone(), 3, 0, &[&[0xC4, 2, 0, 2, 1, 1, b'z']]).is_err());
    }

    #[test]
    fn values_of_a_key_are_values_and_follow_each_other() {
        let mut places = Places::default();
        take(&mut places, 1, 0, &[IN_KEY]).unwrap();
        for (what, item, fits) in [
            ("a value", &[0xA8, 1, 0, 1, 126][..], true),
            ("a type", &[0xA7, 1, 0, 1], true),
            ("text", &[0xA4, 1, 0, 1, b'x'], false),
            ("an embed", &[0xA5, 1, 0, 2, b'{', b'}'], false),
            ("a value before it", &[0x68, 1, 0, 1, 126], false),
        ] {
            assert_eq!(
                take(&mut places.clone(), 2, 0, &[item]).is_ok(),
                fits,
                "{what}"
            );
        }
        let text_of_another_key = [0x24, 1, 1, b'r', 1, b'l', 1, b'x'];
        assert!(take(&mut places, 2, 0, &[&text_of_another_key]).is_err());
    }

    /// A client that keeps what it deletes joins values that it has overwritten, and sends them so.
    #[test]
    fn of_several_values_of_a_key_all_but_the_last_are_deleted() {
        let values = [0x28, 1, 1, b'r', 1, b'k', 3, 126, 126, 126];
        let gone = [0x21, 1, 1, b'r', 1, b'k', 3];
        let fits = |item: &[u8], deletes: &[u8]| {
            let update = [&[1, 1, 1, 0], item, deletes].concat();
            Places::default()
                .take(&scan_update(&update).unwrap())
                .is_ok()
        };
        assert!(!fits(&values, &[0]));
        assert!(!fits(&values, &[1, 1, 1, 1, 2]), "the first is left");
        assert!(!fits(&values, &[1, 1, 1, 0, 1]), "the second is left");
        assert!(!fits(&values, &[1, 2, 1, 0, 3]), "another client's");
        assert!(fits(&values, &[1, 1, 1, 0, 2]));
        assert!(fits(&values, &[1, 1, 2, 0, 1, 1, 1]), "in two ranges");
        assert!(fits(&gone, &[0]), "what is gone needs no deletion");
    }

    #[test]
    fn parents_are_types_or_were() {
        let mut places = Places::default();
        let deleted = [1, 1, 1, b'r', 4];
        take(&mut places, 1, 0, &[MAP, ABC, &deleted, &[0, 2]]).unwrap();
        for (parent, fits) in [(0, true), (2, false), (5, true), (8, true), (9, true)] {
            let taken = take(&mut places.clone(), 2, 0, &[&[4, 0, 1, parent, 1, b'x']]);
            assert_eq!(taken.is_ok(), fits, "inside {parent}: {taken:?}");
        }
    }

    /// Two devices with one client id.
    #[test]
    fn what_goes_on_goes_on_where_it_was() {
        let mut places = Places::default();
        take(&mut places, 1, 0, &[ABC]).unwrap();
        // "cx" of client 1 behind its "b", where the document has only "c"
        let goes_on = [1, 1, 1, 2, 0x84, 1, 1, 2, b'c', b'x', 0];
        take(&mut places, 2, 0, &[IN_S]).unwrap();
        assert!(places.clone().take(&scan_update(&goes_on).unwrap()).is_ok());
        let elsewhere = [1, 1, 1, 2, 0x84, 2, 0, 2, b'c', b'x', 0];
        assert!(places.take(&scan_update(&elsewhere).unwrap()).is_err());
    }

    #[test]
    fn who_writes_something_else_under_the_same_id_is_found_out() {
        let mut places = Places::default();
        take(&mut places, 1, 0, &[ABC, IN_S, IN_KEY]).unwrap();
        let conflict = |start: u8, structs: &[&[u8]]| {
            let count = u8::try_from(structs.len()).unwrap();
            let update = [&[1, count, 1, start], structs.concat().as_slice(), &[0]].concat();
            let found = places.conflict(&scan_update(&update).unwrap());
            found.map(|conflict| (conflict.client, conflict.clock))
        };
        let abx = [4, 1, 1, b'r', 3, b'a', b'b', b'x'];
        let two = [4, 1, 1, b'r', 2, b'a', b'b'];
        let rest = [0x84, 1, 1, 1, b'c'];
        for (what, found, expected) in [
            ("the same", conflict(0, &[ABC, IN_S, IN_KEY]), None),
            (
                "the same in other pieces",
                conflict(0, &[&two, &rest]),
                None,
            ),
            (
                "a part of the same",
                conflict(2, &[&[0x84, 1, 1, 2, b'c', b'd']]),
                None,
            ),
            ("deleted since", conflict(0, &[&[0, 3], IN_S]), None),
            ("nothing of it", conflict(5, &[IN_S]), None),
            ("another letter", conflict(0, &[&abx]), Some((1, 2))),
            (
                "another letter, and more",
                conflict(2, &[&[0x84, 1, 1, 3, b'x', b'd', b'x']]),
                Some((1, 2)),
            ),
            (
                "another kind",
                conflict(3, &[&[1, 1, 1, b's', 1], IN_S]),
                Some((1, 4)),
            ),
            ("text for a value", conflict(4, &[IN_S]), Some((1, 4))),
        ] {
            assert_eq!(found, expected, "{what}");
        }
    }

    /// Long after, the place where two parted is forgotten; where the first of them is now is known.
    #[test]
    fn the_end_of_what_a_client_wrote_is_remembered() {
        let mut places = Places::default();
        for clock in 0..1_000_u16 {
            let letter = b'a' + u8::try_from(clock % 26).unwrap();
            take(&mut places, 1, clock.into(), &[&[4, 1, 1, b'r', 1, letter]]).unwrap();
        }
        let at = |clock: u64, letter: u8| {
            let mut update = vec![1, 1, 1];
            write_var_uint(&mut update, clock);
            update.extend([4, 1, 1, b'r', 1, letter, 0]);
            places.conflict(&scan_update(&update).unwrap()).is_some()
        };
        assert!(at(999, b'?') && !at(999, b'l') && at(900, b'?') && !at(10, b'?'));
    }

    #[test]
    fn what_does_not_fit_leaves_nothing_behind() {
        let mut places = Places::default();
        take(&mut places, 1, 0, &[ABC]).unwrap();
        let kept = places.kept.clone();
        let in_new = [4, 1, 1, b'n', 1, b'x'];
        take(&mut places, 1, 3, &[&in_new, &[0xC4, 1, 3, 1, 0, 1, b'y']]).unwrap_err();
        assert_eq!(places.kept, kept);
        assert_eq!(places.next_clock(1), 3);
    }

    /// Whatever else a client says of what the document has: the rest of it goes where that is.
    #[test]
    fn the_rest_of_a_struct_stays_with_what_the_document_has_of_it() {
        let mut places = Places::default();
        take(&mut places, 1, 0, &[&[0, 1], IN_KEY]).unwrap();
        let beside_what_is_collected = [0x84, 1, 0, 2, b'x', b'y'];
        assert!(take(&mut places.clone(), 1, 1, &[&beside_what_is_collected]).is_err());
        // It was deleted with all around it, and so is what came after.
        take(&mut places, 1, 1, &[&[0, 3]]).unwrap();
    }

    #[test]
    fn types_inside_each_other_are_bounded() {
        let allowed = usize::from(DOCUMENT_DEPTH_MAX) + 1;
        assert!(
            Places::default()
                .take(&scan_update(&nested(allowed)).unwrap())
                .is_ok()
        );
        for depth in [allowed + 1, 10_000] {
            let too_deep = Places::default().take(&scan_update(&nested(depth)).unwrap());
            assert_eq!(too_deep.unwrap_err().what, "types nested too deep");
        }
    }

    /// Each map comes in an update of its own, from another client.
    #[test]
    fn nesting_one_by_one_is_bounded_too() {
        let mut places = Places::default();
        let taken = (1..10_000_u64)
            .take_while(|&client| {
                let map = if client == 1 {
                    MAP.to_vec()
                } else {
                    inside(client - 1, 0)
                };
                take(&mut places, client, 0, &[&map]).is_ok()
            })
            .count();
        assert_eq!(taken, usize::from(DOCUMENT_DEPTH_MAX) + 1);
    }

    #[test]
    fn what_stands_side_by_side_is_not_deep() {
        let beside: Vec<_> = (0..100).map(|clock| vec![0x87, 1, clock, 1]).collect();
        let maps: Vec<&[u8]> = std::iter::once(MAP)
            .chain(beside.iter().map(Vec::as_slice))
            .collect();
        let mut places = Places::default();
        take(&mut places, 1, 0, &maps).unwrap();
        assert_eq!(places.kept.clients[&1].runs.len(), 1);
        assert_eq!(
            places.kept.kinds,
            [Kind {
                depth: 0,
                keyed: false
            }]
        );
    }

    /// Has the document take structs of a client.
    fn take(
        places: &mut Places,
        client: u64,
        clock: u32,
        structs: &[&[u8]],
    ) -> Result<(), Misplaced> {
        let mut update = vec![1];
        write_var_uint(&mut update, structs.len() as u64);
        write_var_uint(&mut update, client);
        write_var_uint(&mut update, clock.into());
        update.extend(structs.concat());
        update.push(0);
        places.take(&scan_update(&update).unwrap())
    }

    /// Maps inside each other, of client 1.
    fn nested(depth: usize) -> Vec<u8> {
        let mut update = vec![1];
        write_var_uint(&mut update, depth as u64);
        update.extend([1, 0]);
        update.extend(MAP);
        for clock in 0..depth as u64 - 1 {
            update.extend(inside(1, clock));
        }
        update.push(0);
        update
    }

    fn inside(client: u64, clock: u64) -> Vec<u8> {
        let mut bytes = vec![0x27, 0];
        write_var_uint(&mut bytes, client);
        write_var_uint(&mut bytes, clock);
        bytes.extend([1, b'k', 1]);
        bytes
    }
}
