//! Scenarios on a real Kubernetes. One cluster serves them all, one after the other, each in a namespace of its own.
//!
//! `cargo test -p collab-tests --test e2e [WORD…]` runs those whose names contain one of the words. With `COLLAB_E2E_HOLD=1`
//! it starts a cluster of one kube node and waits; `nsenter --all --target PID` goes in there, where the first process is PID.

#![allow(
    clippy::print_stdout,
    reason = "what was measured is part of a scenario's result"
)]

mod drills;
mod harness;
mod installed;
mod lifecycle;

use anyhow::{Context, Result, bail, ensure};
use collab_tests::kubernetes::{self, Cluster, Sandbox};
use collab_tests::tools::Tools;
use collab_tests::{command, images};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use std::io::{BufRead as _, Write as _};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// A name, and what is to be shown.
type Scenario = (
    &'static str,
    for<'cluster> fn(&'cluster Cluster) -> BoxFuture<'cluster, Result<()>>,
);

const SCENARIOS: &[Scenario] = &[
    ("pods_are_restricted_and_resolve_services", |cluster| {
        Box::pin(harness::names_and_restrictions(cluster))
    }),
    ("a_volume_stays_when_its_pod_is_killed", |cluster| {
        Box::pin(harness::volumes(cluster))
    }),
    ("the_database_image_runs_as_its_user", |cluster| {
        Box::pin(harness::database_image(cluster))
    }),
    ("a_kube_node_is_cut_off_and_healed", |cluster| {
        Box::pin(harness::cut_and_heal(cluster))
    }),
    ("prometheus_scrapes_pods", |cluster| {
        Box::pin(harness::scraping(cluster))
    }),
    ("both_versions_of_helm_reach_the_cluster", |cluster| {
        Box::pin(harness::helm(cluster))
    }),
    ("wrong_manifests_are_refused_by_field", |cluster| {
        Box::pin(lifecycle::wrong_manifests(cluster))
    }),
    ("a_killed_node_loses_no_acknowledged_edit", |cluster| {
        Box::pin(drills::kill(cluster))
    }),
    ("connections_scale_the_nodes", |cluster| {
        Box::pin(drills::scale(cluster))
    }),
    (
        "a_kube_node_cut_off_loses_no_acknowledged_edit",
        |cluster| Box::pin(drills::cut(cluster)),
    ),
    (
        "an_uninstalled_cluster_comes_back_with_its_documents",
        |cluster| Box::pin(lifecycle::uninstall(cluster)),
    ),
];

/// No scenario takes half as long. What hangs is a failure, and the others still run.
const SCENARIO_PATIENCE: Duration = Duration::from_mins(10);

const DESCRIPTION_PATIENCE: Duration = Duration::from_mins(2);

/// The one test that is not run on the cluster: it kills a run like this one before this one begins.
const KILLED: &str = "a_killed_run_leaves_nothing_in_the_way";

/// Makes the program inside start a cluster of one kube node, say so, and wait to be killed.
const HOLD: &str = "COLLAB_E2E_HOLD";

/// Says that the programs are up to date.
const BUILT: &str = "COLLAB_PROGRAMS_BUILT";

fn main() -> ExitCode {
    let result = if kubernetes::inside() {
        inside()
    } else {
        outside()
    };
    result.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

/// Makes what the cluster needs, then goes into the sandbox.
fn outside() -> Result<ExitCode> {
    let wanted = Wanted::from_arguments();
    if wanted.list {
        say(&format!("{KILLED}: test"));
        for (name, _) in SCENARIOS {
            say(&format!("{name}: test"));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let start = Instant::now();
    parts()?;
    say(&format!(
        "programs and images: there after {:.1} s",
        start.elapsed().as_secs_f64()
    ));
    let state = binaries()?.join("e2e");
    let mut killed = "";
    if std::env::var_os(HOLD).is_none() && wanted.matches(KILLED) {
        killed = match a_killed_run_leaves_nothing_in_the_way(&state) {
            Ok(()) => "ok",
            Err(error) => {
                eprintln!("{KILLED}: {error:#}");
                "failed"
            }
        };
    }
    let status = Sandbox::new(&state)?.run(&[("COLLAB_E2E_KILLED", killed)])?;
    Ok(ExitCode::from(
        u8::try_from(status.code().unwrap_or(1)).unwrap_or(1),
    ))
}

#[tokio::main]
async fn inside() -> Result<ExitCode> {
    let (tools, images) = parts()?;
    let holding = std::env::var_os(HOLD).is_some();
    let start = Instant::now();
    let zones: &[&str] = if holding { &["a"] } else { &["a", "b"] };
    let cluster = Cluster::start(&tools, &images, zones)
        .await
        .context("the cluster does not start")?;
    say(&format!(
        "cluster of {} kube nodes: up after {:.1} s",
        zones.len(),
        start.elapsed().as_secs_f64()
    ));
    if holding {
        return std::future::pending().await;
    }

    let wanted = Wanted::from_arguments();
    let (mut passed, mut failed) = (0, Vec::new());
    match std::env::var("COLLAB_E2E_KILLED").as_deref() {
        Ok("ok") => passed += 1,
        Ok("failed") => failed.push(KILLED),
        _ => {}
    }
    for (name, scenario) in SCENARIOS.iter().filter(|(name, _)| wanted.matches(name)) {
        let start = Instant::now();
        let result = AssertUnwindSafe(in_time(scenario(&cluster)))
            .catch_unwind()
            .await;
        let seconds = start.elapsed().as_secs_f64();
        if let Ok(Ok(())) = result {
            passed += 1;
            say(&format!("test {name} ... ok ({seconds:.1} s)"));
            continue;
        }
        failed.push(name);
        say(&format!("test {name} ... FAILED ({seconds:.1} s)"));
        if let Ok(Err(error)) = result {
            eprintln!("{error:#}");
        }
        let description = tokio::time::timeout(DESCRIPTION_PATIENCE, cluster.describe()).await;
        eprintln!(
            "{}",
            description.unwrap_or_else(|_| "kubectl does not answer".into())
        );
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

/// Fails a scenario that does not end, with the processes that it may wait for.
async fn in_time(scenario: impl Future<Output = Result<()>>) -> Result<()> {
    let mut scenario = pin!(scenario);
    if let Ok(result) = tokio::time::timeout(SCENARIO_PATIENCE, &mut scenario).await {
        return result;
    }
    // While the scenario is still there: with it go the programs that it has started.
    let mut ps = Command::new("ps");
    ps.args(["-eo", "pid,ppid,stat,wchan:20,etimes,args", "--cols=200"]);
    bail!(
        "not done within {SCENARIO_PATIENCE:?}; processes:\n{}",
        command::output_of(ps).await?
    )
}

/// Kills a run that has its cluster up, and sees all of it end; the cluster that this run starts afterwards in the same place
/// shows the rest.
fn a_killed_run_leaves_nothing_in_the_way(state: &Path) -> Result<()> {
    let start = Instant::now();
    let mut run = Command::new(std::env::current_exe()?)
        .env(HOLD, "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let printed = std::io::BufReader::new(run.stdout.take().context("it was asked for")?).lines();
    let up = printed
        .map_while(Result::ok)
        .any(|line| line.starts_with("cluster of 1"));
    let sandbox = Sandbox::of(state)?;
    let alive = sandbox.processes()?;
    run.kill()?;
    run.wait()?;
    ensure!(up, "its cluster did not start");
    ensure!(alive > 10, "only {alive} processes were alive");
    let killed = Instant::now();
    while sandbox.processes()? > 0 {
        ensure!(
            killed.elapsed() < Duration::from_secs(10),
            "{} processes outlive it",
            sandbox.processes()?
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    say(&format!(
        "test {KILLED} ... ok ({:.1} s; its {alive} processes were gone {} ms after the kill)",
        start.elapsed().as_secs_f64(),
        killed.elapsed().as_millis()
    ));
    Ok(())
}

/// The programs and images that the cluster needs, made if they are not there.
fn parts() -> Result<(Tools, Vec<images::Image>)> {
    let tools = Tools::build()?;
    if !kubernetes::inside() && std::env::var_os(BUILT).is_none() {
        let mut build = command::cargo();
        build.args(["build", "--quiet", "--workspace", "--bins", "--tests"]);
        if !cfg!(debug_assertions) {
            build.arg("--release");
        }
        command::output(build.current_dir(env!("CARGO_MANIFEST_DIR")))?;
    }
    let images = images::build(&tools, &binaries()?)?;
    Ok((tools, images))
}

/// The folder of our programs: this one lies in `deps` below it.
fn binaries() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    Ok(program
        .ancestors()
        .nth(2)
        .context("no build folder")?
        .to_path_buf())
}

/// Which tests the arguments ask for.
struct Wanted {
    words: Vec<String>,
    list: bool,
}

impl Wanted {
    fn from_arguments() -> Self {
        let (flags, words): (Vec<_>, Vec<_>) = std::env::args()
            .skip(1)
            .partition(|argument| argument.starts_with('-'));
        Self {
            words,
            list: flags.iter().any(|flag| flag == "--list"),
        }
    }

    fn matches(&self, name: &str) -> bool {
        self.words.is_empty() || self.words.iter().any(|word| name.contains(word.as_str()))
    }
}

/// Prints a line for whoever counts results.
fn say(line: &str) {
    let mut out = std::io::stdout();
    // A reader that has gone away is no reason to stop.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
