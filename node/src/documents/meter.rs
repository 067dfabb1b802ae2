//! How busy the documents of this node are, for the operator, who moves slots by it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use collab_core::control::{Activity, DocumentLoad, SlotLoad};
use collab_core::ids::{DocumentId, Slot};
use collab_core::limits::BUSY_DOCUMENTS_MAX;
use tokio::time::{Instant, sleep};

use super::Documents;
use super::unload::Idle;

/// Between two samples.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// Of the average, a new sample is this part: what a document did half a minute ago counts little.
const SAMPLE_PART: u32 = 3;

/// The load as last sampled.
#[derive(Clone, Debug, Default)]
pub struct Load {
    /// The slots with an open document, in order.
    pub slots: Vec<SlotLoad>,
    /// The busiest documents, the busiest first.
    pub documents: Vec<DocumentLoad>,
}

/// What the task of a document counts.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) connections: AtomicU32,
    /// While the document may leave.
    idle: Mutex<Option<Idle>>,
    updates: AtomicU64,
    bytes: AtomicU64,
}

impl Counts {
    pub(super) fn update(&self, bytes: usize) {
        self.updates.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn idle(&self) -> Option<Idle> {
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_idle(&self, idle: Option<Idle>) {
        *self.idle.lock().unwrap_or_else(PoisonError::into_inner) = idle;
    }
}

/// Counts and what they came to so far.
#[derive(Debug, Default)]
pub(super) struct Meter {
    pub(super) counts: Arc<Counts>,
    average: Activity,
}

impl Meter {
    /// Takes what was counted in this time into the average.
    fn sample(&mut self, time: Duration) -> Activity {
        let per = |count: &AtomicU64, unit: Duration| {
            let count = u128::from(count.swap(0, Ordering::Relaxed));
            u32::try_from(count * unit.as_millis() / time.as_millis().max(1)).unwrap_or(u32::MAX)
        };
        let average = |before: u32, now: u32| before - before / SAMPLE_PART + now / SAMPLE_PART;
        self.average = Activity {
            connections: self.counts.connections.load(Ordering::Relaxed),
            updates_per_minute: average(
                self.average.updates_per_minute,
                per(&self.counts.updates, Duration::from_mins(1)),
            ),
            bytes_per_second: average(
                self.average.bytes_per_second,
                per(&self.counts.bytes, Duration::from_secs(1)),
            ),
        };
        self.average
    }
}

impl Documents {
    /// The load as last sampled.
    pub fn load(&self) -> Load {
        self.load
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Samples the load for ever, and forgets what was read ahead in vain.
    pub async fn measure(self: Arc<Self>) {
        let mut begun = Instant::now();
        loop {
            sleep(SAMPLE_EVERY).await;
            let load = self.sample(begun.elapsed());
            begun = Instant::now();
            self.preloads.forget_old();
            *self.load.lock().unwrap_or_else(PoisonError::into_inner) = load;
        }
    }

    fn sample(&self, time: Duration) -> Load {
        let mut slots = BTreeMap::<Slot, SlotLoad>::new();
        let mut busy = Vec::<DocumentLoad>::new();
        for (document, entry) in &mut self.open().documents {
            let activity = entry.meter.sample(time);
            let slot = slots.entry(entry.slot).or_insert_with(|| SlotLoad {
                slot: entry.slot,
                ..SlotLoad::default()
            });
            slot.documents += 1;
            slot.activity = slot.activity.plus(activity);
            remember_if_busy(&mut busy, document, activity);
        }
        Load {
            slots: slots.into_values().collect(),
            documents: busy,
        }
    }
}

/// Keeps the busiest in order; equal ones by name, so that the answer does not depend on a hash map.
fn remember_if_busy(busy: &mut Vec<DocumentLoad>, document: &DocumentId, activity: Activity) {
    let key = |points, document: &DocumentId| (std::cmp::Reverse(points), document.clone());
    let own = key(activity.points(), document);
    let place = busy.partition_point(|other| key(other.activity.points(), &other.document) < own);
    if 0 < activity.points() && place < BUSY_DOCUMENTS_MAX {
        busy.truncate(BUSY_DOCUMENTS_MAX - 1);
        let document = document.clone();
        busy.insert(place, DocumentLoad { document, activity });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_average_follows_what_is_counted_and_forgets() {
        let mut meter = Meter::default();
        meter.counts.connections.store(3, Ordering::Relaxed);
        for _ in 0..40 {
            for _ in 0..50 {
                meter.counts.update(1024);
            }
            meter.sample(SAMPLE_EVERY);
        }
        let busy = meter.average;
        assert_eq!(busy.connections, 3);
        assert!((590..=600).contains(&busy.updates_per_minute), "{busy:?}");
        assert!(
            (10_200..=10_240).contains(&busy.bytes_per_second),
            "{busy:?}"
        );
        assert!((110..=113).contains(&busy.points()), "{busy:?}");
        for _ in 0..12 {
            meter.sample(SAMPLE_EVERY);
        }
        assert!(meter.average.points() < 10, "{:?}", meter.average);
    }

    #[test]
    fn only_the_busiest_are_told() {
        let mut busy = Vec::new();
        for number in 0..100_u32 {
            let id = DocumentId::new(&format!("doc-{number:02}")).expect("valid");
            let activity = Activity {
                connections: (number * 37) % 100 / 2,
                ..Activity::default()
            };
            remember_if_busy(&mut busy, &id, activity);
        }
        let points: Vec<_> = busy.iter().map(|load| load.activity.points()).collect();
        assert_eq!(
            points,
            [
                49, 49, 48, 48, 47, 47, 46, 46, 45, 45, 44, 44, 43, 43, 42, 42
            ]
        );
        assert!(busy.windows(2).all(|pair| {
            let [a, b] = pair else { unreachable!() };
            a.activity.points() > b.activity.points() || a.document < b.document
        }));
    }
}
