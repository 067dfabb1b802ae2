//! Nodes that die, freeze, leave and join.

use std::time::Instant;

use anyhow::Result;
use collab_core::control::MemberReport;
use collab_tests::clients::now_ms;
use collab_tests::proxy::Treatment;
use tokio::time::sleep;

use crate::world::{Plan, World, since};
use crate::{millis, seconds};

/// The node that is hurt: it owns a third of the documents.
const VICTIM: usize = 0;

pub(crate) async fn owner_killed(world: &mut World) -> Result<()> {
    sleep(millis(rand::random_range(0..700))).await;
    world.expect.others = Some(millis(2_500));
    world.expect.no_closes_elsewhere = true;
    world.fault(VICTIM).await?;
    world.nodes.kill(VICTIM)?;
    sleep(seconds(5)).await;
    world.nodes.run(VICTIM)
}

pub(crate) async fn zombie(world: &mut World) -> Result<()> {
    world.expect.others = Some(seconds(4));
    world.expect.no_closes_elsewhere = true;
    world.fault(VICTIM).await?;
    world.nodes.signal(VICTIM, "STOP")?;
    world.re_owned().await?;
    sleep(seconds(30).saturating_sub(since(world.fault_ms()))).await;
    world.nodes.signal(VICTIM, "CONT")?;
    sleep(seconds(3)).await;
    let lives = world.nodes.runs(VICTIM);
    world.note(format!("the thawed process lives: {lives}"));
    Ok(())
}

/// A pause that is shorter than the lease moves nothing.
pub(crate) async fn short_pauses(world: &mut World) -> Result<()> {
    world.expect.owners_stay = true;
    world.expect.no_closes = true;
    world.expect.silence = Some(seconds(4));
    world.fault(VICTIM).await?;
    for _ in 0..4 {
        world.nodes.signal(VICTIM, "STOP")?;
        sleep(seconds(1)).await;
        world.nodes.signal(VICTIM, "CONT")?;
        sleep(seconds(2)).await;
    }
    world.over();
    Ok(())
}

pub(crate) async fn drain(world: &mut World) -> Result<()> {
    world.expect.others = Some(seconds(2));
    world.expect.no_closes_elsewhere = true;
    world.fault(VICTIM).await?;
    let took = world.nodes.stop(VICTIM).await?;
    world.note(format!("gone with exit 0 after {} ms", took.as_millis()));
    world.over();
    sleep(seconds(2)).await;
    world.nodes.run(VICTIM)
}

pub(crate) async fn drain_then_kill(world: &mut World) -> Result<()> {
    world.expect.others = Some(seconds(4));
    world.expect.no_closes_elsewhere = true;
    world.fault(VICTIM).await?;
    world.nodes.signal(VICTIM, "TERM")?;
    sleep(millis(rand::random_range(0..200))).await;
    world.nodes.kill(VICTIM)?;
    sleep(seconds(5)).await;
    world.nodes.run(VICTIM)
}

/// A claim succeeds while the table of snapshots is locked, and a load does not.
pub(crate) async fn between_claim_and_load(world: &mut World) -> Result<()> {
    world.fault(VICTIM).await?;
    let mut session = world.postgres.session().await?;
    sqlx::raw_sql("begin; lock table snapshot in access exclusive mode")
        .execute(&mut session)
        .await?;
    world.nodes.kill(VICTIM)?;
    let re_owned = world.re_owned().await?;
    let loading = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query ilike '%from snapshot%'";
    let waiting = world.count(loading, 1, seconds(10)).await?;
    world.expect(1 <= waiting, || "nobody was loading".to_owned());
    world.nodes.kill(1)?;
    sqlx::raw_sql("rollback").execute(&mut session).await?;
    world.note(format!(
        "claimed after {} ms, {waiting} loads were waiting when their node died",
        re_owned.as_millis()
    ));
    sleep(seconds(5)).await;
    world.nodes.run(1)?;
    world.nodes.run(VICTIM)
}

/// The answers of Postgres are swallowed: rows are there, and nobody was told.
pub(crate) async fn between_commit_and_receipt(world: &mut World) -> Result<()> {
    world.fault(VICTIM).await?;
    let mut committed = 0;
    // A session that has to prepare its statement first gets no further than that: try again.
    for _ in 0..5 {
        let begun = now_ms();
        world.store_proxies[VICTIM].treat(Treatment::Pass, Treatment::Swallow);
        let mine = format!(
            "select count(*) from witness.append a join slot s using (slot)
             where s.owner = (select incarnation from member where node = 'n{VICTIM}')
               and {begun} < extract(epoch from a.at) * 1000"
        );
        committed = world.count(&mine, 1, seconds(1)).await?;
        if 0 < committed {
            break;
        }
        world.store_proxies[VICTIM].reset();
        world.store_proxies[VICTIM].heal();
        sleep(seconds(1)).await;
    }
    world.nodes.kill(VICTIM)?;
    world.expect(1 <= committed, || "nothing was committed".to_owned());
    world.note(format!(
        "{committed} rows were committed and not acknowledged"
    ));
    world.store_proxies[VICTIM].heal();
    sleep(seconds(4)).await;
    world.nodes.run(VICTIM)
}

/// What the owner tells other nodes is dropped: its own writers get receipts for what nobody else has seen.
pub(crate) async fn between_receipt_and_fan_out(world: &mut World) -> Result<()> {
    world.fault(VICTIM).await?;
    let hosts = [VICTIM, 1, 2].map(|number| world.nodes.nodes[number].launch.host.clone());
    for other in &hosts[1..] {
        world.network.cut_one_way(&hosts[0], other)?;
    }
    sleep(millis(1_000)).await;
    let (begun, url) = (world.fault_ms(), world.nodes.nodes[VICTIM].url());
    let acked = world.ledger(|ledger| {
        let own = ledger.writers.values().filter(|writer| writer.node == url);
        own.flat_map(|writer| &writer.edits)
            .filter(|edit| begun < edit.made_ms && edit.acked_ms.is_some())
            .count()
    });
    world.nodes.kill(VICTIM)?;
    world.network.heal_all()?;
    world.expect(1 <= acked, || {
        "its own writers were not acknowledged".to_owned()
    });
    world.note(format!(
        "{acked} edits were acknowledged and shown to nobody elsewhere"
    ));
    sleep(seconds(5)).await;
    world.nodes.run(VICTIM)
}

/// Killed while the row of the snapshot is inserted, and again between that and the cut of the log.
pub(crate) async fn in_the_middle_of_a_snapshot(world: &mut World) -> Result<()> {
    world.fault(VICTIM).await?;
    for (hold, waiting, release) in [
        (
            "begin; lock table snapshot in share mode",
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query ilike '%insert into snapshot%'",
            "rollback",
        ),
        (
            "select pg_advisory_lock(42);
             create or replace function witness.wait() returns trigger language plpgsql security definer as $$
             begin perform pg_advisory_xact_lock(42); return null; end $$;
             create or replace trigger wait before delete on update_log for each statement execute function witness.wait()",
            "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and query ilike '%cut_log%'",
            "select pg_advisory_unlock(42)",
        ),
    ] {
        let mut session = world.postgres.session().await?;
        sqlx::raw_sql(hold).execute(&mut session).await?;
        let caught = world.count(waiting, 1, seconds(30)).await?;
        // Documents are owned in turn, so the first is the first node's.
        let at = sqlx::query_scalar::<_, String>(
            "select m.node from pg_stat_activity a join member m on m.incarnation::text = a.application_name
             where a.wait_event_type = 'Lock' and (a.query ilike '%insert into snapshot%' or a.query ilike '%cut_log%') limit 1",
        );
        let node = at.fetch_optional(&mut session).await?;
        world.expect(caught == 1 || node.is_some(), || "no snapshot was written".to_owned());
        let Some(number) = node.and_then(|name| name.strip_prefix('n')?.parse().ok()) else {
            sqlx::raw_sql(release).execute(&mut session).await?;
            continue;
        };
        world.nodes.kill(number)?;
        world.note(format!("killed n{number} there"));
        sleep(millis(300)).await;
        sqlx::raw_sql(release).execute(&mut session).await?;
        sleep(seconds(4)).await;
        world.nodes.run(number)?;
        world.nodes.balanced(3).await?;
    }
    let snapshots = world
        .count("select count(*) from snapshot", 1, seconds(20))
        .await?;
    world.note(format!("{snapshots} snapshots at the end"));
    Ok(())
}

pub(crate) async fn panic_in_one_document(world: &mut World) -> Result<()> {
    world.expect.owners_stay = true;
    world.expect.silence = Some(seconds(5));
    world.fault(VICTIM).await?;
    let url = world.nodes.nodes[VICTIM].url();
    let before = world
        .nodes
        .metric(VICTIM, "collab_document_panics_total")
        .await?;
    let said = crate::hostile::script(world, "panic", &url, &world.documents[0].clone()).await?;
    sleep(seconds(2)).await;
    let after = world
        .nodes
        .metric(VICTIM, "collab_document_panics_total")
        .await?;
    world.expect(before < after, || {
        format!("no panic was counted; the client saw {said}")
    });
    world.note(format!("{} panics; the client saw {said}", after - before));
    world.over();
    Ok(())
}

/// The database gives the slots of two nodes back and forth behind their backs.
pub(crate) async fn duelling_owners(world: &mut World) -> Result<()> {
    world.fault(VICTIM).await?;
    let mut session = world.postgres.session().await?;
    let mut flips = 0;
    while since(world.fault_ms()) < seconds(8) {
        sqlx::raw_sql(
            "with two as (
               select (select incarnation from member where node = 'n0') as a, (select incarnation from member where node = 'n1') as b
             ), mine as (
               select slot from slot, two where owner in (a, b) order by slot for no key update of slot
             )
             update slot s set owner = case when owner = a then b else a end, epoch = epoch + 1,
               revision = pg_current_xact_id()::text::bigint
             from mine, two where s.slot = mine.slot",
        )
        .execute(&mut session)
        .await?;
        flips += 1;
        sleep(millis(rand::random_range(50..600))).await;
    }
    let fenced = world.nodes.metric(0, "collab_updates_fenced_total").await?
        + world.nodes.metric(1, "collab_updates_fenced_total").await?;
    world.expect(0.0 < fenced, || "no update was ever fenced".to_owned());
    world.note(format!("{flips} changes, {fenced} updates fenced"));
    Ok(())
}

/// A node that is lost three times is given nothing for half a minute and then its share in steps; nobody elsewhere waits long.
pub(crate) async fn flapping(world: &mut World) -> Result<()> {
    world.expect.silence = Some(seconds(15));
    world.expect.no_closes_elsewhere = true;
    world.fault(VICTIM).await?;
    for last in [false, false, true] {
        world.nodes.signal(VICTIM, "STOP")?;
        world.re_owned().await?;
        world.nodes.signal(VICTIM, "CONT")?;
        if !last {
            world.nodes.balanced(3).await?;
        }
    }
    let name = world.nodes.nodes[VICTIM].name();
    let caught = |member: &MemberReport| member.node.0 == name && member.quarantine.is_some();
    world
        .nodes
        .until("it is in quarantine", |report| {
            report.members.iter().any(caught)
        })
        .await?;
    let (begun, lost) = (Instant::now(), now_ms());
    let (mut slots, mut steps) = (Vec::new(), Vec::new());
    while begun.elapsed() < seconds(120) {
        let Some((share, owned)) = standing(world).await? else {
            break;
        };
        if steps.last().is_none_or(|(last, _)| *last != share) {
            steps.push((share, begun.elapsed().as_secs()));
        }
        slots.push((share, owned));
        sleep(millis(500)).await;
    }
    world.over();
    let shares: Vec<u32> = steps.iter().map(|(share, _)| *share).collect();
    world.expect(shares == [0, 25, 50, 75, 100], || {
        format!("its shares were {shares:?}")
    });
    let held = steps.get(1).map_or(0, |(_, at)| *at);
    world.expect((26..=34).contains(&held), || {
        format!("it was held for {held} s")
    });
    for (share, most) in [(0, 0), (25, 130), (50, 220), (75, 290)] {
        // In the middle of a step what the one before gave or left has arrived.
        let owned = slots
            .iter()
            .filter(|(at, _)| *at == share)
            .map(|(_, owned)| *owned);
        let owned: Vec<u16> = owned.collect();
        let settled = owned.get(owned.len() / 2).copied();
        world.expect(settled.is_some_and(|owned| owned <= most), || {
            format!("it owned {settled:?} slots at {share} %")
        });
    }
    world.nodes.balanced(3).await?;
    world.note(format!(
        "share in % and when, in s after the third loss: {steps:?}; balanced after {} ms",
        since(lost).as_millis()
    ));
    Ok(())
}

/// The share of the hurt node and the slots that it owns, while it is in quarantine.
async fn standing(world: &World) -> Result<Option<(u32, u16)>> {
    let report = world.nodes.report().await?;
    let name = world.nodes.nodes[VICTIM].name();
    let mut members = report.members.iter();
    let member = members.find(|member| member.node.0 == name && member.live);
    Ok(member.and_then(|member| Some((member.quarantine?.share_percent, member.slots_owned))))
}

pub(crate) async fn scale(world: &mut World) -> Result<()> {
    world.fault(2).await?;
    let began = now_ms();
    for number in [2, 1] {
        world.nodes.stop(number).await?;
    }
    world.nodes.balanced(1).await?;
    sleep(seconds(2)).await;
    world.nodes.run(1)?;
    world.nodes.run(2)?;
    for _ in 0..2 {
        world.add_node(&Plan::new(), false).await?;
    }
    world.nodes.balanced(5).await?;
    let closes = {
        let url = world.nodes.nodes[0].url();
        world.ledger(|ledger| {
            let there = ledger.writers.values().filter(|writer| writer.node == url);
            there.map(|writer| writer.closes.len()).sum::<usize>()
        })
    };
    world.expect(closes == 0, || {
        format!("{closes} sockets of the node that stayed were closed")
    });
    world.note(format!(
        "3, 1 and 5 nodes within {} ms",
        since(began).as_millis()
    ));
    Ok(())
}
