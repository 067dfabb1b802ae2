//! Side by side with other servers: one load generator, one run, ratios.
//!
//! `just bench` compares everything three times and takes medians; words choose scenarios and servers:
//! `just bench propagate saturate collab/sqlite hocuspocus`. Server and generator have a core each. Other servers are installed by
//! their package names. `raw` is a server without CRDT and storage: what the machine can do at all; `raw/sqlite` and
//! `raw/postgres` have the storage.

#![allow(clippy::print_stdout, reason = "the table is what it is for")]
#![allow(clippy::cast_precision_loss, reason = "figures have three digits")]

mod bars;
mod commit;
mod history;
mod load;
mod raw;
mod scale;
mod scenarios;
mod servers;
mod socket;
mod stats;

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::scenarios::{SCENARIOS, Scenario};
use crate::servers::{GENERATOR_CORE, Kind};
use crate::stats::{Figures, short};

/// Set in the process that has its core and enough file descriptors.
const PREPARED: &str = "COLLAB_BENCH_PREPARED";

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    if let [command, port, state, log @ ..] = words.as_slice()
        && command == "raw-server"
    {
        let log = log.first().map(String::as_str);
        return raw::serve(port.parse()?, Path::new(state), log);
    }
    if words.iter().any(|word| word == "--check") {
        history::check();
        println!("what the generator writes is what Yjs would write");
        return Ok(());
    }
    if std::env::var_os(PREPARED).is_none() {
        // 5,000 sockets, and a core for itself.
        let error = Command::new("prlimit")
            .args([
                "--nofile=20000:20000",
                "taskset",
                "--cpu-list",
                GENERATOR_CORE,
            ])
            .arg(std::env::current_exe()?)
            .args(&words)
            .env(PREPARED, "1")
            .exec();
        return Err(error).context("prlimit and taskset of util-linux are needed");
    }
    let choice = Choice::of(&words)?;
    let rounds = compare(&choice)?;
    report(&choice, &rounds);
    Ok(())
}

/// What is compared.
struct Choice {
    scenarios: Vec<&'static Scenario>,
    kinds: Vec<Kind>,
    rounds: usize,
}

impl Choice {
    fn of(words: &[String]) -> Result<Self> {
        let mut choice = Self {
            scenarios: Vec::new(),
            kinds: Vec::new(),
            rounds: 3,
        };
        for word in words {
            if let Some(scenario) = SCENARIOS.iter().find(|scenario| scenario.name == word) {
                choice.scenarios.push(scenario);
            } else if let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.name() == word) {
                choice.kinds.push(kind);
            } else if let Some(rounds) = word.strip_prefix("--rounds=") {
                choice.rounds = rounds
                    .parse()
                    .with_context(|| format!("{word}: a number is needed"))?;
            } else {
                let scenarios: Vec<&str> = SCENARIOS.iter().map(|scenario| scenario.name).collect();
                let kinds: Vec<&str> = Kind::ALL.into_iter().map(Kind::name).collect();
                bail!(
                    "{word} is neither a scenario ({}) nor a server ({})",
                    scenarios.join(", "),
                    kinds.join(", ")
                );
            }
        }
        if choice.scenarios.is_empty() {
            choice.scenarios = SCENARIOS.iter().collect();
        }
        if choice.kinds.is_empty() {
            choice.kinds = Kind::ALL.to_vec();
        }
        ensure!(0 < choice.rounds, "--rounds=0 compares nothing");
        Ok(choice)
    }
}

type Rounds = BTreeMap<(&'static str, Kind), Vec<Figures>>;

/// Runs every scenario against every server, round after round, so that all see the same weather.
fn compare(choice: &Choice) -> Result<Rounds> {
    let mut rounds = Rounds::new();
    for round in 1..=choice.rounds {
        for scenario in &choice.scenarios {
            for kind in &choice.kinds {
                if kind.is_raw() && !scenario.raw.contains(kind) {
                    continue;
                }
                match (scenario.run)(*kind) {
                    Ok(figures) => {
                        println!("{round} {:10} {:16}{figures}", scenario.name, kind.name());
                        rounds
                            .entry((scenario.name, *kind))
                            .or_default()
                            .push(figures);
                    }
                    // A rival that fails is worth a line, not the run.
                    Err(error) if kind.is_rival() => println!(
                        "{round} {:10} {:16}  failed: {error:#}",
                        scenario.name,
                        kind.name()
                    ),
                    Err(error) => {
                        return Err(error.context(format!(
                            "{} against {}",
                            scenario.name,
                            kind.name()
                        )));
                    }
                }
            }
        }
    }
    Ok(rounds)
}

/// Prints a table per scenario, medians of all rounds, and then which bars are met.
fn report(choice: &Choice, rounds: &Rounds) {
    let medians: BTreeMap<_, _> = rounds
        .iter()
        .map(|(key, rounds)| (*key, Figures::median(rounds)))
        .collect();
    for scenario in &choice.scenarios {
        println!("\n### {}: {}", scenario.name, scenario.about);
        let mut columns = Vec::<&'static str>::new();
        for kind in &choice.kinds {
            let figures = medians.get(&(scenario.name, *kind));
            for (name, _) in figures.iter().flat_map(|figures| &figures.0) {
                if !columns.contains(name) {
                    columns.push(name);
                }
            }
        }
        println!("| server | {} |", columns.join(" | "));
        println!("|--|{}", "--|".repeat(columns.len()));
        for kind in &choice.kinds {
            if let Some(figures) = medians.get(&(scenario.name, *kind)) {
                let cells: Vec<String> = columns
                    .iter()
                    .map(|column| figures.get(column).map_or_else(|| "–".to_owned(), short))
                    .collect();
                println!("| {} | {} |", kind.name(), cells.join(" | "));
            }
        }
    }
    println!();
    for line in bars::judge(&medians) {
        println!("{line}");
    }
}
