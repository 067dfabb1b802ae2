//! Documents move under open sockets: a node joins, restarts, drains, and the clients of other nodes see nothing of it
//! but a pause between two receipts.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use collab_core::ids::DocumentId;
use collab_core::ring::slot_of;
use collab_tests::checker;
use collab_tests::clients::typist::{Ledger, Typing};
use collab_tests::clients::{Reading, now_ms};
use collab_tests::nodes::Nodes;
use collab_tests::postgres::Postgres;
use tokio::time::sleep;

/// Half of the moved documents have their next receipt within this time, also where tests run side by side. What the
/// pauses are on a machine of their own is printed.
const PAUSE: Duration = Duration::from_secs(1);
/// And all of them within this.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// What is under way when a step begins and when it ends is part of it.
const MARGIN: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread")]
async fn clients_elsewhere_do_not_notice_a_join_a_rolling_restart_or_a_drain() -> Result<()> {
    let postgres = Postgres::shared().await;
    let mut nodes = Nodes::start(2, &postgres.database().await, "none").await?;
    let names: Vec<String> = (0..12).map(|number| format!("moving/{number}")).collect();
    // The clients stay with the first two nodes; the others come and go.
    let urls = nodes.urls();
    let typists = Typing {
        writers: 3,
        rate: 10.0,
        ..Typing::new(urls.clone(), names.clone(), 4)
    }
    .start()?;
    typists
        .until(Duration::from_mins(1), |ledger| 1_000 <= ledger.acked())
        .await?;

    let mut steps = Vec::new();
    let mut step = Step::begin("two nodes join", &nodes, &names).await?;
    nodes.add()?;
    nodes.add()?;
    nodes.balanced(4).await?;
    steps.push(step.end(&nodes, &names).await?);
    for number in [2, 3, 2, 3] {
        step = Step::begin("a node stops", &nodes, &names).await?;
        let took = nodes.stop(number).await?;
        nodes.balanced(3).await?;
        println!("SIGTERM to the end of the process: {took:?}");
        steps.push(step.end(&nodes, &names).await?);
        step = Step::begin("it comes back", &nodes, &names).await?;
        nodes.run(number)?;
        nodes.balanced(4).await?;
        steps.push(step.end(&nodes, &names).await?);
    }
    step = Step::begin("a node is drained", &nodes, &names).await?;
    nodes.drain(2, true).await?;
    nodes
        .until("the node is drained", |report| {
            let drained = |member: &&collab_core::control::MemberReport| {
                member.node.0 == "n2" && member.slots_owned == 0
            };
            report.members.iter().any(|member| drained(&member))
        })
        .await?;
    steps.push(step.end(&nodes, &names).await?);
    let mut read_ahead = 0.0;
    for number in 0..4 {
        read_ahead += nodes
            .metric(number, "collab_documents_loaded_total{from=\"preload\"}")
            .await?;
    }
    let ledger = typists.stop().await?;

    let (mut pauses, mut waits, mut stayed) = (Vec::new(), Vec::new(), Vec::new());
    for step in &steps {
        pauses.extend(step.report(&ledger)?);
        waits.extend(step.waits(&ledger));
        stayed.extend(step.pauses_of_others(&ledger, &names));
    }
    let at = |percent: usize| percentile(&mut pauses.clone(), percent);
    println!(
        "{} moves of open documents under {} acked edits: pause between two receipts p50 {:?}, p99 {:?}, max {:?}",
        pauses.len(),
        ledger.acked(),
        at(50),
        at(99),
        at(100),
    );
    for (what, times) in [
        (
            "longest wait of an edit for its receipt in a document that moved",
            &mut waits,
        ),
        (
            "pause between two receipts of a document that stayed meanwhile",
            &mut stayed,
        ),
    ] {
        let [p50, p99, max] = [50, 99, 100].map(|percent| percentile(times, percent));
        println!("{what}: p50 {p50:?}, p99 {p99:?}, max {max:?}");
    }
    ensure!(24 <= pauses.len(), "only {} documents moved", pauses.len());
    // Nodes that ended meanwhile took their count with them.
    ensure!(
        12.0 <= read_ahead,
        "only {read_ahead} documents were read ahead"
    );
    ensure!(at(50) < PAUSE, "half of the pauses are over {:?}", at(50));
    ensure!(at(100) < PAUSE_MAX, "a pause of {:?}", at(100));
    let reading = Reading {
        nodes: &urls,
        documents: &names,
        token: None,
    };
    checker::everything_acknowledged_is_there(&reading, &ledger).await
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    let index = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times.get(index).copied().unwrap_or_default()
}

/// A time in which documents move.
struct Step {
    what: &'static str,
    from_ms: f64,
    until_ms: f64,
    owners: BTreeMap<String, String>,
    moved: Vec<String>,
}

impl Step {
    async fn begin(what: &'static str, nodes: &Nodes, names: &[String]) -> Result<Self> {
        sleep(MARGIN).await;
        Ok(Self {
            what,
            from_ms: now_ms(),
            until_ms: f64::INFINITY,
            owners: owners(nodes, names).await?,
            moved: Vec::new(),
        })
    }

    async fn end(mut self, nodes: &Nodes, names: &[String]) -> Result<Self> {
        sleep(MARGIN).await;
        self.until_ms = now_ms();
        let owners = owners(nodes, names).await?;
        let moved = |name: &&String| owners[*name] != self.owners[*name];
        self.moved = names.iter().filter(moved).cloned().collect();
        Ok(self)
    }

    /// How long edits of the documents that moved waited: the pauses without those that writers made by themselves.
    fn waits(&self, ledger: &Ledger) -> Vec<Duration> {
        let moved = self.moved.iter();
        moved
            .map(|name| ledger.longest_wait(name, self.from_ms, self.until_ms))
            .collect()
    }

    /// The pauses of the documents that stayed where they were, for comparison.
    fn pauses_of_others(&self, ledger: &Ledger, names: &[String]) -> Vec<Duration> {
        let stayed = names.iter().filter(|name| !self.moved.contains(name));
        stayed
            .map(|name| ledger.pause(name, self.from_ms, self.until_ms))
            .collect()
    }

    /// The pauses of the documents that moved. No client may have seen more than that.
    fn report(&self, ledger: &Ledger) -> Result<Vec<Duration>> {
        let mut pauses: Vec<Duration> = self
            .moved
            .iter()
            .map(|name| ledger.pause(name, self.from_ms, self.until_ms))
            .collect();
        pauses.sort_unstable();
        let statuses = ledger.statuses(self.from_ms, self.until_ms);
        println!(
            "{}: {} documents moved, longest pause {:?}, {} status events",
            self.what,
            pauses.len(),
            pauses.last(),
            statuses.len(),
        );
        ensure!(statuses.is_empty(), "{}: {statuses:?}", self.what);
        Ok(pauses)
    }
}

/// The name of each document's owner.
async fn owners(nodes: &Nodes, names: &[String]) -> Result<BTreeMap<String, String>> {
    let report = nodes.report().await?;
    let owner = |name: &String| {
        let slot = slot_of(&DocumentId::new(name)?, report.slots);
        let owner = report.owners[usize::from(slot.0)];
        let member = owner.map(|owner| report.members[usize::from(owner)].node.0.clone());
        Ok((name.clone(), member.unwrap_or_default()))
    };
    names.iter().map(owner).collect()
}
