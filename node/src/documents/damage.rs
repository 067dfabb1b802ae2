//! What can be shown of a document whose stored rows are damaged: everything before the first bad one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;

use collab_core::document::Document;
use collab_core::ids::{Epoch, Seq};

use crate::store::Content;

/// Opens as much as can be replayed, read-only. Replays row by row until one fails or panics, and then all before it
/// once more: what failed half-way is not to be used.
pub(super) fn good_part(epoch: Epoch, content: &Content) -> Document {
    let before = content.last.0 - i64::try_from(content.log.len()).unwrap_or(i64::MAX);
    let snapshot = content
        .snapshot
        .as_ref()
        .map(|stored| (stored.seq, &stored.bytes));
    let open = |rows: usize| {
        let last = Seq(before + i64::try_from(rows).unwrap_or(i64::MAX));
        let open = || Document::open(epoch, snapshot, &content.log[..rows], last);
        catch_unwind(AssertUnwindSafe(open)).ok()?.ok()
    };
    let good = open(0).map(|mut document| {
        let replays = |row: &&(Seq, _)| {
            let replay = || document.resume(epoch, slice::from_ref(*row));
            matches!(catch_unwind(AssertUnwindSafe(replay)), Ok(Ok(())))
        };
        content.log.iter().take_while(replays).count()
    });
    let mut document = good.and_then(open).unwrap_or_else(|| {
        Document::open(epoch, None, &[], Seq(0)).expect("an empty document can be opened")
    });
    document.set_read_only();
    document
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use collab_core::ids::RoomEpoch;
    use collab_core::replica::new_doc;
    use yrs::{Text, Transact};

    use super::*;
    use crate::store::StoredSnapshot;

    #[test]
    fn all_before_the_first_bad_row_is_shown() {
        let mut rows = rows();
        assert_eq!(text(&rows, None), "abcd");
        // Drill 47: a row that `yrs` would take and then panic over.
        rows[2] = Bytes::from_static(&[1, 1, 1, 2, 162, 8, 6, 0, 0, 0]);
        assert_eq!(text(&rows, None), "ab");
        rows[0] = Bytes::from_static(b"no update");
        assert_eq!(text(&rows, None), "");
        assert_eq!(text(&rows, Some(b"no state")), "");
    }

    /// What is shown of a log.
    fn text(rows: &[Bytes], snapshot: Option<&'static [u8]>) -> String {
        let content = Content {
            room_epoch: RoomEpoch(1),
            snapshot: snapshot.map(|bytes| StoredSnapshot {
                seq: Seq(0),
                bytes: Bytes::from_static(bytes),
            }),
            log: (1..).map(Seq).zip(rows.iter().cloned()).collect(),
            last: Seq(4),
        };
        good_part(Epoch(1), &content).text("quill")
    }

    fn rows() -> Vec<Bytes> {
        let doc = new_doc();
        let quill = doc.get_or_insert_text("quill");
        let rows = ["a", "b", "c", "d"].map(|letter| {
            let mut txn = doc.transact_mut();
            let end = quill.len(&txn);
            quill.insert(&mut txn, end, letter);
            Bytes::from(txn.encode_update_v1())
        });
        rows.to_vec()
    }
}
