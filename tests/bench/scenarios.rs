//! What is measured. Each scenario runs against one server from its start, and answers figures.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rand::Rng;

use crate::history::history;
use crate::load::{Load, nobody_closed};
use crate::scale;
use crate::servers::{Ack, Home, Kind, Running, generator_core_idle};
use crate::stats::Figures;
use collab_core::wire::varint::write_var_uint;

/// A state vector of nothing.
pub(crate) const EMPTY: [u8; 1] = [0];
const SYNC_LIMIT: Duration = Duration::from_mins(3);

/// One scenario.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// What it is, in a line.
    pub(crate) about: &'static str,
    pub(crate) run: fn(Kind) -> Result<Figures>,
    /// The servers that keep no document and take part.
    pub(crate) raw: &'static [Kind],
}

pub(crate) const SCENARIOS: [Scenario; 13] = [
    Scenario {
        name: "propagate",
        about: "20 documents × 5 clients, 2 of them type 5 times a second",
        run: propagate,
        raw: &[Kind::Raw, Kind::RawSqlite, Kind::RawPostgres],
    },
    Scenario {
        name: "saturate",
        about: "20 documents × 10 clients, all type; the highest rate with p99 under 100 ms and nothing lost",
        run: saturate,
        raw: &[Kind::Raw],
    },
    Scenario {
        name: "fan-out",
        about: "1 document, 1,000 clients, one types 10 times a second",
        run: fan_out,
        raw: &[Kind::Raw],
    },
    Scenario {
        name: "join-5",
        about: "50 join a document of 4.5 MB at once",
        run: |kind| join(kind, 4_500_000),
        raw: &[Kind::Raw],
    },
    Scenario {
        name: "join-18",
        about: "50 join a document of 18 MB at once",
        run: |kind| join(kind, 18_000_000),
        raw: &[Kind::Raw],
    },
    Scenario {
        name: "upload",
        about: "5 MB of history in updates of 32 KB, from one client",
        run: upload,
        raw: &[],
    },
    Scenario {
        name: "idle",
        about: "5,000 connections on 500 documents of one edit; memory without the program itself",
        run: idle,
        raw: &[Kind::Raw],
    },
    Scenario {
        name: "leave",
        about: "10 documents of one edit, then 10,000, and all left; memory of the whole process two minutes later",
        run: scale::leave,
        raw: &[],
    },
    Scenario {
        name: "presence",
        about: "200 clients in a document show their cursors once a second",
        run: presence,
        raw: &[Kind::Raw],
    },
    Scenario {
        name: "kill",
        about: "kill -9 while 20 people type; start again",
        run: kill,
        // It has lost all, of course: what a program takes to start here that does nothing before it listens.
        raw: &[Kind::Raw],
    },
    Scenario {
        name: "documents",
        about: "1,000 edits a second in 10 open documents, and spread over 10,000",
        run: scale::documents,
        raw: &[],
    },
    Scenario {
        name: "sizes",
        about: "1,000 edits a second in 4 documents of 1 KB, and of 5 MB",
        run: scale::sizes,
        raw: &[],
    },
    Scenario {
        name: "workers",
        about: "1,000 edits a second in 20 documents × 5 clients, on one core and on two; and beside a document with 2,000 a second",
        run: scale::workers,
        raw: &[],
    },
];

/// What the server used between two moments.
pub(crate) struct Used<'server> {
    server: &'server Running,
    cpu: Duration,
    since: Instant,
}

impl<'server> Used<'server> {
    pub(crate) fn since_now(server: &'server Running) -> Self {
        Self {
            server,
            cpu: server.cpu(),
            since: Instant::now(),
        }
    }

    pub(crate) fn cpu(&self) -> Duration {
        self.server.cpu().saturating_sub(self.cpu)
    }

    fn cores(&self) -> f64 {
        self.cpu().as_secs_f64() / self.since.elapsed().as_secs_f64()
    }
}

fn propagate(kind: Kind) -> Result<Figures> {
    let home = Home::new(kind, "propagate")?;
    let server = home.start(None)?;
    let mut load = Load::new(&server)?;
    join_all(&mut load, 20, 5, 2)?;
    load.type_at(5.0);
    load.pump(Duration::from_secs(1))?;
    load.measure();
    let (used, idle) = (Used::since_now(&server), generator_core_idle());
    load.pump(Duration::from_secs(6))?;
    let cpu = used.cpu();
    let idle = (generator_core_idle().saturating_sub(idle)).as_secs_f64()
        / used.since.elapsed().as_secs_f64();
    settle(&mut load)?;
    let bare = home.bare_commits()?;
    let measured = &load.world.measured;
    let mut figures = Figures::default();
    figures.set("p50 ms", measured.propagate.ms(0.5));
    figures.set("p99 ms", measured.propagate.ms(0.99));
    figures.set("ack p50 ms", measured.ack.ms(0.5));
    figures.set("ack p99 ms", measured.ack.ms(0.99));
    let bare_ms = bare.times.ms(0.5);
    figures.set("bare commit p50 ms", bare_ms);
    figures.set("bare commit p99 ms", bare.times.ms(0.99));
    figures.set("ack beyond it ms", measured.ack.ms(0.5) - bare_ms);
    if !bare.cpu.is_zero() {
        figures.set("CPU µs/bare commit", bare.cpu.as_secs_f64() * 1e6);
    }
    figures.set(
        "CPU µs/delivery",
        cpu.as_secs_f64() * 1e6 / as_f64(measured.propagate.count()),
    );
    figures.set("generator core idle %", 100.0 * idle);
    figures.set("RSS MB", server.resident_kib().0 / 1024.0);
    figures.set("lost", as_f64(load.world.missing()));
    Ok(figures)
}

/// Doubles the rate until it fails, then halves the gap until it is under 10 %; a fresh server after every failure.
fn saturate(kind: Kind) -> Result<Figures> {
    let (mut good, mut bad, mut best) = (0.0, f64::INFINITY, None);
    let mut rate: f64 = 4_000.0;
    while good == 0.0 || 1.1 < bad / good {
        if let Some(figures) = saturated(kind, rate)? {
            good = rate;
            best = Some(figures);
        } else {
            bad = rate;
        }
        ensure!(1.0 < rate, "{} does not carry any rate", kind.name());
        rate = match (good, bad) {
            (0.0, _) => rate / 2.0,
            (_, f64::INFINITY) => rate * 2.0,
            _ => f64::midpoint(good, bad),
        };
    }
    Ok(best.unwrap_or_default())
}

/// One rate; `None` when the server does not keep up.
fn saturated(kind: Kind, edits_per_second: f64) -> Result<Option<Figures>> {
    const WRITERS: f64 = 200.0;
    let home = Home::new(kind, "saturate")?;
    let server = home.start(None)?;
    let mut load = Load::new(&server)?;
    join_all(&mut load, 20, 10, 10)?;
    load.type_at((edits_per_second / WRITERS / 4.0).max(1.0));
    load.pump(Duration::from_millis(500))?;
    load.type_at(edits_per_second / WRITERS);
    load.pump(Duration::from_millis(500))?;
    load.measure();
    let (used, generator) = (
        Used::since_now(&server),
        crate::servers::cpu_of(std::process::id()),
    );
    let (begun, edits) = (Instant::now(), load.world.edits());
    load.pump(Duration::from_secs(3))?;
    let (seconds, cores) = (begun.elapsed().as_secs_f64(), used.cores());
    let generator = (crate::servers::cpu_of(std::process::id()).saturating_sub(generator))
        .as_secs_f64()
        / seconds;
    let typed = as_f64(load.world.edits() - edits);
    let deliveries = as_f64(load.world.measured.propagate.count());
    load.rest();
    let all = load.pump_until(Duration::from_secs(2), |world| world.missing() == 0)?;
    let measured = &load.world.measured;
    let kept_up = all
        && load.world.closed() == 0
        && measured.propagate.ms(0.99) <= 100.0
        && 0.95 * edits_per_second * seconds <= typed;
    if !kept_up {
        return Ok(None);
    }
    let mut figures = Figures::default();
    figures.set("deliveries/s", deliveries / seconds);
    figures.set("edits/s", typed / seconds);
    figures.set("p99 ms", measured.propagate.ms(0.99));
    figures.set("ack p99 ms", measured.ack.ms(0.99));
    figures.set("cores", cores);
    figures.set("generator cores", generator);
    figures.set("RSS MB", server.resident_kib().0 / 1024.0);
    Ok(Some(figures))
}

fn fan_out(kind: Kind) -> Result<Figures> {
    let home = Home::new(kind, "fan-out")?;
    let server = home.start(None)?;
    let mut load = Load::new(&server)?;
    let begun = Instant::now();
    join_one_first(&mut load, "hall", 1_000, 1)?;
    let connected = begun.elapsed();
    load.type_at(10.0);
    load.pump(Duration::from_secs(1))?;
    load.measure();
    let used = Used::since_now(&server);
    load.pump(Duration::from_secs(6))?;
    let cores = used.cores();
    settle(&mut load)?;
    let mut figures = Figures::default();
    figures.set("last p50 ms", load.world.measured.last.ms(0.5));
    figures.set("last p99 ms", load.world.measured.last.ms(0.99));
    figures.set("cores", cores);
    figures.set("connect ms", connected.as_secs_f64() * 1e3);
    figures.set("lost", as_f64(load.world.missing()));
    Ok(figures)
}

fn join(kind: Kind, bytes: usize) -> Result<Figures> {
    let home = Home::new(kind, "join")?;
    let mut figures = Figures::default();
    let past = history(
        bytes,
        if kind == Kind::YSweet && 10_000_000 < bytes {
            2_000_000
        } else {
            32_000
        },
    );
    let mut server = if kind == Kind::Raw {
        let merged = std::env::temp_dir().join("collab-bench/state");
        std::fs::write(&merged, vec![7; bytes])?;
        home.start(Some(&merged))?
    } else {
        let server = home.start(None)?;
        let mut load = Load::new(&server)?;
        figures.set("upload s", send_history(&mut load, &past)?.as_secs_f64());
        if kind.is_rival() {
            // Their next save: two seconds after the last edit, or every ten.
            load.pump(Duration::from_secs(12))?;
        }
        server
    };
    if kind != Kind::Raw {
        server.stop()?;
        server = home.start(None)?;
        let mut load = Load::new(&server)?;
        // A node of a cluster waits before it takes the slots of another one: a start is not what is measured.
        load.join("another", 1, 0, &EMPTY)?;
        load.everybody_synced(SYNC_LIMIT)?;
        // What a server does before a client may connect is part of it.
        let begun = load.micros();
        load.join("past", 1, 0, &EMPTY)?;
        load.everybody_synced(SYNC_LIMIT)?;
        let client = &load.world.clients[1];
        figures.set(
            "cold open ms",
            (client.synced.unwrap_or_default() - begun) as f64 / 1e3,
        );
        figures.set("state MB", client.state_bytes as f64 / 1e6);
        ensure!(
            bytes / 3 < client.state_bytes,
            "{} sent {} bytes of a document of {bytes}",
            kind.name(),
            client.state_bytes
        );
    }
    has_rested(&server);
    let (loaded, _) = server.resident_kib();
    let mut load = Load::new(&server)?;
    let used = Used::since_now(&server);
    let begun = load.micros();
    load.join("past", 50, 0, &EMPTY)?;
    load.everybody_synced(SYNC_LIMIT)?;
    let mut joined: Vec<u64> = load
        .world
        .clients
        .iter()
        .filter_map(|client| client.synced)
        .map(|at| at - begun)
        .collect();
    joined.sort_unstable();
    figures.set(
        "50 joined, median ms",
        joined[joined.len() / 2] as f64 / 1e3,
    );
    figures.set("50 joined, last ms", joined[joined.len() - 1] as f64 / 1e3);
    figures.set("CPU s", used.cpu().as_secs_f64());
    figures.set(
        "extra memory MB",
        (server.resident_kib().1 - loaded).max(0.0) / 1024.0,
    );
    drop(load);
    if kind != Kind::Raw {
        has_rested(&server);
        let mut load = Load::new(&server)?;
        load.join("past", 1, 0, &without_one_edit(&past))?;
        let begun = load.micros();
        load.everybody_synced(SYNC_LIMIT)?;
        figures.set(
            "reconnect ms",
            (load.world.clients[0].synced.unwrap_or_default() - begun) as f64 / 1e3,
        );
        figures.set(
            "reconnect KB",
            load.world.clients[0].state_bytes as f64 / 1e3,
        );
    }
    Ok(figures)
}

/// Waits until a server that may answer before it has done all its work has done it.
fn has_rested(server: &Running) {
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(20) {
        let before = server.cpu();
        std::thread::sleep(Duration::from_millis(300));
        if server.cpu().saturating_sub(before) <= Duration::from_millis(30) {
            return;
        }
    }
}

fn upload(kind: Kind) -> Result<Figures> {
    let home = Home::new(kind, "upload")?;
    let server = home.start(None)?;
    let mut load = Load::new(&server)?;
    let mut figures = Figures::default();
    let half_of_it = history(2_500_000, 32_000);
    let past = history(5_000_000, 32_000);
    figures.set("upload s", send_history(&mut load, &past)?.as_secs_f64());
    let mut load = Load::new(&server)?;
    let of_half = send_history_to(&mut load, "half", &half_of_it)?.as_secs_f64();
    figures.set("of half of it s", of_half);
    figures.set("RSS MB", server.resident_kib().0 / 1024.0);
    Ok(figures)
}

/// When a server has put away what it does not need for those who only look.
const IDLE_AFTER: Duration = Duration::from_secs(33);

fn idle(kind: Kind) -> Result<Figures> {
    const DOCUMENTS: usize = 500;
    const CONNECTIONS: usize = 5_000;
    // What a server takes for its first documents is not what it takes for each.
    const FIRST: usize = 50;
    let home = Home::new(kind, "idle")?;
    let server = home.start(None)?;
    let mut load = Load::new(&server)?;
    for number in 0..FIRST {
        load.join(&format!("first-{number}"), 1, 1, &EMPTY)?;
    }
    one_edit_each(&mut load)?;
    load.pump(IDLE_AFTER)?;
    let before = server.anonymous_kib();
    join_all(&mut load, DOCUMENTS, 1, 1)?;
    one_edit_each(&mut load)?;
    load.pump(IDLE_AFTER)?;
    let with_documents = server.anonymous_kib();
    let begun = Instant::now();
    for number in 0..CONNECTIONS - DOCUMENTS {
        load.connect(FIRST + number % DOCUMENTS, &EMPTY)?;
        if number % 100 == 0 {
            load.pump_until(Duration::from_secs(5), |world| {
                world
                    .clients
                    .iter()
                    .rev()
                    .take(400)
                    .filter(|client| client.synced.is_none())
                    .count()
                    < 200
            })?;
        }
    }
    load.everybody_synced(SYNC_LIMIT)?;
    let seconds = begun.elapsed().as_secs_f64();
    load.pump(IDLE_AFTER)?;
    nobody_closed(&load.world)?;
    let with_all = server.anonymous_kib();
    let connection = (with_all - with_documents) / (CONNECTIONS - DOCUMENTS) as f64;
    let mut figures = Figures::default();
    figures.set("KB/connection", connection);
    figures.set(
        "KB/document",
        (with_documents - before) / DOCUMENTS as f64 - connection,
    );
    figures.set("RSS MB", server.resident_kib().0 / 1024.0);
    figures.set("connects/s", (CONNECTIONS - DOCUMENTS) as f64 / seconds);
    Ok(figures)
}

/// Lets every writer type at least once, and waits until the server has nothing more to do.
pub(crate) fn one_edit_each(load: &mut Load<'_>) -> Result<()> {
    let edits = load.world.edits() + load.world.clients.len() as u64;
    load.type_at(0.5);
    load.pump_until(Duration::from_secs(10), |world| edits <= world.edits())?;
    settle(load)?;
    load.pump(Duration::from_secs(2))
}

fn presence(kind: Kind) -> Result<Figures> {
    let home = Home::new(kind, "presence")?;
    let server = home.start(None)?;
    let mut load = Load::new(&server)?;
    join_one_first(&mut load, "hall", 200, 200)?;
    load.be_present_at(1.0);
    load.pump(Duration::from_secs(2))?;
    load.measure();
    let used = Used::since_now(&server);
    load.pump(Duration::from_secs(6))?;
    let measured = &load.world.measured;
    let mut figures = Figures::default();
    figures.set("p50 ms", measured.propagate.ms(0.5));
    figures.set("p99 ms", measured.propagate.ms(0.99));
    figures.set("cores", used.cores());
    figures.set(
        "deliveries/s",
        as_f64(measured.propagate.count()) / used.since.elapsed().as_secs_f64(),
    );
    nobody_closed(&load.world)?;
    Ok(figures)
}

fn kill(kind: Kind) -> Result<Figures> {
    let home = Home::new(kind, "kill")?;
    let server = home.start(None)?;
    let mut load = Load::new(&server)?;
    join_all(&mut load, 20, 1, 1)?;
    load.type_at(10.0);
    let moment = rand::rng().random_range(11.5..16.5);
    load.pump(Duration::from_secs_f64(moment))?;
    let acked = load.world.acked_by_document();
    drop(load);
    server.kill()?;
    let server = home.start(None)?;
    let mut load = Load::new(&server)?;
    for (document, _) in &acked {
        load.join(document, 1, 0, &EMPTY)?;
    }
    load.everybody_synced(SYNC_LIMIT)?;
    let synced = load.world.clients.iter().filter_map(|client| client.synced);
    let (first, all) = (synced.clone().min(), synced.max());
    // y-websocket answers before it has loaded.
    load.pump(Duration::from_secs(2))?;
    let mut lost = 0;
    for ((_, acked), client) in acked.iter().zip(&load.world.clients) {
        let there = client
            .state
            .iter()
            .map(|(_, end)| end / crate::history::EDIT_CHARS)
            .max()
            .unwrap_or_default();
        lost += acked.saturating_sub(there);
    }
    let opened = server.opened.as_secs_f64() * 1e3;
    let mut figures = Figures::default();
    figures.set(
        "acked",
        acked.iter().map(|(_, acked)| f64::from(*acked)).sum(),
    );
    figures.set("lost", f64::from(lost));
    figures.set(
        "first served ms",
        opened + first.unwrap_or_default() as f64 / 1e3,
    );
    figures.set(
        "all served ms",
        opened + all.unwrap_or_default() as f64 / 1e3,
    );
    Ok(figures)
}

/// Documents with clients in them; the first client of each is there before the others.
pub(crate) fn join_all(
    load: &mut Load<'_>,
    documents: usize,
    clients: usize,
    writers: usize,
) -> Result<()> {
    for number in 0..documents {
        load.join(&format!("doc-{number}"), 1, writers.min(1), &EMPTY)?;
    }
    load.everybody_synced(SYNC_LIMIT)?;
    for number in 0..documents {
        for client in 1..clients {
            let client_index = load.connect(number, &EMPTY)?;
            if client < writers {
                load.world.add_writer(client_index);
            }
        }
    }
    load.everybody_synced(SYNC_LIMIT)
}

fn join_one_first(
    load: &mut Load<'_>,
    document: &str,
    clients: usize,
    writers: usize,
) -> Result<()> {
    load.join(document, 1, writers.min(1), &EMPTY)?;
    load.everybody_synced(SYNC_LIMIT)?;
    for client in 1..clients {
        let index = load.connect(0, &EMPTY)?;
        if client < writers {
            load.world.add_writer(index);
        }
    }
    load.everybody_synced(SYNC_LIMIT)
}

/// Nobody types; waits until all that is on its way has arrived.
fn settle(load: &mut Load<'_>) -> Result<()> {
    load.rest();
    load.pump_until(Duration::from_secs(3), |world| {
        world.missing() == 0 && world.unacknowledged() == 0
    })?;
    nobody_closed(&load.world)
}

fn send_history(load: &mut Load<'_>, past: &[Vec<u8>]) -> Result<Duration> {
    send_history_to(load, "past", past)
}

/// Sends a history as one client's and waits until all of it is acknowledged.
pub(crate) fn send_history_to(
    load: &mut Load<'_>,
    document: &str,
    past: &[Vec<u8>],
) -> Result<Duration> {
    load.join(document, 1, 0, &EMPTY)?;
    load.everybody_synced(SYNC_LIMIT)?;
    let begun = Instant::now();
    for update in past {
        load.upload(0, update);
    }
    let updates = past.len();
    let ack = load.ack();
    if ack == Ack::Version {
        load.ask_version(0, u32::try_from(updates).unwrap_or(u32::MAX));
    }
    let done = load.pump_until(SYNC_LIMIT, |world| {
        let client = &world.clients[0];
        match ack {
            Ack::Echo => updates <= client.updates,
            Ack::Status | Ack::Version => updates <= client.acked as usize,
        }
    })?;
    nobody_closed(&load.world)?;
    ensure!(done, "the history was not acknowledged in {SYNC_LIMIT:?}");
    Ok(begun.elapsed())
}

/// The state vector of a client that has all of a history but the last edit.
fn without_one_edit(past: &[Vec<u8>]) -> Vec<u8> {
    let mut ends = std::collections::BTreeMap::<u64, u32>::new();
    for update in past {
        if let Ok(scan) = collab_core::scan::scan_update(update) {
            for (client, end) in scan.client_ends() {
                let known = ends.entry(client).or_default();
                *known = end.max(*known);
            }
        }
    }
    if let Some((_, end)) = ends.iter_mut().next() {
        *end -= 1;
    }
    let mut state_vector = Vec::new();
    write_var_uint(&mut state_vector, ends.len() as u64);
    for (client, end) in ends {
        write_var_uint(&mut state_vector, client);
        write_var_uint(&mut state_vector, end.into());
    }
    state_vector
}

#[expect(clippy::cast_precision_loss, reason = "figures have three digits")]
pub(crate) fn as_f64(count: u64) -> f64 {
    count as f64
}
