//! What the project agrees on with Kubernetes: the [`CollabCluster`] resource, the conditions in
//! its status, and the names and labels of everything the operator makes for it.
//!
//! The schema is derived from these types; `crdgen` prints it and `collabcluster.yaml` beside this
//! package is its output. Fields outlive code: they are added, never altered.

pub mod collabcluster;
pub mod conditions;
pub mod names;

pub use collabcluster::{CollabCluster, CollabClusterSpec, CollabClusterStatus};

use kube::CustomResourceExt as _;
use serde_json::Value;

/// The definition as YAML, as `crdgen` prints it.
///
/// # Panics
/// Never: a definition made of the types of this package is serializable.
pub fn definition() -> String {
    let mut definition =
        serde_json::to_value(CollabCluster::crd()).expect("a definition is plain data");
    drop_nullable(&mut definition);
    serde_yaml::to_string(&definition).expect("a definition is plain data")
}

/// An optional field is derived as nullable, and then a rule's `has()` counts an explicit `null` as
/// present. Without that mark the API server refuses `null` and names the field.
fn drop_nullable(value: &mut Value) {
    match value {
        Value::Object(members) => {
            if members.get("nullable") == Some(&Value::Bool(true)) {
                members.remove("nullable");
            }
            members.values_mut().for_each(drop_nullable);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nullable),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_definition_is_fresh() {
        assert!(
            definition() == include_str!("../collabcluster.yaml"),
            "run: cargo run -p collab-crds --bin crdgen > crds/collabcluster.yaml"
        );
    }

    #[test]
    fn every_field_says_what_it_is() {
        fn without_words(value: &Value, path: &str, found: &mut Vec<String>) {
            let Some(properties) = value.get("properties").and_then(Value::as_object) else {
                return;
            };
            for (name, property) in properties {
                let path = format!("{path}.{name}");
                if property.get("description").is_none()
                    && !path.starts_with(".spec.nodes.affinity")
                {
                    found.push(path.clone());
                }
                without_words(property, &path, found);
            }
        }
        let definition: Value = serde_yaml::from_str(&definition()).unwrap();
        let schema = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let mut found = Vec::new();
        without_words(&schema["properties"]["spec"], ".spec", &mut found);
        without_words(&schema["properties"]["status"], ".status", &mut found);
        assert!(found.is_empty(), "{found:?}");
    }

    #[test]
    fn the_shortest_manifest_is_whole() {
        let cluster: CollabCluster = serde_yaml::from_str(
            "{apiVersion: collabcluster.io/v1alpha1, kind: CollabCluster, metadata: {name: demo}, spec: {profile: Dev}}",
        )
        .unwrap();
        assert!(cluster.spec.postgres.managed.is_some());
        assert!(cluster.spec.redis.managed.is_some());
        assert_eq!(cluster.spec.nodes.replicas, 3);
        assert_eq!(cluster.spec.placement.slots, 1024);
    }

    #[test]
    fn a_name_that_fits_makes_names_that_fit() {
        let longest = "a".repeat(40);
        let names = names::Names(&longest);
        // A Service has 63 characters; a StatefulSet 52, because its pods carry its name and a hash.
        assert!(names.postgres_replicas().len() <= 63);
        assert!(names.postgres().len() <= 52);
    }

    #[test]
    fn conditions_are_merged_by_type() {
        let definition: Value = serde_yaml::from_str(&definition()).unwrap();
        let conditions = &definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
            ["status"]["properties"]["conditions"];
        assert_eq!(conditions["x-kubernetes-list-type"], "map");
        assert_eq!(
            conditions["x-kubernetes-list-map-keys"],
            serde_json::json!(["type"])
        );
    }
}
