//! What to do about a cluster: a pure function of the spec, of what was observed, of what is
//! remembered, and of the time.
//!
//! The plan starts from the beginning each time. It may be made from old or partial observations:
//! then it does less, and says what it waits for.

pub mod grey;
pub mod handoff;
pub mod news;
pub mod pins;
pub mod rebalance;
pub mod rollout;
pub mod scaling;

use std::collections::{BTreeMap, BTreeSet};

use collab_core::ids::NodeId;
use collab_crds::CollabCluster;
use collab_crds::names::Names;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt as _;

use crate::build;
use crate::config::Images;
use crate::model::{Action, Gravity, Memory, News, Observed, Placement, Plan, Seen};
use crate::plan::handoff::{Standing, active_nodes, pod_standing};
use crate::plan::scaling::{Hold, Load, Verdict, Wish};

/// A placement that is accepted and not reached is asked for again after this time: a failover of an
/// asynchronous database may have lost it.
const ASK_AGAIN_AFTER: SignedDuration = SignedDuration::from_secs(30);
/// A load sample older than this says nothing.
const SAMPLE_FRESH_MS: u64 = 5_000;

/// Plans one pass over a cluster.
pub fn plan(
    cluster: &CollabCluster,
    observed: &Observed,
    memory: &Memory,
    images: &Images,
    now: Timestamp,
) -> Plan {
    let mut memory = memory.clone();
    let news = tell(&mut memory, observed, now);
    let had = desired_before(cluster, &memory);
    if cluster.spec.suspended {
        return Plan {
            actions: Vec::new(),
            waits: Vec::new(),
            news,
            scaling: Verdict {
                desired: had,
                wished: had,
                limited: None,
                load_known: observed.report.is_some(),
            },
            placement: observed.report.as_ref().and_then(|report| {
                handoff::placement(report, &BTreeSet::new(), &cluster.spec.placement)
            }),
            balance: None,
            moves: Vec::new(),
            proposals: Vec::new(),
            rolling_out: false,
            reapply: false,
            memory,
        };
    }
    let scaling = scale(cluster, observed, &mut memory, had, now);
    let name = cluster.name_any();
    let rollout = rollout::rollout(Names(&name), scaling.desired, observed, now);
    let spec = &cluster.spec.placement;
    let grey = observed.report.as_ref().map(grey::grey).unwrap_or_default();
    let mut absent = rollout.leaving.clone();
    absent.extend(grey.nodes.keys().cloned());
    let mut placement = observed
        .report
        .as_ref()
        .and_then(|report| handoff::placement(report, &absent, spec));
    // While pods come and go, the load says little of what it will be; and a node of an older version knows no pins.
    let held = rollout.rolling_out || !rollout.leaving.is_empty();
    let loads = rebalance::slot_loads(observed).ok();
    let hot = pins::step(
        &mut memory.hot,
        observed,
        &spec.hot_documents,
        loads.as_ref(),
        held,
        now,
    );
    let balance = placement
        .as_mut()
        .map(|placement| rebalance::step(&mut memory.rounds, placement, observed, spec, held, now));
    let balance = balance.unwrap_or_default();

    let mut actions = build::all(cluster, images, observed, rollout.replicas);
    if observed.report.is_some() && memory.term.is_none() {
        actions.push(Action::TakeTerm);
    }
    actions.extend(zones_to_tell(observed).map(Action::TellZones));
    actions.extend(rollout.actions);
    actions.extend(hot.actions);
    if let Some(placement) = &placement
        && !is_asked_for(placement, &memory, now)
    {
        actions.push(Action::Place(placement.clone()));
    }
    // Not before the placement: a node that was fenced comes back as another, to be given nothing.
    actions.extend(grey.actions());
    let quarantine_waits = observed.report.as_ref().map(handoff::quarantine_waits);
    let quarantine_waits = quarantine_waits.unwrap_or_default();
    let mut news = news;
    news.extend(hot.news);
    news.extend(told_of(&balance));
    news.extend(grey.news());
    let mut plan = Plan {
        actions,
        waits: [
            rollout.waits,
            quarantine_waits,
            grey.waits,
            hot.waits,
            balance.waits,
        ]
        .concat(),
        news,
        scaling,
        placement,
        balance: balance.balance,
        moves: balance.moves,
        proposals: balance.proposals,
        rolling_out: rollout.rolling_out,
        reapply: something_is_gone(cluster, observed),
        memory,
    };
    plan.note_scaling(had, now);
    plan
}

impl Plan {
    /// Remembers and tells a change of the number of nodes.
    fn note_scaling(&mut self, had: i32, now: Timestamp) {
        let desired = self.scaling.desired;
        if self.memory.desired.is_some() && desired != had {
            self.memory.last_scale = Some(now);
            let (reason, verb) = if had < desired {
                ("ScaledOut", "grows")
            } else {
                ("ScaledIn", "shrinks")
            };
            self.news.push(News {
                gravity: Gravity::Normal,
                reason,
                action: "Scale",
                node: None,
                note: format!("the cluster {verb} from {had} to {desired} nodes"),
            });
        }
        self.memory.desired = Some(desired);
    }
}

/// The zones of live nodes that the cluster does not know yet; `None` when there is nothing to tell.
fn zones_to_tell(observed: &Observed) -> Option<BTreeMap<NodeId, String>> {
    let unknown = observed.pods.iter().filter_map(|pod| {
        let zone = pod.zone.as_ref()?;
        let mut members = observed.members().iter();
        let is_news = members.any(|member| {
            member.live
                && member.node.0 == pod.name
                && member.pod_uid == pod.uid
                && member.zone != *zone
        });
        is_news.then(|| (NodeId(pod.name.clone()), zone.clone()))
    });
    let unknown: BTreeMap<_, _> = unknown.collect();
    (!unknown.is_empty()).then_some(unknown)
}

fn told_of(step: &rebalance::Step) -> Option<News> {
    let before = step.balance?.max_to_mean_percent;
    let moves = step.moves.len();
    let them = if moves == 1 {
        "slot moves"
    } else {
        "slots move"
    };
    (0 < moves).then(|| News {
        gravity: Gravity::Normal,
        reason: "SlotsRebalanced",
        action: "Rebalance",
        node: None,
        note: format!("{moves} {them} because the busiest owner is at {before} % of the mean load"),
    })
}

fn is_asked_for(placement: &Placement, memory: &Memory, now: Timestamp) -> bool {
    memory.placed.as_ref().is_some_and(|(hash, at)| {
        let is_reached = placement.moving == 0;
        *hash == placement.hash && (is_reached || now.duration_since(*at) < ASK_AGAIN_AFTER)
    })
}

/// Number of nodes wanted before this pass. What an earlier operator wanted stands in the status.
fn desired_before(cluster: &CollabCluster, memory: &Memory) -> i32 {
    let from_status = cluster
        .status
        .as_ref()
        .filter(|status| status.observed_generation.is_some())
        .map(|status| status.nodes.desired);
    memory
        .desired
        .or(from_status)
        .unwrap_or(cluster.spec.nodes.replicas)
}

fn scale(
    cluster: &CollabCluster,
    observed: &Observed,
    memory: &mut Memory,
    had: i32,
    now: Timestamp,
) -> Verdict {
    let policy = &cluster.spec.autoscaling;
    if !policy.enabled {
        memory.wishes.clear();
        return scaling::fixed(&cluster.spec);
    }
    let Some(load) = load(observed, had) else {
        return Verdict {
            desired: had.clamp(policy.min_nodes, policy.max_nodes),
            wished: had,
            limited: None,
            load_known: false,
        };
    };
    let wish = Wish {
        at: now,
        nodes: scaling::wish(&load, had, policy),
        had,
    };
    scaling::remember(&mut memory.wishes, wish, policy);
    let cooldown = SignedDuration::from_secs(i64::from(policy.cooldown_after_failover_seconds));
    let hold = if memory
        .last_failover
        .is_some_and(|lost| now.duration_since(lost) < cooldown)
    {
        Some(Hold::Cooldown)
    } else if !settled(cluster, observed, had) {
        Some(Hold::Unsettled)
    } else {
        None
    };
    let mut verdict = scaling::decide(&memory.wishes, had, policy, now, hold.as_ref());
    verdict.load_known = load.unknown == 0;
    verdict
}

/// The load of all live nodes; `None` without a report. A node that should serve and does not, or
/// whose sample is old, is unknown.
fn load(observed: &Observed, had: i32) -> Option<Load> {
    let report = observed.report.as_ref()?;
    let fresh = || {
        report
            .members
            .iter()
            .filter(|member| member.live && member.load_age_ms <= SAMPLE_FRESH_MS)
            .filter_map(|member| Some((member, member.load.as_ref()?)))
    };
    let connections = fresh().map(|(_, load)| u64::from(load.connections)).sum();
    let active = active_nodes(report);
    let known = active
        .iter()
        .filter(|node| fresh().any(|(member, _)| member.node == **node))
        .count();
    let expected = usize::try_from(had).unwrap_or(0).max(active.len());
    Some(Load {
        connections,
        unknown: u32::try_from(expected - known).unwrap_or(u32::MAX),
    })
}

/// Whether every wanted node serves and every slot has an owner: only then may one be removed.
fn settled(cluster: &CollabCluster, observed: &Observed, had: i32) -> bool {
    let serving = observed
        .pods
        .iter()
        .filter(|pod| pod.ready && pod_standing(observed, pod) == Standing::Active)
        .count();
    let pods = observed.pods.len();
    serving == pods
        && i32::try_from(pods).is_ok_and(|pods| pods == had)
        && observed.unowned(cluster.spec.placement.slots) == 0
}

/// Tells what changed since the last look and remembers it.
fn tell(memory: &mut Memory, observed: &Observed, now: Timestamp) -> Vec<News> {
    let Some(report) = &observed.report else {
        let silent = memory.seen.as_mut().filter(|seen| seen.store);
        return silent.map_or_else(Vec::new, |seen| {
            seen.store = false;
            vec![News {
                gravity: Gravity::Warning,
                reason: "NoNodeAnswers",
                action: "Observe",
                node: None,
                note: format!("no node reports the cluster: {}", observed.silence),
            }]
        });
    };
    let seen: Seen = news::see(report);
    let mut told = news::between(memory.seen.as_ref(), &seen);
    if memory.seen.as_ref().is_none_or(|before| !before.store) {
        told.push(News {
            gravity: Gravity::Normal,
            reason: "PostgresReady",
            action: "Observe",
            node: None,
            note: format!("Postgres {} answers", report.store.version),
        });
    }
    if news::failed_over(memory.seen.as_ref(), &seen) {
        memory.last_failover = Some(now);
    }
    memory.seen = Some(seen);
    told
}

fn something_is_gone(cluster: &CollabCluster, observed: &Observed) -> bool {
    observed.node_set.is_none()
        || (cluster.spec.postgres.managed.is_some() && observed.postgres_set.is_none())
        || (cluster.spec.redis.managed.is_some() && observed.redis_set.is_none())
        || observed
            .credentials
            .iter()
            .any(|credential| !credential.stored)
}

#[cfg(test)]
mod tests;
