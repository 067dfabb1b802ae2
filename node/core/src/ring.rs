//! Slots and consistent hashing: which node is to own which document.
//!
//! A document belongs to a slot for ever, `XXH3-64(document id) mod slots`. Each node stands at many
//! points of a ring (Karger et al., STOC 1997), a slot at one; walking on from there and taking every
//! node once gives the slot's *preference*: the order in which nodes are to own it, and in which they
//! adopt it. A slot layer over the ring gives a unit that can be counted, fenced and handed over.
//!
//! All of this outlives any process, so nothing that is hashed goes through Rust's `Hash` framing.
//! The ring hashes these bytes with XXH3-64, seed 0:
//!
//! | what | bytes |
//! |--|--|
//! | document | its id in UTF-8 |
//! | slot | its number, `u16` little-endian |
//! | point of a node | its name in UTF-8, `0xFF` (never part of UTF-8), number of the point, `u32` little-endian |
//!
//! `testdata/placement.json` pins the results.

use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};

use hashring::HashRing;
use xxhash_rust::xxh3::{Xxh3DefaultBuilder, xxh3_64};

use crate::ids::{DocumentId, NodeId, Slot};
use crate::limits::POINTS_PER_NODE;

/// The weight of a node that is to own as much as any other, in percent.
pub const WEIGHT_NORMAL: u32 = 100;

/// Slot of a document.
///
/// # Panics
/// When `slots` is 0.
pub fn slot_of(id: &DocumentId, slots: u16) -> Slot {
    let slot = xxh3_64(id.as_str().as_bytes()) % u64::from(slots);
    Slot(u16::try_from(slot).expect("a remainder is smaller than the u16 divisor"))
}

/// The members that may own slots, and the order in which each slot prefers them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    nodes: Vec<NodeId>,
    weights: Vec<u32>,
    slots: u16,
    /// For each slot all of `nodes`, as indices, most preferred first.
    preferences: Vec<u16>,
}

impl Ring {
    /// Places members, each with a weight in percent of a normal node, and orders them for each of
    /// `slots` slots.
    ///
    /// The order of `members` does not matter. Of a node named twice the larger weight counts; a
    /// node of weight 0 is left out. Walks the whole ring for each slot: build one for each change
    /// of members, not one for each question.
    pub fn new(members: impl IntoIterator<Item = (NodeId, u32)>, slots: u16) -> Self {
        let mut weight_of = BTreeMap::<NodeId, u32>::new();
        for (node, weight) in members {
            let kept = weight_of.entry(node).or_default();
            *kept = weight.max(*kept);
        }
        weight_of.retain(|_, weight| *weight > 0);
        let (nodes, weights): (Vec<_>, Vec<_>) = weight_of.into_iter().unzip();
        let preferences = preferences(&nodes, &weights, slots);
        Self {
            nodes,
            weights,
            slots,
            preferences,
        }
    }

    /// The nodes that may own slots, sorted by name.
    pub fn nodes(&self) -> &[NodeId] {
        &self.nodes
    }

    /// Number of slots.
    pub fn slots(&self) -> u16 {
        self.slots
    }

    /// All nodes in the order in which they are to own `slot`; none for a slot that does not exist.
    pub fn preference(&self, slot: Slot) -> impl ExactSizeIterator<Item = &NodeId> {
        self.preferred_indices(slot.0)
            .iter()
            .map(|&node| &self.nodes[usize::from(node)])
    }

    fn preferred_indices(&self, slot: u16) -> &[u16] {
        let start = usize::from(slot) * self.nodes.len();
        self.preferences
            .get(start..start + self.nodes.len())
            .unwrap_or_default()
    }

    fn index_of(&self, node: &NodeId) -> Option<u16> {
        let index = self.nodes.binary_search(node).ok()?;
        u16::try_from(index).ok()
    }
}

/// One of the places of a node on the ring; hashes as documented above.
#[derive(Clone, Debug)]
struct Point {
    label: Vec<u8>,
    node: u16,
}

impl Hash for Point {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.label);
    }
}

/// The place of a slot on the ring; hashes as documented above.
struct SlotKey(u16);

impl Hash for SlotKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(&self.0.to_le_bytes());
    }
}

/// The walk of every slot, one after the other.
///
/// `hashring` answers only which point follows a key, or clones all its points. So it is asked once
/// for all points in their order, then for the first point of each slot; the walk from there is ours.
fn preferences(nodes: &[NodeId], weights: &[u32], slots: u16) -> Vec<u16> {
    let mut ring = HashRing::with_hasher(Xxh3DefaultBuilder);
    ring.batch_add(points(nodes, weights));
    let circle = ring
        .get_with_replicas(&SlotKey(0), ring.len() + 1)
        .unwrap_or_default();
    let position_of: HashMap<&[u8], usize> = circle
        .iter()
        .enumerate()
        .map(|(position, point)| (point.label.as_slice(), position))
        .collect();

    let mut preferences = Vec::with_capacity(usize::from(slots) * nodes.len());
    let mut met_in_slot = vec![None; nodes.len()];
    for slot in 0..slots {
        let Some(first) = ring.get(&SlotKey(slot)) else {
            break;
        };
        let (before, from_first) = circle.split_at(position_of[first.label.as_slice()]);
        let distinct = from_first
            .iter()
            .chain(before)
            .map(|point| point.node)
            .filter(|&node| met_in_slot[usize::from(node)].replace(slot) != Some(slot))
            .take(nodes.len());
        preferences.extend(distinct);
    }
    preferences
}

fn points(nodes: &[NodeId], weights: &[u32]) -> Vec<Point> {
    let points_of = |(index, (node, weight)): (usize, (&NodeId, &u32))| {
        let index = u16::try_from(index).expect("a cluster has at most 500 nodes");
        let count = u64::from(POINTS_PER_NODE) * u64::from(*weight) / u64::from(WEIGHT_NORMAL);
        let name = node.0.clone().into_bytes();
        (0..u32::try_from(count.max(1)).unwrap_or(u32::MAX)).map(move |number| Point {
            label: [name.as_slice(), &[0xFF], &number.to_le_bytes()].concat(),
            node: index,
        })
    };
    nodes
        .iter()
        .zip(weights)
        .enumerate()
        .flat_map(points_of)
        .collect()
}

/// Decides the owner of every slot, as indices into [`Ring::nodes`]; empty for a ring without nodes.
///
/// `current` holds the present owner by slot; what is missing at its end counts as not owned. An
/// owner keeps what it has while it is on the ring and within its even share; the rest goes to the
/// first node of the slot's preference that has room. So a node that joins or leaves moves only its
/// own share, and no node is more than one slot from its exact share `slots * weight / total`.
pub fn plan_placement(ring: &Ring, current: &[Option<NodeId>]) -> Vec<u16> {
    if ring.nodes.is_empty() {
        return Vec::new();
    }
    let owner_now = |slot: u16| ring.index_of(current.get(usize::from(slot))?.as_ref()?);
    let mut room = Room::new(ring);
    let mut owners = vec![None; usize::from(ring.slots)];

    // Owners keep their best preferred slots first, so that the map drifts towards the plain ring.
    let mut kept: Vec<(usize, u16, u16)> = (0..ring.slots)
        .filter_map(|slot| {
            let owner = owner_now(slot)?;
            let rank = ring
                .preferred_indices(slot)
                .iter()
                .position(|&node| node == owner)?;
            Some((rank, slot, owner))
        })
        .collect();
    kept.sort_unstable();
    for (_, slot, owner) in kept {
        if room.take(owner) {
            owners[usize::from(slot)] = Some(owner);
        }
    }
    (0..ring.slots)
        .map(|slot| {
            owners[usize::from(slot)]
                .unwrap_or_else(|| room.take_first(ring.preferred_indices(slot)))
        })
        .collect()
}

/// How many slots each node may still take.
///
/// Exact shares are seldom whole numbers. Every node gets its share rounded down, and as many nodes
/// as are needed to cover all slots get one more: the first to ask of those whose share was rounded.
struct Room {
    free: Vec<u64>,
    rounded: Vec<bool>,
    extras: u64,
}

impl Room {
    fn new(ring: &Ring) -> Self {
        let slots = u64::from(ring.slots);
        let total: u64 = ring.weights.iter().copied().map(u64::from).sum();
        let shares = || ring.weights.iter().map(|&weight| slots * u64::from(weight));
        let free: Vec<u64> = shares().map(|share| share / total).collect();
        Self {
            extras: slots - free.iter().sum::<u64>(),
            rounded: shares().map(|share| share % total != 0).collect(),
            free,
        }
    }

    fn take(&mut self, node: u16) -> bool {
        let node = usize::from(node);
        if self.free[node] > 0 {
            self.free[node] -= 1;
            true
        } else if self.rounded[node] && self.extras > 0 {
            self.rounded[node] = false;
            self.extras -= 1;
            true
        } else {
            false
        }
    }

    fn take_first(&mut self, preferred: &[u16]) -> u16 {
        let owner = preferred.iter().copied().find(|&node| self.take(node));
        owner.expect("the room of all nodes adds up to the number of slots")
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;
    use crate::limits::SLOTS_DEFAULT;

    /// `testdata/placement.json`, written by an independent implementation of the table above.
    #[derive(Deserialize)]
    struct Golden {
        slots: u16,
        documents: BTreeMap<String, u16>,
        nodes: BTreeMap<String, u32>,
        preferences: BTreeMap<u16, Vec<String>>,
    }

    fn golden() -> Golden {
        serde_json::from_str(include_str!("../testdata/placement.json")).unwrap()
    }

    #[test]
    fn documents_never_change_their_slot() {
        let golden = golden();
        assert!(golden.documents.len() >= 20);
        for (document, slot) in golden.documents {
            let id = DocumentId::new(&document).unwrap();
            assert_eq!(slot_of(&id, golden.slots), Slot(slot), "{document}");
        }
    }

    #[test]
    fn slots_never_change_their_preference() {
        let golden = golden();
        let members = golden
            .nodes
            .iter()
            .map(|(name, weight)| (name.as_str().into(), *weight));
        let ring = Ring::new(members, golden.slots);
        assert!(golden.preferences.len() >= 64);
        for (slot, expected) in golden.preferences {
            let names: Vec<_> = ring
                .preference(Slot(slot))
                .map(|node| node.0.clone())
                .collect();
            assert_eq!(names, expected, "slot {slot}");
        }
    }

    #[test]
    fn a_ring_without_nodes_places_nothing() {
        for members in [vec![], vec![("a".into(), 0)]] {
            let ring = Ring::new(members, SLOTS_DEFAULT);
            assert_eq!(ring.nodes(), []);
            assert_eq!(ring.preference(Slot(0)).count(), 0);
            assert_eq!(plan_placement(&ring, &[]), Vec::<u16>::new());
        }
    }

    #[test]
    fn a_slot_that_does_not_exist_prefers_nobody() {
        let ring = ring_of(3);
        assert_eq!(ring.preference(Slot(SLOTS_DEFAULT - 1)).len(), 3);
        assert_eq!(ring.preference(Slot(SLOTS_DEFAULT)).len(), 0);
        assert_eq!(ring.preference(Slot(u16::MAX)).len(), 0);
    }

    #[test]
    fn duplicates_and_order_of_members_do_not_matter() {
        let members = |names: &[(&str, u32)]| {
            names
                .iter()
                .map(|(name, weight)| ((*name).into(), *weight))
                .collect()
        };
        let once: Vec<(NodeId, u32)> = members(&[("a", 100), ("b", 200), ("c", 50)]);
        let twice: Vec<(NodeId, u32)> = members(&[
            ("c", 50),
            ("b", 100),
            ("a", 100),
            ("b", 200),
            ("c", 0),
            ("a", 100),
        ]);
        assert_eq!(
            Ring::new(once, SLOTS_DEFAULT),
            Ring::new(twice, SLOTS_DEFAULT)
        );
    }

    #[test]
    fn heavier_nodes_own_more() {
        let members = [
            ("a".into(), 50),
            ("b".into(), 150),
            ("c".into(), 200),
            ("d".into(), 0),
        ];
        let ring = Ring::new(members, 1024);
        assert_eq!(counts(&ring, &plan_placement(&ring, &[])), [128, 384, 512]);
    }

    #[test]
    fn placement_is_even_and_moves_little() {
        let mut smaller = ring_of(1);
        let mut placed = owners(&smaller, &plan_placement(&smaller, &[]));
        for n in (2..=12).chain([33, 34, 49, 50]) {
            if smaller.nodes().len() + 1 < usize::from(n) {
                smaller = ring_of(n - 1);
                placed = owners(&smaller, &plan_placement(&smaller, &placed));
            }
            let larger = ring_of(n);
            let ideal = f64::from(SLOTS_DEFAULT) / f64::from(n);

            let fresh = owners(&larger, &plan_placement(&larger, &[]));
            let joined = owners(&larger, &plan_placement(&larger, &placed));
            let left = owners(&smaller, &plan_placement(&smaller, &fresh));
            let (join, leave) = (moved(&placed, &joined), moved(&fresh, &left));
            assert!(join <= 1.3 * ideal, "node {n} joins and {join} slots move");
            assert!(
                leave <= 1.3 * ideal,
                "node {n} leaves and {leave} slots move"
            );

            for (ring, owners) in [(&larger, &fresh), (&larger, &joined), (&smaller, &left)] {
                let (least, most, mean) = spread(ring, owners);
                assert!(
                    most - least <= 1.0 && most / mean <= 1.05,
                    "{n}: {least}, {most}, {mean}"
                );
            }
            // Goes on with what many joins have left, not with a fresh map.
            (smaller, placed) = (larger, joined);
        }
    }

    #[test]
    fn placement_follows_the_ring() {
        for n in [3, 10, 50] {
            let ring = ring_of(n);
            let plan = plan_placement(&ring, &[]);
            let first: usize = (0..SLOTS_DEFAULT)
                .filter(|&slot| ring.preferred_indices(slot)[0] == plan[usize::from(slot)])
                .count();
            assert!(
                first > usize::from(SLOTS_DEFAULT) * 8 / 10,
                "{n} nodes: {first}"
            );
        }
    }

    /// The plain ring's own movement: what a joining node does not take, stays.
    #[test]
    fn preference_changes_only_by_the_node_that_joins() {
        let (smaller, larger) = (ring_of(9), ring_of(10));
        let joined: BTreeSet<_> = larger
            .nodes()
            .iter()
            .filter(|node| !smaller.nodes().contains(node))
            .collect();
        assert_eq!(joined.len(), 1);
        for slot in (0..SLOTS_DEFAULT).map(Slot) {
            let without: Vec<_> = larger
                .preference(slot)
                .filter(|node| !joined.contains(node))
                .collect();
            assert_eq!(without, smaller.preference(slot).collect::<Vec<_>>());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn every_slot_prefers_every_node_once(members in members(), slots in slots()) {
            let ring = Ring::new(members, slots);
            for slot in 0..slots {
                let distinct: BTreeSet<_> = ring.preference(Slot(slot)).collect();
                prop_assert_eq!(ring.preference(Slot(slot)).len(), ring.nodes().len());
                prop_assert_eq!(distinct.len(), ring.nodes().len());
            }
        }

        #[test]
        fn rings_do_not_know_the_order_of_members(
            (sorted, shuffled) in members().prop_flat_map(|m| (Just(m.clone()), Just(m).prop_shuffle()))
        ) {
            prop_assert_eq!(Ring::new(sorted, 256), Ring::new(shuffled, 256));
        }

        #[test]
        fn every_share_is_within_one_slot(
            before in members(), after in members(), slots in slots()
        ) {
            let earlier = Ring::new(before, slots);
            let current = owners(&earlier, &plan_placement(&earlier, &[]));
            let ring = Ring::new(after, slots);
            let plan = plan_placement(&ring, &current);
            prop_assert_eq!(plan.len(), usize::from(slots));
            let total: u64 = ring.weights.iter().copied().map(u64::from).sum();
            for (count, weight) in counts(&ring, &plan).into_iter().zip(&ring.weights) {
                let share = u64::from(slots) * u64::from(*weight);
                prop_assert!(u64::from(count) >= share / total);
                prop_assert!(u64::from(count) <= share.div_ceil(total));
            }
        }

        /// Only surplus and ownerless slots move, so planning what is already planned moves nothing.
        #[test]
        fn owners_keep_what_is_within_their_share(
            before in members(), after in members(), slots in slots()
        ) {
            let earlier = Ring::new(before, slots);
            let current = owners(&earlier, &plan_placement(&earlier, &[]));
            let ring = Ring::new(after, slots);
            let plan = plan_placement(&ring, &current);
            let planned = owners(&ring, &plan);
            let total: u64 = ring.weights.iter().copied().map(u64::from).sum();
            for (node, weight) in ring.nodes().iter().zip(&ring.weights) {
                let floor = u64::from(slots) * u64::from(*weight) / total;
                let had = current.iter().flatten().filter(|owner| *owner == node).count() as u64;
                let kept = current
                    .iter()
                    .zip(&planned)
                    .filter(|(now, then)| now.as_ref() == Some(node) && now == then)
                    .count() as u64;
                prop_assert!(kept >= had.min(floor), "{} kept {} of {}", node, kept, had);
            }
            prop_assert_eq!(plan_placement(&ring, &planned), plan);
        }
    }

    fn ring_of(nodes: u16) -> Ring {
        let members = (0..nodes).map(|n| (NodeId(format!("demo-node-{n}")), WEIGHT_NORMAL));
        Ring::new(members, SLOTS_DEFAULT)
    }

    fn owners(ring: &Ring, plan: &[u16]) -> Vec<Option<NodeId>> {
        plan.iter()
            .map(|&node| Some(ring.nodes()[usize::from(node)].clone()))
            .collect()
    }

    fn counts(ring: &Ring, plan: &[u16]) -> Vec<u16> {
        let mut counts = vec![0; ring.nodes().len()];
        for &node in plan {
            counts[usize::from(node)] += 1;
        }
        counts
    }

    /// Fewest, most and mean slots of a node.
    fn spread(ring: &Ring, owners: &[Option<NodeId>]) -> (f64, f64, f64) {
        let plan: Vec<_> = owners
            .iter()
            .flatten()
            .map(|node| ring.index_of(node).unwrap())
            .collect();
        let counts = counts(ring, &plan).into_iter().map(f64::from);
        let mean = counts.clone().sum::<f64>() / f64::from(u16::try_from(counts.len()).unwrap());
        (
            counts.clone().reduce(f64::min).unwrap(),
            counts.reduce(f64::max).unwrap(),
            mean,
        )
    }

    fn moved(before: &[Option<NodeId>], after: &[Option<NodeId>]) -> f64 {
        let moved = before
            .iter()
            .zip(after)
            .filter(|(before, after)| before != after)
            .count();
        f64::from(u16::try_from(moved).unwrap())
    }

    fn members() -> impl Strategy<Value = Vec<(NodeId, u32)>> {
        let member = (
            "[a-f]{1,2}".prop_map(NodeId),
            prop_oneof![Just(100), 1..400_u32],
        );
        proptest::collection::vec(member, 1..12)
    }

    fn slots() -> impl Strategy<Value = u16> {
        prop_oneof![Just(256), Just(512)]
    }
}
