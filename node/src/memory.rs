//! How much of its memory this process has used up, by the limit of its cgroup.
//!
//! Beyond the limit the kernel ends the process and with it every document. So a node that is short of memory
//! opens no more documents until others were closed: whoever asks for one waits, and nobody else notices.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Memory is short from this share of the limit on, in percent.
const SHORT_PERCENT: u64 = 80;
/// How long an answer is good.
const FRESH: Duration = Duration::from_millis(50);

/// Watches the memory of this process.
#[derive(Debug)]
pub struct Memory {
    usage: fn() -> Option<Usage>,
    known: Mutex<Option<(Instant, bool)>>,
}

impl Memory {
    /// What the system says of this process.
    pub const fn of_this_process() -> Self {
        Self {
            usage,
            known: Mutex::new(None),
        }
    }

    /// There is always enough.
    pub const fn unlimited() -> Self {
        Self {
            usage: || None,
            known: Mutex::new(None),
        }
    }

    /// Whether so little is left that no document should be opened. Never where there is no limit. Reads a few small files, at
    /// most every 50 ms.
    pub fn is_short(&self) -> bool {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, short)) = *known
            && at.elapsed() < FRESH
        {
            return short;
        }
        let short = (self.usage)().is_some_and(Usage::is_short);
        *known = Some((Instant::now(), short));
        short
    }
}

/// Bytes in a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    used: u64,
    limit: u64,
}

impl Usage {
    const fn is_short(self) -> bool {
        self.limit / 100 * SHORT_PERCENT <= self.used
    }
}

/// What is used of the memory of this process's own cgroup; `None` where that has no limit.
fn usage() -> Option<Usage> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    folders(&groups, &mounts)
        .iter()
        .find_map(|folder| read(folder))
}

/// The folders that may tell, by what `/proc/self/cgroup` and `/proc/self/mounts` say.
fn folders(groups: &str, mounts: &str) -> Vec<PathBuf> {
    let own = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let kind = match controllers {
            "" => "cgroup2",
            _ if controllers.split(',').any(|name| name == "memory") => "cgroup",
            _ => return None,
        };
        Some((kind, path))
    });
    let mut folders = Vec::new();
    for (kind, path) in own {
        for mount in mounts.lines() {
            let mut fields = mount.split(' ').skip(1);
            let (Some(at), Some(of), Some(options)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            let fits = kind == "cgroup2" || options.split(',').any(|option| option == "memory");
            if of == kind && fits {
                folders.push(Path::new(at).join(path.trim_start_matches('/')));
                // In a container its own cgroup is where the hierarchy is mounted.
                folders.push(PathBuf::from(at));
            }
        }
    }
    folders
}

fn read(folder: &Path) -> Option<Usage> {
    let number = |file: &str| {
        let text = fs::read_to_string(folder.join(file)).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let either = |new: &str, old: &str| number(new).or_else(|| number(old));
    let limit = either("memory.max", "memory.limit_in_bytes")?;
    let used = either("memory.current", "memory.usage_in_bytes")?;
    // The kernel takes back what it has cached of files before it ends anybody.
    let cached = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cached = cached.lines().find_map(|line| {
        let bytes = line.strip_prefix("total_inactive_file ");
        bytes
            .or_else(|| line.strip_prefix("inactive_file "))?
            .parse()
            .ok()
    });
    Some(Usage {
        used: used.saturating_sub(cached.unwrap_or(0)),
        limit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_cgroup_is_found_in_either_version_and_in_a_container() {
        let new = folders("0::/pod/c1\n", "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n");
        assert_eq!(
            new,
            ["/sys/fs/cgroup/pod/c1", "/sys/fs/cgroup"].map(PathBuf::from)
        );
        let old = folders(
            "9:cpu:/a\n5:memory:/b\n",
            "x /cg/cpu cgroup rw,cpu 0 0\nx /cg/memory cgroup rw,memory 0 0\n",
        );
        assert_eq!(old, ["/cg/memory/b", "/cg/memory"].map(PathBuf::from));
        assert!(folders("", "proc /proc proc rw 0 0\n").is_empty());
    }

    #[test]
    fn memory_is_short_from_four_fifths_on() {
        let short = [79, 80, 101].map(|used| Usage { used, limit: 100 }.is_short());
        assert_eq!(short, [false, true, true]);
        // What stands for no limit is not reached.
        let limit = 0x7FFF_FFFF_FFFF_F000;
        assert!(
            !Usage {
                used: 1 << 40,
                limit
            }
            .is_short()
        );
    }
}
