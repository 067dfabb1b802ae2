//! How a document is read.

use bytes::Bytes;
use collab_core::ids::{DocumentId, RoomEpoch, Seq};
use sqlx::{Connection, PgConnection};

use super::decode::get;
use crate::store::integrity::{LogRow, check_tail, snapshot_hash};
use crate::store::{LoadError, Loaded, StoreError, StoredSnapshot};

/// The load rule, in one consistent view.
pub(super) async fn load(
    connection: &mut PgConnection,
    document: &DocumentId,
    copy: Option<(RoomEpoch, StoredSnapshot)>,
) -> Result<Loaded, LoadError> {
    let unavailable = |error| LoadError::Store(StoreError::Unavailable(error));
    let mut view = connection
        .begin_with("begin isolation level repeatable read read only")
        .await
        .map_err(unavailable)?;
    let row = sqlx::query("select deleted, room_epoch, base_seq from document where id = $1")
        .bind(document.as_str())
        .fetch_optional(&mut *view)
        .await
        .map_err(unavailable)?;
    let Some(row) = row else {
        return Ok(Loaded::Absent);
    };
    if get(&row, 0)? {
        return Ok(Loaded::Deleted);
    }
    let room_epoch = RoomEpoch(get(&row, 1)?);
    let mut after = Seq(get(&row, 2)?);
    let mut reach = after;
    let mut snapshot = None;
    let mut below = i64::MAX;
    let mut copy = copy.filter(|(life, _)| *life == room_epoch);
    while snapshot.is_none() {
        let copied = copy.take().map(|(_, copied)| copied);
        let row = sqlx::query(
            "select seq, sha256, case when seq = $4 then null else bytes end from snapshot
             where document = $1 and $2 <= seq and seq < $3 order by seq desc limit 1",
        )
        .bind(document.as_str())
        .bind(after.0)
        .bind(below)
        .bind(copied.as_ref().map(|copied| copied.seq.0))
        .fetch_optional(&mut *view)
        .await
        .map_err(unavailable)?;
        let Some(row) = row else { break };
        let seq = Seq(get(&row, 0)?);
        let stored = get::<Option<Vec<u8>>>(&row, 2)?.map(Bytes::from);
        let is_copy = stored.is_none();
        let bytes = stored
            .or(copied.map(|copied| copied.bytes))
            .unwrap_or_default();
        reach = reach.max(seq);
        if snapshot_hash(document, room_epoch, seq, &bytes) == get::<Vec<u8>>(&row, 1)? {
            snapshot = Some(StoredSnapshot { seq, bytes });
            after = seq;
        } else if is_copy {
            tracing::warn!(document.id = %document, %seq, "a copy of a snapshot is not what was stored; reading that");
            below = seq.next().0;
        } else {
            below = seq.0;
            tracing::error!(document.id = %document, %seq, "a snapshot does not verify; trying the one before");
        }
    }
    let rows = sqlx::query(
        "select seq, crc32c, bytes from update_log where document = $1 and seq > $2 order by seq",
    )
    .bind(document.as_str())
    .bind(after.0)
    .fetch_all(&mut *view)
    .await
    .map_err(unavailable)?;
    view.rollback().await.map_err(unavailable)?;
    let rows = rows
        .iter()
        .map(|row| {
            Ok(LogRow {
                seq: get(row, 0)?,
                crc32c: get(row, 1)?,
                bytes: get(row, 2)?,
            })
        })
        .collect::<Result<_, StoreError>>()?;
    check_tail(after, reach, rows).after(document, room_epoch, snapshot)
}
