//! The PodMonitor of the Prometheus operator, where its kind is known.

use collab_crds::collabcluster::PodMonitorMode;
use collab_crds::names::Component;
use kube::api::{ApiResource, GroupVersionKind};
use serde_json::json;

use super::Subject;
use crate::model::{Action, Manifest, PodMonitorView};

/// The kind.
pub fn resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("monitoring.coreos.com", "v1", "PodMonitor"),
        "podmonitors",
    )
}

pub(super) fn action(subject: &Subject<'_>, view: PodMonitorView) -> Option<Action> {
    let manifest = Manifest::of_resource(
        resource(),
        json!({
            "metadata": subject.metadata(&subject.names().node(), Component::Node),
            "spec": {
                "selector": { "matchLabels": subject.names().selector(Component::Node) },
                "podMetricsEndpoints": [{
                    "port": "internal",
                    "path": "/metrics",
                    "interval": "15s",
                    // The dashboards choose by the name of the cluster.
                    "relabelings": [{
                        "sourceLabels": ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"],
                        "targetLabel": "cluster",
                    }],
                }],
            },
        }),
    );
    match (subject.cluster.spec.monitoring.pod_monitor, view) {
        (_, PodMonitorView::NotServed) | (PodMonitorMode::Disabled, PodMonitorView::Absent) => None,
        (PodMonitorMode::Disabled, PodMonitorView::Present) => Some(Action::Delete(manifest)),
        (PodMonitorMode::Auto | PodMonitorMode::Enabled, _) => Some(Action::Apply(manifest)),
    }
}
