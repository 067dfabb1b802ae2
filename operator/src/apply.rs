//! All writes of a pass, except the status. Decides nothing.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash as _, Hasher as _};
use std::time::{Duration, Instant};

use collab_core::control::{
    DrainRequest, FenceRequest, PinRequest, PlacementRequest, ZonesRequest,
};
use collab_core::ids::Term;
use collab_crds::CollabCluster;
use collab_crds::names::FIELD_MANAGER;
use k8s_openapi::api::core::v1::{ObjectReference, Pod};
use k8s_openapi::jiff::Timestamp;
use kube::api::{
    DeleteParams, DynamicObject, Patch, PatchParams, PostParams, Preconditions, ValidationDirective,
};
use kube::runtime::events::{Event, EventType};
use kube::{Api, Resource as _, ResourceExt as _};
use tracing::{info, warn};

use crate::control::{ControlError, Node};
use crate::controller::Context;
use crate::model::{Action, Applied, Gravity, Manifest, News, Observed, Plan, PodDeletion};

/// What was applied and has not changed is applied again after this time, against edits by others.
const REAPPLY_AFTER: Duration = Duration::from_mins(1);

/// Why a plan was given up.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Another operator acts on this cluster. The process must end.
    #[error("another operator acts on this cluster: term {current} was granted")]
    TermLost {
        /// The newest term.
        current: Term,
    },
}

/// Does what the plan says, in its order. What fails is noted and the rest done all the same.
///
/// # Errors
/// When another operator has taken over.
pub async fn apply(
    ctx: &Context,
    cluster: &CollabCluster,
    observed: &Observed,
    plan: &Plan,
) -> Result<Applied, ApplyError> {
    let mut applied = Applied {
        failures: Vec::new(),
        memory: plan.memory.clone(),
    };
    for news in &plan.news {
        tell(ctx, cluster, news).await;
    }
    if plan.reapply {
        ctx.forget_applied(cluster).await;
    }
    ctx.metrics.slots_rebalanced.inc_by(plan.moves.len() as u64);
    for action in &plan.actions {
        match perform(ctx, cluster, observed, action, &mut applied).await {
            Ok(()) => {}
            Err(Failure::Control(ControlError::TermRefused { current })) => {
                let news = News {
                    gravity: Gravity::Warning,
                    reason: "OperatorTermLost",
                    action: "Stop",
                    node: None,
                    note: format!(
                        "term {current} was granted to another operator; {} stops",
                        ctx.holder
                    ),
                };
                tell(ctx, cluster, &news).await;
                return Err(ApplyError::TermLost { current });
            }
            Err(failure) => {
                warn!(cluster = %cluster.name_any(), %action, %failure, "part of the plan failed");
                applied.failures.push(format!("{action}: {failure}"));
            }
        }
    }
    Ok(applied)
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Kubernetes(#[from] kube::Error),
    #[error("{0}")]
    Control(#[from] ControlError),
    #[error("there is no term to act under yet")]
    NoTerm,
}

async fn perform(
    ctx: &Context,
    cluster: &CollabCluster,
    observed: &Observed,
    action: &Action,
    applied: &mut Applied,
) -> Result<(), Failure> {
    let node = Node {
        address: &observed.reporter,
        token: observed
            .credentials
            .control
            .as_ref()
            .and_then(|control| control.data.get("token"))
            .map_or("", String::as_str),
    };
    match action {
        Action::Create(manifest) => create(ctx, cluster, manifest).await,
        Action::Apply(manifest) => server_side_apply(ctx, cluster, manifest).await,
        Action::Delete(manifest) => {
            let api = api(ctx, cluster, manifest);
            ignore_absent(
                api.delete(&manifest.name, &DeleteParams::default())
                    .await
                    .map(drop),
            )
        }
        Action::DeletePod { name, uid, how } => delete_pod(ctx, cluster, name, uid, *how).await,
        Action::TakeTerm => {
            let term = ctx.control.take_term(node, &ctx.holder).await?;
            info!(cluster = %cluster.name_any(), %term, "acts under a new term");
            ctx.metrics.term.set(term.0);
            applied.memory.term = Some(term);
            Ok(())
        }
        Action::Place(placement) => {
            let request = PlacementRequest {
                term: applied.memory.term.ok_or(Failure::NoTerm)?,
                nodes: placement.nodes.clone(),
                slots: placement.slots.clone(),
                pins: placement.pins.clone(),
            };
            ctx.control.place(node, &request).await?;
            info!(cluster = %cluster.name_any(), %placement, "asked for a placement");
            applied.memory.placed = Some((placement.hash.clone(), Timestamp::now()));
            Ok(())
        }
        Action::TellZones(zones) => {
            let request = ZonesRequest {
                term: applied.memory.term.ok_or(Failure::NoTerm)?,
                zones: zones.clone(),
            };
            ctx.control.zones(node, &request).await?;
            info!(cluster = %cluster.name_any(), %action, "told the zones of nodes");
            Ok(())
        }
        Action::Pin { document, pin } => {
            let request = PinRequest {
                term: applied.memory.term.ok_or(Failure::NoTerm)?,
                document: document.clone(),
                pin: *pin,
            };
            ctx.control.pin(node, &request).await?;
            info!(cluster = %cluster.name_any(), document.id = %document, pin, "asked for a pin");
            Ok(())
        }
        Action::Fence {
            node: fenced,
            incarnation,
        } => {
            let request = FenceRequest {
                term: applied.memory.term.ok_or(Failure::NoTerm)?,
                incarnation: *incarnation,
            };
            ctx.control.fence(node, &request).await?;
            info!(cluster = %cluster.name_any(), node = %fenced, %incarnation, "ended the lease of a node");
            Ok(())
        }
        Action::Drain {
            node: drained,
            drain,
        } => {
            let request = DrainRequest {
                term: applied.memory.term.ok_or(Failure::NoTerm)?,
                node: drained.clone(),
                drain: *drain,
            };
            ctx.control.drain(node, &request).await?;
            info!(cluster = %cluster.name_any(), node = %drained, drain, "asked for a drain");
            Ok(())
        }
    }
}

fn api(ctx: &Context, cluster: &CollabCluster, manifest: &Manifest) -> Api<DynamicObject> {
    let namespace = cluster.namespace().unwrap_or_default();
    Api::namespaced_with(ctx.client.clone(), &namespace, &manifest.resource)
}

async fn create(
    ctx: &Context,
    cluster: &CollabCluster,
    manifest: &Manifest,
) -> Result<(), Failure> {
    let object: DynamicObject =
        serde_json::from_value(manifest.body.clone()).map_err(kube::Error::SerdeError)?;
    let params = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    api(ctx, cluster, manifest).create(&params, &object).await?;
    info!(cluster = %cluster.name_any(), object = %manifest, "created");
    Ok(())
}

async fn server_side_apply(
    ctx: &Context,
    cluster: &CollabCluster,
    manifest: &Manifest,
) -> Result<(), Failure> {
    let key = (
        ctx.key(cluster),
        format!("{} {}", manifest.resource.kind, manifest.name),
    );
    let hash = {
        let mut hasher = DefaultHasher::new();
        manifest.body.to_string().hash(&mut hasher);
        hasher.finish()
    };
    let fresh = ctx
        .applied
        .lock()
        .await
        .get(&key)
        .is_some_and(|(known, at)| *known == hash && at.elapsed() < REAPPLY_AFTER);
    if fresh {
        return Ok(());
    }
    let params = PatchParams {
        field_validation: Some(ValidationDirective::Strict),
        ..PatchParams::apply(FIELD_MANAGER).force()
    };
    api(ctx, cluster, manifest)
        .patch(&manifest.name, &params, &Patch::Apply(&manifest.body))
        .await?;
    ctx.applied.lock().await.insert(key, (hash, Instant::now()));
    Ok(())
}

async fn delete_pod(
    ctx: &Context,
    cluster: &CollabCluster,
    name: &str,
    uid: &str,
    how: PodDeletion,
) -> Result<(), Failure> {
    let namespace = cluster.namespace().unwrap_or_default();
    let params = DeleteParams {
        grace_period_seconds: (how == PodDeletion::Force).then_some(0),
        // Not its successor of the same name.
        preconditions: Some(Preconditions {
            uid: Some(uid.to_owned()),
            resource_version: None,
        }),
        ..DeleteParams::default()
    };
    let api = Api::<Pod>::namespaced(ctx.client.clone(), &namespace);
    let deleted = ignore_absent(api.delete(name, &params).await.map(drop));
    if deleted.is_ok() {
        info!(cluster = %cluster.name_any(), pod = name, ?how, "deleted a pod");
    }
    deleted
}

/// What is to be deleted and is not there is as it should be; so is a pod of another uid.
fn ignore_absent(result: Result<(), kube::Error>) -> Result<(), Failure> {
    match result {
        Err(kube::Error::Api(status)) if [404, 409].contains(&status.code) => Ok(()),
        other => Ok(other?),
    }
}

async fn tell(ctx: &Context, cluster: &CollabCluster, news: &News) {
    if news.action == "Scale" {
        let direction = if news.reason == "ScaledOut" {
            "out"
        } else {
            "in"
        };
        ctx.metrics
            .scale_events
            .with_label_values(&[direction])
            .inc();
    }
    let event = Event {
        type_: match news.gravity {
            Gravity::Normal => EventType::Normal,
            Gravity::Warning => EventType::Warning,
        },
        reason: news.reason.to_owned(),
        note: Some(news.note.clone()),
        action: news.action.to_owned(),
        // Without it, the same news of several nodes would be folded into one Event.
        secondary: news.node.as_ref().map(|node| ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            namespace: cluster.namespace(),
            name: Some(node.0.clone()),
            ..ObjectReference::default()
        }),
    };
    info!(cluster = %cluster.name_any(), reason = news.reason, "{}", news.note);
    if let Err(error) = ctx.recorder.publish(&event, &cluster.object_ref(&())).await {
        warn!(cluster = %cluster.name_any(), %error, "could not publish an Event");
    }
}
