//! How many pods there should be, which of them is drained, and which is replaced.
//!
//! A pod is ended only when its node holds no slot and has no client, or when nobody else could take
//! them anyway. One pod at a time, highest ordinal first. All of it is derived from what is seen:
//! a drain that was begun before the operator started is carried on, and one that no longer has a
//! reason is taken back.

use std::collections::BTreeSet;

use collab_core::ids::NodeId;
use collab_crds::names::Names;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::model::{Action, Observed, PodDeletion, PodView};
use crate::plan::handoff::{Standing, active_nodes, pod_standing, standing};

/// A pod whose kube node is silent, or that outstays its end, is forgotten after this time.
const FORGET_AFTER: SignedDuration = SignedDuration::from_secs(60);

/// What is to become of the pods.
#[derive(Clone, Debug, Default)]
pub struct Rollout {
    /// Replicas of the StatefulSet.
    pub replicas: i32,
    /// Drains and deletions.
    pub actions: Vec<Action>,
    /// Nodes that are on their way out.
    pub leaving: BTreeSet<NodeId>,
    /// What is waited for.
    pub waits: Vec<String>,
    /// Whether a template change is being rolled out.
    pub rolling_out: bool,
}

/// Decides over the pods so that there are `desired` of them, all of the newest template.
pub fn rollout(names: Names<'_>, desired: i32, observed: &Observed, now: Timestamp) -> Rollout {
    let mut rollout = Rollout {
        replicas: desired,
        ..Rollout::default()
    };
    forget_lost_pods(&mut rollout, observed, now);
    let Some(set) = &observed.node_set else {
        return rollout;
    };
    let outdated: Vec<&PodView> = observed
        .pods
        .iter()
        .filter(|pod| {
            set.revision
                .as_ref()
                .is_some_and(|newest| *newest != pod.revision)
        })
        .collect();
    rollout.rolling_out = !outdated.is_empty();
    if desired < set.replicas {
        scale_in(&mut rollout, names, desired, set.replicas, observed);
    } else if desired == set.replicas && !outdated.is_empty() {
        replace_one(&mut rollout, &outdated, desired, observed);
    }
    take_back_drains(&mut rollout, observed);
    rollout
}

/// A StatefulSet never replaces a pod whose kube node is gone. It is safe to do so: a node has no
/// volume, and its slots were adopted under a higher epoch.
fn forget_lost_pods(rollout: &mut Rollout, observed: &Observed, now: Timestamp) {
    for pod in &observed.pods {
        let overdue = [pod.lost_since, pod.ends_at]
            .into_iter()
            .flatten()
            .any(|since| FORGET_AFTER < now.duration_since(since));
        if overdue {
            rollout.delete(pod, PodDeletion::Force);
        }
    }
}

/// Removes the node with the highest ordinal once it is drained. The others follow in later passes.
fn scale_in(
    rollout: &mut Rollout,
    names: Names<'_>,
    desired: i32,
    replicas: i32,
    observed: &Observed,
) {
    if desired == 0 {
        // Nobody is left to hand over to: all are told to end and write down what they hold.
        return;
    }
    rollout.replicas = replicas;
    let victim = names.node_pod(replicas - 1);
    let Some(report) = &observed.report else {
        rollout.wait(format!(
            "for a node that answers, before {victim} can be drained"
        ));
        return;
    };
    let standing = standing(observed, &victim);
    rollout.leaving.insert(NodeId(victim.clone()));
    if standing.is_empty() {
        rollout.replicas = replicas - 1;
    } else if let Standing::Active = standing {
        if active_nodes(report).iter().all(|node| node.0 == victim) {
            rollout.leaving.clear();
            rollout.wait(format!(
                "for another node that can take the slots of {victim}"
            ));
        } else {
            rollout.drain(&victim);
        }
    } else {
        rollout.wait_for(&victim, standing);
    }
}

/// Replaces one pod of an older template: a broken one at once, else one that was drained while all
/// others serve.
fn replace_one(rollout: &mut Rollout, outdated: &[&PodView], desired: i32, observed: &Observed) {
    let broken = outdated
        .iter()
        .find(|pod| {
            !pod.ready
                && pod.ends_at.is_none()
                && observed.report.is_some()
                && pod_standing(observed, pod).is_empty()
        })
        .or_else(|| {
            outdated
                .iter()
                .find(|pod| pod.trouble.is_some() && pod.ends_at.is_none())
        });
    if let Some(pod) = broken {
        rollout.delete(pod, PodDeletion::Graceful);
        return;
    }
    let Some(report) = &observed.report else {
        rollout.wait("for a node that answers, before pods are replaced".to_owned());
        return;
    };
    let leaves = |pod: &&&PodView| {
        matches!(
            pod_standing(observed, pod),
            Standing::Draining { .. } | Standing::Drained
        )
    };
    let Some(pod) = outdated.iter().rev().find(leaves).or(outdated.last()) else {
        return;
    };
    let settled = |other: &PodView| {
        other.name == pod.name
            || (other.ready
                && other.ends_at.is_none()
                && pod_standing(observed, other) == Standing::Active)
    };
    let present = i32::try_from(observed.pods.len()).unwrap_or(i32::MAX);
    if present < desired || !observed.pods.iter().all(settled) {
        rollout.wait(format!(
            "for all other nodes to serve, before {} is replaced",
            pod.name
        ));
        return;
    }
    if pod.ends_at.is_some() {
        rollout.wait(format!("for {} to end", pod.name));
        return;
    }
    let standing = pod_standing(observed, pod);
    rollout.leaving.insert(NodeId(pod.name.clone()));
    let alone = active_nodes(report).iter().all(|node| node.0 == pod.name);
    if standing.is_empty() || alone {
        rollout.delete(pod, PodDeletion::Graceful);
    } else if let Standing::Active = standing {
        rollout.drain(&pod.name);
    } else {
        rollout.wait_for(&pod.name, standing);
    }
}

/// A node that drains for no reason that is left serves again: scaling out is then immediate.
fn take_back_drains(rollout: &mut Rollout, observed: &Observed) {
    for pod in &observed.pods {
        let drains = matches!(
            pod_standing(observed, pod),
            Standing::Draining { .. } | Standing::Drained
        );
        let node = NodeId(pod.name.clone());
        let stays = pod.ordinal < rollout.replicas
            && pod.ends_at.is_none()
            && !rollout.leaving.contains(&node);
        if drains && stays && !rollout.deletes(&pod.name) {
            rollout.actions.push(Action::Drain { node, drain: false });
        }
    }
}

impl Rollout {
    fn drain(&mut self, node: &str) {
        self.actions.push(Action::Drain {
            node: node.into(),
            drain: true,
        });
    }

    fn delete(&mut self, pod: &PodView, how: PodDeletion) {
        if !self.deletes(&pod.name) {
            self.actions.push(Action::DeletePod {
                name: pod.name.clone(),
                uid: pod.uid.clone(),
                how,
            });
        }
    }

    fn deletes(&self, pod: &str) -> bool {
        self.actions
            .iter()
            .any(|action| matches!(action, Action::DeletePod { name, .. } if name == pod))
    }

    fn wait(&mut self, sentence: String) {
        self.waits.push(sentence);
    }

    fn wait_for(&mut self, node: &str, standing: Standing) {
        self.waits.push(match standing {
            Standing::Lost { slots } => {
                format!("for others to adopt the {slots} slots of {node}, which is lost")
            }
            Standing::Draining { slots } if 0 < slots => {
                format!("for {node} to hand over {slots} slots")
            }
            _ => format!("for {node} to close its connections"),
        });
    }
}
