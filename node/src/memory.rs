//! How much memory is left for documents: by the node's budget for them, and by the limit of this process's cgroup.
//!
//! Beyond the limit the kernel ends the process and with it every document. So a node that is short of memory unloads
//! documents that nobody has open, and opens no more until it has: whoever asks for one waits, and nobody else notices. The
//! budget counts what documents take by the estimate of `collab_core::document`; the cgroup counts everything.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use collab_core::limits::OPENING_BYTES;
use tokio::time::Instant;

/// Memory is short from this share of the limit on, in percent.
const SHORT_PERCENT: u64 = 80;
/// How long an answer is good.
const FRESH: Duration = Duration::from_millis(50);

/// Watches the memory of this process.
#[derive(Debug)]
pub struct Memory {
    usage: fn() -> Option<Usage>,
    known: Mutex<Option<(Instant, u64)>>,
    /// Bytes for all documents.
    budget: Option<u64>,
    /// Bytes of the shares that were given out.
    taken: AtomicU64,
}

impl Memory {
    /// What the system says of this process, and a budget for documents in bytes.
    pub const fn of_this_process(budget: Option<u64>) -> Self {
        Self {
            usage,
            known: Mutex::new(None),
            budget,
            taken: AtomicU64::new(0),
        }
    }

    /// There is always enough.
    pub const fn unlimited() -> Self {
        Self {
            usage: || None,
            known: Mutex::new(None),
            budget: None,
            taken: AtomicU64::new(0),
        }
    }

    /// Sets room aside for one more document; `None` if there is none. A single document is never too large for a budget,
    /// or nobody could open it anywhere.
    pub fn take(self: &Arc<Self>) -> Option<Share> {
        if 0 < self.short_by_system() {
            return None;
        }
        let budget = self.budget.unwrap_or(u64::MAX);
        let taken = |taken: u64| {
            let more = taken + OPENING_BYTES;
            (taken == 0 || more <= budget).then_some(more)
        };
        let (set, fetch) = (Ordering::Relaxed, Ordering::Relaxed);
        self.taken.fetch_update(set, fetch, taken).ok()?;
        Some(Share {
            memory: self.clone(),
            bytes: OPENING_BYTES,
        })
    }

    /// Takes room whether there is any or not.
    pub fn take_anyway(self: &Arc<Self>, bytes: u64) -> Share {
        self.taken.fetch_add(bytes, Ordering::Relaxed);
        Share {
            memory: self.clone(),
            bytes,
        }
    }

    /// Bytes that have to be freed before there is room for so many more documents; 0: there is. Reads a few small files, at most
    /// every 50 ms.
    pub fn short_of(&self, documents: u64) -> u64 {
        let wanted = self.taken.load(Ordering::Relaxed) + documents * OPENING_BYTES;
        let over = self
            .budget
            .map_or(0, |budget| wanted.saturating_sub(budget));
        over.max(self.short_by_system())
    }

    fn short_by_system(&self) -> u64 {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, short)) = *known
            && at.elapsed() < FRESH
        {
            return short;
        }
        let short = (self.usage)().map_or(0, Usage::short);
        *known = Some((Instant::now(), short));
        short
    }
}

/// What a document takes of the memory. Dropping it gives it back.
#[derive(Debug)]
pub struct Share {
    memory: Arc<Memory>,
    bytes: u64,
}

impl Share {
    /// What the document takes now.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Makes it what the document takes now.
    pub fn set(&mut self, bytes: u64) {
        if self.bytes == bytes {
            return;
        }
        let taken = &self.memory.taken;
        if self.bytes < bytes {
            taken.fetch_add(bytes - self.bytes, Ordering::Relaxed);
        } else {
            taken.fetch_sub(self.bytes - bytes, Ordering::Relaxed);
        }
        self.bytes = bytes;
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// Bytes in a cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Usage {
    used: u64,
    limit: u64,
}

impl Usage {
    /// Bytes too many.
    const fn short(self) -> u64 {
        (self.used + 1).saturating_sub(self.limit / 100 * SHORT_PERCENT)
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
        let short = [79, 80, 101].map(|used| Usage { used, limit: 100 }.short());
        assert_eq!(short, [0, 1, 22]);
        // What stands for no limit is not reached.
        let limit = 0x7FFF_FFFF_FFFF_F000;
        let used = 1 << 40;
        assert_eq!(Usage { used, limit }.short(), 0);
    }

    #[test]
    fn a_budget_has_room_for_what_was_given_back() {
        let memory = Arc::new(Memory {
            budget: Some(2 * OPENING_BYTES),
            ..Memory::unlimited()
        });
        let mut large = memory.take().unwrap();
        let small = memory.take().unwrap();
        assert!(memory.take().is_none());
        assert_eq!((memory.short_of(0), memory.short_of(1)), (0, OPENING_BYTES));
        drop(small);
        large.set(100 * OPENING_BYTES);
        assert!(memory.take().is_none());
        assert_eq!(memory.short_of(0), 98 * OPENING_BYTES);
        drop(large);
        assert_eq!(memory.short_of(2), 0);
        // One alone may take more than there is.
        let tight = Arc::new(Memory {
            budget: Some(1),
            ..Memory::unlimited()
        });
        let first = tight.take();
        assert!(first.is_some() && tight.take().is_none());
    }
}
