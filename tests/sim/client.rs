//! A client as browsers have it: a Yjs document, and the behaviour of stock y-websocket around it.
//!
//! On opening it sends step 1; it answers the server's step 1; it sends each own edit at once if it is
//! connected, and otherwise leaves it to the next answer; it comes back with a growing pause after a
//! close and gives up a socket on which it hears nothing for half a minute. Tabs of one browser give
//! each other what they type.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::extract::ws::Message as WsMessage;
use bytes::Bytes;
use collab_core::ids::DocumentId;
use collab_core::wire::varint::write_var_uint;
use collab_core::wire::y_sweet;
use collab_core::wire::y_websocket::{self, Message};
use collab_node::edge::{Access, Family};
use futures::{Sink, Stream};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::PollSender;
use yrs::updates::decoder::Decode;
use yrs::updates::encoder::Encode;
use yrs::{ClientID, GetString, ReadTxn, StateVector, Text, Transact};

use crate::ledger::{Change, TOKEN_LENGTH, parsed, spelled};
use crate::network::{Connection, Host};
use crate::replica::Replica;
use crate::witness::{Sent, Witness, text};
use crate::world::World;

/// y-websocket: a socket without a message for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// A socket that does not open in this time is given up.
const OPEN_TIMEOUT: Duration = Duration::from_secs(4);
/// y-websocket: the longest pause before it comes back.
const BACKOFF_MAX: Duration = Duration::from_millis(2_500);

/// With more tokens than these, most edits take one out.
const TOKENS_MAX: u32 = 300;

/// What the world wants of a client.
#[derive(Debug)]
pub(crate) enum Command {
    /// Go offline for a while, and type on.
    Offline(Duration),
    /// Come back online now.
    Online,
    /// Ask for a receipt of what waits for one: its echo would not tell any more.
    Ask,
    /// Type no more.
    Rest,
    /// Close the tab.
    Depart,
}

/// A client as others see it.
#[derive(Clone)]
pub(crate) struct Handle {
    pub(crate) number: usize,
    pub(crate) document: DocumentId,
    pub(crate) replica: Replica,
    pub(crate) commands: mpsc::UnboundedSender<Command>,
    /// What it has typed and was not told to be durable.
    pub(crate) pending: Arc<Mutex<BTreeMap<Change, Instant>>>,
    /// The browser that it is a tab of.
    pub(crate) browser: usize,
    /// Another tab has had what was typed here: bytes that come back may be that one's.
    pub(crate) shares: Arc<AtomicBool>,
    /// It may read only, and types all the same: a changed page, or an older token.
    pub(crate) reader: bool,
}

struct Client {
    handle: Handle,
    world: Arc<World>,
    witness: Arc<Witness>,
    random: StdRng,
    commands: mpsc::UnboundedReceiver<Command>,
    connection: Option<Open>,
    /// What went on the newest connection, be it open or not.
    sent: Arc<Mutex<Sent>>,
    failures: u32,
    retry_at: Instant,
    offline_until: Option<Instant>,
    next_edit: Instant,
    rests: bool,
    /// Asks for receipts, as y-sweet's client does; else it watches for echoes.
    explicit: bool,
    asked: u64,
    edit_every: u64,
    deletes: u32,
}

/// A socket, from the first packet on.
struct Open {
    link: Arc<Connection>,
    to: mpsc::Sender<(Instant, WsMessage)>,
    from: mpsc::Receiver<Arrival>,
    upgraded: bool,
    heard: Instant,
}

/// What arrives at a client.
#[derive(Debug)]
pub(crate) enum Arrival {
    /// The handshake is done.
    Opened,
    /// A frame, or a close.
    Message(WsMessage),
}

/// The node's end of a client's socket.
pub(crate) struct Socket {
    pub(crate) from: mpsc::Receiver<WsMessage>,
    pub(crate) to: PollSender<(Instant, Arrival)>,
    pub(crate) document: DocumentId,
    pub(crate) sent: Arc<Mutex<Sent>>,
    pub(crate) witness: Arc<Witness>,
    pub(crate) client: usize,
    pub(crate) access: Access,
    pub(crate) family: Family,
}

impl Stream for Socket {
    type Item = Result<WsMessage, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let arrived = self.from.poll_recv(context);
        if let Poll::Ready(Some(WsMessage::Binary(frame))) = &arrived {
            let mut sent = self.sent.lock().expect("nobody panics with it");
            for message in y_websocket::parse(frame).flatten() {
                if let Message::Update { update } = message {
                    sent.arrived(update);
                }
            }
        }
        arrived.map(|message| message.map(Ok))
    }
}

impl Sink<WsMessage> for Socket {
    type Error = ();

    fn poll_ready(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<(), ()>> {
        let ready = self.to.poll_reserve(context);
        if ready.is_pending() {
            let mut sent = self.sent.lock().expect("nobody panics with it");
            sent.is_full();
        }
        ready.map_err(|_| ())
    }

    fn start_send(mut self: Pin<&mut Self>, message: WsMessage) -> Result<(), ()> {
        if let WsMessage::Binary(frame) = &message {
            self.witness
                .trace(|| format!("edge to {} {}", self.client, summary(frame)));
            let sent = self.sent.lock().expect("nobody panics with it");
            self.witness.frame_leaves(&self.document, frame, &sent);
        }
        self.to
            .send_item((Instant::now(), Arrival::Message(message)))
            .map_err(|_| ())
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), ()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), ()>> {
        Poll::Ready(Ok(()))
    }
}

/// The Yjs client id of a client.
pub(crate) const fn id_of(number: usize) -> ClientID {
    ClientID::new(number as u64 + 1)
}

/// Starts a client.
pub(crate) fn start(
    world: &Arc<World>,
    number: usize,
    browser: usize,
    document: DocumentId,
    reader: bool,
    seed: u64,
) -> Handle {
    let (commands, receiver) = mpsc::unbounded_channel();
    let handle = Handle {
        number,
        document,
        replica: Replica::of(id_of(number)),
        commands,
        pending: Arc::default(),
        browser,
        shares: Arc::default(),
        reader,
    };
    // A new tab has first what the others have.
    for tab in world.other_tabs(browser, &handle.document, number) {
        let all = tab.replica.encode_state_as_update(&StateVector::default());
        handle.replica.apply(&all);
        tab.shares.store(true, Ordering::Relaxed);
        let _ = tab.commands.send(Command::Ask);
    }
    let mut random = StdRng::seed_from_u64(seed);
    let settings = &world.settings;
    let client = Client {
        handle: handle.clone(),
        world: world.clone(),
        witness: world.witness.clone(),
        commands: receiver,
        connection: None,
        sent: Arc::default(),
        failures: 0,
        retry_at: Instant::now() + Duration::from_millis(random.random_range(0..500)),
        offline_until: None,
        next_edit: Instant::now() + Duration::from_millis(random.random_range(0..1_000)),
        rests: false,
        explicit: random.random_ratio(settings.explicit, 100),
        asked: 0,
        edit_every: settings.edit_every,
        deletes: settings.deletes,
        random,
    };
    tokio::spawn(client.run());
    handle
}

impl Client {
    async fn run(mut self) {
        loop {
            let offline = self.offline_until;
            let retry_at = self.retry_at;
            let idle = self.connection.is_none() && offline.is_none();
            let silent_at = self.connection.as_ref().map(|open| {
                let patience = if open.upgraded {
                    SILENCE_MAX
                } else {
                    OPEN_TIMEOUT
                };
                open.heard + patience
            });
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    Some(Command::Offline(length)) => {
                        self.offline_until = Some(Instant::now() + length);
                        self.connection = None;
                    }
                    Some(Command::Online) => {
                        self.offline_until = None;
                        self.retry_at = Instant::now();
                    }
                    // Whose socket is not open yet asks with its first answer.
                    Some(Command::Ask) => {
                        if self.connection.as_ref().is_some_and(|open| open.upgraded) {
                            self.ask();
                        }
                    }
                    Some(Command::Rest) => self.rests = true,
                    Some(Command::Depart) | None => return,
                },
                arrival = arrival(&mut self.connection) => match arrival {
                    Some(arrival) => self.arrived(arrival),
                    None => self.closed(),
                },
                () = sleep_until(self.next_edit), if !self.rests => self.edit(),
                () = sleep_until(retry_at), if idle => self.connect(),
                () = at(offline) => {
                    self.offline_until = None;
                    self.retry_at = Instant::now();
                }
                () = at(silent_at) => self.closed(),
            }
        }
    }

    fn connect(&mut self) {
        let shares = self.handle.shares.clone();
        let earlier = self.sent().all();
        let sent = Sent::by(self.handle.reader, shares).after(earlier);
        self.sent = Arc::new(Mutex::new(sent));
        let pod = self.world.pod_for_client(&mut self.random);
        let host = Host::Client(self.handle.number);
        let link = self.world.network.connection(host, Host::Pod(pod));
        let (to, inbound) = self
            .world
            .network
            .pipe(&link, (host, Host::Pod(pod)), 4_096);
        let (outbound, from) = self.world.network.pipe(&link, (Host::Pod(pod), host), 64);
        let socket = Socket {
            from: inbound,
            to: PollSender::new(outbound),
            document: self.handle.document.clone(),
            sent: self.sent.clone(),
            witness: self.witness.clone(),
            client: self.handle.number,
            access: if self.handle.reader {
                Access::Read
            } else {
                Access::Write
            },
            family: if self.explicit {
                Family::YSweet
            } else {
                Family::YWebsocket
            },
        };
        self.witness
            .trace(|| format!("client {} dials pod {pod}", self.handle.number));
        self.world.arrive(pod, host, &link, socket);
        self.connection = Some(Open {
            link,
            to,
            from,
            upgraded: false,
            heard: Instant::now(),
        });
    }

    fn closed(&mut self) {
        let Some(open) = self.connection.take() else {
            return;
        };
        self.witness
            .trace(|| format!("client {} lost its socket", self.handle.number));
        self.failures = if open.upgraded { 0 } else { self.failures + 1 };
        let pause = Duration::from_millis(100) * 2_u32.pow(self.failures.min(6));
        let jitter = self.random.random_range(0.5..1.0);
        self.retry_at = Instant::now() + pause.min(BACKOFF_MAX).mul_f64(jitter);
    }

    fn arrived(&mut self, arrival: Arrival) {
        let Some(open) = &mut self.connection else {
            return;
        };
        open.heard = Instant::now();
        match arrival {
            Arrival::Opened => {
                open.upgraded = true;
                let state_vector = self.handle.replica.transact().state_vector().encode_v1();
                self.send(y_websocket::sync_step1(&state_vector));
                let mut presence = Vec::new();
                for number in [1, self.handle.number as u64 + 1, 1] {
                    write_var_uint(&mut presence, number);
                }
                presence.extend_from_slice(b"\x02{}");
                self.send(y_websocket::awareness(&presence));
            }
            Arrival::Message(WsMessage::Binary(frame)) => {
                for message in y_websocket::parse(&frame) {
                    let message = message.expect("a node sends what a client understands");
                    self.take(&message);
                }
            }
            Arrival::Message(_) => self.closed(),
        }
    }

    fn take(&mut self, message: &Message<'_>) {
        match *message {
            Message::SyncStep1 { state_vector } => {
                let known = StateVector::decode_v1(state_vector).expect("a node sends one");
                let update = self.handle.replica.encode_state_as_update(&known);
                // With it the server has all that this client has typed. Another client may answer with the
                // same bytes: seeing them come back says nothing, so a receipt is asked for.
                self.send(y_websocket::sync_step2(&update));
                self.ask();
            }
            Message::SyncStep2 { update } | Message::Update { update } => {
                let change = self.sent().echoed(update);
                let shares = self.handle.shares.load(Ordering::Relaxed);
                if let Some(change) = change.filter(|_| !shares) {
                    self.acked(&[change]);
                }
                self.handle.replica.apply(update);
            }
            Message::Saved { payload } => {
                let changes = self.sent().asked(payload).map(<[Change]>::to_vec);
                self.acked(&changes.unwrap_or_default());
            }
            Message::Awareness(_) | Message::QueryAwareness | Message::PermissionDenied { .. } => {}
        }
    }

    fn acked(&mut self, changes: &[Change]) {
        let mut pending = self.handle.pending.lock().expect("nobody panics with it");
        self.witness.with_ledger(|ledger| {
            for change in changes {
                if pending.remove(change).is_some() {
                    ledger.acked(*change);
                }
            }
        });
    }

    fn edit(&mut self) {
        let pause = self
            .random
            .random_range(self.edit_every / 2..=self.edit_every * 3 / 2);
        self.next_edit = Instant::now() + Duration::from_millis(pause.max(1));
        let replica = self.handle.replica.clone();
        let quill = replica.get_or_insert_text("quill");
        let tokens = quill.len(&replica.transact()) / TOKEN_LENGTH;
        let deletes = if tokens < TOKENS_MAX {
            self.deletes
        } else {
            80
        };
        let victim = (0 < tokens && self.random.random_ratio(deletes, 100)).then(|| {
            let at = self.random.random_range(0..tokens) * TOKEN_LENGTH;
            let text = text(&replica);
            let piece = text.get(at as usize..(at + TOKEN_LENGTH) as usize);
            (at, piece.and_then(parsed))
        });
        let mut txn = replica.transact_mut();
        let change = match victim {
            Some((_, None)) => {
                let text = quill.get_string(&txn);
                self.witness.violated(format!("tokens are torn in {text}"));
                return;
            }
            Some((at, Some(token))) => {
                quill.remove_range(&mut txn, at, TOKEN_LENGTH);
                if !self.handle.reader {
                    self.witness.with_ledger(|ledger| ledger.delete(token));
                }
                Change::Delete(token)
            }
            None => {
                let document = &self.handle.document;
                let token = self.witness.with_ledger(|ledger| {
                    if self.handle.reader {
                        ledger.forbidden(document)
                    } else {
                        ledger.insert(document)
                    }
                });
                // Between two tokens, so that none is torn by another.
                let at = self.random.random_range(0..=tokens) * TOKEN_LENGTH;
                quill.insert(&mut txn, at, &spelled(token));
                Change::Insert(token)
            }
        };
        let update: Bytes = txn.encode_update_v1().into();
        drop(txn);
        self.witness
            .trace(|| format!("client {} {change:?}", self.handle.number));
        if !self.handle.reader {
            let mut pending = self.handle.pending.lock().expect("nobody panics with it");
            pending.insert(change, Instant::now());
        }
        let Handle {
            browser,
            document,
            number,
            ..
        } = &self.handle;
        let tabs = self.world.other_tabs(*browser, document, *number);
        for tab in tabs.iter().filter(|_| !self.handle.reader) {
            tab.replica.apply(&update);
            self.handle.shares.store(true, Ordering::Relaxed);
        }
        if self.connection.as_ref().is_some_and(|open| open.upgraded) {
            let inserts = matches!(change, Change::Insert(_));
            // Who asks takes nothing else for a receipt.
            let echoes = inserts && !self.explicit;
            if echoes {
                self.sent().update(update.clone(), change);
            }
            self.send(y_websocket::update(&update));
            // A deletion does not say whose it is: the return of its bytes may be somebody else's.
            let may_be_others = !inserts || self.handle.shares.load(Ordering::Relaxed);
            if self.explicit || may_be_others {
                self.ask();
            }
        }
    }

    fn ask(&mut self) {
        self.asked += 1;
        let mut payload = Vec::new();
        write_var_uint(&mut payload, self.asked);
        let changes = self.pending();
        self.sent().ask(payload.clone(), changes);
        self.send(y_sweet::saved(&payload));
    }

    fn sent(&self) -> MutexGuard<'_, Sent> {
        self.sent.lock().expect("nobody panics with it")
    }

    fn pending(&self) -> Vec<Change> {
        let pending = self.handle.pending.lock().expect("nobody panics with it");
        pending.keys().copied().collect()
    }

    fn send(&mut self, frame: Bytes) {
        if let Some(open) = &self.connection {
            self.witness
                .trace(|| format!("from {} {}", self.handle.number, summary(&frame)));
            // A full window or a broken link: the socket will be given up.
            let _ = open.to.try_send((Instant::now(), WsMessage::Binary(frame)));
        }
    }
}

async fn arrival(connection: &mut Option<Open>) -> Option<Arrival> {
    match connection {
        Some(open) => {
            let arrival = open.from.recv().await;
            if open.link.is_broken() { None } else { arrival }
        }
        None => std::future::pending().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// What a frame is, for the trace.
fn summary(frame: &[u8]) -> String {
    format!("{:02x?}+{}", &frame[..frame.len().min(2)], frame.len())
}
