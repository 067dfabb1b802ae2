//! What real clients sent: the sessions that the core's tests have of Yjs.

use std::collections::BTreeMap;

use collab_core::replica::new_doc;
use serde::Deserialize;
use yrs::updates::decoder::Decode;
use yrs::{ReadTxn, StateVector, Transact, Update};

use super::bytes;

/// A log that a server had of three Yjs clients.
#[derive(Deserialize)]
struct Session {
    log: Vec<String>,
    state: String,
    vector: String,
}

/// A document, and an update that it could be sent next.
pub(super) struct Base {
    pub(super) state: Vec<u8>,
    /// Its state vector.
    pub(super) clocks: BTreeMap<u64, u32>,
    pub(super) next: Vec<u8>,
}

/// Every document of the sessions on its way, the empty one with each whole session before it.
pub(super) fn bases() -> Vec<Base> {
    let mut bases = Vec::new();
    for session in sessions() {
        bases.push(Base {
            state: vec![0, 0],
            clocks: BTreeMap::new(),
            next: bytes(&session.state),
        });
        let doc = new_doc();
        for next in session.log.iter().map(|hex| bytes(hex)) {
            let txn = doc.transact();
            let vector = txn.state_vector();
            let clocks = vector.iter().map(|(client, clock)| (client.get(), *clock));
            bases.push(Base {
                state: txn.encode_state_as_update_v1(&StateVector::default()),
                clocks: clocks.collect(),
                next: next.clone(),
            });
            drop(txn);
            let update = Update::decode_v1(&next).expect("Yjs wrote it");
            doc.transact_mut()
                .apply_update(update)
                .expect("in the order of the log");
        }
    }
    bases
}

/// Every update of the sessions, and their whole states.
pub(super) fn updates() -> Vec<Vec<u8>> {
    let of = |session: Session| session.log.into_iter().chain([session.state]);
    sessions()
        .into_iter()
        .flat_map(of)
        .map(|hex| bytes(&hex))
        .collect()
}

/// A state vector of each.
pub(super) fn vectors() -> Vec<Vec<u8>> {
    sessions()
        .iter()
        .map(|session| bytes(&session.vector))
        .collect()
}

fn sessions() -> Vec<Session> {
    let json = include_str!("../../node/core/testdata/yjs-updates.json");
    serde_json::from_str(json).expect("it is JSON of sessions")
}
