//! The network: connections of two pipes each, with delays, cuts and resets.
//!
//! A pipe keeps the order of what it carries, as TCP does. A cut holds what is on its way, in one
//! direction or both, and retransmission delivers it when the cut ends; a reset ends a connection at
//! both ends and loses the rest. An end that is dropped ends the pipe behind what was sent before.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use rand::Rng;
use rand::rngs::StdRng;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep_until};

/// Who has connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Host {
    /// A pod, whatever runs in it.
    Pod(usize),
    /// A client.
    Client(usize),
    /// The database server.
    Database,
}

/// All links.
pub(crate) struct Network {
    random: Arc<Mutex<StdRng>>,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Default)]
struct State {
    cut: BTreeSet<(Host, Host)>,
    slow: BTreeMap<(Host, Host), Duration>,
    connections: Vec<Weak<Connection>>,
    /// Longest usual delay of a client's link, in ms.
    client_delay: u64,
}

/// Two hosts that speak with each other.
#[derive(Debug)]
pub(crate) struct Connection {
    ends: (Host, Host),
    broken: AtomicBool,
    breaks: Notify,
}

impl Connection {
    /// Ends it at both ends; what is on its way is lost.
    pub(crate) fn reset(&self) {
        self.broken.store(true, Ordering::Relaxed);
        self.breaks.notify_waiters();
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Relaxed)
    }

    /// Resolves when it is reset.
    pub(crate) async fn broken(&self) {
        loop {
            let breaks = self.breaks.notified();
            if self.is_broken() {
                return;
            }
            breaks.await;
        }
    }
}

impl Network {
    pub(crate) fn new(random: Arc<Mutex<StdRng>>, client_delay: u64) -> Arc<Self> {
        let state = State {
            client_delay,
            ..State::default()
        };
        Arc::new(Self {
            random,
            state: Mutex::new(state),
            changed: Notify::new(),
        })
    }

    /// A connection without pipes yet.
    pub(crate) fn connection(&self, from: Host, to: Host) -> Arc<Connection> {
        let connection = Arc::new(Connection {
            ends: (from, to),
            broken: AtomicBool::new(false),
            breaks: Notify::new(),
        });
        let mut state = self.state();
        state
            .connections
            .retain(|connection| 0 < connection.strong_count());
        state.connections.push(Arc::downgrade(&connection));
        connection
    }

    /// A direction of a connection, which takes `window` items before the sender has to wait.
    pub(crate) fn pipe<T: Send + 'static>(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        (from, to): (Host, Host),
        window: usize,
    ) -> (mpsc::Sender<(Instant, T)>, mpsc::Receiver<T>) {
        let (sender, mut sent) = mpsc::channel::<(Instant, T)>(window);
        let (deliver, receiver) = mpsc::channel(window);
        let (network, connection) = (self.clone(), connection.clone());
        tokio::spawn(async move {
            let carry = async {
                let mut free = Instant::now();
                loop {
                    let item = sent.recv().await;
                    let sent_at = item.as_ref().map_or_else(Instant::now, |(at, _)| *at);
                    free = free.max(sent_at + network.delay(from, to));
                    sleep_until(free).await;
                    network.uncut(from, to).await;
                    let Some((_, item)) = item else { return };
                    if deliver.send(item).await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                biased;
                () = connection.broken() => {}
                () = carry => {}
            }
        });
        (sender, receiver)
    }

    /// How long something takes this way, unless there is a cut.
    pub(crate) fn delay(&self, from: Host, to: Host) -> Duration {
        let state = self.state();
        let longest = match (from, to) {
            (Host::Client(_), _) | (_, Host::Client(_)) => state.client_delay,
            _ => 3,
        };
        let extra = state.slow.get(&(from, to)).copied().unwrap_or_default();
        let mut random = self.random.lock().expect("nobody panics with it");
        let usual = Duration::from_millis(random.random_range(1..=longest));
        usual + extra.mul_f64(random.random_range(0.2..1.0))
    }

    /// Waits until nothing holds up what goes this way.
    pub(crate) async fn uncut(&self, from: Host, to: Host) {
        loop {
            let changed = self.changed.notified();
            if !self.is_cut(from, to) {
                return;
            }
            changed.await;
        }
    }

    pub(crate) fn is_cut(&self, from: Host, to: Host) -> bool {
        self.state().cut.contains(&(from, to))
    }

    /// Holds up whatever goes this way.
    pub(crate) fn cut(&self, from: Host, to: Host) {
        self.state().cut.insert((from, to));
    }

    pub(crate) fn mend(&self, from: Host, to: Host) {
        let mended = self.state().cut.remove(&(from, to));
        if mended {
            self.changed.notify_waiters();
        }
    }

    /// Adds up to `extra` to each delay this way; zero takes it back.
    pub(crate) fn slow_down(&self, from: Host, to: Host, extra: Duration) {
        self.state().slow.insert((from, to), extra);
    }

    /// Resets what `chosen` says of two ends. Answers how many.
    pub(crate) fn reset(&self, chosen: impl Fn(Host, Host) -> bool) -> usize {
        let connections: Vec<Arc<Connection>> = {
            let state = self.state();
            let alive = state.connections.iter().filter_map(Weak::upgrade);
            alive
                .filter(|connection| chosen(connection.ends.0, connection.ends.1))
                .filter(|connection| !connection.is_broken())
                .collect()
        };
        for connection in &connections {
            connection.reset();
        }
        connections.len()
    }

    /// Ends every cut and slowness.
    pub(crate) fn heal(&self) {
        {
            let mut state = self.state();
            state.cut.clear();
            state.slow.clear();
        }
        self.changed.notify_waiters();
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics with it")
    }
}
