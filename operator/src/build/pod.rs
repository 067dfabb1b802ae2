//! What the pods of all parts have in common: they run as an ordinary user without rights, and see
//! of each Secret only the keys they need, as files.

use collab_crds::collabcluster::SecretKey;
use serde_json::{Value, json};

use super::Subject;

/// Security of a pod whose processes run as this user and group.
pub(super) fn security(user: i64) -> Value {
    json!({
        "runAsNonRoot": true,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": { "type": "RuntimeDefault" },
    })
}

/// Security of a container.
pub(super) fn container_security() -> Value {
    json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": { "drop": ["ALL"] },
    })
}

/// A volume with some keys of a Secret, each as a file of its name.
pub(super) fn secret_volume(volume: &str, secret: &str, keys: &[(&str, &str)]) -> Value {
    let items: Vec<Value> = keys
        .iter()
        .map(|(key, path)| json!({ "key": key, "path": path }))
        .collect();
    json!({ "name": volume, "secret": { "secretName": secret, "defaultMode": 0o440, "items": items } })
}

/// Where [`secret_volume`] is mounted.
pub(super) fn secret_mount(volume: &str) -> Value {
    json!({ "name": volume, "mountPath": format!("/etc/collab/{volume}"), "readOnly": true })
}

/// Name and key of a Secret that the spec refers to.
pub(super) fn reference<'a>(secret: &'a SecretKey, default_key: &'a str) -> (&'a str, &'a str) {
    (&secret.name, secret.key.as_deref().unwrap_or(default_key))
}

/// Pods leave a kube node that is silent after this many seconds.
pub(super) fn leave_silent_machines(seconds: i64) -> Vec<Value> {
    ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"]
        .into_iter()
        .map(|key| {
            json!({ "key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": seconds })
        })
        .collect()
}

/// Compute resources by profile: requests, and a bound on memory.
pub(super) fn resources(subject: &Subject<'_>, production: [&str; 3], dev: [&str; 3]) -> Value {
    let [cpu, memory, memory_limit] = if subject.production() {
        production
    } else {
        dev
    };
    json!({ "requests": { "cpu": cpu, "memory": memory }, "limits": { "memory": memory_limit } })
}
