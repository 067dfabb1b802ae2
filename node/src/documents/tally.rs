//! What the open documents of this node hold, as gauges: each document adds its part, and takes it back when it is closed.

use collab_core::document::Document;
use prometheus::IntGauge;

use crate::metrics::Metrics;

/// The part of one document.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    at_rest: i64,
    memory: i64,
    clocks: i64,
    deleted_clocks: i64,
    snapshot_bytes: i64,
    log_bytes: i64,
}

impl Tally {
    /// That of a document as it is now.
    pub(super) fn of(document: &Document) -> Self {
        let (counted, stored) = (document.counted(), document.stored());
        let signed = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        Self {
            at_rest: document.is_at_rest().into(),
            memory: signed(document.memory()),
            clocks: signed(counted.clocks),
            deleted_clocks: signed(counted.deleted_clocks),
            snapshot_bytes: signed(stored.snapshot as u64),
            log_bytes: signed(stored.log as u64),
        }
    }

    /// Puts another part in the place of this one.
    pub(super) fn replace(&mut self, new: Self, metrics: &Metrics) {
        let change = |gauge: &IntGauge, old: i64, new: i64| {
            if old != new {
                gauge.add(new - old);
            }
        };
        let old = std::mem::replace(self, new);
        change(&metrics.documents_at_rest, old.at_rest, new.at_rest);
        change(&metrics.documents_memory, old.memory, new.memory);
        change(&metrics.documents_clocks, old.clocks, new.clocks);
        change(
            &metrics.documents_deleted_clocks,
            old.deleted_clocks,
            new.deleted_clocks,
        );
        change(
            &metrics.documents_snapshot_bytes,
            old.snapshot_bytes,
            new.snapshot_bytes,
        );
        change(&metrics.documents_log_bytes, old.log_bytes, new.log_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gauges_are_the_sum_of_what_is_open() {
        let metrics = Metrics::new();
        let part = |clocks| Tally {
            clocks,
            ..Tally::default()
        };
        let (mut one, mut other) = (Tally::default(), Tally::default());
        one.replace(part(3), &metrics);
        other.replace(part(10), &metrics);
        one.replace(part(5), &metrics);
        assert_eq!(metrics.documents_clocks.get(), 15);
        other.replace(Tally::default(), &metrics);
        assert_eq!(metrics.documents_clocks.get(), 5);
    }
}
