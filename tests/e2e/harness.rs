//! What the other scenarios take for granted of the cluster itself.

use anyhow::{Context, Result, ensure};
use collab_tests::images;
use collab_tests::kubernetes::{Cluster, Helm, Prometheus};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_mins(1);

/// A restricted pod runs, a pod that is not restricted is refused, and service names resolve.
pub(crate) async fn names_and_restrictions(cluster: &Cluster) -> Result<()> {
    let namespace = cluster.namespace("harness-names").await?;
    namespace.apply(&redis("server", "node2", "")).await?;
    namespace.apply(&redis("client", "node1", "")).await?;
    namespace.wait("pod/server", "Ready", SOON).await?;
    namespace.wait("pod/client", "Ready", SOON).await?;
    // Each kube node learns of a pod that is ready in its own time; until then it refuses its service.
    for (from, host) in [
        ("client", "server.harness-names.svc.cluster.local"),
        ("server", "client"),
    ] {
        let answer = namespace
            .until("a service answers by its name", SOON, || async {
                let ping = ["redis-cli", "-h", host, "ping"];
                namespace.exec(from, &ping).await
            })
            .await?;
        ensure!(answer.trim() == "PONG", "{answer}");
    }
    // This program reaches pods and services as well.
    tokio::net::TcpStream::connect((namespace.pod_address("server").await?, 6379)).await?;
    let service = namespace.service_address("server").await?;
    namespace
        .until("the service answers here", SOON, || async {
            Ok(tokio::net::TcpStream::connect(service).await?)
        })
        .await?;
    ensure!(
        namespace
            .logs("server")
            .await?
            .contains("Ready to accept connections")
    );

    let root = redis("root", "node1", "").replace("runAsNonRoot: true", "runAsNonRoot: false");
    let refused = namespace
        .apply(&root)
        .await
        .err()
        .context("a pod was admitted that is not restricted")?;
    ensure!(
        format!("{refused:#}").contains("violates PodSecurity"),
        "{refused:#}"
    );
    namespace.delete().await
}

/// A claim is bound on the kube node of its pod, and what is written there is there after the pod's process was killed.
pub(crate) async fn volumes(cluster: &Cluster) -> Result<()> {
    let namespace = cluster.namespace("harness-volumes").await?;
    namespace
        .apply(
            "{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: data},
              spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}}",
        )
        .await?;
    let volume = "[{name: data, persistentVolumeClaim: {claimName: data}}]";
    namespace.apply(&redis("server", "node2", volume)).await?;
    namespace.wait("pod/server", "Ready", SOON).await?;
    let claim = namespace.get(&["persistentvolumeclaim", "data"]).await?;
    let bound = claim["spec"]["volumeName"]
        .as_str()
        .context("the claim is not bound")?;
    ensure!(bound.starts_with("node2-"), "bound to {bound}");
    namespace
        .exec("server", &["redis-cli", "set", "key", "kept"])
        .await?;
    namespace.kill("server", "redis").await?;
    namespace
        .until("a second life", SOON, || async {
            ensure!(namespace.restarts("server", "redis").await? == 1);
            let value = namespace
                .exec("server", &["redis-cli", "get", "key"])
                .await?;
            ensure!(value.trim() == "kept", "{value}");
            Ok(())
        })
        .await?;
    namespace.delete().await
}

/// The Postgres image has Patroni, its client of Kubernetes and Postgres, and can make a database as its user.
pub(crate) async fn database_image(cluster: &Cluster) -> Result<()> {
    let namespace = cluster.namespace("harness-image").await?;
    let pod = redis("database", "node1", "")
        .replace("collab-redis", "collab-postgres")
        .replace("args: [--dir, /data, --protected-mode, \"no\", --appendonly, \"yes\", --appendfsync, always]", "command: [sleep, \"600\"]")
        .replace("    readinessProbe: {tcpSocket: {port: 6379}, periodSeconds: 1}\n", "")
        .replace("102", "101");
    namespace.apply(&pod).await?;
    namespace.wait("pod/database", "Ready", SOON).await?;
    let show = "id --user --name && patroni --version && python3 -c 'import kubernetes' && initdb --pgdata=/data/db";
    let printed = namespace.exec("database", &["sh", "-ec", show]).await?;
    ensure!(
        printed.starts_with("postgres\npatroni ") && printed.contains("Success"),
        "{printed}"
    );
    namespace.delete().await
}

/// A kube node that is cut off is not ready after a while and answers nobody; healed, it is ready and its pod still runs.
pub(crate) async fn cut_and_heal(cluster: &Cluster) -> Result<()> {
    let namespace = cluster.namespace("harness-cut").await?;
    namespace.apply(&redis("server", "node2", "")).await?;
    namespace.wait("pod/server", "Ready", SOON).await?;
    let address = (namespace.pod_address("server").await?, 6379);
    let reach = || {
        tokio::time::timeout(
            Duration::from_secs(1),
            tokio::net::TcpStream::connect(address),
        )
    };
    reach().await??;

    cluster.cut("node2")?;
    ensure!(!matches!(reach().await, Ok(Ok(_))), "reached through a cut");
    let start = Instant::now();
    cluster.wait_kube_node("node2", false, SOON).await?;
    eprintln!(
        "the cut was noticed after {:.1} s",
        start.elapsed().as_secs_f64()
    );
    cluster.heal("node2")?;
    let start = Instant::now();
    cluster.wait_kube_node("node2", true, SOON).await?;
    eprintln!(
        "the healing was noticed after {:.1} s",
        start.elapsed().as_secs_f64()
    );
    reach().await??;
    namespace.wait("pod/server", "Ready", SOON).await?;
    ensure!(
        namespace.restarts("server", "redis").await? == 0,
        "the pod did not survive the cut"
    );
    namespace.delete().await
}

/// Prometheus finds pods by label and port and stores what they say, here of the name service.
pub(crate) async fn scraping(cluster: &Cluster) -> Result<()> {
    let namespace = cluster.existing_namespace("kube-system");
    let prometheus = Prometheus::start(cluster).await?;
    prometheus
        .scrape(&namespace, "k8s-app=kube-dns", "metrics")
        .await?;
    namespace
        .until("a scrape", SOON, || async {
            let up = prometheus.query("sum by (pod) (up)").await?;
            ensure!(up.len() == 1 && up[0]["value"][1] == "1", "{up:?}");
            Ok(())
        })
        .await?;
    ensure!(
        !prometheus
            .query("coredns_dns_requests_total")
            .await?
            .is_empty()
    );
    Ok(())
}

/// Helm 3 and Helm 4 are what they say and see the cluster's releases.
pub(crate) async fn helm(cluster: &Cluster) -> Result<()> {
    for (version, expected) in [(Helm::V3, "v3."), (Helm::V4, "v4.")] {
        let printed = cluster.helm(version, &["version", "--short"]).await?;
        ensure!(printed.starts_with(expected), "{printed}");
        let releases = cluster
            .helm(version, &["list", "--all-namespaces", "--output=json"])
            .await?;
        ensure!(releases.trim() == "[]", "{releases}");
    }
    Ok(())
}

/// A pod with a Redis on the kube node, and a service of its name; `volumes` hold its data if there are any.
fn redis(name: &str, kube_node: &str, volumes: &str) -> String {
    let image = images::reference("collab-redis");
    let (volumes, mounts) = match volumes {
        "" => (
            "[{name: data, emptyDir: {}}]",
            "[{name: data, mountPath: /data}]",
        ),
        volumes => (volumes, "[{name: data, mountPath: /data}]"),
    };
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}}}
spec: {{selector: {{app: {name}}}, ports: [{{port: 6379}}]}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {name}}}}}
spec:
  nodeSelector: {{kubernetes.io/hostname: {kube_node}}}
  terminationGracePeriodSeconds: 1
  securityContext: {{runAsNonRoot: true, runAsUser: 102, runAsGroup: 102, fsGroup: 102, seccompProfile: {{type: RuntimeDefault}}}}
  containers:
  - name: redis
    image: {image}
    args: [--dir, /data, --protected-mode, \"no\", --appendonly, \"yes\", --appendfsync, always]
    ports: [{{name: redis, containerPort: 6379}}]
    readinessProbe: {{tcpSocket: {{port: 6379}}, periodSeconds: 1}}
    securityContext: {{allowPrivilegeEscalation: false, capabilities: {{drop: [ALL]}}, readOnlyRootFilesystem: true}}
    volumeMounts: {mounts}
  volumes: {volumes}
"
    )
}
