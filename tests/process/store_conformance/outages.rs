//! Frozen processes, killed servers, failovers.

use sqlx::{Connection, PgConnection};

use super::*;

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
    assert!(bench.claim(&new, &[Slot(7)]).await.is_empty());
    bench.store.leave(old.incarnation).await.unwrap();
    let started = Instant::now();
    let taken = bench.claim(&new, &[Slot(7)]).await;
    let waited = started.elapsed();
    println!("a claim behind a frozen statement took {waited:?}");
    assert_eq!(taken, [(Slot(7), Epoch(2))]);
    assert!(
        waited > Duration::from_millis(250) && waited < Duration::from_secs(5),
        "{waited:?}"
    );
    assert!(frozen.commit().await.is_err(), "its session was ended");
}

/// The other nodes, and whoever else uses the server, may have most of its connections.
#[tokio::test]
async fn a_node_joins_a_database_that_has_few_sessions_left() {
    /// Of one node.
    const SESSIONS: i64 = 10;
    let server = Server::start().await;
    let bench = Bench::postgres_at(server.url()).await;
    let node = bench.owner().await;
    let mut superuser = PgConnection::connect(&server.superuser_url())
        .await
        .unwrap();
    let mut watcher = PgConnection::connect(&server.superuser_url())
        .await
        .unwrap();
    let mut in_use = async || -> i64 {
        let sessions = "select count(*) from pg_stat_activity where usename = 'collab'";
        let counted = sqlx::query_scalar(sessions).fetch_one(&mut watcher);
        counted.await.unwrap()
    };
    let used = loop {
        let used = in_use().await;
        if SESSIONS <= used {
            break used;
        }
    };
    let mut set_limit = async |limit: i64| {
        let statement = format!("alter role collab connection limit {limit}");
        let done = sqlx::query(AssertSqlSafe(statement)).execute(&mut superuser);
        done.await.unwrap();
    };
    set_limit(used + SESSIONS - 2).await;
    let store = Postgres::connect(&server.url()).await.unwrap();
    while in_use().await < used + SESSIONS - 2 {}
    let doc = document("a");
    store.append(&[node.update(&doc, 1, 1, "1")]).await.unwrap();
    assert!(store.load(&doc).await.is_ok());
    set_limit(used).await;
    let failed = Postgres::connect(&server.url()).await.unwrap_err();
    assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
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
            .renew(
                node.incarnation,
                &node.pod_uid,
                LEASE,
                LoadSample::default(),
            )
            .await
            .unwrap_err();
        assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
        assert!(matches!(
            bench.store.load(&doc).await.unwrap_err(),
            LoadError::Store(StoreError::Unavailable(_))
        ));
    }
    println!("nine calls without a database took {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(40));
    let failed = Postgres::connect(&server.url()).await.unwrap_err();
    assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");

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
async fn a_restart_of_the_database_costs_one_call_and_not_one_per_session() {
    let mut server = Server::start().await;
    let bench = Bench::postgres_at(server.url()).await;
    let node = bench.owner().await;
    let names = ["a", "b", "c"].map(document);
    let everything = async |seq: i64| {
        let append = async |slot: u16, document| {
            bench
                .store
                .append(&[node.update(document, slot, seq, "x")])
                .await
        };
        let load = bench.store.load(&names[0]);
        let renew = bench.store.renew(
            node.incarnation,
            &node.pod_uid,
            LEASE,
            LoadSample::default(),
        );
        let (a, b, c) = (
            append(1, &names[0]),
            append(2, &names[1]),
            append(3, &names[2]),
        );
        let (a, b, c, load, renew) = tokio::join!(a, b, c, load, renew);
        a.is_ok() && b.is_ok() && c.is_ok() && load.is_ok() && renew.is_ok()
    };
    for (slot, document) in (1..).zip(&names) {
        node.create(document, slot).await;
    }
    assert!(everything(1).await);
    server.restart().await.unwrap();
    assert!(
        bench
            .store
            .append(&[node.update(&names[0], 1, 2, "x")])
            .await
            .is_err()
    );
    assert!(everything(2).await);
}

#[tokio::test]
async fn a_failover_of_postgres_is_seen() {
    let mut server = Server::start().await;
    let bench = Bench::postgres_at(server.url()).await;
    let fails_over = async |node: &Node, doc: &DocumentId| {
        server.restart_as_standby().await.unwrap();
        for _ in 0..2 {
            let failed = bench
                .store
                .append(&[node.update(doc, 1, 3, "3")])
                .await
                .unwrap_err();
            assert!(matches!(failed, StoreError::Unavailable(_)), "{failed}");
            assert!(
                matches!(bench.store.load(doc).await, Err(LoadError::Store(_))),
                "nothing is read from it"
            );
        }
        server.promote().await.unwrap();
    };
    a_failover_is_seen(&bench, fails_over).await;
}

#[tokio::test]
async fn a_failover_of_the_simulated_database_is_seen() {
    let bench = Bench::memory();
    let Raw::Memory(database) = &bench.raw else {
        unreachable!()
    };
    let fails_over = async |_: &Node, _: &DocumentId| database.fail_over(0);
    a_failover_is_seen(&bench, fails_over).await;
}

async fn a_failover_is_seen(bench: &Bench, fails_over: impl AsyncFnOnce(&Node, &DocumentId)) {
    let node = bench.owner().await;
    let doc = document("a");
    node.write(&doc, 1, 1..=2).await;
    let renew = || {
        bench.store.renew(
            node.incarnation,
            &node.pod_uid,
            LEASE,
            LoadSample::default(),
        )
    };
    assert_eq!(held(renew().await.unwrap()).timeline, "00000001");
    let seen = bench.map(0).await;
    fails_over(&node, &doc).await;
    let renewed = held(until_answered(renew).await);
    assert_eq!(renewed.timeline, "00000002");
    let map = bench.map(seen.horizon).await;
    assert_eq!(
        map.slots.len(),
        usize::from(SLOTS),
        "transaction ids may have gone back: all is told"
    );
    assert_ne!(bench.map(map.horizon).await.slots.len(), usize::from(SLOTS));
    let failed = bench.store.append(&[node.update(&doc, 1, 3, "3")]).await;
    assert!(
        matches!(failed, Err(StoreError::Unavailable(_))),
        "the log may end earlier now: {failed:?}"
    );
    let snapshot = NewSnapshot {
        document: doc.clone(),
        ownership: node.right(1),
        room_epoch: RoomEpoch(1),
        seq: Seq(2),
        bytes: Bytes::from("1 2"),
    };
    let failed = bench.store.snapshot(&snapshot).await;
    assert!(
        matches!(failed, Err(StoreError::Unavailable(_))),
        "it may hold what the log does not: {failed:?}"
    );
    assert!(bench.store.failovers().is_pending());
    let held = [node.right(1)];
    let taken = bench.store.reclaim(node.incarnation, &held).await.unwrap();
    assert_eq!(taken, [(Slot(1), Epoch(2))]);
    let stale = bench.append(&[node.update(&doc, 1, 3, "3")]).await;
    assert!(stale.held.is_empty(), "{stale:?}");
    bench.pin(&document("pinned")).await;
    let slot = bench.map(0).await.slots.last().copied();
    let slot = slot.expect("all slots are in the whole map");
    assert!(
        slot.slot == Slot(SLOTS) && Epoch(1 << 32) < slot.epoch,
        "the failover may have lost a slot with the same number: {slot:?}"
    );
    let append = Append {
        ownership: bench.right_now(1).await,
        ..node.update(&doc, 1, 3, "3")
    };
    assert_eq!(bench.append(&[append]).await.inserted.len(), 1);
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

/// To compile one takes longer than a lease has time to spare.
#[tokio::test]
async fn a_statement_is_not_compiled_whatever_the_database_says() {
    let server = Server::shared().await;
    let url = server.database().await;
    let bench = Bench::postgres_at(url).await;
    bench.execute("do $$ begin execute 'alter database ' || current_database() || ' set jit = on'; end $$").await;
    bench.execute("create table seen (jit text)").await;
    bench.execute("create function see() returns trigger language plpgsql as $$ begin insert into seen values (current_setting('jit')); return new; end $$").await;
    bench
        .execute(
            "create trigger see after insert on update_log for each row execute function see()",
        )
        .await;
    let node = bench.owner().await; // registers, and so opens new sessions
    let doc = document("a");
    node.write(&doc, 1, 1..=1).await;
    let Raw::Postgres(pool) = &bench.raw else {
        unreachable!()
    };
    let seen: Vec<String> = sqlx::query_scalar("select jit from seen")
        .fetch_all(pool)
        .await
        .unwrap();
    assert_eq!(seen, ["off"]);
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
