//! Who is a member and who owns what, as last read: what follows from it is worked out without I/O.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use collab_core::control::MemberState;
use collab_core::ids::{DocumentId, Epoch, NodeId, Slot};
use collab_core::limits::LEASE;
use collab_core::quarantine::{Quarantine, quarantined};
use collab_core::ring::{Ring, RingNode, plan_placement, slot_of};
use collab_core::wire::map::{SharedMap, SharedMember};
use tokio::time::Instant;
use uuid::Uuid;

use crate::store::{MapChange, Member, Ownership, Placement, SlotRow};

/// Who owns what, as last read.
#[derive(Clone, Debug, Default)]
pub struct Map {
    /// Slots that documents hash to; virtual ones, each for one document, come after.
    slots: u16,
    owners: Vec<SlotRow>,
    pins: Pins,
    members: BTreeMap<Uuid, Known>,
    placement: Placement,
}

/// The documents that have a slot of their own.
#[derive(Clone, Debug, Default)]
struct Pins {
    documents: BTreeMap<Slot, DocumentId>,
    slots: HashMap<DocumentId, Slot>,
}

impl Pins {
    fn set(&mut self, slot: Slot, document: Option<DocumentId>) {
        if let Some(before) = self.documents.remove(&slot) {
            self.slots.remove(&before);
        }
        if let Some(document) = document {
            self.slots.insert(document.clone(), slot);
            self.documents.insert(slot, document);
        }
    }
}

/// A member as this node knows it.
#[derive(Clone, Debug)]
struct Known {
    member: Member,
    /// When its lease ends unless it is renewed, or when it ended.
    lease_end: Instant,
}

impl Known {
    /// What is known of `member`, read at `read_at`, by one who knew `before` until then.
    fn learned(member: Member, read_at: Instant, before: Option<&Self>) -> Self {
        let lease_end = match before {
            // The store no longer says since when: candidates count from the end, not from their last look.
            Some(before) if member.lease_left.is_zero() => before.lease_end.min(read_at),
            _ => read_at + member.lease_left,
        };
        Self { member, lease_end }
    }
}

/// Where a slot is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The process.
    pub incarnation: Uuid,
    /// `host:port` of its internal listener; empty when it is not (yet) known.
    pub address: String,
    /// The version of the ownership.
    pub epoch: Epoch,
}

impl Map {
    /// Nothing is known yet of this many slots.
    pub(super) fn new(slots: u16) -> Self {
        Self {
            slots,
            ..Self::default()
        }
    }

    /// Whether it was read at all: there is no cluster without slots.
    pub(super) const fn is_read(&self) -> bool {
        !self.owners.is_empty()
    }

    /// The version of the plan that is known.
    pub(super) const fn placement_version(&self) -> i64 {
        self.placement.version
    }

    /// The owner of a slot, alive or not; `None` before the first.
    pub fn owner(&self, slot: Slot) -> Option<Owner> {
        let row = self.owners.get(usize::from(slot.0))?;
        let incarnation = row.owner?;
        let address = self
            .members
            .get(&incarnation)
            .map(|known| known.member.address.clone());
        Some(Owner {
            incarnation,
            address: address.unwrap_or_default(),
            epoch: row.epoch,
        })
    }

    /// The version of a slot's ownership.
    pub fn epoch(&self, slot: Slot) -> Epoch {
        self.owners
            .get(usize::from(slot.0))
            .map_or(Epoch(0), |row| row.epoch)
    }

    /// The right of `me` to write a slot.
    pub(super) fn ownership(&self, slot: Slot, me: Uuid) -> Option<Ownership> {
        let row = self.owners.get(usize::from(slot.0))?;
        (row.owner == Some(me)).then_some(Ownership {
            slot,
            epoch: row.epoch,
            incarnation: me,
        })
    }

    /// The rights of `me`, in order of slot.
    pub(super) fn ownerships(&self, me: Uuid) -> Vec<Ownership> {
        let slots = self.owners.iter().map(|row| row.slot);
        slots.filter_map(|slot| self.ownership(slot, me)).collect()
    }

    /// What another node needs of it to relay.
    pub fn shared(&self) -> SharedMap {
        let members: Vec<&Member> = self.members().collect();
        let index = |owner: Uuid| {
            let index = members
                .iter()
                .position(|member| member.incarnation == owner);
            index.and_then(|index| u16::try_from(index).ok())
        };
        let owners = self.owners.iter();
        SharedMap {
            owners: owners
                .map(|row| (row.owner.and_then(index), row.epoch))
                .collect(),
            members: members
                .iter()
                .map(|member| SharedMember {
                    incarnation: member.incarnation,
                    node: member.node.clone(),
                    address: member.address.clone(),
                })
                .collect(),
        }
    }

    /// Takes what a peer knows to be newer; answers whether there was any.
    pub(super) fn learn_from_peer(&mut self, shared: &SharedMap, now: Instant) -> bool {
        let mut newer = false;
        for (row, (owner, epoch)) in self.owners.iter_mut().zip(&shared.owners) {
            let owner = owner.and_then(|owner| shared.members.get(usize::from(owner)));
            let Some(owner) = owner.filter(|_| row.epoch < *epoch) else {
                continue;
            };
            (row.owner, row.epoch) = (Some(owner.incarnation), *epoch);
            newer = true;
            self.members.entry(owner.incarnation).or_insert_with(|| {
                let member = Member {
                    node: owner.node.clone(),
                    incarnation: owner.incarnation,
                    pod_uid: String::new(),
                    address: owner.address.clone(),
                    zone: String::new(),
                    weight: 0,
                    state: MemberState::Active,
                    lease_left: LEASE,
                    load: None,
                    load_age: Duration::ZERO,
                    leases_lost_ago: Vec::new(),
                };
                Known::learned(member, now, None)
            });
        }
        newer
    }

    /// Takes rows that changed, or all that there are. Answers whether any of it is news.
    pub(super) fn take(&mut self, change: MapChange, trust: Trust) -> bool {
        let mut changed = false;
        if change.is_whole {
            // What is not told was lost in a failover of the database, and its number may be given anew.
            let told = change.slots.last();
            let told = told.map_or(0, |row| usize::from(row.slot.0) + 1);
            changed = told < self.owners.len() || !self.pins.documents.is_empty();
            self.owners.truncate(told);
            self.pins = Pins::default();
        }
        for row in change.slots {
            let index = usize::from(row.slot.0);
            if self.owners.len() <= index {
                let missing = self.owners.len()..=index;
                let unowned = missing.map(|slot| SlotRow {
                    slot: Slot(u16::try_from(slot).unwrap_or(u16::MAX)),
                    owner: None,
                    epoch: Epoch(0),
                });
                self.owners.extend(unowned);
            }
            let counts = trust == Trust::AsTheyAre || self.owners[index].epoch <= row.epoch;
            if counts && self.owners[index] != row {
                self.owners[index] = row;
                changed = true;
            }
        }
        for (slot, document) in change.pins {
            self.pins.set(slot, document);
            changed = true;
        }
        changed
    }

    /// Takes ownerships that the store has just answered.
    pub(super) fn note(&mut self, slots: &[(Slot, Epoch)], owner: Uuid) {
        for (slot, epoch) in slots {
            if let Some(row) = self.owners.get_mut(usize::from(slot.0))
                && row.epoch < *epoch
            {
                *row = SlotRow {
                    slot: *slot,
                    owner: Some(owner),
                    epoch: *epoch,
                };
            }
        }
    }

    /// Takes all members, as read at `read_at`, and a new plan. Answers whether any of it is news.
    pub(super) fn learn(
        &mut self,
        members: Vec<Member>,
        placement: Option<Placement>,
        read_at: Instant,
    ) -> bool {
        let same = |member: &Member| {
            self.members.get(&member.incarnation).is_some_and(|known| {
                let known = &known.member;
                known.state == member.state
                    && known.address == member.address
                    && known.zone == member.zone
                    && known.lease_left.is_zero() == member.lease_left.is_zero()
            })
        };
        let changed =
            placement.is_some() || self.members.len() != members.len() || !members.iter().all(same);
        let members = members.into_iter().map(|member| {
            let before = self.members.get(&member.incarnation);
            let known = Known::learned(member, read_at, before);
            (known.member.incarnation, known)
        });
        self.members = members.collect();
        if let Some(placement) = placement {
            self.placement = placement;
        }
        changed
    }

    /// Takes that the lease of a member was ended.
    pub(super) fn lease_ended(&mut self, incarnation: Uuid, now: Instant) {
        if let Some(known) = self.members.get_mut(&incarnation) {
            known.member.lease_left = Duration::ZERO;
            known.lease_end = known.lease_end.min(now);
        }
    }

    /// Every slot that documents hash to, in order.
    pub fn slots(&self) -> &[SlotRow] {
        &self.owners[..self.owners.len().min(usize::from(self.slots))]
    }

    /// Every document that has a slot of its own, in order of slot.
    pub fn pins(&self) -> impl Iterator<Item = (&SlotRow, &DocumentId)> {
        let pins = self.pins.documents.iter();
        pins.filter_map(|(slot, document)| Some((self.owners.get(usize::from(slot.0))?, document)))
    }

    /// The slot of a document.
    pub fn slot_of(&self, document: &DocumentId) -> Slot {
        let pinned = self.pins.slots.get(document).copied();
        pinned.unwrap_or_else(|| slot_of(document, self.slots))
    }

    /// A virtual slot that is for no document is nobody's business.
    fn is_used(&self, slot: Slot) -> bool {
        slot.0 < self.slots || self.pins.documents.contains_key(&slot)
    }

    /// Slots whose owner is not the one that the planner wants.
    pub fn misplaced(&self) -> u16 {
        let node = |row: &SlotRow| self.node_of(row.owner?);
        let pairs = self.owners.iter().zip(&self.placement.slots);
        let misplaced = pairs
            .filter(|(row, wanted)| {
                self.is_used(row.slot) && !wanted.0.is_empty() && node(row) != Some(wanted)
            })
            .count();
        u16::try_from(misplaced).unwrap_or(u16::MAX)
    }

    /// The other members whose lease has not ended: incarnation and address.
    pub fn peers(&self, me: Uuid, now: Instant) -> impl Iterator<Item = (Uuid, &str)> {
        let peers = self.members.values().filter(move |known| {
            known.member.incarnation != me
                && now < known.lease_end
                && !known.member.address.is_empty()
        });
        peers.map(|known| (known.member.incarnation, known.member.address.as_str()))
    }

    /// The name of a registered process.
    pub fn node_of(&self, incarnation: Uuid) -> Option<&NodeId> {
        let known = self.members.get(&incarnation)?;
        Some(&known.member.node)
    }

    /// Whether a process is registered.
    pub fn is_member(&self, incarnation: Uuid) -> bool {
        self.members.contains_key(&incarnation)
    }

    /// What a registered process is to do.
    pub(super) fn state_of(&self, incarnation: Uuid) -> Option<MemberState> {
        let known = self.members.get(&incarnation)?;
        Some(known.member.state)
    }

    /// Every registered process.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values().map(|known| &known.member)
    }

    /// Whether some slot has an owner that is not known as a member, or not yet.
    pub(super) fn has_strangers(&self) -> bool {
        let mut owners = self.owners.iter().filter_map(|row| row.owner);
        owners.any(|owner| !self.members.contains_key(&owner))
    }

    /// The members that may be given slots: alive at `now` and not draining.
    pub(super) fn candidates(&self, now: Instant) -> BTreeMap<NodeId, Uuid> {
        let able = self
            .members
            .values()
            .filter(|known| known.member.state == MemberState::Active && now < known.lease_end);
        able.map(|known| (known.member.node.clone(), known.member.incarnation))
            .collect()
    }

    /// The candidates that are in quarantine at `now`.
    pub fn quarantined(&self, now: Instant) -> BTreeMap<NodeId, Quarantine> {
        let candidates = self.candidates(now);
        let members = candidates
            .values()
            .filter_map(|incarnation| Some(&self.members.get(incarnation)?.member));
        quarantined(members.map(|member| (&member.node, &member.leases_lost_ago[..])))
    }

    /// The candidates, less those that are held in quarantine.
    pub(super) fn ring(
        &self,
        candidates: &BTreeMap<NodeId, Uuid>,
        quarantined: &BTreeMap<NodeId, Quarantine>,
    ) -> Ring {
        let members = candidates.values().filter_map(|incarnation| {
            let member = &self.members.get(incarnation)?.member;
            let quarantine = quarantined.get(&member.node);
            Some(RingNode {
                name: member.node.clone(),
                weight: quarantine.map_or(member.weight, |it| it.of(member.weight)),
                zone: member.zone.clone(),
            })
        });
        Ring::new(members, self.slots)
    }

    /// The slots of an owner.
    pub(super) fn owned_by(&self, owner: Uuid) -> Vec<Slot> {
        let used = self.owners.iter().filter(|row| self.is_used(row.slot));
        used.filter(|row| row.owner == Some(owner))
            .map(|row| row.slot)
            .collect()
    }

    /// Slots without a living owner, and since when.
    pub(super) fn orphans(&self, now: Instant) -> Vec<(Slot, Option<Instant>)> {
        let used = self.owners.iter().filter(|row| self.is_used(row.slot));
        let orphaned = used.filter_map(|row| {
            let Some(owner) = row.owner else {
                return Some((row.slot, None));
            };
            match self.members.get(&owner) {
                None => Some((row.slot, None)),
                Some(known) if known.lease_end <= now => Some((row.slot, Some(known.lease_end))),
                Some(_) => None,
            }
        });
        orphaned.collect()
    }

    /// The slots of `me` that belong to somebody else, and to whom: what the operator planned, or,
    /// when nobody plans, what every member works out for itself from the same numbers.
    pub fn handoffs(&self, me: Uuid, now: Instant) -> Vec<(Ownership, Uuid)> {
        let mut candidates = self.candidates(now);
        candidates.retain(|_, incarnation| {
            *incarnation != me || self.state_of(me) == Some(MemberState::Active)
        });
        if candidates.values().all(|candidate| *candidate == me) {
            return Vec::new();
        }
        let quarantined = self.quarantined(now);
        let ring = self.ring(&candidates, &quarantined);
        let is_held = |node: &NodeId| quarantined.get(node).is_some_and(|it| it.is_held());
        let serves = |incarnation| {
            let mut serving = candidates.iter().filter(|(node, _)| !is_held(node));
            serving.any(|(_, candidate)| *candidate == incarnation)
        };
        let current: Vec<Option<NodeId>> = self
            .slots()
            .iter()
            .map(|row| self.node_of(row.owner?).cloned())
            .collect();
        let planned = plan_placement(&ring, &[], &current, 100);
        let wanted = |slot: Slot| {
            let number = usize::from(slot.0);
            let by_operator = self.placement.slots.get(number);
            // A plan that was made before the quarantine began does not end it.
            let by_operator = by_operator
                .filter(|node| !is_held(node))
                .and_then(|node| candidates.get(node));
            by_operator.or_else(|| {
                let node = match planned.get(number) {
                    Some(index) => ring.nodes().get(usize::from(*index)),
                    // A virtual slot stays while its owner does.
                    None if serves(me) => return None,
                    None => ring.preference(slot).next(),
                };
                node.and_then(|node| candidates.get(node))
            })
        };
        let mine = self.ownerships(me).into_iter();
        let moves = mine.filter_map(|ownership| {
            let target = *wanted(ownership.slot)?;
            (target != me).then_some((ownership, target))
        });
        moves.collect()
    }
}

/// Which rows of the map replace what is known.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// Those of a higher epoch: a late answer must not undo what a claim of our own already showed.
    Newer,
    /// All: the database has failed over, and epochs may have gone back.
    AsTheyAre,
}

#[cfg(test)]
mod tests;
