//! What an edit costs a server that has more: documents, content, worker threads.

use std::time::Duration;

use anyhow::Result;

use crate::history::history;
use crate::load::{Load, nobody_closed};
use crate::scenarios::{EMPTY, Used, as_f64, join_all, one_edit_each, send_history_to};
use crate::servers::{BOTH_CORES, Home, Kind, Running};
use crate::stats::{Figures, Histogram};

/// Edits per second in all documents together.
const RATE: f64 = 1_000.0;
const FEW: usize = 10;
const MANY: usize = 10_000;
const TIME: Duration = Duration::from_secs(6);
/// When a document that was left has been forgotten, too.
const LEFT_AFTER: Duration = Duration::from_mins(2);

/// The same edits in a few documents, and spread over many; one client in each document, who types.
pub(crate) fn documents(kind: Kind) -> Result<Figures> {
    let mut costs = Vec::new();
    for count in [FEW, MANY] {
        let home = Home::new(kind, "documents")?;
        let server = home.start(None)?;
        let mut load = open(&server, count)?;
        load.type_at(RATE / as_f64(count as u64));
        // Everybody has typed once: what a document's first edit costs is not what an edit costs.
        load.pump_until(Duration::from_secs(15), |world| {
            2 * count as u64 <= world.edits()
        })?;
        load.pump(Duration::from_secs(1))?;
        costs.push(cost(&mut load, &Used::since_now(&server))?);
    }
    Ok(compared(
        ["µs/edit, 10 documents", "10,000 documents", "ratio"],
        &costs,
    ))
}

/// The same edits in documents that hold little, and much; one writer and one reader in each.
pub(crate) fn sizes(kind: Kind) -> Result<Figures> {
    let mut costs = Vec::new();
    for bytes in [1_000, 5_000_000] {
        let home = Home::new(kind, "sizes")?;
        let server = home.start(None)?;
        let past = history(bytes, 32_000.min(bytes));
        for number in 0..4 {
            send_history_to(&mut Load::new(&server)?, &format!("doc-{number}"), &past)?;
        }
        let mut load = Load::new(&server)?;
        join_all(&mut load, 4, 2, 1)?;
        load.type_at(RATE / 4.0);
        load.pump(Duration::from_secs(2))?;
        costs.push(cost(&mut load, &Used::since_now(&server))?);
    }
    Ok(compared(["µs/edit, 1 KB", "5 MB", "ratio"], &costs))
}

/// A server with a core, and with two, of which it has to share one with the generator; and what a document that is
/// typed in all the time does to the others.
pub(crate) fn workers(kind: Kind) -> Result<Figures> {
    let mut costs = Vec::new();
    let mut figures = Figures::default();
    for cores in [None, Some(BOTH_CORES)] {
        let home = Home::new(kind, "workers")?.on(cores);
        let server = home.start(None)?;
        let mut load = Load::new(&server)?;
        join_all(&mut load, 20, 5, 2)?;
        load.type_at(RATE / 40.0);
        load.pump(Duration::from_secs(1))?;
        costs.push(cost(&mut load, &Used::since_now(&server))? / 4.0);
        if cores.is_none() {
            continue;
        }
        let quiet = latencies(&mut load)?;
        let beside = std::thread::scope(|scope| {
            let busy = scope.spawn(|| -> Result<()> {
                let mut load = Load::new(&server)?;
                load.join("busy", 10, 10, &EMPTY)?;
                load.everybody_synced(Duration::from_secs(10))?;
                load.type_at(200.0);
                load.pump(TIME + Duration::from_secs(2))?;
                nobody_closed(&load.world)
            });
            load.pump(Duration::from_secs(1))?;
            let beside = latencies(&mut load)?;
            busy.join().expect("the generator does not panic")?;
            anyhow::Ok(beside)
        })?;
        figures.set("p99 ms", quiet.ms(0.99));
        figures.set("beside a busy document", beside.ms(0.99));
        figures.set("p99 ratio", beside.ms(0.99) / quiet.ms(0.99));
    }
    let mut all = compared(["µs/delivery, one core", "two cores", "ratio"], &costs);
    all.0.extend(figures.0);
    Ok(all)
}

/// Many documents of one edit that are opened, and left. The memory is that of the whole process, so at first a few are:
/// as much of the program is in memory then as later.
pub(crate) fn leave(kind: Kind) -> Result<Figures> {
    let home = Home::new(kind, "leave")?;
    let server = home.start(None)?;
    let resident = || server.resident_kib().0 / 1024.0;
    one_edit_each(&mut open(&server, FEW)?)?;
    let few = resident();
    let mut load = open(&server, MANY)?;
    one_edit_each(&mut load)?;
    let many = resident();
    drop(load);
    std::thread::sleep(LEFT_AFTER);
    let left = resident();
    let mut figures = Figures::default();
    figures.set("MB with 10", few);
    figures.set("with 10,000", many);
    figures.set("all left", left);
    figures.set("ratio", left / few);
    Ok(figures)
}

/// One client in each of so many documents.
fn open(server: &Running, count: usize) -> Result<Load<'_>> {
    let mut load = Load::new(server)?;
    for first in (0..count).step_by(200) {
        for number in first..count.min(first + 200) {
            load.join(&format!("doc-{number}"), 1, 1, &EMPTY)?;
        }
        load.everybody_synced(Duration::from_mins(1))?;
    }
    Ok(load)
}

/// CPU time in µs per edit of what is typed in the next seconds.
fn cost(load: &mut Load<'_>, used: &Used<'_>) -> Result<f64> {
    let edits = load.world.edits();
    load.pump(TIME)?;
    let (cpu, edits) = (used.cpu(), load.world.edits() - edits);
    nobody_closed(&load.world)?;
    Ok(cpu.as_secs_f64() * 1e6 / as_f64(edits))
}

fn latencies(load: &mut Load<'_>) -> Result<Histogram> {
    load.measure();
    load.pump(TIME)?;
    nobody_closed(&load.world)?;
    Ok(load.world.measured.propagate.clone())
}

/// Two costs and how many times the first the second is.
fn compared(names: [&'static str; 3], costs: &[f64]) -> Figures {
    let mut figures = Figures::default();
    figures.set(names[0], costs[0]);
    figures.set(names[1], costs[1]);
    figures.set(names[2], costs[1] / costs[0]);
    figures
}
