//! Streams between nodes: one from each edge to each owner, which carries every document they share.
//!
//! The edge dials. A stream that fails ends all of its channels, and their rooms look at the map again;
//! nothing is resent here, because what is not receipted is still in the clients.
//!
//! A node keeps a stream to every other member, whether or not a document needs it: its end is the
//! first sign that a process has died. If then the address refuses a connection, or another incarnation
//! answers there, nothing is left of that process, and its lease is ended early.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use collab_core::control::Silence;
use collab_core::ids::{DocumentId, Epoch, NodeId};
use collab_core::limits::{LEASE, SILENT_AFTER};
use collab_core::wire::map::SharedMap;
use collab_core::wire::relay::{Channel, ToEdge, ToOwner};
use futures::future::join_all;
use futures::{SinkExt, StreamExt};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use uuid::Uuid;

use crate::documents::{Attachment, Documents, EdgeSender};
use crate::members::{Map, Members};
use crate::metrics::Metrics;
use crate::queue;
use crate::tasks::Tasks;

pub mod link;
pub mod websocket;

use link::{Dial, Frame, Link, LinkError};

/// A node that does not take a connection in this time is tried again later.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Between two signs of life.
const PING_EVERY: Duration = Duration::from_secs(1);
/// A stream without a sign of life for this long has failed.
const SILENCE_MAX: Duration = Duration::from_secs(4);
/// A member that does not tell its map in this time is passed over.
const MAP_ANSWER_WAIT: Duration = Duration::from_millis(500);
/// Before a member that could not be reached is tried again, unless a document asks for it.
const REDIAL_EVERY: Duration = Duration::from_millis(250);
/// Between two tries to find out what became of the process behind a lost stream.
const EXAMINE_EVERY: Duration = Duration::from_millis(20);
/// Frames that are sent before the other direction gets its turn.
const TURN_FRAMES_MAX: usize = 256;

/// The streams that this node opened.
pub struct Peers {
    dial: Arc<dyn Dial>,
    members: Arc<Members>,
    metrics: Metrics,
    tasks: Tasks,
    links: Mutex<BTreeMap<Uuid, Opened>>,
    /// When the process at an address was last heard, over all streams to it.
    heard: Mutex<BTreeMap<String, Heard>>,
    next_link: AtomicU64,
    next_channel: AtomicU32,
}

struct Heard {
    /// The node, once its process was seen as a member.
    node: Option<NodeId>,
    last: Arc<Mutex<Instant>>,
    /// When a process at this address was last a member.
    a_member: Instant,
}

impl Default for Heard {
    fn default() -> Self {
        let now = Instant::now();
        Self {
            node: None,
            last: Arc::new(Mutex::new(now)),
            a_member: now,
        }
    }
}

struct Opened {
    id: u64,
    commands: queue::Sender<Command>,
}

enum Command {
    Open(Channel, queue::Sender<ToEdge>),
    Send(Bytes),
    Close(Channel),
}

/// One document on a stream to its owner. Dropping it detaches.
pub struct RemoteChannel {
    channel: Channel,
    commands: queue::Sender<Command>,
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
    pub fn new(
        dial: Arc<dyn Dial>,
        members: Arc<Members>,
        metrics: Metrics,
        tasks: Tasks,
    ) -> Arc<Self> {
        Arc::new(Self {
            dial,
            members,
            metrics,
            tasks,
            links: Mutex::default(),
            heard: Mutex::default(),
            next_link: AtomicU64::new(1),
            next_channel: AtomicU32::new(1),
        })
    }

    /// Keeps a stream to every other member, for as long as this runs.
    pub async fn follow_members(self: Arc<Self>) {
        let mut map = self.members.watch();
        loop {
            {
                let (me, map) = (self.members.incarnation(), map.get());
                let mut links = self.links();
                for (incarnation, address) in map.peers(me, Instant::now()) {
                    self.stream(&mut links, incarnation, address);
                }
                // A stream that documents still use goes on without its entry, until they let go of it.
                links.retain(|incarnation, _| map.is_member(*incarnation));
            }
            self.members.set_silences(self.silences(&map.get()));
            let _ = timeout(REDIAL_EVERY, map.changed()).await;
        }
    }

    /// The members that were not heard for a while. Whoever has just come is given that time, but not who was fenced and goes
    /// on as another incarnation.
    fn silences(&self, map: &Map) -> Vec<Silence> {
        let now = Instant::now();
        let mut known = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        for (incarnation, address) in map.peers(self.members.incarnation(), now) {
            let heard = known.entry(address.to_owned()).or_default();
            heard.a_member = now;
            heard.node = map.node_of(incarnation).cloned();
        }
        known.retain(|_, Heard { last, a_member, .. }| {
            let has_stream = 1 < Arc::strong_count(last);
            has_stream || now < *a_member + LEASE
        });
        let silent = known.values().filter_map(|heard| {
            let last = *heard.last.lock().unwrap_or_else(PoisonError::into_inner);
            let silent = now.saturating_duration_since(last);
            let node = heard.node.clone().filter(|_| SILENT_AFTER <= silent)?;
            let ms = u64::try_from(silent.as_millis()).unwrap_or(u64::MAX);
            Some(Silence { node, ms })
        });
        silent.collect()
    }

    fn last_heard(&self, address: &str) -> Arc<Mutex<Instant>> {
        let mut known = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        known.entry(address.to_owned()).or_default().last.clone()
    }

    /// Opens a channel to a document on another node. The end of the second part means: the stream has failed.
    pub fn open(
        self: &Arc<Self>,
        incarnation: Uuid,
        address: &str,
        document: DocumentId,
        since: Bytes,
    ) -> (RemoteChannel, queue::Receiver<ToEdge>) {
        let (remote, receiver) = self.channel(incarnation, address);
        remote.send(&ToOwner::Attach { document, since });
        (remote, receiver)
    }

    /// Has the node that is about to own documents read them beforehand. Answers when it has, or when the stream fails.
    pub async fn preload(
        self: &Arc<Self>,
        incarnation: Uuid,
        address: &str,
        documents: Vec<DocumentId>,
    ) {
        let (remote, mut answers) = self.channel(incarnation, address);
        let mut unanswered = documents.len();
        for document in documents {
            remote.send(&ToOwner::Preload { document });
        }
        while 0 < unanswered
            && let Some(answer) = answers.recv().await
        {
            if answer == ToEdge::Preloaded {
                unanswered -= 1;
            }
        }
    }

    /// Asks every member to which there is a stream for its map, and takes what is newer. Answers how many told theirs.
    pub async fn ask_for_maps(self: &Arc<Self>) -> usize {
        let now = Instant::now();
        let map = self.members.map();
        let others = map
            .members()
            .map(|member| (member.incarnation, member.address.clone()));
        let others = others.filter(|(incarnation, address)| {
            *incarnation != self.members.incarnation() && !address.is_empty()
        });
        let asked = others.map(|(incarnation, address)| async move {
            let (remote, mut answers) = self.channel(incarnation, &address);
            remote.send(&ToOwner::AskMap);
            match timeout(MAP_ANSWER_WAIT, answers.recv()).await {
                Ok(Some(ToEdge::Map { map })) => SharedMap::decode(&map),
                _ => None,
            }
        });
        let told: Vec<SharedMap> = join_all(asked).await.into_iter().flatten().collect();
        for shared in &told {
            self.members.learn_from_peer(shared, now);
        }
        told.len()
    }

    fn channel(
        self: &Arc<Self>,
        incarnation: Uuid,
        address: &str,
    ) -> (RemoteChannel, queue::Receiver<ToEdge>) {
        let channel = Channel(self.next_channel.fetch_add(1, Ordering::Relaxed));
        let (sender, receiver) = queue::unbounded();
        let commands = {
            let mut links = self.links();
            let commands = self.stream(&mut links, incarnation, address);
            // A stream leaves the table under this lock before it ends: this is heard.
            let _ = commands.send(Command::Open(channel, sender));
            commands
        };
        (RemoteChannel { channel, commands }, receiver)
    }

    /// The stream to a member, which is opened if there is none.
    fn stream(
        self: &Arc<Self>,
        links: &mut BTreeMap<Uuid, Opened>,
        incarnation: Uuid,
        address: &str,
    ) -> queue::Sender<Command> {
        let opened = links
            .entry(incarnation)
            .or_insert_with(|| self.start(incarnation, address));
        opened.commands.clone()
    }

    fn start(self: &Arc<Self>, incarnation: Uuid, address: &str) -> Opened {
        let id = self.next_link.fetch_add(1, Ordering::Relaxed);
        let (commands, mut queue) = queue::unbounded();
        let peers = self.clone();
        let address = address.to_owned();
        self.tasks.spawn(async move {
            let lost = match peers.dial(&address, incarnation).await {
                Ok(link) => {
                    peers.metrics.relay_links.inc();
                    let heard = peers.last_heard(&address);
                    match run_link(link, &mut queue, &heard).await {
                        Ok(()) => tracing::debug!(address, "a stream to another node ended"),
                        Err(error) => {
                            tracing::info!(address, %error, "a stream to another node failed");
                        }
                    }
                    peers.metrics.relay_links.dec();
                    Some(Instant::now())
                }
                Err(error) => {
                    tracing::debug!(address, %error, "another node cannot be reached");
                    None
                }
            };
            {
                let mut links = peers.links();
                if links.get(&incarnation).is_some_and(|link| link.id == id) {
                    links.remove(&incarnation);
                }
                // Channels that were opened meanwhile end here, with the queue.
                queue.close();
            }
            if let Some(lost) = lost {
                peers.examine(&address, incarnation, lost).await;
            }
        });
        Opened { id, commands }
    }

    /// Opens a link to an incarnation, and to no other process at its address.
    async fn dial(&self, address: &str, incarnation: Uuid) -> Result<Link, LinkError> {
        let link = timeout(CONNECT_TIMEOUT, self.dial.dial(address))
            .await
            .map_err(|_| LinkError::Silent)??;
        // A node of an older version does not say who it is.
        match link.answers {
            Some(answers) if answers != incarnation => Err(LinkError::AnotherAnswers),
            _ => Ok(link),
        }
    }

    /// Finds out whether the process behind a lost stream is gone, and if so has its lease ended.
    async fn examine(&self, address: &str, incarnation: Uuid, lost: Instant) {
        while lost.elapsed() < LEASE && self.members.map().is_member(incarnation) {
            match self.dial(address, incarnation).await {
                Ok(_) => return,
                Err(LinkError::Refused | LinkError::AnotherAnswers) => {
                    tracing::info!(address, %incarnation, "the process of another node is gone");
                    return self.members.fence_early(incarnation, lost).await;
                }
                // The listener of a process that is ending may still take a connection.
                Err(LinkError::Silent | LinkError::Broken(_)) => sleep(EXAMINE_EVERY).await,
            }
        }
    }

    fn links(&self) -> MutexGuard<'_, BTreeMap<Uuid, Opened>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn run_link(
    link: Link,
    queue: &mut queue::Receiver<Command>,
    last_heard: &Mutex<Instant>,
) -> Result<(), LinkError> {
    let Link {
        mut outgoing,
        mut incoming,
        ..
    } = link;
    let mut channels = BTreeMap::<Channel, queue::Sender<ToEdge>>::new();
    let mut heard = Instant::now();
    let note = |at| *last_heard.lock().unwrap_or_else(PoisonError::into_inner) = at;
    note(heard);
    let mut ping = interval(PING_EVERY);
    ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let mut next = None;
        tokio::select! {
            biased;
            _ = ping.tick() => {
                if SILENCE_MAX <= heard.elapsed() {
                    return Err(LinkError::Silent);
                }
                outgoing.send(Frame::Alive).await?;
            }
            frame = incoming.next() => {
                heard = Instant::now();
                note(heard);
                match frame.transpose()? {
                    Some(Frame::Data(frame)) => match ToEdge::decode(frame) {
                        Ok((channel, message)) => {
                            if let Some(sender) = channels.get(&channel) {
                                // A room that has gone on is closing its channel.
                                let _ = sender.send(message);
                            }
                        }
                        Err(error) => tracing::warn!(%error, "a frame of another node was ignored"),
                    },
                    Some(Frame::Alive) => {}
                    None => return Ok(()),
                }
            }
            command = queue.recv() => match command {
                Some(command) => next = Some(command),
                None => return Ok(()),
            },
        }
        // Whatever woke it, both directions get their turn.
        let sent = async {
            let mut fed = false;
            for _ in 0..TURN_FRAMES_MAX {
                let Some(command) = next.take().or_else(|| queue.try_recv().ok()) else {
                    break;
                };
                match command {
                    Command::Open(channel, sender) => {
                        channels.insert(channel, sender);
                    }
                    Command::Send(frame) => {
                        outgoing.feed(Frame::Data(frame)).await?;
                        fed = true;
                    }
                    Command::Close(channel) => {
                        channels.remove(&channel);
                    }
                }
            }
            if fed {
                outgoing.flush().await?;
            }
            Ok(())
        };
        timeout(SILENCE_MAX, sent)
            .await
            .unwrap_or(Err(LinkError::Silent))?;
    }
}

/// Serves the stream of another node's edge until either side ends it.
pub async fn serve(link: Link, documents: Arc<Documents>, metrics: Metrics) {
    metrics.relay_links.inc();
    if let Err(error) = run_served(link, &documents).await {
        tracing::debug!(%error, "a stream of another node failed");
    }
    metrics.relay_links.dec();
}

async fn run_served(link: Link, documents: &Arc<Documents>) -> Result<(), LinkError> {
    let Link {
        mut outgoing,
        mut incoming,
        ..
    } = link;
    let (out, mut queue) = queue::unbounded::<Bytes>();
    let mut attachments = BTreeMap::<Channel, Attachment>::new();
    let mut heard = Instant::now();
    let mut look = interval(PING_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let mut next = None;
        tokio::select! {
            biased;
            _ = look.tick() => {
                if SILENCE_MAX <= heard.elapsed() {
                    return Err(LinkError::Silent);
                }
            }
            frame = incoming.next() => {
                heard = Instant::now();
                match frame.transpose()? {
                    Some(Frame::Data(frame)) => match ToOwner::decode(frame) {
                        Ok((channel, message)) => {
                            from_edge(documents, &out, &mut attachments, channel, message);
                        }
                        Err(error) => tracing::warn!(%error, "a frame of another node was ignored"),
                    },
                    Some(Frame::Alive) => {}
                    None => return Ok(()),
                }
            }
            // This function holds a sender: there is a next one.
            frame = queue.recv() => next = frame,
        }
        let sent = async {
            let mut fed = false;
            for _ in 0..TURN_FRAMES_MAX {
                let Some(frame) = next.take().or_else(|| queue.try_recv().ok()) else {
                    break;
                };
                outgoing.feed(Frame::Data(frame)).await?;
                fed = true;
            }
            if fed {
                outgoing.flush().await?;
            }
            Ok(())
        };
        timeout(SILENCE_MAX, sent)
            .await
            .unwrap_or(Err(LinkError::Silent))?;
    }
}

fn from_edge(
    documents: &Arc<Documents>,
    out: &queue::Sender<Bytes>,
    attachments: &mut BTreeMap<Channel, Attachment>,
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
        ToOwner::AskMap => {
            let map = documents.shared_map().encode().into();
            let _ = out.send(ToEdge::Map { map }.encode(channel));
        }
        ToOwner::Preload { document } => {
            let out = out.clone();
            documents.preload(document, move || {
                let _ = out.send(ToEdge::Preloaded.encode(channel));
            });
        }
        message => {
            let open = attachments
                .get(&channel)
                .is_some_and(|attachment| attachment.send(message));
            if !open && attachments.remove(&channel).is_some() {
                // The document was let go; whoever asks next finds its owner.
                let moved = ToEdge::Moved { epoch: Epoch(0) };
                let _ = out.send(moved.encode(channel));
            }
        }
    }
}
