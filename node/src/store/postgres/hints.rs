//! What other sessions say they changed.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Executor;
use sqlx::postgres::PgListener;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::sessions::Sessions;
use super::{CONTROL_TIMEOUT, within};

/// Between two attempts to listen for changes of the map.
const LISTEN_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// After so much silence the session that listens is asked whether it is still there.
const LISTEN_CHECK_EVERY: Duration = Duration::from_secs(10);
const MAP_CHANNEL: &str = "collab_map";
const MEMBERS_CHANNEL: &str = "collab_members";

/// What other sessions said they did.
#[derive(Debug, Default)]
pub(super) struct Hints {
    pub(super) map: Notify,
    pub(super) members: Notify,
}

/// Passes notifications on for as long as the store lives. Several that come together are one.
pub(super) async fn listen(sessions: Arc<Sessions>, hints: Arc<Hints>) {
    loop {
        let lost = async {
            let mut listener = PgListener::connect_with(&sessions.driver()).await?;
            listener.eager_reconnect(false);
            listener.listen_all([MAP_CHANNEL, MEMBERS_CHANNEL]).await?;
            // Who knows what was missed.
            hints.map.notify_one();
            hints.members.notify_one();
            loop {
                match timeout(LISTEN_CHECK_EVERY, listener.try_recv()).await {
                    Ok(notification) => match notification? {
                        Some(hint) if hint.channel() == MEMBERS_CHANNEL => {
                            hints.members.notify_one();
                        }
                        Some(_) => hints.map.notify_one(),
                        None => return Ok(()),
                    },
                    Err(_) => {
                        within(CONTROL_TIMEOUT, listener.execute("select")).await?;
                    }
                }
            }
        };
        let lost: Result<(), sqlx::Error> = lost.await;
        if let Err(error) = lost {
            tracing::debug!(%error, "cannot listen for changes of the map; polling finds them");
        }
        tokio::time::sleep(LISTEN_AGAIN_AFTER).await;
    }
}
