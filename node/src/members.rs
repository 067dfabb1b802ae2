//! Members and the slot map, watched; the lease that lets this node own; adoption.
//!
//! Three loops feed one picture. *Renewal* keeps the lease: the node counts from before it asked, on its
//! own monotonic clock, so it never believes in a lease longer than the store does. The *map* loop
//! follows who owns which slot. *Adoption* takes slots whose owner is lost, in each slot's order of
//! preference. Safety does not rest on any of this: the fence in the store does; these loops decide
//! how soon.
//!
//! An *incarnation* is one run of this node as a member. Usually that is the process; but a process that
//! was fenced while it lived begins a new one, without slots, and keeps its sockets.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use collab_core::control::{LoadSample, MemberState, Silence};
use collab_core::ids::{DocumentId, Epoch, NodeId, Slot};
use collab_core::limits::{
    ADOPT_AFTER_FAILOVER, ADOPT_AFTER_STEADY, ADOPTION_STAGGER, EARLY_FENCE_AGE, EARLY_FENCE_EVERY,
    EARLY_FENCE_RENEWAL_MAX, LEASE, LEASE_RENEW_EVERY, MAP_POLL_EVERY, STOP_OWNING_AFTER,
};
use collab_core::mutants::Mutant;
use collab_core::quarantine::{Quarantine, quarantined};
use collab_core::ring::{Ring, RingNode, plan_placement, slot_of};
use collab_core::wire::map::{SharedMap, SharedMember};
use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use uuid::{Builder, Uuid};

use crate::metrics::Metrics;
use crate::store::{
    Claim, Failovers, Judgement, MapChange, Member, Ownership, Placement, Registration, Renewal,
    Renewed, SlotRow, Store, StoreError,
};
use crate::watched::{Watched, Watcher};

/// Between two looks for lost owners.
const ADOPTION_EVERY: Duration = Duration::from_millis(50);
/// Between two renewals that hints ask for.
const HINTED_RENEW_EVERY: Duration = Duration::from_millis(50);
/// A renewal that takes longer is given up and tried again.
const RENEW_TIMEOUT: Duration = Duration::from_millis(1_500);

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
    fn learn_from_peer(&mut self, shared: &SharedMap, now: Instant) -> bool {
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
    fn take(&mut self, change: MapChange, trust: Trust) -> bool {
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
        let node = |row: &SlotRow| {
            self.members
                .get(&row.owner?)
                .map(|known| &known.member.node)
        };
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
    fn ring(
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
    fn owned_by(&self, owner: Uuid) -> Vec<Slot> {
        let used = self.owners.iter().filter(|row| self.is_used(row.slot));
        used.filter(|row| row.owner == Some(owner))
            .map(|row| row.slot)
            .collect()
    }

    /// Slots without a living owner, and since when.
    fn orphans(&self, now: Instant) -> Vec<(Slot, Option<Instant>)> {
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
            *incarnation != me
                || self
                    .members
                    .get(&me)
                    .is_some_and(|known| known.member.state == MemberState::Active)
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
            .map(|row| {
                self.members
                    .get(&row.owner?)
                    .map(|known| known.member.node.clone())
            })
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
        let mine = self.owners.iter().filter(|row| row.owner == Some(me));
        let moves = mine.filter_map(|row| {
            let target = *wanted(row.slot)?;
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

/// Which rows of the map replace what is known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// Those of a higher epoch: a late answer must not undo what a claim of our own already showed.
    Newer,
    /// All: the database has failed over, and epochs may have gone back.
    AsTheyAre,
}

/// The lease of this node.
#[derive(Debug, Default)]
struct Lease {
    /// When the renewal that succeeded last was begun.
    renewed: Option<Instant>,
    /// How long that one took.
    took: Duration,
    /// Since when renewals have succeeded without a gap.
    steady_since: Option<Instant>,
    /// When the database was last seen to have failed over.
    failed_over: Option<Instant>,
    /// When this node ended the lease of another.
    judged: Option<Instant>,
}

/// This node among the others.
pub struct Members {
    store: Arc<dyn Store>,
    metrics: Metrics,
    registration: Registration,
    incarnation: Mutex<Uuid>,
    /// The run of the pod before this process, until what it owned is taken.
    predecessor: Mutex<Option<Uuid>>,
    slots: u16,
    map: Watched<Arc<Map>>,
    lease: Mutex<Lease>,
    load: Mutex<LoadSample>,
    silences: Mutex<Vec<Silence>>,
    look_now: Notify,
    renew_now: Notify,
    adopt_now: Notify,
    draining: AtomicBool,
    /// Other nodes have told of owners while the store did not answer: they may not know of a failover.
    learned: AtomicBool,
    /// No other member can exist: own at once instead of watching first.
    alone: bool,
}

/// Why a membership ended.
#[derive(Debug, thiserror::Error)]
pub enum Ended {
    /// A newer process of the same pod has taken over: this one must end.
    #[error("this process is no member any more: a newer process of the same pod took its place")]
    Superseded,
    /// Others ended the lease: go on as a new incarnation.
    #[error("the lease of this incarnation was ended by others")]
    Fenced,
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
            incarnation: Mutex::new(registration.incarnation),
            predecessor: Mutex::default(),
            registration,
            slots,
            map: Watched::new(Arc::new(Map {
                slots,
                ..Map::default()
            })),
            lease: Mutex::default(),
            load: Mutex::default(),
            silences: Mutex::default(),
            look_now: Notify::new(),
            renew_now: Notify::new(),
            adopt_now: Notify::new(),
            draining: AtomicBool::new(false),
            learned: AtomicBool::new(false),
            alone,
        })
    }

    /// This run of this node as a member. Changes when it is fenced and goes on.
    pub fn incarnation(&self) -> Uuid {
        *self
            .incarnation
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The name of this node.
    pub fn node(&self) -> &NodeId {
        &self.registration.node
    }

    /// Slots of the cluster.
    pub const fn slots(&self) -> u16 {
        self.slots
    }

    /// The slot of a document by the map: the one of its own if it is pinned, else the one its id hashes to.
    pub fn slot_of(&self, document: &DocumentId) -> Slot {
        self.map.get().slot_of(document)
    }

    /// The slot that a document's id hashes to.
    pub fn home_of(&self, document: &DocumentId) -> Slot {
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

    /// Takes what a peer knows of the slots, while the store does not answer here.
    pub fn learn_from_peer(&self, shared: &SharedMap, now: Instant) {
        if !self.lease_held() {
            self.publish(|map| {
                let learned = map.learn_from_peer(shared, now);
                self.learned.fetch_or(learned, Ordering::AcqRel);
                learned
            });
        }
    }

    /// The numbers that the next renewal reports.
    pub fn set_load(&self, load: LoadSample) {
        *self.load.lock().unwrap_or_else(PoisonError::into_inner) = load;
    }

    /// The members that are not heard, which the next renewal reports.
    pub fn set_silences(&self, silences: Vec<Silence>) {
        *self.silences.lock().unwrap_or_else(PoisonError::into_inner) = silences;
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

    /// Registers, then keeps the lease until a newer process takes this one's place. Waits for a store that does not answer.
    ///
    /// # Errors
    /// When this process must end, with the reason.
    pub async fn keep_lease(self: Arc<Self>) -> anyhow::Result<()> {
        loop {
            self.join().await?;
            match self.renew_until_lost().await {
                Ended::Superseded => return Err(Ended::Superseded.into()),
                Ended::Fenced => self.begin_again(),
            }
        }
    }

    async fn join(&self) -> Result<(), StoreError> {
        let registration = Registration {
            incarnation: self.incarnation(),
            ..self.registration.clone()
        };
        loop {
            let begun = Instant::now();
            match self.store.register(&registration, self.slots, LEASE).await {
                Ok(before) => {
                    // Whoever was fenced while it lived goes on without slots.
                    let is_first = registration.incarnation == self.registration.incarnation;
                    *self.predecessor() = before.filter(|_| is_first);
                    if self.alone {
                        // Whoever owns a slot is an earlier run: there is no need to look first.
                        let slots: Vec<Slot> = (0..self.slots).map(Slot).collect();
                        self.claim(&slots, Claim::Orphaned).await;
                    }
                    self.renewed(begun);
                    self.look_now();
                    tracing::info!(node = %registration.node, incarnation = %registration.incarnation, "registered as a member");
                    return Ok(());
                }
                Err(error @ StoreError::Unusable(_)) => return Err(error),
                Err(error) => tracing::warn!(%error, "cannot register yet; trying again"),
            }
            sleep(LEASE_RENEW_EVERY).await;
        }
    }

    /// Renews when it is due, and when the members have changed, because the answer tells who they are.
    async fn renew_until_lost(&self) -> Ended {
        let mut tick = interval(LEASE_RENEW_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = MemberState::Active;
        loop {
            tokio::select! {
                biased;
                _ = tick.tick() => {}
                () = self.renew_now.notified() => {}
                () = self.store.members_changed() => {
                    let renewed = self.lease().renewed;
                    let since = renewed.map_or(HINTED_RENEW_EVERY, |renewed| renewed.elapsed());
                    sleep(HINTED_RENEW_EVERY.saturating_sub(since)).await;
                    tick.reset();
                }
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
            let load = self.sample();
            let (incarnation, pod_uid) = (self.incarnation(), &self.registration.pod_uid);
            let renewal = self.store.renew(incarnation, pod_uid, LEASE, load);
            match timeout(RENEW_TIMEOUT, renewal).await {
                Ok(Ok(Renewal::Renewed(renewed))) => {
                    self.renewed(begun);
                    self.learn(renewed, begun).await;
                }
                Ok(Ok(Renewal::Fenced)) => return Ended::Fenced,
                Ok(Ok(Renewal::Superseded)) => return Ended::Superseded,
                Ok(Err(error)) => self.not_renewed(&error.to_string()),
                Err(_) => self.not_renewed("no answer in time"),
            }
        }
    }

    fn sample(&self) -> LoadSample {
        let load = self.load.lock().unwrap_or_else(PoisonError::into_inner);
        let silences = self.silences.lock();
        LoadSample {
            silences: silences.unwrap_or_else(PoisonError::into_inner).clone(),
            ..load.clone()
        }
    }

    /// The lease was ended while this process lives: it goes on as another member, without slots. What it still has of the
    /// old ones is refused by the fence once they are claimed.
    fn begin_again(&self) {
        let next = following(self.incarnation());
        let fenced = std::mem::replace(
            &mut *self
                .incarnation
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
            next,
        );
        let mut lease = self.lease();
        lease.renewed = None;
        lease.steady_since = None;
        drop(lease);
        self.metrics.lease_held.set(0);
        self.metrics.leases_lost.inc();
        tracing::warn!(%fenced, incarnation = %next, "this node was fenced; it goes on as a new incarnation without slots");
    }

    /// Ends the lease of a member whose process is gone, once its last renewal is old enough to leave no doubt; `lost` is
    /// when the stream to it broke. Its slots are then adopted without waiting for the end of the lease.
    pub async fn fence_early(&self, target: Uuid, lost: Instant) {
        while lost.elapsed() < LEASE {
            let (judged, took) = {
                let lease = self.lease();
                (lease.judged, lease.took)
            };
            let too_soon = judged.is_some_and(|judged| judged.elapsed() < EARLY_FENCE_EVERY);
            if too_soon || EARLY_FENCE_RENEWAL_MAX < took || !self.lease_held() {
                return;
            }
            let judgement = self
                .store
                .end_lease(self.incarnation(), target, EARLY_FENCE_AGE)
                .await;
            match judgement {
                Ok(Judgement::Ended) => {
                    self.lease().judged = Some(Instant::now());
                    self.metrics.early_fences.inc();
                    tracing::warn!(incarnation = %target, after_ms = lost.elapsed().as_millis(), "ended the lease of a node that is gone");
                    self.publish(|map| {
                        if let Some(known) = map.members.get_mut(&target) {
                            known.member.lease_left = Duration::ZERO;
                            known.lease_end = known.lease_end.min(Instant::now());
                        }
                        true
                    });
                    return;
                }
                Ok(Judgement::Fresh(age)) => {
                    // The answer is in whole milliseconds, rounded down.
                    sleep(EARLY_FENCE_AGE.saturating_sub(age) + Duration::from_millis(1)).await;
                }
                Ok(Judgement::Void) => return,
                Err(error) => {
                    tracing::debug!(%error, "cannot end a lease early; it ends by itself");
                    return;
                }
            }
        }
    }

    /// Follows the map.
    pub async fn follow_map(self: Arc<Self>) {
        // Whoever registers first creates the slots: read before that, the map would stay empty.
        while self.lease().renewed.is_none() {
            let _ = timeout(MAP_POLL_EVERY, self.look_now.notified()).await;
        }
        let (mut horizon, mut trust) = (0, Trust::Newer);
        loop {
            let failed_over = self.store.failovers().is_pending();
            if failed_over && !self.take_back().await {
                sleep(MAP_POLL_EVERY).await;
                continue;
            }
            // The rows may be older than what is known here, or than what others know: until they are read they count as
            // they are.
            let heard = self.lease_held() && self.learned.swap(false, Ordering::AcqRel);
            if failed_over || heard {
                (horizon, trust) = (0, Trust::AsTheyAre);
            }
            match self.store.map(horizon).await {
                Ok(change) => {
                    let is_first = horizon == 0;
                    horizon = change.horizon;
                    self.publish(|map| map.take(change, trust));
                    trust = Trust::Newer;
                    if is_first {
                        // Who starts where its predecessor ended is waited for.
                        self.adopt_now.notify_one();
                    }
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

    /// After a failover of the database: takes back what this node owned as far as it knows. Answers whether that is done.
    async fn take_back(&self) -> bool {
        self.lease().failed_over = Some(Instant::now());
        let held = self.owned();
        let asked = self.store.failovers();
        match self.store.reclaim(self.incarnation(), &held).await {
            Ok(taken) => {
                tracing::warn!(
                    owned = held.len(),
                    slots = taken.len(),
                    "took slots back after a failover of the database"
                );
                self.note(&taken, self.incarnation(), asked);
                true
            }
            Err(error) => {
                tracing::warn!(%error, "cannot take slots back yet after a failover of the database");
                false
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
            tokio::select! {
                biased;
                _ = tick.tick() => {}
                () = self.adopt_now.notified() => {}
            }
            if self.is_draining() || !self.may_adopt() {
                seen.clear();
                self.succeed().await;
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
            let ring = map.ring(&candidates, &map.quarantined(now));
            let due: Vec<Slot> = orphans
                .into_iter()
                .filter(|(slot, since)| {
                    let since = since.unwrap_or_else(|| *seen.entry(*slot).or_insert(now));
                    let mut order = ring.preference(*slot);
                    let rank = order.position(|node| *node == self.registration.node);
                    // Who is held in quarantine steps in when nobody else does.
                    let is_held = candidates.contains_key(&self.registration.node);
                    let rank = rank.or_else(|| is_held.then(|| ring.nodes().len()));
                    let wait =
                        rank.map(|rank| ADOPTION_STAGGER * u32::try_from(rank).unwrap_or(u32::MAX));
                    wait.is_some_and(|wait| since + wait <= now)
                })
                .map(|(slot, _)| slot)
                .collect();
            let owners = due.iter().filter_map(|slot| map.owner(*slot));
            let lost: BTreeSet<Uuid> = owners.map(|owner| owner.incarnation).collect();
            if !due.is_empty() {
                // Side by side: a lost owner may be back at any moment, and nobody should wait for the note.
                let claim = if Mutant::AdoptionAfterOutage.is_active() {
                    Claim::Orphaned
                } else {
                    Claim::OrphanedBySteady
                };
                tokio::join!(self.claim(&due, claim), self.note_lost_leases(lost));
            }
        }
    }

    /// Shows an own change of ownership before the map is read again; `asked` is how it stood with failovers of the database
    /// when the change was asked for. After another one it may be lost, and the map may have been read without it.
    pub fn note(&self, slots: &[(Slot, Epoch)], owner: Uuid, asked: Failovers) {
        if asked.seen != self.store.failovers().seen {
            return self.look_now();
        }
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

    /// What is not noted is not held against anybody.
    async fn note_lost_leases(&self, lost: BTreeSet<Uuid>) {
        let lost: Vec<Uuid> = lost.into_iter().collect();
        if !lost.is_empty()
            && let Err(error) = self.store.note_lost_leases(&lost).await
        {
            tracing::warn!(%error, "cannot note that leases were lost");
        }
    }

    /// Takes what the run before owned without waiting to be steady: it is gone, so nothing is taken from anybody who only
    /// could not renew. Others may come first; and who is held in quarantine leaves it to them.
    async fn succeed(&self) {
        let Some(predecessor) = *self.predecessor() else {
            return;
        };
        let map = self.map();
        let is_told = map.is_member(self.incarnation()) && !map.owners.is_empty();
        if self.is_draining() || !is_told || !self.may_take() {
            return;
        }
        let slots = map.owned_by(predecessor);
        let is_held = map
            .quarantined(Instant::now())
            .contains_key(&self.registration.node);
        if is_held || slots.is_empty() || self.claim(&slots, Claim::Left(predecessor)).await {
            *self.predecessor() = None;
        }
    }

    /// Answers whether the store did.
    async fn claim(&self, slots: &[Slot], claim: Claim) -> bool {
        let (begun, asked) = (Instant::now(), self.store.failovers());
        match self.store.claim(self.incarnation(), slots, claim).await {
            Ok(taken) if taken.is_empty() => self.look_now(),
            Ok(taken) => {
                self.metrics.adoptions.inc_by(taken.len() as u64);
                let duration_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
                tracing::info!(slots = taken.len(), duration_ms, "adopted slots");
                self.note(&taken, self.incarnation(), asked);
            }
            Err(error) => {
                tracing::warn!(%error, "cannot adopt slots");
                return false;
            }
        }
        true
    }

    /// A node that was cut off itself must not adopt as soon as the store answers again.
    fn may_adopt(&self) -> bool {
        let soon = self.alone || Mutant::AdoptionAfterOutage.is_active();
        let steady_since = self.lease().steady_since;
        self.may_take()
            && steady_since.is_some_and(|since| soon || ADOPT_AFTER_STEADY <= since.elapsed())
    }

    /// The lease is held, and no failover of the database is so young that owners may still be on their way back.
    fn may_take(&self) -> bool {
        let failed_over = self.lease().failed_over;
        !self.store.failovers().is_pending()
            && failed_over.is_none_or(|failed_over| ADOPT_AFTER_FAILOVER <= failed_over.elapsed())
            && self.lease_held()
    }

    fn renewed(&self, begun: Instant) {
        let took = begun.elapsed();
        let begun = if Mutant::LeaseFromReply.is_active() {
            Instant::now()
        } else {
            begun
        };
        let mut lease = self.lease();
        let gap = lease.renewed.is_none_or(|renewed| LEASE < begun - renewed);
        lease.renewed = Some(begun);
        lease.took = took;
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

    async fn learn(&self, renewed: Renewed, read_at: Instant) {
        let Renewed {
            members,
            placement_version,
            ..
        } = renewed;
        let placement = if self.map.get().placement.version == placement_version {
            None
        } else {
            self.store.placement().await.ok()
        };
        self.publish(|map| {
            let same = |member: &Member| {
                map.members.get(&member.incarnation).is_some_and(|known| {
                    let known = &known.member;
                    known.state == member.state
                        && known.address == member.address
                        && known.zone == member.zone
                        && known.lease_left.is_zero() == member.lease_left.is_zero()
                })
            };
            let changed = placement.is_some()
                || map.members.len() != members.len()
                || !members.iter().all(same);
            map.members = members
                .into_iter()
                .map(|member| {
                    let before = map.members.get(&member.incarnation);
                    let known = Known::learned(member, read_at, before);
                    (known.member.incarnation, known)
                })
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
        let quarantined = self.map().quarantined(read_at).len();
        self.metrics
            .nodes_quarantined
            .set(i64::try_from(quarantined).unwrap_or(i64::MAX));
    }

    /// Changes the picture and wakes its watchers when `change` says that they should know.
    fn publish(&self, change: impl FnOnce(&mut Map) -> bool) {
        self.map.change(|map| {
            let changed = change(Arc::make_mut(map));
            if changed {
                self.adopt_now.notify_one();
            }
            changed
        });
    }

    fn predecessor(&self) -> MutexGuard<'_, Option<Uuid>> {
        self.predecessor
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn lease(&self) -> MutexGuard<'_, Lease> {
        self.lease.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The incarnation after a fenced one: as random as that, and nothing more is left to chance.
fn following(incarnation: Uuid) -> Uuid {
    let digest = Sha256::digest(incarnation.as_bytes());
    let random: [u8; 16] = digest[..16].try_into().expect("a digest has 32 bytes");
    Builder::from_random_bytes(random).into_uuid()
}

#[cfg(test)]
mod tests {
    use collab_core::limits::SLOTS_MIN;
    use futures::FutureExt;
    use tokio::task::JoinSet;

    use super::*;
    use crate::store::memory::Database;

    const ME: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    #[test]
    fn the_candidates_of_a_slot_count_from_the_end_of_the_lease_and_not_from_their_last_look() {
        let ended = Instant::now();
        let gone = || member(OTHER, Duration::ZERO);
        let before = Known::learned(member(OTHER, LEASE), ended - LEASE, None);
        let later = |pause| Known::learned(gone(), ended + pause, Some(&before)).lease_end;
        assert_eq!(later(LEASE_RENEW_EVERY), ended);
        // Fenced while the lease was running: it ended when that was heard.
        let fenced = ended - LEASE / 2;
        assert_eq!(
            Known::learned(gone(), fenced, Some(&before)).lease_end,
            fenced
        );
        assert_eq!(Known::learned(gone(), ended, None).lease_end, ended);
    }

    #[test]
    fn a_peer_tells_of_newer_owners_and_where_they_are_and_of_nothing_older() {
        let now = Instant::now();
        let map = |owner, epoch, members: Vec<Member>| Map {
            slots: 1,
            pins: Pins::default(),
            owners: vec![SlotRow {
                slot: Slot(0),
                owner: Some(owner),
                epoch: Epoch(epoch),
            }],
            members: members
                .into_iter()
                .map(|member| (member.incarnation, Known::learned(member, now, None)))
                .collect(),
            placement: Placement::default(),
        };
        let mut mine = map(ME, 4, vec![member(ME, Duration::ZERO)]);
        let newer = map(OTHER, 5, vec![member(OTHER, LEASE)]).shared();
        assert!(mine.learn_from_peer(&newer, now));
        let owner = mine.owner(Slot(0)).unwrap();
        assert_eq!(
            (owner.incarnation, owner.address.as_str(), owner.epoch),
            (OTHER, "host:1", Epoch(5))
        );
        let older = map(ME, 4, vec![member(ME, LEASE)]).shared();
        assert!(!mine.learn_from_peer(&older, now));
        assert!(!mine.learn_from_peer(&newer, now));
        assert_eq!(mine.owner(Slot(0)).unwrap().incarnation, OTHER);
    }

    /// The answer to a claim came in when the map of the new primary, which has nothing of it, was read already: the slot had
    /// an owner that did not know of it.
    #[tokio::test]
    async fn a_claim_that_a_failover_may_have_lost_is_not_noted() {
        let database = Database::default();
        let registration = Registration::alone(ME);
        let store = Arc::new(database.sessions());
        let members = Members::new(store, Metrics::new(), registration, SLOTS_MIN, false);
        members.publish(|known| {
            *known = map();
            true
        });
        let asked = members.store.failovers();
        let epoch = || members.map().owners[0].epoch;
        members.note(&[(Slot(0), Epoch(2))], ME, asked);
        assert_eq!(epoch(), Epoch(2));
        database.fail_over(0);
        members.note(&[(Slot(0), Epoch(3))], ME, asked);
        assert_eq!(epoch(), Epoch(2));
        members.note(&[(Slot(0), Epoch(3))], ME, members.store.failovers());
        assert_eq!(epoch(), Epoch(3));
    }

    /// Time stands still unless all wait: what takes none of it happens at once.
    #[tokio::test(start_paused = true)]
    async fn a_pod_goes_on_with_its_slots_at_once_and_takes_others_when_it_is_steady() {
        let database = Database::default();
        let run = |incarnation| {
            let registration = Registration {
                incarnation,
                pod_uid: "pod".to_owned(),
                ..Registration::alone(incarnation)
            };
            let store = Arc::new(database.sessions());
            let members = Members::new(store, Metrics::new(), registration, SLOTS_MIN, false);
            let mut tasks = JoinSet::new();
            tasks.spawn(members.clone().keep_lease().map(drop));
            tasks.spawn(members.clone().follow_map());
            tasks.spawn(members.clone().adopt());
            (members, tasks)
        };
        let owned_after = async |members: &Members| {
            let begun = Instant::now();
            while members.owned().len() < usize::from(SLOTS_MIN) {
                sleep(Duration::from_millis(1)).await;
            }
            begun.elapsed()
        };
        let (first, tasks) = run(ME);
        let waited = owned_after(&first).await;
        assert!(ADOPT_AFTER_STEADY <= waited, "{waited:?}");
        drop(tasks);
        let (second, _tasks) = run(OTHER);
        let waited = owned_after(&second).await;
        assert!(waited < LEASE_RENEW_EVERY, "{waited:?}");
    }

    /// As after the claim of every other slot of a node that died.
    #[test]
    fn a_change_of_as_many_slots_as_there_are_leaves_the_pins_of_others() {
        let (hot, mut map) = with_a_pin();
        let change = MapChange {
            slots: vec![row(0, OTHER, 2), row(1, OTHER, 2)],
            ..MapChange::default()
        };
        assert!(map.take(change, Trust::Newer));
        assert_eq!(map.slot_of(&hot), Slot(2));
        assert_eq!(map.owner(Slot(1)).unwrap().incarnation, OTHER);
    }

    #[test]
    fn a_slot_that_a_failover_of_the_database_took_is_known_by_its_new_row() {
        let (hot, mut map) = with_a_pin();
        let whole = MapChange {
            slots: vec![row(0, ME, 3), row(1, ME, 3)],
            is_whole: true,
            ..MapChange::default()
        };
        assert!(map.take(whole, Trust::AsTheyAre));
        assert_eq!(map.slot_of(&hot), slot_of(&hot, 2));
        assert!(map.owner(Slot(2)).is_none());
        let anew = MapChange {
            slots: vec![row(2, OTHER, 1)],
            pins: vec![(Slot(2), Some(hot.clone()))],
            ..MapChange::default()
        };
        assert!(map.take(anew, Trust::Newer));
        assert_eq!(map.slot_of(&hot), Slot(2));
        assert_eq!(map.owner(Slot(2)).unwrap().incarnation, OTHER);
    }

    #[test]
    fn slots_without_a_living_owner_are_orphans_and_the_dead_are_no_candidates() {
        let now = Instant::now();
        let slot = |number: u16, owner| SlotRow {
            slot: Slot(number),
            owner,
            epoch: Epoch(1),
        };
        let (alive, dead) = (member(ME, LEASE), member(OTHER, Duration::ZERO));
        let map = Map {
            owners: vec![
                slot(0, Some(ME)),
                slot(1, Some(OTHER)),
                slot(2, None),
                slot(3, Some(Uuid::from_u128(3))),
            ],
            members: [alive, dead]
                .map(|member| (member.incarnation, Known::learned(member, now, None)))
                .into(),
            slots: SLOTS_MIN,
            ..Map::default()
        };
        let orphans = [(Slot(1), Some(now)), (Slot(2), None), (Slot(3), None)];
        assert_eq!(map.orphans(now), orphans);
        assert_eq!(map.candidates(now).into_values().collect::<Vec<_>>(), [ME]);
        assert_eq!(map.peers(ME, now).count(), 0);
        assert_eq!(map.peers(OTHER, now).collect::<Vec<_>>(), [(ME, "host:1")]);
    }

    #[test]
    fn a_pinned_document_is_in_its_own_slot_and_its_neighbours_are_not() {
        let mut map = map();
        let [hot, other] = ["hot", "other"].map(|name| DocumentId::new(name).expect("valid"));
        let home = map.slot_of(&hot);
        map.pins.set(OWN, Some(hot.clone()));
        assert_eq!(map.slot_of(&hot), OWN);
        assert_eq!(map.slot_of(&other), slot_of(&other, SLOTS_MIN));
        map.pins.set(OWN, Some(other.clone()));
        assert_eq!((map.slot_of(&hot), map.slot_of(&other)), (home, OWN));
        map.pins.set(OWN, None);
        assert_eq!(map.pins().count(), 0);
    }

    #[test]
    fn the_slot_of_a_pin_stays_with_its_owner_and_leaves_with_it() {
        let mut map = map();
        map.pins
            .set(OWN, Some(DocumentId::new("hot").expect("valid")));
        let now = Instant::now();
        let own_slots = |map: &Map, me| {
            let moves = map.handoffs(me, now).into_iter();
            let pinned = moves.filter(|(ownership, _)| ownership.slot == OWN);
            pinned.map(|(_, target)| target).collect::<Vec<_>>()
        };
        assert!(own_slots(&map, ME).is_empty());
        let number = usize::from(OWN.0);
        map.placement.slots = vec![NodeId::default(); number];
        map.placement.slots.push(NodeId(OTHER.to_string()));
        assert_eq!(own_slots(&map, ME), [OTHER], "as the operator wants it");
        map.placement.slots.clear();
        map.members.get_mut(&ME).expect("registered").member.state = MemberState::Draining;
        assert_eq!(own_slots(&map, ME), [OTHER], "a drain takes it along");
    }

    #[test]
    fn a_node_in_quarantine_gives_its_slots_away_whatever_was_planned() {
        let mut map = map();
        let now = Instant::now();
        map.placement.slots = vec![NodeId(ME.to_string()); usize::from(SLOTS_MIN)];
        assert_eq!(map.handoffs(ME, now), [], "as the operator wants it");
        let flapping = |seconds: u64| {
            [1, 2, 3]
                .map(|ago| Duration::from_secs(seconds + ago))
                .to_vec()
        };
        let lost_ago = |map: &mut Map, me: Uuid, ago| {
            map.members
                .get_mut(&me)
                .expect("registered")
                .member
                .leases_lost_ago = ago;
        };
        lost_ago(&mut map, ME, flapping(0));
        let gone = map.handoffs(ME, now);
        assert_eq!(gone.len(), usize::from(SLOTS_MIN) + 1);
        assert!(gone.iter().all(|(_, target)| *target == OTHER));
        // A quarter of an even share.
        map.placement.slots.clear();
        lost_ago(&mut map, ME, flapping(30));
        let kept = usize::from(SLOTS_MIN) - map.handoffs(ME, now).len();
        assert_eq!(kept, usize::from(SLOTS_MIN).div_ceil(5));
        lost_ago(&mut map, OTHER, flapping(0));
        lost_ago(&mut map, ME, flapping(0));
        assert_eq!(map.quarantined(now).len(), 0, "it is not they");
    }

    #[test]
    fn a_virtual_slot_without_a_document_is_nobodys() {
        let mut map = map();
        let now = Instant::now();
        map.owners[usize::from(OWN.0)].owner = None;
        assert_eq!(map.orphans(now), []);
        assert_eq!(map.slots().len(), usize::from(SLOTS_MIN));
        map.pins
            .set(OWN, Some(DocumentId::new("hot").expect("valid")));
        assert_eq!(map.orphans(now), [(OWN, None)]);
    }

    /// The first virtual slot.
    const OWN: Slot = Slot(SLOTS_MIN);

    /// Two live members; everything is with the first.
    fn map() -> Map {
        let now = Instant::now();
        Map {
            slots: SLOTS_MIN,
            owners: (0..=SLOTS_MIN)
                .map(|number| SlotRow {
                    slot: Slot(number),
                    owner: Some(ME),
                    epoch: Epoch(1),
                })
                .collect(),
            members: [member(ME, LEASE), member(OTHER, LEASE)]
                .map(|member| (member.incarnation, Known::learned(member, now, None)))
                .into(),
            ..Map::default()
        }
    }

    /// Two slots of this node, and one of its own for a document.
    fn with_a_pin() -> (DocumentId, Map) {
        let hot = DocumentId::new("hot").unwrap();
        let mut map = Map {
            slots: 2,
            ..Map::default()
        };
        let whole = MapChange {
            slots: vec![row(0, ME, 1), row(1, ME, 1), row(2, ME, 2)],
            pins: vec![(Slot(2), Some(hot.clone()))],
            is_whole: true,
            ..MapChange::default()
        };
        assert!(map.take(whole, Trust::Newer));
        assert_eq!(map.slot_of(&hot), Slot(2));
        (hot, map)
    }

    const fn row(slot: u16, owner: Uuid, epoch: i64) -> SlotRow {
        SlotRow {
            slot: Slot(slot),
            owner: Some(owner),
            epoch: Epoch(epoch),
        }
    }

    fn member(incarnation: Uuid, lease_left: Duration) -> Member {
        Member {
            node: NodeId(incarnation.to_string()),
            incarnation,
            pod_uid: incarnation.to_string(),
            address: "host:1".to_owned(),
            zone: String::new(),
            weight: 100,
            state: MemberState::Active,
            lease_left,
            load: None,
            load_age: Duration::ZERO,
            leases_lost_ago: Vec::new(),
        }
    }
}
