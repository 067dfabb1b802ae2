//! The Grafana dashboards of the chart, read as Grafana reads them.
//!
//! No Grafana runs in the tests. Instead each dashboard keeps the rules below, every expression is parsed, every
//! metric in it is one that our binaries register, and the tests on a real cluster send [`panel_queries`] to a
//! real Prometheus.

use std::path::PathBuf;

use serde_json::Value;

/// Folder of the dashboards.
pub fn folder() -> PathBuf {
    crate::charts::repository().join("charts/collab-cluster/files")
}

/// Every dashboard of the chart with its file name.
///
/// # Panics
/// When the folder holds something that is no JSON.
pub fn all() -> Vec<(String, Value)> {
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).expect("a dashboard can be read");
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        (
            name,
            serde_json::from_str(&text)
                .unwrap_or_else(|error| panic!("{}: {error}", path.display())),
        )
    };
    let entries = std::fs::read_dir(folder()).expect("the dashboards are in the repository");
    let paths = entries.map(|entry| entry.expect("an entry of the folder").path());
    let mut dashboards: Vec<_> = paths
        .filter(|path| path.extension().is_some_and(|end| end == "json"))
        .map(read)
        .collect();
    dashboards.sort_by(|a, b| a.0.cmp(&b.0));
    dashboards
}

/// Title and expression of every query of every panel, with the dashboard's variables filled in.
///
/// `variables` are pairs of name and value without the dollar sign, such as `("namespace", "demo")`; a variable that is
/// not among them becomes `.*`, Grafana's "All". `$__rate_interval` is 15 s, fit for a scrape every 2 to 3 seconds,
/// unless it is given.
pub fn panel_queries(dashboard: &Value, variables: &[(&str, &str)]) -> Vec<(String, String)> {
    let queries = panels(dashboard).into_iter().flat_map(|panel| {
        let title = text(panel, "title");
        let targets = list(panel, "targets").iter();
        targets.map(move |target| (title.to_owned(), text(target, "expr").to_owned()))
    });
    queries
        .map(|(title, expression)| (title, fill(dashboard, &expression, variables)))
        .collect()
}

fn fill(dashboard: &Value, expression: &str, variables: &[(&str, &str)]) -> String {
    let own = list(&dashboard["templating"], "list")
        .iter()
        .map(|variable| (text(variable, "name"), ".*"));
    let built_in = [("__rate_interval", "15s")];
    let mut values: Vec<_> = variables
        .iter()
        .copied()
        .chain(built_in)
        .chain(own)
        .collect();
    // The longest first, so that $pod does not eat the beginning of $pods; of equal names the given value.
    values.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
    values
        .iter()
        .fold(expression.to_owned(), |filled, (name, value)| {
            filled
                .replace(&format!("${{{name}}}"), value)
                .replace(&format!("${name}"), value)
        })
}

/// All panels that show something: rows are left out, panels folded into them are not.
fn panels(dashboard: &Value) -> Vec<&Value> {
    let inside = |panel| list(panel, "panels").iter();
    let outside = list(dashboard, "panels").iter();
    outside
        .flat_map(|panel| std::iter::once(panel).chain(inside(panel)))
        .filter(|panel| text(panel, "type") != "row")
        .collect()
}

fn list<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::LazyLock;

    use promql_parser::parser::{Expr, parse};
    use promql_parser::util::{ExprVisitor, walk_expr};

    use super::*;
    use crate::charts::repository;

    #[test]
    fn every_dashboard_keeps_the_rules() {
        let dashboards = all();
        assert!(!dashboards.is_empty());
        for (name, dashboard) in &dashboards {
            assert_eq!(problems(dashboard), Vec::<String>::new(), "{name}");
            assert!(!panel_queries(dashboard, &[]).is_empty(), "{name}");
        }
        let uids: BTreeSet<_> = dashboards
            .iter()
            .map(|(_, dashboard)| text(dashboard, "uid"))
            .collect();
        assert_eq!(uids.len(), dashboards.len(), "uids are unique");
    }

    #[test]
    fn every_rule_is_missed_when_it_is_broken() {
        let (_, dashboard) = all().remove(0);
        let first = list(&dashboard, "panels")
            .iter()
            .position(|panel| text(panel, "type") != "row")
            .unwrap();
        let breaks: [(&str, Value, &str); 11] = [
            ("/uid", "".into(), "uid"),
            ("/id", 7.into(), "id"),
            ("/editable", true.into(), "editable"),
            ("/panels/P/title", "".into(), "title"),
            ("/panels/P/description", "".into(), "description"),
            ("/panels/P/fieldConfig/defaults/unit", "".into(), "unit"),
            (
                "/panels/P/datasource/uid",
                "prometheus".into(),
                "data source",
            ),
            (
                "/panels/P/targets/0/datasource/uid",
                "prometheus".into(),
                "data source",
            ),
            (
                "/panels/P/targets/0/expr",
                "sum(collab_connections".into(),
                "parse",
            ),
            (
                "/panels/P/targets/0/expr",
                "sum(collab_connexions)".into(),
                "no metric",
            ),
            (
                "/panels/P/targets/0/expr",
                "sum(collab_adoptions_total)".into(),
                "without rate",
            ),
        ];
        for (pointer, value, complaint) in breaks {
            let mut broken = dashboard.clone();
            *broken
                .pointer_mut(&pointer.replace('P', &first.to_string()))
                .expect(pointer) = value;
            let found = problems(&broken);
            assert!(
                found.iter().any(|problem| problem.contains(complaint)),
                "{pointer}: {found:?}"
            );
        }
    }

    #[test]
    fn variables_are_filled_in_longest_name_first() {
        let dashboard = serde_json::json!({
            "templating": {"list": [{"name": "pod"}, {"name": "cluster"}]},
            "panels": [
                {"type": "row", "title": "no query", "panels": [{"type": "stat", "title": "folded", "targets": [{"expr": "a"}]}]},
                {"type": "stat", "title": "T", "targets": [{"expr": "rate(m{p=~\"$pod\", c=~\"${cluster}\", n=\"$pods\"}[$__rate_interval])"}]},
            ],
        });
        let queries = panel_queries(&dashboard, &[("pods", "x"), ("cluster", "demo")]);
        let expected = "rate(m{p=~\".*\", c=~\"demo\", n=\"x\"}[15s])";
        assert_eq!(
            queries,
            [
                ("folded".to_owned(), "a".to_owned()),
                ("T".to_owned(), expected.to_owned())
            ]
        );
    }

    #[test]
    fn every_metric_is_documented_and_every_documented_metric_exists() {
        let page = std::fs::read_to_string(repository().join("docs/metrics.md")).unwrap();
        let rows = page
            .lines()
            .filter_map(|line| line.strip_prefix("| `collab_"));
        let documented: BTreeSet<_> = rows
            .filter_map(|row| row.split(['`', '{']).next())
            .map(|name| format!("collab_{name}"))
            .collect();
        let registered: BTreeSet<_> = METRICS.keys().cloned().collect();
        assert_eq!(documented, registered);
    }

    /// What is wrong with a dashboard, as sentences.
    #[allow(clippy::too_many_lines, reason = "a list of rules")]
    fn problems(dashboard: &Value) -> Vec<String> {
        let mut found = Vec::new();
        let mut expect = |right: bool, problem: String| found.extend((!right).then_some(problem));
        for key in ["uid", "title", "description"] {
            expect(
                !text(dashboard, key).is_empty(),
                format!("the dashboard has no {key}"),
            );
        }
        expect(
            dashboard["id"].is_null(),
            "the id belongs to one Grafana and must be null".into(),
        );
        expect(
            dashboard["editable"] == false,
            "editable must be false: the file is the source".into(),
        );
        expect(
            !list(dashboard, "tags").is_empty(),
            "the dashboard has no tags".into(),
        );

        let variables = list(&dashboard["templating"], "list");
        let names: BTreeSet<_> = variables
            .iter()
            .map(|variable| text(variable, "name"))
            .collect();
        for name in ["datasource", "namespace", "cluster", "pod"] {
            expect(names.contains(name), format!("variable {name} is missing"));
        }
        for variable in variables
            .iter()
            .filter(|variable| text(variable, "type") == "query")
        {
            let name = text(variable, "name");
            expect(
                uses_variable(variable),
                format!("variable {name} has a fixed data source"),
            );
            expect(
                variable["refresh"] == 2,
                format!("variable {name} is not refreshed when the time changes"),
            );
            let query = text(&variable["query"], "query");
            let selector = query
                .strip_prefix("label_values(")
                .and_then(|rest| rest.rsplit_once(", "))
                .map(|(selector, _)| selector);
            expect(
                selector.is_some(),
                format!("variable {name} has no label_values(SELECTOR, LABEL)"),
            );
            for problem in expression_problems(dashboard, selector.unwrap_or_default()) {
                expect(false, format!("variable {name}: {problem}"));
            }
        }
        for annotation in list(&dashboard["annotations"], "list") {
            expect(
                uses_variable(annotation),
                "an annotation has a fixed data source".into(),
            );
            for problem in expression_problems(dashboard, text(annotation, "expr")) {
                expect(
                    false,
                    format!("annotation {}: {problem}", text(annotation, "name")),
                );
            }
        }

        let shown = panels(dashboard);
        let ids: BTreeSet<_> = list(dashboard, "panels")
            .iter()
            .map(|panel| panel["id"].to_string())
            .collect();
        expect(
            ids.len() == list(dashboard, "panels").len(),
            "two panels have the same id".into(),
        );
        let titles: BTreeSet<_> = shown.iter().map(|panel| text(panel, "title")).collect();
        expect(
            titles.len() == shown.len(),
            "two panels have the same title".into(),
        );
        for panel in shown {
            let title = text(panel, "title");
            expect(
                !title.is_empty(),
                format!("panel {} has no title", panel["id"]),
            );
            expect(
                !text(panel, "description").is_empty(),
                format!("{title}: no description"),
            );
            expect(
                !text(&panel["fieldConfig"]["defaults"], "unit").is_empty(),
                format!("{title}: no unit"),
            );
            expect(uses_variable(panel), format!("{title}: fixed data source"));
            expect(
                !list(panel, "targets").is_empty(),
                format!("{title}: no query"),
            );
            for target in list(panel, "targets") {
                expect(
                    uses_variable(target),
                    format!("{title}: a query has a fixed data source"),
                );
                let expression = text(target, "expr");
                let selected = ["$namespace", "$cluster", "$pod"]
                    .iter()
                    .all(|variable| expression.contains(variable));
                expect(selected, format!("{title}: a query ignores a variable"));
                for problem in expression_problems(dashboard, expression) {
                    expect(false, format!("{title}: {problem}"));
                }
            }
        }
        found
    }

    fn uses_variable(holder: &Value) -> bool {
        text(&holder["datasource"], "uid") == "${datasource}"
    }

    /// What is wrong with one expression.
    fn expression_problems(dashboard: &Value, expression: &str) -> Vec<String> {
        let fixed_range = expression
            .split('[')
            .skip(1)
            .any(|range| !range.starts_with("$__rate_interval]"));
        let mut found: Vec<_> = fixed_range
            .then(|| "a range is not $__rate_interval".to_owned())
            .into_iter()
            .collect();
        match parse(&fill(dashboard, expression, &[])) {
            Err(error) => found.push(format!("does not parse: {error}")),
            Ok(tree) => {
                let mut selectors = Selectors::default();
                walk_expr(&mut selectors, &tree).expect("the visitor has no error");
                found.extend(
                    selectors
                        .0
                        .into_iter()
                        .filter_map(|(name, over_time)| misuse(&name, over_time)),
                );
            }
        }
        found
    }

    /// Metrics of an expression, each with whether it stands under a range.
    #[derive(Default)]
    struct Selectors(Vec<(String, bool)>);

    impl ExprVisitor for Selectors {
        type Error = std::convert::Infallible;

        fn pre_visit(&mut self, expression: &Expr) -> Result<bool, Self::Error> {
            match expression {
                Expr::VectorSelector(vector) => self
                    .0
                    .push((vector.name.clone().unwrap_or_default(), false)),
                Expr::MatrixSelector(matrix) => self
                    .0
                    .push((matrix.vs.name.clone().unwrap_or_default(), true)),
                _ => {}
            }
            Ok(true)
        }
    }

    fn misuse(name: &str, over_time: bool) -> Option<String> {
        let of_process = [
            ("process_resident_memory_bytes", "gauge"),
            ("process_cpu_seconds_total", "counter"),
        ];
        let histogram = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|end| name.strip_suffix(end));
        let kind = METRICS.get(name).map(String::as_str);
        let kind = kind.or_else(|| {
            of_process
                .iter()
                .find(|(process, _)| *process == name)
                .map(|(_, kind)| *kind)
        });
        let kind = kind.or_else(|| {
            histogram
                .and_then(|base| METRICS.get(base))
                .map(String::as_str)
        });
        match (kind, over_time) {
            (None, _) => Some(format!("no metric {name} is registered")),
            (Some("gauge"), true) => Some(format!("{name} is a gauge under a range")),
            (Some("counter" | "histogram"), false) => {
                Some(format!("{name} is used without rate or increase"))
            }
            (Some(_), _) => None,
        }
    }

    /// Name and type of every metric that the binaries register, from the lists that they keep beside their sources.
    static METRICS: LazyLock<BTreeMap<String, String>> = LazyLock::new(|| {
        let lists = ["node/metrics.txt", "operator/metrics.txt"].map(|list| {
            std::fs::read_to_string(repository().join(list))
                .unwrap_or_else(|error| panic!("{list}: {error}"))
        });
        let lines = lists.iter().flat_map(|list| list.lines());
        lines
            .filter_map(|line| {
                let mut words = line.split(' ');
                Some((words.next()?.to_owned(), words.next()?.to_owned()))
            })
            .collect()
    });
}
