//! The database server as a node reaches it: statements travel, wait, are executed at some moment, and
//! their answers travel back, unless something happens to one of the three.
//!
//! A statement that was sent is executed whether or not its sender still lives or waits, perhaps long
//! after it has given up.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use async_trait::async_trait;
use collab_core::control::{LoadSample, MemberState};
use collab_core::ids::{DocumentId, Epoch, NodeId, RoomEpoch, Seq, Slot, Term};
use collab_core::limits::{
    ADOPT_AFTER_FAILOVER, BATCH_BYTES_MAX, BATCH_UPDATES_MAX, BATCHES_IN_FLIGHT_MAX, LEASE,
    RENEWAL_GAP_MAX,
};
use collab_node::store::memory::{Database, Memory};
use collab_node::store::{
    Append, Appended, Claim, Created, DocumentRow, Failovers, Fence, Judgement, LoadError, Loaded,
    MapChange, NewSnapshot, Ownership, Placement, Recreate, Registration, Renewal, Store,
    StoreError, StoredSnapshot, Summary, WrittenRow,
};
use rand::Rng;
use rand::rngs::StdRng;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::network::{Host, Network};
use crate::pod::Process;
use crate::witness::Witness;

/// As the store of a cluster gives up.
const DATA_TIMEOUT: Duration = Duration::from_secs(10);
const CONTROL_TIMEOUT: Duration = Duration::from_secs(5);

/// The server and what ails it.
pub(crate) struct Server {
    pub(crate) database: Database,
    network: Arc<Network>,
    witness: Arc<Witness>,
    random: Arc<Mutex<StdRng>>,
    health: Mutex<Health>,
    processes: Mutex<Vec<(Weak<Process>, Host)>>,
    /// Longest usual commit, in ms.
    commit: u64,
}

/// An outage of the database may not make anybody take slots from those who live.
const AFTER_OUTAGE: Duration = Duration::from_secs(2);

#[derive(Default)]
struct Health {
    down: bool,
    /// When the newest outage ended that could end a lease.
    up_since: Option<Instant>,
    /// When the newest outage began.
    down_since: Option<Instant>,
    /// Raised when it goes down: what was in hand then is never answered.
    outages: u64,
    failed_over: Option<Instant>,
    /// Commits take so much longer.
    slow: Duration,
}

/// The sessions of one process.
#[derive(Clone)]
pub(crate) struct Sessions {
    server: Arc<Server>,
    memory: Arc<Memory>,
    pod: Host,
    /// Batches without an answer, by slot.
    in_flight: Arc<Mutex<BTreeMap<Slot, usize>>>,
    /// All of them.
    batches: Arc<AtomicUsize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
}

impl Server {
    pub(crate) fn new(
        database: Database,
        network: Arc<Network>,
        witness: Arc<Witness>,
        random: Arc<Mutex<StdRng>>,
        commit: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            database,
            network,
            witness,
            random,
            health: Mutex::default(),
            processes: Mutex::default(),
            commit,
        })
    }

    pub(crate) fn sessions(self: &Arc<Self>, pod: Host) -> Sessions {
        Sessions {
            server: self.clone(),
            memory: Arc::new(self.database.sessions()),
            pod,
            in_flight: Arc::default(),
            batches: Arc::default(),
        }
    }

    pub(crate) fn go_down(&self) {
        let mut health = self.health();
        if !health.down {
            health.down_since = Some(Instant::now());
        }
        health.down = true;
        health.outages += 1;
    }

    pub(crate) fn come_up(&self) {
        let mut health = self.health();
        let was_down = std::mem::take(&mut health.down);
        // A shorter outage ends nobody's lease: who lost it just then would have lost it anyway.
        let long = health
            .down_since
            .is_some_and(|since| RENEWAL_GAP_MAX <= since.elapsed());
        if was_down && long {
            health.up_since = Some(Instant::now());
        }
    }

    /// Tells who speaks for an incarnation.
    pub(crate) fn introduce(&self, process: &Arc<Process>, pod: Host) {
        let mut processes = self.processes.lock().expect("nobody panics with it");
        processes.push((Arc::downgrade(process), pod));
        processes.retain(|(process, _)| 0 < process.strong_count());
    }

    /// Somebody took a slot from this incarnation.
    fn taken_from(&self, owner: Uuid) {
        let recent = |since: Instant| since.elapsed() < AFTER_OUTAGE;
        if !self.health().up_since.is_some_and(recent) {
            return;
        }
        // Who had lost its lease before, for example because it was cut off itself, may lose its slots.
        let down_since = self.health().down_since;
        let had_lease = self.database.members().into_iter().any(|member| {
            let since_outage = down_since.map_or(Duration::ZERO, |since| since.elapsed());
            member.incarnation == owner && member.load_age < since_outage + LEASE
        });
        if !had_lease {
            return;
        }
        let processes = self.processes.lock().expect("nobody panics with it");
        let lives = processes.iter().any(|(process, pod)| {
            process.upgrade().is_some_and(|process| {
                process.node.members.incarnation() == owner
                    && process.breath.runs_since(AFTER_OUTAGE * 2)
                    && !self.network.is_cut(*pod, Host::Database)
                    && !self.network.is_cut(Host::Database, *pod)
            })
        });
        if lives {
            self.witness.violated(format!(
                "slots were taken from {owner}, which lives, right after an outage of the database"
            ));
        }
    }

    pub(crate) fn is_down(&self) -> bool {
        self.health().down
    }

    pub(crate) fn slow_commits(&self, extra: Duration) {
        self.health().slow = extra;
    }

    /// Whether another server took over so recently.
    pub(crate) fn failed_over_within(&self, time: Duration) -> bool {
        let since = self.health().failed_over;
        since.is_some_and(|since| since.elapsed() < time)
    }

    /// When slots without an owner may be taken again: not right after another server took over.
    pub(crate) fn adoptable_since(&self) -> Option<Instant> {
        let since = self.health().failed_over;
        since.map(|since| since + ADOPT_AFTER_FAILOVER)
    }

    /// Another server takes over. What was in hand is not answered.
    pub(crate) fn fail_over(&self, lost: usize) {
        let mut health = self.health();
        health.outages += 1;
        health.failed_over = Some(Instant::now());
        drop(health);
        self.database.fail_over(lost);
    }

    fn health(&self) -> std::sync::MutexGuard<'_, Health> {
        self.health.lock().expect("nobody panics with it")
    }

    fn roll(&self, from: u64, upto: u64) -> u64 {
        let mut random = self.random.lock().expect("nobody panics with it");
        random.random_range(from..=upto)
    }

    /// How long a statement is in hand before it takes effect.
    fn work(&self, kind: Kind) -> Duration {
        let usual = match kind {
            Kind::Read => self.roll(0, 3),
            // Now and then a commit hangs for long enough that slots change hands.
            Kind::Write if self.roll(0, 399) == 0 => self.roll(200, 4_000),
            Kind::Write => self.roll(1, self.commit),
        };
        let slow = match kind {
            Kind::Read => Duration::ZERO,
            Kind::Write => self.health().slow,
        };
        let share = self.roll(200, 1_000);
        Duration::from_millis(usual) + slow * u32::try_from(share).expect("small") / 1_000
    }
}

impl Sessions {
    /// Sends a statement and waits for its answer.
    async fn call<T, E, F>(
        &self,
        kind: Kind,
        limit: Duration,
        statement: impl FnOnce(Arc<Memory>) -> F + Send + 'static,
    ) -> Result<T, E>
    where
        T: Send + 'static,
        E: From<StoreError> + Send + 'static,
        F: Future<Output = Result<T, E>> + Send,
    {
        let (reply, answer) = oneshot::channel();
        let Self {
            server,
            memory,
            pod,
            ..
        } = self.clone();
        // Not a task of the node: it goes on without it.
        tokio::spawn(async move {
            // What was sent to the old server the new one has never heard of.
            let timeline = server.database.timeline();
            let network = &server.network;
            sleep(network.delay(pod, Host::Database)).await;
            network.uncut(pod, Host::Database).await;
            let (down, outages) = {
                let health = server.health();
                (health.down, health.outages)
            };
            if down && server.roll(0, 3) == 0 {
                return std::future::pending().await; // a host that is not there does not even refuse
            }
            if !down {
                sleep(server.work(kind)).await;
            }
            let elsewhere = server.database.timeline() != timeline;
            let result = if down
                || elsewhere
                || (server.health().outages != outages && server.roll(0, 1) == 0)
            {
                Err(E::from(gone()))
            } else {
                let result = statement(memory).await;
                if kind == Kind::Write {
                    server.witness.after_statement(&server.database);
                }
                result
            };
            let unanswered = server.health().outages != outages;
            sleep(network.delay(Host::Database, pod)).await;
            network.uncut(Host::Database, pod).await;
            let _ = reply.send(if unanswered {
                Err(E::from(gone()))
            } else {
                result
            });
        });
        match timeout(limit, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) | Err(_) => Err(E::from(gone())),
        }
    }
}

impl Sessions {
    /// A notification travels; one that is held up is overtaken by a poll.
    async fn notified(&self) {
        sleep(self.server.network.delay(Host::Database, self.pod)).await;
        self.server.network.uncut(Host::Database, self.pod).await;
    }
}

fn gone() -> StoreError {
    StoreError::Unavailable(sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))
}

/// Counts the batches of each slot for as long as the node waits for them.
struct Flight<'a> {
    sessions: &'a Sessions,
    slots: Vec<Slot>,
}

impl<'a> Flight<'a> {
    fn new(sessions: &'a Sessions, batch: &[Append]) -> Self {
        let witness = &sessions.server.witness;
        let bytes: usize = batch.iter().map(|append| append.bytes.len()).sum();
        if BATCH_UPDATES_MAX < batch.len() || (1 < batch.len() && BATCH_BYTES_MAX < bytes) {
            witness.violated(format!("a batch of {} rows, {bytes} bytes", batch.len()));
        }
        let batches = sessions.batches.fetch_add(1, Ordering::Relaxed) + 1;
        if BATCHES_IN_FLIGHT_MAX < batches {
            witness.violated(format!("{batches} batches in flight"));
        }
        let mut slots: Vec<Slot> = batch.iter().map(|append| append.ownership.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        let mut in_flight = sessions.in_flight.lock().expect("nobody panics with it");
        for slot in &slots {
            let batches = in_flight.entry(*slot).or_default();
            *batches += 1;
            if 1 < *batches {
                sessions
                    .server
                    .witness
                    .violated(format!("two batches in flight for slot {slot}"));
            }
        }
        drop(in_flight);
        Self { sessions, slots }
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.sessions.batches.fetch_sub(1, Ordering::Relaxed);
        let mut in_flight = self
            .sessions
            .in_flight
            .lock()
            .expect("nobody panics with it");
        for slot in &self.slots {
            if let Some(batches) = in_flight.get_mut(slot) {
                *batches -= 1;
            }
        }
    }
}

#[async_trait]
impl Store for Sessions {
    async fn append(&self, batch: &[Append]) -> Result<Appended, StoreError> {
        let _flight = Flight::new(self, batch);
        let batch = batch.to_vec();
        let server = self.server.clone();
        self.call(Kind::Write, DATA_TIMEOUT, move |memory| async move {
            let done = memory.append(&batch).await?;
            server.witness.appended(&batch, &done, &server.database);
            Ok(done)
        })
        .await
    }

    async fn written(&self, keys: &[(DocumentId, Seq)]) -> Result<Vec<WrittenRow>, StoreError> {
        let keys = keys.to_vec();
        self.call(Kind::Read, DATA_TIMEOUT, move |memory| async move {
            memory.written(&keys).await
        })
        .await
    }

    async fn load_with(
        &self,
        document: &DocumentId,
        copy: Option<(RoomEpoch, StoredSnapshot)>,
    ) -> Result<Loaded, LoadError> {
        let document = document.clone();
        let server = self.server.clone();
        self.call(Kind::Read, DATA_TIMEOUT, move |memory| async move {
            let loaded = memory.load_with(&document, copy).await;
            if let Err(LoadError::Damaged { .. }) = &loaded {
                server
                    .witness
                    .violated(format!("{document} is damaged: {loaded:?}"));
            }
            loaded
        })
        .await
    }

    async fn create(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        recreate: Recreate,
    ) -> Result<Created, StoreError> {
        let document = document.clone();
        self.call(Kind::Write, DATA_TIMEOUT, move |memory| async move {
            memory.create(&document, ownership, recreate).await
        })
        .await
    }

    async fn delete(
        &self,
        document: &DocumentId,
        ownership: Ownership,
        last: Seq,
    ) -> Result<Fence, StoreError> {
        let document = document.clone();
        self.call(Kind::Write, DATA_TIMEOUT, move |memory| async move {
            memory.delete(&document, ownership, last).await
        })
        .await
    }

    async fn snapshot(&self, snapshot: &NewSnapshot) -> Result<Fence, StoreError> {
        let snapshot = snapshot.clone();
        let server = self.server.clone();
        self.call(Kind::Write, DATA_TIMEOUT, move |memory| async move {
            let fence = memory.snapshot(&snapshot).await?;
            if fence == Fence::Held {
                server.witness.snapshotted(&snapshot);
            }
            Ok(fence)
        })
        .await
    }

    async fn compact(
        &self,
        document: &DocumentId,
        ownership: Ownership,
    ) -> Result<Fence, StoreError> {
        let document = document.clone();
        self.call(Kind::Write, DATA_TIMEOUT, move |memory| async move {
            memory.compact(&document, ownership).await
        })
        .await
    }

    async fn documents(
        &self,
        after: Option<&DocumentId>,
        limit: u32,
    ) -> Result<Vec<DocumentRow>, StoreError> {
        let after = after.cloned();
        self.call(Kind::Read, DATA_TIMEOUT, move |memory| async move {
            memory.documents(after.as_ref(), limit).await
        })
        .await
    }

    async fn document(&self, document: &DocumentId) -> Result<Option<DocumentRow>, StoreError> {
        let document = document.clone();
        self.call(Kind::Read, DATA_TIMEOUT, move |memory| async move {
            memory.document(&document).await
        })
        .await
    }

    async fn register(
        &self,
        member: &Registration,
        slots: u16,
        lease: Duration,
    ) -> Result<Option<Uuid>, StoreError> {
        let member = member.clone();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.register(&member, slots, lease).await
        })
        .await
    }

    async fn renew(
        &self,
        incarnation: Uuid,
        pod_uid: &str,
        lease: Duration,
        load: LoadSample,
    ) -> Result<Renewal, StoreError> {
        let pod_uid = pod_uid.to_owned();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.renew(incarnation, &pod_uid, lease, load).await
        })
        .await
    }

    async fn end_lease(
        &self,
        judge: Uuid,
        target: Uuid,
        age: Duration,
    ) -> Result<Judgement, StoreError> {
        let server = self.server.clone();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            let judgement = memory.end_lease(judge, target, age).await?;
            server.witness.judged(judge, target, judgement);
            Ok(judgement)
        })
        .await
    }

    async fn note_lost_leases(&self, incarnations: &[Uuid]) -> Result<(), StoreError> {
        let incarnations = incarnations.to_vec();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.note_lost_leases(&incarnations).await
        })
        .await
    }

    async fn set_state(&self, incarnation: Uuid, state: MemberState) -> Result<(), StoreError> {
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.set_state(incarnation, state).await
        })
        .await
    }

    async fn leave(&self, incarnation: Uuid) -> Result<(), StoreError> {
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.leave(incarnation).await
        })
        .await
    }

    async fn map(&self, horizon: i64) -> Result<MapChange, StoreError> {
        self.call(Kind::Read, CONTROL_TIMEOUT, move |memory| async move {
            memory.map(horizon).await
        })
        .await
    }

    async fn claim(
        &self,
        incarnation: Uuid,
        slots: &[Slot],
        claim: Claim,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        let slots = slots.to_vec();
        let server = self.server.clone();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            let before = server.database.slots();
            let taken = memory.claim(incarnation, &slots, claim).await?;
            for (slot, _) in &taken {
                if let Some(owner) = before[usize::from(slot.0)].owner {
                    server.taken_from(owner);
                }
            }
            Ok(taken)
        })
        .await
    }

    async fn reclaim(
        &self,
        incarnation: Uuid,
        held: &[Ownership],
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        let held = held.to_vec();
        self.call(Kind::Write, DATA_TIMEOUT, move |memory| async move {
            memory.reclaim(incarnation, &held).await
        })
        .await
    }

    fn failovers(&self) -> Failovers {
        self.memory.failovers()
    }

    async fn hand_off(
        &self,
        from: &[Ownership],
        to: Uuid,
    ) -> Result<Vec<(Slot, Epoch)>, StoreError> {
        let from = from.to_vec();
        self.call(Kind::Write, DATA_TIMEOUT, move |memory| async move {
            memory.hand_off(&from, to).await
        })
        .await
    }

    async fn placement(&self) -> Result<Placement, StoreError> {
        self.call(Kind::Read, CONTROL_TIMEOUT, move |memory| async move {
            memory.placement().await
        })
        .await
    }

    async fn take_term(&self, holder: &str) -> Result<Term, StoreError> {
        let holder = holder.to_owned();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.take_term(&holder).await
        })
        .await
    }

    async fn set_placement(
        &self,
        term: Term,
        slots: &[NodeId],
    ) -> Result<Result<(), Term>, StoreError> {
        let slots = slots.to_vec();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.set_placement(term, &slots).await
        })
        .await
    }

    async fn set_drain(
        &self,
        term: Term,
        node: &NodeId,
        drain: bool,
    ) -> Result<Result<(), Term>, StoreError> {
        let node = node.clone();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.set_drain(term, &node, drain).await
        })
        .await
    }

    async fn pinned(&self, document: &DocumentId) -> Result<Option<Slot>, StoreError> {
        let document = document.clone();
        self.call(Kind::Read, DATA_TIMEOUT, move |memory| async move {
            memory.pinned(&document).await
        })
        .await
    }

    async fn pin(
        &self,
        term: Term,
        document: &DocumentId,
        slot: Slot,
    ) -> Result<Result<(), Term>, StoreError> {
        let document = document.clone();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.pin(term, &document, slot).await
        })
        .await
    }

    async fn unpin(
        &self,
        term: Term,
        document: &DocumentId,
        slot: Slot,
    ) -> Result<Result<(), Term>, StoreError> {
        let document = document.clone();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.unpin(term, &document, slot).await
        })
        .await
    }

    async fn fence(&self, term: Term, incarnation: Uuid) -> Result<Result<(), Term>, StoreError> {
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.fence(term, incarnation).await
        })
        .await
    }

    async fn set_zones(
        &self,
        term: Term,
        zones: &BTreeMap<NodeId, String>,
    ) -> Result<Result<(), Term>, StoreError> {
        let zones = zones.clone();
        self.call(Kind::Write, CONTROL_TIMEOUT, move |memory| async move {
            memory.set_zones(term, &zones).await
        })
        .await
    }

    async fn summary(&self) -> Result<Summary, StoreError> {
        self.call(Kind::Read, CONTROL_TIMEOUT, move |memory| async move {
            memory.summary().await
        })
        .await
    }

    async fn map_changed(&self) {
        self.memory.map_changed().await;
        self.notified().await;
    }

    async fn members_changed(&self) {
        self.memory.members_changed().await;
        self.notified().await;
    }
}
