//! Log, lives and lists of documents.

use super::*;

on_all! {
    what_was_appended_is_loaded
    an_older_epoch_is_fenced
    a_key_is_written_once
    only_a_live_document_is_appended_to
    a_thousand_rows_are_one_batch
    a_tail_joins_what_was_read_or_is_none
    a_new_life_goes_on_counting
    documents_are_listed_by_bytes
}

async fn what_was_appended_is_loaded(bench: Bench) {
    let node = bench.owner().await;
    let (a, b) = (document("a"), document("b/ü"));
    node.create(&a, 1).await;
    node.create(&b, 2).await;

    let batch = [
        node.update(&a, 1, 1, "one"),
        node.update(&b, 2, 1, "uno"),
        node.update(&a, 1, 2, "two"),
    ];
    let mut appended = bench.append(&batch).await;
    appended.held.sort_unstable();
    appended.inserted.sort_unstable();
    assert_eq!(appended.held, [Slot(1), Slot(2)]);
    assert_eq!(
        appended.inserted,
        [
            (a.clone(), Seq(1)),
            (a.clone(), Seq(2)),
            (b.clone(), Seq(1))
        ]
    );

    assert_eq!(bench.content(&a).await, content(None, &["one", "two"], 2));
    assert_eq!(bench.content(&b).await, content(None, &["uno"], 1));
    let written = bench
        .written(&[(a.clone(), Seq(2)), (a.clone(), Seq(3))])
        .await;
    assert_eq!(written.len(), 1);
    assert_eq!(
        (written[0].seq, written[0].epoch, written[0].crc32c),
        (Seq(2), node.epoch(1), crc32c::crc32c(b"two"))
    );
    assert!(matches!(
        bench.store.load(&document("c")).await.unwrap(),
        Loaded::Absent
    ));
}

async fn an_older_epoch_is_fenced(bench: Bench) {
    let old = bench.owner().await;
    let doc = document("a");
    old.create(&doc, 1).await;
    assert_eq!(
        bench.append(&[old.update(&doc, 1, 1, "one")]).await.held,
        [Slot(1)]
    );
    let new = bench.succeed(&old, &[1, 9]).await;
    assert_eq!(new.epoch(1), Epoch(old.epoch(1).0 + 1));

    // Also the right epoch with the wrong incarnation, and the reverse.
    let mixed = Ownership {
        epoch: new.epoch(1),
        ..old.right(1)
    };
    for right in [
        old.right(1),
        mixed,
        Ownership {
            epoch: old.epoch(1),
            ..new.right(1)
        },
    ] {
        let late = Append {
            ownership: right,
            ..old.update(&doc, 1, 2, "late")
        };
        let appended = bench.append(&[late]).await;
        assert!(
            appended.held.is_empty() && appended.inserted.is_empty(),
            "{right:?}: {appended:?}"
        );
        assert_eq!(
            bench.snapshot(&doc, right, 1, 1, "one").await,
            Fence::Fenced
        );
        assert_eq!(bench.compact(&doc, right).await, Fence::Fenced);
        assert_eq!(bench.delete(&doc, right, Seq(1)).await, Fence::Fenced);
        let created = bench
            .store
            .create(&document("b"), right, Recreate::Allowed)
            .await
            .unwrap();
        assert_eq!(created, Created::Fenced);
    }
    assert_eq!(bench.content(&doc).await, content(None, &["one"], 1));
    assert!(
        bench
            .store
            .document(&document("b"))
            .await
            .unwrap()
            .is_none()
    );

    // A fenced slot does no harm to its neighbours in the batch.
    let other = document("other");
    new.create(&other, 9).await;
    let batch = [
        old.update(&doc, 1, 2, "late"),
        new.update(&other, 9, 1, "good"),
    ];
    let appended = bench.append(&batch).await;
    assert_eq!(
        (appended.held, appended.inserted),
        (vec![Slot(9)], vec![(other, Seq(1))])
    );
}

async fn a_key_is_written_once(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    node.create(&doc, 1).await;
    bench.append(&[node.update(&doc, 1, 1, "first")]).await;
    let again = [
        node.update(&doc, 1, 1, "second"),
        node.update(&doc, 1, 2, "third"),
    ];
    let appended = bench.append(&again).await;
    assert_eq!(
        (appended.held, appended.inserted),
        (vec![Slot(1)], vec![(doc.clone(), Seq(2))])
    );
    let written = bench.written(&[(doc.clone(), Seq(1))]).await;
    assert_eq!(written[0].crc32c, crc32c::crc32c(b"first"));
    assert_eq!(
        bench.content(&doc).await,
        content(None, &["first", "third"], 2)
    );
}

async fn only_a_live_document_is_appended_to(bench: Bench) {
    let node = bench.owner().await;
    let (absent, gone) = (document("absent"), document("gone"));
    node.create(&gone, 1).await;
    bench.append(&[node.update(&gone, 1, 1, "one")]).await;
    assert_eq!(
        bench.delete(&gone, node.right(1), Seq(1)).await,
        Fence::Held
    );
    let appended = bench
        .append(&[
            node.update(&absent, 1, 1, "x"),
            node.update(&gone, 1, 2, "y"),
        ])
        .await;
    assert_eq!((appended.held, appended.inserted), (vec![Slot(1)], vec![]));
    assert_eq!(
        bench.snapshot(&gone, node.right(1), 1, 1, "one").await,
        Fence::Held
    );
    assert!(matches!(
        bench.store.load(&gone).await.unwrap(),
        Loaded::Deleted
    ));
    assert!(matches!(
        bench.store.load(&absent).await.unwrap(),
        Loaded::Absent
    ));
    assert!(bench.store.document(&gone).await.unwrap().is_none());
}

async fn a_thousand_rows_are_one_batch(bench: Bench) {
    let node = bench.owner().await;
    let documents: Vec<_> = (0..50)
        .map(|number| document(&format!("doc-{number}")))
        .collect();
    let mut batch = Vec::new();
    for (slot, doc) in (0..).zip(&documents) {
        node.create(doc, slot).await;
        batch.extend((1..=50).map(|seq| node.update(doc, slot, seq, &seq.to_string())));
    }
    let appended = bench.append(&batch).await;
    assert_eq!((appended.held.len(), appended.inserted.len()), (50, 2_500));
    for doc in &documents {
        assert_eq!(bench.content(doc).await.last, Seq(50));
    }
}

async fn a_tail_joins_what_was_read_or_is_none(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    assert_eq!(bench.tail(&doc, 1, 0).await, None, "there is no document");
    node.write(&doc, 1, 1..=4).await;
    let rows = |rows: &[&str]| Some(rows.iter().map(|&row| row.to_owned()).collect());
    assert_eq!(bench.tail(&doc, 1, 0).await, rows(&["1", "2", "3", "4"]));
    assert_eq!(bench.tail(&doc, 1, 3).await, rows(&["4"]));
    assert_eq!(bench.tail(&doc, 1, 4).await, rows(&[]));
    assert_eq!(bench.tail(&doc, 2, 3).await, None, "another life");
    assert_eq!(bench.tail(&doc, 1, 5).await, None, "what was read is lost");

    // The log is cut up to 2: what was read before that does not join any more.
    for seq in [2, 4] {
        bench.snapshot(&doc, node.right(1), 1, seq, "state").await;
    }
    assert_eq!(bench.compact(&doc, node.right(1)).await, Fence::Held);
    assert_eq!(bench.tail(&doc, 1, 1).await, None);
    assert_eq!(bench.tail(&doc, 1, 4).await, rows(&[]));
    bench.harm(&doc, ALL_ROWS_LOST).await;
    assert_eq!(
        bench.tail(&doc, 1, 3).await,
        None,
        "the last row is missing"
    );
    bench.delete(&doc, node.right(1), Seq(4)).await;
    assert_eq!(bench.tail(&doc, 1, 4).await, None, "it is gone");
}

async fn a_new_life_goes_on_counting(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    assert_eq!(
        node.create(&doc, 1).await,
        Created::Created {
            room_epoch: RoomEpoch(1)
        }
    );
    assert_eq!(node.create(&doc, 1).await, Created::Exists);
    node.append(&doc, 1, 1..=3).await;
    bench.snapshot(&doc, node.right(1), 1, 2, "1 2").await;
    // The caller knows of fewer rows than there are: they count all the same.
    assert_eq!(bench.delete(&doc, node.right(1), Seq(1)).await, Fence::Held);
    assert!(matches!(
        bench.store.load(&doc).await.unwrap(),
        Loaded::Deleted
    ));
    assert_eq!(bench.store.documents(None, 10).await.unwrap(), []);

    let opened = bench
        .store
        .create(&doc, node.right(1), Recreate::Refused)
        .await
        .unwrap();
    assert_eq!(opened, Created::Exists, "opening does not bring it back");
    assert!(matches!(
        bench.store.load(&doc).await.unwrap(),
        Loaded::Deleted
    ));
    assert_eq!(
        node.create(&doc, 1).await,
        Created::Created {
            room_epoch: RoomEpoch(2)
        }
    );
    assert_eq!(bench.content(&doc).await, content(None, &[], 3));
    let late = bench
        .append(&[node.update(&doc, 1, 3, "of the life before")])
        .await;
    assert!(late.inserted.is_empty());
    bench.append(&[node.update(&doc, 1, 4, "4")]).await;
    assert_eq!(bench.content(&doc).await, content(None, &["4"], 4));
    assert_eq!(
        bench.store.document(&doc).await.unwrap().unwrap().seq,
        Seq(4)
    );
}

async fn documents_are_listed_by_bytes(bench: Bench) {
    let node = bench.owner().await;
    let names = ["B", "a", "a/b", "ab", "ä", "日本"];
    for name in names.iter().rev() {
        node.create(&document(name), 1).await;
    }
    bench
        .append(&[node.update(&document("a"), 1, 1, "x")])
        .await;
    bench.delete(&document("ab"), node.right(1), Seq(0)).await;

    let first = bench.store.documents(None, 2).await.unwrap();
    let rest = bench
        .store
        .documents(Some(&first[1].id), 100)
        .await
        .unwrap();
    let listed: Vec<_> = first
        .iter()
        .chain(&rest)
        .map(|row| row.id.as_str())
        .collect();
    assert_eq!(listed, ["B", "a", "a/b", "ä", "日本"]);
    let row = &first[1];
    assert_eq!(row.seq, Seq(1));
    assert!(
        row.created_ms > 1_600_000_000_000 && row.created_ms <= row.updated_ms,
        "{row:?}"
    );
    assert_eq!(
        bench.store.document(&row.id).await.unwrap().as_ref(),
        Some(row)
    );
    assert_eq!(bench.store.document(&document("ab")).await.unwrap(), None);
}
