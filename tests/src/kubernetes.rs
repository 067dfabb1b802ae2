//! A real Kubernetes on this machine: control plane, kube nodes, name service, volumes; and the means to use and to hurt it.
//!
//! All of it lives in a [`Sandbox`]. The program in the sandbox stands where the control plane is: it reaches kube nodes,
//! pods and services by their addresses. `node1` is the kube node that no test cuts off.

mod namespace;
mod pki;
mod prometheus;

use crate::command;
use crate::images::Image;
use crate::sandbox;
use crate::tools::{KUBERNETES, Tools};
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tokio::process::Child;

pub use crate::sandbox::{RUN, Sandbox, inside};
pub use namespace::Namespace;
pub use prometheus::Prometheus;

// RFC 2544: networks for tests. The bridge is made before anything dials into them.
const HOST: &str = "198.18.0.1";
const API_SERVER: &str = "https://198.18.0.1:6443";
const SERVICES: &str = "198.19.0.0/24";
const FIRST_SERVICE: &str = "198.19.0.1";
const PODS: &str = "198.19.128.0/17";

/// Volumes of each kube node. They are never used twice, as their data is kept.
const VOLUMES: usize = 40;

/// A running Kubernetes; it ends with the program.
#[derive(Debug)]
pub struct Cluster {
    tools: Tools,
    /// Processes that have to live, with their names.
    parts: Mutex<Vec<(String, Child)>>,
    kube_nodes: Vec<KubeNode>,
}

#[derive(Debug, Clone)]
struct KubeNode {
    name: String,
    zone: String,
    /// Number from 1 up, from which its addresses follow.
    number: usize,
}

/// A command line of Helm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Helm {
    /// Helm 3.
    V3,
    /// Helm 4.
    V4,
}

impl KubeNode {
    fn address(&self) -> String {
        format!("198.18.0.{}", 10 + self.number)
    }

    fn pods(&self) -> String {
        format!("198.19.{}.0/24", 128 + self.number)
    }

    /// This end of the cable to the kube node.
    fn link(&self) -> String {
        format!("v{}", self.name)
    }

    fn folder(&self) -> PathBuf {
        Path::new(RUN).join(&self.name)
    }
}

impl Cluster {
    /// Starts a cluster with a kube node `node1`, `node2` … in each of `zones`, and waits until pods can run.
    ///
    /// # Errors
    /// Outside a sandbox, or when a part does not start; the part's log is in the error.
    pub async fn start(tools: &Tools, images: &[Image], zones: &[&str]) -> Result<Self> {
        sandbox::furnish(&[
            "sysctl -qw net.ipv4.ip_forward=1",
            "ip link add k8s0 type bridge",
            &format!("ip addr add {HOST}/24 dev k8s0"),
            "ip link set k8s0 up",
            // Only so that there is a way to services; the proxy turns it into one to a pod.
            &format!("ip route add {SERVICES} dev k8s0"),
        ])?;
        // For clients of HTTPS in this program; the only error is that there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let kube_node = |(index, zone): (usize, &&str)| KubeNode {
            name: format!("node{}", index + 1),
            zone: (*zone).to_string(),
            number: index + 1,
        };
        let kube_nodes: Vec<KubeNode> = zones.iter().enumerate().map(kube_node).collect();
        pki::write(
            &kube_nodes
                .iter()
                .map(|node| (node.name.clone(), node.address()))
                .collect::<Vec<_>>(),
        )?;
        let cluster = Self {
            tools: tools.clone(),
            parts: Mutex::default(),
            kube_nodes,
        };

        cluster.start_etcd()?;
        cluster.start_api_server()?;
        for node in &cluster.kube_nodes {
            cluster.start_kube_node(node, images)?;
        }
        cluster
            .until("API server", Duration::from_secs(90), || async {
                cluster.kubectl(&["get", "--raw", "/readyz"]).await
            })
            .await?;
        cluster.start_controllers()?;
        cluster
            .apply(&fs::read_to_string(
                Path::new(KUBERNETES).join("cluster.yaml"),
            )?)
            .await?;
        cluster.apply(&cluster.volumes()?).await?;
        cluster
            .until("kube nodes", Duration::from_mins(3), || async {
                let nodes = cluster
                    .kube_nodes
                    .iter()
                    .map(|node| format!("node/{}", node.name));
                let wait = ["wait", "--for=condition=Ready", "--timeout=5s"].map(String::from);
                let wait: Vec<String> = wait.into_iter().chain(nodes).collect();
                cluster
                    .kubectl(&wait.iter().map(String::as_str).collect::<Vec<_>>())
                    .await
            })
            .await?;
        let rollout = [
            "rollout",
            "status",
            "deployment/coredns",
            "--namespace=kube-system",
            "--timeout=90s",
        ];
        cluster.kubectl(&rollout).await?;
        cluster
            .until("images", Duration::from_mins(3), || async {
                let waits = cluster
                    .kube_nodes
                    .iter()
                    .find(|node| !node.folder().join("ready").exists());
                ensure!(waits.is_none(), "{waits:?} still reads them");
                Ok(())
            })
            .await?;
        Ok(cluster)
    }

    /// File by which a client of the API server gets the rights of `system:masters`.
    pub fn kubeconfig(&self) -> PathBuf {
        pki::folder().join("admin.kubeconfig")
    }

    /// Names of the kube nodes, `node1` first.
    pub fn kube_nodes(&self) -> Vec<&str> {
        self.kube_nodes
            .iter()
            .map(|node| node.name.as_str())
            .collect()
    }

    /// Runs kubectl and returns what it prints.
    ///
    /// # Errors
    /// When it fails, with what it says.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        let mut kubectl = Command::new(self.tools.path("kubectl"));
        kubectl
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            .args(arguments);
        command::output_of(kubectl).await
    }

    /// Runs Helm and returns what it prints.
    ///
    /// # Errors
    /// When it fails, with what it says.
    pub async fn helm(&self, version: Helm, arguments: &[&str]) -> Result<String> {
        let name = match version {
            Helm::V3 => "helm3",
            Helm::V4 => "helm4",
        };
        let mut helm = Command::new(self.tools.path(name));
        helm.args(arguments).env("KUBECONFIG", self.kubeconfig());
        for (variable, folder) in [
            ("HELM_CACHE_HOME", "cache"),
            ("HELM_CONFIG_HOME", "config"),
            ("HELM_DATA_HOME", "data"),
        ] {
            helm.env(variable, Path::new(RUN).join(name).join(folder));
        }
        command::output_of(helm).await
    }

    /// Applies manifests: YAML, one or more documents, each with its namespace.
    ///
    /// # Errors
    /// When the API server refuses one, with its message.
    pub async fn apply(&self, manifests: &str) -> Result<String> {
        self.apply_in(&[], manifests).await
    }

    async fn apply_in(&self, namespace: &[&str], manifests: &str) -> Result<String> {
        let file = Path::new(RUN).join(format!("{}.yaml", uuid::Uuid::new_v4()));
        fs::write(&file, manifests)?;
        let applied = self
            .kubectl(&[namespace, &["apply", "--filename", &file.to_string_lossy()]].concat())
            .await;
        fs::remove_file(file)?;
        applied
    }

    /// The object as JSON; `arguments` are those of `kubectl get`.
    ///
    /// # Errors
    /// When there is none.
    pub async fn get(&self, arguments: &[&str]) -> Result<Value> {
        let arguments = [&["get", "--output=json"], arguments].concat();
        Ok(serde_json::from_str(&self.kubectl(&arguments).await?)?)
    }

    /// Makes a namespace that admits only pods of the standard `restricted`.
    ///
    /// # Errors
    /// When it exists already.
    pub async fn namespace(&self, name: &str) -> Result<Namespace<'_>> {
        self.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {{pod-security.kubernetes.io/enforce: restricted}}}}}}"
        ))
        .await?;
        Ok(Namespace::new(self, name))
    }

    /// A namespace that exists already.
    pub fn existing_namespace(&self, name: &str) -> Namespace<'_> {
        Namespace::new(self, name)
    }

    /// Sets labels of a kube node, each `key=value`, or `key-` to remove one.
    ///
    /// # Errors
    /// When there is no such kube node.
    pub async fn label(&self, kube_node: &str, labels: &[&str]) -> Result<()> {
        self.kubectl(&[&["label", "--overwrite", "node", kube_node], labels].concat())
            .await
            .map(drop)
    }

    /// Cuts a kube node off: nothing it sends arrives, nothing reaches it, and no connection is reset.
    ///
    /// # Errors
    /// When there is no such kube node.
    pub fn cut(&self, kube_node: &str) -> Result<()> {
        self.set_link(kube_node, "down")
    }

    /// Ends [`Cluster::cut`].
    ///
    /// # Errors
    /// When there is no such kube node.
    pub fn heal(&self, kube_node: &str) -> Result<()> {
        self.set_link(kube_node, "up")
    }

    /// Waits until Kubernetes says of the kube node that it is ready, or that it is not.
    ///
    /// # Errors
    /// When it does not come to that in time.
    pub async fn wait_kube_node(
        &self,
        kube_node: &str,
        ready: bool,
        timeout: Duration,
    ) -> Result<()> {
        self.until(&format!("{kube_node} ready={ready}"), timeout, || async {
            let node = self.get(&["node", kube_node]).await?;
            let conditions = node["status"]["conditions"]
                .as_array()
                .context("no conditions")?;
            let status = conditions
                .iter()
                .find(|condition| condition["type"] == "Ready")
                .map(|found| &found["status"]);
            ensure!(
                status.is_some_and(|status| (status == "True") == ready),
                "status {status:?}"
            );
            Ok(())
        })
        .await
    }

    /// Calls `attempt` until it succeeds, a few times a second, as long as the parts of the cluster live.
    ///
    /// # Errors
    /// The last error after `timeout`, or that of a part that has ended.
    pub async fn until<T, F: Future<Output = Result<T>>>(
        &self,
        what: &str,
        timeout: Duration,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            let error = match attempt().await {
                Ok(value) => return Ok(value),
                Err(error) => error,
            };
            self.check_parts()?;
            if start.elapsed() > timeout {
                return Err(error.context(format!("{what}: not within {timeout:?}")));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What is going on, for the reader of a failed test: pods, events, and the ends of the pods' logs.
    pub async fn describe(&self) -> String {
        let mut text = String::new();
        self.show(&mut text, &["get", "nodes", "--output=wide"])
            .await;
        self.show(
            &mut text,
            &[
                "get",
                "pods,persistentvolumeclaims",
                "--all-namespaces",
                "--output=wide",
            ],
        )
        .await;
        self.show(
            &mut text,
            &[
                "get",
                "events",
                "--all-namespaces",
                "--sort-by=.lastTimestamp",
            ],
        )
        .await;
        let pods = self
            .get(&["pods", "--all-namespaces"])
            .await
            .unwrap_or_default();
        for pod in pods["items"].as_array().into_iter().flatten() {
            let metadata = &pod["metadata"];
            let (Some(namespace), Some(name)) =
                (metadata["namespace"].as_str(), metadata["name"].as_str())
            else {
                continue;
            };
            let logs = [
                "logs",
                "--all-containers",
                "--tail=40",
                "--namespace",
                namespace,
                name,
            ];
            self.show(&mut text, &logs).await;
            let restarts = pod["status"]["containerStatuses"][0]["restartCount"].as_u64();
            if restarts.is_some_and(|count| count > 0) {
                self.show(&mut text, &[&logs[..], &["--previous"]].concat())
                    .await;
            }
        }
        text
    }

    /// Adds the last lines that kubectl prints.
    async fn show(&self, text: &mut String, arguments: &[&str]) {
        let shown = self
            .kubectl(arguments)
            .await
            .unwrap_or_else(|error| format!("{error:#}"));
        let lines: Vec<&str> = shown.lines().collect();
        let end = lines[lines.len().saturating_sub(40)..].join("\n");
        let _ = writeln!(text, "--- kubectl {}\n{end}", arguments.join(" "));
    }

    fn set_link(&self, kube_node: &str, state: &str) -> Result<()> {
        let node = self
            .kube_nodes
            .iter()
            .find(|node| node.name == kube_node)
            .context("no such kube node")?;
        command::output(Command::new("ip").args(["link", "set", &node.link(), state])).map(drop)
    }

    fn start_etcd(&self) -> Result<()> {
        self.spawn(
            "etcd",
            Command::new(self.tools.path("etcd")).args([
                &format!("--data-dir={RUN}/etcd"),
                "--listen-client-urls=http://127.0.0.1:2379",
                "--advertise-client-urls=http://127.0.0.1:2379",
                "--listen-peer-urls=http://127.0.0.1:2380",
                "--unsafe-no-fsync",
            ]),
        )
    }

    fn start_api_server(&self) -> Result<()> {
        let pki = pki::folder();
        let pki = pki.display();
        self.spawn(
            "kube-apiserver",
            Command::new(self.tools.path("kube-apiserver")).args([
                "--etcd-servers=http://127.0.0.1:2379",
                "--secure-port=6443",
                "--authorization-mode=Node,RBAC",
                "--enable-admission-plugins=NodeRestriction",
                "--service-account-issuer=https://kubernetes.default.svc",
                // Else logs and exec ask for a kube node's name, which nobody resolves.
                "--kubelet-preferred-address-types=InternalIP",
                &format!("--advertise-address={HOST}"),
                &format!("--service-cluster-ip-range={SERVICES}"),
                &format!("--client-ca-file={pki}/ca.crt"),
                &format!("--tls-cert-file={pki}/apiserver.crt"),
                &format!("--tls-private-key-file={pki}/apiserver.key"),
                &format!("--kubelet-certificate-authority={pki}/ca.crt"),
                &format!("--kubelet-client-certificate={pki}/kubelet-client.crt"),
                &format!("--kubelet-client-key={pki}/kubelet-client.key"),
                &format!("--service-account-key-file={pki}/service-accounts.pub"),
                &format!("--service-account-signing-key-file={pki}/service-accounts.key"),
            ]),
        )
    }

    /// Starts what needs an API server: controllers, the scheduler, and the proxy by which this program reaches services.
    fn start_controllers(&self) -> Result<()> {
        let pki = pki::folder();
        let pki = pki.display();
        let kubeconfig = |part: &str| format!("{pki}/{part}.kubeconfig");
        let authorized = |part: &str| {
            [
                "kubeconfig",
                "authentication-kubeconfig",
                "authorization-kubeconfig",
            ]
            .map(|flag| format!("--{flag}={}", kubeconfig(part)))
        };
        let part = "kube-controller-manager";
        self.spawn(
            part,
            Command::new(self.tools.path(part))
                .args(authorized(part))
                .args([
                    "--leader-elect=false",
                    "--use-service-account-credentials",
                    // Twice and a half what kubelet.yaml renews in.
                    "--node-monitor-grace-period=20s",
                    "--node-monitor-period=2s",
                    &format!("--cluster-cidr={PODS}"),
                    "--allocate-node-cidrs=false",
                    &format!("--service-account-private-key-file={pki}/service-accounts.key"),
                    &format!("--root-ca-file={pki}/ca.crt"),
                    &format!("--cluster-signing-cert-file={pki}/ca.crt"),
                    &format!("--cluster-signing-key-file={pki}/ca.key"),
                ]),
        )?;
        let part = "kube-scheduler";
        self.spawn(
            part,
            Command::new(self.tools.path(part))
                .args(authorized(part))
                .arg("--leader-elect=false"),
        )?;
        let part = "kube-proxy";
        self.spawn(
            part,
            Command::new(self.tools.path(part)).args([
                &format!("--kubeconfig={}", kubeconfig(part)),
                "--proxy-mode=nftables",
                "--hostname-override=node1",
                // Only the machine's own network may set the table's size.
                "--conntrack-max-per-core=0",
                &format!("--cluster-cidr={PODS}"),
            ]),
        )
    }

    fn start_kube_node(&self, node: &KubeNode, images: &[Image]) -> Result<()> {
        let folder = node.folder();
        fs::create_dir_all(folder.join("cni"))?;
        fs::write(folder.join("cni/pods.conflist"), cni(&node.pods()))?;
        for volume in 0..VOLUMES {
            let volume = folder.join("volumes").join(volume.to_string());
            fs::create_dir_all(&volume)?;
            // Pods of any user write to their volume.
            fs::set_permissions(volume, std::os::unix::fs::PermissionsExt::from_mode(0o777))?;
        }
        let cgroup = sandbox::make_cgroup(&node.name)?;
        let (name, link, address) = (&node.name, node.link(), node.address());
        let mut network = format!(
            "ip netns add {name}
             ip link add {link} type veth peer name eth0 netns {name}
             ip link set {link} master k8s0 up
             ip -n {name} addr add {address}/24 dev eth0
             ip -n {name} link set eth0 up
             ip -n {name} link set lo up
             ip -n {name} route add default via {HOST}
             ip route add {} via {address}\n",
            node.pods()
        );
        for other in self
            .kube_nodes
            .iter()
            .filter(|other| other.number != node.number)
        {
            let _ = writeln!(
                network,
                "ip -n {name} route add {} via {}",
                other.pods(),
                other.address()
            );
        }
        command::output(Command::new("sh").args(["-ec", &network]))?;

        let programs = self
            .tools
            .path("kubelet")
            .parent()
            .context("a program lies in a folder")?;
        let path = format!(
            "{}:/usr/sbin:/sbin:{}",
            programs.display(),
            std::env::var("PATH").unwrap_or_default()
        );
        self.spawn(
            name,
            Command::new("nsenter")
                .arg(format!("--net=/run/netns/{name}"))
                .args([
                    "unshare",
                    "--mount",
                    "--uts",
                    "--pid",
                    "--kill-child",
                    "--mount-proc",
                    "bash",
                ])
                .arg(Path::new(KUBERNETES).join("kube-node.sh"))
                .args([name, &address, &node.zone, &cgroup])
                .args(images.iter().map(|image| &image.archive))
                .env("PATH", path),
        )
    }

    /// Starts a part that has to live as long as the cluster; its log is `NAME.log`.
    fn spawn(&self, name: &str, command: &mut Command) -> Result<()> {
        let mut parts = self
            .parts
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let log = File::create(Path::new(RUN).join(format!("{name}.log")))?;
        let command = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child =
            tokio::process::Command::from(std::mem::replace(command, Command::new("true"))).spawn();
        parts.push((
            name.to_string(),
            child.with_context(|| format!("cannot start {name}"))?,
        ));
        Ok(())
    }

    fn check_parts(&self) -> Result<()> {
        let mut parts = self
            .parts
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        for (name, child) in parts.iter_mut() {
            if let Some(status) = child.try_wait()? {
                let log = fs::read_to_string(Path::new(RUN).join(format!("{name}.log")))
                    .unwrap_or_default();
                let lines: Vec<&str> = log.lines().collect();
                bail!(
                    "{name} ended with {status}:\n{}",
                    lines[lines.len().saturating_sub(30)..].join("\n")
                );
            }
        }
        Ok(())
    }

    /// Manifests of the volumes, each a folder on its kube node.
    fn volumes(&self) -> Result<String> {
        let mut items = Vec::new();
        for node in &self.kube_nodes {
            for volume in 0..VOLUMES {
                items.push(serde_json::json!({
                    "apiVersion": "v1",
                    "kind": "PersistentVolume",
                    "metadata": {"name": format!("{}-{volume}", node.name)},
                    "spec": {
                        "storageClassName": "local",
                        "accessModes": ["ReadWriteOnce"],
                        "capacity": {"storage": "100Gi"},
                        "persistentVolumeReclaimPolicy": "Retain",
                        "hostPath": {"path": node.folder().join("volumes").join(volume.to_string()), "type": "Directory"},
                        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
                            {"key": "kubernetes.io/hostname", "operator": "In", "values": [node.name]},
                        ]}]}},
                    },
                }));
            }
        }
        Ok(serde_json::to_string(
            &serde_json::json!({"apiVersion": "v1", "kind": "List", "items": items}),
        )?)
    }
}

/// Configuration of the container network: a bridge on each kube node, whose pods have addresses out of `subnet`.
fn cni(subnet: &str) -> String {
    serde_json::json!({"cniVersion": "0.4.0", "name": "pods", "plugins": [
        {
            "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
            "ipam": {"type": "host-local", "ranges": [[{"subnet": subnet}]], "routes": [{"dst": "0.0.0.0/0"}]},
        },
        {"type": "portmap", "capabilities": {"portMappings": true}},
    ]})
    .to_string()
}
