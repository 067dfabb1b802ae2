//! One document at its owner, as a state machine: [`Input`] in, [`Effect`]s out.
//!
//! It decides what is admitted, in which order updates enter the log, who is told what, and when a
//! receipt may go out. It does no I/O and knows no clock: whoever drives it performs the effects and
//! reports back with [`Input::Committed`].
//!
//! Two rules hold it together. *Fan-out is at once*: peers see an edit before it is durable, which a
//! CRDT makes harmless. *What a client could take for a receipt waits*: receipts, step 2 and
//! catch-up are queued behind the last position that was assigned when they were made, and leave
//! when it is committed. While the store is away who joins is shown the last committed state.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use bytes::Bytes;
use yrs::updates::decoder::Decode;
use yrs::updates::encoder::Encode;
use yrs::{ReadTxn, StateVector, Transact, Update};

use crate::ids::{ConnectionId, Epoch, Seq};
use crate::limits::{
    AWARENESS_EXPIRY, DOCUMENT_MEMORY_MAX, LARGE_STATE_BYTES, PRESENCE_PER_CONNECTION_MAX,
    TAIL_UPDATES_MAX, UNCOMMITTED_BYTES_MAX, UNCOMMITTED_UPDATES_MAX, UNSAVED_BYTES_MAX,
    UNSAVED_UPDATES_MAX,
};
use crate::mutants::Mutant;
use crate::replica::{Applied, Replica};
use crate::scan::{self, Novelty, Places, Scan, Summary};
use crate::wire::awareness;
use crate::wire::relay::{ToEdge, UpdateKind};

mod past;
mod size;

use past::{Past, Whole};
use size::{Room, Size};

pub use size::STRUCT_BYTES;

/// An update without structs and without deletes.
pub const NO_EDITS: [u8; 2] = [0, 0];
/// State vector of a client that has nothing.
pub const NO_CLOCKS: [u8; 1] = [0];
/// Fewer ranges of deletes are taken for new without a look.
const MANY_DELETE_RANGES: u64 = 64;

/// An edge as the owner knows it: one stream of one node, or the owner's own edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EdgeId(pub u64);

/// A client's socket, anywhere in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer {
    /// The edge that holds it.
    pub edge: EdgeId,
    /// The socket there.
    pub connection: ConnectionId,
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Input {
    /// An edge opened its channel; `since` is what all its sockets have (V1 state vector), or empty.
    Attach {
        /// The edge.
        edge: EdgeId,
        /// State vector or nothing.
        since: Bytes,
    },
    /// An edge closed its channel or is gone.
    Detach {
        /// The edge.
        edge: EdgeId,
    },
    /// A socket joined.
    Join {
        /// The socket.
        peer: Peer,
        /// The authenticated user, or empty.
        author: String,
    },
    /// A socket left.
    Leave {
        /// The socket.
        peer: Peer,
    },
    /// A client wants what it lacks.
    Step1 {
        /// The socket.
        peer: Peer,
        /// V1 state vector.
        state_vector: Bytes,
    },
    /// A client's edit.
    Update {
        /// The socket.
        peer: Peer,
        /// Counts the socket's updates.
        number: u64,
        /// Answer to a step 1, or a single change.
        kind: UpdateKind,
        /// V1 update.
        update: Bytes,
    },
    /// What a client that may only read has: receipted if the document has it, too.
    Compare {
        /// The socket.
        peer: Peer,
        /// As in [`Input::Update`].
        number: u64,
        /// V1 update.
        update: Bytes,
    },
    /// A message of a client's application to the others.
    Stateless {
        /// The socket.
        peer: Peer,
        /// The application's own.
        payload: Bytes,
    },
    /// A client's presence, received at `now`.
    Awareness {
        /// The socket.
        peer: Peer,
        /// Payload as in y-protocols.
        payload: Bytes,
        /// Any monotonic clock, always the same.
        now: Duration,
    },
    /// A client asks for everyone's presence.
    QueryAwareness {
        /// The socket.
        peer: Peer,
    },
    /// Time passes: presence that was not renewed ends.
    Expire {
        /// The clock of [`Input::Awareness`].
        now: Duration,
    },
    /// What an earlier memory of this document held when the store lost its last moments: whatever of it is missing here
    /// is written again.
    Restore {
        /// V1 update of that whole state.
        state: Bytes,
    },
    /// Every update up to this position is durable.
    Committed {
        /// The position.
        seq: Seq,
    },
    /// The store does not answer; the next [`Input::Committed`] says that it does again.
    StoreAway,
}

/// What is to be done, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Send to every attached edge; a sender named in it is `from`, known only to its own edge.
    FanOut {
        /// The socket that sent it, which already has it.
        from: Option<Peer>,
        /// V1 update.
        update: Bytes,
    },
    /// Send presence to every attached edge.
    Presence {
        /// Awareness payload.
        payload: Bytes,
    },
    /// Send to one edge.
    Send {
        /// The edge.
        to: EdgeId,
        /// What.
        message: ToEdge,
    },
    /// Append to the log and report [`Input::Committed`].
    Append {
        /// Its position.
        seq: Seq,
        /// The client's bytes as they came.
        update: Bytes,
        /// The authenticated user, or empty.
        author: String,
    },
    /// An update was not admitted; count it.
    NotAdmitted {
        /// For the metric: `invalid`, `conflict`, `gap`, `resync`, `degraded`, `full` or `unsaved`.
        reason: &'static str,
    },
    /// Throw the document away and open it again from the store.
    Reload,
}

/// Why a stored document cannot be opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("update at seq {seq} cannot be applied: {reason}")]
pub struct OpenError {
    /// Position of the bad row; 0 for the snapshot.
    pub seq: Seq,
    /// What was wrong.
    pub reason: String,
}

/// One open document.
pub struct Document {
    doc: Replica,
    places: Places,
    epoch: Epoch,
    assigned: Seq,
    committed: Seq,
    /// Last position that a stored snapshot contains.
    snapshot: Seq,
    edges: BTreeSet<EdgeId>,
    sockets: BTreeMap<Peer, Socket>,
    presence: BTreeMap<u64, Presence>,
    waiting: VecDeque<Waiting>,
    past: Past,
    size: Size,
    stored: StoredBytes,
    /// Positions and sizes of the updates that are not committed.
    uncommitted: VecDeque<(Seq, usize)>,
    uncommitted_bytes: usize,
    intake: Intake,
    store_away: bool,
    taking: Taking,
    /// An update failed half-way: what is in memory is not to be used any more.
    is_broken: bool,
}

/// What a document takes in the store, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoredBytes {
    /// The newest snapshot.
    pub snapshot: usize,
    /// The updates after it, which a new snapshot takes the place of.
    pub log: usize,
}

/// Which updates are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Taking {
    /// None: what is stored is damaged.
    Nothing,
    /// Those of clients, who may bring only so much.
    Bounded,
    /// All: they were taken before.
    Everything,
}

/// What is taken from clients while updates wait for their commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Intake {
    /// Everything.
    Open,
    /// What still comes; the edges were asked to stop reading.
    Paused,
    /// Nothing; it is asked for again later.
    Closed,
}

struct Socket {
    author: String,
    /// Steps 1 sent and not yet answered. Single changes are passed over meanwhile: the answer has them.
    unanswered: u32,
    /// Its last answer had a hole, or came when nothing was taken; asked again when that has changed.
    stuck: bool,
}

struct Presence {
    clock: u32,
    state: String,
    peer: Peer,
    renewed: Duration,
}

struct Waiting {
    after: Seq,
    to: EdgeId,
    message: ToEdge,
    /// Of a step 2 whose client was not shown the committed state: what it has of that.
    has: Option<Has>,
}

/// What a client has of the committed state.
enum Has {
    /// What its state vector says.
    Known(StateVector),
    /// All that was committed when it asked.
    All,
}

impl Document {
    /// Opens a document from its snapshot and the log rows after it, in order.
    ///
    /// # Errors
    /// When a row cannot be applied, or leaves a hole: nothing is passed over.
    pub fn open(
        epoch: Epoch,
        snapshot: Option<(Seq, &Bytes)>,
        log: &[(Seq, Bytes)],
        last: Seq,
    ) -> Result<Self, OpenError> {
        let before = log.first().map_or(last, |(first, _)| Seq(first.0 - 1));
        let (from, state) =
            snapshot.map_or((before, Bytes::new()), |(seq, state)| (seq, state.clone()));
        let mut document = Self {
            doc: Replica::new(),
            places: Places::default(),
            epoch,
            assigned: last,
            committed: last,
            snapshot: snapshot.map_or(Seq(0), |(seq, _)| seq),
            edges: BTreeSet::new(),
            sockets: BTreeMap::new(),
            presence: BTreeMap::new(),
            waiting: VecDeque::new(),
            past: Past::new(from, state),
            size: Size::default(),
            stored: StoredBytes::default(),
            uncommitted: VecDeque::new(),
            uncommitted_bytes: 0,
            intake: Intake::Open,
            store_away: false,
            taking: Taking::Bounded,
            is_broken: false,
        };
        if let Some((_, bytes)) = snapshot {
            let whole = document.replay(Seq(0), bytes)?;
            document.size = Size::of(whole, bytes.len());
            document.stored.snapshot = bytes.len();
        }
        let skipped = usize::from(Mutant::RowSkippedOnLoad.is_active());
        for (seq, bytes) in &log[..log.len().saturating_sub(skipped)] {
            document.replay_row(*seq, bytes)?;
        }
        if document.is_large() {
            document.past.newest().parts();
        }
        Ok(document)
    }

    /// Goes on under a later epoch: applies the log rows after [`Document::committed_seq`], in order. For a
    /// document that was opened ahead of its ownership and has taken no input.
    ///
    /// # Errors
    /// As [`Document::open`]; then the document is of no use.
    pub fn resume(&mut self, epoch: Epoch, log: &[(Seq, Bytes)]) -> Result<(), OpenError> {
        for (seq, bytes) in log {
            self.replay_row(*seq, bytes)?;
            (self.assigned, self.committed) = (*seq, *seq);
        }
        self.epoch = epoch;
        Ok(())
    }

    fn replay_row(&mut self, seq: Seq, bytes: &[u8]) -> Result<(), OpenError> {
        let added = self.replay(seq, bytes)?;
        self.size.add(&added, bytes.len(), added.delete_ranges);
        self.stored.log += bytes.len();
        self.past.push(seq, bytes);
        Ok(())
    }

    fn replay(&mut self, seq: Seq, bytes: &[u8]) -> Result<Summary, OpenError> {
        let failed = |reason: String| OpenError { seq, reason };
        let scan = scan::scan_stored(bytes).map_err(|error| failed(error.to_string()))?;
        self.places
            .take(&scan)
            .map_err(|error| failed(error.to_string()))?;
        let update = Update::decode_v1(bytes).map_err(|error| failed(error.to_string()))?;
        self.doc
            .apply(&scan, update)
            .map(|_| *scan.summary())
            .map_err(|error| failed(error.to_string()))
    }

    /// Takes one input and says what is to be done.
    pub fn handle(&mut self, input: Input) -> Vec<Effect> {
        let mut effects = match input {
            Input::Attach { edge, since } => self.attach(edge, &since),
            Input::Detach { edge } => self.detach(edge),
            Input::Join { peer, author } => self.join(peer, author),
            Input::Leave { peer } => self.leave(peer),
            Input::Step1 { peer, state_vector } => self.step1(peer, &state_vector),
            Input::Update {
                peer,
                number,
                kind,
                update,
            } => self.update(peer, number, kind, update),
            Input::Compare {
                peer,
                number,
                update,
            } => self.compare(peer, number, &update),
            Input::Stateless { peer, payload } => self.stateless(peer, &payload),
            Input::Awareness { peer, payload, now } => self.awareness(peer, &payload, now),
            Input::QueryAwareness { peer } => self.presence_for(peer).into_iter().collect(),
            Input::Expire { now } => self.expire(now),
            Input::Restore { state } => self.restore(&state),
            Input::Committed { seq } => self.committed(seq),
            Input::StoreAway => self.store_away(),
        };
        if self.is_broken {
            effects.push(Effect::Reload);
        }
        effects
    }

    /// Takes nothing from clients any more: what was opened is the good part of damaged rows.
    pub fn set_read_only(&mut self) {
        self.taking = Taking::Nothing;
    }

    /// Takes updates however much is in them: they were taken before, here or at an earlier owner.
    pub fn lift_bounds(&mut self) {
        self.taking = Taking::Everything;
    }

    /// Last position that is known to be durable.
    pub const fn committed_seq(&self) -> Seq {
        self.committed
    }

    /// Last position that was given to an update.
    pub const fn assigned_seq(&self) -> Seq {
        self.assigned
    }

    /// Every assigned position is durable: what the document holds may be stored as a snapshot.
    pub fn is_settled(&self) -> bool {
        self.assigned == self.committed
    }

    /// Log rows after the last stored snapshot. None of a read-only document: no snapshot is made of it.
    pub const fn tail(&self) -> i64 {
        if matches!(self.taking, Taking::Nothing) {
            0
        } else {
            self.committed.0 - self.snapshot.0
        }
    }

    /// A snapshot up to this position is stored; `whole` is what was counted in it.
    pub fn set_snapshot(&mut self, seq: Seq, state: Bytes, whole: Summary) {
        self.snapshot = self.snapshot.max(seq);
        self.size = Size::of(whole, state.len());
        self.stored = StoredBytes {
            snapshot: state.len(),
            log: 0,
        };
        for (_, update) in self.past.after(seq) {
            if let Ok(scan) = scan::scan_stored(update) {
                let added = scan.summary();
                self.size.add(added, update.len(), added.delete_ranges);
                self.stored.log += update.len();
            }
        }
        self.past.begin_with(Whole::new(seq, state));
    }

    /// Bytes of memory that it takes, estimated; too much rather than too little between two snapshots.
    pub fn memory(&self) -> u64 {
        self.size.memory()
    }

    /// What it takes in the store.
    pub const fn stored(&self) -> StoredBytes {
        self.stored
    }

    /// What is in it, when it was last counted: at its opening, and with each snapshot.
    pub const fn counted(&self) -> &Summary {
        self.size.whole()
    }

    /// No edge is attached.
    pub fn is_idle(&self) -> bool {
        self.edges.is_empty()
    }

    /// Sockets that joined, over all edges.
    pub fn connections(&self) -> usize {
        self.sockets.len()
    }

    /// The whole state as a V1 update. Cost grows with the document.
    pub fn encode_state(&self) -> Bytes {
        self.doc
            .transact()
            .encode_state_as_update_v1(&StateVector::default())
            .into()
    }

    /// As [`Document::encode_state`], and kept: it costs nothing until the document changes.
    pub fn whole_state(&mut self) -> Bytes {
        if self.past.newest().seq < self.assigned || self.past.newest().bytes.is_empty() {
            let mut whole = Whole::new(self.assigned, self.encode_state());
            if LARGE_STATE_BYTES <= whole.bytes.len() {
                whole.parts();
            }
            self.past.keep(whole, self.committed);
        }
        self.past.newest().bytes.clone()
    }

    /// Its state is so large that what costs a walk over it takes long.
    pub fn is_large(&self) -> bool {
        LARGE_STATE_BYTES <= self.past.bytes()
    }

    /// The text of one `Y.Text`; empty when there is none.
    pub fn text(&self, name: &str) -> String {
        let txn = self.doc.transact();
        txn.get_text(name)
            .map_or_else(String::new, |text| yrs::GetString::get_string(&text, &txn))
    }

    /// The presence states that are known: client id and JSON.
    pub fn presence(&self) -> impl Iterator<Item = (u64, &str)> {
        self.presence
            .iter()
            .map(|(client, presence)| (*client, presence.state.as_str()))
    }

    fn attach(&mut self, edge: EdgeId, since: &[u8]) -> Vec<Effect> {
        self.edges.insert(edge);
        let message = ToEdge::Attached {
            epoch: self.epoch,
            state_vector: self.state_vector(),
        };
        let mut effects = vec![Effect::Send { to: edge, message }];
        if !since.is_empty() {
            // A state vector that cannot be read only costs bytes: everything is sent.
            let since = StateVector::decode_v1(since).unwrap_or_default();
            let update = self.doc.transact().encode_state_as_update_v1(&since).into();
            effects.extend(self.once_committed(edge, ToEdge::CatchUp { update }));
        }
        if self.intake != Intake::Open {
            let message = ToEdge::Pause;
            effects.push(Effect::Send { to: edge, message });
        }
        effects
    }

    fn detach(&mut self, edge: EdgeId) -> Vec<Effect> {
        self.edges.remove(&edge);
        self.waiting.retain(|waiting| waiting.to != edge);
        let gone: Vec<Peer> = self
            .sockets
            .keys()
            .filter(|peer| peer.edge == edge)
            .copied()
            .collect();
        gone.into_iter().flat_map(|peer| self.leave(peer)).collect()
    }

    fn join(&mut self, peer: Peer, author: String) -> Vec<Effect> {
        let socket = Socket {
            author,
            unanswered: 0,
            stuck: false,
        };
        self.sockets.insert(peer, socket);
        let mut effects = vec![self.ask(peer)];
        effects.extend(self.presence_for(peer));
        effects
    }

    fn leave(&mut self, peer: Peer) -> Vec<Effect> {
        self.sockets.remove(&peer);
        self.end_presence(|presence| presence.peer == peer)
    }

    fn step1(&mut self, peer: Peer, state_vector: &[u8]) -> Vec<Effect> {
        let known = scan::scan_state_vector(state_vector)
            .map_err(|error| error.to_string())
            .and_then(|_| StateVector::decode_v1(state_vector).map_err(|error| error.to_string()));
        match known {
            Ok(known) => self.step2(peer, known),
            Err(error) => refuse(peer, format!("state vector refused: {error}")),
        }
    }

    fn step2(&mut self, peer: Peer, mut known: StateVector) -> Vec<Effect> {
        let connection = peer.connection;
        let parts = if self.is_large() {
            self.lacking_in_parts(&known)
        } else {
            None
        };
        let mut effects = Vec::new();
        let has_all = parts
            .as_ref()
            .is_some_and(|parts| parts[0].0 <= self.committed);
        let (parts, last) = match parts.map(|mut parts| (parts.pop(), parts)) {
            Some((Some((_, last)), parts)) => (parts, Some(last)),
            _ => (Vec::new(), None),
        };
        let mut later = Vec::new();
        for (seq, update) in parts {
            let part = ToEdge::Part { connection, update };
            if seq <= self.committed {
                effects.push(send(peer, part));
            } else {
                later.push(part);
            }
        }
        let mut is_shown = false;
        if self.store_away && !self.is_settled() {
            // The rest follows when it is committed, too.
            let update = if has_all {
                Some(Bytes::from_static(&NO_EDITS))
            } else {
                self.past.at(self.committed).map(|committed| {
                    let committed = committed.transact();
                    let update = committed.encode_state_as_update_v1(&known).into();
                    known.merge(committed.state_vector());
                    update
                })
            };
            is_shown = update.is_some();
            let step2 = |update| ToEdge::CommittedStep2 { connection, update };
            effects.extend(update.map(|update| send(peer, step2(update))));
        }
        let update =
            last.unwrap_or_else(|| self.doc.transact().encode_state_as_update_v1(&known).into());
        let step2 = ToEdge::Step2 { connection, update };
        if self.is_settled() {
            effects.push(send(peer, step2));
            return effects;
        }
        let has = if has_all { Has::All } else { Has::Known(known) };
        let mut has = Some(has).filter(|_| !is_shown);
        for message in later.into_iter().chain([step2]) {
            let is_step2 = matches!(message, ToEdge::Step2 { .. });
            self.waiting.push_back(Waiting {
                after: self.assigned,
                to: peer.edge,
                message,
                has: has.take_if(|_| is_step2),
            });
        }
        effects
    }

    /// What a client lacks, as updates that follow each other: of the newest state that is there as bytes, and the log
    /// after it. Each with the position that must be durable when it is sent.
    fn lacking_in_parts(&mut self, known: &StateVector) -> Option<Vec<(Seq, Bytes)>> {
        let newest = self.past.newest();
        let (seq, bytes_max) = (newest.seq, LARGE_STATE_BYTES.max(newest.bytes.len() / 32));
        let is_long = {
            let mut tail = self.past.after(seq).map(|(_, update)| update.len());
            TAIL_UPDATES_MAX < tail.len() || bytes_max <= tail.by_ref().sum()
        };
        if is_long {
            self.whole_state();
        }
        let newest = self.past.newest();
        let mut parts = vec![(newest.seq, newest.lacking(known)?)];
        let seq = newest.seq;
        parts.extend(self.past.after(seq).cloned());
        Some(parts)
    }

    /// Shows the last committed state to those who wait for a later one.
    fn store_away(&mut self) -> Vec<Effect> {
        self.store_away = true;
        let mut effects = Vec::new();
        for waiting in &mut self.waiting {
            let ToEdge::Step2 { connection, .. } = waiting.message else {
                continue;
            };
            let update = match waiting.has.take() {
                Some(Has::All) => Some(Bytes::from_static(&NO_EDITS)),
                Some(Has::Known(known)) => self.past.at(self.committed).map(|committed| {
                    let committed = committed.transact();
                    committed.encode_state_as_update_v1(&known).into()
                }),
                None => None,
            };
            effects.extend(update.map(|update| Effect::Send {
                to: waiting.to,
                message: ToEdge::CommittedStep2 { connection, update },
            }));
        }
        effects
    }

    fn update(&mut self, peer: Peer, number: u64, kind: UpdateKind, update: Bytes) -> Vec<Effect> {
        let Some(socket) = self.sockets.get_mut(&peer) else {
            return Vec::new(); // it left while this was on its way
        };
        match kind {
            UpdateKind::Step2 => socket.unanswered = socket.unanswered.saturating_sub(1),
            UpdateKind::Update if socket.unanswered > 0 => {
                return vec![Effect::NotAdmitted { reason: "resync" }];
            }
            UpdateKind::Update => {}
        }
        if self.intake == Intake::Closed {
            socket.stuck = true;
            return vec![Effect::NotAdmitted { reason: "unsaved" }];
        }
        let author = socket.author.clone();
        if self.taking == Taking::Nothing && !self.is_known(&update) {
            if let Some(socket) = self.sockets.get_mut(&peer) {
                socket.stuck = true;
            }
            return vec![Effect::NotAdmitted { reason: "degraded" }];
        }
        match self.admit(&update) {
            Admission::Added => {
                self.answered(peer, kind);
                let mut effects = self.added(Some(peer), update, author);
                effects.extend(self.receipt(peer, number));
                effects.extend(self.ask_the_stuck());
                effects
            }
            Admission::NothingNew => {
                self.answered(peer, kind);
                if Mutant::ReceiptOfNothingAtOnce.is_active() {
                    let (to, connection) = (peer.edge, peer.connection);
                    let message = ToEdge::Receipt {
                        connection,
                        upto: number,
                    };
                    return vec![Effect::Send { to, message }];
                }
                self.receipt(peer, number).into_iter().collect()
            }
            Admission::Gap => {
                let not_admitted = Effect::NotAdmitted { reason: "gap" };
                match kind {
                    UpdateKind::Update => vec![not_admitted, self.ask(peer)],
                    // Its client waits for an edit that has not come back yet: ask when one came. What
                    // does not wait for it is taken now; receipts wait until all is here.
                    UpdateKind::Step2 => {
                        let mut effects = vec![not_admitted];
                        if let Some(part) = self.admissible(&update)
                            && let Admission::Added = self.admit(&part)
                        {
                            effects.extend(self.added(Some(peer), part, author));
                            effects.extend(self.ask_the_stuck());
                        }
                        if let Some(socket) = self.sockets.get_mut(&peer) {
                            socket.stuck = true;
                        }
                        effects
                    }
                }
            }
            Admission::Invalid(reason) => {
                let mut effects = vec![Effect::NotAdmitted { reason: "invalid" }];
                effects.extend(refuse(peer, reason));
                effects
            }
            Admission::Full => {
                let reason = format!(
                    "the document is full (it takes more than {} MiB of memory): delete something, or go on in another one",
                    DOCUMENT_MEMORY_MAX / (1 << 20)
                );
                let mut effects = vec![Effect::NotAdmitted { reason: "full" }];
                effects.extend(refuse(peer, reason));
                effects
            }
            Admission::Conflict(reason) => {
                let mut effects = vec![Effect::NotAdmitted { reason: "conflict" }];
                effects.extend(refuse(peer, reason));
                effects
            }
        }
    }

    fn compare(&mut self, peer: Peer, number: u64, update: &[u8]) -> Vec<Effect> {
        let Some(socket) = self.sockets.get_mut(&peer) else {
            return Vec::new();
        };
        socket.unanswered = socket.unanswered.saturating_sub(1);
        match self.has_all_of(update) {
            Ok(true) => self.receipt(peer, number).into_iter().collect(),
            Ok(false) => Vec::new(),
            Err(reason) => refuse(peer, reason),
        }
    }

    /// Whether an update would change nothing. Costs a walk over the document if the update deletes.
    fn has_all_of(&self, update: &[u8]) -> Result<bool, String> {
        let refused = |error: &dyn std::error::Error| format!("update refused: {error}");
        let scan = scan::scan_update(update).map_err(|error| refused(&error))?;
        match scan.novelty(|client| self.places.next_clock(client)) {
            Novelty::Nothing => Ok(true),
            Novelty::New => Ok(false),
            Novelty::MaybeDeletes => {
                let update = Update::decode_v1(update).map_err(|error| refused(&error))?;
                let deleted = self.doc.transact().snapshot().delete_set;
                Ok(update.delete_set().diff(&deleted).is_empty())
            }
        }
    }

    fn stateless(&self, peer: Peer, payload: &Bytes) -> Vec<Effect> {
        if !self.sockets.contains_key(&peer) {
            return Vec::new();
        }
        let send = |to: &EdgeId| {
            let message = ToEdge::Stateless {
                except: (peer.edge == *to).then_some(peer.connection),
                payload: payload.clone(),
            };
            Effect::Send { to: *to, message }
        };
        self.edges.iter().map(send).collect()
    }

    fn awareness(&mut self, peer: Peer, payload: &[u8], now: Duration) -> Vec<Effect> {
        if !self.sockets.contains_key(&peer) {
            return Vec::new();
        }
        let entries = match awareness::parse(payload) {
            Ok(entries) => entries,
            Err(error) => return refuse(peer, format!("presence refused: {error}")),
        };
        let accepted: Vec<awareness::Entry> = entries
            .filter(|entry| self.accept_presence(peer, entry, now))
            .collect();
        if accepted.is_empty() {
            return Vec::new();
        }
        vec![Effect::Presence {
            payload: awareness::encode(accepted),
        }]
    }

    fn accept_presence(&mut self, peer: Peer, entry: &awareness::Entry, now: Duration) -> bool {
        let newer = match self.presence.get(&entry.client) {
            Some(known) => {
                known.clock < entry.clock || (known.clock == entry.clock && entry.is_gone())
            }
            None => !entry.is_gone(),
        };
        if !newer || !self.may_speak_for(peer, entry.client) {
            return false;
        }
        if entry.is_gone() {
            self.presence.remove(&entry.client);
        } else {
            let presence = Presence {
                clock: entry.clock,
                state: entry.json.to_owned(),
                peer,
                renewed: now,
            };
            self.presence.insert(entry.client, presence);
        }
        true
    }

    fn expire(&mut self, now: Duration) -> Vec<Effect> {
        self.end_presence(|presence| presence.renewed + AWARENESS_EXPIRY <= now)
    }

    fn committed(&mut self, seq: Seq) -> Vec<Effect> {
        self.committed = self.committed.max(seq);
        self.store_away = false;
        self.past.committed(self.committed);
        if self.is_settled() && self.past.is_long() {
            self.whole_state();
        }
        let mut effects = Vec::new();
        // One for each socket: a receipt speaks of all before it.
        let mut receipts = BTreeMap::<(EdgeId, ConnectionId), usize>::new();
        while let Some(Waiting { to, message, .. }) = self
            .waiting
            .pop_front_if(|waiting| waiting.after <= self.committed)
        {
            if let ToEdge::Receipt { connection, .. } = message {
                let place = *receipts.entry((to, connection)).or_insert(effects.len());
                if let Some(earlier) = effects.get_mut(place) {
                    *earlier = Effect::Send { to, message };
                    continue;
                }
            }
            effects.push(Effect::Send { to, message });
        }
        while let Some((_, bytes)) = self
            .uncommitted
            .pop_front_if(|(seq, _)| *seq <= self.committed)
        {
            self.uncommitted_bytes -= bytes;
        }
        // Most documents are idle at any moment.
        if self.waiting.is_empty() {
            self.waiting = VecDeque::new();
        }
        if self.uncommitted.is_empty() {
            self.uncommitted = VecDeque::new();
        }
        // Half of the bound, or it would go on and off with each commit.
        let room = self.uncommitted_bytes <= UNCOMMITTED_BYTES_MAX / 2
            && self.uncommitted.len() <= UNCOMMITTED_UPDATES_MAX / 2;
        if room && self.intake != Intake::Open {
            let was = std::mem::replace(&mut self.intake, Intake::Open);
            effects.extend(self.to_all(&ToEdge::Resume));
            if was == Intake::Closed {
                effects.extend(self.ask_the_stuck());
            }
        }
        effects
    }

    /// Has fewer edits taken as more of them wait for their commit.
    fn limit_intake(&mut self) -> Vec<Effect> {
        let (updates, bytes) = (self.uncommitted.len(), self.uncommitted_bytes);
        let intake = if UNSAVED_UPDATES_MAX <= updates || UNSAVED_BYTES_MAX <= bytes {
            Intake::Closed
        } else if UNCOMMITTED_UPDATES_MAX <= updates || UNCOMMITTED_BYTES_MAX <= bytes {
            Intake::Paused
        } else {
            Intake::Open
        };
        let was = self.intake;
        self.intake = was.max(intake);
        if was == Intake::Open && self.intake != Intake::Open {
            self.to_all(&ToEdge::Pause)
        } else {
            Vec::new()
        }
    }

    fn to_all(&self, message: &ToEdge) -> Vec<Effect> {
        let edges = self.edges.iter();
        let sends = edges.map(|edge| Effect::Send {
            to: *edge,
            message: message.clone(),
        });
        sends.collect()
    }

    /// Gives an update that was applied its position in the log.
    fn added(&mut self, from: Option<Peer>, update: Bytes, author: String) -> Vec<Effect> {
        self.assigned = self.assigned.next();
        let seq = self.assigned;
        self.past.push(seq, &update);
        self.stored.log += update.len();
        self.uncommitted.push_back((seq, update.len()));
        self.uncommitted_bytes += update.len();
        let fan_out = Effect::FanOut {
            from,
            update: update.clone(),
        };
        let append = Effect::Append {
            seq,
            update,
            author,
        };
        let mut effects = vec![fan_out, append];
        effects.extend(self.limit_intake());
        effects
    }

    /// Whether an update surely adds nothing.
    fn is_known(&self, update: &[u8]) -> bool {
        let scan = scan::scan_update(update);
        scan.is_ok_and(|scan| {
            scan.novelty(|client| self.places.next_clock(client)) == Novelty::Nothing
        })
    }

    fn restore(&mut self, state: &[u8]) -> Vec<Effect> {
        let mut earlier = Replica::new();
        if earlier.replay(state).is_none() {
            return vec![Effect::NotAdmitted { reason: "invalid" }];
        }
        let known = self.doc.transact().state_vector();
        let update: Bytes = earlier.transact().encode_state_as_update_v1(&known).into();
        let taking = std::mem::replace(&mut self.taking, Taking::Everything);
        let admission = self.admit(&update);
        self.taking = taking;
        match admission {
            Admission::Added => {
                let mut effects = self.added(None, update, String::new());
                effects.extend(self.ask_the_stuck());
                effects
            }
            Admission::NothingNew => Vec::new(),
            Admission::Gap | Admission::Full | Admission::Conflict(_) | Admission::Invalid(_) => {
                vec![Effect::NotAdmitted { reason: "invalid" }]
            }
        }
    }

    /// Applies an update if all it refers to is here and it fits.
    fn admit(&mut self, update: &Bytes) -> Admission {
        let invalid =
            |error: &dyn std::error::Error| Admission::Invalid(format!("update refused: {error}"));
        let is_bounded = self.taking != Taking::Everything;
        let scanned = if is_bounded {
            scan::scan_update(update)
        } else {
            scan::scan_stored(update)
        };
        let scan = match scanned {
            Ok(scan) => scan,
            Err(error) => return invalid(&error),
        };
        if let Some(conflict) = self.places.conflict(&scan) {
            return Admission::Conflict(conflict.to_string());
        }
        let next_clock = |client| self.places.next_clock(client);
        if scan.missing(next_clock).is_some() {
            return Admission::Gap;
        }
        if scan.novelty(next_clock) == Novelty::Nothing {
            return Admission::NothingNew;
        }
        let decoded = match Update::decode_v1(update) {
            Ok(decoded) => decoded,
            Err(error) => return invalid(&error),
        };
        let new_ranges = self.new_ranges(&scan, &decoded);
        if is_bounded && !self.has_room_for(scan.summary(), update.len(), new_ranges) {
            return Admission::Full;
        }
        if let Err(error) = self.places.take(&scan) {
            return invalid(&error);
        }
        match self.doc.apply(&scan, decoded) {
            Ok(Applied::Added) => {
                self.size.add(scan.summary(), update.len(), new_ranges);
                Admission::Added
            }
            Ok(Applied::NothingNew) => Admission::NothingNew,
            Err(error) => {
                self.is_broken = true;
                invalid(&error)
            }
        }
    }

    /// How many ranges of an update's deletes are not deleted yet. They are looked up only when there are many: with a
    /// sync step 2 all deletes of a document come again.
    fn new_ranges(&self, scan: &Scan<'_>, update: &Update) -> u64 {
        let ranges = scan.summary().delete_ranges;
        if ranges < MANY_DELETE_RANGES {
            return ranges;
        }
        let deleted = self.doc.transact().snapshot().delete_set;
        let new = update.delete_set().diff(&deleted);
        new.iter().map(|(_, ranges)| ranges.len() as u64).sum()
    }

    fn has_room_for(&mut self, update: &Summary, bytes: usize, new_ranges: u64) -> bool {
        let mut room = self.size.room_for(update, bytes, new_ranges);
        if room == Room::Unknown {
            let state = self.encode_state();
            if let Ok(whole) = scan::scan_stored(&state) {
                self.size = Size::of(*whole.summary(), state.len());
            }
            room = self.size.room_for(update, bytes, new_ranges);
        }
        room == Room::Enough
    }

    /// The part of an update that may be applied, if there is any.
    fn admissible(&self, update: &[u8]) -> Option<Bytes> {
        let scan = scan::scan_update(update).ok()?;
        let part = scan.admissible(|client| self.places.next_clock(client));
        (part != NO_EDITS).then(|| part.into())
    }

    /// An answer was taken as a whole: with it is here whatever was passed over before.
    fn answered(&mut self, peer: Peer, kind: UpdateKind) {
        if kind == UpdateKind::Step2
            && let Some(socket) = self.sockets.get_mut(&peer)
        {
            socket.stuck = false;
        }
    }

    /// A receipt speaks of everything before it: there is none while something that was sent is not here.
    fn receipt(&mut self, peer: Peer, number: u64) -> Option<Effect> {
        if self.sockets.get(&peer).is_none_or(|socket| socket.stuck) {
            return None;
        }
        let message = ToEdge::Receipt {
            connection: peer.connection,
            upto: number,
        };
        self.once_committed(peer.edge, message)
    }

    /// Sends now if everything assigned is committed, else when it is.
    fn once_committed(&mut self, to: EdgeId, message: ToEdge) -> Option<Effect> {
        if self.is_settled() || Mutant::AckBeforeCommit.is_active() {
            return Some(Effect::Send { to, message });
        }
        self.waiting.push_back(Waiting {
            after: self.assigned,
            to,
            message,
            has: None,
        });
        None
    }

    fn ask(&mut self, peer: Peer) -> Effect {
        if let Some(socket) = self.sockets.get_mut(&peer) {
            socket.unanswered += 1;
            socket.stuck = false;
        }
        let message = ToEdge::Step1 {
            connection: peer.connection,
            state_vector: self.state_vector(),
        };
        Effect::Send {
            to: peer.edge,
            message,
        }
    }

    fn ask_the_stuck(&mut self) -> Vec<Effect> {
        let stuck: Vec<Peer> = self
            .sockets
            .iter()
            .filter(|(_, socket)| socket.stuck)
            .map(|(peer, _)| *peer)
            .collect();
        stuck.into_iter().map(|peer| self.ask(peer)).collect()
    }

    fn state_vector(&self) -> Bytes {
        self.doc.transact().state_vector().encode_v1().into()
    }

    fn presence_for(&self, peer: Peer) -> Option<Effect> {
        if self.presence.is_empty() {
            return None;
        }
        let entries = self
            .presence
            .iter()
            .map(|(client, presence)| awareness::Entry {
                client: *client,
                clock: presence.clock,
                json: &presence.state,
            });
        let payload = awareness::encode(entries);
        let message = ToEdge::PresenceTo {
            connection: peer.connection,
            payload,
        };
        Some(Effect::Send {
            to: peer.edge,
            message,
        })
    }

    /// A socket may speak for client ids that are free, its own, or left behind by the same user.
    fn may_speak_for(&self, peer: Peer, client: u64) -> bool {
        match self.presence.get(&client) {
            Some(presence) if presence.peer == peer => true,
            Some(presence) => {
                let author = |peer: &Peer| self.sockets.get(peer).map(|socket| &socket.author);
                author(&presence.peer) == author(&peer)
            }
            None => {
                self.presence
                    .values()
                    .filter(|presence| presence.peer == peer)
                    .count()
                    < PRESENCE_PER_CONNECTION_MAX
            }
        }
    }

    fn end_presence(&mut self, ended: impl Fn(&Presence) -> bool) -> Vec<Effect> {
        let gone: Vec<awareness::Entry> = self
            .presence
            .extract_if(.., |_, presence| ended(presence))
            .map(|(client, presence)| awareness::Entry {
                client,
                clock: presence.clock,
                json: awareness::GONE,
            })
            .collect();
        if gone.is_empty() {
            return Vec::new();
        }
        vec![Effect::Presence {
            payload: awareness::encode(gone),
        }]
    }
}

enum Admission {
    Added,
    NothingNew,
    Gap,
    Invalid(String),
    /// The document has no room for it.
    Full,
    /// Another device writes under the same client id.
    Conflict(String),
}

fn refuse(peer: Peer, reason: String) -> Vec<Effect> {
    let connection = peer.connection;
    vec![send(peer, ToEdge::Refused { connection, reason })]
}

/// To the edge that has the socket.
const fn send(peer: Peer, message: ToEdge) -> Effect {
    Effect::Send {
        to: peer.edge,
        message,
    }
}

#[cfg(test)]
mod tests {
    use yrs::{ClientID, Doc, GetString, OffsetKind, Options, Text};

    use super::*;
    use crate::limits::{PAST_BYTES_MIN, UPDATE_STRUCTS_MAX};

    const EDGE: EdgeId = EdgeId(1);
    const OTHER_EDGE: EdgeId = EdgeId(2);
    const ALICE: Peer = peer(EDGE, 1);
    const BOB: Peer = peer(OTHER_EDGE, 1);

    #[test]
    fn an_update_is_acknowledged_only_once_it_is_durable() {
        let mut document = shared_by_alice_and_bob();
        let typed = Typist::new(1).types("h");
        assert_eq!(
            document.handle(update(ALICE, 2, &typed)),
            [fan_out(ALICE, &typed), append(1, &typed)]
        );
        assert_eq!(document.handle(committed(1)), [receipt(ALICE, 2)]);
    }

    #[test]
    fn a_commit_gives_each_socket_one_receipt_for_all_that_it_made_durable() {
        let mut document = shared_by_alice_and_bob();
        let (mut alice, mut bob) = (Typist::new(1), Typist::new(2));
        document.handle(update(ALICE, 2, &alice.types("h")));
        document.handle(update(BOB, 2, &bob.types("H")));
        document.handle(update(ALICE, 3, &alice.types("i")));
        document.handle(update(ALICE, 4, &alice.types("!")));
        assert_eq!(
            document.handle(committed(3)),
            [receipt(ALICE, 3), receipt(BOB, 2)]
        );
        assert_eq!(document.handle(committed(4)), [receipt(ALICE, 4)]);
    }

    #[test]
    fn a_step_2_waits_for_what_it_contains_and_what_comes_later_does_not_hold_it_up() {
        let mut document = shared_by_alice_and_bob();
        let mut typist = Typist::new(1);
        document.handle(update(ALICE, 2, &typist.types("h")));
        assert_eq!(document.handle(step1(BOB)), []);
        document.handle(update(ALICE, 3, &typist.types("i")));
        let effects = document.handle(committed(1));
        let [
            first,
            Effect::Send {
                to,
                message: ToEdge::Step2 { update, .. },
            },
        ] = effects.as_slice()
        else {
            panic!("a receipt and a step 2, not {effects:?}");
        };
        assert_eq!((first, *to), (&receipt(ALICE, 2), OTHER_EDGE));
        assert_eq!(text_of(&[update]), "h");
    }

    #[test]
    fn an_update_that_adds_nothing_is_not_logged_and_its_receipt_waits_all_the_same() {
        let mut document = shared_by_alice_and_bob();
        let typed = Typist::new(1).types("h");
        document.handle(update(ALICE, 2, &typed));
        // Bob brings back what Alice wrote, before it is durable.
        assert_eq!(document.handle(update(BOB, 2, &typed)), []);
        assert_eq!(
            document.handle(committed(1)),
            [receipt(ALICE, 2), receipt(BOB, 2)]
        );
        assert_eq!(
            document.handle(update(BOB, 3, &typed)),
            [receipt(BOB, 3)],
            "now all of it is durable"
        );
    }

    #[test]
    fn an_update_with_a_hole_before_it_is_neither_logged_nor_acknowledged_until_the_client_fills_it()
     {
        let mut document = shared_by_alice_and_bob();
        let mut typist = Typist::new(1);
        let lost = typist.types("a");
        let late = typist.types("b");
        let effects = document.handle(update(ALICE, 2, &late));
        assert_eq!(effects[0], Effect::NotAdmitted { reason: "gap" });
        assert!(matches!(
            &effects[1],
            Effect::Send { to: EDGE, message: ToEdge::Step1 { connection, .. } } if *connection == ALICE.connection
        ));
        assert_eq!(
            document.handle(update(ALICE, 3, &typist.types("c"))),
            [Effect::NotAdmitted { reason: "resync" }],
            "the answer will contain it"
        );
        let all = typist.everything();
        assert_eq!(
            document.handle(step2(ALICE, 4, &all)),
            [fan_out(ALICE, &all), append(1, &all)]
        );
        assert_eq!(document.handle(committed(1)), [receipt(ALICE, 4)]);
        assert_eq!(document.text("quill"), "abc");
        drop(lost);
    }

    #[test]
    fn a_client_whose_answer_has_a_hole_is_asked_again_when_the_document_has_grown() {
        let mut document = shared_by_alice_and_bob();
        let mut alice = Typist::new(1);
        let first = alice.types("a");
        let mut bob = Typist::new(2);
        bob.receives(&first);
        let without_first = bob.types("b");
        document.handle(Input::Join {
            peer: BOB,
            author: String::new(),
        });
        assert_eq!(
            document.handle(step2(BOB, 3, &without_first)),
            [Effect::NotAdmitted { reason: "gap" }],
            "not all of it is here"
        );
        let effects = document.handle(update(ALICE, 2, &first));
        assert!(
            effects.iter().any(|effect| matches!(
                effect,
                Effect::Send {
                    to: OTHER_EDGE,
                    message: ToEdge::Step1 { .. }
                }
            )),
            "{effects:?}"
        );
        document.handle(step2(BOB, 4, &bob.everything()));
        assert_eq!(document.text("quill"), "ab");
    }

    #[test]
    fn what_a_client_waits_for_does_not_hold_up_its_own_edits() {
        let mut document = shared_by_alice_and_bob();
        let mut alice = Typist::new(1);
        let first = alice.types("a");
        let second = alice.types("b");
        // Of Alice's edits only the second came to Bob, who shows neither.
        let mut bob = Typist::new(2);
        let own = bob.types("own");
        bob.receives(&second);
        document.handle(Input::Join {
            peer: BOB,
            author: String::new(),
        });
        let effects = document.handle(step2(BOB, 3, &bob.everything()));
        assert_eq!(effects[0], Effect::NotAdmitted { reason: "gap" });
        assert!(
            matches!(&effects[2], Effect::Append { seq: Seq(1), update, .. } if text_of(&[update]) == "own"),
            "{effects:?}"
        );
        assert_eq!(document.handle(committed(1)), []);
        assert_eq!(document.text("quill"), "own");
        document.handle(update(BOB, 4, &bob.types("ed")));
        assert_eq!(
            document.handle(committed(2)),
            [],
            "a receipt would speak of all that Bob sent"
        );
        // Alice brings what Bob waits for: he is asked again.
        document.handle(update(ALICE, 2, &first));
        document.handle(step2(BOB, 5, &bob.everything()));
        let effects = document.handle(committed(4));
        assert!(effects.contains(&receipt(BOB, 5)), "{effects:?}");
        drop(own);
    }

    #[test]
    fn an_edge_that_comes_from_another_owner_gets_what_it_missed_once_it_is_durable() {
        let mut document = shared_by_alice_and_bob();
        let mut typist = Typist::new(1);
        let known = typist.types("known ");
        document.handle(update(ALICE, 2, &known));
        document.handle(committed(1));
        let since = typist.state_vector();
        document.handle(update(ALICE, 3, &typist.types("missed")));
        let edge = EdgeId(3);
        let attached = document.handle(Input::Attach { edge, since });
        assert_eq!(
            attached.len(),
            1,
            "only that the channel is open: {attached:?}"
        );
        let effects = document.handle(committed(2));
        let Some(Effect::Send {
            to,
            message: ToEdge::CatchUp { update },
        }) = effects.last()
        else {
            panic!("a catch-up, not {effects:?}");
        };
        assert_eq!(*to, edge);
        assert_eq!(text_of(&[&known, update]), "known missed");
    }

    #[test]
    fn a_reader_is_receipted_only_for_what_the_document_has() {
        let mut document = shared_by_alice_and_bob();
        let mut alice = Typist::new(1);
        let mut bob = Typist::new(2);
        let shared = alice.types("shared");
        document.handle(update(ALICE, 2, &shared));
        bob.receives(&shared);
        let compare = |number, update: Bytes| Input::Compare {
            peer: BOB,
            number,
            update,
        };
        assert_eq!(document.handle(compare(2, bob.everything())), []);
        assert_eq!(
            document.handle(committed(1)).last(),
            Some(&receipt(BOB, 2)),
            "what is not durable yet is not receipted"
        );
        // A deletion leaves no trace in the state vector.
        bob.deletes_first();
        assert_eq!(document.handle(compare(3, bob.everything())), []);
        document.handle(update(ALICE, 3, &bob.everything()));
        document.handle(committed(2));
        assert_eq!(
            document.handle(compare(4, bob.everything())),
            [receipt(BOB, 4)]
        );
        bob.types("own");
        assert_eq!(document.handle(compare(5, bob.everything())), []);
        assert_eq!(document.text("quill"), "hared");
        assert_eq!(document.assigned_seq(), Seq(2));
        let effects = document.handle(compare(6, Bytes::from_static(b"text")));
        assert!(matches!(
            effects[..],
            [Effect::Send {
                message: ToEdge::Refused { .. },
                ..
            }]
        ));
    }

    #[test]
    fn a_stateless_message_goes_to_every_edge_and_not_to_its_sender() {
        let mut document = shared_by_alice_and_bob();
        let payload = Bytes::from_static(b"ring");
        let to = |peer: Peer, except| Effect::Send {
            to: peer.edge,
            message: ToEdge::Stateless {
                except,
                payload: payload.clone(),
            },
        };
        let effects = document.handle(Input::Stateless {
            peer: ALICE,
            payload: payload.clone(),
        });
        assert_eq!(effects, [to(ALICE, Some(ALICE.connection)), to(BOB, None)]);
        document.handle(Input::Leave { peer: ALICE });
        let effects = document.handle(Input::Stateless {
            peer: ALICE,
            payload,
        });
        assert_eq!(effects, []);
    }

    #[test]
    fn while_the_store_is_away_a_newcomer_gets_what_is_committed_and_then_the_rest() {
        let mut document = shared_by_alice_and_bob();
        let mut typist = Typist::new(1);
        let old = typist.types("old");
        document.handle(update(ALICE, 2, &old));
        document.handle(committed(1));
        // What is deleted without a commit is still shown.
        let deleted = typist.deletes(0, 2);
        let lost = typist.types(" new");
        document.handle(update(ALICE, 3, &deleted));
        assert_eq!(
            document.handle(update(ALICE, 4, &lost)),
            [fan_out(ALICE, &lost), append(3, &lost)],
            "edits are relayed all the same"
        );
        assert_eq!(document.handle(step1(BOB)), [], "a commit is on its way");
        let shown = |effects: &[Effect]| match effects {
            [
                Effect::Send {
                    to: OTHER_EDGE,
                    message: ToEdge::CommittedStep2 { update, .. },
                },
            ] => text_of(&[update]),
            other => panic!("a committed step 2, not {other:?}"),
        };
        assert_eq!(shown(&document.handle(Input::StoreAway)), "old");
        assert_eq!(document.handle(Input::StoreAway), [], "once");
        assert_eq!(shown(&document.handle(step1(BOB))), "old", "the next one");
        // A part is committed after all: the next one sees it.
        document.handle(committed(2));
        document.handle(Input::StoreAway);
        assert_eq!(shown(&document.handle(step1(BOB))), "d");
        let effects = document.handle(committed(3));
        let rests: Vec<&Bytes> = effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Send {
                    message: ToEdge::Step2 { update, .. },
                    ..
                } => Some(update),
                _ => None,
            })
            .collect();
        assert_eq!(rests.len(), 3, "{effects:?}");
        assert_eq!(text_of(&[&old, rests[1]]), "d new");
        assert_eq!(text_of(&[&old, &deleted, rests[2]]), "d new");
        assert!(effects.contains(&receipt(ALICE, 4)));
    }

    #[test]
    fn the_past_is_replayed_from_a_snapshot_too_and_kept_short() {
        let mut typist = Typist::new(1);
        let first = typist.types("a");
        let state = typist.everything();
        let second = typist.types("b");
        let log = [(Seq(2), second)];
        let mut document = Document::open(Epoch(1), Some((Seq(1), &state)), &log, Seq(2)).unwrap();
        document.handle(Input::Attach {
            edge: EDGE,
            since: Bytes::new(),
        });
        document.handle(Input::Join {
            peer: ALICE,
            author: String::new(),
        });
        document.handle(step2(ALICE, 1, &Bytes::from_static(&NO_EDITS)));
        let state = typist.everything();
        let whole = *scan::scan_stored(&state).unwrap().summary();
        document.set_snapshot(Seq(2), state, whole);
        let big = "x".repeat(PAST_BYTES_MIN);
        for seq in 3..=5 {
            document.handle(update(ALICE, 2, &typist.types(&big)));
            document.handle(committed(seq));
        }
        document.handle(update(ALICE, 5, &typist.types("unsaved")));
        document.handle(Input::StoreAway);
        let effects = document.handle(step1(ALICE));
        let shown = told(&effects);
        let shown: Vec<&Bytes> = shown.iter().map(|(_, update)| *update).collect();
        assert_eq!(text_of(&shown), format!("ab{}", big.repeat(3)));
        drop(first);
    }

    #[test]
    fn a_large_document_is_encoded_once_for_all_who_come_and_what_follows_is_sent_as_it_was_logged()
    {
        let mut document = shared_by_alice_and_bob();
        let mut typist = Typist::new(1);
        let large = typist.types(&"x".repeat(LARGE_STATE_BYTES));
        document.handle(update(ALICE, 2, &large));
        assert_eq!(document.handle(step1(BOB)), [], "it is not committed");
        let effects = document.handle(committed(1));
        let [
            _,
            Effect::Send {
                message: ToEdge::Step2 { update: first, .. },
                ..
            },
        ] = effects.as_slice()
        else {
            panic!("a receipt and a step 2, not {effects:?}");
        };
        let effects = document.handle(step1(BOB));
        let [("step 2", again)] = told(&effects)[..] else {
            panic!("a step 2, not {effects:?}");
        };
        assert_eq!(first.as_ptr(), again.as_ptr(), "the same memory");

        let second = typist.types("second");
        document.handle(update(ALICE, 3, &second));
        let effects = document.handle(step1(BOB));
        assert_eq!(told(&effects), [("part", first)]);
        document.handle(update(ALICE, 4, &typist.types("third")));
        let effects = document.handle(committed(2));
        assert_eq!(told(&effects), [("step 2", &second)]);

        let effects = document.handle(step1(BOB));
        assert_eq!(told(&effects), [("part", first), ("part", &second)]);
        let nothing = Bytes::from_static(&NO_EDITS);
        let effects = document.handle(Input::StoreAway);
        assert_eq!(told(&effects), [("committed step 2", &nothing)]);
        let effects = document.handle(step1(BOB));
        let shown = [
            ("part", first),
            ("part", &second),
            ("committed step 2", &nothing),
        ];
        assert_eq!(told(&effects), shown);
        let effects = document.handle(committed(3));
        assert_eq!(told(&effects).len(), 2, "the rest for both: {effects:?}");
    }

    #[test]
    fn a_long_tail_of_a_large_document_is_encoded_with_it() {
        let mut document = shared_by_alice_and_bob();
        let mut typist = Typist::new(1);
        document.handle(update(
            ALICE,
            2,
            &typist.types(&"x".repeat(LARGE_STATE_BYTES)),
        ));
        let mut bob = Typist::new(2);
        bob.receives(&typist.everything());
        document.handle(step1(BOB));
        for number in 0..=TAIL_UPDATES_MAX as u64 {
            document.handle(update(ALICE, 3 + number, &typist.types("y")));
        }
        document.handle(committed(2 + i64::try_from(TAIL_UPDATES_MAX).unwrap()));
        let effects = document.handle(step1(BOB));
        let [("step 2", state)] = told(&effects)[..] else {
            panic!("one step 2, not {effects:?}");
        };
        assert_eq!(text_of(&[state]), document.text("quill"));

        // Who lacks little is sent little, and the deletes.
        document.handle(update(ALICE, 99, &typist.deletes(0, 1)));
        document.handle(committed(3 + i64::try_from(TAIL_UPDATES_MAX).unwrap()));
        let effects = document.handle(Input::Step1 {
            peer: BOB,
            state_vector: bob.state_vector(),
        });
        let parts = told(&effects);
        assert_eq!(parts.len(), 2, "{effects:?}");
        for (_, update) in parts {
            assert!(update.len() < 200);
            bob.receives(update);
        }
        assert_eq!(text_of(&[&bob.everything()]), document.text("quill"));
    }

    #[test]
    fn what_waits_for_its_commit_is_bounded_and_nothing_that_was_not_taken_is_forgotten() {
        let mut document = shared_by_alice_and_bob();
        let mut typist = Typist::new(1);
        let count = |effects: &[Effect], wanted: &ToEdge| {
            let sent = effects.iter().filter(
                |effect| matches!(effect, Effect::Send { message, .. } if message == wanted),
            );
            sent.count()
        };
        let mut pauses = 0;
        for number in 1..=UNSAVED_UPDATES_MAX {
            let effects = document.handle(update(ALICE, number as u64 + 1, &typist.types("x")));
            assert!(matches!(effects[1], Effect::Append { .. }));
            pauses += count(&effects, &ToEdge::Pause);
            assert_eq!(
                pauses,
                if number < UNCOMMITTED_UPDATES_MAX {
                    0
                } else {
                    2
                }
            );
        }
        let late = typist.types("late");
        let number = UNSAVED_UPDATES_MAX as u64 + 2;
        assert_eq!(
            document.handle(update(ALICE, number, &late)),
            [Effect::NotAdmitted { reason: "unsaved" }]
        );
        let all = i64::try_from(UNSAVED_UPDATES_MAX).unwrap();
        let effects = document.handle(committed(all - 600));
        assert_eq!(count(&effects, &ToEdge::Resume), 0, "not yet");
        let effects = document.handle(committed(all - 500));
        assert_eq!(count(&effects, &ToEdge::Resume), 2);
        assert!(
            matches!(
                effects.last(),
                Some(Effect::Send {
                    to: EDGE,
                    message: ToEdge::Step1 { .. }
                })
            ),
            "what was not taken is asked for: {effects:?}"
        );
        let effects = document.handle(step2(ALICE, number + 1, &late));
        assert!(matches!(effects[1], Effect::Append { .. }));
    }

    #[test]
    fn a_read_only_document_takes_nothing_and_acknowledges_what_it_has() {
        let mut typist = Typist::new(1);
        let good = typist.types("good");
        let log = [(Seq(1), good.clone())];
        let mut document = Document::open(Epoch(1), None, &log, Seq(1)).unwrap();
        document.set_read_only();
        document.handle(Input::Attach {
            edge: EDGE,
            since: Bytes::new(),
        });
        document.handle(Input::Join {
            peer: ALICE,
            author: String::new(),
        });
        assert_eq!(document.handle(step2(ALICE, 1, &good)), [receipt(ALICE, 1)]);
        for bytes in [typist.types("more"), typist.deletes(0, 2)] {
            assert_eq!(
                document.handle(update(ALICE, 2, &bytes)),
                [Effect::NotAdmitted { reason: "degraded" }]
            );
        }
        assert_eq!(document.text("quill"), "good");
    }

    #[test]
    fn malformed_bytes_close_their_socket_and_change_nothing() {
        let mut document = shared_by_alice_and_bob();
        for bytes in [
            &[1, 1, 1, 2, 162, 8, 6, 0, 0, 0][..],
            &[255, 255, 255, 255, 15],
            b"text",
        ] {
            let effects = document.handle(update(ALICE, 2, &Bytes::copy_from_slice(bytes)));
            assert_eq!(effects[0], Effect::NotAdmitted { reason: "invalid" });
            assert!(matches!(
                &effects[1],
                Effect::Send {
                    message: ToEdge::Refused { .. },
                    ..
                }
            ));
        }
        assert_eq!(document.assigned_seq(), Seq(0));
        assert_eq!(document.encode_state().as_ref(), NO_EDITS);
    }

    #[test]
    fn what_edits_made_larger_than_one_edit_may_be_is_opened_again() {
        const STEP: u32 = 20_000;
        let mut document = shared_by_alice_and_bob();
        let steps = u32::try_from(UPDATE_STRUCTS_MAX).unwrap() / STEP + 1;
        let mut log = Vec::new();
        for step in 0..steps {
            let typed = typed_backwards(step * STEP..(step + 1) * STEP);
            let effects = document.handle(update(ALICE, u64::from(step) + 2, &typed));
            let Some(Effect::Append { seq, update, .. }) = effects.get(1) else {
                panic!("step {step} is not taken: {effects:?}");
            };
            log.push((*seq, update.clone()));
            document.handle(Input::Committed { seq: *seq });
        }
        let (last, state) = (document.assigned_seq(), document.encode_state());
        let too_many = scan::ScanError::TooMany {
            what: "structs",
            max: UPDATE_STRUCTS_MAX,
        };
        assert_eq!(scan::scan_update(&state).unwrap_err(), too_many);
        for (snapshot, log) in [(Some((last, &state)), &[][..]), (None, &log)] {
            let opened = Document::open(Epoch(2), snapshot, log, last).unwrap();
            assert_eq!(opened.encode_state(), state);
        }
        // Nor does a failover of the database lose it.
        let mut empty = Document::open(Epoch(3), None, &[], Seq(0)).unwrap();
        let effects = empty.handle(Input::Restore { state });
        assert!(matches!(effects[1], Effect::Append { .. }), "{effects:?}");
    }

    #[test]
    fn a_full_document_takes_nothing_but_deletions_and_opens_all_the_same() {
        let mut document = shared_by_alice_and_bob();
        let mut typist = Typist::new(1);
        document.handle(update(ALICE, 2, &typist.types("hello")));
        let whole = Summary {
            structs: DOCUMENT_MEMORY_MAX / STRUCT_BYTES + 1,
            ..Summary::default()
        };
        document.set_snapshot(Seq(1), typist.everything(), whole);
        let effects = document.handle(update(ALICE, 3, &typist.types("!")));
        let [
            Effect::NotAdmitted { reason: "full" },
            Effect::Send {
                message: ToEdge::Refused { reason, .. },
                ..
            },
        ] = effects.as_slice()
        else {
            panic!("a refusal, not {effects:?}");
        };
        assert!(reason.contains("the document is full"), "{reason}");
        let mut other = Typist::new(2);
        other.receives(&document.encode_state());
        let deleted = other.deletes(0, 1);
        let effects = document.handle(update(ALICE, 4, &deleted));
        assert!(matches!(effects[1], Effect::Append { .. }), "{effects:?}");

        // What was only taken for much is counted again before anything is refused.
        let mut document = shared_by_alice_and_bob();
        let mut typist = Typist::new(1);
        for number in 0..DOCUMENT_MEMORY_MAX / (16 << 20) {
            let big = typist.types(&"x".repeat(8 << 20));
            document.handle(update(ALICE, number * 2 + 2, &big));
            let gone = typist.deletes(0, 8 << 20);
            let effects = document.handle(update(ALICE, number * 2 + 3, &gone));
            assert!(matches!(effects[1], Effect::Append { .. }), "{effects:?}");
            let seq = document.assigned_seq();
            document.handle(Input::Committed { seq });
        }
        assert!(document.memory() < DOCUMENT_MEMORY_MAX / 2);
    }

    /// The second would be told that its edit is saved: the document has that clock.
    #[test]
    fn of_two_devices_with_one_client_id_the_second_is_refused() {
        let mut document = shared_by_alice_and_bob();
        let first = Typist::new(1).types("hello");
        document.handle(update(ALICE, 2, &first));
        document.handle(committed(1));
        for other in [
            Typist::new(1).types("jello"),
            Typist::new(1).types("hallo and more"),
        ] {
            let effects = document.handle(update(BOB, 2, &other));
            assert_eq!(effects[0], Effect::NotAdmitted { reason: "conflict" });
            assert!(
                matches!(&effects[1..], [Effect::Send { to: OTHER_EDGE, message: ToEdge::Refused { reason, .. } }]
                    if reason.contains("in use by another device")),
                "{effects:?}"
            );
        }
        assert_eq!(document.assigned_seq(), Seq(1));
        // Whoever goes on from what is there is welcome.
        document.handle(step2(BOB, 3, &Typist::new(1).types("hello, both")));
        assert_eq!(document.assigned_seq(), Seq(2));
        assert_eq!(document.text("quill"), "hello, both");
    }

    #[test]
    fn updates_that_can_never_be_taken_cost_nothing_that_stays() {
        let mut document = shared_by_alice_and_bob();
        let mut known = Typist::new(1);
        document.handle(update(ALICE, 2, &known.types("known")));
        document.handle(committed(1));
        for client in 0..20_000_u64 {
            // "x" at clock 7 of a client of whom nothing else ever comes
            let mut lone = vec![1, 1];
            crate::wire::varint::write_var_uint(&mut lone, 1_000 + client);
            lone.extend([7, 4, 1, 1, b't', 1, b'x', 0]);
            let effects = document.handle(step2(BOB, 3 + client, &lone.into()));
            assert_eq!(effects[0], Effect::NotAdmitted { reason: "gap" });
        }
        assert_eq!(document.assigned_seq(), Seq(1));
        assert_eq!(document.encode_state(), known.everything());
    }

    #[test]
    fn presence_belongs_to_its_socket_and_ends_with_it_or_when_it_is_not_renewed() {
        let mut document = shared_by_alice_and_bob();
        let at = Duration::from_secs;
        assert_eq!(
            document.handle(presence(ALICE, 7, 1, "{}", at(0))),
            [shown(7, 1, "{}")]
        );
        assert_eq!(
            document.handle(presence(ALICE, 7, 1, "{}", at(1))),
            [],
            "an older or equal clock says nothing new"
        );
        document.handle(Input::Join {
            peer: BOB,
            author: "bob".to_owned(),
        });
        assert_eq!(
            document.handle(presence(BOB, 7, 9, "{}", at(2))),
            [],
            "another user must not speak for it"
        );
        assert_eq!(
            document.handle(presence(ALICE, 7, 2, "{}", at(20))),
            [shown(7, 2, "{}")]
        );
        assert_eq!(document.handle(Input::Expire { now: at(49) }), []);
        assert_eq!(
            document.handle(Input::Expire { now: at(50) }),
            [shown(7, 2, "null")]
        );
        document.handle(presence(BOB, 8, 1, "{}", at(51)));
        assert_eq!(
            document.handle(Input::Detach { edge: OTHER_EDGE }),
            [shown(8, 1, "null")]
        );
    }

    #[test]
    fn a_document_opens_from_snapshot_and_log_and_refuses_a_hole() {
        let mut typist = Typist::new(1);
        let first = typist.types("a");
        let snapshot = typist.everything();
        let second = typist.types("b");
        let third = typist.types("c");
        let log = [(Seq(2), second), (Seq(3), third.clone())];
        let opened = Document::open(Epoch(4), Some((Seq(1), &snapshot)), &log, Seq(3)).unwrap();
        assert_eq!((opened.text("quill").as_str(), opened.tail()), ("abc", 2));
        let holed = Document::open(Epoch(4), None, &[(Seq(1), first), (Seq(2), third)], Seq(2));
        assert!(holed.is_err());
    }

    #[test]
    fn a_document_that_was_opened_ahead_goes_on_with_the_tail() {
        let mut typist = Typist::new(1);
        let rows: Vec<(Seq, Bytes)> = (1..=3).map(|seq| (Seq(seq), typist.types("a"))).collect();
        let mut document = Document::open(Epoch(0), None, &rows[..1], Seq(1)).unwrap();
        document.resume(Epoch(7), &rows[1..]).unwrap();
        assert_eq!(document.text("quill"), "aaa");
        assert_eq!(document.committed_seq(), Seq(3));
        let attached = document.handle(Input::Attach {
            edge: EDGE,
            since: Bytes::new(),
        });
        assert!(matches!(
            &attached[0],
            Effect::Send {
                message: ToEdge::Attached {
                    epoch: Epoch(7),
                    ..
                },
                ..
            }
        ));
        let mut late = Document::open(Epoch(0), None, &rows[..1], Seq(1)).unwrap();
        assert!(
            late.resume(Epoch(7), &rows[2..]).is_err(),
            "a row is missing"
        );
    }

    #[test]
    fn what_the_store_lost_is_written_again_from_memory() {
        let mut typist = Typist::new(1);
        let rows: Vec<(Seq, Bytes)> = (1..=3).map(|seq| (Seq(seq), typist.types("a"))).collect();
        let memory = Document::open(Epoch(4), None, &rows, Seq(3)).unwrap();
        let state = memory.encode_state();
        let mut stored = Document::open(Epoch(5), None, &rows[..1], Seq(1)).unwrap();
        let effects = stored.handle(Input::Restore {
            state: state.clone(),
        });
        let [
            Effect::FanOut { from: None, .. },
            Effect::Append {
                seq: Seq(2),
                update,
                ..
            },
        ] = effects.as_slice()
        else {
            panic!("one append, not {effects:?}");
        };
        assert_eq!(stored.text("quill"), "aaa");
        assert_eq!(text_of(&[&rows[0].1, update]), "aaa");
        assert_eq!(stored.handle(Input::Restore { state }), []);
    }

    /// A client's document.
    struct Typist(Doc);

    impl Typist {
        fn new(client: u64) -> Self {
            let offset_kind = OffsetKind::Utf16;
            let client_id = ClientID::new(client);
            Self(Doc::with_options(Options {
                client_id,
                offset_kind,
                ..Options::default()
            }))
        }

        /// Types at the end and answers the update.
        fn types(&mut self, text: &str) -> Bytes {
            let quill = self.0.get_or_insert_text("quill");
            let mut txn = self.0.transact_mut();
            let end = quill.len(&txn);
            quill.insert(&mut txn, end, text);
            txn.encode_update_v1().into()
        }

        fn deletes_first(&mut self) {
            let quill = self.0.get_or_insert_text("quill");
            quill.remove_range(&mut self.0.transact_mut(), 0, 1);
        }

        /// Deletes and answers the update.
        fn deletes(&mut self, index: u32, length: u32) -> Bytes {
            let quill = self.0.get_or_insert_text("quill");
            let mut txn = self.0.transact_mut();
            quill.remove_range(&mut txn, index, length);
            txn.encode_update_v1().into()
        }

        fn receives(&mut self, update: &[u8]) {
            let update = Update::decode_v1(update).unwrap();
            self.0.transact_mut().apply_update(update).unwrap();
        }

        fn everything(&self) -> Bytes {
            self.0
                .transact()
                .encode_state_as_update_v1(&StateVector::default())
                .into()
        }

        fn state_vector(&self) -> Bytes {
            self.0.transact().state_vector().encode_v1().into()
        }
    }

    /// Clocks of client 1: each "x" stands before the one before it, so that none joins another.
    fn typed_backwards(clocks: std::ops::Range<u32>) -> Bytes {
        use crate::wire::varint::write_var_uint;
        let mut update = vec![1];
        write_var_uint(&mut update, u64::from(clocks.end - clocks.start));
        update.push(1);
        write_var_uint(&mut update, clocks.start.into());
        for clock in clocks {
            if let Some(before) = clock.checked_sub(1) {
                update.extend([0x44, 1]);
                write_var_uint(&mut update, before.into());
            } else {
                update.extend([0x04, 1, 1, b't']);
            }
            update.extend([1, b'x']);
        }
        update.push(0);
        update.into()
    }

    fn text_of(updates: &[&Bytes]) -> String {
        let mut reader = Typist::new(99);
        for update in updates {
            reader.receives(update);
        }
        let quill = reader.0.get_or_insert_text("quill");
        quill.get_string(&reader.0.transact())
    }

    /// What a newcomer is sent, in order.
    fn told(effects: &[Effect]) -> Vec<(&'static str, &Bytes)> {
        let sent = effects.iter().filter_map(|effect| match effect {
            Effect::Send { message, .. } => Some(message),
            _ => None,
        });
        sent.filter_map(|message| match message {
            ToEdge::Part { update, .. } => Some(("part", update)),
            ToEdge::CommittedStep2 { update, .. } => Some(("committed step 2", update)),
            ToEdge::Step2 { update, .. } => Some(("step 2", update)),
            _ => None,
        })
        .collect()
    }

    /// An empty document with both sockets joined and their first answers received.
    fn shared_by_alice_and_bob() -> Document {
        let mut document = Document::open(Epoch(1), None, &[], Seq(0)).unwrap();
        for peer in [ALICE, BOB] {
            document.handle(Input::Attach {
                edge: peer.edge,
                since: Bytes::new(),
            });
            document.handle(Input::Join {
                peer,
                author: format!("{:?}", peer.edge),
            });
            document.handle(step2(peer, 1, &Bytes::from_static(&NO_EDITS)));
        }
        document
    }

    const fn peer(edge: EdgeId, connection: u64) -> Peer {
        Peer {
            edge,
            connection: ConnectionId(connection),
        }
    }

    fn update(peer: Peer, number: u64, update: &Bytes) -> Input {
        Input::Update {
            peer,
            number,
            kind: UpdateKind::Update,
            update: update.clone(),
        }
    }

    fn step2(peer: Peer, number: u64, update: &Bytes) -> Input {
        Input::Update {
            peer,
            number,
            kind: UpdateKind::Step2,
            update: update.clone(),
        }
    }

    fn step1(peer: Peer) -> Input {
        Input::Step1 {
            peer,
            state_vector: Bytes::from_static(&[0]),
        }
    }

    fn presence(peer: Peer, client: u64, clock: u32, json: &str, now: Duration) -> Input {
        let payload = awareness::encode([awareness::Entry {
            client,
            clock,
            json,
        }]);
        Input::Awareness { peer, payload, now }
    }

    fn shown(client: u64, clock: u32, json: &str) -> Effect {
        Effect::Presence {
            payload: awareness::encode([awareness::Entry {
                client,
                clock,
                json,
            }]),
        }
    }

    const fn committed(seq: i64) -> Input {
        Input::Committed { seq: Seq(seq) }
    }

    fn fan_out(from: Peer, update: &Bytes) -> Effect {
        Effect::FanOut {
            from: Some(from),
            update: update.clone(),
        }
    }

    fn append(seq: i64, update: &Bytes) -> Effect {
        let author = format!("{EDGE:?}");
        Effect::Append {
            seq: Seq(seq),
            update: update.clone(),
            author,
        }
    }

    const fn receipt(peer: Peer, upto: u64) -> Effect {
        Effect::Send {
            to: peer.edge,
            message: ToEdge::Receipt {
                connection: peer.connection,
                upto,
            },
        }
    }
}
