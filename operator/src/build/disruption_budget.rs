//! At most one pod of a part is away at a time, when people drain kube nodes.

use collab_crds::names::Component;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde_json::json;

use super::Subject;
use crate::model::Manifest;

pub(super) fn object(subject: &Subject<'_>, component: Component) -> Manifest {
    let names = subject.names();
    Manifest::of::<PodDisruptionBudget>(json!({
        "metadata": subject.metadata(&format!("{}-{}", subject.name, component.as_str()), component),
        "spec": {
            "maxUnavailable": 1,
            // Else a node that is broken anyway could keep a machine from being drained.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": { "matchLabels": names.selector(component) },
        },
    }))
}
