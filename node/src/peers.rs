//! Streams between nodes: one from each edge to each owner, which carries every document they share.
//!
//! The edge dials. A stream that fails ends all of its channels, and their rooms look at the map again;
//! nothing is resent here, because what is not receipted is still in the clients.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::ws::{Message as AxumMessage, WebSocket};
use bytes::Bytes;
use collab_core::ids::DocumentId;
use collab_core::limits::FRAME_BYTES_MAX;
use collab_core::wire::relay::{Channel, ToEdge, ToOwner};
use futures::{SinkExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use uuid::Uuid;

use crate::documents::{Attachment, Documents, EdgeSender};
use crate::metrics::Metrics;

/// Path of the stream on the internal listener.
pub const STREAM_PATH: &str = "/peer/v1/stream";
/// A node that does not take a connection in this time is tried again later.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two signs of life.
const PING_EVERY: Duration = Duration::from_secs(1);
/// A stream without a sign of life for this long has failed.
const SILENCE_MAX: Duration = Duration::from_secs(4);
/// Snapshots of large documents pass as one message.
pub const STREAM_MESSAGE_BYTES_MAX: usize = 16 * FRAME_BYTES_MAX;

/// The streams that this node opened.
pub struct Peers {
    token: Option<String>,
    metrics: Metrics,
    links: Mutex<HashMap<Uuid, Link>>,
    next_link: AtomicU64,
    next_channel: AtomicU32,
}

struct Link {
    id: u64,
    commands: mpsc::UnboundedSender<Command>,
}

enum Command {
    Open(Channel, mpsc::UnboundedSender<ToEdge>),
    Send(Bytes),
    Close(Channel),
}

/// One document on a stream to its owner. Dropping it detaches.
pub struct RemoteChannel {
    channel: Channel,
    commands: mpsc::UnboundedSender<Command>,
}

impl RemoteChannel {
    /// Sends to the owner, unless the stream has failed, which the other half tells.
    pub fn send(&self, message: &ToOwner) {
        let _ = self
            .commands
            .send(Command::Send(message.encode(self.channel)));
    }
}

impl Drop for RemoteChannel {
    fn drop(&mut self) {
        self.send(&ToOwner::Detach);
        let _ = self.commands.send(Command::Close(self.channel));
    }
}

impl Peers {
    /// No stream is open yet.
    pub fn new(token: Option<String>, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self {
            token,
            metrics,
            links: Mutex::default(),
            next_link: AtomicU64::new(1),
            next_channel: AtomicU32::new(1),
        })
    }

    /// Opens a channel to a document on another node. The end of the second part means: the stream has failed.
    pub fn open(
        self: &Arc<Self>,
        incarnation: Uuid,
        address: &str,
        document: DocumentId,
        since: Bytes,
    ) -> (RemoteChannel, mpsc::UnboundedReceiver<ToEdge>) {
        let channel = Channel(self.next_channel.fetch_add(1, Ordering::Relaxed));
        let (sender, receiver) = mpsc::unbounded_channel();
        let commands = {
            let mut links = self.links();
            let link = links
                .entry(incarnation)
                .or_insert_with(|| self.start(incarnation, address));
            // A stream leaves the table under this lock before it ends: this is heard.
            let _ = link.commands.send(Command::Open(channel, sender));
            link.commands.clone()
        };
        let remote = RemoteChannel { channel, commands };
        remote.send(&ToOwner::Attach { document, since });
        (remote, receiver)
    }

    fn start(self: &Arc<Self>, incarnation: Uuid, address: &str) -> Link {
        let id = self.next_link.fetch_add(1, Ordering::Relaxed);
        let (commands, mut queue) = mpsc::unbounded_channel();
        let peers = self.clone();
        let address = address.to_owned();
        tokio::spawn(async move {
            peers.metrics.relay_links.inc();
            match run_link(&address, peers.token.as_deref(), &mut queue).await {
                Ok(()) => tracing::debug!(address, "a stream to another node ended"),
                Err(error) => tracing::info!(address, %error, "a stream to another node failed"),
            }
            peers.metrics.relay_links.dec();
            let mut links = peers.links();
            if links.get(&incarnation).is_some_and(|link| link.id == id) {
                links.remove(&incarnation);
            }
            // Channels that were opened meanwhile end here, with the queue.
            queue.close();
        });
        Link { id, commands }
    }

    fn links(&self) -> MutexGuard<'_, HashMap<Uuid, Link>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn run_link(
    address: &str,
    token: Option<&str>,
    queue: &mut mpsc::UnboundedReceiver<Command>,
) -> Result<(), tungstenite::Error> {
    let mut request = format!("ws://{address}{STREAM_PATH}").into_client_request()?;
    if let Some(token) = token
        && let Ok(value) = format!("Bearer {token}").parse()
    {
        request.headers_mut().insert("authorization", value);
    }
    let config = WebSocketConfig::default()
        .max_message_size(Some(STREAM_MESSAGE_BYTES_MAX))
        .max_frame_size(Some(STREAM_MESSAGE_BYTES_MAX));
    let connect = tokio_tungstenite::connect_async_with_config(request, Some(config), true);
    let timed_out = || tungstenite::Error::Io(std::io::ErrorKind::TimedOut.into());
    let (stream, _) = timeout(CONNECT_TIMEOUT, connect)
        .await
        .map_err(|_| timed_out())??;
    let (mut sink, mut stream) = stream.split();
    let mut channels = HashMap::<Channel, mpsc::UnboundedSender<ToEdge>>::new();
    let mut batch = Vec::new();
    let mut heard = Instant::now();
    let mut ping = interval(PING_EVERY);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            count = queue.recv_many(&mut batch, 256) => {
                if count == 0 {
                    return Ok(());
                }
                for command in batch.drain(..) {
                    match command {
                        Command::Open(channel, sender) => {
                            channels.insert(channel, sender);
                        }
                        Command::Send(frame) => sink.feed(Message::Binary(frame)).await?,
                        Command::Close(channel) => {
                            channels.remove(&channel);
                        }
                    }
                }
                sink.flush().await?;
            }
            message = stream.next() => {
                heard = Instant::now();
                match message {
                    Some(Ok(Message::Binary(frame))) => match ToEdge::decode(frame) {
                        Ok((channel, message)) => {
                            if let Some(sender) = channels.get(&channel) {
                                // A room that has gone on is closing its channel.
                                let _ = sender.send(message);
                            }
                        }
                        Err(error) => tracing::warn!(%error, "a frame of another node was ignored"),
                    },
                    Some(Ok(Message::Close(_))) | None => return Ok(()),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(error),
                }
            }
            _ = ping.tick() => {
                if SILENCE_MAX <= heard.elapsed() {
                    return Err(timed_out());
                }
                sink.send(Message::Ping(Bytes::new())).await?;
            }
        }
    }
}

/// Serves the stream of another node's edge until either side ends it.
pub async fn serve(socket: WebSocket, documents: Arc<Documents>, metrics: Metrics) {
    metrics.relay_links.inc();
    let (mut sink, mut stream) = socket.split();
    let (out, mut queue) = mpsc::unbounded_channel::<Bytes>();
    let mut attachments = HashMap::<Channel, Attachment>::new();
    let mut batch = Vec::new();
    let mut heard = Instant::now();
    let mut look = interval(PING_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            count = queue.recv_many(&mut batch, 256) => {
                if count == 0 {
                    break;
                }
                let sent = async {
                    for frame in batch.drain(..) {
                        sink.feed(AxumMessage::Binary(frame)).await?;
                    }
                    sink.flush().await
                };
                if !matches!(timeout(SILENCE_MAX, sent).await, Ok(Ok(()))) {
                    break;
                }
            }
            message = stream.next() => {
                heard = Instant::now();
                match message {
                    Some(Ok(AxumMessage::Binary(frame))) => match ToOwner::decode(frame) {
                        Ok((channel, message)) => {
                            from_edge(&documents, &out, &mut attachments, channel, message);
                        }
                        Err(error) => tracing::warn!(%error, "a frame of another node was ignored"),
                    },
                    Some(Ok(AxumMessage::Close(_)) | Err(_)) | None => break,
                    Some(Ok(_)) => {}
                }
            }
            _ = look.tick() => {
                if SILENCE_MAX <= heard.elapsed() {
                    break;
                }
            }
        }
    }
    metrics.relay_links.dec();
}

fn from_edge(
    documents: &Arc<Documents>,
    out: &mpsc::UnboundedSender<Bytes>,
    attachments: &mut HashMap<Channel, Attachment>,
    channel: Channel,
    message: ToOwner,
) {
    match message {
        ToOwner::Attach { document, since } => {
            let sender = EdgeSender::Remote(out.clone(), channel);
            attachments.insert(channel, documents.attach(&document, since, sender));
        }
        ToOwner::Detach => {
            attachments.remove(&channel);
        }
        message => {
            let open = attachments
                .get(&channel)
                .is_some_and(|attachment| attachment.send(message));
            if !open && attachments.remove(&channel).is_some() {
                // The document was let go; whoever asks next finds its owner.
                let moved = ToEdge::Moved {
                    epoch: collab_core::ids::Epoch(0),
                };
                let _ = out.send(moved.encode(channel));
            }
        }
    }
}
