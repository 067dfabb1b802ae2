//! Nodes that flap: who lost its lease too often is given no slots for a while, and then little by little.
//!
//! A node that is lost and comes back in turns costs its documents a failover each time, and each time a handoff
//! back to it, so it is better left without. It keeps its sockets: as an edge it hurts nobody but its own clients. What
//! follows is a function of how long ago it lost its leases, so that everybody who knows that comes to the same
//! result: the nodes among themselves, and the operator when there is one.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::NodeId;
use crate::limits::{
    FLAPPING_LEASES, FLAPPING_WITHIN, QUARANTINE_MAX, QUARANTINE_MIN, REFILL_STEP, REFILL_STEPS,
};
use crate::ring::WEIGHT_NORMAL;

/// A node that lost its lease too often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Quarantine {
    /// Leases that it lost within [`FLAPPING_WITHIN`], up to the last.
    pub leases_lost: u32,
    /// Its share of the slots in percent of what it is to have: 0 while it is held, then more with each step.
    pub share_percent: u32,
    /// Milliseconds until the next step.
    pub next_step_ms: u64,
}

impl Quarantine {
    /// Whether it is to have no slot at all.
    pub const fn is_held(self) -> bool {
        self.share_percent == 0
    }

    /// That share of a weight on the ring, at least 1 unless it is held.
    pub const fn of(self, weight: u32) -> u32 {
        (weight * self.share_percent).div_ceil(WEIGHT_NORMAL)
    }
}

/// Judges a node by how long ago it lost leases, in any order. `None`: nothing is held against it (any more).
///
/// It is held from its last loss on, for [`QUARANTINE_MIN`] and for twice as long with each loss more, [`QUARANTINE_MAX`]
/// at most; then its share grows in [`REFILL_STEPS`] steps, [`REFILL_STEP`] each.
pub fn quarantine(lost_ago: &[Duration]) -> Option<Quarantine> {
    let last = *lost_ago.iter().min()?;
    let recent = lost_ago
        .iter()
        .filter(|ago| **ago <= last + FLAPPING_WITHIN);
    let leases_lost = u32::try_from(recent.count()).unwrap_or(u32::MAX);
    let doublings = leases_lost.checked_sub(FLAPPING_LEASES)?;
    let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
    let hold = QUARANTINE_MIN.saturating_mul(factor).min(QUARANTINE_MAX);
    let step = (0..=REFILL_STEPS).find(|step| last < hold + REFILL_STEP * *step)?;
    let until_next = (hold + REFILL_STEP * step).saturating_sub(last);
    Some(Quarantine {
        leases_lost,
        share_percent: WEIGHT_NORMAL * step / REFILL_STEPS,
        next_step_ms: u64::try_from(until_next.as_millis()).unwrap_or(u64::MAX),
    })
}

/// The nodes in quarantine among all that may own slots. When more than half of them would be held, nobody is in quarantine:
/// then it is not they that are at fault, and the others could not carry it all.
pub fn quarantined<'node>(
    nodes: impl IntoIterator<Item = (&'node NodeId, &'node [Duration])>,
) -> BTreeMap<NodeId, Quarantine> {
    let mut count = 0;
    let mut found = BTreeMap::new();
    for (node, lost_ago) in nodes {
        count += 1;
        if let Some(quarantine) = quarantine(lost_ago) {
            found.insert(node.clone(), quarantine);
        }
    }
    let held = found.values().filter(|quarantine| quarantine.is_held());
    if count < 2 * held.count() {
        found.clear();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn who_loses_three_leases_in_ten_minutes_is_held_and_gets_its_share_back_in_steps() {
        let lost = |last: u64| {
            let ago = [last, last + 20, last + 500].map(|ago| SECOND * u32::try_from(ago).unwrap());
            quarantine(&ago).map(|quarantine| quarantine.share_percent)
        };
        let shares = [0, 29, 30, 44, 45, 60, 75, 89].map(lost);
        let expected = [0, 0, 25, 25, 50, 75, 100, 100].map(Some);
        assert_eq!(shares, expected);
        assert_eq!(lost(90), None);
    }

    #[test]
    fn two_leases_or_three_in_a_longer_time_are_forgiven() {
        assert_eq!(quarantine(&[]), None);
        assert_eq!(quarantine(&[SECOND, SECOND * 2]), None);
        assert_eq!(quarantine(&[SECOND, SECOND * 2, SECOND * 602]), None);
    }

    #[test]
    fn each_loss_more_doubles_the_time_up_to_ten_minutes() {
        let held = |losses: u32| {
            let ago: Vec<Duration> = (0..losses).map(|loss| SECOND * loss).collect();
            let quarantine = quarantine(&ago).unwrap();
            assert_eq!(
                (quarantine.leases_lost, quarantine.share_percent),
                (losses, 0)
            );
            quarantine.next_step_ms / 1000
        };
        let expected = [30, 60, 120, 240, 480, 600, 600, 600];
        assert_eq!([3, 4, 5, 6, 7, 8, 9, 200].map(held), expected);
    }

    #[test]
    fn one_of_two_is_held_and_two_of_three_are_not() {
        let names = ["a", "b", "c"].map(|name| NodeId(name.to_owned()));
        let flapping = [SECOND, SECOND * 2, SECOND * 3];
        let among = |good: usize, bad: usize| {
            let nodes = names.iter().zip((0..good + bad).map(|node| node < bad));
            let lost = |bad| if bad { &flapping[..] } else { &[] };
            quarantined(nodes.map(|(node, bad)| (node, lost(bad)))).len()
        };
        assert_eq!(
            [among(1, 1), among(2, 1), among(1, 2), among(0, 1)],
            [1, 1, 0, 0]
        );
    }

    #[test]
    fn a_share_of_a_weight_is_never_nothing_by_rounding() {
        let quarantine = |share_percent| Quarantine {
            leases_lost: 3,
            share_percent,
            next_step_ms: 0,
        };
        let of = [(0, 100), (25, 100), (25, 1), (100, 50)];
        let weights = of.map(|(share, weight)| quarantine(share).of(weight));
        assert_eq!(weights, [0, 25, 1, 50]);
    }
}
