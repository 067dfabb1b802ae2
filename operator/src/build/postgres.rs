//! The managed Postgres: pods of Patroni, which keeps its consensus in Endpoints of Kubernetes.
//!
//! Failover is Patroni's alone. It writes the primary's address into the Endpoints of the primary
//! Service, which therefore has no selector. What it must not forget while the volumes live (that
//! the database was created, and which standby is synchronous) stands in two more Endpoints; each
//! is kept alive by a Service of its name, which goes only with the volumes.

use std::collections::BTreeMap;

use collab_crds::collabcluster::{ManagedPostgres, StorageSpec};
use collab_crds::names::{CONFIG_HASH_ANNOTATION, Component, Names, PATRONI_PORT, POSTGRES_PORT};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{ConfigMap, Endpoints, Service, ServiceAccount};
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{Subject, pod, short_hex};
use crate::model::{Credential, Manifest};

/// User and group of the image.
const USER: i64 = 101;
/// Label with Patroni's scope.
const SCOPE_LABEL: &str = "collabcluster.io/scope";
/// Label in which Patroni writes what an instance is.
const ROLE_LABEL: &str = "collabcluster.io/role";

/// Ends of the names of the Endpoints that are kept with the volumes.
const KEPT: [&str; 2] = ["config", "sync"];

/// Draws the Secret with the passwords and the URL of the nodes.
pub fn draw(names: Names<'_>, namespace: &str, random: &mut impl rand::Rng) -> Credential {
    let password = super::password(random);
    let url = format!(
        "postgres://collab:{password}@{}.{namespace}.svc:{POSTGRES_PORT}/collab",
        names.postgres()
    );
    Credential {
        name: names.database_secret(),
        stored: false,
        keeps_data: true,
        component: Component::Postgres,
        data: BTreeMap::from([
            ("superuser-password".to_owned(), super::password(random)),
            ("replication-password".to_owned(), super::password(random)),
            ("password".to_owned(), password),
            ("url".to_owned(), url),
        ]),
    }
}

pub(super) fn objects(subject: &Subject<'_>) -> Vec<Manifest> {
    let spec = subject
        .cluster
        .spec
        .postgres
        .managed
        .clone()
        .unwrap_or_default();
    let instances = spec
        .instances
        .unwrap_or(if subject.production() { 3 } else { 1 });
    let mut objects = vec![account(subject)];
    objects.extend(rights(subject));
    objects.push(config(subject));
    objects.extend(services(subject));
    objects.push(set(subject, &spec, instances));
    if 1 < instances {
        objects.push(super::disruption_budget::object(
            subject,
            Component::Postgres,
        ));
    }
    objects
}

/// What an earlier Patroni remembered of volumes that are gone: with it, a new one would wait for ever
/// for the instance that has them.
pub(super) fn leftovers(subject: &Subject<'_>) -> [Manifest; 2] {
    KEPT.map(|kept| {
        Manifest::of::<Endpoints>(json!({
            "metadata": { "name": format!("{}-{kept}", subject.names().postgres()) },
        }))
    })
}

/// What becomes of the claims of a StatefulSet that is deleted.
pub(super) fn retention(subject: &Subject<'_>) -> Value {
    let when_deleted = if subject.deletes_data() {
        "Delete"
    } else {
        "Retain"
    };
    json!({ "whenDeleted": when_deleted, "whenScaled": "Retain" })
}

/// The claim of each pod of a StatefulSet.
pub(super) fn claim(
    subject: &Subject<'_>,
    component: Component,
    storage: &StorageSpec,
    default_size: &str,
) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": { "name": "data", "labels": subject.names().labels(component) },
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": storage.storage_class_name,
            "resources": { "requests": { "storage": storage.size.as_deref().unwrap_or(default_size) } },
        },
    })
}

fn account(subject: &Subject<'_>) -> Manifest {
    Manifest::of::<ServiceAccount>(json!({
        "metadata": subject.metadata(&subject.names().postgres(), Component::Postgres),
    }))
}

/// What Patroni needs of Kubernetes; the operator must have all of it to be allowed to grant it.
fn rights(subject: &Subject<'_>) -> [Manifest; 2] {
    let name = subject.names().postgres();
    [
        Manifest::of::<Role>(json!({
            "metadata": subject.metadata(&name, Component::Postgres),
            "rules": [
                { "apiGroups": [""], "resources": ["endpoints"], "verbs": ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"] },
                { "apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "patch", "update", "watch"] },
                { "apiGroups": [""], "resources": ["services"], "verbs": ["create"] },
            ],
        })),
        Manifest::of::<RoleBinding>(json!({
            "metadata": subject.metadata(&name, Component::Postgres),
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name },
            "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": subject.cluster.metadata.namespace }],
        })),
    ]
}

fn config(subject: &Subject<'_>) -> Manifest {
    Manifest::of::<ConfigMap>(json!({
        "metadata": subject.metadata(&subject.names().postgres(), Component::Postgres),
        "data": config_files(subject),
    }))
}

fn config_files(subject: &Subject<'_>) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("patroni.yml", patroni(subject)),
        ("start.sh", include_str!("postgres/start.sh").to_owned()),
        (
            "bootstrap.sh",
            include_str!("postgres/bootstrap.sh").to_owned(),
        ),
    ])
}

/// Configuration of Patroni. JSON is YAML, so no quoting can go wrong. `bootstrap` is read once, when
/// the database is created.
fn patroni(subject: &Subject<'_>) -> String {
    let config = json!({
        "scope": subject.names().postgres(),
        "restapi": { "listen": format!("0.0.0.0:{PATRONI_PORT}") },
        "kubernetes": {
            "use_endpoints": true,
            "labels": subject.names().selector(Component::Postgres),
            "scope_label": SCOPE_LABEL,
            "role_label": ROLE_LABEL,
            "ports": [{ "name": "postgresql", "port": POSTGRES_PORT }],
        },
        "bootstrap": {
            "dcs": {
                "ttl": 20,
                "loop_wait": 5,
                "retry_timeout": 5,
                "synchronous_mode": true,
                "postgresql": {
                    "use_pg_rewind": true,
                    "use_slots": true,
                    "parameters": { "max_connections": 300, "wal_keep_size": "256MB" },
                },
            },
            "initdb": [{ "auth-host": "scram-sha-256" }, { "auth-local": "scram-sha-256" }, { "encoding": "UTF8" }, { "locale": "C" }, "data-checksums"],
            "post_bootstrap": "/bin/sh /etc/collab/patroni/bootstrap.sh",
        },
        "postgresql": {
            "listen": format!("0.0.0.0:{POSTGRES_PORT}"),
            "data_dir": "/var/lib/postgresql/data/pgdata",
            "pgpass": "/tmp/pgpass",
            "parameters": { "unix_socket_directories": "/run/postgresql" },
            // A spread checkpoint would keep a new standby waiting for minutes.
            "basebackup": [{ "checkpoint": "fast" }],
            "pg_hba": [
                "local all all scram-sha-256",
                "host all all all scram-sha-256",
                "host replication standby all scram-sha-256",
            ],
        },
    });
    format!("{config:#}\n")
}

fn services(subject: &Subject<'_>) -> Vec<Manifest> {
    let names = subject.names();
    let ports = json!([{ "name": "postgresql", "port": POSTGRES_PORT, "targetPort": POSTGRES_PORT, "protocol": "TCP" }]);
    let mut standbys = names.selector(Component::Postgres);
    standbys.insert(ROLE_LABEL.to_owned(), "replica".to_owned());
    let mut services = vec![
        Manifest::of::<Service>(json!({
            "metadata": subject.metadata(&names.postgres(), Component::Postgres),
            "spec": { "ports": ports },
        })),
        Manifest::of::<Service>(json!({
            "metadata": subject.metadata(&names.postgres_replicas(), Component::Postgres),
            "spec": { "selector": standbys, "ports": ports },
        })),
    ];
    services.extend(KEPT.map(|kept| {
        Manifest::of::<Service>(json!({
            "metadata": subject.metadata_of_data(&format!("{}-{kept}", names.postgres()), Component::Postgres),
            "spec": { "clusterIP": "None" },
        }))
    }));
    services
}

fn set(subject: &Subject<'_>, spec: &ManagedPostgres, instances: i32) -> Manifest {
    let names = subject.names();
    let mut labels = names.labels(Component::Postgres);
    labels.insert(SCOPE_LABEL.to_owned(), names.postgres());
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": path } } });
    let value = |name: &str, value: &str| json!({ "name": name, "value": value });
    let probe = |path: &str, period: i64, failures: i64| {
        json!({
            "httpGet": { "path": path, "port": PATRONI_PORT },
            "periodSeconds": period,
            "timeoutSeconds": 5,
            "failureThreshold": failures,
        })
    };
    Manifest::of::<StatefulSet>(json!({
        "metadata": subject.metadata(&names.postgres(), Component::Postgres),
        "spec": {
            "serviceName": format!("{}-config", names.postgres()),
            "replicas": instances,
            "podManagementPolicy": "Parallel",
            "selector": { "matchLabels": names.selector(Component::Postgres) },
            "persistentVolumeClaimRetentionPolicy": retention(subject),
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": { CONFIG_HASH_ANNOTATION: hash(&config_files(subject)) },
                },
                "spec": {
                    "serviceAccountName": names.postgres(),
                    "enableServiceLinks": false,
                    "terminationGracePeriodSeconds": 60,
                    "imagePullSecrets": subject.cluster.spec.image_pull_secrets,
                    "nodeSelector": spec.node_selector,
                    "securityContext": pod::security(USER),
                    "topologySpreadConstraints": [{
                        "maxSkew": 1,
                        "topologyKey": "kubernetes.io/hostname",
                        "whenUnsatisfiable": if subject.production() { "DoNotSchedule" } else { "ScheduleAnyway" },
                        "labelSelector": { "matchLabels": names.selector(Component::Postgres) },
                    }],
                    "containers": [{
                        "name": "postgres",
                        "image": spec.image.as_ref().unwrap_or(&subject.images.postgres),
                        "imagePullPolicy": subject.pull_policy(),
                        "command": ["/bin/sh", "/etc/collab/patroni/start.sh"],
                        "env": [
                            value("HOME", "/tmp"),
                            value("PATRONI_SUPERUSER_USERNAME", "postgres"),
                            value("PATRONI_REPLICATION_USERNAME", "standby"),
                            value("PATRONI_RESTAPI_USERNAME", "patroni"),
                            field("PATRONI_NAME", "metadata.name"),
                            field("PATRONI_KUBERNETES_NAMESPACE", "metadata.namespace"),
                            field("PATRONI_KUBERNETES_POD_IP", "status.podIP"),
                            value("PATRONI_POSTGRESQL_CONNECT_ADDRESS", &format!("$(PATRONI_KUBERNETES_POD_IP):{POSTGRES_PORT}")),
                            value("PATRONI_RESTAPI_CONNECT_ADDRESS", &format!("$(PATRONI_KUBERNETES_POD_IP):{PATRONI_PORT}")),
                        ],
                        "ports": [
                            { "name": "postgresql", "containerPort": POSTGRES_PORT, "protocol": "TCP" },
                            { "name": "patroni", "containerPort": PATRONI_PORT, "protocol": "TCP" },
                        ],
                        "readinessProbe": probe("/readiness", 2, 3),
                        "livenessProbe": probe("/liveness", 10, 6),
                        "resources": spec.resources.as_ref().map_or_else(
                            || pod::resources(subject, ["500m", "1Gi", "4Gi"], ["50m", "128Mi", "1Gi"]),
                            |resources| json!(resources),
                        ),
                        "securityContext": pod::container_security(),
                        "volumeMounts": [
                            { "name": "data", "mountPath": "/var/lib/postgresql/data" },
                            { "name": "run", "mountPath": "/run/postgresql" },
                            { "name": "tmp", "mountPath": "/tmp" },
                            { "name": "shm", "mountPath": "/dev/shm" },
                            { "name": "patroni", "mountPath": "/etc/collab/patroni", "readOnly": true },
                            pod::secret_mount("database"),
                        ],
                    }],
                    "volumes": [
                        { "name": "run", "emptyDir": {} },
                        { "name": "tmp", "emptyDir": {} },
                        // The 64 MiB of the container runtime are too few for parallel queries.
                        { "name": "shm", "emptyDir": { "medium": "Memory", "sizeLimit": "256Mi" } },
                        { "name": "patroni", "configMap": { "name": names.postgres() } },
                        pod::secret_volume("database", &names.database_secret(), &[
                            ("superuser-password", "superuser-password"),
                            ("replication-password", "replication-password"),
                            ("password", "password"),
                        ]),
                    ],
                },
            },
            "volumeClaimTemplates": [claim(subject, Component::Postgres, &spec.storage, "10Gi")],
        },
    }))
}

fn hash(files: &BTreeMap<&str, String>) -> String {
    let mut hasher = Sha256::new();
    for (name, text) in files {
        hasher.update(name.as_bytes());
        hasher.update([0]);
        hasher.update(text.as_bytes());
        hasher.update([0]);
    }
    short_hex(&hasher.finalize(), 8)
}
