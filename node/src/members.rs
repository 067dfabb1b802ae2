//! Members and the slot map, watched; the lease that lets this node own; adoption.
//!
//! Three loops feed one picture. *Renewal* keeps the lease: the node counts from before it asked, on its
//! own monotonic clock, so it never believes in a lease longer than the store does. The *map* loop
//! follows who owns which slot. *Adoption* takes slots whose owner is lost, in each slot's order of
//! preference. Safety does not rest on any of this: the fence in the store does; these loops decide
//! how soon.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use collab_core::control::{LoadSample, MemberState};
use collab_core::ids::{DocumentId, Epoch, NodeId, Slot};
use collab_core::limits::{
    ADOPT_AFTER_STEADY, ADOPTION_STAGGER, LEASE, LEASE_RENEW_EVERY, MAP_POLL_EVERY,
    STOP_OWNING_AFTER,
};
use collab_core::ring::{Ring, plan_placement, slot_of};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use uuid::Uuid;

use crate::metrics::Metrics;
use crate::store::{Claim, Member, Ownership, Placement, Registration, SlotRow, Store};
use crate::watched::{Watched, Watcher};

/// Between two looks for lost owners.
const ADOPTION_EVERY: Duration = Duration::from_millis(50);
/// A renewal that takes longer is given up and tried again.
const RENEW_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Who owns what, as last read.
#[derive(Clone, Debug, Default)]
pub struct Map {
    owners: Vec<SlotRow>,
    members: BTreeMap<Uuid, Known>,
    placement: Placement,
}

/// A member and when this node learned of it.
#[derive(Clone, Debug)]
struct Known {
    member: Member,
    read_at: Instant,
}

impl Known {
    /// When its lease ends, unless it is renewed.
    fn lease_end(&self) -> Instant {
        self.read_at + self.member.lease_left
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

    /// Every slot, in order.
    pub fn slots(&self) -> &[SlotRow] {
        &self.owners
    }

    /// Slots whose owner is not the one that the planner wants.
    pub fn misplaced(&self) -> u16 {
        let node = |row: &SlotRow| {
            self.members
                .get(&row.owner?)
                .map(|known| &known.member.node)
        };
        let pairs = self.owners.iter().zip(&self.placement.slots);
        let misplaced = pairs
            .filter(|(row, wanted)| node(row) != Some(wanted))
            .count();
        u16::try_from(misplaced).unwrap_or(u16::MAX)
    }

    /// Every registered process.
    pub fn members(&self) -> impl Iterator<Item = &Member> {
        self.members.values().map(|known| &known.member)
    }

    /// Whether some slot has an owner that is not known as a member, or not yet.
    fn has_strangers(&self) -> bool {
        let mut owners = self.owners.iter().filter_map(|row| row.owner);
        owners.any(|owner| !self.members.contains_key(&owner))
    }

    /// The members that may be given slots: alive at `now` and not draining.
    fn candidates(&self, now: Instant) -> BTreeMap<NodeId, Uuid> {
        let able = self
            .members
            .values()
            .filter(|known| known.member.state == MemberState::Active && now < known.lease_end());
        able.map(|known| (known.member.node.clone(), known.member.incarnation))
            .collect()
    }

    fn ring(&self, candidates: &BTreeMap<NodeId, Uuid>) -> Ring {
        let weight = |incarnation| {
            self.members
                .get(incarnation)
                .map_or(100, |known| known.member.weight)
        };
        let members = candidates
            .iter()
            .map(|(node, incarnation)| (node.clone(), weight(incarnation)));
        Ring::new(
            members,
            u16::try_from(self.owners.len()).unwrap_or(u16::MAX),
        )
    }

    /// Slots without a living owner, and since when.
    fn orphans(&self, now: Instant) -> Vec<(Slot, Option<Instant>)> {
        let orphaned = self.owners.iter().filter_map(|row| {
            let Some(owner) = row.owner else {
                return Some((row.slot, None));
            };
            match self.members.get(&owner) {
                None => Some((row.slot, None)),
                Some(known) if known.lease_end() <= now => {
                    Some((row.slot, Some(known.lease_end())))
                }
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
            *incarnation != me
                || self
                    .members
                    .get(&me)
                    .is_some_and(|known| known.member.state == MemberState::Active)
        });
        if candidates.is_empty() {
            return Vec::new();
        }
        let ring = self.ring(&candidates);
        let current: Vec<Option<NodeId>> = self
            .owners
            .iter()
            .map(|row| {
                self.members
                    .get(&row.owner?)
                    .map(|known| known.member.node.clone())
            })
            .collect();
        let planned = plan_placement(&ring, &current);
        let wanted = |slot: usize| {
            let by_operator = self
                .placement
                .slots
                .get(slot)
                .and_then(|node| candidates.get(node));
            by_operator.or_else(|| {
                let node = planned
                    .get(slot)
                    .and_then(|index| ring.nodes().get(usize::from(*index)));
                node.and_then(|node| candidates.get(node))
            })
        };
        let mine = self.owners.iter().filter(|row| row.owner == Some(me));
        let moves = mine.filter_map(|row| {
            let target = *wanted(usize::from(row.slot.0))?;
            let ownership = Ownership {
                slot: row.slot,
                epoch: row.epoch,
                incarnation: me,
            };
            (target != me).then_some((ownership, target))
        });
        moves.collect()
    }
}

/// The lease of this node.
#[derive(Debug, Default)]
struct Lease {
    /// When the renewal that succeeded last was begun.
    renewed: Option<Instant>,
    /// Since when renewals have succeeded without a gap.
    steady_since: Option<Instant>,
}

/// This node among the others.
pub struct Members {
    store: Arc<dyn Store>,
    metrics: Metrics,
    registration: Registration,
    slots: u16,
    map: Watched<Arc<Map>>,
    lease: Mutex<Lease>,
    load: Mutex<LoadSample>,
    look_now: Notify,
    renew_now: Notify,
    draining: AtomicBool,
    /// No other member can exist: own at once instead of watching first.
    alone: bool,
}

/// Why membership ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// A newer process of the same pod has taken over.
    #[error("this process is no member any more: a newer process of the same pod took its place")]
    Superseded,
}

impl Members {
    /// Describes a node that is not registered yet.
    pub fn new(
        store: Arc<dyn Store>,
        metrics: Metrics,
        registration: Registration,
        slots: u16,
        alone: bool,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            metrics,
            registration,
            slots,
            map: Watched::default(),
            lease: Mutex::default(),
            load: Mutex::default(),
            look_now: Notify::new(),
            renew_now: Notify::new(),
            draining: AtomicBool::new(false),
            alone,
        })
    }

    /// This run of this node.
    pub fn incarnation(&self) -> Uuid {
        self.registration.incarnation
    }

    /// The name of this node.
    pub fn node(&self) -> &NodeId {
        &self.registration.node
    }

    /// Slots of the cluster.
    pub const fn slots(&self) -> u16 {
        self.slots
    }

    /// The slot of a document.
    pub fn slot_of(&self, document: &DocumentId) -> Slot {
        slot_of(document, self.slots)
    }

    /// The picture now.
    pub fn map(&self) -> Arc<Map> {
        self.map.get()
    }

    /// The picture, with a notice of each change.
    pub fn watch(&self) -> Watcher<Arc<Map>> {
        self.map.watch()
    }

    /// Has the map read anew soon: somebody knows of an owner that this node does not.
    pub fn look_now(&self) {
        self.look_now.notify_one();
    }

    /// The right to write a slot, if this node has it by the map. Says nothing of the lease.
    pub fn ownership(&self, slot: Slot) -> Option<Ownership> {
        let map = self.map.get();
        let row = map.owners.get(usize::from(slot.0))?;
        let incarnation = self.incarnation();
        (row.owner == Some(incarnation)).then_some(Ownership {
            slot,
            epoch: row.epoch,
            incarnation,
        })
    }

    /// Whether the lease lets this node acknowledge.
    pub fn lease_held(&self) -> bool {
        let renewed = self.lease().renewed;
        renewed.is_some_and(|renewed| renewed.elapsed() < STOP_OWNING_AFTER)
    }

    /// The numbers that the next renewal reports.
    pub fn set_load(&self, load: LoadSample) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = load;
    }

    /// Gives all slots away from now on, and says so to the others.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether this node gives its slots away: it is being stopped, or the operator asked for it.
    pub fn is_draining(&self) -> bool {
        let asked = || {
            let map = self.map.get();
            let me = map.members.get(&self.incarnation());
            me.is_some_and(|known| known.member.state != MemberState::Active)
        };
        self.draining.load(Ordering::Relaxed) || asked()
    }

    /// Slots owned by the map.
    pub fn owned(&self) -> Vec<Ownership> {
        let incarnation = self.incarnation();
        let map = self.map.get();
        let mine = map
            .owners
            .iter()
            .filter(|row| row.owner == Some(incarnation));
        mine.map(|row| Ownership {
            slot: row.slot,
            epoch: row.epoch,
            incarnation,
        })
        .collect()
    }

    /// Registers, then keeps the lease until it is superseded. Waits for a store that does not answer yet.
    ///
    /// # Errors
    /// When this process must end, with the reason.
    pub async fn keep_lease(self: Arc<Self>) -> anyhow::Result<()> {
        loop {
            let begun = Instant::now();
            match self
                .store
                .register(&self.registration, self.slots, LEASE)
                .await
            {
                Ok(()) => {
                    self.renewed(begun);
                    break;
                }
                Err(error @ crate::store::StoreError::Unusable(_)) => return Err(error.into()),
                Err(error) => tracing::warn!(%error, "cannot register yet; trying again"),
            }
            sleep(LEASE_RENEW_EVERY).await;
        }
        tracing::info!(node = %self.registration.node, incarnation = %self.incarnation(), "registered as a member");
        let mut tick = interval(LEASE_RENEW_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = MemberState::Active;
        loop {
            tokio::select! {
                biased;
                _ = tick.tick() => {}
                () = self.renew_now.notified() => {}
            }
            if self.draining.load(Ordering::Relaxed) && told == MemberState::Active {
                match self
                    .store
                    .set_state(self.incarnation(), MemberState::Draining)
                    .await
                {
                    Ok(()) => told = MemberState::Draining,
                    Err(error) => tracing::warn!(%error, "cannot announce the drain yet"),
                }
            }
            let begun = Instant::now();
            let load = *self.load.lock().unwrap_or_else(PoisonError::into_inner);
            let renewal = self.store.renew(self.incarnation(), LEASE, load);
            match timeout(RENEW_TIMEOUT, renewal).await {
                Ok(Ok(Some(renewed))) => {
                    self.renewed(begun);
                    self.learn(renewed.members, renewed.placement_version, begun)
                        .await;
                }
                Ok(Ok(None)) => return Err(Ended::Superseded.into()),
                Ok(Err(error)) => self.not_renewed(&error.to_string()),
                Err(_) => self.not_renewed("no answer in time"),
            }
        }
    }

    /// Follows the map.
    pub async fn follow_map(self: Arc<Self>) {
        // Whoever registers first creates the slots: read before that, the map would stay empty.
        while self.lease().renewed.is_none() {
            sleep(MAP_POLL_EVERY).await;
        }
        let mut horizon = 0;
        loop {
            match self.store.map(horizon).await {
                Ok(change) => {
                    horizon = change.horizon;
                    self.publish(|map| {
                        let mut changed = false;
                        for row in change.slots {
                            let index = usize::from(row.slot.0);
                            if map.owners.len() <= index {
                                let missing = map.owners.len()..=index;
                                let unowned = missing.map(|slot| SlotRow {
                                    slot: Slot(u16::try_from(slot).unwrap_or(u16::MAX)),
                                    owner: None,
                                    epoch: Epoch(0),
                                });
                                map.owners.extend(unowned);
                            }
                            // A late answer must not undo what a claim of our own already showed.
                            if map.owners[index].epoch <= row.epoch && map.owners[index] != row {
                                map.owners[index] = row;
                                changed = true;
                            }
                        }
                        changed
                    });
                    // A slot was handed to a node that has just joined: a renewal answers its address.
                    if self.map().has_strangers() {
                        self.renew_now.notify_one();
                    }
                }
                Err(error) => tracing::debug!(%error, "cannot read the map"),
            }
            tokio::select! {
                biased;
                () = sleep(MAP_POLL_EVERY) => {}
                () = self.look_now.notified() => {}
                () = self.store.map_changed() => {}
            }
        }
    }

    /// Takes slots whose owner is lost.
    pub async fn adopt(self: Arc<Self>) {
        let mut tick = interval(ADOPTION_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // When a slot without owner or member was first seen so.
        let mut seen = BTreeMap::<Slot, Instant>::new();
        loop {
            tick.tick().await;
            if self.is_draining() || !self.may_adopt() {
                seen.clear();
                continue;
            }
            let now = Instant::now();
            let map = self.map();
            let orphans = map.orphans(now);
            let orphaned: BTreeSet<Slot> = orphans.iter().map(|(slot, _)| *slot).collect();
            seen.retain(|slot, _| orphaned.contains(slot));
            if orphans.is_empty() {
                continue;
            }
            let candidates = map.candidates(now);
            let ring = map.ring(&candidates);
            let due: Vec<Slot> = orphans
                .into_iter()
                .filter(|(slot, since)| {
                    let since = since.unwrap_or_else(|| *seen.entry(*slot).or_insert(now));
                    let rank = ring
                        .preference(*slot)
                        .position(|node| *node == self.registration.node);
                    let wait =
                        rank.map(|rank| ADOPTION_STAGGER * u32::try_from(rank).unwrap_or(u32::MAX));
                    wait.is_some_and(|wait| since + wait <= now)
                })
                .map(|(slot, _)| slot)
                .collect();
            if !due.is_empty() {
                self.claim(&due).await;
            }
        }
    }

    /// Shows an own change of ownership before the map is read again.
    pub fn note(&self, slots: &[(Slot, Epoch)], owner: Uuid) {
        self.publish(|map| {
            for (slot, epoch) in slots {
                if let Some(row) = map.owners.get_mut(usize::from(slot.0))
                    && row.epoch < *epoch
                {
                    *row = SlotRow {
                        slot: *slot,
                        owner: Some(owner),
                        epoch: *epoch,
                    };
                }
            }
            true
        });
    }

    async fn claim(&self, slots: &[Slot]) {
        match self
            .store
            .claim(self.incarnation(), slots, Claim::Orphaned)
            .await
        {
            Ok(taken) if taken.is_empty() => self.look_now(),
            Ok(taken) => {
                self.metrics.adoptions.inc_by(taken.len() as u64);
                tracing::info!(slots = taken.len(), "adopted slots");
                self.note(&taken, self.incarnation());
            }
            Err(error) => tracing::warn!(%error, "cannot adopt slots"),
        }
    }

    /// A node that was cut off itself must not adopt as soon as the store answers again.
    fn may_adopt(&self) -> bool {
        let lease = self.lease();
        let steady = lease
            .steady_since
            .is_some_and(|since| self.alone || ADOPT_AFTER_STEADY <= since.elapsed());
        steady
            && lease
                .renewed
                .is_some_and(|renewed| renewed.elapsed() < STOP_OWNING_AFTER)
    }

    fn renewed(&self, begun: Instant) {
        let mut lease = self.lease();
        let gap = lease.renewed.is_none_or(|renewed| LEASE < begun - renewed);
        lease.renewed = Some(begun);
        if gap || lease.steady_since.is_none() {
            lease.steady_since = Some(begun);
        }
        drop(lease);
        self.metrics.store_up.set(1);
        self.metrics.lease_held.set(1);
    }

    fn not_renewed(&self, reason: &str) {
        self.lease().steady_since = None;
        self.metrics.store_up.set(0);
        self.metrics.lease_held.set(i64::from(self.lease_held()));
        tracing::warn!(reason, "the lease was not renewed");
    }

    async fn learn(&self, members: Vec<Member>, placement_version: i64, read_at: Instant) {
        let placement = if self.map.get().placement.version == placement_version {
            None
        } else {
            self.store.placement().await.ok()
        };
        self.publish(|map| {
            let same = |member: &Member| {
                map.members.get(&member.incarnation).is_some_and(|known| {
                    known.member.state == member.state && known.member.address == member.address
                })
            };
            let changed = placement.is_some()
                || map.members.len() != members.len()
                || !members.iter().all(same);
            map.members = members
                .into_iter()
                .map(|member| (member.incarnation, Known { member, read_at }))
                .collect();
            if let Some(placement) = placement {
                map.placement = placement;
            }
            changed
        });
        let owned = self.owned().len();
        self.metrics
            .slots_owned
            .set(i64::try_from(owned).unwrap_or(i64::MAX));
    }

    /// Changes the picture and wakes its watchers when `change` says that they should know.
    fn publish(&self, change: impl FnOnce(&mut Map) -> bool) {
        self.map.change(|map| change(Arc::make_mut(map)));
    }

    fn lease(&self) -> std::sync::MutexGuard<'_, Lease> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
