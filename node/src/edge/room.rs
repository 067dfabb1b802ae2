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
use collab_core::ids::{ConnectionId, DocumentId, Epoch, Slot};
use collab_core::limits::{KEEPALIVE_AFTER, UNCOMMITTED_BYTES_MAX};
use collab_core::scan;
use collab_core::wire::relay::{ToEdge, ToOwner, Unavailable, UpdateKind};
use collab_core::wire::y_websocket::{self, Message};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};
use uuid::Uuid;
use yrs::updates::decoder::Decode;
use yrs::updates::encoder::Encode;
use yrs::{ClientID, StateVector};

use super::{Access, CLOSE_POLICY, CLOSE_TRY_AGAIN, Close, Edge, Visitor};
use crate::documents::{Attachment, EdgeSender};
use crate::peers::RemoteChannel;

/// Before an owner that did not answer, or is not one yet, is tried again.
const RETRY: Duration = Duration::from_millis(50);
/// Before a document that cannot be served is tried again.
const RETRY_UNAVAILABLE: Duration = Duration::from_secs(1);
/// Between two looks for quiet sockets, and for an empty room.
const TICK: Duration = Duration::from_secs(5);

/// What a socket brings to its room.
#[derive(Debug)]
pub(super) enum FromSocket {
    Join {
        connection: ConnectionId,
        visitor: Visitor,
        out: mpsc::Sender<Bytes>,
        kick: oneshot::Sender<Close>,
        credit: Arc<Semaphore>,
    },
    Leave {
        connection: ConnectionId,
    },
    Step1 {
        connection: ConnectionId,
        state_vector: Bytes,
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
}

impl FromSocket {
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
    inputs: mpsc::UnboundedReceiver<FromSocket>,
    sockets: BTreeMap<ConnectionId, Socket>,
    upstream: Option<Upstream>,
    retry_at: Instant,
    /// An owner of an earlier epoch is none any more, whatever the map still shows.
    least_epoch: Epoch,
    /// What every synced socket has.
    delivered: StateVector,
    /// Edits that wait until the catch-up is here: without it they have holes before them.
    catching_up: Option<Vec<(Option<ConnectionId>, Bytes)>>,
    /// Why the document is not served, if it is not.
    denied: Option<String>,
    empty_since: Instant,
}

/// The channel to the owner.
struct Upstream {
    to: ToOwnerSender,
    from: mpsc::UnboundedReceiver<ToEdge>,
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
    visitor: Visitor,
    out: mpsc::Sender<Bytes>,
    kick: Option<oneshot::Sender<Close>>,
    credit: Arc<Semaphore>,
    /// The client's state vector, until its step 2 is sent.
    step1: Option<Bytes>,
    /// It got its step 2: edits may follow.
    synced: bool,
    /// Edits that wait for the step 2.
    held: Vec<Bytes>,
    /// Steps 1 of the present owner that it was sent and has not answered.
    asked: u32,
    /// Answers still to come to earlier owners. They leave out what those had, which may be lost.
    asked_before: u32,
    sent: u64,
    durable: u64,
    owed: VecDeque<Owed>,
    owed_bytes: usize,
    awareness: Option<Bytes>,
    last_out: Instant,
}

/// What a socket gets once everything up to `number` is durable.
struct Owed {
    number: u64,
    receipt: Receipt,
    since: Instant,
    holds_credit: bool,
}

enum Receipt {
    /// The update itself.
    Echo(Bytes),
    /// The payload that it asked to get back.
    Saved(Bytes),
    /// Nothing: an answer without edits.
    Silent,
}

impl Room {
    pub(super) fn new(
        edge: Arc<Edge>,
        document: DocumentId,
        id: u64,
        inputs: mpsc::UnboundedReceiver<FromSocket>,
    ) -> Self {
        let slot = edge.members.slot_of(&document);
        Self {
            edge,
            document,
            slot,
            id,
            inputs,
            sockets: BTreeMap::new(),
            upstream: None,
            retry_at: Instant::now(),
            least_epoch: Epoch(0),
            delivered: StateVector::default(),
            catching_up: None,
            denied: None,
            empty_since: Instant::now(),
        }
    }

    pub(super) async fn run(mut self) {
        let mut map = self.edge.members.watch();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.upstream.is_none() && self.retry_at <= Instant::now() {
                self.attach();
            }
            let retry_at = self.retry_at;
            tokio::select! {
                biased;
                message = next(&mut self.upstream) => match message {
                    Some(message) => self.owner_says(message),
                    None => self.detach(RETRY),
                },
                input = self.inputs.recv() => match input {
                    Some(input) => self.socket_says(input),
                    None => return,
                },
                () = map.changed() => self.map_changed(),
                () = sleep_until(retry_at), if self.upstream.is_none() => {}
                _ = tick.tick() => {
                    self.keep_alive();
                    let empty = self.sockets.is_empty() && TICK <= self.empty_since.elapsed();
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
        if owner.epoch < self.least_epoch {
            self.edge.members.look_now();
            return;
        }
        let synced = self.sockets.values().any(|socket| socket.synced);
        let since = if synced {
            self.delivered.encode_v1().into()
        } else {
            Bytes::new()
        };
        self.catching_up = synced.then(Vec::new);
        let (to, from) = if owner.incarnation == self.edge.members.incarnation() {
            let (sender, from) = mpsc::unbounded_channel();
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
        for (connection, socket) in &self.sockets {
            for message in socket.introduction(*connection) {
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
        self.catching_up = None;
        self.retry_at = Instant::now() + pause;
        self.edge.members.look_now();
        for socket in self.sockets.values_mut() {
            socket.held.clear();
            socket.asked_before += std::mem::take(&mut socket.asked);
            socket.release_credit();
        }
    }

    fn map_changed(&mut self) {
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

    fn owner_says(&mut self, message: ToEdge) {
        match message {
            ToEdge::Attached { state_vector, .. } => {
                self.denied = None;
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
                None => self.fan_out(except, &update),
            },
            ToEdge::Presence { payload } => {
                let frame = y_websocket::awareness(&payload);
                for socket in self.sockets.values_mut() {
                    socket.put(frame.clone());
                }
            }
            ToEdge::PresenceTo {
                connection,
                payload,
            } => {
                self.with(connection, |socket| {
                    socket.put(y_websocket::awareness(&payload));
                });
            }
            ToEdge::Step1 {
                connection,
                state_vector,
            } => self.with(connection, |socket| {
                socket.asked += 1;
                // The answer is behind what the client has sent already: read on to get to it.
                socket.release_credit();
                socket.put(y_websocket::sync_step1(&state_vector));
            }),
            ToEdge::Step2 { connection, update } => self.with(connection, |socket| {
                socket.put(y_websocket::sync_step2(&update));
                socket.step1 = None;
                socket.synced = true;
                for frame in std::mem::take(&mut socket.held) {
                    socket.put(frame);
                }
            }),
            ToEdge::Receipt { connection, upto } => {
                let ack_seconds = self.edge.metrics.ack_seconds.clone();
                self.with(connection, |socket| socket.receipted(upto, &ack_seconds));
            }
            ToEdge::Refused { connection, reason } => {
                tracing::info!(document.id = %self.document, reason, "a socket is closed for what it sent");
                self.with(connection, |socket| socket.kick(CLOSE_POLICY, &reason));
            }
            ToEdge::Moved { epoch } => {
                self.least_epoch = self.least_epoch.max(epoch);
                self.detach(RETRY);
            }
            // Answers a question of this node's handoffs, which have channels of their own.
            ToEdge::Preloaded => {}
            ToEdge::Unavailable { cause, reason } => {
                let pause = if cause == Unavailable::Store {
                    RETRY
                } else {
                    RETRY_UNAVAILABLE
                };
                self.detach(pause);
                if cause != Unavailable::Store {
                    self.deny(reason);
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
        let frame = y_websocket::permission_denied(&reason);
        for socket in self.sockets.values_mut() {
            socket.put(frame.clone());
        }
        self.denied = Some(reason);
        self.delivered = StateVector::default();
    }

    fn caught_up(&mut self, update: &Bytes) {
        let frame = y_websocket::update(update);
        for socket in self.sockets.values_mut().filter(|socket| socket.synced) {
            socket.put(frame.clone());
        }
        if let Some(upstream) = &mut self.upstream {
            self.delivered
                .merge(std::mem::take(&mut upstream.state_vector));
        }
        for (except, update) in self.catching_up.take().unwrap_or_default() {
            self.fan_out(except, &update);
        }
    }

    fn fan_out(&mut self, except: Option<ConnectionId>, update: &Bytes) {
        let frame = y_websocket::update(update);
        for (connection, socket) in &mut self.sockets {
            if Some(*connection) == except {
                continue;
            }
            if socket.synced {
                socket.put(frame.clone());
            } else {
                socket.held.push(frame.clone());
            }
        }
        if let Ok(scan) = scan::scan_update(update) {
            for (client, end) in scan.client_ends() {
                self.delivered.set_max(ClientID::new(client), end);
            }
        }
    }

    fn socket_says(&mut self, input: FromSocket) {
        match input {
            FromSocket::Join {
                connection,
                visitor,
                out,
                kick,
                credit,
            } => {
                let mut socket = Socket::new(visitor, out, kick, credit);
                if let Some(upstream) = &self.upstream {
                    for message in socket.introduction(connection) {
                        upstream.to.send(message);
                    }
                }
                if let Some(reason) = &self.denied {
                    socket.put(y_websocket::permission_denied(reason));
                }
                self.sockets.insert(connection, socket);
            }
            FromSocket::Leave { connection } => {
                self.sockets.remove(&connection);
                self.empty_since = Instant::now();
                self.to_owner(ToOwner::Leave { connection });
            }
            FromSocket::Step1 {
                connection,
                state_vector,
            } => {
                self.with(connection, |socket| {
                    socket.step1 = Some(state_vector.clone());
                });
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
            } => {
                self.with(connection, |socket| {
                    socket.awareness = Some(payload.clone());
                });
                self.to_owner(ToOwner::Awareness {
                    connection,
                    payload,
                });
            }
            FromSocket::QueryAwareness { connection } => {
                self.to_owner(ToOwner::QueryAwareness { connection });
            }
            FromSocket::Saved {
                connection,
                payload,
            } => {
                self.with(connection, |socket| socket.ask_receipt(payload));
            }
        }
    }

    fn update(&mut self, connection: ConnectionId, kind: UpdateKind, update: Bytes) {
        let attached = self.upstream.is_some();
        let Some(socket) = self.sockets.get_mut(&connection) else {
            return;
        };
        if socket.visitor.access == Access::Read {
            socket.credit.add_permits(1);
            self.edge
                .metrics
                .updates_refused
                .with_label_values(&["read_only"])
                .inc();
            return;
        }
        if let Some(number) = socket.take_update(kind, &update, attached) {
            self.to_owner(ToOwner::Update {
                connection,
                number,
                kind,
                update,
            });
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
        for socket in self.sockets.values_mut() {
            if KEEPALIVE_AFTER <= socket.last_out.elapsed() {
                socket.put(Bytes::from_static(y_websocket::KEEPALIVE));
            }
        }
    }
}

impl Socket {
    fn new(
        visitor: Visitor,
        out: mpsc::Sender<Bytes>,
        kick: oneshot::Sender<Close>,
        credit: Arc<Semaphore>,
    ) -> Self {
        Self {
            visitor,
            out,
            kick: Some(kick),
            credit,
            step1: None,
            synced: false,
            held: Vec::new(),
            asked: 0,
            asked_before: 0,
            sent: 0,
            durable: 0,
            owed: VecDeque::new(),
            owed_bytes: 0,
            awareness: None,
            last_out: Instant::now(),
        }
    }

    /// What an owner that does not know this socket is to be told.
    fn introduction(&self, connection: ConnectionId) -> Vec<ToOwner> {
        let join = ToOwner::Join {
            connection,
            author: self.visitor.author.clone(),
        };
        let step1 = self.step1.clone().filter(|_| !self.synced);
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

    fn put(&mut self, frame: Bytes) {
        self.last_out = Instant::now();
        if self.out.try_send(frame).is_err() {
            self.kick(
                CLOSE_TRY_AGAIN,
                "this socket is too slow; it gets the difference when it comes back",
            );
        }
    }

    fn kick(&mut self, code: u16, reason: &str) {
        if let Some(kick) = self.kick.take() {
            let _ = kick.send(Close {
                code,
                reason: reason.to_owned(),
            });
        }
    }

    /// Counts an update and notes what is owed for it. Answers its number, unless it answers an owner
    /// that is gone: the present one has asked for the same, and more.
    fn take_update(&mut self, kind: UpdateKind, update: &Bytes, attached: bool) -> Option<u64> {
        self.sent += 1;
        let late = kind == UpdateKind::Step2 && 0 < self.asked_before;
        let receipt = match kind {
            UpdateKind::Update => Receipt::Echo(update.clone()),
            UpdateKind::Step2 => {
                if late {
                    self.asked_before -= 1;
                } else {
                    self.asked = self.asked.saturating_sub(1);
                }
                // An update begins with the number of its sections: none, no edits.
                let has_edits = update.first().is_some_and(|sections| *sections != 0);
                if has_edits {
                    Receipt::Echo(update.clone())
                } else {
                    Receipt::Silent
                }
            }
        };
        if let Receipt::Echo(bytes) = &receipt {
            self.owed_bytes += bytes.len();
        }
        let holds_credit = attached && !late && self.asked == 0;
        if !holds_credit {
            self.credit.add_permits(1);
        }
        self.owed.push_back(Owed {
            number: self.sent,
            receipt,
            since: Instant::now(),
            holds_credit,
        });
        if UNCOMMITTED_BYTES_MAX < self.owed_bytes && self.owed.len() > 1 {
            self.kick(
                CLOSE_TRY_AGAIN,
                "too much is waiting to be saved; try again",
            );
        }
        (!late).then_some(self.sent)
    }

    /// The client wants to know when all it sent is durable; that needs its first answer, too.
    fn ask_receipt(&mut self, payload: Bytes) {
        if self.visitor.access == Access::Read {
            return;
        }
        let number = self.sent.max(1);
        if number <= self.durable {
            self.put(y_websocket::saved(&payload));
        } else {
            // Only the newest counts.
            self.owed
                .retain(|owed| !matches!(owed.receipt, Receipt::Saved(_)) || owed.number < number);
            let owed = Owed {
                number,
                receipt: Receipt::Saved(payload),
                since: Instant::now(),
                holds_credit: false,
            };
            self.owed.push_back(owed);
        }
    }

    fn receipted(&mut self, upto: u64, ack_seconds: &prometheus::Histogram) {
        self.durable = self.durable.max(upto);
        while self
            .owed
            .front()
            .is_some_and(|owed| owed.number <= self.durable)
        {
            let Some(owed) = self.owed.pop_front() else {
                return;
            };
            if owed.holds_credit {
                self.credit.add_permits(1);
            }
            match owed.receipt {
                Receipt::Echo(update) => {
                    self.owed_bytes -= update.len();
                    ack_seconds.observe(owed.since.elapsed().as_secs_f64());
                    self.put(y_websocket::update(&update));
                }
                Receipt::Saved(payload) => self.put(y_websocket::saved(&payload)),
                Receipt::Silent => {}
            }
        }
    }

    fn release_credit(&mut self) {
        for owed in self.owed.iter_mut().filter(|owed| owed.holds_credit) {
            owed.holds_credit = false;
            self.credit.add_permits(1);
        }
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
    use super::*;

    #[test]
    fn an_answer_to_an_owner_that_is_gone_is_not_taken_for_one_to_the_present_owner() {
        let (mut socket, _queue) = socket();
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
        let (mut socket, mut queue) = socket();
        let seconds = prometheus::Histogram::with_opts(prometheus::HistogramOpts::new("s", "s"));
        let seconds = seconds.unwrap();
        let update = |byte| Bytes::copy_from_slice(&[1, byte]);
        for byte in 1..=3 {
            socket.take_update(UpdateKind::Update, &update(byte), true);
        }
        socket.ask_receipt(Bytes::from_static(b"\x01\x03"));
        let mut sent = || std::iter::from_fn(|| queue.try_recv().ok()).collect::<Vec<_>>();
        socket.receipted(2, &seconds);
        assert_eq!(
            sent(),
            [
                y_websocket::update(&update(1)),
                y_websocket::update(&update(2))
            ]
        );
        socket.receipted(2, &seconds);
        assert!(sent().is_empty());
        socket.receipted(3, &seconds);
        assert_eq!(
            sent(),
            [
                y_websocket::update(&update(3)),
                y_websocket::saved(b"\x01\x03")
            ]
        );
    }

    fn socket() -> (Socket, mpsc::Receiver<Bytes>) {
        let (out, queue) = mpsc::channel(8);
        let visitor = Visitor {
            author: String::new(),
            access: Access::Write,
        };
        let credit = Arc::new(Semaphore::new(8));
        (
            Socket::new(visitor, out, oneshot::channel().0, credit),
            queue,
        )
    }
}
