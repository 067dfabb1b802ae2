//! What the CRDT library holds of a document, and where its structs are. A document that nobody changes rests
//! without: its past has all of it as bytes, of which the content is built again as soon as it is needed.

use std::time::Duration;

use yrs::Update;
use yrs::updates::decoder::Decode;

use super::Document;
use crate::limits::{REST_AFTER, RESTING_BYTES_MAX};
use crate::replica::Replica;
use crate::scan::{self, Places, Summary};

/// A document as it is worked with.
#[derive(Default)]
pub(super) struct Content {
    pub(super) doc: Replica,
    pub(super) places: Places,
}

impl Content {
    /// Takes an update that was taken before. The error is for people.
    pub(super) fn replay(&mut self, update: &[u8]) -> Result<Summary, String> {
        let scan = scan::scan_stored(update).map_err(|error| error.to_string())?;
        let taken = self.places.take(&scan);
        taken.map_err(|error| error.to_string())?;
        let decoded = Update::decode_v1(update).map_err(|error| error.to_string())?;
        let applied = self.doc.apply(&scan, decoded);
        applied.map_err(|error| error.to_string())?;
        Ok(*scan.summary())
    }
}

impl Document {
    /// The document takes little memory until it is needed again.
    pub fn is_at_rest(&self) -> bool {
        self.content.get().is_none()
    }

    pub(super) fn content(&self) -> &Content {
        self.content.get_or_init(|| {
            let mut content = Content::default();
            for update in self.past.updates() {
                let replayed = content.replay(update);
                replayed.expect("what was applied once is applied again");
            }
            Box::new(content)
        })
    }

    pub(super) fn content_mut(&mut self) -> &mut Content {
        self.content();
        self.content.get_mut().expect("built above")
    }

    /// Sets the content aside if it was not needed for a while, is quickly built again, and is all durable.
    pub(super) fn rest_if_quiet(&mut self, now: Duration) {
        let since = *self.quiet_since.get_or_insert(now);
        if now.saturating_sub(since) < REST_AFTER || RESTING_BYTES_MAX < self.past.bytes() {
            return;
        }
        if self.is_settled() && self.waiting.is_empty() && !self.is_at_rest() {
            // One state takes less memory than the updates that made it, and is built of faster.
            self.whole_state();
            self.content.take();
            self.past.shrink();
            self.uncommitted.shrink_to_fit();
        }
    }
}
