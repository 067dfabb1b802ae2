//! How many nodes a cluster should have: a function of numbers.

use std::cmp::Ordering;
use std::fmt;

use collab_crds::collabcluster::{AutoscalingSpec, CollabClusterSpec};
use collab_crds::conditions::reason;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

/// Growth is bounded over this time: at most to twice the nodes, or by [`GROWTH_NODES`].
const GROWTH_WINDOW: SignedDuration = SignedDuration::from_secs(60);
/// Nodes that may always be added within [`GROWTH_WINDOW`].
const GROWTH_NODES: i32 = 4;

/// What is known of the load.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Open connections of the nodes whose sample is fresh.
    pub connections: u64,
    /// Nodes that should serve and have no fresh sample.
    pub unknown: u32,
}

/// What the policy wished for at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wish {
    /// When.
    pub at: Timestamp,
    /// Number of nodes.
    pub nodes: i32,
    /// Number of nodes that were wanted just before.
    pub had: i32,
}

/// Why no node may be removed now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hold {
    /// A node was lost a short while ago.
    Cooldown,
    /// Nodes are missing, or slots have no owner, or a drain is under way.
    Unsettled,
}

/// The number of nodes wanted, and what keeps it from being another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Nodes wanted.
    pub desired: i32,
    /// Nodes the load alone would want; the same as `desired` without autoscaling.
    pub wished: i32,
    /// One of [`collab_crds::conditions::reason`]; `None` when nothing holds it back.
    pub limited: Option<&'static str>,
    /// Whether the load is known well enough.
    pub load_known: bool,
}

impl fmt::Display for Verdict {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{} nodes", self.desired)?;
        if let Some(limited) = self.limited {
            write!(out, " (load wants {}, held by {limited})", self.wished)?;
        }
        Ok(())
    }
}

/// The number wanted when the spec says it.
pub fn fixed(spec: &CollabClusterSpec) -> Verdict {
    Verdict {
        desired: spec.nodes.replicas,
        wished: spec.nodes.replicas,
        limited: None,
        load_known: true,
    }
}

/// Number of nodes wanted for the load, before bounds, windows and cooldown.
///
/// Connections decide, because a node's cost is its sockets, and a headroom rather than a
/// utilisation, because people arrive together (Agones' buffer policy). Within the tolerance nothing
/// changes. A node without a fresh sample counts as idle when growing and as full when shrinking (the
/// rule of the `HorizontalPodAutoscaler`), so silence never changes anything.
pub fn wish(load: &Load, had: i32, policy: &AutoscalingSpec) -> i32 {
    let per_node = positive(policy.target_connections_per_node);
    let tolerance = i128::from(policy.tolerance_percent);
    // In hundredths of a connection, so that the headroom needs no rounding.
    let wanted = i128::from(load.connections) * i128::from(100 + policy.headroom_percent);
    let capacity = i128::from(had) * per_node * 100;
    let cautious = wanted + i128::from(load.unknown) * per_node * 100;
    let nodes_for = |hundredths: i128| {
        let whole = per_node * 100;
        i32::try_from((hundredths + whole - 1) / whole).unwrap_or(i32::MAX)
    };
    if wanted * 100 > capacity * (100 + tolerance) {
        nodes_for(wanted).max(had)
    } else if cautious * 100 < capacity * (100 - tolerance) {
        nodes_for(cautious).min(had)
    } else {
        had
    }
}

fn positive(number: i32) -> i128 {
    i128::from(number.max(1))
}

/// Number of nodes wanted now.
///
/// Grows as soon as every wish of the up window asked for it (at once when that window is 0), to at
/// most twice the nodes or four more within a minute. Shrinks by one node, only when no wish of the
/// down window asked for more and nothing speaks against it: every node removed costs each of its
/// documents a handoff, and after a failure people come back. `recent` holds the wishes of the
/// windows with the present one last.
pub fn decide(
    recent: &[Wish],
    had: i32,
    policy: &AutoscalingSpec,
    now: Timestamp,
    hold: Option<&Hold>,
) -> Verdict {
    let wished = recent.last().map_or(had, |last| last.nodes);
    let within = |seconds: i32| {
        let since = now - SignedDuration::from_secs(i64::from(seconds));
        recent.iter().filter(move |wish| since <= wish.at)
    };
    let bound = |nodes: i32| nodes.clamp(policy.min_nodes, policy.max_nodes.max(policy.min_nodes));
    let up = within(policy.scale_up_window_seconds)
        .map(|wish| wish.nodes)
        .min()
        .unwrap_or(had);
    let down = within(policy.scale_down_window_seconds)
        .map(|wish| wish.nodes)
        .max()
        .unwrap_or(had);
    let before_growth = recent
        .iter()
        .filter(|wish| now - GROWTH_WINDOW <= wish.at)
        .map(|wish| wish.had)
        .min()
        .unwrap_or(had);
    let growth_limit = before_growth + before_growth.max(GROWTH_NODES);

    let (desired, limited) = match bound(wished).cmp(&had) {
        _ if had < policy.min_nodes => (policy.min_nodes, None),
        Ordering::Greater if bound(up) <= had => (had, Some(reason::SCALE_UP_WINDOW)),
        Ordering::Greater => {
            let desired = bound(up).min(growth_limit).max(had);
            (desired, bounded(wished, policy))
        }
        // A lower `maxNodes` is an order, not a wish: only the drain makes it wait.
        Ordering::Less if policy.max_nodes < had => (had - 1, None),
        Ordering::Less if had <= bound(down) => (had, Some(reason::SCALE_DOWN_WINDOW)),
        Ordering::Less => match hold {
            Some(Hold::Cooldown) => (had, Some(reason::COOLDOWN_AFTER_FAILOVER)),
            Some(Hold::Unsettled) => (had, Some(reason::WAITS_FOR_NODES)),
            None => (had - 1, None),
        },
        Ordering::Equal => (had, bounded(wished, policy)),
    };
    Verdict {
        desired,
        wished,
        limited,
        load_known: true,
    }
}

fn bounded(wished: i32, policy: &AutoscalingSpec) -> Option<&'static str> {
    if policy.max_nodes < wished {
        Some(reason::TOO_MANY_NODES)
    } else if wished < policy.min_nodes {
        Some(reason::TOO_FEW_NODES)
    } else {
        None
    }
}

/// Adds a wish and forgets those that no window reaches any more.
///
/// The first one is preceded by a wish for what there is, so that an operator that just started does
/// not take a moment for a window.
pub fn remember(wishes: &mut Vec<Wish>, wish: Wish, policy: &AutoscalingSpec) {
    let longest = policy
        .scale_down_window_seconds
        .max(policy.scale_up_window_seconds)
        .max(60);
    let horizon = wish.at - SignedDuration::from_secs(i64::from(longest));
    if wishes.is_empty() {
        wishes.push(Wish {
            at: wish.at - SignedDuration::from_millis(1),
            nodes: wish.had,
            ..wish
        });
    }
    wishes.push(wish);
    wishes.retain(|wish| horizon <= wish.at);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> AutoscalingSpec {
        AutoscalingSpec {
            enabled: true,
            min_nodes: 2,
            max_nodes: 10,
            target_connections_per_node: 100,
            headroom_percent: 20,
            tolerance_percent: 10,
            scale_up_window_seconds: 0,
            scale_down_window_seconds: 300,
            cooldown_after_failover_seconds: 300,
        }
    }

    fn load(connections: u64) -> Load {
        Load {
            connections,
            unknown: 0,
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_700_000_000 + seconds).unwrap()
    }

    /// Runs the policy over one load sample every `step` seconds; answers the number after each.
    fn run(policy: &AutoscalingSpec, start: i32, step: i64, loads: &[u64]) -> Vec<i32> {
        let mut had = start;
        let mut wishes = Vec::new();
        loads
            .iter()
            .zip(0..)
            .map(|(&connections, index)| {
                let now = at(index * step);
                let nodes = wish(&load(connections), had, policy);
                remember(
                    &mut wishes,
                    Wish {
                        at: now,
                        nodes,
                        had,
                    },
                    policy,
                );
                had = decide(&wishes, had, policy, now, None).desired;
                had
            })
            .collect()
    }

    #[test]
    fn the_wish_follows_connections_with_headroom_and_tolerance() {
        // connections, nodes there are, nodes wished
        for (connections, had, wished) in [
            (0, 3, 0),
            (167, 2, 2), // 200.4 of 200: within the tolerance
            (183, 2, 2), // 219.6: still within
            (184, 2, 3), // 220.8: beyond 10 %
            (1000, 2, 12),
            (230, 3, 3), // 276 of 300: within
            (220, 3, 3), // 264 needs three
            (166, 3, 2), // 199.2 fits two
        ] {
            assert_eq!(
                wish(&load(connections), had, &policy()),
                wished,
                "{connections} on {had}"
            );
        }
    }

    #[test]
    fn a_silent_node_is_idle_when_growing_and_full_when_shrinking() {
        let silent = |connections, unknown| Load {
            connections,
            unknown,
        };
        assert_eq!(
            wish(&silent(0, 3), 3, &policy()),
            3,
            "nothing is known, nothing changes"
        );
        assert_eq!(wish(&silent(20, 1), 3, &policy()), 2);
        assert_eq!(
            wish(&silent(150, 1), 3, &policy()),
            3,
            "the silent one may be full"
        );
        assert_eq!(
            wish(&silent(300, 2), 3, &policy()),
            4,
            "what is known is enough to grow"
        );
    }

    #[test]
    fn it_grows_at_once_and_shrinks_one_by_one_after_the_window() {
        assert_eq!(run(&policy(), 2, 60, &[10, 240, 240]), [2, 3, 3]);
        assert_eq!(
            run(&policy(), 4, 60, &[400, 0, 0, 0, 0, 0, 0, 0, 0]),
            [5, 5, 5, 5, 5, 5, 4, 3, 2],
            "the last high wish leaves the window of 300 s after 360 s"
        );
    }

    #[test]
    fn a_short_dip_changes_nothing() {
        assert_eq!(run(&policy(), 3, 60, &[240, 0, 0, 240, 0, 0, 240]), [3; 7]);
    }

    #[test]
    fn growth_is_bounded_in_a_minute() {
        assert_eq!(run(&policy(), 2, 10, &[5000, 5000])[..2], [6, 6]);
        assert_eq!(run(&policy(), 2, 70, &[5000, 5000])[..2], [6, 10]);
    }

    #[test]
    fn an_up_window_waits() {
        let slow = AutoscalingSpec {
            scale_up_window_seconds: 30,
            ..policy()
        };
        assert_eq!(run(&slow, 2, 20, &[0, 300, 300, 300]), [2, 2, 4, 4]);
    }

    #[test]
    fn a_fresh_operator_does_not_shrink_before_its_window() {
        assert_eq!(run(&policy(), 3, 100, &[0, 0, 0, 0]), [3, 3, 3, 2]);
    }

    #[test]
    fn what_holds_it_is_said() {
        let low = [Wish {
            at: at(0),
            nodes: 2,
            had: 3,
        }];
        let held = |hold| decide(&low, 3, &policy(), at(0), hold);
        assert_eq!(held(None).desired, 2);
        assert_eq!(
            held(Some(&Hold::Cooldown)).limited,
            Some(reason::COOLDOWN_AFTER_FAILOVER)
        );
        assert_eq!(held(Some(&Hold::Unsettled)).desired, 3);
        let high = [Wish {
            at: at(0),
            nodes: 30,
            had: 10,
        }];
        assert_eq!(
            decide(&high, 10, &policy(), at(0), None).limited,
            Some(reason::TOO_MANY_NODES)
        );
        let idle = [Wish {
            at: at(0),
            nodes: 0,
            had: 2,
        }];
        assert_eq!(
            decide(&idle, 2, &policy(), at(0), None).limited,
            Some(reason::TOO_FEW_NODES)
        );
    }

    #[test]
    fn bounds_are_orders() {
        let now = [Wish {
            at: at(0),
            nodes: 1,
            had: 1,
        }];
        assert_eq!(
            decide(&now, 1, &policy(), at(0), Some(&Hold::Cooldown)).desired,
            2
        );
        let over = [Wish {
            at: at(0),
            nodes: 12,
            had: 12,
        }];
        assert_eq!(
            decide(&over, 12, &policy(), at(0), Some(&Hold::Cooldown)).desired,
            11
        );
    }

    proptest::proptest! {
        #[test]
        fn it_never_leaves_the_bounds_nor_removes_two(
            loads in proptest::collection::vec(0_u64..4000, 1..60),
            start in 1_i32..12,
            step in 1_i64..400,
        ) {
            let policy = policy();
            let mut before = start;
            for after in run(&policy, start, step, &loads) {
                proptest::prop_assert!(before - after <= 1);
                proptest::prop_assert!(after >= policy.min_nodes.min(start));
                proptest::prop_assert!(after <= policy.max_nodes.max(start));
                before = after;
            }
        }

        #[test]
        fn more_connections_never_mean_fewer_nodes(a in 0_u64..100_000, b in 0_u64..100_000, had in 1_i32..20) {
            let (low, high) = (a.min(b), a.max(b));
            proptest::prop_assert!(wish(&load(low), had, &policy()) <= wish(&load(high), had, &policy()));
        }
    }
}
