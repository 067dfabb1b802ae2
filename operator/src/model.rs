//! The nouns that the steps of a reconcile share: what was observed, what is planned, what was done.
//!
//! A leaf: it knows none of the steps. A [`Plan`] prints as text, one line for each thing to do, and
//! that text is what its tests compare.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use collab_core::control::{ClusterReport, MemberReport, MemberState, NodeLoad, PinPlacement};
use collab_core::ids::{DocumentId, NodeId, Term};
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use kube::api::ApiResource;
use serde_json::Value;
use uuid::Uuid;

use crate::plan::pins::Hot;
use crate::plan::rebalance::{Balance, Move, Rounds};
use crate::plan::scaling::{Verdict, Wish};

/// What Kubernetes and the nodes say, read in one pass.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// StatefulSet of the nodes.
    pub node_set: Option<SetView>,
    /// StatefulSet of the managed Postgres.
    pub postgres_set: Option<SetView>,
    /// Whether it is known that the managed Postgres has no StatefulSet and no volume claim.
    pub postgres_is_bare: bool,
    /// StatefulSet of the managed Redis.
    pub redis_set: Option<SetView>,
    /// Pods of the nodes, in order of ordinal.
    pub pods: Vec<PodView>,
    /// The generated Secrets, stored or freshly drawn.
    pub credentials: Credentials,
    /// What the spec names and does not exist, as sentences.
    pub missing: Vec<String>,
    /// PodMonitors in this Kubernetes cluster.
    pub pod_monitor: PodMonitorView,
    /// The cluster as a node reports it.
    pub report: Option<ClusterReport>,
    /// How busy the slots of each node are that tells; nothing unless the load decides over slots.
    pub loads: Vec<NodeLoad>,
    /// Why no node reports, as a sentence; empty when one does.
    pub silence: String,
    /// `host:port` of the node that reported.
    pub reporter: String,
}

impl Observed {
    /// The members that are reported; none without a report.
    pub fn members(&self) -> &[MemberReport] {
        self.report.as_ref().map_or(&[], |report| &report.members)
    }

    /// Slots that no live member owns, also of pinned documents; all of them without a report.
    pub fn unowned(&self, slots: i32) -> i32 {
        let Some(report) = &self.report else {
            return slots;
        };
        let is_owned = |owner: &Option<u16>| {
            owner
                .and_then(|index| report.members.get(usize::from(index)))
                .is_some_and(|member| member.live)
        };
        let owned = report.owners.iter().filter(|owner| is_owned(owner)).count();
        let pins = report.pins.iter().filter(|pin| !is_owned(&pin.owner));
        let unowned_pins = i32::try_from(pins.count()).unwrap_or(i32::MAX);
        slots - i32::try_from(owned).unwrap_or(slots) + unowned_pins
    }
}

/// What matters of a StatefulSet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetView {
    /// Replicas asked for.
    pub replicas: i32,
    /// Pods that are ready.
    pub ready: i32,
    /// Pods of the newest revision.
    pub updated: i32,
    /// Revision of the newest template; `None` until Kubernetes has seen the newest spec.
    pub revision: Option<String>,
}

/// What matters of a node's pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodView {
    /// Name, which is the name of the node.
    pub name: String,
    /// Number at the end of the name.
    pub ordinal: i32,
    /// Uid, so that only this very pod is deleted.
    pub uid: String,
    /// Address, once it has one.
    pub ip: Option<String>,
    /// Whether the kubelet says it is ready.
    pub ready: bool,
    /// Revision of the template it was made from.
    pub revision: String,
    /// When it should have ended, once it was told to.
    pub ends_at: Option<Timestamp>,
    /// Zone of its kube node; `None` while that is unknown, or the kube node is in none.
    pub zone: Option<String>,
    /// Since when its kube node has not been heard of, or does not exist.
    pub lost_since: Option<Timestamp>,
    /// Why its container does not run, such as `ImagePullBackOff`.
    pub trouble: Option<String>,
}

/// PodMonitors in this Kubernetes cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodMonitorView {
    /// The kind is not known here.
    #[default]
    NotServed,
    /// The kind is known, and ours does not exist.
    Absent,
    /// Ours exists.
    Present,
}

/// The Secrets that are generated once and never changed.
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    /// Passwords of the managed Postgres and the URL for the nodes.
    pub database: Option<Credential>,
    /// Password and URL of the managed Redis.
    pub redis: Option<Credential>,
    /// Token of the control API.
    pub control: Option<Credential>,
    /// Key of client tokens.
    pub auth: Option<Credential>,
}

impl Credentials {
    /// Those the cluster needs, in the order of the fields.
    pub fn iter(&self) -> impl Iterator<Item = &Credential> {
        [&self.database, &self.redis, &self.control, &self.auth]
            .into_iter()
            .flatten()
    }
}

/// One generated Secret.
#[derive(Clone)]
pub struct Credential {
    /// Name of the Secret.
    pub name: String,
    /// Whether it exists; if not, `data` is freshly drawn.
    pub stored: bool,
    /// Whether it outlives the cluster when data is retained.
    pub keeps_data: bool,
    /// The part of the cluster it belongs to.
    pub component: collab_crds::names::Component,
    /// Its values.
    pub data: BTreeMap<String, String>,
}

impl fmt::Debug for Credential {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Credential")
            .field("name", &self.name)
            .field("stored", &self.stored)
            .finish_non_exhaustive()
    }
}

/// An object as it is sent to Kubernetes.
#[derive(Clone, Debug)]
pub struct Manifest {
    /// What kind it is.
    pub resource: ApiResource,
    /// Its name.
    pub name: String,
    /// The whole object.
    pub body: Value,
}

impl Manifest {
    /// An object of a kind that `k8s-openapi` knows. Members that are `null` are left out, so that a
    /// builder can write optional ones down plainly.
    pub fn of<K: Resource<DynamicType = ()>>(body: Value) -> Self {
        Self::of_resource(ApiResource::erase::<K>(&()), body)
    }

    /// An object of any kind.
    pub fn of_resource(resource: ApiResource, mut body: Value) -> Self {
        drop_nulls(&mut body);
        body["apiVersion"] = Value::String(resource.api_version.clone());
        body["kind"] = Value::String(resource.kind.clone());
        let name = body["metadata"]["name"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        Self {
            resource,
            name,
            body,
        }
    }
}

fn drop_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(drop_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(drop_nulls),
        _ => {}
    }
}

/// One thing to do. Each can be repeated without harm.
#[derive(Clone, Debug)]
pub enum Action {
    /// Create a Secret that does not exist; fails if it does by now.
    Create(Manifest),
    /// Make an object as described, by server-side apply.
    Apply(Manifest),
    /// Delete an object that is not wanted.
    Delete(Manifest),
    /// Delete one pod; `Force` does not wait for its kubelet.
    DeletePod {
        /// Its name.
        name: String,
        /// Its uid.
        uid: String,
        /// How.
        how: PodDeletion,
    },
    /// Ask for a term of the cluster's store before anything is asked of nodes.
    TakeTerm,
    /// Tell the cluster in which zones nodes run.
    TellZones(BTreeMap<NodeId, String>),
    /// Give a document a slot of its own, or take it back.
    Pin {
        /// The document.
        document: DocumentId,
        /// Give or take back.
        pin: bool,
    },
    /// Ask for this placement.
    Place(Placement),
    /// End the lease of a node that the others do not hear.
    Fence {
        /// The node.
        node: NodeId,
        /// This run of it.
        incarnation: Uuid,
    },
    /// Start the drain of a node, or take it back.
    Drain {
        /// The node.
        node: NodeId,
        /// Start or take back.
        drain: bool,
    },
}

/// How a pod is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodDeletion {
    /// It gets its time to end.
    Graceful,
    /// Its kubelet does not answer: forget it. Safe for nodes, which have no volume and are fenced.
    Force,
}

/// Which node is to own which slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The nodes that may own slots.
    pub nodes: Vec<NodeId>,
    /// For each slot an index into `nodes`.
    pub slots: Vec<u16>,
    /// The same for the slots of pinned documents.
    pub pins: Vec<PinPlacement>,
    /// Slots that are not there yet.
    pub moving: i32,
    /// Short hash of all this.
    pub hash: String,
}

/// What an operator remembers of a cluster between two looks. Losing it is harmless.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    /// The term it acts under.
    pub term: Option<Term>,
    /// Hash of the placement last accepted under that term, and when.
    pub placed: Option<(String, Timestamp)>,
    /// Number of nodes last wanted.
    pub desired: Option<i32>,
    /// When that number last changed.
    pub last_scale: Option<Timestamp>,
    /// Recent wishes of the scaling policy, oldest first.
    pub wishes: Vec<Wish>,
    /// When a node was last lost.
    pub last_failover: Option<Timestamp>,
    /// Moves by load.
    pub rounds: Rounds,
    /// When documents were last hot.
    pub hot: Hot,
    /// What was seen last, to tell people what changed.
    pub seen: Option<Seen>,
}

/// What was seen last.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Nodes that were live, with what they did.
    pub members: BTreeMap<NodeId, MemberState>,
    /// Nodes that are registered, did not leave, and whose lease has ended.
    pub lost: BTreeSet<NodeId>,
    /// Nodes that serve and are in quarantine.
    pub quarantined: BTreeSet<NodeId>,
    /// Slots adopted so far.
    pub adoptions: u64,
    /// Whether the store answered.
    pub store: bool,
}

/// Something that happened, for the Events of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct News {
    /// Whether somebody should look.
    pub gravity: Gravity,
    /// One word.
    pub reason: &'static str,
    /// What the operator did or saw, as a verb.
    pub action: &'static str,
    /// The node it is about.
    pub node: Option<NodeId>,
    /// A sentence.
    pub note: String,
}

/// Whether somebody should look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gravity {
    /// No.
    Normal,
    /// Yes.
    Warning,
}

/// What is to be done, why the rest waits, and what there is to tell.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What to do, in this order.
    pub actions: Vec<Action>,
    /// What is waited for, as sentences.
    pub waits: Vec<String>,
    /// What happened since the last look.
    pub news: Vec<News>,
    /// Number of nodes wanted, and why not another.
    pub scaling: Verdict,
    /// The placement wanted, when there is a node to place on.
    pub placement: Option<Placement>,
    /// How the load lies on the owners; `None` while it is unknown.
    pub balance: Option<Balance>,
    /// Slots that this placement moves because of the load.
    pub moves: Vec<Move>,
    /// Slots that somebody else is to move because of the load.
    pub proposals: Vec<Move>,
    /// Whether pods are replaced because their template changed.
    pub rolling_out: bool,
    /// Whether an object of the cluster is gone, so that all must be applied again.
    pub reapply: bool,
    /// What to remember.
    pub memory: Memory,
}

impl fmt::Display for Plan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(out, "want {}", self.scaling)?;
        for action in &self.actions {
            writeln!(out, "{action}")?;
        }
        for moved in &self.moves {
            writeln!(out, "move {moved}")?;
        }
        for proposal in &self.proposals {
            writeln!(out, "propose to move {proposal}")?;
        }
        for wait in &self.waits {
            writeln!(out, "wait {wait}")?;
        }
        for news in &self.news {
            writeln!(out, "tell {}: {}", news.reason, news.note)?;
        }
        Ok(())
    }
}

impl fmt::Display for Action {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create(manifest) => write!(out, "create {manifest}"),
            Self::Apply(manifest) => write!(out, "apply {manifest}"),
            Self::Delete(manifest) => write!(out, "delete {manifest}"),
            Self::DeletePod { name, how, .. } => match how {
                PodDeletion::Graceful => write!(out, "delete Pod {name}"),
                PodDeletion::Force => write!(out, "delete Pod {name} without waiting"),
            },
            Self::TakeTerm => write!(out, "take a term"),
            Self::TellZones(zones) => {
                write!(out, "tell zones:")?;
                zones
                    .iter()
                    .try_for_each(|(node, zone)| write!(out, " {node} {zone}"))
            }
            Self::Pin {
                document,
                pin: true,
            } => write!(out, "pin {document}"),
            Self::Pin {
                document,
                pin: false,
            } => write!(out, "unpin {document}"),
            Self::Place(placement) => write!(out, "place {placement}"),
            Self::Fence { node, .. } => write!(out, "fence {node}"),
            Self::Drain { node, drain: true } => write!(out, "drain {node}"),
            Self::Drain { node, drain: false } => write!(out, "take back the drain of {node}"),
        }
    }
}

impl fmt::Display for Manifest {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} {}", self.resource.kind, self.name)?;
        match self.body.pointer("/spec/replicas") {
            Some(replicas) => write!(out, " of {replicas}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut counts = vec![0_usize; self.nodes.len()];
        for &node in &self.slots {
            if let Some(count) = counts.get_mut(usize::from(node)) {
                *count += 1;
            }
        }
        write!(out, "{} slots, {} to move:", self.slots.len(), self.moving)?;
        for (node, count) in self.nodes.iter().zip(counts) {
            write!(out, " {node} {count}")?;
        }
        for pin in &self.pins {
            let node = self.nodes.get(usize::from(pin.node));
            let node = node.map_or("nobody", |node| node.0.as_str());
            write!(out, ", {} of a pin {node}", pin.slot)?;
        }
        Ok(())
    }
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Applied {
    /// What failed, as sentences. The rest was done.
    pub failures: Vec<String>,
    /// What to remember, with what was granted and accepted.
    pub memory: Memory,
}
