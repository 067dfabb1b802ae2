//! Redis and Postgres that die, stall, fill up, lag and fail over.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use collab_tests::clients::now_ms;
use collab_tests::postgres::Postgres;
use collab_tests::redis::{Redis, Setup};
use collab_tests::witnesses;
use serde_json::Value;
use tokio::time::sleep;

use crate::world::World;
use crate::{millis, seconds};

/// Without Redis nobody waits longer for a receipt than otherwise, a writer's own pauses included.
const UNHURT: Duration = seconds(3);
/// Within this time after Redis is back, everybody can be seen.
const PRESENCE: Duration = seconds(5);

/// Arguments of a Redis that keeps what it has.
pub(crate) const APPEND_ONLY: &[&str] = &["--appendonly", "yes", "--appendfsync", "always"];

/// What all drills of Redis have in common: receipts go on, and presence is complete soon after the end.
async fn without_redis(
    world: &mut World,
    hurt: impl AsyncFnOnce(&mut World) -> Result<()>,
    mend: impl AsyncFnOnce(&mut World) -> Result<()>,
) -> Result<()> {
    presence_is_complete(world, PRESENCE)
        .await
        .context("before the fault")?;
    world.expect.silence = Some(UNHURT);
    world.expect.owners_stay = true;
    world.expect.no_closes = true;
    world.fault(None).await?;
    hurt(world).await?;
    sleep(seconds(4)).await;
    mend(world).await?;
    let back = presence_is_complete(world, PRESENCE).await;
    world.over();
    match back {
        Ok(after) => world.note(format!("presence complete after {} ms", after.as_millis())),
        Err(error) => world.expect(false, || format!("{error:#}")),
    }
    Ok(())
}

/// Waits until every node says of every document that its four writers are there, as far as they are online.
async fn presence_is_complete(world: &World, patience: Duration) -> Result<Duration> {
    let begun = Instant::now();
    loop {
        let mut missing = Vec::new();
        for (document, url) in world
            .documents
            .iter()
            .zip(world.nodes.urls().iter().cycle())
        {
            let name = document.replace('/', "%2F");
            let answer = reqwest::get(format!("{url}/api/v1/documents/{name}/presence")).await?;
            let body: Value = serde_json::from_str(&answer.text().await?)?;
            let there = body["clients"].as_array().map_or(0, Vec::len);
            // One of them goes offline now and then.
            if there < 3 {
                missing.push(format!("{document} at {url}: {there}"));
            }
        }
        if missing.is_empty() {
            return Ok(begun.elapsed());
        }
        anyhow::ensure!(
            begun.elapsed() < patience,
            "presence is not complete after {patience:?}: {}",
            missing.join(", ")
        );
        sleep(millis(100)).await;
    }
}

pub(crate) async fn redis_killed(world: &mut World) -> Result<()> {
    let hurt = async |world: &mut World| world.redis.kill();
    let mend = async |world: &mut World| world.redis.restart().await;
    without_redis(world, hurt, mend).await
}

pub(crate) async fn redis_out_of_memory(world: &mut World) -> Result<()> {
    let hurt = async |world: &mut World| {
        world
            .redis
            .ask(&["config", "set", "maxmemory-policy", "noeviction"])?;
        world
            .redis
            .ask(&["config", "set", "maxmemory", "1"])
            .map(drop)
    };
    let mend = async |world: &mut World| {
        world
            .redis
            .ask(&["config", "set", "maxmemory", "0"])
            .map(drop)
    };
    without_redis(world, hurt, mend).await
}

pub(crate) async fn redis_read_only(world: &mut World) -> Result<()> {
    let hurt =
        async |world: &mut World| world.redis.ask(&["replicaof", "127.0.0.1", "1"]).map(drop);
    let mend = async |world: &mut World| world.redis.ask(&["replicaof", "no", "one"]).map(drop);
    without_redis(world, hurt, mend).await
}

pub(crate) async fn redis_failover(world: &mut World) -> Result<()> {
    let replica = Redis::start_with(Setup {
        host: world.cache.clone(),
        ..Setup::default()
    })
    .await;
    let master = world.redis.address();
    let (ip, port) = (master.ip().to_string(), master.port().to_string());
    replica.ask(&["replicaof", &ip, &port])?;
    sleep(seconds(2)).await;
    // From here on it lags.
    replica.ask(&["replicaof", "127.0.0.1", "1"])?;
    sleep(seconds(2)).await;
    let hurt = async |world: &mut World| world.redis.kill();
    let mend = async |world: &mut World| {
        replica.ask(&["replicaof", "no", "one"])?;
        world.cache_proxy.retarget(replica.address());
        world.redis = replica;
        Ok(())
    };
    without_redis(world, hurt, mend).await
}

pub(crate) async fn redis_emptied(world: &mut World) -> Result<()> {
    let hurt = async |world: &mut World| {
        world.redis.kill()?;
        Ok(fs::remove_dir_all(
            world.redis.folder().join("appendonlydir"),
        )?)
    };
    let mend = async |world: &mut World| world.redis.restart().await;
    without_redis(world, hurt, mend).await
}

/// The file ends in the middle of a command, and later has a wrong byte in its middle, with which Redis may refuse to start.
pub(crate) async fn redis_damaged(world: &mut World) -> Result<()> {
    let change = |world: &World, change: &dyn Fn(&mut Vec<u8>)| -> Result<()> {
        for entry in fs::read_dir(world.redis.folder().join("appendonlydir"))? {
            let path = entry?.path();
            if path.to_string_lossy().ends_with(".incr.aof") {
                let mut bytes = fs::read(&path)?;
                change(&mut bytes);
                fs::write(path, bytes)?;
            }
        }
        Ok(())
    };
    let hurt = async |world: &mut World| {
        world.redis.kill()?;
        change(world, &|bytes| {
            bytes.truncate(bytes.len().saturating_sub(7));
        })?;
        world.redis.restart().await?;
        sleep(seconds(2)).await;
        world.redis.kill()?;
        change(world, &|bytes| {
            let middle = bytes.len() / 2;
            if let Some(byte) = bytes.get_mut(middle) {
                *byte ^= 0x55;
            }
        })
    };
    let mend = async |world: &mut World| {
        if world.redis.restart().await.is_err() {
            world.note("it refused the damaged file, which was removed");
            fs::remove_dir_all(world.redis.folder().join("appendonlydir"))?;
            world.redis.restart().await?;
        }
        Ok(())
    };
    without_redis(world, hurt, mend).await
}

pub(crate) async fn redis_slow(world: &mut World) -> Result<()> {
    let hurt = async |world: &mut World| world.slow_cache.delay_fsync(millis(1_500));
    let mend = async |world: &mut World| world.slow_cache.delay_fsync(Duration::ZERO);
    without_redis(world, hurt, mend).await
}

pub(crate) async fn postgres_restarts(world: &mut World) -> Result<()> {
    world.expect.no_closes = true;
    world.expect.owners_stay = true;
    world.fault(None).await?;
    world.postgres.stop_at_once().await?;
    let down = now_ms();
    sleep(seconds(4)).await;
    world.expect.no_receipts.push((down, now_ms()));
    world.postgres.restart().await?;
    Ok(())
}

pub(crate) async fn backend_killed(world: &mut World) -> Result<()> {
    world.expect.no_closes = true;
    world.fault(None).await?;
    let mut session = world.postgres.session().await?;
    let pid: i32 = sqlx::query_scalar(
        "select pid from pg_stat_activity where query ilike '%insert into update_log%' and pid <> pg_backend_pid() limit 1",
    )
    .fetch_one(&mut session)
    .await?;
    collab_tests::command::output(
        std::process::Command::new("kill").args(["-KILL", &pid.to_string()]),
    )?;
    sleep(seconds(5)).await;
    Ok(())
}

pub(crate) async fn disk_full(world: &mut World) -> Result<()> {
    world.expect.no_closes = true;
    world.fault(None).await?;
    let ballast = world.postgres.folder().join("ballast");
    let written = fs::write(&ballast, vec![0; 1 << 30]);
    world.expect(written.is_err(), || "the disk was never full".to_owned());
    sleep(seconds(8)).await;
    let from = now_ms();
    let acked = world.ledger(collab_tests::checker::Ledger::acked);
    sleep(seconds(2)).await;
    let meanwhile = world.ledger(collab_tests::checker::Ledger::acked) - acked;
    for number in 0..3 {
        let runs = world.nodes.runs(number);
        world.expect(runs, || format!("n{number} ended"));
    }
    fs::remove_file(ballast)?;
    let runs = world.postgres.runs();
    world.note(format!(
        "{meanwhile} acknowledged in 2 s of a full disk; Postgres lived: {runs}; {from:.0}"
    ));
    if !runs {
        world.postgres.restart().await?;
    }
    Ok(())
}

/// A claim takes less than twice the time of a commit, also while every commit takes half a second.
pub(crate) async fn slow_disk(world: &mut World) -> Result<()> {
    const FSYNC: Duration = millis(500);
    world.fault(0).await?;
    world.disk.delay_fsync(FSYNC)?;
    sleep(seconds(6)).await;
    let commits = {
        let (from, until) = (world.fault_ms() + 2_000.0, now_ms());
        world.ledger(|ledger| ledger.latencies_in(from, until))
    };
    let commit = commits.get(commits.len() / 2).copied().unwrap_or_default();
    let logged = [1, 2].map(|number| world.nodes.log(number).len());
    world.nodes.kill(0)?;
    world.re_owned().await?;
    sleep(seconds(3)).await;
    let claims: Vec<u64> = [1, 2]
        .iter()
        .zip(logged)
        .flat_map(|(number, before)| claim_times(&world.nodes.log(*number)[before..]))
        .collect();
    let logs = world.logs();
    world.expect(!claims.is_empty(), || {
        format!("no claim was logged\n{logs}")
    });
    let longest = Duration::from_millis(claims.iter().copied().max().unwrap_or_default());
    let bound = 2 * commit.max(FSYNC);
    world.expect(longest < bound, || {
        format!("a claim took {longest:?}; twice a commit is {bound:?}")
    });
    let memory: Vec<u64> = [1, 2]
        .iter()
        .map(|number| resident(world, *number))
        .collect();
    world.expect(memory.iter().all(|bytes| *bytes < 500 << 20), || {
        format!("resident bytes: {memory:?}")
    });
    world.note(format!(
        "a commit took {} ms at the median, the longest claim {} ms; resident {:?} MiB",
        commit.as_millis(),
        longest.as_millis(),
        memory.iter().map(|bytes| bytes >> 20).collect::<Vec<_>>()
    ));
    world.disk.delay_fsync(Duration::ZERO)?;
    world.nodes.run(0)
}

/// `duration_ms` of the claims in a log.
fn claim_times(log: &str) -> Vec<u64> {
    log.lines()
        .filter(|line| line.contains("adopted slots"))
        .filter_map(|line| {
            let (_, rest) = line.split_once("duration_ms=")?;
            rest.split_whitespace().next()?.parse().ok()
        })
        .collect()
}

/// Resident memory of a node in bytes.
pub(crate) fn resident(world: &World, number: usize) -> u64 {
    let pid = world.nodes.nodes[number].pid().unwrap_or(0);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

pub(crate) async fn failover_synchronous(world: &mut World) -> Result<()> {
    world.fault(None).await?;
    fail_over(world).await.map(drop)
}

/// The standby has not heard of the last seconds. The owners have, and bring it back.
pub(crate) async fn failover_lagging(world: &mut World) -> Result<()> {
    world.fault(None).await?;
    world.network.cut(&world.store, &world.standby_host)?;
    sleep(seconds(2)).await;
    let (mut primary, kept) = fail_over(world).await?;
    // Nobody but this drill reaches it any more.
    primary.restart().await?;
    let log = witnesses::log(&mut primary.session().await?).await?;
    let lost = log.appended.len() - usize::try_from(kept)?;
    world.expect(0 < lost, || "no row was lost with the primary".to_owned());
    world.note(format!("{lost} rows were lost with the primary"));
    world.appended_before_failover = log.appended;
    Ok(())
}

/// The primary dies, the standby takes its place, and the address moves. Answers the old primary, and how many rows of the log
/// the new one had when its turn came.
async fn fail_over(world: &mut World) -> Result<(Postgres, i64)> {
    let standby = world.standby.take().context("there is a standby")?;
    world.postgres.kill()?;
    let down = now_ms();
    sleep(seconds(2)).await;
    // Its own primary waits for no standby.
    promote(&standby).await?;
    let kept = sqlx::query_scalar("select count(*) from witness.append")
        .fetch_one(&mut standby.session().await?)
        .await?;
    world.expect.no_receipts.push((down, now_ms()));
    for proxy in &world.store_proxies {
        proxy.retarget(standby.address());
    }
    world.network.heal_all()?;
    let primary = std::mem::replace(&mut world.postgres, standby);
    sleep(seconds(8)).await;
    Ok((primary, kept))
}

async fn promote(standby: &Postgres) -> Result<()> {
    standby.promote().await?;
    let mut session = standby.session().await?;
    sqlx::raw_sql("alter system set synchronous_standby_names = ''")
        .execute(&mut session)
        .await?;
    sqlx::raw_sql("select pg_reload_conf()")
        .execute(&mut session)
        .await?;
    Ok(())
}

/// Commits wait for a standby that is gone. A wait that an administrator cancels is no success.
pub(crate) async fn standby_gone(world: &mut World) -> Result<()> {
    world.fault(None).await?;
    let mut standby = world.standby.take().context("there is a standby")?;
    standby.kill()?;
    sleep(seconds(1)).await;
    let (from, mut cancelled) = (now_ms(), 0);
    for _ in 0..6 {
        cancelled += world
            .count(
                "select count(*) from (select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep') as all_of_them",
                0,
                seconds(1),
            )
            .await?;
        sleep(millis(500)).await;
    }
    world.expect.no_receipts.push((from, now_ms()));
    world.expect(0 < cancelled, || "no wait was cancelled".to_owned());
    world.note(format!("{cancelled} waits were cancelled"));
    standby.restart().await?;
    world.standby = Some(standby);
    sleep(seconds(3)).await;
    Ok(())
}

/// A lock on one slot holds up its own documents only; idle transactions and used up connections hold up nothing.
pub(crate) async fn locks_and_connections(world: &mut World) -> Result<()> {
    world.fault(None).await?;
    let mut session = world.postgres.session().await?;
    sqlx::raw_sql("begin; select * from update_log limit 1")
        .execute(&mut session)
        .await?;
    let mut crowd = Vec::new();
    while let Ok(session) = world.postgres.session().await {
        crowd.push(session);
    }
    sleep(seconds(3)).await;
    let quiet = longest_silence(world, &[]);
    world.expect(quiet < seconds(4), || {
        format!("no receipt for {quiet:?} without a free connection")
    });
    let count = crowd.len();
    drop(crowd);

    sqlx::raw_sql("rollback").execute(&mut session).await?;
    let held = world.documents[0].clone();
    sqlx::query("select set_config('lock_timeout', '5s', false)")
        .execute(&mut session)
        .await?;
    sqlx::raw_sql("begin").execute(&mut session).await?;
    sqlx::query(
        "select from slot where slot = (select slot from document where id = $1) for update",
    )
    .bind(&held)
    .execute(&mut session)
    .await?;
    world.fault(None).await?;
    sleep(seconds(12)).await;
    let others = longest_silence(world, &[held]);
    sqlx::raw_sql("rollback").execute(&mut session).await?;
    world.expect(others < seconds(4), || {
        format!("a lock on one slot kept documents of others without receipts for {others:?}")
    });
    world.note(format!(
        "{count} more connections: longest silence {} ms; one slot locked: {} ms elsewhere",
        quiet.as_millis(),
        others.as_millis()
    ));
    Ok(())
}

fn longest_silence(world: &World, without: &[String]) -> Duration {
    let (from, until) = (world.fault_ms(), now_ms());
    world.ledger(|ledger| {
        let silences = ledger.silences(from, until).into_iter();
        let mut others = silences.filter(|silence| {
            let key = (silence.document.clone(), silence.writer);
            !without.contains(&silence.document) && ledger.writers[&key].spells == 0
        });
        others
            .next()
            .map(|silence| silence.longest)
            .unwrap_or_default()
    })
}
