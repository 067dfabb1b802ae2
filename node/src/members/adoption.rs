//! Adoption: takes slots whose owner is lost, and those that this node owned before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use collab_core::ids::Slot;
use collab_core::limits::{ADOPT_AFTER_FAILOVER, ADOPT_AFTER_STEADY, ADOPTION_STAGGER};
use collab_core::mutants::Mutant;
use tokio::time::{Instant, MissedTickBehavior, interval};
use uuid::Uuid;

use super::Members;
use crate::store::Claim;

/// Between two looks for lost owners.
const ADOPTION_EVERY: Duration = Duration::from_millis(50);

impl Members {
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

    /// After a failover of the database: takes back what this node owned as far as it knows. Answers whether that is done.
    pub(super) async fn take_back(&self) -> bool {
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
        let is_told = map.is_member(self.incarnation()) && map.is_read();
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
    pub(super) async fn claim(&self, slots: &[Slot], claim: Claim) -> bool {
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
}
