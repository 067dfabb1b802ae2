//! The load generator: one thread, one poll, thousands of clients.
//!
//! Open loop: a client types when its schedule says, and every latency counts from that moment, so that a server that falls
//! behind does not slow the load down. What arrives is judged by clocks: merged frames count right, and nothing twice.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use collab_core::wire::varint::write_var_uint;
use mio::{Events, Interest, Poll, Token};

use crate::history::{EDIT_CHARS, read_edit, var_uint, write_edit};
use crate::servers::{Ack, Dialect, Running};
use crate::socket::{Arrival, Socket};
use crate::stats::Histogram;

/// Client ids of writers begin here; authors of a history are below.
const FIRST_WRITER: u64 = 1_000;
/// An update without edits.
const NOTHING: [u8; 2] = [0, 0];

/// Everybody who is connected to one server.
pub(crate) struct Load<'server> {
    server: &'server Running,
    poll: Poll,
    sockets: Vec<Socket>,
    dirty: Vec<usize>,
    scratch: Vec<u8>,
    schedule: BinaryHeap<Reverse<(u64, usize)>>,
    period: u64,
    presence: bool,
    begun: Instant,
    pub(crate) world: World,
}

/// Who is in which document and what they saw.
#[derive(Default)]
pub(crate) struct World {
    pub(crate) clients: Vec<Client>,
    writers: Vec<Writer>,
    documents: Vec<Document>,
    pub(crate) measured: Measured,
}

/// What was seen since the last [`Load::measure`].
#[derive(Default)]
pub(crate) struct Measured {
    /// From the schedule to each receiver.
    pub(crate) propagate: Histogram,
    /// From the schedule to the last receiver.
    pub(crate) last: Histogram,
    /// From the schedule to the sender's receipt.
    pub(crate) ack: Histogram,
}

#[derive(Default)]
struct Document {
    name: String,
    clients: usize,
    /// Indices of its writers.
    writers: Vec<usize>,
}

pub(crate) struct Client {
    document: usize,
    writer: Option<usize>,
    pub(crate) synced: Option<u64>,
    /// Per writer of the document, in the same order, the edits that arrived.
    seen: Vec<u32>,
    pub(crate) acked: u32,
    /// Update messages that arrived.
    pub(crate) updates: usize,
    /// Bytes of the messages with content, until the document was there.
    pub(crate) state_bytes: usize,
    /// Ends of the clocks in that state, when it is small.
    pub(crate) state: Vec<(u64, u32)>,
    pub(crate) closed: Option<u16>,
}

struct Writer {
    /// Its place among the writers of its document.
    place: usize,
    document: usize,
    /// When each edit was due, in µs.
    edits: Vec<u64>,
    /// How many receivers have it.
    arrived: Vec<u32>,
}

/// What the server is owed at once.
enum Reply {
    Nothing,
    /// It asked what this client has: nothing that it lacks.
    EmptyStep2,
}

impl<'server> Load<'server> {
    pub(crate) fn new(server: &'server Running) -> Result<Self> {
        Ok(Self {
            server,
            poll: Poll::new()?,
            sockets: Vec::new(),
            dirty: Vec::new(),
            scratch: vec![0; 256 * 1024],
            schedule: BinaryHeap::new(),
            period: 0,
            presence: false,
            begun: Instant::now(),
            world: World::default(),
        })
    }

    /// Connects `count` clients to a document, of which the first `writers` will type. They have what `state_vector` says.
    pub(crate) fn join(
        &mut self,
        document: &str,
        count: usize,
        writers: usize,
        state_vector: &[u8],
    ) -> Result<()> {
        self.server.create(document)?;
        let number = self.world.documents.len();
        self.world.documents.push(Document {
            name: document.to_owned(),
            ..Document::default()
        });
        for index in 0..count {
            let client = self.connect(number, state_vector)?;
            if index < writers {
                self.world.add_writer(client);
            }
        }
        Ok(())
    }

    /// Connects one more client to a document that others are in.
    pub(crate) fn connect(&mut self, document: usize, state_vector: &[u8]) -> Result<usize> {
        let name = &self.world.documents[document].name;
        let mut socket = Socket::connect(self.server.address, &self.server.path(name))?;
        let index = self.sockets.len();
        self.poll.registry().register(
            &mut socket.stream,
            Token(index),
            Interest::READABLE | Interest::WRITABLE,
        )?;
        socket.stream.set_nodelay(true).ok();
        self.sockets.push(socket);
        self.world.documents[document].clients += 1;
        let seen = vec![0; self.world.documents[document].writers.len()];
        self.world.clients.push(Client {
            document,
            writer: None,
            synced: None,
            seen,
            acked: 0,
            updates: 0,
            state_bytes: 0,
            state: Vec::new(),
            closed: None,
        });
        // What comes after the upgrade may be sent with it: the server reads it when it is ready.
        let name = self.world.documents[document].name.clone();
        let dialect = self.server.dialect;
        if dialect == Dialect::Hocuspocus {
            self.send(index, |out| {
                dialect.address(out, &name);
                out.extend_from_slice(&[2, 0, 0]);
            });
        }
        self.send(index, |out| {
            dialect.address(out, &name);
            out.extend_from_slice(&[0, 0]);
            write_var_uint(out, state_vector.len() as u64);
            out.extend_from_slice(state_vector);
        });
        Ok(index)
    }

    /// Runs until everybody has the document.
    pub(crate) fn everybody_synced(&mut self, limit: Duration) -> Result<()> {
        let done = self.pump_until(limit, |world| {
            world.clients.iter().all(|client| client.synced.is_some())
        })?;
        let missing = self
            .world
            .clients
            .iter()
            .filter(|client| client.synced.is_none())
            .count();
        ensure!(
            done,
            "{missing} clients of {} were not synced after {limit:?}",
            self.server.name
        );
        Ok(())
    }

    /// Lets every writer type `per_second` times from now on, one after the other.
    pub(crate) fn type_at(&mut self, per_second: f64) {
        self.schedule.clear();
        let writers: Vec<usize> = (0..self.world.clients.len())
            .filter(|client| self.world.clients[*client].writer.is_some())
            .collect();
        #[expect(
            clippy::cast_sign_loss,
            clippy::cast_possible_truncation,
            reason = "a rate is positive"
        )]
        let period = (1e6 / per_second) as u64;
        self.period = period.max(1);
        let now = self.micros();
        for (place, client) in writers.iter().enumerate() {
            let offset = self.period * place as u64 / writers.len() as u64;
            self.schedule.push(Reverse((now + 1_000 + offset, *client)));
        }
    }

    /// Lets every writer show its presence instead of typing.
    pub(crate) fn be_present_at(&mut self, per_second: f64) {
        self.presence = true;
        self.type_at(per_second);
    }

    /// Nobody types any more.
    pub(crate) fn rest(&mut self) {
        self.schedule.clear();
    }

    /// Begins a new measurement.
    pub(crate) fn measure(&mut self) {
        self.world.measured = Measured::default();
    }

    /// Sends a whole update as one client's.
    pub(crate) fn upload(&mut self, client: usize, update: &[u8]) {
        let (dialect, name) = (self.server.dialect, self.name_of(client));
        self.send(client, |out| {
            dialect.address(out, &name);
            out.extend_from_slice(&[0, 2]);
            write_var_uint(out, update.len() as u64);
            out.extend_from_slice(update);
        });
        self.flush();
    }

    /// Asks a y-sweet server to say when it is there.
    pub(crate) fn ask_version(&mut self, client: usize, version: u32) {
        self.send(client, |out| write_version(out, version));
        self.flush();
    }

    pub(crate) fn ack(&self) -> Ack {
        self.server.ack
    }

    pub(crate) fn micros(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Runs for some time.
    pub(crate) fn pump(&mut self, time: Duration) -> Result<()> {
        self.pump_until(time, |_| false).map(drop)
    }

    /// Runs until something is so, or the time is over; answers whether it is so.
    pub(crate) fn pump_until(
        &mut self,
        limit: Duration,
        done: impl Fn(&World) -> bool,
    ) -> Result<bool> {
        let deadline = Instant::now() + limit;
        let mut events = Events::with_capacity(4_096);
        loop {
            if done(&self.world) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.type_what_is_due();
            self.flush();
            let now = self.micros();
            let due = self.schedule.peek().map_or(left, |Reverse((due, _))| {
                Duration::from_micros(due.saturating_sub(now)).min(left)
            });
            // The system counts in ms: what is due sooner is waited for awake, without keeping others from this core.
            let pause =
                Duration::from_millis(u64::try_from(due.as_millis()).unwrap_or(u64::MAX).min(100));
            self.poll.poll(&mut events, Some(pause))?;
            if events.is_empty() && pause.is_zero() {
                std::thread::yield_now();
            }
            for event in &events {
                let index = event.token().0;
                if event.is_writable() {
                    self.dirty.push(index);
                }
                if event.is_readable() || event.is_read_closed() {
                    self.read(index);
                }
            }
        }
    }

    fn read(&mut self, index: usize) {
        let socket = &mut self.sockets[index];
        let open = socket.fill(&mut self.scratch);
        let now = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        while let Some(arrival) = socket.next() {
            let reply = match arrival {
                Arrival::Open => Reply::Nothing,
                Arrival::Message(range) => {
                    let payload = socket.payload(range);
                    self.world
                        .received(index, self.server, payload, payload.len(), now)
                }
                Arrival::Large(head, len) => {
                    self.world.received(index, self.server, &head, len, now)
                }
                Arrival::Closed(code) => {
                    self.world.clients[index].closed = Some(code);
                    Reply::Nothing
                }
            };
            if let Reply::EmptyStep2 = reply {
                let name = &self.world.documents[self.world.clients[index].document].name;
                socket.send(|out| {
                    self.server.dialect.address(out, name);
                    out.extend_from_slice(&[0, 1, 2]);
                    out.extend_from_slice(&NOTHING);
                });
                self.dirty.push(index);
            }
        }
        if !open && self.world.clients[index].closed.is_none() {
            self.world.clients[index].closed = Some(1006);
        }
    }

    fn type_what_is_due(&mut self) {
        let now = self.micros();
        while let Some(&Reverse((due, client))) = self.schedule.peek()
            && due <= now
        {
            self.schedule.pop();
            self.schedule.push(Reverse((due + self.period, client)));
            let Some(writer) = self.world.clients[client].writer else {
                continue;
            };
            let (id, clock) = (
                FIRST_WRITER + writer as u64,
                self.world.writers[writer].type_at(due),
            );
            let (dialect, name) = (self.server.dialect, self.name_of(client));
            if self.presence {
                self.send(client, |out| {
                    dialect.address(out, &name);
                    write_presence(out, id, clock);
                });
                continue;
            }
            self.send(client, |out| {
                dialect.address(out, &name);
                out.extend_from_slice(&[0, 2]);
                let start = out.len();
                // Short: its length takes one byte.
                out.push(0);
                write_edit(out, id, (clock - 1) * EDIT_CHARS);
                out[start] = u8::try_from(out.len() - start - 1).unwrap_or_default();
            });
            if self.server.ack == Ack::Version {
                self.send(client, |out| write_version(out, clock));
            }
        }
    }

    fn name_of(&self, client: usize) -> String {
        if self.server.dialect == Dialect::Hocuspocus {
            self.world.documents[self.world.clients[client].document]
                .name
                .clone()
        } else {
            String::new()
        }
    }

    fn send(&mut self, client: usize, write: impl FnOnce(&mut Vec<u8>)) {
        self.sockets[client].send(write);
        self.dirty.push(client);
    }

    fn flush(&mut self) {
        for client in std::mem::take(&mut self.dirty) {
            if self.world.clients[client].closed.is_none() && self.sockets[client].flush().is_err()
            {
                self.world.clients[client].closed = Some(1006);
            }
        }
    }
}

fn write_version(out: &mut Vec<u8>, version: u32) {
    let mut payload = Vec::new();
    write_var_uint(&mut payload, version.into());
    out.push(102);
    write_var_uint(out, payload.len() as u64);
    out.extend_from_slice(&payload);
}

/// A cursor, as an editor shows it.
fn write_presence(out: &mut Vec<u8>, id: u64, clock: u32) {
    let json = format!(
        r##"{{"user":{{"name":"someone","color":"#30bced"}},"cursor":{{"index":{clock},"length":0}}}}"##
    );
    let mut payload = vec![1];
    write_var_uint(&mut payload, id);
    write_var_uint(&mut payload, clock.into());
    write_var_uint(&mut payload, json.len() as u64);
    payload.extend_from_slice(json.as_bytes());
    out.push(1);
    write_var_uint(out, payload.len() as u64);
    out.extend_from_slice(&payload);
}

impl Writer {
    /// Notes an edit that was due then; answers its number, from 1.
    fn type_at(&mut self, due: u64) -> u32 {
        self.edits.push(due);
        self.arrived.push(0);
        u32::try_from(self.edits.len()).unwrap_or(u32::MAX)
    }
}

impl World {
    pub(crate) fn add_writer(&mut self, client: usize) {
        let document = self.clients[client].document;
        let writer = self.writers.len();
        let place = self.documents[document].writers.len();
        self.writers.push(Writer {
            place,
            document,
            edits: Vec::new(),
            arrived: Vec::new(),
        });
        self.documents[document].writers.push(writer);
        self.clients[client].writer = Some(writer);
        for other in self
            .clients
            .iter_mut()
            .filter(|other| other.document == document)
        {
            other.seen.resize(place + 1, 0);
        }
    }

    /// Edits that were sent.
    pub(crate) fn edits(&self) -> u64 {
        self.writers
            .iter()
            .map(|writer| writer.edits.len() as u64)
            .sum()
    }

    /// Deliveries that are still missing.
    pub(crate) fn missing(&self) -> u64 {
        let of_client = |client: &Client| -> u64 {
            let writers = &self.documents[client.document].writers;
            let others = writers
                .iter()
                .zip(&client.seen)
                .filter(|(writer, _)| client.writer != Some(**writer));
            others
                .map(|(writer, seen)| self.writers[*writer].edits.len() as u64 - u64::from(*seen))
                .sum()
        };
        self.clients.iter().map(of_client).sum()
    }

    /// Edits whose receipt is still missing.
    pub(crate) fn unacknowledged(&self) -> u64 {
        let writing = self
            .clients
            .iter()
            .filter_map(|client| Some((client, client.writer?)));
        writing
            .map(|(client, writer)| {
                (self.writers[writer].edits.len() as u64).saturating_sub(client.acked.into())
            })
            .sum()
    }

    pub(crate) fn closed(&self) -> usize {
        self.clients
            .iter()
            .filter(|client| client.closed.is_some())
            .count()
    }

    /// Acknowledged edits per document.
    pub(crate) fn acked_by_document(&self) -> Vec<(String, u32)> {
        let writing = self.clients.iter().filter(|client| client.writer.is_some());
        writing
            .map(|client| (self.documents[client.document].name.clone(), client.acked))
            .collect()
    }

    fn received(
        &mut self,
        index: usize,
        server: &Running,
        payload: &[u8],
        len: usize,
        now: u64,
    ) -> Reply {
        let payload = if server.dialect == Dialect::Hocuspocus {
            let Some((name, rest)) = var_uint(payload) else {
                return Reply::Nothing;
            };
            let name = usize::try_from(name).unwrap_or(usize::MAX).min(rest.len());
            &rest[name..]
        } else {
            payload
        };
        match payload {
            [0, 0, ..] => return Reply::EmptyStep2,
            [0, kind @ (1 | 2), rest @ ..] => {
                let update = var_uint(rest).map_or(&[][..], |(_, update)| update);
                let client = &mut self.clients[index];
                if client.synced.is_none() {
                    client.state_bytes += len;
                    client.synced = (*kind == 1).then_some(now);
                }
                client.updates += usize::from(*kind == 2);
                self.updated(index, server, update, now);
            }
            [1, rest @ ..] => self.present(index, rest, now),
            [8, ..] => self.acknowledged(index, self.clients[index].acked + 1, now),
            [102, rest @ ..] => {
                if let Some((version, _)) =
                    var_uint(rest).and_then(|(_, payload)| var_uint(payload))
                {
                    self.acknowledged(index, u32::try_from(version).unwrap_or_default(), now);
                }
            }
            _ => {}
        }
        Reply::Nothing
    }

    fn updated(&mut self, index: usize, server: &Running, update: &[u8], now: u64) {
        if let Some((id, end)) = read_edit(update).filter(|(id, _)| FIRST_WRITER <= *id) {
            return self.arrived(index, server, id, end, now);
        }
        let Ok(scan) = collab_core::scan::scan_update(update) else {
            return;
        };
        for (id, end) in scan.client_ends() {
            if self.clients[index].writer.is_none() || self.writers.is_empty() {
                self.clients[index].state.push((id, end));
            }
            if FIRST_WRITER <= id {
                self.arrived(index, server, id, end, now);
            }
        }
    }

    fn arrived(&mut self, index: usize, server: &Running, id: u64, end: u32, now: u64) {
        let writer = usize::try_from(id - FIRST_WRITER).unwrap_or(usize::MAX);
        if self
            .writers
            .get(writer)
            .is_none_or(|known| known.document != self.clients[index].document)
        {
            return;
        }
        if self.clients[index].writer == Some(writer) {
            if server.ack == Ack::Echo {
                self.acknowledged(index, end / EDIT_CHARS, now);
            }
            return;
        }
        self.delivered(index, writer, end / EDIT_CHARS, now);
    }

    fn delivered(&mut self, index: usize, writer: usize, end: u32, now: u64) {
        let Writer {
            place,
            document,
            edits,
            arrived,
        } = &mut self.writers[writer];
        let receivers = self.documents[*document].clients - 1;
        let seen = &mut self.clients[index].seen[*place];
        let from = *seen;
        let end = end.min(u32::try_from(edits.len()).unwrap_or(u32::MAX));
        for edit in from..end {
            let edit = edit as usize;
            let latency = now.saturating_sub(edits[edit]);
            self.measured.propagate.record(latency);
            arrived[edit] += 1;
            if arrived[edit] as usize == receivers {
                self.measured.last.record(latency);
            }
        }
        *seen = end.max(from);
    }

    fn acknowledged(&mut self, index: usize, upto: u32, now: u64) {
        let client = &mut self.clients[index];
        if let Some(writer) = client.writer {
            let edits = &self.writers[writer].edits;
            for edit in client.acked..upto.min(u32::try_from(edits.len()).unwrap_or(u32::MAX)) {
                self.measured
                    .ack
                    .record(now.saturating_sub(edits[edit as usize]));
            }
        }
        client.acked = client.acked.max(upto);
    }

    fn present(&mut self, index: usize, message: &[u8], now: u64) {
        let parse = || -> Option<Vec<(u64, u32)>> {
            let (_, payload) = var_uint(message)?;
            let (count, mut rest) = var_uint(payload)?;
            let mut entries = Vec::new();
            for _ in 0..count {
                let (id, after) = var_uint(rest)?;
                let (clock, after) = var_uint(after)?;
                let (len, after) = var_uint(after)?;
                rest = after.get(usize::try_from(len).ok()?..)?;
                entries.push((id, u32::try_from(clock).ok()?));
            }
            Some(entries)
        };
        for (id, clock) in parse().unwrap_or_default() {
            let Some(writer) = id
                .checked_sub(FIRST_WRITER)
                .and_then(|writer| usize::try_from(writer).ok())
            else {
                continue;
            };
            if writer < self.writers.len() && self.clients[index].writer != Some(writer) {
                self.delivered(index, writer, clock, now);
            }
        }
    }
}

/// Fails when sockets were closed that should be open.
pub(crate) fn nobody_closed(world: &World) -> Result<()> {
    if let Some(code) = world.clients.iter().find_map(|client| client.closed) {
        bail!("{} sockets were closed, one with {code}", world.closed());
    }
    Ok(())
}
