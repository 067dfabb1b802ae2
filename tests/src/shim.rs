//! A slow disk and a wrong clock for unchanged programs, by a small library that is loaded before theirs (`shim.c`).

use crate::command;
use crate::process::Folder;
use anyhow::{Context, Result};
use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

/// What the programs that were started with [`Shim::environment`] meet, from now on.
#[derive(Debug)]
pub struct Shim {
    folder: Folder,
    numbers: Mutex<fs::File>,
}

impl Shim {
    /// Compiles the library. Nothing is slow and no clock is wrong yet.
    ///
    /// # Errors
    /// When there is no C compiler.
    pub fn new() -> Result<Self> {
        let folder = Folder::new("shim", "root");
        // Postgres and Redis run as users of their own.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        let source = folder.path().join("shim.c");
        fs::write(&source, include_str!("shim.c"))?;
        let mut compile = Command::new("gcc");
        compile.args(["-O2", "-Wall", "-Werror", "-shared", "-fPIC", "-o"]);
        compile.arg(folder.path().join("shim.so")).arg(&source);
        command::output(&mut compile).context("the shim needs gcc")?;
        let file = fs::File::create(folder.path().join("numbers"))?;
        file.set_len(16)?;
        Ok(Self {
            folder,
            numbers: Mutex::new(file),
        })
    }

    /// Variables for the programs.
    pub fn environment(&self) -> Vec<(String, String)> {
        let path = |name: &str| -> PathBuf { self.folder.path().join(name) };
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        vec![
            ("LD_PRELOAD".to_owned(), text(path("shim.so"))),
            ("COLLAB_SHIM".to_owned(), text(path("numbers"))),
        ]
    }

    /// Every fsync takes this much longer.
    ///
    /// # Errors
    /// When the folder is gone.
    pub fn delay_fsync(&self, delay: Duration) -> Result<()> {
        self.set(0, i64::try_from(delay.as_millis())?)
    }

    /// The wall clock is so many seconds ahead.
    ///
    /// # Errors
    /// When the folder is gone.
    pub fn shift_clock(&self, seconds: i64) -> Result<()> {
        self.set(8, seconds * 1000)
    }

    fn set(&self, at: u64, value: i64) -> Result<()> {
        let mut file = self.numbers.lock().expect("no holder panics");
        file.seek(SeekFrom::Start(at))?;
        file.write_all(&value.to_ne_bytes())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn a_program_meets_a_slow_disk_and_a_wrong_clock() {
        let shim = Shim::new().unwrap();
        let date = || {
            let mut date = Command::new("date");
            date.arg("+%s").envs(shim.environment());
            command::output(&mut date)
                .unwrap()
                .trim()
                .parse::<i64>()
                .unwrap()
        };
        let before = date();
        shim.shift_clock(-3600).unwrap();
        assert!((3590..=3600).contains(&(before - date())));

        let file = shim.folder.path().join("file");
        let sync = || {
            let begun = Instant::now();
            let mut sync = Command::new("sync");
            sync.arg(&file).envs(shim.environment());
            command::output(&mut sync).unwrap();
            begun.elapsed()
        };
        fs::write(&file, "x").unwrap();
        shim.delay_fsync(Duration::from_millis(300)).unwrap();
        assert!(Duration::from_millis(300) <= sync());
    }
}
