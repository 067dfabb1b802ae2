//! [`Rows`] of Postgres.

use async_trait::async_trait;
use collab_core::ids::{DocumentId, RoomEpoch, Seq};
use sqlx::Connection;

use super::{DATA_TIMEOUT, LIBRARY, Postgres, document_id, get, snapshot_hash};
use crate::store::rows::{Rows, StoredRows, log_row, snapshot_row};
use crate::store::{Fence, NewSnapshot, StoreError};

#[async_trait]
impl Rows for Postgres {
    async fn rows(&self, document: &DocumentId) -> Result<Option<StoredRows>, StoreError> {
        let mut session = self.session(&self.reads).await?;
        let mut view = session
            .connection()
            .begin_with("begin isolation level repeatable read read only")
            .await
            .map_err(|error| self.failed(error))?;
        let row = sqlx::query("select deleted, room_epoch, base_seq from document where id = $1")
            .bind(document.as_str())
            .fetch_optional(&mut *view)
            .await
            .map_err(|error| self.failed(error))?;
        let snapshots = sqlx::query(
            "select seq, sha256, bytes from snapshot where document = $1 order by seq desc",
        )
        .bind(document.as_str())
        .fetch_all(&mut *view)
        .await
        .map_err(|error| self.failed(error))?;
        let log = sqlx::query(
            "select seq, crc32c, bytes from update_log where document = $1 order by seq",
        )
        .bind(document.as_str())
        .fetch_all(&mut *view)
        .await
        .map_err(|error| self.failed(error))?;
        view.rollback().await.map_err(|error| self.failed(error))?;
        session.ended();
        let Some(row) = row else { return Ok(None) };
        let room_epoch = RoomEpoch(get(&row, 1)?);
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
        let query = sqlx::query("select id from document order by id");
        let rows = self.run(&self.reads, DATA_TIMEOUT, query).await?;
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
        let query = sqlx::query(
            "with held as materialized (
               select slot, epoch from slot where slot = $1 and epoch = $2 and owner = $3 for share
             ), live as materialized (
               select d.id, d.room_epoch, held.slot, held.epoch from held
               join document d on d.id = $4 and not d.deleted and d.room_epoch = $6
             ), cut_log as (
               delete from update_log u using live where u.document = live.id
             ), cut_snapshots as (
               delete from snapshot s using live where s.document = live.id
             ), put as (
               insert into snapshot (document, seq, room_epoch, slot, epoch, sha256, library, bytes)
               select id, $5, room_epoch, slot, epoch, $7, $8, $9 from live
             )
             select exists (select from held)",
        )
        .bind(i32::from(ownership.slot.0))
        .bind(ownership.epoch.0)
        .bind(ownership.incarnation)
        .bind(document.as_str())
        .bind(seq.0)
        .bind(room_epoch.0)
        .bind(snapshot_hash(document, *room_epoch, *seq, bytes))
        .bind(LIBRARY)
        .bind(bytes.as_ref());
        self.run_fenced(query).await
    }
}
