//! Nodes that keep their lease and that the others do not reach.
//!
//! A lease says who reaches the database. Clients at other nodes need more: their edge must reach the owner. Each
//! node tells with its renewal whom it does not hear. When half of the nodes have not heard one for a while, it is they who are
//! believed: its lease is ended, so that they adopt its slots, and it is given none until it is heard again. Its own clients keep
//! their sockets and wait: they would do so in any case.

use std::collections::BTreeMap;

use collab_core::control::{ClusterReport, MemberReport, MemberState};
use collab_core::ids::NodeId;
use uuid::Uuid;

use super::SAMPLE_FRESH_MS;
use crate::model::{Action, Gravity, News};

/// For so long a node must not have been heard before anything is done about it.
const AGREED_FOR_MS: u64 = 3_000;

/// What to do about nodes that are not heard.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grey {
    /// The nodes that are to have no slots, and how many others do not hear each.
    pub nodes: BTreeMap<NodeId, usize>,
    /// Those of them whose lease is to be ended, since they own slots.
    pub fence: Vec<(NodeId, Uuid)>,
    /// What is waited for.
    pub waits: Vec<String>,
}

impl Grey {
    /// What is asked of the cluster.
    pub fn actions(&self) -> impl Iterator<Item = Action> {
        let fenced = self.fence.iter().cloned();
        fenced.map(|(node, incarnation)| Action::Fence { node, incarnation })
    }

    /// What people are told.
    pub fn news(&self) -> impl Iterator<Item = News> {
        self.fence.iter().map(|(node, _)| {
            let witnesses = self.nodes.get(node).copied().unwrap_or_default();
            News {
                gravity: Gravity::Warning,
                reason: "NodeUnreachable",
                action: "Fence",
                node: Some(node.clone()),
                note: format!(
                    "{witnesses} other nodes do not hear node {node}, which keeps its lease: it is ended"
                ),
            }
        })
    }
}

/// Judges by what the nodes say of each other.
///
/// A node that hardly anybody hears hears hardly anybody itself, and says so. Therefore nothing is done when those who would be left out
/// are half of the nodes or more: then no part of them is any better than the rest.
pub fn grey(report: &ClusterReport) -> Grey {
    let serves = |member: &&MemberReport| member.live && member.state == MemberState::Active;
    let serving: Vec<&MemberReport> = report.members.iter().filter(serves).collect();
    let mut deaf_to = BTreeMap::<&NodeId, usize>::new();
    for member in &serving {
        let sample = member.load.as_ref();
        let sample = sample.filter(|_| member.load_age_ms <= SAMPLE_FRESH_MS);
        let silences = sample.into_iter().flat_map(|sample| &sample.silences);
        for silence in silences.filter(|silence| AGREED_FOR_MS <= silence.ms) {
            *deaf_to.entry(&silence.node).or_default() += 1;
        }
    }
    let is_grey = |member: &&&MemberReport| {
        let witnesses = deaf_to.get(&member.node).copied();
        witnesses.is_some_and(|witnesses| serving.len() <= 2 * witnesses)
    };
    let found: Vec<&&MemberReport> = serving.iter().filter(is_grey).collect();
    if found.is_empty() {
        return Grey::default();
    }
    let names: Vec<&str> = found.iter().map(|member| member.node.0.as_str()).collect();
    let names = names.join(", ");
    if serving.len() <= 2 * found.len() {
        let wait = format!(
            "for nodes to hear each other again: nothing is done, since half of them do not hear {names}"
        );
        return Grey {
            waits: vec![wait],
            ..Grey::default()
        };
    }
    let nodes = found.iter().map(|member| {
        let witnesses = deaf_to.get(&member.node).copied();
        (member.node.clone(), witnesses.unwrap_or_default())
    });
    let owners = found.iter().filter(|member| 0 < member.slots_owned);
    Grey {
        nodes: nodes.collect(),
        fence: owners
            .map(|member| (member.node.clone(), member.incarnation))
            .collect(),
        waits: vec![format!(
            "for the other nodes to hear {names} again, before it is given slots"
        )],
    }
}

#[cfg(test)]
mod tests {
    use collab_core::control::{LoadSample, Silence};

    use super::*;

    #[test]
    fn a_node_that_half_of_them_do_not_hear_is_fenced_and_left_out() {
        let cut = report(&["b", "ac", "b"]);
        let grey = grey(&cut);
        assert_eq!(grey.nodes, [(NodeId::from("b"), 2)].into());
        assert_eq!(grey.fence, [(NodeId::from("b"), Uuid::from_u128(1))]);
    }

    #[test]
    fn once_it_owns_nothing_it_is_only_left_out() {
        let mut cut = report(&["b", "ac", "b"]);
        cut.members[1].slots_owned = 0;
        let grey = grey(&cut);
        assert_eq!((grey.nodes.len(), grey.fence), (1, Vec::new()));
    }

    #[test]
    fn one_of_three_who_does_not_hear_another_decides_nothing() {
        assert_eq!(grey(&report(&["b", "a", ""])), Grey::default());
        assert_eq!(grey(&report(&["", "", ""])), Grey::default());
    }

    #[test]
    fn where_no_part_is_better_than_the_rest_nothing_is_done() {
        for cuts in [
            &["bc", "ac", "ab"][..],
            &["b", "a"],
            &["cd", "cd", "ab", "ab"],
        ] {
            let grey = grey(&report(cuts));
            assert_eq!((grey.nodes.len(), grey.waits.len()), (0, 1), "{cuts:?}");
        }
        let minority = grey(&report(&["de", "de", "de", "abc", "abc"]));
        assert_eq!(minority.nodes.len(), 2);
    }

    #[test]
    fn what_is_short_or_old_does_not_count() {
        let mut short = report(&["b", "ac", "b"]);
        let sample = short.members[0].load.as_mut().unwrap();
        sample.silences[0].ms = AGREED_FOR_MS - 1;
        assert_eq!(grey(&short), Grey::default());
        let mut old = report(&["b", "ac", "b"]);
        old.members[0].load_age_ms = SAMPLE_FRESH_MS + 1;
        assert_eq!(grey(&old), Grey::default());
        let mut drains = report(&["b", "ac", "b"]);
        drains.members[1].state = MemberState::Draining;
        assert_eq!(grey(&drains), Grey::default());
    }

    /// Nodes a, b and so on, each with the names of those it does not hear.
    fn report(silences: &[&str]) -> ClusterReport {
        let name = |letter: char| NodeId(letter.to_string());
        let members = ('a'..)
            .zip((0..).zip(silences))
            .map(|(letter, (number, deaf_to))| {
                let silence = |node| Silence {
                    node: name(node),
                    ms: AGREED_FOR_MS,
                };
                MemberReport {
                    node: name(letter),
                    incarnation: Uuid::from_u128(number),
                    pod_uid: String::new(),
                    address: String::new(),
                    zone: String::new(),
                    state: MemberState::Active,
                    live: true,
                    slots_owned: 9,
                    load: Some(LoadSample {
                        silences: deaf_to.chars().map(silence).collect(),
                        ..LoadSample::default()
                    }),
                    load_age_ms: 100,
                    quarantine: None,
                }
            });
        ClusterReport {
            members: members.collect(),
            ..ClusterReport::default()
        }
    }
}
