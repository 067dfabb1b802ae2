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

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use collab_core::control::{LoadSample, MemberState, Silence};
use collab_core::ids::{DocumentId, Epoch, NodeId, Slot};
use collab_core::limits::{
    EARLY_FENCE_AGE, EARLY_FENCE_EVERY, EARLY_FENCE_RENEWAL_MAX, LEASE, LEASE_RENEW_EVERY,
    MAP_POLL_EVERY, STOP_OWNING_AFTER,
};
use collab_core::mutants::Mutant;
use collab_core::ring::slot_of;
use collab_core::wire::map::SharedMap;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use uuid::{Builder, Uuid};

use crate::metrics::Metrics;
use crate::store::{
    Claim, Failovers, Judgement, Ownership, Registration, Renewal, Renewed, Store, StoreError,
};
use crate::watched::{Watched, Watcher};

mod adoption;
mod map;

pub use map::{Map, Owner};

use map::Trust;

/// Between two renewals that hints ask for.
const HINTED_RENEW_EVERY: Duration = Duration::from_millis(50);
/// A renewal that takes longer is given up and tried again.
const RENEW_TIMEOUT: Duration = Duration::from_millis(1_500);

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
            map: Watched::new(Arc::new(Map::new(slots))),
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
        self.map.get().ownership(slot, self.incarnation())
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
            let state = self.map.get().state_of(self.incarnation());
            state.is_some_and(|state| state != MemberState::Active)
        };
        self.draining.load(Ordering::Relaxed) || asked()
    }

    /// Slots owned by the map.
    pub fn owned(&self) -> Vec<Ownership> {
        self.map.get().ownerships(self.incarnation())
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
                        map.lease_ended(target, Instant::now());
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

    /// Shows an own change of ownership before the map is read again; `asked` is how it stood with failovers of the database
    /// when the change was asked for. After another one it may be lost, and the map may have been read without it.
    pub fn note(&self, slots: &[(Slot, Epoch)], owner: Uuid, asked: Failovers) {
        if asked.seen != self.store.failovers().seen {
            return self.look_now();
        }
        self.publish(|map| {
            map.note(slots, owner);
            true
        });
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
        let placement = if self.map.get().placement_version() == placement_version {
            None
        } else {
            self.store.placement().await.ok()
        };
        self.publish(|map| map.learn(members, placement, read_at));
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
    use collab_core::limits::{ADOPT_AFTER_STEADY, SLOTS_MIN};
    use futures::FutureExt;
    use tokio::task::JoinSet;

    use super::*;
    use crate::store::memory::Database;
    use crate::store::{MapChange, SlotRow};

    const ME: Uuid = Uuid::from_u128(1);
    const OTHER: Uuid = Uuid::from_u128(2);

    /// The answer to a claim came in when the map of the new primary, which has nothing of it, was read already: the slot had
    /// an owner that did not know of it.
    #[tokio::test]
    async fn a_claim_that_a_failover_may_have_lost_is_not_noted() {
        let database = Database::default();
        let registration = Registration::alone(ME);
        let store = Arc::new(database.sessions());
        let members = Members::new(store, Metrics::new(), registration, SLOTS_MIN, false);
        let whole = MapChange {
            slots: vec![SlotRow {
                slot: Slot(0),
                owner: Some(ME),
                epoch: Epoch(1),
            }],
            is_whole: true,
            ..MapChange::default()
        };
        members.publish(|map| map.take(whole, Trust::Newer));
        let asked = members.store.failovers();
        let epoch = || members.map().epoch(Slot(0));
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
}
