//! What a client lacks: the answer to its step 1, from what is committed and what is not yet.

use bytes::Bytes;
use yrs::updates::decoder::Decode;
use yrs::{ReadTxn, StateVector, Transact};

use super::{Document, Effect, NO_EDITS, Peer, Waiting, refuse, send};
use crate::ids::Seq;
use crate::limits::{LARGE_STATE_BYTES, TAIL_UPDATES_MAX};
use crate::scan;
use crate::wire::relay::ToEdge;

/// What a client has of the committed state.
pub(super) enum Has {
    /// What its state vector says.
    Known(StateVector),
    /// All that was committed when it asked.
    All,
}

impl Document {
    pub(super) fn step1(&mut self, peer: Peer, state_vector: &[u8]) -> Vec<Effect> {
        let known = scan::scan_state_vector(state_vector)
            .map_err(|error| error.to_string())
            .and_then(|_| StateVector::decode_v1(state_vector).map_err(|error| error.to_string()));
        match known {
            Ok(known) => self.step2(peer, known),
            Err(error) => refuse(peer, format!("state vector refused: {error}")),
        }
    }

    fn step2(&mut self, peer: Peer, mut known: StateVector) -> Vec<Effect> {
        let connection = peer.connection;
        let parts = if self.is_large() {
            self.lacking_in_parts(&known)
        } else {
            None
        };
        let mut effects = Vec::new();
        let has_all = parts
            .as_ref()
            .is_some_and(|parts| parts[0].0 <= self.committed);
        let (parts, last) = match parts.map(|mut parts| (parts.pop(), parts)) {
            Some((Some((_, last)), parts)) => (parts, Some(last)),
            _ => (Vec::new(), None),
        };
        let mut later = Vec::new();
        for (seq, update) in parts {
            let part = ToEdge::Part { connection, update };
            if seq <= self.committed {
                effects.push(send(peer, part));
            } else {
                later.push(part);
            }
        }
        let mut is_shown = false;
        if self.store_away && !self.is_settled() {
            // The rest follows when it is committed, too.
            let update = if has_all {
                Some(Bytes::from_static(&NO_EDITS))
            } else {
                self.past.at(self.committed).map(|committed| {
                    let update = committed.lacking(&known);
                    known.merge(committed.transact().state_vector());
                    update
                })
            };
            is_shown = update.is_some();
            let step2 = |update| ToEdge::CommittedStep2 { connection, update };
            effects.extend(update.map(|update| send(peer, step2(update))));
        }
        let update = last.unwrap_or_else(|| self.content().doc.lacking(&known));
        let step2 = ToEdge::Step2 { connection, update };
        if self.is_settled() {
            effects.push(send(peer, step2));
            return effects;
        }
        let has = if has_all { Has::All } else { Has::Known(known) };
        let mut has = Some(has).filter(|_| !is_shown);
        for message in later.into_iter().chain([step2]) {
            let is_step2 = matches!(message, ToEdge::Step2 { .. });
            self.waiting.push_back(Waiting {
                after: self.assigned,
                to: peer.edge,
                message,
                has: has.take_if(|_| is_step2),
            });
        }
        effects
    }

    /// What a client lacks, as updates that follow each other: of the newest state that is there as bytes, and the log
    /// after it. Each with the position that must be durable when it is sent.
    fn lacking_in_parts(&mut self, known: &StateVector) -> Option<Vec<(Seq, Bytes)>> {
        let newest = self.past.newest();
        let (seq, bytes_max) = (newest.seq, LARGE_STATE_BYTES.max(newest.bytes.len() / 32));
        let is_long = {
            let mut tail = self.past.after(seq).map(|(_, update)| update.len());
            TAIL_UPDATES_MAX < tail.len() || bytes_max <= tail.by_ref().sum()
        };
        if is_long {
            self.whole_state();
        }
        let newest = self.past.newest();
        let mut parts = vec![(newest.seq, newest.lacking(known)?)];
        let seq = newest.seq;
        parts.extend(self.past.after(seq).cloned());
        Some(parts)
    }

    /// Shows the last committed state to those who wait for a later one.
    pub(super) fn store_away(&mut self) -> Vec<Effect> {
        self.store_away = true;
        let mut effects = Vec::new();
        for waiting in &mut self.waiting {
            let ToEdge::Step2 { connection, .. } = waiting.message else {
                continue;
            };
            let update = match waiting.has.take() {
                Some(Has::All) => Some(Bytes::from_static(&NO_EDITS)),
                Some(Has::Known(known)) => {
                    let committed = self.past.at(self.committed);
                    committed.map(|committed| committed.lacking(&known))
                }
                None => None,
            };
            effects.extend(update.map(|update| Effect::Send {
                to: waiting.to,
                message: ToEdge::CommittedStep2 { connection, update },
            }));
        }
        effects
    }
}
