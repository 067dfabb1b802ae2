//! One socket in its room: what of the document it is sent and when, and the receipts that it is owed.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use collab_core::document::{NO_CLOCKS, NO_EDITS};
use collab_core::ids::ConnectionId;
use collab_core::limits::{
    FRAME_BYTES_MAX, PRESENCE_BYTES_BURST, PRESENCE_BYTES_PER_SECOND_MAX, READER_EDITS_BURST,
    READER_EDITS_PER_SECOND_MAX, SOCKET_QUEUE_BYTES_MAX, UNCOMMITTED_BYTES_MAX, UNSAVED_BYTES_MAX,
};
use collab_core::scan::{self, Novelty};
use collab_core::wire::hocuspocus::Status;
use collab_core::wire::relay::{ToOwner, UpdateKind};
use tokio::time::Instant;
use yrs::updates::decoder::Decode;
use yrs::updates::encoder::Encode;
use yrs::{ClientID, StateVector, diff_updates_v1};

use super::FromSocket;
use crate::edge::family::{Family, Frames, Recent, Shared, Told};
use crate::edge::outbox::Turn;
use crate::edge::pace::Pace;
use crate::edge::{Access, CLOSE_TRY_AGAIN, Close, Line, Visitor};
use crate::queue;

pub(super) struct Socket {
    pub(super) connection: ConnectionId,
    pub(super) visitor: Visitor,
    pub(super) family: Family,
    pub(super) line: Line,
    /// Of its room.
    turn: Arc<Turn>,
    /// It was told to end.
    ended: bool,
    /// The client's state vector, until its whole step 2 is sent.
    pub(super) step1: Option<Bytes>,
    /// What a client that may write had when it began, until that is durable. It may have sent some of it on an earlier
    /// connection, and would take the same bytes for a receipt.
    began_with: Option<StateVector>,
    pub(super) feed: Feed,
    /// Edits that wait for the step 2.
    pub(super) held: Vec<Bytes>,
    held_bytes: usize,
    /// Credit that it does not get back for now.
    withheld: usize,
    /// The document takes no edits for now.
    pub(super) paused: bool,
    /// Steps 1 of the present owner that it was sent and has not answered.
    pub(super) asked: u32,
    /// Answers still to come to earlier owners. They leave out what those had, which may be lost.
    pub(super) asked_before: u32,
    pub(super) sent: u64,
    pub(super) durable: u64,
    /// Changes that were not accepted because it may only read.
    refused: u32,
    owed: VecDeque<Owed>,
    owed_bytes: usize,
    /// Checksums of the updates among what is owed, in the same order.
    echoes: VecDeque<u32>,
    pub(super) awareness: Option<Bytes>,
    pub(super) last_out: Instant,
    /// Edits of a reader that are passed over.
    pub(super) edits_of_reader: Pace<READER_EDITS_PER_SECOND_MAX, READER_EDITS_BURST>,
    /// Bytes of presence.
    pub(super) presence: Pace<PRESENCE_BYTES_PER_SECOND_MAX, PRESENCE_BYTES_BURST>,
    /// Its newest presence came too fast, and goes out at the next look.
    pub(super) presence_waits: bool,
}

/// How edits of others come to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Feed {
    /// They are left out: it has not begun to sync, and its step 2 will have them.
    Early,
    /// After its step 2, which is awaited.
    Held,
    /// They are left out, and the step 2 that is awaited may not have them: another one is needed.
    Missed,
    /// At once.
    Live,
    /// It could not follow. They are left out until all that waits for it is sent; then it gets the difference.
    Behind,
}

/// How much a step 2 has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sync {
    /// All that the client lacks.
    Whole,
    /// What is committed of that; the rest follows.
    Committed,
}

/// What a socket gets once everything up to `number` is durable.
pub(super) struct Owed {
    number: u64,
    receipt: Receipt,
    /// Of the update, which is not saved yet.
    bytes: usize,
    since: Instant,
    holds_credit: bool,
}

pub(super) enum Receipt {
    /// The update itself.
    Echo(Bytes),
    /// The payload that it asked to get back.
    Saved(Bytes),
    /// One change less to count.
    Status,
    /// Nothing.
    Silent,
}

/// An edit on its way to the sockets.
pub(super) struct Edit {
    /// Who sent it.
    except: Option<ConnectionId>,
    pub(super) update: Bytes,
    /// As of [`Socket::echoes`].
    checksum: u32,
    frames: Frames,
}

impl Edit {
    pub(super) fn new(except: Option<ConnectionId>, update: Bytes) -> Self {
        Self {
            except,
            checksum: crc32c::crc32c(&update),
            update,
            frames: Frames::default(),
        }
    }
}

impl Socket {
    pub(super) fn new(
        connection: ConnectionId,
        visitor: Visitor,
        family: Family,
        line: Line,
        turn: Arc<Turn>,
    ) -> Self {
        let now = Instant::now();
        Self {
            connection,
            visitor,
            family,
            line,
            turn,
            ended: false,
            step1: None,
            began_with: None,
            feed: Feed::Early,
            held: Vec::new(),
            held_bytes: 0,
            withheld: 0,
            paused: false,
            asked: 0,
            asked_before: 0,
            sent: 0,
            durable: 0,
            refused: 0,
            owed: VecDeque::new(),
            owed_bytes: 0,
            echoes: VecDeque::new(),
            awareness: None,
            last_out: now,
            edits_of_reader: Pace::new(now),
            presence: Pace::new(now),
            presence_waits: false,
        }
    }

    /// Whether its client has anything of the document.
    pub(super) fn has_content(&self) -> bool {
        let step1 = self.step1.as_deref();
        self.feed == Feed::Live || step1.is_some_and(|state_vector| state_vector != NO_CLOCKS)
    }

    /// What an owner that does not know this socket is to be told.
    pub(super) fn introduction(&self) -> Vec<ToOwner> {
        let connection = self.connection;
        let join = ToOwner::Join {
            connection,
            author: self.visitor.author.to_string(),
        };
        // Who is behind asks when all that waits for it is sent.
        let step1 = self.step1.clone().filter(|_| self.feed != Feed::Behind);
        let step1 = step1.map(|state_vector| ToOwner::Step1 {
            connection,
            state_vector,
        });
        let awareness = self.awareness.clone().map(|payload| ToOwner::Awareness {
            connection,
            payload,
        });
        [Some(join), step1, awareness]
            .into_iter()
            .flatten()
            .collect()
    }

    pub(super) fn tell(&mut self, told: Told<'_>) {
        if let Some(frame) = self.family.frame(told) {
            self.put(frame);
        }
    }

    pub(super) fn tell_shared(&mut self, shared: &mut Shared<'_>) {
        if let Some(frame) = shared.frame(&self.family) {
            self.put(frame);
        }
    }

    pub(super) fn put(&mut self, frame: Bytes) {
        self.last_out = Instant::now();
        self.turn.add(&self.line.out, [frame]);
    }

    pub(super) fn put_all(&mut self, frames: impl IntoIterator<Item = Bytes>) {
        self.last_out = Instant::now();
        self.turn.add(&self.line.out, frames);
    }

    /// Sends frames, unless so many wait that it gets the difference instead. Answers whether it does.
    pub(super) fn offer(&mut self, frames: impl IntoIterator<Item = Bytes>, now: Instant) -> bool {
        let taken = self.turn.offer(&self.line.out, frames);
        if taken {
            self.last_out = now;
        }
        taken
    }

    /// Sends a part of what comes before a step 2.
    pub(super) fn begin_sync(&mut self, update: &Bytes, recent: &mut Recent) {
        // Who is behind asks again.
        if self.feed != Feed::Behind
            && let Some(frame) = recent.frame(&self.family, update, UpdateKind::Update)
        {
            self.put(frame);
        }
    }

    /// Sends a step 2 and what waited for it.
    pub(super) fn sync(&mut self, update: &Bytes, sync: Sync, recent: &mut Recent) {
        if let Some(frame) = recent.frame(&self.family, update, UpdateKind::Step2) {
            self.put(frame);
        }
        match self.feed {
            Feed::Held | Feed::Live => self.feed = Feed::Live,
            // These ask again.
            Feed::Missed => return self.feed = Feed::Held,
            Feed::Early | Feed::Behind => return,
        }
        if sync == Sync::Whole {
            self.step1 = None;
        }
        let held = self.drop_held();
        self.put_all(held);
    }

    /// Keeps an edit until the step 2 is sent, or has it asked for again when there are too many.
    pub(super) fn hold(&mut self, frame: Bytes) {
        if self.feed != Feed::Held {
            return;
        }
        self.held_bytes += frame.len();
        self.held.push(frame);
        if SOCKET_QUEUE_BYTES_MAX < self.held_bytes {
            self.drop_held();
            self.feed = Feed::Missed;
        }
    }

    /// Lets an edit of another client go that is the same as one of its own, or it would take that for its receipt.
    fn let_go(&mut self, update: &Bytes) {
        if self.held.is_empty() {
            return;
        }
        let own = self.family.frame(Told::Update(update));
        self.held.retain(|frame| Some(frame) != own.as_ref());
        self.held_bytes = self.held.iter().map(Bytes::len).sum();
    }

    pub(super) fn drop_held(&mut self) -> Vec<Bytes> {
        self.held_bytes = 0;
        std::mem::take(&mut self.held)
    }

    /// Leaves edits out from here on; `delivered` is what the client has once it has taken what waits for it,
    /// which `room` is told.
    pub(super) fn fall_behind(
        &mut self,
        delivered: &StateVector,
        room: &queue::WeakSender<FromSocket>,
    ) {
        // It may lack part of that, if its whole step 2 is still to come.
        self.step1
            .get_or_insert_with(|| delivered.encode_v1().into());
        self.feed = Feed::Behind;
        if let Some(room) = room.upgrade() {
            self.line.out.tell_when_sent(room, self.connection);
        }
        // All of it may have been sent just now: there must be an end that is seen.
        self.tell(Told::Alive);
    }

    /// The document is read-only for a reason, or is not any more.
    pub(super) fn tell_read_only(&mut self, reason: Option<&str>) {
        match (reason, &self.family) {
            // Its "denied" speaks of the whole document.
            (Some(_), Family::Hocuspocus { .. }) => self.tell(Told::Granted(Access::Read)),
            (Some(reason), _) => self.tell(Told::Denied(reason)),
            (None, _) => {
                self.tell(Told::Granted(self.visitor.access));
                self.admit(self.visitor.clone());
            }
        }
    }

    pub(super) fn kick(&mut self, code: u16, reason: &str) {
        if !std::mem::replace(&mut self.ended, true) {
            let close = Close::new(code, reason);
            self.line.out.end(self.connection, close);
        }
    }

    /// The client begins to sync. One that counts its changes is owed a status for each, and forgets those before.
    pub(super) fn begin(&mut self, state_vector: Bytes, changes: u32) {
        if self.feed == Feed::Early {
            self.feed = Feed::Held;
            let may_write = self.visitor.access == Access::Write;
            if may_write && scan::scan_state_vector(&state_vector).is_ok() {
                self.began_with = StateVector::decode_v1(&state_vector).ok();
            }
        }
        self.step1 = Some(state_vector);
        if let Family::Hocuspocus { .. } = self.family {
            for owed in &mut self.owed {
                if let Receipt::Status = owed.receipt {
                    owed.receipt = Receipt::Silent;
                }
            }
            self.refused = 0;
            // Not before it has answered for the first time: only then all that it has is here.
            self.owe_statuses(self.sent.max(1), changes);
        }
    }

    /// Another token: what was refused comes with the next answer, if it may write now.
    pub(super) fn admit(&mut self, visitor: Visitor) {
        self.visitor = visitor;
        if self.visitor.access == Access::Write {
            let refused = std::mem::take(&mut self.refused);
            self.owe_statuses(self.sent + 1, refused);
        }
    }

    fn owe_statuses(&mut self, number: u64, count: u32) {
        for _ in 0..count {
            if number <= self.durable {
                self.tell(Told::Status(Status::Saved));
            } else {
                self.owed.push_back(Owed {
                    number,
                    receipt: Receipt::Status,
                    bytes: 0,
                    since: Instant::now(),
                    holds_credit: false,
                });
            }
        }
    }

    /// A change that it may not make takes a number, which nothing receipts.
    pub(super) fn refuse_update(&mut self) {
        self.sent += 1;
        self.give_back(1);
        if let Family::Hocuspocus { .. } = self.family {
            self.refused = self.refused.saturating_add(1);
            self.tell(Told::Status(Status::Refused));
        }
    }

    /// Whether an edit is for it. Its own is not; nor are the same bytes of another client, which may have answered with
    /// them too: it would take them for its receipt.
    pub(super) fn wants(&self, edit: &Edit) -> bool {
        let sent =
            |owed: &Owed| matches!(&owed.receipt, Receipt::Echo(sent) if *sent == edit.update);
        Some(self.connection) != edit.except
            && !(self.echoes.contains(&edit.checksum) && self.owed.iter().any(sent))
    }

    /// An edit of somebody else, without what its client had when it began.
    pub(super) fn frame_of(&self, edit: &mut Edit) -> Option<Bytes> {
        if let Some(known) = &self.began_with
            && let Ok(scan) = scan::scan_stored(&edit.update)
        {
            let deletes = match scan.novelty(|client| known.get(&ClientID::new(client))) {
                Novelty::Nothing => return None,
                Novelty::MaybeDeletes => diff_updates_v1(&edit.update, &known.encode_v1()).ok(),
                Novelty::New => None,
            };
            if let Some(deletes) = deletes {
                return self.family.frame(Told::Update(&deletes));
            }
        }
        let told = Told::Update(&edit.update);
        edit.frames.frame(&self.family, told)
    }

    /// Counts an update and notes what is owed for it. Answers its number, unless it answers an owner
    /// that is gone: the present one has asked for the same, and more.
    pub(super) fn take_update(
        &mut self,
        kind: UpdateKind,
        update: &Bytes,
        attached: bool,
    ) -> Option<u64> {
        self.sent += 1;
        let late = kind == UpdateKind::Step2 && 0 < self.asked_before;
        if late {
            self.asked_before -= 1;
        } else if kind == UpdateKind::Step2 {
            self.asked = self.asked.saturating_sub(1);
        }
        let has_edits = update.as_ref() != NO_EDITS && self.visitor.access == Access::Write;
        let bytes = if has_edits { update.len() } else { 0 };
        self.owed_bytes += bytes;
        let holds_credit = attached && !late && self.asked == 0;
        let receipt = self.receipt_for(kind, update);
        if let Receipt::Echo(update) = &receipt {
            self.let_go(update);
            self.echoes.push_back(crc32c::crc32c(update));
        }
        self.owed.push_back(Owed {
            number: self.sent,
            receipt,
            bytes,
            since: Instant::now(),
            holds_credit,
        });
        self.give_back(usize::from(!holds_credit));
        // It goes on sending instead of answering what it was asked.
        if UNSAVED_BYTES_MAX + FRAME_BYTES_MAX < self.owed_bytes {
            self.kick(
                CLOSE_TRY_AGAIN,
                "too much is waiting to be saved; try again",
            );
        }
        (!late).then_some(self.sent)
    }

    fn receipt_for(&self, kind: UpdateKind, update: &Bytes) -> Receipt {
        match (&self.family, kind) {
            _ if self.visitor.access == Access::Read => Receipt::Silent,
            (Family::YWebsocket, UpdateKind::Update) => Receipt::Echo(update.clone()),
            (Family::YWebsocket, UpdateKind::Step2) if update.as_ref() != NO_EDITS => {
                Receipt::Echo(update.clone())
            }
            (Family::Hocuspocus { .. }, UpdateKind::Update) => Receipt::Status,
            _ => Receipt::Silent,
        }
    }

    /// The client wants to know when all it sent is durable; that needs its first answer, too.
    pub(super) fn ask_receipt(&mut self, payload: Bytes) {
        let number = self.sent.max(1);
        if number <= self.durable {
            self.tell(Told::Saved(&payload));
            return;
        }
        // Only the newest counts.
        self.owed
            .retain(|owed| !matches!(owed.receipt, Receipt::Saved(_)) || owed.number < number);
        self.owed.push_back(Owed {
            number,
            receipt: Receipt::Saved(payload),
            bytes: 0,
            since: Instant::now(),
            holds_credit: false,
        });
        if self.family == Family::YSweet {
            // It closes a socket on which it hears nothing for 3 s.
            self.tell(Told::Alive);
        }
    }

    pub(super) fn receipted(&mut self, upto: u64, ack_seconds: &prometheus::Histogram) {
        self.durable = self.durable.max(upto);
        // The first one is for its answer, which has all that it began with.
        self.began_with = None;
        let now = Instant::now();
        let mut frames = Vec::new();
        while let Some(owed) = self.owed.pop_front_if(|owed| owed.number <= self.durable) {
            self.withheld += usize::from(owed.holds_credit);
            if 0 < owed.bytes {
                self.owed_bytes -= owed.bytes;
                ack_seconds.observe(now.duration_since(owed.since).as_secs_f64());
            }
            frames.extend(match owed.receipt {
                Receipt::Echo(update) => {
                    self.echoes.pop_front();
                    self.family.frame(Told::Update(&update))
                }
                Receipt::Saved(payload) => self.family.frame(Told::Saved(&payload)),
                Receipt::Status => self.family.frame(Told::Status(Status::Saved)),
                Receipt::Silent => None,
            });
        }
        if self.owed.is_empty() {
            // Most of the time a client types nothing.
            (self.owed, self.echoes) = Default::default();
        }
        if !frames.is_empty() {
            self.put_all(frames);
        }
        self.give_back(0);
    }

    pub(super) fn release_credit(&mut self) {
        let mut released = 0;
        for owed in self.owed.iter_mut().filter(|owed| owed.holds_credit) {
            owed.holds_credit = false;
            released += 1;
        }
        self.give_back(released);
    }

    pub(super) fn pause(&mut self, paused: bool) {
        self.paused = paused;
        self.give_back(0);
    }

    /// Gives back the right to send updates, unless too many wait for their receipts.
    fn give_back(&mut self, updates: usize) {
        self.withheld += updates;
        let credit = &self.line.credit;
        let stop = self.paused || (UNCOMMITTED_BYTES_MAX < self.owed_bytes && self.asked == 0);
        if !stop {
            credit.add_permits(std::mem::take(&mut self.withheld));
            return;
        }
        // Nobody could join else.
        let keep = usize::from(self.owed.is_empty());
        let had = credit.available_permits();
        if keep < had {
            self.withheld += credit.forget_permits(had - keep);
        } else if had < keep && 0 < self.withheld {
            self.withheld -= 1;
            credit.add_permits(1);
        }
    }
}

impl Drop for Socket {
    /// A room that ends without a word leaves sockets behind, which a reconnect mends. A client that has left hears nothing.
    fn drop(&mut self) {
        // Its other documents may be edited.
        self.line.credit.add_permits(self.withheld);
        self.kick(CLOSE_TRY_AGAIN, "try again");
    }
}
