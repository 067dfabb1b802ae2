//! Tier sim: real nodes in a world of seeded faults.
//!
//! One thread and one runtime per seed, with time that jumps from one event to the next. Nodes, edges, owners, leases,
//! handoffs, links and the group commit are those of `collab-node`; the database keeps the same fence in memory, clients
//! behave as stock Yjs clients do, and the network between them delays, cuts and resets. All that is left to chance comes
//! from the seed, so that a failing seed fails again in the same way:
//! `just sim --seeds 1 --first 17`, with `COLLAB_SIM_ALOUD=1` to see each step.

#![allow(
    clippy::print_stdout,
    reason = "what was played is part of a test's result"
)]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "the numbers of a simulated world are small"
)]

mod client;
mod database;
mod ledger;
mod mutants;
mod network;
mod pod;
mod replica;
mod settings;
mod witness;
mod world;

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use settings::{Fault, Settings};
use witness::Harm;
use world::{Failure, Outcome, World};

/// Seeds of one run of the tier.
const SEEDS: u64 = 300;
/// Seeds that are played at the same time.
const THREADS: u64 = 2;

fn main() -> ExitCode {
    let arguments = Arguments::parse(std::env::args().skip(1));
    if arguments.mutants {
        return mutants::hunt(arguments.seeds);
    }
    collab_tests::mutants::choose();
    let started = Instant::now();
    let next = AtomicU64::new(arguments.first);
    let sum = Mutex::new(Sum::default());
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if arguments.first + arguments.seeds <= seed {
                        return;
                    }
                    let played = play(seed);
                    if arguments.until_failure && played.is_err() {
                        next.store(u64::MAX / 2, Ordering::Relaxed);
                    }
                    sum.lock().expect("nobody panics with it").add(seed, played);
                }
            });
        }
    });
    let mut sum = sum.into_inner().expect("nobody panics with it");
    sum.print(started.elapsed());
    if arguments.until_failure {
        return if sum.failed.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    // A trace that differs would make every failing seed worthless.
    let first = arguments.first;
    let (once, twice) = (play(first), play(first));
    let same = match (&once, &twice) {
        (Ok(once), Ok(twice)) => once == twice,
        (Err(once), Err(twice)) => once.trace == twice.trace,
        _ => false,
    };
    if same {
        println!("seed {first} plays the same way every time");
    } else {
        println!("seed {first} plays another way the second time:\n{once:?}\n{twice:?}");
        sum.failed.push(first);
    }
    let failed = sum.failed.len();
    let passed = arguments.seeds as usize + 1 - failed;
    let result = if failed == 0 { "ok" } else { "FAILED" };
    println!("test result: {result}. {passed} passed; {failed} failed");
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

struct Arguments {
    first: u64,
    seeds: u64,
    /// Stop at the first seed that fails.
    until_failure: bool,
    /// See that each mutant is found.
    mutants: bool,
}

impl Arguments {
    fn parse(arguments: impl Iterator<Item = String>) -> Self {
        let mut parsed = Self {
            first: 1,
            seeds: SEEDS,
            until_failure: false,
            mutants: false,
        };
        let mut arguments = arguments;
        while let Some(argument) = arguments.next() {
            let mut number = || {
                let value = arguments.next();
                value
                    .and_then(|value| value.parse().ok())
                    .expect("a number follows it")
            };
            match argument.as_str() {
                "--seeds" => parsed.seeds = number(),
                "--first" => parsed.first = number(),
                "--until-failure" => parsed.until_failure = true,
                "--mutants" => parsed.mutants = true,
                _ => {} // cargo's own
            }
        }
        parsed
    }
}

/// Plays a seed; a panic anywhere in it is a failure of it.
fn play(seed: u64) -> Result<Outcome, Failure> {
    let played = std::panic::catch_unwind(|| World::play(Settings::draw(seed)));
    played.unwrap_or_else(|_| {
        Err(Failure {
            violations: vec!["the world panicked".to_owned()],
            trace: String::new(),
            harm: Harm::default(),
        })
    })
}

#[derive(Default)]
struct Sum {
    seeds: usize,
    acked: usize,
    commits: usize,
    fenced: usize,
    early: usize,
    gone: usize,
    anew: usize,
    tasks_max: usize,
    simulated: Duration,
    faults: BTreeMap<Fault, usize>,
    harm: Harm,
    failed: Vec<u64>,
}

impl Sum {
    fn add(&mut self, seed: u64, played: Result<Outcome, Failure>) {
        self.seeds += 1;
        match played {
            Ok(outcome) => {
                self.acked += outcome.acked;
                self.commits += outcome.commits;
                self.fenced += outcome.fenced;
                self.early += outcome.early;
                self.gone += outcome.gone;
                self.anew += outcome.anew;
                self.tasks_max = self.tasks_max.max(outcome.tasks_max);
                self.simulated += outcome.simulated;
                let faults: usize = outcome.faults.values().sum();
                if faults < 20 || outcome.acked < 2_000 {
                    println!(
                        "seed {seed} is void: {} edits, {faults} faults",
                        outcome.acked
                    );
                    self.failed.push(seed);
                }
                for (fault, count) in outcome.faults {
                    *self.faults.entry(fault).or_default() += count;
                }
            }
            Err(failure) => {
                self.harm.lost += failure.harm.lost;
                self.harm.doubled += failure.harm.doubled;
                self.harm.two_owners += failure.harm.two_owners;
                println!(
                    "seed {seed} FAILED; the last that happened:\n{}",
                    failure.trace
                );
                for violation in failure.violations {
                    println!("seed {seed}: {violation}");
                }
                println!("to see it again: just sim --seeds 1 --first {seed}\n");
                self.failed.push(seed);
            }
        }
    }

    fn print(&self, took: Duration) {
        println!("{:<20} {:>9}", "fault", "times");
        for (fault, count) in &self.faults {
            println!("{:<20} {count:>9}", format!("{fault:?}"));
        }
        let Harm {
            lost,
            doubled,
            two_owners,
        } = self.harm;
        let rows = [
            ("seeds", self.seeds.to_string()),
            (
                "simulated hours",
                format!("{:.1}", self.simulated.as_secs_f64() / 3600.0),
            ),
            ("faults", self.faults.values().sum::<usize>().to_string()),
            ("acknowledged edits", self.acked.to_string()),
            ("rows committed", self.commits.to_string()),
            ("appends fenced", self.fenced.to_string()),
            ("leases ended early", self.early.to_string()),
            ("most tasks in a node", self.tasks_max.to_string()),
            ("lost", lost.to_string()),
            ("doubled", doubled.to_string()),
            ("two owners", two_owners.to_string()),
            ("gone with a primary", self.gone.to_string()),
            ("begun anew", self.anew.to_string()),
            ("seconds", format!("{:.0}", took.as_secs_f64())),
        ];
        println!();
        for (what, count) in rows {
            println!("{what:<20} {count:>9}");
        }
        if !self.failed.is_empty() {
            println!("failed: {:?}", self.failed);
        }
    }
}
