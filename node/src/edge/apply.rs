//! An update that comes without a client: a socket of one message.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use collab_core::document::NO_EDITS;
use collab_core::ids::DocumentId;
use collab_core::scan::{self, Scan};
use collab_core::wire::relay::UpdateKind;
use collab_core::wire::y_websocket::{self, Message};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use yrs::updates::decoder::Decode;
use yrs::{ClientID, StateVector};

use super::outbox::{Outbox, Taken, Taker};
use super::room::FromSocket;
use super::{CLOSE_POLICY, CLOSE_TRY_AGAIN, Edge, Family, Line, Membership, Visitor};

/// How long a receipt is waited for, also while the document moves.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why an update is not known to be saved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApplyError {
    /// It is not an update, or not one that fits. Send another.
    #[error("{0}")]
    Invalid(String),
    /// It refers to what the document does not have. Send the whole state.
    #[error(
        "the update refers to edits that are not in the document (client {client}, from clock {clock}); \
         send them too, best the whole state"
    )]
    Gap {
        /// Client of the first missing edit.
        client: u64,
        /// Its clock.
        clock: u32,
    },
    /// The document may not be had.
    #[error("{0}")]
    Denied(String),
    /// There is no room for the document now, or for one more socket in it.
    #[error("{0}")]
    Full(String),
    /// Perhaps it is saved, perhaps not. Trying again does no harm.
    #[error("the update was not saved in time; try again")]
    Unknown,
}

impl Edge {
    /// Adds an update to a document, which is created if need be, and returns once it is durable.
    ///
    /// # Errors
    /// When it is refused, or not saved within 10 s.
    pub async fn apply(
        self: &Arc<Self>,
        document: &DocumentId,
        visitor: Visitor,
        update: Bytes,
    ) -> Result<(), ApplyError> {
        let scan = scan::scan_update(&update);
        let scan = scan.map_err(|error| ApplyError::Invalid(format!("update refused: {error}")))?;
        if update.as_ref() == NO_EDITS {
            return Ok(());
        }
        let (out, taker) = Outbox::new(None);
        let line = Line {
            out,
            credit: Arc::new(Semaphore::new(1)),
        };
        let membership = self.join(document, visitor, Family::YWebsocket, line);
        let saved = until_saved(&membership, &scan, &update, taker);
        timeout(PATIENCE, saved)
            .await
            .unwrap_or(Err(ApplyError::Unknown))
    }
}

/// Answers each owner that asks what this side has, until one says that it is durable.
async fn until_saved(
    membership: &Membership,
    scan: &Scan<'_>,
    update: &Bytes,
    taker: Taker,
) -> Result<(), ApplyError> {
    let mut frames = Vec::new();
    loop {
        if let Taken::End(_, close) = taker.take(&mut frames).await {
            return Err(match close.code {
                CLOSE_POLICY => ApplyError::Invalid(close.reason),
                CLOSE_TRY_AGAIN => ApplyError::Full(close.reason),
                _ => ApplyError::Unknown,
            });
        }
        for frame in frames.drain(..) {
            for message in y_websocket::parse(&frame) {
                match message {
                    Ok(Message::SyncStep1 { state_vector }) => {
                        let known = StateVector::decode_v1(state_vector).unwrap_or_default();
                        if let Some(gap) = scan.missing(|client| known.get(&ClientID::new(client)))
                        {
                            let (client, clock) = (gap.client, gap.clock);
                            return Err(ApplyError::Gap { client, clock });
                        }
                        let _ = membership.room.send(FromSocket::Update {
                            connection: membership.connection,
                            kind: UpdateKind::Step2,
                            update: update.clone(),
                        });
                    }
                    // It asked for nothing else: this is its own, come back.
                    Ok(Message::Update { update: saved }) if saved == update.as_ref() => {
                        return Ok(());
                    }
                    Ok(Message::PermissionDenied { reason }) => {
                        return Err(ApplyError::Denied(reason.to_owned()));
                    }
                    _ => {}
                }
            }
        }
    }
}
