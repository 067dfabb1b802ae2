//! [`Rows`] of SQLite.

use async_trait::async_trait;
use collab_core::ids::{DocumentId, RoomEpoch, Seq};

use super::{Sqlite, begin, cut, document_id, failed, get, holds, put_snapshot};
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
        let mut writer = self.writer.lock().await?;
        let mut write = begin(&mut writer).await?;
        if !holds(&mut write, snapshot.ownership).await? {
            return Ok(Fence::Fenced);
        }
        cut(&mut write, &snapshot.document).await?;
        put_snapshot(&mut write, snapshot).await?;
        write.commit().await.map_err(failed)?;
        Ok(Fence::Held)
    }
}
