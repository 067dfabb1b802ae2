//! No bus at all: one process, or a cluster that runs without Redis. Every question goes to the owner.

use async_trait::async_trait;
use bytes::Bytes;
use collab_core::ids::{DocumentId, RoomEpoch, Seq};

use super::{Bus, CachedSnapshot, Presence};

/// Knows nothing and keeps nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoBus;

#[async_trait]
impl Bus for NoBus {
    async fn publish_presence(&self, _: &DocumentId, _: Vec<Presence>) {}

    async fn presence(&self, _: &DocumentId) -> Option<Vec<Presence>> {
        None
    }

    async fn cache_snapshot(&self, _: &DocumentId, _: RoomEpoch, _: Seq, _: &Bytes) {}

    async fn cached_snapshot(&self, _: &DocumentId) -> Option<CachedSnapshot> {
        None
    }

    async fn is_up(&self) -> Option<bool> {
        None
    }
}
