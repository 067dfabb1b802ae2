//! Ownership moves as planned: balancing, and the drain of this node.
//!
//! Drain, SIGTERM, rollout and scale-in are one path: say so, hand every slot over, close the sockets at
//! a limited rate, and only then be gone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use collab_core::control::MemberState;
use collab_core::ids::{Epoch, Slot};
use collab_core::limits::{
    FREEZE_WAIT, HANDOFF_CONCURRENCY, HANDOFF_ROUNDS, IDLE_HANDOFF_CONCURRENCY, MAP_POLL_EVERY,
    PRELOAD_WAIT,
};
use futures::future::join_all;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::documents::Documents;
use crate::edge::Edge;
use crate::members::Members;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::store::{Ownership, Store};

/// A drain that finds nobody to take its slots ends after this time; the lease does the rest.
const DRAIN_TIMEOUT: Duration = Duration::from_mins(1);

/// Moves slots to where they belong.
pub struct Handoff {
    store: Arc<dyn Store>,
    members: Arc<Members>,
    documents: Arc<Documents>,
    edge: Arc<Edge>,
    peers: Arc<Peers>,
    metrics: Metrics,
}

impl Handoff {
    /// Knows everything that moving a slot touches.
    pub fn new(
        store: Arc<dyn Store>,
        members: Arc<Members>,
        documents: Arc<Documents>,
        edge: Arc<Edge>,
        peers: Arc<Peers>,
        metrics: Metrics,
    ) -> Arc<Self> {
        Arc::new(Self {
            store,
            members,
            documents,
            edge,
            peers,
            metrics,
        })
    }

    /// Hands over what belongs elsewhere, for ever.
    pub async fn balance(self: Arc<Self>) {
        let mut map = self.members.watch();
        loop {
            // Without a lease this node has nothing to give away that others could not adopt.
            if self.members.lease_held() {
                let all = self
                    .members
                    .map()
                    .handoffs(self.members.incarnation(), Instant::now());
                let count = all.len();
                // To look through all open documents is for when there is something to move.
                if 0 < count {
                    let moves = next_of(all, &self.documents.slots_in_use());
                    if self.hand_over(&moves).await && moves.len() < count {
                        continue;
                    }
                }
            }
            // At the latest after a poll.
            let _ = timeout(MAP_POLL_EVERY, map.changed()).await;
        }
    }

    /// Closes the sockets of a node that was drained by the operator and says that it may go; for ever,
    /// because a drain can be taken back.
    pub async fn finish_drains(self: Arc<Self>) {
        let mut finished = false;
        loop {
            sleep(MAP_POLL_EVERY).await;
            if !self.members.is_draining() {
                finished = false;
            } else if !finished && self.members.owned().is_empty() {
                self.edge.close_all().await;
                match self
                    .store
                    .set_state(self.members.incarnation(), MemberState::Drained)
                    .await
                {
                    Ok(()) => finished = true,
                    Err(error) => {
                        tracing::warn!(%error, "cannot say yet that the drain is complete");
                    }
                }
            }
        }
    }

    /// Leaves the cluster: gives all slots away, closes the sockets, ends the membership.
    pub async fn leave(&self) {
        self.members.drain();
        let begun = Instant::now();
        let me = self.members.incarnation();
        while !self.members.owned().is_empty() && begun.elapsed() < DRAIN_TIMEOUT {
            let alone = !self.members.map().members().any(|member| {
                member.incarnation != me
                    && member.state == MemberState::Active
                    && !member.lease_left.is_zero()
            });
            // Nobody can take them, or it cannot be written down who does.
            if alone || !self.members.lease_held() {
                break;
            }
            sleep(Duration::from_millis(50)).await;
        }
        // Whatever is still here is made durable before the clients are told to go.
        let settled = join_all(
            self.members
                .owned()
                .into_iter()
                .map(|owned| self.documents.freeze(owned.slot)),
        );
        let _ = timeout(FREEZE_WAIT, settled).await;
        self.edge.close_all().await;
        if let Err(error) = self.store.leave(me).await {
            tracing::warn!(%error, "the membership was not ended; its lease will end by itself");
        }
    }

    /// Hands slots over, one statement per target. Answers whether all of them moved.
    async fn hand_over(&self, moves: &[(Ownership, Uuid)]) -> bool {
        self.metrics
            .slots_moving
            .set(i64::try_from(moves.len()).unwrap_or(i64::MAX));
        let mut by_target = BTreeMap::<Uuid, Vec<Ownership>>::new();
        for (ownership, target) in moves {
            by_target.entry(*target).or_default().push(*ownership);
        }
        let batches = by_target
            .into_iter()
            .map(|(target, slots)| self.hand_over_to(target, slots));
        let all = join_all(batches).await.into_iter().all(|moved| moved);
        self.metrics.slots_moving.set(0);
        all
    }

    /// Has the target read the open documents of slots while they are served here.
    async fn preload(&self, target: Uuid, slots: &[Ownership]) {
        let documents: Vec<_> = slots
            .iter()
            .flat_map(|ownership| self.documents.open_in(ownership.slot))
            .collect();
        let map = self.members.map();
        let Some(member) = map.members().find(|member| member.incarnation == target) else {
            return;
        };
        if documents.is_empty() || member.address.is_empty() {
            return;
        }
        let count = documents.len();
        let preload = self.peers.preload(target, &member.address, documents);
        if timeout(PRELOAD_WAIT, preload).await.is_err() {
            tracing::info!(
                documents = count,
                "the target of a handoff did not read ahead in time"
            );
        }
    }

    async fn hand_over_to(&self, target: Uuid, slots: Vec<Ownership>) -> bool {
        self.preload(target, &slots).await;
        let (begun, asked) = (Instant::now(), self.store.failovers());
        let settled = join_all(
            slots
                .iter()
                .map(|ownership| self.documents.freeze(ownership.slot)),
        );
        let moved = if timeout(FREEZE_WAIT, settled).await.is_ok() {
            self.store.hand_off(&slots, target).await
        } else {
            tracing::warn!(
                slots = slots.len(),
                "slots did not settle in time; they stay for now"
            );
            Ok(Vec::new())
        };
        let moved = moved.unwrap_or_else(|error| {
            // It may have happened: the fence and the map tell.
            tracing::warn!(%error, "a handoff has no known outcome");
            self.members.look_now();
            Vec::new()
        });
        self.members.note(&moved, target, asked);
        let epochs: BTreeMap<_, Epoch> = moved.into_iter().collect();
        for ownership in &slots {
            let result = if let Some(epoch) = epochs.get(&ownership.slot) {
                self.documents.release(ownership.slot, *epoch);
                "moved"
            } else {
                self.documents.thaw(ownership.slot);
                "failed"
            };
            self.metrics.handoffs.with_label_values(&[result]).inc();
        }
        self.metrics
            .handoff_seconds
            .observe(begun.elapsed().as_secs_f64());
        epochs.len() == slots.len()
    }
}

/// The moves to begin with. Slots without open documents come first and many at a time: nobody notices their move, and the
/// documents then move without the work that it makes for every node.
fn next_of(moves: Vec<(Ownership, Uuid)>, in_use: &BTreeSet<Slot>) -> Vec<(Ownership, Uuid)> {
    let (mut busy, mut idle): (Vec<_>, Vec<_>) = moves
        .into_iter()
        .partition(|(ownership, _)| in_use.contains(&ownership.slot));
    // Of very many more at a time, so that a drain ends before its time is over.
    busy.truncate(HANDOFF_CONCURRENCY.max(busy.len() / HANDOFF_ROUNDS));
    idle.truncate(IDLE_HANDOFF_CONCURRENCY);
    if idle.is_empty() { busy } else { idle }
}

#[cfg(test)]
mod tests {
    use super::*;
    use collab_core::limits::SLOTS_MAX;

    fn moves(slots: std::ops::Range<u16>) -> Vec<(Ownership, Uuid)> {
        let ownership = |slot| Ownership {
            slot: Slot(slot),
            epoch: Epoch(1),
            incarnation: Uuid::from_u128(1),
        };
        slots
            .map(|slot| (ownership(slot), Uuid::from_u128(7)))
            .collect()
    }

    #[test]
    fn slots_in_use_move_last_and_few_at_a_time() {
        let in_use: BTreeSet<_> = (0..200).map(Slot).collect();
        let slots = |moves: Vec<(Ownership, Uuid)>| -> Vec<u16> {
            moves.iter().map(|(owned, _)| owned.slot.0).collect()
        };
        assert_eq!(
            slots(next_of(moves(190..1_024), &in_use)),
            (200..328).collect::<Vec<_>>()
        );
        assert_eq!(slots(next_of(moves(198..201), &in_use)), [200]);
        assert_eq!(
            slots(next_of(moves(100..200), &in_use)),
            [100, 101, 102, 103]
        );
        assert_eq!(slots(next_of(Vec::new(), &in_use)), [0; 0]);
    }

    #[test]
    fn a_drain_of_the_largest_map_takes_few_rounds() {
        let in_use: BTreeSet<_> = (0..SLOTS_MAX).map(Slot).collect();
        let mut left = moves(0..SLOTS_MAX);
        let mut rounds = 0;
        while !left.is_empty() {
            let begun = next_of(left.clone(), &in_use).len();
            left.drain(..begun);
            rounds += 1;
        }
        assert!(rounds < 400, "{rounds}");
    }
}
