//! A real Prometheus that scrapes pods with the labels that a `PodMonitor` of the Prometheus operator would give them.

use super::{Cluster, Namespace, RUN};
use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// A running Prometheus; it ends with the program.
#[derive(Debug)]
pub struct Prometheus {
    folder: PathBuf,
    address: String,
}

impl Prometheus {
    /// Starts a server that scrapes nothing yet, and waits until it is ready.
    ///
    /// # Errors
    /// When it does not start.
    pub async fn start(cluster: &Cluster) -> Result<Self> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string();
        let name = format!("prometheus-{}", address.replace(':', "-"));
        let folder = Path::new(RUN).join(&name);
        fs::create_dir_all(folder.join("targets"))?;
        let config = json!({
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
            "scrape_configs": [{
                "job_name": "pods",
                "file_sd_configs": [{"files": [folder.join("targets/*.json")]}],
            }],
        });
        fs::write(folder.join("prometheus.yaml"), config.to_string())?;
        cluster.spawn(
            &name,
            Command::new("prometheus").args([
                format!("--config.file={}/prometheus.yaml", folder.display()),
                format!("--storage.tsdb.path={}/data", folder.display()),
                format!("--web.listen-address={address}"),
            ]),
        )?;
        let prometheus = Self { folder, address };
        cluster
            .until("Prometheus", Duration::from_secs(30), || {
                prometheus.get("/-/ready", &[])
            })
            .await?;
        Ok(prometheus)
    }

    /// Scrapes once a second the container port named `port` of each pod that `selector` finds now; called again, those
    /// that it finds then. Series carry the labels `namespace`, `pod`, `container` and the pod's `app_kubernetes_io_…`.
    ///
    /// # Errors
    /// When the pods cannot be listed.
    pub async fn scrape(
        &self,
        namespace: &Namespace<'_>,
        selector: &str,
        port: &str,
    ) -> Result<()> {
        let pods = namespace.get(&["pods", "--selector", selector]).await?;
        let mut targets = Vec::new();
        for pod in pods["items"].as_array().context("not a list")? {
            let mut labels = Map::new();
            for (name, value) in pod["metadata"]["labels"].as_object().into_iter().flatten() {
                if name.starts_with("app.kubernetes.io/") {
                    labels.insert(name.replace(['.', '/', '-'], "_"), value.clone());
                }
            }
            if let Some(cluster) = labels.get("app_kubernetes_io_instance").cloned() {
                labels.insert("cluster".into(), cluster);
            }
            labels.insert("namespace".into(), namespace.name().into());
            labels.insert("pod".into(), pod["metadata"]["name"].clone());
            for container in pod["spec"]["containers"].as_array().into_iter().flatten() {
                let mut ports = container["ports"].as_array().into_iter().flatten();
                let Some(found) = ports.find(|found| found["name"] == port) else {
                    continue;
                };
                let Some(address) = pod["status"]["podIP"].as_str() else {
                    continue;
                };
                labels.insert("container".into(), container["name"].clone());
                let address = format!("{address}:{}", found["containerPort"]);
                targets.push(json!({"targets": [address], "labels": labels}));
            }
        }
        // Renamed, so that none is read half written.
        let file = self
            .folder
            .join("targets")
            .join(format!("{}.json", namespace.name()));
        let partial = file.with_extension("partial");
        fs::write(&partial, Value::from(targets).to_string())?;
        Ok(fs::rename(partial, file)?)
    }

    /// The result of a `PromQL` query at this moment: a list of series.
    ///
    /// # Errors
    /// When the query is not valid.
    pub async fn query(&self, query: &str) -> Result<Vec<Value>> {
        let answer: Value =
            serde_json::from_str(&self.get("/api/v1/query", &[("query", query)]).await?)?;
        Ok(answer["data"]["result"]
            .as_array()
            .context("not a list of series")?
            .clone())
    }

    async fn get(&self, path: &str, parameters: &[(&str, &str)]) -> Result<String> {
        let url = format!("http://{}{path}", self.address);
        let answer = reqwest::get(reqwest::Url::parse_with_params(&url, parameters)?).await?;
        let status = answer.status();
        let text = answer.text().await?;
        ensure!(status.is_success(), "{path}: {status}: {text}");
        Ok(text)
    }
}
