//! The world: clients, owners, a store with the fence, and what goes wrong between them.

use std::collections::BTreeMap;

use bytes::Bytes;
use collab_core::document::{Document, EdgeId, Effect, Input, Peer, new_doc};
use collab_core::ids::{ConnectionId, Epoch, Seq};
use collab_core::wire::relay::{ToEdge, UpdateKind};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use yrs::updates::decoder::Decode;
use yrs::updates::encoder::Encode;
use yrs::{
    ClientID, Doc, GetString, OffsetKind, Options, ReadTxn, StateVector, Text, Transact, Update,
};

const CLIENTS: usize = 4;
/// The part of a run in which things go wrong, in ms.
const TROUBLE: u64 = 300_000;
/// The part in which everything heals, in ms.
const HEALING: u64 = 60_000;

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) acked: usize,
    pub(crate) faults: usize,
    pub(crate) fenced: usize,
    pub(crate) seconds: f64,
}

impl std::ops::AddAssign for Outcome {
    fn add_assign(&mut self, other: Self) {
        self.acked += other.acked;
        self.faults += other.faults;
        self.fenced += other.fenced;
        self.seconds += other.seconds;
    }
}

#[derive(Debug)]
enum Event {
    /// A client types.
    Edit(usize),
    /// A client without a session looks for the owner.
    Connect(usize),
    /// What a client sent arrives at the owner of its session.
    ToOwner(Session, Input),
    /// What an owner sent arrives at a client.
    ToClient(Session, ToEdge),
    /// The store has an append in hand.
    Write { owner: u64, seq: Seq, update: Bytes },
    /// The store's answer arrives at the owner.
    Answer { owner: u64, seq: Seq, held: bool },
    /// Something goes wrong.
    Fault,
    /// A process takes the document over.
    TakeOver,
    /// A frozen owner goes on.
    Thaw(u64),
    /// An owner hears that it is none any more.
    Release(u64),
}

/// A client's connection to one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Session {
    client: usize,
    number: u64,
    owner: u64,
}

/// A process that owns the document, or believes that it does.
struct Owner {
    epoch: Epoch,
    document: Document,
    /// Inputs that wait for the end of its sleep.
    frozen: Option<Vec<(Session, Input)>>,
    /// Answers that wait likewise.
    answers: Vec<(Seq, bool)>,
    sessions: BTreeMap<Peer, Session>,
    /// The group commit: one append at a time, in order.
    queue: Vec<(Seq, Bytes)>,
    writing: bool,
}

struct Client {
    id: u64,
    doc: Doc,
    session: Option<Session>,
    sessions: u64,
    sent: u64,
    /// Per update of this session, how many of its tokens it stands for.
    covers: BTreeMap<u64, usize>,
    tokens: Vec<String>,
    acked: usize,
}

/// Someone who closed the tab: what was not acknowledged may be gone with it.
struct Departed {
    tokens: Vec<String>,
    acked: usize,
}

/// Everything, and the seed that decides it.
pub(crate) struct World {
    random: StdRng,
    now: u64,
    queue: BTreeMap<(u64, u64), Event>,
    events: u64,
    clients: Vec<Client>,
    departed: Vec<Departed>,
    next_client: u64,
    owners: BTreeMap<u64, Owner>,
    /// The owner that new sessions find.
    current: Option<u64>,
    next_owner: u64,
    log: Vec<(Seq, Epoch, Bytes)>,
    epoch: Epoch,
    /// Arrival times keep the order of a link.
    links: BTreeMap<(Session, bool), u64>,
    outcome: Outcome,
    fence: bool,
    early_receipts: bool,
}

impl World {
    pub(crate) fn new(seed: u64) -> Self {
        let mut world = Self {
            random: StdRng::seed_from_u64(seed),
            now: 0,
            queue: BTreeMap::new(),
            events: 0,
            clients: (1..=CLIENTS as u64).map(Client::new).collect(),
            departed: Vec::new(),
            next_client: CLIENTS as u64 + 1,
            owners: BTreeMap::new(),
            current: None,
            next_owner: 1,
            log: Vec::new(),
            epoch: Epoch(0),
            links: BTreeMap::new(),
            outcome: Outcome::default(),
            fence: true,
            early_receipts: false,
        };
        world.after(0, Event::TakeOver);
        for client in 0..CLIENTS {
            world.after(10, Event::Connect(client));
            world.after(100, Event::Edit(client));
        }
        world.after(1_000, Event::Fault);
        world
    }

    /// A mutant: stale owners are not refused.
    pub(crate) fn without_fence(mut self) -> Self {
        self.fence = false;
        self
    }

    /// A mutant: owners believe that what they queued is durable.
    pub(crate) fn with_early_receipts(mut self) -> Self {
        self.early_receipts = true;
        self
    }

    /// Plays the seed and checks what must hold.
    ///
    /// # Panics
    /// When it does not hold.
    pub(crate) fn run(mut self) -> Outcome {
        while let Some(((at, _), event)) = self.queue.pop_first() {
            self.now = at;
            if TROUBLE + HEALING < at {
                break;
            }
            self.step(event);
        }
        self.check();
        let departed: usize = self.departed.iter().map(|departed| departed.acked).sum();
        self.outcome.acked = departed
            + self
                .clients
                .iter()
                .map(|client| client.acked)
                .sum::<usize>();
        self.outcome.seconds = std::time::Duration::from_millis(self.now).as_secs_f64();
        self.outcome
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Edit(client) => self.edit(client),
            Event::Connect(client) => self.connect(client),
            Event::ToOwner(session, input) => self.owner_gets(session, input),
            Event::ToClient(session, message) => self.client_gets(session, message),
            Event::Write { owner, seq, update } => self.write(owner, seq, update),
            Event::Answer { owner, seq, held } => self.answer(owner, seq, held),
            Event::Fault => self.fault(),
            Event::TakeOver => self.take_over(),
            Event::Thaw(owner) => self.thaw(owner),
            Event::Release(owner) => self.release(owner),
        }
    }

    fn edit(&mut self, number: usize) {
        if self.now < TROUBLE {
            let pause = self.random.random_range(50..2_000);
            self.after(pause, Event::Edit(number));
        } else {
            return;
        }
        let place: u32 = self.random.random_range(0..10_000);
        let client = &mut self.clients[number];
        let token = format!("<{}.{}>", client.id, client.tokens.len());
        let text = client.doc.get_or_insert_text("quill");
        let update: Bytes = {
            let mut txn = client.doc.transact_mut();
            // Between tokens, so that none is torn by another.
            let content = text.get_string(&txn);
            let ends: Vec<usize> = content
                .match_indices('>')
                .map(|(at, _)| at + 1)
                .chain([0])
                .collect();
            let at = ends[place as usize % ends.len()];
            text.insert(&mut txn, u32::try_from(at).expect("short"), &token);
            txn.encode_update_v1().into()
        };
        client.tokens.push(token);
        if let Some(session) = client.session {
            self.send_update(session, UpdateKind::Update, update);
        }
    }

    fn connect(&mut self, number: usize) {
        if self.clients[number].session.is_some() {
            return;
        }
        let reachable = self.current.filter(|owner| self.owners.contains_key(owner));
        let Some(owner) = reachable else {
            let pause = self.random.random_range(100..1_000);
            return self.after(pause, Event::Connect(number));
        };
        let client = &mut self.clients[number];
        client.sessions += 1;
        let session = Session {
            client: number,
            number: client.sessions,
            owner,
        };
        client.session = Some(session);
        client.sent = 0;
        client.covers.clear();
        let state_vector: Bytes = client.doc.transact().state_vector().encode_v1().into();
        let peer = peer(session);
        self.send(
            session,
            Input::Attach {
                edge: peer.edge,
                since: Bytes::new(),
            },
        );
        self.send(
            session,
            Input::Join {
                peer,
                author: String::new(),
            },
        );
        self.send(session, Input::Step1 { peer, state_vector });
    }

    fn send_update(&mut self, session: Session, kind: UpdateKind, update: Bytes) {
        let client = &mut self.clients[session.client];
        client.sent += 1;
        let number = client.sent;
        client.covers.insert(number, client.tokens.len());
        self.send(
            session,
            Input::Update {
                peer: peer(session),
                number,
                kind,
                update,
            },
        );
    }

    fn owner_gets(&mut self, session: Session, input: Input) {
        let Some(owner) = self.owners.get_mut(&session.owner) else {
            return;
        };
        if let Some(waiting) = &mut owner.frozen {
            waiting.push((session, input));
            return;
        }
        if let Input::Attach { .. } = input {
            owner.sessions.insert(peer(session), session);
        }
        let effects = owner.document.handle(input);
        self.perform(session.owner, effects);
    }

    fn perform(&mut self, number: u64, effects: Vec<Effect>) {
        for effect in effects {
            let Some(owner) = self.owners.get_mut(&number) else {
                return;
            };
            match effect {
                Effect::FanOut { from, update } => {
                    let others: Vec<Session> = owner
                        .sessions
                        .iter()
                        .filter(|(peer, _)| Some(**peer) != from)
                        .map(|(_, session)| *session)
                        .collect();
                    for session in others {
                        self.reply(
                            session,
                            ToEdge::FanOut {
                                except: None,
                                update: update.clone(),
                            },
                        );
                    }
                }
                Effect::Send { to, message } => {
                    let session = owner
                        .sessions
                        .iter()
                        .find(|(peer, _)| peer.edge == to)
                        .map(|(_, session)| *session);
                    if let Some(session) = session {
                        self.reply(session, message);
                    }
                }
                Effect::Append { seq, update, .. } => {
                    owner.queue.push((seq, update));
                    self.write_next(number);
                    if self.early_receipts
                        && let Some(owner) = self.owners.get_mut(&number)
                    {
                        let effects = owner.document.handle(Input::Committed { seq });
                        self.perform(number, effects);
                    }
                }
                Effect::Presence { .. } | Effect::NotAdmitted { .. } | Effect::Reload => {}
            }
        }
    }

    /// Sends the next append to the store, if none is on its way.
    fn write_next(&mut self, number: u64) {
        let Some(owner) = self.owners.get_mut(&number) else {
            return;
        };
        if owner.writing || owner.queue.is_empty() {
            return;
        }
        owner.writing = true;
        let (seq, update) = owner.queue.remove(0);
        // Now and then a commit hangs for seconds: long enough for the document to change hands.
        let slow = self.random.random_bool(0.02);
        let pause = if slow {
            self.random.random_range(1_000..6_000)
        } else {
            self.random.random_range(1..30)
        };
        self.after(
            pause,
            Event::Write {
                owner: number,
                seq,
                update,
            },
        );
    }

    /// One statement: compares the epoch and inserts. It happens whether or not its sender still lives.
    fn write(&mut self, number: u64, seq: Seq, update: Bytes) {
        let epoch = Epoch(i64::try_from(number).expect("few owners"));
        let held = epoch == self.epoch || !self.fence;
        if held {
            self.log.push((seq, epoch, update));
        } else {
            self.outcome.fenced += 1;
        }
        let pause = self.random.random_range(1..30);
        self.after(
            pause,
            Event::Answer {
                owner: number,
                seq,
                held,
            },
        );
    }

    fn answer(&mut self, number: u64, seq: Seq, held: bool) {
        let Some(owner) = self.owners.get_mut(&number) else {
            return;
        };
        if owner.frozen.is_some() {
            owner.answers.push((seq, held));
            return;
        }
        owner.writing = false;
        if held {
            let effects = owner.document.handle(Input::Committed { seq });
            self.perform(number, effects);
            self.write_next(number);
        } else {
            self.end(number);
        }
    }

    fn client_gets(&mut self, session: Session, message: ToEdge) {
        if self.clients[session.client].session != Some(session) {
            return;
        }
        let client = &mut self.clients[session.client];
        match message {
            ToEdge::FanOut { update, .. }
            | ToEdge::Step2 { update, .. }
            | ToEdge::CatchUp { update } => {
                let update = Update::decode_v1(&update).expect("an owner sends updates");
                client
                    .doc
                    .transact_mut()
                    .apply_update(update)
                    .expect("a client can apply them");
            }
            ToEdge::Step1 { state_vector, .. } => {
                let wanted =
                    StateVector::decode_v1(&state_vector).expect("an owner sends state vectors");
                let update = client
                    .doc
                    .transact()
                    .encode_state_as_update_v1(&wanted)
                    .into();
                self.send_update(session, UpdateKind::Step2, update);
            }
            ToEdge::Receipt { upto, .. } => {
                let covered = client
                    .covers
                    .range(..=upto)
                    .map(|(_, tokens)| *tokens)
                    .max();
                client.acked = client.acked.max(covered.unwrap_or(0));
            }
            ToEdge::Refused { reason, .. } => panic!("a good client was refused: {reason}"),
            _ => {}
        }
    }

    fn fault(&mut self) {
        if TROUBLE < self.now {
            return;
        }
        let pause = self.random.random_range(2_000..15_000);
        self.after(pause, Event::Fault);
        self.outcome.faults += 1;
        match self.random.random_range(0..5) {
            // The owner is killed.
            0 => {
                if let Some(owner) = self.current.take() {
                    self.end(owner);
                    let pause = self.random.random_range(500..3_000);
                    self.after(pause, Event::TakeOver);
                }
            }
            // It freezes, another takes over, and it wakes up none the wiser.
            1 => {
                if let Some(owner) = self.current
                    && let Some(frozen) = self.owners.get_mut(&owner)
                {
                    frozen.frozen.get_or_insert_default();
                    let nap = self.random.random_range(500..8_000);
                    self.after(nap, Event::Thaw(owner));
                    self.after(2_500, Event::TakeOver);
                }
            }
            // Another takes over while it works: a partition, or a planned move gone wrong.
            2 => self.take_over(),
            // Someone closes the tab, and somebody else comes.
            3 => {
                let number = self.random.random_range(0..CLIENTS);
                self.cut(number);
                let newcomer = Client::new(self.next_client);
                self.next_client += 1;
                let Client { tokens, acked, .. } =
                    std::mem::replace(&mut self.clients[number], newcomer);
                self.departed.push(Departed { tokens, acked });
            }
            // A client's link breaks.
            _ => {
                let client = self.random.random_range(0..CLIENTS);
                self.cut(client);
            }
        }
    }

    /// Claims first, then loads: what an older owner wrote before the claim is there, and nothing of it comes later.
    fn take_over(&mut self) {
        self.epoch = Epoch(i64::try_from(self.next_owner).expect("few owners"));
        let number = self.next_owner;
        self.next_owner += 1;
        let rows: Vec<(Seq, Bytes)> = self
            .log
            .iter()
            .map(|(seq, _, update)| (*seq, update.clone()))
            .collect();
        let last = rows.last().map_or(Seq(0), |(seq, _)| *seq);
        let document =
            Document::open(self.epoch, None, &rows, last).expect("the log can be loaded");
        let owner = Owner {
            epoch: self.epoch,
            document,
            frozen: None,
            answers: Vec::new(),
            sessions: BTreeMap::new(),
            queue: Vec::new(),
            writing: false,
        };
        for earlier in self.owners.keys().copied().collect::<Vec<_>>() {
            let pause = self.random.random_range(200..5_000);
            self.after(pause, Event::Release(earlier));
        }
        self.owners.insert(number, owner);
        self.current = Some(number);
    }

    fn release(&mut self, number: u64) {
        match self.owners.get(&number) {
            Some(owner) if owner.frozen.is_some() => self.after(500, Event::Release(number)),
            Some(_) => self.end(number),
            None => {}
        }
    }

    fn thaw(&mut self, number: u64) {
        let Some(owner) = self.owners.get_mut(&number) else {
            return;
        };
        let waiting = owner.frozen.take().unwrap_or_default();
        let answers = std::mem::take(&mut owner.answers);
        for (session, input) in waiting {
            self.owner_gets(session, input);
        }
        for (seq, held) in answers {
            self.answer(number, seq, held);
        }
    }

    /// An owner is no more, and its clients look for the next one.
    fn end(&mut self, number: u64) {
        self.owners.remove(&number);
        for client in 0..CLIENTS {
            if self.clients[client]
                .session
                .is_some_and(|session| session.owner == number)
            {
                self.cut(client);
            }
        }
    }

    fn cut(&mut self, client: usize) {
        if let Some(session) = self.clients[client].session.take()
            && let Some(owner) = self.owners.get_mut(&session.owner)
        {
            owner.sessions.remove(&peer(session));
            owner.document.handle(Input::Detach {
                edge: peer(session).edge,
            });
        }
        let pause = self.random.random_range(50..2_000);
        self.after(pause, Event::Connect(client));
    }

    fn send(&mut self, session: Session, input: Input) {
        let at = self.arrival(session, true);
        self.at(at, Event::ToOwner(session, input));
    }

    fn reply(&mut self, session: Session, message: ToEdge) {
        let at = self.arrival(session, false);
        self.at(at, Event::ToClient(session, message));
    }

    fn arrival(&mut self, session: Session, up: bool) -> u64 {
        let delay = self.random.random_range(1..100);
        let last = self.links.entry((session, up)).or_default();
        *last = (self.now + delay).max(*last);
        *last
    }

    fn after(&mut self, pause: u64, event: Event) {
        self.at(self.now + pause, event);
    }

    fn at(&mut self, at: u64, event: Event) {
        self.events += 1;
        self.queue.insert((at, self.events), event);
    }

    fn check(&self) {
        for pair in self.log.windows(2) {
            assert_eq!(
                pair[0].0.next(),
                pair[1].0,
                "the log has no hole and nothing twice"
            );
            assert!(pair[0].1 <= pair[1].1, "epochs never fall along the log");
        }
        let cold = new_doc();
        for (_, _, update) in &self.log {
            let update = Update::decode_v1(update).expect("the log holds updates");
            cold.transact_mut()
                .apply_update(update)
                .expect("they can be applied");
        }
        let stored = text(&cold);
        let owner = self
            .current
            .and_then(|owner| self.owners.get(&owner))
            .expect("somebody owns it");
        assert_eq!(owner.epoch, self.epoch);
        assert_eq!(
            owner.document.text("quill"),
            stored,
            "the owner has what the store has"
        );
        for client in &self.clients {
            assert_eq!(text(&client.doc), stored, "every client ends alike");
            assert_eq!(
                client.acked,
                client.tokens.len(),
                "after the healing everything is acknowledged"
            );
            for token in &client.tokens {
                assert_eq!(
                    stored.matches(token.as_str()).count(),
                    1,
                    "{token} is there exactly once"
                );
            }
        }
        let mut known: Vec<&String> = self
            .clients
            .iter()
            .flat_map(|client| &client.tokens)
            .collect();
        for departed in &self.departed {
            for (number, token) in departed.tokens.iter().enumerate() {
                match stored.matches(token.as_str()).count() {
                    0 => assert!(
                        departed.acked <= number,
                        "{token} was acknowledged and is lost"
                    ),
                    1 => known.push(token),
                    _ => panic!("{token} is there twice"),
                }
            }
        }
        let length: usize = known.into_iter().map(String::len).sum();
        assert_eq!(stored.len(), length, "nothing else is there");
    }
}

impl Client {
    fn new(id: u64) -> Self {
        let options = Options {
            client_id: ClientID::new(id),
            offset_kind: OffsetKind::Utf16,
            ..Options::default()
        };
        Self {
            id,
            doc: Doc::with_options(options),
            session: None,
            sessions: id * 1_000,
            sent: 0,
            covers: BTreeMap::new(),
            tokens: Vec::new(),
            acked: 0,
        }
    }
}

const fn peer(session: Session) -> Peer {
    let connection = ConnectionId(session.client as u64);
    Peer {
        edge: EdgeId(session.client as u64 * 1_000_000_000 + session.number),
        connection,
    }
}

fn text(doc: &Doc) -> String {
    let text = doc.get_or_insert_text("quill");
    text.get_string(&doc.transact())
}
