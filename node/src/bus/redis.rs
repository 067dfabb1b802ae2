//! The bus on Redis: one multiplexed connection that reconnects by itself, short timeouts, no retries.
//!
//! Keys: `collab:presence:{document}` (JSON, one minute) and `collab:snapshot:{document}` (room epoch and
//! seq, 8 bytes little-endian each, then the bytes; one hour).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use collab_core::ids::{DocumentId, RoomEpoch, Seq};
use redis::AsyncCommands;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use tokio::time::{Instant, timeout};

use super::{Bus, CachedSnapshot, Presence};
use crate::metrics::Metrics;

const PRESENCE_SECONDS: u64 = 60;
const SNAPSHOT_SECONDS: u64 = 3_600;
/// A larger one is read from the store.
const SNAPSHOT_BYTES_MAX: usize = 8 * 1024 * 1024;
/// A bus that is slower than this is as good as away.
const PATIENCE: Duration = Duration::from_millis(250);

/// After a failure it is left alone for this long, so that nobody waits for it again and again.
const PAUSE: Duration = Duration::from_secs(1);

/// A connection to Redis.
pub struct RedisBus {
    connection: ConnectionManager,
    metrics: Metrics,
    failed: Mutex<Option<Instant>>,
}

impl RedisBus {
    /// Connects when first used; a Redis that is away is no reason not to start.
    ///
    /// # Errors
    /// When the URL cannot be understood.
    pub fn new(url: &str, metrics: Metrics) -> Result<Self, redis::RedisError> {
        let client = redis::Client::open(url)?;
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        let connection = ConnectionManager::new_lazy_with_config(client, config)?;
        Ok(Self {
            connection,
            metrics,
            failed: Mutex::default(),
        })
    }

    fn failed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits a moment for an answer and turns every failure into "not known".
    async fn try_for<T>(&self, call: impl Future<Output = redis::RedisResult<T>>) -> Option<T> {
        if self.failed().is_some_and(|failed| failed.elapsed() < PAUSE) {
            return None;
        }
        let answer = timeout(PATIENCE, call).await;
        let up = matches!(answer, Ok(Ok(_)));
        *self.failed() = (!up).then(Instant::now);
        self.metrics.redis_up.set(i64::from(up));
        match answer {
            Ok(Ok(value)) => Some(value),
            Ok(Err(error)) => {
                tracing::debug!(%error, "redis failed; going on without it");
                None
            }
            Err(_) => None,
        }
    }
}

#[async_trait]
impl Bus for RedisBus {
    async fn publish_presence(&self, document: &DocumentId, presence: Vec<Presence>) {
        let mut connection = self.connection.clone();
        let key = format!("collab:presence:{document}");
        if presence.is_empty() {
            self.try_for(connection.del::<_, ()>(key)).await;
        } else {
            let json = serde_json::to_string(&presence).unwrap_or_default();
            self.try_for(connection.set_ex::<_, _, ()>(key, json, PRESENCE_SECONDS))
                .await;
        }
    }

    async fn presence(&self, document: &DocumentId) -> Option<Vec<Presence>> {
        let mut connection = self.connection.clone();
        let json: String = self
            .try_for(connection.get::<_, Option<String>>(format!("collab:presence:{document}")))
            .await??;
        serde_json::from_str(&json).ok()
    }

    async fn cache_snapshot(
        &self,
        document: &DocumentId,
        room_epoch: RoomEpoch,
        seq: Seq,
        bytes: &Bytes,
    ) {
        if SNAPSHOT_BYTES_MAX < bytes.len() {
            return;
        }
        let mut value = BytesMut::with_capacity(bytes.len() + 16);
        value.put_i64_le(room_epoch.0);
        value.put_i64_le(seq.0);
        value.put_slice(bytes);
        let mut connection = self.connection.clone();
        let key = format!("collab:snapshot:{document}");
        self.try_for(connection.set_ex::<_, _, ()>(key, value.as_ref(), SNAPSHOT_SECONDS))
            .await;
    }

    async fn cached_snapshot(&self, document: &DocumentId) -> Option<CachedSnapshot> {
        let mut connection = self.connection.clone();
        let value: Vec<u8> = self
            .try_for(connection.get::<_, Option<Vec<u8>>>(format!("collab:snapshot:{document}")))
            .await??;
        let mut value = Bytes::from(value);
        let room_epoch = RoomEpoch(value.try_get_i64_le().ok()?);
        let seq = Seq(value.try_get_i64_le().ok()?);
        Some(CachedSnapshot {
            room_epoch,
            seq,
            bytes: value,
        })
    }

    async fn is_up(&self) -> Option<bool> {
        let mut connection = self.connection.clone();
        Some(self.try_for(connection.ping::<()>()).await.is_some())
    }
}
