//! What the operator tells about itself: alive, ready, and numbers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use collab_crds::CollabClusterStatus;
use prometheus::{
    Encoder as _, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};
use tokio_util::sync::CancellationToken;

use crate::controller::Key;

/// A loop that has not come round for this long hangs, and the process must be restarted.
const HANGS_AFTER: Duration = Duration::from_mins(5);
/// The operator is ready while the API server has answered within this time.
const IN_TOUCH: Duration = Duration::from_secs(30);

/// The last sign of life of a loop.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    start: Instant,
    last_ms: Arc<AtomicU64>,
}

impl Heartbeat {
    /// Beats once now.
    pub fn new() -> Self {
        Self {
            start: Instant::now(),
            last_ms: Arc::default(),
        }
    }

    /// Says that the loop came round.
    pub fn beat(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// Time since the last beat.
    pub fn age(&self) -> Duration {
        let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
        self.start.elapsed().saturating_sub(last)
    }
}

impl Default for Heartbeat {
    fn default() -> Self {
        Self::new()
    }
}

/// The loops whose life is asked for.
#[derive(Clone, Debug, Default)]
pub struct Vitals {
    /// The loop of the lease.
    pub lease: Heartbeat,
    /// Answers of the API server about the lease.
    pub api_server: Heartbeat,
    /// The loop of the controller, which runs only while this operator leads.
    pub controller: Heartbeat,
}

/// Numbers for Prometheus.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// 1 while this process leads.
    pub leader: IntGauge,
    /// The newest term granted to this process.
    pub term: IntGauge,
    /// Passes by result.
    pub reconciles: IntCounterVec,
    /// Duration of passes.
    pub reconcile_seconds: Histogram,
    /// Nodes wanted, by cluster.
    pub nodes_desired: IntGaugeVec,
    /// Changes of the number of nodes, by direction.
    pub scale_events: IntCounterVec,
    /// Slots moved because of the load.
    pub slots_rebalanced: IntCounter,
    /// Load of the busiest owner in percent of the mean, by cluster.
    pub load_max_to_mean: IntGaugeVec,
    /// Documents with a slot of their own, by cluster.
    pub documents_pinned: IntGaugeVec,
}

impl Metrics {
    /// Registers everything.
    ///
    /// # Errors
    /// When two metrics have one name.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let metrics = Self {
            leader: IntGauge::new(
                "collab_operator_leader",
                "1 while this process leads, else 0",
            )?,
            term: IntGauge::new(
                "collab_operator_term",
                "Newest term granted to this process",
            )?,
            reconciles: IntCounterVec::new(
                Opts::new(
                    "collab_operator_reconciles_total",
                    "Passes over clusters by result",
                ),
                &["result"],
            )?,
            reconcile_seconds: Histogram::with_opts(HistogramOpts::new(
                "collab_operator_reconcile_seconds",
                "Duration of a pass over a cluster in seconds",
            ))?,
            nodes_desired: IntGaugeVec::new(
                Opts::new("collab_operator_nodes_desired", "Nodes wanted"),
                &["namespace", "cluster"],
            )?,
            scale_events: IntCounterVec::new(
                Opts::new(
                    "collab_operator_scale_events_total",
                    "Changes of the number of nodes by direction",
                ),
                &["direction"],
            )?,
            slots_rebalanced: IntCounter::new(
                "collab_operator_slots_rebalanced_total",
                "Slots moved because of the load",
            )?,
            load_max_to_mean: IntGaugeVec::new(
                Opts::new(
                    "collab_operator_load_max_to_mean_percent",
                    "Load of the busiest owner in percent of the mean",
                ),
                &["namespace", "cluster"],
            )?,
            documents_pinned: IntGaugeVec::new(
                Opts::new(
                    "collab_operator_documents_pinned",
                    "Documents that have a slot of their own",
                ),
                &["namespace", "cluster"],
            )?,
            registry,
        };
        for direction in ["out", "in"] {
            metrics.scale_events.with_label_values(&[direction]);
        }
        for collector in [
            Box::new(metrics.leader.clone()) as Box<dyn prometheus::core::Collector>,
            Box::new(metrics.term.clone()),
            Box::new(metrics.reconciles.clone()),
            Box::new(metrics.reconcile_seconds.clone()),
            Box::new(metrics.nodes_desired.clone()),
            Box::new(metrics.scale_events.clone()),
            Box::new(metrics.slots_rebalanced.clone()),
            Box::new(metrics.load_max_to_mean.clone()),
            Box::new(metrics.documents_pinned.clone()),
            Box::new(prometheus::process_collector::ProcessCollector::for_self()),
        ] {
            metrics.registry.register(collector)?;
        }
        Ok(metrics)
    }

    /// Notes a pass.
    pub fn observed(
        &self,
        (namespace, cluster): &Key,
        status: &CollabClusterStatus,
        duration: Duration,
    ) {
        self.reconcile_seconds.observe(duration.as_secs_f64());
        self.nodes_desired
            .with_label_values(&[namespace, cluster])
            .set(status.nodes.desired.into());
        self.documents_pinned
            .with_label_values(&[namespace, cluster])
            .set(status.ring.pinned.into());
        if let Some(percent) = status.load.owner_max_to_mean_percent {
            self.load_max_to_mean
                .with_label_values(&[namespace, cluster])
                .set(percent);
        }
    }

    /// Drops the numbers of a cluster that is gone.
    pub fn forget(&self, (namespace, cluster): &Key) {
        // Fails when there are none.
        for gauge in [
            &self.nodes_desired,
            &self.load_max_to_mean,
            &self.documents_pinned,
        ] {
            let _ = gauge.remove_label_values(&[namespace, cluster]);
        }
    }

    fn text(&self) -> Result<String, prometheus::Error> {
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

#[derive(Clone)]
struct Admin {
    vitals: Vitals,
    metrics: Metrics,
}

/// Serves `/healthz`, `/readyz` and `/metrics` until `stop`.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(
    listen: SocketAddr,
    vitals: Vitals,
    metrics: Metrics,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let routes = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(numbers))
        .with_state(Admin { vitals, metrics });
    let listener = tokio::net::TcpListener::bind(listen).await?;
    axum::serve(listener, routes)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

async fn healthz(State(admin): State<Admin>) -> (StatusCode, String) {
    let mut loops = vec![("lease", admin.vitals.lease.age())];
    if admin.metrics.leader.get() == 1 {
        loops.push(("controller", admin.vitals.controller.age()));
    }
    match loops.into_iter().find(|(_, age)| HANGS_AFTER < *age) {
        Some((name, age)) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!(
                "the {name} loop has not come round for {} s\n",
                age.as_secs()
            ),
        ),
        None => (StatusCode::OK, "alive\n".to_owned()),
    }
}

async fn readyz(State(admin): State<Admin>) -> (StatusCode, String) {
    let age = admin.vitals.api_server.age();
    if IN_TOUCH < age {
        let reason = format!("the API server has not answered for {} s\n", age.as_secs());
        return (StatusCode::SERVICE_UNAVAILABLE, reason);
    }
    let role = if admin.metrics.leader.get() == 1 {
        "leads"
    } else {
        "stands by"
    };
    (StatusCode::OK, format!("{role}\n"))
}

async fn numbers(State(admin): State<Admin>) -> (StatusCode, String) {
    match admin.metrics.text() {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}
