//! The Service that clients connect to.

use collab_crds::names::{CLIENT_PORT, Component};
use k8s_openapi::api::core::v1::Service;
use serde_json::json;

use super::Subject;
use crate::model::Manifest;

pub(super) fn object(subject: &Subject<'_>) -> Manifest {
    let names = subject.names();
    Manifest::of::<Service>(json!({
        "metadata": subject.metadata(&names.client_service(), Component::Node),
        "spec": {
            "type": subject.cluster.spec.gateway.service_type.as_str(),
            "selector": names.selector(Component::Node),
            "ports": [{ "name": "http", "port": 80, "targetPort": CLIENT_PORT, "protocol": "TCP", "appProtocol": "kubernetes.io/ws" }],
        },
    }))
}
