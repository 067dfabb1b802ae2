//! Sees that the simulation finds every defect of `collab_core::mutants`.

use std::process::{Command, ExitCode};

use collab_core::mutants::{COMPILED_IN, Mutant};

/// Names the mutant of a process.
pub(crate) const CHOICE: &str = "COLLAB_MUTANT";

/// Plays up to `seeds` seeds with each mutant, in a process of its own, and prints what found it.
pub(crate) fn hunt(seeds: u64) -> ExitCode {
    if !COMPILED_IN {
        println!("compile with COLLAB_MUTANTS=1, as `just mutants` does");
        return ExitCode::FAILURE;
    }
    let program = std::env::current_exe().expect("this program has a path");
    let mut missed = 0;
    for mutant in Mutant::ALL {
        let played = Command::new(&program)
            .args(["--until-failure", "--seeds", &seeds.to_string()])
            .env(CHOICE, mutant.name())
            .output()
            .expect("this program can be started");
        let output = String::from_utf8_lossy(&played.stdout).into_owned();
        let found = output
            .lines()
            .find(|line| line.starts_with("seed ") && line.contains(": "));
        let found = match found {
            Some(line) if !played.status.success() => line,
            _ => {
                missed += 1;
                "NOT FOUND"
            }
        };
        println!("{:<24} {found}", mutant.name());
    }
    println!(
        "test result: {}. {} passed; {missed} failed",
        if missed == 0 { "ok" } else { "FAILED" },
        Mutant::ALL.len() - missed
    );
    if missed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
