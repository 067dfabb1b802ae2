//! Documents in hardship: their store is away, their rows are damaged, a client cannot follow.

use std::time::Duration;

use anyhow::{Result, ensure};
use collab_node::store::postgres::SCHEMA_LOCK;
use collab_tests::nodes::{Launch, Nodes};
use collab_tests::postgres::Postgres;
use sqlx::{Connection as _, PgConnection, PgPool};
use tokio::time::{sleep, timeout};

use crate::peer::Peer;

/// Nothing may come within this time.
const SILENCE: Duration = Duration::from_secs(3);

#[tokio::test(flavor = "multi_thread")]
async fn while_postgres_is_away_edits_are_relayed_and_who_joins_sees_what_is_committed()
-> Result<()> {
    let mut postgres = Postgres::start().await;
    let nodes = Nodes::start(2, &postgres.url(), "none").await?;
    let urls = nodes.urls();
    let mut ada = Peer::join(&urls[0], "outage").await?;
    let mut bob = Peer::join(&urls[1], "outage").await?;
    ada.types("saved").await?;
    ada.until("a receipt", Peer::is_saved).await?;
    bob.until("the edit", |bob| bob.text() == "saved").await?;

    postgres.kill()?;
    // What is deleted without a commit is still shown to who joins.
    ada.clears().await?;
    ada.types("unsaved").await?;
    bob.until("an unsaved edit", |bob| bob.text() == "unsaved")
        .await?;
    ada.listen(SILENCE).await?;
    ensure!(
        ada.saved == 1,
        "an edit was acknowledged without a database"
    );
    for url in &urls {
        let mut newcomer = Peer::join(url, "outage").await?;
        newcomer.until("a step 2", |peer| peer.synced).await?;
        ensure!(newcomer.text() == "saved", "{:?}", newcomer.text());
    }
    let mut eve = Peer::join(&urls[1], "outage").await?;
    eve.until("a step 2", |eve| eve.synced).await?;
    eve.types(" and hers").await?;
    bob.until("an edit of who came later", |bob| {
        bob.text().contains("and hers")
    })
    .await?;
    eve.listen(SILENCE).await?;
    ensure!(
        eve.saved == 0,
        "an edit was acknowledged without a database"
    );

    postgres.restart().await?;
    ada.until("the receipts", Peer::is_saved).await?;
    eve.until("hers", Peer::is_saved).await?;
    for peer in [&mut ada, &mut bob, &mut eve] {
        peer.until("the same text everywhere", |peer| {
            peer.text().len() == "unsaved and hers".len()
        })
        .await?;
    }
    ensure!(ada.text() == eve.text() && bob.text() == eve.text());
    let mut fresh = Peer::join(&urls[0], "outage").await?;
    fresh.until("a step 2", |fresh| fresh.synced).await?;
    ensure!(fresh.text() == ada.text(), "{:?}", fresh.text());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_waits_for_another_that_changes_the_schema_and_says_so() -> Result<()> {
    let postgres = Postgres::shared().await;
    let database = postgres.database().await;
    let mut other = PgConnection::connect(&database).await?;
    sqlx::query("select pg_advisory_lock($1)")
        .bind(SCHEMA_LOCK)
        .execute(&mut other)
        .await?;
    let mut nodes = Nodes::new(Launch::local(&database, "none"));
    nodes.add()?;
    let says_so = async {
        while !nodes.log(0).contains("another node brings the schema") {
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(20), says_so).await?;
    let tables = "select count(*) from information_schema.tables where table_name = 'slot'";
    let tables: i64 = sqlx::query_scalar(tables).fetch_one(&mut other).await?;
    ensure!(tables == 0, "it did not wait");
    other.close().await?;
    nodes.balanced(1).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_document_is_read_only_up_to_the_damage_until_it_is_repaired() -> Result<()> {
    let postgres = Postgres::shared().await;
    let database = postgres.database().await;
    let mut nodes = Nodes::start(1, &database, "none").await?;
    let url = nodes.nodes[0].url();
    for document in ["torn", "poisoned", "fine"] {
        let mut peer = Peer::join(&url, document).await?;
        for word in ["one ", "two ", "three"] {
            peer.types(word).await?;
            // Else its words would go into one row.
            peer.until("a receipt", Peer::is_saved).await?;
        }
    }
    nodes.stop(0).await?;
    let rows = PgPool::connect(&database).await?;
    sqlx::query("create table good as select * from update_log")
        .execute(&rows)
        .await?;
    sqlx::query("update update_log set bytes = '\\x00' where document = 'torn' and seq = 2")
        .execute(&rows)
        .await?;
    // Drill 47: its checksum is right, and `yrs` would take it and panic later.
    let poison = [1_u8, 1, 1, 2, 162, 8, 6, 0, 0, 0];
    sqlx::query(
        "update update_log set bytes = $1, crc32c = $2 where document = 'poisoned' and seq = 3",
    )
    .bind(poison.as_slice())
    .bind(i64::from(crc32c::crc32c(&poison)))
    .execute(&rows)
    .await?;
    nodes.run(0)?;
    nodes.balanced(1).await?;

    for round in ["started", "killed and started again"] {
        for (document, good) in [("torn", "one "), ("poisoned", "one two ")] {
            let mut peer = Peer::join(&url, document).await?;
            peer.until("a step 2", |peer| peer.synced).await?;
            peer.until("why it is read-only", |peer| !peer.denied.is_empty())
                .await?;
            ensure!(peer.denied[0].contains("damaged"), "{:?}", peer.denied);
            ensure!(peer.text() == good, "{round}: {:?}", peer.text());
            peer.types("more").await?;
            peer.listen(SILENCE).await?;
            ensure!(
                peer.saved == 0,
                "{round}: an edit of {document} was acknowledged"
            );
            let export = reqwest::get(format!("{url}/api/v1/documents/{document}/text")).await?;
            ensure!(export.status() == 503, "{round}: {}", export.status());
        }
        let mut fine = Peer::join(&url, "fine").await?;
        fine.until("a step 2", |peer| peer.synced).await?;
        fine.types(round).await?;
        fine.until("a receipt", Peer::is_saved).await?;
        ensure!((1.5..2.5).contains(&nodes.metric(0, "collab_documents_degraded").await?));
        nodes
            .until("the report has the damage", |report| {
                report.members[0]
                    .load
                    .as_ref()
                    .is_some_and(|load| load.degraded == 2)
            })
            .await?;
        ensure!(
            nodes
                .metric(0, "collab_updates_refused_total{reason=\"degraded\"}")
                .await?
                >= 2.0
        );
        if round == "started" {
            nodes.kill(0)?;
            nodes.run(0)?;
            nodes.balanced(1).await?;
        }
    }

    let mut peer = Peer::join(&url, "torn").await?;
    peer.until("a step 2", |peer| peer.synced).await?;
    peer.types("and more").await?;
    sqlx::query(
        "update update_log l set bytes = good.bytes, crc32c = good.crc32c from good
         where l.document = good.document and l.seq = good.seq",
    )
    .execute(&rows)
    .await?;
    peer.until("a receipt after the repair", Peer::is_saved)
        .await?;
    let text = peer.text();
    nodes
        .until("the report has less damage", |report| {
            report.members[0]
                .load
                .as_ref()
                .is_some_and(|load| load.degraded == 1)
        })
        .await?;
    ensure!(
        text.contains("two ") && text.contains("three") && text.contains("and more"),
        "{text:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_cannot_follow_gets_the_difference_when_it_has_caught_up() -> Result<()> {
    const EDITS: usize = 100;
    let edit = "x".repeat(256 * 1024);
    let postgres = Postgres::shared().await;
    let nodes = Nodes::start(1, &postgres.database().await, "none").await?;
    let url = nodes.nodes[0].url();
    let mut slow = Peer::join(&url, "stream").await?;
    slow.until("a step 2", |slow| slow.synced).await?;
    let mut writer = Peer::join(&url, "stream").await?;
    writer.until("a step 2", |writer| writer.synced).await?;
    // It does not look at its socket while megabytes are typed and deleted again.
    for _ in 0..EDITS / 2 {
        writer.types(&edit).await?;
        writer.until("a receipt", Peer::is_saved).await?;
        writer.clears().await?;
        writer.until("a receipt", Peer::is_saved).await?;
    }
    writer.types("the end").await?;
    writer.until("a receipt", Peer::is_saved).await?;
    slow.until("the end", |slow| slow.text() == "the end")
        .await?;
    let typed = edit.len() * EDITS / 2;
    println!(
        "a client did not look while {typed} bytes were typed: it was sent {}",
        slow.received_bytes
    );
    ensure!(
        slow.received_bytes < typed,
        "every edit was sent: {} bytes",
        slow.received_bytes
    );
    ensure!(1.0 <= nodes.metric(0, "collab_sockets_behind_total").await?);
    // And from there on it follows again.
    writer.types("!").await?;
    slow.until("one more", |slow| slow.text() == "the end!")
        .await
}
