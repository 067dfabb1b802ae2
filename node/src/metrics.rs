//! Every metric of a node: names, help, labels and buckets in one place.
//!
//! `metrics.txt` beside the sources lists them for dashboards; a test fails when it is stale.

use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder,
};

/// The metrics of one node.
#[derive(Clone, Debug)]
pub struct Metrics {
    registry: Registry,
    /// Client sockets open on this edge.
    pub connections: IntGauge,
    /// Connections turned away, by reason.
    pub connections_refused: IntCounterVec,
    /// Documents open at their owner here.
    pub documents_open: IntGauge,
    /// Documents that were closed, by reason.
    pub documents_unloaded: IntCounterVec,
    /// Openings refused because there was no memory.
    pub documents_refused: IntCounter,
    /// Documents that are read-only because their stored rows are damaged.
    pub documents_degraded: IntGauge,
    /// Open documents that rest.
    pub documents_at_rest: IntGauge,
    /// Memory of the open documents, in bytes, estimated.
    pub documents_memory: IntGauge,
    /// Clocks of the open documents, when last counted.
    pub documents_clocks: IntGauge,
    /// Those of them that are deleted.
    pub documents_deleted_clocks: IntGauge,
    /// Bytes of the newest snapshots of the open documents.
    pub documents_snapshot_bytes: IntGauge,
    /// Bytes of the updates after them.
    pub documents_log_bytes: IntGauge,
    /// Slots owned here.
    pub slots_owned: IntGauge,
    /// Slots whose handoff from here is under way.
    pub slots_moving: IntGauge,
    /// 1 while the lease lets this node acknowledge.
    pub lease_held: IntGauge,
    /// 1 while the store answers.
    pub store_up: IntGauge,
    /// 1 while Redis answers; 0 also when it is disabled.
    pub redis_up: IntGauge,
    /// Streams to and from other nodes.
    pub relay_links: IntGauge,
    /// Updates that clients sent to this edge.
    pub updates_received: IntCounter,
    /// Updates not admitted here, by reason.
    pub updates_refused: IntCounterVec,
    /// Updates whose append was refused because the slot has a new owner.
    pub updates_fenced: IntCounter,
    /// Times that an input made a document panic.
    pub document_panics: IntCounter,
    /// Frames put on client sockets.
    pub deliveries: IntCounter,
    /// Times that a socket could not follow.
    pub sockets_behind: IntCounter,
    /// From an update's arrival at this edge to its receipt.
    pub ack_seconds: Histogram,
    /// Hold-up of documents by a handoff, in seconds.
    pub handoff_seconds: Histogram,
    /// Documents opened, by `from`: `store` or `preload`.
    pub documents_loaded: IntCounterVec,
    /// One append to the store, by batch.
    pub append_seconds: Histogram,
    /// Updates in one append.
    pub append_batch_updates: Histogram,
    /// Slots adopted from a lost owner.
    pub adoptions: IntCounter,
    /// Nodes that are given few slots or none because they lost their leases too often, as this node sees it.
    pub nodes_quarantined: IntGauge,
    /// Leases of other members that this node ended early, because their process was gone.
    pub early_fences: IntCounter,
    /// Times that others ended the lease of this node while it lived.
    pub leases_lost: IntCounter,
    /// Slots handed over, by result.
    pub handoffs: IntCounterVec,
    /// Snapshots written, by result.
    pub snapshots: IntCounterVec,
}

const LATENCY_BUCKETS: [f64; 16] = [
    0.000_25, 0.000_5, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.125, 0.25, 0.5, 1.0, 2.0,
    4.0, 8.0,
];

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// Registers all metrics in a registry of its own.
    ///
    /// # Panics
    /// Never: names, help and labels are fixed and valid.
    #[allow(clippy::too_many_lines, reason = "a table of metrics")]
    pub fn new() -> Self {
        let registry = Registry::new();
        let gauge = |name, help| registered(&registry, IntGauge::new(name, help));
        let counter = |name, help| registered(&registry, IntCounter::new(name, help));
        let counters = |name, help, label| {
            registered(
                &registry,
                IntCounterVec::new(Opts::new(name, help), &[label]),
            )
        };
        let histogram = |name, help, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            registered(&registry, Histogram::with_opts(options))
        };
        let metrics = Self {
            connections: gauge("collab_connections", "Client sockets open on this edge."),
            connections_refused: counters(
                "collab_connections_refused_total",
                "Connections turned away because there were too many, by reason.",
                "reason",
            ),
            documents_open: gauge(
                "collab_documents_open",
                "Documents open at their owner here.",
            ),
            documents_unloaded: counters(
                "collab_documents_unloaded_total",
                "Documents closed because nobody had them open, by reason.",
                "reason",
            ),
            documents_refused: counter(
                "collab_documents_refused_total",
                "Documents that were not opened because there was no memory for them.",
            ),
            documents_degraded: gauge(
                "collab_documents_degraded",
                "Documents of which only a part is served, read-only, because their stored rows are damaged.",
            ),
            documents_at_rest: gauge(
                "collab_documents_at_rest",
                "Open documents that nobody has changed or joined for a while: only their bytes are in memory.",
            ),
            documents_memory: gauge(
                "collab_documents_memory_bytes",
                "Memory of the open documents, estimated, as if none was at rest.",
            ),
            documents_clocks: gauge(
                "collab_documents_clocks",
                "Characters and values that were ever written into the open documents, when last counted.",
            ),
            documents_deleted_clocks: gauge(
                "collab_documents_deleted_clocks",
                "Those of them that were deleted since: tombstones.",
            ),
            documents_snapshot_bytes: gauge(
                "collab_documents_snapshot_bytes",
                "Bytes of the newest snapshots of the open documents.",
            ),
            documents_log_bytes: gauge(
                "collab_documents_log_bytes",
                "Bytes of the updates after these snapshots: history that the next snapshots take the place of.",
            ),
            slots_owned: gauge("collab_slots_owned", "Slots owned by this node."),
            slots_moving: gauge(
                "collab_slots_moving",
                "Slots whose handoff from this node is under way.",
            ),
            lease_held: gauge(
                "collab_lease_held",
                "1 while the lease lets this node acknowledge edits.",
            ),
            store_up: gauge("collab_store_up", "1 while the store answers."),
            redis_up: gauge(
                "collab_redis_up",
                "1 while Redis answers; 0 also when it is disabled.",
            ),
            relay_links: gauge("collab_relay_links", "Streams to and from other nodes."),
            updates_received: counter(
                "collab_updates_received_total",
                "Updates that clients sent to this edge.",
            ),
            updates_refused: counters(
                "collab_updates_refused_total",
                "Updates not admitted by this owner or edge, by reason.",
                "reason",
            ),
            updates_fenced: counter(
                "collab_updates_fenced_total",
                "Updates whose append was refused because the slot has a new owner.",
            ),
            document_panics: counter(
                "collab_document_panics_total",
                "Times that an input made a document panic; it was loaded again.",
            ),
            deliveries: counter("collab_deliveries_total", "Frames put on client sockets."),
            sockets_behind: counter(
                "collab_sockets_behind_total",
                "Times that a client socket could not follow and was sent one difference later instead.",
            ),
            ack_seconds: histogram(
                "collab_ack_seconds",
                "From an update's arrival at this edge to its receipt.",
                &LATENCY_BUCKETS,
            ),
            handoff_seconds: histogram(
                "collab_handoff_seconds",
                "How long the documents of a handoff were held up here: until they were durable and had a new owner.",
                &LATENCY_BUCKETS,
            ),
            documents_loaded: counters(
                "collab_documents_loaded_total",
                "Documents opened at their owner here: from the store, or from what was read ahead of a handoff.",
                "from",
            ),
            append_seconds: histogram(
                "collab_append_seconds",
                "Duration of one append to the store.",
                &LATENCY_BUCKETS,
            ),
            append_batch_updates: histogram(
                "collab_append_batch_updates",
                "Updates in one append to the store.",
                &[1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0],
            ),
            adoptions: counter(
                "collab_adoptions_total",
                "Slots that this node adopted from a lost owner.",
            ),
            nodes_quarantined: gauge(
                "collab_nodes_quarantined",
                "Nodes that are given few slots or none because they lost their leases too often, as this node sees it.",
            ),
            early_fences: counter(
                "collab_early_fences_total",
                "Leases of other nodes that this node ended early because their process was gone.",
            ),
            leases_lost: counter(
                "collab_leases_lost_total",
                "Times that others ended the lease of this node while it lived.",
            ),
            handoffs: counters(
                "collab_handoffs_total",
                "Slots that this node handed over, by result.",
                "result",
            ),
            snapshots: counters(
                "collab_snapshots_total",
                "Snapshots written, by result.",
                "result",
            ),
            registry,
        };
        let build = registered(
            &metrics.registry,
            IntGaugeVec::new(
                Opts::new("collab_build_info", "Constant 1; the version is its label."),
                &["version"],
            ),
        );
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        for reason in [
            "invalid",
            "conflict",
            "gap",
            "resync",
            "read_only",
            "degraded",
            "full",
            "unsaved",
        ] {
            metrics.updates_refused.with_label_values(&[reason]);
        }
        for reason in ["node", "address"] {
            metrics.connections_refused.with_label_values(&[reason]);
        }
        for reason in ["unused", "memory"] {
            metrics.documents_unloaded.with_label_values(&[reason]);
        }
        for result in ["moved", "failed"] {
            metrics.handoffs.with_label_values(&[result]);
        }
        for result in ["written", "failed"] {
            metrics.snapshots.with_label_values(&[result]);
        }
        for from in ["store", "preload"] {
            metrics.documents_loaded.with_label_values(&[from]);
        }
        metrics
            .registry
            .register(Box::new(
                prometheus::process_collector::ProcessCollector::for_self(),
            ))
            .expect("registered once");
        metrics
    }

    /// All metrics in the Prometheus text format.
    ///
    /// # Panics
    /// Never: metrics with valid names encode.
    pub fn render(&self) -> String {
        let mut out = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut out)
            .expect("metrics with valid names encode");
        String::from_utf8(out).expect("the text format is UTF-8")
    }

    /// One line per metric of ours: name, type, help.
    pub fn list(&self) -> String {
        let rendered = self.render();
        let field = |prefix: &str, name: &str| {
            let start = format!("{prefix} {name} ");
            rendered
                .lines()
                .find_map(|line| line.strip_prefix(&start))
                .unwrap_or_default()
                .to_owned()
        };
        let names = rendered
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE "));
        let names = names.filter_map(|line| line.split(' ').next());
        let names = names.filter(|name| name.starts_with("collab_"));
        let line = |name| {
            let (kind, help) = (field("# TYPE", name), field("# HELP", name));
            [name, " ", &kind, " ", &help, "\n"].concat()
        };
        names.map(line).collect()
    }
}

fn registered<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> C {
    let collector = collector.expect("name, help and labels are valid");
    registry
        .register(Box::new(collector.clone()))
        .expect("each name is registered once");
    collector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_list_is_that_of_the_registry() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/metrics.txt");
        let list = Metrics::new().list();
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(path, &list).expect("metrics.txt is written");
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert_eq!(
            committed, list,
            "run `UPDATE=1 cargo test -p collab-node metrics` and commit metrics.txt"
        );
    }
}
