//! The world of a seed: pods, a database, clients, a network between them, and what goes wrong.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use collab_core::document::Document;
use collab_core::ids::{DocumentId, NodeId, Slot};
use collab_core::limits::{
    ADOPT_AFTER_FAILOVER, LEASE, SNAPSHOT_AFTER_UPDATES, SNAPSHOT_OVERDUE_UPDATES,
};
use collab_core::ring::slot_of;
use collab_core::scan::Gap;
use collab_node::documents::{Answer, Question};
use collab_node::edge::{Admitted, Visitor};
use collab_node::store::memory::{Database, LAG_MAX};
use collab_node::store::{Content, Loaded, Store};
use futures::StreamExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;
use yrs::updates::decoder::Decode;
use yrs::{ClientID, Doc, ReadTxn, Transact, Update};

use crate::client::{self, Arrival, Command, Handle, Socket};
use crate::database::Server;
use crate::network::{Connection, Host, Network};
use crate::pod::{Listener, Process};
use crate::settings::{Fault, Settings};
use crate::witness::{Harm, Witness, text};

/// The shortest time in which things go wrong.
const TROUBLE_MIN: Duration = Duration::from_mins(1);
/// It ends without having played enough.
const TROUBLE_MAX: Duration = Duration::from_secs(400);
/// After the last fault, edits made before it ended are acknowledged in this time.
const RECOVERY: Duration = Duration::from_secs(15);
/// The longest that everybody may take to agree once nobody types.
const AGREEMENT: Duration = Duration::from_secs(20);
/// A slot may be without a living owner for this long while a node that could take it lives well, and may: for a while
/// after each failover of the database nobody may.
const ORPHANED_MAX: Duration = Duration::from_secs(5);
/// A node lives well after this time without anything wrong with it.
const WELL_AFTER: Duration = Duration::from_secs(8);

/// Tasks of a node that serves nobody.
const TASKS_OF_NODE: usize = 20;
/// Most tasks for a client, a document or another node.
const TASKS_EACH: usize = 4;
/// Most rows that a log has left after the snapshots that are due.
const LOG_ROWS_MAX: usize = (2 * SNAPSHOT_AFTER_UPDATES + SNAPSHOT_OVERDUE_UPDATES) as usize;

/// Everything.
pub(crate) struct World {
    pub(crate) settings: Settings,
    pub(crate) network: Arc<Network>,
    pub(crate) server: Arc<Server>,
    pub(crate) witness: Arc<Witness>,
    random: Arc<Mutex<StdRng>>,
    pods: Mutex<Vec<Pod>>,
    clients: Mutex<BTreeMap<usize, Handle>>,
    next_client: Mutex<usize>,
    tasks_max: Mutex<usize>,
    /// Nothing more goes wrong: whoever is away comes back at once.
    healed: watch::Sender<bool>,
}

/// What may hold a process.
struct Pod {
    process: Option<Arc<Process>>,
    /// The machine has power.
    powered: bool,
    starts: u32,
    /// Replaced pods have another uid.
    uid: String,
    /// When something was wrong with it last.
    ailed: Instant,
}

/// What a seed did.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Outcome {
    pub(crate) acked: usize,
    pub(crate) commits: usize,
    pub(crate) fenced: usize,
    pub(crate) early: usize,
    /// Acknowledged changes that went with a database server.
    pub(crate) gone: usize,
    /// Clients that had to begin anew: they had seen a part of edits that went with their author.
    pub(crate) anew: usize,
    pub(crate) faults: BTreeMap<Fault, usize>,
    pub(crate) simulated: Duration,
    pub(crate) tasks_max: usize,
    pub(crate) hash: u64,
}

/// A seed that found something.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) violations: Vec<String>,
    pub(crate) trace: String,
    pub(crate) harm: Harm,
}

impl World {
    /// Plays a seed from its first to its last event.
    pub(crate) fn play(settings: Settings) -> Result<Outcome, Failure> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime needs little");
        runtime.block_on(async {
            let world = Self::new(settings);
            let outcome = world.run().await;
            let violations = world.witness.violations();
            if violations.is_empty() {
                Ok(outcome)
            } else {
                Err(Failure {
                    violations,
                    trace: world.witness.last_lines(),
                    harm: world.witness.harm(),
                })
            }
        })
    }

    fn new(settings: Settings) -> Arc<Self> {
        let random = Arc::new(Mutex::new(StdRng::seed_from_u64(settings.seed ^ 0x5EED)));
        let witness = Arc::new(Witness::new());
        let network = Network::new(random.clone(), settings.client_delay);
        let server = Server::new(
            Database::default(),
            network.clone(),
            witness.clone(),
            random.clone(),
            settings.commit,
        );
        let pods = (0..settings.nodes)
            .map(|pod| Pod {
                process: None,
                powered: true,
                starts: 0,
                uid: format!("pod-{pod}"),
                ailed: Instant::now(),
            })
            .collect();
        Arc::new(Self {
            settings,
            network,
            server,
            witness,
            random,
            pods: Mutex::new(pods),
            clients: Mutex::default(),
            next_client: Mutex::default(),
            tasks_max: Mutex::default(),
            healed: watch::Sender::new(false),
        })
    }

    async fn run(self: &Arc<Self>) -> Outcome {
        let started = Instant::now();
        self.witness.trace(|| format!("{:?}", self.settings));
        for pod in 0..self.settings.nodes {
            self.start(pod);
        }
        for document in 0..self.settings.documents {
            for _ in 0..self.settings.clients {
                let browser = self.roll(0, 99) as usize;
                self.newcomer(document, browser, false);
            }
        }
        for _ in 0..self.settings.readers {
            let document = self.roll(0, self.settings.documents as u64 - 1);
            let browser = self.roll(0, 99) as usize;
            self.newcomer(document as usize, browser, true);
        }
        let watching = self.clone();
        let watch = tokio::spawn(async move { watching.watch().await });
        let mut faults = BTreeMap::new();
        while !self.is_enough(started, &faults) && self.witness.violations().is_empty() {
            let pause = self.settings.fault_every;
            sleep(Duration::from_millis(self.roll(pause / 2, pause * 3 / 2))).await;
            let fault = {
                let mut random = self.random();
                *self
                    .settings
                    .faults
                    .choose(&mut *random)
                    .expect("there are some")
            };
            if self.strike(fault) {
                *faults.entry(fault).or_default() += 1;
            }
        }
        let anew = self.recover().await;
        watch.abort();
        let tasks_max = *self.tasks_max.lock().expect("nobody panics with it");
        let gone = self.check().await;
        Outcome {
            anew,
            gone,
            acked: self.witness.with_ledger(|ledger| ledger.acknowledged()),
            commits: self.witness.commits(),
            fenced: self.witness.fenced(),
            early: self.witness.ended_early(),
            faults,
            simulated: started.elapsed(),
            tasks_max,
            hash: self.witness.hash(),
        }
    }

    fn is_enough(&self, started: Instant, faults: &BTreeMap<Fault, usize>) -> bool {
        let acked = self.witness.with_ledger(|ledger| ledger.acknowledged());
        let enough = TROUBLE_MIN <= started.elapsed()
            && 20 <= faults.values().sum::<usize>()
            && 2_000 <= acked;
        enough || TROUBLE_MAX <= started.elapsed()
    }

    // -- pods --

    fn start(self: &Arc<Self>, pod: usize) {
        let uid = {
            let mut pods = self.pods();
            let pod = &mut pods[pod];
            if pod.process.is_some() || !pod.powered {
                return;
            }
            pod.starts += 1;
            pod.ailed = pod.ailed.max(Instant::now());
            pod.uid.clone()
        };
        let (process, mut running) = Process::start(self, pod, uid);
        self.witness
            .trace(|| format!("pod {pod} starts {}", process.node.members.incarnation()));
        self.pods()[pod].process = Some(process.clone());
        let world = self.clone();
        tokio::spawn(async move {
            let ended = running.next().await;
            if process.breath.has_ended() {
                return;
            }
            let reason = match ended {
                Some(Ok(Err(error))) => error.to_string(),
                Some(Err(error)) => {
                    world
                        .witness
                        .violated(format!("a task of pod {pod} panicked: {error}"));
                    return;
                }
                Some(Ok(Ok(()))) | None => "a task ended unasked".to_owned(),
            };
            world
                .witness
                .trace(|| format!("the process of pod {pod} ends: {reason}"));
            world.end(pod, &process);
            sleep(Duration::from_millis(500)).await;
            world.start(pod);
        });
    }

    /// The process is no more: its connections end, and what waited for a turn never gets one.
    fn end(&self, pod: usize, process: &Arc<Process>) {
        process.breath.end();
        let mut pods = self.pods();
        let pod = &mut pods[pod];
        pod.ailed = pod.ailed.max(Instant::now());
        if pod
            .process
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, process))
        {
            pod.process = None;
        }
    }

    fn process(&self, pod: usize) -> Option<Arc<Process>> {
        self.pods()[pod].process.clone()
    }

    fn ails(&self, pod: usize, until: Duration) {
        let mut pods = self.pods();
        pods[pod].ailed = pods[pod].ailed.max(Instant::now() + until);
    }

    pub(crate) fn listener(&self, pod: usize) -> Listener {
        let pods = self.pods();
        match pods.get(pod) {
            Some(pod) if !pod.powered => Listener::NoHost,
            Some(pod) => pod
                .process
                .clone()
                .map_or(Listener::Nobody, Listener::Process),
            None => Listener::Nobody,
        }
    }

    /// Where the balancer sends a client: mostly to a pod that has a process.
    pub(crate) fn pod_for_client(&self, random: &mut StdRng) -> usize {
        let pods = self.pods();
        let ready: Vec<usize> = (0..pods.len())
            .filter(|pod| pods[*pod].process.is_some())
            .collect();
        match ready.choose(random) {
            Some(pod) if random.random_bool(0.9) => *pod,
            _ => random.random_range(0..pods.len()),
        }
    }

    /// A client's first packet is on its way to a pod.
    pub(crate) fn arrive(
        self: &Arc<Self>,
        pod: usize,
        client: Host,
        link: &Arc<Connection>,
        socket: Socket,
    ) {
        let (world, link) = (self.clone(), link.clone());
        tokio::spawn(async move {
            sleep(world.network.delay(client, Host::Pod(pod))).await;
            world.network.uncut(client, Host::Pod(pod)).await;
            match world.listener(pod) {
                Listener::Process(process) => {
                    let edge = process.node.edge.clone();
                    process.tasks.spawn(async move {
                        let mut socket = socket;
                        let opened = (Instant::now(), Arrival::Opened);
                        if let Some(sender) = socket.to.get_ref() {
                            let _ = sender.send(opened).await;
                        }
                        let document = socket.document.clone();
                        let visitor = Visitor {
                            author: Box::default(),
                            access: socket.access,
                        };
                        let family = socket.family.clone();
                        let admitted = Admitted {
                            visitor,
                            until: None,
                        };
                        edge.serve(&mut socket, None, document, admitted, family)
                            .await;
                    });
                }
                Listener::Nobody => link.reset(),
                Listener::NoHost => std::future::pending().await,
            }
        });
    }

    // -- clients --

    fn newcomer(self: &Arc<Self>, document: usize, browser: usize, reader: bool) {
        let number = {
            let mut next = self.next_client.lock().expect("nobody panics with it");
            *next += 1;
            *next - 1
        };
        let document = name_of(document);
        let seed = self.roll_u64();
        let handle = client::start(self, number, browser, document, reader, seed);
        self.clients().insert(number, handle);
    }

    /// The other tabs of a browser that show the same document.
    pub(crate) fn other_tabs(
        &self,
        browser: usize,
        document: &DocumentId,
        number: usize,
    ) -> Vec<Handle> {
        let clients = self.clients();
        let same = clients.values().filter(|other| {
            other.number != number
                && !other.reader
                && other.browser == browser
                && other.document == *document
        });
        same.cloned().collect()
    }

    // -- what goes wrong --

    /// Lets something go wrong, and sees to it that it ends. Answers whether it did.
    #[expect(clippy::too_many_lines, reason = "a line or two for each fault")]
    fn strike(self: &Arc<Self>, fault: Fault) -> bool {
        let length = self.settings.fault_length;
        let length = Duration::from_millis(self.roll(length / 4, length * 2));
        let pod = self.roll(0, self.settings.nodes as u64 - 1) as usize;
        let other = (pod
            + 1
            + self.roll(0, self.settings.nodes as u64) as usize
                % self.settings.nodes.max(2).saturating_sub(1))
            % self.settings.nodes;
        let client = {
            let clients = self.clients();
            let numbers: Vec<usize> = clients.keys().copied().collect();
            *numbers.choose(&mut *self.random()).expect("there are some")
        };
        self.witness.trace(|| {
            format!("FAULT {fault:?} pod {pod} other {other} client {client} {length:?}")
        });
        let (a, b, c) = (Host::Pod(pod), Host::Pod(other), Host::Client(client));
        match fault {
            Fault::Kill => {
                let Some(process) = self.process(pod) else {
                    return false;
                };
                self.end(pod, &process);
                // A process starts anew in its pod, or a new pod replaces it.
                if self.roll(0, 2) == 0 {
                    let mut pods = self.pods();
                    pods[pod].uid = format!("pod-{pod}.{}", pods[pod].starts);
                }
                self.later(length, move |world| world.start(pod));
            }
            Fault::PowerOff => {
                let Some(process) = self.process(pod) else {
                    return false;
                };
                self.isolate(pod);
                self.end(pod, &process);
                self.pods()[pod].powered = false;
                self.later(length, move |world| world.power_on(pod));
            }
            Fault::Freeze => {
                let Some(process) = self.process(pod) else {
                    return false;
                };
                process.breath.hold();
                self.ails(pod, length);
                self.later(length, move |world| {
                    world.ails(pod, Duration::ZERO);
                    process.breath.go_on();
                });
            }
            Fault::Stop => return self.stop(pod, length),
            Fault::Drain => {
                self.ails(pod, length);
                self.operate(pod, true);
                self.later(length, move |world| world.operate(pod, false));
            }
            Fault::Plan => self.plan(),
            Fault::CutStore | Fault::CutStoreReplies => {
                self.ails(pod, length);
                self.network.cut(Host::Database, a);
                if fault == Fault::CutStore {
                    self.network.cut(a, Host::Database);
                }
                self.later(length, move |world| {
                    world.ails(pod, Duration::ZERO);
                    world.network.mend(Host::Database, a);
                    world.network.mend(a, Host::Database);
                });
            }
            Fault::Outage => {
                self.server.go_down();
                for pod in 0..self.settings.nodes {
                    self.ails(pod, length);
                }
                self.later(length, |world| world.server.come_up());
            }
            Fault::SlowCommits => {
                for pod in 0..self.settings.nodes {
                    self.ails(pod, length);
                }
                let extra = Duration::from_millis(self.roll(50, 4_000));
                self.server.slow_commits(extra);
                self.later(length, |world| {
                    world.server.slow_commits(Duration::ZERO);
                });
            }
            Fault::FailOver => {
                self.server.fail_over(0);
                self.witness.failed_over(&self.server.database);
            }
            Fault::LossyFailOver => {
                // A standby that has not heard of the cluster at all is another story.
                if self.witness.commits() < 2 * LAG_MAX {
                    return false;
                }
                for pod in 0..self.settings.nodes {
                    self.ails(pod, ADOPT_AFTER_FAILOVER);
                }
                let lost = self.roll(1, LAG_MAX as u64) as usize;
                self.server.fail_over(lost);
                self.witness.failed_over(&self.server.database);
            }
            Fault::Pin => self.pin(),
            Fault::CutPeers | Fault::CutPeersOneWay => {
                self.network.cut(a, b);
                if fault == Fault::CutPeers {
                    self.network.cut(b, a);
                }
                self.later(length, move |world| {
                    world.network.mend(a, b);
                    world.network.mend(b, a);
                });
            }
            Fault::SlowPeers => {
                let extra = Duration::from_millis(self.roll(20, 2_000));
                self.network.slow_down(a, b, extra);
                self.later(length, move |world| {
                    world.network.slow_down(a, b, Duration::ZERO);
                });
            }
            Fault::ResetPeers => {
                let between = |x, y| (x, y) == (a, b) || (x, y) == (b, a);
                return 0 < self.network.reset(between);
            }
            Fault::CutClient | Fault::CutClientOneWay => {
                let one_way = fault == Fault::CutClientOneWay;
                let hears = self.roll(0, 1) == 0;
                for pod in 0..self.settings.nodes {
                    let pod = Host::Pod(pod);
                    if !one_way || hears {
                        self.network.cut(c, pod);
                    }
                    if !one_way || !hears {
                        self.network.cut(pod, c);
                    }
                }
                self.later(length, move |world| world.mend_client(c));
            }
            Fault::ResetClient => return 0 < self.network.reset(|from, _| from == c),
            Fault::Offline => self.tell(client, Command::Offline(length)),
            Fault::Depart => return self.replace(client),
        }
        true
    }

    /// A client goes for good, with what it has not sent yet, and another one comes.
    fn replace(self: &Arc<Self>, client: usize) -> bool {
        let Some(handle) = self.clients().remove(&client) else {
            return false;
        };
        let _ = handle.commands.send(Command::Depart);
        self.network.reset(|from, _| from == Host::Client(client));
        let name = handle.document.as_str();
        let document = name.trim_start_matches("document-").parse();
        // Somebody new, or another tab of somebody who is there.
        let browser = self.roll(0, 20) as usize;
        self.newcomer(document.expect("a number"), browser, handle.reader);
        true
    }

    fn later(self: &Arc<Self>, pause: Duration, act: impl FnOnce(&Arc<Self>) + Send + 'static) {
        let world = self.clone();
        tokio::spawn(async move {
            sleep(pause).await;
            act(&world);
        });
    }

    fn stop(self: &Arc<Self>, pod: usize, pause: Duration) -> bool {
        let Some(process) = self.process(pod) else {
            return false;
        };
        self.ails(pod, Duration::from_mins(2));
        let world = self.clone();
        let mut healed = self.healed.subscribe();
        let handoff = process.node.handoff.clone();
        let left = process.tasks.spawn(async move { handoff.leave().await });
        tokio::spawn(async move {
            if left.await.is_ok() {
                world.witness.trace(|| format!("pod {pod} has left"));
                world.end(pod, &process);
                let _ = timeout(pause, healed.wait_for(|healed| *healed)).await;
                world.start(pod);
            }
        });
        true
    }

    /// Cuts a host off without a word to anybody.
    fn isolate(&self, pod: usize) {
        let host = Host::Pod(pod);
        for other in self.hosts() {
            self.network.cut(host, other);
            self.network.cut(other, host);
        }
    }

    fn power_on(self: &Arc<Self>, pod: usize) {
        {
            let mut pods = self.pods();
            if pods[pod].powered {
                return;
            }
            pods[pod].powered = true;
        }
        let host = Host::Pod(pod);
        for other in self.hosts() {
            self.network.mend(host, other);
            self.network.mend(other, host);
        }
        // It knows nothing of the connections it had.
        self.network.reset(|from, to| from == host || to == host);
        self.start(pod);
    }

    fn hosts(&self) -> Vec<Host> {
        let pods = (0..self.settings.nodes).map(Host::Pod);
        let clients: Vec<Host> = self.clients().keys().copied().map(Host::Client).collect();
        pods.chain(clients).chain([Host::Database]).collect()
    }

    fn mend_client(&self, client: Host) {
        for pod in (0..self.settings.nodes).map(Host::Pod) {
            self.network.mend(client, pod);
            self.network.mend(pod, client);
        }
    }

    /// The operator asks a node to drain, or takes that back.
    fn operate(self: &Arc<Self>, pod: usize, drain: bool) {
        let world = self.clone();
        tokio::spawn(async move {
            let store = world.server.database.sessions();
            let node = NodeId(format!("node-{pod}"));
            while world.server.is_down() {
                sleep(Duration::from_millis(500)).await;
            }
            if let Ok(term) = store.take_term("operator").await {
                let _ = store.set_drain(term, &node, drain).await;
            }
        });
    }

    /// The operator plans anew, as it pleases.
    fn plan(self: &Arc<Self>) {
        let nodes: Vec<NodeId> = (0..self.settings.slots)
            .map(|_| {
                let pod = self.roll(0, self.settings.nodes as u64 - 1);
                NodeId(format!("node-{pod}"))
            })
            .collect();
        let world = self.clone();
        tokio::spawn(async move {
            let store = world.server.database.sessions();
            if !world.server.is_down()
                && let Ok(term) = store.take_term("operator").await
            {
                let _ = store.set_placement(term, &nodes).await;
            }
        });
    }

    /// The operator finds a document hot, or no longer.
    fn pin(self: &Arc<Self>) {
        let number = self.roll(0, self.settings.documents as u64 - 1);
        let document = name_of(number as usize);
        let home = slot_of(&document, self.settings.slots);
        let world = self.clone();
        tokio::spawn(async move {
            let store = world.server.database.sessions();
            if world.server.is_down() {
                return;
            }
            let Ok(term) = store.take_term("operator").await else {
                return;
            };
            let _ = if world.server.database.slot_of(&document) == home {
                store.pin(term, &document, home).await
            } else {
                store.unpin(term, &document, home).await
            };
            world.witness.after_statement(&world.server.database);
        });
    }

    fn tell(&self, client: usize, command: Command) {
        if let Some(handle) = self.clients().get(&client) {
            let _ = handle.commands.send(command);
        }
    }

    // -- what must hold --

    /// Looks again and again at what only time can show.
    async fn watch(self: Arc<Self>) {
        let mut orphaned = BTreeMap::<Slot, Instant>::new();
        loop {
            sleep(Duration::from_millis(100)).await;
            let now = Instant::now();
            let well = {
                let pods = self.pods();
                pods.iter().any(|pod| {
                    pod.ailed + WELL_AFTER <= now
                        && pod.process.as_ref().is_some_and(|process| {
                            process.breath.runs() && !process.node.members.is_draining()
                        })
                })
            };
            let living: Vec<_> = self
                .server
                .database
                .members()
                .into_iter()
                .filter(|member| !member.lease_left.is_zero())
                .map(|member| member.incarnation)
                .collect();
            let processes: Vec<Arc<Process>> = self
                .pods()
                .iter()
                .filter_map(|pod| pod.process.clone())
                .collect();
            for process in processes {
                let members = &process.node.members;
                if process.breath.runs()
                    && members.lease_held()
                    && !living.contains(&members.incarnation())
                {
                    self.believes_too_long(members.incarnation());
                }
                let tasks = process.breath.tasks();
                if self.tasks_bound() < tasks {
                    let bound = self.tasks_bound();
                    self.witness
                        .violated(format!("{tasks} tasks in a node, which is to have {bound}"));
                }
                let mut most = self.tasks_max.lock().expect("nobody panics with it");
                *most = tasks.max(*most);
            }
            for row in self.server.database.slots() {
                if !self.server.database.is_used(row.slot) {
                    orphaned.remove(&row.slot);
                    continue;
                }
                let owned = row.owner.is_some_and(|owner| living.contains(&owner));
                if owned || !well {
                    orphaned.remove(&row.slot);
                    continue;
                }
                let since = *orphaned.entry(row.slot).or_insert(now);
                let adoptable = self.server.adoptable_since();
                let since = adoptable.map_or(since, |adoptable| since.max(adoptable));
                if ORPHANED_MAX < now.saturating_duration_since(since) {
                    self.witness.violated(format!(
                        "slot {} has had no owner for {:?} and a node lives well",
                        row.slot,
                        now - since
                    ));
                    orphaned.remove(&row.slot);
                }
            }
        }
    }

    /// Most tasks that a node has for what it serves here.
    fn tasks_bound(&self) -> usize {
        let clients = self.clients().len();
        TASKS_OF_NODE + TASKS_EACH * (clients + self.settings.documents + self.settings.nodes)
    }

    /// A node holds its lease to be live, and the database does not, though nobody ended it early.
    fn believes_too_long(&self, incarnation: Uuid) {
        let members = self.server.database.members();
        let known = members
            .iter()
            .find(|member| member.incarnation == incarnation);
        // Until then the new server may not have heard of renewals that the old one answered.
        if self.server.failed_over_within(ADOPT_AFTER_FAILOVER) {
            return;
        }
        if known.is_some_and(|member| LEASE <= member.load_age) {
            self.witness.violated(format!(
                "{incarnation} believes in a lease that has ended in the database"
            ));
        }
    }

    /// Ends all that goes wrong, and sees that receipts come again. Answers how many clients had to begin anew.
    async fn recover(self: &Arc<Self>) -> usize {
        self.witness.trace(|| "everything heals".to_owned());
        self.healed.send_replace(true);
        self.network.heal();
        self.server.come_up();
        self.server.slow_commits(Duration::ZERO);
        for pod in 0..self.settings.nodes {
            self.power_on(pod);
            self.operate(pod, false);
            if let Some(process) = self.process(pod) {
                process.breath.go_on();
            }
            self.start(pod);
        }
        let numbers: Vec<usize> = self.clients().keys().copied().collect();
        for client in numbers {
            self.tell(client, Command::Online);
        }
        let healed = Instant::now();
        sleep(RECOVERY).await;
        let handles: Vec<Handle> = self.clients().values().cloned().collect();
        let mut anew = 0;
        for handle in &handles {
            let overdue = {
                let pending = handle.pending.lock().expect("nobody panics with it");
                let mut changes = pending.iter();
                changes
                    .find(|(_, made)| **made <= healed)
                    .map(|(change, _)| *change)
            };
            let Some(change) = overdue else { continue };
            if self.waits_for_what_nobody_has(handle).await {
                anew += 1;
                self.replace(handle.number);
                continue;
            }
            self.witness.violated(format!(
                "client {} still waits for the receipt of {change:?}, {RECOVERY:?} after the last fault",
                handle.number
            ));
        }
        let handles: Vec<Handle> = self.clients().values().cloned().collect();
        for handle in &handles {
            let _ = handle.commands.send(Command::Rest);
        }
        let agreed = async {
            loop {
                sleep(Duration::from_millis(250)).await;
                let waits = handles.iter().any(|handle| {
                    let pending = handle.pending.lock().expect("nobody panics with it");
                    !pending.is_empty()
                });
                let writers = || handles.iter().filter(|handle| !handle.reader);
                let texts: BTreeMap<&DocumentId, String> = writers()
                    .map(|handle| (&handle.document, text(&handle.replica)))
                    .collect();
                let mut differ =
                    writers().any(|handle| texts[&handle.document] != text(&handle.replica));
                // Clients that begin anew are alike before they have anything.
                for (document, content) in texts {
                    let owner = self.owner(document).await;
                    differ |= owner.map_or(true, |owner| text(&owner) != content);
                }
                if !waits && !differ {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(AGREEMENT, agreed).await;
        anew
    }

    /// Another tab showed it edits whose beginning went with their author: nobody can give it a receipt, and its way
    /// out is a fresh document.
    async fn waits_for_what_nobody_has(&self, handle: &Handle) -> bool {
        let Ok(owner) = self.owner(&handle.document).await else {
            return false;
        };
        let known = owner.transact().state_vector();
        let gaps = handle.replica.gaps();
        gaps.into_iter().any(|Gap { client, clock }| {
            let client = ClientID::new(client);
            let is_here = |number: &usize| client::id_of(*number) == client;
            known.get(&client) <= clock && !self.clients().keys().any(is_here)
        })
    }

    /// Compares every client, the owner and a cold reload with each other and with what was promised. Answers how many
    /// acknowledged changes went with a database server.
    async fn check(self: &Arc<Self>) -> usize {
        let mut gone = 0;
        let handles: Vec<Handle> = self.clients().values().cloned().collect();
        for handle in &handles {
            let pending = handle.pending.lock().expect("nobody panics with it").len();
            if 0 < pending {
                self.witness.violated(format!(
                    "client {} has {pending} changes without a receipt at the end",
                    handle.number
                ));
            }
        }
        for number in 0..self.settings.documents {
            let document = name_of(number);
            let rows = self.server.database.log(&document).len();
            if LOG_ROWS_MAX < rows {
                self.witness
                    .violated(format!("{document} still has {rows} rows in its log"));
            }
            let mut witnesses: Vec<(String, Doc)> = handles
                .iter()
                .filter(|handle| handle.document == document)
                .filter(|handle| !handle.reader)
                .map(|handle| (format!("client {}", handle.number), handle.replica.doc()))
                .collect();
            match self.reload(&document).await {
                Ok(cold) => witnesses.push(("a cold reload".to_owned(), cold)),
                Err(reason) => self.witness.violated(format!("{document}: {reason}")),
            }
            match self.owner(&document).await {
                Ok(owner) => witnesses.push(("the owner".to_owned(), owner)),
                Err(reason) => self.witness.violated(format!("{document}: {reason}")),
            }
            let Some((first, reference)) = witnesses.first().cloned() else {
                continue;
            };
            for (name, replica) in &witnesses {
                let content = text(replica);
                let verdict = self
                    .witness
                    .with_ledger(|ledger| ledger.judge(&document, &content));
                self.witness.judged_text(&verdict);
                if name == "a cold reload" {
                    gone += verdict.gone;
                }
                if !verdict.is_clean() {
                    self.witness
                        .violated(format!("{document} at {name}: {verdict:?}"));
                }
                let same = replica.transact().snapshot() == reference.transact().snapshot();
                if content != text(&reference) || !same {
                    self.witness
                        .violated(format!("{document}: {name} and {first} differ"));
                }
            }
        }
        gone
    }

    /// The document as a process that knows nothing would open it.
    async fn reload(&self, document: &DocumentId) -> Result<Doc, String> {
        let loaded = self.server.database.sessions().load(document).await;
        let Loaded::Live(Content {
            snapshot,
            log,
            last,
            ..
        }) = loaded.map_err(|error| error.to_string())?
        else {
            return Err("it was never created".to_owned());
        };
        let snapshot = snapshot.as_ref().map(|stored| (stored.seq, &stored.bytes));
        let slot = self.server.database.slot_of(document);
        let epoch = self.server.database.slots()[usize::from(slot.0)].epoch;
        let opened =
            Document::open(epoch, snapshot, &log, last).map_err(|error| error.to_string())?;
        Ok(replica_of(&opened.encode_state()))
    }

    /// The document as its owner has it in memory.
    async fn owner(&self, document: &DocumentId) -> Result<Doc, String> {
        let slot = self.server.database.slot_of(document);
        let owner = self.server.database.slots()[usize::from(slot.0)].owner;
        let processes: Vec<Arc<Process>> = self
            .pods()
            .iter()
            .filter_map(|pod| pod.process.clone())
            .collect();
        let process = processes
            .into_iter()
            .find(|process| Some(process.node.members.incarnation()) == owner)
            .ok_or("nobody owns it")?;
        let (documents, name) = (process.node.documents.clone(), document.clone());
        let asked = process
            .tasks
            .spawn(async move { documents.ask(&name, Question::State).await });
        match asked.await {
            Ok(Ok(Answer::State(state))) => Ok(replica_of(&state)),
            Ok(other) => Err(format!("its owner answers {other:?}")),
            Err(error) => Err(error.to_string()),
        }
    }

    // -- chance --

    pub(crate) fn roll_u64(&self) -> u64 {
        self.random().random()
    }

    fn roll(&self, from: u64, upto: u64) -> u64 {
        self.random().random_range(from..=upto)
    }

    fn random(&self) -> std::sync::MutexGuard<'_, StdRng> {
        self.random.lock().expect("nobody panics with it")
    }

    fn pods(&self) -> std::sync::MutexGuard<'_, Vec<Pod>> {
        self.pods.lock().expect("nobody panics with it")
    }

    fn clients(&self) -> std::sync::MutexGuard<'_, BTreeMap<usize, Handle>> {
        self.clients.lock().expect("nobody panics with it")
    }
}

fn name_of(document: usize) -> DocumentId {
    DocumentId::new(&format!("document-{document}")).expect("a good name")
}

fn replica_of(state: &[u8]) -> Doc {
    let doc = collab_core::replica::new_doc();
    let update = Update::decode_v1(state).expect("an owner's state");
    let applied = doc.transact_mut().apply_update(update);
    applied.expect("an owner's state can be applied");
    doc
}
