//! Slots and consistent hashing: which node is to own which document.
//!
//! A document belongs to a slot for ever, `XXH3-64(document id) mod slots`. Each node stands at many
//! points of a ring (Karger et al., STOC 1997), a slot at one; walking on from there and taking every
//! node once gives the slot's *preference*: the order in which nodes are to own it, and in which they
//! adopt it. A slot layer over the ring gives a unit that can be counted, fenced and handed over.
//!
//! Shares follow nodes and not zones, so that a zone with fewer machines is not given more than they can
//! carry. Zones decide the order after the first node: each zone once before any zone twice. The next
//! candidates of a slot are therefore alive when its owner's zone is lost.
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

/// A member that may own slots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingNode {
    /// Its name.
    pub name: NodeId,
    /// Its share in percent of a normal node; with 0 it is left out.
    pub weight: u32,
    /// What it may be lost together with; empty when unknown.
    pub zone: String,
}

impl RingNode {
    /// A node of normal weight whose zone is not known.
    pub fn normal(name: NodeId) -> Self {
        Self {
            name,
            weight: WEIGHT_NORMAL,
            zone: String::new(),
        }
    }
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
    /// Places members and orders them for each of `slots` slots.
    ///
    /// The order of `members` does not matter. Of a node named twice the larger weight counts. Walks
    /// the whole ring for each slot: build one for each change of members, not one for each question.
    pub fn new(members: impl IntoIterator<Item = RingNode>, slots: u16) -> Self {
        let mut members_by_name = BTreeMap::<NodeId, (u32, String)>::new();
        for RingNode { name, weight, zone } in members {
            let kept = members_by_name.entry(name).or_default();
            *kept = (weight, zone).max(std::mem::take(kept));
        }
        members_by_name.retain(|_, (weight, _)| *weight > 0);
        let (nodes, rest): (Vec<_>, Vec<_>) = members_by_name.into_iter().unzip();
        let (weights, zones): (Vec<_>, Vec<_>) = rest.into_iter().unzip();
        let preferences = preferences(&nodes, &weights, &zones, slots);
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

    /// All nodes in the order in which they are to own `slot`. Virtual slots, whose numbers begin
    /// where the others end, prefer nodes as slot 0, 1 … do.
    pub fn preference(&self, slot: Slot) -> impl ExactSizeIterator<Item = &NodeId> {
        self.preferred_indices(slot.0)
            .iter()
            .map(|&node| &self.nodes[usize::from(node)])
    }

    fn preferred_indices(&self, slot: u16) -> &[u16] {
        let start = usize::from(slot.checked_rem(self.slots).unwrap_or(0)) * self.nodes.len();
        self.preferences
            .get(start..start + self.nodes.len())
            .unwrap_or_default()
    }

    /// The nodes of each slot as indices; what is not on the ring or missing at the end is nobody.
    fn indices(&self, nodes: &[Option<NodeId>]) -> Vec<Option<u16>> {
        let index = |slot| self.index_of(nodes.get(usize::from(slot))?.as_ref()?);
        (0..self.slots).map(index).collect()
    }

    fn index_of(&self, node: &NodeId) -> Option<u16> {
        let index = self.nodes.binary_search(node).ok()?;
        u16::try_from(index).ok()
    }

    /// How many slots each node is to own: `slots * weight / total`, rounded so that all are owned. Nodes that
    /// hold more than their share rounded down are the first to have it rounded up.
    fn shares(&self, held: &[u64]) -> Vec<u64> {
        let slots = u64::from(self.slots);
        let total: u64 = self.weights.iter().copied().map(u64::from).sum();
        let exact = || self.weights.iter().map(|&weight| slots * u64::from(weight));
        let mut shares: Vec<u64> = exact().map(|share| share / total).collect();
        let mut rounded: Vec<usize> = exact()
            .enumerate()
            .filter(|(_, share)| share % total != 0)
            .map(|(node, _)| node)
            .collect();
        rounded.sort_by_key(|&node| held[node] <= shares[node]);
        let missing = slots - shares.iter().sum::<u64>();
        for node in rounded
            .into_iter()
            .take(usize::try_from(missing).unwrap_or(0))
        {
            shares[node] += 1;
        }
        shares
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

/// The walk of every slot, one after the other, with the zones taking turns.
///
/// `hashring` answers only which point follows a key, or clones all its points. So it is asked once
/// for all points in their order, then for the first point of each slot; the walk from there is ours.
fn preferences(nodes: &[NodeId], weights: &[u32], zones: &[String], slots: u16) -> Vec<u16> {
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
        preferences.extend(in_turns(distinct, zones));
    }
    preferences
}

/// First the first node of each zone, then the second of each, and so on; otherwise in the given order.
/// Whoever is lost together with a slot's owner thus comes late in the order of those who adopt it.
fn in_turns(walk: impl Iterator<Item = u16>, zones: &[String]) -> impl Iterator<Item = u16> {
    let mut met_of_zone = BTreeMap::<&str, u16>::new();
    let mut turns: Vec<(u16, u16)> = walk
        .map(|node| {
            let met = met_of_zone.entry(&zones[usize::from(node)]).or_default();
            *met += 1;
            (*met, node)
        })
        .collect();
    turns.sort_by_key(|(turn, _)| *turn);
    turns.into_iter().map(|(_, node)| node)
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

/// Gives every slot to the first node of its preference, whatever that comes to; as indices into
/// [`Ring::nodes`], empty for a ring without nodes.
pub fn plain_placement(ring: &Ring) -> Vec<u16> {
    (0..ring.slots)
        .filter_map(|slot| ring.preferred_indices(slot).first().copied())
        .collect()
}

/// Decides the owner of every slot, as indices into [`Ring::nodes`]; empty for a ring without nodes
/// (after "Consistent Hashing with Bounded Loads", Mirrokni et al., 2018, with shares by weight).
///
/// `planned` is the plan in force, by slot, and `owners` who owns each slot now, which counts where the
/// planned node is not on the ring; what is missing at their ends is nobody. Nothing moves without a cause:
/// 1. A node keeps what it is planned to have, up to `load_max_percent` of its share. What a balance
///    by load has moved thus stays where it is.
/// 2. A node that is planned to have nothing has just come: it gets its share, from those who are
///    furthest above theirs.
/// 3. An owner keeps what it adopted, up to its share.
/// 4. The rest goes to the first node of the slot's preference that is below its share.
///
/// So without a plan in force, or with a maximum of 100 %, no node is more than one slot from its exact
/// share `slots * weight / total`, and a node that joins or leaves moves that share and no more.
///
/// # Panics
/// Never: the shares of all nodes add up to the number of slots.
pub fn plan_placement(
    ring: &Ring,
    planned: &[Option<NodeId>],
    owners: &[Option<NodeId>],
    load_max_percent: u32,
) -> Vec<u16> {
    if ring.nodes.is_empty() {
        return Vec::new();
    }
    let planned = ring.indices(planned);
    let owners: Vec<Option<u16>> = std::iter::zip(&planned, ring.indices(owners))
        .map(|(planned, owner)| if planned.is_none() { owner } else { None })
        .collect();
    let had = counts(ring, &planned);
    let held: Vec<u64> = std::iter::zip(&had, counts(ring, &owners))
        .map(|(planned, adopted)| planned + adopted)
        .collect();
    let shares = ring.shares(&held);
    let kept_max = kept_max(ring, &had, &shares, load_max_percent);

    let mut draft = Draft {
        ring,
        nodes: vec![None; usize::from(ring.slots)],
        counts: vec![0; ring.nodes.len()],
    };
    draft.keep(&planned, &kept_max);
    draft.keep(&owners, &shares);
    let is_below_share =
        |counts: &[u64], node: u16| counts[usize::from(node)] < shares[usize::from(node)];
    for slot in 0..ring.slots {
        if draft.nodes[usize::from(slot)].is_some() {
            continue;
        }
        let preferred = || ring.preferred_indices(slot).iter().copied();
        let mut free = preferred().filter(|&node| is_below_share(&draft.counts, node));
        let newcomer = free.clone().find(|&node| had[usize::from(node)] == 0);
        let node = newcomer.or_else(|| free.next());
        draft.give(
            slot,
            node.expect("the shares of all nodes add up to the number of slots"),
        );
    }
    draft.nodes.into_iter().flatten().collect()
}

/// How many of its planned slots each node keeps: as many as it may, less what newcomers lack.
fn kept_max(ring: &Ring, had: &[u64], shares: &[u64], load_max_percent: u32) -> Vec<u64> {
    let total: u64 = ring.weights.iter().copied().map(u64::from).sum();
    let mut kept: Vec<u64> = std::iter::zip(had, std::iter::zip(shares, &ring.weights))
        .map(|(&had, (&share, &weight))| {
            let max = u64::from(ring.slots) * u64::from(weight) * u64::from(load_max_percent);
            had.min(share.max(max / total / 100))
        })
        .collect();
    let newcomers = std::iter::zip(had, shares).filter(|(had, _)| **had == 0);
    let wanted: u64 = newcomers.map(|(_, share)| share).sum();
    let mut free = u64::from(ring.slots) - kept.iter().sum::<u64>();
    while free < wanted {
        let above = |node: usize| kept[node].saturating_sub(shares[node]);
        let Some(fullest) = (0..kept.len()).rev().max_by_key(|&node| above(node)) else {
            break;
        };
        kept[fullest] -= 1;
        free += 1;
    }
    kept
}

/// A placement while it is made.
struct Draft<'a> {
    ring: &'a Ring,
    nodes: Vec<Option<u16>>,
    counts: Vec<u64>,
}

impl Draft<'_> {
    /// Leaves each slot with its holder until that one has `most`, the slots that prefer it most first: so
    /// the map drifts towards the plain ring.
    fn keep(&mut self, holders: &[Option<u16>], most: &[u64]) {
        let rank_of = |slot: u16| {
            let holder = holders[usize::from(slot)]?;
            let mut preferred = self.ring.preferred_indices(slot).iter();
            let rank = preferred.position(|&node| node == holder)?;
            Some((rank, slot, holder))
        };
        let mut kept: Vec<_> = (0..self.ring.slots).filter_map(rank_of).collect();
        kept.sort_unstable();
        for (_, slot, holder) in kept {
            if self.counts[usize::from(holder)] < most[usize::from(holder)] {
                self.give(slot, holder);
            }
        }
    }

    fn give(&mut self, slot: u16, node: u16) {
        self.nodes[usize::from(slot)] = Some(node);
        self.counts[usize::from(node)] += 1;
    }
}

/// Number of slots of each node.
fn counts(ring: &Ring, nodes: &[Option<u16>]) -> Vec<u64> {
    let mut counts = vec![0; ring.nodes.len()];
    for node in nodes.iter().flatten() {
        counts[usize::from(*node)] += 1;
    }
    counts
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
            .map(|(name, weight)| node(name, *weight));
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
        for members in [vec![], vec![node("a", 0)]] {
            let ring = Ring::new(members, SLOTS_DEFAULT);
            assert_eq!(ring.nodes(), []);
            assert_eq!(ring.preference(Slot(0)).count(), 0);
            assert_eq!(fresh(&ring), Vec::<u16>::new());
            assert_eq!(plain_placement(&ring), Vec::<u16>::new());
        }
    }

    #[test]
    fn virtual_slots_begin_again_with_the_order_of_the_first() {
        let ring = ring_of(3);
        let order = |slot| ring.preference(Slot(slot)).collect::<Vec<_>>();
        assert_eq!(order(SLOTS_DEFAULT), order(0));
        assert_eq!(order(SLOTS_DEFAULT + 7), order(7));
    }

    #[test]
    fn duplicates_and_order_of_members_do_not_matter() {
        let members = |names: &[(&str, u32)]| -> Vec<_> {
            names
                .iter()
                .map(|(name, weight)| node(name, *weight))
                .collect()
        };
        let once = members(&[("a", 100), ("b", 200), ("c", 50)]);
        let twice = members(&[
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
        let members = [node("a", 50), node("b", 150), node("c", 200), node("d", 0)];
        let ring = Ring::new(members, 1024);
        assert_eq!(owned(&ring, &fresh(&ring)), [128, 384, 512]);
    }

    #[test]
    fn placement_is_even_and_moves_little() {
        let mut smaller = ring_of(1);
        let mut placed = owners(&smaller, &fresh(&smaller));
        for n in 2..=50 {
            let larger = ring_of(n);
            let from_scratch = owners(&larger, &fresh(&larger));
            let joined = replan(&larger, &placed, LOOSE);
            let left = replan(&smaller, &from_scratch, LOOSE);
            let ideal = f64::from(SLOTS_DEFAULT) / f64::from(n);
            let (join, leave) = (moved(&placed, &joined), moved(&from_scratch, &left));
            assert!(join <= 1.3 * ideal, "node {n} joins and {join} slots move");
            assert!(
                leave <= 1.3 * ideal,
                "node {n} leaves and {leave} slots move"
            );
            for (ring, owners) in [
                (&larger, &from_scratch),
                (&larger, &joined),
                (&smaller, &left),
            ] {
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

    /// What a loss really looks like: the others have adopted the slots before a plan is made.
    #[test]
    fn what_was_adopted_stays_up_to_the_share() {
        for n in [3, 10, 50] {
            let (smaller, larger) = (ring_of(n - 1), ring_of(n));
            let planned = owners(&larger, &fresh(&larger));
            let adopted: Vec<_> = (0..)
                .zip(&planned)
                .map(|(slot, owner)| {
                    let lives = owner
                        .clone()
                        .filter(|owner| smaller.index_of(owner).is_some());
                    lives.or_else(|| smaller.preference(Slot(slot)).next().cloned())
                })
                .collect();
            let plan = plan_placement(&smaller, &planned, &adopted, LOOSE);
            let after = owners(&smaller, &plan);
            let (_, most, mean) = spread(&smaller, &after);
            assert!(most / mean <= 1.05, "{n}: {most}, {mean}");
            let ideal = f64::from(SLOTS_DEFAULT) / f64::from(n);
            assert!(moved(&planned, &after) <= 1.3 * ideal, "{n}");
            assert!(moved(&adopted, &after) <= 0.5 * ideal, "{n}");
        }
    }

    #[test]
    fn the_next_in_line_are_of_other_zones() {
        let zones = ["a", "a", "b", "a", "c", "a", "b", "a"];
        let members = zones.iter().enumerate().map(|(number, zone)| RingNode {
            zone: (*zone).to_owned(),
            ..node(&format!("demo-node-{number}"), WEIGHT_NORMAL)
        });
        let ring = Ring::new(members.clone(), SLOTS_DEFAULT);
        let plain = Ring::new(
            members.map(|member| RingNode::normal(member.name)),
            SLOTS_DEFAULT,
        );
        for slot in (0..SLOTS_DEFAULT).map(Slot) {
            let order: Vec<_> = ring.preferred_indices(slot.0).to_vec();
            let of_zone: Vec<_> = order.iter().map(|&node| zones[usize::from(node)]).collect();
            assert_eq!(BTreeSet::from_iter(&of_zone[..3]).len(), 3, "{of_zone:?}");
            assert_eq!(BTreeSet::from_iter(&of_zone[3..5]).len(), 2, "{of_zone:?}");
            // The first is the ring's, and so are the shares.
            assert_eq!(ring.preference(slot).next(), plain.preference(slot).next());
        }
        assert_eq!(owned(&ring, &fresh(&ring)), [128; 8]);
    }

    #[test]
    fn placement_follows_the_ring() {
        for n in [3, 10, 50] {
            let ring = ring_of(n);
            let plan = fresh(&ring);
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

        /// Without a plan in force, whoever owns what.
        #[test]
        fn every_share_is_within_one_slot(
            before in members(), after in members(), slots in slots()
        ) {
            let earlier = Ring::new(before, slots);
            let current = owners(&earlier, &fresh(&earlier));
            let ring = Ring::new(after, slots);
            let plan = plan_placement(&ring, &[], &current, LOOSE);
            prop_assert_eq!(plan.len(), usize::from(slots));
            let total: u64 = ring.weights.iter().copied().map(u64::from).sum();
            for (count, weight) in owned(&ring, &plan).into_iter().zip(&ring.weights) {
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
            let current = owners(&earlier, &fresh(&earlier));
            let ring = Ring::new(after, slots);
            let plan = plan_placement(&ring, &[], &current, LOOSE);
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
            prop_assert_eq!(plan_placement(&ring, &[], &planned, LOOSE), plan.clone());
            prop_assert_eq!(plan_placement(&ring, &planned, &current, LOOSE), plan);
        }

        /// A plan in force stays as it is, wherever the slots are on their way, as long as every node has
        /// some and none more than it may.
        #[test]
        fn nothing_moves_without_a_cause(
            members in members(), slots in slots(), by_load in proptest::collection::vec(any::<(u16, u16)>(), 0..200),
            seed in any::<u16>(),
        ) {
            let ring = Ring::new(members, slots);
            let mut plan = fresh(&ring);
            let nodes = u16::try_from(ring.nodes.len()).unwrap();
            let total: u64 = ring.weights.iter().copied().map(u64::from).sum();
            for (slot, node) in by_load {
                let (slot, to) = (usize::from(slot % slots), node % nodes);
                let counts = owned(&ring, &plan);
                let most = u64::from(slots) * u64::from(ring.weights[usize::from(to)]) * u64::from(LOOSE) / total / 100;
                if 1 < counts[usize::from(plan[slot])] && u64::from(counts[usize::from(to)]) < most {
                    plan[slot] = to;
                }
            }
            prop_assume!(!owned(&ring, &plan).contains(&0));
            let planned = owners(&ring, &plan);
            let mut on_their_way = planned.clone();
            on_their_way.rotate_left(usize::from(seed % slots));
            prop_assert_eq!(plan_placement(&ring, &planned, &on_their_way, LOOSE), plan.clone());
            prop_assert_eq!(plan_placement(&ring, &planned, &[], LOOSE), plan);
        }
    }

    proptest! {
        // Rings of 50 nodes take their time.
        #![proptest_config(ProptestConfig::with_cases(24))]

        /// Whatever the nodes are called and weigh: a node that joins or leaves moves its own share, whole slots
        /// aside, and leaves every node within a slot of its share as it was or as it is now.
        #[test]
        fn who_joins_or_leaves_moves_its_share(
            (mut members, which) in (proptest::collection::btree_map("[a-z]{1,6}", weight(), 2..=50), any::<proptest::sample::Index>()),
        ) {
            let name = members.keys().nth(which.index(members.len())).unwrap().clone();
            let ring_of = |members: &BTreeMap<String, u32>| {
                Ring::new(members.iter().map(|(name, weight)| node(name, *weight)), SLOTS_DEFAULT)
            };
            let larger = ring_of(&members);
            let weight = members.remove(&name).unwrap();
            let smaller = ring_of(&members);
            let total = larger.weights.iter().sum::<u32>();
            let share = f64::from(SLOTS_DEFAULT) * f64::from(weight) / f64::from(total);

            let without = owners(&smaller, &fresh(&smaller));
            let joined = replan(&larger, &without, LOOSE);
            let with = owners(&larger, &fresh(&larger));
            let left = replan(&smaller, &with, LOOSE);
            let share_of = |ring: &Ring, node: &NodeId| {
                let total: u32 = ring.weights.iter().sum();
                let weight = ring.weights[usize::from(ring.index_of(node)?)];
                Some(f64::from(SLOTS_DEFAULT) * f64::from(weight) / f64::from(total))
            };
            for (earlier, before, ring, after) in
                [(&smaller, &without, &larger, &joined), (&larger, &with, &smaller, &left)]
            {
                let moved = moved(before, after);
                prop_assert!(moved <= (1.3 * share).max(share + 2.0), "{} of a share of {}", moved, share);
                let plan: Vec<u16> = after.iter().flatten().map(|node| ring.index_of(node).unwrap()).collect();
                for (count, node) in owned(ring, &plan).into_iter().zip(&ring.nodes) {
                    let is = share_of(ring, node).unwrap();
                    let was = share_of(earlier, node).unwrap_or(is);
                    let count = f64::from(count);
                    prop_assert!(is.min(was) - 1.0 < count, "{} slots, share {} then {}", count, was, is);
                    prop_assert!(count < is.max(was) + 1.0, "{} slots, share {} then {}", count, was, is);
                }
            }
        }
    }

    /// The default of `spec.placement.maxLoadPercent`.
    const LOOSE: u32 = 125;

    fn node(name: &str, weight: u32) -> RingNode {
        RingNode {
            weight,
            ..RingNode::normal(name.into())
        }
    }

    fn fresh(ring: &Ring) -> Vec<u16> {
        plan_placement(ring, &[], &[], LOOSE)
    }

    /// Plans again from a plan that was reached.
    fn replan(
        ring: &Ring,
        placed: &[Option<NodeId>],
        load_max_percent: u32,
    ) -> Vec<Option<NodeId>> {
        owners(
            ring,
            &plan_placement(ring, placed, placed, load_max_percent),
        )
    }

    fn ring_of(nodes: u16) -> Ring {
        let members = (0..nodes).map(|n| node(&format!("demo-node-{n}"), WEIGHT_NORMAL));
        Ring::new(members, SLOTS_DEFAULT)
    }

    fn owners(ring: &Ring, plan: &[u16]) -> Vec<Option<NodeId>> {
        plan.iter()
            .map(|&node| Some(ring.nodes()[usize::from(node)].clone()))
            .collect()
    }

    fn owned(ring: &Ring, plan: &[u16]) -> Vec<u16> {
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
        let counts = owned(ring, &plan).into_iter().map(f64::from);
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

    fn members() -> impl Strategy<Value = Vec<RingNode>> {
        let member = ("[a-f]{1,2}", weight(), "[x-z]?").prop_map(|(name, weight, zone)| RingNode {
            zone,
            ..node(&name, weight)
        });
        proptest::collection::vec(member, 1..12)
    }

    fn weight() -> impl Strategy<Value = u32> {
        prop_oneof![Just(WEIGHT_NORMAL), 1..400_u32]
    }

    fn slots() -> impl Strategy<Value = u16> {
        prop_oneof![Just(256), Just(512)]
    }
}
