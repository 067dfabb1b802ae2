//! Three nodes, real Postgres and Redis, stock clients: what was acknowledged is there, whatever ends.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use collab_core::control::{Activity, ClusterReport, NodeLoad};
use collab_core::ids::{DocumentId, NodeId};
use collab_core::limits::EARLY_FENCE_EVERY;
use collab_core::ring::slot_of;
use collab_tests::checker;
use collab_tests::clients::typist::{Ledger, Typing};
use collab_tests::clients::{Follower, Reading, Replay, now_ms};
use collab_tests::nodes::{Launch, Nodes};
use collab_tests::postgres::{Postgres, Setup};
use collab_tests::proxy::{Proxy, Treatment};
use collab_tests::redis::Redis;
use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, PgConnection};
use tokio::time::sleep;

/// After a fault receipts come again within this time, also where tests run side by side. How soon they do on a
/// machine of their own is printed.
const LIVENESS: Duration = Duration::from_secs(10);
/// Fewer receipts than this before a fault say nothing.
const ACKED_MIN: usize = 200;

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_loses_nothing_and_the_others_go_on() -> Result<()> {
    let (postgres, redis) = (Postgres::shared().await, Redis::start().await);
    let mut nodes = Nodes::start(3, &postgres.database().await, &redis.url()).await?;
    let names = documents(20);
    let typing = Typing {
        writers: 3,
        ..Typing::new(nodes.urls(), names.clone(), 1)
    };
    let typists = under_way(&typing).await?;

    let killed = now_ms();
    let dead = nodes.nodes[1].url();
    nodes.kill(1)?;
    let owned = nodes.balanced(2).await;
    let re_owned = now_ms() - killed;
    owned?;
    sleep(Duration::from_secs(2)).await;
    nodes.run(1)?;
    nodes.balanced(3).await?;
    let ledger = typists.stop().await?;

    let silences = ledger.silences(killed, killed + 8_000.0);
    let (of_dead, of_others): (Vec<_>, Vec<_>) =
        silences.iter().partition(|silence| silence.node == dead);
    println!(
        "killed a node: {} acked edits, re-owned and balanced after {re_owned:.0} ms, longest silence of clients \
         elsewhere {:?}, of its own {:?}",
        ledger.acked(),
        of_others[0].longest,
        of_dead[0].longest,
    );
    ensure!(
        of_others[0].longest < LIVENESS,
        "{:?}\n{}",
        of_others[0],
        nodes.logs()
    );
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

/// Typists of whom enough was acknowledged for a fault to say something.
async fn under_way(typing: &Typing) -> Result<Follower<Ledger>> {
    let typists = typing.start()?;
    typists
        .until(Duration::from_mins(1), |ledger| ACKED_MIN <= ledger.acked())
        .await?;
    Ok(typists)
}

/// A receipt that did not come.
const NEVER: Duration = Duration::MAX;
/// How long a killed node stays away.
const DOWN: Duration = Duration::from_secs(5);
/// How many nodes are killed one after the other; a measurement wants thirty.
const KILLS_ENV: &str = "COLLAB_KILLS";

#[tokio::test(flavor = "multi_thread")]
async fn receipts_come_again_soon_after_each_of_many_kills() -> Result<()> {
    let kills: usize = std::env::var(KILLS_ENV)
        .ok()
        .map_or(Ok(3), |kills| kills.parse())?;
    let (postgres, redis) = (Postgres::shared().await, Redis::start().await);
    let database = postgres.database().await;
    let mut nodes = Nodes::start(3, &database, &redis.url()).await?;
    let mut connection = PgConnection::connect(&database).await?;
    let names = documents(12);
    let typing = Typing {
        writers: 3,
        rate: 10.0,
        ..Typing::new(nodes.urls(), names.clone(), 4)
    };
    let typists = under_way(&typing).await?;

    let mut killed = Vec::new();
    for kill in 0..kills {
        // Every survivor may end a lease early again.
        sleep(EARLY_FENCE_EVERY).await;
        // Nor is any node in quarantine.
        sqlx::query("delete from lost_lease")
            .execute(&mut connection)
            .await?;
        let report = nodes.balanced(3).await?;
        let victim = nodes.nodes[kill % 3].name().to_owned();
        let owned: Vec<String> = names
            .iter()
            .filter(|name| owner_of(&report, name).is_some_and(|owner| owner.0 == victim))
            .cloned()
            .collect();
        killed.push((now_ms(), nodes.nodes[kill % 3].url(), owned));
        nodes.kill(kill % 3)?;
        sleep(DOWN).await;
        nodes.run(kill % 3)?;
    }
    nodes.balanced(3).await?;
    let mut fences = 0.0;
    for number in 0..3 {
        fences += nodes.metric(number, "collab_early_fences_total").await?;
    }
    let ledger = typists.stop().await?;

    let (mut elsewhere, mut own) = (Vec::new(), Vec::new());
    for (at, node, owned) in &killed {
        let theirs = ledger.next_ack(*at, |document, writer| {
            writer.node != *node && owned.iter().any(|owned| owned == document)
        });
        elsewhere.extend(theirs.into_values().map(|after| after.unwrap_or(NEVER)));
        let its_own = ledger.next_ack(*at, |_, writer| writer.node == *node);
        own.extend(its_own.into_values().map(|after| after.unwrap_or(NEVER)));
    }
    elsewhere.sort_unstable();
    own.sort_unstable();
    ensure!(!elsewhere.is_empty() && !own.is_empty());
    let middle = |sorted: &[Duration]| (sorted[sorted.len() / 2], sorted[sorted.len() - 1]);
    let (median, worst) = middle(&elsewhere);
    println!(
        "killed {kills} nodes: {} acked edits; from a kill to the next receipt of a document that the node owned, for \
         clients elsewhere: median {median:?}, worst {worst:?} of {}; for all clients of the node itself: {:?}",
        ledger.acked(),
        elsewhere.len(),
        middle(&own),
    );
    println!("leases ended early by the nodes that still run: {fences}");
    ensure!(
        median < LIVENESS / 4 && worst < LIVENESS,
        "{}",
        nodes.logs()
    );
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

/// As when the others believed a node to be gone that was not: it goes on, only without its slots.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_fenced_while_it_lives_keeps_its_sockets() -> Result<()> {
    let (postgres, redis) = (Postgres::shared().await, Redis::start().await);
    let database = postgres.database().await;
    let nodes = Nodes::start(3, &database, &redis.url()).await?;
    let names = documents(12);
    let typists = under_way(&Typing::new(nodes.urls(), names.clone(), 5)).await?;
    let incarnation = |report: &ClusterReport| {
        let mut members = report.members.iter();
        let member = members.find(|member| member.node.0 == nodes.nodes[1].name());
        member.map(|member| member.incarnation)
    };
    let before = incarnation(&nodes.report().await?);

    let fenced = now_ms();
    let mut connection = PgConnection::connect(&database).await?;
    sqlx::query(
        "update member set fenced = true, lease_end = clock_timestamp() where incarnation = $1
         returning pg_notify('collab_members', '')",
    )
    .bind(before)
    .execute(&mut connection)
    .await?;
    let again = nodes
        .until("the node is another incarnation", |report| {
            incarnation(report).is_some_and(|now| Some(now) != before)
        })
        .await?;
    ensure!(again.members.len() == 3, "{:?}", again.members);
    nodes.balanced(3).await?;
    sleep(Duration::from_secs(1)).await;
    let lost = nodes.metric(1, "collab_leases_lost_total").await?;
    ensure!(lost.total_cmp(&1.0).is_eq(), "{lost} leases were lost");
    let ledger = typists.stop().await?;

    let closes: usize = ledger
        .writers
        .values()
        .map(|writer| writer.closes.len())
        .sum();
    let after = ledger.next_ack(fenced, |_, _| true);
    let longest = after
        .into_values()
        .map(|after| after.unwrap_or(NEVER))
        .max();
    println!(
        "fenced a living node: {} acked edits, {closes} closes, receipts came again within {longest:?}",
        ledger.acked()
    );
    ensure!(closes == 0, "sockets were closed {closes} times");
    ensure!(longest < Some(LIVENESS), "{longest:?}\n{}", nodes.logs());
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_node_hands_over_under_open_sockets_and_a_new_one_takes_its_share() -> Result<()>
{
    let postgres = Postgres::shared().await;
    // Without Redis: it backs nothing of this.
    let mut nodes = Nodes::start(2, &postgres.database().await, "none").await?;
    let names = documents(12);
    let urls = nodes.urls();
    let typists = under_way(&Typing::new(urls.clone(), names.clone(), 2)).await?;

    nodes.add()?;
    nodes.balanced(3).await?;
    let grown = now_ms();
    sleep(Duration::from_secs(1)).await;
    let took = nodes.stop(1).await?;
    nodes.balanced(2).await?;
    let stopped = now_ms();
    nodes.run(1)?;
    sleep(Duration::from_secs(2)).await;
    let ledger = typists.stop().await?;

    let elsewhere = ledger
        .writers
        .values()
        .filter(|writer| writer.node == urls[0]);
    let closes: usize = elsewhere.map(|writer| writer.closes.len()).sum();
    let silence = ledger.silences(grown - 5_000.0, stopped);
    let silence = silence.iter().find(|silence| silence.node == urls[0]);
    println!(
        "stopped a node: {} acked edits, it took {took:?}; clients of the other node: {closes} closes, longest silence {:?}",
        ledger.acked(),
        silence.map(|silence| silence.longest),
    );
    ensure!(
        closes == 0,
        "the sockets of the other node were closed {closes} times"
    );
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgements_wait_for_postgres_and_redis_does_not_matter() -> Result<()> {
    let (mut postgres, mut redis) = (Postgres::start().await, Redis::start().await);
    let nodes = Nodes::start(2, &postgres.url(), &redis.url()).await?;
    let names = documents(6);
    let typists = under_way(&Typing::new(nodes.urls(), names.clone(), 3)).await?;

    let before = now_ms();
    redis.kill()?;
    sleep(Duration::from_secs(2)).await;
    // The time before the next fault, which ends receipts for good reason.
    let without_redis = now_ms() - 1_000.0;
    postgres.kill()?;
    sleep(Duration::from_secs(3)).await;
    let acked = typists.with(Ledger::acked);
    sleep(Duration::from_secs(1)).await;
    ensure!(
        typists.with(Ledger::acked) == acked,
        "an edit was acknowledged without a database"
    );
    postgres.restart().await?;
    typists
        .until(Duration::from_secs(20), |ledger| {
            acked + ACKED_MIN <= ledger.acked()
        })
        .await?;
    redis.restart().await?;
    let ledger = typists.stop().await?;

    let silence = &ledger.silences(before, without_redis)[0];
    let closes: usize = ledger
        .writers
        .values()
        .map(|writer| writer.closes.len())
        .sum();
    println!(
        "killed Redis, then Postgres for 4 s: {} acked edits, longest silence without Redis {:?}, {closes} closes",
        ledger.acked(),
        silence.longest,
    );
    ensure!(silence.longest < LIVENESS, "{silence:?}");
    ensure!(closes == 0, "sockets were closed {closes} times");
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

/// The database loses its last seconds in a failover, when nobody but the owners still has them: what was acknowledged then is
/// written again from their memory, under epochs above those that were lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_lagging_standby_lost_is_written_again_by_the_owners() -> Result<()> {
    let mut primary = Postgres::start().await;
    let proxy = Proxy::start([127, 0, 0, 1].into(), primary.address()).await?;
    let mut nodes = Nodes::start(3, &Postgres::url_at(proxy.address()), "none").await?;
    let names = documents(12);
    // The third node gets a share of the slots and goes: its clients would stay without one.
    let typists = under_way(&Typing::new(nodes.urls()[..2].to_vec(), names.clone(), 6)).await?;

    let standby = primary.standby("standby", Setup::default()).await;
    let mut behind = standby.session().await?;
    for statement in [
        "alter system set primary_conninfo = ''",
        "select pg_reload_conf()",
    ] {
        sqlx::query(statement).execute(&mut behind).await?;
    }
    let before = typists.with(Ledger::acked);
    // Slots change hands in what is lost, too.
    nodes.stop(2).await?;
    nodes.balanced(2).await?;
    typists
        .until(Duration::from_mins(1), |ledger| {
            before + ACKED_MIN <= ledger.acked()
        })
        .await?;
    let ledger = typists.stop().await?;
    let lost = ledger.acked() - before;

    primary.kill()?;
    standby.promote().await?;
    proxy.retarget(standby.address());
    let failed_over = now_ms();
    nodes
        .until("the nodes see the failover", |report| {
            report.store.timeline == "00000002"
        })
        .await?;
    nodes.run(2)?;
    nodes.balanced(3).await?;
    sleep(Duration::from_secs(2)).await;
    println!(
        "the database lost about {lost} of {} acked edits; healed and balanced within {:.0} ms",
        ledger.acked(),
        now_ms() - failed_over
    );
    // Nothing is left in memory that could stand for what is not in the log.
    for number in 0..3 {
        nodes.kill(number)?;
    }
    for number in 0..3 {
        nodes.run(number)?;
    }
    nodes.balanced(3).await?;
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

/// One node alone loses the database: its clients stay with it and are relayed to the new owners, of which other nodes
/// tell it.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_loses_the_database_relays_to_the_new_owners() -> Result<()> {
    let postgres = Postgres::start().await;
    let proxy = Proxy::start([127, 0, 0, 1].into(), postgres.address()).await?;
    let mut nodes = Nodes::new(Launch::local(&postgres.url(), "none"));
    nodes.add()?;
    nodes.add_with(Launch::local(&Postgres::url_at(proxy.address()), "none"))?;
    nodes.add()?;
    nodes.balanced(3).await?;
    let names = documents(12);
    let typists = under_way(&Typing::new(nodes.urls(), names.clone(), 8)).await?;

    let cut = now_ms();
    proxy.treat(Treatment::Stall, Treatment::Stall);
    sleep(Duration::from_secs(10)).await;
    let healed = now_ms();
    proxy.heal();
    proxy.reset();
    nodes.balanced(3).await?;
    sleep(Duration::from_secs(2)).await;
    let ledger = typists.stop().await?;

    let url = nodes.nodes[1].url();
    let after = ledger.next_ack(cut, |_, writer| writer.node == url);
    let longest = after
        .into_values()
        .map(|after| after.unwrap_or(NEVER))
        .max()
        .unwrap_or(NEVER);
    let closes: usize = ledger
        .writers
        .values()
        .map(|writer| writer.closes.len())
        .sum();
    println!(
        "cut a node from the database for {:.0} ms: {} acked edits, {closes} closes, its clients' receipts came again \
         within {longest:?}",
        healed - cut,
        ledger.acked()
    );
    ensure!(closes == 0, "sockets were closed {closes} times");
    ensure!(longest < LIVENESS, "{longest:?}\n{}", nodes.logs());
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

/// The store refuses the updates of one document for ever.
#[tokio::test(flavor = "multi_thread")]
async fn a_document_that_the_store_refuses_stops_alone() -> Result<()> {
    let postgres = Postgres::shared().await;
    let database = postgres.database().await;
    let nodes = Nodes::start(2, &database, "none").await?;
    let names = documents(8);
    let typists = under_way(&Typing::new(nodes.urls(), names.clone(), 7)).await?;

    let mut connection = PgConnection::connect(&database).await?;
    let statement =
        "alter table update_log add constraint refused check (document <> 'notes/3') not valid";
    sqlx::query(statement).execute(&mut connection).await?;
    let refused = now_ms();
    let acked = typists.with(Ledger::acked);
    typists
        .until(Duration::from_mins(1), |ledger| {
            acked + 2 * ACKED_MIN <= ledger.acked()
        })
        .await?;
    let next = typists.with(|ledger| {
        let next = ledger.next_ack(refused + 500.0, |_, _| true);
        let next = next.into_iter();
        next.map(|(document, after)| (document.to_owned(), after))
            .collect::<BTreeMap<_, _>>()
    });
    for (document, after) in &next {
        let wanted = document != "notes/3";
        ensure!(after.is_some() == wanted, "{document}: {after:?}");
    }
    sqlx::query("alter table update_log drop constraint refused")
        .execute(&mut connection)
        .await?;
    let ledger = typists.stop().await?;
    println!(
        "the store refused one document: {} acked edits, receipts of the others went on: {next:?}",
        ledger.acked()
    );
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

/// More slots are locked than batches may be in flight.
#[tokio::test(flavor = "multi_thread")]
async fn documents_of_locked_slots_hold_up_no_others() -> Result<()> {
    let postgres = Postgres::shared().await;
    let database = postgres.database().await;
    let nodes = Nodes::start(1, &database, "none").await?;
    let names = documents(12);
    let typists = under_way(&Typing::new(nodes.urls(), names.clone(), 8)).await?;

    let mut holder = PgConnection::connect(&database).await?;
    sqlx::raw_sql("begin").execute(&mut holder).await?;
    let held: Vec<String> = sqlx::query_scalar(
        "with held as (
           select slot from slot where slot in (
             select slot from document where id in ('notes/1', 'notes/2', 'notes/3', 'notes/4')) for update
         )
         select id from held join document using (slot)",
    )
    .fetch_all(&mut holder)
    .await?;
    let is_held = |document: &str| held.iter().any(|held| held == document);
    let locked = now_ms();
    // What was on its way may still be written.
    let after = locked + 500.0;
    let acked = typists.with(Ledger::acked);
    typists
        .until(Duration::from_mins(1), |ledger| {
            acked + 2 * ACKED_MIN <= ledger.acked()
                && ledger
                    .next_ack(after, |document, _| !is_held(document))
                    .values()
                    .all(Option::is_some)
        })
        .await?;
    let (next, silence) = typists.with(|ledger| {
        let next = ledger.next_ack(after, |document, _| is_held(document));
        let silences = ledger.silences(locked, now_ms()).into_iter();
        let silence = silences
            .filter(|silence| !is_held(&silence.document))
            .map(|silence| silence.longest)
            .max();
        (next.into_values().flatten().count(), silence)
    });
    ensure!(
        next == 0,
        "{next} documents of locked slots were acknowledged"
    );
    sqlx::raw_sql("rollback").execute(&mut holder).await?;
    let ledger = typists.stop().await?;
    println!(
        "the slots of {} documents were locked: {} acked edits, longest silence of the others {silence:?}",
        held.len(),
        ledger.acked()
    );
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

#[tokio::test(flavor = "multi_thread")]
async fn recorded_sessions_end_alike_everywhere() -> Result<()> {
    let (postgres, redis) = (Postgres::shared().await, Redis::start().await);
    let nodes = Nodes::start(3, &postgres.database().await, &redis.url()).await?;
    let names = documents(20);
    let replayed = Replay::recorded(nodes.urls(), names.clone()).run().await?;
    for document in &replayed {
        ensure!(
            document.agree && document.equals_trace == Some(true),
            "{document:?}"
        );
    }
    // When the public traces lie beside the checkout they are replayed, too.
    let traces =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/editing-traces");
    for trace in [
        "friendsforever.concurrent.json.gz",
        "automerge-paper.json.gz",
    ] {
        let path = traces.join(trace);
        if !path.is_file() {
            println!("{trace} is not here");
            continue;
        }
        let names = vec![format!("{trace}-1"), format!("{trace}-2")];
        let mut replay = Replay::recorded(nodes.urls(), names);
        replay.trace = path;
        for document in replay.run().await? {
            println!(
                "{trace}: {} updates in {:.0} ms",
                document.updates, document.duration_ms
            );
            ensure!(
                document.agree && document.equals_trace == Some(true),
                "{document:?}"
            );
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pinned_document_moves_alone_and_under_open_sockets() -> Result<()> {
    let postgres = Postgres::shared().await;
    let nodes = Nodes::start(3, &postgres.database().await, "none").await?;
    let names = documents(8);
    let urls = nodes.urls();
    let typing = Typing {
        writers: 3,
        ..Typing::new(urls.clone(), names.clone(), 4)
    };
    let typists = under_way(&typing).await?;
    let begun = now_ms();
    let holder = json!({ "holder": "a test" });
    let term = nodes.control(Method::POST, "term", &holder).await?["term"].clone();
    for round in 0..6 {
        // Also to and fro, also while it is moved: whatever the order, nothing is lost.
        let hot = &names[round % 2];
        let pin = |pin: bool| json!({ "term": term, "document": hot, "pin": pin });
        nodes.control(Method::POST, "pin", &pin(true)).await?;
        let pinned = |report: &ClusterReport| {
            let pin = report.pins.iter().find(|pin| pin.document.as_str() == hot);
            pin.and_then(|pin| Some((pin.slot.0, pin.owner?)))
        };
        let report = nodes
            .until("the pin is known", |report| pinned(report).is_some())
            .await?;
        let (slot, owner) = pinned(&report).context("it is pinned")?;
        ensure!(report.slots <= slot, "slot {slot} is not virtual");
        let next = (owner + 1) % 3;
        let placement = json!({
            "term": term,
            "nodes": report.members.iter().map(|member| &member.node).collect::<Vec<_>>(),
            "slots": report.owners,
            "pins": [{ "slot": slot, "node": next }],
        });
        nodes.control(Method::PUT, "placement", &placement).await?;
        let there = |report: &ClusterReport| pinned(report) == Some((slot, next));
        let moved = nodes.until("the pin has moved", there).await?;
        ensure!(moved.owners == report.owners, "neighbours moved with it");
        sleep(Duration::from_millis(300)).await;
        nodes.control(Method::POST, "pin", &pin(false)).await?;
        nodes
            .until("the pin is gone", |report| pinned(report).is_none())
            .await?;
        sleep(Duration::from_millis(300)).await;
    }
    let ended = now_ms();
    let ledger = typists.stop().await?;
    let silence = ledger.silences(begun, ended);
    let closes: usize = ledger
        .writers
        .values()
        .map(|writer| writer.closes.len())
        .sum();
    println!(
        "pinned, moved and unpinned 6 times: {} acked edits, {closes} closes, longest silence {:?}",
        ledger.acked(),
        silence[0].longest,
    );
    ensure!(closes == 0, "sockets were closed {closes} times");
    ensure!(silence[0].longest < LIVENESS, "{:?}", silence[0]);
    everything_acknowledged_is_there(&nodes, &ledger, &names).await
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_tell_their_load_and_are_told_their_zones() -> Result<()> {
    let postgres = Postgres::shared().await;
    let nodes = Nodes::start(2, &postgres.database().await, "none").await?;
    let names = documents(6);
    let typists = Typing::new(nodes.urls(), names.clone(), 5).start()?;
    let begun = Instant::now();
    loop {
        let mut slots = Vec::new();
        for load in nodes.control_all("load").await? {
            let load: NodeLoad = serde_json::from_value(load)?;
            slots.extend(load.slots);
        }
        let sum = slots
            .iter()
            .fold(Activity::default(), |sum, slot| sum.plus(slot.activity));
        let documents: u32 = slots.iter().map(|slot| slot.documents).sum();
        // Twelve writers make some fifty edits a second; on a busy machine fewer.
        if (documents, sum.connections) == (6, 12) && 300 < sum.updates_per_minute {
            println!(
                "after {:?}: {sum:?} in {} slots",
                begun.elapsed(),
                slots.len()
            );
            break;
        }
        ensure!(begun.elapsed() < Duration::from_secs(40), "{slots:?}");
        sleep(Duration::from_millis(500)).await;
    }
    typists.stop().await?;

    let holder = json!({ "holder": "a test" });
    let term = nodes.control(Method::POST, "term", &holder).await?["term"].clone();
    let zones = json!({ "term": term, "zones": { "n0": "a", "n1": "b" } });
    nodes.control(Method::PUT, "zones", &zones).await?;
    let told = |report: &ClusterReport| {
        let zones = report.members.iter().map(|member| member.zone.as_str());
        zones.collect::<Vec<_>>() == ["a", "b"]
    };
    nodes.until("the zones are known", told).await?;
    Ok(())
}

fn owner_of(report: &ClusterReport, document: &str) -> Option<NodeId> {
    let slot = slot_of(&DocumentId::new(document).ok()?, report.slots);
    let owner = report.owners[usize::from(slot.0)]?;
    Some(report.members[usize::from(owner)].node.clone())
}

fn documents(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("notes/{number}")).collect()
}

async fn everything_acknowledged_is_there(
    nodes: &Nodes,
    ledger: &Ledger,
    names: &[String],
) -> Result<()> {
    let urls = nodes.urls();
    let reading = Reading {
        nodes: &urls,
        documents: names,
        token: None,
    };
    checker::everything_acknowledged_is_there(&reading, ledger).await
}
