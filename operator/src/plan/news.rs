//! What happened since the last look, for people who read Events.

use std::collections::BTreeMap;

use collab_core::control::{ClusterReport, MemberState};
use collab_core::ids::NodeId;

use crate::model::{Gravity, News, Seen};
use crate::plan::handoff;

/// What is seen now.
pub fn see(report: &ClusterReport) -> Seen {
    let mut members = BTreeMap::<NodeId, MemberState>::new();
    for member in report.members.iter().filter(|member| member.live) {
        // Of two processes of one name the one that serves counts.
        let state = members.entry(member.node.clone()).or_insert(member.state);
        if member.state == MemberState::Active {
            *state = MemberState::Active;
        }
    }
    let lost = report
        .members
        .iter()
        .map(|member| &member.node)
        .filter(|node| !members.contains_key(node))
        .cloned()
        .collect();
    Seen {
        members,
        lost,
        quarantined: handoff::quarantined(report).into_keys().collect(),
        adoptions: report.adoptions,
        store: true,
    }
}

/// What is to be told about the way from one look to the next. The first look tells nothing.
pub fn between(before: Option<&Seen>, after: &Seen) -> Vec<News> {
    let Some(before) = before else {
        return Vec::new();
    };
    let mut news = Vec::new();
    let mut tell = |gravity, reason, action, node: Option<&NodeId>, note: String| {
        news.push(News {
            gravity,
            reason,
            action,
            node: node.cloned(),
            note,
        });
    };
    for (node, state) in &after.members {
        match (before.members.get(node), state) {
            (None, MemberState::Active) => {
                tell(
                    Gravity::Normal,
                    "NodeJoined",
                    "Observe",
                    Some(node),
                    format!("node {node} serves"),
                );
            }
            (Some(MemberState::Active), MemberState::Draining) => {
                tell(
                    Gravity::Normal,
                    "DrainStarted",
                    "Drain",
                    Some(node),
                    format!("node {node} hands over its slots"),
                );
            }
            (Some(MemberState::Active | MemberState::Draining), MemberState::Drained) => {
                tell(
                    Gravity::Normal,
                    "DrainCompleted",
                    "Drain",
                    Some(node),
                    format!("node {node} holds no slot and no connection"),
                );
            }
            (Some(MemberState::Draining | MemberState::Drained), MemberState::Active) => {
                tell(
                    Gravity::Normal,
                    "DrainTakenBack",
                    "Drain",
                    Some(node),
                    format!("node {node} serves again"),
                );
            }
            _ => {}
        }
    }
    for node in before.members.keys() {
        if after.lost.contains(node) {
            tell(
                Gravity::Warning,
                "NodeLost",
                "Observe",
                Some(node),
                format!("node {node} has lost its lease"),
            );
        } else if !after.members.contains_key(node) {
            tell(
                Gravity::Normal,
                "NodeLeft",
                "Observe",
                Some(node),
                format!("node {node} left"),
            );
        }
    }
    let adopted = after.adoptions.saturating_sub(before.adoptions);
    if 0 < adopted {
        tell(
            Gravity::Warning,
            "SlotsAdopted",
            "Observe",
            None,
            format!("{adopted} slots were adopted after a loss"),
        );
    }
    news.extend(of_quarantine(before, after));
    news
}

fn of_quarantine(before: &Seen, after: &Seen) -> Vec<News> {
    let tell = |gravity, reason, node: &NodeId, note| News {
        gravity,
        reason,
        action: "Quarantine",
        node: Some(node.clone()),
        note,
    };
    let began = after.quarantined.difference(&before.quarantined);
    let began = began.map(|node| {
        let note = format!(
            "node {node} loses its lease again and again; it is given no slots for a while"
        );
        tell(Gravity::Warning, "NodeQuarantined", node, note)
    });
    let ended = before.quarantined.difference(&after.quarantined);
    let ended = ended.filter(|node| after.members.contains_key(*node));
    let ended = ended.map(|node| {
        let note =
            format!("node {node} has kept its lease and has its whole share of the slots again");
        tell(Gravity::Normal, "NodeReturned", node, note)
    });
    began.chain(ended).collect()
}

/// Whether a node was lost on that way: then people may soon come back, and no node is removed.
pub fn failed_over(before: Option<&Seen>, after: &Seen) -> bool {
    before.is_some_and(|before| before.adoptions < after.adoptions)
}
