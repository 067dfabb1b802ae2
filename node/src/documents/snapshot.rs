//! Writing a snapshot: store it, prove that it can be read, then cut the log.

use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use collab_core::document::Document;
use collab_core::ids::{Epoch, Seq};
use collab_core::scan::Summary;
use yrs::Update;
use yrs::updates::decoder::Decode;

use crate::bus::Bus;
use crate::metrics::Metrics;
use crate::store::{Fence, NewSnapshot, Store};
use crate::tasks::Tasks;

/// Stores a snapshot of a document that was opened after so many `failovers`, and cuts the log below the older of the two that are
/// kept. Answers what is in it if it is stored.
pub(super) async fn write(
    tasks: &Tasks,
    store: &dyn Store,
    bus: &dyn Bus,
    metrics: &Metrics,
    snapshot: NewSnapshot,
    failovers: u64,
) -> Option<Summary> {
    let result = write_verified(tasks, store, bus, &snapshot, failovers).await;
    let label = if result.is_ok() { "written" } else { "failed" };
    metrics.snapshots.with_label_values(&[label]).inc();
    match result {
        Ok(whole) => Some(whole),
        Err(reason) => {
            tracing::warn!(document.id = %snapshot.document, seq = %snapshot.seq, reason, "no snapshot was written");
            None
        }
    }
}

async fn write_verified(
    tasks: &Tasks,
    store: &dyn Store,
    bus: &dyn Bus,
    snapshot: &NewSnapshot,
    failovers: u64,
) -> Result<Summary, String> {
    let bytes = snapshot.bytes.clone();
    let verified = tasks
        .compute(move || catch_unwind(AssertUnwindSafe(|| verify(&bytes))))
        .await;
    let whole = match verified {
        Ok(Ok(verdict)) => verdict?,
        Ok(Err(_)) | Err(_) => return Err("reading it back panics".to_owned()),
    };
    if store.failovers().seen != failovers {
        return Err("it may hold what the database lost when it failed over".to_owned());
    }
    match store.snapshot(snapshot).await {
        Ok(Fence::Held) => {}
        Ok(Fence::Fenced) => return Err("the slot has a new owner".to_owned()),
        Err(error) => return Err(error.to_string()),
    }
    bus.cache_snapshot(
        &snapshot.document,
        snapshot.room_epoch,
        snapshot.seq,
        &snapshot.bytes,
    )
    .await;
    // A compaction that fails only leaves more to read; the next one makes up for it.
    if let Err(error) = store.compact(&snapshot.document, snapshot.ownership).await {
        tracing::warn!(document.id = %snapshot.document, %error, "the log was not cut");
    }
    Ok(whole)
}

/// Opens a state as a document, as the next owner will, compares what came out with what went in, and answers what was counted.
fn verify(bytes: &Bytes) -> Result<Summary, String> {
    let decode = |bytes: &[u8]| {
        Update::decode_v1(bytes).map_err(|error| format!("it cannot be decoded: {error}"))
    };
    let wanted = decode(bytes)?;
    let document = Document::open(Epoch(0), Some((Seq(0), bytes)), &[], Seq(0));
    let document = document.map_err(|error| format!("it cannot be opened: {error}"))?;
    let got = decode(&document.encode_state())?;
    if got.state_vector() == wanted.state_vector() && got.delete_set() == wanted.delete_set() {
        Ok(*document.counted())
    } else {
        Err("reading it back gives another document".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use collab_core::ids::{DocumentId, RoomEpoch, Slot};
    use collab_core::replica::new_doc;
    use uuid::Uuid;
    use yrs::{ReadTxn, StateVector, Text, Transact};

    use super::*;
    use crate::bus::memory::NoBus;
    use crate::store::Ownership;
    use crate::store::memory::Database;

    #[test]
    fn a_state_verifies_and_one_with_a_hole_does_not() {
        let doc = new_doc();
        let text = doc.get_or_insert_text("quill");
        text.insert(&mut doc.transact_mut(), 0, "hello");
        let before = doc.transact().state_vector();
        text.insert(&mut doc.transact_mut(), 5, " world");
        text.remove_range(&mut doc.transact_mut(), 0, 1);
        let txn = doc.transact();
        let state = txn.encode_state_as_update_v1(&StateVector::default());
        let whole = verify(&state.into()).unwrap();
        assert_eq!((whole.clocks, whole.deleted_clocks), (11, 1));
        assert!(verify(&txn.encode_diff_v1(&before).into()).is_err());
        assert!(verify(&Bytes::from_static(b"\x01\x01")).is_err());
    }

    /// Nobody owns the slot, so the store refuses whatever it is asked.
    #[tokio::test]
    async fn what_was_opened_before_a_failover_does_not_even_reach_the_store() {
        let database = Database::default();
        let store = database.sessions();
        let ownership = Ownership {
            slot: Slot(1),
            epoch: Epoch(1),
            incarnation: Uuid::nil(),
        };
        let snapshot = NewSnapshot {
            document: DocumentId::new("a").unwrap(),
            ownership,
            room_epoch: RoomEpoch(1),
            seq: Seq(1),
            bytes: Document::open(Epoch(1), None, &[], Seq(0))
                .unwrap()
                .encode_state(),
        };
        let tasks = Tasks::default();
        let refused = async |failovers| {
            let written = write_verified(&tasks, &store, &NoBus, &snapshot, failovers);
            written.await.unwrap_err()
        };
        let opened = store.failovers().seen;
        assert_eq!(refused(opened).await, "the slot has a new owner");
        database.fail_over(0);
        store.reclaim(Uuid::nil(), &[]).await.unwrap();
        assert!(refused(opened).await.contains("failed over"));
        assert_eq!(
            refused(store.failovers().seen).await,
            "the slot has a new owner"
        );
    }
}
