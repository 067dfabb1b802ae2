//! What a load checks before it believes a row.

use bytes::Bytes;
use collab_core::ids::{DocumentId, RoomEpoch, Seq};
use sha2::{Digest, Sha256};

use super::LoadError;

/// Library that encodes our snapshots, as recorded beside them.
pub(super) const LIBRARY: &str = "yrs 0.28.1";

/// Hash of a snapshot. It covers what the bytes belong to, so that a row that was moved to another
/// document, life or position does not verify.
///
/// Postgres computes the same in `compact`.
pub(super) fn snapshot_hash(
    document: &DocumentId,
    room_epoch: RoomEpoch,
    seq: Seq,
    bytes: &[u8],
) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(document.as_str());
    hash.update([0]); // in no document id, so that two different inputs never read the same
    hash.update(room_epoch.0.to_be_bytes());
    hash.update(seq.0.to_be_bytes());
    hash.update(bytes);
    hash.finalize().to_vec()
}

/// A row of the log as read.
pub(super) struct LogRow {
    pub(super) seq: i64,
    pub(super) crc32c: i64,
    pub(super) bytes: Vec<u8>,
}

/// Checks that `rows` follow `after` without a hole, have good checksums and reach at least
/// `reach`; returns them and the last seq.
///
/// `reach` is the newest seq that some snapshot speaks of, also one that does not verify: without
/// its rows a bad snapshot would pass for a shorter document.
pub(super) fn check_tail(
    document: &DocumentId,
    after: Seq,
    reach: Seq,
    rows: Vec<LogRow>,
) -> Result<(Vec<(Seq, Bytes)>, Seq), LoadError> {
    let damaged = |seq: Seq, reason: String| LoadError::Damaged {
        document: document.clone(),
        seq,
        reason,
    };
    let mut last = after;
    let mut log = Vec::with_capacity(rows.len());
    for row in rows {
        let expected = last.next();
        if Seq(row.seq) != expected {
            return Err(damaged(
                expected,
                format!("the log goes on at seq {}", row.seq),
            ));
        }
        if i64::from(crc32c::crc32c(&row.bytes)) != row.crc32c {
            return Err(damaged(
                expected,
                "the checksum of the update is wrong".to_owned(),
            ));
        }
        last = expected;
        log.push((expected, Bytes::from(row.bytes)));
    }
    if last < reach {
        return Err(damaged(
            last.next(),
            format!("the log ends before the damaged snapshot at seq {reach}"),
        ));
    }
    Ok((log, last))
}
