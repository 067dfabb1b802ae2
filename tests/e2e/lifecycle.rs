//! Installing, uninstalling, and manifests that make no sense.

use crate::installed::{Collab, READY, SYSTEM, operator};
use anyhow::{Context, Result, ensure};
use collab_tests::charts::repository;
use collab_tests::clients::{Reading, Replay, reload};
use collab_tests::kubernetes::{Cluster, Helm};
use std::time::{Duration, Instant};

/// The API server names the field of each wrong value.
pub(crate) async fn wrong_manifests(cluster: &Cluster) -> Result<()> {
    operator(cluster, Helm::V3).await?;
    let namespace = cluster.namespace("wrong").await?;
    let wrong = [
        ("placement: {slots: 1000}", "spec.placement.slots"),
        (
            "postgres: {managed: {}, external: {secretRef: {name: s}}}",
            "spec.postgres",
        ),
        (
            "autoscaling: {enabled: true, minNodes: 5, maxNodes: 2}",
            "spec.autoscaling",
        ),
    ];
    for (spec, field) in wrong {
        let manifest = format!(
            "{{apiVersion: collabcluster.io/v1alpha1, kind: CollabCluster, metadata: {{name: wrong}}, spec: {{profile: Dev, {spec}}}}}"
        );
        let refused = namespace
            .apply(&manifest)
            .await
            .err()
            .with_context(|| format!("{spec} was accepted"))?;
        ensure!(
            format!("{refused:#}").contains(field),
            "{spec}: {refused:#}"
        );
    }
    namespace.delete().await
}

/// Both charts are uninstalled, in either order; the definition, the volumes and the database's Secret stay, and the next
/// installation finds the documents. Once with each version of Helm.
pub(crate) async fn uninstall(cluster: &Cluster) -> Result<()> {
    let name = "again";
    let cluster_chart = repository().join("charts/collab-cluster");
    let cluster_chart = cluster_chart.to_str().context("the path is text")?;
    let documents: Vec<String> = (0..3).map(|number| format!("kept/{number}")).collect();
    let mut texts = Vec::new();
    let orders = [
        (Helm::V3, ["collab-operator", name]),
        (Helm::V4, [name, "collab-operator"]),
    ];
    for (helm, order) in orders {
        operator(cluster, helm).await?;
        let namespace = cluster.namespace(name).await?;
        let install = [
            "install",
            name,
            cluster_chart,
            "--namespace",
            name,
            "--set",
            "spec.profile=Dev,spec.nodes.replicas=2",
        ];
        cluster.helm(helm, &install).await?;
        let collab = Collab::ready(namespace).await?;
        let urls = collab.urls().await?;
        let reading = Reading {
            nodes: &urls,
            documents: &documents,
            token: Some(&collab.token),
        };
        if texts.is_empty() {
            let replay = Replay {
                token: Some(collab.token.clone()),
                ..Replay::recorded(urls.clone(), documents.clone())
            };
            replay.run().await?;
            texts = exported(&reading).await?;
            ensure!(texts.iter().all(|text| 100 < text.len()), "{texts:?}");
        } else {
            ensure!(
                exported(&reading).await? == texts,
                "the documents are others after the second installation"
            );
        }

        let begun = Instant::now();
        for release in order {
            let namespace = if release == name { name } else { SYSTEM };
            cluster
                .helm(
                    helm,
                    &["uninstall", release, "--namespace", namespace, "--wait"],
                )
                .await?;
        }
        if order[0] == "collab-operator" {
            println!("the operator went first");
        }
        let pods = collab.namespace.until("no pod is left", READY, || async {
            let pods = collab
                .namespace
                .pods("app.kubernetes.io/name=collabcluster")
                .await?;
            ensure!(pods.is_empty(), "{pods:?}");
            Ok(())
        });
        pods.await?;
        let took = begun.elapsed();
        println!("uninstalled both charts in {:.1} s", took.as_secs_f64());
        ensure!(took < Duration::from_mins(1), "it took {took:?}");
        cluster
            .get(&[
                "customresourcedefinition",
                "collabclusters.collabcluster.io",
            ])
            .await?;
        collab
            .namespace
            .secret(&format!("{name}-database"), "url")
            .await?;
        let volumes = collab.namespace.get(&["persistentvolumeclaims"]).await?;
        ensure!(
            volumes["items"]
                .as_array()
                .is_some_and(|items| !items.is_empty()),
            "the volumes are gone"
        );
    }
    Ok(())
}

async fn exported(reading: &Reading<'_>) -> Result<Vec<String>> {
    Ok(reload(reading)
        .await?
        .into_iter()
        .map(|document| document.exported)
        .collect())
}
