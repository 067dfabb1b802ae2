//! Watches the world: what clients were promised, what the log holds, and what must hold at each step.
//!
//! It sees every statement as the database executes it and every frame as an edge sends it, so that a
//! receipt is judged at the moment it leaves, not when the dust has settled.
//!
//! | must hold | where it is looked at |
//! | --- | --- |
//! | an acknowledged edit is in every replica, at the owner and in a cold reload, once | `World::check`, `Ledger::judge` |
//! | positions follow one another; epochs of a slot never fall along them, nor at all | `Committed::take`, [`Witness::after_statement`] |
//! | no receipt for a row that is not in the log | [`Witness::frame_leaves`], as the frame leaves |
//! | after a claim, a handoff or a pin nothing is written under the epoch before it | [`Witness::appended`]: the row's slot is that of its document, one incarnation writes under an epoch, none under an older one |
//! | no position is written twice | `Committed::take` |
//! | a step 2 holds what is committed and no more | [`Witness::frame_leaves`] |
//! | after the last fault clients, owner and reload agree on state, deletions and text | `World::check` |
//! | a snapshot is the log up to its position | [`Witness::snapshotted`], and the reload in `World::check` |
//! | a batch whose outcome is not known is neither doubled nor dropped | `CutStoreReplies` and `Outage`, with the first two |
//! | one document's fault is no other's | a task that panics ends the seed (`World::start`); hostile bytes: tier process, `hostile`, and tier fuzz |
//! | queues are bounded | batches and their number (`Flight` in `database.rs`), tasks (`World::watch`), rows of a log at the end (`World::check`); what waits for a commit or for a socket: unit tests of `document.rs` and tier process, `hostile` |
//! | an update is in the log of its document only, and never when its author may only read | [`Witness::appended`], with readers that type all the same |
//! | within 15 s after the last fault there are receipts again | `World::recover` |
//! | a slot has an owner if a node lives well; who believes in its lease has it | `World::watch` |
//! | an outage of the database makes nobody take slots from those who live | `Server::taken_from` |
//! | never two batches of a slot at once | `Flight` |

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use collab_core::ids::{DocumentId, Epoch, Seq, Slot};
use collab_core::replica::new_doc;
use collab_core::scan;
use collab_core::wire::y_websocket::{self, Message};
use collab_node::store::memory::Database;
use collab_node::store::{Append, Appended, Judgement, NewSnapshot, Ownership};
use tokio::time::Instant;
use uuid::Uuid;
use yrs::updates::decoder::Decode;
use yrs::{ClientID, Doc, GetString, ReadTxn, StateVector, Transact, Update};

use crate::ledger::{Change, Ledger, Token, Verdict, contained, parsed, spelled};

/// Lines of the trace that a failure shows.
const LINES_SHOWN: usize = 150;

/// Sees everything.
pub(crate) struct Witness {
    started: Instant,
    inner: Mutex<Inner>,
    aloud: bool,
}

struct Inner {
    ledger: Ledger,
    violations: Vec<String>,
    documents: BTreeMap<DocumentId, Committed>,
    slots: Vec<Epoch>,
    /// Who wrote under which epoch of which slot.
    owners: BTreeMap<(Slot, Epoch), Uuid>,
    harm: Harm,
    fenced: usize,
    early: usize,
    commits: usize,
    hash: u64,
    lines: VecDeque<String>,
}

/// The worst of what must not be, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Harm {
    /// Acknowledged insertions that are not there, or deletions that are undone.
    pub(crate) lost: usize,
    /// Tokens that are there twice.
    pub(crate) doubled: usize,
    /// Rows that were written by somebody who does not own their document.
    pub(crate) two_owners: usize,
}

/// What the log of a document holds.
struct Committed {
    doc: Doc,
    last: Seq,
    /// Slot and epoch of the last row. Epochs of two slots say nothing of each other.
    right: (Slot, Epoch),
    tokens: Option<BTreeSet<Token>>,
    /// What it held once and a database server took with it.
    gone: BTreeSet<Change>,
    /// How far that went.
    reach: StateVector,
}

impl Witness {
    pub(crate) fn new() -> Self {
        let inner = Inner {
            ledger: Ledger::default(),
            violations: Vec::new(),
            documents: BTreeMap::new(),
            slots: Vec::new(),
            owners: BTreeMap::new(),
            harm: Harm::default(),
            fenced: 0,
            early: 0,
            commits: 0,
            hash: 0,
            lines: VecDeque::new(),
        };
        Self {
            started: Instant::now(),
            inner: Mutex::new(inner),
            aloud: std::env::var_os("COLLAB_SIM_ALOUD").is_some(),
        }
    }

    /// Notes something that must not be.
    pub(crate) fn violated(&self, what: impl Into<String>) {
        let what = what.into();
        self.trace(|| format!("VIOLATED: {what}"));
        let mut inner = self.inner();
        if inner.violations.len() < 10 {
            inner.violations.push(what);
        }
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        self.inner().violations.clone()
    }

    /// Adds a line to the trace, by whose hash two runs are compared.
    pub(crate) fn trace(&self, line: impl FnOnce() -> String) {
        let at = self.started.elapsed();
        let mut inner = self.inner();
        let mut text = format!("{:9.3} ", at.as_secs_f64());
        text.push_str(&line());
        // FNV-1a: the same everywhere.
        for byte in text.bytes() {
            inner.hash = (inner.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        if self.aloud {
            println!("{text}");
        }
        if inner.lines.len() == LINES_SHOWN {
            inner.lines.pop_front();
        }
        inner.lines.push_back(text);
    }

    pub(crate) fn hash(&self) -> u64 {
        self.inner().hash
    }

    pub(crate) fn last_lines(&self) -> String {
        let mut text = String::new();
        for line in &self.inner().lines {
            let _ = writeln!(text, "  {line}");
        }
        text
    }

    pub(crate) fn fenced(&self) -> usize {
        self.inner().fenced
    }

    pub(crate) fn commits(&self) -> usize {
        self.inner().commits
    }

    pub(crate) fn with_ledger<T>(&self, act: impl FnOnce(&mut Ledger) -> T) -> T {
        act(&mut self.inner().ledger)
    }

    /// A batch was executed.
    pub(crate) fn appended(&self, batch: &[Append], done: &Appended, database: &Database) {
        let mut violated = Vec::new();
        {
            let inner = &mut *self.inner();
            for append in batch {
                let key = (append.document.clone(), append.seq);
                if !done.held.contains(&append.ownership.slot) {
                    inner.fenced += 1;
                    continue;
                }
                if !done.inserted.contains(&key) {
                    continue;
                }
                inner.commits += 1;
                let slot = database.slot_of(&append.document);
                let Ownership {
                    slot: under,
                    epoch,
                    incarnation,
                } = append.ownership;
                let owner = *inner.owners.entry((under, epoch)).or_insert(incarnation);
                if owner != incarnation {
                    inner.harm.two_owners += 1;
                    violated.push(format!(
                        "{owner} and {incarnation} wrote under epoch {epoch} of slot {under}"
                    ));
                }
                if under != slot {
                    inner.harm.two_owners += 1;
                    violated.push(format!(
                        "{} was written under slot {under} and is in slot {slot}",
                        append.document
                    ));
                }
                for token in contained(&append.bytes) {
                    if !inner.ledger.belongs(token, &append.document) {
                        violated.push(format!(
                            "{} got {}, which is not for it",
                            append.document,
                            spelled(token)
                        ));
                    }
                }
                let committed = inner
                    .documents
                    .entry(append.document.clone())
                    .or_insert_with(Committed::new);
                if committed.is_older(append.ownership) {
                    inner.harm.two_owners += 1;
                }
                if let Err(what) = committed.take(append) {
                    violated.push(format!("{}: {what}", append.document));
                }
            }
        }
        self.trace(|| {
            let rows: Vec<String> = batch
                .iter()
                .map(|append| {
                    format!(
                        "{}/{} e{}",
                        append.document, append.seq, append.ownership.epoch
                    )
                })
                .collect();
            format!(
                "append {} held {:?} inserted {}",
                rows.join(" "),
                done.held,
                done.inserted.len()
            )
        });
        for what in violated {
            self.violated(what);
        }
    }

    /// A snapshot was stored: it may hold no more, and no less, than the log up to its position.
    pub(crate) fn snapshotted(&self, snapshot: &NewSnapshot) {
        self.trace(|| format!("snapshot {} at {}", snapshot.document, snapshot.seq));
        let inner = self.inner();
        let Some(committed) = inner.documents.get(&snapshot.document) else {
            return;
        };
        let copy = new_doc();
        let applied = Update::decode_v1(&snapshot.bytes).and_then(|update| {
            copy.transact_mut()
                .apply_update(update)
                .map_err(|_| yrs::encoding::read::Error::UnexpectedValue)
        });
        let ahead = applied.is_ok()
            && committed
                .doc
                .transact()
                .state_vector()
                .partial_cmp(&copy.transact().state_vector())
                .is_none_or(|order| order == std::cmp::Ordering::Less);
        let last = committed.last;
        drop(inner);
        if applied.is_err() {
            self.violated(format!(
                "the snapshot of {} cannot be applied",
                snapshot.document
            ));
        }
        if ahead || last < snapshot.seq {
            self.violated(format!(
                "the snapshot of {} holds what the log does not",
                snapshot.document
            ));
        }
    }

    /// A statement that may have changed the map was executed.
    pub(crate) fn after_statement(&self, database: &Database) {
        let rows = database.slots();
        let mut changed = Vec::new();
        let mut back = None;
        {
            let mut inner = self.inner();
            inner.slots.resize(rows.len(), Epoch(0));
            for (known, row) in inner.slots.iter_mut().zip(&rows) {
                if row.epoch < *known {
                    back = Some((row.slot, *known, row.epoch));
                }
                if row.epoch != *known {
                    changed.push((row.slot.0, row.epoch.0));
                    *known = row.epoch;
                }
            }
        }
        if !changed.is_empty() {
            self.trace(|| format!("map {changed:?}"));
        }
        if let Some((slot, before, now)) = back {
            self.violated(format!(
                "the epoch of slot {slot} went from {before} to {now}"
            ));
        }
    }

    /// A member asked for the end of another one's lease.
    pub(crate) fn judged(&self, judge: Uuid, target: Uuid, judgement: Judgement) {
        self.trace(|| format!("{judge} judges {target}: {judgement:?}"));
        if judgement == Judgement::Ended {
            self.inner().early += 1;
        }
    }

    /// A text at the end was compared with what was promised.
    pub(crate) fn judged_text(&self, verdict: &Verdict) {
        let harm = &mut self.inner().harm;
        harm.lost += verdict.lost.len() + verdict.revived.len();
        harm.doubled += verdict.doubled.len();
    }

    pub(crate) fn harm(&self) -> Harm {
        self.inner().harm
    }

    /// Leases that were ended early.
    pub(crate) fn ended_early(&self) -> usize {
        self.inner().early
    }

    /// What the database lost is not there any more; who was told of it before may still be told.
    pub(crate) fn failed_over(&self, database: &Database) {
        let inner = &mut *self.inner();
        inner.slots = database.slots().iter().map(|row| row.epoch).collect();
        inner.owners.clear();
        for (document, committed) in &mut inner.documents {
            let mut kept = Committed::of(database, document);
            let (before, now) = (committed.tokens().clone(), kept.tokens().clone());
            kept.gone = std::mem::take(&mut committed.gone);
            kept.gone
                .extend(before.difference(&now).copied().map(Change::Insert));
            kept.gone
                .extend(now.difference(&before).copied().map(Change::Delete));
            for change in &kept.gone {
                inner.ledger.is_gone(*change);
            }
            kept.reach = std::mem::take(&mut committed.reach);
            kept.reach.merge(committed.doc.transact().state_vector());
            *committed = kept;
        }
    }

    /// An edge puts a frame on a socket; `sent` is what came from there before.
    pub(crate) fn frame_leaves(&self, document: &DocumentId, frame: &[u8], sent: &Sent) {
        for message in y_websocket::parse(frame).flatten() {
            match message {
                Message::SyncStep1 { .. } | Message::Awareness(_) | Message::QueryAwareness => {}
                Message::SyncStep2 { update } => self.committed_state(document, update),
                Message::Update { update } => {
                    if let Some(change) = sent.echoes(update) {
                        self.receipt_leaves(document, &[change], "an echo");
                    }
                }
                Message::Saved { payload } => {
                    if let Some(changes) = sent.asked(payload) {
                        self.receipt_leaves(document, changes, "a saved message");
                    }
                }
                Message::PermissionDenied { .. } if sent.reader => {}
                Message::PermissionDenied { reason } => {
                    self.violated(format!("a good client was refused: {reason}"));
                }
            }
        }
    }

    /// A step 2 is a receipt for all that is in it.
    fn committed_state(&self, document: &DocumentId, update: &[u8]) {
        let inner = self.inner();
        let Ok(scan) = scan::scan_update(update) else {
            return;
        };
        let known = inner.documents.get(document).map(|committed| {
            let mut known = committed.doc.transact().state_vector();
            known.merge(committed.reach.clone());
            known
        });
        let known = known.unwrap_or_default();
        let ahead = scan
            .client_ends()
            .find(|(client, end)| known.get(&ClientID::new(*client)) < *end);
        drop(inner);
        if let Some((client, end)) = ahead {
            self.violated(format!(
                "a step 2 of {document} held the edits of client {client} up to {end}, which are not committed"
            ));
        }
    }

    fn receipt_leaves(&self, document: &DocumentId, changes: &[Change], how: &str) {
        let mut missing = None;
        {
            let inner = &mut *self.inner();
            let committed = inner
                .documents
                .entry(document.clone())
                .or_insert_with(Committed::new);
            for change in changes {
                let gone = committed.gone.contains(change);
                if !gone && !inner.ledger.is_done(*change, committed.tokens()) {
                    missing = Some(*change);
                }
            }
        }
        if let Some(change) = missing {
            self.violated(format!(
                "{document}: {how} went out for {change:?}, which is not committed"
            ));
        }
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics with it")
    }
}

impl Committed {
    fn new() -> Self {
        Self {
            doc: new_doc(),
            last: Seq(0),
            right: (Slot(0), Epoch(0)),
            tokens: None,
            gone: BTreeSet::new(),
            reach: StateVector::default(),
        }
    }

    /// What lies there.
    fn of(database: &Database, document: &DocumentId) -> Self {
        let mut committed = Self::new();
        if let Some(content) = database.content(document) {
            let snapshot = content.snapshot.iter().map(|snapshot| &snapshot.bytes);
            let log = content.log.iter().map(|(_, bytes)| bytes);
            for bytes in snapshot.chain(log) {
                let update = Update::decode_v1(bytes).expect("it was written");
                let applied = committed.doc.transact_mut().apply_update(update);
                applied.expect("it was written");
            }
            committed.last = content.last;
        }
        // Its own log is there, or was cut: then its slot has no older rows to compare with.
        if let Some(row) = database.log(document).pop() {
            committed.right = (row.slot, row.epoch);
        }
        committed
    }

    fn take(&mut self, append: &Append) -> Result<(), String> {
        let Append { seq, ownership, .. } = append;
        let problem = if *seq != self.last.next() {
            Some(format!("seq {seq} was written after {}", self.last))
        } else if self.is_older(*ownership) {
            Some(format!(
                "epoch {} wrote seq {seq} after epoch {}",
                ownership.epoch, self.right.1
            ))
        } else {
            None
        };
        self.last = *seq;
        self.right = (ownership.slot, ownership.epoch);
        self.tokens = None;
        let update = Update::decode_v1(&append.bytes).map_err(|error| error.to_string())?;
        let mut txn = self.doc.transact_mut();
        txn.apply_update(update)
            .map_err(|error| error.to_string())?;
        if txn.has_missing_updates() {
            return Err(format!("seq {seq} has a gap before it"));
        }
        problem.map_or(Ok(()), Err)
    }

    fn is_older(&self, ownership: Ownership) -> bool {
        let (slot, epoch) = self.right;
        ownership.slot == slot && ownership.epoch < epoch
    }

    fn tokens(&mut self) -> &BTreeSet<Token> {
        let doc = &self.doc;
        self.tokens.get_or_insert_with(|| {
            let text = text(doc);
            text.split_inclusive('>').filter_map(parsed).collect()
        })
    }
}

/// The text that everybody writes.
pub(crate) fn text(doc: &Doc) -> String {
    let text = doc.get_or_insert_text("quill");
    text.get_string(&doc.transact())
}

/// Insertions on earlier connections that are remembered.
const EARLIER_MAX: usize = 64;

/// What came from a socket, so that receipts on it can be told from other frames.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    /// By somebody who may not write.
    reader: bool,
    /// Another tab has had it, too, and may send the same bytes.
    shares: Arc<AtomicBool>,
    updates: Vec<Typed>,
    /// Insertions that went on connections before, and may still be on their way.
    earlier: Vec<(Bytes, Change)>,
    asked: Vec<(Vec<u8>, Vec<Change>)>,
    /// When frames for the client last had to wait at the node.
    full: Option<Instant>,
}

/// An edit on its way to a node.
#[derive(Debug)]
struct Typed {
    update: Bytes,
    change: Change,
    /// When the node had it.
    arrived: Option<Instant>,
}

impl Sent {
    /// Nothing yet, by somebody who may not write if it is a reader.
    pub(crate) fn by(reader: bool, shares: Arc<AtomicBool>) -> Self {
        Self {
            reader,
            shares,
            ..Self::default()
        }
    }

    /// What was sent on this connection and before it, for the next one.
    pub(crate) fn all(&self) -> Vec<(Bytes, Change)> {
        let here = self.updates.iter();
        let here = here.map(|typed| (typed.update.clone(), typed.change));
        let all: Vec<_> = self.earlier.iter().cloned().chain(here).collect();
        let few = all.len().saturating_sub(EARLIER_MAX);
        all[few..].to_vec()
    }

    /// After these.
    pub(crate) fn after(self, earlier: Vec<(Bytes, Change)>) -> Self {
        Self { earlier, ..self }
    }

    /// An edit was sent.
    pub(crate) fn update(&mut self, update: Bytes, change: Change) {
        self.updates.push(Typed {
            update,
            change,
            arrived: None,
        });
    }

    /// A receipt for these changes was asked for.
    pub(crate) fn ask(&mut self, payload: Vec<u8>, changes: Vec<Change>) {
        self.asked.push((payload, changes));
    }

    /// The node has read an edit.
    pub(crate) fn arrived(&mut self, update: &[u8]) {
        let mut typed = self.updates.iter_mut();
        if let Some(typed) = typed.find(|typed| typed.arrived.is_none() && typed.update == update) {
            typed.arrived = Some(Instant::now());
        }
    }

    /// The node has more for the client than fits on the way.
    pub(crate) fn is_full(&mut self) {
        self.full = Some(Instant::now());
    }

    /// What the return of `update` stands for, for a client that nobody shares its edits with.
    pub(crate) fn echoed(&self, update: &[u8]) -> Option<Change> {
        self.typed(update).map(|typed| typed.change)
    }

    /// What `update` is an echo of as it leaves the node.
    ///
    /// The same bytes may come from another tab. A node keeps them from the client while it owes it their
    /// echo; those that it sent, or had in hand for the client, before it knew, are none of its own.
    pub(crate) fn echoes(&self, update: &[u8]) -> Option<Change> {
        let Some(typed) = self.typed(update) else {
            let mut earlier = self.earlier.iter();
            let same = earlier.find(|(sent, _)| sent == update && !self.reader);
            return same.map(|(_, change)| *change);
        };
        let owed = || {
            let full = self.full;
            typed.arrived.is_some_and(|arrived| {
                arrived < Instant::now() && full.is_none_or(|full| full < arrived)
            })
        };
        (!self.shares.load(Ordering::Relaxed) || owed()).then_some(typed.change)
    }

    /// What the return of a payload stands for.
    pub(crate) fn asked(&self, payload: &[u8]) -> Option<&[Change]> {
        let mut newest = self.asked.iter().rev();
        newest
            .find(|(asked, _)| asked == payload)
            .map(|(_, changes)| changes.as_slice())
    }

    fn typed(&self, update: &[u8]) -> Option<&Typed> {
        let mut newest = self.updates.iter().rev();
        newest.find(|typed| typed.update == update)
    }
}
