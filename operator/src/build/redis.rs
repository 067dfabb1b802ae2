//! The managed Redis: one pod with a volume. It holds only what may be lost.

use collab_crds::names::{Component, Names, REDIS_PORT};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use serde_json::json;

use super::{Subject, pod};
use crate::model::{Credential, Manifest};

/// User and group of the image.
const USER: i64 = 102;

/// The password must not be on a command line, which every process of the machine can read.
const START: &str = r"set -eu
umask 077
cat > /run/redis/redis.conf <<END
bind * -::*
port 6379
dir /data
requirepass $(cat /etc/collab/redis/password)
appendonly yes
appendfsync everysec
maxmemory 192mb
maxmemory-policy volatile-lru
END
exec redis-server /run/redis/redis.conf
";

/// Draws the Secret with the password and the URL.
pub fn draw(names: Names<'_>, namespace: &str, random: &mut impl rand::Rng) -> Credential {
    let password = super::password(random);
    let url = format!(
        "redis://:{password}@{}.{namespace}.svc:{REDIS_PORT}/0",
        names.redis()
    );
    Credential {
        name: names.redis(),
        stored: false,
        keeps_data: false,
        component: Component::Redis,
        data: [("password".to_owned(), password), ("url".to_owned(), url)].into(),
    }
}

pub(super) fn objects(subject: &Subject<'_>) -> Vec<Manifest> {
    vec![account(subject), service(subject), set(subject)]
}

fn account(subject: &Subject<'_>) -> Manifest {
    Manifest::of::<ServiceAccount>(json!({
        "metadata": subject.metadata(&subject.names().redis(), Component::Redis),
        "automountServiceAccountToken": false,
    }))
}

fn service(subject: &Subject<'_>) -> Manifest {
    let names = subject.names();
    Manifest::of::<Service>(json!({
        "metadata": subject.metadata(&names.redis(), Component::Redis),
        "spec": {
            "selector": names.selector(Component::Redis),
            "ports": [{ "name": "redis", "port": REDIS_PORT, "targetPort": REDIS_PORT, "protocol": "TCP" }],
        },
    }))
}

fn set(subject: &Subject<'_>) -> Manifest {
    let names = subject.names();
    let spec = subject
        .cluster
        .spec
        .redis
        .managed
        .clone()
        .unwrap_or_default();
    let probe = |period: i64, failures: i64| json!({ "tcpSocket": { "port": REDIS_PORT }, "periodSeconds": period, "failureThreshold": failures });
    Manifest::of::<StatefulSet>(json!({
        "metadata": subject.metadata(&names.redis(), Component::Redis),
        "spec": {
            "serviceName": names.redis(),
            "replicas": spec.instances.unwrap_or(1),
            "selector": { "matchLabels": names.selector(Component::Redis) },
            "persistentVolumeClaimRetentionPolicy": super::postgres::retention(subject),
            "template": {
                "metadata": { "labels": names.labels(Component::Redis) },
                "spec": {
                    "serviceAccountName": names.redis(),
                    "automountServiceAccountToken": false,
                    "enableServiceLinks": false,
                    "terminationGracePeriodSeconds": 30,
                    "imagePullSecrets": subject.cluster.spec.image_pull_secrets,
                    "nodeSelector": spec.node_selector,
                    "securityContext": pod::security(USER),
                    "containers": [{
                        "name": "redis",
                        "image": spec.image.as_ref().unwrap_or(&subject.images.redis),
                        "imagePullPolicy": subject.pull_policy(),
                        "command": ["/bin/sh", "-c", START],
                        "ports": [{ "name": "redis", "containerPort": REDIS_PORT, "protocol": "TCP" }],
                        "readinessProbe": probe(2, 2),
                        "livenessProbe": probe(10, 6),
                        "resources": spec.resources.as_ref().map_or_else(
                            || pod::resources(subject, ["100m", "128Mi", "320Mi"], ["20m", "32Mi", "320Mi"]),
                            |resources| json!(resources),
                        ),
                        "securityContext": pod::container_security(),
                        "volumeMounts": [
                            { "name": "data", "mountPath": "/data" },
                            { "name": "run", "mountPath": "/run/redis" },
                            { "name": "tmp", "mountPath": "/tmp" },
                            pod::secret_mount("redis"),
                        ],
                    }],
                    "volumes": [
                        { "name": "run", "emptyDir": {} },
                        { "name": "tmp", "emptyDir": {} },
                        pod::secret_volume("redis", &names.redis(), &[("password", "password")]),
                    ],
                },
            },
            "volumeClaimTemplates": [super::postgres::claim(subject, Component::Redis, &spec.storage, "1Gi")],
        },
    }))
}
