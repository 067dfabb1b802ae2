//! The sockets of one document on this node, and their common channel to its owner.
//!
//! The room survives its owner: when the channel ends it finds the new owner, tells it what all its
//! sockets have (so that they get what they missed), and lets the owner ask each client for what it
//! lacks. It owns the receipts: per socket it counts the updates and keeps what each is owed until
//! the owner says that everything up to it is durable.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use collab_core::document::{NO_CLOCKS, NO_EDITS};
use collab_core::ids::{ConnectionId, DocumentId, Epoch, Slot};
use collab_core::limits::{
    CONNECTIONS_PER_DOCUMENT_MAX, CONNECTIONS_PER_USER_MAX, FRAME_BYTES_MAX, KEEPALIVE_AFTER,
    PRESENCE_BYTES_BURST, PRESENCE_BYTES_PER_SECOND_MAX, READER_EDITS_BURST,
    READER_EDITS_PER_SECOND_MAX, SOCKET_QUEUE_BYTES_MAX, UNCOMMITTED_BYTES_MAX, UNSAVED_BYTES_MAX,
};
use collab_core::scan::{self, Novelty};
use collab_core::wire::hocuspocus::Status;
use collab_core::wire::relay::{ToEdge, ToOwner, Unavailable, UpdateKind};
use collab_core::wire::y_websocket::Message;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use uuid::Uuid;
use yrs::updates::decoder::Decode;
use yrs::updates::encoder::Encode;
use yrs::{ClientID, StateVector, diff_updates_v1};

use super::family::{Family, Frames, Recent, Shared, Told};
use super::pace::Pace;
use super::{Access, CLOSE_POLICY, CLOSE_TRY_AGAIN, Close, Edge, Line, Visitor};
use crate::documents::{Attachment, EdgeSender};
use crate::peers::RemoteChannel;
use crate::queue;

/// Before an owner that did not answer, or is not one yet, is tried again.
const RETRY: Duration = Duration::from_millis(50);
/// A map that was read after this time knows what an owner knew.
const MAP_OLD_AFTER: Duration = Duration::from_secs(1);
/// Before a document that cannot be served is tried again.
const RETRY_UNAVAILABLE: Duration = Duration::from_secs(1);
/// Messages of the owner, or of sockets, that are taken before others have their turn.
const MESSAGES_PER_TURN: usize = 128;
/// A larger edit does not wait for the end of its turn.
const GATHERED_BYTES_MAX: usize = 4096;
/// Between two looks for quiet sockets, and for an empty room.
const TICK: Duration = Duration::from_secs(5);

/// What a socket brings to its room.
#[derive(Debug)]
pub(super) enum FromSocket {
    Join {
        connection: ConnectionId,
        visitor: Visitor,
        family: Family,
        line: Line,
    },
    /// The same socket may now do something else, or is somebody else's.
    Admit {
        connection: ConnectionId,
        visitor: Visitor,
    },
    Leave {
        connection: ConnectionId,
    },
    /// Everything that waited for the socket is sent.
    Drained {
        connection: ConnectionId,
    },
    Step1 {
        connection: ConnectionId,
        state_vector: Bytes,
        /// Changes that the client has counted and that were not passed on, the beginning itself among them.
        changes: u32,
    },
    Update {
        connection: ConnectionId,
        kind: UpdateKind,
        update: Bytes,
    },
    Awareness {
        connection: ConnectionId,
        payload: Bytes,
    },
    QueryAwareness {
        connection: ConnectionId,
    },
    Saved {
        connection: ConnectionId,
        payload: Bytes,
    },
    Stateless {
        connection: ConnectionId,
        payload: Bytes,
    },
}

impl FromSocket {
    fn connection(&self) -> ConnectionId {
        match self {
            Self::Join { connection, .. }
            | Self::Admit { connection, .. }
            | Self::Leave { connection }
            | Self::Drained { connection }
            | Self::Step1 { connection, .. }
            | Self::Update { connection, .. }
            | Self::Awareness { connection, .. }
            | Self::QueryAwareness { connection }
            | Self::Saved { connection, .. }
            | Self::Stateless { connection, .. } => *connection,
        }
    }

    /// A client's message, sharing the memory of its frame; `None` for one that only servers send.
    pub(super) fn of(
        connection: ConnectionId,
        message: &Message<'_>,
        frame: &Bytes,
    ) -> Option<Self> {
        let shared = |part: &[u8]| frame.slice_ref(part);
        Some(match message {
            Message::SyncStep1 { state_vector } => Self::Step1 {
                connection,
                state_vector: shared(state_vector),
                changes: 1,
            },
            Message::SyncStep2 { update } => Self::Update {
                connection,
                kind: UpdateKind::Step2,
                update: shared(update),
            },
            Message::Update { update } => Self::Update {
                connection,
                kind: UpdateKind::Update,
                update: shared(update),
            },
            Message::Awareness(awareness) => Self::Awareness {
                connection,
                payload: shared(awareness.payload()),
            },
            Message::QueryAwareness => Self::QueryAwareness { connection },
            Message::Saved { payload } => Self::Saved {
                connection,
                payload: shared(payload),
            },
            Message::PermissionDenied { .. } => return None,
        })
    }
}

/// One room.
pub(super) struct Room {
    edge: Arc<Edge>,
    document: DocumentId,
    slot: Slot,
    id: u64,
    inputs: queue::Receiver<FromSocket>,
    own_inputs: queue::WeakSender<FromSocket>,
    /// Boxed: a tree makes room for eleven at once, and most documents have few.
    sockets: BTreeMap<ConnectionId, Box<Socket>>,
    upstream: Option<Upstream>,
    retry_at: Instant,
    /// An owner of an earlier epoch is none any more, whatever the map still shows; for a while, since who said so may have
    /// spoken of another slot of a document that was pinned.
    least_epoch: (Epoch, Instant),
    /// Edits of this turn that the sockets are still to be sent.
    edits: Vec<Edit>,
    /// What newcomers were sent a moment ago.
    recent: Recent,
    /// What every synced socket has.
    delivered: StateVector,
    /// Edits that wait until the catch-up is here: without it they have holes before them.
    catching_up: Option<Vec<(Option<ConnectionId>, Bytes)>>,
    /// Why the document is not served, if it is not.
    denied: Option<String>,
    /// It was deleted, and has not begun another life.
    deleted: bool,
    /// Sockets of clients that have what was deleted. They stay denied: in another life of the document
    /// they would bring it back.
    outlived: BTreeMap<ConnectionId, Box<Socket>>,
    /// Why edits are refused, if they are; of the present owner, and of the one that is about to answer.
    read_only: Option<String>,
    coming_read_only: Option<String>,
    /// Too much waits for its commit.
    paused: bool,
    empty_since: Instant,
    /// The document was closed while there was no socket: it is opened again for the next.
    resting: bool,
}

/// An edit on its way to the sockets.
struct Edit {
    /// Who sent it.
    except: Option<ConnectionId>,
    update: Bytes,
    /// As of [`Socket::echoes`].
    checksum: u32,
    frames: Frames,
}

/// The channel to the owner.
struct Upstream {
    to: ToOwnerSender,
    from: queue::Receiver<ToEdge>,
    owner: Uuid,
    epoch: Epoch,
    /// The owner's state vector, which the catch-up brings every socket to.
    state_vector: StateVector,
}

enum ToOwnerSender {
    Local(Attachment),
    Remote(RemoteChannel),
}

impl ToOwnerSender {
    fn send(&self, message: ToOwner) {
        // A channel that has ended says so on its other half.
        match self {
            Self::Local(attachment) => {
                attachment.send(message);
            }
            Self::Remote(channel) => channel.send(&message),
        }
    }
}

struct Socket {
    connection: ConnectionId,
    visitor: Visitor,
    family: Family,
    line: Line,
    /// It was told to end.
    ended: bool,
    /// The client's state vector, until its whole step 2 is sent.
    step1: Option<Bytes>,
    /// What a client that may write had when it began, until that is durable. It may have sent some of it on an earlier
    /// connection, and would take the same bytes for a receipt.
    began_with: Option<StateVector>,
    feed: Feed,
    /// Edits that wait for the step 2.
    held: Vec<Bytes>,
    held_bytes: usize,
    /// Credit that it does not get back for now.
    withheld: usize,
    /// The document takes no edits for now.
    paused: bool,
    /// Steps 1 of the present owner that it was sent and has not answered.
    asked: u32,
    /// Answers still to come to earlier owners. They leave out what those had, which may be lost.
    asked_before: u32,
    sent: u64,
    durable: u64,
    /// Changes that were not accepted because it may only read.
    refused: u32,
    owed: VecDeque<Owed>,
    owed_bytes: usize,
    /// Checksums of the updates among what is owed, in the same order.
    echoes: VecDeque<u32>,
    awareness: Option<Bytes>,
    last_out: Instant,
    /// Edits of a reader that are passed over.
    edits_of_reader: Pace,
    /// Bytes of presence.
    presence: Pace,
    /// Its newest presence came too fast, and goes out at the next look.
    presence_waits: bool,
}

/// How edits of others come to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Feed {
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
enum Sync {
    /// All that the client lacks.
    Whole,
    /// What is committed of that; the rest follows.
    Committed,
}

/// What a socket gets once everything up to `number` is durable.
struct Owed {
    number: u64,
    receipt: Receipt,
    /// Of the update, which is not saved yet.
    bytes: usize,
    since: Instant,
    holds_credit: bool,
}

enum Receipt {
    /// The update itself.
    Echo(Bytes),
    /// The payload that it asked to get back.
    Saved(Bytes),
    /// One change less to count.
    Status,
    /// Nothing.
    Silent,
}

impl Room {
    pub(super) fn new(
        edge: Arc<Edge>,
        document: DocumentId,
        id: u64,
        inputs: queue::Receiver<FromSocket>,
        own_inputs: queue::WeakSender<FromSocket>,
    ) -> Self {
        let slot = edge.members.slot_of(&document);
        Self {
            edge,
            document,
            slot,
            id,
            inputs,
            own_inputs,
            sockets: BTreeMap::new(),
            upstream: None,
            retry_at: Instant::now(),
            least_epoch: (Epoch(0), Instant::now()),
            edits: Vec::new(),
            recent: Recent::default(),
            delivered: StateVector::default(),
            catching_up: None,
            denied: None,
            deleted: false,
            outlived: BTreeMap::new(),
            read_only: None,
            coming_read_only: None,
            paused: false,
            empty_since: Instant::now(),
            resting: false,
        }
    }

    pub(super) async fn run(mut self: Box<Self>) {
        let mut map = self.edge.members.watch();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let is_wanted = self.upstream.is_none() && !self.resting;
            if is_wanted && self.retry_at <= Instant::now() {
                self.attach();
            }
            let retry_at = self.retry_at;
            tokio::select! {
                biased;
                message = next(&mut self.upstream) => match message {
                    Some(message) => {
                        self.owner_says(message);
                        self.owner_goes_on();
                    }
                    None => self.detach(RETRY),
                },
                input = self.inputs.recv() => match input {
                    Some(input) => {
                        self.socket_says(input);
                        for _ in 1..MESSAGES_PER_TURN {
                            let Ok(input) = self.inputs.try_recv() else { break };
                            self.socket_says(input);
                        }
                    }
                    None => return,
                },
                () = map.changed() => self.map_changed(),
                () = sleep_until(retry_at), if is_wanted && self.upstream.is_none() => {}
                _ = tick.tick() => {
                    self.keep_alive();
                    self.recent.clear();
                    self.send_late_presence();
                    let empty = self.sockets.is_empty() && self.outlived.is_empty() && TICK <= self.empty_since.elapsed();
                    if empty && self.edge.leave_table(&self.document, self.id, &self.inputs) {
                        return;
                    }
                }
            }
        }
    }

    /// Opens the channel to the owner that the map shows, and brings every socket along.
    fn attach(&mut self) {
        self.retry_at = Instant::now() + RETRY;
        let Some(owner) = self.edge.members.map().owner(self.slot) else {
            return;
        };
        let (least_epoch, until) = self.least_epoch;
        if owner.epoch < least_epoch && Instant::now() < until {
            self.edge.members.look_now();
            return;
        }
        // The others get a step 2 of their own.
        let synced = self
            .sockets
            .values()
            .any(|socket| socket.feed == Feed::Live && socket.step1.is_none());
        let since = if synced {
            self.delivered.encode_v1().into()
        } else {
            Bytes::new()
        };
        self.catching_up = synced.then(Vec::new);
        let (to, from) = if owner.incarnation == self.edge.members.incarnation() {
            let (sender, from) = queue::unbounded();
            let attachment =
                self.edge
                    .documents
                    .attach(&self.document, since, EdgeSender::Local(sender));
            (ToOwnerSender::Local(attachment), from)
        } else if owner.address.is_empty() {
            return;
        } else {
            let (channel, from) = self.edge.peers.open(
                owner.incarnation,
                &owner.address,
                self.document.clone(),
                since,
            );
            (ToOwnerSender::Remote(channel), from)
        };
        for socket in self.sockets.values() {
            for message in socket.introduction() {
                to.send(message);
            }
        }
        let (owner, epoch) = (owner.incarnation, owner.epoch);
        self.upstream = Some(Upstream {
            to,
            from,
            owner,
            epoch,
            state_vector: StateVector::default(),
        });
    }

    /// The channel is no more; what was sent on it and not receipted is in the clients, which will be asked.
    fn detach(&mut self, pause: Duration) {
        self.upstream = None;
        self.resting = self.sockets.is_empty() && self.outlived.is_empty();
        self.catching_up = None;
        self.retry_at = Instant::now() + pause;
        self.edge.members.look_now();
        self.coming_read_only = None;
        self.paused = false;
        for socket in self.sockets.values_mut() {
            socket.drop_held();
            if socket.feed == Feed::Missed {
                socket.feed = Feed::Held;
            }
            socket.asked_before += std::mem::take(&mut socket.asked);
            socket.release_credit();
            socket.pause(false);
        }
    }

    fn map_changed(&mut self) {
        let slot = self.edge.members.slot_of(&self.document);
        if std::mem::replace(&mut self.slot, slot) != slot {
            self.least_epoch = (Epoch(0), Instant::now());
            if self.upstream.is_some() {
                self.detach(Duration::ZERO);
            }
        }
        let owner = self.edge.members.map().owner(self.slot);
        let moved = match (&self.upstream, &owner) {
            (Some(upstream), Some(owner)) => {
                upstream.owner != owner.incarnation && upstream.epoch < owner.epoch
            }
            (None, Some(_)) => self.denied.is_none(),
            (_, None) => false,
        };
        if moved {
            if self.upstream.is_some() {
                self.detach(Duration::ZERO);
            }
            self.retry_at = Instant::now();
        }
    }

    /// Takes what the owner has said by now. Each socket is given all edits in it together.
    fn owner_goes_on(&mut self) {
        for _ in 1..MESSAGES_PER_TURN {
            let Some(upstream) = &mut self.upstream else {
                break;
            };
            let Ok(message) = upstream.from.try_recv() else {
                break;
            };
            self.owner_says(message);
        }
        self.pass_on();
    }

    fn owner_says(&mut self, message: ToEdge) {
        if !matches!(message, ToEdge::FanOut { .. }) {
            // It comes after them.
            self.pass_on();
        }
        match message {
            ToEdge::Attached { state_vector, .. } => {
                self.served();
                self.set_read_only();
                let state_vector = StateVector::decode_v1(&state_vector).unwrap_or_default();
                if self.catching_up.is_none() {
                    self.delivered.merge(state_vector);
                } else if let Some(upstream) = &mut self.upstream {
                    upstream.state_vector = state_vector;
                }
            }
            ToEdge::CatchUp { update } => self.caught_up(&update),
            ToEdge::FanOut { except, update } => match &mut self.catching_up {
                Some(waiting) => waiting.push((except, update)),
                None => self.fan_out(except, update),
            },
            ToEdge::Presence { payload } => {
                let mut shared = Shared::new(Told::Presence(&payload));
                let following = self.sockets.values_mut();
                for socket in following.filter(|socket| socket.feed != Feed::Behind) {
                    socket.tell_shared(&mut shared);
                }
            }
            ToEdge::PresenceTo {
                connection,
                payload,
            } => self.with(connection, |socket| socket.tell(Told::Presence(&payload))),
            ToEdge::Stateless { except, payload } => {
                self.tell_all(except, Told::Stateless(&payload));
            }
            ToEdge::Step1 {
                connection,
                state_vector,
            } => self.with(connection, |socket| {
                socket.asked += 1;
                // The answer is behind what the client has sent already: read on to get to it.
                socket.release_credit();
                socket.tell(Told::Step1(&state_vector));
            }),
            ToEdge::Part { connection, update } => {
                self.served();
                if let Some(socket) = self.sockets.get_mut(&connection) {
                    socket.begin_sync(&update, &mut self.recent);
                }
            }
            ToEdge::Step2 { connection, update } => {
                self.sync(connection, &update, Sync::Whole);
                self.ask_again(connection);
            }
            ToEdge::CommittedStep2 { connection, update } => {
                self.sync(connection, &update, Sync::Committed);
            }
            ToEdge::Pause | ToEdge::Resume => {
                self.paused = message == ToEdge::Pause;
                for socket in self.sockets.values_mut() {
                    socket.pause(self.paused);
                }
            }
            ToEdge::ReadOnly { reason } => self.coming_read_only = Some(reason),
            ToEdge::Receipt { connection, upto } => {
                let ack_seconds = self.edge.metrics.ack_seconds.clone();
                self.with(connection, |socket| socket.receipted(upto, &ack_seconds));
            }
            ToEdge::Refused { connection, reason } => {
                tracing::info!(document.id = %self.document, reason, "a socket is closed for what it sent");
                self.with(connection, |socket| socket.kick(CLOSE_POLICY, &reason));
            }
            ToEdge::Moved { epoch } => {
                let (least_epoch, _) = self.least_epoch;
                self.least_epoch = (least_epoch.max(epoch), Instant::now() + MAP_OLD_AFTER);
                self.detach(RETRY);
            }
            // Answers a question of this node's handoffs, which have channels of their own.
            ToEdge::Preloaded | ToEdge::Map { .. } => {}
            ToEdge::Unavailable { cause, reason } => {
                let pause = if cause == Unavailable::Store {
                    RETRY
                } else {
                    RETRY_UNAVAILABLE
                };
                self.detach(pause);
                if cause == Unavailable::Full {
                    self.send_away(&reason);
                }
                if cause != Unavailable::Store {
                    self.deny(reason);
                }
                if cause == Unavailable::Deleted {
                    self.deleted = true;
                    let has_content =
                        |_: &ConnectionId, socket: &mut Box<Socket>| socket.has_content();
                    self.outlived
                        .extend(self.sockets.extract_if(.., has_content));
                }
            }
        }
    }

    /// Tells clients that they may not have the document, and keeps their sockets: a stock client
    /// would come back at once after any close.
    fn deny(&mut self, reason: String) {
        if self.denied.as_ref() == Some(&reason) {
            return;
        }
        self.tell_all(None, Told::Denied(&reason));
        self.denied = Some(reason);
        self.delivered = StateVector::default();
    }

    /// Closes the sockets that are for this document alone: their clients come back, maybe when there is room.
    fn send_away(&mut self, reason: &str) {
        for socket in self.sockets.values_mut() {
            if !matches!(socket.family, Family::Hocuspocus { .. }) {
                socket.kick(CLOSE_TRY_AGAIN, reason);
            }
        }
    }

    /// The document is there. Newcomers may get what is stored of it before it is open.
    fn served(&mut self) {
        self.deleted = false;
        if self.denied.take().is_some() {
            for socket in self.sockets.values_mut() {
                let access = socket.visitor.access;
                socket.tell(Told::Granted(access));
            }
        }
    }

    fn sync(&mut self, connection: ConnectionId, update: &Bytes, sync: Sync) {
        self.served();
        if let Some(socket) = self.sockets.get_mut(&connection) {
            socket.sync(update, sync, &mut self.recent);
        }
    }

    /// Tells clients that their edits are refused, or are not any more.
    fn set_read_only(&mut self) {
        let coming = self.coming_read_only.take();
        if self.read_only != coming {
            for socket in self.sockets.values_mut() {
                socket.tell_read_only(coming.as_deref());
            }
            self.read_only = coming;
        }
    }

    fn caught_up(&mut self, update: &Bytes) {
        let mut shared = Shared::new(Told::Update(update));
        for socket in self.sockets.values_mut() {
            if socket.feed == Feed::Live {
                socket.tell_shared(&mut shared);
            }
        }
        if let Some(upstream) = &mut self.upstream {
            self.delivered
                .merge(std::mem::take(&mut upstream.state_vector));
        }
        for (except, update) in self.catching_up.take().unwrap_or_default() {
            self.fan_out(except, update);
        }
    }

    fn fan_out(&mut self, except: Option<ConnectionId>, update: Bytes) {
        let is_large = GATHERED_BYTES_MAX < update.len();
        self.edits.push(Edit::new(except, update));
        if is_large {
            self.pass_on();
        }
    }

    /// Gives the sockets the edits that were gathered.
    fn pass_on(&mut self) {
        if self.edits.is_empty() {
            return;
        }
        let mut edits = std::mem::take(&mut self.edits);
        let mut frames = Vec::with_capacity(edits.len());
        for socket in self.sockets.values_mut() {
            if matches!(socket.feed, Feed::Early | Feed::Missed | Feed::Behind) {
                continue;
            }
            for edit in &mut edits {
                if socket.wants(edit) {
                    frames.extend(socket.frame_of(edit));
                }
            }
            if frames.is_empty() {
                continue;
            }
            if socket.feed == Feed::Held {
                for frame in frames.drain(..) {
                    socket.hold(frame);
                }
            } else if socket.line.out.is_full() {
                frames.clear();
                self.edge.metrics.sockets_behind.inc();
                socket.fall_behind(&self.delivered, &self.own_inputs);
            } else {
                socket.put_all(frames.drain(..));
            }
        }
        for edit in edits {
            if let Ok(scan) = scan::scan_stored(&edit.update) {
                for (client, end) in scan.client_ends() {
                    self.delivered.set_max(ClientID::new(client), end);
                }
            }
        }
    }

    /// A socket that has taken all that it was sent gets what it was not sent.
    fn drained(&mut self, connection: ConnectionId) {
        if let Some(socket) = self.sockets.get_mut(&connection)
            && socket.feed == Feed::Behind
        {
            socket.feed = Feed::Held;
            self.ask_again(connection);
            self.to_owner(ToOwner::QueryAwareness { connection });
        }
    }

    /// Asks for a step 2 if edits were left out.
    fn ask_again(&mut self, connection: ConnectionId) {
        if let Some(socket) = self.sockets.get(&connection)
            && socket.feed == Feed::Held
            && let Some(state_vector) = socket.step1.clone()
        {
            self.to_owner(ToOwner::Step1 {
                connection,
                state_vector,
            });
        }
    }

    fn socket_says(&mut self, input: FromSocket) {
        if self.outlived.contains_key(&input.connection()) {
            self.outlived_says(&input);
            return;
        }
        match input {
            FromSocket::Join {
                connection,
                visitor,
                family,
                line,
            } => self.join(Box::new(Socket::new(connection, visitor, family, line))),
            FromSocket::Admit {
                connection,
                visitor,
            } => {
                let Some(socket) = self.sockets.get_mut(&connection) else {
                    return;
                };
                socket.admit(visitor);
                for message in socket.introduction() {
                    self.to_owner(message);
                }
            }
            FromSocket::Leave { connection } => {
                self.sockets.remove(&connection);
                self.empty_since = Instant::now();
                self.to_owner(ToOwner::Leave { connection });
            }
            FromSocket::Drained { connection } => self.drained(connection),
            FromSocket::Step1 {
                connection,
                state_vector,
                changes,
            } => {
                self.with(connection, |socket| {
                    socket.begin(state_vector.clone(), changes);
                });
                if self.deleted && state_vector.as_ref() != NO_CLOCKS {
                    // It was offline when the document was deleted.
                    self.outlived.extend(self.sockets.remove_entry(&connection));
                    return;
                }
                self.to_owner(ToOwner::Step1 {
                    connection,
                    state_vector,
                });
            }
            FromSocket::Update {
                connection,
                kind,
                update,
            } => self.update(connection, kind, update),
            FromSocket::Awareness {
                connection,
                payload,
            } => self.present(connection, payload),
            FromSocket::QueryAwareness { connection } => {
                self.to_owner(ToOwner::QueryAwareness { connection });
            }
            FromSocket::Saved {
                connection,
                payload,
            } => {
                self.with(connection, |socket| socket.ask_receipt(payload));
            }
            FromSocket::Stateless {
                connection,
                payload,
            } => {
                let sender = self.sockets.get(&connection);
                if sender.is_some_and(|socket| socket.visitor.access == Access::Write) {
                    self.to_owner(ToOwner::Stateless {
                        connection,
                        payload,
                    });
                }
            }
        }
    }

    fn join(&mut self, mut socket: Box<Socket>) {
        self.resting = false;
        if let Some(reason) = self.full_for(&socket.visitor) {
            socket.kick(CLOSE_TRY_AGAIN, reason);
            return;
        }
        socket.pause(self.paused);
        for message in socket.introduction() {
            self.to_owner(message);
        }
        if let Some(reason) = &self.denied {
            socket.tell(Told::Denied(reason));
        }
        if let Some(reason) = &self.read_only {
            socket.tell_read_only(Some(reason));
        }
        self.sockets.insert(socket.connection, socket);
    }

    /// Only the newest presence counts: what comes too fast is left out, but for the last of it.
    fn present(&mut self, connection: ConnectionId, payload: Bytes) {
        let Some(socket) = self.sockets.get_mut(&connection) else {
            return;
        };
        // The frame that it lies in may hold much more memory.
        socket.awareness = Some(Bytes::copy_from_slice(&payload));
        let bytes = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        socket.presence_waits = !socket.presence.take(bytes, Instant::now());
        if !socket.presence_waits {
            self.to_owner(ToOwner::Awareness {
                connection,
                payload,
            });
        }
    }

    /// Such a client is kept alive, and told nothing.
    fn outlived_says(&mut self, input: &FromSocket) {
        let connection = input.connection();
        let Some(socket) = self.outlived.get_mut(&connection) else {
            return;
        };
        match input {
            FromSocket::Leave { .. } => {
                self.outlived.remove(&connection);
                self.empty_since = Instant::now();
            }
            FromSocket::Update { .. } => socket.refuse_update(),
            FromSocket::Saved { payload, .. } => socket.ask_receipt(payload.clone()),
            _ => {}
        }
    }

    /// Why there is no room for one more socket of this visitor.
    fn full_for(&self, visitor: &Visitor) -> Option<&'static str> {
        if CONNECTIONS_PER_DOCUMENT_MAX <= self.sockets.len() {
            return Some("this document has as many connections as it may have; try again");
        }
        let authors = self.sockets.values().map(|socket| &socket.visitor.author);
        let of_user = authors
            .filter(|author| **author == visitor.author)
            .take(CONNECTIONS_PER_USER_MAX);
        (!visitor.author.is_empty() && of_user.count() == CONNECTIONS_PER_USER_MAX).then_some(
            "this user has as many connections to the document as it may have; try again",
        )
    }

    fn update(&mut self, connection: ConnectionId, kind: UpdateKind, update: Bytes) {
        let attached = self.upstream.is_some();
        let Some(socket) = self.sockets.get_mut(&connection) else {
            return;
        };
        let access = socket.visitor.access;
        let refused = match (access, &self.read_only) {
            (Access::Read, _) => Some("read_only"),
            (Access::Write, Some(_)) => Some("degraded"),
            (Access::Write, None) => None,
        };
        // An answer to the owner may add nothing, which is a receipt for what the client has.
        if let Some(reason) = refused
            && kind == UpdateKind::Update
        {
            socket.refuse_update();
            if access == Access::Read && !socket.edits_of_reader.take(1, Instant::now()) {
                socket.kick(CLOSE_POLICY, "this token is for reading only");
            }
            let refused = &self.edge.metrics.updates_refused;
            refused.with_label_values(&[reason]).inc();
            return;
        }
        let Some(number) = socket.take_update(kind, &update, attached) else {
            return;
        };
        self.to_owner(match access {
            Access::Write => ToOwner::Update {
                connection,
                number,
                kind,
                update,
            },
            Access::Read => ToOwner::Compare {
                connection,
                number,
                update,
            },
        });
    }

    fn tell_all(&mut self, except: Option<ConnectionId>, told: Told<'_>) {
        let mut shared = Shared::new(told);
        for (connection, socket) in &mut self.sockets {
            if Some(*connection) != except {
                socket.tell_shared(&mut shared);
            }
        }
    }

    fn to_owner(&self, message: ToOwner) {
        if let Some(upstream) = &self.upstream {
            upstream.to.send(message);
        }
    }

    fn with(&mut self, connection: ConnectionId, act: impl FnOnce(&mut Socket)) {
        // It may have left while this was on its way.
        if let Some(socket) = self.sockets.get_mut(&connection) {
            act(socket);
        }
    }

    fn keep_alive(&mut self) {
        for socket in self.sockets.values_mut().chain(self.outlived.values_mut()) {
            if KEEPALIVE_AFTER <= socket.last_out.elapsed() {
                socket.tell(Told::Alive);
            }
        }
    }

    /// Sends the presence that came too fast for its like to follow at once: the newest of each socket.
    fn send_late_presence(&mut self) {
        let late: Vec<_> = self
            .sockets
            .values_mut()
            .filter_map(|socket| {
                let waits = std::mem::take(&mut socket.presence_waits);
                let payload = socket.awareness.clone().filter(|_| waits)?;
                Some((socket.connection, payload))
            })
            .collect();
        for (connection, payload) in late {
            self.to_owner(ToOwner::Awareness {
                connection,
                payload,
            });
        }
    }
}

impl Edit {
    fn new(except: Option<ConnectionId>, update: Bytes) -> Self {
        Self {
            except,
            checksum: crc32c::crc32c(&update),
            update,
            frames: Frames::default(),
        }
    }
}

impl Socket {
    fn new(connection: ConnectionId, visitor: Visitor, family: Family, line: Line) -> Self {
        let now = Instant::now();
        Self {
            connection,
            visitor,
            family,
            line,
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
            edits_of_reader: Pace::new(READER_EDITS_PER_SECOND_MAX, READER_EDITS_BURST, now),
            presence: Pace::new(PRESENCE_BYTES_PER_SECOND_MAX, PRESENCE_BYTES_BURST, now),
            presence_waits: false,
        }
    }

    /// Whether its client has anything of the document.
    fn has_content(&self) -> bool {
        let step1 = self.step1.as_deref();
        self.feed == Feed::Live || step1.is_some_and(|state_vector| state_vector != NO_CLOCKS)
    }

    /// What an owner that does not know this socket is to be told.
    fn introduction(&self) -> Vec<ToOwner> {
        let connection = self.connection;
        let join = ToOwner::Join {
            connection,
            author: self.visitor.author.clone(),
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

    fn tell(&mut self, told: Told<'_>) {
        if let Some(frame) = self.family.frame(told) {
            self.put(frame);
        }
    }

    fn tell_shared(&mut self, shared: &mut Shared<'_>) {
        if let Some(frame) = shared.frame(&self.family) {
            self.put(frame);
        }
    }

    fn put(&mut self, frame: Bytes) {
        self.last_out = Instant::now();
        self.line.out.put(frame);
    }

    fn put_all(&mut self, frames: impl IntoIterator<Item = Bytes>) {
        self.last_out = Instant::now();
        self.line.out.put_all(frames);
    }

    /// Sends a part of what comes before a step 2.
    fn begin_sync(&mut self, update: &Bytes, recent: &mut Recent) {
        // Who is behind asks again.
        if self.feed != Feed::Behind
            && let Some(frame) = recent.frame(&self.family, update, UpdateKind::Update)
        {
            self.put(frame);
        }
    }

    /// Sends a step 2 and what waited for it.
    fn sync(&mut self, update: &Bytes, sync: Sync, recent: &mut Recent) {
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
    fn hold(&mut self, frame: Bytes) {
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

    fn drop_held(&mut self) -> Vec<Bytes> {
        self.held_bytes = 0;
        std::mem::take(&mut self.held)
    }

    /// Leaves edits out from here on; `delivered` is what the client has once it has taken what waits for it,
    /// which `room` is told.
    fn fall_behind(&mut self, delivered: &StateVector, room: &queue::WeakSender<FromSocket>) {
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
    fn tell_read_only(&mut self, reason: Option<&str>) {
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

    fn kick(&mut self, code: u16, reason: &str) {
        if !std::mem::replace(&mut self.ended, true) {
            let close = Close::new(code, reason);
            self.line.out.end(self.connection, close);
        }
    }

    /// The client begins to sync. One that counts its changes is owed a status for each, and forgets those before.
    fn begin(&mut self, state_vector: Bytes, changes: u32) {
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
    fn admit(&mut self, visitor: Visitor) {
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
    fn refuse_update(&mut self) {
        self.sent += 1;
        self.give_back(1);
        if let Family::Hocuspocus { .. } = self.family {
            self.refused = self.refused.saturating_add(1);
            self.tell(Told::Status(Status::Refused));
        }
    }

    /// Whether an edit is for it. Its own is not; nor are the same bytes of another client, which may have answered with
    /// them too: it would take them for its receipt.
    fn wants(&self, edit: &Edit) -> bool {
        let sent =
            |owed: &Owed| matches!(&owed.receipt, Receipt::Echo(sent) if *sent == edit.update);
        Some(self.connection) != edit.except
            && !(self.echoes.contains(&edit.checksum) && self.owed.iter().any(sent))
    }

    /// An edit of somebody else, without what its client had when it began.
    fn frame_of(&self, edit: &mut Edit) -> Option<Bytes> {
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
    fn take_update(&mut self, kind: UpdateKind, update: &Bytes, attached: bool) -> Option<u64> {
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
    fn ask_receipt(&mut self, payload: Bytes) {
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

    fn receipted(&mut self, upto: u64, ack_seconds: &prometheus::Histogram) {
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
        if !frames.is_empty() {
            self.put_all(frames);
        }
        self.give_back(0);
    }

    fn release_credit(&mut self) {
        let mut released = 0;
        for owed in self.owed.iter_mut().filter(|owed| owed.holds_credit) {
            owed.holds_credit = false;
            released += 1;
        }
        self.give_back(released);
    }

    fn pause(&mut self, paused: bool) {
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

/// The next message of the owner; waits for ever without one.
async fn next(upstream: &mut Option<Upstream>) -> Option<ToEdge> {
    match upstream {
        Some(upstream) => upstream.from.recv().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use collab_core::wire::{hocuspocus, y_sweet, y_websocket};
    use futures::FutureExt;
    use tokio::sync::Semaphore;
    use yrs::{Doc, ReadTxn, Text, Transact, TransactionMut};

    use super::super::outbox::{Outbox, Taken, Taker};
    use super::*;

    #[test]
    fn an_answer_to_an_owner_that_is_gone_is_not_taken_for_one_to_the_present_owner() {
        let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
        let answer = Bytes::from_static(&[1, 1, 1, 0, 0]);
        socket.asked = 1;
        // The owner goes before the answer is here, and the next one asks too.
        socket.asked_before += std::mem::take(&mut socket.asked);
        socket.asked += 1;
        assert_eq!(socket.take_update(UpdateKind::Step2, &answer, true), None);
        assert_eq!(
            socket.take_update(UpdateKind::Step2, &answer, true),
            Some(2)
        );
        assert_eq!((socket.asked, socket.asked_before), (0, 0));
    }

    #[test]
    fn a_socket_gets_what_it_is_owed_once_and_in_order() {
        let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
        for byte in 1..=3 {
            socket.take_update(UpdateKind::Update, &update(byte), true);
        }
        socket.ask_receipt(Bytes::from_static(b"\x01\x03"));
        let sent = || std::iter::from_fn(|| queue.try_take()).collect::<Vec<_>>();
        socket.receipted(2, &seconds());
        assert_eq!(
            sent(),
            [
                y_websocket::update(&update(1)),
                y_websocket::update(&update(2))
            ]
        );
        socket.receipted(2, &seconds());
        assert!(sent().is_empty());
        socket.receipted(3, &seconds());
        assert_eq!(
            sent(),
            [y_websocket::update(&update(3)), y_sweet::saved(b"\x01\x03")]
        );
    }

    /// Another tab of the same browser has the edit, too, and its answer was faster.
    #[test]
    fn the_same_bytes_of_another_client_do_not_pass_for_a_receipt() {
        let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
        for byte in 1..=2 {
            let told = Told::Update(&update(byte));
            socket.hold(socket.family.frame(told).expect("it is told of edits"));
        }
        socket.take_update(UpdateKind::Update, &update(1), true);
        let others = Edit::new(Some(ConnectionId(8)), update(1));
        assert!(!socket.wants(&others), "from now on they are kept from it");
        let state = Bytes::from_static(b"state");
        socket.sync(&state, Sync::Whole, &mut Recent::default());
        let sent = || std::iter::from_fn(|| queue.try_take()).collect::<Vec<_>>();
        assert_eq!(
            sent(),
            [
                y_websocket::sync_step2(&state),
                y_websocket::update(&update(2))
            ]
        );
        socket.receipted(1, &seconds());
        assert_eq!(sent(), [y_websocket::update(&update(1))]);
    }

    #[test]
    fn a_socket_wants_neither_its_own_edit_nor_the_same_bytes_of_another_before_its_receipt() {
        let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
        let edit = |except, byte| Edit::new(except, update(byte));
        assert!(!socket.wants(&edit(Some(CONNECTION), 1)));
        assert!(socket.wants(&edit(Some(ConnectionId(8)), 1)));
        for byte in 1..=3 {
            socket.take_update(UpdateKind::Update, &update(byte), true);
        }
        assert!(!socket.wants(&edit(Some(ConnectionId(8)), 1)));
        assert!(!socket.wants(&edit(None, 3)));
        assert!(socket.wants(&edit(None, 4)));
        socket.receipted(2, &seconds());
        assert!(socket.wants(&edit(None, 2)) && !socket.wants(&edit(None, 3)));
        socket.receipted(3, &seconds());
        assert!(socket.wants(&edit(None, 3)));
    }

    /// What it sent on an earlier connection may come in after it has begun anew, and was seen to when a frozen node went on:
    /// the edits were passed on, and never committed.
    #[test]
    fn what_a_client_had_when_it_began_does_not_come_back_before_it_is_durable() {
        let doc = Doc::with_client_id(1);
        let text = doc.get_or_insert_text("quill");
        let typed = transact(&doc, |change| text.insert(change, 0, "typed"));
        let replaced = transact(&doc, |change| {
            text.remove_range(change, 0, 2);
            text.push(change, "over");
        });
        let began = doc.transact().state_vector();
        let later = transact(&doc, |change| text.push(change, "later"));

        let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
        socket.feed = Feed::Early;
        socket.begin(began.encode_v1().into(), 1);
        let frame = |socket: &Socket, update: &Bytes| {
            let mut edit = Edit::new(Some(ConnectionId(8)), update.clone());
            socket.frame_of(&mut edit)
        };
        assert_eq!(frame(&socket, &typed), None);
        let deletes = diff_updates_v1(&replaced, &began.encode_v1()).expect("it is an update");
        assert_ne!(deletes, replaced, "the client would know it again");
        assert_eq!(
            frame(&socket, &replaced),
            Some(y_websocket::update(&deletes)),
            "another client may have deleted that"
        );
        assert_eq!(frame(&socket, &later), Some(y_websocket::update(&later)));
        socket.receipted(1, &seconds());
        assert_eq!(frame(&socket, &typed), Some(y_websocket::update(&typed)));
    }

    #[test]
    fn a_socket_that_has_not_begun_to_sync_keeps_no_edits() {
        let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
        socket.feed = Feed::Early;
        socket.hold(Bytes::from_static(b"in its step 2"));
        socket.begin(Bytes::from_static(&NO_CLOCKS), 1);
        socket.hold(Bytes::from_static(b"later"));
        let state = Bytes::from_static(b"state");
        socket.sync(&state, Sync::Whole, &mut Recent::default());
        let sent: Vec<Bytes> = std::iter::from_fn(|| queue.try_take()).collect();
        let step2 = y_websocket::sync_step2(&state);
        assert_eq!(sent, [step2, Bytes::from_static(b"later")]);
    }

    #[test]
    fn a_deletion_in_an_answer_is_receipted_as_any_edit() {
        let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
        let deletes = Bytes::from_static(&[0, 1, 1, 1, 0, 1]);
        socket.take_update(UpdateKind::Step2, &deletes, true);
        socket.take_update(UpdateKind::Step2, &Bytes::from_static(&NO_EDITS), true);
        socket.receipted(2, &seconds());
        assert_eq!(queue.try_take(), Some(y_websocket::update(&deletes)));
        assert!(queue.try_take().is_none());
    }

    #[test]
    fn a_client_that_counts_gets_one_status_for_its_handshake_and_one_for_each_change() {
        let (mut socket, queue) = hocuspocus(Access::Write);
        let sent = || std::iter::from_fn(|| queue.try_take()).collect::<Vec<_>>();
        let saved = hocuspocus::sync_status("notes", Status::Saved);
        socket.begin(Bytes::from_static(&[0]), 1);
        socket.receipted(0, &seconds());
        assert!(sent().is_empty(), "what it has is not here yet");
        socket.take_update(UpdateKind::Step2, &update(1), true);
        socket.take_update(UpdateKind::Update, &update(2), true);
        socket.receipted(1, &seconds());
        assert_eq!(sent(), vec![saved.clone()], "its handshake");
        // Another owner asks what it has; that is no change of the client.
        socket.take_update(UpdateKind::Step2, &update(3), true);
        socket.receipted(3, &seconds());
        assert_eq!(sent(), vec![saved.clone()], "its change");

        // It begins anew, and forgets what it has counted.
        socket.take_update(UpdateKind::Update, &update(4), true);
        socket.begin(Bytes::from_static(&[0]), 1);
        socket.receipted(4, &seconds());
        assert_eq!(sent(), vec![saved.clone()], "its handshake only");
        socket.begin(Bytes::from_static(&[0]), 1);
        assert_eq!(sent(), [saved], "all that it has sent is durable");
    }

    #[test]
    fn changes_before_access_was_granted_are_counted_too() {
        let (mut socket, queue) = hocuspocus(Access::Write);
        socket.begin(Bytes::from_static(&[0]), 3);
        socket.take_update(UpdateKind::Step2, &update(1), true);
        socket.receipted(1, &seconds());
        assert_eq!(std::iter::from_fn(|| queue.try_take()).count(), 3);
    }

    #[test]
    fn a_readers_change_is_never_receipted_before_it_may_write() {
        let (mut socket, queue) = hocuspocus(Access::Read);
        let sent = || std::iter::from_fn(|| queue.try_take()).collect::<Vec<_>>();
        let (saved, refused) = (
            hocuspocus::sync_status("notes", Status::Saved),
            hocuspocus::sync_status("notes", Status::Refused),
        );
        socket.begin(Bytes::from_static(&[0]), 1);
        assert_eq!(
            socket.take_update(UpdateKind::Step2, &Bytes::from_static(&NO_EDITS), true),
            Some(1)
        );
        socket.receipted(1, &seconds());
        assert_eq!(sent(), vec![saved.clone()]);
        socket.refuse_update();
        assert_eq!(sent(), [refused]);
        socket.admit(Visitor {
            author: String::new(),
            access: Access::Write,
        });
        assert!(sent().is_empty());
        // The owner asks, and this time the answer counts.
        assert_eq!(
            socket.take_update(UpdateKind::Step2, &update(1), true),
            Some(3)
        );
        socket.receipted(3, &seconds());
        assert_eq!(sent(), [saved]);
    }

    #[test]
    fn a_client_that_closes_silent_sockets_hears_something_while_its_receipt_waits() {
        let (mut socket, queue) = socket(Family::YSweet, Access::Write);
        socket.take_update(UpdateKind::Step2, &update(1), true);
        socket.ask_receipt(Bytes::from_static(&[0]));
        assert_eq!(
            queue.try_take(),
            Some(Bytes::from_static(y_websocket::KEEPALIVE))
        );
        socket.receipted(1, &seconds());
        assert_eq!(queue.try_take(), Some(y_sweet::saved(&[0])));
        assert!(queue.try_take().is_none(), "it takes no echo");
    }

    #[test]
    fn a_room_that_ends_without_a_word_closes_its_sockets() {
        let (socket, queue) = socket(Family::YWebsocket, Access::Write);
        drop(socket);
        let taken = queue.take(&mut Vec::new()).now_or_never();
        let Some(Taken::End(connection, close)) = taken else {
            panic!("an end, not {taken:?}");
        };
        assert_eq!((connection, close.code), (CONNECTION, CLOSE_TRY_AGAIN));
    }

    #[test]
    fn a_socket_that_cannot_follow_is_sent_one_difference_when_it_has_caught_up() {
        let (mut socket, queue) = socket(Family::YWebsocket, Access::Write);
        let (room, mut told) = queue::unbounded();
        socket.feed = Feed::Live;
        let delivered = StateVector::from_iter([(ClientID::new(1), 7)]);
        while !socket.line.out.is_full() {
            socket.put(Bytes::from_static(&[0; 4096]));
        }
        socket.fall_behind(&delivered, &room.downgrade());
        assert_eq!(socket.step1, Some(delivered.encode_v1().into()));
        let mut frames = Vec::new();
        queue.take(&mut frames).now_or_never();
        let bytes = |frames: &[Bytes]| frames.iter().map(Bytes::len).sum();
        let (most, last) = frames.split_at(frames.len() - 1);
        queue.sent(most.len(), bytes(most), &mut Vec::new());
        assert!(told.try_recv().is_err());
        queue.sent(1, bytes(last), &mut Vec::new());
        assert!(matches!(told.try_recv(), Ok(FromSocket::Drained { .. })));
        assert!(!socket.line.out.is_full());
        // The room asks for it from there on, and edits wait until it is here.
        socket.feed = Feed::Held;
        socket.hold(Bytes::from_static(b"edit"));
        socket.sync(
            &Bytes::from_static(b"difference"),
            Sync::Whole,
            &mut Recent::default(),
        );
        let sent: Vec<Bytes> = std::iter::from_fn(|| queue.try_take()).collect();
        let difference = y_websocket::sync_step2(b"difference");
        assert_eq!(sent, [difference, Bytes::from_static(b"edit")]);
        assert!(socket.feed == Feed::Live && socket.step1.is_none());
    }

    #[test]
    fn a_step_2_that_more_edits_followed_than_are_kept_is_asked_for_again() {
        let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
        socket.step1 = Some(Bytes::from_static(&[0]));
        socket.hold(Bytes::from(vec![0; SOCKET_QUEUE_BYTES_MAX + 1]));
        assert!(socket.held.is_empty());
        socket.sync(
            &Bytes::from_static(b"old"),
            Sync::Whole,
            &mut Recent::default(),
        );
        assert!(socket.feed == Feed::Held && socket.step1.is_some());
        socket.sync(
            &Bytes::from_static(b"new"),
            Sync::Whole,
            &mut Recent::default(),
        );
        assert!(socket.feed == Feed::Live && socket.step1.is_none());
    }

    #[test]
    fn a_paused_socket_is_read_once_more_and_then_when_the_pause_is_over() {
        let (mut socket, _queue) = socket(Family::YWebsocket, Access::Write);
        let all = socket.line.credit.available_permits();
        socket.pause(true);
        assert_eq!(
            socket.line.credit.available_permits(),
            1,
            "or nobody could join"
        );
        let take = |socket: &mut Socket| {
            socket.line.credit.try_acquire().unwrap().forget();
            socket.take_update(UpdateKind::Update, &update(1), true);
        };
        take(&mut socket);
        assert_eq!(socket.line.credit.available_permits(), 0);
        socket.pause(false);
        assert_eq!(socket.line.credit.available_permits(), all - 1);
        take(&mut socket);
        socket.pause(true);
        assert_eq!(socket.line.credit.available_permits(), 0);
        socket.receipted(2, &seconds());
        assert_eq!(socket.line.credit.available_permits(), 1);
        socket.pause(false);
        assert_eq!(socket.line.credit.available_permits(), all);
    }

    #[test]
    fn an_edit_of_a_damaged_document_is_in_no_receipt_before_the_repair() {
        let (mut socket, queue) = socket(Family::YSweet, Access::Write);
        (socket.sent, socket.durable) = (1, 1);
        socket.tell_read_only(Some("damaged"));
        assert_eq!(
            queue.try_take(),
            Some(y_websocket::permission_denied("damaged"))
        );
        socket.refuse_update();
        socket.ask_receipt(Bytes::from_static(b"\x02"));
        socket.receipted(1, &seconds());
        let alive = Bytes::from_static(y_websocket::KEEPALIVE);
        assert_eq!(queue.try_take(), Some(alive));
        assert!(queue.try_take().is_none());
        socket.tell_read_only(None);
        socket.take_update(UpdateKind::Step2, &update(1), true);
        socket.receipted(3, &seconds());
        assert_eq!(queue.try_take(), Some(y_sweet::saved(b"\x02")));
    }

    const CONNECTION: ConnectionId = ConnectionId(7);

    fn hocuspocus(access: Access) -> (Socket, Taker) {
        let address = "notes".into();
        socket(Family::Hocuspocus { address }, access)
    }

    fn socket(family: Family, access: Access) -> (Socket, Taker) {
        let (out, queue) = Outbox::new();
        let visitor = Visitor {
            author: String::new(),
            access,
        };
        let line = Line {
            out,
            credit: Arc::new(Semaphore::new(8)),
        };
        let mut socket = Socket::new(CONNECTION, visitor, family, line);
        socket.feed = Feed::Held;
        (socket, queue)
    }

    fn transact(doc: &Doc, act: impl FnOnce(&mut TransactionMut<'_>)) -> Bytes {
        let mut change = doc.transact_mut();
        act(&mut change);
        change.encode_update_v1().into()
    }

    fn update(byte: u8) -> Bytes {
        Bytes::copy_from_slice(&[1, byte])
    }

    fn seconds() -> prometheus::Histogram {
        prometheus::Histogram::with_opts(prometheus::HistogramOpts::new("s", "s")).unwrap()
    }
}
