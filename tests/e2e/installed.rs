//! The operator, installed by its chart, and a collaboration cluster under it.

use anyhow::{Context, Result, ensure};
use collab_core::control::ClusterReport;
use collab_tests::charts::repository;
use collab_tests::kubernetes::{Cluster, Helm, Namespace};
use jsonwebtoken::{EncodingKey, Header, get_current_timestamp};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Namespace and release of the operator.
pub(crate) const SYSTEM: &str = "collab-system";
/// "Ready in under 3 minutes".
pub(crate) const READY: Duration = Duration::from_mins(3);

/// Installs the operator, or leaves it as it is; its pod stays on the first kube node, which no drill cuts off.
pub(crate) async fn operator(cluster: &Cluster, helm: Helm) -> Result<()> {
    cluster.namespace(SYSTEM).await?;
    let chart = repository().join("charts/collab-operator");
    let chart = chart.to_str().context("the path is text")?;
    let arguments = [
        "upgrade",
        "--install",
        "collab-operator",
        chart,
        "--namespace",
        SYSTEM,
        "--set",
        "replicas=1,images.registry=collab.test",
        "--set",
        "images.tag=e2e,nodeSelector.kubernetes\\.io/hostname=node1",
        "--wait",
        "--timeout",
        "120s",
    ];
    cluster.helm(helm, &arguments).await?;
    Ok(())
}

/// A collaboration cluster, named like its namespace.
pub(crate) struct Collab<'cluster> {
    pub(crate) namespace: Namespace<'cluster>,
    /// For clients.
    pub(crate) token: String,
    control_token: String,
}

impl<'cluster> Collab<'cluster> {
    /// Applies a manifest, with `NAME` for the name of the cluster, and waits until it is ready.
    pub(crate) async fn apply(
        cluster: &'cluster Cluster,
        name: &str,
        manifest: &str,
    ) -> Result<Self> {
        let namespace = cluster.namespace(name).await?;
        let begun = Instant::now();
        namespace.apply(&manifest.replace("NAME", name)).await?;
        let collab = Self::ready(namespace).await?;
        println!(
            "{name}: ready {:.1} s after kubectl apply",
            begun.elapsed().as_secs_f64()
        );
        Ok(collab)
    }

    /// Waits until the cluster in a namespace is ready.
    pub(crate) async fn ready(namespace: Namespace<'cluster>) -> Result<Self> {
        namespace
            .wait(
                &format!("collabcluster/{}", namespace.name()),
                "Ready",
                READY,
            )
            .await?;
        let name = namespace.name();
        let secret = namespace.secret(&format!("{name}-auth"), "secret").await?;
        let control_token = namespace
            .secret(&format!("{name}-control"), "token")
            .await?;
        let claims = json!({ "sub": "drill", "exp": get_current_timestamp() + 3_600 });
        let token = jsonwebtoken::encode(
            &Header::default(),
            &claims,
            &EncodingKey::from_secret(secret.as_bytes()),
        )?;
        Ok(Self {
            namespace,
            token,
            control_token,
        })
    }

    fn name(&self) -> &str {
        self.namespace.name()
    }

    /// Names of the node pods, in order.
    pub(crate) async fn pods(&self) -> Result<Vec<String>> {
        let selector = format!(
            "app.kubernetes.io/instance={},app.kubernetes.io/component=node",
            self.name()
        );
        let mut pods = self.namespace.pods(&selector).await?;
        pods.sort_unstable();
        Ok(pods)
    }

    /// `http://…` address of a pod for clients.
    pub(crate) async fn url(&self, pod: &str) -> Result<String> {
        Ok(format!(
            "http://{}:8080",
            self.namespace.pod_address(pod).await?
        ))
    }

    /// `http://…` addresses of all node pods for clients.
    pub(crate) async fn urls(&self) -> Result<Vec<String>> {
        let mut urls = Vec::new();
        for pod in self.pods().await? {
            urls.push(self.url(&pod).await?);
        }
        Ok(urls)
    }

    /// The cluster as the node at an address sees it.
    pub(crate) async fn report(&self, pod: &str) -> Result<ClusterReport> {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .timeout(Duration::from_secs(2))
            .build()?;
        let url = format!(
            "http://{}:8081/control/v1/report",
            self.namespace.pod_address(pod).await?
        );
        let answer = client
            .get(url)
            .bearer_auth(&self.control_token)
            .send()
            .await?;
        Ok(answer.error_for_status()?.json().await?)
    }

    /// Waits until a pod reports what is wanted, and answers how long that took.
    pub(crate) async fn until(
        &self,
        pod: &str,
        patience: Duration,
        what: &str,
        wanted: impl Fn(&ClusterReport) -> bool,
    ) -> Result<Duration> {
        let begun = Instant::now();
        loop {
            let report = self.report(pod).await;
            if report.as_ref().is_ok_and(&wanted) {
                return Ok(begun.elapsed());
            }
            if patience < begun.elapsed() {
                let members = report.map(|report| (report.members, report.moving));
                anyhow::bail!("waited {patience:?} in vain until {what}: {members:?}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The status of the resource.
    pub(crate) async fn status(&self) -> Result<Value> {
        let object = self.namespace.get(&["collabcluster", self.name()]).await?;
        Ok(object["status"].clone())
    }

    /// Waits for a status.
    pub(crate) async fn until_status(
        &self,
        patience: Duration,
        what: &str,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let begun = Instant::now();
        loop {
            let status = self.status().await?;
            if wanted(&status) {
                return Ok(status);
            }
            ensure!(
                begun.elapsed() < patience,
                "waited {patience:?} in vain until {what}: {status:#}"
            );
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    /// Ends the processes of all nodes at once, so that what comes back was read from the store.
    pub(crate) async fn restart_all(&self) -> Result<()> {
        let pods = self.pods().await?;
        let mut old = Vec::with_capacity(pods.len());
        for pod in &pods {
            old.push(self.uid(pod).await?);
        }
        // Not with kubectl's own wait: a pod that its set makes again at once under the same name can slip past it.
        let mut arguments = vec!["delete", "pod", "--wait=false", "--grace-period=5"];
        arguments.extend(pods.iter().map(String::as_str));
        self.namespace.kubectl(&arguments).await?;
        for (pod, old) in pods.iter().zip(&old) {
            self.namespace
                .until(
                    "another pod in its place",
                    Duration::from_mins(1),
                    || async {
                        let uid = self.uid(pod).await?;
                        ensure!(uid != *old, "{pod} is still the old one, {uid}");
                        Ok(())
                    },
                )
                .await?;
            self.namespace
                .wait(&format!("pod/{pod}"), "Ready", Duration::from_mins(1))
                .await?;
        }
        Ok(())
    }

    /// What tells a pod from another of the same name.
    async fn uid(&self, pod: &str) -> Result<String> {
        let found = self.namespace.get(&["pod", pod]).await?;
        let uid = found["metadata"]["uid"].as_str();
        Ok(uid.context("a pod without a uid")?.to_owned())
    }
}

/// Whether every slot has a living owner other than `lost`.
pub(crate) fn owned_without(report: &ClusterReport, lost: uuid::Uuid) -> bool {
    !report.owners.is_empty()
        && report.owners.iter().all(|owner| {
            owner.is_some_and(|owner| {
                let member = &report.members[usize::from(owner)];
                member.live && member.incarnation != lost
            })
        })
}
