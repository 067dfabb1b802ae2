//! The world of one drill: hosts on a network of their own with a Postgres, a Redis, nodes and writers; what the drill
//! does to them; and the verdict after everything has been healed and loaded again.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};
use collab_core::control::ClusterReport;
use collab_core::ids::DocumentId;
use collab_core::ring::slot_of;
use collab_tests::checker::{Ledger, Report, Row, Run};
use collab_tests::clients::typist::Typing;
use collab_tests::clients::{Follower, Reading, now_ms, read, reload};
use collab_tests::network::{Host, Network};
use collab_tests::nodes::{Launch, Nodes};
use collab_tests::postgres::{self, Postgres};
use collab_tests::process::Folder;
use collab_tests::proxy::Proxy;
use collab_tests::redis::{self, Redis};
use collab_tests::shim::Shim;
use collab_tests::witnesses;
use tokio::time::sleep;

/// Traffic must have been steady for this long before the fault.
const STEADY: Duration = Duration::from_secs(2);
/// Acknowledged edits per second that are steady traffic; a little above what the checker asks for.
const STEADY_RATE: f64 = 60.0;
/// How long traffic may take to become steady, and to come back after the last fault (I13 allows less, see [`LIVENESS`]).
const PATIENCE: Duration = Duration::from_mins(1);
/// After the last fault has ended every writer gets receipts again within this time.
const LIVENESS: Duration = Duration::from_secs(15);
/// What was committed just before a fault is receipted this much later, in ms.
const UNDER_WAY_MS: f64 = 200.0;

/// A debug build panics when an update holds this.
pub(crate) const PANIC: &str = "collab-drill-panic";

/// How a world is made.
#[derive(Clone)]
pub(crate) struct Plan {
    pub nodes: usize,
    pub documents: usize,
    /// Edits per second and writer; each document has four.
    pub rate: f64,
    /// See [`Typing::spells`].
    pub spells: f64,
    /// A second Postgres.
    pub standby: Standby,
    /// Size of the disk of Postgres.
    pub disk_bytes: Option<u64>,
    /// Each node reaches Postgres through a proxy of its own.
    pub store_proxies: bool,
    /// Writers reach nodes through proxies, one for each.
    pub edge_proxies: bool,
    /// Arguments of Redis.
    pub redis: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standby {
    None,
    Synchronous,
    Asynchronous,
}

impl Plan {
    /// Three nodes, nine documents with four writers each, about a hundred edits per second.
    pub(crate) const fn new() -> Self {
        Self {
            nodes: 3,
            documents: 9,
            rate: 3.0,
            spells: 0.02,
            standby: Standby::None,
            disk_bytes: None,
            store_proxies: false,
            edge_proxies: false,
            redis: &[],
        }
    }

    /// Two documents that grow by a hundred updates per second each.
    pub(crate) const fn hot() -> Self {
        Self {
            documents: 2,
            rate: 25.0,
            ..Self::new()
        }
    }

    /// Nobody goes offline by itself.
    pub(crate) const fn without_spells(mut self) -> Self {
        self.spells = 0.0;
        self
    }

    pub(crate) const fn with_store_proxies(mut self) -> Self {
        self.store_proxies = true;
        self
    }

    pub(crate) const fn with_edge_proxies(mut self) -> Self {
        self.edge_proxies = true;
        self
    }

    pub(crate) const fn with_standby(mut self, standby: Standby) -> Self {
        self.standby = standby;
        self.store_proxies = true;
        self
    }

    pub(crate) const fn with_redis(mut self, arguments: &'static [&'static str]) -> Self {
        self.redis = arguments;
        self
    }

    pub(crate) const fn with_disk(mut self, bytes: u64) -> Self {
        self.disk_bytes = Some(bytes);
        self
    }
}

/// What clients must have seen; judged at the end, from their histories.
#[derive(Debug, Default)]
pub(crate) struct Expect {
    /// First receipt after the fault, on each document that the hurt node owned, of writers at other nodes.
    pub others: Option<Duration>,
    /// First receipt after the fault of writers at the hurt node, on each document.
    pub own: Option<Duration>,
    /// No writer is without a receipt for longer, from the fault to its end.
    pub silence: Option<Duration>,
    /// As [`Expect::silence`], of writers who are at the owner of their document.
    pub silence_at_owners: Option<Duration>,
    /// No socket is closed but those to the hurt node.
    pub no_closes_elsewhere: bool,
    /// No socket is closed at all.
    pub no_closes: bool,
    /// No slot changes its owner between the fault and its end.
    pub owners_stay: bool,
    /// In these spans (ms since 1970) no edit is acknowledged.
    pub no_receipts: Vec<(f64, f64)>,
}

/// When it began and ended, and whom it hurts.
#[derive(Debug, Clone, Default)]
struct Fault {
    begun: f64,
    ended: Option<f64>,
    /// Node and incarnation.
    victim: Option<(usize, String)>,
    /// Number of the node that owned each document.
    owners: BTreeMap<String, usize>,
}

/// What a drill ends with.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    pub acked: usize,
    pub unacked: usize,
    pub report: Report,
    pub rate: f64,
    pub re_owned: Option<Duration>,
    pub others: Option<Duration>,
    pub own: Option<Duration>,
    pub notes: Vec<String>,
    pub failures: Vec<String>,
}

pub(crate) struct World {
    // Writers end first, then the nodes, then what these rest on.
    typists: Option<Follower<Ledger>>,
    pub nodes: Nodes,
    pub store_proxies: Vec<Proxy>,
    pub edge_proxies: Vec<Proxy>,
    pub cache_proxy: Proxy,
    pub postgres: Postgres,
    pub standby: Option<Postgres>,
    pub redis: Redis,
    /// The disk of Postgres.
    pub disk: Shim,
    /// The disk of Redis.
    pub slow_cache: Shim,
    /// The wall clock of the first node.
    pub clock: Shim,
    pub network: Network,
    pub clients: Host,
    pub store: Host,
    pub standby_host: Host,
    pub cache: Host,
    pub documents: Vec<String>,
    pub expect: Expect,
    /// See [`Log::appended_before_failover`](collab_tests::checker::Log).
    pub appended_before_failover: Vec<Row>,
    folder: Folder,
    fault: Fault,
    notes: Vec<String>,
    failures: Vec<String>,
}

impl World {
    /// Starts everything and waits until the writers are steadily acknowledged.
    pub(crate) async fn start(plan: &Plan, seed: u64) -> Result<Self> {
        let network = Network::new()?;
        let [store, standby_host, cache, clients] =
            ["store", "standby", "cache", "clients"].map(|name| network.host(name));
        let (store, standby_host, cache, clients) = (store?, standby_host?, cache?, clients?);
        let (disk, slow_cache, clock) = (Shim::new()?, Shim::new()?, Shim::new()?);
        let settings = vec!["wal_sender_timeout=3s".to_owned()];
        let postgres = Postgres::start_with(postgres::Setup {
            host: store.clone(),
            settings: settings.clone(),
            environment: disk.environment(),
            disk_bytes: plan.disk_bytes,
        })
        .await;
        let standby = match plan.standby {
            Standby::None => None,
            _ => Some(
                postgres
                    .standby(
                        "standby",
                        postgres::Setup {
                            host: standby_host.clone(),
                            settings,
                            ..postgres::Setup::default()
                        },
                    )
                    .await,
            ),
        };
        if plan.standby == Standby::Synchronous {
            let mut session = postgres.session().await?;
            sqlx::raw_sql("alter system set synchronous_standby_names = 'ANY 1 (standby)'")
                .execute(&mut session)
                .await?;
            sqlx::raw_sql("select pg_reload_conf()")
                .execute(&mut session)
                .await?;
        }
        let redis = Redis::start_with(redis::Setup {
            host: cache.clone(),
            settings: plan.redis.iter().map(|&word| word.to_owned()).collect(),
            environment: slow_cache.environment(),
        })
        .await;
        let cache_proxy = Proxy::start(network.here(), redis.address()).await?;
        let mut world = Self {
            typists: None,
            nodes: Nodes::new(Launch::local("", "")),
            store_proxies: Vec::new(),
            edge_proxies: Vec::new(),
            cache_proxy,
            postgres,
            standby,
            redis,
            disk,
            slow_cache,
            clock,
            network,
            clients,
            store,
            standby_host,
            cache,
            documents: Vec::new(),
            expect: Expect::default(),
            appended_before_failover: Vec::new(),
            folder: Folder::new("drill", "root"),
            fault: Fault::default(),
            notes: Vec::new(),
            failures: Vec::new(),
        };
        for number in 0..plan.nodes {
            world.add_node(plan, number == 0).await?;
        }
        world.nodes.balanced(plan.nodes).await?;
        witnesses::install(&mut world.postgres.session().await?).await?;
        world.documents = world.documents_by_owner(plan.documents).await?;
        world.type_until_steady(plan, seed).await?;
        Ok(world)
    }

    /// Adds a node on a host of its own. Its wall clock may be shifted if it is `timed`.
    pub(crate) async fn add_node(&mut self, plan: &Plan, timed: bool) -> Result<usize> {
        let number = self.nodes.nodes.len();
        let host = self.network.host(&format!("node{number}"))?;
        let database = if plan.store_proxies {
            let proxy = Proxy::start(self.network.here(), self.postgres.address()).await?;
            let url = Postgres::url_at(proxy.address());
            self.store_proxies.push(proxy);
            url
        } else {
            self.postgres.url()
        };
        let number = self.nodes.add_with(Launch {
            host,
            database,
            redis: format!("redis://{}", self.cache_proxy.address()),
            environment: {
                let mut environment = vec![("COLLAB_PANIC_ON".to_owned(), PANIC.to_owned())];
                if timed {
                    environment.extend(self.clock.environment());
                }
                environment
            },
        })?;
        if plan.edge_proxies {
            let target = self.nodes.nodes[number].address();
            self.edge_proxies
                .push(Proxy::start(self.network.here(), target).await?);
        }
        Ok(number)
    }

    /// Names of documents such that the first belongs to the first node, and so on in turn.
    async fn documents_by_owner(&self, count: usize) -> Result<Vec<String>> {
        let report = self.nodes.report().await?;
        let mut documents = Vec::new();
        for name in (0..).map(|number| format!("drill/{number}")) {
            if owner_of(&report, &name) == Some(documents.len() % self.nodes.nodes.len()) {
                documents.push(name);
            }
            if documents.len() == count {
                break;
            }
        }
        Ok(documents)
    }

    async fn type_until_steady(&mut self, plan: &Plan, seed: u64) -> Result<()> {
        let nodes = if plan.edge_proxies {
            let proxies = self.edge_proxies.iter();
            proxies
                .map(|proxy| format!("http://{}", proxy.address()))
                .collect()
        } else {
            self.nodes.urls()
        };
        let typing = Typing {
            writers: 4,
            rate: plan.rate,
            spells: plan.spells,
            host: self.clients.clone(),
            ..Typing::new(nodes, self.documents.clone(), seed)
        };
        let typists = self.typists.insert(typing.start()?);
        let rate = |ledger: &Ledger| {
            let now = now_ms();
            ledger.acked_per_second(now - ms(STEADY), now)
        };
        let steady = typists.until(PATIENCE, |ledger| STEADY_RATE <= rate(ledger));
        steady.await.map_err(|error| {
            let rate = typists.with(rate);
            anyhow!("void: {rate:.0} acknowledged edits per second; {error:#}")
        })
    }

    /// Says that a fault begins now, and which node it hurts.
    pub(crate) async fn fault(&mut self, victim: impl Into<Option<usize>>) -> Result<()> {
        let report = self.nodes.report().await?;
        let victim = victim.into().map(|number| {
            let name = self.nodes.nodes[number].name();
            let member = report
                .members
                .iter()
                .find(|member| member.node.0 == name && member.live);
            let incarnation = member.map(|member| member.incarnation.to_string());
            (number, incarnation.unwrap_or_default())
        });
        let owners = self.documents.iter().filter_map(|name| {
            let owner = owner_of(&report, name)?;
            Some((name.clone(), owner))
        });
        self.fault = Fault {
            owners: owners.collect(),
            victim,
            ended: None,
            begun: now_ms(),
        };
        Ok(())
    }

    /// Says that the fault is over, unless [`World::finish`] is to.
    pub(crate) fn over(&mut self) {
        self.fault.ended = Some(now_ms());
    }

    /// Since when the fault lasts, in ms since 1970.
    pub(crate) fn fault_ms(&self) -> f64 {
        self.fault.begun
    }

    /// Puts a figure into the report.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Fails the drill at its end, with a sentence, unless something holds.
    pub(crate) fn expect(&mut self, holds: bool, sentence: impl FnOnce() -> String) {
        if !holds {
            self.failures.push(sentence());
        }
    }

    /// Looks at what the writers have said so far.
    pub(crate) fn ledger<T>(&self, look: impl FnOnce(&Ledger) -> T) -> T {
        self.typists.as_ref().expect("they type").with(look)
    }

    /// Waits until the slots that the hurt node owned have other owners; answers how long it took since the fault.
    pub(crate) async fn re_owned(&mut self) -> Result<Duration> {
        let Some((_, victim)) = self.fault.victim.clone() else {
            return Err(anyhow!("the fault hurts no node"));
        };
        let mut session = self.postgres.session().await?;
        let begun = std::time::Instant::now();
        loop {
            let left: i64 = sqlx::query_scalar("select count(*) from slot where owner = $1::uuid")
                .bind(&victim)
                .fetch_one(&mut session)
                .await?;
            if left == 0 {
                return Ok(since(self.fault.begun));
            }
            ensure!(
                begun.elapsed() < PATIENCE,
                "{left} slots have no other owner after {PATIENCE:?}"
            );
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Asks the database for a number until it is at least `wanted`; answers the last one.
    pub(crate) async fn count(&self, query: &str, wanted: i64, patience: Duration) -> Result<i64> {
        let mut session = self.postgres.session().await?;
        let begun = std::time::Instant::now();
        loop {
            let count: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(query))
                .fetch_one(&mut session)
                .await?;
            if wanted <= count || patience < begun.elapsed() {
                return Ok(count);
            }
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends everything that was done to the world and has not ended yet.
    async fn heal(&mut self) -> Result<()> {
        self.network.heal_all()?;
        for proxy in self.store_proxies.iter().chain(&self.edge_proxies) {
            proxy.heal();
        }
        self.cache_proxy.heal();
        self.disk.delay_fsync(Duration::ZERO)?;
        self.slow_cache.delay_fsync(Duration::ZERO)?;
        self.clock.shift_clock(0)?;
        if !self.postgres.runs() {
            self.postgres.restart().await?;
        }
        if self.redis.ask(&["ping"]).is_err() {
            self.redis.restart().await?;
        }
        for number in 0..self.nodes.nodes.len() {
            if self.nodes.runs(number) {
                self.nodes.signal(number, "CONT")?;
            } else {
                self.nodes.run(number)?;
            }
        }
        Ok(())
    }

    /// Heals everything, waits for the writers, loads every document again in every way there is, and weighs it all.
    pub(crate) async fn finish(mut self) -> Result<Figures> {
        self.heal().await?;
        let healed = now_ms();
        self.fault.ended.get_or_insert(healed);
        let typists = self.typists.take().context("they type")?;
        let served = |ledger: &Ledger| {
            let next = ledger.next_ack(healed, |_, _| true);
            let writers = ledger.writers.values();
            next.values().all(Option::is_some)
                && writers
                    .filter_map(|writer| writer.acks_ms.last())
                    .all(|last| healed < *last)
        };
        let back = typists.until(PATIENCE, served).await;
        let liveness = since(healed);
        if back.is_err() || LIVENESS < liveness {
            let text = format!("receipts did not come back within {LIVENESS:?}: {liveness:?}");
            self.failures.push(text);
        }
        let ledger = typists.stop().await?;

        let (nodes, documents) = (self.nodes.urls(), self.documents.clone());
        let reading = Reading {
            nodes: &nodes,
            documents: &documents,
            token: None,
        };
        let owners = reload(&reading).await?;
        let mut replicas: Vec<_> = owners.into_iter().map(|owner| owner.replica).collect();
        let mut session = self.postgres.session().await?;
        let mut log = witnesses::log(&mut session).await?;
        // What a drill planted or broke beside the typists is its own affair.
        log.appended.retain(|row| documents.contains(&row.document));
        log.appended_before_failover = std::mem::take(&mut self.appended_before_failover);
        log.rows.retain(|row| documents.contains(&row.document));
        let stored = witnesses::stored(&mut session, &documents).await?;
        for document in &stored {
            replicas.push(witnesses::in_yrs(document)?);
        }
        replicas.extend(witnesses::in_yjs(&stored, self.folder.path()).await?);
        for number in 0..nodes.len() {
            self.nodes.kill(number)?;
        }
        for number in 0..nodes.len() {
            self.nodes.run(number)?;
        }
        let fresh = read(&reading)
            .await
            .context("after a restart of all nodes")?;
        replicas.extend(fresh.into_values().map(|fresh| fresh.replica));

        let run = Run {
            before_ms: (self.fault.begun - ms(STEADY), self.fault.begun),
            ledger,
            log,
            replicas,
        };
        let report = run.judge()?;
        self.weigh(&run);
        let mut figures = self.figures(&run);
        if let Err(wrong) = report.clean() {
            figures.failures.push(format!("{wrong:#}"));
        }
        figures.report = report;
        Ok(figures)
    }

    /// Holds what clients saw against what was expected of it.
    fn weigh(&mut self, run: &Run) {
        let (begun, ended) = self.span();
        let (others, own) = self.next_acks(&run.ledger);
        let expect = std::mem::take(&mut self.expect);
        for (name, seen, bound) in [
            ("writers elsewhere", others, expect.others),
            ("its own writers", own, expect.own),
        ] {
            let in_time = |bound| seen.is_some_and(|seen| seen <= bound);
            self.expect(bound.is_none_or(in_time), || {
                format!("the next receipt of {name} took {seen:?}, {bound:?} were allowed")
            });
        }
        let victim = self.fault.victim.as_ref().map(|(number, _)| *number);
        let victim = victim.map(|number| self.url_of(number));
        let mut closes = (0, 0);
        for ((document, number), writer) in &run.ledger.writers {
            let silence = writer.silence(begun, ended);
            let at_owner = self
                .fault
                .owners
                .get(document)
                .is_some_and(|owner| self.url_of(*owner) == writer.node);
            // Whoever goes offline by itself is silent meanwhile.
            let quiet = writer.spells == 0;
            for bound in [
                expect.silence,
                expect.silence_at_owners.filter(|_| at_owner),
            ] {
                self.expect(!quiet || bound.is_none_or(|bound| silence <= bound), || {
                    format!("writer {number} of {document} had no receipt for {silence:?}")
                });
            }
            let cut = writer
                .closes
                .iter()
                .filter(|(at, _)| begun <= *at && *at <= ended)
                .count();
            if Some(&writer.node) == victim.as_ref() {
                closes.0 += cut;
            } else {
                closes.1 += cut;
            }
        }
        let (at_victim, elsewhere) = closes;
        if expect.no_closes_elsewhere || expect.no_closes {
            self.expect(elsewhere == 0, || {
                format!("{elsewhere} sockets elsewhere were closed")
            });
        }
        if expect.no_closes {
            self.expect(at_victim == 0, || {
                format!("{at_victim} sockets of the hurt node were closed")
            });
        }
        if expect.owners_stay {
            let claims = run.log.claims.iter();
            let moved = claims
                .filter(|claim| begun <= claim.at_ms && claim.at_ms <= ended)
                .count();
            self.expect(moved == 0, || format!("{moved} slots changed their owner"));
        }
        for (from, until) in expect.no_receipts {
            let edits = run.ledger.edits();
            let acked = edits
                .filter(|edit| {
                    edit.acked_ms
                        .is_some_and(|at| from + UNDER_WAY_MS < at && at < until)
                })
                .count();
            self.expect(acked == 0, || {
                format!("{acked} edits were acknowledged when none could be")
            });
        }
        self.note(format!("closed {at_victim} there, {elsewhere} elsewhere"));
    }

    fn figures(&mut self, run: &Run) -> Figures {
        let (begun, ended) = self.span();
        let (others, own) = self.next_acks(&run.ledger);
        let mut notes = std::mem::take(&mut self.notes);
        let before = run.ledger.latencies_in(begun - 10_000.0, begun);
        let during = run.ledger.latencies_in(begun, ended.max(begun + 1.0));
        notes.push(format!(
            "ack p50/p99 {} before, {} during",
            percentiles(&before),
            percentiles(&during)
        ));
        Figures {
            acked: run.ledger.acked(),
            unacked: run.ledger.edits().count() - run.ledger.acked(),
            rate: run
                .ledger
                .acked_per_second(run.before_ms.0, run.before_ms.1),
            re_owned: self.re_owned_in(run),
            others,
            own,
            notes,
            failures: std::mem::take(&mut self.failures),
            report: Report::default(),
        }
    }

    /// From the fault until the last slot of the hurt node had another owner.
    fn re_owned_in(&self, run: &Run) -> Option<Duration> {
        let (_, victim) = self.fault.victim.as_ref()?;
        let mut owned = BTreeMap::new();
        let mut last = None;
        for claim in &run.log.claims {
            let before = owned.insert(claim.slot, &claim.owner);
            if self.fault.begun <= claim.at_ms && before == Some(victim) {
                last = Some(claim.at_ms);
            }
        }
        last.map(|at| Duration::from_secs_f64((at - self.fault.begun) / 1000.0))
    }

    /// The slowest document's next receipt, of writers elsewhere on what the hurt node owned, and of its own writers.
    fn next_acks(&self, ledger: &Ledger) -> (Option<Duration>, Option<Duration>) {
        let Some((victim, _)) = self.fault.victim else {
            return (None, None);
        };
        let url = self.url_of(victim);
        let worst = |next: BTreeMap<&str, Option<Duration>>| {
            next.into_values()
                .map(|next| next.unwrap_or(Duration::MAX))
                .max()
        };
        let others = ledger.next_ack(self.fault.begun, |document, writer| {
            self.fault.owners.get(document) == Some(&victim) && writer.node != url
        });
        let own = ledger.next_ack(self.fault.begun, |_, writer| writer.node == url);
        (worst(others), worst(own))
    }

    fn span(&self) -> (f64, f64) {
        (
            self.fault.begun,
            self.fault.ended.unwrap_or(self.fault.begun),
        )
    }

    /// Where writers meet a node.
    fn url_of(&self, number: usize) -> String {
        match self.edge_proxies.get(number) {
            Some(proxy) => format!("http://{}", proxy.address()),
            None => self.nodes.nodes[number].url(),
        }
    }

    /// The ends of what the nodes have logged.
    pub(crate) fn logs(&self) -> String {
        self.nodes.logs()
    }
}

impl Figures {
    /// A row of the table.
    pub(crate) fn columns(&self) -> String {
        let time = |time: Option<Duration>| match time {
            Some(Duration::MAX) => "never".to_owned(),
            Some(time) => format!("{}", time.as_millis()),
            None => "-".to_owned(),
        };
        let Report {
            lost,
            doubled,
            revived,
            differences,
            faults,
            ..
        } = &self.report;
        let mut columns = String::new();
        let _ = write!(
            columns,
            "{:>4.0} {:>6} {:>7} {:>4} {:>4} {:>4} {:>4} {:>6} {:>7} {:>7} {:>7}",
            self.rate,
            self.acked,
            self.unacked,
            lost.len(),
            doubled.len(),
            revived.len(),
            differences.len(),
            faults.len(),
            time(self.re_owned),
            time(self.others),
            time(self.own),
        );
        columns
    }

    /// What [`Figures::columns`] holds.
    pub(crate) const HEADER: &str =
        "/s    acked unacked lost dbl. rev. diff faults re-own  others     own";
}

/// The number of the node that owns a document.
fn owner_of(report: &ClusterReport, document: &str) -> Option<usize> {
    let id = DocumentId::new(document).ok()?;
    let slot = slot_of(&id, report.slots);
    let owner = (*report.owners.get(usize::from(slot.0))?)?;
    let name = &report.members.get(usize::from(owner))?.node.0;
    name.strip_prefix('n')?.parse().ok()
}

fn percentiles(sorted: &[Duration]) -> String {
    let at = |percent: usize| {
        let index = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
        sorted
            .get(index)
            .map_or_else(|| "-".to_owned(), |time| time.as_millis().to_string())
    };
    format!("{}/{} ms", at(50), at(99))
}

pub(crate) fn since(ms: f64) -> Duration {
    Duration::from_secs_f64(((now_ms() - ms) / 1000.0).max(0.0))
}

pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
