//! What can be had of a document whose rows are damaged.
//!
//! The newest snapshot that opens, and every update after it that is intact and whose predecessors are there.
//! An update behind a hole is taken as far as it stands alone: other people's edits do not fall with one.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use collab_core::document::{Document, EdgeId, Effect, Input, Peer};
use collab_core::ids::{ConnectionId, Epoch, Seq};
use collab_core::wire::relay::UpdateKind;

use crate::store::rows::{StoredRow, StoredRows};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Salvaged {
    /// The content, as one V1 update.
    pub(super) state: Bytes,
    /// Rows that could not be used, or not wholly, and why.
    pub(super) lost: Vec<(Seq, String)>,
    /// The document opens as it lies: nothing is lost, and no row is damaged.
    pub(super) sound: bool,
}

/// Reads all there is. Costs as much as opening the document, twice where it panics.
pub(super) fn salvage(rows: &StoredRows) -> Salvaged {
    let mut lost = Vec::new();
    let snapshot = rows.snapshots.iter().find(|row| {
        let opens = row.intact && open(Some(row)).is_some();
        if !opens {
            let why = if row.intact {
                "it cannot be opened"
            } else {
                "its hash is wrong"
            };
            lost.push((row.seq, format!("snapshot: {why}")));
        }
        opens
    });
    let damaged_snapshots = !lost.is_empty();
    let mut document = open(snapshot).expect("this one opened");
    let mut taken: Vec<Bytes> = Vec::new();
    let behind = snapshot.map_or(rows.base, |row| row.seq);
    let mut expected = behind.next();
    for row in rows.log.iter().filter(|row| behind < row.seq) {
        if expected < row.seq {
            lost.push((expected, hole(expected, row.seq)));
        }
        expected = row.seq.next();
        if !row.intact {
            lost.push((row.seq, "its checksum is wrong".to_owned()));
            continue;
        }
        match add(&mut document, &row.bytes) {
            Added::Whole => taken.push(row.bytes.clone()),
            Added::Part => {
                lost.push((row.seq, "it refers to what is lost".to_owned()));
                taken.push(row.bytes.clone());
            }
            Added::Refused(why) => lost.push((row.seq, why)),
            Added::Broken => {
                lost.push((row.seq, "it breaks the document".to_owned()));
                document = open(snapshot).expect("this one opened");
                for bytes in &taken {
                    add(&mut document, bytes);
                }
            }
        }
    }
    // Snapshots speak of rows: a bad one may have held what the log has no more.
    let reach = rows.last();
    if expected <= reach {
        lost.push((expected, hole(expected, reach.next())));
    }
    Salvaged {
        state: document.encode_state(),
        sound: lost.is_empty() && !damaged_snapshots,
        lost,
    }
}

fn hole(from: Seq, to: Seq) -> String {
    if from.next() == to {
        "there is no such row".to_owned()
    } else {
        format!("there are no rows up to seq {}", to.0 - 1)
    }
}

enum Added {
    Whole,
    Part,
    Refused(String),
    Broken,
}

const READER: Peer = Peer {
    edge: EdgeId(0),
    connection: ConnectionId(0),
};

/// A document to read rows into. `None`: the snapshot cannot be opened.
fn open(snapshot: Option<&StoredRow>) -> Option<Document> {
    let snapshot = snapshot.map(|row| (row.seq, &row.bytes));
    let last = snapshot.map_or(Seq(0), |(seq, _)| seq);
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let document = Document::open(Epoch(0), snapshot, &[], last).ok()?;
        document.encode_state();
        Some(document)
    }));
    let mut document = opened.ok().flatten()?;
    document.lift_bounds();
    document.handle(Input::Join {
        peer: READER,
        author: String::new(),
    });
    Some(document)
}

/// Admits an update as from a client: as far as all it refers to is there.
fn add(document: &mut Document, update: &Bytes) -> Added {
    let added = catch_unwind(AssertUnwindSafe(|| {
        let effects = document.handle(Input::Update {
            peer: READER,
            number: 1,
            kind: UpdateKind::Step2,
            update: update.clone(),
        });
        // All of it is durable: nothing waits.
        let seq = document.assigned_seq();
        document.handle(Input::Committed { seq });
        // What can be applied and not be encoded is no use.
        document.encode_state();
        effects
    }));
    let Ok(effects) = added else {
        return Added::Broken;
    };
    let mut added = Added::Whole;
    for effect in effects {
        match effect {
            Effect::Reload => return Added::Broken,
            Effect::NotAdmitted { reason: "gap" } => added = Added::Part,
            Effect::NotAdmitted { reason } => {
                added = Added::Refused(format!("it is not admitted: {reason}"));
            }
            _ => {}
        }
    }
    added
}

#[cfg(test)]
mod tests {
    use collab_core::ids::RoomEpoch;
    use collab_core::replica::new_doc;
    use yrs::updates::decoder::Decode;
    use yrs::{Doc, GetString, ReadTxn, StateVector, Text, Transact, Update};

    use super::*;

    #[test]
    fn a_sound_document_is_sound() {
        let rows = typed("abcd");
        let salvaged = salvage(&rows);
        assert!(salvaged.sound, "{:?}", salvaged.lost);
        assert_eq!(text(&salvaged), "abcd");
    }

    #[test]
    fn a_lost_row_costs_what_refers_to_it_and_no_more() {
        let mut rows = typed("abcd");
        // Somebody else wrote in between, not knowing the lost row.
        let other = new_doc();
        let quill = other.get_or_insert_text("other");
        let mut txn = other.transact_mut();
        quill.insert(&mut txn, 0, "by somebody else");
        let bytes = Bytes::from(txn.encode_update_v1());
        rows.log.push(row(5, &bytes));
        rows.log[2].intact = false;
        let salvaged = salvage(&rows);
        assert_eq!(text(&salvaged), "ab");
        let seqs: Vec<i64> = salvaged.lost.iter().map(|(seq, _)| seq.0).collect();
        assert_eq!(seqs, [3, 4]);
        let read = read(&salvaged);
        let other = read.get_or_insert_text("other");
        assert_eq!(other.get_string(&read.transact()), "by somebody else");
    }

    #[test]
    fn a_bad_snapshot_is_made_up_for_by_the_one_before_and_the_log() {
        let mut rows = typed("abcd");
        let older = salvage(&StoredRows {
            log: rows.log[..2].to_vec(),
            ..rows.clone()
        });
        rows.snapshots = vec![
            StoredRow {
                intact: false,
                ..row(4, &Bytes::from_static(&[0, 0]))
            },
            row(2, &older.state),
        ];
        rows.log.drain(..2);
        let salvaged = salvage(&rows);
        assert_eq!(text(&salvaged), "abcd");
        assert!(!salvaged.sound);
        assert_eq!(salvaged.lost.len(), 1);
        // Without the log behind the older one, what is missing is told.
        rows.log.clear();
        let salvaged = salvage(&rows);
        assert_eq!(text(&salvaged), "ab");
        assert_eq!(salvaged.lost.last().unwrap().0, Seq(3));
    }

    #[test]
    fn poison_is_left_out() {
        let mut rows = typed("ab");
        for poison in [
            &[1, 1, 1, 2, 162, 8, 6, 0, 0, 0][..],
            &[255, 255, 255, 255, 15],
        ] {
            rows.log.insert(1, row(2, &Bytes::copy_from_slice(poison)));
            rows.log[2].seq = Seq(3);
            let salvaged = salvage(&rows);
            assert_eq!(text(&salvaged), "ab", "{poison:?}");
            assert_eq!(salvaged.lost.len(), 1);
            rows.log.remove(1);
        }
    }

    /// A document whose log is a letter each.
    fn typed(letters: &str) -> StoredRows {
        let doc = new_doc();
        let quill = doc.get_or_insert_text("quill");
        let log = letters.chars().enumerate().map(|(at, letter)| {
            let mut txn = doc.transact_mut();
            let place = u32::try_from(at).unwrap();
            quill.insert(&mut txn, place, &letter.to_string());
            row(i64::from(place) + 1, &txn.encode_update_v1().into())
        });
        StoredRows {
            deleted: false,
            room_epoch: RoomEpoch(1),
            base: Seq(0),
            snapshots: Vec::new(),
            log: log.collect(),
        }
    }

    fn row(seq: i64, bytes: &Bytes) -> StoredRow {
        StoredRow {
            seq: Seq(seq),
            intact: true,
            bytes: bytes.clone(),
        }
    }

    fn read(salvaged: &Salvaged) -> Doc {
        let doc = new_doc();
        let update = Update::decode_v1(&salvaged.state).unwrap();
        doc.transact_mut().apply_update(update).unwrap();
        assert!(
            !doc.transact()
                .encode_state_as_update_v1(&StateVector::default())
                .is_empty()
        );
        doc
    }

    fn text(salvaged: &Salvaged) -> String {
        let doc = read(salvaged);
        let quill = doc.get_or_insert_text("quill");
        quill.get_string(&doc.transact())
    }
}
