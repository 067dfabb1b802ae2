//! Condition types and reasons, spelled once.

/// Summary: the cluster serves and is as the spec says.
pub const READY: &str = "Ready";
/// Every slot has a live owner and at least one node takes clients.
pub const AVAILABLE: &str = "Available";
/// Something is on its way: nodes start, slots move, a rollout or a scaling runs.
pub const PROGRESSING: &str = "Progressing";
/// Something is broken that does not mend by waiting a moment.
pub const DEGRADED: &str = "Degraded";
/// The database answers.
pub const POSTGRES_READY: &str = "PostgresReady";
/// Redis answers, or is disabled.
pub const REDIS_READY: &str = "RedisReady";
/// Every slot is where the plan wants it.
pub const PLACEMENT_CONVERGED: &str = "PlacementConverged";
/// The operator can read the load and change the number of nodes.
pub const ABLE_TO_SCALE: &str = "AbleToScale";
/// The wanted number of nodes is held back by a bound, a window or a cooldown.
pub const SCALING_LIMITED: &str = "ScalingLimited";
/// Every pod runs what the spec says.
pub const UP_TO_DATE: &str = "UpToDate";
/// The operator looks but does not touch.
pub const SUSPENDED: &str = "Suspended";

/// All of them, in the order they are shown in.
pub const ALL: [&str; 11] = [
    READY,
    AVAILABLE,
    PROGRESSING,
    DEGRADED,
    POSTGRES_READY,
    REDIS_READY,
    PLACEMENT_CONVERGED,
    ABLE_TO_SCALE,
    SCALING_LIMITED,
    UP_TO_DATE,
    SUSPENDED,
];

/// Reasons, one word each for machines.
pub mod reason {
    /// All is well, or the condition holds for its usual reason.
    pub const AS_EXPECTED: &str = "AsExpected";
    /// Pods are not up yet.
    pub const STARTING: &str = "Starting";
    /// No node answers the operator.
    pub const NO_NODE_ANSWERS: &str = "NoNodeAnswers";
    /// Slots have no live owner.
    pub const SLOTS_UNOWNED: &str = "SlotsUnowned";
    /// Slots are on their way to another owner.
    pub const SLOTS_MOVING: &str = "SlotsMoving";
    /// Nodes are being added.
    pub const SCALING_OUT: &str = "ScalingOut";
    /// A node is drained before it is removed.
    pub const SCALING_IN: &str = "ScalingIn";
    /// Pods are replaced one at a time.
    pub const ROLLING_OUT: &str = "RollingOut";
    /// A node lost its lease so often that it is given few slots or none for a while.
    pub const NODE_QUARANTINED: &str = "NodeQuarantined";
    /// The database does not answer.
    pub const POSTGRES_UNAVAILABLE: &str = "PostgresUnavailable";
    /// Redis does not answer.
    pub const REDIS_UNAVAILABLE: &str = "RedisUnavailable";
    /// The feature is turned off in the spec.
    pub const DISABLED: &str = "Disabled";
    /// The number of nodes is that of the spec.
    pub const FIXED_SIZE: &str = "FixedSize";
    /// A node has no fresh load sample.
    pub const LOAD_UNKNOWN: &str = "LoadUnknown";
    /// More nodes would be wanted than `maxNodes`.
    pub const TOO_MANY_NODES: &str = "TooManyNodes";
    /// Fewer nodes would be enough than `minNodes`.
    pub const TOO_FEW_NODES: &str = "TooFewNodes";
    /// The load has not been low for long enough.
    pub const SCALE_DOWN_WINDOW: &str = "ScaleDownWindow";
    /// The load has not been high for long enough.
    pub const SCALE_UP_WINDOW: &str = "ScaleUpWindow";
    /// A node was lost a short while ago.
    pub const COOLDOWN_AFTER_FAILOVER: &str = "CooldownAfterFailover";
    /// Nodes are missing: they are waited for before any is removed.
    pub const WAITS_FOR_NODES: &str = "WaitsForNodes";
    /// `spec.suspended` is true.
    pub const SUSPENDED: &str = "Suspended";
    /// Something the spec names is missing or unfit.
    pub const DEPENDENCY_MISSING: &str = "DependencyMissing";
    /// The operator could not apply its plan.
    pub const APPLY_FAILED: &str = "ApplyFailed";
    /// Not looked at yet.
    pub const UNKNOWN: &str = "Unknown";
}
