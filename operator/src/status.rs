//! The status: what was seen, as numbers and conditions. It decides nothing and is never read back,
//! except for the number of nodes that an earlier operator wanted.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use collab_core::control::MemberState;
use collab_crds::collabcluster::{
    LoadStatus, NodesStatus, PodMonitorMode, RingStatus, StoreStatus, ZoneStatus,
};
use collab_crds::conditions::{self, reason};
use collab_crds::names::{Names, POSTGRES_PORT, REDIS_PORT, STATUS_MANAGER};
use collab_crds::{CollabCluster, CollabClusterStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use crate::config::Images;
use crate::controller::Context;
use crate::model::{Applied, Observed, Plan, PodMonitorView, SetView};
use crate::plan::handoff;

/// Between two writes of a status, unless readiness changed.
const WRITE_EVERY: Duration = Duration::from_secs(5);
/// Kubernetes takes messages of up to 32 KiB; people read one line.
const MESSAGE_CHARACTERS_MAX: usize = 400;

/// Writes the status if it changed, at most every five seconds unless readiness did. Answers whether
/// a change still waits to be written.
///
/// # Errors
/// When the API server refuses.
pub async fn publish(
    ctx: &Context,
    cluster: &CollabCluster,
    status: CollabClusterStatus,
) -> Result<bool, kube::Error> {
    let key = ctx.key(cluster);
    let mut published = ctx.published.lock().await;
    let last = published.get(&key);
    let known = last.map(|(status, _)| status).or(cluster.status.as_ref());
    if known == Some(&status) {
        return Ok(false);
    }
    let urgent = known.and_then(ready) != ready(&status);
    if !urgent && last.is_some_and(|(_, at)| at.elapsed() < WRITE_EVERY) {
        return Ok(true);
    }
    let namespace = cluster.namespace().unwrap_or_default();
    let patch = json!({
        "apiVersion": "collabcluster.io/v1alpha1",
        "kind": "CollabCluster",
        "metadata": { "name": cluster.name_any() },
        "status": status,
    });
    Api::<CollabCluster>::namespaced(ctx.client.clone(), &namespace)
        .patch_status(
            &cluster.name_any(),
            &PatchParams::apply(STATUS_MANAGER).force(),
            &Patch::Apply(&patch),
        )
        .await?;
    published.insert(key, (status, Instant::now()));
    Ok(false)
}

fn ready(status: &CollabClusterStatus) -> Option<(&str, &str)> {
    let condition = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == conditions::READY)?;
    Some((&condition.status, &condition.reason))
}

/// The status after a pass. Pure.
pub fn status(
    cluster: &CollabCluster,
    images: &Images,
    observed: &Observed,
    plan: &Plan,
    applied: &Applied,
    now: Timestamp,
) -> CollabClusterStatus {
    let name = cluster.name_any();
    let previous = cluster.status.clone().unwrap_or_default();
    let view = View {
        cluster,
        observed,
        plan,
        applied,
        nodes: nodes(Names(&name), observed, plan),
        unowned: observed.unowned(cluster.spec.placement.slots),
    };
    CollabClusterStatus {
        observed_generation: cluster.metadata.generation,
        ring: ring(&view),
        load: load(observed, plan),
        postgres: postgres(&view, Names(&name)),
        redis: redis(&view, Names(&name)),
        image: Some(
            cluster
                .spec
                .image
                .clone()
                .unwrap_or_else(|| images.node.clone()),
        ),
        last_scale_time: plan
            .memory
            .last_scale
            .map(Time)
            .or(previous.last_scale_time),
        conditions: view.conditions(&previous.conditions, now),
        nodes: view.nodes,
    }
}

struct View<'a> {
    cluster: &'a CollabCluster,
    observed: &'a Observed,
    plan: &'a Plan,
    applied: &'a Applied,
    nodes: NodesStatus,
    unowned: i32,
}

fn count(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn nodes(names: Names<'_>, observed: &Observed, plan: &Plan) -> NodesStatus {
    let draining = observed
        .members()
        .iter()
        .filter(|member| member.live && member.state == MemberState::Draining)
        .count();
    let quarantined = observed.report.as_ref().map(handoff::quarantined);
    let quarantined = quarantined.unwrap_or_default();
    NodesStatus {
        desired: plan.scaling.desired,
        replicas: count(observed.pods.len()),
        ready: count(observed.pods.iter().filter(|pod| pod.ready).count()),
        draining: count(draining),
        quarantined: count(quarantined.len()),
        selector: names.node_selector_text(),
        zones: zones(observed),
    }
}

fn zones(observed: &Observed) -> Vec<ZoneStatus> {
    let mut zones = BTreeMap::<&str, ZoneStatus>::new();
    for member in observed.members().iter().filter(|member| member.live) {
        let zone = zones.entry(&member.zone).or_insert_with(|| ZoneStatus {
            name: member.zone.clone(),
            ..ZoneStatus::default()
        });
        zone.nodes += 1;
        zone.slots += i32::from(member.slots_owned);
    }
    zones.into_values().collect()
}

fn ring(view: &View<'_>) -> RingStatus {
    let report = view.observed.report.as_ref();
    let previous = view.cluster.status.clone().unwrap_or_default().ring;
    RingStatus {
        revision: report.map_or(previous.revision, |report| {
            i64::try_from(report.revision).unwrap_or(i64::MAX)
        }),
        slots: view.cluster.spec.placement.slots,
        unowned: view.unowned,
        pinned: report.map_or(0, |report| count(report.pins.len())),
        moving: view
            .plan
            .placement
            .as_ref()
            .map_or(0, |placement| placement.moving),
        term: view
            .applied
            .memory
            .term
            .map_or(previous.term, |term| term.0),
        hash: view
            .plan
            .placement
            .as_ref()
            .map_or(previous.hash, |placement| placement.hash.clone()),
    }
}

fn load(observed: &Observed, plan: &Plan) -> LoadStatus {
    let loads: Vec<_> = observed
        .members()
        .iter()
        .filter(|member| member.live)
        .filter_map(|member| member.load.as_ref())
        .collect();
    let connections: i64 = loads.iter().map(|load| i64::from(load.connections)).sum();
    let busiest = loads
        .iter()
        .map(|load| i64::from(load.connections))
        .max()
        .unwrap_or(0);
    let nodes = i64::try_from(loads.len()).unwrap_or(1);
    LoadStatus {
        connections,
        documents: loads.iter().map(|load| i64::from(load.documents)).sum(),
        max_to_mean_percent: if connections == 0 {
            100
        } else {
            busiest * nodes * 100 / connections
        },
        owner_max_to_mean_percent: plan
            .balance
            .and_then(|balance| i64::try_from(balance.max_to_mean_percent).ok()),
        hottest_slot: plan
            .balance
            .and_then(|balance| Some(balance.hottest?.0.into())),
    }
}

fn postgres(view: &View<'_>, names: Names<'_>) -> StoreStatus {
    let version = view
        .observed
        .report
        .as_ref()
        .map_or_else(String::new, |report| report.store.version.clone());
    store(
        view,
        view.cluster.spec.postgres.managed.is_some(),
        view.observed.postgres_set.as_ref(),
        &names.postgres(),
        POSTGRES_PORT,
        version,
    )
}

fn redis(view: &View<'_>, names: Names<'_>) -> StoreStatus {
    if view.cluster.spec.redis.disabled.is_some() {
        return StoreStatus {
            mode: "Disabled".to_owned(),
            ..StoreStatus::default()
        };
    }
    store(
        view,
        view.cluster.spec.redis.managed.is_some(),
        view.observed.redis_set.as_ref(),
        &names.redis(),
        REDIS_PORT,
        String::new(),
    )
}

fn store(
    view: &View<'_>,
    managed: bool,
    set: Option<&SetView>,
    service: &str,
    port: i32,
    version: String,
) -> StoreStatus {
    if !managed {
        return StoreStatus {
            mode: "External".to_owned(),
            version,
            ..StoreStatus::default()
        };
    }
    let namespace = view.cluster.namespace().unwrap_or_default();
    StoreStatus {
        mode: "Managed".to_owned(),
        endpoint: format!("{service}.{namespace}.svc:{port}"),
        version,
        ready: set.map_or(0, |set| set.ready),
    }
}

/// One answer: status, reason, message.
type Answer = (&'static str, &'static str, String);

fn yes(reason: &'static str, message: impl Into<String>) -> Answer {
    ("True", reason, message.into())
}

fn no(reason: &'static str, message: impl Into<String>) -> Answer {
    ("False", reason, message.into())
}

fn unknown(reason: &'static str, message: impl Into<String>) -> Answer {
    ("Unknown", reason, message.into())
}

impl View<'_> {
    fn conditions(&self, previous: &[Condition], now: Timestamp) -> Vec<Condition> {
        conditions::ALL
            .into_iter()
            .map(|type_| {
                let (status, reason, message) = self.answer(type_);
                let since = previous
                    .iter()
                    .find(|condition| condition.type_ == type_ && condition.status == status)
                    .map_or(Time(now), |condition| {
                        condition.last_transition_time.clone()
                    });
                Condition {
                    type_: type_.to_owned(),
                    status: status.to_owned(),
                    reason: reason.to_owned(),
                    message: message.chars().take(MESSAGE_CHARACTERS_MAX).collect(),
                    observed_generation: self.cluster.metadata.generation,
                    last_transition_time: since,
                }
            })
            .collect()
    }

    fn answer(&self, type_: &str) -> Answer {
        match type_ {
            conditions::READY => self.ready(),
            conditions::AVAILABLE => self.available(),
            conditions::PROGRESSING => self.progressing(),
            conditions::DEGRADED => self.degraded(),
            conditions::POSTGRES_READY => self.postgres_ready(),
            conditions::REDIS_READY => self.redis_ready(),
            conditions::PLACEMENT_CONVERGED => self.placement_converged(),
            conditions::ABLE_TO_SCALE => self.able_to_scale(),
            conditions::SCALING_LIMITED => self.scaling_limited(),
            conditions::UP_TO_DATE => self.up_to_date(),
            conditions::SUSPENDED => self.suspended(),
            _ => unknown(reason::UNKNOWN, "not looked at yet"),
        }
    }

    fn ready(&self) -> Answer {
        for part in [self.postgres_ready(), self.available(), self.redis_ready()] {
            if part.0 != "True" {
                return no(part.1, part.2);
            }
        }
        let NodesStatus { ready, desired, .. } = self.nodes;
        if ready < desired {
            return no(
                reason::STARTING,
                format!("{ready} of {desired} nodes are ready"),
            );
        }
        yes(
            reason::AS_EXPECTED,
            format!(
                "{ready} nodes serve {} connections",
                load(self.observed, self.plan).connections
            ),
        )
    }

    fn available(&self) -> Answer {
        if self.observed.report.is_none() {
            return if self.nodes.ready == 0 {
                no(reason::STARTING, self.silence())
            } else {
                unknown(reason::NO_NODE_ANSWERS, self.silence())
            };
        }
        if 0 < self.unowned {
            return no(
                reason::SLOTS_UNOWNED,
                format!("{} slots have no live owner", self.unowned),
            );
        }
        if self.nodes.ready == 0 {
            return no(reason::STARTING, "no node is ready to take clients");
        }
        yes(reason::AS_EXPECTED, "every slot has a live owner")
    }

    fn silence(&self) -> String {
        if self.observed.silence.is_empty() {
            "no node reports the cluster".to_owned()
        } else {
            format!("no node reports the cluster: {}", self.observed.silence)
        }
    }

    fn progressing(&self) -> Answer {
        let NodesStatus {
            ready,
            desired,
            replicas,
            ..
        } = self.nodes;
        let waits = self.plan.waits.join("; ");
        let or = |otherwise: String| {
            if waits.is_empty() {
                otherwise
            } else {
                format!("waits {waits}")
            }
        };
        if self.plan.rolling_out {
            yes(
                reason::ROLLING_OUT,
                or("nodes of an older template are replaced one at a time".to_owned()),
            )
        } else if desired < replicas {
            yes(
                reason::SCALING_IN,
                or(format!("{replicas} nodes become {desired}")),
            )
        } else if replicas < desired {
            yes(
                reason::SCALING_OUT,
                or(format!("{replicas} nodes become {desired}")),
            )
        } else if ready < desired {
            yes(
                reason::STARTING,
                format!("{ready} of {desired} nodes are ready"),
            )
        } else if self.moving() != 0 {
            yes(
                reason::SLOTS_MOVING,
                format!("{} slots are on their way", self.moving()),
            )
        } else {
            no(reason::AS_EXPECTED, "nothing is on its way")
        }
    }

    fn moving(&self) -> i32 {
        self.plan
            .placement
            .as_ref()
            .map_or(0, |placement| placement.moving)
    }

    fn degraded(&self) -> Answer {
        let observed = self.observed;
        if let Some(missing) = observed.missing.first() {
            return yes(reason::DEPENDENCY_MISSING, missing.clone());
        }
        if let Some(failure) = self.applied.failures.first() {
            return yes(reason::APPLY_FAILED, failure.clone());
        }
        if let Some(report) = &observed.report
            && i32::from(report.slots) != self.cluster.spec.placement.slots
        {
            return yes(
                reason::DEPENDENCY_MISSING,
                format!(
                    "the database was made for {} slots: set spec.placement.slots to that in a new CollabCluster",
                    report.slots
                ),
            );
        }
        let pod_monitor_missing = self.cluster.spec.monitoring.pod_monitor
            == PodMonitorMode::Enabled
            && observed.pod_monitor == PodMonitorView::NotServed;
        if pod_monitor_missing {
            return yes(
                reason::DEPENDENCY_MISSING,
                "spec.monitoring.podMonitor is Enabled, but PodMonitors are not known here",
            );
        }
        if let Some(pod) = observed.pods.iter().find(|pod| pod.lost_since.is_some()) {
            return yes(
                reason::NO_NODE_ANSWERS,
                format!("the kube node of {} is silent", pod.name),
            );
        }
        if let Some(report) = &observed.report
            && let Some(waits) = handoff::quarantine_waits(report).into_iter().next()
        {
            return yes(reason::NODE_QUARANTINED, format!("waits {waits}"));
        }
        if let Some((pod, trouble)) = observed
            .pods
            .iter()
            .find_map(|pod| Some((pod, pod.trouble.as_ref()?)))
        {
            return yes(
                reason::STARTING,
                format!("{} does not start: {trouble}", pod.name),
            );
        }
        let redis = self.redis_ready();
        if redis.0 == "False" && redis.1 == reason::REDIS_UNAVAILABLE {
            return yes(redis.1, redis.2);
        }
        no(reason::AS_EXPECTED, "nothing is known to be broken")
    }

    fn postgres_ready(&self) -> Answer {
        if let Some(report) = &self.observed.report {
            let version = &report.store.version;
            let durability = if report.store.synchronous_standby {
                "a standby confirms every commit"
            } else {
                "no standby confirms commits: what is saved is on one machine"
            };
            return yes(
                reason::AS_EXPECTED,
                format!("Postgres {version} answers; {durability}"),
            );
        }
        if self.cluster.spec.postgres.managed.is_none() {
            return unknown(reason::NO_NODE_ANSWERS, self.silence());
        }
        match &self.observed.postgres_set {
            Some(set) if 0 < set.ready => unknown(reason::NO_NODE_ANSWERS, self.silence()),
            _ => no(
                reason::POSTGRES_UNAVAILABLE,
                "no instance of Postgres is ready yet",
            ),
        }
    }

    fn redis_ready(&self) -> Answer {
        if self.cluster.spec.redis.disabled.is_some() {
            return yes(reason::DISABLED, "spec.redis is disabled");
        }
        match self.observed.report.as_ref().map(|report| report.redis) {
            Some(Some(true)) => yes(reason::AS_EXPECTED, "Redis answers"),
            Some(Some(false)) => no(
                reason::REDIS_UNAVAILABLE,
                "Redis does not answer; nothing is lost, presence and opening are slower",
            ),
            Some(None) => unknown(reason::UNKNOWN, "the nodes run without Redis"),
            None => unknown(reason::NO_NODE_ANSWERS, self.silence()),
        }
    }

    fn placement_converged(&self) -> Answer {
        match (&self.plan.placement, self.moving()) {
            (None, _) => unknown(
                reason::NO_NODE_ANSWERS,
                "there is no node to place slots on yet",
            ),
            (Some(_), 0) => match self.plan.proposals.as_slice() {
                [] => yes(reason::AS_EXPECTED, "every slot is where it should be"),
                [first, ..] => yes(
                    reason::AS_EXPECTED,
                    format!(
                        "spec.placement.rebalance.mode is Manual; the load would move {} slots, {first}",
                        self.plan.proposals.len()
                    ),
                ),
            },
            (Some(placement), moving) => no(
                reason::SLOTS_MOVING,
                format!(
                    "{moving} of {} slots are on their way",
                    placement.slots.len()
                ),
            ),
        }
    }

    fn able_to_scale(&self) -> Answer {
        if !self.cluster.spec.autoscaling.enabled {
            return yes(
                reason::FIXED_SIZE,
                "spec.nodes.replicas says the number of nodes",
            );
        }
        if self.observed.report.is_none() {
            return no(reason::NO_NODE_ANSWERS, self.silence());
        }
        if !self.plan.scaling.load_known {
            return no(
                reason::LOAD_UNKNOWN,
                "a node that should serve has told no load for a while",
            );
        }
        yes(reason::AS_EXPECTED, "the load of every node is known")
    }

    fn scaling_limited(&self) -> Answer {
        let scaling = &self.plan.scaling;
        match scaling.limited {
            Some(limited) => yes(
                limited,
                format!(
                    "the load wants {} nodes, {} are kept",
                    scaling.wished, scaling.desired
                ),
            ),
            None if self.cluster.spec.autoscaling.enabled => {
                no(reason::AS_EXPECTED, "the load decides")
            }
            None => no(reason::FIXED_SIZE, "spec.nodes.replicas decides"),
        }
    }

    fn up_to_date(&self) -> Answer {
        if self.plan.rolling_out {
            return no(
                reason::ROLLING_OUT,
                "nodes of an older template are still running",
            );
        }
        let behind =
            |set: &Option<SetView>| set.as_ref().is_some_and(|set| set.updated < set.replicas);
        if behind(&self.observed.postgres_set) || behind(&self.observed.redis_set) {
            return no(
                reason::ROLLING_OUT,
                "instances of a store are being replaced",
            );
        }
        match &self.observed.node_set {
            Some(set) if set.revision.is_some() => {
                yes(reason::AS_EXPECTED, "every pod runs what the spec says")
            }
            _ => unknown(
                reason::STARTING,
                "the StatefulSet of the nodes was not seen yet",
            ),
        }
    }

    fn suspended(&self) -> Answer {
        if self.cluster.spec.suspended {
            yes(
                reason::SUSPENDED,
                "spec.suspended is true: the operator changes nothing",
            )
        } else {
            no(reason::AS_EXPECTED, "the operator acts")
        }
    }
}
