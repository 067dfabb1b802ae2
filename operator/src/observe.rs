//! All reads of a pass. Decides nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use collab_core::control::{ClusterReport, NodeLoad};
use collab_crds::CollabCluster;
use collab_crds::collabcluster::PlacementPolicy;
use collab_crds::collabcluster::SecretKey;
use collab_crds::names::{INTERNAL_PORT, Names};
use futures::future::{join_all, try_join_all};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Node as KubeNode, PersistentVolumeClaim, Pod, Secret};
use k8s_openapi::jiff::Timestamp;
use kube::api::{DynamicObject, ListParams};
use kube::core::GroupVersion;
use kube::{Api, ResourceExt as _, discovery};

use crate::build;
use crate::control::Node;
use crate::controller::{Context, Key, LastReporter};
use crate::model::{Credential, Credentials, Observed, PodMonitorView, PodView, SetView};

/// Nodes that are asked for the report, one after the other, before a pass goes on without.
const ASKED_MAX: usize = 4;
/// Instances that a managed Postgres may have had.
const INSTANCES_MAX: u32 = 3;
/// Label of a kube node that names its zone.
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
/// How long the zone of a kube node is believed.
const ZONE_FRESH: Duration = Duration::from_mins(5);
/// How long the answer to "are PodMonitors known here" is believed.
const DISCOVERY_FRESH: Duration = Duration::from_mins(1);

/// Why nothing could be observed.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// Try again later.
    #[error("the API server did not answer: {0}")]
    Kubernetes(#[from] kube::Error),
    /// A Secret of ours lacks a value. It is never written over: a person must mend or delete it.
    #[error(
        "Secret {secret} lacks the key {key}; add it, or delete the Secret if it opens no data"
    )]
    IncompleteSecret {
        /// The Secret.
        secret: String,
        /// The key.
        key: String,
    },
}

/// Looks at everything that belongs to a cluster.
///
/// # Errors
/// When Kubernetes does not answer. That nodes do not answer is part of what is observed.
pub async fn observe(ctx: &Context, cluster: &CollabCluster) -> Result<Observed, ObserveError> {
    let name = cluster.name_any();
    let names = Names(&name);
    let namespace = cluster.namespace().unwrap_or_default();
    let sets = Api::<StatefulSet>::namespaced(ctx.client.clone(), &namespace);
    let (node_name, postgres_name, redis_name) = (names.node(), names.postgres(), names.redis());
    let (node_set, postgres_set, redis_set, pods, credentials, missing, pod_monitor) = futures::try_join!(
        set(&sets, &node_name),
        set(&sets, &postgres_name),
        set(&sets, &redis_name),
        pods(ctx, &namespace, names),
        credentials(ctx, cluster, &namespace, names),
        missing(ctx, cluster, &namespace),
        pod_monitor(ctx, &namespace, names),
    )?;
    let token = credentials
        .control
        .as_ref()
        .filter(|control| control.stored)
        .and_then(|control| control.data.get("token"));
    let postgres_is_bare =
        postgres_set.is_none() && !has_volumes(ctx, &namespace, &postgres_name).await;
    let mut observed = Observed {
        node_set,
        postgres_set,
        postgres_is_bare,
        redis_set,
        pods,
        missing,
        pod_monitor,
        ..Observed::default()
    };
    match token {
        Some(token) => {
            report(ctx, &ctx.key(cluster), &mut observed, token).await;
            let placement = &cluster.spec.placement;
            if observed.report.is_some() && placement.policy == PlacementPolicy::BoundedLoad {
                observed.loads = loads(ctx, &observed.pods, token).await;
            }
        }
        None => "the cluster is being created".clone_into(&mut observed.silence),
    }
    observed.credentials = credentials;
    Ok(observed)
}

async fn set(api: &Api<StatefulSet>, name: &str) -> Result<Option<SetView>, ObserveError> {
    Ok(api.get_opt(name).await?.map(|set| {
        let spec = set.spec.unwrap_or_default();
        let status = set.status.unwrap_or_default();
        let current = status.observed_generation == set.metadata.generation;
        SetView {
            replicas: spec.replicas.unwrap_or(1),
            ready: status.ready_replicas.unwrap_or(0),
            updated: status.updated_replicas.unwrap_or(0),
            revision: status.update_revision.filter(|_| current),
        }
    }))
}

/// Whether an earlier Postgres of this name left a volume. One that cannot be looked for may exist.
async fn has_volumes(ctx: &Context, namespace: &str, postgres: &str) -> bool {
    let claims = Api::<PersistentVolumeClaim>::namespaced(ctx.client.clone(), namespace);
    for instance in 0..INSTANCES_MAX {
        let claim = claims
            .get_metadata_opt(&format!("data-{postgres}-{instance}"))
            .await;
        if !matches!(claim, Ok(None)) {
            return true;
        }
    }
    false
}

async fn pods(
    ctx: &Context,
    namespace: &str,
    names: Names<'_>,
) -> Result<Vec<PodView>, ObserveError> {
    let api = Api::<Pod>::namespaced(ctx.client.clone(), namespace);
    let selector = ListParams::default().labels(&names.node_selector_text());
    let pods = api.list(&selector).await?.items;
    let mut views = try_join_all(pods.into_iter().map(|pod| view(ctx, names, pod))).await?;
    views.sort_by_key(|pod| pod.ordinal);
    Ok(views)
}

async fn view(ctx: &Context, names: Names<'_>, pod: Pod) -> Result<PodView, ObserveError> {
    let name = pod.name_any();
    let status = pod.status.unwrap_or_default();
    let ready = status
        .conditions
        .iter()
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    let trouble = status
        .container_statuses
        .iter()
        .flatten()
        .filter_map(|container| container.state.as_ref()?.waiting.as_ref()?.reason.clone())
        .find(|reason| !["ContainerCreating", "PodInitializing"].contains(&reason.as_str()));
    let kube_node = pod.spec.and_then(|spec| spec.node_name);
    let (lost_since, zone) = match kube_node {
        // A ready pod's machine was heard of a moment ago.
        Some(kube_node) if ready => (None, zone(ctx, &kube_node).await),
        Some(kube_node) => (lost_since(ctx, &kube_node).await, None),
        None => (None, None),
    };
    Ok(PodView {
        ordinal: name
            .strip_prefix(&format!("{}-", names.node()))
            .and_then(|ordinal| ordinal.parse().ok())
            .unwrap_or(i32::MAX),
        uid: pod.metadata.uid.unwrap_or_default(),
        ip: status.pod_ip,
        ready,
        revision: pod
            .metadata
            .labels
            .and_then(|mut labels| labels.remove("controller-revision-hash"))
            .unwrap_or_default(),
        ends_at: pod.metadata.deletion_timestamp.map(|time| time.0),
        zone,
        lost_since,
        trouble,
        name,
    })
}

/// The zone that a kube node's label names. An operator that may not read kube nodes learns none.
async fn zone(ctx: &Context, kube_node: &str) -> Option<String> {
    let mut zones = ctx.zones.lock().await;
    if let Some((zone, at)) = zones.get(kube_node)
        && at.elapsed() < ZONE_FRESH
    {
        return zone.clone();
    }
    let node = Api::<KubeNode>::all(ctx.client.clone())
        .get(kube_node)
        .await;
    let zone = node
        .ok()
        .and_then(|mut node| node.labels_mut().remove(ZONE_LABEL));
    zones.insert(kube_node.to_owned(), (zone.clone(), Instant::now()));
    zone
}

/// Since when a kube node has been silent. An operator that may not read kube nodes learns nothing.
async fn lost_since(ctx: &Context, kube_node: &str) -> Option<Timestamp> {
    let node = match Api::<KubeNode>::all(ctx.client.clone())
        .get_opt(kube_node)
        .await
    {
        Ok(Some(node)) => node,
        // Gone with its machine.
        Ok(None) => return Some(Timestamp::UNIX_EPOCH),
        Err(_) => return None,
    };
    node.status?
        .conditions?
        .into_iter()
        .find(|condition| condition.type_ == "Ready" && condition.status == "Unknown")
        .map(|condition| {
            condition
                .last_transition_time
                .map_or(Timestamp::UNIX_EPOCH, |time| time.0)
        })
}

async fn credentials(
    ctx: &Context,
    cluster: &CollabCluster,
    namespace: &str,
    names: Names<'_>,
) -> Result<Credentials, ObserveError> {
    let spec = &cluster.spec;
    let drawn = {
        let mut random = rand::rng();
        Credentials {
            database: spec
                .postgres
                .managed
                .is_some()
                .then(|| build::draw_database(names, namespace, &mut random)),
            redis: spec
                .redis
                .managed
                .is_some()
                .then(|| build::draw_redis(names, namespace, &mut random)),
            control: Some(build::draw_control(names, &mut random)),
            auth: spec
                .auth
                .secret_ref
                .is_none()
                .then(|| build::draw_auth(names, &mut random)),
        }
    };
    let secrets = Api::<Secret>::namespaced(ctx.client.clone(), namespace);
    let (database, redis, control, auth) = futures::try_join!(
        stored_or(&secrets, drawn.database),
        stored_or(&secrets, drawn.redis),
        stored_or(&secrets, drawn.control),
        stored_or(&secrets, drawn.auth),
    )?;
    Ok(Credentials {
        database,
        redis,
        control,
        auth,
    })
}

/// What is stored, or else what was drawn.
async fn stored_or(
    api: &Api<Secret>,
    drawn: Option<Credential>,
) -> Result<Option<Credential>, ObserveError> {
    let Some(drawn) = drawn else {
        return Ok(None);
    };
    let Some(secret) = api.get_opt(&drawn.name).await? else {
        return Ok(Some(drawn));
    };
    let data: BTreeMap<String, String> = secret
        .data
        .unwrap_or_default()
        .into_iter()
        .map(|(key, value)| (key, String::from_utf8_lossy(&value.0).into_owned()))
        .collect();
    match drawn.data.keys().find(|key| !data.contains_key(*key)) {
        Some(key) => Err(ObserveError::IncompleteSecret {
            secret: drawn.name,
            key: key.clone(),
        }),
        None => Ok(Some(Credential {
            stored: true,
            data,
            ..drawn
        })),
    }
}

/// The Secrets that the spec refers to and that are not there.
async fn missing(
    ctx: &Context,
    cluster: &CollabCluster,
    namespace: &str,
) -> Result<Vec<String>, ObserveError> {
    let spec = &cluster.spec;
    let references = [
        (
            "spec.postgres.external.secretRef",
            spec.postgres
                .external
                .as_ref()
                .map(|store| &store.secret_ref),
            "url",
        ),
        (
            "spec.redis.external.secretRef",
            spec.redis.external.as_ref().map(|store| &store.secret_ref),
            "url",
        ),
        (
            "spec.auth.secretRef",
            spec.auth.secret_ref.as_ref(),
            "secret",
        ),
    ];
    let secrets = Api::<Secret>::namespaced(ctx.client.clone(), namespace);
    let given = references
        .into_iter()
        .filter_map(|(field, reference, key)| Some((field, reference?, key)));
    let found =
        join_all(given.map(|(field, reference, key)| absence(&secrets, field, reference, key)))
            .await;
    let mut missing = Vec::new();
    for absence in found {
        missing.extend(absence?);
    }
    Ok(missing)
}

async fn absence(
    api: &Api<Secret>,
    field: &str,
    reference: &SecretKey,
    default_key: &str,
) -> Result<Option<String>, ObserveError> {
    let key = reference.key.as_deref().unwrap_or(default_key);
    let secret = api.get_opt(&reference.name).await?;
    Ok(match secret {
        None => Some(format!("{field}: Secret {} does not exist", reference.name)),
        Some(secret)
            if secret
                .data
                .as_ref()
                .is_none_or(|data| !data.contains_key(key)) =>
        {
            Some(format!(
                "{field}: Secret {} has no key {key}",
                reference.name
            ))
        }
        Some(_) => None,
    })
}

async fn pod_monitor(
    ctx: &Context,
    namespace: &str,
    names: Names<'_>,
) -> Result<PodMonitorView, ObserveError> {
    let resource = build::pod_monitor_resource();
    if !served(ctx).await {
        return Ok(PodMonitorView::NotServed);
    }
    let api = Api::<DynamicObject>::namespaced_with(ctx.client.clone(), namespace, &resource);
    // `None` also when the kind vanished a moment ago.
    Ok(match api.get_metadata_opt(&names.node()).await? {
        Some(_) => PodMonitorView::Present,
        None => PodMonitorView::Absent,
    })
}

async fn served(ctx: &Context) -> bool {
    let mut known = ctx.pod_monitors_served.lock().await;
    if let Some((served, at)) = *known
        && at.elapsed() < DISCOVERY_FRESH
    {
        return served;
    }
    let group = discovery::pinned_group(
        &ctx.client,
        &GroupVersion::gv("monitoring.coreos.com", "v1"),
    )
    .await;
    let served = group.is_ok_and(|group| group.recommended_kind("PodMonitor").is_some());
    *known = Some((served, Instant::now()));
    served
}

/// Asks nodes until one reports: the one that answered last, then those that are ready.
async fn report(ctx: &Context, key: &Key, observed: &mut Observed, token: &str) {
    let last = ctx.last_reporters.lock().await.get(key).cloned();
    let mut asked: Vec<(bool, bool, String)> = observed
        .pods
        .iter()
        .filter_map(|pod| {
            let address = format!("{}:{INTERNAL_PORT}", pod.ip.as_ref()?);
            let is_last = last.as_ref().is_some_and(|last| last.address == address);
            Some((!is_last, !pod.ready, address))
        })
        .collect();
    asked.sort();
    if asked.is_empty() {
        "no pod of a node has an address yet".clone_into(&mut observed.silence);
    }
    for (_, _, address) in asked.into_iter().take(ASKED_MAX) {
        match ctx
            .control
            .report(Node {
                address: &address,
                token,
            })
            .await
        {
            Ok(report) if is_whole(&report) => {
                ctx.last_reporters.lock().await.insert(
                    key.clone(),
                    LastReporter {
                        address: address.clone(),
                        token: token.to_owned(),
                    },
                );
                observed.reporter = address;
                observed.report = Some(report);
                observed.silence.clear();
                return;
            }
            Ok(_) => {
                observed.silence = format!("{address} reports another number of owners than slots");
            }
            Err(error) => observed.silence = error.to_string(),
        }
    }
}

fn is_whole(report: &ClusterReport) -> bool {
    let slots = usize::from(report.slots);
    report.owners.len() == slots && [0, slots].contains(&report.planned.len())
}

/// Asks every node that is ready how busy its slots are. Whoever does not answer is missing.
async fn loads(ctx: &Context, pods: &[PodView], token: &str) -> Vec<NodeLoad> {
    let ready = pods.iter().filter(|pod| pod.ready);
    let asked = ready.filter_map(|pod| Some(format!("{}:{INTERNAL_PORT}", pod.ip.as_ref()?)));
    let answers = join_all(asked.map(|address| async move {
        let node = Node {
            address: &address,
            token,
        };
        ctx.control.load(node).await
    }));
    answers.await.into_iter().flatten().collect()
}
