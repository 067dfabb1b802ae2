//! The Kubernetes objects of a cluster, one file for each kind of thing. Pure.
//!
//! Objects are written as JSON, as in the documentation of Kubernetes; a test reads each back through
//! its type, and the API server refuses unknown fields. What is not set is left out, so that
//! server-side apply leaves it to others.

mod auth;
mod client_service;
mod control;
mod disruption_budget;
mod nodes;
mod pod;
mod pod_monitor;
mod postgres;
mod redis;

use collab_crds::CollabCluster;
use collab_crds::collabcluster::{DeletionPolicy, Profile};
use collab_crds::names::{Component, Names};
use k8s_openapi::api::core::v1::Secret;
use kube::{Resource as _, ResourceExt as _};
use serde_json::{Value, json};

use crate::config::Images;
use crate::model::{Action, Credential, Manifest, Observed};

pub use auth::draw as draw_auth;
pub use control::draw as draw_control;
pub use pod_monitor::resource as pod_monitor_resource;
pub use postgres::draw as draw_database;
pub use redis::draw as draw_redis;

/// Everything there is to create, apply and delete for a cluster with this many node pods.
pub fn all(
    cluster: &CollabCluster,
    images: &Images,
    observed: &Observed,
    replicas: i32,
) -> Vec<Action> {
    let name = cluster.name_any();
    let subject = Subject {
        cluster,
        images,
        name: &name,
    };
    let mut actions = Vec::new();
    for credential in observed.credentials.iter() {
        if !credential.stored {
            actions.push(Action::Create(subject.secret(credential)));
        }
        actions.push(Action::Apply(subject.secret_metadata(credential)));
    }
    let mut objects = Vec::new();
    if cluster.spec.postgres.managed.is_some() {
        if observed.postgres_is_bare {
            actions.extend(postgres::leftovers(&subject).map(Action::Delete));
        }
        objects.extend(postgres::objects(&subject));
    }
    if cluster.spec.redis.managed.is_some() {
        objects.extend(redis::objects(&subject));
    }
    objects.extend(nodes::objects(&subject, replicas));
    objects.push(client_service::object(&subject));
    objects.push(disruption_budget::object(&subject, Component::Node));
    actions.extend(objects.into_iter().map(Action::Apply));
    actions.extend(pod_monitor::action(&subject, observed.pod_monitor));
    actions
}

/// What every builder needs to know.
struct Subject<'a> {
    cluster: &'a CollabCluster,
    images: &'a Images,
    name: &'a str,
}

impl Subject<'_> {
    fn names(&self) -> Names<'_> {
        Names(self.name)
    }

    fn production(&self) -> bool {
        self.cluster.spec.profile == Profile::Production
    }

    fn deletes_data(&self) -> bool {
        self.cluster.spec.deletion_policy == DeletionPolicy::Delete
    }

    /// Metadata of an object that goes when the cluster goes.
    fn metadata(&self, name: &str, component: Component) -> Value {
        let mut metadata = self.metadata_of_data(name, component);
        metadata["ownerReferences"] = json!([self.cluster.controller_owner_ref(&())]);
        metadata
    }

    /// Metadata of an object that opens or orders the data: it goes with the cluster only if the data
    /// goes too.
    fn metadata_of_data(&self, name: &str, component: Component) -> Value {
        json!({
            "name": name,
            "namespace": self.cluster.namespace(),
            "labels": self.names().labels(component),
            "ownerReferences": self.deletes_data().then(|| [self.cluster.controller_owner_ref(&())]),
        })
    }

    fn secret(&self, credential: &Credential) -> Manifest {
        Manifest::of::<Secret>(json!({
            "metadata": {
                "name": credential.name,
                "namespace": self.cluster.namespace(),
                "labels": self.names().labels(credential.component),
            },
            "type": "Opaque",
            "stringData": credential.data,
        }))
    }

    /// Labels and ownership only: the values belong to whoever created them and are never applied.
    fn secret_metadata(&self, credential: &Credential) -> Manifest {
        let metadata = if credential.keeps_data {
            self.metadata_of_data(&credential.name, credential.component)
        } else {
            self.metadata(&credential.name, credential.component)
        };
        Manifest::of::<Secret>(json!({ "metadata": metadata }))
    }

    fn pull_policy(&self) -> &'static str {
        self.cluster
            .spec
            .image_pull_policy
            .unwrap_or(self.images.pull_policy)
            .as_str()
    }
}

/// The first bytes of a digest in hexadecimal.
pub fn short_hex(digest: &[u8], bytes: usize) -> String {
    digest
        .iter()
        .take(bytes)
        .fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

/// A password that needs no quoting anywhere: 32 letters and digits, 190 bits.
fn password(random: &mut impl rand::Rng) -> String {
    use rand::distr::{Alphanumeric, SampleString as _};
    Alphanumeric.sample_string(random, 32)
}

#[cfg(test)]
pub(crate) mod tests {
    use k8s_openapi::api::apps::v1::StatefulSet;
    use k8s_openapi::api::core::v1::{ConfigMap, Service, ServiceAccount};
    use k8s_openapi::api::policy::v1::PodDisruptionBudget;
    use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
    use serde::Serialize;
    use serde::de::DeserializeOwned;

    use super::*;
    use crate::model::{Credentials, PodMonitorView};

    pub(crate) fn images() -> Images {
        Images {
            node: "example.com/collab-node:1".to_owned(),
            postgres: "example.com/collab-postgres:1".to_owned(),
            redis: "example.com/collab-redis:1".to_owned(),
            pull_policy: collab_crds::collabcluster::ImagePullPolicy::IfNotPresent,
        }
    }

    pub(crate) fn cluster(spec: &str) -> CollabCluster {
        let mut cluster: CollabCluster = serde_yaml::from_str(&format!(
            "{{apiVersion: collabcluster.io/v1alpha1, kind: CollabCluster, metadata: {{name: demo, namespace: docs, uid: u-1, generation: 1}}, spec: {spec}}}"
        ))
        .unwrap();
        cluster.metadata.generation = Some(1);
        cluster
    }

    /// The credentials of a cluster, with values that are the same in every run.
    pub(crate) fn credentials(stored: bool) -> Credentials {
        let credential = |name: &str, keeps_data, component| {
            Some(Credential {
                name: format!("demo-{name}"),
                stored,
                keeps_data,
                component,
                data: [("key".to_owned(), "value".to_owned())].into(),
            })
        };
        Credentials {
            database: credential("database", true, Component::Postgres),
            redis: credential("redis", false, Component::Redis),
            control: credential("control", false, Component::Node),
            auth: credential("auth", true, Component::Node),
        }
    }

    fn manifests(spec: &str) -> Vec<Manifest> {
        let observed = Observed {
            credentials: credentials(false),
            pod_monitor: PodMonitorView::Absent,
            ..Observed::default()
        };
        all(&cluster(spec), &images(), &observed, 3)
            .into_iter()
            .filter_map(|action| match action {
                Action::Create(manifest) | Action::Apply(manifest) => Some(manifest),
                _ => None,
            })
            .collect()
    }

    fn as_yaml(manifests: &[Manifest]) -> String {
        let documents: Vec<String> = manifests
            .iter()
            .map(|manifest| serde_yaml::to_string(&manifest.body).unwrap())
            .collect();
        documents.join("---\n")
    }

    #[test]
    fn the_objects_of_a_dev_cluster() {
        insta::assert_snapshot!(as_yaml(&manifests("{profile: Dev}")));
    }

    #[test]
    fn the_objects_of_a_production_cluster_with_everything_set() {
        insta::assert_snapshot!(as_yaml(&manifests(
            "{image: 'example.com/own:2', imagePullPolicy: Always, imagePullSecrets: [{name: pull}], deletionPolicy: Delete,
              nodes: {replicas: 5, memoryBudgetMib: 700, terminationGracePeriodSeconds: 60, nodeSelector: {pool: collab},
                resources: {requests: {cpu: '1'}, limits: {memory: 3Gi}},
                tolerations: [{key: collab, operator: Exists}], affinity: {nodeAffinity: {}}},
              placement: {slots: 256}, gateway: {serviceType: LoadBalancer},
              auth: {secretRef: {name: own, key: hmac}, issuer: {url: 'https://id.example.com/realm', audience: editor, jwksUrl: 'https://id.example.com/keys'}}, monitoring: {podMonitor: Enabled},
              postgres: {managed: {instances: 3, storage: {size: 50Gi, storageClassName: fast}, nodeSelector: {pool: data}, image: 'example.com/pg:2'}},
              redis: {disabled: {}}}"
        )));
    }

    #[test]
    fn external_stores_are_only_mounted() {
        let manifests = manifests(
            "{postgres: {external: {secretRef: {name: pg}}}, redis: {external: {secretRef: {name: cache, key: uri}}}}",
        );
        let sets: Vec<_> = manifests
            .iter()
            .filter(|manifest| manifest.resource.kind == "StatefulSet")
            .collect();
        let [nodes] = sets.as_slice() else {
            panic!("only the nodes are a StatefulSet");
        };
        insta::assert_snapshot!(
            serde_yaml::to_string(&nodes.body["spec"]["template"]["spec"]["volumes"]).unwrap()
        );
    }

    /// A field that is spelled wrong would vanish here.
    #[test]
    fn every_field_is_one_that_kubernetes_knows() {
        fn read<K: DeserializeOwned + Serialize>(manifest: &Manifest) -> Value {
            serde_json::to_value(serde_json::from_value::<K>(manifest.body.clone()).unwrap())
                .unwrap()
        }
        for spec in ["{profile: Dev}", "{deletionPolicy: Delete}"] {
            for manifest in manifests(spec) {
                let read = match manifest.resource.kind.as_str() {
                    "ConfigMap" => read::<ConfigMap>(&manifest),
                    "PodDisruptionBudget" => read::<PodDisruptionBudget>(&manifest),
                    "Role" => read::<Role>(&manifest),
                    "RoleBinding" => read::<RoleBinding>(&manifest),
                    "Secret" => read::<Secret>(&manifest),
                    "Service" => read::<Service>(&manifest),
                    "ServiceAccount" => read::<ServiceAccount>(&manifest),
                    "StatefulSet" => read::<StatefulSet>(&manifest),
                    "PodMonitor" => continue,
                    other => panic!("{other} is not checked"),
                };
                assert_eq!(read, manifest.body, "{manifest}");
            }
        }
    }

    /// Pod Security "restricted", as far as it is about pod templates like ours.
    #[test]
    fn every_pod_is_restricted() {
        for manifest in manifests("{profile: Dev}") {
            let Some(pod) = manifest.body.pointer("/spec/template/spec") else {
                continue;
            };
            let security = &pod["securityContext"];
            assert_eq!(security["runAsNonRoot"], true, "{manifest}");
            assert_eq!(
                security["seccompProfile"]["type"], "RuntimeDefault",
                "{manifest}"
            );
            for container in pod["containers"].as_array().unwrap() {
                let security = &container["securityContext"];
                assert_eq!(security["allowPrivilegeEscalation"], false, "{manifest}");
                assert_eq!(security["readOnlyRootFilesystem"], true, "{manifest}");
                assert_eq!(
                    security["capabilities"]["drop"],
                    json!(["ALL"]),
                    "{manifest}"
                );
            }
        }
    }

    #[test]
    fn what_opens_retained_data_has_no_owner() {
        let owned = |spec| -> Vec<String> {
            manifests(spec)
                .iter()
                .filter(|manifest| manifest.body["metadata"].get("ownerReferences").is_some())
                .map(ToString::to_string)
                .collect()
        };
        let retained = owned("{profile: Dev}");
        for name in [
            "Secret demo-database",
            "Secret demo-auth",
            "Service demo-postgres-config",
            "Service demo-postgres-sync",
        ] {
            assert!(!retained.contains(&name.to_owned()), "{name}");
            assert!(
                owned("{profile: Dev, deletionPolicy: Delete}").contains(&name.to_owned()),
                "{name}"
            );
        }
        assert!(retained.contains(&"Secret demo-control".to_owned()));
    }
}
