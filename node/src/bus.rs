//! What may be lost: presence for those who ask, and cached snapshots.
//!
//! Nothing here backs an acknowledgement or an ownership. When the bus is away everything goes on;
//! questions are answered more slowly, by the owner itself.

use async_trait::async_trait;
use bytes::Bytes;
use collab_core::ids::{DocumentId, RoomEpoch, Seq};

pub mod memory;
pub mod redis;

/// The presence of one client: its id and its JSON state.
pub type Presence = (u64, String);

/// A snapshot that may be used only if the store names the same document, room epoch, seq and hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CachedSnapshot {
    /// The life of the document.
    pub room_epoch: RoomEpoch,
    /// It contains every update up to and including this one.
    pub seq: Seq,
    /// V1 update of the whole state.
    pub bytes: Bytes,
}

/// Fast, shared, forgetful.
#[async_trait]
pub trait Bus: Send + Sync + 'static {
    /// Says who is in a document now; an empty list clears it.
    async fn publish_presence(&self, document: &DocumentId, presence: Vec<Presence>);

    /// Who is in a document, as last published; `None` when the bus does not know.
    async fn presence(&self, document: &DocumentId) -> Option<Vec<Presence>>;

    /// Keeps a snapshot for the next opening.
    async fn cache_snapshot(
        &self,
        document: &DocumentId,
        room_epoch: RoomEpoch,
        seq: Seq,
        bytes: &Bytes,
    );

    /// The snapshot that was kept last.
    async fn cached_snapshot(&self, document: &DocumentId) -> Option<CachedSnapshot>;

    /// Whether the bus answers; `None` when there is none.
    async fn is_up(&self) -> Option<bool>;
}
