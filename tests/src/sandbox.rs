//! Where a test has a machine of its own: network, mount and process namespaces of its own, and a cgroup.
//!
//! Nothing in here outlives the program that made it. The sandbox's first process dies with the program that waits for
//! it, even by SIGKILL, and then the kernel ends all the others and removes links, routes and mounts. What is left are empty cgroups and files
//! in the state folder, which the next sandbox removes. And no packet leaves the machine: the network has no way out.

use crate::{cache, command};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

/// Where the state folder is seen inside, short enough for the paths of sockets.
pub const RUN: &str = "/run/collab";

/// Tell the program inside its state folder and its cgroup.
const INSIDE: &str = "COLLAB_SANDBOX";
const CGROUP: &str = "COLLAB_SANDBOX_CGROUP";

/// A sandbox that keeps its files in one folder; two sandboxes of one folder follow each other, the second ends the first.
#[derive(Debug)]
pub struct Sandbox {
    state: PathBuf,
    cgroup: String,
}

impl Sandbox {
    /// Ends what still runs of an earlier sandbox of this folder and removes what it left.
    ///
    /// # Errors
    /// Without the rights of root, or when something of the earlier one cannot be removed.
    pub fn new(state: &Path) -> Result<Self> {
        let sandbox = Self::of(state)?;
        sandbox
            .end_processes()
            .context("a sandbox needs the rights of root")?;
        sandbox.remove_cgroups()?;
        cache::remove(&sandbox.state)?;
        fs::create_dir_all(&sandbox.state)?;
        Ok(sandbox)
    }

    /// The sandbox of this folder as it is, whoever has made it.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn of(state: &Path) -> Result<Self> {
        fs::create_dir_all(state)?;
        let state = state.canonicalize()?;
        let name = state
            .to_string_lossy()
            .trim_start_matches('/')
            .replace(['/', '.'], "-");
        Ok(Self {
            state,
            cgroup: format!("collab-{name}"),
        })
    }

    /// Runs this very program again, inside, with the same arguments and `environment` added.
    ///
    /// Its end is the end of everything inside, and so is the end of the calling program.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn run(&self, environment: &[(&str, &str)]) -> Result<ExitStatus> {
        // By the cgroup a later sandbox finds whatever is left of this one, the waiting program included.
        let hierarchy = tracking_hierarchy()?;
        let (outside, tree) = (
            hierarchy.join(own_cgroup()?),
            hierarchy.join(&self.cgroup).join("run"),
        );
        fs::create_dir_all(&tree)?;
        join(&tree)?;
        let status = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "unshare",
                "--net",
                "--mount",
                "--pid",
                "--kill-child",
                "--mount-proc",
                "--",
            ])
            .arg(std::env::current_exe()?)
            .args(std::env::args_os().skip(1))
            .env(INSIDE, &self.state)
            .env(CGROUP, &self.cgroup)
            .envs(environment.iter().copied())
            .status()
            .context("cannot start a sandbox")?;
        join(&outside)?;
        self.remove_cgroups()?;
        Ok(status)
    }

    /// The number of processes that are alive inside, or of an earlier sandbox of the same folder.
    ///
    /// # Errors
    /// When the cgroup cannot be read.
    pub fn processes(&self) -> Result<usize> {
        let mut count = 0;
        let tree = tracking_hierarchy()?.join(&self.cgroup);
        walk(&tree, &mut |folder| {
            count += fs::read_to_string(folder.join("cgroup.procs"))?
                .lines()
                .count();
            Ok(())
        })?;
        Ok(count)
    }

    fn end_processes(&self) -> Result<()> {
        let tree = tracking_hierarchy()?.join(&self.cgroup);
        fs::create_dir_all(&tree)?;
        fs::write(tree.join("cgroup.kill"), "1")?;
        let start = Instant::now();
        while self.processes()? > 0 {
            ensure!(
                start.elapsed() < Duration::from_secs(20),
                "processes of an earlier run do not end"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn remove_cgroups(&self) -> Result<()> {
        for hierarchy in hierarchies()? {
            walk(&hierarchy.join(&self.cgroup), &mut |folder| {
                // A process that has just died holds its cgroup for a moment.
                let start = Instant::now();
                while let Err(error) = fs::remove_dir(folder) {
                    if start.elapsed() > Duration::from_secs(10) {
                        return Err(error).with_context(|| folder.display().to_string());
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Whether this program is the one inside.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Prepares the namespaces: the state folder at [`RUN`], nothing else below `/run`, loopback, and `commands`.
///
/// # Errors
/// Outside a sandbox, or when a command fails.
pub fn furnish(commands: &[&str]) -> Result<()> {
    let state = std::env::var(INSIDE).context("not in a sandbox")?;
    let mounts = format!(
        "mount -t tmpfs tmpfs /run && mkdir -p {RUN} /run/netns /run/lock && mount --bind '{state}' {RUN} && ip link set lo up"
    );
    for line in std::iter::once(mounts.as_str()).chain(commands.iter().copied()) {
        command::output(Command::new("sh").args(["-ec", line]))?;
    }
    Ok(())
}

/// Makes a cgroup in every hierarchy and returns its path below each of them.
///
/// # Errors
/// Outside a sandbox.
pub fn make_cgroup(name: &str) -> Result<String> {
    let parent = std::env::var(CGROUP).context("not in a sandbox")?;
    for hierarchy in hierarchies()? {
        let parent = hierarchy.join(&parent);
        for folder in [&parent, &parent.join(name)] {
            fs::create_dir_all(folder)?;
            // A cpuset takes no process before it has processors and memory (version 1), which come from its parent.
            for file in ["cpuset.cpus", "cpuset.mems"] {
                let above = folder
                    .parent()
                    .map(|parent| parent.join(file))
                    .filter(|file| file.exists());
                if let (Some(above), true) = (above, folder.join(file).exists()) {
                    fs::write(folder.join(file), fs::read_to_string(above)?)?;
                }
            }
        }
    }
    Ok(format!("/{parent}/{name}"))
}

/// What a process may use.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Memory in bytes; what the process has already does not count.
    pub memory_bytes: Option<u64>,
    /// Share of one processor.
    pub cpu_percent: Option<u32>,
}

/// Moves a process to a cgroup `name` of its own, with these limits.
///
/// # Errors
/// Outside a sandbox, when the process has ended, or when no hierarchy knows such a limit.
pub fn confine(process: u32, name: &str, limits: Limits) -> Result<()> {
    let cgroup = make_cgroup(name)?;
    let mut wanted = Vec::new();
    if let Some(bytes) = limits.memory_bytes {
        wanted.push([
            ("memory.limit_in_bytes", bytes.to_string()),
            ("memory.max", bytes.to_string()),
        ]);
    }
    if let Some(percent) = limits.cpu_percent {
        // Of a period of 100 ms, in microseconds.
        let quota = percent * 1000;
        wanted.push([
            ("cpu.cfs_quota_us", quota.to_string()),
            ("cpu.max", format!("{quota} 100000")),
        ]);
    }
    for spellings in wanted {
        let mut known = false;
        for hierarchy in hierarchies()? {
            let folder = hierarchy.join(cgroup.trim_start_matches('/'));
            for (file, value) in &spellings {
                if folder.join(file).exists() {
                    fs::write(folder.join(file), value)?;
                    fs::write(folder.join("cgroup.procs"), process.to_string())?;
                    known = true;
                }
            }
        }
        ensure!(known, "no cgroup hierarchy knows {}", spellings[0].0);
    }
    Ok(())
}

/// Mount points of all cgroup hierarchies.
fn hierarchies() -> Result<Vec<PathBuf>> {
    Ok(mounts("cgroup")?
        .into_iter()
        .chain(mounts("cgroup2")?)
        .collect())
}

/// The hierarchy of version 2: it can end a whole tree of processes at once.
fn tracking_hierarchy() -> Result<PathBuf> {
    mounts("cgroup2")?
        .into_iter()
        .next()
        .context("no cgroup hierarchy of version 2 is mounted")
}

/// Path of this program's cgroup below the mount point of version 2.
fn own_cgroup() -> Result<String> {
    let table = fs::read_to_string("/proc/self/cgroup")?;
    let path = table
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("no cgroup of version 2")?;
    Ok(path.to_string())
}

/// Moves this program to a cgroup.
fn join(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("cannot join {}", cgroup.display()))
}

fn mounts(kind: &str) -> Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/mounts")?;
    let of_kind = table.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == kind).then(|| PathBuf::from(path))
    });
    Ok(of_kind.collect())
}

/// Calls `visit` for the folder and all below it, the deepest first; does nothing if it is not there.
fn walk(folder: &Path, visit: &mut dyn FnMut(&Path) -> Result<()>) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Ok(());
    };
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            walk(&path, visit)?;
        }
    }
    visit(folder)
}
