//! The Helm charts: what must agree with the rest of the repository.
//!
//! `UPDATE=1 cargo test -p collab-tests charts` writes the generated parts anew.

use std::path::PathBuf;

/// Root of the repository.
pub fn repository() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;

    use promql_parser::parser::parse;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn the_operator_chart_carries_the_generated_definition() {
        let generated = read("crds/collabcluster.yaml");
        let copy = "charts/collab-operator/files/collabcluster.yaml";
        if updating() {
            fs::write(repository().join(copy), &generated).unwrap();
        }
        assert!(
            read(copy) == generated,
            "{copy} is stale: run `UPDATE=1 cargo test -p collab-tests charts`"
        );
    }

    #[test]
    fn the_cluster_charts_values_know_every_field_of_the_spec() {
        let path = "charts/collab-cluster/values.schema.json";
        let committed: Value = serde_json::from_str(&read(path)).unwrap();
        let definition: Value = serde_yaml::from_str(&read("crds/collabcluster.yaml")).unwrap();
        let mut spec = definition
            .pointer("/spec/versions/0/schema/openAPIV3Schema/properties/spec")
            .cloned()
            .unwrap();
        close(&mut spec);
        let mut current = committed.clone();
        current["properties"]["spec"] = spec;
        if updating() {
            let text = serde_json::to_string_pretty(&current).unwrap() + "\n";
            fs::write(repository().join(path), text).unwrap();
        } else {
            assert!(
                committed == current,
                "{path} is stale: run `UPDATE=1 cargo test -p collab-tests charts`"
            );
        }
    }

    #[test]
    fn closing_a_schema_refuses_unknown_keys_and_keeps_maps_open() {
        let mut schema = json!({
            "type": "object",
            "properties": {
                "map": {"type": "object", "additionalProperties": {"type": "string"}},
                "size": {"x-kubernetes-int-or-string": true, "anyOf": [{"type": "integer"}, {"type": "string"}]},
                "count": {"type": "integer", "format": "int32", "nullable": true},
            },
            "x-kubernetes-validations": [{"rule": "true"}],
        });
        close(&mut schema);
        let expected = json!({
            "type": "object",
            "additionalProperties": false,
            "properties": {
                "map": {"type": "object", "additionalProperties": {"type": "string"}},
                "size": {"type": ["integer", "string"]},
                "count": {"type": "integer"},
            },
        });
        assert_eq!(schema, expected);
    }

    #[test]
    fn the_charts_are_of_the_version_of_the_binaries() {
        for chart in ["collab-operator", "collab-cluster"] {
            let chart: Value =
                serde_yaml::from_str(&read(&format!("charts/{chart}/Chart.yaml"))).unwrap();
            assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
        }
    }

    #[test]
    fn every_alert_has_its_runbook_and_an_expression_that_parses() {
        let rules = read("charts/collab-cluster/templates/rules.yaml");
        let after = |mark: &str| {
            let lines = rules
                .lines()
                .filter_map(|line| line.trim().strip_prefix(mark))
                .map(str::to_owned);
            lines.collect::<Vec<_>>()
        };
        let alerts = after("- alert: ");
        assert!(!alerts.is_empty());
        let linked = after("runbook_url: {{ .runbookUrl }}/");
        assert_eq!(
            linked,
            alerts
                .iter()
                .map(|alert| format!("{alert}.md"))
                .collect::<Vec<_>>()
        );
        let pages = fs::read_dir(repository().join("docs/runbooks")).unwrap();
        let pages: BTreeSet<_> = pages
            .map(|page| page.unwrap().file_name().into_string().unwrap())
            .collect();
        assert_eq!(pages, linked.into_iter().collect());
        for page in pages {
            let text = read(&format!("docs/runbooks/{page}"));
            for section in ["## Meaning", "## Impact", "## Diagnosis", "## Mitigation"] {
                assert!(text.contains(section), "{page} has no section {section}");
            }
        }
        let expressions = after("expr: ");
        assert_eq!(expressions.len(), alerts.len());
        for expression in expressions {
            parse(&expression.replace("{{ $nodes }}", "{cluster=\"demo\"}"))
                .unwrap_or_else(|error| panic!("{expression}: {error}"));
        }
    }

    /// Turns a schema of a definition into one for values: unknown keys are refused, and what only the API server
    /// understands is left out.
    fn close(schema: &mut Value) {
        if let Some(object) = schema.as_object_mut() {
            if object.remove("x-kubernetes-int-or-string").is_some() {
                object.remove("anyOf");
                object.insert("type".into(), json!(["integer", "string"]));
            }
            object.retain(|key, _| {
                !key.starts_with("x-kubernetes-") && key != "nullable" && key != "format"
            });
            if object.contains_key("properties") {
                object.entry("additionalProperties").or_insert(json!(false));
            }
            if let Some(properties) = object.get_mut("properties").and_then(Value::as_object_mut) {
                properties.values_mut().for_each(close);
            }
            for key in ["items", "additionalProperties"] {
                object.get_mut(key).into_iter().for_each(close);
            }
        }
    }

    fn read(path: &str) -> String {
        fs::read_to_string(repository().join(path))
            .unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    fn updating() -> bool {
        std::env::var_os("UPDATE").is_some()
    }
}
