//! The rows of a document as they lie, also those that a load would refuse: for whoever repairs it.

use async_trait::async_trait;
use bytes::Bytes;
use collab_core::ids::{DocumentId, RoomEpoch, Seq};

use super::integrity::snapshot_hash;
use super::{Fence, NewSnapshot, Store, StoreError};

/// All that is stored of a document, in one consistent view.
#[derive(Clone, Debug)]
pub struct StoredRows {
    /// It was deleted; nothing but this is left of it.
    pub deleted: bool,
    /// The life of the document.
    pub room_epoch: RoomEpoch,
    /// Last seq of the life before.
    pub base: Seq,
    /// Newest first.
    pub snapshots: Vec<StoredRow>,
    /// In order.
    pub log: Vec<StoredRow>,
}

/// A snapshot, or an update of the log.
#[derive(Clone, Debug)]
pub struct StoredRow {
    /// Its position.
    pub seq: Seq,
    /// Whether its hash or checksum is that of the bytes.
    pub intact: bool,
    /// V1 update.
    pub bytes: Bytes,
}

impl StoredRows {
    /// The highest position that any row speaks of.
    pub fn last(&self) -> Seq {
        let rows = self.snapshots.iter().chain(&self.log);
        rows.map(|row| row.seq)
            .max()
            .unwrap_or(self.base)
            .max(self.base)
    }
}

/// What repairing needs of a store beside [`Store`].
#[async_trait]
pub trait Rows: Store {
    /// Reads every row of a document; `None`: there never was one of this name.
    async fn rows(&self, document: &DocumentId) -> Result<Option<StoredRows>, StoreError>;

    /// Lists all documents, deleted ones too, in order of id.
    async fn ids(&self) -> Result<Vec<DocumentId>, StoreError>;

    /// Under the fence: puts a snapshot in the place of all rows of a live document. Its seq is above all of them.
    async fn replace(&self, snapshot: &NewSnapshot) -> Result<Fence, StoreError>;
}

pub(super) fn snapshot_row(
    document: &DocumentId,
    room_epoch: RoomEpoch,
    seq: Seq,
    sha256: &[u8],
    bytes: Vec<u8>,
) -> StoredRow {
    StoredRow {
        seq,
        intact: snapshot_hash(document, room_epoch, seq, &bytes) == sha256,
        bytes: bytes.into(),
    }
}

pub(super) fn log_row(seq: Seq, checksum: i64, bytes: Vec<u8>) -> StoredRow {
    StoredRow {
        seq,
        intact: i64::from(crc32c::crc32c(&bytes)) == checksum,
        bytes: bytes.into(),
    }
}
