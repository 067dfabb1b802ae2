//! The Yjs V1 update scanner: is this safe to apply, and is all it refers to here?
//!
//! `yrs` believes what an update says: a few bytes can make it reserve gigabytes, deep nesting aborts
//! the process, and an update that refers to what is missing can leave a document that can no longer
//! be encoded. So nothing reaches `yrs`, the log or another client that was not scanned first.
//! [`scan_update`] checks shape and bounds, [`Scan::missing`] that the update is causally complete,
//! [`Places::take`] that it fits the document. What was taken once is read by [`scan_stored`], without the
//! bounds: a document may have more of everything than one update may bring.
//!
//! An update is
//!
//! ```text
//! number of sections, then each: number of structs, client, clock of the first, the structs
//! number of clients,  then each: client, number of ranges, then each: clock, length (the deletes)
//! ```
//!
//! A section is one client's consecutive structs (`structs.rs` has their layout). The scanner accepts
//! less than Yjs reads and all that Yjs 13.6 and `yrs` write in causal order: known content in its
//! shortest form, nothing empty, nothing twice, nothing behind the end. An update of one client, as all
//! but the first of a session are, is scanned without allocation, unless it has an embed or a format.

mod causal;
mod cut;
mod places;
mod structs;
mod tails;

use smallvec::SmallVec;

use crate::limits::{
    STATE_VECTOR_CLIENTS_MAX, UPDATE_DELETE_RANGES_MAX, UPDATE_STRUCTS_MAX,
    UPDATE_SUBDOCUMENTS_MAX, UPDATE_VALUES_MAX,
};

pub use causal::{Gap, Novelty};
pub use cut::Parts;
pub use places::{Conflict, Misplaced, Places};
pub use structs::Id;
use structs::{Pass, Source};

/// Why bytes are not an update, or not one that this server takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ScanError {
    /// It is not what a Yjs client writes. Close the socket (1007): sent again it is no better.
    #[error("malformed at byte {at}: {what}")]
    Malformed {
        /// Where the scanner stood.
        at: usize,
        /// What is wrong there.
        what: &'static str,
    },
    /// It has more of something than an update may have. Close the socket (1009).
    #[error("more than {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The most that is allowed.
        max: u64,
    },
    /// A Yjs client may write it, but `yrs` would store something else. Tell the client why its
    /// edits are not saved.
    #[error("{what} at byte {at} cannot be stored")]
    Unsupported {
        /// Where the scanner stood.
        at: usize,
        /// What it is.
        what: &'static str,
    },
}

/// An update that was found sound.
#[derive(Debug, Clone)]
pub struct Scan<'a> {
    /// By client, highest first, as Yjs writes them.
    sections: SmallVec<[Section<'a>; 1]>,
    deletes: Source<'a>,
    delete_clients: u64,
    summary: Summary,
}

/// How much there is in an update.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Clients with structs.
    pub clients: u64,
    /// Structs: the pieces of content, live or deleted.
    pub structs: u64,
    /// Their clocks: each UTF-16 unit of a text, each value.
    pub clocks: u64,
    /// Ranges of deleted clocks.
    pub delete_ranges: u64,
    /// The clocks in them.
    pub deleted_clocks: u64,
    /// Nested shared types (maps, arrays, texts, XML nodes) among the structs.
    pub types: u64,
    /// Subdocuments among the structs.
    pub subdocuments: u64,
    /// JSON-like values in arrays, maps and options of subdocuments.
    pub values: u64,
    /// Placeholders for clocks that the update leaves out. Those who get such an update must have
    /// them already.
    pub skips: u64,
}

/// One client's structs, from `start` to before `end`, without a hole.
#[derive(Debug, Clone, Copy)]
struct Section<'a> {
    client: u64,
    start: u32,
    end: u32,
    /// From the first struct to the end of the update.
    structs: Source<'a>,
}

/// Checks a V1 update that a client sent.
///
/// Costs one pass over the bytes.
///
/// # Errors
/// When it is not an update that this server takes; the variant says what the client is told.
pub fn scan_update(bytes: &[u8]) -> Result<Scan<'_>, ScanError> {
    let scan = scan_stored(bytes)?;
    scan.summary.check_bounds()?;
    Ok(scan)
}

/// Checks a V1 update that is from this server: a row of the log, a whole state, what another owner relays. There may be more
/// in it than [`scan_update`] takes from a client, whose updates have added up to it.
///
/// Costs one pass over the bytes.
///
/// # Errors
/// When it was not written by this server.
pub fn scan_stored(bytes: &[u8]) -> Result<Scan<'_>, ScanError> {
    let mut source = Source::new(bytes);
    let mut summary = Summary::default();

    let mut sections = SmallVec::new();
    for _ in 0..source.count(Section::BYTES_MIN)? {
        sections.push(Section::scan(&mut source, &mut summary)?);
    }
    sections.sort_unstable_by_key(|section: &Section<'_>| std::cmp::Reverse(section.client));
    if sections
        .windows(2)
        .any(|pair| pair[0].client == pair[1].client)
    {
        return Err(source.malformed("two sections of one client"));
    }

    let delete_clients = source.count(DELETES_BYTES_MIN)?;
    let deletes = source;
    scan_deletes(&mut source, delete_clients, &mut summary)?;
    source.end()?;
    Ok(Scan {
        sections,
        deletes,
        delete_clients,
        summary,
    })
}

/// Checks a V1 state vector, as it comes with a sync step 1, and gives its entries.
///
/// # Errors
/// When it is not one, or has too many clients.
pub fn scan_state_vector(bytes: &[u8]) -> Result<StateVectorScan<'_>, ScanError> {
    let mut source = Source::new(bytes);
    let count = source.count(2)?;
    if STATE_VECTOR_CLIENTS_MAX < count {
        return Err(ScanError::TooMany {
            what: "clients",
            max: STATE_VECTOR_CLIENTS_MAX,
        });
    }
    let entries = StateVectorScan { source, count };
    for _ in 0..count {
        source.id()?;
    }
    source.end()?;
    Ok(entries)
}

/// The entries of a state vector that was checked: each client with its next clock.
#[derive(Debug, Clone)]
pub struct StateVectorScan<'a> {
    source: Source<'a>,
    count: u64,
}

impl Iterator for StateVectorScan<'_> {
    type Item = Id;

    fn next(&mut self) -> Option<Id> {
        self.count = self.count.checked_sub(1)?;
        self.source.id().ok()
    }
}

impl Summary {
    /// Whether a client may bring so much at once.
    fn check_bounds(&self) -> Result<(), ScanError> {
        for (what, count, max) in [
            ("structs", self.structs, UPDATE_STRUCTS_MAX),
            (
                "ranges of deletes",
                self.delete_ranges,
                UPDATE_DELETE_RANGES_MAX,
            ),
            ("values", self.values, UPDATE_VALUES_MAX),
            ("subdocuments", self.subdocuments, UPDATE_SUBDOCUMENTS_MAX),
        ] {
            if max < count {
                return Err(ScanError::TooMany { what, max });
            }
        }
        Ok(())
    }
}

impl Scan<'_> {
    /// How much there is in it.
    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Whether there is nothing in it: neither structs nor deletes.
    pub fn is_empty(&self) -> bool {
        self.summary == Summary::default()
    }

    /// Each client with structs, and the clock after its last one.
    pub fn client_ends(&self) -> impl Iterator<Item = (u64, u32)> {
        self.sections
            .iter()
            .map(|section| (section.client, section.end))
    }
}

impl<'a> Section<'a> {
    /// Number of structs, client, clock, and a struct of two bytes.
    const BYTES_MIN: usize = 5;

    fn scan(source: &mut Source<'a>, summary: &mut Summary) -> Result<Self, ScanError> {
        let count = source.count(2)?;
        if count == 0 {
            return Err(source.malformed("a section without structs"));
        }
        summary.structs += count;
        let Id {
            client,
            clock: start,
        } = source.id()?;
        let structs = *source;
        let mut next = Id {
            client,
            clock: start,
        };
        for _ in 0..count {
            next.clock = source.read_struct(next, &mut Pass::Check(summary))?.end;
        }
        summary.clients += 1;
        summary.clocks += u64::from(next.clock - start);
        Ok(Self {
            client,
            start,
            end: next.clock,
            structs,
        })
    }
}

/// Client, number of ranges, and one range.
const DELETES_BYTES_MIN: usize = 4;

/// The ranges of a client ascend and do not overlap; no client comes twice. `yrs` takes both for
/// granted.
fn scan_deletes(
    source: &mut Source<'_>,
    delete_clients: u64,
    summary: &mut Summary,
) -> Result<(), ScanError> {
    let mut clients: SmallVec<[u64; 8]> = SmallVec::new();
    for _ in 0..delete_clients {
        clients.push(source.client()?);
        let ranges = source.count(2)?;
        if ranges == 0 {
            return Err(source.malformed("a client without deletes"));
        }
        summary.delete_ranges += ranges;
        let mut end = 0;
        for _ in 0..ranges {
            let start = source.clock()?;
            if start < end {
                return Err(source.malformed("ranges of deletes out of order"));
            }
            end = source.end_of(start)?;
            summary.deleted_clocks += u64::from(end - start);
        }
    }
    clients.sort_unstable();
    if clients.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(source.malformed("deletes of one client in two places"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{CLIENT_ID_MAX, UPDATE_DEPTH_MAX};

    /// Client 1 types "ab" into the root "t".
    const TYPED: &[u8] = &[1, 1, 1, 0, 4, 1, 1, b't', 2, b'a', b'b', 0];

    #[test]
    fn an_empty_update_is_sound() {
        let scan = scan_update(&[0, 0]).unwrap();
        assert!(scan.is_empty());
        assert_eq!(scan.missing(nothing_known), None);
        assert_eq!(scan.novelty(nothing_known), Novelty::Nothing);
    }

    #[test]
    fn what_is_in_an_update_is_counted() {
        let text_and_delete = [&TYPED[..TYPED.len() - 1], &[1, 1, 1, 0, 1]].concat();
        let scan = scan_update(&text_and_delete).unwrap();
        assert_eq!(
            *scan.summary(),
            Summary {
                clients: 1,
                structs: 1,
                clocks: 2,
                delete_ranges: 1,
                deleted_clocks: 1,
                ..Summary::default()
            }
        );
        assert!(!scan.is_empty());
    }

    /// Each of these makes `yrs` 0.28.1 reserve up to gigabytes or panic.
    #[test]
    fn bombs_are_refused() {
        let billion = [0xFF, 0xFF, 0xFF, 0xFF, 0x03];
        let any_array = [&[1, 1, 1, 0, 8, 1, 1, b'a', 1, 117][..], &billion].concat();
        let any_map = [&[1, 1, 1, 0, 8, 1, 1, b'a', 1, 118][..], &billion].concat();
        for bomb in [
            &billion[..],
            &[&[1][..], &billion].concat(),
            &[&[0][..], &billion].concat(),
            &[&[0, 1, 1][..], &billion].concat(),
            &[&[1, 1, 1, 0, 8, 1, 1, b'a'][..], &billion].concat(),
            &[&[1, 1, 1, 0, 4, 1, 1, b'a'][..], &billion].concat(),
            &any_array,
            &any_map,
        ] {
            assert!(
                matches!(scan_update(bomb), Err(ScanError::Malformed { .. })),
                "{bomb:?}"
            );
        }
        assert!(matches!(
            scan_state_vector(&billion),
            Err(ScanError::Malformed { .. })
        ));
    }

    /// Accepted by `yrs`, and then the document cannot be encoded, or not be read again.
    #[test]
    fn known_poison_is_refused() {
        for poison in [
            // the encoding of the whole document panics
            &[1, 1, 1, 2, 162, 8, 6, 0, 0, 0][..],
            // the encoded document cannot be decoded
            &[1, 1, 1, 2, 2, 1, 0, 0, 0, 0],
            &[1, 1, 1, 0, 2, 1, 0, 0, 0, 0],
        ] {
            assert!(scan_update(poison).is_err(), "{poison:?}");
        }
        // As V2 it makes the encoding panic; as V1 it is sound, and refers to what is not there.
        let meant_as_v2 = scan_update(&[1, 1, 1, 2, 99, 2, 5, 1, 1, 0]).unwrap();
        assert!(meant_as_v2.missing(nothing_known).is_some());
    }

    #[test]
    fn nesting_of_values_is_bounded() {
        let nested = |depth| {
            let arrays = [117, 1].repeat(depth);
            [&[1, 1, 1, 0, 8, 1, 1, b'a', 1][..], &arrays, &[126, 0]].concat()
        };
        assert!(scan_update(&nested(UPDATE_DEPTH_MAX)).is_ok());
        for depth in [UPDATE_DEPTH_MAX + 1, 10_000, 1_000_000] {
            assert!(scan_update(&nested(depth)).is_err(), "{depth}");
        }
        let embedded = |depth| {
            let json = ["[".repeat(depth), "]".repeat(depth)].concat();
            let mut update = vec![1, 1, 1, 0, 5, 1, 1, b'a'];
            crate::wire::varint::write_var_bytes(&mut update, json.as_bytes());
            update.push(0);
            update
        };
        assert!(scan_update(&embedded(UPDATE_DEPTH_MAX)).is_ok());
        assert!(scan_update(&embedded(UPDATE_DEPTH_MAX + 1)).is_err());
        assert!(scan_update(&embedded(100_000)).is_err());
    }

    #[test]
    fn lengths_are_neither_zero_nor_too_large() {
        let gc = |len: u64| {
            let mut update = vec![1, 1, 1, 0, 0];
            crate::wire::varint::write_var_uint(&mut update, len);
            update.push(0);
            update
        };
        assert!(scan_update(&gc(1)).is_ok());
        assert!(scan_update(&gc((1 << 31) - 1)).is_ok());
        for len in [0, 1 << 31, (1 << 32) - 1, 1 << 32, CLIENT_ID_MAX] {
            assert!(scan_update(&gc(len)).is_err(), "{len}");
        }
        let delete = |len: u64| {
            let mut update = vec![0, 1, 1, 1, 0];
            crate::wire::varint::write_var_uint(&mut update, len);
            update
        };
        assert!(scan_update(&delete(1)).is_ok());
        assert!(scan_update(&delete(0)).is_err());
        assert!(scan_update(&delete(1 << 31)).is_err());
        // an empty text, no values
        assert!(scan_update(&[1, 1, 1, 0, 4, 1, 1, b't', 0, 0]).is_err());
        assert!(scan_update(&[1, 1, 1, 0, 8, 1, 1, b't', 0, 0]).is_err());
    }

    #[test]
    fn client_ids_have_53_bits() {
        let from = |client: u64| {
            let mut update = vec![1, 1];
            crate::wire::varint::write_var_uint(&mut update, client);
            update.extend_from_slice(&TYPED[3..]);
            update
        };
        assert!(scan_update(&from(CLIENT_ID_MAX)).is_ok());
        assert!(scan_update(&from(CLIENT_ID_MAX + 1)).is_err());
    }

    #[test]
    fn nothing_may_come_twice_or_be_empty() {
        let gc_of_client_1 = [1, 1, 0, 0, 1];
        let twice = [&[2][..], &gc_of_client_1, &gc_of_client_1, &[0]].concat();
        for (update, what) in [
            (&twice[..], "two sections of one client"),
            (&[1, 0, 1, 0, 0, 0, 0], "a section without structs"),
            (
                &[0, 2, 1, 1, 0, 1, 1, 1, 5, 1],
                "deletes of one client in two places",
            ),
            (&[0, 1, 1, 2, 5, 1, 0, 1], "ranges of deletes out of order"),
            (&[0, 1, 1, 2, 0, 2, 1, 1], "ranges of deletes out of order"),
            (&[0, 1, 1, 0, 1, 1], "a client without deletes"),
            (&[0, 0, 0], "bytes behind its end"),
            (
                &[1, 1, 1, 0, 0x20, 1, 0],
                "a placeholder with flags of an item",
            ),
            (
                &[1, 1, 1, 5, 0x84, 1, 5, 1, b'a', 0],
                "a struct that refers to itself or what follows it",
            ),
        ] {
            let Err(ScanError::Malformed { what: found, .. }) = scan_update(update) else {
                panic!("{update:?} is taken");
            };
            assert_eq!(found, what, "{update:?}");
        }
    }

    #[test]
    fn content_that_other_clients_or_yrs_cannot_read_is_refused() {
        let content =
            |bytes: &[u8]| [&[1, 1, 1, 0, bytes[0], 1, 1, b't'][..], &bytes[1..], &[0]].concat();
        for (what, taken) in [
            ("a map", &[7, 1][..]),
            ("an XML element", &[7, 3, 1, b'p']),
            ("a format", &[6, 1, b'b', 4, b't', b'r', b'u', b'e']),
            ("a subdocument", &[9, 1, b'g', 118, 0]),
        ] {
            assert!(scan_update(&content(taken)).is_ok(), "{what}");
        }
        for (what, refused) in [
            ("type 8", &[7, 8][..]),
            ("type 15, which yrs would read", &[7, 15]),
            ("a format that is not JSON", &[6, 1, b'b', 2, b't', b'r']),
            ("a subdocument without options", &[9, 1, b'g', 126]),
            ("value 115", &[8, 1, 115]),
            ("text that is not UTF-8", &[4, 1, 0xC3]),
            ("content 11", &[11, 1]),
            (
                "content 0x14, which yrs would read as text",
                &[0x14, 1, b'a'],
            ),
        ] {
            let update = content(refused);
            let scan = scan_update(&update);
            assert!(matches!(scan, Err(ScanError::Malformed { .. })), "{what}");
        }
        for (what, unsupported) in [
            ("JSON", &[2, 1, 1, b'1'][..]),
            ("an XML hook", &[7, 5, 1, b'h']),
            ("a weak link", &[7, 7, 0, 1, 0]),
            ("half a surrogate pair", b"\x05\x08\"\\ud83d\""),
        ] {
            let update = content(unsupported);
            let scan = scan_update(&update);
            assert!(matches!(scan, Err(ScanError::Unsupported { .. })), "{what}");
        }
    }

    #[test]
    fn text_is_as_long_as_its_utf16() {
        // "aä日😀" has 1 + 1 + 1 + 2 clocks; what follows may start at 5.
        let text = "aä日😀";
        let mut update = vec![1, 1, 1, 0, 4, 1, 1, b't'];
        crate::wire::varint::write_var_bytes(&mut update, text.as_bytes());
        update.push(0);
        let scan = scan_update(&update).unwrap();
        assert_eq!(scan.novelty(|_| 4), Novelty::New);
        assert_eq!(scan.novelty(|_| 5), Novelty::Nothing);
        assert_eq!(text.encode_utf16().count(), 5);
    }

    #[test]
    fn state_vectors_are_checked() {
        let entries: Vec<_> = scan_state_vector(&[2, 1, 5, 3, 0x80, 1]).unwrap().collect();
        assert_eq!(
            entries,
            [
                Id {
                    client: 1,
                    clock: 5
                },
                Id {
                    client: 3,
                    clock: 128
                }
            ]
        );
        assert_eq!(scan_state_vector(&[0]).unwrap().count(), 0);
        for broken in [
            &[][..],
            &[1],
            &[1, 1],
            &[0, 0],
            &[1, 1, 0x80, 0x80, 0x80, 0x80, 0x08],
        ] {
            assert!(scan_state_vector(broken).is_err(), "{broken:?}");
        }
    }

    fn nothing_known(_: u64) -> u32 {
        0
    }
}
