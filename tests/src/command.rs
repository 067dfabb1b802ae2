//! Running other programs: what they print is the result, what they complain about is the error.

use anyhow::{Context, Result, bail};
use std::process::{Command, Output, Stdio};

/// Runs `command` to its end and returns what it wrote to standard output.
///
/// # Errors
/// When it cannot be started, or with its standard error when it fails.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output();
    judge(command, output)
}

/// The cargo that has started this program, or the one of the path, as somebody at a terminal would start it: what cargo tells
/// a test about its package would make it compile dependencies anew that ask for the same variables.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let told = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(told) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// Like [`output`], without blocking; the program is killed when the future is dropped.
///
/// # Errors
/// As [`output`].
pub async fn output_of(command: Command) -> Result<String> {
    let mut command = tokio::process::Command::from(command);
    let output = command
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await;
    judge(command.as_std(), output)
}

fn judge(command: &Command, output: std::io::Result<Output>) -> Result<String> {
    let name = || format!("{command:?}").chars().take(400).collect::<String>();
    let output = output.with_context(|| format!("cannot start {}", name()))?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!(
            "{} ended with {}: {}\n{printed}",
            name(),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(printed)
}
