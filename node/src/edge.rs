//! The part of a node that meets clients: a socket's life.
//!
//! Every node is an edge for every document. All sockets of one document share a [`room`], which keeps
//! one channel to the owner, wherever that is, and finds the new one when it moves; the sockets stay
//! open meanwhile. The room owns the receipts: it knows what each socket is owed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message as WsMessage};
use bytes::Bytes;
use collab_core::ids::{ConnectionId, DocumentId};
use collab_core::limits::DRAIN_CLOSES_PER_SECOND;
use collab_core::wire::y_websocket;
use futures::{Sink, SinkExt, Stream, StreamExt};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{sleep, timeout};

use crate::documents::Documents;
use crate::members::Members;
use crate::metrics::Metrics;
use crate::peers::Peers;
use crate::tasks::Tasks;

mod room;

use room::{FromSocket, Room};

/// Frames that may wait for a socket; one that is slower is closed and catches up when it comes back.
const SOCKET_QUEUE_FRAMES_MAX: usize = 8_192;
/// Updates of a socket that may wait for their receipt before the socket is no longer read.
const UNANSWERED_UPDATES_MAX: usize = 256;
/// A client that takes nothing for this long is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// What a client may do with a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// See it, and be seen.
    Read,
    /// Change it.
    Write,
}

/// Who is at a socket.
#[derive(Clone, Debug)]
pub struct Visitor {
    /// The authenticated user, or empty.
    pub author: String,
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
    inputs: mpsc::UnboundedSender<FromSocket>,
}

/// Why this side closes a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Close {
    code: u16,
    reason: String,
}

/// Service restart: come back, another node is there.
const CLOSE_RESTART: u16 = 1012;
/// Try again later.
const CLOSE_TRY_AGAIN: u16 = 1013;
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

    /// Serves a y-websocket client until either side closes.
    pub async fn serve<S, E>(self: Arc<Self>, socket: S, document: DocumentId, visitor: Visitor)
    where
        S: Stream<Item = Result<WsMessage, E>> + Sink<WsMessage> + Send + Unpin,
    {
        let connection = ConnectionId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (close, closed) = oneshot::channel();
        self.lock_sockets().insert(connection, close);
        self.metrics.connections.inc();
        let code = self
            .run_socket(socket, &document, visitor, connection, closed)
            .await;
        self.lock_sockets().remove(&connection);
        self.metrics.connections.dec();
        tracing::debug!(document.id = %document, connection = connection.0, code, "socket closed");
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

    async fn run_socket<S, E>(
        self: &Arc<Self>,
        socket: S,
        document: &DocumentId,
        visitor: Visitor,
        connection: ConnectionId,
        mut closed: oneshot::Receiver<Close>,
    ) -> u16
    where
        S: Stream<Item = Result<WsMessage, E>> + Sink<WsMessage> + Send + Unpin,
    {
        let (mut sink, mut stream) = socket.split();
        let (out, mut queue) = mpsc::channel::<Bytes>(SOCKET_QUEUE_FRAMES_MAX);
        let (kick, mut kicked) = oneshot::channel();
        let credit = Arc::new(tokio::sync::Semaphore::new(UNANSWERED_UPDATES_MAX));
        let room = self.join(document, connection, visitor, out, kick, credit.clone());
        let mut batch = Vec::new();
        let close = loop {
            tokio::select! {
                biased;
                kick = &mut kicked => {
                    // Without a word: the room's task has ended, which a reconnect mends.
                    break kick.unwrap_or_else(|_| Close { code: CLOSE_TRY_AGAIN, reason: "try again".to_owned() });
                }
                close = &mut closed => {
                    break close.unwrap_or_else(|_| Close { code: CLOSE_RESTART, reason: String::new() });
                }
                count = queue.recv_many(&mut batch, 256) => {
                    if count == 0 {
                        break Close { code: CLOSE_TRY_AGAIN, reason: "this socket is too slow".to_owned() };
                    }
                    self.metrics.deliveries.inc_by(count as u64);
                    let sent = async {
                        for frame in batch.drain(..) {
                            sink.feed(WsMessage::Binary(frame)).await?;
                        }
                        sink.flush().await
                    };
                    if let Ok(Ok(())) = timeout(SEND_TIMEOUT, sent).await {} else {
                        let _ = room.send(FromSocket::Leave { connection });
                        return 1006;
                    }
                }
                frame = stream.next(), if 0 < credit.available_permits() => match frame {
                    Some(Ok(WsMessage::Binary(frame))) => {
                        if let Err(error) = self.received(&room, connection, &frame, &credit) {
                            break Close { code: CLOSE_INVALID, reason: error };
                        }
                    }
                    Some(Ok(WsMessage::Text(_))) => {
                        let reason = "text frames are not part of the protocol".to_owned();
                        break Close { code: 1003, reason };
                    }
                    Some(Ok(WsMessage::Ping(_) | WsMessage::Pong(_))) => {}
                    Some(Ok(WsMessage::Close(_)) | Err(_)) | None => {
                        let _ = room.send(FromSocket::Leave { connection });
                        return 1000;
                    }
                },
                // The room gives credit back; look again.
                _ = credit.acquire(), if credit.available_permits() == 0 => {}
            }
        };
        let _ = room.send(FromSocket::Leave { connection });
        let code = close.code;
        tracing::debug!(document.id = %document, code, reason = close.reason, "closing a socket");
        let mut reason = close.reason;
        reason.truncate(reason.floor_char_boundary(120));
        let farewell = WsMessage::Close(Some(CloseFrame {
            code,
            reason: reason.into(),
        }));
        let _ = timeout(Duration::from_secs(1), sink.send(farewell)).await;
        code
    }

    /// Takes a frame of a client apart. The error is for the client.
    fn received(
        &self,
        room: &mpsc::UnboundedSender<FromSocket>,
        connection: ConnectionId,
        frame: &Bytes,
        credit: &tokio::sync::Semaphore,
    ) -> Result<(), String> {
        for message in y_websocket::parse(frame) {
            let message = match message {
                Ok(message) => message,
                Err(error) if error.is_violation() => return Err(error.to_string()),
                Err(error) => {
                    tracing::debug!(%error, "a frame was ignored");
                    return Ok(());
                }
            };
            if let Some(input) = FromSocket::of(connection, &message, frame) {
                if let FromSocket::Update { .. } = input {
                    self.metrics.updates_received.inc();
                    if let Ok(permit) = credit.try_acquire() {
                        permit.forget();
                    }
                }
                let _ = room.send(input);
            }
        }
        Ok(())
    }

    fn join(
        self: &Arc<Self>,
        document: &DocumentId,
        connection: ConnectionId,
        visitor: Visitor,
        out: mpsc::Sender<Bytes>,
        kick: oneshot::Sender<Close>,
        credit: Arc<tokio::sync::Semaphore>,
    ) -> mpsc::UnboundedSender<FromSocket> {
        let mut rooms = self.lock_rooms();
        let entry = rooms.entry(document.clone()).or_insert_with(|| {
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            let (inputs, receiver) = mpsc::unbounded_channel();
            let room = Room::new(self.clone(), document.clone(), id, receiver);
            self.tasks.spawn(room.run());
            RoomEntry { id, inputs }
        });
        // The room leaves the table under this lock before it ends: this is heard.
        let _ = entry.inputs.send(FromSocket::Join {
            connection,
            visitor,
            out,
            kick,
            credit,
        });
        entry.inputs.clone()
    }

    /// Takes an empty room out of the table, unless somebody has just joined.
    fn leave_table(
        &self,
        document: &DocumentId,
        id: u64,
        inputs: &mpsc::UnboundedReceiver<FromSocket>,
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
