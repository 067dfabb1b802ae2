//! A socket of Hocuspocus' provider: many documents, each with a token of its own.
//!
//! The provider sends its token, its state vector and its presence for a document one after the other and does
//! not wait for the answer. What comes before access is granted is kept as far as it matters: the
//! last state vector, the last presence, and how many changes the client has counted; the changes
//! themselves come again in its step 2.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use collab_core::ids::{ConnectionId, DocumentId};
use collab_core::limits::{DOCUMENTS_PER_SOCKET_MAX, PENDING_BYTES_MAX};
use collab_core::wire::hocuspocus::{self, Frame, FrameError, Message};
use collab_core::wire::y_websocket::Message as Common;
use tokio::time::Instant;

use super::family::Told;
use super::room::FromSocket;
use super::{
    CLOSE_INVALID, CLOSE_POLICY, CLOSE_TRY_AGAIN, Client, Close, Edge, Family, Line, Membership,
    Visitor,
};

/// Between two pings.
const PING_EVERY: Duration = Duration::from_secs(10);
/// A provider that answers pings and said nothing for this long is gone.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// A socket without access to any document after this time is closed.
const HANDSHAKE_MAX: Duration = Duration::from_secs(30);
/// Before access ends the client is asked for a new token this long.
const RENEW_BEFORE: Duration = Duration::from_secs(30);
/// A client that came with a token that ends as soon is asked again after this time.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// The frame is too large: Hocuspocus' own code.
const CLOSE_TOO_BIG: u16 = 1009;
/// No token, or none that is valid, came in time.
const CLOSE_UNAUTHORIZED: u16 = 4401;
/// The client is silent.
const CLOSE_TIMEOUT: u16 = 4408;

/// Decides on a token for a document; the error is for the client.
pub type Gate = Arc<dyn Fn(&DocumentId, &str) -> Result<Admitted, String> + Send + Sync>;

/// Access to a document.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// Who came.
    pub visitor: Visitor,
    /// When the access ends, unless a new token comes.
    pub until: Option<Instant>,
}

/// One socket.
pub(super) struct Hocuspocus {
    edge: Arc<Edge>,
    line: Line,
    gate: Gate,
    documents: BTreeMap<Arc<str>, Place>,
    pending_bytes: usize,
    begun: Instant,
    heard: Instant,
    pings_at: Instant,
    wakes_at: Instant,
    was_admitted: bool,
    /// The provider told its version: it knows pings.
    knows_pings: bool,
}

/// A document on the socket.
enum Place {
    Pending(Pending),
    Held(Held),
}

/// What waits for a token.
#[derive(Default)]
struct Pending {
    step1: Option<Bytes>,
    awareness: Option<Bytes>,
    /// Of a client that had access: what it had when it began to sync. It does not begin again.
    began_with: Option<Bytes>,
    /// Changes that the client has counted since it began to sync, or since it lost access.
    changes: u32,
}

/// A document that the client has access to.
struct Held {
    membership: Membership,
    admitted: Admitted,
    /// When the client was last asked for another token.
    asked_at: Option<Instant>,
    /// What the client had when it began to sync.
    began_with: Option<Bytes>,
}

impl Hocuspocus {
    pub(super) fn new(edge: Arc<Edge>, line: Line, gate: Gate) -> Self {
        let now = Instant::now();
        Self {
            edge,
            line,
            gate,
            documents: BTreeMap::new(),
            pending_bytes: 0,
            begun: now,
            heard: now,
            pings_at: now + PING_EVERY,
            wakes_at: now + PING_EVERY,
            was_admitted: false,
            knows_pings: false,
        }
    }

    fn message(
        &mut self,
        address: &str,
        message: &Message<'_>,
        frame: &Bytes,
    ) -> Result<(), Close> {
        match message {
            Message::Token { token, version } => {
                self.knows_pings |= version.is_some();
                self.token(address, token)
            }
            Message::Close => {
                self.forget(address);
                Ok(())
            }
            Message::Common(common) => match self.documents.get_mut(address) {
                Some(Place::Held(held)) => {
                    if let Common::SyncStep1 { state_vector } = common {
                        held.began_with = Some(Bytes::copy_from_slice(state_vector));
                    }
                    self.edge.pass(&held.membership, &self.line, common, frame);
                    Ok(())
                }
                Some(Place::Pending(_)) | None => self.wait(address, common, frame),
            },
            Message::Stateless { payload } => {
                // Before access is granted it is for nobody.
                if let Some(Place::Held(held)) = self.documents.get(address) {
                    let _ = held.membership.room.send(FromSocket::Stateless {
                        connection: held.membership.connection,
                        payload: frame.slice_ref(payload.as_bytes()),
                    });
                }
                Ok(())
            }
        }
    }

    fn token(&mut self, address: &str, token: &str) -> Result<(), Close> {
        let name = hocuspocus::Address(address).document();
        let admitted = DocumentId::new(name)
            .map_err(|error| error.to_string())
            .and_then(|document| {
                (self.gate)(&document, token).map(|admitted| (document, admitted))
            });
        let family = Family::Hocuspocus {
            address: address.into(),
        };
        let (document, admitted) = match admitted {
            Ok(admitted) => admitted,
            Err(reason) => {
                self.say(&family, Told::Denied(&reason))?;
                self.deny(address);
                return Ok(());
            }
        };
        if !self.documents.contains_key(address) && self.is_full() {
            let reason = "this socket has too many documents; open another one";
            return self.say(&family, Told::Denied(reason));
        }
        self.was_admitted = true;
        self.say(&family, Told::Granted(admitted.visitor.access))?;
        let visitor = admitted.visitor.clone();
        if let Some(Place::Held(held)) = self.documents.get_mut(address) {
            if held.admitted.visitor != visitor {
                let _ = held.membership.room.send(FromSocket::Admit {
                    connection: held.membership.connection,
                    visitor,
                });
            }
            held.admitted = admitted;
            self.plan_waking();
            return Ok(());
        }
        let pending = self.take_pending(address);
        let membership = self
            .edge
            .join(&document, visitor, family, self.line.clone());
        let connection = membership.connection;
        // The beginning is a change too, to a client that counts.
        let begun = pending
            .step1
            .map(|step1| (step1, pending.changes.saturating_add(1)));
        let begun = begun.or_else(|| Some((pending.began_with?, pending.changes)));
        let began_with = begun
            .as_ref()
            .map(|(state_vector, _)| Bytes::copy_from_slice(state_vector));
        if let Some((state_vector, changes)) = begun {
            let _ = membership.room.send(FromSocket::Step1 {
                connection,
                state_vector,
                changes,
            });
        }
        if let Some(payload) = pending.awareness {
            let _ = membership.room.send(FromSocket::Awareness {
                connection,
                payload,
            });
        }
        let held = Held {
            membership,
            admitted,
            asked_at: None,
            began_with,
        };
        self.documents.insert(address.into(), Place::Held(held));
        self.plan_waking();
        Ok(())
    }

    /// Keeps what matters of a message about a document that the client has no access to yet.
    fn wait(&mut self, address: &str, message: &Common<'_>, frame: &Bytes) -> Result<(), Close> {
        if !self.documents.contains_key(address) {
            if self.is_full() {
                return Ok(());
            }
            self.documents
                .insert(address.into(), Place::Pending(Pending::default()));
        }
        let Some(Place::Pending(pending)) = self.documents.get_mut(address) else {
            return Ok(());
        };
        let before = pending.bytes();
        match message {
            Common::SyncStep1 { state_vector } => {
                pending.step1 = Some(frame.slice_ref(state_vector));
                pending.began_with = None;
                pending.changes = 0;
            }
            Common::Update { .. } => pending.changes = pending.changes.saturating_add(1),
            Common::Awareness(awareness) => {
                pending.awareness = Some(frame.slice_ref(awareness.payload()));
            }
            _ => {}
        }
        self.pending_bytes = self.pending_bytes - before + pending.bytes();
        if PENDING_BYTES_MAX < self.pending_bytes {
            let reason = "too much was sent before access was granted";
            return Err(Close::new(CLOSE_TOO_BIG, reason));
        }
        Ok(())
    }

    /// The client loses access, and may ask for it again.
    fn deny(&mut self, address: &str) {
        if let Some(place) = self.documents.get_mut(address)
            && let Place::Held(held) = place
        {
            *place = Place::Pending(Pending {
                began_with: held.began_with.take(),
                ..Pending::default()
            });
        }
    }

    fn forget(&mut self, address: &str) {
        self.take_pending(address);
        self.documents.remove(address);
    }

    fn take_pending(&mut self, address: &str) -> Pending {
        match self.documents.get_mut(address) {
            Some(Place::Pending(pending)) => {
                let pending = std::mem::take(pending);
                self.pending_bytes -= pending.bytes();
                pending
            }
            Some(Place::Held(_)) | None => Pending::default(),
        }
    }

    fn is_full(&self) -> bool {
        DOCUMENTS_PER_SOCKET_MAX <= self.documents.len()
    }

    fn say(&self, family: &Family, told: Told<'_>) -> Result<(), Close> {
        match family.frame(told) {
            Some(frame) => self.put(frame),
            None => Ok(()),
        }
    }

    fn put(&self, frame: Bytes) -> Result<(), Close> {
        if self.line.out.is_full() {
            return Err(Close::new(CLOSE_TRY_AGAIN, "this socket is too slow"));
        }
        self.line.out.put(frame);
        Ok(())
    }

    /// Looks whether the client lives, and asks it to show that it does.
    fn ping(&mut self, now: Instant) -> Result<(), Close> {
        self.pings_at = now + PING_EVERY;
        if !self.was_admitted && self.begun + HANDSHAKE_MAX <= now {
            let reason = "no valid token came in time";
            return Err(Close::new(CLOSE_UNAUTHORIZED, reason));
        }
        if self.knows_pings {
            if self.heard + SILENCE_MAX <= now {
                return Err(Close::new(CLOSE_TIMEOUT, "the client does not answer"));
            }
            self.put(Bytes::from_static(hocuspocus::PING))?;
        }
        Ok(())
    }

    /// Asks for tokens that are about to end, and ends the access of those that have.
    fn renew(&mut self, now: Instant) -> Result<(), Close> {
        let mut ended = Vec::new();
        for (address, place) in &mut self.documents {
            let Place::Held(held) = place else { continue };
            if held.admitted.until.is_some_and(|until| until <= now) {
                ended.push(address.clone());
            } else if held.asks_at().is_some_and(|at| at <= now) {
                held.asked_at = Some(now);
                let frame = hocuspocus::token_request(address);
                self.line.out.put(frame);
            }
        }
        for address in ended {
            self.deny(&address);
            let reason = "the token has expired";
            self.put(hocuspocus::permission_denied(&address, reason))?;
        }
        Ok(())
    }

    /// Wakes for the next ping, or before that for a token.
    fn plan_waking(&mut self) {
        let tokens = self.documents.values().filter_map(|place| match place {
            Place::Held(held) => Some(held.admitted.until?.min(held.asks_at()?)),
            Place::Pending(_) => None,
        });
        self.wakes_at = tokens.fold(self.pings_at, Instant::min);
    }
}

impl Client for Hocuspocus {
    fn received(&mut self, frame: &Bytes) -> Result<(), Close> {
        self.heard = Instant::now();
        match hocuspocus::parse(frame) {
            Ok(Frame::Ping) => self.put(Bytes::from_static(hocuspocus::PONG)),
            Ok(Frame::Pong) => Ok(()),
            Ok(Frame::Message { address, message }) => self.message(address.0, &message, frame),
            Err(error @ FrameError::TooLarge { .. }) => {
                Err(Close::new(CLOSE_TOO_BIG, error.to_string()))
            }
            Err(error) if error.is_violation() => Err(Close::new(CLOSE_INVALID, error.to_string())),
            Err(error) => {
                tracing::debug!(%error, "a frame was ignored");
                Ok(())
            }
        }
    }

    /// What a client sent for one document ends that document only.
    fn ended(&mut self, connection: ConnectionId, close: Close) -> Option<Close> {
        let is_it = |place: &Place| matches!(place, Place::Held(held) if held.membership.connection == connection);
        let (address, _) = self.documents.iter().find(|(_, place)| is_it(place))?;
        if close.code != CLOSE_POLICY {
            return Some(close);
        }
        let address = address.clone();
        self.documents.remove(&address);
        self.put(hocuspocus::close(&address, &close.reason)).err()
    }

    fn wakes_at(&self) -> Option<Instant> {
        Some(self.wakes_at)
    }

    fn woken(&mut self) -> Option<Close> {
        let now = Instant::now();
        let pinged = if self.pings_at <= now {
            self.ping(now)
        } else {
            Ok(())
        };
        let done = pinged.and_then(|()| self.renew(now));
        self.plan_waking();
        done.err()
    }
}

impl Held {
    /// When to ask for another token; `None` if this one does not end.
    fn asks_at(&self) -> Option<Instant> {
        let until = self.admitted.until?;
        let before_end = until.checked_sub(RENEW_BEFORE).unwrap_or(until);
        let again = self.asked_at.map(|asked| asked + ASK_AGAIN);
        Some(again.map_or(before_end, |again| again.max(before_end)))
    }
}

impl Pending {
    fn bytes(&self) -> usize {
        let bytes = |part: &Option<Bytes>| part.as_ref().map_or(0, Bytes::len);
        bytes(&self.step1) + bytes(&self.awareness)
    }
}
