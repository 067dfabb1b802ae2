//! Drills: nodes with a real Postgres and Redis on hosts of their own, stock clients that write all the time, and one fault
//! after the other. Each drill ends with everything healed and loaded again, and the verdict of the checker.
//!
//! `cargo test -p collab-tests --test drills [WORD…]` runs those whose number is, or whose name contains, one of the words; `short`
//! stands for the short set, and no word for all; `--rounds=N` plays each so often and tells the median of its times. Numbers are
//! those of `docs/drills.md`. It needs the rights of root, for network namespaces, and uses no network but those. A run that was
//! killed leaves nothing in the way of the next.

#![allow(
    clippy::print_stdout,
    reason = "what was measured is part of a drill's result"
)]

mod hostile;
mod kills;
mod links;
mod rows;
mod stores;
mod world;

use anyhow::{Context as _, Result};
use collab_tests::sandbox::{self, Sandbox};
use futures::FutureExt as _;
use futures::future::LocalBoxFuture;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use world::{Figures, Plan, Standby, World};

/// Number, name, whether it is in the short set, the world, and what is done to it.
struct Drill {
    number: &'static str,
    name: &'static str,
    set: Set,
    plan: Plan,
    run: for<'world> fn(&'world mut World) -> LocalBoxFuture<'world, Result<()>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Set {
    Short,
    Full,
}

macro_rules! drills {
    ($($number:literal $name:literal $set:ident $plan:expr => $run:path;)*) => {
        &[$(Drill {
            number: $number,
            name: $name,
            set: Set::$set,
            plan: $plan,
            run: |world| Box::pin($run(world)),
        }),*]
    };
}

const PLAN: Plan = Plan::new();
/// Longest time of a drill, its world's start and verdict included.
const PATIENCE: Duration = Duration::from_mins(5);

#[rustfmt::skip]
const DRILLS: &[Drill] = drills! {
    "1" "the owner is killed in the middle of a burst" Short PLAN => kills::owner_killed;
    "2" "a frozen owner comes back as a zombie" Short PLAN => kills::zombie;
    "3" "short pauses of the owner" Full PLAN => kills::short_pauses;
    "4" "a node is drained under load" Short PLAN => kills::drain;
    "5" "a draining node is killed" Full PLAN => kills::drain_then_kill;
    "6" "the new owner dies between claim and load" Full PLAN => kills::between_claim_and_load;
    "7" "the owner dies between commit and receipt" Short PLAN.with_store_proxies() => kills::between_commit_and_receipt;
    "8" "the owner dies between receipt and fan-out" Full PLAN => kills::between_receipt_and_fan_out;
    "9" "the owner dies while it writes a snapshot" Full Plan::hot() => kills::in_the_middle_of_a_snapshot;
    "10" "one document panics" Full PLAN => kills::panic_in_one_document;
    "11" "two nodes are told that they own the same" Full PLAN => kills::duelling_owners;
    "12" "a node is cut off from the other nodes only" Full PLAN => links::node_from_other_nodes;
    "13" "a node is lost again and again" Full PLAN.without_spells() => kills::flapping;
    "14" "one, three and five nodes" Full PLAN => kills::scale;
    "15" "Redis is killed and comes back" Full PLAN => stores::redis_killed;
    "16" "Redis has no memory left" Full PLAN => stores::redis_out_of_memory;
    "17" "Redis is read-only" Full PLAN => stores::redis_read_only;
    "18" "Redis fails over to a replica that lags" Full PLAN => stores::redis_failover;
    "19" "Redis loses its volume" Full PLAN.with_redis(stores::APPEND_ONLY) => stores::redis_emptied;
    "20" "the file of Redis is damaged" Full PLAN.with_redis(stores::APPEND_ONLY) => stores::redis_damaged;
    "21" "Redis has a slow disk" Full PLAN.with_redis(stores::APPEND_ONLY) => stores::redis_slow;
    "22" "Postgres restarts" Short PLAN => stores::postgres_restarts;
    "23" "a backend of Postgres is killed" Full PLAN => stores::backend_killed;
    "24" "the disk of Postgres is full" Full PLAN.with_disk(300 << 20) => stores::disk_full;
    "25" "Postgres takes 500 ms per fsync, and a node dies" Full PLAN => stores::slow_disk;
    "26" "Postgres fails over to a synchronous standby" Full PLAN.with_standby(Standby::Synchronous) => stores::failover_synchronous;
    "27" "Postgres fails over to a standby that lags" Full PLAN.with_standby(Standby::Asynchronous) => stores::failover_lagging;
    "28" "a wait for the standby is cancelled" Full PLAN.with_standby(Standby::Synchronous) => stores::standby_gone;
    "29" "locks are held and connections used up" Full PLAN => stores::locks_and_connections;
    "30" "a node is cut off from Postgres" Full PLAN => links::node_from_store;
    "30b" "a node is cut off from Postgres and all other nodes" Full PLAN.without_spells() => links::node_from_everybody;
    "31" "the answers of Postgres to a node are lost" Full PLAN => links::replies_of_the_store;
    "32" "nodes are cut from each other and from Redis" Full PLAN => links::node_from_node;
    "33" "clients are cut off, and edit" Full PLAN => links::clients_cut_off;
    "34" "links are slow, stall, break and lose" Full PLAN.with_store_proxies().with_edge_proxies() => links::bad_links;
    "35" "clients vanish without a word" Full PLAN.without_spells() => links::half_open;
    "36" "a client does not read" Full PLAN.without_spells() => links::slow_reader;
    "38" "five thousand clients reconnect" Full PLAN => links::reconnect_storm;
    "39" "a node's wall clock jumps" Full PLAN => links::wall_clock;
    "40" "clocks step while the owner is frozen" Full PLAN => links::clock_steps_while_frozen;
    "41" "a node runs out of memory" Full PLAN => links::out_of_memory;
    "42" "a node runs out of processor" Full PLAN => links::starved;
    "45" "a snapshot is damaged" Full PLAN => rows::damaged_snapshots;
    "46" "log rows are damaged" Short PLAN => rows::damaged_rows;
    "47" "an update in the log is poison" Full PLAN => rows::poison;
    "48" "snapshots of older libraries" Full PLAN => rows::old_snapshots;
    "56" "an update comes without the one before it" Full PLAN => hostile::gap;
    "57" "twenty thousand updates that never fit" Full PLAN => hostile::flood;
    "60" "the same update comes again" Short PLAN => hostile::replay;
};

fn main() -> ExitCode {
    let result = if sandbox::inside() {
        inside()
    } else {
        outside()
    };
    result.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

fn outside() -> Result<ExitCode> {
    if std::env::args().any(|argument| argument == "--list") {
        for drill in DRILLS {
            say(&format!("{} {}: test", drill.number, drill.name));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let program = std::env::current_exe()?;
    let folder = program.ancestors().nth(2).context("no build folder")?;
    let status = Sandbox::new(&folder.join("drills"))?.run(&[])?;
    Ok(ExitCode::from(
        u8::try_from(status.code().unwrap_or(1)).unwrap_or(1),
    ))
}

#[tokio::main]
async fn inside() -> Result<ExitCode> {
    sandbox::furnish(&[])?;
    // For clients of HTTPS in this program; the only error is that there is one already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (flags, words): (Vec<String>, Vec<String>) = std::env::args()
        .skip(1)
        .partition(|argument| argument.starts_with('-'));
    let rounds = flags
        .iter()
        .find_map(|flag| flag.strip_prefix("--rounds="))
        .map_or(Ok(1), str::parse)
        .context("--rounds=N: N is a number")?;
    let wanted = |drill: &Drill| {
        let by = |word: &String| match word.as_str() {
            "short" => drill.set == Set::Short,
            number if number.starts_with(|first: char| first.is_ascii_digit()) => {
                drill.number == number
            }
            word => drill.name.contains(word),
        };
        words.is_empty() || words.iter().any(by)
    };
    let (mut passed, mut failed, mut table) = (0, Vec::new(), Vec::new());
    let mut waits = BTreeMap::<&str, Vec<Duration>>::new();
    let chosen: Vec<_> = (1..).zip(DRILLS).filter(|(_, it)| wanted(it)).collect();
    for (round, &(number, drill)) in
        (0..rounds).flat_map(|round| chosen.iter().map(move |it| (round, it)))
    {
        let begun = Instant::now();
        let seed = number + 100 * round;
        let result = AssertUnwindSafe(play(drill, seed)).catch_unwind().await;
        let result = result.unwrap_or_else(|_| Err(anyhow::anyhow!("it panicked")));
        let (figures, error) = match result {
            Ok(figures) => {
                waits
                    .entry(drill.number)
                    .or_default()
                    .extend(figures.others);
                (figures.columns(), figures.failures.join("\n"))
            }
            Err(error) => (String::new(), format!("{error:#}")),
        };
        let verdict = if error.is_empty() { "ok" } else { "FAILED" };
        let seconds = begun.elapsed().as_secs();
        say(&format!(
            "test {} {} ... {verdict} ({seconds} s)",
            drill.number, drill.name
        ));
        let row = format!(
            "{:>3} {:<48} {verdict:<6} {figures}",
            drill.number, drill.name
        );
        table.push(row);
        if error.is_empty() {
            passed += 1;
        } else {
            failed.push(drill.number);
            eprintln!("{error}");
        }
    }
    say(&format!(
        "\n  # {:<48} {:<6} {}; times in ms",
        "drill",
        "",
        Figures::HEADER
    ));
    for row in &table {
        say(row);
    }
    for (number, mut waits) in waits.into_iter().filter(|(_, waits)| 1 < waits.len()) {
        waits.sort_unstable();
        say(&format!(
            "{number:>3} others, {} rounds: median {} ms, worst {} ms",
            waits.len(),
            waits[waits.len() / 2].as_millis(),
            waits[waits.len() - 1].as_millis()
        ));
    }
    let verdict = if failed.is_empty() { "ok" } else { "FAILED" };
    say(&format!(
        "\ntest result: {verdict}. {passed} passed; {} failed; {}",
        failed.len(),
        failed.join(" ")
    ));
    Ok(if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Plays a drill to its end; one that hangs is given up.
async fn play(drill: &Drill, seed: u64) -> Result<Figures> {
    let played = tokio::time::timeout(PATIENCE, play_out(drill, seed)).await;
    played.map_err(|_| anyhow::anyhow!("it came to no end within {PATIENCE:?}"))?
}

async fn play_out(drill: &Drill, seed: u64) -> Result<Figures> {
    let mut world = World::start(&drill.plan, seed).await?;
    if let Err(error) = (drill.run)(&mut world).await {
        return Err(error.context(format!("the drill came to no end\n{}", world.logs())));
    }
    let figures = world.finish().await?;
    for note in &figures.notes {
        say(&format!("  {note}"));
    }
    Ok(figures)
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

const fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// Prints a line for whoever counts results.
fn say(line: &str) {
    let mut out = std::io::stdout();
    // A reader that has gone away is no reason to stop.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
