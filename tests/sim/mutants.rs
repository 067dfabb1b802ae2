//! Sees that the tests find every defect of `collab_core::mutants`.
//!
//! Each is looked for in a process of its own: by the simulation, or, where the simulated database has not
//! the weakness that the defect needs, by a test on a real Postgres, which must pass without the defect.

use std::process::{Command, ExitCode};

use collab_core::mutants::{COMPILED_IN, Mutant};
use collab_tests::command;
use collab_tests::mutants::CHOICE;

/// Tests of the tier process that are to find a defect.
const ON_POSTGRES: [(Mutant, &str); 4] = [
    (
        Mutant::ConflictIsSuccess,
        "write_rule::a_position_that_holds_other_bytes_is_no_success",
    ),
    (
        Mutant::ExistsFence,
        "write_rule::no_update_appears_behind_the_back_of_a_new_owner",
    ),
    (
        Mutant::PinKeepsEpoch,
        "write_rule::no_update_appears_in_a_document_that_was_pinned_or_unpinned",
    ),
    (
        Mutant::EarlyFenceUnlocked,
        "store_conformance::members::on_clusters::on_postgres::of_two_members_that_judge_each_other_one_stays",
    ),
];

/// Statements of Postgres that have no counterpart in memory, where each runs on its own, and what needs a document
/// in memory that is wrong already.
const NOT_SIMULATED: [Mutant; 3] = [
    Mutant::ExistsFence,
    Mutant::EarlyFenceUnlocked,
    Mutant::ConflictIsSuccess,
];

/// Plays up to `seeds` seeds with each mutant, runs the tests on Postgres, and prints what found it.
pub(crate) fn hunt(seeds: u64) -> ExitCode {
    if !COMPILED_IN {
        println!("compile with the feature collab-core/mutants, as `just mutants` does");
        return ExitCode::FAILURE;
    }
    println!("{:<24} found by", "mutant");
    let simulated = Mutant::ALL
        .into_iter()
        .filter(|mutant| !NOT_SIMULATED.contains(mutant));
    let simulated = simulated.map(|mutant| (mutant, played(mutant, seeds)));
    let on_postgres = ON_POSTGRES
        .into_iter()
        .map(|(mutant, test)| (mutant, tested(mutant, test)));
    let (mut found, mut missed) = (0, 0);
    for (mutant, by) in simulated.chain(on_postgres) {
        let by = match by {
            Ok(by) => {
                found += 1;
                by
            }
            Err(why) => {
                missed += 1;
                format!("NOT FOUND: {why}")
            }
        };
        println!("{:<24} {by}", mutant.name());
    }
    let result = if missed == 0 { "ok" } else { "FAILED" };
    println!("test result: {result}. {found} passed; {missed} failed");
    if missed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The seed that found it, and what it saw.
fn played(mutant: Mutant, seeds: u64) -> Result<String, String> {
    let program = std::env::current_exe().expect("this program has a path");
    let played = Command::new(program)
        .args(["--until-failure", "--seeds", &seeds.to_string()])
        .env(CHOICE, mutant.name())
        .output()
        .expect("this program can be started");
    let output = String::from_utf8_lossy(&played.stdout).into_owned();
    let mut lines = output.lines();
    let found = lines.find(|line| line.starts_with("seed ") && line.contains(": "));
    match found {
        Some(line) if !played.status.success() => Ok(format!("sim, {line}")),
        _ => Err(format!("{seeds} seeds of the simulation pass")),
    }
}

/// The test that found it, and what it said.
fn tested(mutant: Mutant, test: &str) -> Result<String, String> {
    let run = |mutant: Option<Mutant>| {
        let mut command = command::cargo();
        command
            .args(["test", "--quiet", "--workspace"])
            .args(["--features", "collab-core/mutants", "--test", "process"])
            .args(["--", "--exact", test]);
        if let Some(mutant) = mutant {
            command.env(CHOICE, mutant.name());
        }
        let ran = command.output().expect("cargo can be started");
        let output = String::from_utf8_lossy(&ran.stdout).into_owned();
        (ran.status.success(), output)
    };
    let (passes, output) = run(None);
    if !passes || !output.contains(" 1 passed") {
        return Err(format!("{test} does not pass without it:\n{output}"));
    }
    let (passes, output) = run(Some(mutant));
    if passes || !output.contains(" 1 failed") {
        return Err(format!("{test} passes"));
    }
    let mut lines = output.lines().map(str::trim);
    let said = lines.find(|line| line.starts_with("assertion") || line.contains("violations: "));
    Ok(format!("process, {test}: {}", said.unwrap_or_default()))
}
