//! The nodes: their StatefulSet, their headless Service and their account without rights.
//!
//! The StatefulSet has no volumes and is replaced only by the operator (`OnDelete`): a node is
//! drained before its pod goes.

use collab_crds::names::{CLIENT_PORT, Component, INTERNAL_PORT};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::{Service, ServiceAccount};
use serde_json::{Value, json};

use super::{Subject, pod};
use crate::model::Manifest;

/// User and group of the node's image.
const USER: i64 = 65532;
/// A node whose machine is silent is replaced elsewhere after this many seconds; its slots were
/// adopted long before.
const LEAVE_SILENT_MACHINE_SECONDS: i64 = 30;

pub(super) fn objects(subject: &Subject<'_>, replicas: i32) -> Vec<Manifest> {
    vec![
        account(subject),
        headless_service(subject),
        set(subject, replicas),
    ]
}

fn account(subject: &Subject<'_>) -> Manifest {
    Manifest::of::<ServiceAccount>(json!({
        "metadata": subject.metadata(&subject.names().node(), Component::Node),
        "automountServiceAccountToken": false,
    }))
}

fn headless_service(subject: &Subject<'_>) -> Manifest {
    let names = subject.names();
    Manifest::of::<Service>(json!({
        "metadata": subject.metadata(&names.nodes_service(), Component::Node),
        "spec": {
            "clusterIP": "None",
            // Nodes find each other in the store, and must reach a peer that is not ready yet.
            "publishNotReadyAddresses": true,
            "selector": names.selector(Component::Node),
            "ports": [
                { "name": "http", "port": CLIENT_PORT, "targetPort": CLIENT_PORT, "protocol": "TCP" },
                { "name": "internal", "port": INTERNAL_PORT, "targetPort": INTERNAL_PORT, "protocol": "TCP" },
            ],
        },
    }))
}

fn set(subject: &Subject<'_>, replicas: i32) -> Manifest {
    let names = subject.names();
    let spec = &subject.cluster.spec.nodes;
    let mut tolerations = pod::leave_silent_machines(LEAVE_SILENT_MACHINE_SECONDS);
    tolerations.extend(
        spec.tolerations
            .iter()
            .flatten()
            .map(|toleration| json!(toleration)),
    );
    let affinity = spec
        .affinity
        .as_ref()
        .map_or_else(|| away_from_postgres(subject), |affinity| json!(affinity));
    Manifest::of::<StatefulSet>(json!({
        "metadata": subject.metadata(&names.node(), Component::Node),
        "spec": {
            "serviceName": names.nodes_service(),
            "replicas": replicas,
            "podManagementPolicy": "Parallel",
            "updateStrategy": { "type": "OnDelete" },
            "selector": { "matchLabels": names.selector(Component::Node) },
            "template": {
                "metadata": { "labels": names.labels(Component::Node) },
                "spec": {
                    "serviceAccountName": names.node(),
                    "automountServiceAccountToken": false,
                    "enableServiceLinks": false,
                    "terminationGracePeriodSeconds": spec.termination_grace_period_seconds,
                    "imagePullSecrets": subject.cluster.spec.image_pull_secrets,
                    "nodeSelector": spec.node_selector,
                    "tolerations": tolerations,
                    "affinity": affinity,
                    "topologySpreadConstraints": spread(subject),
                    "securityContext": pod::security(USER),
                    "containers": [container(subject)],
                    "volumes": volumes(subject),
                },
            },
        },
    }))
}

fn container(subject: &Subject<'_>) -> Value {
    let spec = &subject.cluster.spec;
    let probe = |path: &str, period: i64, failures: i64| {
        json!({
            "httpGet": { "path": path, "port": INTERNAL_PORT },
            "periodSeconds": period,
            "timeoutSeconds": period.min(5),
            "failureThreshold": failures,
        })
    };
    let mut mounts = vec![
        pod::secret_mount("database"),
        pod::secret_mount("auth"),
        pod::secret_mount("control"),
    ];
    if spec.redis.disabled.is_none() {
        mounts.push(pod::secret_mount("redis"));
    }
    json!({
        "name": "node",
        "image": spec.image.as_ref().unwrap_or(&subject.images.node),
        "imagePullPolicy": subject.pull_policy(),
        "env": environment(subject),
        "ports": [
            { "name": "http", "containerPort": CLIENT_PORT, "protocol": "TCP" },
            { "name": "internal", "containerPort": INTERNAL_PORT, "protocol": "TCP" },
        ],
        // Ready means in service, so it is asked often; alive is asked leniently, because a restart
        // closes every socket.
        "readinessProbe": probe("/readyz", 1, 2),
        "livenessProbe": probe("/healthz", 10, 6),
        "resources": spec.nodes.resources.as_ref().map_or_else(
            || pod::resources(subject, ["500m", "512Mi", "2Gi"], ["50m", "64Mi", "1Gi"]),
            |resources| json!(resources),
        ),
        "securityContext": pod::container_security(),
        "volumeMounts": mounts,
    })
}

fn environment(subject: &Subject<'_>) -> Vec<Value> {
    let field = |name: &str, path: &str| json!({ "name": name, "valueFrom": { "fieldRef": { "apiVersion": "v1", "fieldPath": path } } });
    let value = |name: &str, value: &str| json!({ "name": name, "value": value });
    let redis = if subject.cluster.spec.redis.disabled.is_some() {
        value("COLLAB_REDIS", "none")
    } else {
        value("COLLAB_REDIS_URL_FILE", "/etc/collab/redis/url")
    };
    let mut environment = vec![
        field("POD_IP", "status.podIP"),
        field("COLLAB_NODE_NAME", "metadata.name"),
        field("COLLAB_POD_UID", "metadata.uid"),
        value("COLLAB_ADVERTISE", &format!("$(POD_IP):{INTERNAL_PORT}")),
        value("COLLAB_LISTEN", &format!("0.0.0.0:{CLIENT_PORT}")),
        value(
            "COLLAB_INTERNAL_LISTEN",
            &format!("0.0.0.0:{INTERNAL_PORT}"),
        ),
        value("COLLAB_DATABASE_URL_FILE", "/etc/collab/database/url"),
        redis,
        value("COLLAB_AUTH_SECRET_FILE", "/etc/collab/auth/secret"),
        value("COLLAB_CONTROL_TOKEN_FILE", "/etc/collab/control/token"),
        value(
            "COLLAB_SLOTS",
            &subject.cluster.spec.placement.slots.to_string(),
        ),
        value("COLLAB_LOG_FORMAT", "json"),
    ];
    if let Some(mib) = subject.cluster.spec.nodes.memory_budget_mib {
        environment.push(value("COLLAB_MEMORY_BUDGET_MIB", &mib.to_string()));
    }
    if let Some(issuer) = &subject.cluster.spec.auth.issuer {
        environment.push(value("COLLAB_AUTH_ISSUER", &issuer.url));
        environment.push(value("COLLAB_AUTH_AUDIENCE", &issuer.audience));
        let keys = issuer.jwks_url.as_deref();
        environment.extend(keys.map(|keys| value("COLLAB_AUTH_JWKS_URL", keys)));
    }
    environment
}

fn volumes(subject: &Subject<'_>) -> Vec<Value> {
    let names = subject.names();
    let spec = &subject.cluster.spec;
    let ours = [
        names.database_secret(),
        names.redis(),
        names.auth_secret(),
        names.control_secret(),
    ];
    let [database, redis, auth, control] = ours.each_ref().map(String::as_str);
    let external = |store: &Option<collab_crds::collabcluster::ExternalStore>| {
        store.as_ref().map(|store| store.secret_ref.clone())
    };
    let volume =
        |name: &str, given: Option<collab_crds::collabcluster::SecretKey>, own: &str, key: &str| {
            let (secret, from) = given
                .as_ref()
                .map_or((own, key), |given| pod::reference(given, key));
            pod::secret_volume(name, secret, &[(from, key)])
        };
    let mut volumes = vec![
        volume(
            "database",
            external(&spec.postgres.external),
            database,
            "url",
        ),
        volume("auth", spec.auth.secret_ref.clone(), auth, "secret"),
        volume("control", None, control, "token"),
    ];
    if spec.redis.disabled.is_none() {
        volumes.push(volume(
            "redis",
            external(&spec.redis.external),
            redis,
            "url",
        ));
    }
    volumes
}

fn spread(subject: &Subject<'_>) -> Vec<Value> {
    ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
        .into_iter()
        .map(|topology| {
            json!({
                "maxSkew": 1,
                "topologyKey": topology,
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": { "matchLabels": subject.names().selector(Component::Node) },
            })
        })
        .collect()
}

/// A machine that carries both a node and the Postgres primary takes longer to recover from.
fn away_from_postgres(subject: &Subject<'_>) -> Value {
    if subject.cluster.spec.postgres.managed.is_none() {
        return Value::Null;
    }
    json!({
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{
                "weight": 50,
                "podAffinityTerm": {
                    "topologyKey": "kubernetes.io/hostname",
                    "labelSelector": { "matchLabels": subject.names().selector(Component::Postgres) },
                },
            }],
        },
    })
}
