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

use std::collections::{BTreeMap, VecDeque};
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use litemap::LiteMap;
use yrs::updates::decoder::Decode;
use yrs::updates::encoder::Encode;
use yrs::{ReadTxn, StateVector, Transact};

use crate::ids::{ConnectionId, Epoch, Seq};
use crate::limits::{
    LARGE_STATE_BYTES, SNAPSHOT_AFTER_UPDATES, SNAPSHOT_AFTER_UPDATES_MAX,
    SNAPSHOT_BYTES_PER_UPDATE, SNAPSHOT_OVERDUE_UPDATES, UNCOMMITTED_BYTES_MAX,
    UNCOMMITTED_UPDATES_MAX,
};
use crate::mutants::Mutant;
use crate::scan::{self, Summary};
use crate::wire::relay::ToEdge;

mod catch_up;
mod content;
mod exchange;
mod intake;
mod past;
mod presence;
mod size;
#[cfg(test)]
mod tests;

use catch_up::Has;
use content::Content;
use intake::{Intake, Taking};
use past::{Past, Whole};
use presence::Presence;
use size::{Room, Size};

pub use exchange::{EdgeId, Effect, Input, Peer};
pub use size::STRUCT_BYTES;

/// An update without structs and without deletes.
pub const NO_EDITS: [u8; 2] = [0, 0];
/// State vector of a client that has nothing.
pub const NO_CLOCKS: [u8; 1] = [0];

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
    /// Not there while the document rests.
    content: OnceLock<Box<Content>>,
    /// Since when the content was not needed, as far as it is known.
    quiet_since: Option<Duration>,
    epoch: Epoch,
    assigned: Seq,
    committed: Seq,
    /// Last position that a stored snapshot contains.
    snapshot: Seq,
    /// One for each node that has it open.
    edges: Vec<EdgeId>,
    /// A tree makes room for eleven at once, and most documents have few.
    sockets: LiteMap<Peer, Socket>,
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

struct Socket {
    author: String,
    /// Steps 1 sent and not yet answered. Single changes are passed over meanwhile: the answer has them.
    unanswered: u32,
    /// Its last answer had a hole, or came when nothing was taken; asked again when that has changed.
    stuck: bool,
}

struct Waiting {
    after: Seq,
    to: EdgeId,
    message: ToEdge,
    /// Of a step 2 whose client was not shown the committed state: what it has of that.
    has: Option<Has>,
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
            content: OnceLock::from(Box::default()),
            quiet_since: None,
            epoch,
            assigned: last,
            committed: last,
            snapshot: snapshot.map_or(Seq(0), |(seq, _)| seq),
            edges: Vec::new(),
            sockets: LiteMap::new(),
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
        let replayed = self.content_mut().replay(bytes);
        replayed.map_err(|reason| OpenError { seq, reason })
    }

    /// Takes one input and says what is to be done.
    pub fn handle(&mut self, input: Input) -> Vec<Effect> {
        if input.needs_content() {
            self.quiet_since = None;
        }
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
            Input::Expire { now } => {
                self.rest_if_quiet(now);
                self.expire(now)
            }
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

    /// Log rows that make a snapshot due.
    fn snapshot_after(&self) -> i64 {
        let bytes = i64::try_from(self.stored.snapshot + self.stored.log).unwrap_or(i64::MAX);
        let rows = bytes / SNAPSHOT_BYTES_PER_UPDATE;
        rows.clamp(SNAPSHOT_AFTER_UPDATES, SNAPSHOT_AFTER_UPDATES_MAX)
    }

    /// The log is long enough for a new snapshot, as soon as the document [is settled](Self::is_settled).
    pub fn snapshot_is_due(&self) -> bool {
        self.snapshot_after() <= self.tail()
    }

    /// The log is so long that edits are to wait until a snapshot can be made.
    pub fn snapshot_is_overdue(&self) -> bool {
        self.snapshot_after() + SNAPSHOT_OVERDUE_UPDATES <= self.tail()
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
        self.content().doc.lacking(&StateVector::default())
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
        let txn = self.content().doc.transact();
        txn.get_text(name)
            .map_or_else(String::new, |text| yrs::GetString::get_string(&text, &txn))
    }

    fn attach(&mut self, edge: EdgeId, since: &[u8]) -> Vec<Effect> {
        if !self.edges.contains(&edge) {
            self.edges.push(edge);
        }
        let message = ToEdge::Attached {
            epoch: self.epoch,
            state_vector: self.state_vector(),
        };
        let mut effects = vec![Effect::Send { to: edge, message }];
        if !since.is_empty() {
            // A state vector that cannot be read only costs bytes: everything is sent.
            let since = StateVector::decode_v1(since).unwrap_or_default();
            let update = self.content().doc.lacking(&since);
            effects.extend(self.once_committed(edge, ToEdge::CatchUp { update }));
        }
        if self.intake != Intake::Open {
            let message = ToEdge::Pause;
            effects.push(Effect::Send { to: edge, message });
        }
        effects
    }

    fn detach(&mut self, edge: EdgeId) -> Vec<Effect> {
        self.edges.retain(|other| *other != edge);
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
        if self.sockets.is_empty() {
            self.sockets = LiteMap::with_capacity(1);
        }
        self.sockets.insert(peer, socket);
        let mut effects = vec![self.ask(peer)];
        effects.extend(self.presence_for(peer));
        effects
    }

    fn leave(&mut self, peer: Peer) -> Vec<Effect> {
        self.sockets.remove(&peer);
        self.end_presence(|presence| presence.peer == peer)
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

    fn to_all(&self, message: &ToEdge) -> Vec<Effect> {
        let edges = self.edges.iter();
        let sends = edges.map(|edge| Effect::Send {
            to: *edge,
            message: message.clone(),
        });
        sends.collect()
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
        self.content()
            .doc
            .transact()
            .state_vector()
            .encode_v1()
            .into()
    }
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
