//! The map of slots as one node tells it another that does not reach the store.
//!
//! Only what is needed to relay: who owns which slot, and where that is. JSON, because it passes seldom.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ids::{Epoch, NodeId};

/// The map that a node has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SharedMap {
    /// Owners, and whoever else is a member.
    pub members: Vec<SharedMember>,
    /// By slot: index into [`SharedMap::members`] of its owner, and the version of its ownership.
    pub owners: Vec<(Option<u16>, Epoch)>,
}

/// Where a member is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SharedMember {
    /// The process.
    pub incarnation: Uuid,
    /// Its node.
    pub node: NodeId,
    /// `host:port` of its internal listener.
    pub address: String,
}

impl SharedMap {
    /// As JSON.
    ///
    /// # Panics
    /// Never: numbers and texts encode.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers and texts encode")
    }

    /// From JSON; `None` when it is none of this version.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_what_it_was_after_the_way() {
        let map = SharedMap {
            members: vec![SharedMember {
                incarnation: Uuid::from_u128(7),
                node: NodeId::from("n0"),
                address: "10.0.0.1:8081".to_owned(),
            }],
            owners: vec![(Some(0), Epoch(3)), (None, Epoch(0))],
        };
        let bytes = map.encode();
        assert_eq!(SharedMap::decode(&bytes), Some(map));
        assert_eq!(SharedMap::decode(&bytes[1..]), None);
    }
}
