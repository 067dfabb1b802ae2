//! The sockets of one document on this node, and their common channel to its owner.
//!
//! The room survives its owner: when the channel ends it finds the new owner, tells it what all its
//! sockets have (so that they get what they missed), and lets the owner ask each client for what it
//! lacks. It owns the receipts: per socket it counts the updates and keeps what each is owed until
//! the owner says that everything up to it is durable.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use collab_core::document::NO_CLOCKS;
use collab_core::ids::{ConnectionId, DocumentId, Epoch, Slot};
use collab_core::limits::{
    CONNECTIONS_PER_DOCUMENT_MAX, CONNECTIONS_PER_USER_MAX, KEEPALIVE_AFTER,
};
use collab_core::scan;
use collab_core::wire::relay::{ToEdge, ToOwner, Unavailable, UpdateKind};
use collab_core::wire::y_websocket::Message;
use litemap::LiteMap;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;
use yrs::updates::decoder::Decode;
use yrs::updates::encoder::Encode;
use yrs::{ClientID, StateVector};

use super::family::{Family, Recent, Shared, Told};
use super::outbox::Turn;
use super::{Access, CLOSE_POLICY, CLOSE_TRY_AGAIN, Edge, Line, Visitor};
use crate::documents::{Attachment, EdgeSender};
use crate::peers::RemoteChannel;
use crate::queue;

mod socket;
#[cfg(test)]
mod tests;

use socket::{Edit, Feed, Socket, Sync};

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
/// At least between two looks for quiet sockets; and how long a room stays that is empty.
const TICK: Duration = Duration::from_secs(5);
/// Presence that came too fast for its like follows after this time.
const LATE_PRESENCE_AFTER: Duration = Duration::from_secs(1);

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
    /// Boxed, and no tree: that makes room for eleven at once, and most documents have few.
    sockets: LiteMap<ConnectionId, Box<Socket>>,
    turn: Arc<Turn>,
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
    /// Boxed: it is there for a moment.
    catching_up: Option<Box<CatchingUp>>,
    /// Why the document is not served, if it is not.
    denied: Option<Box<str>>,
    /// It was deleted, and has not begun another life.
    deleted: bool,
    /// Sockets of clients that have what was deleted. They stay denied: in another life of the document
    /// they would bring it back.
    outlived: LiteMap<ConnectionId, Box<Socket>>,
    /// Why edits are refused, if they are; of the present owner, and of the one that is about to answer.
    read_only: Option<Box<str>>,
    coming_read_only: Option<Box<str>>,
    /// Too much waits for its commit.
    paused: bool,
    empty_since: Instant,
    /// When to look after all that nothing but time brings.
    look_at: Instant,
    /// The document was closed while there was no socket: it is opened again for the next.
    resting: bool,
}

/// The channel to the owner.
struct Upstream {
    to: ToOwnerSender,
    from: queue::Receiver<ToEdge>,
    owner: Uuid,
    epoch: Epoch,
}

/// The sockets have what an earlier owner sent them, and the present one sends what they lack.
#[derive(Default)]
struct CatchingUp {
    /// The owner's, which the catch-up brings every socket to.
    state_vector: StateVector,
    /// Edits that wait until the catch-up is here: without it they have holes before them.
    edits: Vec<(Option<ConnectionId>, Bytes)>,
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

impl Room {
    pub(super) fn new(
        edge: Arc<Edge>,
        document: DocumentId,
        id: u64,
        inputs: queue::Receiver<FromSocket>,
        own_inputs: queue::WeakSender<FromSocket>,
    ) -> Self {
        let slot = edge.members.slot_of(&document);
        let look_at = edge.documents.beat_after(Instant::now() + TICK);
        Self {
            edge,
            document,
            slot,
            id,
            inputs,
            own_inputs,
            sockets: LiteMap::with_capacity(1),
            turn: Arc::default(),
            upstream: None,
            retry_at: Instant::now(),
            least_epoch: (Epoch(0), Instant::now()),
            edits: Vec::new(),
            recent: Recent::default(),
            delivered: StateVector::default(),
            catching_up: None,
            denied: None,
            deleted: false,
            outlived: LiteMap::new(),
            read_only: None,
            coming_read_only: None,
            paused: false,
            empty_since: Instant::now(),
            look_at,
            resting: false,
        }
    }

    pub(super) async fn run(mut self: Box<Self>) {
        let mut map = self.edge.members.watch();
        let mut alarm = Box::pin(sleep_until(self.look_at));
        loop {
            self.edge.metrics.deliveries.inc_by(self.turn.end() as u64);
            if self.wants_owner() && self.retry_at <= Instant::now() {
                self.attach();
            }
            let wake_at = if self.wants_owner() {
                self.look_at.min(self.retry_at)
            } else {
                self.look_at
            };
            if alarm.deadline() != wake_at {
                alarm.as_mut().reset(wake_at);
            }
            let sockets_say = tokio::select! {
                biased;
                message = next(&mut self.upstream) => {
                    match message {
                        Some(message) => {
                            self.owner_says(message);
                            self.owner_goes_on();
                        }
                        None => self.detach(RETRY),
                    }
                    false
                }
                is_open = self.inputs.ready() => {
                    if !is_open {
                        return;
                    }
                    true
                }
                () = map.changed() => {
                    self.map_changed();
                    false
                }
                () = alarm.as_mut() => {
                    if self.look_at <= Instant::now() && self.look() {
                        return;
                    }
                    false
                }
            };
            if sockets_say {
                // The other sockets read first: what they bring goes with this.
                yield_now().await;
                for _ in 0..MESSAGES_PER_TURN {
                    let Ok(input) = self.inputs.try_recv() else {
                        break;
                    };
                    self.socket_says(input);
                }
            }
        }
    }

    /// Does what nothing but time brings. Answers whether nobody needs the room any more.
    fn look(&mut self) -> bool {
        self.keep_alive();
        self.recent.clear();
        self.send_late_presence();
        let unused = self.is_empty() && TICK <= self.empty_since.elapsed();
        if unused && self.edge.leave_table(&self.document, self.id, &self.inputs) {
            return true;
        }
        self.look_at = self.next_look();
        false
    }

    fn wants_owner(&self) -> bool {
        self.upstream.is_none() && !self.resting
    }

    fn is_empty(&self) -> bool {
        self.sockets.is_empty() && self.outlived.is_empty()
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
        self.catching_up = synced.then(Box::default);
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
        });
    }

    /// The channel is no more; what was sent on it and not receipted is in the clients, which will be asked.
    fn detach(&mut self, pause: Duration) {
        self.upstream = None;
        self.resting = self.is_empty();
        self.catching_up = None;
        self.retry_at = Instant::now() + pause;
        self.edge.members.look_now();
        self.coming_read_only = None;
        self.paused = false;
        for socket in values_mut(&mut self.sockets) {
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
                match &mut self.catching_up {
                    Some(catching_up) => catching_up.state_vector = state_vector,
                    None => self.delivered.merge(state_vector),
                }
            }
            ToEdge::CatchUp { update } => self.caught_up(&update),
            ToEdge::FanOut { except, update } => match &mut self.catching_up {
                Some(catching_up) => catching_up.edits.push((except, update)),
                None => self.fan_out(except, update),
            },
            ToEdge::Presence { payload } => {
                let mut shared = Shared::new(Told::Presence(&payload));
                let following = values_mut(&mut self.sockets);
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
                for socket in values_mut(&mut self.sockets) {
                    socket.pause(self.paused);
                }
            }
            ToEdge::ReadOnly { reason } => self.coming_read_only = Some(reason.into()),
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
                    let sockets = std::mem::take(&mut self.sockets).into_iter();
                    let (outlived, others) = sockets.partition(|(_, socket)| socket.has_content());
                    self.outlived.extend(outlived);
                    self.sockets = others;
                }
            }
        }
    }

    /// Tells clients that they may not have the document, and keeps their sockets: a stock client
    /// would come back at once after any close.
    fn deny(&mut self, reason: String) {
        if self.denied.as_deref() == Some(reason.as_str()) {
            return;
        }
        self.tell_all(None, Told::Denied(&reason));
        self.denied = Some(reason.into());
        self.delivered = StateVector::default();
    }

    /// Closes the sockets that are for this document alone: their clients come back, maybe when there is room.
    fn send_away(&mut self, reason: &str) {
        for socket in values_mut(&mut self.sockets) {
            if !matches!(socket.family, Family::Hocuspocus { .. }) {
                socket.kick(CLOSE_TRY_AGAIN, reason);
            }
        }
    }

    /// The document is there. Newcomers may get what is stored of it before it is open.
    fn served(&mut self) {
        self.deleted = false;
        if self.denied.take().is_some() {
            for socket in values_mut(&mut self.sockets) {
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
            for socket in values_mut(&mut self.sockets) {
                socket.tell_read_only(coming.as_deref());
            }
            self.read_only = coming;
        }
    }

    fn caught_up(&mut self, update: &Bytes) {
        let mut shared = Shared::new(Told::Update(update));
        for socket in values_mut(&mut self.sockets) {
            if socket.feed == Feed::Live {
                socket.tell_shared(&mut shared);
            }
        }
        if let Some(catching_up) = self.catching_up.take() {
            let CatchingUp {
                state_vector,
                edits,
            } = *catching_up;
            self.delivered.merge(state_vector);
            for (except, update) in edits {
                self.fan_out(except, update);
            }
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
        let now = Instant::now();
        for socket in values_mut(&mut self.sockets) {
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
            } else if !socket.offer(frames.drain(..), now) {
                self.edge.metrics.sockets_behind.inc();
                socket.fall_behind(&self.delivered, &self.own_inputs);
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
            } => self.join(connection, visitor, family, line),
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
                    let outlived = self.sockets.remove(&connection);
                    self.outlived
                        .extend(outlived.map(|socket| (connection, socket)));
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

    fn join(&mut self, connection: ConnectionId, visitor: Visitor, family: Family, line: Line) {
        let turn = self.turn.clone();
        let mut socket = Box::new(Socket::new(connection, visitor, family, line, turn));
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
        if socket.presence_waits {
            self.look_at = self.look_at.min(Instant::now() + LATE_PRESENCE_AFTER);
        } else {
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
        for (connection, socket) in self.sockets.iter_mut() {
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
        for socket in values_mut(&mut self.sockets).chain(values_mut(&mut self.outlived)) {
            if KEEPALIVE_AFTER <= socket.last_out.elapsed() {
                socket.tell(Told::Alive);
            }
        }
    }

    /// When the first socket will have been quiet for too long.
    fn next_look(&self) -> Instant {
        let soon = Instant::now() + TICK;
        let sockets = self.sockets.values().chain(self.outlived.values());
        let quiet_at = sockets.map(|socket| socket.last_out + KEEPALIVE_AFTER);
        let next = quiet_at.min().unwrap_or(soon).max(soon);
        self.edge.documents.beat_after(next)
    }

    /// Sends the presence that came too fast for its like to follow at once: the newest of each socket.
    fn send_late_presence(&mut self) {
        let late: Vec<_> = values_mut(&mut self.sockets)
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

fn values_mut<K, V>(map: &mut LiteMap<K, V>) -> impl Iterator<Item = &mut V> {
    map.iter_mut().map(|(_, value)| value)
}

/// The next message of the owner; waits for ever without one.
async fn next(upstream: &mut Option<Upstream>) -> Option<ToEdge> {
    match upstream {
        Some(upstream) => upstream.from.recv().await,
        None => std::future::pending().await,
    }
}
