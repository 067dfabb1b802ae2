//! Slots that are moved because of the load.
//!
//! Even shares of slots are no even shares of work. Every so often the load of each owner is compared with
//! the mean, and the slots are chosen whose move brings the busiest and the idlest closest together. What
//! is chosen goes into the placement, a few at a time, and stays there: see [`super::handoff`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;

use collab_core::control::NodeLoad;
use collab_core::ids::{NodeId, Slot};
use collab_crds::collabcluster::{PlacementMode, PlacementPolicy, PlacementSpec};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::model::{Observed, Placement};
use crate::plan::handoff::active_nodes;

/// Most slots of one round.
const MOVES_PER_ROUND: usize = 32;
/// A slot that was moved stays for this long: its new load must be seen first, and every move costs
/// its documents a handoff.
const REST: SignedDuration = SignedDuration::from_mins(5);
/// Mean load of a node, in points, below which no imbalance is worth a move.
const MEAN_LOAD_MIN: u64 = 50;

/// One slot that is moved because of the load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Move {
    /// The slot.
    pub slot: Slot,
    /// Its load in points.
    pub load: u64,
    /// Who has it.
    pub from: NodeId,
    /// Who gets it.
    pub to: NodeId,
}

impl fmt::Display for Move {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            slot,
            load,
            from,
            to,
        } = self;
        write!(out, "slot {slot} with {load} points from {from} to {to}")
    }
}

/// How the load lies on the owners.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Balance {
    /// Load of the busiest owner in percent of the mean; 100 when there is none.
    pub max_to_mean_percent: u64,
    /// Mean load of an owner in points.
    pub mean: u64,
    /// The busiest slot.
    pub hottest: Option<Slot>,
}

/// What is remembered between two passes. Losing it costs a round, and slots their rest.
#[derive(Clone, Debug, Default)]
pub struct Rounds {
    /// When the last round began.
    begun: Option<Timestamp>,
    /// What it chose and did not move yet.
    chosen: VecDeque<Move>,
    /// When slots were moved.
    moved: BTreeMap<Slot, Timestamp>,
}

/// What a pass does about the load.
#[derive(Clone, Debug, Default)]
pub struct Step {
    /// Slots that the placement moves.
    pub moves: Vec<Move>,
    /// Slots that somebody else is to move.
    pub proposals: Vec<Move>,
    /// How the load lies; `None` when a node does not tell.
    pub balance: Option<Balance>,
    /// What is waited for.
    pub waits: Vec<String>,
}

/// The load of each slot in points.
pub type SlotLoads = BTreeMap<Slot, u64>;

/// The load of all slots, or the nodes that serve and did not tell theirs.
///
/// # Errors
/// The names of those nodes.
pub fn slot_loads(observed: &Observed) -> Result<SlotLoads, Vec<NodeId>> {
    let Some(report) = &observed.report else {
        return Err(Vec::new());
    };
    let tells = |node: &NodeId| {
        let mut processes = report.members.iter().filter(|member| member.node == *node);
        let told = |incarnation| {
            observed
                .loads
                .iter()
                .any(|load| load.incarnation == incarnation)
        };
        processes.any(|member| member.live && told(member.incarnation))
    };
    let silent: Vec<_> = active_nodes(report)
        .into_iter()
        .filter(|node| !tells(node))
        .collect();
    if !silent.is_empty() {
        return Err(silent);
    }
    let mut loads = SlotLoads::new();
    for slot in observed
        .loads
        .iter()
        .flat_map(|NodeLoad { slots, .. }| slots)
    {
        // While a slot moves, both its owners may have something open.
        let load = loads.entry(slot.slot).or_default();
        *load = slot.activity.points().max(*load);
    }
    Ok(loads)
}

/// Moves what the load calls for in `placement`, unless pods are on their way out or in.
pub fn step(
    rounds: &mut Rounds,
    placement: &mut Placement,
    observed: &Observed,
    spec: &PlacementSpec,
    held: bool,
    now: Timestamp,
) -> Step {
    let mut step = Step::default();
    if spec.policy != PlacementPolicy::BoundedLoad {
        return step;
    }
    let loads = match slot_loads(observed) {
        Ok(loads) => loads,
        Err(silent) => {
            let names: Vec<_> = silent.iter().map(|node| node.0.as_str()).collect();
            if !held && !names.is_empty() {
                step.waits = vec![format!(
                    "for the load of {}, before slots are moved by it",
                    names.join(", ")
                )];
            }
            return step;
        }
    };
    let draft = Draft::new(placement, &loads);
    step.balance = Some(draft.balance());
    rounds.moved.retain(|_, at| now.duration_since(*at) < REST);
    if held {
        rounds.chosen.clear();
        return step;
    }
    let interval = SignedDuration::from_secs(spec.rebalance.interval_seconds.into());
    let is_due = rounds
        .begun
        .is_none_or(|begun| interval <= now.duration_since(begun));
    if is_due || spec.rebalance.mode == PlacementMode::Manual {
        let resting = rounds.moved.keys().copied().collect();
        rounds.chosen = choose(draft, spec, resting).into();
        rounds.begun = Some(now);
    }
    if spec.rebalance.mode == PlacementMode::Manual {
        step.proposals = rounds.chosen.drain(..).collect();
        return step;
    }
    while placement.moving < spec.rebalance.max_concurrent_moves
        && let Some(chosen) = rounds.chosen.pop_front()
    {
        if placement.give(&chosen) {
            rounds.moved.insert(chosen.slot, now);
            step.moves.push(chosen);
        }
    }
    if !step.moves.is_empty() {
        placement.rehash();
    }
    step
}

/// The slots to move in a round, in order. Pure: a function of numbers.
///
/// Again and again, the busiest owner that is further above the mean than is borne gives the slot whose load is
/// nearest half the gap to the idlest one: that closes most of the gap and cannot turn it round. An owner
/// that has no such slot, because one document makes nearly all of its load, is passed over. Nobody gets
/// more slots than `maxLoadPercent` allows, and nobody gives its last.
fn choose(mut draft: Draft<'_>, spec: &PlacementSpec, mut resting: BTreeSet<Slot>) -> Vec<Move> {
    let mut moves = Vec::new();
    if draft.balance().mean < MEAN_LOAD_MIN {
        return moves;
    }
    while moves.len() < MOVES_PER_ROUND
        && let Some((slot, from, to)) = draft.best(spec, &resting)
    {
        resting.insert(slot);
        moves.push(Move {
            slot,
            load: draft.load_of(slot),
            from: draft.nodes[from].clone(),
            to: draft.nodes[to].clone(),
        });
        draft.give(slot, from, to);
    }
    moves
}

/// Owners and their load while slots are moved in thought.
struct Draft<'a> {
    nodes: &'a [NodeId],
    slots_fixed: u16,
    loads: &'a SlotLoads,
    owners: BTreeMap<Slot, usize>,
    /// Slots of each node, those of pinned documents apart.
    counts: Vec<usize>,
    points: Vec<u64>,
}

impl<'a> Draft<'a> {
    fn new(placement: &'a Placement, loads: &'a SlotLoads) -> Self {
        let slots = (0_u16..).zip(&placement.slots);
        let slots = slots.map(|(slot, node)| (Slot(slot), usize::from(*node)));
        let pins = placement.pins.iter();
        let pins = pins.map(|pin| (pin.slot, usize::from(pin.node)));
        let mut draft = Self {
            nodes: &placement.nodes,
            slots_fixed: u16::try_from(placement.slots.len()).unwrap_or(u16::MAX),
            loads,
            owners: slots.chain(pins).collect(),
            counts: vec![0; placement.nodes.len()],
            points: vec![0; placement.nodes.len()],
        };
        for (slot, node) in &draft.owners {
            draft.counts[*node] += usize::from(slot.0 < draft.slots_fixed);
            draft.points[*node] += loads.get(slot).copied().unwrap_or(0);
        }
        draft
    }

    fn load_of(&self, slot: Slot) -> u64 {
        self.loads.get(&slot).copied().unwrap_or(0)
    }

    fn balance(&self) -> Balance {
        let nodes = self.points.len() as u64;
        let total: u64 = self.points.iter().sum();
        let most = self.points.iter().max().copied().unwrap_or(0);
        let busy = self.owners.keys().filter(|slot| 0 < self.load_of(**slot));
        Balance {
            max_to_mean_percent: (most * nodes * 100).checked_div(total).unwrap_or(100),
            mean: total.checked_div(nodes).unwrap_or(0),
            hottest: busy
                .max_by_key(|slot| (self.load_of(**slot), std::cmp::Reverse(**slot)))
                .copied(),
        }
    }

    fn best(&self, spec: &PlacementSpec, resting: &BTreeSet<Slot>) -> Option<(Slot, usize, usize)> {
        let limit = |percent: i32| u64::try_from(percent).unwrap_or(0);
        let most_slots = usize::from(self.slots_fixed)
            * usize::try_from(spec.max_load_percent).unwrap_or(100)
            / (100 * self.nodes.len());
        let has_room = |node: &usize| self.counts[*node] < most_slots;
        let to = (0..self.nodes.len())
            .filter(has_room)
            .min_by_key(|node| self.points[*node])?;
        let total: u64 = self.points.iter().sum();
        let is_hot = |node: &usize| {
            let bearable = total * (100 + limit(spec.rebalance.imbalance_percent));
            bearable < self.points[*node] * self.nodes.len() as u64 * 100
        };
        let mut hot: Vec<usize> = (0..self.nodes.len()).filter(is_hot).collect();
        hot.sort_by_key(|node| std::cmp::Reverse(self.points[*node]));
        hot.into_iter().find_map(|from| {
            let gap = self.points[from].saturating_sub(self.points[to]);
            let owned = self.owners.iter().filter(|(_, node)| **node == from);
            let movable = owned.map(|(slot, _)| *slot).filter(|slot| {
                let is_last = slot.0 < self.slots_fixed && self.counts[from] == 1;
                let load = self.load_of(*slot);
                0 < load && load < gap && !is_last && !resting.contains(slot)
            });
            let slot = movable.min_by_key(|slot| (2 * self.load_of(*slot)).abs_diff(gap))?;
            Some((slot, from, to))
        })
    }

    fn give(&mut self, slot: Slot, from: usize, to: usize) {
        let load = self.load_of(slot);
        self.points[from] -= load;
        self.points[to] += load;
        if slot.0 < self.slots_fixed {
            self.counts[from] -= 1;
            self.counts[to] += 1;
        }
        self.owners.insert(slot, to);
    }
}

impl Placement {
    /// Gives a slot away, if whoever is to give it still has it.
    fn give(&mut self, wanted: &Move) -> bool {
        let index = |node: &NodeId| {
            let index = self.nodes.iter().position(|known| known == node)?;
            u16::try_from(index).ok()
        };
        let (Some(from), Some(to)) = (index(&wanted.from), index(&wanted.to)) else {
            return false;
        };
        let number = usize::from(wanted.slot.0);
        let mut pins = self.pins.iter_mut().filter(|pin| pin.slot == wanted.slot);
        let node = match self.slots.get_mut(number) {
            Some(node) => Some(node),
            None => pins.next().map(|pin| &mut pin.node),
        };
        let Some(node) = node.filter(|node| **node == from) else {
            return false;
        };
        *node = to;
        self.moving += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use collab_core::control::PinPlacement;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_slot_nearest_half_the_gap_goes_from_the_busiest_to_the_idlest() {
        let placement = placement(&[0, 0, 0, 0, 1, 1, 2, 2], 3);
        let moves = chosen(&placement, &[40, 30, 80, 100, 60, 50, 10, 20], 200);
        assert_eq!(
            moves,
            [
                "slot 3 with 100 points from n0 to n2",
                "slot 1 with 30 points from n0 to n1",
            ]
        );
    }

    #[test]
    fn a_bearable_imbalance_and_a_quiet_cluster_are_left_alone() {
        let placement = placement(&[0, 0, 1, 1], 2);
        assert!(chosen(&placement, &[57, 57, 50, 50], 200).is_empty());
        assert_eq!(chosen(&placement, &[97, 50, 30, 20], 200).len(), 1);
        assert!(
            chosen(&placement, &[40, 40, 5, 5], 200).is_empty(),
            "mean of 45 points"
        );
    }

    #[test]
    fn no_node_gets_more_slots_than_it_may_or_gives_its_last() {
        let placement = placement(&[0, 0, 0, 0, 1, 1, 1, 1], 2);
        let loads = [90, 80, 70, 60, 0, 0, 0, 0];
        assert_eq!(chosen(&placement, &loads, 125).len(), 1);
        assert!(chosen(&placement, &loads, 100).is_empty());
        let single = self::placement(&[0, 1, 1], 2);
        assert!(chosen(&single, &[200, 5, 5], 400).is_empty());
    }

    #[test]
    fn the_neighbours_of_a_hot_document_move_away() {
        let mut placement = placement(&[0, 0, 0, 0, 1, 1, 1, 1], 2);
        placement.pins = vec![PinPlacement {
            slot: Slot(8),
            node: 0,
        }];
        // The pin itself would only carry the imbalance over.
        let moves = chosen(&placement, &[20, 20, 20, 20, 20, 20, 20, 20, 150], 200);
        assert_eq!(
            moves,
            [
                "slot 0 with 20 points from n0 to n1",
                "slot 1 with 20 points from n0 to n1",
                "slot 2 with 20 points from n0 to n1",
            ]
        );
    }

    #[test]
    fn an_owner_of_nothing_but_a_hot_document_does_not_hold_the_others_up() {
        let mut placement = placement(&[0, 1, 1, 1, 2, 2, 2, 2], 3);
        placement.pins = vec![PinPlacement {
            slot: Slot(8),
            node: 0,
        }];
        let moves = chosen(&placement, &[0, 200, 60, 60, 20, 20, 0, 0, 400], 200);
        assert_eq!(moves, ["slot 1 with 200 points from n1 to n2"]);
    }

    proptest! {
        /// Whatever the load: the busiest never gets busier, no slot moves twice, and bounds hold.
        #[test]
        fn a_round_only_makes_it_better(
            owners in proptest::collection::vec(0_u16..5, 20..64),
            loads in proptest::collection::vec(0_u64..300, 64),
        ) {
            let placement = placement(&owners, 5);
            let loads = slot_map(&loads[..owners.len()]);
            let spec = PlacementSpec::default();
            let mut draft = Draft::new(&placement, &loads);
            let before = draft.balance();
            let moves = choose(Draft::new(&placement, &loads), &spec, BTreeSet::new());
            prop_assert!(moves.len() <= MOVES_PER_ROUND);
            let slots: BTreeSet<Slot> = moves.iter().map(|moved| moved.slot).collect();
            prop_assert_eq!(slots.len(), moves.len());
            let counts = draft.counts.clone();
            let mut spread = draft.points.iter().map(|points| points * points).sum::<u64>();
            for moved in &moves {
                let at = |node: &NodeId| placement.nodes.iter().position(|known| known == node).unwrap();
                draft.give(moved.slot, at(&moved.from), at(&moved.to));
                let after = draft.points.iter().map(|points| points * points).sum();
                prop_assert!(after < spread, "{} does not help", moved);
                spread = after;
            }
            prop_assert!(draft.balance().max_to_mean_percent <= before.max_to_mean_percent);
            let most = owners.len() * 125 / 500;
            for (before, after) in counts.into_iter().zip(&draft.counts) {
                prop_assert!(*after <= before.max(most));
            }
        }
    }

    fn placement(owners: &[u16], nodes: u16) -> Placement {
        Placement {
            nodes: (0..nodes).map(|node| NodeId(format!("n{node}"))).collect(),
            slots: owners.to_vec(),
            pins: Vec::new(),
            moving: 0,
            hash: String::new(),
        }
    }

    fn slot_map(loads: &[u64]) -> SlotLoads {
        (0_u16..).map(Slot).zip(loads.iter().copied()).collect()
    }

    fn chosen(placement: &Placement, loads: &[u64], max_load_percent: i32) -> Vec<String> {
        let spec = PlacementSpec {
            max_load_percent,
            ..PlacementSpec::default()
        };
        let loads = slot_map(loads);
        let moves = choose(Draft::new(placement, &loads), &spec, BTreeSet::new());
        moves.iter().map(ToString::to_string).collect()
    }
}
