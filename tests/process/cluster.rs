//! Three nodes, real Postgres and Redis, stock clients: what was acknowledged is there, whatever ends.

use std::time::Duration;

use anyhow::{Result, ensure};
use collab_tests::checker;
use collab_tests::clients::typist::{Ledger, Typing};
use collab_tests::clients::{Reading, Replay, now_ms};
use collab_tests::nodes::Nodes;
use collab_tests::postgres::Postgres;
use collab_tests::redis::Redis;
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
    let typists = typing.start()?;
    typists
        .until(Duration::from_mins(1), |ledger| ACKED_MIN <= ledger.acked())
        .await?;

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

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_node_hands_over_under_open_sockets_and_a_new_one_takes_its_share() -> Result<()>
{
    let postgres = Postgres::shared().await;
    // Without Redis: it backs nothing of this.
    let mut nodes = Nodes::start(2, &postgres.database().await, "none").await?;
    let names = documents(12);
    let urls = nodes.urls();
    let typists = Typing::new(urls.clone(), names.clone(), 2).start()?;
    typists
        .until(Duration::from_mins(1), |ledger| ACKED_MIN <= ledger.acked())
        .await?;

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
    let typists = Typing::new(nodes.urls(), names.clone(), 3).start()?;
    typists
        .until(Duration::from_mins(1), |ledger| ACKED_MIN <= ledger.acked())
        .await?;

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
