//! Child processes that end with the test, and folders for them.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::bail;
use uuid::Uuid;

use crate::network::Host;

/// A new folder, removed when this is dropped.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// User whose processes use it; `None`: the one that runs the tests.
    user: Option<String>,
}

impl Folder {
    /// Makes a folder whose name begins with `name`. When the tests run as root it belongs to `user`
    /// (which must exist), and [`command`] runs programs as that user: servers refuse to be root.
    ///
    /// # Panics
    /// When the folder cannot be made.
    pub fn new(name: &str, user: &str) -> Self {
        let path = std::env::temp_dir().join(format!("collab-{name}-{}", Uuid::new_v4().simple()));
        let root = fs::metadata("/proc/self").expect("/proc is mounted").uid() == 0;
        let user = root.then(|| user.to_owned());
        let mut install = Command::new("install");
        install.args(["--directory", "--mode=0700"]);
        if let Some(user) = &user {
            install.arg(format!("--owner={user}"));
        }
        let made = install.arg(&path).status().expect("install runs");
        assert!(made.success(), "cannot make the folder {}", path.display());
        Self { path, user }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.path).ok();
    }
}

/// A command that runs in `folder` as its user, silently, and ends when the test's process ends.
pub fn command(folder: &Folder, program: &Path) -> Command {
    command_on(&Host::local(), folder, program)
}

/// Like [`command`], on a host.
pub fn command_on(host: &Host, folder: &Folder, program: &Path) -> Command {
    let mut command = host.command();
    command.args(["setpriv", "--pdeathsig=KILL"]);
    if let Some(user) = &folder.user {
        command
            .arg(format!("--reuid={user}"))
            .arg(format!("--regid={user}"))
            .arg("--init-groups");
    }
    command.arg(program).current_dir(folder.path());
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Spawns a command from a thread that never ends: the kernel sends a child its parent-death signal when
/// the *thread* that made it ends, and the thread of a test ends before its process.
///
/// # Panics
/// When the program cannot be run.
pub fn spawn(mut command: Command) -> Child {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        sender.send(command.spawn()).ok();
        loop {
            std::thread::park();
        }
    });
    receiver
        .recv()
        .expect("the thread answers")
        .expect("the program runs")
}

/// A loopback port that nobody listens on. Another process may still take it before it is used.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    listener.local_addr().expect("it is bound").port()
}

/// Sends a signal by name, such as `TERM`.
///
/// # Errors
/// When the process has ended.
pub fn signal(child: &Child, name: &str) -> anyhow::Result<()> {
    let sent = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(child.id().to_string())
        .status()?;
    if !sent.success() {
        bail!("cannot send {name} to process {}", child.id());
    }
    Ok(())
}

/// Waits until `condition` holds.
///
/// # Errors
/// When it fails, or does not hold within `patience`.
pub async fn until(
    patience: Duration,
    what: &str,
    mut condition: impl FnMut() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let started = std::time::Instant::now();
    while !condition()? {
        if patience < started.elapsed() {
            bail!("waited {patience:?} in vain until {what}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
