//! One namespace of a cluster: what a test makes, reads and breaks in it.

use super::{Cluster, RUN};
use crate::command;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// A namespace of a [`Cluster`]; it stays until it is deleted.
#[derive(Debug, Clone)]
pub struct Namespace<'cluster> {
    cluster: &'cluster Cluster,
    name: String,
}

impl<'cluster> Namespace<'cluster> {
    pub(super) fn new(cluster: &'cluster Cluster, name: &str) -> Self {
        Self {
            cluster,
            name: name.into(),
        }
    }

    /// The namespace's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cluster it is in.
    pub fn cluster(&self) -> &'cluster Cluster {
        self.cluster
    }

    /// Runs kubectl in this namespace and returns what it prints.
    ///
    /// # Errors
    /// When it fails, with what it says.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.cluster
            .kubectl(&[&["--namespace", &self.name], arguments].concat())
            .await
    }

    /// Applies manifests: YAML, one or more documents, without their namespace.
    ///
    /// # Errors
    /// When the API server refuses one, with its message.
    pub async fn apply(&self, manifests: &str) -> Result<String> {
        self.cluster
            .apply_in(&["--namespace", &self.name], manifests)
            .await
    }

    /// The object, or the list, as JSON; `arguments` are those of `kubectl get`.
    ///
    /// # Errors
    /// When there is none.
    pub async fn get(&self, arguments: &[&str]) -> Result<Value> {
        self.cluster
            .get(&[&["--namespace", &self.name], arguments].concat())
            .await
    }

    /// Waits until the condition of an object (`kind/name`) is true.
    ///
    /// # Errors
    /// When it does not come to that in time; then with the object's status.
    pub async fn wait(&self, object: &str, condition: &str, timeout: Duration) -> Result<()> {
        self.until(&format!("{object} {condition}"), timeout, || async move {
            let object = self.get(&[object]).await?;
            let conditions = object["status"]["conditions"]
                .as_array()
                .map_or(&[][..], Vec::as_slice);
            let found = conditions.iter().find(|one| one["type"] == condition);
            ensure!(
                found.is_some_and(|one| one["status"] == "True"),
                "its status is {}",
                object["status"]
            );
            Ok(())
        })
        .await
    }

    /// Waits as [`Cluster::until`] does.
    ///
    /// # Errors
    /// As there.
    pub async fn until<T, F: Future<Output = Result<T>>>(
        &self,
        what: &str,
        timeout: Duration,
        attempt: impl FnMut() -> F,
    ) -> Result<T> {
        self.cluster
            .until(&format!("{}: {what}", self.name), timeout, attempt)
            .await
    }

    /// Runs a program in a pod's first container and returns what it prints.
    ///
    /// # Errors
    /// When it fails, with what it says.
    pub async fn exec(&self, pod: &str, program: &[&str]) -> Result<String> {
        self.kubectl(&[&["exec", pod, "--"], program].concat())
            .await
    }

    /// Everything a pod's containers have logged since their last start.
    ///
    /// # Errors
    /// When there is no such pod.
    pub async fn logs(&self, pod: &str) -> Result<String> {
        self.kubectl(&["logs", pod, "--all-containers"]).await
    }

    /// Names of the pods that a label selector finds.
    ///
    /// # Errors
    /// When the API server does not answer.
    pub async fn pods(&self, selector: &str) -> Result<Vec<String>> {
        let pods = self.get(&["pods", "--selector", selector]).await?;
        let names = pods["items"].as_array().context("not a list")?.iter();
        Ok(names
            .filter_map(|pod| pod["metadata"]["name"].as_str())
            .map(str::to_string)
            .collect())
    }

    /// Address of a pod, which can be dialled as it is.
    ///
    /// # Errors
    /// When there is no such pod or it has no address yet.
    pub async fn pod_address(&self, pod: &str) -> Result<IpAddr> {
        let pod = self.get(&["pod", pod]).await?;
        pod["status"]["podIP"]
            .as_str()
            .context("the pod has no address yet")?
            .parse()
            .context("address of a pod")
    }

    /// Address and first port of a service, which can be dialled as they are.
    ///
    /// # Errors
    /// When there is no such service or it is headless.
    pub async fn service_address(&self, service: &str) -> Result<SocketAddr> {
        let service = self.get(&["service", service]).await?;
        let port = service["spec"]["ports"][0]["port"]
            .as_u64()
            .context("the service has no port")?;
        let address = service["spec"]["clusterIP"]
            .as_str()
            .context("the service has no address")?;
        format!("{address}:{port}")
            .parse()
            .with_context(|| format!("address of the service: {address}"))
    }

    /// Name of the kube node that a pod runs on.
    ///
    /// # Errors
    /// When there is no such pod or it is not placed yet.
    pub async fn kube_node_of(&self, pod: &str) -> Result<String> {
        let pod = self.get(&["pod", pod]).await?;
        Ok(pod["spec"]["nodeName"]
            .as_str()
            .context("the pod is not placed yet")?
            .to_string())
    }

    /// Kills the first process of a container with signal 9, as a crash would; Kubernetes starts it again.
    ///
    /// # Errors
    /// When the container does not run.
    pub async fn kill(&self, pod: &str, container: &str) -> Result<()> {
        let pod = self.get(&["pod", pod]).await?;
        let kube_node = pod["spec"]["nodeName"]
            .as_str()
            .context("the pod is not placed yet")?;
        let statuses = pod["status"]["containerStatuses"]
            .as_array()
            .context("the pod has no containers yet")?;
        let status = statuses
            .iter()
            .find(|status| status["name"] == container)
            .context("no such container")?;
        let id = status["containerID"]
            .as_str()
            .context("the container does not run")?
            .trim_start_matches("containerd://");
        let mut ctr = Command::new("ctr");
        ctr.arg("--address")
            .arg(Path::new(RUN).join(kube_node).join("containerd.sock"));
        ctr.args([
            "--namespace=k8s.io",
            "tasks",
            "kill",
            "--signal=SIGKILL",
            id,
        ]);
        command::output_of(ctr).await.map(drop)
    }

    /// How often a container was started again.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn restarts(&self, pod: &str, container: &str) -> Result<u64> {
        let pod = self.get(&["pod", pod]).await?;
        let statuses = pod["status"]["containerStatuses"]
            .as_array()
            .context("the pod has no containers yet")?;
        let status = statuses
            .iter()
            .find(|status| status["name"] == container)
            .context("no such container")?;
        status["restartCount"]
            .as_u64()
            .context("no count of restarts")
    }

    /// Value of a key of a Secret, decoded.
    ///
    /// # Errors
    /// When there is no such Secret or key.
    pub async fn secret(&self, name: &str, key: &str) -> Result<String> {
        let template = format!("--output=go-template={{{{index .data {key:?} | base64decode}}}}");
        self.kubectl(&["get", "secret", name, &template]).await
    }

    /// Deletes the namespace and waits until all in it is gone.
    ///
    /// # Errors
    /// When it is not gone within two minutes.
    pub async fn delete(self) -> Result<()> {
        self.cluster
            .kubectl(&["delete", "namespace", &self.name, "--timeout=120s"])
            .await
            .map(drop)
    }
}
