//! A document that is open and owned: inputs go in turns to its state machine, and what that asks for is done.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use collab_core::document::{Document, EdgeId, Effect, Input, Peer};
use collab_core::ids::{DocumentId, Epoch, RoomEpoch, Seq};
use collab_core::mutants::Mutant;
use collab_core::scan::Summary;
use collab_core::wire::awareness;
use collab_core::wire::relay::{ToEdge, ToOwner, Unavailable};
use litemap::LiteMap;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep};

use super::meter::Counts;
use super::opening::End;
use super::tally::Tally;
use super::{Answer, AskError, Documents, EdgeSender, Question, Reply, TICK, ToDocument};
use crate::log::LogEvent;
use crate::memory::Share;
use crate::queue;
use crate::store::{Append, Ownership};

/// Inputs of a document that are taken before others have their turn.
const INPUTS_PER_TURN: usize = 64;
/// An update of this size may take the CRDT library long: it is applied apart from other documents.
const HEAVY_UPDATE_BYTES: usize = 64 * 1024;
/// An input that takes longer is told in the log.
const HEAVY_AFTER: Duration = Duration::from_secs(2);

/// What is done about an input that takes its time. It takes memory only while it is there.
type Rare<'turn> = Pin<Box<dyn Future<Output = Option<End>> + Send + 'turn>>;

/// A document that is open and owned.
pub(super) struct Owned {
    pub(super) documents: Arc<Documents>,
    pub(super) name: DocumentId,
    pub(super) id: u64,
    pub(super) counts: Arc<Counts>,
    pub(super) ownership: Ownership,
    /// Failovers of the database when it began to be read.
    pub(super) failovers: u64,
    pub(super) room_epoch: RoomEpoch,
    pub(super) document: Document,
    /// Of the node's memory.
    pub(super) share: Share,
    pub(super) tally: Tally,
    pub(super) edges: LiteMap<EdgeId, EdgeSender>,
    pub(super) log_reply: queue::Sender<LogEvent>,
    pub(super) log_events: queue::Receiver<LogEvent>,
    /// Answers that wait until what they show is durable.
    pub(super) waiting: Vec<(Seq, Reply, Answer)>,
    pub(super) snapshot_running: Option<oneshot::Receiver<Option<Snapshotted>>>,
    /// The last one.
    pub(super) snapshot_begun: Option<Instant>,
    pub(super) presence_changed: bool,
    /// What the edges are to be told of it once the turn ends.
    pub(super) presence: Vec<Bytes>,
    /// Since when no edge is attached.
    pub(super) idle_since: Instant,
    /// When somebody last came, asked or left.
    pub(super) used_at: Instant,
    /// When an update began to wait for the log, or the last commit if more wait.
    pub(super) unsettled_since: Option<Instant>,
    pub(super) damage: Option<Box<Damage>>,
}

/// What is wrong with the stored rows; the document is read-only.
pub(super) struct Damage {
    pub(super) reason: String,
    pub(super) found_at: Instant,
}

/// A snapshot that is stored.
pub(super) struct Snapshotted {
    pub(super) seq: Seq,
    pub(super) state: Bytes,
    pub(super) whole: Summary,
}

impl Drop for Owned {
    fn drop(&mut self) {
        let metrics = &self.documents.metrics;
        metrics.documents_open.dec();
        self.tally.replace(Tally::default(), metrics);
    }
}

impl Owned {
    /// Serves until something ends it.
    pub(super) async fn serve(
        mut self: Box<Self>,
        inputs: &mut queue::Receiver<ToDocument>,
        backlog: &mut VecDeque<ToDocument>,
    ) -> (End, LiteMap<EdgeId, EdgeSender>) {
        let mut tick = pin!(sleep(Duration::ZERO));
        let end = loop {
            let step = tokio::select! {
                biased;
                Some(event) = self.log_events.recv() => self.logged(event),
                message = next(backlog, inputs), if !self.must_settle() => {
                    match self.take_turn(message, inputs, backlog) {
                        Ok(end) => end,
                        Err(rare) => rare.await,
                    }
                }
                stored = async { self.snapshot_running.as_mut().expect("guarded").await },
                    if self.snapshot_running.is_some() =>
                {
                    self.snapshot_running = None;
                    if let Ok(Some(Snapshotted { seq, state, whole })) = stored {
                        self.document.set_snapshot(seq, state, whole);
                    }
                    None
                }
                () = tick.as_mut() => {
                    let end = self.tick(inputs).await;
                    tick.as_mut().reset(self.documents.beat_after(self.next_tick()));
                    end
                }
            };
            self.show_presence();
            if self.is_busy() {
                let soon = self.documents.beat_after(Instant::now() + TICK);
                if soon < tick.deadline() {
                    tick.as_mut().reset(soon);
                }
            }
            if let Some(end) = step {
                break end;
            }
        };
        self.rescue(&end);
        (end, std::mem::take(&mut self.edges))
    }

    /// Takes an input and what has come after it by now: who is told of it is woken once for all.
    fn take_turn<'turn>(
        &'turn mut self,
        first: Option<ToDocument>,
        inputs: &'turn mut queue::Receiver<ToDocument>,
        backlog: &'turn mut VecDeque<ToDocument>,
    ) -> Result<Option<End>, Rare<'turn>> {
        let Some(mut message) = first else {
            return Ok(Some(End::Unused));
        };
        let mut end = None;
        for count in 1.. {
            end = match message {
                ToDocument::Freeze(settled) => {
                    return Err(Box::pin(self.frozen(inputs, settled, backlog)));
                }
                ToDocument::Delete(reply) => return Err(Box::pin(self.delete(reply))),
                ToDocument::Unload => self.unload(inputs),
                message => self.take(message),
            };
            if end.is_some() || count == INPUTS_PER_TURN || self.must_settle() {
                break;
            }
            message = match backlog.pop_front().or_else(|| inputs.try_recv().ok()) {
                Some(next) => next,
                None => break,
            };
        }
        // At once: until the next look many more could be opened.
        self.share.set(self.document.memory());
        Ok(end)
    }

    pub(super) fn take(&mut self, message: ToDocument) -> Option<End> {
        match message {
            ToDocument::Attach(edge, sender, since) => {
                if let Some(damage) = &self.damage {
                    let reason = damage.reason.clone();
                    sender.send(ToEdge::ReadOnly { reason });
                }
                self.edges.insert(edge, sender);
                let end = self.handle(Input::Attach { edge, since });
                self.used();
                end
            }
            ToDocument::Detach(edge) => {
                self.edges.remove(&edge);
                self.presence_changed = true;
                let end = self.handle(Input::Detach { edge });
                self.used();
                end
            }
            ToDocument::FromEdge(edge, message) => {
                let input = self.input(edge, message)?;
                let comes_or_goes = matches!(input, Input::Join { .. } | Input::Leave { .. });
                let end = self.handle(input);
                if comes_or_goes {
                    self.used();
                }
                end
            }
            ToDocument::Ask(question, reply) => {
                self.ask(&question, reply);
                self.used();
                None
            }
            ToDocument::Release(epoch) if self.ownership.epoch < epoch => Some(End::Moved(epoch)),
            // The others are taken by the loop.
            ToDocument::Release(_)
            | ToDocument::Thaw
            | ToDocument::Freeze(_)
            | ToDocument::Delete(_)
            | ToDocument::Unload => None,
        }
    }

    fn input(&self, edge: EdgeId, message: ToOwner) -> Option<Input> {
        let peer = |connection| Peer { edge, connection };
        Some(match message {
            // The channel is open already; its end comes as a detach.
            ToOwner::Attach { .. }
            | ToOwner::Detach
            | ToOwner::Preload { .. }
            | ToOwner::AskMap => return None,
            ToOwner::Join { connection, author } => Input::Join {
                peer: peer(connection),
                author,
            },
            ToOwner::Leave { connection } => Input::Leave {
                peer: peer(connection),
            },
            ToOwner::Step1 {
                connection,
                state_vector,
            } => Input::Step1 {
                peer: peer(connection),
                state_vector,
            },
            ToOwner::Update {
                connection,
                number,
                kind,
                update,
            } => Input::Update {
                peer: peer(connection),
                number,
                kind,
                update,
            },
            ToOwner::Awareness {
                connection,
                payload,
            } => {
                let now = self.documents.started.elapsed();
                Input::Awareness {
                    peer: peer(connection),
                    payload,
                    now,
                }
            }
            ToOwner::QueryAwareness { connection } => Input::QueryAwareness {
                peer: peer(connection),
            },
            ToOwner::Compare {
                connection,
                number,
                update,
            } => Input::Compare {
                peer: peer(connection),
                number,
                update,
            },
            ToOwner::Stateless {
                connection,
                payload,
            } => Input::Stateless {
                peer: peer(connection),
                payload,
            },
        })
    }

    /// Feeds the state machine. A panic in it ends this document only, and the socket whose input it was.
    pub(super) fn handle(&mut self, input: Input) -> Option<End> {
        let culprit = match &input {
            Input::Update { peer, .. }
            | Input::Compare { peer, .. }
            | Input::Awareness { peer, .. }
            | Input::Step1 { peer, .. } => Some(*peer),
            _ => None,
        };
        let large = match &input {
            Input::Update { update, .. } => HEAVY_UPDATE_BYTES <= update.len(),
            Input::Step1 { .. } | Input::Attach { .. } => self.document.is_large(),
            _ => false,
        };
        let begun = Instant::now();
        let document = &mut self.document;
        let work = move || {
            catch_unwind(AssertUnwindSafe(|| {
                #[cfg(debug_assertions)]
                panic_on_request(&input);
                document.handle(input)
            }))
        };
        let handled = if large {
            self.documents.tasks.compute_here(work)
        } else {
            work()
        };
        if HEAVY_AFTER < begun.elapsed() {
            tracing::warn!(document.id = %self.name, duration_ms = begun.elapsed().as_millis(), "an input took long");
        }
        if let Ok(effects) = handled {
            let reload = effects.contains(&Effect::Reload);
            for effect in effects {
                self.perform(effect);
            }
            reload.then_some(End::Reload)
        } else {
            self.documents.metrics.document_panics.inc();
            tracing::error!(document.id = %self.name, "an input made the document panic; it is loaded again");
            if let Some(peer) = culprit
                && let Some(edge) = self.edges.get(&peer.edge)
            {
                let reason = "this input cannot be handled".to_owned();
                edge.send(ToEdge::Refused {
                    connection: peer.connection,
                    reason,
                });
            }
            Some(End::Reload)
        }
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::FanOut { from, update } => {
                if Mutant::UpdateDropped.is_active()
                    && self.documents.next_id.fetch_add(1, Ordering::Relaxed) % 1_000 == 999
                {
                    return;
                }
                for (edge, sender) in self.edges.iter() {
                    let except = from
                        .filter(|peer| peer.edge == *edge)
                        .map(|peer| peer.connection);
                    sender.send(ToEdge::FanOut {
                        except,
                        update: update.clone(),
                    });
                }
            }
            Effect::Presence { payload } => {
                self.presence_changed = true;
                self.presence.push(payload);
            }
            Effect::Send { to, message } => {
                if let Some(sender) = self.edges.get(&to) {
                    sender.send(message);
                }
            }
            Effect::Append {
                seq,
                update,
                author,
            } => {
                self.counts.update(update.len());
                let append = Append {
                    document: self.name.clone(),
                    seq,
                    ownership: self.ownership,
                    bytes: update,
                    author,
                };
                self.unsettled_since.get_or_insert_with(Instant::now);
                let (log, reply) = (&self.documents.log, self.log_reply.clone());
                log.append(append, self.failovers, reply);
            }
            Effect::NotAdmitted { reason } => {
                self.documents
                    .metrics
                    .updates_refused
                    .with_label_values(&[reason])
                    .inc();
            }
            Effect::Reload => {
                tracing::error!(document.id = %self.name, "an update failed half-way; the document is loaded again");
            }
        }
    }

    /// Tells the edges what became known of who is there, all of it at once.
    fn show_presence(&mut self) {
        let payload = match self.presence.as_slice() {
            [] => return,
            [one] => one.clone(),
            several => awareness::merge(several.iter().map(Bytes::as_ref)),
        };
        // Most documents are idle at any moment.
        self.presence = Vec::new();
        for sender in self.edges.values() {
            let payload = payload.clone();
            sender.send(ToEdge::Presence { payload });
        }
    }

    pub(super) fn logged(&mut self, event: LogEvent) -> Option<End> {
        match event {
            LogEvent::Committed(seq) => {
                let end = self.handle(Input::Committed { seq });
                let settled = self.document.is_settled();
                self.unsettled_since = (!settled).then(Instant::now);
                if settled && self.snapshot_is_urgent() {
                    self.start_snapshot();
                }
                let durable = self.waiting.extract_if(.., |(after, ..)| *after <= seq);
                for (_, reply, answer) in durable {
                    let _ = reply.send(Ok(answer));
                }
                end
            }
            LogEvent::Fenced => {
                // Whoever took the slot raised its epoch by one at least.
                let epoch = Epoch(self.ownership.epoch.0 + 1);
                Some(End::Moved(epoch))
            }
            LogEvent::Conflict => {
                tracing::error!(document.id = %self.name, "the log holds other bytes than memory; the document is loaded again");
                Some(End::Reload)
            }
            LogEvent::Refused => {
                self.documents.set_degraded(|degraded| {
                    degraded.insert(self.name.clone());
                });
                let reason = "the store does not take what was written to it".to_owned();
                Some(End::Unavailable(Unavailable::Degraded, reason))
            }
        }
    }

    /// Answers now what is durable now, and the rest when it is.
    fn ask(&mut self, question: &Question, reply: Reply) {
        if let Some(damage) = &self.damage
            && !matches!(question, Question::Presence)
        {
            // A part that looks like the whole would be kept as such.
            let error = AskError::Unavailable {
                document: self.name.clone(),
                reason: damage.reason.clone(),
            };
            let _ = reply.send(Err(error));
            return;
        }
        let answer = match question {
            Question::Text(name) => Answer::Text(self.document.text(name)),
            Question::State => Answer::State(self.document.whole_state()),
            Question::Presence => Answer::Presence(self.presence()),
        };
        if self.document.is_settled() {
            let _ = reply.send(Ok(answer));
        } else {
            self.waiting
                .push((self.document.assigned_seq(), reply, answer));
        }
    }

    pub(super) fn presence(&self) -> Vec<(u64, String)> {
        self.document
            .presence()
            .map(|(client, state)| (client, state.to_owned()))
            .collect()
    }
}

/// Makes a debug build panic on an update that holds the bytes of `COLLAB_PANIC_ON`, so that it can be seen what a
/// panic ends. Not in release builds.
#[cfg(debug_assertions)]
fn panic_on_request(input: &Input) {
    static BYTES: std::sync::LazyLock<Option<String>> =
        std::sync::LazyLock::new(|| std::env::var("COLLAB_PANIC_ON").ok());
    if let (Some(bytes), Input::Update { update, .. }) = (BYTES.as_deref(), input) {
        let asked = update
            .windows(bytes.len().max(1))
            .any(|window| window == bytes.as_bytes());
        assert!(!asked, "asked to panic");
    }
}

/// The next input, those that a freeze held back first.
async fn next(
    backlog: &mut VecDeque<ToDocument>,
    inputs: &mut queue::Receiver<ToDocument>,
) -> Option<ToDocument> {
    if let Some(held) = backlog.pop_front() {
        return Some(held);
    }
    inputs.recv().await
}
