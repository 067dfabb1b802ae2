//! How deep a document's shared types are nested.
//!
//! `yrs` loads ten thousand types inside each other and overflows the stack later, when one is
//! deleted. An update does not tell: an item belongs where its neighbour belongs, and that may be old.
//! So the depth of every clock is kept, as runs: neighbours in time are mostly neighbours in place.

use std::collections::BTreeMap;

use super::Scan;
use super::causal::Walk;
use super::structs::{Id, Place};
use crate::limits::DOCUMENT_DEPTH_MAX;

/// Depth of everything in one document: how many nested types are around it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Depths {
    /// For each client the clocks at which the depth changes, and the depth from there on.
    runs: BTreeMap<u64, Vec<(u32, u16)>>,
}

/// Something is nested deeper than [`DOCUMENT_DEPTH_MAX`]. Close the socket (1008).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("more than {DOCUMENT_DEPTH_MAX} shared types inside each other")]
pub struct TooDeep;

impl Depths {
    /// Takes in an update of which nothing is [missing](Scan::missing).
    ///
    /// `next_clock` is the document's state vector before the update. Also what is loaded passes
    /// through here: snapshot first, then the log.
    ///
    /// # Errors
    /// When it would nest types too deep. The update is not to be applied then, and is not taken in.
    pub fn take(
        &mut self,
        scan: &Scan<'_>,
        next_clock: impl Fn(u64) -> u32,
    ) -> Result<(), TooDeep> {
        let mut deepest = 0;
        Walk::new(scan, &next_clock).run(|id, read| {
            let depth = self.of_place(read.place);
            deepest = deepest.max(depth);
            self.record(
                Id {
                    clock: id.clock.max(next_clock(id.client)),
                    ..id
                },
                depth,
            );
        });
        if deepest <= DOCUMENT_DEPTH_MAX {
            return Ok(());
        }
        for section in &scan.sections {
            self.forget(section.client, next_clock(section.client));
        }
        Err(TooDeep)
    }

    fn of_place(&self, place: Place) -> u16 {
        match place {
            // What is inside something collected is collected too.
            Place::Skipped | Place::Collected | Place::Root => 0,
            Place::Inside(parent) => self.of(parent).saturating_add(1),
            Place::Beside(origin, right_origin) => {
                origin.or(right_origin).map_or(0, |beside| self.of(beside))
            }
        }
    }

    fn of(&self, id: Id) -> u16 {
        let Some(runs) = self.runs.get(&id.client) else {
            return 0;
        };
        let after = runs.partition_point(|(start, _)| *start <= id.clock);
        after.checked_sub(1).map_or(0, |run| runs[run].1)
    }

    fn record(&mut self, id: Id, depth: u16) {
        let runs = self.runs.entry(id.client).or_default();
        if runs.last().is_none_or(|(_, last)| *last != depth) {
            runs.push((id.clock, depth));
        }
    }

    fn forget(&mut self, client: u64, from: u32) {
        if let Some(runs) = self.runs.get_mut(&client) {
            runs.truncate(runs.partition_point(|(start, _)| *start < from));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scan::scan_update;
    use crate::wire::varint::write_var_uint;

    /// A map in the root "r".
    const OUTERMOST: [u8; 5] = [7, 1, 1, b'r', 1];

    #[test]
    fn types_inside_each_other_are_bounded() {
        let allowed = usize::from(DOCUMENT_DEPTH_MAX);
        assert_eq!(
            Depths::default().take(&scan_update(&nested(allowed + 1)).unwrap(), |_| 0),
            Ok(())
        );
        for depth in [allowed + 2, 10_000] {
            let mut depths = Depths::default();
            assert_eq!(
                depths.take(&scan_update(&nested(depth)).unwrap(), |_| 0),
                Err(TooDeep)
            );
            assert!(
                depths.runs.values().all(Vec::is_empty),
                "nothing is taken in"
            );
        }
    }

    /// Each map comes in an update of its own, from another client.
    #[test]
    fn nesting_one_by_one_is_bounded_too() {
        let mut depths = Depths::default();
        let taken = (1..10_000_u64)
            .take_while(|&client| {
                let mut update = vec![1, 1];
                write_var_uint(&mut update, client);
                update.push(0);
                update.extend(if client == 1 {
                    OUTERMOST.to_vec()
                } else {
                    inside(client - 1, 0)
                });
                update.push(0);
                let known = |other| u32::from(other < client);
                depths.take(&scan_update(&update).unwrap(), known).is_ok()
            })
            .count();
        assert_eq!(taken, usize::from(DOCUMENT_DEPTH_MAX) + 1);
    }

    #[test]
    fn what_stands_side_by_side_is_not_deep() {
        let mut update = vec![1];
        write_var_uint(&mut update, 1_000);
        update.extend([1, 0]);
        update.extend(OUTERMOST);
        for clock in 0..999 {
            update.extend([0x87, 1]); // a map right of the one before
            write_var_uint(&mut update, clock);
            update.push(1);
        }
        update.push(0);
        let mut depths = Depths::default();
        assert_eq!(depths.take(&scan_update(&update).unwrap(), |_| 0), Ok(()));
        assert_eq!(depths.runs[&1], [(0, 0)]);
    }

    #[test]
    fn a_neighbour_is_as_deep() {
        let mut depths = Depths::default();
        depths
            .take(&scan_update(&nested(3)).unwrap(), |_| 0)
            .unwrap();
        assert_eq!(depths.runs[&1], [(0, 0), (1, 1), (2, 2)]);
        // Client 2: a letter left of the innermost, and one behind that letter
        let beside = [1, 2, 2, 0, 0x44, 1, 2, 1, b'x', 0x84, 2, 0, 1, b'y', 0];
        depths
            .take(&scan_update(&beside).unwrap(), |client| {
                if client == 1 { 3 } else { 0 }
            })
            .unwrap();
        assert_eq!(depths.runs[&2], [(0, 2)]);
    }

    /// Maps inside each other, of client 1.
    fn nested(depth: usize) -> Vec<u8> {
        let mut update = vec![1];
        write_var_uint(&mut update, depth as u64);
        update.extend([1, 0]);
        update.extend(OUTERMOST);
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
