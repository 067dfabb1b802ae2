//! What a node does while it does not reach the store.
//!
//! Its sockets are worth keeping as long as it can relay: other nodes tell it who owns the slots now, and the
//! clients notice nothing but the pause. Only when no other node answers either are its clients better
//! off elsewhere. When the store is down for all, everybody answers and nobody knows of a newer owner.

use std::sync::Arc;
use std::time::Duration;

use collab_core::limits::ISOLATED_AFTER;
use tokio::time::{Instant, sleep};

use crate::edge::Edge;
use crate::members::Members;
use crate::peers::Peers;

/// Between two questions to the other nodes.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// How a node stands that does not reach the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// Others answer, or there may be none: the sockets stay.
    Connected,
    /// It has been alone for too long, though there are others.
    Isolated,
}

/// Judges by the members that are known beside this one, and by how long none of them has answered.
fn standing(others: usize, silent: Duration) -> Standing {
    if 0 < others && ISOLATED_AFTER <= silent {
        Standing::Isolated
    } else {
        Standing::Connected
    }
}

/// Follows the map of the others whenever the store does not answer, and lets the clients go when nobody does.
pub async fn endure(members: Arc<Members>, peers: Arc<Peers>, edge: Arc<Edge>) {
    let mut answered = Instant::now();
    let mut let_go = false;
    loop {
        sleep(ASK_EVERY).await;
        if members.lease_held() || 0 < peers.ask_for_maps().await {
            answered = Instant::now();
            let_go = false;
            continue;
        }
        let me = members.incarnation();
        let map = members.map();
        let others = map.members().filter(|member| member.incarnation != me);
        if !let_go && standing(others.count(), answered.elapsed()) == Standing::Isolated {
            tracing::warn!(
                "neither the store nor another node answers: the clients are sent elsewhere"
            );
            let_go = true;
            edge.close_all().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_node_that_nobody_answers_lets_its_clients_go() {
        assert_eq!(standing(2, ISOLATED_AFTER), Standing::Isolated);
        assert_eq!(standing(2, ISOLATED_AFTER / 2), Standing::Connected);
        assert_eq!(standing(0, ISOLATED_AFTER * 9), Standing::Connected);
    }
}
