//! Nodes are killed, cut off and scaled under stock clients.

use crate::installed::{Collab, operator, owned_without};
use anyhow::{Context, Result, ensure};
use collab_core::ids::NodeId;
use collab_tests::checker::everything_acknowledged_is_there;
use collab_tests::clients::typist::{Ledger, Typing};
use collab_tests::clients::{Follower, Reading, Replay, idle, now_ms};
use collab_tests::dashboards;
use collab_tests::kubernetes::{Cluster, Helm, Prometheus};
use std::time::Duration;
use tokio::time::sleep;

/// Fewer receipts than this before a fault say nothing.
const ACKED_MIN: usize = 300;
const DOCUMENTS: usize = 20;

/// A manifest as short as the documentation promises.
const SHORT: &str = "\
apiVersion: collabcluster.io/v1alpha1
kind: CollabCluster
metadata:
  name: NAME
spec:
  profile: Dev
";

/// Kills a node's process while twenty documents are written through three nodes, with Prometheus watching; replays
/// recorded sessions; and reads everything again from the store alone.
pub(crate) async fn kill(cluster: &Cluster) -> Result<()> {
    ensure!(SHORT.lines().count() <= 8, "the manifest is not short");
    operator(cluster, Helm::V3).await?;
    let collab = Collab::apply(cluster, "drill-kill", SHORT).await?;
    let pods = collab.pods().await?;
    ensure!(pods.len() == 3, "{pods:?}");
    let urls = collab.urls().await?;
    let prometheus = Prometheus::start(cluster).await?;
    prometheus
        .scrape(
            &collab.namespace,
            "app.kubernetes.io/component=node",
            "internal",
        )
        .await?;

    let names = documents("kill");
    let typists = type_until_it_counts(&collab, &urls, &names).await?;
    let victim = &pods[1];
    let incarnation = incarnation_of(&collab, &pods[0], victim).await?;
    let killed = now_ms();
    collab.namespace.kill(victim, "node").await?;
    let owned = |report: &_| owned_without(report, incarnation);
    let re_owned = collab
        .until(
            &pods[0],
            Duration::from_secs(20),
            "all slots have owners",
            owned,
        )
        .await?;
    sleep(Duration::from_secs(10)).await;
    let ledger = typists.stop().await?;
    let elsewhere = say_silences(
        &ledger,
        killed,
        killed + 10_000.0,
        &[urls[1].clone()],
        re_owned,
    )?;
    ensure!(
        elsewhere < Duration::from_secs(3),
        "no receipt for {elsewhere:?}"
    );
    everything_acknowledged_is_there(&collab.reading(&urls, &names), &ledger).await?;
    every_panel_has_data(&prometheus).await?;

    let replayed = documents("replay");
    for document in (Replay {
        token: Some(collab.token.clone()),
        ..Replay::recorded(urls.clone(), replayed)
    })
    .run()
    .await?
    {
        ensure!(
            document.agree && document.equals_trace == Some(true),
            "{document:?}"
        );
    }
    collab.restart_all().await?;
    let urls = collab.urls().await?;
    everything_acknowledged_is_there(&collab.reading(&urls, &names), &ledger).await?;
    collab.namespace.delete().await
}

/// Cuts off a kube node that carries nothing but collab nodes, and heals it.
pub(crate) async fn cut(cluster: &Cluster) -> Result<()> {
    operator(cluster, Helm::V3).await?;
    let manifest = "\
apiVersion: collabcluster.io/v1alpha1
kind: CollabCluster
metadata: {name: NAME}
spec:
  profile: Dev
  nodes:
    affinity:
      podAntiAffinity:
        preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: kubernetes.io/hostname
            labelSelector: {matchLabels: {app.kubernetes.io/component: node}}
  postgres: {managed: {nodeSelector: {kubernetes.io/hostname: node1}}}
  redis: {managed: {nodeSelector: {kubernetes.io/hostname: node1}}}
";
    let collab = Collab::apply(cluster, "drill-cut", manifest).await?;
    let pods = collab.pods().await?;
    let (mut far, mut near) = (Vec::new(), Vec::new());
    for pod in &pods {
        let there = collab.namespace.kube_node_of(pod).await? == "node2";
        (if there { &mut far } else { &mut near }).push(pod.clone());
    }
    ensure!(
        !far.is_empty() && !near.is_empty(),
        "all nodes are on one kube node: {pods:?}"
    );
    let urls = collab.urls().await?;
    let names = documents("cut");
    let typists = type_until_it_counts(&collab, &urls, &names).await?;

    let lost = incarnation_of(&collab, &near[0], &far[0]).await?;
    let cut_at = now_ms();
    cluster.cut("node2")?;
    let owned = |report: &_| owned_without(report, lost);
    let re_owned = collab
        .until(
            &near[0],
            Duration::from_secs(20),
            "all slots have owners",
            owned,
        )
        .await?;
    sleep(Duration::from_secs(6)).await;
    cluster.heal("node2")?;
    let healed = now_ms();
    cluster
        .wait_kube_node("node2", true, Duration::from_mins(2))
        .await?;
    let settled = |ledger: &Ledger| {
        ledger.writers.values().all(|writer| {
            writer
                .acks_ms
                .last()
                .is_some_and(|last| healed + 1_000.0 < *last)
        })
    };
    typists.until(Duration::from_mins(2), settled).await?;
    let ledger = typists.stop().await?;
    let mut theirs = Vec::new();
    for pod in &far {
        theirs.push(collab.url(pod).await?);
    }
    let elsewhere = say_silences(&ledger, cut_at, healed, &theirs, re_owned)?;
    ensure!(
        elsewhere < Duration::from_secs(8),
        "no receipt for {elsewhere:?}"
    );
    everything_acknowledged_is_there(&collab.reading(&urls, &names), &ledger).await?;
    collab.namespace.delete().await
}

/// Two hundred idle clients make two nodes three, their leaving makes them two again, and nothing is lost.
pub(crate) async fn scale(cluster: &Cluster) -> Result<()> {
    operator(cluster, Helm::V3).await?;
    let manifest = "\
apiVersion: collabcluster.io/v1alpha1
kind: CollabCluster
metadata: {name: NAME}
spec:
  profile: Dev
  nodes: {replicas: 2}
  autoscaling: {enabled: true, minNodes: 2, maxNodes: 4, targetConnectionsPerNode: 100, scaleDownWindowSeconds: 10, cooldownAfterFailoverSeconds: 5}
  redis: {disabled: {}}
";
    let collab = Collab::apply(cluster, "drill-scale", manifest).await?;
    let urls = collab.urls().await?;
    ensure!(urls.len() == 2, "{urls:?}");
    let names = documents("scale");
    let typists = Typing {
        token: Some(collab.token.clone()),
        rate: 2.0,
        ..Typing::new(urls.clone(), names.clone(), 7)
    }
    .start()?;
    let crowd = idle(&collab.reading(&urls, &names), 200)?;
    crowd
        .until(Duration::from_mins(1), |connected| *connected == 200)
        .await?;

    let grown = collab.until_status(
        Duration::from_mins(2),
        "there are three ready nodes",
        |status| status["nodes"]["desired"] == 3 && status["nodes"]["ready"] == 3,
    );
    let grown = grown.await?;
    println!(
        "200 idle clients: nodes {}, load {}",
        grown["nodes"], grown["load"]
    );
    crowd.stop().await?;
    let shrunk = collab.until_status(
        Duration::from_mins(3),
        "there are two nodes again",
        |status| status["nodes"]["desired"] == 2 && status["nodes"]["replicas"] == 2,
    );
    let shrunk = shrunk.await?;
    println!(
        "they left: nodes {}, load {}",
        shrunk["nodes"], shrunk["load"]
    );
    let ledger = typists.stop().await?;
    everything_acknowledged_is_there(&collab.reading(&urls, &names), &ledger).await?;
    collab.namespace.delete().await
}

impl Collab<'_> {
    fn reading<'reading>(
        &'reading self,
        urls: &'reading [String],
        names: &'reading [String],
    ) -> Reading<'reading> {
        Reading {
            nodes: urls,
            documents: names,
            token: Some(&self.token),
        }
    }
}

fn documents(prefix: &str) -> Vec<String> {
    (0..DOCUMENTS)
        .map(|number| format!("{prefix}/{number}"))
        .collect()
}

async fn type_until_it_counts(
    collab: &Collab<'_>,
    urls: &[String],
    names: &[String],
) -> Result<Follower<Ledger>> {
    let typing = Typing {
        writers: 3,
        rate: 3.0,
        token: Some(collab.token.clone()),
        ..Typing::new(urls.to_vec(), names.to_vec(), 3)
    };
    let typists = typing.start()?;
    typists
        .until(Duration::from_mins(2), |ledger| ACKED_MIN <= ledger.acked())
        .await?;
    Ok(typists)
}

async fn incarnation_of(collab: &Collab<'_>, witness: &str, pod: &str) -> Result<uuid::Uuid> {
    let report = collab.report(witness).await?;
    let member = report
        .members
        .iter()
        .find(|member| member.node == NodeId::from(pod));
    Ok(member
        .with_context(|| format!("{pod} is no member"))?
        .incarnation)
}

/// Prints what clients felt, those of the lost nodes apart, and answers the longest silence of the others.
fn say_silences(
    ledger: &Ledger,
    from: f64,
    until: f64,
    lost: &[String],
    re_owned: Duration,
) -> Result<Duration> {
    let silences = ledger.silences(from, until);
    let (theirs, others): (Vec<_>, Vec<_>) = silences
        .iter()
        .partition(|silence| lost.contains(&silence.node));
    let longest = |silences: &[&collab_tests::clients::typist::Silence]| {
        silences.first().map(|silence| silence.longest)
    };
    println!(
        "{} acked edits; re-owned after {} ms; longest time without a receipt: {:?} elsewhere, {:?} at the lost nodes",
        ledger.acked(),
        re_owned.as_millis(),
        longest(&others),
        longest(&theirs),
    );
    longest(&others).context("nobody typed elsewhere")
}

async fn every_panel_has_data(prometheus: &Prometheus) -> Result<()> {
    let mut panels = 0;
    for (file, dashboard) in dashboards::all() {
        for (title, query) in dashboards::panel_queries(&dashboard, &[]) {
            let series = prometheus
                .query(&query)
                .await
                .with_context(|| format!("{file}, {title}: {query}"))?;
            ensure!(!series.is_empty(), "{file}, {title}: no data for {query}");
            panels += 1;
        }
    }
    println!("{panels} queries of panels returned data");
    Ok(())
}
