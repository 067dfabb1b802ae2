//! Rows that were changed behind the store's back, and the snapshots that help.

use super::*;

on_all! {
    a_hole_in_the_log_is_damage
    a_wrong_checksum_is_damage
    a_bad_snapshot_is_skipped_for_the_one_before
    snapshots_of_two_documents_that_were_swapped_do_not_verify
    a_document_without_any_good_snapshot_is_damaged
    compaction_keeps_two_snapshots_that_verify
    a_snapshot_is_written_once
}

async fn a_hole_in_the_log_is_damage(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    node.write(&doc, 1, 1..=5).await;
    let lost = |seqs: RangeInclusive<i64>| Harm::RowsLost(Seq(*seqs.start())..=Seq(*seqs.end()));
    bench.harm(&doc, lost(3..=3)).await;
    assert_eq!(bench.damage(&doc).await, Seq(3));
    bench.harm(&doc, lost(1..=2)).await;
    assert_eq!(bench.damage(&doc).await, Seq(1));
    // Rows that a snapshot covers are not missed.
    bench.snapshot(&doc, node.right(1), 1, 3, "1 2 3").await;
    assert_eq!(
        bench.content(&doc).await,
        content(Some("1 2 3"), &["4", "5"], 5)
    );
}

async fn a_wrong_checksum_is_damage(bench: Bench) {
    let node = bench.owner().await;
    let (doc, neighbour) = (document("a"), document("b"));
    node.write(&doc, 1, 1..=3).await;
    node.write(&neighbour, 1, 1..=3).await;
    bench
        .harm(&doc, Harm::RowChanged(Seq(2), Bytes::from("Z")))
        .await;
    assert_eq!(bench.damage(&doc).await, Seq(2));
    assert_eq!(
        bench.content(&neighbour).await,
        content(None, &["1", "2", "3"], 3)
    );
}

async fn a_bad_snapshot_is_skipped_for_the_one_before(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    node.write(&doc, 1, 1..=6).await;
    bench.snapshot(&doc, node.right(1), 1, 2, "1 2").await;
    bench.snapshot(&doc, node.right(1), 1, 4, "1 2 3 4").await;
    assert_eq!(bench.compact(&doc, node.right(1)).await, Fence::Held);
    assert_eq!(
        bench.content(&doc).await,
        content(Some("1 2 3 4"), &["5", "6"], 6)
    );
    bench.harm(&doc, changed(4, "1 2 3 5")).await;
    assert_eq!(
        bench.content(&doc).await,
        content(Some("1 2"), &["3", "4", "5", "6"], 6)
    );
    // The tail must reach what the bad snapshot speaks of.
    bench.harm(&doc, Harm::RowsLost(Seq(4)..=Seq(6))).await;
    assert_eq!(bench.damage(&doc).await, Seq(4));
}

async fn snapshots_of_two_documents_that_were_swapped_do_not_verify(bench: Bench) {
    let node = bench.owner().await;
    let (a, b) = (document("a"), document("b"));
    for doc in [&a, &b] {
        node.write(doc, 1, 1..=3).await;
        bench
            .snapshot(doc, node.right(1), 1, 2, &format!("of {doc}"))
            .await;
    }
    assert_eq!(bench.content(&a).await, content(Some("of a"), &["3"], 3));
    bench.harm(&a, Harm::SnapshotsSwapped(b.clone())).await;
    // With the log still complete, each opens without its snapshot.
    assert_eq!(bench.content(&a).await, content(None, &["1", "2", "3"], 3));
    assert_eq!(bench.content(&b).await, content(None, &["1", "2", "3"], 3));
}

async fn a_document_without_any_good_snapshot_is_damaged(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    node.write(&doc, 1, 1..=4).await;
    bench.snapshot(&doc, node.right(1), 1, 3, "1 2 3").await;
    bench.snapshot(&doc, node.right(1), 1, 4, "1 2 3 4").await;
    bench.compact(&doc, node.right(1)).await;
    bench.harm(&doc, Harm::HashesLost).await;
    assert_eq!(bench.damage(&doc).await, Seq(1));
    // Not an empty document, either.
    bench.harm(&doc, ALL_ROWS_LOST).await;
    assert_eq!(bench.damage(&doc).await, Seq(1));
}

async fn compaction_keeps_two_snapshots_that_verify(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("ü");
    node.write(&doc, 1, 1..=9).await;
    let mut rows = Vec::new();
    for seq in [3, 5, 7, 9] {
        bench.snapshot(&doc, node.right(1), 1, seq, "state").await;
        if seq == 7 {
            bench.harm(&doc, changed(7, "bad")).await;
        }
        assert_eq!(bench.compact(&doc, node.right(1)).await, Fence::Held);
        let keys: Vec<_> = (1..=9).map(|seq| (doc.clone(), Seq(seq))).collect();
        rows.push(bench.written(&keys).await.len());
    }
    // One snapshot: nothing is cut. Then up to 3; a bad one changes nothing; then up to 5, not 7.
    assert_eq!(rows, [9, 6, 6, 4]);
    bench.harm(&doc, changed(9, "bad")).await;
    assert_eq!(
        bench.content(&doc).await,
        content(Some("state"), &["6", "7", "8", "9"], 9)
    );
}

async fn a_snapshot_is_written_once(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    node.write(&doc, 1, 1..=1).await;
    for bytes in ["first", "second"] {
        assert_eq!(
            bench.snapshot(&doc, node.right(1), 1, 1, bytes).await,
            Fence::Held
        );
    }
    assert_eq!(bench.content(&doc).await, content(Some("first"), &[], 1));
    // One of another life is not of this document.
    bench.snapshot(&doc, node.right(1), 2, 2, "third").await;
    assert_eq!(bench.content(&doc).await, content(Some("first"), &[], 1));
}

fn changed(seq: i64, bytes: &'static str) -> Harm {
    Harm::SnapshotChanged(Seq(seq), Bytes::from(bytes))
}
