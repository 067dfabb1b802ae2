//! CollabCluster: one collaboration backend, described by a person and kept so by the operator.
//!
//! Every field has a default, so `spec: {profile: Dev}` is a whole manifest. Durations are integers
//! with the unit in the name. Rules that the schema cannot express are CEL rules beside the fields;
//! each message names the field to change. Whether something outside the object exists (a Secret,
//! a volume) is not a rule but a condition in the status.

// `KubeSchema` repeats each struct inside a function, where its `pub` reaches nothing.
#![allow(unreachable_pub)]

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, LocalObjectReference, ResourceRequirements, Toleration,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the cluster should be.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "collabcluster.io",
    version = "v1alpha1",
    kind = "CollabCluster",
    plural = "collabclusters",
    singular = "collabcluster",
    shortname = "collab",
    namespaced,
    status = "CollabClusterStatus",
    derive = "PartialEq",
    doc = "A collaboration backend for Yjs editors: nodes, their Postgres and their Redis.",
    scale(
        spec_replicas_path = ".spec.nodes.replicas",
        status_replicas_path = ".status.nodes.replicas",
        label_selector_path = ".status.nodes.selector"
    ),
    printcolumn(name = "Ready", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].status"#, description = "Whether the cluster serves and is as the spec says"),
    printcolumn(name = "Nodes", type_ = "integer", json_path = ".status.nodes.ready", description = "Nodes that are ready"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".status.nodes.desired", description = "Nodes that are wanted"),
    printcolumn(name = "Conns", type_ = "integer", json_path = ".status.load.connections", description = "Open client connections"),
    printcolumn(name = "Moving", type_ = "integer", json_path = ".status.ring.moving", description = "Slots on their way to another owner"),
    printcolumn(name = "Reason", type_ = "string", json_path = r#".status.conditions[?(@.type=="Ready")].reason"#, description = "Why it is ready or not"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Ring", type_ = "string", json_path = ".status.ring.hash", priority = 1, description = "Hash of the placement"),
    printcolumn(name = "Max/Mean", type_ = "integer", json_path = ".status.load.maxToMeanPercent", priority = 1, description = "Connections of the busiest node in percent of the mean"),
    printcolumn(name = "Postgres", type_ = "string", json_path = ".status.postgres.mode", priority = 1),
    printcolumn(name = "Redis", type_ = "string", json_path = ".status.redis.mode", priority = 1),
    printcolumn(name = "Image", type_ = "string", json_path = ".status.image", priority = 1),
    validation = Rule::new("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && self.metadata.name.size() <= 40")
        .message("metadata.name must be at most 40 lower-case letters, digits and dashes, beginning with a letter: the names of Services and pods are made from it")
)]
#[serde(rename_all = "camelCase")]
pub struct CollabClusterSpec {
    /// `Production` asks for a Postgres that survives the loss of a machine and for real resources;
    /// `Dev` fits a laptop. Only defaults differ.
    #[serde(default)]
    pub profile: Profile,

    /// While `true`, the operator reports but changes nothing. Nodes go on serving and take over from
    /// each other.
    #[serde(default)]
    pub suspended: bool,

    /// What becomes of volumes, the database Secret and the auth Secret when this object is deleted.
    #[serde(default)]
    pub deletion_policy: DeletionPolicy,

    /// Image of the nodes. Default: the one that belongs to the operator's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,

    /// When images are pulled, for all pods. Default: as the operator is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_pull_policy: Option<ImagePullPolicy>,

    /// Secrets with credentials for the registries, for all pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 16))]
    pub image_pull_secrets: Option<Vec<LocalObjectReference>>,

    /// The nodes.
    #[serde(default)]
    pub nodes: NodesSpec,

    /// How documents are placed on nodes.
    #[serde(default)]
    pub placement: PlacementSpec,

    /// Number of nodes by number of connections.
    #[serde(default)]
    pub autoscaling: AutoscalingSpec,

    /// Who may connect.
    #[serde(default)]
    pub auth: AuthSpec,

    /// Where documents are stored: exactly one of `managed` and `external`.
    #[serde(default = "PostgresSpec::managed_by_default")]
    #[x_kube(
        validation = Rule::new("[has(self.managed), has(self.external)].filter(given, given).size() == 1")
            .message("spec.postgres must have exactly one of managed and external"),
        validation = Rule::new("has(self.managed) == has(oldSelf.managed)")
            .message("spec.postgres cannot change between managed and external: the documents would stay behind")
    )]
    pub postgres: PostgresSpec,

    /// Where presence and caches are kept: exactly one of `managed`, `external` and `disabled`. What is
    /// saved never depends on it.
    #[serde(default = "RedisSpec::managed_by_default")]
    #[x_kube(
        validation = Rule::new("[has(self.managed), has(self.external), has(self.disabled)].filter(given, given).size() == 1")
            .message("spec.redis must have exactly one of managed, external and disabled"),
        validation = Rule::new("has(self.managed) == has(oldSelf.managed)")
            .message("spec.redis cannot change between managed and the other kinds")
    )]
    pub redis: RedisSpec,

    /// How the cluster is watched.
    #[serde(default)]
    pub monitoring: MonitoringSpec,

    /// How clients reach the cluster.
    #[serde(default)]
    pub gateway: GatewaySpec,
}

/// Which defaults are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Profile {
    /// Three Postgres instances, and resources for real load.
    #[default]
    Production,
    /// One Postgres instance, and resources for a laptop.
    Dev,
}

/// What becomes of data when the object is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DeletionPolicy {
    /// Volumes and the Secrets that open them stay; a cluster of the same name finds them.
    #[default]
    Retain,
    /// Volumes and Secrets are deleted with the object.
    Delete,
}

/// When images are pulled. Default: as the operator is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImagePullPolicy {
    /// At each start.
    Always,
    /// When the kube node does not have them.
    IfNotPresent,
    /// Never: the kube node must have them.
    Never,
}

impl ImagePullPolicy {
    /// The spelling of Kubernetes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Always => "Always",
            Self::IfNotPresent => "IfNotPresent",
            Self::Never => "Never",
        }
    }
}

/// The nodes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodesSpec {
    /// Number of nodes. Ignored while autoscaling is enabled; never written by the operator.
    #[serde(default = "NodesSpec::default_replicas")]
    #[schemars(range(min = 0, max = 500))]
    pub replicas: i32,

    /// Compute resources of a node's container. Default: by profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,

    /// Memory in MiB that a node's open documents may take, as estimated from what is in them. Beyond it those that nobody has
    /// open are unloaded, and then no more are opened. Default: four fifths of the container's limit are for everything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub memory_budget_mib: Option<i32>,

    /// Time in seconds that a node has to hand over its slots and to close its sockets.
    #[serde(default = "NodesSpec::default_grace")]
    #[schemars(range(min = 30, max = 600))]
    pub termination_grace_period_seconds: i64,

    /// Labels that a kube node must have to carry our nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<BTreeMap<String, String>>,

    /// Taints that the pods bear, beside the ones the operator sets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 32))]
    pub tolerations: Option<Vec<Toleration>>,

    /// Where the pods go. Replaces the operator's preference to stay away from Postgres.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
}

impl NodesSpec {
    const fn default_replicas() -> i32 {
        3
    }

    const fn default_grace() -> i64 {
        120
    }
}

impl Default for NodesSpec {
    fn default() -> Self {
        Self {
            replicas: Self::default_replicas(),
            resources: None,
            memory_budget_mib: None,
            termination_grace_period_seconds: Self::default_grace(),
            node_selector: None,
            tolerations: None,
            affinity: None,
        }
    }
}

/// How documents are placed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlacementSpec {
    /// Number of slots the documents are divided into. Cannot be changed.
    #[serde(default = "PlacementSpec::default_slots")]
    #[x_kube(
        validation = Rule::new("self in [256, 512, 1024, 2048, 4096, 8192, 16384]")
            .message("spec.placement.slots must be a power of two from 256 to 16384"),
        validation = Rule::new("self == oldSelf")
            .message("spec.placement.slots cannot be changed: every document belongs to a slot by it")
    )]
    pub slots: i32,

    /// What decides over the owner of a slot, beside the ring.
    #[serde(default)]
    pub policy: PlacementPolicy,

    /// Most slots that a node may be given, in percent of its even share. With 100 every node has just its
    /// share, and nothing is moved by load.
    #[serde(default = "PlacementSpec::default_max_load")]
    #[schemars(range(min = 100, max = 400))]
    pub max_load_percent: i32,

    /// How slots are moved by load. Only with `policy: BoundedLoad`.
    #[serde(default)]
    pub rebalance: RebalanceSpec,

    /// Which documents get a slot of their own, so that they are moved alone and their neighbours away from
    /// them.
    #[serde(default)]
    pub hot_documents: HotDocumentsSpec,
}

/// What decides over the owner of a slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PlacementPolicy {
    /// Even shares of slots; an owner keeps what it has; slots are moved by load.
    #[default]
    BoundedLoad,
    /// The first node of the slot's order on the ring, whatever that comes to.
    Ring,
}

/// How slots are moved by load.
///
/// At most 32 a round; a slot that was moved rests for five minutes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RebalanceSpec {
    /// `Auto` moves; `Manual` only tells in the status what would be moved.
    #[serde(default)]
    pub mode: PlacementMode,

    /// Time in seconds between two rounds.
    #[serde(default = "RebalanceSpec::default_interval")]
    #[schemars(range(min = 10, max = 3600))]
    pub interval_seconds: i32,

    /// Slots on their way at the same time.
    #[serde(default = "RebalanceSpec::default_moves")]
    #[schemars(range(min = 1, max = 64))]
    pub max_concurrent_moves: i32,

    /// How far the busiest node may be above the mean, in percent, before a slot is moved.
    #[serde(default = "RebalanceSpec::default_imbalance")]
    #[schemars(range(min = 5, max = 100))]
    pub imbalance_percent: i32,
}

impl RebalanceSpec {
    const fn default_interval() -> i32 {
        30
    }

    const fn default_moves() -> i32 {
        8
    }

    const fn default_imbalance() -> i32 {
        15
    }
}

impl Default for RebalanceSpec {
    fn default() -> Self {
        Self {
            mode: PlacementMode::default(),
            interval_seconds: Self::default_interval(),
            max_concurrent_moves: Self::default_moves(),
            imbalance_percent: Self::default_imbalance(),
        }
    }
}

/// Who acts on the load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PlacementMode {
    /// The operator.
    #[default]
    Auto,
    /// A person.
    Manual,
}

/// Which documents get a slot of their own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HotDocumentsSpec {
    /// `Auto` pins a document while it is hot; `Manual` only those in `pinned`.
    #[serde(default)]
    pub mode: PlacementMode,

    /// Load from which a document is hot, in percent of the mean load of a node.
    #[serde(default = "HotDocumentsSpec::default_load")]
    #[schemars(range(min = 10, max = 1000))]
    pub load_percent: i32,

    /// Ids of documents that are pinned whatever their load.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 255)))]
    pub pinned: Vec<String>,
}

impl HotDocumentsSpec {
    const fn default_load() -> i32 {
        50
    }
}

impl Default for HotDocumentsSpec {
    fn default() -> Self {
        Self {
            mode: PlacementMode::default(),
            load_percent: Self::default_load(),
            pinned: Vec::new(),
        }
    }
}

impl PlacementSpec {
    const fn default_slots() -> i32 {
        1024
    }

    const fn default_max_load() -> i32 {
        125
    }
}

impl Default for PlacementSpec {
    fn default() -> Self {
        Self {
            slots: Self::default_slots(),
            policy: PlacementPolicy::default(),
            max_load_percent: Self::default_max_load(),
            rebalance: RebalanceSpec::default(),
            hot_documents: HotDocumentsSpec::default(),
        }
    }
}

/// Number of nodes by number of connections.
///
/// wanted = ceil(connections × (100 + headroomPercent) / 100 / targetConnectionsPerNode), between
/// `minNodes` and `maxNodes`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.maxNodes >= self.minNodes")
    .message("spec.autoscaling.maxNodes must not be less than spec.autoscaling.minNodes"))]
pub struct AutoscalingSpec {
    /// Whether the operator chooses the number of nodes.
    #[serde(default)]
    pub enabled: bool,

    /// Fewest nodes.
    #[serde(default = "AutoscalingSpec::default_min_nodes")]
    #[schemars(range(min = 1, max = 500))]
    pub min_nodes: i32,

    /// Most nodes.
    #[serde(default = "AutoscalingSpec::default_max_nodes")]
    #[schemars(range(min = 1, max = 500))]
    pub max_nodes: i32,

    /// Connections that one node should carry.
    #[serde(default = "AutoscalingSpec::default_target")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub target_connections_per_node: i32,

    /// Room kept free for the next connections, in percent of the present ones.
    #[serde(default = "AutoscalingSpec::default_headroom")]
    #[schemars(range(min = 0, max = 400))]
    pub headroom_percent: i32,

    /// Deviation from the target, in percent, that changes nothing.
    #[serde(default = "AutoscalingSpec::default_tolerance")]
    #[schemars(range(min = 0, max = 50))]
    pub tolerance_percent: i32,

    /// Time in seconds for which more nodes must be wanted before some are added.
    #[serde(default)]
    #[schemars(range(min = 0, max = 3600))]
    pub scale_up_window_seconds: i32,

    /// Time in seconds for which fewer nodes must be enough before one is removed.
    #[serde(default = "AutoscalingSpec::default_scale_down_window")]
    #[schemars(range(min = 0, max = 3600))]
    pub scale_down_window_seconds: i32,

    /// Time in seconds after the loss of a node in which none is removed.
    #[serde(default = "AutoscalingSpec::default_cooldown")]
    #[schemars(range(min = 0, max = 3600))]
    pub cooldown_after_failover_seconds: i32,
}

impl AutoscalingSpec {
    const fn default_min_nodes() -> i32 {
        2
    }

    const fn default_max_nodes() -> i32 {
        10
    }

    const fn default_target() -> i32 {
        2000
    }

    const fn default_headroom() -> i32 {
        20
    }

    const fn default_tolerance() -> i32 {
        10
    }

    const fn default_scale_down_window() -> i32 {
        300
    }

    const fn default_cooldown() -> i32 {
        300
    }
}

impl Default for AutoscalingSpec {
    fn default() -> Self {
        Self {
            enabled: false,
            min_nodes: Self::default_min_nodes(),
            max_nodes: Self::default_max_nodes(),
            target_connections_per_node: Self::default_target(),
            headroom_percent: Self::default_headroom(),
            tolerance_percent: Self::default_tolerance(),
            scale_up_window_seconds: 0,
            scale_down_window_seconds: Self::default_scale_down_window(),
            cooldown_after_failover_seconds: Self::default_cooldown(),
        }
    }
}

/// One key of a Secret in the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key in it. Default: `url` for a store, `secret` for auth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub key: Option<String>,
}

/// Who may connect.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AuthSpec {
    /// The secret that signs client tokens (JWT, HS256). Default: one is generated into the Secret
    /// `NAME-auth`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretKey>,
    /// An identity provider whose tokens are accepted beside those that are signed with the secret.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<IssuerSpec>,
}

/// An identity provider.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct IssuerSpec {
    /// Its address, as `iss` of its tokens has it. Its keys are found by `OpenID` Connect Discovery.
    #[schemars(length(max = 2048), regex(pattern = r"^https://[^/?#]+"))]
    pub url: String,
    /// For whom its tokens have to be, as `aud` has it.
    #[schemars(length(min = 1, max = 256))]
    pub audience: String,
    /// Where its keys are (a JWK Set), if it has no Discovery.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 2048), regex(pattern = r"^https://[^/?#]+"))]
    pub jwks_url: Option<String>,
}

/// A store that is not ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ExternalStore {
    /// Where its URL is kept.
    pub secret_ref: SecretKey,
}

/// Volume of a stateful pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StorageSpec {
    /// Size of each volume, such as `10Gi`. Default: 10Gi for Postgres, 1Gi for Redis.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^[1-9][0-9]*(Mi|Gi|Ti)$"))]
    pub size: Option<String>,
    /// StorageClass of the volumes. Default: that of the Kubernetes cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub storage_class_name: Option<String>,
}

/// Where documents are stored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PostgresSpec {
    /// A Postgres that the operator runs, with Patroni.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<ManagedPostgres>,
    /// A Postgres that exists. Its URL is `postgres://USER:PASSWORD@HOST:PORT/DATABASE`; the user owns
    /// the database.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalStore>,
}

impl PostgresSpec {
    fn managed_by_default() -> Self {
        Self {
            managed: Some(ManagedPostgres::default()),
            external: None,
        }
    }
}

/// A Postgres that the operator runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ManagedPostgres {
    /// Number of instances: 1, or 3 with synchronous replication and failover. Default: 3, with
    /// `profile: Dev` 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self in [1, 3]")
        .message("spec.postgres.managed.instances must be 1 or 3"))]
    pub instances: Option<i32>,

    /// Its volumes. Cannot be changed in this version.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf")
        .message("spec.postgres.managed.storage cannot be changed"))]
    pub storage: StorageSpec,

    /// Compute resources of an instance. Default: by profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,

    /// Labels that a kube node must have to carry an instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<BTreeMap<String, String>>,

    /// Image with Postgres and Patroni. Default: the one that belongs to the operator's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
}

/// Where presence and caches are kept.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RedisSpec {
    /// A Redis that the operator runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub managed: Option<ManagedRedis>,
    /// A Redis that exists. Its URL is `redis://:PASSWORD@HOST:PORT/DATABASE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub external: Option<ExternalStore>,
    /// No Redis: presence goes over the links between nodes alone, and nothing is cached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disabled: Option<Disabled>,
}

impl RedisSpec {
    fn managed_by_default() -> Self {
        Self {
            managed: Some(ManagedRedis::default()),
            ..Self::default()
        }
    }
}

/// Nothing to say: `disabled: {}`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Disabled {}

/// A Redis that the operator runs.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ManagedRedis {
    /// Number of instances: 1 in this version. Default: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[x_kube(validation = Rule::new("self == 1")
        .message("spec.redis.managed.instances must be 1"))]
    pub instances: Option<i32>,

    /// Its volume. Cannot be changed in this version.
    #[serde(default)]
    #[x_kube(validation = Rule::new("self == oldSelf")
        .message("spec.redis.managed.storage cannot be changed"))]
    pub storage: StorageSpec,

    /// Compute resources. Default: by profile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<ResourceRequirements>,

    /// Labels that a kube node must have to carry it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<BTreeMap<String, String>>,

    /// Image with Redis. Default: the one that belongs to the operator's version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
}

/// How the cluster is watched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct MonitoringSpec {
    /// Whether a PodMonitor for the Prometheus operator is made.
    #[serde(default)]
    pub pod_monitor: PodMonitorMode,
}

/// Whether a PodMonitor is made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PodMonitorMode {
    /// If the Kubernetes cluster knows PodMonitors.
    #[default]
    Auto,
    /// Yes; the status says so when it is impossible.
    Enabled,
    /// No.
    Disabled,
}

/// How clients reach the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GatewaySpec {
    /// Type of the Service that clients connect to.
    #[serde(default)]
    pub service_type: ServiceType,
}

/// Type of a Service.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ServiceType {
    /// Reachable inside the Kubernetes cluster, and through an ingress or gateway.
    #[default]
    ClusterIP,
    /// A port on every kube node.
    NodePort,
    /// A load balancer of the cloud.
    LoadBalancer,
}

impl ServiceType {
    /// The spelling of Kubernetes.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ClusterIP => "ClusterIP",
            Self::NodePort => "NodePort",
            Self::LoadBalancer => "LoadBalancer",
        }
    }
}

/// What the cluster is, as the operator last saw it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct CollabClusterStatus {
    /// Generation of the spec that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// The nodes.
    #[serde(default)]
    pub nodes: NodesStatus,
    /// The placement.
    #[serde(default)]
    pub ring: RingStatus,
    /// The load.
    #[serde(default)]
    pub load: LoadStatus,
    /// The database.
    #[serde(default)]
    pub postgres: StoreStatus,
    /// Redis.
    #[serde(default)]
    pub redis: StoreStatus,
    /// Image that the nodes should run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// When the wanted number of nodes last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scale_time: Option<Time>,
    /// Conditions; all types are present from the first look on.
    #[serde(default)]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// The nodes as seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodesStatus {
    /// Nodes that are wanted.
    #[serde(default)]
    pub desired: i32,
    /// Pods that exist.
    #[serde(default)]
    pub replicas: i32,
    /// Pods that are ready.
    #[serde(default)]
    pub ready: i32,
    /// Nodes that hand over their slots.
    #[serde(default)]
    pub draining: i32,
    /// Nodes that are given few slots or none, because they lost their leases too often.
    #[serde(default)]
    pub quarantined: i32,
    /// Label selector of the pods, as text.
    #[serde(default)]
    pub selector: String,
    /// Live nodes and their slots by zone, in order of name; a zone that is not known has an empty name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<ZoneStatus>,
}

/// A zone as seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ZoneStatus {
    /// Its name, from the label `topology.kubernetes.io/zone` of the kube nodes.
    #[serde(default)]
    pub name: String,
    /// Live nodes in it.
    #[serde(default)]
    pub nodes: i32,
    /// Slots that they own.
    #[serde(default)]
    pub slots: i32,
}

/// The placement as seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RingStatus {
    /// Highest revision of the map of slots.
    #[serde(default)]
    pub revision: i64,
    /// Number of slots.
    #[serde(default)]
    pub slots: i32,
    /// Slots without a live owner.
    #[serde(default)]
    pub unowned: i32,
    /// Slots that are not yet where the plan wants them.
    #[serde(default)]
    pub moving: i32,
    /// Documents that have a slot of their own, beside the number of slots.
    #[serde(default)]
    pub pinned: i32,
    /// Term under which the operator acts.
    #[serde(default)]
    pub term: i64,
    /// Hash of the placement that was last asked for.
    #[serde(default)]
    pub hash: String,
}

/// The load as seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadStatus {
    /// Open client connections of all nodes.
    #[serde(default)]
    pub connections: i64,
    /// Open documents of all nodes.
    #[serde(default)]
    pub documents: i64,
    /// Connections of the busiest node in percent of the mean.
    #[serde(default)]
    pub max_to_mean_percent: i64,
    /// Load of the documents of the busiest owner in percent of the mean; this is what slots are moved by.
    /// Absent while it is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner_max_to_mean_percent: Option<i64>,
    /// The busiest slot, of a pinned document if its number is beyond those of the others. Absent while there
    /// is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hottest_slot: Option<i32>,
}

/// A store as seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StoreStatus {
    /// `Managed`, `External` or `Disabled`.
    #[serde(default)]
    pub mode: String,
    /// `host:port` of a managed store; empty for others, whose URL is a secret.
    #[serde(default)]
    pub endpoint: String,
    /// Version as the server says it; empty while unknown.
    #[serde(default)]
    pub version: String,
    /// Instances that are ready, of a managed store.
    #[serde(default)]
    pub ready: i32,
}
