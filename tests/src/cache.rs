//! The user's cache folder: what is slow to make and follows from its inputs alone is made once for all checkouts.

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// `$XDG_CACHE_HOME/collabcluster`, or the same below `~/.cache`.
///
/// # Errors
/// When there is no home folder.
pub fn folder() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME") {
        Some(base) => PathBuf::from(base),
        None => PathBuf::from(std::env::var_os("HOME").context("HOME is not set")?).join(".cache"),
    };
    Ok(base.join("collabcluster"))
}

/// Returns the path of `name` as it follows from `inputs`, below `folder`.
///
/// `make` is called when there is none yet, with a path that exists neither as a file nor as a folder; what it leaves there
/// is renamed once it is whole, so that nothing half made is ever taken for finished. Others wait meanwhile.
///
/// # Errors
/// What `make` fails with; nothing is kept then.
pub fn entry(
    folder: &Path,
    name: &str,
    inputs: &[&[u8]],
    make: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let path = folder.join(format!("{name}-{}", key(inputs)));
    if path.exists() {
        return Ok(path);
    }
    fs::create_dir_all(folder)?;
    let lock = File::create(folder.join(format!("{name}.lock")))?;
    lock.lock()?;
    if path.exists() {
        return Ok(path);
    }
    let partial = folder.join(format!("{name}.partial"));
    remove(&partial)?;
    eprintln!("making {name}");
    let start = Instant::now();
    make(&partial).with_context(|| format!("cannot make {name}"))?;
    fs::rename(&partial, &path)?;
    eprintln!("made {name} in {:.1} s", start.elapsed().as_secs_f64());
    Ok(path)
}

/// Removes a file, or a folder with all in it, if it is there.
///
/// # Errors
/// When it is there and stays.
pub fn remove(path: &Path) -> Result<()> {
    let gone = if path.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    match gone {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// First 16 hex digits of a hash over the inputs and their lengths.
fn key(inputs: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for input in inputs {
        hash.update(input.len().to_le_bytes());
        hash.update(input);
    }
    format!("{:x}", hash.finalize())[..16].to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_or_killed_build_is_not_taken_for_a_finished_one() {
        let folder = std::env::temp_dir().join(format!("collab-cache-{}", std::process::id()));
        let write = |path: &Path| Ok(fs::write(path, "whole")?);
        let dies = |path: &Path| {
            fs::write(path, "ha")?;
            anyhow::bail!("died half way")
        };
        assert!(entry(&folder, "thing", &[b"1"], dies).is_err());
        let made = entry(&folder, "thing", &[b"1"], write).unwrap();
        assert_eq!(fs::read_to_string(&made).unwrap(), "whole");
        assert_eq!(
            entry(&folder, "thing", &[b"1"], dies).unwrap(),
            made,
            "made once"
        );
        assert_ne!(
            entry(&folder, "thing", &[b"2"], write).unwrap(),
            made,
            "other inputs, other thing"
        );
        assert_ne!(key(&[b"a", b"bc"]), key(&[b"ab", b"c"]));
        fs::remove_dir_all(folder).unwrap();
    }
}
