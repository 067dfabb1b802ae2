//! The part of a node that meets clients: a socket's life.
//!
//! Every node is an edge for every document. All sockets of one document share a [`room`], which keeps
//! one channel to the owner, wherever that is, and finds the new one when it moves; the sockets stay
//! open meanwhile. The room owns the receipts: it knows what each socket is owed. Rooms speak of what
//! clients are told, and a [`family`] puts it into the bytes of its clients.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message as WsMessage};
use bytes::Bytes;
use collab_core::ids::{ConnectionId, DocumentId};
use collab_core::limits::{
    DRAIN_CLOSES_PER_SECOND, GONE_AFTER, MESSAGES_BURST, MESSAGES_PER_SECOND_MAX, PING_AFTER,
    PULSE_EVERY,
};
use collab_core::wire::y_websocket;
use futures::{FutureExt, Sink, SinkExt, Stream, StreamExt};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout};

use crate::documents::Documents;
use crate::members::Members;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::queue;
use crate::tasks::Tasks;

mod apply;
mod family;
mod hocuspocus;
mod outbox;
mod pace;
mod room;

pub use apply::ApplyError;
pub use family::Family;
pub use hocuspocus::{Admitted, Gate};
pub use outbox::{Direct, Sent};

use hocuspocus::Hocuspocus;
use outbox::{Outbox, Taken};
use pace::{Pace, Pulse, pulse};
use room::{FromSocket, Room};

/// Updates of a socket that may wait for their receipt before the socket is no longer read.
const UNANSWERED_UPDATES_MAX: usize = 256;
/// Messages of a socket that are taken before others have their turn.
const MESSAGES_PER_TURN: u32 = 64;
/// A client that takes nothing for this long is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);
/// A client that takes less of a large state is gone, too.
const SLOWEST_BYTES_PER_SECOND: usize = 16 * 1024;

/// What a client may do with a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// See it, and be seen.
    Read,
    /// Change it.
    Write,
}

/// Who is at a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visitor {
    /// The authenticated user, or empty.
    pub author: Box<str>,
    /// What it may do.
    pub access: Access,
}

/// The rooms of this node.
pub struct Edge {
    documents: Arc<Documents>,
    members: Arc<Members>,
    peers: Arc<Peers>,
    metrics: Metrics,
    tasks: Tasks,
    random: Mutex<StdRng>,
    rooms: Mutex<BTreeMap<DocumentId, RoomEntry>>,
    sockets: Mutex<BTreeMap<ConnectionId, oneshot::Sender<Close>>>,
    next_id: AtomicU64,
}

struct RoomEntry {
    id: u64,
    inputs: queue::Sender<FromSocket>,
}

/// Why this side closes a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Close {
    code: u16,
    reason: String,
}

impl Close {
    fn new(code: u16, reason: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.into(),
        }
    }
}

/// What a socket gives to the rooms of its documents.
#[derive(Clone, Debug)]
struct Line {
    /// Frames for the client, and ends of its connections.
    out: Arc<Outbox>,
    /// Updates that may be read before one of them is receipted.
    credit: Arc<Semaphore>,
}

/// A document that a socket holds. The room forgets it when this is dropped.
#[derive(Debug)]
struct Membership {
    connection: ConnectionId,
    room: queue::Sender<FromSocket>,
}

impl Drop for Membership {
    fn drop(&mut self) {
        let _ = self.room.send(FromSocket::Leave {
            connection: self.connection,
        });
    }
}

/// The side of a socket that speaks its family's protocol.
trait Client: Send {
    /// Takes a frame. The error closes the socket.
    fn received(&mut self, frame: &Bytes) -> Result<(), Close>;

    /// A room has done with a connection. Answers how to close the socket, if that is what it means.
    fn ended(&mut self, connection: ConnectionId, close: Close) -> Option<Close>;

    /// When [`Client::woken`] is to be called next.
    fn wakes_at(&self) -> Option<Instant> {
        None
    }

    /// Time has passed. The answer closes the socket.
    fn woken(&mut self) -> Option<Close> {
        None
    }
}

/// Service restart: come back, another node is there.
const CLOSE_RESTART: u16 = 1012;
/// Try again later.
const CLOSE_TRY_AGAIN: u16 = 1013;
/// What came is too large, whenever it comes.
const CLOSE_TOO_LARGE: u16 = 1009;
/// The token has ended; come back with another.
const CLOSE_UNAUTHORIZED: u16 = 4401;
/// The frame breaks the protocol.
const CLOSE_INVALID: u16 = 1007;
/// The content is refused.
const CLOSE_POLICY: u16 = 1008;

impl Edge {
    /// No socket is open yet. What is left to chance comes from `seed`.
    pub fn new(
        documents: Arc<Documents>,
        members: Arc<Members>,
        peers: Arc<Peers>,
        metrics: Metrics,
        tasks: Tasks,
        seed: u64,
    ) -> Arc<Self> {
        Arc::new(Self {
            documents,
            members,
            peers,
            metrics,
            tasks,
            random: Mutex::new(StdRng::seed_from_u64(seed)),
            rooms: Mutex::default(),
            sockets: Mutex::default(),
            next_id: AtomicU64::new(1),
        })
    }

    /// Open sockets.
    pub fn connections(&self) -> usize {
        self.lock_sockets().len()
    }

    /// Serves a client that has one document, until either side closes. What it is told goes to it `direct`, if it can.
    pub async fn serve<S, E>(
        self: Arc<Self>,
        socket: S,
        direct: Option<Arc<dyn Direct>>,
        document: DocumentId,
        Admitted { visitor, until }: Admitted,
        family: Family,
    ) where
        S: Stream<Item = Result<WsMessage, E>> + Sink<WsMessage> + Send + Unpin,
    {
        self.run(socket, direct, |line| {
            let membership = self.join(&document, visitor, family, line.clone());
            OneDocument {
                edge: self.clone(),
                membership,
                line,
                until,
            }
        })
        .await;
    }

    /// Serves a client of Hocuspocus, which brings a token for each of its documents to the `gate`.
    pub async fn serve_hocuspocus<S, E>(
        self: Arc<Self>,
        socket: S,
        direct: Option<Arc<dyn Direct>>,
        gate: Gate,
    ) where
        S: Stream<Item = Result<WsMessage, E>> + Sink<WsMessage> + Send + Unpin,
    {
        let client = |line| Hocuspocus::new(self.clone(), line, gate);
        self.run(socket, direct, client).await;
    }

    /// Closes every socket with "service restart", at a limited rate and in no order that clients share.
    pub async fn close_all(&self) {
        let pause = Duration::from_secs(1) / DRAIN_CLOSES_PER_SECOND;
        loop {
            let next = {
                let mut sockets = self.lock_sockets();
                let any = self.roll().random_range(0..sockets.len().max(1));
                let any = sockets.keys().nth(any).copied();
                any.and_then(|connection| sockets.remove(&connection))
            };
            let Some(close) = next else { return };
            let reason = "the node is being stopped; another one is ready".to_owned();
            let _ = close.send(Close {
                code: CLOSE_RESTART,
                reason,
            });
            let jitter = self.roll().random_range(0.5..1.5);
            sleep(pause.mul_f64(jitter)).await;
        }
    }

    async fn run<S, E, C: Client>(
        &self,
        socket: S,
        direct: Option<Arc<dyn Direct>>,
        client: impl FnOnce(Line) -> C,
    ) where
        S: Stream<Item = Result<WsMessage, E>> + Sink<WsMessage> + Send + Unpin,
    {
        let id = self.next_connection();
        let (close, closed) = oneshot::channel();
        self.lock_sockets().insert(id, close);
        self.metrics.connections.inc();
        let code = self.run_socket(socket, direct, client, closed).await;
        self.lock_sockets().remove(&id);
        self.metrics.connections.dec();
        tracing::debug!(connection = id.0, code, "socket closed");
    }

    async fn run_socket<S, E, C: Client>(
        &self,
        mut socket: S,
        direct: Option<Arc<dyn Direct>>,
        client: impl FnOnce(Line) -> C,
        mut closed: oneshot::Receiver<Close>,
    ) -> u16
    where
        S: Stream<Item = Result<WsMessage, E>> + Sink<WsMessage> + Send + Unpin,
    {
        let (out, queue) = Outbox::new(direct);
        let credit = Arc::new(Semaphore::new(UNANSWERED_UPDATES_MAX));
        let mut client = client(Line {
            out,
            credit: credit.clone(),
        });
        let mut batch = Vec::new();
        let mut heard = Instant::now();
        let mut pace = Pace::<MESSAGES_PER_SECOND_MAX, MESSAGES_BURST>::new(heard);
        let mut looks = interval(PULSE_EVERY);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let close = 'serve: loop {
            let now = Instant::now();
            // Before what has come meanwhile: rights may end now.
            if client.wakes_at().is_some_and(|at| at <= now)
                && let Some(close) = client.woken()
            {
                break 'serve close;
            }
            let wakes_at = client.wakes_at();
            let even_at = pace.even_at();
            let is_read = 0 < credit.available_permits() && even_at <= now;
            tokio::select! {
                biased;
                close = &mut closed => {
                    break close.unwrap_or_else(|_| Close::new(CLOSE_RESTART, ""));
                }
                taken = queue.take(&mut batch) => match taken {
                    Taken::End(connection, close) => {
                        if let Some(close) = client.ended(connection, close) {
                            break close;
                        }
                    }
                    Taken::Frames(count, bytes) => {
                        let begun = Instant::now();
                        self.metrics.deliveries.inc_by(batch.len() as u64);
                        let sent = async {
                            for frame in batch.drain(..) {
                                socket.feed(WsMessage::Binary(frame)).await?;
                            }
                            socket.flush().await
                        };
                        if !matches!(timeout(time_to_take(bytes), sent).await, Ok(Ok(()))) {
                            return 1006;
                        }
                        if PULSE_EVERY < begun.elapsed() {
                            // It could not be heard meanwhile.
                            heard = Instant::now();
                        }
                        queue.sent(count, bytes, &mut batch);
                    }
                },
                _ = looks.tick() => {
                    // Who is not read cannot be heard.
                    if !is_read {
                        heard = Instant::now();
                    }
                    match pulse(heard.elapsed(), PING_AFTER, GONE_AFTER) {
                        Pulse::Well => {}
                        Pulse::Silent => {
                            let ping = socket.send(WsMessage::Ping(Bytes::new()));
                            let _ = timeout(PULSE_EVERY, ping).await;
                        }
                        Pulse::Gone => return 1006,
                    }
                }
                message = socket.next(), if is_read => {
                    heard = Instant::now();
                    let mut next = Some(message);
                    let mut count = 0;
                    while let Some(message) = next {
                        match received(message, &mut client) {
                            Ok(()) => count += 1,
                            Err(Some(close)) => break 'serve close,
                            Err(None) => return 1000,
                        }
                        // What came with it is taken in the same turn.
                        let more = count < MESSAGES_PER_TURN && 0 < credit.available_permits();
                        next = if more { socket.next().now_or_never() } else { None };
                    }
                    pace.take(count, heard);
                }
                // The room gives credit back; look again.
                _ = credit.acquire(), if credit.available_permits() == 0 => {}
                () = sleep_until(even_at), if !is_read && 0 < credit.available_permits() => {}
                () = sleep_until(wakes_at.unwrap_or(now)), if wakes_at.is_some() => {}
            }
        };
        let Close { code, mut reason } = close;
        tracing::debug!(code, reason, "closing a socket");
        reason.truncate(reason.floor_char_boundary(120));
        let farewell = WsMessage::Close(Some(CloseFrame {
            code,
            reason: reason.into(),
        }));
        let _ = timeout(Duration::from_secs(1), socket.send(farewell)).await;
        code
    }

    /// Passes on what a client sent, sharing the memory of its frame.
    fn pass(
        &self,
        membership: &Membership,
        line: &Line,
        message: &y_websocket::Message<'_>,
        frame: &Bytes,
    ) {
        if let Some(input) = FromSocket::of(membership.connection, message, frame) {
            if let FromSocket::Update { .. } = input {
                self.metrics.updates_received.inc();
                if let Ok(permit) = line.credit.try_acquire() {
                    permit.forget();
                }
            }
            let _ = membership.room.send(input);
        }
    }

    fn join(
        self: &Arc<Self>,
        document: &DocumentId,
        visitor: Visitor,
        family: Family,
        line: Line,
    ) -> Membership {
        let connection = self.next_connection();
        let mut rooms = self.lock_rooms();
        let entry = rooms.entry(document.clone()).or_insert_with(|| {
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            let (inputs, receiver) = queue::unbounded();
            let own_inputs = inputs.downgrade();
            let room = Room::new(self.clone(), document.clone(), id, receiver, own_inputs);
            self.tasks.spawn(Box::new(room).run());
            RoomEntry { id, inputs }
        });
        // The room leaves the table under this lock before it ends: this is heard.
        let _ = entry.inputs.send(FromSocket::Join {
            connection,
            visitor,
            family,
            line,
        });
        Membership {
            connection,
            room: entry.inputs.clone(),
        }
    }

    fn next_connection(&self) -> ConnectionId {
        ConnectionId(self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Takes an empty room out of the table, unless somebody has just joined.
    fn leave_table(
        &self,
        document: &DocumentId,
        id: u64,
        inputs: &queue::Receiver<FromSocket>,
    ) -> bool {
        let mut rooms = self.lock_rooms();
        let empty = inputs.is_empty();
        if empty && rooms.get(document).is_some_and(|entry| entry.id == id) {
            rooms.remove(document);
        }
        empty
    }

    fn roll(&self) -> MutexGuard<'_, StdRng> {
        self.random.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_rooms(&self) -> MutexGuard<'_, BTreeMap<DocumentId, RoomEntry>> {
        self.rooms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_sockets(&self) -> MutexGuard<'_, BTreeMap<ConnectionId, oneshot::Sender<Close>>> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes what came from a client. The error ends the socket, if need be with a word about why.
fn received<E>(
    message: Option<Result<WsMessage, E>>,
    client: &mut impl Client,
) -> Result<(), Option<Close>> {
    match message {
        Some(Ok(WsMessage::Binary(frame))) => client.received(&frame).map_err(Some),
        Some(Ok(WsMessage::Text(_))) => {
            let reason = "text frames are not part of the protocol";
            Err(Some(Close::new(1003, reason)))
        }
        Some(Ok(WsMessage::Ping(_) | WsMessage::Pong(_))) => Ok(()),
        Some(Ok(WsMessage::Close(_)) | Err(_)) | None => Err(None),
    }
}

/// How long a client may take to take so many bytes.
fn time_to_take(bytes: usize) -> Duration {
    let seconds = bytes / SLOWEST_BYTES_PER_SECOND;
    SEND_TIMEOUT + Duration::from_secs(seconds as u64)
}

/// A client of y-websocket or y-sweet.
struct OneDocument {
    edge: Arc<Edge>,
    membership: Membership,
    line: Line,
    /// When its token ends.
    until: Option<Instant>,
}

impl Client for OneDocument {
    fn received(&mut self, frame: &Bytes) -> Result<(), Close> {
        for message in y_websocket::parse(frame) {
            match message {
                Ok(message) => self
                    .edge
                    .pass(&self.membership, &self.line, &message, frame),
                Err(error) if error.is_violation() => {
                    let code = if error.is_too_large() {
                        CLOSE_TOO_LARGE
                    } else {
                        CLOSE_INVALID
                    };
                    return Err(Close::new(code, error.to_string()));
                }
                Err(error) => {
                    tracing::debug!(%error, "a frame was ignored");
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn ended(&mut self, _connection: ConnectionId, close: Close) -> Option<Close> {
        Some(close)
    }

    fn wakes_at(&self) -> Option<Instant> {
        self.until
    }

    fn woken(&mut self) -> Option<Close> {
        let reason = "the token has ended; come back with another";
        Some(Close::new(CLOSE_UNAUTHORIZED, reason))
    }
}
