//! Who is there: presence belongs to the socket that showed it, and ends with it or when it is not renewed.

use std::time::Duration;

use super::{Document, Effect, Peer, refuse};
use crate::limits::{AWARENESS_EXPIRY, PRESENCE_PER_CONNECTION_MAX};
use crate::wire::awareness;
use crate::wire::relay::ToEdge;

pub(super) struct Presence {
    pub(super) clock: u32,
    pub(super) state: String,
    pub(super) peer: Peer,
    pub(super) renewed: Duration,
}

impl Document {
    /// The presence states that are known: client id and JSON.
    pub fn presence(&self) -> impl Iterator<Item = (u64, &str)> {
        self.presence
            .iter()
            .map(|(client, presence)| (*client, presence.state.as_str()))
    }

    pub(super) fn awareness(&mut self, peer: Peer, payload: &[u8], now: Duration) -> Vec<Effect> {
        if !self.sockets.contains_key(&peer) {
            return Vec::new();
        }
        let entries = match awareness::parse(payload) {
            Ok(entries) => entries,
            Err(error) => return refuse(peer, format!("presence refused: {error}")),
        };
        let accepted: Vec<awareness::Entry> = entries
            .filter(|entry| self.accept_presence(peer, entry, now))
            .collect();
        if accepted.is_empty() {
            return Vec::new();
        }
        vec![Effect::Presence {
            payload: awareness::encode(accepted),
        }]
    }

    fn accept_presence(&mut self, peer: Peer, entry: &awareness::Entry, now: Duration) -> bool {
        let newer = match self.presence.get(&entry.client) {
            Some(known) => {
                known.clock < entry.clock || (known.clock == entry.clock && entry.is_gone())
            }
            None => !entry.is_gone(),
        };
        if !newer || !self.may_speak_for(peer, entry.client) {
            return false;
        }
        if entry.is_gone() {
            self.presence.remove(&entry.client);
        } else {
            let presence = Presence {
                clock: entry.clock,
                state: entry.json.to_owned(),
                peer,
                renewed: now,
            };
            self.presence.insert(entry.client, presence);
        }
        true
    }

    pub(super) fn expire(&mut self, now: Duration) -> Vec<Effect> {
        self.end_presence(|presence| presence.renewed + AWARENESS_EXPIRY <= now)
    }

    pub(super) fn presence_for(&self, peer: Peer) -> Option<Effect> {
        if self.presence.is_empty() {
            return None;
        }
        let entries = self
            .presence
            .iter()
            .map(|(client, presence)| awareness::Entry {
                client: *client,
                clock: presence.clock,
                json: &presence.state,
            });
        let payload = awareness::encode(entries);
        let message = ToEdge::PresenceTo {
            connection: peer.connection,
            payload,
        };
        Some(Effect::Send {
            to: peer.edge,
            message,
        })
    }

    /// A socket may speak for client ids that are free, its own, or left behind by the same user.
    fn may_speak_for(&self, peer: Peer, client: u64) -> bool {
        match self.presence.get(&client) {
            Some(presence) if presence.peer == peer => true,
            Some(presence) => {
                let author = |peer: &Peer| self.sockets.get(peer).map(|socket| &socket.author);
                author(&presence.peer) == author(&peer)
            }
            None => {
                self.presence
                    .values()
                    .filter(|presence| presence.peer == peer)
                    .count()
                    < PRESENCE_PER_CONNECTION_MAX
            }
        }
    }

    pub(super) fn end_presence(&mut self, ended: impl Fn(&Presence) -> bool) -> Vec<Effect> {
        let gone: Vec<awareness::Entry> = self
            .presence
            .extract_if(.., |_, presence| ended(presence))
            .map(|(client, presence)| awareness::Entry {
                client,
                clock: presence.clock,
                json: awareness::GONE,
            })
            .collect();
        if gone.is_empty() {
            return Vec::new();
        }
        vec![Effect::Presence {
            payload: awareness::encode(gone),
        }]
    }
}
