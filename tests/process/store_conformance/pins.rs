//! Documents with a slot of their own.

use super::*;

on_all! {
    a_pin_gives_a_document_its_own_slot_and_fences_both
    a_free_slot_is_used_again_and_its_epoch_goes_on
    an_older_term_pins_nothing
}

mod on_clusters {
    use super::*;

    on_clusters! {
        documents_pinned_at_once_get_slots_of_their_own
    }
}

const HOME: Slot = Slot(7);
const TERM: Term = Term(1);

async fn a_pin_gives_a_document_its_own_slot_and_fences_both(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("hot");
    node.write(&doc, HOME.0, 1..=2).await;
    let seen = bench.map(0).await;
    assert!(seen.is_whole);
    assert_eq!(seen.pins, []);
    assert_eq!(bench.pinned(&doc).await, None);

    bench.pin(&doc).await;
    let own = Slot(SLOTS);
    assert_eq!(bench.pinned(&doc).await, Some(own));
    let change = bench.map(seen.horizon).await;
    assert!(!change.is_whole);
    let changed: Vec<_> = news(&seen, &change)
        .map(|row| (row.slot, row.owner, row.epoch))
        .collect();
    let me = Some(node.incarnation);
    assert_eq!(changed, [(HOME, me, Epoch(2)), (own, me, Epoch(1))]);
    assert_eq!(change.pins, [(own, Some(doc.clone()))]);

    // Whoever has it open under its old slot is fenced, and the neighbours with it.
    let late = node.update(&doc, HOME.0, 3, "late");
    let fenced = bench.append(&[late]).await;
    assert!(fenced.held.is_empty() && fenced.inserted.is_empty());
    assert_eq!(
        bench
            .create(&document("neighbour"), node.right(HOME.0))
            .await,
        Created::Fenced
    );
    let right = bench.right_now(own.0).await;
    let update = Append {
        ownership: right,
        ..node.update(&doc, HOME.0, 3, "3")
    };
    assert_eq!(bench.append(&[update]).await.held, [own]);
    assert_eq!(
        bench.content(&doc).await,
        content(None, &["1", "2", "3"], 3)
    );

    let before = bench.map(0).await;
    bench.pin(&doc).await;
    assert_eq!(bench.map(0).await.slots, before.slots, "it has one already");

    bench.unpin(&doc).await;
    assert_eq!(bench.pinned(&doc).await, None);
    let change = bench.map(before.horizon).await;
    let of = |slot| change.slots.iter().find(|row| row.slot == slot).unwrap();
    assert_eq!((of(HOME).owner, of(HOME).epoch), (me, Epoch(3)));
    assert_eq!((of(own).owner, of(own).epoch), (None, Epoch(2)));
    assert!(change.pins.contains(&(own, None)), "{:?}", change.pins);
    let late = Append {
        ownership: right,
        ..node.update(&doc, HOME.0, 4, "late")
    };
    assert!(bench.append(&[late]).await.held.is_empty());
    let before = bench.map(0).await.slots;
    bench.unpin(&doc).await;
    assert_eq!(bench.map(0).await.slots, before, "it had none");
}

async fn a_free_slot_is_used_again_and_its_epoch_goes_on(bench: Bench) {
    bench.owner().await;
    let [first, second, third] = ["first", "second", "third"].map(document);
    bench.pin(&first).await;
    bench.pin(&second).await;
    bench.unpin(&first).await;
    bench.pin(&third).await;
    assert_eq!(bench.pinned(&second).await, Some(Slot(SLOTS + 1)));
    assert_eq!(bench.pinned(&third).await, Some(Slot(SLOTS)));
    assert_eq!(bench.right_now(SLOTS).await.epoch, Epoch(3));
    assert_eq!(
        bench.map(0).await.pins,
        [(Slot(SLOTS), Some(third)), (Slot(SLOTS + 1), Some(second))]
    );
}

async fn an_older_term_pins_nothing(bench: Bench) {
    bench.owner().await;
    let doc = document("hot");
    bench.pin(&doc).await;
    let newest = bench.store.take_term("second").await.unwrap();
    let before = bench.map(0).await;
    let pinned = bench.store.pin(TERM, &document("other"), HOME).await;
    assert_eq!(pinned.unwrap(), Err(newest));
    let unpinned = bench.store.unpin(TERM, &doc, HOME).await;
    assert_eq!(unpinned.unwrap(), Err(newest));
    let after = bench.map(0).await;
    assert_eq!((after.slots, after.pins), (before.slots, before.pins));
}

/// Two operators' requests, or one that was sent twice.
async fn documents_pinned_at_once_get_slots_of_their_own(bench: Bench) {
    bench.owner().await;
    let documents: Vec<_> = (0..8)
        .map(|number| document(&format!("hot-{}", number / 2)))
        .collect();
    let pins = documents.iter().map(|document| bench.pin(document));
    futures::future::join_all(pins).await;
    let mut pins = bench.map(0).await.pins;
    assert_eq!(pins.len(), 4);
    pins.sort_by_key(|(_, document)| document.clone());
    pins.dedup_by_key(|(_, document)| document.clone());
    assert_eq!(pins.len(), 4, "one slot for each");
}

impl Bench {
    pub(super) async fn pin(&self, document: &DocumentId) {
        let pinned = self.store.pin(TERM, document, HOME).await.unwrap();
        assert_eq!(pinned, Ok(()));
    }

    async fn unpin(&self, document: &DocumentId) {
        let unpinned = self.store.unpin(TERM, document, HOME).await.unwrap();
        assert_eq!(unpinned, Ok(()));
    }

    async fn pinned(&self, document: &DocumentId) -> Option<Slot> {
        self.store.pinned(document).await.unwrap()
    }
}
