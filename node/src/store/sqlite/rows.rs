//! [`Rows`] of SQLite.

use async_trait::async_trait;
use collab_core::ids::{DocumentId, RoomEpoch, Seq};

use super::{LIBRARY, Sqlite, document_id, failed, get, holds, snapshot_hash};
use crate::store::rows::{Rows, StoredRows, log_row, snapshot_row};
use crate::store::{Fence, NewSnapshot, StoreError};

#[async_trait]
impl Rows for Sqlite {
    async fn rows(&self, document: &DocumentId) -> Result<Option<StoredRows>, StoreError> {
        let mut view = self.readers.begin().await.map_err(failed)?;
        let row = sqlx::query("select deleted, room_epoch, base_seq from document where id = ?")
            .bind(document.as_str())
            .fetch_optional(&mut *view)
            .await
            .map_err(failed)?;
        let Some(row) = row else { return Ok(None) };
        let room_epoch = RoomEpoch(get(&row, 1)?);
        let snapshots = sqlx::query(
            "select seq, sha256, bytes from snapshot where document = ? order by seq desc",
        )
        .bind(document.as_str())
        .fetch_all(&mut *view)
        .await
        .map_err(failed)?;
        let log = sqlx::query(
            "select seq, crc32c, bytes from update_log where document = ? order by seq",
        )
        .bind(document.as_str())
        .fetch_all(&mut *view)
        .await
        .map_err(failed)?;
        let snapshots = snapshots.iter().map(|row| {
            let (seq, sha256) = (Seq(get(row, 0)?), get::<Vec<u8>>(row, 1)?);
            Ok(snapshot_row(
                document,
                room_epoch,
                seq,
                &sha256,
                get(row, 2)?,
            ))
        });
        let log = log
            .iter()
            .map(|row| Ok(log_row(Seq(get(row, 0)?), get(row, 1)?, get(row, 2)?)));
        Ok(Some(StoredRows {
            deleted: get(&row, 0)?,
            room_epoch,
            base: Seq(get(&row, 2)?),
            snapshots: snapshots.collect::<Result<_, StoreError>>()?,
            log: log.collect::<Result<_, StoreError>>()?,
        }))
    }

    async fn ids(&self) -> Result<Vec<DocumentId>, StoreError> {
        let ids = sqlx::query("select id from document order by id");
        let rows = ids.fetch_all(&self.readers).await.map_err(failed)?;
        rows.iter().map(|row| document_id(get(row, 0)?)).collect()
    }

    async fn replace(&self, snapshot: &NewSnapshot) -> Result<Fence, StoreError> {
        let NewSnapshot {
            document,
            ownership,
            room_epoch,
            seq,
            bytes,
        } = snapshot;
        let mut write = self.write().await?;
        if !holds(&mut write, *ownership).await? {
            return Ok(Fence::Fenced);
        }
        for cut in [
            "delete from update_log where document = ?",
            "delete from snapshot where document = ?",
        ] {
            sqlx::query(cut)
                .bind(document.as_str())
                .execute(&mut *write)
                .await
                .map_err(failed)?;
        }
        sqlx::query(
            "insert into snapshot (document, seq, room_epoch, slot, epoch, sha256, library, bytes, at)
             select id, ?, room_epoch, ?, ?, ?, ?, ?, cast(unixepoch('subsec') * 1000 as integer)
             from document where id = ? and not deleted and room_epoch = ?",
        )
        .bind(seq.0)
        .bind(ownership.slot.0)
        .bind(ownership.epoch.0)
        .bind(snapshot_hash(document, *room_epoch, *seq, bytes))
        .bind(LIBRARY)
        .bind(bytes.as_ref())
        .bind(document.as_str())
        .bind(room_epoch.0)
        .execute(&mut *write)
        .await
        .map_err(failed)?;
        write.commit().await.map_err(failed)?;
        Ok(Fence::Held)
    }
}
