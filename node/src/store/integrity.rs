//! What a load checks before it believes a row.

use bytes::Bytes;
use collab_core::ids::{DocumentId, RoomEpoch, Seq};
use sha2::{Digest, Sha256};

use super::{Content, LoadError, Loaded, StoredSnapshot};

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

/// The rows after a snapshot, as far as they are good.
pub(super) struct Tail {
    pub(super) log: Vec<(Seq, Bytes)>,
    pub(super) last: Seq,
    /// Where and why they are not good any more.
    damage: Option<(Seq, String)>,
}

/// Takes the `rows` that follow `after` without a hole and have good checksums. They are damaged if that is
/// not all of them, or they do not reach `reach`.
///
/// `reach` is the newest seq that some snapshot speaks of, also one that does not verify: without
/// its rows a bad snapshot would pass for a shorter document.
pub(super) fn check_tail(after: Seq, reach: Seq, rows: Vec<LogRow>) -> Tail {
    let mut tail = Tail {
        log: Vec::with_capacity(rows.len()),
        last: after,
        damage: None,
    };
    for row in rows {
        let expected = tail.last.next();
        let damage = if Seq(row.seq) != expected {
            Some(format!("the log goes on at seq {}", row.seq))
        } else if i64::from(crc32c::crc32c(&row.bytes)) != row.crc32c {
            Some("the checksum of the update is wrong".to_owned())
        } else {
            None
        };
        if let Some(reason) = damage {
            tail.damage = Some((expected, reason));
            return tail;
        }
        tail.last = expected;
        tail.log.push((expected, Bytes::from(row.bytes)));
    }
    if tail.last < reach {
        let reason = format!("the log ends before the damaged snapshot at seq {reach}");
        tail.damage = Some((tail.last.next(), reason));
    }
    tail
}

impl Tail {
    /// The rows, if all of them are good.
    pub(super) fn whole(self) -> Option<Vec<(Seq, Bytes)>> {
        self.damage.is_none().then_some(self.log)
    }

    /// With what is before them, a document.
    pub(super) fn after(
        self,
        document: &DocumentId,
        room_epoch: RoomEpoch,
        snapshot: Option<StoredSnapshot>,
    ) -> Result<Loaded, LoadError> {
        let Self { log, last, damage } = self;
        let content = Content {
            room_epoch,
            snapshot,
            log,
            last,
        };
        match damage {
            None => Ok(Loaded::Live(content)),
            Some((seq, reason)) => Err(LoadError::Damaged {
                document: document.clone(),
                seq,
                reason,
                good: Box::new(content),
            }),
        }
    }
}
