//! Slots that move by load: what the operator plans, from what real nodes tell and carried out by them.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use collab_core::control::{ClusterReport, NodeLoad, PinRequest, PlacementRequest, TermGranted};
use collab_core::ids::{DocumentId, Slot};
use collab_core::ring::slot_of;
use collab_crds::collabcluster::{HotDocumentsSpec, PlacementSpec, RebalanceSpec};
use collab_operator::model::{Action, Observed};
use collab_operator::plan::pins::Hot;
use collab_operator::plan::rebalance::{Balance, Rounds};
use collab_operator::plan::{handoff, pins, rebalance};
use collab_tests::checker;
use collab_tests::clients::Reading;
use collab_tests::clients::typist::{Ledger, Typing};
use collab_tests::nodes::Nodes;
use collab_tests::postgres::Postgres;
use k8s_openapi::jiff::Timestamp;
use reqwest::Method;
use tokio::time::sleep;

/// The load comes to rest within this time: averages over half a minute, and some rounds.
const PATIENCE: Duration = Duration::from_secs(150);
/// Load of the busiest owner in percent of the mean that is even enough.
const EVEN_PERCENT: u64 = 130;

#[tokio::test(flavor = "multi_thread")]
async fn a_busy_node_is_relieved_and_a_hot_document_set_apart_under_open_sockets() -> Result<()> {
    let postgres = Postgres::shared().await;
    let nodes = Nodes::start(3, &postgres.database().await, "none").await?;
    let names = documents_of_one_owner(&nodes.report().await?, 9)?;
    let urls = nodes.urls();
    let hot = Typing {
        writers: 4,
        ..Typing::new(urls.clone(), names[..1].to_vec(), 6)
    };
    let others = Typing {
        rate: 3.0,
        ..Typing::new(urls.clone(), names[1..].to_vec(), 7)
    };
    let typists = [hot.start()?, others.start()?];

    let begun = Instant::now();
    let mut planner = Planner::new(&nodes).await?;
    let mut worst = 0;
    let balance = loop {
        sleep(Duration::from_secs(1)).await;
        let balance = planner.pass(&nodes).await?;
        if let Some(balance) = balance {
            worst = balance.max_to_mean_percent.max(worst);
            let is_even = balance.max_to_mean_percent <= EVEN_PERCENT;
            if is_even && planner.pinned == names[..1] && 0 < planner.moved {
                break balance;
            }
        }
        ensure!(
            begun.elapsed() < PATIENCE,
            "still {balance:?} after {} moves, pinned {:?}\n{}",
            planner.moved,
            planner.pinned,
            nodes.logs()
        );
    };
    println!(
        "busiest owner at {worst} % of the mean load, after {:?} and {} moves at {} % of {} points, hottest slot {:?}",
        begun.elapsed(),
        planner.moved,
        balance.max_to_mean_percent,
        balance.mean,
        balance.hottest,
    );
    for (typists, names) in typists.into_iter().zip([&names[..1], &names[1..]]) {
        let ledger: Ledger = typists.stop().await?;
        let closes: usize = ledger
            .writers
            .values()
            .map(|writer| writer.closes.len())
            .sum();
        ensure!(closes == 0, "sockets were closed {closes} times");
        let reading = Reading {
            nodes: &urls,
            documents: names,
            token: None,
        };
        checker::everything_acknowledged_is_there(&reading, &ledger).await?;
    }
    Ok(())
}

/// Names of documents whose slots are apart and all with the same owner.
fn documents_of_one_owner(report: &ClusterReport, count: usize) -> Result<Vec<String>> {
    let mut slots = BTreeSet::<Slot>::new();
    let mut names = Vec::new();
    for number in 0..100_000 {
        let name = format!("notes/{number}");
        let slot = slot_of(&DocumentId::new(&name)?, report.slots);
        let owner = report.owners[usize::from(slot.0)].context("owned")?;
        if owner == 0 && slots.insert(slot) {
            names.push(name);
        }
        if names.len() == count {
            return Ok(names);
        }
    }
    anyhow::bail!("found only {names:?}")
}

/// The part of the operator that places, without Kubernetes.
struct Planner {
    term: TermGranted,
    spec: PlacementSpec,
    rounds: Rounds,
    hot: Hot,
    asked: String,
    moved: usize,
    pinned: Vec<String>,
}

impl Planner {
    async fn new(nodes: &Nodes) -> Result<Self> {
        let holder = serde_json::json!({ "holder": "a test" });
        let term = nodes.control(Method::POST, "term", &holder).await?;
        Ok(Self {
            term: serde_json::from_value(term)?,
            spec: PlacementSpec {
                rebalance: RebalanceSpec {
                    interval_seconds: 10,
                    ..RebalanceSpec::default()
                },
                hot_documents: HotDocumentsSpec::default(),
                ..PlacementSpec::default()
            },
            rounds: Rounds::default(),
            hot: BTreeMap::new(),
            asked: String::new(),
            moved: 0,
            pinned: Vec::new(),
        })
    }

    /// Observes, plans and applies.
    async fn pass(&mut self, nodes: &Nodes) -> Result<Option<Balance>> {
        let loads = nodes.control_all("load").await?.into_iter();
        let loads = loads.map(serde_json::from_value);
        let observed = Observed {
            report: Some(nodes.report().await?),
            loads: loads.collect::<Result<Vec<NodeLoad>, _>>()?,
            ..Observed::default()
        };
        let report = observed.report.as_ref().context("reported")?;
        self.pinned = report
            .pins
            .iter()
            .map(|pin| pin.document.to_string())
            .collect();
        let now = Timestamp::now();
        let term = self.term.term;
        let mut placement =
            handoff::placement(report, &BTreeSet::new(), &self.spec).context("there are nodes")?;
        let slots = rebalance::slot_loads(&observed).ok();
        let spec = &self.spec.hot_documents;
        let pins = pins::step(&mut self.hot, &observed, spec, slots.as_ref(), false, now);
        let step = rebalance::step(
            &mut self.rounds,
            &mut placement,
            &observed,
            &self.spec,
            false,
            now,
        );
        for action in pins.actions {
            let Action::Pin { document, pin } = action else {
                continue;
            };
            let request = PinRequest {
                term,
                document,
                pin,
            };
            let request = serde_json::to_value(request)?;
            nodes.control(Method::POST, "pin", &request).await?;
        }
        if placement.hash != self.asked {
            self.asked.clone_from(&placement.hash);
            let request = PlacementRequest {
                term,
                nodes: placement.nodes,
                slots: placement.slots,
                pins: placement.pins,
            };
            let request = serde_json::to_value(request)?;
            nodes.control(Method::PUT, "placement", &request).await?;
        }
        for moved in &step.moves {
            println!("move {moved}");
        }
        self.moved += step.moves.len();
        Ok(step.balance.filter(|balance| 0 < balance.mean))
    }
}
