//! What the stores promise, asked of both: real Postgres and SQLite.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use collab_core::control::{LoadSample, MemberState};
use collab_core::ids::{DocumentId, Epoch, NodeId, RoomEpoch, Seq, Slot, Term};
use collab_node::store::postgres::Postgres;
use collab_node::store::sqlite::Sqlite;
use collab_node::store::{
    Append, Claim, Created, Fence, LoadError, Loaded, NewSnapshot, Ownership, Recreate,
    Registration, Store, StoreError,
};
use collab_tests::postgres::Postgres as Server;
use collab_tests::process::Folder;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, PgPool, SqlitePool};
use uuid::Uuid;

const SLOTS: u16 = 256;
const LEASE: Duration = Duration::from_secs(60);

/// Makes one test per store of each function.
macro_rules! on_both {
    ($($test:ident)*) => {
        mod on_postgres { $(#[tokio::test] async fn $test() { super::$test(super::Bench::postgres().await).await; })* }
        mod on_sqlite { $(#[tokio::test] async fn $test() { super::$test(super::Bench::sqlite().await).await; })* }
    };
}

on_both! {
    what_was_appended_is_loaded
    an_older_epoch_is_fenced
    a_key_is_written_once
    only_a_live_document_is_appended_to
    a_hole_in_the_log_is_damage
    a_wrong_checksum_is_damage
    a_bad_snapshot_is_skipped_for_the_one_before
    snapshots_of_two_documents_that_were_swapped_do_not_verify
    a_document_without_any_good_snapshot_is_damaged
    compaction_keeps_two_snapshots_that_verify
    a_snapshot_is_written_once
    a_new_life_goes_on_counting
    documents_are_listed_by_bytes
    an_older_term_changes_nothing
    the_number_of_slots_cannot_change
    a_superseded_process_is_no_member
    the_map_tells_what_changed
    a_thousand_rows_are_one_batch
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
    let mut appended = bench.store.append(&batch).await.unwrap();
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
        .store
        .written(&[(a.clone(), Seq(2)), (a.clone(), Seq(3))])
        .await
        .unwrap();
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
        bench
            .store
            .append(&[old.update(&doc, 1, 1, "one")])
            .await
            .unwrap()
            .held,
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
        let appended = bench.store.append(&[late]).await.unwrap();
        assert!(
            appended.held.is_empty() && appended.inserted.is_empty(),
            "{right:?}: {appended:?}"
        );
        assert_eq!(
            bench
                .store
                .snapshot(&snapshot(&doc, right, 1, 1, "one"))
                .await
                .unwrap(),
            Fence::Fenced
        );
        assert_eq!(
            bench.store.compact(&doc, right).await.unwrap(),
            Fence::Fenced
        );
        assert_eq!(
            bench.store.delete(&doc, right, Seq(1)).await.unwrap(),
            Fence::Fenced
        );
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
    let appended = bench.store.append(&batch).await.unwrap();
    assert_eq!(
        (appended.held, appended.inserted),
        (vec![Slot(9)], vec![(other, Seq(1))])
    );
}

async fn a_key_is_written_once(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    node.create(&doc, 1).await;
    bench
        .store
        .append(&[node.update(&doc, 1, 1, "first")])
        .await
        .unwrap();
    let again = [
        node.update(&doc, 1, 1, "second"),
        node.update(&doc, 1, 2, "third"),
    ];
    let appended = bench.store.append(&again).await.unwrap();
    assert_eq!(
        (appended.held, appended.inserted),
        (vec![Slot(1)], vec![(doc.clone(), Seq(2))])
    );
    let written = bench.store.written(&[(doc.clone(), Seq(1))]).await.unwrap();
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
    bench
        .store
        .append(&[node.update(&gone, 1, 1, "one")])
        .await
        .unwrap();
    assert_eq!(
        bench
            .store
            .delete(&gone, node.right(1), Seq(1))
            .await
            .unwrap(),
        Fence::Held
    );
    let appended = bench
        .store
        .append(&[
            node.update(&absent, 1, 1, "x"),
            node.update(&gone, 1, 2, "y"),
        ])
        .await
        .unwrap();
    assert_eq!((appended.held, appended.inserted), (vec![Slot(1)], vec![]));
    assert_eq!(
        bench
            .store
            .snapshot(&snapshot(&gone, node.right(1), 1, 1, "one"))
            .await
            .unwrap(),
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

async fn a_hole_in_the_log_is_damage(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    node.write(&doc, 1, 1..=5).await;
    bench
        .execute("delete from update_log where document = 'a' and seq = 3")
        .await;
    assert_eq!(bench.damage(&doc).await, Seq(3));
    bench
        .execute("delete from update_log where document = 'a' and seq < 3")
        .await;
    assert_eq!(bench.damage(&doc).await, Seq(1));
    // Rows that a snapshot covers are not missed.
    bench
        .store
        .snapshot(&snapshot(&doc, node.right(1), 1, 3, "1 2 3"))
        .await
        .unwrap();
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
        .execute(&format!(
            "update update_log set bytes = {} where document = 'a' and seq = 2",
            bench.blob("Z")
        ))
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
    bench
        .store
        .snapshot(&snapshot(&doc, node.right(1), 1, 2, "1 2"))
        .await
        .unwrap();
    bench
        .store
        .snapshot(&snapshot(&doc, node.right(1), 1, 4, "1 2 3 4"))
        .await
        .unwrap();
    assert_eq!(
        bench.store.compact(&doc, node.right(1)).await.unwrap(),
        Fence::Held
    );
    assert_eq!(
        bench.content(&doc).await,
        content(Some("1 2 3 4"), &["5", "6"], 6)
    );
    bench
        .execute(&format!(
            "update snapshot set bytes = {} where seq = 4",
            bench.blob("1 2 3 5")
        ))
        .await;
    assert_eq!(
        bench.content(&doc).await,
        content(Some("1 2"), &["3", "4", "5", "6"], 6)
    );
    // The tail must reach what the bad snapshot speaks of.
    bench
        .execute("delete from update_log where document = 'a' and seq > 3")
        .await;
    assert_eq!(bench.damage(&doc).await, Seq(4));
}

async fn snapshots_of_two_documents_that_were_swapped_do_not_verify(bench: Bench) {
    let node = bench.owner().await;
    let (a, b) = (document("a"), document("b"));
    for doc in [&a, &b] {
        node.write(doc, 1, 1..=3).await;
        bench
            .store
            .snapshot(&snapshot(doc, node.right(1), 1, 2, &format!("of {doc}")))
            .await
            .unwrap();
    }
    assert_eq!(bench.content(&a).await, content(Some("of a"), &["3"], 3));
    for (from, to) in [("a", "x"), ("b", "a"), ("x", "b")] {
        bench
            .execute(&format!(
                "update snapshot set document = '{to}' where document = '{from}'"
            ))
            .await;
    }
    // With the log still complete, each opens without its snapshot.
    assert_eq!(bench.content(&a).await, content(None, &["1", "2", "3"], 3));
    assert_eq!(bench.content(&b).await, content(None, &["1", "2", "3"], 3));
}

async fn a_document_without_any_good_snapshot_is_damaged(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("a");
    node.write(&doc, 1, 1..=4).await;
    bench
        .store
        .snapshot(&snapshot(&doc, node.right(1), 1, 3, "1 2 3"))
        .await
        .unwrap();
    bench
        .store
        .snapshot(&snapshot(&doc, node.right(1), 1, 4, "1 2 3 4"))
        .await
        .unwrap();
    bench.store.compact(&doc, node.right(1)).await.unwrap();
    bench
        .execute(&format!("update snapshot set sha256 = {}", bench.blob("0")))
        .await;
    assert_eq!(bench.damage(&doc).await, Seq(1));
    // Not an empty document, either.
    bench
        .execute("delete from update_log where document = 'a'")
        .await;
    assert_eq!(bench.damage(&doc).await, Seq(1));
}

async fn compaction_keeps_two_snapshots_that_verify(bench: Bench) {
    let node = bench.owner().await;
    let doc = document("ü");
    node.write(&doc, 1, 1..=9).await;
    let mut rows = Vec::new();
    for seq in [3, 5, 7, 9] {
        bench
            .store
            .snapshot(&snapshot(&doc, node.right(1), 1, seq, "state"))
            .await
            .unwrap();
        if seq == 7 {
            bench
                .execute(&format!(
                    "update snapshot set bytes = {} where seq = 7",
                    bench.blob("bad")
                ))
                .await;
        }
        assert_eq!(
            bench.store.compact(&doc, node.right(1)).await.unwrap(),
            Fence::Held
        );
        let keys: Vec<_> = (1..=9).map(|seq| (doc.clone(), Seq(seq))).collect();
        rows.push(bench.store.written(&keys).await.unwrap().len());
    }
    // One snapshot: nothing is cut. Then up to 3; a bad one changes nothing; then up to 5, not 7.
    assert_eq!(rows, [9, 6, 6, 4]);
    bench
        .execute(&format!(
            "update snapshot set bytes = {} where seq = 9",
            bench.blob("bad")
        ))
        .await;
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
            bench
                .store
                .snapshot(&snapshot(&doc, node.right(1), 1, 1, bytes))
                .await
                .unwrap(),
            Fence::Held
        );
    }
    assert_eq!(bench.content(&doc).await, content(Some("first"), &[], 1));
    // One of another life is not of this document.
    bench
        .store
        .snapshot(&snapshot(&doc, node.right(1), 2, 2, "third"))
        .await
        .unwrap();
    assert_eq!(bench.content(&doc).await, content(Some("first"), &[], 1));
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
    bench
        .store
        .snapshot(&snapshot(&doc, node.right(1), 1, 2, "1 2"))
        .await
        .unwrap();
    // The caller knows of fewer rows than there are: they count all the same.
    assert_eq!(
        bench
            .store
            .delete(&doc, node.right(1), Seq(1))
            .await
            .unwrap(),
        Fence::Held
    );
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
        .store
        .append(&[node.update(&doc, 1, 3, "of the life before")])
        .await
        .unwrap();
    assert!(late.inserted.is_empty());
    bench
        .store
        .append(&[node.update(&doc, 1, 4, "4")])
        .await
        .unwrap();
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
        .store
        .append(&[node.update(&document("a"), 1, 1, "x")])
        .await
        .unwrap();
    bench
        .store
        .delete(&document("ab"), node.right(1), Seq(0))
        .await
        .unwrap();

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

async fn an_older_term_changes_nothing(bench: Bench) {
    let node = bench.owner().await;
    let first = bench.store.take_term("first").await.unwrap();
    let second = bench.store.take_term("second").await.unwrap();
    assert_eq!((first, second), (Term(1), Term(2)));
    let plan = vec![NodeId::from("node-0"); usize::from(SLOTS)];
    let before = bench.store.placement().await.unwrap();
    assert_eq!(
        bench.store.set_placement(first, &plan).await.unwrap(),
        Err(second)
    );
    assert_eq!(
        bench
            .store
            .set_drain(first, &node.name, true)
            .await
            .unwrap(),
        Err(second)
    );
    assert_eq!(bench.store.placement().await.unwrap(), before);
    assert!(before.slots.is_empty());

    assert_eq!(
        bench.store.set_placement(second, &plan).await.unwrap(),
        Ok(())
    );
    let after = bench.store.placement().await.unwrap();
    assert_eq!(after.slots, plan);
    assert_ne!(after.version, before.version);
    assert_eq!(
        bench.store.set_placement(second, &plan).await.unwrap(),
        Ok(())
    );
    let renewed = bench
        .store
        .renew(node.incarnation, LEASE, LoadSample::default())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        renewed.placement_version, after.version,
        "the same placement again is no change"
    );

    for (drain, state) in [(true, MemberState::Draining), (false, MemberState::Active)] {
        assert_eq!(
            bench
                .store
                .set_drain(second, &node.name, drain)
                .await
                .unwrap(),
            Ok(())
        );
        assert_eq!(bench.state(&node).await, state);
    }
    bench
        .store
        .set_state(node.incarnation, MemberState::Drained)
        .await
        .unwrap();
    assert_eq!(
        bench
            .store
            .set_drain(second, &node.name, true)
            .await
            .unwrap(),
        Ok(())
    );
    assert_eq!(bench.state(&node).await, MemberState::Drained);
    assert_eq!(bench.store.summary().await.unwrap().term, second);
}

async fn the_number_of_slots_cannot_change(bench: Bench) {
    bench.owner().await;
    let refused = bench
        .store
        .register(&registration("other"), 512, LEASE)
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, StoreError::Unusable(reason) if reason.contains("256")),
        "{refused}"
    );
    assert_eq!(
        bench.store.map(0).await.unwrap().slots.len(),
        usize::from(SLOTS)
    );
}

async fn a_superseded_process_is_no_member(bench: Bench) {
    let old = bench.owner().await;
    let load = LoadSample {
        connections: 7,
        documents: 3,
        resident_bytes: 1 << 40,
    };
    let renewed = bench
        .store
        .renew(old.incarnation, LEASE, load)
        .await
        .unwrap()
        .unwrap();
    let [member] = renewed.members.as_slice() else {
        panic!("{renewed:?}")
    };
    assert_eq!(
        (member.incarnation, member.load, member.state),
        (old.incarnation, Some(load), MemberState::Active)
    );
    assert!(
        member.lease_left > LEASE / 2 && member.lease_left <= LEASE,
        "{:?}",
        member.lease_left
    );

    let new = bench.succeed(&old, &[]).await;
    assert!(
        bench
            .store
            .renew(old.incarnation, LEASE, load)
            .await
            .unwrap()
            .is_none()
    );
    let claimed = bench
        .store
        .claim(old.incarnation, &[Slot(1)], Claim::Orphaned)
        .await
        .unwrap();
    assert!(claimed.is_empty(), "who is no member claims nothing");
    let renewed = bench
        .store
        .renew(new.incarnation, LEASE, load)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        renewed
            .members
            .iter()
            .map(|member| member.incarnation)
            .collect::<Vec<_>>(),
        [new.incarnation]
    );
    bench.store.leave(new.incarnation).await.unwrap();
    assert!(
        bench
            .store
            .renew(new.incarnation, LEASE, load)
            .await
            .unwrap()
            .is_none()
    );
}

async fn the_map_tells_what_changed(bench: Bench) {
    let old = bench.node("node-0").await;
    let all = bench.store.map(0).await.unwrap();
    assert_eq!(all.slots.len(), usize::from(SLOTS));
    assert!(
        all.slots
            .iter()
            .all(|row| row.owner.is_none() && row.epoch == Epoch(0))
    );

    let slots = [Slot(5), Slot(3)];
    let taken = bench
        .store
        .claim(old.incarnation, &slots, Claim::Orphaned)
        .await
        .unwrap();
    assert_eq!(taken, [(Slot(3), Epoch(1)), (Slot(5), Epoch(1))]);
    assert!(
        bench
            .store
            .claim(old.incarnation, &slots, Claim::Orphaned)
            .await
            .unwrap()
            .is_empty()
    );
    let change = bench.store.map(all.horizon).await.unwrap();
    assert_eq!(
        change
            .slots
            .iter()
            .map(|row| (row.slot, row.owner))
            .collect::<Vec<_>>(),
        [
            (Slot(3), Some(old.incarnation)),
            (Slot(5), Some(old.incarnation))
        ]
    );
    // A change may be told again while any transaction is open that is older than it, but not for ever.
    let started = Instant::now();
    let mut horizon = change.horizon;
    loop {
        let again = bench.store.map(horizon).await.unwrap();
        horizon = again.horizon;
        if again.slots.is_empty() {
            break;
        }
        assert!(started.elapsed() < Duration::from_secs(10), "{again:?}");
    }
    assert_eq!(
        bench.store.summary().await.unwrap().adoptions,
        0,
        "they had no owner to lose"
    );
    let new = bench.succeed(&old, &[3]).await;
    let change = bench.store.map(horizon).await.unwrap();
    assert_eq!(
        (change.slots[0].slot, change.slots[0].owner),
        (Slot(3), Some(new.incarnation))
    );
    let summary = bench.store.summary().await.unwrap();
    assert_eq!(summary.adoptions, 1);
    assert!(summary.revision > 0 && !summary.store.version.is_empty());
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
    let appended = bench.store.append(&batch).await.unwrap();
    assert_eq!((appended.held.len(), appended.inserted.len()), (50, 2_500));
    for doc in &documents {
        assert_eq!(bench.content(doc).await.last, Seq(50));
    }
}

#[tokio::test]
async fn three_nodes_start_at_once_on_an_empty_database() {
    let server = Server::shared().await;
    let url = server.database().await;
    let start = |name: &'static str| {
        let url = url.clone();
        tokio::spawn(async move {
            let store = Postgres::connect(&url).await.unwrap();
            let member = registration(name);
            store.register(&member, SLOTS, LEASE).await.unwrap();
            let slots: Vec<_> = (0..SLOTS).map(Slot).collect();
            let taken = store
                .claim(member.incarnation, &slots, Claim::Orphaned)
                .await
                .unwrap();
            (store, member.incarnation, taken)
        })
    };
    let started = [start("node-0"), start("node-1"), start("node-2")];
    let mut owners = HashMap::new();
    let mut stores = Vec::new();
    for started in started {
        let (store, incarnation, taken) = started.await.unwrap();
        for (slot, epoch) in taken {
            assert_eq!(epoch, Epoch(1));
            assert_eq!(
                owners.insert(slot, incarnation),
                None,
                "{slot} was claimed twice"
            );
        }
        stores.push((store, incarnation));
    }
    assert_eq!(owners.len(), usize::from(SLOTS));
    let renewed = stores[0]
        .0
        .renew(stores[0].1, LEASE, LoadSample::default())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        renewed
            .members
            .iter()
            .map(|member| member.node.0.as_str())
            .collect::<Vec<_>>(),
        ["node-0", "node-1", "node-2"]
    );
    assert_eq!(renewed.timeline, "00000001");
}

#[tokio::test]
async fn slots_go_to_a_live_active_member_and_to_nobody_else() {
    let bench = Bench::postgres().await;
    let (a, b) = (bench.owner().await, bench.node("node-1").await);
    let rights: Vec<_> = [1, 2, 3].map(|slot| a.right(slot)).to_vec();

    bench
        .store
        .set_state(b.incarnation, MemberState::Draining)
        .await
        .unwrap();
    assert!(
        bench
            .store
            .hand_off(&rights, b.incarnation)
            .await
            .unwrap()
            .is_empty(),
        "it drains"
    );
    bench
        .store
        .set_state(b.incarnation, MemberState::Active)
        .await
        .unwrap();
    assert!(
        bench
            .store
            .hand_off(&rights, Uuid::new_v4())
            .await
            .unwrap()
            .is_empty(),
        "it is no member"
    );
    let stale = Ownership {
        epoch: Epoch(0),
        ..a.right(9)
    };
    let moved = bench
        .store
        .hand_off(&[rights[2], rights[0], stale], b.incarnation)
        .await
        .unwrap();
    assert_eq!(moved, [(Slot(1), Epoch(2)), (Slot(3), Epoch(2))]);

    let doc = document("a");
    assert_eq!(
        bench
            .store
            .create(&doc, rights[0], Recreate::Allowed)
            .await
            .unwrap(),
        Created::Fenced
    );
    let right = Ownership {
        slot: Slot(1),
        epoch: Epoch(2),
        incarnation: b.incarnation,
    };
    assert!(matches!(
        bench
            .store
            .create(&doc, right, Recreate::Allowed)
            .await
            .unwrap(),
        Created::Created { .. }
    ));
    // Its lease ends: it gets no more slots, those it has are orphaned, and a renewal takes it back.
    bench
        .store
        .renew(
            b.incarnation,
            Duration::from_millis(50),
            LoadSample::default(),
        )
        .await
        .unwrap();
    tokio::time::sleep(Duration::from_millis(60)).await;
    assert!(
        bench
            .store
            .hand_off(&rights[1..2], b.incarnation)
            .await
            .unwrap()
            .is_empty(),
        "its lease has ended"
    );
    let taken = bench
        .store
        .claim(a.incarnation, &[Slot(1)], Claim::Orphaned)
        .await
        .unwrap();
    assert_eq!(taken, [(Slot(1), Epoch(3))]);
    assert!(
        bench
            .store
            .renew(b.incarnation, LEASE, LoadSample::default())
            .await
            .unwrap()
            .is_some()
    );
    assert!(
        bench
            .store
            .claim(a.incarnation, &[Slot(3)], Claim::Orphaned)
            .await
            .unwrap()
            .is_empty(),
        "it is back"
    );
}

#[tokio::test]
async fn a_claim_ends_the_sessions_that_hold_it_up() {
    let bench = Bench::postgres().await;
    let (old, new) = (bench.owner().await, bench.node("node-1").await);
    // A statement of the old owner that never ends: its process is frozen.
    let Raw::Postgres(pool) = &bench.raw else {
        unreachable!()
    };
    let mut frozen = pool.begin().await.unwrap();
    for statement in [
        format!("set application_name = '{}'", old.incarnation),
        "select from slot where slot = 7 for share".to_owned(),
    ] {
        sqlx::query(AssertSqlSafe(statement))
            .execute(&mut *frozen)
            .await
            .unwrap();
    }
    // While its owner lives, the slot is not taken, and nothing waits.
    assert!(
        bench
            .store
            .claim(new.incarnation, &[Slot(7)], Claim::Orphaned)
            .await
            .unwrap()
            .is_empty()
    );
    bench.store.leave(old.incarnation).await.unwrap();
    let started = Instant::now();
    let taken = bench
        .store
        .claim(new.incarnation, &[Slot(7)], Claim::Orphaned)
        .await
        .unwrap();
    let waited = started.elapsed();
    println!("a claim behind a frozen statement took {waited:?}");
    assert_eq!(taken, [(Slot(7), Epoch(2))]);
    assert!(
        waited > Duration::from_millis(250) && waited < Duration::from_secs(2),
        "{waited:?}"
    );
    assert!(frozen.commit().await.is_err(), "its session was ended");
}

/// The judgement "its owner is lost" must not be made again, wrongly, for the owner that comes while
/// the claim waits for the row.
#[tokio::test]
async fn a_slot_that_was_taken_while_a_claim_waited_stays_taken() {
    let bench = Bench::postgres().await;
    let (lost, first, second) = (
        bench.owner().await,
        bench.node("node-1").await,
        bench.node("node-2").await,
    );
    bench.store.leave(lost.incarnation).await.unwrap();
    let Raw::Postgres(pool) = &bench.raw else {
        unreachable!()
    };
    let mut taking = pool.begin().await.unwrap();
    sqlx::query("update slot set owner = $1, epoch = epoch + 1 where slot = 7")
        .bind(first.incarnation)
        .execute(&mut *taking)
        .await
        .unwrap();
    let slots = [Slot(7)];
    let claim = bench
        .store
        .claim(second.incarnation, &slots, Claim::Orphaned);
    let commit = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        taking.commit().await.unwrap();
    };
    let (taken, ()) = tokio::join!(claim, commit);
    assert_eq!(taken.unwrap(), []);
}

/// Transaction ids do not commit in their order.
#[tokio::test]
async fn the_map_misses_nothing_that_commits_late() {
    let bench = Bench::postgres().await;
    let node = bench.node("node-0").await;
    let Raw::Postgres(pool) = &bench.raw else {
        unreachable!()
    };
    let mut early = pool.begin().await.unwrap();
    sqlx::query(
        "update slot set epoch = 1, revision = pg_current_xact_id()::text::bigint where slot = 1",
    )
    .execute(&mut *early)
    .await
    .unwrap();
    bench
        .store
        .claim(node.incarnation, &[Slot(2)], Claim::Orphaned)
        .await
        .unwrap();
    let seen = bench.store.map(1).await.unwrap();
    assert_eq!(
        seen.slots.iter().map(|row| row.slot).collect::<Vec<_>>(),
        [Slot(2)]
    );
    early.commit().await.unwrap();
    let seen = bench.store.map(seen.horizon).await.unwrap();
    assert!(
        seen.slots
            .iter()
            .any(|row| row.slot == Slot(1) && row.epoch == Epoch(1)),
        "{seen:?}"
    );
}

#[tokio::test]
async fn a_change_of_the_map_wakes_the_others_and_nothing_else_does() {
    let bench = Bench::postgres().await;
    let node = bench.owner().await;
    let other = Postgres::connect(&bench.url).await.unwrap();
    let doc = document("a");
    node.create(&doc, 1).await;
    let wait = |time| tokio::time::timeout(time, other.map_changed());
    // Once it listens, a change arrives; what came before it listened is not told.
    let listens = async {
        while wait(Duration::from_millis(50)).await.is_err() {
            let right = bench.right_now(3).await;
            bench
                .store
                .hand_off(&[right], node.incarnation)
                .await
                .unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(10), listens)
        .await
        .expect("a handoff is told");
    while wait(Duration::from_millis(200)).await.is_ok() {}
    for seq in 1..=20 {
        bench
            .store
            .append(&[node.update(&doc, 1, seq, "x")])
            .await
            .unwrap();
        bench
            .store
            .renew(node.incarnation, LEASE, LoadSample::default())
            .await
            .unwrap();
    }
    assert!(
        wait(Duration::from_millis(300)).await.is_err(),
        "appends and renewals are not told"
    );
}

/// The promise itself, at its smallest: what was answered is there after kill -9.
#[tokio::test]
async fn a_killed_database_is_an_outage_and_loses_nothing() {
    let mut server = Server::start().await;
    let bench = Bench::postgres_at(server.url()).await;
    let node = bench.owner().await;
    let doc = document("a");
    node.write(&doc, 1, 1..=5).await;
    server.kill().unwrap();

    let started = Instant::now();
    for _ in 0..3 {
        let failed = bench
            .store
            .append(&[node.update(&doc, 1, 6, "6")])
            .await
            .unwrap_err();
        assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
        let failed = bench
            .store
            .renew(node.incarnation, LEASE, LoadSample::default())
            .await
            .unwrap_err();
        assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
        assert!(matches!(
            bench.store.load(&doc).await.unwrap_err(),
            LoadError::Store(StoreError::Unavailable(_))
        ));
    }
    println!("nine calls without a database took {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(20));

    server.restart().await.unwrap();
    let started = Instant::now();
    until_answered(|| async { bench.store.append(&[node.update(&doc, 1, 6, "6")]).await }).await;
    println!(
        "the first append after the restart was answered after {:?}",
        started.elapsed()
    );
    assert_eq!(
        bench.content(&doc).await,
        content(None, &["1", "2", "3", "4", "5", "6"], 6)
    );
}

#[tokio::test]
async fn a_failover_of_the_database_is_seen() {
    let mut server = Server::start().await;
    let bench = Bench::postgres_at(server.url()).await;
    let node = bench.owner().await;
    let doc = document("a");
    node.write(&doc, 1, 1..=2).await;
    let renew = || {
        bench
            .store
            .renew(node.incarnation, LEASE, LoadSample::default())
    };
    assert_eq!(renew().await.unwrap().unwrap().timeline, "00000001");
    let seen = bench.store.map(0).await.unwrap();

    server.restart_as_standby().await.unwrap();
    for _ in 0..2 {
        let failed = bench
            .store
            .append(&[node.update(&doc, 1, 3, "3")])
            .await
            .unwrap_err();
        assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
        assert!(
            matches!(bench.store.load(&doc).await, Err(LoadError::Store(_))),
            "nothing is read from it"
        );
    }
    server.promote().await.unwrap();
    let renewed = until_answered(renew).await.unwrap();
    assert_eq!(renewed.timeline, "00000002");
    let map = bench.store.map(seen.horizon).await.unwrap();
    assert_eq!(
        map.slots.len(),
        usize::from(SLOTS),
        "transaction ids may have gone back: all is told"
    );
    assert_ne!(
        bench.store.map(map.horizon).await.unwrap().slots.len(),
        usize::from(SLOTS)
    );
    until_answered(|| async { bench.store.append(&[node.update(&doc, 1, 3, "3")]).await }).await;
    assert_eq!(
        bench.content(&doc).await,
        content(None, &["1", "2", "3"], 3)
    );
}

/// A cancelled commit would be answered with success before the standby has it.
#[tokio::test]
async fn a_statement_that_writes_is_not_cancelled_by_a_timeout_of_the_role() {
    let server = Server::shared().await;
    let url = server.database().await;
    let bench = Bench::postgres_at(url).await;
    let Raw::Postgres(pool) = &bench.raw else {
        unreachable!()
    };
    bench.execute("do $$ begin execute 'alter database ' || current_database() || ' set statement_timeout = 50'; end $$").await;
    let node = bench.owner().await; // registers, and so opens new sessions
    let doc = document("a");
    node.create(&doc, 1).await;
    let mut holder = pool.begin().await.unwrap();
    sqlx::query("select from slot where slot = 1 for update")
        .execute(&mut *holder)
        .await
        .unwrap();
    let batch = [Append {
        author: "a\0b".to_owned(),
        ..node.update(&doc, 1, 1, "1")
    }];
    let append = bench.store.append(&batch);
    let release = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        holder.rollback().await.unwrap();
    };
    let (appended, ()) = tokio::join!(append, release);
    assert_eq!(appended.unwrap().inserted, [(doc, Seq(1))]);
}

#[tokio::test]
async fn a_folder_is_used_by_one_process_and_remembers() {
    let folder = Folder::new("sqlite", "root");
    let doc = document("a");
    {
        let bench = Bench::sqlite_in(folder.path()).await;
        bench.owner().await.write(&doc, 1, 1..=3).await;
        let refused = Sqlite::open(folder.path()).await.unwrap_err();
        assert!(
            refused
                .to_string()
                .contains(&folder.path().display().to_string()),
            "{refused}"
        );
    }
    let bench = Bench::sqlite_in(folder.path()).await;
    assert_eq!(
        bench.owner().await.epoch(1),
        Epoch(2),
        "each run has its own epochs"
    );
    assert_eq!(
        bench.content(&doc).await,
        content(None, &["1", "2", "3"], 3)
    );
}

/// A store under test, and a way to its rows behind its back.
struct Bench {
    store: Arc<dyn Store>,
    raw: Raw,
    /// Of Postgres.
    url: String,
    _server: Option<Arc<Server>>,
    _folder: Option<Folder>,
}

enum Raw {
    Postgres(PgPool),
    Sqlite(SqlitePool),
}

/// A registered process and the slots it claimed.
struct Node {
    store: Arc<dyn Store>,
    name: NodeId,
    incarnation: Uuid,
    epochs: HashMap<Slot, Epoch>,
}

/// A live document as loaded.
#[derive(Debug, PartialEq, Eq)]
struct Content {
    snapshot: Option<String>,
    log: Vec<String>,
    last: Seq,
}

impl Bench {
    async fn postgres() -> Self {
        let server = Server::shared().await;
        let url = server.database().await;
        Self {
            _server: Some(server),
            ..Self::postgres_at(url).await
        }
    }

    async fn postgres_at(url: String) -> Self {
        let store = Arc::new(Postgres::connect(&url).await.unwrap());
        let raw = Raw::Postgres(PgPool::connect_lazy(&url).unwrap());
        Self {
            store,
            raw,
            url,
            _server: None,
            _folder: None,
        }
    }

    async fn sqlite() -> Self {
        let folder = Folder::new("sqlite", "root");
        let bench = Self::sqlite_in(folder.path()).await;
        Self {
            _folder: Some(folder),
            ..bench
        }
    }

    async fn sqlite_in(folder: &Path) -> Self {
        let store = Arc::new(Sqlite::open(folder).await.unwrap());
        let options = SqliteConnectOptions::new().filename(folder.join("collab.sqlite"));
        let raw = Raw::Sqlite(SqlitePool::connect_lazy_with(options));
        Self {
            store,
            raw,
            url: String::new(),
            _server: None,
            _folder: None,
        }
    }

    /// Changes rows as no store would.
    async fn execute(&self, sql: &str) {
        let sql = AssertSqlSafe(sql.to_owned());
        match &self.raw {
            Raw::Postgres(pool) => drop(sqlx::query(sql).execute(pool).await.unwrap()),
            Raw::Sqlite(pool) => drop(sqlx::query(sql).execute(pool).await.unwrap()),
        }
    }

    /// A literal of bytes.
    fn blob(&self, text: &str) -> String {
        let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
        match &self.raw {
            Raw::Postgres(_) => format!("'\\x{hex}'::bytea"),
            Raw::Sqlite(_) => format!("x'{hex}'"),
        }
    }

    /// A member without slots.
    async fn node(&self, name: &str) -> Node {
        let member = registration(name);
        self.store.register(&member, SLOTS, LEASE).await.unwrap();
        Node {
            store: self.store.clone(),
            name: member.node,
            incarnation: member.incarnation,
            epochs: HashMap::new(),
        }
    }

    /// A member with every slot.
    async fn owner(&self) -> Node {
        let mut node = self.node("node-0").await;
        node.claim(&(0..SLOTS).collect::<Vec<_>>()).await;
        assert_eq!(node.epochs.len(), usize::from(SLOTS));
        node
    }

    /// The next process of a node, which takes `slots`.
    async fn succeed(&self, old: &Node, slots: &[u16]) -> Node {
        let mut node = self.node(&old.name.0).await;
        node.claim(slots).await;
        assert_eq!(node.epochs.len(), slots.len());
        node
    }

    async fn content(&self, document: &DocumentId) -> Content {
        match self.store.load(document).await.unwrap() {
            Loaded::Live {
                snapshot,
                log,
                last,
                ..
            } => {
                assert!(log.windows(2).all(|pair| pair[0].0.next() == pair[1].0));
                let log = log.iter().map(|(_, bytes)| text(bytes)).collect();
                Content {
                    snapshot: snapshot.map(|snapshot| text(&snapshot.bytes)),
                    log,
                    last,
                }
            }
            other => panic!("{document} is not live: {other:?}"),
        }
    }

    /// Where a document is damaged.
    async fn damage(&self, document: &DocumentId) -> Seq {
        match self.store.load(document).await {
            Err(LoadError::Damaged {
                document: named,
                seq,
                ..
            }) if named == *document => seq,
            other => panic!("{document} is not damaged: {other:?}"),
        }
    }

    async fn state(&self, node: &Node) -> MemberState {
        let renewed = self
            .store
            .renew(node.incarnation, LEASE, LoadSample::default())
            .await
            .unwrap()
            .unwrap();
        renewed
            .members
            .iter()
            .find(|member| member.incarnation == node.incarnation)
            .unwrap()
            .state
    }

    /// The right to a slot as it is now.
    async fn right_now(&self, slot: u16) -> Ownership {
        let map = self.store.map(0).await.unwrap();
        let row = map.slots[usize::from(slot)];
        Ownership {
            slot: row.slot,
            epoch: row.epoch,
            incarnation: row.owner.unwrap(),
        }
    }
}

impl Node {
    async fn claim(&mut self, slots: &[u16]) {
        let slots: Vec<_> = slots.iter().copied().map(Slot).collect();
        self.epochs.extend(
            self.store
                .claim(self.incarnation, &slots, Claim::Orphaned)
                .await
                .unwrap(),
        );
    }

    fn epoch(&self, slot: u16) -> Epoch {
        self.epochs[&Slot(slot)]
    }

    fn right(&self, slot: u16) -> Ownership {
        Ownership {
            slot: Slot(slot),
            epoch: self.epoch(slot),
            incarnation: self.incarnation,
        }
    }

    fn update(&self, document: &DocumentId, slot: u16, seq: i64, text: &str) -> Append {
        Append {
            document: document.clone(),
            seq: Seq(seq),
            ownership: self.right(slot),
            bytes: Bytes::copy_from_slice(text.as_bytes()),
            author: "ada".to_owned(),
        }
    }

    async fn create(&self, document: &DocumentId, slot: u16) -> Created {
        self.store
            .create(document, self.right(slot), Recreate::Allowed)
            .await
            .unwrap()
    }

    /// Appends updates whose text is their seq.
    async fn append(&self, document: &DocumentId, slot: u16, seqs: RangeInclusive<i64>) {
        let batch: Vec<_> = seqs
            .map(|seq| self.update(document, slot, seq, &seq.to_string()))
            .collect();
        assert_eq!(
            self.store.append(&batch).await.unwrap().inserted.len(),
            batch.len()
        );
    }

    /// Creates a document and appends to it.
    async fn write(&self, document: &DocumentId, slot: u16, seqs: RangeInclusive<i64>) {
        assert!(matches!(
            self.create(document, slot).await,
            Created::Created { .. }
        ));
        self.append(document, slot, seqs).await;
    }
}

/// Asks again while there is an outage.
async fn until_answered<T, F: Future<Output = Result<T, StoreError>>>(
    mut call: impl FnMut() -> F,
) -> T {
    let started = Instant::now();
    loop {
        match call().await {
            Ok(answer) => return answer,
            Err(error) => assert!(started.elapsed() < Duration::from_secs(20), "{error}"),
        }
    }
}

fn content(snapshot: Option<&str>, log: &[&str], last: i64) -> Content {
    Content {
        snapshot: snapshot.map(str::to_owned),
        log: log.iter().copied().map(str::to_owned).collect(),
        last: Seq(last),
    }
}

fn document(name: &str) -> DocumentId {
    DocumentId::new(name).unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn snapshot(
    document: &DocumentId,
    ownership: Ownership,
    room_epoch: i64,
    seq: i64,
    text: &str,
) -> NewSnapshot {
    NewSnapshot {
        document: document.clone(),
        ownership,
        room_epoch: RoomEpoch(room_epoch),
        seq: Seq(seq),
        bytes: Bytes::copy_from_slice(text.as_bytes()),
    }
}

/// A new process of the pod that is called like its node.
fn registration(node: &str) -> Registration {
    Registration {
        node: NodeId::from(node),
        incarnation: Uuid::new_v4(),
        pod_uid: format!("pod of {node}"),
        address: "127.0.0.1:8081".to_owned(),
        zone: String::new(),
        weight: 100,
    }
}
