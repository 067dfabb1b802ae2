//! Documents that get a slot of their own.
//!
//! A document that makes a good part of a node's load is moved with all its neighbours, or not at all. With a
//! slot of its own it can be moved alone, and the neighbours away from it. A person names documents in the
//! spec; beyond those, a document is pinned once it is hot and for some time after.

use std::collections::{BTreeMap, BTreeSet};

use collab_core::control::ClusterReport;
use collab_core::ids::DocumentId;
use collab_core::limits::PINS_MAX;
use collab_crds::collabcluster::{HotDocumentsSpec, PlacementMode};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::model::{Action, Gravity, News, Observed};
use crate::plan::rebalance::SlotLoads;

/// Pins and unpins of one pass: each makes the neighbours of the document load again.
const CHANGES_PER_PASS: usize = 4;
/// A document with fewer points is not worth a slot of its own, however quiet the rest is.
const HOT_POINTS_MIN: u64 = 100;
/// A pinned document stays hot down to half of what made it so, and keeps its slot for this long after.
const COOLS_FOR: SignedDuration = SignedDuration::from_mins(30);

/// When documents were last hot. Losing it makes pins last a while longer.
pub type Hot = BTreeMap<DocumentId, Timestamp>;

/// What a pass does about hot documents.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// Pins and unpins.
    pub actions: Vec<Action>,
    /// What there is to tell.
    pub news: Vec<News>,
    /// What is waited for, or wrong in the spec.
    pub waits: Vec<String>,
}

/// Pins what the spec names and what is hot, and takes pins back that have neither reason. `loads` is `None` while the
/// load is unknown; `held` keeps all as it is.
pub fn step(
    hot: &mut Hot,
    observed: &Observed,
    spec: &HotDocumentsSpec,
    loads: Option<&SlotLoads>,
    held: bool,
    now: Timestamp,
) -> Step {
    let mut step = Step::default();
    let Some(report) = &observed.report else {
        return step;
    };
    let mut named = BTreeSet::new();
    for id in &spec.pinned {
        match DocumentId::new(id) {
            Ok(document) => drop(named.insert(document)),
            Err(error) => step.waits.push(format!(
                "for a valid id in spec.placement.hotDocuments.pinned in place of {id:?}: {error}"
            )),
        }
    }
    if let Some(loads) = loads {
        feel(hot, observed, report, spec, loads, now);
    }
    let pinned: BTreeSet<_> = report.pins.iter().map(|pin| &pin.document).collect();
    hot.retain(|document, at| pinned.contains(document) || is_warm(*at, now));
    if held {
        return step;
    }
    let hot_now = hot.iter().filter(|(_, at)| **at == now);
    let hot_now = hot_now.map(|(document, _)| document);
    let unnamed = hot_now.filter(|document| !named.contains(*document));
    let wanted: Vec<_> = named.iter().chain(unnamed).collect();
    let room = CHANGES_PER_PASS.min(PINS_MAX.saturating_sub(pinned.len()));
    for document in wanted
        .into_iter()
        .filter(|document| !pinned.contains(document))
        .take(room)
    {
        if !named.contains(document) {
            step.news.push(News {
                gravity: Gravity::Normal,
                reason: "HotDocument",
                action: "Pin",
                node: None,
                note: format!("document {document} is hot and gets a slot of its own"),
            });
        }
        step.actions.push(change(document, true));
    }
    let stays = |document: &DocumentId| {
        let lately = || hot.get(document).is_some_and(|at| is_warm(*at, now));
        let is_judged = spec.mode == PlacementMode::Auto;
        named.contains(document) || is_judged && (loads.is_none() || lately())
    };
    let cold = pinned.into_iter().filter(|document| !stays(document));
    let left = CHANGES_PER_PASS - step.actions.len();
    step.actions
        .extend(cold.take(left).map(|document| change(document, false)));
    step
}

/// Notes which documents are hot now. One that is pinned and was never seen before counts as hot.
fn feel(
    hot: &mut Hot,
    observed: &Observed,
    report: &ClusterReport,
    spec: &HotDocumentsSpec,
    loads: &SlotLoads,
    now: Timestamp,
) {
    if spec.mode != PlacementMode::Auto {
        return;
    }
    for pin in &report.pins {
        hot.entry(pin.document.clone()).or_insert(now);
    }
    let total: u64 = loads.values().sum();
    let nodes = observed.loads.len() as u64;
    let percent = u64::try_from(spec.load_percent).unwrap_or(100);
    let bound = (total * percent)
        .checked_div(nodes * 100)
        .unwrap_or(0)
        .max(HOT_POINTS_MIN);
    for pin in &report.pins {
        // On one node there is nothing to compare with.
        if nodes < 2 || bound < 2 * loads.get(&pin.slot).copied().unwrap_or(0) {
            hot.insert(pin.document.clone(), now);
        }
    }
    for load in observed.loads.iter().flat_map(|load| &load.documents) {
        if 1 < nodes && bound < load.activity.points() {
            hot.insert(load.document.clone(), now);
        }
    }
}

fn is_warm(hot_at: Timestamp, now: Timestamp) -> bool {
    now.duration_since(hot_at) < COOLS_FOR
}

fn change(document: &DocumentId, pin: bool) -> Action {
    Action::Pin {
        document: document.clone(),
        pin,
    }
}
