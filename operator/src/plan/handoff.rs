//! Which node is to own which slot, and how far a node is with handing its slots over.

use std::collections::BTreeSet;

use collab_core::control::{ClusterReport, MemberReport, MemberState};
use collab_core::ids::NodeId;
use collab_core::ring::{Ring, RingNode, plan_placement};
use sha2::{Digest as _, Sha256};

use crate::build::short_hex;
use crate::model::{Observed, Placement, PodView};

/// How a node stands, over all processes that are registered under its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing is registered under the name: nothing can be lost with it.
    Absent,
    /// Its lease has ended; it still holds this many slots until others adopt them.
    Lost {
        /// Slots it holds.
        slots: u32,
    },
    /// Serves.
    Active,
    /// Hands over.
    Draining {
        /// Slots it still holds.
        slots: u32,
    },
    /// Holds nothing and has no clients: may be ended.
    Drained,
}

impl Standing {
    /// Whether its process may be ended without anybody noticing.
    pub fn is_empty(self) -> bool {
        matches!(self, Self::Absent | Self::Drained | Self::Lost { slots: 0 })
    }
}

/// How the node of this name stands, over all processes that are registered under it. Only
/// meaningful when there is a report.
pub fn standing(observed: &Observed, node: &str) -> Standing {
    standing_of(observed, |member| member.node.0 == node)
}

/// How the processes of this very pod stand, not those of its predecessors of the same name.
pub fn pod_standing(observed: &Observed, pod: &PodView) -> Standing {
    standing_of(observed, |member| {
        member.node.0 == pod.name && member.pod_uid == pod.uid
    })
}

fn standing_of(observed: &Observed, is_meant: impl Fn(&MemberReport) -> bool) -> Standing {
    let meant = || observed.members().iter().filter(|member| is_meant(member));
    let slots = meant().map(|member| u32::from(member.slots_owned)).sum();
    let live = meant().filter(|member| member.live);
    match live
        .map(|member| member.state)
        .min_by_key(|state| *state as u8)
    {
        Some(MemberState::Active) => Standing::Active,
        Some(MemberState::Drained) if slots == 0 => Standing::Drained,
        Some(MemberState::Draining | MemberState::Drained) => Standing::Draining { slots },
        None if meant().next().is_none() => Standing::Absent,
        None => Standing::Lost { slots },
    }
}

/// The nodes that serve: live and not on their way out.
pub fn active_nodes(report: &ClusterReport) -> BTreeSet<NodeId> {
    report
        .members
        .iter()
        .filter(|member| member.live && member.state == MemberState::Active)
        .map(|member| member.node.clone())
        .collect()
}

/// The placement over the serving nodes less those that are `leaving`; `None` when none is left.
///
/// Owners keep what they have where they can, so the same answer comes out until members change.
pub fn placement(report: &ClusterReport, leaving: &BTreeSet<NodeId>) -> Option<Placement> {
    let staying = active_nodes(report)
        .into_iter()
        .filter(|node| !leaving.contains(node))
        .map(RingNode::normal);
    let ring = Ring::new(staying, report.slots);
    if ring.nodes().is_empty() {
        return None;
    }
    let current: Vec<Option<NodeId>> = report
        .owners
        .iter()
        .map(|owner| {
            let member = report.members.get(usize::from((*owner)?))?;
            member.live.then(|| member.node.clone())
        })
        .collect();
    let slots = plan_placement(&ring, &[], &current, 100);
    let moving = slots
        .iter()
        .enumerate()
        .filter(|(slot, node)| {
            let now = current.get(*slot).and_then(Option::as_ref);
            now != ring.nodes().get(usize::from(**node))
        })
        .count();
    Some(Placement {
        hash: hash(ring.nodes(), &slots),
        nodes: ring.nodes().to_vec(),
        moving: i32::try_from(moving).unwrap_or(i32::MAX),
        slots,
    })
}

fn hash(nodes: &[NodeId], slots: &[u16]) -> String {
    let mut hasher = Sha256::new();
    for node in nodes {
        hasher.update(node.0.as_bytes());
        hasher.update([0xFF]);
    }
    for slot in slots {
        hasher.update(slot.to_le_bytes());
    }
    short_hex(&hasher.finalize(), 4)
}
