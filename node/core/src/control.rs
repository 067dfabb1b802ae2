//! Types of the control API: what the operator reads from nodes and what it asks of them.
//!
//! HTTP/JSON on a node's internal listener, with `Authorization: Bearer <control token>`. Any live
//! node answers for the whole cluster, because what it reports and changes stands in the store; only the
//! load in detail is asked of each node.
//!
//! | call | body | answer |
//! |--|--|--|
//! | `GET /control/v1/report` | – | [`ClusterReport`] |
//! | `GET /control/v1/load` | – | [`NodeLoad`] |
//! | `POST /control/v1/term` | [`TermRequest`] | [`TermGranted`] |
//! | `PUT /control/v1/placement` | [`PlacementRequest`] | 204, or 409 [`TermRefused`] |
//! | `POST /control/v1/drain` | [`DrainRequest`] | 204, or 409 [`TermRefused`] |
//! | `PUT /control/v1/zones` | [`ZonesRequest`] | 204, or 409 [`TermRefused`] |
//! | `POST /control/v1/pin` | [`PinRequest`] | 204, or 409 [`TermRefused`] |
//! | `POST /control/v1/fence` | [`FenceRequest`] | 204, or 409 [`TermRefused`] |
//!
//! Every change names a [`Term`]; a term older than the newest granted one is refused with 409, so
//! an operator that lost its leadership cannot undo what its successor did.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ids::{DocumentId, NodeId, Slot, Term};
use crate::quarantine::Quarantine;

/// The cluster as one node sees it in the store, at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterReport {
    /// The node that answered.
    pub reporter: NodeId,
    /// The newest term that was granted; 0 before the first.
    pub term: Term,
    /// Number of slots of the cluster, fixed at its creation.
    pub slots: u16,
    /// One entry for each registered process that has not left, in order of node name.
    pub members: Vec<MemberReport>,
    /// Who owns each slot now: index into [`ClusterReport::members`], `null` when nobody who is
    /// registered does. `owners[slot]`; its length is [`ClusterReport::slots`].
    pub owners: Vec<Option<u16>>,
    /// Which member is to own each slot by the placement in force, in the form of
    /// [`ClusterReport::owners`]: `null` when it is no member. Empty before the first placement.
    #[serde(default)]
    pub planned: Vec<Option<u16>>,
    /// The documents that have a slot of their own, in order of slot.
    #[serde(default)]
    pub pins: Vec<PinReport>,
    /// Slots whose handoff is under way.
    pub moving: u16,
    /// Highest map revision in the store.
    pub revision: u64,
    /// The state of the database behind the cluster.
    pub store: StoreReport,
    /// `true` when Redis answers the reporter, `false` when it does not, `null` when it is disabled.
    pub redis: Option<bool>,
    /// Slots adopted after a node was lost, since the cluster exists.
    pub adoptions: u64,
}

/// What a node says of the database.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoreReport {
    /// Version as the server prints it, such as `15.18`.
    pub version: String,
    /// `true` when the primary waits for at least one standby.
    pub synchronous_standby: bool,
    /// Timeline of the primary; changes with each failover of the database.
    pub timeline: String,
}

/// A document that has a slot of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PinReport {
    /// The document.
    pub document: DocumentId,
    /// Its virtual slot, a number from [`ClusterReport::slots`] on.
    pub slot: Slot,
    /// Who owns it: index into [`ClusterReport::members`], as in [`ClusterReport::owners`].
    pub owner: Option<u16>,
    /// Who is to own it, as in [`ClusterReport::planned`].
    pub planned: Option<u16>,
}

/// One process that is registered as a member.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemberReport {
    /// Name of the node; on Kubernetes the name of its pod.
    pub node: NodeId,
    /// This run of the node.
    pub incarnation: Uuid,
    /// Uid of the pod, or whatever else outlives the process.
    pub pod_uid: String,
    /// `host:port` of its internal listener.
    pub address: String,
    /// Zone, empty when unknown.
    pub zone: String,
    /// What the member is doing.
    pub state: MemberState,
    /// Its lease has not ended by the database's clock.
    pub live: bool,
    /// Slots it owns, those of pinned documents too.
    pub slots_owned: u16,
    /// Its load when it last renewed; `null` before the first sample.
    pub load: Option<LoadSample>,
    /// Age of that sample in milliseconds.
    pub load_age_ms: u64,
    /// Set while its node is given few slots or none, because it lost its lease too often.
    #[serde(default)]
    pub quarantine: Option<Quarantine>,
}

/// What a member is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum MemberState {
    /// Owns slots and accepts clients.
    #[default]
    Active,
    /// Hands its slots over and then closes its client sockets.
    Draining,
    /// Owns nothing and has no clients: its process may be ended.
    Drained,
}

impl MemberState {
    /// The spelling in the store and in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Active => "Active",
            Self::Draining => "Draining",
            Self::Drained => "Drained",
        }
    }

    /// Parses the spelling of [`MemberState::as_str`].
    pub fn parse(text: &str) -> Option<Self> {
        [Self::Active, Self::Draining, Self::Drained]
            .into_iter()
            .find(|state| state.as_str() == text)
    }
}

/// The load of one node, sampled when it renews its lease.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LoadSample {
    /// Client sockets that are open on this node's edge.
    pub connections: u32,
    /// Documents open at their owner here.
    pub documents: u32,
    /// Documents whose stored rows are damaged, so that only a part of them is served, read-only.
    #[serde(default)]
    pub degraded: u32,
    /// Resident memory of the process in bytes.
    pub resident_bytes: u64,
    /// Other members whose lease goes on and whom this node does not hear.
    #[serde(default)]
    pub silences: Vec<Silence>,
}

/// A member that another one does not hear.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Silence {
    /// The member that is not heard.
    pub node: NodeId,
    /// For how many milliseconds, at least [`crate::limits::SILENT_AFTER`].
    pub ms: u64,
}

/// What one node owns and how busy that is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeLoad {
    /// This run of the node.
    pub incarnation: Uuid,
    /// The slots with an open document, in order; the load of any other slot is nothing.
    pub slots: Vec<SlotLoad>,
    /// The busiest documents, the busiest first, at most [`crate::limits::BUSY_DOCUMENTS_MAX`].
    pub documents: Vec<DocumentLoad>,
}

/// The load of one slot at its owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SlotLoad {
    /// The slot.
    pub slot: Slot,
    /// Open documents.
    pub documents: u32,
    /// What goes on in them.
    #[serde(flatten)]
    pub activity: Activity,
}

/// The load of one document at its owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DocumentLoad {
    /// The document.
    pub document: DocumentId,
    /// What goes on in it.
    #[serde(flatten)]
    pub activity: Activity,
}

/// What goes on in documents, averaged over some tens of seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Activity {
    /// Client sockets, on whichever edge.
    pub connections: u32,
    /// Updates that were logged, per minute.
    pub updates_per_minute: u32,
    /// Their bytes, per second.
    pub bytes_per_second: u32,
}

impl Activity {
    /// The load in points. One is about what a quiet connection costs its owner: presence now and then, and a
    /// copy of the updates of others. An update per second counts ten, because it is scanned, applied,
    /// logged and passed on; a KiB per second counts one more.
    pub const fn points(self) -> u64 {
        self.connections as u64
            + self.updates_per_minute as u64 / 6
            + self.bytes_per_second as u64 / 1024
    }

    /// Both together.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            connections: self.connections.saturating_add(other.connections),
            updates_per_minute: self
                .updates_per_minute
                .saturating_add(other.updates_per_minute),
            bytes_per_second: self.bytes_per_second.saturating_add(other.bytes_per_second),
        }
    }
}

/// Asks for a new term.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TermRequest {
    /// Who will act under it, for humans.
    pub holder: String,
}

/// A term that nobody else has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TermGranted {
    /// Greater than every term granted before.
    pub term: Term,
}

/// The answer 409: a newer term exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TermRefused {
    /// The newest term.
    pub current: Term,
}

/// What the planner wants: which node is to own which slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlacementRequest {
    /// The term the operator acts under.
    pub term: Term,
    /// Names of nodes, referred to by index.
    pub nodes: Vec<NodeId>,
    /// `slots[slot]` is an index into [`PlacementRequest::nodes`]; length = number of slots.
    pub slots: Vec<u16>,
    /// The slots of pinned documents.
    #[serde(default)]
    pub pins: Vec<PinPlacement>,
}

/// Which node is to own the slot of a pinned document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PinPlacement {
    /// The virtual slot.
    pub slot: Slot,
    /// Index into [`PlacementRequest::nodes`].
    pub node: u16,
}

/// Starts or ends the drain of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DrainRequest {
    /// The term the operator acts under.
    pub term: Term,
    /// The node.
    pub node: NodeId,
    /// `false` takes a drain back.
    pub drain: bool,
}

/// Ends the lease of a member, whose slots others then adopt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FenceRequest {
    /// The term the operator acts under.
    pub term: Term,
    /// The run of the node. Its process goes on as a new one, without slots.
    pub incarnation: Uuid,
}

/// Gives a document a slot of its own, or takes it back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PinRequest {
    /// The term the operator acts under.
    pub term: Term,
    /// The document.
    pub document: DocumentId,
    /// `false` takes a pin back.
    pub pin: bool,
}

/// Says in which zones nodes run: nodes cannot know, since they do not speak to Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ZonesRequest {
    /// The term the operator acts under.
    pub term: Term,
    /// Zone by node; of others nothing is said.
    pub zones: BTreeMap<NodeId, String>,
}
