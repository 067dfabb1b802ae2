//! Watches, the reconcile, and when to come back. Never a decision.
//!
//! Each watch is a task with a backoff of its own that names clusters to look at; kube's controller
//! would put all watches under one, and a failing one would starve the rest. The applier runs one
//! pass per cluster at a time. A pass is bounded, so that a call that hangs cannot stop its cluster.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use collab_crds::names::{INSTANCE_LABEL, MANAGED_SELECTOR};
use collab_crds::{CollabCluster, CollabClusterStatus};
use futures::StreamExt as _;
use futures::channel::mpsc::UnboundedSender;
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use kube::core::PartialObjectMeta;
use kube::runtime::controller::{Action, Error as PassError};
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::{self, ObjectRef};
use kube::runtime::{WatchStreamExt as _, applier, watcher};
use kube::{Api, Client, Resource, ResourceExt as _};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::admin::{Heartbeat, Metrics};
use crate::apply::{ApplyError, apply};
use crate::config::{Config, Images};
use crate::control::{Control, Node};
use crate::model::{Memory, Plan};
use crate::observe::{ObserveError, observe};
use crate::plan::grey::grey;
use crate::plan::plan;
use crate::status;

/// A watch is opened anew after this time, so that a connection that died silently is noticed.
const WATCH_SECONDS: u32 = 60;
/// A pass that takes longer is given up.
const PASS_MAX: Duration = Duration::from_mins(1);
/// Passes at the same time, each over another cluster.
const PASSES: u16 = 8;
/// Between two passes while something is on its way.
const VISIT_SOON: Duration = Duration::from_secs(2);
/// Between two passes while the load decides the number of nodes.
const VISIT_LOAD: Duration = Duration::from_secs(5);
/// Between two passes when all is as it should be.
const VISIT_LATER: Duration = Duration::from_secs(10);
/// Between two questions to a node whether all of them hear each other.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Longest wait after a pass that failed.
const BACKOFF_MAX: Duration = Duration::from_mins(1);

/// Namespace and name of a cluster.
pub type Key = (String, String);

/// What all passes share.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// The nodes.
    pub control: Control,
    /// Events.
    pub recorder: Recorder,
    /// Who acts, for people.
    pub holder: String,
    /// Images, where clusters do not say.
    pub images: Images,
    /// Numbers for Prometheus.
    pub metrics: Metrics,
    /// What is remembered of each cluster.
    pub memories: Mutex<HashMap<Key, Memory>>,
    /// Hash of each object when it was last applied.
    pub applied: Mutex<HashMap<(Key, String), (u64, Instant)>>,
    /// Status of each cluster when it was last written.
    pub published: Mutex<HashMap<Key, (CollabClusterStatus, Instant)>>,
    /// Passes in a row that failed.
    pub failures: std::sync::Mutex<HashMap<Key, u32>>,
    /// Whether PodMonitors are known, and when that was asked.
    pub pod_monitors_served: Mutex<Option<(bool, Instant)>>,
    /// Zone of each kube node, and when that was read.
    pub zones: Mutex<HashMap<String, (Option<String>, Instant)>>,
    /// The node that reported last, of each cluster.
    pub last_reporters: Mutex<HashMap<Key, LastReporter>>,
}

impl Context {
    /// A context that remembers nothing.
    ///
    /// # Errors
    /// When the HTTP client cannot be made.
    pub fn new(
        client: Client,
        config: &Config,
        holder: &str,
        metrics: Metrics,
    ) -> Result<Self, reqwest::Error> {
        let reporter = Reporter {
            controller: "collab-operator".to_owned(),
            instance: Some(config.pod_name.clone()),
        };
        Ok(Self {
            control: Control::new()?,
            recorder: Recorder::new(client.clone(), reporter),
            client,
            holder: holder.to_owned(),
            images: config.images(),
            metrics,
            memories: Mutex::default(),
            applied: Mutex::default(),
            published: Mutex::default(),
            failures: std::sync::Mutex::default(),
            pod_monitors_served: Mutex::default(),
            zones: Mutex::default(),
            last_reporters: Mutex::default(),
        })
    }

    /// Namespace and name of a cluster.
    pub fn key(&self, cluster: &CollabCluster) -> Key {
        (cluster.namespace().unwrap_or_default(), cluster.name_any())
    }

    /// Makes the next apply of every object of the cluster a real one.
    pub async fn forget_applied(&self, cluster: &CollabCluster) {
        let key = self.key(cluster);
        self.applied.lock().await.retain(|(of, _), _| *of != key);
    }

    /// Forgets a cluster that is gone; one of the same name starts anew.
    async fn forget(&self, cluster: &CollabCluster) {
        let key = self.key(cluster);
        self.forget_applied(cluster).await;
        self.memories.lock().await.remove(&key);
        self.published.lock().await.remove(&key);
        self.last_reporters.lock().await.remove(&key);
        self.metrics.forget(&key);
    }

    fn failed(&self, cluster: &CollabCluster) -> Duration {
        let mut failures = self
            .failures
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let failed = failures.entry(self.key(cluster)).or_default();
        *failed = failed.saturating_add(1);
        Duration::from_secs(1_u64.checked_shl(*failed - 1).unwrap_or(u64::MAX)).min(BACKOFF_MAX)
    }

    fn succeeded(&self, cluster: &CollabCluster) {
        let mut failures = self
            .failures
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        failures.remove(&self.key(cluster));
    }
}

/// The node that answered last.
#[derive(Clone)]
pub struct LastReporter {
    /// `host:port` of its internal listener.
    pub address: String,
    /// What it is asked with.
    pub token: String,
}

impl LastReporter {
    fn node(&self) -> Node<'_> {
        Node {
            address: &self.address,
            token: &self.token,
        }
    }
}

/// Why a pass ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Come back later.
    #[error(transparent)]
    Observe(#[from] ObserveError),
    /// Another operator acts: the process must end.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// Come back later.
    #[error("the status could not be written: {0}")]
    Status(#[source] kube::Error),
    /// Come back later.
    #[error("the pass took longer than {} s", PASS_MAX.as_secs())]
    TooSlow,
}

/// One pass over a cluster.
async fn reconcile(cluster: Arc<CollabCluster>, ctx: Arc<Context>) -> Result<Action, Error> {
    let key = ctx.key(&cluster);
    if cluster.metadata.deletion_timestamp.is_some() {
        // Everything has an owner reference or is meant to stay: the garbage collector does the rest.
        ctx.forget(&cluster).await;
        return Ok(Action::await_change());
    }
    let started = Instant::now();
    let memory = ctx
        .memories
        .lock()
        .await
        .get(&key)
        .cloned()
        .unwrap_or_default();
    let observed = Box::pin(observe(&ctx, &cluster)).await?;
    let plan = plan(&cluster, &observed, &memory, &ctx.images, Timestamp::now());
    debug!(cluster = %cluster.name_any(), %plan, "planned");
    let applied = apply(&ctx, &cluster, &observed, &plan).await?;
    let status = status::status(
        &cluster,
        &ctx.images,
        &observed,
        &plan,
        &applied,
        Timestamp::now(),
    );
    let settled = applied.failures.is_empty() && is_settled(&plan, &status);
    ctx.memories.lock().await.insert(key, applied.memory);
    ctx.metrics
        .observed(&ctx.key(&cluster), &status, started.elapsed());
    let unwritten = status::publish(&ctx, &cluster, status)
        .await
        .map_err(Error::Status)?;
    ctx.succeeded(&cluster);
    Ok(Action::requeue(if unwritten || !settled {
        VISIT_SOON
    } else if cluster.spec.autoscaling.enabled {
        VISIT_LOAD
    } else {
        VISIT_LATER
    }))
}

fn is_settled(plan: &Plan, status: &CollabClusterStatus) -> bool {
    let nodes = &status.nodes;
    plan.waits.is_empty()
        && !plan.rolling_out
        && status.ring.moving == 0
        && status.ring.unowned == 0
        && nodes.draining == 0
        && nodes.replicas == nodes.desired
        && nodes.ready == nodes.desired
}

async fn bounded(cluster: Arc<CollabCluster>, ctx: Arc<Context>) -> Result<Action, Error> {
    let result = tokio::time::timeout(PASS_MAX, Box::pin(reconcile(cluster, Arc::clone(&ctx))))
        .await
        .unwrap_or(Err(Error::TooSlow));
    let outcome = if result.is_ok() { "success" } else { "error" };
    ctx.metrics.reconciles.with_label_values(&[outcome]).inc();
    result
}

// Passed by value because the applier wants it so.
#[allow(clippy::needless_pass_by_value)]
fn later(cluster: Arc<CollabCluster>, error: &Error, ctx: Arc<Context>) -> Action {
    let wait = ctx.failed(&cluster);
    warn!(cluster = %cluster.name_any(), %error, wait_seconds = wait.as_secs(), "a pass failed");
    Action::requeue(wait)
}

/// Looks after the clusters of these namespaces, or of all, until `stop`.
///
/// # Errors
/// When another operator acts on one of them, or a watch ends unasked.
pub async fn run(
    ctx: Arc<Context>,
    namespaces: &[String],
    heartbeat: Heartbeat,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    if namespaces.is_empty() {
        return run_in(ctx, None, heartbeat, stop).await;
    }
    // A store holds what one watch has seen, so each namespace has its own.
    let each = namespaces.iter().map(|namespace| {
        run_in(
            Arc::clone(&ctx),
            Some(namespace.as_str()),
            heartbeat.clone(),
            stop.clone(),
        )
    });
    futures::future::try_join_all(each).await?;
    Ok(())
}

async fn run_in(
    ctx: Arc<Context>,
    namespace: Option<&str>,
    heartbeat: Heartbeat,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let (store, writer) = reflector::store();
    let (queue, named) = futures::channel::mpsc::unbounded();
    let mut watches = JoinSet::new();
    watches.spawn(watch_clusters(
        Arc::clone(&ctx),
        api(&ctx.client, namespace),
        writer,
        queue.clone(),
    ));
    watches.spawn(watch_parts::<Pod>(
        api(&ctx.client, namespace),
        queue.clone(),
    ));
    watches.spawn(watch_parts::<StatefulSet>(
        api(&ctx.client, namespace),
        queue.clone(),
    ));

    watches.spawn(watch_nodes(
        Arc::clone(&ctx),
        namespace.map(ToOwned::to_owned),
        queue,
    ));

    let config = kube::runtime::controller::Config::default().concurrency(PASSES);
    let passes = applier(
        |cluster, ctx| Box::pin(bounded(cluster, ctx)),
        later,
        ctx,
        store,
        named.map(Ok::<_, Infallible>),
        config,
    );
    tokio::pin!(passes);
    let mut tick = tokio::time::interval(VISIT_LATER);
    loop {
        tokio::select! {
            pass = passes.next() => match pass {
                Some(Err(PassError::ReconcilerFailed(Error::Apply(lost @ ApplyError::TermLost { .. }), _))) => return Err(lost.into()),
                Some(_) => heartbeat.beat(),
                None => return Ok(()),
            },
            _ = tick.tick() => heartbeat.beat(),
            Some(ended) = watches.join_next() => {
                // An aborted watch closes the queue, and the applier ends after the passes under way.
                if !stop.is_cancelled() {
                    ended?;
                    anyhow::bail!("a watch ended unasked");
                }
            }
            () = stop.cancelled(), if !watches.is_empty() => watches.abort_all(),
        }
    }
}

fn api<K>(client: &Client, namespace: Option<&str>) -> Api<K>
where
    K: Resource<Scope = kube::core::NamespaceResourceScope>,
    K::DynamicType: Default,
{
    match namespace {
        Some(namespace) => Api::namespaced(client.clone(), namespace),
        None => Api::all(client.clone()),
    }
}

fn watch_config() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS)
}

async fn watch_clusters(
    ctx: Arc<Context>,
    api: Api<CollabCluster>,
    writer: reflector::store::Writer<CollabCluster>,
    queue: UnboundedSender<ObjectRef<CollabCluster>>,
) {
    let events = watcher(api, watch_config())
        .default_backoff()
        .reflect(writer);
    tokio::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Apply(cluster) | watcher::Event::InitApply(cluster)) => {
                // A status that we wrote ourselves is no news, but comes rarely enough.
                name(&queue, ObjectRef::from_obj(&cluster));
            }
            Ok(watcher::Event::Delete(cluster)) => ctx.forget(&cluster).await,
            Ok(watcher::Event::Init) => {}
            Ok(watcher::Event::InitDone) => debug!("knows all clusters"),
            Err(error) => warn!(%error, "cannot watch CollabClusters"),
        }
    }
}

/// Names the cluster whenever one of its parts changes.
async fn watch_parts<K>(
    api: Api<PartialObjectMeta<K>>,
    queue: UnboundedSender<ObjectRef<CollabCluster>>,
) where
    K: Resource<DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned
        + Send
        + 'static,
{
    let events = watcher(api, watch_config().labels(MANAGED_SELECTOR)).default_backoff();
    tokio::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(
                watcher::Event::Apply(part)
                | watcher::Event::InitApply(part)
                | watcher::Event::Delete(part),
            ) => {
                if let (Some(cluster), Some(namespace)) =
                    (part.labels().get(INSTANCE_LABEL), part.namespace())
                {
                    name(&queue, ObjectRef::new(cluster).within(&namespace));
                }
            }
            Ok(_) => {}
            Err(error) => warn!(%error, kind = %K::kind(&()), "cannot watch parts of clusters"),
        }
    }
}

/// Names a cluster when the nodes of one say that they do not hear one of them that owns slots: that cannot wait for the
/// next visit. Names it too when the node that is asked does not answer, so that another one is found.
async fn watch_nodes(
    ctx: Arc<Context>,
    namespace: Option<String>,
    queue: UnboundedSender<ObjectRef<CollabCluster>>,
) {
    let mut tick = tokio::time::interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let reporters = ctx.last_reporters.lock().await.clone();
        let ours = reporters
            .into_iter()
            .filter(|((of, _), _)| namespace.as_ref().is_none_or(|namespace| namespace == of));
        let looks = ours.map(|(key, reporter)| {
            let ctx = &ctx;
            async move {
                let report = ctx.control.report(reporter.node()).await;
                if report.is_err() {
                    ctx.last_reporters.lock().await.remove(&key);
                }
                let is_news = report.map_or(true, |report| !grey(&report).fence.is_empty());
                is_news.then_some(key)
            }
        });
        for (namespace, cluster) in futures::future::join_all(looks).await.into_iter().flatten() {
            name(&queue, ObjectRef::new(&cluster).within(&namespace));
        }
    }
}

fn name(queue: &UnboundedSender<ObjectRef<CollabCluster>>, cluster: ObjectRef<CollabCluster>) {
    // Fails only when the applier has ended, and then nobody wants to know.
    let _ = queue.unbounded_send(cluster);
}
