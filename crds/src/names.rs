//! Names and labels, spelled once. Scripts, dashboards and people rely on them.

use std::collections::BTreeMap;

/// Field manager of everything the operator applies.
pub const FIELD_MANAGER: &str = "collab-operator";
/// Field manager of the status.
pub const STATUS_MANAGER: &str = "collab-operator-status";
/// Value of `app.kubernetes.io/name` on everything that belongs to a cluster.
pub const APP: &str = "collabcluster";
/// Label with the name of the cluster.
pub const INSTANCE_LABEL: &str = "app.kubernetes.io/instance";
/// Label with the [`Component`].
pub const COMPONENT_LABEL: &str = "app.kubernetes.io/component";
/// Selects everything that an operator manages.
pub const MANAGED_SELECTOR: &str = "app.kubernetes.io/managed-by=collab-operator";
/// On pod templates: hash of configuration that is not in the template, so that a change of it
/// restarts the pods.
pub const CONFIG_HASH_ANNOTATION: &str = "collabcluster.io/config-hash";

/// Port of a node that clients use.
pub const CLIENT_PORT: i32 = 8080;
/// Port of a node for health, metrics, control API and peers.
pub const INTERNAL_PORT: i32 = 8081;
/// Port of Postgres.
pub const POSTGRES_PORT: i32 = 5432;
/// Port of Patroni's REST API.
pub const PATRONI_PORT: i32 = 8008;
/// Port of Redis.
pub const REDIS_PORT: i32 = 6379;

/// The parts of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Component {
    /// Our nodes.
    Node,
    /// The managed Postgres.
    Postgres,
    /// The managed Redis.
    Redis,
}

impl Component {
    /// Value of the component label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Postgres => "postgres",
            Self::Redis => "redis",
        }
    }
}

/// Names of the objects of one cluster.
#[derive(Clone, Copy, Debug)]
pub struct Names<'a>(pub &'a str);

impl Names<'_> {
    /// StatefulSet, disruption budget and ServiceAccount of the nodes.
    pub fn node(self) -> String {
        format!("{}-node", self.0)
    }

    /// Pod of the node with this ordinal, which is also the node's name.
    pub fn node_pod(self, ordinal: i32) -> String {
        format!("{}-node-{ordinal}", self.0)
    }

    /// Headless Service of the nodes.
    pub fn nodes_service(self) -> String {
        format!("{}-nodes", self.0)
    }

    /// Service that clients connect to.
    pub fn client_service(self) -> String {
        self.0.to_owned()
    }

    /// StatefulSet, Patroni scope, primary Service, ServiceAccount and ConfigMap of Postgres.
    pub fn postgres(self) -> String {
        format!("{}-postgres", self.0)
    }

    /// Service of the read replicas.
    pub fn postgres_replicas(self) -> String {
        format!("{}-postgres-replicas", self.0)
    }

    /// StatefulSet, Service and Secret of Redis.
    pub fn redis(self) -> String {
        format!("{}-redis", self.0)
    }

    /// Secret with the passwords of Postgres and the URL of the nodes.
    pub fn database_secret(self) -> String {
        format!("{}-database", self.0)
    }

    /// Secret with the bearer token of the control API.
    pub fn control_secret(self) -> String {
        format!("{}-control", self.0)
    }

    /// Secret with the key of client tokens.
    pub fn auth_secret(self) -> String {
        format!("{}-auth", self.0)
    }

    /// The labels that select one part; never changed, because selectors are immutable.
    pub fn selector(self, component: Component) -> BTreeMap<String, String> {
        BTreeMap::from([
            ("app.kubernetes.io/name".to_owned(), APP.to_owned()),
            (INSTANCE_LABEL.to_owned(), self.0.to_owned()),
            (COMPONENT_LABEL.to_owned(), component.as_str().to_owned()),
        ])
    }

    /// The labels of an object of one part.
    pub fn labels(self, component: Component) -> BTreeMap<String, String> {
        let mut labels = self.selector(component);
        labels.insert(
            "app.kubernetes.io/managed-by".to_owned(),
            FIELD_MANAGER.to_owned(),
        );
        labels
    }

    /// The selector of the node pods as text, for `/scale`.
    pub fn node_selector_text(self) -> String {
        self.selector(Component::Node)
            .into_iter()
            .map(|(key, value)| format!("{key}={value}"))
            .collect::<Vec<_>>()
            .join(",")
    }
}
