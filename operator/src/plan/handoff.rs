//! Which node is to own which slot, and how far a node is with handing its slots over.

use std::collections::{BTreeMap, BTreeSet};

use collab_core::control::{ClusterReport, MemberReport, MemberState, PinPlacement};
use collab_core::ids::NodeId;
use collab_core::quarantine::Quarantine;
use collab_core::ring::{Ring, RingNode, WEIGHT_NORMAL, plain_placement, plan_placement};
use collab_crds::collabcluster::{PlacementPolicy, PlacementSpec};
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

/// The serving nodes that are in quarantine.
pub fn quarantined(report: &ClusterReport) -> BTreeMap<NodeId, Quarantine> {
    let serving = report
        .members
        .iter()
        .filter(|member| member.live && member.state == MemberState::Active);
    serving
        .filter_map(|member| Some((member.node.clone(), member.quarantine?)))
        .collect()
}

/// What is waited for because of those.
pub fn quarantine_waits(report: &ClusterReport) -> Vec<String> {
    let quarantined = quarantined(report).into_iter();
    quarantined
        .map(|(node, quarantine)| {
            let (lost, share) = (quarantine.leases_lost, quarantine.share_percent);
            format!("for {node} to keep its lease, which it lost {lost} times: it is given {share} % of its share")
        })
        .collect()
}

/// The placement over the serving nodes less those that are `leaving`; `None` when none is left.
///
/// It goes on from the placement in force, not from who owns what at the moment, which changes while slots are
/// on their way; so the same answer comes out until members change. Before the first placement, and where
/// the node of the one in force is gone, present owners keep what they have up to their share.
pub fn placement(
    report: &ClusterReport,
    leaving: &BTreeSet<NodeId>,
    spec: &PlacementSpec,
) -> Option<Placement> {
    let quarantined = quarantined(report);
    let weight = |node: &NodeId| {
        let quarantine = quarantined.get(node);
        quarantine.map_or(WEIGHT_NORMAL, |quarantine| quarantine.of(WEIGHT_NORMAL))
    };
    let mut staying: Vec<RingNode> = active_nodes(report)
        .into_iter()
        .filter(|node| !leaving.contains(node))
        .map(|name| RingNode {
            zone: zone(report, &name),
            weight: weight(&name),
            name,
        })
        .collect();
    if staying.iter().all(|node| node.weight == 0) {
        // Whoever is left carries it all.
        for node in &mut staying {
            node.weight = WEIGHT_NORMAL;
        }
    }
    let ring = Ring::new(staying, report.slots);
    if ring.nodes().is_empty() {
        return None;
    }
    let member = |index: &Option<u16>| report.members.get(usize::from((*index)?));
    let planned_node = |index| member(index).map(|member| member.node.clone());
    let owner_node = |index| {
        member(index)
            .filter(|member| member.live)
            .map(|member| member.node.clone())
    };
    let planned: Vec<_> = report.planned.iter().map(planned_node).collect();
    let current: Vec<_> = report.owners.iter().map(owner_node).collect();
    let slots = match spec.policy {
        PlacementPolicy::Ring => plain_placement(&ring),
        PlacementPolicy::BoundedLoad => {
            // A node whose share grows again gets it from whoever has more than its own.
            let most = if quarantined.is_empty() {
                u32::try_from(spec.max_load_percent).unwrap_or(100)
            } else {
                100
            };
            plan_placement(&ring, &planned, &current, most)
        }
    };
    let on_ring = |node: Option<NodeId>| ring.nodes().binary_search(&node?).ok();
    let mut moving = 0;
    let mut pins = Vec::new();
    for pin in &report.pins {
        let owner = on_ring(owner_node(&pin.owner));
        let first = || on_ring(ring.preference(pin.slot).next().cloned());
        let node = on_ring(planned_node(&pin.planned))
            .or(owner)
            .or_else(first)?;
        moving += i32::from(owner != Some(node));
        pins.push(PinPlacement {
            slot: pin.slot,
            node: u16::try_from(node).ok()?,
        });
    }
    for (slot, node) in slots.iter().enumerate() {
        let now = current.get(slot).and_then(Option::as_ref);
        moving += i32::from(now != ring.nodes().get(usize::from(*node)));
    }
    let mut placement = Placement {
        hash: String::new(),
        nodes: ring.nodes().to_vec(),
        moving,
        slots,
        pins,
    };
    placement.rehash();
    Some(placement)
}

fn zone(report: &ClusterReport, node: &NodeId) -> String {
    let mut named = report.members.iter().filter(|member| member.node == *node);
    let live = named.find(|member| member.live);
    live.map_or_else(String::new, |member| member.zone.clone())
}

impl Placement {
    /// Makes the hash that of what it says.
    pub fn rehash(&mut self) {
        let mut hasher = Sha256::new();
        for node in &self.nodes {
            hasher.update(node.0.as_bytes());
            hasher.update([0xFF]);
        }
        for slot in &self.slots {
            hasher.update(slot.to_le_bytes());
        }
        for pin in &self.pins {
            hasher.update(pin.slot.0.to_le_bytes());
            hasher.update(pin.node.to_le_bytes());
        }
        self.hash = short_hex(&hasher.finalize(), 4);
    }
}
