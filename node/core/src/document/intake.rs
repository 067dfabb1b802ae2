//! Which edits are taken, and in which order they enter the log.

use bytes::Bytes;
use yrs::updates::decoder::Decode;
use yrs::{ReadTxn, Transact, Update};

use super::{Document, Effect, NO_EDITS, Peer, Room, Size, refuse};
use crate::limits::{
    DOCUMENT_MEMORY_MAX, UNCOMMITTED_BYTES_MAX, UNCOMMITTED_UPDATES_MAX, UNSAVED_BYTES_MAX,
    UNSAVED_UPDATES_MAX,
};
use crate::mutants::Mutant;
use crate::replica::{Applied, Replica};
use crate::scan::{self, Novelty, Scan, Summary};
use crate::wire::relay::{ToEdge, UpdateKind};

/// Fewer ranges of deletes are taken for new without a look.
const MANY_DELETE_RANGES: u64 = 64;

/// Which updates are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Taking {
    /// None: what is stored is damaged.
    Nothing,
    /// Those of clients, who may bring only so much.
    Bounded,
    /// All: they were taken before.
    Everything,
}

/// What is taken from clients while updates wait for their commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Intake {
    /// Everything.
    Open,
    /// What still comes; the edges were asked to stop reading.
    Paused,
    /// Nothing; it is asked for again later.
    Closed,
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

impl Document {
    pub(super) fn update(
        &mut self,
        peer: Peer,
        number: u64,
        kind: UpdateKind,
        update: Bytes,
    ) -> Vec<Effect> {
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

    pub(super) fn compare(&mut self, peer: Peer, number: u64, update: &[u8]) -> Vec<Effect> {
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
        match scan.novelty(|client| self.content().places.next_clock(client)) {
            Novelty::Nothing => Ok(true),
            Novelty::New => Ok(false),
            Novelty::MaybeDeletes => {
                let update = Update::decode_v1(update).map_err(|error| refused(&error))?;
                let deleted = self.content().doc.transact().snapshot().delete_set;
                Ok(update.delete_set().diff(&deleted).is_empty())
            }
        }
    }

    pub(super) fn restore(&mut self, state: &[u8]) -> Vec<Effect> {
        let mut earlier = Replica::new();
        if earlier.replay(state).is_none() {
            return vec![Effect::NotAdmitted { reason: "invalid" }];
        }
        let known = self.content().doc.transact().state_vector();
        let update = earlier.lacking(&known);
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
            scan.novelty(|client| self.content().places.next_clock(client)) == Novelty::Nothing
        })
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
        if let Some(conflict) = self.content().places.conflict(&scan) {
            return Admission::Conflict(conflict.to_string());
        }
        let next_clock = |client| self.content().places.next_clock(client);
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
        if let Err(error) = self.content_mut().places.take(&scan) {
            return invalid(&error);
        }
        match self.content_mut().doc.apply(&scan, decoded) {
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
        let deleted = self.content().doc.transact().snapshot().delete_set;
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
        let part = scan.admissible(|client| self.content().places.next_clock(client));
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
}
